"""The passes of the CPU that touch each number once: ReLU and the Hamming regulariser, pairs, pooling, conversions.

Each is written once for float32 and bfloat16: what is loaded is widened, what is stored is narrowed.
"""

import math

import numpy as np
from numba import prange

from .flags import FLAGS, kernel
from .memory import BFLOAT16, empty, numbers, ready
from .simd import narrow, widen

# --- ReLU and the Hamming regulariser ---------------------------------------------------------------------------------

_ZERO, _ONE, _EIGHT = np.float32(0), np.float32(1), np.float32(8)
# tanh(x) = x P(x^2) / Q(x^2) for |x| <= 8: a least-squares fit of relative error 7e-9, so that float32's rounding
# decides (3.4e-7); plain arithmetic, which LLVM turns into SIMD where libm's tanh is a call for each number.
_P = tuple(
    np.float32(v)
    for v in (
        0.9999999936323325,
        0.13444519612112016,
        0.003571623570895721,
        2.1895079306142738e-05,
        1.5230996862533344e-08,
    )
)
_Q = tuple(
    np.float32(v) for v in (0.46777846953670105, 0.02616454046641119, 0.00034113336282947087, 8.52268307981854e-07)
)


@kernel(inline="always", **{**FLAGS, "cache": False})
def _tanh(x):
    x = -_EIGHT if x < -_EIGHT else (_EIGHT if x > _EIGHT else x)
    s = x * x
    top = x * (_P[0] + s * (_P[1] + s * (_P[2] + s * (_P[3] + s * _P[4]))))
    return top / (_ONE + s * (_Q[0] + s * (_Q[1] + s * (_Q[2] + s * _Q[3]))))


@kernel(inline="always", **{**FLAGS, "cache": False})
def _max0(z):
    return _ZERO if z <= _ZERO else z  # NaN stays NaN


@kernel(parallel=True, **FLAGS)
def _relu(z, y):
    for i in prange(len(z)):
        for j in range(z.shape[1]):
            y[i, j] = narrow(_max0(widen(z[i, j])), y)


@kernel(parallel=True, **FLAGS)
def _relu_backward(dy, z, dz):
    for i in prange(len(z)):
        for j in range(z.shape[1]):
            dz[i, j] = narrow(widen(dy[i, j]) if widen(z[i, j]) > _ZERO else _ZERO, dz)


@kernel(parallel=True, **FLAGS)
def _relu_hamming(z, alpha, y, squares):
    n = len(squares)
    for i in prange(n):
        total = _ZERO
        for j in range(z.shape[1]):
            plus, minus = widen(z[n + i, j]), widen(z[2 * n + i, j])
            y[i, j] = narrow(_max0(widen(z[i, j])), y)
            y[n + i, j], y[2 * n + i, j] = narrow(_max0(plus), y), narrow(_max0(minus), y)
            d = _tanh(alpha * plus) - _tanh(alpha * minus)
            total += d * d
        squares[i] = total


@kernel(inline="always", **{**FLAGS, "cache": False})
def _relu_hamming_gradients(dy_plus, dy_minus, plus, minus, alpha, scale):
    """(dz+, dz-) of one pair."""
    t_plus, t_minus = _tanh(alpha * plus), _tanh(alpha * minus)
    d = scale * (t_plus - t_minus)
    d_plus = (dy_plus if plus > _ZERO else _ZERO) + d * (_ONE - t_plus * t_plus)
    return d_plus, (dy_minus if minus > _ZERO else _ZERO) - d * (_ONE - t_minus * t_minus)


@kernel(parallel=True, **FLAGS)
def _relu_hamming_backward(dy, z, alpha, weight, dz):
    n = len(weight)
    for i in prange(n):
        scale = weight[i]
        for j in range(z.shape[1]):
            dz[i, j] = narrow(widen(dy[i, j]) if widen(z[i, j]) > _ZERO else _ZERO, dz)
            d_plus, d_minus = _relu_hamming_gradients(
                widen(dy[n + i, j]), widen(dy[2 * n + i, j]), widen(z[n + i, j]), widen(z[2 * n + i, j]), alpha, scale
            )
            dz[n + i, j], dz[2 * n + i, j] = narrow(d_plus, dz), narrow(d_minus, dz)


