"""Batch norm on the CPU, with the ReLU behind it and the Hamming regulariser: ``docs/derivations/batchnorm.md``.

Forward: one pass for the statistics, one for everything else. Backward: one for the sums by channel, one for dx; the
gradient between ReLU and normalisation is computed in both, and never stored. Each kernel is written once for float32
and bfloat16 pictures; what belongs to channels is float32, and sums over the batch are float64.
"""

import numpy as np
from numba import prange

from .elementwise import _max0, _relu_hamming_gradients, _tanh, per_sample
from .flags import FLAGS, kernel
from .memory import empty, numbers
from .simd import narrow, widen

BLOCKS = 32  # parts of the batch with sums of their own: fixed, so that the number of threads decides nothing
_ZERO = np.float32(0)


def _rows(*arrays):
    """Arrays (N, ..., W, C) as (N, rows, W C). ValueError where their shapes differ."""
    if len({x.shape for x in arrays}) > 1:
        raise ValueError(f"shapes that do not fit: {', '.join(str(x.shape) for x in arrays)}")
    return [numbers(x).reshape(len(x), -1, *_row(x)) for x in arrays]


def _row(x):
    """The length of a row, which has all channels of a few pixels: long enough for SIMD."""
    return (x.shape[-1] * (x.shape[-2] if x.ndim > 2 else 1),)


