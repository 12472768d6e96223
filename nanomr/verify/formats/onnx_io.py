"""Networks as ONNX files, for other verifiers and from them (:mod:`.onnx_import`). Needs the extra ``nanomr[onnx]``.

Of a chain, only what every verifier reads is written: Conv (group 1), Relu, Flatten, Gemm, opset 12. The normalisation
is a 1x1 Conv of its own: Marabou reads neither Div nor grouped convolutions, nnenum no Div; and folded into the first
convolution it would be wrong at the border, where that one pads its input, the *normalised* image, with zeros. Pooling,
sums of branches, and batch norms that no convolution of a chain precedes are AveragePool, Add and BatchNormalization.
"""

import copy

import numpy as np

from ...checkpoint import write_atomic
from ...errors import UserError
from ...layers import (
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    Normalize,
    Normalized,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
)
from ...models import Model
from .onnx_import import Imported, import_onnx, onnx_package, read_onnx

__all__ = ["Imported", "export_onnx", "import_onnx", "read_onnx"]

OPSET, IR_VERSION = 12, 7  # of 2020: old enough for the tools of the first competitions


def export_onnx(model: Model, path) -> None:
    """Write ``model``, in evaluation mode, as ONNX: "X" (N, C, H, W) float32 in [0, 1] to "Y" (N, K), the logits.

    Batch norm is folded into the convolution before it, in float64, then rounded, but not in residual blocks; so is
    1 / std, as in our float32 kernel. All other weights are written as they are. Raises UserError for a layer that has
    no place in such a file, a model that is not float32, a file that cannot be written, and when onnx is not installed.
    """
    onnx = onnx_package()
    if model.dtype != np.float32:
        raise UserError(f"an ONNX file holds float32 weights, the model is {model.dtype}: convert it first")
    model = copy.deepcopy(model).to("cpu")
    steps, classes = _steps(model)
    nodes, tensors = [], []
    for step in steps:
        names = [f"{step.name}.{part}" for part in PARTS[: len(step.arrays)]]
        tensors += [onnx.numpy_helper.from_array(a, n) for a, n in zip(step.arrays, names, strict=True)]
        nodes.append(
            onnx.helper.make_node(step.op, [*step.inputs, *names], [step.output], step.name, **step.attributes)
        )
    nodes[-1].output[0] = "Y"
    h, w, c = model.input_shape
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("X", ["N", c, h, w]), ("Y", ["N", classes]))
    )
    graph = onnx.helper.make_graph(nodes, "nanomr", [x], [y], tensors)
    opset = [onnx.helper.make_opsetid("", OPSET)]
    proto = onnx.helper.make_model(graph, producer_name="nanomr", opset_imports=opset, ir_version=IR_VERSION)
    onnx.checker.check_model(proto, full_check=True)
    write_atomic(path, proto.SerializeToString())


PARTS = ("weight", "bias", "running_mean", "running_var")


class _Node:
    """An ONNX node: the arrays of its ``PARTS``, in ONNX's layout, come behind its ``inputs``."""

    def __init__(self, op, name, inputs, arrays=(), **attributes):
        self.op, self.name, self.inputs, self.arrays, self.attributes = op, name, inputs, arrays, attributes
        self.output = f"{name}.output"


def _steps(model):
    """(the nodes, the number of logits)."""
    x = np.zeros((1, *model.input_shape), np.float32)  # goes along to tell the shapes
    writer = _Writer()
    _, x = writer.sequence(model, "", "X", x)
    if x.ndim != 2 or (writer.image and _order_matters(writer.image)) or not writer.nodes:
        raise UserError("cannot export the network: it does not end in logits, the output of a Linear")
    for node in writer.nodes:
        node.arrays = [np.ascontiguousarray(a, np.float32) for a in node.arrays]
    return writer.nodes, x.shape[1]


