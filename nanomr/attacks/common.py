"""What the attacks share: threat models, random draws, checks, batches. Images and eps are in [0, 1] units."""

from collections.abc import Callable, Sequence

import numpy as np

from .. import rng
from ..backend import array_module, to_numpy
from ..ops import ops_for

PGD, APGD_CE, APGD_T, FAB, FAB_T, SQUARE, WASSERSTEIN, APGD_DLR = range(8)  # the salts of draws(), one for each attack


def draws(seed: int, salt: int, ids: Sequence[int], restart: int = 0) -> list[np.random.Generator]:
    """A generator for each image, given by (seed, salt, id, restart) and nothing else: not by who else is attacked.

    ``salt`` in [0, 256) names the attack, ``restart`` in [0, 2^24) its restart (or target), ids are in [0, 2^32).
    """
    high = (salt << 24 | restart) << 32
    return [rng.generator(seed, rng.ATTACK, high | int(i)) for i in ids]


def per_image(values, x):
    """``values`` (N,) in a shape that multiplies ``x`` (N, ...)."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def l2(x):
    """The l2 norm of each row of ``x`` (N, ...), as (N,) float64: 3072 float32 squares would lose digits."""
    xp = array_module(x)
    flat = x.reshape(len(x), -1).astype(np.float64)
    return xp.sqrt((flat * flat).sum(1))


class Linf:
    """{x: |x - x0|_inf <= eps}, within the box [0, 1]."""

    name = "linf"

    def __init__(self, eps: float):
        self.eps = eps

    def bounds(self, x0):
        """(low, high): the smallest and largest allowed images, ball and box together."""
        xp, eps = array_module(x0), x0.dtype.type(self.eps)
        return xp.maximum(x0 - eps, 0), xp.minimum(x0 + eps, 1)

    def project(self, x0, x):
        """The nearest image to ``x`` in ball and box. All of it holds exactly, in x's own arithmetic."""
        return self.step(x0, x, x, array_module(x).zeros(len(x), x.dtype))

    def step(self, x0, x, gradient, size):
        """``x`` moved by ``size`` (N,) along the steepest ascent, the gradient's sign, and projected."""
        return ops_for(x).linf_step(x, gradient, size, x0, self.eps)

    def random_start(self, x0, generators, edge: bool = False):
        """Uniform noise in the ball around ``x0``; with ``edge``, scaled so that its largest pixel is at eps (APGD)."""
        noise = np.empty(x0.shape, x0.dtype)
        for i, generator in enumerate(generators):  # one by one: float64 noise of all would not fit the cache
            one = generator.uniform(-1, 1, x0.shape[1:])
            noise[i] = self.eps * (one / max(abs(one).max(initial=0), 1e-300) if edge else one)
        return self.project(x0, x0 + array_module(x0).asarray(noise))

    def distance(self, x0, x):
        """|x - x0|_inf of each image, (N,)."""
        return abs(x - x0).reshape(len(x), -1).max(1)

    def inside(self, x0, x):
        """Which images are in ball and box? (N,) bool."""
        low, high = self.bounds(x0)
        return ((x >= low) & (x <= high)).reshape(len(x), -1).all(1)  # NaN is outside


class L2:
    """{x: |x - x0|_2 <= eps}, within the box [0, 1]."""

    name = "l2"

    def __init__(self, eps: float):
        self.eps = eps

    def project(self, x0, x):
        """First onto the ball, then onto the box (which may lead further inside the ball), as the references do."""
        xp = array_module(x)
        change = x - x0
        norm = l2(change)
        change = change * per_image((self.eps / xp.maximum(norm, max(self.eps, 1e-300))).astype(x.dtype), x)
        moved = x0 + change
        # The sum was rounded, perhaps outwards, and thousands of pixels add up: round every pixel towards x0.
        moved = xp.where(abs(moved - x0) > abs(change), xp.nextafter(moved, x0), moved)
        return xp.clip(moved, 0, 1)

    def step(self, x0, x, gradient, size):
        """``x`` moved by ``size`` (N,) along the steepest ascent, the gradient at unit length, and projected.

        A gradient of zero moves nothing; one that is so small that its square underflows still has a direction.
        """
        xp = array_module(x)
        largest = abs(gradient).reshape(len(x), -1).max(1)
        unit = gradient / per_image(xp.where(largest > 0, largest, x.dtype.type(1)), x)
        norm = xp.maximum(l2(unit), 1e-12).astype(x.dtype)
        return self.project(x0, x + unit * per_image(size / norm, x))

    def random_start(self, x0, generators, edge: bool = True):
        """``x0`` plus noise of length eps in a uniformly random direction, cut off at the box."""
        noise = np.array([g.standard_normal(x0.shape[1:]) for g in generators]).reshape(x0.shape)
        noise *= self.eps / np.maximum(per_image(l2(noise), noise), 1e-300)
        return self.project(x0, x0 + array_module(x0).asarray(noise.astype(x0.dtype)))

    def distance(self, x0, x):
        """|x - x0|_2 of each image, (N,) float64."""
        return l2(x.astype(np.float64) - x0.astype(np.float64))

    def inside(self, x0, x):
        """Which images are in the ball (but for one part in a million: a norm is rounded) and in the box? (N,) bool."""
        in_box = ((x >= 0) & (x <= 1)).reshape(len(x), -1).all(1)
        return in_box & (self.distance(x0, x) <= self.eps * (1 + 1e-6))


