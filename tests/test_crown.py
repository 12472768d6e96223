"""CROWN and alpha-CROWN: no point of a box breaks a bound, tighter than intervals, never above the exact minimum."""

import itertools
from fractions import Fraction

import highspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import box, conv_net, points, randomise, sequence

from nanomr import models
from nanomr.attacks.common import Linf
from nanomr.errors import UserError
from nanomr.gradcheck import GradientError, check_vjp
from nanomr.layers import AveragePool2d, Conv2d, Flatten, Linear, ReLU
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify import interval
from nanomr.verify.bounds import crown as module
from nanomr.verify.bounds.crown import (
    Box,
    Lines,
    alpha_crown,
    crown,
    image_box,
    lower,
    margin_rows,
    minimiser,
    slope_gradients,
)
from nanomr.verify.chain import Chain

# kernel, stride, padding of two convolutions, and the size of the image: windows that leave pixels over, lopsided
# padding, windows of nothing but padding, strides beyond the kernel
PAIRS = {
    "kernel 4": ((4, 2, (1,) * 4), (4, 2, (1,) * 4), (8, 8)),
    "kernel 4, odd": ((4, 2, (1,) * 4), (4, 2, (1,) * 4), (9, 7)),
    "kernel 5": ((5, 2, (1, 2, 1, 2)), (5, 2, (1, 2, 1, 2)), (8, 8)),
    "kernel 5, odd": ((5, 2, (1, 2, 1, 2)), (5, 2, (1, 2, 1, 2)), (7, 10)),
    "1x1": ((1, 1, 0), (1, 1, 0), (3, 2)),
    "1x1 between strides": ((1, 2, 0), (3, 1, 1), (6, 5)),
    "lopsided": ((3, 1, (2, 0, 0, 1)), (2, 3, (0, 2, 1, 0)), (6, 7)),
    "much padding": ((2, 3, (2, 2, 1, 2)), (3, 2, (3, 1, 2, 3)), (4, 6)),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def tiny(draw, hidden=(5, 4), inputs=3, classes=3):
    return randomise(models.mlp((inputs, *hidden, classes), input_shape=(1, 1, inputs)), draw)


def conv_pair(name, draw, **options):
    first, second, size = PAIRS[name]
    return conv_net(draw, first, second, size, **options)


def relu_first(draw):
    model = sequence([ReLU(), Flatten(), Linear(8, 4), ReLU(), Linear(4, 3)], (2, 2, 2), draw)
    del model.children["normalize"]  # the first stage is empty
    return model


NETWORKS = {
    "mlp": tiny,
    "deep": lambda draw: tiny(draw, (4, 5, 3, 4)),
    "linear": lambda draw: tiny(draw, ()),
    "pool": lambda draw: conv_net(draw, (3, 1, 1), (2, 1, 0), (6, 4), pool=2),
    "norm": lambda draw: conv_net(draw, (4, 2, 1), (3, 1, 1), norm=True, bias=False),
    "a ReLU first": relu_first,
    **{name: lambda draw, name=name: conv_pair(name, draw) for name in PAIRS},
}
every_network = pytest.mark.parametrize("network", NETWORKS)


class Setting:
    """A chain, boxes, and what CROWN finds: ``relus``, ``lines``, and ``rows`` for every (label, rival) of each box."""

    def __init__(self, model, draw, eps=0.1, n=2, dtype=np.float64):
        self.chain = Chain(model, dtype)
        self.low, self.high = box(model, draw, eps, n)
        self.box = Box.between(self.low.astype(dtype), self.high.astype(dtype))
        self.relus = crown(self.chain, self.low, self.high)
        self.lines = [Lines.around(*bounds) for bounds in self.relus]
        pairs = list(itertools.permutations(range(self.chain.classes), 2))
        self.owner = np.repeat(np.arange(n), len(pairs))
        self.rows = margin_rows(*np.tile(np.array(pairs), (n, 1)).T, self.chain.classes)
        (logits_low, logits_high), self.interval = interval_of(self.chain, self.low, self.high)
        # Every number on the way is below this. Sums of a few hundred terms, in a few layers, each rounded by 1.1e-16
        # of the largest term: 1e-12 of it is more than enough.
        self.scale = 1 + max(abs(z).max() for z in itertools.chain((logits_low, logits_high), *self.interval))

    def bound(self, slopes=None, forces=None):
        return lower(self.chain, self.box, self.lines, self.rows, self.owner, slopes, forces)

    def start(self):
        return [line.lower[self.owner].copy() for line in self.lines]

    def violation(self, draw, value=None, count=6):
        """By how much, in units of the scale, any point breaks the bounds (negative: by none)."""
        value, worst = self.bound() if value is None else value, -np.inf
        corner = minimiser(self.box, value.image, self.owner)
        tried = [x[self.owner] for x in points(self.low, self.high, draw, count)] + [corner]
        for x in tried:
            logits, inputs = self.chain.forward(x)
            worst = max(worst, (value.value - (logits * self.rows).sum(1)).max())
            for (low, high), z in zip(self.relus, inputs, strict=True):
                worst = max(worst, (low[self.owner] - z).max(), (z - high[self.owner]).max())
        return worst / self.scale


def interval_of(chain, low, high):
    """Interval bounds, by plain matrices: ((low, high) of the logits, [(low, high) of each ReLU's input])."""
    relus, (low, high) = [], (low.astype(np.float64), high.astype(np.float64))
    for k, stage in enumerate(chain.stages):
        if k:
            relus.append((low, high))
            low, high = np.maximum(low, 0), np.maximum(high, 0)
        for layer, x in zip(stage.layers, stage.inputs, strict=True):  # layer by layer, as intervals are
            matrix, offset = matrix_of(layer.apply, x.shape[1:])
            shape = layer.apply(x).shape[1:]
            centre, radius = ((z.reshape(len(z), -1) / 2) for z in (high + low, high - low))
            centre, radius = centre @ matrix.T + offset, radius @ abs(matrix).T
            low, high = ((centre + sign * radius).reshape(-1, *shape) for sign in (-1, 1))
    return (low, high), relus


def matrix_of(apply, shape):
    """(A, b) of the affine map ``apply``, from its values on a basis."""
    size = int(np.prod(shape))
    values = apply(np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *shape)).reshape(size + 1, -1)
    return (values[1:] - values[0]).T, values[0]


