"""Boxes c - r to c + r: those around images, their ReLU, its transpose, the sums that interval training watches, and
all of that behind a batch norm, whose own result is computed on the way and never stored.

``points`` (N, ...) = c, or (2N, ...) = [x; c] with images x that are no boxes; ``radius`` (N, ...) = r.
"""

import numpy as np
from numba import prange

from .elementwise import _ONE, _ZERO, _flat, _max0
from .flags import FLAGS, kernel
from .memory import can_be_written, empty, ready
from .normalization import _along, _parts, _rows, _slopes, sum_up
from .simd import narrow, widen

_HALF = np.float32(0.5)


@kernel(parallel=True, **FLAGS)
def _box_around(x, eps, scale, shift, points, radius, sums):
    """scale times the box around x, plus shift, all (N, rows, row); and the sums of its radii."""
    n = len(x)
    for i in prange(n):
        total = _ZERO
        for h in range(x.shape[1]):
            of_row = _ZERO
            for j in range(x.shape[2]):
                value = widen(x[i, h, j])
                low, high = value - eps, value + eps
                low, high = _ZERO if low < _ZERO else low, _ONE if high > _ONE else high
                r = _HALF * (high - low) * abs(scale[j])
                points[i, h, j] = narrow(value * scale[j] + shift[j], points)
                points[n + i, h, j] = narrow(_HALF * (low + high) * scale[j] + shift[j], points)
                radius[i, h, j] = narrow(r, radius)
                of_row += r
            total += of_row
        sums[i] = total


@kernel(parallel=True, **FLAGS)
def _relu_box(points, radius, y, out):
    n = len(radius)
    k = len(points) - n
    for i in prange(n):
        if k:
            for j in range(points.shape[1]):
                y[i, j] = narrow(_max0(widen(points[i, j])), y)
        for j in range(points.shape[1]):
            c, r = widen(points[k + i, j]), widen(radius[i, j])
            low, high = _max0(c - r), _max0(c + r)
            y[k + i, j], out[i, j] = narrow(_HALF * (low + high), y), narrow(_HALF * (high - low), out)


@kernel(parallel=True, **FLAGS)
def _box_sums(points, radius, sums):
    n = len(radius)
    k = len(points) - n
    for i in prange(n):
        on = off = on1 = on2 = off1 = off2 = every = size = 0.0
        for j in range(points.shape[1]):
            c, r = widen(points[k + i, j]), widen(radius[i, j])
            wide = np.float64(c)
            one = 1.0 if c - r > _ZERO else 0.0
            two = 1.0 if c + r < _ZERO else 0.0
            on, on1, on2 = on + one, on1 + one * wide, on2 + one * wide * wide
            off, off1, off2 = off + two, off1 + two * wide, off2 + two * wide * wide
            every, size = every + wide, size + r
        row = sums[i]
        row[0], row[1], row[2], row[3] = on, on1, on2, off
        row[4], row[5], row[6], row[7] = off1, off2, every, size


@kernel(inline="always", **{**FLAGS, "cache": False})
def _ends_backward(dc, dd, c, r, gains):
    """The gradient by c and by r, from those (dc, dd) by the centre and radius of the ReLU of c - r to c + r."""
    on0, on1, off0, off1, every, grown = gains
    high = _HALF * (dc + dd) if c + r > _ZERO else _ZERO
    low = _HALF * (dc - dd) if c - r > _ZERO else _ZERO
    of_sums = (on0 + on1 * c if c - r > _ZERO else _ZERO) + (off0 + off1 * c if c + r < _ZERO else _ZERO)
    return low + high + (every + of_sums), high - low + grown


@kernel(parallel=True, **FLAGS)
def _relu_box_backward(dpoints, dradius, points, radius, gains, dp, dr):
    n = len(radius)
    k = len(points) - n
    for i in prange(n):
        if k:
            for j in range(points.shape[1]):
                dp[i, j] = narrow(widen(dpoints[i, j]) if widen(points[i, j]) > _ZERO else _ZERO, dp)
        for j in range(points.shape[1]):
            dc, dd = widen(dpoints[k + i, j]), widen(dradius[i, j])
            at_c, at_r = _ends_backward(dc, dd, widen(points[k + i, j]), widen(radius[i, j]), gains)
            dp[k + i, j], dr[i, j] = narrow(at_c, dp), narrow(at_r, dr)


