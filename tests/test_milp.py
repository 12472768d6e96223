"""The exact verifier against brute force: every ReLU pattern of a tiny network, one linear program each."""

import itertools
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import highspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr.layers import Conv2d, Flatten, Linear, Normalize, ReLU
from nanomr.models import Model, mlp
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds import crown
from nanomr.verify.chain import Chain
from nanomr.verify.exact import bab, milp
from nanomr.verify.exact.collapsed import collapse

# --- tiny networks ----------------------------------------------------------------------------------------------------


def tiny_conv(channels, padding, hidden, seed):
    """3 x 3 images, one or two convolutions whose padding matters, and a linear layer."""
    c1, c2 = channels
    layers = {"normalize": Normalize((0.4,), (0.5,)), "conv1": Conv2d(1, c1, 2, 2, padding), "relu1": ReLU()}
    if c2:
        layers |= {"conv2": Conv2d(c1, c2, 2, 1, padding), "relu2": ReLU()}
    x = np.zeros((1, 3, 3, 1), np.float32)
    for layer in layers.values():
        x = layer.forward(x)[0]
    layers |= {"flatten": Flatten(), "fc1": Linear(x.size, hidden), "relu3": ReLU(), "fc2": Linear(hidden, 3)}
    return Model(layers, {}, (3, 3, 1), seed)


@st.composite
def networks(draw):
    """(model, generator): at most 8 ReLUs, weights of both signs, biases that matter."""
    seed = draw(seeds)
    if draw(st.booleans()):
        hidden = draw(st.sampled_from([(), (1,), (4,), (3, 3), (2, 3, 2), (4, 4)]))
        side, channels = draw(st.sampled_from([(1, 3), (2, 1), (1, 1)]))
        shape = (side, side, channels)
        model = mlp((side * side * channels, *hidden, 3), seed % 1000, shape, (0.5,) * channels, (0.3,) * channels)
    else:
        channels, padding = draw(st.sampled_from([((1, 0), (1, 0, 1, 0)), ((1, 1), (1, 0, 1, 0)), ((1, 0), 0)]))
        model = tiny_conv(channels, padding, 2, seed % 1000)
    model.astype(np.float64)
    generator = np.random.default_rng(seed)
    model.weights *= 3
    model.weights += generator.normal(0, 0.2, model.weights.shape)
    return model, generator


def box_of(model, generator, eps):
    """A box (1, H, W, C) around an image: some pixels fixed, some at the edge of [0, 1]."""
    x = generator.random((1, *model.input_shape))
    width = eps * generator.choice([0, 0.5, 1], x.shape, p=[0.15, 0.25, 0.6])
    return np.clip(x - width, 0, 1), np.clip(x + width, 0, 1)


class Network:
    """A drawn network, with box, bounds, label and rival, and its margin in the box found by brute force."""

    def __init__(self, network, eps, kind="crown"):
        model, self.draw = network
        self.chain = Chain(model)
        self.low, self.high = box_of(model, self.draw, eps)
        self.relus = crown.crown(self.chain, self.low, self.high)
        if kind == "loose":  # also where the box itself is far inside of its bounds
            self.relus = [(low - self.draw.random(low.shape), high + self.draw.random(high.shape))
                          for low, high in self.relus]  # fmt: skip
        self.label, self.rival = self.draw.permutation(self.chain.classes)[:2]

    @property
    def question(self):
        return self.chain, self.low, self.high, self.relus, self.row

    @property
    def row(self):
        return crown.margin_rows([self.label], [self.rival], self.chain.classes)[0]

    def margin(self, image):
        logits = self.chain.forward(image.reshape(1, *self.chain.input_shape))[0][0]
        return logits[self.label] - logits[self.rival]

    def exact(self):
        """The least margin: the smallest over all ReLU patterns of an LP over the pixels."""
        maps = [dense(stage) for stage in self.chain.stages]
        sizes = [len(b) for _, b in maps[:-1]]
        low, high = self.low.ravel(), self.high.ravel()
        best = np.inf
        for pattern in itertools.product([0, 1], repeat=sum(sizes)):
            a, b, rows, limits, left = np.eye(low.size), np.zeros(low.size), [], [], list(pattern)
            for k, (weight, bias) in enumerate(maps):
                a, b = weight @ a, weight @ b + bias
                if k < len(sizes):
                    on = np.array(left[: sizes[k]])
                    left = left[sizes[k] :]
                    rows.append(np.where(on, -1, 1)[:, None] * a)  # rows . x <= limits: z >= 0 where on, else <= 0
                    limits.append(np.where(on, 1, -1) * b)
                    a, b = on[:, None] * a, on * b
            c = a[self.label] - a[self.rival]
            rows = np.concatenate([*rows, np.zeros((0, low.size))])
            limits = np.concatenate([*limits, []])
            value = linear_program(c, rows, limits, low, high)
            best = min(best, value + b[self.label] - b[self.rival])
        return best


