"""A program's two ends: its arguments, which check their range, and one way to stop. Imports nothing heavy."""

import argparse
import math
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from .errors import UserError


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the examples' lines alone, and shows the defaults that are plain values."""

    def _get_help_string(self, action):
        plain = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if plain else action.help


class Parser(argparse.ArgumentParser):
    """Raises a UserError where argparse would print and exit: several ranks, which all refuse, say so once."""

    def error(self, message):
        refused = UserError(message)
        refused.head = f"{self.format_usage()}{self.prog}: error:"
        raise refused


def parser(doc: str) -> Parser:
    """A program's parser: its docstring is one line, then examples, which show the name that it was started by."""
    prog = Path(sys.argv[0]).name
    what, examples = doc.strip().split("\n\n")
    if prog.endswith(".py"):
        examples = re.sub(r"^nanomr \w+", f"python {prog}", examples, flags=re.M)
    return Parser(prog=prog, description=fold([what]), epilog=examples, formatter_class=Formatter)


def given(parser: argparse.ArgumentParser) -> set[str]:
    """The destinations of the flags that were typed, whatever their values: defaults are not among them."""
    for action in parser._actions:
        action.default, action.type, action.choices = argparse.SUPPRESS, None, None  # what they warn of was said
    return set(vars(parser.parse_args()))


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


def fold(lines: Iterable[str]) -> str:
    """Lines for the terminal: what is longer than it is wide goes on in further lines."""
    width = max(shutil.get_terminal_size().columns, 20)
    return "\n".join(
        part
        for line in lines
        for part in textwrap.wrap(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        or [line]
    )


def _terminated(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    raise KeyboardInterrupt


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit: 0 or what it returns; 2 for a UserError, 130 for Ctrl-C, 141 for a closed pipe.

    A UserError, full memory (2) and Ctrl-C print one line on stderr. Others are bugs and keep their traceback. SIGTERM,
    which batch systems send, is as Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        try:
            code = main()
        except SystemExit as stopped:  # argparse's --help, which may still be in a buffer
            code = stopped.code
        except UserError as error:
            print(error.head, " ".join(str(error).split()), file=sys.stderr)
            code = 2
        except MemoryError as error:
            said = " ".join(str(error).split())
            print(f"error: out of memory: choose a smaller --batch-size ({said})", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            code = 130
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # here, so that a closed pipe shows up inside the try
    except BrokenPipeError:  # `... | head`: nobody reads on, so end like a program that SIGPIPE stopped
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # Python flushes it once more at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = 141
    sys.exit(code)
