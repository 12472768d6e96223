"""FAB: its projections against an oracle, flip distances of linear models, and what every attack promises."""

import copy
import importlib

import exact
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import models
from nanomr.attacks import common
from nanomr.testing.strategies import fewer, seeds

module = importlib.import_module("nanomr.attacks.fab")
fab, fab_targeted = module.fab, module.fab_targeted
project_linf, project_l2 = module.project_linf, module.project_l2

SHAPE, N = (3, 3, 3), 12
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
ATTACKS = pytest.mark.parametrize("attack", [fab, fab_targeted])


def network(seed=0, hidden=(8,), classes=4, dtype=np.float64):
    """A small network whose decisions change within small balls."""
    model = models.mlp((27, *hidden, classes), seed=seed, input_shape=SHAPE).astype(dtype)
    model.weights *= 4
    *_, last = model.children.values()
    last.params["bias"] -= model.forward(images(seed, dtype=dtype))[0].mean(0)
    return model


def images(seed=0, n=N, dtype=np.float64):
    """Random images, black and white pixels among them."""
    return np.clip(np.random.default_rng(seed).uniform(-0.2, 1.2, (n, *SHAPE)), 0, 1).astype(dtype)


def own(model, x):
    return model.forward(x)[0].argmax(1)


def spy(model):
    """Lists of the batch sizes of all forward and backward passes from now on; weight gradients are forbidden."""
    forward, backward = [], []

    class Spy(type(model)):
        def forward(self, x, **options):
            assert not options
            forward.append(x.copy())
            return super().forward(x)

        def backward(self, dy, cache, param_grads=True):
            assert not param_grads
            backward.append(dy.copy())
            return super().backward(dy, cache, param_grads=False)

    model.__class__ = Spy
    return forward, backward


# --- projections ------------------------------------------------------------------------------------------------------


def oracle(norm, point, w, b):
    """The displacement onto plane and box by bisection over the multiplier, one coordinate formula a norm."""
    excess = w @ point - b
    sign = np.sign(excess)

    def moved(t):
        if norm == "linf":
            return np.clip(point - sign * t * np.sign(w), 0, 1)
        return np.clip(point - sign * t * w, 0, 1)

    low, high = 0.0, 1.0
    while (moved(high) @ w - b) * sign > 0 and high < 1e9:
        high *= 2
    if high >= 1e9:
        return np.where(w == 0, point, (sign * w < 0).astype(float)) - point, False
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (moved(middle) @ w - b) * sign > 0 else (low, middle)
    return moved(high) - point, True


def cases(seed, d=9, n=8):
    """Points (some coordinates at the box), normals (some zero, of many sizes), and planes near, far, out of reach."""
    draw = np.random.default_rng(seed)
    points = np.clip(draw.uniform(-0.3, 1.3, (n, d)), 0, 1)
    w = draw.standard_normal((n, d)) * draw.choice([0, 1, 1, 1e-3, 10], (n, d))
    b = (w * points).sum(1) + draw.standard_normal(n) * draw.choice([0, 0.01, 1, 1, 30], n) * abs(w).sum(1) / 4
    return points, w, b


@NORMS
@given(seed=seeds)
def test_projections_agree_with_bisection(norm, seed):
    points, w, b = cases(seed)
    before = [a.copy() for a in (points, w, b)]
    d = (project_linf if norm == "linf" else project_l2)(points, w, b)
    assert all(np.array_equal(x, y) for x, y in zip((points, w, b), before, strict=True))
    for i in range(len(points)):
        expected, reached = oracle(norm, points[i], w[i], b[i])
        z = points[i] + d[i]
        assert z.min() >= -1e-15 and z.max() <= 1 + 1e-15
        assert np.all(d[i][w[i] == 0] == 0)
        scale = abs(w[i]).sum() + 1e-300
        if reached:
            assert abs(w[i] @ z - b[i]) <= 1e-12 * scale
            length, best = (abs(a).max() if norm == "linf" else np.linalg.norm(a) for a in (d[i], expected))
            assert length == pytest.approx(best, rel=1e-6, abs=1e-10)
            if norm == "l2":  # the nearest point is unique
                np.testing.assert_allclose(d[i], expected, rtol=0, atol=1e-6)
        else:  # the corner that comes nearest to the plane
            np.testing.assert_allclose(d[i], expected, rtol=0, atol=1e-15)


