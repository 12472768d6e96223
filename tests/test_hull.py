"""Linear programs over hulls: cuts and bounds by brute force over corners, facets and patterns of ReLUs."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_bab import BAND, LARGE, NETWORKS, TOLERANCE, Problem, linear_program, mlp

from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds.crown import Box, Lines, alpha_crown, crown, image_box, lower, margin_rows
from nanomr.verify.chain import Chain
from nanomr.verify.exact import bab, hull
from nanomr.verify.exact.collapsed import backward, collapse

every_network = pytest.mark.parametrize("network", LARGE)
tiny_network = pytest.mark.parametrize("network", NETWORKS)


class Case(Problem):
    """A network, a box around one image, and what the programs see of it. ``relus`` may be wider than CROWN's."""

    def __init__(self, network, seed, eps=0.4, wider=0.0):
        super().__init__(network, seed, eps)
        if wider:
            self.relus = [(low - wider, high + wider) for low, high in self.relus]
            self.args = *self.args[:3], self.relus
        self.see()

    def see(self):
        self.box, self.net = Box.between(self.low, self.high), self.collapsed()
        self.hull = hull.Problem.of(self.net, self.box.radius)
        self.z_low, self.z_high = self.net.ends(self.relus)
        self.pixels, self.units = self.low.size, len(self.net.units)
        return self

    def search(self, module=hull, **options):
        return module.search(*self.args, self.row, **{"cpu_limit": 1e9, **options})

    def seen(self, n=100):
        """(y (N, D), z (N, U), margins (N,)) of images of the box: corners, edges, points."""
        y = self.draw.choice([-1, 0, 1], (n, self.pixels)) * np.where(self.draw.random((n, 1)) < 0.5, 1, 0.5)
        y = np.where(self.draw.random((n, 1)) < 0.7, y, self.draw.uniform(-1, 1, y.shape))
        x = self.box.centre + y.reshape(n, *self.low.shape[1:]) * self.box.radius
        logits, inputs = self.chain.forward(x)
        z = np.concatenate([np.zeros((n, 0)), *(z.reshape(n, -1) for z in inputs)], axis=1)
        return y, z[:, self.net.units], logits @ self.row

    def cuts(self, n=6, of=None):
        """Cuts at random: on pixels, on any units' outputs, later ones and their own, too."""
        of = np.arange(self.units) if of is None else of
        n = n if len(of) else 0
        shape = n, self.pixels + self.units
        coefficients = self.draw.normal(size=shape) * (self.draw.random(shape) < self.draw.random())
        return hull.Cuts(self.draw.choice(of, n).astype(np.int64) if n else np.zeros(0, np.int64),
                         coefficients.astype(np.float32))  # fmt: skip

    def duals(self, cuts, scale=0.5):
        sizes = self.units, self.units, len(cuts.units)
        parts = (self.draw.exponential(scale, n) * (self.draw.random(n) < 0.7) for n in sizes)
        return hull.Duals(*(part.astype(np.float32) for part in parts))

    def edges(self, low, high):
        """(low, high) of all that the units' inputs are sums of, where their own bounds are these."""
        edge = np.ones(self.pixels)
        return np.append(-edge, np.maximum(low, 0)), np.append(edge, np.maximum(high, 0))

    def drawn_in(self, z=None):
        """(low, high) around the inputs of some images, within the box's own: of the first of ``z``, or any."""
        z = self.seen(8)[1] if z is None else z
        z = z[: self.draw.integers(2, 8)]
        share = self.draw.random(self.units) * self.draw.integers(0, 2, self.units)
        return self.z_low + share * (z.min(0) - self.z_low), self.z_high + share * (z.max(0) - self.z_high)

    def least(self, low, high):
        """The smallest margin of the images whose units' inputs are in [low, high]: a linear program each pattern."""
        net, least = self.net, np.inf
        for pattern in itertools.product((0.0, 1.0), repeat=self.units):
            on, z, constant = np.array(pattern), np.zeros_like(net.image), np.zeros(self.units)
            for at in net.layers:
                z[at] = net.image[at] + (net.between[at] * on) @ z
                constant[at] = net.bias[at] + (net.between[at] * on) @ constant
            lower_, upper = np.where(on > 0, np.maximum(low, 0), low), np.where(on > 0, high, np.minimum(high, 0))
            rows = [(z, constant - lower_), (-z, upper - constant)]
            cost = net.row_image + (net.row_units * on) @ z
            edge = np.ones(self.pixels)
            found = linear_program(cost, -edge, edge, rows)
            least = min(least, found + net.row_bias + (net.row_units * on) @ constant)
        return least