def dense(stage):
    """(matrix, bias) of a stage, from its forward pass alone."""
    size = int(np.prod(stage.in_shape))
    columns = stage.apply(np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *stage.in_shape))
    columns = columns.reshape(size + 1, -1)
    return (columns[1:] - columns[0]).T, columns[0]


def linear_program(c, rows, limits, low, high):
    """min c . x over rows . x <= limits and the box; inf if there is no such x."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(c), len(rows)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = c, low, high
    lp.row_lower_, lp.row_upper_ = np.full(len(rows), -np.inf), limits
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.arange(len(rows) + 1, dtype=np.int32) * len(c)
    lp.a_matrix_.index_ = np.tile(np.arange(len(c), dtype=np.int32), len(rows))
    lp.a_matrix_.value_ = np.ascontiguousarray(rows).ravel()
    highs = highspy.Highs()
    for name, value in {"output_flag": False, "threads": 1, "primal_feasibility_tolerance": 1e-10}.items():
        highs.setOptionValue(name, value)
    highs.passModel(lp)
    highs.run()
    status = highs.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return np.inf
    assert status == highspy.HighsModelStatus.kOptimal, status
    return highs.getObjectiveValue()


def without_restriction(monkeypatch):
    """HiGHS is asked at once, with the bounds as they are."""

    def root(chain, low, high, relus, *_, **__):
        ends = collapse(chain, low, high, relus, np.zeros(chain.classes)).ends(relus)
        return bab.Tree("timeout", None, -np.inf, None, 1, 0.0, ends)

    monkeypatch.setattr(milp, "branch_and_bound", root)


def built(case, threshold, relus=None):
    """The program of a case, perhaps with other bounds."""
    relus = case.relus if relus is None else relus
    row = case.row
    net = collapse(case.chain, case.low, case.high, relus, row)
    return milp.build(net, *net.ends(relus), threshold)


eps_values = st.sampled_from([0.0, 0.03, 0.2, 0.5])
kinds = st.sampled_from(["crown", "loose"])

# --- against brute force ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restricted", [True, False])
@given(network=networks(), eps=eps_values, kind=kinds, distance=st.sampled_from([2e-6, 1e-3, 0.3]))
def test_infeasible_if_and_only_if_the_least_margin_is_above_the_threshold(restricted, network, eps, kind, distance):
    case = Network(network, eps, kind)
    exact = case.exact()
    with pytest.MonkeyPatch.context() as patch:
        if not restricted:
            without_restriction(patch)
        below = milp.decide(*case.question, threshold=exact - distance)
        above = milp.decide(*case.question, threshold=exact + distance)
    assert below.status == "infeasible" and below.image is None and below.bound == exact - distance, below
    assert above.status == "candidate", above
    assert above.image.shape == case.chain.input_shape and above.image.dtype == np.float64
    assert np.all(above.image >= case.low[0]) and np.all(above.image <= case.high[0])
    assert case.margin(above.image) <= exact + distance + 1e-6
    assert not above.bound > exact + 1e-6  # or nan


def test_what_the_root_makes_stable_keeps_its_sign(monkeypatch):
    """The root's bounds hold at images with margin <= threshold. Where a ReLU has another sign than they say, the
    program knows nothing of the network: without the rows for that, images there are candidates for nothing."""
    build, answers = milp.build, {}

    def without_signs(*arguments):
        program = build(*arguments)
        stable = slice(program.binaries, len(program.row_low) - 2 * program.binaries - 1)
        program.row_low[stable], program.row_high[stable] = -np.inf, np.inf
        return program

    for name, how in {"with": build, "without": without_signs}.items():
        monkeypatch.setattr(milp, "build", how)
        for seed in (14, 16, 57, 126, 139):
            model, draw = mlp((1, 4, 3), seed, (1, 1, 1), (0.5,), (0.3,)), np.random.default_rng(seed)
            model.astype(np.float64).weights *= 3
            model.weights += draw.normal(0, 0.2, model.weights.shape)
            case = Network((model, draw), 0.5, "loose")
            answers.setdefault(name, []).append(milp.decide(*case.question, threshold=case.exact() - 1e-3).status)
    assert answers == {"with": ["infeasible"] * 5, "without": ["candidate"] * 5}


@pytest.mark.parametrize("name", ["row_low", "row_high", "cost", "value", "column_low", "column_high"])
@pytest.mark.parametrize("number", [np.nan, -1e16])
def test_a_program_that_holds_no_numbers_is_an_error(name, number, monkeypatch):
    build = milp.build

    def broken(*arguments):
        program = build(*arguments)
        getattr(program, name)[0] = number
        return program

    model, draw = mlp((1, 4, 3), 126, (1, 1, 1), (0.5,), (0.3,)), np.random.default_rng(126)
    model.astype(np.float64).weights *= 3
    case = Network((model, draw), 0.5, "loose")
    question = {"threshold": case.exact() + 1e-3}
    without_restriction(monkeypatch)
    assert milp.decide(*case.question, **question).status == "candidate"
    monkeypatch.setattr(milp, "build", broken)
    assert milp.decide(*case.question, **question).status == "error"


@given(network=networks(), eps=eps_values, kind=kinds)
def test_the_models_minimum_is_the_networks_and_its_relaxations_are_below(network, eps, kind):
    case = Network(network, eps, kind)
    exact = case.exact()
    program = built(case, 100.0)  # the cut says nothing
    best = milp.solve(program, 60, {"mip_max_improving_sols": 1000, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0})
    relaxed = milp.solve(program._replace(binaries=0), 60)
    assert best.status == relaxed.status == "candidate"
    assert case.margin(unscaled(case, best.image)) == pytest.approx(exact, abs=1e-6)
    lp = program.cost @ relaxed.image + program.offset  # ``image``: all columns, as there are no binaries
    box, lines = crown.Box.between(case.low, case.high), [crown.Lines.around(*b) for b in case.relus]
    rows = crown.margin_rows([case.label], [case.rival], case.chain.classes)
    plain = crown.lower(case.chain, box, lines, rows, [0]).value[0]
    scale = 1e-6 * (1 + abs(exact) + sum(abs(h).sum() for _, h in case.relus))  # SLACK of every big-M, and rounding
    assert plain <= lp + scale and lp <= exact + scale
    if program.binaries:
        assert best.bound == pytest.approx(exact, abs=scale)
        assert lp <= best.bound + scale
    else:
        assert lp == pytest.approx(exact, abs=scale)


def unscaled(case, t):
    return 0.5 * (case.low + case.high)[0] + 0.5 * (case.high - case.low)[0] * t.reshape(case.chain.input_shape)


# --- the model itself: every image of the box is a solution -----------------------------------------------------------


def excess(program, case, x, relus):
    """By how much image x (1, H, W, C), with all that follows from it, breaks the program's rows and bounds."""
    radius = 0.5 * (case.high - case.low).ravel()
    t = (x - 0.5 * (case.low + case.high)).ravel() / np.where(radius > 0, radius, 1)
    z = np.concatenate([[], *(v[(low < 0) & (high > 0)] for v, (low, high) in
                              zip(case.chain.forward(x)[1], relus, strict=True))])  # fmt: skip
    columns = np.concatenate([t, np.maximum(z, 0), np.maximum(-z, 0), z > 0])
    rows = np.add.reduceat(np.append(program.value * columns[program.index], 0), program.start[:-1])
    rows = np.where(np.diff(program.start) > 0, rows, 0)
    return max((program.row_low - rows).max(), (rows - program.row_high).max(),
               (program.column_low - columns).max(), (columns - program.column_high).max())  # fmt: skip


