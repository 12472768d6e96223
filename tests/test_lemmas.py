"""Bounds of single ReLUs by trees: below the true least, nearly it, and the same to the checker."""

import copy
import inspect
import types
from itertools import pairwise

import numpy as np
import pytest
from test_bab import TOLERANCE, Problem
from test_certificate import NETWORKS, changed, picture, randomise, read, replaced
from test_instances import box, decide, head, network, solver  # noqa: F401  (fixtures)

from nanomr.layers import Conv2d, Flatten, Linear, ReLU
from nanomr.models import Model
from nanomr.verify.bounds.crown import crown, image_box
from nanomr.verify.chain import Chain
from nanomr.verify.exact import lemmas
from nanomr.verify.proofs import checker
from nanomr.verify.proofs.network import CertificateError, read_network
from nanomr.verify.running import instances

EPS, MOST = {"conv": 0.3, "mlp": 0.1, "mlp, batch norm": 0.1}, 12


def conv():
    children = {
        "conv1": Conv2d(2, 3, 3, 1, (1, 1, 1, 1)),
        "relu1": ReLU(),
        "conv2": Conv2d(3, 3, 3, 2),
        "relu2": ReLU(),
    }
    children |= {"flatten": Flatten(), "fc1": Linear(12, 6), "relu3": ReLU(), "fc2": Linear(6, 3)}
    return Model(children, "conv", (5, 5, 2))


def always():
    return 1.0


class Unit(Problem):
    """sign * (the input of unit ``at`` of ReLU layer ``layer``) in the place of the margin."""

    def __init__(self, whole: Problem, layer: int, at: int, sign: int):
        self.chain = copy.copy(whole.chain)
        self.chain.stages = whole.chain.stages[: layer + 1]
        self.low, self.high, self.relus = whole.low, whole.high, whole.relus[:layer]
        self.row = sign * np.eye(whole.relus[layer][0].size)[at]
        self.args = self.chain, self.low, self.high, self.relus


def trial(module, name, seed, most):
    """Is anything claimed that is not so? How many lemmas, and how near their trees came."""
    problem = Problem(name, seed, eps=1.0)
    relus, found = module.tighten(*problem.args, always, most)
    offsets, nearness = np.cumsum([0, *(low.size for low, _ in problem.relus)]), []
    for lemma in found:
        layer = int(np.searchsorted(offsets, lemma.unit, "right")) - 1
        at = lemma.unit - offsets[layer]
        truth = min(Unit(problem, layer, at, lemma.sign).minima().values())
        before = (problem.relus[layer][0].ravel() if lemma.sign > 0 else -problem.relus[layer][1].ravel())[at]
        after = (relus[layer][0].ravel() if lemma.sign > 0 else -relus[layer][1].ravel())[at]
        assert before < lemma.bound <= truth + TOLERANCE and after == lemma.bound
        nearness.append((lemma.bound - before) / (min(truth, 0) - before))
    for (low, high), (old_low, old_high) in zip(relus, problem.relus, strict=True):
        assert (low >= old_low).all() and (high <= old_high).all()
    return nearness


CASES = [(name, seed) for name in ("mlp", "deep") for seed in range(3)]


def test_a_lemma_is_below_the_least_of_its_unit_and_near_it():
    near = [share for case in CASES for share in trial(lemmas, *case, most=100)]
    assert len(near) > 10 and np.median(near) > 0.9
    few = [share for case in CASES for share in trial(lemmas, *case, most=1)]
    assert np.median(few) < 0.8 * np.median(near)  # it is the tree that does it