def corners(low, high):
    return np.where(np.array(list(itertools.product((False, True), repeat=len(low)))), high, low)


# --- cuts -------------------------------------------------------------------------------------------------------------


@tiny_network
@fewer(0.5)
@given(seed=seeds)
def test_the_offset_is_the_least_with_which_a_cut_is_above_the_relu(network, seed):
    """relu(z) - cut is convex: its maximum is at a corner of the box of all that z is a sum of."""
    case = Case(network, seed)
    for low, high in ((case.z_low, case.z_high), case.drawn_in()):
        cuts, ends = case.cuts(), corners(*case.edges(low, high))
        z = ends @ case.hull.weight.T + case.net.bias
        value = ends @ (cuts.coefficients * case.hull.scale).T
        least = (np.maximum(z[:, cuts.units], 0) - value).max(0)
        found = hull.offsets(case.hull, cuts, low, high)
        np.testing.assert_allclose(found, least, rtol=0, atol=1e-11 * (1 + abs(least).max(initial=0)))


@every_network
@fewer(0.5)
@given(seed=seeds)
def test_cuts_are_above_the_relu_of_every_image(network, seed):
    case = Case(network, seed, eps=0.1)
    y, z, _ = case.seen()
    v = np.hstack([y, np.maximum(z, 0)])
    for low, high in ((case.z_low, case.z_high), case.drawn_in(z)):
        cuts = case.cuts()
        top = v @ (cuts.coefficients * case.hull.scale).T + hull.offsets(case.hull, cuts, low, high)
        inside = ((z >= low - 1e-12) & (z <= high + 1e-12)).all(1)
        assert inside.any()
        assert (np.maximum(z[:, cuts.units], 0) <= top + 1e-9)[inside].all()


def facets(w, low, high, bias):
    """(c (F, n), offsets (F,)): all facets above relu(w v + bias) over the box, as Anderson et al. have them.

    For a set I of inputs and one more, h, such that I leaves l(I) >= 0 of what z can be, and I with h less than 0:
    sum over I of w (v - where it is least), plus l(I) / (what h adds at most) of that of h.
    """
    least, most = np.where(w > 0, low, high), np.where(w > 0, high, low)
    found = []
    for n in range(len(w)):
        others = [i for i in range(len(w)) if i != n]
        for chosen in itertools.product((False, True), repeat=len(others)):
            set_ = np.zeros(len(w), bool)
            set_[others] = chosen

            def left(s):
                return bias + np.where(s, w * least, w * most).sum()

            with_h = set_.copy()
            with_h[n] = True
            if left(set_) >= 0 > left(with_h):
                c = np.where(set_, w, 0)
                c[n] = left(set_) / (most[n] - least[n])
                found.append((c, -(c * least).sum()))
    return np.array([c for c, _ in found]), np.array([k for _, k in found])


@tiny_network
@fewer(0.5)
@given(seed=seeds)
def test_the_facet_found_is_the_most_violated_of_all(network, seed):
    case = Case(network, seed)
    low, high = (case.z_low, case.z_high) if seed % 2 else case.drawn_in()
    v_low, v_high = case.edges(low, high)
    for share in (0.3, 1):  # of the way from an image to any point of the box
        y, z, _ = case.seen(1)
        v = np.append(y[0], np.clip(z[0], v_low[case.pixels :], v_high[case.pixels :]))
        v += share * (v_low + case.draw.random(len(v)) * (v_high - v_low) - v)
        cuts = hull.separate(case.hull, low, high, v)
        assert len(np.unique(cuts.units)) == len(cuts.units)
        offsets = dict(zip(cuts.units, hull.offsets(case.hull, cuts, low, high), strict=True))
        value = dict(zip(cuts.units, cuts.coefficients * case.hull.scale @ v, strict=True))
        for unit in range(case.units):
            w = case.hull.weight[unit]
            on = (w != 0) & (v_high > v_low)
            fixed = (w * v_low)[~on & (v_low == v_high)].sum() + case.net.bias[unit]
            c, k = facets(w[on], v_low[on], v_high[on], fixed)
            if not low[unit] < 0 < high[unit] or len(k) == 0:  # stable, if only in this box
                assert unit not in value
                continue
            lowest, a = (c @ v[on] + k).min(), v[case.pixels + unit]
            if abs(a - lowest - hull.VIOLATED) > 1e-6:
                assert (unit in value) == (a > lowest + hull.VIOLATED)
            if unit in value:
                top = value[unit] + offsets[unit]
                assert a > top + 0.9 * hull.VIOLATED - 1e-6
                assert abs(top - lowest) <= 1e-6 * (1 + abs(lowest) + abs(offsets[unit]))


