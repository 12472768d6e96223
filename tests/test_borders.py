"""What is public takes exactly what fits, and says so otherwise; and what fits never leads a kernel out of an array.

``ENTRIES`` lists every public call that takes arrays, with the shapes that fit it. Hypothesis bends one of them: the
call must work where the shape still fits, and raise a ValueError, changing nothing, where it does not.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr import losses, manifold, methods, metrics
from nanomr.data import Dataset
from nanomr.layers import (
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    Normalize,
    PairBatch,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
)
from nanomr.ops import cpu, reference
from nanomr.ops.cpu.memory import BFLOAT16
from nanomr.testing.contract import slots, snapshot
from nanomr.testing.strategies import convolutions, fewer, seeds

N, H, W, C, K = 4, 6, 8, 3, 5  # all different: an axis that is taken for another does not fit
ANY = None  # any size from 1 on


@dataclass
class Entry:
    """A public call: its arrays' shapes, and which shapes fit (by axis; None: any array that is not empty)."""

    call: Callable
    shapes: tuple
    fits: tuple
    layer: object = None


def fit(shape, wanted):
    if callable(wanted):
        return wanted(shape) and 0 not in shape
    if wanted is None:
        return len(shape) > 0 and 0 not in shape
    return len(shape) == len(wanted) and all(s == w if w else s > 0 for s, w in zip(shape, wanted, strict=True))


def floats(shape, dtype=np.float32):
    return np.random.default_rng(1).random(shape).astype(dtype)


def forward(layer, shape, fits, **options):
    return Entry(lambda x: layer.forward(x, **options), (shape,), (fits,), layer)


def backward(layer, shape, **options):
    """The upstream gradient, which fits one shape only."""
    y, _ = layer.forward(floats(shape), **options)

    def call(dy):
        _, passed = layer.forward(floats(shape), **options)
        return layer.backward(dy, passed)

    return Entry(call, (y.shape,), (y.shape,), layer)


def pair(layer, shape, free):
    """x and rho: one shape, which fits the layer. One array is bent, so that the other says what it must be."""
    return Entry(lambda x, rho: layer.forward(PairBatch(x, rho)), (shape, shape), (shape, shape), layer)


def drawn(layer):
    for value in slots(layer, "params").values():
        value[...] = np.random.default_rng(2).standard_normal(value.shape)
    return layer


def chain():
    return Sequential({"conv": Conv2d(C, 2, 3, 1, 1), "relu": ReLU(), "flat": Flatten(), "fc": Linear(2 * H * W, K)})


def bound(function, *shapes, fits=None):
    return Entry(function, shapes, fits or shapes)


IMAGE, FREE = (N, H, W, C), (ANY, ANY, ANY, C)
LABELS, ZEROS = np.arange(N), np.zeros(N, int)
LAYERS = {
    "Linear": (lambda: Linear(C, K), (N, C), (ANY, C), {}),
    "Conv2d": (lambda: Conv2d(C, K, 3, 2, 1), IMAGE, FREE, {}),
    "Normalize": (lambda: Normalize([0.1] * C, [0.5] * C), IMAGE, FREE, {}),
    "Normalize, of any channels": (lambda: Normalize([0.1], [0.5]), IMAGE, (ANY,) * 4, {}),
    "Flatten": (Flatten, IMAGE, None, {}),
    "AveragePool2d": (lambda: AveragePool2d(1), IMAGE, (ANY,) * 4, {}),
    "ReLU": (ReLU, IMAGE, None, {}),
    "BatchNorm2d": (lambda: BatchNorm2d(C), IMAGE, FREE, {}),
    "BatchNorm2d, training": (lambda: BatchNorm2d(C), IMAGE, FREE, {"train": True}),
    "Sequential": (chain, IMAGE, (ANY, H, W, C), {}),
    "PreActBlock": (lambda: PreActBlock(C, C), IMAGE, FREE, {"train": True}),
    "PreActBlock, projection": (lambda: PreActBlock(C, K, 2), IMAGE, FREE, {}),
    "Residual": (lambda: Residual({"body": Conv2d(C, C, 1)}), IMAGE, FREE, {}),
    "Model": (lambda: model(), IMAGE, (ANY, H, W, C), {}),
}
PAIRS = ("Linear", "Conv2d", "Normalize", "Flatten", "AveragePool2d", "ReLU", "Sequential", "Model")


