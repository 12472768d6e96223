"""The networks of the paper: ``mlp`` (eq. 3-6), ``small_cnn`` (verification), ``preact_resnet18`` (robustness).

Weights on disk are safetensors with PyTorch's names and layouts: ``docs/torch_twin.py`` loads them.
"""

import operator
from pathlib import Path

import numpy as np

from . import checkpoint, rng
from .backend import array_module, to_device, to_numpy
from .borders import BFLOAT16, check
from .errors import UserError
from .layers import (
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    Normalize,
    PairBatch,
    PreActBlock,
    ReLU,
    Sequential,
)
from .ops import bfloat16, gpu, ops_for

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class Model(Sequential):
    """A network that maps images (N, H, W, C) in [0, 1] to logits (N, K).

    ``weights`` and ``gradients`` are flat vectors; every parameter and its gradient is a view into them, so that the
    optimiser is one pass. Whoever exchanges a parameter, a gradient or a layer need not know: the next look at the
    vectors, and the next forward pass, take it in. Copies and pickles are networks of their own.
    ``architecture`` = {"name": ..., keyword arguments}: what a checkpoint needs to rebuild it.
    """

    def __init__(self, children: dict[str, Layer], architecture: dict, input_shape: tuple, seed: int = 0):
        super().__init__(children)
        self.architecture, self.input_shape = architecture, tuple(input_shape)
        generator = rng.generator(seed, rng.INIT)
        for _, layer in self.walk():
            if isinstance(layer, Conv2d | Linear):  # PyTorch's default: uniform within 1 / sqrt(fan in)
                bound = layer.fan_in**-0.5
                drawn = {n: generator.uniform(-bound, bound, value.shape) for n, value in layer.params.items()}
                if not any(value.any() for value in layer.params.values()):  # a layer of another network is kept
                    layer.params.update(drawn)
        self._weights = self._gradients = np.zeros(0, np.float32)
        self._pack()

    def _layers(self):
        """Each layer once, however many names it has."""
        return {id(layer): layer for _, layer in self.walk()}.values()

    def _pack(self):
        """Make every parameter and gradient a view of the flat vectors, which keep their place while all fits."""
        xp, dtype = array_module(self._weights), self._weights.dtype
        device = "cpu" if xp is np else "gpu"
        slots = [(layer, name) for layer in self._layers() for name in layer.params]
        weights = [xp.asarray(to_device(layer.params[name], device), dtype) for layer, name in slots]
        gradients = [xp.zeros(value.shape, dtype) for value in weights]
        for (layer, name), gradient in zip(slots, gradients, strict=True):
            if name in layer.grads and layer.grads[name].shape == gradient.shape:
                gradient[...] = to_device(layer.grads[name], device)
        for name, parts in (("_weights", weights), ("_gradients", gradients)):
            flat = xp.concatenate([xp.zeros(0, dtype), *(part.ravel() for part in parts)])
            if flat.shape != getattr(self, name).shape:
                setattr(self, name, xp.empty(flat.shape, dtype))
            getattr(self, name)[...] = flat
        start = 0
        for (layer, name), value in zip(slots, weights, strict=True):
            stop = start + value.size
            layer.params[name] = self._weights[start:stop].reshape(value.shape)
            layer.grads[name] = self._gradients[start:stop].reshape(value.shape)
            start = stop
        for layer in self._layers():
            for name, value in layer.buffers.items():
                kind = dtype if value.dtype.kind in "fc" else value.dtype
                layer.buffers[name] = xp.asarray(to_device(value, device), kind)
        self._views = self._arrays()

    def _arrays(self):
        """Every parameter and gradient there is."""
        arrays = []
        for _, layer in self.walk():
            arrays += layer.params.values()
            arrays += layer.grads.values()
        return arrays

    def _settled(self):
        """Itself, after :meth:`_pack` if any parameter or gradient is not the view that it was."""
        arrays = self._arrays()
        if len(arrays) != len(self._views) or not all(map(operator.is_, arrays, self._views)):
            self._pack()
        return self

    def _put(self, vector, values):
        """What ``model.weights = values`` means, and ``-=``: the numbers, in place."""
        if getattr(values, "shape", ()) not in ((), vector.shape):
            raise ValueError(f"the model takes a vector {vector.shape}, not {values.shape}")
        vector[...] = values

    @property
    def weights(self):
        return self._settled()._weights

    @weights.setter
    def weights(self, values):
        self._put(self.weights, values)

    @property
    def gradients(self):
        return self._settled()._gradients

    @gradients.setter
    def gradients(self, values):
        self._put(self.gradients, values)

    def __getstate__(self):
        return self.__dict__ | {"_weights": self._weights[:0], "_gradients": self._gradients[:0], "_views": []}

    def __setstate__(self, state):
        """The parameters of a copy, or of a pickle, are arrays of their own (perhaps read-only): pack them again."""
        self.__dict__.update(state)
        for layer in self._layers():
            layer.buffers = {name: value.copy() for name, value in layer.buffers.items()}
        self._pack()

    def __copy__(self):
        """Another name for the same layers and vectors, as copy.copy is meant."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    @property
    def dtype(self):
        return self._weights.dtype

    def to(self, device: str) -> "Model":
        """Move weights and buffers to "cpu" or "gpu", in place; returns self."""
        self._weights, self._gradients = (to_device(v[:0], device) for v in (self._weights, self._gradients))
        self._pack()
        return self

    def astype(self, dtype) -> "Model":
        """Change the dtype of weights and buffers, in place; returns self. float64 proves gradients."""
        self._weights, self._gradients = (v[:0].astype(dtype) for v in (self._weights, self._gradients))
        self._pack()
        return self

    def zero_grad(self):
        self.gradients[...] = 0

    def forward(self, x, train=False, tap=None):
        """(logits (N, K), cache). ``x`` (N, H, W, C) in [0, 1], of the model's dtype; or a PairBatch of it.

        A float32 model takes bfloat16 images too: activations are then bfloat16, weights and logits float32.
        Evaluation mode unless ``train=True``. Raises ValueError for another shape or dtype.
        """
        for images in x if isinstance(x, PairBatch) else (x,):
            check("the model", "images", images, ("N", *self.input_shape), self.dtype, BFLOAT16)
        self._settled()
        logits, cache = super().forward(x, train=train, tap=tap)
        if isinstance(logits, PairBatch):  # no ReLU at all: a linear model
            return logits.full(), (cache, True)
        return logits, (cache, False)

    def backward(self, dy, cache, param_grads=True, input_grad=True):
        """dx, (N, H, W, C), from dy = d(loss)/d(logits); parameter gradients are added to ``gradients``."""
        cache, linear = cache
        dy = PairBatch.gradient(dy) if linear else dy
        return super().backward(dy, cache, param_grads=param_grads, input_grad=input_grad)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Parameters and buffers with PyTorch's names and layouts, as NumPy arrays of their own."""
        return {
            f"{path}.{name}": np.array(layer.to_torch(name, to_numpy(value)), order="C")
            for path, layer in self._settled().walk()
            for name, value in (*layer.params.items(), *layer.buffers.items())
        }

    def load_state_dict(self, state: dict[str, np.ndarray]):
        """Copy values in, by PyTorch's names. Raises UserError, and changes nothing, when names or shapes differ."""
        slots = {
            f"{path}.{name}": (layer, name, value)
            for path, layer in self._settled().walk()
            for name, value in (*layer.params.items(), *layer.buffers.items())
        }
        if missing := sorted(slots.keys() ^ state.keys()):
            raise UserError(f"the checkpoint is for another network: {missing[0]!r} is only in one of the two")
        ready = []
        for key, (layer, name, value) in slots.items():
            wanted = layer.to_torch(name, np.empty(value.shape, np.int8)).shape
            if state[key].shape != wanted:
                raise UserError(f"the checkpoint is for another network: {key} is {state[key].shape}, not {wanted}")
            ready.append((value, layer.from_torch(name, state[key])))
        for value, new in ready:
            value[...] = array_module(value).asarray(new)

    def save(self, path, **metadata):
        """Write a safetensors file (atomically), with the architecture and ``metadata`` (JSON-able) in its header."""
        checkpoint.save_tensors(path, self.state_dict(), {"architecture": self.architecture, **metadata})


