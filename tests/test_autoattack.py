"""The cascade: order, settings, what each stage sees, that it is the union of its attacks; and what reports make of it.

That the official code finds the same robust accuracy is tested in test_pyautoattack.py.
"""

from itertools import pairwise

import numpy as np
import pytest

from nanomr import models
from nanomr.attacks import apgd, apgd_targeted, pgd, square
from nanomr.attacks import report as reporting
from nanomr.attacks.autoattack import ROBUST, STAGES, WRONG, Stage, autoattack, cascade, quick
from nanomr.errors import UserError

SHAPE = (8, 8, 3)
N = 24


def network(classes=10, dtype=np.float64):
    """A small network whose decisions change within small balls.

    In float64: a BLAS may round differently for another number of rows, which float32 attacks would magnify.
    """
    return models.mlp((192, 16, classes), seed=0, input_shape=SHAPE).astype(dtype)


def images(n=N, dtype=np.float64):
    return np.random.default_rng(0).random((n, *SHAPE), np.float32).astype(dtype)


def own(model, x):
    return model.forward(x)[0].argmax(1)


def same(a, b):
    return np.allclose(a, b, rtol=0, atol=1e-9)


@pytest.fixture
def task():
    """(model, x, labels): the labels are what the model says, but for two."""
    model = network()
    x = images()
    model.children["fc2"].params["bias"] -= model.forward(x)[0].mean(0)
    labels = own(model, x)
    labels[:2] = (labels[:2] + 1) % 10
    return model, x, labels


def tiny(version):
    """The stages with budgets small enough that each leaves work for the next."""
    small = {"steps": 3, "restarts": 2, "queries": 20, "targets": 2}
    return tuple(Stage(s.name, s.attack, {k: small.get(k, v) for k, v in s.options.items()}) for s in STAGES[version])


EPS = {"linf": 0.008, "l2": 0.06}
both_norms = pytest.mark.parametrize("norm", EPS)
versions = pytest.mark.parametrize("version", ["standard", "plus"])


# --- order and settings -----------------------------------------------------------------------------------------------


def test_order_and_settings_are_the_papers():
    """Croce & Hein (2020), and what the authors' code runs under these names."""
    once = {"apgd-t": dict(steps=100, targets=9), "fab-t": dict(steps=100, targets=9), "square": dict(queries=5000)}
    ce, dlr = dict(loss="ce", steps=100), dict(loss="dlr", steps=100)
    standard = {"apgd-ce": {**ce, "restarts": 1}, **{k: once[k] for k in ("apgd-t", "fab-t", "square")}}
    plus = {
        "apgd-ce": {**ce, "restarts": 5}, "apgd-dlr": {**dlr, "restarts": 5}, "fab": dict(steps=100, restarts=5),
        **{k: once[k] for k in ("square", "apgd-t", "fab-t")},
    }  # fmt: skip
    for version, expected in (("standard", standard), ("plus", plus), ("pgd", {"pgd": dict(steps=20, restarts=10)})):
        assert [(s.name, s.options) for s in STAGES[version]] == list(expected.items())
    functions = {s.name: s.attack.__name__ for version in ("standard", "plus") for s in STAGES[version]}
    names = dict.fromkeys(("apgd-ce", "apgd-dlr"), "apgd") | {"apgd-t": "apgd_targeted", "fab-t": "fab_targeted"}
    assert functions == names | {"fab": "fab", "square": "square"}


def test_quick_takes_a_tenth_of_the_budgets_and_nothing_else():
    assert [s.options for s in quick(STAGES["plus"])] == [
        dict(loss="ce", steps=10, restarts=1), dict(loss="dlr", steps=10, restarts=1), dict(steps=10, restarts=1),
        dict(queries=500), dict(steps=10, targets=9), dict(steps=10, targets=9),
    ]  # fmt: skip
    assert quick(STAGES["pgd"])[0].options == dict(steps=2, restarts=1)
    assert quick([Stage("a", None, {"steps": 3})])[0].options == {"steps": 1}


