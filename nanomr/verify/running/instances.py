"""One property of one network, decided: an attack, bounds, then the exact solvers for every case that is left.

"unsat": no point of the box violates the property in real arithmetic, by a proof. "sat": a point that lies in the box
exactly violates it both there and in the deployed float32 network. "sat-real" and "sat-float32": a point violates it
in the one only, and for the other nothing was found. Where a coordinate has no float32 number between its bounds, the
point's is exact, and the deployed network is fed the one next to it.
"""

import copy
import hashlib
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ..bounds.crown import Box, Lines, alpha_crown, crown, lower, minimiser
from ..bounds.rounding import float32_errors
from ..chain import Chain
from ..exact import lemmas, split
from ..exact.bab import Proof
from ..exact.milp import Solver, end_with_parent
from ..formats.onnx_import import read_onnx
from ..formats.vnnlib import Case, Property, read_vnnlib
from ..proofs import witness
from ..proofs.checker import lower as rigorous
from ..proofs.checker import reach
from ..proofs.network import CertificateError, Network, read_network
from .attack import inside
from .pipeline import PROVED
from .schedule import MANY, settle

ROWS = 256  # bounded at once
FEW = 12  # inputs: with so few, splitting the box is faster than splitting ReLUs
QUICK = 14.0  # seconds a case with MANY unstable ReLUs has, before they get better bounds
TIGHTENING = 0.25  # ... for at most that share of the time that is left
VERDICTS = ("unsat", "sat", "sat-real", "sat-float32", "timeout", "unknown")
ANSWERED, UNANSWERED = VERDICTS[:2], (*VERDICTS[2:], "error")


HOW = ("point", "crown", "alpha-crown", "bab", "hull", "split", "milp")  # ways to exclude a case, in their order


class Decision(NamedTuple):
    """``cases``: how each was excluded, as results.jsonl has it; ``proof``: its arrays, "<case>/<name>"; ``witness``:
    the counterexample's text and the number of its case, or None; ``note``: what must be known beside the verdict."""

    verdict: str
    stage: str
    cases: list[dict]
    proof: dict[str, np.ndarray]
    witness: tuple[str, int] | None
    note: str


class Region:
    """The box of ``case``, and what of it can be fed to a float32 network."""

    @np.errstate(over="ignore")  # an end beyond float32 is infinite there, and fed to nothing
    def __init__(self, case: Case, order):
        self.low, self.high = case.low[None], case.high[None]  # (1, H, W, C) float64, around the decimals'
        self.is_point = case.exact.low == case.exact.high
        self.order, place = order, np.argsort(order)
        exact = [np.array(side, object)[place].reshape(case.low.shape) for side in case.exact[:2]]
        self.inner = []  # the largest float64 box inside the decimal one
        for end, decimal, inward in zip((case.low, case.high), exact, (1, -1), strict=True):
            beyond = [(d - Fraction(v)) * inward > 0 for v, d in zip(end.flat, decimal.flat, strict=True)]
            self.inner.append(np.where(np.reshape(beyond, end.shape), np.nextafter(end, inward * np.inf), end))
        low, high = inside(*self.inner)
        self.fed = low <= high  # is there a float32 number?
        middle = np.clip(0.5 * (self.inner[0] + self.inner[1]), *self.inner)
        self.others = {  # what the coordinates without one are instead: a float64 number, or the decimal
            at: Fraction(float(middle[at])) if self.inner[0][at] <= self.inner[1][at] else exact[0][at]
            for at in map(tuple, np.argwhere(~self.fed))
        }
        for at, value in self.others.items():
            low[at] = high[at] = float(value)
        self.low32, self.high32 = low[None], high[None]

    def point(self, image) -> list[Fraction]:
        """The exact point, in the file's order, at which float32 ``image`` (H, W, C) is fed."""
        x = np.where(self.fed, image, 0).astype(np.float64)
        values = np.array([Fraction(v) for v in x.ravel().tolist()], object).reshape(x.shape)
        for at, value in self.others.items():
            values[at] = value
        return values.ravel()[self.order].tolist()

    def between(self, image) -> list[Fraction]:
        """The exact point, in the file's order, at float64 ``image`` (H, W, C)."""
        x = np.clip(image, *self.inner)
        values = np.array([Fraction(v) for v in x.ravel().tolist()], object).reshape(x.shape)
        for at, value in self.others.items():
            if self.inner[0][at] > self.inner[1][at]:
                values[at] = value
        return values.ravel()[self.order].tolist()


