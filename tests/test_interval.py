"""Boxes through the layers, the elided last layer, Shi's regulariser, IBP's step, and folded batch norms."""

import networks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr import losses, models, rng
from nanomr.backend import to_numpy
from nanomr.gradcheck import GradientError, check_vjp
from nanomr.layers import (
    AveragePool2d,
    BatchNorm2d,
    Box,
    Conv2d,
    Flatten,
    Linear,
    Normalize,
    Normalized,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
)
from nanomr.methods import METHODS, certified, manifold
from nanomr.ops import ops_for
from nanomr.testing import prepare
from nanomr.testing.strategies import fewer, seeds

LAYERS = {
    "conv": lambda: Conv2d(2, 3, 3, 2, 1),
    "linear": lambda: Sequential({"flatten": Flatten(), "fc": Linear(32, 5)}),
    "normalize": lambda: Normalize((0.4, 0.1), (0.5, -0.25)),
    "relu": ReLU,
    "pool": lambda: AveragePool2d(2),
    "batchnorm": lambda: BatchNorm2d(2),
    "batchnorm of features": lambda: Sequential({"flatten": Flatten(), "bn": BatchNorm2d(32)}),
    "residual": lambda: Residual({"branch": Sequential({"conv": Conv2d(2, 2, 3, 1, 1), "relu": ReLU()})}),
    "residual of two": lambda: Residual({"conv": Conv2d(2, 3, 3, 2, 1), "shortcut": Conv2d(2, 3, 1, 2, 0)}),
    "block": lambda: PreActBlock(2, 2),
    "block with a shortcut": lambda: PreActBlock(2, 3, 2),
    "block whose shortcut reads x": lambda: PreActBlock(2, 3, 2, out_shortcut=False),
    "block with an activated identity": lambda: PreActBlock(2, 2, activated_identity=True),
}


def a_box(g, shape=(3, 4, 4, 2)):
    x = g.standard_normal(shape)
    return Box(np.concatenate([x, x + 0.1 * g.standard_normal(shape)]), g.uniform(0.05, 1, shape))


def check_box(layer, box, train=True):
    """Finite differences of a layer at a box, by its points, its radius and every parameter."""
    slots = [(below, name) for _, below in layer.walk() for name in below.params]

    def run(points, radius, *params):
        for (below, name), value in zip(slots, params, strict=True):
            below.params[name] = value
        return layer.forward(Box(points, radius), train=train)

    def vjp(dpoints, dradius):
        _, cache = run(*box, *params)
        for below, _ in slots:
            below.grads = {name: np.zeros_like(value) for name, value in below.params.items()}
        dx = layer.backward(Box(dpoints, dradius), cache)
        return (*dx, *(below.grads[name] for below, name in slots))

    params = [below.params[name].copy() for below, name in slots]
    return check_vjp(lambda *a: tuple(run(*a)[0]), vjp, [*box, *params])


@pytest.mark.parametrize("name", LAYERS)
@fewer(0.3)
@given(seed=seeds, train=st.booleans())
def test_the_gradient_of_a_layer_at_a_box(name, seed, train):
    g = np.random.default_rng(seed)
    layer = prepare(LAYERS[name](), g)
    if name.startswith("batchnorm") and seed % 2:
        next(iter(reversed([b for _, b in layer.walk()]))).params["weight"] *= -1
    check_box(layer, a_box(g), train)


@pytest.mark.parametrize("name", ["conv", "batchnorm", "relu"])
def test_a_wrong_gradient_at_a_box_is_found(name, monkeypatch):
    g = np.random.default_rng(0)
    layer = prepare(LAYERS[name](), g)
    right = layer.backward
    layer.backward = lambda *a, **k: Box(*(d * (1 + 1e-4 * i) for i, d in enumerate(right(*a, **k))))
    with pytest.raises(GradientError):
        check_box(layer, a_box(g))


@pytest.mark.parametrize("name", LAYERS)
@fewer(0.3)
@given(seed=seeds)
def test_no_point_of_the_box_leaves_the_box_behind_the_layer(name, seed):
    g = np.random.default_rng(seed)
    layer, box = prepare(LAYERS[name](), g), a_box(g)
    c, r = layer.forward(Box(box.points[3:], box.radius))[0]
    for _ in range(5):
        inside = box.points[3:] + box.radius * g.choice([-1, 1, 0.3], box.radius.shape)
        assert (abs(layer.forward(inside)[0] - c) <= r + 1e-12).all()


