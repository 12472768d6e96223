"""ONNX and VNN-LIB files: what other tools compute from ours, and what we read from theirs."""

import csv
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx_files import logits_elsewhere, onnx, session

import nanomr as mr
from nanomr.errors import UserError
from nanomr.layers import (
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    Normalize,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
)
from nanomr.models import Model
from nanomr.testing.strategies import convolutions, seeds
from nanomr.verify.formats.onnx_io import export_onnx, import_onnx
from nanomr.verify.formats.vnnlib import export_instances, linf_box, read_vnnlib, write_vnnlib

LOGITS = 1e-5  # the bound, for logits of up to 10


def random_images(model, rng, n=5):
    return rng.random((n, *model.input_shape), np.float32)


def conv_batchnorm(seed=0) -> Model:
    """A Sequential inside, batch norm after a convolution with a bias and after one without, Linear without image=."""
    children = {
        "normalize": Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
        "block": Sequential({"conv": Conv2d(3, 6, 3, 2, (0, 1, 2, 1), bias=False), "bn": BatchNorm2d(6)}),
        "relu1": ReLU(),
        "conv2": Conv2d(6, 5, 2),
        "bn2": BatchNorm2d(5),
        "relu2": ReLU(),
        "flatten": Flatten(),
        "relu3": ReLU(),  # between Flatten and Linear: the order of the pixels still has to change
        "fc": Linear(5 * 3 * 4, 7, bias=False),  # no image=: the file must have its own order all the same
    }
    return Model(children, {"name": "test"}, (8, 9, 3), seed)


NETWORKS = {
    "small_cnn": lambda: mr.models.small_cnn(hidden=16),
    "small_cnn, kernel 5": lambda: mr.models.small_cnn(kernel=5, hidden=16),
    "mlp": lambda: mr.models.mlp((5 * 4 * 3, 16, 10), input_shape=(5, 4, 3)),
    "mlp, normalised": lambda: mr.models.mlp((60, 16, 10), input_shape=(5, 4, 3), mean=(0.5,), std=(0.25,)),
    "mlp, shifted": lambda: mr.models.mlp((60, 16, 10), input_shape=(5, 4, 3), mean=(0.5,)),
    "mlp, scaled": lambda: mr.models.mlp((60, 16, 10), input_shape=(5, 4, 3), std=(0.25,)),
    "conv_batchnorm": conv_batchnorm,
    "pools": lambda: pools(),
    "residual": lambda: residual(),
    "preact": lambda: mr.models.preact_resnet18(width=2, input_shape=(8, 8, 3)),
    "preact, raw shortcuts": lambda: mr.models.preact_resnet18(
        width=2, input_shape=(8, 8, 3), bn_before_fc=False, out_shortcut=False
    ),
    "preact, Jin v1": lambda: mr.models.preact_resnet18(width=2, input_shape=(8, 8, 3), jin_v1=True),
}


def pools() -> Model:
    """Average pooling of tiles and of everything, batch norms that no convolution precedes."""
    children = {
        "bn": BatchNorm2d(2),
        "pool": AveragePool2d(2),
        "conv": Conv2d(2, 3, 2),
        "relu": ReLU(),
        "bn2": BatchNorm2d(3),
        "global": AveragePool2d(),
        "flatten": Flatten(),
        "fc": Linear(3, 4),
    }
    return Model(children, "pools", (8, 8, 2))


def residual() -> Model:
    """A sum of images within a branch of a sum; a sum of vectors."""
    inner = Residual({"body": Sequential({"conv": Conv2d(2, 3, 3, 1, 1), "relu": ReLU()}), "other": Conv2d(2, 3, 1)})
    children = {
        "outer": Residual({"body": Sequential({"inner": inner, "bn": BatchNorm2d(3), "conv": Conv2d(3, 2, 1)})}),
        "relu": ReLU(),
        "flatten": Flatten(),
        "fc": Linear(40, 6),
        "vectors": Residual({"body": Sequential({"relu": ReLU(), "fc": Linear(6, 6)})}),
        "fc2": Linear(6, 4),
    }
    return Model(children, "residual", (5, 4, 2))


def trained(model, rng) -> Model:
    """Batch norms with weights and statistics of their own."""
    for _, layer in model.walk():
        if isinstance(layer, BatchNorm2d):
            for store in (layer.params, layer.buffers):
                for value in store.values():
                    value[...] = rng.uniform(0.5, 1.5, value.shape)
    return model


