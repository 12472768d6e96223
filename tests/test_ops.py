"""``cpu`` and ``gpu`` offer ``reference``'s functions, and agree with it: in float32, for all shapes and layouts.

The oracle is ``reference`` in float64. A float32 sum of products errs by a few 1e-7 of the sum of their magnitudes
(the condition of the sum, not of its result, which may cancel to nothing), so that a function may be off by 1e-5 of
itself computed on absolute values. ``Operation.magnitude`` is that bound.
"""

import importlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanomr import rng as streams
from nanomr.backend import to_numpy
from nanomr.methods import manifold_step
from nanomr.models import small_cnn
from nanomr.ops import reference
from nanomr.ops.cpu import training
from nanomr.optim import SGD
from nanomr.testing.strategies import LAYOUTS, convolutions, fewer, images, layouts, seeds

TOLERANCE = 1e-5
pytestmark = pytest.mark.threads


def load(name):
    """The module and its array module. Skips where there is no CuPy or no GPU (see conftest.py)."""
    module = importlib.import_module(f"nanomr.ops.{name.split()[0]}")
    return module, importlib.import_module("cupy") if name == "gpu" else np


# gpu.py computes where its arguments live: on NumPy arrays its formulas are held to the reference without a GPU.
BACKENDS = ["cpu", "gpu on NumPy", pytest.param("gpu", marks=pytest.mark.gpu)]

# --- the same functions -----------------------------------------------------------------------------------------------


def public_functions(module):
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value)
        and not inspect.isclass(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "").startswith("nanomr.ops")
    }


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_backends_offer_every_function_with_the_same_signature(name):
    module = importlib.import_module(f"nanomr.ops.{name}")
    offered = public_functions(module)
    for function, wanted in public_functions(reference).items():
        assert function in offered, f"{name} lacks {function}"
        assert inspect.signature(offered[function]) == inspect.signature(wanted), function


# --- the same numbers -------------------------------------------------------------------------------------------------


@dataclass
class Operation:
    draw: st.SearchStrategy  # of the arguments, in float32
    magnitude: Callable  # (float64 arguments) -> the size of the terms of each output
    wide: int | None = None  # which output is float64; all others are float32


def _normal(generator, shape, special=False):
    """Standard normal; with ``special``, some entries are exact zeros, tiny or huge."""
    a = generator.standard_normal(shape).astype(np.float32)
    if special:
        extremes = generator.choice(np.float32([0.0, -0.0, 1e4, -1e4, 1e-20, -1e-20]), shape)
        a = np.where(generator.random(shape) < 0.2, extremes, a)
    return a


def arguments(shapes, make):
    """``make(generator, *drawn)`` gives the arguments."""
    return st.builds(lambda drawn, seed: make(np.random.default_rng(seed), drawn), shapes, seeds)


def absolute(function):
    """The magnitude of a sum of products: the function itself, of absolute values."""

    def magnitude(*args):
        return function(*[np.abs(a) if isinstance(a, np.ndarray) else a for a in args])

    return magnitude


def ones_for(function):
    """Outputs that come out exact, or of size 1: the magnitude is the output's own."""

    def magnitude(*args):
        result = function(*args)
        return tuple(np.abs(r) for r in result) if isinstance(result, tuple) else np.abs(result)

    return magnitude


CHANNELS = (1, 3, 5, 8, 16, 17, 32)  # below, at, and beside the widths of vectors
conv_cases = convolutions(batch=(1, 2, 7), channels=CHANNELS, kernel=5, stride=3, size=9, square=False)


def _normal_or_none(g, size):
    return _normal(g, size) if g.random() < 0.5 else None


def _dy(g, case):
    return _normal(g, case.y_shape)


def _mean_and_std(g, channels):
    """One for each channel, or one for all (``mlp``'s default)."""
    channels = channels if g.random() < 0.7 else 1
    return _normal_or_none(g, channels), 0.2 + g.random(channels, np.float32)


matrices = st.tuples(*[st.sampled_from((1, 2, 3, 7, 8, 16, 33))] * 3)
feature_maps = st.one_of(
    images(n=(1, 7), size=(1, 6), channels=(1, 33)), st.tuples(st.integers(1, 7), st.integers(1, 65))
)
some = st.tuples(feature_maps, st.sampled_from([0.5, 8.0, 100.0]))


def _triple(g, shape):
    """[z0; z+; z-], in places with z+ = z-."""
    z = _normal(g, (3 * shape[0], *shape[1:]), special=True)
    _, plus, minus = np.split(z, 3)
    minus[...] = np.where(g.random(shape) < 0.2, plus, minus)
    return z


def _box(g, shape):
    """A box in eighths, so that float32 and float64 say the same of each ReLU; of two, one has images beside it."""
    copies = g.integers(1, 3)
    points = np.round(8 * _normal(g, (copies * shape[0], *shape[1:]))) / 8
    return points, np.abs(np.round(8 * _normal(g, shape))) / 8


