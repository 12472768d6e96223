"""The Wasserstein attack, and its projection against exact transport: flows and linear programs on tiny images."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from nanomr import models
from nanomr.attacks import sinkhorn
from nanomr.attacks.transport import least_cost
from nanomr.attacks.wasserstein import lambert_of_exp, project, wasserstein
from nanomr.ops.cpu.flags import FLAGS
from nanomr.testing.strategies import LAYOUTS, fewer, images, layouts, seeds

module = sys.modules["nanomr.attacks.wasserstein"]  # the package may have a function of that name
UNCACHED = FLAGS | {"cache": False}  # as the kernel is; a cache would not notice that sinkhorn.py changed


def pile(draw, shape, zeros=0.2):
    """Images with some black pixels, and what they should become: anything, negative numbers included."""
    x = draw.uniform(0, 1, shape) * (draw.random(shape) >= zeros)
    return x, x + draw.uniform(-0.5, 0.5, shape) * draw.choice([0.1, 1, 3])


def shares(x, y):
    mass = x.sum((1, 2, 3), keepdims=True)
    return x / mass, y / mass


# --- exact answers ----------------------------------------------------------------------------------------------------


def costs(shape):
    """(H W C, H W C) from pixel to pixel, flat; inf for what is too far or in another channel."""
    row, column, channel = (a.ravel() for a in np.indices(shape))
    down, right = abs(row[:, None] - row), abs(column[:, None] - column)
    allowed = (down <= 2) & (right <= 2) & (channel[:, None] == channel)
    return np.where(allowed, down**2.0 + right**2, np.inf)


def transport(a, b):
    """The least cost of turning image a (H, W, C) into b, of equal mass: shortest augmenting paths (Bellman-Ford)."""
    cost = np.minimum(costs(a.shape), 1e6)  # no way costs a million
    supply, demand = a.ravel().copy(), b.ravel().copy()
    flow, total = np.zeros_like(cost), 0.0
    for _ in range(1000):
        if min(supply.sum(), demand.sum()) < 1e-10:
            return total
        there, here, path = np.where(supply > 1e-12, 0.0, np.inf), np.full(len(demand), np.inf), {}
        via = np.zeros(len(demand), int)
        for _ in range(2 * len(supply)):
            forward = there[:, None] + cost
            better = forward.min(0) < here - 1e-9  # not where equal: the path would bite its tail
            here[better], via[better] = forward.min(0)[better], forward.argmin(0)[better]
            back = np.where(flow > 1e-12, here - cost, np.inf)
            better = np.flatnonzero(back.min(1) < there - 1e-9)
            if len(better) == 0:
                break
            for i in better:
                there[i], path[i] = back[i].min(), back[i].argmin()
        sink = np.where(demand > 1e-12, here, np.inf).argmin()
        steps, j = [], sink
        for _ in range(2 * len(supply)):
            i = via[j]
            steps.append((i, j, 1))
            if i not in path:
                break
            j = path[i]
            steps.append((i, j, -1))
        amount = min(supply[i], demand[sink], *(flow[s, t] for s, t, sign in steps if sign < 0))
        for s, t, sign in steps:
            flow[s, t] += sign * amount
            total += sign * amount * cost[s, t]
        supply[i] -= amount
        demand[sink] -= amount
    raise AssertionError("no end")


def furthest(f, x, radius):
    """max of <f, b> over the images b in the ball around x: the linear program's dual has one variable."""
    cost, x, f = costs(x.shape), x.ravel(), f.ravel()

    def dual(psi):
        return psi * radius + x @ (f - psi * cost).max(1, where=np.isfinite(cost), initial=-np.inf)

    low, high = 0.0, 2 * (abs(f).max() + 1)
    for _ in range(80):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if dual(a) < dual(b) else (a, high)
    return dual((low + high) / 2)


