import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanomr import backend
from nanomr.errors import UserError
from nanomr.ops.cpu import amx, simd


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def fake_cupy(available=True, **runtime):
    """A stand-in with the few names that the backend looks up."""
    cuda = SimpleNamespace(is_available=lambda: available, runtime=SimpleNamespace(**runtime), nvrtc=None)
    return SimpleNamespace(ndarray=type("ndarray", (), {}), cuda=cuda)


def test_import_is_light():
    heavy = "{'cupy', 'numba', 'llvmlite', 'threadpoolctl', 'matplotlib', 'torch'}"
    code, out, err = python("-c", f"import sys, nanomr.backend; print(sorted({heavy} & set(sys.modules)))")
    assert (code, out, err) == (0, "[]\n", "")


def test_the_report_prints_every_line_and_ends_with_the_device():
    code, out, err = python("-m", "nanomr.backend")
    assert (code, err) == (0, "")
    starts = [line.split()[0] for line in out.splitlines()]
    assert starts == [
        "nanomr", "Python", "NumPy", "Numba", "CPU", "kernels", "BLAS", "CuPy", "GPU", "matplotlib", "device",
    ]  # fmt: skip
    assert "could not be read" not in out
    assert out.splitlines()[-1] == f"device auto -> {backend.resolve_device('auto')}"
    assert f"\nNumPy {np.__version__}\n" in out
    assert re.search(r"^CPU .+, \d+ cores usable, SIMD ", out, re.MULTILINE)


def test_the_report_says_what_became_of_amx(monkeypatch):
    monkeypatch.setattr(simd, "has", lambda feature: True)
    for permitted, works, words in ((False, False, "no permission"), (True, False, "WRONG"), (True, True, "and right")):
        monkeypatch.setattr(amx, "permitted", lambda answer=permitted: answer)
        monkeypatch.setattr(amx, "works", lambda answer=works: answer)
        assert words in next(line for line in backend.report() if line.startswith("kernels "))


def test_the_report_survives_a_broken_machine(monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    for name in ("find_cupy", "_version", "_numba", "_cpu", "_kernels", "_blas", "_gpu"):
        monkeypatch.setattr(backend, name, broken)
    lines = backend.report()
    assert len(lines) == 11
    assert lines[-1] == "device auto -> could not be read (RuntimeError: broken)"


def test_the_report_without_threadpoolctl(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)  # None makes the import fail
    assert "pip install threadpoolctl" in backend._blas()


@pytest.mark.parametrize("headers", ["/cuda/include", None])
@pytest.mark.parametrize("nvrtc", [True, False])
def test_the_report_of_a_gpu(monkeypatch, nvrtc, headers):
    pathfinder = SimpleNamespace(find_nvidia_header_directory={"cudart": headers}.__getitem__)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=pathfinder))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    card = {"name": b"Card", "major": 9, "minor": 0, "totalGlobalMem": 80 * 2**30}
    cupy = fake_cupy(
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda index: card,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 12090,
    )
    if nvrtc:
        cupy.cuda.nvrtc = SimpleNamespace(getVersion=lambda: (12, 9))
    monkeypatch.setattr(backend, "find_cupy", lambda: cupy)
    line = backend._gpu()
    card = "Card, compute capability 9.0, 80 GiB; "
    assert line.startswith(f"{card}{card}driver CUDA 13.0; runtime CUDA 12.9; NVRTC ")
    assert ("NVRTC 12.9; " in line) == nvrtc
    assert line.endswith("; headers in /cuda/include" if headers else f"no CUDA headers: {backend.INSTALL}")
    assert ("does not load" in line) != nvrtc


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (None, "--device gpu needs CuPy: pip install"),
        (fake_cupy(available=False), "--device gpu: CuPy is installed but finds no CUDA device"),
    ],
)
def test_device_gpu_without_a_gpu_is_one_clear_line(monkeypatch, cupy, message):
    monkeypatch.setattr(backend, "find_cupy", lambda: cupy)
    assert not backend.gpu_available()
    assert backend.resolve_device("auto") == backend.resolve_device("cpu") == "cpu"
    with pytest.raises(UserError) as caught:
        backend.resolve_device("gpu")
    assert str(caught.value).startswith(message)
    assert "--device cpu" in str(caught.value)
    assert "\n" not in str(caught.value)


def installed(monkeypatch, *names):
    found = [SimpleNamespace(name=name) for name in ("numpy", "cupy-xarray", *names)]
    monkeypatch.setattr(backend.metadata, "distributions", lambda: found)


