"""Branch and bound with beta-CROWN (Wang et al. 2021): one image, one rival. ``docs/derivations/beta_crown.md``.

An unstable ReLU is split into the case "its input is >= 0", where it is the identity, and "<= 0", where it is 0. The
case itself is a constraint, and a multiplier beta >= 0 brings it into the linear bound: alpha and beta climb together.
Only images with a small margin are left to exclude, which draws in the bounds of the ReLUs.

The search runs in float32 on the :mod:`~nanomr.verify.exact.collapsed` network; what is claimed is float64.
"""

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import highspy
import numpy as np

from ..bounds.crown import Box, Found, Lines, inner
from ..chain import Chain
from .collapsed import SLACK_64, Climb, Collapsed, Part, backward, climb, collapse, forward, is_empty, restrict

CHILDREN = 16  # units whose two children are bounded, not yet optimised, before one is chosen
ROWS = 4  # domains whose children are tried at once
ROOT_STEPS = 40  # of climbing, before anything is split
ROUNDS, ENOUGH = 4, 0.8  # of drawing in the root's bounds, while what is missing to the proof shrinks to that share;
AGAIN = 0.8  # ... and a domain's, once, where less than that share is missing of what was when they last were
MOST = 100_000  # domains: some 20 bytes of memory each for every unstable ReLU
STEP = 0.5  # CPU seconds that a batch of domains may take, so that a search stops when it should
SLACK = 1e-5  # a float32 bound must be above the threshold by this before float64 is asked


class Tree(NamedTuple):
    """What :func:`branch_and_bound` found.

    ``status``: "proved": the margin is > threshold in the whole box; "candidate": ``image`` (H, W, C) float64, in the
    box, has a margin <= threshold; "timeout": it gave up. ``bound``: the margin is at least that, proved, or (not
    "proved") by the search alone. ``proof``: the arrays of a proof file (``docs/soundness.md``), or None. ``domains``:
    how many were bounded; ``seconds`` of CPU time; ``root``: (low, high) (U,) of the unstable ReLUs' inputs at all
    images of the box with margin <= threshold, as far as the root was drawn in.
    """

    status: str
    image: np.ndarray | None
    bound: float
    proof: dict[str, np.ndarray] | None
    domains: int
    seconds: float
    root: tuple[np.ndarray, np.ndarray] | None = None


# --- branching --------------------------------------------------------------------------------------------------------