class Subject:
    """A network as all parts need it: float32 as deployed, the verifier's float64 chain, and the checker's matrices."""

    def __init__(self, model, checked: Network | None):
        self.model, self.chain, self.checked = model, Chain(model), checked
        self.summed = copy.copy(self.chain)  # float64 computes the sums of these very layers
        self.summed.sums = True

    def rounding(self, low, high, relus, rows):
        """(S,): far above what float64 loses of rows . logits, by this code or another."""
        owner = np.zeros(len(rows), int)
        return float32_errors(self.summed, low, high, relus, rows, owner) * 2.0**-23

    def deployed(self, image):
        """The float32 network's logits (K,) as Fractions, or None if they are not finite; ``image`` (H, W, C)."""
        logits = self.model.forward(image[None].astype(np.float32))[0][0]
        return [Fraction(v) for v in logits.astype(np.float64).tolist()] if np.isfinite(logits).all() else None

    def violates(self, case: Case, point: list[Fraction], order) -> bool | None:
        """Does the exact point violate the property in real arithmetic? None where that is not known."""
        x = np.array([float(v) for v in point])[np.argsort(order)].reshape(1, *self.chain.input_shape)
        logits, inputs = self.chain.forward(x)
        margins = (case.rows @ logits[0] + case.offsets).max()
        slack = self.rounding(x, x, [(z, z) for z in inputs], case.rows).max() + 1e-12 * abs(case.offsets).max()
        if margins > slack:
            return False
        found = True if margins < -slack else None
        if self.checked is not None:
            try:
                found = witness.violates(self.checked, point, case.exact.rows, case.exact.offsets, order)
            except CertificateError:  # numbers so large that the checker takes none of them
                pass
        return found if margins <= slack else None  # two computations must agree; NaN agrees with nothing


class _Found(Exception):
    """A witness: the search is over."""


class _Hopeless(Exception):
    """This row cannot exclude its case: a point violates it alone."""


