"""The launches of ``kernels/normalize.cu``: batch normalisation, ReLU and the Hamming regulariser, fused."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from ...backend import array_module
from . import plain
from .cuda import BLOCKS, REALS, ceil, has_kernels, launch, ready
from .elementwise import contract_pair, expand_pair, to_bf16

IDENTITY, RELU, HAMMING = range(3)  # what follows a normalisation


@dataclass(frozen=True)
class PassPlan:
    """How ``normalize.cu`` walks over pictures. A branch has ``pixels`` of ``channels`` each."""

    defines: tuple[str, ...]
    pixels: int
    pixels_per_sample: int
    channels: int
    blocks: int  # of 256 threads, over all pixels of a branch
    parts: int  # blocks for one sample
    shared: int  # bytes, for sums over channels


@cache
def pass_plan(shape, dtype: str, activation: int, channels: int | None) -> PassPlan | None:
    """The plan for pictures of this ``shape``: (3 N, ...) with HAMMING. ``channels``: None where nothing belongs to
    them, so that a "pixel" may be any few numbers. None if there are more channels than the kernels take."""
    samples = shape[0] // 3 if activation == HAMMING else shape[0]
    features = math.prod(shape[1:])
    most = 16 // np.dtype("f4" if dtype == "float32" else "i2").itemsize
    width = most if (channels or features) % most == 0 else 1
    channels = channels or width
    columns = channels // width
    if columns > 256:
        return None
    slots, per_sample = 256 // columns, features // channels
    pixels = samples * per_sample
    blocks = max(1, min(ceil(pixels, slots), 2 * BLOCKS))
    parts = max(1, min(ceil(per_sample, slots), ceil(2 * BLOCKS, max(samples, 1))))
    defines = (f"REAL={REALS[dtype]}", f"WIDTH={width}", f"ACTIVATION={activation}")
    return PassPlan(defines, pixels, per_sample, channels, blocks, parts, 8 * slots * channels)


def _plan(x, activation, channels=None):
    """The plan, or None where a formula must do."""
    if not has_kernels(x):
        return None
    return pass_plan(x.shape, x.dtype.name, activation, channels)


def _floats(*arrays):
    return [None if a is None else ready(a, np.float32) for a in arrays]


def _activate(plan, x, mean=None, gamma=None, inv_std=None, shift=None, alpha=0.0, plus=None):
    """activation((x - mean) gamma inv_std + shift), and each sample's Hamming squares (or None). ``plus`` is added
    where there is no activation."""
    xp, x = array_module(x), ready(x)
    y, arrays = xp.empty(x.shape, x.dtype), _floats(mean, gamma, inv_std, shift)
    sizes = (plan.channels, float(alpha))
    if plan.defines[-1] != f"ACTIVATION={HAMMING}":
        plus = None if plus is None else _like(plus, x)
        arguments = (x, *arrays, plus, y, None, plan.pixels, *sizes)
        launch("normalize.cu", plan.defines, "activate", (plan.blocks,), 256, arguments)
        return y, None
    n = len(x) // 3
    partial, squares = xp.empty((n, plan.parts), np.float32), xp.empty(n, np.float32)
    arguments = (x, *arrays, None, y, partial, plan.pixels_per_sample, *sizes)
    launch("normalize.cu", plan.defines, "activate", (plan.parts, n), 256, arguments)
    launch("normalize.cu", plan.defines, "sum_rows", (n,), 32, (partial, squares, plan.parts))
    return y, squares


def _activate_backward(plan, dy, x, alpha=0.0, weight=None):
    x, dz = ready(x), array_module(x).empty(x.shape, x.dtype)
    arguments = (_like(dy, x), x, *_floats(weight), dz, plan.pixels, plan.pixels_per_sample)
    arguments += (plan.channels, float(alpha))
    launch("normalize.cu", plan.defines, "activate_backward", (plan.blocks,), 256, arguments)
    return dz


def _like(dy, x):
    """``dy``, ready, in the dtype of x: logits and what follows the last layer are float32, pictures bfloat16."""
    return to_bf16(dy) if x.dtype.name == "bfloat16" else ready(dy, x.dtype)


def relu(z):
    plan = _plan(z, RELU)
    return _activate(plan, z)[0] if plan else plain.relu(z)


def relu_backward(dy, z):
    plan = _plan(z, RELU)
    return _activate_backward(plan, dy, z) if plan else plain.relu_backward(dy, z)


def relu_hamming(z, alpha):
    plan = _plan(z, HAMMING)
    return _activate(plan, z, alpha=alpha) if plan else plain.relu_hamming(z, alpha)


def relu_hamming_backward(dy, z, alpha, weight):
    plan = _plan(z, HAMMING)
    if plan:
        return _activate_backward(plan, dy, z, alpha, weight)
    return plain.relu_hamming_backward(dy, z, alpha, weight)


def relu_hamming_pair(u, v, alpha):
    return relu_hamming(expand_pair(u, v), alpha)


def relu_hamming_pair_backward(dy, u, v, alpha, weight):
    return contract_pair(relu_hamming_backward(dy, expand_pair(u, v), alpha, weight))


def normalize(x, mean, std):
    xp, c = array_module(x), x.shape[-1]
    plan = _plan(x, IDENTITY, c)
    if plan is None:
        return plain.normalize(x, mean, std)
    scale = xp.broadcast_to(1 / std, (c,))
    return _activate(plan, x, None if mean is None else xp.broadcast_to(mean, (c,)), scale)[0]


def scale_channels(x, by, plus=None):
    plan = _plan(x, IDENTITY, x.shape[-1])
    return _activate(plan, x, gamma=by, plus=plus)[0] if plan else plain.scale_channels(x, by, plus)


def batchnorm_statistics(x):
    plan = _plan(x, IDENTITY, x.shape[-1])
    if plan is None:
        return plain.batchnorm_statistics(x)
    mean, var = (array_module(x).empty(x.shape[-1], np.float32) for _ in range(2))
    _moments(plan, x, (mean, var, None, None, None, None))
    return mean, var


def batchnorm_training(x, eps, momentum, running_mean, running_var, num_batches_tracked):
    """(mean, inv_std) of a batch, which the running statistics follow and count; None where no kernel fits."""
    plan = _plan(x, IDENTITY, x.shape[-1])
    if plan is None:
        return None
    mean, inv_std = (array_module(x).empty(x.shape[-1], np.float32) for _ in range(2))
    running = running_mean, running_var, num_batches_tracked
    _moments(plan, x, (mean, None, inv_std, *running), eps, momentum)
    return mean, inv_std


def _moments(plan, x, results, eps=0.0, momentum=0.0):
    x, c = ready(x), x.shape[-1]
    partial = array_module(x).empty((plan.blocks, 2, c), np.float32)
    launch("normalize.cu", plan.defines, "moments", (plan.blocks,), 256, (x, partial, plan.pixels, c), plan.shared)
    sizes = (plan.blocks, c, plan.pixels, float(eps), float(momentum))
    launch("normalize.cu", plan.defines, "finish_moments", (c,), 32, (partial, x, *results, *sizes))


def _normalized(activation, x, gamma, beta, mean, inv_std, alpha=0.0):
    """(activation(batchnorm(x)), Hamming squares or None) in one pass; (None, None) where no kernel fits."""
    plan = _plan(x, activation, x.shape[-1])
    return _activate(plan, x, mean, gamma, inv_std, beta, alpha) if plan else (None, None)


def batchnorm(x, gamma, beta, mean, inv_std):
    y, _ = _normalized(IDENTITY, x, gamma, beta, mean, inv_std)
    return plain.batchnorm(x, gamma, beta, mean, inv_std) if y is None else y


def batchnorm_relu(x, gamma, beta, mean, inv_std):
    """relu(batchnorm(x)): one pass instead of two."""
    y, _ = _normalized(RELU, x, gamma, beta, mean, inv_std)
    return plain.batchnorm_relu(x, gamma, beta, mean, inv_std) if y is None else y


def batchnorm_relu_hamming(x, gamma, beta, mean, inv_std, alpha):
    """relu_hamming(batchnorm(x)): (y, squares) in one pass over x; z is never stored."""
    y, squares = _normalized(HAMMING, x, gamma, beta, mean, inv_std, alpha)
    if y is None:
        return plain.batchnorm_relu_hamming(x, gamma, beta, mean, inv_std, alpha)
    return y, squares


def _channel_gradients(plan, dy, x, mean, gamma, inv_std, shift, alpha=0.0, weight=None, into=(None, None)):
    """(dgamma, dbeta), from dy behind the activation; added to ``into``, too."""
    xp, c = array_module(x), x.shape[-1]
    partial = xp.empty((plan.blocks, 2, c), np.float32)
    arrays = _floats(mean, gamma, inv_std, shift, weight)
    arguments = (dy, x, *arrays, partial, plan.pixels, plan.pixels_per_sample, c, float(alpha))
    launch("normalize.cu", plan.defines, "channel_gradients", (plan.blocks,), 256, arguments, plan.shared)
    dgamma, dbeta = xp.empty(c, np.float32), xp.empty(c, np.float32)
    arguments = (partial, *_floats(inv_std), dgamma, dbeta, *into, plan.blocks, c)
    launch("normalize.cu", plan.defines, "finish_gradients", (c,), 32, arguments)
    return dgamma, dbeta


def _normalize_backward(plan, dy, x, mean, gamma, inv_std, shift, dgamma, dbeta, plus, alpha=0.0, weight=None):
    xp, c = array_module(x), x.shape[-1]
    dx, plus = xp.empty(x.shape, x.dtype), None if plus is None else _like(plus, x)
    arguments = (dy, x, *_floats(mean, gamma, inv_std, shift, weight, dgamma, dbeta), plus, dx)
    sizes = (plan.pixels, plan.pixels_per_sample, c, float(alpha), c / x.size)
    launch("normalize.cu", plan.defines, "normalize_backward", (plan.blocks,), 256, (*arguments, *sizes))
    return dx


def batchnorm_parameter_gradient(dy, x, mean, inv_std):
    plan = _plan(x, IDENTITY, x.shape[-1])
    if plan is None:
        return plain.batchnorm_parameter_gradient(dy, x, mean, inv_std)
    x = ready(x)
    return _channel_gradients(plan, _like(dy, x), x, mean, None, inv_std, None)


def batchnorm_backward(dy, x, gamma, mean, inv_std, dgamma, dbeta, plus=None):
    plan = _plan(x, IDENTITY, x.shape[-1])
    if plan is None:
        return plain.batchnorm_backward(dy, x, gamma, mean, inv_std, dgamma, dbeta, plus)
    x = ready(x)
    return _normalize_backward(plan, _like(dy, x), x, mean, gamma, inv_std, None, dgamma, dbeta, plus)


def batchnorm_relu_backward(
    dy, x, gamma, beta, mean, inv_std, alpha=None, weight=None, plus=None, train=True, into=None, over=None
):
    """(dx + plus, dgamma, dbeta) of batchnorm_relu, or, with ``alpha`` and ``weight``, of batchnorm_relu_hamming.
    dz is computed twice and never stored: two passes that read dy and x, one of them writes dx. Without ``train``, mean
    and inv_std are constants. ``into``: two arrays to which dgamma and dbeta are added. ``over``: see the formula."""
    plan = _plan(x, RELU if alpha is None else HAMMING, x.shape[-1])
    if plan is None:
        return plain.batchnorm_relu_backward(dy, x, gamma, beta, mean, inv_std, alpha, weight, plus, train, into, over)
    x, alpha = ready(x), alpha or 0.0
    normal = (_like(dy, x), x, mean, gamma, inv_std, beta)
    dgamma = dbeta = None
    if train or into is not None:
        dgamma, dbeta = _channel_gradients(plan, *normal, alpha, weight, into or (None, None))
    moves = (dgamma, dbeta) if train else array_module(x).zeros((2, len(mean)), np.float32)
    moves = over(*moves) if over and train else moves
    return _normalize_backward(plan, *normal, *moves, plus, alpha, weight), dgamma, dbeta
