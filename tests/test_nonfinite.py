"""NaN is never a success and never a class; every attack's images lie in their ball in real arithmetic."""

import inspect
from functools import partial

import exact
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import attacks, metrics, models
from nanomr.attacks.autoattack import STAGES, Stage, cascade
from nanomr.attacks.common import L2, Linf, recheck
from nanomr.errors import NoClass, UserError
from nanomr.ops import cpu, reference
from nanomr.testing.strategies import fewer, seeds

SHAPE, N = (4, 4, 2), 16
# All attacks that work by eps, with budgets that take no time.
BY_EPS = {
    "pgd": partial(attacks.pgd, steps=3, restarts=2),
    "fgsm": attacks.fgsm,
    "apgd": partial(attacks.apgd, steps=5),
    "apgd-dlr": partial(attacks.apgd, loss="dlr", steps=5),
    "apgd_targeted": partial(attacks.apgd_targeted, steps=4, targets=2),
    "fab": partial(attacks.fab, steps=4, restarts=2),
    "fab_targeted": partial(attacks.fab_targeted, steps=4, targets=2),
    "square": partial(attacks.square, queries=12),
    "corner_noise": attacks.corner_noise,
    "autoattack": attacks.autoattack,
}
by_eps = pytest.mark.parametrize("name", BY_EPS)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    small = {"steps": 3, "restarts": 1, "queries": 8, "targets": 1}
    stages = [Stage(s.name, s.attack, {k: small.get(k, v) for k, v in s.options.items()}) for s in STAGES["standard"]]
    monkeypatch.setitem(STAGES, "standard", stages)


def network(seed=0, classes=4):
    """A small float32 network whose decisions change within small balls."""
    model = models.mlp((32, 12, classes), seed=seed, input_shape=SHAPE)
    model.weights *= 6
    model.children["fc2"].params["bias"] -= model.forward(images())[0].mean(0)
    return model


def images(seed=0):
    draw = np.random.default_rng(seed)
    x = np.clip(draw.uniform(-0.2, 1.2, (N, *SHAPE)), 0, 1)
    return np.where(draw.random(x.shape) < 0.5, np.rint(x * 255) / 255, x).astype(np.float32)


def own(model, x):
    return model.forward(x)[0].argmax(1)


class Broken:
    """A network whose answers go through ``logits(z, x)``, and its input gradients through ``gradient``."""

    def __init__(self, model, logits=lambda z, x: z, gradient=lambda g: g):
        self.model, self.logits, self.gradient = model, logits, gradient

    def forward(self, x, **options):
        z, cache = self.model.forward(np.nan_to_num(x), **options)  # a NaN image has a class of its own
        lost = np.isnan(x).any((1, 2, 3))
        z[lost] = 100 * np.arange(z.shape[1])
        return self.logits(z, x).astype(z.dtype), cache

    def backward(self, dy, cache, **options):
        return self.gradient(self.model.backward(dy, cache, **options))


@norms
@by_eps
def test_an_image_that_is_nan_fools_nothing(name, norm):
    model, x = network(), images()
    labels, eps = own(model, x), {"linf": 0.02, "l2": 0.1}[norm]
    labels[labels == 3] = 0  # class 3 is the answer to a NaN
    bad = Broken(model, gradient=lambda g: g * np.float32(np.nan))
    adversarial, fooled = BY_EPS[name](bad, x, labels, eps, norm=norm)
    assert exact.inside(norm, eps, x, adversarial) and np.isfinite(adversarial).all()
    assert np.array_equal(fooled, own(model, adversarial) != labels)
    assert np.array_equal(adversarial[~fooled], x[~fooled])


@norms
@by_eps
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fool_nothing(name, norm, value):
    """The network answers so wherever an image was changed."""
    model, x = network(), images()
    labels, clean = own(model, x), {image.tobytes() for image in x}

    def logits(z, seen):
        touched = [image.tobytes() not in clean for image in seen]
        return np.where(np.array(touched)[:, None] & (np.arange(4) == 2), np.float32(value), z)

    adversarial, fooled = BY_EPS[name](Broken(model, logits), x, labels, 0.5, norm=norm)
    assert not fooled.any() and np.array_equal(adversarial, x)


