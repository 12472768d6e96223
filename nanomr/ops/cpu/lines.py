"""ReLUs between two lines, and batch norms: what linear bounds do to their rows on the way down to the image, and to
points on the way up. Rows (N, R, ...), R of each image; lines (N, ...)."""

import math

import numpy as np
from numba import prange

from .elementwise import _ONE, _ZERO, _flat
from .flags import EXACT, FLAGS, kernel
from .memory import empty, ready


@kernel(parallel=True, **EXACT)
def _chord(low, high, upper, offset):
    for i in prange(len(low)):
        for j in range(low.shape[1]):
            below, above = low[i, j], high[i, j]
            unstable = below < _ZERO and above > _ZERO
            slope = above / ((above - below) if unstable else _ONE)
            upper[i, j] = slope if unstable else (_ONE if below >= _ZERO else _ZERO)
            offset[i, j] = -below * slope if unstable else _ZERO


@kernel(parallel=True, **EXACT)
def _chord_backward(d_upper, d_offset, low, high, d_low, d_high):
    for i in prange(len(low)):
        for j in range(low.shape[1]):
            below, above = low[i, j], high[i, j]
            unstable = below < _ZERO and above > _ZERO
            width = (above - below) if unstable else _ONE
            slope, other = above / width, -below / width
            by_slope, by_offset = d_upper[i, j] / width, d_offset[i, j]
            by_low, by_high = (by_slope - by_offset * slope) * slope, (by_slope + by_offset * other) * other
            d_low[i, j], d_high[i, j] = by_low if unstable else _ZERO, by_high if unstable else _ZERO


@kernel(parallel=True, **FLAGS)
def _lines_down(a, lower, upper, offset, rows, below, above):
    for i in prange(len(a)):
        for r in range(a.shape[1]):
            low = high = _ZERO
            for j in range(a.shape[2]):
                v = a[i, r, j]
                positive, negative = (v, _ZERO) if v > _ZERO else (_ZERO, v)  # NaN is in one of them, infinity stays
                rows[i, r, j] = positive * lower[i, j] + negative * upper[i, j]
                low, high = low + negative * offset[i, j], high + positive * offset[i, j]
            below[i, r], above[i, r] = low, high


@kernel(parallel=True, **FLAGS)
def _lines_up(z, a, low, high, lower, upper, offset, points, d_lower, d_upper, d_offset):
    for i in prange(len(a)):
        for j in range(a.shape[2]):
            d_lower[i, j] = d_upper[i, j] = d_offset[i, j] = _ZERO
        for r in range(a.shape[1]):
            by_low, by_high = low[i, r], high[i, r]
            for j in range(a.shape[2]):
                v, point, below, above = a[i, r, j], z[i, r, j], lower[i, j], upper[i, j]  # loads before any choice
                positive, negative = (v, _ZERO) if v > _ZERO else (_ZERO, v)
                side = by_high if v > _ZERO else (by_low if v < _ZERO else _ZERO)
                d_lower[i, j] += positive * point
                d_upper[i, j] += negative * point
                d_offset[i, j] += v * side
                points[i, r, j] = (below if v > _ZERO else above) * point + side * offset[i, j]


@kernel(parallel=True, **FLAGS)
def _scale_down(a, scale, shift, rows, constants):
    for i in prange(len(a)):
        for r in range(a.shape[1]):
            constant = _ZERO
            for j in range(a.shape[2]):
                v = a[i, r, j]
                rows[i, r, j] = v * scale[j]
                constant += v * shift[j]
            constants[i, r] = constant


@kernel(parallel=True, **FLAGS)
def _scale_up(z, a, total, scale, shift, points, d_scale, d_shift):
    for i in prange(len(a)):
        for j in range(a.shape[2]):
            d_scale[i, j] = d_shift[i, j] = _ZERO
        for r in range(a.shape[1]):
            g = total[i, r]
            for j in range(a.shape[2]):
                d_scale[i, j] += a[i, r, j] * z[i, r, j]
                d_shift[i, j] += a[i, r, j] * g
                points[i, r, j] = scale[j] * z[i, r, j] + g * shift[j]


@kernel(parallel=True, **FLAGS)
def _lines_reach(a, centre, radius, least, largest):
    for i in prange(len(a)):
        for r in range(a.shape[1]):
            middle = width = _ZERO
            for j in range(a.shape[2]):
                v = a[i, r, j]
                middle, width = middle + v * centre[i, j], width + abs(v) * radius[i, j]
            least[i, r], largest[i, r] = middle - width, middle + width