BUGS = {
    "the other side": ("sign * net.image[unit, pixels]", "net.image[unit, pixels]"),
    "a bias of the other side": ("sign * net.bias[unit]", "net.bias[unit]"),
    "a leaf is lost": ("zip(*leaves, *open_, strict=True)", "zip(*leaves, *open_[1:] or open_, strict=True)"),
    "an upper bound for a lower one": ("(z_low, found[0]) if sign > 0", "(z_low, -found[0]) if sign > 0"),
    "a child of another node": ("np.repeat(parents, 2).tolist()", "np.repeat(parents[:1], 2 * len(parents)).tolist()"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    old, new = BUGS[bug]
    source = inspect.getsource(lemmas)
    assert source.count(old) == 1
    module = types.ModuleType(lemmas.__name__)
    module.__package__ = lemmas.__package__
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    with pytest.raises((AssertionError, CertificateError)):
        for case in CASES:
            trial(module, *case, most=100)
        agreement(module, "mlp", 0, tmp_path)


# --- the checker ------------------------------------------------------------------------------------------------------


def agreement(module, name, seed, folder):
    """The checker's bounds are the verifier's. Returns (the network, what is reached, the arrays)."""
    draw = np.random.default_rng(seed)
    model = randomise({**NETWORKS, "conv": conv}[name](), draw)
    checked, chain = read(model, folder), Chain(model)
    low, high = image_box(picture(model, draw)[None], EPS[name])
    relus, found = module.tighten(chain, low, high, crown(chain, low, high), always, MOST)
    first = checker.reach(checked, low.ravel().copy(), high.ravel().copy())
    arrays = module.arrays(found)
    reached, rest = checker._with_lemmas(checked, first, arrays | {"parent": np.zeros(1, np.int32)})
    assert list(rest) == ["parent"]
    for (z_low, z_high), r in zip(relus, (r for r in reached if r.lines), strict=True):
        np.testing.assert_allclose(r.low, z_low.ravel(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(r.high, z_high.ravel(), rtol=0, atol=1e-9)
    return checked, first, arrays


@pytest.mark.parametrize("name", EPS)
def test_the_checker_finds_the_same_bounds(name, tmp_path):
    _, first, arrays = agreement(lemmas, name, 0, tmp_path)
    assert len(arrays["lemma_side"]) > 3 and len(first)


FAULTS = {
    "a lemma about nothing": changed("lemma_side", 0, 0),
    "a lemma about no ReLU": changed("lemma_side", 0, 100_000),
    "a unit of its own layer": changed("lemma_units", 0, 60),
    "a slope above 1": changed("lemma_values", -1, 1.5),
    "a slope that is no number": changed("lemma_values", -1, np.nan),
    "a sign without a split": changed("lemma_signs", 0, 1),
    "nodes that are not a tree": changed("lemma_parent", 0, 0),
    "a size below 0": changed("lemma_sizes", (0, 0), -1),
    "a size too large": changed("lemma_sizes", (0, 1), 1 << 30),
    "numbers left over": replaced("lemma_values", by=lambda v: np.append(v, v[:1])),
    "integers that are none": replaced("lemma_units", by=lambda v: v.astype(float)),
    "no sizes": lambda arrays: arrays.pop("lemma_sizes"),
}


@pytest.fixture(scope="module")
def proved(tmp_path_factory):
    return agreement(lemmas, "mlp", 0, tmp_path_factory.mktemp("net"))


@pytest.mark.parametrize("fault", FAULTS)
def test_lemmas_with_a_fault_are_refused(fault, proved):
    checked, first, arrays = proved
    wrong = {name: value.copy() for name, value in arrays.items()}
    FAULTS[fault](wrong)
    with pytest.raises(CertificateError):
        checker._with_lemmas(checked, first, wrong)


def test_other_slopes_are_another_true_bound(proved, rng):
    checked, first, arrays = proved
    values = arrays["lemma_values"]
    wrong = arrays | {"lemma_values": np.where(arrays["lemma_signs"] == 0, rng.random(len(values)), values)}
    reached, _ = checker._with_lemmas(
        checked, first, wrong | {"lemma_values": wrong["lemma_values"].astype(np.float32)}
    )
    x = rng.uniform(first[0].low, first[0].high, (2000, len(first[0].low)))
    for m, r in zip(checked.maps, reached, strict=True):
        if m.relu:
            assert (x >= r.low).all() and (x <= r.high).all()
            x = np.maximum(x, 0)
        x = (m.weight @ x.T).T + m.bias


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_proves_with_lemmas(decide, monkeypatch, tmp_path):  # noqa: F811
    """A case that bounds leave open is decided with them, and the checker needs them to prove it."""
    monkeypatch.setattr(instances, "MANY", 0)
    monkeypatch.setattr(instances, "QUICK", 0.0)
    monkeypatch.setattr(instances.split, "suits", lambda *args: False)
    worse = 0
    for seed in range(6):
        draw, sizes = np.random.default_rng(seed), (4, 8, 6, 2)
        weights = [draw.normal(size=pair) for pair in pairwise(sizes)]
        model = network(sizes, weights, [draw.normal(0, 0.3, n) for n in sizes[1:]])
        least = Chain(model).forward(draw.uniform(-1, 1, (20_000, 1, 1, 4)))[0][:, 0].min().round(3) - 0.5
        found = decide(model, head(4, 2) + box([-1] * 4, [1] * 4) + f"(assert (<= Y_0 {least:.3f}))")
        proof = {name.partition("/")[2]: value for name, value in found.proof.items()}
        if found.verdict != "unsat" or "lemma_side" not in proof:
            continue
        ask = read_network(tmp_path / "net.safetensors"), -np.ones(4), np.ones(4), [[1.0, 0]], [-least]
        assert checker.check_case(*ask, proof, 0).bound > 0
        without = {name: value for name, value in proof.items() if not name.startswith("lemma_")}
        try:
            worse += not checker.check_case(*ask, without, 0).bound > 0
        except CertificateError:
            worse += 1
    assert worse
