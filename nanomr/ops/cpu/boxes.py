"""Boxes c - r to c + r: those around images, their ReLU, its transpose, and the sums that interval training watches.

``points`` (N, ...) = c, or (2N, ...) = [x; c] with images x that are no boxes; ``radius`` (N, ...) = r.
"""

import numpy as np
from numba import njit, prange

from .elementwise import _ONE, _ZERO, _flat, _max0
from .flags import FLAGS
from .memory import empty
from .simd import narrow, widen

_HALF = np.float32(0.5)


@njit(parallel=True, **FLAGS)
def _box_around(x, eps, points, radius):
    n = len(x)
    for i in prange(n):
        for j in range(x.shape[1]):
            value = widen(x[i, j])
            low, high = value - eps, value + eps
            low, high = _ZERO if low < _ZERO else low, _ONE if high > _ONE else high
            points[i, j] = x[i, j]
            points[n + i, j], radius[i, j] = narrow(_HALF * (low + high), points), narrow(_HALF * (high - low), radius)


@njit(parallel=True, **FLAGS)
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


@njit(parallel=True, **FLAGS)
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


@njit(parallel=True, **FLAGS)
def _relu_box_backward(dpoints, dradius, points, radius, gained, gains, dp, dr):
    n = len(radius)
    k = len(points) - n
    on0, on1, off0, off1, every, grown = gains
    for i in prange(n):
        if k:
            for j in range(points.shape[1]):
                dp[i, j] = narrow(widen(dpoints[i, j]) if widen(points[i, j]) > _ZERO else _ZERO, dp)
        for j in range(points.shape[1]):
            c, r = widen(points[k + i, j]), widen(radius[i, j])
            dc, dd = widen(dpoints[k + i, j]), widen(dradius[i, j])
            high = _HALF * (dc + dd) if c + r > _ZERO else _ZERO
            low = _HALF * (dc - dd) if c - r > _ZERO else _ZERO
            at_c, at_r = low + high, high - low
            if gained:
                at_c += every + (on0 + on1 * c if c - r > _ZERO else _ZERO)
                at_c += off0 + off1 * c if c + r < _ZERO else _ZERO
                at_r += grown
            dp[k + i, j], dr[i, j] = narrow(at_c, dp), narrow(at_r, dr)


def _fitting(points, radius):
    """ValueError unless there are one or two points for each radius."""
    if len(points) not in (len(radius), 2 * len(radius)):
        raise ValueError(f"points {points.shape} do not fit radii {radius.shape}: as many are wanted, or twice as many")


def box_around(x, eps):
    points, radius = empty((2 * len(x), *x.shape[1:]), x.dtype), empty(x.shape, x.dtype)
    flat_x, flat_points, flat_radius = _flat(x, points, radius)
    _box_around(flat_x, np.float32(eps), flat_points, flat_radius)
    return points, radius


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


def relu_box_backward(dpoints, dradius, points, radius, gains=None):
    _fitting(points, radius)
    if dpoints.shape != points.shape or dradius.shape != radius.shape:
        raise ValueError(f"gradients {dpoints.shape}, {dradius.shape} do not fit a box {points.shape}, {radius.shape}")
    dp, dr = empty(points.shape, points.dtype), empty(radius.shape, radius.dtype)
    numbers = tuple(np.float32(g) for g in gains or (0,) * 6)
    _relu_box_backward(*_flat(dpoints, dradius, points, radius), gains is not None, numbers, *_flat(dp, dr))
    return dp, dr
