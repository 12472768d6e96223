"""Linear programs over the convex hulls of ReLUs: one image, one rival. ``docs/derivations/hull.md``.

CROWN's lines bound a ReLU by its own input z alone. But z is a weighted sum of numbers that each have a range of their
own, and the convex hull of max(z, 0) over that box is smaller than the triangle over z (Anderson et al., *Strong
mixed-integer programming formulations for trained neural networks*, 2020). Its facets are exponentially many; the one
that a program's solution violates most is found by sorting, and added as a cut.

HiGHS solves the programs. Nothing is taken from it but multipliers, rounded to float32, of which any choice >= 0 gives
a true bound: that is evaluated in float64 here, and again by the checker.
"""

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import highspy
import numpy as np

from ..bounds.crown import Box, Lines, inner
from ..chain import Chain
from . import bab
from .bab import Proof, Tree
from .collapsed import SLACK_64, Collapsed, Part, collapse, is_empty, restrict
from .halfspace import Rows

ROUNDS, ENOUGH = 6, 0.8  # times that a node's bounds are drawn in, while what is missing shrinks to that share
PASSES, PAYS = 6, 0.9  # programs before that, with more cuts each, while what is missing shrinks to that share
SECONDS = 2.0  # CPU time of one program, ten times that of a node's first: HiGHS stalls in a few
VIOLATED = 1e-5  # by how much a cut must cut off the solution
# Scaling by largest values: with HiGHS's own choice more programs stall.
OPTIONS = {
    "output_flag": False, "threads": 1, "presolve": "off", "small_matrix_value": 1e-12, "simplex_scale_strategy": 4
}  # fmt: skip


class Cuts(NamedTuple):
    """relu(z[unit]) <= coefficients . v + offset, for v = (x, a): x the pixels, a (U,) the units' outputs.

    ``units`` (K,), ``coefficients`` (K, D + U) float32. The least offset follows (:func:`offsets`): any coefficients
    are a cut.
    """

    units: np.ndarray
    coefficients: np.ndarray

    def __getitem__(self, at) -> "Cuts":
        return Cuts(self.units[at], self.coefficients[at])

    def plus(self, other: "Cuts") -> "Cuts":
        return Cuts(*(np.concatenate(pair) for pair in zip(self, other, strict=True)))

    @classmethod
    def of(cls, cuts, width: int) -> "Cuts":
        coefficients = np.zeros((len(cuts), width), np.float32)
        for row, cut in zip(coefficients, cuts, strict=True):
            row[cut.index] = cut.value
        return cls(np.array([cut.unit for cut in cuts], np.int64), coefficients)

    def each(self) -> list["Cut"]:
        places = [np.flatnonzero(row).astype(np.int32) for row in self.coefficients]
        return [Cut(int(u), at, row[at]) for u, at, row in zip(self.units, places, self.coefficients, strict=True)]


class Cut(NamedTuple):
    """One of them: the ``unit``, and its coefficients that are not 0: (index, value)."""

    unit: int
    index: np.ndarray
    value: np.ndarray


class Duals(NamedTuple):
    """Multipliers >= 0 of a node's program, float32: of a >= z and of the chord (U,), of each cut (K,)."""

    below: np.ndarray
    chord: np.ndarray
    cuts: np.ndarray


class Problem(NamedTuple):
    """The collapsed network and what cuts need of it: ``weight`` (U, D + U), z = weight v + bias, and the ``scale``
    (D + U,) of v: y in [-1, 1] stands for a pixel's place in the box of that radius."""

    net: Collapsed
    weight: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, net: Collapsed, radius) -> "Problem":
        scale = np.append(radius.ravel(), np.ones(len(net.units)))
        return cls(net, np.hstack([net.image, net.between]), scale)

    def box(self, low, high):
        """(low, high) (D + U,) of v = (y, a), from those (U,) of the units' inputs."""
        edge = np.ones(self.net.image.shape[1])
        return np.append(-edge, np.maximum(low, 0)), np.append(edge, np.maximum(high, 0))


