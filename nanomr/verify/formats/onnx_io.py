"""Networks as ONNX files, for other verifiers and from them. Needs the extra ``nanomr[onnx]``.

Only what every verifier reads is written: Conv (group 1), Relu, Flatten, Gemm, opset 12. The normalisation is a 1x1
Conv of its own: Marabou reads neither Div nor grouped convolutions, nnenum no Div; and folded into the first
convolution it would be wrong at the border, where that one pads its input, the *normalised* image, with zeros.
"""

import copy
from math import prod
from pathlib import Path

import numpy as np

from ...checkpoint import write_atomic
from ...errors import UserError
from ...layers import BatchNorm2d, Conv2d, Flatten, Layer, Linear, Normalize, ReLU, Sequential
from ...models import Model

OPSET, IR_VERSION = 12, 7  # of 2020: old enough for the tools of the first competitions


def _onnx():
    try:
        import onnx
    except ImportError:
        raise UserError("ONNX files need the package onnx: pip install 'nanomr[onnx]'") from None
    return onnx


# --- export -----------------------------------------------------------------------------------------------------------


def export_onnx(model: Model, path) -> None:
    """Write ``model``, in evaluation mode, as ONNX: "X" (N, C, H, W) float32 in [0, 1] to "Y" (N, K), the logits.

    Batch norm is folded into the convolution before it, in float64, then rounded; so is 1 / std, as in our float32
    kernel. All other weights are written as they are. Raises UserError for a layer that has no place in such a file,
    a model that is not float32, a file that cannot be written, and when onnx is not installed.
    """
    onnx = _onnx()
    if model.dtype != np.float32:
        raise UserError(f"an ONNX file holds float32 weights, the model is {model.dtype}: convert it first")
    model = copy.deepcopy(model).to("cpu")
    steps, classes = _steps(model)
    nodes, tensors, value = [], [], "X"
    for i, (op, name, arrays, attributes) in enumerate(steps):
        names = [f"{name}.{part}" for part in ("weight", "bias")[: len(arrays)]]
        tensors += [onnx.numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        output = "Y" if i == len(steps) - 1 else f"{name}.output"
        nodes.append(onnx.helper.make_node(op, [value, *names], [output], name, **attributes))
        value = output
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


def _steps(model):
    """[(ONNX operator, name, [weight, bias] in ONNX's layout, attributes)], and the number of logits."""
    steps: list[tuple[str, str, list, dict]] = []
    x = np.zeros((1, *model.input_shape), np.float32)  # goes along to tell the shapes
    image = None  # (H, W, C) between a Flatten and the Linear that has to take ONNX's order of the pixels
    for name, layer in _leaves(model):
        if isinstance(layer, Normalize):
            mean, std = (np.broadcast_to(layer.buffers[k], x.shape[-1]) for k in ("mean", "std"))
            if mean.any() or (std != 1).any():
                scale = 1 / std
                weight = np.diag(scale)[:, :, None, None]
                steps.append(("Conv", name, [weight, -mean * scale], _conv_attributes(1, 1, (0, 0, 0, 0))))
        elif isinstance(layer, Conv2d):
            weight = layer.to_torch("weight", layer.params["weight"])
            bias = layer.params.get("bias", np.zeros(len(weight), np.float32))
            attributes = _conv_attributes(weight.shape[-1], layer.stride, layer.padding)
            steps.append(("Conv", name, [weight, bias], attributes))
        elif isinstance(layer, BatchNorm2d) and steps and steps[-1][0] == "Conv":
            op, before, arrays, attributes = steps[-1]
            steps[-1] = op, before, _folded(layer, *arrays), attributes
        elif isinstance(layer, ReLU):
            steps.append(("Relu", name, [], {}))
        elif isinstance(layer, Flatten):
            if x.ndim > 2:
                image = x.shape[1:]
                steps.append(("Flatten", name, [], {"axis": 1}))
        elif isinstance(layer, Linear) and x.ndim == 2:
            weight = layer.params["weight"]
            h, w, c = image or (1, 1, len(weight))
            weight = weight.reshape(h, w, c, -1).transpose(3, 2, 0, 1).reshape(-1, len(weight))
            bias = layer.params.get("bias", np.zeros(len(weight), np.float32))
            steps.append(("Gemm", name, [weight, bias], {"transB": 1}))
            image = None
        else:
            where = {BatchNorm2d: " without a convolution before it", Linear: " without a Flatten before it"}
            raise UserError(f"cannot export the layer {name!r}: {type(layer).__name__}{where.get(type(layer), '')}")
        x = layer.forward(x)[0]
    if x.ndim != 2 or (image and _order_matters(image)):
        raise UserError("cannot export the network: it does not end in logits, the output of a Linear")
    return [(op, name, [np.ascontiguousarray(a) for a in arrays], k) for op, name, arrays, k in steps], x.shape[1]


def _leaves(layer, prefix=""):
    """(dotted name, layer) of what a Sequential applies one after another."""
    for name, child in layer.children.items():
        path = f"{prefix}{name}"
        if isinstance(child, Sequential):
            yield from _leaves(child, f"{path}.")
        else:
            yield path, child


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


# --- import -----------------------------------------------------------------------------------------------------------

# The attributes that are understood. Any other one, say of an older operator set, is refused.
ATTRIBUTES = {
    "Constant": {"value", "value_float", "value_floats", "value_int", "value_ints"},
    "Identity": set(),
    "Dropout": {"ratio", "seed"},
    "Conv": {"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"},
    "Gemm": {"alpha", "beta", "transA", "transB"},
    "MatMul": set(),
    "Add": set(),
    "Sub": set(),
    "Div": set(),
    "Relu": set(),
    "Flatten": {"axis"},
    "Reshape": {"allowzero"},
}


def import_onnx(path) -> Model:
    """The float32 network in an ONNX file: exactly its function in real arithmetic, on images (N, H, W, C).

    A chain of Conv (group 1, dilation 1, square, explicit padding), Gemm or MatMul, Add of a bias, Sub and Div of
    constants per channel (normalisation), Relu, Flatten or Reshape to (N, D); Identity and Dropout do nothing. An
    input that is no image, (N, D) or (N, A, B), becomes images of shape (1, 1, D). The network is called "onnx".
    Raises UserError for anything else, by name, for a file that cannot be read, and when onnx is not installed.
    """
    onnx = _onnx()
    try:
        proto = onnx.load_model_from_string(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # protobuf's own, which has moved between its versions
        raise UserError(f"{path} is damaged, or no ONNX file") from None
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise UserError(f"{path} is no valid ONNX file: {str(error).strip().splitlines()[0]}") from None
    try:
        return _Import(onnx, proto).model
    except _Refused as refused:
        raise UserError(f"cannot import {path}: {refused}") from None


class _Refused(Exception):
    """Something in the file that :func:`import_onnx` does not know."""


class _Import:
    """One walk along the nodes. ``shape`` is that of the value ``current`` in ONNX's order, without the batch."""

    def __init__(self, onnx, proto):
        self.onnx, graph = onnx, proto.graph
        if not any(o.domain in ("", "ai.onnx") and o.version >= 7 for o in proto.opset_import):
            raise _Refused("it needs operator set 7 or later")
        self.constants = {t.name: self._array(t) for t in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise _Refused(f"it has {len(inputs)} inputs and {len(graph.output)} outputs, not one of each")
        self.current, (self.batch, *shape) = inputs[0].name, self._input_shape(inputs[0])
        self.shape = tuple(shape)
        self.layers: dict[str, Layer] = {}
        self.state: dict[str, np.ndarray] = {}  # weights in PyTorch's layout, which is ONNX's
        self.image = None  # (H, W, C) of our value between their Flatten and our own, before the first Linear
        self.unbiased = None  # the layer that the node before made, if that had no bias
        input_shape = self._nhwc()
        if len(self.shape) == 1:
            self.image = input_shape
        for node in graph.node:
            self._read(node)
        if self.current != graph.output[0].name:
            raise _Refused(f"its output {graph.output[0].name!r} is not what its last node computes")
        if len(self.shape) != 1 or (self.image and _order_matters(self.image)):
            raise _Refused("its output is an image, not logits (N, K)")
        if self.image:
            self._put("flatten", Flatten())
        self.model = Model(self.layers, "onnx", input_shape)
        self.model.load_state_dict(self.model.state_dict() | self.state)

    def _input_shape(self, value):
        tensor = value.type.tensor_type
        if tensor.elem_type != self.onnx.TensorProto.FLOAT:
            raise _Refused(f"its input {value.name!r} is not float32")
        shape = [d.dim_value for d in tensor.shape.dim]
        if len(shape) not in (2, 3, 4) or min(shape[1:]) < 1:
            raise _Refused(f"its input has the shape {shape}, not a batch of images (N, C, H, W)")
        return shape

    def _array(self, tensor):
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raise _Refused("its weights are in another file: save it as one file")
        try:
            return self.onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # whatever NumPy says of bytes that do not fit the shape
            raise _Refused(f"the tensor {tensor.name!r} is damaged: {error}") from None

    def _nhwc(self):
        """The current value's shape in our network."""
        c, h, w = self.shape if len(self.shape) == 3 else (prod(self.shape), 1, 1)
        return h, w, c

    def _read(self, node):
        self.node, op = node, node.op_type
        if op not in ATTRIBUTES or node.domain not in ("", "ai.onnx"):
            self._refuse(f"only {', '.join(ATTRIBUTES)} can be imported")
        self.attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if unknown := sorted(self.attributes.keys() - ATTRIBUTES[op]):
            self._refuse(f"its attribute {unknown[0]!r} is not known")
        if op == "Constant":
            (value,) = self.attributes.values()
            tensor = isinstance(value, self.onnx.TensorProto)
            self.constants[node.output[0]] = self._array(value) if tensor else np.asarray(value)
            return
        if op == "Identity" and node.input[0] in self.constants:
            self.constants[node.output[0]] = self.constants[node.input[0]]
            return
        if op == "Add" and node.input[0] in self.constants:
            node.input.reverse()
        if node.input[0] != self.current:
            self._refuse(f"it reads {node.input[0]!r}, not what the node before it computes: only chains are imported")
        unbiased, self.unbiased = self.unbiased, None
        if op == "Add":
            self._add(unbiased)
        else:
            getattr(self, f"_{op.lower()}")()
        self.current = node.output[0]

    def _refuse(self, why):
        name = f" {self.node.name!r}" if self.node.name else ""
        raise _Refused(f"{self.node.op_type}{name}: {why}")

    def _constant(self, i):
        """The node's i-th input, or None when it is left out."""
        name = self.node.input[i] if i < len(self.node.input) else ""
        if name and name not in self.constants:
            self._refuse(f"its input {name!r} is not a constant")
        return self.constants[name] if name else None

    def _weights(self, i, ndim=None):
        value = self._constant(i)
        if value is None or value.dtype != np.float32 or not np.isfinite(value).all():
            self._refuse("its weights are not finite float32 numbers")
        if ndim and value.ndim != ndim:
            self._refuse(f"its weights have {value.ndim} axes, not {ndim}")
        return value

    def _per_channel(self):
        """The second input, one number a channel. Raises where it differs from pixel to pixel."""
        try:
            value = np.broadcast_to(self._weights(1), (1, *self.shape))[0]
        except ValueError:
            self._refuse("its constant has another shape than what it meets")
        value = value.reshape(self._nhwc()[2], -1)
        if (value != value[:, :1]).any():
            self._refuse("its constant differs from pixel to pixel: only one number per channel can be imported")
        return value[:, 0].copy()

    def _put(self, kind, layer, **state):
        name = f"{kind}{1 + sum(type(other) is type(layer) for other in self.layers.values())}"
        self.layers[name] = layer
        self.state |= {f"{name}.{key}": value for key, value in state.items()}
        return name

    def _identity(self):
        pass

    def _dropout(self):
        training = self._constant(2)
        if training is not None and training.any():
            self._refuse("it is in training mode")

    def _relu(self):
        self._put("relu", ReLU())

    def _shift_or_scale(self):
        if self.image not in (None, self._nhwc()) or any(isinstance(x, Linear) for x in self.layers.values()):
            self._refuse("it can be imported only where images are, before the first Flatten")
        return self._per_channel()

    def _sub(self):
        mean = self._shift_or_scale()
        self._put("normalize", Normalize(mean, np.ones_like(mean)))

    def _div(self):
        std = self._shift_or_scale()
        if (std == 0).any():
            self._refuse("it divides by zero")
        last = next(reversed(self.layers.values()), None)
        if isinstance(last, Normalize) and (last.buffers["std"] == 1).all():
            last.buffers["std"] = std  # the Sub just before
        else:
            self._put("normalize", Normalize(np.zeros_like(std), std))

    def _add(self, unbiased):
        if unbiased is None:
            self._refuse("only a bias can be added, right after a Conv, Gemm or MatMul that has none")
        self.state[f"{unbiased}.bias"] = self._per_channel()

    def _conv(self):
        weight, get = self._weights(1, ndim=4), self.attributes.get
        out, channels, kernel, width = weight.shape
        strides, pads, auto = get("strides", [1, 1]), get("pads", [0, 0, 0, 0]), get("auto_pad", b"NOTSET")
        if get("group", 1) != 1 or set(get("dilations", [1])) != {1}:
            self._refuse("groups and dilations cannot be imported")
        if auto not in (b"NOTSET", b"VALID") or (auto == b"VALID" and any(pads)):
            self._refuse("auto_pad cannot be imported: write the padding out")
        if not (kernel == width and get("kernel_shape", [kernel, kernel]) == [kernel, kernel]):
            self._refuse("only square kernels can be imported")
        if not (len(strides) == 2 and strides[0] == strides[1] > 0 and len(pads) == 4 and min(pads) >= 0):
            self._refuse("only equal strides, and padding of at least 0, can be imported")
        if len(self.shape) != 3 or self.shape[0] != channels:
            self._refuse(f"it takes images of {channels} channels, what it gets has the shape {self.shape}")
        top, left, bottom, right = pads
        size = [n + p - kernel for n, p in zip(self.shape[1:], (top + bottom, left + right), strict=True)]
        if min(size) < 0:
            self._refuse("its kernel is larger than its padded image")
        self._affine("conv", Conv2d(channels, out, kernel, strides[0], (top, bottom, left, right)), weight, out)
        self.shape = (out, *(n // strides[0] + 1 for n in size))

    def _gemm(self):
        get = self.attributes.get
        if get("transA", 0) or get("alpha", 1.0) != 1 or get("beta", 1.0) != 1:
            self._refuse("only transA = 0, alpha = beta = 1 can be imported")
        weight = self._weights(1, ndim=2)
        self._linear(weight if get("transB", 0) else weight.T)

    def _matmul(self):
        self._linear(self._weights(1, ndim=2).T)

    def _linear(self, weight):
        out, inputs = weight.shape
        if self.shape != (inputs,):
            self._refuse(f"it takes {inputs} numbers, what it gets has the shape {self.shape}")
        if self.image:
            self._put("flatten", Flatten())
        self._affine("fc", Linear(inputs, out, image=self.image), weight, out)
        self.shape, self.image = (out,), None

    def _affine(self, kind, layer, weight, out):
        bias = self._weights(2) if len(self.node.input) > 2 and self.node.input[2] else None
        try:
            value = np.broadcast_to(np.float32(0) if bias is None else bias, (1, out))[0]
        except ValueError:
            self._refuse(f"its bias has the shape {bias.shape}, it has {out} outputs")
        name = self._put(kind, layer, weight=weight, bias=value)
        self.unbiased = name if bias is None else None

    def _flatten(self):
        if self.attributes.get("axis", 1) not in (1, -len(self.shape)):
            self._refuse("only axis = 1 can be imported")
        self._lay_flat()

    def _reshape(self):
        target, size = self._constant(1), prod(self.shape)
        if target is None or target.shape != (2,) or target[0] not in (-1, 0, 1, self.batch):
            self._refuse("only a reshape to (N, everything else) can be imported")
        if target[1] not in (-1, size):
            self._refuse(f"it makes rows of {target[1]} numbers, an image has {size}")
        self._lay_flat()

    def _lay_flat(self):
        if len(self.shape) > 1:
            self.image = self._nhwc()
            self.shape = (prod(self.shape),)
