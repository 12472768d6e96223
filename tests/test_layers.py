"""Every layer against the contract of ``nanomr/layers.py``, and against naive formulas of its own."""

import copy
import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import nanomr as mr
from nanomr.gradcheck import GradientError, check_vjp
from nanomr.layers import (
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    Normalize,
    Normalized,
    PairBatch,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
)
from nanomr.ops import reference
from nanomr.testing.contract import CHECKS, MUTANTS, Case, gradients, is_caught, prepare, same, slots, snapshot
from nanomr.testing.strategies import convolutions, fewer, images, seeds

# --- what is drawn: for each kind of layer, a strategy of (layer, shape of the input) ---------------------------------

booleans = st.booleans()


@st.composite
def _conv(draw):
    c = draw(convolutions())
    return Conv2d(c.c_in, c.c_out, c.kernel[0], c.stride, c.padding, bias=draw(booleans)), c.x_shape


@st.composite
def _linear(draw):
    n, i, o = (draw(st.integers(1, 5)) for _ in range(3))
    return Linear(i, o, bias=draw(booleans)), (n, i)


@st.composite
def _linear_image(draw):
    n, h, w, c = draw(images())
    return Linear(h * w * c, draw(st.integers(1, 4)), image=(h, w, c)), (n, h * w * c)


@st.composite
def _batchnorm(draw):
    n, h, w, c = draw(images(n=(1, 4)))
    assume(n * h * w >= 4)  # of two numbers, normalised, nothing is left but their order: all gradients are ~ 0
    return BatchNorm2d(c), (n, h, w, c)


@st.composite
def _pool(draw):
    n, h, w, c = draw(images(size=(1, 3)))
    window = draw(st.integers(1, 3))
    return AveragePool2d(window), (n, h * window, w * window, c)