@fewer(0.5)
@given(seed=seeds)
def test_rivals_gain_is_the_most_and_its_gradient(seed):
    g = np.random.default_rng(seed)
    c, r, w, y = g.standard_normal((4, 6)), g.uniform(0, 1, (4, 6)), g.standard_normal((6, 3)), g.integers(0, 3, 4)
    gain = losses.rivals_gain(r, w, y)
    for n, k in np.ndindex(4, 3):  # reached at a corner, exactly
        corner = c[n] + np.sign(w[:, k] - w[:, y[n]]) * r[n]
        margin = (corner @ w)[k] - (corner @ w)[y[n]]
        assert margin == pytest.approx((c[n] @ w)[k] - (c[n] @ w)[y[n]] + gain[n, k], abs=1e-12)
    check_vjp(lambda r, w: losses.rivals_gain(r, w, y), lambda d: losses.rivals_gain_backward(d, r, w, y), [r, w])
    with pytest.raises(GradientError):
        right = losses.rivals_gain_backward
        check_vjp(
            lambda r, w: losses.rivals_gain(r, w, y), lambda d: (right(d, r, w, y)[0], right(d, r, -w, y)[1]), [r, w]
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@fewer(0.5)
@given(seed=seeds, copies=st.integers(1, 2))
def test_the_sums_over_boxes(dtype, seed, copies):
    """In eighths, whose sums are exact: by a loop over all of them."""
    g = np.random.default_rng(seed)
    points = (np.round(8 * g.standard_normal((copies * 3, 2, 5))) / 8).astype(dtype)
    radius = (abs(np.round(8 * g.standard_normal((3, 2, 5)))) / 8).astype(dtype)
    wanted = np.zeros(8)
    for c, r in zip(points[-3:].ravel().tolist(), radius.ravel().tolist(), strict=True):
        wanted += [c > r, c * (c > r), c * c * (c > r), c < -r, c * (c < -r), c * c * (c < -r), c, r]
    found = ops_for(points).box_sums(points, radius)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, wanted)


def network(dtype=np.float64, seed=0):
    g = np.random.default_rng(seed)
    model = models.small_cnn(hidden=6, classes=3, input_shape=(8, 8, 3), batchnorm=True)
    prepare(model, g)
    return model.astype(dtype), g


@pytest.mark.parametrize("ramp", [0.3, 1.0])
@pytest.mark.parametrize("balance", [0.0, 5.0])
@pytest.mark.parametrize(
    ("method", "q"),
    [("ibp", 0), ("ibp", 0.7), ("ibp-manifold", 0), ("mtl-ibp", 0), ("sabr", 0), ("diffai", 0), ("rs", 0)],
)
def test_the_gradient_of_the_step(method, q, ramp, balance):
    model, g = network()
    x, labels = g.random((4, 8, 8, 3)), g.integers(0, 3, 4)
    if "balance" not in METHODS[method].constants:
        balance = 0.0
    given = {"balance": balance} if balance else {"rs": 0.2, "l1": 0.1} if method == "rs" else {}
    given |= {"q": q} if q else {}
    given |= {"gamma_i": 3.0, "rest": 0.25} if method == "ibp-manifold" else {}
    now = {"alpha": 8.0, "hamming_norm": "batch"}
    now |= {"eps": 0.1 * ramp, "eps_end": 0.1, "ramp": ramp, **METHODS[method].filled(given)}
    norms = [layer for _, layer in model.walk() if isinstance(layer, BatchNorm2d)]
    buffers = [{name: value.copy() for name, value in norm.buffers.items()} for norm in norms]

    def step(w):
        model.weights = w
        for norm, kept in zip(norms, buffers, strict=True):  # mtl-ibp attacks with the running statistics
            norm.momentum, norm.buffers = 0.0, {name: value.copy() for name, value in kept.items()}
        return METHODS[method].step(model, x, labels, lambda stream: rng.generator(0, stream), now)

    def loss(w):
        return np.asarray(step(w)["loss"])

    w = model.weights.copy()

    def gradient():
        model.zero_grad()
        parts = step(w)
        assert set(parts) == {"loss", "cross_entropy", *METHODS[method].reports}
        assert balance == 0 or ramp == 1 or parts["balance"] > 0
        return model.gradients.copy()

    found = gradient()
    check_vjp(loss, lambda d: (d * found,), [w], directions=3)
    with pytest.raises(GradientError):
        wrong = found * (1 + 1e-3 * (np.arange(found.size) % 2))
        check_vjp(loss, lambda d: (d * wrong,), [w])


