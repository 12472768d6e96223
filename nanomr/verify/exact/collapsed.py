"""The margin of one image and one rival, with the network's stable ReLUs folded into matrices, and its bounds.

Between the unstable ReLUs everything is affine: :func:`collapse` multiplies it out, once, for the trees
(:mod:`~nanomr.verify.exact.bab`) and the MILP (:mod:`~nanomr.verify.exact.milp`). ``docs/derivations/beta_crown.md``.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..bounds.crown import Box, Lines, inner
from ..chain import Chain
from .halfspace import Rows, least, least_dense

BLOCK = 4_000  # numbers in a product that cost as much as another product does
NEAR = 32  # neighbouring units that are drawn in at once: they see much the same
DENSE = 0.2  # the share of pixels that a layer's units see, above which all are counted
RATE, BETA_RATE, DECAY = 0.1, 0.5, 0.9  # Adam's first step for alpha, and for beta per unit of its coefficient
SLACK_64 = 1e-6  # by how much (relatively) float64 must show a thing: a checker whose rounding differs sees it, too


class Blocks(NamedTuple):
    """A matrix (R, C) as a few dense blocks, (its rows, its columns, its numbers) each, beside which it is 0.

    The rows are in the order of a convolution's outputs, so a few in turn see a few rows of the image: a block.
    """

    blocks: list[tuple[slice, slice, np.ndarray]]
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix) -> "Blocks":
        """Blocks are cut in two as long as what that saves is more than what another product costs (BLOCK)."""
        seen, found = matrix != 0, []
        rows = np.flatnonzero(seen.any(1))
        if not len(rows):
            return cls([], matrix.shape)
        first, last = seen[rows].argmax(1), seen.shape[1] - seen[rows, ::-1].argmax(1)
        todo = [(0, len(rows))]
        while todo:
            a, b = todo.pop()
            height = np.append(rows[a + 1 : b], rows[b - 1] + 1) - rows[a]  # of what is above each cut
            above = np.maximum.accumulate(last[a:b]) - np.minimum.accumulate(first[a:b])
            below = np.maximum.accumulate(last[a:b][::-1])[::-1] - np.minimum.accumulate(first[a:b][::-1])[::-1]
            cost = height[:-1] * above[:-1] + (height[-1] - height[:-1]) * below[1:]
            if len(cost) and cost.min() + BLOCK < height[-1] * above[-1]:
                cut = a + 1 + int(cost.argmin())
                todo += [(cut, b), (a, cut)]
            else:
                columns = slice(int(first[a:b].min()), int(last[a:b].max()))
                found.append((slice(int(rows[a]), int(rows[b - 1]) + 1), columns))
        return cls([(*s, np.ascontiguousarray(matrix[s])) for s in found], matrix.shape)

    def astype(self, dtype) -> "Blocks":
        return Blocks([(*s, block.astype(dtype)) for *s, block in self.blocks], self.shape)

    def rows_times(self, x, out, few: bool = False):
        """out (S, C) += x (S, R) times the matrix. ``few``: do the rows of x have zeros where whole blocks are?"""
        for rows, columns, block in self.blocks:
            part = x[:, rows]
            if not few or part.any():
                out[:, columns] += part @ block

    def times_columns(self, y, out):
        """out (S, R) += y (S, C) times the transposed matrix."""
        for rows, columns, block in self.blocks:
            out[:, rows] += y[:, columns] @ block.T


class Collapsed(NamedTuple):
    """The margin as a function of the unstable ReLUs' inputs z (U,) and of y in [-1, 1] (D,), the place in the box:

    z = image y + bias + between relu(z),  margin = row_image . y + row_units . relu(z) + row_bias

    ``between`` is strictly lower triangular by layers, ``layers`` their slices of the units. upper, offset, lower: the
    lines of :class:`~nanomr.verify.bounds.crown.Lines`. ``units``: flat unit indices. ``sparse``: ``image`` again, as
    are ``pixels``, one for each layer; ``under``: ``between`` again, of each layer the parts of the layers before it.
    """

    image: np.ndarray
    bias: np.ndarray
    between: np.ndarray
    row_image: np.ndarray
    row_units: np.ndarray
    row_bias: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray
    sparse: Rows
    units: np.ndarray
    layers: list[slice]
    pixels: list[Blocks]
    under: list[list[Blocks]]

    def single(self) -> "Collapsed":
        """The same in float32, but for ``sparse``."""
        pixels = [b.astype(np.float32) for b in self.pixels]
        under = [[b.astype(np.float32) for b in parts] for parts in self.under]
        return Collapsed(*(np.asarray(v, np.float32) for v in self[:9]), *self[9:12], pixels, under)

    def pick(self, layers) -> np.ndarray:
        """The units' entries (U,) of arrays (1, ...), one for each ReLU layer."""
        return _flat(layers)[self.units]

    def ends(self, relus) -> list[np.ndarray]:
        """(low, high) (U,) of the units, from those of each layer."""
        return [self.pick(side) for side in zip(*relus, strict=True)] if relus else [np.zeros(0)] * 2


