"""Is the stand-in for CuPy like CuPy? By name, where CuPy is installed (it needs no GPU for that); by what it does and
refuses in a CUDA graph, in tests that run on the stand-in here and on CuPy with a GPU.
"""

import ast
import importlib
import inspect
import re
from contextlib import suppress
from functools import reduce
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
import shim

from nanomr import graph
from nanomr.backend import to_numpy
from nanomr.ops.gpu import cuda

NANOMR = Path(graph.__file__).parent
# Not reached with device arrays, or not in the functions that are: Numba, files, plots, the verifier but for its boxes.
HOST = {"attacks/sinkhorn.py", "gradcheck.py"}
HOST |= {"plots.py", "data.py", "shapes10.py", "checkpoint.py", "rng.py", "cli.py"}
SOURCES = [
    path
    for path in sorted(NANOMR.rglob("*.py"))
    if (name := str(path.relative_to(NANOMR))) not in HOST
    and not name.startswith("ops/cpu/")
    and (not name.startswith("verify/") or "bounds" in name)
]
# reference's functions that gpu has its own of, for other layouts
OWN = {"conv2d", "conv2d_input_gradient", "conv2d_weight_gradient", "_pad", "crop_flip", "corners"}
ON_NUMPY = {("max", "initial"), ("asarray", "order")}  # of arrays that are NumPy's for sure: noise that is being drawn
ON_NUMPY |= {("dumps", "indent")}  # json's


def calls(path):
    """(what is used, keywords) throughout a file: "xp.pad" for a function of the array module, ".sum" for a method of
    something else. reference's ``np`` counts as the array module, since NumPy hands its functions on to CuPy."""
    tree = ast.parse(path.read_text())
    module = r"(xp|cupy|self\.cupy|array_module\([^()]*\)|find_cupy\(\))"
    if path.name == "reference.py":
        tree.body = [node for node in tree.body if getattr(node, "name", None) not in OWN]
        module = "(np)"
    keywords = {
        id(node.func): tuple(k.arg for k in node.keywords if k.arg)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if found := re.fullmatch(module + r"((\.\w+)+)", text):
                yield "xp" + found[2], keywords.get(id(node), ())
            elif id(node) in keywords and not text.startswith("np."):
                yield f".{node.attr}", keywords[id(node)]


def parameters(function):
    """Names of the parameters; Cython's functions have them in the first line of their documentation."""
    with suppress(TypeError, ValueError):
        return set(inspect.signature(function).parameters)
    line = (function.__doc__ or "").split("\n")[0]
    return set(re.findall(r"(\w+)(?==|,|\))", line[line.find("(") :]))


@pytest.fixture(scope="module")
def real():
    return pytest.importorskip("cupy", reason="CuPy is not installed (pip install cupy-cuda13x: it needs no GPU here)")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(NANOMR)))
def test_what_nanomr_calls_is_there(real, path):
    """Functions, classes and methods, and the names of their keyword arguments."""
    for name, keywords in calls(path):
        if name.startswith("xp"):
            found = reduce(getattr, name.split(".")[1:], real)  # AttributeError: CuPy has no such function
        elif hasattr(np.ndarray, name[1:]):
            found = getattr(real.ndarray, name[1:])
        else:
            continue
        known = parameters(found)
        unknown = {k for k in keywords if k not in known and (name.split(".")[-1], k) not in ON_NUMPY}
        assert "kwargs" in known or not unknown, f"{name} takes no {unknown}, but {sorted(known)}"


def test_the_scan_sees_calls():
    """The control of the test above."""
    seen = {name for path in SOURCES for name, _ in calls(path)}
    assert seen >= {"xp.lib.stride_tricks.as_strided", "xp.cuda.MemoryPool", "xp.cuda.Stream.null", "xp.RawModule"}
    assert seen >= {"xp.where", "xp.frexp", ".sum", ".argsort", "xp.cuda.using_allocator", "xp.einsum", "xp.nextafter"}
    assert (".sum", ("dtype",)) in {c for path in SOURCES for c in calls(path)}