def offsets(problem: Problem, cuts: Cuts, low, high):
    """(K,): the least offsets with which the cuts are above 0 and above z, so above the ReLU, for all v in the box."""
    box, c = problem.box(low, high), cuts.coefficients * problem.scale
    above = -_least(c, *box)
    return np.maximum(above, _greatest(problem.weight[cuts.units] - c, *box) + problem.net.bias[cuts.units])


def _least(c, low, high):
    return np.minimum(c, 0) @ high + np.maximum(c, 0) @ low


def _greatest(c, low, high):
    return -_least(-c, low, high)


def separate(problem: Problem, low, high, v, chosen=None) -> Cuts:
    """For each unstable unit the facet that ``v`` (D + U,) violates, if one is, by more than VIOLATED.

    Let f_i in [0, 1] be the place of input i on the way from where it makes z least to where it makes z greatest, and
    g_i what z gains on that way, so that z = least + g . f. For s_i in [0, 1] with s . g = the greatest z, s . (g f)
    is above 0, and above z: the rest of g is -least. The lowest one at f has s_i = 1 for the smallest f_i.
    """
    net, (v_low, v_high) = problem.net, problem.box(low, high)
    d, units, rows = net.image.shape[1], [], []
    for unit in np.flatnonzero((low < 0) & (high > 0)):
        at = np.flatnonzero(problem.weight[unit] * (v_high - v_low))
        w, span = problem.weight[unit, at], (v_high - v_low)[at]
        gain = abs(w) * span
        share = (v[at] - v_low[at]) / span
        share = np.where(w > 0, share, 1 - share)
        top = net.bias[unit] + _greatest(problem.weight[unit], v_low, v_high)
        if not 0 < top < gain.sum():
            continue
        order = np.argsort(share)
        before = np.append(0, np.cumsum(gain[order]))[:-1]
        s = np.clip((top - before) / gain[order], 0, 1)
        if v[d + unit] > (s * gain[order] * share[order]).sum() + VIOLATED:
            row = np.zeros(len(v))
            row[at[order]] = s * w[order]
            units.append(unit)
            rows.append((row / np.where(problem.scale > 0, problem.scale, 1)).astype(np.float32))
    return Cuts(np.array(units, np.int64), np.array(rows, np.float32).reshape(-1, len(v)))


def evaluate(problem: Problem, cuts: Cuts, duals: Duals, low, high) -> Part:
    """The bound (1,) that multipliers give, and the linear function of y below the margin that it is the least of.

        margin >= margin - below (a - z) - chord (upper z + offset - a) - cuts (coefficients . v + offset - a)

    whatever is left of each a is at least its least over the bounds.
    """
    net, box = problem.net, problem.box(low, high)
    d, (below, chord, weights) = net.image.shape[1], (np.asarray(v, np.float64) for v in duals)
    lines, used = Lines.around(low, high), np.flatnonzero(weights)
    cuts, weights = cuts[used], weights[used]
    bound = net.row_bias - chord @ lines.offset - weights @ offsets(problem, cuts, low, high)
    carried = -weights @ (cuts.coefficients * problem.scale)
    image, outputs, inputs = net.row_image + carried[:d], net.row_units + carried[d:], np.zeros(len(low))
    upper = chord + np.bincount(cuts.units, weights, len(low))
    for at in reversed(net.layers):
        left = outputs[at] + inputs[at.stop :] @ net.between[at.stop :, at] - below[at] + upper[at]
        bound += _least(left, box[0][d:][at], box[1][d:][at])
        inputs[at] = below[at] - chord[at] * lines.upper[at]
    image += inputs @ net.image
    bound += inputs @ net.bias - abs(image).sum()
    return Part(np.array([bound]), None, image[None], None, None, None)