# --- soundness --------------------------------------------------------------------------------------------------------


@every_network
@fewer(0.4)
@given(seed=seeds, eps=st.sampled_from([0.0, 1e-6, 0.01, 0.05, 0.3, 1.0]))
def test_no_point_of_the_box_breaks_a_bound(network, seed, eps):
    draw = np.random.default_rng(seed)
    model = NETWORKS[network](draw)
    if "normalize" in model.children:
        model.children["normalize"].buffers["std"] *= draw.choice([-1, 1])  # nobody's, but the rules allow for it
    setting = Setting(model, draw, eps)
    assert setting.violation(draw) < 1e-12
    slopes = [draw.choice([0, 1, draw.random()], s.shape) for s in setting.start()]
    assert setting.violation(draw, setting.bound(slopes)) < 1e-12  # whichever the slopes


@every_network
@fewer(0.4)
@given(seed=seeds, eps=st.sampled_from([1e-6, 0.01, 0.1, 1.0]))
def test_crown_is_at_least_as_tight_as_intervals(network, seed, eps):
    draw = np.random.default_rng(seed)
    setting = Setting(NETWORKS[network](draw), draw, eps)
    slack = 1e-12 * setting.scale
    for (low, high), (loose_low, loose_high) in zip(setting.relus, setting.interval, strict=True):
        assert np.all(low >= loose_low - slack) and np.all(high <= loose_high + slack)
        assert np.all(low <= high + slack)


def test_and_tighter_where_it_matters(rng):
    """Not only never worse: the second layer's boxes are clearly narrower."""
    for network in ("mlp", "kernel 4", "kernel 5", "norm", "pool"):
        setting = Setting(NETWORKS[network](rng), rng, 0.3)
        widths = [(high - low).sum() for low, high in (setting.relus[1], setting.interval[1])]
        assert widths[0] < 0.97 * widths[1], network
        assert setting.violation(rng) > -1, network


@every_network
def test_the_chains_intervals_are_those_of_the_network(network, rng):
    """crown() and ``bounds.interval`` share their rules; they agree where CROWN has nothing to add."""
    model = NETWORKS[network](rng)
    setting = Setting(model, rng, 0.1)
    _, relus = interval(model, setting.low, setting.high)
    for k, (one, other) in enumerate(zip(setting.relus, relus, strict=True)):
        if k == 0:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * setting.scale)


