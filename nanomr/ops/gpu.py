"""CuPy, and our own kernels. The same functions as ``reference``; the kernels are in ``kernels/*.cu``, docs/gpu.md.

The data decides. bfloat16 pictures (``precision="bf16"``) go through our kernels, convolutions on tensor cores; what
belongs to channels or weights (statistics, gradients of parameters, logits) is float32. float32 pictures use our
kernels for all that only moves numbers, and im2col with a matrix product (cuBLAS) for convolutions: simple, any shape,
the oracle of the others. Everything else (float64) takes ``reference``'s formulas.

Nothing here imports CuPy before a kernel is launched on a CuPy array. NumPy arrays take the formulas, unless a test has
put something that runs kernels on a CPU in ``launcher``: tests hold all of this to the reference without a GPU.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .. import rng
from ..backend import array_module
from . import reference
from .reference import conv2d_shape, linf_step, plane_step  # noqa: F401  (the steps of attacks: as they are)

KERNELS = Path(__file__).with_name("kernels")
# Blocks in flight on an H100 (132 multiprocessors, two blocks each), taken for all devices: how a sum is split decides
# its last bits, and these should not depend on the device.
BLOCKS = 264

launcher = None  # (source, defines, name, grid, block, shared bytes, arguments): runs kernels on NumPy arrays, in tests


# --- running kernels --------------------------------------------------------------------------------------------------


@cache
def source(file: str) -> str:
    """A kernel file's text, without ``device.cuh``, which must come before it."""
    return (KERNELS / file).read_text()


@cache
def _function(file, defines, name, shared):
    import cupy

    options = ("-std=c++17", *(f"-D{define}" for define in defines))
    function = cupy.RawModule(code=source("device.cuh") + source(file), options=options).get_function(name)
    if shared > 48 << 10:
        function.max_dynamic_shared_size_bytes = shared
    return function


_NULL = np.uint64(0)
_SCALARS = {int: np.int32, float: np.float32}


def _launch(file, defines, name, grid, threads, arguments, shared=0):
    """Start a kernel. Python's ints and floats are passed as int32 and float32, None as a null pointer."""
    arguments = [_SCALARS.get(type(a), lambda same: same)(a) for a in arguments]
    grid, block = (*grid, 1, 1)[:3], (threads, 1, 1)
    if isinstance(arguments[0], np.ndarray):
        launcher(source(file), defines, name, grid, block, shared, arguments)
    else:
        function = _function(file, defines, name, shared)
        function(grid, block, tuple(_NULL if a is None else a for a in arguments), shared_mem=shared)


def _has_kernels(x, *dtypes):
    """Does a kernel compute on this array? Empty ones are left to the formulas."""
    return (launcher is not None or not isinstance(x, np.ndarray)) and x.dtype.name in (dtypes or _REALS) and x.size > 0


_REALS = {"float32": "float", "bfloat16": "bf16"}


def bfloat16() -> np.dtype:
    """The dtype; NumPy and CuPy know it through the package ml_dtypes."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _ready(x, dtype=None):
    """``x`` as a kernel wants it: contiguous, of this dtype, and aligned to 16 bytes."""
    xp = array_module(x)
    x = xp.ascontiguousarray(x, dtype)
    address = x.ctypes.data if xp is np else x.data.ptr
    return x.copy() if address % 16 else x


def _ceil(a, b):
    return -(-a // b)


def _by_formula(function, *arguments):
    """``reference``'s function, bfloat16 taken as float32: for shapes that no kernel takes. Slow, and correct."""
    dtype = next(a.dtype for a in arguments if hasattr(a, "dtype"))
    if dtype.name != "bfloat16":
        return function(*arguments)
    result = function(*[a.astype(np.float32) if getattr(a, "dtype", None) == dtype else a for a in arguments])
    single = not isinstance(result, tuple)
    converted = [r.astype(dtype) if r.ndim > 1 else r for r in ((result,) if single else result)]
    return converted[0] if single else tuple(converted)


# --- convolution ------------------------------------------------------------------------------------------------------

FORWARD, INPUT, WEIGHT = range(3)  # y, dx, dw


