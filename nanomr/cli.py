"""What the three programs share: argument types that check their range, and one way to end."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm

from .errors import UserError


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


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit: 0 or what it returns; 2 for a UserError, 130 for Ctrl-C, 141 for a closed pipe.

    A UserError and Ctrl-C print one line on stderr. Every other exception is a bug and keeps its traceback.
    """
    try:
        code = main()
        sys.stdout.flush()  # here, so that a closed pipe shows up inside the try
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
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
