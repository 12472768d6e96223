"""Cases of any box and rows, and proofs that cut the box: against fractions, and proofs that are none."""

import numpy as np
import pytest
from hypothesis import given
from test_certificate import (
    NETWORKS,
    changed,
    corners_and_points,
    exact,
    forward,
    randomise,
    rational,
    read,
    replaced,
    tiny,
)
from test_split import hard

from nanomr.layers import Flatten, Linear, ReLU
from nanomr.models import Model
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds import crown
from nanomr.verify.chain import Chain
from nanomr.verify.exact.bab import branch_and_bound
from nanomr.verify.exact.split import search
from nanomr.verify.proofs import boxes, checker
from nanomr.verify.proofs.network import CertificateError, read_network

RELUS = 11  # of ``tiny``


def box(draw, inputs=8, widest=1.0):
    low = draw.uniform(-1, 1, inputs)
    return low, low + draw.uniform(0, widest, inputs)


def case(draw, classes=3):
    rows = int(draw.integers(1, 4))
    return draw.normal(0, 1, (rows, classes)), draw.normal(0, 0.3, rows)


def random_parts(draw, low, high, rows, relus=RELUS, size=15):
    """The arrays of a tree of boxes with any weights and slopes."""
    parent, split, cut, ends, node = [-1], [0], [0.0], [(low, high)], 0
    while node < len(parent):
        if len(parent) < size and (node == 0 or draw.random() < 0.8):
            d = int(draw.integers(len(low)))
            lower, upper = ends[node]
            at = float(np.clip(draw.uniform(lower[d], upper[d]), lower[d], upper[d]))
            for sign in draw.permutation([1, -1]).tolist():
                parent, split, cut = [*parent, node], [*split, sign * (d + 1)], [*cut, at]
                new = [lower.copy(), upper.copy()]
                new[0 if sign > 0 else 1][d] = at
                ends.append(tuple(new))
        node += 1
    leaves = len(parent) - len(set(parent[1:]))
    weights = draw.random((leaves, rows)) * (draw.random((leaves, rows)) < 0.7)
    weights[weights.sum(1) == 0] = 1
    sizes = draw.integers(0, 4, leaves)
    return {
        "parent": np.array(parent, np.int32),
        "split": np.array(split, np.int32),
        "cut": np.array(cut),
        "weights": weights.astype(np.float32),
        "slope_start": np.append(0, np.cumsum(sizes)).astype(np.int32),
        "slope_unit": draw.integers(0, relus, sizes.sum()).astype(np.int32),
        "slope_value": draw.random(sizes.sum()).astype(np.float32),
    }


def plain_slopes(proof):
    """The proof, with the slopes that every leaf has anyway."""
    none = {"slope_unit": np.zeros(0, np.int32), "slope_value": np.zeros(0, np.float32)}
    return proof | none | {"slope_start": 0 * proof["slope_start"]}


def exact_values(maps, points, rows, offsets):
    """The largest of rows . logits + offsets at each point, in fractions."""
    return [(exact(rows) @ forward(maps, x)[-1] + exact(offsets)).max() for x in points]


# --- in exact arithmetic ----------------------------------------------------------------------------------------------


@fewer(1)
@given(seeds)
def test_no_image_is_below_a_case(tmp_path_factory, seed):
    draw = np.random.default_rng(seed)
    model = tiny(draw)
    network, maps = read(model, tmp_path_factory.mktemp("m")), rational(model)
    low, high = box(draw, widest=10 ** draw.uniform(-3, 0.5))
    rows, offsets = case(draw)
    values = exact_values(maps, corners_and_points(low, high, draw), rows, offsets)
    plain = checker.check_case(network, low, high, rows, offsets)
    assert all(plain.bound <= v for v in values)
    for _ in range(4):
        proof = random_parts(draw, low, high, len(rows))
        found = checker.check_case(network, low, high, rows, offsets, proof)
        assert found.bound > -1e6 and all(found.bound <= v for v in values)


def cancelling(draw, folder):
    """A network whose sums lose digits; one point, rows and offsets."""
    model = tiny(draw)
    weight = model.children["fc1"].params["weight"]
    weight[4:] = -weight[:4] * (1000 + draw.uniform(0, 1, weight[:4].shape).astype(np.float32))
    weight[:4] *= 1000
    return read(model, folder), rational(model), draw.uniform(0, 1, 8)


@fewer(1)
@given(seeds)
def test_rounding_errors_of_parts_are_covered(tmp_path_factory, seed):
    """At one image, without a box's width to hide behind."""
    draw = np.random.default_rng(seed)
    network, maps, x = cancelling(draw, tmp_path_factory.mktemp("m"))
    rows, offsets = case(draw)
    for m in range(len(rows)):
        proof = plain_slopes(random_parts(draw, x, x, 1, size=1))
        (value,) = exact_values(maps, [x], rows[[m]], offsets[[m]])
        for found in (proof, None):
            bound = checker.check_case(network, x, x, rows[[m]], offsets[[m]], found).bound
            assert bound <= value <= bound + 1e-7