NOT_FINITE = {"nan": np.nan, "inf": np.inf, "minus inf": -np.inf}
not_finite = pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)


@not_finite
def test_logits_that_are_not_finite_are_no_class(value):
    """Neither right nor wrong, and not class 0, whose label all these images have: every figure is refused."""
    x, labels = images(), np.zeros(N, int)
    pixels = np.rint(x * 255).astype(np.uint8)
    bad = Broken(network(), lambda z, _: np.where(np.arange(4) == 1, np.float32(value), z))
    calls = {
        "accuracy": lambda: metrics.accuracy(bad, pixels, labels),
        "robust accuracy": lambda: metrics.robust_accuracy(bad, pixels, labels, 0.1),
        "wasserstein": lambda: attacks.wasserstein(bad, x, labels, steps=2),
        "transfer": lambda: attacks.transfer(bad, x, x, labels, 0.1),
        "cascade": lambda: cascade(bad, x, labels, 0.1),
        **{name: partial(attack, bad, x, labels, 0.1) for name, attack in BY_EPS.items()},
    }
    for name, call in calls.items():
        with pytest.raises(NoClass, match=r"logits are NaN or infinite for \d+ of \d+ images") as error:
            call()
        assert (
            "\n" not in str(error.value) and isinstance(error.value, ValueError) and isinstance(error.value, UserError)
        ), name


@not_finite
def test_recheck_takes_no_logits_that_are_not_finite(value):
    model, x = network(), images()
    other = (own(model, x) + 1) % 4
    assert recheck(model, x, x, other, 0.0).all()
    bad = Broken(model, lambda z, _: np.where(np.arange(4) == 1, np.float32(value), z))
    assert not recheck(bad, x, x, other, 0.0).any()


def test_the_wasserstein_attack_and_nan():
    model, x = network(), images()
    labels = own(model, x)
    options = dict(steps=6, start=0.05, factor=1.5, every=2)
    assert np.isfinite(attacks.wasserstein(model, x, labels, **options)[1]).any()
    some = np.arange(N) % 2 == 0

    def gradient(g):
        g = g.copy()
        g[0, 0, 0, 0] = np.nan
        return g

    adversarial, radius = attacks.wasserstein(
        Broken(model, gradient=gradient), x[some], labels[some], batch_size=1, **options
    )
    assert np.isinf(radius).all() and np.array_equal(adversarial, x[some])


# --- in real arithmetic -----------------------------------------------------------------------------------------------

radii = st.sampled_from([8 / 255, 2 / 255, 0.0, 0.25, 1.0]) | st.floats(0, 0.5) | st.floats(-12, 0).map(lambda e: 10**e)


@norms
@by_eps
@fewer(0.25)
@given(seed=seeds, eps=radii)
def test_adversarial_images_are_in_the_ball_in_rational_arithmetic(name, norm, seed, eps):
    model, x = network(seed % 50), images(seed)
    labels = own(model, x)
    eps *= 1 if norm == "linf" else 4
    adversarial, fooled = BY_EPS[name](model, x, labels, eps, norm=norm, seed=seed)
    assert adversarial.dtype == np.float32 and exact.inside(norm, eps, x, adversarial)
    assert np.array_equal(fooled, own(model, adversarial) != labels)


@norms
def test_that_test_sees_something(norm):
    """The images do reach the edge of the ball, where rounding decides: an eps that is 1e-5 smaller does not hold."""
    model, x = network(), np.float32(0.25) + images() / 2  # where the box does not cut
    eps = {"linf": 8 / 255, "l2": 0.1}[norm]
    for name in ("pgd", "fgsm", "square", "corner_noise"):
        adversarial, fooled = BY_EPS[name](model, x, own(model, x), eps, norm=norm)
        assert fooled.any() and not exact.inside(norm, eps * (1 - 1e-5), x, adversarial), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, eps=radii | st.sampled_from([1e-45, 2.0**-25, 2.0, 1e300, 1 - 2**-53]))
