"""What the three programs share: argument types that check their range, loading a network, and one way to end."""

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from . import checkpoint, metrics, models
from .attacks.common import logits_of
from .backend import to_device, to_numpy
from .errors import UserError


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the examples' lines alone, and shows the defaults that are plain values."""

    def _get_help_string(self, action):
        plain = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if plain else action.help


def fraction(text: str) -> float:
    """An argparse type: ``"8/255"`` or a plain number, as a finite float.

    Raises argparse.ArgumentTypeError, naming the text, for anything else (also nan, inf and x/0).
    """
    try:
        top, *bottom = (float(part) for part in text.split("/"))
        value = top / bottom[0] if bottom else top
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if text.count("/") > 1 or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number or a fraction such as 8/255")
    return value


def number(
    kind: Callable[[str], float] = float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Callable[[str], float]:
    """An argparse type for a finite number in ``low <= x <= high`` and ``x > above``.

    ``kind`` reads the text: ``int``, ``float`` or :func:`fraction`. Example: ``type=number(int, low=1)``.
    The type raises argparse.ArgumentTypeError with the value and the range that was asked for.
    """
    name = "whole number" if kind is int else "number"
    bounds = [f"{sign} {bound}" for sign, bound in ((">=", low), (">", above), ("<=", high)) if math.isfinite(bound)]
    wanted = f"a {name} {' and '.join(bounds)}" if bounds else f"a finite {name}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # An int is finite, and may be too long for isfinite, which goes through float.
        finite = isinstance(value, int) or math.isfinite(value)
        if not (finite and low <= value <= high and value > above):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def linf_radius(text: str) -> float:
    """An argparse type for a linf radius, pixels in [0, 1]: a number or a fraction.

    Above 0.5, where a ball holds half of all images, it asks on stderr whether n/255 was meant; above 1 it refuses.
    """
    eps = number(fraction, low=0)(text)
    meant = "pixels are in [0, 1]" + ("" if "/" in text else f"; did you mean {text.strip()}/255?")
    if eps > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0 and <= 1: {meant}")
    if eps > 0.5:
        print(f"warning: a linf radius of {text}: {meant}", file=sys.stderr)
    return eps


def weights_file(path: Path) -> Path:
    """The file itself where ``path`` is a run folder."""
    return path / "model.safetensors" if path.is_dir() else path


def trained_on(path: Path) -> str:
    """The data set that a weights file names, if this version has it; else shapes10."""
    name = checkpoint.load_tensors(weights_file(path))[1].get("data")
    return "cifar10" if name == "cifar10" else "shapes10"


def load_network(path: Path, dataset, device: str):
    """(model, {"file", "sha256", "architecture"}), or a UserError when it does not fit the data set's images."""
    path = weights_file(path)
    model = models.load(path, device)
    shape, classes = dataset.test_images.shape[1:], len(dataset.classes)
    if model.input_shape != tuple(shape):
        raise UserError(f"{path} is a network for images of shape {model.input_shape}, not {tuple(shape)}")
    if not np.isfinite(to_numpy(model.weights)).all():
        raise UserError(f"{path}: the weights are not all finite numbers; take another checkpoint")
    logits = logits_of(model, metrics.as_float(to_device(dataset.test_images[:1], device)))
    if logits.shape[1] < classes:
        raise UserError(f"{path} knows {logits.shape[1]} classes, {dataset.name} has {classes}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return model, {"file": path.name, "sha256": sha256, "architecture": model.architecture}


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit: 0 or what it returns; 2 for a UserError, 130 for Ctrl-C, 141 for a closed pipe.

    A UserError, full memory (2) and Ctrl-C print one line on stderr. Others are bugs and keep their traceback.
    """
    try:
        code = main()
        sys.stdout.flush()  # here, so that a closed pipe shows up inside the try
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except MemoryError as error:
        print(f"error: out of memory: choose a smaller --batch-size ({' '.join(str(error).split())})", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `... | head`: nobody reads on, so end like a program that SIGPIPE stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        code = 141
    sys.exit(code)


@contextmanager
def progress(total: int, label: str):
    """A progress bar over images; yields ``advance(done, robust)`` for :func:`nanomr.attacks.pgd`."""
    with tqdm(total=total, desc=label, unit="img", disable=None) as bar:

        def advance(done: int, robust: int):
            bar.set_postfix_str(f"robust so far {robust / done:.2%}")
            bar.update(done - bar.n)

        yield advance
