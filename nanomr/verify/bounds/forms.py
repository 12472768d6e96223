"""Bounds carried forwards: every value of the network as an affine form of the pixels, with an error box around it.

    z = centre + sum_i symbols_i e_i + an error within +-radius,    |e_i| <= 1 a pixel's place in its range

An affine map acts on centre and symbols, signs and all; only the error goes through absolute values, as in interval
bounds. A ReLU that may be on or off is the middle of the strip around it, whose width joins the error (Mirman et al.
2018, hybrid zonotopes; ``docs/derivations/crown.md``). An image costs as many forward passes as it has pixels that
move, however many ReLUs there are: CROWN's rows would cost two for each.

The symbols are float32, and what that rounds is charged to the error; the rest is the tree's dtype, rounded to nearest.
"""

import copy
from typing import NamedTuple

import numpy as np

from ..chain import Stage
from .crown import Lines
from .interval import propagate
from .rounding import gamma, through
from .tree import Relus, Sum, Tree

CHUNK = 128  # symbols at once: what a layer makes of them should not need much room beside them


class Form(NamedTuple):
    """A value of one image: centre and radius (1, ...), symbols (pixels that move, ...) float32."""

    centre: np.ndarray
    radius: np.ndarray
    symbols: np.ndarray

    def total(self):
        """The sum of the symbols' absolute values, (1, ...)."""
        return sum(abs(self.symbols[i : i + CHUNK]).sum(0, np.float64) for i in range(0, len(self.symbols), CHUNK))[
            None
        ]


def forms(tree: Tree, low, high) -> list[tuple]:
    """[(low, high) (B, ...) of each layer of ReLUs' input] over the boxes of images [low, high], (B, H, W, C) each."""
    low, high = (np.asarray(end, tree.dtype) for end in (low, high))
    each = [_bounds(tree, low[i : i + 1], high[i : i + 1]) for i in range(len(low))]
    return [tuple(np.concatenate(ends) for ends in zip(*layer, strict=True)) for layer in zip(*each, strict=True)]


def _bounds(tree, low, high):
    centre, radius = 0.5 * (low + high), 0.5 * (high - low)
    at = np.flatnonzero(~(radius == 0))  # NaN moves, too
    symbols = np.zeros((max(len(at), 1), radius.size), np.float32)
    symbols[np.arange(len(at)), at] = radius.ravel()[at]
    found: list[tuple] = []
    _forth(tree.steps, Form(centre, gamma(1) * radius, symbols.reshape(-1, *radius.shape[1:])), found)
    return found


def _forth(steps, form: Form, found) -> Form:
    for step in steps:
        match step:
            case Stage():
                for layer in step.layers:
                    form = _through(layer, form)
            case Relus():
                total = form.total()
                low, high = (form.centre + side * (total + form.radius) for side in (-1, 1))
                found.append((low, high))
                line = Lines.around(low, high)
                slope, strip = line.upper, 0.5 * line.offset
                radius = slope * (form.radius + gamma(2) * total) + strip
                form = Form(slope * form.centre + strip, radius, form.symbols * slope.astype(np.float32))
            case Sum():
                (a, b) = (_forth(branch, form, found) for branch in step.branches)
                radius = a.radius + b.radius + gamma(1) * (a.total() + b.total())
                form = Form(a.centre + b.centre, radius, a.symbols + b.symbols)
    return form


def _through(layer, form: Form) -> Form:
    centre, radius = propagate(layer, form.centre, form.radius, [])
    linear, single, total = _linear(layer, np.float64), _linear(layer, np.float32), form.total()
    symbols = [single.apply(form.symbols[i : i + CHUNK], bias=False) for i in range(0, len(form.symbols), CHUNK)]
    return Form(centre, radius + through(linear, total, 0 * total)[2], np.concatenate(symbols))


def _linear(layer, dtype):
    """A copy of an affine layer, of this dtype, that adds nothing."""
    other = copy.copy(layer)
    other.params = {name: value.astype(dtype) for name, value in layer.params.items() if name != "bias"}
    other.buffers = {name: (value * (name != "mean")).astype(dtype) for name, value in layer.buffers.items()}
    return other
