"""The data sets: CIFAR-10 (found on disk, or downloaded and verified), the drawn shapes10, one's own ``.npz`` files.

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

from . import checkpoint, rng, shapes10
from .backend import cache_folder
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
    name: str  # "cifar10" | "shapes10" | "FILE.npz"
    classes: tuple[str, ...]
    train_images: np.ndarray  # (n, H, W, C) uint8, C-contiguous; one's own may be float32 in [0, 1]
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
    """The data set ``name``: "shapes10" (drawn in seconds, needs no file), "cifar10" (see :func:`load_cifar10`) or a
    path that ends in ".npz" (see :func:`load_npz`).

    Raises UserError for an unknown name, and for files that are missing, damaged or cannot be downloaded.
    """
    if str(name).endswith(".npz"):
        return load_npz(name)
    if name == "cifar10":
        return load_cifar10(data_dir, download, progress)
    if name == "shapes10":
        train, test, seed = shapes10.TRAIN, shapes10.TEST, shapes10.SEED
        source = {"layout": "drawn by nanomr.shapes10", "train": train, "test": test, "seed": seed}
        drawn = (*shapes10.generate(train, seed), *shapes10.generate(test, seed + 1))
        return Dataset(name, shapes10.CLASSES, *drawn, source)
    raise UserError(f"unknown data set {name!r}: use --data shapes10, --data cifar10 or --data FILE.npz")


# ---------------------------------------------------------------- one's own

MOST_CLASSES = 10_000


def load_npz(path) -> Dataset:
    """One's own images, from a ``.npz`` file of NumPy arrays (``numpy.savez``). Its arrays are

    - ``train_images``, ``train_labels``, ``test_images``, ``test_labels``;
    - or ``images`` and ``labels``: a fifth of them, drawn by a seed of 0, are then the test images;
    - and, if the classes have names, ``classes`` (K,), text.

    Images (N, H, W, C), or (N, H, W) for one channel, uint8 or floats in [0, 1]; labels (N,), whole numbers from 0 to
    K - 1, each of them in training. Raises UserError, naming the array, for anything else.
    """
    path = Path(path)
    arrays = checkpoint.load_arrays(path)
    split, whole = ("train_images", "train_labels", "test_images", "test_labels"), ("images", "labels")
    keys = split if set(split) <= set(arrays) else whole
    if not set(keys) <= set(arrays):
        found = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{path} holds {found[:200]}; it must hold {', '.join(split)}, or images and labels")
    data = {key: _own_images(path, key, arrays[key]) for key in keys if key.endswith("images")}
    for images, labels in zip(keys[::2], keys[1::2], strict=True):
        data[labels] = _own_labels(path, labels, arrays[labels], len(data[images]))
    if keys is whole:
        order = rng.generator(0, rng.DATA).permutation(len(data["labels"]))
        test, train = np.split(order, [len(order) // 5])
        if not len(test):
            raise UserError(f"{path}: {len(order)} images are too few to leave a fifth of them for tests")
        data = {
            f"{kind}_{key}": data[key][index] for kind, index in (("train", train), ("test", test)) for key in whole
        }
    if data["train_images"].shape[1:] != data["test_images"].shape[1:]:
        shapes = " and ".join(str(data[key].shape[1:]) for key in split[::2])
        raise UserError(f"{path}: training and test images must be of one shape, not {shapes}")
    if data["train_images"].dtype != data["test_images"].dtype:
        raise UserError(f"{path}: training and test images must be of one type, uint8 or floats")
    known = np.unique(data["train_labels"])
    if not np.array_equal(known, np.arange(len(known))) or len(known) < 2 or data["test_labels"].max() >= len(known):
        raise UserError(
            f"{path}: labels must be 0 to K - 1, at least two, each in training; there are {len(known)} in training, "
            f"{known[0]} to {known[-1]}, and {data['test_labels'].min()} to {data['test_labels'].max()} in the test"
        )
    names = arrays.get("classes", np.arange(len(known)).astype(str))
    if names.shape != known.shape or names.dtype.kind != "U":
        raise UserError(f"{path}: classes must be {len(known)} texts, not {names.dtype} {names.shape}")
    source = {"layout": "npz", "file": str(path.absolute()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return Dataset(path.name, tuple(names.tolist()), *(data[key] for key in split), source)


def _own_images(path, key, images) -> np.ndarray:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"{path}: {key} must be (N, H, W, C), not of shape {images.shape}")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.dtype.kind != "f":
        raise UserError(f"{path}: {key} must be uint8, or floats in [0, 1], not {images.dtype}")
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise UserError(f"{path}: {key} must be in [0, 1], not {low:g} to {high:g}: save uint8, or divide by 255")
    return np.ascontiguousarray(images, np.float32)


def _own_labels(path, key, labels, n: int) -> np.ndarray:
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: {key} must be {n} whole numbers, not {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise UserError(f"{path}: {key} must be 0 to K - 1, not {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)


# ---------------------------------------------------------------- CIFAR-10


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
    cache = cache_folder()
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