def dense(x, y, radius, strength):
    """The regularised problem's solution by the reference's own iteration, on a matrix, until nothing moves."""
    cost, shape = costs(x.shape), x.shape
    x, y = x.ravel(), y.ravel()
    beta, psi, w = np.zeros(len(x)), 1.0, np.ones(len(x))
    finite = np.where(np.isfinite(cost), cost, 0)
    for _ in range(5000):
        kernel = np.isfinite(cost) * np.exp(-psi * finite - 1)
        alpha = x / (kernel @ np.exp(beta))
        s = kernel.T @ alpha
        for _ in range(10):  # Newton in log w
            w *= np.exp(np.clip((strength * y + np.log(strength * s) - w - np.log(w)) / (1 + w), -1, 1))
        before, beta = beta, strength * y - w
        plan = alpha[:, None] * kernel * np.exp(beta)
        gradient, hessian = (plan * finite).sum() - radius, -(plan * finite * finite).sum()
        t = 1.0
        while t > 0.01 and psi - t * gradient / hessian < 0:
            t /= 2
        psi, old = max(psi - t * gradient / hessian, 0), psi
        if abs(beta - before).max() < 1e-12 and abs(psi - old) < 1e-12:
            break
    return (w / strength).reshape(shape), psi


def test_the_flow_knows_some_costs():
    a, b = np.zeros((2, 3, 4, 1)), np.zeros((3, 4, 1))
    a[0, 1, 1], a[1, 1, 1], a[1, 2, 3] = 0.7, 0.5, 0.5
    for (row, column), cost in {(1, 1): 0, (1, 2): 1, (0, 2): 2, (1, 3): 4, (0, 3): 5, (2, 0): 2}.items():
        b[:] = 0
        b[row, column] = 0.7
        assert transport(a[0], b) == pytest.approx(0.7 * cost)
    b[:] = 0
    b[1, 2], b[1, 1] = 0.5, 0.5
    # the near pixel stays or moves by one, the far one has to come by 2 (r^2 = 1 + 1) or by (1, 2)
    assert transport(a[1], b) == pytest.approx(0.5 * 2)
    b[:] = 0
    b[1, 0], b[0, 3] = 0.5, 0.5
    assert transport(a[1], b) == pytest.approx(0.5 * (1 + 4))
    b[:] = 0
    b[0, 0] = 1
    assert transport(a[1], b) > 1e5


# --- the projection ---------------------------------------------------------------------------------------------------


@fewer(2)
@given(
    seed=seeds,
    shape=images(size=(1, 6)),
    radius=st.floats(-9, 2).map(np.exp),
    strength=st.sampled_from([10, 1000, 3000]),
    zeros=st.sampled_from([0.0, 0.2, 0.9]),
    iterations=st.sampled_from([1, 2, 7, 400]),
    layout=layouts,
)
def test_what_the_projection_promises_however_soon_it_is_stopped(
    seed, shape, radius, strength, zeros, iterations, layout
):
    x, y = pile(np.random.default_rng(seed), shape, zeros)
    given = LAYOUTS[layout](x, np), LAYOUTS[layout](y, np)
    found = project(*given, radius, regularization=strength, iterations=iterations)
    assert np.array_equal(given[0], x) and np.array_equal(given[1], y)
    assert found.images.dtype == np.float64 and found.images.shape == shape
    for value in found:
        assert np.isfinite(value).all()
    assert found.images.min() >= 0
    # mass stays, in each channel
    np.testing.assert_allclose(found.images.sum((1, 2)), x.sum((1, 2)), rtol=1e-12, atol=1e-14)
    assert np.all(found.cost <= radius * (1 + 1e-12))
    assert np.all((found.iterations <= iterations) & ((found.iterations >= 1) | (x.sum((1, 2, 3)) == 0)))
    assert np.all(found.psi >= 0)
    early = (found.iterations > 0) & (found.iterations < iterations)
    assert np.all(found.residual[early] <= 1e-3 * radius)
    assert np.all((found.cost[early] >= radius * (1 - 1e-3)) | (found.psi[early] == 0))


