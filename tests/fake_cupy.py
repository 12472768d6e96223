"""Enough of CuPy for nanomr, on a machine without a GPU: arrays are NumPy's, kernels run through ``shim.py``.

It is strict where CuPy or CUDA is. Host and device arrays do not mix; bfloat16 is for our kernels alone. A capture runs
nothing: it notes launches with the memory that they read and write, and a replay runs these, not Python, so that a
number taken from the host is baked in. What a capture does not allow (a look at a value, an upload, cuBLAS) raises.
``counts`` has how often each happened.
"""

import os
import sys
import time
import types
from collections import Counter
from contextlib import contextmanager

import numpy as np
import shim

from nanomr.ops import gpu
from nanomr.ops.gpu import cuda, probes, selftest

counts: Counter = Counter()
_capture: list | None = None  # the launches of the capture under way
MOVES = {
    "reshape",
    "ravel",
    "__getitem__",
    "ascontiguousarray",
    "copy",
    "empty",
    "empty_like",
    "transpose",
    "T",
    "view",
}
CUBLAS = {"matmul", "dot", "tensordot", "einsum", "vdot", "inner"}
SIZES = {"nonzero", "flatnonzero", "argwhere", "unique", "compress"}
# Held to the real CuPy in test_fake_cupy.py: options of functions and attributes of arrays that only NumPy has.
NOT_IN_CUPY = {"initial", "where"}
NO_ATTRIBUTES = {"ctypes", "getfield", "resize", "setfield", "setflags"}
NO_ATTRIBUTES |= {"__array_interface__", "__array_struct__", "__index__"}
launched: set = set()  # (kernel, defines) of all launches
faults: dict[str, str] = {}  # kernel: how it is broken, one of FAULTS
FAULTS = ("wrong", "nan", "compile", "launch", "hang", "crash")
largest = 1 << 40  # bytes that empty() can give
costs = None  # (kernel, defines) -> ms: what a launch takes by the device's clock; None: that is the host's
spent = 0.0  # ms, by such a clock
DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may have without being allowed more


def refuse_in_capture(what):
    counts[what] += 1
    if _capture is not None:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


def as_in_cupy(name, args, kwargs):
    """Refuse what NumPy takes and CuPy does not, and, in a capture, what makes CuPy wait for the device."""
    if kwargs.keys() & NOT_IN_CUPY:
        raise TypeError(f"CuPy's {name} knows no {', '.join(kwargs.keys() & NOT_IN_CUPY)}")
    key = args[1] if name in ("__getitem__", "__setitem__") else ()
    parts = key if isinstance(key, tuple) else (key,)
    if name in SIZES or any(isinstance(p, ndarray) and p.a.dtype == bool for p in parts):
        refuse_in_capture("sync")  # how long the result is depends on values
    if any(isinstance(p, list) for p in parts):
        refuse_in_capture("upload")


class OutOfMemoryError(MemoryError):
    """CuPy's has this name and base."""


def unwrap(x):
    if isinstance(x, ndarray):
        return x.a
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array among CuPy's")
    if isinstance(x, (tuple, list)):
        return type(x)(unwrap(v) for v in x)
    return {k: unwrap(v) for k, v in x.items()} if isinstance(x, dict) else x


def arrays_in(x):
    if isinstance(x, np.ndarray):
        return [x]
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [a for v in values for a in arrays_in(v)]


