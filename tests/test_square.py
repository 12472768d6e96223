"""Square: its schedule, its squares, what it accepts, what it returns, and that masked gradients do not stop it."""

import copy
import importlib
from itertools import groupby, pairwise

import exact
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import models
from nanomr.attacks import common
from nanomr.testing.strategies import fewer, seeds

module = importlib.import_module("nanomr.attacks.square")
square = module.square

SHAPE, N = (6, 6, 2), 12
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def network(seed=0, hidden=(8,), classes=4, dtype=np.float64, shape=SHAPE):
    """A small network whose decisions change within small balls."""
    model = models.mlp((int(np.prod(shape)), *hidden, classes), seed=seed, input_shape=shape).astype(dtype)
    model.weights *= 4
    *_, last = model.children.values()
    last.params["bias"] -= model.forward(images(seed, dtype=dtype, shape=shape))[0].mean(0)
    return model


def images(seed=0, n=N, dtype=np.float64, shape=SHAPE):
    """Random images, black and white pixels among them."""
    return np.clip(np.random.default_rng(seed).uniform(-0.2, 1.2, (n, *shape)), 0, 1).astype(dtype)


def own(model, x):
    return model.forward(x)[0].argmax(1)


def margins(model, x, labels):
    logits = model.forward(x)[0]
    others = np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits)
    return logits[np.arange(len(x)), labels] - others.max(1)


def spy(model):
    """The list of all image batches that the model will be given; no backward pass is allowed from now on."""
    seen = []

    class Spy(type(model)):
        def forward(self, x, **options):
            assert not options
            seen.append(x.copy())
            return super().forward(x)

        def backward(self, *args, **options):
            raise AssertionError("Square takes no gradient")

    model.__class__ = Spy
    return seen


def robust(shape=SHAPE, dtype=np.float64, slope=0.0):
    """A two-class network that nothing fools; the margin is 9 plus ``slope`` times the sum of the pixels."""
    model = models.mlp((int(np.prod(shape)), 2), input_shape=shape).astype(dtype)
    model.weights[...] = 0
    model.children["fc1"].params["weight"][:, 0] = slope
    model.children["fc1"].params["bias"][...] = [9, 0]
    return model


def test_area_and_sides_follow_the_papers_schedule():
    areas = [(value, [*group][-1]) for value, group in groupby(range(10_000), module.area)]
    last = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 9999]
    assert areas == [(pytest.approx(0.8 / 2**i), query) for i, query in enumerate(last)]
    queries = range(5000)  # AutoAttack's, on 32 x 32 images
    assert [value for value, _ in groupby(module.side(q, 32) for q in queries)] == [29, 20, 14, 10, 7, 5, 4, 3]
    sides = [value for value, _ in groupby(module.side(q, 32, "l2") for q in queries)]
    assert sides == [29, 21, 15, 11, 7, 5, 3]  # 4 becomes 5, so that one 5 lasts for two stages
    assert module.side(4000, 32, "l2") == 5 and module.side(4001, 32, "l2") == 3
    assert module.side(9999, 4) == 1 and module.side(0, 2, "l2") == 2 and module.side(0, 1, "l2") == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 29])
