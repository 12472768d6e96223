"""Networks from ONNX files: chains, and sums of two branches, of what exporters write around products and ReLUs.

Exporters of PyTorch, TensorFlow and Keras differ in the nodes that only move numbers (Transpose, Reshape, Flatten,
Squeeze, and the shape arithmetic before them). None of them is matched against a pattern: every value carries the
array ``order``, of its ONNX shape, that says which of *our* value's numbers stands where, and such a node is what NumPy
does to that array. A layer then looks whether the order is what it can take. Needs the extra ``nanomr[onnx]``.
"""

import gzip
import zlib
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ...layers import (
    Affine,
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
from ...models import Model

WIDEST = 4096  # numbers that may have a factor each: such a product is a square matrix of ours
LARGEST = 2**28  # numbers in what is computed of constants alone

# The attributes that are understood. Any other one, say of an older operator set, is refused.
ATTRIBUTES = {
    "Add": set(),
    "AveragePool": {"auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides"},
    "BatchNormalization": {"epsilon", "momentum", "spatial", "training_mode"},
    "Cast": {"saturate", "to"},
    "Clip": {"max", "min"},
    "Concat": {"axis"},
    "Constant": {"value", "value_float", "value_floats", "value_int", "value_ints"},
    "ConstantOfShape": {"value"},
    "Conv": {"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"},
    "Div": set(),
    "Dropout": {"ratio", "seed"},
    "Flatten": {"axis"},
    "Gather": {"axis"},
    "Gemm": {"alpha", "beta", "transA", "transB"},
    "GlobalAveragePool": set(),
    "Identity": set(),
    "MatMul": set(),
    "Mul": set(),
    "Neg": set(),
    "Pad": {"mode", "pads", "value"},
    "Reciprocal": set(),
    "ReduceMean": {"axes", "keepdims", "noop_with_empty_axes"},
    "ReduceProd": {"axes", "keepdims", "noop_with_empty_axes"},
    "Relu": set(),
    "Reshape": {"allowzero"},
    "Shape": {"end", "start"},
    "Slice": {"axes", "ends", "starts"},
    "Sqrt": set(),
    "Squeeze": {"axes"},
    "Sub": set(),
    "Transpose": {"perm"},
    "Unsqueeze": {"axes"},
}


def onnx_package():
    """The package onnx. Raises UserError where it is not installed."""
    try:
        import onnx
        import onnx.reference
    except ImportError:
        raise UserError("ONNX files need the package onnx: pip install 'nanomr[onnx]'") from None
    return onnx


class Imported(NamedTuple):
    """A network, and ``order`` (H W C,): the file's i-th input number is number order[i] of the image, flattened."""

    model: Model
    order: np.ndarray


def import_onnx(path) -> Model:
    """The network of :func:`read_onnx`, without the order of the file's inputs."""
    return read_onnx(path).model


def read_onnx(path) -> Imported:
    """The float32 network in an ONNX file (or a gzipped one, ``.gz``), on images (N, H, W, C), in real arithmetic.

    Layers: Conv (with equal strides), Gemm, MatMul with a matrix on either side, AveragePool, GlobalAveragePool or
    ReduceMean over all pixels, BatchNormalization, Relu or Clip from 0 on, Add, Sub, Mul and Div of constants, Pad
    before a Conv, and Add of two branches (a PreActBlock of ours where it is one, else a Residual). Transpose, Reshape,
    Flatten, Squeeze, Unsqueeze, Identity, Dropout, Cast to float32 and whatever depends on constants and shapes alone
    are worked out. Weights stay as they are in the file, and the network is the file's in real arithmetic; only means
    and batch norms that are no layer of ours, and quotients beside images, get factors that are rounded to float32.

    An input that is no image, (N, D) or (D,), becomes images of shape (1, 1, D), unless a convolution sees it as an
    image. The network is called "onnx". Raises UserError for anything else, by the node's type and name, for a file
    that cannot be read, and when onnx is not installed.
    """
    onnx = onnx_package()
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        proto = onnx.load_model_from_string(data)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path} is damaged: it cannot be decompressed") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # protobuf's own, which has moved between its versions
        raise UserError(f"{path} is damaged, or no ONNX file") from None
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise UserError(f"{path} is no valid ONNX file: {str(error).strip().splitlines()[0]}") from None
    try:
        return _Import(onnx, proto, _layout(onnx, proto)).imported
    except _Refused as refused:
        raise UserError(f"cannot import {path}: {refused}") from None