def _to(points, radius):
    """The radius, as often as there are points for it."""
    return np.concatenate([radius] * (len(points) // len(radius)))


def _around(g, shape):
    """Images, a radius and, of two, one with a mean and a std, which may be negative."""
    mean, std = _mean_and_std(g, shape[-1])
    normalized = (mean, std * g.choice(np.float32([-1, 1]), std.shape)) if g.random() < 0.5 else ()
    return g.random(shape, np.float32), float(g.choice([0.0, 8 / 255, 0.7])), *normalized


def _around_magnitude(x, eps, mean=None, std=1.0):
    centre = x + eps + (0 if mean is None else np.abs(mean))
    radius = (x + eps) / np.abs(std)
    return np.concatenate([centre] * 2) / np.abs(std), radius, radius.reshape(len(x), -1).sum(1)


def _box_backward(g, shape):
    points, radius = _box(g, shape)
    gains = tuple(map(float, g.standard_normal(6))) if g.random() < 0.5 else None
    return _normal(g, points.shape), _normal(g, shape), points, radius, gains


def _box_backward_magnitude(dpoints, dradius, points, radius, gains):
    sizes = np.abs(gains if gains else np.zeros(6))
    at_c = np.abs(dpoints) + _to(points, np.abs(dradius)) + sizes[:5].sum() + sizes[:4].max() * np.abs(points)
    return at_c, np.abs(dpoints[-len(radius) :]) + np.abs(dradius) + sizes[5]


def _channels(g, c):
    """gamma, beta, mean and inv_std of a batch norm in sixteenths, which make of boxes in eighths such as float32 and
    float64 have alike; among the gammas are negative ones and zeros."""
    sixteenths = np.round(16 * _normal(g, (3, c))) / 16
    return *sixteenths, g.choice(np.float32([0.25, 0.5, 2.0]), c)


def _norm_box(g, shape):
    return *_box(g, shape), *_channels(g, shape[-1])


def _norm_box_magnitude(points, r, gamma, beta, mean, inv_std):
    high = _centred(points, mean) * np.abs(gamma) * inv_std + np.abs(beta) + _to(points, r * np.abs(gamma) * inv_std)
    z = high[-len(r) :]
    return high, z, np.array([z.size, z.sum(), (z * z).sum()] * 2 + [z.sum()] * 2)


def _norm_box_backward(g, shape):
    *gradients, points, radius, gains = _box_backward(g, shape)
    return *gradients, points, radius, *_channels(g, shape[-1]), gains, bool(g.random() < 0.5)


def _norm_box_backward_magnitude(dpoints, dradius, points, r, gamma, beta, mean, inv_std, gains, train):
    high, *_ = _norm_box_magnitude(points, r, gamma, beta, mean, inv_std)
    dz, dr = _box_backward_magnitude(dpoints, dradius, high, high[-len(r) :], gains)
    dgamma, dbeta = _parameter_gradient_magnitude(dz, points, mean, inv_std)
    dgamma = dgamma + (dr * r).reshape(-1, len(gamma)).sum(0) * inv_std
    clean, scale, m = len(points) - len(r), np.abs(gamma) * inv_std, r.size // len(gamma)
    dx = dz * scale
    if train:
        dx[:clean] += (_centred(points[:clean], mean) * inv_std * dgamma + dbeta) / m * scale
    return dx, dr * scale, dgamma, dbeta


def _rivals(g, shape):
    """Radii, a last layer in eighths, some of whose classes have the same weight, and labels."""
    n, features, classes = shape
    weight = np.round(2 * _normal(g, (features, classes))) / 8
    return np.abs(_normal(g, (n, features))), weight, g.integers(0, classes, n)


def _rivals_backward_magnitude(d_gain, radius, weight, labels):
    size, total = np.abs(weight).max(1), np.abs(d_gain).sum(1, keepdims=True)
    by_weight = radius.T @ (np.abs(d_gain) + total)
    return total * 2 * size, by_weight


def _bounds(g, shape):
    """Of ReLUs that are on, off, unstable, or at the border of that."""
    low, high = np.sort([_normal(g, shape, special=True) for _ in range(2)], axis=0)
    return low, high


def _chord_backward(g, shape):
    return _normal(g, shape), _normal(g, shape), *_bounds(g, shape)


def _chord_backward_magnitude(d_upper, d_offset, low, high):
    size = np.abs(d_upper) / np.where((low < 0) & (high > 0), high - low, 1) + np.abs(d_offset)
    return size, size


def _lines(g, shape):
    """Rows, and the lines of ReLUs of any kind: some rows are 0 there, where neither line counts."""
    n, features = shape[0], shape[1:]
    lower, upper, offset = g.random((3, n, *features), np.float32)
    return _normal(g, (n, int(g.integers(1, 4)), *features), special=True), lower, upper, offset


def _lines_up(g, shape):
    a, *lines = _lines(g, shape)
    return _normal(g, a.shape), a, *(_normal(g, a.shape[:2]) for _ in range(2)), *lines


def _lines_down_magnitude(a, *lines):
    rows, _, above = reference.lines_down(np.abs(a), *lines)
    return rows - reference.lines_down(-np.abs(a), *lines)[0], above, above


def _lines_up_magnitude(z, a, low, high, lower, upper, offset):
    size = np.abs(low) + np.abs(high)
    of = [reference.lines_up(np.abs(z), side * np.abs(a), size, size, lower, upper, offset) for side in (1, -1)]
    return tuple(np.abs(one) + np.abs(other) for one, other in zip(*of, strict=True))


def _scale_up(g, shape):
    a, (scale, shift) = _lines(g, shape)[0], _normal(g, (2, shape[-1]))
    return _normal(g, a.shape), a, _normal(g, a.shape[:2]), scale, shift


def _scale_down(g, shape):
    _, a, _, *affine = _scale_up(g, shape)
    return a, *affine


def _in_a_box(g, shape):
    a, centre, radius, _ = _lines(g, shape)
    return a, centre, radius


def _corner(g, shape):
    a, *box = _in_a_box(g, shape)
    return a, *(_normal(g, a.shape[:2]) for _ in range(2)), *box


def _corner_magnitude(a, low, high, centre, radius):
    return reference.lines_corner(np.ones_like(a), 0 * low, np.abs(low) + np.abs(high), np.abs(centre), np.abs(radius))


def _weight(g, n):
    return g.standard_normal(n).astype(np.float32)


def _dims(values, z):
    return values.reshape(-1, *[1] * (z.ndim - 1))


def _hamming_magnitude(z, alpha):
    """tanh errs by 1e-7 of 1 where it saturates, else of itself; d = t+ - t- by the sum of both."""
    _, plus, minus = np.split(np.tanh(alpha * np.abs(z)), 3)
    return np.abs(z), ((plus + minus) ** 2).reshape(len(plus), -1).sum(1)


def _hamming_backward_magnitude(dy, z, alpha, weight):
    size, n = np.abs(dy), len(z) // 3
    _, plus, minus = np.split(np.tanh(alpha * np.abs(z)), 3)
    size[n:] += np.tile(_dims(np.abs(weight), z) * (plus + minus), (2, *[1] * (z.ndim - 1)))
    return size


def _batchnorm_arguments(g, shape):
    """(x, mean, inv_std), as batch statistics are."""
    x = _normal(g, shape) * 2 + _normal(g, shape[-1])
    mean, var = reference.batchnorm_statistics(x)
    return x, mean, (1 / (var + 1e-5) ** 0.5).astype(np.float32)


def _batchnorm(g, shape):
    x, mean, inv_std = _batchnorm_arguments(g, shape)
    return x, _normal(g, shape[-1]), _normal(g, shape[-1]), mean, inv_std


def _batchnorm_backward(g, shape):
    x, mean, inv_std = _batchnorm_arguments(g, shape)
    dy, gamma, plus = _normal(g, shape), _normal(g, shape[-1]), _normal_or_none(g, shape)
    return dy, x, gamma, mean, inv_std, *reference.batchnorm_parameter_gradient(dy, x, mean, inv_std), plus


def _centred(x, mean):
    return np.abs(x) + np.abs(mean)


def _backward_magnitude(dy, x, gamma, mean, inv_std, dgamma, dbeta, plus):
    m = x.size // x.shape[-1]
    x_hat = _centred(x, mean) * inv_std
    size = (np.abs(dy) + (x_hat * np.abs(dgamma) + np.abs(dbeta)) / m) * np.abs(gamma) * inv_std
    return size if plus is None else size + np.abs(plus)


def _parameter_gradient_magnitude(dy, x, mean, inv_std):
    c = x.shape[-1]
    dgamma = (np.abs(dy) * _centred(x, mean) * inv_std).reshape(-1, c).sum(0)
    return dgamma, np.abs(dy).reshape(-1, c).sum(0)


def _statistics_magnitude(x):
    mean, var = reference.batchnorm_statistics(x)
    # Relative to the variance itself: sums of squares of uncentred values would lose it (see the test further down).
    return np.abs(x).reshape(-1, x.shape[-1]).mean(0), var + 1e-7 * mean**2


pool_shapes = st.tuples(images(n=(1, 3), size=(1, 3), channels=(1, 17)), st.integers(1, 4))


def _linf_step(g, shape):
    """From within the ball and from without; some gradients are zero."""
    x0 = g.random(shape, np.float32)
    x = x0 + np.float32(0.1) * _normal(g, shape)
    return x, _normal(g, shape, special=True), g.random(shape[0], np.float32), x0, float(g.choice([0, 0.03, 2]))


def _l2_step(g, shape):
    x, gradient, size, x0, eps = _linf_step(g, shape)
    return x, gradient, size, x0, 10 * eps


def _l1_step(g, shape):
    """Of gradients that are equal any may be chosen: here none is, but for 0, which never is."""
    x, _, *rest = _l2_step(g, shape)
    return x, _normal(g, shape) * g.choice(np.float32([0, 1, 1]), shape), *rest, int(g.integers(1, 25))


def _plane_step(g, shape):
    """Planes near, far and out of reach; some coordinates at the box, some weights zero."""
    points = np.clip(g.uniform(-0.3, 1.3, shape), 0, 1).astype(np.float32)
    w = _normal(g, shape) * g.choice(np.float32([0, 1, 1]), shape)
    length = np.abs(w).reshape(len(w), -1).sum(1)
    b = (w * points).reshape(len(w), -1).sum(1, dtype=np.float64) + g.choice([-9, -0.2, -1e-3, 0.1, 9], len(w)) * length
    return points, w, b, bool(g.random() < 0.5)


def _plane_step_magnitude(points, w, b, by_weight):
    """t = (need - reached) / pace: wrong by a few 1e-7 of sum |w| over the pace, that of the coordinates which move to
    the end (short of the box by more than any rounding). Where there are none, d is the room, which is exact."""
    flat = (len(w), -1)
    d = np.abs(reference.plane_step(points, w, b, by_weight)).reshape(flat)
    up = reference.plane_step(points, w, b, by_weight).reshape(flat) > 0
    points, weight = points.reshape(flat), np.abs(w).reshape(flat)
    rate = weight if by_weight else np.ones_like(weight)
    moving = np.where(up, 1 - points, points) - d > 1e-4
    pace = (weight * rate * moving).sum(1, keepdims=True)
    spread = rate * weight.sum(1, keepdims=True) / np.where(pace > 0, pace, np.inf)
    return (d + np.where(pace > 0, spread, 1)).reshape(w.shape)


def _crops(g, shape):
    count = int(g.integers(1, 5))
    top, left = g.integers(0, 9, (2, count))
    stored = g.integers(0, 256, shape, dtype=np.uint8)
    return stored, g.integers(0, len(stored), count), top, left, g.random(count) < 0.5


OPERATIONS = {
    "conv2d": Operation(
        arguments(
            conv_cases,
            lambda g, c: (
                _normal(g, c.x_shape),
                _normal(g, c.w_shape),
                _normal_or_none(g, c.c_out),
                c.stride,
                c.padding,
                _normal_or_none(g, c.y_shape),
            ),
        ),
        absolute(reference.conv2d),
    ),
    "conv2d_input_gradient": Operation(
        arguments(
            conv_cases,
            lambda g, c: (
                _dy(g, c),
                _normal(g, c.w_shape),
                c.stride,
                c.padding,
                c.x_shape,
                _normal_or_none(g, c.x_shape),
            ),
        ),
        absolute(reference.conv2d_input_gradient),
    ),
    "conv2d_weight_gradient": Operation(
        arguments(conv_cases, lambda g, c: (_normal(g, c.x_shape), _dy(g, c), c.w_shape, c.stride, c.padding)),
        absolute(reference.conv2d_weight_gradient),
    ),
    "linear": Operation(
        arguments(
            matrices,
            lambda g, s: (_normal(g, s[:2]), _normal(g, s[1:]), _normal_or_none(g, s[2])),
        ),
        absolute(reference.linear),
    ),
    "linear_input_gradient": Operation(
        arguments(matrices, lambda g, s: (_normal(g, (s[0], s[2])), _normal(g, s[1:]))),
        absolute(reference.linear_input_gradient),
    ),
    "linear_weight_gradient": Operation(
        arguments(matrices, lambda g, s: (_normal(g, s[:2]), _normal(g, (s[0], s[2])))),
        absolute(reference.linear_weight_gradient),
    ),
    "relu": Operation(arguments(feature_maps, lambda g, s: (_normal(g, s, True),)), ones_for(reference.relu)),
    "relu_backward": Operation(
        arguments(feature_maps, lambda g, s: (_normal(g, s), _normal(g, s, True))), ones_for(reference.relu_backward)
    ),
    "relu_hamming": Operation(arguments(some, lambda g, s: (_triple(g, s[0]), s[1])), _hamming_magnitude),
    "relu_hamming_backward": Operation(
        arguments(
            some,
            lambda g, s: (_normal(g, (3 * s[0][0], *s[0][1:])), _triple(g, s[0]), s[1], _weight(g, s[0][0])),
        ),
        _hamming_backward_magnitude,
    ),
    "expand_pair": Operation(
        arguments(feature_maps, lambda g, s: (_normal(g, s, True), _normal(g, s, True))),
        lambda u, v: np.concatenate([np.abs(u), *[np.abs(u) + np.abs(v)] * 2]),
    ),
    "contract_pair": Operation(
        arguments(feature_maps, lambda g, s: (_normal(g, (3 * s[0], *s[1:])),)),
        lambda dy: (sum(np.split(np.abs(dy), 3)),) * 2,
    ),
    "relu_hamming_pair": Operation(
        arguments(some, lambda g, s: (_normal(g, s[0], True), _normal(g, s[0], True), s[1])),
        lambda u, v, alpha: _hamming_magnitude(np.concatenate([np.abs(u) + np.abs(v)] * 3), alpha),
    ),
    "relu_hamming_pair_backward": Operation(
        arguments(
            some,
            lambda g, s: (
                _normal(g, (3 * s[0][0], *s[0][1:])),
                _normal(g, s[0], True),
                _normal(g, s[0], True),
                s[1],
                _weight(g, s[0][0]),
            ),
        ),
        lambda dy, u, v, alpha, weight: (
            (sum(np.split(np.abs(dy), 3)) + 4 * np.abs(_dims(weight, u)) * np.tanh(alpha * (np.abs(u) + np.abs(v))),)
            * 2
        ),
    ),
    "normalize": Operation(
        arguments(images(n=(1, 7), size=(1, 6)), lambda g, s: (_normal(g, s), *_mean_and_std(g, s[-1]))),
        lambda x, mean, std: (np.abs(x) + (0 if mean is None else np.abs(mean))) / std,
    ),
    "batchnorm_statistics": Operation(
        arguments(images(n=(1, 7), size=(1, 6), channels=(1, 33)), lambda g, s: _batchnorm_arguments(g, s)[:1]),
        _statistics_magnitude,
    ),
    "batchnorm": Operation(
        arguments(images(n=(1, 7), size=(1, 6), channels=(1, 33)), _batchnorm),
        lambda x, gamma, beta, mean, inv_std: _centred(x, mean) * inv_std * np.abs(gamma) + np.abs(beta),
    ),
    "batchnorm_parameter_gradient": Operation(
        arguments(
            images(n=(1, 7), size=(1, 6), channels=(1, 33)), lambda g, s: (_normal(g, s), *_batchnorm_arguments(g, s))
        ),
        _parameter_gradient_magnitude,
    ),
    "batchnorm_backward": Operation(
        arguments(images(n=(1, 7), size=(1, 6), channels=(1, 33)), _batchnorm_backward), _backward_magnitude
    ),
    "scale_channels": Operation(
        arguments(
            images(n=(1, 7), size=(1, 6), channels=(1, 33)),
            lambda g, s: (_normal(g, s), _normal(g, s[-1]), _normal_or_none(g, s)),
        ),
        absolute(reference.scale_channels),
    ),
    "average_pool": Operation(
        arguments(pool_shapes, lambda g, s: (_normal(g, (s[0][0], s[0][1] * s[1], s[0][2] * s[1], s[0][3])), s[1])),
        absolute(reference.average_pool),
    ),
    "average_pool_backward": Operation(
        arguments(pool_shapes, lambda g, s: (_normal(g, s[0]), s[1])), ones_for(reference.average_pool_backward)
    ),
    "box_around": Operation(
        arguments(feature_maps, _around),
        _around_magnitude,
    ),
    "relu_box": Operation(
        arguments(feature_maps, _box),
        lambda points, r: (np.abs(points) + _to(points, r), np.abs(points[-len(r) :]) + r),
    ),
    "relu_box_backward": Operation(arguments(feature_maps, _box_backward), _box_backward_magnitude),
    "chord": Operation(arguments(feature_maps, _bounds), lambda low, high: (np.ones_like(low), np.abs(low))),
    "chord_backward": Operation(arguments(feature_maps, _chord_backward), _chord_backward_magnitude),
    "lines_down": Operation(arguments(feature_maps, _lines), _lines_down_magnitude),
    "lines_up": Operation(arguments(feature_maps, _lines_up), _lines_up_magnitude),
    "lines_reach": Operation(
        arguments(feature_maps, _in_a_box), lambda *args: (reference.lines_reach(*map(np.abs, args))[1],) * 2
    ),
    "lines_corner": Operation(arguments(feature_maps, _corner), _corner_magnitude),
    "scale_down": Operation(arguments(feature_maps, _scale_down), absolute(reference.scale_down)),
    "scale_up": Operation(arguments(feature_maps, _scale_up), absolute(reference.scale_up)),
    "batchnorm_relu_box": Operation(arguments(feature_maps, _norm_box), _norm_box_magnitude, wide=2),
    "batchnorm_relu_box_backward": Operation(arguments(feature_maps, _norm_box_backward), _norm_box_backward_magnitude),
    "times_sign": Operation(
        arguments(feature_maps, lambda g, s: (_normal(g, s), _normal(g, s, True))), ones_for(reference.times_sign)
    ),
    "rivals_gain": Operation(
        arguments(matrices, _rivals), lambda r, w, y: np.abs(r) @ (np.abs(w) + np.abs(w).max(1, keepdims=True))
    ),
    "rivals_gain_backward": Operation(
        arguments(matrices, lambda g, s: (_normal(g, (s[0], s[2])), *_rivals(g, s))), _rivals_backward_magnitude
    ),
    "norm": Operation(
        arguments(st.sampled_from((1, 7, 63, 64, 65, 1000)), lambda g, n: (_normal(g, n, special=True),)),
        ones_for(reference.norm),
    ),
    "linf_step": Operation(
        arguments(feature_maps, _linf_step), lambda x, gradient, size, x0, eps: np.abs(x) + _dims(size, x) + x0 + eps
    ),
    "l2_step": Operation(arguments(feature_maps, _l2_step), lambda x, gradient, size, x0, eps: np.ones_like(x)),
    "l1_step": Operation(arguments(feature_maps, _l1_step), lambda x, *rest: np.ones_like(x)),
    "plane_step": Operation(arguments(feature_maps, _plane_step), _plane_step_magnitude),
    "crop_flip": Operation(arguments(images(n=(1, 4), size=(1, 9)), _crops), ones_for(reference.crop_flip)),
}
ELSEWHERE = {"batchnorm_relu", "batchnorm_relu_hamming", "batchnorm_relu_backward"}  # bf16.py, in both dtypes
ELSEWHERE |= {"conv2d_shape", "sgd_update", "adamw_update", "corners", "linf_bounds"}  # numbers, bits: own tests
ELSEWHERE |= {"box_sums"}  # float64: test_interval.py


def test_every_function_is_compared():
    assert set(public_functions(reference)) == set(OPERATIONS) | ELSEWHERE


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def compare(found, expected, bound, name):
    for k, (f, e, b) in enumerate(zip(as_tuple(found), as_tuple(expected), as_tuple(bound), strict=True)):
        dtype = np.float64 if k == OPERATIONS[name].wide else np.float32
        assert f.dtype == dtype and f.shape == e.shape, f"{name}[{k}] is {f.dtype} {f.shape}, not {dtype} {e.shape}"
        excess = np.abs(to_numpy(f) - e) - TOLERANCE * b
        worst = np.unravel_index(excess.argmax(), excess.shape)
        assert excess[worst] <= 1e-30, f"{name}[{k}] at {worst}: {to_numpy(f)[worst]}, not {e[worst]} (size {b[worst]})"


def place(a, layout, xp):
    """Pictures and parameters in any layout; indices come as they are made (Numba compiles for each combination)."""
    if not isinstance(a, np.ndarray):
        return a
    return LAYOUTS[layout if a.dtype in (np.float32, np.uint8) else "contiguous"](a, xp)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_backend_agrees_with_the_reference(backend, operation, data):
    """Values, dtype and shape; the arguments stay as they were; the same call gives the same bits."""
    module, xp = load(backend)
    args = data.draw(OPERATIONS[operation].draw)
    placed = [place(a, data.draw(layouts), xp) for a in args]
    exact = [a.astype(np.float64) if isinstance(a, np.ndarray) and a.dtype == np.float32 else a for a in args]
    found = getattr(module, operation)(*placed)
    compare(found, getattr(reference, operation)(*exact), OPERATIONS[operation].magnitude(*exact), operation)
    for given_, original in zip(placed, args, strict=True):
        if isinstance(original, np.ndarray):
            np.testing.assert_array_equal(to_numpy(given_), original, err_msg="an argument was changed")
    for once, again in zip(as_tuple(found), as_tuple(getattr(module, operation)(*placed)), strict=True):
        np.testing.assert_array_equal(to_numpy(once), to_numpy(again), err_msg="the same call gives other bits")


@pytest.mark.parametrize("backend", BACKENDS)
@given(args=OPERATIONS["batchnorm_relu_box_backward"].draw, layout=layouts)
def test_what_is_spent_decides_nothing(backend, args, layout):
    """The gradients may lie where dpoints and dradius did, in whatever layout: their bits are the same."""
    module, xp = load(backend)
    expected = module.batchnorm_relu_box_backward(*[place(a, "contiguous", xp) for a in args])
    spent = [place(a.copy(), layout, xp) for a in args[:2]], [place(a, "contiguous", xp) for a in args[2:]]
    found = module.batchnorm_relu_box_backward(*spent[0], *spent[1], True)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(f), to_numpy(e))


def test_nothing_is_spent_or_added_to_that_a_kernel_cannot_write():
    """Gradients of another dtype, read-only ones, and two in the same memory; a read-only sum."""
    cpu, g = importlib.import_module("nanomr.ops.cpu"), np.random.default_rng(0)
    box, channels = _box(g, (3, 2, 2, 4)), _channels(g, 4)
    box = box[0][-3:], box[1]
    dy = _normal(g, (6, 2, 2, 4))
    expected = cpu.batchnorm_relu_box_backward(dy[:3], dy[3:], *box, *channels)
    same = cpu.batchnorm_relu_box_backward(dy[:3], dy[:3], *box, *channels)
    kept = dy.copy()
    kept.flags.writeable = False
    for dtype, wanted, first, second in (
        (np.float64, expected, dy[:3], dy[3:]),
        (np.float32, expected, kept[:3], kept[3:]),
        (np.float32, same, dy[:3], dy[:3]),
    ):
        given_ = first.astype(dtype, copy=False), second.astype(dtype, copy=False)
        found = cpu.batchnorm_relu_box_backward(*given_, *box, *channels, None, True, True)
        for f, e in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(f, e)
    for name, x, y in (("linear_weight_gradient", dy[:, 0, 0], dy[:, 1, 1]), ("times_sign", dy[0, 0], dy[0, 1])):
        into = np.zeros_like(getattr(cpu, name)(x, y)[0] if name[0] == "l" else x)
        into.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            getattr(cpu, name)(x, y, into)


@pytest.mark.parametrize("layout", ["contiguous", "a column too wide", "float64"])
@pytest.mark.parametrize("name", ["linear_weight_gradient", "times_sign"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=matrices, seed=st.integers(0, 99))
def test_what_is_added_into_an_array(backend, name, layout, shape, seed):
    """That array comes back, with what it had and what the call without it returns; nothing beside it moves."""
    (module, xp), g = load(backend), np.random.default_rng(seed)
    shape = tuple(n + 7 * (n > 8) for n in shape)  # 40 and 23: rows that are a multiple of a tile's, and none
    x, y = _normal(g, shape[:2]), _normal(g, (shape[0], shape[2]) if name == "linear_weight_gradient" else shape[:2])
    x, y = xp.asarray(x), xp.asarray(y)
    found = as_tuple(getattr(module, name)(x, y))[0]
    room = xp.asarray(g.standard_normal((len(found), found.shape[1] + 1)).astype(np.float32))
    into = room[:, :-1] if layout == "a column too wide" else room[:, :-1].copy()
    into = into.astype(np.float64) if layout == "float64" else into
    before, beside = into.copy(), room[:, -1].copy()
    back = as_tuple(getattr(module, name)(x, y, into))[0]
    assert back is into
    np.testing.assert_allclose(to_numpy(into), to_numpy(before + found), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(to_numpy(room[:, -1]), to_numpy(beside))


@pytest.mark.parametrize("operation", ["conv2d", "conv2d_input_gradient", "conv2d_weight_gradient"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "stride", "padding"),
    [
        ((3, 32, 32, 3), (4, 4, 3, 16), 2, (1, 1, 1, 1)),
        ((2, 3, 4, 3), (4, 4, 3, 16), 2, (1, 1, 1, 1)),  # too small for a tile
        ((3, 16, 16, 16), (5, 5, 16, 32), 2, (1, 2, 1, 2)),
        ((2, 32, 32, 3), (3, 3, 3, 64), 1, (1, 1, 1, 1)),
        ((2, 8, 8, 64), (1, 1, 64, 128), 2, (0, 0, 0, 0)),
        ((3, 4, 4, 130), (3, 3, 130, 70), 1, (1, 1, 1, 1)),
    ],
)
def test_convolutions_of_the_networks(backend, operation, x_shape, w_shape, stride, padding, rng):
    """The sizes that the models run, where tiling and blocking set in."""
    module, xp = load(backend)
    x, w = _normal(rng, x_shape), _normal(rng, w_shape)
    b = _normal(rng, w_shape[3])
    dy = _normal(rng, reference.conv2d_shape(x_shape, w_shape, stride, padding))
    args = {
        "conv2d": (x, w, b, stride, padding),
        "conv2d_input_gradient": (dy, w, stride, padding, x_shape),
        "conv2d_weight_gradient": (x, dy, w_shape, stride, padding),
    }[operation]
    exact = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args]
    found = getattr(module, operation)(*[xp.asarray(a) if isinstance(a, np.ndarray) else a for a in args])
    compare(found, getattr(reference, operation)(*exact), OPERATIONS[operation].magnitude(*exact), operation)


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_the_number_of_threads_decides_nothing(chunks, monkeypatch, rng):
    """However the work is cut: by columns, by rows where there are more threads than columns, by images."""
    cpu = importlib.import_module("nanomr.ops.cpu")
    x, w, dy = _normal(rng, (23, 40)), _normal(rng, (40, 70)), _normal(rng, (23, 70))
    images, filters = _normal(rng, (4, 6, 6, 3)), _normal(rng, (4, 4, 3, 16))
    up = _normal(rng, (4, 3, 3, 16))
    geometry = (2, (1, 1, 1, 1))
    deep, window = _normal(rng, (7, 9, 8, 32)), _normal(rng, (3, 3, 32, 32))  # by winograd

    def results():
        return [
            *(cpu.linear(x, w[:, :n], None) for n in (5, 70)),
            *(cpu.linear_input_gradient(dy, w[:n]) for n in (5, 40)),
            cpu.conv2d(images, filters, None, *geometry),
            cpu.conv2d_input_gradient(up, filters, *geometry, images.shape),
            *cpu.linear_weight_gradient(x, dy),
            *cpu.conv2d_weight_gradient(images, up, filters.shape, *geometry),
            *cpu.conv2d_weight_gradient(images[:, :, :1], up[:, :, :1], filters.shape, 2, (1, 1, 1, 2)),
            cpu.conv2d(deep, window, None, 1, (1, 1, 1, 1)),
            *cpu.conv2d_weight_gradient(deep, deep, window.shape, 1, (1, 1, 1, 1)),
        ]

    modules = [importlib.import_module(f"nanomr.ops.cpu.{name}") for name in ("gather_gemm", "convolution", "winograd")]
    for module in modules:
        monkeypatch.setattr(module, "threads", lambda: 1)
    alone = results()
    for module in modules:
        monkeypatch.setattr(module, "threads", lambda: chunks)
    for one, many in zip(alone, results(), strict=True):
        np.testing.assert_array_equal(one, many)


def test_recycled_memory_is_given_up_only_when_too_much_lies_idle(monkeypatch):
    """What is in use does not count: a step of a large network holds far more than the limit, and must find the same
    buffers again in the next."""
    memory = importlib.import_module("nanomr.ops.cpu.memory")
    monkeypatch.setattr(memory, "_local", threading.local())
    size = 2 * memory._SMALL
    monkeypatch.setattr(memory, "_LIMIT", 4 * 3 * size)
    buffers = lambda: sum(len(some) for some in memory._local.pool.values())  # noqa: E731
    held = [memory.empty((size,)) for _ in range(8)]  # more than the limit
    assert buffers() == len(held) == 8
    idle = memory.empty((2 * size,))
    del idle
    held.append(memory.empty((4 * size,)))
    assert buffers() == 10
    del held
    memory.empty((8 * size,))
    assert buffers() == 1


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_training_run_has_the_same_bits_for_any_number_of_threads(clip, monkeypatch, rng):
    """Whatever is summed over images, or over all gradients, is cut by sizes alone. ``threads`` stands for more threads
    than this machine has: it is all that kernels know of them."""
    modules = [importlib.import_module(f"nanomr.ops.cpu.{name}") for name in ("gather_gemm", "convolution", "training")]
    x, rho = rng.random((2, 11, 32, 32, 3), np.float32)
    labels = rng.integers(0, 10, 11)

    def run(threads):
        for module in modules:
            monkeypatch.setattr(module, "threads", lambda: threads)
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        model = small_cnn(seed=0, hidden=20)
        optimizer = SGD(model, clip=clip)
        for _ in range(3):
            manifold_step(model, x, labels, rho * 0.1, 0.4, 900.0)
            optimizer.step(0.05)
        return model.weights

    before = numba.get_num_threads()
    try:
        alone = run(1)
        for threads in (2, 3, 16):
            np.testing.assert_array_equal(run(threads), alone)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("linear", ((4, 7), (5, 3), None)),
        ("linear_input_gradient", ((4, 7), (5, 3))),
        ("linear_weight_gradient", ((4, 7), (5, 3))),
        ("conv2d", ((2, 5, 5, 3), (3, 3, 3, 4), None, 1, (1,) * 4, (2, 5, 4, 4))),
        ("conv2d_input_gradient", ((2, 4, 5, 4), (3, 3, 3, 4), 1, (1,) * 4, [2, 5, 5, 3])),
        ("conv2d_weight_gradient", ((2, 5, 5, 3), (2, 5, 4, 4), [3, 3, 3, 4], 1, (1,) * 4)),
        ("relu_backward", ((2, 3), (2, 4))),
        ("relu_backward", ((2, 3), (4, 3))),
        ("relu_hamming_backward", ((3, 3), (6, 3), 8.0, (2,))),
        ("relu_box", ((3, 3), (2, 3))),
        ("relu_box", ((4, 3), (2, 4))),
        ("box_sums", ((3, 3), (2, 3))),
        ("relu_box_backward", ((4, 3), (2, 3), (2, 3), (2, 3))),
        ("relu_box_backward", ((4, 3), (4, 3), (4, 3), (2, 3))),
        ("batchnorm_relu_box", ((3, 3), (2, 3), *[(3,)] * 4)),
        ("batchnorm_relu_box", ((4, 3), (2, 4), *[(3,)] * 4)),
        ("batchnorm_relu_box_backward", ((4, 3), (2, 3), (2, 3), (2, 3), *[(3,)] * 4)),
        ("batchnorm_relu_box_backward", ((4, 3), (4, 3), (4, 3), (2, 3), *[(3,)] * 4)),
        ("linear_weight_gradient", ((4, 7), (4, 3), (3, 7))),
        ("times_sign", ((2, 3), (3, 2))),
        ("times_sign", ((2, 3), (2, 3), (2, 1))),
        ("rivals_gain", ((2, 3), (4, 5), (2,))),
        ("rivals_gain", ((2, 3), (3, 1), (2,))),  # labels are ones: of a second class
        ("rivals_gain_backward", ((2, 4), (2, 3), (3, 5), (2,))),
        ("chord", ((2, 3), (3, 3))),
        ("chord_backward", ((2, 3), (2, 3), (2, 3), (2, 4))),
        ("chord_backward", ((2, 3), (1, 3), (2, 3), (2, 3))),
        ("lines_down", ((2, 5, 4), (2, 4), (2, 4), (2, 3))),
        ("lines_down", ((2, 5, 4), (3, 4), (3, 4), (3, 4))),
        ("lines_up", ((2, 5, 4), (2, 6, 4), (2, 5), (2, 5), *[(2, 4)] * 3)),
        ("lines_up", ((2, 5, 4), (2, 5, 4), (2, 5), (2, 4), *[(2, 4)] * 3)),
        ("lines_reach", ((2, 5, 4), (2, 4), (2, 3))),
        ("lines_corner", ((2, 5, 4), (2, 5), (2, 5), (1, 4), (1, 4))),
        ("lines_corner", ((2, 5, 4), (2, 4), (2, 5), (2, 4), (2, 4))),
        ("scale_down", ((2, 5, 3, 4), (3,), (3,))),
        ("scale_down", ((2, 5, 3, 4), (4,), (1,))),
        ("scale_up", ((2, 5, 3, 4), (2, 5, 2, 4), (2, 5), (4,), (4,))),
        ("scale_up", ((2, 5, 3, 4), (2, 5, 3, 4), (5, 2), (4,), (4,))),
        ("scale_up", ((2, 5, 3, 4), (2, 5, 3, 4), (2, 5), (3,), (3,))),
        ("linf_step", ((3, 4), (3, 4), (2,), (3, 4), 0.1)),
        ("linf_step", ((3, 4), (2, 4), (3,), (3, 4), 0.1)),
        ("l2_step", ((3, 4), (3, 4), (3,), (1, 4), 0.1)),
        ("l1_step", ((3, 4), (3, 4), (3, 1), (3, 4), 0.1, 2)),
        ("batchnorm_backward", ((2, 3, 3, 4), (2, 3, 2, 4), *[(4,)] * 5)),
        ("batchnorm_relu_backward", ((2, 3, 3, 4), (3, 3, 3, 4), *[(4,)] * 4)),
        ("scale_channels", ((2, 3, 3, 4), (4,), (1, 3, 3, 4))),
    ],
)
def test_arrays_that_do_not_fit_are_refused(operation, arguments):
    """The CPU's kernels do not look where they read. (Lists are shapes; the padding, of ones, is itself.)"""
    cpu = importlib.import_module("nanomr.ops.cpu")
    made = [
        np.ones(a, np.float32) if isinstance(a, tuple) and a != (1,) * 4 else tuple(a) if isinstance(a, list) else a
        for a in arguments
    ]
    with pytest.raises(ValueError, match="fit"):
        getattr(cpu, operation)(*made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_stay_valid_while_others_are_computed(backend, rng):
    """Memory may be recycled, but not while a result, or a view of it, is still in somebody's hands."""
    module, xp = load(backend)
    x = xp.asarray(_normal(rng, (8, 16, 16, 16)))
    w = xp.asarray(_normal(rng, (3, 3, 16, 16)))
    results = [module.relu(x), module.conv2d(x, w, None, 1, (1, 1, 1, 1)), module.expand_pair(x, x)]
    views = [module.conv2d(x, w, None, 1, (1, 1, 1, 1))[2:], module.relu(-x).reshape(8, -1)]
    kept = [to_numpy(r).copy() for r in results + views]
    for _ in range(3):
        module.relu(x + 1), module.conv2d(-x, w, None, 1, (1, 1, 1, 1)), module.expand_pair(x, -x)
    for result, copy in zip(results + views, kept, strict=True):
        np.testing.assert_array_equal(to_numpy(result), copy)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=conv_cases)
