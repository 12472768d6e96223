"""One margin, settled: trees and linear programs in turns, each going on where it stopped, and the MILP late.

Which of them decides a margin cannot be told before, and the difference is a factor of a hundred either way. So the
slices double: what would take one of them s seconds alone takes a few times s. ``docs/verification-schedule.md``.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..chain import Chain
from ..exact import bab, hull
from ..exact.milp import Solver

SLICE = 1.0  # seconds of each one's first turn
TREE = 0.5, 40  # seconds and domains of a tree for float32 at once, before the real margin: most need one domain
UNITS = (
    200  # ReLUs still unstable: with more of them the MILP, which cannot go on where it stopped, only waits its turn
)
LATE = 0.5  # ... which comes when that share of the time is left
EXTRA = 2.0  # a proof for float32 as well may take that many times what the real one took
SEARCHES = {"bab": lambda *problem, **options: bab.Search(*problem, **options),
            "hull": lambda *problem, **options: hull.Search(*problem, **options)}  # fmt: skip


class Answer(NamedTuple):
    """What became of a margin.

    ``verdict``: "proved" (by ``stage``; it is at least ``bound``, by the arrays ``proof``, empty for the MILP),
    "falsified" (by the image ``adversarial``), "timeout" or "unknown". ``notes``: a line for each search;
    ``solver_seconds``: CPU time of other processes.
    """

    verdict: str
    stage: str
    bound: float
    proof: dict[str, np.ndarray]
    adversarial: np.ndarray | None
    notes: list[str]
    solver_seconds: float


def settle(
    chain: Chain, low, high, relus, row, *, error: float, left: Callable[[], float], limit: float, solver: Solver,
    confirm: Callable, proved: bool = False, float32: bool = True, threshold: float = 0.0,
) -> Answer:  # fmt: skip
    """Is the margin row . logits > ``threshold`` in the box [low, high] (1, H, W, C)? ``float32``: and by ``error``?

    row (K,); relus: as :func:`~nanomr.verify.bounds.crown.crown` gives them. ``left()``: the seconds, of CPU or wall
    clock, that are left of ``limit``. ``confirm(image)``: the counterexample that an image (H, W, C) is or leads to, or
    None. ``proved``: it is, and only ``error`` is to be tried.
    """
    begin = time.process_time()
    run = _Run((chain, low, high, relus, row), left, limit, solver, confirm)
    deployed = _Turns(threshold + error) if float32 and 0 < error < np.inf else None
    answer = None if deployed is None else run.turn(deployed, "bab", min(TREE[0], 0.1 * run.left()), TREE[1])
    if answer is None and not proved:
        answer = run.play(_Turns(threshold), run.left, milp=True)
    if deployed is not None and (
        proved if answer is None else answer.verdict == "proved" and answer.bound <= threshold + error
    ):
        end = run.left() - EXTRA * (time.process_time() - begin) - SLICE
        stronger = run.play(deployed, lambda: min(run.left(), run.left() - end))
        answer = stronger if stronger is not None and stronger.verdict == "proved" else answer
    notes = run.notes()
    if answer is not None:
        return answer._replace(notes=notes, solver_seconds=run.solved)
    verdict = "timeout" if run.left() <= 0.02 * limit else "unknown"
    return Answer(verdict, run.stage, np.nan, {}, None, notes, run.solved)


class _Turns:
    """The searches at one threshold, each made when its first turn comes; ``out``: those that have nothing to say."""

    def __init__(self, threshold: float):
        self.threshold, self.searches, self.trees, self.out = threshold, {}, {}, set()


class _Run:
    """One margin's searches, their time, and what they say of it."""

    def __init__(self, problem, left, limit, solver, confirm):
        self.problem, self.clock, self.limit, self.solver, self.confirm = problem, left, limit, solver, confirm
        self.solved, self.stage, self.margin, self.all, self.said = 0.0, "", np.inf, [], []

    def left(self) -> float:
        return self.clock() - self.solved

    def notes(self) -> list[str]:
        lines = []
        for turns in self.all:
            for stage, tree in turns.trees.items():
                effort = f"{tree.status}, {tree.domains} domains, {tree.seconds:.2f} s"
                lines.append(f"{stage}, margin > {turns.threshold:.2g}: {effort}")
        return lines + self.said

    def turn(self, turns: _Turns, stage: str, seconds: float, domains: float = np.inf) -> Answer | None:
        """Let a search go on for so many seconds; the Answer, if it has one."""
        self.stage, begin = stage, self.left()
        if not begin > 0:
            return None
        if turns not in self.all:
            self.all.append(turns)
        if stage not in turns.searches:
            turns.searches[stage] = SEARCHES[stage](*self.problem, threshold=turns.threshold)
        search = turns.searches[stage]
        options = {} if domains == np.inf else {"max_domains": domains}
        tree = turns.trees[stage] = search.run(lambda: min(seconds - begin + self.left(), self.left()), **options)
        if tree.status == "proved":
            return Answer("proved", stage, tree.bound, tree.proof, None, [], 0.0)
        if search.tree is not None:
            turns.out.add(stage)
        # what errs most so far may be a step away from a counterexample, even if it is none
        image = tree.image if tree.status == "candidate" else search.nearest if search.margin < self.margin else None
        if image is not None:
            self.margin = min(self.margin, search.margin)
            adversarial = self.confirm(image)
            if adversarial is not None:
                return Answer("falsified", stage, np.nan, {}, adversarial, [], 0.0)
        return None

    def play(self, turns: _Turns, left, milp: bool = False) -> Answer | None:
        """Turn after turn, each twice as long, while ``left()`` is above 0."""
        seconds = SLICE
        while left() > 0 and len(turns.out) < len(SEARCHES):
            for stage in SEARCHES:
                if stage not in turns.out and left() > 0:
                    answer = self.turn(turns, stage, min(seconds, left()))
                    if answer is not None:
                        return answer
            if milp and self.left() < LATE * self.limit and self._unstable(turns) <= UNITS:
                milp, answer = False, self._milp(turns.threshold)
                if answer is not None:
                    return answer
            seconds *= 2
        return self._milp(turns.threshold) if milp and left() > 0 else None

    def _unstable(self, turns) -> float:
        tree = turns.trees.get("bab")
        return np.inf if tree is None or tree.root is None else ((tree.root[0] < 0) & (tree.root[1] > 0)).sum()

    def _milp(self, threshold) -> Answer | None:
        self.stage, begin = "milp", self.left()
        answer = self.solver.decide(*self.problem, threshold=threshold, cpu_limit=begin, left=self.left)
        self.solved += max(0.0, answer.seconds - (begin - self.left()))  # what this clock has not seen
        effort = f"{answer.message}, {answer.nodes} nodes, {answer.seconds:.2f} s"
        self.said.append(f"milp, margin > {threshold:.2g}: {effort}")
        if answer.status == "infeasible":
            return Answer("proved", "milp", threshold, {}, None, [], 0.0)
        adversarial = self.confirm(answer.image) if answer.status == "candidate" else None
        return None if adversarial is None else Answer("falsified", "milp", np.nan, {}, adversarial, [], 0.0)