# --- the cascade ------------------------------------------------------------------------------------------------------


@both_norms
@versions
def test_the_cascade_is_the_union_of_its_attacks_and_the_first_gets_the_credit(task, norm, version):
    model, x, labels = task
    stages, eps = tiny(version), EPS[norm]
    found = cascade(model, x, labels, eps, stages, norm=norm, seed=3)
    union, first = own(model, x) != labels, np.where(own(model, x) != labels, WRONG, ROBUST)
    images = x.copy()
    for k, stage in enumerate(stages):
        adversarial, fooled = stage.attack(model, x, labels, eps, norm=norm, seed=3, **stage.options)
        new = fooled & ~union
        images[new], first[new] = adversarial[new], k + 1
        union |= fooled
    assert np.array_equal(found.by, first) and np.array_equal(found.fooled, union)
    assert same(found.adversarial, images)
    assert len(set(first)) > 3 and 2 < union.sum() < N  # else there is little to compare


@both_norms
@versions
def test_individual_mode_finds_the_same_and_what_each_attack_breaks_alone(task, norm, version):
    model, x, labels = task
    stages, eps = tiny(version), EPS[norm]
    found = cascade(model, x, labels, eps, stages, norm=norm, individual=True)
    plain = cascade(model, x, labels, eps, stages, norm=norm)
    assert np.array_equal(found.by, plain.by) and same(found.adversarial, plain.adversarial)
    assert plain.alone is None and found.alone.shape == (N, len(stages))
    wrong = own(model, x) != labels
    assert not found.alone[wrong].any()
    for k, stage in enumerate(stages):
        _, fooled = stage.attack(model, x, labels, eps, norm=norm, **stage.options)
        assert np.array_equal(found.alone[:, k] | wrong, fooled)
    assert found.alone.sum() > (found.by > 0).sum()  # some images fall to several


def test_accuracy_falls_with_every_stage_and_adds_up(task):
    model, x, labels = task
    found = cascade(model, x, labels, EPS["linf"], tiny("plus"))
    after = found.robust_after()
    assert after == sorted(after, reverse=True) and after[0] == N - 2 and after[-1] == (~found.fooled).sum()
    assert [a - b for a, b in pairwise(after)] == [(found.by == k + 1).sum() for k in range(6)]
    assert len(found.seconds) == 6 and all(s >= 0 for s in found.seconds) and found.refuted == [0] * 6


@both_norms
def test_neither_batch_size_nor_company_decides(task, norm):
    model, x, labels = task
    stages = tiny("plus")
    whole = cascade(model, x, labels, EPS[norm], stages, norm=norm, seed=1)
    for batch_size in (1, 5):
        other = cascade(model, x, labels, EPS[norm], stages, norm=norm, seed=1, batch_size=batch_size)
        assert np.array_equal(other.by, whole.by) and same(other.adversarial, whole.adversarial)
    some = np.array([17, 3, 20, 8, 9])
    part = cascade(model, x[some], labels[some], EPS[norm], stages, norm=norm, seed=1, ids=some)
    assert np.array_equal(part.by, whole.by[some]) and same(part.adversarial, whole.adversarial[some])
    assert 3 < whole.fooled.sum() < N


@both_norms
def test_what_is_returned_fools_within_ball_and_box(task, norm):
    model, x, labels = task
    before, weights, gradients = x.copy(), model.weights.copy(), model.gradients.copy()
    found = cascade(model, x, labels, EPS[norm], tiny("standard"), norm=norm)
    assert np.array_equal(own(model, found.adversarial) != labels, found.fooled)
    change = (found.adversarial.astype(float) - x).reshape(N, -1)
    length = abs(change).max(1) if norm == "linf" else np.sqrt((change**2).sum(1))
    assert length.max() <= EPS[norm] * (1 + 1e-6) + 1e-7 and length.max() > 0.5 * EPS[norm]
    assert found.adversarial.min() >= 0 and found.adversarial.max() <= 1
    assert not change[found.by < 1].any()
    assert np.array_equal(x, before) and np.array_equal(model.weights, weights)
    assert np.array_equal(model.gradients, gradients)


