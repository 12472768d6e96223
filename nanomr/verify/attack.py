"""The verifier's attacks: what they find is a counterexample, checked twice; what they miss goes on to the proofs."""

import numpy as np

from ..attacks import pgd
from ..attacks.common import draws
from .chain import Chain

TARGETED = 255  # the salt of draws(): not one of the attacks'


def strict_box(x, eps: float):
    """(low, high) float32: the images within eps of float32 ``x``, as real numbers, and in [0, 1]. Rounded inwards."""
    exact = x.astype(np.float64)
    low, high = np.nextafter(exact - eps, 2), np.nextafter(exact + eps, -1)
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    low32 = np.where(low32 < low, np.nextafter(low32, np.float32(2)), low32)
    high32 = np.where(high32 > high, np.nextafter(high32, np.float32(-1)), high32)
    # x itself is always allowed, also where eps is smaller than a rounding error
    return np.maximum(np.minimum(low32, x), 0), np.minimum(np.maximum(high32, x), 1)


def counterexamples(model, chain: Chain, x, candidates, labels, eps: float):
    """(images (N, H, W, C) float32, real (N,) bool): ``candidates`` moved into the strict box, and which of them are
    classified otherwise than ``labels`` by ``model`` in float32 and by ``chain`` in float64.
    """
    if len(x) == 0:
        return x, np.zeros(0, bool)
    low, high = strict_box(x, eps)
    moved = np.clip(candidates.astype(np.float32), low, high)
    wrong = model.forward(moved)[0].argmax(1) != labels
    logits = chain.forward(moved.astype(np.float64))[0]
    return moved, wrong & (logits.argmax(1) != labels)


def paper_pgd(
    model, chain: Chain, x, labels, eps: float, *, seed: int = 0, ids=None, steps: int = 20, restarts: int = 10
):
    """(adversarial, broken (N,) bool) of Table 1's PGD: 20 steps of 2/255, 10 restarts."""
    adversarial, fooled = pgd(model, x, labels, eps, steps=steps, restarts=restarts, seed=seed, ids=ids)
    adversarial, real = counterexamples(model, chain, x, adversarial, labels, eps)
    return adversarial, fooled & real


def targeted_pgd(
    model, chain: Chain, x, labels, rivals, eps: float, *, starts=None, steps: int = 50, restarts: int = 2,
    seed: int = 0, ids=None,
):  # fmt: skip
    """(adversarial, broken), like :func:`paper_pgd`, descending the margin logit[label] - logit[rival] of each row.

    One row for each pair of an image and a rival, (S, ...) all: as many random starts as ``restarts``, then ``starts``
    (S, H, W, C), where bounds pointed to; random ones are drawn for each (seed, id, rival, restart), ids (S,) of the
    images. Steps of eps / 4, shrinking linearly to eps / 40; rows leave when they win.
    """
    low, high = strict_box(x, eps)
    adversarial, broken = x.copy(), np.zeros(len(x), bool)
    ids = np.arange(len(x)) if ids is None else np.asarray(ids)
    for restart in range(restarts + (starts is not None)):
        left = np.flatnonzero(~broken)
        if len(left) == 0:
            break
        if restart < restarts:
            generators = [draws(seed, TARGETED, [ids[i]], restart << 8 | int(rivals[i]))[0] for i in left]
            noise = [g.uniform(-eps, eps, x.shape[1:]) for g in generators]
            current = x[left] + np.array(noise, x.dtype).reshape(x[left].shape)
        else:
            current = starts[left].astype(x.dtype)
        for step in range(steps + 1):
            current = np.clip(current, low[left], high[left])
            logits, cache = model.forward(current)
            hit = logits.argmax(1) != labels[left]
            if hit.any():
                found, real = counterexamples(model, chain, x[left[hit]], current[hit], labels[left[hit]], eps)
                at = left[hit][real]
                adversarial[at], broken[at] = found[real], True
            if step == steps:
                break
            rows = np.zeros_like(logits)
            rows[np.arange(len(left)), labels[left]] -= 1
            rows[np.arange(len(left)), rivals[left]] += 1
            gradient = model.backward(rows, cache, param_grads=False)
            size = x.dtype.type(eps * (0.25 - 0.225 * step / steps))
            keep = ~broken[left]
            if not keep.all():
                left, current, gradient = left[keep], current[keep], gradient[keep]
                if len(left) == 0:
                    break
            current = current + size * np.sign(gradient)
    return adversarial, broken
