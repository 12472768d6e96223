"""What attacks do to their images, on the CPU: a step within a ball, the way to a plane."""

import math

import numpy as np
from numba import njit, prange

from ..reference import linf_bounds  # noqa: F401  (as it is)
from .elementwise import _flat
from .flags import FLAGS
from .memory import empty, ready

_ZERO, _ONE = np.float32(0), np.float32(1)
EXACT = {**FLAGS, "fastmath": False}  # a ball holds to the last bit


@njit(**EXACT)
def _highest(x0, eps):
    """The largest float32 that is not above float64 x0 + eps; ``reference._highest``."""
    total = x0 + eps
    other = total - x0
    missing = (x0 - (total - other)) + (eps - other)
    rounded = np.float32(total)
    bits = rounded.view(np.int32)
    above = rounded > total or (rounded == total and missing < 0)
    return np.int32(bits + above * (np.int32(1) if bits < 0 else np.int32(-1))).view(np.float32)


@njit(parallel=True, **EXACT)
def _linf_step(x, gradient, size, x0, eps, y):
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            g, centre = gradient[i, j], np.float64(x0[i, j])
            low, high = -_highest(-centre, eps), _highest(centre, eps)
            low, high = low if low > _ZERO else _ZERO, high if high < _ONE else _ONE
            moved = x[i, j] + size[i] * (_ONE if g > _ZERO else (-_ONE if g < _ZERO else g))  # NaN stays NaN
            moved = low if moved < low else moved
            y[i, j] = high if moved > high else moved


def linf_step(x, gradient, size, x0, eps):
    y = empty(x.shape)
    flat_x, flat_gradient, flat_x0, flat_y = _flat(x, gradient, x0, y)
    _linf_step(flat_x, flat_gradient, ready(size), flat_x0, min(float(eps), 4.0), flat_y)
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