@kernel(parallel=True, **FLAGS)
def _batchnorm_relu_box(points, radius, mean, scale, shift, y, out, sums):
    """:func:`_relu_box` of scale (points - mean) + shift and |scale| radius, all (N, rows, row); and its sums."""
    n, row = len(radius), radius.shape[2]
    k = len(points) - n
    for i in prange(n):
        total = np.zeros(8)
        for h in range(radius.shape[1]):
            if k:
                for j in range(row):
                    y[i, h, j] = narrow(_max0((widen(points[i, h, j]) - mean[j]) * scale[j] + shift[j]), y)
            on = off = on1 = on2 = off1 = off2 = every = size = _ZERO
            for j in range(row):
                c = (widen(points[k + i, h, j]) - mean[j]) * scale[j] + shift[j]
                r = widen(radius[i, h, j]) * abs(scale[j])
                low, high = _max0(c - r), _max0(c + r)
                y[k + i, h, j] = narrow(_HALF * (low + high), y)
                out[i, h, j] = narrow(_HALF * (high - low), out)
                one = _ONE if c - r > _ZERO else _ZERO
                two = _ONE if c + r < _ZERO else _ZERO
                on, on1, on2 = on + one, on1 + one * c, on2 + one * c * c
                off, off1, off2 = off + two, off1 + two * c, off2 + two * c * c
                every, size = every + c, size + r
            total[0], total[1], total[2], total[3] = total[0] + on, total[1] + on1, total[2] + on2, total[3] + off
            total[4], total[5], total[6], total[7] = total[4] + off1, total[5] + off2, total[6] + every, total[7] + size
        sums[i] = total