def model(classes=K):
    return mr.models.mlp((H * W * C, 7, classes), input_shape=(H, W, C))


def plus_conv(plus):
    return Conv2d(C, K, 3, 2, 1).forward(floats(IMAGE), plus=plus)


def plus_conv_back(plus):
    layer = Conv2d(C, K, 3, 2, 1)
    y, passed = layer.forward(floats(IMAGE))
    return layer.backward(y, passed, plus=plus)


def plus_norm(plus):
    layer = BatchNorm2d(C)
    y, passed = layer.forward(floats(IMAGE), train=True)
    return layer.backward(y, passed, plus=plus)


def hamming_back(dy):
    layer = ReLU()
    _, passed = layer.forward(floats((3 * N, 7)), tap=losses.Hamming())
    return layer.backward(dy, passed)


def entries():
    for name, (make, shape, fits, options) in LAYERS.items():
        yield f"{name}, x", lambda a=(make, shape, fits), o=options: forward(drawn(a[0]()), *a[1:], **o)
        yield f"{name}, dy", lambda a=(make, shape), o=options: backward(drawn(a[0]()), *a[1:], **o)
        if name in PAIRS:
            yield f"{name}, pair", lambda a=(make, shape, fits): pair(drawn(a[0]()), *a[1:])
    yield "Conv2d, plus", lambda: bound(plus_conv, (N, 3, 4, K))
    yield "Conv2d, plus of backward", lambda: bound(plus_conv_back, IMAGE)
    yield "BatchNorm2d, plus of backward", lambda: bound(plus_norm, IMAGE)
    yield "Conv2d.transpose", lambda: bound(lambda dy: Conv2d(C, K, 3, 2, 1).transpose(dy, floats(IMAGE)), (N, 3, 4, K))
    yield "Linear.transpose", lambda: bound(lambda dy: Linear(C, K).transpose(dy, floats((N, C))), (N, K))
    yield "PairBatch.full", lambda: bound(lambda x, rho: PairBatch(x, rho).full(), (N, 7), (N, 7))
    yield "Hamming, dy", lambda: bound(hamming_back, (3 * N, 7))
    yield "cross_entropy", lambda: bound(lambda z: losses.cross_entropy(z, ZEROS), (N, K), fits=((N, ANY),))
    yield "of_logits", lambda: bound(lambda z: losses.of_logits(z, ZEROS), (N, K), fits=((N, ANY),))
    yield "of_logits, 3N", lambda: bound(lambda z: losses.of_logits(z, ZEROS, 1.0), (3 * N, K), fits=((3 * N, ANY),))
    yield "intrinsic", lambda: bound(losses.intrinsic, (N, K), (N, K))
    yield "hamming", lambda: bound(losses.hamming, (N, H, K), (N, H, K))
    yield "laplacian", lambda: bound(manifold.laplacian, (N, K), (N, N), fits=((N, ANY), (N, N)))
    yield "resampled", lambda: bound(manifold.resampled_laplacian, (N, C, K), (N, C, C), fits=((N, C, ANY), (N, C, C)))
    yield "heat_kernel", lambda: bound(lambda x: manifold.heat_kernel(x, 1.0), (2, N, K), fits=(lambda s: len(s) > 1,))
    yield "corner_pairs", lambda: bound(lambda x: manifold.corner_pairs(x, 0.1, 0, 0), IMAGE, fits=(None,))
    yield "hamming_distance", lambda: bound(lambda x, y: manifold.hamming_distance(model(), x, y), IMAGE, IMAGE)
    yield "standard_step", lambda: bound(lambda x: methods.standard_step(model(), x, LABELS), IMAGE)
    yield "manifold_step", lambda: bound(lambda x, r: methods.manifold_step(model(), x, LABELS, r, 1, 1), IMAGE, IMAGE)


ENTRIES = dict(entries())