class Run:
    """The search on one instance. ``left()``: the seconds that are left of ``limit``, CPU seconds of this process, or,
    with a ``pace()`` (the CPU seconds that one of them has had so far), wall-clock."""

    def __init__(
        self, subject: Subject, prop: Property, left: Callable[[], float], limit: float, solver, seed: int = 0,
        pace: Callable[[], float] | None = None,
    ):  # fmt: skip
        self.subject, self.cases, self.left, self.limit, self.solver = subject, prop.cases, left, limit, solver
        self.pace = pace
        self.random = np.random.default_rng(seed)
        self.solved = 0.0  # CPU seconds of the solver's own process
        self.records: list[dict] = [{} for _ in prop.cases]
        self.proof: dict[str, np.ndarray] = {}
        self.seen: dict[str, tuple] = {}  # "sat", "sat-real", "sat-float32": (text, case)
        self.stage, self.timed_out = "", False
        self.relus: dict[int, tuple[list, dict | None]] = {}  # of each box: the bounds, and the lemmas, once tried
        boxes: dict[int, list[int]] = {}
        for i, case in enumerate(prop.cases):
            boxes.setdefault(id(case.low), []).append(i)
        self.groups = [(Region(prop.cases[members[0]], prop.order), members) for members in boxes.values()]

    @np.errstate(all="ignore")  # numbers that are not finite prove nothing
    def decide(self) -> Decision:
        try:
            for stage in (self._points, self._attack, self._bounds, self._search, self._exact):
                if not self._open() or (stage == self._exact and "sat-real" in self.seen):
                    break
                self.stage = stage.__name__[1:]
                stage()
        except _Found:
            pass
        if "sat" not in self.seen and not self._open():
            how = [record["how"] for record in self.records]
            notes = ["no certificate"] * ("milp" in how or self.subject.checked is None)
            notes += ["in real arithmetic; float32 differs"] * ("sat-float32" in self.seen)
            return Decision("unsat", max(how, key=HOW.index), self.records, self.proof, None, "; ".join(notes))
        for verdict in ("sat", "sat-real", "sat-float32"):
            if verdict in self.seen:
                return Decision(verdict, self.stage, self.records, {}, self.seen[verdict], "")
        late = self.timed_out or self.remaining() <= 0.02 * self.limit
        return Decision("timeout" if late else "unknown", self.stage, self.records, {}, None, "")

    def remaining(self) -> float:
        return self.left() - (self.solved if self.pace is None else 0.0)

    def _open(self, members=None) -> list[int]:
        members = range(len(self.records)) if members is None else members
        return [i for i in members if "how" not in self.records[i]]

    def _close(self, i: int, how: str, row: int | None, bound: float, arrays=None):
        found = {"how": how, **({"split": True} if row is None else {"row": row}), "bound": float(bound)}
        self.records[i] = self.records[i] | found
        self.proof |= {f"{i}/{name}": value for name, value in (arrays or {}).items()}

    def judge(self, region: Region, i: int, image) -> bool | None:
        """Does the point of float32 ``image`` (H, W, C) violate case ``i`` in real arithmetic? Ends the search if it
        does so in float32 as well."""
        case, point, logits = self.cases[i], region.point(image), self.subject.deployed(image)
        real = self.subject.violates(case, point, region.order)
        deployed = logits is not None and all(
            sum((v * logits[j] for j, v in row.items()), offset) <= 0
            for row, offset in zip(case.exact.rows, case.exact.offsets, strict=True)
        )
        verdict = {(True, True): "sat", (True, False): "sat-real", (False, True): "sat-float32"}.get((real, deployed))
        if verdict == "sat-float32" and not region.fed.all():
            verdict = None  # what float32 was fed is not in the box
        if verdict and verdict not in self.seen:
            if logits is None:
                logits = [Fraction(0)] * self.subject.chain.classes
            self.seen[verdict] = witness.text(verdict, point, logits), i
        if verdict == "sat":
            raise _Found
        return real

    # --- the stages ---------------------------------------------------------------------------------------------------

    def _points(self):
        """Boxes that are one point: its logits decide."""
        for region, members in self.groups:
            if region.is_point:
                for i in members:
                    if self.judge(region, i, region.low32[0]) is False:
                        self._close_point(region, i)

    def _close_point(self, region: Region, i: int):
        case, point = self.cases[i], region.point(region.low32[0])
        for m in range(len(case.rows)):
            rows, offsets = case.exact.rows[m : m + 1], case.exact.offsets[m : m + 1]
            alone = Case(*case[:2], case.rows[[m]], case.offsets[[m]], case.exact._replace(rows=rows, offsets=offsets))
            if self.subject.violates(alone, point, region.order) is False:
                return self._close(i, "point", m, -case.offsets[m])

    def _attack(self, corners=None, count: int | None = None):
        """Descend each open case's largest row + offset, from ``count`` random images and some corners of the box, or
        from ``corners[i]`` (S, ...)."""
        count = count or (20 if self.cases[0].low.size <= FEW else 2)
        for region, members in self.groups:
            members = self._open(members)
            if region.is_point or not members:
                continue
            starts, owner = [], []
            for i in members:
                mine = self._starts(region, count) if corners is None else corners[i]
                starts.append(np.clip(mine.astype(np.float32), region.low32, region.high32))
                owner += [i] * len(mine)
            owner, starts = np.array(owner), np.concatenate(starts)
            for first in range(0, len(owner), 1024):
                part = slice(first, first + 1024)
                self._try(region, owner[part], *self._descend(region, owner[part], starts[part]))

    def _starts(self, region: Region, count: int):
        """The middle, random images, and random corners (all, where they are few)."""
        shape, size = region.low.shape[1:], region.low.size
        share = self.random.random((count, *shape))
        if size <= 8:
            corner = np.array(np.meshgrid(*[[0.0, 1.0]] * size)).reshape(size, -1).T.reshape(-1, *shape)
        else:
            corner = self.random.integers(0, 2, (max(1, count // 4), *shape)).astype(float)
        return region.low + (region.high - region.low) * np.concatenate([np.full((1, *shape), 0.5), corner, share])

    def _search(self):
        """A longer attack on what bounds left open; without gradients where inputs are few."""
        if self.cases[0].low.size > FEW:
            return self._attack(count=16)
        for region, members in self.groups:
            for i in self._open(members):
                if self.remaining() < 0.6 * self.limit:
                    return
                images = self._evolve(region, i)
                owner = np.full(len(images), i)
                self._try(region, owner, *self._descend(region, owner, images))

    def _evolve(self, region: Region, i: int, keep: int = 200):
        """The best images (keep, ...) float32 for case ``i`` of 20,000 random ones and what came of these: a property
        with several rows has corners that gradients do not lead into, and few inputs can be searched without."""

        def worst(x):
            logits = self.subject.model.forward(x)[0]
            return np.nan_to_num((logits @ rows.T + offsets).max(1), nan=np.inf)

        rows, offsets = self.cases[i].rows.astype(np.float32), self.cases[i].offsets.astype(np.float32)
        x = np.clip(self._starts(region, 20_000).astype(np.float32), region.low32, region.high32)
        values, width, size = worst(x), region.high32 - region.low32, np.float32(0.1)
        for _ in range(30):
            best = np.argsort(values, kind="stable")[:keep]
            x, values = x[best], values[best]
            if values[0] < 0 or self.remaining() < 0.5 * self.limit:
                break
            steps = self.random.standard_normal((20 * keep, *x.shape[1:]), np.float32)
            tried = np.clip(np.repeat(x, 20, 0) + size * width * steps, region.low32, region.high32)
            x, values, size = np.concatenate([x, tried]), np.append(values, worst(tried)), size * np.float32(0.85)
        return x[np.argsort(values, kind="stable")[:keep]]

    def _descend(self, region: Region, owner, x, steps: int = 50):
        """(images (S, H, W, C), values (S,)): the best of each row of ``x`` on its way. A value <= 0 is a hit."""
        model, cases, deadline = self.subject.model, self.cases, 0.8 * self.remaining()
        most = max(len(cases[i].rows) for i in owner)
        repeat = [np.resize(np.arange(len(cases[i].rows)), most) for i in owner]
        rows = np.stack([cases[i].rows[r] for i, r in zip(owner, repeat, strict=True)]).astype(np.float32)
        offsets = np.stack([cases[i].offsets[r] for i, r in zip(owner, repeat, strict=True)]).astype(np.float32)
        width = region.high32 - region.low32
        best, least = x.copy(), np.full(len(x), np.inf, np.float32)
        for step in range(steps + 1):
            logits, cache = model.forward(x)
            values = np.einsum("smk,sk->sm", rows, logits) + offsets
            worst = np.nan_to_num(values.max(1), nan=np.inf)
            better = worst < least
            best[better], least[better] = x[better], worst[better]
            if step == steps or (least < 0).any() or self.remaining() < deadline:
                break
            chosen = values == values.max(1, keepdims=True)
            chosen[::2] |= values[::2] > 0  # for every other start, all rows that are not there yet
            gradient = model.backward(
                np.einsum("sm,smk->sk", chosen.astype(np.float32), rows), cache, param_grads=False
            )
            size = np.float32(0.125 - 0.1125 * step / steps)
            x = np.clip(x - size * width * np.sign(np.nan_to_num(gradient)), region.low32, region.high32)
        return best, least

    def _try(self, region: Region, owner, images, values):
        """Judge the best image of each case, if it is a hit, or nearly: rounding may be all that is missing."""
        for i in dict.fromkeys(owner[np.argsort(values, kind="stable")].tolist()):
            mine = np.flatnonzero(owner == i)
            at = mine[values[mine].argmin()]
            if values[at] <= 1e-5 * (1 + abs(self.cases[i].offsets).max()):
                self.judge(region, i, images[at])

    def _bounds(self):
        """CROWN and alpha-CROWN of every row of the open cases, then another attack, from the corners they point to."""
        self.best, corners = {}, {}
        for region, members in self.groups:
            members = self._open(members)
            if not members:
                continue
            self.relus[id(region)] = crown(self.subject.chain, region.low, region.high), None
            at = [(i, m) for i in members for m in range(len(self.cases[i].rows))]
            for first in range(0, len(at), ROWS):
                self._bound_rows(region, at[first : first + ROWS], corners)
        self._attack({i: np.array(corners[i]) for i in self._open()})

    def _bound_rows(self, region: Region, at, corners):
        """Close cases by their rows: ``at``, (case, row) each. Of others, note how far they are from it, and where."""
        chain, relus, owner = self.subject.chain, self.relus[id(region)][0], np.zeros(len(at), int)
        box, lines = Box.between(region.low, region.high), [Lines.around(*r) for r in relus]
        rows = np.array([self.cases[i].rows[m] for i, m in at])
        threshold = -np.array([self.cases[i].offsets[m] for i, m in at])
        target = threshold + np.maximum(PROVED, self.subject.rounding(region.low, region.high, relus, rows))

        def close(how, n, bound, target, arrays=None):
            if bound > target and "how" not in self.records[at[n][0]]:
                self._close(at[n][0], how, at[n][1], bound, arrays)

        def left(among):
            return np.array([n for n in among if "how" not in self.records[at[n][0]]], int)

        bound = lower(chain, box, lines, rows, owner)
        value, corner = bound.value.copy(), minimiser(box, bound.image, owner)
        for n in np.argsort(target - value):
            close("crown", n, value[n], target[n])
        doubt = left(np.flatnonzero(value > threshold))
        for n, rigorous_bound in zip(doubt, self._rigorous(region, rows[doubt]), strict=True):
            close("crown", n, rigorous_bound, threshold[n])
        todo = left(range(len(at)))
        if len(todo) and self.remaining() > 0:
            found = alpha_crown(chain, box, lines, rows[todo], owner[todo], steps=10, target=target[todo])
            slopes = [s.astype(np.float32).astype(np.float64) for s in found.slopes]  # as a proof has them
            better = lower(chain, box, lines, rows[todo], owner[todo], slopes).value
            units = np.flatnonzero(np.concatenate([[], *(line.unstable[0].ravel() for line in lines)]))
            for k, n in enumerate(todo):
                value[n], corner[n] = np.fmax(value[n], better[k]), found.corner[k]
                proof = Proof(units.astype(np.int32))
                values = np.concatenate([[], *(s[k].ravel() for s in slopes)])[units]
                proof.rows[0] = np.zeros(len(units)), values
                close("alpha-crown", n, better[k], target[n], proof.arrays())
        for n in left(range(len(at))):
            i, m = at[n]
            self.best.setdefault(i, []).append((float(value[n] - target[n]), m, float(target[n])))
            corners.setdefault(i, []).append(corner[n])

    def _rigorous(self, region: Region, rows):
        """The checker's bounds (S,) of rows . logits, for what float64 shows with its rounding alone in doubt."""
        if not len(rows) or self.subject.checked is None:
            return np.full(len(rows), -np.inf)
        try:
            ends = (x[0].ravel() for x in (region.low, region.high))
            return rigorous(self.subject.checked, reach(self.subject.checked, *ends), rows)
        except CertificateError:
            return np.full(len(rows), -np.inf)

    def _exact(self):
        """The solvers, the hardest case first: the box in parts where inputs are few, else ReLUs, row by row."""
        region_of = {i: region for region, members in self.groups for i in members}
        for i in sorted(self._open(), key=lambda i: max(self.best[i])[0]):
            region = region_of[i]
            parts = split.suits(self.subject.chain, region.low, region.high)
            if parts:
                self._split(region, i, 0.8 * self.remaining())
            rows = [(m, target) for gap, m, target in sorted(self.best[i], reverse=True) if not np.isnan(gap)]
            for k, (m, target) in enumerate(rows, 1):
                if "how" not in self.records[i] and self.remaining() > 0:
                    self._settle(region, i, m, target, self.remaining() / (1 if k == len(rows) else 2))
            if "how" not in self.records[i]:
                self.timed_out = self.remaining() <= 0.02 * self.limit
                if self.timed_out or self.seen:
                    return  # the others cannot save it

    def _settle(self, region: Region, i: int, m: int, target: float, budget: float):
        """Exclude case ``i`` by its row ``m`` alone."""
        case, end = self.cases[i], self.remaining() - budget
        threshold = -float(case.offsets[m])
        if target - threshold > PROVED:  # numbers so large that their rounding is as well
            threshold = target
        alone = len(case.rows) == 1

        def settled(until: float) -> bool:
            """Was it, before so many seconds remain?"""
            relus, proofs = self.relus[id(region)]
            answer = settle(
                self.subject.chain, region.low, region.high, relus, case.rows[m], error=np.inf,
                left=lambda: self.remaining() - until, limit=self.limit, solver=self.solver,
                confirm=partial(self._confirm, region, i, None if alone else m), threshold=threshold,
                tightened=bool(proofs),
            )  # fmt: skip
            self.solved += answer.solver_seconds
            self.records[i].setdefault("solver", []).extend(answer.notes)
            if answer.verdict == "proved":
                self._close(i, answer.stage, m, answer.bound, answer.proof | (proofs or {} if answer.proof else {}))
            return answer.verdict == "proved"

        try:
            relus, proofs = self.relus[id(region)]
            if proofs is None and sum(int(((low < 0) & (high > 0)).sum()) for low, high in relus) >= MANY:
                if settled(max(end, self.remaining() - QUICK)) or self.remaining() <= end:
                    return
                self._tighten(region)
            settled(end)
        except _Hopeless:
            return

    def _tighten(self, region: Region):
        """Better bounds of a box's ReLUs, for all cases that are still open: their searches begin anew with them."""
        relus, until = self.relus[id(region)][0], (1 - TIGHTENING) * self.remaining()
        relus, found = lemmas.tighten(
            self.subject.chain, region.low, region.high, relus, lambda: self.remaining() - until
        )
        self.relus[id(region)] = relus, lemmas.arrays(found)

    def _confirm(self, region: Region, i: int, m: int | None, candidate):
        """For the solvers: never returns an image; a witness ends the search, and a row that fails alone is left."""
        image = np.clip(candidate.astype(np.float32), region.low32[0], region.high32[0])
        real = self.judge(region, i, image)
        if not real:
            owner, start = np.array([i]), image[None]
            self._try(region, owner, *self._descend(region, owner, start, 20))
        if not real and "sat-real" not in self.seen:  # between two float32 numbers, perhaps
            point = region.between(candidate)
            if self.subject.violates(self.cases[i], point, region.order):
                self.seen["sat-real"] = witness.text("sat-real", point, [Fraction(0)] * self.subject.chain.classes), i
        if m is not None:
            case, x = self.cases[i], candidate[None]
            margin = case.rows[m] @ self.subject.chain.forward(x)[0][0] + case.offsets[m]
            if margin < 0:
                raise _Hopeless
        if "sat-real" in self.seen:
            raise _Found

    def _split(self, region: Region, i: int, budget: float):
        """Exclude case ``i`` by parts of its box."""
        case = self.cases[i]
        cpu = budget * (1.0 if self.pace is None else self.pace())
        tree = split.search(self.subject.chain, region.low, region.high, case.rows, case.offsets, cpu_limit=cpu)
        note = f"split: {tree.status}, {tree.domains} domains, {tree.seconds:.2f} s"
        self.records[i].setdefault("solver", []).append(note)
        if tree.status == "proved":
            self._close(i, "split", None, tree.bound, tree.proof)
        elif tree.status == "candidate":
            self._confirm(region, i, None, tree.image)


def decide(
    subject: Subject, prop: Property, *, left: Callable[[], float], limit: float, solver, seed: int = 0
) -> Decision:
    """``prop`` about the network, within ``left()`` seconds of ``limit``; raises UserError for another network's."""
    if prop.outputs != subject.chain.classes or prop.cases[0].low.shape != subject.chain.input_shape:
        raise UserError(f"the property is about {prop.outputs} outputs, the network has {subject.chain.classes}")
    return Run(subject, prop, left, limit, solver, seed).decide()


# --- a line of a list -------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of an instances.csv; ``error``: what is wrong with it, or "". The ``number`` counts from 1."""

    number: int
    network: str
    prop: str
    seconds: float
    error: str


class Options(NamedTuple):
    """How a list is decided. ``folder``: what its paths are relative to; ``out``: the results' folder or None."""

    folder: str
    out: str | None = None
    wall: bool = False  # do the seconds mean wall-clock time, rather than CPU time?
    time_limit: float | None = None  # in place of the lines' own
    seed: int = 0


def read_list(file: Path) -> list[Line]:
    """The lines of a VNN-COMP list: network.onnx,property.vnnlib,seconds. Raises UserError if there are none."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    lines = [_line(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} names no instance: a line is network.onnx,property.vnnlib,seconds")
    return lines


def _line(number, text) -> Line:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(parts):
        return Line(
            number, text[:60].replace(",", " "), "", 0.0, f"{text[:60]!r} is not network.onnx,property.vnnlib,seconds"
        )
    try:
        seconds = float(parts[2])
    except ValueError:
        seconds = 0.0
    error = "" if 0 < seconds < np.inf else f"{parts[2][:60]!r} is not a number of seconds above 0"
    return Line(number, *parts[:2], seconds, error)


def run_line(line: Line, options: Options, solver) -> tuple[dict, dict[str, np.ndarray], str | None]:
    """(its line of results.jsonl, its proof's arrays, the counterexample's text or None). Whatever goes wrong with it
    becomes the verdict "error"."""
    start, wall = time.process_time(), time.monotonic()
    record = {"id": line.number, "network": line.network, "property": line.prop, "verdict": "error", "note": ""}
    limit = options.time_limit or line.seconds
    proof, text, run = {}, None, None

    def left():
        return limit - (time.monotonic() - wall if options.wall else time.process_time() - start)

    def pace():
        return min(1.0, (time.process_time() - start) / (time.monotonic() - wall))

    try:
        if line.error:
            raise UserError(line.error)
        network, prop = (_existing(Path(options.folder) / name) for name in (line.network, line.prop))
        record |= {"network_sha256": _sha256(network), "property_sha256": _sha256(prop), "limit": limit}
        subject, order = _subject(network, record["network_sha256"], options.out)
        question = read_vnnlib(prop, subject.chain.input_shape, subject.chain.classes, order)
        run = Run(subject, question, left, limit, solver, options.seed, pace if options.wall else None)
        found = run.decide()
        record |= {"verdict": found.verdict, "note": found.note, "stage": found.stage, "cases": found.cases}
        proof = found.proof
        if found.witness:
            text, record["case"] = found.witness
    except UserError as error:
        record["note"] = str(error)
    except Exception as error:  # a bug, of one line: the others go on
        record["note"] = f"{type(error).__name__}: {error}"
    record["seconds"] = round(time.process_time() - start + (run.solved if run else 0), 3)
    record["wall"] = round(time.monotonic() - wall, 3)
    return record, proof, text


def _existing(path: Path) -> Path:
    """The file, or its gzipped (or unpacked) form: lists name the one, archives hold the other."""
    other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    return other if other.is_file() and not path.exists() else path


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


@lru_cache(1)
def _subject(path: Path, sha256: str, out: str | None) -> tuple[Subject, np.ndarray]:
    """The network in a file, and the order of its inputs; in ``out``, both are kept as what the checker reads."""
    model, order = read_onnx(path)
    with tempfile.TemporaryDirectory() as place:
        kept = Path(out or place) / "networks" / f"{sha256}.safetensors"
        kept.parent.mkdir(parents=True, exist_ok=True)
        model.save(kept, input_order=order.tolist())
        try:
            checked = read_network(kept)
        except CertificateError:  # its witnesses are not checked exactly, and its proofs not at all
            checked = None
    return Subject(model, checked), order


# --- in a worker process ----------------------------------------------------------------------------------------------

_solver: Solver | None = None


def start_worker():
    """Initialise a worker: one thread, a solver of its own."""
    import signal

    import numba

    global _solver
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    end_with_parent()
    numba.set_num_threads(1)
    _solver = Solver()


def in_worker(line: Line, options: Options):
    """:func:`run_line`, with the worker's solver."""
    return run_line(line, options, _solver)
