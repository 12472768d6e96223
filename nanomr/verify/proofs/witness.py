"""A point that violates a property: its text, and whether it does, in exact arithmetic.

The competition's format: the verdict, then every input in the property's order, then every output. The inputs are
written as exactly what they are, so that what is read is the point that was meant.
"""

import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from ...checkpoint import load_tensors
from .checker import lower, reach
from .network import CertificateError, Network, demand

MOST = 4_000_000  # nonzero weights that are multiplied exactly: a few seconds
FORMS = ("sat", "sat-real", "sat-float32")  # violated in both arithmetics, in real arithmetic only, in float32 only
TERM = r"\(\s*([XY])_([0-9]{1,9})\s+(-?[0-9]{1,400}(?:\.[0-9]{1,1200})?|\(/ -?[0-9]{1,1200} [0-9]{1,1200}\))\s*\)"


def places(network: Network, order=None) -> np.ndarray:
    """The network's inputs, (H, W, C) flat, each by its place among the property's. ``order``, the other way round: for
    each of these, which input it is; by default they count (C, H, W)."""
    h, w, c = network.input_shape
    count = np.arange(h * w * c)
    return np.argsort(count.reshape(h, w, c).transpose(2, 0, 1).ravel() if order is None else order)


def input_order(path) -> np.ndarray | None:
    """What a network's file says of the order of its properties' inputs. Raises CertificateError if that is none."""
    order = load_tensors(path)[1].get("input_order")
    demand(order is None or sorted(order) == list(range(len(order))), f"{path}: the inputs' order is none")
    return None if order is None else np.array(order)


# --- the text ---------------------------------------------------------------------------------------------------------


def text(verdict: str, x, y) -> str:
    """``x`` and ``y``: Fractions, in the property's order."""
    terms = [f"({kind}_{i} {_decimal(v)})" for kind, values in (("X", x), ("Y", y)) for i, v in enumerate(values)]
    return f"{verdict}\n({chr(10).join(terms)})\n"


def _decimal(value: Fraction) -> str:
    """All its digits; a quotient where they do not end."""
    top, bottom = abs(value.numerator), value.denominator
    twos = (bottom & -bottom).bit_length() - 1
    rest, fives = bottom >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    sign, places = "-" if value < 0 else "", max(twos, fives)
    if rest > 1:
        return f"(/ {value.numerator} {bottom})"
    digits = str(top * 10**places // bottom).rjust(places + 1, "0")
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else f"{digits}.0")


def read(content: str) -> tuple[str, list[Fraction], list[Fraction]]:
    """(verdict, x, y) of a text. Raises CertificateError for another."""
    verdict, _, rest = content.partition("\n")
    demand(verdict in FORMS, f"the counterexample begins with {verdict[:20]!r}, not with sat")
    shape = re.fullmatch(rf"\s*\(\s*((?:{TERM}\s*)+)\)\s*", rest)
    demand(shape, "the counterexample is not a list of inputs and outputs")
    values: dict[str, list[Fraction]] = {"X": [], "Y": []}
    for kind, i, value in re.findall(TERM, shape[1]):
        demand(
            int(i) == len(values[kind]), f"the counterexample has {kind}_{i} where {kind}_{len(values[kind])} was due"
        )
        top, _, bottom = value.strip("(/ )").partition(" ")
        demand(not bottom or int(bottom), "the counterexample divides by zero")
        values[kind].append(Fraction(top) / Fraction(bottom or 1))
    return verdict, values["X"], values["Y"]


# --- the network at one point -----------------------------------------------------------------------------------------


def violates(network: Network, x, rows, offsets, order=None) -> bool | None:
    """Is every row of Y, plus its offset, <= 0 at the point ``x``? Rigorous; None where rounding leaves it open.

    x: Fractions in the property's ``order``; rows: a dict of Fractions, by output, each; offsets: Fractions. First in
    float64, with error bounds; what these leave open exactly, if the network's numbers are rational and not too many.
    """
    point = [x[i] for i in places(network, order)]
    near = np.array([float(v) for v in point])
    low, high = np.nextafter(near, -np.inf), np.nextafter(near, np.inf)
    exact = np.array([Fraction(v) == p for v, p in zip(near.tolist(), point, strict=True)])
    low, high = np.where(exact, near, low), np.where(exact, near, high)
    matrix = np.zeros((len(rows), network.maps[-1].weight.shape[0]))
    for i, row in enumerate(rows):
        for j, value in row.items():
            demand(Fraction(float(value)) == value and j < matrix.shape[1], f"no row of this network: {row}")
            matrix[i, j] = float(value)
    try:
        reached = reach(network, low, high)
        least = [Fraction(v) + o for v, o in zip(lower(network, reached, matrix).tolist(), offsets, strict=True)]
        most = [o - Fraction(v) for v, o in zip(lower(network, reached, -matrix).tolist(), offsets, strict=True)]
        if max(most) <= 0:
            return True
        if max(least) > 0:
            return False
    except (CertificateError, OverflowError, ValueError):
        pass  # numbers too large for float64 are not for whole numbers
    y = outputs(network, x, order)
    return None if y is None else all(
        sum((value * y[j] for j, value in row.items()), offset) <= 0 for row, offset in zip(rows, offsets, strict=True)
    )  # fmt: skip