@kernel(parallel=True, **FLAGS)
def _lines_corner(a, low, high, centre, radius, points):
    for i in prange(len(a)):
        for r in range(a.shape[1]):
            total, apart = low[i, r] + high[i, r], high[i, r] - low[i, r]
            for j in range(a.shape[2]):
                v, size = a[i, r, j], apart * radius[i, j]  # NaN stays NaN
                points[i, r, j] = total * centre[i, j] + (size if v > _ZERO else (-size if v < _ZERO else size * v))


def _rows(*arrays):
    """Arrays (N, R, ...) as contiguous (N, R, features). ValueError where their shapes differ."""
    if len({a.shape for a in arrays}) > 1:
        raise ValueError(f"rows {', '.join(str(a.shape) for a in arrays)} do not fit each other")
    return [ready(a).reshape(*a.shape[:2], math.prod(a.shape[2:])) for a in arrays]


def _lines(a, *lines):
    """Lines (N, ...) as contiguous (N, features). ValueError unless they are those of rows ``a``."""
    if any(line.shape != (len(a), *a.shape[2:]) for line in lines):
        raise ValueError(f"lines {', '.join(str(line.shape) for line in lines)} do not fit rows {a.shape}")
    return _flat(*lines)


def _of_each_relu(*arrays):
    """The arrays for the kernels, and room for two results. ValueError unless all have one shape."""
    if len({a.shape for a in arrays}) > 1:
        raise ValueError(f"{', '.join(str(a.shape) for a in arrays)} do not fit each other")
    return _flat(*arrays), [empty(arrays[0].shape) for _ in range(2)]


def chord(low, high):
    bounds, line = _of_each_relu(low, high)
    _chord(*bounds, *_flat(*line))
    return tuple(line)


def chord_backward(d_upper, d_offset, low, high):
    arrays, ends = _of_each_relu(d_upper, d_offset, low, high)
    _chord_backward(*arrays, *_flat(*ends))
    return tuple(ends)


def lines_down(a, lower, upper, offset):
    lines, rows = _lines(a, lower, upper, offset), empty(a.shape)
    below, above = empty(a.shape[:2]), empty(a.shape[:2])
    _lines_down(*_rows(a), *lines, *_rows(rows), below, above)
    return rows, below, above


def _weights_fit(a, low, high):
    if not low.shape == high.shape == a.shape[:2]:
        raise ValueError(f"gradients {low.shape} and {high.shape} do not fit rows {a.shape}")


def lines_up(z, a, low, high, lower, upper, offset):
    _weights_fit(a, low, high)
    lines, points, found = _lines(a, lower, upper, offset), empty(a.shape), [empty(lower.shape) for _ in range(3)]
    _lines_up(*_rows(z, a), ready(low), ready(high), *lines, *_rows(points), *_flat(*found))
    return points, *found


def lines_reach(a, centre, radius):
    box, ends = _lines(a, centre, radius), [empty(a.shape[:2]) for _ in range(2)]
    _lines_reach(*_rows(a), *box, *ends)
    return tuple(ends)


def lines_corner(a, low, high, centre, radius):
    _weights_fit(a, low, high)
    box, points = _lines(a, centre, radius), empty(a.shape)
    _lines_corner(*_rows(a), ready(low), ready(high), *box, *_rows(points))
    return points


def _per_feature(a, *channels):
    """Numbers per channel as (features,) of rows ``a``."""
    return [ready(np.broadcast_to(each, a.shape[2:])).ravel() for each in channels]


def scale_down(a, scale, shift):
    if not scale.shape == shift.shape == a.shape[-1:]:
        raise ValueError(f"{scale.shape} and {shift.shape} do not fit rows {a.shape}")
    rows, constants = empty(a.shape), empty(a.shape[:2])
    _scale_down(*_rows(a), *_per_feature(a, scale, shift), *_rows(rows), constants)
    return rows, constants


def scale_up(z, a, total, scale, shift):
    if total.shape != a.shape[:2] or not scale.shape == shift.shape == a.shape[-1:]:
        raise ValueError(f"{total.shape}, {scale.shape} and {shift.shape} do not fit rows {a.shape}")
    points, found = empty(a.shape), [empty((len(a), *a.shape[2:])) for _ in range(2)]
    _scale_up(*_rows(z, a), ready(total), *_per_feature(a, scale, shift), *_rows(points), *_flat(*found))
    return points, *(d.sum(tuple(range(d.ndim - 1))) for d in found)