def complete(problem: Problem, cuts: Cuts, duals: Duals, low, high, slopes=None) -> Duals:
    """Multipliers of all units, with those of the units that are stable in [low, high] worked out: one backward pass.

    Such a unit is 0, or its input z, and what arrives at its output goes on to z or ends there. Its own ``below`` and
    ``chord`` are taken for multipliers of "z is at most its greatest" and "at least its least", and come on top.
    ``slopes`` (U,): the other units' lower lines, in the place of their multipliers: CROWN's bound, as a program's.
    """
    net, lines, used = problem.net, Lines.around(low, high), np.flatnonzero(duals.cuts)
    weights, d, u = np.asarray(duals.cuts[used], np.float64), net.image.shape[1], len(low)
    outputs = net.row_units - weights @ cuts.coefficients[used, d:] + np.bincount(cuts.units[used], weights, u)
    below, chord, inputs = (np.array(v, np.float32) for v in (duals.below, duals.chord, 0 * low))
    inputs = inputs.astype(np.float64)
    for at in reversed(net.layers):
        left = outputs[at] + inputs[at.stop :] @ net.between[at.stop :, at]
        stable, force = ~lines.unstable[at], below[at].astype(np.float64) - chord[at]
        through = np.where(low[at] >= 0, left + force, force)
        below[at][stable], chord[at][stable] = np.maximum(through, 0)[stable], np.maximum(-through, 0)[stable]
        if slopes is not None:
            ends = np.maximum(left, 0) * slopes[at], np.maximum(-left, 0)
            below[at][~stable], chord[at][~stable] = (side[~stable] for side in ends)
        inputs[at] = below[at] - chord[at] * lines.upper[at]
    return Duals(below, chord, duals.cuts)


def by_lines(problem: Problem, signs, values, low, high) -> Duals:
    """The multipliers that are a tree's bound of one domain: its ``signs`` and ``values`` (U,), alpha or beta."""
    values = values.astype(np.float64)
    slopes = np.where(signs == 0, values, signs > 0)
    duals = Duals(np.where(signs < 0, values, 0), np.where(signs > 0, values, 0), np.zeros(0, np.float32))
    return complete(problem, _no_cuts(problem), duals, low, high, slopes)


def _no_cuts(problem: Problem) -> Cuts:
    return Cuts.of((), len(problem.scale))


def excluding(problem: Problem, cuts: Cuts, duals: Duals, low, high, limit: float) -> Duals:
    """The multiple of these that gives a bound above ``limit``, if one does: they say that no point is left."""
    gain = evaluate(_without_margin(problem), cuts, duals, low, high).bound[0]
    missing = limit + 1 + abs(limit) - evaluate(problem, cuts, Duals(*(0 * m for m in duals)), low, high).bound[0]
    return Duals(*(m * np.float32(max(missing, 0) / gain if gain > 1e-12 else 0) for m in duals))


def _without_margin(problem: Problem) -> Problem:
    net = problem.net
    return problem._replace(net=net._replace(row_image=0 * net.row_image, row_units=0 * net.row_units, row_bias=0.0))


# --- the program ------------------------------------------------------------------------------------------------------


