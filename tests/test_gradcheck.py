"""The checker checked: it must pass what is right, and fail what is wrong in any way."""

import copy
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr.gradcheck import GradientError, check_vjp, directional_derivative
from nanomr.layers import BatchNorm2d, Flatten, Layer, Linear, ReLU, Sequential
from nanomr.models import Model
from nanomr.testing.contract import slots, snapshot
from nanomr.testing.strategies import seeds


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


# --- each array by itself ---------------------------------------------------------------------------------------------


class Spoiled(Linear):
    """A linear layer whose gradients pass through ``spoil``, {array: function}, on their way out."""

    def __init__(self, *sizes, **spoil):
        super().__init__(*sizes)
        self.spoil = spoil
        self.params = {name: np.random.default_rng(1).standard_normal(p.shape) for name, p in self.params.items()}

    def accumulate(self, **gradients):
        super().accumulate(**{name: self.spoil.get(name, np.copy)(g) for name, g in gradients.items()})

    def transpose(self, dy, x):
        return self.spoil.get("x", np.copy)(super().transpose(dy, x))


def entry(at, change):
    """A gradient with one entry changed."""

    def spoil(g):
        g = g.copy()
        g[at] = change(g[at])
        return g

    return spoil


SPOILS = {
    "zero": np.zeros_like,
    "a flipped sign": np.negative,
    "a missing factor": lambda g: g / 2,
    "a factor of 1.01": lambda g: 1.01 * g,
    "transposed": lambda g: g.ravel()[::-1].reshape(g.shape),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("array", ["x", "weight", "bias"])
def test_the_error_names_the_array_that_is_wrong(array, spoil, rng):
    """And no other: the rest is said to be right. Inputs are large, so that the bias is a small part of the output."""
    x = 1e4 * rng.standard_normal((6, 5))
    assert mr.gradcheck(Spoiled(5, 4), x) < 1e-6
    with pytest.raises(GradientError, match=f"^{array}: claimed .* measured ") as caught:
        mr.gradcheck(Spoiled(5, 4, **{array: SPOILS[spoil]}), x)
    errors = caught.value.errors
    assert errors.keys() == {"x", "weight", "bias"}
    assert {name for name, error in errors.items() if error > 1e-6} == {array}
    assert str(caught.value).endswith("right: " + ", ".join(name for name in errors if name != array))


def test_all_wrong_arrays_are_named(rng):
    with pytest.raises(GradientError, match=r"(?s)^weight: .*\nbias: .*\nright: x$"):
        mr.gradcheck(Spoiled(5, 4, weight=np.negative, bias=np.negative), rng.standard_normal((6, 5)))


@pytest.mark.parametrize("change", [np.negative, lambda g: 0.0, lambda g: 1.01 * g, lambda g: np.nan])
def test_one_wrong_entry_of_a_large_gradient_is_found(change, rng):
    """Of 60,000, behind an input whose own gradient is right: the error says which it is, and what it should be."""
    x = rng.standard_normal((4, 300))
    layer = Spoiled(300, 200, weight=entry((217, 31), change))
    with pytest.raises(
        GradientError, match=r"^weight: .*; at \[217, 31\] \S+ instead of \S+\nright: x, bias$"
    ) as caught:
        mr.gradcheck(layer, x)
    claimed, measured = re.search(r"at \[217, 31\] (\S+) instead of (\S+)", str(caught.value)).groups()
    assert float(claimed) == pytest.approx(change(float(measured)), rel=1e-4, nan_ok=True)


def test_one_wrong_entry_of_an_input_is_found(rng):
    a, b = rng.standard_normal((2, 50, 40))
    wrong = entry((3, 39), lambda g: 1.1 * g)
    with pytest.raises(GradientError, match=r"^input 2: .*; at \[3, 39\] .*\nright: input 1$"):
        mr.gradcheck(lambda a, b: ((a * b).sum(), b, wrong(a)), a, b)


def test_a_gradient_may_be_zero(rng):
    """Of a bias before a batch normalisation: 1e-16 claimed, 1e-10 measured, and both are right."""
    layer = Sequential({"fc": Spoiled(5, 4), "image": Images(), "bn": BatchNorm2d(4)})
    layer.children["bn"].params = {name: rng.standard_normal(4) for name in ("weight", "bias")}
    x = rng.standard_normal((6, 5))
    assert mr.gradcheck(layer, x) < 1e-6
    layer.children["fc"].spoil["bias"] = lambda g: g + 1e-4
    with pytest.raises(GradientError, match=r"^fc\.bias: "):
        mr.gradcheck(layer, x)


class Images(Layer):
    """(N, C) to (N, 1, 1, C)."""

    def forward(self, x, train=False, tap=None):
        return x[:, None, None], None

    def backward(self, dy, cache, **options):
        return dy[:, 0, 0]


class Assigns(Spoiled):
    def accumulate(self, **gradients):
        self.grads.update(gradients)


class AssignsInPlace(Spoiled):
    def accumulate(self, **gradients):
        for name, gradient in gradients.items():
            self.grads[name][...] = gradient


@pytest.mark.parametrize("kind", [Assigns, AssignsInPlace])
def test_a_gradient_that_is_assigned_is_noticed(kind, rng):
    with pytest.raises(GradientError, match=r"^weight: .* must add \(\+=\)"):
        mr.gradcheck(kind(5, 4), rng.standard_normal((3, 5)))


# --- a layer that is used twice ---------------------------------------------------------------------------------------


def twice(layer, **model):
    children = {"first": layer, "relu": ReLU(), "second": layer}
    if model:
        return Model({"flatten": Flatten(), **children}, "twice", (1, 2, 2)).astype(np.float64)
    return Sequential(children)


@pytest.mark.parametrize("inside", [{}, {"model": True}], ids=["sequential", "model"])
def test_a_layer_that_is_used_twice(inside, rng):
    """Its gradient is the sum over both uses, and its parameters move in both at once."""
    x = rng.standard_normal((5, 1, 2, 2) if inside else (5, 4))
    layer = Spoiled(4, 4)
    assert mr.gradcheck(twice(layer, **inside), x) < 1e-6
    with pytest.raises(GradientError, match=r"^first\.weight: "):
        mr.gradcheck(twice(Spoiled(4, 4, weight=np.negative), **inside), x)
    with pytest.raises(GradientError, match=r"^first\.weight: .* must add"):
        mr.gradcheck(twice(Assigns(4, 4), **inside), x)


def test_a_shared_layer_is_packed_once(rng):
    """The optimiser's flat vectors hold each parameter once, in a copy of the model, too."""
    model = twice(Spoiled(4, 4), model=True)
    for network in (model, copy.deepcopy(model)):
        assert network.weights.shape == network.gradients.shape == (20,)
        network.weights[...] = 3
        assert all((p == 3).all() for p in slots(network, "params").values())
        assert network.children["first"] is network.children["second"]


# --- what the point and the seed do -----------------------------------------------------------------------------------


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