def children(signs, values, relus, unit):
    """(signs, values) (2 S, U): each domain with its ``unit`` (S,) split, first >= 0, then <= 0.

    The new beta starts where the child's linear function is its parent's (coefficient >= 0), or above it (< 0).
    """
    signs, values = np.repeat(signs, 2, 0), np.repeat(values, 2, 0)
    row, unit = np.arange(len(signs)), np.repeat(unit, 2)
    sign = np.tile(np.array([1, -1], signs.dtype), len(signs) // 2)
    alpha, positive = values[row, unit], np.maximum(np.repeat(relus, 2, 0)[row, unit], 0)
    signs[row, unit] = sign
    values[row, unit] = np.where(sign > 0, positive * (1 - alpha), positive * alpha)
    return signs, values


@np.errstate(invalid="ignore")  # as :func:`climb`
def branch(net: Collapsed, signs, values, target: float, chords=None):
    """(children's signs, values; the units (S,)): two for each domain, which must have a unit left to split.

    The CHILDREN units at which the relaxation errs most at the minimiser are tried: the product of what the two
    bounds gain decides, as in mixed-integer solvers' strong branching; a gain beyond the target counts no more.
    """
    part = backward(net, signs, values, chords)
    z, out, _, _ = forward(net, part)
    error = np.where(signs == 0, abs(part.relus * (out - np.maximum(z, 0))), -1)
    tried = min(CHILDREN, error.shape[1])
    units = np.argpartition(-error, tried - 1, axis=1)[:, :tried]
    bound = np.empty((len(signs), tried, 2), part.bound.dtype)
    for first in range(0, len(signs), ROWS):  # so many children at once that their coefficients stay in the cache
        some = slice(first, first + ROWS)
        domain = np.repeat(np.arange(len(signs))[some], tried)
        tries = children(signs[domain], values[domain], part.relus[domain], units[some].ravel())
        theirs = None if chords is None else [np.repeat(c[domain], 2, 0) for c in chords]
        bound[some] = backward(net, *tries, theirs).bound.reshape(-1, tried, 2)
    gain = np.minimum(bound, target) - part.bound[:, None, None]
    gain = np.maximum(gain, 1e-6).prod(2)
    gain[signs[np.arange(len(signs))[:, None], units] != 0] = -1  # fewer units left than are tried
    unit = units[np.arange(len(signs)), np.nan_to_num(gain, nan=-1).argmax(1)]
    return *children(signs, values, part.relus, unit), unit


# --- a domain in which every ReLU is split ----------------------------------------------------------------------------


def _solve_leaf(net: Collapsed, sign, threshold: float, seconds: float):
    """(values (U,), y (D,)): the best beta of a domain in which every unit is split, and the minimiser; either or both
    None where HiGHS fails, or takes longer than ``seconds``.

    Such a domain is a linear program, and the betas are its dual solution. If no point is in it, they are a multiple
    of the duals of "how far is every point from it", large enough to prove anything.
    """
    z, constant = np.zeros_like(net.image), np.zeros_like(net.bias)  # z_j = z[j] . y + constant[j], by layers
    on = (sign > 0).astype(np.float64)
    for at in net.layers:
        through = net.between[at, : at.start] * on[: at.start]
        z[at] = net.image[at] + through @ z[: at.start]
        constant[at] = net.bias[at] + through @ constant[: at.start]
    cost = net.row_image + (net.row_units * on) @ z
    least = net.row_bias + (net.row_units * on) @ constant - abs(cost).sum()  # of the margin, without the constraints

    def solve(objective, matrix, distance):
        """min objective . (y, t) with matrix (y, t) >= -sign constant, t up to ``distance``."""
        columns = len(objective)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = columns, len(matrix)
        lp.col_cost_ = objective
        lp.col_lower_, lp.col_upper_ = np.append(-np.ones(columns - 1), 0), np.append(np.ones(columns - 1), distance)
        lp.row_lower_, lp.row_upper_ = -sign * constant, np.full(len(matrix), highspy.kHighsInf)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        row, column = np.nonzero(matrix)
        lp.a_matrix_.start_ = np.append(0, np.cumsum(np.bincount(row, minlength=len(matrix)))).astype(np.int32)
        lp.a_matrix_.index_, lp.a_matrix_.value_ = column.astype(np.int32), matrix[row, column]
        highs = highspy.Highs()
        options = {"output_flag": False, "threads": 1, "time_limit": max(seconds, 0.0)}
        options |= {f"{side}_feasibility_tolerance": 1e-9 for side in ("primal", "dual")}
        for option, value in options.items():
            highs.setOptionValue(option, value)
        highs.passModel(lp)
        highs.run()
        found = highs.getSolution()
        optimal = highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return optimal, np.array(found.col_value), np.maximum(found.row_dual, 0)

    matrix = np.hstack([sign[:, None] * z, np.ones((len(z), 1))])
    optimal, point, dual = solve(np.append(cost, 0), matrix, 0)
    if optimal:
        return dual, point[:-1]
    optimal, point, dual = solve(np.append(np.zeros(len(cost)), 1), matrix, np.inf)
    if not optimal or not point[-1] > 0:
        return None, None
    return dual * max(0, (1 + threshold - least) / point[-1]), None


# --- the tree ---------------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """Bounds (U,), float64, of the units' inputs at the images of a domain with margin <= limit; their chords, float32.

    Descendants of the domain share it: a split is in their ``signs``.
    """

    low: np.ndarray
    high: np.ndarray
    upper: np.ndarray
    offset: np.ndarray
    gap: float = np.inf  # what was missing to the proof when they were drawn in

    @classmethod
    def of(cls, low, high, gap: float = np.inf) -> "Frame":
        lines = Lines.around(low, high)
        return cls(low, high, lines.upper.astype(np.float32), lines.offset.astype(np.float32), gap)


class Domain(NamedTuple):
    """A node of the tree: its number, its ``signs`` and ``values`` (U,), what is known of its ReLUs, and its bound."""

    node: int
    signs: np.ndarray
    values: np.ndarray
    frame: Frame
    bound: float = -np.inf

    @property
    def bounds(self):
        """(low, high) (U,) of the units."""
        low, high, sign = self.frame.low, self.frame.high, self.signs
        return np.where(sign > 0, np.maximum(low, 0), low), np.where(sign < 0, np.minimum(high, 0), high)


def _stack(domains: list[Domain]):
    """(signs, values, chords) of domains, (S, U) each."""
    return (
        np.stack([d.signs for d in domains]), np.stack([d.values for d in domains]),
        (np.stack([d.frame.upper for d in domains]), np.stack([d.frame.offset for d in domains])),
    )  # fmt: skip


class Proof:
    """The nodes of a tree, as its proof file has them (``docs/soundness.md``): at first a root alone.

    ``rows``: the (signs, values) of each node that is a leaf, or is restricted by its own bound.
    """

    def __init__(self, units):
        self.units, self.parents, self.splits, self.multipliers = units, [-1], [0], []
        self.rows: dict[int, tuple] = {}

    def add(self, parent: int, split: int) -> int:
        """A child of the node ``parent``: +-(unit + 1), or 0 for its restriction."""
        self.parents.append(parent)
        self.splits.append(split)
        return len(self.parents) - 1

    def check_whole(self):
        """Raises AssertionError if a node is neither split nor has a row: whoever searched has lost it."""
        parent, split = np.array(self.parents), np.array(self.splits)
        if set(self.rows) | set(parent[split != 0]) != set(range(len(parent))):
            raise AssertionError("a node of the tree is neither split nor bounded")

    def arrays(self, limit: float = np.inf) -> dict[str, np.ndarray]:
        self.check_whole()
        shape, restricted = (len(self.rows), len(self.units)), (len(self.multipliers), 2, len(self.units))
        signs, values = zip(*(self.rows[node] for node in sorted(self.rows)), strict=True)
        return {
            "units": self.units,
            "parent": np.array(self.parents, np.int32),
            "split": np.array(self.splits, np.int32),
            "signs": np.array(signs, np.int8).reshape(shape),
            "values": np.array(values, np.float32).reshape(shape),
            "multipliers": np.array(self.multipliers, np.float32).reshape(restricted),
            "limit": np.array([limit]),
        }


def branch_and_bound(
    chain: Chain, low, high, relus, row, *, cpu_limit: float = 60.0, max_domains: int = MOST, **options
) -> Tree:
    """Is the margin row . logits > threshold for every image in [low, high], (1, H, W, C) float64?

    chain: float64. row (K,): +1 for the label, -1 for its rival, or any other. relus: [(low, high) (1, ...)] as
    :func:`~nanomr.verify.bounds.crown.crown` gives them. ``options``: of :class:`Search`.

    Gives up after ``cpu_limit`` seconds of CPU time (of the whole process), after ``max_domains`` domains, at a bound
    that is not a number, and at a domain in which every ReLU is split if HiGHS, which would decide it, fails or its
    answer lies within rounding of the threshold.
    """
    end = time.process_time() + cpu_limit
    return Search(chain, low, high, relus, row, **options).run(
        lambda: end - time.process_time(), max_domains=max_domains
    )


class Search:
    """The tree of :func:`branch_and_bound`; it grows while it is let (:meth:`run`), and goes on where it stopped.

    ``threshold``; ``start``: slopes to begin with, (1, ...) each, as from
    :func:`~nanomr.verify.bounds.crown.alpha_crown`. The ReLUs' bounds at the root are drawn in to the images with
    margin <= threshold (:func:`restrict`), for at most ``rounds`` times. Then up to ``batch`` of the worst domains are
    taken at once, drawn in where that is due (AGAIN), and split, and the children climb for ``steps`` steps.

    ``tree``: the last word, once there is one: "proved", "candidate", or "timeout" where the search has given up.
    ``nearest`` (H, W, C): where the smallest margin was seen so far, or None.
    """

    def __init__(
        self, chain: Chain, low, high, relus, row, *, threshold: float = 0.0, start: Found | None = None,
        batch: int = 64, steps: int = 3, rounds: int = ROUNDS,
    ):  # fmt: skip
        begin = time.process_time()
        self.chain, self.low, self.high, self.row = chain, low, high, np.asarray(row, np.float64)[None]
        self.threshold, self.limit = threshold, threshold + SLACK_64 * (1 + abs(threshold))
        self.target = self.limit + SLACK
        self.batch, self.steps, self.rounds, self.pace = batch, steps, rounds, 0.0
        self.tree, self.root, self.nearest, self.margin = None, None, None, np.inf
        self.visited, self.worst, self.least, self.tie = 0, -np.inf, np.inf, count()
        self.heap: list[tuple] = []  # (bound, tie, domain): all that is still open
        if all(np.isfinite(side).all() for r in relus for side in r):
            self.exact, self.box = collapse(chain, low, high, relus, self.row[0]), Box.between(low, high)
            self.net, self.proof = self.exact.single(), Proof(self.exact.units)
            slopes = self.net.lower if start is None else self.net.pick(start.slopes).astype(np.float32)
            self.first = Domain(0, np.zeros(len(slopes), np.int8), slopes, Frame.of(*self.net.ends(relus)))
            self.root = self.first.bounds
        else:
            self.tree = Tree("timeout", None, np.nan, None, 0, 0.0)
        self.seconds = time.process_time() - begin

    def run(self, left: Callable[[], float], stop: Callable[[], float] | None = None, *, max_domains=MOST) -> Tree:
        """Go on while ``left()``, seconds of any clock, is above 0, and there are less than ``max_domains`` domains.

        It gives up for good with MOST. A linear program has until ``stop()`` is 0 (by default ``left``).
        """
        begin = time.process_time()
        if self.visited == 0 and self.tree is None:
            self._begin()
        while self.tree is None and left() > 0:
            before, taken = time.process_time(), self._grow(stop or left, max_domains)
            self.pace = (time.process_time() - before) / taken
            if self.visited >= max_domains:
                break
        if self.tree is None and self.visited >= MOST:
            self._end("timeout")
        self.seconds += time.process_time() - begin
        return self._answer("timeout") if self.tree is None else self.tree._replace(seconds=self.seconds)

    def drawn_in(self) -> list[tuple]:
        """The (signs, values) (U,), in turn, by which the root's bounds were drawn in so far."""
        splits, proof = np.flatnonzero(self.proof.splits), self.proof
        first = splits[0] if len(splits) else len(proof.splits)  # nothing but the root's restrictions comes before
        return [proof.rows[n] for n in range(first - 1)]

    def _answer(self, status: str, image=None) -> Tree:
        arrays, bound = None, min(self.worst, self.least)
        if status == "proved":
            theta = self.limit if self.proof.multipliers else np.inf  # restricted nodes say nothing of larger margins
            arrays, bound = self.proof.arrays(theta), min(self.least, theta)
        return Tree(status, image, float(bound), arrays, self.visited, self.seconds, self.root)

    def _end(self, status: str, image=None):
        self.tree = self._answer(status, image)

    def _begin(self):
        self.visited = 1
        signs, values, chords = _stack([self.first])
        with np.errstate(invalid="ignore"):  # as :func:`climb`
            scale = abs(backward(self.net, signs, values).relus)
        self.scale = scale + 0.1 * scale.mean() if scale.size else scale
        self._keep([self.first], climb(self.net, signs, values, self.scale, ROOT_STEPS, self.target, chords))

    def _grow(self, stop, max_domains) -> int:
        """Take the worst domains, draw them in, split them. How many?"""
        size = min(self.batch, max(1, int(STEP / self.pace))) if self.pace else self.batch
        taken = [heapq.heappop(self.heap)[2] for _ in self.heap[:size]]
        domains = self._narrow(taken)
        if self.visited == 1 and domains:
            self.root = domains[0].bounds
        if self.tree is None and self.visited >= max_domains:
            self._push(domains)
        elif self.tree is None:
            whole = [(d.signs != 0).all() for d in domains]
            self._leaves([d for d, on in zip(domains, whole, strict=True) if on], stop)
            if self.tree is None:
                self._split([d for d, on in zip(domains, whole, strict=True) if not on])
        return len(taken)

    def _keep(self, domains: list[Domain], found: Climb):
        """Go on with those of ``domains`` that have climbed, and are not proved."""
        domains = self._climbed(domains, found)
        if self.tree is None:
            done = self._close(domains)
            self._push([domains[i] for i in np.flatnonzero(~done)])

    def _push(self, domains: list[Domain]):
        for domain in domains:
            bound = -np.inf if np.isnan(domain.bound) else domain.bound
            heapq.heappush(self.heap, (bound, next(self.tie), domain))
        self.worst = self.heap[0][0] if self.heap else np.inf
        if not self.heap:
            self._end("proved")
        elif self.worst == -np.inf:
            self._end("timeout")

    def _climbed(self, domains: list[Domain], found: Climb) -> list[Domain]:
        """``domains`` with their new values and bounds; a small margin may end the search."""
        if found.margin < self.margin:
            self.margin, self.nearest = found.margin, self._image(found.y)
        if found.margin <= self.target:
            self._candidate(found.y)
        pairs = zip(domains, found.values, found.bound, strict=True)
        return [d._replace(values=v.copy(), bound=float(b)) for d, v, b in pairs]

    def _image(self, y):
        return np.clip(self.box.centre + y.reshape(self.low.shape) * self.box.radius, self.low, self.high)[0]

    def _candidate(self, y):
        """The end, if float64 agrees that the margin at ``y`` is <= threshold."""
        x = self._image(y)
        if inner(self.row, self.chain.forward(x[None])[0])[0] <= self.threshold:
            self._end("candidate", x)

    def _bounds_64(self, domains: list[Domain]) -> list[Part]:
        """The bound (1,) of each domain in float64."""
        if not domains:
            return []
        signs, values = np.stack([d.signs for d in domains]), np.stack([d.values for d in domains]).astype(np.float64)
        lines = Lines.around(*(np.stack(side) for side in zip(*(d.bounds for d in domains), strict=True)))
        part = backward(self.exact, signs, values, (lines.upper, lines.offset))
        return [Part(*(v[i : i + 1] for v in part)) for i in range(len(domains))]

    def _close(self, domains: list[Domain]) -> np.ndarray:
        """Which of the domains their float32 bounds and then float64 prove (S,); makes leaves of them."""
        done = np.zeros(len(domains), bool)
        ready = [i for i, d in enumerate(domains) if d.bound > self.target]
        for i, part in zip(ready, self._bounds_64([domains[i] for i in ready]), strict=True):
            bound = part.bound[0] - SLACK_64 * (1 + abs(part.bound[0]))
            if bound > self.limit:
                done[i], self.least = True, min(self.least, bound)
                self.proof.rows[domains[i].node] = domains[i].signs, domains[i].values
        return done

    def _narrow(self, domains: list[Domain]) -> list[Domain]:
        """What is left of ``domains``, drawn in and not yet proved."""
        due = [self.limit - d.bound < AGAIN * d.frame.gap for d in domains]
        left = [d for d, on in zip(domains, due, strict=True) if not on]
        active = [d for d, on in zip(domains, due, strict=True) if on]
        gaps = np.full(len(active), np.inf)
        for _ in range(self.rounds if self.visited == 1 else min(self.rounds, 1)):
            drawn = []
            for domain, part in zip(active, self._bounds_64(active), strict=True):
                *known, multipliers = restrict(self.exact, part, *domain.bounds, self.limit)
                self.proof.rows[domain.node] = domain.signs, domain.values
                node = self.proof.add(domain.node, 0)
                self.proof.multipliers.append(multipliers.astype(np.float32))
                if is_empty(*known):
                    self.proof.rows[node] = 0 * domain.signs, 0 * domain.values
                    drawn.append(None)
                    continue
                stable = (domain.signs == 0) & ((known[0] >= SLACK_64) | (known[1] <= -SLACK_64))
                signs = np.where(stable, np.where(known[0] > 0, 1, -1), domain.signs).astype(np.int8)
                frame = Frame.of(*known, gap=self.limit - domain.bound)
                drawn.append(Domain(node, signs, np.where(stable, 0, domain.values), frame))
            gaps = gaps[[d is not None for d in drawn]]
            drawn = [d for d in drawn if d is not None]
            if not drawn:
                return left
            signs, values, chords = _stack(drawn)
            drawn = self._climbed(drawn, climb(self.net, signs, values, self.scale, self.steps, self.target, chords))
            if self.tree is not None:
                return drawn
            done, gap = self._close(drawn), self.limit - np.array([d.bound for d in drawn])
            again = ~done & (gap < ENOUGH * gaps)
            left += [d for d, end, on in zip(drawn, done, again, strict=True) if not end and not on]
            active, gaps = [d for d, on in zip(drawn, again, strict=True) if on], gap[again]
            if not active:
                break
        return left + active

    def _leaves(self, domains: list[Domain], stop):
        """Domains in which every ReLU is split: decided by a linear program, or the search gives up."""
        for domain in domains:
            beta, y = _solve_leaf(self.exact, domain.signs.astype(np.float64), self.threshold, stop())
            if y is not None:
                self._candidate(y)
            closed = beta is not None and self._close([domain._replace(values=beta.astype(np.float32), bound=np.inf)])
            if self.tree is None and not np.all(closed):
                self._end("timeout")
            if self.tree is not None:
                return

    def _split(self, parents: list[Domain]):
        domains, found = [], Climb(np.zeros(0), np.zeros((0, len(self.net.units))), np.inf, self.net.row_image)
        if parents:
            signs, values, chords = _stack(parents)
            signs, values, unit = branch(self.net, signs, values, self.target, chords)
            chords = [np.repeat(c, 2, 0) for c in chords]
            for i, (sign, value) in enumerate(zip(signs, values, strict=True)):
                parent, split = parents[i // 2], int(sign[unit[i // 2]] * (self.net.units[unit[i // 2]] + 1))
                domains.append(Domain(self.proof.add(parent.node, split), sign.copy(), value, parent.frame))
            self.visited += len(domains)
            found = climb(self.net, signs, values, self.scale, self.steps, self.target, chords)
        self._keep(domains, found)
