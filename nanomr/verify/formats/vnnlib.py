"""Instances in VNN-COMP's form: a box of images and a property as VNN-LIB text, and a list of them as CSV.

Nothing shrinks on the way: boxes are rounded outward when they are computed, written and read.
"""

import gzip
import re
import zlib
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from math import lcm
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


class Exact(NamedTuple):
    """A case as the file's decimals say it: the inputs in the file's order; of each row its coefficients, by output."""

    low: tuple[Fraction, ...]
    high: tuple[Fraction, ...]
    rows: tuple[dict[int, Fraction], ...]
    offsets: tuple[Fraction, ...]


class Case(NamedTuple):
    """X in the box [low, high] and every entry of rows @ Y + offsets <= 0: no point of ``exact`` is left out.

    low, high float64: the smallest box that contains the decimal one; offsets (M,) rounded down; rows (M, K) exact.
    """

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    exact: Exact


class Property(NamedTuple):
    """What a VNN-LIB file asks: is there a point in one of ``cases``? Then the network is not safe.

    ``order`` (inputs,): the file's i-th input is number order[i] of the image, flattened.
    """

    cases: list[Case]
    outputs: int
    order: np.ndarray


def read_vnnlib(path, input_shape: tuple | None = None, outputs: int | None = None, order=None) -> Property:
    """The property in a file as VNN-COMP has them, gzipped or not.

    The boxes' ends are (H, W, C) when that ``input_shape`` is given, else (inputs,) in the file's order. ``outputs``:
    how many the network has; ``order``: of its inputs, by default that of (C, H, W). Understood:
    ``(declare-const X_i Real)`` and ``Y_j``; assertions of ``<=`` and ``>=`` between sums of constants and either
    outputs or one input, with ``+``, ``-`` and ``*``; ``and`` and ``or`` of these, nested in any way. Cases that say
    the same are one; those whose box is empty are none. Every input needs two bounds. Raises UserError, naming what was
    found, for anything else, and for another number of inputs or outputs.
    """
    try:
        return _property(_expressions(_text(Path(path))), input_shape, outputs, order)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except _Refused as refused:
        raise UserError(f"cannot read {path}: {refused}") from None


class _Refused(Exception):
    """Something in the file that :func:`read_vnnlib` does not know."""


LARGEST = 2**28  # bytes of a file, unpacked
CASES = 10_000  # of a property, and its boxes' ends in all a thousand times as many
DEEPEST = 64  # parentheses within each other
NUMBER = r"[-+]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][-+]?[0-9]{1,3})?"
NOTHING = ("set-logic", "set-info", "check-sat", "get-model", "exit")  # commands that say nothing of the property


def _text(path: Path) -> str:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _Refused(f"it is damaged ({error})") from None
    if len(data) > LARGEST:
        raise _Refused(f"it is longer than {LARGEST >> 20} MiB")
    text = data.decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # a comment ends where a line does


def _expressions(text):
    """The S-expressions of a file: nested lists of words."""
    stack: list[list] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text)):
        if token == "(":
            stack.append([])
            if len(stack) > DEEPEST:
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


class _Bound(NamedTuple):
    """X_i >= value (side 0), or <= value (side 1)."""

    i: int
    side: int
    value: Fraction


class _Row(NamedTuple):
    """The sum of coefficient Y_j, plus the offset, is <= 0; ((j, coefficient), ...) by j."""

    coefficients: tuple
    offset: Fraction


def _property(commands, input_shape, outputs, order):
    declared: dict[str, set[int]] = {"X": set(), "Y": set()}
    common: list = []  # what every case says
    cases: list[list] = [[]]  # and what each says beside it
    for command in commands:
        match command:
            case ["declare-const", str(name), "Real"] | ["declare-fun", str(name), [], "Real"] if _variable(name):
                kind, i = _variable(name)
                declared[kind].add(i)
            case ["assert", term]:
                found = _cases(term)
                if len(found) == 1:
                    common += found[0]
                else:
                    cases = _each_with_each(cases, found)
            case [word, *_] if word in NOTHING:
                pass
            case _:
                raise _Refused(f"found {_shown(command)}, neither a declaration nor an assertion")
    for kind, found in declared.items():
        if not found or found != set(range(len(found))):
            raise _Refused(f"the variables {kind}_0, {kind}_1, ... are not all declared")
    inputs, classes = len(declared["X"]), len(declared["Y"])
    if input_shape is not None and inputs != np.prod(input_shape):
        raise _Refused(f"it has {inputs} inputs, the network takes {' x '.join(map(str, input_shape))}")
    for atom in (*common, *(atom for case in cases for atom in case)):
        for kind, i in [("X", atom.i)] if isinstance(atom, _Bound) else [("Y", j) for j, _ in atom.coefficients]:
            if i not in declared[kind]:
                raise _Refused(f"{kind}_{i} is not declared")
    if outputs is not None and classes != outputs:
        raise _Refused(f"it declares {classes} outputs, the network has {outputs}")
    shape = (inputs,) if input_shape is None else tuple(input_shape)
    if order is None:
        order = np.arange(inputs).reshape(shape)
        order = (order if input_shape is None else order.transpose(2, 0, 1)).ravel()
    return Property(_merged(common, cases, classes, shape, order), classes, np.asarray(order))