def test_a_bump_is_a_hill_over_a_valley_of_norm_one(size):
    bump = module._bump(size)
    assert bump.shape == (size, size) and np.linalg.norm(bump) == pytest.approx(1)
    assert np.all(bump[: size // 2] > 0) and np.all(bump[size // 2 :] < 0)
    if size == 5:  # piles: 1; 1 + 1/4; 1 + 1/4 + 1/9 in the middle, each half of norm 1 before both are joined
        hill = 1 / 9 + np.array([[0, 1 / 4, 1 / 4, 1 / 4, 0], [0, 1 / 4, 5 / 4, 1 / 4, 0]])
        np.testing.assert_allclose(bump[:2], hill / np.linalg.norm(hill) / 2**0.5)
        valley = 1 / 9 + np.array(
            [[0, 1 / 4, 1 / 4, 1 / 4, 0], [0, 1 / 4, 5 / 4, 1 / 4, 0], [0, 1 / 4, 1 / 4, 1 / 4, 0]]
        )
        np.testing.assert_allclose(bump[2:], -valley / np.linalg.norm(valley) / 2**0.5)


@NORMS
@DTYPES
@fewer(0.5)
@given(seed=seeds, eps=st.floats(0, 0.5), queries=st.integers(0, 25))
def test_what_is_fooled_is_in_ball_and_box_and_the_rest_is_unchanged(norm, dtype, seed, eps, queries):
    eps *= 1 if norm == "linf" else 5
    model, x = network(seed % 100, dtype=dtype), images(seed, dtype=dtype)
    labels = own(model, x)
    labels[::4] = (labels[::4] + 1) % 4
    before, gradients = x.copy(), model.gradients.copy()
    adversarial, fooled = square(model, x, labels, eps, norm=norm, seed=seed, queries=queries, batch_size=7)
    assert adversarial.dtype == dtype and adversarial.shape == x.shape and fooled.dtype == bool
    assert np.array_equal(x, before) and np.array_equal(model.gradients, gradients)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert np.array_equal(fooled, own(model, adversarial) != labels)
    assert exact.inside(norm, eps, x, adversarial)
    assert np.all(fooled[::4]) and np.array_equal(adversarial[::4], x[::4])
    assert np.array_equal(adversarial[~fooled], x[~fooled])
    assert np.array_equal(common.recheck(model, x, adversarial, labels, eps, norm), fooled)


@NORMS
def test_every_candidate_is_in_ball_and_box_and_the_next_one_starts_from_the_best(norm):
    """Each candidate differs from the best so far within this query's windows only, and the best is never left."""
    model, eps = robust(slope=-0.01), {"linf": 0.1, "l2": 0.8}[norm]
    x = images(3)
    labels = np.zeros(N, int)
    seen = spy(model)
    assert not square(model, x, labels, eps, norm=norm, queries=60)[1].any()
    assert np.array_equal(seen.pop(0), x) and len(seen) == 60
    best, value, kept = seen[0].copy(), margins(model, seen[0], labels), 0
    seen.pop()  # that forward pass was ours
    for query, candidate in enumerate(seen[1:], 1):
        assert common.threat(norm, eps).inside(x, candidate).all()
        s = module.side(query, 6, norm)
        changed = (candidate != best).any(3)
        for mask in changed:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if norm == "linf" and len(rows):
                assert np.ptp(rows) < s and np.ptp(columns) < s
            assert mask.sum() <= s * s * (1 if norm == "linf" else 2)
        new = 9 - 0.01 * candidate.sum((1, 2, 3))
        better = new < value
        kept += better.sum()
        best[better], value[better] = candidate[better], new[better]
    assert 20 < kept < 59 * N / 2  # some were better, most were not


def test_linf_starts_with_stripes_and_paints_whole_squares_at_the_edge():
    x, eps = np.full((40, 6, 6, 2), 0.5), 0.1
    x[1::2] = 0.95
    model = robust()
    seen = spy(model)
    square(model, x, np.zeros(40, int), eps, queries=40)
    _, stripes, *candidates = seen
    low, high = x - eps, np.minimum(x + eps, 1)
    assert np.all((stripes == low) | (stripes == high))
    up = stripes == high
    assert np.all(up == up[:, :1])  # a column has one sign
    assert 0.4 < up[:, 0].mean() < 0.6
    assert (up[:, 0] != up[:, 0, :1]).any((1, 2)).all()  # columns differ, and so do channels and images
    assert (up[..., 0] != up[..., 1]).any() and len(np.unique(up[:, 0].reshape(40, -1), axis=0)) == 40
    corners, signs = [], []
    for query, candidate in enumerate(candidates, 1):  # the margin is constant: nothing is kept after the start
        assert np.all((candidate == low) | (candidate == high))
        s, changed = module.side(query, 6), candidate != stripes
        if s == 4:
            for image, mask in zip(candidate == high, changed, strict=True):
                rows, columns = (np.flatnonzero(mask.any((a, 2))) for a in (1, 0))
                if len(rows) == len(columns) == 4:
                    window = image[rows[0] : rows[0] + 4, columns[0] : columns[0] + 4]
                    assert np.all(window == window[0, 0])
                    corners.append((rows[0], columns[0]))
                    signs.append(tuple(window[0, 0]))
    assert set(corners) == {(i, j) for i in range(3) for j in range(3)}  # the last positions too
    assert len(set(signs)) == 4
    counts = [corners.count(c) for c in set(corners)]
    assert min(counts) > 0.5 * len(corners) / 9


def test_l2_starts_with_bumps_of_norm_eps_and_keeps_the_norm():
    """Away from the box the whole budget is spent, at the start and by every candidate."""
    x, eps = np.full((30, 11, 11, 2), 0.5), 0.4
    model = robust((11, 11, 2))
    seen = spy(model)
    square(model, x, np.zeros(30, int), eps, norm="l2", queries=30)
    for candidate in seen[1:]:
        np.testing.assert_allclose(np.linalg.norm((candidate - x).reshape(30, -1), axis=1), eps, rtol=2e-6)
    start = seen[1] - x
    assert np.all(start[:, 10] == 0) and np.all(start[:, :, 10] == 0) and np.all(start[:, :10, :10] != 0)
    tiles = start[:, :10, :10].reshape(30, 5, 2, 5, 2, 2).transpose(0, 1, 3, 5, 2, 4)  # image, row, column, channel
    upright = np.sign(tiles[..., 0, 0]) == np.sign(tiles[..., 0, 1])
    bump = np.where(upright[..., None, None], module._bump(2), module._bump(2).T) * np.sign(tiles[..., :1, :1])
    np.testing.assert_allclose(tiles, bump * eps / 50**0.5, rtol=1e-5)
    assert np.all(upright == upright[..., :1])  # the channels lie alike, and differ by their signs
    signs = np.sign(tiles[..., 0, 0])
    for share in (upright.mean(), (signs > 0).mean(), (signs[..., 0] == signs[..., 1]).mean()):
        assert 0.45 < share < 0.55


def test_an_l2_candidate_moves_what_its_windows_hold_channel_by_channel():
    """The masses of a channel's two windows end in one bump; where eps is not spent, each channel gets its share."""
    ball = common.L2(0.5)
    painter = module._L2(ball)
    x = np.full((200, 8, 8, 2), 0.5)
    draw = np.random.default_rng(0)
    for spent in (0.2, 0.5 * (1 - 1e-6)):
        change = draw.standard_normal(x.shape)
        change *= spent / np.linalg.norm(change.reshape(200, -1), axis=1)[:, None, None, None]
        current = x + change
        (source, grey), (to, new) = painter.patches(x, current, draw.random((200, 7)), 3)
        candidate = current.copy().reshape(-1)
        candidate[source] = grey
        candidate[to] = new
        after = candidate.reshape(x.shape) - x
        extra = (0.25 - spent**2) / 2
        np.testing.assert_allclose((after**2).sum((1, 2)), (change**2).sum((1, 2)) + extra, rtol=1e-5)
        erased = (after == 0).all(3).sum((1, 2))  # the source, but for what the target covers
        assert set(erased) >= {9, 3, 0} and erased.max() == 9
        touched = (abs(after - change) > 1e-12).any(3).sum((1, 2))
        np.testing.assert_array_equal(touched, 9 + erased)
        # the target's new content: a bump and the old content, both of norm 1, in the same direction as before
        old = change.reshape(-1)[to]
        bump = new - 0.5
        bump = bump / np.linalg.norm(bump, axis=(1, 2), keepdims=True)
        old = old / np.linalg.norm(old, axis=(1, 2), keepdims=True)
        pattern = bump * ((bump * old).sum((1, 2), keepdims=True) * 2) - old  # |bump + old| = 2 cos of their angle
        pattern = np.sign(pattern[:, :1, :1]) * pattern
        hill = module._bump(3)
        lying = np.isclose(pattern[..., 0], hill.T * np.sign(hill[0, 0])).all((1, 2))
        upright = np.isclose(pattern[..., 0], hill * np.sign(hill[0, 0])).all((1, 2))
        assert np.all(lying | upright) and 60 < lying.sum() < 140


@NORMS
def test_a_linear_model_falls_when_eps_is_beyond_the_flip_radius(norm):
    """Not where eps is smaller, ever; and where it is three times (l2: ten times) as large, within 400 queries."""
    model = network(hidden=(), classes=2)
    x = np.random.default_rng(1).uniform(0.3, 0.7, (N, *SHAPE))
    w = model.children["fc1"].params["weight"] @ [-1, 1]
    model.children["fc1"].params["bias"][...] = 0
    bias = -(x.reshape(N, -1) @ w).mean() + [-0.3, 0.3]
    for offset, half in zip(bias, (slice(0, 6), slice(6, N)), strict=True):  # the plane on either side of the images
        model.children["fc1"].params["bias"][1] = offset
        labels = own(model, x)
        margin = abs(x.reshape(N, -1) @ w + offset)
        radius = margin / (abs(w).sum() if norm == "linf" else np.linalg.norm(w))
        factor = 3 if norm == "linf" else 10
        for i in range(half.start, half.stop):
            one = dict(norm=norm, seed=i, queries=400)
            part = slice(i, i + 1)
            assert not square(model, x[part], labels[part], radius[i] * 0.999, **one)[1][0]
            assert square(model, x[part], labels[part], radius[i] * factor, **one)[1][0]


@NORMS
def test_masked_gradients_do_not_stop_it(norm):
    """Logits so large that float32's softmax is a constant: the cross-entropy has no gradient at all."""
    from nanomr.attacks import pgd
    from nanomr.losses import cross_entropy

    model = network(7, dtype=np.float32)
    *_, last = model.children.values()
    for values in last.params.values():
        values *= 1e4
    x = images(7, dtype=np.float32)
    labels = own(model, x)
    logits, cache = model.forward(x)
    masked = ~model.backward(cross_entropy(logits, labels)[1], cache, param_grads=False).any((1, 2, 3))
    assert masked.sum() >= 8
    eps = {"linf": 0.2, "l2": 1.2}[norm]
    if norm == "linf":
        assert not pgd(model, x, labels, eps, random_start=False, steps=5)[1][masked].any()
    assert square(model, x, labels, eps, norm=norm, queries=300)[1][masked].mean() > 0.7


@NORMS
@pytest.mark.parametrize("queries", [1, 130])
def test_neither_the_batch_nor_its_size_decides(norm, queries):
    """130 queries: more than one block of random numbers."""
    model, x = network(2), images(2, n=20)
    labels = own(model, x)
    eps = {"linf": 0.05, "l2": 0.5}[norm]
    options = dict(norm=norm, seed=5, queries=queries)
    adversarial, fooled = square(model, x, labels, eps, batch_size=100, **options)
    assert 0 < fooled.sum() < 20
    again, fooled_again = square(model, x, labels, eps, batch_size=3, **options)
    assert np.array_equal(fooled, fooled_again) and np.array_equal(adversarial, again)
    ids = np.array([17, 4, 3, 11, 0])
    some, fooled_some = square(model, x[ids], labels[ids], eps, ids=ids, **options)
    assert np.array_equal(fooled_some, fooled[ids]) and np.array_equal(some, adversarial[ids])
    others = square(model, x[ids], labels[ids], eps, ids=ids + 50, **options)[0]
    both = (some != x[ids]).any((1, 2, 3)) & (others != x[ids]).any((1, 2, 3))
    assert not np.any((some == others)[both].all((1, 2, 3)))
    another = square(model, x, labels, eps, batch_size=100, **options | {"seed": 6})[0]
    assert not np.array_equal(another, adversarial)


@NORMS
def test_random_numbers_do_not_come_back_after_a_block(norm):
    x, model = np.full((4, *SHAPE), 0.5), robust()
    seen = spy(model)
    square(model, x, np.zeros(4, int), 0.1, norm=norm, queries=410)
    later = np.array(seen[1 + 201 :])  # queries 201 to 409, all with squares of one size; nothing is ever kept
    for start in range(0, 100, 20):
        assert (later[start : start + 20] != later[start + 100 : start + 120]).any((2, 3, 4)).mean() > 0.7


def test_an_l2_change_that_rounding_makes_too_long_does_not_count():
    """In float32, at an eps of a few units in the last place; any change is likely to fool this network."""
    model = robust(dtype=np.float32)
    weight, bias = model.children["fc1"].params.values()
    weight[...] = np.random.default_rng(0).choice([-1e6, 1e6], (72, 2))
    bias[...] = 0
    x = np.full((20, *SHAPE), 0.75, np.float32)
    bias[...] = -model.forward(x[:1])[0][0] + np.float32([0.01, 0])
    labels, total = own(model, x), 0
    for eps in np.linspace(3e-7, 2e-6, 12):
        adversarial, fooled = square(model, x, labels, eps, norm="l2", queries=10)
        assert common.L2(eps).inside(x, adversarial).all()
        total += fooled.sum()
    assert total > 20


def test_more_queries_fool_a_superset_with_the_same_images():
    model, x = network(4), images(4, n=30)
    labels = own(model, x)
    before, few = square(model, x, labels, 0.04, queries=0)
    assert not few.any() and np.array_equal(before, x)
    sizes = []
    for queries in (1, 2, 20, 101, 150):
        adversarial, fooled = square(model, x, labels, 0.04, queries=queries)
        assert np.all(fooled[few]) and np.array_equal(adversarial[few], before[few])
        sizes.append(int(fooled.sum()))
        before, few = adversarial, fooled
    assert sizes[0] < sizes[2] < sizes[-1] < 30


def test_fooled_images_leave_at_once():
    model, x = network(4), images(4, n=100)
    x = x[own(model, x) == 0]
    twin = copy.deepcopy(model)
    seen = spy(model)
    _, fooled = square(model, x, np.zeros(len(x), int), 0.06, queries=40)
    assert 5 < fooled.sum() < len(x) and len(seen) == 42
    assert len(seen.pop()) == fooled.sum()  # once more, to be sure
    for batch, later in pairwise(seen):
        assert len(later) == (own(twin, batch) == 0).sum()
    seen.clear()
    assert square(model, x, np.zeros(len(x), int), 0.9, queries=500)[1].all()
    assert len(seen) < 500  # and it stops when all are gone


@NORMS
@DTYPES
def test_eps_zero_is_the_clean_accuracy(norm, dtype):
    model, x = network(dtype=dtype), images(dtype=dtype)
    labels = own(model, x)
    labels[:3] = (labels[:3] + 1) % 4
    adversarial, fooled = square(model, x, labels, 0.0, norm=norm, queries=20)
    assert np.array_equal(adversarial, x) and np.array_equal(np.flatnonzero(fooled), [0, 1, 2])


@NORMS
def test_the_memory_layout_of_the_images_decides_nothing(norm):
    model, x = network(2), images(2)
    labels = own(model, x)
    options = dict(norm=norm, queries=30)
    eps = {"linf": 0.05, "l2": 0.2}[norm]
    adversarial, fooled = square(model, x, labels, eps, **options)
    turned = np.ascontiguousarray(x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)
    assert fooled.any() and not turned.flags.c_contiguous
    again, fooled_again = square(model, turned, labels, eps, **options)
    assert np.array_equal(fooled, fooled_again) and np.array_equal(adversarial, again)


def test_bad_arguments_are_refused():
    model, x = network(), images()
    labels = own(model, x)
    with pytest.raises(ValueError, match=r"square: queries must be at least 0, not -1"):
        square(model, x, labels, 0.1, queries=-1)
    for bad in (np.zeros((2, 4, 5, 1)), np.zeros((2, 16))):
        with pytest.raises(ValueError, match="square: the images must be square"):
            square(model, bad, labels[:2], 0.1)
    with pytest.raises(ValueError, match="eps"):
        square(model, x, labels, -0.1)
    with pytest.raises(ValueError, match="norm"):
        square(model, x, labels, 0.1, norm="l1")
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        square(model, x + 0.5, labels, 0.1)
    with pytest.raises(ValueError, match="labels"):
        square(model, x, labels + 4, 0.1)


def test_progress_and_no_images():
    model, x = network(4), images(4)
    labels, calls = own(model, x), []
    _, fooled = square(model, x, labels, 0.04, queries=5, batch_size=5, progress=lambda *a: calls.append(a))
    assert calls == [(n, n - int(fooled[:n].sum())) for n in (5, 10, 12)]
    adversarial, fooled = square(model, x[:0], labels[:0], 0.1)
    assert adversarial.shape == (0, *SHAPE) and fooled.shape == (0,)
