"""Numba compiles a kernel when it is first called with such arguments: is it at that now? And what it keeps of it.

Numba itself numbers a function's files and keeps an index. Two processes that add to an index at the same time may give
two kernels one number, and one that is killed between the index and the file leaves the number of whatever was there:
then a kernel is called with arguments that it was not compiled for. Nor does Numba see that something has changed that
a kernel takes from another module. :func:`keep` gives each kernel a file of its own, which says what it was made of.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from zlib import crc32

import numpy as np
from numba import config
from numba.core import caching, event
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic


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

CONSTANTS = (bool, int, float, complex, str, bytes, tuple, np.generic)
SETTINGS = ("BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE")  # NUMBA_... ones: the same source, another code
SOURCES: dict[str, str] = {}  # of each module, a hash of its source as it was imported


def keep(dispatcher):
    """``dispatcher``, of numba.njit. Where Numba would keep what is compiled of it, that goes, from now on, into files
    of :class:`Kept`; Numba's own remain where the module's source cannot be read."""
    _read_sources()
    cache = getattr(dispatcher, "_cache", None)  # NUMBA_DISABLE_JIT leaves a plain function
    if isinstance(cache, caching.FunctionCache) and dispatcher.__module__ in SOURCES:
        cache._cache_file = Kept(dispatcher.__module__, cache._cache_path, cache._impl.filename_base)
    return dispatcher


def _read_sources():
    """As they are just after they were imported: what is compiled an hour later is made of these, not of the files."""
    package = f"{__package__}."
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and name not in SOURCES:
            with suppress(AttributeError, OSError):  # it has no source, or none that can be read
                SOURCES[name] = sha256(module.__spec__.loader.get_data(module.__file__)).hexdigest()


class Kept(caching.IndexDataCacheFile):
    """What was compiled of a function of ``module``: a file for each signature, named by a hash of all that it is made
    of, which is in it, too. A file of something else, or one that is not as it was written, is none."""

    def __init__(self, module, folder, base):
        super().__init__(folder, base, None)
        self._module, self._base = module, base

    def load(self, key):
        name, wanted = self._named(key)
        try:
            content = Path(self._data_path(name)).read_bytes()
            if content[-4:] != _checksum(content[:-4]):  # damaged machine code might run, and be wrong
                return None
            found, data = self._load_data(name)
        except Exception:  # whatever reading a damaged file raises
            return None
        return data if found == wanted else None

    def save(self, key, data):
        name, parts = self._named(key)
        self._save_data(name, (parts, data))
        self._remove(all_but=name.rsplit(".", 2)[0])  # of sources that are no more

    def flush(self):
        self._remove()

    def _dump(self, obj):
        content = super()._dump(obj)
        return content + _checksum(content)  # behind its end, where reading stops

    def _remove(self, all_but=None):
        for file in Path(self._cache_path).glob(f"{escape(self._base)}.*"):
            if not file.name.startswith(f"{all_but}.") and ".tmp." not in file.name:  # another process writes those
                with suppress(OSError):
                    file.unlink()

    def _named(self, key) -> tuple[str, tuple]:
        """(the file's name, what it is made of)."""
        parts = made_of(self._module)
        sources = {name: SOURCES[name] for name in parts}
        rest = self._version, [str(getattr(config, name)) for name in SETTINGS], parts, key
        return f"{self._base}.{_short(sources)}.{_short(rest)}.nbc", (sources, *rest)


def made_of(module: str) -> dict[str, tuple]:
    """The modules whose code may be in a kernel of ``module``, its own among them, each with its constants (Numba takes
    globals as they are; some depend on the CPU) and with how its kernels are compiled."""
    parts, todo = {}, [module]
    while todo:
        name = todo.pop()
        if name in parts or name not in SOURCES:
            continue
        constants, options = [], []
        for key, value in vars(sys.modules[name]).items():
            if isinstance(value, CONSTANTS) and not key.startswith("__"):
                constants.append((key, repr(value)))
            elif isinstance(value, ModuleType):
                todo.append(value.__name__)
            elif isinstance(value, Dispatcher | _Intrinsic):
                todo.append(value.__module__)
            if isinstance(value, Dispatcher):
                chosen = ((k, sorted(v) if isinstance(v, set) else v) for k, v in value.targetoptions.items())
                options.append((key, repr(sorted(chosen))))
        parts[name] = tuple(sorted(constants)), tuple(sorted(options))
    return dict(sorted(parts.items()))


def _checksum(content: bytes) -> bytes:
    return crc32(content).to_bytes(4)


def _short(value) -> str:
    return sha256(repr(value).encode()).hexdigest()[:16]
