"""The Wasserstein adversary of Wong, Schmidt, Kolter (2019): move the image's mass instead of changing its pixels.

An image is a pile of mass for each pixel and channel, and an adversarial image is the same mass, transported: moving
a share m of the total mass by (r, c) pixels costs m (r^2 + c^2), within a window of 5 x 5 pixels, within the channel
and within the image. The ball of a radius is what can be reached at that cost. ``derivations/sinkhorn.md`` derives the
projection onto the ball (:func:`project`), which is the hard part; :func:`wasserstein` is the attack.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..backend import array_module
from ..losses import cross_entropy
from .common import check_options, in_batches, misclassified, per_image

REACH = 2  # pixels, in each direction: the window is 5 x 5
FARTHEST = 1000.0  # y is cut off there, in shares of x0's mass: else beta has no digits left (the mass is < 1/255)


class Projection(NamedTuple):
    """What :func:`project` found, and how well; ``psi`` and ``beta`` are the dual variables, for a warm start."""

    images: object  # (N, H, W, C) float64, >= 0, with the mass of x0
    cost: object  # (N,): the cost of a plan from x0 to images, <= radius. The cheapest plan may cost less
    residual: object  # (N,): sum over pixels of |what beta wants there - what the plan brings|, as a share of the mass
    iterations: object  # (N,) ints
    psi: object  # (N,): the price of transport
    beta: object  # (N, H, W, C): the price of mass at its destination


def wasserstein(
    model,
    x,
    labels,
    *,
    seed: int = 0,
    ids=None,
    steps: int = 400,
    start: float = 0.001,
    factor: float = 1.17,
    every: int = 10,
    step_size: float = 0.1,
    regularization: float = 3000.0,
    max_radius: float | None = None,
    batch_size: int = 100,
    progress: Callable | None = None,
):
    """(adversarial, radius): images (N, H, W, C) in [0, 1], and the radius (N,) at which each first fooled the model.

    Each step goes ``step_size`` along the sign of the cross-entropy's input gradient, is projected onto the ball
    (entropic regularisation with weight 1 / ``regularization``) and clipped to [0, 1]. The ball's radius begins at
    ``start`` and is multiplied by ``factor`` after every ``every`` steps; with ``max_radius`` the attack ends where it
    would be exceeded (0.1 takes 300 steps). An image leaves with the radius of the step that fools the model. It
    is ``start`` for an image that is wrong to begin with, and inf for one that never fools: that comes back as it was.
    The accuracy at radius r is the share of images whose radius is > r.

    The defaults are the paper's for CIFAR-10. Its code keeps a batch's adversarial images and radii only in steps where
    the batch's error grows; here each image's count. As there, clipping comes after the projection: where pixels
    saturate, the image loses the mass that they cannot hold. Nothing is random: ``seed`` and ``ids`` change nothing.
    The attack is weak (Wu et al. 2020): its accuracies are upper bounds, and loose ones.

    A success is confirmed by a fresh forward pass and the box; the ball is :func:`project`'s promise. Logits or a
    gradient that are not finite fool nobody: an image whose gradient holds NaN leaves the attack as it was.

    Raises ValueError for images outside [0, 1], labels that are no class, and settings that make no sense.
    """
    for name, value in dict(start=start, factor=factor, regularization=regularization).items():
        if not 0 < value < float("inf"):
            raise ValueError(f"wasserstein: {name} must be a number > 0, not {value}")
    if max_radius is not None and not 0 <= max_radius < float("inf"):
        raise ValueError(f"wasserstein: max_radius must be a number >= 0, not {max_radius}")
    check_options("wasserstein", dict(steps=steps, every=every, step_size=step_size))
    radii = [start * factor ** (step // every) for step in range(steps)]
    if max_radius is not None:
        radii = radii[: next((step for step, radius in enumerate(radii) if radius > max_radius), steps)]
    xp = array_module(x)
    found = xp.full(len(x), float("inf"))

    def run(batch):
        images, at = ascend(batch.model, batch.x, batch.labels, radii, step_size, regularization)
        found[batch.rows] = at
        return images, xp.isfinite(at)

    adversarial, fooled = in_batches(
        run, model, x, labels, 1.0, ids=ids, batch_size=batch_size, progress=progress, loss="wasserstein"
    )  # eps 1: the box; the ball is the projection's
    return adversarial, xp.where(fooled, xp.where(found < float("inf"), found, start), float("inf"))


def ascend(model, x, labels, radii, step_size, regularization, iterations=400, train=False):
    """(images, radius) for images that the model gets right: each as it first fooled the model, and inf for one that
    did not, as it came out of the last step. ``iterations``: of each projection, at most.

    ``train``: the network in training mode, as adversarial training has it. Batch norms then see the images that are
    left, and those that were fooled a step ago.
    """
    xp = array_module(x)
    adversarial, found = x.copy(), xp.full(len(x), float("inf"))
    left, current, plan, stay = xp.arange(len(x)), x, None, xp.full(len(x), True)
    logits, cache = model.forward(current, train=train)
    for radius in radii:
        _, gradient = cross_entropy(logits, labels[left])
        gradient = model.backward(gradient, cache, param_grads=False)
        if not stay.all():  # only now: the cache is of all that were there in the last step
            left, current, gradient, *plan = (value[stay] for value in (left, current, gradient, *plan))
        lost = ~xp.isfinite(gradient).reshape(len(left), -1).all(1)
        moved = current + x.dtype.type(step_size) * xp.sign(xp.where(per_image(lost, x), 0, gradient))
        projection = project(x[left], moved, radius, regularization=regularization, iterations=iterations, start=plan)
        current, plan = xp.clip(projection.images, 0, 1).astype(x.dtype), (projection.psi, projection.beta)
        logits, cache = model.forward(current, train=train)
        hit = misclassified(logits, labels[left]) & ~lost
        adversarial[left[hit]], found[left[hit]] = current[hit], radius
        stay = ~(hit | lost)
        if not stay.any():
            break
    adversarial[left[stay]] = current[stay]
    return adversarial, found


def project(
    x0,
    y,
    radius: float,
    *,
    regularization: float = 3000.0,
    tolerance: float = 1e-3,
    iterations: int = 400,
    start: tuple | None = None,
) -> Projection:
    """The images nearest to ``y`` (any numbers) in the Wasserstein ball around ``x0`` (>= 0), both (N, H, W, C).

    Minimises |z - y|^2 / 2 + sum P log P / ``regularization`` over transport plans P from x0 to z that cost <= radius;
    all of it in shares of x0's mass. The entropy term blurs: with a small ``regularization``, z differs from y even
    where y is in the ball. Coordinate ascent in the dual (``derivations/sinkhorn.md``) until the cost is within
    ``tolerance`` of the radius and the residual below ``tolerance`` times the radius, or for ``iterations``.
    ``start`` = (psi, beta) of an earlier projection nearby.

    Whatever the iteration has come to, the images are in the ball: they are where the current plan brings x0's mass,
    and if that plan costs more than ``radius``, part of the way. The original stops when its dual objective stands
    still, and returns an image whose mass and cost are right up to that. Images without mass come back as they are.

    Computed in float64 on x0's device: NumPy images by ``attacks.sinkhorn`` (but those that are so dark that e^beta
    would overflow), CuPy images in the logarithmic domain. Raises ValueError for radius or regularization <= 0,
    and for a y that is not finite.
    """
    if not 0 < radius < float("inf") or not 0 < regularization < float("inf") or iterations < 1:
        raise ValueError(
            "radius, regularization and iterations must be numbers > 0, "
            f"not {radius}, {regularization} and {iterations}"
        )
    if x0.ndim != 4 or y.shape != x0.shape:
        raise ValueError(f"x0 and y must be images (N, H, W, C) of one shape, not {x0.shape} and {y.shape}")
    xp = array_module(x0)
    if not bool(xp.isfinite(y).all()):
        raise ValueError("y holds numbers that are not finite: does the model's gradient?")
    if start is None:
        psi, beta = xp.ones(len(x0)), xp.zeros(x0.shape)
    else:
        psi, beta = (xp.array(value, np.float64, order="C") for value in start)
    solve = _project_numba if xp is np else _project_log
    return Projection(*solve(x0, y, float(radius), float(regularization), tolerance, iterations, psi, beta))


def _project_numba(x, y, radius, strength, tolerance, most, psi, beta):
    from . import sinkhorn  # only now: it imports Numba

    n, height, width, channels = x.shape
    dtype = np.float32 if x.dtype == y.dtype == np.float32 else np.float64  # any other pair would be compiled anew
    x, y = (np.require(image, dtype, ["C", "W"]) for image in (x, y))
    rows, images = (n, height, width * channels), np.empty(x.shape)
    cost, residual, count = np.zeros(n), np.zeros(n), np.zeros(n, np.int64)
    written = beta.reshape(rows), psi, images.reshape(rows), cost, residual, count
    sinkhorn.project(x.reshape(rows), y.reshape(rows), radius, strength, tolerance, most, channels, *written)
    found, lost = (images, cost, residual, count, psi, beta), np.flatnonzero(count == 0)
    if len(lost):
        # Prices out of the kernel's range are as they came, and go on; others are numbers that were about to overflow.
        kept = abs(beta[lost]).reshape(len(lost), -1).max(1) >= sinkhorn.LIMIT
        start = np.where(kept, psi[lost], 1), np.where(per_image(kept, x), beta[lost], 0)
        others = _project_log(x[lost], y[lost], radius, strength, tolerance, most, *start)
        for whole, part in zip(found, others, strict=True):
            whole[lost] = part
    return found


def _project_log(x, y, radius, strength, tolerance, most, psi, beta):
    """A :class:`Projection`'s values, by the iteration in logarithms, which nothing can overflow.

    psi (N,) and beta like x are the start, and are overwritten. Each image stops by itself, so that nobody's result
    depends on the others.
    """
    xp = array_module(x)
    x, y = xp.ascontiguousarray(x, np.float64), xp.ascontiguousarray(y, np.float64)
    mass = per_image(x.reshape(len(x), -1).sum(1), x)
    mass = xp.where(mass > 0, mass, 1)
    x, y = x / mass, xp.clip(y / mass, -FARTHEST, FARTHEST)
    z, count = x.copy(), xp.zeros(len(x), np.int64)
    cost, residual = xp.zeros(len(x)), xp.zeros(len(x))
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant: no mass
        log_x = xp.log(x)
        log_strength = float(np.log(strength))
        left = xp.arange(len(x))
        for iteration in range(most):
            # alpha: the rows of the plan add up to x
            log_kv, mean, mean_square = _log_transport(beta[left], psi[left])
            alpha = log_x[left] - log_kv
            now, square = _total(x[left] * mean), _total(x[left] * mean_square)
            # psi: a Newton step for log(cost) = log(radius)
            last, price = iteration + 1 == most, psi[left]
            fits = (abs(now - radius) <= tolerance * radius) | ((price == 0) & (now <= radius))
            if not last:
                change = xp.log(xp.maximum(now, 1e-300) / radius) * now / xp.maximum(square, 1e-300)
                newton = xp.where(now > 1e-300, xp.maximum(price + change, 0), 0)
                price = psi[left] = xp.where(fits, price, newton)
            # beta: what pulls the destination towards y is what the plan brings there
            log_ku, _, _ = _log_transport(alpha, price)
            brought = xp.exp(xp.minimum(beta[left] + log_ku, 700))
            w = lambert_of_exp(strength * y[left] + log_strength + log_ku)
            gap = _total(abs(brought - w / strength))
            done = xp.full(len(left), True) if last else fits & (gap <= tolerance * radius)
            stop, go = left[done], left[~done]
            z[stop], cost[stop], residual[stop], count[stop] = brought[done], now[done], gap[done], iteration + 1
            beta[go] = strength * y[go] - w[~done]
            left = go
            if len(left) == 0:
                break
    # The ball is convex: a share of the way to a plan that costs too much.
    share = xp.minimum(1, radius / xp.maximum(cost, radius * 1e-9))
    return (x + per_image(share, x) * (z - x)) * mass, share * cost, residual, count, psi, beta


def _total(values):
    return values.reshape(len(values), -1).sum(1)


def _log_transport(log_v, psi):
    """(log K e^log_v, mean of C, mean of C^2): K = exp(-psi C); the means over where mass goes from each pixel.

    C = r^2 + c^2, so that K is separable: five taps along rows, then five along columns.
    """
    xp = array_module(log_v)
    height, width = log_v.shape[1:3]
    mean, square = xp.zeros(log_v.shape), xp.zeros(log_v.shape)
    for down, right in ((0, REACH), (REACH, 0)):
        margin = ((0, 0), (down, down), (right, right), (0, 0))
        values = xp.pad(log_v, margin, constant_values=-float("inf")), xp.pad(mean, margin), xp.pad(square, margin)
        taps = []
        for shift in range(2 * REACH + 1):
            top, first = (shift if down else 0), (shift if right else 0)
            view = [a[:, top : top + height, first : first + width] for a in values]
            taps.append(((shift - REACH) ** 2, view[0] - per_image(psi, log_v) * (shift - REACH) ** 2, *view[1:]))
        largest = xp.stack([tap for _, tap, _, _ in taps]).max(0)
        largest = xp.where(xp.isfinite(largest), largest, 0)
        total, mean, square = (xp.zeros(log_v.shape) for _ in range(3))
        for cost, tap, tap_mean, tap_square in taps:
            weight = xp.exp(tap - largest)
            total += weight
            mean += weight * (tap_mean + cost)
            square += weight * (tap_square + 2 * cost * tap_mean + cost * cost)
        log_v = xp.log(total) + largest
        total = xp.where(total > 0, total, 1)
        mean, square = mean / total, square / total
    return log_v, mean, square


def lambert_of_exp(t):
    """W(e^t), the w > 0 with w + log w = t, for an array of any float64: e^t itself may overflow.

    Fritsch, Shafer and Crowley's iteration (1973), of order 4, from a good first guess. 0 at -inf.
    """
    xp = array_module(t)
    low = t < -37  # there W(e^t) = e^t to all digits
    safe = xp.where(low, 0, t)
    small = xp.exp(xp.minimum(safe, 2))
    w = xp.where(safe > 2, safe - xp.log(xp.maximum(safe, 2)), small / (1 + small))
    for _ in range(3):
        r = safe - w - xp.log(w)
        q = 2 * (1 + w) * (1 + w + r * (2 / 3))
        w = w * (1 + r / (1 + w) * (q - r) / (q - 2 * r))
    return xp.where(low, xp.exp(xp.minimum(t, 0)), w)