def with_large_logits(model, rng):
    last = list(model.children.values())[-1]
    last.params["weight"] *= 5 / abs(model.forward(random_images(model, rng))[0]).max()
    return model


# --- ONNX, ours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_others_compute_our_logits_and_so_does_the_network_read_back(kind, rng, tmp_path):
    model, path = with_large_logits(trained(NETWORKS[kind](), rng), rng), tmp_path / "model.onnx"
    onnx()
    export_onnx(model, path)
    images = random_images(model, rng)
    logits = model.forward(images)[0]
    assert 1 < abs(logits).max() < 10
    np.testing.assert_allclose(logits_elsewhere(path, images), logits, rtol=0, atol=LOGITS)
    back = import_onnx(path)
    assert back.input_shape == model.input_shape and back.dtype == np.float32
    np.testing.assert_allclose(back.forward(images)[0], logits, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind.startswith("preact")])
def test_a_preact_resnet_comes_back_as_its_blocks_bit_for_bit(kind, rng, tmp_path):
    model, path = trained(NETWORKS[kind](), rng), tmp_path / "model.onnx"
    onnx()
    export_onnx(model, path)
    back = import_onnx(path)
    ours, theirs = ([b for _, b in m.walk() if isinstance(b, PreActBlock)] for m in (model, back))
    assert len(ours) == len(theirs) == 8
    for one, other in zip(ours, theirs, strict=True):
        assert one.shortcut_reads_h == other.shortcut_reads_h and one.projects == other.projects
        for (_, a), (_, b) in zip(one.walk(), other.walk(), strict=True):
            for name, value in (*a.params.items(), *list(a.buffers.items())[:2]):
                np.testing.assert_array_equal((b.params | b.buffers)[name], value)


@st.composite
def networks(draw):
    case, seed = draw(convolutions(channels=(1, 2, 3))), draw(seeds)
    rng = np.random.default_rng(seed)
    bias, norm, relu = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    _, h, w, c = case.y_shape
    children = {"n": Normalize(rng.random(case.c_in), rng.uniform(0.2, 2, case.c_in))} if draw(st.booleans()) else {}
    children["c"] = Conv2d(case.c_in, c, case.kernel[0], case.stride, case.padding, bias=bias)
    children |= {"b": BatchNorm2d(c)} if norm else {}
    children |= {"r": ReLU()} if relu else {}
    children |= {"f": Flatten(), "l": Linear(h * w * c, 4, bias=bias)}
    return trained(Model(children, {}, case.x_shape[1:], seed % 1000), rng), rng


@given(networks())
def test_any_chain(tmp_path_factory, drawn):
    onnx()
    (model, rng), path = drawn, tmp_path_factory.mktemp("chain") / "model.onnx"
    export_onnx(model, path)
    images = random_images(model, rng, n=2)
    logits = model.forward(images)[0]
    np.testing.assert_allclose(logits_elsewhere(path, images), logits, rtol=0, atol=LOGITS)
    np.testing.assert_allclose(import_onnx(path).forward(images)[0], logits, rtol=0, atol=LOGITS)