def _flat(layers):
    """What each ReLU layer has, (1, ...), one after another."""
    return np.concatenate([np.zeros(0), *(np.ravel(v) for v in layers)])


def collapse(chain: Chain, low, high, relus, row) -> Collapsed:
    """The network in the box [low, high] (1, H, W, C), its stable ReLUs replaced by 0 or the identity.

    relus: the bounds of every ReLU's input, (1, ...) each; row (K,): the margin is row . logits.
    """
    box, lines = Box.between(low, high), [Lines.around(*r) for r in relus]
    places = [np.flatnonzero(line.unstable) for line in lines]
    ends = np.cumsum([0, *map(len, places)])
    layers, n = [slice(a, b) for a, b in pairwise(ends)], ends[-1]
    image, bias, between = np.zeros((n + 1, low.size)), np.zeros(n + 1), np.zeros((n + 1, n))
    for m, at in enumerate([*layers, slice(n, n + 1)]):
        if at.start == at.stop:
            continue
        if m < len(lines):
            a = np.zeros((len(places[m]), lines[m].lower.size))
            a[np.arange(len(a)), places[m]] = 1
            a = a.reshape(-1, *lines[m].lower.shape[1:])
        else:
            a = np.asarray(row, np.float64)[None]
        for k in range(m, -1, -1):
            bias[at] += inner(a, chain.stages[k].bias)
            a = chain.stages[k].transpose(a)
            if k:
                line = lines[k - 1]
                between[at, layers[k - 1]] = a.reshape(len(a), -1)[:, places[k - 1]]
                a = a * np.where(line.unstable, 0, line.lower)
        image[at] = a.reshape(len(a), -1)
    bias += image @ box.centre.ravel()
    image *= box.radius.ravel()
    image_row = image[n]
    units = np.flatnonzero(_flat([line.unstable for line in lines])).astype(np.int32)
    own = [_flat([getattr(line, name) for line in lines])[units] for name in ("lower", "upper", "offset")]
    image, between_row, between = image[:n], between[n], between[:n]
    pixels = [Blocks.of(image[at]) for at in layers]
    under = [[Blocks.of(between[at, e]) for e in layers[:m]] for m, at in enumerate(layers)]
    return Collapsed(
        image, bias[:n], between, image_row, between_row, bias[n], *own, Rows.of(image), units, layers, pixels, under
    )


# --- the bound of a domain, and its gradient --------------------------------------------------------------------------
# A domain is a row of ``signs`` (S, U): 0 not split, +1 "z >= 0", -1 "z <= 0"; and one of ``values`` (S, U): alpha of
# an unstable ReLU that is not split, beta of one that is.


class Part(NamedTuple):
    """``bound`` (S,); the coefficients on the relus (S, U) and on y (S, D); the lines in use (S, U) each."""

    bound: np.ndarray
    relus: np.ndarray
    image: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray


