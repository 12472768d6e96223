"""Compiles kernels for a GPU on a machine without one, by the libraries of NVIDIA's wheels, and reads the machine code.

pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm      (100 MB)

For CUDA 13: nvidia-cuda-nvrtc, without -cu12.
"""

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path


def _find(pattern: str) -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    found = [p for folder in folders for p in Path(folder).glob(pattern)]
    return next((p for p in sorted(found) if "builtins" not in p.name and ".alt." not in p.name), None)


@cache
def _library():
    path = _find("*/lib/libnvrtc.so*")
    for builtins in path.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins))  # which CUDA 13's library looks for by name alone; PyTorch's wheels bring that one
    return ctypes.CDLL(str(path))


def missing() -> str | None:
    """What must be installed; None if everything is there."""
    if _find("*/lib/libnvrtc.so*") is None:
        return "needs pip install nvidia-cuda-nvrtc-cu12"
    if _find("*/bin/cuobjdump") is None or _find("*/bin/nvdisasm") is None:
        return "needs pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return None


# What CuPy 14 adds on its own, besides folders of headers (cupy/cuda/compiler.py). -ftz: float32 numbers below 1e-38
# become 0 on a GPU, whatever the emulation of tests/shim.py makes of them.
CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")


class CompileError(Exception):
    pass


def compile_cubin(source: str, arch: str, defines=()) -> bytes:
    """The machine code of ``source`` for ``arch`` ("sm_90"). Raises CompileError with the compiler's messages, also
    where it makes each wgmma wait for the one before."""
    lib, program = _library(), ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{d}" for d in defines), *CUPYS_OPTIONS]
    failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))

    def fetch(what):
        size = ctypes.c_size_t()
        getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        getattr(lib, f"nvrtcGet{what}")(program, content)
        return content.raw

    log = fetch("ProgramLog").rstrip(b"\0").decode()
    if failed or "instructions are serialized" in log:
        raise CompileError(log)
    return fetch("CUBIN")


@dataclass
class Code:
    registers: int
    stack: int  # bytes; not 0 where registers are spilled
    shared: int  # bytes, static
    instructions: frozenset[str]  # with their modifiers: "HMMA.16816.F32.BF16"


def inspect(cubin: bytes) -> dict[str, Code]:
    """What each kernel of a cubin uses, by name."""
    tools = {name: str(_find(f"*/bin/{name}")) for name in ("cuobjdump", "nvdisasm")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools["cuobjdump"], "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools["nvdisasm"], "-c", file.name], capture_output=True, text=True, check=True)
    instructions = {
        name: frozenset(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text, re.M))
        for name, text in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass.stdout, re.M | re.S)
    }
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage.stdout)
    return {name: Code(int(r), int(s), int(m), instructions[name]) for name, r, s, m in found}
