"""PGD: what it returns is in ball and box and fools the network, and it depends on nothing but its arguments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import fewer, seeds

from nanomr import models
from nanomr.attacks import pgd
from nanomr.metrics import robust_accuracy

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
    adversarial, fooled = pgd(model, x, labels, eps, step_size, 3, restarts, seed, start, batch_size=7)
    assert adversarial.dtype == dtype and adversarial.shape == x.shape and fooled.dtype == bool
    assert np.array_equal(x, before) and adversarial is not x
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    # x + eps is a rounded sum, and these are its neighbours: nothing may lie beyond it
    assert np.all(adversarial <= x + dtype(eps)) and np.all(adversarial >= x - dtype(eps))
    assert np.abs(adversarial.astype(np.longdouble) - x).max() <= eps * (1 + 2e-7) + np.finfo(dtype).eps
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
