"""The checker: its bounds hold in exact rational arithmetic, agree with the verifier's, and bad proofs are refused."""

import ast
import hashlib
import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import conv_net

from nanomr import checkpoint, models
from nanomr.layers import AveragePool2d, BatchNorm2d, Conv2d, Flatten, Linear, Normalize, ReLU, Sequential
from nanomr.models import Model
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds import crown, rounding
from nanomr.verify.chain import Chain
from nanomr.verify.exact.bab import branch_and_bound
from nanomr.verify.proofs import checker as certificate
from nanomr.verify.proofs import network as certificate_network
from nanomr.verify.proofs import results as certificate_results
from nanomr.verify.proofs.network import CertificateError, read_network

EPS, SEED = 0.05, 16  # the seed: of a network some of whose 30 images are robust, and some not
exact = np.frompyfunc(Fraction, 1, 1)  # float -> Fraction: no error


# --- networks ---------------------------------------------------------------------------------------------------------


def randomise(model, draw, weight=1.0):
    """Float32 weights and biases that make many ReLUs unstable, and statistics that do something."""
    for _, layer in model.walk():
        if isinstance(layer, BatchNorm2d):
            shape = layer.params["weight"].shape
            layer.params["weight"][...] = draw.uniform(0.5, 1.5, shape) * draw.choice([-1, 1], shape)
            layer.params["bias"][...] = draw.normal(0, 0.3, shape)
            layer.buffers["running_mean"][...] = draw.normal(0, 0.5, shape)
            layer.buffers["running_var"][...] = draw.uniform(0.1, 2, shape)
        elif isinstance(layer, Normalize):
            layer.buffers["mean"][...] = draw.uniform(0.2, 0.8, layer.buffers["mean"].shape)
            layer.buffers["std"][...] = draw.uniform(0.2, 0.5, layer.buffers["std"].shape)
        elif layer.params:
            layer.params["weight"] *= draw.uniform(0.8, 1.2, layer.params["weight"].shape) * weight
            if "bias" in layer.params:
                layer.params["bias"][...] = draw.normal(0, 0.2, layer.params["bias"].shape)
    return model


def with_batch_norms(model):
    """A batch norm ``bn<i>`` behind the i-th layer with weights, but for the last."""
    children, last = {}, list(model.children)[-1]
    for name, layer in model.children.items():
        children[name] = layer
        if layer.params and name != last:
            children[f"bn{sum(n.startswith('bn') for n in children) + 1}"] = BatchNorm2d(len(layer.params["bias"]))
    return Model(children, model.architecture, model.input_shape)


def tiny(draw, sizes=(8, 6, 5, 3), shape=(2, 2, 2)):
    return randomise(models.mlp(sizes, seed=int(draw.integers(1 << 30)), input_shape=shape), draw, 1.5)


def own():
    """What no builder makes: no normalisation, uneven padding, pooling, two ReLUs in a row, our order of pixels."""
    end = Sequential({"pool": AveragePool2d(2), "relu": ReLU(), "flatten": Flatten()})
    conv = Conv2d(3, 4, 3, 1, (0, 1, 1, 2), bias=False)
    children = {"conv": conv, "bn": BatchNorm2d(4, eps=0.1), "relu1": ReLU(), "relu2": ReLU(), "end": end}
    children |= {"fc1": Linear(24, 7), "relu3": ReLU(), "fc2": Linear(7, 4, bias=False), "relu4": ReLU()}
    return Model(children, "own", (5, 5, 3))


NETWORKS = {
    "own": own,
    "kernel 4": lambda: models.small_cnn(kernel=4, hidden=12, classes=4),
    "kernel 5": lambda: models.small_cnn(kernel=5, hidden=12, classes=4),
    "kernel 4, batch norm": lambda: with_batch_norms(models.small_cnn(kernel=4, hidden=9, classes=3)),
    "mlp": lambda: models.mlp((48, 30, 20, 15, 5), input_shape=(4, 4, 3)),
    "mlp, batch norm": lambda: with_batch_norms(models.mlp((48, 30, 20, 5), input_shape=(4, 4, 3))),
    "linear": lambda: models.mlp((48, 5), input_shape=(4, 4, 3)),
}


def read(model, folder):
    model.save(Path(folder) / "model.safetensors")
    return read_network(folder)


def rivals(network, label):
    return [t for t in range(len(network.maps[-1].bias)) if t != label]


def picture(model, draw):
    return draw.uniform(0, 1, model.input_shape).astype(np.float32)


# --- against the verifier ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_the_verifier(name, rng, tmp_path):
    model = randomise(NETWORKS[name](), rng)
    network, chain, image = read(model, tmp_path), Chain(model), picture(model, rng)
    label, eps = 1, 0.02
    low, high = crown.image_box(image[None], eps)
    relus = crown.crown(chain, low, high)
    others = rivals(network, label)
    rows = crown.margin_rows(np.full(len(others), label), np.array(others), chain.classes)
    theirs = crown.lower(
        chain, crown.Box.between(low, high), [crown.Lines.around(*r) for r in relus], rows, np.zeros(len(rows), int)
    )
    checked = certificate.check_image(network, image, label, eps)
    scale = max(1, abs(theirs.value).max())
    assert list(checked.bound) == others
    assert all(0 <= b - ours <= 1e-8 * scale for ours, b in zip(checked.bound.values(), theirs.value, strict=True))
    network = network._replace(slack=0.0)  # without the rounding terms: the same bounds
    ours = list(certificate.check_image(network, image, label, eps).bound.values())
    np.testing.assert_allclose(ours, theirs.value, rtol=0, atol=1e-12 * scale)
    reached = certificate.reach(network, *certificate._image_box(image, eps))
    mine = [r for r in reached if r.lines]
    assert len(mine) == len(relus)
    for r, (z_low, z_high) in zip(mine, relus, strict=True):
        for ours, bound in ((r.low, z_low), (r.high, z_high)):
            np.testing.assert_allclose(ours, bound.ravel(), rtol=0, atol=1e-12 * max(1, abs(bound).max()))
    unstable = sum(int(((a < 0) & (b > 0)).sum()) for a, b in relus)
    assert unstable >= 5 or name == "linear"