@tiny_network
@fewer(0.5)
@given(seed=seeds)
def test_no_point_of_the_hull_is_cut_off(network, seed):
    case = Case(network, seed)
    y, z, _ = case.seen(30)
    v = np.hstack([y, np.maximum(z, 0)])
    mix = case.draw.dirichlet(np.full(30, 0.2), 20)
    for point in np.concatenate([v, mix @ v]):  # images, and points between them: in the hull of each unit
        assert len(hull.separate(case.hull, case.z_low, case.z_high, point).units) == 0
    for unit in range(case.units):  # corners of all that the unit is a sum of
        ends = corners(*case.edges(case.z_low, case.z_high))[case.draw.integers(0, 2 ** min(10, case.pixels), 12)]
        ends[:, case.pixels + unit] = np.maximum(ends @ case.hull.weight[unit] + case.net.bias[unit], 0)
        for point in case.draw.dirichlet(np.full(12, 0.3), 5) @ ends:
            assert unit not in hull.separate(case.hull, case.z_low, case.z_high, point).units


# --- bounds -----------------------------------------------------------------------------------------------------------


@every_network
@fewer(0.7)
@given(seed=seeds, scale=st.sampled_from([0.05, 0.5, 5]))
def test_no_image_is_below_the_bound_of_any_multipliers(network, seed, scale):
    case = Case(network, seed, eps=0.1)
    y, z, margins = case.seen()
    for low, high in ((case.z_low, case.z_high), case.drawn_in(z)):
        cuts = case.cuts()
        part = hull.evaluate(case.hull, cuts, case.duals(cuts, scale), low, high)
        k = part.bound[0] + abs(part.image[0]).sum()
        inside = ((z >= low - 1e-12) & (z <= high + 1e-12)).all(1)
        line = y[inside] @ part.image[0] + k
        assert inside.any()
        assert (line <= margins[inside] + 1e-10 * (1 + abs(line))).all()
        assert (part.bound <= line + 1e-10 * (1 + abs(line))).all()


@tiny_network
@fewer(0.4)
@given(seed=seeds)
def test_no_bound_is_above_the_least_margin_where_the_units_bounds_hold(network, seed):
    case = Case(network, seed)
    assume(case.units <= 7)
    low, high = case.drawn_in()
    least = case.least(low, high)
    program = hull.Program(case.hull, low, high, case.cuts(0))
    cuts, (v, _, duals) = case.cuts(0), program.solve(lambda: 60.0)
    bound, best = hull.evaluate(case.hull, cuts, duals, low, high).bound[0], program.highs.getObjectiveValue()
    assert bound <= least + TOLERANCE and bound == pytest.approx(best, abs=1e-6 * (1 + abs(best)))
    more = case.cuts(12).plus(hull.separate(case.hull, low, high, v))
    for factor in (0.5, 1, 2):  # near the best, and at random
        near = hull.Duals(*(factor * d * case.draw.uniform(0.7, 1.4, len(d)) for d in duals[:2]), case.duals(more)[2])
        for d in (near, near._replace(cuts=near.cuts * 0), case.duals(more)):
            assert hull.evaluate(case.hull, more, d, low, high).bound[0] <= least + TOLERANCE