@kernel(parallel=True, **FLAGS)
def _box_channel_gradients(dpoints, dradius, points, radius, mean, scale, shift, gains, parts):
    """parts[t] = over part t of the batch, the sums of dz (z - mean) and dz as in ``normalization``, of all points, and
    with those of the radii, whose gradients have the sign of the scale."""
    blocks, row, n = len(parts), radius.shape[2], len(radius)
    k = len(points) - n
    for t in prange(blocks):
        first, second = np.empty(row, np.float32), np.empty(row, np.float32)
        for i in range(n * t // blocks, n * (t + 1) // blocks):
            first[:], second[:] = _ZERO, _ZERO
            for h in range(radius.shape[1]):
                if k:
                    for j in range(row):
                        d, dz = widen(points[i, h, j]) - mean[j], widen(dpoints[i, h, j])
                        dz = dz if d * scale[j] + shift[j] > _ZERO else _ZERO
                        first[j] += dz * d
                        second[j] += dz
                for j in range(row):
                    d, size = widen(points[k + i, h, j]) - mean[j], widen(radius[i, h, j])
                    dc, dd = widen(dpoints[k + i, h, j]), widen(dradius[i, h, j])
                    c, r = d * scale[j] + shift[j], size * abs(scale[j])
                    at_c, at_r = _ends_backward(dc, dd, c, r, gains)
                    sign = _ONE if scale[j] > _ZERO else (-_ONE if scale[j] < _ZERO else _ZERO)
                    first[j] += at_c * d + sign * at_r * size
                    second[j] += at_c
            sum_up(first, second, parts[t])


@kernel(inline="always", **{**FLAGS, "cache": False})
def _image_backward(i, dpoints, dradius, points, radius, mean, scale, shift, slope, offset, gains, dp, dr):
    """scale times the gradient before the ReLU, and of the clean points as in ``normalization._normalize_backward``."""
    k, row = len(points) - len(radius), radius.shape[2]
    for h in range(radius.shape[1]):
        if k:
            for j in range(row):
                d, dz = widen(points[i, h, j]) - mean[j], widen(dpoints[i, h, j])
                dz = dz if d * scale[j] + shift[j] > _ZERO else _ZERO
                dp[i, h, j] = narrow(dz * scale[j] - d * slope[j] - offset[j], dp)
        for j in range(row):
            c = (widen(points[k + i, h, j]) - mean[j]) * scale[j] + shift[j]
            r, dc, dd = widen(radius[i, h, j]) * abs(scale[j]), widen(dpoints[k + i, h, j]), widen(dradius[i, h, j])
            at_c, at_r = _ends_backward(dc, dd, c, r, gains)
            dp[k + i, h, j], dr[i, h, j] = narrow(at_c * scale[j], dp), narrow(at_r * abs(scale[j]), dr)


# Two kernels: LLVM is told that no two arguments of one share memory.
@kernel(parallel=True, **FLAGS)
def _batchnorm_relu_box_backward(dpoints, dradius, points, radius, mean, scale, shift, slope, offset, gains, dp, dr):
    for i in prange(len(radius)):
        _image_backward(i, dpoints, dradius, points, radius, mean, scale, shift, slope, offset, gains, dp, dr)


@kernel(parallel=True, **FLAGS)
def _batchnorm_relu_box_backward_over(dpoints, dradius, points, radius, mean, scale, shift, slope, offset, gains):
    """The same, written over dpoints and dradius."""
    for i in prange(len(radius)):
        _image_backward(i, dpoints, dradius, points, radius, mean, scale, shift, slope, offset, gains, dpoints, dradius)


@kernel(parallel=True, **FLAGS)
def _times_sign(x, y, adds, out):
    """out = x sign(y), or ``adds`` that to what is there."""
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            at = y[i, j]
            signed = x[i, j] if at > _ZERO else (-x[i, j] if at < _ZERO else x[i, j] * at)  # NaN stays NaN
            out[i, j] = out[i, j] + signed if adds else signed


@kernel(parallel=True, **FLAGS)
def _rivals_gain(radius, rows, labels, gain):
    for n in prange(len(radius)):
        own = labels[n]
        for k in range(len(rows)):
            total = _ZERO
            for f in range(rows.shape[1]):
                total += abs(rows[k, f] - rows[own, f]) * radius[n, f]
            gain[n, k] = total


@kernel(parallel=True, **FLAGS)
def _rivals_gain_backward(d_gain, radius, rows, labels, d_radius, parts):
    """parts[t] = the gradient by ``rows``, the weight's columns, of part t of the batch."""
    blocks, features = len(parts), rows.shape[1]
    for t in prange(blocks):
        by_own = np.empty(features, np.float32)
        for n in range(len(radius) * t // blocks, len(radius) * (t + 1) // blocks):
            own = labels[n]
            d_radius[n], by_own[:] = _ZERO, _ZERO
            for k in range(len(rows)):
                g, row = d_gain[n, k], parts[t, k]
                for f in range(features):
                    d = rows[k, f] - rows[own, f]
                    d_radius[n, f] += g * abs(d)
                    moved = (g if d > _ZERO else (-g if d < _ZERO else _ZERO)) * radius[n, f]
                    row[f] += moved
                    by_own[f] += moved
            for f in range(features):
                parts[t, own, f] -= by_own[f]


def _fitting(points, radius):
    """ValueError unless there are one or two points for each radius."""
    if len(points) not in (len(radius), 2 * len(radius)) or points.shape[1:] != radius.shape[1:]:
        raise ValueError(f"points {points.shape} do not fit radii {radius.shape}: as many are wanted, or twice as many")


def box_around(x, eps, mean=None, std=None):
    points, radius = empty((2 * len(x), *x.shape[1:]), x.dtype), empty(x.shape, x.dtype)
    scale = np.float32(1) if std is None else 1 / std
    shift = None if std is None or mean is None else -mean * scale
    channels, sums = _along(x, scale, shift), np.empty(len(x), np.float32)
    _box_around(*_rows(x), np.float32(eps), *channels, *_rows(points), *_rows(radius), sums)
    return points, radius, sums


def relu_box(points, radius):
    _fitting(points, radius)
    y, out = empty(points.shape, points.dtype), empty(radius.shape, radius.dtype)
    _relu_box(*_flat(points, radius, y, out))
    return y, out


def box_sums(points, radius):
    _fitting(points, radius)
    sums = np.empty((len(radius), 8))
    _box_sums(*_flat(points, radius), sums)
    return sums.sum(0)


def _gradients_fit(dpoints, dradius, points, radius):
    _fitting(points, radius)
    if dpoints.shape != points.shape or dradius.shape != radius.shape:
        raise ValueError(f"gradients {dpoints.shape}, {dradius.shape} do not fit a box {points.shape}, {radius.shape}")


def _numbers(gains):
    return tuple(np.float32(g) for g in gains or (0,) * 6)


def relu_box_backward(dpoints, dradius, points, radius, gains=None):
    _gradients_fit(dpoints, dradius, points, radius)
    dp, dr = empty(points.shape, points.dtype), empty(radius.shape, radius.dtype)
    _relu_box_backward(*_flat(dpoints, dradius, points, radius), _numbers(gains), *_flat(dp, dr))
    return dp, dr


def batchnorm_relu_box(points, radius, gamma, beta, mean, inv_std):
    _fitting(points, radius)
    y, out, sums = empty(points.shape, points.dtype), empty(radius.shape, radius.dtype), np.empty((len(radius), 8))
    channels = _along(radius, mean, inv_std * gamma, beta)
    _batchnorm_relu_box(*_rows(points), *_rows(radius), *channels, *_rows(y), *_rows(out), sums)
    return y, out, sums.sum(0)


def batchnorm_relu_box_backward(
    dpoints, dradius, points, radius, gamma, beta, mean, inv_std, gains=None, train=True, spend=False
):
    _gradients_fit(dpoints, dradius, points, radius)
    scale, gains, clean = inv_std * gamma, _numbers(gains), points[: len(points) - len(radius)]
    box, parts = [_rows(a)[0] for a in (dpoints, dradius, points, radius)], _parts(radius)
    mean, scale_, beta = _along(radius, mean, scale, beta)
    _box_channel_gradients(*box, mean, scale_, beta, gains, parts)
    dgamma, dbeta = parts.sum(0)
    dgamma, dbeta = (dgamma * inv_std).astype(np.float32), dbeta.astype(np.float32)
    slopes = _slopes(clean, scale, inv_std, dgamma, dbeta) if train and len(clean) else (None, None)
    moved = _along(radius, *slopes)
    if spend and all(can_be_written(d, a.dtype) for d, a in ((dpoints, points), (dradius, radius))):
        if not np.may_share_memory(dpoints, dradius):
            _batchnorm_relu_box_backward_over(*box, mean, scale_, beta, *moved, gains)
            return dpoints, dradius, dgamma, dbeta
    dp, dr = empty(points.shape, points.dtype), empty(radius.shape, radius.dtype)
    _batchnorm_relu_box_backward(*box, mean, scale_, beta, *moved, gains, *_rows(dp), *_rows(dr))
    return dp, dr, dgamma, dbeta


def times_sign(x, y, into=None):
    if not x.shape == y.shape == (y if into is None else into).shape:
        raise ValueError(f"{x.shape} and {y.shape} do not fit{'' if into is None else f', nor into {into.shape}'}")
    at_once = into is not None and can_be_written(into, np.float32)
    out = into if at_once else empty(x.shape)
    x, y, total = _flat(ready(x), ready(y), out)
    _times_sign(x, y, at_once, total)
    if into is not None and not at_once:
        into += out
    return out if into is None else into


def _elided(radius, weight, labels, *gradient):
    """(radius, the weight's columns as rows, labels) for the kernels. ValueError for what does not fit."""
    n, classes = len(radius), weight.shape[1]
    wanted = (n, len(weight)), (n,), *((n, classes) for _ in gradient)
    if (radius.shape, labels.shape, *(g.shape for g in gradient)) != wanted:
        raise ValueError(f"radii {radius.shape}, labels {labels.shape} and a weight {weight.shape} do not fit")
    if n and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} do not fit {classes} classes")
    return ready(radius), ready(weight.T), np.ascontiguousarray(labels, np.int64)


def rivals_gain(radius, weight, labels):
    gain = empty((len(radius), weight.shape[1]))
    _rivals_gain(*_elided(radius, weight, labels), gain)
    return gain


def rivals_gain_backward(d_gain, radius, weight, labels):
    radius, rows, labels = _elided(radius, weight, labels, d_gain)
    d_radius, parts = empty(radius.shape), np.zeros((8, *rows.shape), np.float32)
    _rivals_gain_backward(ready(d_gain), radius, rows, labels, d_radius, parts)
    return d_radius, np.ascontiguousarray(parts.sum(0).T)