class _Writer:
    """Writes layer after layer. Each takes the name of an ONNX value and an example of ours, and gives the next two."""

    def __init__(self):
        self.nodes = []
        self.image = None  # (H, W, C) between a Flatten and the Linear that has to take ONNX's order of the pixels
        self.folds = True  # batch norms into convolutions?

    def put(self, op, name, inputs, arrays=(), **attributes):
        self.nodes.append(_Node(op, name, inputs, arrays, **attributes))
        return self.nodes[-1].output

    def sequence(self, layer, prefix, value, x):
        for name, child in layer.children.items():
            value, x = self.layer(child, f"{prefix}{name}", value, x)
        return value, x

    def layer(self, layer, name, value, x):
        before = self.nodes[-1] if self.nodes else None
        if isinstance(layer, Sequential):
            return self.sequence(layer, f"{name}.", value, x)
        if isinstance(layer, PreActBlock | Residual):
            folds, self.folds = self.folds, False
            values = (
                self.block(layer, name, value, x) if isinstance(layer, PreActBlock) else self.sum(layer, name, value, x)
            )
            self.folds = folds
            return self.put("Add", name, values), layer.forward(x)[0]
        if isinstance(layer, Normalize):
            mean, std = (np.broadcast_to(layer.buffers[k], x.shape[-1]) for k in ("mean", "std"))
            if mean.any() or (std != 1).any():
                scale = 1 / std
                arrays = [np.diag(scale)[:, :, None, None], -mean * scale]
                value = self.put("Conv", name, [value], arrays, **_conv_attributes(1, 1, (0, 0, 0, 0)))
        elif isinstance(layer, Conv2d):
            weight = layer.to_torch("weight", layer.params["weight"])
            bias = layer.params.get("bias", np.zeros(len(weight), np.float32))
            attributes = _conv_attributes(weight.shape[-1], layer.stride, layer.padding)
            value = self.put("Conv", name, [value], [weight, bias], **attributes)
        elif (
            isinstance(layer, BatchNorm2d) and self.folds and before and before.op == "Conv" and before.output == value
        ):
            before.arrays = _folded(layer, *before.arrays)
        elif isinstance(layer, BatchNorm2d):
            arrays = [(layer.params | layer.buffers)[part] for part in PARTS]
            value = self.put("BatchNormalization", name, [value], arrays, epsilon=layer.eps)
        elif isinstance(layer, AveragePool2d):
            window = layer.window or x.shape[1]
            value = self.put("AveragePool", name, [value], kernel_shape=[window] * 2, strides=[window] * 2)
        elif isinstance(layer, ReLU):
            value = self.put("Relu", name, [value])
        elif isinstance(layer, Flatten):
            if x.ndim > 2:
                self.image = x.shape[1:]
                value = self.put("Flatten", name, [value], axis=1)
        elif isinstance(layer, Linear) and x.ndim == 2:
            weight = layer.params["weight"]
            h, w, c = self.image or (1, 1, len(weight))
            weight = weight.reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(-1, len(weight))
            bias = layer.params.get("bias", np.zeros(len(weight), np.float32))
            value = self.put("Gemm", name, [value], [weight, bias], transB=1)
            self.image = None
        else:
            where = " without a Flatten before it" if isinstance(layer, Linear) else ""
            raise UserError(f"cannot export the layer {name!r}: {type(layer).__name__}{where}")
        y = layer.forward(x)[0]
        return value, y.full() if isinstance(y, Normalized) else y

    def block(self, block, name, value, x):
        """The two terms of a PreActBlock."""
        shortcut, inside = (value, x), (value, x)
        for part in ("bn1", "relu1", "conv1", "bn2", "relu2", "conv2"):
            inside = self.layer(block.children[part], f"{name}.{part}", *inside)
            if part == "relu1" and block.shortcut_reads_h:
                shortcut = inside
        if block.projects:
            shortcut = self.layer(block.children["shortcut"], f"{name}.shortcut", *shortcut)
        return [inside[0], shortcut[0]]

    def sum(self, residual, name, value, x):
        """The two terms of a Residual."""
        image, terms = self.image, []
        for part, branch in residual.children.items():
            self.image = image
            terms.append(self.layer(branch, f"{name}.{part}", value, x)[0])
        return [*terms, value][:2]


def _conv_attributes(kernel, stride, padding):
    top, bottom, left, right = padding
    return {
        "kernel_shape": [kernel, kernel],
        "strides": [stride, stride],
        "pads": [top, left, bottom, right],
        "dilations": [1, 1],
        "group": 1,
    }


def _folded(norm: BatchNorm2d, weight, bias):
    """The convolution followed by ``norm`` in evaluation mode; weight (out, in, height, width)."""
    gamma, beta, mean, var = (
        np.asarray(store[name], np.float64)
        for store, names in ((norm.params, ("weight", "bias")), (norm.buffers, ("running_mean", "running_var")))
        for name in names
    )
    scale = gamma / np.sqrt(var + norm.eps)
    arrays = weight * scale[:, None, None, None], (bias - mean) * scale + beta
    return [a.astype(np.float32) for a in arrays]


def _order_matters(image):
    """Do NHWC and NCHW flatten an (H, W, C) image differently?"""
    h, w, c = image
    return h * w > 1 and c > 1
