"""All stages on a few images: attack, bounds, targeted attack, then exact solvers for the rivals that are left.

:class:`Verifier` lives in a worker process; what goes in and out are plain values, so that any
``concurrent.futures`` executor can carry them (processes, MPI).
"""

import time
from functools import partial
from typing import NamedTuple

import numpy as np

from ... import models
from ...attacks.common import predictions
from ..bounds.crown import Box, Lines, alpha_crown, crown, image_box, lower, margin_rows, minimiser
from ..bounds.rounding import float32_errors
from ..chain import Chain
from ..exact.bab import Proof
from ..exact.milp import Solver, end_with_parent
from .attack import counterexamples, inside, paper_pgd, strict_box, targeted_pgd
from .schedule import settle

FINISHED = ("misclassified", "attacked", "verified", "falsified")
UNFINISHED = ("timeout", "unknown", "error")
METHODS = ("crown", "alpha-crown", "bab", "hull", "milp")  # to exclude a rival, in their order
PROVED = 1e-7  # a float64 bound of a margin above this is above 0 whatever its rounding, or a checker's, was


class Settings(NamedTuple):
    """What decides the outcome, but for the weights and the images."""

    eps: float  # linf, pixels in [0, 1]
    seed: int = 0
    time_limit: float = 120.0  # CPU seconds an image, all stages
    pgd_steps: int = 20
    pgd_restarts: int = 10
    alpha_steps: int = 10
    float32: bool = True  # is a proof for the deployed float32 network asked for, too? It must not delay the real one


class Outcome(NamedTuple):
    """One image: its line of results.jsonl, and the files beside it."""

    record: dict
    proof: dict[str, np.ndarray]  # the tensors of proofs/<id>.safetensors; empty: plain CROWN proves it
    adversarial: np.ndarray | None  # (H, W, C) float32


