"""The losses that attacks climb: values against their formulas, gradients against numerical derivatives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr.attacks import objectives
from nanomr.attacks.objectives import cross_entropy_each, dlr, dlr_targeted, margin
from nanomr.gradcheck import GradientError
from nanomr.losses import cross_entropy
from nanomr.testing.strategies import seeds

sizes = st.tuples(st.integers(1, 4), st.integers(4, 10))
EACH = {
    "cross-entropy": lambda z, y, t: cross_entropy_each(z, y),
    "margin": lambda z, y, t: margin(z, y),
    "dlr": lambda z, y, t: dlr(z, y),
    "dlr, targeted": dlr_targeted,
}
each = pytest.mark.parametrize("name", EACH)


def case(seed, shape, right=0.5):
    """Logits whose neighbours in rank are at least 0.1 apart (no ties), labels (a share is right), targets.

    No label is the third strongest class: the DLR of that error is 1 whatever the logits, and has no gradient.
    """
    draw = np.random.default_rng(seed)
    n, k = shape
    steps = draw.uniform(0.1, 1.5, shape).cumsum(1)
    z = np.take_along_axis(steps, draw.random(shape).argsort(1), 1) + draw.normal(0, 3, (n, 1))
    labels = np.where(draw.random(n) < right, z.argmax(1), draw.integers(0, k, n))
    rank = (-z).argsort(1)
    labels = np.where(labels == rank[:, 2], rank[:, 1], labels)
    return z, labels, (labels + draw.integers(1, k, n)) % k


def weighted(name, labels, targets, weight):
    """The loss as gradcheck wants it: one number, a different multiple of each image's."""

    def function(z):
        values, gradients = EACH[name](z, labels, targets)
        return (weight * values).sum(), weight[:, None] * gradients

    return function


@each
@pytest.mark.parametrize("method", ["central", "complex"])
@given(seed=seeds, shape=sizes)
def test_gradients(name, method, seed, shape):
    z, labels, targets = case(seed, shape)
    weight = np.random.default_rng(seed + 1).uniform(0.5, 2, len(z))
    rtol = {"central": 1e-6, "complex": 1e-9}[method]
    mr.gradcheck(weighted(name, labels, targets, weight), z, method=method, rtol=rtol)


@pytest.mark.parametrize("name", ["dlr", "dlr, targeted"])
def test_a_constant_denominator_is_found_out(name):
    z, labels, targets = case(0, (4, 6))

    def constant(z0):
        values, _ = EACH[name](z0, labels, targets)
        numerators = {"dlr": lambda: margin(z0, labels)}.get(name, lambda: _difference(z0, labels, targets))()
        return values.sum(), numerators[1] * (values / numerators[0])[:, None]

    with pytest.raises(GradientError, match="relative error"):
        mr.gradcheck(constant, z)


def _difference(z, labels, targets):
    rows = np.arange(len(z))
    gradient = np.zeros_like(z)
    gradient[rows, targets], gradient[rows, labels] = 1, -1
    return z[rows, targets] - z[rows, labels], gradient


@given(seed=seeds, shape=sizes)
def test_values_are_the_formulas(seed, shape):
    z, labels, targets = case(seed, shape)
    for i, (row, y, t) in enumerate(zip(z, labels, targets, strict=True)):
        one, _, three, four = sorted(row, reverse=True)[:4]
        other = max(value for k, value in enumerate(row) if k != y)
        found = {name: EACH[name](z, labels, targets)[0][i] for name in EACH}
        assert found["cross-entropy"] == pytest.approx(np.log(np.exp(row).sum()) - row[y])
        assert found["margin"] == pytest.approx(other - row[y])
        assert found["dlr"] == pytest.approx((other - row[y]) / (one - three + 1e-12))
        assert found["dlr, targeted"] == pytest.approx((row[t] - row[y]) / (one - (three + four) / 2 + 1e-12))