class _Refused(Exception):
    """Something in the file that :func:`read_onnx` does not know."""


class _Layout(Exception):
    """The first layer was found, and with it where the input's channels, rows and columns are: (1, C, H, W)."""


def _layout(onnx, proto):
    """The numbers of the file's input, as its first layer of images sees them, (1, C, H, W)."""
    try:
        _Import(onnx, proto)
    except _Layout as found:
        return found.args[0]


class _Step:
    """A value of ours, of ``shape`` (H, W, C) or (D,): what ``layer`` makes of the step ``before``, or the sum of two
    ``branches`` that part at ``before``. ``unbiased``: a Conv2d or Linear, to which a bias may still come."""

    def __init__(self, shape, before=None, layer=None, branches=(), unbiased=False):
        self.shape, self.before, self.layer, self.branches = tuple(shape), before, layer, branches
        self.unbiased = unbiased

    def ancestry(self):
        """Itself, and all steps that it goes through; beside them there are branches only."""
        step = self
        while step:
            yield step
            step = step.before


class _Value(NamedTuple):
    """An ONNX value: ``order``, of its shape (one image), numbers the entries of ``step``'s value; -1 is a zero."""

    step: _Step
    order: np.ndarray


class _Import:
    """One walk along the nodes that the output needs.

    ``layout`` as :func:`_layout` finds it; without one the walk is that search, and ends at the first layer.
    """

    def __init__(self, onnx, proto, layout=None):
        self.onnx, graph = onnx, proto.graph
        self.opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
        if self.opset < 7:
            raise _Refused("it needs operator set 7 or later")
        self.constants = {t.name: self._array(t) for t in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise _Refused(f"it has {len(inputs)} inputs and {len(graph.output)} outputs, not one of each")
        order, self.searching = self._input(inputs[0]), layout is None
        if self.searching:
            self.start = _Step((order.size,))
            c = order.shape[-1]  # a network without layers of images: this only names the axes
            last = order.ndim == 4 and c in (1, 3) and order.shape[1] not in (1, 3)
            self.layout = order.transpose(0, 3, 1, 2) if last else order if order.ndim == 4 else None
            self.layout = order.reshape(1, -1, 1, 1) if self.layout is None else self.layout
        else:
            ours = layout.transpose(0, 2, 3, 1)
            self.start = _Step(ours.shape[1:])
            order = np.argsort(ours.ravel()).reshape(order.shape)
        self.values = {inputs[0].name: _Value(self.start, order)}
        for node in self._needed(graph):
            self._read(node)
        if self.searching:
            raise _Layout(self.layout)
        self.imported = Imported(self._model(graph.output[0].name), order.ravel())

    def _input(self, value):
        """The order of the input, whose first axis is the batch unless it has one axis only."""
        tensor = value.type.tensor_type
        if tensor.elem_type != self.onnx.TensorProto.FLOAT:
            raise _Refused(f"its input {value.name!r} is not float32")
        shape = [d.dim_value for d in tensor.shape.dim]
        column = len(shape) == 2 and shape[1] == 1 < shape[0]  # W x, with x (D, 1)
        self.batch = None if len(shape) < 2 or column else shape[0]
        sizes = shape if self.batch is None else [1, *shape[1:]]
        if not 1 <= len(sizes) <= 4 or min(sizes) < 1 or prod(sizes) > LARGEST:
            raise _Refused(f"its input has the shape {shape}, not a batch of images (N, C, H, W)")
        return np.arange(prod(sizes)).reshape(sizes)

    def _array(self, tensor):
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raise _Refused("its weights are in another file: save it as one file")
        try:
            return self.onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # whatever NumPy says of bytes that do not fit the shape
            raise _Refused(f"the tensor {tensor.name!r} is damaged: {error}") from None

    def _needed(self, graph):
        """The nodes that the output depends on, in order."""
        nodes, names = [], {graph.output[0].name}
        for node in reversed(graph.node):
            if names & {*node.output} - {""}:
                nodes.append(node)
                names |= {*node.input}
        return nodes[::-1]

    # --- a node -------------------------------------------------------------------------------------------------------

    def _read(self, node):
        self.node, op = node, node.op_type
        if op not in ATTRIBUTES or node.domain not in ("", "ai.onnx"):
            self._refuse("this operator cannot be imported")
        self.attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if unknown := sorted(self.attributes.keys() - ATTRIBUTES[op]):
            self._refuse(f"its attribute {unknown[0]!r} is not known")
        names = [name for name in node.input if name]
        if missing := [name for name in names if name not in self.constants and name not in self.values]:
            self._refuse(f"it reads {missing[0]!r}, which no node before it computes")
        if all(name in self.constants for name in names):
            self._fold(names)
        elif op == "Shape":
            start, end = self.attributes.get("start", 0), self.attributes.get("end")
            self.constants[node.output[0]] = np.array(self._value().order.shape[start:end], np.int64)
        elif not hasattr(self, f"_{op.lower()}"):
            self._refuse("it can be imported only of constants and shapes")
        else:
            try:
                self.values[node.output[0]] = getattr(self, f"_{op.lower()}")()
            except (ArithmeticError, IndexError, KeyError, MemoryError, TypeError, ValueError) as error:
                self._refuse(f"it makes no sense here: {(str(error) or repr(error)).splitlines()[0]}")

    def _refuse(self, why):
        name = f" {self.node.name!r}" if self.node.name else ""
        raise _Refused(f"{self.node.op_type}{name}: {why}")

    def _fold(self, names):
        """A node of constants, by the package's own definition of the operator."""
        helper, node, feeds = self.onnx.helper, self.node, {name: self.constants[name] for name in names}
        infos = [helper.make_empty_tensor_value_info(name) for name in (*feeds, node.output[0])]
        graph = helper.make_graph([node], "constant", infos[:-1], infos[-1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            if node.op_type == "ConstantOfShape" and not 0 <= prod(map(int, feeds[names[0]])) <= LARGEST:
                raise ValueError("it is too large")
            with np.errstate(all="ignore"):  # what is not finite is refused where it is used
                (result,) = self.onnx.reference.ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:  # whatever NumPy says of a node that makes no sense
            self._refuse(f"it cannot be computed: {(str(error) or repr(error)).splitlines()[0]}")
        self.constants[node.output[0]] = np.asarray(result)

    def _value(self, i=0) -> _Value:
        name = self.node.input[i]
        if name not in self.values:
            self._refuse(f"it reads {name!r}, a constant, where it must read what a node computes")
        return self.values[name]

    def _constant(self, i):
        """The node's i-th input, or None when it is left out."""
        name = self.node.input[i] if i < len(self.node.input) else ""
        if name and name not in self.constants:
            self._refuse(f"its input {name!r} is not a constant")
        return self.constants[name] if name else None

    def _setting(self, name, i, default=None):
        """What is an attribute in old operator sets and an input in new ones, as a list."""
        value = self.attributes.get(name)
        value = self._constant(i) if value is None else value
        return default if value is None else np.ravel(value).tolist()

    def _weights(self, i, ndim=None):
        value = self._constant(i)
        if value is None or value.dtype != np.float32 or not np.isfinite(value).all():
            self._refuse("its weights are not finite float32 numbers")
        if ndim and value.ndim != ndim:
            self._refuse(f"its weights have {value.ndim} axes, not {ndim}")
        return value

    # --- nodes that move numbers --------------------------------------------------------------------------------------

    def _moved(self, move):
        step, order = self._value()
        try:
            return _Value(step, move(order))
        except (ValueError, IndexError, TypeError) as error:
            self._refuse(f"it does not fit a value of shape {order.shape}: {error}")

    def _identity(self):
        return self._value()

    def _dropout(self):
        training = self._constant(2)
        if training is not None and training.any():
            self._refuse("it is in training mode")
        return self._value()

    def _cast(self):
        if self.attributes["to"] != self.onnx.TensorProto.FLOAT:
            self._refuse("only a cast to float32 can be imported")
        return self._value()

    def _flatten(self):
        axis = self.attributes.get("axis", 1)
        return self._moved(lambda order: order.reshape(prod(order.shape[:axis]), -1))

    def _reshape(self):
        target, order = self._setting("shape", 1, []), self._value().order
        if not self.attributes.get("allowzero", 0):
            target = [order.shape[i] if n == 0 and i < order.ndim else n for i, n in enumerate(target)]
        if target and target[0] == self.batch:  # of the file's batch, one image
            target[0] = 1
        return self._moved(lambda order: order.reshape(target))

    def _transpose(self):
        return self._moved(lambda order: order.transpose(self.attributes.get("perm")))

    def _squeeze(self):
        axes = self._setting("axes", 1)
        return self._moved(lambda order: order.squeeze(None if axes is None else tuple(axes)))

    def _unsqueeze(self):
        axes = self._setting("axes", 1)
        return self._moved(lambda order: np.expand_dims(order, tuple(axes)))

    def _pad(self):
        mode, value = self.attributes.get("mode", b"constant"), self._setting("value", 2, [0])
        pads, axes = self._setting("pads", 1, []), self._constant(3)
        if mode != b"constant" or any(value) or axes is not None or min(pads, default=-1) < 0:
            self._refuse("only padding with zeros, on all axes, can be imported")
        sides = list(zip(pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True))
        self._room(prod(n + sum(side) for n, side in zip(self._value().order.shape, sides, strict=True)))
        return self._moved(lambda order: np.pad(order, sides, constant_values=-1))

    # --- products -----------------------------------------------------------------------------------------------------

    def _image(self, axes=(0, 1, 2, 3)):
        """(step, zeros around it (top, bottom, left, right)) of a value that is an image, (N, C, H, W) in ``axes``."""
        step, order = self._value()
        if order.ndim != 4 or order.shape[axes[0]] != 1:
            self._refuse(f"it takes images (N, C, H, W), what it gets has the shape {order.shape}")
        order = order.transpose(axes)
        if self.searching:
            rows, columns = ((order[0, 0] >= 0).any(axis) for axis in (1, 0))
            raise _Layout(order[:, :, rows][:, :, :, columns])
        if len(step.shape) == 1:
            self._refuse("what it gets was flattened by a product, and no layer of ours makes an image of it again")
        first = np.argwhere(order[0, 0] == 0)
        if len(first) and order.shape[1] == step.shape[2]:
            sides = [(at, n - m - at) for at, n, m in zip(first[0], order.shape[2:], step.shape, strict=False)]
            ours = np.arange(prod(step.shape)).reshape(step.shape).transpose(2, 0, 1)
            if min(map(min, sides)) >= 0 and (order[0] == np.pad(ours, [(0, 0), *sides], constant_values=-1)).all():
                return step, [int(n) for side in sides for n in side]
        self._refuse(f"the {order.shape[1]} channels that it gets are not those of an image {step.shape} (H, W, C)")

    def _conv(self):
        weight, get = self._weights(1, ndim=4), self.attributes.get
        out, channels, *kernel = weight.shape
        group, dilations = get("group", 1), get("dilations", [1, 1])
        if get("kernel_shape", kernel) != kernel or len(dilations) != 2 or min(group, *dilations) < 1 or out % group:
            self._refuse("its weights do not fit its kernel_shape, dilations and group")
        step, around = self._image()
        if step.shape[2] != channels * group:
            self._refuse(f"it takes images of {channels * group} channels, what it gets has {step.shape[2]}")
        rows, columns = ((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
        self._room(out * channels * group * rows * columns)
        dense = np.zeros((group, out // group, group, channels, rows, columns), np.float32)  # gaps, and other groups
        for g in range(group):
            dense[g, :, g, :, :: dilations[0], :: dilations[1]] = np.split(weight, group)[g]
        return self._convolution(dense.reshape(out, -1, rows, columns), step, around, self._bias(2, out))

    def _bias(self, i, out):
        if i >= len(self.node.input) or not self.node.input[i]:
            return None
        try:
            return np.broadcast_to(self._weights(i), (1, out))[0]
        except ValueError:
            self._refuse(f"its bias has the shape {self._constant(i).shape}, it has {out} outputs")

    def _room(self, size):
        if size > LARGEST:
            self._refuse(f"it asks for {size} numbers, {LARGEST} at most can be imported")

    def _stride(self):
        strides = self.attributes.get("strides", [1, 1])
        if not (len(strides) == 2 and strides[0] == strides[1] > 0):
            self._refuse("only equal strides can be imported")
        return strides[0]

    def _sides(self, kernel, step, around):
        """The padding (top, bottom, left, right) that pads or auto_pad ask for."""
        pads, auto = self.attributes.get("pads", [0] * 4), self.attributes.get("auto_pad", b"NOTSET")
        if len(pads) != 4 or min(pads) < 0 or (any(pads) and auto != b"NOTSET"):
            self._refuse("only padding of at least 0, on two axes, can be imported")
        if auto in (b"SAME_UPPER", b"SAME_LOWER"):
            stride, pads = self._stride(), [0] * 4
            for i in (0, 1):
                n = step.shape[i] + sum(around[2 * i : 2 * i + 2])
                total = max((-(-n // stride) - 1) * stride + kernel[i] - n, 0)
                pads[i], pads[i + 2] = sorted((total // 2, total - total // 2), reverse=auto == b"SAME_LOWER")
        elif auto not in (b"NOTSET", b"VALID"):
            self._refuse(f"auto_pad cannot be {auto.decode(errors='replace')!r}")
        return [pads[0], pads[2], pads[1], pads[3]]

    def _convolution(self, weight, step, around, bias=None):
        """weight (out, in, height, width). A kernel that is not square gets rows or columns of zeros at its end, and
        the image as many."""
        (out, channels, *kernel), size = weight.shape, max(weight.shape[2:])
        sides, more = self._sides(kernel, step, around), [size - k for k in kernel]
        padding = [a + b + c for a, b, c in zip(sides, around, (0, more[0], 0, more[1]), strict=True)]
        if min(n + a + b for n, a, b in zip(step.shape, padding[::2], padding[1::2], strict=False)) < size:
            self._refuse("its kernel is larger than its padded image")
        layer = Conv2d(channels, out, size, self._stride(), tuple(padding))
        weight = np.pad(weight, [(0, 0), (0, 0), (0, more[0]), (0, more[1])])
        return self._images(self._product(step, layer, layer.from_torch("weight", weight), bias))

    def _product(self, step, layer, weight, bias) -> _Step:
        layer.params["weight"][...] = weight
        layer.params["bias"][...] = 0 if bias is None else bias
        return self._after(step, layer, unbiased=bias is None)

    def _after(self, step, layer, **options) -> _Step:
        x = np.broadcast_to(np.float32(0), (1, *step.shape))
        shape = layer.output_shape(x) if isinstance(layer, Affine) else x.shape
        return _Step(shape[1:], step, layer, **options)

    def _images(self, step) -> _Value:
        return _Value(step, np.arange(prod(step.shape)).reshape(step.shape).transpose(2, 0, 1)[None])

    def _gemm(self):
        get = self.attributes.get
        if get("alpha", 1.0) != 1 or get("beta", 1.0) != 1:
            self._refuse("only alpha = beta = 1 can be imported")
        a, b = (name in self.values for name in self.node.input[:2])
        if a and b:
            self._refuse("it multiplies two values: only a value by a constant can be imported")
        x, weight = self._value(0 if a else 1).order, self._weights(1 if a else 0, ndim=2)
        if x.ndim != 2:
            self._refuse(f"it takes values of 2 axes, what it gets has the shape {x.shape}")
        x, weight = (x, weight) if a else (x.T, weight.T)  # Y' = B' A'
        flip = [bool(get(name, 0)) for name in ("transA", "transB")]
        x, weight = x.T if flip[not a] else x, weight.T if flip[a] else weight
        y = self._linear(x, weight, self._bias(2, weight.shape[1]) if a else None, self._value(0 if a else 1).step)
        if a:
            return y
        y = _Value(y.step, y.order.T)
        c = self._constant(2)
        return y if c is None else self._elementwise(y, "Add", self._weights(2))

    def _matmul(self):
        a, b = (name in self.values for name in self.node.input)
        if a and b:
            self._refuse("it multiplies two values: only a value by a constant can be imported")
        step, order = self._value(0 if a else 1)
        weight = self._weights(1 if a else 0, ndim=2)
        if a:
            return self._linear(order, weight, None, step)
        if order.ndim == 1:
            return self._linear(order, weight.T, None, step)
        y = self._linear(order.swapaxes(-1, -2), weight.T, None, step)
        return _Value(y.step, y.order.swapaxes(-1, -2))

    def _linear(self, order, weight, bias, step) -> _Value:
        """x weight + bias for one row x, whose numbers are ``order``; weight (in, out)."""
        inputs, out = weight.shape
        if order.shape[-1] != inputs or order.size != inputs:
            self._refuse(f"it takes {inputs} numbers, what it gets has the shape {order.shape}")
        if self.searching:
            raise _Layout(self.layout)
        image, rows, real = None, order.ravel(), order.ravel() >= 0
        if len(step.shape) == 3 and real.all():
            image = step.shape if (rows == self._images(step).order.ravel()).all() else None
        step = self._flat(step)
        ours = np.zeros((step.shape[0], out), np.float32)
        ours[rows[real]] = weight[real]
        step = self._product(step, Linear(*ours.shape, image=image), ours, bias)
        return _Value(step, np.arange(out).reshape(*order.shape[:-1], out))

    def _flat(self, step) -> _Step:
        return step if len(step.shape) == 1 else self._after(step, Flatten())

    # --- means --------------------------------------------------------------------------------------------------------

    def _averagepool(self):
        get = self.attributes.get
        kernel = get("kernel_shape", [])
        if get("ceil_mode", 0) or len(kernel) != 2 or min(kernel) < 1 or set(get("dilations", [1])) != {1}:
            self._refuse("only two axes, without ceil_mode and dilations, can be imported")
        step, around = self._image()
        padded = any(sides := self._sides(kernel, step, around))
        if padded and not get("count_include_pad", 0):
            self._refuse("only padding that counts (count_include_pad = 1) can be imported")
        (h, w, _), tiles = step.shape, {self._stride()} == set(kernel)
        if tiles and not any((*sides, *around)) and h % kernel[0] == w % kernel[0] == 0:
            return self._images(self._after(step, AveragePool2d(kernel[0])))
        return self._mean(step, around, kernel)

    def _mean(self, step, around, kernel):
        self._room(step.shape[2] ** 2 * prod(kernel))
        weight = np.eye(step.shape[2], dtype=np.float32)[:, :, None, None] * np.ones(kernel, np.float32)
        return self._convolution(weight / np.float32(prod(kernel)), step, around)

    def _globalaveragepool(self):
        return self._whole_mean([2, 3], keep=True)

    def _reducemean(self):
        axes = self._setting("axes", 1, [])
        return self._whole_mean(axes, keep=bool(self.attributes.get("keepdims", 1)))

    def _whole_mean(self, axes, keep):
        ndim = self._value().order.ndim
        axes = sorted({axis % ndim for axis in axes})
        rest = [axis for axis in range(ndim) if axis not in axes]
        if len(axes) != 2 or ndim != 4:
            self._refuse("only means over the rows and columns of images can be imported")
        self.attributes = {}  # none of a convolution's
        step, around = self._image((*rest, *axes))
        h, w, _ = step.shape
        if any(around) or h != w:
            y = self._mean(step, around, [h + sum(around[:2]), w + sum(around[2:])])
        else:
            y = self._images(self._after(step, AveragePool2d()))
        order = y.order.reshape(y.order.shape[:2])
        return _Value(y.step, np.expand_dims(order, tuple(axes)) if keep else order)

    # --- a number each ------------------------------------------------------------------------------------------------

    def _relu(self):
        step, order = self._value()
        return _Value(step if self.searching else self._after(step, ReLU()), order)

    def _clip(self):
        low, high = self._setting("min", 1, [-np.inf]), self._setting("max", 2, [np.inf])
        if low != [0] or not high[0] >= np.finfo(np.float32).max:
            self._refuse("only a Clip from 0 to infinity, a ReLU, can be imported")
        return self._relu()

    def _add(self):
        if all(name in self.values for name in self.node.input):
            return self._sum(self._value(0), self._value(1))
        return self._with_constant()

    def _with_constant(self):
        at = 0 if self.node.input[0] in self.values else 1
        if self.node.input[1 - at] in self.values:
            self._refuse("it takes two values: only a value and a constant can be imported")
        return self._elementwise(self._value(at), self.node.op_type + " from" * at, self._weights(1 - at))

    _sub = _mul = _div = _with_constant

    def _elementwise(self, value, op, constant) -> _Value:
        step, order = value
        try:
            shape = np.broadcast_shapes(order.shape, constant.shape)
            order = order.reshape(shape)
        except ValueError:
            self._refuse("its constant has another shape than what it meets")
        if self.searching:
            return _Value(step, order)
        c = self._ours(step, order, constant)
        match op:
            case "Add" | "Add from":
                step = self._scaled(step, shift=c)
            case "Sub":
                step = self._scaled(step, shift=-c)
            case "Sub from":
                step = self._scaled(step, scale=-np.ones_like(c), shift=c)
            case "Mul" | "Mul from":
                step = self._scaled(step, scale=c)
            case "Div" if c.all():
                step = self._scaled(step, divisor=c)
            case _:
                self._refuse("it divides by zero" if op == "Div" else "it divides by what a node computes")
        return _Value(step, order)

    def _neg(self):
        return self._elementwise(self._value(), "Mul", np.float32(-1))

    def _ours(self, step, order, constant):
        """A constant that is broadcast against ``order``, as a value of ours, flattened."""
        if (order < 0).any():
            self._refuse("only a convolution can come after a Pad")
        ours = np.empty(prod(step.shape), np.float32)
        ours[order.ravel()] = np.broadcast_to(constant, order.shape).ravel()
        return ours

    def _channels(self, step, *values):
        """Each value's number per channel; None where ``step`` is no image, or some value differs between pixels."""
        tables = [value.reshape(-1, step.shape[-1]) for value in values]
        return [t[0] for t in tables] if len(step.shape) == 3 and all((t == t[0]).all() for t in tables) else None

    def _scaled(self, step, scale=None, shift=None, divisor=None) -> _Step:
        """scale x + shift, or x / divisor, for arrays of the size of ``step``'s value."""
        if scale is divisor is None and not shift.any():
            return step
        given = [v for v in (scale, shift, divisor) if v is not None]
        channels, last = self._channels(step, *given), step.layer
        if step.unbiased and scale is divisor is None and (channels or isinstance(last, Linear)):
            layer = type(last)(**last.arguments)  # another layer: somebody may read the product itself
            return self._product(step.before, layer, last.params["weight"], channels[0] if channels else shift)
        if not channels:
            step = self._flat(step)
            if (n := step.shape[0]) > WIDEST:
                self._refuse(f"its constant differs from pixel to pixel, and there are more than {WIDEST}")
            diagonal = np.ones(n, np.float32) if scale is None else scale
            diagonal = diagonal if divisor is None else 1 / divisor
            return self._product(step, Linear(n, n), np.diag(diagonal), shift)
        if scale is not None:
            layer = Conv2d(step.shape[2], step.shape[2], 1)
            return self._product(step, layer, np.diag(channels[0]), channels[1] if shift is not None else None)
        (value,), one = channels, np.ones(step.shape[2], np.float32)
        if shift is not None:
            return self._after(step, Normalize(-value, one))
        if isinstance(last, Normalize) and (last.buffers["std"] == 1).all():  # the Sub just before
            return self._after(step.before, Normalize(last.buffers["mean"], value))
        return self._after(step, Normalize(0 * value, value))

    def _batchnormalization(self):
        training = self.attributes.get("training_mode", 0) or len([*filter(None, self.node.output)]) > 1
        if training or self.attributes.get("spatial", 1) != 1:
            self._refuse("it is in training mode, or not spatial")
        step, order = self._value()
        parts = [self._weights(i, ndim=1) for i in (1, 2, 3, 4)]
        eps = float(str(np.float32(self.attributes.get("epsilon", 1e-5))))  # 1e-5, not the float32 number next to it
        if order.ndim < 2 or {len(part) for part in parts} != {order.shape[1]}:
            self._refuse(f"its weights do not fit a value of shape {order.shape}")
        if self.searching:
            return self._value() if order.ndim != 4 else self._image()
        if (parts[3] + eps <= 0).any():
            self._refuse("a variance is not above 0")
        ours = [self._ours(step, order, part.reshape(-1, *[1] * (order.ndim - 2))) for part in parts]
        if channels := self._channels(step, *ours):
            layer = BatchNorm2d(step.shape[2], eps)
            stores = (layer.params, "weight"), (layer.params, "bias"), (layer.buffers, "running_mean")
            for (store, name), value in zip((*stores, (layer.buffers, "running_var")), channels, strict=True):
                store[name][...] = value
            return _Value(self._after(step, layer), order)
        gamma, beta, mean, var = (value.astype(np.float64) for value in ours)
        scale = gamma / np.sqrt(var + eps)
        return _Value(self._scaled(step, *(v.astype(np.float32) for v in (scale, beta - mean * scale))), order)

    # --- sums, and the network ----------------------------------------------------------------------------------------

    def _sum(self, a, b):
        if self.searching:
            raise _Layout(self.layout)
        if a.order.shape != b.order.shape or (a.order != b.order).any():
            self._refuse(f"its terms, of shapes {a.order.shape} and {b.order.shape}, are not in the same order")
        steps = [a.step, b.step]
        if a.step.shape != b.step.shape:
            steps = [self._flat(step) for step in steps]
        theirs = {id(step) for step in steps[1].ancestry()}
        before = next(step for step in steps[0].ancestry() if id(step) in theirs)
        if steps[0] is steps[1]:
            self._refuse("it adds a value to itself")
        return _Value(_Step(steps[0].shape, before, branches=steps), a.order)

    def _model(self, output) -> Model:
        if output not in self.values:
            raise _Refused(f"its output {output!r} does not depend on its input")
        step, order = self.values[output]
        if max(order.shape, default=1) != order.size or (order.ravel() != np.arange(prod(step.shape))).any():
            raise _Refused(f"its output, of shape {order.shape}, is an image, not logits (N, K)")
        return Model(_named(_path(self._flat(step), self.start, set())), "onnx", self.start.shape)


def _path(step: _Step, stop: _Step, seen: set) -> list[Layer]:
    """The layers from one step to another."""
    layers = []
    while step is not stop:
        if id(step) in seen:
            raise _Refused("its branches share a layer: only branches within branches can be imported")
        seen.add(id(step))
        if step.branches:
            layers.append([_path(branch, step.before, seen) for branch in step.branches])
        else:
            layers.append(step.layer)
        step = step.before
    layers, joined = layers[::-1], []
    for layer in layers:
        if isinstance(layer, list):
            body, shortcut = sorted(layer, key=len, reverse=True)
            block, used = _block(joined, body, shortcut)
            joined = joined[: len(joined) - used]
            layer = block or Residual(
                {name: Sequential(_named(way)) for name, way in (("body", body), ("shortcut", shortcut)) if way}
            )
        joined.append(layer)
    return joined


def _alike(one: Layer, other: Layer) -> bool:
    """Do they compute the same with the same weights, and has ``one`` no bias that ``other`` lacks?"""
    if type(one) is not type(other) or getattr(one, "padding", None) != getattr(other, "padding", None):
        return False
    keys = one.arguments.keys() - {"padding", "bias", "momentum", "before_relu"}
    bias = isinstance(one, Conv2d) and one.params["bias"].any()
    return not bias and all(one.arguments[key] == other.arguments[key] for key in keys)


def _block(before: list[Layer], body: list[Layer], shortcut: list[Layer]):
    """(a PreActBlock with these layers, how many of ``before`` it begins with), or (None, 0)."""
    reads_h = len(body) == 4
    chain = [*before[-2:], *body] if reads_h else body
    if [type(layer) for layer in chain] != [BatchNorm2d, ReLU, Conv2d, BatchNorm2d, ReLU, Conv2d]:
        return None, 0
    bn1, _, conv1, bn2, _, conv2 = chain
    block = PreActBlock(bn1.channels, conv1.shapes["weight"][3], conv1.stride, reads_h, reads_h)
    theirs = [bn1, conv1, bn2, conv2, *shortcut]
    ours = [block.children[name] for name in ("bn1", "conv1", "bn2", "conv2")]
    ours += block.children["shortcut"].children.values() if block.projects else []
    if len(theirs) != len(ours) or not all(map(_alike, theirs, ours)):
        return None, 0
    for one, other in zip(theirs, ours, strict=True):
        other.params.update({name: one.params[name] for name in other.params})
        other.buffers.update(one.buffers)
    return block, 2 * reads_h


NAMES = {
    AveragePool2d: "pool", BatchNorm2d: "bn", Conv2d: "conv", Flatten: "flatten", Linear: "fc", Normalize: "normalize",
    PreActBlock: "block", ReLU: "relu", Residual: "residual",
}  # fmt: skip


def _named(layers: list[Layer]) -> dict[str, Layer]:
    named: dict[str, Layer] = {}
    for layer in layers:
        named[f"{NAMES[type(layer)]}{1 + sum(type(other) is type(layer) for other in named.values())}"] = layer
    return named