def outputs(network: Network, x, order=None) -> list[Fraction] | None:
    """The network's outputs at the point ``x``, exactly; None if its numbers are not all rational, or too many.

    Every number is a whole one over a denominator that all of a layer share: sums of products of whole numbers.
    """
    if sum(m.weight.nnz for m in network.maps) > MOST or not all(map(_is_exact, network.maps)):
        return None
    point = [x[i] for i in places(network, order)]
    bottom = int(np.lcm.reduce(np.array([v.denominator for v in point], object)))
    values = np.array([v.numerator * (bottom // v.denominator) for v in point], object)
    for m in network.maps:
        if m.relu:
            values = np.maximum(values, 0)
        numbers, shift = _whole(np.append(m.weight.data, m.bias))
        weight, bias = numbers[: m.weight.nnz], numbers[m.weight.nnz :]
        products = np.append(weight * values[m.weight.indices], 0)  # the 0 is for rows that end the matrix empty
        sums = np.add.reduceat(products, m.weight.indptr[:-1])
        values = np.where(np.diff(m.weight.indptr) > 0, sums, 0) + bias * bottom
        bottom <<= shift
    return [Fraction(v, bottom) for v in values]


def _is_exact(m) -> bool:
    """Are the numbers of a map the file's own? Not where they are computed, unless they are powers of two: then what
    they were divided by was one as well (but for a batch norm's root)."""
    return m.extra == 0 or (m.extra <= 2 and bool((abs(np.frexp(m.weight.data)[0]) == 0.5).all()))


def _whole(values):
    """(whole numbers (N,) object, s): ``values`` are these over 2^s."""
    mantissa, exponent = np.frexp(values)
    whole = (mantissa * 2.0**53).astype(np.int64)
    zeros = np.where(whole == 0, 0, np.frexp((whole & -whole).astype(np.float64))[1] - 1)  # at the end
    exponent = np.where(whole == 0, 0, exponent - 53 + zeros)
    shift = max(0, -int(exponent.min(initial=0)))
    return (whole >> zeros).astype(object) << (exponent + shift).astype(object), shift


def excludes(network: Network, low, high, row, offset, order=None) -> bool:
    """Is the box [low, high] one point, and row . Y + offset > 0 there, for certain? (Of cases that are "point".)"""
    return tuple(low) == tuple(high) and violates(network, low, [row], [offset], order) is False


# --- the check --------------------------------------------------------------------------------------------------------


def check_witness(
    network: Network, low, high, rows, offsets, content: str, predict: Callable | None = None, order=None
) -> str:
    """The verdict that the text ``content`` proves, of one of ``FORMS``; raises CertificateError if it proves none.

    low, high, rows, offsets: the case's numbers as Fractions, in the property's ``order`` (rows: dicts by output).
    ``predict``: the deployed network, images (1, H, W, C) float32 to logits; its answer at the float32 image nearest
    to the point must violate the property as well (or, without it, what the text says that it was).
    """
    verdict, x, y = read(content)
    demand(len(x) == len(low) and len(y) == network.maps[-1].weight.shape[0], "the counterexample is of another size")
    for i, (v, a, b) in enumerate(zip(x, low, high, strict=True)):
        demand(a <= v <= b, f"the counterexample's X_{i} is outside of its bounds")
    if verdict != "sat-float32":
        found = violates(network, x, rows, offsets, order)
        demand(found is not None, "the counterexample lies within rounding of the property's edge")
        demand(found, "the counterexample does not violate the property in real arithmetic")
    if verdict != "sat-real":
        if predict is not None:
            image = np.array([float(v) for v in x])[places(network, order)].astype(np.float32)
            logits = np.asarray(predict(image.reshape(1, *network.input_shape)), np.float64).ravel()
            demand(np.isfinite(logits).all(), "float32 gives numbers that are not finite")
            y = [Fraction(v) for v in logits.tolist()]
        sums = [sum((v * y[j] for j, v in row.items()), o) for row, o in zip(rows, offsets, strict=True)]
        demand(max(sums) <= 0, "the counterexample does not violate the property in float32")
    return verdict