def run(name, function, args, kwargs):
    """A function of NumPy on device arrays: at once, or noted in a capture."""
    if name in CUBLAS:
        refuse_in_capture("cuBLAS")
    as_in_cupy(name, args, kwargs)
    args, kwargs = unwrap(args), unwrap(kwargs)
    inputs = arrays_in((args, kwargs))
    with np.errstate(all="ignore"):
        if _capture is not None and (name == "__setitem__" or kwargs.get("out")):
            counts["CuPy"] += 1
            _capture.append(lambda: function(*args, **kwargs))
            return ndarray(kwargs["out"][0]) if kwargs.get("out") else None
        result = function(*args, **kwargs)
    if name == "empty" and result.nbytes > largest:
        raise OutOfMemoryError(f"Out of memory allocating {result.nbytes} bytes")
    if result is None or isinstance(result, bool):
        return result
    several = isinstance(result, (tuple, list))
    results = [np.asarray(r) for r in (result if several else (result,))]
    moves = name in MOVES or (name == "astype" and _capture is None)
    if not moves and any(a.dtype.name == "bfloat16" for a in (*inputs, *results)):
        raise TypeError(f"{name} of bfloat16: a training step leaves that to our kernels")
    if _capture is not None and not any(np.may_share_memory(r, a) for r in results for a in inputs):

        def again():
            found = function(*args, **kwargs)
            for r, f in zip(results, found if several else (found,), strict=True):
                np.copyto(r, f)

        counts["CuPy"] += name not in ("empty", "__getitem__")  # its own kernels
        _capture.append(again)
    return type(result)(map(ndarray, results)) if several else ndarray(results[0])


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    def __init__(self, a):
        self.a = a

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return run(ufunc.__name__, getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return run(function.__name__, function, args, kwargs)

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __getattr__(self, name):
        if name in NO_ATTRIBUTES or name == "a":
            raise AttributeError(f"CuPy's arrays have no {name}")
        value = getattr(self.a, name)
        if isinstance(value, np.ndarray):
            return ndarray(value)
        if not callable(value):
            return value
        return lambda *args, **kwargs: run(name, lambda a, *r, **k: getattr(a, name)(*r, **k), (self, *args), kwargs)

    def __getitem__(self, key):
        return run("__getitem__", np.ndarray.__getitem__, (self, key), {})

    def __setitem__(self, key, value):
        run("__setitem__", np.ndarray.__setitem__, (self, key, value), {})

    def __len__(self):
        return len(self.a)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.a.ctypes.data)

    def get(self):
        refuse_in_capture("sync")
        return self.a.copy()

    def _look(self, kind):
        refuse_in_capture("sync")
        return kind(self.a)

    def __bool__(self):
        return self._look(bool)

    def __int__(self):
        return self._look(int)

    def __float__(self):
        return self._look(float)

    def tolist(self):
        return self._look(np.ndarray.tolist)


def asarray(x, dtype=None):
    if isinstance(x, ndarray):
        return x if dtype in (None, x.dtype) else x.astype(dtype)
    refuse_in_capture("upload")
    return ndarray(np.array(x, dtype))


def misbehave(fault, launcher, code, defines, name, arguments, *geometry):
    """A launch of a kernel that is broken."""
    if fault == "launch":
        raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
    if fault == "hang":
        time.sleep(600)
    if fault == "crash":
        os._exit(139)
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    before = [a.copy() for a in arrays]
    launcher(code, defines, name, *geometry, arguments)
    for a, b in zip(arrays, before, strict=True):
        if a.tobytes() != b.tobytes():  # it wrote this one
            last = a.reshape(-1)[-1:]  # one number of all
            last[...] = np.nan if fault == "nan" and a.dtype.kind not in "iu" else last + np.ones(1, a.dtype)


class RawModule:
    def __init__(self, code, options):
        device = cuda.source("device.cuh")
        assert code.startswith(device) and options[0] == "-std=c++17"
        assert isinstance(options, tuple) and all(isinstance(o, str) for o in options)
        self.code, self.defines = code.removeprefix(device), tuple(o[2:] for o in options[1:] if o[:2] == "-D")
        assert ("WGMMA=1" in self.defines) == ("-arch=sm_90a" in options)
        self.launcher = shim.Launcher()
        for name, fault in faults.items():
            if fault == "compile" and f" {name}(" in code:
                raise RuntimeError(f"kernel.cu(7): error: identifier in {name} is undefined")

    def get_function(self, name):
        def function(grid, block, args, shared_mem=0):
            counts["launch"] += 1
            assert shared_mem <= function.max_dynamic_shared_size_bytes, f"{name}: {shared_mem} bytes of shared memory"
            assert all(isinstance(sizes, tuple) and min(sizes) > 0 for sizes in (grid, block)), name
            arguments = unwrap(list(args))
            assert all(isinstance(a, (np.ndarray, np.generic)) for a in arguments), name
            geometry = grid, block, shared_mem

            def launch():
                global spent
                spent += costs(name, self.defines) if costs else 0
                launched.add((name, self.defines))
                if name in faults:
                    return misbehave(faults[name], self.launcher, self.code, self.defines, name, arguments, *geometry)
                self.launcher(self.code, self.defines, name, *geometry, arguments)

            launch() if _capture is None else _capture.append(launch)

        function.max_dynamic_shared_size_bytes = DEFAULT_SHARED
        return function