class Program:
    """min margin over (y, z, a): z = weight v + bias, a >= z, a below its chord and the cuts; z and a of the units that
    are unstable in [low, high] alone.

    All others are put in, as 0 or as their own inputs, affine functions of y and these a. That their inputs keep to
    the bounds as well is a row more (``sides``) only where a solution broke it: +(unit + 1) says "at least the least",
    -(unit + 1) "at most the greatest".
    """

    def __init__(self, problem: Problem, low, high, cuts: Cuts, sides=()):
        self.problem, self.low, self.high = problem, low, high
        net, (v_low, v_high), lines = problem.net, problem.box(low, high), Lines.around(low, high)
        free, on = np.flatnonzero(lines.unstable), low >= 0
        self.free, self.on = free, np.flatnonzero(on)
        self.pixels, self.units = d, k = net.image.shape[1], len(free)
        self.through, self.constant = np.hstack([net.image, net.between[:, free]]), net.bias.copy()
        for at in net.layers[1:]:
            before = np.flatnonzero(on[: at.start])
            self.through[at] += net.between[at][:, before] @ self.through[before]
            self.constant[at] += net.between[at][:, before] @ self.constant[before]
        none, each, ones = np.full(k, np.inf), np.arange(k), np.ones(k)
        z, a = d + each, d + k + each
        cost, offset = self._put_in(np.append(net.row_image, net.row_units)[None])
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = d + 2 * k, 3 * k
        lp.col_cost_ = self._columns(cost)[0]
        lp.offset_ = float(net.row_bias + offset[0])
        lp.col_lower_ = np.concatenate([v_low[:d], -none, v_low[d:][free]])
        lp.col_upper_ = np.concatenate([v_high[:d], none, v_high[d:][free]])
        lp.row_lower_ = np.concatenate([self.constant[free], np.zeros(k), -none])
        lp.row_upper_ = np.concatenate([self.constant[free], none, lines.offset[free]])
        start, index, value = _compressed(self._columns(-self.through[free], np.eye(k)))
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.append(start, start[-1] + 2 * np.arange(1, 2 * k + 1)).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate([index, *[np.stack([z, a], 1).ravel()] * 2]).astype(np.int32)
        pairs = [np.stack([side, ones], 1).ravel() for side in (-ones, -lines.upper[free])]
        lp.a_matrix_.value_ = np.concatenate([value, *pairs])
        status = highspy.HighsModelStatus
        self.optimal, self.infeasible, self.interrupted = status.kOptimal, status.kInfeasible, status.kInterrupt
        self.highs = highspy.Highs()
        for name, option in OPTIONS.items():
            self.highs.setOptionValue(name, option)
        self.highs.passModel(lp)
        left = self.left = [lambda: np.inf]  # no reference to self, which would keep the program alive
        self.highs.cbSimplexInterrupt.subscribe(lambda event: not left[0]() > 0 and event.interrupt())
        self.cuts, self.sides = _no_cuts(problem), np.zeros(0, int)  # 0: a row that is a cut
        self.add(cuts, sides)

    def _put_in(self, rows):
        """(rows (S, D + K), constants (S,)) on y and the program's own a, of rows (S, D + U) on y and all a."""
        units, others = rows[:, self.pixels :], rows[:, self.pixels + self.on]
        own = np.hstack([rows[:, : self.pixels], units[:, self.free]])
        return own + others @ self.through[self.on], others @ self.constant[self.on]

    def _columns(self, rows, of_z=0.0):
        """Rows on (y, a) as rows on the columns (y, z, a)."""
        d, k = self.pixels, self.units
        return np.hstack([rows[:, :d], np.zeros((len(rows), k)) + of_z, rows[:, d:]])

    def add(self, cuts: Cuts, sides=()):
        """More rows: cuts above the program's own units, and sides of the others."""
        sides = np.array(sides, int)
        rows = -cuts.coefficients * self.problem.scale
        rows[np.arange(len(rows)), self.pixels + cuts.units] += 1
        rows, constant = self._put_in(rows)
        top = offsets(self.problem, cuts, self.low, self.high) - constant
        unit, up = abs(sides) - 1, sides > 0
        ends = np.maximum(np.where(up, self.low[unit], self.high[unit]), 0) - self.constant[unit]
        least = np.append(np.full(len(top), -np.inf), np.where(up, ends, -np.inf))
        start, index, value = _compressed(self._columns(np.concatenate([rows, self.through[unit]])))
        if len(least):
            top = np.append(top, np.where(up, np.inf, ends))
            self.highs.addRows(len(least), least, top, len(value), start[:-1], index, value)
        self.cuts = self.cuts.plus(cuts)
        self.sides = np.concatenate([self.sides, np.zeros(len(rows), int), sides])

    def broken(self, z) -> np.ndarray:
        """The sides, if any, that inputs z (U,) are on the wrong side of by more than VIOLATED."""
        on, free = self.low >= 0, (self.low < 0) & (self.high > 0)
        least = np.flatnonzero(on & (z < self.low - VIOLATED))
        most = np.flatnonzero(~free & (z > np.maximum(self.high, 0) + VIOLATED))
        return np.append(least + 1, -most - 1)

    def solve(self, left: Callable[[], float]):
        """(v (D + U,), z (U,), Duals), or None where HiGHS finds no optimum while ``left()`` is above 0.

        Where no point is left, v and z are None, and a large multiple of the Duals proves anything. ``stopped``: would
        it go on where it was? ``pulling``: the sides that have multipliers.
        """
        self.left[0] = left
        self.highs.run()
        status, found, d, k = self.highs.getModelStatus(), self.highs.getSolution(), self.pixels, self.units
        if status == self.infeasible:
            _, known, ray = self.highs.getDualRay()
            return (None, None, self._duals(ray, _without_margin(self.problem))) if known else None
        if status != self.optimal:
            return None
        y, _, a = np.split(np.array(found.col_value), [d, d + k])
        z = self.through @ np.append(y, a) + self.constant
        outputs = np.where(self.low >= 0, z, 0)
        outputs[self.free] = a
        return np.append(y, outputs), z, self._duals(found.row_dual, self.problem)

    @property
    def stopped(self) -> bool:
        return self.highs.getModelStatus() == self.interrupted

    def _duals(self, rows, problem: Problem) -> Duals:
        _, own_below, own_chord, rest = np.split(np.array(rows), np.array([1, 2, 3]) * self.units)
        below, chord, unit = np.zeros(len(self.low)), np.zeros(len(self.low)), abs(self.sides) - 1
        below[self.free], chord[self.free] = own_below, -own_chord
        up, down = self.sides > 0, self.sides < 0
        chord[unit[up]], below[unit[down]] = rest[up], -rest[down]
        self.pulling = self.sides[np.where(up, rest, -rest) * (self.sides != 0) > 0]
        duals = Duals(*(np.maximum(m, 0).astype(np.float32) for m in (below, chord, -rest[self.sides == 0])))
        return complete(problem, self.cuts, duals, self.low, self.high)