@tiny_network
@fewer(0.4)
@given(seed=seeds)
def test_each_relaxation_is_between_the_one_before_and_the_truth(network, seed):
    """No multipliers <= linear program <= that with cuts <= the least margin; CROWN <= alpha-CROWN <= the program."""
    case = Case(network, seed)
    low, high = case.z_low, case.z_high
    nothing = hull.evaluate(case.hull, case.cuts(0), hull.Duals(*np.zeros((2, case.units)), np.zeros(0)), low, high)
    lines, row = [Lines.around(*r) for r in case.relus], case.row[None]
    chain = case.chain, case.box, lines, row, [0]
    by_lines = [lower(*chain).value[0], alpha_crown(*chain, steps=30, target=np.inf).value[0]]
    cuts = case.cuts(0)
    program, by_program = hull.Program(case.hull, low, high, cuts), []
    for _ in range(5):
        v, z, duals = program.solve(lambda: 60.0)
        np.testing.assert_allclose(z, case.hull.weight @ v + case.net.bias, rtol=0, atol=1e-6)
        by_program.append(program.highs.getObjectiveValue())
        part = hull.evaluate(case.hull, cuts, duals, low, high)
        assert part.bound[0] == pytest.approx(by_program[-1], abs=1e-6 * (1 + abs(by_program[-1])))
        more = hull.separate(case.hull, low, high, v)
        program.add(more)
        cuts = cuts.plus(more)
    least = min(case.minima().values())
    order = [by_lines[0], by_lines[1], by_program[0], by_program[-1], least]
    assert (np.diff(order) >= -1e-6).all() and (np.diff(by_program) >= -1e-6).all()
    assert nothing.bound[0] <= by_program[0] + 1e-6


def test_cuts_are_worth_something():
    """... in the test above: programs with cuts are often better, and one ReLU's hull is exact."""
    gains = []
    for seed in range(10):
        case = Case("mlp", seed)
        cuts, values = case.cuts(0), []
        program = hull.Program(case.hull, case.z_low, case.z_high, cuts)
        for _ in range(6):
            v, _, _ = program.solve(lambda: 60.0)
            values.append(program.highs.getObjectiveValue())
            program.add(hull.separate(case.hull, case.z_low, case.z_high, v))
        gains.append((values[-1] - values[0]) / (min(case.minima().values()) - values[0] + 1e-9))
    assert np.median(gains) > 0.1 and max(gains) > 0.4, gains


def test_a_hull_by_hand():
    """relu(x1 + x2) over [-1, 1]^2: at x = (1, -1), where z = 0, the triangle allows 1, and the hull 0 + 1 / 2.

    The facets are x1 + 1, x2 + 1 (a set of one input, all of it) ... of which x2 + 1 is 0 there.
    """
    model = mlp(np.random.default_rng(0), (1,), 2)
    for layer, weight in (("fc1", 1.0), ("fc2", [[-1, 0, 0]])):
        model.children[layer].params["weight"][...], model.children[layer].params["bias"][...] = weight, 0
    model.children["normalize"].buffers["mean"][...], model.children["normalize"].buffers["std"][...] = 0, 1
    chain, low, high = Chain(model), np.full((1, 1, 1, 2), -1.0), np.full((1, 1, 1, 2), 1.0)
    relus = crown(chain, low, high)
    row = margin_rows([0], [1], 3)[0]
    net = collapse(chain, low, high, relus, row)
    problem, ends = hull.Problem.of(net, np.ones(2)), net.ends(relus)
    assert [e.tolist() for e in ends] == [[-2.0], [2.0]]
    none = hull.Cuts(np.zeros(0, np.int64), np.zeros((0, 3), np.float32))
    cut = hull.separate(problem, *ends, np.array([1.0, -1.0, 1.0]))
    assert cut.coefficients.tolist() == [[0, 1, 0]] and hull.offsets(problem, cut, *ends).tolist() == [1]
    assert len(hull.separate(problem, *ends, np.array([1.0, -1.0, 0.0])).units) == 0
    assert len(hull.separate(problem, *ends, np.array([0.0, 0.0, 1.0])).units) == 0  # the triangle is the hull here
    for cuts, duals, bound in (
        (none, hull.Duals(np.zeros(1), np.ones(1), np.zeros(0)), -2),
        (cut, hull.Duals(np.zeros(1), np.zeros(1), np.ones(1)), -2),
        (cut, hull.Duals(np.zeros(1), np.zeros(1), np.full(1, 2.0)), -4),  # a's coefficient is 1, and its least is 0
    ):
        assert hull.evaluate(problem, cuts, duals, *ends).bound[0] == bound