def test_rounding_errors_would_matter(tmp_path):
    """The same without the terms that cover them: some bound is above the truth."""
    wrong = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        network, maps, x = cancelling(draw, tmp_path)
        rows, offsets = case(draw)
        proof, whole = (
            plain_slopes(random_parts(draw, x, x, 1, size=1)),
            checker._with_rows(network, rows[:1], offsets[:1]),
        )
        whole = whole._replace(slack=0.0)
        bound = boxes.bound_of_parts(whole, checker.reach(whole, x.copy(), x.copy()), proof)
        wrong += bound > exact_values(maps, [x], rows[:1], offsets[:1])[0]
    assert wrong > 0


def test_one_part_is_at_least_crown(rng, tmp_path):
    """A tree of one leaf, of one row: not worse than the plain bound."""
    for _ in range(10):
        network, (low, high) = read(tiny(rng), tmp_path), box(rng)
        rows, offsets = case(rng)
        proof = plain_slopes(random_parts(rng, low, high, 1, size=1))
        plain = checker.check_case(network, low, high, rows[:1], offsets[:1]).bound
        assert checker.check_case(network, low, high, rows[:1], offsets[:1], proof).bound >= plain - 1e-9


@pytest.mark.parametrize("chunk", [1, 2**18])
def test_parts_are_bounded_by_themselves(chunk, rng, tmp_path, monkeypatch):
    """The bound of a tree is the least of its leaves' as trees of their own, whatever is bounded at once."""
    monkeypatch.setattr(boxes, "CHUNK", chunk)
    network, (low, high) = read(tiny(rng), tmp_path), box(rng)
    rows, offsets = case(rng)
    while len((proof := random_parts(rng, low, high, len(rows)))["weights"]) < 5:
        pass
    parts = boxes.read_parts(low, high, len(rows), RELUS, proof)
    alone = []
    for i in range(len(parts.weights)):
        ends = low.copy(), high.copy()
        ends[0][parts.cut], ends[1][parts.cut] = parts.low[i], parts.high[i]
        own = slice(parts.start[i], parts.start[i + 1])
        leaf = {
            "parent": np.array([-1]), "split": np.array([0]), "cut": np.zeros(1), "weights": parts.weights[[i]],
            "slope_start": np.array([0, own.stop - own.start]), "slope_unit": parts.units[own],
            "slope_value": parts.slopes[own],
        }  # fmt: skip
        alone.append(checker.check_case(network, *ends, rows, offsets, leaf).bound)
    whole = checker.check_case(network, low, high, rows, offsets, proof).bound
    assert whole >= min(alone) - 1e-9  # the whole box's bounds help a part, at times
    assert whole <= max(alone) + 1e-9


# --- trees of ReLUs, with an offset -----------------------------------------------------------------------------------


def test_a_tree_of_a_row_with_an_offset(rng, tmp_path):
    """The verifier's proof that row . logits > -offset, in a box that is no ball."""
    found = 0
    for _ in range(20):
        model = tiny(rng)
        network, chain, (low, high) = read(model, tmp_path), Chain(model), box(rng)
        rows, _ = case(rng)
        shape = (1, *model.input_shape)
        relus = crown.crown(chain, low.reshape(shape), high.reshape(shape))
        points = rng.uniform(low, high, (500, 8)).reshape(-1, *model.input_shape)
        plain = checker.check_case(network, low, high, rows[:1], np.zeros(1)).bound
        true = (chain.forward(points)[0] @ rows[0]).min()
        offsets = np.append(-(plain + 0.3 * (true - plain)), rng.normal(0, 1, len(rows) - 1) - 100)
        tree = branch_and_bound(chain, low.reshape(shape), high.reshape(shape), relus, rows[0], threshold=-offsets[0])
        if tree.status == "proved":
            found += 1
            assert not checker.check_case(network, low, high, rows, offsets).bound > 0
            assert checker.check_case(network, low, high, rows, offsets, tree.proof, 0).bound > 0
            worse = offsets - (true - plain)
            assert not checker.check_case(network, low, high, rows, worse, tree.proof, 0).bound > 0
            with pytest.raises(CertificateError, match="of which row"):
                checker.check_case(network, low, high, rows, offsets, tree.proof)
    assert found >= 5


# --- proofs that are none ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proved(tmp_path_factory):
    """(network, low, high, rows, offsets, proof): one that is accepted, of many parts."""
    model, _, (low, high, rows, offsets), threshold, tree = hard(np.random.default_rng(3))
    network = read(model, tmp_path_factory.mktemp("m"))
    assert checker.check_case(network, low, high, rows, offsets - threshold, tree.proof).bound > 0
    return network, low, high, rows, offsets - threshold, tree.proof