@pytest.mark.parametrize("network", ["mlp", "deep", "linear", "kernel 4", "kernel 5"])
def test_a_box_of_one_point_is_the_forward_pass(network, rng):
    setting = Setting(NETWORKS[network](rng), rng, 0.0)
    logits, inputs = setting.chain.forward(setting.low)
    for (low, high), z in zip(setting.relus, inputs, strict=True):
        np.testing.assert_allclose(low, z, rtol=0, atol=1e-12 * setting.scale)
        np.testing.assert_allclose(high, z, rtol=0, atol=1e-12 * setting.scale)
    margins = (logits[setting.owner] * setting.rows).sum(1)
    np.testing.assert_allclose(setting.bound().value, margins, rtol=0, atol=1e-12 * setting.scale)


def test_a_network_without_relus_is_bounded_exactly(rng):
    setting = Setting(NETWORKS["linear"](rng), rng, 0.2)
    assert setting.relus == []
    bound = setting.bound()
    logits, _ = setting.chain.forward(minimiser(setting.box, bound.image, setting.owner))
    np.testing.assert_allclose(bound.value, (logits * setting.rows).sum(1), rtol=0, atol=1e-12 * setting.scale)
    found = alpha_crown(setting.chain, setting.box, [], setting.rows, setting.owner, steps=2)
    np.testing.assert_array_equal(found.value, bound.value)


# --- the lines --------------------------------------------------------------------------------------------------------


@given(st.floats(-10, 10), st.floats(0, 10), st.floats(0, 1), st.floats(0, 1))
def test_lines_enclose_the_relu_at_both_ends_and_between(low, width, place, slope):
    high = low + width
    line = Lines.around(np.array([low]), np.array([high]))
    for z in (low, high, low + place * (high - low), min(max(0.0, low), high)):
        lower_slope = slope if line.unstable[0] else line.lower[0]
        for under in (lower_slope, line.lower[0]):
            assert under * z <= max(z, 0)
        assert line.upper[0] * z + line.offset[0] >= max(z, 0) - 1e-15 * max(-low, high)
    assert line.unstable[0] == (low < 0 < high)
    if line.unstable[0]:
        assert line.lower[0] == (high > -low) and 0 <= line.upper[0] <= 1  # the slope with the smaller triangle


@pytest.mark.parametrize(
    "low, high, lines",
    [
        (0.0, 2.0, (1, 1, 0, False)),
        (-2.0, 0.0, (0, 0, 0, False)),
        (0.0, 0.0, (1, 1, 0, False)),
        (1.0, 2.0, (1, 1, 0, False)),
        (-2.0, -1.0, (0, 0, 0, False)),
        (-1.0, 3.0, (1, 0.75, 0.75, True)),
        (-3.0, 1.0, (0, 0.25, 0.75, True)),
        (-1.0, 1.0, (0, 0.5, 0.5, True)),
        (-5e-324, 5e-324, (0, 0.5, 0, True)),
    ],
)
def test_lines_by_hand(low, high, lines):
    found = Lines.around(np.array([low]), np.array([high]))
    assert tuple(v[0] for v in found) == lines
    single = Lines.around(np.array([low], np.float32), np.array([high], np.float32))
    assert [v.dtype for v in single] == [np.float32] * 3 + [bool]


@pytest.mark.parametrize("low, high", [(np.nan, -1.0), (np.nan, 1.0), (1.0, np.nan), (-1.0, np.nan), (np.nan, np.nan)])
def test_a_bound_that_is_not_a_number_makes_lines_that_prove_nothing(low, high):
    found = Lines.around(np.array([low, -1.0]), np.array([high, 2.0]))
    assert np.isnan(found.lower[0]) and np.isnan(found.upper[0]) and np.isnan(found.offset[0])
    assert not np.isnan([v[1] for v in found]).any()


