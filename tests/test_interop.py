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

import nanomr as mr
from nanomr.errors import UserError
from nanomr.layers import AveragePool2d, BatchNorm2d, Conv2d, Flatten, Linear, Normalize, ReLU, Sequential
from nanomr.models import Model
from nanomr.testing.strategies import convolutions, seeds
from nanomr.verify.formats.onnx_io import ATTRIBUTES, export_onnx, import_onnx
from nanomr.verify.formats.vnnlib import export_instances, linf_box, read_vnnlib, write_vnnlib

LOGITS = 1e-5  # the bound, for logits of up to 10


def onnx():
    return pytest.importorskip("onnx", reason="onnx is not installed (pip install 'nanomr[onnx]')")


def session(path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'nanomr[onnx]')")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits_elsewhere(path, images):
    """onnxruntime's, for images NHWC."""
    run = session(path)
    return run.run(None, {run.get_inputs()[0].name: np.ascontiguousarray(images.transpose(0, 3, 1, 2))})[0]


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
}


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


def chain(*layers, shape=(4, 4, 2)):
    return Model({str(i): layer for i, layer in enumerate(layers)}, {}, shape)


REFUSED_LAYERS = {
    "'1': AveragePool2d": lambda: chain(Conv2d(2, 2, 1), AveragePool2d(2), Flatten(), Linear(8, 2)),
    "'layer1.0': PreActBlock": lambda: mr.models.preact_resnet18(width=2),
    "'0': BatchNorm2d without a convolution": lambda: chain(BatchNorm2d(2), Flatten(), Linear(32, 2)),
    "'2': BatchNorm2d without a convolution": lambda: chain(Conv2d(2, 2, 1), ReLU(), BatchNorm2d(2), Flatten()),
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


# --- ONNX, theirs -----------------------------------------------------------------------------------------------------


def write_graph(path, nodes, constants, shape=("N", 2, 5, 4), out=("N", 3), kind="FLOAT", opset=13):
    """nodes: (operator, inputs, output, attributes) from "X" to "Y"; constants by name."""
    helper, kind = onnx().helper, getattr(onnx().TensorProto, kind)
    value = helper.make_tensor_value_info
    tensors = [onnx().numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    made = [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in nodes]
    graph = helper.make_graph(made, "theirs", [value("X", kind, shape)], [value("Y", kind, out)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def foreign(rng):
    """Every operator and every way of writing it that can be imported."""
    size = 3 * 2 * 2  # after the convolution: (5 + 1 - 3) // 2 + 1 rows, (4 + 2 - 3) // 2 + 1 columns
    constants = {
        "mean": normal(rng, 1, 2, 1, 1),
        "std": rng.uniform(0.5, 2, (2, 1, 1)).astype(np.float32),
        "full": np.broadcast_to(normal(rng, 2, 1, 1), (2, 5, 4)),
        "w": normal(rng, 3, 2, 3, 3),
        "b": normal(rng, 3),
        "b4": normal(rng, 1, 3, 1, 1),
        "ratio": np.float32(0.5),
        "flat": np.array([-1, size]),
        "m": 0.3 * normal(rng, size, 6),
        "m_b": normal(rng, 6),
        "g": normal(rng, 3, 6),
        "gt": normal(rng, 6, 3),
        "g_b": normal(rng, 1, 3),
    }
    pads = {"pads": [1, 0, 0, 2], "strides": [2, 2], "kernel_shape": [3, 3], "group": 1, "dilations": [1, 1]}
    start = [("Sub", ["X", "mean"], "a", {}), ("Div", ["a", "std"], "b_", {}), ("Conv", ["b_", "w", "b"], "c", pads)]
    flat = [*start, ("Relu", ["c"], "d", {}), ("Flatten", ["d"], "e", {})]
    matmul = [*flat, ("MatMul", ["e", "m"], "f", {}), ("Add", ["m_b", "f"], "h", {}), ("Relu", ["h"], "i", {})]
    yield "gemm", [*matmul, ("Gemm", ["i", "g", "g_b"], "Y", {"transB": 1})], constants
    yield "gemm, not transposed, no bias", [*matmul, ("Gemm", ["i", "gt"], "Y", {"alpha": 1.0})], constants
    shared = {"value": onnx().numpy_helper.from_array(constants["mean"])}
    yield (
        "constants, identities, dropout, reshape",
        [
            ("Constant", [], "mean_", shared),
            ("Identity", ["mean_"], "mean__", {}),
            ("Sub", ["X", "mean__"], "a", {}),
            ("Sub", ["a", "full"], "a_", {}),
            ("Identity", ["a_"], "b_", {}),
            ("Conv", ["b_", "w"], "c", pads),
            ("Add", ["c", "b4"], "c_", {}),
            ("Dropout", ["c_", "ratio"], "d", {}),
            ("Reshape", ["d", "flat"], "e", {}),
            ("Flatten", ["e"], "e_", {"axis": -1}),
            ("MatMul", ["e_", "m"], "f", {}),
            ("Relu", ["f"], "i", {}),
            ("Gemm", ["i", "gt", "g_b"], "Y", {}),
        ],
        constants,
    )
    yield (
        "div alone",
        [("Div", ["X", "std"], "a", {}), ("Conv", ["a", "w"], "c", pads), *flat[3:], *matmul[5:7]],
        constants,
    )


def test_every_operator_that_is_read(rng, tmp_path):
    for name, nodes, constants in foreign(rng):
        nodes[-1] = (*nodes[-1][:2], "Y", nodes[-1][3])
        path = write_graph(tmp_path / "theirs.onnx", nodes, constants, out=("N", "K"))
        model = import_onnx(path)
        assert model.input_shape == (5, 4, 2) and model.architecture["name"] == "onnx"
        images = random_images(model, rng)
        wanted = logits_elsewhere(path, images)
        # float32's 6e-8, times a few for the order of the sums; of the largest logit, which is up to 50 here
        np.testing.assert_allclose(
            model.forward(images)[0], wanted, rtol=0, atol=1e-6 * abs(wanted).max(), err_msg=name
        )


@pytest.mark.parametrize("shape", [("N", 6), (1, 6, 1), (1, 1, 1, 6)])
def test_an_input_that_is_no_image(shape, rng, tmp_path):
    constants = {"s": normal(rng, 1), "w": normal(rng, 6, 3), "b": normal(rng, 3)}
    nodes = [("Sub", ["X", "s"], "a", {}), ("Flatten", ["a"], "f", {}), ("Gemm", ["f", "w", "b"], "Y", {})]
    path = write_graph(tmp_path / "theirs.onnx", nodes, constants, shape)
    model = import_onnx(path)
    x = rng.random((1, *model.input_shape), np.float32)
    assert x.size == 6
    wanted = session(path).run(None, {"X": x.reshape([1 if n == "N" else n for n in shape])})[0]
    np.testing.assert_allclose(model.forward(x)[0], wanted, rtol=0, atol=1e-6 * 6)  # 6 products of order 1


def refused(rng):
    """(what the message says, nodes, constants, other arguments): all valid ONNX but for the last few."""
    w, fc = {"w": normal(rng, 2, 2, 3, 3)}, {"fc": normal(rng, 40, 3)}
    flat = [("Flatten", ["a"], "f", {}), ("Gemm", ["f", "fc"], "Y", {})]
    relu = ("Relu", ["X"], "a", {})
    conv = lambda **attributes: [("Conv", ["X", "w"], "Y", attributes)]  # noqa: E731
    yield "MaxPool: only Constant", [("MaxPool", ["X"], "a", {"kernel_shape": [2, 2]}), *flat], fc
    yield "Sigmoid", [("Sigmoid", ["X"], "a", {}), *flat], fc
    yield "Add: only a bias", [("Add", ["X", "c"], "a", {}), *flat], fc | {"c": normal(rng, 1, 2, 1, 1)}
    yield "Add: only a bias", [relu, ("Add", ["a", "c"], "b", {}), *flat], fc | {"c": normal(rng, 1, 2, 1, 1)}
    yield "only chains", [relu, ("Relu", ["X"], "b", {}), *flat], fc
    yield "Add: only a bias", [relu, ("Add", ["a", "X"], "b", {}), *flat], fc
    four = fc | {"c": normal(rng, 4)}
    yield "another shape", [relu, flat[0], ("MatMul", ["f", "fc"], "g", {}), ("Add", ["g", "c"], "Y", {})], four
    yield "bias has the shape (4,)", [relu, flat[0], ("Gemm", ["f", "fc", "c"], "Y", {})], four
    yield "finite float32", [relu, *flat], {"fc": np.zeros((40, 3))}
    unbiased, c = ("Conv", ["X", "w"], "a", {}), {"c": normal(rng, 1, 2, 1, 1)}
    yield "Add: only a bias", [unbiased, ("Relu", ["a"], "b", {}), ("Add", ["b", "c"], "Y", {})], w | c
    yield "Add: only a bias", [unbiased, ("Add", ["a", "c"], "b", {}), ("Add", ["b", "c"], "Y", {})], w | c
    yield "not a constant", [relu, ("Sub", ["a", "X"], "b", {}), *flat], fc
    yield "from pixel to pixel", [("Sub", ["X", "c"], "a", {}), *flat], fc | {"c": normal(rng, 2, 5, 4)}
    yield "divides by zero", [("Div", ["X", "c"], "a", {}), *flat], fc | {"c": np.float32(0)}
    yield "reads 'c'", [("Sub", ["c", "X"], "a", {}), *flat], fc | {"c": np.float32(1)}
    yield "before the first Flatten", [relu, flat[0], ("Sub", ["f", "c"], "Y", {})], {"c": np.float32(1)}
    yield (
        "before the first Flatten",
        [relu, flat[0], ("Gemm", ["f", "fc"], "g", {}), ("Sub", ["g", "c"], "Y", {})],
        {
            **fc,
            "c": np.float32(1),
        },
    )
    yield "groups", conv(group=2), {"w": normal(rng, 2, 1, 3, 3)}
    yield "dilations", conv(dilations=[2, 1]), w
    yield "auto_pad", conv(auto_pad="SAME_UPPER"), w
    yield "square kernels", conv(), {"w": normal(rng, 2, 2, 3, 2)}
    yield "square kernels", conv(kernel_shape=[2, 2]), w
    yield "equal strides", conv(strides=[1, 2]), w
    yield "larger than", conv(), {"w": normal(rng, 2, 2, 5, 5)}
    yield "of 3 channels", conv(), {"w": normal(rng, 2, 3, 3, 3)}
    yield "4 axes", [("MatMul", ["X", "m"], "Y", {})], {"m": normal(rng, 1, 1, 4, 3)}
    yield "it takes 4 numbers", [("MatMul", ["X", "m"], "Y", {})], {"m": normal(rng, 4, 3)}
    for odd in ({"alpha": 2.0}, {"beta": 0.5}, {"transA": 1}):
        yield "transA = 0", [relu, flat[0], ("Gemm", ["f", "fc"], "Y", odd)], fc
    yield "axis = 1", [relu, ("Flatten", ["a"], "Y", {"axis": 2})], {}
    yield "reshape to", [relu, ("Reshape", ["a", "s"], "Y", {})], {"s": np.array([-1, 8, 5])}
    yield "rows of 8", [relu, ("Reshape", ["a", "s"], "Y", {})], {"s": np.array([-1, 8])}
    yield "training mode", [("Dropout", ["X", "r", "t"], "Y", {})], {"r": np.float32(0.5), "t": np.array(True)}
    yield "its output is an image", [relu, ("Flatten", ["a"], "Y", {})], {}
    yield "its output is an image", [("Relu", ["X"], "Y", {})], {}
    yield "not what its last node", [("Flatten", ["X"], "Y", {}), ("Gemm", ["Y", "fc"], "Z", {})], fc
    yield "not finite", [("Sub", ["X", "c"], "a", {}), *flat], fc | {"c": np.float32(np.nan)}
    yield "not float32", [relu, *flat], {"fc": np.zeros((40, 3))}, {"kind": "DOUBLE"}
    yield "has the shape [0, 2, 5, 0]", [relu, *flat], fc, {"shape": ("N", 2, 5, "W")}
    yield "operator set 7", [("Relu", ["X"], "Y", {})], {}, {"opset": 6}
    yield "no valid ONNX file", [("Nonsense", ["X"], "Y", {})], {}
    yield "no valid ONNX file", [("Relu", [], "Y", {})], {}


def test_import_refuses_by_name(rng, tmp_path):
    for message, nodes, constants, *more in refused(rng):
        path = write_graph(tmp_path / "theirs.onnx", nodes, constants, **(more[0] if more else {}))
        with pytest.raises(UserError) as caught:
            import_onnx(path)
        assert message in str(caught.value), (message, str(caught.value))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_missing_or_no_onnx(tmp_path):
    onnx()
    with pytest.raises(UserError, match="cannot read"):
        import_onnx(tmp_path / "nothing.onnx")
    for data in (b"", b"(declare-const X_0 Real)", bytes(range(256))):
        (tmp_path / "odd.onnx").write_bytes(data)
        with pytest.raises(UserError, match=r"odd\.onnx"):
            import_onnx(tmp_path / "odd.onnx")


def test_convolutions_down_to_one_pixel(rng, tmp_path):
    nodes = [("Conv", ["X", "w"], "a", {"strides": [2, 2]}), ("Flatten", ["a"], "Y", {})]
    path = write_graph(tmp_path / "theirs.onnx", nodes, {"w": normal(rng, 3, 2, 4, 4)})
    model = import_onnx(path)
    images = random_images(model, rng)
    wanted = logits_elsewhere(path, images)
    # 32 products of order 1
    np.testing.assert_allclose(model.forward(images)[0], wanted, rtol=0, atol=32 * 1e-6)


def test_attributes_of_a_later_operator_set_are_not_ignored(rng, tmp_path, monkeypatch):
    """Today's onnx knows no attribute that we do not: so that we forget one."""
    nodes = [("Flatten", ["X"], "f", {}), ("Gemm", ["f", "w"], "Y", {"transB": 1})]
    path = write_graph(tmp_path / "theirs.onnx", nodes, {"w": normal(rng, 3, 40)})
    monkeypatch.setitem(ATTRIBUTES, "Gemm", set())
    with pytest.raises(UserError, match="Gemm: its attribute 'transB' is not known"):
        import_onnx(path)


def test_odd_graphs(rng, tmp_path):
    nodes = [("Flatten", ["X"], "f", {}), ("MatMul", ["f", "w"], "Y", {})]
    path = write_graph(tmp_path / "theirs.onnx", nodes, {"w": normal(rng, 40, 3)})
    proto, helper = onnx().load(path), onnx().helper

    def foreign_domain(p):
        p.graph.node[0].domain, p.graph.node[0].name = "mine", "odd one"
        p.opset_import.append(helper.make_opsetid("mine", 1))

    changes = {
        "2 inputs and 1 outputs": lambda p: p.graph.input.append(helper.make_tensor_value_info("Z", 1, ("N", 2))),
        "1 inputs and 2 outputs": lambda p: p.graph.output.append(helper.make_tensor_value_info("f", 1, ("N", 40))),
        "Flatten 'odd one': only Constant": foreign_domain,
    }
    for message, change in changes.items():
        other = type(proto).FromString(proto.SerializeToString())
        change(other)
        path.write_bytes(other.SerializeToString())
        with pytest.raises(UserError) as caught:
            import_onnx(path)
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    # constants that are listed among the inputs, as the first versions of the format had it
    proto.graph.input.append(helper.make_tensor_value_info("w", 1, (40, 3)))
    path.write_bytes(proto.SerializeToString())
    assert list(import_onnx(path).children) == ["flatten1", "fc1"]


def test_weights_in_another_file_are_not_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it would be found
    path = write_graph(tmp_path / "theirs.onnx", [("Flatten", ["X"], "f", {}), ("MatMul", ["f", "w"], "Y", {})], {})
    proto = onnx().ModelProto.FromString(path.read_bytes())
    (tmp_path / "weights").write_bytes(np.ones((40, 3), np.float32).tobytes())
    tensor = proto.graph.initializer.add(name="w", dims=[40, 3], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value="weights")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="in another file"):
        import_onnx(path)


@given(st.data())
def test_a_damaged_file_is_refused_or_read_but_never_crashes(tmp_path_factory, data):
    onnx()
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    export_onnx(mr.models.mlp((12, 3, 2), input_shape=(2, 2, 3), mean=(0.5,)), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        import_onnx(path)
    except UserError as error:
        assert "\n" not in str(error)


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
