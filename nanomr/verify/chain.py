"""A network as the verifier sees it: z_1 = A_1 x + b_1, z_{k+1} = A_{k+1} relu(z_k) + b_{k+1}, the last z the logits.

The maps A_k and their transposes are the layers' own ``apply`` and ``transpose``: the backward pass that trains the
network carries the verifier's linear bounds.
"""

import copy

import numpy as np

from ..errors import UserError
from ..layers import Affine, AveragePool2d, BatchNorm2d, Conv2d, Flatten, Linear, Normalize, ReLU, Sequential
from ..models import Model

KNOWN = (AveragePool2d, Conv2d, Flatten, Linear, Normalize)  # what ``bounds`` has rules for


class Stage:
    """One affine map z = A a + b between two ReLUs: one or several layers."""

    def __init__(self, layers: list[Affine], in_shape: tuple, dtype):
        self.layers, self.in_shape = layers, tuple(in_shape)
        z = np.zeros((1, *in_shape), dtype)
        self.inputs = []  # an input of each layer, (1, ...): ``transpose`` reads shapes off them
        for layer in layers:
            self.inputs.append(z)
            z = layer.apply(z)
        self.bias, self.out_shape = z[0], z.shape[1:]

    def apply(self, a):
        """A a + b, for a (N, *in_shape)."""
        for layer in self.layers:
            a = layer.apply(a)
        return a

    def transpose(self, dz):
        """A^T dz, for dz (N, *out_shape)."""
        for layer, x in zip(reversed(self.layers), reversed(self.inputs), strict=True):
            dz = layer.transpose(dz, np.broadcast_to(x, (len(dz), *x.shape[1:])))
        return dz


class Chain:
    """``model`` as a list of :class:`Stage`, with a ReLU between each two; a copy, in ``dtype``.

    Batch norms, with their running statistics, are folded into the convolution before them, or are a 1x1 convolution.
    Raises UserError, naming the layer, for a network that is not such a chain, or whose weights are not finite.
    """

    @np.errstate(all="ignore")  # numbers that are not finite are refused below
    def __init__(self, model: Model, dtype=np.float64):
        self.dtype = np.dtype(dtype)
        self.input_shape = model.input_shape
        # Does the float32 network compute the sums of these layers? A batch norm rounds in ways of its own, and a 3 x 3
        # window of stride 1 may go by Winograd's algorithm (here, ops/cpu/winograd.py; in other libraries).
        self.sums = True
        groups: list[list[Affine]] = [[]]
        for name, layer in _flat(copy.deepcopy(model).astype(np.float64)):
            if isinstance(layer, ReLU):
                groups.append([])
            elif isinstance(layer, BatchNorm2d):
                fold(groups[-1], layer)
                self.sums = False
            elif isinstance(layer, KNOWN):
                groups[-1].append(layer)
                if isinstance(layer, Conv2d) and layer.params["weight"].shape[:2] == (3, 3) and layer.stride == 1:
                    self.sums = False
            else:
                raise UserError(
                    f"cannot verify {name!r} ({type(layer).__name__}): only chains of convolutions, linear layers, "
                    "batch norms, average pooling and ReLUs"
                )
        self.stages: list[Stage] = []
        shape = self.input_shape
        for layers in groups:
            stage = finite_stage(layers, shape, self.dtype)
            self.stages.append(stage)
            shape = stage.out_shape
        self.classes = int(np.prod(shape))

    @property
    def relu_shapes(self) -> list[tuple]:
        """The shape of each ReLU layer's input, without the batch."""
        return [stage.out_shape for stage in self.stages[:-1]]

    def forward(self, x):
        """(logits (N, K), [the input of each ReLU layer]) of images (N, H, W, C)."""
        x, inputs = np.asarray(x, self.dtype), []
        for k, stage in enumerate(self.stages):
            if k:
                inputs.append(x)
                x = np.maximum(x, 0)
            x = stage.apply(x)
        return x, inputs

    def input_gradient(self, rows, inputs):
        """The gradient of sum(rows * logits), rows (N, K), by the images; ``inputs`` as :meth:`forward` gave them."""
        rows = np.asarray(rows, self.dtype)
        for stage, z in zip(reversed(self.stages[1:]), reversed(inputs), strict=True):
            rows = stage.transpose(rows) * (z > 0)
        return self.stages[0].transpose(rows)


def _flat(layer: Sequential):
    """(name, layer) of everything that a chain of Sequentials holds."""
    for name, child in layer.children.items():
        if isinstance(child, Sequential):
            for below, grandchild in _flat(child):
                yield f"{name}.{below}", grandchild
        else:
            yield name, child


def fold(layers: list[Affine], norm: BatchNorm2d):
    """Put ``norm``, in evaluation mode, into the last of a stage's layers, or behind them as a 1x1 convolution."""
    if not (layers and isinstance(layers[-1], Conv2d | Linear)):
        layers.append(Conv2d(norm.channels, norm.channels, 1))
        layers[-1].params = {"weight": np.eye(norm.channels)[None, None]}
    params, scale = layers[-1].params, norm.params["weight"] / np.sqrt(norm.buffers["running_var"] + norm.eps)
    params["bias"] = (params.get("bias", 0.0) - norm.buffers["running_mean"]) * scale + norm.params["bias"]
    params["weight"] = params["weight"] * scale


def finite_stage(layers: list[Affine], shape: tuple, dtype) -> Stage:
    """The stage of these layers, which become ``dtype``. Raises UserError unless all numbers are finite."""
    stores = [store for layer in layers for store in (layer.params, layer.buffers)]
    for store in stores:
        store.update({name: np.ascontiguousarray(value, dtype) for name, value in store.items()})
    stage = Stage(layers, shape, dtype)
    if not all(np.isfinite(value).all() for store in stores for value in (*store.values(), stage.bias)):
        raise UserError("the network's weights are not all finite numbers: take another checkpoint")
    return stage
