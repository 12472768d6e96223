"""Every function without a kernel of ours: the formulas of ``reference`` on device arrays, by CuPy's own kernels.

For dtypes and shapes that no kernel takes, and for a kernel that fails its test on this device (``selftest.py``). Slow,
and correct. bfloat16 is computed in float32, and pictures are rounded as they are stored. The draws are the host's,
and some functions wait for the device: none of this belongs in a CUDA graph.
"""

import functools

import numpy as np

from ... import rng
from ...backend import array_module, to_numpy
from .. import reference


def _widened(function, pictures=True):
    """``function``, bfloat16 arguments taken as float32. ``pictures``: results are rounded back, but for those of one
    axis (statistics, sums)."""

    @functools.wraps(function)
    def run(*arguments):
        narrow = {a.dtype for a in arguments if getattr(a, "dtype", np.dtype(bool)).name == "bfloat16"}
        if not narrow:
            return function(*arguments)
        result = function(*[a.astype(np.float32) if getattr(a, "dtype", None) in narrow else a for a in arguments])
        if not pictures:
            return result
        several = isinstance(result, tuple)
        found = [r.astype(*narrow) if getattr(r, "ndim", 0) > 1 else r for r in (result if several else (result,))]
        return tuple(found) if several else found[0]

    return run


relu = _widened(reference.relu)
relu_backward = _widened(reference.relu_backward)
box_around = _widened(reference.box_around)
relu_box = _widened(reference.relu_box)
relu_box_backward = _widened(reference.relu_box_backward)
box_sums = _widened(reference.box_sums)
rivals_gain = _widened(reference.rivals_gain, pictures=False)  # behind the last layer: float32
rivals_gain_backward = _widened(reference.rivals_gain_backward, pictures=False)
times_sign = _widened(reference.times_sign)
batchnorm_relu_box = _widened(reference.batchnorm_relu_box)
batchnorm_relu_box_backward = _widened(reference.batchnorm_relu_box_backward)
relu_hamming = _widened(reference.relu_hamming)
relu_hamming_backward = _widened(reference.relu_hamming_backward)
relu_hamming_pair = _widened(reference.relu_hamming_pair)
relu_hamming_pair_backward = _widened(reference.relu_hamming_pair_backward)
normalize = _widened(reference.normalize)
expand_pair = _widened(reference.expand_pair)
contract_pair = _widened(reference.contract_pair)
batchnorm_statistics = _widened(reference.batchnorm_statistics)
batchnorm = _widened(reference.batchnorm)
batchnorm_parameter_gradient = _widened(reference.batchnorm_parameter_gradient)
batchnorm_backward = _widened(reference.batchnorm_backward)
batchnorm_relu = _widened(reference.batchnorm_relu)
batchnorm_relu_hamming = _widened(reference.batchnorm_relu_hamming)
batchnorm_relu_backward = _widened(reference.batchnorm_relu_backward)
scale_channels = _widened(reference.scale_channels)
average_pool = _widened(reference.average_pool)
average_pool_backward = _widened(reference.average_pool_backward)
linear = _widened(reference.linear, pictures=False)  # what comes after the first of these layers is float32
linear_input_gradient = _widened(reference.linear_input_gradient, pictures=False)
linear_weight_gradient = _widened(reference.linear_weight_gradient, pictures=False)
sgd_update = reference.sgd_update
norm = reference.norm


@_widened
def add(a, b):
    """a + b, of one dtype: a residual connection."""
    return a + b


def cast(x, dtype):
    """``x`` in this dtype, as NumPy and CuPy convert it."""
    return x.astype(dtype, copy=False)


# --- convolution: im2col and a matrix product -------------------------------------------------------------------------