@pytest.mark.parametrize("name", ["Stream", "Graph"])
def test_the_stand_ins_classes_are_cupys(real, name):
    ours, theirs = getattr(fake_cupy, name), getattr(real.cuda, name)
    for method, function in vars(ours).items():
        if not method.startswith("_"):
            assert hasattr(theirs, method), f"{name}.{method}"
            if callable(function):
                assert parameters(function) <= parameters(getattr(theirs, method)), method
    assert "non_blocking" in parameters(real.cuda.Stream) and {"code", "options"} <= parameters(real.RawModule)
    assert hasattr(real.cuda.MemoryPool, "malloc") and hasattr(real.RawModule, "get_function")
    assert hasattr(real.RawKernel, "max_dynamic_shared_size_bytes") and isinstance(
        real.cuda.Stream.null, theirs | object
    )


def test_what_the_stand_in_refuses_is_not_in_cupy(real):
    assert not [name for name in fake_cupy.NO_ATTRIBUTES if hasattr(real.ndarray, name)]
    for method in ("sum", "max", "min", "mean"):
        assert not fake_cupy.NOT_IN_CUPY & parameters(getattr(real.ndarray, method))
    for method in ("get", "tolist", "item", "copy", "astype", "__float__", "__int__", "__bool__"):
        assert hasattr(real.ndarray, method)


def test_what_a_full_card_raises(real):
    assert [c.__name__ for c in real.cuda.memory.OutOfMemoryError.__mro__[:2]] == ["OutOfMemoryError", "MemoryError"]
    assert hasattr(real.get_default_memory_pool(), "free_all_blocks")


def test_the_versions_that_tell_why_there_is_no_device(real):
    """... where there is none: both are numbers without a driver, too."""
    assert real.cuda.runtime.runtimeGetVersion() >= 12000 and real.cuda.runtime.driverGetVersion() >= 0


def test_the_switch_for_tf32(real):
    """Names only; what it does takes a GPU."""
    from cupy import _core
    from cupy._core import _routines_linalg as types

    assert types.COMPUTE_TYPE_TF32 != types.COMPUTE_TYPE_DEFAULT
    _core.set_compute_type(np.float32, types.COMPUTE_TYPE_DEFAULT)


@pytest.mark.parametrize("file", ["conv.cu", "normalize.cu", "elementwise.cu", "training.cu"])
def test_cupy_compiles_the_kernels(real, file, monkeypatch):
    """By CuPy's own function with CuPy's own options, the folders of its headers among them, for an H100."""
    from cupy._core import core
    from cupy.cuda import compiler
    from test_kernels import INSTANTIATIONS

    try:
        options = core.assemble_cupy_compiler_options(("-std=c++17",))
        real.cuda.nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"CuPy finds no CUDA headers or no NVRTC (pip install 'cupy-cuda13x[ctk]'): {error}"[:150])
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    for name, defines in INSTANTIATIONS.values():
        if name == file:
            given = (*options, *(f"-D{define}" for define in defines))
            given += ("-arch=sm_90a",) * ("WGMMA=1" in defines) + ("-ftz=true",)
            code = cuda.source("device.cuh") + cuda.source(file)
            cubin, _ = compiler._compile_using_nvrtc_no_warning(code, given, "90", "kernel.cu")
            assert cubin[:4] == b"\x7fELF"


@pytest.fixture
def stand_in(monkeypatch):
    if shim.missing():
        pytest.skip(shim.missing())
    fake_cupy.install(monkeypatch)
    yield importlib.import_module("cupy")
    fake_cupy.forget()


# --- the same on both -------------------------------------------------------------------------------------------------