class Recorder:
    """A stage that breaks what it is told to, by turning images into ``poison``, and notes whom it sees."""

    def __init__(self, breaks, poison):
        self.breaks, self.poison, self.seen, self.given = breaks, poison, None, None

    def __call__(self, model, x, labels, eps, *, ids, progress=None, **options):
        self.seen, self.given = ids.tolist(), options
        fooled = np.isin(ids, self.breaks)
        found = x.copy()
        found[fooled] = self.poison(x[fooled])
        if progress:
            progress(len(x), int((~fooled).sum()))
        return found, fooled


@pytest.fixture
def grey():
    """A model that says class 1 for images brighter than 0.5 on average, else 0; and five images of class 0."""
    model = models.mlp((192, 2), input_shape=SHAPE)
    model.children["fc1"].params["weight"][...] = [0, 1 / 192]
    model.children["fc1"].params["bias"][...] = [0, -0.5]
    x = np.full((5, *SHAPE), 0.45, np.float32)
    assert np.array_equal(own(model, x), [0] * 5) and np.array_equal(own(model, x + np.float32(0.1)), [1] * 5)
    return model, x, np.zeros(5, int)


def brighter(x):
    return x + np.float32(0.1)


@pytest.mark.parametrize("individual", [False, True])
def test_a_stage_sees_the_survivors_only_and_its_settings(grey, individual):
    model, x, labels = grey
    labels[4] = 1  # wrong to begin with
    a, b, c = Recorder([11, 13], brighter), Recorder([], brighter), Recorder([11, 12], brighter)
    stages = [Stage("a", a, {"steps": 7}), Stage("b", b), Stage("c", c)]
    calls = []
    found = cascade(
        model, x, labels, 0.2, stages, ids=np.arange(10, 15), seed=9, batch_size=3,
        individual=individual, progress=lambda *call: calls.append(call),
    )  # fmt: skip
    right = [10, 11, 12, 13]
    assert a.seen == right and b.seen == c.seen == (right if individual else [10, 12])
    assert a.given == dict(norm="linf", seed=9, batch_size=3, steps=7)
    assert found.by.tolist() == [ROBUST, 1, 3, 1, WRONG] and found.stages == ("a", "b", "c")
    assert found.robust_after() == [4, 2, 2, 1]
    if individual:
        assert found.alone.astype(int).tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
        assert [call[:3] for call in calls] == [("a", 4, 4), ("b", 4, 4), ("c", 4, 4)]
    else:
        assert calls == [("a", 4, 4, 2), ("b", 2, 2, 2), ("c", 2, 2, 1)]


@pytest.mark.parametrize(
    "poison", [lambda x: x + np.float32(0.3), lambda x: x + np.float32(0.01), lambda x: x * np.float32("nan")],
    ids=["outside the ball", "not misclassified", "nan"],
)  # fmt: skip
def test_a_false_claim_is_refuted_and_later_stages_go_on(grey, poison):
    model, x, labels = grey
    liar, honest = Recorder([0, 2], poison), Recorder([2], brighter)
    with np.errstate(invalid="ignore"):
        found = cascade(model, x, labels, 0.2, [Stage("liar", liar), Stage("honest", honest)])
    assert honest.seen == [0, 1, 2, 3, 4]
    assert found.by.tolist() == [ROBUST, ROBUST, 2, ROBUST, ROBUST] and found.refuted == [2, 0]
    assert np.array_equal(found.adversarial[[0, 1, 3, 4]], x[[0, 1, 3, 4]])


def test_no_stage_runs_when_no_image_is_left(grey):
    model, x, labels = grey
    all_of_them, never = Recorder(range(5), brighter), Recorder([], brighter)
    found = cascade(model, x, labels, 0.2, [Stage("a", all_of_them), Stage("b", never)])
    assert never.seen is None and found.robust_after() == [5, 0, 0]
    empty = cascade(model, x[:0], labels[:0], 0.2, [Stage("a", all_of_them)])
    assert len(empty.by) == 0 and empty.robust_after() == [0, 0]