@pytest.mark.parametrize("ramp", [0.3, 1.0])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "dual"])
def test_a_step_in_float32_is_that_of_the_reference(method, ramp):
    """By the CPU's kernels: the loss, and all gradients to the digits that they have."""
    found = []
    for dtype in (np.float32, np.float64):
        model, g = network(dtype)
        x, labels = g.random((4, 8, 8, 3), np.float32).astype(dtype), g.integers(0, 3, 4)
        now = {"eps": 0.1 * ramp, "eps_end": 0.1, "ramp": ramp} | METHODS[method].filled({})
        loss = METHODS[method].step(model, x, labels, lambda stream: rng.generator(0, stream), now)["loss"]
        found.append((loss, model.gradients))
    (loss, gradients), (exact, wanted) = found
    assert gradients.dtype == np.float32 and loss == pytest.approx(exact, rel=1e-5)
    np.testing.assert_allclose(gradients, wanted, rtol=0, atol=1e-4 * abs(wanted).max())


@pytest.mark.parametrize(
    ("ramp", "rest", "weight"), [(0.3, 0.0, 0.7), (0.5, 0.2, 0.6), (1.0, 0.2, 0.2), (1.0, 0.0, 0.0)]
)
@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_the_papers_terms_beside_intervals_are_their_formulas(norm, ramp, rest, weight):
    """Of the logits, and of the ReLUs' inputs, at x + rho and x - rho, by the 3N batch itself."""
    model, g = network()
    x, labels, draw = g.random((4, 8, 8, 3)), g.integers(0, 3, 4), lambda stream: rng.generator(0, stream)
    now = {"eps": 0.1 * ramp, "eps_end": 0.1, "ramp": ramp, "alpha": 8.0, "hamming_norm": norm}
    plain = METHODS["ibp"].step(model, x, labels, draw, now | METHODS["ibp"].filled({"balance": 0.0}))
    norms = [layer for _, layer in model.walk() if isinstance(layer, BatchNorm2d)]
    for layer in norms:  # the step before has moved the running statistics by the batch's: the next one stays there
        layer.momentum = 0.0
    constants = METHODS["ibp-manifold"].filled({"gamma_i": 3.0, "gamma_h": 50.0, "rest": rest})
    found = METHODS["ibp-manifold"].step(model, x, labels, draw, now | constants)
    rho, inputs = manifold.drawn_corners(model, x, draw, now), []
    full = np.concatenate([x, x + rho, x - rho])  # batch norms in training mode take the moments of all three
    for layer in model.children.values():
        full = full.full() if isinstance(full, Normalized) else full
        inputs += [full] if isinstance(layer, ReLU) else []
        full = layer.forward(full, train=True)[0]
    agree = losses.intrinsic(full[4:8], full[8:])[0]
    hamming = np.mean([losses.hamming(z[4:8], z[8:], 8.0, norm == "sample")[0] for z in inputs])
    if weight:
        assert found["intrinsic"] == pytest.approx(agree, rel=1e-9) and agree > 0
        assert found["hamming"] == pytest.approx(hamming, rel=1e-9) and hamming > 0
    assert found["loss"] == pytest.approx(plain["loss"] + weight * (3 * agree + 50 * hamming), rel=1e-9)


@fewer(0.3)
@given(seed=seeds, q=st.floats(0.05, 1))
def test_generalised_cross_entropy(seed, q):
    """Its formula, its gradient, its limit, and a hopeless image, which it lets go and cross-entropy does not."""
    g = np.random.default_rng(seed)
    z, labels = 3 * g.standard_normal((4, 5)), g.integers(0, 5, 4)
    value, gradient = losses.cross_entropy(z, labels, q)
    p = (np.exp(z) / np.exp(z).sum(1, keepdims=True))[np.arange(4), labels]
    assert value == pytest.approx(((1 - p**q) / q).mean(), rel=1e-12)
    check_vjp(lambda z: np.asarray(losses.cross_entropy(z, labels, q)[0]), lambda d: (d * gradient,), [z])
    with pytest.raises(GradientError):  # without p^q it is another's
        plain = losses.cross_entropy(z, labels)[1]
        check_vjp(lambda z: np.asarray(losses.cross_entropy(z, labels, q)[0]), lambda d: (d * plain,), [z])
    near, limit = losses.cross_entropy(z, labels, 1e-7), losses.cross_entropy(z, labels)
    np.testing.assert_allclose(near[0], limit[0], rtol=1e-4)
    np.testing.assert_allclose(near[1], limit[1], atol=1e-5)
    hopeless = np.array([[-100.0, 0.0]]), np.array([0])
    assert abs(losses.cross_entropy(*hopeless, q)[1]).max() < 0.01 < abs(losses.cross_entropy(*hopeless)[1]).max()


