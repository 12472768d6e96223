"""Projected gradient descent (Madry et al. 2018), as the paper's Table 1 uses it, and its single step, FGSM."""

from collections.abc import Callable

from ..backend import array_module
from .common import PGD, draws, in_batches
from .objectives import cross_entropy_each


def pgd(
    model,
    x,
    labels,
    eps: float,
    *,
    norm: str = "linf",
    step_size: float | None = None,
    steps: int = 20,
    restarts: int = 1,
    random_start: bool = True,
    seed: int = 0,
    ids=None,
    batch_size: int = 250,
    progress: Callable | None = None,
):
    """(adversarial, fooled): images (N, H, W, C) within eps of x and in [0, 1]; does the model err on them (N,)?

    Each step goes ``step_size`` (by default 2/255 in linf, 2.5 eps / steps in l2) along the steepest ascent of the
    cross-entropy, then back into ball and box. An image counts as fooled by any iterate of any restart, and leaves the
    batch at once; one that the model gets wrong to begin with is its own adversarial image; one that is never fooled
    comes back unchanged. Random starts (uniform in the linf ball; on the l2 sphere) are drawn for each (seed, id,
    restart); ids are 0 ... N-1 by default. ``progress(done, robust)`` is called after each batch.

    Raises ValueError for images outside [0, 1], a label that is no class, a bad eps or norm.
    """
    if step_size is None:
        step_size = 2 / 255 if norm == "linf" else 2.5 * eps / max(steps, 1)

    def attack(ball, x0, labels, ids, _):
        xp = array_module(x0)
        adversarial, fooled = x0.copy(), xp.zeros(len(x0), bool)
        for restart in range(restarts):
            left = xp.flatnonzero(~fooled)
            if len(left) == 0:
                break
            current = base = x0[left]
            if random_start:
                current = ball.random_start(base, draws(seed, PGD, ids[left.tolist()], restart))
            for step in range(steps + 1):
                logits, cache = model.forward(current)
                hit = logits.argmax(1) != labels[left]
                if hit.any():
                    adversarial[left[hit]], fooled[left[hit]] = current[hit], True
                if step == steps or hit.all():
                    break
                _, gradient = cross_entropy_each(logits, labels[left])
                gradient = model.backward(gradient, cache, param_grads=False)
                if hit.any():
                    left, base, current, gradient = (a[~hit] for a in (left, base, current, gradient))
                sizes = xp.full(len(base), step_size, base.dtype)
                current = ball.step(base, current, gradient, sizes)
        return adversarial, fooled

    return in_batches(attack, model, x, labels, eps, norm=norm, ids=ids, batch_size=batch_size, progress=progress)


def fgsm(
    model,
    x,
    labels,
    eps: float,
    *,
    norm: str = "linf",
    seed: int = 0,
    ids=None,
    batch_size: int = 250,
    progress: Callable | None = None,
):
    """The fast gradient sign method (Goodfellow et al. 2015): one step of :func:`pgd`, of length eps, from x itself.

    In l2 the step goes along the gradient. Nothing is drawn: ``seed`` and ``ids`` are there to be like the others.
    """
    return pgd(
        model,
        x,
        labels,
        eps,
        norm=norm,
        step_size=eps,
        steps=1,
        random_start=False,
        seed=seed,
        ids=ids,
        batch_size=batch_size,
        progress=progress,
    )
