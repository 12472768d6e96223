"""Adversarial training and its kin: what a step minimises, where its images are, and that a run goes on bit for bit."""

import importlib
import itertools
from pathlib import Path

import numpy as np
import programs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import checkpoint, metrics, models, rng, shapes10
from nanomr.attacks.common import L1, L2, Linf
from nanomr.attacks.objectives import cross_entropy_each
from nanomr.attacks.pgd import ascend
from nanomr.attacks.wasserstein import ascend as wasserstein_ascend
from nanomr.backend import to_numpy
from nanomr.data import Dataset
from nanomr.layers import BatchNorm2d, Conv2d, Flatten, Linear, ReLU
from nanomr.losses import kl_divergence, max_mahalanobis
from nanomr.manifold import corners_of
from nanomr.methods import METHODS, adversarial, manifold
from nanomr.models import Model
from nanomr.ops import bfloat16, ops_for
from nanomr.ops import reference as plain_ops
from nanomr.ops.balls import project_l1
from nanomr.optim import SGD
from nanomr.programs import train as train_program
from nanomr.testing.strategies import fewer, seeds
from nanomr.train import Config, Trainer
from nanomr.verify import interval

wasserstein_attack = importlib.import_module("nanomr.attacks.wasserstein")  # the package has a function of the name
NAMES = ("fgsm", "pgd", "trades", "mmc", "msd", "wasserstein", "worst-corner")
names = pytest.mark.parametrize("name", NAMES)
SHAPE, CLASSES, EPS = (4, 4, 2), 3, 0.1


def network(seed=0, dtype=np.float64):
    model = models.mlp((32, 7, CLASSES), seed=seed, input_shape=SHAPE).astype(dtype)
    model.weights *= 2
    return model


def batch(seed=0, n=5, dtype=np.float64):
    draw = np.random.default_rng(seed)
    return np.clip(draw.uniform(-0.2, 1.2, (n, *SHAPE)), 0, 1).astype(dtype), draw.integers(0, CLASSES, n)


def draws(seed=0):
    return lambda stream: rng.generator(seed, stream, 7)


def now(name, eps=EPS, **constants):
    few = {"steps": 4} if "steps" in METHODS[name].constants else {}
    return METHODS[name].filled(few | constants) | {
        "eps": eps,
        "eps_end": eps,
        "lr": 0.1,
        "ramp": 1.0,
        "alpha": 8.0,
        "hamming_norm": "batch",
    }


def step(name, model, x, labels, seed=0, **constants):
    return METHODS[name].step(model, x, labels, draws(seed), now(name, **constants))


@pytest.fixture
def learned_from(monkeypatch):
    """The images that the steps hand to the network in training mode."""
    seen, forward = [], Model.forward

    def noted(self, x, train=False, **options):
        if train:
            seen.append(x)
        return forward(self, x, train=train, **options)

    monkeypatch.setattr(Model, "forward", noted)
    return seen


# --- the references: the methods' formulas in plain NumPy, with the network as a function -----------------------------


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logits(model, x):
    return model.forward(x)[0]


def climb(model, x, start, gradient_of, size, steps, eps):
    """Signed ascent in the linf ball, and the box."""
    for _ in range(steps):
        z, cache = model.forward(start)
        gradient = model.backward(gradient_of(z), cache, param_grads=False)
        start = np.clip(np.clip(start + size * np.sign(gradient), x - eps, x + eps), 0, 1)
    return start


def reference(name, model, x, labels, c, seed=0):
    """(the loss, the images that it is of), with no function that the methods use."""
    generator, onehot = draws(seed)(rng.METHOD), np.eye(CLASSES)[labels]

    def nll(z):
        return -np.log(softmax(z)[np.arange(len(z)), labels])

    if name == "mmc":
        mu = centres(CLASSES)
        z = logits(model, x) @ rotation(mu)  # the logits are z, rotated
        return ((z - c["norm"] * mu[labels]) ** 2).sum(1).mean(), x
    if name == "worst-corner":
        return worse_pair(model, x, labels, seed, c)
    if name in ("fgsm", "pgd"):
        noise = np.stack([generator.uniform(-1, 1, SHAPE) for _ in x])
        start = np.clip(x + c["start"] * c["eps"] * noise, 0, 1)
        moved = climb(
            model, x, start, lambda z: softmax(z) - onehot, c["step_size"] * c["eps"], c.get("steps", 1), c["eps"]
        )
        return nll(logits(model, moved)).mean(), moved
    p = softmax(logits(model, x))
    start = np.clip(x + 0.001 * generator.standard_normal(x.shape), 0, 1)
    moved = climb(model, x, start, lambda z: softmax(z) - p, c["step_size"] * c["eps"], c["steps"], c["eps"])
    kl = (p * (np.log(p) - np.log(softmax(logits(model, moved))))).sum(1)
    return (nll(logits(model, x)) + c["beta"] * kl).mean(), moved


