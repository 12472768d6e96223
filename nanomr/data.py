"""The data sets: CIFAR-10 (found on disk, or downloaded and verified) and the drawn shapes10.

CIFAR-10 is read in its official binary layout: a record is 1 label byte and 3072 pixel bytes, which are the R, G and B
planes of a 32x32 image, row by row. Images come out as NHWC uint8; augmentation and scaling to [0, 1] live in ``ops``.
"""

import gzip
import hashlib
import http.client
import json
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import shapes10
from .borders import check_labels
from .errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SIZE = 170_052_171  # bytes of the archive
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the archive, as published on https://www.cs.toronto.edu/~kriz/cifar.html
TIMEOUT = 30.0  # seconds without a byte before a connection is given up

FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
BIN_FILES = (*TRAIN_FILES, TEST_FILE)
META_FILE = "batches.meta.txt"
MARKER = "nanomr-verified.json"  # we leave it beside files that came out of an archive whose md5 was right
RECORDS = 10_000  # in each file
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, eq=False)
class Dataset:
    name: str  # "cifar10" | "shapes10"
    classes: tuple[str, ...]
    train_images: np.ndarray  # (n, 32, 32, 3) uint8, C-contiguous
    train_labels: np.ndarray  # (n,) int64
    test_images: np.ndarray
    test_labels: np.ndarray
    source: dict  # where it came from and how that was checked; goes into a run's config.json

    def __post_init__(self):
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            check_labels(labels, len(images), len(self.classes))  # on a device nobody will look at them

    def hold_out(self, n: int = 5000) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(train_images, train_labels, held_images, held_labels): views, the last ``n`` training images held out."""
        images, labels = self.train_images, self.train_labels
        split = len(images) - n
        if n < 0 or split < 1:
            raise UserError(f"cannot hold out {n} of {len(images)} training images: choose 0 to {len(images) - 1}")
        return images[:split], labels[:split], images[split:], labels[split:]


def load(name: str = "shapes10", data_dir=None, download: bool = True, progress: bool = True) -> Dataset:
    """The data set ``name``: "shapes10" (drawn in seconds, needs no file) or "cifar10" (see :func:`load_cifar10`).

    Raises UserError for an unknown name, and for CIFAR-10 files that are missing, damaged or cannot be downloaded.
    """
    if name == "cifar10":
        return load_cifar10(data_dir, download, progress)
    if name == "shapes10":
        train, test, seed = shapes10.TRAIN, shapes10.TEST, shapes10.SEED
        source = {"layout": "drawn by nanomr.shapes10", "train": train, "test": test, "seed": seed}
        drawn = (*shapes10.generate(train, seed), *shapes10.generate(test, seed + 1))
        return Dataset(name, shapes10.CLASSES, *drawn, source)
    raise UserError(f"unknown data set {name!r}: use --data shapes10 or --data cifar10")


def load_cifar10(
    data_dir=None,
    download: bool = True,
    progress: bool = True,
    *,
    url: str = URL,
    size: int = SIZE,
    md5: str = MD5,
    records: int = RECORDS,
) -> Dataset:
    """CIFAR-10 from ``data_dir`` (it, or a folder in it), else $NANOMR_DATA, else the user cache; else downloaded.

    A download goes to ``data_dir``, or to the cache if that is None. ``size`` (bytes) and ``md5`` are the archive's.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanomr"
    places = [Path(p).expanduser() for p in (data_dir, os.environ.get("NANOMR_DATA"), cache) if p]
    folder = next((f for f in map(_data_folder, places) if f), None)
    if folder is None:
        target = places[0] if data_dir else cache
        target = target if target.name == FOLDER else target / FOLDER
        way_out = f"put CIFAR-10's .bin files at {target}, or use --data shapes10"
        if not download:
            raise UserError(f"no {FOLDER} in {', '.join(map(str, places))}: {way_out}")
        try:
            _download(target, url, size, md5, records, progress)
        except UserError as error:
            raise UserError(f"{error}; try again, {way_out}") from None
        folder = target
    return _read(folder, md5, records)


def _data_folder(place):
    """``place/cifar-10-batches-bin``, or ``place`` if the files lie there; None if neither."""
    if (place / FOLDER).is_dir():
        return place / FOLDER
    return place if any((place / name).is_file() for name in BIN_FILES) else None


# ---------------------------------------------------------------- reading


def _check_size(path, records):
    expected = records * 3073
    if not path.is_file():
        raise UserError(f"{path} is missing: put it back, or remove {path.parent} to download CIFAR-10 again")
    if path.stat().st_size != expected:
        problem = f"{path} has {path.stat().st_size} bytes, not {expected}"
        raise UserError(f"{problem}: replace it, or remove {path.parent} to download CIFAR-10 again")


