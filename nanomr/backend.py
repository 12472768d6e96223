"""Where arrays live: NumPy on the CPU, CuPy on the GPU. The one module that imports CuPy (with ``ops/gpu.py``).

The data decides: a function that is given CuPy arrays computes on the GPU. ``--device`` only chooses where
the weights and the data set are put. ``python -m nanomr.backend`` prints what this machine offers, with ``--test``
which of our GPU kernels are right on it.
"""

import argparse
import os
import platform
import re
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import numpy as np

from .errors import UserError

# `python -m nanomr.backend` finds this module imported already, by the package. runpy warns about that on stderr,
# except for what looks like a package; running it a second time does no harm, since it holds no state.
__path__: list[str] = []

INSTALL = "pip install 'nanomr[cuda12]' (or [cuda13])"  # CuPy with the parts of CUDA that it needs


def cache_folder() -> Path:
    """The user's folder for what can be had again: data sets, what the self-test found."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanomr"


def find_cupy():
    """The cupy module, imported on first use; None where it is not installed."""
    try:
        import cupy
    except ImportError:
        return None
    return cupy


def gpu_available() -> bool:
    """True when CuPy is installed and sees at least one CUDA device."""
    cupy = find_cupy()
    return cupy is not None and bool(cupy.cuda.is_available())


def array_module(x):
    """``cupy`` for a CuPy array, ``numpy`` for everything else (CuPy is never imported to find out)."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def to_numpy(x) -> np.ndarray:
    """``x`` as a NumPy array, copied from the GPU if it lives there (this waits for the GPU)."""
    return x.get() if array_module(x) is not np else np.asarray(x)


def to_device(x, device: str):
    """``x`` on ``device`` ("cpu" or "gpu"); no copy if it is there already. Raises UserError without CuPy."""
    if device == "cpu":
        return to_numpy(x)
    if device == "gpu":
        if find_cupy() is None:
            raise UserError(f"nothing can be moved to a GPU without CuPy: {INSTALL}, or stay on the CPU")
        return find_cupy().asarray(x)
    raise ValueError(f"device must be 'cpu' or 'gpu', not {device!r}")


def resolve_device(wanted: str) -> str:
    """Turn ``--device auto|cpu|gpu`` into "cpu" or "gpu".

    Raises UserError when a GPU is asked for and there is none, saying what is missing.
    """
    if wanted == "cpu" or (wanted == "auto" and not gpu_available()):
        return "cpu"
    if wanted not in ("auto", "gpu"):
        raise UserError(f"--device must be auto, cpu or gpu, not {wanted!r}")
    packages = _cupy_packages()
    if len(packages) > 1:
        both = " and ".join(packages)
        raise UserError(f"{both} overwrite each other: pip uninstall -y {' '.join(packages)}, then {INSTALL}")
    if find_cupy() is None:
        missing = f"{packages[0]} does not import: reinstall it" if packages else f"--device gpu needs CuPy: {INSTALL}"
        raise UserError(f"{missing}, or use --device cpu")
    if not gpu_available():
        raise UserError(_why_no_device())
    return "gpu"


def _cupy_packages() -> list[str]:
    """The CuPy packages that are installed; there may be one alone."""
    names = {re.sub(r"[-_.]+", "-", d.name or "").lower() for d in metadata.distributions()}
    return sorted(name for name in names if re.fullmatch(r"cupy(-cuda\w+|-rocm[\w-]+)?", name))


def _why_no_device() -> str:
    """CuPy is there and finds no device: is it for another CUDA version than the driver?"""
    runtime, no_gpu = find_cupy().cuda.runtime, "--device gpu: CuPy is installed but finds no CUDA device or driver"
    try:
        built, driver = runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000
    except Exception:
        built = driver = 0
    if not 0 < driver < built:
        return f"{no_gpu}; use --device cpu"
    remedy = f"pip install 'nanomr[cuda{driver}]'" if driver >= 12 else "update the driver"
    return (
        f"--device gpu: CuPy is for CUDA {built}, the driver for CUDA {driver}: "
        f"pip uninstall -y {' '.join(_cupy_packages())}, then {remedy}; or use --device cpu"
    )


def use_device(wanted: str, kernels: str = "auto") -> str:
    """:func:`resolve_device` for a program: on a GPU it also chooses the kernels, ``--kernels auto|own|plain``. "auto"
    tests each of ours when it meets a device for the first time (``ops/gpu/selftest.py``)."""
    device = resolve_device(wanted)
    if device == "gpu":
        from .ops.gpu import selftest

        try:
            selftest.choose(kernels)
        except UserError as error:
            if wanted == "gpu":
                raise
            print(f"{error}; going on with the CPU", file=sys.stderr, flush=True)
            return "cpu"
    return device