class InBfloat16:
    """A float32 model that computes in bfloat16, and takes and gives float32 as before: forward and backward, all that
    attacks need. For a quick look at it; figures that are reported come from the model itself."""

    def __init__(self, model: Model):
        self.model = model

    def forward(self, x, **options):
        return self.model.forward(ops_for(x).cast(x, bfloat16()), **options)

    def backward(self, dy, cache, **options):
        dx = self.model.backward(dy, cache, **options)
        return ops_for(dx).cast(dx, np.float32)


class InTf32:
    """A float32 model on a GPU whose products, and no others, round their factors to TF32."""

    def __init__(self, model: Model):
        self.model = model

    def forward(self, x, **options):
        with gpu.tf32():
            return self.model.forward(x, **options)

    def backward(self, dy, cache, **options):
        with gpu.tf32():
            return self.model.backward(dy, cache, **options)


def _input(mean, std, *sizes):
    """The first layer of every network, once the sizes of the others make sense."""
    if min(sizes) < 1:
        raise ValueError(f"a network needs at least one unit in each layer, not {min(sizes)}")
    return {"normalize": Normalize(mean, std)}


def mlp(sizes=(3072, 256, 256, 10), seed=0, input_shape=None, mean=(0.0,), std=(1.0,)) -> Model:
    """Fully connected ReLU network, eq. 3-6: z_i = relu(A_i z_{i-1} + b_i), logits = the last pre-activation.

    ``sizes`` = (inputs, hidden ..., classes). Takes images of ``input_shape``, by default (32, 32, 3).
    """
    input_shape = tuple(input_shape or (32, 32, 3))
    inputs = int(np.prod(input_shape))
    if len(sizes) < 2 or sizes[0] != inputs:
        raise ValueError(f"mlp: sizes must be ({inputs}, hidden ..., classes), not {tuple(sizes)}")
    children: dict[str, Layer] = {**_input(mean, std, *sizes), "flatten": Flatten()}
    for i in range(1, len(sizes)):
        children[f"fc{i}"] = Linear(sizes[i - 1], sizes[i], image=input_shape if i == 1 else None)
        if i < len(sizes) - 1:
            children[f"relu{i}"] = ReLU()
    config = {
        "name": "mlp",
        "sizes": list(sizes),
        "input_shape": list(input_shape),
        "mean": list(mean),
        "std": list(std),
    }
    return Model(children, config, input_shape, seed)


