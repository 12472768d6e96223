"""beta-CROWN branch and bound: on tiny networks it agrees with a linear program for each pattern of ReLUs."""

import inspect
import itertools
import types

import highspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import box, conv_net, randomise, sequence

from nanomr import models
from nanomr.gradcheck import GradientError, check_vjp
from nanomr.layers import Flatten, Linear, ReLU
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds.crown import Box, Lines, alpha_crown, crown, image_box, lower, margin_rows
from nanomr.verify.chain import Chain
from nanomr.verify.exact import bab, collapsed
from nanomr.verify.exact.halfspace import Rows, least

LABEL, RIVAL = 1, 0


def mlp(draw, hidden=(4, 3), inputs=3):
    return randomise(models.mlp((inputs, *hidden, 3), input_shape=(1, 1, inputs)), draw)


NETWORKS = {
    "mlp": mlp,
    "one layer": lambda draw: mlp(draw, (6,)),
    "deep": lambda draw: mlp(draw, (3, 2, 3)),
    "linear": lambda draw: mlp(draw, ()),
    "a ReLU first": lambda draw: sequence([ReLU(), Flatten(), Linear(4, 4), ReLU(), Linear(4, 3)], (2, 2, 1), draw),
}
LARGE = {**NETWORKS, "norm": lambda draw: conv_net(draw, (4, 2, 1), (3, 1, 1), norm=True, bias=False)}
every_network = pytest.mark.parametrize("network", LARGE)


class Problem:
    """A network, a box around one image, the bounds of its ReLUs."""

    def __init__(self, network, seed, eps=0.4):
        self.draw = np.random.default_rng(seed)
        model = LARGE[network](self.draw)
        self.chain = Chain(model)
        self.low, self.high = box(model, self.draw, eps, n=1)
        self.relus = crown(self.chain, self.low, self.high)
        self.args = self.chain, self.low, self.high, self.relus
        self.row = margin_rows([LABEL], [RIVAL], self.chain.classes)[0]

    def margins(self, x):
        return self.chain.forward(x)[0] @ self.row

    def solve(self, module=bab, **options):
        return module.branch_and_bound(*self.args, self.row, **{"cpu_limit": 1e9, **options})

    def in_slices(self, module=bab, **options):
        """The answer of a search that is stopped again and again: after its root, and after each few domains."""
        search = module.Search(*self.args, self.row, **options)
        trees = []
        for domains in itertools.count(1, 3):
            trees.append(search.run(lambda: 1.0, max_domains=domains))
            if search.tree is not None:
                assert all(t.status == "timeout" and t.proof is None and t.image is None for t in trees[:-1])
                return trees[-1], len(trees)
            assert search.heap

    def collapsed(self):
        return collapsed.collapse(*self.args, self.row)

    def domains(self, net, n=6, splits=0.5):
        """Random signs, and values of the right kind."""
        shape = n, len(net.units)
        signs = self.draw.choice(np.array([-1, 0, 1], np.int8), shape, p=[splits / 2, 1 - splits, splits / 2])
        return signs, np.where(signs == 0, self.draw.random(shape), self.draw.exponential(0.3, shape))

    def minima(self):
        """{signs of the unstable ReLUs: the smallest margin with these signs, or inf}: a linear program each."""
        units = self.collapsed().units
        sizes = [bound[0].size for bound in self.relus]
        stable = np.concatenate([np.zeros(0), *(np.where(low >= 0, 1, -1).ravel() for low, _ in self.relus)])
        maps = [matrix_of(stage) for stage in self.chain.stages]
        found = {}
        for pattern in itertools.product((-1, 1), repeat=len(units)):
            signs = stable.copy()
            signs[units] = pattern
            matrix, constant, rows = np.eye(self.low.size), np.zeros(self.low.size), []
            for k, (a, b) in enumerate(maps):
                if k:
                    sign, signs = np.split(signs, [sizes[k - 1]])
                    rows.append((sign[:, None] * matrix, sign * constant))
                    matrix, constant = matrix * (sign[:, None] > 0), constant * (sign > 0)
                matrix, constant = a @ matrix, a @ constant + b
            least = linear_program(self.row @ matrix, self.low.ravel(), self.high.ravel(), rows)
            found[pattern] = least + self.row @ constant
        return found


def matrix_of(stage):
    zero = stage.apply(np.zeros((1, *stage.in_shape))).ravel()
    size = int(np.prod(stage.in_shape))
    return (stage.apply(np.eye(size).reshape(size, *stage.in_shape)).reshape(size, -1) - zero).T, zero


