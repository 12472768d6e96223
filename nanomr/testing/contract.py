"""The contract of ``nanomr/layers.py`` as executable checks, and for every check the mutants that it must catch.

A ``Case`` is a layer (or a model) with an input, on a CPU or on a device. Each check takes a case and raises
AssertionError where the contract is broken. ``MUTANTS`` maps each check to broken versions of ``forward`` or
``backward``: the check must pass on the layer itself, and must not on any mutant of it. A check that lets a mutant live
proves nothing.
"""

import copy
from dataclasses import dataclass

import numpy as np

import nanomr as mr
from nanomr.backend import array_module, to_device, to_numpy
from nanomr.layers import BatchNorm2d, Layer


@dataclass
class Case:
    layer: Layer
    x: np.ndarray
    train: bool = True
    view: bool = False  # may the output be a view of the input, as a reshape is?

    def forward(self):
        return self.layer.forward(self.x, train=self.train)

    def upstream(self, y, seed=1):
        """A random dy. Ones would hide errors: see test_ones_upstream_prove_nothing_of_batchnorm."""
        return array_module(y).asarray(np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype))

    def other(self):
        """The same layer with other images."""
        x = (exact(self.x)[::-1] * 0.7 + 0.1).astype(self.x.dtype)
        return Case(self.layer, array_module(self.x).asarray(x), self.train)


def prepare(layer: Layer, rng: np.random.Generator, dtype=np.float64) -> Layer:
    """Random parameters, zero gradients, and running statistics worth normalising with; all of this dtype."""
    for _, below in layer.walk():
        for name, value in below.params.items():
            scale = 1.0 if isinstance(below, BatchNorm2d) else np.prod(value.shape[:-1]) ** -0.5
            value[...] = (isinstance(below, BatchNorm2d) and name == "weight") + 0.5 * scale * rng.standard_normal(
                value.shape
            )
        if isinstance(below, BatchNorm2d):
            below.buffers["running_mean"][...] = rng.standard_normal(below.buffers["running_mean"].shape)
            below.buffers["running_var"][...] = rng.uniform(0.5, 2, below.buffers["running_var"].shape)
    return cast(layer, dtype)


def cast(layer: Layer, dtype) -> Layer:
    """Parameters and buffers in this dtype, gradients zero. A model does this itself."""
    if hasattr(layer, "astype"):
        layer.astype(dtype)
        return layer
    for _, below in layer.walk():
        below.params = {name: value.astype(dtype) for name, value in below.params.items()}
        below.grads = {name: np.zeros_like(value) for name, value in below.params.items()}
        below.buffers = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in below.buffers.items()}
    return layer


def slots(layer, store):
    """{dotted name: array} of ``params``, ``grads`` or ``buffers``, everywhere below."""
    return {f"{path}.{name}": v for path, below in layer.walk() for name, v in getattr(below, store).items()}


def snapshot(layer, store):
    return {name: v.copy() for name, v in slots(layer, store).items()}


def clear_grads(layer):
    for gradient in slots(layer, "grads").values():
        gradient[...] = 0


def exact(x):
    """``x`` as a NumPy array in which numbers can be computed with: bfloat16 becomes float32."""
    x = to_numpy(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def same(found, expected, what, tolerance=None):
    """Equal to rounding: one summation order is as good as another."""
    name = expected.dtype.name if hasattr(expected, "dtype") else "float64"
    found, expected = exact(found), exact(expected)
    tolerance = tolerance or {"float64": 1e-12, "bfloat16": 2.0**-7}.get(name, 1e-5)
    scale = float(np.max(np.abs(expected), initial=0.0)) + 1e-30
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale, err_msg=what)


def require(condition, what):
    """``assert`` that ``python -O`` does not take away."""
    if not condition:
        raise AssertionError(what)


def equal(found, expected, what):
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected), err_msg=what)


def overlap(a, b):
    """Exact for NumPy; on a device, where CuPy would sort all addresses, by the ends of the two."""
    return (np.shares_memory if array_module(a) is np else np.may_share_memory)(a, b)


def same_grads(found, expected, what):
    require(found.keys() == expected.keys(), f"{what}: gradients of {[*found]}, not of {[*expected]}")
    for name in expected:
        same(found[name], expected[name], f"{what}: {name}")


def gradients(case, dy=None, **options):
    """(dx, parameter gradients) of one forward and backward pass from zero."""
    clear_grads(case.layer)
    y, cache = case.forward()
    dx = case.layer.backward(case.upstream(y) if dy is None else dy, cache, **options)
    return dx, snapshot(case.layer, "grads")


# --- the checks -------------------------------------------------------------------------------------------------------


