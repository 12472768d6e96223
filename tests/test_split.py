"""Proofs by cutting the input: brute force over ReLU patterns, and the checker on everything that is found."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from scipy import optimize
from test_certificate import randomise, read

from nanomr import models
from nanomr.layers import Conv2d, Flatten, Linear, ReLU
from nanomr.models import Model
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.chain import Chain
from nanomr.verify.exact import split
from nanomr.verify.proofs.boxes import ARRAYS
from nanomr.verify.proofs.checker import check_case
from nanomr.verify.proofs.network import CertificateError

GAP = 1e-3  # of thresholds from the least value of brute force


def network(draw, sizes=(3, 4, 3, 3)):
    return randomise(models.mlp(sizes, seed=int(draw.integers(1 << 30)), input_shape=(1, 1, sizes[0])), draw, 1.5)


def convolutions(draw):
    """2x2 pixels, two layers of ReLUs."""
    children = {"conv": Conv2d(1, 2, 2, 1, 0), "relu1": ReLU(), "flatten": Flatten(), "fc1": Linear(2, 2)}
    children = {"first": Conv2d(1, 1, 1, 1, 0), "relu0": ReLU()} | children | {"relu2": ReLU(), "fc2": Linear(2, 3)}
    return randomise(Model(children, "own", (2, 2, 1)), draw, 1.5)


def question(draw, model, rows=None):
    """(low, high) (1, H, W, C), rows (M, 3), offsets (M,): not a ball, not in [0, 1]; perhaps an input is fixed."""
    shape = (1, *model.input_shape)
    low = draw.uniform(-2, 2, shape)
    width = draw.uniform(0.1, 2, shape) * (draw.random(shape) < 0.9)
    m = rows or int(draw.integers(1, 4))
    return low, low + width, draw.normal(0, 1, (m, 3)), draw.normal(0, 0.3, m)


def least(chain, low, high, rows, offsets):
    """The least of the largest of rows . logits + offsets in the box: a linear program for each pattern of ReLUs."""
    maps = []
    for stage in chain.stages:
        n = int(np.prod(stage.out_shape))
        maps.append((stage.transpose(np.eye(n).reshape(n, *stage.out_shape)).reshape(n, -1), stage.bias.ravel()))
    best, inputs = np.inf, low.size
    for pattern in itertools.product(*(itertools.product((0, 1), repeat=len(bias)) for _, bias in maps[:-1])):
        a, c, above, limit = np.eye(inputs), np.zeros(inputs), [], []
        for (weight, bias), on in zip(maps, [*pattern, None], strict=True):
            a, c = weight @ a, weight @ c + bias
            if on is not None:
                sign = 1 - 2 * np.array(on)  # z >= 0 where it is on
                above, limit = [*above, *(sign[:, None] * a)], [*limit, *(-sign * c)]
                a, c = a * np.array(on)[:, None], c * np.array(on)
        a, c = rows @ a, rows @ c + offsets
        matrix = np.vstack([np.hstack([a, -np.ones((len(a), 1))]), np.hstack([above, np.zeros((len(above), 1))])])
        found = optimize.linprog(
            np.append(np.zeros(inputs), 1), matrix, np.append(-c, limit),
            bounds=[*zip(low.ravel(), high.ravel(), strict=True), (None, None)],
        )  # fmt: skip
        if found.status == 0:
            best = min(best, found.fun)
    return best


def assert_shown(model, chain, ask, threshold, tree, folder):
    """What the search says is so: the checker confirms a proof, and a candidate is one."""
    low, high, rows, offsets = ask
    if tree.status == "proved":
        found = check_case(read(model, folder), low, high, rows, offsets - threshold, tree.proof)
        assert found.bound > 0 and found.bound >= tree.bound - threshold - 1e-9
    else:
        assert tree.status == "candidate"
        assert (low[0] <= tree.image).all() and (tree.image <= high[0]).all()
        assert (rows @ chain.forward(tree.image[None])[0][0] + offsets <= threshold).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("build", [network, convolutions])
def test_agrees_with_brute_force(seed, build, tmp_path):
    draw = np.random.default_rng(seed)
    model = build(draw)
    chain, ask = Chain(model), question(draw, model)
    true = least(chain, *ask)
    for threshold, status in ((true - GAP, "proved"), (true + GAP, "candidate")):
        tree = split.search(chain, *ask, threshold=threshold)
        assert tree.status == status
        assert_shown(model, chain, ask, threshold, tree, tmp_path)


@fewer(1)
@given(seeds)
def test_what_is_found_is_so(tmp_path_factory, seed):
    draw = np.random.default_rng(seed)
    model = network(draw, (5, 12, 10, 3))
    chain, ask = Chain(model), question(draw, model)
    points = draw.uniform(ask[0], ask[1], (500, *model.input_shape))
    values = (chain.forward(points)[0] @ ask[2].T + ask[3]).max(1)
    threshold = values.min() - draw.uniform(0, 0.3) * np.ptp(values)
    tree = split.search(chain, *ask, threshold=threshold, max_domains=20_000)
    if tree.status != "timeout":
        assert_shown(model, chain, ask, threshold, tree, tmp_path_factory.mktemp("m"))


def hard(draw, sizes=(4, 10, 10, 3)):
    """(model, chain, a question, a threshold): many parts are needed, with weights of several rows, and slopes."""
    while True:
        model = network(draw, sizes)
        chain, ask = Chain(model), question(draw, model, rows=3)
        points = draw.uniform(ask[0], ask[1], (2000, *model.input_shape))
        threshold = (chain.forward(points)[0] @ ask[2].T + ask[3]).max(1).min() - 0.05
        tree = split.search(chain, *ask, threshold=threshold, max_domains=5000)
        if tree.status == "proved" and tree.domains > 50:
            weights, slopes = tree.proof["weights"], tree.proof["slope_value"]
            if ((weights > 0) & (weights < 1)).any() and ((slopes > 0) & (slopes < 1)).any():
                return model, chain, ask, threshold, tree


def test_a_proof_has_its_arrays(rng, tmp_path):
    model, chain, ask, threshold, tree = hard(rng)
    assert set(tree.proof) == set(ARRAYS)
    assert len(tree.proof["parent"]) == tree.domains
    assert_shown(model, chain, ask, threshold, tree, tmp_path)
    found = check_case(read(model, tmp_path), *ask[:3], ask[3] - threshold, tree.proof)
    assert tree.bound - threshold - found.bound < 1e-9  # the checker's bounds are the search's


# --- planted bugs -----------------------------------------------------------------------------------------------------


def caught(model, ask, threshold, tree, folder):
    """Does the checker refuse what the search calls proved?"""
    assert tree.status == "proved"
    try:
        return not check_case(read(model, folder), *ask[:3], ask[3] - threshold, tree.proof).bound > 0
    except CertificateError:
        return True


def test_half_of_a_box_forgotten_is_caught(rng, tmp_path, monkeypatch):
    model, chain, ask, threshold, _ = hard(rng)
    cut = split._cut

    def half(*args):
        children = cut(*args)
        return split.Open(*(v[: len(v) // 2] for v in children))

    monkeypatch.setattr(split, "_cut", half)
    assert caught(model, ask, threshold, split.search(chain, *ask, threshold=threshold), tmp_path)


@pytest.mark.parametrize("wrong", ["bound", "weights", "slopes", "cut"])
def test_a_wrong_search_is_caught(wrong, rng, tmp_path, monkeypatch):
    """A bound's sign, weights of other rows, slopes of the wrong sign, children that overlap elsewhere."""
    model, chain, ask, threshold, _ = hard(rng)
    bounds, record = split._bounds, split.Leaves.split

    def planted(*args):
        found = bounds(*args)
        if wrong == "bound":
            return found._replace(bound=abs(found.bound) + 1)
        if wrong == "weights":
            return found._replace(weights=np.roll(found.weights, 1, 1))
        return found._replace(slopes=-found.slopes - 1e-3) if wrong == "slopes" else found

    monkeypatch.setattr(split, "_bounds", planted)
    if wrong == "cut":
        monkeypatch.setattr(split.Leaves, "split", lambda self, p, d, c: record(self, p, d, c + 0.5))
    assert caught(model, ask, threshold, split.search(chain, *ask, threshold=threshold), tmp_path)


