"""What the self-test calls on a device, and what it should give: small odd shapes, every instantiation of a kernel that
a run takes. ``PROBES`` maps each function of ``gpu.OWN`` to its cases; ``check`` holds the function to them. And how
fast is each tile that a convolution may take (``TILES``)?
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ... import graph, losses, rng
from ...backend import find_cupy, to_numpy
from .. import gpu, reference
from . import conv, cuda, plain


@dataclass
class Case:
    """A call and what it should give: ``expected`` (in float64, or integers), of what the function returns, or of the
    arguments that it changes."""

    arguments: tuple
    expected: tuple
    changed: tuple = ()  # their numbers; (i, k): of the k-th array in the i-th argument
    slack: float = 1e-4  # of the largest number, besides the rounding of bfloat16


def eighths(g, *shape):
    """Random multiples of 1/8 in [-2, 2], float32: sums of two of them are exact in bfloat16, and sums of products in
    float32, so that an error is an error."""
    return (g.integers(-16, 17, shape) / 8).astype(np.float32)


def exact(x):
    """In float64, if it is a float32 or bfloat16 array."""
    return x.astype(np.float64) if getattr(x, "dtype", np.dtype(bool)).name in cuda.REALS else x


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def call_of(function, *arguments, pictures=(), dtypes=("float32", "bfloat16"), **options) -> Iterator[Case]:
    """Cases of a function that has a formula: float32, and those arguments that are ``pictures`` in bfloat16."""
    for name in dtypes:
        dtype = np.dtype(np.float32) if name == "float32" else gpu.bfloat16()
        given = [a.astype(dtype) if i in pictures and a is not None else a for i, a in enumerate(arguments)]
        yield Case(tuple(given), as_tuple(function(*map(exact, given))), **options)


PICTURES = [(6, 9, 17, 16), (6, 9, 7, 5)]  # of vectors of 16 bytes, and of single numbers; several blocks each


def _activations(g):
    for shape in PICTURES:
        z, dy, weight = eighths(g, *shape), eighths(g, *shape), eighths(g, shape[0] // 3)
        yield z, dy, weight


def relu(g):
    for z, _, _ in _activations(g):
        yield from call_of(reference.relu, z, pictures=(0,))


def relu_backward(g):
    for z, dy, _ in _activations(g):
        yield from call_of(reference.relu_backward, dy, z, pictures=(0, 1))


def relu_hamming(g):
    for z, _, _ in _activations(g):
        yield from call_of(reference.relu_hamming, z, 0.7, pictures=(0,))


def relu_hamming_backward(g):
    for z, dy, weight in _activations(g):
        yield from call_of(reference.relu_hamming_backward, dy, z, 0.7, weight, pictures=(0, 1))


def relu_hamming_pair(g):
    for z, _, _ in _activations(g):
        yield from call_of(reference.relu_hamming_pair, z[:2], z[2:4], 0.7, pictures=(0, 1))


def relu_hamming_pair_backward(g):
    for z, dy, weight in _activations(g):  # dz is rounded before it is contracted
        arguments = dy, z[:2], z[2:4], 0.7, weight
        yield from call_of(
            reference.relu_hamming_pair_backward, *arguments, pictures=(0, 1, 2), dtypes=("bfloat16",), slack=0.02
        )
        yield from call_of(reference.relu_hamming_pair_backward, *arguments, dtypes=("float32",))


def expand_pair(g):
    for z, dy, _ in _activations(g):
        yield from call_of(reference.expand_pair, z, dy, pictures=(0, 1))


def contract_pair(g):
    for z, _, _ in _activations(g):
        yield from call_of(reference.contract_pair, z, pictures=(0,))


def add(g):
    for z, dy, _ in _activations(g):
        yield from call_of(lambda a, b: a + b, z, dy, pictures=(0, 1))


def average_pool(g):
    for c in (16, 5):
        yield from call_of(reference.average_pool, eighths(g, 3, 6, 9, c), 3, pictures=(0,))


def average_pool_backward(g):
    for c in (16, 5):
        yield from call_of(reference.average_pool_backward, eighths(g, 3, 2, 3, c), 3, pictures=(0,))


def normalize(g):
    for z, _, _ in _activations(g):
        c = z.shape[-1]
        yield from call_of(reference.normalize, z, eighths(g, c), eighths(g, c) / 8 + 1, pictures=(0,))
        yield from call_of(reference.normalize, z, None, eighths(g, 1) / 8 + 1, pictures=(0,))


def scale_channels(g):
    for z, dy, _ in _activations(g):
        yield from call_of(reference.scale_channels, z, eighths(g, z.shape[-1]), dy, pictures=(0, 2))


def batchnorm_statistics(g):
    for z, _, _ in _activations(g):
        yield from call_of(reference.batchnorm_statistics, z, pictures=(0,))


def batchnorm_training(g):
    for z, _, _ in _activations(g):
        for case in call_of(reference.batchnorm_statistics, z, pictures=(0,)):
            (mean, var), (x,), c = case.expected, case.arguments, z.shape[-1]
            before, m = (eighths(g, c), eighths(g, c) + 4, np.array(6)), z.size // c
            moved = [0.75 * exact(b) + 0.25 * v for b, v in zip(before, (mean, var * m / (m - 1)), strict=False)]
            given, expected = (x, 0.125, 0.25, *before), (mean, (var + 0.125) ** -0.5)
            yield Case(given, expected)
            yield Case(given, (*moved, np.array(7)), changed=(3, 4, 5))


def _normal(g, c):
    """gamma, beta, mean, inv_std (C,)."""
    return eighths(g, c), eighths(g, c), eighths(g, c), eighths(g, c) / 4 + 1


def batchnorm(g):
    for z, _, _ in _activations(g):
        yield from call_of(reference.batchnorm, z, *_normal(g, z.shape[-1]), pictures=(0,))


def batchnorm_relu(g):
    for z, _, _ in _activations(g):
        yield from call_of(plain.batchnorm_relu, z, *_normal(g, z.shape[-1]), pictures=(0,))


def batchnorm_relu_hamming(g):
    for z, _, _ in _activations(g):
        yield from call_of(plain.batchnorm_relu_hamming, z, *_normal(g, z.shape[-1]), 0.7, pictures=(0,))


def batchnorm_relu_backward(g):
    for z, dy, weight in _activations(g):
        c = z.shape[-1]
        normal, extra = _normal(g, c), ((0.7, weight, None), (None, None, dy[::-1]))
        for more in extra:
            yield from call_of(plain.batchnorm_relu_backward, dy, z, *normal, *more, pictures=(0, 1, 8))
        arguments, totals = (dy, z, *normal, 0.7, weight, None, True), [eighths(g, c), eighths(g, c)]
        _, *gradients = plain.batchnorm_relu_backward(*map(exact, arguments))
        expected = tuple(t + d for t, d in zip(totals, gradients, strict=True))
        yield Case((*arguments, totals), expected, changed=((10, 0), (10, 1)))


def batchnorm_parameter_gradient(g):
    for z, dy, _ in _activations(g):
        yield from call_of(reference.batchnorm_parameter_gradient, dy, z, *_normal(g, z.shape[-1])[2:], pictures=(0, 1))


def batchnorm_backward(g):
    for z, dy, _ in _activations(g):
        gamma, beta, mean, inv_std = _normal(g, z.shape[-1])
        arguments = dy, z, gamma, mean, inv_std, 20 * beta, 20 * gamma, dy[::-1]
        yield from call_of(reference.batchnorm_backward, *arguments, pictures=(0, 1, 7))


# x, w, stride: every tile (``conv.Tile``) in every direction, splits, several blocks and phases, channels that are
# filled up, a last block that is nearly empty.
CONVOLUTIONS = [
    ((2, 9, 8, 3), (3, 3, 3, 16), 1),
    ((5, 16, 15, 8), (3, 3, 8, 16), 1),
    ((3, 9, 8, 24), (3, 3, 24, 16), 2),
    ((1, 6, 5, 16), (3, 3, 16, 72), 1),
    ((2, 5, 4, 72), (1, 1, 72, 16), 2),
    ((1, 3, 3, 8), (1, 1, 8, 136), 1),
]


def _convolutions(g, shapes):
    for x, w, stride in shapes:
        window = stride, (w[0] // 2,) * 4
        y = reference.conv2d_shape(x, w, *window)
        yield eighths(g, *x), eighths(g, *w), eighths(g, w[3]), eighths(g, *y), window


def conv2d(g, shapes=CONVOLUTIONS):
    for x, w, b, dy, window in _convolutions(g, shapes):
        yield from call_of(reference.conv2d, x, w, b, *window, dy, pictures=(0, 5))
    yield from call_of(reference.conv2d, x, w, None, *window, pictures=(0,))


def conv2d_input_gradient(g, shapes=CONVOLUTIONS):
    for x, w, _, dy, window in _convolutions(g, shapes):
        yield from call_of(reference.conv2d_input_gradient, dy, w, *window, x.shape, x, pictures=(0, 5))
    yield from call_of(reference.conv2d_input_gradient, dy, w, *window, x.shape, pictures=(0,))


def conv2d_weight_gradient(g, shapes=CONVOLUTIONS):
    for x, w, _, dy, window in _convolutions(g, shapes):
        yield from call_of(reference.conv2d_weight_gradient, x, dy, w.shape, *window, pictures=(0, 1))


def conv2d_dw(g, shapes=CONVOLUTIONS):
    for x, w, _, dy, window in _convolutions(g, shapes):
        dw = lambda *a: reference.conv2d_weight_gradient(*a)[0]  # noqa: E731
        for case in call_of(dw, x, dy, w.shape, *window, pictures=(0, 1)):
            yield case
            yield Case((*case.arguments, w), (exact(w) + case.expected[0],), changed=(5,))


def linear(g):
    yield from call_of(reference.linear, eighths(g, 19, 40), eighths(g, 40, 21), eighths(g, 21), pictures=(0,))


def linear_input_gradient(g):
    yield from call_of(reference.linear_input_gradient, eighths(g, 19, 21), eighths(g, 40, 21), dtypes=("float32",))


def linear_weight_gradient(g):
    yield from call_of(reference.linear_weight_gradient, eighths(g, 19, 40), eighths(g, 19, 21), pictures=(0,))


def cast(g):
    x = (g.standard_normal(1000) * 10.0 ** g.integers(-30, 30, 1000)).astype(np.float32)
    x[:8] = 0, -0.0, np.nan, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3e38  # ties to even; up to infinity
    x[8:12] = 1e-39, -1e-39, 1e-40, 1e-45  # subnormal, before and behind; the last becomes 0
    with np.errstate(all="ignore"):
        narrow = x.astype(gpu.bfloat16())
    yield Case((x, gpu.bfloat16()), (exact(narrow),), slack=0)
    yield Case((narrow, np.dtype(np.float32)), (exact(narrow),), slack=0)


def of_losses(g):
    labels = g.integers(0, 10, 37)
    for branches, gamma in ((1, None), (3, 0.4)):
        logits = eighths(g, branches * 37, 10)
        entropy, pair, gradient = losses.of_logits(exact(logits), labels, gamma)
        yield Case(
            (logits, labels) if gamma is None else (logits, labels, gamma), (np.array([entropy, pair]), gradient)
        )


def hamming_norms(g):
    squares, before = abs(eighths(g, 300)), np.array(0.5, np.float32)
    root = exact(squares) ** 0.5
    yield Case((squares, before, 0.25, True), (root, 0.5 + 0.25 * root.sum()))
    whole = exact(squares).sum(keepdims=True) ** 0.5
    yield Case((squares, 0.0, 0.25, False), (whole, 0.25 * whole[0]))


def hamming_weight(g):
    norms, gamma = abs(eighths(g, 300)) + 0.125, np.array(3, np.float32)
    for some in (norms, norms[:1], np.zeros(1, np.float32)):
        expected = 3 * 0.25 / np.maximum(exact(some), 1e-12)
        yield Case((some, gamma, 0.25, 300), (np.broadcast_to(expected, (300,)),), slack=1e-6)


def norm(g):
    x = eighths(g, 70_001)
    yield Case((x,), (np.linalg.norm(exact(x)),), slack=1e-6)


def sgd_update(g):
    w, d, v = (eighths(g, 1001) for _ in range(3))
    after = [exact(a) for a in (w, d, v)]
    reference.sgd_update(*after, 0.25, 0.5, 0.125)
    yield Case((w, d, v, np.array(0.25, np.float32), 0.5, 0.125), (after[0], after[2]), changed=(0, 2))


def begin_step(g):
    order, labels = g.permutation(300).astype(np.int32), g.integers(0, 10, 300).astype(np.int32)
    schedule = eighths(g, 3, 4)
    yield Case((_step(5), order, labels, schedule, 100), (order[200:], labels[order[200:]], schedule[2]))


def end_step(g):
    values = [np.array(v, np.float32) for v in (4, 2, 0.5, 1, 8)]
    now, totals, peaks = np.float32([0, 0, 2, 3]), np.full(5, 8.0), np.array([0.25, 0])
    after = np.array([12.0, 10, 8.5, 9, 16]), np.array([0.5, 1.5]), _step(7)
    yield Case((values, now, totals, peaks, _step(6)), after, changed=(2, 3, 4), slack=0)


def crop_flip(g):
    images, index = g.integers(0, 256, (9, 7, 6, 3), np.uint8), g.integers(0, 9, 5).astype(np.int32)
    top, left, flip = (g.integers(0, most, 5).astype(np.int32) for most in (9, 9, 2))
    expected = reference.crop_flip(images, index, top, left, flip)
    yield Case((images, index, top, left, flip), (exact(expected),), slack=1e-6)


def corners(g):
    words = rng.words(3, rng.CORNERS, 4, 11)
    yield Case((words, (7, 10, 10), 0.125), (exact(reference.corners(words, (7, 10, 10), 0.125)),), slack=0)


def draw_corners(g):
    shape, words = (7, 10, 10), rng.words(3, rng.CORNERS, 2**40 + 1, 11)
    yield Case((shape, 0.125, 3, _step(2**40 + 1)), (exact(reference.corners(words, shape, 0.125)),), slack=0)


def draw_augmentation(g):
    for n, step in ((70, 5), (128, 229_419)):  # in the second NumPy rejects a word, once in a few million steps
        draw = rng.generator(1, rng.AUGMENT, step)
        expected = draw.integers(0, 9, n), draw.integers(0, 9, n), (draw.random(n) < 0.5).astype(int)
        yield Case((n, 1, _step(step)), expected, slack=0)


def _step(step):
    return np.array([step], np.uint64)


PROBES = {name: of_losses if name == "losses" else globals()[name] for name in gpu.OWN}


# --- one check --------------------------------------------------------------------------------------------------------


def moved(x, xp, offset):
    """Host arrays on the device. ``offset``: as views that start this many elements behind an aligned address."""
    if isinstance(x, list):
        return [moved(v, xp, offset) for v in x]
    if not isinstance(x, np.ndarray):
        return x
    before = np.zeros(offset * x.itemsize, np.uint8)  # as bytes: whatever CuPy makes of bfloat16
    raw = xp.asarray(np.concatenate([before, np.ascontiguousarray(x).reshape(-1).view(np.uint8)]))
    return raw[len(before) :].view(x.dtype).reshape(x.shape)


def difference(found, expected, slack) -> str | None:
    """What is wrong with one result of a function; None if nothing is."""
    expected = np.asarray(expected)
    if tuple(found.shape) != expected.shape:
        return f"a result has shape {tuple(found.shape)}, expected {expected.shape}"
    narrow, found = found.dtype.name == "bfloat16", exact(to_numpy(found))
    size = abs(expected[np.isfinite(expected)]).max(initial=0) if expected.dtype.kind == "f" else 0
    with np.errstate(invalid="ignore"):
        off = abs(found - expected)
        wrong = ~((off <= slack * size + (abs(expected) * 2.0**-8 if narrow and slack else 0)) | (found == expected))
    wrong &= ~(np.isnan(found) & np.isnan(expected)) if expected.dtype.kind == "f" else True
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = f"[{', '.join(map(str, at))}]" if at else ""
    return f"{wrong.sum()} of {wrong.size} numbers are wrong: {where} is {found[at]:.7g}, expected {expected[at]:.7g}"


def check(name: str) -> str | float | None:
    """What is wrong with a function on this device, in one line; None if nothing is. Of a tile (``TILES``) whose sums
    are right, the time that it takes."""
    if name == "graph":
        return check_graph()
    if name in TILES:
        return check_tile(*TILES[name])
    return check_cases(gpu.OWN[name], PROBES[name](np.random.default_rng(7)))


def check_cases(function, cases) -> str | None:
    xp = find_cupy()
    for case in cases:
        first = None
        for offset in (0, 1):  # a view anywhere; the same bits
            arguments = [moved(a, xp, offset) for a in case.arguments]
            found = as_tuple(function(*arguments))
            if case.changed:
                found = [arguments[i[0]][i[1]] if isinstance(i, tuple) else arguments[i] for i in case.changed]
            for f, expected in zip(found, case.expected, strict=True):
                if problem := difference(f, expected, case.slack):
                    types = {a.dtype.name for a in case.arguments if hasattr(a, "dtype")}
                    return f"{problem} ({', '.join(sorted(types))})"
            bits = [to_numpy(f).tobytes() for f in found]
            if first is not None and bits != first:
                return "the same call gives other bits"
            first = bits
    return None


# --- which tile a convolution takes ----------------------------------------------------------------------------------

TILES = {  # name of a check: (product, the tile's name)
    f"{product}, {name}": (product, name) for product, (_, kind) in conv.PRODUCTS.items() for name in conv.TILES[kind]
}
# x, w, stride: products of each kind, more terms than the stages of a pipeline take, several blocks.
RIGHT = {
    "narrow": [((2, 9, 8, 40), (3, 3, 40, 56), 1), ((3, 9, 8, 24), (1, 1, 24, 16), 2)],
    "wide": [((2, 9, 8, 72), (3, 3, 72, 136), 1), ((1, 7, 6, 72), (3, 3, 72, 80), 2)],
    "tall": [((5, 9, 8, 24), (3, 3, 24, 16), 1)],
}
# ... of PreActResNet18 at the paper's batch, one for each stage, that a tile is timed on.
TIMED = {
    "narrow": [((384, 32, 32, 64), (3, 3, 64, 64), 1)],
    "wide": [((384, s, s, c), (3, 3, c, c), 1) for s, c in ((16, 128), (8, 256), (4, 512))],
    "tall": [((384, 32, 32, 64), (3, 3, 64, 64), 1)],
}
ROUNDS = 20  # through these, each timed; some milliseconds on an H100


def check_tile(product: str, name: str) -> str | float | None:
    """us of the products in ``TIMED``; or what is wrong with this tile; None: it is for another card."""
    xp, (direction, kind) = find_cupy(), conv.PRODUCTS[product]
    if conv.TILES[kind][name].wgmma and str(xp.cuda.Device().compute_capability) != "90":
        return None
    function = ("conv2d", "conv2d_input_gradient", "conv2d_dw")[direction]
    cases = PROBES[function](np.random.default_rng(7), RIGHT[kind])
    ours = (case for case in cases if case.arguments[0].dtype.name == "bfloat16")
    before = dict(conv.tiles_in_use)
    conv.use_tiles({product: name})
    try:
        return check_cases(gpu.OWN[function], ours) or time_tile(direction, TIMED[kind], name)
    finally:
        conv.use_tiles(before)


def time_tile(direction: int, shapes, name: str) -> str | float:
    """us of one round through these products, the median; or what is not as in the usual tile: what two warps or two
    blocks do to each other may show on a full device alone."""
    xp, g, launches = find_cupy(), np.random.default_rng(7), []
    for x_shape, w_shape, stride in shapes:
        window = stride, (w_shape[0] // 2,) * 4
        plan, usual = (conv.conv_plan(direction, x_shape, w_shape, *window, which) for which in (name, "usual"))
        y_shape = reference.conv2d_shape(x_shape, w_shape, *window)
        if direction == conv.WEIGHT:
            given, shape, dtype = (noise(xp, g, x_shape), noise(xp, g, y_shape)), (plan.splits, *w_shape), np.float32
        else:
            source, shape = (x_shape, y_shape) if direction == conv.FORWARD else (y_shape, x_shape)
            given, dtype = (noise(xp, g, source), noise(xp, g, w_shape), None, None), gpu.bfloat16()
        launches.append((plan, usual, given, *(unknown(xp, shape, dtype) for _ in range(2))))
    marks = []
    for _ in range(ROUNDS + 5):
        mark = xp.cuda.Event()
        mark.record()
        marks.append(mark)
        for plan, _, given, result, _ in launches:
            plan.launch(*given, result)
    marks[-1].synchronize()
    for _, usual, given, result, expected in launches:
        usual.launch(*given, expected)
        found, expected = (gpu.OWN["cast"](r, np.float32) for r in (result, expected))
        size = abs(expected)
        wrong = int((~(abs(found - expected) <= 2.0**-7 * size + 1e-3 * size.max())).sum())
        if wrong:
            return f"{wrong} of {found.size} numbers are not as in the usual tile, of {result.shape}"
    return 1e3 * statistics.median(xp.cuda.get_elapsed_time(*pair) for pair in pairwise(marks[5:]))


def unknown(xp, shape, dtype):
    """NaN, in either dtype."""
    x = xp.empty(math.prod(shape) * np.dtype(dtype).itemsize, np.uint8)
    x[...] = 255
    return x.view(dtype).reshape(shape)


def noise(xp, g, shape):
    """bfloat16 numbers, the same in every row of pixels: what is multiplied decides how fast a GPU's clock runs."""
    row = g.standard_normal(shape[-2:], np.float32).view(np.uint32) >> 16  # cut off
    x = xp.empty(shape, np.uint16)
    x[...] = xp.asarray(row.astype(np.uint16))
    return x.view(gpu.bfloat16())


