"""Arrays as the CPU's kernels take them; and recycled memory: fresh pages cost more than most passes over them."""

import math
import sys
import threading

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_SMALL = 1 << 14  # floats; below, malloc is as fast
_LINE = 16  # floats in a cache line
_LIMIT = 1 << 32  # bytes of buffers that a thread may keep idle: a step of the main network has them all in use
_local = threading.local()


def _references(buffers):
    for buffer, _ in buffers:
        return sys.getrefcount(buffer)


_IDLE = _references([(np.empty(1, np.float32), 0)])  # what _references says of a buffer that only its list knows


def ready(x):
    """x as a C-contiguous float32 array; itself if it is one."""
    return np.ascontiguousarray(x, np.float32)


def numbers(x):
    """x, C-contiguous, as Numba knows it: float32, or the bits of bfloat16 as uint16."""
    return np.ascontiguousarray(x).view(np.uint16) if x.dtype == BFLOAT16 else ready(x)


def can_be_written(x, dtype):
    """Can a kernel that stores numbers of this dtype, and sees x by rows, store them in x?"""
    return x.dtype == dtype and x.flags.c_contiguous and x.flags.writeable


def empty(shape, dtype=np.float32) -> np.ndarray:
    """An uninitialised array, float32 or bfloat16, at the start of a cache line.

    A buffer is handed out again only when nothing but this list refers to it (views keep their base alive).
    """
    size = math.prod(shape)
    if dtype == BFLOAT16:
        return empty((-(-size // 2),)).view(BFLOAT16)[:size].reshape(shape)
    if size < _SMALL:
        buffer, first = _fresh(size)
        return buffer[first : first + size].reshape(shape)
    step = 1 << (size.bit_length() - 4)  # sizes within an eighth share buffers
    rounded = -(-size // step) * step
    pool = _local.__dict__.setdefault("pool", {})
    for buffer, first in pool.setdefault(rounded, []):
        if sys.getrefcount(buffer) == _IDLE:
            return buffer[first : first + size].reshape(shape)
    idle = (size for size, buffers in pool.items() for buffer, _ in buffers if sys.getrefcount(buffer) == _IDLE)
    if 4 * sum(idle) > _LIMIT:
        release()
        return empty(shape)
    buffer, first = _fresh(rounded)
    pool[rounded].append((buffer, first))
    return buffer[first : first + size].reshape(shape)


def _fresh(size):
    """(memory for ``size`` floats, its first cache line: a vector load across two lines costs double)."""
    buffer = np.empty(size + _LINE, np.float32)
    return buffer, -(buffer.__array_interface__["data"][0] // 4) % _LINE


def release():
    """Forget this thread's recycled buffers (arrays in use stay valid)."""
    _local.__dict__.pop("pool", None)
