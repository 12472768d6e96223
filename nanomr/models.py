"""Networks: a :class:`Model` is a tree of layers, and its checkpoint says which. The paper's networks are such trees:
``mlp`` (eq. 3-6), ``small_cnn`` (verification), ``preact_resnet18`` (robustness).

Weights on disk are safetensors with PyTorch's names and layouts: ``docs/torch_twin.py`` loads them.
"""

import inspect
import math
import operator
import reprlib
from pathlib import Path

import numpy as np

from . import checkpoint, rng
from .backend import array_module, to_device, to_numpy
from .borders import BFLOAT16, check
from .errors import UserError
from .layers import (
    AveragePool2d,
    BatchNorm2d,
    Box,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    Normalize,
    PairBatch,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
    made,
)
from .ops import bfloat16, gpu, ops_for

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class Model(Sequential):
    """A network that maps images (N, H, W, C) in [0, 1] to logits (N, K): ``children``, one after another.

    ``weights`` and ``gradients`` are flat vectors; every parameter and its gradient is a view into them, so that the
    optimiser is one pass. Whoever exchanges a parameter, a gradient or a layer need not know: the next look at the
    vectors, and the next forward pass, take it in. Copies and pickles are networks of their own. Layers that are as
    they were made get weights drawn by ``seed``; others keep theirs. ``name`` is what tables call the network (of
    another's architecture, its name is taken). Raises ValueError for names that a checkpoint cannot have, and for an
    ``input_shape`` that is not (H, W, C).
    """

    def __init__(
        self, children: dict[str, Layer], name: str | dict = "network", input_shape: tuple = (32, 32, 3), seed: int = 0
    ):
        super().__init__(children)
        self.name = name.get("name", "network") if isinstance(name, dict) else name
        self.input_shape = tuple(input_shape)
        if len(self.input_shape) != 3 or not all(isinstance(n, int) and n > 0 for n in self.input_shape):
            raise ValueError(f"input_shape must be (H, W, C), three whole numbers above 0, not {input_shape}")
        generator = rng.generator(seed, rng.INIT)
        for _, layer in self.walk():
            if wrong := [child for child in layer.children if not isinstance(child, str) or child in ("", "optimizer")]:
                raise ValueError(f"a layer cannot be called {wrong[0]!r}")
            if wrong := [child for child in layer.children if "." in child]:
                raise ValueError(f"a layer cannot be called {wrong[0]!r}: dots stand between the names of a tree")
            drawn, fresh = layer.draw(generator), layer.draw(made())
            if all(np.array_equal(to_numpy(layer.params[name]), value) for name, value in fresh.items()):
                layer.params.update(drawn)
        self._weights = self._gradients = np.zeros(0, np.float32)
        self._pack()

    @property
    def architecture(self) -> dict:
        """What :func:`build` makes this network of, in JSON's types: its layers, by name, and their arguments.

        Raises ValueError where a layer with weights has two names: a file would give each its own.
        """
        paths = [id(layer) for _, layer in self.walk() if layer.params or layer.buffers]
        if len(paths) > len(set(paths)):
            raise ValueError("a layer has two names in this network, and a file cannot say that they share weights")
        return {"name": self.name, "input_shape": list(self.input_shape), "layers": _nodes(self)}

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
        for images in x if isinstance(x, PairBatch | Box) else (x,):
            check("the model", "images", images, ("N", *self.input_shape), self.dtype, BFLOAT16)
        self._settled()
        logits, cache = super().forward(x, train=train, tap=tap)
        if isinstance(logits, PairBatch):  # no ReLU at all: a linear model
            return logits.full(), (cache, True)
        return logits, (cache, False)

    def backward(self, dy, cache, param_grads=True, input_grad=True, spend=False):
        """dx, (N, H, W, C), from dy = d(loss)/d(logits); parameter gradients are added to ``gradients``."""
        cache, linear = cache
        dy = PairBatch.gradient(dy) if linear else dy
        return super().backward(dy, cache, param_grads=param_grads, input_grad=input_grad, spend=spend)

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

    def save(self, path, precision: str = "fp32", **metadata):
        """Write a safetensors file (atomically), with the architecture and ``metadata`` (JSON-able) in its header.

        ``precision="bf16"``: the parameters are rounded to bfloat16, for a file of half the size. That is another
        network, if a close one: what is said of it has to be measured on what :func:`load` makes of the file.
        """
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, not {precision!r}")
        state = self.state_dict()
        if precision == "bf16":
            names = [f"{layer}.{name}" for layer, kept in self.walk() for name in kept.params]
            state |= {name: state[name].astype(bfloat16()) for name in names}
        checkpoint.save_tensors(path, state, {"architecture": self.architecture, **metadata})


