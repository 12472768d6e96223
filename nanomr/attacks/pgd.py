"""Projected gradient descent in the Linf ball (Madry et al. 2018), as the paper's Table 1 uses it."""

from .. import rng
from ..backend import array_module, to_numpy
from ..losses import cross_entropy


def pgd(
    model,
    x,
    labels,
    eps,
    step_size=2 / 255,
    steps=20,
    restarts=1,
    seed=0,
    random_start=True,
    batch_size=500,
    progress=None,
):
    """(adversarial, fooled): images (N, H, W, C) within eps of x and in [0, 1]; does the model err on them (N,)?

    Each step goes ``step_size`` along the sign of the cross-entropy's input gradient, then back into ball and box.
    An image counts as fooled by any iterate of any restart, and leaves the batch at once; an image that the model
    gets wrong to begin with is its own adversarial image. Random starts are drawn for each (seed, image, restart), so
    that the result does not depend on ``batch_size``. ``progress(done, robust)`` is called after each batch.
    """
    adversarial, fooled = x.copy(), array_module(x).zeros(len(x), bool)
    for first in range(0, len(x), batch_size):
        part = slice(first, min(first + batch_size, len(x)))
        adversarial[part], fooled[part] = _attack_batch(
            model, x[part], labels[part], eps, step_size, steps, restarts, seed, random_start, first
        )
        if progress:
            progress(part.stop, part.stop - int(fooled[: part.stop].sum()))
    return adversarial, fooled


def _attack_batch(model, x, labels, eps, step_size, steps, restarts, seed, random_start, first):
    xp, dtype = array_module(x), x.dtype.type
    low, high = xp.maximum(x - dtype(eps), dtype(0)), xp.minimum(x + dtype(eps), dtype(1))
    adversarial = x.copy()
    fooled = model.forward(x)[0].argmax(1) != labels
    for restart in range(restarts):
        left = xp.flatnonzero(~fooled)
        if len(left) == 0:
            break
        current = _start(x, left, eps, seed, restart, first) if random_start else x[left]
        current = xp.clip(current, low[left], high[left])
        for step in range(steps + 1):
            logits, cache = model.forward(current)
            hit = logits.argmax(1) != labels[left]
            if hit.any():
                adversarial[left[hit]], fooled[left[hit]] = current[hit], True
            if step == steps or hit.all():
                break
            _, gradient = cross_entropy(logits, labels[left])
            gradient = model.backward(gradient, cache, param_grads=False)
            current = current + dtype(step_size) * xp.sign(gradient)
            current = xp.clip(current, low[left], high[left])
            if hit.any():
                left, current = left[~hit], current[~hit]
    return adversarial, fooled


def _start(x, left, eps, seed, restart, first):
    """x plus uniform noise in the ball, for the images ``left``, each from a generator of its own."""
    xp = array_module(x)
    steps = [(restart << 32) + first + i for i in to_numpy(left).tolist()]
    noise = [rng.generator(seed, rng.ATTACK, step).uniform(-eps, eps, x.shape[1:]).astype(x.dtype) for step in steps]
    return x[left] + xp.asarray(noise)
