"""The GPU's kernels without a GPU: run on the CPU (``shim.py``) against ``reference``, and compiled (``nvrtc.py``).

With one (``-m gpu``) the same tests run on the device. A bfloat16 number has 8 significant bits: whatever is stored as
one may be off by 2^-8 of itself, besides float32's 1e-5 of the terms of a sum (see ``test_ops.py``).
"""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_cupy
import numpy as np
import nvrtc
import pytest
import shim
from bf16 import (
    ALL_ROUND,
    BF16,
    NETWORKS,
    PICTURES,
    ROUNDING,
    check,
    check_batchnorm_relu,
    check_casts,
    check_convolutions,
    check_operation,
    check_pairs,
    exact,
    rounded,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_ops import OPERATIONS, as_tuple, compare, feature_maps, place

from nanomr import data, graph, layers, losses, manifold, methods, models, optim, train
from nanomr import rng as streams
from nanomr.backend import gpu_available, to_numpy
from nanomr.errors import UserError
from nanomr.ops import gpu, reference
from nanomr.ops.gpu import conv as gpu_conv
from nanomr.ops.gpu import cuda
from nanomr.ops.gpu import normalization as gpu_normalization
from nanomr.testing.strategies import convolutions, layouts, seeds

DEVICES = ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)]
needs_compiler = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))
needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


@pytest.fixture
def device(request, monkeypatch):
    """The array module of the device: CuPy, or NumPy with kernels that run on the CPU."""
    if request.param == "gpu":
        return importlib.import_module("cupy")
    if shim.missing():
        pytest.skip(shim.missing())
    monkeypatch.setattr(cuda, "launcher", shim.Launcher())
    return np


on_device = pytest.mark.parametrize("device", DEVICES, indirect=True)


def examples(share):
    """Settings: this share of the profile's examples. The fixture lives through all of them, and only counts."""
    suppress = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=max(3, int(settings().max_examples * share)), suppress_health_check=suppress)


# --- float32: everything that test_ops compares -----------------------------------------------------------------------

# Those that differ from the reference; float32 convolutions are im2col, in test_ops.
FLOAT_KERNELS = [name for name in OPERATIONS if name in gpu.OWN and not name.startswith("conv2d")]


@needs_compiler
@pytest.mark.parametrize("operation", FLOAT_KERNELS)
@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@given(data=st.data())
@examples(0.4)
def test_float32_kernels_agree_with_the_reference(device, operation, data):
    args = data.draw(OPERATIONS[operation].draw)
    placed = [place(a, data.draw(layouts), device) for a in args]
    before, numbers = cuda.launcher.launches, [exact(a) for a in args]
    found = getattr(gpu, operation)(*placed)
    assert cuda.launcher.launches > before, "no kernel ran"
    compare(found, getattr(reference, operation)(*numbers), OPERATIONS[operation].magnitude(*numbers), operation)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@given(offset=st.sampled_from([0.0, 300.0, -300.0]), size=st.integers(2, 400), c=st.integers(1, 33), seed=seeds)
@examples(0.4)
def test_variance_survives_a_large_mean(device, offset, size, c, seed):
    x = (np.random.default_rng(seed).standard_normal((size, 1, 1, c)) * 0.1 + offset).astype(np.float32)
    _, var = gpu.batchnorm_statistics(x)
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-4, atol=1e-13 * offset**2)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_passes_through(device, dtype, rng):
    z = rng.standard_normal((6, 8)).astype(dtype)
    z[2, 3] = np.nan
    np.testing.assert_array_equal(np.isnan(gpu.relu(z)), np.isnan(z))
    y, squares = gpu.relu_hamming(z, 8.0)
    assert np.isnan(y).sum() == 1 and np.isnan(squares).tolist() == [True, False]
    dz = gpu.relu_hamming_backward(np.ones_like(z), z, 8.0, np.ones(2, np.float32))
    assert np.isnan(dz[2, 3]) and not np.isnan(dz[1::2]).any()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("operation", PICTURES)
@given(data=st.data())
@examples(0.4)
def test_bfloat16_kernels_agree_with_the_reference(device, operation, data):
    check_operation(gpu, device, operation, data.draw(OPERATIONS[operation].draw))


@on_device
@given(shape=feature_maps, seed=seeds)
@examples(0.4)
def test_bfloat16_pairs(device, shape, seed):
    check_pairs(gpu, device, shape, seed)


@on_device
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_casts(device, size, rng):
    check_casts(gpu, device, rng, size)


@on_device
@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "padding"), NETWORKS)
def test_convolutions_of_the_networks(device, x_shape, w_shape, stride, padding, rng):
    check_convolutions(gpu, device, rng, x_shape, w_shape, stride, padding)


@on_device
@given(
    case=convolutions(batch=(1, 3), channels=(1, 3, 8, 17, 40), kernel=4, stride=3, size=7, square=False), seed=seeds
)
@examples(0.6)
def test_convolutions_of_any_shape(device, case, seed):
    check_convolutions(gpu, device, np.random.default_rng(seed), case.x_shape, case.w_shape, case.stride, case.padding)


OTHER_TILES = [(kind, name) for kind, tiles in gpu_conv.TILES.items() for name in tiles if name != "usual"]


@pytest.fixture
def use_tiles():
    yield gpu.use_tiles
    gpu.use_tiles()


@on_device
@pytest.mark.parametrize(("kind", "name"), OTHER_TILES)
def test_tiles_that_may_be_faster(device, kind, name, rng, use_tiles):
    """They are right, and give the same bits; on a GPU, wgmma may have its own way to add 16 products."""
    other, usual = gpu_conv.TILES[kind][name], gpu_conv.TILES[kind]["usual"]
    if device is not np and other.wgmma and device.cuda.Device().compute_capability != "90":
        pytest.skip("wgmma is an instruction of compute capability 9.0")
    assert (other.bm, other.bn) == (usual.bm, usual.bn) and gpu_conv.SPLIT % other.bk == 0
    x_shape, w_shape, stride = {
        "narrow": ((2, 5, 6, 40), (3, 3, 40, 56), 2),
        "wide": ((2, 5, 6, 72), (3, 3, 72, 80), 2),
        "tall": ((5, 9, 8, 24), (3, 3, 24, 16), 1),
    }[kind]
    x, w, dy = (rng.standard_normal(s).astype(BF16) for s in (x_shape, w_shape, _y_shape(x_shape, w_shape, stride)))
    x, w, dy = device.asarray(x), device.asarray(w.astype(np.float32)), device.asarray(dy)
    bits = []
    for tile in ("usual", name):
        use_tiles({product: tile for product, (_, of) in gpu_conv.PRODUCTS.items() if of == kind})
        y = gpu.conv2d(x, w, None, stride, ALL_ROUND)
        dx = gpu.conv2d_input_gradient(dy, w, stride, ALL_ROUND, x_shape)
        bits.append([to_numpy(a).tobytes() for a in (y, dx, gpu.conv2d_dw(x, dy, w_shape, stride, ALL_ROUND))])
    assert bits[0] == bits[1] or (other.wgmma and device is not np)
    plans = [gpu.conv_plan(d, x_shape, w_shape, stride, ALL_ROUND) for d in range(3)]
    assert other in [plan.tile for plan in plans]
    check_convolutions(gpu, device, rng, x_shape, w_shape, stride, ALL_ROUND)
    assert all(other.shared(d) <= 113 << 10 for d in range(3)), "two blocks on a multiprocessor"


def _y_shape(x_shape, w_shape, stride):
    return reference.conv2d_shape(x_shape, w_shape, stride, ALL_ROUND)


