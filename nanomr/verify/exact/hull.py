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

import numpy as np

from ..bounds.crown import Box, Lines, inner
from ..chain import Chain
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


class Duals(NamedTuple):
    """Multipliers >= 0 of a node's program, float32: of a >= z and of the chord (U,), of each cut (K,)."""

    below: np.ndarray
    chord: np.ndarray
    cuts: np.ndarray


class Problem(NamedTuple):
    """The collapsed network and what cuts need of it: ``weight`` (U, D + U), z = weight v + bias, and the ``scale``
    (D + U,) of v: y in [-1, 1] stands for a pixel's place in the box of that radius. ``rows``: z - weight v, of the
    columns (y, z, a)."""

    net: Collapsed
    weight: np.ndarray
    scale: np.ndarray
    rows: Rows

    @classmethod
    def of(cls, net: Collapsed, radius) -> "Problem":
        rows = Rows.of(np.hstack([-net.image, np.eye(len(net.units)), -net.between]))
        scale = np.append(radius.ravel(), np.ones(len(net.units)))
        return cls(net, np.hstack([net.image, net.between]), scale, rows)

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


def excluding(problem: Problem, cuts: Cuts, duals: Duals, low, high, limit: float) -> Duals:
    """The multiple of these that gives a bound above ``limit``, if one does: they say that no point is left."""
    net = problem.net
    no_margin = net._replace(row_image=0 * net.row_image, row_units=0 * net.row_units, row_bias=0.0)
    gain = evaluate(problem._replace(net=no_margin), cuts, duals, low, high).bound[0]
    missing = limit + 1 + abs(limit) - evaluate(problem, cuts, Duals(*(0 * m for m in duals)), low, high).bound[0]
    return Duals(*(m * np.float32(max(missing, 0) / gain if gain > 1e-12 else 0) for m in duals))


# --- the program ------------------------------------------------------------------------------------------------------


class Program:
    """min margin over (y, z, a): z = weight v + bias, a >= z, a below its chord and the cuts."""

    def __init__(self, problem: Problem, low, high, cuts: Cuts):
        import highspy

        self.problem, self.low, self.high = problem, low, high
        net, (v_low, v_high) = problem.net, problem.box(low, high)
        self.pixels, self.units = d, u = net.image.shape[1], len(low)
        lines, none, each = Lines.around(low, high), np.full(u, np.inf), np.arange(u)
        z, a, ones = d + each, d + u + each, np.ones(u)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = d + 2 * u, 3 * u
        lp.col_cost_ = np.concatenate([net.row_image, np.zeros(u), net.row_units])
        lp.offset_ = float(net.row_bias)
        lp.col_lower_ = np.concatenate([v_low[:d], -none, v_low[d:]])
        lp.col_upper_ = np.concatenate([v_high[:d], none, v_high[d:]])
        lp.row_lower_ = np.concatenate([net.bias, 0 * low, -none])
        lp.row_upper_ = np.concatenate([net.bias, none, lines.offset])
        start, index, value = problem.rows
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.append(start, start[-1] + 2 * np.arange(1, 2 * u + 1)).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate([index, *[np.stack([z, a], 1).ravel()] * 2]).astype(np.int32)
        pairs = [np.stack([side, ones], 1).ravel() for side in (-ones, -lines.upper)]
        lp.a_matrix_.value_ = np.concatenate([value, *pairs])
        status = highspy.HighsModelStatus
        self.optimal, self.infeasible, self.interrupted = status.kOptimal, status.kInfeasible, status.kInterrupt
        self.highs = highspy.Highs()
        for name, option in OPTIONS.items():
            self.highs.setOptionValue(name, option)
        self.highs.passModel(lp)
        left = self.left = [lambda: np.inf]  # no reference to self, which would keep the program alive
        self.highs.cbSimplexInterrupt.subscribe(lambda event: not left[0]() > 0 and event.interrupt())
        self.add(cuts)

    def add(self, cuts: Cuts):
        """More rows: cuts."""
        k, d, u = len(cuts.units), self.pixels, self.units
        c = cuts.coefficients * self.problem.scale
        rows = np.hstack([-c[:, :d], np.zeros((k, u)), -c[:, d:]])
        rows[np.arange(k), d + u + cuts.units] += 1
        start, index, value = _compressed(rows)
        top = offsets(self.problem, cuts, self.low, self.high)
        if k:
            self.highs.addRows(k, np.full(k, -np.inf), top, len(value), start[:-1], index, value)

    def solve(self, left: Callable[[], float]):
        """(v (D + U,), z (U,), Duals), or None where HiGHS finds no optimum while ``left()`` is above 0.

        Where no point is left, v and z are None, and a large multiple of the Duals proves anything. ``stopped``: would
        it go on where it was?
        """
        self.left[0] = left
        self.highs.run()
        status, found, d, u = self.highs.getModelStatus(), self.highs.getSolution(), self.pixels, self.units
        if status == self.infeasible:
            _, known, ray = self.highs.getDualRay()
            return (None, None, self._duals(ray)) if known else None
        if status != self.optimal:
            return None
        y, z, a = np.split(np.array(found.col_value), [d, d + u])
        return np.append(y, a), z, self._duals(found.row_dual)

    @property
    def stopped(self) -> bool:
        return self.highs.getModelStatus() == self.interrupted

    def _duals(self, rows) -> Duals:
        _, below, chord, cuts = np.split(np.array(rows), np.array([1, 2, 3]) * self.units)
        return Duals(*(np.maximum(m, 0).astype(np.float32) for m in (below, -chord, -cuts)))