class Verifier:
    """``model`` and what its proofs need; ``solver``: does the MILPs, in a process that can be killed."""

    def __init__(self, model, settings: Settings, solver: Solver):
        self.model, self.chain, self.settings, self.solver = model, Chain(model), settings, solver

    def screen(self, images, labels, ids, boxes=None) -> list[Outcome]:
        """PGD, CROWN, alpha-CROWN and targeted PGD on float32 images (B, H, W, C) in [0, 1].

        ``boxes``: (low, high) float64, each (B, H, W, C), in place of the eps-balls; there the paper's PGD is left
        out. A record without a verdict is of an image that needs :meth:`decide`.
        """
        run, x, labels = _Screening(self, images, ids), images, np.asarray(labels)
        options = self.settings
        prediction = predictions(self.model, x)
        for i in range(len(x)):
            run.records[i] |= {"label": int(labels[i]), "prediction": int(prediction[i])}
        run.charge("forward", range(len(x)))
        run.close(np.flatnonzero(prediction != labels), "misclassified", "forward")

        def paper(first, restarts):
            """The paper's PGD, or some of its restarts, on what is left."""
            at = run.left()
            if boxes is None and len(at) and restarts > 0:
                adversarial, broken = paper_pgd(
                    self.model, self.chain, x[at], labels[at], options.eps, seed=options.seed, ids=np.asarray(ids)[at],
                    steps=options.pgd_steps, first=first, restarts=restarts,
                )  # fmt: skip
                run.charge("pgd", at)
                run.close(at[broken], "attacked", "pgd", adversarial[broken])

        paper(0, min(options.pgd_restarts, 1))  # which breaks most that break; the others are for what bounds leave
        left = run.left()
        if len(left) == 0:
            return run.outcomes()
        low, high = self._box(x[left], None if boxes is None else [b[left] for b in boxes])
        relus = crown(self.chain, low, high)
        box, lines = Box.between(low, high), [Lines.around(*r) for r in relus]
        owner, rivals = np.nonzero(np.arange(self.chain.classes) != labels[left, None])
        rows = margin_rows(labels[left][owner], rivals, self.chain.classes)
        bound = lower(self.chain, box, lines, rows, owner)
        corners = minimiser(box, bound.image, owner)
        error = float32_errors(self.chain, low, high, relus, rows, owner)
        for n, i in enumerate(left):
            run.records[i]["unstable"] = [int(line.unstable[n].sum()) for line in lines]
            run.records[i]["switching"] = self._switching(x[i], box.centre[n], corners[owner == n])
        run.note(left[owner], rivals, bound.value, "crown", error)
        run.charge("crown", left)
        run.close_verified("crown")

        target = self._wanted(error)
        open_ = np.flatnonzero(~(bound.value > target))
        if len(open_):
            images_ = np.unique(left[owner[open_]])
            found = alpha_crown(
                self.chain,
                box,
                lines,
                rows[open_],
                owner[open_],
                steps=options.alpha_steps,
                target=target[open_],
            )
            # the slopes as the proof will have them
            slopes = [s.astype(np.float32).astype(np.float64) for s in found.slopes]
            value = lower(self.chain, box, lines, rows[open_], owner[open_], slopes).value
            better = value > bound.value[open_]
            at = open_[better]
            run.note(left[owner[at]], rivals[at], value[better], "alpha-crown", error[at])
            for n in np.flatnonzero(better & (value > PROVED)):
                i = owner[open_[n]]
                units = np.flatnonzero(np.concatenate([line.unstable[i].ravel() for line in lines]))
                run.prove(left[i], rivals[open_[n]], units, np.concatenate([s[n].ravel() for s in slopes])[units])
            corners[at] = found.corner[better]
            run.charge("alpha-crown", images_)
            run.close_verified("alpha-crown")

        paper(1, options.pgd_restarts - 1)
        undecided = np.array([run.is_open(left[owner[n]], rivals[n]) for n in range(len(owner))], bool)
        at = np.flatnonzero(undecided)
        if len(at):
            i = left[owner[at]]
            tried = strict_box(x[i], options.eps) if boxes is None else inside(*(b[i] for b in boxes))
            adversarial, broken = targeted_pgd(
                self.model, self.chain, tried, labels[i], rivals[at], starts=corners[at], seed=options.seed,
                ids=np.asarray(ids)[i],
            )  # fmt: skip
            run.charge("targeted pgd", np.unique(i))
            hits, first = np.unique(i[broken], return_index=True)
            run.close(hits, "attacked", "targeted pgd", adversarial[broken][first])
        return run.outcomes()

    def _wanted(self, error):
        """What a margin's bound is to exceed: the float32 error, if that is asked for, and there is a bound on it."""
        return _target(error) if self.settings.float32 else np.full(np.shape(error), PROVED)

    def _box(self, images, boxes):
        return image_box(images, self.settings.eps) if boxes is None else boxes

    def decide(self, image, outcome: Outcome, box=None) -> Outcome:
        """Settle the rivals that :meth:`screen` left open, the closest first; also those open for float32 only.

        ``image`` (H, W, C) float32; ``box``: (low, high) float64 like it, where :meth:`screen` was given boxes.
        """
        record, proof = dict(outcome.record), dict(outcome.proof)
        record["bound"], record["how"] = dict(record["bound"]), dict(record["how"])
        start, used = time.process_time(), record["seconds"]
        low, high = self._box(image[None], None if box is None else [b[None] for b in box])
        tried = strict_box(image[None], self.settings.eps) if box is None else inside(low, high)
        relus = crown(self.chain, low, high)
        solved = 0.0  # CPU seconds of the solver's own process

        def left():
            return self.settings.time_limit - used - (time.process_time() - start) - solved

        record["solver"] = {}
        todo = [(b, t) for t, b in record["bound"].items() if not b > self._wanted(record["float32_error"][t])]
        verdict, adversarial = "verified", None
        for bound, t in sorted(todo):
            proved = bound > PROVED  # already, but not for float32
            row = margin_rows([record["label"]], [int(t)], self.chain.classes)[0]
            answer = settle(
                self.chain, low, high, relus, row, error=record["float32_error"][t], proved=proved, left=left,
                limit=self.settings.time_limit, solver=self.solver, float32=self.settings.float32,
                confirm=partial(self._confirm, tried, record["label"], int(t)),
            )  # fmt: skip
            solved += answer.solver_seconds
            record["solver"][t] = answer.notes
            if answer.verdict == "proved":
                record["how"][t], record["bound"][t] = answer.stage, answer.bound
                proof = {name: value for name, value in proof.items() if not name.startswith(f"{t}/")}
                proof |= {f"{t}/{name}": value for name, value in answer.proof.items()}
            elif not proved or answer.verdict == "falsified":
                verdict, adversarial, stage = answer.verdict, answer.adversarial, answer.stage
                break
        if verdict == "verified":
            stage = max(record["how"].values(), key=METHODS.index)
        record |= {"verdict": verdict, "stage": stage}
        spent = time.process_time() - start + solved
        record["seconds"] = round(used + spent, 4)
        record["stages"] = record["stages"] | {"exact": round(spent, 4)}
        _finish(record)
        return Outcome(record, proof if verdict == "verified" else {}, adversarial)

    def _confirm(self, tried, label, rival, candidate):
        """``candidate`` as a counterexample, if need be after a few steps of PGD; or None."""
        label, rival = np.array([label]), np.array([rival])
        found, real = counterexamples(self.model, self.chain, tried, candidate[None], label)
        if not real[0]:
            found, real = targeted_pgd(self.model, self.chain, tried, label, rival, starts=candidate[None], restarts=0)
        return found[0] if real[0] else None

    def _switching(self, image, centre, corners) -> list[int]:
        """How many ReLUs of each layer have both signs at ``corners`` (S, H, W, C), their opposites, and ``image``."""
        points = np.concatenate([image[None], corners, 2 * centre - corners])
        return [int(((z > 0).any(0) & (z <= 0).any(0)).sum()) for z in self.chain.forward(points)[1]]