def _merged(common, cases, classes, shape, order) -> list[Case]:
    """The cases that are not empty, each once; equal boxes are the same arrays."""
    inputs = len(order)
    usual, rows = _box([{}, {}], common), {atom: None for atom in common if isinstance(atom, _Row)}
    boxes: dict[tuple, tuple] = {}
    found: dict[tuple, Case] = {}
    empty = None
    for atoms in cases:
        own = tuple(sorted({atom for atom in atoms if isinstance(atom, _Bound)}))
        if own not in boxes:
            if len(boxes) * inputs > 1000 * CASES:
                raise _Refused(f"it has more than {len(boxes)} boxes of {inputs} inputs")
            ends = _ends(_box(usual, own), shape, order)
            boxes[own] = next((other for other in boxes.values() if other[2:4] == ends[2:4]), ends)
        low, high, exact_low, exact_high, out = boxes[own]
        if out is not None:
            empty = out
            continue
        mine = tuple(rows | {atom: None for atom in atoms if isinstance(atom, _Row)})
        if not mine:
            raise _Refused(
                "it says nothing of the outputs" if len(cases) == 1 else "a case says nothing of the outputs"
            )
        key = id(low), frozenset(mine)
        if key not in found:
            floats = [_floats(row) for row in mine]
            matrix = np.zeros((len(mine), classes))
            for i, (coefficients, _, _) in enumerate(floats):
                matrix[i, list(coefficients)] = [float(value) for value in coefficients.values()]
            exact = Exact(exact_low, exact_high, tuple(f[0] for f in floats), tuple(f[1] for f in floats))
            found[key] = Case(low, high, matrix, np.array([f[2] for f in floats]), exact)
    if not found:
        raise _Refused(f"the bounds of X_{empty} exclude each other")
    return list(found.values())


def _box(box, atoms):
    """[{input: lower bound}, {input: upper bound}] of those of ``box`` and of ``atoms``: the tightest."""
    box = [dict(side) for side in box]
    for atom in atoms:
        if isinstance(atom, _Bound):
            tightest = min if atom.side else max
            old = box[atom.side].get(atom.i, atom.value)
            box[atom.side][atom.i] = tightest(old, atom.value)
    return box


def _ends(box, shape, order):
    """(low, high, exact low, exact high, an input whose bounds exclude each other, or None)."""
    for bounds, side in zip(box, ("lower", "upper"), strict=True):
        if missing := set(range(len(order))) - bounds.keys():
            raise _Refused(f"X_{min(missing)} has no {side} bound")
    exact = [tuple(bounds[i] for i in range(len(order))) for bounds in box]
    out = next((i for i, (a, b) in enumerate(zip(*exact, strict=True)) if a > b), None)
    ends = [
        np.array([_rounded(v, outward) for v in side]) for side, outward in zip(exact, (-np.inf, np.inf), strict=True)
    ]
    place = np.argsort(order)
    return *(end[place].reshape(shape) for end in ends), *exact, out


def _floats(row: _Row):
    """(coefficients by output, offset, the offset rounded down): the row, times what makes its coefficients float64
    numbers, the largest of them between 1/2 and 2."""

    def scaled(by):
        largest = max(abs(value * by) for _, value in row.coefficients)
        by /= Fraction(2) ** (largest.numerator.bit_length() - largest.denominator.bit_length())
        coefficients = {j: value * by for j, value in row.coefficients}
        return coefficients, row.offset * by, all(Fraction(float(v)) == v for v in coefficients.values())

    coefficients, offset, exact = scaled(Fraction(1))
    if not exact:
        coefficients, offset, exact = scaled(Fraction(lcm(*(value.denominator for _, value in row.coefficients))))
    name = f"Y_{row.coefficients[0][0]}"
    if not exact:
        raise _Refused(f"the coefficients of {name} and what is added to it have no multiple in float64")
    if abs(offset) > 1e30:
        raise _Refused(f"the constant that {name} is compared with is too large")
    return coefficients, offset, _rounded(offset, -np.inf)