def images_of(case, count=8):
    for _ in range(count):
        share = case.draw.random(case.low.shape)
        yield case.low + (case.high - case.low) * (share if case.draw.random() < 0.5 else share.round())


@given(network=networks(), eps=eps_values, kind=kinds)
def test_every_image_of_the_box_is_a_solution_of_the_model(network, eps, kind):
    case = Network(network, eps, kind)
    for x in images_of(case):
        program = built(case, case.margin(x))
        assert excess(program, case, x, case.relus) <= 1e-12  # as SLACK, 1e-8, is far more than rounding
        objective = program.cost[: len(x.ravel())] @ ((x - 0.5 * (case.low + case.high)) / np.maximum(
            0.5 * (case.high - case.low), 1e-300)).ravel()  # fmt: skip
        if not program.binaries:
            assert objective + program.offset == pytest.approx(case.margin(x), abs=1e-7)
        too_low = built(case, case.margin(x) - 1e-6)
        assert excess(too_low, case, x, case.relus) > 5e-7


@pytest.fixture
def wide():
    """A padded convolution with unstable ReLUs in every layer, and a box wide enough that all of them switch."""
    model = tiny_conv((2, 2), (1, 0, 1, 0), 4, 1).astype(np.float64)
    generator = np.random.default_rng(1)
    model.weights[...] = generator.normal(0, 1, model.weights.shape)
    case = Network((model, generator), 0.0)
    case.low, case.high = np.zeros((1, 3, 3, 1)), np.ones((1, 3, 3, 1))
    case.relus = crown.crown(case.chain, case.low, case.high)
    return case


