"""Layers: forward and backward side by side, by hand. The formulas are derived in ``docs/derivations``.

The contract of every layer:

    y, cache = layer.forward(x, train=False, tap=None)
    dx = layer.backward(dy, cache, param_grads=True, input_grad=True)

- The cache is returned, never kept: several forward passes through the same weights may be alive at once.
- Parameter gradients are added to ``layer.grads`` (``+=``). ``param_grads=False`` skips that work, for the same dx.
- ``input_grad=False`` skips dx (returns None): nobody needs the gradient of the training images.
- dtype in = dtype out. Images are NHWC; see ``ops/reference.py`` for the layouts of the weights.
- ``spend``, of ReLU and Sequential in backward: the caller needs dy no more (nor, of a Sequential, the cache), and what
  comes out may lie in their memory. Between its layers a Sequential does so with a Box that one with weights made.
- ``tap`` looks at the input of every ReLU as it goes by: :class:`nanomr.losses.Hamming` is one.
- ``plus``, which Conv2d takes both ways and BatchNorm2d in backward: an array to add to the result, in the same pass.
- What does not fit the layer (x, dy, plus, a weight that was exchanged) is a ValueError before anything is computed;
  so is an empty batch. bfloat16 and float32 may meet, other dtypes may not.
"""

import copy
import functools
import inspect
import math

import numpy as np

from . import rng
from .backend import array_module
from .batches import BehindReLU, Box, BoxBehindReLU, Normalized, NormalizedBox, PairBatch
from .borders import WEIGHTS, check, check_plus, four_sides, whole
from .ops import ops_for
from .ops.reference import conv2d_shape
from .parallel import WHOLE

MOST = 2**27  # numbers in a parameter, half a gigabyte: more is a slip, or a damaged file