@dataclass(frozen=True)
class Tile:
    """How a block and its warps share out a product; see ``conv.cu``."""

    bm: int
    bn: int
    bk: int = 32
    wm: int = 64
    wn: int = 32
    stages: int = 4

    @property
    def threads(self) -> int:
        return 32 * (self.bm // self.wm) * (self.bn // self.wn)

    def defines(self, direction: int) -> tuple[str, ...]:
        sizes = zip(("BM", "BN", "BK", "WM", "WN", "STAGES"), vars(self).values(), strict=True)
        return f"DIRECTION={direction}", *(f"{name}={value}" for name, value in sizes)

    def shared(self, direction: int) -> int:
        """Bytes of dynamic shared memory: the tiles on their way, or the result's in float32, whichever is more."""
        a = self.bk * (self.bm + 8) if direction == WEIGHT else self.bm * (self.bk + 8)
        b = self.bn * (self.bk + 8) if direction == INPUT else self.bk * (self.bn + 8)
        return max(2 * self.stages * (a + b), 4 * self.bm * (self.bn + 8) if direction != WEIGHT else 0)


NARROW, WIDE, TALL = Tile(128, 64), Tile(128, 128), Tile(192, 64)


@dataclass(frozen=True)
class ConvPlan:
    """One launch of ``conv.cu``: what is computed where. Channels are multiples of 8."""

    direction: int
    tile: Tile
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # the kernel's int arguments
    splits: int = 1  # of the pixels, for dw

    def launch(self, *arrays):
        name = "weight_gradient" if self.direction == WEIGHT else "convolve"
        defines, shared = self.tile.defines(self.direction), self.tile.shared(self.direction)
        _launch("conv.cu", defines, name, self.grid, self.tile.threads, (*arrays, *self.sizes), shared)

    def sum_splits(self, partial, dw):
        """dw = the sum of the splits' ``partial`` (splits, ...), always in the same order."""
        arguments = (partial, dw, dw.size, self.splits)
        _launch("conv.cu", self.tile.defines(WEIGHT), "sum_splits", (_ceil(dw.size, 256),), 256, arguments)


@cache
def conv_plan(direction: int, x_shape, w_shape, stride: int, padding, tile: Tile | None = None) -> ConvPlan:
    """The plan for x (N, H, W, C) and w (kh, kw, C, Cout), all channels multiples of 8. ``tile``: not the usual one."""
    n, h, w, c = x_shape
    _, ho, wo, co = conv2d_shape(x_shape, w_shape, stride, padding)
    kh, kw, top, left = *w_shape[:2], padding[0], padding[2]
    if max(math.prod(x_shape), n * ho * wo * co) >= 2**31:
        raise ValueError(f"a convolution of {x_shape} counts beyond 2^31: use a smaller batch")
    window = (kh, kw, stride, top, left)
    if direction == FORWARD:
        tile = tile or (NARROW if co <= 64 else WIDE)
        grid = (_ceil(n * ho * wo, tile.bm), _ceil(co, tile.bn), 1)
        return ConvPlan(direction, tile, grid, (n, h, w, c, ho, wo, co, *window))
    if direction == INPUT:
        tile = tile or (NARROW if c <= 64 else WIDE)
        largest = n * _ceil(h, stride) * _ceil(w, stride)  # of the stride^2 phases
        grid = (_ceil(largest, tile.bm), _ceil(c, tile.bn), stride * stride)
        return ConvPlan(direction, tile, grid, (n, ho, wo, co, h, w, c, *window))
    terms, pixels = kh * kw * c, n * ho * wo
    tile = tile or (WIDE if co > 64 else TALL if terms > 128 else NARROW)
    tiles = _ceil(terms, tile.bm) * _ceil(co, tile.bn)
    # More splits fill the multiprocessors, in whole waves at best, but each is written and read once. Seconds, roughly:
    multiply, move = 2 * pixels * terms * co / 400e12, 8 * terms * co / 3e12
    most = max(1, min(4 * BLOCKS // tiles, _ceil(pixels, 8 * tile.bk)))  # each split fills the pipeline
    best = min(range(1, most + 1), key=lambda s: multiply * _ceil(tiles * s, BLOCKS) * BLOCKS / (tiles * s) + move * s)
    per_split = _ceil(_ceil(pixels, best), tile.bk) * tile.bk
    splits = _ceil(pixels, per_split)
    grid = (_ceil(terms, tile.bm), _ceil(co, tile.bn), splits)
    return ConvPlan(direction, tile, grid, (n, h, w, c, ho, wo, co, *window, per_split), splits)


def _eights(channels):
    return _ceil(channels, 8) * 8


def _resize_rows(x, to):
    """x (..., C) with ``to`` channels: zeros are added at the end, or channels left out."""
    if x.shape[-1] == to:
        return x
    y = array_module(x).empty((*x.shape[:-1], to), x.dtype)
    real = _REALS[x.dtype.name]
    grid = (min(_ceil(y.size, 256), 16 * BLOCKS),)
    _launch("elementwise.cu", (f"REAL={real}", "WIDTH=1"), "resize_rows", grid, 256, (x, y, y.size, x.shape[-1], to))
    return y


def _bf16(x, channels=None):
    """x (..., C), float32 or bfloat16, as bfloat16 with ``channels`` channels."""
    channels = channels or x.shape[-1]
    if x.dtype.name == "bfloat16":
        return _resize_rows(_ready(x), channels)
    x = _ready(x, np.float32)
    y = array_module(x).empty((*x.shape[:-1], channels), bfloat16())
    grid = (min(_ceil(y.size, 256), 16 * BLOCKS),)
    arguments = (x, y, y.size, x.shape[-1], channels)
    _launch("elementwise.cu", ("REAL=bf16", "WIDTH=1"), "convert", grid, 256, arguments)
    return y


def cast(x, dtype):
    """``x`` (float32 or bfloat16) in the other of the two, or as it is. By our kernels: CuPy's own conversions to and
    from bfloat16 are compiled with CUDA's headers, which need not be installed."""
    if x.dtype == dtype:
        return x
    if not _has_kernels(x) or np.dtype(dtype).name not in _REALS:
        return x.astype(dtype)
    if np.dtype(dtype).name == "bfloat16":
        return _bf16(x)
    x, y = _ready(x), array_module(x).empty(x.shape, np.float32)
    grid = (min(_ceil(x.size, 256), 16 * BLOCKS),)
    _launch("elementwise.cu", ("REAL=bf16", "WIDTH=1"), "widen", grid, 256, (x, y, x.size))
    return y


def _weights(w):
    """w (kh, kw, C, Cout) as bfloat16, both numbers of channels filled up to multiples of 8."""
    kh, kw, c, co = w.shape
    w = _bf16(w, _eights(co))
    return _resize_rows(w.reshape(kh, kw, -1), _eights(c) * _eights(co)).reshape(kh, kw, _eights(c), _eights(co))


def conv2d(x, w, b, stride, padding, plus=None):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    if not _has_kernels(x, "bfloat16"):
        y = _im2col_conv2d(x, w, b, stride, padding)
        return y if plus is None else add(y, plus)
    xp, x, w, co = array_module(x), _bf16(x, _eights(x.shape[3])), _weights(w), shape[3]
    y = xp.empty((*shape[:3], w.shape[3]), x.dtype)
    if b is not None:
        b = _ready(_resize_rows(_ready(b, np.float32), w.shape[3]))
    plus = None if plus is None else _bf16(plus, w.shape[3])
    conv_plan(FORWARD, x.shape, w.shape, stride, tuple(padding)).launch(x, w, b, plus, y)
    return _resize_rows(y, co)


def conv2d_input_gradient(dy, w, stride, padding, x_shape, plus=None):
    if not _has_kernels(dy, "bfloat16"):
        dx = _im2col_input_gradient(dy, w, stride, padding, x_shape)
        return dx if plus is None else add(dx, plus)
    xp, c, w = array_module(dy), x_shape[3], _weights(w)
    dy = _bf16(dy, w.shape[3])
    dx = xp.empty((*x_shape[:3], w.shape[2]), dy.dtype)
    plus = None if plus is None else _bf16(plus, w.shape[2])
    conv_plan(INPUT, dx.shape, w.shape, stride, tuple(padding)).launch(dy, w, None, plus, dx)
    return _resize_rows(dx, c)


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    dw = conv2d_dw(x, dy, w_shape, stride, padding)
    if not _has_kernels(x, "bfloat16"):
        return dw, dy.reshape(-1, w_shape[3]).sum(0)
    return dw, batchnorm_statistics(dy)[0] * (dy.size // dy.shape[3])


def conv2d_dw(x, dy, w_shape, stride, padding):
    """dw of :func:`conv2d_weight_gradient` alone: db is a pass over dy, and most convolutions have no bias."""
    if not _has_kernels(x, "bfloat16"):
        flat = dy.reshape(-1, w_shape[3])
        return (_columns(x, *w_shape[:2], stride, padding).T @ flat).reshape(w_shape)
    xp, (kh, kw, c, co) = array_module(x), w_shape
    x, dy = _bf16(x, _eights(c)), _bf16(dy, _eights(co))
    plan = conv_plan(WEIGHT, x.shape, (kh, kw, x.shape[3], dy.shape[3]), stride, tuple(padding))
    dw = xp.empty((kh, kw, x.shape[3], dy.shape[3]), np.float32)
    partial = dw if plan.splits == 1 else xp.empty((plan.splits, *dw.shape), np.float32)
    plan.launch(x, dy, partial)
    if plan.splits > 1:
        plan.sum_splits(partial, dw)
    return dw[:, :, :c, :co]


def _columns(x, kh, kw, stride, padding):
    """im2col: (N Ho Wo, kh kw C), each row the patch that one output pixel sees."""
    xp, (top, bottom, left, right) = array_module(x), padding
    x = xp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    n, h, w, c = x.shape
    ho, wo = (h - kh) // stride + 1, (w - kw) // stride + 1
    image, row, column, channel = x.strides
    strides = (image, stride * row, stride * column, row, column, channel)
    patches = xp.lib.stride_tricks.as_strided(x, (n, ho, wo, kh, kw, c), strides)
    return patches.reshape(n * ho * wo, kh * kw * c)


def _im2col_conv2d(x, w, b, stride, padding):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    y = _columns(x, *w.shape[:2], stride, padding) @ w.reshape(-1, shape[3])
    if b is not None:
        y += b
    return y.reshape(shape)


def _im2col_input_gradient(dy, w, stride, padding, x_shape):
    xp, (top, bottom, left, right) = array_module(dy), padding
    (kh, kw, c, c_out), (n, h, wd, _), (ho, wo) = w.shape, x_shape, dy.shape[1:3]
    patches = (dy.reshape(-1, c_out) @ w.reshape(-1, c_out).T).reshape(n, ho, wo, kh, kw, c)
    padded = xp.zeros((n, h + top + bottom, wd + left + right, c), dy.dtype)
    for p in range(kh):
        for q in range(kw):
            padded[:, p : p + stride * ho : stride, q : q + stride * wo : stride] += patches[:, :, :, p, q]
    return padded[:, top : top + h, left : left + wd]


def set_tf32(on: bool) -> None:
    """Whether cuBLAS may round float32 factors to TF32 (10 bits of fraction) for its tensor cores. Needs a GPU."""
    from cupy import _core
    from cupy._core import _routines_linalg as types

    _core.set_compute_type(np.float32, types.COMPUTE_TYPE_TF32 if on else types.COMPUTE_TYPE_DEFAULT)


# --- linear -----------------------------------------------------------------------------------------------------------


def _product(a, b, bias=None):
    """a b + bias in float32, any of them transposed. Small ones by our kernel, since CUDA graphs refuse cuBLAS."""
    rows, terms, columns = *a.shape, b.shape[1]
    if not _has_kernels(a, "float32") or rows * terms * columns > 1 << 30:
        product = a @ b
        return product if bias is None else product + bias
    c = array_module(a).empty((rows, columns), np.float32)
    a_row, a_column, b_row, b_column = (s // 4 for s in (*a.strides, *b.strides))
    sizes = (c, rows, columns, terms)
    arguments = (_base(a), a_row, a_column, _base(b), b_row, b_column, bias, *sizes)
    _launch("training.cu", (), "matrix_product", (_ceil(columns, 16), _ceil(rows, 16)), 256, arguments)
    return c


def _base(a):
    """The contiguous array of which ``a`` is the transpose, or ``a`` itself."""
    return a if a.flags.c_contiguous else a.T


def _float32(x):
    """A bfloat16 array as float32; others as they are."""
    return cast(x, np.float32) if x.dtype.name == "bfloat16" else x


def _matrix(x):
    return _ready(x, np.float32) if _has_kernels(x, "float32") else x


def linear(x, w, b):
    """bfloat16 x gives float32 y: logits, and all that comes after the first of these layers, are float32."""
    x = _float32(x)
    return _product(_matrix(x), _matrix(w), b if b is None or not _has_kernels(b, "float32") else _ready(b))


def linear_input_gradient(dy, w):
    return _product(_matrix(_float32(dy)), _matrix(w).T)


def linear_weight_gradient(x, dy):
    x, dy = _matrix(_float32(x)), _matrix(_float32(dy))
    return _product(x.T, dy), dy.sum(0)


# --- batch normalisation, ReLU, Hamming -------------------------------------------------------------------------------

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
    blocks = max(1, min(_ceil(pixels, slots), 2 * BLOCKS))
    parts = max(1, min(_ceil(per_sample, slots), _ceil(2 * BLOCKS, max(samples, 1))))
    defines = (f"REAL={_REALS[dtype]}", f"WIDTH={width}", f"ACTIVATION={activation}")
    return PassPlan(defines, pixels, per_sample, channels, blocks, parts, 8 * slots * channels)


def _plan(x, activation, channels=None):
    """The plan, or None where a formula must do."""
    if not _has_kernels(x):
        return None
    return pass_plan(x.shape, x.dtype.name, activation, channels)


def _floats(*arrays):
    return [None if a is None else _ready(a, np.float32) for a in arrays]


def _activate(plan, x, mean=None, scale=None, shift=None, alpha=0.0, plus=None):
    """activation((x - mean) scale + shift), and each sample's Hamming squares (or None). ``plus`` is added where there
    is no activation."""
    xp, x = array_module(x), _ready(x)
    y, arrays = xp.empty(x.shape, x.dtype), _floats(mean, scale, shift)
    sizes = (plan.channels, float(alpha))
    if plan.defines[-1] != f"ACTIVATION={HAMMING}":
        plus = None if plus is None else _like(plus, x)
        arguments = (x, *arrays, plus, y, None, plan.pixels, *sizes)
        _launch("normalize.cu", plan.defines, "activate", (plan.blocks,), 256, arguments)
        return y, None
    n = len(x) // 3
    partial, squares = xp.empty((n, plan.parts), np.float32), xp.empty(n, np.float32)
    arguments = (x, *arrays, None, y, partial, plan.pixels_per_sample, *sizes)
    _launch("normalize.cu", plan.defines, "activate", (plan.parts, n), 256, arguments)
    _launch("normalize.cu", plan.defines, "sum_rows", (n,), 32, (partial, squares, plan.parts))
    return y, squares


def _activate_backward(plan, dy, x, alpha=0.0, weight=None):
    x, dz = _ready(x), array_module(x).empty(x.shape, x.dtype)
    arguments = (_like(dy, x), x, None, None, None, *_floats(weight), dz, plan.pixels, plan.pixels_per_sample)
    arguments += (plan.channels, float(alpha))
    _launch("normalize.cu", plan.defines, "activate_backward", (plan.blocks,), 256, arguments)
    return dz


def _like(dy, x):
    """``dy``, ready, in the dtype of x: logits and what follows the last layer are float32, pictures bfloat16."""
    return _bf16(dy) if x.dtype.name == "bfloat16" else _ready(dy, x.dtype)


def relu(z):
    plan = _plan(z, RELU)
    return _activate(plan, z)[0] if plan else reference.relu(z)


def relu_backward(dy, z):
    plan = _plan(z, RELU)
    return _activate_backward(plan, dy, z) if plan else reference.relu_backward(dy, z)


def relu_hamming(z, alpha):
    plan = _plan(z, HAMMING)
    return _activate(plan, z, alpha=alpha) if plan else reference.relu_hamming(z, alpha)


def relu_hamming_backward(dy, z, alpha, weight):
    plan = _plan(z, HAMMING)
    if plan:
        return _activate_backward(plan, dy, z, alpha, weight)
    return reference.relu_hamming_backward(dy, z, alpha, weight)


def relu_hamming_pair(u, v, alpha):
    return relu_hamming(expand_pair(u, v), alpha)


def relu_hamming_pair_backward(dy, u, v, alpha, weight):
    return contract_pair(relu_hamming_backward(dy, expand_pair(u, v), alpha, weight))


def normalize(x, mean, std):
    xp, c = array_module(x), x.shape[-1]
    plan = _plan(x, IDENTITY, c)
    if plan is None:
        return reference.normalize(x, mean, std)
    scale = xp.broadcast_to(1 / std, (c,))
    return _activate(plan, x, None if mean is None else xp.broadcast_to(mean, (c,)), scale)[0]


def scale_channels(x, by, plus=None):
    plan = _plan(x, IDENTITY, x.shape[-1])
    return _activate(plan, x, scale=by, plus=plus)[0] if plan else _by_formula(reference.scale_channels, x, by, plus)


def batchnorm_statistics(x):
    c = x.shape[-1]
    plan = _plan(x, IDENTITY, c)
    if plan is None:
        return _by_formula(reference.batchnorm_statistics, x)
    xp, x = array_module(x), _ready(x)
    partial = xp.empty((plan.blocks, 2, c), np.float32)
    mean, var = xp.empty(c, np.float32), xp.empty(c, np.float32)
    _launch("normalize.cu", plan.defines, "moments", (plan.blocks,), 256, (x, partial, plan.pixels, c), plan.shared)
    arguments = (partial, x, mean, var, plan.blocks, c, plan.pixels)
    _launch("normalize.cu", plan.defines, "finish_moments", (c,), 32, arguments)
    return mean, var


def _normalized(activation, x, gamma, beta, mean, inv_std, alpha=0.0):
    """(activation(batchnorm(x)), Hamming squares or None) in one pass; (None, None) where no kernel fits."""
    plan = _plan(x, activation, x.shape[-1])
    return _activate(plan, x, mean, inv_std * gamma, beta, alpha) if plan else (None, None)


def batchnorm(x, gamma, beta, mean, inv_std):
    y, _ = _normalized(IDENTITY, x, gamma, beta, mean, inv_std)
    return _by_formula(reference.batchnorm, x, gamma, beta, mean, inv_std) if y is None else y


def batchnorm_relu(x, gamma, beta, mean, inv_std):
    """relu(batchnorm(x)): one pass instead of two."""
    y, _ = _normalized(RELU, x, gamma, beta, mean, inv_std)
    return relu(batchnorm(x, gamma, beta, mean, inv_std)) if y is None else y


def batchnorm_relu_hamming(x, gamma, beta, mean, inv_std, alpha):
    """relu_hamming(batchnorm(x)): (y, squares) in one pass over x; z is never stored."""
    y, squares = _normalized(HAMMING, x, gamma, beta, mean, inv_std, alpha)
    return relu_hamming(batchnorm(x, gamma, beta, mean, inv_std), alpha) if y is None else (y, squares)


def _channel_gradients(plan, dy, x, mean, scale, shift, inv_std, alpha=0.0, weight=None):
    """(dgamma, dbeta), from dy behind the activation."""
    xp, c = array_module(x), x.shape[-1]
    partial = xp.empty((plan.blocks, 2, c), np.float32)
    arguments = (dy, x, *_floats(mean, scale, shift, weight), partial, plan.pixels, plan.pixels_per_sample, c)
    shared = plan.shared
    _launch("normalize.cu", plan.defines, "channel_gradients", (plan.blocks,), 256, (*arguments, float(alpha)), shared)
    dgamma, dbeta = xp.empty(c, np.float32), xp.empty(c, np.float32)
    arguments = (partial, *_floats(inv_std), dgamma, dbeta, plan.blocks, c)
    _launch("normalize.cu", plan.defines, "finish_gradients", (c,), 32, arguments)
    return dgamma, dbeta


def _normalize_backward(plan, dy, x, mean, scale, shift, inv_std, dgamma, dbeta, plus, alpha=0.0, weight=None):
    xp, c = array_module(x), x.shape[-1]
    dx, plus = xp.empty(x.shape, x.dtype), None if plus is None else _like(plus, x)
    arguments = (dy, x, *_floats(mean, scale, shift, weight, inv_std, dgamma, dbeta), plus, dx)
    sizes = (plan.pixels, plan.pixels_per_sample, c, float(alpha), c / x.size)
    _launch("normalize.cu", plan.defines, "normalize_backward", (plan.blocks,), 256, (*arguments, *sizes))
    return dx


def batchnorm_parameter_gradient(dy, x, mean, inv_std):
    plan = _plan(x, IDENTITY, x.shape[-1])
    if plan is None:
        return _by_formula(reference.batchnorm_parameter_gradient, dy, x, mean, inv_std)
    x = _ready(x)
    return _channel_gradients(plan, _like(dy, x), x, mean, None, None, inv_std)


def batchnorm_backward(dy, x, gamma, mean, inv_std, dgamma, dbeta, plus=None):
    plan = _plan(x, IDENTITY, x.shape[-1])
    if plan is None:
        return _by_formula(reference.batchnorm_backward, dy, x, gamma, mean, inv_std, dgamma, dbeta, plus)
    x = _ready(x)
    return _normalize_backward(plan, _like(dy, x), x, mean, gamma * inv_std, None, inv_std, dgamma, dbeta, plus)


def batchnorm_relu_backward(dy, x, gamma, beta, mean, inv_std, alpha=None, weight=None, plus=None):
    """(dx + plus, dgamma, dbeta) of batchnorm_relu, or, with ``alpha`` and ``weight``, of batchnorm_relu_hamming
    (training mode). dz is computed twice and never stored: two passes that read dy and x, one of them writes dx."""
    activation = RELU if alpha is None else HAMMING
    plan, alpha = _plan(x, activation, x.shape[-1]), alpha or 0.0
    if plan is None:
        z = batchnorm(x, gamma, beta, mean, inv_std)
        dz = relu_backward(dy, z) if activation == RELU else relu_hamming_backward(dy, z, alpha, weight)
        dgamma, dbeta = batchnorm_parameter_gradient(dz, x, mean, inv_std)
        return batchnorm_backward(dz, x, gamma, mean, inv_std, dgamma, dbeta, plus), dgamma, dbeta
    x = _ready(x)
    normal = (_like(dy, x), x, mean, gamma * inv_std, beta, inv_std)
    dgamma, dbeta = _channel_gradients(plan, *normal, alpha, weight)
    return _normalize_backward(plan, *normal, dgamma, dbeta, plus, alpha, weight), dgamma, dbeta


# --- pairs and pooling ------------------------------------------------------------------------------------------------


def _moves(name, x, width_of, arrays, count, *sizes):
    """Launch a kernel of elementwise.cu over ``count`` numbers, 16 bytes at a time if ``width_of`` is a multiple."""
    most = 16 // x.dtype.itemsize
    width = most if width_of % most == 0 else 1
    count //= width
    defines, grid = (f"REAL={_REALS[x.dtype.name]}", f"WIDTH={width}"), (max(1, min(_ceil(count, 256), 16 * BLOCKS)),)
    _launch(
        "elementwise.cu", defines, name, grid, 256, (*arrays, count, *(s(width) if callable(s) else s for s in sizes))
    )


def add(a, b):
    """a + b, of one dtype: a residual connection."""
    if not _has_kernels(a):
        return a + b
    a, b, c = _ready(a), _ready(b), array_module(a).empty(a.shape, a.dtype)
    _moves("add", a, a.size, (a, b, c), a.size)
    return c


def expand_pair(u, v):
    if not _has_kernels(u):
        return reference.expand_pair(u, v)
    u, v, y = _ready(u), _ready(v), array_module(u).empty((3 * len(u), *u.shape[1:]), u.dtype)
    _moves("expand_pair", u, u.size, (u, v, y), u.size)
    return y


def contract_pair(dy):
    if not _has_kernels(dy):
        return reference.contract_pair(dy)
    xp, dy, shape = array_module(dy), _ready(dy), (len(dy) // 3, *dy.shape[1:])
    du, dv = xp.empty(shape, dy.dtype), xp.empty(shape, dy.dtype)
    _moves("contract_pair", dy, du.size, (dy, du, dv), du.size)
    return du, dv


def average_pool(x, window):
    if not _has_kernels(x):
        return reference.average_pool(x, window)
    n, h, w, c = x.shape
    x, y = _ready(x), array_module(x).empty((n, h // window, w // window, c), x.dtype)
    _moves("average_pool", x, c, (x, y), y.size, *y.shape[1:3], lambda width: c // width, window, window**-2.0)
    return y


def average_pool_backward(dy, window):
    if not _has_kernels(dy):
        return reference.average_pool_backward(dy, window)
    n, h, w, c = dy.shape
    dy, dx = _ready(dy), array_module(dy).empty((n, h * window, w * window, c), dy.dtype)
    _moves("average_pool_backward", dy, c, (dy, dx), dx.size, h, w, lambda width: c // width, window, window**-2.0)
    return dx


# --- training ---------------------------------------------------------------------------------------------------------


def _over(name, count, arguments):
    """Launch a kernel of training.cu over ``count`` numbers."""
    _launch("training.cu", (), name, (max(1, min(_ceil(count, 256), 16 * BLOCKS)),), 256, arguments)


def _scalar(xp, value, dtype=np.float32):
    """A number for a kernel that reads it from memory; a 0-d array on the device stays there."""
    return xp.asarray(value, dtype).reshape(1)


def losses(logits, labels, gamma=None):
    """([cross-entropy, intrinsic], gradient by the logits) in one launch, all on the device.

    logits (N, K): cross-entropy alone. (3 N, K) with ``gamma``: cross-entropy of the first N, plus ``gamma`` times
    :func:`nanomr.losses.intrinsic` of the two others; the values come without gamma. labels (N,).
    """
    xp, logits = array_module(logits), _ready(logits, np.float32)
    branches = 1 if gamma is None else 3
    n, classes = len(logits) // branches, logits.shape[1]
    gradient, values = xp.empty(logits.shape, np.float32), xp.empty(2, np.float32)
    scale = None if gamma is None else _scalar(xp, gamma)
    arguments = (logits, _ready(labels, np.int32), scale, gradient, values, n, classes, branches)
    _launch("training.cu", (), "losses", (1,), 256, arguments)
    return values, gradient


def norm(x):
    """The l2 norm of x (n,), as a 0-d array. Not a dot product of cuBLAS, which a CUDA graph refuses."""
    if not _has_kernels(x, "float32"):
        return (x @ x) ** 0.5
    xp, blocks = array_module(x), min(_ceil(x.size, 256), BLOCKS)
    partial, total = xp.empty(blocks, np.float32), xp.empty((), np.float32)
    _launch("training.cu", (), "sum_squares", (blocks,), 256, (_ready(x), partial, x.size))
    defines = ("REAL=float", "WIDTH=1", f"ACTIVATION={IDENTITY}")
    _launch("normalize.cu", defines, "sum_rows", (1,), 32, (partial, total, blocks))
    return total**0.5


def begin_step(step, order, labels, schedule, n: int):
    """(index (n,), labels (n,), [lr, eps, gamma_i, gamma_h]) of training step ``step``, a uint64 array (1,).

    order (steps n,), schedule (steps, 4), of an epoch; labels: of all images. int32 and float32, all on the device.
    """
    xp = array_module(step)
    index, chosen, now = xp.empty(n, np.int32), xp.empty(n, np.int32), xp.empty(4, np.float32)
    _over("begin_step", n, (step, order, labels, schedule, index, chosen, now, n, len(schedule)))
    return index, chosen, now


def end_step(values, now, totals, peaks, step):
    """Add a step's ``values`` [loss, cross-entropy, intrinsic, hamming, gradient norm] (0-d arrays, or None) to
    ``totals`` (5,), keep ``peaks`` (2,), both float64, and count ``step`` up: what the host does on a CPU."""
    values = [_ready(v, np.float32) if hasattr(v, "dtype") else None for v in values]  # 0.0 without any ReLU
    _launch("training.cu", (), "end_step", (1,), 1, (*values, now, totals, peaks, step))


def sgd_update(w, g, velocity, lr, momentum, weight_decay):
    if not (_has_kernels(w, "float32") and w.flags.c_contiguous and velocity.flags.c_contiguous):
        return reference.sgd_update(w, g, velocity, lr, momentum, weight_decay)
    rate = _scalar(array_module(w), lr)
    _over("sgd_update", w.size, (w, _ready(g), velocity, w.size, rate, float(momentum), float(weight_decay)))


def crop_flip(images, index, top, left, flip, pad=4):
    xp, (n, (h, w, c)) = array_module(images), (len(index), images.shape[1:])
    if launcher is not None or xp is not np:
        out = xp.empty((n, h, w, c), np.float32)
        drawn = [_ready(v, np.int32) for v in (index, top, left, flip)]
        _over("crop_flip", out.size, (_ready(images), *drawn, out, n, h, w, c, pad))
        return out
    padded = xp.pad(images[index], ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    column = xp.arange(w)
    rows = top[:, None] + xp.arange(h)
    columns = left[:, None] + xp.where(flip[:, None], w - 1 - column, column)
    crop = padded[xp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crop * xp.float32(1 / 255)


def corners(words, shape, eps):
    xp, count = array_module(words), math.prod(shape)
    if launcher is not None or xp is not np:
        rho = xp.empty(shape, np.float32)
        _over("corners", count, (_ready(words, np.uint64), rho, count, float(eps)))
        return rho
    bits = ((words[:, None] >> xp.arange(64, dtype=xp.uint64)) & xp.uint64(1)).ravel()[:count]
    return (xp.float32(eps) * (1 - 2 * bits.astype(xp.float32))).reshape(shape)


def draw_corners(shape, eps, seed: int, step):
    """What :func:`nanomr.manifold.corner_pairs` draws, bit by bit, drawn on the device. ``step``: a uint64 array (1,)
    there, so that a captured graph may count it up; ``eps`` a number or a 0-d array."""
    xp, count = array_module(step), math.prod(shape)
    rho = xp.empty(shape, np.float32)
    arguments = (rho, count, np.uint64(seed), np.uint64(rng.CORNERS), step, _scalar(xp, eps))
    _over("draw_corners", _ceil(count, 256), arguments)
    return rho


def draw_augmentation(n: int, seed: int, step):
    """(top, left, flip), int32 (n,): what a generator of this seed and step gives for ``integers(0, 9, n)``, twice, and
    ``random(n) < 0.5``, drawn on the device. ``step``: a uint64 array (1,) there."""
    xp = array_module(step)
    top, left, flip = (xp.empty(n, np.int32) for _ in range(3))
    arguments = (top, left, flip, n, np.uint64(seed), np.uint64(rng.AUGMENT), step)
    _launch("training.cu", (), "draw_augmentation", (1,), 1, arguments)
    return top, left, flip