def worst(case, program, relus):
    return max(excess(program, case, x, relus) for x in images_of(case, 200))


def test_the_planted_bugs_have_something_to_break(wide):
    assert [int(((low < 0) & (high > 0)).sum()) for low, high in wide.relus] == [8, 8, 3]
    assert worst(wide, built(wide, 100.0), wide.relus) <= 1e-12


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("side", [0, 1])
def test_a_big_m_below_the_true_bound_would_be_seen(wide, layer, side):
    reached = np.concatenate([wide.chain.forward(x)[1][layer] for x in images_of(wide, 200)])
    true = reached.min(0) if side == 0 else reached.max(0)
    relus = [list(bounds) for bounds in wide.relus]
    relus[layer][side] = np.where(relus[layer][side] * true[None] > 0, 0.5 * true[None], relus[layer][side])
    program = built(wide, 100.0, relus)
    assert worst(wide, program, relus) > 1e-3


def test_dropped_padding_would_be_seen(wide):
    conv = wide.chain.stages[1].layers[-1]
    right = conv.padding
    program = None
    try:
        conv.padding = (0, 1, 0, 1)  # on the other side: the same shapes
        program = built(wide, 100.0)
    finally:
        conv.padding = right
    assert worst(wide, program, wide.relus) > 1e-3