@on_device
def test_a_convolution_split_over_many_blocks(device, rng):
    """More pixels than a split takes, and a last split that is not full."""
    x_shape, w_shape = (5, 16, 15, 8), (3, 3, 8, 8)
    plan = gpu.conv_plan(gpu_conv.WEIGHT, x_shape, w_shape, 1, ALL_ROUND)
    assert plan.splits > 2 and (5 * 16 * 15) % plan.sizes[-1]
    check_convolutions(gpu, device, rng, x_shape, w_shape, 1, ALL_ROUND)


# --- fused passes -----------------------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("hamming", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 4, 5, 16), (3, 3, 2, 5), (3, 1, 2, 512), (3, 2, 2, 264), (3, 1, 1, 2056)])
def test_batchnorm_relu_in_one_pass(device, hamming, dtype, shape, rng):
    """264 and 2056 channels are beyond what the kernels take in some dtypes: plain CuPy."""
    check_batchnorm_relu(gpu, device, rng, shape, dtype, hamming)


# --- losses, optimiser, randomness ------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (7, 10), (300, 10)])
def test_losses_in_one_launch(device, n, classes, rng):
    logits = (rng.standard_normal((3 * n, classes)) * 3).astype(np.float32)
    labels = rng.integers(0, classes, n)
    d_clean, d_plus, d_minus = np.split(logits.astype(np.float64), 3)
    entropy, d_clean = losses.cross_entropy(d_clean, labels)
    pair, d_plus, d_minus = losses.intrinsic(d_plus, d_minus)
    values, gradient = gpu.losses(device.asarray(logits), device.asarray(labels), 0.4)
    np.testing.assert_allclose(to_numpy(values), [entropy, pair], rtol=1e-5)
    expected = np.concatenate([d_clean, 0.4 * d_plus, 0.4 * d_minus])
    np.testing.assert_allclose(to_numpy(gradient), expected, rtol=1e-5, atol=1e-6 / n)
    values, gradient = gpu.losses(device.asarray(logits[:n]), device.asarray(labels))
    np.testing.assert_allclose(to_numpy(values), [entropy, 0], rtol=1e-5)
    np.testing.assert_allclose(to_numpy(gradient), d_clean, rtol=1e-5, atol=1e-6 / n)


@on_device
def test_a_nan_among_the_logits_shows_in_the_loss(device):
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = np.nan
    assert np.isnan(to_numpy(gpu.losses(device.asarray(logits), device.zeros(3, int))[0])[0])


@on_device
def test_sgd_update_reads_the_rate_from_memory(device, rng):
    w, g, v = (rng.standard_normal(1000).astype(np.float32) for _ in range(3))
    on = [device.asarray(a.copy()) for a in (w, g, v)]
    gpu.sgd_update(*on, device.asarray(0.1, np.float32), 0.9, 5e-4)
    velocity = 0.9 * v.astype(np.float64) + g + 5e-4 * w
    np.testing.assert_allclose(to_numpy(on[2]), velocity, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_numpy(on[0]), w - 0.1 * velocity, rtol=1e-5, atol=1e-6)


@on_device
def test_losses_do_not_depend_on_the_order_of_threads(device, rng):
    logits, labels = rng.standard_normal((6, 10)).astype(np.float32), rng.integers(0, 10, 2)
    arguments = device.asarray(logits), device.asarray(labels), 0.4
    first = to_numpy(gpu.losses(*arguments)[0])
    for _ in range(30):
        np.testing.assert_array_equal(to_numpy(gpu.losses(*arguments)[0]), first)


@on_device
@pytest.mark.parametrize("size", [1, 255, 256, 1000, 70_000])
def test_norm(device, size, rng):
    x = rng.standard_normal(size).astype(np.float32)
    assert float(gpu.norm(device.asarray(x))) == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-6)


@on_device
@pytest.mark.parametrize("step", [0, 2, 7, 2**40 + 1])
@pytest.mark.parametrize("n", [2, 300])
def test_a_step_is_looked_up_on_the_device(device, n, step, rng):
    steps = 5
    order, labels = rng.permutation(steps * n).astype(np.int32), rng.integers(0, 10, steps * n).astype(np.int32)
    schedule = rng.random((steps, 4), np.float32)
    on = [device.asarray(a) for a in (np.array([step], np.uint64), order, labels, schedule)]
    index, chosen, now = (to_numpy(a) for a in gpu.begin_step(*on, n))
    expected = order.reshape(steps, n)[step % steps]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(chosen, labels[expected])
    np.testing.assert_array_equal(now, schedule[step % steps])


@on_device
def test_the_log_is_kept_on_the_device(device):
    """Sums in double; peaks grow until one of them is beyond 10; a term that is not there counts as 0."""
    totals, peaks, step = (device.asarray(a) for a in (np.full(5, 1e9), np.zeros(2), np.array([6], np.uint64)))
    now = device.asarray(np.array([0, 0, 2, 3], np.float32))
    log = [([4, 2, 0.5, 1, 8], [0.5, 1.5]), ([4, 2, 0.25, 8, 8], [0.5, 12]), ([4, 2, 9, 9, 8], [0.5, 12])]
    for i, (values, expected) in enumerate(log):
        gpu.end_step([device.asarray(np.array(v, np.float32)) for v in values], now, totals, peaks, step)
        np.testing.assert_array_equal(to_numpy(peaks), expected)
        assert to_numpy(step) == [7 + i]
    np.testing.assert_array_equal(to_numpy(totals) - 1e9, np.sum([values for values, _ in log], 0))
    gpu.end_step([now[2:3], now[3:4], None, 0.0, now[3:4]], now, totals, peaks, step)
    np.testing.assert_array_equal(to_numpy(totals) - 1e9, [14, 9, 9.75, 18, 27])


STEPS = st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1))
REJECTED = dict(seed=1, step=229_419)  # draw 75 has one of the four words in 2^32 that are no good for 0 ... 8


def test_numpy_rejects_a_draw():
    """Where the next test needs one: NumPy takes the bits of draw 76 for it, and so on."""
    words = streams.generator(REJECTED["seed"], streams.AUGMENT, REJECTED["step"]).bit_generator.random_raw(128)
    halves = words.astype("<u8").view("<u4").astype(np.uint64)
    assert np.flatnonzero(9 * halves % 2**32 < 4).tolist() == [75]
    drawn = streams.generator(REJECTED["seed"], streams.AUGMENT, REJECTED["step"]).integers(0, 9, 200)
    np.testing.assert_array_equal(drawn, np.delete(9 * halves >> 32, 75)[:200])


def check_augmentation(device, count, seed, step):
    draw = streams.generator(seed, streams.AUGMENT, step)
    expected = draw.integers(0, 9, count), draw.integers(0, 9, count), draw.random(count) < 0.5
    found = gpu.draw_augmentation(count, seed, device.asarray(np.array([step], np.uint64)))
    for f, e, what in zip(found, expected, ("top", "left", "flip"), strict=True):
        np.testing.assert_array_equal(to_numpy(f), e, err_msg=what)


@on_device
@examples(1)
@given(count=st.integers(1, 70), seed=STEPS, step=STEPS)
@example(count=1500, seed=0, step=0)
@example(count=128, **REJECTED)
@example(count=490_000, seed=0, step=2479)  # the 977,049th is rejected
def test_augmentation_is_drawn_as_by_numpy(device, count, seed, step):
    """To the bit: NumPy's Philox, its bounded integers and its doubles."""
    check_augmentation(device, count, seed, step)