def check_vjp(case):
    """<dx, v> = <dy, J v> for the input and for each parameter, along a random direction of its own."""
    mr.gradcheck(case.layer, case.x, train=case.train, directions=1)


def check_jacobian(case):
    """Every entry of the Jacobian, one unit vector of dy and one step of an input at a time; for tiny shapes."""
    layer, h = case.layer, 1e-6
    y, cache = case.forward()
    params = slots(layer, "params")
    claimed = {name: np.empty((y.size, p.size)) for name, p in [("x", case.x), *params.items()]}
    for k in range(y.size):
        clear_grads(layer)
        unit = np.zeros(y.size)
        unit[k] = 1
        claimed["x"][k] = layer.backward(unit.reshape(y.shape), cache).ravel()
        for name, gradient in slots(layer, "grads").items():
            claimed[name][k] = gradient.ravel()
    for name, p in [("x", case.x), *params.items()]:
        error, size = np.empty((y.size, p.size)), 0.1 * np.abs(y).max()  # for rounding, 1e-16 |y| / h
        for j, at in enumerate(np.ndindex(p.shape)):
            kept, errors = p[at], []
            for step in (h, h / 30):  # two: a ReLU's kink may lie within the first; a wrong gradient is wrong at both
                p[at] = kept + step
                above = case.forward()[0].copy()
                p[at] = kept - step
                quotient = (above - case.forward()[0]).ravel() / (2 * step)
                errors.append(np.abs(quotient - claimed[name][:, j]))
                size = max(size, np.abs(quotient).max())
            p[at] = kept
            error[:, j] = np.minimum(*errors)
        require(error.max() <= 1e-7 * size, f"the Jacobian by {name} is off by {error.max()} of {size}")


def check_unchanged(case):
    """Neither pass writes to its arguments, nor to the weights."""
    layer, x = case.layer, case.x.copy()
    before = snapshot(layer, "params")
    y, cache = case.forward()
    kept_y, dy = y.copy(), case.upstream(y)
    kept_dy = dy.copy()
    layer.backward(dy, cache)
    for found, expected, what in ((case.x, x, "x"), (y, kept_y, "y"), (dy, kept_dy, "dy")):
        equal(found, expected, f"{what} was changed")
    for name, value in slots(layer, "params").items():
        equal(value, before[name], f"{name} was changed")


def check_memory(case):
    """Results have memory of their own, so that a caller may write to them (attacks step in place)."""
    y, cache = case.forward()
    dy = case.upstream(y)
    dx = case.layer.backward(dy, cache)
    require(not overlap(dx, case.x), "dx lies in x")
    require(case.view or not overlap(y, case.x), "y lies in x")
    require(case.view or not overlap(dx, dy), "dx lies in dy")


def check_two_caches(case):
    """Two forward passes may be alive at once, and go back in either order."""
    other, results = case.other(), []
    for first in (0, 1):
        runs = [c.forward() for c in (case, other)]
        found = [None, None]
        for i in (first, 1 - first):
            clear_grads(case.layer)
            y, cache = runs[i]
            found[i] = case.layer.backward(case.upstream(y), cache), snapshot(case.layer, "grads")
        results.append(found)
    alone = [gradients(c) for c in (case, other)]
    for found in results:
        for (dx, grads), (dx_alone, grads_alone) in zip(found, alone, strict=True):
            same(dx, dx_alone, "dx, with another cache alive")
            same_grads(grads, grads_alone, "with another cache alive")


def check_accumulates(case):
    """Parameter gradients are added: the same backward pass again doubles them. dx is not added."""
    clear_grads(case.layer)
    y, cache = case.forward()
    dy = case.upstream(y)
    first, once = case.layer.backward(dy, cache), snapshot(case.layer, "grads")
    second, twice = case.layer.backward(dy, cache), snapshot(case.layer, "grads")
    same_grads(twice, {name: 2 * value for name, value in once.items()}, "a second backward pass")
    same(second, first, "dx of a second backward pass")


def check_param_grads_off(case):
    """``param_grads=False``, as attacks use it: the same dx, and ``grads`` as they were."""
    dx, _ = gradients(case)
    lean, untouched = gradients(case, param_grads=False)
    same(lean, dx, "dx without parameter gradients")
    for name, value in untouched.items():
        equal(value, 0, f"{name} was touched")


def check_input_grad_off(case):
    """``input_grad=False``, as training uses it for the images: None, and the same parameter gradients."""
    _, grads = gradients(case)
    nothing, lean = gradients(case, input_grad=False)
    require(nothing is None, "input_grad=False must return None")
    same_grads(lean, grads, "without the input's gradient")