@st.composite
def bent(draw, shape):
    """Another shape: axes dropped, added, emptied, one longer or shorter, or 1, which would broadcast."""
    sizes = [draw(st.sampled_from([size, size, size, 0, 1, size - 1, size + 1, 3 * size])) for size in shape]
    at = draw(st.integers(0, len(sizes) - 1))
    how = draw(st.sampled_from(["sizes", "sizes", "drop", "add"]))
    return tuple({"sizes": sizes, "drop": sizes[:at] + sizes[at + 1 :], "add": [*sizes[:at], 1, *sizes[at:]]}[how])


@pytest.mark.parametrize("name", ENTRIES)
@given(data=st.data())
def test_what_fits_works_and_what_does_not_is_refused(name, data):
    entry = ENTRIES[name]()
    arrays = [floats(shape) for shape in entry.shapes]
    entry.call(*arrays)
    i = data.draw(st.integers(0, len(arrays) - 1))
    shape = data.draw(bent(entry.shapes[i]))
    arrays[i] = floats(shape)
    if fit(shape, entry.fits[i]):
        entry.call(*arrays)
        return
    before = {store: snapshot(entry.layer, store) for store in ("params", "grads", "buffers")} if entry.layer else {}
    with pytest.raises(ValueError) as error:
        entry.call(*arrays)
    assert "\n" not in str(error.value)
    if "dy" not in name and "step" not in name:  # their calls go forward, which may train, before they go back
        for store, values in before.items():
            for key, value in slots(entry.layer, store).items():
                np.testing.assert_array_equal(value, values[key])


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("kind", ["int64", "bool", "object", "list", "None"])
def test_only_floats_are_taken(name, kind):
    entry = ENTRIES[name]()
    if kind == "None" and ("plus" in name or "step" in name):
        return  # no plus is right; no images are Python's own TypeError
    for i in range(len(entry.shapes)):
        arrays = [floats(shape) for shape in entry.shapes]
        arrays[i] = arrays[i].tolist() if kind == "list" else None if kind == "None" else arrays[i].astype(kind)
        with pytest.raises(ValueError, match=r"not |must be"):
            entry.call(*arrays)


@pytest.mark.parametrize(
    "name", [n for n in ENTRIES if any(part in n for part in (", dy", ", plus", ", pair", "full"))]
)
def test_nothing_is_promoted(name):
    """A float64 dy, plus or rho beside float32 arrays would make the whole network slow and double, unnoticed."""
    entry = ENTRIES[name]()
    arrays = [floats(shape) for shape in entry.shapes]
    arrays[-1] = arrays[-1].astype(np.float64)
    with pytest.raises(ValueError, match=r"float32, not .* float64"):
        entry.call(*arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_weights_wider_than_the_pictures_are_refused(dtype):
    """Kernels would round them, without a word. Narrower ones lose nothing."""
    for layer, shape in ((Linear(C, K), (N, C)), (Conv2d(C, K, 3), IMAGE), (BatchNorm2d(C), IMAGE)):
        assert layer.forward(floats(shape, dtype))[0].dtype == dtype
        layer.params = {name: value.astype(np.float64) for name, value in layer.params.items()}
        if dtype is np.float32:
            with pytest.raises(ValueError, match=r"float64, not .* float32"):
                layer.forward(floats(shape))


def test_bfloat16_meets_float32():
    """Pictures are bfloat16 where weights and logits are float32; by the formulas here, by kernels on a device."""
    layer = Sequential({"relu": ReLU(), "flat": Flatten()})
    x = floats(IMAGE).astype(ml_dtypes.bfloat16)
    y, passed = layer.children["relu"].forward(x)
    assert y.dtype == x.dtype
    layer.children["relu"].backward(floats(IMAGE), passed)
    Linear(C, K).output_shape(x[:, 0, 0])
    for rho in (x, x.astype(np.float32)):  # one kernel reads both: they are of one dtype
        with pytest.raises(ValueError, match="rho"):
            PairBatch(x if rho is not x else x.astype(np.float32), rho).checked()
    with pytest.raises(ValueError, match="bfloat16"):
        drawn(model()).astype(np.float64).forward(x)


# --- what a layer is made with ----------------------------------------------------------------------------------------

MADE = {
    "in_channels": lambda v: Conv2d(v, 1, 1),
    "out_channels": lambda v: Conv2d(1, v, 1),
    "kernel": lambda v: Conv2d(1, 1, v),
    "stride": lambda v: Conv2d(1, 1, 1, v),
    "in_features": lambda v: Linear(v, 1),
    "out_features": lambda v: Linear(1, v),
    "channels": lambda v: BatchNorm2d(v),
    "window": lambda v: AveragePool2d(v),
    "kernel ": lambda v: PreActBlock(2, v),
}


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "2", (2, 2), np.ones(2), float("nan")], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_sizes_are_whole_numbers_from_one_on(name, value):
    MADE[name](1), MADE[name](np.int64(2))
    with pytest.raises(ValueError, match="takes a whole number from 1 on"):
        MADE[name](value)


