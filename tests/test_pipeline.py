"""Every stage together, on tiny networks: the verdict is the truth, whatever stages are left out."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_milp import Network, networks

from nanomr import checkpoint, models
from nanomr.attacks.common import Linf
from nanomr.attacks.pgd import pgd
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds.crown import Bound, image_box
from nanomr.verify.exact import milp
from nanomr.verify.exact.bab import Tree
from nanomr.verify.exact.collapsed import collapse
from nanomr.verify.running import pipeline, schedule
from nanomr.verify.running.pipeline import Settings, Verifier

BAND = 1e-3  # of the margin around 0, where float32, tolerances and attacks may see it either way
eps_values = st.sampled_from([0.01, 0.05, 0.2])


class InProcess:
    """The solver without its process."""

    decide = staticmethod(milp.decide)


class Case:
    """A tiny network that gets an image right, and its least margin in the image's box, by brute force."""

    def __init__(self, network, eps, **settings):
        model, self.draw = network
        self.model, self.eps = model.astype(np.float32), eps
        self.x = self.draw.random((3, *model.input_shape)).astype(np.float32)
        self.labels = self.model.forward(self.x)[0].argmax(1)
        self.verifier = Verifier(self.model, Settings(eps, time_limit=1e6, **settings), InProcess())

    def verdicts(self):
        found = self.verifier.screen(self.x, self.labels, np.arange(3))
        return [o if o.record["verdict"] else self.verifier.decide(x, o) for o, x in zip(found, self.x, strict=True)]

    def least(self, i):
        """The smallest margin to any rival in image i's box."""
        exact = Network.__new__(Network)
        exact.chain, exact.label = self.verifier.chain, self.labels[i]
        exact.low, exact.high = image_box(self.x[i : i + 1], self.eps)
        rivals = (k for k in range(exact.chain.classes) if k != exact.label)
        return min(exact_to(exact, rival) for rival in rivals)


def exact_to(exact, rival):
    exact.rival = rival
    return exact.exact()


def audit(case, outcomes):
    """Is every verdict true?"""
    for i, (record, proof, adversarial) in enumerate(outcomes):
        assert record["id"] == i and record["label"] == record["prediction"] == case.labels[i]
        least = case.least(i)
        if abs(least) < BAND:
            continue
        assert record["verdict"] in (("verified",) if least > 0 else ("attacked", "falsified")), (least, record)
        if record["verdict"] == "verified":
            assert adversarial is None and min(record["bound"].values()) <= least + 1e-6
            errors = record["float32_error"]
            assert record["verified_float32"] == all(b > errors[t] for t, b in record["bound"].items())
            assert record["stage"] == max(record["how"].values(), key=pipeline.METHODS.index)
            assert {t for t, how in record["how"].items() if how in ("alpha-crown", "bab", "hull")} == {
                name.split("/")[0] for name in proof
            }
        else:
            assert not record["verified_float32"]
            assert Linf(case.eps).inside(case.x[i : i + 1].astype(float), adversarial[None].astype(float))[0]
            assert case.model.forward(adversarial[None])[0].argmax() != case.labels[i]
        json.loads(checkpoint._dumps(record))


@fewer(0.6)
@given(network=networks(), eps=eps_values)
def test_verdicts_are_the_truth(network, eps):
    case = Case(network, eps)
    audit(case, case.verdicts())


class GivesUp:
    """A search that finds nothing."""

    tree, nearest, margin, seconds = Tree("timeout", None, -np.inf, None, 1, 0.0), None, np.inf, 0.0

    def __init__(self, *question, **_):
        self.question = question

    @property
    def exact(self):
        return collapse(*self.question)

    def drawn_in(self):
        return []

    def run(self, *_, **__):
        return self.tree


ATTACKS = {"paper_pgd", "targeted_pgd"}
BOUNDS = {"alpha_crown", "bab", "hull"}
WITHOUT = {  # what is left out: (which of the stages, one that then has something to do)
    "attacks": (ATTACKS, "bab"),
    "attacks and slopes": (ATTACKS | {"alpha_crown"}, "bab"),
    "attacks and trees": (ATTACKS | {"bab"}, "hull"),
    "attacks, trees and hulls": (ATTACKS | {"bab", "hull"}, "milp"),
    "all but hulls": (ATTACKS | {"alpha_crown", "bab"}, "hull"),
    "all but the MILP": (ATTACKS | BOUNDS, "milp"),
    "nothing": (set(), "pgd"),
}


