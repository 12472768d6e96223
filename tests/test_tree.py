"""CROWN through sums of branches: chains as before, no point breaks a bound, never above the exact minimum."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import box, conv_net, forward, points, randomise, sequence
from scipy.optimize import linprog

from nanomr import models
from nanomr.errors import UserError
from nanomr.layers import (
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
)
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify import interval
from nanomr.verify.bounds import crown as chains
from nanomr.verify.bounds import forms as forwards
from nanomr.verify.bounds import tree as module
from nanomr.verify.bounds.crown import Box, Lines, margin_rows
from nanomr.verify.bounds.forms import forms
from nanomr.verify.bounds.tree import Relus, Sum, Tree, crown, lower, margins
from nanomr.verify.chain import Chain


def blocks(*made, channels, size=4):
    """Blocks between a convolution and what a ResNet ends with."""

    def network(draw):
        layers = [Conv2d(1, 2, 3, 1, 1, bias=False), *(make() for make in made)]
        layers += [BatchNorm2d(channels, before_relu=True), ReLU(), AveragePool2d(), Flatten(), Linear(channels, 3)]
        return sequence(layers, (size, size, 1), draw)

    return network


def nested(draw):
    """A sum within a branch, of vectors behind one of images; none before the first sum is affine; two ReLUs."""
    inner = Residual({"a": Sequential({"c": Conv2d(1, 2, 3, 1, 1), "r": ReLU()}), "b": Conv2d(1, 2, 1)})
    outer = Residual({"a": Sequential({"inner": inner, "n": BatchNorm2d(2), "r": ReLU(), "c": Conv2d(2, 1, 1)})})
    vectors = Residual({"a": Sequential({"r": ReLU(), "rr": ReLU(), "fc": Linear(3, 3)})})
    layers = [outer, ReLU(), Flatten(), Linear(6, 3), vectors, ReLU(), Linear(3, 3)]
    model = sequence(layers, (3, 2, 1), draw)
    del model.children["normalize"]
    return model


CHAINS = {
    "mlp": lambda draw: randomise(models.mlp((6, 5, 4, 3), input_shape=(2, 1, 3)), draw),
    "linear": lambda draw: randomise(models.mlp((6, 3), input_shape=(2, 1, 3)), draw),
    "two convolutions": lambda draw: conv_net(draw, (4, 2, 1), (3, 1, 1)),
    "norms and pool": lambda draw: conv_net(draw, (3, 1, 1), (2, 1, 0), (6, 4), norm=True, pool=2),
}
SUMS = {
    "identity": blocks(lambda: PreActBlock(2, 2), channels=2),
    "projection": blocks(lambda: PreActBlock(2, 3, 2), channels=3),
    "raw shortcut": blocks(lambda: PreActBlock(2, 3, 2, out_shortcut=False), channels=3),
    "activated": blocks(lambda: PreActBlock(2, 2, activated_identity=True), channels=2),
    "two": blocks(lambda: PreActBlock(2, 2), lambda: PreActBlock(2, 3, 2), channels=3),
    "nested": nested,
    "both branches": lambda draw: tiny(draw),
}
NETWORKS = CHAINS | SUMS
each_chain, each_sum = pytest.mark.parametrize("network", CHAINS), pytest.mark.parametrize("network", SUMS)
every_network = pytest.mark.parametrize("network", NETWORKS)


class Setting:
    """A tree, boxes, what CROWN finds, and rows for every (label, rival) of each box."""

    def __init__(self, model, draw, eps=0.1, n=2, most=np.inf):
        self.model, self.tree = model, Tree(model)
        self.low, self.high = box(model, draw, eps, n)
        self.relus = crown(self.tree, self.low, self.high, most)
        k = self.tree.classes
        pairs = [(i, y, t) for i in range(n) for y in range(k) for t in range(k) if y != t]
        self.owner, label, rival = np.array(pairs).T
        self.rows = margin_rows(label, rival, k)
        self.bounds = margins(self.tree, self.low, self.high, self.rows, self.owner, most)

    def violation(self, draw, count=6):
        """By how much the network itself breaks the bounds, at the worst of some points."""
        worst = -np.inf
        for x in points(self.low, self.high, draw, count):
            logits, inputs = forward(self.model, x)
            found = np.einsum("sk,sk->s", self.rows, logits[self.owner])
            worst = max(worst, ((self.bounds - found) / (1 + abs(found))).max())
            for (low, high), z in zip(self.relus, inputs, strict=True):
                worst = max(worst, (np.maximum(low - z, z - high) / (1 + abs(z))).max())
        return worst


# --- the network, and chains ------------------------------------------------------------------------------------------


@every_network
@fewer(0.2)
@given(seed=seeds)
def test_a_tree_is_the_network(network, seed):
    draw = np.random.default_rng(seed)
    model = NETWORKS[network](draw)
    x, before = draw.random((2, *model.input_shape)), model.state_dict()
    tree = Tree(model)
    logits, inputs = tree.forward(x)
    wanted, z = forward(model, x)
    for found, expected in zip([logits, *inputs], [wanted, *z], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12 * (1 + abs(expected).max()))
    assert [a.shape[1:] for a in inputs] == tree.relu_shapes and tree.classes == logits.shape[1]
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"jin_v1": True}, {"out_shortcut": False, "bn_before_fc": False}], ids=str)
def test_the_papers_networks(options, rng):
    model = randomise(models.preact_resnet18(width=2, input_shape=(8, 8, 3), classes=3, **options), rng)
    setting = Setting(model, rng, 1e-4, n=1)
    np.testing.assert_allclose(setting.tree.forward(setting.low)[0], model.forward(setting.low)[0], rtol=1e-9)
    assert setting.violation(rng) <= 1e-9
    assert len(setting.relus) == (16 if "bn_before_fc" in options else 17)


@each_chain
@fewer(0.2)
@given(seed=seeds, eps=st.sampled_from([1e-3, 0.05, 0.3]))
def test_of_a_chain_the_bounds_are_those_of_the_chain(network, seed, eps):
    draw = np.random.default_rng(seed)
    setting = Setting(CHAINS[network](draw), draw, eps)
    chain = Chain(setting.model)
    relus = chains.crown(chain, setting.low, setting.high)
    for found, wanted in zip(setting.relus, relus, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-9 * (1 + abs(np.array(wanted)).max()))
    lines, images = [Lines.around(*ends) for ends in relus], Box.between(setting.low, setting.high)
    wanted = chains.lower(chain, images, lines, setting.rows, setting.owner)
    found = lower(setting.tree.steps, images, lines, setting.rows, setting.owner)
    np.testing.assert_allclose(found.value, wanted.value, atol=1e-9 * (1 + abs(wanted.value).max()))
    np.testing.assert_allclose(found.image, wanted.image, atol=1e-9 * (1 + abs(wanted.image).max()))


# --- sums -------------------------------------------------------------------------------------------------------------


@each_sum
@fewer(0.4)
@given(seed=seeds, eps=st.sampled_from([0.0, 1e-6, 0.01, 0.05, 0.3, 1.0]), most=st.sampled_from([0, 10, np.inf]))
def test_no_point_of_the_box_breaks_a_bound(network, seed, eps, most):
    draw = np.random.default_rng(seed)
    assert Setting(SUMS[network](draw), draw, eps, most=most).violation(draw) <= 1e-9


@each_sum
@fewer(0.3)
@given(seed=seeds, eps=st.sampled_from([1e-6, 0.01, 0.1, 1.0]))
def test_at_least_as_tight_as_intervals_which_are_those_of_the_network(network, seed, eps):
    draw = np.random.default_rng(seed)
    setting = Setting(SUMS[network](draw), draw, eps)
    _, wanted = interval(setting.model, setting.low, setting.high)
    plain = crown(setting.tree, setting.low, setting.high, most=0)
    for (low, high), (a, b), (c, d) in zip(plain, wanted, setting.relus, strict=True):
        slack = 1e-9 * (1 + abs(a).max() + abs(b).max())
        np.testing.assert_allclose(low, a, atol=slack)
        np.testing.assert_allclose(high, b, atol=slack)
        assert (c >= low - slack).all() and (d <= high + slack).all()


def test_and_tighter_where_a_sum_cancels(rng):
    """x - relu(x) - relu(-x) ... is 0 in the part of the box where x >= 0; intervals forget what they added."""
    body = Sequential({"r": ReLU(), "fc": Linear(1, 1)})
    model = models.Model(
        {"flatten": Flatten(), "sum": Residual({"body": body}), "r": ReLU(), "fc": Linear(1, 1)}, "x", (1, 1, 1)
    )
    model.astype(np.float64)
    for name, layer in model.walk():
        if layer.params:
            layer.params["weight"][...], layer.params["bias"][...] = (-1 if "body" in name else 1), 0
    low, high = np.full((1, 1, 1, 1), 0.25), np.full((1, 1, 1, 1), 1.0)
    tree = Tree(model)
    (_, (a, b)), (_, (c, d)) = (crown(tree, low, high, most) for most in (0, np.inf))
    assert (a.item(), b.item()) == (-0.75, 0.75) and abs(c.item()) < 1e-15 and abs(d.item()) < 1e-15


def test_most_leaves_images_with_more_unstable_relus_alone(rng):
    """In the first layer that is tightened: what is before it is the same, however many may be."""
    model = SUMS["two"](rng)
    x, eps = rng.random((1, *model.input_shape)), np.array([0.3, 0.02])[:, None, None, None]
    low, high = x - eps, x + eps
    plain = crown(Tree(model), low, high, 0)[1]
    many, few = ((plain[0] < 0) & (plain[1] > 0)).reshape(2, -1).sum(1)
    assert many > few > 0
    full, some = (crown(Tree(model), low, high, most)[1] for most in (np.inf, few))
    for side in (0, 1):
        np.testing.assert_array_equal(some[side][0], plain[side][0])
        np.testing.assert_allclose(some[side][1], full[side][1], rtol=1e-9)
        assert (full[side] != plain[side]).reshape(2, -1).any(1).all()


@each_sum
def test_images_of_a_batch_do_not_mix(network, rng):
    setting = Setting(SUMS[network](rng), rng, 0.1, n=3)
    for i in range(3):
        own, of = slice(i, i + 1), setting.owner == i
        alone = margins(setting.tree, setting.low[own], setting.high[own], setting.rows[of], 0 * setting.owner[of])
        np.testing.assert_allclose(alone, setting.bounds[of], atol=1e-9 * (1 + abs(alone).max()))


def test_nan_proves_nothing(rng):
    setting = Setting(SUMS["two"](rng), rng)
    setting.low[0, 0, 0, 0] = np.nan
    found = margins(setting.tree, setting.low, setting.high, setting.rows, setting.owner)
    assert np.isnan(found[setting.owner == 0]).all() and np.isfinite(found[setting.owner == 1]).all()


# --- affine forms, carried forwards -----------------------------------------------------------------------------------


def broken(model, low, high, relus, draw, count=6):
    """By how much the network's ReLU inputs break bounds, at the worst of some points."""
    worst = -np.inf
    for x in points(low, high, draw, count):
        for (a, b), z in zip(relus, forward(model, x)[1], strict=True):
            worst = max(worst, (np.maximum(a - z, z - b) / (1 + abs(z))).max())
    return worst