def test_eps_zero_is_the_clean_accuracy(task):
    model, x, labels = task
    found = cascade(model, x, labels, 0.0, tiny("standard"))
    assert np.array_equal(found.adversarial, x) and found.robust_after() == [N - 2] * 5


@versions
def test_autoattack_is_the_cascade(task, version, monkeypatch):
    model, x, labels = task
    monkeypatch.setitem(STAGES, version, tiny(version))
    adversarial, fooled = autoattack(model, x, labels, 0.008, version=version, seed=5, batch_size=9)
    found = cascade(model, x, labels, 0.008, tiny(version), seed=5)
    assert same(adversarial, found.adversarial) and np.array_equal(fooled, found.fooled)
    assert fooled.dtype == bool


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(eps=-1), "eps"), (dict(eps=float("nan")), "eps"), (dict(norm="l1"), "norm"),
        (dict(x=images() + 1), r"\[0, 1\]"), (dict(labels=np.full(N, 10)), "10"), (dict(labels=np.full(N, -1)), ">= 0"),
        (dict(labels=np.zeros(3, int)), "labels"), (dict(version="rand"), "version"),
        (dict(ids=np.arange(3)), "ids"),
    ],
)  # fmt: skip
def test_odd_input_is_one_clear_line(task, change, words):
    model, x, labels = task
    arguments = dict(x=x, labels=labels, eps=0.1) | change
    with pytest.raises(ValueError, match=words) as raised:
        autoattack(model, **arguments)
    assert "\n" not in str(raised.value)


@versions
@pytest.mark.parametrize(
    ("classes", "missing"), [(2, {"apgd-t", "apgd-dlr"}), (3, {"apgd-t"}), (4, set())], ids=["2", "3", "4"]
)
def test_with_few_classes_the_stages_that_exist_run_and_the_others_are_named(version, classes, missing):
    model, x = network(classes), images()
    model.children["fc2"].params["bias"] -= model.forward(x)[0].mean(0)
    found = cascade(model, x, own(model, x), 0.004, tiny(version))
    names = [s.name for s in STAGES[version]]
    assert set(found.left_out) == missing & set(names)
    assert list(found.stages) == [name for name in names if name not in missing]
    assert 0 < found.fooled.sum() < N and len(found.seconds) == len(found.refuted) == len(found.stages)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (Stage("apgd", pgd, {"restarts": 0}), "restarts must be at least 1, not 0"),
        (Stage("apgd-t", apgd_targeted, {"steps": -1}), "steps must be at least 0, not -1"),
        (Stage("apgd", apgd, {"loss": "hinge"}), "loss must be one of ce, dlr, not 'hinge'"),
        (Stage("square", square, {"queries": 2.5}), "queries must be a whole number, not 2.5"),
    ],
)  # fmt: skip
def test_what_a_late_stage_refuses_is_refused_before_the_first_one(task, last, words):
    model, x, labels = task
    first = Recorder([], brighter)
    with pytest.raises(ValueError, match=words):
        cascade(model, x, labels, 0.1, [Stage("first", first), last])
    oblong = models.mlp((96, 10), input_shape=(8, 4, 3)).astype(np.float64)
    with pytest.raises(ValueError, match="square"):
        cascade(oblong, x[:, :, :4], labels, 0.1, [Stage("first", first), STAGES["plus"][3]])
    two = network(2)
    with pytest.raises(ValueError, match="apgd-t: no stage works with the model's 2 classes"):
        cascade(two, x, own(two, x), 0.1, [STAGES["plus"][4]])
    assert first.seen is None