def worse_pair(model, x, labels, seed, c):
    """worst-corner's loss, and x + rho: a slope by central differences, the bits of the draw one by one."""
    words = draws(seed)(rng.CORNERS).bit_generator.random_raw(-(-x.size // 64))
    bits = np.array([int(word) >> i & 1 for word in words for i in range(64)][: x.size])
    drawn = (np.float32(c["eps"]) * (1.0 - 2 * bits)).reshape(x.shape)
    rho, rows = drawn.copy(), np.arange(len(x))

    def nll(images):
        return -np.log(softmax(logits(model, images))[rows, labels])

    for place in np.ndindex(SHAPE):
        nudge = np.zeros(SHAPE)
        nudge[place] = 1e-6
        at = x + c["start"] * drawn
        slope = (nll(at + nudge) - nll(at - nudge)) / 2e-6
        turned = abs(slope) > 1e-8
        rho[(turned, *place)] = np.float32(c["eps"]) * np.sign(slope[turned])
    up, down = (hidden_and_logits(model, x + sign * rho) for sign in (1, -1))
    hamming = np.sqrt(((np.tanh(c["alpha"] * up[0]) - np.tanh(c["alpha"] * down[0])) ** 2).sum()) / (2 * up[0].size)
    pair = ((up[1] - down[1]) ** 2).sum(1).mean()
    ce = (1 - c["share"]) * nll(x).mean() + c["share"] * nll(x + rho).mean()
    return ce + c["gamma_i"] * pair + c["gamma_h"] * hamming, x + rho


def hidden_and_logits(model, x):
    """(what the ReLU of :func:`network` takes in, its logits)"""
    first, last = (layer.params for layer in model.children.values() if layer.params)
    hidden = x.reshape(len(x), -1) @ first["weight"] + first["bias"]
    return hidden, np.maximum(hidden, 0) @ last["weight"] + last["bias"]


def multi_steepest(model, x, labels, generator, c):
    """The images that msd learns from: an image at a time, the l1 ball's threshold by bisection."""

    def each_nll(z):
        return -np.log(softmax(z)[np.arange(len(z)), labels])

    def l1_step(at, slope, k, size):
        room = [1 - p if s > 0 else p for p, s in zip(at, slope, strict=True)]
        moving = sorted(np.flatnonzero(np.array(room) > size / k), key=lambda i: -abs(slope[i]))[:k]
        moved = at.copy()
        for i in moving:
            moved[i] += np.sign(slope[i]) * size / k
        return moved

    def into_l1(change, eps):
        low, high = 0.0, abs(change).max()
        if abs(change).sum() <= eps:
            return change
        for _ in range(100):
            tau = 0.5 * (low + high)
            low, high = (tau, high) if np.maximum(abs(change) - tau, 0).sum() > eps else (low, tau)
        return np.sign(change) * np.maximum(abs(change) - high, 0)

    flat, ramp, best, worst = x.reshape(len(x), -1), c["ramp"], x.copy(), np.full(len(x), -np.inf)
    eps_2, eps_1, current = ramp * c["eps_l2"], ramp * c["eps_l1"], flat.copy()
    for _ in range(c["steps"]):
        z, cache = model.forward(current.reshape(x.shape))
        slopes = model.backward(softmax(z) - np.eye(CLASSES)[labels], cache, param_grads=False).reshape(flat.shape)
        k, three = generator.integers(5, 21), np.empty((3, *flat.shape))
        for i, (x0, at, slope) in enumerate(zip(flat, current, slopes, strict=True)):
            by_inf = np.clip(at + c["step_size"] * c["eps"] * np.sign(slope), x0 - c["eps"], x0 + c["eps"])
            by_two = at + c["step_size"] * eps_2 * slope / max(np.linalg.norm(slope), 1e-300) - x0
            by_two *= min(1, eps_2 / max(np.linalg.norm(by_two), 1e-300))
            by_one = into_l1(l1_step(at, slope, k, ramp * c["step_l1"]) - x0, eps_1)
            three[:, i] = np.clip([by_inf, x0 + by_two, x0 + by_one], 0, 1)
        found = np.array([each_nll(logits(model, images.reshape(x.shape))) for images in three])
        for i, which in enumerate(found.argmax(0)):
            current[i] = three[which, i]
            if found[which, i] > worst[i]:
                worst[i], best[i] = found[which, i], current[i].reshape(SHAPE)
    return best


MSD = {"eps_l2": 0.4, "eps_l1": 1.6, "step_size": 0.4, "step_l1": 0.5}


@fewer(0.5)
@given(seed=seeds)
def test_msds_images_are_the_formulas(seed):
    model, (x, labels) = network(seed % 1000), batch(seed, n=8)
    settings = now("msd", **MSD) | {"ramp": 0.8}
    found = adversarial.union_ascent(model, x, labels, draws(seed)(rng.METHOD), settings)
    wanted = multi_steepest(model, x, labels, draws(seed)(rng.METHOD), settings)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("constant", ["eps", *MSD])
def test_msds_formula_with_another_constant_is_other_images(constant):
    """The negative control: each ball and each step counts for some image."""
    model, (x, labels) = network(3), batch(3, n=40)
    settings = now("msd", **MSD)
    found = adversarial.union_ascent(model, x, labels, draws()(rng.METHOD), settings)
    for factor, same in ((1.0, True), (0.9, False)):
        other = settings | {constant: factor * settings[constant]}
        wanted = multi_steepest(model, x, labels, draws()(rng.METHOD), other)
        assert (abs(found - wanted).max() < 1e-9) == same


def moved_mass(x, y, radius, strength):
    """The nearest image to y, one image (H, W, 1), in the Wasserstein ball around x: coordinate ascent in the dual, the
    plan a matrix, until nothing changes."""
    at = np.stack(np.indices(x.shape[:2]), -1).reshape(-1, 2)
    away = at[:, None] - at
    cost, allowed = (away**2).sum(-1), (abs(away) <= 2).all(-1)
    mass, beta, price, log_w = x.sum(), np.zeros(x.size), 1.0, np.zeros(x.size)
    x, y = x.ravel() / mass, y.ravel() / mass
    for _ in range(2000):
        before = np.append(beta, price)
        kernel = allowed * np.exp(-price * cost)
        from_x = x / (kernel @ np.exp(beta))
        plan = from_x[:, None] * kernel * np.exp(beta)
        paid = (plan * cost).sum()
        price = max(0.0, price + np.log(paid / radius) * paid / (plan * cost**2).sum())
        arrives = from_x @ (allowed * np.exp(-price * cost))
        t = strength * y + np.log(strength * arrives)
        for _ in range(4):  # w + log w = t, in the end
            log_w = log_w - (np.exp(log_w) + log_w - t) / (np.exp(log_w) + 1)
        beta = strength * y - np.exp(log_w)
        if abs(np.append(beta, price) - before).max() < 1e-10:
            break
    return (np.exp(log_w) / strength * mass).reshape(*at.max(0) + 1, 1)


def transported(model, x, labels, c):
    """The images that wasserstein learns from, one at a time."""
    images = x.copy()
    for i, (x0, label) in enumerate(zip(x, labels, strict=True)):
        for k in range(c["steps"]):
            z, cache = model.forward(images[i : i + 1])
            if z[0].argmax() != label:
                break
            slope = model.backward(softmax(z) - np.eye(z.shape[1])[[label]], cache, param_grads=False)[0]
            radius = c["radius"] * c["factor"] ** (k // c["every"])
            goal = images[i] + c["step_size"] * np.sign(slope)
            images[i] = np.clip(moved_mass(x0, goal, radius, c["regularization"]), 0, 1)
    return images


MASS = {"radius": 0.05, "factor": 1.5, "every": 2, "step_size": 0.15, "regularization": 100.0}


@pytest.fixture
def exactly(monkeypatch):
    """Projections until they stand still: the method stops them after a few iterations."""
    run = wasserstein_attack.project
    exact = dict(tolerance=1e-9, iterations=20000)
    monkeypatch.setattr(wasserstein_attack, "project", lambda *args, **options: run(*args, **options | exact))


def mass_case():
    model = models.mlp((9, 6, 3), seed=4, input_shape=(3, 3, 1)).astype(np.float64)
    model.weights *= 2
    draw = np.random.default_rng(4)
    x = draw.uniform(0.1, 0.8, (8, 3, 3, 1))
    labels = logits(model, x).argmax(1)
    labels[0] = (labels[0] + 1) % 3  # wrong to begin with
    return model, x, labels


def test_wassersteins_images_are_the_formulas(exactly, learned_from):
    model, x, labels = mass_case()
    wanted = transported(model, x, labels, now("wasserstein", **MASS))
    found = step("wasserstein", model, x, labels, **MASS)
    np.testing.assert_allclose(learned_from[-1], wanted, atol=1e-6)
    assert found["loss"] == pytest.approx(-np.log(softmax(logits(model, wanted))[range(8), labels]).mean(), rel=1e-5)
    fooled = logits(model, wanted).argmax(1) != labels
    assert 1 < fooled.sum() < 7, "some must leave early, and some stay"


@pytest.mark.parametrize("constant", MASS)
def test_wassersteins_formula_with_another_constant_is_other_images(constant, exactly, learned_from):
    """The negative control."""
    model, x, labels = (a if isinstance(a, Model) else a[4:7] for a in mass_case())
    other = MASS | {constant: 1 if constant == "every" else 0.8 * MASS[constant]}
    step("wasserstein", model, x, labels, **MASS)
    assert abs(learned_from[-1] - transported(model, x, labels, now("wasserstein", **other))).max() > 1e-4


def test_two_iterations_a_projection_climb_nearly_as_high():
    """Each goes on from the last one's prices. The negative control is a single one, which moves no price."""
    images, labels = shapes10.generate(100, shapes10.SEED)
    model, x = models.small_cnn(seed=1), images.astype(np.float32) / 255
    labels, radii = logits(model, x).argmax(1), [0.01 * 1.5 ** (step // 2) for step in range(20)]

    def climbed(iterations):
        moved, _ = wasserstein_ascend(model, x, labels, radii, 0.1, 3000.0, iterations)
        p = [softmax(logits(model, images))[range(len(x)), labels] for images in (x, moved)]
        return np.log(p[0] / p[1]).mean()

    high = climbed(400)
    assert high > 0.01 and climbed(1) < 0.5 * high < 0.9 * high < climbed(2)


@pytest.mark.parametrize("iterations", [2, 5])
def test_wassersteins_projections_have_the_iterations_that_they_were_given(iterations, monkeypatch):
    run, seen = wasserstein_attack.project, []

    def counted(*args, **options):
        seen.append(run(*args, **options))
        return seen[-1]

    monkeypatch.setattr(wasserstein_attack, "project", counted)
    step("wasserstein", *mass_case(), **MASS, iterations=iterations)
    assert max(found.iterations.max() for found in seen) == iterations


def centres(classes):
    """Pang et al.'s, of length 1: as their algorithm builds them, coordinate by coordinate."""
    mu = np.zeros((classes, classes))
    mu[0, 0] = 1
    for i in range(1, classes):
        for j in range(i):
            mu[i, j] = -(1 + mu[i] @ mu[j] * (classes - 1)) / (mu[j, j] * (classes - 1))
        if i < classes - 1:  # the last needs no axis of its own: its square is rounding's 1e-16, whose root is not
            mu[i, i] = np.sqrt(1 - mu[i] @ mu[i])
    return mu


def rotation(mu):
    """Q with Q mu_k the simplex around the unit vectors: the two have the same inner products."""
    k = len(mu)
    u, _, v = np.linalg.svd((np.sqrt(k / (k - 1)) * (np.eye(k) - 1 / k)).T @ mu)
    return u @ v


@pytest.mark.parametrize("name", ["fgsm", "pgd", "trades", "mmc", "worst-corner"])
@fewer(0.5)
@given(seed=seeds)
def test_a_step_is_the_formula(name, seed):
    model, (x, labels) = network(seed % 1000), batch(seed)
    wanted, _ = reference(name, model, x, labels, now(name), seed)
    assert step(name, model, x, labels, seed)["loss"] == pytest.approx(wanted, rel=1e-9)


def test_a_formula_with_another_constant_is_another_number():
    """The negative control: the comparison sees a tenth of a step, of beta, of a centre's length; start is left out."""
    model, (x, labels) = network(), batch()
    pairs = [("worst-corner", name) for name in METHODS["worst-corner"].constants]
    for name, constant in (("fgsm", "step_size"), ("pgd", "step_size"), ("trades", "beta"), ("mmc", "norm"), *pairs):
        c = now(name)
        wanted, _ = reference(name, model, x, labels, c | {constant: (constant != "start") * 0.9 * c[constant]})
        assert step(name, model, x, labels)["loss"] != pytest.approx(wanted, rel=1e-6), name


# --- gradients: of the loss by the weights, along random directions ---------------------------------------------------


@names
@fewer(0.5)
@given(seed=seeds)
def test_the_gradient_is_the_losss_with_the_images_held(name, seed):
    """Finite differences of the step itself, whose images are those of the first call (an attack's are constants)."""
    model, (x, labels) = network(seed % 1000), batch(seed)
    frozen = {}

    def hold(module, function):
        original = getattr(module, function)

        def held(*args, **options):
            if function not in frozen:
                frozen[function] = original(*args, **options)
            return frozen[function]

        return original, held

    with pytest.MonkeyPatch.context() as patch:
        for function in ("ascend", "union_ascent", "wasserstein_ascend"):
            patch.setattr(adversarial, function, hold(adversarial, function)[1])
        patch.setattr(manifold, "worse_corners", hold(manifold, "worse_corners")[1])
        rate = _rate(name, model, x, labels, seed)
    assert rate[0] == pytest.approx(rate[1], rel=2e-5, abs=1e-7)


def _rate(name, model, x, labels, seed):
    """(what the gradient claims, what differences show) along one direction."""
    start, direction, h = model.weights.copy(), np.random.default_rng(seed).standard_normal(model.weights.size), 1e-6
    model.gradients[...] = 0
    step(name, model, x, labels, seed)
    claimed = float(model.gradients @ direction)
    values = []
    for sign in (1, -1):
        model.weights[...] = start + sign * h * direction
        values.append(float(step(name, model, x, labels, seed)["loss"]))
    model.weights[...] = start
    return claimed, (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("branch", [0, 1])
def test_trades_without_one_branch_is_found_out(branch, monkeypatch):
    """The negative control: the divergence's gradient through the clean images alone, or the moved ones alone."""
    right = kl_divergence

    def one_branch(z, z_moved):
        value, *gradients = right(z, z_moved)
        gradients[branch] = 0 * gradients[branch]
        return value, *gradients

    model, (x, labels) = network(), batch()
    moved = np.clip(x + 0.1, 0, 1)
    monkeypatch.setattr(adversarial, "ascend", lambda *args, **options: moved)
    claimed, shown = _rate("trades", model, x, labels, 0)
    assert claimed == pytest.approx(shown, rel=1e-6)
    monkeypatch.setattr(adversarial, "kl_divergence", one_branch)
    claimed, shown = _rate("trades", model, x, labels, 0)
    assert claimed != pytest.approx(shown, rel=1e-3)


@names
def test_a_step_adds_to_the_gradients_and_leaves_the_rest(name):
    model, (x, labels) = network(), batch()
    before, images = model.weights.copy(), x.copy()
    model.gradients[...] = 0
    step(name, model, x, labels)
    once = model.gradients.copy()
    step(name, model, x, labels)
    np.testing.assert_allclose(model.gradients, 2 * once, rtol=1e-12, atol=1e-15)
    assert once.any()
    np.testing.assert_array_equal(model.weights, before)
    np.testing.assert_array_equal(x, images)


@names
def test_a_step_names_what_its_method_says_and_keeps_the_dtype(name):
    model, (x, labels) = network(dtype=np.float32), batch(dtype=np.float32)
    found = step(name, model, x, labels)
    assert set(found) == {"loss", "cross_entropy", *METHODS[name].reports}
    assert model.gradients.dtype == np.float32 and all(np.isfinite(float(value)) for value in found.values())


@names
def test_a_step_is_a_function_of_its_draw(name):
    model, (x, labels) = network(), batch(n=8)
    values = [float(step(name, model, x, labels, seed)["loss"]) for seed in (0, 0, 1)]
    assert values[0] == values[1]
    assert (values[0] == values[2]) == (name in ("mmc", "wasserstein"))  # which draw nothing


# --- where the images are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["fgsm", "pgd", "trades"])
@given(seed=seeds, eps=st.floats(0, 0.5))
def test_images_stay_in_ball_and_box(name, dtype, seed, eps):
    model, (x, labels) = network(seed % 1000, dtype), batch(seed, dtype=dtype)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversarial, "ascend", lambda *args, **o: seen.append(ascend(*args, **o)) or seen[-1])
        step(name, model, x, labels, seed, eps=eps)
    assert Linf(eps).inside(x, seen[0]).all()
    assert seen[0].dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, eps=st.floats(0.01, 0.5))
def test_msds_images_are_in_one_of_the_balls(dtype, seed, eps):
    model, (x, labels) = network(seed % 1000, dtype), batch(seed, dtype=dtype)
    settings = now("msd", eps, eps_l2=1.5 * eps, eps_l1=4 * eps, step_size=1.0, step_l1=2 * eps)
    found = adversarial.union_ascent(model, x, labels, draws(seed)(rng.METHOD), settings)
    inside = [ball.inside(x, found) for ball in (Linf(eps), L2(1.5 * eps), L1(4 * eps))]
    assert np.any(inside, 0).all() and found.dtype == dtype


def test_msd_ends_at_the_worst_of_what_it_saw():
    """More steps are never better for the network; each ball is the worst for some image."""
    model, (x, labels) = network(3), batch(3, n=40)

    def found(steps, eps_l1=1.3, step_size=0.1):
        settings = now("msd", steps=steps, eps_l2=0.4, eps_l1=eps_l1, step_l1=0.3, step_size=step_size)
        return adversarial.union_ascent(model, x, labels, draws()(rng.METHOD), settings)

    losses = [cross_entropy_each(model.forward(found(steps, step_size=1))[0], labels)[0] for steps in (1, 2, 5, 10)]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(losses))
    assert (losses[-1] > losses[0]).any()
    for eps_l1, used in ((1.3, [0, 1]), (1.8, [0, 2])):
        inside = np.array([ball.inside(x, found(10, eps_l1)) for ball in (Linf(EPS), L2(0.4), L1(eps_l1))])
        assert (inside & (inside.sum(0) == 1)).any(1)[used].all()


def test_wassersteins_images_move_mass_and_are_taken_as_they_are():
    """Those that are wrong stay; the others move, in the box, with no more mass than they had, fooled or not."""
    model, (x, labels) = network(2), batch(2, n=30)
    right = logits(model, x).argmax(1) == labels
    assert 3 < right.sum() < 27
    moved, radius = wasserstein_ascend(model, x[right], labels[right], [0.01] * 3, 0.1, 3000.0)
    assert (moved >= 0).all() and (moved <= 1).all()
    assert (moved.sum((1, 2, 3)) <= x[right].sum((1, 2, 3)) * (1 + 1e-9)).all()
    assert np.isinf(radius).any() and (abs(moved - x[right]).max((1, 2, 3)) > 0).all()
    after = logits(model, moved).argmax(1) != labels[right]
    np.testing.assert_array_equal(after, np.isfinite(radius))


def test_wasserstein_learns_from_them(learned_from):
    model, (x, labels) = network(2), batch(2, n=30)
    right = logits(model, x).argmax(1) == labels
    step("wasserstein", model, x, labels)
    np.testing.assert_array_equal(learned_from[-1][~right], x[~right])
    assert (abs(learned_from[-1] - x)[right].max((1, 2, 3)) > 0).all()


# --- the l1 ball ------------------------------------------------------------------------------------------------------


@given(seed=seeds, eps=st.floats(0.01, 5))
def test_the_projection_onto_the_l1_ball_is_the_nearest_point(seed, eps):
    """By the inequality that says so: no point p of the ball has (c - P)(p - P) > 0; its corners are enough."""
    c = np.random.default_rng(seed).standard_normal((4, 3, 2))
    found = project_l1(c, eps)
    assert (abs(found).sum((1, 2)) <= eps * (1 + 1e-12)).all()
    gap, flat = (c - found).reshape(4, -1), found.reshape(4, -1)
    assert (eps * abs(gap).max(1) <= (gap * flat).sum(1) + 1e-10).all()  # corners: +-eps in one coordinate
    within = abs(c).sum((1, 2)) <= eps
    np.testing.assert_array_equal(found[within], c[within])


def test_scaling_instead_of_projecting_is_found_out():
    """The negative control: the point in the direction of c is in the ball, and is not the nearest."""
    c = np.array([[3.0, -2.0, 0.5]])
    scaled = c * 3 / 5.5
    assert not (3 * abs(c - scaled).max(1) <= ((c - scaled) * scaled).sum(1) + 1e-10).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, eps=st.floats(0, 20), size=st.floats(0, 10), k=st.integers(1, 40))
def test_l1_steps_stay_in_ball_and_box(dtype, seed, eps, size, k):
    draw, ball = np.random.default_rng(seed), L1(eps, k)
    x0, _ = batch(seed, dtype=dtype)
    x = ball.project(x0, draw.random(x0.shape).astype(dtype))
    assert ball.inside(x0, x).all()
    moved = ball.step(x0, x, draw.standard_normal(x0.shape).astype(dtype), np.full(len(x), size, dtype))
    assert ball.inside(x0, moved).all() and moved.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("eps", [2.0**-149, 2.0**-149 * 3, 1e-44, 1e-42, 1e-40, 1e-38])
def test_tiny_balls_hold_too(dtype, eps):
    """Below 2^-126 float32 has fewer digits, and what is rounded to the nearest may leave a ball. Around black images,
    where tiny changes show."""
    x = (eps * np.random.default_rng(0).random((40, 3, 3, 1)) * 3).astype(dtype)
    x0, still = np.zeros_like(x), np.zeros(len(x), dtype)
    for ops in (ops_for(x), plain_ops):  # the latter's formulas are a GPU's, in float32
        moved = ops.l1_step(x, x, still, x0, eps, 20), ops.l2_step(x, x, still, x0, eps)
        for ball, found in zip((L1(eps), L2(eps)), moved, strict=True):
            assert ball.inside(x0, found).all()
            assert (found > 0).any() or (dtype == np.float32 and eps < 1e-42)


@given(seed=seeds, k=st.integers(1, 6))
def test_an_l1_step_gains_most(seed, k):
    """Against every other choice of k coordinates: the linear program's corners are such choices."""
    draw = np.random.default_rng(seed)
    x, gradient, size = draw.uniform(0.3, 0.7, (1, 2, 3, 1)), draw.standard_normal((1, 2, 3, 1)), 0.2
    change = L1(100.0, k).step(x, x, gradient, np.array([size])) - x
    assert abs(change).sum() == pytest.approx(size, rel=1e-6) and abs(change).max() <= size / k * (1 + 1e-9)
    best = max(abs(gradient.ravel()[list(c)]).sum() * size / k for c in itertools.combinations(range(6), k))
    assert (gradient * change).sum() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_gradient_or_pixel_that_is_not_a_number_leaves_no_image(dtype, place):
    """All of that image, and none of another: a step of NaN has no length."""
    x0, gradient = np.full((2, 2, 2, 3), 0.5, dtype), np.arange(1, 25, dtype=dtype).reshape(2, 2, 2, 3)
    for odd in (x0.copy(), gradient.copy()):
        odd[0].ravel()[place] = np.nan
        images = (odd, gradient) if (odd[1] == x0[1]).all() else (x0, odd)
        moved = L1(1.0, 3).step(x0, *images, np.full(2, 0.3, dtype))
        assert np.isnan(moved[0]).all() and np.isfinite(moved[1]).all()


def test_an_l1_step_leaves_out_pixels_without_room():
    x, gradient = np.array([[[[1.0], [0.5], [0.5], [0.0]]]]), np.array([[[[9.0], [1.0], [-2.0], [-8.0]]]])
    moved = L1(10.0, 2).step(x, x, gradient, np.array([0.2]))
    np.testing.assert_allclose(moved.ravel(), [1, 0.6, 0.4, 0], rtol=1e-12)


# --- centres ----------------------------------------------------------------------------------------------------------


@given(seed=seeds, classes=st.integers(2, 10), norm=st.floats(0.1, 100))
def test_the_logits_are_the_rotated_features(seed, classes, norm):
    """The same loss, and the same predictions, as of Pang et al.'s centres by their own algorithm."""
    draw, mu = np.random.default_rng(seed), centres(classes)
    q = rotation(mu)
    np.testing.assert_allclose(q @ q.T, np.eye(classes), atol=1e-12)
    z, labels = norm * draw.standard_normal((6, classes)), draw.integers(0, classes, 6)
    value, _ = max_mahalanobis(z @ q.T, labels, norm)
    distance = ((z[:, None] - norm * mu) ** 2).sum(2)
    assert value == pytest.approx(distance[np.arange(6), labels].mean(), rel=1e-9)
    np.testing.assert_array_equal((z @ q.T).argmax(1), distance.argmin(1))
    inner = norm**2 * (mu @ mu.T)
    np.testing.assert_allclose(inner[~np.eye(classes, dtype=bool)], -(norm**2) / (classes - 1), rtol=1e-9)


def test_training_the_rotated_layer_is_rotating_the_trained_one():
    """Steps of SGD with momentum and decay, of the features by Pang et al.'s loss, and of the logits by ours."""
    draw, q = np.random.default_rng(0), rotation(centres(4))
    a, labels, mu = draw.standard_normal((20, 5)), draw.integers(0, 4, 20), 10 * centres(4)
    w = draw.standard_normal((5, 4))
    folded, v, v_folded = w @ q.T, 0.0, 0.0
    for _ in range(30):
        v = 0.9 * v + a.T @ (2 / 20 * (a @ w - mu[labels])) + 5e-4 * w
        v_folded = 0.9 * v_folded + a.T @ max_mahalanobis(a @ folded, labels, 10.0)[1] + 5e-4 * folded
        w, folded = w - 0.01 * v, folded - 0.01 * v_folded
    np.testing.assert_allclose(w @ q.T, folded, rtol=1e-9)
    assert abs(folded - draw.standard_normal((5, 4))).max() > 1  # something was learned


def test_a_network_trained_on_centres_is_verified_as_it_is(tmp_path):
    model, (x, labels) = network(1, np.float32), batch(1, n=12, dtype=np.float32)
    optimizer = SGD(model, clip=1.0)
    for i in range(300):
        METHODS["mmc"].step(model, x, labels, draws(i), now("mmc"))
        optimizer.step(0.03)
    model.save(tmp_path / "model.safetensors")
    saved = models.load(tmp_path / "model.safetensors")
    z = saved.forward(x)[0]
    target = 10 * np.sqrt(3 / 2) * (np.eye(3) - 1 / 3)  # where the classes' centres are in these coordinates
    np.testing.assert_array_equal(((z[:, None] - target) ** 2).sum(2).argmin(1), z.argmax(1))
    assert (z.argmax(1) == labels).all()
    (low, high), _ = interval(saved, x - 1e-4, x + 1e-4)
    others = np.where(np.eye(3, dtype=bool)[labels], -np.inf, high).max(1)
    assert (low[np.arange(12), labels] > others).all()  # bounds prove it, with no layer but the network's own


# --- batch norm, and what is refused ----------------------------------------------------------------------------------


def normed():
    layers = {"conv": Conv2d(2, 3, 3, 1, 1), "bn": BatchNorm2d(3), "relu": ReLU()}
    layers |= {"flatten": Flatten(), "fc": Linear(48, CLASSES)}
    return Model(layers, "normed", SHAPE, seed=0).astype(np.float64)


@names
def test_attacks_leave_running_statistics_alone_where_the_source_does(name):
    """One training pass over the batch moves them once; FGSM's and the Wasserstein attack's passes are in that mode."""
    model, (x, labels) = normed(), batch(n=8)
    step(name, model, x, labels)
    passes = int(model.children["bn"].buffers["num_batches_tracked"])
    assert {"fgsm": passes == 2, "trades": passes == 2, "wasserstein": passes > 2}.get(name, passes == 1)


@names
def test_odd_input_is_refused(name):
    model, (x, labels) = network(), batch()
    for bad in (labels[:-1], labels + 0.5, labels - 5):
        with pytest.raises(ValueError):
            step(name, model, x, bad)


@names
def test_a_step_on_a_device_is_the_cpus(cupy, name):
    """The same draws, and so the same images but for rounding (the projection onto a Wasserstein ball stops early)."""
    here, there, (x, labels) = network(), network().to("gpu"), batch(n=4)
    few = {"steps": 1} if name == "wasserstein" else {}
    expected = step(name, here, x, labels, **few)
    found = step(name, there, cupy.asarray(x), cupy.asarray(labels), **few)
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(float(value), rel=1e-6), key
    np.testing.assert_allclose(to_numpy(there.gradients), here.gradients, rtol=1e-4, atol=1e-8)


def test_worse_corners_of_bfloat16_pictures_are_those_of_the_rounded_network():
    model, draw = models.small_cnn(seed=3), np.random.default_rng(0)
    wide, labels = draw.random((8, 32, 32, 3), np.float32), draw.integers(0, 10, 8)
    ops = ops_for(wide)
    x, rho = (ops.cast(a, bfloat16()) for a in (wide, corners_of(wide, EPS, rng.words(0, rng.CORNERS, 0, 384))))
    found = manifold.worse_corners(model, x, labels, rho)
    assert found.dtype == bfloat16()
    found, rho, rounded = (ops.cast(a, np.float32) for a in (found, rho, x))
    np.testing.assert_array_equal(abs(found), abs(rho))
    expected = manifold.worse_corners(model, rounded, labels, rho)
    assert 0.97 < (found == expected).mean() < 1 and (expected == rho).mean() < 0.6  # bf16's slopes, and not the draw


def test_worse_corners_stay_as_they_are_drawn_where_there_is_no_slope():
    model, (x, labels) = network(), batch()
    rho = corners_of(x, EPS, rng.words(0, rng.CORNERS, 0, 3))
    model.weights[...] = 0
    np.testing.assert_array_equal(manifold.worse_corners(model, x, labels, rho), rho)
    assert 0 < (rho > 0).mean() < 1


def test_corners_that_do_not_fit_the_images_are_refused():
    model, (x, labels) = network(), batch()
    for rho in (np.full(SHAPE, EPS), np.full((len(x) - 1, *SHAPE), EPS), np.full(x.shape, EPS, np.float32)):
        with pytest.raises(ValueError, match="rho"):
            manifold.worse_corners(model, x, labels, rho)
    with pytest.raises(ValueError):
        manifold.worse_corners(model, x, labels[:-1], np.full(x.shape, EPS))


def test_worst_corner_takes_the_hamming_norm_that_is_asked_for():
    model, (x, labels) = network(), batch()
    both = [
        METHODS["worst-corner"].step(model, x, labels, draws(), now("worst-corner") | {"hamming_norm": norm})
        for norm in ("batch", "sample")
    ]
    assert both[1]["hamming"] > 1.2 * both[0]["hamming"] > 0


def test_worst_corner_alone_is_trained_in_bf16_beside_the_papers():
    config = Config({}, "worst-corner", "toy", 1, precision="bf16")
    assert config.checked() is config
    for method, precision in (("worst-corner", "tf32"), ("pgd", "bf16")):
        with pytest.raises(ValueError, match="is trained in"):
            Config({}, method, "toy", 1, precision=precision).checked()


@given(epochs=st.integers(1, 300), done=st.floats(0, 1))
def test_eps_grows_for_a_quarter_of_the_run_and_lr_is_the_recipes(epochs, done):
    for recipe, shape in (
        ("cyclic", lambda d: 1 - abs(2 * d - 1)),
        ("steps", lambda d: 10.0 ** -((d >= 0.5) + (d >= 0.75))),
    ):
        config = Config({}, "pgd", "toy", epochs, recipe=recipe, lr=0.2)
        found = config.schedule(done * epochs)
        done_ = done * epochs / epochs  # as it is rounded there
        assert found["lr"] == pytest.approx(0.2 * shape(done_), abs=1e-12)
        assert found["ramp"] == pytest.approx(min(1, 4 * done_)) and found["eps"] == pytest.approx(
            8 / 255 * found["ramp"]
        )


# --- runs -------------------------------------------------------------------------------------------------------------


def trainer(name, folder, epochs=2):
    images, labels = shapes10.generate(62, shapes10.SEED)
    data = Dataset("shapes10", shapes10.CLASSES, images, labels, images[:5], labels[:5], {})
    few = {"steps": 2} if "steps" in METHODS[name].constants else {}
    config = Config(
        architecture=models.mlp((3072, 8, 10)).architecture, method=name, data="shapes10", epochs=epochs, batch_size=25,
        hold_out=12, lr=0.03, clip=1.0, recipe=METHODS[name].recipe, constants=few,
    )  # fmt: skip
    return Trainer(config.checked(), data, folder)


def outcome(folder):
    files = [(folder / name).read_bytes() for name in ("model.safetensors", "last.safetensors")]
    log = checkpoint.read_jsonl(folder / "log.jsonl")
    return files, [{k: v for k, v in r.items() if k not in ("images_per_s", "seconds")} for r in log]


@names
def test_each_trains_on_shapes10_and_goes_on_bit_for_bit(name, tmp_path):
    straight = trainer(name, tmp_path / "straight")
    before = straight.model.weights.copy()
    straight.run()
    _, log = outcome(tmp_path / "straight")
    assert [r["epoch"] for r in log] == [1, 2] and all(np.isfinite(r["loss"]) for r in log)
    assert all(r["eps"] == 8 / 255 for r in log) and not np.array_equal(straight.model.weights, before)
    first = trainer(name, tmp_path / "resumed")
    first.open_folder()
    first.advance()
    first.save()  # within the first epoch
    second = trainer(name, tmp_path / "resumed")
    second.resume()
    assert second.step == 1
    second.run()
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "straight")


@names
def test_the_program_runs_each_with_its_constants(name, tmp_path, monkeypatch, capsys):
    programs.isolate(monkeypatch, tmp_path, train=80, test=20)
    call = programs.caller(train_program, monkeypatch, capsys)
    constant = "steps=2" if "steps" in METHODS[name].constants else f"{next(iter(METHODS[name].constants))}=0.5"
    flags = "--model mlp --device cpu --hold-out 20 --batch-size 30 --epochs 1 --test-images 0 --out run".split()
    code, _, err = call("--method", name, "--constant", constant, *flags)
    assert code == 0, err
    config = checkpoint.read_json("run/config.json")["config"]
    key, _, value = constant.partition("=")
    assert config["method"] == name and config["recipe"] == METHODS[name].recipe
    assert config["constants"] == METHODS[name].filled({}) | {key: float(value)}
    (record,) = checkpoint.read_jsonl(Path("run/log.jsonl"))
    weights = {name: value for name, value in config["constants"].items() if name.startswith("gamma")}
    assert {name: record.get(name) for name in weights} == weights  # curves.png draws the terms by their weights
    programs.assert_one_error_line(call("--method", name, "--constant", "nonsense=1", *flags), "nonsense", key)


@pytest.mark.parametrize("name", ["gamma-i", "gamma-h"])
def test_the_papers_weights_are_not_ignored_by_worst_corner(name, tmp_path, monkeypatch, capsys):
    programs.isolate(monkeypatch, tmp_path, train=80, test=20)
    call = programs.caller(train_program, monkeypatch, capsys)
    refused = call("--method", "worst-corner", f"--{name}", "3", *"--model mlp --device cpu --out run".split())
    programs.assert_one_error_line(refused, f"--{name}", f"--constant {name.replace('-', '_')}=X")
    assert not Path("run").exists()


def test_a_run_of_fgsm_warns_of_catastrophic_overfitting(tmp_path, monkeypatch, capsys):
    """Held-out accuracy under several steps is made 0, then that under a single step is as low."""
    real = metrics.robust_accuracy
    single = {"fgsm": 0.9}

    def made_up(*args, steps, **options):
        real(*args, steps=steps, **options)
        return single["fgsm"] if steps == 1 else 0.0

    monkeypatch.setattr(metrics, "robust_accuracy", made_up)
    trainer("fgsm", tmp_path / "overfitted", epochs=1).run()
    (record,) = checkpoint.read_jsonl(tmp_path / "overfitted" / "log.jsonl")
    assert record["fgsm"] == 0.9 and "catastrophic overfitting" in record["warning"]
    assert "catastrophic overfitting" in "".join(capsys.readouterr())
    single["fgsm"] = 0.1
    trainer("fgsm", tmp_path / "fine", epochs=1).run()
    (record,) = checkpoint.read_jsonl(tmp_path / "fine" / "log.jsonl")
    assert record["fgsm"] == 0.1 and "warning" not in record
    trainer("pgd", tmp_path / "pgd", epochs=1).run()
    assert "fgsm" not in checkpoint.read_jsonl(tmp_path / "pgd" / "log.jsonl")[0]
    assert "catastrophic" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("fgsm", "pgd", "warned"), [(0.8, 0.0, True), (0.45, 0.1, True), (0.4, 0.3, False), (0.12, 0.0, False)]
)
def test_catastrophic_overfitting_is_told_from_learning(fgsm, pgd, warned):
    assert adversarial.overfitted(fgsm, pgd, 10) == warned
