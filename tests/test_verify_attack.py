"""The verifier's attacks find what is there, claim nothing that is not, and the float32 error bound bounds."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import models
from nanomr.layers import BatchNorm2d, Conv2d, Flatten, Linear, Normalize, ReLU
from nanomr.models import Model
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.bounds.crown import crown, image_box
from nanomr.verify.bounds.rounding import float32_errors, gamma
from nanomr.verify.chain import Chain
from nanomr.verify.running.attack import counterexamples, inside, paper_pgd, strict_box, targeted_pgd

SHAPE = (4, 4, 2)


def conv_net(seed, batch_norm=False):
    """A convolution, a ReLU and two linear layers, with a normalisation before, weights of several sizes."""
    draw = np.random.default_rng(seed)
    norm = {"bn": BatchNorm2d(3)} if batch_norm else {}
    first = {"normalize": Normalize((0.4, 0.6), (0.2, 0.3)), "conv": Conv2d(2, 3, 3, 2, 1)}
    layers = {**first, **norm, "relu1": ReLU(), "flatten": Flatten(),
              "fc1": Linear(12, 5, image=(2, 2, 3)), "relu2": ReLU(), "fc2": Linear(5, 4)}  # fmt: skip
    model = Model(layers, {"name": "test"}, SHAPE, seed % 1000)
    model.weights *= draw.uniform(0.5, 4)
    return model


def linear_net(weight, bias):
    """logits = x . weight + bias, as a network."""
    model = models.mlp((2, weight.shape[1]), input_shape=(1, 1, 2))
    model.children["fc1"].params["weight"][...] = weight
    model.children["fc1"].params["bias"][...] = bias
    return model


@given(seed=seeds)
def test_the_inner_float32_box_is_the_largest(seed):
    low, high = np.sort(np.random.default_rng(seed).normal(size=(2, 50)), 0)
    low32, high32 = inside(low, high)
    assert low32.dtype == high32.dtype == np.float32 and (low32 >= low).all() and (high32 <= high).all()
    assert (np.nextafter(low32, np.float32(-9)) < low).all() and (np.nextafter(high32, np.float32(9)) > high).all()
    exact = low.astype(np.float32)
    assert all(np.array_equal(end, exact) for end in inside(exact.astype(float), exact.astype(float)))


@given(seed=seeds, eps=st.sampled_from([0.0, 1e-9, 1 / 255, 8 / 255, 0.3, 1.0, 2.0]))
def test_the_strict_box_is_inside_the_real_ball_and_the_proofs_box(seed, eps):
    x = np.random.default_rng(seed).integers(0, 256, (3, 2, 2, 1)).astype(np.uint8) * np.float32(1 / 255)
    low, high = strict_box(x, eps)
    assert low.dtype == high.dtype == np.float32 and (low <= x).all() and (x <= high).all()
    for a, b, c in zip(low.ravel(), x.ravel(), high.ravel(), strict=True):
        assert Fraction(float(b)) - Fraction(float(a)) <= Fraction(eps) and Fraction(float(a)) >= 0
        assert Fraction(float(c)) - Fraction(float(b)) <= Fraction(eps) and Fraction(float(c)) <= 1
        # and no float32 neighbour further out is allowed as well
        for end, outer in ((a, np.float32(-1)), (c, np.float32(2))):
            further = Fraction(float(np.nextafter(end, outer)))
            assert (
                abs(further - Fraction(float(b))) > Fraction(eps) * (1 - Fraction(1, 10**12)) or not 0 <= further <= 1
            )
    outer_low, outer_high = image_box(x, eps)
    assert (outer_low <= low).all() and (high <= outer_high).all()


def test_a_linear_model_is_broken_exactly_where_its_margin_allows(rng):
    weight = np.array([[2.0, -1.0], [-1.0, 1.0]])
    model = linear_net(weight, (0.0, 0.0))
    chain = Chain(model)
    x = rng.uniform(0.3, 0.7, (60, 1, 1, 2)).astype(np.float32)
    margin = x.reshape(60, 2).astype(float) @ (weight[:, 0] - weight[:, 1])
    labels = np.where(margin > 0, 0, 1)
    eps = 0.1
    broken_by_algebra = abs(margin) < eps * 5  # |3| + |-2|; the box [0, 1] is far
    assert 5 < broken_by_algebra.sum() < 55
    adversarial, broken = paper_pgd(model, chain, x, labels, eps, steps=30, restarts=1)  # 26 cross the ball
    far = abs(abs(margin) - eps * 5) > 1e-6
    assert np.array_equal(broken[far], broken_by_algebra[far])
    again, real = counterexamples(model, chain, strict_box(x, eps), adversarial, labels)
    assert real[broken].all() and np.array_equal(again[broken], adversarial[broken])
    adversarial, broken = targeted_pgd(model, chain, strict_box(x, eps), labels, 1 - labels)
    assert np.array_equal(broken[far], broken_by_algebra[far])


def test_a_start_is_used_and_results_are_by_id_not_by_batch(rng):
    model = conv_net(3)
    chain = Chain(model)
    x = rng.random((6, *SHAPE), np.float32)
    labels = model.forward(x)[0].argmax(1)
    rivals = (labels + 1) % 4
    ids = np.array([5, 9, 2, 7, 1, 30])
    together = targeted_pgd(model, chain, strict_box(x, 0.05), labels, rivals, ids=ids)
    for i in range(6):
        alone = targeted_pgd(
            model, chain, strict_box(x[i : i + 1], 0.05), labels[i : i + 1], rivals[i : i + 1], ids=ids[i : i + 1]
        )
        assert alone[1][0] == together[1][i]
    # from a start that is an adversarial example no step is needed, and none is taken from anywhere else
    eps = 0.4
    box = strict_box(x, eps)
    adversarial, broken = targeted_pgd(model, chain, box, labels, rivals)
    assert broken.any()
    at = np.flatnonzero(broken)
    options = dict(steps=0, restarts=0)
    box, labels, rivals = (box[0][at], box[1][at]), labels[at], rivals[at]
    found, again = targeted_pgd(model, chain, box, labels, rivals, starts=adversarial[at], **options)
    assert again.all() and np.array_equal(found, adversarial[at])
    assert not targeted_pgd(model, chain, box, labels, rivals, starts=x[at], **options)[1].any()


def test_a_candidate_is_believed_only_if_float32_and_float64_agree_and_inside_the_box(rng):
    model = linear_net(np.array([[1.0, 0.0], [0.0, 1.0]]), (0.0, 0.0))
    chain = Chain(model)
    x = np.array([[[[0.5, 0.4]]]], np.float32)
    labels = np.array([0])
    outside = np.array([[[[0.4, 0.6]]]], np.float32)
    moved, real = counterexamples(model, chain, strict_box(x, 0.01), outside, labels)
    assert not real[0] and abs(moved - x).max() <= 0.01
    assert counterexamples(model, chain, strict_box(x, 0.1), outside, labels)[1][0]
    for broken_in in ("float32", "float64"):
        other = linear_net(np.array([[1.0, 0.0], [0.0, 1.0]]), (1.0, 0.0))  # never errs
        pair = (model, Chain(other)) if broken_in == "float32" else (other, chain)
        assert not counterexamples(*pair, strict_box(x, 0.1), outside, labels)[1][0]
    outside[...] = np.nan
    assert not counterexamples(model, chain, strict_box(x, 0.1), outside, labels)[1][0]


@fewer(0.5)
@given(seed=seeds, eps=st.sampled_from([0.0, 0.02, 0.2]))
def test_float32_logits_are_within_the_error_bound_in_any_order(seed, eps):
    model, draw = conv_net(seed), np.random.default_rng(seed)
    chain = Chain(model)
    x = draw.random((2, *SHAPE)).astype(np.float32)
    low, high = image_box(x, eps)
    rows, owner = draw.normal(size=(6, 4)), np.arange(6) // 3
    error = float32_errors(chain, low, high, crown(chain, low, high), rows, owner)
    for _ in range(10):
        inner_low, inner_high = strict_box(x, eps)
        point = np.clip(draw.choice([inner_low, inner_high]), inner_low, inner_high)
        exact = chain.forward(point.astype(np.float64))[0]
        # also the same sums in float32 in a random order, one at a time: worse than any BLAS
        for logits in (model.forward(point)[0], _shuffled(model, point, draw)):
            assert (abs(((logits.astype(np.float64) - exact)[owner] * rows).sum(1)) <= error).all()
    assert (error < 1e-2 * abs(rows).sum(1)).all() and (error > 0).all()


def _shuffled(model, x, draw):
    layers = model.children
    x = (x - layers["normalize"].buffers["mean"]) * (np.float32(1) / layers["normalize"].buffers["std"])
    conv = layers["conv"]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, i : i + 3, j : j + 3].reshape(len(x), -1) for i in (0, 2) for j in (0, 2)]
    weight = conv.params["weight"].reshape(-1, 3)
    z = np.stack([_sum(w, weight, conv.params["bias"], draw) for w in windows], 1).reshape(len(x), -1)
    z = _sum(np.maximum(z, 0), layers["fc1"].params["weight"], layers["fc1"].params["bias"], draw)
    return _sum(np.maximum(z, 0), layers["fc2"].params["weight"], layers["fc2"].params["bias"], draw)


def _sum(x, weight, bias, draw):
    terms = np.concatenate([x[:, :, None] * weight[None], np.broadcast_to(bias, (len(x), 1, len(bias)))], 1)
    total = np.zeros((len(x), len(bias)), np.float32)
    for i in draw.permutation(terms.shape[1]):
        total = total + terms[:, i]
    assert total.dtype == np.float32
    return total


def test_the_error_bound_is_of_the_size_that_one_dot_product_has():
    model = models.mlp((48, 2), input_shape=(4, 4, 3))
    model.children["fc1"].params["weight"][...] = 1
    model.children["fc1"].params["bias"][...] = 0
    low, high = np.zeros((1, 4, 4, 3)), np.ones((1, 4, 4, 3))
    error = float32_errors(Chain(model), low, high, [], np.eye(2), [0, 0])
    # 48 ones are summed with 49 roundings; before that, the normalisation's, at most 4 for each of them
    assert (error >= gamma(48) * 48).all() and (error <= gamma(49 + 5) * 48 * 1.001).all()


def test_a_batch_norm_has_no_float32_claim():
    chain = Chain(conv_net(1, batch_norm=True))
    low = np.zeros((2, *SHAPE))
    assert np.isinf(float32_errors(chain, low, low, crown(chain, low, low), np.eye(4)[:2], [0, 1])).all()


def test_a_relu_that_may_be_on_in_one_and_off_in_the_other_is_paid_for():
    """One pixel, one ReLU, around its kink: the row cannot be carried through it, in either direction."""
    model = models.mlp((1, 1, 2), input_shape=(1, 1, 1), mean=(0.5,), std=(0.5,))
    for name in ("fc1", "fc2"):
        model.children[name].params["weight"][...] = 1
        model.children[name].params["bias"][...] = 0
    chain, rows = Chain(model), np.array([[1.0, 0.0]])

    def error(low, high):
        low, high = np.full((1, 1, 1, 1), low), np.full((1, 1, 1, 1), high)
        return float32_errors(chain, low, high, crown(chain, low, high), rows, [0])[0]

    beside, at, off = error(0.6, 0.6), error(0.5, 0.5), error(0.3, 0.3)
    assert off < at and off < beside  # off, it hands nothing on
    assert at > gamma(4)  # the normalisation's rounding alone: (0.5 + 0.5) / 0.5 is 2, and passes the kink


def test_attacks_leave_images_model_and_labels_alone(rng):
    model = conv_net(5)
    x = rng.random((4, *SHAPE), np.float32)
    labels = model.forward(x)[0].argmax(1)
    kept = x.copy(), labels.copy(), model.weights.copy(), model.gradients.copy()
    paper_pgd(model, Chain(model), x, labels, 0.1, steps=3, restarts=2)
    targeted_pgd(model, Chain(model), strict_box(x, 0.1), labels, (labels + 1) % 4, starts=x)
    for before, after in zip(kept, (x, labels, model.weights, model.gradients), strict=True):
        assert np.array_equal(before, after)


def test_no_images_at_all():
    model = conv_net(2)
    x, labels = np.zeros((0, *SHAPE), np.float32), np.zeros(0, int)
    assert paper_pgd(model, Chain(model), x, labels, 0.1)[1].shape == (0,)
    with pytest.raises(ValueError, match="eps"):
        paper_pgd(model, Chain(model), x, labels, -0.1)