def test_the_cases_hold_planes_of_all_kinds():
    """Near, out of the box's reach, and so far that some coordinates, but not all, go to the box."""
    kinds = {"reached": 0, "corner": 0, "box": 0}
    for seed in range(20):
        for point, w, b in zip(*cases(seed), strict=True):
            d, reached = oracle("linf", point, w, b)
            z = (point + d)[d != 0]
            kinds["reached" if reached else "corner"] += 1
            kinds["box"] += reached and 0 < ((z == 0) | (z == 1)).sum() < len(z)
    assert min(kinds.values()) > 20


@NORMS
@fewer(0.5)
@given(seed=seeds)
def test_no_point_of_plane_and_box_is_nearer(norm, seed):
    """Random points of both are at least as far as the projection: it is optimal without any formula."""
    points, w, b = cases(seed)
    d = (project_linf if norm == "linf" else project_l2)(points, w, b)
    order = np.inf if norm == "linf" else 2
    draw = np.random.default_rng(seed)
    for point, normal, offset, change in zip(points, w, b, d, strict=True):
        z = point + change
        if abs(normal @ z - offset) > 1e-12 * abs(normal).sum():
            continue  # out of reach
        for size in (1e-3, 0.1, 1):
            other = np.clip(z + size * draw.standard_normal(z.shape), 0, 1)
            back, reached = oracle("l2", other, normal, offset)
            if reached:
                assert np.linalg.norm(other + back - point, order) >= np.linalg.norm(change, order) - 1e-9


@NORMS
def test_projections_keep_shape_and_dtype_and_take_tiny_and_zero_gradients(norm):
    project = project_linf if norm == "linf" else project_l2
    draw = np.random.default_rng(0)
    points, w = draw.random((5, 8, 8, 3)).astype(np.float32), draw.standard_normal((5, 8, 8, 3)).astype(np.float32)
    b = (w * points).sum((1, 2, 3), dtype=float) + np.array([0.1, -0.1, 3, 0, 1e6])
    d = project(points, w, b)
    assert d.dtype == np.float32 and d.shape == points.shape and abs(d[3]).max() < 1e-15
    np.testing.assert_allclose((w * d).sum((1, 2, 3))[:3], [0.1, -0.1, 3], rtol=1e-4)
    np.testing.assert_allclose(points[4] + d[4], w[4] > 0, atol=1e-7)
    tiny = project(points, w * np.float32(1e-30), b * 1e-30)  # its squares are 0 in float32
    np.testing.assert_allclose(tiny, d, rtol=2e-3, atol=1e-5)
    assert np.all(project(points, 0 * w, b) == 0)
    assert project(points[:0], w[:0], b[:0]).shape == (0, 8, 8, 3)
    many = project(np.repeat(points, 7, 0), np.repeat(w, 7, 0), np.repeat(b, 7))  # more than the CPU takes at once
    np.testing.assert_allclose(many, np.repeat(d, 7, 0), rtol=1e-5, atol=1e-12)


# --- the attacks ------------------------------------------------------------------------------------------------------


@ATTACKS
@NORMS
@DTYPES
@fewer(0.25)
@given(seed=seeds, eps=st.floats(0, 0.4), steps=st.integers(0, 6), restarts=st.integers(1, 3))
def test_what_is_fooled_is_in_ball_and_box_and_the_rest_is_unchanged(attack, norm, dtype, seed, eps, steps, restarts):
    eps *= 1 if norm == "linf" else 4
    model, x = network(seed % 100, dtype=dtype), images(seed, dtype=dtype)
    labels = own(model, x)
    labels[::4] = (labels[::4] + 1) % 4
    before, gradients = x.copy(), model.gradients.copy()
    options = dict(norm=norm, seed=seed, steps=steps, restarts=restarts, batch_size=7)
    adversarial, fooled = attack(model, x, labels, eps, **options)
    assert adversarial.dtype == dtype and adversarial.shape == x.shape and fooled.dtype == bool
    assert np.array_equal(x, before) and np.array_equal(model.gradients, gradients)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert np.array_equal(fooled, own(model, adversarial) != labels)
    assert exact.inside(norm, eps, x, adversarial)
    assert np.all(fooled[::4]) and np.array_equal(adversarial[::4], x[::4])
    assert np.array_equal(adversarial[~fooled], x[~fooled])
    assert np.array_equal(common.recheck(model, x, adversarial, labels, eps, norm), fooled)


