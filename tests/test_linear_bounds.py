"""crown-ibp, dual and predictor: bounds by lines, what a step minimises, and its whole gradient."""

import numpy as np
import programs
import pytest
from hypothesis import given
from test_train import log

from nanomr import checkpoint, models, rng
from nanomr.backend import to_numpy
from nanomr.gradcheck import GradientError, check_vjp
from nanomr.layers import BatchNorm2d, Box, Conv2d, Flatten, Linear, Normalize, ReLU, Residual, Sequential
from nanomr.methods import METHODS, certified, linear_bounds
from nanomr.models import Model
from nanomr.programs import train as train_program
from nanomr.testing import prepare
from nanomr.testing.strategies import fewer, seeds

NAMES = ("crown-ibp", "dual", "predictor")
SLOPES = dict(zip(NAMES, (linear_bounds.adaptive, linear_bounds.parallel, linear_bounds.predicted), strict=True))
names = pytest.mark.parametrize("name", NAMES)
SHAPE, CLASSES, EPS, N = (2, 2, 3), 3, 0.1, 4


def network(name, seed=0, normed=True, dtype=np.float64):
    """A convolution, two hidden layers, a batch norm behind two of the three; weights of which many ReLUs are unstable,
    and whatever the method learns beside them."""
    layers = {
        "normalize": Normalize((0.4,) * 3, (0.25,) * 3), "conv": Conv2d(3, 3, 2, 1, (0, 1, 1, 0), bias=not normed),
        **({"bn1": BatchNorm2d(3)} if normed else {}), "relu1": ReLU(), "flatten": Flatten(),
        "body": Sequential({"fc1": Linear(12, 6), **({"bn2": BatchNorm2d(6)} if normed else {}), "relu2": ReLU()}),
        "fc2": Linear(6, 5), "relu3": ReLU(), "fc3": Linear(5, CLASSES),
    }  # fmt: skip
    model, g = Model(layers, "x", SHAPE), np.random.default_rng(seed)
    METHODS[name].begin(model, g)
    prepare(model, g)
    return model.astype(dtype), g


def batch(g, dtype=np.float64):
    return np.clip(g.uniform(-0.2, 1.2, (N, *SHAPE)), 0, 1).astype(dtype), g.integers(0, CLASSES, N)


def now(name, ramp=0.6, **constants):
    return {"eps": EPS * ramp, "eps_end": EPS, "ramp": ramp, **METHODS[name].filled(constants)}


def step(name, model, x, labels, settings):
    return METHODS[name].step(model, x, labels, lambda stream: rng.generator(0, stream), settings)


def relaxed(name, model, x, eps=EPS, most=6):
    return linear_bounds.Relaxed(model, certified.box_around(x, eps), SLOPES[name], most if name == "dual" else 0)


# --- the reference: an image, a unit, a margin at a time, by dense matrices -------------------------------------------


def flat(layer):
    for child in layer.children.values():
        yield from flat(child) if type(child) is Sequential else [child]


def stages(model, x):
    """[(A, b, the ReLU behind it or None)], z = A a + b; batch norms by the statistics of x."""
    shape, clean, a, b, found = SHAPE, x.reshape(len(x), -1), np.eye(12), np.zeros(12), []
    for layer in flat(model):
        p = layer.params
        if isinstance(layer, Normalize):
            mean, std = (np.tile(layer.buffers[k].astype(np.float64), 4) for k in ("mean", "std"))
            a, b = a / std[:, None], (b - mean) / std
        elif isinstance(layer, Conv2d):
            (h, w, c), (top, bottom, left, right) = shape, layer.padding
            kernel, (ho, wo) = p["weight"], (h + top + bottom - 1, w + left + right - 1)
            matrix = np.zeros((ho, wo, kernel.shape[3], h, w, c))
            for i, j, k, q in np.ndindex(ho, wo, 2, 2):
                if 0 <= i + k - top < h and 0 <= j + q - left < w:
                    matrix[i, j, :, i + k - top, j + q - left] = kernel[k, q].T
            matrix, shape = matrix.reshape(-1, h * w * c), (ho, wo, kernel.shape[3])
            a, b = matrix @ a, matrix @ b + np.tile(p.get("bias", np.zeros(shape[2])), ho * wo)
        elif isinstance(layer, Linear):
            a, b, shape = p["weight"].T @ a, p["weight"].T @ b + p["bias"], (len(p["bias"]),)
        elif isinstance(layer, BatchNorm2d):
            z = (clean @ a.T + b).reshape(-1, shape[-1])
            scale = p["weight"] / np.sqrt(z.var(0) + layer.eps)
            shift, times = p["bias"] - z.mean(0) * scale, len(b) // len(scale)
            scale, shift = np.tile(scale, times), np.tile(shift, times)
            a, b = scale[:, None] * a, scale * b + shift
        elif isinstance(layer, ReLU):
            found.append((a, b, layer))
            clean = np.maximum(clean @ a.T + b, 0)
            a, b = np.eye(len(b)), np.zeros(len(b))
    return [*found, (a, b, None)]