def four_leaves(draw, unstable, limit=None):
    """A proof of four leaves: one unstable ReLU is split, and then another in each half. A few slopes are of stable
    ReLUs. With a limit, the first leaf gets a restricted child (node 7)."""
    units = draw.permutation(np.flatnonzero(unstable))[: max(3, 3 * int(unstable.sum()) // 4)]
    units = np.append(units, draw.permutation(np.flatnonzero(~unstable))[:20]).astype(np.int32)
    a, b, c = 1 + units[:3]
    more = 0 if limit is None else 1
    signs = np.zeros((4 + more, len(units)), np.int8)
    signs[:, :3] = [[1, 1, 0], [1, -1, 0], [-1, 0, 1], [-1, 0, -1], [1, 1, 0]][: 4 + more]
    values = np.where(signs == 0, draw.uniform(0, 1, signs.shape), draw.uniform(0, 0.3, signs.shape))
    return {
        "units": units,
        "parent": np.array([-1, 0, 0, 1, 1, 2, 2, 3][: 7 + more], np.int32),
        "split": np.array([0, a, -a, b, -b, c, -c, 0][: 7 + more], np.int32),
        "signs": signs,
        "values": values.astype(np.float32),
        "multipliers": draw.uniform(0, 1, (more, 2, len(units))).astype(np.float32),
        "limit": np.array([np.inf if limit is None else limit]),
    }


@pytest.mark.parametrize("name", ["kernel 5", "mlp", "kernel 4, batch norm"])
def test_leaves_agree_with_the_verifier(name, rng, tmp_path):
    model = randomise(NETWORKS[name](), rng)
    network, chain, image = read(model, tmp_path)._replace(slack=0.0), Chain(model), picture(model, rng)
    low, high = crown.image_box(image[None], 0.02)
    relus = crown.crown(chain, low, high)
    flat = [np.concatenate([r[side].ravel() for r in relus]) for side in (0, 1)]
    proof = four_leaves(rng, (flat[0] < 0) & (flat[1] > 0))

    def layers(values):
        ends = np.cumsum([np.prod(s) for s in chain.relu_shapes])[:-1]
        return [v.reshape(1, *s) for v, s in zip(np.split(values, ends), chain.relu_shapes, strict=True)]

    row, values = crown.margin_rows([0], [2], chain.classes), []
    default = np.concatenate([crown.Lines.around(*r).lower.ravel() for r in relus])
    for sign, value in zip(proof["signs"], proof["values"], strict=True):
        z_low, z_high, slopes, forces = flat[0].copy(), flat[1].copy(), default.copy(), np.zeros_like(default)
        slopes[proof["units"]] = np.where(sign == 0, value, sign > 0)
        for unit, s, b in zip(proof["units"], sign, value, strict=True):
            if s:
                z_low[unit], z_high[unit] = (0, z_high[unit]) if s > 0 else (z_low[unit], 0)
                forces[unit] = -s * b
        lines = [crown.Lines.around(*r) for r in zip(layers(z_low), layers(z_high), strict=True)]
        lines = [line._replace(unstable=np.ones_like(line.unstable)) for line in lines]  # the slopes are given for all
        box = crown.Box.between(low, high)
        values.append(crown.lower(chain, box, lines, row, [0], layers(slopes), layers(forces)).value[0])
    plain = certificate.check_image(network, image, 0, 0.02).bound[2]
    reached = certificate.reach(network, *certificate._image_box(image, 0.02))
    ours = certificate._replay(network, reached, row, proof)
    assert abs(ours - min(values)) <= 1e-12 * max(1, abs(min(values)))
    assert len(set(values)) == 4
    assert certificate.check_image(network, image, 0, 0.02, {2: proof}).bound[2] == max(plain, ours)


@pytest.mark.parametrize("rounds", [0, 4])
@pytest.mark.parametrize("name", ["mlp", "mlp, batch norm"])
def test_the_verifiers_trees_are_proofs(name, rounds, rng, tmp_path):
    """Rounding errors included, though the two round differently: as little as 1e-9 may not turn a sign round."""
    model = randomise(NETWORKS[name](), rng)
    network, chain, eps, domains = read(model, tmp_path), Chain(model), 0.05, []
    for image, share in itertools.product([picture(model, rng) for _ in range(6)], (0.2, 0.35, 0.5)):
        low, high = crown.image_box(image[None], eps)
        relus, logits = crown.crown(chain, low, high), chain.forward(image[None])[0][0]
        for rival, bound in certificate.check_image(network, image, 0, eps).bound.items():
            threshold = bound + share * (logits[0] - logits[rival] - bound)
            tree = branch_and_bound(
                chain,
                low,
                high,
                relus,
                crown.margin_rows([0], [rival], chain.classes)[0],
                threshold=threshold,
                rounds=rounds,
                max_domains=100,
            )
            if tree.status == "proved":
                domains.append(tree.domains)
                found = certificate.check_image(network, image, 0, eps, {rival: tree.proof}).bound[rival]
                assert threshold < tree.bound <= found <= tree.bound + 1e-5 * (1 + abs(tree.bound))
    assert max(domains) >= 5


# --- in exact arithmetic ----------------------------------------------------------------------------------------------


def rational(model):
    """[(A, b)] of an mlp, the normalisation first, in fractions."""
    mean, std = (
        exact(np.resize(model.children["normalize"].buffers[n], math.prod(model.input_shape)).astype(float))
        for n in ("mean", "std")
    )
    maps = [(np.diag(1 / std), -mean / std)]
    for layer in model.children.values():
        if isinstance(layer, Linear):
            maps.append((exact(layer.params["weight"].T.astype(float)), exact(layer.params["bias"].astype(float))))
    return maps


def forward(maps, x):
    """Every map's output, exactly, for an image x (flat) of floats."""
    a, out = exact(np.asarray(x, float)), []
    for k, (weight, bias) in enumerate(maps):
        out.append(weight @ (np.maximum(a, 0) if k > 1 else a) + bias)
        a = out[-1]
    return out


def corners_and_points(low, high, draw, n=8):
    side = draw.integers(0, 2, (n, len(low)))
    return [*np.where(side, low, high), *np.clip(draw.uniform(low, high, (n, len(low))), low, high)]


@fewer(0.7)
@given(seeds, st.sampled_from([1e-3, 0.05, 0.3]))
def test_no_image_is_below_a_bound(tmp_path_factory, seed, eps):
    draw = np.random.default_rng(seed)
    model = tiny(draw)
    network, image, maps = read(model, tmp_path_factory.mktemp("m")), picture(model, draw), rational(model)
    box = certificate._image_box(image, eps)
    reached = certificate.reach(network, *box)
    unstable = np.concatenate([r.lines.offset > 0 for r in reached if r.lines])
    unstable[:3] = True  # a split of a stable ReLU is a fair one, too
    proof = four_leaves(draw, unstable)
    plain = certificate.check_image(network, image, 0, eps).bound
    leaves = {t: certificate._replay(network, reached, np.eye(3)[[0]] - np.eye(3)[[t]], proof) for t in (1, 2)}
    for x in corners_and_points(*box, draw):
        *inputs, logits = forward(maps, x)
        for r, z in zip(reached[2:], inputs[1:], strict=True):
            assert (exact(r.low) <= z).all() and (z <= exact(r.high)).all()
        for t in (1, 2):
            assert max(plain[t], leaves[t]) <= logits[0] - logits[t]


@fewer(0.7)
@given(seeds)
def test_bounds_are_never_worse_than_intervals(tmp_path_factory, seed):
    draw = np.random.default_rng(seed)
    model = tiny(draw, (8, 6, 6, 6, 3))
    network = read(model, tmp_path_factory.mktemp("m"))
    low, high = certificate._image_box(picture(model, draw), 0.4)
    reached = certificate.reach(network, low, high)
    for k, (weight, bias) in enumerate(rational(model)[:-1]):
        weight, bias = weight.astype(float), bias.astype(float)
        middle, width = weight @ (0.5 * (low + high)) + bias, abs(weight) @ (0.5 * (high - low))
        low, high = middle - width, middle + width
        r = reached[k + 1]
        assert (low <= r.low + 1e-9).all() and (r.high <= high + 1e-9).all()
        if k == 0:
            continue  # the normalisation: no ReLU
        low, high = np.maximum(low, 0), np.maximum(high, 0)


@fewer(0.7)
@given(seeds)
def test_rounding_errors_of_the_backward_pass_are_covered(tmp_path_factory, seed):
    """The same lines, carried back in fractions: never below the float64 result, and hardly above."""
    draw = np.random.default_rng(seed)
    model = tiny(draw)
    network, image, maps = read(model, tmp_path_factory.mktemp("m")), picture(model, draw), rational(model)
    box = certificate._image_box(image, 0.1)
    reached = certificate.reach(network, *box)
    row = np.eye(3)[0] - np.eye(3)[1]
    ours = certificate.lower(network, reached, row[None])[0]
    a, value = exact(row), Fraction(0)
    for (weight, bias), r in zip(reversed(maps), reversed(reached), strict=True):
        value += a @ bias
        a = a @ weight
        if r.lines:
            lower, upper, offset, _ = (exact(v) for v in r.lines)
            value += np.minimum(a, 0) @ offset
            a = np.where(a > 0, lower, upper) * a
    value += np.minimum(a * exact(box[0]), a * exact(box[1])).sum()
    assert ours <= value <= ours + 1e-11


@fewer(1)
@given(seeds)
def test_rounding_errors_at_one_image_are_covered(tmp_path_factory, seed):
    """Without a box's width to hide behind: each ReLU's input and each margin, between bounds 1e-10 apart or less.

    The layers' own cancellation makes float64 wrong: two images' worth of large weights of opposite signs.
    """
    draw = np.random.default_rng(seed)
    model = tiny(draw)
    weight = model.children["fc1"].params["weight"]  # (in, out)
    weight[4:] = -weight[:4] * (1000 + draw.uniform(0, 1, weight[:4].shape).astype(np.float32))
    weight[:4] *= 1000
    network, maps = read(model, tmp_path_factory.mktemp("m")), rational(model)
    x = picture(model, draw).astype(float).ravel()
    *inputs, logits = forward(maps, x)
    reached = certificate.reach(network, x, x.copy())
    for r, z in zip(reached[1:], inputs, strict=True):
        assert (exact(r.low) <= z).all() and (z <= exact(r.high)).all()
        assert (r.high - r.low <= 1e-8).all()
    row = np.eye(3)[[0]] - np.eye(3)[[2]]
    low, high = (certificate.lower(network, reached, row)[0], -certificate.lower(network, reached, -row)[0])
    assert low <= logits[0] - logits[2] <= high
    assert high - low <= 1e-8


# --- trees ------------------------------------------------------------------------------------------------------------


def ends(reached):
    """(low, high) of all ReLUs' inputs, in a row."""
    return (np.concatenate([r[side] for r in reached if r.lines]) for side in (0, 1))


def random_tree(draw, low, high, limit, size=16):
    """(proof, for each node the sides [(ReLU, sign)] that it is in): splits, restrictions, numbers, and signs where the
    splits above or the root's bounds allow them, at random."""
    units = draw.permutation(len(low))[: draw.integers(1, len(low) + 1)].astype(np.int32)
    parent, split, paths, signs, values, multipliers, node = [-1], [0], [()], [], [], [], 0
    stable = {u: 1 if low[u] >= 0 else -1 for u in range(len(low)) if low[u] >= 0 or high[u] <= 0}
    while node < len(parent):
        kind = draw.integers(0 if node else 1, 3) if len(parent) < size else 0  # a leaf, restricted, or split
        if kind < 2:
            given = np.array([(stable | dict(paths[node])).get(u, 0) for u in units])
            signs.append(given * draw.integers(0, 2, len(units)))
            values.append(np.where(signs[-1] == 0, draw.uniform(0, 1, len(units)), draw.exponential(0.2, len(units))))
        if kind == 1:
            parent, split, paths = [*parent, node], [*split, 0], [*paths, paths[node]]
            multipliers.append(10 ** draw.uniform(-3, 1, (2, len(units))) * (draw.uniform(0, 1, (2, len(units))) < 0.9))
        elif kind == 2:
            unit = int(draw.integers(len(low)))
            for sign in draw.permutation([1, -1]).tolist():
                parent, split = [*parent, node], [*split, sign * (unit + 1)]
                paths = [*paths, (*paths[node], (unit, sign))]
        node += 1
    arrays = {
        "units": units,
        "parent": np.array(parent, np.int32),
        "split": np.array(split, np.int32),
        "signs": np.array(signs, np.int8),
        "values": np.array(values, np.float32),
        "multipliers": np.array(multipliers, np.float32).reshape(-1, 2, len(units)),
        "limit": np.array([limit], np.float64),
    }
    return arrays, paths


def replay(network, reached, row, proof):
    """(the bound, {restricted node: its (low, high)})."""
    states, restrict = {}, certificate._restrict
    nodes = [n for n, s in enumerate(proof["split"]) if n and not s]

    def spy(network, reached, low, high, units, multipliers, *more):
        restrict(network, reached, low, high, units, multipliers, *more)
        rank = next(i for i, m in enumerate(proof["multipliers"]) if np.array_equal(m, multipliers))
        states[nodes[rank]] = low.copy(), high.copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "_restrict", spy)
        bound = certificate._replay(network, reached, row, proof)
    assert len(states) == len(nodes)
    return bound, states


def exact_points(maps, box, draw, n=12):
    """[(the inputs of all ReLUs, logits)] of images in the box, in fractions."""
    points = (forward(maps, x) for x in corners_and_points(*box, draw, n))
    return [(np.concatenate(inputs[1:]), logits) for *inputs, logits in points]


def assert_trees_hold_for_every_image(draw, folder, eps, share, trees):
    """No image is below a tree's bound, and none with margin <= limit is outside of a restricted node's bounds: of
    those that are on the sides of its splits. In fractions. ``trees(reached, limit)`` yields proofs and their paths."""
    model = tiny(draw)
    network, image, maps = read(model, folder), picture(model, draw), rational(model)
    box = certificate._image_box(image, eps)
    reached = certificate.reach(network, *box)
    points = exact_points(maps, box, draw)
    margins = [logits[0] - logits[1] for _, logits in points]
    least, most = float(min(margins)), float(max(margins))
    limit = least + share * (most - least)
    for proof, paths in trees(reached, limit):
        bound, states = replay(network, reached, np.array([[1.0, -1, 0]]), proof)
        assert bound <= min(margins)
        assert bound <= limit or not states
        for (z, _), margin in zip(points, margins, strict=True):
            for node, (low, high) in states.items():
                inside = all(sign * z[unit] >= 0 for unit, sign in paths[node])
                if inside and margin <= limit:
                    assert (exact(low) <= z).all() and (z <= exact(high)).all()


@fewer(2)
@given(seeds, st.sampled_from([0.02, 0.1, 0.3]), st.floats(-0.2, 1.2))
def test_trees_hold_for_every_image(tmp_path_factory, seed, eps, share):
    """So none is in an empty node, either."""
    draw = np.random.default_rng(seed)

    def trees(reached, limit):
        return (random_tree(draw, *ends(reached), limit) for _ in range(4))

    assert_trees_hold_for_every_image(draw, tmp_path_factory.mktemp("m"), eps, share, trees)


@fewer(1)
@given(seeds)
def test_rounding_errors_of_a_restriction_are_covered(tmp_path_factory, seed):
    """At one image, its margin rounded up as the limit, huge weights that cancel, and multipliers up to 1e6."""
    draw = np.random.default_rng(seed)
    model = tiny(draw)
    weight = model.children["fc1"].params["weight"]
    weight[4:] = -weight[:4] * (1000 + draw.uniform(0, 1, weight[:4].shape).astype(np.float32))
    weight[:4] *= 1000
    network, maps = read(model, tmp_path_factory.mktemp("m")), rational(model)
    x = picture(model, draw).astype(float).ravel()
    *inputs, logits = forward(maps, x)
    z, margin = np.concatenate(inputs[1:]), logits[0] - logits[1]
    reached = certificate.reach(network, x, x.copy())
    wide = [r._replace(low=r.low - 1, high=r.high + 1) if r.lines else r for r in reached]  # all unstable, for now
    low, high = (np.array(v) for v in ends(wide))
    low, high = np.minimum(low, -1.0), np.maximum(high, 1.0)
    c, k = certificate._linear(network, reached, np.array([[1.0, -1, 0]]))
    limit = np.nextafter(float(margin), np.inf)
    multipliers = 10 ** draw.uniform(-2, 6, (2, len(z)))
    certificate._restrict(network, reached, low, high, np.arange(len(z)), multipliers, c[0], k[0], limit)
    assert (exact(low) <= z).all() and (z <= exact(high)).all()


@given(seeds, st.sampled_from([(1, 1), (1, 1e-9), (1e-9, 1)]))
def test_rounding_errors_of_a_slice_are_covered(seed, scales):
    """The combination by itself, of numbers that cancel: w + m c, v and m (k - limit); either may be all."""
    draw, n = np.random.default_rng(seed), 9
    low, high = np.sort(draw.uniform(0, 1, (2, n)), axis=0)
    box = certificate.Reach(low, high, high, high, None)
    c, m = draw.normal(0, scales[0], n), 10 ** draw.uniform(-8, 8, 5)
    w = -m[:, None] * c + draw.normal(0, 1e-14 * scales[0], (5, n)) * m[:, None]
    k, limit = draw.normal(0, scales[1], 2)
    v = -m * (k - limit) * (1 + draw.normal(0, 1e-14, 5))
    network = certificate_network.Network([], (), 8 * certificate_network.gamma(n + 16, certificate.U64))
    found = certificate._least_of_slice(network, box, w, v, m, c, k - limit, abs(k) + abs(limit))
    for i in range(5):
        row = exact(w[i]) + Fraction(m[i]) * exact(c)
        true = np.minimum(row * exact(low), row * exact(high)).sum()
        true += Fraction(v[i]) + Fraction(m[i]) * (Fraction(k) - Fraction(limit))
        scale = abs(w[i]).sum() + m[i] * (abs(c).sum() + abs(k) + abs(limit)) + abs(v[i])
        assert Fraction(found[i]) <= true <= Fraction(found[i]) + Fraction(1e-12 * scale)


def plain_lines(low, high):
    """(lower, upper, offset), one by one."""
    lines = []
    for a, b in zip(low, high, strict=True):
        s = b / (b - a) if a < 0 < b else float(a >= 0)
        lines.append((float(b > -a) if a < 0 < b else s, s, -s * a if a < 0 < b else 0.0))
    return np.array(lines).T


def plain_backward(maps, row, lines, force):
    """(c, k) with c . x + k below row . (the last map's output)."""
    k = 0.0
    for i in range(len(maps) - 1, -1, -1):
        weight, bias = maps[i]
        k, row = k + row @ bias, row @ weight
        if i > 1:
            lower, upper, offset = lines[i - 2]
            k += sum(min(v, 0) * t for v, t in zip(row, offset, strict=True))
            row = np.where(row > 0, lower, upper) * row + force[i - 2]
    return row, k


def unstable_network(draw, folder, eps, at_least, **more):
    """(network, its maps in fractions, the box, what is reached, the unstable ReLUs): at least so many."""
    while True:
        model = tiny(draw, **more)
        network, box = read(model, folder), certificate._image_box(picture(model, draw), eps)
        reached = certificate.reach(network, *box)
        low, high = ends(reached)
        units = np.flatnonzero((low < 0) & (high > 0)).astype(np.int32)
        if len(units) >= at_least:
            return network, rational(model), box, reached, units


@pytest.mark.parametrize("times", [1, 2])
def test_restricted_bounds_are_those_of_the_formula(times, rng, tmp_path):
    """Against dense matrices and loops of this file: of one restriction, and of one below it and a split."""
    network, maps, box, reached, units = unstable_network(rng, tmp_path, 0.1, 8, sizes=(8, 7, 6, 5, 3))
    network, maps = network._replace(slack=0.0), [(a.astype(float), b.astype(float)) for a, b in maps]
    at = [slice(0, 7), slice(7, 13), slice(13, 18)]
    low, high = ends(reached)
    others = np.setdiff1d(np.arange(18), units)  # stable: of no use, and left alone
    units = np.concatenate([rng.permutation(units)[:-2], others]).astype(np.int32)
    u = int(units[0])
    limit = float(certificate.lower(network, reached, np.array([[1.0, -1, 0]]))[0]) + 0.01
    slopes = np.clip((high > -low)[units] + rng.uniform(-0.1, 0.1, (2 * times, len(units))), 0, 1)
    proof = {
        "units": units,
        "parent": np.array([-1, 0, 1, 1, 2], np.int32)[: 3 * times - 1],
        "split": np.array([0, 0, u + 1, -u - 1, 0], np.int32)[: 3 * times - 1],
        "signs": np.zeros((2 * times, len(units)), np.int8),
        "values": slopes.astype(np.float32),
        "multipliers": (10 ** rng.uniform(-2, 1, (times, 2, len(units)))).astype(np.float32),
        "limit": np.array([limit]),
    }
    if times == 2:  # row 1 is that of node 2, which is restricted
        proof["signs"][1, 0], proof["values"][1, 0] = 1, 0.02
    _, states = replay(network, reached, np.array([[1.0, -1, 0]]), proof)
    for t in range(times):
        low[u] = max(low[u], 0) if t else low[u]
        before = low, high
        sign, value = proof["signs"][t], proof["values"][t].astype(float)
        slopes, force = plain_lines(low, high), np.zeros(len(low))
        for column, unit in enumerate(units):
            if sign[column]:
                force[unit] = -sign[column] * value[column]
            else:
                slopes[0, unit] = value[column]
        c, k = plain_backward(maps, np.array([1.0, -1, 0]), [slopes[:, s] for s in at], [force[s] for s in at])
        for layer, s in enumerate(at):
            lines = [plain_lines(low[e], high[e]) for e in at[:layer]]
            new = low.copy(), high.copy()
            for column, unit in enumerate(units):
                if s.start <= unit < s.stop and low[unit] < 0 < high[unit]:
                    for side, sign in ((0, 1.0), (1, -1.0)):
                        row = np.zeros(s.stop - s.start)
                        row[unit - s.start] = sign
                        w, v = plain_backward(maps[: layer + 2], row, lines, [np.zeros(s.stop - s.start) for s in at])
                        m = float(proof["multipliers"][t, side, column])
                        least = sum(min(a * x, a * y) for a, x, y in zip(w + m * c, *box, strict=True))
                        least += v + m * (k - limit)
                        new[side][unit] = max(low[unit], least) if side == 0 else min(high[unit], -least)
            low, high = new
        assert (low > before[0]).any() or (high < before[1]).any()
        for ours, formula in zip(states[3 * t + 1], (low, high), strict=True):
            np.testing.assert_allclose(ours, formula, rtol=0, atol=1e-11)


def restricted_root(reached, units, limit, multiplier):
    """A proof of a restriction and nothing else, with the default slopes and all multipliers the same."""
    low, high = ends(reached)
    return {
        "units": units,
        "parent": np.array([-1, 0], np.int32),
        "split": np.zeros(2, np.int32),
        "signs": np.zeros((2, len(units)), np.int8),
        "values": np.tile((high > -low)[units].astype(np.float32), (2, 1)),
        "multipliers": np.full((1, 2, len(units)), multiplier, np.float32),
        "limit": np.array([limit]),
    }


def test_restrictions_prove_more(rng, tmp_path):
    """With a limit below its bound the root is empty; with one above, the bound rises, and never above the truth."""
    row, gains = np.array([[1.0, -1, 0]]), []
    for _ in range(10):
        network, maps, box, reached, units = unstable_network(rng, tmp_path, 0.15, 5)
        plain = float(certificate.lower(network, reached, row)[0])
        worst = min(logits[0] - logits[1] for _, logits in exact_points(maps, box, rng, 40))
        found = {}
        for limit in (plain - 1e-3, plain + 0.5 * (float(worst) - plain), float(worst), float(worst) + 1, 1e6, 1e300):
            for m in (0, 0.1, 0.3, 1, 3, 10, 1e6):
                proof = restricted_root(reached, units, limit, m)
                found.setdefault(limit, []).append(certificate._replay(network, reached, row, proof))
                assert found[limit][-1] <= min(worst, limit)  # too high a limit: not above the truth, either
        below, above = list(found)[:2]
        assert found[below][-1] == below and found[above][0] == pytest.approx(plain)
        gains.append((max(found[above]) - plain) / (above - plain))
    assert max(gains) > 0.2, gains


def test_an_empty_node_hands_it_down(rng, tmp_path):
    """Whatever is split or restricted below an empty node is empty."""
    network, _, _, reached, units = unstable_network(rng, tmp_path, 0.15, 5)
    row, unit = np.array([[1.0, -1, 0]]), int(units[0]) + 1
    limit = float(certificate.lower(network, reached, row)[0]) - 1e-3
    proof = restricted_root(reached, units, limit, 1e6)
    proof["parent"] = np.array([-1, 0, 1, 1, 3], np.int32)
    proof["split"] = np.array([0, 0, unit, -unit, 0], np.int32)
    proof.update({name: np.repeat(proof[name][:1], 4, 0) for name in ("signs", "values")})  # nodes 0, 2, 3, 4
    proof["multipliers"] = np.repeat(proof["multipliers"], 2, 0)
    assert certificate._replay(network, reached, row, proof) == limit


def test_a_node_of_one_point_is_not_empty(rng, tmp_path):
    """z >= 0 and z <= 0: low = high = 0. Its leaf counts, however bad its bound is."""
    network, _, _, reached, units = unstable_network(rng, tmp_path, 0.15, 5)
    unit = int(units[-1]) + 1
    proof = {
        "units": units[-1:],
        "parent": np.array([-1, 0, 0, 1, 1], np.int32),
        "split": np.array([0, unit, -unit, unit, -unit], np.int32),
        "signs": np.array([[0], [0], [-1]], np.int8),
        "values": np.array([[0], [0], [3e38]], np.float32),
        "multipliers": np.zeros((0, 2, 1), np.float32),
        "limit": np.array([np.inf]),
    }
    assert certificate._replay(network, reached, np.array([[1.0, -1, 0]]), proof) < -1e30


def test_the_order_of_the_nodes_does_not_matter(rng, tmp_path):
    model = tiny(rng)
    network, image = read(model, tmp_path), picture(model, rng)
    reached = certificate.reach(network, *certificate._image_box(image, 0.15))
    row = np.array([[1.0, -1, 0]])
    for _ in range(20):
        proof, _ = random_tree(rng, *ends(reached), 0.2)
        children = [np.flatnonzero(proof["parent"] == n).tolist() for n in range(len(proof["parent"]))]
        order, ready = [], [0]
        while ready:
            order.append(ready.pop(rng.integers(len(ready))))
            ready += children[order[-1]]
        order = np.array(order)
        back = np.argsort(order)
        rows = [n for n, c in enumerate(children) if [int(proof["split"][k]) for k in c] in ([], [0])]
        restricted = np.flatnonzero(proof["split"] == 0)[1:]
        new = dict(proof, split=proof["split"][order])
        new["parent"] = np.append([-1], back[proof["parent"][order[1:]]]).astype(np.int32)
        for name in ("signs", "values"):
            new[name] = proof[name][np.argsort(back[rows])]
        new["multipliers"] = proof["multipliers"][np.argsort(back[restricted])]
        bounds = [certificate._replay(network, reached, row, p) for p in (proof, new)]
        assert bounds[0] == bounds[1]


@fewer(2)
@given(seeds)
def test_a_corrupted_tree_is_refused_or_harmless(tmp_path_factory, seed):
    draw = np.random.default_rng(seed)
    model = tiny(draw)
    network, image, maps = read(model, tmp_path_factory.mktemp("m")), picture(model, draw), rational(model)
    box = certificate._image_box(image, 0.15)
    reached = certificate.reach(network, *box)
    margins = [logits[0] - logits[1] for _, logits in exact_points(maps, box, draw)]
    for _ in range(10):
        proof, _ = random_tree(draw, *ends(reached), float(draw.choice(margins)))
        name = draw.choice([n for n in proof if proof[n].size])
        array = proof[name].reshape(-1)
        if draw.integers(2):
            array[draw.integers(len(array))] = draw.choice(array)
        else:
            array[draw.integers(len(array))] = draw.choice([-128, -2, -1, 0, 1, 2, 7])
        try:
            bound = certificate._replay(network, reached, np.array([[1.0, -1, 0]]), proof)
        except CertificateError:
            continue
        assert bound <= min(margins)


def test_a_limit_without_restrictions_means_nothing(rng, tmp_path):
    model = tiny(rng)
    network, image = read(model, tmp_path), picture(model, rng)
    reached = certificate.reach(network, *certificate._image_box(image, 0.1))
    proof, found = four_leaves(rng, np.ones(11, bool)), []
    for limit in (np.inf, -np.inf, np.nan, -1e9):
        proof["limit"][0] = limit
        found.append(certificate._replay(network, reached, np.array([[1.0, -1, 0]]), proof))
    assert len(set(found)) == 1 and np.isfinite(found[0])


# --- lines and boxes --------------------------------------------------------------------------------------------------


sides = st.floats(1e-300, 1e30)


@given(sides, sides)
def test_the_upper_line_is_above_the_relu(below, high):
    low = -below
    lines = certificate._lines(np.array([low]), np.array([high]))
    lower, slope, offset = (Fraction(float(v[0])) for v in lines[:3])
    assert 0 <= slope <= 1 and lower in (0, 1)
    assert slope * Fraction(low) + offset >= 0
    assert slope * Fraction(high) + offset >= Fraction(high)
    assert offset <= Fraction(high) * (1 + Fraction(1, 10**12)) + Fraction(1, 10**100)


@pytest.mark.parametrize(
    "low, high, slope", [(0.0, 1.0, 1), (-1.0, 0.0, 0), (0.0, 0.0, 1), (2.0, 3.0, 1), (-3.0, -2.0, 0)]
)
def test_stable_relus_are_exact(low, high, slope):
    lines = certificate._lines(np.array([low], float), np.array([high], float))
    assert [float(v[0]) for v in lines] == [slope, slope, 0, 0]


@given(st.floats(0, 1, width=32), st.floats(0, 1))
def test_the_box_is_outward(pixel, eps):
    image = np.full((1, 1, 1), pixel, np.float32)
    low, high = (Fraction(float(v[0])) for v in certificate._image_box(image, eps))
    assert low <= max(Fraction(pixel) - Fraction(eps), 0) and high >= min(Fraction(pixel) + Fraction(eps), 1)
    step = np.float32(eps)  # the attacks' box
    assert low <= float(max(image[0, 0, 0] - step, 0)) and high >= float(min(image[0, 0, 0] + step, 1))
    assert 0 <= low <= high <= 1
    assert high - low <= 2 * Fraction(eps) + Fraction(1, 10**6)
    theirs = crown.image_box(image[None], eps)
    assert (float(low), float(high)) == (theirs[0].item(), theirs[1].item())


# --- float32 ----------------------------------------------------------------------------------------------------------


def shuffled(model, x, draw):
    """Logits of an mlp in float32, every sum one by one in a random order, the bias anywhere."""
    norm, a = model.children["normalize"].buffers, x.astype(np.float32).reshape(model.input_shape)
    a = ((a - norm["mean"]) * (1 / norm["std"])).ravel()
    for layer in model.children.values():
        if isinstance(layer, Linear):
            out = []
            for column, bias in zip(layer.params["weight"].T, layer.params["bias"], strict=True):
                total = np.float32(0)
                for term in draw.permutation(np.append(column * a, bias)):
                    total += term
                out.append(total)
            a = np.maximum(np.array(out, np.float32), np.float32(0))
    return np.array(out, np.float32)


@fewer(0.7)
@given(seeds)
def test_float32_error(tmp_path_factory, seed):
    draw = np.random.default_rng(seed)
    model = tiny(draw)
    network, image = read(model, tmp_path_factory.mktemp("m")), picture(model, draw)
    checked, maps = certificate.check_image(network, image, 0, 0.1), rational(model)
    low, high = np.clip(image - np.float32(0.1), 0, 1), np.clip(image + np.float32(0.1), 0, 1)
    for x in corners_and_points(low.ravel(), high.ravel(), draw, 3):
        x = x.astype(np.float32)
        logits = forward(maps, x)[-1]
        for ours in (model.forward(x.reshape(1, *model.input_shape))[0][0], shuffled(model, x, draw)):
            for t in (1, 2):
                wrong = Fraction(float(ours[0])) - Fraction(float(ours[t])) - (logits[0] - logits[t])
                assert abs(wrong) <= checked.float32_error[t]
    box, chain, rows = crown.image_box(image[None], 0.1), Chain(model), crown.margin_rows([0, 0], [1, 2], 3)
    theirs = rounding.float32_errors(chain, *box, crown.crown(chain, *box), rows, [0, 0])
    for ours, bound in zip(checked.float32_error.values(), theirs, strict=True):  # the verifier counts every term
        assert 0 < ours <= (1 + 2 * network.slack / certificate.U32) * bound


@pytest.mark.parametrize("stride", [1, 2])
def test_no_promise_for_sums_that_float32_may_compute_otherwise(tmp_path, stride, rng):
    """A 3 x 3 window of stride 1 goes by Winograd's algorithm, whose rounding no order of summation explains."""
    model = conv_net(rng, (3, stride, 1), (2, 2, 0), size=(4, 4)).astype(np.float32)
    network, image = read(model, tmp_path), picture(model, rng)
    errors = np.array(list(certificate.check_image(network, image, 0, 0.1).float32_error.values()))
    box, rows = crown.image_box(image[None], 0.1), crown.margin_rows([0, 0], [1, 2], 3)
    chain = Chain(model)
    theirs = rounding.float32_errors(chain, *box, crown.crown(chain, *box), rows, [0, 0])
    assert np.isfinite(errors).all() == np.isfinite(theirs).all() == (stride == 2)
    case = certificate.check_case(network, *(b[0] for b in box), np.eye(3)[:1] - np.eye(3)[1:2], np.array([1e3]))
    assert np.isfinite(case.float32_error) == (stride == 2)


N = 1000


def lossy(**more):
    """A network whose first unit adds 1 and N - 1 numbers of 2^-24, all of which a float32 sum loses: 1 + 2^-24 is a
    tie, and goes to 1. The error of gamma_n is attained."""
    model = models.mlp((N, 2, 2), input_shape=(N, 1, 1), **more)
    for layer in model.children.values():
        if isinstance(layer, Linear):
            layer.params["weight"][...] = layer.params["bias"][...] = 0
    model.children["fc1"].params["weight"][:, 0] = [1, *[2.0**-24] * (N - 1)]
    return model


@pytest.mark.parametrize("bias, on", [(0, 1), (-0.5, 1), (-2, 0)])
def test_the_float32_error_is_as_small_as_it_can_be(tmp_path, bias, on):
    """An error that is attained, through a second layer: at one image with its ReLU on, or off."""
    model, image = lossy(), np.ones((N, 1, 1), np.float32)
    model.children["fc1"].params["bias"][0] = bias
    model.children["fc2"].params["weight"][0, 0] = 4
    naive = np.float32(0)
    for term in model.children["fc1"].params["weight"][:, 0]:
        naive += term
    assert naive == 1
    attained = 4 * (N - 1) * 2.0**-24 * on
    error = certificate.check_image(read(model, tmp_path), image, 0, 0.0).float32_error[1]
    size = 4 * (1 + abs(bias)) * on  # what the bound is a share of
    assert attained <= error <= (N + 20) * 2.0**-24 * 1.002 * size + 1e-30


def test_the_float32_error_of_an_unstable_relu_counts(tmp_path):
    """At the image itself, z = 499 2^-24 in real arithmetic, and -500 2^-24 in float32."""
    model, image = lossy(), np.ones((N, 1, 1), np.float32)
    model.children["fc1"].params["bias"][0] = -1 - 500 * 2.0**-24
    model.children["fc2"].params["weight"][0, 0] = 4
    network = read(model, tmp_path)
    reached = certificate.reach(network, *certificate._image_box(image, 1e-4))
    assert reached[2].low[0] < 0 < reached[2].high[0]
    error = certificate.check_image(network, image, 0, 1e-4).float32_error[1]
    assert 4 * 499 * 2.0**-24 <= error <= (N + 20) * 2.0**-24 * 1.002 * 8


def test_the_float32_error_of_the_normalisation_counts(tmp_path):
    """(x - mean) (1 / std): the verifier's own three roundings, through a layer of weight 1."""
    model = models.mlp((1, 2), input_shape=(1, 1, 1), mean=(0.1,), std=(0.3,))
    model.children["fc1"].params["weight"][...] = [[1, 0]]
    model.children["fc1"].params["bias"][...] = 0
    network, maps, worst = read(model, tmp_path), rational(model), 0.0
    for pixel in np.linspace(0, 1, 200, dtype=np.float32):
        image = np.full((1, 1, 1), pixel)
        error = certificate.check_image(network, image, 0, 0.0).float32_error[1]
        a, b = model.forward(image[None])[0][0]
        z = forward(maps, image.ravel())[-1]
        wrong = float(abs(Fraction(float(a)) - Fraction(float(b)) - (z[0] - z[1])))
        assert wrong <= error
        worst = max(worst, wrong / error)
    assert worst > 0.1


def test_the_float32_error_of_a_chain(tmp_path, monkeypatch):
    """One number through two layers, in a format so coarse that products of errors count: E_k = |W| E_(k-1) + gamma
    (|W| (a + E_(k-1)) + |b|), by hand."""
    monkeypatch.setattr(certificate, "U32", 2.0**-6)
    model = models.mlp((1, 1, 2), input_shape=(1, 1, 1))
    for name, weight, bias in (("fc1", [[3]], [0.5]), ("fc2", [[2, 0]], [0.25, 0])):
        model.children[name].params["weight"][...], model.children[name].params["bias"][...] = weight, bias

    def gamma(n):
        return n / 64 / (1 - n / 64)

    image = np.full((1, 1, 1), 0.75, np.float32)
    error = gamma(4) * 0.75
    error = 3 * error + gamma(2) * (3 * (0.75 + error) + 0.5)
    error = 2 * error + gamma(2) * (2 * (2.75 + error) + 0.25)
    found = certificate.check_image(read(model, tmp_path), image, 0, 0.0).float32_error[1]
    assert error <= found <= 1.005 * error


def test_the_float32_errors_of_stable_relus_may_cancel(tmp_path):
    """x - x through two ReLUs that are on: the error of the normalisation is the same in both."""
    model = models.mlp((1, 2, 2), input_shape=(1, 1, 1))
    for layer, weight in (("fc1", [[1, 1]]), ("fc2", [[1, 0], [-1, 0]])):
        model.children[layer].params["weight"][...], model.children[layer].params["bias"][...] = weight, 0
    found = certificate.check_image(read(model, tmp_path), np.ones((1, 1, 1), np.float32), 0, 0.0).float32_error[1]
    assert 10 <= found * 2.0**24 <= 11  # gamma_2 for each ReLU, gamma_3 for their sum of size 2; not gamma_4 twice


def test_relus_that_are_off_add_no_rounding(tmp_path):
    model = models.mlp((1, N, 2), input_shape=(1, 1, 1))
    for name, weight in (("fc1", 1), ("fc2", [1, 0])):
        model.children[name].params["weight"][...], model.children[name].params["bias"][...] = weight, 0
    model.children["fc1"].params["bias"][1:] = -5
    found = certificate.check_image(read(model, tmp_path), np.ones((1, 1, 1), np.float32), 0, 0.0).float32_error[1]
    assert 4 <= found * 2.0**24 <= 9  # gamma_4, gamma_2, gamma_2


def test_float32_underflow_counts(tmp_path):
    """2^-127 is subnormal: hardware that flushes such numbers to zero loses all of it."""
    model = models.mlp((1, 2), input_shape=(1, 1, 1))
    model.children["fc1"].params["weight"][...] = [[2.0**-127, 0]]
    model.children["fc1"].params["bias"][...] = 0
    found = certificate.check_image(read(model, tmp_path), np.ones((1, 1, 1), np.float32), 0, 0.0).float32_error[1]
    assert 2.0**-127 <= found <= 2.0**-118


# --- proofs that are none ---------------------------------------------------------------------------------------------


@pytest.fixture
def proved(rng, tmp_path):
    """(network, image, proof) for the rival 1 of the label 0: a proof that is accepted."""
    model = tiny(rng)
    network, image = read(model, tmp_path), picture(model, rng)
    low, high = ends(certificate.reach(network, *certificate._image_box(image, 0.2)))
    proof = four_leaves(rng, (low < 0) & (high > 0), 0.1)
    certificate.check_image(network, image, 0, 0.2, {1: proof})
    return network, image, proof


def changed(name, at, value):
    def change(proof):
        proof[name] = proof[name].copy()
        proof[name][at] = value(proof[name]) if callable(value) else value

    return change


def replaced(*names, by):
    return lambda proof: proof.update({name: by(proof[name]) for name in names})


def without(nodes, rows):
    """Without these nodes, and these rows of signs and values."""

    def change(proof):
        proof.update({n: np.delete(proof[n], nodes) for n in ("parent", "split")})
        proof.update({n: np.delete(proof[n], rows, 0) for n in ("signs", "values")})

    return change


def old_format(proof):
    units = proof["units"]
    proof.clear()
    proof.update(units=units, alpha=np.ones((2, len(units)), np.float32), split=np.array([[1], [-1]], np.int32))
    proof.update(beta=np.zeros((2, 1), np.float32))


above_1 = np.nextafter(np.float32(1), np.float32(2))
COVER, BETA, ROWS = "children of a node do not cover", "not a number >= 0", "rows of signs and values do not fit"
FAULTS = {  # the nodes of the rows are 3, 4, 5, 6, 7
    "alpha above 1": (changed("values", (1, 4), above_1), "alpha is above 1"),
    "alpha below 0": (changed("values", (1, 4), -1e-7), BETA),
    "alpha NaN": (changed("values", (3, 5), np.nan), BETA),
    "beta negative": (changed("values", (2, 0), -1e-30), BETA),
    "beta infinite": (changed("values", (2, 0), np.inf), BETA),
    "beta NaN": (changed("values", (2, 0), np.nan), BETA),
    "a multiplier negative": (changed("multipliers", (0, 1, 2), -1e-30), "a multiplier is not a number >= 0"),
    "a multiplier infinite": (changed("multipliers", (0, 0, 2), np.inf), "a multiplier is not a number >= 0"),
    "a multiplier NaN": (changed("multipliers", (0, 0, 2), np.nan), "a multiplier is not a number >= 0"),
    "no limit": (replaced("limit", by=lambda v: v[:0]), "shapes"),
    "two limits": (replaced("limit", by=lambda v: np.tile(v, 2)), "shapes"),
    "a limit NaN": (changed("limit", 0, np.nan), "limit is not a number"),
    "a limit infinite": (changed("limit", 0, np.inf), "limit is not a number"),
    "a limit too low for floats": (
        lambda p: (changed("limit", 0, -1e308)(p), changed("multipliers", (), 1e30)(p)),
        "bound is not a number",
    ),
    "another parent": (changed("parent", 4, 2), COVER),
    "a parent of a leaf": (changed("parent", 4, 3), COVER),
    "a parent behind": (changed("parent", 3, 4), "not a tree"),
    "its own parent": (changed("parent", 3, 3), "not a tree"),
    "two roots": (changed("parent", 1, -1), "not a tree"),
    "a root with a parent": (changed("parent", 0, 0), "not a tree"),
    "a root that is a part": (changed("split", 0, 1), "not a tree"),
    "no nodes": (without(range(8), range(5)), "not a tree"),
    "a child is missing": (without([6], [3]), COVER),
    "the same side twice": (changed("split", 4, lambda s: s[3]), COVER),
    "another ReLU": (changed("split", 4, lambda s: -s[5]), COVER),
    "restricted and a side": (changed("split", 4, 0), COVER),
    "restricted twice": (changed("split", slice(3, 5), 0), COVER),
    "a side alone": (changed("split", 7, lambda s: s[5]), COVER),
    "three children": (lambda p: (changed("parent", 7, 1)(p), changed("split", 7, lambda s: s[3])(p)), COVER),
    "a split above": (changed("split", 3, 12), "no such ReLU"),
    "a split below": (changed("split", 3, -(2**31)), "no such ReLU"),
    "a split far below": (
        lambda p: p.update(split=np.where(p["split"] < 0, np.int64(-(2**63)), p["split"])),
        "no such ReLU",
    ),
    "a sign of the other side": (changed("signs", (1, 1), 1), "a sign is not what"),
    "a sign of the other half": (changed("signs", (2, 1), 1), "a sign is not what"),
    "a sign from nowhere": (changed("signs", (4, 2), -1), "a sign is not what"),
    "a sign of a restricted node's parent": (changed("signs", (0, 1), -1), "a sign is not what"),
    "a sign 2": (changed("signs", (0, 0), 2), "a sign is not -1, 0 or 1"),
    "a sign without an absolute": (changed("signs", (2, 0), -128), "a sign is not -1, 0 or 1"),
    "a row too few": (replaced("signs", "values", by=lambda v: v[:-1]), ROWS),
    "a row too many": (replaced("signs", "values", by=lambda v: np.append(v, v[:1], 0)), ROWS),
    "a row of signs too few": (replaced("signs", by=lambda v: v[:-1]), ROWS),
    "values of one row": (replaced("values", by=lambda v: v[:1]), ROWS),
    "a column too few": (replaced("signs", "values", by=lambda v: v[:, :-1]), ROWS),
    "multipliers too few": (replaced("multipliers", by=lambda v: v[:-1]), "rows of multipliers"),
    "multipliers too many": (replaced("multipliers", by=lambda v: np.tile(v, (2, 1, 1))), "rows of multipliers"),
    "multipliers of one side": (replaced("multipliers", by=lambda v: v[:, :1]), "rows of multipliers"),
    "multipliers too narrow": (replaced("multipliers", by=lambda v: v[..., :-1]), "rows of multipliers"),
    "a split too few": (replaced("split", by=lambda v: v[:-1]), "shapes"),
    "splits in a table": (replaced("split", "parent", by=lambda v: v[:, None]), "shapes"),
    "a unit twice": (changed("units", 0, lambda u: u[1]), "two columns"),
    "a unit out of range": (changed("units", 0, 11), "no such ReLU"),
    "a unit below 0": (changed("units", 0, -1), "no such ReLU"),
    "a unit too many": (replaced("units", by=lambda u: np.append(u, [u.sum() * 0])), "two columns|rows of signs"),
    "a unit too few": (replaced("units", by=lambda u: u[:-1]), "rows of multipliers"),
    "units as floats": (replaced("units", by=lambda u: u.astype(float)), "units: integers must be"),
    "signs as floats": (replaced("signs", by=lambda u: u.astype(float)), "signs: integers must be"),
    "values as integers": (replaced("values", by=lambda a: a.astype(int)), "values: integers must be"),
    "complex multipliers": (replaced("multipliers", by=lambda a: a + 0j), "multipliers: integers must be"),
    "no values": (lambda proof: proof.pop("values"), "must hold units, parent, split, multipliers, limit, signs, val"),
    "an array more": (lambda proof: proof.update(more=proof["units"]), "must hold units, parent, split"),
    "the old format": (old_format, "list of leaves, as older versions wrote it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_proof_with_a_fault_is_refused(fault, proved):
    network, image, proof = proved
    change, message = FAULTS[fault]
    change(proof)
    with pytest.raises(CertificateError, match=message) as error:
        certificate.check_image(network, image, 0, 0.2, {1: proof})
    assert "\n" not in str(error.value) and str(error.value).startswith("rival 1: ")


@pytest.mark.parametrize("rival", [0, 3, -1])
def test_a_proof_for_no_rival_is_refused(rival, proved):
    network, image, proof = proved
    with pytest.raises(CertificateError, match="which is none"):
        certificate.check_image(network, image, 0, 0.2, {rival: proof})


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_none_is_refused(label, proved):
    with pytest.raises(CertificateError, match="no class"):
        certificate.check_image(*proved[:2], label, 0.2)


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_an_eps_that_is_none_is_refused(eps, proved):
    with pytest.raises(CertificateError, match="eps must be"):
        certificate.check_image(*proved[:2], 0, eps)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.astype(np.float64), "must be float32"),
        (lambda x: x[:1], "must be float32"),
        (lambda x: x + np.float32(1), "in .0, 1."),
        (lambda x: x - np.float32(1), "in .0, 1."),
        (lambda x: x * np.float32(np.nan), "in .0, 1."),
    ],
)
def test_an_image_that_is_none_is_refused(change, message, proved):
    with pytest.raises(CertificateError, match=message):
        certificate.check_image(proved[0], change(proved[1]), 0, 0.2)


