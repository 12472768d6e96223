"""The launches of ``kernels/elementwise.cu``: conversions, sums of two pictures, pairs, pooling."""

import numpy as np

from ...backend import array_module
from .. import bfloat16
from . import plain
from .cuda import REALS, grid_over, has_kernels, launch, ready

# --- conversions ------------------------------------------------------------------------------------------------------


def resize_rows(x, to):
    """x (..., C) with ``to`` channels: zeros are added at the end, or channels left out."""
    if x.shape[-1] == to:
        return x
    y = array_module(x).empty((*x.shape[:-1], to), x.dtype)
    defines, arguments = (f"REAL={REALS[x.dtype.name]}", "WIDTH=1"), (x, y, y.size, x.shape[-1], to)
    launch("elementwise.cu", defines, "resize_rows", grid_over(y.size), 256, arguments)
    return y


def to_bf16(x, channels=None):
    """x (..., C), float32 or bfloat16, as bfloat16 with ``channels`` channels."""
    channels = channels or x.shape[-1]
    if x.dtype.name == "bfloat16":
        return resize_rows(ready(x), channels)
    x = ready(x, np.float32)
    y = array_module(x).empty((*x.shape[:-1], channels), bfloat16())
    arguments = (x, y, y.size, x.shape[-1], channels)
    launch("elementwise.cu", ("REAL=bf16", "WIDTH=1"), "convert", grid_over(y.size), 256, arguments)
    return y


def cast(x, dtype):
    """``x`` (float32 or bfloat16) in the other of the two, or as it is; other dtypes as NumPy and CuPy convert them."""
    if x.dtype == dtype:
        return x
    if not has_kernels(x) or np.dtype(dtype).name not in REALS:
        return plain.cast(x, dtype)
    if np.dtype(dtype).name == "bfloat16":
        return to_bf16(x)
    x, y = ready(x), array_module(x).empty(x.shape, np.float32)
    launch("elementwise.cu", ("REAL=bf16", "WIDTH=1"), "widen", grid_over(x.size), 256, (x, y, x.size))
    return y


# --- sums, pairs, pooling ---------------------------------------------------------------------------------------------


def _moves(name, x, width_of, arrays, count, *sizes):
    """Launch a kernel of elementwise.cu over ``count`` numbers, 16 bytes at a time if ``width_of`` is a multiple."""
    most = 16 // x.dtype.itemsize
    width = most if width_of % most == 0 else 1
    count //= width
    defines = (f"REAL={REALS[x.dtype.name]}", f"WIDTH={width}")
    sizes = (s(width) if callable(s) else s for s in sizes)
    launch("elementwise.cu", defines, name, grid_over(count), 256, (*arrays, count, *sizes))


def add(a, b):
    """a + b, of one dtype: a residual connection."""
    if not has_kernels(a):
        return plain.add(a, b)
    a, b, c = ready(a), ready(b), array_module(a).empty(a.shape, a.dtype)
    _moves("add", a, a.size, (a, b, c), a.size)
    return c


def expand_pair(u, v):
    if not has_kernels(u):
        return plain.expand_pair(u, v)
    u, v, y = ready(u), ready(v), array_module(u).empty((3 * len(u), *u.shape[1:]), u.dtype)
    _moves("expand_pair", u, u.size, (u, v, y), u.size)
    return y


def contract_pair(dy):
    if not has_kernels(dy):
        return plain.contract_pair(dy)
    xp, dy, shape = array_module(dy), ready(dy), (len(dy) // 3, *dy.shape[1:])
    du, dv = xp.empty(shape, dy.dtype), xp.empty(shape, dy.dtype)
    _moves("contract_pair", dy, du.size, (dy, du, dv), du.size)
    return du, dv


def average_pool(x, window):
    if not has_kernels(x):
        return plain.average_pool(x, window)
    n, h, w, c = x.shape
    x, y = ready(x), array_module(x).empty((n, h // window, w // window, c), x.dtype)
    _moves("average_pool", x, c, (x, y), y.size, *y.shape[1:3], lambda width: c // width, window, window**-2.0)
    return y


def average_pool_backward(dy, window):
    if not has_kernels(dy):
        return plain.average_pool_backward(dy, window)
    n, h, w, c = dy.shape
    dy, dx = ready(dy), array_module(dy).empty((n, h * window, w * window, c), dy.dtype)
    _moves("average_pool_backward", dy, c, (dy, dx), dx.size, h, w, lambda width: c // width, window, window**-2.0)
    return dx
