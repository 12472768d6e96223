"""float32 on the CPU: Numba kernels. The same functions as ``reference``, which is their oracle.

Convolutions and linear layers are in ``gather_gemm``; here are the passes that touch each number once.
"""

import math

import numpy as np
from numba import njit, prange

from .gather_gemm import (  # noqa: F401  (offered from here)
    FLAGS,
    conv2d,
    conv2d_input_gradient,
    conv2d_shape,
    conv2d_weight_gradient,
    linear,
    linear_input_gradient,
    linear_weight_gradient,
    ready,
    threads,
)
from .memory import empty, release  # noqa: F401
from .reference import (  # noqa: F401
    average_pool,
    average_pool_backward,
    batchnorm,
    batchnorm_backward,
    batchnorm_parameter_gradient,
    batchnorm_statistics,
    scale_channels,
)

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


# --- attacks ----------------------------------------------------------------------------------------------------------

EXACT = {**FLAGS, "fastmath": False}  # a ball holds to the last bit


@njit(parallel=True, **EXACT)
def _linf_step(x, gradient, size, x0, eps, y):
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            g, low, high = gradient[i, j], x0[i, j] - eps, x0[i, j] + eps
            low, high = low if low > _ZERO else _ZERO, high if high < _ONE else _ONE
            moved = x[i, j] + size[i] * (_ONE if g > _ZERO else (-_ONE if g < _ZERO else g))  # NaN stays NaN
            moved = low if moved < low else moved
            y[i, j] = high if moved > high else moved


def linf_step(x, gradient, size, x0, eps):
    y = empty(x.shape)
    flat_x, flat_gradient, flat_x0, flat_y = _flat(x, gradient, x0, y)
    _linf_step(flat_x, flat_gradient, ready(size), flat_x0, np.float32(eps), flat_y)
    return y


@njit(parallel=True, **FLAGS)
def _plane_step(points, w, b, by_weight, d):
    for i in prange(len(points)):
        top, excess, total = _ZERO, 0.0, _ZERO
        for j in range(points.shape[1]):
            top = max(top, abs(w[i, j]))
        scale = np.float32(math.ldexp(1.0, min(-math.frexp(top)[1], 126)))
        for j in range(points.shape[1]):
            excess += np.float64(scale * w[i, j] * points[i, j])
        excess -= scale * b[i]
        scale = -scale if excess > 0 else scale
        for j in range(points.shape[1]):
            v = d[i, j] = scale * w[i, j]  # until the end, d holds the weights, positive where the way is up
            total += abs(v) * ((_ONE - points[i, j]) if v > _ZERO else points[i, j])
        need, t, moving = np.float32(abs(excess)), _ZERO, -1
        corner = total <= need
        while not corner:
            pace, reached, on = _ZERO, _ZERO, 0
            for j in range(points.shape[1]):
                v, weight = d[i, j], abs(d[i, j])
                room, rate = (_ONE - points[i, j]) if v > _ZERO else points[i, j], weight if by_weight else _ONE
                moves = weight * rate > _ZERO and t * rate < room
                pace += weight * rate if moves else _ZERO
                reached += _ZERO if moves else weight * room
                on += moves
            if on == moving:
                break
            moving, corner = on, on == 0
            if on and need - reached > t * pace:
                t = (need - reached) / pace
        for j in range(points.shape[1]):
            v = d[i, j]
            room, rate = (_ONE - points[i, j]) if v > _ZERO else points[i, j], abs(v) if by_weight else _ONE
            way = room if corner else min(t * rate, room)
            d[i, j] = way if v > _ZERO else (-way if v < _ZERO else _ZERO)


def plane_step(points, w, b, by_weight):
    d = empty(points.shape)
    flat_points, flat_w, flat_d = _flat(points, w, d)
    _plane_step(flat_points, flat_w, np.ascontiguousarray(b, np.float64), by_weight, flat_d)
    return d


# --- optimiser and data -----------------------------------------------------------------------------------------------


@njit(parallel=True, **FLAGS)
def _sgd_update(w, g, velocity, lr, momentum, weight_decay, chunks):
    for t in prange(chunks):
        for i in range(len(w) * t // chunks, len(w) * (t + 1) // chunks):
            velocity[i] = momentum * velocity[i] + (g[i] + weight_decay * w[i])
            w[i] -= lr * velocity[i]


def sgd_update(w, g, velocity, lr, momentum, weight_decay):
    _sgd_update(w, g, velocity, *(np.float32(v) for v in (lr, momentum, weight_decay)), threads())


@njit(parallel=True, **FLAGS)
def _crop_flip(images, index, top, left, flip, pad, out):
    n, height, width, channels = out.shape
    scale = np.float32(1 / 255)
    for i in prange(n):
        for h in range(height):
            source = h + top[i] - pad
            for w in range(width):
                column = (width - 1 - w if flip[i] else w) + left[i] - pad
                inside = 0 <= source < height and 0 <= column < width
                for c in range(channels):
                    out[i, h, w, c] = np.float32(images[index[i], source, column, c]) * scale if inside else _ZERO


def crop_flip(images, index, top, left, flip, pad=4):
    out = empty((len(index), *images.shape[1:]))
    _crop_flip(images, index, top, left, flip, pad, out)
    return out


@njit(parallel=True, **FLAGS)
def _corners(words, eps, rho):
    for k in prange(len(words)):
        word = words[k]
        for j in range(64 * k, min(64 * k + 64, len(rho))):
            rho[j] = -eps if word & np.uint64(1) else eps
            word >>= np.uint64(1)


def corners(words, shape, eps):
    rho = empty(shape)
    _corners(words, np.float32(eps), rho.reshape(-1))
    return rho