def test_a_large_beta_proves_nothing(proved):
    network, image, proof = proved
    proof["values"][proof["signs"] != 0] = np.float32(3e38)
    plain = certificate.check_image(network, image, 0, 0.2).bound
    assert certificate.check_image(network, image, 0, 0.2, {1: proof}).bound == plain


# --- networks that are refused ----------------------------------------------------------------------------------------


def tensors_of(model):
    return {k: np.array(v) for k, v in model.state_dict().items()}, {"architecture": model.architecture}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, m: t["fc1.weight"].__setitem__((0, 0), np.nan), "fc1.weight: must be finite"),
        (lambda t, m: t["fc2.bias"].__setitem__(0, np.inf), "fc2.bias: must be finite"),
        (lambda t, m: t.update({"fc1.weight": t["fc1.weight"].astype(np.float64)}), "fc1.weight: must be .* float32"),
        (lambda t, m: t["normalize.std"].__setitem__(0, 0), "is 0"),
        (lambda t, m: t.update({"extra.weight": np.zeros(1, np.float32)}), "'extra.weight'.* no place"),
        (lambda t, m: t.pop("fc2.bias"), "not the network .*fc2.bias"),
        (lambda t, m: t.update({"fc2.weight": t["fc2.weight"][:, :-1]}), "does not fit"),
        (lambda t, m: t.update({"fc2.bias": t["fc2.bias"][:-1]}), "does not fit"),
        (lambda t, m: m["architecture"]["layers"]["fc1"].update(type="PreActBlock"), "does not know"),
        (lambda t, m: m.clear(), "not the network .*architecture"),
        (lambda t, m: t.__setitem__("fc1.weight", np.full_like(t["fc1.weight"], 3e38)), None),
    ],
)
def test_a_network_with_a_fault_is_refused(change, message, rng, tmp_path):
    model = tiny(rng)
    tensors, metadata = tensors_of(model)
    change(tensors, metadata)
    checkpoint.save_tensors(tmp_path / "model.safetensors", tensors, metadata)
    if message is None:  # finite weights, but float32 would overflow
        network = read_network(tmp_path)
        with pytest.raises(CertificateError, match="too large for float32"):
            certificate.check_image(network, picture(model, rng), 0, 0.1)
        return
    with pytest.raises(CertificateError, match=message) as error:
        read_network(tmp_path)
    assert "\n" not in str(error.value)