@pytest.mark.parametrize("left_out", WITHOUT)
@fewer(0.3)
@given(network=networks(), eps=eps_values)
def test_any_stages_that_are_left_come_to_the_same(left_out, network, eps):
    with pytest.MonkeyPatch.context() as patch:
        blind(patch, WITHOUT[left_out][0])
        case = Case(network, eps)
        audit(case, case.verdicts())


def blind(patch, stages):
    """Let these stages find nothing."""
    crown = pipeline.alpha_crown

    def no_attack(model, chain, x, labels, *_, **__):
        x = x[0] if isinstance(x, tuple) else x
        return x, np.zeros(len(x), bool)

    def no_slopes(*arguments, steps, **options):
        return crown(*arguments, steps=0, **options)

    for stage in stages:
        if stage in schedule.SEARCHES:
            patch.setitem(schedule.SEARCHES, stage, GivesUp)
        else:
            patch.setattr(pipeline, stage, no_slopes if stage == "alpha_crown" else no_attack)


@pytest.mark.parametrize("left_out", WITHOUT)
def test_the_tests_above_see_images_of_both_kinds(left_out, monkeypatch):
    blind(monkeypatch, WITHOUT[left_out][0])
    seen = set()
    for seed in range(12):
        for eps in (0.05, 0.2):
            for outcome in Case(network_of(seed), eps).verdicts():
                seen.add((outcome.record["verdict"], outcome.record["stage"]))
    assert {"verified", "attacked" if left_out == "nothing" else "falsified"} <= {verdict for verdict, _ in seen}
    assert {"crown", WITHOUT[left_out][1]} <= {stage for _, stage in seen}


def network_of(seed):
    from nanomr.models import mlp

    model, draw = mlp((3, 4, 4, 3), seed, (1, 1, 3), (0.5,) * 3, (0.3,) * 3), np.random.default_rng(seed)
    model.weights *= 3
    return model, draw


def test_nothing_is_verified_when_every_method_gives_up(monkeypatch):
    blind(monkeypatch, ATTACKS | BOUNDS)
    monkeypatch.setattr(InProcess, "decide", lambda *_, **__: milp.Answer("timeout", None, np.nan, 0, 0.0, "no"))
    verdicts = {o.record["verdict"] for seed in range(10) for o in Case(network_of(seed), 0.2).verdicts()}
    assert "unknown" in verdicts and "falsified" not in verdicts


@pytest.mark.parametrize("status", ["error", "timeout", "candidate"])
def test_only_infeasible_is_a_proof_and_a_candidate_must_err(status, monkeypatch):
    blind(monkeypatch, ATTACKS | BOUNDS)

    def answer(chain, low, high, *_, **__):  # a candidate that does not err: the middle of the box
        return milp.Answer(status, 0.5 * (low + high)[0], 0.0, 0, 0.0, "said so")

    monkeypatch.setattr(InProcess, "decide", staticmethod(answer))
    for seed in range(10):
        for outcome in Case(network_of(seed), 0.2).verdicts():
            if outcome.record["stage"] == "milp":
                assert outcome.record["verdict"] == "unknown" and not outcome.record["verified_float32"]


def settled(monkeypatch, says, confirm=lambda image: None, **options):
    """(The Answer about a margin with a float32 error of 0.1, [(search, threshold)] turn by turn). ``says``: what a
    search's tree is in each of its turns, by (search, threshold); it gives up afterwards."""
    turns = []

    class Search:
        def __init__(self, *problem, threshold, **told):
            self.key, self.seconds = (self.name, threshold), 0.0
            self.tree, self.nearest, self.margin, self.says = None, None, np.inf, iter(says.get(self.key, ()))

        def run(self, *clocks):
            turns.append(self.key)
            self.seconds += 1.0
            status = next(self.says, "timeout")
            found = Tree(status.split()[0], np.full((1, 1, 3), len(turns)), self.key[1], {}, 1, self.seconds)
            self.tree = None if status == "timeout" else found
            return found

    monkeypatch.setattr(schedule, "SEARCHES", {k: type(k, (Search,), {"name": k}) for k in ("bab", "hull")})
    box, relus = np.zeros((1, 1, 1, 3)), [(np.full((1, 3), -1.0), np.ones((1, 3)))]
    found = schedule.settle(
        None, box, box, relus, np.ones(2), error=0.1, left=lambda: 100.0 - len(turns), limit=100.0,
        solver=None, confirm=confirm, **options,
    )  # fmt: skip
    return found, turns