def without(proof, node):
    """Without that node, which is a leaf: those behind it move up."""
    parent = np.delete(proof["parent"], node)
    proof["parent"] = np.where(parent > node, parent - 1, parent).astype(np.int32)
    leaves = np.flatnonzero(np.bincount(proof["parent"][1:], minlength=len(parent) + 1) == 0)
    for name in ("split", "cut"):
        proof[name] = np.delete(proof[name], node)
    at = int(np.searchsorted(leaves, node))
    start = proof["slope_start"]
    own = slice(start[at], start[at + 1])
    for name in ("slope_unit", "slope_value"):
        proof[name] = np.delete(proof[name], own)
    proof["slope_start"] = np.append(start[: at + 1], start[at + 2 :] - (own.stop - own.start)).astype(np.int32)
    proof["weights"] = np.delete(proof["weights"], at, 0)


def first_leaf(proof):
    return int(np.flatnonzero(np.bincount(proof["parent"][1:], minlength=len(proof["parent"])) == 0)[0])


FAULTS = {
    "a missing leaf": (lambda p: without(p, first_leaf(p)), "do not cover"),
    "overlapping cuts": (changed("cut", 1, lambda v: v[1] + 1e-9), "do not cover"),
    "the same side twice": (changed("split", 1, lambda v: -v[1]), "do not cover"),
    "cut along two inputs": (changed("split", 1, lambda v: v[1] % 4 + 1), "do not cover"),
    "a cut outside": (changed("cut", [1, 2], 1e3), "outside"),
    "a cut that is NaN": (changed("cut", [1, 2], np.nan), "cover|outside"),
    "an infinite cut": (changed("cut", [1, 2], np.inf), "outside"),
    "no such input": (changed("split", [1, 2], [99, -99]), "no such input"),
    "the least integer": (changed("split", 1, -(2**31)), "no such input"),
    "no input": (changed("split", [1, 2], 0), "no such input"),
    "a parent behind its child": (changed("parent", 1, 5), "not a tree"),
    "a parent before the first": (changed("parent", 1, -1), "not a tree"),
    "an overflow": (replaced("parent", by=lambda v: v.astype(np.int64) + (np.arange(len(v)) == 1) * 2**62), "a tree"),
    "two roots": (changed("split", 0, 1), "not a tree"),
    "three children": (changed("parent", 5, 0), "do not cover|outside"),
    "a weight below 0": (changed("weights", (0, 0), -1e-3), "weight"),
    "a weight that is NaN": (changed("weights", (0, 0), np.nan), "weight"),
    "an infinite weight": (changed("weights", (0, 0), np.inf), "weight"),
    "no weight": (changed("weights", 0, 0), "weight"),
    "weights of fewer rows": (replaced("weights", by=lambda v: v[:, :-1]), "weights"),
    "weights of more parts": (replaced("weights", by=lambda v: np.concatenate([v, v[:1]])), "weights"),
    "a slope above 1": (changed("slope_value", 0, 1.5), "slope"),
    "a slope below 0": (changed("slope_value", 0, -0.1), "slope"),
    "a slope that is NaN": (changed("slope_value", 0, np.nan), "slope"),
    "no such ReLU": (changed("slope_unit", 0, 10**6), "no such ReLU"),
    "a ReLU below 0": (changed("slope_unit", 0, -1), "no such ReLU"),
    "slopes that end early": (changed("slope_start", -1, 0), "slopes"),
    "slopes that go back": (changed("slope_start", 1, 10**6), "slopes"),
    "an array too few": (lambda p: p.pop("weights"), "must hold"),
    "an array too many": (lambda p: p.update(more=np.zeros(1)), "must hold"),
    "integers that are floats": (replaced("parent", by=lambda v: v.astype(float)), "integers"),
    "floats that are integers": (replaced("cut", by=lambda v: v.astype(int)), "floats"),
    "nothing at all": (replaced("parent", "split", "cut", by=lambda v: v[:0]), "shapes"),
    "another length": (replaced("cut", by=lambda v: v[:-1]), "shapes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_proof_is_refused(fault, proved):
    *ask, proof = proved
    change, message = FAULTS[fault]
    proof = {name: value.copy() for name, value in proof.items()}
    change(proof)
    with pytest.raises(CertificateError, match=message):
        checker.check_case(*ask, proof)


def test_one_number_changed_is_refused_or_harmless(rng, tmp_path):
    """Whatever number of a proof is another: no bound is above the truth. The network is one with another's name."""
    model, _, (low, high, rows, offsets), threshold, tree = hard(rng, (4, 6, 5, 3))
    network, maps, offsets = read(model, tmp_path), rational(model), offsets - threshold
    points = corners_and_points(low.ravel(), high.ravel(), rng, 30)
    least, outcomes = min(exact_values(maps, points, rows, offsets)), [0, 0]
    for _ in range(150):
        proof = {name: value.copy() for name, value in tree.proof.items()}
        name = rng.choice([n for n in proof if proof[n].size])
        numbers = proof[name].reshape(-1)
        at = rng.integers(numbers.size)
        other = rng.choice(numbers) if rng.integers(2) else rng.choice([-(2.0**31), -2, -1, 0, 1, 2, 7, 1e3])
        numbers[at] = other
        try:
            found = checker.check_case(network, low, high, rows, offsets, proof).bound
        except CertificateError:
            outcomes[0] += 1
            continue
        outcomes[1] += 1
        assert found <= least
    assert min(outcomes) > 10


def test_another_network_is_not_proved(proved, tmp_path, rng):
    """A proof is one of its network, box, rows: with others its bound is another."""
    network, low, high, rows, offsets, proof = proved
    bound = checker.check_case(*proved).bound
    assert checker.check_case(network, low, high, rows, offsets - 2 * bound - 1, proof).bound < 0
    assert not checker.check_case(network, low - 1, high + 1, rows, offsets, proof).bound > 0
    assert not checker.check_case(network, low, high, -rows, offsets, proof).bound > 0


def test_a_case_that_is_none(proved):
    network, low, high, rows, offsets, _ = proved
    for change, message in (
        ({"low": high + 1}, "empty"),
        ({"low": np.full_like(low, np.nan)}, "empty"),
        ({"high": np.full_like(high, np.inf)}, "not finite"),
        ({"low": low.ravel()[:-1]}, "inputs"),
        ({"rows": rows[:, :-1]}, "do not fit"),
        ({"rows": rows * np.nan}, "not finite"),
        ({"offsets": offsets[:-1]}, "do not fit"),
        ({"offsets": offsets + np.inf}, "not finite"),
        ({"row": len(rows)}, "no row"),
        ({"row": -1}, "no row"),
        ({"row": True}, "no row"),
        ({"high": high + 1e40}, "too large"),
    ):
        ask = {"low": low, "high": high, "rows": rows, "offsets": offsets} | change
        with pytest.raises(CertificateError, match=message):
            checker.check_case(network, **ask)


def test_a_network_that_begins_with_a_relu(tmp_path, rng):
    children = {"relu0": ReLU(), "flatten": Flatten(), "fc1": Linear(3, 8), "relu1": ReLU(), "fc2": Linear(8, 3)}
    model = randomise(Model(children, "own", (1, 1, 3)), rng)
    network, chain, (low, high) = read(model, tmp_path), Chain(model), box(rng, 3)
    rows, offsets = case(rng)
    values = (chain.forward(rng.uniform(low, high, (500, 1, 1, 3)))[0] @ rows.T + offsets).max(1)
    tree = search(chain, low.reshape(1, 1, 1, 3), high.reshape(1, 1, 1, 3), rows, offsets, threshold=values.min() - 0.1)
    assert tree.status == "proved"
    for proof in (tree.proof, *(random_parts(rng, low, high, len(rows)) for _ in range(5))):
        assert -1e6 < checker.check_case(network, low, high, rows, offsets, proof).bound <= values.min()
    assert checker.check_case(network, low, high, rows, offsets - values.min() + 0.1, tree.proof).bound > 0


def test_a_network_of_any_layers(tmp_path, rng):
    """What the verifier's chains may be: convolutions, pooling, batch norms, no normalisation, Flatten anywhere."""
    for name in ("own", "mlp", "mlp, batch norm", "linear"):
        model = randomise(NETWORKS[name](), rng)
        model.save(tmp_path / "model.safetensors")
        network, chain = read_network(tmp_path), Chain(model)
        low = rng.uniform(-1, 2, model.input_shape)
        high = low + 0.02
        rows, offsets = rng.normal(0, 1, (2, chain.classes)), rng.normal(0, 1, 2)
        found = checker.check_case(network, low, high, rows, offsets)
        points = rng.uniform(low, high, (50, *model.input_shape))
        assert found.bound <= (chain.forward(points)[0] @ rows.T + offsets).max(1).min(), name
        if name == "linear":
            parts = plain_slopes(random_parts(rng, low.ravel(), high.ravel(), 2, 1))
        else:
            parts = random_parts(rng, low.ravel(), high.ravel(), 2, RELUS, size=5)
        found = checker.check_case(network, low, high, rows, offsets, parts)
        assert -1e6 < found.bound <= (chain.forward(points)[0] @ rows.T + offsets).max(1).min(), name