def _rounded(value: Fraction, outward) -> float:
    """The float64 next to it, on the side of ``outward`` (-inf or inf)."""
    near = float(value)
    beyond = Fraction(near) > value if outward < 0 else Fraction(near) < value
    return float(np.nextafter(near, outward)) if beyond else near


def _cases(term) -> list[list]:
    """The disjunctive normal form of a formula: bounds and rows that hold together, for each case."""
    match term:
        case ["and", *parts] if parts:
            found: list[list] = [[]]
            for part in parts:
                found = _each_with_each(found, _cases(part))
            return found
        case ["or", *parts] if parts:
            found = [case for part in parts for case in _cases(part)]
            if len(found) > CASES:
                raise _Refused(f"it has more than {CASES} cases")
            return found
        case ["<=", left, right] | [">=", right, left]:
            return [[_atom(_difference(left, right), term)]]
    raise _Refused(f"found {_shown(term)}, not an inequality (<= or >=), nor an and or an or of some")


def _each_with_each(some, others):
    if len(some) * len(others) > CASES:
        raise _Refused(f"it has more than {CASES} cases")
    if len(others) == 1 and len(some) == 1:
        some[0] += others[0]  # not a copy: thousands of bounds follow each other
        return some
    return [[*a, *b] for a in some for b in others]


def _atom(form, term):
    """The bound or the row that says form <= 0."""
    form = {name: value for name, value in form.items() if value}
    offset = form.pop(None, Fraction(0))
    variables = sorted((*_variable(name), value) for name, value in form.items())
    kinds = {kind for kind, _, _ in variables}
    if kinds == {"Y"}:
        return _Row(tuple((j, value) for _, j, value in variables), offset)
    if len(variables) == 1:
        _, i, value = variables[0]
        end, side = -offset / value, int(value > 0)
        try:
            float(end)
        except OverflowError:
            raise _Refused(f"found {_shown(term)}, whose end no float64 holds") from None
        return _Bound(i, side, end)
    what = "several inputs" if kinds == {"X"} else "inputs and outputs" if kinds else "no variable"
    raise _Refused(f"found {_shown(term)}, an inequality of {what}")


def _difference(left, right) -> dict:
    form = dict(_linear(left))
    for name, value in _linear(right).items():
        form[name] = form.get(name, 0) - value
    return form


def _linear(term) -> dict:
    """{variable: its coefficient}, the constant's under None."""
    match term:
        case str():
            return {term: Fraction(1)} if _variable(term) else {None: _number(term)}
        case ["+", *terms] if terms:
            form: dict = {}
            for part in map(_linear, terms):
                for name, value in part.items():
                    form[name] = form.get(name, 0) + value
            return form
        case ["-", only]:
            return {name: -value for name, value in _linear(only).items()}
        case ["-", first, *rest] if rest:
            return _difference(first, ["+", *rest])
        case ["*", *factors] if factors:
            product: dict = {None: Fraction(1)}
            for factor in map(_linear, factors):
                if product.keys() != {None}:
                    product, factor = factor, product
                if product.keys() != {None}:
                    raise _Refused(f"found {_shown(term)}, a product of variables")
                product = {name: value * product[None] for name, value in factor.items()}
            if max(v.numerator.bit_length() + v.denominator.bit_length() for v in product.values()) > 20_000:
                raise _Refused(f"found {_shown(term)}, whose digits are too many")
            return product
    raise _Refused(f"found {_shown(term)}, not a sum of variables and decimal numbers")


def _variable(word):
    """("X" or "Y", i) of the word X_i or Y_i, else None."""
    match = re.fullmatch(r"([XY])_([0-9]{1,9})", word)
    return (match[1], int(match[2])) if match else None


def _number(word) -> Fraction:
    if not re.fullmatch(NUMBER, word):
        raise _Refused(f"found {_shown(word)}, not a decimal number")
    if not np.isfinite(float(word)):
        raise _Refused(f"found {_shown(word)}, which no float64 holds")
    return Fraction(Decimal(word))


def _shown(expression):
    """An expression as text, cut to what fits on a line."""
    text = expression if isinstance(expression, str) else f"({' '.join(map(_shown, expression))})"
    return text if len(text) <= 60 else f"{text[:57]}..."