def flip_distances(model, x, labels, norm):
    """The least distance at which a linear model errs, box and all: over the classes, by the oracle."""
    weight, bias = (model.children["fc1"].params[name] for name in ("weight", "bias"))
    distances = []
    for point, label in zip(x.reshape(len(x), -1), labels, strict=True):
        one = []
        for other in set(range(len(bias))) - {label}:
            d, reached = oracle(norm, point, weight[:, other] - weight[:, label], bias[label] - bias[other])
            one.append((abs(d).max() if norm == "linf" else np.linalg.norm(d)) if reached else np.inf)
        distances.append(min(one))
    return np.array(distances)


def share_at_the_box(model, x, labels, norm):
    """How many coordinates the box stops on the way to the nearest plane, on average (two classes)."""
    w = model.children["fc1"].params["weight"] @ [-1, 1]
    b = -(model.children["fc1"].params["bias"] @ [-1, 1])
    stopped = [np.isin(p + oracle(norm, p, w, b)[0], (0, 1)) & (p > 0) & (p < 1) for p in x.reshape(len(x), -1)]
    return np.mean(stopped)


@ATTACKS
@NORMS
@pytest.mark.parametrize("classes", [2, 5])
def test_linear_models_flip_at_their_closed_form_distance(attack, norm, classes):
    """Away from the box: |margin| over the dual norm of the weights, to one part in ten thousand."""
    model = network(hidden=(), classes=classes)
    x = np.random.default_rng(1).uniform(0.45, 0.55, (N, *SHAPE))
    model.children["fc1"].params["bias"] -= model.forward(x)[0].mean(0)
    labels = own(model, x)
    weight = model.children["fc1"].params["weight"]
    logits = model.forward(x)[0]
    dual = np.linalg.norm(weight[:, :, None] - weight[:, None, :], 1 if norm == "linf" else 2, axis=0)
    dual += np.where(np.eye(classes), 1e-300, 0)
    gap = logits[np.arange(N), labels][:, None] - logits
    distance = np.where(np.arange(classes) == labels[:, None], np.inf, gap / dual[labels]).min(1)
    np.testing.assert_allclose(distance, flip_distances(model, x, labels, norm), rtol=1e-9)  # the box is far
    _check_flips(attack, norm, model, x, labels, distance)


@NORMS
@pytest.mark.parametrize(("attack", "classes"), [(fab, 2), (fab_targeted, 2), (fab_targeted, 5)])
def test_linear_models_flip_at_their_exact_distance_where_the_box_is_in_the_way(attack, norm, classes):
    """But for FAB among many classes: the paper's choice of the nearest plane does not know of the box."""
    model = network(3, hidden=(), classes=classes)
    x = images(3, n=40)
    bias = model.children["fc1"].params["bias"]
    bias -= model.forward(x)[0].mean(0)
    bias[0] += 6  # far away
    labels = own(model, x)
    x, labels = x[labels == 0][:N], labels[labels == 0][:N]
    if classes == 2:
        assert share_at_the_box(model, x, labels, norm) > 0.1
    distance = flip_distances(model, x, labels, norm)
    assert np.isfinite(distance).all() and len(x) == N
    _check_flips(attack, norm, model, x, labels, distance)


def _check_flips(attack, norm, model, x, labels, distance):
    """Each image falls at 1.0001 times its distance, by its own eps, and not at 0.9999 times."""
    for i in range(len(x)):
        one = slice(i, i + 1)
        assert not attack(model, x[one], labels[one], distance[i] * (1 - 1e-4), norm=norm, steps=10)[1][0]
        adversarial, fooled = attack(model, x[one], labels[one], distance[i] * (1 + 1e-4), norm=norm, steps=10)
        assert fooled[0]
        change = (adversarial - x[one]).ravel()
        assert np.linalg.norm(change, np.inf if norm == "linf" else 2) >= distance[i] * (1 - 1e-9)