@st.composite
def _sequential(draw):
    """Conv - BN - ReLU - pool - flatten - linear: what stands before a BatchNorm sees its dx."""
    n, size, c = draw(st.integers(2, 3)), draw(st.sampled_from([2, 4])), draw(st.integers(1, 2))
    children = {
        "conv": Conv2d(2, c, 3, 1, 1),
        "bn": BatchNorm2d(c),
        "relu": ReLU(),
        "inner": Sequential({"pool": AveragePool2d(2), "flatten": Flatten()}),
        "fc": Linear((size // 2) ** 2 * c, 3, image=(size // 2, size // 2, c)),
    }
    return Sequential(children), (n, size, size, 2)


@st.composite
def _block(draw, projects):
    c, size = draw(st.integers(1, 2)), draw(st.integers(2, 4))
    if projects:
        layer = PreActBlock(c, draw(st.integers(1, 2)) + c, draw(st.integers(1, 2)), out_shortcut=draw(booleans))
    else:
        layer = PreActBlock(c, c, 1, activated_identity=draw(booleans))
    return layer, (draw(st.integers(2, 3)), size, size, c)


def _branches(channels, two=False):
    body = Sequential({"conv": Conv2d(2, channels, 3, 1, 1), "bn": BatchNorm2d(channels), "relu": ReLU()})
    return Residual({"body": body} | ({"shortcut": Conv2d(2, channels, 1)} if two else {}))


@st.composite
def _residual(draw, two):
    channels = draw(st.integers(1, 3)) if two else 2
    return _branches(channels, two), (*draw(images())[:3], 2)


def _fixed(make, shapes):
    return shapes.map(lambda shape: (make(shape), shape))


KINDS = {
    "conv": _conv(),
    "linear": _linear(),
    "linear of an image": _linear_image(),
    "relu": _fixed(lambda _: ReLU(), images()),
    "batchnorm, training": _batchnorm(),
    "batchnorm, evaluation": _batchnorm(),
    "pool": _pool(),
    "pool, global": _fixed(lambda _: AveragePool2d(), st.sampled_from([(1, 1, 1, 1), (2, 3, 3, 2), (3, 4, 4, 1)])),
    "flatten": _fixed(lambda _: Flatten(), images()),
    "normalize": _fixed(lambda s: Normalize(0.1 * np.arange(s[-1]), 0.5 + 0.1 * np.arange(s[-1])), images()),
    "sequential, training": _sequential(),
    "sequential, evaluation": _sequential(),
    "block, identity": _block(False),
    "block, projection": _block(True),
    "block, evaluation": _block(True),
    "residual block, identity": _residual(False),
    "residual block, two branches": _residual(True),
}
EVALUATED = {kind for kind in KINDS if "evaluation" in kind}
ANALYTIC = {kind for kind in KINDS if not any(word in kind for word in ("relu", "sequential", "block"))}
ONLY_MOVES_NUMBERS = {"pool", "pool, global", "flatten", "normalize"}  # backward is the same for every x


def make_case(kind, layer, shape, seed) -> Case:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return Case(prepare(layer, rng), x, kind not in EVALUATED, view=kind == "flatten")


def _small_stack():
    inner = Sequential({"pool": AveragePool2d(2), "flatten": Flatten()})
    layers = {"conv": Conv2d(2, 3, 3, 1, 1), "bn": BatchNorm2d(3), "relu": ReLU(), "inner": inner, "fc": Linear(12, 3)}
    return Sequential(layers), (3, 4, 4, 2)


TINY = {  # one fixed case of each kind, in which everything matters: the mutants are tried on these
    "conv": lambda: (Conv2d(2, 3, 3, 2, (1, 0, 1, 2)), (2, 4, 5, 2)),
    "linear": lambda: (Linear(4, 3), (2, 4)),
    "linear of an image": lambda: (Linear(12, 3, image=(2, 3, 2)), (2, 12)),
    "relu": lambda: (ReLU(), (2, 3, 3, 2)),
    "batchnorm, training": lambda: (BatchNorm2d(2), (3, 2, 2, 2)),
    "batchnorm, evaluation": lambda: (BatchNorm2d(2), (3, 2, 2, 2)),
    "pool": lambda: (AveragePool2d(2), (2, 4, 2, 2)),
    "pool, global": lambda: (AveragePool2d(), (2, 2, 2, 2)),
    "flatten": lambda: (Flatten(), (2, 2, 3, 2)),
    "normalize": lambda: (Normalize([0.1, 0.3], [0.2, 0.5]), (2, 2, 3, 2)),
    "sequential, training": _small_stack,
    "sequential, evaluation": _small_stack,
    "block, identity": lambda: (PreActBlock(2, 2), (3, 2, 2, 2)),
    "block, projection": lambda: (PreActBlock(2, 3, 2), (3, 3, 2, 2)),
    "block, evaluation": lambda: (PreActBlock(2, 3, 2), (3, 3, 2, 2)),
    "residual block, identity": lambda: (_branches(2), (3, 2, 2, 2)),
    "residual block, two branches": lambda: (_branches(3, two=True), (3, 2, 2, 2)),
}


# --- the contract -----------------------------------------------------------------------------------------------------


def applies(check, kind):
    return check != "batch_mates" or "training" not in kind


PAIRS = [(check, kind) for check in CHECKS for kind in KINDS if applies(check, kind)]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), seed=seeds)
def test_gradients_along_random_directions(kind, data, seed):
    """The vector-Jacobian product with a random upstream gradient, in float64."""
    CHECKS["vjp"](make_case(kind, *data.draw(KINDS[kind]), seed))


@pytest.mark.parametrize("kind", KINDS)
@fewer(0.1)
@given(data=st.data(), seed=seeds)
def test_every_entry_of_the_jacobian(kind, data, seed):
    case = make_case(kind, *data.draw(KINDS[kind]), seed)
    CHECKS["jacobian"](case)


