"""Is a hand-written gradient the derivative of its function? Two numerical derivatives to hold it against.

For y = f(x) and an upstream gradient dy, a backward pass claims dx = J^T dy. Along any direction v,
<dx, v> must equal <dy, J v>, and J v is a directional derivative, which two evaluations of f give:

- central differences: (f(x + h v) - f(x - h v)) / 2h; error about h^2 + 1e-16 / h
- the complex step:    Im f(x + i h v) / h with h = 1e-20; exact to rounding, for analytic f (no abs, max, ReLU)

The upstream gradient is random: with ones, the input gradient of a batch normalisation is identically zero, and
a check of it proves nothing.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np


class GradientError(AssertionError):
    """A gradient does not agree with the numerical derivative; the message has both numbers."""


def _inner(a, b) -> float:
    return sum(float(np.sum(p * q)) for p, q in zip(a, b, strict=True))


def directional_derivative(f: Callable, inputs: Sequence, direction: Sequence, method: str, h: float) -> list:
    """d/dt f(inputs + t direction) at t = 0, as a list of arrays. ``f`` returns an array or a tuple of them."""

    def at(step):
        y = f(*[x + step * v for x, v in zip(inputs, direction, strict=True)])
        return list(y) if isinstance(y, tuple | list) else [y]

    if method == "complex":
        return [np.imag(y) / h for y in at(1j * h)]
    return [(a - b) / (2 * h) for a, b in zip(at(h), at(-h), strict=True)]


def check_vjp(
    f: Callable, vjp: Callable, inputs: Sequence[np.ndarray], seed=0, directions=3, method="central", h=None, rtol=1e-6
) -> float:
    """Hold ``vjp(dy) -> dx`` (tuples, one per output / input) against the numerical derivative of ``f`` at ``inputs``.

    Returns the largest error, relative to the size of the terms in <dx, v>; raises GradientError above ``rtol``.
    Arrays must be float64: in float32 a difference quotient has no digits left.
    """
    inputs = [np.asarray(x) for x in inputs]
    if any(x.dtype != np.float64 for x in inputs):
        raise ValueError("gradcheck needs float64 inputs (model.astype(np.float64))")
    h = h or {"central": 1e-6, "complex": 1e-20}[method]
    rng = np.random.default_rng(seed)
    y = f(*inputs)
    outputs = list(y) if isinstance(y, tuple | list) else [y]
    worst = 0.0
    for _ in range(directions):
        dy = [rng.standard_normal(np.shape(o)) for o in outputs]
        v = [rng.standard_normal(x.shape) for x in inputs]
        dx = vjp(*dy)
        dx = list(dx) if isinstance(dx, tuple | list) else [dx]
        for x, g in zip(inputs, dx, strict=True):
            if g.shape != x.shape or g.dtype != x.dtype:
                raise GradientError(f"the gradient is {g.dtype} {g.shape}, the input {x.dtype} {x.shape}")
        claimed = _inner(dx, v)
        size = np.sqrt(sum(float(np.sum((g * u) ** 2)) for g, u in zip(dx, v, strict=True))) + 1e-30
        # A kink (of a ReLU, say) between x - h v and x + h v spoils the quotient, however right the gradient is: try
        # nearer. A wrong gradient stays wrong at every h.
        for step in [h] if method == "complex" else [h * 10.0**-k for k in range(3)]:
            measured = _inner(dy, directional_derivative(f, inputs, v, method, step))
            error = abs(claimed - measured) / (size + abs(measured))
            if error <= rtol:
                break
        worst = max(worst, error)
        if not error <= rtol:  # NaN fails too
            raise GradientError(
                f"claimed {claimed:.12g}, measured {measured:.12g} ({method}): relative error {error:.2e} > {rtol:.0e}"
            )
    return worst


def gradcheck(
    target, *inputs, train=True, tap=None, seed=0, method="central", h=None, rtol=1e-6, directions=3
) -> float:
    """Check the gradients of ``target`` at float64 ``inputs``: the worst relative error, or a GradientError.

    ``target`` is a Layer or Model (inputs: x; the input and every parameter are checked; ``tap``: a function that
    makes a fresh tap for each forward pass, whose weighted value is part of what is checked), or a function that
    returns (value, gradient by its 1st input, by its 2nd, ...), as in :mod:`nanomr.losses`.

        gradcheck(mr.layers.Conv2d(3, 8, 4, 2, 1), x)
        gradcheck(lambda a, b: mr.losses.hamming(a, b, alpha=8.0), z_plus, z_minus)
    """
    options = dict(seed=seed, method=method, h=h, rtol=rtol, directions=directions)
    if hasattr(target, "backward"):
        (x,) = inputs
        return _check_layer(target, np.asarray(x), train, tap, options)

    def value(*arrays):
        return np.asarray(target(*arrays)[0])

    def vjp(dy):
        return tuple(dy * g for g in target(*inputs)[1:])

    return check_vjp(value, vjp, inputs, **options)


def _check_layer(layer, x, train, tap, options) -> float:
    layer = copy.deepcopy(layer)
    slots = [(below, name) for _, below in layer.walk() for name in below.params]
    params = [np.array(below.params[name], np.float64) for below, name in slots]
    complex_step = train and options["method"] == "complex"

    def room_for(name, value):
        """A copy of a buffer; running statistics follow a training batch into the complex plane."""
        if value.dtype.kind != "f":
            return value.copy()
        return value.astype(np.complex128 if complex_step and name.startswith("running_") else np.float64)

    def run(x, *params):
        for (below, name), value in zip(slots, params, strict=True):
            below.params[name] = value
        looker = tap() if tap else None
        y, cache = layer.forward(x, train=train, tap=looker)
        return y, cache, looker

    def f(x, *params):
        y, _, looker = run(x, *params)
        return (y, np.asarray(looker.weight * looker.value)) if looker else y

    def vjp(dy, *d_value):
        _, cache, looker = run(x, *params)
        for below, name in slots:
            below.grads[name] = np.zeros_like(below.params[name])
        if looker:  # the tap's gradient enters with its own weight: scale it as the upstream gradient says
            looker.weight *= float(d_value[0])
        dx = layer.backward(dy, cache)
        return dx, *(below.grads[name] for below, name in slots)

    for _, below in layer.walk():
        below.buffers = {name: room_for(name, value) for name, value in below.buffers.items()}
    return check_vjp(f, vjp, [x, *params], **options)