@NORMS
def test_a_step_takes_one_forward_pass_for_all_classes(norm):
    """A step is one forward pass, a backward pass a class, and one forward pass to see; FAB-T: one backward pass."""
    model = network(hidden=(), classes=4)
    x = images()
    labels = own(model, x)
    forward, backward = spy(model)
    eps = 1e-6  # nothing is fooled
    fab(model, x, labels, eps, norm=norm, steps=5, restarts=2)
    ends = 2 * (1 + 1 + 1)  # a pass for the last plane of each restart, and one for each of the two last candidates
    assert len(forward) == 1 + 2 * 5 * 2 + ends and len(backward) == 2 * 3 * (5 + 1)
    for dy in backward:
        rows = np.arange(N)
        assert np.all(dy[rows, labels] == -1) and np.all(np.sort(dy)[:, 1:] == [0, 0, 1])
    assert np.all(sum(backward[:3]) == np.where(np.arange(4) == labels[:, None], -3, 1))
    forward.clear(), backward.clear()
    fab_targeted(model, x, labels, eps, norm=norm, steps=5, targets=2)
    assert len(backward) == 2 * (5 + 1) and len(forward) == 1 + 2 * (2 * 5 + 3)
    order = np.argsort(-models.Model.forward(model, x)[0], axis=1)
    assert np.array_equal(backward[0].argmax(1), order[:, 1]) and np.array_equal(backward[6].argmax(1), order[:, 2])


@NORMS
def test_the_walk_starts_at_the_image_and_later_restarts_at_half_of_eps(norm):
    model = network(hidden=(), classes=2)
    model.weights[...] = 0
    model.children["fc1"].params["bias"][...] = [1, 0]  # no gradient: nothing moves
    x, eps = images(), 0.2
    forward, _ = spy(model)
    assert not fab(model, x, np.zeros(N, int), eps, norm=norm, steps=1, restarts=4)[1].any()
    starts = forward[1::2]
    assert len(starts) == 4 and np.array_equal(starts[0], x)
    inner = np.full((N, *SHAPE), 0.5)
    fab(model, inner, np.zeros(N, int), eps, norm=norm, steps=1, restarts=3)
    for start in forward[-4::2]:
        change = (start - inner).reshape(N, -1)
        length = np.linalg.norm(change, np.inf if norm == "linf" else 2, axis=1)
        np.testing.assert_allclose(length, eps / 2, rtol=1e-6)
    assert not np.any((forward[-4] == forward[-2]).all((1, 2, 3)))


def test_a_step_is_the_papers():
    """Two steps on a line, by hand: f = logit 1 - logit 0 = 10 (z - 0.6), from x = 0.5."""
    model = models.mlp((1, 2), input_shape=(1, 1, 1)).astype(np.float64)
    model.children["fc1"].params["weight"][...] = [[0, 10]]
    model.children["fc1"].params["bias"][...] = [0, -6]
    forward, _ = spy(model)
    assert not fab(model, np.full((1, 1, 1, 1), 0.5), np.array([0]), 0.01, steps=2, restarts=1)[1][0]
    points = [z.item() for z in forward]
    first = 0.5 + 1.05 * 0.1  # both projections are at 0.6
    back = 0.5 + 0.9 * (first - 0.5)
    alpha = min((0.6 - back) / (0.6 - back + 0.1), 0.1)
    second = (1 - alpha) * (back + 1.05 * (0.6 - back)) + alpha * first
    assert alpha < 0.1
    assert points[:5] == pytest.approx([0.5, 0.5, first, back, second], abs=1e-12)
    # then the end: the closest point that errs, and x moved onto its plane, both at the edge of the ball
    assert points[5:] == pytest.approx([second, 0.51, 0.51], abs=1e-12)


def test_the_closest_point_that_errs_is_kept_for_the_end(monkeypatch):
    model = models.mlp((1, 2), input_shape=(1, 1, 1)).astype(np.float64)
    model.children["fc1"].params["weight"][...] = [[0, 10]]
    model.children["fc1"].params["bias"][...] = [0, -6]
    forward, _ = spy(model)
    points = iter([0.62, 0.605, 0.59, 0.68])
    monkeypatch.setattr(module, "_step", lambda *args: np.full((1, 1, 1, 1), next(points)))
    assert not fab(model, np.full((1, 1, 1, 1), 0.5), np.array([0]), 0.01, steps=4, restarts=1)[1][0]
    assert [z.item() for z in forward[1:6]] == [0.62, 0.605, 0.59, 0.68, 0.605]