def _nodes(layer: Sequential | Residual) -> dict:
    return {
        name: {"type": type(child).__name__, "layers": _nodes(child)}
        if type(child) in (Sequential, Residual)
        else {"type": type(child).__name__, **child.arguments}
        for name, child in layer.children.items()
    }


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
    return Model(children, "mlp", input_shape, seed)


def small_cnn(
    seed=0,
    kernel=4,
    hidden=128,
    classes=10,
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
    input_shape=(32, 32, 3),
    batchnorm=False,
) -> Model:
    """The verification network: conv 16 and conv 32, stride 2, then fully connected ``hidden`` and ``classes``.

    ``kernel=4`` with padding 1 is Wong et al.'s (2018); ``kernel=5`` with TensorFlow's SAME padding is Xiao et al.'s
    (2019). The paper has 128 hidden units where they have 100. Images of ``input_shape`` = (H, W, C), at least 4x4.
    ``batchnorm``: one behind each hidden layer, which then has no bias; :func:`fold` makes the network without of it.
    """
    if kernel not in (4, 5):
        raise ValueError(f"small_cnn: kernel must be 4 (Wong et al.) or 5 (Xiao et al.), not {kernel}")
    h, w, c = input_shape
    if min(h, w) < 4:
        raise ValueError(f"small_cnn takes images of at least 4x4 pixels, not {h}x{w}")
    padding, image = 1 if kernel == 4 else (1, 2, 1, 2), (h // 4, w // 4, 32)
    children = {
        **_input(mean, std, hidden, classes),
        "conv1": Conv2d(c, 16, kernel, 2, padding, bias=not batchnorm),
        **({"bn1": BatchNorm2d(16, before_relu=True)} if batchnorm else {}),
        "relu1": ReLU(),
        "conv2": Conv2d(16, 32, kernel, 2, padding, bias=not batchnorm),
        **({"bn2": BatchNorm2d(32, before_relu=True)} if batchnorm else {}),
        "relu2": ReLU(),
        "flatten": Flatten(),
        "fc1": Linear(math.prod(image), hidden, bias=not batchnorm, image=image),
        **({"bn3": BatchNorm2d(hidden, before_relu=True)} if batchnorm else {}),
        "relu3": ReLU(),
        "fc2": Linear(hidden, classes),
    }
    return Model(children, "small_cnn", input_shape, seed)


def preact_resnet18(
    seed=0,
    bn_before_fc=True,
    out_shortcut=True,
    jin_v1=False,
    width=64,
    classes=10,
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
    input_shape=(32, 32, 3),
) -> Model:
    """PreActResNet18 for small square images of ``input_shape`` (He et al. 2016); both flags on is their network.

    ``bn_before_fc``: batch norm and ReLU before the pooling. ``out_shortcut``: the 1x1 shortcut convolutions read the
    activated input. ``jin_v1`` (overrides both): the network released with the paper's first version: batch norm and
    ReLU after the first convolution, activated identity shortcuts, none before the pooling. ``width`` scales it.
    """
    if jin_v1:
        bn_before_fc, out_shortcut = False, True
    h, w, c = input_shape
    if h != w:
        raise ValueError(f"preact_resnet18 takes square images, not {h}x{w}")
    children: dict[str, Layer] = {**_input(mean, std, width, classes), "conv1": Conv2d(c, width, 3, 1, 1, bias=False)}
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
    return Model(children, "preact_resnet18", input_shape, seed)


def fold(model: Model) -> Model:
    """The network in which every batch norm right behind a convolution or a linear layer is part of it, running
    statistics and all; ``model`` itself where there is none. Evaluation mode's function, up to rounding."""
    architecture, children, last = model.architecture, [], None
    layers = architecture["layers"]
    for name, layer in model.children.items():
        if isinstance(layer, BatchNorm2d) and last and isinstance(last[1], Conv2d | Linear):
            layers.pop(name)
            layers[last[0]]["bias"] = True
            children.append((*last, layer))
        last = name, layer
    if not children:
        return model
    device = "cpu" if array_module(model.weights) is np else "gpu"
    folded = build(architecture).astype(model.dtype).to(device)
    before = dict(model.walk())
    for path, layer in folded.walk():  # those in a Sequential, too
        for kind in ("params", "buffers"):
            for key, value in getattr(before[path], kind).items():
                getattr(layer, kind)[key][...] = value
    for name, layer, norm in children:
        running = norm.buffers["running_mean"].astype(np.float64), norm.buffers["running_var"].astype(np.float64)
        scale, params = norm.params["weight"] / (running[1] + norm.eps) ** 0.5, folded.children[name].params
        params["weight"][...] = layer.params["weight"] * scale
        params["bias"][...] = (layer.params.get("bias", 0.0) - running[0]) * scale + norm.params["bias"]
    return folded


BUILDERS = {"mlp": mlp, "small_cnn": small_cnn, "preact_resnet18": preact_resnet18}
LAYERS = {
    layer.__name__: layer
    for layer in (
        AveragePool2d,
        BatchNorm2d,
        Conv2d,
        Flatten,
        Linear,
        Normalize,
        PreActBlock,
        ReLU,
        Residual,
        Sequential,
    )
}
MOST = 2**28  # numbers in a network that a file asks for: a gigabyte, and four in training


def build(architecture: dict, seed: int = 0, most: int = MOST) -> Model:
    """A network from its ``architecture``, which may come from anywhere: :attr:`Model.architecture`, or the name of
    one of ``BUILDERS`` with its arguments (a short form, and that of older files).

    Nothing but the constructors of ``LAYERS`` is called. Raises UserError for an architecture that this version does
    not know, that is damaged, or that has more than ``most`` numbers.
    """
    shown = reprlib.repr(architecture)
    if not isinstance(architecture, dict):
        raise UserError(f"unknown network {shown}: an architecture names its layers")
    options = {k: v for k, v in architecture.items() if k != "name"}
    name = architecture.get("name")
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"unknown network {reprlib.repr(name)}: a network has a name")
    try:
        if "layers" not in options:
            if name not in BUILDERS:
                raise UserError(f"unknown network {name[:40]!r}: this version builds {', '.join(BUILDERS)}")
            return BUILDERS[name](seed=seed, **options)
        layers = _children(options.pop("layers"), [most])
        return Model(layers, name, seed=seed, **options)
    except (TypeError, ValueError, IndexError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(
            f"the checkpoint's architecture is of another network or version, or damaged: {error}"
        ) from None


def _children(nodes, room: list[int], where: str = "the network") -> dict[str, Layer]:
    """The layers of a tree's nodes. ``room``: how many numbers they may still have. Raises ValueError."""
    if not isinstance(nodes, dict) or not nodes:
        raise ValueError(f"{where} has no layers")
    layers: dict[str, Layer] = {}
    for name, node in nodes.items():
        options = dict(node) if isinstance(node, dict) else {}
        kind = options.pop("type", None)
        if not isinstance(kind, str) or kind not in LAYERS:
            raise ValueError(
                f"the layer {name[:40]!r} is {reprlib.repr(kind)}, not one of {', '.join(LAYERS)}: build the network "
                "in Python, and give its load_state_dict the file's tensors"
            )
        if kind in ("Sequential", "Residual"):
            layers[name] = LAYERS[kind](_children(options.pop("layers", None), room, f"the layer {name[:40]!r}"))
            if options:
                raise ValueError(f"the layer {name[:40]!r} has {reprlib.repr(list(options))} beside its layers")
            continue
        parameters = inspect.signature(LAYERS[kind].__init__).parameters
        for key, value in options.items():
            if key not in parameters or not _fits(key, value, parameters[key].annotation):
                raise ValueError(f"the layer {name[:40]!r}, {kind}: {key[:40]!r} cannot be {reprlib.repr(value)}")
        layers[name] = LAYERS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
        below = [layer for _, layer in layers[name].walk()]
        room[0] -= sum(a.size for layer in below for a in (*layer.params.values(), *layer.buffers.values()))
        if room[0] < 0:
            raise ValueError(f"with the layer {name[:40]!r} it has more numbers than there is room for")
    return layers


def _fits(name: str, value, kind) -> bool:
    """Is ``value``, from JSON, an argument of the type that a layer's constructor names?"""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, list):  # of any numbers (mean, std), or of whole ones (padding, image)
        each = float if kind is tuple else int
        return bool(value) and isinstance((), kind) and all(_fits(name, v, each) for v in value)
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    low = 0 if name == "padding" else 1
    return isinstance(value, kind) and (value is None or low <= value <= 2**24)


def load(path, device: str = "cpu") -> Model:
    """The network saved at ``path`` (a file, or a run folder), weights and all.

    Raises UserError when the file is missing, damaged, or holds no architecture.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, metadata = checkpoint.load_tensors(path)
    if "architecture" not in metadata:
        raise UserError(f"{path} holds no nanomr network: it was not written by nanomr")
    tensors = {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}
    try:
        model = build(metadata["architecture"], most=sum(v.size for v in tensors.values()))
        model.load_state_dict(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model.to(device)