def backward(net: Collapsed, signs, values, chords=None) -> Part:
    """beta-CROWN bounds: the coefficient of a split ReLU's input is that on its output, or 0, minus sign beta.

    ``chords``: (upper, offset) of each domain, (S, U), where they are not the network's.
    """
    free, on = signs == 0, (signs > 0).astype(values.dtype)
    upper, offset = (net.upper, net.offset) if chords is None else chords
    below, above = np.where(free, values, on), np.where(free, upper, on)
    offset, force = np.where(free, offset, 0 * on), np.where(free, 0 * on, -signs * values)
    relus, inputs = np.empty_like(values), np.empty_like(values)
    for m, at in reversed(list(enumerate(net.layers))):
        a = np.repeat(net.row_units[None, at], len(values), 0)
        for after, parts in zip(net.layers[m + 1 :], net.under[m + 1 :], strict=True):
            parts[m].rows_times(inputs[:, after], a)
        negative = np.minimum(a, 0)
        relus[:, at] = a
        inputs[:, at] = (a - negative) * below[:, at] + negative * above[:, at] + force[:, at]
    image = np.repeat(net.row_image[None], len(values), 0)
    for at, pixels in zip(net.layers, net.pixels, strict=True):
        pixels.rows_times(inputs[:, at], image)
    bound = inputs @ net.bias + inner(np.minimum(relus, 0), offset) + net.row_bias - abs(image).sum(1)
    return Part(bound, relus, image, below, above, offset)


def forward(net: Collapsed, part: Part):
    """(z (S, U), relaxed outputs (S, U), true margins (S,), corners y (S, D)) at the minimisers of the bounds.

    z and the outputs are those of the relaxed network; the margins are the network's own at the same y.
    """
    y = -np.sign(part.image)
    true = np.repeat(net.bias[None], len(y), 0)
    for at, pixels in zip(net.layers, net.pixels, strict=True):
        pixels.times_columns(y, true[:, at])
    z, out, kept = true.copy(), np.empty_like(true), np.empty_like(true)
    for at, parts in zip(net.layers, net.under, strict=True):
        for before, between in zip(net.layers, parts, strict=False):
            between.times_columns(out[:, before], z[:, at])
            between.times_columns(kept[:, before], true[:, at])
        lines = part.lower[:, at] * z[:, at], part.upper[:, at] * z[:, at] + part.offset[:, at]
        out[:, at] = np.where(part.relus[:, at] >= 0, *lines)
        kept[:, at] = np.maximum(true[:, at], 0)
    return z, out, y @ net.row_image + kept @ net.row_units + net.row_bias, y


def gradient(signs, part: Part, z):
    """The derivatives of the bounds by ``values``: the positive part of the coefficient times z; -sign z for beta."""
    return np.where(signs == 0, np.maximum(part.relus, 0) * z, -signs * z)


class Climb(NamedTuple):
    """The best bounds (S,) of some domains, the values (S, U) that give them; the lowest margin seen, and where."""

    bound: np.ndarray
    values: np.ndarray
    margin: float
    y: np.ndarray


# Nothing is claimed in float32; and OpenBLAS (0.3.31, AVX-512) computes with what it happens to read beside a float32
# matrix of five columns: the products are right, but a signalling NaN there raises the flag.
@np.errstate(invalid="ignore")
def climb(net: Collapsed, signs, values, scale, steps: int, target: float, chords=None) -> Climb:
    """Adam on alpha and beta together, projected; the best of ``steps`` + 1 points. A bound > target is left alone."""
    best, kept = np.full(len(values), -np.inf, values.dtype), values.copy()
    margin, where, left = np.inf, np.zeros_like(net.row_image), np.arange(len(values))
    first, second = np.zeros_like(values), np.zeros_like(values)
    for step in range(steps + 1):
        part = backward(net, signs, values, chords)
        better = part.bound > best[left]
        best[left[better]], kept[left[better]] = part.bound[better], values[better]
        z, _, margins, y = forward(net, part)
        if margins.min() < margin:
            margin, where = float(margins.min()), y[margins.argmin()]
        on = ~(part.bound > target)
        if step == steps or not on.any():
            break
        slope = gradient(signs, part, z)
        left, signs, values, first, second, slope = (
            v if on.all() else v[on] for v in (left, signs, values, first, second, slope)
        )
        if chords is not None and not on.all():
            chords = chords[0][on], chords[1][on]
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope * slope
        move = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        free = signs == 0
        values = values + DECAY**step * np.where(free, RATE, BETA_RATE * scale) * move
        values = np.clip(values, 0, np.where(free, 1, np.inf)).astype(kept.dtype)
    return Climb(best, kept, margin, where)