INDEX = np.array([2, 0, 1], np.int32)
CAPTURED = {  # what a training step leaves to CuPy's own kernels: name: function (array module, x (3, 4), int32 index)
    "sum over rows": lambda xp, x, i: x.sum(0),
    "sum of all": lambda xp, x, i: x.sum(),
    "sum with its axes": lambda xp, x, i: x.sum(keepdims=True) ** 0.5,
    "sum over columns": lambda xp, x, i: x.sum(1),
    "root": lambda xp, x, i: x**0.5,
    "reciprocal": lambda xp, x, i: 1 / (x + 1e-5) ** 0.5,
    "scalars": lambda xp, x, i: 0.9 * x + 0.1 * x * (3 / 2) - x / 7,
    "maximum and broadcast": lambda xp, x, i: xp.broadcast_to(2.0 / xp.maximum(x[:1, :1], 1e-12), (3, 4)) + x,
    "0-d numbers": lambda xp, x, i: x[0, 1] * x[2, 3] + 2.0 * x[1, 1],
    "minimum of 0-d": lambda xp, x, i: x * xp.minimum(1.0, 0.5 / (x[0, 0] + 1e-12)).astype(x.dtype),
    "copy of one number": lambda xp, x, i: x[0, 1].copy() + x,
    "images by index": lambda xp, x, i: x[i],
    "uint8 to float": lambda xp, x, i: x.astype(np.uint8) * xp.float32(1 / 255),
    "transposed": lambda xp, x, i: xp.ascontiguousarray(x.T),
    "strided": lambda xp, x, i: x[:, 1:3] * 1.0,
}


@pytest.mark.parametrize("name", CAPTURED)
def test_small_kernels_can_be_captured(cupy, name, rng):
    """Replayed with other numbers in the same place, they give what NumPy gives."""
    function, start = CAPTURED[name], rng.uniform(0.1, 0.9, (3, 4)).astype(np.float32)
    x, index = cupy.asarray(start), cupy.asarray(INDEX)
    out = cupy.asarray(np.zeros_like(function(np, start, INDEX)))
    step = graph.Replayed(lambda: out.__setitem__(Ellipsis, function(cupy, x, index)))
    for k in range(4):
        now = (start * (k + 1)).astype(np.float32)
        x[...] = cupy.asarray(now)
        step()
        np.testing.assert_allclose(to_numpy(out), function(np, now, INDEX), rtol=1e-5)
    assert step.graph is not None


def test_what_is_changed_in_place_is_captured(cupy):
    """+=, [...] =, fill, a 0-d counter."""
    x, count = cupy.asarray(np.ones(4, np.float32)), cupy.asarray(np.zeros((), np.int64))
    total = cupy.asarray(np.zeros(4, np.float32))

    def step():
        total[...] = 0.5 * total + x
        total[1:3] += x[:2]
        x[...] = 0
        x[:2] += 1
        count.__iadd__(1)

    replayed, expected, y = graph.Replayed(step), np.zeros(4, np.float32), np.ones(4, np.float32)
    for _ in range(4):
        replayed()
        expected = 0.5 * expected + y
        expected[1:3] += y[:2]
        y = np.array([1, 1, 0, 0], np.float32)
    np.testing.assert_array_equal(to_numpy(total), expected)
    assert int(count) == 4


REFUSED = {  # in a capture
    "a number": lambda xp, x: float(x[0]),
    "a branch": lambda xp, x: bool(x[0] > 0),
    "a list": lambda xp, x: x.tolist(),
    "a copy for the host": lambda xp, x: to_numpy(x),
    "a mask": lambda xp, x: x[x > 0],
    "a place to write by mask": lambda xp, x: x.__setitem__(x > 0, 1),
    "where it is": lambda xp, x: xp.flatnonzero(x > 0),
    "cuBLAS": lambda xp, x: x.reshape(2, 2) @ x.reshape(2, 2),
}