def test_a_report_names_the_stages_that_were_left_out():
    few = dict(settings=[{"name": "apgd-ce"}, {"name": "square"}], left_out=["apgd-t", "apgd-dlr"], classes=2)
    found = report(spread(1, 2, 0, robust=3), **few)
    assert "  left out, since the network knows 2 classes: apgd-t, apgd-dlr" in reporting.lines(found)
    assert "without apgd-t, apgd-dlr" in reporting.tables([found])
    assert not any("left out" in line for line in reporting.lines(report([1])))


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (369, 1000, 0.33965, 0.39936), (0, 0, 0, 1)],
)
def test_wilson_intervals(count, n, low, high):
    assert reporting.wilson(count, n) == pytest.approx((low, high), abs=5e-5)


def config(attack="autoattack+", **changes):
    version = {"autoattack": "standard", "autoattack+": "plus"}.get(attack, "pgd")
    return {
        "attack": attack, "norm": "linf", "eps": 8 / 255, "individual": False, "quick": False, "seed": 0,
        "weights": {"file": "m", "sha256": "ab", "architecture": {"name": "small_cnn"}},
        "data": {"name": "cifar10", "source": {"verified": True}},
        "settings": [{"name": s.name, **s.options} for s in STAGES[version]],
    } | changes  # fmt: skip


def report(by=(), attack="autoattack+", found=None, alone=None, radius=None, refuted=None, **changes):
    settings = config(attack, **changes)
    zeros = [0.0] * len(settings["settings"])
    return reporting.assemble(
        settings, np.array(by, int), zeros, refuted or zeros, found or {}, alone=alone, radius=radius
    )


def spread(wrong, *broken, robust):
    """``by`` with so many of each."""
    return [WRONG] * wrong + [k + 1 for k, count in enumerate(broken) for _ in range(count)] + [ROBUST] * robust


def test_a_report_adds_up():
    found = report(spread(10, 20, 3, 2, 1, 4, 0, robust=60))
    assert found["images"] == 100 and found["clean"] == 0.9 and found["robust"] == 0.6
    assert [row["attack"] for row in found["after"]] == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert [row["broken"] for row in found["after"]] == [20, 3, 2, 1, 4, 0]
    assert [row["attacked"] for row in found["after"]] == [90, 70, 67, 65, 64, 60]
    assert [row["robust"] for row in found["after"]] == [0.7, 0.67, 0.65, 0.64, 0.6, 0.6]
    assert found["after"][-1]["interval"] == found["interval"] == reporting.wilson(60, 100)
    text = "\n".join(reporting.lines(found))
    assert "90.00%" in text and "67.00%" in text and "linf, eps 8/255" in text
    alone = np.zeros((100, 6), bool)
    alone[10:40, 0] = alone[10:20, 1] = True
    found = report(spread(10, 30, 0, 0, 0, 0, 0, robust=60), alone=alone)
    assert found["alone"]["apgd-ce"] == 0.6 and found["alone"]["apgd-dlr"] == 0.8
    assert [row["attacked"] for row in found["after"]] == [90] * 6


def test_wasserstein_radii():
    radius = [0, 0.001, 0.006, 0.09, np.inf]
    settings = dict(norm="wasserstein", eps=0.1, settings=[{"name": "wasserstein"}])
    found = report([WRONG, 1, 1, 1, ROBUST], "wasserstein", radius=radius, **settings)
    assert found["robust_at"] == {"0.005": 0.6, "0.01": 0.4, "0.02": 0.4, "0.05": 0.4, "0.1": 0.2}
    assert "radius 0.005: 60.00%" in "\n".join(reporting.lines(found))