@pytest.mark.parametrize("padding", [-1, (1, 2), (0, 0, 0, -1), "same", 1.0, None, (1, 1, 1, 1, 1)], ids=str)
def test_padding_is_one_number_or_four(padding):
    for right in (0, 2, np.int64(1), (0, 1, 2, 3), [1, 2, 1, 2]):
        assert len(Conv2d(1, 1, 3, padding=right).padding) == 4
    with pytest.raises(ValueError, match="padding"):
        Conv2d(1, 1, 3, padding=padding)


@pytest.mark.parametrize("stride", [0, -1])
def test_the_operation_itself_refuses_a_stride_or_padding_that_leads_out(stride):
    """A negative padding made the CPU's kernel write beyond its buffers."""
    x, w = floats((1, 9, 9, 1)), floats((3, 3, 1, 1))
    for module in (cpu, reference):
        for wrong in ((stride, (1,) * 4), (1, (0, 0, 0, -1)), (1, (-1,) * 4)):
            with pytest.raises(ValueError, match="stride of at least 1 and no negative padding"):
                module.conv2d(x, w, None, *wrong)


def test_an_image_and_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="12 features"):
        Linear(12, 1, image=(2, 2, 2))
    for mean, std in (([0.0] * 2, [1.0] * 3), ([[0.0]], [1.0]), ([0.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="Normalize"):
            Normalize(mean, std)


# --- parameters that were exchanged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Linear(C, K), lambda: Conv2d(C, K, 3, 1, 1), lambda: BatchNorm2d(C)])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_of_another_shape_is_refused(make, name):
    """Also one that broadcasts, one of as many numbers, and one that was given its shape in place."""
    layer = make()
    x = floats(IMAGE if not isinstance(layer, Linear) else (N, C))
    right = layer.params[name]
    for wrong in (right[:1], np.ones(()), np.ones((*right.shape, 1)), np.ones([s + 1 for s in right.shape]), None):
        layer.params[name] = wrong if wrong is None else wrong.astype(np.float32)
        with pytest.raises(ValueError, match=f"{type(layer).__name__}.* takes {name} "):
            layer.forward(x)
    layer.params[name] = right.copy()
    layer.params[name].resize(right.size + 1, refcheck=False)
    with pytest.raises(ValueError, match=name):
        layer.forward(x)


def test_running_statistics_of_another_shape_are_refused():
    layer = BatchNorm2d(C)
    layer.buffers["running_mean"] = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="running_mean"):
        layer.forward(floats(IMAGE))
    layer.buffers["running_mean"] = np.zeros(C)
    with pytest.raises(ValueError, match=r"running_mean \(3,\) float32, not \(3,\) float64"):
        layer.forward(floats(IMAGE))


def test_a_gradient_is_added_to_one_of_its_own_shape():
    layer = Linear(C, 1)
    y, passed = layer.forward(floats((N, C)))
    layer.grads = {"weight": np.zeros((C, K), np.float32)}  # a (C, 1) gradient would spread over it
    with pytest.raises(ValueError, match="weight's gradient"):
        layer.backward(y, passed)


def test_an_affine_layer_takes_a_pair_back_where_a_pair_went_in():
    layer, x = Linear(C, K), floats((2, C))
    y, alone = layer.forward(x)
    pairs, both = layer.forward(PairBatch(x, x))
    for dy, passed in ((pairs, alone), (y, both)):  # two rows, which would be taken for the two of a pair
        with pytest.raises(ValueError, match="PairBatch"):
            layer.backward(dy, passed)


@pytest.mark.parametrize("rows", [1, 2, 4, 3 * N + 1])
def test_a_triple_batch_has_three_rows_an_image(rows):
    """The kernels leave a rest out: its rows of the result would never be written."""
    z = floats((rows, 7))
    for call in (
        lambda: ReLU().forward(z, tap=losses.Hamming()),
        lambda: losses.Hamming().forward(z),
        lambda: PairBatch.gradient(z),
    ):
        with pytest.raises(ValueError, match="3N rows"):
            call()


def test_logits_are_those_of_the_labels_three_times():
    """Said by of_logits itself: a device's kernel would cut the rows as it likes."""
    for rows in (3 * N - 1, 3 * N + 1):
        with pytest.raises(ValueError, match="of_logits takes logits"):
            losses.of_logits(floats((rows, K)), np.zeros(rows // 3, int), 1.0)


# --- labels -----------------------------------------------------------------------------------------------------------

WRONG_LABELS = {
    "(N, 1)": LABELS[:, None],
    "one": LABELS[:1],
    "a number": np.int64(1),
    "too many": np.arange(N + 1),
    "-1": LABELS - 1,
    "K": LABELS + 2,
    "floats": LABELS.astype(float),
    "booleans": LABELS > 1,
    "text": ["0", "1", "2", "3"],
    "uint64": np.array([0, 1, 2, 2**64 - 1], np.uint64),
}
TAKES_LABELS = {
    "cross_entropy": lambda y: losses.cross_entropy(floats((N, K)), y),
    "of_logits": lambda y: losses.of_logits(floats((N, K)), y),
    "of_logits, pairs": lambda y: losses.of_logits(floats((3 * N, K)), y, 1.0),
    "standard_step": lambda y: methods.standard_step(model(), floats(IMAGE), y),
    "manifold_step": lambda y: methods.manifold_step(model(), floats(IMAGE), y, floats(IMAGE)),
}


@pytest.mark.parametrize("wrong", WRONG_LABELS)
@pytest.mark.parametrize("name", TAKES_LABELS)
def test_a_label_is_a_class_of_its_image(name, wrong):
    for right in (LABELS, LABELS.tolist(), LABELS.astype(np.uint8), LABELS.astype(np.int32)):
        TAKES_LABELS[name](right)
    with pytest.raises(ValueError):
        TAKES_LABELS[name](WRONG_LABELS[wrong])


@pytest.mark.parametrize("wrong", ["(N, 1)", "one", "too many", "-1", "floats"])
def test_a_step_that_is_refused_has_changed_nothing(wrong):
    """Running statistics would have moved in the forward pass."""
    net, x = mr.models.preact_resnet18(width=1), floats((N, 32, 32, 3))
    before = snapshot(net, "buffers")
    for step in (methods.standard_step, methods.manifold_step):
        with pytest.raises(ValueError, match="labels must be"):
            step(net, x, WRONG_LABELS[wrong], *[x] * (step is methods.manifold_step))
    for name, value in slots(net, "buffers").items():
        np.testing.assert_array_equal(value, before[name])


def test_hamming_distance_is_between_as_many_images():
    for n in (1, N - 1, N + 1):  # one would be compared with each of the others
        with pytest.raises(ValueError, match="hamming_distance takes y"):
            manifold.hamming_distance(model(), floats(IMAGE), floats((n, H, W, C)))


def test_accuracy_takes_a_label_for_each_image():
    images = np.zeros((N, H, W, C), np.uint8)
    metrics.accuracy(model(), images, LABELS)
    for wrong in ("(N, 1)", "one", "too many", "-1", "floats"):  # an (N, 1) column compared N x N
        with pytest.raises(ValueError, match="labels must be"):
            metrics.accuracy(model(), images, WRONG_LABELS[wrong])


@pytest.mark.parametrize("wrong", [name for name in WRONG_LABELS if name not in ("text", "uint64")])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_data_set_has_a_class_for_each_image(part, wrong):
    images = np.zeros((N, H, W, C), np.uint8)
    parts = dict(train_images=images, train_labels=LABELS, test_images=images, test_labels=LABELS)
    Dataset("own", ("a",) * K, **parts, source={})
    with pytest.raises(ValueError, match="labels must be"):
        Dataset("own", ("a",) * K, **parts | {f"{part}_labels": WRONG_LABELS[wrong]}, source={})


def test_labels_on_a_device_are_not_looked_at(cupy):
    """Their shape and dtype are; a look at their values would wait for the device."""
    logits = cupy.asarray(floats((N, K)))
    losses.cross_entropy(logits, cupy.asarray(LABELS))
    for wrong in ("(N, 1)", "one", "floats"):
        with pytest.raises(ValueError, match="labels must be"):
            losses.cross_entropy(logits, cupy.asarray(WRONG_LABELS[wrong]))


# --- kernels within their arrays --------------------------------------------------------------------------------------

ZONE, CANARY = 4096, np.float32(np.nan)  # floats to either side of an array


class Zones:
    """Float32 arrays between canaries: NaN that is read shows in a result, what is written shows in ``broken``."""

    def __init__(self):
        self.made = []

    def empty(self, shape, dtype=np.float32):
        size = int(np.prod(shape))
        if dtype == BFLOAT16:
            return self.empty((-(-size // 2),)).view(BFLOAT16)[:size].reshape(shape)
        ground = np.full(size + 2 * ZONE, CANARY)
        self.made.append((ground, size))
        return ground[ZONE : ZONE + size].reshape(shape)

    def place(self, a):
        placed = self.empty(a.shape)
        placed[...] = a
        return placed

    def broken(self):
        canary = CANARY.view(np.int32)
        ends = (end for ground, size in self.made for end in (ground[:ZONE], ground[ZONE + size :]))
        return any((end.view(np.int32) != canary).any() for end in ends)


@pytest.fixture
def zones(monkeypatch):
    """All that the CPU's kernels get from ``memory.empty``, and what a test places."""
    found = Zones()
    for name in ("convolution", "winograd", "gather_gemm", "elementwise", "attacks", "training"):
        monkeypatch.setattr(importlib.import_module(f"nanomr.ops.cpu.{name}"), "empty", found.empty)
    return found


def test_the_zones_notice_both_kinds_of_escape(zones):
    """The negative control: a dy that is too short is read beyond its end, a y that is too short is written there."""
    relu_backward = importlib.import_module("nanomr.ops.cpu.elementwise")._relu_backward
    z, dz = zones.place(np.ones((3, 4))), zones.empty((3, 4))
    relu_backward(zones.place(np.ones((2, 4))), z, dz)
    assert np.isnan(dz).any() and not zones.broken()
    relu_backward(z, z, zones.place(np.ones((2, 4))))
    assert zones.broken()


@given(case=convolutions(batch=(1, 2, 3), channels=(1, 3, 16, 17), kernel=5, size=8, square=False), seed=seeds)
@fewer(2)
def test_convolutions_stay_within_their_arrays(case, seed):
    """The gather-GEMM counts in raw addresses, which Numba's own bounds checks do not see."""
    with pytest.MonkeyPatch.context() as patch:
        zones = zones_of(patch)
        draw = np.random.default_rng(seed)
        shapes = (case.x_shape, case.w_shape, (case.c_out,), case.y_shape)
        x, w, b, dy = (zones.place(draw.standard_normal(shape)) for shape in shapes)
        geometry = case.stride, case.padding
        results = [
            cpu.conv2d(x, w, b, *geometry),
            cpu.conv2d_input_gradient(dy, w, *geometry, x.shape),
            *cpu.conv2d_weight_gradient(x, dy, w.shape, *geometry),
        ]
        assert not zones.broken() and all(np.isfinite(result).all() for result in results)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_some_numbers_of_a_vector_are_stored_and_no_others(dtype):
    """By a mask, or without AVX-512 in pieces; 16 bits are those of bfloat16."""
    simd = importlib.import_module("nanomr.ops.cpu.simd")
    one, room = simd.Lanes(1), 2 * simd.WIDTH

    @numba.njit
    def put(source, out, ends, one):
        value = simd.load_sums(source, 0, one)
        for k in range(len(ends)):
            simd.store(out, k * room + 5, value, ends[k, 0], ends[k, 1])

    source = np.arange(1, 1 + simd.WIDTH, dtype=np.float32)
    ends = np.array([(i, j) for i in range(-2, simd.WIDTH + 2) for j in range(-2, simd.WIDTH + 3)])
    out = np.full(len(ends) * room, 999, dtype)
    wanted = out.reshape(-1, room).copy()
    for row, (first, last) in zip(wanted, ends, strict=True):
        first, last = max(first, 0), max(last, 0)
        numbers = source[first:last] if dtype == np.float32 else source[first:last].view(np.uint32) >> 16
        row[5 + first : 5 + first + len(numbers)] = numbers
    put(source, out, ends, one)
    np.testing.assert_array_equal(out.reshape(-1, room), wanted)


@given(sizes=st.tuples(*[st.sampled_from([1, 2, 7, 15, 16, 17, 33])] * 3), seed=seeds)
@fewer(2)
def test_products_and_passes_stay_within_their_arrays(sizes, seed):
    n, k, m = sizes
    with pytest.MonkeyPatch.context() as patch:
        zones = zones_of(patch)
        draw = np.random.default_rng(seed)
        shapes = ((3 * n, k), (k, m), (m,), (3 * n, m), (3 * n, k), (n,))
        x, w, b, dy, z, weight = (zones.place(draw.standard_normal(shape)) for shape in shapes)
        results = [
            cpu.linear(x, w, b),
            cpu.linear_input_gradient(dy, w),
            *cpu.linear_weight_gradient(x, dy),
            cpu.relu(x),
            cpu.relu_backward(x, z),
            *cpu.relu_hamming(x, 8.0),
            cpu.relu_hamming_backward(x, z, 8.0, weight),
            *cpu.relu_hamming_pair(x[:n], z[:n], 8.0),
            *cpu.relu_hamming_pair_backward(x, z[:n], z[n : 2 * n], 8.0, weight),
            *cpu.contract_pair(x),
            cpu.expand_pair(x, z),
            cpu.normalize(x.reshape(3, n, 1, k), None, np.ones(k, np.float32)),
            cpu.norm(x.reshape(-1)),
        ]
        cpu.sgd_update(x.reshape(-1), z.reshape(-1), zones.place(np.zeros(x.size)), 0.1, 0.9, 0.0)
        assert not zones.broken() and all(np.isfinite(result).all() for result in [*results, x])


def zones_of(patch):
    found = Zones()
    for name in ("convolution", "winograd", "gather_gemm", "elementwise", "attacks", "training"):
        patch.setattr(importlib.import_module(f"nanomr.ops.cpu.{name}"), "empty", found.empty)
    return found


CHECKED = """
import numba, numpy as np, pytest, sys
njit = numba.njit  # serial: an exception in a parallel loop is lost. Without a cache: there the kernels are unchecked
numba.njit = lambda *args, parallel=False, cache=False, **options: njit(*args, **options | {"boundscheck": True})
from nanomr.ops.cpu import elementwise
with pytest.raises(IndexError):  # else nothing is checked
    elementwise._relu_backward(*(np.ones((n, 4), "f") for n in (2, 3, 3)))
some = "cpu and (agrees or networks or sgd or bits)"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1], "-k", some]))
"""


@pytest.mark.slow
def test_kernels_with_numbas_bounds_checks():
    """The comparison with ``reference``, every kernel compiled anew with checked indices. The loads and stores of
    ``simd`` are raw addresses, which no check sees: for them there are the zones above."""
    tests = Path(__file__).with_name("test_ops.py")
    run = subprocess.run([sys.executable, "-c", CHECKED, tests], capture_output=True, text=True, cwd=tests.parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
