"""What the attacks share: threat models, random draws, checks, batches. Images and eps are in [0, 1] units."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import numpy as np

from .. import rng
from ..backend import array_module, to_numpy
from ..errors import NoClass
from ..ops import ops_for
from ..ops.balls import rounding_slack

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
    """{x: |x - x0|_inf <= eps} in real arithmetic, within the box [0, 1]."""

    name = "linf"

    def __init__(self, eps: float):
        self.eps = eps

    def bounds(self, x0):
        """(low, high): the smallest and largest allowed images, ball and box together, rounded inwards."""
        return ops_for(x0).linf_bounds(x0, self.eps)

    def project(self, x0, x):
        """The nearest image to ``x`` in ball and box."""
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
    """{x: |x - x0|_2 <= eps} in real arithmetic, within the box [0, 1]."""

    name = "l2"

    def __init__(self, eps: float):
        self.eps = eps

    def project(self, x0, x):
        """First onto the ball, then onto the box (which may lead further inside the ball), as the references do."""
        return self.step(x0, x, x, array_module(x).zeros(len(x), x.dtype))

    def step(self, x0, x, gradient, size):
        """``x`` moved by ``size`` (N,) along the steepest ascent, the gradient at unit length, and projected.

        A gradient of zero moves nothing; one that is so small that its square underflows still has a direction.
        """
        return ops_for(x).l2_step(x, gradient, size, x0, self.eps)

    def random_start(self, x0, generators, edge: bool = True):
        """``x0`` plus noise of length eps in a uniformly random direction, cut off at the box."""
        noise = np.array([g.standard_normal(x0.shape[1:]) for g in generators]).reshape(x0.shape)
        noise *= self.eps / np.maximum(per_image(l2(noise), noise), 1e-300)
        return self.project(x0, x0 + array_module(x0).asarray(noise.astype(x0.dtype)))

    def distance(self, x0, x):
        """|x - x0|_2 of each image, (N,) float64."""
        return l2(x.astype(np.float64) - x0.astype(np.float64))

    def inside(self, x0, x):
        """Which images are in ball and box? (N,) bool. Not those whose distance is eps up to float64's rounding."""
        in_box = ((x >= 0) & (x <= 1)).reshape(len(x), -1).all(1)
        return in_box & (self.distance(x0, x) <= self.eps * (1 - rounding_slack(x)))


class L1:
    """{x: |x - x0|_1 <= eps} in real arithmetic, within the box [0, 1]. ``coordinates``: so many move in a step.

    ``docs/derivations/msd.md`` derives step and projection. For training (MSD): no evaluation offers it.
    """

    name = "l1"

    def __init__(self, eps: float, coordinates: int = 20):
        self.eps, self.coordinates = eps, coordinates

    def project(self, x0, x):
        """First onto the ball, then onto the box (which may lead further inside the ball)."""
        return self.step(x0, x, x, array_module(x).zeros(len(x), x.dtype))

    def step(self, x0, x, gradient, size):
        """``x`` moved by ``size`` (N,) along the steepest ascent whose coordinates move equally far, and projected.

        Those with the largest gradient move, of the ones that have so much room in the box.
        """
        return ops_for(x).l1_step(x, gradient, size, x0, self.eps, self.coordinates)

    def distance(self, x0, x):
        """|x - x0|_1 of each image, (N,) float64."""
        return abs(x.astype(np.float64) - x0.astype(np.float64)).reshape(len(x), -1).sum(1)

    def inside(self, x0, x):
        """Which images are in ball and box? (N,) bool. Not those whose distance is eps up to float64's rounding."""
        in_box = ((x >= 0) & (x <= 1)).reshape(len(x), -1).all(1)
        return in_box & (self.distance(x0, x) <= self.eps * (1 - rounding_slack(x)))


