"""Files that survive a kill: tensors as safetensors, everything else as JSON.

A file is written beside its target and renamed over it, so that at any moment the target is either the old file or
the new one, whole. A log grows by one flushed line at a time. Nothing that is read here can run code.

JSON has no NaN and no infinity: both are written as null.
"""

import json
import math
import os
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from .backend import to_numpy
from .errors import UserError

_KEY = "nanomr"  # our entry in the metadata of the safetensors header
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Put ``data`` (text as UTF-8) at ``path``, or leave what is there untouched.

    A kill can leave a stray ``.NAME.*.tmp`` beside it, never half a file. Raises UserError when the disk or the
    permissions do not allow it.
    """
    path = Path(path)
    part = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(part, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it was renamed, or never made
            part.unlink()


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping) -> None:
    """Write named arrays of any shape and JSON ``metadata`` as one safetensors file, atomically.

    CuPy arrays are fetched first. Raises UserError when the file cannot be written.
    """
    # order="C": safetensors writes a transposed view's memory as it lies, that is, the wrong tensor.
    # Not ascontiguousarray, which turns a scalar into a vector.
    arrays = {name: np.asarray(to_numpy(tensor), order="C") for name, tensor in tensors.items()}
    write_atomic(path, safetensors.numpy.save(arrays, {_KEY: _dumps(metadata)}))


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays (writable, native byte order) and the metadata of a safetensors file.

    bfloat16 comes as float32, of which it is the upper half. A file that another tool wrote has metadata ``{}``. Raises
    UserError when the file is missing, cut short, damaged, not safetensors, or holds a dtype that NumPy lacks.
    """
    data = _read(path)
    try:
        tensors = {name: _array(**view) for name, view in safetensors.deserialize(data)}
        length = int.from_bytes(data[:8], "little")
        text = (json.loads(data[8 : 8 + length]).get("__metadata__") or {}).get(_KEY, "{}")
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError("the metadata is not a JSON object")
    except KeyError as error:  # float8
        raise UserError(f"{path}: dtype {error.args[0]} is not supported; convert the tensors to float32") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_what_is_wrong(data)}") from error
    return tensors, metadata


_SIZES = {"F": (2, 4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8), "C": (8,)}  # bytes
_DTYPES = {"BOOL": "?"} | {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind, sizes in _SIZES.items() for n in sizes}


def _array(dtype: str, shape, data: bytearray) -> np.ndarray:
    """A tensor of a file. Raises KeyError, with its name, for a dtype that NumPy lacks."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    values = np.frombuffer(data, _DTYPES[dtype])
    return values.astype(values.dtype.newbyteorder("="), copy=False).reshape(shape)


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file. Raises UserError when it is missing, damaged, or holds Python objects."""
    _regular(path)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, MemoryError, NotImplementedError,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise UserError(f"{path} is not a .npz file of arrays, or damaged ({error})") from None


def append_jsonl(path: str | os.PathLike, record: Mapping) -> None:
    """Add ``record`` to the log at ``path`` as one line of JSON that is on the disk when this returns.

    A half line that a kill left at the end is removed first. Raises UserError when the file cannot be written.
    """
    line = _dumps(record).encode() + b"\n"
    try:
        with open(path, "a+b") as file:
            start, last = _last_line(file)
            if last and not last.endswith(b"\n"):
                if _record(last) is None:
                    file.truncate(start)
                else:
                    line = b"\n" + line  # whole, and lacks only its end
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _last_line(file, block=1 << 16) -> tuple[int, bytes]:
    """(where the last line of a binary file starts, the line), reading no more of the file than its end."""
    start = end = file.seek(0, os.SEEK_END)
    tail = b""
    while start > 0 and b"\n" not in tail[:-1]:
        step = min(block, start)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    last = tail[tail.rfind(b"\n", 0, -1) + 1 :] if len(tail) > 1 else tail
    return end - len(last), last


def write_jsonl(path: str | os.PathLike, records: list[Mapping]) -> None:
    """Write a whole log, atomically. Raises UserError when the file cannot be written."""
    write_atomic(path, "".join(_dumps(record) + "\n" for record in records))


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The records of a log; an incomplete last line (a killed run) is left out.

    Raises UserError when the file is missing or another line is not a JSON object.
    """
    data = _read(path)
    lines = data.splitlines()
    records = [_record(line) for line in lines]
    if records and records[-1] is None and not data.endswith(b"\n"):
        records.pop()
    if None in records:
        raise UserError(f"{path}: line {records.index(None) + 1} is not a JSON object; restore or delete that line")
    return records


def write_json(path: str | os.PathLike, value) -> None:
    """Write ``value`` as indented JSON, atomically. Raises UserError when the file cannot be written."""
    write_atomic(path, _dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike):
    """The value in a JSON file. Raises UserError when it is missing or not JSON."""
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


_held: set[tuple[int, int]] = set()  # what this process has locked, by device and inode


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Within it, the run in this folder (or the file at ``path``) is this process's alone. A dead process keeps none.

    May be nested. Raises UserError when another process has it. The lock is the system's ``flock``, which some network
    file systems lack: there the run is not guarded. Windows has a file instead, which is open and so cannot be removed.
    """
    path = Path(path)
    if fcntl is None:
        mine = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
        key = (0, hash(mine.absolute()))
    else:
        handle = os.open(path, os.O_RDONLY)
        status = os.fstat(handle)
        key = (status.st_dev, status.st_ino)
    if key in _held:
        if fcntl is not None:
            os.close(handle)
        yield
        return
    try:
        if fcntl is None:
            mine.unlink(missing_ok=True)
            handle = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileExistsError, PermissionError):
        if fcntl is not None:
            os.close(handle)
        raise UserError(f"another process is at work in {path}: wait for it, or choose another --out") from None
    except OSError:  # no such locks here
        pass
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        os.close(handle)
        if fcntl is None:
            mine.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut."""
    if os.name != "posix":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems refuse; the new file is in place all the same
        os.fsync(handle)
    os.close(handle)


def _regular(path):
    """Raise UserError unless there is a file: to open a named pipe would wait for somebody to write to it."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is a pipe or a device, not a file; check the path")


def _read(path) -> bytes:
    _regular(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _what_is_wrong(data: bytes) -> str:
    """Why ``data`` did not load as safetensors: an 8-byte length, a JSON header of that length, the tensors."""
    if int.from_bytes(data[:8], "little") > _LONGEST_HEADER or data[8:9] not in (b"{", b""):
        return "not a safetensors file; a PyTorch .pt or .pth file must be converted: see docs/torch_twin.py"
    return "damaged or cut short; copy it again, or use an older checkpoint"


def _record(line: bytes) -> dict | None:
    """One line of a log; None when it is not a whole JSON object (a prefix of an object never is one)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _dumps(value, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value):
    """``value`` in JSON's types: NumPy values to Python's, paths to text, tuples to lists, NaN and infinity to None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value