@fewer(0.5)
@given(seed=seeds, radius=st.floats(-6, 0).map(np.exp), strength=st.sampled_from([30, 300, 2000]))
def test_the_images_are_in_the_exact_ball_and_nearly_the_nearest(seed, radius, strength):
    """z is the point of the ball nearest to y if <y - z, b - z> <= 0 for all b in the ball. The entropy allows that to
    be log(25) / strength (derivations/sinkhorn.md), so that it vanishes as the strength grows."""
    x, y = shares(*pile(np.random.default_rng(seed), (1, 4, 4, 1)))
    y = x + 0.3 * (y - x)
    found = project(x, y, radius, regularization=strength, tolerance=1e-5, iterations=200_000)  # some take 40,000
    x, y, z = x[0], y[0], found.images[0]
    assert found.iterations[0] < 200_000
    assert transport(x, z) <= found.cost[0] * (1 + 1e-6)
    gap = furthest(y - z, x, radius) - ((y - z) * z).sum()
    assert -1e-6 * abs(y - z).max() <= gap <= np.log(25) / strength + 3e-5 * radius * abs(y - z).max()


def test_the_plan_becomes_the_cheapest_plan_as_the_regularization_vanishes(rng):
    x, _ = shares(*pile(rng, (1, 4, 4, 1), zeros=0))
    y = x + rng.uniform(-0.02, 0.02, x.shape)
    waste, gaps = [], []
    for strength in (100, 200, 400, 20000):
        found = project(x, y, 0.02, regularization=strength, tolerance=1e-5, iterations=20000)
        waste.append(1 - transport(x[0], found.images[0]) / found.cost[0])
        gaps.append(furthest(y[0] - found.images[0], x[0], 0.02) - ((y - found.images) * found.images).sum())
    assert waste[0] > 0.1 and -1e-6 < waste[-1] < 0.01
    assert np.all(np.diff(waste) < 0) and np.all(np.diff(gaps) < 0), (waste, gaps)


def test_what_is_in_the_ball_stays_but_for_the_blur_of_the_entropy(rng):
    x, _ = shares(*pile(rng, (1, 6, 6, 1), zeros=0))
    y = x.copy()
    y[0, 2, 2], y[0, 2, 3] = y[0, 2, 2] / 2, y[0, 2, 3] + y[0, 2, 2] / 2
    radius = 2 * transport(x[0], y[0])
    errors = []
    for strength in (300, 3000, 20000):
        z = project(x, y, radius, regularization=strength, tolerance=1e-4, iterations=20000).images
        errors.append(((z - y) ** 2).sum())
        assert errors[-1] <= 2 * np.log(25) / strength
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (1, 2), (2, 1), (2, 2)])
def test_moving_a_share_m_costs_m_times_the_squared_distance(step):
    """All mass in one pixel, wanted in another: the radius buys a share radius / distance^2 of it."""
    x, y = np.zeros((1, 5, 5, 1)), np.zeros((1, 5, 5, 1))
    x[0, 1, 2] = 3.0
    y[0, 1 + step[0], 2 + step[1]] = 3.0
    # the pixels between are cheaper to reach: make them unwanted
    y -= (x == 0) & (y == 0)
    for radius in (0.05, 0.4):
        z = project(x, y, radius, regularization=2000).images
        assert z[y > 0] / 3 == pytest.approx(min(radius / (step[0] ** 2 + step[1] ** 2), 1), rel=2e-3)
        assert z.sum() == pytest.approx(3)


def test_mass_goes_two_pixels_at_most_in_its_channel_in_the_image():
    for place, length in (((0, 3, 1), 4), ((0, 0, 0), 4), ((3, 0, 2), 6)):
        x = np.zeros((1, length, length, 3))
        x[(0, *place)] = 1
        y = np.ones(x.shape)
        z = project(x, y, 10.0, iterations=50).images[0]
        row, column, channel = np.indices(z.shape)
        reached = (abs(row - place[0]) <= 2) & (abs(column - place[1]) <= 2) & (channel == place[2])
        assert np.all(z[~reached] == 0) and np.all(z[reached] > 1e-3)


@pytest.mark.parametrize("radius", [0.003, 0.1, 8.0])
def test_it_is_the_references_problem(rng, radius):
    """Against the original iteration on a matrix, run to its end."""
    x, y = shares(*pile(rng, (2, 4, 3, 2)))
    found = project(x, y, radius, regularization=300, tolerance=1e-10, iterations=20000)
    for i in range(2):
        z, psi = dense(x[i], y[i], radius, 300)
        assert abs(found.images[i] - z).max() < 1e-8
        assert found.psi[i] == pytest.approx(psi, abs=1e-6)
    assert (found.psi[0] == 0) == (radius == 8.0)