def _compressed(matrix):
    """(start, index, value) of its rows, as HiGHS takes them."""
    start, column, value = Rows.of(matrix)
    return start.astype(np.int32), column, value


# --- the tree ---------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A node of the tree: its number, bounds (U,) of the units' inputs; the cuts and sides to begin with."""

    number: int
    low: np.ndarray
    high: np.ndarray
    cuts: tuple[Cut, ...] = ()
    sides: tuple[int, ...] = ()


class Bounded(NamedTuple):
    """What the programs of a node said: the best bound, how it came about, with the cuts and sides that pull, which
    children begin with; and where to split."""

    part: Part
    duals: Duals
    cuts: tuple[Cut, ...]
    sides: tuple[int, ...]
    unit: int

    @classmethod
    def of(cls, part: Part, duals: Duals, cuts=(), sides=(), unit: int = -1) -> "Bounded":
        """Without cuts that have no multiplier."""
        used = np.flatnonzero(duals.cuts)
        cuts, sides = tuple(cuts[i] for i in used), tuple(sides)
        return cls(part, duals._replace(cuts=duals.cuts[used]), cuts, sides, unit)


def search(chain: Chain, low, high, relus, row, *, threshold: float = 0.0, cpu_limit: float = 60.0) -> Tree:
    """Is the margin row . logits > threshold for every image in [low, high], (1, H, W, C) float64?

    As :func:`~nanomr.verify.exact.bab.branch_and_bound`, whose trees have more and cheaper nodes: ``chain`` in float64,
    row (K,), relus: [(low, high) (1, ...)] as :func:`~nanomr.verify.bounds.crown.crown` gives them. Gives up after
    ``cpu_limit`` seconds of CPU time, and where HiGHS fails. Needs highspy.
    """
    end = time.process_time() + cpu_limit
    return Search(chain, low, high, relus, row, threshold=threshold).run(lambda: end - time.process_time())


