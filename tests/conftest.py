"""Profiles, markers and the fixtures that every test file may use."""

import importlib
import importlib.util
import os
import zlib
from pathlib import Path

# Before NumPy, Numba, CuPy or matplotlib is imported: a user's own settings must not decide whether a test passes.
os.environ["CUPY_TF32"] = "0"
os.environ["MPLBACKEND"] = "Agg"
# Arrays are tiny, and pytest -n or somebody else keeps the cores busy: a thread that waits for another by spinning
# costs several times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")  # of which _one_thread leaves one, but where a test is about them
if os.environ.get("PYTEST_XDIST_WORKER"):
    # What one worker has compiled the others need not; and what a test breaks in it is not what a user runs.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "numba"))

import hypothesis
import numba
import numpy as np
import pytest

from nanomr.backend import gpu_available

# deadline=None: the first call of a Numba kernel compiles it.
hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("intense", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser):
    parser.addoption(
        "--stand-in",
        action="store_true",
        help="run the tests marked gpu on fake_cupy.py where there is no GPU: slow; it shows what would not even start",
    )


def pytest_collection_modifyitems(config, items):
    """Skip what this machine cannot run, and say why (pytest's -ra prints it)."""
    missing = {}
    if not gpu_available() and not config.getoption("--stand-in"):
        missing["gpu"] = "no GPU: CuPy with a CUDA device is needed (see python -m nanomr.backend)"
    if importlib.util.find_spec("torch") is None:
        missing["torch"] = "PyTorch is not installed (pip install torch)"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _one_thread(request):
    """Kernels run in one thread, but those of a test marked ``threads`` in all of Numba's."""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS if request.node.get_closest_marker("threads") else 1)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator of the test's own: the same in every run, whichever tests run before it."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _stand_in(request):
    """With ``--stand-in``, a test marked ``gpu`` finds ``fake_cupy`` where CuPy would be."""
    if request.config.getoption("--stand-in") and request.node.get_closest_marker("gpu") and not gpu_available():
        import fake_cupy

        fake_cupy.install(request.getfixturevalue("monkeypatch"))


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cupy(request, monkeypatch):
    """CuPy: the real one, or ``fake_cupy``. A test that takes it runs here before it runs on a GPU."""
    if request.param == "stand-in":
        import fake_cupy
        import shim

        if shim.missing():
            pytest.skip(shim.missing())
        fake_cupy.install(monkeypatch)
    yield importlib.import_module("cupy")
    if request.param == "stand-in":
        fake_cupy.forget()


@pytest.fixture(autouse=True)
def _no_hidden_randomness():
    """Fail a test that draws from NumPy's global generator: every draw in nanomr names its generator."""
    before = np.random.get_state()[1:]  # noqa: NPY002
    yield
    after = np.random.get_state()[1:]  # noqa: NPY002
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True)), "NumPy's global generator was used"
