"""CROWN for networks that are more than a chain: sums of branches, PreActBlocks, batch norms anywhere.

A network is a list of steps: an affine map, a layer of ReLUs, or the sum of two branches, which are lists of steps
themselves. Going back, each says how a linear function of its output becomes one of its input; through a sum the
coefficients go both ways, and what comes back is added. ``docs/derivations/crown.md``.

In the dtype of the tree, rounded to nearest: true up to rounding, in real arithmetic.
"""

import copy
from functools import partial
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ...layers import BatchNorm2d, Layer, PreActBlock, ReLU, Residual, Sequential
from ...models import Model
from ..chain import KNOWN, Stage, finite_stage, fold
from .crown import Box, Lines, gather, inner, one_by_one, relaxed
from .interval import propagate


class Relus(NamedTuple):
    """The layer of ReLUs with this number, in forward order."""

    number: int


class Sum(NamedTuple):
    """The sum of what two lists of steps make of the same input; an empty one is the input itself."""

    branches: tuple[list, list]


class Tree:
    """``model`` as ``steps``, each a :class:`nanomr.verify.chain.Stage`, :class:`Relus` or :class:`Sum`; a copy.

    Batch norms have their running statistics. Raises UserError, naming the layer, for a layer that is unknown, and for
    weights that are not finite.
    """

    @np.errstate(all="ignore")  # numbers that are not finite are refused
    def __init__(self, model: Model, dtype=np.float64):
        self.dtype, self.input_shape = np.dtype(dtype), model.input_shape
        self.relu_shapes: list[tuple] = []  # of each layer of ReLUs' input, without the batch
        layers = list(_parts(copy.deepcopy(model).astype(np.float64)))
        self.steps, shape = self._steps(layers, self.input_shape)
        self.classes = int(np.prod(shape))

    def _steps(self, layers, shape):
        """(the steps of these (name, layer), the shape of their output)."""
        steps, affine = [], []

        def close(shape):
            if affine:
                steps.append(finite_stage(affine[:], shape, self.dtype))
                affine.clear()
                return steps[-1].out_shape
            return shape

        for name, layer in layers:
            if isinstance(layer, BatchNorm2d):
                fold(affine, layer)
            elif isinstance(layer, KNOWN):
                affine.append(layer)
            elif isinstance(layer, ReLU):
                shape = close(shape)
                steps.append(Relus(len(self.relu_shapes)))
                self.relu_shapes.append(shape)
            elif isinstance(layer, tuple):
                start = close(shape)
                branches = [self._steps(branch, start) for branch in layer]
                shape = branches[0][1]
                steps.append(Sum(tuple(branch for branch, _ in branches)))
            else:
                raise UserError(f"no bounds for {name!r} ({type(layer).__name__})")
        return steps, close(shape)

    def forward(self, x):
        """(logits (N, K), [the input of each layer of ReLUs]) of images (N, H, W, C)."""
        inputs: list = []
        return self._forward(self.steps, np.asarray(x, self.dtype), inputs), inputs

    def _forward(self, steps, x, inputs):
        for step in steps:
            match step:
                case Stage():
                    x = step.apply(x)
                case Relus():
                    inputs.append(x)
                    x = np.maximum(x, 0)
                case Sum():
                    x = sum(self._forward(branch, x, inputs) for branch in step.branches)
        return x


def _parts(layer: Layer, prefix=""):
    """(name, layer) of what is applied one after another; a sum is a pair of such lists."""
    inside = {name: list(_parts(child, f"{prefix}{name}.")) for name, child in layer.children.items()}
    if isinstance(layer, Sequential):
        for parts in inside.values():
            yield from parts
    elif isinstance(layer, Residual):
        yield prefix[:-1], tuple([*inside.values(), []][:2])
    elif isinstance(layer, PreActBlock):
        first, shortcut = ("bn1", "relu1"), inside.pop("shortcut", [])
        before = first if layer.shortcut_reads_h else ()
        body = [part for name, parts in inside.items() if name not in before for part in parts]
        for name in before:
            yield from inside[name]
        yield prefix[:-1], (body, shortcut)
    else:
        yield prefix[:-1], layer