# --- a CUDA graph -----------------------------------------------------------------------------------------------------


def check_graph() -> str | None:
    """A small step, replayed, gives the bits of the steps from Python, also when the memory around it was used."""
    xp, g = find_cupy(), np.random.default_rng(7)
    start, x, labels = eighths(g, 3, 3, 8, 8), eighths(g, 2, 6, 6, 8), np.array([3, 5], np.int32)

    def train(replayed: bool):
        w, images, targets = (xp.asarray(a) for a in (start, x, labels))
        images = gpu.OWN["cast"](images, gpu.bfloat16())
        velocity, lr = xp.zeros_like(w), xp.asarray(np.float32(0.125))

        def step():
            y = gpu.OWN["conv2d"](images, w, None, 1, (1, 1, 1, 1))
            logits = gpu.OWN["cast"](gpu.OWN["average_pool"](y, 6).reshape(2, 8), np.float32)
            _, gradient = gpu.OWN["losses"](logits, targets)
            back = gpu.OWN["cast"](gradient, gpu.bfloat16()).reshape(2, 1, 1, 8)
            back = gpu.OWN["average_pool_backward"](back, 6)
            dw = gpu.OWN["conv2d_dw"](images, back, w.shape, 1, (1, 1, 1, 1)) * lr
            gpu.OWN["sgd_update"](w, dw, velocity, lr, 0.5, 0.0)

        run, found = graph.Replayed(step) if replayed else step, []
        for k in range(5):
            run()
            found.append(to_numpy(w))
            if k == 3:
                xp.get_default_memory_pool().free_all_blocks()
                other = [xp.empty(1 << 16, np.float32) for _ in range(8)]
                for array in other:
                    array[...] = np.nan
        return found, getattr(run, "failure", None)

    expected, _ = train(False)
    found, failure = train(True)
    if failure:
        return failure
    if any((a != b).any() for a, b in zip(found, expected, strict=True)):
        return "replayed steps give other numbers than steps from Python"
    return None
