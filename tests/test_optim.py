"""SGD, the schedules of appendix B, and ten pinned steps of the whole method."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr.methods import manifold_step
from nanomr.optim import SGD, AdamW, epsilon, gamma_factor, learning_rate, piecewise, smooth
from nanomr.testing.strategies import fewer, seeds


def net(dtype=np.float64):
    return mr.models.mlp((12, 4, 3), input_shape=(2, 2, 3)).astype(dtype)


# --- SGD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5)])
@fewer(0.5)
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 5e-4, 0.1]),
    clip=st.none() | st.floats(0.1, 20),
    seed=seeds,
)
def test_sgd_is_pytorchs(dtype, tolerance, momentum, weight_decay, clip, seed):
    """Four steps at changing rates against the formula: clip g; g += weight_decay w; v = momentum v + g; w -= lr v."""
    rng = np.random.default_rng(seed)
    model = net(dtype)
    optimiser = SGD(model, momentum, weight_decay, clip)
    w, v = model.weights.astype(np.float64), np.zeros(model.weights.size)
    for lr in (0.1, 0.05, 0.0, 0.3):
        g = rng.standard_normal(w.size).astype(dtype)
        model.gradients[...] = g
        norm = optimiser.step(lr)
        g = g.astype(np.float64)
        assert norm == pytest.approx(np.linalg.norm(g), rel=1e-5)
        if clip is not None and np.linalg.norm(g) > clip:
            g = g * clip / np.linalg.norm(g)
        v = momentum * v + g + weight_decay * w
        w = w - lr * v
        np.testing.assert_allclose(model.weights, w, rtol=tolerance, atol=10 * tolerance)
        np.testing.assert_allclose(optimiser.velocity, v, rtol=tolerance, atol=10 * tolerance)
        assert not model.gradients.any(), "the step clears the gradients"
        assert model.weights.dtype == optimiser.velocity.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5)])
@fewer(0.5)
@given(weight_decay=st.sampled_from([0.0, 1e-5, 0.1]), seed=seeds)
def test_adamw_is_pytorchs(dtype, tolerance, weight_decay, seed):
    """Four steps at changing rates against the formula, and not against what forgets the bias of the means."""
    rng = np.random.default_rng(seed)
    model = net(dtype)
    optimiser = AdamW(model, weight_decay=weight_decay)
    w = model.weights.astype(np.float64)
    m, v = 0 * w, 0 * w
    biased = w.copy()
    for t, lr in enumerate((0.01, 0.05, 0.0, 0.003), 1):
        g = rng.standard_normal(w.size).astype(dtype)
        model.gradients[...] = g
        optimiser.step(lr)
        g = g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - lr * weight_decay) - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        biased = biased * (1 - lr * weight_decay) - lr * m / (np.sqrt(v) + 1e-8)
        np.testing.assert_allclose(model.weights, w, rtol=tolerance, atol=10 * tolerance)
        assert not model.gradients.any() and model.weights.dtype == dtype
    assert abs(model.weights - biased).max() > 1e-3


@given(st.floats(-1, 2), st.floats(0.05, 0.95))
def test_smooth_rises_from_0_to_1_without_a_kink(way, turn):
    assert (
        smooth(0, turn) == 0 and smooth(1, turn) == pytest.approx(1) and smooth(way, turn) <= smooth(way + 0.01, turn)
    )
    assert smooth(turn + 1e-6, turn) - smooth(turn - 1e-6, turn) < 1e-4


def test_clipping_shortens_and_never_lengthens():
    """With lr 1 and nothing else the step is the clipped gradient."""
    for length, expected in ((0.0, 0.0), (0.5, 0.5), (3.0, 1.0)):
        model = net()
        before = model.weights.copy()
        model.gradients[7] = length
        assert SGD(model, momentum=0, weight_decay=0, clip=1.0).step(1.0) == length
        assert np.linalg.norm(before - model.weights) == pytest.approx(expected, abs=1e-11)


def test_weight_decay_is_for_all_parameters_alike():
    """Biases and batch norms too; with no gradient every weight shrinks by the same factor."""
    model = mr.models.preact_resnet18(width=1).astype(np.float64)
    before = model.weights.copy()
    SGD(model, momentum=0.9, weight_decay=0.5).step(0.1)
    np.testing.assert_allclose(model.weights, 0.95 * before, rtol=1e-14)


def test_defaults_are_the_papers():
    optimiser = SGD(net())
    assert (optimiser.momentum, optimiser.weight_decay, optimiser.clip) == (0.9, 5e-4, None)


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [100, 20, 1, 7.5])
def test_schedules_at_their_knots(epochs):
    """Epochs of the paper's 100; a shorter run walks through the same curve in proportion."""
    at = epochs / 100
    rates = {0: 0, 20: 0.05, 40: 0.1, 60: 0.0525, 80: 0.005, 90: 0.0025, 100: 0, 110: 0}
    eps = {0: 2 / 255, 10: 2 / 255, 22.5: 5 / 255, 35: 8 / 255, 100: 8 / 255}
    gamma = {0: 1, 20: 1, 50: 5.5, 80: 10, 100: 10}
    for schedule, values in ((learning_rate, rates), (epsilon, eps), (gamma_factor, gamma)):
        for epoch, value in values.items():
            found = schedule(epoch * at, epochs)
            assert found == pytest.approx(value, abs=1e-12) and type(found) is float