# --- what is known where the margin is small --------------------------------------------------------------------------


def restrict(net: Collapsed, part: Part, low, high, limit: float):
    """(low, high, multipliers (2, U)): bounds (U,) of the units at the images of a domain with margin <= ``limit``.

    ``part``: the domain's bound (1,); ``low``, ``high``: what is known already; all in float64. A bound is a linear
    function c . y + k below the margin, so that these images lie in the half-space c . y + k <= limit; over it and the
    box, the least of each unit's linear bounds (:func:`~nanomr.verify.exact.halfspace.least`) is a bound of the
    unit. These are the output-constrained bounds of Kotha et al., *Provably Bounding Neural Network Preimages*, 2023,
    with bisection in the place of their gradient search. ``docs/derivations/beta_crown.md``.

    Where a unit's bounds leave no image (:func:`is_empty`), those of later layers are left as they were.
    """
    low, high, multipliers = low.copy(), high.copy(), np.zeros((2, len(low)))
    c = part.image[0]
    k = part.bound[0] + abs(c).sum() - limit
    for m, at in enumerate(net.layers):
        units = at.start + np.flatnonzero((low[at] < 0) & (high[at] > 0))
        if len(units) == 0:
            continue
        for some in np.split(units, range(NEAR, len(units), NEAR)):
            bound, found = _least(net, m, some, low, high, c, k)
            multipliers[:, some] = found.reshape(2, -1)
            low[some] = np.maximum(low[some], bound[: len(some)])
            high[some] = np.minimum(high[some], -bound[len(some) :])
        if is_empty(low, high):
            break
    return low, high, multipliers


def _least(net: Collapsed, m: int, units, low, high, c, k):
    """(bounds, multipliers), (2 S,) each, of z[units] and of -z[units], units of layer ``m``, where c . y + k <= 0."""
    at, n, side = net.layers[m], len(units), np.arange(2 * len(units))
    factors = np.zeros((2 * n, at.stop))
    factors[side, np.tile(units, 2)] = np.repeat([1.0, -1.0], n)
    constant = np.concatenate([net.bias[units], -net.bias[units]])
    for i, e in reversed(list(enumerate(net.layers[:m]))):
        a = np.concatenate([net.between[units, e], -net.between[units, e]])
        for after, parts in zip(net.layers[i + 1 : m], net.under[i + 1 : m], strict=True):
            parts[i].rows_times(factors[:, after], a, few=True)
        lines, negative = Lines.around(low[e], high[e]), np.minimum(a, 0)
        constant += negative @ lines.offset
        factors[:, e] = (a - negative) * lines.lower + negative * lines.upper
        constant += factors[:, e] @ net.bias[e]
    start, columns, values = net.sparse
    if start[at.stop] - start[at.start] > DENSE * (at.stop - at.start) * len(c):
        w = np.zeros((2 * n, len(c)))
        for e, pixels in zip(net.layers[: m + 1], net.pixels, strict=False):
            pixels.rows_times(factors[:, e], w, few=True)
        bound, found = least_dense(w, c, k)
    else:
        bound, found = least(factors, start, columns, values, c, k)
    return bound + constant, found


def is_empty(low, high) -> bool:
    """Do these bounds leave no image? NaN, which is not above anything, does not say so."""
    return bool((low > high + SLACK_64 * (1 + abs(high))).any())
