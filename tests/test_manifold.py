"""Corner pairs, graph Laplacians, and Hamming embeddings against naive loops and against each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr.losses import intrinsic
from nanomr.manifold import (
    corner_pairs,
    hamming_distance,
    hamming_embedding,
    heat_kernel,
    laplacian,
    resampled_laplacian,
)
from nanomr.testing.strategies import fewer, images, seeds

# --- corner pairs -----------------------------------------------------------------------------------------------------


@given(
    shape=images(n=(1, 3), size=(1, 6)), eps=st.sampled_from([2 / 255, 8 / 255]), seed=seeds, step=st.integers(0, 9**9)
)
def test_corners_are_at_distance_eps(shape, eps, seed, step):
    """Every coordinate is +eps or -eps: x + rho and x - rho are opposite corners of the ball around x."""
    for dtype in (np.float32, np.float64):
        rho = corner_pairs(np.zeros(shape, dtype), eps, seed, step)
        assert rho.shape == shape and rho.dtype == dtype
        np.testing.assert_array_equal(np.abs(rho), np.full(shape, np.float32(eps), dtype))


def test_corners_are_drawn_afresh_for_each_step_and_seed():
    x = np.zeros((4, 32, 32, 3), np.float32)
    draws = [corner_pairs(x, 0.1, *key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, a in enumerate(draws):
        assert abs(np.sign(a).mean()) < 5 * a.size**-0.5
        for b in draws[:i]:
            agreement = (a == b).mean()
            assert abs(agreement - 0.5) < 3 * a.size**-0.5  # six standard deviations
    np.testing.assert_array_equal(corner_pairs(x, 0.1, 1, 0), draws[2])


def test_corners_do_not_depend_on_the_batch_size_before_them():
    """The sign of a pixel is a matter of (seed, step, position): a longer batch begins with the same corners."""
    short, long = (corner_pairs(np.zeros((n, 5, 5, 3), np.float32), 0.1, 3, 4) for n in (2, 5))
    np.testing.assert_array_equal(short, long[:2])


# --- Laplacians -------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 5), k=st.integers(1, 4), seed=seeds)
def test_equation_2_is_its_double_sum(n, k, seed):
    g = np.random.default_rng(seed)
    f, weights = g.standard_normal((n, k)), g.uniform(-1, 2, (n, n))
    total = sum(((f[i] - f[j]) ** 2).sum() * weights[i, j] for i in range(n) for j in range(n))
    assert laplacian(f, weights)[0] == pytest.approx(total / n**2, rel=1e-12, abs=1e-14)


@given(n=st.integers(1, 4), c=st.integers(1, 4), k=st.integers(1, 3), seed=seeds)
def test_equation_7_is_its_triple_sum(n, c, k, seed):
    g = np.random.default_rng(seed)
    f, weights = g.standard_normal((n, c, k)), g.uniform(-1, 2, (n, c, c))
    total = 0.0
    for i, j, m in np.ndindex(n, c, c):
        total += ((f[i, j] - f[i, m]) ** 2).sum() * weights[i, j, m]
    assert resampled_laplacian(f, weights)[0] == pytest.approx(total / (c * n) ** 2, rel=1e-12, abs=1e-14)


@given(n=st.integers(1, 5), k=st.integers(1, 4), seed=seeds)
def test_equation_7_of_pairs_is_the_intrinsic_loss(n, k, seed):
    """c = 2, weight 1: the two ordered pairs (+, -) and (-, +), over (2 N)^2, which is intrinsic / (2 N)."""
    f = np.random.default_rng(seed).standard_normal((n, 2, k))
    value, gradient = resampled_laplacian(f, np.ones((n, 2, 2)))
    pair, d_plus, d_minus = intrinsic(f[:, 0], f[:, 1])
    assert value == pytest.approx(pair / (2 * n), rel=1e-12)
    np.testing.assert_allclose(gradient, np.stack([d_plus, d_minus], 1) / (2 * n), rtol=1e-12)


@given(n=st.integers(2, 5), k=st.integers(1, 4), seed=seeds)
def test_laplacian_invariances(n, k, seed):
    """It sees differences alone, in a graph without direction: L and L^T weigh the same."""
    g = np.random.default_rng(seed)
    f, weights = g.standard_normal((n, k)), g.uniform(0, 2, (n, n))
    value, gradient = laplacian(f, weights)
    for other in (laplacian(f + g.standard_normal(k), weights), laplacian(f, weights.T)):
        assert other[0] == pytest.approx(value, rel=1e-11)
        np.testing.assert_allclose(other[1], gradient, atol=1e-12)
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-12)
    assert laplacian(np.ones((n, k)), weights)[0] == 0
    order = g.permutation(n)
    assert laplacian(f[order], weights[np.ix_(order, order)])[0] == pytest.approx(value, rel=1e-12)


@given(sets=st.integers(1, 3), c=st.integers(1, 4), d=st.integers(1, 4), scale=st.floats(0.1, 10), seed=seeds)
def test_heat_kernel(sets, c, d, scale, seed):
    x = np.random.default_rng(seed).standard_normal((sets, c, d))
    kernel = heat_kernel(x, scale)
    assert kernel.shape == (sets, c, c)
    for i, j, k in np.ndindex(kernel.shape):
        squared = sum((a - b) ** 2 for a, b in zip(x[i, j], x[i, k], strict=True))
        assert kernel[i, j, k] == pytest.approx(math.exp(-squared / scale), rel=1e-12)
    np.testing.assert_array_equal(heat_kernel(x[0], scale), kernel[0])
    assert heat_kernel(x.astype(np.float32), scale).dtype == np.float32


# --- Hamming embeddings -----------------------------------------------------------------------------------------------


def net(seed=0, dtype=np.float64):
    return mr.models.mlp((12, 9, 6, 3), seed=seed, input_shape=(2, 2, 3)).astype(dtype)


def pre_activations(model, x):
    """The inputs of the two ReLU layers, by plain matrix products."""
    z1 = x.reshape(len(x), -1) @ model.children["fc1"].params["weight"] + model.children["fc1"].params["bias"]
    z2 = np.maximum(z1, 0) @ model.children["fc2"].params["weight"] + model.children["fc2"].params["bias"]
    return [z1, z2]


@fewer(0.5)
@given(n=st.integers(1, 4), seed=seeds)
def test_hamming_embedding_tells_the_branches(n, seed):
    model, x = net(seed % 7), np.random.default_rng(seed).random((n, 2, 2, 3))
    bits = hamming_embedding(model, x)
    assert [b.dtype for b in bits] == [bool, bool]
    for found, z in zip(bits, pre_activations(model, x), strict=True):
        np.testing.assert_array_equal(found, z > 0)


@fewer(0.5)
@given(n=st.integers(1, 4), seed=seeds)
def test_hamming_distance_is_a_distance(n, seed):
    model = net(seed % 7)
    x, y, w = np.random.default_rng(seed).standard_normal((3, n, 2, 2, 3))
    xy, yx, xw, wy = (hamming_distance(model, *pair) for pair in ((x, y), (y, x), (x, w), (w, y)))
    assert xy.shape == (n,) and xy.dtype.kind == "i"
    expected = sum(
        ((a > 0) != (b > 0)).sum(1) for a, b in zip(pre_activations(model, x), pre_activations(model, y), strict=True)
    )
    np.testing.assert_array_equal(xy, expected)
    np.testing.assert_array_equal(xy, yx)
    assert (xy <= xw + wy).all() and not hamming_distance(model, x, x).any()


@fewer(0.5)
@given(n=st.integers(1, 3), seed=seeds)
def test_the_regulariser_tends_to_the_hamming_distance(n, seed):
    """sum |tanh(alpha z) - tanh(alpha z')| / 2 over all ReLUs -> H(x, x'), to the bit once alpha |z| is large."""
    model = net(seed % 7)
    x, y = np.random.default_rng(seed).standard_normal((2, n, 2, 2, 3))
    layers = list(zip(pre_activations(model, x), pre_activations(model, y), strict=True))
    margin = min(np.abs(z).min() for pair in layers for z in pair)
    alpha = 20 / margin
    soft = sum(np.abs(np.tanh(alpha * a) - np.tanh(alpha * b)).sum(1) / 2 for a, b in layers)
    np.testing.assert_allclose(soft, hamming_distance(model, x, y), atol=1e-9)


def test_hamming_distance_of_a_network_without_relus():
    """A linear network has no branches: no bits, and distance 0 for each of the N inputs."""
    model = mr.models.mlp((12, 3), input_shape=(2, 2, 3))
    x = np.zeros((4, 2, 2, 3), np.float32)
    assert hamming_embedding(model, x) == []
    distance = hamming_distance(model, x, x + 1)
    assert np.shape(distance) == (4,) and not np.any(distance)