def threat(norm: str, eps: float) -> Linf | L2:
    """The threat model called ``norm``: "linf" or "l2". Raises ValueError for another, or for a bad eps."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number >= 0, not {eps}")
    return (Linf if norm == "linf" else L2)(float(eps))


def check_inputs(x, labels, eps: float, *, norm: str = "linf", ids=None) -> tuple[Linf | L2, object, np.ndarray]:
    """(threat model, labels next to x, ids as NumPy ints: by default 0 ... N-1), or a ValueError that says what is odd.

    ``x`` (N, H, W, C) in [0, 1], float; ``labels`` (N,) ints >= 0; ids (N,) ints in [0, 2^32).
    """
    xp, model = array_module(x), threat(norm, eps)
    if x.dtype.kind != "f":
        raise ValueError(f"images must be float32 or float64 in [0, 1], not {x.dtype}")
    if not bool(((x >= 0) & (x <= 1)).all()):  # NaN is neither
        raise ValueError("images must be in [0, 1], without NaN: normalisation belongs into the model")
    labels, ids = xp.asarray(labels), np.arange(len(x)) if ids is None else to_numpy(ids)
    for name, numbers in (("labels", labels), ("ids", ids)):
        if numbers.shape != x.shape[:1] or (numbers.size and numbers.dtype.kind not in "iu"):
            raise ValueError(
                f"{name} must be {len(x)} integers, one for each image, not {numbers.dtype} {numbers.shape}"
            )
        if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= 1 << 32):
            raise ValueError(f"{name} must be >= 0 and < 2^32")
    return model, labels.astype(np.int64), ids.astype(np.int64)


def check_logits(logits, labels, *, least: int = 2, loss: str = "this attack") -> None:
    """ValueError when there are fewer than ``least`` classes, or a label that is none of them."""
    classes = logits.shape[1]
    if classes < least:
        raise ValueError(f"{loss} needs at least {least} classes, the model has {classes}")
    if len(labels) and int(labels.max()) >= classes:
        raise ValueError(f"labels must be below {classes}, the model's number of classes, not {int(labels.max())}")


def in_batches(
    attack: Callable,
    model,
    x,
    labels,
    eps: float,
    *,
    norm: str = "linf",
    ids=None,
    batch_size: int = 250,
    progress: Callable | None = None,
    least: int = 2,
    loss: str = "this attack",
):
    """(adversarial, fooled) from ``attack(threat, x, labels, ids, logits)`` -> the same pair, for parts of the images.

    ``attack`` is given the images that the model gets right, at most ``batch_size`` at once, with their logits; those
    that it gets wrong are fooled as they are. Rows that are not fooled come back as they were. The size of the batches
    decides nothing but how the network's own matrix products round. Raises what :func:`check_inputs` and
    :func:`check_logits` raise.
    """
    ball, labels, ids = check_inputs(x, labels, eps, norm=norm, ids=ids)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    xp = array_module(x)
    adversarial, fooled, robust = x.copy(), xp.zeros(len(x), bool), 0
    for first in range(0, len(x), batch_size):
        stop = min(first + batch_size, len(x))
        logits, _ = model.forward(x[first:stop])
        if first == 0:
            check_logits(logits, labels, least=least, loss=loss)
        right = logits.argmax(1) == labels[first:stop]
        fooled[first:stop] = ~right
        left = first + xp.flatnonzero(right)
        if len(left):
            found, hit = attack(ball, x[left], labels[left], ids[to_numpy(left)], logits[right])
            adversarial[left[hit]], fooled[left] = found[hit], hit
        robust += stop - first - int(fooled[first:stop].sum())
        if progress:
            progress(stop, robust)
    return adversarial, fooled


def recheck(model, x, adversarial, labels, eps: float, norm: str = "linf", batch_size: int = 250):
    """(N,) bool: is the image misclassified in a fresh forward pass, in the ball of radius eps, and in the box?"""
    xp, ball = array_module(x), threat(norm, eps)
    fooled = xp.zeros(len(x), bool)
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        wrong = model.forward(adversarial[part])[0].argmax(1) != xp.asarray(labels[part])
        fooled[part] = wrong & ball.inside(x[part], adversarial[part])
    return fooled