class Layer:
    """Base: a layer without parameters. ``params``, ``grads`` and ``buffers`` map names to arrays.

    ``arguments``: those of the constructor, by name and in JSON's types. A checkpoint says by them how the layer is
    made (:func:`nanomr.models.build`), and is held to the types that the constructor names.
    """

    share = WHOLE  # of a training batch: how much of it forward is given, where ranks divide it among themselves
    takes_pairs = False  # can forward be given a PairBatch?
    fan_in = 0  # how many numbers an output is a sum of; 0: no weights that are drawn

    def __new__(cls, *args, **options):
        layer = super().__new__(cls)
        bound = _signature(cls).bind_partial(layer, *args, **options)  # a deep copy is made without any
        bound.apply_defaults()
        layer.arguments = {k: _plain(v) for k, v in list(bound.arguments.items())[1:] if not isinstance(v, dict)}
        return layer

    def __copy__(self):
        other = object.__new__(type(self))  # not by way of __new__: every step copies layers
        other.__dict__.update(self.__dict__)
        return other

    def __init__(self):
        self.params: dict = {}
        self.grads: dict = {}
        self.buffers: dict = {}
        self.children: dict[str, Layer] = {}

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name} {np.shape(value)}' for name, value in self.params.items())})"

    def walk(self, prefix=""):
        """Yield (dotted name, layer) for this layer and everything below it, in forward order."""
        yield prefix, self
        for name, child in self.children.items():
            yield from child.walk(f"{prefix}.{name}" if prefix else name)

    def draw(self, generator: np.random.Generator) -> dict:
        """New weights, by name: PyTorch's default, uniform within 1 / sqrt(fan in). A layer that is just made has those
        of :func:`made`; a :class:`nanomr.models.Model` draws those of all layers that nobody has touched since."""
        bound = max(self.fan_in, 1) ** -0.5
        shapes = {name: value.shape for name, value in self.params.items()} if self.fan_in else {}
        return {name: generator.uniform(-bound, bound, shape).astype(np.float32) for name, shape in shapes.items()}

    @property
    def has_params(self) -> bool:
        """Does anything at or below this layer learn?"""
        return any(layer.params for _, layer in self.walk())

    def to_torch(self, name: str, value: np.ndarray) -> np.ndarray:
        """A parameter or buffer in PyTorch's layout."""
        return value

    def from_torch(self, name: str, value: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_torch`."""
        return value

    def accumulate(self, **gradients):
        for name, gradient in gradients.items():
            if name in self.grads:
                check(self, f"{name}'s gradient", self.grads[name], gradient.shape)
                total = self.grads[name]  # not assigned: a model knows its views by identity
                total += gradient
            else:  # a layer outside a model: nothing has made room for its gradients yet
                self.grads[name] = gradient

    def room_for(self, name):
        """The gradient so far, where a kernel may add to it without :meth:`accumulate`; None where there is none yet,
        or where a subclass looks at what comes in."""
        if name not in self.grads or type(self).accumulate is not Layer.accumulate:
            return None
        check(self, f"{name}'s gradient", self.grads[name], self.params[name].shape)
        return self.grads[name]


@functools.cache
def _signature(cls) -> inspect.Signature:
    """Of its constructor: looking this up takes longer than making a layer."""
    return inspect.signature(cls.__init__)


def _plain(value):
    """``value`` as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def made() -> np.random.Generator:
    """What the weights of a layer by itself are drawn from: no model's generator, so that they are told apart."""
    return rng.generator(0, rng.INIT, 1)


def _room(*shape: int) -> np.ndarray:
    """Room for a parameter. Raises ValueError for a shape that is none."""
    if min(shape) < 1 or math.prod(shape) > MOST:
        raise ValueError(f"a layer cannot have weights of shape {shape}: sizes are 1 or more, {MOST} numbers at most")
    return np.zeros(shape, np.float32)


class Affine(Layer):
    """y = A x + b. Subclasses give the map, its transpose and, if they have any, their parameters' gradients."""

    takes_pairs = True

    def make(self, bias, *shape):
        """The parameters, for good of these shapes: a weight, whose last axis is the outputs, and a bias."""
        self.shapes = {"weight": shape, "bias": shape[-1:]}
        self.params = {name: _room(*self.shapes[name]) for name in ("weight", "bias")[: 1 + bool(bias)]}
        self.params = self.draw(made())

    def output_shape(self, x):
        """The shape of A x. ValueError unless x fits, and the parameters have the shapes that they were made with."""
        raise NotImplementedError

    def checked_weight(self):
        """The weight, if all parameters still have their shapes."""
        for name, value in self.params.items():
            check(self, name, value, self.shapes[name], getattr(self.params["weight"], "dtype", None))
        return self.params["weight"]

    def check_dy(self, dy, x):
        check(self, "dy", dy, self.output_shape(x), x.dtype)

    def apply(self, x, bias=True):
        raise NotImplementedError

    def transpose(self, dy, x):
        """A^T dy; ``x`` tells the shape of the input."""
        raise NotImplementedError

    def accumulate_from(self, x, dy, bias=True):
        """Add the parameters' gradients; x and dy are checked."""

    def forward(self, x, train=False, tap=None):
        if isinstance(x, PairBatch):
            x.checked()
            return PairBatch(self.apply(x.x), self.apply(x.rho, bias=False)), x
        if isinstance(x, Box):
            x.checked()
            absolute = self.absolute()
            return Box(self.apply(x.points), absolute.apply(x.radius, bias=False)), (x, absolute)
        return self.apply(x), x

    def absolute(self) -> "Affine":
        """The layer with A's absolute values, which acts on radii."""
        other = copy.copy(self)
        other.grads, other.params = {}, {name: abs(value) for name, value in self.params.items() if name == "weight"}
        other.buffers = {name: abs(value) for name, value in self.buffers.items()}  # Normalize's std
        return other

    def _box_backward(self, dy, cache, param_grads, input_grad):
        """A^T and |A|^T; a weight's gradient by the radii has its sign."""
        x, absolute = cache
        if param_grads and self.params:
            absolute.grads = {}
            absolute.accumulate_from(x.radius, dy.radius, bias=False)
            self.accumulate_from(x.points, dy.points)
            weight = self.params["weight"]
            into = self.room_for("weight")
            signed = ops_for(weight).times_sign(absolute.grads["weight"], weight, into)
            if into is None:
                self.accumulate(weight=signed)
        if input_grad:
            return Box(self.transpose(dy.points, x.points), absolute.transpose(dy.radius, x.radius))
        return None

    def backward(self, dy, cache, param_grads=True, input_grad=True):
        if isinstance(dy, Box):
            return self._box_backward(dy, cache, param_grads, input_grad)
        pair = isinstance(cache, PairBatch)
        if pair != isinstance(dy, PairBatch):
            raise ValueError(f"{self} takes a PairBatch as dy exactly where its input was one, not {type(dy).__name__}")
        parts = list(zip(cache, dy, (True, False), strict=True)) if pair else [(cache, dy, True)]
        dx = [self.transpose(d, x) if input_grad else self.check_dy(d, x) for x, d, _ in parts]
        if param_grads and self.params:
            for x, d, bias in parts:
                self.accumulate_from(x, d, bias)
        return PairBatch(*dx) if pair and input_grad else dx[0]


class Conv2d(Affine):
    """2-D convolution. ``padding`` is one number or (top, bottom, left, right); see ``derivations/convolution.md``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        padding: int | tuple = 0,
        bias: bool = True,
    ):
        super().__init__()
        sizes = dict(in_channels=in_channels, out_channels=out_channels, kernel=kernel, stride=stride)
        c, c_out, kernel, self.stride = (whole("Conv2d", name, size) for name, size in sizes.items())
        self.padding = four_sides("Conv2d", padding)
        self.fan_in = kernel * kernel * c
        self.make(bias, kernel, kernel, c, c_out)

    def forward(self, x, train=False, tap=None, plus=None):
        return super().forward(x) if plus is None else (self.apply(x, plus=plus), x)

    def backward(self, dy, cache, param_grads=True, input_grad=True, plus=None):
        if plus is None or not input_grad:
            return super().backward(dy, cache, param_grads, input_grad)
        super().backward(dy, cache, param_grads, input_grad=False)
        return self.transpose(dy, cache, plus)

    def output_shape(self, x):
        weight = self.checked_weight()
        check(self, "x", x, ("N", "H", "W", weight.shape[2]), weight.dtype, WEIGHTS)
        return conv2d_shape(x.shape, weight.shape, self.stride, self.padding)

    def apply(self, x, bias=True, plus=None):
        shape, b = self.output_shape(x), self.params.get("bias") if bias else None
        check_plus(self, plus, shape, x.dtype)
        return ops_for(x).conv2d(x, self.params["weight"], b, self.stride, self.padding, plus)

    def transpose(self, dy, x, plus=None):
        self.check_dy(dy, x)
        check_plus(self, plus, x.shape, x.dtype)
        return ops_for(dy).conv2d_input_gradient(dy, self.params["weight"], self.stride, self.padding, x.shape, plus)

    def accumulate_from(self, x, dy, bias=True):
        ops, window = ops_for(dy), (self.params["weight"].shape, self.stride, self.padding)
        if bias and "bias" in self.params:
            dw, db = ops.conv2d_weight_gradient(x, dy, *window)
            return self.accumulate(weight=dw, bias=db)
        if hasattr(ops, "conv2d_dw"):
            dw = ops.conv2d_dw(x, dy, *window, into=self.room_for("weight"))
            return None if dw is None else self.accumulate(weight=dw)
        self.accumulate(weight=ops.conv2d_weight_gradient(x, dy, *window)[0])

    def to_torch(self, name, value):
        return value.transpose(3, 2, 0, 1) if name == "weight" else value  # HWIO -> OIHW

    def from_torch(self, name, value):
        return value.transpose(2, 3, 1, 0) if name == "weight" else value


class Linear(Affine):
    """y = x W + b, x (N, in). ``derivations/linear.md``.

    ``image`` = (H, W, C) says that the inputs are a flattened NHWC image: PyTorch flattens NCHW, so that its columns
    come in another order on disk.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, image: tuple | None = None):
        super().__init__()
        sizes = dict(in_features=in_features, out_features=out_features)
        sizes = [whole("Linear", name, size) for name, size in sizes.items()]
        self.fan_in, self.image = in_features, image
        self.make(bias, *sizes)
        if image and (len(image) != 3 or np.prod(image) != in_features):
            raise ValueError(f"Linear takes an image (H, W, C) of its {in_features} features, not {image}")

    def output_shape(self, x):
        weight = self.checked_weight()
        check(self, "x", x, ("N", len(weight)), weight.dtype, WEIGHTS)
        return len(x), weight.shape[1]

    def apply(self, x, bias=True):
        self.output_shape(x)
        return ops_for(x).linear(x, self.params["weight"], self.params.get("bias") if bias else None)

    def transpose(self, dy, x):
        self.check_dy(dy, x)
        return ops_for(dy).linear_input_gradient(dy, self.params["weight"])

    def accumulate_from(self, x, dy, bias=True):
        into = self.room_for("weight")
        dw, db = ops_for(dy).linear_weight_gradient(x, dy, into)
        if into is None:
            self.accumulate(weight=dw)
        if bias and "bias" in self.params:
            self.accumulate(bias=db)

    def to_torch(self, name, value):
        if name == "weight" and self.image:
            value = value.reshape(*self.image, -1).transpose(2, 0, 1, 3).reshape(value.shape)
        return value.T

    def from_torch(self, name, value):
        if name == "weight" and self.image:
            h, w, c = self.image
            return value.reshape(-1, c, h, w).transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
        return value.T


class Normalize(Affine):
    """(x - mean) / std per channel: the model's first layer, so that images and eps are always in [0, 1] units."""

    def __init__(self, mean: tuple, std: tuple):
        super().__init__()
        self.buffers.update(mean=np.asarray(mean, np.float32), std=np.asarray(std, np.float32))
        sizes = {self.buffers["mean"].shape, self.buffers["std"].shape} - {(1,)}
        if len(sizes) > 1 or any(len(shape) != 1 for shape in sizes) or not self.buffers["std"].all():
            raise ValueError(f"Normalize takes a mean and a std (not 0) for each channel, not {mean} and {std}")

    def output_shape(self, x):
        std = self.buffers["std"]
        channels = max(self.buffers["mean"].size, std.size)
        check(self, "x", x, ("N", "H", "W", channels if channels > 1 else "C"), std.dtype, WEIGHTS)
        return x.shape

    def apply(self, x, bias=True):
        self.output_shape(x)
        return ops_for(x).normalize(x, self.buffers["mean"] if bias else None, self.buffers["std"])

    def transpose(self, dy, x):
        self.check_dy(dy, x)
        return ops_for(dy).normalize(dy, None, self.buffers["std"])

    def to_torch(self, name, value):
        return value.reshape(-1, 1, 1)

    def from_torch(self, name, value):
        return value.reshape(-1)


class Flatten(Affine):
    """(N, ...) -> (N, everything else), in memory order (NHWC)."""

    def output_shape(self, x):
        check(self, "x", x, (...,))
        return len(x), x.size // len(x)

    def apply(self, x, bias=True):
        shape = self.output_shape(x)
        return x.reshape(shape)

    def transpose(self, dy, x):
        self.check_dy(dy, x)
        if x.dtype.name == "bfloat16":  # logits, and gradients on their way back from them, are float32
            dy = ops_for(dy).cast(dy, x.dtype)
        return dy.reshape(x.shape)


class AveragePool2d(Affine):
    """Mean over window x window tiles; ``window=None`` pools the whole image to 1 x 1. ``derivations/pooling.md``."""

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = None if window is None else whole("AveragePool2d", "window", window)

    def output_shape(self, x):
        check(self, "x", x, ("N", "H", "W", "C"))
        n, h, w, c = x.shape
        window = self.window or h
        if h % window or w % window or (self.window is None and h != w):
            raise ValueError(f"a {h}x{w} image cannot be pooled by {window}x{window} tiles")
        return n, h // window, w // window, c

    def apply(self, x, bias=True):
        self.output_shape(x)
        return ops_for(x).average_pool(x, self.window or x.shape[1])

    def transpose(self, dy, x):
        self.check_dy(dy, x)
        return ops_for(dy).average_pool_backward(dy, self.window or x.shape[1])


class ReLU(Layer):
    """y = max(z, 0), and the place where a tap looks on. ``derivations/relu.md``, ``derivations/hamming.md``.

    The cache is z, which ReLU's own backward needs; a tap does ReLU's work and its own in one pass over z, and may
    add a small record (the Hamming regulariser: its norms, at most N numbers).
    """

    takes_pairs = True

    def forward(self, z, train=False, tap=None):
        if isinstance(z, Normalized | NormalizedBox):
            if tap is None:
                return z.relu(), (z, None, None)
            z = z if getattr(tap, "takes_normalized", False) else z.full()
        else:
            check(self, "z", z.checked()[0] if isinstance(z, PairBatch | Box) else z, (...,))
        if tap is not None:
            y, record = tap.forward(z)
            return y, (z, tap, record)
        if isinstance(z, Box):
            return z.relu(), (z, None, None)
        if isinstance(z, PairBatch):
            y = z.full()
            return ops_for(y).relu(y), (z, None, None)
        return ops_for(z).relu(z), (z, None, None)

    def backward(self, dy, cache, param_grads=True, input_grad=True, spend=False):
        """``spend``: the batch norm in front may write its own dx over dy."""
        if not input_grad:
            return None
        z, tap, record = cache
        if isinstance(z, Box | NormalizedBox):
            dz = z.relu_backward(dy) if tap is None else tap.backward(dy, z, record)
            return dz._replace(spend=spend) if isinstance(dz, BoxBehindReLU) else dz
        like, n = (z, 1) if not isinstance(z, tuple) else (z.x, 1 + 2 * isinstance(z, PairBatch))
        check(self, "dy", dy, (n * len(like), *like.shape[1:]), like.dtype)
        if tap is not None:
            return tap.backward(dy, z, record)
        if isinstance(z, Normalized):
            return BehindReLU(dy)
        if isinstance(z, PairBatch):
            return PairBatch.gradient(ops_for(dy).relu_backward(dy, z.full()))
        return ops_for(dy).relu_backward(dy, z)


class BatchNorm2d(Layer):
    """gamma (x - mean) / sqrt(var + eps) + beta per channel. ``derivations/batchnorm.md``.

    Training mode uses the batch's own statistics (of all ranks' rows, where this is a ``share`` of a batch) and updates
    the running ones (momentum 0.1, unbiased variance, as PyTorch); evaluation mode uses the running ones, which are
    constants: its backward is another, simpler one. ``before_relu`` says that a ReLU comes next, which is left to do
    the work (:class:`Normalized`).
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, before_relu: bool = False):
        super().__init__()
        self.eps, self.momentum, self.before_relu = eps, momentum, before_relu
        self.channels = channels = whole("BatchNorm2d", "channels", channels)
        self.params.update(weight=_room(channels) + 1, bias=_room(channels))
        self.buffers.update(running_mean=_room(channels), running_var=_room(channels) + 1)
        self.buffers["num_batches_tracked"] = np.zeros((), np.int64)

    def forward(self, x, train=False, tap=None):
        if isinstance(x, Box):
            return self._box_forward(x.checked(), train)
        self._check(x)
        mean, inv_std = self._statistics(x, train)
        y = Normalized(x, self.params["weight"], self.params["bias"], mean, inv_std)
        return y if self.before_relu else y.full(), (x, mean, inv_std, train)

    def _check(self, x):
        for name, value in (*self.params.items(), *list(self.buffers.items())[:2]):
            check(self, name, value, (self.channels,), getattr(self.params["weight"], "dtype", None))
        features = len(getattr(x, "shape", ())) == 2  # (N, C), behind a linear layer
        wanted = ("N", self.channels) if features else ("N", "H", "W", self.channels)
        check(self, "x", x, wanted, self.params["weight"].dtype, WEIGHTS)

    def _statistics(self, x, train):
        """(mean, inv_std) of each channel: in training those of x, by which the running ones move; else the latter."""
        ops = ops_for(x)
        if train and self.share.whole and hasattr(ops, "batchnorm_training"):  # all of the next lines at once
            if fused := ops.batchnorm_training(x, self.eps, self.momentum, **self.buffers):
                return fused
        if train:
            mean, var = self.share.moments(*ops.batchnorm_statistics(x))
            m, keep, take = self.share.scaled(x.size // x.shape[-1]), 1 - self.momentum, self.momentum
            for name, batch in (("running_mean", mean), ("running_var", var * (m / max(m - 1, 1)))):
                self.buffers[name][...] = keep * self.buffers[name] + take * batch
            self.buffers["num_batches_tracked"] += 1
        else:
            # a copy: a training pass may move the buffer while this cache is alive
            mean, var = self.buffers["running_mean"].copy(), self.buffers["running_var"]
        return mean, 1 / (var + self.eps) ** 0.5

    def _box_forward(self, box, train):
        """The clean batch's statistics for all."""
        clean = box.points[: len(box.points) // 2]
        if train and len(clean) != len(box.radius):
            raise ValueError(f"in training {self} takes a Box with the clean batch: points [x; centres]")
        self._check(box.points)
        mean, inv_std = self._statistics(clean, train)
        y = NormalizedBox(box, self.params["weight"], self.params["bias"], mean, inv_std)
        return y if self.before_relu else y.full(), (box, mean, inv_std, train)

    def _box_backward(self, dy, cache, param_grads, input_grad):
        box, mean, inv_std, train = cache
        n, ops, gamma = len(box.radius), ops_for(box.points), self.params["weight"]
        if isinstance(dy, BoxBehindReLU):
            args = *dy.dy, *box, gamma, self.params["bias"], mean, inv_std, dy.gains, train, dy.spend
            *dx, dgamma, dbeta = ops.batchnorm_relu_box_backward(*args)
        else:
            dgamma, dbeta = ops.batchnorm_parameter_gradient(dy.points, box.points, mean, inv_std)
            of_radius, _ = ops.batchnorm_parameter_gradient(dy.radius, box.radius, 0 * mean, inv_std)
            dgamma = dgamma + array_module(gamma).sign(gamma) * of_radius
            dx = [ops.scale_channels(d, g * inv_std) for d, g in zip(dy, (gamma, abs(gamma)), strict=True)]
            if train:  # mean and variance move with the clean batch, and with them everything
                args = box.points[:n], gamma, mean, inv_std, dgamma, dbeta
                dx[0][:n] = ops.batchnorm_backward(dy.points[:n], *args)
        if param_grads:
            self.accumulate(weight=dgamma, bias=dbeta)
        return Box(*dx) if input_grad else None

    def backward(self, dy, cache, param_grads=True, input_grad=True, plus=None):
        if isinstance(dy, Box | BoxBehindReLU):
            return self._box_backward(dy, cache, param_grads, input_grad)
        x, mean, inv_std, train = cache
        ops, gamma = ops_for(x), self.params["weight"]
        check(self, "dy", dy.dy if isinstance(dy, BehindReLU) else dy, x.shape, x.dtype)
        check_plus(self, plus, x.shape, x.dtype)
        if isinstance(dy, BehindReLU):
            if param_grads:
                self.grads = self.grads or {name: 0 * value for name, value in self.params.items()}
            into = (self.grads["weight"], self.grads["bias"]) if param_grads else None
            over = None if self.share.whole else self.share.means
            dx, _, _ = ops.batchnorm_relu_backward(
                dy.dy, x, gamma, self.params["bias"], mean, inv_std, dy.alpha, dy.weight, plus, train, into, over
            )
            return dx if input_grad else None
        if param_grads or (train and input_grad):
            dgamma, dbeta = ops.batchnorm_parameter_gradient(dy, x, mean, inv_std)
        if param_grads:
            self.accumulate(weight=dgamma, bias=dbeta)
        if not input_grad:
            return None
        if train:
            return ops.batchnorm_backward(dy, x, gamma, mean, inv_std, *self.share.means(dgamma, dbeta), plus)
        return ops.scale_channels(dy, gamma * inv_std, plus)


class Sequential(Layer):
    """Layers one after another. ``children`` maps names to layers, in order."""

    takes_pairs = True

    def __init__(self, children: dict[str, Layer]):
        super().__init__()
        self.children = dict(children)

    def forward(self, x, train=False, tap=None):
        caches, expanded_at = [], None
        for i, layer in enumerate(self.children.values()):
            if isinstance(x, PairBatch) and not layer.takes_pairs:
                x, expanded_at = x.full(), i
            x, cache = layer.forward(x, train=train, tap=tap)
            caches.append(cache)
        return x, (caches, expanded_at)

    def backward(self, dy, cache, param_grads=True, input_grad=True, spend=False):
        """``spend``: a layer's part of the cache is let go behind it, for the gradients that are still to come."""
        caches, expanded_at = cache
        layers = list(self.children.values())
        learn = [param_grads and layer.has_params for layer in layers]
        needed = [input_grad or any(learn[:i]) for i in range(len(layers))]
        ours = spend  # may dy be overwritten? A layer with weights makes a new one
        for i in reversed(range(len(layers))):
            if not (needed[i] or learn[i]):
                return None
            passed = caches[i]
            if spend:
                caches[i] = None
            options = {"spend": True} if ours and isinstance(dy, Box) and type(layers[i]) is ReLU else {}
            dy = layers[i].backward(dy, passed, param_grads=param_grads, input_grad=needed[i], **options)
            ours = ours or bool(layers[i].fan_in)
            if i == expanded_at and dy is not None:
                dy = PairBatch.gradient(dy)
        return dy


class Residual(Layer):
    """The sum of what its one or two ``children``, the branches, make of x; of a single one, and x itself."""

    def __init__(self, children: dict[str, Layer]):
        super().__init__()
        self.children = dict(children)
        if not 1 <= len(self.children) <= 2:
            raise ValueError(f"Residual takes one branch, or two, not {len(self.children)}")

    def forward(self, x, train=False, tap=None):
        check(self, "x", x.checked().points if isinstance(x, Box) else x, (...,))
        results = [branch.forward(x, train=train, tap=tap) for branch in self.children.values()]
        terms = [y for y, _ in results] + [x][: 2 - len(results)]
        first, second = (y.points if isinstance(y, Box) else y for y in terms)
        check(self, "the second branch", second, first.shape, first.dtype)
        return _sum(*terms), [cache for _, cache in results]

    def backward(self, dy, cache, param_grads=True, input_grad=True):
        branches = zip(self.children.values(), cache, strict=True)
        terms = [branch.backward(dy, kept, param_grads, input_grad) for branch, kept in branches]
        terms += [dy][: 2 - len(terms)]
        return _sum(*terms) if input_grad else None


def _sum(a, b):
    """a + b; in bfloat16, which CuPy does not add, by way of float32: rounded once, as everywhere. Of boxes,
    centres and radii: both branches may be at their ends at once."""
    if isinstance(a, Box):
        return Box(*map(_sum, a, b))
    return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype) if a.dtype.itemsize == 2 else a + b


class PreActBlock(Layer):
    """Pre-activation residual block (He et al. 2016): y = conv2(relu(bn2(conv1(h)))) + shortcut, h = relu(bn1(x)).

    The shortcut is x itself, or a strided 1x1 convolution where the shape changes; that convolution reads h when
    ``out_shortcut`` (He et al.), x otherwise. ``activated_identity``: the identity shortcut is h as well (the
    network that Jin released with the paper's first version).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        out_shortcut: bool = True,
        activated_identity: bool = False,
    ):
        super().__init__()
        self.children = {
            "bn1": BatchNorm2d(in_channels, before_relu=True),
            "relu1": ReLU(),
            "conv1": Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            "bn2": BatchNorm2d(channels, before_relu=True),
            "relu2": ReLU(),
            "conv2": Conv2d(channels, channels, 3, 1, 1, bias=False),
        }
        self.projects = stride != 1 or in_channels != channels
        if self.projects:
            self.children["shortcut"] = Sequential({"0": Conv2d(in_channels, channels, 1, stride, 0, bias=False)})
        self.shortcut_reads_h = out_shortcut if self.projects else activated_identity

    def forward(self, x, train=False, tap=None):
        caches, h = {}, x
        for name in ("bn1", "relu1", "conv1", "bn2", "relu2"):
            h, caches[name] = self.children[name].forward(h, train=train, tap=tap)
            if name == "relu1":
                shortcut = h if self.shortcut_reads_h else x
        if self.projects:
            shortcut, caches["shortcut"] = self.children["shortcut"].forward(shortcut)
        if isinstance(h, Box):
            y, caches["conv2"] = self.children["conv2"].forward(h)
            return _sum(y, shortcut), caches
        y, caches["conv2"] = self.children["conv2"].forward(h, plus=shortcut)
        return y, caches

    def backward(self, dy, cache, param_grads=True, input_grad=True):
        d_shortcut = dy
        if self.projects:
            d_shortcut = self.children["shortcut"].backward(dy, cache["shortcut"], param_grads)
        dh = dy
        joins = "conv1" if self.shortcut_reads_h else "bn1"  # its dh is the gradient of what the shortcut reads, too
        for name in ("conv2", "relu2", "bn2", "conv1", "relu1", "bn1"):
            plus = {"plus": d_shortcut} if name == joins and not isinstance(dy, Box) else {}
            dh = self.children[name].backward(dh, cache[name], param_grads, input_grad or name != "bn1", **plus)
            if name == joins and isinstance(dh, Box):
                dh = _sum(dh, d_shortcut)
        return dh
