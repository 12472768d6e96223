"""Linear bounds, carried backwards: CROWN (Zhang et al. 2018) and alpha-CROWN (Xu et al. 2021).

Over a box of images, every unstable ReLU lies between two lines; going back through the layers with the line that a
coefficient's sign asks for turns rows . z_k into a linear function of the image that is below it everywhere in the
box. Each slope in [0, 1] of the lower lines gives a valid bound: alpha-CROWN climbs to better ones, by a gradient
derived by hand. ``docs/derivations/crown.md``.

All in the dtype of the chain: float64 for what is claimed, float32 only to search.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ...layers import Conv2d, Normalize
from ...ops.reference import linf_bounds
from ..chain import Chain
from .interval import propagate

ROWS = 64  # rows carried back at once: their coefficients should stay in the cache


class Box(NamedTuple):
    """A box of images: centre +- radius, each (B, H, W, C)."""

    centre: np.ndarray
    radius: np.ndarray

    @classmethod
    def between(cls, low, high) -> "Box":
        return cls(0.5 * (low + high), 0.5 * (high - low))


class Lines(NamedTuple):
    """Lines around the ReLUs of one layer, for each box, (B, ...) each: lower z <= relu(z) <= upper z + offset.

    A ReLU that cannot be negative (or positive) in the box is the line z (or 0) itself.
    """

    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray
    unstable: np.ndarray  # bool

    @classmethod
    def around(cls, low, high) -> "Lines":
        """From bounds of the ReLUs' inputs. The lower slope is the one with the smaller area: 1 if high > -low.

        A NaN bound makes NaN lines, so that whatever follows from them proves nothing.
        """
        unstable = (low < 0) & (high > 0)
        upper = np.where(unstable, high / np.where(unstable, high - low, 1), low >= 0)
        upper = np.where(np.isnan(low) | np.isnan(high), np.nan, upper)
        offset = np.where(unstable, -low * upper, 0 * upper)
        lower = np.where(unstable, high > -low, upper)
        return cls(lower, upper, offset, unstable)


class Bound(NamedTuple):
    """``value`` (S,) <= rows . z over the box, and how it came about."""

    value: np.ndarray
    image: np.ndarray  # (S, H, W, C): the linear function's coefficients on the image
    relus: list[np.ndarray]  # (S, ...) for each ReLU layer: the coefficients on its output


def inner(a, b):
    """The sum of the products of each row of ``a`` (S, ...) with that of ``b``, or with ``b`` itself: (S,)."""
    a = a.reshape(len(a), -1)
    return a @ b.ravel() if b.size == a.shape[1] else np.einsum("ij,ij->i", a, b.reshape(len(b), -1))


def gather(box: Box, owner):
    """Of arrays (B, ...), a row for each owner. Nothing is gathered where there is one box: it broadcasts."""
    owner = np.asarray(owner)
    return (lambda values: values) if len(box.centre) == 1 else (lambda values: values[owner])


def relaxed(line: Lines, of, a, slopes=None):
    """(coefficients on the inputs of a layer of ReLUs, constants (S,)): never above the coefficients ``a`` (S, ...) on
    their outputs."""
    negative, slope = np.minimum(a, 0), of(line.lower)
    if slopes is not None:
        slope = np.where(of(line.unstable), slopes, slope)
    return (a - negative) * slope + negative * of(line.upper), inner(negative, of(line.offset))


def lower(chain: Chain, box: Box, lines: list[Lines], rows, owner, slopes=None, forces=None) -> Bound:
    """Lower bounds of rows . z over boxes, z the output of stage ``len(lines)`` (the logits, with all lines).

    rows (S, *z's shape); owner (S,): which of the B boxes and lines each row is about. ``slopes``: for each ReLU
    layer (S, ...) in [0, 1], the lower lines of the unstable ReLUs (by default those of ``lines``). ``forces``: for
    each ReLU layer None or (S, ...), added to the coefficients of its input: beta-CROWN's multipliers, with signs.
    """
    of = gather(box, owner)
    a, value = np.asarray(rows, chain.dtype), np.zeros(len(rows), chain.dtype)
    relus: list = [None] * len(lines)
    for k in range(len(lines), -1, -1):
        stage = chain.stages[k]
        value += inner(a, stage.bias)
        a = stage.transpose(a)
        if k:
            relus[k - 1] = a
            a, constant = relaxed(lines[k - 1], of, a, None if slopes is None else slopes[k - 1])
            value += constant
            if forces is not None and forces[k - 1] is not None:
                a += forces[k - 1]
    value += inner(a, of(box.centre)) - inner(abs(a), of(box.radius))
    return Bound(value, a, relus)


# --- bounds of every ReLU's input -------------------------------------------------------------------------------------


def crown(chain: Chain, low, high) -> list[tuple]:
    """[(low, high) (B, ...) of each ReLU layer's input] over the boxes of images [low, high], (B, H, W, C) each.

    Interval bounds, and where they leave a ReLU unstable its CROWN bounds, if these are better.
    """
    box, found, lines = Box.between(np.asarray(low, chain.dtype), np.asarray(high, chain.dtype)), [], []
    centre, radius = box
    for k, stage in enumerate(chain.stages[:-1]):
        if k:
            z_low, z_high = (np.maximum(z, 0) for z in found[-1])
            centre, radius = Box.between(z_low, z_high)
        for layer in stage.layers:
            centre, radius = propagate(layer, centre, radius, [])
        z_low, z_high = centre - radius, centre + radius
        if k:
            if k == 1 and _is_conv_pair(chain):
                _patches(chain, box, lines, z_low, z_high)
            else:
                one_by_one(partial(lower, chain), box, lines, z_low, z_high)
        found.append((z_low, z_high))
        lines.append(Lines.around(z_low, z_high))
    return found


def one_by_one(bound, box, lines, low, high, most=np.inf):
    """Improve low and high, in place, of the ReLUs that they leave unstable: a row for each side of each.

    ``bound(box, lines, rows, owner)`` as :func:`lower`'s. A box with more than ``most`` such ReLUs is left as it is.
    """
    unstable = (low < 0) & (high > 0)
    few = unstable.reshape(len(low), -1).sum(1) <= most
    unstable = np.argwhere(unstable & few.reshape(-1, *[1] * (low.ndim - 1)))
    for first in range(0, len(unstable), ROWS // 2):
        owner, *unit = at = tuple(unstable[first : first + ROWS // 2].T)
        each = np.arange(len(owner))
        rows = np.zeros((2, len(owner), *low.shape[1:]), low.dtype)
        rows[0, each, *unit], rows[1, each, *unit] = 1, -1
        part, where = np.unique(owner, return_inverse=True)  # usually few images
        found = bound(Box(*(b[part] for b in box)), [Lines(*(v[part] for v in n)) for n in lines],
                      rows.reshape(-1, *low.shape[1:]), np.tile(where, 2)).value  # fmt: skip
        low[at] = np.maximum(low[at], found[: len(owner)])
        high[at] = np.minimum(high[at], -found[len(owner) :])


def _is_conv_pair(chain: Chain) -> bool:
    """Do the first two stages consist of one convolution each, with square kernels, after a normalisation?"""
    *before, conv1 = chain.stages[0].layers or [None]
    pair = [conv1, *chain.stages[1].layers]
    return (
        all(isinstance(layer, Normalize) for layer in before)
        and [type(layer) for layer in pair] == [Conv2d, Conv2d]
        and all(kernel[0] == kernel[1] for kernel in (conv.params["weight"].shape for conv in pair))
    )


def _windows(x, size, stride, padding):
    """Views (N, Ho, Wo, size, size, C) of the windows that a convolution sees, the padding zero."""
    top, bottom, left, right = padding
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def _patches(chain, box, lines, low, high):
    """:func:`one_by_one` for a second convolution: its ReLU sees a small patch of the image, and going back to the
    patch is one matrix for every position: a matrix product an image."""
    *before, conv1 = chain.stages[0].layers
    conv2 = chain.stages[1].layers[0]
    (k1, _, c0, c1), (k2, _, _, c2) = conv1.params["weight"].shape, conv2.params["weight"].shape
    s1, s2 = conv1.stride, conv2.stride
    size, stride = (k2 - 1) * s1 + k1, s1 * s2
    back = np.zeros((k2, k2, c1, size, size, c0), chain.dtype)
    for p in range(k2):
        for q in range(k2):
            at = slice(s1 * p, s1 * p + k1), slice(s1 * q, s1 * q + k1)
            back[(p, q, slice(None), *at)] = conv1.params["weight"].transpose(3, 0, 1, 2)
    back = back.reshape(k2 * k2 * c1, -1)
    centre, radius = box
    for layer in before:
        centre, radius = propagate(layer, centre, radius, [])
    padding = [a * s1 + b for a, b in zip(conv2.padding, conv1.padding, strict=True)]
    images = [_windows(x, size, stride, padding) for x in (centre, radius)]
    slopes = [_windows(x, k2, s2, conv2.padding) for x in (lines[0].lower, lines[0].upper, lines[0].offset)]
    weight = conv2.params["weight"].reshape(-1, c2).T
    weight = np.maximum(weight, 0), np.minimum(weight, 0)
    bias1, bias2 = (np.broadcast_to(c.params.get("bias", 0.0), n) for c, n in ((conv1, c1), (conv2, c2)))
    bias1 = np.tile(bias1, k2 * k2)
    for i in range(len(low)):
        row, column, channel = np.nonzero((low[i] < 0) & (high[i] > 0))
        for first in range(0, len(row), ROWS):
            at = row[first : first + ROWS], column[first : first + ROWS]
            c, units = channel[first : first + ROWS], len(at[0])
            positive, negative = weight[0][c], weight[1][c]
            line, upper, offset = (s[i][at].reshape(units, -1) for s in slopes)
            a = np.concatenate([positive * line + negative * upper, positive * upper + negative * line])
            constant = a @ bias1 + np.tile(bias2[c], 2)
            constant += np.concatenate([inner(negative, offset), inner(positive, offset)])
            a = a @ back
            middle, width = (np.tile(x[i][at].reshape(units, -1), (2, 1)) for x in images)
            middle, width = inner(a, middle) + constant, inner(abs(a), width)
            at = (i, *at, c)
            low[at] = np.maximum(low[at], (middle - width)[:units])
            high[at] = np.minimum(high[at], (middle + width)[units:])


# --- margins, and the search for better slopes ------------------------------------------------------------------------


def margin_rows(labels, rivals, classes: int, dtype=np.float64):
    """Rows (S, K) whose product with the logits is logit[label] - logit[rival]; labels and rivals (S,)."""
    rows = np.zeros((len(labels), classes), dtype)
    rows[np.arange(len(labels)), labels] += 1
    rows[np.arange(len(labels)), rivals] -= 1
    return rows


def minimiser(box: Box, coefficients, owner):
    """The corner of the box where the linear function of the image is smallest, (S, H, W, C)."""
    return box.centre[owner] - np.sign(coefficients) * box.radius[owner]


def slope_gradients(chain: Chain, box: Box, lines, owner, slopes, bound: Bound):
    """(the derivatives of ``bound.value`` by the slopes, the relaxed network's ReLU inputs at its minimiser).

    Both for each ReLU layer, (S, ...); ``docs/derivations/crown.md``: a forward pass through the lines that the
    coefficients' signs chose, and the derivative by a slope is the positive part of its coefficient times its input.
    """
    a, gradients, inputs = minimiser(box, bound.image, owner), [], []
    for stage, line, slope, coefficient in zip(chain.stages, lines, slopes, bound.relus, strict=False):
        z = stage.apply(a)
        positive = coefficient >= 0
        unstable = line.unstable[owner]
        gradients.append(np.where(unstable & positive, coefficient * z, 0 * z))
        inputs.append(z)
        chosen = np.where(unstable, slope, line.lower[owner])
        a = np.where(positive, chosen * z, line.upper[owner] * z + line.offset[owner])
    return gradients, inputs


class Found(NamedTuple):
    """The best bounds of a search: ``value`` (S,), the slopes that give them, and the corners that they point to."""

    value: np.ndarray
    slopes: list[np.ndarray]  # (S, ...) for each ReLU layer
    corner: np.ndarray  # (S, H, W, C)


def alpha_crown(
    chain: Chain, box: Box, lines, rows, owner, *, steps: int = 20, rate: float = 0.5, decay: float = 0.98,
    target: float = 0.0,
) -> Found:  # fmt: skip
    """Better lower bounds of ``rows . logits`` than :func:`lower`: projected Adam over the slopes, the best kept.

    A row is left alone once its bound is above ``target``, a number or (S,).
    """
    owner, rows = np.asarray(owner), np.asarray(rows, chain.dtype)
    slopes = [line.lower[owner].copy() for line in lines]
    best = Found(np.full(len(rows), -np.inf, chain.dtype), [s.copy() for s in slopes], box.centre[owner].copy())
    first, second = ([np.zeros_like(s) for s in slopes] for _ in range(2))
    for step in range(steps + 1):
        left = np.flatnonzero(~(best.value > target))
        if len(left) == 0:
            break
        part = [s[left] for s in slopes]
        bound = lower(chain, box, lines, rows[left], owner[left], part)
        better = bound.value > best.value[left]
        at = left[better]
        best.value[at] = bound.value[better]
        best.corner[at] = minimiser(box, bound.image[better], owner[at])
        for kept, now in zip(best.slopes, part, strict=True):
            kept[at] = now[better]
        if step == steps:
            break
        gradients, _ = slope_gradients(chain, box, lines, owner[left], part, bound)
        size = rate * decay**step
        for k, gradient in enumerate(gradients):
            m = 0.9 * first[k][left] + 0.1 * gradient
            v = 0.999 * second[k][left] + 0.001 * gradient * gradient
            first[k][left], second[k][left] = m, v
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            slopes[k][left] = np.clip(part[k] + size * m / (np.sqrt(v) + 1e-12), 0, 1)
    return best


def image_box(images, eps: float):
    """(low, high) float64: the images within eps of ``images`` (B, H, W, C) in every pixel, and in [0, 1].

    Rounded outwards, and wide enough for the float32 box of :class:`nanomr.attacks.common.Linf`: what an attack may
    try is what a proof is about.
    """
    if not 0 <= eps < float("inf"):
        raise UserError(f"eps must be a number >= 0, not {eps}")
    if ((images < 0) | (images > 1)).any():
        raise ValueError("images must be in [0, 1]: normalisation belongs into the model")
    x = images.astype(np.float64)
    single, radius = images.astype(np.float32), np.float32(eps)
    single_low, single_high = linf_bounds(single, eps)  # beyond the ball where float32 rounded the image
    low = np.minimum(np.nextafter(x - eps, -1), np.minimum(single - radius, single_low))
    high = np.maximum(np.nextafter(x + eps, 2), np.maximum(single + radius, single_high))
    return np.maximum(low, 0), np.minimum(high, 1)