def _columns(x, kh, kw, stride, padding):
    """im2col: (N Ho Wo, kh kw C), each row the patch that one output pixel sees."""
    xp, (top, bottom, left, right) = array_module(x), padding
    x = xp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    n, h, w, c = x.shape
    ho, wo = (h - kh) // stride + 1, (w - kw) // stride + 1
    image, row, column, channel = x.strides
    strides = (image, stride * row, stride * column, row, column, channel)
    patches = xp.lib.stride_tricks.as_strided(x, (n, ho, wo, kh, kw, c), strides)
    return patches.reshape(n * ho * wo, kh * kw * c)


@_widened
def conv2d(x, w, b, stride, padding, plus=None):
    shape = reference.conv2d_shape(x.shape, w.shape, stride, padding)
    y = _columns(x, *w.shape[:2], stride, padding) @ w.reshape(-1, shape[3])
    if b is not None:
        y += b
    y = y.reshape(shape)
    return y if plus is None else y + plus


@_widened
def conv2d_input_gradient(dy, w, stride, padding, x_shape, plus=None):
    xp, (top, bottom, left, right) = array_module(dy), padding
    (kh, kw, c, c_out), (n, h, wd, _), (ho, wo) = w.shape, x_shape, dy.shape[1:3]
    patches = (dy.reshape(-1, c_out) @ w.reshape(-1, c_out).T).reshape(n, ho, wo, kh, kw, c)
    padded = xp.zeros((n, h + top + bottom, wd + left + right, c), dy.dtype)
    for p in range(kh):
        for q in range(kw):
            padded[:, p : p + stride * ho : stride, q : q + stride * wo : stride] += patches[:, :, :, p, q]
    dx = padded[:, top : top + h, left : left + wd]
    return dx if plus is None else dx + plus


def _conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    flat = dy.reshape(-1, w_shape[3])
    return (_columns(x, *w_shape[:2], stride, padding).T @ flat).reshape(w_shape), flat.sum(0)


conv2d_weight_gradient = _widened(_conv2d_weight_gradient, pictures=False)


# --- a step, its images and its draws ---------------------------------------------------------------------------------


def begin_step(step, order, labels, schedule, n: int):
    s = int(step[0]) % len(schedule)
    index = order[s * n : (s + 1) * n]
    return index, labels[index], schedule[s]


def end_step(values, now, totals, peaks, step):
    values = [float(v) if hasattr(v, "dtype") else 0.0 for v in values]
    xp, (_, _, *gammas) = array_module(totals), to_numpy(now).tolist()
    totals += xp.asarray(values)
    if not float(peaks.max()) > 10:
        ratios = [v * gamma / values[1] for v, gamma in zip(values[2:4], gammas, strict=True)]
        peaks[...] = xp.fmax(peaks, xp.asarray(ratios))
    step += 1


def crop_flip(images, index, top, left, flip, pad=4):
    xp, (n, (h, w)) = array_module(images), (len(index), images.shape[1:3])
    padded = xp.pad(images[index], ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    column = xp.arange(w)
    rows = top[:, None] + xp.arange(h)
    columns = left[:, None] + xp.where(flip[:, None], w - 1 - column, column)
    crop = padded[xp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crop * xp.float32(1 / 255)


def corners(words, shape, eps):
    xp, count = array_module(words), int(np.prod(shape))
    bits = ((words[:, None] >> xp.arange(64, dtype=xp.uint64)) & xp.uint64(1)).ravel()[:count]
    return (xp.float32(eps) * (1 - 2 * bits.astype(xp.float32))).reshape(shape)


def draw_corners(shape, eps, seed: int, step):
    words = rng.words(seed, rng.CORNERS, int(step[0]), -(-int(np.prod(shape)) // 64))
    return corners(array_module(step).asarray(words), shape, float(eps))


def draw_augmentation(n: int, seed: int, step):
    xp, draw = array_module(step), rng.generator(seed, rng.AUGMENT, int(step[0]))
    drawn = draw.integers(0, 9, n), draw.integers(0, 9, n), draw.random(n) < 0.5
    return tuple(xp.asarray(d.astype(np.int32)) for d in drawn)
