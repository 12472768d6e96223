"""Losses: values against their formulas, gradients against numerical derivatives, and the Hamming tap."""

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr.gradcheck import GradientError
from nanomr.layers import PairBatch, ReLU
from nanomr.losses import Hamming, cross_entropy, hamming, intrinsic, kl_divergence, max_mahalanobis
from nanomr.manifold import laplacian, resampled_laplacian
from nanomr.ops import reference
from nanomr.testing.strategies import fewer, seeds

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
alphas = st.sampled_from([0.5, 2.0, 8.0])

# --- the contract of a loss: (value, gradient by each input) ----------------------------------------------------------


@dataclass
class Loss:
    function: Callable
    inputs: Callable  # (generator, (n, k)) -> the arrays by which it is differentiated
    gradients: int = 1


def _labels(n, k):
    return np.arange(n) * 7 % k


def _pair(g, shape):
    return g.standard_normal((2, *shape)) * 0.5


LOSSES = {
    "cross-entropy": Loss(
        lambda f: cross_entropy(f, _labels(*f.shape)), lambda g, s: [g.standard_normal((s[0], s[1] + 1))]
    ),
    "kl divergence": Loss(kl_divergence, lambda g, s: g.standard_normal((2, s[0], s[1] + 1))),
    "max-mahalanobis": Loss(
        lambda f: max_mahalanobis(f, _labels(*f.shape)), lambda g, s: [5 * g.standard_normal((s[0], s[1] + 1))]
    ),
    "intrinsic": Loss(intrinsic, _pair),
    "hamming, batch": Loss(lambda a, b: hamming(a, b, alpha=2.0), _pair),
    "hamming, per sample": Loss(lambda a, b: hamming(a, b, alpha=2.0, per_sample=True), _pair),
    "hamming, alpha 8": Loss(lambda a, b: hamming(a, b, alpha=8.0), lambda g, s: 0.1 * _pair(g, s)),
    "hamming of images": Loss(lambda a, b: hamming(a, b, per_sample=True), lambda g, s: 0.1 * _pair(g, (*s, 2, 2))),
    "laplacian": Loss(
        lambda f: laplacian(f, np.random.default_rng(len(f)).uniform(0, 2, (len(f), len(f)))),  # not symmetric
        lambda g, s: [g.standard_normal((s[0] + 1, s[1]))],
    ),
    "resampled laplacian": Loss(
        lambda f: resampled_laplacian(f, np.random.default_rng(f.size).uniform(0, 2, (*f.shape[:2], f.shape[1]))),
        lambda g, s: [g.standard_normal((s[0], 3, s[1]))],
    ),
}
kinds = pytest.mark.parametrize("kind", LOSSES)


def make(kind, shape, seed, dtype=np.float64):
    return [a.astype(dtype) for a in LOSSES[kind].inputs(np.random.default_rng(seed), shape)]


@kinds
@given(shape=sizes, seed=seeds)
def test_gradients(kind, shape, seed):
    mr.gradcheck(LOSSES[kind].function, *make(kind, shape, seed))


@kinds
@given(shape=sizes, seed=seeds)
def test_gradients_by_the_complex_step(kind, shape, seed):
    """All of them are analytic where the norms are not zero: exact to rounding."""
    mr.gradcheck(LOSSES[kind].function, *make(kind, shape, seed), method="complex", rtol=1e-9)


@kinds
@fewer(0.2)
@given(shape=sizes, seed=seeds)
def test_every_entry_of_the_gradient(kind, shape, seed):
    inputs, h = make(kind, shape, seed), 1e-20
    for claimed, a, i in zip(LOSSES[kind].function(*inputs)[1:], inputs, range(2), strict=False):
        for at in np.ndindex(a.shape):
            moved = [b.astype(complex) for b in inputs]
            moved[i][at] += 1j * h
            assert np.imag(LOSSES[kind].function(*moved)[0]) / h == pytest.approx(claimed[at], rel=1e-8, abs=1e-12)


@kinds
@fewer(0.2)
@given(shape=sizes, seed=seeds, dtype=st.sampled_from([np.float32, np.float64]))
def test_losses_keep_dtype_and_inputs(kind, shape, seed, dtype):
    """dtype in = dtype out; inputs unchanged; every gradient has memory of its own."""
    inputs = make(kind, shape, seed, dtype)
    copies = [a.copy() for a in inputs]
    value, *gradients = LOSSES[kind].function(*inputs)
    if "laplacian" not in kind:  # the weights drawn here are float64
        assert [a.dtype for a in (value, *gradients)] == [dtype] * (1 + len(inputs))
    for a, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(a, copy)
    arrays = [*inputs, *gradients]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


