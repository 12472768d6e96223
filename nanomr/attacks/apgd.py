"""Auto-PGD (Croce and Hein 2020, algorithm 1): PGD with momentum that chooses its own step size.

The step starts at 2 eps and is halved, image by image, at checkpoints where the loss has stopped rising; that image
then goes on from its best iterate so far. There is nothing to tune but the number of steps.
"""

from collections.abc import Callable

import numpy as np

from ..backend import array_module
from .common import APGD_CE, APGD_DLR, APGD_T, Batch, attack, misclassified, per_image
from .objectives import cross_entropy_each, dlr, dlr_targeted

LOSSES = {"ce": (cross_entropy_each, APGD_CE, 2), "dlr": (dlr, APGD_DLR, 3)}  # name: function, salt, fewest classes


def checkpoints(steps: int) -> list[int]:
    """The iterations (from 1) at which step sizes are reviewed: 22, 41, 57, 70, 80, 87, 93, 99 of 100.

    The windows between them shrink from 22% of the steps by 3% at a time to 6%.
    """
    window, shrink, least = (max(share * steps // 100, 1) for share in (22, 3, 6))
    found, at = [], window
    while at <= steps:
        found.append(at)
        window = max(window - shrink, least)
        at += window
    return found


class StepSizes:
    """Each image's step size, by its losses: call :meth:`see` with those of the start, then of each iterate."""

    def __init__(self, step, steps: int):
        xp, n = array_module(step), len(step)
        self.step, self.ends, self.seen, self.began = step, checkpoints(steps), 0, 0
        self.best = xp.full(n, -np.inf, step.dtype)
        # The first iterate is compared with 0, not with the start's loss: a quirk of the authors' code, where the row
        # before the first is the last, still zero. Kept for parity. So it counts as a rise for the cross-entropy, and
        # never for the DLR of an image that is still right.
        self.last = xp.zeros(n, step.dtype)
        self.rises = xp.zeros(n, int)
        self.best_at_checkpoint, self.halved = self.best, xp.ones(n, bool)  # the first review has no second condition

    def see(self, loss):
        """(better, halve): is this each image's best loss so far; was its step halved, so that it must go back?"""
        xp = array_module(loss)
        better = loss > self.best
        self.best = xp.where(better, loss, self.best)
        if self.seen == 0:
            self.best_at_checkpoint = self.best
        else:
            self.rises += loss > self.last
            self.last = loss
        halve = xp.zeros(len(loss), bool)
        if self.seen in self.ends:
            halve = self.rises <= 0.75 * (self.seen - self.began)
            halve |= ~self.halved & (self.best_at_checkpoint >= self.best)
            self.step = xp.where(halve, self.step * 0.5, self.step)
            self.best_at_checkpoint, self.halved, self.rises = self.best, halve, xp.zeros_like(self.rises)
            self.began = self.seen
        self.seen += 1
        return better, halve

    def keep(self, kept):
        """Forget all images but these."""
        for name in ("step", "best", "last", "rises", "best_at_checkpoint", "halved"):
            setattr(self, name, getattr(self, name)[kept])


def ascend(model, ball, x0, start, labels, objective: Callable, steps: int):
    """(adversarial, fooled) after one run of Auto-PGD from ``start``, within ``ball`` around ``x0``.

    ``objective(logits, rows)`` -> (losses, gradients by the logits), where ``rows`` are the indices of the images that
    are left: an image leaves with its first misclassified iterate, and the others do not notice.
    """
    xp = array_module(x0)
    adversarial, fooled, rows = x0.copy(), xp.zeros(len(x0), bool), xp.arange(len(x0))
    sizes = StepSizes(xp.full(len(x0), 2 * ball.eps, x0.dtype), steps)
    x = previous = best_x = best_gradient = start
    for i in range(steps + 1):
        logits, cache = model.forward(x)
        hit = misclassified(logits, labels[rows])
        if hit.any():
            adversarial[rows[hit]], fooled[rows[hit]] = x[hit], True
        if i == steps or hit.all():
            break
        loss, gradient = objective(logits, rows)
        gradient = model.backward(gradient, cache, param_grads=False)
        if hit.any():
            left = ~hit
            rows, loss, gradient = rows[left], loss[left], gradient[left]
            x0, x, previous, best_x, best_gradient = (a[left] for a in (x0, x, previous, best_x, best_gradient))
            sizes.keep(left)
        better, halve = (per_image(flag, x) for flag in sizes.see(loss))
        best_x, best_gradient = xp.where(better, x, best_x), xp.where(better, gradient, best_gradient)
        if halve.any():  # back to the best iterate; ``previous`` stays, as in the authors' code
            x, gradient = xp.where(halve, best_x, x), xp.where(halve, best_gradient, gradient)
        moved = ball.step(x0, x, gradient, sizes.step)
        if i > 0:
            moved = ball.project(x0, x + 0.75 * (moved - x) + 0.25 * (x - previous))
        previous, x = x, moved
    return adversarial, fooled


def _known(shape, *, loss, **_):
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")


@attack(least=lambda loss="ce", **_: LOSSES[loss][2], check=_known)
def apgd(batch: Batch, *, loss: str = "ce", steps: int = 100, restarts: int = 1):
    """(adversarial, fooled) by Auto-PGD on the cross-entropy ("ce") or the difference of logits ratio ("dlr").

    Each restart begins at random (in linf with its largest pixel at eps, in l2 on the sphere), never at x itself, and
    takes those images on that are still right. Arguments and results are otherwise those of
    :func:`nanomr.attacks.pgd`. Differs from the authors' code where that changes no image's fate: an image leaves with
    its first misclassified iterate (there: the last), and draws are each image's own.

    Raises ValueError for fewer classes than the loss needs (2; DLR 3), and what :func:`nanomr.attacks.pgd` raises.
    """
    function, salt, _ = LOSSES[loss]
    runs = ((salt, restart, lambda logits, at: function(logits, batch.labels[at])) for restart in range(restarts))
    return _union(batch, steps, runs)


@attack(least=4)
def apgd_targeted(batch: Batch, *, targets: int = 9, steps: int = 100):
    """(adversarial, fooled) by Auto-PGD on the targeted DLR, towards one class after another.

    The targets are the ``targets`` strongest classes of the clean image but for its label (all of them if there are
    fewer), strongest first, each from a random start of its own. Any misclassification counts, not only into the
    target. Otherwise as :func:`apgd`. Raises ValueError below 4 classes.
    """
    rank = (-batch.logits).argsort(1)

    def towards(target):
        return lambda logits, at: dlr_targeted(logits, batch.labels[at], target[at])

    return _union(batch, steps, ((APGD_T, k, towards(rank[:, k])) for k in range(1, rank.shape[1])[:targets]))


def _union(batch, steps, runs):
    """(adversarial, fooled) by any of ``runs``, (salt, restart, objective), each on the images that are left."""
    xp = array_module(batch.x)
    adversarial, fooled = batch.x.copy(), xp.zeros(len(batch.x), bool)
    for salt, restart, objective in runs:
        left = xp.flatnonzero(~fooled)
        if len(left) == 0:
            break
        x0, labels = batch.x[left], batch.labels[left]
        start = batch.ball.random_start(x0, batch.draws(salt, restart, left), edge=True)

        def of_these(logits, rows, objective=objective, left=left):
            return objective(logits, left[rows])

        found, hit = ascend(batch.model, batch.ball, x0, start, labels, of_these, steps)
        adversarial[left[hit]], fooled[left[hit]] = found[hit], True
    return adversarial, fooled