# --- nothing is proved by NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "linear", "pool", "kernel 4", "kernel 5"])
@pytest.mark.parametrize("side", ["low", "high", "both"])
def test_one_nan_proves_nothing(network, side, rng):
    model = NETWORKS[network](rng)
    *_, last = model.children.values()
    last.params["bias"][...] = [1e6, 0, 0]  # the first class wins wherever numbers are numbers
    chain = Chain(model)
    low, high = box(model, rng, 0.05, n=2)
    pixel = tuple(n // 2 for n in low.shape[1:])
    for bound in (low, high) if side == "both" else (low if side == "low" else high,):
        bound[(0, *pixel)] = np.nan
    lines = [Lines.around(*bounds) for bounds in crown(chain, low, high)]
    owner = np.array([0, 0, 1, 1])
    rows = margin_rows(np.zeros(4, int), np.array([1, 2, 1, 2]), 3)
    boxes = Box.between(low, high)
    value = lower(chain, boxes, lines, rows, owner).value
    assert (value > 0).tolist() == [False, False, True, True]
    found = alpha_crown(chain, boxes, lines, rows, owner, steps=2)
    assert (found.value > 0).tolist() == [False, False, True, True]
    assert np.all(found.value[:2] == -np.inf)


def test_nan_slopes_are_no_improvement(rng):
    setting = Setting(tiny(rng), rng, 0.5)
    slopes = setting.start()
    slopes[0][...] = np.nan
    value = setting.bound(slopes).value
    assert np.isnan(value).any() and not (value[np.isnan(value)] > 0).any()


# --- the patch form, batches, float32 ---------------------------------------------------------------------------------


def row_by_row(setting):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_is_conv_pair", lambda chain: False)
        return crown(setting.chain, setting.low, setting.high)


def difference(setting):
    rows = row_by_row(setting)
    pairs = zip(itertools.chain(*setting.relus), itertools.chain(*rows), strict=True)
    return max(abs(one - other).max() for one, other in pairs) / setting.scale


@every_pair
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"norm": True}], ids=str)
@fewer(0.3)
@given(seed=seeds)
def test_patches_are_the_rows_of_a_second_convolution(pair, options, seed):
    draw = np.random.default_rng(seed)
    model = conv_pair(pair, draw, **options)
    model.children["normalize"].buffers["std"][0] *= -1
    setting = Setting(model, draw, draw.choice([0.03, 0.3]))
    assert module._is_conv_pair(setting.chain)
    assert difference(setting) < 1e-12


@pytest.mark.parametrize("before", [AveragePool2d(2), Conv2d(2, 2, 2)], ids=lambda layer: type(layer).__name__)
def test_with_a_layer_before_the_convolutions_the_bounds_are_those_of_rows(before, rng):
    """Their patches would be of the box around that layer's output, which is larger than the output."""
    layers = [before, Conv2d(2, 2, 2), ReLU(), Conv2d(2, 2, 2), ReLU(), Flatten()]
    z = layers[3].apply(layers[1].apply(before.apply(np.zeros((1, 6, 6, 2)))))
    assert difference(Setting(sequence([*layers, Linear(z.size, 3)], (6, 6, 2), rng), rng, 0.3)) < 1e-12


@pytest.mark.parametrize(
    "name, seen", [("kernel 4", True), ("kernel 5", True), ("lopsided", True), ("1x1", False)]
)  # without padding there is nothing to get wrong
def test_a_dropped_padding_would_be_seen(name, seen, monkeypatch, rng):
    """ReLUs beyond the edge of the first layer do not exist: as if they were copies of those at the edge."""
    model = conv_pair(name, rng)
    right = np.pad
    monkeypatch.setattr(module.np, "pad", lambda x, width: right(x, width, mode="edge"))
    monkeypatch.setattr("nanomr.ops.reference._pad", lambda x, p: right(x, ((0, 0), p[:2], p[2:], (0, 0))))
    assert (difference(Setting(model, rng, 0.3)) > 1e-6) == seen


@pytest.mark.parametrize("shape", [(2, 1), (1, 3)])
def test_an_oblong_kernel_goes_row_by_row(shape, rng):
    layers = [Conv2d(2, 2, 2), ReLU(), Conv2d(2, 2, 2), ReLU(), Flatten()]
    layers[0].make(True, *shape, 2, 2)
    z = layers[2].apply(layers[0].apply(np.zeros((1, 5, 5, 2))))
    model = sequence([*layers, Linear(z.size, 3)], (5, 5, 2), rng)
    setting = Setting(model, rng, 0.3)
    assert not module._is_conv_pair(setting.chain)
    assert setting.violation(rng) < 1e-12


@every_network
def test_images_of_a_batch_do_not_mix(network, rng):
    setting = Setting(NETWORKS[network](rng), rng, 0.1, n=5)
    bound = setting.bound()
    for i in range(5):
        one = crown(setting.chain, setting.low[i : i + 1], setting.high[i : i + 1])
        for alone, together in zip(itertools.chain(*one), itertools.chain(*setting.relus), strict=True):
            np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-12 * setting.scale)
        mine = setting.owner == i
        lines = [Lines.around(*bounds) for bounds in one]
        alone = lower(setting.chain, Box(*(b[[i]] for b in setting.box)), lines, setting.rows[mine], [0] * mine.sum())
        np.testing.assert_allclose(alone.value, bound.value[mine], rtol=0, atol=1e-12 * setting.scale)