def slope_below(name, layer, s):
    if name == "crown-ibp":
        return float(s > 0.5)
    weight, bias = layer.params["predictor"] if name == "predictor" else (0, 0)
    return 1 / (1 + np.exp(-(np.log(s / (1 - s)) + weight * (2 * s - 1) + bias)))


def lines(name, layer, low, high):
    """(below, above, offset), a unit at a time; what a layer has learned is of its channels, the last axis."""
    result = []
    for i, (start, end) in enumerate(zip(low, high, strict=True)):
        if start >= 0 or end <= 0:
            result.append((float(start >= 0), float(start >= 0), 0.0))
            continue
        one = ReLU()
        one.params = {k: v[:, i % v.shape[1]] for k, v in layer.params.items()}
        above = end / (end - start)
        result.append((slope_below(name, one, above), above, end - above * end))
    return np.array(result).T


def least(a, chain, around, c, r):
    """The least that the lines leave of a z, z the output of the last of the ``chain``."""
    value = 0.0
    for k in reversed(range(len(chain))):
        value, a = value + a @ chain[k][1], a @ chain[k][0]
        if k:
            below, above, offset = around[k - 1]
            value += np.minimum(a, 0) @ offset
            a = np.maximum(a, 0) * below + np.minimum(a, 0) * above
    return value + a @ c - abs(a) @ r


def margins_of(name, model, x, labels, eps, most=6):
    """(worst margins by lines, by intervals) (N, K) each, 0 for the label."""
    chain, found = stages(model, x), np.zeros((2, len(x), CLASSES))
    for n, image in enumerate(x.reshape(len(x), -1)):
        low, high = np.maximum(image - eps, 0), np.minimum(image + eps, 1)
        c, r, around = 0.5 * (low + high), 0.5 * (high - low), []
        for k, (a, b, layer) in enumerate(chain):
            middle, width = a @ (0.5 * (low + high)) + b, abs(a) @ (0.5 * (high - low))
            if layer is None:
                break
            low, high = middle - width, middle + width
            if name == "dual" and k and len(b) <= most:
                for i in np.flatnonzero((low < 0) & (high > 0)):
                    unit = np.eye(len(b))[i]
                    low[i] = max(low[i], least(unit, chain[: k + 1], around, c, r))
                    high[i] = min(high[i], -least(-unit, chain[: k + 1], around, c, r))
            around.append(lines(name, layer, low, high))
            low, high = np.maximum(low, 0), np.maximum(high, 0)
        for j in range(CLASSES):
            row = np.eye(CLASSES)[j] - np.eye(CLASSES)[labels[n]]
            found[0, n, j] = -least(-row, chain, around, c, r)
            found[1, n, j] = row @ (a @ (0.5 * (low + high)) + b) + abs(row @ a) @ (0.5 * (high - low))
    return found


def nll(z, labels):
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]))


def clean_logits(model, x):
    h = x.reshape(len(x), -1)
    for a, b, relu in stages(model, x):
        h = h @ a.T + b
        h = np.maximum(h, 0) if relu else h
    return h