@fewer(0.5)
@given(seed=seeds, shape=images(size=(1, 5)), radius=st.floats(-7, 2).map(np.exp), strength=st.sampled_from([10, 100]))
def test_the_kernel_computes_what_the_logarithms_do(seed, shape, radius, strength):
    """On the way they differ (the kernel does not solve for w to the end in each iteration): compare the ends."""
    x, y = shares(*pile(np.random.default_rng(seed), shape, 0))
    start = np.ones(len(x)), np.zeros(x.shape)
    a = module._project_numba(x, y, radius, strength, 1e-6, 1000, *(s.copy() for s in start))
    b = module._project_log(x, y, radius, strength, 1e-6, 1000, *(s.copy() for s in start))
    ends = (a[3] < 1000) & (b[3] < 1000)
    np.testing.assert_allclose(a[0][ends], b[0][ends], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(a[1][ends], b[1][ends], rtol=1e-5, atol=1e-9)
    assert np.all(abs(a[3] - b[3])[ends] <= 3)


@njit(**UNCACHED)
def _logs(v, out):
    for i in range(len(v)):
        out[i] = sinkhorn._log(v[i])


def test_the_kernels_logarithm(rng):
    """Of all that e^beta may be, and where numbers cancel: near 1, near powers of 2, and where the exponent changes."""
    near = 1 + rng.uniform(-1, 1, 4000) * 2.0 ** -rng.integers(1, 52, 4000)
    v = [np.exp(rng.uniform(-500, 500, 4000)), near, near * 2.0 ** rng.integers(-700, 700, 4000), near * 0.5**0.5]
    v = np.concatenate([*v, [1.0, 2.0, 0.5, 2**0.5, 0.5**0.5, sinkhorn.SMALLEST, sinkhorn.LARGEST]])
    found = np.empty_like(v)
    _logs(v, found)
    np.testing.assert_allclose(found, np.log(v), rtol=1e-15, atol=0)


@njit(**UNCACHED)
def _exponentials(t, out):
    for i in range(len(t)):
        out[i] = sinkhorn._exp(t[i])


def test_the_kernels_exponential(rng):
    """Of all that beta may be, of nothing, and where the power of 2 changes."""
    t = [rng.uniform(-500, 500, 4000), rng.uniform(-1, 1, 4000), rng.uniform(-1, 1, 4000) * 1e-9, [0.0, 500.0, -500.0]]
    t += [(np.arange(-700, 700) + 0.5) * np.log(2)]
    t = np.concatenate(t)
    found = np.empty_like(t)
    _exponentials(t, found)
    np.testing.assert_allclose(found, np.exp(t), rtol=6e-14, atol=0)  # 721 log 2 is rounded by 5.7e-14
    near = abs(t) < 0.34
    np.testing.assert_allclose(found[near], np.exp(t[near]), rtol=5e-16, atol=0)


def test_dark_images_overflow_nothing(rng):
    """A single spark, steps a hundred times as bright as it: e^beta is e^3000 and more. The logarithms take over."""
    x = np.zeros((6, 5, 5, 3), np.float32)
    x[0, 2, 2, 1], x[1, 0, 0, 0], x[2, 4, 4] = 1 / 255, 1, 1e-40
    x[3] = rng.uniform(0, 1e-3, (5, 5, 3))
    x[4] = rng.uniform(0, 1, (5, 5, 3))  # and one that is not dark
    taken = []
    for sign in (1, -1, rng.choice([-1, 1], x.shape)):
        y = x.astype(float) + 0.1 * sign
        assert np.array_equal(project(x[5:], y[5:], 0.01).images, x[5:])  # all black: nothing to move
        for radius in (0.001, 0.1):
            found = project(x, y, radius, iterations=40)
            assert all(np.isfinite(value).all() for value in found)
            assert np.all(found.cost <= radius * (1 + 1e-12)) and found.images.min() >= 0
            np.testing.assert_allclose(found.images.sum((1, 2, 3)), x.astype(float).sum((1, 2, 3)), rtol=1e-8)
            assert abs(found.images[3:5] - x[3:5]).reshape(2, -1).max(1).min() > 1e-6  # they do move
            taken.append(_gives_up(x[:5].astype(float), y[:5], radius))
            assert not taken[-1][4]  # steps of 8 in log w are far, but no reason to give up
    assert np.any(taken)


@pytest.mark.parametrize("iterations", [1, 2, 9])
def test_prices_that_the_kernel_cannot_hold_go_on_in_logarithms(rng, iterations):
    x, y = shares(*pile(rng, (3, 4, 5, 2)))
    beta = np.stack([rng.uniform(-1, 1, x.shape[1:]), np.full(x.shape[1:], 3000.0), np.full(x.shape[1:], -501.0)])
    start = np.array([1.0, 2.0, 0.5]), beta
    found = project(x, y, 0.02, iterations=iterations, start=start)
    wanted = module._project_log(x, y, 0.02, 3000.0, 1e-3, iterations, *(value.copy() for value in start))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a[1:], b[1:])
    cold = project(x, y, 0.02, iterations=iterations)
    assert abs(found.images - cold.images)[1:].max((1, 2, 3)).min() > 1e-6 or iterations == 9