MUTANTS = {
    "1 % too large": lambda value, *g: (value, *[1.01 * a for a in g]),
    "last gradient 1 % too large": lambda value, *g: (value, *g[:-1], 1.01 * g[-1]),
    "reversed": lambda value, *g: (value, *[a.reshape(-1)[::-1].reshape(a.shape) for a in g]),
    "wrong sign": lambda value, *g: (value, *g[:-1], -g[-1]),
    "one entry forgotten": lambda value, *g: (value, *[np.where(np.abs(a) == np.abs(a).max(), 0, a) for a in g]),
    "value of the batch's sum": lambda value, *g: (3 * value, *g),
}


@kinds
@pytest.mark.parametrize("method", ["central", "complex"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_gradient_checks_catch_mutants(kind, mutant, method):
    inputs = make(kind, (3, 4), 0)
    with pytest.raises(GradientError):
        mr.gradcheck(lambda *a: MUTANTS[mutant](*LOSSES[kind].function(*a)), *inputs, method=method)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_laplacians_keep_the_dtype(dtype, rng):
    f, weights = rng.standard_normal((3, 2)).astype(dtype), rng.random((3, 3)).astype(dtype)
    assert [a.dtype for a in laplacian(f, weights)] == [dtype, dtype]


# --- the divergence of two softmaxes ----------------------------------------------------------------------------------


@given(shape=sizes, seed=seeds)
def test_the_divergence_is_its_sum_of_logarithms_and_no_gradient_moves_a_constant(shape, seed):
    z, moved = np.random.default_rng(seed).standard_normal((2, *shape))
    p, q = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (z, moved))
    value, by_z, by_moved = kl_divergence(z, moved)
    assert value == pytest.approx((p * np.log(p / q)).sum(1).mean(), abs=1e-14) and value >= -1e-15
    np.testing.assert_allclose([by_z.sum(1), by_moved.sum(1)], 0, atol=1e-14)
    assert all(abs(a).max() < 1e-15 for a in kl_divergence(z, z))


def test_the_divergence_of_confident_logits_is_finite():
    """1e4 is beyond exp's range, in float32 and float64, and probabilities are 0."""
    z = np.array([[1e4, 0, -1e4], [0, 1e4, 0]], np.float32)
    value, *gradients = kl_divergence(z, z[::-1].copy())
    assert value == pytest.approx(1e4) and all(np.isfinite(g).all() for g in gradients)


# --- cross-entropy ----------------------------------------------------------------------------------------------------


@given(shape=sizes, seed=seeds)
def test_cross_entropy_is_minus_the_log_probability(shape, seed):
    g = np.random.default_rng(seed)
    logits, labels = g.standard_normal(shape), g.integers(0, shape[1], shape[0])
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    value, gradient = cross_entropy(logits, labels)
    assert value == pytest.approx(-np.mean([np.log(probability[i, label]) for i, label in enumerate(labels)]))
    np.testing.assert_allclose(gradient, (probability - np.eye(shape[1])[labels]) / shape[0], atol=1e-14)
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-14)


