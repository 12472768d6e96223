"""The checker's own network: sparse matrices built by this file's own loops. See ``certificate.py``."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array

from ..checkpoint import load_tensors
from ..errors import UserError

U64, U32 = 2.0**-53, 2.0**-24  # unit roundoffs
WIDEST = 2**18  # of a layer
BATCH_NORM_EPS = 1e-5


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


def read_network(path) -> Network:
    """The network in a safetensors file of :meth:`nanomr.models.Model.save` (or a run folder): small_cnn or mlp.

    A batch norm ``bn<i>`` may follow the i-th layer. Raises CertificateError for another network, a tensor too many
    or of the wrong shape, and weights that are not finite float32.
    """
    tensors, metadata = load_tensors(weights_file(path))
    tensors = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
    try:
        architecture = metadata["architecture"]
        if architecture["name"] == "small_cnn":
            kernel = architecture["kernel"]
            padding = {4: (1, 1, 1, 1), 5: (1, 2, 1, 2)}[kernel]
            wrong = [name for name in ("conv1", "conv2") if tensors[f"{name}.weight"].shape[2:] != (kernel, kernel)]
            demand(not wrong, f"{wrong}: the kernels are not {kernel}x{kernel}")
            shape, names = (32, 32, 3), ["conv1", "conv2", "fc1", "fc2"]
        else:
            demand(architecture["name"] == "mlp", f"the checker knows small_cnn and mlp, not {architecture['name']!r}")
            shape, names = tuple(architecture["input_shape"]), [f"fc{i}" for i in range(1, len(architecture["sizes"]))]
            padding = None
        return _build(tensors, shape, names, padding)
    except (KeyError, TypeError, ValueError) as error:
        raise CertificateError(f"{path} is not the network that its metadata says: {error}") from None


def _build(tensors, shape, names, padding) -> Network:
    def take(name):
        value = tensors.pop(name)
        demand(value.dtype == np.float32 and np.isfinite(value).all(), f"{name}: must be finite float32 numbers")
        return value.astype(np.float64)

    def add(weight, bias, size, extra, relu=False):
        weight = csr_array(weight)
        fits = len(bias) == weight.shape[0] and (not maps or weight.shape[1] == maps[-1].weight.shape[0])
        demand(fits and max(weight.shape) <= WIDEST, f"a layer of {weight.shape} numbers does not fit here")
        demand(np.isfinite(weight.data).all() and np.isfinite(bias).all(), "a standard deviation or variance is 0")
        maps.append(Map(relu, weight, abs(weight), bias, size, extra))

    maps: list[Map] = []
    input_shape = shape
    mean, std = (np.broadcast_to(take(f"normalize.{name}").ravel(), shape).ravel() for name in ("mean", "std"))
    with np.errstate(divide="ignore", invalid="ignore"):  # refused by ``add``
        add(diags_array(1 / std), -mean / std, abs(mean / std), extra=2)
    for i, name in enumerate(names, 1):
        weight, bias = take(f"{name}.weight"), take(f"{name}.bias")
        if weight.ndim == 4:
            weight, shape = _convolution(weight, shape, 2, padding)
            bias = np.tile(bias, shape[0] * shape[1])
        else:
            if len(shape) == 3:  # PyTorch flattens CHW, we HWC
                h, w, c = shape
                weight = weight.reshape(-1, c, h, w).transpose(0, 2, 3, 1).reshape(len(weight), h * w * c)
            shape = (len(weight),)
        add(weight, bias, abs(bias), extra=0, relu=i > 1)
        if f"bn{i}.weight" in tensors:
            tensors.pop(f"bn{i}.num_batches_tracked", None)
            weight, bias, mean, var = (take(f"bn{i}.{n}") for n in ("weight", "bias", "running_mean", "running_var"))
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = weight / np.sqrt(var + BATCH_NORM_EPS)
                terms = np.tile([scale, bias - mean * scale, abs(bias) + abs(mean * scale)], math.prod(shape[:-1]))
            add(diags_array(terms[0]), terms[1], terms[2], extra=10)
    demand(not tensors, f"the file holds {min(tensors, default='')!r}, which the checker has no place for")
    n = max(max(m.weight.shape) for m in maps) + 16 * len(maps)
    return Network(maps, input_shape, 8 * gamma(n, U64))


def _convolution(weight, shape, stride, padding):
    """(its matrix, (height, width, channels) of its output), for weight (out, in, kh, kw)."""
    (h, w, c), (out, channels, kh, kw), (top, bottom, left, right) = shape, weight.shape, padding
    demand(channels == c, f"a convolution of {channels} channels does not fit an image of {c}")
    ho, wo = (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1
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