def check_dtype(case):
    """dtype in = dtype out: one float64 scalar of NumPy's in the wrong place would double the cost of everything."""
    for dtype in (np.float32, np.float64):
        layer = cast(copy.deepcopy(case.layer), dtype)
        x = case.x.astype(dtype)
        y, cache = layer.forward(x, train=case.train)
        dy = case.upstream(y).astype(dtype)  # a y that was promoted is found below; its dy would be refused
        dx = layer.backward(dy, cache)
        for what, array in (("y", y), ("dx", dx), *slots(layer, "grads").items(), *slots(layer, "buffers").items()):
            require(array.dtype == dtype or array.dtype.kind == "i", f"{what} is {array.dtype}, not {np.dtype(dtype)}")


def check_batch_mates(case):
    """In evaluation mode an image's result, and its gradient, do not depend on the rest of the batch."""
    layer = case.layer
    y, cache = layer.forward(case.x, train=False)
    dy = case.upstream(y)
    dx = layer.backward(dy, cache)
    for i in range(len(case.x)):
        y_alone, cache = layer.forward(case.x[i : i + 1], train=False)
        same(y_alone, y[i : i + 1], "y of an image alone")
        same(layer.backward(dy[i : i + 1], cache), dx[i : i + 1], "dx of an image alone")


CHECKS = {
    f.__name__.removeprefix("check_"): f
    for f in (
        check_vjp,
        check_jacobian,
        check_unchanged,
        check_memory,
        check_two_caches,
        check_accumulates,
        check_param_grads_off,
        check_input_grad_off,
        check_dtype,
        check_batch_mates,
    )
}


# --- the mutants ------------------------------------------------------------------------------------------------------


class Mutant(Layer):
    """A layer with one defect. ``children`` and parameters are the original's."""

    needs_params = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name == "inner" or name.startswith("__"):  # copy.deepcopy looks before ``inner`` is there
            raise AttributeError(name)
        return getattr(self.inner, name)

    @classmethod
    def is_a_defect_of(cls, case: Case) -> bool:
        """Could this case tell the mutant from the layer at all?"""
        return case.layer.has_params or not cls.needs_params

    @property
    def has_params(self):
        return self.inner.has_params

    def walk(self, prefix=""):
        yield from self.inner.walk(prefix)

    def forward(self, x, train=False, tap=None):
        return self.inner.forward(x, train=train, tap=tap)

    def backward(self, dy, cache, **options):
        return self.inner.backward(dy, cache, **options)


class FromHost(Mutant):
    """No defect: the layer computes on the GPU, but takes and gives NumPy arrays, which is all that gradcheck knows."""

    def _move(self, device):
        for _, below in self.inner.walk():
            for store in (below.params, below.grads, below.buffers):
                store.update({name: to_device(value, device) for name, value in store.items()})

    def forward(self, x, train=False, tap=None):
        self._move("gpu")
        y, cache = super().forward(to_device(x, "gpu"), train, tap)
        return to_numpy(y), cache

    def backward(self, dy, cache, **options):
        self._move("gpu")
        dx = super().backward(to_device(dy, "gpu"), cache, **options)
        self._move("cpu")
        return to_numpy(dx)


class ScalesDx(Mutant):
    def backward(self, dy, cache, **options):
        dx = super().backward(dy, cache, **options)
        return dx if dx is None else 1.01 * dx


class ReversesDx(Mutant):
    """A wrong transpose: all numbers are there, in other places."""

    def backward(self, dy, cache, **options):
        dx = super().backward(dy, cache, **options)
        return dx.reshape(-1)[::-1].reshape(dx.shape) if dx.size > 1 else -dx


class DropsATerm(Mutant):
    """One entry of dx, the largest, is forgotten."""

    def backward(self, dy, cache, **options):
        dx = super().backward(dy, cache, **options).copy()
        dx[np.unravel_index(np.abs(dx).argmax(), dx.shape)] = 0
        return dx


class ScalesAParameterGradient(Mutant):
    """One parameter's gradient, the first one's that is not zero, is 1 % too large."""

    needs_params = True

    def backward(self, dy, cache, **options):
        before = snapshot(self.inner, "grads")
        dx = super().backward(dy, cache, **options)
        for name, gradient in slots(self.inner, "grads").items():
            if np.any(gradient != before[name]):
                gradient += 0.01 * (gradient - before[name])
                break
        return dx


class ForgetsAParameter(Mutant):
    """The last parameter's gradient is never added."""

    needs_params = True

    def backward(self, dy, cache, **options):
        before = snapshot(self.inner, "grads")
        dx = super().backward(dy, cache, **options)
        name, gradient = list(slots(self.inner, "grads").items())[-1]
        gradient[...] = before[name]
        return dx