def _along(x, *channels):
    """Values by channel, float32, repeated along a row of x; None: zeros."""
    c = x.shape[-1]
    rows = np.zeros((len(channels), _row(x)[0] // c, c), np.float32)
    for row, values in zip(rows, channels, strict=True):
        if values is not None:
            row[...] = values
    return rows.reshape(len(channels), -1)


def _parts(x):
    """Room for two sums by channel, float64, of each part of a batch."""
    return np.zeros((max(1, min(BLOCKS, len(x))), 2, x.shape[-1]))


@kernel(inline="always", **{**FLAGS, "cache": False})
def sum_up(first, second, part):
    """The two sums of an image along a row are added to those by channel."""
    channels = part.shape[1]
    for p in range(0, len(first), channels):
        one, two = first[p : p + channels], second[p : p + channels]
        for c in range(channels):
            part[0, c] += one[c]
            part[1, c] += two[c]


@kernel(parallel=True, **FLAGS)
def _moments(x, shift, parts):
    """parts[t] = sums of x - shift and of its square, x (N, rows, row), over part t of the batch."""
    blocks, row = len(parts), x.shape[2]
    for t in prange(blocks):
        first, second = np.empty(row, np.float32), np.empty(row, np.float32)
        for n in range(len(x) * t // blocks, len(x) * (t + 1) // blocks):
            first[:], second[:] = _ZERO, _ZERO
            for h in range(x.shape[1]):
                for j in range(row):
                    d = widen(x[n, h, j]) - shift[j]
                    first[j] += d
                    second[j] += d * d
            sum_up(first, second, parts[t])


def batchnorm_statistics(x):
    shift = x[(0,) * (x.ndim - 1)].astype(np.float32)  # some value of each channel: what is summed up has no large mean
    parts, m = _parts(x), x.size // x.shape[-1]
    _moments(*_rows(x), *_along(x, shift), parts)
    first, second = parts.sum(0) / m
    return (shift + first).astype(np.float32), np.maximum(second - first * first, 0).astype(np.float32)


@kernel(parallel=True, **FLAGS)
def _activate(x, mean, scale, shift, is_relu, plus, y):
    for n in prange(len(x)):
        for h in range(x.shape[1]):
            for j in range(x.shape[2]):
                v = (widen(x[n, h, j]) - mean[j]) * scale[j] + shift[j]
                more = widen(plus[n, h, j]) if len(plus) else _ZERO
                y[n, h, j] = narrow((_max0(v) if is_relu else v) + more, y)


@kernel(parallel=True, **FLAGS)
def _activate_hamming(x, mean, scale, shift, alpha, y, squares):
    count = len(squares)
    for n in prange(count):
        total = 0.0
        for h in range(x.shape[1]):
            of_row = _ZERO
            for j in range(x.shape[2]):
                centre = (widen(x[n, h, j]) - mean[j]) * scale[j] + shift[j]
                plus = (widen(x[count + n, h, j]) - mean[j]) * scale[j] + shift[j]
                minus = (widen(x[2 * count + n, h, j]) - mean[j]) * scale[j] + shift[j]
                y[n, h, j] = narrow(_max0(centre), y)
                y[count + n, h, j] = narrow(_max0(plus), y)
                y[2 * count + n, h, j] = narrow(_max0(minus), y)
                d = _tanh(alpha * plus) - _tanh(alpha * minus)
                of_row += d * d
            total += of_row
        squares[n] = total


def _normalized(x, gamma, beta, mean, inv_std, is_relu, plus=None):
    y = empty(x.shape, x.dtype)
    rows, y_rows, plus_rows = _rows(x, y, y if plus is None else plus.astype(x.dtype, copy=False))
    plus_rows = plus_rows[: 0 if plus is None else None]
    _activate(rows, *_along(x, mean, inv_std * gamma, beta), is_relu, plus_rows, y_rows)
    return y


def batchnorm(x, gamma, beta, mean, inv_std):
    return _normalized(x, gamma, beta, mean, inv_std, False)


def scale_channels(x, by, plus=None):
    return _normalized(x, np.float32(1), None, None, by, False, plus)


def batchnorm_relu(x, gamma, beta, mean, inv_std):
    return _normalized(x, gamma, beta, mean, inv_std, True)


def batchnorm_relu_hamming(x, gamma, beta, mean, inv_std, alpha):
    y, squares = empty(x.shape, x.dtype), np.empty(len(x) // 3, np.float32)
    rows, y_rows = _rows(x, y)
    _activate_hamming(rows, *_along(x, mean, inv_std * gamma, beta), np.float32(alpha), y_rows, squares)
    return y, squares


# --- backward ---------------------------------------------------------------------------------------------------------


@kernel(parallel=True, **FLAGS)
def _channel_gradients(dy, x, mean, scale, shift, is_relu, parts):
    """parts[t] = sums of dz (x - mean) and of dz over part t of the batch, dz being the gradient before ReLU."""
    blocks, row = len(parts), x.shape[2]
    for t in prange(blocks):
        first, second = np.empty(row, np.float32), np.empty(row, np.float32)
        for n in range(len(x) * t // blocks, len(x) * (t + 1) // blocks):
            first[:], second[:] = _ZERO, _ZERO
            for h in range(x.shape[1]):
                for j in range(row):
                    d, dz = widen(x[n, h, j]) - mean[j], widen(dy[n, h, j])
                    dz = dz if not is_relu or d * scale[j] + shift[j] > _ZERO else _ZERO
                    first[j] += dz * d
                    second[j] += dz
            sum_up(first, second, parts[t])


@kernel(parallel=True, **FLAGS)
def _channel_gradients_hamming(dy, x, mean, scale, shift, alpha, weight, parts):
    blocks, row, count = len(parts), x.shape[2], len(weight)
    for t in prange(blocks):
        first, second = np.empty(row, np.float32), np.empty(row, np.float32)
        for n in range(count * t // blocks, count * (t + 1) // blocks):
            first[:], second[:] = _ZERO, _ZERO
            for h in range(x.shape[1]):
                for j in range(row):
                    d = widen(x[n, h, j]) - mean[j]
                    d_plus, d_minus = widen(x[count + n, h, j]) - mean[j], widen(x[2 * count + n, h, j]) - mean[j]
                    dz = widen(dy[n, h, j]) if d * scale[j] + shift[j] > _ZERO else _ZERO
                    dz_plus, dz_minus = _relu_hamming_gradients(
                        widen(dy[count + n, h, j]), widen(dy[2 * count + n, h, j]),
                        d_plus * scale[j] + shift[j], d_minus * scale[j] + shift[j], alpha, weight[n],
                    )  # fmt: skip
                    first[j] += dz * d + dz_plus * d_plus + dz_minus * d_minus
                    second[j] += dz + dz_plus + dz_minus
            sum_up(first, second, parts[t])


@kernel(parallel=True, **FLAGS)
def _normalize_backward(dy, x, mean, scale, shift, slope, offset, is_relu, plus, dx):
    """dx = scale dz - slope (x - mean) - offset, plus ``plus``."""
    for n in prange(len(x)):
        for h in range(x.shape[1]):
            for j in range(x.shape[2]):
                d, dz = widen(x[n, h, j]) - mean[j], widen(dy[n, h, j])
                dz = dz if not is_relu or d * scale[j] + shift[j] > _ZERO else _ZERO
                more = widen(plus[n, h, j]) if len(plus) else _ZERO
                dx[n, h, j] = narrow(dz * scale[j] - d * slope[j] - offset[j] + more, dx)


@kernel(parallel=True, **FLAGS)
def _normalize_backward_hamming(dy, x, mean, scale, shift, slope, offset, alpha, weight, plus, dx):
    count = len(weight)
    for n in prange(count):
        for h in range(x.shape[1]):
            for j in range(x.shape[2]):
                d = widen(x[n, h, j]) - mean[j]
                d_plus, d_minus = widen(x[count + n, h, j]) - mean[j], widen(x[2 * count + n, h, j]) - mean[j]
                dz = widen(dy[n, h, j]) if d * scale[j] + shift[j] > _ZERO else _ZERO
                dz_plus, dz_minus = _relu_hamming_gradients(
                    widen(dy[count + n, h, j]), widen(dy[2 * count + n, h, j]),
                    d_plus * scale[j] + shift[j], d_minus * scale[j] + shift[j], alpha, weight[n],
                )  # fmt: skip
                more, more_plus, more_minus = _ZERO, _ZERO, _ZERO
                if len(plus):
                    more, more_plus = widen(plus[n, h, j]), widen(plus[count + n, h, j])
                    more_minus = widen(plus[2 * count + n, h, j])
                dx[n, h, j] = narrow(dz * scale[j] - d * slope[j] - offset[j] + more, dx)
                dx[count + n, h, j] = narrow(dz_plus * scale[j] - d_plus * slope[j] - offset[j] + more_plus, dx)
                dx[2 * count + n, h, j] = narrow(dz_minus * scale[j] - d_minus * slope[j] - offset[j] + more_minus, dx)


def _parameter_gradient(dy, x, mean, scale, beta, inv_std, is_relu, alpha=None, weight=None):
    parts, channels = _parts(x), _along(x, mean, scale, beta)
    if alpha is None:
        _channel_gradients(*_rows(dy, x), *channels, is_relu, parts)
    else:
        _channel_gradients_hamming(*_rows(dy, x), *channels, np.float32(alpha), per_sample(weight, len(x)), parts)
    dgamma, dbeta = parts.sum(0)
    return (dgamma * inv_std).astype(np.float32), dbeta.astype(np.float32)


def _input_gradient(dy, x, mean, scale, beta, slope, offset, is_relu, plus, alpha=None, weight=None):
    dx = empty(x.shape, x.dtype)
    dy_rows, x_rows, dx_rows, plus_rows = _rows(dy, x, dx, dx if plus is None else plus.astype(x.dtype, copy=False))
    plus_rows = plus_rows[: 0 if plus is None else None]
    channels = _along(x, mean, scale, beta, slope, offset)
    if alpha is None:
        _normalize_backward(dy_rows, x_rows, *channels, is_relu, plus_rows, dx_rows)
    else:
        sizes = np.float32(alpha), per_sample(weight, len(x))
        _normalize_backward_hamming(dy_rows, x_rows, *channels, *sizes, plus_rows, dx_rows)
    return dx


def _slopes(x, scale, inv_std, dgamma, dbeta):
    """How dx depends on x - mean and on nothing, as mean and variance move with x."""
    m = x.size // x.shape[-1]
    return scale * inv_std * dgamma * np.float32(1 / m), scale * dbeta * np.float32(1 / m)


def batchnorm_parameter_gradient(dy, x, mean, inv_std):
    return _parameter_gradient(dy, x, mean, None, None, inv_std, False)


def batchnorm_backward(dy, x, gamma, mean, inv_std, dgamma, dbeta, plus=None):
    scale = gamma * inv_std
    return _input_gradient(dy, x, mean, scale, None, *_slopes(x, scale, inv_std, dgamma, dbeta), False, plus)


def batchnorm_relu_backward(
    dy, x, gamma, beta, mean, inv_std, alpha=None, weight=None, plus=None, train=True, into=None, over=None
):
    scale = gamma * inv_std
    dgamma = dbeta = None
    if train or into is not None:
        dgamma, dbeta = _parameter_gradient(dy, x, mean, scale, beta, inv_std, True, alpha, weight)
        for total, gradient in zip(into or (), (dgamma, dbeta), strict=False):
            total += gradient
    moves = over(dgamma, dbeta) if over and train else (dgamma, dbeta)
    slopes = _slopes(x, scale, inv_std, *moves) if train else (None, None)
    return _input_gradient(dy, x, mean, scale, beta, *slopes, True, plus, alpha, weight), dgamma, dbeta