@pytest.mark.parametrize("by, turns_taken", [("bab", 1), ("hull", 2)])
def test_a_float32_margin_that_an_image_refutes_takes_no_more_time(by, turns_taken, monkeypatch):
    """An image whose margin lies between 0 and the float32 error errs nowhere. But there is no proof of more than the
    error, and what is left of its time is for the margin itself."""
    found, turns = settled(monkeypatch, {(by, 0.1): ["candidate"], (by, 0): ["proved"]})
    assert (found.verdict, found.stage) == ("proved", by)
    assert turns == [(name, t) for t in (0.1, 0) for name in ("bab", "hull")[:turns_taken]]


def test_the_last_play_is_not_over_with_an_image_that_does_not_err(monkeypatch):
    """The other search may find one that does. A margin that is proved, but for float32, has one play only."""
    second, errs = ["timeout", "candidate"], lambda turn: lambda image: image if image.max() == turn else None
    says = {("bab", 0.1): ["candidate"], ("bab", 0): ["candidate"], ("hull", 0): second}
    found, turns = settled(monkeypatch, says, errs(turn=4))
    assert (found.verdict, found.stage) == ("falsified", "hull") and turns[1:] == [("bab", 0), ("hull", 0), ("hull", 0)]
    found, turns = settled(monkeypatch, {("bab", 0.1): ["candidate"], ("hull", 0.1): second}, errs(turn=3), proved=True)
    assert (found.verdict, found.stage) == ("falsified", "hull") and turns == [("bab", 0.1), *[("hull", 0.1)] * 2]


def test_a_search_that_gives_up_leaves_the_other_its_turns(monkeypatch):
    found, turns = settled(monkeypatch, {("bab", 0.1): ["timeout for good"], ("hull", 0.1): ["timeout", "proved"]})
    assert (found.verdict, found.stage, found.bound) == ("proved", "hull", 0.1) and len(turns) == 3


def test_bounds_that_are_not_numbers_verify_nothing(monkeypatch):
    real = pipeline.lower

    def broken(*arguments, **options):
        bound = real(*arguments, **options)
        return Bound(np.full_like(bound.value, np.nan), bound.image, bound.relus)

    blind(monkeypatch, ATTACKS | BOUNDS)
    monkeypatch.setattr(InProcess, "decide", lambda *_, **__: milp.Answer("timeout", None, np.nan, 0, 0.0, "no"))
    monkeypatch.setattr(pipeline, "lower", broken)
    verdicts = {o.record["verdict"] for seed in range(5) for o in Case(network_of(seed), 0.01).verdicts()}
    assert verdicts == {"unknown"}


def test_the_time_limit_is_kept_and_said(monkeypatch):
    blind(monkeypatch, ATTACKS | BOUNDS)
    case = Case(network_of(1), 0.2)
    case.verifier.settings = case.verifier.settings._replace(time_limit=1e-9)
    verdicts = {o.record["verdict"] for o in case.verdicts()}
    assert "timeout" in verdicts and verdicts <= {"timeout", "verified"}


@fewer(0.3)
@given(seed=seeds, eps=eps_values)
def test_no_attack_ever_breaks_a_verified_image(seed, eps):
    """Random networks, larger than brute force allows, and an attack with other starts than the verifier's own."""
    draw = np.random.default_rng(seed)
    case = Case(network_of(seed % 1000), eps)
    x = draw.random((8, *case.model.input_shape)).astype(np.float32)
    labels = case.model.forward(x)[0].argmax(1)
    found = case.verifier.screen(x, labels, np.arange(8))
    found = [o if o.record["verdict"] else case.verifier.decide(image, o) for o, image in zip(found, x, strict=True)]
    verified = [i for i, o in enumerate(found) if o.record["verdict"] == "verified"]
    _, fooled = pgd(case.model, x, labels, eps, steps=30, restarts=5, seed=seed + 1)
    assert not fooled[verified].any()