class Below(NamedTuple):
    """``value`` (S,) <= rows . z over the box, by the linear function with these coefficients on the ``image``."""

    value: np.ndarray
    image: np.ndarray  # (S, H, W, C)


def lower(steps: list, box: Box, lines: list[Lines], rows, owner) -> Below:
    """Lower bounds of rows . z over boxes, z what ``steps`` make of the image.

    rows (S, *z's shape); owner (S,): which of the B boxes, and of the lines of each layer of ReLUs, each is about.
    """
    of, value = gather(box, owner), np.zeros(len(rows), rows.dtype)
    a = _back(steps, rows, value, lines, of)
    value += inner(a, of(box.centre)) - inner(abs(a), of(box.radius))
    return Below(value, a)


def _back(steps, a, value, lines, of):
    """The coefficients in front of ``steps``, from those ``a`` behind; constants are added to ``value``, in place."""
    for step in reversed(steps):
        match step:
            case Stage():
                value += inner(a, step.bias)
                a = step.transpose(a)
            case Relus():
                a, constant = relaxed(lines[step.number], of, a)
                value += constant
            case Sum():
                a = sum(_back(branch, a, value, lines, of) for branch in step.branches)
    return a


def crown(tree: Tree, low, high, most: float = np.inf, known: list[tuple] | None = None) -> list[tuple]:
    """[(low, high) (B, ...) of each layer of ReLUs' input] over the boxes of images [low, high], (B, H, W, C) each.

    Interval bounds; where they leave at most ``most`` of a layer's ReLUs unstable in an image, these ReLUs get CROWN
    bounds, if they are better: two passes each, back through all that is before them. ``known``: bounds of the same
    kind to begin with, as :func:`nanomr.verify.bounds.forms.forms` has them.
    """
    box, found = Box.between(np.asarray(low, tree.dtype), np.asarray(high, tree.dtype)), []
    _forth(tree.steps, [], box, box, found, [], most, known)
    return found


def _forth(steps, before, image, box, found, lines, most, known=None):
    """The box behind ``steps``, from the one in front, ``box``; ``before``: the steps between it and the image."""
    for step in steps:
        match step:
            case Stage():
                for layer in step.layers:
                    box = Box(*propagate(layer, *box, []))
            case Relus():
                low, high = box.centre - box.radius, box.centre + box.radius
                if known:
                    low, high = np.maximum(low, known[step.number][0]), np.minimum(high, known[step.number][1])
                if not all(isinstance(step, Stage) for step in before):  # of one map, intervals are exact
                    one_by_one(partial(lower, before), image, lines, low, high, most)
                found.append((low, high))
                lines.append(Lines.around(low, high))
                box = Box.between(np.maximum(low, 0), np.maximum(high, 0))
            case Sum():
                ends = [_forth(branch, before, image, box, found, lines, most, known) for branch in step.branches]
                box = Box(*(sum(parts) for parts in zip(*ends, strict=True)))
        before = [*before, step]
    return box


def margins(tree: Tree, low, high, rows, owner, most: float = np.inf, known: list[tuple] | None = None):
    """Lower bounds (S,) of ``rows . logits``, by :func:`crown` and :func:`lower`. rows (S, K), owner (S,)."""
    box = Box.between(np.asarray(low, tree.dtype), np.asarray(high, tree.dtype))
    lines = [Lines.around(*ends) for ends in crown(tree, low, high, most, known)]
    return lower(tree.steps, box, lines, np.asarray(rows, tree.dtype), owner).value


def interval_margins(tree: Tree, low, high, rows, owner):
    """:func:`margins` by intervals alone, up to the last affine map, which goes into the rows (Gowal et al. 2018)."""
    box = Box.between(np.asarray(low, tree.dtype), np.asarray(high, tree.dtype))
    last = [step for step in tree.steps[-1:] if isinstance(step, Stage)]
    box = _forth(tree.steps[: len(tree.steps) - len(last)], [], box, box, [], [], most=0)
    return lower(last, box, [], np.asarray(rows, tree.dtype), owner).value
