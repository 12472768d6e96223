"""PGD and what all attacks share: results are in ball and box, fool the network, and depend on the arguments only."""

import exact
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import models
from nanomr.attacks import common, fgsm, pgd
from nanomr.attacks.common import L2, Linf, check_inputs, check_logits, draws, recheck, threat
from nanomr.metrics import robust_accuracy
from nanomr.testing.strategies import fewer, seeds

SHAPE = (3, 3, 3)
N = 20


def network(seed=0, hidden=(8,), classes=3, dtype=np.float32, scale=6.0):
    """A small network whose decisions change within small balls."""
    model = models.mlp((27, *hidden, classes), seed=seed, input_shape=SHAPE).astype(dtype)
    model.weights *= scale
    return balanced(model, images(dtype=dtype)[0])


def balanced(model, x):
    """The model with its last bias moved so that no class wins everywhere."""
    *_, last = model.children.values()
    last.params["bias"] -= model.forward(x)[0].mean(0)
    return model


def images(seed=0, n=N, dtype=np.float32, classes=3):
    """Random images, black and white pixels among them, and random labels."""
    draw = np.random.default_rng(seed)
    x = np.clip(draw.uniform(-0.3, 1.3, (n, *SHAPE)), 0, 1).astype(dtype)
    return x, draw.integers(0, classes, n)


def own(model, x):
    """What the model says: labels that it gets right."""
    return model.forward(x)[0].argmax(1)


def wrong(model, x, labels):
    return own(model, x) != labels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@fewer(0.75)