class Search:
    """The tree of :func:`search`, as :class:`~nanomr.verify.exact.bab.Search`: ``run``, ``tree``, ``nearest``.

    At each node the bounds are drawn in to the images with margin <= threshold, as there, by the program's linear
    function; then the unit is split whose upper side costs most. ``tree``: a search of the same question, whose root's
    bounds this one takes over.
    """

    def __init__(self, chain: Chain, low, high, relus, row, *, threshold: float = 0.0, tree: bab.Search | None = None):
        begin = time.process_time()
        self.chain, self.low, self.high, self.row = chain, low, high, np.asarray(row, np.float64)[None]
        self.threshold, self.limit = threshold, threshold + SLACK_64 * (1 + abs(threshold))
        self.tree, self.nearest, self.margin, self.stop = None, None, np.inf, None
        self.visited, self.worst, self.least, self.tie = 0, -np.inf, np.inf, count(1)
        if all(np.isfinite(side).all() for r in relus for side in r):
            self.box = Box.between(low, high)
            net = collapse(chain, low, high, relus, self.row[0]) if tree is None else tree.exact
            self.problem, self.proof = Problem.of(net, self.box.radius), Proof(net.units)
            self.heap = [(-np.inf, 0, Node(0, *net.ends(relus)))]
            self.growing = self._grow([] if tree is None else tree.drawn_in())
        else:
            self.tree = Tree("timeout", None, np.nan, None, 0, 0.0)
        self.seconds = time.process_time() - begin

    def run(self, left: Callable[[], float], stop: Callable[[], float] | None = None) -> Tree:
        """Go on while ``left()``, seconds of any clock, is above 0.

        Between programs: HiGHS would begin anew. While one is solved, only ``stop()`` counts (by default ``left``).
        """
        begin, self.stop = time.process_time(), stop or left
        while self.tree is None and left() > 0:
            next(self.growing, None)
        self.seconds += time.process_time() - begin
        return self._answer("timeout") if self.tree is None else self.tree._replace(seconds=self.seconds)

    def _answer(self, status: str, image=None) -> Tree:
        arrays, bound = None, min(self.worst, self.least)
        if status == "proved":
            theta = self.limit if self.proof.multipliers else np.inf
            arrays = _arrays(self.proof, len(self.problem.scale), theta)
            bound = min(self.least, theta)
        return Tree(status, image, float(bound), arrays, self.visited, self.seconds)

    def _end(self, status: str, image=None):
        self.tree = self._answer(status, image)

    def _closed(self, found: Bounded) -> bool:
        bound = found.part.bound[0]
        return bool(bound - SLACK_64 * (1 + abs(bound)) > self.limit)

    def _grow(self, drawn_in):
        """Node after node, until ``tree`` is there; a generator that stops before each program.

        drawn_in: the (signs, values) (U,) by which a tree's root was drawn in.
        """
        net = self.problem.net
        for signs, values in drawn_in:
            *_, node = self.heap.pop()
            duals = by_lines(self.problem, signs, values, node.low, node.high)
            part = evaluate(self.problem, _no_cuts(self.problem), duals, node.low, node.high)
            node = self._drawn_in(node, Bounded.of(part, duals))
            if node is None:
                return self._end("proved")
            self.heap.append((-np.inf, 0, node))
        while self.heap:
            self.worst, _, node = heapq.heappop(self.heap)
            gap = np.inf
            for turn in range(ROUNDS + 1):
                found = yield from self._programs(node)
                if self.tree is None and found is None:
                    self._end("timeout")
                if self.tree is not None:
                    return
                bound, missing = found.part.bound[0], self.limit - found.part.bound[0]
                if self._closed(found):
                    self.proof.rows[node.number] = found.duals, found.cuts
                    self.least = min(self.least, bound - SLACK_64 * (1 + abs(bound)))
                    break
                if turn == ROUNDS or missing > ENOUGH * gap:  # split
                    if found.unit < 0:
                        return self._end("timeout")
                    for sign in (1, -1):
                        side = int(sign * (found.unit + 1))
                        number = self.proof.add(node.number, int(sign * (net.units[found.unit] + 1)))
                        child = Node(number, node.low.copy(), node.high.copy(), found.cuts, (*found.sides, side))
                        (child.low if sign > 0 else child.high)[found.unit] = 0
                        heapq.heappush(self.heap, (bound, next(self.tie), child))
                    break
                gap = missing
                node = self._drawn_in(node, found)
                if node is None:
                    break
        self._end("proved")

    def _drawn_in(self, node: Node, found: Bounded) -> Node | None:
        """What its bound leaves of a node, if anything."""
        low, high, multipliers = restrict(self.problem.net, found.part, node.low, node.high, self.limit)
        self.proof.rows[node.number] = found.duals, found.cuts
        number = self.proof.add(node.number, 0)
        self.proof.multipliers.append(multipliers.astype(np.float32))
        if is_empty(low, high):
            nothing = np.zeros((3, len(low)), np.float32)
            self.proof.rows[number] = Duals(*nothing[:2], nothing[2, :0]), ()
            return None
        return Node(number, low, high, found.cuts, found.sides)

    def _programs(self, node: Node):
        """Bounded or None, by programs with more and more cuts; a counterexample ends the search."""
        self.visited += 1
        problem, best, d, (low, high) = self.problem, None, self.low.size, node[1:3]
        unstable = (low < 0) & (high > 0)
        kept = tuple(cut for cut in node.cuts if unstable[cut.unit])  # what is stable needs none
        sides = [s for s in dict.fromkeys(node.sides) if not unstable[abs(s) - 1]]
        program = Program(problem, low, high, Cuts.of(kept, len(problem.scale)), sides)
        for attempt in range(PASSES):
            solution = yield from self._solution(program, SECONDS if best else 10 * SECONDS)
            if solution is None:
                break
            v, z, duals = solution
            if v is None:  # the node has no image
                duals = excluding(problem, program.cuts, duals, low, high, self.limit)
                found = Bounded.of(evaluate(problem, program.cuts, duals, low, high), duals, kept, program.pulling)
                return found if self._closed(found) else best
            part, gap = evaluate(problem, program.cuts, duals, low, high), np.inf
            if best is None or part.bound[0] > best.part.bound[0]:
                gap = np.inf if best is None else self.limit - best.part.bound[0]
                cost = np.bincount(program.cuts.units, duals.cuts, len(z)) + duals.chord
                loss = np.where(unstable, cost * (v[d:] - np.maximum(z, 0)) + 1e-9 * (high - low), -1)
                unit = int(loss.argmax()) if unstable.any() else -1
                best = Bounded.of(part, duals, kept, program.pulling, unit)
            x = np.clip(self.box.centre + v[:d].reshape(self.low.shape) * self.box.radius, self.low, self.high)
            margin = inner(self.row, self.chain.forward(x)[0])[0]
            if margin < self.margin:
                self.margin, self.nearest = margin, x[0]
            if margin <= self.threshold:
                self._end("candidate", x[0])
                return best
            if self._closed(best) or (attempt and self.limit - part.bound[0] > PAYS * gap) or attempt == PASSES - 1:
                break
            cuts, sides = separate(problem, low, high, v), program.broken(z)
            if not len(cuts.units) + len(sides):
                break
            kept += tuple(cuts.each())
            program.add(cuts, sides)
        return best

    def _solution(self, program: Program, seconds: float):
        """What :meth:`Program.solve` says within so many CPU seconds, if need be of several turns."""
        solution = None
        while solution is None and seconds > 0:
            yield
            begin = time.process_time()
            solution = program.solve(lambda s=seconds, b=begin: min(s - (time.process_time() - b), self.stop()))
            seconds = seconds - (time.process_time() - begin) if program.stopped else 0
        return solution


