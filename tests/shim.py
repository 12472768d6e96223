"""Runs the GPU's kernels without one: g++ compiles the .cu file, together with ``cuda_on_cpu.h``, to a shared library.

``Launcher()`` can be put in the place of a device: ``nanomr.ops.gpu.cuda.launcher = Launcher()``.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
CACHE = Path(tempfile.gettempdir()) / "nanomr-shim"  # libraries, named by the hash of all that went into them
OPTIONS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=off")
MARGIN = 4096  # bytes around each array: what a kernel reads there is NaN, and what it writes there is noticed


class KernelError(Exception):
    """A launch went wrong: a divergent barrier, a write out of bounds."""


def missing() -> str | None:
    """Why kernels cannot run here; None if they can."""
    return None if shutil.which("g++") else "needs g++"


@cache
def library(source: str, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """``source`` (CUDA C, without device.cuh) as a library with a ``launch_<name>`` for each kernel."""
    macros = [f"-D{d}" for d in defines]
    expanded = subprocess.run(
        ["g++", "-E", *macros, "-x", "c++", "-"], input=source, capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', expanded)
    entry = 'extern "C" int launch_{0}(const int* geometry, unsigned seed, char* message, void** arguments) {{\n'
    entry += "  return emu::run(geometry, seed, message, arguments, [](void** a) {{ emu::call({0}, a); }});\n}}\n"
    text = '#line 1 "kernel.cu"\n' + source.replace('extern "C" __global__', "__global__")
    text += "".join(entry.format(name) for name in names)
    content = "\0".join([HEADER.read_text(), text, *OPTIONS, *defines])
    path = CACHE / (hashlib.sha256(content.encode()).hexdigest()[:24] + ".so")
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            built = Path(folder) / "kernels.so"
            command = ["g++", *OPTIONS, *macros, "-include", HEADER, "-x", "c++", "-", "-o", built]
            result = subprocess.run(command, input=text, capture_output=True, text=True)
            if result.returncode:
                raise KernelError(result.stderr)
            built.rename(path)
    return ctypes.CDLL(str(path))


def guarded(array):
    """(a copy of ``array`` between two margins, the whole buffer). The copy is aligned to 16 bytes and no more."""
    buffer = np.full(array.nbytes + 2 * MARGIN + 64, 0xFF, np.uint8)
    start = MARGIN - (buffer.ctypes.data + MARGIN) % 32 + 16
    buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return buffer[start : start + array.nbytes], buffer


class Launcher:
    """``launcher(source, defines, name, grid, block, shared, arguments)`` runs a kernel. Arrays are updated in place.

    Arguments are C-contiguous NumPy arrays (passed as pointers), NumPy scalars, or None (a null pointer). ``seed``
    decides the order of blocks, warps and lanes; ``launches`` counts.
    """

    def __init__(self, seed: int = 0):
        self.seed, self.launches = seed, 0

    def __call__(self, source, defines, name, grid, block, shared, arguments):
        self.launches += 1
        arrays, values = [], []
        for argument in arguments:
            if isinstance(argument, np.ndarray) and argument.ndim + argument.size:
                assert argument.flags.c_contiguous, f"{name}: an argument is not contiguous"
                inner, buffer = guarded(argument)
                arrays.append((argument, inner, buffer))
                values.append(ctypes.c_void_p(inner.ctypes.data))
            elif argument is None:
                values.append(ctypes.c_void_p(None))
            else:
                values.append(np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item()))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        geometry = (ctypes.c_int * 7)(*grid, *block, shared)
        message = ctypes.create_string_buffer(500)
        run = getattr(library(source, tuple(defines)), f"launch_{name}")
        failed = run(geometry, ctypes.c_uint(self.seed + self.launches), message, pointers)
        if failed:
            raise KernelError(f"{name}: {message.value.decode()}")
        for argument, inner, buffer in arrays:
            changed = inner.copy()
            inner[...] = 0xFF
            if (buffer != 0xFF).any():
                raise KernelError(f"{name}: a write out of bounds of an argument")
            changed = changed.view(argument.dtype).reshape(argument.shape)
            if argument.flags.writeable:
                argument[...] = changed
            elif changed.tobytes() != argument.tobytes():
                raise KernelError(f"{name}: an input was changed")