@on_device
@examples(1)
@given(shape=st.tuples(*[st.integers(1, 12)] * 3), seed=STEPS, step=STEPS, eps=st.sampled_from([2 / 255, 8 / 255]))
def test_corners_are_drawn_as_by_numpy(device, shape, seed, step, eps):
    words = streams.words(seed, streams.CORNERS, step, -(-int(np.prod(shape)) // 64))
    expected = reference.corners(words, shape, eps)
    found = gpu.draw_corners(shape, eps, seed, device.asarray(np.array([step], np.uint64)))
    np.testing.assert_array_equal(to_numpy(found), expected)
    np.testing.assert_array_equal(to_numpy(gpu.corners(device.asarray(words), shape, eps)), expected)


def test_corners_of_a_batch_fill_a_gpu(monkeypatch):
    """A warp for 256 of them: the paper's batch takes more blocks than an H100 has multiprocessors, 132."""
    grids = []
    monkeypatch.setattr(cuda, "launcher", lambda source, defines, name, grid, *_: grids.append(grid))
    gpu.draw_corners((128, 32, 32, 3), 0.5, 1, np.zeros(1, np.uint64))
    assert grids == [(192, 1, 1)]


# --- a whole network --------------------------------------------------------------------------------------------------


def tiny_resnet():
    """PreActResNet18's parts, once each."""
    blocks = {"0": layers.PreActBlock(8, 8), "1": layers.PreActBlock(8, 16, 2)}
    return layers.Sequential(
        {
            "normalize": layers.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
            "conv1": layers.Conv2d(3, 8, 3, 1, 1, bias=False),
            **blocks,
            "bn": layers.BatchNorm2d(16, before_relu=True),
            "relu": layers.ReLU(),
            "pool": layers.AveragePool2d(),
            "flatten": layers.Flatten(),
            "linear": layers.Linear(16, 10),
        }
    )


def step_of(net, x, rho, labels, gamma_h=500.0):
    """({name: value}, {name: gradient}) of one manifold step, in the dtype of x."""
    for _, layer in net.walk():
        layer.grads = {}
    values = methods.manifold_step(net, x, labels, rho, gamma_i=0.4, gamma_h=gamma_h)
    found = {f"{path}.{name}": to_numpy(g) for path, layer in net.walk() for name, g in layer.grads.items()}
    return {name: float(v) for name, v in values.items()}, found


def compute_with(monkeypatch, ops):
    """Let everything that a training step consists of use these functions, whatever the arrays are."""
    for module in (layers, losses, manifold, optim):
        monkeypatch.setattr(module, "ops_for", lambda _: ops)


class Rounded:
    """The reference, with every picture rounded to bfloat16 as it is stored: how near bfloat16 can come."""

    def __getattr__(self, name):
        function = getattr(reference, name)

        def run(*args):
            results = tuple(rounded(r) if r.ndim == 4 else r for r in as_tuple(function(*args)))
            return results if len(results) > 1 else results[0]

        return function if name == "conv2d_weight_gradient" else run


@on_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_manifold_step(device, dtype, rng, monkeypatch):
    """float32: the reference's values and gradients, to 1e-4. bfloat16: the gradient is as far from the float64 step's
    as that of the reference with rounded pictures, give or take half of it, and each parameter's is at most three times
    as far: another order of summing is another draw of the noise. The control: without the Hamming term the gradient
    is far away."""
    net = tiny_resnet()
    for _, layer in net.walk():
        if "weight" in layer.params and layer.params["weight"].ndim > 1:
            shape = layer.params["weight"].shape
            layer.params["weight"] = rounded(rng.standard_normal(shape) / np.prod(shape[:-1]) ** 0.5)
    x, labels = rounded(rng.random((8, 8, 8, 3))), rng.integers(0, 10, 8)
    rho = rounded(8 / 255 * rng.choice([-1, 1], x.shape))

    compute_with(monkeypatch, reference)
    values, gradients = step_of(net, *(a.astype(np.float64) for a in (x, rho)), labels)
    _, control = step_of(net, *(a.astype(np.float64) for a in (x, rho)), labels, gamma_h=0.0)
    compute_with(monkeypatch, Rounded())
    _, noisy = step_of(net, x, rho, labels)

    compute_with(monkeypatch, gpu)
    for _, layer in net.walk():
        layer.params = {name: device.asarray(p) for name, p in layer.params.items()}
        layer.buffers = {name: device.asarray(p) for name, p in layer.buffers.items()}
    found_values, found = step_of(net, *(device.asarray(a.astype(dtype)) for a in (x, rho)), device.asarray(labels))

    def distance(of, *names):
        off, size = ([v[name].ravel() for name in names] for v in ({n: of[n] - gradients[n] for n in names}, gradients))
        return np.linalg.norm(np.concatenate(off)) / np.linalg.norm(np.concatenate(size))

    for name, value in values.items():
        # The intrinsic term is a small difference of logits: its relative noise is large. Its gradient is below.
        if dtype == "float32" or name != "intrinsic":
            assert found_values[name] == pytest.approx(value, rel=1e-4 if dtype == "float32" else ROUNDING), name
    for name in gradients:
        assert found[name].dtype == np.float32, name
        allowed = 1e-4 if dtype == "float32" else 3 * max(distance(noisy, name), ROUNDING)
        assert distance(found, name) <= allowed, f"{name} is off by {distance(found, name):.1%} of {allowed:.1%}"
    allowed = 1e-4 if dtype == "float32" else 1.5 * distance(noisy, *gradients)
    assert distance(found, *gradients) <= allowed
    assert distance(control, *gradients) > 2 * allowed, "the test would not notice a missing term"


@on_device
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((8, 8, 1), {}),
        ((8, 8, 1), {"activated_identity": True}),
        ((8, 16, 2), {}),
        ((8, 16, 2), {"out_shortcut": False}),
        ((5, 12, 2), {}),  # channels that are filled up
        ((5, 5, 1), {}),
    ],
    ids=str,
)
def test_residual_sums(device, channels, options, train, rng, monkeypatch):
    """float32: a block's y, dx and gradients are the reference's. bfloat16: y is near (0.5 % found), gradients are
    within what a few ReLUs that take the other branch do to so few numbers (9 % found), and no pass only adds."""
    block, x = layers.PreActBlock(*channels, **options), rounded(rng.standard_normal((3, 6, 6, channels[0])))
    dy = rounded(rng.standard_normal((3, 6 // channels[2], 6 // channels[2], channels[1])))
    for _, layer in block.walk():
        layer.params = {name: p + rng.standard_normal(p.shape, np.float32) / 4 for name, p in layer.params.items()}

    def passes(x, dy):
        for _, layer in block.walk():
            layer.grads = {}
        y, cache = block.forward(x, train=train)
        assert block.backward(dy, cache, param_grads=False, input_grad=False) is None
        dx = block.backward(dy, cache)
        gradients = {f"{path}.{n}": to_numpy(g) for path, layer in block.walk() for n, g in layer.grads.items()}
        assert y.dtype == dx.dtype == x.dtype
        return {"y": exact(to_numpy(y)), "dx": exact(to_numpy(dx))} | gradients

    compute_with(monkeypatch, reference)
    expected = passes(exact(x), exact(dy))
    for _, layer in block.walk():
        layer.params = {name: device.asarray(p) for name, p in layer.params.items()}
        layer.buffers = {name: device.asarray(p) for name, p in layer.buffers.items()}
    compute_with(monkeypatch, gpu)
    names, launcher = [], cuda.launcher

    def noted(source, defines, name, *rest):
        names.append(name)
        launcher(source, defines, name, *rest)

    if launcher is not None:
        monkeypatch.setattr(cuda, "launcher", noted)
    for dtype, tolerance in ((np.float32, 1e-4), (BF16, 0.2)):
        names.clear()
        found = passes(device.asarray(x.astype(dtype)), device.asarray(dy.astype(dtype)))
        for name, value in expected.items():
            allowed = min(tolerance, 0.02) if name == "y" else tolerance
            assert np.linalg.norm(found[name] - value) <= allowed * np.linalg.norm(value), (dtype, name)
    assert launcher is None or ("convolve" in names and "add" not in names)


@on_device
def test_a_standard_step(device, rng, monkeypatch):
    """Batch norm and ReLU in one pass, without a tap."""
    net, x, labels = tiny_resnet(), rounded(rng.random((4, 8, 8, 3))), rng.integers(0, 10, 4)
    for _, layer in net.walk():
        layer.params = {
            k: v if k == "bias" else v + rng.standard_normal(v.shape, np.float32) / 4 for k, v in layer.params.items()
        }

    def gradients():
        return {f"{path}.{name}": to_numpy(g) for path, layer in net.walk() for name, g in layer.grads.items()}

    compute_with(monkeypatch, reference)
    methods.standard_step(net, x.astype(np.float64), labels)
    expected = gradients()
    for _, layer in net.walk():
        layer.grads = {}
        layer.params = {name: device.asarray(p) for name, p in layer.params.items()}
        layer.buffers = {name: device.asarray(p) for name, p in layer.buffers.items()}
    compute_with(monkeypatch, gpu)
    methods.standard_step(net, device.asarray(x), device.asarray(labels))
    for name, found in gradients().items():
        assert np.linalg.norm(found - expected[name]) <= 1e-4 * np.linalg.norm(expected[name]), name


@on_device
def test_a_tap_sees_what_relu_sees(device, rng, monkeypatch):
    """... in training, too, where the normalisation is left to ReLU: a tap that knows nothing of that gets z."""
    seen = []

    class Tap:
        def forward(self, z):
            seen.append(z)
            return gpu.relu(z), None

    layer = layers.Sequential({"bn": layers.BatchNorm2d(8, before_relu=True), "relu": layers.ReLU()})
    for _, below in layer.walk():
        below.params = {name: device.asarray(p) for name, p in below.params.items()}
        below.buffers = {name: device.asarray(p) for name, p in below.buffers.items()}
    x = rng.standard_normal((3, 4, 4, 8)).astype(np.float32)
    compute_with(monkeypatch, gpu)
    y, _ = layer.forward(device.asarray(x), train=True, tap=Tap())
    z = (x - x.mean((0, 1, 2))) / (x.var((0, 1, 2)) + 1e-5) ** 0.5
    np.testing.assert_allclose(to_numpy(seen[0]), z, atol=1e-4)
    np.testing.assert_allclose(to_numpy(y), np.maximum(z, 0), atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_a_float32_model_takes_bfloat16_images(device, rng, monkeypatch):
    """Logits and gradients are float32, and near those of float32 images."""
    compute_with(monkeypatch, gpu)
    net = models.mlp((8 * 8 * 3, 20, 5), seed=1, input_shape=(8, 8, 3))
    x = rounded(rng.random((6, *net.input_shape)))
    expected, _ = net.forward(x)
    logits, cache = net.forward(x.astype(BF16))
    assert logits.dtype == np.float32 and net.backward(logits, cache).shape == x.shape
    np.testing.assert_allclose(logits, expected, atol=4 * ROUNDING * np.abs(expected).max())
    with pytest.raises(ValueError, match="takes images"):
        net.astype(np.float64).forward(x.astype(BF16))


# --- the training loop on a device (a stand-in for CuPy: fake_cupy.py) ------------------------------------------------


def tiny_model(seed=0, late_norm=True):
    """tiny_resnet as a Model; without ``late_norm`` a residual sum is pooled, as in jin_v1."""
    children = tiny_resnet().children
    if not late_norm:
        children = {name: layer for name, layer in children.items() if name not in ("bn", "relu")}
    return models.Model(children, {"name": "tiny", "late_norm": late_norm}, (8, 8, 3), seed)


@pytest.fixture
def fake(monkeypatch):
    """A machine with a GPU that is none."""
    if shim.missing():
        pytest.skip(shim.missing())
    fake_cupy.install(monkeypatch)
    monkeypatch.setitem(models.BUILDERS, "tiny", tiny_model)
    yield fake_cupy
    fake_cupy.forget()


def trainer_of(folder, device="gpu", graph=True, late_norm=True, **options):
    """Of 6 images, 3 steps of 2 an epoch."""
    draw = np.random.default_rng(5)
    images, labels = draw.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8), draw.integers(0, 10, 7)
    dataset = data.Dataset("noise", tuple("0123456789"), images, labels, images, labels, {})
    options = dict(batch_size=2, hold_out=1, gamma_h=30.0, clip=3.0, precision="bf16") | options
    architecture = {"name": "tiny", "late_norm": late_norm}
    config = train.Config(architecture, options.pop("method", "manifold"), "noise", 4, **options)
    return train.Trainer(config, dataset, folder, device, graph=graph)


def state_of(trainer):
    """All that two equal trainers agree on."""
    found = trainer.model.state_dict() | {"velocity": trainer.optimizer.velocity, "totals": trainer.totals}
    found |= {"peaks": trainer.peaks, "gradients": trainer.model.gradients}
    return {name: to_numpy(value) for name, value in found.items()}


def assert_equal_states(found, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("method", ["manifold", "hamming", "standard"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_as_a_cpu_does(fake, precision, method, augment, tmp_path):
    """fp32: five steps, over the end of an epoch; the same images, corners, schedule, sums for the log. bf16: the
    losses of two steps at the same weights (the first rate is 0); its gradient is held in test_a_manifold_step."""
    here = trainer_of(tmp_path, "cpu", precision="fp32", method=method, augment=augment)
    there = trainer_of(tmp_path, graph=False, precision=precision, method=method, augment=augment)
    steps = 5 if precision == "fp32" else 2
    for _ in range(steps):
        here.advance()
        there.advance()
    expected, found = state_of(here), state_of(there)
    if precision == "fp32":
        change = here.model.weights - trainer_of(tmp_path, "cpu", precision="fp32").model.weights
        off = to_numpy(there.model.weights) - here.model.weights
        assert np.linalg.norm(off) <= 1e-3 * np.linalg.norm(change)
        np.testing.assert_allclose(found["totals"], expected["totals"], rtol=1e-3)
        np.testing.assert_allclose(found["peaks"], expected["peaks"], rtol=1e-3)
    else:
        losses_ = [0, 1, 3]  # the intrinsic term is a small difference of logits: its relative noise is large
        np.testing.assert_allclose(found["totals"][losses_], expected["totals"][losses_], rtol=2 * ROUNDING)
    assert (expected["totals"] > 0).tolist() == [True, True, method != "standard", method != "standard", True]
    assert to_numpy(there.counter) == [steps] and there.step == steps


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(hamming_norm="sample", augment=False, clip=0.0),
        dict(late_norm=False),
        dict(method="standard"),
    ],
    ids=str,
)
def test_replays_are_steps(fake, options, tmp_path):
    """Bit for bit, over the end of an epoch; and the host does nothing in them but to start them."""
    eager, captured = trainer_of(tmp_path, graph=False, **options), trainer_of(tmp_path, **options)
    for step in range(6):
        if step == 4:  # the second one of an epoch, and long captured
            fake.counts.clear()
        captured.advance()
        if step == 4:
            assert fake.counts == {"replay": 1}
        eager.advance()
        assert_equal_states(state_of(captured), state_of(eager))
    fake.counts.clear()
    assert captured._on_device.graph is not None and len(captured._on_device.graph.launches) > 50
    eager._on_device()
    assert not fake.counts.keys() & {"sync", "upload", "cuBLAS"}, "without a graph a step needs nothing, either"


def test_a_step_leaves_few_kernels_to_cupy(fake, tmp_path):
    """However deep the network is: batch norms, Hamming terms and gradients are ours altogether."""
    trainer = trainer_of(tmp_path, clip=0.0)
    for _ in range(2):
        trainer.advance()
    fake.counts.clear()
    trainer.advance()  # the capture
    assert fake.counts["launch"] > 70 and 5 < fake.counts["CuPy"] <= 18


@pytest.mark.parametrize("saved", [1, 4])
def test_a_run_on_a_gpu_is_resumed_bit_for_bit(fake, saved, tmp_path):
    straight, first, second = trainer_of(tmp_path / "a"), trainer_of(tmp_path / "b"), trainer_of(tmp_path / "b")
    for _ in range(6):
        straight.advance()
    for _ in range(saved):
        first.advance()
    first.open_folder()
    first.save()
    second.resume()
    for _ in range(saved, 6):
        second.advance()
    expected = state_of(straight)
    del expected["peaks"]  # these start anew, on a CPU as well
    assert_equal_states(state_of(second), expected)


def test_an_epoch_on_a_gpu_is_looked_at_once(fake, tmp_path, monkeypatch):
    """Whatever CHECK_EVERY says; unless it lasts for minutes."""
    looks, look = [], train.Trainer._stop_on_nan
    monkeypatch.setattr(train.Trainer, "_stop_on_nan", lambda self: (looks.append(self.step), look(self)))
    monkeypatch.setattr(train.Trainer, "_end_epoch", lambda self, bar: self.totals.__setitem__(..., 0))
    monkeypatch.setattr(train.Trainer, "advance", lambda self: setattr(self, "step", self.step + 1))
    monkeypatch.setattr(train, "CHECK_EVERY", 2)
    trainer_of(tmp_path / "a").run()
    assert looks == [3, 6, 9, 12]
    looks.clear()
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    trainer_of(tmp_path / "b").run()
    assert looks == [2, 3, 4, 6, 8, 9, 10, 12]


def test_a_step_with_cublas_is_not_captured(fake, tmp_path, capsys):
    """The control of the tests above: float32 convolutions are noticed. The run goes on, and takes the same steps."""
    trainer, eager = (trainer_of(tmp_path, precision="fp32") for _ in range(2))
    assert trainer._on_device == trainer.device_step, "a graph is for bf16 alone"
    trainer._on_device = step = graph.Replayed(trainer.device_step, warm=1)
    for _ in range(3):
        trainer.advance()
        eager.advance()
    assert re.match("RuntimeError: cuBLAS", step.failure) and step.failure in capsys.readouterr().err
    assert_equal_states(state_of(trainer), state_of(eager))


def test_a_replay_repeats_launches_not_python(fake):
    """The stand-in is as strict as a GPU: a number of the host stays what it was, one on the device is read again."""
    x, by, host = (fake.asarray(np.zeros(1, np.float32)) for _ in range(3))
    numbers = iter([1.0, 10.0, 100.0])

    def step():
        x[...] = x + by
        host[...] = host + next(numbers)

    replayed = graph.Replayed(step, warm=1)
    for value in (1, 2, 3, 4):
        by[...] = value
        replayed()
    assert x.tolist() == [10] and host.tolist() == [31]


@pytest.mark.parametrize(("largest", "advice"), [(10_000, "2 fits"), (50, "not even 1 fits: does another program")])
def test_a_full_card_says_what_fits(fake, largest, advice, tmp_path, monkeypatch):
    """Halves of the batch are tried; the memory of the step that failed is free by then."""
    trainer = trainer_of(tmp_path, batch_size=4)
    freed = []
    monkeypatch.setattr(fake.MemoryPool, "free_all_blocks", lambda self: freed.append(trainer._on_device))
    monkeypatch.setattr(fake, "largest", largest)
    with pytest.raises(UserError, match=f"the GPU's memory is full at --batch-size 4(:|, and) {advice}"):
        trainer.advance()
    assert freed and set(freed) == {None}


def test_a_look_in_bfloat16(fake, tmp_path, rng):
    """Evaluation and its gradient by the kernels of bf16: float32 outside, near the model's own."""
    trainer = trainer_of(tmp_path, graph=False)
    trainer.advance()
    x = fake.asarray(rounded(rng.random((4, 8, 8, 3))))
    dy = fake.asarray(rng.standard_normal((4, 10)).astype(np.float32))
    results = []
    for model in (trainer.model, train.InBfloat16(trainer.model)):
        fake.counts.clear()
        logits, cache = model.forward(x)
        results.append([to_numpy(logits), to_numpy(model.backward(dy, cache, param_grads=False))])
        assert (fake.counts["cuBLAS"] == 0) == (model is not trainer.model)
    for exact_, found in zip(*results, strict=True):
        assert found.dtype == np.float32 and 0 < np.linalg.norm(found - exact_) <= 0.1 * np.linalg.norm(exact_)


def test_a_cpu_has_no_tf32(tmp_path):
    config = train.Config({"name": "mlp"}, "standard", "shapes10", 1, precision="tf32")
    with pytest.raises(UserError, match="--precision tf32 needs a GPU: use --precision fp32 or bf16"):
        train.Trainer(config, None, tmp_path)


# --- planted faults: what the emulation must catch --------------------------------------------------------------------


def convolve_something(g):
    check_convolutions(gpu, np, g, (5, 8, 8, 24), (3, 3, 24, 16), 1, ALL_ROUND)


def add_something(g):
    check_convolutions(gpu, np, g, (2, 7, 6, 16), (3, 3, 16, 24), 2, ALL_ROUND)
    dy, x, plus = (g.standard_normal((6, 3, 3, 8)).astype(np.float32) for _ in range(3))
    gamma, beta = (g.standard_normal(8).astype(np.float32) for _ in range(2))
    arguments = dy, x, gamma, beta, 0 * beta, 1 + 0 * beta, 8.0, np.ones(2, np.float32)
    expected = gpu.batchnorm_relu_backward(*arguments)[0] + plus
    np.testing.assert_allclose(gpu.batchnorm_relu_backward(*arguments, plus)[0], expected, rtol=1e-5, atol=1e-5)


def normalize_something(g):
    x = g.standard_normal((12, 5, 5, 16)).astype(np.float32)
    check(gpu.batchnorm_statistics(x), reference.batchnorm_statistics(exact(x)), (1e-5, 1e-5), "statistics")
    _, squares = gpu.relu_hamming(x, 8.0)
    np.testing.assert_allclose(squares, reference.relu_hamming(exact(x), 8.0)[1], rtol=1e-4)


def multiply_something(g):
    x, w = g.standard_normal((40, 50)).astype(np.float32), g.standard_normal((50, 30)).astype(np.float32)
    np.testing.assert_allclose(gpu.linear(x, w, None), x @ w, rtol=1e-4, atol=1e-4)
    logits, labels = g.standard_normal((200, 10)).astype(np.float32), g.integers(0, 10, 200)
    expected = losses.cross_entropy(logits.astype(np.float64), labels)[0]
    np.testing.assert_allclose(gpu.losses(logits, labels)[0][0], expected, rtol=1e-5)


def draw_something(g):
    check_augmentation(np, 128, **REJECTED)


def wgmma_something(g):
    x, w = (rounded(g.standard_normal(shape)).astype(BF16) for shape in ((5, 8, 8, 24), (3, 3, 24, 72)))
    gpu.use_tiles({"y wide": "wgmma"})
    try:
        y, (a, b) = gpu.conv2d(x, w.astype(np.float32), None, 1, ALL_ROUND), map(exact, (x, w))
    finally:
        gpu.use_tiles()
    size = reference.conv2d(abs(a), abs(b), None, 1, ALL_ROUND)
    check(y, reference.conv2d(a, b, None, 1, ALL_ROUND), 1e-5 * size, "y")


FAULTS = {  # name: (file, what is replaced (the n-th), by what, a run that must fail, words of the error or None)
    "no barrier in the pipeline": (
        "conv.cu",
        "copy_wait<STAGES - 2>();\n    __syncthreads();",
        "copy_wait<STAGES - 2>();",
        convolve_something,
        None,
    ),
    "waits for too few copies": ("conv.cu", "copy_wait<STAGES - 2>", "copy_wait<STAGES - 1>", convolve_something, None),
    "no wait at all": ("conv.cu", "copy_wait<STAGES - 2>();", "", convolve_something, None),
    "no commit": (
        "conv.cu",
        "load((step + STAGES - 1) % STAGES);\n    copy_commit();",
        "load((step + STAGES - 1) % STAGES);",
        convolve_something,
        None,
    ),
    "a stage too early": (
        "conv.cu",
        "load((step + STAGES - 1) % STAGES)",
        "load(step % STAGES)",
        convolve_something,
        None,
    ),
    "the result's tile is written too early": (
        "conv.cu",
        "c = threadIdx.x % (BN / CHUNK) * CHUNK;\n  __syncthreads();",
        "c = threadIdx.x % (BN / CHUNK) * CHUNK;",
        convolve_something,
        None,
    ),
    "... and read too early": (
        "conv.cu",
        "  __syncthreads();\n  if (n0 + c >= channels) return;",
        "  if (n0 + c >= channels) return;",
        convolve_something,
        None,
    ),
    "a stage is filled before all have left it": (
        "conv.cu",
        "    __syncthreads();\n    if (step + STAGES - 1 < steps) load((step + STAGES - 1) % STAGES);",
        "    if (step + STAGES - 1 < steps) load((step + STAGES - 1) % STAGES);\n    __syncthreads();",
        convolve_something,
        None,
    ),
    "half the threads skip a barrier": (
        "conv.cu",
        "    __syncthreads();\n    if (step",
        "    if (threadIdx.x < 64) __syncthreads();\n    if (step",
        convolve_something,
        "divergent barrier",
    ),
    "half a warp skips a product": (
        "conv.cu",
        "    multiply_tiles(a + step",
        "    if (threadIdx.x % 32 < 16) multiply_tiles(a + step",
        convolve_something,
        "divergent warp",
    ),
    "a pixel too many": (
        "conv.cu",
        "to[i] = m < pixels ?",
        "to[i] = m <= pixels ?",
        convolve_something,
        "out of bounds",
    ),
    "a chunk too many": (
        "conv.cu",
        "  if (n0 + c >= channels) return;",
        "  if (n0 + c > channels) return;",
        convolve_something,
        "out of bounds",
    ),
    "a sum of the wrong pixels": (  # which are the right ones where the stride is 1
        "conv.cu",
        "*(const Chunk*)(plus + to[i])",
        "*(const Chunk*)(plus + (long long)m * channels + n0 + c)",
        add_something,
        None,
    ),
    "a sum that is rounded twice": (
        "conv.cu",
        "four.at[k] + shift",
        "[&] { bf16 y; assign(y, four.at[k]); return to_float(y); }() + shift",
        add_something,
        None,
    ),
    "a sum with the same image for all branches": (
        "normalize.cu",
        "+= more.at[b][k]",
        "+= more.at[0][k]",
        add_something,
        None,
    ),
    "a row behind the tile": (
        "conv.cu",
        "b_row + i * B_TURN;\n      if (B_ROWS % B_TURN && line >= B_ROWS) break;",
        "b_row + i * B_TURN + STAGES * B_ROWS;",
        convolve_something,
        "does not go to shared memory",
    ),
    "a slot too many": (
        "normalize.cu",
        "of_slot[(thread.slot * 2 + t) * channels",
        "of_slot[(thread.slot * 2 + t + 2) * channels",
        normalize_something,
        "behind the dynamic shared memory",
    ),
    "splits overlap": (
        "conv.cu",
        "last = min(first + pixels_per_split,",
        "last = min(first + pixels_per_split + BK,",
        convolve_something,
        None,
    ),
    "slots are added too early": (
        "normalize.cu",
        "= sums[t][k];\n  __syncthreads();",
        "= sums[t][k];",
        normalize_something,
        None,
    ),
    "warps are added too early": (
        "normalize.cu",
        "of_warp[threadIdx.x / 32] = squares;\n    __syncthreads();",
        "of_warp[threadIdx.x / 32] = squares;",
        normalize_something,
        None,
    ),
    "a tile is used too early": (
        "training.cu",
        "    __syncthreads();\n#pragma unroll\n    for (int k = 0; k < 16",
        "#pragma unroll\n    for (int k = 0; k < 16",
        multiply_something,
        None,
    ),
    "a tile is overwritten too early": (
        "training.cu",
        "* from_b[k][x];\n    __syncthreads();",
        "* from_b[k][x];",
        multiply_something,
        None,
    ),
    "a rejected draw is kept": ("training.cu", "rejected = true", "(void)0", draw_something, None),
    "one thread begins anew too early": (
        "training.cu",
        "__syncthreads();\n  if (!rejected",
        "if (!rejected",
        draw_something,
        None,
    ),
    "a sum without barriers": (
        "training.cu",
        "half /= 2) {\n    __syncthreads();",
        "half /= 2) {",
        multiply_something,
        None,
    ),
    **{
        f"wgmma: {name}": ("conv.cu", right, wrong, wgmma_something, words)
        for name, right, wrong, words in (
            ("copies that it does not see", "    wgmma_sees_writes();\n", "", None),
            (
                "... that others do not see",
                "wgmma_sees_writes();\n    __syncthreads();",
                "__syncthreads();\n    wgmma_sees_writes();",
                None,
            ),
            ("waits for too few copies", "copy_wait<STAGES - 3>", "copy_wait<STAGES - 2>", None),
            ("no fence", "  wgmma_fence();\n", "", "without a fence"),
            ("sums that are not there yet", "  wgmma_wait<0>();\n", "", None),
            ("a stage that is filled too early", "wgmma_wait<1>", "wgmma_wait<2>", None),
            ("a stage ahead", "load((step + STAGES - 2) % STAGES)", "load((step + STAGES - 1) % STAGES)", None),
            ("no swizzle", "(column % 64 ^ row % 8 * CHUNK)", "column % 64", None),
            ("strips that overlap", "rows * ROW_BYTES / 16", "ROW_BYTES / 16", None),
            ("rows that overlap", "8 * ROW_BYTES / 16", "4 * ROW_BYTES / 16", None),
            ("another address than 16 bytes'", "0x3ffff) / 16", "0x3ffff) / 8", "wgmma"),
            ("terms twice, across", "k * 2 / 16", "k / 16", None),
            ("terms twice, down", "k * ROW_BYTES / 16", "k * ROW_BYTES / 32", None),
            ("the same rows for all warps", "threadIdx.x / 128 * (64 * 64)", "0", None),
            (
                "two of four warps",
                "    start_product(a + step",
                "    if (threadIdx.x & 64) start_product(a + step",
                "four warps",
            ),
        )
    },
}


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_are_caught(device, fault, rng, monkeypatch):
    if fault is None:
        for run in dict.fromkeys(run for _, _, _, run, _ in FAULTS.values()):
            run(rng)
        return
    file, right, wrong, run, words = FAULTS[fault]
    text = cuda.source(file)
    assert right in text, "the kernel has changed: plant this fault elsewhere"
    true_source = cuda.source
    monkeypatch.setattr(cuda, "source", lambda f: text.replace(right, wrong) if f == file else true_source(f))
    with pytest.raises(shim.KernelError if words else AssertionError, match=words):
        run(rng)


@needs_compiler
def test_the_emulation_runs_what_it_should():
    """Indices, shuffles and barriers of a small kernel; arguments by value."""
    code = """extern "C" __global__ void sums(const float* x, float* y, int n, float by) {
      __shared__ float of_warp[2];
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      float v = i < n ? x[i] * by : 0.f;
      for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
      __syncthreads();
      if (threadIdx.x == 0) y[blockIdx.y * gridDim.x + blockIdx.x] = of_warp[0] + of_warp[1];
    }"""
    x, y = np.arange(150, dtype=np.float32), np.zeros((2, 3), np.float32)
    shim.Launcher()(code, (), "sums", (3, 2, 1), (64, 1, 1), 0, [x, y, np.int32(150), np.float32(2)])
    np.testing.assert_array_equal(y, [[2 * x[k : k + 64].sum() for k in (0, 64, 128)]] * 2)


@needs_compiler
def test_the_emulation_tries_other_orders():
    """A later warp that reads what an earlier one writes, without a barrier, is right in order, and only then."""
    code = """extern "C" __global__ void hand_over(float* y) {
      __shared__ float box[1];
      if (threadIdx.x == 0) box[0] = blockIdx.x;
      if (threadIdx.x == 32) y[blockIdx.x] = box[0];
    }"""
    y = np.full(50, -1, np.float32)
    shim.Launcher()(code, (), "hand_over", (50, 1, 1), (64, 1, 1), 0, [y])
    assert 5 < (y == np.arange(50)).sum() < 45


ONE_PRODUCT = """
extern "C" __global__ void one_product(const bf16* image, int chunks, uint64_t a, uint64_t b, float* d) {
  DYNAMIC_SHARED(memory);
  for (int i = threadIdx.x; i < chunks; i += 128) copy16_async(memory + 16 * i, image + 8 * i, true);
  copy_commit(), copy_wait<0>(), wgmma_sees_writes();
  __syncthreads();
  const uint64_t start = shared_address(memory) / 16;
  float sums[N / 8][4];
  wgmma_fence(), wgmma<A_BY_K, B_BY_K>(sums, start + a, start + b, false), wgmma_commit(), wgmma_wait<0>();
  wgmma_done(sums);
  for (int j = 0; j < N / 8; j++)
    for (int e = 0; e < 4; e++) d[(threadIdx.x * (N / 8) + j) * 4 + e] = sums[j][e];
}"""


@on_device
@pytest.mark.parametrize("a_by_k", [False, True])
@pytest.mark.parametrize("b_by_k", [False, True])
@pytest.mark.parametrize("columns", [64, 128])
def test_one_wgmma(device, a_by_k, b_by_k, columns, rng):
    """Shared memory as PTX ISA and CUTLASS draw it, in NumPy: patterns of 8 rows of 8 chunks of 8 numbers, chunk c of
    row r in place c ^ r. A row is 64 numbers of one term (by k), or the terms of one row of the result. Where patterns
    lie is free: here some of them are left out. On a GPU this is the first thing to look at."""
    if device is not np and device.cuda.Device().compute_capability != "90":
        pytest.skip("wgmma is an instruction of compute capability 9.0")
    a, b = rng.integers(-8, 9, (64, 16)), rng.integers(-8, 9, (columns, 16))
    image, descriptors, patterns = np.full((64, 8, 8, 8), np.nan, np.float32), [], 0
    for matrix, by_k in ((a, a_by_k), (b, b_by_k)):
        i, k = np.indices(matrix.shape)
        leading, stride, shift = 3, (7 if by_k else 2), (0 if by_k else 4)  # patterns; chunks: terms 32 ... 47 of 64
        if by_k:
            pattern, row, chunk, within = i // 64 * leading + k // 8 * stride, k % 8, i % 64 // 8, i % 8
        else:
            pattern, row, chunk, within = i // 8 * stride, i % 8, k // 8 + shift, k % 8
        image[patterns + pattern, row, chunk ^ row, within] = matrix
        descriptors.append(np.uint64(64 * patterns + shift | leading * 64 << 16 | stride * 64 << 32 | 1 << 62))
        patterns += pattern.max() + 1
    image = image[:patterns].astype(BF16)
    defines = "WGMMA=1", f"N={columns}", f"A_BY_K={int(a_by_k)}", f"B_BY_K={int(b_by_k)}"
    d = np.zeros((4, 8, 4, columns // 8, 2, 2), np.float32)  # warp, row, pair of columns; of a thread: block, half, one
    arguments = [device.asarray(image), np.int32(image.size // 8), *descriptors, device.asarray(d)]
    if device is np:
        cuda.launcher(ONE_PRODUCT, defines, "one_product", (1, 1, 1), (128, 1, 1), image.nbytes, arguments)
    else:
        options = ("-std=c++17", *(f"-D{define}" for define in defines), "-arch=sm_90a")
        kernel = device.RawModule(code=cuda.source("device.cuh") + ONE_PRODUCT, options=options).get_function(
            "one_product"
        )
        kernel.max_dynamic_shared_size_bytes = image.nbytes
        kernel((1, 1, 1), (128, 1, 1), tuple(arguments), shared_mem=image.nbytes)
    found = to_numpy(arguments[-1]).transpose(0, 4, 1, 3, 2, 5).reshape(64, columns)
    np.testing.assert_array_equal(found, a @ b.T)


# --- compiled for real ------------------------------------------------------------------------------------------------

REALS = {"float": 4, "bf16": 2}
INSTANTIATIONS = {
    **{
        f"{product} {name}": ("conv.cu", tile.defines(direction))
        for product, (direction, kind) in {**gpu_conv.PRODUCTS, "dw narrow": (gpu_conv.WEIGHT, "narrow")}.items()
        for name, tile in gpu_conv.TILES[kind].items()
    },
    **{
        f"normalize {real} {width} {activation}": (
            "normalize.cu",
            (f"REAL={real}", f"WIDTH={width}", f"ACTIVATION={activation}"),
        )
        for real, size in REALS.items()
        for width in (16 // size, 1)
        for activation in (gpu_normalization.IDENTITY, gpu_normalization.RELU, gpu_normalization.HAMMING)
    },
    **{
        f"elementwise {real} {width}": ("elementwise.cu", (f"REAL={real}", f"WIDTH={width}"))
        for real, size in REALS.items()
        for width in (16 // size, 1)
    },
    "training": ("training.cu", ()),
}


def tile_of(defines):
    return next(
        t for tiles in gpu_conv.TILES.values() for t in tiles.values() if t.defines(int(defines[0][-1])) == defines
    )


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_machine_code(instantiation, arch):
    """It compiles; no register is spilled; two blocks of 256 threads fit; tensor cores and wide loads are used."""
    file, defines = INSTANTIATIONS[instantiation]
    wgmma = "WGMMA=1" in defines
    if wgmma and arch == "sm_80":
        return
    arch += "a" * wgmma
    kernels = nvrtc.inspect(nvrtc.compile_cubin(cuda.source("device.cuh") + cuda.source(file), arch, defines))
    assert kernels
    for name, code in kernels.items():
        assert code.stack == 0 and not {"LDL", "STL"} & {i.split(".")[0] for i in code.instructions}, f"{name} spills"
        threads = tile_of(defines).threads if name in ("convolve", "weight_gradient") else 256
        assert 2 * code.registers * threads <= 1 << 16, f"{name}: {code.registers} registers: two blocks do not fit"
        if name in ("convolve", "weight_gradient"):
            product = f"HGMMA.64x{tile_of(defines).bn}x16.F32.BF16" if wgmma else "HMMA.16816.F32.BF16"
            assert product in code.instructions, f"{name} does not use tensor cores"
            loads = {"LDGSTS", "FENCE", "WARPGROUP"} if wgmma else {"LDGSTS", "LDSM"}
            assert {i.split(".")[0] for i in code.instructions} >= loads, name
        wide = any(d in defines for d in ("WIDTH=8", "WIDTH=4")) and name in ("activate", "normalize_backward", "add")
        if wide or name == "convolve":  # there: what is added to the result, and the result
            assert {"LDG.E.128.CONSTANT", "STG.E.128"} <= code.instructions, f"{name} does not move 16 bytes at a time"


@needs_nvrtc
def test_the_checks_of_machine_code_can_fail():
    """A kernel that indexes registers dynamically lands in local memory; one with a mistake does not compile."""
    code = 'extern "C" __global__ void f(float* x, int n) { float a[64]; for (int i = 0; i < 64; i++) a[i] = x[i]; '
    code += "for (int i = 0; i < n; i++) a[(int)x[i] & 63] += 1; for (int i = 0; i < 64; i++) x[i] = a[i]; }"
    found = nvrtc.inspect(nvrtc.compile_cubin(code, "sm_90"))["f"]
    assert found.stack >= 256 and "STL" in {i.split(".")[0] for i in found.instructions}
    with pytest.raises(nvrtc.CompileError, match="nothing_"):
        nvrtc.compile_cubin('extern "C" __global__ void f(float* x) { x[0] = nothing_; }', "sm_90")
    file, defines = INSTANTIATIONS["y wide wgmma"]
    code = cuda.source(file).replace("add || k)", "true)").replace("  for (int step", "  clear(sums);\n  for (int step")
    with pytest.raises(nvrtc.CompileError, match="serialized"):
        nvrtc.compile_cubin(cuda.source("device.cuh") + code, "sm_90a", defines)


# --- launch geometry --------------------------------------------------------------------------------------------------

NETWORK = [  # PreActResNet18's convolutions, 3 x 128 images
    ((384, 32, 32, 8), (3, 3, 8, 64), 1),
    *[((384, s, s, c), (3, 3, c, c), 1) for s, c in ((32, 64), (16, 128), (8, 256), (4, 512))],
    *[((384, s, s, c), (3, 3, c, 2 * c), 2) for s, c in ((32, 64), (16, 128), (8, 256))],
    *[((384, s, s, c), (1, 1, c, 2 * c), 2) for s, c in ((32, 64), (16, 128), (8, 256))],
]


@pytest.mark.parametrize("direction", [gpu_conv.FORWARD, gpu_conv.INPUT, gpu_conv.WEIGHT])
@pytest.mark.parametrize(("x_shape", "w_shape", "stride"), NETWORK)
def test_plans_of_the_network(direction, x_shape, w_shape, stride):
    """The whole result is covered, no block is idle from the start, and what a block needs is there. Another tile
    changes neither the blocks nor how sums are split."""
    plan = gpu.conv_plan(direction, x_shape, w_shape, stride, (w_shape[0] // 2,) * 4)
    for name in ("square", "deep", "wgmma"):
        other = gpu.conv_plan(direction, x_shape, w_shape, stride, (w_shape[0] // 2,) * 4, name)
        assert replace(other, tile=plan.tile) == plan
    tile, (n, ho, wo, co) = plan.tile, reference.conv2d_shape(x_shape, w_shape, stride, (w_shape[0] // 2,) * 4)
    rows, columns = {
        gpu_conv.FORWARD: (n * ho * wo, co),
        gpu_conv.INPUT: (n * x_shape[1] * x_shape[2] // stride**2, x_shape[3]),
        gpu_conv.WEIGHT: (np.prod(w_shape[:3]), co),
    }[direction]
    for blocks, size, all_ in ((plan.grid[0], tile.bm, rows), (plan.grid[1], tile.bn, columns)):
        assert (blocks - 1) * size < all_ <= blocks * size
    assert tile.threads <= 256 and tile.shared(direction) <= 99 << 10, "must fit twice into an H100's 227 KiB"
    if direction == gpu_conv.WEIGHT:
        per_split = plan.sizes[-1]
        assert (plan.splits - 1) * per_split < n * ho * wo <= plan.splits * per_split and per_split % tile.bk == 0
        assert plan.splits == plan.grid[2] and plan.splits * plan.grid[0] * plan.grid[1] <= 2 * cuda.BLOCKS


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 8), st.integers(1, 600)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    activation=st.sampled_from([gpu_normalization.IDENTITY, gpu_normalization.RELU, gpu_normalization.HAMMING]),
    by_channel=st.booleans(),
)
def test_pass_plans(shape, dtype, activation, by_channel):
    """A pixel's channels divide into vectors of 16 bytes or single numbers, and a sample into pixels."""
    shape = (3 * shape[0], *shape[1:]) if activation == gpu_normalization.HAMMING else shape
    plan = gpu_normalization.pass_plan(shape, dtype, activation, shape[3] if by_channel else None)
    width = 8 if dtype == "bfloat16" else 4
    if plan is None:
        assert by_channel and shape[3] > 256 and (shape[3] % width or shape[3] > 256 * width)
        return
    taken = int(re.search(r"WIDTH=(\d+)", " ".join(plan.defines))[1])
    assert taken in (1, width) and plan.channels % taken == 0 and 1 <= plan.channels // taken <= 256
    branches = 3 if activation == gpu_normalization.HAMMING else 1
    assert plan.pixels * plan.channels * branches == np.prod(shape)
    assert plan.pixels_per_sample * plan.channels == np.prod(shape[1:])
    assert plan.shared <= 48 << 10 and 1 <= plan.blocks <= 2 * cuda.BLOCKS and plan.parts >= 1


def test_a_convolution_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match=r"beyond 2\^31"):
        gpu.conv_plan(gpu_conv.FORWARD, (1 << 20, 64, 64, 64), (3, 3, 64, 64), 1, ALL_ROUND)


def test_kernels_get_aligned_arrays():
    """A view may start anywhere; vectors of 16 bytes may not."""
    x = np.arange(65, dtype=np.float32)
    for view in (x[1:], x[:64].reshape(8, 8).T, x[::2]):
        found = cuda.ready(view)
        assert found.ctypes.data % 16 == 0 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, view)


def test_nothing_imports_cupy():
    """gpu.py is imported on every machine; CuPy costs half a second where it is installed."""
    code = "import sys, nanomr, nanomr.ops.gpu; assert 'cupy' not in sys.modules and 'ml_dtypes' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --- the scripts ------------------------------------------------------------------------------------------------------


def script(name, *options):
    path = Path(__file__).resolve().parent.parent / "bench" / name
    return subprocess.run([sys.executable, path, *options], capture_output=True, text=True)


def test_the_benchmark_prints_its_plan_without_a_gpu():
    """Each convolution with its floor: together those of gpu.md's 1.28 TFLOP."""
    result = script("gpu.py", "--dry-run")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum("GFLOP" in line for line in lines) == 11 and any("torch compile" in line for line in lines)
    found = json.loads(lines[-1])
    assert found["dry_run"] and found["convolutions_floor_us"] == pytest.approx(1770, rel=0.01)


@pytest.mark.skipif(gpu_available(), reason="there is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu():
    result = script("gpu.py")
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"bench/gpu.py: no GPU: .*--dry-run.*\n", result.stderr)
