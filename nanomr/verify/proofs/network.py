"""The checker's own network: sparse matrices built by this file's own loops. See ``checker.py``."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array

from ...checkpoint import load_tensors
from ...errors import UserError

U64, U32 = 2.0**-53, 2.0**-24  # unit roundoffs
WIDEST = 2**18  # of a layer


class CertificateError(UserError):
    """A claim that does not hold, or that cannot be checked."""


def gamma(n, u):
    """n u / (1 - n u): the relative error of n roundings in a row. Higham 2002, lemma 3.1."""
    return n * u / (1 - n * u)


def demand(fine, message: str):
    """Raise CertificateError unless ``fine``."""
    if not fine:
        raise CertificateError(message)


def weights_file(path) -> Path:
    """The safetensors file: ``path``, or the one in that run folder."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


class Map(NamedTuple):
    """y = weight x + bias, images flattened in NHWC order; x is relu(the map's input) if ``relu``."""

    relu: bool
    weight: csr_array
    absolute: csr_array  # |weight|
    bias: np.ndarray
    size: np.ndarray  # |bias|, or the absolute sum of what it was computed from
    extra: int  # float32 roundings of a term beside those of the product and the sum


class Network(NamedTuple):
    maps: list[Map]
    input_shape: tuple
    slack: float  # rounding error of any sum of the checker's, per unit of the sum's absolute value
    sums: bool = True  # does float32 compute the sums of these products, too? Not where a 3 x 3 window goes by Winograd


def read_network(path) -> Network:
    """The network in a safetensors file of :meth:`nanomr.models.Model.save` (or a run folder), by the layers that its
    header names: a chain of convolutions, linear layers, batch norms, average pooling and ReLUs.

    Raises CertificateError for another network, a tensor too many or of the wrong shape, and weights that are not
    finite float32.
    """
    tensors, metadata = load_tensors(weights_file(path))
    tensors = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
    try:
        architecture = metadata["architecture"]
        nodes = architecture["layers"] if "layers" in architecture else _short(architecture)
        return _build(tensors, tuple(architecture.get("input_shape", (32, 32, 3))), nodes)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CertificateError(f"{path} is not the network that its metadata says: {error}") from None


def _short(architecture) -> dict:
    """The layers of older files, which name the network alone."""
    name = architecture["name"]
    demand(name in ("small_cnn", "mlp"), f"the checker knows the short names small_cnn and mlp, not {name!r}")
    linear, nodes = [{"type": "Linear", "image": [8, 8, 32]}, {"type": "Linear"}], {"normalize": {"type": "Normalize"}}
    if name == "small_cnn":
        padding = {4: [1, 1, 1, 1], 5: [1, 2, 1, 2]}[architecture["kernel"]]
        for i in (1, 2):
            conv = {"type": "Conv2d", "kernel": architecture["kernel"], "stride": 2, "padding": padding}
            nodes |= {f"conv{i}": conv, f"relu{i}": {"type": "ReLU"}}
    else:
        inputs = architecture["input_shape"]
        linear = [{"type": "Linear", "image": inputs if i == 1 else None} for i in range(1, len(architecture["sizes"]))]
    nodes["flatten"] = {"type": "Flatten"}
    for i, node in enumerate(linear, 1):
        nodes |= {f"fc{i}": node} | ({f"relu after fc{i}": {"type": "ReLU"}} if i < len(linear) else {})
    return nodes


def _leaves(nodes, prefix=""):
    """(dotted name, node) of everything that a chain of Sequentials holds."""
    for name, node in nodes.items():
        if node["type"] == "Sequential":
            yield from _leaves(node["layers"], f"{prefix}{name}.")
        else:
            yield prefix + name, node


