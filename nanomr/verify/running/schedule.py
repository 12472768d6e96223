"""One margin, settled by trees, linear programs and the MILP in turn."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..chain import Chain
from ..exact import hull
from ..exact.bab import branch_and_bound
from ..exact.milp import Solver


class Attempt(NamedTuple):
    """One way to settle a rival: the stage, for float32 as well or not, its share of the time that is left, options."""

    stage: str
    for_float32: bool
    share: float
    options: dict = {}  # noqa: RUF012


# Small trees take a tenth of a second; where they do not, programs with cuts are faster than larger ones. Only the MILP
# leaves no proof.
ATTEMPTS = (
    Attempt("bab", True, 0.1, {"max_domains": 100}),
    Attempt("hull", True, 0.1),
    Attempt("hull", False, 0.3),
    Attempt("bab", False, 0.1),
    Attempt("milp", False, 1.0),
)


class Answer(NamedTuple):
    """What became of a margin.

    ``verdict``: "proved" (by ``stage``; it is at least ``bound``, by the arrays ``proof``, empty for the MILP),
    "falsified" (by the image ``adversarial``), "timeout" or "unknown". ``notes``: a line for each attempt;
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
    confirm: Callable, proved: bool = False,
) -> Answer:  # fmt: skip
    """Is the margin row . logits > 0 in the box [low, high] (1, H, W, C), for float32 (> ``error``) too if possible?

    row (K,); relus: as :func:`~nanomr.verify.bounds.crown.crown` gives them. ``left()``: the CPU seconds that are left
    of ``limit``. ``confirm(image)``: the counterexample that a candidate (H, W, C) is or leads to, or None.
    ``proved``: it is > 0, and only ``error`` is to be tried.
    """
    notes, solved, stage = [], 0.0, ""
    for stage, for_float32, share, options in ATTEMPTS:
        threshold = error if for_float32 else 0.0
        budget = share * (left() - solved)
        if (proved and not for_float32) or not (np.isfinite(threshold) and budget > 0):
            continue
        begin = time.process_time()
        if stage == "milp":
            answer = solver.decide(chain, low, high, relus, row, threshold=threshold, cpu_limit=budget)
            solved += max(0.0, answer.seconds - (time.process_time() - begin))  # the rest is in its own process
            done, proof, bound = answer.status == "infeasible", {}, threshold
            effort = f"{answer.message}, {answer.nodes} nodes"
        else:
            search = branch_and_bound if stage == "bab" else hull.search
            answer = search(chain, low, high, relus, row, **{"threshold": threshold, "cpu_limit": budget, **options})
            done, proof, bound = answer.status == "proved", answer.proof, answer.bound
            effort = f"{answer.status}, {answer.domains} domains"
        notes.append(f"{stage}, margin > {threshold:.2g}: {effort}, {answer.seconds:.2f} s")
        if done:
            return Answer("proved", stage, bound, proof, None, notes, solved)
        if answer.status == "candidate":
            adversarial = confirm(answer.image)
            if adversarial is not None:
                return Answer("falsified", stage, np.nan, {}, adversarial, notes, solved)
    verdict = "timeout" if left() - solved <= 0.02 * limit else "unknown"
    return Answer(verdict, stage, np.nan, {}, None, notes, solved)