def test_stability_is_its_formula():
    """Of bounds that are known: a ReLU that is on, one that is off, one that is neither."""
    c, r = np.array([[2.0, -3.0, 0.5]]), np.array([[1.0, 1.0, 2.0]])
    tap = certified.Stability(1.0)
    y, _ = tap.forward(Box(c, r))
    assert tap.value == pytest.approx(-np.tanh([1 + 1 * 3, 1 + 4 * 2, 1 - 1.5 * 2.5]).sum())
    np.testing.assert_array_equal(y.points, [[2.0, 0.0, 1.25]])


def test_diffais_boxes_lie_in_the_ball(monkeypatch):
    model, g = network()
    x, labels, seen = g.random((4, 8, 8, 3)), g.integers(0, 3, 4), []
    worst_case = certified._worst_case
    monkeypatch.setattr(certified, "_worst_case", lambda *args: seen.append(args) or worst_case(*args))
    for ramp in (0.0, 0.25, 1.0):
        now = {"eps": 0.1, "eps_end": 0.1, "ramp": ramp, **METHODS["diffai"].filled({})}
        METHODS["diffai"].step(model, x, labels, lambda stream: rng.generator(0, stream), now)
        *_, weight, box = seen[-1]
        whole = certified.box_around(x, 0.1)
        away = abs(box.points[4:] - whole.points[4:]) + box.radius
        assert weight == 0.5 * ramp and (away <= whole.radius + 1e-12).all()
        np.testing.assert_allclose(box.radius, ramp * whole.radius)
        assert (away > 0.9 * whole.radius).any()


def test_sabrs_boxes_lie_in_the_ball_and_hold_the_attack_where_there_is_room(monkeypatch):
    model, g = network()
    x, labels, seen = g.random((4, 8, 8, 3)), g.integers(0, 3, 4), []
    monkeypatch.setattr(certified, "_worst_case", lambda *args: seen.append(args) or {})
    moved = certified.attacked
    monkeypatch.setattr(certified, "attacked", lambda *args: seen.append(moved(*args)) or seen[-1])
    for share, kappa in ((0.4, 0.3), (1.0, 0.0)):
        seen.clear()
        now = {"eps": 0.1, "eps_end": 0.1, "ramp": 0.5, **METHODS["sabr"].filled({"share": share, "kappa": kappa})}
        METHODS["sabr"].step(model, x, labels, lambda stream: rng.generator(0, stream), now)
        adversarial, (_, _, _, _, at_clean, at_box, box) = seen
        whole, centre = certified.box_around(x, 0.1), box.points[4:]
        assert (at_clean, at_box) == pytest.approx((1 - (1 - kappa) / 2, (1 - kappa) / 2))
        np.testing.assert_array_equal(box.points[:4], x)
        np.testing.assert_allclose(box.radius, share * whole.radius)
        assert (abs(centre - whole.points[4:]) + box.radius <= whole.radius + 1e-12).all()
        room = (1 - share) * whole.radius - abs(adversarial - whole.points[4:]) >= 0
        np.testing.assert_allclose(centre[room], adversarial[room], atol=1e-12)
        assert share == 1 or room.any()
        if share == 1:
            np.testing.assert_allclose(centre, whole.points[4:], atol=1e-12)  # ibp's own box