def test_the_file_is_what_other_verifiers_read(rng, tmp_path):
    """Marabou and nnenum know these operators; the normalisation is not folded into the padded convolution."""
    model = mr.models.small_cnn(hidden=8)
    onnx()
    export_onnx(model, tmp_path / "model.onnx")
    proto = onnx().load(tmp_path / "model.onnx")
    onnx().checker.check_model(proto, full_check=True)
    ops = [node.op_type for node in proto.graph.node]
    assert ops == ["Conv", "Conv", "Relu", "Conv", "Relu", "Flatten", "Gemm", "Relu", "Gemm"]
    dims = [[d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in proto.graph.input]
    assert dims == [["N", 3, 32, 32]] and [proto.graph.input[0].name, proto.graph.output[0].name] == ["X", "Y"]
    assert proto.ir_version == 7 and [o.version for o in proto.opset_import] == [12]
    written = {t.name: onnx().numpy_helper.to_array(t) for t in proto.graph.initializer}
    state = model.state_dict()
    for name in ("conv1.weight", "conv2.bias", "fc1.weight", "fc2.weight"):  # PyTorch's names and layouts, bit for bit
        np.testing.assert_array_equal(written[name], state[name])
    std = state["normalize.std"].ravel()
    np.testing.assert_array_equal(written["normalize.weight"][:, :, 0, 0], np.diag(1 / std))


def test_export_leaves_the_model_alone_and_the_same_bytes_twice(rng, tmp_path):
    onnx()
    model = trained(conv_batchnorm(), rng)
    before = model.state_dict()
    for name in "ab":
        export_onnx(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


class Mine(Layer):
    """A layer that no exporter knows."""


def chain(*layers, shape=(4, 4, 2)):
    return Model({str(i): layer for i, layer in enumerate(layers)}, {}, shape)


REFUSED_LAYERS = {
    "'1.mine': Mine": lambda: chain(Conv2d(2, 2, 1), Sequential({"mine": Mine()}), Flatten(), Linear(32, 2)),
    "'0': Linear without a Flatten": lambda: chain(Linear(2, 2)),
    "does not end in logits": lambda: chain(Conv2d(2, 2, 1), Flatten()),
    "does not end in logits, ": lambda: chain(Conv2d(2, 2, 1)),
    "the model is float64": lambda: chain(Flatten(), Linear(32, 2)).astype(np.float64),
}


@pytest.mark.parametrize("message", REFUSED_LAYERS)
def test_export_refuses_by_name(message, tmp_path):
    onnx()
    with pytest.raises(UserError) as caught:
        export_onnx(REFUSED_LAYERS[message](), tmp_path / "model.onnx")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [lambda path: export_onnx(mr.models.small_cnn(), path), import_onnx])
def test_without_onnx_the_message_says_what_to_install(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'nanomr\[onnx\]'"):
        call(tmp_path / "model.onnx")


# --- VNN-LIB ----------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6, allow_subnormal=True)
boxes = array_shapes(min_dims=3, max_dims=3, max_side=3).flatmap(
    lambda shape: st.tuples(arrays(np.float64, shape, elements=numbers), arrays(np.float64, shape, elements=numbers))
)


def bounds(path):
    """{(operator, i): the number's text} of every bound in the file, by another reader than ours."""
    words = [line.replace("(", " ").replace(")", " ").split() for line in path.read_text().splitlines()]
    return {(w[1], int(w[2][2:])): w[3] for w in words if len(w) == 4 and w[0] == "assert" and w[2][0] == "X"}


def assert_robustness(prop, label):
    """One box, and a case for each rival t: Y_label - Y_t <= 0."""
    assert all(case.low is prop.cases[0].low and not case.offsets.any() for case in prop.cases)
    one = np.eye(prop.outputs)
    assert [case.rows.tolist() for case in prop.cases] == [
        [(one[label] - one[t]).tolist()] for t in range(prop.outputs) if t != label
    ]


@given(boxes)
def test_the_text_contains_the_box_and_reading_it_adds_an_ulp_at_most(tmp_path_factory, ends):
    path = tmp_path_factory.mktemp("box") / "box.vnnlib"
    low, high = np.minimum(*ends), np.maximum(*ends)
    write_vnnlib(path, low, high, 1, 3)
    texts, nchw = bounds(path), [end.transpose(2, 0, 1).ravel() for end in (low, high)]
    for i, (a, b) in enumerate(zip(*nchw, strict=True)):
        lower, upper = texts[">=", i], texts["<=", i]
        assert Fraction(lower) <= Fraction(float(a)) and Fraction(float(b)) <= Fraction(upper)
        for text in (lower, upper):
            assert "e" not in text.lower() and "." in text and len(Decimal(text).normalize().as_tuple().digits) <= 17
    prop = read_vnnlib(path, low.shape, 3)
    back = prop.cases[0]
    assert back.low.shape == back.high.shape == low.shape
    assert (np.nextafter(low, -np.inf) <= back.low).all() and (back.low <= low).all()
    assert (high <= back.high).all() and (back.high <= np.nextafter(high, np.inf)).all()
    assert_robustness(prop, 1)


def test_missing_files_and_boxes_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_vnnlib(tmp_path / "nothing")
    one = np.ones((1, 1, 1))
    for low, high, label in (
        (one, 0 * one, 0),
        (one, np.nan * one, 0),
        (-np.inf * one, one, 0),
        (one, np.inf * one, 0),
        (one, one, 2),
        (one, one, -1),
    ):
        with pytest.raises(ValueError, match=r"box|label"):
            write_vnnlib(tmp_path / "a", low, high, label, 2)
    with pytest.raises(ValueError, match="H, W, C"):
        write_vnnlib(tmp_path / "a", np.zeros(3), np.ones(3), 0, 2)
    assert not list(tmp_path.iterdir())


# --- boxes and instances ----------------------------------------------------------------------------------------------

pixels = st.integers(0, 255).map(lambda k: np.float32(k) / np.float32(255)) | st.floats(0, 1, width=32)


@given(st.lists(pixels, min_size=1, max_size=9), st.sampled_from([0.0, 2 / 255, 8 / 255, 0.1, 1.0, 1e-9]))
def test_the_box_is_the_smallest_that_contains_the_ball(values, eps):
    x = np.array(values, np.float32).reshape(1, -1, 1, 1)
    low, high = linf_box(x, eps)
    assert low.dtype == high.dtype == np.float64
    for v, a, b in zip(x.ravel().tolist(), low.ravel().tolist(), high.ravel().tolist(), strict=True):
        lower, upper = max(Fraction(v) - Fraction(eps), 0), min(Fraction(v) + Fraction(eps), 1)
        assert Fraction(a) <= lower < Fraction(np.nextafter(a, np.inf))
        assert Fraction(np.nextafter(b, -np.inf)) < upper <= Fraction(b)


@pytest.mark.parametrize(("value", "eps"), [(-0.1, 0.1), (1.1, 0.1), (np.nan, 0.1), (0.5, -0.1), (0.5, np.nan)])
def test_no_box_for_what_is_no_image(value, eps):
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        linf_box(np.full((1, 1, 1, 1), value), eps)


def test_instances(rng, tmp_path):
    onnx()
    model = NETWORKS["mlp"]()
    images, labels, eps = (rng.integers(0, 256, (2, 5, 4, 3)) / 255).astype(np.float32), np.array([3, 0]), 8 / 255
    export_instances(model, images, labels, eps, tmp_path / "out", timeout=60, ids=[17, 4])
    with open(tmp_path / "out" / "instances.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["model.onnx", f"vnnlib/img_{i}.vnnlib", "60"] for i in (17, 4)]
    low, high = linf_box(images, eps)
    for row, a, b, image, label in zip(rows, low, high, images, labels, strict=True):
        prop = read_vnnlib(tmp_path / "out" / row[1], model.input_shape, 10)
        back = prop.cases[0]
        assert (back.low <= a).all() and (back.high >= b).all() and (b - a).max() > 0.06
        assert_robustness(prop, label)
        # the pixels of X are in the order in which the network in the folder takes them
        x = ((back.low + back.high) / 2).astype(np.float32)
        inside = (image > eps) & (image < 1 - eps)
        np.testing.assert_allclose(x[inside], image[inside], rtol=0, atol=2**-23)
    np.testing.assert_allclose(
        import_onnx(tmp_path / "out" / rows[0][0]).forward(images)[0], model.forward(images)[0], rtol=0, atol=LOGITS
    )


def test_x_counts_the_pixels_as_the_network_in_the_folder_does(rng, tmp_path):
    """A box of no size: the file's X, put into the ONNX network in its own order, gives the image's logits."""
    onnx()
    model = trained(conv_batchnorm(), rng)
    images = random_images(model, rng, n=1)
    export_instances(model, images, [0], 0.0, tmp_path)
    x = read_vnnlib(tmp_path / "vnnlib/img_0.vnnlib").cases[0].low.astype(np.float32).reshape(1, 3, 8, 9)
    wanted = model.forward(images)[0]
    np.testing.assert_allclose(session(tmp_path / "model.onnx").run(None, {"X": x})[0], wanted, rtol=0, atol=LOGITS)


def test_instances_need_as_many_names_as_images(rng, tmp_path):
    model = NETWORKS["mlp"]()
    for ids in ([1], [1, 1]):
        with pytest.raises(ValueError, match="different ids"):
            export_instances(model, random_images(model, rng, 2), [0, 1], 0.1, tmp_path / "out", ids=ids)
    assert not list(tmp_path.iterdir())