def _compressed(matrix):
    """(start, index, value) of its rows, as HiGHS takes them."""
    start, column, value = Rows.of(matrix)
    return start.astype(np.int32), column, value


# --- the tree ---------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A node of the tree: its number, bounds (U,) of the units' inputs, and the numbers of the cuts to begin with."""

    number: int
    low: np.ndarray
    high: np.ndarray
    cuts: np.ndarray


class Bounded(NamedTuple):
    """What the programs of a node said: the best bound, how it came about, which cuts, and where to split."""

    part: Part
    duals: Duals
    cuts: np.ndarray
    unit: int

    @property
    def kept(self) -> np.ndarray:
        """The cuts that children begin with: those that pull."""
        return self.cuts[self.duals.cuts > 0]


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
    function; then the unit is split whose upper side costs most.
    """

    def __init__(self, chain: Chain, low, high, relus, row, *, threshold: float = 0.0):
        begin = time.process_time()
        self.chain, self.low, self.high, self.row = chain, low, high, np.asarray(row, np.float64)[None]
        self.threshold, self.limit = threshold, threshold + SLACK_64 * (1 + abs(threshold))
        self.tree, self.nearest, self.margin, self.stop = None, None, np.inf, None
        self.visited, self.worst, self.least, self.tie = 0, -np.inf, np.inf, count(1)
        if all(np.isfinite(side).all() for r in relus for side in r):
            self.box, net = Box.between(low, high), collapse(chain, low, high, relus, self.row[0])
            self.problem, self.proof = Problem.of(net, self.box.radius), Proof(net.units)
            self.pool = Cuts(np.zeros(0, np.int64), np.zeros((0, low.size + len(net.units)), np.float32))
            self.heap = [(-np.inf, 0, Node(0, *net.ends(relus), np.zeros(0, np.int64)))]
            self.growing = self._grow()
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
            arrays = _arrays(self.proof, self.pool, self.problem.net.image.shape[1], theta)
            bound = min(self.least, theta)
        return Tree(status, image, float(bound), arrays, self.visited, self.seconds)

    def _end(self, status: str, image=None):
        self.tree = self._answer(status, image)

    def _closed(self, found: Bounded) -> bool:
        bound = found.part.bound[0]
        return bool(bound - SLACK_64 * (1 + abs(bound)) > self.limit)

    def _grow(self):
        """Node after node, until ``tree`` is there; a generator that stops before each program."""
        net = self.problem.net
        while self.heap:
            self.worst, _, node = heapq.heappop(self.heap)
            gap = np.inf
            for turn in range(ROUNDS + 1):
                found = yield from self._programs(node)
                if self.tree is None and found is None:
                    self._end("timeout")
                if self.tree is not None:
                    return
                self.proof.rows[node.number] = found.duals, found.cuts
                bound, missing = found.part.bound[0], self.limit - found.part.bound[0]
                if self._closed(found):
                    self.least = min(self.least, bound - SLACK_64 * (1 + abs(bound)))
                    break
                if turn == ROUNDS or missing > ENOUGH * gap:  # split
                    if found.unit < 0:
                        return self._end("timeout")
                    del self.proof.rows[node.number]
                    for sign in (1, -1):
                        number = self.proof.add(node.number, int(sign * (net.units[found.unit] + 1)))
                        child = Node(number, node.low.copy(), node.high.copy(), found.kept)
                        (child.low if sign > 0 else child.high)[found.unit] = 0
                        heapq.heappush(self.heap, (bound, next(self.tie), child))
                    break
                gap = missing
                bounds = *_, multipliers = restrict(net, found.part, node.low, node.high, self.limit)
                number = self.proof.add(node.number, 0)
                self.proof.multipliers.append(multipliers.astype(np.float32))
                node = Node(number, *bounds[:2], found.kept)
                if is_empty(node.low, node.high):
                    nothing = np.zeros((3, len(net.units)), np.float32)
                    self.proof.rows[number] = Duals(*nothing[:2], nothing[2, :0]), node.cuts[:0]
                    break
        self._end("proved")

    def _programs(self, node: Node):
        """Bounded or None, by programs with more and more cuts; a counterexample ends the search."""
        self.visited += 1
        problem, at, best, d = self.problem, node.cuts, None, self.low.size
        program = Program(problem, node.low, node.high, self.pool[at])
        for attempt in range(PASSES):
            solution = yield from self._solution(program, SECONDS if best else 10 * SECONDS)
            if solution is None:
                break
            v, z, duals = solution
            if v is None:  # the node has no image
                duals = excluding(problem, self.pool[at], duals, node.low, node.high, self.limit)
                found = Bounded(evaluate(problem, self.pool[at], duals, node.low, node.high), duals, at, -1)
                return found if self._closed(found) else best
            part, gap = evaluate(problem, self.pool[at], duals, node.low, node.high), np.inf
            if best is None or part.bound[0] > best.part.bound[0]:
                gap = np.inf if best is None else self.limit - best.part.bound[0]
                cost = np.bincount(self.pool.units[at], duals.cuts, len(z)) + duals.chord
                unstable = (node.low < 0) & (node.high > 0)
                loss = np.where(unstable, cost * (v[d:] - np.maximum(z, 0)) + 1e-9 * (node.high - node.low), -1)
                best = Bounded(part, duals, at, int(loss.argmax()) if unstable.any() else -1)
            x = np.clip(self.box.centre + v[:d].reshape(self.low.shape) * self.box.radius, self.low, self.high)
            margin = inner(self.row, self.chain.forward(x)[0])[0]
            if margin < self.margin:
                self.margin, self.nearest = margin, x[0]
            if margin <= self.threshold:
                self._end("candidate", x[0])
                return best
            if self._closed(best) or (attempt and self.limit - part.bound[0] > PAYS * gap) or attempt == PASSES - 1:
                break
            cuts = separate(problem, node.low, node.high, v)
            if not len(cuts.units):
                break
            at = np.append(at, len(self.pool.units) + np.arange(len(cuts.units)))
            self.pool = self.pool.plus(cuts)
            program.add(cuts)
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


def _arrays(proof: Proof, pool: Cuts, pixels: int, limit: float) -> dict[str, np.ndarray]:
    """The arrays of a proof file (``docs/soundness.md``), with the cuts that it uses."""
    proof.check_whole()
    rows = [proof.rows[node] for node in sorted(proof.rows)]
    used = np.unique(np.concatenate([at[duals.cuts > 0] for duals, at in rows]))
    weights = np.zeros((len(rows), len(used)), np.float32)
    for row, (duals, at) in zip(weights, rows, strict=True):
        on = duals.cuts > 0
        row[np.searchsorted(used, at[on])] = duals.cuts[on]
    start, index, value = _compressed(pool.coefficients[used])
    shape = (len(proof.multipliers), 2, len(proof.units))
    return {
        "units": proof.units,
        "parent": np.array(proof.parents, np.int32),
        "split": np.array(proof.splits, np.int32),
        "below": np.array([duals.below for duals, _ in rows]),
        "chord": np.array([duals.chord for duals, _ in rows]),
        "weights": weights,
        "cut_unit": pool.units[used].astype(np.int32),
        "cut_start": start,
        "cut_index": index,
        "cut_value": value,
        "multipliers": np.array(proof.multipliers, np.float32).reshape(shape),
        "limit": np.array([limit]),
    }