@names
@pytest.mark.parametrize("normed", [True, False])
def test_a_step_is_the_formula(name, normed):
    settings = now(name, kappa=0.3, **({"balance": 0.0, "beta_end": 0.2} if name == "crown-ibp" else {}))
    for seed in range(3):
        model, g = network(name, seed, normed)
        x, labels = batch(g)
        by_lines, by_intervals = margins_of(name, model, x, labels, 0.6 * EPS)
        beta = 1 - 0.8 * 0.6 if name == "crown-ibp" else 1.0
        bounds = nll(beta * by_lines + (1 - beta) * by_intervals, labels)
        found = step(name, model, x, labels, settings | ({"most": 6} if name == "dual" else {}))
        assert found["bounds"] == pytest.approx(bounds, rel=1e-9)
        assert found["cross_entropy"] == pytest.approx(nll(clean_logits(model, x), labels), rel=1e-9)
        kappa = 1 - 0.7 * 0.6
        assert found["loss"] == pytest.approx(kappa * found["cross_entropy"] + (1 - kappa) * bounds, rel=1e-9)
        if name == "dual":  # the negative control: lines for the layer in the middle count
            assert step(name, model, x, labels, settings | {"most": 5})["bounds"] != pytest.approx(bounds, rel=1e-9)


# --- the gradient -----------------------------------------------------------------------------------------------------


def check_step(name, normed=True, seed=0, wrong=1.0, **constants):
    """Finite differences of the step's loss by all weights at once, those of what the method learns among them."""
    model, g = network(name, seed, normed)
    (x, labels), settings = batch(g), now(name, kappa=0.3, **constants)

    def loss(w):
        model.weights = w
        return np.asarray(step(name, model, x, labels, settings)["loss"])

    w = model.weights.copy()
    model.zero_grad()
    loss(w)
    found = model.gradients * wrong
    return check_vjp(loss, lambda d: (d * found,), [w], directions=4)


@pytest.mark.parametrize("normed", [True, False])
@names
def test_the_gradient_of_the_step(name, normed):
    """The whole of it: through slopes and offsets, through the bounds that they are of, through the statistics."""
    for seed in range(2):
        check_step(name, normed, seed, **({"balance": 5.0} if name == "crown-ibp" else {}))


def cut(monkeypatch, kind, keep):
    right = getattr(linear_bounds, kind).backward
    monkeypatch.setattr(getattr(linear_bounds, kind), "backward", lambda self: keep(right(self)))


CUTS = {
    "bounds held fixed": lambda patch: cut(patch, "Lines", lambda found: [0 * d for d in found]),
    "the upper end held fixed": lambda patch: cut(patch, "Lines", lambda found: (found[0], 0 * found[1])),
    "statistics held fixed": lambda patch: cut(patch, "Scale", lambda d_clean: 0 * d_clean),
    "no gradient by offsets": lambda patch: patch.setattr(
        linear_bounds.Lines, "up", without_offsets(linear_bounds.Lines.up)
    ),
}


def without_offsets(right):
    def up(self, z, *rest):
        z = right(self, z, *rest)
        self.gradients[2] *= 0
        return z

    return up


@pytest.mark.parametrize("what", CUTS)
@names
def test_a_gradient_that_lacks_something_is_found_out(name, what, monkeypatch):
    CUTS[what](monkeypatch)
    with pytest.raises(GradientError):
        check_step(name)


def test_a_gradient_without_the_lines_of_the_layer_in_the_middle_is_found_out(monkeypatch):
    """Of ``dual``: its bounds are by lines, whose gradient goes through the lines below them."""
    right, sides = linear_bounds.Relaxed.bounds_backward, []

    def margins_alone(self, record, low, high):
        whole = len(record[0]) == len(self.steps)
        sides.append((False, False) if whole else (low.any(), high.any()))
        return right(self, record, low, high) if whole else None

    monkeypatch.setattr(linear_bounds.Relaxed, "bounds_backward", margins_alone)
    with pytest.raises(GradientError):
        check_step("dual")
    assert np.any(sides, 0).all()


@pytest.mark.parametrize("what", ["nothing of them", "the first image's", "no gradient by the bounds' constants"])
def test_a_gradient_without_the_layers_on_top_of_units_is_found_out(what, monkeypatch):
    """Of ``dual``: rows of single units share the affine layers on top, which need the sums over all images."""
    units, right = linear_bounds.Units, linear_bounds.Units.up
    if what == "nothing of them":
        monkeypatch.setattr(units, "backward", lambda self: None)
    elif what == "the first image's":
        monkeypatch.setattr(units, "up", lambda self, *rows: right(self, *(a[:1] for a in rows[:-1]), None))
    else:
        monkeypatch.setattr(units, "up", lambda self, z, of, low, high, at: right(self, z, of, 0 * low, 0 * high, at))
    with pytest.raises(GradientError):
        check_step("dual")


