"""Attacks without the model's gradients: random corners of the ball, and images made for another network.

They are weak, and that is their use: an attack by gradients that breaks fewer images than these is being misled.
"""

import numpy as np

from ..backend import array_module
from .common import Batch, attack, check_inputs, check_logits, logits_of, misclassified, predictions, recheck

CORNER = 100  # the salt of common.draws()


@attack()
def corner_noise(batch: Batch, draws: int = 10):
    """(adversarial, fooled): does a random corner of the ball fool the model? ``draws`` corners at most.

    A corner of the linf ball is x +- eps, with a sign for each pixel and channel; in l2, where balls have no corners,
    the same direction with length eps. Then it is cut off at the box. An image leaves with the first corner that fools
    the model; one that the model gets wrong to begin with is its own adversarial image; one that is never fooled comes
    back unchanged. Signs are drawn for each (seed, id, draw).

    Raises ValueError for images outside [0, 1], a label that is no class, a bad eps or norm.
    """
    x0, ball, xp = batch.x, batch.ball, array_module(batch.x)
    adversarial, fooled = x0.copy(), xp.zeros(len(x0), bool)
    for draw in range(draws):
        left = xp.flatnonzero(~fooled)
        if len(left) == 0:
            break
        signs = [2 * g.integers(0, 2, x0.shape[1:], np.int8) - 1 for g in batch.draws(CORNER, draw, left)]
        corner = x0[left] + x0.dtype.type(ball.eps) * xp.asarray(np.array(signs), x0.dtype)
        corner = ball.project(x0[left], corner)  # in l2 this shortens them to eps
        hit = misclassified(batch.model.forward(corner)[0], batch.labels[left])
        adversarial[left[hit]], fooled[left[hit]] = corner[hit], True
    return adversarial, fooled


def transfer(model, adversarial, x, labels, eps: float, norm: str = "linf", *, batch_size: int = 250):
    """(images, fooled): which of the images that were made to fool another network fool this one?

    ``adversarial`` (N, H, W, C) for the clean images ``x``. An image counts if the model errs on it in a fresh forward
    pass, or on its ``x`` to begin with. The images that come back are ``adversarial`` where that fools, else ``x``.

    Raises ValueError for images in ``adversarial`` that are outside of ball or box: the accuracy would mean nothing.
    Besides for images x outside [0, 1], a label that is no class, a bad eps or norm.
    """
    ball, labels, _ = check_inputs(x, labels, eps, norm=norm)
    if adversarial.shape != x.shape or adversarial.dtype != x.dtype:
        raise ValueError(
            f"adversarial images are {adversarial.dtype} {adversarial.shape}, the images {x.dtype} {x.shape}"
        )
    outside = len(x) - int(ball.inside(x, adversarial).sum()) if len(x) else 0
    if outside:
        raise ValueError(f"{outside} of {len(x)} adversarial images are not in the {norm} ball of {eps:g}, or the box")
    xp = array_module(x)
    images, fooled = x.copy(), xp.zeros(len(x), bool)
    if len(x) == 0:
        return images, fooled
    check_logits(logits_of(model, x[:1]), labels)
    wrong = predictions(model, x, batch_size) != labels
    taken = recheck(model, x, adversarial, labels, eps, norm, batch_size) & ~wrong
    images[taken] = adversarial[taken]
    return images, wrong | taken