@pytest.mark.parametrize(("check", "kind"), [p for p in PAIRS if p[0] not in ("vjp", "jacobian")])
@fewer(0.1)
@given(data=st.data(), seed=seeds)
def test_contract(check, kind, data, seed):
    CHECKS[check](make_case(kind, *data.draw(KINDS[kind]), seed))


@pytest.mark.parametrize(("check", "kind"), PAIRS)
def test_contract_catches_its_mutants(check, kind):
    """The negative control of every check on every kind of layer."""
    case = make_case(kind, *TINY[kind](), seed=7)
    CHECKS[check](case)
    for mutant in MUTANTS[check]:
        if not mutant.is_a_defect_of(copy.deepcopy(case)):
            assert mutant.needs_params or kind in ONLY_MOVES_NUMBERS
            continue
        assert is_caught(CHECKS[check], mutant, case), f"{mutant.__name__} survives"


# --- convolution ------------------------------------------------------------------------------------------------------


def naive_convolution(x, w, b, stride, padding):
    """The definition, in six loops; what lies outside the image counts as zero."""
    (n, height, width, _), (kh, kw, _, c_out), (top, bottom, left, right) = x.shape, w.shape, padding
    y = np.zeros((n, (height + top + bottom - kh) // stride + 1, (width + left + right - kw) // stride + 1, c_out))
    for image, i, j, o in np.ndindex(y.shape):
        y[image, i, j, o] = 0 if b is None else b[o]
        for p, q in itertools.product(range(kh), range(kw)):
            row, column = stride * i + p - top, stride * j + q - left
            if 0 <= row < height and 0 <= column < width:
                y[image, i, j, o] += x[image, row, column] @ w[p, q, :, o]
    return y


@given(case=convolutions(), bias=booleans, seed=seeds)
def test_convolution_is_its_definition(case, bias, seed):
    layer = Conv2d(case.c_in, case.c_out, case.kernel[0], case.stride, case.padding, bias)
    c = make_case("conv", layer, case.x_shape, seed)
    expected = naive_convolution(c.x, layer.params["weight"], layer.params.get("bias"), case.stride, case.padding)
    assert expected.shape == case.y_shape
    same(c.forward()[0], expected, "y")


def test_a_window_over_padding_alone_gives_the_bias(rng):
    layer = prepare(Conv2d(2, 3, 2, stride=2, padding=2), rng)
    y, _ = layer.forward(rng.standard_normal((1, 2, 2, 2)))
    np.testing.assert_array_equal(y[0, 0, 0], layer.params["bias"])


def test_one_number_of_padding_means_all_four_sides():
    assert Conv2d(1, 1, 3, padding=2).padding == (2, 2, 2, 2)


def test_convolution_refuses_what_does_not_fit(rng):
    x = np.zeros((1, 3, 5, 2))
    for layer, words in ((Conv2d(3, 1, 1), r"\(N, H, W, 3\)"), (Conv2d(2, 1, 4), "does not fit")):
        with pytest.raises(ValueError, match=words):
            prepare(layer, rng).forward(x)


# --- layouts of weights on disk ---------------------------------------------------------------------------------------


def test_conv_weights_on_disk_are_oihw(rng):
    layer = Conv2d(2, 4, 3)
    weight = rng.standard_normal((3, 3, 2, 4))
    assert layer.to_torch("weight", weight)[3, 1, 2, 0] == weight[2, 0, 1, 3]
    np.testing.assert_array_equal(layer.from_torch("weight", layer.to_torch("weight", weight)), weight)


@given(shape=images(), out=st.integers(1, 3), seed=seeds)
def test_linear_weights_on_disk_are_for_an_nchw_flatten(shape, out, seed):
    """PyTorch flattens (N, C, H, W): with the weights on disk, its result is ours."""
    rng = np.random.default_rng(seed)
    x, layer = rng.standard_normal(shape), prepare(Linear(np.prod(shape[1:]), out, image=shape[1:]), rng)
    weight = layer.params["weight"]
    on_disk = layer.to_torch("weight", weight)
    y, _ = layer.forward(x.reshape(len(x), -1))
    same(x.transpose(0, 3, 1, 2).reshape(len(x), -1) @ on_disk.T + layer.params["bias"], y, "PyTorch's y")
    np.testing.assert_array_equal(layer.from_torch("weight", on_disk), weight)


# --- batch normalisation ----------------------------------------------------------------------------------------------


def test_ones_upstream_prove_nothing_of_batchnorm(rng):
    """With dy = 1 the input's gradient is zero whatever the layer computes: a check with it passes on broken code."""
    case = make_case("batchnorm, training", BatchNorm2d(3), (4, 3, 3, 3), 0)
    y, _ = case.forward()
    with_ones, _ = gradients(case, np.ones_like(y))
    with_random, _ = gradients(case)
    assert np.abs(with_ones).max() < 1e-12 < 1e-1 < np.abs(with_random).max()
    wrong_with_ones = 3 * with_ones  # three times too large, and yet <dx, v> = <dy, J v> to rounding
    assert np.abs(wrong_with_ones).max() < 1e-12


@given(shape=images(n=(2, 4)), momentum=st.floats(0.05, 0.95), seed=seeds)
def test_running_statistics_are_pytorchs(shape, momentum, seed):
    """running = (1 - momentum) running + momentum batch, with the unbiased variance: divided by m - 1."""
    layer = BatchNorm2d(shape[-1], momentum=momentum)
    case = make_case("batchnorm, training", layer, shape, seed)
    mean, var = case.layer.buffers["running_mean"].copy(), case.layer.buffers["running_var"].copy()
    case.forward()
    same(layer.buffers["running_mean"], (1 - momentum) * mean + momentum * case.x.mean((0, 1, 2)), "running mean")
    same(layer.buffers["running_var"], (1 - momentum) * var + momentum * case.x.var((0, 1, 2), ddof=1), "running var")
    assert layer.buffers["num_batches_tracked"] == 1


def test_momentum_is_a_tenth(rng):
    layer = prepare(BatchNorm2d(1), rng)
    layer.buffers["running_mean"][...] = 0
    layer.forward(np.full((2, 1, 1, 1), 10.0), train=True)
    assert layer.buffers["running_mean"][0] == pytest.approx(1.0)


def test_evaluation_leaves_the_running_statistics_alone(rng):
    case = make_case("batchnorm, evaluation", BatchNorm2d(2), (3, 2, 2, 2), 0)
    before = snapshot(case.layer, "buffers")
    gradients(case)
    for name, value in slots(case.layer, "buffers").items():
        np.testing.assert_array_equal(value, before[name])


@given(shape=images(), seed=seeds)
def test_batchnorm_normalises(shape, seed):
    """Training: y has mean beta and variance gamma^2 var / (var + eps). Evaluation: the running statistics do it."""
    layer = BatchNorm2d(shape[-1])
    case = make_case("batchnorm, training", layer, shape, seed)
    gamma, beta = layer.params["weight"], layer.params["bias"]
    y, _ = case.forward()
    var = case.x.var((0, 1, 2))
    np.testing.assert_allclose(y.mean((0, 1, 2)), beta, atol=1e-10)
    np.testing.assert_allclose(y.var((0, 1, 2)), gamma**2 * var / (var + 1e-5), atol=1e-10)
    mean, var = layer.buffers["running_mean"], layer.buffers["running_var"]
    same(layer.forward(case.x)[0], gamma * (case.x - mean) / np.sqrt(var + 1e-5) + beta, "y in evaluation mode")


def test_a_live_evaluation_cache_survives_a_training_pass(rng):
    """An attack's forward pass (evaluation) may still be waiting for its backward pass when training goes on."""
    layer = prepare(BatchNorm2d(2), rng)
    x, dy = rng.standard_normal((2, 3, 2, 2, 2))
    _, cache = layer.forward(x)
    layer.backward(dy, cache)
    expected = snapshot(layer, "grads")
    for gradient in slots(layer, "grads").values():
        gradient[...] = 0
    layer.forward(x + 1, train=True)
    layer.backward(dy, cache)
    for name, gradient in slots(layer, "grads").items():
        same(gradient, expected[name], name)


# --- ReLU, pooling, normalisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_relu_at_zero(dtype):
    """The kink is pinned: ReLU'(0) = 0, as in PyTorch; for -0.0 as well."""
    z = np.array([[-1.0, -0.0, 0.0, 1e-30, 2.0]], dtype)
    y, cache = ReLU().forward(z)
    np.testing.assert_array_equal(y, [[0, 0, 0, z[0, 3], 2]])
    np.testing.assert_array_equal(ReLU().backward(np.full_like(z, 3), cache), [[0, 0, 0, 3, 3]])


@given(shape=images(n=(1, 2), size=(1, 3)), window=st.integers(1, 3), seed=seeds)
def test_pooling_is_the_mean_of_each_tile(shape, window, seed):
    n, h, w, c = shape
    x = np.random.default_rng(seed).standard_normal((n, h * window, w * window, c))
    y, _ = AveragePool2d(window).forward(x)
    assert y.shape == shape
    for at in np.ndindex(n, h, w):
        tile = x[at[0], at[1] * window : (at[1] + 1) * window, at[2] * window : (at[2] + 1) * window]
        same(y[at], tile.mean((0, 1)), "tile")


def test_pooling_refuses_tiles_that_do_not_fit():
    for window, shape in ((2, (1, 3, 4, 1)), (2, (1, 4, 3, 1)), (None, (1, 2, 4, 1)), (None, (1, 4, 2, 1))):
        with pytest.raises(ValueError, match="cannot be pooled"):
            AveragePool2d(window).forward(np.zeros(shape))


def test_normalize_is_per_channel(rng):
    x = rng.random((2, 3, 3, 2))
    y, _ = prepare(Normalize([0.5, 0.25], [2.0, 0.5]), rng).forward(x)
    same(y, np.stack([(x[..., 0] - 0.5) / 2, (x[..., 1] - 0.25) / 0.5], -1), "y")


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("channels", "options", "shortcut"),
    [
        ((2, 2, 1), {}, "x"),
        ((2, 2, 1), {"out_shortcut": False}, "x"),
        ((2, 2, 1), {"activated_identity": True}, "h"),
        ((2, 3, 1), {}, "A h"),
        ((2, 2, 2), {}, "A h"),
        ((2, 3, 2), {"out_shortcut": False}, "A x"),
        ((2, 3, 2), {"out_shortcut": False, "activated_identity": True}, "A x"),
    ],
)
def test_block_is_its_formula(channels, options, shortcut, train, rng):
    """y = conv2(relu(bn2(conv1(h)))) + shortcut, h = relu(bn1(x)): which of the four shortcuts, flag by flag."""
    block = prepare(PreActBlock(*channels, **options), rng)
    x = rng.standard_normal((3, 4, 4, 2))
    parts = block.children

    def run(name, value):
        y = parts[name].forward(value, train=train)[0]
        return y.full() if isinstance(y, Normalized) else y

    h = np.maximum(run("bn1", x), 0)
    wanted = run("conv2", np.maximum(run("bn2", run("conv1", h)), 0))
    wanted += {"x": lambda: x, "h": lambda: h, "A h": lambda: run("shortcut", h), "A x": lambda: run("shortcut", x)}[
        shortcut
    ]()
    same(block.forward(x, train=train)[0], wanted, "y")
    mr.gradcheck(block, x, train=train)


# --- the analytic layers, by the complex step: exact to rounding ------------------------------------------------------


@fewer(0.4)
@given(data=st.data(), kind=st.sampled_from(sorted(ANALYTIC - {"batchnorm, training"})), seed=seeds)
def test_analytic_layers_by_the_complex_step(data, kind, seed):
    case = make_case(kind, *data.draw(KINDS[kind]), seed)
    assert mr.gradcheck(case.layer, case.x, train=False, method="complex", rtol=1e-9) < 1e-9


@fewer(0.4)
@given(data=st.data(), seed=seeds)
def test_batchnorm_by_the_complex_step(data, seed):
    """Training mode; on the formulas, since a running mean cannot be complex."""
    layer, shape = data.draw(_batchnorm())
    rng = np.random.default_rng(seed)
    x, gamma, beta = rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])

    def forward(x, gamma, beta):
        mean, var = reference.batchnorm_statistics(x)
        return reference.batchnorm(x, gamma, beta, mean, (var + layer.eps) ** -0.5)

    def backward(dy):
        mean, var = reference.batchnorm_statistics(x)
        inv_std = (var + layer.eps) ** -0.5
        dgamma, dbeta = reference.batchnorm_parameter_gradient(dy, x, mean, inv_std)
        return reference.batchnorm_backward(dy, x, gamma, mean, inv_std, dgamma, dbeta), dgamma, dbeta

    check_vjp(forward, backward, [x, gamma, beta], method="complex", rtol=1e-9)
    with pytest.raises(GradientError):  # a variance that does not move with x
        check_vjp(
            forward,
            lambda dy: (dy * gamma * (x.var((0, 1, 2)) + layer.eps) ** -0.5, *backward(dy)[1:]),
            [x, gamma, beta],
        )