class WritesX(Mutant):
    def forward(self, x, train=False, tap=None):
        result = super().forward(x, train, tap)
        x *= 0.5
        return result


class WritesDy(Mutant):
    def backward(self, dy, cache, **options):
        dx = super().backward(dy, cache, **options)
        dy *= 0.5
        return dx


class WritesWeights(Mutant):
    needs_params = True

    def forward(self, x, train=False, tap=None):
        result = super().forward(x, train, tap)
        next(iter(slots(self.inner, "params").values()))[...] += 1
        return result


class ReturnsX(Mutant):
    """dx is written over x, to save memory."""

    def backward(self, dy, cache, **options):
        dx = super().backward(dy, cache, **options)
        self.x[...] = dx
        return self.x

    def forward(self, x, train=False, tap=None):
        self.x = x
        return super().forward(x, train, tap)


class KeepsTheCache(Mutant):
    """self.cache instead of a returned one: the second forward pass overwrites the first."""

    @classmethod
    def is_a_defect_of(cls, case):
        """Not where nothing of the input is needed on the way back (a reshape, an average)."""
        dy = case.upstream(case.forward()[0])
        (dx, grads), (other_dx, other_grads) = (gradients(c, dy) for c in (case, case.other()))
        pairs = zip([dx, *grads.values()], [other_dx, *other_grads.values()], strict=True)
        return any(np.any(exact(a) != exact(b)) for a, b in pairs)

    def forward(self, x, train=False, tap=None):
        y, self.cache = super().forward(x, train, tap)
        return y, None

    def backward(self, dy, cache, **options):
        return super().backward(dy, self.cache, **options)


class Assigns(Mutant):
    """= where += is due."""

    needs_params = True

    def backward(self, dy, cache, param_grads=True, input_grad=True):
        if param_grads:
            clear_grads(self.inner)
        return super().backward(dy, cache, param_grads=param_grads, input_grad=input_grad)


class AlwaysParamGrads(Mutant):
    needs_params = True

    def backward(self, dy, cache, param_grads=True, input_grad=True):
        return super().backward(dy, cache, input_grad=input_grad)


class OtherDxWithoutParamGrads(Mutant):
    def backward(self, dy, cache, param_grads=True, input_grad=True):
        dx = super().backward(dy, cache, param_grads=param_grads, input_grad=input_grad)
        return dx if param_grads else 2 * dx


class AlwaysInputGrad(Mutant):
    def backward(self, dy, cache, param_grads=True, input_grad=True):
        return super().backward(dy, cache, param_grads=param_grads)


class SkipsAllWithoutInputGrad(Mutant):
    needs_params = True

    def backward(self, dy, cache, param_grads=True, input_grad=True):
        if input_grad:
            return super().backward(dy, cache, param_grads=param_grads)
        return None


class PromotesY(Mutant):
    def forward(self, x, train=False, tap=None):
        y, cache = super().forward(x, train, tap)
        return y * np.float64(1), cache


class PromotesDx(Mutant):
    def backward(self, dy, cache, **options):
        dx = super().backward(dy, cache, **options)
        return dx if dx is None else dx * np.float64(1)


class LooksAtTheBatch(Mutant):
    """Evaluation with the batch's own mean, as a batch normalisation left in training mode."""

    def forward(self, x, train=False, tap=None):
        return super().forward(x - x.mean(0), train, tap)


MUTANTS = {
    "vjp": (ScalesDx, ReversesDx, DropsATerm, ScalesAParameterGradient, ForgetsAParameter),
    "jacobian": (ScalesDx, ReversesDx, DropsATerm, ScalesAParameterGradient, ForgetsAParameter),
    "unchanged": (WritesX, WritesDy, WritesWeights),
    "memory": (ReturnsX,),
    "two_caches": (KeepsTheCache,),
    "accumulates": (Assigns,),
    "param_grads_off": (AlwaysParamGrads, OtherDxWithoutParamGrads),
    "input_grad_off": (AlwaysInputGrad, SkipsAllWithoutInputGrad),
    "dtype": (PromotesY, PromotesDx),
    "batch_mates": (LooksAtTheBatch,),
}


def is_caught(check, mutant: type[Mutant], case: Case) -> bool:
    """Does ``check`` fail on this mutant of a case? Works on a copy: some mutants write where they should not."""
    case = copy.deepcopy(case)
    try:
        check(Case(mutant(case.layer), case.x, case.train, case.view))
    except AssertionError:
        return True
    return False