def small_cnn(seed=0, kernel=4, hidden=128, classes=10, mean=CIFAR_MEAN, std=CIFAR_STD) -> Model:
    """The verification network: conv 16 and conv 32, stride 2, then fully connected ``hidden`` and ``classes``.

    ``kernel=4`` with padding 1 is Wong et al.'s (2018); ``kernel=5`` with TensorFlow's SAME padding is Xiao et al.'s
    (2019). The paper has 128 hidden units where they have 100. Input (N, 32, 32, 3).
    """
    if kernel not in (4, 5):
        raise ValueError(f"small_cnn: kernel must be 4 (Wong et al.) or 5 (Xiao et al.), not {kernel}")
    padding = 1 if kernel == 4 else (1, 2, 1, 2)
    children = {
        **_input(mean, std, hidden, classes),
        "conv1": Conv2d(3, 16, kernel, 2, padding),
        "relu1": ReLU(),
        "conv2": Conv2d(16, 32, kernel, 2, padding),
        "relu2": ReLU(),
        "flatten": Flatten(),
        "fc1": Linear(2048, hidden, image=(8, 8, 32)),
        "relu3": ReLU(),
        "fc2": Linear(hidden, classes),
    }
    config = {
        "name": "small_cnn",
        "kernel": kernel,
        "hidden": hidden,
        "classes": classes,
        "mean": list(mean),
        "std": list(std),
    }
    return Model(children, config, (32, 32, 3), seed)


def preact_resnet18(
    seed=0, bn_before_fc=True, out_shortcut=True, jin_v1=False, width=64, classes=10, mean=CIFAR_MEAN, std=CIFAR_STD
) -> Model:
    """PreActResNet18 for 32x32 images (He et al. 2016); both flags on is their network.

    ``bn_before_fc``: batch norm and ReLU before the pooling. ``out_shortcut``: the 1x1 shortcut convolutions read the
    activated input. ``jin_v1`` (overrides both): the network released with the paper's first version: batch norm and
    ReLU after the first convolution, activated identity shortcuts, none before the pooling. ``width`` scales it.
    """
    if jin_v1:
        bn_before_fc, out_shortcut = False, True
    children: dict[str, Layer] = {**_input(mean, std, width, classes), "conv1": Conv2d(3, width, 3, 1, 1, bias=False)}
    if jin_v1:
        children.update(bn1=BatchNorm2d(width, before_relu=True), relu1=ReLU())
    channels = width
    for i, stride in enumerate((1, 2, 2, 2)):
        out = width * 2**i
        children[f"layer{i + 1}"] = Sequential(
            {
                "0": PreActBlock(channels, out, stride, out_shortcut, jin_v1),
                "1": PreActBlock(out, out, 1, out_shortcut, jin_v1),
            }
        )
        channels = out
    if bn_before_fc:
        children.update(bn=BatchNorm2d(channels, before_relu=True), relu=ReLU())
    children.update(pool=AveragePool2d(), flatten=Flatten(), linear=Linear(channels, classes))
    config = dict(name="preact_resnet18", bn_before_fc=bn_before_fc, out_shortcut=out_shortcut, jin_v1=jin_v1)
    config |= {"width": width, "classes": classes, "mean": list(mean), "std": list(std)}
    return Model(children, config, (32, 32, 3), seed)


BUILDERS = {"mlp": mlp, "small_cnn": small_cnn, "preact_resnet18": preact_resnet18}


def build(architecture: dict, seed: int = 0) -> Model:
    """A network from its ``architecture``. Raises UserError for one that this version does not know."""
    name = architecture.get("name") if isinstance(architecture, dict) else architecture
    if not isinstance(name, str) or name not in BUILDERS or name is architecture:
        raise UserError(f"unknown network {name!r}: this version builds {', '.join(BUILDERS)}")
    try:
        return BUILDERS[name](seed=seed, **{k: v for k, v in architecture.items() if k != "name"})
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"the checkpoint's architecture does not fit this version: {error}") from None


def load(path, device: str = "cpu") -> Model:
    """The network saved at ``path`` (a file, or a run folder), weights and all.

    Raises UserError when the file is missing, damaged, or holds no architecture.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, metadata = checkpoint.load_tensors(path)
    if "architecture" not in metadata:
        raise UserError(f"{path} holds no nanomr network: it was not written by nanomr")
    model = build(metadata["architecture"])
    model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    return model.to(device)