@each
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_is_its_own_image_of_the_same_dtype_and_nothing_else_is_touched(name, dtype):
    z, labels, targets = case(3, (7, 5))
    z = z.astype(dtype)
    before = z.copy()
    values, gradients = EACH[name](z, labels, targets)
    assert values.dtype == gradients.dtype == dtype and values.shape == (7,) and gradients.shape == z.shape
    assert np.array_equal(z, before)
    for i in range(7):
        value, gradient = EACH[name](z[i : i + 1], labels[i : i + 1], targets[i : i + 1])
        assert value[0] == values[i] and np.array_equal(gradient[0], gradients[i])


@given(seed=seeds, shape=sizes)
def test_the_ratios_see_neither_shift_nor_scale(seed, shape):
    z, labels, targets = case(seed, shape)
    for name in ("dlr", "dlr, targeted"):
        values, gradients = EACH[name](z, labels, targets)
        np.testing.assert_allclose(EACH[name](1000 * z + 7, labels, targets)[0], values, rtol=1e-9, atol=1e-12)
        assert np.all(abs(gradients.sum(1)) < 1e-9 * abs(gradients).sum(1))
        assert np.all(abs((gradients * z).sum(1)) < 1e-9 * abs(gradients * z).sum(1))


@given(seed=seeds, shape=sizes)
def test_all_of_them_are_higher_where_the_network_errs(seed, shape):
    z, labels, _ = case(seed, shape)
    right = z.argmax(1) == labels
    assert np.array_equal(margin(z, labels)[0] < 0, right) and np.array_equal(dlr(z, labels)[0] < 0, right)
    assert np.all(dlr(z, labels)[0][right] >= -1)


def test_cross_entropies_of_a_batch_have_the_mean_that_training_uses():
    z, labels, _ = case(5, (9, 10))
    values, gradients = cross_entropy_each(z, labels)
    value, gradient = cross_entropy(z, labels)
    assert values.mean() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(gradients / 9, gradient, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("gap", [1, 10, 17, 40, 80])
def test_a_confident_cross_entropy_keeps_its_digits(gap):
    """From a gap of 17 on, softmax says 1 in float32, and 1 - 1 has no gradient. exp(-gap) has, up to 103."""
    z = np.array([[gap, 0, -1]], np.float32)
    wanted = cross_entropy_each(z.astype(np.longdouble), np.array([0]))
    value, gradient = cross_entropy_each(z, np.array([0]))
    np.testing.assert_allclose(value, np.log1p(np.exp(-np.longdouble(gap)) * (1 + np.exp(-1.0))), rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted[1].astype(float), rtol=1e-6)
    assert np.all(gradient != 0)
    # ... and one that is confident and wrong is the gap itself
    value, gradient = cross_entropy_each(z, np.array([1]))
    assert value[0] == pytest.approx(np.logaddexp(gap, np.logaddexp(0, -1)), rel=1e-6)
    assert gradient[0].sum() == pytest.approx(0, abs=1e-7)


def test_huge_logits_neither_overflow_nor_warn():
    z = np.array([[3e38, -3e38, 0, 1], [-1e30, 1e30, 5, 6]], np.float32)
    value, gradient = cross_entropy_each(z / 2, np.array([0, 0]))
    assert value[0] == 0 and np.all(gradient[0] == 0) and value[1] == pytest.approx(1e30)
    for name in ("margin", "dlr", "dlr, targeted"):
        value, gradient = EACH[name](z / 4, np.array([0, 1]), np.array([2, 0]))
        assert np.isfinite(value).all() and np.isfinite(gradient).all()


@each
def test_equal_logits_give_numbers(name):
    z = np.zeros((1, 5), np.float32)
    value, gradient = EACH[name](z, np.array([0]), np.array([2]))
    assert np.isfinite(value).all() and np.isfinite(gradient).all() and gradient[0, 0] < 0 < gradient[0].max()


@pytest.mark.parametrize(("function", "least"), [("dlr", 3), ("dlr_targeted", 4)])
def test_too_few_classes_are_an_error(function, least):
    arguments = [np.array([0]), np.array([1])][: 1 if function == "dlr" else 2]
    with pytest.raises(ValueError, match=f"{function} needs at least {least} classes, the model has {least - 1}"):
        getattr(objectives, function)(np.zeros((1, least - 1)), *arguments)
    getattr(objectives, function)(np.arange(float(least))[None], *arguments)