# --- what is stable in a node -----------------------------------------------------------------------------------------


def whole_program(case, low, high, cuts):
    """The optimum of the program over all units, the stable ones as well, and both their bounds, or inf if no point
    is left: written down without any of the verifier's functions."""
    d, u, net = case.pixels, case.units, case.net
    chord = np.where((low < 0) & (high > 0), high / np.where(high > low, high - low, 1), low >= 0)
    top = np.where((low < 0) & (high > 0), -low * chord, 0)
    z, none, one = np.hstack([net.image, net.between]), np.zeros((u, d)), np.eye(u)
    rows = [
        (np.hstack([none, one]) - z, -net.bias),
        (chord[:, None] * z - np.hstack([none, one]), chord * net.bias + top),
    ]
    c = cuts.coefficients * case.hull.scale
    offset = hull.offsets(case.hull, cuts, low, high)
    rows.append((c - np.hstack([none, one])[cuts.units], offset))
    a_low, a_high = np.maximum(low, 0), np.maximum(high, 0)
    cost, edge = np.append(net.row_image, net.row_units), np.ones(d)
    return linear_program(cost, np.append(-edge, a_low), np.append(edge, a_high), rows) + net.row_bias


def some_stable(case):
    """(low, high) with about half of the units stable, around the inputs of one image, so that a point is left."""
    z = case.seen(1)[1][0]
    low, high = case.z_low.copy(), case.z_high.copy()
    near = case.draw.random(case.units) < 0.5
    share = case.draw.random(case.units) ** 2
    low[near], high[near] = ((1 - share) * z + share * low)[near], ((1 - share) * z + share * high)[near]
    cut = case.draw.random(case.units) < 0.3
    low[cut & (z > 0)], high[cut & (z <= 0)] = np.maximum(low, 0)[cut & (z > 0)], np.minimum(high, 0)[cut & (z <= 0)]
    return low, high


@every_network
@fewer(0.5)
@given(seed=seeds)
def test_a_program_without_the_stable_units_has_the_whole_ones_value_and_multipliers(network, seed):
    case = Case(network, seed, eps=0.2)
    low, high = some_stable(case)
    unstable = (low < 0) & (high > 0)
    cuts = case.cuts(4, np.flatnonzero(unstable))
    program, sides = hull.Program(case.hull, low, high, cuts), [0]
    assert program.highs.getNumCol() == case.pixels + 2 * unstable.sum()
    while len(sides):
        v, z, duals = program.solve(lambda: 60.0)
        sides = program.broken(z)
        program.add(case.cuts(0), sides)
    value = whole_program(case, low, high, cuts)
    assert program.highs.getObjectiveValue() == pytest.approx(value, abs=1e-5 * (1 + abs(value)))
    bound = hull.evaluate(case.hull, program.cuts, duals, low, high).bound[0]
    assert bound == pytest.approx(program.highs.getObjectiveValue(), abs=1e-6 * (1 + abs(value)))
    np.testing.assert_allclose(z, case.hull.weight @ v + case.net.bias, rtol=0, atol=1e-6)
    assert (v[case.pixels :] >= np.maximum(low, 0) - 2 * hull.VIOLATED).all()


def test_the_test_above_sees_both_sides_of_stable_units():
    kinds = set()
    for seed in range(40):
        case = Case("norm", seed, eps=0.2)
        low, high = some_stable(case)
        program, sides = hull.Program(case.hull, low, high, case.cuts(0)), [0]
        while len(sides):
            _, z, _ = program.solve(lambda: 60.0)
            sides = program.broken(z)
            program.add(case.cuts(0), sides)
        kinds |= {(s > 0, bool(low[abs(s) - 1] >= 0)) for s in program.pulling}
    assert kinds == {(True, True), (False, True), (False, False)}  # least, most, and "it is off"


