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
from functools import partial

import numpy as np

ROUNDING = 100 * np.finfo(np.float64).eps  # of an output, relative: what a difference of two of them may be off by


class GradientError(AssertionError):
    """A gradient does not agree with the numerical derivative; the message names each array that is wrong.

    ``errors``: {array: its relative error}, of all arrays.
    """

    def __init__(self, message: str, errors: dict[str, float] | None = None):
        super().__init__(message)
        self.errors = errors or {}


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
    f: Callable,
    vjp: Callable,
    inputs: Sequence[np.ndarray],
    seed=0,
    directions=3,
    method="central",
    h=None,
    rtol=1e-6,
    names: Sequence[str] | None = None,
) -> float:
    """Hold ``vjp(dy) -> dx`` (tuples, one per output / input) against the numerical derivative of ``f`` at ``inputs``.

    Each input is judged by itself, along directions of its own: next to the terms of a large one, a small one's would
    be lost. Returns the largest error, relative to the size of the terms in that input's <dx, v>; raises GradientError
    above ``rtol``, which says for each of the ``names`` what is wrong. What rounding alone can do to the numerical
    derivative is allowed for, so that a gradient may be 0 (of a bias before a batch norm, say).
    Arrays must be float64: in float32 a difference quotient has no digits left.
    """
    inputs = [np.asarray(x) for x in inputs]
    names = names or [f"input {i}" for i in range(1, len(inputs) + 1)]
    if any(x.dtype != np.float64 for x in inputs):
        raise ValueError("gradcheck needs float64 inputs (model.astype(np.float64))")
    h = h or {"central": 1e-6, "complex": 1e-20}[method]
    # A kink (of a ReLU, say) between x - h v and x + h v spoils the quotient, however right the gradient is: try
    # nearer. A wrong gradient stays wrong at every h.
    steps = [h] if method == "complex" else [h * 10.0**-k for k in range(3)]
    rng = np.random.default_rng(seed)
    y = f(*inputs)
    outputs = list(y) if isinstance(y, tuple | list) else [y]

    def compare(i, dy, g, v, steps=steps):
        """(relative error, claimed, measured) of the gradient g by input i along v."""
        direction = [v if k == i else np.zeros_like(x) for k, x in enumerate(inputs)]
        rounding = ROUNDING * np.linalg.norm([np.linalg.norm(d * o) for d, o in zip(dy, outputs, strict=True)])
        floor = rounding / (1 if method == "complex" else h) / rtol + 1e-30
        claimed, size = _inner([g], [v]), np.linalg.norm(g * v)
        for step in steps:
            measured = _inner(dy, directional_derivative(f, inputs, direction, method, step))
            error = abs(claimed - measured) / (size + abs(measured) + floor)
            if error <= rtol:
                break
        return float(error), claimed, measured

    worst = 0.0
    for _ in range(directions):
        dy = [rng.standard_normal(np.shape(o)) for o in outputs]
        dx = vjp(*dy)
        errors, complaints = {}, []
        for i, (x, g) in enumerate(zip(inputs, dx if isinstance(dx, tuple | list) else [dx], strict=True)):
            if g.shape != x.shape or g.dtype != x.dtype:
                raise GradientError(f"{names[i]}: the gradient is {g.dtype} {g.shape}, the array {x.dtype} {x.shape}")
            v = rng.standard_normal(x.shape)
            errors[names[i]], claimed, measured = compare(i, dy, g, v)
            if not errors[names[i]] <= rtol:  # NaN fails too
                entry = ""
                if len(complaints) < 3:  # the search takes time
                    entry = _wrong_entry(partial(compare, i, dy, g), g, v, claimed - measured, steps[:1])
                complaints.append(
                    f"{names[i]}: claimed {claimed:.12g}, measured {measured:.12g} ({method}): "
                    f"relative error {errors[names[i]]:.2e} > {rtol:.0e}{entry}"
                )
        if complaints:
            right = ", ".join(name for name, error in errors.items() if error <= rtol) or "none"
            raise GradientError("\n".join([*complaints, f"right: {right}"]), errors)
        worst = max([worst, *errors.values()])
    return worst


def _wrong_entry(compare, g, v, off, steps) -> str:
    """One wrong entry of the gradient g, in words. Halve the direction v, keep the half that is off by more, go on;
    ``off``: by how much the claim along all of v is, the sum of the halves'."""
    at = np.arange(g.size)
    if not np.isfinite(off):
        at = at[~np.isfinite(g.ravel())][:1] if not np.isfinite(g).all() else at[:1]
    while at.size > 1:
        low, high = np.array_split(at, 2)
        part = np.zeros_like(v)
        part.flat[low] = v.flat[low]
        _, claimed, measured = compare(part, steps)
        both = (low, claimed - measured), (high, off - (claimed - measured))
        at, off = max(both, key=lambda half: abs(half[1]))
    unit = np.zeros_like(v)
    unit.flat[at] = 1
    _, claimed, measured = compare(unit)
    where = ", ".join(str(k) for k in np.unravel_index(at[0], g.shape))
    return f"; at [{where}] {claimed:.6g} instead of {measured:.6g}"


def gradcheck(
    target, *inputs, train=True, tap=None, seed=0, method="central", h=None, rtol=1e-6, directions=3
) -> float:
    """Check the gradients of ``target`` at float64 ``inputs``: the worst relative error, or a GradientError.

    ``target`` is a Layer or Model (inputs: x; the input and every parameter are checked; ``tap``: a function that
    makes a fresh tap for each forward pass, whose weighted value is part of what is checked), or a function that
    returns (value, gradient by its 1st input, by its 2nd, ...), as in :mod:`nanomr.losses`. Each of them is judged by
    itself, and the error names the wrong ones ("x", "conv.weight", "input 2") with a wrong entry of each. A layer may
    be used more than once; parameter gradients must be added (``+=``), by each use.

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
    paths = {below: path for path, below in reversed(list(layer.walk()))}  # each once: a layer may be used twice
    slots = [(below, name) for below in reversed(paths) for name in below.params]
    names = ["x", *(f"{paths[below]}.{name}".lstrip(".") for below, name in slots)]
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
        once = [below.grads[name].copy() for below, name in slots]
        layer.backward(dy, cache)
        for name, g, (below, key) in zip(names[1:], once, slots, strict=True):
            rest = below.grads[key] - 2 * g
            if np.max(np.abs(rest), initial=0) > 1e-6 * np.max(np.abs(g), initial=0):
                raise GradientError(f"{name}: a second backward pass must add (+=) its gradient to the first one's")
        return dx, *once

    for _, below in layer.walk():
        below.buffers = {name: room_for(name, value) for name, value in below.buffers.items()}
    return check_vjp(f, vjp, [x, *params], names=names, **options)