def test_a_wrong_slope_would_be_seen(wide):
    """An active ReLU multiplied out as if it were off, and one that is off as if it were on."""
    relus = [(low.copy(), high.copy()) for low, high in wide.relus]
    for bounds in ((1.0, 2.0), (-2.0, -1.0)):
        relus[1][0][...], relus[1][1][...] = bounds
        program = built(wide, 100.0, relus)
        assert worst(wide, program, relus) > 1e-3


def test_wrong_bounds_that_cut_off_the_middle_of_the_box_are_an_error(wide):
    relus = [(low, high.copy()) for low, high in wide.relus]
    z = wide.chain.forward(0.5 * (wide.low + wide.high))[1][1]
    relus[1][1][0, 0, 0, 0] = z[0, 0, 0, 0] - 1e-3
    answer = milp.decide(wide.chain, wide.low, wide.high, relus, wide.row, threshold=-100.0)
    assert answer.status == "error" and "wrong" in answer.message


def test_entries_that_highs_would_drop_are_charged_to_the_row():
    """2,000 weights of 4e-10: HiGHS drops each, but together they are the only counterexample."""
    model = mlp((2000, 2), input_shape=(1, 1, 2000)).astype(np.float64)
    model.children["fc1"].params["weight"][...] = [4e-10, -4e-10]
    model.children["fc1"].params["bias"][...] = [-6e-7, 0]  # margin = 8e-10 sum(x) - 6e-7
    chain, low = Chain(model), np.zeros((1, 1, 2000))
    assert milp.decide(chain, low, low + 1, [], [1, -1], threshold=-5e-7).status == "candidate"
    assert milp.decide(chain, low + 0.5, low + 1, [], [1, -1], threshold=0.0).status == "infeasible"


# --- bounds where the margin is small ---------------------------------------------------------------------------------


def drawn_in(case, threshold):
    """(the collapsed network, bounds of its units at the images with margin <= threshold): one restriction."""
    row = case.row
    net = collapse(case.chain, case.low, case.high, case.relus, row)
    part = bab.backward(net, np.zeros((1, len(net.units))), net.lower[None])
    return net, bab.restrict(net, part, *net.ends(case.relus), threshold + 1e-7 * (1 + abs(threshold)))[:2]


@given(network=networks(), eps=eps_values, distance=st.sampled_from([-0.3, -1e-3, 1e-3, 0.3]))
def test_what_a_restriction_makes_stable_is_folded_in(network, eps, distance):
    case = Network(network, eps)
    exact = case.exact()
    net, (low, high) = drawn_in(case, exact + distance)
    if (low > high).any():
        assert distance < 0
        return
    program = milp.build(net, low, high, exact + distance)
    assert program.binaries == ((low < 0) & (high > 0)).sum()
    found = milp.solve(program, 60, {"mip_max_improving_sols": 1000, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0})
    assert found.status == ("candidate" if distance > 0 else "infeasible")
    if distance > 0:
        assert case.margin(unscaled(case, found.image)) == pytest.approx(exact, abs=1e-5)


def test_the_test_above_folds_something():
    on = off = 0
    for seed in range(20):
        case = Network((mlp((4, 8, 8, 2), seed, (2, 2, 1)).astype(np.float64), np.random.default_rng(seed)), 0.2)
        low, high = drawn_in(case, min(case.margin(x) for x in images_of(case, 300)))[1]
        on, off = on + (low >= 0).sum(), off + (high <= 0).sum()
    assert on > 5 and off > 5


def test_the_root_may_decide_alone(wide, monkeypatch):
    monkeypatch.setattr(milp, "solve", None)
    assert milp.decide(*wide.question, threshold=-1e3).message == "the tree's root"
    answer = milp.decide(*wide.question, threshold=1e3)
    assert answer.status == "candidate" and wide.margin(answer.image) <= 1e3


