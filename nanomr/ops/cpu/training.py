"""The optimiser's pass, and what is drawn for a batch, on the CPU."""

import numpy as np
from numba import njit, prange

from .flags import FLAGS
from .gather_gemm import threads
from .memory import empty

_ZERO = np.float32(0)


@njit(parallel=True, **FLAGS)
def _sgd_update(w, g, velocity, lr, momentum, weight_decay, chunks):
    for t in prange(chunks):
        part = slice(len(w) * t // chunks, len(w) * (t + 1) // chunks)
        w_part, g_part, v_part = w[part], g[part], velocity[part]  # slices: see gather_gemm.place_image
        for i in range(len(w_part)):
            v = momentum * v_part[i] + (g_part[i] + weight_decay * w_part[i])
            v_part[i], w_part[i] = v, w_part[i] - lr * v


def sgd_update(w, g, velocity, lr, momentum, weight_decay):
    _sgd_update(w, g, velocity, *(np.float32(v) for v in (lr, momentum, weight_decay)), threads())


@njit(parallel=True, **FLAGS)
def _adamw_update(w, g, mean, square, keep, take1, take2, rate, debias, eps, chunks):
    for t in prange(chunks):
        part = slice(len(w) * t // chunks, len(w) * (t + 1) // chunks)
        w_part, g_part, mean_part, square_part = w[part], g[part], mean[part], square[part]
        for i in range(len(w_part)):
            m = mean_part[i] + take1 * (g_part[i] - mean_part[i])
            s = square_part[i] + take2 * (g_part[i] * g_part[i] - square_part[i])
            mean_part[i], square_part[i] = m, s
            w_part[i] = keep * w_part[i] - rate * m / (np.sqrt(s * debias) + eps)


def adamw_update(w, g, mean, square, t, lr, beta1, beta2, weight_decay, eps=1e-8):
    scalars = 1 - lr * weight_decay, 1 - beta1, 1 - beta2, lr / (1 - beta1**t), 1 / (1 - beta2**t), eps
    _adamw_update(w, g, mean, square, *(np.float32(v) for v in scalars), threads())


@njit(parallel=True, **FLAGS)
def _sum_squares(x, partial):
    for t in prange(len(partial)):
        total, part = _ZERO, x[len(x) * t // len(partial) : len(x) * (t + 1) // len(partial)]
        for i in range(len(part)):
            total += part[i] * part[i]
        partial[t] = total


def norm(x):
    partial = np.empty(64, np.float32)  # not a dot product of BLAS, whose threads may decide how it is summed
    _sum_squares(x, partial)
    return np.float32(partial.sum(dtype=np.float64) ** 0.5)


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
