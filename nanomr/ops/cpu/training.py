"""The optimiser's pass, and what is drawn for a batch, on the CPU."""

import numpy as np
from numba import prange

from .flags import FLAGS, kernel
from .gather_gemm import threads
from .memory import empty

_ZERO = np.float32(0)


@kernel(parallel=True, **FLAGS)
def _sgd_update(w, g, velocity, lr, momentum, weight_decay, chunks):
    for t in prange(chunks):
        part = slice(len(w) * t // chunks, len(w) * (t + 1) // chunks)
        w_part, g_part, v_part = w[part], g[part], velocity[part]  # slices: see gather_gemm.place_image
        for i in range(len(w_part)):
            v = momentum * v_part[i] + (g_part[i] + weight_decay * w_part[i])
            v_part[i], w_part[i] = v, w_part[i] - lr * v


def sgd_update(w, g, velocity, lr, momentum, weight_decay):
    _sgd_update(w, g, velocity, *(np.float32(v) for v in (lr, momentum, weight_decay)), threads())


@kernel(parallel=True, **FLAGS)
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


@kernel(parallel=True, **FLAGS)
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


@kernel(parallel=True, **FLAGS)
def _crop_flip(images, index, top, left, flip, pad, channels, out):
    """Rows are W C numbers, of which ``first`` to ``last`` have a pixel behind them before the row is turned round."""
    n, height, width = out.shape
    scale = np.float32(1 / 255)
    for i in prange(n):
        shift = (left[i] - pad) * channels
        first, last = max(0, -shift), min(width, width - shift)
        for h in range(height):
            row, source = out[i, h], h + top[i] - pad
            if not 0 <= source < height or first >= last:
                row[:] = _ZERO
                continue
            pixels = images[index[i], source, first + shift : last + shift]
            inside = row[width - last : width - first] if flip[i] else row[first:last]
            row[: width - last if flip[i] else first] = _ZERO
            row[width - first if flip[i] else last :] = _ZERO
            if flip[i]:
                count = len(pixels) // channels
                for c in range(channels):
                    plane, into = pixels[c::channels], inside[c::channels]
                    for k in range(count):
                        into[count - 1 - k] = np.float32(plane[k]) * scale
            else:
                for k in range(len(pixels)):
                    inside[k] = np.float32(pixels[k]) * scale


def crop_flip(images, index, top, left, flip, pad=4):
    out = empty((len(index), *images.shape[1:]))
    rows = [np.ascontiguousarray(a).reshape(*a.shape[:2], a.shape[2] * a.shape[3]) for a in (images, out)]
    _crop_flip(rows[0], index, top, left, flip, pad, images.shape[3], rows[1])
    return out


@kernel(parallel=True, **FLAGS)
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