def test_the_pull_towards_the_image_is_at_most_a_tenth():
    """A start far from the image, in a direction of no use: it is forgotten at a tenth a step."""
    model = models.mlp((2, 2), input_shape=(1, 1, 2)).astype(np.float64)
    model.children["fc1"].params["weight"][...] = [[0, 1], [0, 0]]
    model.children["fc1"].params["bias"][...] = [0, -0.5001]
    x = np.full((1, 1, 1, 2), 0.5)
    current = np.array([[[[0.3, 0.8]]]])
    moved = module._step(model, common.L2(0.1), x, current, np.array([0]), np.array([[1]]))
    assert moved.ravel() == pytest.approx([0.9 * (0.3 + 1.05 * 0.2001) + 0.1 * (0.5 + 1.05 * 1e-4), 0.9 * 0.8 + 0.05])


@ATTACKS
@NORMS
def test_it_fools_more_than_a_step_of_the_gradient_does(attack, norm):
    """Networks with bends: the linear guess from the image is wrong, the walk finds the way."""
    options = {"targets": 1} if attack is fab_targeted else {}
    found, eps = 0, {"linf": 0.08, "l2": 0.3}[norm]
    for seed in range(4):
        model, x = network(seed, hidden=(16, 16)), images(seed, n=20)
        model.weights *= 1.5
        labels = own(model, x)
        sets = [attack(model, x, labels, eps, norm=norm, steps=s, restarts=1, **options)[1] for s in (1, 20)]
        found += sets[1].sum() - sets[0].sum()
    assert found >= 6


@NORMS
def test_more_restarts_fool_a_superset_with_the_same_images(norm):
    gains = 0
    for seed in range(8):
        model, x = network(seed, hidden=(16, 16)), images(seed, n=30)
        labels = own(model, x)
        options = dict(norm=norm, seed=seed, steps=4)
        before, few = fab(model, x, labels, {"linf": 0.05, "l2": 0.2}[norm], restarts=1, **options)
        adversarial, fooled = fab(model, x, labels, {"linf": 0.05, "l2": 0.2}[norm], restarts=5, **options)
        assert np.all(fooled[few]) and np.allclose(adversarial[few], before[few])
        gains += fooled.sum() - few.sum()
    assert gains >= 1


@NORMS
def test_more_targets_fool_a_superset_and_few_classes_are_enough(norm):
    gains, eps = 0, {"linf": 0.06, "l2": 0.25}[norm]
    for seed in range(5):
        model, x = network(seed, classes=6), images(seed, n=30)
        labels = own(model, x)
        sets = [fab_targeted(model, x, labels, eps, norm=norm, targets=t, steps=5)[1] for t in (1, 5, 9)]
        assert np.all(sets[1][sets[0]]) and np.array_equal(sets[1], sets[2])
        gains += sets[1].sum() - sets[0].sum()
    assert gains >= 3


@ATTACKS
@NORMS
def test_neither_the_batch_nor_its_size_decides(attack, norm):
    model, x = network(2), images(2, n=20)
    labels = own(model, x)
    eps = {"linf": 0.04, "l2": 0.15}[norm]
    options = dict(norm=norm, seed=5, steps=8, restarts=3)
    adversarial, fooled = attack(model, x, labels, eps, batch_size=100, **options)
    assert 0 < fooled.sum() < 20
    again, fooled_again = attack(model, x, labels, eps, batch_size=3, **options)
    assert np.array_equal(fooled, fooled_again)
    np.testing.assert_allclose(again, adversarial, rtol=0, atol=1e-9)  # BLAS rounds batches of other sizes otherwise
    ids = np.array([17, 4, 3, 11, 0])
    some, fooled_some = attack(model, x[ids], labels[ids], eps, ids=ids, **options)
    assert np.array_equal(fooled_some, fooled[ids])
    np.testing.assert_allclose(some, adversarial[ids], rtol=0, atol=1e-9)