def test_a_kernel_that_the_metadata_does_not_say_is_refused(tmp_path):
    tensors, metadata = tensors_of(models.small_cnn(kernel=4, hidden=2, classes=2))
    metadata["architecture"] = {"name": "small_cnn", "kernel": 5}  # the padding would be another
    checkpoint.save_tensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(CertificateError, match="not 5x5"):
        read_network(tmp_path)


# --- the results of a run ---------------------------------------------------------------------------------------------


class Run:
    """A folder of results, true ones: ``write()`` puts it on disk."""

    def __init__(self, folder, draw):
        self.folder, self.model = Path(folder), tiny(draw)
        self.network = read(self.model, folder)
        weights = self.folder / "model.safetensors"
        self.config = {"weights": {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}, "eps": EPS}
        self.images = draw.uniform(0, 1, (30, *self.model.input_shape)).astype(np.float32)
        logits = self.model.forward(self.images)[0]
        self.labels, self.records, self.proofs, self.adversarial = logits.argmax(1), {}, {}, {}
        self.bounds = [
            certificate.check_image(self.network, x, y, EPS).bound
            for x, y in zip(self.images, self.labels, strict=True)
        ]
        certain = [i for i, b in enumerate(self.bounds) if min(b.values()) > 0.1]
        broken = [i for i in range(30) if min(self.bounds[i].values()) < 0 and self._attack(i)]
        self.crown, self.leaves, self.solver, self.wrong = certain[:4]
        self.attacked = broken[0]
        self.labels[self.wrong] = (self.labels[self.wrong] + 1) % 3
        for i in (self.crown, self.leaves, self.solver):
            self.verified(i)
        rival = next(iter(self.bounds[self.leaves]))
        proof = four_leaves(draw, np.ones(11, bool))
        checked = certificate.check_image(
            self.network, self.images[self.leaves], self.labels[self.leaves], EPS, {rival: proof}
        )
        self.records[self.leaves]["how"][str(rival)] = "bab"
        self.records[self.leaves]["bound"][str(rival)] = checked.bound[rival]
        self.proofs[self.leaves] = {f"{rival}/{name}": value for name, value in proof.items()}
        how = self.records[self.solver]["how"]
        how.update(zip(how, ("milp", "milp"), strict=True))
        self.record(self.wrong, "misclassified")
        self.record(self.attacked, "attacked")
        self.late = next(i for i in range(30) if i not in self.records)
        self.record(self.late, "timeout")

    def _attack(self, i):
        """Try the corners nearest to the other classes; keep one that is misclassified, well inside of the box."""
        x, chain = self.images[i], Chain(self.model, np.float64)
        step = np.float32(EPS * (1 - 1e-5))
        for t in range(3):
            inputs = chain.forward(x[None].astype(float))[1]
            rows = np.eye(3)[[t]] - np.eye(3)[[self.labels[i]]]
            sign = np.sign(chain.input_gradient(rows, inputs)[0]).astype(np.float32)
            y = np.clip(x + step * sign, 0, 1)
            if self.model.forward(y[None])[0].argmax() != self.labels[i]:
                self.adversarial[i] = y
                return True
        return False

    def record(self, i, verdict, **more):
        self.records[i] = {"id": int(i), "label": int(self.labels[i]), "verdict": verdict, **more}

    def verified(self, i):
        bound = {str(t): b for t, b in self.bounds[i].items()}
        self.record(i, "verified", bound=bound, how=dict.fromkeys(bound, "crown"), verified_float32=True)

    def write(self):
        checkpoint.write_json(self.folder / "config.json", self.config)
        for name in ("proofs", "counterexamples"):
            (self.folder / name).mkdir()
        for i, proof in self.proofs.items():
            checkpoint.save_tensors(self.folder / "proofs" / f"{i:05d}.safetensors", proof, {})
        for i in {self.attacked} & self.adversarial.keys():
            np.savez(self.counterexample(i), adversarial=self.adversarial[i])
        checkpoint.write_jsonl(self.folder / "results.jsonl", list(self.records.values()))

    def counterexample(self, i):
        return self.folder / "counterexamples" / f"{i:05d}.npz"

    def predict(self, images):
        return self.model.forward(images)[0].argmax(1)

    def check(self, **more):
        more = {"predict": self.predict} | more
        return certificate_results.check_results(self.folder, self.folder, self.images, self.labels, **more)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, np.random.default_rng(SEED))