@fewer(0.4)
def test_conv2d_shape(backend, case):
    module, _ = load(backend)
    assert module.conv2d_shape(case.x_shape, case.w_shape, case.stride, case.padding) == case.y_shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d_refuses_what_does_not_fit(backend):
    module, xp = load(backend)
    x = xp.zeros((1, 3, 5, 2), xp.float32)
    for w_shape, words in (((1, 1, 3, 4), "expects 3 channels"), ((4, 1, 2, 4), "does not fit")):
        with pytest.raises(ValueError, match=words):
            module.conv2d(x, xp.zeros(w_shape, xp.float32), None, 1, (0, 0, 0, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    size=st.integers(1, 100), momentum=st.sampled_from([0.0, 0.9]), decay=st.sampled_from([0.0, 5e-4, 0.5]), seed=seeds
)
def test_sgd_update(backend, size, momentum, decay, seed):
    """In place; the gradient is only read."""
    module, xp = load(backend)
    g = np.random.default_rng(seed)
    w, gradient, velocity = (_normal(g, size) for _ in range(3))
    args = [xp.asarray(a.copy()) for a in (w, gradient, velocity)]
    module.sgd_update(*args, 0.1, momentum, decay)
    expected = momentum * velocity.astype(np.float64) + gradient + decay * w
    np.testing.assert_allclose(to_numpy(args[2]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_numpy(args[0]), w - 0.1 * expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(args[1]), gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@given(size=st.integers(1, 300), decay=st.sampled_from([0.0, 1e-2]), seed=seeds)
def test_adamw_update(backend, size, decay, seed):
    """Three steps, in place; the gradients are only read."""
    module, xp = load(backend)
    g = np.random.default_rng(seed)
    w, *gradients = (_normal(g, size) for _ in range(4))
    found = [xp.asarray(a) for a in (w.copy(), np.zeros_like(w), np.zeros_like(w))]
    expected, mean, square = w.astype(np.float64), np.zeros(size), np.zeros(size)
    for t, gradient in enumerate(gradients, 1):
        given_ = xp.asarray(gradient)
        module.adamw_update(found[0], given_, *found[1:], t, 0.01, 0.9, 0.99, decay)
        np.testing.assert_array_equal(to_numpy(given_), gradient)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient.astype(np.float64) ** 2
        way = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.99**t)) + 1e-8)
        expected = (1 - 0.01 * decay) * expected - 0.01 * way
    for a, b in zip(found, (expected, mean, square), strict=True):
        np.testing.assert_allclose(to_numpy(a), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=images(n=(1, 5), size=(1, 7), channels=(1, 5)), eps=st.sampled_from([2 / 255, 8 / 255, 1.0]), seed=seeds)