@every_network
@fewer(0.5)
@given(seed=seeds)
def test_a_trees_bound_is_a_programs(network, seed):
    """Slopes, betas and signs as multipliers: the same bound, and the same linear function."""
    case = Case(network, seed, eps=0.1)
    signs, values = (x[0] for x in case.domains(case.net, 1))
    values = values.astype(np.float32)
    low = np.where(signs > 0, np.maximum(case.z_low, 0), case.z_low)
    high = np.where(signs < 0, np.minimum(case.z_high, 0), case.z_high)
    lines = Lines.around(low, high)
    part = backward(case.net, signs[None], values[None].astype(np.float64), (lines.upper[None], lines.offset[None]))
    duals = hull.by_lines(case.hull, signs, values, low, high)
    found = hull.evaluate(case.hull, case.cuts(0), duals, low, high)
    size = 1 + abs(part.bound[0]) + abs(part.image).sum()
    assert found.bound[0] == pytest.approx(part.bound[0], abs=1e-6 * size)
    np.testing.assert_allclose(found.image, part.image, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("gap", [-BAND, BAND])
def test_programs_that_begin_where_a_tree_is_say_the_same(gap):
    begun = 0
    for network, seed in itertools.product(("mlp", "deep"), range(12)):
        case = Case(network, seed)
        least = min(case.minima().values())
        tree = bab.Search(*case.args, case.row, threshold=least + gap)
        tree.run(lambda: 1.0, max_domains=1)
        drawn_in = tree.drawn_in()
        found = hull.Search(*case.args, case.row, threshold=least + gap, tree=tree).run(lambda: 60.0)
        audit(case, found, least, least + gap)
        assert found.status != "timeout"
        if found.status == "proved":
            assert len(found.proof["multipliers"]) >= len(drawn_in)
            assert not found.proof["split"][: len(drawn_in) + 1].any()
        begun += len(drawn_in) > 0
    assert gap > 0 or begun > 5  # else the tree has a counterexample before


# --- the search -------------------------------------------------------------------------------------------------------


def audit(case, tree, least, threshold):
    """Everything that must be true of an answer."""
    if tree.status == "proved":
        assert least > threshold and tree.image is None and threshold < tree.bound <= least + TOLERANCE
        proof = tree.proof
        kinds = {name: proof[name].dtype for name in proof}
        assert {kinds.pop(n) for n in ("units", "parent", "split", "cut_unit", "cut_start", "cut_index")} == {
            np.dtype(np.int32)
        }
        assert kinds.pop("limit") == np.float64 and set(kinds.values()) == {np.dtype(np.float32)}
        assert all((proof[n] >= 0).all() and np.isfinite(proof[n]).all() for n in ("below", "chord", "weights"))
        assert (len(proof["multipliers"]) == 0) == (proof["limit"].item() == np.inf)
        assert (proof["weights"] > 0).any(0).all()  # no cut that nobody uses
        forks = [proof["split"][proof["parent"] == node].tolist() for node in range(len(proof["parent"]))]
        assert len(proof["below"]) == sum(fork in ([], [0]) for fork in forks)
    else:
        assert tree.proof is None
        assert not tree.bound > least + TOLERANCE
    if tree.status == "candidate":
        assert least <= threshold and tree.image.shape == case.low.shape[1:]
        assert (tree.image >= case.low[0]).all() and (tree.image <= case.high[0]).all()
        assert case.margins(tree.image[None])[0] <= threshold


@tiny_network
@fewer(0.5)
@given(seed=seeds, gap=st.sampled_from([-2, -0.3, -0.03, -BAND, BAND, 0.03, 0.3, 2]))
def test_proved_exactly_if_the_minimum_is_above_the_threshold(network, seed, gap):
    case = Case(network, seed)
    least = min(case.minima().values())
    tree = case.search(threshold=least + gap)
    audit(case, tree, least, least + gap)
    assert tree.status != "timeout"


def test_the_test_above_sees_trees_of_every_kind(monkeypatch):
    seen, excluding = dict.fromkeys(("no point", "split", "restricted", "cut"), 0), hull.excluding

    def count(name, value):
        seen[name] += bool(value)
        return value

    monkeypatch.setattr(hull, "excluding", lambda *args: count("no point", excluding(*args)))
    for network, seed in itertools.product(("mlp", "deep"), range(12)):
        case = Case(network, seed)
        least = min(case.minima().values())
        tree = case.search(threshold=least - BAND)
        audit(case, tree, least, least - BAND)
        count("split", (tree.proof["split"] > 0).any())
        count("restricted", len(tree.proof["multipliers"]))
        count("cut", len(tree.proof["cut_unit"]))
    assert min(seen.values()) >= 3, seen


def test_a_node_that_is_drawn_in_to_nothing_has_a_row(monkeypatch):
    """It happens to no tiny network, whose programs prove such a node before: so let it be said of all nodes."""
    monkeypatch.setattr(hull, "is_empty", lambda *_: True)
    rows = []
    for seed in range(12):
        case = Case("mlp", seed)
        tree = case.search(threshold=min(case.minima().values()) - BAND)
        if tree.status == "proved" and len(tree.proof["multipliers"]):
            assert tree.proof["parent"].tolist() == [-1, 0] and tree.bound == tree.proof["limit"]
            assert [len(tree.proof[n]) for n in ("below", "chord", "weights")] == [2] * 3
            rows.append(tree.proof["below"][1].sum() + tree.proof["chord"][1].sum() + tree.proof["weights"][1].sum())
    assert len(rows) > 3 and not any(rows)


@pytest.mark.parametrize("gap", [-BAND, BAND])
@pytest.mark.parametrize("passes, rounds", [(1, 0), (1, 6), (6, 0)])
def test_without_cuts_or_restrictions_it_finds_the_same(passes, rounds, gap, monkeypatch):
    """Then the trees must be larger. A branch may have no point at all: its program says so, and it is closed."""
    monkeypatch.setattr(hull, "PASSES", passes)
    monkeypatch.setattr(hull, "ROUNDS", rounds)
    domains = []
    for network, seed in itertools.product(("mlp", "deep", "one layer"), range(8)):
        case = Case(network, seed)
        least = min(case.minima().values())
        tree = case.search(threshold=least + gap)
        audit(case, tree, least, least + gap)
        assert tree.status != "timeout"
        assert tree.status != "proved" or passes > 1 or len(tree.proof["cut_unit"]) == 0
        assert tree.status != "proved" or rounds or len(tree.proof["multipliers"]) == 0
        domains.append(tree.domains)
    assert max(domains) >= 5


@fewer(0.5)
@given(seed=seeds, gap=st.sampled_from([-0.3, -0.03, 0.03, 0.3]))
def test_a_network_with_padding(seed, gap):
    """Larger than brute force allows: no image is below what is proved, and a candidate is one."""
    case = Case("norm", seed, eps=0.1)
    _, _, margins = case.seen(400)
    tree = case.search(threshold=margins.min() + gap)
    seen = margins.min() if tree.image is None else min(margins.min(), case.margins(tree.image[None])[0])
    audit(case, tree, seen, margins.min() + gap)  # HiGHS may give up, which it seldom does


def test_a_box_that_is_a_point_or_clipped_and_units_without_weights():
    """Pixels with no width (their scale is 0), pixels at 0 and 1; bounds wider than need be make any unit unstable."""
    statuses = []
    for seed, eps in itertools.product(range(6), (0, 0.3)):
        case = Case("mlp", seed)
        case.chain.stages[0].layers[-1].params["weight"][:, 0] = 0
        stage = case.chain.stages[0]
        stage.bias = stage.apply(np.zeros((1, *stage.in_shape)))[0]
        case.low, case.high = image_box(np.array([[[[0.0, 1.0, 0.5]]]], np.float32), eps)
        case.low[0, 0, 0, 2] = case.high[0, 0, 0, 2] = 0.5
        case.relus = [(low - 0.1, high + 0.1) for low, high in crown(case.chain, case.low, case.high)]
        case.args = case.chain, case.low, case.high, case.relus
        case.see()
        assert (case.box.radius == 0).any() and (case.hull.weight[:, case.hull.scale == 0] == 0).all()
        least = min(case.minima().values())
        for gap in (-BAND, BAND):
            tree = case.search(threshold=least + gap)
            audit(case, tree, least, least + gap)
            statuses.append(tree.status)
    assert statuses == ["proved", "candidate"] * 12


def test_trees_with_every_unit_split_are_decided():
    """No restriction, no cuts, and bounds far too wide."""
    for seed in range(4):
        case = Case("one layer", seed, wider=5.0)
        assert case.units == 6
        least = min(case.minima().values())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hull, "PASSES", 1)
            patch.setattr(hull, "ROUNDS", 0)
            for gap in (-1e-4, 1e-4):
                tree = case.search(threshold=least + gap)
                audit(case, tree, least, least + gap)
                assert tree.status == ("proved" if gap < 0 else "candidate")