def test_true_results_are_confirmed(run):
    run.write()
    calls = []
    report = run.check(progress=lambda *a: calls.append(a))
    assert report == {
        "images": 6, "confirmed": 2, "float32": 2, "solver_only": 1, "counterexamples": 1, "refused": [],
        "verdicts": {"verified": 3, "misclassified": 1, "attacked": 1, "timeout": 1}, "contradictions": [],
    }  # fmt: skip
    assert calls == [(i, 6) for i in range(1, 7)]
    json.dumps(report)


def test_the_end_of_a_killed_run_is_left_out(run):
    run.write()
    with open(run.folder / "results.jsonl", "a") as file:
        file.write('{"id": 3, "verd')
    assert run.check()["images"] == 6


def test_results_of_several_runs_are_one(run):
    """A verdict of one run counts, whichever file a time-out of another run is in."""
    run.write()
    lines = [dict(r) for r in run.records.values() if r["verdict"] != "timeout"]
    checkpoint.write_jsonl(run.folder / "results-1-of-2.jsonl", [{**r, "verdict": "timeout"} for r in lines])
    checkpoint.write_jsonl(run.folder / "results2.jsonl", [{**r, "verdict": "unknown"} for r in lines])
    report = run.check()
    assert report["verdicts"] == {"verified": 3, "misclassified": 1, "attacked": 1, "timeout": 1}
    assert not report["refused"] and not report["contradictions"]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def edited(i, **more):
    return lambda run: run.records[getattr(run, i)].update(more)