class _Screening:
    """The records of a batch while they are being made."""

    def __init__(self, verifier: Verifier, images, ids):
        self.wanted = verifier._wanted
        self.records = [{"id": int(i), "verdict": None, "seconds": 0.0, "stages": {}} for i in ids]
        self.proofs: list[dict] = [{} for _ in ids]
        self.adversarial: list = [None] * len(self.records)
        self.clock = time.process_time()

    def left(self):
        return np.flatnonzero([r["verdict"] is None for r in self.records])

    def charge(self, stage: str, images):
        """Share the CPU time since the last call among ``images``."""
        now = time.process_time()
        for i in images:
            share = round((now - self.clock) / len(images), 5)
            self.records[i]["stages"][stage] = round(self.records[i]["stages"].get(stage, 0.0) + share, 5)
            self.records[i]["seconds"] = round(self.records[i]["seconds"] + share, 5)
        self.clock = now

    def close(self, images, verdict: str, stage: str, adversarial=None):
        for n, i in enumerate(images):
            self.records[i] |= {"verdict": verdict, "stage": stage}
            if adversarial is not None:
                self.adversarial[i] = adversarial[n]

    def note(self, images, rivals, bounds, how: str, errors):
        """Bounds of margins: a later one replaces an earlier one."""
        for i, t, bound, error in zip(images, rivals, bounds, errors, strict=True):
            record, t = self.records[i], str(int(t))
            record.setdefault("bound", {})[t] = float(bound)
            record.setdefault("how", {})[t] = how
            record.setdefault("float32_error", {})[t] = float(error)

    def prove(self, i, rival, units, slopes):
        proof = Proof(units.astype(np.int32))
        proof.rows[0] = np.zeros(len(units)), slopes
        self.proofs[i] |= {f"{rival}/{name}": value for name, value in proof.arrays().items()}

    def is_open(self, i, rival) -> bool:
        return self.records[i]["verdict"] is None and not self.records[i]["bound"][str(int(rival))] > PROVED

    def close_verified(self, stage: str):
        for i in self.left():
            record = self.records[i]
            if all(bound > self.wanted(record["float32_error"][t]) for t, bound in record["bound"].items()):
                self.close([i], "verified", stage)

    def outcomes(self) -> list[Outcome]:
        for record in self.records:
            if record["verdict"] is not None:
                _finish(record)
        return [Outcome(*parts) for parts in zip(self.records, self.proofs, self.adversarial, strict=True)]


def _target(error):
    """What a margin's bound is to exceed: the float32 error, if there is a bound on it."""
    return np.where(error < np.inf, np.maximum(error, PROVED), PROVED)


def _finish(record: dict):
    """What follows from the rest of a record."""
    verified = record["verdict"] == "verified"
    errors = record.get("float32_error", {})
    record["verified_float32"] = verified and all(b > errors[t] for t, b in record["bound"].items())


# --- in a worker process ----------------------------------------------------------------------------------------------

_verifier: Verifier | None = None


def start_worker(weights: str, settings: Settings):
    """Initialise a worker: one thread, its own network and solver."""
    import signal

    import numba

    global _verifier
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    end_with_parent()
    numba.set_num_threads(1)
    _verifier = Verifier(models.load(weights), settings, Solver())


def screen(images, labels, ids) -> list[Outcome]:
    return _verifier.screen(images, labels, ids)


def decide(image, outcome: Outcome) -> Outcome:
    return _verifier.decide(image, outcome)
