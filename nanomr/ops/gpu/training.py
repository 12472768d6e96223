"""The launches of ``kernels/training.cu``: linear layers, losses, the optimiser, what is drawn at random."""

import math

import numpy as np

from ... import rng
from ...backend import array_module
from . import plain
from .cuda import BLOCKS, ceil, grid_over, has_kernels, launch, ready, runs
from .elementwise import cast
from .normalization import IDENTITY

# --- linear -----------------------------------------------------------------------------------------------------------


def _product(a, b, bias=None):
    """a b + bias in float32, any of them transposed. Small ones by our kernel, since CUDA graphs refuse cuBLAS."""
    rows, terms, columns = *a.shape, b.shape[1]
    if not has_kernels(a, "float32") or rows * terms * columns > 1 << 30:
        product = a @ b
        return product if bias is None else product + bias
    c = array_module(a).empty((rows, columns), np.float32)
    a_row, a_column, b_row, b_column = (s // 4 for s in (*a.strides, *b.strides))
    sizes = (c, rows, columns, terms)
    arguments = (_base(a), a_row, a_column, _base(b), b_row, b_column, bias, *sizes)
    launch("training.cu", (), "matrix_product", (ceil(columns, 16), ceil(rows, 16)), 256, arguments)
    return c


def _base(a):
    """The contiguous array of which ``a`` is the transpose, or ``a`` itself."""
    return a if a.flags.c_contiguous else a.T


def _float32(x):
    """A bfloat16 array as float32; others as they are."""
    return cast(x, np.float32) if x.dtype.name == "bfloat16" else x


def _matrix(x):
    return ready(x, np.float32) if has_kernels(x, "float32") else x


def linear(x, w, b):
    """bfloat16 x gives float32 y: logits, and all that comes after the first of these layers, are float32."""
    x = _float32(x)
    return _product(_matrix(x), _matrix(w), b if b is None or not has_kernels(b, "float32") else ready(b))


def linear_input_gradient(dy, w):
    return _product(_matrix(_float32(dy)), _matrix(w).T)


def linear_weight_gradient(x, dy, into=None):
    x, dy = _matrix(_float32(x)), _matrix(_float32(dy))
    dw, db = _product(x.T, dy), dy.sum(0)
    if into is None:
        return dw, db
    into += dw
    return into, db


# --- training ---------------------------------------------------------------------------------------------------------


def _launch_over(name, count, arguments):
    """Launch a kernel of training.cu over ``count`` numbers."""
    launch("training.cu", (), name, grid_over(count), 256, arguments)


def _scalar(xp, value, dtype=np.float32):
    """A number for a kernel that reads it from memory; a 0-d array on the device stays there."""
    return xp.asarray(value, dtype).reshape(1)


def losses(logits, labels, gamma=None):
    """([cross-entropy, intrinsic], gradient by the logits) in one launch, all on the device.

    logits (N, K): cross-entropy alone. (3 N, K) with ``gamma``: cross-entropy of the first N, plus ``gamma`` times
    :func:`nanomr.losses.intrinsic` of the two others; the values come without gamma. labels (N,).
    """
    xp, logits = array_module(logits), ready(logits, np.float32)
    branches = 1 if gamma is None else 3
    n, classes = len(logits) // branches, logits.shape[1]
    gradient, values = xp.empty(logits.shape, np.float32), xp.empty(2, np.float32)
    scale = None if gamma is None else _scalar(xp, gamma)
    arguments = (logits, ready(labels, np.int32), scale, gradient, values, n, classes, branches)
    launch("training.cu", (), "losses", (1,), 256, arguments)
    return values, gradient


def hamming_norms(squares, before, share, per_sample):
    """(norms, before + share (sum of norms)) of a layer, from its Hamming squares (N,): the root of each, (N,), or of
    their sum, (1,). ``before``: a 0-d array, or 0."""
    xp, n = array_module(squares), len(squares)
    norms, total = xp.empty(n if per_sample else 1, np.float32), xp.empty((), np.float32)
    before = before if hasattr(before, "dtype") else None
    arguments = (ready(squares), before, norms, total, n, int(per_sample), float(share))
    launch("training.cu", (), "hamming_norms", (1,), 256, arguments)
    return norms, total


def hamming_weight(norms, gamma, factor, n):
    """gamma factor / norms, (n,), from norms (n,) or (1,)."""
    xp = array_module(norms)
    weight = xp.empty(n, np.float32)
    _launch_over("hamming_weight", n, (norms, _scalar(xp, gamma), weight, n, len(norms), float(factor)))
    return weight


def norm(x):
    """The l2 norm of x (n,), as a 0-d array. Not a dot product of cuBLAS, which a CUDA graph refuses."""
    if not has_kernels(x, "float32"):
        return (x @ x) ** 0.5
    xp, blocks = array_module(x), min(ceil(x.size, 256), BLOCKS)
    partial, total = xp.empty(blocks, np.float32), xp.empty((), np.float32)
    launch("training.cu", (), "sum_squares", (blocks,), 256, (ready(x), partial, x.size))
    defines = ("REAL=float", "WIDTH=1", f"ACTIVATION={IDENTITY}")
    launch("normalize.cu", defines, "sum_rows", (1,), 32, (partial, total, blocks))
    return total**0.5


def begin_step(step, order, labels, schedule, n: int):
    """(index (n,), labels (n,), [lr, eps, gamma_i, gamma_h]) of training step ``step``, a uint64 array (1,).

    order (steps n,), schedule (steps, 4), of an epoch; labels: of all images. int32 and float32, all on the device.
    """
    xp = array_module(step)
    index, chosen, now = xp.empty(n, np.int32), xp.empty(n, np.int32), xp.empty(4, np.float32)
    _launch_over("begin_step", n, (step, order, labels, schedule, index, chosen, now, n, len(schedule)))
    return index, chosen, now


def end_step(values, now, totals, peaks, step):
    """Add a step's ``values`` [loss, cross-entropy, intrinsic, hamming, gradient norm] (0-d arrays, or None) to
    ``totals`` (5,), keep ``peaks`` (2,), both float64, and count ``step`` up: what the host does on a CPU."""
    values = [ready(v, np.float32) if hasattr(v, "dtype") else None for v in values]  # 0.0 without any ReLU
    launch("training.cu", (), "end_step", (1,), 1, (*values, now, totals, peaks, step))


def sgd_update(w, g, velocity, lr, momentum, weight_decay):
    if not (has_kernels(w, "float32") and w.flags.c_contiguous and velocity.flags.c_contiguous):
        return plain.sgd_update(w, g, velocity, lr, momentum, weight_decay)
    rate = _scalar(array_module(w), lr)
    _launch_over("sgd_update", w.size, (w, ready(g), velocity, w.size, rate, float(momentum), float(weight_decay)))


def crop_flip(images, index, top, left, flip, pad=4):
    xp, (n, (h, w, c)) = array_module(images), (len(index), images.shape[1:])
    if runs(images):
        out = xp.empty((n, h, w, c), np.float32)
        drawn = [ready(v, np.int32) for v in (index, top, left, flip)]
        _launch_over("crop_flip", out.size, (ready(images), *drawn, out, n, h, w, c, pad))
        return out
    return plain.crop_flip(images, index, top, left, flip, pad)


def corners(words, shape, eps):
    xp, count = array_module(words), math.prod(shape)
    if runs(words):
        rho = xp.empty(shape, np.float32)
        _launch_over("corners", count, (ready(words, np.uint64), rho, count, float(eps)))
        return rho
    return plain.corners(words, shape, eps)


def draw_corners(shape, eps, seed: int, step):
    """What :func:`nanomr.manifold.corner_pairs` draws, bit by bit, drawn on the device. ``step``: a uint64 array (1,)
    there, so that a captured graph may count it up; ``eps`` a number or a 0-d array."""
    xp, count = array_module(step), math.prod(shape)
    rho = xp.empty(shape, np.float32)
    arguments = (rho, count, np.uint64(seed), np.uint64(rng.CORNERS), step, _scalar(xp, eps))
    _launch_over("draw_corners", 32 * ceil(count, 256), arguments)  # a warp for 256 bits
    return rho


def draw_augmentation(n: int, seed: int, step):
    """(top, left, flip), int32 (n,): what a generator of this seed and step gives for ``integers(0, 9, n)``, twice, and
    ``random(n) < 0.5``, drawn on the device. ``step``: a uint64 array (1,) there."""
    xp = array_module(step)
    top, left, flip = (xp.empty(n, np.int32) for _ in range(3))
    arguments = (top, left, flip, n, np.uint64(seed), np.uint64(rng.AUGMENT), step)
    launch("training.cu", (), "draw_augmentation", (1,), 256, arguments)
    return top, left, flip
