"""Networks that others wrote: what each exporter puts around products and ReLUs, and what is refused by name."""

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import logits_elsewhere, normal, onnx, session, write_graph

import nanomr as mr
from nanomr.errors import UserError
from nanomr.layers import PreActBlock, Residual
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.chain import Chain
from nanomr.verify.formats.onnx_import import ATTRIBUTES
from nanomr.verify.formats.onnx_io import export_onnx, import_onnx, read_onnx

SHARED = next((p / "shared" for p in Path(__file__).parents if (p / "shared" / "vnncomp").is_dir()), None)


def sizes(dims):
    """The shape of one image, of an input's dimensions."""
    return [n if isinstance(n, int) else 1 for n in dims]


def agrees(path, rng, tolerance=1e-5, images=3):
    """(the network in the file, images, its logits), if these are onnxruntime's to 1e-5 of the largest."""
    model, order = read_onnx(path)
    assert sorted(order) == list(range(np.prod(model.input_shape)))
    data = Path(path).read_bytes()
    run = session(gzip.decompress(data) if Path(path).suffix == ".gz" else data)
    (given,) = run.get_inputs()
    theirs = rng.random((images, order.size), np.float32)
    ours = np.empty_like(theirs)
    ours[:, order] = theirs
    ours = ours.reshape(images, *model.input_shape)
    wanted = [run.run(None, {given.name: x.reshape(sizes(given.shape))})[0].ravel() for x in theirs]
    logits = model.forward(ours)[0]
    atol = tolerance * max(1, np.abs(wanted).max())
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=atol)
    return model, ours, logits


def keeps(model, images, logits, folder):
    """A checkpoint of it gives the same logits, bit for bit, and gradients go through it."""
    model.save(folder / "model.safetensors")
    back = mr.load(folder / "model.safetensors")
    np.testing.assert_array_equal(back.forward(images)[0], logits)
    y, cache = back.forward(images)
    assert np.isfinite(back.backward(np.ones_like(y), cache, param_grads=False)).all()


# --- what exporters write ---------------------------------------------------------------------------------------------


def torchscript(rng):
    """PyTorch's older exporter, dynamic batch: constants as nodes, the shape worked out before the Reshape."""
    value = lambda v: {"value": onnx().numpy_helper.from_array(np.asarray(v))}  # noqa: E731
    conv = {"dilations": [1, 1], "group": 1, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    nodes = [
        ("Constant", [], "mean", value(normal(rng, 1, 2, 1, 1))),
        ("Constant", [], "std", value(rng.uniform(0.5, 2, (1, 2, 1, 1)).astype(np.float32))),
        ("Sub", ["X", "mean"], "a", {}),
        ("Div", ["a", "std"], "b", {}),
        ("Conv", ["b", "w", "wb"], "c", conv),
        ("Relu", ["c"], "d", {}),
        ("Shape", ["d"], "s", {}),
        ("Constant", [], "zero", value(np.int64(0))),
        ("Gather", ["s", "zero"], "n", {"axis": 0}),
        ("Constant", [], "minus", value(np.array([-1]))),
        ("Unsqueeze", ["n", "axes"], "n1", {}),
        ("Concat", ["n1", "minus"], "to", {"axis": 0}),
        ("Reshape", ["d", "to"], "e", {}),
        ("Gemm", ["e", "g", "gb"], "f", {"alpha": 1.0, "beta": 1.0, "transB": 1}),
        ("Identity", ["f"], "f_", {}),
        ("Dropout", ["f_"], "h", {}),
        ("Relu", ["h"], "i", {}),
        ("Gemm", ["i", "g2", "g2b"], "Y", {"alpha": 1.0, "beta": 1.0, "transB": 1}),
    ]
    constants = {
        "axes": np.array([0]), "w": normal(rng, 3, 2, 3, 3), "wb": normal(rng, 3), "g": normal(rng, 5, 18),
        "gb": normal(rng, 5), "g2": normal(rng, 3, 5), "g2b": normal(rng, 3),
    }  # fmt: skip
    return nodes, constants, ("N", 2, 5, 4)


def torch_resnet(rng):
    """PyTorch: batch norms folded, sums behind convolutions, the mean over rows and columns."""
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        ("Conv", ["X", "w0", "b0"], "a", pads),
        ("Relu", ["a"], "b", {}),
        ("Conv", ["b", "w1", "b1"], "c", pads),
        ("Relu", ["c"], "d", {}),
        ("Conv", ["d", "w2", "b2"], "e", pads),
        ("Add", ["e", "b"], "f", {}),
        ("Relu", ["f"], "g", {}),
        ("Conv", ["g", "w3", "b3"], "h", pads | {"strides": [2, 2]}),
        ("Relu", ["h"], "i", {}),
        ("Conv", ["g", "w4", "b3"], "k", {"strides": [2, 2]}),
        ("Add", ["k", "i"], "l", {}),
        ("ReduceMean", ["l"], "m", {"axes": [2, 3], "keepdims": 0}),
        ("Gemm", ["m", "fc", "fcb"], "Y", {"transB": 1}),
    ]
    constants = {f"w{i}": 0.4 * normal(rng, o, c, 3, 3) for i, (o, c) in enumerate([(3, 2), (3, 3), (3, 3), (4, 3)])}
    constants |= {"w4": normal(rng, 4, 3, 1, 1), "fc": normal(rng, 5, 4), "fcb": normal(rng, 5)}
    return nodes, constants | {f"b{i}": normal(rng, n) for i, n in enumerate((3, 3, 3, 4))}, (1, 2, 6, 6)