# --- borders ----------------------------------------------------------------------------------------------------------


def test_a_point_is_a_box(rng, tmp_path):
    model = network(rng)
    chain, (low, _, rows, offsets) = Chain(model), question(rng, model, rows=2)
    value = (rows @ chain.forward(low)[0][0] + offsets).max()
    for threshold, status in ((value - 1e-6, "proved"), (value + 1e-6, "candidate")):
        tree = split.search(chain, low, low, rows, offsets, threshold=threshold)
        assert tree.status == status
        assert_shown(model, chain, (low, low, rows, offsets), threshold, tree, tmp_path)


def test_candidates_are_float32_numbers(rng):
    model = network(rng)
    low, high, rows, offsets = question(rng, model)
    high = low + 0.5  # there is one between the ends of every input
    tree = split.search(Chain(model), low, high, rows, offsets, threshold=1e3)
    assert tree.status == "candidate" and (tree.image == tree.image.astype(np.float32)).all()


def test_limits(rng):
    _, chain, ask, threshold, _ = hard(rng)
    assert split.search(chain, *ask, threshold=threshold, cpu_limit=0).status == "timeout"
    tree = split.search(chain, *ask, threshold=threshold, max_domains=20)
    assert tree.status == "timeout" and tree.proof is None and tree.domains < 60
    assert tree.bound <= least_of_samples(chain, ask, rng)


def least_of_samples(chain, ask, rng):
    points = rng.uniform(ask[0], ask[1], (500, *ask[0].shape[1:]))
    return (chain.forward(points)[0] @ ask[2].T + ask[3]).max(1).min()


def test_what_it_is_not_for(rng):
    model = network(rng)
    chain, (low, high, rows, offsets) = Chain(model), question(rng, model)
    with pytest.raises(ValueError, match="rows must be"):
        split.search(chain, low, high, rows[:, :2], offsets)
    with pytest.raises(ValueError, match="rows must be"):
        split.search(chain, low, high, rows, offsets[:, None])
    wide = Chain(models.mlp((20, 4, 3), input_shape=(1, 1, 20)))
    box = np.zeros((1, 1, 1, 20))
    assert not split.suits(wide, box, box + 1)
    with pytest.raises(ValueError, match="few of them"):
        split.search(wide, box, box + 1, rows, offsets)
    some = np.where(np.arange(20) < 3, 1.0, 0.0).reshape(box.shape)
    assert split.suits(wide, box, some)
    assert split.search(wide, box, some, np.zeros((1, 3)), np.ones(1)).status == "proved"