def _build(tensors, shape, nodes) -> Network:
    def take(name, *shape):
        value = tensors.pop(name)
        demand(value.dtype == np.float32 and np.isfinite(value).all(), f"{name}: must be finite float32 numbers")
        demand(not shape or value.shape == shape, f"{name}: its shape is {value.shape}, not {shape}")
        return value.astype(np.float64)

    def add(weight, bias, size, extra):
        weight = csr_array(weight)
        before = maps[-1].weight.shape[0] if maps else math.prod(input_shape)
        fits = len(bias) == weight.shape[0] and weight.shape[1] == before and max(weight.shape) <= WIDEST
        demand(fits, f"a layer of {weight.shape} numbers does not fit here")
        demand(np.isfinite(weight.data).all() and np.isfinite(bias).all(), "a standard deviation or variance is 0")
        maps.append(Map(relu, weight, abs(weight), bias, size, extra))

    def add_per_channel(scale, shift, size, extra):  # of the last axis
        terms = np.stack([np.broadcast_to(v, shape).ravel() for v in (scale, shift, size)])
        add(diags_array(terms[0]), terms[1], terms[2], extra)

    def add_identity():
        size = math.prod(shape)
        add(diags_array(np.ones(size)), np.zeros(size), np.zeros(size), extra=0)

    maps: list[Map] = []
    sums = True
    input_shape, relu = shape, False  # relu: does the next map take the ReLU of what the last one gave?
    demand(len(shape) == 3 and all(type(n) is int and n > 0 for n in shape), f"images cannot be of shape {shape}")
    for name, node in _leaves(nodes):
        demand(math.prod(shape) <= WIDEST, f"a layer of {math.prod(shape)} numbers does not fit here")
        kind = node["type"]
        if kind == "ReLU":
            if relu:  # two in a row
                add_identity()
            relu = True
            continue
        if kind == "Flatten":
            shape = (math.prod(shape),)
            continue
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is refused by ``add``
            if kind == "Normalize":
                mean, std = (take(f"{name}.{part}").ravel() for part in ("mean", "std"))
                add_per_channel(1 / std, -mean / std, abs(mean / std), extra=2)
            elif kind == "BatchNorm2d":
                tensors.pop(f"{name}.num_batches_tracked", None)
                parts = ("weight", "bias", "running_mean", "running_var")
                weight, bias, mean, var = (take(f"{name}.{part}", shape[-1]) for part in parts)
                scale = weight / np.sqrt(var + float(node["eps"]))
                add_per_channel(scale, bias - mean * scale, abs(bias) + abs(mean * scale), extra=10)
            elif kind == "Conv2d":
                demand(len(shape) == 3, f"{name}: a convolution of what is no image")
                weight, padding = take(f"{name}.weight"), node["padding"]
                kernel, stride = node["kernel"], node["stride"]
                demand(weight.shape[2:] == (kernel, kernel), f"{name}: the kernel is not {kernel}x{kernel}")
                padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
                demand(type(stride) is int and stride > 0, f"{name}: the stride cannot be {stride}")
                bias = take(f"{name}.bias", len(weight)) if node.get("bias", True) else np.zeros(len(weight))
                sums = sums and not (kernel == 3 and stride == 1)
                weight, shape = _convolution(weight, shape, stride, padding)
                bias = np.tile(bias, shape[0] * shape[1])
                add(weight, bias, abs(bias), extra=0)
            elif kind == "Linear":
                demand(len(shape) == 1, f"{name}: a linear layer without a Flatten before it")
                weight = take(f"{name}.weight")
                bias = take(f"{name}.bias") if node.get("bias", True) else np.zeros(len(weight))
                if node.get("image"):  # PyTorch flattens CHW, we HWC
                    h, w, c = node["image"]
                    weight = weight.reshape(-1, c, h, w).transpose(0, 2, 3, 1).reshape(len(weight), h * w * c)
                shape = (len(weight),)
                add(weight, bias, abs(bias), extra=0)
            elif kind == "AveragePool2d":
                weight, shape = _pooling(node["window"], shape)
                add(weight, np.zeros(weight.shape[0]), np.zeros(weight.shape[0]), extra=2)
            else:
                demand(False, f"{name}: the checker does not know {kind!r}")
        relu = False
    if relu:
        add_identity()
    demand(maps and len(shape) == 1, "it does not end in logits")
    demand(not tensors, f"the file holds {min(tensors, default='')!r}, which the checker has no place for")
    n = max(max(m.weight.shape) for m in maps) + 16 * len(maps)
    return Network(maps, input_shape, 8 * gamma(n, U64), sums)


def _pooling(window, shape):
    """(the matrix of the mean over window x window tiles, (height, width, channels) of its output)."""
    h, w, c = shape
    window = h if window is None else window
    demand(type(window) is int and window > 0, f"tiles cannot be {window} wide")
    demand(h % window == 0 and w % window == 0, f"a {h}x{w} image cannot be pooled by {window}x{window} tiles")
    ho, wo = h // window, w // window
    y, x, k = np.indices(shape).reshape(3, -1)
    rows = ((y // window) * wo + x // window) * c + k
    columns = (y * w + x) * c + k
    return coo_array((np.full(h * w * c, 1 / window**2), (rows, columns)), (ho * wo * c, h * w * c)), (ho, wo, c)


def _convolution(weight, shape, stride, padding):
    """(its matrix, (height, width, channels) of its output), for weight (out, in, kh, kw)."""
    (h, w, c), (out, channels, kh, kw), (top, bottom, left, right) = shape, weight.shape, padding
    demand(channels == c, f"a convolution of {channels} channels does not fit an image of {c}")
    ho, wo = (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1
    demand(min(padding) >= 0 < min(ho, wo) and ho * wo * out <= WIDEST, f"a convolution from {shape} does not fit here")
    rows, columns, values = [], [], []
    for i, j, p, q in np.ndindex(ho, wo, kh, kw):
        y, x = stride * i + p - top, stride * j + q - left
        if 0 <= y < h and 0 <= x < w:  # outside is padding: zeros behind the normalisation
            o, k = np.indices((out, c))
            rows.append((i * wo + j) * out + o)
            columns.append((y * w + x) * c + k)
            values.append(weight[:, :, p, q])
    rows, columns, values = (np.concatenate(part, None) for part in (rows, columns, values))
    return coo_array((values, (rows, columns)), (ho * wo * out, h * w * c)), (ho, wo, out)