def test_corners_are_the_bits_of_the_words(backend, shape, eps, seed):
    """Equal on every device, to the bit: one sign for each bit, the least significant first; a set bit is -eps."""
    module, xp = load(backend)
    size = int(np.prod(shape))
    words = streams.words(seed, streams.CORNERS, 0, -(-size // 64))
    rho = module.corners(xp.asarray(words), shape, eps)
    bits = [int(words[i // 64]) >> (i % 64) & 1 for i in range(size)]
    expected = np.where(bits, -np.float32(eps), np.float32(eps)).reshape(shape)
    assert rho.dtype == np.float32
    np.testing.assert_array_equal(to_numpy(rho), expected)


# --- special values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_relu_of_special_values(backend, special, size):
    """A NaN must come out as one: it is how a diverged run shows."""
    module, xp = load(backend)
    z = np.full((1, size), -1, np.float32)
    for at in {0, size // 2, size - 1}:
        z[0, at] = special
    np.testing.assert_array_equal(to_numpy(module.relu(xp.asarray(z))), np.where(z == -1, 0, np.maximum(z, 0)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_nan_passes_through_a_step(backend, size):
    """An attack on a broken network must not look like one that went on."""
    module, xp = load(backend)
    x, gradient = np.full((2, 3, size), 0.5, np.float32), np.ones((2, 3, size), np.float32)
    x[0, 0, size // 2], gradient[1, 2, size // 2] = np.nan, np.nan
    x0, sizes = xp.full(x.shape, 0.5, xp.float32), xp.full(2, 0.25, xp.float32)
    y = to_numpy(module.linf_step(xp.asarray(x), xp.asarray(gradient), sizes, x0, 0.1))
    np.testing.assert_array_equal(y, np.where(np.isnan(x + gradient), np.float32(np.nan), np.float32(0.59999996)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_nan_passes_through_the_hamming_kernels(backend, size, rng):
    """In y at its own place, in ``squares`` of its own sample only, and in the gradient."""
    module, xp = load(backend)
    for branch in range(3):
        z = _normal(rng, (6, size))
        z[2 * branch, size // 2] = np.nan
        weight = xp.ones(2, xp.float32)
        y, squares = module.relu_hamming(xp.asarray(z), 8.0)
        np.testing.assert_array_equal(np.isnan(to_numpy(y)), np.isnan(z))
        assert np.isnan(to_numpy(squares)).tolist() == [branch > 0, False]
        dz = to_numpy(module.relu_hamming_backward(xp.ones((6, size), xp.float32), xp.asarray(z), 8.0, weight))
        assert np.isnan(dz[2 * branch, size // 2]) == (branch > 0)
        assert not np.isnan(dz[1::2]).any()
    u, v = _normal(rng, (2, 2, size))
    v[0, 0] = np.nan
    y, squares = module.relu_hamming_pair(xp.asarray(u), xp.asarray(v), 8.0)
    assert np.isnan(to_numpy(squares)).tolist() == [True, False]
    assert np.isnan(to_numpy(y)[[2, 4], 0]).all() and np.isnan(to_numpy(y)).sum() == 2


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=feature_maps, alpha=st.sampled_from([8.0, 100.0]), seed=seeds)
@fewer(0.4)
def test_hamming_of_saturated_and_equal_branches(backend, shape, alpha, seed):
    """Huge |z|: every disagreement counts 4, and there is no gradient; z+ = z-: nothing at all, to the bit."""
    module, xp = load(backend)
    g = np.random.default_rng(seed)
    z = np.float32(1e4) * g.choice(np.float32([-1, 1]), (3 * shape[0], *shape[1:]))
    _, plus, minus = np.split(z, 3)
    _, squares = module.relu_hamming(xp.asarray(z), alpha)
    disagreements = (plus != minus).reshape(shape[0], -1).sum(1)
    np.testing.assert_allclose(to_numpy(squares), 4 * disagreements, rtol=2e-6)
    weight = xp.ones(shape[0], xp.float32)
    dz = module.relu_hamming_backward(xp.zeros_like(xp.asarray(z)), xp.asarray(z), alpha, weight)
    np.testing.assert_allclose(to_numpy(dz), 0, atol=2e-6)
    z = _normal(g, z.shape, special=True)
    z[2 * shape[0] :] = z[shape[0] : 2 * shape[0]]
    assert not to_numpy(module.relu_hamming(xp.asarray(z), alpha)[1]).any()
    dz = module.relu_hamming_backward(xp.zeros_like(xp.asarray(z)), xp.asarray(z), alpha, weight)
    np.testing.assert_array_equal(to_numpy(dz), 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_backward_at_zero(backend):
    module, xp = load(backend)
    z = np.tile(np.float32([0.0, -0.0, 1e-30, -1e-30]), 5)[None]
    dz = module.relu_backward(xp.full(z.shape, 3, xp.float32), xp.asarray(z))
    np.testing.assert_array_equal(to_numpy(dz), np.where(z > 0, 3, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@given(offset=st.floats(-300, 300), size=st.integers(2, 400), c=st.integers(1, 33), seed=seeds)
@example(offset=300.0, size=400, c=16, seed=0)
@fewer(0.4)
def test_variance_survives_a_large_mean(backend, offset, size, c, seed):
    """mean(x^2) - mean(x)^2 in float32 would lose every digit here, and may be negative."""
    module, xp = load(backend)
    x = (np.random.default_rng(seed).standard_normal((size, 1, 1, c)) * 0.1 + offset).astype(np.float32)
    _, var = module.batchnorm_statistics(xp.asarray(x))
    exact = x.astype(np.float64).var((0, 1, 2))
    np.testing.assert_allclose(to_numpy(var), exact, rtol=1e-4, atol=1e-13 * offset**2)


# --- negative controls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data())
@fewer(0.1)
def test_the_comparison_notices_small_errors(operation, data):
    """One entry off by 1e-4 of its size, or computed in half the digits: not within the tolerance."""
    args = data.draw(OPERATIONS[operation].draw)
    exact = [a.astype(np.float64) if isinstance(a, np.ndarray) and a.dtype == np.float32 else a for a in args]
    expected, bound = getattr(reference, operation)(*exact), OPERATIONS[operation].magnitude(*exact)
    wide = OPERATIONS[operation].wide
    wrong = [np.array(e, np.float64 if k == wide else np.float32) for k, e in enumerate(as_tuple(expected))]
    compare(tuple(wrong), as_tuple(expected), as_tuple(bound), operation)
    k = data.draw(st.integers(0, len(wrong) - 1))
    size = as_tuple(bound)[k]
    at = np.unravel_index(size.argmax(), size.shape)
    wrong[k][at] += 1e-4 * size[at] + 1e-20
    with pytest.raises(AssertionError, match=operation):
        compare(tuple(wrong), as_tuple(expected), as_tuple(bound), operation)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("left", [0, 8])
def test_a_crop_beside_its_image_writes_nowhere_else(flip, left):
    """Three columns, moved by four: the row where no pixel is left ends where the array does."""
    room, images = np.full(4 * 9 + 64, 7, np.float32), np.full((1, 4, 9), 255, np.uint8)
    draws = np.zeros(1, np.int64), np.array([4]), np.array([left]), np.array([flip])
    training._crop_flip(images, *draws, 4, 3, room[: 4 * 9].reshape(1, 4, 9))
    assert not room[: 4 * 9].any() and (room[4 * 9 :] == 7).all()


def test_crops_of_no_images():
    none = np.zeros(0, np.int64)
    assert training.crop_flip(np.zeros((5, 8, 8, 3), np.uint8), none, none, none, none.astype(bool)).shape == (
        0,
        8,
        8,
        3,
    )