def report() -> list[str]:
    """What there is to compute with, one line for each thing, and what is missing. Never raises."""
    probes = {
        "nanomr": lambda: sys.modules["nanomr"].__version__,
        "Python": platform.python_version,
        "NumPy": lambda: _version("numpy"),
        "Numba": _numba,
        "CPU": _cpu,
        "kernels": _kernels,
        "BLAS": _blas,
        "CuPy": lambda: (
            " and ".join(f"{name} {_version(name)}" for name in _cupy_packages())
            or f"not installed: {INSTALL}, after the driver's CUDA version"
        ),
        "GPU": _gpu,
        "matplotlib": lambda: _version("matplotlib") or "not installed, so no plots: pip install 'nanomr[plots]'",
        "device auto ->": lambda: resolve_device("auto"),
    }
    lines = []
    for name, probe in probes.items():
        try:
            found = probe()
        except Exception as error:  # a report that stops on an odd machine is no help there
            found = f"could not be read ({type(error).__name__}: {error})"
        lines.append(f"{name} {found}")
    return lines


def main() -> None:
    """Print :func:`report`; with --test, what the self-test finds."""
    parser = argparse.ArgumentParser(prog="python -m nanomr.backend", description="What there is to compute with.")
    text = "hold each of the GPU's kernels to its formula, and remember what came out"
    parser.add_argument("--test", action="store_true", help=text)
    if parser.parse_args().test:
        from .cli import run

        run(_test)
    print("\n".join(report()))


def _test() -> int:
    resolve_device("gpu")
    from .ops.gpu import selftest

    print(selftest.identity(), flush=True)

    def report(name, found):
        well = "not for this card" if name in selftest.probes.TILES else "ok"
        print(f"{name:28} {f'{found:.1f} us' if isinstance(found, float) else found or well}", flush=True)

    results = selftest.test(report=report)
    selftest.remember(results)
    for product, (tile, us, usual) in selftest.tiles(results).items():
        beside = f", the usual one {usual:.1f} us" if usual and tile != "usual" else ""
        print(f"{'tile of ' + product:28} {tile}: {us:.1f} us{beside}")
    failed = sum(isinstance(found, str) for found in results.values())
    print(f"{failed} of {len(results)} failed" if failed else f"all {len(results)} passed")
    return 1 if failed else 0


def _version(*names: str) -> str | None:
    """The version of the first of these distributions that is installed, without importing it."""
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _numba() -> str:
    import numba

    threads = numba.get_num_threads()  # starts the threading layer too, which has no name before
    return f"{numba.__version__}, {threads} threads, layer {numba.threading_layer()}"


def _cpu() -> str:
    from llvmlite import binding as llvm

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = llvm.get_host_cpu_features()
    widths = {"avx512f": 512, "avx2": 256, "neon": 128}
    simd = next((f"{bits} bits ({name})" for name, bits in widths.items() if features.get(name)), "not recognised")
    return f"{llvm.get_host_cpu_name()}, {cores} cores usable, SIMD {simd}"


def _kernels() -> str:
    """How convolutions multiply on this CPU, and what became of AMX's tiles."""
    from .ops.cpu import amx, kernel, simd

    if not (simd.has("amx-bf16") and simd.has("amx-tile")):
        tiles = "this CPU has no AMX tiles"
    elif not amx.permitted():
        tiles = "AMX tiles: the operating system gives no permission"
    else:
        tiles = "AMX tiles: permitted, and " + ("right" if amx.works() else "WRONG in a trial, so not used")
    return f"float32 {kernel('fp32')}; bfloat16 {kernel('bf16')}; {tiles}"


def _blas() -> str:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']} (pip install threadpoolctl shows kernel and threads)"
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    text = "{internal_api} {version}, kernel {architecture}, {num_threads} threads"
    found = "; ".join(text.format_map({"architecture": "unknown", **pool}) for pool in pools)
    forced = os.environ.get("OPENBLAS_CORETYPE")  # a common cause of a slow machine
    return (found or "not one that threadpoolctl knows") + (f" (OPENBLAS_CORETYPE={forced} is set)" if forced else "")


def _gpu() -> str:
    """The devices, and whether NVRTC and CUDA's headers are found: without them CuPy's wheels compile no kernel."""
    if not gpu_available():
        return "none (it takes CuPy, an NVIDIA GPU and its driver)"
    cupy = find_cupy()
    runtime = cupy.cuda.runtime
    found = []
    for index in range(runtime.getDeviceCount()):
        gpu = runtime.getDeviceProperties(index)
        memory = f"{gpu['totalGlobalMem'] / 2**30:.0f} GiB"
        found.append(f"{gpu['name'].decode()}, compute capability {gpu['major']}.{gpu['minor']}, {memory}")
    for part, version in (("driver", runtime.driverGetVersion()), ("runtime", runtime.runtimeGetVersion())):
        found.append(f"{part} CUDA {version // 1000}.{version % 1000 // 10}")
    try:
        found.append("NVRTC {}.{}".format(*cupy.cuda.nvrtc.getVersion()))
    except Exception as error:
        found.append(f"NVRTC does not load ({type(error).__name__}): {INSTALL}")
    found.append(_cuda_headers())
    return "; ".join(found)


def _cuda_headers() -> str:
    """Where CuPy 14 looks for CUDA's headers. It compiles nothing without, not even our kernels, which include none."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        folder = find_nvidia_header_directory("cudart")
    except Exception as error:
        return f"headers: {type(error).__name__}"
    return f"headers in {folder}" if folder else f"no CUDA headers: {INSTALL}"


if __name__ == "__main__":
    main()
