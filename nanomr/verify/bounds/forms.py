"""Bounds carried forwards: every value of the network as an affine form of the pixels, with an error box around it.

    z = centre + sum_i symbols_i e_i + an error within +-radius,    |e_i| <= 1 a pixel's place in its range

An affine map acts on centre and symbols, signs and all; only the error goes through absolute values, as in interval
bounds. A ReLU that may be on or off is the middle of the strip around it; the strip's width is a symbol of its own, or,
where there are too many, joins the error (zonotopes; Mirman et al. 2018; ``docs/derivations/crown.md``). An image costs
as many forward passes as it has pixels that move, however many ReLUs there are: CROWN's rows would cost two for each.

In the dtype of the tree, rounded to nearest: true up to rounding, in real arithmetic.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from ..chain import Stage
from .crown import Box, Lines, one_by_one
from .interval import propagate
from .tree import Relus, Sum, Tree, lower

ROOM = 512  # strips of a layer that become symbols
CHUNK = 128  # symbols at once: what a layer makes of them should not need much room beside them


class Form(NamedTuple):
    """A value of one image: centre and radius (1, ...), symbols (pixels that move and strips, ...)."""

    centre: np.ndarray
    radius: np.ndarray
    symbols: np.ndarray

    def total(self):
        """The sum of the symbols' absolute values, (1, ...)."""
        return sum(abs(self.symbols[i : i + CHUNK]).sum(0) for i in range(0, len(self.symbols), CHUNK))[None]


def forms(tree: Tree, low, high, most: float = 0) -> list[tuple]:
    """[(low, high) (B, ...) of each layer of ReLUs' input] over the boxes of images [low, high], (B, H, W, C) each.

    Where at most ``most`` of a layer's ReLUs are left unstable in an image, these get CROWN bounds before the form goes
    on, if they are better: two passes each, back through all that is before them.
    """
    low, high = (np.asarray(end, tree.dtype) for end in (low, high))
    each = [_bounds(tree, low[i : i + 1], high[i : i + 1], most) for i in range(len(low))]
    return [tuple(np.concatenate(ends) for ends in zip(*layer, strict=True)) for layer in zip(*each, strict=True)]


def _bounds(tree, low, high, most):
    centre, radius = 0.5 * (low + high), 0.5 * (high - low)
    at = np.flatnonzero(~(radius == 0))  # NaN moves, too
    symbols = np.zeros((max(len(at), 1), radius.size), tree.dtype)
    symbols[np.arange(len(at)), at] = radius.ravel()[at]
    form, walk = Form(centre, 0 * radius, symbols.reshape(-1, *radius.shape[1:])), _Walk(centre, radius, most)
    walk.forth(tree.steps, [], form)
    return walk.found


class _Walk:
    """What has been found on the way: bounds of each layer of ReLUs' input, and lines."""

    def __init__(self, centre, radius, most):
        self.box, self.most, self.found, self.lines = Box(centre, radius), most, [], []

    def forth(self, steps, before, form: Form) -> Form:
        """The form behind ``steps``, from the one in front; ``before``: the steps between it and the image."""
        for step in steps:
            match step:
                case Stage():
                    for layer in step.layers:
                        form = _through(layer, form)
                case Relus():
                    form = self.relus(before, form)
                case Sum():
                    a, b = (self.forth(branch, before, form) for branch in step.branches)
                    n = len(form.symbols)  # those behind are strips of one branch each
                    symbols = np.concatenate([a.symbols[:n] + b.symbols[:n], a.symbols[n:], b.symbols[n:]])
                    form = Form(a.centre + b.centre, a.radius + b.radius, symbols)
            before = [*before, step]
        return form

    def relus(self, before, form: Form) -> Form:
        total = form.total()
        low, high = (form.centre + side * (total + form.radius) for side in (-1, 1))
        if self.most:
            one_by_one(partial(lower, before), self.box, self.lines, low, high, self.most)
        line = Lines.around(low, high)
        self.found.append((low, high))
        self.lines.append(line)
        slope, strip = line.upper, 0.5 * line.offset
        centre, radius, symbols = slope * form.centre + strip, slope * form.radius, slope * form.symbols
        at = np.flatnonzero(line.unstable)
        if len(at) > ROOM:
            return Form(centre, radius + strip, symbols)
        strips = np.zeros((len(at), strip.size), strip.dtype)
        strips[np.arange(len(at)), at] = strip.ravel()[at]
        return Form(centre, radius, np.concatenate([symbols, strips.reshape(-1, *strip.shape[1:])]))


def _through(layer, form: Form) -> Form:
    chunks = [layer.apply(form.symbols[i : i + CHUNK], bias=False) for i in range(0, len(form.symbols), CHUNK)]
    return Form(*propagate(layer, form.centre, form.radius, []), np.concatenate(chunks))
