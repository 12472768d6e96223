"""Proofs that cut the box in parts: every part is bounded again, many at once. See ``checker.py`` and
``docs/soundness.md``.

The network's last map is the case: a part is closed by weights >= 0 of its rows, whose weighted sum is above 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .network import U64, Network, demand, gamma

TINY = 1e-200
ARRAYS = {
    "parent": "i", "split": "i", "cut": "f", "weights": "f", "slope_start": "i", "slope_unit": "i", "slope_value": "f"
}  # fmt: skip
LARGEST = 2**25  # numbers of all matrices; the parts are bounded with dense ones
CHUNK = 2**18  # numbers in a matrix of rows of some parts


class Layer(NamedTuple):
    """A map y = weight x + bias, dense; ``size``: |weight| (the largest |x| in the whole box) + |bias|; ``low`` and
    ``high`` of x before the ReLU, if it is one: in the whole box."""

    relu: bool
    weight: np.ndarray
    bias: np.ndarray
    size: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Lines(NamedTuple):
    """Of some parts (S, n): lower z <= relu(z) <= upper z + offset; ``on``: surely z >= 0; ``most`` of an unstable
    relu(z), else 0."""

    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray
    on: np.ndarray
    most: np.ndarray

    @classmethod
    def around(cls, low, high) -> "Lines":
        unstable, on = (low < 0) & (high > 0), (low >= 0).astype(float)
        upper = np.where(unstable, np.clip(high / np.where(unstable, high - low, 1), 0, 1), on)
        offset = np.where(unstable, np.maximum(-upper * low, (1 - upper) * high) * (1 + 1e-15) + TINY, 0)
        lower = np.where(unstable, high > -low * (1 + 1e-6), on).astype(float)  # a tie rounds nowhere
        return cls(lower, upper, offset, on, np.where(unstable, high, 0))


class Parts(NamedTuple):
    """The leaves of a tree of boxes: their ends in the inputs ``cut`` (C,), each (B, C); ``weights`` (B, M); which
    ``units`` of which leaves have slopes of their own, from ``start[b]`` to ``start[b + 1]``."""

    cut: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weights: np.ndarray
    start: np.ndarray
    units: np.ndarray
    slopes: np.ndarray


def read_parts(low, high, rows: int, relus: int, proof: Mapping) -> Parts:
    """The leaves, if this is a tree of boxes that covers [low, high] (D,) and each leaf has what it must have.

    Every node has no child, or two: where x[d] <= cut, and where x[d] >= cut, with the same cut within its own box.
    """
    demand(set(proof) == set(ARRAYS), f"a proof must hold {', '.join(ARRAYS)}")
    arrays = {name: np.asarray(proof[name]) for name in ARRAYS}
    wrong = [name for name, kind in ARRAYS.items() if arrays[name].dtype.kind != kind]
    demand(not wrong, f"{', '.join(wrong)}: integers must be integers, and floats floats")
    parent, split, start, units = (arrays[n].astype(np.int64) for n in ("parent", "split", "slope_start", "slope_unit"))
    cuts, weights, slopes = (arrays[name].astype(np.float64) for name in ("cut", "weights", "slope_value"))
    n = parent.size
    demand(
        n > 0 and parent.shape == split.shape == cuts.shape == (n,), "the shapes of parent, split and cut do not fit"
    )
    fine = parent[0] == -1 and split[0] == 0 and ((parent >= 0) & (parent < np.arange(n)))[1:].all()
    demand(fine, "the nodes are not a tree")
    demand(((split >= -len(low)) & (split <= len(low)) & (split != 0))[1:].all(), "there is no such input")
    children = np.bincount(parent[1:], minlength=n)
    demand(np.isin(children, (0, 2)).all(), "the children of a node do not cover it")
    one, other = (1 + np.argsort(parent[1:], kind="stable")).reshape(-1, 2).T
    demand((split[one] == -split[other]).all() and (cuts[one] == cuts[other]).all(),
            "the children of a node do not cover it")  # fmt: skip
    dimensions = np.unique(abs(split[1:]) - 1)
    column = np.searchsorted(dimensions, abs(split) - 1)
    lows, highs = (np.empty((n, len(dimensions))) for _ in range(2))
    lows[0], highs[0] = low[dimensions], high[dimensions]
    inside = True
    for node, (above, side, d, cut) in enumerate(
        zip(parent.tolist(), split.tolist(), column.tolist(), cuts.tolist(), strict=True)
    ):
        if node:
            lows[node], highs[node] = lows[above], highs[above]
            inside &= bool(lows[node, d] <= cut <= highs[node, d])  # NaN is not
            (lows if side > 0 else highs)[node, d] = cut
    demand(inside, "a cut is outside of its box")
    leaves = np.flatnonzero(children == 0)
    b = len(leaves)
    demand(weights.shape == (b, rows), f"{b} parts of {rows} rows need as many weights")
    fine = ((weights >= 0) & np.isfinite(weights)).all() and (weights.sum(1) > 0).all()
    demand(fine, "a weight is not a number >= 0, or all of a part's are 0")
    fits = start.shape == (b + 1,) and units.ndim == 1 and slopes.shape == units.shape
    fits = fits and start[0] == 0 and start[-1] == len(units) and (start[1:] >= start[:-1]).all()
    demand(fits, "the slopes do not fit")
    demand(((units >= 0) & (units < relus)).all(), "there is no such ReLU")
    demand(((slopes >= 0) & (slopes <= 1)).all(), "a slope is not in [0, 1]")
    return Parts(dimensions, lows[leaves], highs[leaves], weights, start, units, slopes)


def bound_of_parts(network: Network, reached, proof: Mapping) -> float:
    """Everywhere in the box that ``reached`` is of, some output of the network is at least this, by ``proof``."""
    numbers = sum(m.weight.shape[0] * m.weight.shape[1] for m in network.maps)
    demand(numbers <= LARGEST, f"the parts of a box are bounded with {LARGEST} numbers at most, not {numbers}")
    layers = [
        Layer(m.relu, m.weight.toarray(), m.bias, r.size, r.low, r.high)
        for m, r in zip(network.maps, reached, strict=True)
    ]
    low, high = layers[0].low, layers[0].high
    if layers[0].relu:  # an identity before it, which rounds nothing
        n = len(low)
        layers.insert(0, Layer(False, np.eye(n), np.zeros(n), np.maximum(abs(low), abs(high)), low, high))
    relus = sum(len(layer.low) for layer in layers if layer.relu)
    parts = read_parts(low, high, len(layers[-1].bias), relus, proof)
    step = max(1, CHUNK // max(layer.weight.size for layer in layers))
    least = np.inf
    for first in range(0, len(parts.weights), step):
        some = slice(first, first + step)
        ends = []
        for whole, part in ((low, parts.low), (high, parts.high)):
            ends.append(np.tile(whole, (len(part[some]), 1)))
            ends[-1][:, parts.cut] = part[some]
        lines = _lines_of_parts(layers, network.slack, *ends)
        owner = np.repeat(np.arange(len(ends[0])), np.diff(parts.start[first : first + len(ends[0]) + 1]))
        own = slice(parts.start[first], parts.start[first + len(ends[0])])
        _put_slopes(lines, owner, parts.units[own], parts.slopes[own])
        weights = parts.weights[some]
        bound = _lower(layers, network.slack, lines, np.arange(len(weights)), weights, *ends)
        bound = bound / weights.sum(1)
        least = np.minimum(least, (bound - gamma(weights.shape[1] + 8, U64) * abs(bound)).min())  # NaN stays
    return float(least)


def _put_slopes(lines, part, units, slopes):
    """Slopes of each part's own in the place of the lower lines', for its last pass alone."""
    first = 0
    for line in lines:
        if line:
            here = (units >= first) & (units < first + line.lower.shape[1])
            line.lower[part[here], units[here] - first] = slopes[here]
            first += line.lower.shape[1]


def _lines_of_parts(layers: list[Layer], slack: float, low, high) -> list[Lines | None]:
    """The lines in each of the boxes [low, high] (S, D), for each layer that takes a ReLU's output."""
    lines: list[Lines | None] = []
    for k, layer in enumerate(layers):
        if not layer.relu:
            lines.append(None)
            continue
        z_low, z_high = _by_constants(layers[:k], slack, lines, low, high)
        np.maximum(z_low, layer.low, out=z_low)  # the whole box's bounds hold as well
        np.minimum(z_high, layer.high, out=z_high)
        part, unit = np.nonzero((z_low < 0) & (z_high > 0))
        if len(part) and any(lines):
            eye = np.zeros((len(part), len(layer.low)))
            eye[np.arange(len(part)), unit] = 1
            z_low[part, unit] = np.maximum(z_low[part, unit], _lower(layers[:k], slack, lines, part, eye, low, high))
            z_high[part, unit] = np.minimum(
                z_high[part, unit], -_lower(layers[:k], slack, lines, part, -eye, low, high)
            )
        lines.append(Lines.around(z_low, z_high))
    return lines


