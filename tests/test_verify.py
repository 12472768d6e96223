"""Interval bounds: no point of the box is ever outside of them, and they are as tight as intervals can be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import box, forward, points, randomise

from nanomr import manifold, models
from nanomr.layers import Conv2d, Layer, Linear
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify import interval
from nanomr.verify.bounds import interval as bounds

RESNETS = [
    dict(width=w, bn_before_fc=b, out_shortcut=s, jin_v1=j)
    for w, b, s, j in [(2, True, True, False), (3, True, False, False), (2, False, True, False),
                       (4, False, False, False), (2, True, True, True)]
]  # fmt: skip
CNNS = [dict(kernel=4, hidden=8, classes=3), dict(kernel=5, hidden=5, classes=2)]


@st.composite
def mlps(draw):
    side, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    hidden = draw(st.lists(st.integers(1, 9), max_size=3))
    return dict(sizes=(side * side * channels, *hidden, draw(st.integers(2, 4))), input_shape=(side, side, channels),
                mean=(0.5,) * channels, std=(0.25,) * channels)  # fmt: skip


networks = st.one_of(
    st.tuples(st.just("mlp"), mlps()),
    st.tuples(st.just("small_cnn"), st.sampled_from(CNNS)),
    st.tuples(st.just("preact_resnet18"), st.sampled_from(RESNETS)),
)
ALL = [("mlp", dict(sizes=(12, 7, 5, 3), input_shape=(2, 2, 3)))]
ALL += [("small_cnn", c) for c in CNNS] + [("preact_resnet18", r) for r in RESNETS]
every_network = pytest.mark.parametrize("network", ALL, ids=lambda n: "-".join(map(str, (n[0], *n[1].values()))))


def build(network, seed, dtype=np.float64):
    name, options = network
    return randomise(models.BUILDERS[name](seed=seed % 1000, **options), np.random.default_rng(seed), dtype)


def violation(model, low, high, draw, found=None):
    """By how much, relative to the scale of a layer, the worst of the points breaks the bounds (negative: by none)."""
    logits, relus = found or interval(model, low, high)
    worst = -np.inf
    for x in points(low, high, draw):
        y, z = forward(model, x.astype(model.dtype))
        for (lower, upper), value in zip([*relus, logits], [*z, y], strict=True):
            assert lower.shape == upper.shape == value.shape and lower.dtype == value.dtype == model.dtype
            scale = 1 + abs(value).max()
            worst = max(worst, (lower - value).max() / scale, (value - upper).max() / scale)
    return worst


@fewer(1)
@given(network=networks, seed=seeds, eps=st.sampled_from([0.0, 1e-6, 0.01, 8 / 255, 0.3, 1.0]))
def test_no_point_of_the_box_is_outside_of_the_bounds(network, seed, eps):
    draw = np.random.default_rng(seed)
    model = build(network, seed)
    low, high = box(model, draw, eps)
    assert violation(model, low, high, draw) < 1e-12


@every_network
def test_the_same_in_float32_up_to_its_rounding(network):
    draw = np.random.default_rng(1)
    model = build(network, 1, np.float32)
    low, high = box(model, draw, 8 / 255)
    assert violation(model, low, high, draw) < 1e-5


@every_network
def test_bounds_hold_against_the_gradients_corner_too(network):
    """Random corners are far inside of the bounds: the corner along one logit's gradient is as far out as any."""
    draw = np.random.default_rng(2)
    model = build(network, 2)
    low, high = box(model, draw, 0.02)
    (lower, upper), _ = interval(model, low, high)
    reach = 0
    for k in range(lower.shape[1]):
        x = 0.5 * (low + high)
        for _ in range(3):
            logits, cache = model.forward(x)
            gradient = model.backward(np.eye(len(upper[0]))[[k] * len(x)], cache, param_grads=False)
            x = np.where(gradient > 0, high, low)
        logits = model.forward(x)[0]
        assert np.all(logits <= upper + 1e-9 * abs(upper)) and np.all(logits >= lower - 1e-9 * abs(lower))
        reach = max(reach, ((logits - lower) / (upper - lower))[:, k].max())
    assert reach > 0.5  # and the bounds are not idle: some point passes their middle


# --- checks of the checks ---------------------------------------------------------------------------------------------


@every_network
def test_a_wrong_rule_would_be_seen(network, monkeypatch):
    """Weights in the place of their absolute values: the points above find that out."""
    monkeypatch.setattr(bounds, "abs", lambda x: x, raising=False)
    draw = np.random.default_rng(3)
    model = build(network, 3)
    low, high = box(model, draw, 0.1)
    assert violation(model, low, high, draw) > 1e-3


@pytest.mark.parametrize("network", [n for n in ALL if n[0] != "preact_resnet18"], ids=lambda n: str(n[1]))
def test_a_first_layer_a_little_too_tight_would_be_seen(network):
    draw = np.random.default_rng(4)
    model = build(network, 4)
    low, high = box(model, draw, 0.1)
    _, ((lower, upper), *_) = interval(model, low, high)
    mean, radius = (lower + upper) / 2, (upper - lower) / 2
    for share, seen in ((0.999, True), (1 + 1e-9, False)):
        found = (mean - share * radius, mean + share * radius)
        unit, corner = widest(model, low, high, found)
        z = forward(model, corner)[1][0]
        assert (z[unit] > found[1][unit] + 1e-12) == seen


# --- tightness --------------------------------------------------------------------------------------------------------


def first_layer(model):
    """The linear map before the first ReLU, and what its inputs are divided by, per pixel."""
    layers = [layer for _, layer in model.walk() if isinstance(layer, Conv2d | Linear)]
    return layers[0], model.children["normalize"]