def test_bounds_of_the_root_that_are_no_numbers_are_an_error(wide, monkeypatch):
    tree = bab.Tree("timeout", None, -np.inf, None, 1, 0.0, (np.full(19, np.nan), np.full(19, 1.0)))
    monkeypatch.setattr(milp, "branch_and_bound", lambda *_, **__: tree)
    assert milp.decide(*wide.question).status == "error"


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["low", "high", "relu low", "relu high", "threshold"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_prove_nothing(wide, where, value):
    low, high, relus = wide.low.copy(), wide.high.copy(), [(a.copy(), b.copy()) for a, b in wide.relus]
    {"low": low, "high": high, "relu low": relus[1][0], "relu high": relus[1][1], "threshold": low[:0]}[where].flat[
        :1] = value  # fmt: skip
    threshold = value if where == "threshold" else -100.0
    answer = milp.decide(wide.chain, low, high, relus, wide.row, threshold=threshold)
    assert answer.status == "error" and "finite" in answer.message and np.isnan(answer.bound)


def test_rows_that_are_not_finite_or_too_large_prove_nothing(wide, monkeypatch):
    without_restriction(monkeypatch)
    for value in (np.nan, 1e16):
        monkeypatch.setattr(wide.chain.stages[-1], "bias", np.array([value, 0, -value]))
        answer = milp.decide(wide.chain, wide.low, wide.high, wide.relus, [1, 0, -1], threshold=-100.0)
        assert answer.status == "error" and "too large" in answer.message


def test_questions_that_make_no_sense(wide, monkeypatch):
    chain, low, high, relus, row = wide.question
    for wrong in (row[:2], row[None], [1, -1, np.nan], [1, -1, np.inf], 0):
        with pytest.raises(ValueError, match="3 finite numbers"):
            milp.decide(chain, low, high, relus, wrong)
    with pytest.raises(ValueError, match="float64"):
        milp.decide(Chain(mlp((1, 2), input_shape=(1, 1, 1)), np.float32), low, high, [], [1, -1])
    with pytest.raises(ValueError):
        milp.decide(chain, low, high, relus[:1], row)
    assert milp.decide(chain, high, low, relus, row).message == "the box is empty"
    without_restriction(monkeypatch)
    for options in ({"no_such_option": 1}, {"random_seed": -4}):
        answer = milp.decide(chain, low, high, relus, row, threshold=100.0, options=options)
        assert answer.status == "error" and next(iter(options)) in answer.message


def test_only_infeasible_is_a_proof(wide, monkeypatch):
    without_restriction(monkeypatch)
    statuses = [s for name, s in vars(highspy.HighsModelStatus).items() if name.startswith("k")]
    assert len(statuses) > 15
    for status in statuses:
        monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda _, s=status: s)
        monkeypatch.setattr(highspy.Highs, "run", lambda _: highspy.HighsStatus.kOk)  # no solution either
        answer = milp.decide(*wide.question)
        timeouts = (highspy.HighsModelStatus.kInterrupt, highspy.HighsModelStatus.kTimeLimit)
        expected = "infeasible" if status == highspy.HighsModelStatus.kInfeasible else (
            "timeout" if status in timeouts else "error")  # fmt: skip
        assert answer.status == expected and answer.image is None


def test_a_model_that_highs_refuses_is_an_error(wide, monkeypatch):
    monkeypatch.setattr(highspy.Highs, "passModel", lambda *_: highspy.HighsStatus.kWarning)
    without_restriction(monkeypatch)
    assert "refused" in milp.decide(*wide.question).message
    assert milp.decide(*wide.question).status == "error"


# --- time limits, and the child process -------------------------------------------------------------------------------


def hard():
    """A question that needs hundreds of nodes: a random network, a wide box, the threshold near the least margin."""
    model = mlp((12, 30, 30, 2), 3, (2, 2, 3), (0.5,) * 3, (0.2,) * 3).astype(np.float64)
    model.weights *= 2
    case = Network((model, np.random.default_rng(0)), 0.0)
    case.low, case.high = np.zeros_like(case.low), np.ones_like(case.high)
    case.relus = crown.crown(case.chain, case.low, case.high)
    case.label, case.rival = 0, 1
    return case


