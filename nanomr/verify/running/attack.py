"""The verifier's attacks: what they find is a counterexample, checked twice; what they miss goes on to the proofs."""

import numpy as np

from ...attacks import pgd
from ...attacks.common import draws, misclassified
from ..chain import Chain

TARGETED = 255  # the salt of draws(): not one of the attacks'


def strict_box(x, eps: float):
    """(low, high) float32: the images within eps of float32 ``x``, as real numbers, and in [0, 1]. Rounded inwards."""
    exact = x.astype(np.float64)
    low, high = inside(np.nextafter(exact - eps, 2), np.nextafter(exact + eps, -1))
    # x itself is always allowed, also where eps is smaller than a rounding error
    return np.maximum(np.minimum(low, x), 0), np.minimum(np.maximum(high, x), 1)


def inside(low, high):
    """The largest float32 box inside the float64 box [low, high]."""
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    low32 = np.where(low32 < low, np.nextafter(low32, np.float32(np.inf)), low32)
    return low32, np.where(high32 > high, np.nextafter(high32, np.float32(-np.inf)), high32)


def counterexamples(model, chain: Chain, box, candidates, labels):
    """(images (N, H, W, C) float32, real (N,) bool): ``candidates`` moved into the box, and which of them ``model`` in
    float32 and ``chain`` in float64 both classify otherwise than ``labels``.

    ``box``: (low, high) float32, each (N, H, W, C), as :func:`strict_box` makes it.
    """
    if len(labels) == 0:
        return box[0], np.zeros(0, bool)
    moved = np.clip(candidates.astype(np.float32), *box)
    wrong = misclassified(model.forward(moved)[0], labels)
    return moved, wrong & misclassified(chain.forward(moved.astype(np.float64))[0], labels)


def paper_pgd(
    model, chain: Chain, x, labels, eps: float, *, seed: int = 0, ids=None, steps: int = 20, first: int = 0,
    restarts: int = 10,
):  # fmt: skip
    """(adversarial, broken (N,) bool) of Table 1's PGD: 20 steps of 2/255, 10 restarts; or those from ``first`` on."""
    adversarial, fooled = pgd(model, x, labels, eps, steps=steps, first=first, restarts=restarts, seed=seed, ids=ids)
    adversarial, real = counterexamples(model, chain, strict_box(x, eps), adversarial, labels)
    return adversarial, fooled & real


def targeted_pgd(
    model,
    chain: Chain,
    box,
    labels,
    rivals,
    *,
    starts=None,
    steps: int = 50,
    restarts: int = 2,
    seed: int = 0,
    ids=None,
):
    """(images (S, H, W, C), broken (S,)): descends the margin logit[label] - logit[rival] of each row within its box.

    One row for each pair of an image and a rival, (S, ...) all; ``box``: (low, high) float32. As many random starts as
    ``restarts``, drawn for each (seed, id, rival, restart), ids (S,) of the images; then ``starts`` (S, H, W, C), where
    bounds pointed to. Steps of an eighth of the box, shrinking linearly to an 80th; rows leave when they win.
    """
    low, high = box
    width = high - low
    adversarial, broken = 0.5 * (low + high), np.zeros(len(low), bool)
    ids = np.arange(len(low)) if ids is None else np.asarray(ids)
    for restart in range(restarts + (starts is not None)):
        left = np.flatnonzero(~broken)
        if len(left) == 0:
            break
        if restart < restarts:
            generators = [draws(seed, TARGETED, [ids[i]], restart << 8 | int(rivals[i]))[0] for i in left]
            current = low[left] + width[left] * np.array([g.random(low.shape[1:]) for g in generators], low.dtype)
        else:
            current = starts[left].astype(low.dtype)
        for step in range(steps + 1):
            current = np.clip(current, low[left], high[left])
            logits, cache = model.forward(current)
            hit = logits.argmax(1) != labels[left]
            if hit.any():
                at = left[hit]
                found, real = counterexamples(model, chain, (low[at], high[at]), current[hit], labels[at])
                adversarial[at[real]], broken[at[real]] = found[real], True
            if step == steps:
                break
            rows = np.zeros_like(logits)
            rows[np.arange(len(left)), labels[left]] -= 1
            rows[np.arange(len(left)), rivals[left]] += 1
            gradient = model.backward(rows, cache, param_grads=False)
            keep = ~broken[left]
            if not keep.all():
                left, current, gradient = left[keep], current[keep], gradient[keep]
                if len(left) == 0:
                    break
            size = low.dtype.type(0.125 - 0.1125 * step / steps)
            current = current + size * width[left] * np.sign(gradient)
    return adversarial, broken
