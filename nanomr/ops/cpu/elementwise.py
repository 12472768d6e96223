"""The passes of the CPU that touch each number once: ReLU and the Hamming regulariser, pairs, input normalisation."""

import math

import numpy as np
from numba import njit, prange

from .gather_gemm import FLAGS
from .memory import empty, ready

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


@njit(inline="always", **{**FLAGS, "cache": False})
def _tanh(x):
    x = -_EIGHT if x < -_EIGHT else (_EIGHT if x > _EIGHT else x)
    s = x * x
    top = x * (_P[0] + s * (_P[1] + s * (_P[2] + s * (_P[3] + s * _P[4]))))
    return top / (_ONE + s * (_Q[0] + s * (_Q[1] + s * (_Q[2] + s * _Q[3]))))


@njit(inline="always", **{**FLAGS, "cache": False})
def _max0(z):
    return _ZERO if z <= _ZERO else z  # NaN stays NaN


@njit(parallel=True, **FLAGS)
def _relu(z, y):
    for i in prange(len(z)):
        for j in range(z.shape[1]):
            y[i, j] = _max0(z[i, j])


@njit(parallel=True, **FLAGS)
def _relu_backward(dy, z, dz):
    for i in prange(len(z)):
        for j in range(z.shape[1]):
            dz[i, j] = dy[i, j] if z[i, j] > _ZERO else _ZERO


@njit(parallel=True, **FLAGS)
def _relu_hamming(z, alpha, y, squares):
    n = len(squares)
    for i in prange(n):
        total = _ZERO
        for j in range(z.shape[1]):
            plus, minus = z[n + i, j], z[2 * n + i, j]
            y[i, j], y[n + i, j], y[2 * n + i, j] = _max0(z[i, j]), _max0(plus), _max0(minus)
            d = _tanh(alpha * plus) - _tanh(alpha * minus)
            total += d * d
        squares[i] = total


@njit(parallel=True, **FLAGS)
def _relu_hamming_backward(dy, z, alpha, weight, dz):
    n = len(weight)
    for i in prange(n):
        scale = weight[i]
        for j in range(z.shape[1]):
            plus, minus = z[n + i, j], z[2 * n + i, j]
            t_plus, t_minus = _tanh(alpha * plus), _tanh(alpha * minus)
            d = scale * (t_plus - t_minus)
            dz[i, j] = dy[i, j] if z[i, j] > _ZERO else _ZERO
            dz[n + i, j] = (dy[n + i, j] if plus > _ZERO else _ZERO) + d * (_ONE - t_plus * t_plus)
            dz[2 * n + i, j] = (dy[2 * n + i, j] if minus > _ZERO else _ZERO) - d * (_ONE - t_minus * t_minus)


@njit(parallel=True, **FLAGS)
def _relu_hamming_pair(u, v, alpha, y, squares):
    n = len(squares)
    for i in prange(n):
        total = _ZERO
        for j in range(u.shape[1]):
            plus, minus = u[i, j] + v[i, j], u[i, j] - v[i, j]
            y[i, j], y[n + i, j], y[2 * n + i, j] = _max0(u[i, j]), _max0(plus), _max0(minus)
            d = _tanh(alpha * plus) - _tanh(alpha * minus)
            total += d * d
        squares[i] = total


@njit(parallel=True, **FLAGS)
def _relu_hamming_pair_backward(dy, u, v, alpha, weight, du, dv):
    n = len(weight)
    for i in prange(n):
        scale = weight[i]
        for j in range(u.shape[1]):
            plus, minus = u[i, j] + v[i, j], u[i, j] - v[i, j]
            t_plus, t_minus = _tanh(alpha * plus), _tanh(alpha * minus)
            d = scale * (t_plus - t_minus)
            d_plus = (dy[n + i, j] if plus > _ZERO else _ZERO) + d * (_ONE - t_plus * t_plus)
            d_minus = (dy[2 * n + i, j] if minus > _ZERO else _ZERO) - d * (_ONE - t_minus * t_minus)
            du[i, j] = (dy[i, j] if u[i, j] > _ZERO else _ZERO) + d_plus + d_minus
            dv[i, j] = d_plus - d_minus


def _flat(*arrays):
    """Arrays (N, ...) as contiguous (N, features)."""
    return [ready(x).reshape(len(x), math.prod(x.shape[1:])) for x in arrays]


def relu(z):
    y = empty(z.shape)
    _relu(*_flat(z, y))
    return y


def relu_backward(dy, z):
    dz = empty(z.shape)
    _relu_backward(*_flat(dy, z, dz))
    return dz


def relu_hamming(z, alpha):
    y, squares = empty(z.shape), np.empty(len(z) // 3, np.float32)
    flat_z, flat_y = _flat(z, y)
    _relu_hamming(flat_z, np.float32(alpha), flat_y, squares)
    return y, squares


def relu_hamming_backward(dy, z, alpha, weight):
    dz = empty(z.shape)
    flat_dy, flat_z, flat_dz = _flat(dy, z, dz)
    _relu_hamming_backward(flat_dy, flat_z, np.float32(alpha), ready(weight), flat_dz)
    return dz


def relu_hamming_pair(u, v, alpha):
    y, squares = empty((3 * len(u), *u.shape[1:])), np.empty(len(u), np.float32)
    flat_u, flat_v, flat_y = _flat(u, v, y)
    _relu_hamming_pair(flat_u, flat_v, np.float32(alpha), flat_y, squares)
    return y, squares


def relu_hamming_pair_backward(dy, u, v, alpha, weight):
    du, dv = empty(u.shape), empty(v.shape)
    flat_dy, flat_u, flat_v, flat_du, flat_dv = _flat(dy, u, v, du, dv)
    _relu_hamming_pair_backward(flat_dy, flat_u, flat_v, np.float32(alpha), ready(weight), flat_du, flat_dv)
    return du, dv


def expand_pair(u, v):
    n = len(u)
    y = empty((3 * n, *u.shape[1:]))
    y[:n] = u
    np.add(u, v, out=y[n : 2 * n])
    np.subtract(u, v, out=y[2 * n :])
    return y


def contract_pair(dy):
    centre, plus, minus = np.split(dy, 3)
    du, dv = empty(centre.shape), empty(centre.shape)
    np.add(plus, minus, out=du)
    du += centre
    return du, np.subtract(plus, minus, out=dv)


@njit(parallel=True, **FLAGS)
def _scale_shift(x, scale, shift, y):
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] * scale[j] + shift[j]


def normalize(x, mean, std):
    n, h, w, c = x.shape
    y, scale, shift = empty(x.shape), np.empty((w, c), np.float32), np.zeros((w, c), np.float32)
    scale[...] = 1 / std
    if mean is not None:
        shift -= mean * scale
    _scale_shift(ready(x).reshape(n * h, w * c), scale.reshape(-1), shift.reshape(-1), y.reshape(n * h, w * c))
    return y