def test_a_folded_network_is_the_same_function_with_the_papers_architecture():
    for seed in range(3):
        model, g = network(np.float32, seed)
        model.children["bn1"].params["weight"][::2] *= -1  # |s| and s differ
        folded, x = models.fold(model), g.random((5, 8, 8, 3), np.float32)
        expected = model.forward(x)[0]
        np.testing.assert_allclose(folded.forward(x)[0], expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
        plain = models.small_cnn(hidden=6, classes=3, input_shape=(8, 8, 3))
        assert folded.architecture == plain.architecture
        assert models.fold(plain) is plain
        bounds = [certified.halves(m)[0].forward(certified.box_around(x, 0.05))[0].radius for m in (model, folded)]
        np.testing.assert_allclose(*bounds, rtol=1e-4, atol=1e-5)
        model.children["bn3"].buffers["running_var"][...] *= 1.1  # its negative control
        assert abs(model.forward(x)[0] - expected).max() > 1e-4


def test_what_intervals_verify_no_point_of_the_ball_contradicts():
    model, g = network(np.float32)
    images = g.integers(0, 256, (40, 8, 8, 3), np.uint8)
    x = mr.metrics.as_float(images)
    labels = model.forward(x)[0].argmax(1)
    assert certified.verified(model, images, labels, 0.0) > 0.9
    share = certified.verified(model, images, labels, 0.002)
    assert share <= mr.metrics.robust_accuracy(model, images, labels, 0.002)
    assert certified.verified(model, images, (labels + 1) % 3, 0.0) == 0


@pytest.mark.parametrize("last", ["relu3", "flatten"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_a_gradient_spends_is_a_layers_own(dtype, last):
    """Batch norms write over the dy that a layer made, not the caller's, of which Flatten hands on a view, nor
    the caches: the same backward may be called again, and one layer after another gives the same bits."""
    model, g = network(dtype)
    body = certified.halves(model)[0]
    names = list(body.children)
    body = Sequential({name: body.children[name] for name in names[: names.index(last) + 1]})
    features, cache = body.forward(certified.box_around(g.random((3, 8, 8, 3)).astype(dtype), 0.02), train=True)
    dy = Box(*(g.standard_normal(a.shape).astype(dtype) for a in features))
    kept = [a.copy() for a in dy]
    found = [body.backward(dy, cache) for _ in range(2)]
    gradients = model.gradients.copy()
    slowly = dy
    for layer, at in reversed(list(zip(body.children.values(), cache[0], strict=True))):
        slowly = layer.backward(slowly, at)
    np.testing.assert_allclose(3 * gradients, 2 * model.gradients, rtol=1e-4, atol=1e-5)
    for a, b in zip(kept, dy, strict=True):
        np.testing.assert_array_equal(a, b)
    found.append(body.backward(Box(*kept), cache, spend=True))
    assert not any(cache[0])
    for a, *others in zip(slowly, *found, strict=True):
        for other in others:
            np.testing.assert_array_equal(a, other)


def test_the_sum_of_radii_is_the_balances_first():
    """Behind the model's Normalize, whose std may be negative; of a network without one, and of a box that is given."""
    model, g = network(np.float32)
    model.children["normalize"].buffers["std"][1] *= -1
    x = g.random((5, 8, 8, 3), np.float32)
    raw = certified.box_around(x, 0.1)
    body, last = certified.halves(model)
    expected, _ = model.children["normalize"].forward(raw)
    for given_ in (None, raw):
        box, radius, layers = certified.entered(body, x, 0.1, given_)
        for a, b in zip(box, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(radius, expected.radius.mean(dtype=float), rtol=1e-5)
        assert list(layers.children) == list(body.children)[1:]
    box, radius, layers = certified.entered(Sequential({"fc": last}), x, 0.1)
    np.testing.assert_array_equal(box.radius, raw.radius)
    np.testing.assert_allclose(radius, raw.radius.mean(dtype=float), rtol=1e-5)
    assert list(layers.children) == ["fc"]


BOXED = ("ibp", "ibp-manifold", "mtl-ibp", "sabr", "diffai", "rs")


@pytest.mark.parametrize("name", BOXED)
def test_a_step_on_a_device_is_the_cpus(cupy, name):
    def step(model, images, labels):
        return METHODS[name].step(model, images, labels, lambda stream: rng.generator(0, stream), now)

    now = METHODS[name].filled({}) | {"eps": 0.02, "eps_end": 0.03, "ramp": 0.5, "lr": 0.1}
    now |= {"gamma_i": 1.0, "alpha": 8.0, "hamming_norm": "batch"} if name == "ibp-manifold" else {}
    (here, g), there = network(np.float64), network(np.float64)[0].to("gpu")
    x, labels = g.random((4, 8, 8, 3)), g.integers(0, 3, 4)
    expected, found = step(here, x, labels), step(there, cupy.asarray(x), cupy.asarray(labels))
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-9), key
    np.testing.assert_allclose(to_numpy(there.gradients), here.gradients, rtol=1e-6, atol=1e-12)


class Frozen(Linear):
    """Its weights learn nothing."""

    def accumulate(self, **gradients):
        super().accumulate(**{name: 0 * gradient for name, gradient in gradients.items()})


class Upside(Normalize):
    """It turns images over, too."""

    def apply(self, x, bias=True):
        return super().apply(x[:, ::-1], bias)


def test_what_a_subclass_does_with_boxes_is_done():
    """With the gradients that its ``accumulate`` is given; as a Normalize that does more than one."""
    model, g = network(np.float64)
    x, labels = g.random((4, 8, 8, 3)), g.integers(0, 3, 4)
    now = METHODS["ibp"].filled({}) | {"eps": 0.02, "eps_end": 0.03, "ramp": 1}
    model.children["fc1"].__class__ = Frozen
    loss = METHODS["ibp"].step(model, x, labels, None, now)["loss"]
    assert not model.children["fc1"].grads["weight"].any() and model.children["conv2"].grads["weight"].any()
    model.children["normalize"].__class__ = Upside
    assert METHODS["ibp"].step(model, x, labels, None, now)["loss"] != pytest.approx(loss, rel=1e-3)


def test_a_box_that_does_not_fit_is_refused():
    model, g = network()
    box = a_box(g, (3, 8, 8, 3))
    with pytest.raises(ValueError, match="a Box takes points"):
        model.forward(Box(box.points[:4], box.radius))
    with pytest.raises(ValueError, match="clean batch"):
        model.forward(Box(box.points[3:], box.radius), train=True)
    with pytest.raises(ValueError, match=r"Normalize.* takes x .*, not"):
        certified.entered(certified.halves(model)[0], g.random((3, 8, 8, 4)), 0.1)
    with pytest.raises(ValueError, match="nothing may be empty"):
        certified.box_around(g.random((0, 8, 8, 3)), 0.1)
    with pytest.raises(ValueError, match="ends with a Linear"):
        certified.halves(Sequential({"relu": ReLU()}))


def bounded(model, x, labels):
    """(Logits, the worst margins that intervals allow.)"""
    body, last = certified.halves(model)
    features, _ = body.forward(certified.box_around(x, 0.02))
    gain = losses.rivals_gain(features.radius, last.params["weight"], labels)
    return model.forward(x)[0], last.apply(features.points[len(x) :]) + gain


@pytest.mark.parametrize("norm", ["none", "norm", "norm that its ReLU computes"])
@fewer(0.3)
@given(seed=seeds)
def test_dead_channels_are_revived_and_the_network_stays_as_it_is(norm, seed):
    """One is dead behind each convolution, and one of the hidden units. The small network's norms are left to ReLUs."""
    g = np.random.default_rng(seed)
    model = networks.conv_net(g, (3, 1, 1), (3, 2, 1), norm=norm != "none")
    for layer in model.children.values():
        layer.before_relu = norm == "norm that its ReLU computes"  # which only batch norms look at
    images, labels = g.uniform(0, 255, (6, *model.input_shape)), g.integers(0, 3, 6)
    layers = list(model.children.values())
    for i in (i for i, layer in enumerate(layers) if isinstance(layer, ReLU)):
        layers[i - 1].params["bias"] += 2
        layers[i - 1].params["bias"][0] = -1e3
    logits, worst = bounded(model, images / 255, labels)
    assert certified.revive(model, images, 0.02, g, noise=0) >= 3
    for before, after in zip((logits, worst), bounded(model, images / 255, labels), strict=True):
        assert abs(before - after).max() <= 1e-12 * abs(before).max()
    assert certified.revive(model, images, 0.02, g) == 0  # all are alive


def test_a_revived_channel_parts_from_its_model_by_the_noise():
    g = np.random.default_rng(0)
    model = networks.conv_net(g, (3, 1, 1), (3, 2, 1))
    conv = model.children["0"]
    conv.params["bias"][...] = -1e3, 2
    kept = conv.params["weight"][..., 1].copy()
    certified.revive(model, g.uniform(0, 255, (6, *model.input_shape)), 0.02, g)
    one, other = np.moveaxis(conv.params["weight"], -1, 0) / kept
    assert np.allclose(one + other, 2) and np.allclose(abs(one - other), 0.2)


def test_dead_channels_of_a_network_with_branches_are_not_revived():
    g = np.random.default_rng(0)
    branches = Residual({"branch": Sequential({"conv": Conv2d(2, 2, 3, 1, 1), "relu": ReLU()})})
    model = networks.sequence([branches, Flatten(), Linear(32, 3)], (4, 4, 2), g)
    with pytest.raises(ValueError, match="chain"):
        certified.revive(model, g.uniform(0, 255, (6, 4, 4, 2)), 0.02, g)