def raised(run):
    bound = run.records[run.crown]["bound"]
    bound[next(iter(bound))] += 1e-3


def nullified(run):
    run.records[run.crown]["bound"][next(iter(run.records[run.crown]["bound"]))] = None


def claim_the_attacked(run):
    """It has a true counterexample, but nobody saved it."""
    run.verified(run.attacked)
    run.records[run.attacked]["bound"] = dict.fromkeys(run.records[run.attacked]["bound"], 0.5)
    run.adversarial.pop(run.attacked)


def one_ulp_outside(run):
    """At one pixel, the first float32 number beyond eps."""
    y, x = run.adversarial[run.attacked].ravel(), run.images[run.attacked].ravel()
    at = int(np.argmin(abs(x - 0.5)))
    value = np.float32(float(x[at]) + EPS)
    while Fraction(float(value)) - Fraction(float(x[at])) <= Fraction(EPS):
        value = np.nextafter(value, np.float32(2))
    y[at] = value


def flat_proof(run):
    return run.proofs[run.leaves]


def first(run, name):
    return next(v for k, v in flat_proof(run).items() if k.endswith(name))


def file_of(run):
    return run.folder / "proofs" / f"{run.leaves:05d}.safetensors"


BEFORE = {  # what is done to the true results, and what the checker says of which image
    "a bound raised": (raised, "crown", r"the bound .* is claimed"),
    "a bound that is no number": (nullified, "crown", "the bound None is claimed"),
    "no bounds": (edited("crown", bound={}), "crown", "the bound None is claimed"),
    "bounds that are a list": (edited("crown", bound=[1]), "crown", "an entry for each rival"),
    "a verdict that is not true": (claim_the_attacked, "attacked", "only proved to be above -"),
    "another label": (edited("crown", label=7), "crown", "not 7"),
    "another verdict": (edited("crown", verdict="proved"), "crown", "unknown verdict 'proved'"),
    "not misclassified": (edited("crown", verdict="misclassified"), "crown", "not misclassified"),
    "a slope": (lambda run: first(run, "values").__setitem__((0, 3), 1.5), "leaves", "alpha is above 1"),
    "a proof of another version": (
        lambda run: flat_proof(run).update({f"{next(iter(flat_proof(run)))[0]}/alpha": first(run, "values")}),
        "leaves", "older versions",
    ),
    "a proof of a class that is none": (
        lambda run: flat_proof(run).update({"x/values": first(run, "values")}), "leaves", "belongs to no rival"
    ),
    "outside by one ulp": (one_ulp_outside, "attacked", "outside of the box"),
    "a counterexample that is the image": (
        lambda run: run.adversarial.update({run.attacked: run.images[run.attacked]}), "attacked", "not misclassified"
    ),
    "a counterexample of another shape": (
        lambda run: run.adversarial.update({run.attacked: run.images[run.attacked][:1]}), "attacked", "must be float32"
    ),
    "no counterexample": (lambda run: run.adversarial.clear(), "attacked", "no counterexample can be read"),
}  # fmt: skip
AFTER = {
    "a proof cut short": (lambda run: truncated(file_of(run)), "leaves", "damaged or cut short"),
    "a counterexample cut short": (
        lambda run: truncated(run.counterexample(run.attacked)), "attacked", "no counterexample can be read"
    ),
    "a pickle": (
        lambda run: np.savez(run.counterexample(run.attacked), adversarial=np.array([{}], object)), "attacked",
        "no counterexample can be read",
    ),
    "an empty counterexample": (
        lambda run: run.counterexample(run.attacked).write_bytes(b""), "attacked", "no counterexample can be read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
def test_results_with_a_fault_are_refused(fault, run):
    change, image, message = (BEFORE | AFTER)[fault]
    if fault in BEFORE:
        change(run)
    run.write()
    if fault in AFTER:
        change(run)
    report = run.check()
    assert [r["id"] for r in report["refused"]] == [getattr(run, image)]
    reason = report["refused"][0]["reason"]
    assert re.search(message, reason) and "\n" not in reason
    assert not report["contradictions"]


def test_a_lost_proof_is_not_missed(run):
    """A rival that plain CROWN does not exclude: without its file, the claim is refused."""
    for i in range(30):
        bound = run.bounds[i]
        if -0.05 < min(bound.values()) <= 0 and i not in run.records:
            break
    run.verified(i)
    run.write()
    assert [r["id"] for r in run.check()["refused"]] == [i]


def test_a_claim_for_float32_needs_more(run, monkeypatch):
    monkeypatch.setattr(certificate, "U32", 0.01)  # a float that is worse than its bounds are good
    run.write()
    report = run.check()
    assert {r["id"] for r in report["refused"]} == {run.crown, run.leaves}  # the solver's bounds are not checked
    assert report["confirmed"] == 0 and "claimed for float32" in report["refused"][0]["reason"]


def test_float32_must_be_fooled_as_well(run):
    run.write()
    report = run.check(predict=lambda images: np.array([run.labels[run.attacked]]))
    assert [r["id"] for r in report["refused"]] == [run.attacked] or run.labels[run.attacked] == run.labels[run.wrong]
    assert "float32 classifies it" in report["refused"][0]["reason"]
    assert not run.check(predict=None)["refused"]


def test_verified_and_attacked_is_a_contradiction(run):
    run.write()
    np.savez(run.counterexample(run.crown), adversarial=run.images[run.crown])
    attacked = run.records[run.attacked]
    checkpoint.append_jsonl(run.folder / "results.jsonl", attacked | {"verdict": "verified"})
    report = run.check()
    assert [c["id"] for c in report["contradictions"]] == [run.attacked, run.crown, run.attacked]


def test_other_weights_are_refused(run):
    run.write()
    run.model.children["fc2"].params["bias"][0] += 1
    run.model.save(run.folder / "model.safetensors")
    with pytest.raises(CertificateError, match="is not the file that was verified"):
        run.check()


@pytest.mark.parametrize("config", [{}, [], {"weights": {"sha256": "x"}}, {"weights": "x", "eps": 1}])
def test_a_config_that_says_nothing_is_refused(config, run):
    run.config = config
    run.write()
    with pytest.raises(CertificateError, match="does not name"):
        run.check()


@pytest.mark.parametrize("i", [30, -1, "3", None, True])
def test_a_result_about_no_image_is_refused(i, run):
    run.records[run.crown]["id"] = i
    run.write()
    with pytest.raises(CertificateError, match="which is none"):
        run.check()


def test_a_folder_without_results_is_refused(run):
    run.write()
    (run.folder / "results.jsonl").unlink()
    with pytest.raises(CertificateError, match=r"no results\.jsonl"):
        run.check()


def test_the_counterexample_may_touch_the_box(tmp_path):
    """|x - x0| = eps, exactly, is inside; beyond by any fraction is not, though float64 rounds it to eps."""
    model = models.mlp((1, 2), input_shape=(1, 1, 1))
    model.children["fc1"].params["weight"][...] = [[1, -1]]
    model.children["fc1"].params["bias"][...] = 0  # the first class, but for 0
    network = read(model, tmp_path)

    def check(adversarial, image, eps):
        pair = (np.full((1, 1, 1), v, np.float32) for v in (adversarial, image))
        certificate_results._check_counterexample(network, *pair, 1, eps)

    check(0.75, 0.5, 0.25)
    with pytest.raises(CertificateError, match="outside"):
        check(0.75, 0.5, np.nextafter(0.25, 0))
    # x0 = 1.25 2^-55: the distance is 0.5 - 0.625 2^-54, which float64 rounds to 0.5 - 2^-54, and that is eps
    check(0.5, 1.25 * 2.0**-55, 0.5)
    with pytest.raises(CertificateError, match="outside"):
        check(0.5, 1.25 * 2.0**-55, 0.5 - 2.0**-54)
    with pytest.raises(CertificateError, match="not misclassified"):
        check(0.0, 0.125, 0.125)  # a tie: no rounded computation shows that the margin is <= 0


def test_the_checker_shares_nothing_with_the_verifier():
    own = {"boxes", "checker", "network", "results", "witness"}
    for name in own & {file.stem for file in Path(certificate.__file__).parent.glob("*.py")}:
        tree = ast.parse((Path(certificate.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
        trusted = {"formats.vnnlib", "models"} if name == "results" else set()  # what is asked; the deployed network
        assert names <= own | {"checkpoint", "errors"} | trusted
        plain = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        plain |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not any(name.startswith("nanomr") for name in plain)