def test_what_predictor_learns_has_a_gradient_that_leads_down():
    model, g = network("predictor")
    x, labels = batch(g)
    model.zero_grad()
    before = step("predictor", model, x, labels, now("predictor"))["loss"]
    relus = [layer for _, layer in model.walk() if isinstance(layer, ReLU)]
    for relu in relus:
        assert relu.grads["predictor"].any()
        relu.params["predictor"] -= 0.1 * relu.grads["predictor"]
    assert step("predictor", model, x, labels, now("predictor"))["loss"] < before


# --- bounds -----------------------------------------------------------------------------------------------------------


@names
@fewer(0.5)
@given(seed=seeds)
def test_no_point_of_the_box_is_beyond_a_bound(name, seed):
    model, g = network(name, seed)
    x, _ = batch(g)
    found, rows = relaxed(name, model, x), g.standard_normal((N, 4, CLASSES))
    low, high, _ = found.bounds(rows)
    body, last = certified.halves(model)
    box, most, least = certified.box_around(x, EPS), -np.inf, np.inf
    for _ in range(20):
        at = box.points[N:] + box.radius * g.choice([-1, 1, g.uniform(-1, 1)], box.radius.shape)
        z = last.apply(body.forward(Box(np.concatenate([x, at]), 0 * box.radius), train=True)[0].points[N:])
        value = (rows @ z[:, :, None])[:, :, 0]
        assert (value >= low - 1e-9).all() and (name != "dual" or (value <= high + 1e-9).all())
        most, least = np.maximum(most, value), np.minimum(least, value)
    assert (low > -np.inf).all() and ((least - low) < 1e3).all()


@pytest.mark.parametrize("name", ["crown-ibp", "dual"])
def test_a_line_that_is_none_is_found_out(name, monkeypatch):
    """The negative control of the one before: lines above without their offsets."""
    model, g = network(name)
    x, _ = batch(g)
    right = linear_bounds.Lines.__init__

    def no_offset(self, *args):
        right(self, *args)
        self.offset = 0 * self.offset

    monkeypatch.setattr(linear_bounds.Lines, "__init__", no_offset)
    found, rows = relaxed(name, model, x), g.standard_normal((N, 40, CLASSES))
    low, _, _ = found.bounds(rows)
    clean = clean_logits(model, x)
    assert ((rows @ clean[:, :, None])[:, :, 0] < low).any()


@given(seed=seeds)
def test_lines_hold_the_relu_between_their_bounds(seed):
    g = np.random.default_rng(seed)
    low = g.standard_normal((5, 7))
    high, layer = low + abs(g.standard_normal((5, 7))), ReLU()
    layer.params = {"predictor": g.normal(0, 3, (2, 7))}
    z = low + (high - low) * np.linspace(0, 1, 21)[:, None, None]
    for slopes in SLOPES.values():
        found = linear_bounds.Lines(layer, low, high, slopes)
        assert (found.lower * z <= np.maximum(z, 0) + 1e-12).all()
        above = found.upper * z + found.offset
        assert (np.maximum(z, 0) <= above + 1e-12).all() and (abs(above - np.maximum(z, 0)).min(0) < 1e-9).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shift", [0.0, 3.0, -100.0, 1e30])
def test_a_relu_that_is_on_or_off_is_that_line_and_does_not_move(dtype, shift):
    """Whatever the slopes of unstable ones are: z or 0, to the last bit, and no gradient by the bounds."""
    low, high = np.array([[0, 1e-3, 2, -1e-3, -2, -0.0]], dtype), np.array([[1, 1, 2, 0, -1e-6, -0.0]], dtype)
    layer = ReLU()
    layer.params = {"predictor": np.full((2, 6), shift, dtype)}
    layer.grads = {"predictor": np.zeros((2, 6), dtype)}
    for slopes in SLOPES.values():
        found = linear_bounds.Lines(layer, low, high, slopes)
        for line in (found.lower, found.upper):
            np.testing.assert_array_equal(line, np.array([[1, 1, 1, 0, 0, 1]], dtype))
        np.testing.assert_array_equal(found.offset, 0)
        found.gradients = [np.ones_like(low)] * 3
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(found.backward(), 0)
    np.testing.assert_array_equal(layer.grads["predictor"], 0)


