"""What the three programs share: the data set, a network that fits its images, and a progress bar."""

import argparse
import hashlib
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import checkpoint, cli, compiling, data, metrics, models, parallel
from ..attacks.common import logits_of
from ..backend import to_device, to_numpy
from ..errors import NoClass, UserError

COMPILES = "compiling the kernels: about half a minute, once"


def announce_compilation():
    """Say so when kernels are compiled, as they are when a program is first used."""
    compiling.announce(lambda: tqdm.write(COMPILES, file=sys.stderr))


def arguments(parser, flag: str, among_ranks) -> argparse.Namespace:
    """What was typed. What all ranks refuse is said once, where ``among_ranks(value)`` of the flag that starts them."""
    try:
        return parser.parse_args()
    except UserError:
        alone = argparse.ArgumentParser(add_help=False)
        alone.add_argument(flag, dest="value", nargs="?")
        value = alone.parse_known_args()[0].value
        with parallel.start("auto" if among_ranks(value) else "none", "cpu").together():
            raise


def refuse_others(parser, heeded: set[str], mode: str):
    """A usage error for a flag that was typed and is not among those, by their destinations, that ``mode`` heeds."""
    if unused := sorted(cli.given(parser) - heeded):
        parser.error(f"--{unused[0].replace('_', '-')} changes nothing with {mode}: leave it out")


def add_data(group, which: str, default: str | None = None):
    """The flags that say which images: ``--data``, ``--data-dir``, ``--no-download``."""
    text = f"shapes10, cifar10, or a .npz file of your own (nanomr.data.load_npz says what is in it): {which}"
    group.add_argument("--data", type=_data, metavar="DATA", default=default, help=text)
    group.add_argument(
        "--data-dir", help="folder with cifar-10-batches-bin; default: $NANOMR_DATA, then the user cache"
    )
    group.add_argument("--no-download", action="store_true", help="fail rather than download CIFAR-10")


def _data(text: str) -> str:
    if text in ("shapes10", "cifar10") or text.endswith(".npz"):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not shapes10, cifar10 or a FILE.npz")


def shard(text: str) -> tuple[int, int]:
    """An argparse type: I/N, with 0 <= I < N."""
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/8")
    return i, n


def load_data(args, name: str | dict) -> data.Dataset:
    """The data set ``name``, or the one that a run's record {"name", "source"} is of, which ``--data`` may say anew."""
    if not isinstance(name, dict):
        return data.load(name, args.data_dir, download=not args.no_download)
    source = name.get("source") or {}
    dataset = load_data(args, args.data or source.get("file") or name["name"])
    if "file" in source and dataset.source.get("sha256") != source["sha256"]:
        raise UserError(f"{dataset.name} is not the file that the run was of (SHA-256): give that by --data")
    return dataset


def weights_file(path: Path) -> Path:
    """The file itself where ``path`` is a run folder."""
    return path / "model.safetensors" if path.is_dir() else path


def trained_on(path: Path) -> str:
    """The data set that a weights file names, if this version has it; else shapes10."""
    name = checkpoint.load_tensors(weights_file(path))[1].get("data")
    return name if name == "cifar10" or (isinstance(name, str) and name.endswith(".npz")) else "shapes10"


def load_network(path: Path, dataset, device: str):
    """(model, {"file", "sha256", "architecture"}), or a UserError when it does not fit the data set's images."""
    path = weights_file(path)
    model = models.load(path, device)
    shape, classes = dataset.test_images.shape[1:], len(dataset.classes)
    if model.input_shape != tuple(shape):
        raise UserError(f"{path} is a network for images of shape {model.input_shape}, not {tuple(shape)}")
    if not np.isfinite(to_numpy(model.weights)).all():
        raise UserError(f"{path}: the weights are not all finite numbers; take another checkpoint")
    try:
        logits = logits_of(model, metrics.as_float(to_device(dataset.test_images[:1], device)))
    except NoClass:
        raise
    except ValueError as error:
        raise UserError(f"{path}: the layers of the network do not fit one another: {error}") from None
    if logits.shape[1] < classes:
        raise UserError(f"{path} knows {logits.shape[1]} classes, {dataset.name} has {classes}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return model, {"file": path.name, "sha256": sha256, "architecture": model.architecture}


@contextmanager
def progress(total: int, label: str):
    """A progress bar over images; yields ``advance(done, robust)`` for :func:`nanomr.attacks.pgd`."""
    with tqdm(total=total, desc=label, unit="img", disable=None) as bar:

        def advance(done: int, robust: int):
            bar.set_postfix_str(f"robust so far {robust / done:.2%}")
            bar.update(done - bar.n)

        yield advance
