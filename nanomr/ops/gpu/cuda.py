"""Starting a CUDA kernel: its source, the compiler's options, the grid, arrays as it wants them. By CuPy.

Nothing imports CuPy before a kernel is launched on a CuPy array. On NumPy arrays there are no kernels, unless a test
has put something that runs them on a CPU in ``launcher``: tests hold all of ``gpu`` to the reference without a GPU.
"""

from functools import cache
from pathlib import Path

import numpy as np

from ...backend import array_module, find_cupy

KERNELS = Path(__file__).with_name("kernels")
# Blocks in flight on an H100 (132 multiprocessors, two blocks each), taken for all devices: how a sum is split decides
# its last bits, and these should not depend on the device.
BLOCKS = 264
REALS = {"float32": "float", "bfloat16": "bf16"}  # what kernels call the dtypes

launcher = None  # (source, defines, name, grid, block, shared bytes, arguments): runs kernels on NumPy arrays, in tests


@cache
def source(file: str) -> str:
    """A kernel file's text, without ``device.cuh``, which must come before it."""
    return (KERNELS / file).read_text()


@cache
def _function(file, defines, name, shared):
    options = ("-std=c++17", *(f"-D{define}" for define in defines))
    if "WGMMA=1" in defines:  # an instruction of sm_90a alone; NVRTC takes this one and CuPy's -arch=sm_90 behind it
        options += ("-arch=sm_90a",)
    module = find_cupy().RawModule(code=source("device.cuh") + source(file), options=options)
    function = module.get_function(name)
    if shared > 48 << 10:
        function.max_dynamic_shared_size_bytes = shared
    return function


_NULL = np.uint64(0)
_SCALARS = {int: np.int32, float: np.float32}


def launch(file, defines, name, grid, threads, arguments, shared=0):
    """Start a kernel. Python's ints and floats are passed as int32 and float32, None as a null pointer."""
    arguments = [_SCALARS.get(type(a), lambda same: same)(a) for a in arguments]
    grid, block = (*grid, 1, 1)[:3], (threads, 1, 1)
    if isinstance(arguments[0], np.ndarray):
        launcher(source(file), defines, name, grid, block, shared, arguments)
    else:
        function = _function(file, defines, name, shared)
        function(grid, block, tuple(_NULL if a is None else a for a in arguments), shared_mem=shared)


def runs(x):
    """Do kernels run on this array?"""
    return launcher is not None or not isinstance(x, np.ndarray)


def has_kernels(x, *dtypes):
    """Does a kernel compute on this array? Empty ones are left to the formulas."""
    return runs(x) and x.dtype.name in (dtypes or REALS) and x.size > 0


def ready(x, dtype=None):
    """``x`` as a kernel wants it: contiguous, of this dtype, and aligned to 16 bytes."""
    xp = array_module(x)
    x = xp.ascontiguousarray(x, dtype)
    address = x.ctypes.data if xp is np else x.data.ptr
    return x.copy() if address % 16 else x


def ceil(a, b):
    return -(-a // b)


def grid_over(count):
    """The grid of a kernel whose blocks, of 256 threads, share ``count`` numbers."""
    return (max(1, min(ceil(count, 256), 16 * BLOCKS)),)