UPLOADS = {  # which CuPy lets through, as a copy from host memory that a replay finds gone: the stand-in alone refuses
    "an upload": lambda xp, x: xp.asarray(np.ones(3, np.float32)),
    "indices of a list": lambda xp, x: x[[0, 1]],
}


def check_that_a_capture_refuses(cupy, what, capsys):
    x, calls = cupy.asarray(np.ones(4, np.float32)), []

    def step():
        calls.append(what(cupy, x))

    replayed = graph.Replayed(step, warm=1)
    replayed()  # as it is, it may
    assert replayed.failure is None and not capsys.readouterr().err
    replayed()
    assert replayed.graph is None and len(calls) == 2, "the capture broke off, and the step was taken as it is"
    replayed()
    assert len(calls) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the step does not become a CUDA graph ({replayed.failure}): ")
    assert float(x.sum()) > 0 and cupy.asarray(np.ones(2)).argsort().size == 2, "the device goes on"


@pytest.mark.parametrize("name", REFUSED)
def test_a_capture_refuses(cupy, name, capsys):
    check_that_a_capture_refuses(cupy, REFUSED[name], capsys)


@pytest.mark.parametrize("name", UPLOADS)
def test_a_capture_on_the_stand_in_refuses_uploads(stand_in, name, capsys):
    check_that_a_capture_refuses(stand_in, UPLOADS[name], capsys)


@pytest.mark.parametrize("fails", ["begin_capture", "end_capture", "launch"])
def test_a_graph_that_fails_costs_speed_alone(stand_in, fails, monkeypatch, capsys):
    """Wherever it fails, the steps go on, each once; an invalidated capture shows when it ends."""

    def broken(*_):
        fake_cupy._capture = None
        raise RuntimeError("invalidated\nwith a second line")

    monkeypatch.setattr(fake_cupy.Graph if fails == "launch" else fake_cupy.Stream, fails, broken)
    x = stand_in.asarray(np.zeros(1, np.float32))
    replayed = graph.Replayed(lambda: x.__setitem__(Ellipsis, x + 1), warm=1)
    for k in range(1, 5):
        replayed()
        assert float(x[0]) == k
    assert replayed.failure == "RuntimeError: invalidated" and capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_in_a_capture_is_no_failure_of_it(stand_in):
    """It ends the capture, and goes on up."""

    def step():
        if fake_cupy._capture is not None:
            raise KeyboardInterrupt

    replayed = graph.Replayed(step, warm=0)
    with pytest.raises(KeyboardInterrupt):
        replayed()
    assert fake_cupy._capture is None and replayed.failure is None


def test_numpy_arrays_do_not_mix(cupy):
    x = cupy.asarray(np.ones(3, np.float32))
    for mix in (lambda: x + np.ones(3), lambda: np.ones(3) + x, lambda: np.asarray(x), lambda: x.sum(initial=1.0)):
        with pytest.raises(TypeError):
            mix()
    with pytest.raises((TypeError, ValueError)):
        x[...] = np.ones(3)
    with pytest.raises(AttributeError):
        x.ctypes  # noqa: B018
    assert (np.float32(2) * x).dtype == np.float32 and (2.0 * x).dtype == np.float32 and cupy.asarray(x) is x
    np.testing.assert_array_equal(to_numpy(np.where(x > 0, x, 0)), np.ones(3))  # NumPy's functions are CuPy's there


def test_shared_memory_beyond_48_kb_must_be_allowed(monkeypatch):
    """On a GPU the launch fails; the stand-in says so, too."""
    fake_cupy.install(monkeypatch)
    x = fake_cupy.asarray(np.ones(4, np.float32))
    code = cuda.source("device.cuh") + 'extern "C" __global__ void f(float* x) { x[0] = 2; }'
    function = fake_cupy.RawModule(code=code, options=("-std=c++17",)).get_function("f")
    with pytest.raises(AssertionError, match="shared memory"):
        function((1, 1, 1), (1, 1, 1), (x,), shared_mem=50_000)
