"""The scripts behind docs/claims.md, against sums, formulas and enumerations that are written out here."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

import nanomr as mr
from nanomr.layers import Conv2d, Flatten, Linear, ReLU

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "claims"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


laplacian, sparsity, convexity = map(script, ("laplacian", "sparsity", "convexity"))


def test_the_operator_is_the_sum_of_appendix_a(rng):
    points, x, s = rng.normal(size=(7, 3)), rng.normal(size=(2, 3)), 0.7
    expected = [np.mean([np.exp(-((a - p) ** 2).sum() / s) * (a[0] - p[0]) for p in points]) for a in x]
    np.testing.assert_allclose(laplacian.operator(points, x, s, chunk=3), expected, rtol=1e-12)


@pytest.mark.parametrize("name", laplacian.MANIFOLDS)
def test_the_operator_tends_to_laplace_beltrami(name, rng):
    """With 400,000 samples and s = 0.1; the eigenvalue, the volume and the dimension are all in it."""
    draw, d, volume, eigenvalue = laplacian.MANIFOLDS[name]
    points, x, s = draw(rng, 400_000), draw(rng, 50), 0.1
    found = 4 * volume / (s * (np.pi * s) ** (d / 2)) * laplacian.operator(points, x, s)
    assert laplacian.error(found, eigenvalue * x[:, 0]) < 0.2
    assert laplacian.error(found, (eigenvalue + 1) * x[:, 0]) > 0.25


def test_perturbations_fill_the_ball(rng):
    points = laplacian.in_ball(rng, 20_000, 5, 0.3)
    lengths = np.linalg.norm(points, axis=1)
    assert lengths.max() <= 0.3 and abs((lengths < 0.3 * 0.5 ** (1 / 5)).mean() - 0.5) < 0.02
    np.testing.assert_allclose(points.var(0), 0.3**2 / 7, rtol=0.05)
    cloud = laplacian.resampled(rng, np.eye(3), 0.1, 4)
    np.testing.assert_array_less(np.linalg.norm(cloud - np.repeat(np.eye(3), 4, 0), axis=1), 0.1)


def test_the_factor_is_the_predicted_one():
    rows = laplacian.medians([laplacian.fixed(20_000, 50, seed) for seed in range(3)])
    assert [r["ratio"] for r in rows] == [0.01, 0.1, 0.25, 0.5, 0.99]
    for row in rows:
        assert abs(row["factor"] - row["predicted"]) < 0.03, row


def test_edges_kept_by_their_weight_are_unbiased_and_dropped_ones_are_not():
    found = laplacian.sparsified(60, 0, draws=300)
    assert abs(found["standard_errors"]) < 4 and abs(found["mean_over_exact"] - 1) < 0.1
    assert found["kept_above"]["0.37"] < found["kept_above"]["0.1"] < 0.95


def test_nearest_neighbours_and_their_weights(rng):
    images, ids, scales = rng.random((9, 12), np.float32), np.array([2, 5, 8]), np.array([0.5, 4.0])
    least, which, mass = sparsity.nearest(images[ids], images, ids, scales)
    for row, i in enumerate(ids):
        squares = np.array([((images[i] - images[j]) ** 2).sum() if j != i else np.inf for j in range(9)])
        assert which[row] == squares.argmin()
        np.testing.assert_allclose(least[row] ** 2, squares.min(), rtol=1e-5)
        np.testing.assert_allclose(mass[row], [np.exp(-squares / s).sum() for s in scales], rtol=1e-4)


def test_far_images_leave_the_short_edges_all_the_weight(rng):
    """And copies of one image leave them one part in 2 (n - 1) + 1, but for what the perturbations add."""
    far = np.zeros((6, 4, 4, 3), np.uint8)
    far[np.arange(6), np.arange(6) % 4, np.arange(6) // 4] = 255
    labels = np.arange(6)
    found = sparsity.measure(far, labels, 6, 0)
    assert found["nearer_than_short_edge"] == 0 and found["boxes_that_meet_the_nearest"] == 0
    assert found["kept_share"][0] > 0.99 and found["short_edge"] == pytest.approx(16 / 255 * 48**0.5)
    same = sparsity.measure(np.zeros((6, 4, 4, 3), np.uint8), labels // 6, 6, 0)
    assert same["nearer_than_short_edge"] == same["of_these_with_the_same_label"] == 6
    short = np.array(same["short_weight"])
    np.testing.assert_allclose(same["kept_share"], 2 * short / (2 * short + 4 * 5 * short**0.5), rtol=1e-6)


def tiny(rng):
    """Two ReLU layers over two pixels, of which a grid sees all."""
    layers = {
        "conv": Conv2d(1, 3, 1), "relu1": ReLU(), "flatten": Flatten(), "fc": Linear(6, 5), "relu2": ReLU(),
        "out": Linear(5, 2),
    }  # fmt: skip
    model = mr.models.Model(layers, input_shape=(1, 2, 1))
    model.weights[...] = rng.normal(size=model.weights.shape)
    for name in ("conv", "fc"):  # the ReLUs bend near the middle of the box
        model.children[name].params["bias"][...] *= convexity.EPS
    return model


@pytest.mark.parametrize("seed", range(6))
def test_which_relus_switch_in_the_box(seed):
    rng = np.random.default_rng(seed)
    model, x = tiny(rng), rng.uniform(-0.02, 0.02, (1, 2, 1)).astype(np.float32)
    side = np.linspace(-convexity.EPS, convexity.EPS, 201, dtype=np.float32)
    grid = x + np.array(list(itertools.product(side, side)), np.float32).reshape(-1, 1, 2, 1)
    bits = [b.reshape(len(b), -1) for b in mr.manifold.hamming_embedding(model, grid)]
    expected = [(b.any(0) & ~b.all(0)).astype(int) for b in bits]
    chains = convexity.prefixes(model)
    nothing = [np.zeros(len(e), bool) for e in expected]
    for found, truth in zip(convexity.switching(chains, x, nothing, 5.0), expected, strict=True):
        assert found.tolist() == truth.tolist()
    seen = convexity.seen_by_corners(model, x, (1, 40), seed)
    for one, many, truth in zip(*seen, expected, strict=True):
        assert (one <= many).all() and (many <= truth.astype(bool)).all()


def test_sums_over_images():
    records = [
        {"switch": [0, 0], "undecided": [0, 1], "seen": {str(n): [0, 0] for n in convexity.PAIRS}},
        {"switch": [3, 1], "undecided": [0, 0], "seen": {str(n): [0, 0] for n in convexity.PAIRS}},
        {"switch": [2, 2], "undecided": [0, 0], "seen": {str(n): [1, 1] for n in convexity.PAIRS}},
    ]
    found = convexity.summary(records)
    assert found["images"] == 3 and found["switch"] == [5, 3] and found["undecided"] == [0, 1]
    assert found["seen"]["10"] == {"by_layer": [1, 1], "share": 0.25, "agree": 2, "of_these_hide_one": 1}


def test_the_counterexample_of_the_page():
    a, b = convexity.COUNTEREXAMPLE
    on = {p: a @ p + b > 0 for p in itertools.product((0, 0.5, 1), repeat=2)}
    corners = [on[p] for p in on if 0.5 not in p]
    assert max((p != q).sum() for p in corners for q in corners) == 2 and (on[0.5, 0] != on[0.5, 1]).sum() == 4