def linear_program(cost, low, high, rows):
    """The minimum of cost . x over low <= x <= high and a . x + b >= 0 for all rows; inf if there is no such x."""
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    for column in zip(cost, low, high, strict=True):
        highs.addCol(*column, 0, [], [])
    for a, b in rows:
        for coefficients, constant in zip(a, b, strict=True):
            highs.addRow(-constant, highspy.kHighsInf, len(cost), np.arange(len(cost)), coefficients)
    highs.run()
    if highs.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return np.inf
    assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return highs.getObjectiveValue()


# float64 bounds of sums of few terms of size 10 at most; HiGHS is exact to 1e-7.
TOLERANCE = 1e-6
# Beyond this from the minimum, the answer must be right: float32 searches with a slack of 1e-5, its own rounding in
# these networks is below 1e-5 too.
BAND = 1e-3


def flat(layers):
    return np.concatenate([np.zeros(0), *(np.ravel(v) for v in layers)])


class Replay:
    """A proof, node by node, by passes through the network's own layers: no rounding, no slack."""

    def __init__(self, problem, proof):
        self.problem, self.proof = problem, proof
        self.box = Box.between(problem.low, problem.high)
        low, high = (flat(side) for side in zip(*problem.relus, strict=True)) if problem.relus else [np.zeros(0)] * 2
        self.states, self.leaves = [(low, high)], []
        parent, split, multipliers = proof["parent"], proof["split"], iter(proof["multipliers"])
        children = [np.flatnonzero(parent == n) for n in range(len(parent))]
        assert parent[0] == -1 and (parent < np.arange(len(parent))).all()
        rows = zip(proof["signs"], proof["values"], strict=True)
        linear = {}
        for n, (at, unit) in enumerate(zip(parent, split, strict=True)):
            if n and unit:
                low, high = (side.copy() for side in self.states[at])
                side, extreme = (low, np.maximum) if unit > 0 else (high, np.minimum)
                side[abs(unit) - 1] = extreme(side[abs(unit) - 1], 0)
                self.states.append((low, high))
            elif n:
                self.states.append(self.restricted(self.states[at], linear[at], next(multipliers)))
            signs = split[children[n]].tolist()
            assert signs in ([], [0]) or (len(signs) == 2 and signs[0] == -signs[1] != 0)
            if signs in ([], [0]):
                empty = (self.states[n][0] > self.states[n][1] + 1e-9).any()
                linear[n] = self.linear(self.states[n], *next(rows), checked=not empty)
                if not signs:
                    self.leaves.append((self.path(n), np.inf if empty else linear[n].value[0]))
        assert next(rows, None) is next(multipliers, None) is None

    def path(self, n):
        """{flat unit: sign} of the splits above a node."""
        signs = {}
        while n >= 0:
            unit, n = self.proof["split"][n], self.proof["parent"][n]
            signs |= {abs(unit) - 1: np.sign(unit)} if unit else {}
        return signs

    def layered(self, values):
        shapes = self.problem.chain.relu_shapes
        parts = np.split(values, np.cumsum([int(np.prod(s)) for s in shapes], dtype=int))[:-1]
        return [part.reshape(1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def lines(self, low, high):
        return [Lines.around(*r) for r in zip(self.layered(low), self.layered(high), strict=True)]

    def linear(self, state, signs, values, checked=True):
        """The bound of a row at a node."""
        (low, high), units = state, self.proof["units"]
        if checked:  # a sign is one that the state gives
            assert (low[units][signs > 0] >= -1e-9).all() and (high[units][signs < 0] <= 1e-9).all()
        low, high, forces = low.copy(), high.copy(), np.zeros(len(low))
        low[units] = np.where(signs > 0, np.maximum(low[units], 0), low[units])
        high[units] = np.where(signs < 0, np.minimum(high[units], 0), high[units])
        lines = self.lines(low, high)
        slopes = flat([line.lower for line in lines])
        slopes[units], forces[units] = np.where(signs == 0, values, slopes[units]), -signs * values
        row = self.problem.row[None]
        return lower(self.problem.chain, self.box, lines, row, [0], self.layered(slopes), self.layered(forces))

    def restricted(self, state, linear, multipliers):
        low, high = (side.copy() for side in state)
        m_low, m_high = np.zeros(len(low)), np.zeros(len(low))
        m_low[self.proof["units"]], m_high[self.proof["units"]] = multipliers
        c = (linear.image * self.box.radius).ravel()
        k = linear.value[0] + abs(c).sum() - self.proof["limit"].item()
        shapes, first = self.problem.chain.relu_shapes, 0
        for layer, shape in enumerate(shapes):
            size = int(np.prod(shape))
            for unit in first + np.flatnonzero((low < 0)[first : first + size] & (high > 0)[first : first + size]):
                for sign, m in ((1, m_low[unit]), (-1, m_high[unit])):
                    row = np.zeros((1, size))
                    row[0, unit - first] = sign
                    lines = self.lines(low, high)[:layer]
                    part = lower(self.problem.chain, self.box, lines, row.reshape(1, *shape), [0])
                    w = (part.image * self.box.radius).ravel()
                    bound = part.value[0] + abs(w).sum() + m * k - abs(w + m * c).sum()
                    if sign > 0:
                        below = bound
                low[unit], high[unit] = max(low[unit], below), min(high[unit], -bound)
            first += size
            if (low > high).any():
                break
        return low, high


def audit(problem, tree, minima, threshold):
    """Everything that must be true of an answer."""
    least = min(minima.values())
    assert tree.status != "timeout"
    assert (tree.status == "proved") == (least > threshold)
    if tree.status == "candidate":
        assert tree.proof is None and tree.image.shape == problem.low.shape[1:]
        assert (tree.image >= problem.low[0]).all() and (tree.image <= problem.high[0]).all()
        assert problem.margins(tree.image[None])[0] <= threshold
        assert tree.bound <= least + TOLERANCE
        return
    assert tree.image is None and threshold < tree.bound <= least + TOLERANCE
    proof = tree.proof
    units, signs, values, multipliers, limit = (
        proof[name] for name in ("units", "signs", "values", "multipliers", "limit")
    )
    assert units.dtype == proof["split"].dtype == proof["parent"].dtype == np.int32 and signs.dtype == np.int8
    assert values.dtype == multipliers.dtype == np.float32 and limit.dtype == np.float64 and limit.shape == (1,)
    assert signs.shape == values.shape == (len(values), len(units)) and multipliers.shape[1:] == (2, len(units))
    assert np.isfinite(values).all() and (values >= 0).all() and (values[signs == 0] <= 1).all()
    assert np.isfinite(multipliers).all() and (multipliers >= 0).all()
    assert limit > threshold and (len(multipliers) == 0) == (limit.item() == np.inf)
    leaves = Replay(problem, proof).leaves
    proved = min([limit.item(), *(bound for _, bound in leaves)])
    assert tree.bound <= proved <= tree.bound + 1e-5 * (1 + abs(tree.bound))
    covered = dict.fromkeys(minima, 0)
    for path, bound in leaves:
        inside = [p for p in minima if all(path.get(u, sign) == sign for u, sign in zip(units, p, strict=True))]
        assert inside and min(bound, limit.item()) <= min(minima[p] for p in inside) + TOLERANCE
        for pattern in inside:
            covered[pattern] += 1
    assert set(covered.values()) == {1}  # every case is in a leaf, and in one only


@pytest.mark.parametrize("rounds", [0, 1, 4])
@pytest.mark.parametrize("network", NETWORKS)
@fewer(0.3)
@given(seed=seeds, gap=st.sampled_from([-2, -0.3, -0.03, -BAND, BAND, 0.03, 0.3, 2]), batch=st.sampled_from([1, 3, 64]))
def test_proved_exactly_if_the_minimum_is_above_the_threshold(network, rounds, seed, gap, batch):
    problem = Problem(network, seed)
    minima = problem.minima()
    threshold = min(minima.values()) + gap
    audit(problem, problem.solve(threshold=threshold, batch=batch, rounds=rounds), minima, threshold)


def test_restricted_trees_are_smaller():
    plain = restricted = 0
    for seed in range(40):
        problem = Problem("norm", seed, eps=0.2)
        least = problem.solve(threshold=-1e3).bound
        threshold = least + 0.7 * (problem.margins(0.5 * (problem.low + problem.high))[0] - least)
        trees = [problem.solve(threshold=threshold, rounds=n, max_domains=2000) for n in (0, 4)]
        if any(tree.status != "proved" for tree in trees) or trees[0].domains == 1:
            continue
        plain, restricted = plain + trees[0].domains, restricted + trees[1].domains
        assert len(trees[0].proof["multipliers"]) == 0 < len(trees[1].proof["multipliers"])
    assert 0 < restricted < 0.7 * plain


def test_the_tests_above_see_trees_of_every_kind():
    """... and not only roots that are proved at once."""
    splits, restricted, empty = [], 0, 0
    for seed in range(12):
        problem = Problem("mlp", seed)
        threshold = min(problem.minima().values()) - BAND
        tree = problem.solve(threshold=threshold, rounds=0)
        leaves = Replay(problem, tree.proof).leaves
        splits.append((len(leaves), max(len(path) for path, _ in leaves)))
        assert tree.domains == 2 * len(leaves) - 1 == len(tree.proof["split"])
        tree = problem.solve(threshold=threshold)
        restricted += len(tree.proof["multipliers"]) > 2 and (tree.proof["split"] != 0).any()
        problem = Problem("deep", seed)
        tree = problem.solve(threshold=min(problem.minima().values()) - BAND, steps=0)
        empty += any(bound == np.inf for _, bound in Replay(problem, tree.proof).leaves)
    assert sum(leaves > 3 for leaves, _ in splits) >= 3 and max(depth for _, depth in splits) >= 4
    assert restricted >= 3 and empty >= 1


@pytest.mark.parametrize("network", NETWORKS)
def test_leaves_with_everything_split_are_solved_exactly(network):
    """No climbing at all, and a minimum that is only just above: linear programs must finish the work."""
    for seed in range(6):
        problem = Problem(network, seed)
        minima = problem.minima()
        for gap in (-BAND, BAND):
            threshold = min(minima.values()) + gap
            audit(problem, problem.solve(threshold=threshold, steps=0, rounds=0), minima, threshold)


# With cold caches, in one run of several, a matmul of this test reported an invalid value. In float32 OpenBLAS raises
# that flag by itself (collapsed.climb); in float64, as here, why is not known. So every array is asked for NaN instead,
# which is the stronger question.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@every_network
@fewer(0.5)
@given(seed=seeds, share=st.floats(-0.2, 1.2))
def test_restricted_bounds_hold_for_every_image_with_a_small_margin(network, seed, share):
    problem = Problem(network, seed, eps=0.2)
    net, draw = problem.collapsed(), problem.draw
    x = problem.low + draw.choice([0, draw.random(), 1], (200, *problem.low.shape[1:])) * (problem.high - problem.low)
    logits, inputs = problem.chain.forward(x)
    z = np.concatenate([np.zeros((len(x), 0)), *(z.reshape(len(x), -1) for z in inputs)], axis=1)[:, net.units]
    margins = logits @ problem.row
    limit = margins.min() + share * (margins.max() - margins.min())
    sign = (np.sign(z[0]) * (draw.random(z.shape[1]) < 0.2)).astype(float)
    value = np.where(sign == 0, draw.random(len(sign)), draw.exponential(0.1, len(sign)))
    low, high = (flat(sides)[net.units] for sides in (zip(*problem.relus, strict=True) if problem.relus else ((), ())))
    low, high = np.where(sign > 0, np.maximum(low, 0), low), np.where(sign < 0, np.minimum(high, 0), high)
    lines = Lines.around(low, high)
    part = collapsed.backward(net, sign[None], value[None], (lines.upper[None], lines.offset[None]))
    kept = low.copy(), high.copy()
    inside = (margins <= limit - 1e-9 * (1 + abs(limit))) & (sign * z >= 0).all(1)
    *found, multipliers = collapsed.restrict(net, part, low, high, limit)
    for array in (logits, z, margins, limit, low, high, *found, multipliers, net.image, net.bias, net.between):
        assert not np.isnan(array).any()
    assert np.array_equal(kept[0], low) and np.array_equal(kept[1], high)
    assert (multipliers >= 0).all() and (multipliers.astype(np.float32) == multipliers).all()
    if (found[0] > found[1]).any():
        assert not inside.any()
        return
    slack = 1e-9 * (1 + abs(z[inside]))
    assert (z[inside] >= found[0] - slack).all() and (z[inside] <= found[1] + slack).all()
    assert (found[0] >= low).all() and (found[1] <= high).all()


@given(seed=seeds, cut=st.floats(-0.9, 0.9))
def test_the_least_over_box_and_half_space_is_a_linear_programs(seed, cut):
    draw = np.random.default_rng(seed)
    w, c = draw.normal(size=(5, 7)), draw.normal(size=7) * (draw.random(7) < 0.8)
    k = cut * abs(c).sum()
    for row, bound in zip(w, least(np.eye(5), *Rows.of(w), c, k)[0], strict=True):
        exact = linear_program(row, -np.ones(7), np.ones(7), [(-c[None], np.array([-k]))])
        assert -abs(row).sum() - 1e-12 <= bound <= exact + 1e-7
        assert bound >= exact - 0.02 * abs(row).sum() or not np.isfinite(exact)  # ten steps of bisection


@given(seed=seeds, cut=st.floats(-0.9, 0.9))
def test_the_least_of_sums_is_that_of_the_product(seed, cut):
    draw = np.random.default_rng(seed)
    matrix, factors = (draw.normal(size=s) * (draw.random(s) < 0.4) for s in ((6, 9), (5, 6)))
    c = draw.normal(size=9) * (draw.random(9) < 0.8)
    k, w = cut * abs(c).sum(), factors @ matrix
    bounds, m = least(factors, *Rows.of(matrix), c, k)
    np.testing.assert_allclose(bounds, least(np.eye(5), *Rows.of(w), c, k)[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(bounds, m * k - abs(w + m[:, None] * c).sum(1), rtol=0, atol=1e-12)
    assert (m == m.astype(np.float32)).all() and (m >= 0).all()


def test_no_number_restricts_nothing():
    problem = Problem("mlp", 0)
    net = problem.collapsed()
    low, high = (flat(sides)[net.units] for sides in zip(*problem.relus, strict=True))
    part = collapsed.backward(net, np.zeros((1, len(low))), np.full((1, len(low)), 0.5))
    assert (collapsed.restrict(net, part, low, high, -1e3)[0] > high).any()  # else this test could not fail
    sparse = net.sparse._replace(values=net.sparse.values * np.nan)
    pixels = [b.astype(float)._replace(blocks=[(*s, m * np.nan) for *s, m in b.blocks]) for b in net.pixels]
    wrong = [(net._replace(bias=net.bias * np.nan), part), (net._replace(sparse=sparse, pixels=pixels), part)]
    wrong += [(net, part._replace(**{name: getattr(part, name) * np.nan})) for name in ("bound", "image")]
    for broken, p in wrong:
        found = collapsed.restrict(broken, p, low, high, -1e3)
        assert not (found[0] > found[1]).any()


def test_where_highs_fails_it_gives_up_if_it_must_and_is_never_wrong(monkeypatch):
    problems = [Problem("mlp", seed) for seed in range(12)]
    minima = [problem.minima() for problem in problems]
    leaves, solve = [], bab._solve_leaf
    monkeypatch.setattr(bab, "_solve_leaf", lambda *args: leaves.append(solve(*args)) or leaves[-1])
    monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda _: highspy.HighsModelStatus.kUnknown)
    gave_up = 0
    for problem, truth in zip(problems, minima, strict=True):
        threshold = min(truth.values()) - BAND
        tree = problem.solve(threshold=threshold, steps=0, rounds=0)
        if tree.status == "timeout":
            gave_up += 1
            assert tree.proof is None and tree.image is None
        else:
            audit(problem, tree, truth, threshold)
    assert 0 < gave_up < len(problems)
    assert leaves and all(part is None for leaf in leaves for part in leaf)  # nothing of a solver that failed is used


def test_slopes_to_begin_with_are_used():
    """The slopes of a proof by alpha-CROWN need no step, and come back as they are."""
    used = 0
    for seed in range(20):
        problem = Problem("mlp", seed)
        lines = [Lines.around(*r) for r in problem.relus]
        box_ = Box.between(problem.low, problem.high)
        start = alpha_crown(problem.chain, box_, lines, problem.row[None], [0], steps=30, target=np.inf)
        plain = problem.solve(threshold=start.value[0] - 1e-4, start=start)
        assert plain.status == "proved" and plain.domains == 1
        assert plain.bound == pytest.approx(start.value[0], abs=5e-5)
        used += bool((plain.proof["values"] != problem.collapsed().lower).any())
    assert used > 5


# --- the collapsed network is the network -----------------------------------------------------------------------------


def by_layers(problem, net, signs, values):
    """The bounds of domains, by passes through the network's layers."""
    replay = Replay(problem, bab_proof(net))
    return [replay.linear(replay.states[0], *row, checked=False).value[0] for row in zip(signs, values, strict=True)]


def bab_proof(net):
    proof = bab.Proof(net.units)
    proof.rows[0] = np.zeros(len(net.units)), net.lower
    return proof.arrays()


@every_network
@fewer(0.4)
@given(seed=seeds)
def test_bounds_of_the_collapsed_network_are_those_of_the_network(network, seed):
    """In float64: whichever signs and values; its true margins and inputs, too."""
    problem = Problem(network, seed, eps=0.1)
    net = problem.collapsed()
    signs, values = problem.domains(net, splits=0.3)
    values = values.astype(np.float32).astype(np.float64)  # as they are stored
    part = collapsed.backward(net, signs, values)
    scale = 1 + abs(part.bound).max()
    bounds = by_layers(problem, net, signs, values)
    np.testing.assert_allclose(part.bound, bounds, rtol=0, atol=1e-11 * scale)
    z, _, margins, y = collapsed.forward(net, part)
    x = Box.between(problem.low, problem.high)
    x = x.centre + y.reshape(-1, *problem.low.shape[1:]) * x.radius
    np.testing.assert_allclose(margins, problem.margins(x), rtol=0, atol=1e-11 * scale)
    if network == "one layer":
        inputs = problem.chain.forward(x)[1][0].reshape(len(x), -1)[:, net.units]
        np.testing.assert_allclose(z, inputs, rtol=0, atol=1e-11 * scale)


@every_network
@fewer(0.4)
@given(seed=seeds)
def test_no_point_of_a_domain_is_below_its_bound(network, seed):
    """Whatever alpha and beta are."""
    problem = Problem(network, seed, eps=0.1)
    net, draw = problem.collapsed(), problem.draw
    x = problem.low + draw.random((100, *problem.low.shape[1:])) * (problem.high - problem.low)
    logits, inputs = problem.chain.forward(x)
    z = np.concatenate([np.zeros((len(x), 0)), *(z.reshape(len(x), -1) for z in inputs)], axis=1)[:, net.units]
    values = problem.domains(net, n=20)[1]
    signs = (np.sign(z[:20]) * (draw.random(values.shape) < 0.2)).astype(np.int8)  # each has a point at least
    values = np.where(signs == 0, draw.random(values.shape), values)
    bound = collapsed.backward(net, signs, values).bound
    inside = (signs[:, None] * z >= 0).all(2)
    assert inside[np.arange(20), np.arange(20)].all()
    margins = np.where(inside, logits @ problem.row, np.inf)
    assert (bound[:, None] <= margins + 1e-11 * (1 + abs(bound[:, None]))).all()


@every_network
def test_gradients_of_alpha_and_beta(network):
    for seed in range(3):
        problem = Problem(network, seed, eps=0.1)
        net = problem.collapsed()
        signs, values = problem.domains(net)
        part = collapsed.backward(net, signs, values)
        claimed = collapsed.gradient(signs, part, collapsed.forward(net, part)[0])

        def bound(values, net=net, signs=signs):
            return collapsed.backward(net, signs, values).bound

        check_vjp(bound, lambda dy, g=claimed: dy[:, None] * g, [values])
        if (signs != 0).any():
            wrong = np.where(signs == 0, claimed, -claimed)
            with pytest.raises(GradientError):
                check_vjp(bound, lambda dy, g=wrong: dy[:, None] * g, [values])


@pytest.mark.parametrize("network", ["one layer", "mlp", "norm"])
@fewer(0.4)
@given(seed=seeds)
def test_children_begin_at_least_as_high_as_their_parents(network, seed):
    """For a coefficient >= 0 a child's linear function is its parent's; for one < 0 it is above it wherever the
    bounds of the input hold: in the first layer, where these are intervals, everywhere."""
    problem = Problem(network, seed, eps=0.1)
    net = problem.collapsed()
    signs, values = problem.domains(net, splits=0.2)
    part = collapsed.backward(net, signs, values)
    slack = 1e-11 * (1 + abs(part.bound))
    for unit in range(len(net.units)):
        free = signs[:, unit] == 0
        picked = np.full(len(signs), unit)
        new, start = bab.children(signs, values, part.relus, picked)
        assert (new[::2, unit] == 1).all() and (new[1::2, unit] == -1).all()
        assert (start[np.repeat(free, 2)] >= 0).all()
        bounds = collapsed.backward(net, new, start).bound.reshape(-1, 2)
        positive = free & (part.relus[:, unit] >= 0)
        assert (abs(bounds - part.bound[:, None]) <= slack[:, None])[positive].all()
        if unit < net.layers[0].stop:
            assert (bounds >= (part.bound - slack)[:, None])[free].all()


@fewer(0.4)
@given(seed=seeds)
def test_climbing_and_branching_lead_upwards(seed):
    problem = Problem("norm", seed, eps=0.1)
    net = problem.collapsed()
    if len(net.units) < 2:
        return
    signs = np.zeros((1, len(net.units)), np.int8)
    start = net.lower[None].copy()
    few, many = (collapsed.climb(net, signs, start, np.ones(len(net.units)), steps, np.inf) for steps in (0, 30))
    assert few.bound == collapsed.backward(net, signs, start).bound and (few.values == start).all()
    assert many.bound >= few.bound and many.bound == collapsed.backward(net, signs, many.values).bound
    assert ((many.values >= 0) & (many.values <= 1)).all()
    for steps in (1, 2, 4):  # from near the top: these fall at first, and are not kept
        assert collapsed.climb(net, signs, many.values, np.ones(len(net.units)), steps, np.inf).bound >= many.bound
    new, values, unit = bab.branch(net, signs, many.values, np.inf)
    assert (new[:, unit] != 0).all() and ((new != 0).sum(1) == 1).all() and (new[0] == -new[1]).all()
    best = collapsed.climb(net, new, values, np.ones(len(net.units)), 30, np.inf)
    assert (best.values >= 0).all()
    assert (best.bound >= collapsed.backward(net, new, values).bound).all()


# --- fails closed -----------------------------------------------------------------------------------------------------


def easy(threshold=-1e3, **options):
    return Problem("mlp", 0), dict(threshold=threshold, **options)


def test_a_bound_that_is_not_a_number_proves_nothing(monkeypatch):
    problem, options = easy()
    assert problem.solve(**options).status == "proved"
    for place in range(2):
        for value in (np.nan, np.inf):
            problem, options = easy()
            problem.relus[place][1][...] = value
            assert problem.solve(**options).status == "timeout"
    problem, options = easy()
    problem.low[0, 0, 0, 0] = np.nan
    assert problem.solve(**options).status == "timeout"
    monkeypatch.setattr(bab, "backward", claiming(np.nan))
    problem, options = easy()
    tree = problem.solve(**options)
    assert tree.status == "timeout" and tree.proof is None


def claiming(value, backward=collapsed.backward):
    """``backward``, with this as every bound in float64."""

    def fake(net, *args):
        part = backward(net, *args)
        return part._replace(bound=0 * part.bound + value) if net.bias.dtype == np.float64 else part

    return fake


@pytest.mark.parametrize("rounds", [0, 4])
def test_float64_has_the_last_word(rounds, monkeypatch):
    """float32 says that everything is proved; float64 does not: it goes on splitting, and gives up in the end."""
    problem, options = easy(rounds=rounds)
    monkeypatch.setattr(bab, "backward", claiming(-2e3))
    tree = problem.solve(**options)
    assert tree.status == "timeout" and tree.proof is None
    assert tree.domains > 2


def test_it_stops_when_it_should():
    hard = next(p for p in (Problem("norm", s, 0.2) for s in range(50)) if p.solve(max_domains=1).status == "timeout")
    tree = hard.solve(cpu_limit=0)
    assert (tree.status, tree.domains, tree.proof, tree.image) == ("timeout", 1, None, None)
    assert tree.bound <= 0 and tree.seconds > 0
    tree = hard.solve(max_domains=9, batch=1)
    assert tree.status != "timeout" or 9 <= tree.domains <= 10


def test_a_search_goes_on_where_it_stopped():
    """In slices it says the same, with a proof that is one; its worst bound rises, and nothing is bounded twice."""
    slices = []
    for seed, gap in itertools.product(range(6), (-BAND, BAND)):
        problem = Problem("mlp", seed)
        truth = problem.minima()
        options = dict(threshold=min(truth.values()) + gap, steps=0, rounds=0, batch=1)
        tree, n = problem.in_slices(**options)
        whole = problem.solve(**options)
        audit(problem, tree, truth, options["threshold"])
        assert tree.status == whole.status and tree.domains == whole.domains
        slices.append(n)
    assert max(slices) > 5
    problem = Problem("mlp", 0)
    search = bab.Search(*problem.args, problem.row, threshold=-1e3)
    assert search.run(lambda: 0.0).status == "proved" and search.run(lambda: 0.0).status == "proved"
    search = bab.Search(*problem.args, problem.row, threshold=1e3)
    assert search.run(lambda: 0.0).status == "candidate"
    assert problem.margins(search.nearest[None])[0] <= 1e3


def test_the_box_of_an_image(rng):
    """Pixels at 0 and 1 have shorter ranges; a candidate lies in the box all the same."""
    model = mlp(rng)
    image = np.array([[[[0.0, 1.0, 0.5]]]], np.float32)
    low, high = image_box(image, 0.3)
    chain = Chain(model)
    tree = bab.branch_and_bound(chain, low, high, crown(chain, low, high), [-1, 1, 0], threshold=1e3)
    assert tree.status == "candidate" and (tree.image >= low[0]).all() and (tree.image <= high[0]).all()


# --- planted bugs -----------------------------------------------------------------------------------------------------

BUGS = {
    "beta with the wrong sign": ("-signs * values)", "signs * values)"),
    "beta climbs the wrong way": ("part.relus, 0) * z, -signs * z)", "part.relus, 0) * z, signs * z)"),
    "a lost child": ("np.flatnonzero(~done)])", "np.flatnonzero(~done)[::2]])"),
    "a search that goes on without what is open": (
        "self._push(domains)\n        elif",
        "self._push(domains[1:])\n        elif",
    ),
    "the same side twice": ("np.array([1, -1], signs.dtype)", "np.array([1, 1], signs.dtype)"),
    "the clamp on the wrong side": ("np.where(sign > 0, np.maximum(low, 0), low)", "np.where(sign < 0, 0 * low, low)"),
    "NaN counts as proved": ("if bound > self.limit:", "if not bound <= self.limit:"),
    "float64 is not asked": ("if bound > self.limit:", "if True:"),
    "a candidate that nobody checked": ("[0] <= self.threshold:", "[0] <= np.inf:"),
    "a half-space too small": ("abs(c).sum() - limit", "abs(c).sum() - limit + 0.5"),
    "upper bounds from lower ones": ("-bound[len(some) :])", "bound[: len(some)])"),
    "a chord of other bounds": (
        "Lines.around(low[e], high[e])",
        "Lines.around(0.3 * low[e], high[e])",
    ),
    "a block without its last column": ("int(last[a:b].max()))", "int(last[a:b].max()) - 1)"),
    "numbers without the layer's own": ("zip(net.layers[: m + 1], net.pixels", "zip(net.layers[:m], net.pixels"),
    "a block that is not empty is left out": ("if not few or part.any():", "if not few or part.all():"),
    "an empty domain that is not": ("if is_empty(*known):", "if (known[0] > -1.0).any():"),
    "duals of the wrong sign": ("np.maximum(found.row_dual, 0)", "np.maximum(-np.array(found.row_dual), 0)"),
    "an empty case is not closed": ("return dual * max(0,", "return 0 * dual * max(0,"),
    "a split of another unit is written down": ("(self.net.units[unit[i // 2]] + 1)", "(self.net.units[unit[0]] + 1)"),
    "a child of another node": ("proof.add(parent.node, split)", "proof.add(parents[0].node, split)"),
    "the values behind a restriction, not before": (
        "proof.rows[domain.node] = domain.signs, domain.values\n",
        "proof.rows[domain.node] = domain.signs, np.where(domain.signs == 0, 0.5, 0)\n",
    ),
    "multipliers of the other side": ("found.reshape(2, -1)", "found.reshape(2, -1)[::-1]"),
    "restricted, and no limit": ("self.limit if self.proof.multipliers else np.inf", "np.inf"),
    "a unit stable on the other side": ("np.where(known[0] > 0, 1, -1)", "np.where(known[0] > 0, -1, 1)"),
}


def mutant(old, new):
    """The module bab with one thing changed, in itself or in collapsed."""
    assert sum(inspect.getsource(module).count(old) for module in (bab, collapsed)) == 1
    folded, trees = (types.ModuleType(module.__name__) for module in (collapsed, bab))
    for module, right in ((folded, collapsed), (trees, bab)):
        module.__package__ = right.__package__
        exec(compile(inspect.getsource(right).replace(old, new), "mutant", "exec"), module.__dict__)
    for name in ("collapse", "backward", "forward", "gradient", "climb", "restrict"):
        setattr(trees, name, getattr(folded, name))
    return trees


TRUTH = {}  # of the problems below: computed once


def trial(module):
    """Raises AssertionError if anything is wrong with ``module``."""
    for seed, gap, steps in itertools.product(range(6), (-0.03, -BAND, BAND), (0, 3)):
        problem = Problem("mlp", seed)
        if seed not in TRUTH:
            TRUTH[seed] = problem.minima()
        threshold = min(TRUTH[seed].values()) + gap
        for rounds in (0, 4):
            tree = problem.solve(module, threshold=threshold, steps=steps, rounds=rounds)
            audit(problem, tree, TRUTH[seed], threshold)
        if steps == 0:
            tree, _ = problem.in_slices(module, threshold=threshold, steps=0, rounds=0)
            audit(problem, tree, TRUTH[seed], threshold)
    net = problem.collapsed()
    signs, values = problem.domains(net)
    part = module.backward(net, signs, values)
    assert part.bound == pytest.approx(by_layers(problem, net, signs, values), abs=1e-5)
    claimed = module.gradient(signs, part, module.forward(net, part)[0])
    try:
        check_vjp(lambda v: module.backward(net, signs, v).bound, lambda dy: dy[:, None] * claimed, [values])
    except GradientError as error:
        raise AssertionError from error
    climb, backward = module.climb, module.backward
    module.climb = lambda *args: climb(*args)._replace(margin=-np.inf, y=0 * net.row_image)
    audit(problem, problem.solve(module, threshold=threshold - 1), TRUTH[seed], threshold - 1)
    module.climb = climb
    for value in (np.nan, -2e3):
        module.backward = claiming(value, backward)
        assert problem.solve(module, threshold=-1e3).status == "timeout"
    module.backward = backward


def test_the_trial_passes_without_a_bug():
    trial(mutant("import heapq", "import heapq "))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    module = mutant(*BUGS[bug])
    with pytest.raises(AssertionError):
        trial(module)
