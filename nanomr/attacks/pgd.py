"""Projected gradient descent (Madry et al. 2018), as the paper's Table 1 uses it, and its single step, FGSM."""

from ..backend import array_module
from .common import PGD, Batch, attack, input_gradient, misclassified
from .objectives import cross_entropy_each


@attack()
def pgd(
    batch: Batch, *, step_size: float | None = None, steps: int = 20, restarts: int = 1, first: int = 0,
    random_start: bool = True,
):  # fmt: skip
    """(adversarial, fooled): images (N, H, W, C) within eps of x and in [0, 1]; does the model err on them (N,)?

    Each step goes ``step_size`` (by default 2/255 in linf, 2.5 eps / steps in l2) along the steepest ascent of the
    cross-entropy, then back into ball and box. An image counts as fooled by any iterate of any restart, and leaves the
    batch at once; one that the model gets wrong to begin with is its own adversarial image; one that is never fooled
    comes back unchanged. Random starts (uniform in the linf ball; on the l2 sphere) are drawn for each (seed, id,
    restart), which are numbered from ``first`` on; ids are 0 ... N-1 by default. ``progress(done, robust)`` is called
    after each batch.

    A success is confirmed by a fresh forward pass, ball (in real arithmetic) and box. Images, logits and gradients
    that are NaN, and infinite logits, fool nobody.

    Raises ValueError for images outside [0, 1], a label that is no class, a bad eps, norm or option, and (NoClass)
    when the logits of x itself are not finite.
    """
    if step_size is None:
        step_size = 2 / 255 if batch.ball.name == "linf" else 2.5 * batch.ball.eps / max(steps, 1)
    return _descend(batch, step_size, steps, range(first, first + restarts), random_start)


@attack()
def fgsm(batch: Batch):
    """The fast gradient sign method (Goodfellow et al. 2015): one step of :func:`pgd`, of length eps, from x itself.

    In l2 the step goes along the gradient. Nothing is drawn: ``seed`` and ``ids`` are there to be like the others.
    """
    return _descend(batch, batch.ball.eps, steps=1, restarts=range(1), random_start=False)


def _descend(batch, step_size, steps, restarts, random_start):
    model, ball, xp = batch.model, batch.ball, array_module(batch.x)
    adversarial, fooled = batch.x.copy(), xp.zeros(len(batch.x), bool)
    for restart in restarts:
        left = xp.flatnonzero(~fooled)
        if len(left) == 0:
            break
        current = base = batch.x[left]
        if random_start:
            current = ball.random_start(base, batch.draws(PGD, restart, left))
        for step in range(steps + 1):
            logits, cache = model.forward(current)
            hit = misclassified(logits, batch.labels[left])
            if hit.any():
                adversarial[left[hit]], fooled[left[hit]] = current[hit], True
            if step == steps or hit.all():
                break
            _, gradient = cross_entropy_each(logits, batch.labels[left])
            gradient = model.backward(gradient, cache, param_grads=False)
            if hit.any():
                left, base, current, gradient = (a[~hit] for a in (left, base, current, gradient))
            sizes = xp.full(len(base), step_size, base.dtype)
            current = ball.step(base, current, gradient, sizes)
    return adversarial, fooled


def ascend(model, ball, x, start, climbed, size: float, steps: int, train: bool = False):
    """The image after ``steps`` steps of ``size`` up the loss from ``start``, all of it (N, H, W, C), in ball and box.

    What adversarial training learns from: nobody leaves early, and nobody is asked whether the model errs. ``climbed``:
    logits -> the gradient of the loss by them. ``train``: batch norms use the batch's statistics, and note them.
    """
    sizes = array_module(x).full(len(x), size, x.dtype)
    for _ in range(steps):
        start = ball.step(x, start, input_gradient(model, start, climbed, train), sizes)
    return start