def test_two_cupys_are_named(monkeypatch):
    installed(monkeypatch, "cupy_cuda12x", "cupy-cuda13x")
    monkeypatch.setattr(backend, "find_cupy", fake_cupy)
    with pytest.raises(UserError) as caught:
        backend.resolve_device("gpu")
    both = "cupy-cuda12x and cupy-cuda13x overwrite each other: pip uninstall -y cupy-cuda12x cupy-cuda13x"
    assert str(caught.value) == f"{both}, then {backend.INSTALL}"


@pytest.mark.parametrize(
    ("built", "driver", "advice"),
    [
        (13000, 12080, "pip uninstall -y cupy-cuda13x, then pip install 'nanomr[cuda12]'; or use --device cpu"),
        (12090, 11080, "pip uninstall -y cupy-cuda13x, then update the driver; or use --device cpu"),
        (12090, 13000, "finds no CUDA device or driver; use --device cpu"),
        (12090, 0, "finds no CUDA device or driver; use --device cpu"),
    ],
)
def test_a_cupy_for_another_cuda_version_says_what_to_install(monkeypatch, built, driver, advice):
    installed(monkeypatch, "cupy-cuda13x")
    versions = dict(runtimeGetVersion=lambda: built, driverGetVersion=lambda: driver)
    monkeypatch.setattr(backend, "find_cupy", lambda: fake_cupy(available=False, **versions))
    with pytest.raises(UserError) as caught:
        backend.resolve_device("gpu")
    assert str(caught.value).endswith(advice) and str(caught.value).startswith("--device gpu: CuPy is ")


def test_a_cupy_that_does_not_import_is_not_missing(monkeypatch):
    installed(monkeypatch, "cupy-cuda12x")
    monkeypatch.setattr(backend, "find_cupy", lambda: None)
    with pytest.raises(UserError, match="cupy-cuda12x does not import: reinstall it, or use --device cpu"):
        backend.resolve_device("gpu")


def test_device_with_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "find_cupy", fake_cupy)
    assert backend.resolve_device("auto") == backend.resolve_device("gpu") == "gpu"
    assert backend.resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("wanted", ["cuda", "", "GPU"])
@pytest.mark.parametrize("available", [True, False])
def test_an_unknown_device_is_named(monkeypatch, wanted, available):
    monkeypatch.setattr(backend, "find_cupy", lambda: fake_cupy(available))
    with pytest.raises(UserError, match=f"not {wanted!r}"):
        backend.resolve_device(wanted)
    with pytest.raises(ValueError, match=repr(wanted)):
        backend.to_device(np.ones(2), wanted)


def test_cpu_arrays_stay_where_they_are():
    x = np.ones((2, 3), np.float32)
    assert backend.array_module(x) is np
    assert backend.to_numpy(x) is x
    assert backend.to_device(x, "cpu") is x


def test_a_cupy_array_is_told_by_its_type(monkeypatch):
    cupy = fake_cupy()
    cupy.ndarray.get = lambda self: np.zeros(3)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert backend.array_module(cupy.ndarray()) is cupy
    assert backend.array_module(np.ones(2)) is np
    assert backend.to_numpy(cupy.ndarray()).tolist() == [0, 0, 0]


@pytest.mark.gpu
def test_there_and_back_on_a_gpu(rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    on_gpu = backend.to_device(x, "gpu")
    assert backend.array_module(on_gpu).__name__ == "cupy"
    assert backend.to_device(on_gpu, "gpu") is on_gpu
    assert np.array_equal(backend.to_device(on_gpu, "cpu"), x)


@pytest.mark.parametrize("writable", [False, True])
def test_an_installation_that_cannot_be_written_to_runs(writable, tmp_path):
    """As in a container: neither ``__pycache__`` beside the sources nor the user's cache can be made, here because
    files stand in their place, which stops root too. Kernels are then compiled without a cache, which is said once."""
    package = Path(backend.__file__).parent
    shutil.copytree(package, tmp_path / "nanomr", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in {source.parent for source in (tmp_path / "nanomr").rglob("*.py")}:
        (folder / "__pycache__").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "NUMBA_CACHE"))}
    environment |= {"PYTHONPATH": str(tmp_path), "HOME": os.devnull}
    if writable:
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
    code = (
        "import numpy as np, nanomr as mr, nanomr.attacks.sinkhorn, nanomr.verify.exact.halfspace; print(mr.__file__); "
        "print(mr.layers.ReLU().forward(np.array([[-1, 2]], np.float32))[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'nanomr' / '__init__.py'}\n[[0. 2.]]\n"), done.stderr
    said = "" if writable else "NUMBA_CACHE_DIR may name a folder that can"
    assert done.stderr.count("RuntimeWarning") == (not writable) and said in done.stderr
    assert any((tmp_path / "cache").rglob("*.nbc")) == writable
