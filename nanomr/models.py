"""The networks of the paper: ``mlp`` (eq. 3-6), ``small_cnn`` (verification), ``preact_resnet18`` (robustness).

Weights on disk are safetensors with PyTorch's names and layouts: ``docs/torch_twin.py`` loads them.
"""

import copy
from pathlib import Path

import numpy as np

from . import checkpoint, rng
from .backend import array_module, to_device, to_numpy
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
from .ops import gpu

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class Model(Sequential):
    """A network that maps images (N, H, W, C) in [0, 1] to logits (N, K).

    ``weights`` and ``gradients`` are flat vectors; every parameter and its gradient is a view into them, so that the
    optimiser is one pass. ``architecture`` = {"name": ..., keyword arguments}: what a checkpoint needs to rebuild it.
    """

    def __init__(self, children: dict[str, Layer], architecture: dict, input_shape: tuple, seed: int = 0):
        super().__init__(children)
        self.architecture, self.input_shape = architecture, tuple(input_shape)
        generator = rng.generator(seed, rng.INIT)
        for _, layer in self.walk():
            if isinstance(layer, Conv2d | Linear):  # PyTorch's default: uniform within 1 / sqrt(fan in)
                bound = layer.fan_in**-0.5
                for name, value in layer.params.items():
                    layer.params[name] = generator.uniform(-bound, bound, value.shape)
        self._pack(np, np.dtype(np.float32))

    def _pack(self, xp, dtype):
        """(Re)build the flat vectors in this array module and dtype; parameters and gradients become views."""
        layers = {id(layer): layer for _, layer in self.walk()}.values()  # one that is used twice has its weights once
        slots = [(layer, name) for layer in layers for name in layer.params]
        size = sum(layer.params[name].size for layer, name in slots)
        self.weights, self.gradients = xp.empty(size, dtype), xp.zeros(size, dtype)
        start = 0
        for layer, name in slots:
            value = layer.params[name]
            stop = start + value.size
            self.weights[start:stop] = xp.asarray(value, dtype).ravel()
            layer.params[name] = self.weights[start:stop].reshape(value.shape)
            layer.grads[name] = self.gradients[start:stop].reshape(value.shape)
            start = stop
        for _, layer in self.walk():
            for name, value in layer.buffers.items():
                kind = dtype if value.dtype.kind in "fc" else value.dtype
                layer.buffers[name] = xp.asarray(value, kind)

    def __deepcopy__(self, memo):
        """A network of its own, whose parameters are views of its own flat vectors."""
        other = copy.copy(self)
        memo[id(self)] = other
        other.children = copy.deepcopy(self.children, memo)
        other._pack(array_module(self.weights), self.dtype)
        other.gradients[...] = self.gradients
        return other

    @property
    def dtype(self):
        return self.weights.dtype

    def to(self, device: str) -> "Model":
        """Move weights and buffers to "cpu" or "gpu", in place; returns self."""
        for _, layer in self.walk():
            for store in (layer.params, layer.buffers):
                for name in store:
                    store[name] = to_device(store[name], device)
        self._pack(array_module(to_device(self.weights[:0], device)), self.dtype)
        return self

    def astype(self, dtype) -> "Model":
        """Change the dtype of weights and buffers, in place; returns self. float64 proves gradients."""
        self._pack(array_module(self.weights), np.dtype(dtype))
        return self

    def zero_grad(self):
        self.gradients[...] = 0

    def forward(self, x, train=False, tap=None):
        """(logits (N, K), cache). ``x`` (N, H, W, C) in [0, 1], of the model's dtype; or a PairBatch of it.

        A float32 model takes bfloat16 images too: activations are then bfloat16, weights and logits float32 (on a GPU).
        Evaluation mode unless ``train=True``. Raises ValueError for another shape or dtype.
        """
        pair = isinstance(x, PairBatch)
        for images in x if pair else (x,):
            if tuple(images.shape[1:]) != self.input_shape:
                wanted = ", ".join(map(str, ("N", *self.input_shape)))
                raise ValueError(f"the model takes images ({wanted}), not {images.shape}")
            if images.dtype != self.dtype and (images.dtype.name, self.dtype.name) != ("bfloat16", "float32"):
                raise ValueError(f"the model is {self.dtype}, the images are {images.dtype}: convert one of them")
        if pair and len(x.x) != len(x.rho):
            raise ValueError(f"{len(x.x)} images and {len(x.rho)} perturbations: there must be one for each")
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
            for path, layer in self.walk()
            for name, value in (*layer.params.items(), *layer.buffers.items())
        }

    def load_state_dict(self, state: dict[str, np.ndarray]):
        """Copy values in, by PyTorch's names. Raises UserError, and changes nothing, when names or shapes differ."""
        slots = {
            f"{path}.{name}": (layer, name, value)
            for path, layer in self.walk()
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
    """A float32 model on a GPU that computes in bfloat16, and takes and gives float32 as before: forward and backward,
    all that attacks need. For a quick look at it; figures that are reported come from the model itself."""

    def __init__(self, model: Model):
        self.model = model

    def forward(self, x, **options):
        return self.model.forward(gpu.cast(x, gpu.bfloat16()), **options)

    def backward(self, dy, cache, **options):
        return gpu.cast(self.model.backward(dy, cache, **options), np.float32)


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