def test_a_sound_evaluation_has_no_warning():
    assert report(spread(300, 300, 40, 5, 2, 3, 0, robust=350))["warnings"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(by=spread(0, 10, 40, 0, 0, 20, 0, robust=930)), "APGD with cross-entropy leaves 6.0%"),
        (dict(by=spread(0, 10, 40, 0, 3, 0, 0, robust=947)), "Square, which needs no gradient, broke 0.3%"),
        (dict(found=dict(zero_gradients=4)), "cross-entropy's input gradient is exactly zero at 4"),
        (dict(found=dict(zero_dlr_gradients=4)), "ratio's input gradient is exactly zero at 4"),
        (dict(found=dict(lost_gradients=4)), "NaN or infinite at 4 images"),
        (dict(found=dict(unbounded=0.2)), "eps = 1 is 20.0%"),
        (dict(found=dict(noise_broke=2)), "random corners of the ball break 2"),
        (dict(found=dict(alone=1, alone_images=4)), "1 of 4 images end differently"),
        (dict(found=dict(logits_move=0.01)), "differ by 1.0e-02"),
        (dict(found=dict(probabilities=True)), "probabilities"),
        (dict(refuted=[0, 0, 1, 0, 0, 0]), "did not confirm: 1;"),
        (dict(quick=True), "--quick"),
    ],
)
def test_each_warning_is_one_line(arguments, words):
    warnings = report(**{"by": spread(0, 1, 0, 0, 0, 0, 0, robust=999), **arguments})["warnings"]
    assert len(warnings) == 1 and words in warnings[0] and "\n" not in warnings[0]
    assert any(words in line for line in reporting.lines(report(**{"by": [], **arguments}))) or "by" in arguments


def test_the_gap_compares_the_attacks_alone_where_they_ran_alone():
    alone = np.zeros((100, 4), bool)
    alone[:20, 0], alone[14:40, 1] = True, True  # 80 % and 74 % by themselves
    by = np.where(alone[:, 0], 1, np.where(alone[:, 1], 2, ROBUST))
    assert reporting.dlr_gap(report(by, "autoattack", alone=alone)) == pytest.approx(0.06)
    assert reporting.dlr_gap(report(by, "autoattack")) == pytest.approx(0.20)
    assert reporting.dlr_gap(report([ROBUST], "pgd")) is None


# --- the checks, on networks that deserve them ------------------------------------------------------------------------


class Bent:
    """A model whose logits go through ``bend(logits)``, and its gradient through ``times``."""

    def __init__(self, model, bend, times=1.0):
        self.model, self.bend, self.times = model, bend, times
        self.dtype, self.input_shape = model.dtype, model.input_shape

    def forward(self, x, **options):
        logits, cache = self.model.forward(x, **options)
        return self.bend(logits), cache

    def backward(self, dy, cache, **options):
        return self.model.backward(dy * self.times, cache, **options)


def measured(model, x, labels, eps=0.008, norm="linf", stage=None):
    stage = stage or tiny("plus")[0]
    by = cascade(model, x, labels, eps, [stage], norm=norm).by
    return reporting.checks(model, x, labels, np.arange(len(x)), by, norm=norm, eps=eps, stage=stage, seed=0, steps=20)


@both_norms
def test_checks_find_nothing_wrong_with_an_honest_network(task, norm):
    found = measured(*task, eps=EPS[norm], norm=norm)
    assert found["zero_gradients"] == found["zero_dlr_gradients"] == found["alone"] == found["noise_broke"] == 0
    assert found["unbounded"] == 0 and found["logits_move"] < 1e-5 and not found["probabilities"]
    assert found["alone_images"] == 4 and found["images"] == N
    assert 0.2 < found["noise"] <= 22 / N


def test_saturated_logits_have_zero_gradients_of_the_cross_entropy_only(task):
    model, x, labels = task
    found = measured(Bent(model, lambda z: z * 1e6, 1e6), x, labels)
    assert found["zero_gradients"] > N / 2 and found["zero_dlr_gradients"] == 0


def test_gradients_that_are_nan_are_counted(task):
    found = measured(Bent(task[0], lambda z: z, np.nan), *task[1:])
    assert found["lost_gradients"] == N - 2 and found["zero_gradients"] == 0


def test_a_constant_network_cannot_be_broken_at_eps_1(task):
    model, x, _ = task
    model.weights[...] = 0
    found = measured(model, x, own(model, x))
    assert found["unbounded"] == 1 and found["zero_dlr_gradients"] == N


def test_probabilities_are_recognised(task):
    model, x, labels = task
    found = measured(Bent(model, lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)), x, labels)
    assert found["probabilities"]