def test_the_narrowest_chord_is_a_line():
    """A width whose inverse float32 does not hold."""
    low, high = np.float32([[-1e-39]]), np.float32([[1e-39]])
    for d, expected in ((0.0, [-0.25, 0.25]), (1e-30, [2.5e8, 2.5e8])):
        found = linear_bounds.Lines(ReLU(), low, high, linear_bounds.parallel)
        assert found.upper == 0.5
        found.gradients = [np.float32([[d]]), np.zeros_like(low), np.ones_like(low)]
        np.testing.assert_allclose(np.ravel(found.backward()), expected, rtol=1e-5)


def test_lines_far_from_the_chord_are_numbers():
    """What is learned may grow beyond what an exponential can hold, and bounds may be as narrow as can be."""
    low, high = np.float32([[-1e-30, -1, -1e-7]]), np.float32([[1, 1e-30, 1e-7]])
    for size in (-200.0, 200.0):
        layer = ReLU()
        layer.params = {"predictor": np.full((2, 3), size, np.float32)}
        found = linear_bounds.Lines(layer, low, high, linear_bounds.predicted)
        found.gradients = [np.ones_like(low)] * 3
        assert all(np.isfinite(v).all() for v in (found.lower, found.upper, found.offset, *found.backward()))
        assert found.lower.dtype == found.offset.dtype == np.float32


def test_dual_bounds_are_never_wider_than_intervals():
    model, g = network("dual", 1)
    x, _ = batch(g)
    plain, better = relaxed("dual", model, x, most=0), relaxed("dual", model, x, most=6)
    widths = [[s.known.high - s.known.low for s in r.steps if hasattr(s.known, "low")] for r in (plain, better)]
    np.testing.assert_array_equal(widths[0][0], widths[1][0])  # the first layer's are exact
    for wide, narrow in zip(widths[0][1:], widths[1][1:], strict=True):
        assert (narrow <= wide + 1e-12).all() and (narrow < wide - 1e-3).any()


# --- what the methods have in common ----------------------------------------------------------------------------------