class Graph:
    def __init__(self, launches):
        self.launches = launches

    def launch(self, stream):
        assert stream is Stream.null, "other work on these arrays is on the default stream"
        counts["replay"] += 1
        with np.errstate(all="ignore"):
            for launch in self.launches:
                launch()


class Stream:
    null = None

    def __init__(self, non_blocking=False):
        self.non_blocking = non_blocking

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def synchronize(self):
        refuse_in_capture("wait")

    def begin_capture(self):
        global _capture
        assert self.non_blocking and _capture is None
        _capture = []

    def end_capture(self):
        global _capture
        launches, _capture = _capture, None
        return Graph(launches)


Stream.null = Stream()


class Event:
    """A moment of the host's: what was launched before it has run already."""

    def record(self, stream=None):
        refuse_in_capture("event")
        self.time = spent / 1e3 if costs else time.perf_counter()

    def synchronize(self):
        refuse_in_capture("wait")


class MemoryPool:
    malloc = None

    def total_bytes(self):
        return 1 << 20

    def free_all_blocks(self):
        refuse_in_capture("free")


@contextmanager
def using_allocator(_):
    yield


class Module(types.ModuleType):
    ndarray, asarray, RawModule = ndarray, staticmethod(asarray), RawModule
    get_default_memory_pool = MemoryPool
    cuda = types.SimpleNamespace(
        Stream=Stream, MemoryPool=MemoryPool, using_allocator=using_allocator, Event=Event,
        Device=lambda: types.SimpleNamespace(synchronize=lambda: refuse_in_capture("wait"), compute_capability="90"),
        is_available=lambda: True, get_current_stream=lambda: types.SimpleNamespace(ptr=0),
        get_elapsed_time=lambda first, last: 1e3 * (last.time - first.time),
        runtime=types.SimpleNamespace(
            getDeviceProperties=lambda _: {"name": b"Stand-in (CPU)"}, driverGetVersion=lambda: 0,
            runtimeGetVersion=lambda: 0,
        ),
    )  # fmt: skip

    def __getattr__(self, name):
        if name == "lib":
            as_strided = np.lib.stride_tricks.as_strided
            tricks = types.SimpleNamespace(as_strided=lambda *a, **k: run("as_strided", as_strided, a, k))
            return types.SimpleNamespace(stride_tricks=tricks)
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        return lambda *args, **kwargs: run(name, value, args, kwargs)


def forget():
    """Leave no kernel behind for those who want the real CuPy's, and no capture of a test that failed in the middle."""
    global _capture, costs
    _capture = costs = None
    counts.clear()
    launched.clear()
    faults.clear()
    gpu.replace()
    gpu.use_tiles()
    cuda._function.cache_clear()


def install(monkeypatch):
    """Be ``cupy`` for a test; :func:`forget` comes after it."""
    forget()
    monkeypatch.setitem(sys.modules, "cupy", Module("cupy"))
    monkeypatch.setattr(gpu, "set_tf32", lambda on: None)
    little = {"narrow": ((1, 4, 4, 8), (1, 1, 8, 8), 1), "tall": ((1, 4, 4, 16), (3, 3, 16, 8), 1)}
    little["wide"] = ((1, 4, 4, 72), (1, 1, 72, 72), 1)
    monkeypatch.setattr(probes, "TIMED", {kind: [shape] for kind, shape in little.items()})
    monkeypatch.setattr(probes, "ROUNDS", 2)
    monkeypatch.setattr(selftest, "remembered", lambda: dict.fromkeys(selftest.NAMES))  # test_selftest.py has it