@given(seed=seeds, eps=st.floats(0, 0.5), step_size=st.floats(0, 1), restarts=st.integers(1, 3), start=st.booleans())
def test_adversarial_images_are_in_ball_and_box_and_fooled_says_which_fool(
    dtype, seed, eps, step_size, restarts, start
):
    model = network(seed % 1000, dtype=dtype)
    x, labels = images(seed, dtype=dtype)
    before = x.copy()
    adversarial, fooled = pgd(
        model,
        x,
        labels,
        eps,
        step_size=step_size,
        steps=3,
        restarts=restarts,
        seed=seed,
        random_start=start,
        batch_size=7,
    )
    assert adversarial.dtype == dtype and adversarial.shape == x.shape and fooled.dtype == bool
    assert np.array_equal(x, before) and adversarial is not x
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert exact.inside("linf", eps, x, adversarial)
    assert np.array_equal(fooled, wrong(model, adversarial, labels))
    at_once = wrong(model, x, labels)
    assert np.all(fooled[at_once]) and np.array_equal(adversarial[at_once], x[at_once])
    assert np.array_equal(adversarial[~fooled], x[~fooled])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ball_is_used_to_its_edge(dtype):
    """Else "in the ball" would hold for an attack that goes nowhere."""
    model = network(dtype=dtype)
    x = np.full((1, *SHAPE), 0.5, dtype)
    labels = own(model, x)
    for eps in np.linspace(0.01, 0.5, 40):
        adversarial, fooled = pgd(model, x, labels, eps, step_size=0.1, steps=20)
        if fooled[0]:
            break
    assert fooled[0] and np.abs(adversarial - x).max() == pytest.approx(eps, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hidden", [(), (8,), (16, 8)])
def test_the_batch_size_decides_nothing(dtype, hidden):
    model = network(hidden=hidden, dtype=dtype)
    x, _ = images(dtype=dtype)
    labels = own(model, x)
    labels[::6] += 1  # a few that are wrong to begin with
    labels %= 3
    runs = [pgd(model, x, labels, 0.06, steps=8, restarts=3, batch_size=b) for b in (100, 20, 7, 3, 1)]
    assert 3 < runs[0][1].sum() < N  # else there is nothing to compare
    for adversarial, fooled in runs[1:]:
        assert np.array_equal(fooled, runs[0][1])
        assert np.array_equal(adversarial, runs[0][0])


@pytest.mark.parametrize("builder", ["small_cnn", "preact_resnet18"])
def test_the_batch_size_decides_nothing_for_convolutions(builder):
    model = models.small_cnn(hidden=8) if builder == "small_cnn" else models.preact_resnet18(width=2)
    x = np.random.default_rng(0).random((6, 32, 32, 3), np.float32)
    labels = own(balanced(model, x), x)
    runs = [pgd(model, x, labels, 0.003, steps=4, restarts=2, batch_size=b) for b in (6, 4)]
    (first, fooled), (other, fooled_too) = runs
    assert 0 < fooled.sum() < 6
    assert np.array_equal(fooled, fooled_too)
    assert np.array_equal(first, other)


@fewer(0.5)
@given(seed=seeds, eps=st.floats(0.01, 0.2))
def test_more_restarts_fool_a_superset_with_the_same_images(seed, eps):
    model = network(seed % 1000)
    x, labels = images(seed)
    one, fooled = pgd(model, x, labels, eps, steps=2, restarts=1, seed=seed)
    for restarts in (2, 4):
        more, fooled_more = pgd(model, x, labels, eps, steps=2, restarts=restarts, seed=seed)
        assert np.all(fooled_more[fooled]) and np.array_equal(more[fooled], one[fooled])
        one, fooled = more, fooled_more


def test_restarts_help():
    """On one of these networks a second start finds what the first did not: restarts do not repeat themselves."""
    gains = 0
    for seed in range(10):
        model = network(seed)
        x, _ = images(seed)
        labels = own(model, x)
        robust = [
            robust_accuracy(model, np.rint(x * 255).astype(np.uint8), labels, 0.05, steps=0, restarts=r) for r in (1, 8)
        ]
        assert robust[1] <= robust[0]
        gains += robust[1] < robust[0]
    assert gains >= 3


def test_every_iterate_counts_not_only_the_last():
    """One weight is so large that a whole step jumps over the only place where the network errs, and back."""
    model = models.mlp((1, 2, 2), input_shape=(1, 1, 1)).astype(np.float64)
    # logit 1 minus logit 0 is 0.1 - |x - 0.5| - 0.06: positive in the middle only
    model.children["fc1"].params["weight"][...] = [[1, -1]]
    model.children["fc1"].params["bias"][...] = [-0.5, 0.5]
    model.children["fc2"].params["weight"][...] = [[0, -1], [0, -1]]
    model.children["fc2"].params["bias"][...] = [0, 0.04]
    x = np.full((1, 1, 1, 1), 0.4)
    assert own(model, x) == 0
    path = dict(eps=0.3, step_size=0.1, random_start=False)
    adversarial, fooled = pgd(model, x, np.array([0]), steps=1, **path)
    assert fooled[0] and adversarial.item() == pytest.approx(0.5)
    again, fooled = pgd(model, x, np.array([0]), steps=9, **path)  # the steps after it change nothing
    assert fooled[0] and again.item() == pytest.approx(0.5)
    # the start itself is an iterate, and so is the last step's result
    assert not pgd(model, x, np.array([0]), steps=0, **path)[1][0]


@fewer(0.5)
@given(seed=seeds)
def test_eps_zero_is_the_clean_accuracy(seed):
    model = network(seed % 1000)
    x, labels = images(seed)
    adversarial, fooled = pgd(model, x, labels, 0.0, steps=3, restarts=2)
    assert np.array_equal(adversarial, x)
    assert np.array_equal(fooled, wrong(model, x, labels))


@fewer(1)
@given(seed=seeds, eps=st.floats(0.001, 0.07))
def test_a_linear_classifier_falls_where_its_margin_is_below_eps_times_the_l1_norm(seed, eps):
    """The closed form, for two classes and images away from the box: 20 steps of 2/255 cross any ball up to 0.07."""
    model = models.mlp((27, 2), seed=seed % 1000, input_shape=SHAPE).astype(np.float64)
    draw = np.random.default_rng(seed)
    x = draw.uniform(0.2, 0.8, (N, *SHAPE))
    difference = model.children["fc1"].params["weight"] @ [-1, 1]
    # margins of every size around the one that decides
    bias = model.children["fc1"].params["bias"]
    margin = x.reshape(N, -1) @ difference + bias[1] - bias[0]
    wanted = draw.uniform(-2, 2, N) * eps * abs(difference).sum()
    step = np.clip(
        (wanted - margin) / (difference @ difference), -0.2 / abs(difference).max(), 0.2 / abs(difference).max()
    )
    x += (step[:, None] * difference).reshape(x.shape)
    x = np.clip(x, 0.1, 0.9)
    margin = x.reshape(N, -1) @ difference + bias[1] - bias[0]
    labels = (margin > 0).astype(int)
    radius = abs(margin) / abs(difference).sum()
    clear = abs(radius - eps) > 1e-9
    _, fooled = pgd(model, x, labels, eps, seed=seed)
    assert np.array_equal(fooled[clear], radius[clear] < eps)
    assert clear.sum() > N // 2


def test_the_same_seed_gives_the_same_attack_and_another_another():
    model = network()
    x, _ = images()
    labels = own(model, x)
    runs = [pgd(model, x, labels, 0.5, steps=1, step_size=0.05, seed=s) for s in (0, 0, 1)]
    both = runs[0][1] & runs[2][1]
    assert both.any()
    assert np.array_equal(runs[0][0], runs[1][0]) and np.array_equal(runs[0][1], runs[1][1])
    assert not np.any((runs[0][0][both] == runs[2][0][both]).all((1, 2, 3)))


def test_images_and_restarts_start_at_places_of_their_own():
    model = network(hidden=(), classes=2)
    model.weights[...] = 0
    model.children["fc1"].params["bias"][...] = [0, -1]
    x = np.full((4, *SHAPE), 0.5, np.float32)
    starts = []

    class Noting(type(model)):
        def forward(self, x, **options):
            starts.append(x.copy())
            return super().forward(x, **options)

    model.__class__ = Noting
    pgd(model, x, np.zeros(4, int), 0.1, steps=0, restarts=3)
    assert np.array_equal(starts.pop(0), x) and len(starts) == 3
    places = np.concatenate(starts).reshape(12, -1) - 0.5
    assert len(np.unique(places, axis=0)) == 12
    assert abs(places).max() <= 0.1 + 1e-7 and abs(places.mean()) < 0.02  # uniform in the ball
    assert places.std() == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_without_random_start_restarts_change_nothing_and_the_first_step_is_the_fast_gradient_sign():
    model = network()
    x, _ = images()
    labels = own(model, x)
    one = pgd(model, x, labels, 0.2, step_size=0.2, steps=1, random_start=False)
    three = pgd(model, x, labels, 0.2, step_size=0.2, steps=1, restarts=3, random_start=False)
    assert np.array_equal(one[0], three[0]) and one[1].any()
    moved = abs(one[0] - x)[one[1]]
    inside = (x > 0.2) & (x < 0.8)
    np.testing.assert_allclose(moved[inside[one[1]]], 0.2, rtol=1e-4)


@pytest.mark.parametrize("builder", ["mlp", "preact_resnet18"])
def test_no_weight_gradient_is_touched_and_no_buffer(builder):
    if builder == "mlp":
        model, x = network(), images()[0]
    else:
        model = models.preact_resnet18(width=2)
        x = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    model.gradients[...] = np.arange(len(model.gradients))
    state, gradients = model.state_dict(), model.gradients.copy()
    _, fooled = pgd(model, x, own(model, x), 0.02, steps=2)
    assert not fooled.all()  # a backward pass was taken
    assert np.array_equal(model.gradients, gradients)
    assert all(np.array_equal(value, state[name]) for name, value in model.state_dict().items())


def test_progress_counts_images_and_survivors():
    model = network()
    x, labels = images()
    calls = []
    _, fooled = pgd(model, x, labels, 0.05, steps=2, batch_size=8, progress=lambda *a: calls.append(a))
    assert calls == [(n, n - int(fooled[:n].sum())) for n in (8, 16, 20)]


def test_robust_accuracy_is_the_share_that_is_not_fooled():
    model = network()
    x = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), dtype=np.uint8)
    floats = x * np.float32(1 / 255)
    labels = own(model, floats)
    labels[:3] = (labels[:3] + 1) % 3
    _, fooled = pgd(model, floats, labels, 0.05, steps=2, seed=4)
    assert robust_accuracy(model, x, labels, 0.05, steps=2, seed=4) == 1 - fooled.sum() / N
    assert robust_accuracy(model, x, labels, 0.0) == 1 - 3 / N
    assert 0 < fooled.sum() < N