@every_network
@fewer(0.4)
@given(seed=seeds, eps=st.sampled_from([0.0, 1e-6, 0.01, 0.05, 0.3, 1.0]), most=st.sampled_from([0, 4, np.inf]),
       room=st.sampled_from([0, 3, 512]))  # fmt: skip
def test_no_point_breaks_a_form_nor_what_crown_makes_of_it(network, seed, eps, most, room):
    draw = np.random.default_rng(seed)
    setting = Setting(NETWORKS[network](draw), draw, eps, most=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwards, "ROOM", room)
        known = forms(setting.tree, setting.low, setting.high, most)
    assert broken(setting.model, setting.low, setting.high, known, draw) <= 1e-9
    box_and_rows = setting.low, setting.high, setting.rows, setting.owner
    setting.relus = crown(setting.tree, setting.low, setting.high, 5, known)
    setting.bounds = margins(setting.tree, *box_and_rows, 5, known)
    assert setting.violation(draw) <= 1e-9
    for (a, b), (c, d) in zip(setting.relus, known, strict=True):
        assert (a >= c).all() and (b <= d).all()


@each_sum
def test_where_nothing_is_unstable_a_form_is_exact(network, rng):
    """The network is affine in the box: each pixel moves a ReLU's input by what it does alone."""
    model = SUMS[network](rng)
    low, high = box(model, rng, 1e-6, 1)
    tree = Tree(model)
    found, plain = forms(tree, low, high), crown(tree, low, high, 0)
    assert not any(((a < 0) & (b > 0)).any() for a, b in found)
    centre, moves = 0.5 * (low + high), np.diag(0.5 * (high - low).ravel()).reshape(-1, *model.input_shape)
    for (a, b), (c, d), at, moved in zip(
        found, plain, forward(model, centre)[1], forward(model, centre + moves)[1], strict=True
    ):
        exact = abs(moved - at).sum(0)
        np.testing.assert_allclose(0.5 * (b - a)[0], exact, rtol=1e-6, atol=1e-14)
        assert (0.5 * (d - c)[0] >= exact - 1e-12).all()
    assert any(((d - c) > 1.05 * (b - a)).any() for (a, b), (c, d) in zip(found, plain, strict=True))