@kernel(parallel=True, **FLAGS)
def _relu_hamming_pair(u, v, alpha, y, squares):
    n = len(squares)
    for i in prange(n):
        total = _ZERO
        for j in range(u.shape[1]):
            centre, difference = widen(u[i, j]), widen(v[i, j])
            plus, minus = centre + difference, centre - difference
            y[i, j] = narrow(_max0(centre), y)
            y[n + i, j], y[2 * n + i, j] = narrow(_max0(plus), y), narrow(_max0(minus), y)
            d = _tanh(alpha * plus) - _tanh(alpha * minus)
            total += d * d
        squares[i] = total


@kernel(parallel=True, **FLAGS)
def _relu_hamming_pair_backward(dy, u, v, alpha, weight, du, dv):
    n = len(weight)
    for i in prange(n):
        scale = weight[i]
        for j in range(u.shape[1]):
            centre, difference = widen(u[i, j]), widen(v[i, j])
            plus, minus = centre + difference, centre - difference
            d_plus, d_minus = _relu_hamming_gradients(
                widen(dy[n + i, j]), widen(dy[2 * n + i, j]), plus, minus, alpha, scale
            )
            d_centre = widen(dy[i, j]) if centre > _ZERO else _ZERO
            du[i, j], dv[i, j] = narrow(d_centre + d_plus + d_minus, du), narrow(d_plus - d_minus, dv)


def _flat(*arrays):
    """Arrays (N, ...) as contiguous (N, features). ValueError where their features differ."""
    if len({x.shape[1:] for x in arrays}) > 1:
        raise ValueError(f"shapes that do not fit: {', '.join(str(x.shape) for x in arrays)}")
    return [numbers(x).reshape(len(x), math.prod(x.shape[1:])) for x in arrays]


def relu(z):
    y = empty(z.shape, z.dtype)
    _relu(*_flat(z, y))
    return y