def test_no_images_are_no_error():
    adversarial, fooled = pgd(network(), images(n=0)[0], np.empty(0, int), 0.1)
    assert adversarial.shape == (0, *SHAPE) and fooled.shape == (0,)


# --- l2, ids, one step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@fewer(0.5)
@given(seed=seeds, eps=st.floats(0, 2), step_size=st.none() | st.floats(0, 2), restarts=st.integers(1, 2))
def test_l2_images_are_in_ball_and_box_and_fooled_says_which_fool(dtype, seed, eps, step_size, restarts):
    model = network(seed % 1000, dtype=dtype)
    x, labels = images(seed, dtype=dtype)
    adversarial, fooled = pgd(
        model, x, labels, eps, norm="l2", step_size=step_size, steps=3, restarts=restarts, seed=seed, batch_size=7
    )
    assert adversarial.dtype == dtype and adversarial.min() >= 0 and adversarial.max() <= 1
    assert exact.inside("l2", eps, x, adversarial)
    at_once = wrong(model, x, labels)
    assert np.all(fooled[at_once]) and np.array_equal(adversarial[at_once | ~fooled], x[at_once | ~fooled])
    assert np.array_equal(recheck(model, x, adversarial, labels, eps, "l2"), fooled)


def test_the_l2_ball_is_used_to_its_edge():
    model = network()
    x = np.full((1, *SHAPE), 0.5, np.float32)
    labels = own(model, x)
    for eps in np.linspace(0.05, 1, 40):
        adversarial, fooled = pgd(model, x, labels, eps, norm="l2")
        if fooled[0]:
            break
    assert fooled[0] and common.l2(adversarial - x) == pytest.approx(eps, rel=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_is_known_by_its_id(norm):
    model = network()
    x, _ = images()
    labels = own(model, x)
    options = dict(norm=norm, steps=2, restarts=2)
    eps = {"linf": 0.05, "l2": 0.2}[norm]
    whole, fooled = pgd(model, x, labels, eps, **options)
    some = np.array([11, 2, 19])
    part, fooled_part = pgd(model, x[some], labels[some], eps, ids=some, **options)
    assert 3 < fooled.sum() < N and np.array_equal(fooled_part, fooled[some])
    np.testing.assert_allclose(part, whole[some], atol=1e-6)
    # other ids are other starts
    again, fooled_too = pgd(model, x, labels, eps, ids=np.arange(N) + 100, **options)
    both = fooled & fooled_too
    assert abs(again - whole)[both].max() > 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_step_of_length_eps_from_the_image_itself(norm):
    model = network()
    x, _ = images()
    labels = own(model, x)
    eps = {"linf": 0.1, "l2": 0.6}[norm]
    adversarial, fooled = fgsm(model, x, labels, eps, norm=norm)
    logits, cache = model.forward(x)
    p = np.exp(logits - logits.max(1, keepdims=True))
    gradient = model.backward(p / p.sum(1, keepdims=True) - np.eye(3, dtype=p.dtype)[labels], cache, param_grads=False)
    length = np.sqrt((gradient**2).sum((1, 2, 3), keepdims=True))
    moved = np.clip(x + eps * (np.sign(gradient) if norm == "linf" else gradient / length), 0, 1)
    assert np.array_equal(fooled, wrong(model, moved, labels)) and 3 < fooled.sum() < N
    np.testing.assert_allclose(adversarial[fooled], moved[fooled], atol=1e-6)


# --- what all attacks share -------------------------------------------------------------------------------------------


def test_draws_are_given_by_seed_attack_id_and_restart_and_nothing_else():
    keys = [(s, a, i, r) for s in (0, 1) for a in (0, 1, 7) for i in (0, 1, 255, 2**32 - 1) for r in (0, 1, 2**24 - 1)]
    first = {key: draws(key[0], key[1], [key[2]], key[3])[0].random(4).tobytes() for key in keys}
    assert len(set(first.values())) == len(keys)
    together = draws(1, 7, np.array([255, 0]), 1)
    assert [g.random(4).tobytes() for g in together] == [first[1, 7, 255, 1], first[1, 7, 0, 1]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, eps=st.floats(0, 1) | st.floats(-12, 0).map(lambda e: 10**e), size=st.sampled_from([1e-4, 0.1, 3]))
def test_projections_end_in_ball_and_box_whatever_is_rounded(dtype, seed, eps, size):
    draw = np.random.default_rng(seed)
    x0 = draw.choice([0, 1, 0.5, 1e-3], (4, 8, 8, 3)) * draw.random((4, 8, 8, 3)).round(2)
    x0, x = x0.astype(dtype), (x0 + draw.normal(0, size, x0.shape)).astype(dtype)
    for ball in (Linf(eps), L2(eps)):
        y = ball.project(x0, x)
        assert y.dtype == dtype and ball.inside(x0, y).all() and y.min() >= 0 and y.max() <= 1
        assert exact.inside(ball.name, eps, x0, y)
        # what is inside stays, but for rounding; what is outside of the ball alone goes to its edge
        np.testing.assert_allclose(ball.project(x0, y), y, atol=2 * np.finfo(dtype).eps)


def test_projections_are_the_nearest_points():
    draw = np.random.default_rng(0)
    x0 = draw.uniform(0.4, 0.6, (5, *SHAPE))
    x = x0 + draw.normal(0, 0.02, x0.shape)
    y = L2(0.05).project(x0, x)
    np.testing.assert_allclose((y - x0) / 0.05, (x - x0) / common.per_image(common.l2(x - x0), x), rtol=1e-12)
    np.testing.assert_allclose(Linf(0.01).project(x0, x), np.clip(x, x0 - 0.01, x0 + 0.01), rtol=3e-16)
    for ball in (Linf(1), L2(1)):
        np.testing.assert_allclose(ball.project(x0, x), x, rtol=1e-15)


def test_steps_go_up_the_gradient_however_small_it_is():
    draw = np.random.default_rng(0)
    x = np.full((3, *SHAPE), 0.5, np.float32)
    gradient = draw.standard_normal(x.shape).astype(np.float32)
    gradient[0] = 0  # nowhere to go
    unit = gradient / np.maximum(common.per_image(common.l2(gradient), x), 1e-9)
    for scale in (1, 1e-30, 1e30):  # the square of 1e-30 is 0 in float32, that of 1e30 infinite
        scaled = gradient * np.float32(scale)
        for ball, direction in ((L2(9), unit), (Linf(9), np.sign(gradient))):
            moved = ball.step(x, x, scaled, np.full(3, 0.25, np.float32))
            np.testing.assert_allclose(moved - x, 0.25 * direction, atol=1e-6)
    each = np.array([9, 0.5, 0.25], np.float32)
    for ball, direction in ((L2(9), unit), (Linf(9), np.sign(gradient))):
        moved = ball.step(x, x, gradient, each)
        assert moved.dtype == np.float32
        np.testing.assert_allclose(moved - x, each[:, None, None, None] * direction, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=seeds, eps=st.floats(0, 1) | st.floats(-12, 0).map(lambda e: 10**e), size=st.sampled_from([0, 0.1, 3]))
def test_steps_end_in_ball_and_box_whatever_is_rounded(dtype, seed, eps, size):
    """In linf they are, to the bit, the sum projected."""
    draw = np.random.default_rng(seed)
    x0 = (draw.choice([0, 1, 0.5, 1e-3], (4, 8, 8, 3)) * draw.random((4, 8, 8, 3)).round(2)).astype(dtype)
    gradient = (draw.normal(0, 1, x0.shape) * draw.choice([0, -0.0, 1e-30, 1], x0.shape)).astype(dtype)
    sizes = (size * draw.random(4)).astype(dtype)
    for ball in (Linf(eps), L2(eps)):
        x = ball.random_start(x0, draws(seed, 0, range(4)))
        before = [a.copy() for a in (x0, x, gradient, sizes)]
        y = ball.step(x0, x, gradient, sizes)
        assert all(np.array_equal(a, b) for a, b in zip((x0, x, gradient, sizes), before, strict=True))
        assert y.dtype == dtype and ball.inside(x0, y).all() and exact.inside(ball.name, eps, x0, y)
        if ball.name == "linf":
            assert np.array_equal(y, ball.project(x0, x + common.per_image(sizes, x) * np.sign(gradient)))


def test_random_starts_fill_the_ball():
    x = np.full((200, *SHAPE), 0.5, np.float32)
    generators = draws(0, 0, range(200))
    uniform = Linf(0.1).random_start(x, generators) - x
    assert uniform.std() == pytest.approx(0.1 / 3**0.5, rel=0.05) and abs(uniform).max((1, 2, 3)).std() > 0
    edge = Linf(0.1).random_start(x, draws(0, 0, range(200)), edge=True) - x
    np.testing.assert_allclose(abs(edge).max((1, 2, 3)), 0.1, rtol=1e-5)
    longest = abs(uniform).max((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(edge, uniform * (0.1 / longest), atol=1e-6)
    sphere = L2(0.1).random_start(x, draws(0, 0, range(200))) - x
    np.testing.assert_allclose(common.l2(sphere), 0.1, rtol=1e-5)
    assert abs(sphere.mean()) < 0.002
    for ball in (Linf(0.8), L2(3)):  # the box cuts
        start = ball.random_start(x, draws(0, 0, range(200)))
        assert start.dtype == np.float32 and start.min() == 0 and start.max() == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_recheck_believes_nobody(norm):
    model = network()
    x, labels = images()
    eps = {"linf": 0.1, "l2": 0.4}[norm]
    adversarial, fooled = pgd(model, x, labels, eps, norm=norm)
    assert np.array_equal(recheck(model, x, adversarial, labels, eps, norm, batch_size=3), fooled)
    assert not recheck(model, x, adversarial, own(model, adversarial), eps, norm).any()  # right after all
    far = np.flatnonzero(fooled & ~wrong(model, x, labels))
    assert len(far) > 3
    radius = {"linf": abs(adversarial - x).max((1, 2, 3)), "l2": common.l2(adversarial - x)}[norm]
    for i in far[:4]:  # in the ball to the last digits
        one = slice(i, i + 1)
        assert recheck(model, x[one], adversarial[one], labels[one], radius[i] * (1 + 1e-5), norm)[0]
        assert not recheck(model, x[one], adversarial[one], labels[one], radius[i] * (1 - 1e-5), norm)[0]
    outside = adversarial.copy()
    outside[far, 0, 0, 0] = [-1e-6, 1 + 1e-6] * (len(far) // 2) + [-1e-6] * (len(far) % 2)
    assert not recheck(model, x, outside, labels, 2.0, norm)[far].any()
    outside[far, 0, 0, 0] = np.nan
    assert not recheck(model, x, outside, labels, 2.0, norm)[far].any()


def test_distances():
    x = np.zeros((2, *SHAPE), np.float32)
    y = x.copy()
    y[0, 0, 0, 0], y[0, 1, 1, 1], y[1, 2, 2, 2] = 0.3, 0.4, 1
    np.testing.assert_allclose(Linf(1).distance(x, y), [0.4, 1])
    np.testing.assert_allclose(L2(1).distance(x, y), [0.5, 1], rtol=1e-7)


X, Y = images()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=-0.1), "eps must be a number >= 0, not -0.1"),
        (dict(eps=float("nan")), "eps must be a number >= 0, not nan"),
        (dict(eps=float("inf")), "eps must be a number >= 0, not inf"),
        (dict(norm="l1"), "norm must be 'linf' or 'l2', not 'l1'"),
        (dict(x=X * 255), r"images must be in \[0, 1\]"),
        (dict(x=X - 1e-3), r"images must be in \[0, 1\]"),
        (dict(x=np.where(X > 0.9, np.float32(np.nan), X)), r"images must be in \[0, 1\], without NaN"),
        (dict(x=(X * 255).astype(np.uint8)), "images must be float32 or float64"),
        (dict(labels=Y + 1), "labels must be below 3, the model's number of classes, not 3"),
        (dict(labels=Y - 1), "labels must be >= 0"),
        (dict(labels=Y[1:]), "labels must be 20 integers"),
        (dict(labels=Y.astype(float)), "labels must be 20 integers, one for each image, not float64"),
        (dict(ids=np.arange(19)), "ids must be 20 integers"),
        (dict(ids=np.arange(20) - 1), "ids must be >= 0"),
        (dict(ids=np.arange(20) + 2**32), "ids must be >= 0 and < 2"),
        (dict(batch_size=0), "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, message):
    arguments = dict(x=X, labels=Y, eps=0.1) | change
    with pytest.raises(ValueError, match=message) as error:
        pgd(network(), **arguments)
    assert "\n" not in str(error.value)


def test_checks_pass_what_is_fine():
    ball, labels, ids = check_inputs(X, Y.astype(np.uint8), 0, norm="l2", ids=[5] * N)
    assert (ball.name, ball.eps, labels.dtype, ids.tolist()) == ("l2", 0.0, np.int64, [5] * N)
    assert check_inputs(X, Y, 0.1)[2].tolist() == list(range(N)) and isinstance(threat("linf", 1), Linf)
    check_logits(np.zeros((2, 3)), np.array([0, 2]), least=3)
    with pytest.raises(ValueError, match="the loss needs at least 4 classes, the model has 3"):
        check_logits(np.zeros((2, 3)), np.array([0, 2]), least=4, loss="the loss")


@pytest.mark.parametrize("salt", [0, 127, 128, 255])
def test_draws_differ_by_image_and_restart_for_every_salt(salt):
    """Above 2^63 a step must not pass through float64, where neighbouring ids are one number."""
    first = [g.random() for restart in (0, 1) for g in common.draws(0, salt, range(4), restart)]
    assert len(set(first)) == len(first)
