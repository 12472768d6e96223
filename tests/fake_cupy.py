"""Enough of CuPy for nanomr, on a machine without a GPU: arrays are NumPy's, kernels run through ``shim.py``.

It is strict where CuPy or CUDA is. Host and device arrays do not mix; bfloat16 is for our kernels alone. A capture runs
nothing: it notes launches with the memory that they read and write, and a replay runs these, not Python, so that a
number taken from the host is baked in. What a capture does not allow (a look at a value, an upload, cuBLAS) raises.
``counts`` has how often each happened.
"""

import sys
import time
import types
from collections import Counter
from contextlib import contextmanager

import numpy as np
import shim

from nanomr.ops import cuda, gpu

counts: Counter = Counter()
_capture: list | None = None  # the launches of the capture under way
MOVES = {"reshape", "ravel", "__getitem__", "ascontiguousarray", "copy", "empty", "empty_like", "transpose", "T"}
CUBLAS = {"matmul", "dot", "tensordot", "einsum", "vdot", "inner"}


def refuse_in_capture(what):
    counts[what] += 1
    if _capture is not None:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


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
    args, kwargs = unwrap(args), unwrap(kwargs)
    inputs = arrays_in((args, kwargs))
    with np.errstate(all="ignore"):
        if _capture is not None and (name == "__setitem__" or kwargs.get("out")):
            _capture.append(lambda: function(*args, **kwargs))
            return ndarray(kwargs["out"][0]) if kwargs.get("out") else None
        result = function(*args, **kwargs)
    if result is None:
        return None
    if isinstance(result, tuple):  # frexp, nonzero
        if _capture is not None:
            raise NotImplementedError(f"{name} in a capture: several results")
        return tuple(map(ndarray, result))
    result = np.asarray(result)
    if name not in MOVES and any(a.dtype.name == "bfloat16" for a in (*inputs, result)):
        raise TypeError(f"{name} of bfloat16 takes CUDA's headers")
    if _capture is not None and not any(np.may_share_memory(result, a) for a in inputs):
        _capture.append(lambda: np.copyto(result, function(*args, **kwargs)))
    return ndarray(result)


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    def __init__(self, a):
        self.a = a

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return run(ufunc.__name__, getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return run(function.__name__, function, args, kwargs)

    def __getattr__(self, name):
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

    def __index__(self):
        return self._look(int)

    def __float__(self):
        return self._look(float)

    def tolist(self):
        return self._look(np.ndarray.tolist)


def asarray(x, dtype=None):
    if isinstance(x, ndarray):
        return run("asarray", np.asarray, (x, dtype or x.dtype), {})
    refuse_in_capture("upload")
    return ndarray(np.array(x, dtype))


class RawModule:
    def __init__(self, code, options):
        device = cuda.source("device.cuh")
        assert code.startswith(device) and options[0] == "-std=c++17"
        self.code, self.defines = code.removeprefix(device), tuple(o.removeprefix("-D") for o in options[1:])
        self.launcher = shim.Launcher()

    def get_function(self, name):
        def function(grid, block, args, shared_mem=0):
            counts["launch"] += 1
            arguments = unwrap(list(args))
            assert all(isinstance(a, (np.ndarray, np.generic)) for a in arguments), name

            def launch():
                self.launcher(self.code, self.defines, name, grid, block, shared_mem, arguments)

            launch() if _capture is None else _capture.append(launch)

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
        self.time = time.perf_counter()

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
        Device=lambda: types.SimpleNamespace(synchronize=lambda: refuse_in_capture("wait")), is_available=lambda: True,
        get_elapsed_time=lambda first, last: 1e3 * (last.time - first.time),
        runtime=types.SimpleNamespace(getDeviceProperties=lambda _: {"name": b"Stand-in (CPU)"}),
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


def install(monkeypatch):
    """Be ``cupy`` for a test."""
    counts.clear()
    cuda._function.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", Module("cupy"))
    monkeypatch.setattr(gpu, "set_tf32", lambda on: None)