def per_sample(weight, rows):
    """``weight``, float32, one for each of the N samples of a 3N batch of so many rows. ValueError otherwise."""
    if rows % 3 or weight.shape != (rows // 3,):
        raise ValueError(f"weight {weight.shape} does not fit [z; z+; z-] of {rows} rows: a third as many are wanted")
    return ready(weight)


def _same(dy, z):
    """ValueError unless the two have one shape."""
    if dy.shape != z.shape:
        raise ValueError(f"dy {dy.shape} does not fit: {z.shape} is wanted")


def relu_backward(dy, z):
    _same(dy, z)
    dz = empty(z.shape, z.dtype)
    _relu_backward(*_flat(dy, z, dz))
    return dz


def relu_hamming(z, alpha):
    y, squares = empty(z.shape, z.dtype), np.empty(len(z) // 3, np.float32)
    flat_z, flat_y = _flat(z, y)
    _relu_hamming(flat_z, np.float32(alpha), flat_y, squares)
    return y, squares


def relu_hamming_backward(dy, z, alpha, weight):
    _same(dy, z)
    dz = empty(z.shape, z.dtype)
    flat_dy, flat_z, flat_dz = _flat(dy, z, dz)
    _relu_hamming_backward(flat_dy, flat_z, np.float32(alpha), per_sample(weight, len(z)), flat_dz)
    return dz


def relu_hamming_pair(u, v, alpha):
    _same(u, v)
    y, squares = empty((3 * len(u), *u.shape[1:]), u.dtype), np.empty(len(u), np.float32)
    flat_u, flat_v, flat_y = _flat(u, v, y)
    _relu_hamming_pair(flat_u, flat_v, np.float32(alpha), flat_y, squares)
    return y, squares


def relu_hamming_pair_backward(dy, u, v, alpha, weight):
    _same(u, v)
    du, dv = empty(u.shape, u.dtype), empty(v.shape, v.dtype)
    flat_dy, flat_u, flat_v, flat_du, flat_dv = _flat(dy, u, v, du, dv)
    weight = per_sample(weight, len(dy))
    _relu_hamming_pair_backward(flat_dy, flat_u, flat_v, np.float32(alpha), weight, flat_du, flat_dv)
    return du, dv


# --- pairs, pooling, conversions --------------------------------------------------------------------------------------


@kernel(parallel=True, **FLAGS)
def _expand_pair(u, v, y):
    n = len(u)
    for i in prange(n):
        for j in range(u.shape[1]):
            centre, difference = widen(u[i, j]), widen(v[i, j])
            y[i, j] = u[i, j]
            y[n + i, j], y[2 * n + i, j] = narrow(centre + difference, y), narrow(centre - difference, y)


def expand_pair(u, v):
    _same(u, v)
    y = empty((3 * len(u), *u.shape[1:]), u.dtype)
    _expand_pair(*_flat(u, v, y))
    return y


@kernel(parallel=True, **FLAGS)
def _contract_pair(dy, du, dv):
    n = len(du)
    for i in prange(n):
        for j in range(du.shape[1]):
            plus, minus = widen(dy[n + i, j]), widen(dy[2 * n + i, j])
            du[i, j], dv[i, j] = narrow(widen(dy[i, j]) + plus + minus, du), narrow(plus - minus, dv)


def contract_pair(dy):
    shape = (len(dy) // 3, *dy.shape[1:])
    du, dv = empty(shape, dy.dtype), empty(shape, dy.dtype)
    _contract_pair(*_flat(dy, du, dv))
    return du, dv


@kernel(parallel=True, **FLAGS)
def _average_pool(x, window, y):
    """x (N, H, W, C), y (N, H / window, W / window, C)."""
    scale = np.float32(1 / (window * window))
    for i in prange(len(x)):
        sums = np.empty(x.shape[3], np.float32)
        for h in range(y.shape[1]):
            for w in range(y.shape[2]):
                sums[:] = _ZERO
                for k in range(window * window):
                    pixel = x[i, h * window + k // window, w * window + k % window]
                    for c in range(len(sums)):
                        sums[c] += widen(pixel[c])
                for c in range(len(sums)):
                    y[i, h, w, c] = narrow(sums[c] * scale, y)


def average_pool(x, window):
    n, h, w, c = x.shape
    y = empty((n, h // window, w // window, c), x.dtype)
    _average_pool(numbers(x), window, numbers(y))
    return y


@kernel(parallel=True, **FLAGS)
def _average_pool_backward(dy, window, dx):
    scale = np.float32(1 / (window * window))
    for i in prange(len(dx)):
        for h in range(dx.shape[1]):
            for w in range(dx.shape[2]):
                for c in range(dx.shape[3]):
                    dx[i, h, w, c] = narrow(widen(dy[i, h // window, w // window, c]) * scale, dx)


def average_pool_backward(dy, window):
    n, h, w, c = dy.shape
    dx = empty((n, h * window, w * window, c), dy.dtype)
    _average_pool_backward(numbers(dy), window, numbers(dx))
    return dx


@kernel(parallel=True, **FLAGS)
def _cast(x, y):
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            y[i, j] = narrow(widen(x[i, j]), y)


def cast(x, dtype):
    """``x`` (float32 or bfloat16) in the other of the two, or as it is; other dtypes as NumPy converts them."""
    if x.dtype == dtype or dtype not in (np.float32, BFLOAT16) or not x.ndim:
        return x.astype(dtype, copy=False)
    y = empty(x.shape, dtype)
    _cast(*_flat(x, y))
    return y


@kernel(parallel=True, **FLAGS)
def _scale_shift(x, scale, shift, y):
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            y[i, j] = narrow(widen(x[i, j]) * scale[j] + shift[j], y)


def normalize(x, mean, std):
    n, h, w, c = x.shape
    y, scale, shift = empty(x.shape, x.dtype), np.empty((w, c), np.float32), np.zeros((w, c), np.float32)
    scale[...] = 1 / std
    if mean is not None:
        shift -= mean * scale
    rows = (n * h, w * c)
    _scale_shift(numbers(x).reshape(rows), scale.reshape(-1), shift.reshape(-1), numbers(y).reshape(rows))
    return y