def test_rows_on_the_way_make_forms_narrower(rng):
    """As a rule: with other slopes, a form may be wider somewhere."""
    model = SUMS["two"](rng)
    low, high = box(model, rng, 0.02)
    plain, narrow = (forms(Tree(model), low, high, most)[-1] for most in (0, np.inf))
    assert (narrow[1] - narrow[0]).sum() < 0.99 * (plain[1] - plain[0]).sum()


def test_strips_that_are_symbols_make_forms_narrower(rng, monkeypatch):
    model = SUMS["two"](rng)
    low, high = box(model, rng, 0.02)
    symbols = forms(Tree(model), low, high)[-1]
    monkeypatch.setattr(forwards, "ROOM", 0)
    error = forms(Tree(model), low, high)[-1]
    assert (symbols[1] - symbols[0]).sum() < 0.999 * (error[1] - error[0]).sum()


def test_a_form_that_is_not_a_number_proves_nothing(rng):
    model = SUMS["two"](rng)
    low, high = box(model, rng, 0.05)
    low[0, 0, 0, 0] = np.nan
    found = forms(Tree(model), low, high)
    assert all(np.isnan(a[0]).any() and np.isnan(b[0]).any() and np.isfinite(a[1]).all() for a, b in found)


FORM_BUGS = {
    "the strip is forgotten": lambda line: line._replace(offset=0 * line.offset),
    "half of the slope": lambda line: line._replace(upper=0.5 * line.upper),
    "an unstable ReLU is on": lambda line: line._replace(
        upper=np.where(line.unstable, 1, line.upper), offset=0 * line.offset
    ),
}


