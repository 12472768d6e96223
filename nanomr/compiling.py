"""Numba compiles a kernel when it is first called with such arguments: is it at that now? And what it keeps of it.

Numba itself numbers a function's files and keeps an index. Two processes that add to an index at the same time may give
two kernels one number, and one that is killed between the index and the file leaves the number of whatever was there:
then a kernel is called with arguments that it was not compiled for. Nor does Numba see that something has changed that
a kernel takes from another file. :func:`keep` gives each kernel a file of its own, which says what it was made of.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from hashlib import sha256
from pathlib import Path
from types import CodeType, ModuleType

import numpy as np
from numba.core import caching, event


class _Watch(event.Listener):
    """Hears of every compilation, and of none that the disk makes unnecessary."""

    depth = 0  # one kernel calls another
    say: Callable[[], object] | None = None

    def on_start(self, _):
        self.depth += 1
        say, self.say = self.say, None
        if say:
            say()

    def on_end(self, _):
        self.depth -= 1


_watch = _Watch()
event.register("numba:compile", _watch)


def now() -> bool:
    """Is a kernel being compiled? What runs meanwhile, a signal's handler say, has interrupted that."""
    return _watch.depth > 0


def announce(say: Callable[[], object]):
    """Call ``say()`` before the next compilation, if there is one."""
    _watch.say = say


# --- what is kept -----------------------------------------------------------------------------------------------------

PACKAGE = Path(__file__).parent
# As they are when they are imported: what is compiled an hour later has been read now.
SOURCES = {str(file): sha256(file.read_bytes()).hexdigest() for file in sorted(PACKAGE.rglob("*.py"))}
CONSTANTS = (bool, int, float, complex, str, bytes, tuple, np.generic)


def keep(dispatcher):
    """``dispatcher``, of numba.njit(cache=True), whose compiled code is from now on in files of :class:`Kept`."""
    cache = dispatcher._cache
    cache._cache_file = Kept(dispatcher, cache._cache_path, cache._impl.filename_base)
    return dispatcher


class Kept(caching.IndexDataCacheFile):
    """A function's compiled code: a file for each signature, named by a hash of what it is compiled from, which it
    holds as well. A file of another kernel, a damaged one, or one that another process has removed, is none."""

    def __init__(self, dispatcher, folder, base):
        super().__init__(folder, base, None)
        self._dispatcher, self._base = dispatcher, base

    def load(self, key):
        name, wanted = self._named(key)
        try:
            found, data = self._load_data(name)
        except Exception:  # whatever reading a damaged file raises
            return None
        return data if found == wanted else None

    def save(self, key, data):
        name, made_of = self._named(key)
        self._save_data(name, (made_of, data))
        fresh = name.rsplit(".", 2)[0]
        for other in Path(self._cache_path).glob(f"{escape(self._base)}.*"):
            if not other.name.startswith(f"{fresh}.") and ".tmp." not in other.name:  # of sources that are no more
                with suppress(OSError):
                    other.unlink()

    def _named(self, key) -> tuple[str, tuple]:
        """(the file's name, what is in it)."""
        sources, constants = made_of(self._dispatcher.py_func)
        options = sorted((name, repr(_sorted(value))) for name, value in self._dispatcher.targetoptions.items())
        rest = self._version, constants, options, key
        return f"{self._base}.{_short(sources)}.{_short(rest)}.nbc", (sources, *rest)


def made_of(function) -> tuple[list, list]:
    """(the files of this package, with a hash of each, and the constants) that ``function`` and all that it calls is
    compiled from: Numba takes globals as they are, and inlines."""
    files, constants, seen, todo = set(), set(), set(), [function]
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        files.add(function.__code__.co_filename)
        names = _names(function.__code__)
        found = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
        for _, module in [pair for pair in found if isinstance(pair[1], ModuleType)]:
            if getattr(module, "__file__", None) in SOURCES:
                files.add(module.__file__)
                found += [(name, getattr(module, name)) for name in names if hasattr(module, name)]
        for name, value in found:
            if isinstance(value, CONSTANTS):
                constants.add((name, repr(value)))
            elif isinstance(value, np.ndarray):
                constants.add((name, f"{value.dtype} {value.shape} {sha256(value.tobytes()).hexdigest()}"))
            elif hasattr(value, "py_func"):
                todo.append(value.py_func)
            else:  # an intrinsic, a class
                files.add(getattr(sys.modules.get(getattr(value, "__module__", None)), "__file__", None))
    return sorted((Path(file).name, SOURCES[file]) for file in files & SOURCES.keys()), sorted(constants)


def _names(code: CodeType) -> set[str]:
    """The globals and attributes that a function speaks of, with its inner functions'."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _sorted(value):
    return sorted(value) if isinstance(value, set) else value


def _short(value) -> str:
    return sha256(repr(value).encode()).hexdigest()[:16]