def _arrays(proof: Proof, width: int, limit: float) -> dict[str, np.ndarray]:
    """The arrays of a proof file (``docs/soundness.md``), with the cuts that it uses; ``width``: D + U."""
    proof.check_whole()
    rows = [proof.rows[node] for node in sorted(proof.rows)]
    used = {id(cut): cut for _, cuts in rows for cut in cuts}
    place = {key: n for n, key in enumerate(used)}
    weights = np.zeros((len(rows), len(used)), np.float32)
    for row, (duals, cuts) in zip(weights, rows, strict=True):
        row[[place[id(cut)] for cut in cuts]] = duals.cuts
    start = np.cumsum([0, *(len(cut.index) for cut in used.values())])
    shape = (len(proof.multipliers), 2, len(proof.units))
    return {
        "units": proof.units,
        "parent": np.array(proof.parents, np.int32),
        "split": np.array(proof.splits, np.int32),
        "below": np.array([duals.below for duals, _ in rows]),
        "chord": np.array([duals.chord for duals, _ in rows]),
        "weights": weights,
        "cut_unit": np.array([cut.unit for cut in used.values()], np.int32),
        "cut_start": start.astype(np.int32),
        "cut_index": np.concatenate([np.zeros(0, np.int32), *(cut.index for cut in used.values())]),
        "cut_value": np.concatenate([np.zeros(0, np.float32), *(cut.value for cut in used.values())]),
        "multipliers": np.array(proof.multipliers, np.float32).reshape(shape),
        "limit": np.array([limit]),
    }