# --- fails closed -----------------------------------------------------------------------------------------------------


def test_bounds_that_are_not_numbers_prove_nothing():
    for place, side, value in itertools.product(range(2), range(2), (np.nan, np.inf)):
        case = Case("mlp", 0)
        case.relus[place][side][...] = value
        tree = case.search(threshold=-1e3)
        assert (tree.status, tree.proof, tree.image, tree.domains) == ("timeout", None, None, 0)
    case = Case("mlp", 0)
    assert case.search(threshold=-1e3).status == "proved"
    case.low[...] = np.nan
    assert case.search(threshold=-1e3).status == "timeout"


@pytest.mark.parametrize("wrong", [np.nan, -2e3, -1e3, -1e3 + 1.5e-3])
def test_what_is_evaluated_has_the_last_word(wrong, monkeypatch):
    """HiGHS's objective says that everything is proved; the multipliers do not, or not by enough: float64's slack is
    a millionth, twice."""
    real = hull.evaluate
    monkeypatch.setattr(hull, "ROUNDS", 0)  # nothing is drawn in by bounds that are not true
    monkeypatch.setattr(hull, "evaluate", lambda *args: real(*args)._replace(bound=np.array([wrong])))
    tree = Case("mlp", 0).search(threshold=-1e3)
    assert tree.status == "timeout" and tree.proof is None