def _read(folder, md5, records):
    """The Dataset in ``folder``, every file checked."""
    for name in BIN_FILES:
        _check_size(folder / name, records)
    images = np.empty((6 * records, 32, 32, 3), np.uint8)
    labels = np.empty(6 * records, np.int64)
    sha256 = {}
    for i, name in enumerate(BIN_FILES):
        content = _read_bytes(folder / name)
        sha256[name] = hashlib.sha256(content).hexdigest()
        raw = np.frombuffer(content, np.uint8).reshape(records, 3073)
        wrong = np.flatnonzero(raw[:, 0] > 9)
        if len(wrong):
            problem = f"record {wrong[0]} has label {raw[wrong[0], 0]}, not 0 to 9"
            raise UserError(f"{folder / name}: {problem}; replace the file")
        labels[i * records : (i + 1) * records] = raw[:, 0]
        images[i * records : (i + 1) * records] = raw[:, 1:].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    content = _read_bytes(folder / META_FILE)
    sha256[META_FILE] = hashlib.sha256(content).hexdigest()
    if tuple(content.decode("utf-8", "replace").split()) != CIFAR10_CLASSES:
        raise UserError(f"{folder / META_FILE} does not name CIFAR-10's ten classes in order: replace it")
    source = {"layout": FOLDER, "sha256": sha256, "verified": _is_verified(folder, md5, sha256)}
    split = 5 * records
    return Dataset("cifar10", CIFAR10_CLASSES, images[:split], labels[:split], images[split:], labels[split:], source)


def _read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; put it back or make it readable") from None


def _is_verified(folder, md5, sha256):
    """True if these very bytes came out of an archive with this md5 (the marker says so)."""
    try:
        return json.loads((folder / MARKER).read_text()) == {"archive_md5": md5, "sha256": sha256}
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------- downloading


def _download(target, url, size, md5, records, progress):
    """Fetch, verify and unpack the archive, then rename the finished folder to ``target``: it is whole or not there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # a kill leaves at most this hidden folder, which no search looks at; on the same disk, so that rename is atomic
        with tempfile.TemporaryDirectory(prefix=".nanomr-download-", dir=target.parent) as scratch:
            archive = Path(scratch) / "archive.tar.gz"
            _fetch(url, size, md5, archive, progress)
            folder = _extract(archive, Path(scratch), records)
            sha256 = {name: hashlib.sha256(_read_bytes(folder / name)).hexdigest() for name in (*BIN_FILES, META_FILE)}
            (folder / MARKER).write_text(json.dumps({"archive_md5": md5, "sha256": sha256}, indent=1))
            try:
                folder.rename(target)
            except OSError:
                if not (target / TEST_FILE).is_file():  # else another process was faster, and its copy is as good
                    raise
    except OSError as error:
        raise UserError(f"cannot store CIFAR-10 in {target.parent}: {error.strerror or error}") from None


def _fetch(url, size, md5, path, progress):
    """Copy ``url`` to the file ``path``; its length and md5 must be right."""
    digest, received = hashlib.md5(usedforsecurity=False), 0
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="CIFAR-10", disable=not progress)
    with bar, open(path, "wb") as out:
        for chunk in _chunks(url):
            out.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            if received > size:
                break
    if received != size:
        amount = f"more than {size} bytes" if received > size else f"only {received} of {size} bytes"
        raise UserError(f"{url} sent {amount}")
    if digest.hexdigest() != md5:
        raise UserError(f"{url} has md5 {digest.hexdigest()}, not {md5}: it is damaged or not the official archive")


def _chunks(url):
    """The bytes behind ``url``, piece by piece. Only the network's errors become UserErrors here, not the disk's."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            while chunk := response.read(1 << 16):
                yield chunk
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"cannot download {url}: the server answers {error.code} {error.reason}") from None
    except TimeoutError:
        raise UserError(f"cannot download {url}: nothing came for {TIMEOUT:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url}: {getattr(error, 'reason', error)}") from None


def _extract(archive, scratch, records):
    """Unpack the archive into ``scratch`` if it holds what it should and nothing else; the unpacked folder."""
    meta, readme = f"{FOLDER}/{META_FILE}", f"{FOLDER}/readme.html"
    sizes = {f"{FOLDER}/{name}": records * 3073 for name in BIN_FILES}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            # a second net under the check below; it came with Python 3.11.4
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            members = tar.getmembers()
            for member in members:
                expected = (FOLDER,) if member.isdir() else (*sizes, meta, readme) if member.isreg() else ()
                if member.name not in expected:
                    raise UserError(f"the archive holds {member.name!r}, which CIFAR-10 does not: nothing was unpacked")
            found = {member.name: member.size for member in members}
            for name, size in sizes.items():
                if found.get(name) != size:
                    raise UserError(f"the archive lacks {name} with {size} bytes")
            if meta not in found:
                raise UserError(f"the archive lacks {meta}")
            tar.extractall(scratch, members)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"cannot unpack the archive: {error}") from None
    return scratch / FOLDER