def threat(norm: str, eps: float) -> Linf | L2:
    """The threat model called ``norm``: "linf" or "l2". Raises ValueError for another, or for a bad eps."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number >= 0, not {eps}")
    return (Linf if norm == "linf" else L2)(float(eps))


def misclassified(logits, labels):
    """(N,) bool: is another class than the label's the likeliest? Logits that are not finite are no class at all."""
    return array_module(logits).isfinite(logits).all(1) & (logits.argmax(1) != labels)


def logits_of(model, x):
    """The model's logits (N, K) of images ``x``. Raises NoClass, a ValueError, when any is NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        logits, _ = model.forward(x)
    if lost := len(logits) - int(array_module(logits).isfinite(logits).all(1).sum()):
        raise NoClass(
            f"the network's logits are NaN or infinite for {lost} of {len(x)} images: that is no class; take another "
            "checkpoint"
        )
    return logits


def input_gradient(model, x, climbed, train: bool = False):
    """The gradient by ``x`` of a loss; ``climbed``: logits -> its gradient by them. Parameters get none."""
    logits, cache = model.forward(x, train=train)
    return model.backward(climbed(logits), cache, param_grads=False)


def predictions(model, x, batch_size: int = 250):
    """(N,) ints: the class that the model gives to each image. Raises NoClass, see :func:`logits_of`."""
    xp = array_module(x)
    parts = [logits_of(model, x[i : i + batch_size]).argmax(1) for i in range(0, len(x), batch_size)]
    return xp.concatenate([xp.zeros(0, np.int64), *parts])


# --- the border: what is refused before anything starts ---------------------------------------------------------------


def check_inputs(x, labels, eps: float, *, norm: str = "linf", ids=None) -> tuple[Linf | L2, object, np.ndarray]:
    """(threat model, labels next to x, ids as NumPy ints: by default 0 ... N-1), or a ValueError that says what is odd.

    ``x`` (N, H, W, C) in [0, 1], float; ``labels`` (N,) ints >= 0; ids (N,) ints in [0, 2^32).
    """
    xp, model = array_module(x), threat(norm, eps)
    dtype = getattr(x, "dtype", type(x).__name__)
    if dtype not in (np.float32, np.float64) or x.ndim < 2:
        shape = f" {x.shape}" if hasattr(x, "shape") else ""
        raise ValueError(f"images must be float32 or float64 in [0, 1], (N, H, W, C), not {dtype}{shape}")
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


# The options that count something, with the least that has a meaning: no step is the start alone, no run is no attack.
COUNTS = {"batch_size": 1, "restarts": 1, "targets": 1, "every": 1, "first": 0, "steps": 0, "queries": 0, "draws": 0}


def check_options(name: str, options: dict) -> None:
    """ValueError unless all ``options`` in COUNTS are whole numbers that make sense, and a step_size is >= 0."""
    for option in COUNTS.keys() & options.keys():
        value, least = options[option], COUNTS[option]
        if not isinstance(value, int | np.integer):
            raise ValueError(f"{name}: {option} must be a whole number, not {value!r}")
        if value < least:
            raise ValueError(f"{name}: {option} must be at least {least}, not {value}")
    size = options.get("step_size")
    if size is not None and not 0 <= size < float("inf"):
        raise ValueError(f"{name}: step_size must be a number >= 0, not {size}")


# --- one signature, one loop over batches -----------------------------------------------------------------------------


class Batch(NamedTuple):
    """What an attack is given: images that the model gets right, and all there is to know of them."""

    model: object
    ball: Linf | L2
    x: object  # (N, H, W, C)
    labels: object  # (N,) ints, on x's device
    ids: np.ndarray  # (N,) ints
    logits: object  # (N, K), of x
    rows: object  # (N,) ints: which of all images these are
    seed: int

    def draws(self, salt: int, restart: int = 0, left=None) -> list[np.random.Generator]:
        """:func:`draws` for the images ``left`` (indices; None: all)."""
        return draws(self.seed, salt, self.ids if left is None else self.ids[to_numpy(left)], restart)


def attack(least: int | Callable = 2, check: Callable | None = None) -> Callable:
    """Makes an attack of ``run(batch, **options)`` -> (adversarial, fooled), with the signature and promises of all:

        (model, x, labels, eps, *, norm="linf", seed=0, ids=None, batch_size=250, progress=None, **options)

    ``least``: the fewest classes that it works with, or a function of the options; ``check(shape, **options)`` raises
    ValueError for what it cannot take, of images of this shape. The attack offers ``complete(shape, **options)`` ->
    all its options, checked, and ``least(**options)``: a cascade asks before it starts.
    """

    def decorate(run: Callable) -> Callable:
        own = inspect.signature(run)
        fewest = least if callable(least) else lambda **_: least

        def complete(shape, *args, **options) -> dict:
            given = own.bind(None, *args, **options)
            given.apply_defaults()
            _, *names = own.parameters
            options = {name: given.arguments[name] for name in names}
            check_options(run.__name__, options)
            if check:
                check(shape, **options)
            return options

        @wraps(run)
        def call(model, x, labels, eps, *args, norm="linf", seed=0, ids=None, batch_size=250, progress=None, **options):
            options = complete(np.shape(x), *args, **options)
            return in_batches(
                lambda batch: run(batch, **options), model, x, labels, eps, norm=norm, seed=seed, ids=ids,
                batch_size=batch_size, progress=progress, least=fewest(**options), loss=run.__name__,
            )  # fmt: skip

        shared = inspect.signature(call, follow_wrapped=False).parameters.values()
        shared = [p for p in shared if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        _, *others = own.parameters.values()
        call.__signature__ = own.replace(parameters=sorted([*shared, *others], key=lambda p: p.kind))
        call.complete, call.least = complete, fewest
        return call

    return decorate


def in_batches(
    run: Callable,
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
    least: int = 2,
    loss: str = "this attack",
):
    """(adversarial, fooled) from ``run(batch)`` -> the same pair, for parts of the images.

    ``run`` is given the images that the model gets right, at most ``batch_size`` at once, as a :class:`Batch`; those
    that it gets wrong are fooled as they are. What it claims is believed when :func:`recheck` confirms it. Rows that
    are not fooled come back as they were. The size of the batches decides nothing but how the network's own matrix
    products round. Raises what :func:`check_inputs`, :func:`check_logits` and :func:`logits_of` raise.
    """
    ball, labels, ids = check_inputs(x, labels, eps, norm=norm, ids=ids)
    check_options(loss, {"batch_size": batch_size})
    xp = array_module(x)
    adversarial, fooled, robust = x.copy(), xp.zeros(len(x), bool), 0
    for first in range(0, len(x), batch_size):
        stop = min(first + batch_size, len(x))
        logits = logits_of(model, x[first:stop])
        if first == 0:
            check_logits(logits, labels, least=least, loss=loss)
        right = logits.argmax(1) == labels[first:stop]
        fooled[first:stop] = ~right
        left = first + xp.flatnonzero(right)
        if len(left):
            batch = Batch(model, ball, x[left], labels[left], ids[to_numpy(left)], logits[right], left, seed)
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a NaN fools nobody
                found, hit = run(batch)
            left, found = left[hit], found[hit]
            sure = recheck(model, x[left], found, labels[left], eps, norm, batch_size)
            adversarial[left[sure]], fooled[left[sure]] = found[sure], True
        robust += stop - first - int(fooled[first:stop].sum())
        if progress:
            progress(stop, robust)
    return adversarial, fooled


def recheck(model, x, adversarial, labels, eps: float, norm: str = "linf", batch_size: int = 250):
    """(N,) bool: is the image misclassified in a fresh forward pass, in the ball of radius eps, and in the box?

    NaN and infinite logits are no class, and so no success.
    """
    xp, ball = array_module(x), threat(norm, eps)
    fooled = xp.zeros(len(x), bool)
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        with np.errstate(over="ignore", invalid="ignore"):
            wrong = misclassified(model.forward(adversarial[part])[0], xp.asarray(labels[part]))
        fooled[part] = wrong & ball.inside(x[part], adversarial[part])
    return fooled