@pytest.mark.parametrize("bug", [None, *FORM_BUGS, "a branch's error is dropped"])
def test_points_would_break_wrong_forms(bug, monkeypatch):
    if bug in FORM_BUGS:
        monkeypatch.setattr(
            forwards, "Lines", type("Wrong", (), {"around": lambda *ends: FORM_BUGS[bug](Lines.around(*ends))})
        )
    elif bug:
        monkeypatch.setattr(forwards, "ROOM", 0)
        kept = forwards._through
        monkeypatch.setattr(
            forwards, "_through", lambda layer, form: kept(layer, form._replace(radius=0 * form.radius))
        )
    worst = -np.inf
    for seed in range(6):
        draw = np.random.default_rng(seed)
        model = SUMS["two" if seed % 2 else "raw shortcut"](draw)
        low, high = box(model, draw, 0.1)
        worst = max(worst, broken(model, low, high, forms(Tree(model), low, high), draw, 10))
    assert (worst > 1e-6) == (bug is not None)


# --- brute force ------------------------------------------------------------------------------------------------------


class Fixed:
    """A tap that takes the ReLUs' on and off from a list: the network is affine then."""

    def __init__(self, on):
        self.on, self.z = list(on), []

    def forward(self, z):
        z = z.full() if hasattr(z, "full") else z
        self.z.append(z)
        on = np.array([self.on.pop(0) for _ in range(z[0].size)]).reshape(z.shape[1:])
        return z * on, None


def exact_minimum(model, low, high, row, relus):
    """The minimum of row . logits over the box of one image: a linear program for each pattern of the ReLUs."""
    size, best = low.size, np.inf
    at = np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *model.input_shape)
    for on in itertools.product((0, 1), repeat=relus):
        tap = Fixed(on)
        logits = model.forward(at, tap=tap)[0] @ row
        z = np.concatenate([part.reshape(size + 1, -1) for part in tap.z], 1)
        sign = 1 - 2 * np.array(on)  # z <= 0 where off
        slopes = (z[1:] - z[0]).T * sign[:, None]
        ends = np.stack([low.ravel(), high.ravel()], 1)
        found = linprog(logits[1:] - logits[0], slopes, -z[0] * sign, bounds=ends)
        best = min(best, found.fun + logits[0]) if found.status == 0 else best
    return best


def tiny(draw):
    """Seven ReLUs: a sum of two branches with ReLUs in both, an identity shortcut behind it."""
    two = Residual({"a": Sequential({"fc": Linear(2, 2), "r": ReLU(), "g": Linear(2, 2)}),
                    "b": Sequential({"fc": Linear(2, 2), "r": ReLU()})})  # fmt: skip
    one = Residual({"a": Sequential({"r": ReLU(), "fc": Linear(2, 2)})})
    children = {"flatten": Flatten(), "two": two, "one": one, "fc": Linear(2, 1), "r": ReLU(), "end": Linear(1, 2)}
    return randomise(models.Model(children, "tiny", (1, 2, 1), int(draw.integers(1000))), draw)


