"""The verifier's view of a network: the same function, the same gradient, and a refusal of what it cannot hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import conv_net, forward, randomise, sequence

from nanomr import models
from nanomr.errors import UserError
from nanomr.layers import (
    Affine,
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    Normalize,
    ReLU,
    Sequential,
)
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds import interval as bounds
from nanomr.verify.chain import KNOWN, Chain


def nested(draw):
    """A Sequential in a Sequential, two linear maps in a row, average pooling, a ReLU at the end."""
    block = Sequential({"conv": Conv2d(2, 3, 3, 1, 1), "bn": BatchNorm2d(3), "relu": ReLU()})
    return sequence([block, AveragePool2d(2), Flatten(), Linear(12, 4), Linear(4, 3), ReLU()], (4, 4, 2), draw)


NETWORKS = {
    "linear": lambda draw: randomise(models.mlp((12, 3), input_shape=(2, 2, 3)), draw),
    "mlp": lambda draw: randomise(models.mlp((12, 7, 5, 3), input_shape=(2, 2, 3)), draw),
    "small_cnn-4": lambda draw: randomise(models.small_cnn(kernel=4, hidden=8, classes=3), draw),
    "small_cnn-5": lambda draw: randomise(models.small_cnn(kernel=5, hidden=8, classes=3), draw),
    "pool": lambda draw: conv_net(draw, (3, 1, 1), (2, 1, 0), (6, 4), pool=2),
    "norm": lambda draw: conv_net(draw, (4, 2, 1), (3, 1, 1), norm=True),
    "norm, no bias": lambda draw: conv_net(draw, (5, 2, (1, 2, 1, 2)), (3, 1, 1), norm=True, bias=False),
    "nested": nested,
    "norms without a convolution": lambda draw: sequence(
        [BatchNorm2d(2), ReLU(), BatchNorm2d(2), AveragePool2d(2), BatchNorm2d(2), Flatten(), Linear(2, 3)],
        (2, 2, 2),
        draw,
    ),
    "a ReLU first, two in a row": lambda draw: sequence([ReLU(), ReLU(), Flatten(), Linear(8, 3)], (2, 2, 2), draw),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


@every_network
@fewer(0.3)
@given(seed=seeds)
def test_a_chain_is_the_network_and_its_gradient_the_networks(network, seed):
    draw = np.random.default_rng(seed)
    model = NETWORKS[network](draw)
    for _, layer in model.walk():
        if isinstance(layer, Normalize):
            layer.buffers["std"] *= draw.choice([-1, 1], layer.buffers["std"].shape)
    x = draw.random((2, *model.input_shape))
    before = model.state_dict()
    chain = Chain(model)
    logits, inputs = chain.forward(x)
    scale = 1 + max(abs(z).max() for z in (logits, *inputs))
    other = [
        isinstance(layer, BatchNorm2d)
        or (isinstance(layer, Conv2d) and (layer.params["weight"].shape[:2], layer.stride) == ((3, 3), 1))
        for _, layer in model.walk()
    ]
    assert chain.sums != any(other)
    wanted, relus = forward(model, x)
    assert [z.shape[1:] for z in relus] == chain.relu_shapes and chain.classes == logits.shape[1]
    for z, right in zip((logits, *inputs), (wanted, *relus), strict=True):
        np.testing.assert_allclose(z, right, rtol=0, atol=1e-12 * scale)
    rows = draw.standard_normal(logits.shape)
    _, cache = model.forward(x)
    right = model.backward(rows, cache, param_grads=False)
    got = chain.input_gradient(rows, inputs)
    assert got.shape == x.shape
    np.testing.assert_allclose(got, right, rtol=0, atol=1e-12 * (1 + abs(right).max()))
    after = model.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@every_network
def test_stages_are_affine_and_transpose_is_their_adjoint(network, rng):
    chain = Chain(NETWORKS[network](rng))
    for stage in chain.stages:
        a, dz = rng.standard_normal((3, *stage.in_shape)), rng.standard_normal((3, *stage.out_shape))
        z = stage.apply(a)
        assert z.shape == dz.shape
        np.testing.assert_allclose(stage.apply(2 * a), 2 * z - stage.bias, atol=1e-11 * (1 + abs(z).max()))
        da = stage.transpose(dz)
        assert da.shape == a.shape
        left = (dz * (z - stage.bias)).reshape(3, -1).sum(1)
        np.testing.assert_allclose(
            (da * a).reshape(3, -1).sum(1), left, atol=1e-11 * (1 + abs(dz).sum() * abs(z).max())
        )


@every_network
def test_all_of_a_chain_is_in_its_dtype(network, rng):
    model = NETWORKS[network](rng).astype(np.float32)
    x = rng.random((2, *model.input_shape))
    for dtype in (np.float32, np.float64):
        chain = Chain(model, dtype)
        logits, inputs = chain.forward(x)  # whatever is handed in
        arrays = [logits, *inputs, *(stage.bias for stage in chain.stages)]
        arrays += [chain.input_gradient(logits.astype(other), inputs) for other in (np.float32, np.float64)]
        assert {a.dtype for a in arrays} == {np.dtype(dtype)}
    wide, narrow = (Chain(model, dtype).forward(x)[0] for dtype in (np.float64, np.float32))
    np.testing.assert_allclose(narrow, wide, atol=1e-4 * (1 + abs(wide).max()))


# --- what is refused --------------------------------------------------------------------------------------------------


class Swish(Layer):
    pass


class Shear(Affine):
    """Of this map nobody knows the bounds: its matrix may have negative entries."""

    def apply(self, x, bias=True):
        return x - x[:, ::-1]

    def transpose(self, dy, x):
        return dy - dy[:, ::-1]


@pytest.mark.parametrize(
    "layers, name",
    [
        ([Swish(), Flatten(), Linear(8, 3)], "'0' (Swish)"),
        ([Shear(), Flatten(), Linear(8, 3)], "'0' (Shear)"),
        ([Sequential({"a": Conv2d(2, 2, 1), "b": Sequential({"c": Swish()})}), Flatten()], "'0.b.c' (Swish)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_a_layer_that_it_cannot_hold_is_refused_by_name(layers, name, rng):
    model = sequence(layers, (2, 2, 2), rng)
    with pytest.raises(UserError) as error:
        Chain(model)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_residual_networks_are_refused():
    with pytest.raises(UserError, match=r"'layer1\.0' \(PreActBlock\)"):
        Chain(models.preact_resnet18(width=2))


def test_every_layer_that_it_holds_has_a_rule_of_its_own():
    rules = bounds.propagate.registry
    assert all(kind in rules for kind in KNOWN) and Affine not in rules


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "1.running_mean", "1.weight", "normalize.mean", "9.bias"])
def test_weights_that_are_not_finite_are_refused(where, bad, rng):
    model = conv_net(rng, (3, 1, 1), (2, 1, 0), norm=True)
    name, _, key = where.rpartition(".")
    layer = model.children[name]
    (layer.params if key in layer.params else layer.buffers)[key].flat[0] = bad
    with pytest.raises(UserError, match="finite"):
        Chain(model)


@pytest.mark.parametrize("change", ["std", "variance", "float32"])
def test_numbers_that_become_infinite_on_the_way_are_refused(change, rng):
    model = conv_net(rng, (3, 1, 1), (2, 1, 0), norm=True)
    if change == "std":
        model.children["normalize"].buffers["std"][0] = 0
    elif change == "variance":
        model.children["1"].buffers["running_var"][0] = -1
    else:
        model.children["0"].params["weight"].flat[0] = 1e300
    with pytest.raises(UserError, match="finite"):
        Chain(model, np.float32 if change == "float32" else np.float64)


@given(st.sampled_from([np.float32, np.float64]))
def test_a_huge_network_is_no_reason_to_refuse(dtype):
    model = models.mlp((12, 7, 3), input_shape=(2, 2, 3))
    model.weights *= 1e6
    Chain(model, dtype)