@pytest.mark.parametrize("dtype", [np.float16, ">f4", np.longdouble, np.int64])
def test_images_of_any_dtype_are_projected(rng, dtype):
    x, y = ((9 * a).astype(dtype) for a in pile(rng, (2, 4, 5, 2)))
    x.flags.writeable = False
    found, wanted = project(x, y, 0.02), project(x.astype(np.float64), y.astype(np.float64), 0.02)
    np.testing.assert_array_equal(found.images, wanted.images)


def _gives_up(x, y, radius):
    x, y = shares(x, y)
    n, rows = len(x), (len(x), x.shape[1], -1)
    z, beta, count = np.empty(x.shape), np.zeros(x.shape), np.zeros(n, np.int64)
    arguments = beta.reshape(rows), np.ones(n), z.reshape(rows), np.zeros(n), np.zeros(n), count
    sinkhorn.project(x.reshape(rows), y.reshape(rows), radius, 3000.0, 1e-3, 40, x.shape[3], *arguments)
    return count == 0


def test_nobodys_projection_depends_on_the_others(rng):
    x, y = pile(rng, (5, 6, 5, 3))
    x[3] *= 1e-4  # this one goes another way
    whole = project(x, y, 0.02)
    for part in ([2], [3], [4, 0], [1, 3]):
        for a, b in zip(whole, project(x[part], y[part], 0.02), strict=True):
            assert np.array_equal(a[part], b)
    mixed = module._project_log(*shares(x, y), 0.02, 3000.0, 1e-3, 99, np.ones(5), np.zeros(x.shape))
    for i in range(5):
        alone = module._project_log(*shares(x[[i]], y[[i]]), 0.02, 3000.0, 1e-3, 99, np.ones(1), np.zeros((1, 6, 5, 3)))
        for a, b in zip(mixed, alone, strict=True):
            assert np.array_equal(a[[i]], b)


def test_a_warm_start_is_faster_and_leads_to_the_same_images(rng):
    x, y = pile(rng, (3, 12, 12, 3))
    near = y + rng.uniform(-0.02, 0.02, y.shape)
    first = project(x, y, 0.02, regularization=1000)
    before = first.psi.copy(), first.beta.copy()
    warm = project(x, near, 0.02, regularization=1000, start=(first.psi, first.beta))
    cold = project(x, near, 0.02, regularization=1000)
    assert np.array_equal(first.psi, before[0]) and np.array_equal(first.beta, before[1])
    assert np.all(warm.iterations < 0.8 * cold.iterations)
    assert abs(warm.images - cold.images).max() < 2e-2 * abs(cold.images - x).max()
    again = project(x, near, 0.02, regularization=1000, start=(warm.psi, warm.beta))
    assert np.all(again.iterations == 1)


@pytest.mark.parametrize("change", [{"radius": 0}, {"radius": np.nan}, {"regularization": -1}, {"iterations": 0}])
def test_settings_of_the_projection_that_make_no_sense(change):
    x = np.ones((1, 2, 2, 1))
    settings = {"radius": 0.1, **change}
    with pytest.raises(ValueError, match="> 0"):
        project(x, x, **settings)
    with pytest.raises(ValueError, match="one shape"):
        project(x, x[0], 0.1)