def tiny_block(draw):
    """A PreActBlock on one pixel: three ReLUs, and batch norms of either sign."""
    children = {
        "block": PreActBlock(1, 2, 1, out_shortcut=bool(draw.integers(2))),
        "bn": BatchNorm2d(2, before_relu=True), "r": ReLU(), "flatten": Flatten(), "fc": Linear(2, 2),
    }  # fmt: skip
    return randomise(models.Model(children, "tiny", (1, 1, 1), int(draw.integers(1000))), draw)


@pytest.mark.parametrize("make, relus", [(tiny, 7), (tiny_block, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_never_above_the_exact_minimum_and_equal_where_nothing_is_unstable(make, relus, seed):
    draw = np.random.default_rng(seed)
    model, row = make(draw), np.array([1.0, -1.0])
    for eps in (0.5, 1e-7):
        low, high = box(model, draw, eps, 1)
        exact = exact_minimum(model, low[0], high[0], row, relus)
        found = margins(Tree(model), low, high, row[None], [0]).item()
        assert found <= exact + 1e-9 * (1 + abs(exact))
        if eps < 1e-6:
            assert found >= exact - 1e-5 * (1 + abs(exact))


# --- what is refused, and planted bugs --------------------------------------------------------------------------------


class Swish(Layer):
    pass


def test_a_layer_without_bounds_is_refused_by_name(rng):
    body = Sequential({"conv": Conv2d(2, 2, 1), "odd": Swish()})
    with pytest.raises(UserError, match=r"'0\.body\.odd' \(Swish\)"):
        Tree(sequence([Residual({"body": body}), Flatten()], (2, 2, 2), rng))


@pytest.mark.parametrize("name", ["1.conv1.weight", "1.bn1.running_mean", "1.shortcut.0.weight", "6.bias"])
def test_weights_that_are_not_finite_are_refused(name, rng):
    model = SUMS["projection"](rng)
    path, _, key = name.rpartition(".")
    layer = dict(model.walk())[path]
    (layer.params if key in layer.params else layer.buffers)[key].flat[0] = np.nan
    with pytest.raises(UserError, match="finite"):
        Tree(model)


RIGHT = module._back


def back(change):
    """``_back`` with ``change`` in the place of what a step does; where that is None, the step as it is."""

    def wrong(steps, a, value, lines, of):
        for step in reversed(steps):
            changed = change(step, a, value, lines, of, wrong)
            a = RIGHT([step], a, value, lines, of) if changed is None else changed
        return a

    return wrong


def dropped(step, a, value, lines, of, again):
    return again(step.branches[0], a, value, lines, of) if isinstance(step, Sum) else None


def averaged(step, a, value, lines, of, again):
    return 0.5 * sum(again(b, a, value, lines, of) for b in step.branches) if isinstance(step, Sum) else None


def swapped(step, a, value, lines, of, again):
    if isinstance(step, Sum):
        return sum(again(b, a, value, lines, of) for b in step.branches)
    if isinstance(step, Relus) and step.number and lines[step.number - 1].lower.shape == lines[step.number].lower.shape:
        return RIGHT([Relus(step.number - 1)], a, value, lines, of)


def positive(layers, norm):
    norm.params["weight"] = abs(norm.params["weight"])
    module.KEPT(layers, norm)


def without_mean(layers, norm):
    norm.buffers["running_mean"] = 0 * norm.buffers["running_mean"]
    module.KEPT(layers, norm)


def other_shortcut(layer, prefix="", kept=module._parts):
    for block in (below for _, below in layer.walk() if isinstance(below, PreActBlock)):
        block.shortcut_reads_h = not block.shortcut_reads_h and prefix == ""
    return kept(layer, prefix)


BUGS = {
    "the shortcut is dropped": ("_back", back(dropped)),
    "the branches are averaged": ("_back", back(averaged)),
    "another layer's slopes": ("_back", back(swapped)),
    "a negative scale is taken for positive": ("fold", positive),
    "the running mean is forgotten": ("fold", without_mean),
    "the shortcut reads the other value": ("_parts", other_shortcut),
}


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_points_would_break_wrong_bounds(bug, monkeypatch):
    monkeypatch.setattr(module, "KEPT", module.fold, raising=False)
    if bug:
        monkeypatch.setattr(module, *BUGS[bug])
    worst = -np.inf
    for seed in range(6):
        draw = np.random.default_rng(seed)
        worst = max(worst, Setting(SUMS["two" if seed % 2 else "raw shortcut"](draw), draw, 0.05).violation(draw, 10))
    assert (worst > 1e-6) == (bug is not None)
