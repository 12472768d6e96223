"""What attacks do to their images, on the CPU: a step within a ball, the way to a plane."""

import math

import numpy as np
from numba import prange

from ..balls import radius_within
from ..reference import linf_bounds  # noqa: F401  (as it is)
from .elementwise import _flat
from .flags import EXACT, FLAGS, kernel
from .memory import empty, ready

_ZERO, _ONE, _INFINITE = np.float32(0), np.float32(1), np.float32(np.inf)


@kernel(**EXACT)
def _highest(x0, eps):
    """The largest float32 that is not above float64 x0 + eps; ``reference._highest``."""
    total = x0 + eps
    other = total - x0
    missing = (x0 - (total - other)) + (eps - other)
    rounded = np.float32(total)
    bits = rounded.view(np.int32)
    above = rounded > total or (rounded == total and missing < 0)
    return np.int32(bits + above * (np.int32(1) if bits < 0 else np.int32(-1))).view(np.float32)


@kernel(parallel=True, **EXACT)
def _linf_step(x, gradient, size, x0, eps, y):
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            g, centre = gradient[i, j], np.float64(x0[i, j])
            low, high = -_highest(-centre, eps), _highest(centre, eps)
            low, high = low if low > _ZERO else _ZERO, high if high < _ONE else _ONE
            moved = x[i, j] + size[i] * (_ONE if g > _ZERO else (-_ONE if g < _ZERO else g))  # NaN stays NaN
            moved = low if moved < low else moved
            y[i, j] = high if moved > high else moved


def _of_each_image(x, gradient, size, x0):
    """((x, gradient, size, x0) for the kernels, room for the result). ValueError unless each image has one of each."""
    if not x.shape == gradient.shape == x0.shape or size.shape != x.shape[:1]:
        raise ValueError(f"{x.shape}, {gradient.shape}, {size.shape} and {x0.shape} do not fit each other")
    flat_x, flat_gradient, flat_x0 = _flat(x, gradient, x0)
    return (flat_x, flat_gradient, ready(size), flat_x0), empty(x.shape)


def linf_step(x, gradient, size, x0, eps):
    images, y = _of_each_image(x, gradient, size, x0)
    _linf_step(*images, min(float(eps), 4.0), *_flat(y))
    return y


@kernel(**FLAGS)
def _length(values):
    """The l2 norm, in float64."""
    total = 0.0
    for v in values:
        total += np.float64(v) * np.float64(v)
    return math.sqrt(total)


@kernel(**EXACT)
def _within(x0, exact):
    """One pixel of ``reference._within``; x0 in [0, 1]."""
    change = np.float32(exact)
    if abs(np.float64(change)) > abs(exact):
        change = np.int32(change.view(np.int32) - np.int32(1)).view(np.float32)  # of either sign
    moved = np.float32(x0 + change)
    if abs(moved - x0) > abs(change):  # back by one in the last place; below 0 it may be anything below 0
        moved = np.int32(moved.view(np.int32) + (np.int32(1) if moved < x0 else np.int32(-1))).view(np.float32)
    moved = _ZERO if moved < _ZERO else moved
    return _ONE if moved > _ONE else moved


@kernel(parallel=True, **EXACT)
def _l2_step(x, gradient, size, x0, eps, y):
    for i in prange(len(x)):
        moved, largest = y[i], _ZERO
        for j in range(x.shape[1]):
            largest = max(largest, abs(gradient[i, j]))
        for j in range(x.shape[1]):
            moved[j] = gradient[i, j] / (largest if largest > _ZERO else _ONE)
        length = _length(moved)
        pace = size[i] / np.float32(1e-12 if length < 1e-12 else length)
        for j in range(x.shape[1]):
            moved[j] = x[i, j] + moved[j] * pace - x0[i, j]
        length = _length(moved)
        scale = eps / (max(eps, 1e-300) if length < max(eps, 1e-300) else length)
        for j in range(x.shape[1]):
            moved[j] = _within(x0[i, j], np.float64(moved[j]) * scale)


def l2_step(x, gradient, size, x0, eps):
    images, y = _of_each_image(x, gradient, size, x0)
    _l2_step(*images, radius_within(float(eps), x), *_flat(y))
    return y


@kernel(**FLAGS)
def _distances(x, x0, distances):
    """|x - x0| of each pixel in ``distances``; their sum."""
    total = 0.0
    for j in range(len(x)):
        distances[j] = abs(np.float64(x[j]) - np.float64(x0[j]))
        total += distances[j]
    return total


@kernel(**FLAGS)
def _stay(sizes, count, tau):
    """Those of the first ``count`` sizes that are above tau come first. (The sum of size - tau of theirs, how many.)"""
    total, left = 0.0, 0
    for k in range(count):  # without branches: half of the first sizes stay, and no processor foresees which
        size = sizes[k]
        sizes[left] = size
        total += max(size - tau, 0.0)
        left += 1 if size > tau else 0
    return total, left


@kernel(**EXACT)
def _move_most(x, gradient, each, coordinates, moved):
    """x in ``moved``, and ``each`` further up the gradient in those coordinates that gain most and have room."""
    worth, at, least = np.zeros(coordinates, np.float32), np.full(coordinates, -1), 0
    for j in range(len(x)):
        g = gradient[j]
        moved[j] = x[j]
        gain = abs(g) if ((_ONE - x[j]) if g > _ZERO else x[j]) > each else _ZERO
        if not gain <= worth[least]:  # NaN is worth more than all
            worth[least], at[least] = (gain if gain == gain else _INFINITE), j
            for k in range(coordinates):
                least = k if worth[k] < worth[least] else least
    for k in range(coordinates):
        if at[k] >= 0:
            g = gradient[at[k]]
            moved[at[k]] += each * (_ONE if g > _ZERO else (-_ONE if g < _ZERO else g))


@kernel(parallel=True, **EXACT)
def _l1_step(x, gradient, size, x0, eps, coordinates, y):
    for i in prange(len(x)):
        moved, sizes = y[i], np.empty(x.shape[1])
        _move_most(x[i], gradient[i], size[i] / np.float32(coordinates), coordinates, moved)
        total = _distances(moved, x0[i], sizes)
        tau, left, before = 0.0, x.shape[1], -1
        while total > eps and left != before:  # tau grows, and fewer stay, until none more leaves (Michelot 1986)
            tau, before = tau + (total - eps) / left, left
            total, left = _stay(sizes, left, tau)
        scale = eps / (max(eps, 1e-300) if total < max(eps, 1e-300) else total)
        for j in range(x.shape[1]):
            c = np.float64(moved[j]) - np.float64(x0[i, j])
            rest = abs(c) - tau
            rest = 0.0 if rest < 0.0 else rest  # NaN stays NaN
            moved[j] = _within(x0[i, j], (rest if c > 0.0 else -rest) * scale)


def l1_step(x, gradient, size, x0, eps, coordinates):
    images, y = _of_each_image(x, gradient, size, x0)
    _l1_step(*images, radius_within(float(eps), x), coordinates, *_flat(y))
    return y


@kernel(parallel=True, **FLAGS)
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