def test_bounds_are_the_outermost_numbers_within_eps(dtype, seed, eps):
    draw = np.random.default_rng(seed)
    x = draw.random((2, 9)).astype(dtype)
    x[0, :8] = [0, 1, 1e-45, 2.0**-24, 0.5, 1 - 2.0**-24, 1 / 255, min(eps, 1)]
    low, high = Linf(eps).bounds(x)
    assert low.dtype == high.dtype == dtype and np.all((0 <= low) & (low <= x) & (x <= high) & (high <= 1))
    assert exact.inside("linf", eps, x, low) and exact.inside("linf", eps, x, high)
    for i in np.ndindex(x.shape):
        one = np.s_[i[0] : i[0] + 1, i[1] : i[1] + 1]
        for bound, way, end in ((low, -1, 0), (high, 2, 1)):
            assert bound[i] == end or not exact.inside("linf", eps, x[one], np.nextafter(bound[one], dtype(way)))
    if dtype is np.float32:  # the kernel's are the same, to the bit
        far, still = np.full_like(x, 9), np.zeros(2, np.float32)
        assert cpu.linf_step(far, far, still, x, eps).tobytes() == high.tobytes()
        assert (
            cpu.linf_step(-far, far, still, x, eps).tobytes() == reference.linf_step(-far, far, still, x, eps).tobytes()
        )
        assert np.array_equal(cpu.linf_step(-far, far, still, x, eps), low)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_l2_projection_ends_inside_where_nothing_hides_its_rounding(dtype):
    """One black pixel: factor and product are rounded, often upwards, and no other pixel makes up for it."""
    x, draw = np.zeros((300, 1, 1, 1), dtype), np.random.default_rng(0)
    for eps in draw.random(20):
        y = L2(eps).project(x, (eps + draw.random(x.shape)).astype(dtype))
        assert L2(eps).inside(x, y).all() and exact.inside("l2", eps, x, y)


def test_l2_takes_nothing_that_is_outside_by_the_last_digit():
    x = np.zeros((1, 1, 2, 1))
    y = x.copy()
    y[0, 0, :, 0] = 0.3, 0.4
    assert L2(0.5 * (1 + 1e-14)).inside(x, y) and not L2(0.5 * (1 - 1e-14)).inside(x, y)
    y32 = y.astype(np.float32)  # 0.3 and 0.4 are more in float32: 0.50000001...
    assert not exact.inside("l2", 0.5, x, y32.astype(float)) and not L2(0.5).inside(x.astype(np.float32), y32)


# --- what is refused, and that it is all there ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in BY_EPS if n != "autoattack"])
def test_every_attack_has_the_same_signature_and_refuses_the_same(name):
    attack = getattr(BY_EPS[name], "func", BY_EPS[name])
    parameters = list(inspect.signature(attack).parameters.items())
    shared = {"norm": "linf", "seed": 0, "ids": None, "batch_size": 250, "progress": None}
    assert [key for key, _ in parameters][:4] == ["model", "x", "labels", "eps"]
    assert shared.items() <= {key: p.default for key, p in parameters}.items()
    model, x = network(), images()
    labels = own(model, x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        attack(model, x, labels, 0.1, nonsense=1)
    changes = [
        dict(eps=np.nan), dict(eps=np.inf), dict(eps=-0.1), dict(labels=labels[:3]), dict(labels=labels + 0.5),
        dict(labels=labels + 4), dict(labels=labels[:, None]), dict(x=x - 0.5), dict(x=x * np.float32(np.nan)),
        dict(x=x.astype(np.float16)), dict(x=x.tolist()), dict(batch_size=0), dict(batch_size=1.5), dict(norm="l0"),
    ]  # fmt: skip
    own_options = {key for key, p in parameters} - {"model", "x", "labels", "eps", *shared}
    bad = {"steps": (-1, 1.5), "restarts": (0, -1), "targets": (0,), "queries": (-1,), "draws": (-1,), "loss": ("x",),
           "step_size": (-1, np.nan, np.inf), "random_start": (), "first": (-1, 0.5)}  # fmt: skip
    changes += [{option: value} for option in own_options for value in bad[option]]
    for change in changes:
        arguments = dict(x=x, labels=labels, eps=0.1) | change
        with pytest.raises(ValueError) as error:
            attack(model, **arguments)
        assert "\n" not in str(error.value), change


def test_attacks_offers_every_attack():
    for name in ("autoattack", "fab", "fab_targeted", "square", "wasserstein", "corner_noise", "transfer", "pgd"):
        assert callable(getattr(attacks, name)) and name in attacks.__all__
