"""One margin, settled: trees and linear programs in turns, each going on where it stopped, and the MILP late.

Which of them decides a margin cannot be told before, and the difference is a factor of a hundred either way. So the
slices double: what would take one of them s seconds alone takes a few times s. ``docs/verification.md``.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..chain import Chain
from ..exact import bab, hull
from ..exact.milp import Solver

MANY = 600  # unstable ReLUs: programs then take seconds each; trees go first for longer, and then have less
FEW_SLICES, MANY_SLICES = {"bab": 0.5, "hull": 2.0}, {"bab": 4.0, "hull": 8.0}  # seconds of the first turns
TIGHT_SLICES = {"bab": 8.0, "hull": 8.0}  # the same where lemmas have drawn in the bounds
FLOAT32 = 0.2  # the share of the time in which a proof is to be one for float32 as well
UNITS, LATE = 200, 0.5  # the MILP cannot go on where it stopped: it has few unstable ReLUs, and the last half
SEARCHES = {"bab": bab.Search, "hull": hull.Search}


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
    confirm: Callable, proved: bool = False, float32: bool = True, threshold: float = 0.0, tightened: bool = False,
) -> Answer:  # fmt: skip
    """Is the margin row . logits > ``threshold`` in the box [low, high] (1, H, W, C)? ``float32``: and by ``error``?

    row (K,); relus: as :func:`~nanomr.verify.bounds.crown.crown` gives them. ``left()``: the seconds, of CPU or wall
    clock, that are left of ``limit``. ``confirm(image)``: the counterexample that an image (H, W, C) is or leads to, or
    None. ``proved``: it is, and only ``error`` is to be tried. ``tightened``: are relus better than CROWN's?
    """
    run, answer = _Run((chain, low, high, relus, row), left, limit, solver, confirm), None
    if tightened:
        run.slices = TIGHT_SLICES
    if float32 and 0 < error < np.inf:
        answer = run.play(threshold + error, FLOAT32 * run.left(), last=proved)
    if answer is None and not proved:
        answer = run.play(threshold, np.inf, last=True, milp=True)
    if answer is not None:
        return answer._replace(notes=run.notes, solver_seconds=run.solved)
    verdict = "timeout" if run.left() <= 0.02 * limit else "unknown"
    return Answer(verdict, run.stage, np.nan, {}, None, run.notes, run.solved)


class _Run:
    """One margin's searches, their time, and what they say of it."""

    def __init__(self, problem, left, limit, solver, confirm):
        self.problem, self.clock, self.limit, self.solver, self.confirm = problem, left, limit, solver, confirm
        self.solved, self.stage, self.margin, self.notes = 0.0, "", np.inf, []
        unstable = sum(int(((low < 0) & (high > 0)).sum()) for low, high in problem[3])
        self.slices = FEW_SLICES if unstable < MANY else MANY_SLICES

    def left(self) -> float:
        return self.clock() - self.solved

    def play(self, threshold: float, seconds: float, last: bool, milp: bool = False) -> Answer | None:
        """Turn after turn, each twice as long, for so many seconds; the Answer, if there is one.

        ``last``: no other play follows. ``milp``: and this one may take that, too.
        """
        begin, searches, trees, due = self.left(), {}, {}, dict(self.slices)

        def left():
            return min(seconds - begin + self.left(), self.left())

        active, answer = list(SEARCHES), None
        while answer is None and active and left() > 0:
            for stage in list(active):
                if stage not in searches:
                    told = {"tree": searches["bab"]} if "bab" in searches else {}
                    searches[stage] = SEARCHES[stage](*self.problem, threshold=threshold, **told)
                until = left() + searches[stage].seconds - due[stage]  # a program may have taken more than its due
                trees[stage] = searches[stage].run(lambda until=until: min(left() - until, left()), left)
                answer = self._heard(stage, searches[stage], trees[stage])
                if searches[stage].tree is not None:
                    active.remove(stage)
                if trees[stage].status == "candidate" and not last:
                    active.clear()  # so large a margin cannot be proved; what errs is for the next play to find
                if answer is not None or not active or not left() > 0:
                    break
            if answer is None and milp and self.left() < LATE * self.limit and _unstable(trees) <= UNITS:
                milp, answer = False, self._milp(threshold)
            due = {stage: 2 * seconds + self.slices[stage] for stage, seconds in due.items()}
        for stage, tree in trees.items():
            effort = f"{tree.status}, {tree.domains} domains, {tree.seconds:.2f} s"
            self.notes.append(f"{stage}, margin > {threshold:.2g}: {effort}")
        return self._milp(threshold) if answer is None and milp and left() > 0 else answer

    def _heard(self, stage: str, search, tree) -> Answer | None:
        self.stage = stage
        if tree.status == "proved":
            return Answer("proved", stage, tree.bound, tree.proof, None, [], 0.0)
        # what errs most so far may be a step away from a counterexample, even if it is none
        image = tree.image if tree.status == "candidate" else search.nearest if search.margin < self.margin else None
        self.margin = min(self.margin, search.margin)
        adversarial = None if image is None else self.confirm(image)
        return None if adversarial is None else Answer("falsified", stage, np.nan, {}, adversarial, [], 0.0)

    def _milp(self, threshold) -> Answer | None:
        self.stage, begin = "milp", self.left()
        answer = self.solver.decide(*self.problem, threshold=threshold, cpu_limit=begin, left=self.left)
        self.solved += max(0.0, answer.seconds - (begin - self.left()))  # what this clock has not seen
        effort = f"{answer.message}, {answer.nodes} nodes, {answer.seconds:.2f} s"
        self.notes.append(f"milp, margin > {threshold:.2g}: {effort}")
        if answer.status == "infeasible":
            return Answer("proved", "milp", threshold, {}, None, [], 0.0)
        adversarial = self.confirm(answer.image) if answer.status == "candidate" else None
        return None if adversarial is None else Answer("falsified", "milp", np.nan, {}, adversarial, [], 0.0)


def _unstable(trees) -> float:
    """How many ReLUs the root of the tree has left unstable."""
    root = trees["bab"].root if "bab" in trees else None
    return np.inf if root is None else int(((root[0] < 0) & (root[1] > 0)).sum())