def test_crown_ibp_without_lines_is_ibp_and_predictor_begins_as_dual():
    model, g = network("crown-ibp")
    x, labels = batch(g)
    settings = now("ibp", ramp=1.0) | {"beta_end": 0.0}
    found = []
    for name in ("ibp", "crown-ibp"):
        model.zero_grad()
        found.append((step(name, model, x, labels, settings), model.gradients.copy()))
    assert found[0][0]["loss"] == found[1][0]["loss"] and found[0][0]["interval"] == found[1][0]["bounds"]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    nearly = step("crown-ibp", model, x, labels, settings | {"beta_end": 1e-9})["loss"]
    assert nearly == pytest.approx(found[0][0]["loss"], rel=1e-6)
    model, _ = network("predictor")
    for _, layer in model.walk():
        if isinstance(layer, ReLU):
            layer.params["predictor"][...] = 0
    losses = [step(name, model, x, labels, now(name) | {"most": 0})["loss"] for name in ("dual", "predictor")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@names
def test_a_step_without_a_ball_is_the_clean_ones_and_dtypes_stay(name):
    losses = []
    for dtype in (np.float64, np.float32):
        model, g = network(name, dtype=dtype)
        x, labels = batch(g, dtype)
        still = step(name, model, x, labels, now(name) | {"eps": 0.0})
        assert float(still["bounds"]) == pytest.approx(float(still["cross_entropy"]), rel=1e-4)
        model.zero_grad()
        found = step(name, model, x, labels, now(name))
        assert set(found) == {"loss", "cross_entropy", *METHODS[name].reports}
        assert model.gradients.dtype == dtype and model.gradients.any() and np.isfinite(model.gradients).all()
        losses.append(float(found["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@names
def test_rows_may_be_carried_in_parts(name, monkeypatch):
    model, g = network(name)
    x, labels = batch(g)
    found = []
    for rows in (linear_bounds.ROWS, 1):
        monkeypatch.setattr(linear_bounds, "ROWS", rows)
        model.zero_grad()
        found.append((step(name, model, x, labels, now(name))["loss"], model.gradients.copy()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


@names
@fewer(0.5)
@given(seed=seeds)
def test_rows_of_which_nothing_comes_stay_at_home(name, seed):
    """The way up is linear in the bounds' gradients: what some rows leave, and what the others do, is what all do."""
    model, g = network(name, seed % 1000)
    x, _ = batch(g)
    a, d = g.standard_normal((N, 5, CLASSES)), g.standard_normal((2, N, 5))
    kept = g.random((2, N, 5)) < g.choice([0.0, 0.2, 0.7], (N, 1))  # of some images no row is left
    found, carried = [], []

    def left_by(gradients):
        model.zero_grad()
        network = relaxed(name, model, x)
        _, _, record = network.bounds(a)
        last = network.steps[-1].known
        up = last.up
        last.up = lambda z, *rest: carried.append(z.shape[1]) or up(z, *rest)
        network.bounds_backward(record, *gradients)
        features = network.features
        network.backward(Box(0 * features.points, 0 * features.radius))
        found.append(model.gradients.copy())

    for gradients in (d, kept * d, ~kept * d, 0 * d):
        left_by(gradients)
    np.testing.assert_allclose(found[1] + found[2], found[0], rtol=1e-9, atol=1e-12)
    assert not found[3].any() and found[0].any()
    rows = [(part != 0).any(0).sum(1).max() for part in (d, kept * d, ~kept * d)]
    assert carried == [n for n in rows if n]


@names
def test_a_step_on_a_device_is_the_cpus(cupy, name):
    here, g = network(name)
    there, (x, labels) = network(name)[0].to("gpu"), batch(g)
    expected = step(name, here, x, labels, now(name))
    found = step(name, there, cupy.asarray(x), cupy.asarray(labels), now(name))
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-9), key
    np.testing.assert_allclose(to_numpy(there.gradients), here.gradients, rtol=1e-6, atol=1e-12)


@names
def test_a_network_that_is_no_chain_is_refused(name):
    layers = {"flatten": Flatten(), "sum": Residual({"fc": Linear(12, 12)}), "relu": ReLU(), "last": Linear(12, 3)}
    model = Model(layers, "x", SHAPE).astype(np.float64)
    with pytest.raises(ValueError, match="chain of affine layers"):
        step(name, model, *batch(np.random.default_rng(0)), now(name))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_what_predictor_learned_is_not_in_the_network_that_is_saved():
    model, g = network("predictor", dtype=np.float32)
    x, _ = batch(g, np.float32)
    plain = linear_bounds.finish_predictor(model)
    np.testing.assert_allclose(plain.forward(x)[0], model.forward(x)[0], rtol=1e-4, atol=1e-4)
    assert not any(layer.params for _, layer in plain.walk() if isinstance(layer, ReLU))
    assert not any("predictor" in key for key in plain.state_dict())


@names
def test_the_program_trains_on_shapes10_with_it(name, tmp_path, monkeypatch, capsys):
    programs.isolate(monkeypatch, tmp_path, train=50, test=10)
    call = programs.caller(train_program, monkeypatch, capsys)
    flags = "--model mlp --device cpu --hold-out 10 --batch-size 20 --epochs 2 --ramp-from 0 --test-images 0 --out run"
    constants = {"kappa": 0.5} | ({"most": 0} if name == "dual" else {})
    given = [word for key, value in constants.items() for word in ("--constant", f"{key}={value}")]
    code, _, err = call("--method", name, *given, *flags.split())
    assert code == 0, err
    config, records = checkpoint.read_json("run/config.json")["config"], log(tmp_path / "run")
    assert config["recipe"] == "ramp" and config["constants"] == METHODS[name].filled(constants)
    assert all(np.isfinite(r["bounds"]) and "ibp_verified" in r for r in records) and len(records) == 2
    plain = models.mlp((3072, 256, 256, 10), mean=models.CIFAR_MEAN, std=models.CIFAR_STD)
    assert models.load("run").architecture == plain.architecture
    programs.assert_one_error_line(call("--method", name, "--constant", "nonsense=1", *flags.split()), "nonsense")
