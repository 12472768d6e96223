"""The paper's objective, and cross-entropy alone.

    cross-entropy(clean) + gamma_i intrinsic(pair) + gamma_h hamming(pair)          section 5.4, "the final objective"

The ambient term gamma_K |w|^2 is the optimiser's weight decay.
"""

import numpy as np

from .. import rng
from ..attacks.common import input_gradient
from ..attacks.objectives import cross_entropy_each
from ..backend import array_module
from ..batches import PairBatch
from ..borders import check_labels
from ..losses import Hamming, cross_entropy, of_logits
from ..manifold import corners_of
from ..models import InBfloat16
from ..ops import ops_for


def standard_step(model, x, labels) -> dict:
    """Cross-entropy on x (N, H, W, C) and labels (N,): {"loss", "cross_entropy"}.

    ValueError for images, or labels, that do not fit each other or the model.
    """
    check_labels(labels, len(x))
    logits, cache = model.forward(x, train=True)
    value, _, gradient = of_logits(logits, labels)
    model.backward(gradient, cache, input_grad=False)
    return {"loss": value, "cross_entropy": value}


def manifold_step(model, x, labels, rho, gamma_i=0.0, gamma_h=0.0, alpha=8.0, per_sample=False, share=0.0) -> dict:
    """Cross-entropy on x, both regularisers on the corners x + rho and x - rho, in one 3N batch [x; x + rho; x - rho].

    x, rho (N, H, W, C); labels (N,). {"loss", "cross_entropy", "intrinsic", "hamming"}, the last two unweighted.
    ``docs/derivations/pair_batch.md``. With a ``share`` in (0, 1], so much of the cross-entropy is that on x + rho,
    which is reported as "adversarial" (``docs/derivations/worst_corner.md``).
    """
    check_labels(labels, len(x))
    tap = Hamming(alpha, gamma_h, per_sample)
    logits, cache = model.forward(PairBatch(x, rho), train=True, tap=tap)
    tap.gather(model.share, len(x))
    ce, pair, gradient = of_logits(logits, labels, gamma_i)
    parts = {"loss": ce, "cross_entropy": ce, "intrinsic": pair, "hamming": tap.value}
    if share:
        n = len(x)
        moved, by_moved = cross_entropy(logits[n : 2 * n], labels)
        gradient[:n] *= 1 - share
        gradient[n : 2 * n] += share * by_moved
        parts |= {"loss": (1 - share) * ce + share * moved, "adversarial": moved}
    model.backward(gradient, cache, input_grad=False)
    return parts | {"loss": parts["loss"] + gamma_i * pair + gamma_h * tap.value}


def standard(model, x, labels, draw, now) -> dict:
    """:func:`standard_step`, as ``METHODS`` has it."""
    return standard_step(model, x, labels)


def manifold(model, x, labels, draw, now) -> dict:
    """:func:`manifold_step` at the corners of this step's draw, as ``METHODS`` has it."""
    return at_corners(model, x, labels, drawn_corners(model, x, draw, now), now)


def drawn_corners(model, x, draw, now):
    """rho, shaped as x: this rank's rows of this step's draw."""
    before = model.share.rows.start * x[0].size  # signs of the batch's images that other ranks have
    words = draw(rng.CORNERS).bit_generator.random_raw(-(-(before + x.size) // 64))
    return corners_of(x, now["eps"], words, before)


def worst_corner(model, x, labels, draw, now) -> dict:
    """:func:`manifold_step` at the corners that a step up the cross-entropy chooses, x + rho being the worse one.

    ``share`` of the cross-entropy is taken there. ``docs/derivations/worst_corner.md``.
    """
    rho = worse_corners(model, x, labels, drawn_corners(model, x, draw, now), now["start"])
    return at_corners(model, x, labels, rho, now, now["share"])


def worse_corners(model, x, labels, rho, start=0.5):
    """|rho| sign(g), g the gradient of the cross-entropy by the image at x + ``start`` rho: (N, H, W, C).

    Where g is 0 the corner stays as it was drawn. Batch norms are in evaluation mode. ValueError for a rho, or labels,
    that do not fit x.
    """
    PairBatch(x, rho).checked()
    labels, xp, ops, dtype = check_labels(labels, len(x)), array_module(x), ops_for(x), x.dtype
    if dtype.name == "bfloat16":
        model, x, rho = InBfloat16(model), ops.cast(x, np.float32), ops.cast(rho, np.float32)
    gradient = input_gradient(model, x + start * rho, lambda z: cross_entropy_each(z, labels)[1])
    chosen = xp.where(gradient == 0, rho, xp.copysign(rho, gradient))
    return ops.cast(chosen, dtype) if dtype.name == "bfloat16" else chosen


def at_corners(model, x, labels, rho, now, share=0.0) -> dict:
    """:func:`manifold_step` with the constants of ``now``: the part of a step that follows its draws."""
    per_sample = now["hamming_norm"] == "sample"
    return manifold_step(model, x, labels, rho, now["gamma_i"], now["gamma_h"], now["alpha"], per_sample, share)