def test_a_batch_is_its_images_one_by_one_and_ids_name_them():
    case = Case(network_of(4), 0.1)
    ids = np.array([7, 900, 31])
    together = case.verifier.screen(case.x, case.labels, ids)
    for i, outcome in enumerate(together):
        (alone,) = case.verifier.screen(case.x[i : i + 1], case.labels[i : i + 1], ids[i : i + 1])
        for key in ("id", "verdict", "stage", "prediction", "unstable", "switching", "how"):
            assert alone.record.get(key) == outcome.record.get(key)
        for t, bound in outcome.record.get("bound", {}).items():
            assert abs(alone.record["bound"][t] - bound) < 1e-5


def test_a_wrong_prediction_costs_nothing_more():
    case = Case(network_of(4), 0.1)
    found = case.verifier.screen(case.x, (case.labels + 1) % 3, np.arange(3))
    assert [o.record["verdict"] for o in found] == ["misclassified"] * 3
    assert all("bound" not in o.record and o.adversarial is None for o in found)


def test_boxes_may_be_given_instead_of_balls():
    """A box of any shape: of one point it is verified, around the whole image space it is broken."""
    case = Case(network_of(0), 0.0)
    point = case.x.astype(np.float64)
    found = case.verifier.screen(case.x, case.labels, np.arange(3), (point, point))
    assert [o.record["verdict"] for o in found] == ["verified"] * 3
    low, high = np.zeros_like(point), np.ones_like(point)
    found = case.verifier.screen(case.x, case.labels, np.arange(3), (low, high))
    found = [o if o.record["verdict"] else case.verifier.decide(case.x[i], o, (low[i], high[i]))
             for i, o in enumerate(found)]  # fmt: skip
    assert len(set(case.labels.tolist())) > 1  # so every image's box holds an image of another class
    assert {o.record["verdict"] for o in found} <= {"attacked", "falsified"}
    for outcome, label in zip(found, case.labels, strict=True):
        assert case.model.forward(outcome.adversarial[None])[0].argmax() != label


def test_seconds_are_the_stages():
    case = Case(network_of(5), 0.2)
    for outcome in case.verdicts():
        assert abs(sum(outcome.record["stages"].values()) - outcome.record["seconds"]) < 1e-3


@pytest.mark.parametrize("margin, by_crown", [(5e-8, False), (5e-7, True)])
def test_crown_proves_no_margin_that_a_checker_may_lose_to_rounding(margin, by_crown):
    model = models.mlp((1, 2), input_shape=(1, 1, 1)).astype(np.float32)
    model.children["fc1"].params["weight"][...], model.children["fc1"].params["bias"][...] = 0, [margin, 0]
    verifier = Verifier(model, Settings(0.1), InProcess())
    outcome = verifier.screen(np.zeros((1, 1, 1, 1), np.float32), [0], [0])[0]
    assert outcome.record["stage"] == "crown" if by_crown else outcome.record["verdict"] is None


@functools.cache
def real_verdicts() -> dict:
    return {(s, o.record["id"]): o.record["verdict"] for s in range(16) for o in Case(network_of(s), 0.1).verdicts()}


@pytest.mark.parametrize("size", [0.6, np.inf])
def test_a_larger_float32_error_costs_claims_for_float32_but_no_proof(size, monkeypatch):
    """What CROWN leaves open for float32 alone goes on to the trees; without a bound on the error, nothing does."""
    real = real_verdicts()
    monkeypatch.setattr(pipeline, "float32_errors", lambda *arguments: np.full(len(arguments[-1]), size))
    by_tree = claimed = 0
    for seed in range(16):
        case = Case(network_of(seed), 0.1)
        outcomes = case.verdicts()
        audit(case, outcomes)
        for record, proof, _ in outcomes:
            assert (record["verdict"] == "verified") == (real[seed, record["id"]] == "verified")
            claimed += record["verified_float32"]
            notes = record.get("solver", {})
            trees = [t for t in notes if not any("margin > 0:" in note for note in notes[t])]  # for float32 alone
            proved = [t for t in trees if record["how"][t] in ("bab", "hull")]
            assert all(record["bound"][t] > size and f"{t}/split" in proof for t in proved)
            by_tree += len(proved)
    assert (claimed > 0 and by_tree > 0) if size < np.inf else (claimed == by_tree == 0)