# --- PairBatch: x and rho instead of [x; x + rho; x - rho] ------------------------------------------------------------


@given(shape=images(), seed=seeds)
def test_a_pair_batch_is_its_three_images(shape, seed):
    rng = np.random.default_rng(seed)
    x, rho, dy = rng.standard_normal(shape), rng.standard_normal(shape), rng.standard_normal((3 * shape[0], *shape[1:]))
    np.testing.assert_array_equal(PairBatch(x, rho).full(), np.concatenate([x, x + rho, x - rho]))
    check_vjp(
        lambda x, rho: PairBatch(x, rho).full(), lambda dy: tuple(PairBatch.gradient(dy)), [x, rho], method="complex"
    )
    centre, plus, minus = np.split(dy, 3)
    same(PairBatch.gradient(dy).x, centre + plus + minus, "dx")
    same(PairBatch.gradient(dy).rho, plus - minus, "drho")


@pytest.mark.parametrize("kind", [k for k in KINDS if "block" not in k and "batchnorm" not in k])
@fewer(0.2)
@given(data=st.data(), seed=seeds)
def test_layers_take_a_pair_batch(kind, data, seed):
    """The same output, dx and parameter gradients as on the 3N batch, for every layer that takes a PairBatch."""
    case = make_case(kind, *data.draw(KINDS[kind]), seed)
    layer, x = case.layer, case.x
    assert layer.takes_pairs
    rho = np.random.default_rng(seed + 1).standard_normal(x.shape)
    full = Case(layer, PairBatch(x, rho).full(), case.train)
    y, _ = full.forward()
    dy = full.upstream(y)
    dx, grads = gradients(full, dy)
    for gradient in slots(layer, "grads").values():
        gradient[...] = 0
    pair_y, cache = layer.forward(PairBatch(x, rho), train=case.train)
    linear = isinstance(pair_y, PairBatch)
    same(pair_y.full() if linear else pair_y, y, "y")
    d_pair = layer.backward(PairBatch.gradient(dy) if linear else dy, cache)
    for found, expected in zip(d_pair, PairBatch.gradient(dx), strict=True):
        same(found, expected, "dx")
    for name, gradient in slots(layer, "grads").items():
        scale = np.abs(grads[name]).max(initial=0) + np.abs(dy).sum() * 1e-3
        np.testing.assert_allclose(gradient, grads[name], rtol=1e-10, atol=1e-12 * scale, err_msg=name)