def test_a_network_that_looks_at_the_batch_is_found_out(task):
    model, x, labels = task
    found = measured(Bent(model, lambda z: z - z.mean(0)), x, labels)  # alone, all logits are 0
    assert found["logits_move"] > 0.1 and found["alone"] > 0


@both_norms
def test_noise_that_breaks_survivors_is_counted(task, norm):
    model, x, labels = task

    def idle(model, x, labels, eps, **options):
        return x, own(model, x) != labels

    found = measured(model, x, labels, eps={"linf": 0.5, "l2": 7.0}[norm], norm=norm, stage=Stage("idle", idle))
    assert found["noise_broke"] > N / 2 and found["noise"] < 0.3
    assert measured(model, x, labels, eps=1e-6, norm=norm, stage=Stage("idle", idle))["noise"] == 22 / N


# --- tables -----------------------------------------------------------------------------------------------------------


def row(text, name):
    return next(line for line in text.splitlines() if line.strip().startswith(name)).split(name)[1].split()


def test_table_1_has_the_papers_row_of_the_same_network():
    pgd = report(spread(500, 300, robust=200), "pgd")
    text = reporting.tables([pgd])
    assert "Table 1" in text and "Table 2" not in text
    low, high = (f"{100 * v:.1f}" for v in pgd["interval"])
    assert row(text, "this network (small_cnn)") == ["20.00", "50.00"]
    assert f"95 % interval [{low}, {high}]" in text
    assert row(text, "paper: Manifold Regularization (small)") == ["25.56", "36.66"] and "40.54" not in text
    large = {"file": "m", "sha256": "ab", "architecture": {"name": "preact_resnet18"}}
    text = reporting.tables([report(spread(5, 3, robust=2), "pgd", weights=large)])
    assert row(text, "paper: Manifold Regularization (large)") == ["40.54", "69.95"] and "25.56" not in text
    assert "not comparable" not in text


def test_table_2_gathers_its_columns_and_the_stronger_attack_wins():
    wasserstein = dict(norm="wasserstein", eps=0.1, settings=[{"name": "wasserstein"}])
    reports = [
        report(spread(50, 10, 0, 0, 0, 0, 0, robust=40), "autoattack+"),
        report(spread(50, 8, 0, 0, 0, robust=42), "autoattack"),
        report(spread(50, 10, 10, 0, 0, 0, 0, robust=30), "autoattack+", norm="l2", eps=0.5),
        report(spread(50, 30, robust=20), "wasserstein", **wasserstein),
    ]
    text = reporting.tables(reports)
    cells = row(text, "this network (small_cnn)")
    assert cells == ["30.00", "40.00", "20.00", "50.00"]
    assert row(text, "paper: Manifold Regularization (large)") == ["57.53", "36.90", "66.02", "69.95"]
    assert "AutoAttack+" not in text and "Table 1" not in text
    text = reporting.tables(reports[1:2])
    assert "the paper's is AutoAttack+" in text
    assert row(text, "this network (small_cnn)")[0] == "-"


def test_what_cannot_be_compared_is_said():
    text = reporting.tables([report([ROBUST], "pgd", eps=0.1, quick=True)])
    assert "the paper's is 8/255: not comparable" in text and "--quick: not comparable" in text
    assert "1 warning in its report" in text
    assert "shapes10" in (text := reporting.tables([report([1], "pgd", data={"name": "shapes10", "source": {}})]))
    assert "rows are of cifar10: not comparable" in text
    text = reporting.tables([report([1], "pgd", data={"name": "cifar10", "source": {"verified": False}})])
    assert "not the published CIFAR-10" in text


def test_reports_of_two_networks_make_no_row():
    other = report([1], weights={"file": "m", "sha256": "cd", "architecture": {"name": "small_cnn"}})
    with pytest.raises(UserError, match="several networks"):
        reporting.tables([report([1]), other])
    with pytest.raises(UserError, match="several data sets"):
        reporting.tables([report([1]), report([1], data={"name": "shapes10", "source": {}})])
    with pytest.raises(UserError, match="no report"):
        reporting.tables([report([1], "pgd", norm="l2")])
