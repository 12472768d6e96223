"""The paper's objective, and cross-entropy alone.

    cross-entropy(clean) + gamma_i intrinsic(pair) + gamma_h hamming(pair)          section 5.4, "the final objective"

The ambient term gamma_K |w|^2 is the optimiser's weight decay.
"""

from .. import rng
from ..borders import check_labels
from ..layers import PairBatch
from ..losses import Hamming, of_logits
from ..manifold import corners_of


def standard_step(model, x, labels) -> dict:
    """Cross-entropy on x (N, H, W, C) and labels (N,): {"loss", "cross_entropy"}.

    ValueError for images, or labels, that do not fit each other or the model.
    """
    check_labels(labels, len(x))
    logits, cache = model.forward(x, train=True)
    value, _, gradient = of_logits(logits, labels)
    model.backward(gradient, cache, input_grad=False)
    return {"loss": value, "cross_entropy": value}


def manifold_step(model, x, labels, rho, gamma_i=0.0, gamma_h=0.0, alpha=8.0, per_sample=False) -> dict:
    """Cross-entropy on x, both regularisers on the corners x + rho and x - rho, in one 3N batch [x; x + rho; x - rho].

    x, rho (N, H, W, C); labels (N,). {"loss", "cross_entropy", "intrinsic", "hamming"}, the last two unweighted.
    ``docs/derivations/pair_batch.md``.
    """
    check_labels(labels, len(x))
    tap = Hamming(alpha, gamma_h, per_sample)
    logits, cache = model.forward(PairBatch(x, rho), train=True, tap=tap)
    tap.gather(model.share, len(x))
    ce, pair, gradient = of_logits(logits, labels, gamma_i)
    model.backward(gradient, cache, input_grad=False)
    loss = ce + gamma_i * pair + gamma_h * tap.value
    return {"loss": loss, "cross_entropy": ce, "intrinsic": pair, "hamming": tap.value}


def standard(model, x, labels, draw, now) -> dict:
    """:func:`standard_step`, as ``METHODS`` has it."""
    return standard_step(model, x, labels)


def manifold(model, x, labels, draw, now) -> dict:
    """:func:`manifold_step` at the corners of this step's draw, as ``METHODS`` has it."""
    before = model.share.rows.start * x[0].size  # signs of the batch's images that other ranks have
    words = draw(rng.CORNERS).bit_generator.random_raw(-(-(before + x.size) // 64))
    return at_corners(model, x, labels, corners_of(x, now["eps"], words, before), now)


def at_corners(model, x, labels, rho, now) -> dict:
    """:func:`manifold_step` with the constants of ``now``: the part of a step that follows its draws."""
    per_sample = now["hamming_norm"] == "sample"
    return manifold_step(model, x, labels, rho, now["gamma_i"], now["gamma_h"], now["alpha"], per_sample)