def _by_constants(layers: list[Layer], slack: float, lines, low, high):
    """(low, high) (S, n) of the last layer's outputs in each box: stable ReLUs as they are, the output of an unstable
    one anywhere in [0, most]."""
    last = layers[-1]
    a = np.broadcast_to(last.weight, (len(low), *last.weight.shape))
    least = most = np.broadcast_to(last.bias, (len(low), len(last.bias)))
    charge = np.broadcast_to(last.size, least.shape)
    for layer, line, before in zip(layers[:0:-1], lines[::-1], layers[-2::-1], strict=False):
        if layer.relu:
            above = 0.5 * (a @ line.most[:, :, None])[:, :, 0]
            spread = 0.5 * (abs(a) @ line.most[:, :, None])[:, :, 0]
            least, most = least + (above - spread), most + (above + spread)
            a = a * line.on[:, None]
        rows = a.reshape(-1, a.shape[2])
        value = (rows @ before.bias).reshape(least.shape)
        least, most = least + value, most + value
        charge = charge + (abs(rows) @ before.size).reshape(least.shape)
        a = (rows @ before.weight).reshape(*least.shape, -1)
    middle = 0.5 * (a @ (low + high)[:, :, None])[:, :, 0]
    radius = 0.5 * (abs(a) @ (high - low)[:, :, None])[:, :, 0] + slack * charge + TINY
    return least + middle - radius, most + middle + radius


def _lower(layers: list[Layer], slack: float, lines, part, a, low, high):
    """Lower bounds of the rows ``a`` (R, n) of the last layer's outputs, each in the box of its ``part`` (R,)."""
    value, charge = np.zeros(len(a)), np.zeros(len(a))
    for layer, line in zip(layers[::-1], lines[: len(layers)][::-1], strict=True):
        value += a @ layer.bias
        charge += abs(a) @ layer.size
        a = a @ layer.weight
        if line:
            value += np.einsum("rn,rn->r", 0.5 * (a - abs(a)), line.offset[part])
            a = a * np.where(a > 0, line.lower[part], line.upper[part])
    value += 0.5 * (np.einsum("rn,rn->r", a, (low + high)[part]) - np.einsum("rn,rn->r", abs(a), (high - low)[part]))
    return value - slack * charge - TINY