def test_a_case_is_not_without_images_because_highs_says_so(monkeypatch):
    """The multiple of its ray must prove it."""
    case = Case("deep", 0)
    threshold = min(case.minima().values()) - BAND
    assert case.search(threshold=threshold).status == "proved"
    asked = []
    monkeypatch.setattr(hull, "excluding", lambda *args: asked.append(1) or hull.Duals(*(0 * m for m in args[2])))
    tree = case.search(threshold=threshold)
    assert asked and tree.status == "timeout" and tree.proof is None


def test_only_an_image_that_errs_is_a_candidate(monkeypatch):
    """Whatever HiGHS has found."""
    case = Case("mlp", 1)
    least = min(case.minima().values())
    monkeypatch.setattr(hull, "inner", lambda *_: np.array([np.inf]))
    tree = case.search(threshold=least + 0.1)
    assert tree.status == "timeout" and tree.image is None


def test_it_stops_when_it_should(monkeypatch):
    case = Case("norm", 3, eps=0.2)
    threshold = case.seen(400)[2].min() - BAND
    tree = case.search(threshold=threshold, cpu_limit=0)
    assert (tree.status, tree.domains, tree.proof, tree.image) == ("timeout", 0, None, None)
    for limit, seconds in ((3, 1e9), (10, 1e9), (30, 1e9), (1e9, 3)):  # of all programs, or of one
        ticks = itertools.count()
        monkeypatch.setattr(hull, "SECONDS", seconds)
        monkeypatch.setattr(hull.time, "process_time", lambda ticks=ticks: 0.5 * next(ticks))  # two looks at each event
        tree = case.search(threshold=threshold, cpu_limit=limit)
        monkeypatch.undo()
        assert tree.status == "timeout" and tree.proof is None
        assert min(limit, seconds) <= tree.seconds <= min(limit, 10 * seconds) + 6


def test_a_program_that_is_not_solved_ends_the_search(monkeypatch):
    case = Case("mlp", 0)
    monkeypatch.setattr(hull.Program, "solve", lambda *_: None)
    tree = case.search(threshold=-1e3)
    assert (tree.status, tree.proof, tree.domains) == ("timeout", None, 1)
