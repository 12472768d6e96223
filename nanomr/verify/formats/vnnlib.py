"""Instances in VNN-COMP's form: a box of images and a property as VNN-LIB text, and a list of them as CSV.

Nothing shrinks on the way: boxes are rounded outward when they are computed, written and read.
"""

import re
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...backend import array_module
from ...checkpoint import write_atomic
from ...errors import UserError
from .onnx_io import export_onnx

DIGITS = 17  # significant; with these, a float64 read back is at most one unit in the last place away


def linf_box(images: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), float64: the smallest one that contains {x' in [0, 1] : |x' - x| <= eps} in exact arithmetic.

    images (N, H, W, C) float32 or float64 in [0, 1], eps in the same units. Raises ValueError for others.
    """
    x = np.asarray(images, np.float64)
    if not (eps >= 0 and np.all((x >= 0) & (x <= 1))):
        raise ValueError("images must be in [0, 1] and eps at least 0")
    ends = []
    for outward in (-1, 1):
        step = outward * eps
        end = x + step
        part = end - x
        error = (x - (end - part)) + (step - part)  # x + step - end, exactly (Knuth 1969)
        ends.append(np.where(error * outward > 0, np.nextafter(end, outward * np.inf), end))
    return np.maximum(ends[0], 0.0), np.minimum(ends[1], 1.0)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_vnnlib(path, low: np.ndarray, high: np.ndarray, label: int, classes: int) -> None:
    """Write "some X in [low, high] has Y_t >= Y_label for some t": the image is robust if and only if that is false.

    low, high (H, W, C), float64; the file counts the pixels in ONNX's order (C, H, W). Its decimal numbers have 17
    significant digits, lower ends rounded down and upper ends up. Raises ValueError for a box that is empty or not
    finite and for a label that is no class, UserError when the file cannot be written.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if low.shape != high.shape or low.ndim != 3:
        raise ValueError(f"low and high must be images (H, W, C), not {low.shape} and {high.shape}")
    if not (np.all(low <= high) and np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("the box is empty or not finite")
    if not 0 <= label < classes or classes < 2:
        raise ValueError(f"the label must be one of 0 ... {classes - 1}, not {label}")
    h, w, c = low.shape
    lines = [f"; robustness of label {label}, X = {c} x {h} x {w} image", ""]
    lines += [f"(declare-const X_{i} Real)" for i in range(low.size)]
    lines += [f"(declare-const Y_{t} Real)" for t in range(classes)]
    lines.append("")
    down, up = (Context(prec=DIGITS, rounding=rounding) for rounding in (ROUND_FLOOR, ROUND_CEILING))
    for i, (a, b) in enumerate(zip(*(end.transpose(2, 0, 1).ravel().tolist() for end in (low, high)), strict=True)):
        lines += [f"(assert (>= X_{i} {_decimal(a, down)}))", f"(assert (<= X_{i} {_decimal(b, up)}))"]
    rivals = "\n".join(f"    (and (>= Y_{t} Y_{label}))" for t in range(classes) if t != label)
    lines += ["", "(assert (or", rivals, "))", ""]
    write_atomic(path, "\n".join(lines))


def _decimal(value, context):
    """Without an exponent, which SMT-LIB does not know, and always with a point."""
    text = format(context.create_decimal_from_float(value), "f")
    return text if "." in text else f"{text}.0"


def export_instances(model, images, labels, eps: float, folder, timeout: float = 120, ids: Sequence | None = None):
    """Write ``model.onnx``, ``vnnlib/img_<id>.vnnlib`` for each image and ``instances.csv`` into ``folder``.

    A line of the CSV is ``onnx,vnnlib,timeout``: paths relative to the folder, and seconds. images (N, H, W, C) float32
    in [0, 1], labels (N,), ids: N different names, by default 0 ... N - 1. The box is :func:`linf_box`'s. Raises what
    :func:`nanomr.verify.formats.onnx_io.export_onnx` and :func:`write_vnnlib` raise.
    """
    ids = [str(name) for name in (range(len(images)) if ids is None else ids)]
    if not len(images) == len(labels) == len(ids) == len(set(ids)):
        raise ValueError(f"{len(images)} images, {len(labels)} labels and {len(set(ids))} different ids")
    folder = Path(folder)
    try:
        (folder / "vnnlib").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    export_onnx(model, folder / "model.onnx")
    zeros = array_module(model.weights).zeros((1, *model.input_shape), np.float32)
    classes = model.forward(zeros)[0].shape[1]
    lines = []
    for name, label, low, high in zip(ids, labels, *linf_box(images, eps), strict=True):
        write_vnnlib(folder / "vnnlib" / f"img_{name}.vnnlib", low, high, int(label), classes)
        lines.append(f"model.onnx,vnnlib/img_{name}.vnnlib,{timeout:g}\n")
    write_atomic(folder / "instances.csv", "".join(lines))


# --- reading ----------------------------------------------------------------------------------------------------------


class Instance(NamedTuple):
    """What a VNN-LIB file asks: is there an X in [low, high] with Y_t >= Y_label for one t of ``rivals``?"""

    low: np.ndarray
    high: np.ndarray
    label: int
    rivals: list[int]  # in the file's order
    classes: int


def read_vnnlib(path, input_shape: tuple | None = None) -> Instance:
    """The instance in a file as VNN-COMP's generators write them.

    low, high float64: the smallest box that contains the decimal one, (H, W, C) when that ``input_shape`` is given,
    else (inputs,) in the file's order. Understood: ``(declare-const X_i Real)`` and ``Y_j``; bounds
    ``(assert (<= X_i number))``, ``>=`` and either order, the tightest of several; one property, either
    ``(assert (or (and (>= Y_t Y_l)) ...))`` or ``(assert (>= Y_t Y_l))``, ``<=`` likewise, with one l for all.
    Raises UserError, naming what was found, for anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return _instance(_expressions(text), input_shape)
    except _Refused as refused:
        raise UserError(f"cannot read {path}: {refused}") from None


class _Refused(Exception):
    """Something in the file that :func:`read_vnnlib` does not know."""


def _expressions(text):
    """The S-expressions of a file: nested lists of words."""
    stack: list[list] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text)):
        if token == "(":
            stack.append([])
            if len(stack) > 9:
                raise _Refused("its parentheses are nested too deeply")
        elif token == ")":
            if len(stack) < 2:
                raise _Refused("it closes a parenthesis that it did not open")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise _Refused("it ends within a parenthesis")
    return stack[0]


def _instance(commands, input_shape):
    inputs, outputs = set(), set()
    lows, highs = {}, {}  # number of an X: its bound
    rivals = []  # (t, l) for Y_t >= Y_l
    for command in commands:
        match command:
            case ["declare-const", name, "Real"] if _index(name, "X") is not None:
                inputs.add(_index(name, "X"))
            case ["declare-const", name, "Real"] if _index(name, "Y") is not None:
                outputs.add(_index(name, "Y"))
            case ["assert", ["<=", low, high] | [">=", high, low]] if (i := _index(high, "X")) is not None:
                lows[i] = max(lows.get(i, -np.inf), _number(low, -np.inf))
            case ["assert", ["<=", low, high] | [">=", high, low]] if (i := _index(low, "X")) is not None:
                highs[i] = min(highs.get(i, np.inf), _number(high, np.inf))
            case ["assert", _] if rivals:
                raise _Refused(f"found {_shown(command)}, a second assertion on the outputs: only one can be read")
            case ["assert", ["or", *terms]] if terms:
                rivals = [_rival(term) for term in terms]
            case ["assert", term]:
                rivals = [_rival(term)]
            case _:
                raise _Refused(f"found {_shown(command)}, neither a declaration nor an assertion")
    for found, name in ((inputs, "X"), (outputs, "Y")):
        if not found or found != set(range(len(found))):
            raise _Refused(f"the variables {name}_0, {name}_1, ... are not all declared")
    for bounds, side in ((lows, "lower"), (highs, "upper")):
        if odd := inputs ^ bounds.keys():
            i = min(odd)
            raise _Refused(f"X_{i} has no {side} bound" if i in inputs else f"X_{i} is not declared")
    low, high = (np.array([bounds[i] for i in range(len(inputs))]) for bounds in (lows, highs))
    if (low > high).any():
        raise _Refused(f"the bounds of X_{int((low > high).argmax())} exclude each other")
    labels = {label for _, label in rivals}
    if len(labels) != 1:
        raise _Refused(f"it speaks of {len(labels)} labels, not of one")
    (label,) = labels
    rivals = [t for t, _ in rivals]
    if undeclared := {label, *rivals} - outputs:
        raise _Refused(f"Y_{min(undeclared)} is not declared")
    if input_shape is not None:
        h, w, c = input_shape
        if low.size != h * w * c:
            raise _Refused(f"it has {low.size} inputs, the network takes {h} x {w} x {c}")
        low, high = (end.reshape(c, h, w).transpose(1, 2, 0) for end in (low, high))
    return Instance(low, high, label, rivals, len(outputs))


def _index(word, kind):
    """i of the word X_i (kind "X") or Y_i, else None."""
    match = isinstance(word, str) and re.fullmatch(rf"{kind}_([0-9]{{1,9}})", word)
    return int(match[1]) if match else None


def _number(word, outward):
    """The float64 next to a decimal number, on the side of ``outward`` (-inf or inf)."""
    if not (isinstance(word, str) and re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", word)):
        raise _Refused(f"found {_shown(word)}, not a decimal number")
    value = float(word)
    if not np.isfinite(value):
        raise _Refused(f"found {_shown(word)}, which no float64 holds")
    inward = Decimal(value) > Decimal(word) if outward < 0 else Decimal(value) < Decimal(word)
    return float(np.nextafter(value, outward)) if inward else value


def _rival(term):
    """(t, l) of Y_t >= Y_l."""
    match term:
        case ["and", inner]:
            return _rival(inner)
        case [">=", rival, label] | ["<=", label, rival]:
            pair = _index(rival, "Y"), _index(label, "Y")
            if None not in pair and pair[0] != pair[1]:
                return pair
    raise _Refused(f"found {_shown(term)}, not (>= Y_t Y_label): only robustness can be read")


def _shown(expression):
    """An expression as text, cut to what fits on a line."""
    text = expression if isinstance(expression, str) else f"({' '.join(map(_shown, expression))})"
    return text if len(text) <= 60 else f"{text[:57]}..."