def tensorflow(rng):
    """tf2onnx: NHWC, rescaling, auto_pad, batch norms as Mul and Add, a Transpose before the Reshape."""
    same = {"auto_pad": "SAME_UPPER", "strides": [2, 2], "kernel_shape": [3, 3]}
    nodes = [
        ("Mul", ["X", "scale"], "a", {}),
        ("Sub", ["a", "mean"], "b", {}),
        ("Transpose", ["b"], "c", {"perm": [0, 3, 1, 2]}),
        ("Conv", ["c", "w"], "d", same),
        ("Mul", ["d", "gamma"], "e", {}),
        ("Add", ["e", "beta"], "f", {}),
        ("Clip", ["f", "zero"], "g", {}),
        ("Transpose", ["g"], "h", {"perm": [0, 2, 3, 1]}),
        ("Cast", ["h"], "h_", {"to": 1}),
        ("Reshape", ["h_", "shape"], "i", {}),
        ("MatMul", ["i", "m"], "k", {}),
        ("Add", ["k", "mb"], "l", {}),
        ("Mul", ["l", "g1"], "n", {}),
        ("Add", ["n", "b1"], "o", {}),
        ("Relu", ["o"], "p", {}),
        ("MatMul", ["p", "m2"], "q", {}),
        ("Add", ["mb2", "q"], "Y", {}),
    ]
    constants = {
        "scale": np.float32(2 / 255), "mean": normal(rng, 3), "w": normal(rng, 4, 3, 3, 3),
        "gamma": normal(rng, 1, 4, 1, 1), "beta": normal(rng, 1, 4, 1, 1), "zero": np.float32(0),
        "shape": np.array([-1, 48]), "m": 0.2 * normal(rng, 48, 6), "mb": normal(rng, 6), "g1": normal(rng, 6),
        "b1": normal(rng, 6), "m2": normal(rng, 6, 3), "mb2": normal(rng, 3),
    }  # fmt: skip
    return nodes, constants, ("N", 7, 5, 3)