@fewer(2)
@given(t=st.lists(st.floats(-1e4, 1e12), min_size=1))
def test_lambert_w_of_an_exponential(t):
    t = np.array(t)
    w = lambert_of_exp(t)
    assert np.all(w >= 0) and np.isfinite(w).all()
    normal = t > -700  # below, w is a denormal number or 0
    np.testing.assert_allclose((w + np.log(np.where(normal, w, 1)))[normal], t[normal], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(w[t < -40], np.exp(t[t < -40]), rtol=1e-15)


def test_lambert_w_of_some_numbers():
    assert lambert_of_exp(np.array([1.0]))[0] == 1  # 1 + log 1 = 1
    assert lambert_of_exp(np.array([0.0]))[0] == pytest.approx(0.5671432904097838, rel=1e-15)  # the omega constant
    assert lambert_of_exp(np.array([-np.inf]))[0] == 0
    t = np.linspace(-60, 60, 5000)
    assert np.all(np.diff(lambert_of_exp(t)) > 0)


# --- the distance itself ----------------------------------------------------------------------------------------------


@fewer(0.3)
@given(seed=seeds, radius=st.floats(-6, 0).map(np.exp), channels=st.integers(1, 2))
def test_the_least_cost_is_the_cost_of_the_flow(seed, radius, channels):
    x, y = pile(np.random.default_rng(seed), (2, 4, 3, channels))
    z = project(x, y, radius).images
    x, z = (0.3 * a / x.max((1, 2, 3), keepdims=True) for a in (x, z))  # nothing is at 1
    z = np.minimum(z, 0.99)
    full = np.isclose(z.sum((1, 2)), x.sum((1, 2)), rtol=1e-9).all(1)
    found = least_cost(x, z)
    for i in range(2):
        if full[i]:
            wanted = sum(transport(x[i][..., [c]], z[i][..., [c]]) for c in range(channels)) / x[i].sum()
            assert found[i] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        else:
            assert np.isinf(found[i])


def test_least_costs_that_are_known():
    x = np.zeros((6, 4, 4, 2))
    x[:, 1, 1, 0], x[:, 2, 2, 1] = 0.75, 0.25
    y = x.copy()
    y[1, 1, 1, 0], y[1, 1, 3, 0] = 0.5, 0.25  # a quarter by two pixels
    y[2, 1, 1, 0], y[2, 1, 1, 1] = 0.5, 0.25  # into another channel
    y[3, 2, 2, 1], y[3, 2, 3, 1] = 0.5, 0.25  # out of nothing
    y[4, 1, 1, 0], y[4, 2, 2, 0] = 0, 0.75  # all by (1, 1)
    x[5, 0, 0, 0] = 0.5  # 1.25 in one pixel, and clipped
    y[5, 1, 1, 0] = 1
    np.testing.assert_allclose(least_cost(x, y), [0, 1, np.inf, np.inf, 1.5, 1 / 1.5], atol=1e-6)


def test_the_attacks_radii_bear_the_exact_distances_out():
    model, x = network(), pictures()
    adversarial, radius = wasserstein(model, x, own(model, x), **FAST)
    cost, hit = least_cost(x, adversarial), np.isfinite(radius)
    assert 3 < hit.sum() and (adversarial == 1).any() and np.all(cost[hit] <= radius[hit] * (1 + 1e-6))
    assert np.all(cost[hit] > 0) and np.all(cost[~hit] < 1e-6)


# --- the attack -------------------------------------------------------------------------------------------------------

SHAPE, N = (4, 4, 3), 12


def network(seed=0, dtype=np.float32, scale=8.0, shape=SHAPE):
    model = models.mlp((int(np.prod(shape)), 12, 3), seed=seed, input_shape=shape).astype(dtype)
    model.weights *= scale
    *_, last = model.children.values()
    last.params["bias"] -= model.forward(pictures(dtype=dtype, shape=shape))[0].mean(0)
    return model


def pictures(dtype=np.float32, shape=SHAPE, n=N):
    draw = np.random.default_rng(0)
    return np.clip(draw.uniform(-0.2, 1.2, (n, *shape)), 0, 1).astype(dtype)


def own(model, x):
    return model.forward(x)[0].argmax(1)


def labelled(model, x):
    """The model's own labels, but for two that are wrong to begin with."""
    labels = own(model, x)
    labels[[3, 7]] = (labels[[3, 7]] + 1) % 3
    return labels


FAST = dict(steps=12, start=0.01, factor=1.4, every=2)
RADII = [0.01 * 1.4 ** (step // 2) for step in range(12)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(2))
def test_the_attack_keeps_its_promises(dtype, seed):
    model, x = network(seed, dtype), pictures(dtype)
    labels = labelled(model, x)
    before, gradients = x.copy(), model.gradients.copy()
    adversarial, radius = wasserstein(model, x, labels, **FAST)
    fooled, at_once = np.isfinite(radius), own(model, x) != labels
    assert adversarial.dtype == dtype and adversarial.shape == x.shape and radius.shape == (N,)
    assert np.array_equal(x, before) and np.array_equal(model.gradients, gradients)
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert np.array_equal(own(model, adversarial) != labels, fooled)
    assert np.array_equal(adversarial[~fooled], x[~fooled]) and np.array_equal(adversarial[at_once], x[at_once])
    assert np.all(radius[at_once] == 0.01) and at_once.sum() == 2
    assert set(radius[fooled]) <= set(RADII)
    assert 2 < fooled.sum() < N and len(set(radius)) > 4  # else there was nothing to see
    mass, before = adversarial.astype(float).sum((1, 2)), x.astype(float).sum((1, 2))
    assert np.all(mass <= before * (1 + 1e-6))  # clipping takes, and nothing gives
    for i in np.flatnonzero(fooled & np.all(mass > before * (1 - 1e-6), 1)):
        a, b = x[i].astype(float), adversarial[i].astype(float)
        b *= a.sum((0, 1)) / b.sum((0, 1))
        assert transport(a, b) / a.sum() <= radius[i] * (1 + 1e-4)


def test_the_radius_is_that_of_the_first_success_of_each_image():
    """Ended at any radius, the attack has fooled those, with those images, that it says to have fooled by then."""
    model, x = network(), pictures()
    labels = labelled(model, x)
    adversarial, radius = wasserstein(model, x, labels, **FAST)
    for steps in range(13):
        some, early = wasserstein(model, x, labels, **{**FAST, "steps": steps})
        by_then = np.isfinite(early)
        assert np.array_equal(early[by_then], radius[by_then]) and np.array_equal(some[by_then], adversarial[by_then])
        if steps % 2 == 0:  # whole phases
            assert np.array_equal(by_then, (radius <= (RADII[:steps] or [0])[-1]) | (own(model, x) != labels))
    for end in (0.005, 0.02, 0.05, 0.1):
        _, early = wasserstein(model, x, labels, **FAST, max_radius=end)
        assert np.array_equal(np.isfinite(early), (radius <= end) | (own(model, x) != labels))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_batch_size_and_the_others_decide_nothing(dtype):
    model, x = network(dtype=dtype), pictures(dtype)
    labels = labelled(model, x)
    adversarial, radius = wasserstein(model, x, labels, **FAST)
    for size in (N, 5, 1):
        again, same = wasserstein(model, x, labels, **FAST, batch_size=size, seed=size, ids=np.arange(N) + size)
        assert np.array_equal(again, adversarial) and np.array_equal(same, radius)
    some = [8, 2, 3]
    again, same = wasserstein(model, x[some], labels[some], **FAST)
    assert np.array_equal(again, adversarial[some]) and np.array_equal(same, radius[some])


def test_the_schedule_is_the_papers(monkeypatch):
    """A network that cannot be fooled sees all of it: 0.001 x 1.17^phase, 400 steps; 300 of them are up to 0.1."""
    model = network(shape=(1, 2, 1))
    model.weights[...] = 0
    x, seen = pictures(shape=(1, 2, 1), n=2), []

    def spy(x0, y, radius, **options):
        seen.append((radius, options["regularization"]))
        return project(x0, y, radius, **options)

    monkeypatch.setattr(module, "project", spy)
    adversarial, radius = wasserstein(model, x, np.zeros(2, int))
    assert np.all(np.isinf(radius)) and np.array_equal(adversarial, x)
    wanted = [(pytest.approx(0.001 * 1.17**phase), 3000) for phase in range(40) for _ in range(10)]
    assert seen == wanted
    seen.clear()
    wasserstein(model, x, np.zeros(2, int), max_radius=0.1)
    assert seen == wanted[:300]
    seen.clear()
    assert np.all(wasserstein(model, x, np.ones(2, int))[1] == 0.001)  # wrong to begin with: no step at all
    assert not seen


def test_each_step_goes_along_the_sign_of_the_gradient_from_where_the_last_one_led(monkeypatch):
    model, x = network(dtype=np.float64), pictures(np.float64)
    labels, path = own(model, x), []

    def spy(x0, y, radius, **options):
        found = project(x0, y, radius, **options)
        path.append((x0, y, np.clip(found.images, 0, 1)))
        return found

    monkeypatch.setattr(module, "project", spy)
    wasserstein(model, x[:1], labels[:1], steps=5, step_size=0.07)
    assert len(path) == 5
    current = x[:1]
    for x0, y, after in path:
        assert np.array_equal(x0, x[:1])
        assert set(np.round(abs(y - current), 12).ravel()) <= {0.07, 0.0}
        h = 1e-6
        for index in ((0, 0, 0, 0), (0, 3, 1, 2), (0, 2, 2, 1)):  # the loss of the label grows that way
            bump = np.zeros_like(current)
            bump[index] = h
            slope = [model.forward(current + s * bump)[0][0] for s in (1, -1)]
            loss = [np.log(np.exp(z - z[labels[0]]).sum()) for z in slope]
            assert np.sign(loss[0] - loss[1]) == np.sign((y - current)[index])
        current = after


def test_the_radius_of_a_flip_that_is_known():
    """Two pixels that hold 0.6 and 0.4 of the mass, and a network that asks which holds more: a tenth has to move."""
    for distance in (1, 2):
        model = models.mlp((distance + 1, 2), input_shape=(1, distance + 1, 1)).astype(np.float64)
        weight = model.children["fc1"].params["weight"]
        weight[...] = 0
        weight[0], weight[-1] = [1, -1], [-1, 1]
        model.children["fc1"].params["bias"][...] = 0
        x = np.zeros((1, 1, distance + 1, 1))
        x[0, 0, 0], x[0, 0, -1] = 0.6, 0.4
        options = dict(start=0.01, factor=1.05, every=5, steps=600)
        _, radius = wasserstein(model, x, np.array([0]), regularization=1000, **options)
        # over two pixels it is cheaper to move 0.2 by one pixel each (cost 0.2) than 0.1 by two (cost 0.4)
        assert 0.1 * distance <= radius[0] <= 0.1 * distance * 1.15
        _, blurred = wasserstein(model, x, np.array([0]), regularization=30, **options)
        assert blurred[0] >= 0.1 * distance


def test_progress_counts_images_and_survivors():
    model, x = network(), pictures()
    labels, said = labelled(model, x), []
    _, radius = wasserstein(model, x, labels, **FAST, batch_size=5, progress=lambda *numbers: said.append(numbers))
    assert said == [(n, int(np.isinf(radius[:n]).sum())) for n in (5, 10, 12)]
    nothing = wasserstein(model, x[:0], labels[:0], **FAST)
    assert len(nothing[0]) == len(nothing[1]) == 0


@pytest.mark.parametrize(
    "change", [{"start": 0}, {"factor": -1}, {"every": 0}, {"steps": -1}, {"step_size": np.inf}, {"regularization": 0},
               {"batch_size": 0}, {"x": 2}, {"x": np.nan}, {"labels": 3}]
)  # fmt: skip
def test_what_makes_no_sense_is_refused(change):
    model, x = network(), pictures()
    labels = own(model, x)
    if "x" in change:
        x[0, 0, 0, 0] = change.pop("x")
    if "labels" in change:
        labels[1] = change.pop("labels")
    with pytest.raises(ValueError):
        wasserstein(model, x, labels, **{**FAST, **change})