@given(shape=sizes, shift=st.floats(-100, 100), seed=seeds)
def test_cross_entropy_does_not_see_a_shift(shape, shift, seed):
    g = np.random.default_rng(seed)
    logits, labels = g.standard_normal(shape), g.integers(0, shape[1], shape[0])
    value, gradient = cross_entropy(logits, labels)
    shifted_value, shifted_gradient = cross_entropy(logits + shift * g.standard_normal((shape[0], 1)), labels)
    assert shifted_value == pytest.approx(value, abs=1e-11)
    np.testing.assert_allclose(shifted_gradient, gradient, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_large_logits(dtype):
    """1e4 apart: the loss of the wrong label is their difference, of the right one 0; nothing overflows."""
    logits = np.array([[1e4, 0, -1e4], [1e4, 0, -1e4]], dtype)
    value, gradient = cross_entropy(logits, np.array([2, 0]))
    assert value == pytest.approx(1e4)
    np.testing.assert_array_equal(gradient, np.array([[0.5, 0, -0.5], [0, 0, 0]], dtype))


# --- intrinsic --------------------------------------------------------------------------------------------------------


@given(shape=sizes, seed=seeds)
def test_intrinsic_is_the_mean_squared_distance(shape, seed):
    plus, minus = make("intrinsic", shape, seed)
    value, d_plus, d_minus = intrinsic(plus, minus)
    assert value == pytest.approx(np.mean([np.linalg.norm(a - b) ** 2 for a, b in zip(plus, minus, strict=True)]))
    swapped = intrinsic(minus, plus)
    assert swapped[0] == value
    np.testing.assert_array_equal(swapped[1], d_minus)
    np.testing.assert_array_equal(swapped[2], d_plus)
    assert intrinsic(plus, plus)[0] == 0


# --- hamming: the formula ---------------------------------------------------------------------------------------------


@given(shape=sizes, alpha=alphas, seed=seeds)
def test_hamming_is_its_formula(shape, alpha, seed):
    plus, minus = make("hamming, batch", shape, seed)
    distance = np.tanh(alpha * plus) - np.tanh(alpha * minus)
    assert hamming(plus, minus, alpha)[0] == pytest.approx(np.linalg.norm(distance) / (2 * plus.size))
    per_sample = np.mean([np.linalg.norm(d) / (2 * d.size) for d in distance])
    assert hamming(plus, minus, alpha, per_sample=True)[0] == pytest.approx(per_sample)


@given(shape=sizes, alpha=alphas, per_sample=st.booleans(), seed=seeds)
def test_hamming_is_symmetric(shape, alpha, per_sample, seed):
    plus, minus = make("hamming, batch", shape, seed)
    value, d_plus, d_minus = hamming(plus, minus, alpha, per_sample)
    swapped = hamming(minus, plus, alpha, per_sample)
    assert swapped[0] == value
    np.testing.assert_array_equal(swapped[1], d_minus)
    np.testing.assert_array_equal(swapped[2], d_plus)


@given(shape=sizes, alpha=alphas, per_sample=st.booleans(), seed=seeds)
def test_hamming_at_its_kink(shape, alpha, per_sample, seed):
    """z+ = z-: the value is 0 and the gradient is pinned to 0 (the subgradient of least norm), not NaN."""
    z = make("hamming, batch", shape, seed)[0]
    value, *gradients = hamming(z, z.copy(), alpha, per_sample)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_hamming_of_one_equal_sample_is_finite(rng):
    """Per sample, one pair may be equal while the others are not."""
    plus, minus = rng.standard_normal((2, 3, 4))
    minus[1] = plus[1]
    _, d_plus, d_minus = hamming(plus, minus, per_sample=True)
    for gradient in (d_plus, d_minus):
        assert np.isfinite(gradient).all() and (gradient[1] == 0).all() and (gradient[[0, 2]] != 0).all()


@given(z=st.floats(-2, 2), distances=st.lists(st.floats(0, 2), min_size=2, max_size=2), alpha=alphas)
def test_hamming_grows_with_the_distance(z, distances, alpha):
    """Of one element: pulling the second pre-activation away never lowers it."""
    near, far = sorted(distances)
    for sign in (1, -1):
        values = [hamming(np.array([[z]]), np.array([[z + sign * d]]), alpha)[0] for d in (near, far)]
        assert values[0] <= values[1] + 1e-15
        if far - near > 1e-3 and alpha * (abs(z) + far) < 5:  # beyond, tanh is flat to rounding
            assert values[0] < values[1]


@given(shape=sizes, alpha=alphas, per_sample=st.booleans(), seed=seeds)
def test_hamming_does_not_see_the_order_of_the_batch(shape, alpha, per_sample, seed):
    plus, minus = make("hamming, batch", shape, seed)
    order = np.random.default_rng(seed).permutation(len(plus))
    value, d_plus, _ = hamming(plus, minus, alpha, per_sample)
    other, d_other, _ = hamming(plus[order], minus[order], alpha, per_sample)
    assert other == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(d_other, d_plus[order], rtol=1e-12)


@given(shape=sizes, alpha=alphas, seed=seeds)
def test_per_sample_and_batch_norms(shape, alpha, seed):
    """Equal for one sample; for N the norm of the batch is the smaller, by at most sqrt(N) (Cauchy-Schwarz)."""
    plus, minus = make("hamming, batch", shape, seed)
    batch, sample = (hamming(plus, minus, alpha, per_sample=p)[0] for p in (False, True))
    assert batch <= sample * (1 + 1e-12) and sample <= batch * len(plus) ** 0.5 * (1 + 1e-12)
    one, same = (hamming(plus[:1], minus[:1], alpha, per_sample=p) for p in (False, True))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


# --- hamming: the tap -------------------------------------------------------------------------------------------------

taps = st.builds(dict, alpha=alphas, weight=st.floats(0.1, 3), per_sample=st.booleans())


def through_relu(z, dy, options, pair=False):
    """(y, value, dz) of one ReLU under a Hamming tap."""
    tap, relu = Hamming(**options), ReLU()
    given_ = PairBatch(z[: len(z) // 3], z[len(z) // 3 : 2 * (len(z) // 3)] - z[: len(z) // 3]) if pair else z
    y, cache = relu.forward(given_, tap=tap)
    return y, tap.value, relu.backward(dy, cache)


@given(shape=sizes, options=taps, dtype=st.sampled_from([np.float32, np.float64]), seed=seeds)
def test_the_tap_is_relu_plus_the_formula(shape, options, dtype, seed):
    """Fused into ReLU, in float32 (kernels) and float64: what ReLU and ``losses.hamming`` do one after the other."""
    g = np.random.default_rng(seed)
    n = shape[0]
    z, dy = g.standard_normal((2, 3 * n, *shape[1:])).astype(dtype)
    y, value, dz = through_relu(z, dy, options)
    alone, d_plus, d_minus = hamming(z[n : 2 * n], z[2 * n :], options["alpha"], options["per_sample"])
    expected = np.where(z > 0, dy, 0) + options["weight"] * np.concatenate([0 * d_plus, d_plus, d_minus])
    tolerance = {np.float32: 1e-5, np.float64: 1e-12}[dtype]
    assert y.dtype == dz.dtype == np.asarray(value).dtype == dtype
    np.testing.assert_array_equal(y, np.maximum(z, 0))
    np.testing.assert_allclose(value, alone, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dz, expected, rtol=0, atol=3 * tolerance * (1 + options["alpha"]))


@given(shape=sizes, options=taps, dtype=st.sampled_from([np.float32, np.float64]), seed=seeds)
def test_the_tap_takes_a_pair_batch(shape, options, dtype, seed):
    g = np.random.default_rng(seed)
    pair = PairBatch(*g.standard_normal((2, *shape)).astype(dtype))
    dy = g.standard_normal((3 * shape[0], *shape[1:])).astype(dtype)
    tap = Hamming(**options)
    y, cache = ReLU().forward(pair, tap=tap)
    found = ReLU().backward(dy, cache)
    y_full, value, dz = through_relu(pair.full(), dy, options)
    tolerance = {np.float32: 1e-5, np.float64: 1e-12}[dtype]
    np.testing.assert_array_equal(y, y_full)
    np.testing.assert_allclose(tap.value, value, rtol=tolerance, atol=tolerance)
    for a, b in zip(found, PairBatch.gradient(dz), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=6 * tolerance * (1 + options["alpha"]))


def small_net(seed=0, dtype=np.float64):
    return mr.models.mlp((12, 7, 5, 3), seed=seed, input_shape=(2, 2, 3)).astype(dtype)


@given(options=taps, seed=seeds)
def test_gradients_with_a_tap(options, seed):
    """Over two layers: the regulariser of the first enters on the way back, after that of the second has passed."""
    pair = PairBatch(*np.random.default_rng(seed).standard_normal((2, 2, 2, 2, 3)) * [[[[[1]]]], [[[[0.1]]]]])
    mr.gradcheck(small_net(seed % 5), pair.full(), tap=lambda: Hamming(**options))


@pytest.mark.parametrize("broken", ["weight", "alpha", "layers", "norms"])
def test_gradient_check_of_the_tap_catches_mutants(broken, rng):
    """A factor of the backward pass is off: the weight, alpha, the number of layers, or the norm."""

    class Broken(Hamming):
        def backward(self, dy, z, norms):
            if broken == "norms":
                return super().backward(dy, z, 1.01 * norms)
            kept = getattr(self, broken)
            setattr(self, broken, kept + 1 if broken == "layers" else 1.01 * kept)
            try:
                return super().backward(dy, z, norms)
            finally:
                setattr(self, broken, kept)

    x = PairBatch(rng.random((2, 2, 2, 3)), 0.1 * rng.standard_normal((2, 2, 2, 3))).full()
    mr.gradcheck(small_net(), x, tap=lambda: Hamming(2.0, 30.0))
    with pytest.raises(GradientError):
        mr.gradcheck(small_net(), x, tap=lambda: Broken(2.0, 30.0))


def test_the_value_is_the_mean_over_layers(rng):
    """Equal weight for every ReLU layer, however many elements it has."""
    model, x = small_net(), rng.random((2, 2, 2, 3))
    rho = 0.1 * rng.standard_normal(x.shape)
    tap = Hamming(3.0)
    model.forward(PairBatch(x, rho), tap=tap)
    flat = PairBatch(x, rho).full().reshape(6, -1)
    values = []
    for i in (1, 2):
        layer = model.children[f"fc{i}"].params
        z = flat @ layer["weight"] + layer["bias"]
        values.append(hamming(z[2:4], z[4:], 3.0)[0])
        flat = np.maximum(z, 0)
    assert tap.layers == 2
    assert tap.value == pytest.approx(np.mean(values), rel=1e-12)


def test_a_tap_without_a_relu_is_zero():
    assert Hamming().value == 0


# --- section 5.4: nothing is stored but the norms ---------------------------------------------------------------------


def arrays_in(thing):
    """All arrays that hang on a cache, on the tap in it, and so on."""
    if isinstance(thing, np.ndarray | np.generic):
        yield np.asarray(thing)
    elif isinstance(thing, dict):
        yield from arrays_in(list(thing.values()))
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from arrays_in(item)
    elif hasattr(thing, "__dict__"):
        yield from arrays_in(vars(thing))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_the_cache_is_z_itself_and_the_norms(pair, per_sample, dtype, rng):
    n = 4
    z = (
        PairBatch(*rng.standard_normal((2, n, 50)).astype(dtype))
        if pair
        else rng.standard_normal((3 * n, 50)).astype(dtype)
    )
    _, cache = ReLU().forward(z, tap=Hamming(per_sample=per_sample))
    inputs = list(z) if pair else [z]
    found = list(arrays_in(cache))
    assert sum(any(a is b for b in inputs) for a in found) == len(inputs), "the cache holds a copy of z"
    extra = sum({id(a): a.size for a in found if not any(a is b for b in inputs)}.values())  # the tap has the norms too
    assert extra <= (n if per_sample else 1) + 1  # and the running total, in the tap


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_tap_holds_no_memory(per_sample, rng):
    """What a whole forward pass keeps alive, with and without a tap: they differ by the norms."""
    model, x = mr.models.small_cnn(hidden=16).astype(np.float64), rng.random((6, 32, 32, 3))

    def held(tap):
        tracemalloc.start()
        y, cache = model.forward(x, tap=tap)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert y is not None and cache is not None
        return size

    without = held(None)
    assert without > 6 * 16 * 16 * 16 * 8  # it does measure: at least the first layer's pre-activations
    assert held(Hamming(per_sample=per_sample)) - without < 4096


# --- the limit: exact Hamming distances -------------------------------------------------------------------------------


@given(shape=sizes, margin=st.floats(0.01, 0.5), seed=seeds)
def test_tanh_counts_disagreements_as_alpha_grows(shape, margin, seed):
    """sum |tanh(alpha z) - tanh(alpha z')| / 2 -> the number of signs that differ, for |z| >= margin."""
    g = np.random.default_rng(seed)
    z = g.choice([-1, 1], (2, *shape)) * g.uniform(margin, 1, (2, *shape))
    exact = (z[0] > 0).sum() + (z[1] > 0).sum() - 2 * ((z[0] > 0) & (z[1] > 0)).sum()
    errors = []
    for alpha in (2 / margin, 20 / margin):
        soft = np.abs(np.tanh(alpha * z[0]) - np.tanh(alpha * z[1])).sum() / 2
        errors.append(abs(soft - exact))
        assert errors[-1] <= 2 * z[0].size * np.exp(-2 * alpha * margin) + 1e-12
    _, squares = reference.relu_hamming(np.concatenate([z[0], *z]), 20 / margin)
    np.testing.assert_allclose(squares.sum() / 4, exact, atol=1e-9)