def keras(rng):
    """Keras through tf2onnx: ZeroPadding2D, pooling, batch norms before and after the ReLU, a mean; depthwise."""
    norm = lambda c, i: [f"{part}{i}" for part in ("gamma", "beta", "mean", "var")]  # noqa: E731
    nodes = [
        ("Transpose", ["X"], "a", {"perm": [0, 3, 1, 2]}),
        ("BatchNormalization", ["a", *norm(2, 0)], "b", {"epsilon": 1e-3}),
        ("Pad", ["b", "pads"], "c", {}),
        ("Conv", ["c", "w", "wb"], "d", {"auto_pad": "VALID", "strides": [1, 1]}),
        ("Relu", ["d"], "e", {}),
        ("BatchNormalization", ["e", *norm(4, 1)], "f", {"epsilon": 1e-3}),
        ("AveragePool", ["f"], "g", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Conv", ["g", "dw"], "h", {"group": 4, "auto_pad": "SAME_LOWER", "kernel_shape": [2, 3]}),
        ("Relu", ["h"], "i", {}),
        ("GlobalAveragePool", ["i"], "k", {}),
        ("Squeeze", ["k", "last"], "l", {}),
        ("MatMul", ["l", "m"], "n", {}),
        ("BatchNormalization", ["n", *norm(3, 2)], "o", {}),
        ("Relu", ["o"], "p", {}),
        ("Gemm", ["p", "m2"], "Y", {}),
    ]
    constants = {
        "pads": np.array([0, 0, 1, 0, 0, 0, 2, 1]), "w": normal(rng, 4, 2, 3, 3), "wb": normal(rng, 4),
        "dw": normal(rng, 4, 1, 2, 3), "last": np.array([2, 3]), "m": normal(rng, 4, 3), "m2": normal(rng, 3, 3),
    }  # fmt: skip
    for i, c in enumerate((2, 4, 3)):
        constants |= {f"{part}{i}": normal(rng, c) for part in ("gamma", "beta", "mean")}
        constants |= {f"var{i}": rng.uniform(0.5, 2, c).astype(np.float32)}
    return nodes, constants, ("N", 7, 10, 2)


def matlab(rng):
    """A mean image with a number for each input, products of rows."""
    nodes = [
        ("Sub", ["X", "mean"], "a", {}),
        ("Flatten", ["a"], "b", {}),
        ("MatMul", ["b", "m"], "c", {}),
        ("Add", ["c", "mb"], "d", {}),
        ("Relu", ["d"], "e", {}),
        ("MatMul", ["e", "m2"], "Y", {}),
    ]
    return nodes, {"mean": normal(rng, 1, 1, 1, 5), "m": normal(rng, 5, 4), "mb": normal(rng, 4),
                   "m2": normal(rng, 4, 3)}, (1, 1, 1, 5)  # fmt: skip


def column(shape):
    def nodes(rng):
        """Matrices on the left of a column, or of a vector; ranges as in ACAS Xu's files."""
        tail = (1,) * (len(shape) - 1)
        nodes = [
            ("Sub", ["X", "mean"], "a", {}),
            ("Div", ["a", "range"], "b", {}),
            ("MatMul", ["m", "b"], "c", {}),
            ("Add", ["c", "mb"], "d", {}),
            ("Relu", ["d"], "e", {}),
            ("MatMul", ["m2", "e"], "f", {}),
            ("Sub", ["k", "f"], "Y", {}),
        ]
        return nodes, {"mean": normal(rng, 5, *tail), "range": rng.uniform(0.5, 2, (5, *tail)).astype(np.float32),
                       "m": normal(rng, 4, 5), "mb": normal(rng, 4, *tail), "m2": normal(rng, 3, 4),
                       "k": normal(rng, 3, *tail)}, shape  # fmt: skip

    return nodes


def gemm_on_the_left(rng):
    nodes = [
        ("Gemm", ["m", "X", "mb"], "a", {"transB": 1}),
        ("Relu", ["a"], "b", {}),
        ("Transpose", ["b"], "c", {"perm": [1, 0]}),
        ("Gemm", ["c", "m2"], "Y", {}),
    ]
    return nodes, {"m": normal(rng, 4, 5), "mb": normal(rng, 4, 1), "m2": normal(rng, 4, 3)}, (1, 5)


def flat_image(rng):
    """Images that come flattened, as in the competition's MNIST files, are images of the convolution behind it."""
    nodes = [
        ("Reshape", ["X", "image"], "a", {}),
        ("Conv", ["a", "w"], "b", {}),
        ("Add", ["b", "wb"], "c", {}),
        ("Neg", ["c"], "c_", {}),
        ("Relu", ["c_"], "d", {}),
        ("Flatten", ["d"], "e", {"axis": -3}),
        ("Unsqueeze", ["e", "one"], "f", {}),
        ("MatMul", ["f", "m"], "g", {}),
        ("Squeeze", ["g", "one"], "Y", {}),
    ]
    return nodes, {"image": np.array([0, 2, 5, 4]), "w": normal(rng, 3, 2, 2, 2), "wb": normal(rng, 1, 3, 1, 1),
                   "one": np.array([1]), "m": normal(rng, 36, 3)}, (1, 40)  # fmt: skip


def odd_kernels(rng):
    """Oblong, dilated, grouped; tiles that overlap, and that leave pixels over."""
    nodes = [
        ("Conv", ["X", "w"], "a", {"pads": [0, 2, 1, 0], "strides": [1, 1]}),
        ("AveragePool", ["a"], "b", {"kernel_shape": [2, 3], "pads": [1, 0, 0, 1], "count_include_pad": 1}),
        ("Conv", ["b", "v"], "c", {"group": 2, "dilations": [2, 1], "pads": [0, 1, 1, 2], "strides": [2, 2]}),
        ("Relu", ["c"], "d", {}),
        ("AveragePool", ["d"], "e", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("ReduceMean", ["e"], "f", {"axes": [-1, 2]}),
        ("Flatten", ["f"], "g", {}),
        ("Gemm", ["g", "m"], "Y", {}),
    ]
    return nodes, {"w": normal(rng, 4, 2, 2, 3), "v": normal(rng, 6, 2, 2, 3), "m": normal(rng, 6, 3)}, (1, 2, 10, 13)


def preact(rng):
    """A PreActBlock whose batch norms nobody folded."""
    pads, norm = {"pads": [1, 1, 1, 1]}, lambda i: [f"{part}{i}" for part in ("gamma", "beta", "mean", "var")]
    nodes = [
        ("BatchNormalization", ["X", *norm(0)], "a", {}),
        ("Relu", ["a"], "b", {}),
        ("Conv", ["b", "w0"], "c", pads | {"strides": [2, 2]}),
        ("BatchNormalization", ["c", *norm(1)], "d", {}),
        ("Relu", ["d"], "e", {}),
        ("Conv", ["e", "w1"], "f", pads),
        ("Conv", ["b", "w2"], "g", {"strides": [2, 2]}),
        ("Add", ["g", "f"], "h", {}),
        ("Flatten", ["h"], "i", {}),
        ("Gemm", ["i", "m"], "Y", {}),
    ]
    constants = {"w0": normal(rng, 3, 2, 3, 3), "w1": normal(rng, 3, 3, 3, 3), "w2": normal(rng, 3, 2, 1, 1)}
    for i, c in enumerate((2, 3)):
        constants |= {f"{part}{i}": normal(rng, c) for part in ("gamma", "beta", "mean")}
        constants |= {f"var{i}": rng.uniform(0.5, 2, c).astype(np.float32)}
    return nodes, constants | {"m": normal(rng, 27, 3)}, ("N", 2, 5, 5)


def constants_alone(rng):
    """Weights that are computed: transposed, scaled, sliced; a shape from ConstantOfShape."""
    nodes = [
        ("Transpose", ["w"], "w_", {"perm": [3, 2, 0, 1]}),
        ("Mul", ["w_", "half"], "v", {}),
        ("Constant", [], "half", {"value_float": 0.5}),
        ("Conv", ["X", "v"], "a", {}),
        ("Relu", ["a"], "b", {}),
        ("Constant", [], "ones", {"value_ints": [2]}),
        ("ConstantOfShape", ["ones"], "rest", {"value": onnx().numpy_helper.from_array(np.array([-1]))}),
        ("Constant", [], "one", {"value_int": 1}),
        ("Constant", [], "start", {"value_ints": [0]}),
        ("Constant", [], "end", {"value_ints": [1]}),
        ("Slice", ["rest", "start", "end"], "tail", {}),
        ("Unsqueeze", ["one", "start"], "head", {}),
        ("Concat", ["head", "tail"], "to", {"axis": 0}),
        ("Reshape", ["b", "to"], "c", {}),
        ("Gemm", ["c", "m"], "d", {}),
        ("Constant", [], "bias", {"value_floats": [1.0, 2.0, 3.0]}),
        ("Add", ["d", "bias"], "Y", {}),
    ]
    nodes.insert(0, nodes.pop(2))
    return nodes, {"w": normal(rng, 2, 2, 2, 3), "m": normal(rng, 36, 3)}, ("N", 2, 5, 4)


EXPORTERS = {
    "PyTorch, TorchScript": torchscript, "PyTorch, a ResNet": torch_resnet, "TensorFlow": tensorflow, "Keras": keras,
    "MATLAB": matlab, "a vector": column((5,)), "a column": column((5, 1)), "Gemm on the left": gemm_on_the_left,
    "flat images": flat_image, "odd kernels": odd_kernels, "a PreActBlock": preact, "computed weights": constants_alone,
}  # fmt: skip
CHAINS = [name for name in EXPORTERS if name not in ("PyTorch, a ResNet", "a PreActBlock")]


@pytest.mark.parametrize("exporter", EXPORTERS)
@fewer(0.2)
@given(seed=seeds)
def test_what_exporters_write(exporter, seed, tmp_path_factory):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("theirs")
    nodes, constants, shape = EXPORTERS[exporter](rng)
    out = {"a vector": (3,), "a column": (3, 1)}.get(exporter, (1, "K"))
    path = write_graph(folder / "theirs.onnx", nodes, constants, shape, out)
    model, images, logits = agrees(path, rng)
    keeps(model, images, logits, folder)
    if exporter in CHAINS:
        np.testing.assert_allclose(
            Chain(model).forward(images)[0], logits, rtol=0, atol=1e-5 * max(1, abs(logits).max())
        )


def read(exporter, rng, tmp_path):
    nodes, constants, shape = EXPORTERS[exporter](rng)
    return read_onnx(write_graph(tmp_path / "theirs.onnx", nodes, constants, shape, (1, "K")))


def kinds(layer):
    """The types of what a tree holds, nested as the tree is."""
    return [kinds(child) if child.children else type(child).__name__ for child in layer.children.values()]


def test_the_layers_are_few_and_where_one_expects_them(rng, tmp_path):
    model, order = read("TensorFlow", rng, tmp_path)
    assert model.input_shape == (7, 5, 3) and (order == np.arange(105)).all()  # NHWC, as the file
    assert list(model.children) == ["conv1", "conv2", "conv3", "relu1", "flatten1", "fc1", "fc2", "relu2", "fc3"]
    model, order = read("PyTorch, TorchScript", rng, tmp_path)
    assert list(model.children) == ["normalize1", "conv1", "relu1", "flatten1", "fc1", "relu2", "fc2"]
    assert (order.reshape(2, 5, 4) == np.arange(40).reshape(5, 4, 2).transpose(2, 0, 1)).all()
    model, order = read("flat images", rng, tmp_path)
    assert model.input_shape == (5, 4, 2) and (order.reshape(2, 20) == np.arange(40).reshape(20, 2).T).all()
    model, _ = read("PyTorch, a ResNet", rng, tmp_path)
    assert kinds(model)[2:4] == [[["Conv2d", "ReLU", "Conv2d"]], "ReLU"]
    assert kinds(model)[4] == [["Conv2d", "ReLU"], ["Conv2d"]] and type(model.children["residual1"]) is Residual
    model, _ = read("a PreActBlock", rng, tmp_path)
    assert next(iter(map(type, model.children.values()))) is PreActBlock and len(model.children) == 3


@pytest.mark.parametrize("change", ["a bias", "eps", "kernel", "padding"])
def test_what_only_looks_like_a_preact_block_is_a_residual(change, rng, tmp_path):
    nodes, constants, shape = preact(rng)
    if change == "a bias":
        nodes[2][1].append("bias")
        constants["bias"] = normal(rng, 3)
    if change == "eps":
        nodes[3][3]["epsilon"] = 1e-3
    if change == "kernel":
        constants["w1"], nodes[5] = normal(rng, 3, 3, 1, 1), ("Conv", ["e", "w1"], "f", {})
    if change == "padding":
        nodes[5] = ("Conv", ["e", "w1"], "f", {"pads": [2, 2, 0, 0]})
    path = write_graph(tmp_path / "theirs.onnx", nodes, constants, shape)
    model, images, logits = agrees(path, rng)
    keeps(model, images, logits, tmp_path)
    assert [type(layer).__name__ for layer in model.children.values()][:3] == ["BatchNorm2d", "ReLU", "Residual"]


def test_a_wrong_order_would_be_seen(rng, tmp_path):
    """NHWC and NCHW differ in the tests' files: with the axes mixed up, no logits agree."""
    nodes, constants, shape = tensorflow(rng)
    nodes[7] = ("Transpose", ["g"], "h", {"perm": [0, 3, 2, 1]})
    path = write_graph(tmp_path / "theirs.onnx", nodes, constants, shape)
    agrees(path, rng)
    nodes[7] = ("Transpose", ["g"], "h", {"perm": [0, 2, 3, 1]})
    other = write_graph(tmp_path / "other.onnx", nodes, constants, shape)
    x = rng.random((1, 7, 5, 3), np.float32)
    assert abs(import_onnx(path).forward(x)[0] - import_onnx(other).forward(x)[0]).max() > 1e-2


@pytest.mark.skipif(SHARED is None, reason="the competition's files are not beside the repository")
@pytest.mark.parametrize("folder", ["vnncomp/oval21/nets", "vnncomp/acasxu", "vnncomp/lost", "faults/verify"])
def test_the_competitions_networks(folder, rng, tmp_path):
    paths = sorted((SHARED / folder).glob("*.onnx*"))
    assert paths
    for path in paths:
        keeps(*agrees(path, rng), tmp_path)


def test_gzipped_files(rng, tmp_path):
    path = write_graph(tmp_path / "theirs.onnx", *matlab(rng))
    zipped = tmp_path / "theirs.onnx.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    x = rng.random((2, *import_onnx(path).input_shape), np.float32)
    np.testing.assert_array_equal(import_onnx(zipped).forward(x)[0], import_onnx(path).forward(x)[0])
    for damaged in (zipped.read_bytes()[:-20], zipped.read_bytes()[:40] + b"??" + zipped.read_bytes()[42:]):
        zipped.write_bytes(damaged)
        with pytest.raises(UserError, match="decompressed") as caught:
            import_onnx(zipped)
        assert "\n" not in str(caught.value)


def torch_networks():
    import torch
    from torch import nn

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return torch.relu(self.norm(self.one(x)) + self.other(x)).mean((2, 3))

    class Reshaped(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)

    yield "conv", nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU(), nn.Dropout(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    yield "sum", nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Sum(), nn.Linear(6, 5), nn.BatchNorm1d(5))
    yield (
        "reshaped",
        nn.Sequential(
            nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(3, 2, 3), nn.ReLU6() and nn.ReLU(), Reshaped(), nn.LazyLinear(5)
        ),
    )


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True])
def test_pytorchs_own_files(dynamic, rng, tmp_path):
    import torch

    onnx()
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8)
    for name, network in torch_networks():
        network.train()(torch.rand(4, 3, 8, 8))
        path = tmp_path / f"{name}.onnx"
        axes = {"X": {0: "N"}, "Y": {0: "N"}} if dynamic else None
        torch.onnx.export(
            network.eval(), (x,), path, dynamo=False, input_names=["X"], output_names=["Y"], dynamic_axes=axes
        )
        keeps(*agrees(path, rng), tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(rng):
    """(what the message says, nodes, constants, other arguments): all valid ONNX but for the last few."""
    w, fc = {"w": normal(rng, 2, 2, 3, 3)}, {"fc": normal(rng, 40, 3)}
    flat = [("Flatten", ["a"], "f", {}), ("Gemm", ["f", "fc"], "Y", {})]
    relu = ("Relu", ["X"], "a", {})
    conv = lambda **attributes: [("Conv", ["X", "w"], "Y", attributes)]  # noqa: E731
    yield "MaxPool: this operator", [("MaxPool", ["X"], "a", {"kernel_shape": [2, 2]}), *flat], fc
    yield "Sigmoid: this operator", [("Sigmoid", ["X"], "a", {}), *flat], fc
    yield "of constants and shapes", [("Sqrt", ["X"], "a", {}), *flat], fc
    four = fc | {"c": normal(rng, 4)}
    yield "another shape", [relu, flat[0], ("MatMul", ["f", "fc"], "g", {}), ("Add", ["g", "c"], "Y", {})], four
    yield "another shape", [("Add", ["X", "c"], "a", {}), *flat], fc | {"c": normal(rng, 3, 1, 1)}
    yield "bias has the shape (4,)", [relu, flat[0], ("Gemm", ["f", "fc", "c"], "Y", {})], four
    yield "finite float32", [relu, *flat], {"fc": np.zeros((40, 3))}
    yield "two values", [("Sub", ["X", "X"], "a", {}), *flat], fc
    yield "two values", [("Mul", ["X", "X"], "a", {}), *flat], fc
    yield "multiplies two values", [("MatMul", ["X", "X"], "a", {}), *flat], fc
    yield "to itself", [relu, ("Add", ["a", "a"], "b", {}), ("Flatten", ["b"], "f", {}), flat[1]], fc
    turned = ("Transpose", ["X"], "t", {"perm": [0, 1, 3, 2]})
    yield (
        "same order",
        [turned, ("Reshape", ["t", "s"], "r", {}), ("Add", ["r", "X"], "a", {}), *flat],
        fc | {"s": np.array([1, 2, 5, 4])},
    )
    crossed = [
        relu, ("Conv", ["a", "w"], "b", {}), ("Conv", ["b", "w"], "c", {}), ("Conv", ["a", "w5"], "d", {}),
        ("Add", ["c", "d"], "e", {}), ("Conv", ["b", "w"], "g", {}), ("Add", ["e", "g"], "h", {}),
        ("Flatten", ["h"], "f", {}), ("Gemm", ["f", "m"], "Y", {}),
    ]  # fmt: skip
    yield "share a layer", crossed, w | {"w5": normal(rng, 2, 2, 5, 5), "m": normal(rng, 2, 3)}, {"shape": (1, 2, 5, 5)}
    yield "divides by zero", [("Div", ["X", "c"], "a", {}), *flat], fc | {"c": np.float32(0)}
    yield "by what a node computes", [("Div", ["c", "X"], "a", {}), *flat], fc | {"c": np.float32(1)}
    large = {"shape": (1, 2, 50, 50)}
    yield "more than 4096", [("Sub", ["X", "c"], "a", {}), ("Flatten", ["a"], "Y", {})], {"c": normal(rng, 50)}, large
    yield (
        "what it gets was flattened",
        [("Sub", ["X", "c"], "a", {}), ("Conv", ["a", "w"], "Y", {})],
        w | {"c": normal(rng, 5, 4)},
    )
    yield "do not fit", conv(group=3), w
    yield "do not fit", conv(kernel_shape=[2, 2]), w
    yield "of 4 channels", conv(group=2), w
    yield "equal strides", conv(strides=[1, 2]), w
    yield "at least 0", conv(pads=[1, 0, 0, -1]), w
    yield "at least 0", conv(pads=[1, 0, 0, 1], auto_pad="VALID"), w
    yield "larger than", conv(), {"w": normal(rng, 2, 2, 5, 5)}
    yield "of 3 channels", conv(), {"w": normal(rng, 2, 3, 3, 3)}
    yield "3 axes, not 4", conv(), {"w": normal(rng, 2, 2, 3)}
    yield "4 axes", [("MatMul", ["X", "m"], "Y", {})], {"m": normal(rng, 1, 1, 4, 3)}
    yield "it takes 4 numbers", [("MatMul", ["X", "m"], "Y", {})], {"m": normal(rng, 4, 3)}
    for odd in ({"alpha": 2.0}, {"beta": 0.5}):
        yield "alpha = beta = 1", [relu, flat[0], ("Gemm", ["f", "fc"], "Y", odd)], fc
    yield "it takes 40 numbers", [relu, flat[0], ("Gemm", ["f", "fc"], "Y", {"transA": 1})], fc
    yield "of 2 axes", [("Gemm", ["X", "fc"], "Y", {})], fc
    yield "does not fit", [relu, ("Reshape", ["a", "s"], "Y", {})], {"s": np.array([-1, 7])}
    yield "does not fit", [("Transpose", ["X"], "Y", {"perm": [0, 1, 3]})], {}
    yield "does not fit", [("Squeeze", ["X", "one"], "Y", {})], {"one": np.array([1])}
    yield "cannot be computed", [("Gather", ["s", "at"], "to", {}), ("Reshape", ["X", "to"], "Y", {})], {
        "s": np.array([1, 2]), "at": np.array([7]),
    }  # fmt: skip
    huge = {"n": np.array([2**20, 2**20])}
    yield "it is too large", [("ConstantOfShape", ["n"], "c", {}), ("Add", ["X", "c"], "Y", {})], huge
    yield "training mode", [("Dropout", ["X", "r", "t"], "Y", {})], {"r": np.float32(0.5), "t": np.array(True)}
    parts = {part: np.ones(2, np.float32) for part in "gbmv"}
    norm = lambda **more: [("BatchNormalization", ["X", *"gbmv"], "Y", more)]  # noqa: E731
    yield "training mode", norm(training_mode=1), parts, {"opset": 14}
    yield "not above 0", norm(), parts | {"v": -np.ones(2, np.float32)}
    yield "do not fit", norm(), parts | {"v": np.ones(3, np.float32)}
    yield "a cast to float32", [("Cast", ["X"], "Y", {"to": 11})], {}
    yield "Clip from 0", [("Clip", ["X", "low"], "a", {}), *flat], fc | {"low": np.float32(-1)}
    yield "Clip from 0", [("Clip", ["X", "low", "six"], "a", {}), *flat], fc | {
        "low": np.float32(0), "six": np.float32(6),
    }  # fmt: skip
    ones = {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    yield "padding with zeros", [("Pad", ["X", "p", "v"], "a", {}), *flat], ones | fc | {"v": np.float32(1)}
    yield "padding with zeros", [("Pad", ["X", "p"], "a", {"mode": "reflect"}), *flat], ones | fc
    yield "padding with zeros", [("Pad", ["X", "p"], "a", {}), *flat], fc | {"p": -ones["p"]}
    padded = [("Conv", ["X", "w1"], "c", {}), ("Pad", ["c", "p"], "d", {}), ("Add", ["d", "c1"], "Y", {})]
    yield "after a Pad", padded, ones | {"w1": normal(rng, 2, 2, 1, 1), "c1": normal(rng, 1)}
    yield (
        "numbers, 268435456 at most",
        [("Pad", ["X", "p"], "a", {}), *flat],
        fc | {"p": np.array([0, 0, 0, 0, 0, 0, 0, 2**40])},
    )
    yield "268435456 at most", conv(dilations=[2**20, 2**20]), w
    pool = lambda **more: [("AveragePool", ["X"], "a", {"kernel_shape": [2, 2]} | more), *flat]  # noqa: E731
    yield "ceil_mode", pool(ceil_mode=1), fc
    yield "count_include_pad", pool(pads=[1, 1, 0, 0]), fc
    yield "268435456 at most", pool(kernel_shape=[2**20, 2**20]), fc
    yield "does not fit", [("Squeeze", ["X", "far"], "a", {}), *flat], fc | {"far": np.array([2**62])}
    for message, axes in (("takes 40 numbers", [1, 2]), ("rows and columns", [1]), ("rows and columns", None)):
        yield message, [("ReduceMean", ["X"], "a", {"axes": axes} if axes else {}), *flat], fc
    yield "its output, of shape (10, 4), is an image", [relu, ("Flatten", ["a"], "Y", {"axis": 3})], {}
    yield "is an image", [relu, ("Flatten", ["a"], "Y", {})], {}
    yield "is an image", [("Relu", ["X"], "Y", {})], {}
    yield "does not depend", [("Identity", ["fc"], "Y", {})], fc
    yield "not finite", [("Sub", ["X", "c"], "a", {}), *flat], fc | {"c": np.float32(np.nan)}
    yield "not float32", [relu, *flat], {"fc": np.zeros((40, 3))}, {"kind": "DOUBLE"}
    yield "has the shape [0, 2, 5, 0]", [relu, *flat], fc, {"shape": ("N", 2, 5, "W")}
    yield "has the shape [1, 1, 2, 5, 4]", [relu, *flat], fc, {"shape": (1, 1, 2, 5, 4)}
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
    images = rng.random((3, *model.input_shape), np.float32)
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
        "Flatten 'odd one': this operator cannot": foreign_domain,
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


@given(st.sampled_from(list(EXPORTERS)), seeds, st.integers(1, 3))
def test_a_damaged_file_of_an_exporter_is_an_answer_or_one_line(exporter, seed, changes):
    rng = np.random.default_rng(seed)
    nodes, constants, shape = EXPORTERS[exporter](rng)
    with TemporaryDirectory() as folder:
        path = write_graph(Path(folder) / "theirs.onnx", nodes, constants, shape, (1, "K"))
        content = bytearray(path.read_bytes())
        for at in rng.integers(0, len(content), changes):
            content[at] = rng.integers(0, 256)
        path.write_bytes(content)
        try:
            import_onnx(path)
        except UserError as error:
            assert "\n" not in str(error)