def corner_of(model, low, high, unit, sign):
    """The corner of the box where this unit of the first layer is largest (sign 1) or smallest (-1)."""
    layer, normalize = first_layer(model)
    z = forward(model, low)[1][0]
    one = np.zeros_like(z)
    one[unit] = sign
    like = low if isinstance(layer, Conv2d) else low.reshape(len(low), -1)
    slope = layer.transpose(one, like).reshape(low.shape) / normalize.buffers["std"]
    return np.where(slope > 0, high, low)


def widest(model, low, high, found):
    unit = np.unravel_index(np.argmax(found[1] - found[0]), found[0].shape)
    return unit, corner_of(model, low, high, unit, 1)


@pytest.mark.parametrize("network", [n for n in ALL if n[0] != "preact_resnet18"], ids=lambda n: str(n[1]))
@fewer(0.4)
@given(seed=seeds)
def test_the_first_layers_bounds_are_attained_at_a_corner(network, seed):
    draw = np.random.default_rng(seed)
    model = build(network, seed)
    low, high = box(model, draw, 0.1)
    _, ((lower, upper), *_) = interval(model, low, high)
    for flat in draw.integers(0, lower.size, 8):
        unit = np.unravel_index(flat, lower.shape)
        for sign, bound in ((1, upper), (-1, lower)):
            z = forward(model, corner_of(model, low, high, unit, sign))[1][0]
            assert z[unit] == pytest.approx(bound[unit], rel=1e-12, abs=1e-12)


def test_a_network_worked_out_by_hand():
    """x in [0, 1] x [0.2, 0.4]; z = (x0 - x1, -2 x0 + 1, x0 + x1 + 1); logits (z0+ - z1+, z2+)."""
    model = models.mlp((2, 3, 2), input_shape=(1, 1, 2)).astype(np.float64)
    model.children["fc1"].params["weight"][...] = [[1, -2, 1], [-1, 0, 1]]
    model.children["fc1"].params["bias"][...] = [0, 1, 1]
    model.children["fc2"].params["weight"][...] = [[1, 0], [-1, 0], [0, 1]]
    model.children["fc2"].params["bias"][...] = [0, 0.5]
    low, high = np.array([0, 0.2]).reshape(1, 1, 1, 2), np.array([1, 0.4]).reshape(1, 1, 1, 2)
    (lower, upper), [(z_low, z_high)] = interval(model, low, high)
    np.testing.assert_allclose(z_low, [[-0.4, -1, 1.2]], atol=1e-15)
    np.testing.assert_allclose(z_high, [[0.8, 1, 2.4]], atol=1e-15)
    np.testing.assert_allclose(lower, [[-1, 1.7]], atol=1e-15)
    np.testing.assert_allclose(upper, [[0.8, 2.9]], atol=1e-15)


@every_network
def test_a_larger_box_has_wider_bounds(network):
    draw = np.random.default_rng(5)
    model = build(network, 5)
    x = draw.random((2, *model.input_shape))
    inner = None
    for eps in (0.0, 0.001, 0.01, 0.1, 1.0):
        logits, relus = interval(model, np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1))
        outer = [*relus, logits]
        if inner:
            for (low, high), (lower, upper) in zip(inner, outer, strict=True):
                slack = 1e-12 * (1 + abs(upper).max() + abs(lower).max())
                assert np.all(lower <= low + slack) and np.all(upper >= high - slack)
                assert (upper - lower).sum() > (high - low).sum()
        inner = outer


@every_network
def test_a_box_of_one_point_is_the_forward_pass_and_the_order_that_of_the_embedding(network):
    draw = np.random.default_rng(6)
    model = build(network, 6)
    x = draw.random((3, *model.input_shape))
    logits, relus = interval(model, x, x)
    y, z = forward(model, x)
    for (low, high), value in zip([*relus, logits], [*z, y], strict=True):
        np.testing.assert_allclose(low, value, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(high, value, rtol=1e-9, atol=1e-10)
    bits = manifold.hamming_embedding(model, x)
    assert len(bits) == len(relus) >= 2
    for (low, _), bit in zip(relus, bits, strict=True):
        assert bit.shape == low.shape and np.mean((low > 0) == bit) > 0.999
    mixed = [bit.any() and not bit.all() for bit in bits]
    assert np.mean(mixed) > 0.6  # else the comparison says nothing


@every_network
def test_neither_the_box_nor_the_model_is_changed_and_images_do_not_mix(network):
    draw = np.random.default_rng(7)
    model = build(network, 7)
    low, high = box(model, draw, 0.05, n=3)
    state, copies = model.state_dict(), (low.copy(), high.copy())
    logits, relus = interval(model, low, high)
    assert np.array_equal(low, copies[0]) and np.array_equal(high, copies[1]) and not model.gradients.any()
    assert all(np.array_equal(value, state[name]) for name, value in model.state_dict().items())
    alone, relus_alone = interval(model, low[1:2], high[1:2])
    for both, one in zip([*relus, logits], [*relus_alone, alone], strict=True):
        for many, single in zip(both, one, strict=True):
            np.testing.assert_allclose(many[1:2], single, rtol=1e-9, atol=1e-9)


def test_a_layer_without_a_rule_is_refused_by_its_name():
    class Swish(Layer):
        pass

    model = models.mlp((2, 3, 2), input_shape=(1, 1, 2))
    model.children["relu1"] = Swish()
    x = np.zeros((1, 1, 1, 2), np.float32)
    with pytest.raises(NotImplementedError, match="Swish"):
        interval(model, x, x)