def test_neither_chain_nor_box_is_changed_and_chunks_do_not_matter(rng, monkeypatch):
    setting = Setting(conv_pair("kernel 5", rng), rng, 0.3)
    layers = [layer for stage in setting.chain.stages for layer in stage.layers]
    arrays = [setting.low, setting.high, *(value for layer in layers for value in layer.params.values())]
    copies = [a.copy() for a in arrays]
    alpha_crown(setting.chain, setting.box, setting.lines, setting.rows, setting.owner, steps=2)
    for size in (2, 3, 10_000):
        monkeypatch.setattr(module, "ROWS", size)
        again = crown(setting.chain, setting.low, setting.high)
        for one, other in zip(itertools.chain(*again), itertools.chain(*setting.relus), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * setting.scale)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies, strict=True))


@every_network
def test_float32_is_close(network, rng):
    """u = 6e-8, sums of at most 300 terms, up to 5 layers and back: below 300 * 10 * 6e-8 = 1.8e-4 of the scale."""
    model = NETWORKS[network](rng)
    wide, low, high = Setting(model, rng, 0.1), None, None
    low, high = wide.low.astype(np.float32), wide.high.astype(np.float32)
    single = Chain(model, np.float32)
    relus = crown(single, low, high)
    for one, other in zip(itertools.chain(*relus), itertools.chain(*wide.relus), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-4 * wide.scale)
    lines = [Lines.around(*(b.astype(np.float32) for b in bounds)) for bounds in wide.relus]
    bound = lower(single, Box.between(low, high), lines, wide.rows, wide.owner)
    assert {a.dtype for a in (bound.value, bound.image, *bound.relus)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(bound.value, wide.bound().value, rtol=0, atol=2e-4 * wide.scale)


def test_a_float64_chain_computes_in_float64_whatever_it_is_given(rng):
    setting = Setting(conv_pair("kernel 4", rng), rng, 0.1)
    low, high = setting.low.astype(np.float32), setting.high.astype(np.float32)
    wide = crown(setting.chain, low.astype(np.float64), high.astype(np.float64))
    for one, other in zip(crown(setting.chain, low, high), wide, strict=True):
        assert one[0].dtype == np.float64 and np.array_equal(one, other)
    bound = lower(setting.chain, setting.box, setting.lines, setting.rows.astype(np.float32), setting.owner)
    assert np.array_equal(bound.value, setting.bound().value)


# --- alpha-CROWN ------------------------------------------------------------------------------------------------------


def search(setting, **options):
    return alpha_crown(setting.chain, setting.box, setting.lines, setting.rows, setting.owner, **options)


@pytest.mark.parametrize("network", ["mlp", "deep", "kernel 4", "kernel 5", "norm"])
@fewer(0.2)
@given(seed=seeds, eps=st.sampled_from([0.02, 0.1, 0.5]))
def test_alpha_crown_is_no_worse_than_crown_and_never_too_good(network, seed, eps):
    draw = np.random.default_rng(seed)
    setting = Setting(NETWORKS[network](draw), draw, eps)
    start = setting.bound().value
    found = search(setting, steps=5, target=np.inf)
    assert np.all(found.value >= start)
    bound = setting.bound(found.slopes)
    np.testing.assert_allclose(bound.value, found.value, rtol=0, atol=1e-12 * setting.scale)  # they can be re-checked
    assert all(np.all((s >= 0) & (s <= 1)) for s in found.slopes)
    at_corner = module.inner(bound.image, found.corner)  # the corner that the bound points to
    smallest = module.inner(bound.image, minimiser(setting.box, bound.image, setting.owner))
    np.testing.assert_allclose(at_corner, smallest, rtol=0, atol=1e-12 * setting.scale)
    assert np.all(found.corner >= setting.low[setting.owner] - 1e-15)
    assert np.all(found.corner <= setting.high[setting.owner] + 1e-15)
    assert setting.violation(draw, bound) < 1e-12


def test_a_row_above_its_target_is_left_alone_and_time_can_run_out(rng):
    setting = Setting(tiny(rng, (6, 6)), rng, 0.6)
    start = setting.bound().value
    far = search(setting, steps=30, target=np.inf)
    assert np.all(far.value > start + 1e-6)
    middle = np.sort(start)[len(start) // 2]
    some = search(setting, steps=30, target=middle)
    above = start > middle
    assert above.any() and not above.all()
    np.testing.assert_array_equal(some.value[above], start[above])
    assert np.all(some.value[~above] > start[~above])
    assert np.all(some.value[~above] <= far.value[~above])
    each = search(setting, steps=30, target=np.where(np.arange(len(start)) % 2, np.inf, -np.inf)).value
    np.testing.assert_array_equal(each[::2], start[::2])
    np.testing.assert_allclose(each[1::2], far.value[1::2], rtol=0, atol=1e-12 * setting.scale)
    none = search(setting, steps=0, target=np.inf)
    np.testing.assert_array_equal(none.value, start)


class Relaxation:
    """The linear program of a box: the triangle around each unstable ReLU, or one side of it. For highspy.

    Variables: the image x, then (z, a) of each ReLU layer, a = relu(z). Nothing of it is shared with the package but
    the bounds of the ReLUs.
    """

    def __init__(self, setting, i):
        self.maps = [matrix_of(stage.apply, stage.in_shape) for stage in setting.chain.stages]
        sizes = [len(offset) for _, offset in self.maps[:-1]]
        self.x = setting.low[i].size
        self.low = np.concatenate([setting.low[i].ravel(), *[np.full(2 * n, -np.inf) for n in sizes]])
        self.high = np.concatenate([setting.high[i].ravel(), *[np.full(2 * n, np.inf) for n in sizes]])
        self.rows, self.row_low, self.row_high, self.unstable = [], [], [], []
        start, inputs = self.x, slice(0, self.x)
        for (matrix, offset), (low, high) in zip(self.maps[:-1], setting.relus, strict=True):
            n = len(offset)
            for j, (z_low, z_high) in enumerate(zip(low[i].ravel(), high[i].ravel(), strict=True)):
                z, a = start + j, start + n + j
                self.add({z: 1.0} | dict(zip(range(inputs.start, inputs.stop), -matrix[j], strict=True)), offset[j])
                if z_low >= 0:
                    self.add({a: 1.0, z: -1.0}, 0)
                elif z_high <= 0:
                    self.add({a: 1.0}, 0)
                else:
                    self.unstable.append((z, a))
                    slope = z_high / (z_high - z_low)
                    self.add({a: 1.0}, 0, np.inf)
                    self.add({a: 1.0, z: -1.0}, 0, np.inf)
                    self.add({a: 1.0, z: -slope}, -np.inf, -slope * z_low)
            start, inputs = start + 2 * n, slice(start + n, start + 2 * n)
        self.last = inputs

    def add(self, row, low, high=None):
        dense = np.zeros(len(self.low))
        dense[list(row)] = list(row.values())
        self.rows.append(dense)
        self.row_low.append(low)
        self.row_high.append(low if high is None else high)

    def minimum(self, row, sides=()):
        """The smallest row . logits; with a side (True: active) for each unstable ReLU, over that pattern alone."""
        rows, row_low, row_high = list(self.rows), list(self.row_low), list(self.row_high)
        for (z, a), active in zip(self.unstable, sides, strict=False):
            for coefficients, low, high in (
                ({z: 1.0}, *((0, np.inf) if active else (-np.inf, 0))),
                ({a: 1.0, z: -1.0} if active else {a: 1.0}, 0, 0),
            ):
                dense = np.zeros(len(self.low))
                dense[list(coefficients)] = list(coefficients.values())
                rows.append(dense)
                row_low.append(low)
                row_high.append(high)
        matrix, offset = self.maps[-1]
        cost = np.zeros(len(self.low))
        cost[self.last] = row @ matrix
        found = self.solve(cost, np.array(rows), row_low, row_high)
        return np.inf if found is None else found + row @ offset

    def solve(self, cost, rows, row_low, row_high):
        program, solver = highspy.HighsLp(), highspy.Highs()
        solver.setOptionValue("output_flag", False)
        for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
            solver.setOptionValue(name, 1e-9)
        program.num_col_, program.num_row_ = len(cost), len(rows)
        program.col_cost_, program.col_lower_, program.col_upper_ = cost, self.low, self.high
        program.row_lower_, program.row_upper_ = np.array(row_low, float), np.array(row_high, float)
        program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        program.a_matrix_.start_ = np.concatenate([[0], np.cumsum((rows != 0).sum(1))]).astype(np.int32)
        program.a_matrix_.index_ = np.nonzero(rows)[1].astype(np.int32)
        program.a_matrix_.value_ = rows[rows != 0]
        solver.passModel(program)
        solver.run()
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        assert status == highspy.HighsModelStatus.kOptimal, status
        return solver.getInfo().objective_function_value

    def exact(self, row):
        patterns = itertools.product((False, True), repeat=len(self.unstable))
        return min(self.minimum(row, sides) for sides in patterns)


@pytest.mark.parametrize("seed", range(12))
def test_crown_alpha_crown_relaxation_exact_minimum_are_in_this_order(seed):
    """The solver's tolerances are 1e-9 a constraint, the numbers below 100: 1e-6 covers them."""
    draw = np.random.default_rng(seed)
    hidden = [(4,), (4, 4), (3, 3, 2), (5, 3)][seed % 4]
    setting = Setting(tiny(draw, hidden), draw, [0.1, 0.4, 1.0][seed % 3], n=1)
    plain, found = setting.bound().value, search(setting, steps=600, decay=0.99, target=np.inf)
    program = Relaxation(setting, 0)
    assert len(program.unstable) <= 8
    slack = 1e-6
    for row, crown_value, alpha_value in zip(setting.rows, plain, found.value, strict=True):
        relaxed, exact = program.minimum(row), program.exact(row)
        assert crown_value <= alpha_value <= relaxed + slack
        assert relaxed <= exact + slack
        assert alpha_value >= relaxed - 1e-3 * setting.scale  # alpha-CROWN is the dual of that program
        corner = setting.chain.forward(found.corner)[0]
        assert exact <= (corner @ row).min() + slack


def test_that_order_is_not_one_of_equals():
    """In some of these networks each of the four differs from the next by far more than what the test allows."""
    gaps = np.zeros(3)
    for seed in range(4):
        draw = np.random.default_rng(seed)
        setting = Setting(tiny(draw, (4, 4)), draw, 0.6, n=1)
        plain, found = setting.bound().value, search(setting, steps=60, target=np.inf).value
        program = Relaxation(setting, 0)
        for row, *two in zip(setting.rows[:2], plain, found, strict=False):
            steps = [*two, program.minimum(row), program.exact(row)]
            gaps = np.maximum(gaps, np.diff(steps) / setting.scale)
    assert gaps[0] > 1e-2 and gaps[2] > 1e-2


# --- its gradient -----------------------------------------------------------------------------------------------------


def gradient_error(setting, draw, wrong=lambda gradients, inputs: (gradients, inputs)):
    """The worst error of the derivatives by slopes and forces, against central differences."""
    count = len(setting.lines)
    slopes = [draw.uniform(0.2, 0.8, s.shape) for s in setting.start()]
    forces = [draw.normal(0, 0.2, s.shape) for s in slopes]

    def value(*arrays):
        return setting.bound(list(arrays[:count]), list(arrays[count:])).value

    def vjp(dy):
        bound = setting.bound(slopes, forces)
        both = slope_gradients(setting.chain, setting.box, setting.lines, setting.owner, slopes, bound)
        gradients, inputs = wrong(*both)
        return tuple(dy.reshape(-1, *[1] * (g.ndim - 1)) * g for g in (*gradients, *inputs))

    return check_vjp(value, vjp, [*slopes, *forces], seed=int(draw.integers(1000)))


@pytest.mark.parametrize("network", ["mlp", "deep", "pool", "norm", "kernel 4", "kernel 5"])
@pytest.mark.parametrize("seed", range(3))
def test_slope_gradients_are_the_derivatives(network, seed):
    draw = np.random.default_rng(seed)
    setting = Setting(NETWORKS[network](draw), draw, 0.3)
    assert sum(line.unstable.sum() for line in setting.lines) > 3
    gradient_error(setting, draw)


@pytest.mark.parametrize("network", ["mlp", "kernel 4"])
@pytest.mark.parametrize("mistake", ["sign", "a layer", "a force's sign", "all coefficients", "scale"])
def test_a_wrong_gradient_would_be_seen(network, mistake, rng):
    setting = Setting(NETWORKS[network](rng), rng, 0.3)
    wrong = {
        "sign": lambda g, z: ([-v for v in g], z),
        "a layer": lambda g, z: ([0 * g[0], *g[1:]], z),
        "a force's sign": lambda g, z: (g, [z[0], *(-v for v in z[1:])]),
        "all coefficients": lambda g, z: ([v + 0.01 * abs(u) for v, u in zip(g, z, strict=True)], z),
        "scale": lambda g, z: ([v * (1 + 1e-4) for v in g], z),
    }[mistake]
    with pytest.raises(GradientError):
        gradient_error(setting, rng, wrong)


# --- the box of an image ----------------------------------------------------------------------------------------------


def contains(low, high, x, eps):
    """Are the float32 ball, and the ball of real numbers, in [low, high], and that in [0, 1]? With fractions."""
    single_low, single_high = Linf(eps).bounds(x.astype(np.float32))
    for a, b, c, d, e in zip(*(v.ravel().tolist() for v in (low, high, x, single_low, single_high)), strict=True):
        smallest = max(Fraction(c) - Fraction(eps), 0)
        largest = min(Fraction(c) + Fraction(eps), 1)
        if not (0 <= a <= min(smallest, d) and max(largest, e) <= b <= 1):
            return False
    return True


@given(seed=seeds, eps=st.one_of(st.sampled_from([0.0, 1e-30, 2 / 255, 8 / 255, 0.5, 1.0, 3.0]), st.floats(0, 2)),
       dtype=st.sampled_from([np.float32, np.float64]))  # fmt: skip
def test_the_box_of_an_image_holds_every_image_that_an_attack_may_try_and_little_else(seed, eps, dtype):
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (2, 2, 2, 3)).astype(dtype) / dtype(255)
    x = np.where(draw.random(x.shape) < 0.5, x, draw.random(x.shape).astype(dtype))
    low, high = image_box(x, eps)
    assert low.dtype == high.dtype == np.float64
    assert contains(low, high, x, eps)
    widest = 2 * np.spacing(np.float32(1 + eps))  # what float32 may add on either side
    assert np.all(low >= np.clip(x.astype(np.float64) - eps - widest, 0, 1))
    assert np.all(high <= np.clip(x.astype(np.float64) + eps + widest, 0, 1))


def test_a_box_that_rounding_shrank_would_be_seen(rng):
    x, eps = rng.random((4, 4, 4, 3)).astype(np.float32), 0.1  # sums with 8/255 happen to be exact
    exact = x.astype(np.float64)
    nearest = np.maximum(exact - eps, 0), np.minimum(exact + eps, 1)
    single = tuple(bound.astype(np.float64) for bound in Linf(eps).bounds(x))
    for low, high in (nearest, single):
        assert not contains(low, high, x, eps)
    assert contains(*image_box(x, eps), x, eps)


@pytest.mark.parametrize("eps", [-0.1, np.nan, np.inf])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(UserError, match="eps"):
        image_box(np.zeros((1, 1, 1, 1), np.float32), eps)


@pytest.mark.parametrize("value", [-1e-6, 1.0001, 255])
def test_images_outside_of_0_and_1_are_refused(value):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        image_box(np.full((1, 1, 1, 1), value), 0.1)


def test_a_nan_pixel_stays_nan():
    low, high = image_box(np.array([np.nan, 0.5]).reshape(1, 1, 1, 2), 0.1)
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [[[[True, False]]]]


def test_margin_rows():
    rows = margin_rows(np.array([0, 2]), np.array([2, 1]), 3)
    assert rows.tolist() == [[1, 0, -1], [0, -1, 1]] and rows.dtype == np.float64
    assert margin_rows([0], [1], 2, np.float32).dtype == np.float32


# --- planted bugs -----------------------------------------------------------------------------------------------------

RIGHT = Lines.around.__func__

BUGS = {
    "slope": lambda line: line._replace(upper=np.where(line.unstable, 0.8 * line.upper, line.upper)),
    "the other slope": lambda line: line._replace(upper=np.where(line.unstable, 1 - line.upper, line.upper)),
    "no intercept": lambda line: line._replace(offset=0 * line.offset),
    "the intercept's sign": lambda line: line._replace(offset=-line.offset),
    "a slope above 1": lambda line: line._replace(lower=np.where(line.unstable, 1.3, line.lower)),
    "a slope below 0": lambda line: line._replace(lower=np.where(line.unstable, -0.3, line.lower)),
    "lines swapped": lambda line: line._replace(lower=line.upper, upper=line.lower),
    "stable ones too": lambda line: line._replace(lower=0.9 * line.lower, upper=0.9 * line.upper),
}


def worst_violation(seeds):
    worst = -np.inf
    for seed in seeds:
        draw = np.random.default_rng(seed)
        setting = Setting(tiny(draw, (6, 5), inputs=2), draw, 0.5, n=3)
        worst = max(worst, setting.violation(draw, count=30))
    return worst


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_points_would_break_the_bounds_of_wrong_lines(bug, monkeypatch):
    if bug:
        around = classmethod(lambda cls, low, high: BUGS[bug](RIGHT(cls, low, high)))
        monkeypatch.setattr(Lines, "around", around)
    assert (worst_violation(range(8)) > 1e-6) == (bug is not None)