@pytest.mark.parametrize("tick", [0.0, 0.5])
def test_the_limit_is_on_cpu_time(tick, monkeypatch):
    """A clock of our own: one that stands still never ends a solve, one that leaps ends it, whatever the wall says."""
    now = itertools.count()
    clock = SimpleNamespace(process_time=lambda: tick * next(now), monotonic=lambda: 0.0)
    monkeypatch.setattr(milp, "time", clock)
    without_restriction(monkeypatch)
    case = hard()
    answer = milp.decide(*case.question, threshold=-1.0, cpu_limit=10.0)
    if tick:
        assert answer.status == "timeout" and "nterrupt" in answer.message and answer.seconds > 10
        assert answer.bound <= -1 or np.isnan(answer.bound)
    else:
        assert answer.status in ("infeasible", "candidate") and answer.seconds == 0


def test_wall_clock_is_the_second_net(monkeypatch):
    without_restriction(monkeypatch)
    answer = milp.decide(*hard().question, threshold=-1.0, options={"time_limit": 0.0})
    assert answer.status == "timeout" and "ime limit" in answer.message


@pytest.fixture(scope="module")
def solver():
    with milp.Solver() as solver:
        yield solver
    assert solver._process is None


@fewer(0.3)
@given(network=networks(), eps=eps_values)
def test_the_childs_answer_is_the_same(solver, network, eps):
    case = Network(network, eps)
    exact = case.exact()
    for threshold in (exact - 1e-3, exact + 1e-3):
        child = solver.decide(*case.question, threshold=threshold)
        here = milp.decide(*case.question, threshold=threshold)
        assert child.status == here.status and child.nodes == here.nodes and child.message == here.message
        assert np.array_equal(child.image, here.image) if here.image is not None else child.image is None


def stop(solver):
    os.kill(solver._process.pid, signal.SIGSTOP)


def children():
    return [p.pid for p in multiprocessing.active_children()]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process can be stopped on POSIX only")
def test_a_child_that_hangs_is_killed_and_one_that_dies_is_an_error(wide, monkeypatch):
    without_restriction(monkeypatch)
    before = children()
    with milp.Solver() as solver:
        right = solver.decide(*wide.question, threshold=100.0)
        assert right.status == "candidate"
        first = solver._process.pid

        stop(solver)
        solver.allowance = 0.2
        answer = solver.decide(*wide.question)
        assert answer.status == "timeout" and answer.message == "killed" and answer.seconds > 0
        with pytest.raises(ProcessLookupError):  # dead, and waited for
            os.kill(first, 0)

        solver.allowance = None
        assert solver.decide(*wide.question, threshold=100.0).status == "candidate"
        stop(solver)
        killer = threading.Timer(0.3, os.kill, (solver._process.pid, signal.SIGKILL))
        killer.start()
        answer = solver.decide(*wide.question)
        killer.join()
        assert answer.status == "error" and "died (exit code -9)" in answer.message

        assert solver.decide(*wide.question, threshold=100.0).status == "candidate"
        os.kill(solver._process.pid, signal.SIGKILL)  # while it has nothing to do
        solver._process.join()
        assert solver.decide(*wide.question, threshold=100.0).status == "candidate"
        last = solver._process.pid
        os.kill(last, signal.SIGINT)  # Ctrl-C is the parent's
        assert solver.decide(*wide.question, threshold=100.0).status == "candidate" and solver._process.pid == last
    assert children() == before
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    solver.close()  # twice does no harm


def in_a_worker(_):
    case = hard()
    with milp.Solver() as solver:
        return solver.decide(*case.question, threshold=100.0).status


def test_a_solver_in_a_worker_of_a_pool():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(in_a_worker, [0])) == ["candidate"]