def test_schedules_take_other_ends():
    assert learning_rate(40, 100, peak=0.3) == pytest.approx(0.3)
    assert learning_rate(80, 100, peak=0.3) == pytest.approx(0.015)
    assert (epsilon(0, 100, 0.0, 0.1), epsilon(100, 100, 0.0, 0.1)) == (0.0, 0.1)
    assert gamma_factor(80, 100, factor=3.0) == 3.0


@given(epoch=st.floats(-10, 200), epochs=st.floats(0.5, 500))
def test_schedules_stay_within_their_bounds(epoch, epochs):
    assert 0 <= learning_rate(epoch, epochs) <= 0.1
    assert 2 / 255 <= epsilon(epoch, epochs) <= 8 / 255
    assert 1 <= gamma_factor(epoch, epochs) <= 10


@given(epoch=st.floats(0, 99), epochs=st.floats(1, 300))
def test_epsilon_and_gamma_never_fall(epoch, epochs):
    for schedule in (epsilon, gamma_factor):
        assert schedule(epoch, epochs) <= schedule(epoch + 1, epochs)


def test_piecewise():
    assert [piecewise(e, 100, (0, 50), (1.0, 3.0)) for e in (-1, 0, 25, 50, 99)] == [1, 1, 2, 3, 3]


# --- ten steps of the method ------------------------------------------------------------------------------------------

PINNED = np.array(  # loss, cross-entropy, intrinsic, hamming (both unweighted); float64 and the reference kernels
    [
        [2.34800442408, 2.33122766813, 2.6092529352e-05, 0.000558790322624],
        [2.29689700841, 2.28062759871, 3.22722359812e-05, 0.000541775786183],
        [2.23562615241, 2.20295527962, 0.000110283501384, 0.00108719103448],
        [2.12099634471, 2.08220220871, 0.000250673492725, 0.00128895997528],
        [1.93850948037, 1.90788859272, 0.000667384657833, 0.00100957317742],
        [1.71934082438, 1.69704527785, 0.00125994590339, 0.00072218578586],
        [1.5213111179, 1.49708939256, 0.00230749746362, 0.000768932553857],
        [1.47494845926, 1.45707644728, 0.00225822513364, 0.000558096647011],
        [1.13629017467, 1.10931495364, 0.00365054927405, 0.000838331546479],
        [0.968186115882, 0.936157322191, 0.00322571396806, 0.00101386455692],
    ]
)


def trajectory(dtype, steps=10):
    """Loss and its parts for ten steps of the manifold method on seeded random images."""
    rng = np.random.default_rng(0)
    model = mr.models.small_cnn(seed=0, hidden=16).astype(dtype)
    optimiser = SGD(model, clip=5.0)
    x, labels = rng.random((8, 32, 32, 3)).astype(dtype), rng.integers(0, 10, 8)
    history = []
    for step in range(steps):
        rho = mr.manifold.corner_pairs(x, epsilon(step * 10, 100), seed=1, step=step)
        parts = manifold_step(model, x, labels, rho, gamma_i=0.5, gamma_h=30.0, alpha=8.0)
        history.append([float(parts[name]) for name in ("loss", "cross_entropy", "intrinsic", "hamming")])
        optimiser.step(0.05)
    return np.array(history)


def test_ten_steps_in_float64():
    """The whole method, pinned: weights, corners, both regularisers, clipping, momentum. Nothing may drift unseen."""
    np.testing.assert_allclose(trajectory(np.float64), PINNED, rtol=1e-9)


def test_ten_steps_in_float32():
    """The CPU kernels follow the float64 reference."""
    np.testing.assert_allclose(trajectory(np.float32), PINNED, rtol=1e-4)


@pytest.mark.parametrize("change", ["gamma_h", "corners", "rate"])
def test_the_trajectory_notices_small_changes(change, monkeypatch):
    """Its negative control: one part in a thousand of one ingredient, and it leaves the pinned path."""
    step, corner_pairs, backward = SGD.step, mr.manifold.corner_pairs, mr.losses.Hamming.backward
    if change == "gamma_h":
        monkeypatch.setattr(mr.losses.Hamming, "backward", lambda self, dy, z, r: backward(self, dy, z, r / 1.001))
    elif change == "corners":
        monkeypatch.setattr(mr.manifold, "corner_pairs", lambda *a, **k: 1.001 * corner_pairs(*a, **k))
    else:
        monkeypatch.setattr(SGD, "step", lambda self, lr: step(self, 1.001 * lr))
    assert np.abs(trajectory(np.float64, 3) / PINNED[:3] - 1).max() > 1e-6
