"""The checker checked: it must pass what is right, and fail what is wrong in any way."""

import numpy as np
import pytest
from contract import slots, snapshot
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

import nanomr as mr
from nanomr.gradcheck import GradientError, check_vjp, directional_derivative
from nanomr.layers import BatchNorm2d, Linear, ReLU


def cubic(x):
    """(value, gradient)"""
    return (x**3).sum(), 3 * x**2


vectors = st.builds(lambda n, seed: np.random.default_rng(seed).standard_normal(n) + 3, st.integers(1, 6), seeds)


@given(x=vectors, method=st.sampled_from(["central", "complex"]))
def test_passes_what_is_right(x, method):
    assert mr.gradcheck(cubic, x, method=method) < 1e-6


@given(x=vectors, method=st.sampled_from(["central", "complex"]), factor=st.sampled_from([0, 0.5, 0.999, 1.001, 2, -1]))
def test_fails_on_a_wrong_factor(x, method, factor):
    with pytest.raises(GradientError, match=r"claimed .* measured"):
        mr.gradcheck(lambda x: (cubic(x)[0], factor * cubic(x)[1]), x, method=method)


@given(x=vectors, at=st.integers(0, 5))
def test_fails_on_one_wrong_entry(x, at):
    wrong = cubic(x)[1]
    wrong[at % len(x)] *= 1.01
    with pytest.raises(GradientError):
        mr.gradcheck(lambda x: (cubic(x)[0], wrong), x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fails_on_a_gradient_that_is_no_number(value):
    """NaN compares false with everything: it must not slip through as 'not larger than the tolerance'."""
    x = np.array([1.0, 2.0])
    with pytest.raises(GradientError), np.errstate(invalid="ignore"):
        mr.gradcheck(lambda x: (cubic(x)[0], np.array([3.0, value])), x)


def test_fails_on_a_value_that_is_no_number():
    with pytest.raises(GradientError):
        mr.gradcheck(lambda x: (x.sum() * np.nan, np.ones_like(x)), np.ones(2))


@pytest.mark.parametrize(
    "gradient",
    [np.float32([3, 12]), np.array([[3.0, 12.0]]), np.array([3.0]), np.array([3, 12])],
    ids=["float32", "another shape", "too short", "integers"],
)
def test_fails_on_another_shape_or_dtype(gradient):
    with pytest.raises(GradientError, match="the gradient is"):
        check_vjp(lambda x: (x**3).sum(), lambda dy: (gradient,), [np.array([1.0, 2.0])])


def test_fails_on_a_missing_gradient():
    with pytest.raises(ValueError):
        check_vjp(lambda x, y: x * y, lambda dy: (dy,), [np.ones(2), np.ones(2)])


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.complex128])
def test_refuses_other_inputs_than_float64(dtype):
    with pytest.raises(ValueError, match="float64"):
        mr.gradcheck(cubic, np.ones(2, dtype))
    with pytest.raises(ValueError, match="float64"):
        mr.gradcheck(ReLU(), np.ones((1, 2), dtype))


def test_every_input_and_every_output_is_checked(rng):
    """f(x, y) = (x y, x + y): a factor in any one of the four terms shows."""
    x, y = rng.standard_normal((2, 3))

    def check(factors):
        a, b, c, d = factors
        check_vjp(lambda x, y: (x * y, x + y), lambda p, q: (a * y * p + b * q, c * x * p + d * q), [x, y])

    check([1, 1, 1, 1])
    for i in range(4):
        with pytest.raises(GradientError):
            check([1.01 if i == k else 1 for k in range(4)])


def test_every_parameter_of_a_layer_is_checked(rng):
    class Wrong(Linear):
        factor = {"weight": 1.0, "bias": 1.0}  # noqa: RUF012

        def accumulate(self, **gradients):
            super().accumulate(**{name: self.factor[name] * g for name, g in gradients.items()})

    x = rng.standard_normal((3, 4))
    layer = Wrong(4, 2)
    layer.params = {name: rng.standard_normal(p.shape) for name, p in layer.params.items()}
    mr.gradcheck(layer, x)
    for name in layer.factor:
        layer.factor = {"weight": 1.0, "bias": 1.0, name: 1.01}
        with pytest.raises(GradientError):
            mr.gradcheck(layer, x)


def test_survives_a_kink_near_the_point():
    """ReLU 1e-7 away from its kink: the first step straddles it; a nearer one does not."""
    x = np.array([[1e-7, -1e-7, 1.0, -1.0]])
    mr.gradcheck(ReLU(), x)
    for wrong in ([2, 0, 1, 0], [1, 1, 1, 0], [0, 0, 1, 0]):
        with pytest.raises(GradientError):
            check_vjp(lambda x: np.maximum(x, 0), lambda dy, wrong=wrong: (dy * wrong,), [x])


def test_the_complex_step_is_more_exact(rng):
    x = rng.standard_normal((4, 5))

    def softmax_loss(x):
        return mr.losses.cross_entropy(x, np.arange(4))

    central, exact = (mr.gradcheck(softmax_loss, x, method=m) for m in ("central", "complex"))
    assert exact < 1e-14 < 1e-12 < central < 1e-7


def test_directional_derivative():
    x, v = np.array([2.0, 3.0]), np.array([1.0, -1.0])
    for method, h, tolerance in (("central", 1e-6, 1e-8), ("complex", 1e-20, 1e-15)):
        (found,) = directional_derivative(lambda x: x**2, [x], [v], method, h)
        np.testing.assert_allclose(found, 2 * x * v, rtol=tolerance)
    product, total = directional_derivative(lambda x: (x.prod(), x.sum()), [x], [v], "complex", 1e-20)
    assert (product, total) == pytest.approx((3.0 - 2.0, 0.0))


def test_the_upstream_gradient_is_random(rng):
    """With ones, dx = 0 would pass for a batch normalisation in training mode; here it must not."""

    class Nothing(BatchNorm2d):
        def backward(self, dy, cache, param_grads=True, input_grad=True):
            return 0 * super().backward(dy, cache, param_grads, input_grad)

    layer = Nothing(2)
    layer.params = {name: rng.standard_normal(2) for name in layer.params}
    with pytest.raises(GradientError):
        mr.gradcheck(layer, rng.standard_normal((3, 2, 2, 2)))


def test_the_seed_decides(rng):
    x = rng.standard_normal(5)
    assert mr.gradcheck(cubic, x, seed=1) == mr.gradcheck(cubic, x, seed=1) != mr.gradcheck(cubic, x, seed=2)


def test_a_model_is_left_as_it_was(rng):
    """Weights, gradients, running statistics keep their values, and stay views of the flat vectors."""
    model = mr.models.preact_resnet18(width=1).astype(np.float64)
    model.gradients[...] = 1
    before = {store: snapshot(model, store) for store in ("params", "grads", "buffers")}
    mr.gradcheck(model, rng.random((2, 32, 32, 3)), directions=1)
    for store, values in before.items():
        for name, value in slots(model, store).items():
            np.testing.assert_array_equal(value, values[name], err_msg=f"{store} {name}")
    model.weights[...] = 7  # still views
    assert all((p == 7).all() for p in slots(model, "params").values())
    model.gradients[...] = 8
    assert all((g == 8).all() for g in slots(model, "grads").values())


def test_a_layer_of_its_own_is_left_as_it_was(rng):
    """Outside a model a layer has no ``grads``; it has none afterwards."""
    layer = Linear(3, 2)
    mr.gradcheck(layer, rng.standard_normal((2, 3)))
    assert layer.grads == {}