@ATTACKS
@NORMS
def test_seed_and_id_and_run_give_the_random_starts(attack, norm):
    model, x = network(hidden=(), classes=3), images(n=4)
    model.weights[...] = 0
    model.children["fc1"].params["bias"][...] = [1, 0, 0]  # nothing moves, nobody is fooled
    forward, _ = spy(model)

    def starts(seed, ids):
        forward.clear()
        attack(model, x, np.zeros(4, int), 0.1, norm=norm, seed=seed, ids=np.array(ids), steps=1, restarts=3)
        return [start for start in forward[1::2] if not np.array_equal(start, x)]

    base, other_seed, other_ids = starts(0, [0, 1, 2, 3]), starts(1, [0, 1, 2, 3]), starts(0, [4, 1, 0, 3])
    assert len(base) == (2 if attack is fab else 4)
    for i, start in enumerate(base):
        assert (start != other_seed[i]).any((1, 2, 3)).all()
        assert np.array_equal((start == other_ids[i]).all((1, 2, 3)), [False, True, False, True])
        assert all((start != other).any((1, 2, 3)).all() for other in base[:i])


@ATTACKS
def test_fooled_images_leave_at_once(attack):
    model, x = network(4), images(4, n=100)
    x = x[own(model, x) == 0]
    twin = copy.deepcopy(model)
    labels = np.zeros(len(x), int)
    forward, _ = spy(model)
    _, fooled = attack(model, x, labels, 0.05, steps=10, restarts=1)
    assert 3 < fooled.sum() < len(x)
    seen = forward[1:21:2]  # the first run: the points at which the gradients are taken
    sizes = [len(batch) for batch in seen]
    for checked, later in zip(forward[2:20:2], sizes[1:], strict=False):
        assert later >= (own(twin, checked) == 0).sum()
    assert sizes[0] == len(x) and sizes[-1] < len(x)
    forward.clear()
    assert attack(model, x, labels, 1.0, steps=400, restarts=1)[1].all()
    assert len(forward) < 200  # and it stops when all are gone


@ATTACKS
@NORMS
@DTYPES
def test_eps_zero_is_the_clean_accuracy(attack, norm, dtype):
    model, x = network(dtype=dtype), images(dtype=dtype)
    labels = own(model, x)
    labels[:3] = (labels[:3] + 1) % 4
    adversarial, fooled = attack(model, x, labels, 0.0, norm=norm, steps=4, restarts=2)
    assert np.array_equal(adversarial, x) and np.array_equal(np.flatnonzero(fooled), [0, 1, 2])


@ATTACKS
def test_logits_of_any_size_do_not_stop_it(attack):
    """The logits' differences have gradients where the softmax has none; and tiny logits have tiny gradients."""
    sets = []
    for scale in (1, 1e4, 1e-8):
        model, x = network(7, dtype=np.float32), images(7, n=30, dtype=np.float32)
        *_, last = model.children.values()
        for values in last.params.values():
            values *= np.float32(scale)
        sets.append(attack(model, x, own(model, x), 0.05, steps=10, restarts=1)[1].sum())
    assert 5 < sets[0] < 30 and abs(sets[1] - sets[0]) <= 1 and abs(sets[2] - sets[0]) <= 2


@ATTACKS
def test_bad_arguments_are_refused(attack):
    model, x = network(), images()
    labels, name = own(model, x), attack.__name__
    for option, least in {"steps": 0, "restarts": 1, "targets": 1}.items():
        if option != "targets" or attack is fab_targeted:
            with pytest.raises(ValueError, match=f"{name}: {option} must be at least {least}, not {least - 1}"):
                attack(model, x, labels, 0.1, **{option: least - 1})
    with pytest.raises(ValueError, match="eps"):
        attack(model, x, labels, -0.1)
    with pytest.raises(ValueError, match="norm"):
        attack(model, x, labels, 0.1, norm="l1")
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        attack(model, x + 0.5, labels, 0.1)
    with pytest.raises(ValueError, match="labels"):
        attack(model, x, labels + 4, 0.1)


@ATTACKS
def test_progress_and_no_images(attack):
    model, x = network(4), images(4)
    labels, calls = own(model, x), []
    _, fooled = attack(model, x, labels, 0.04, steps=3, batch_size=5, progress=lambda *a: calls.append(a))
    assert calls == [(n, n - int(fooled[:n].sum())) for n in (5, 10, 12)]
    adversarial, fooled = attack(model, x[:0], labels[:0], 0.1)
    assert adversarial.shape == (0, *SHAPE) and fooled.shape == (0,)
