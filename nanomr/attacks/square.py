"""Square (Andriushchenko et al. 2020, arXiv:1912.00049): random search by squares that needs the logits only.

No gradient is taken, so that masked gradients do not stop it.
"""

from functools import lru_cache

import numpy as np

from ..backend import array_module
from .common import SQUARE, Batch, attack, l2, misclassified, per_image

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # after these queries the squares' area is halved
BLOCK = 100  # queries whose random numbers are drawn at once


def _has_squares(shape, **_):
    if len(shape) != 4 or shape[1] != shape[2]:
        raise ValueError(f"square: the images must be square, (N, H, H, C), not {shape}")


@attack(check=_has_squares)
def square(batch: Batch, *, queries: int = 5000):
    """(adversarial, fooled): images (N, H, H, C) within eps of x and in [0, 1]; does the model err on them (N,)?

    ``queries`` forward passes an image: the start, then one candidate each, kept when it lowers the margin (the
    label's logit minus the largest other one). Fooled images leave at once; other rows come back as they were.

    - "linf": the start is vertical stripes at +-eps; a candidate repaints one square at +-eps, a sign a channel.
    - "l2": the start is a grid of bumps; a candidate erases one window and gives what it and the budget hold to a
      bump in another. As in the paper each channel keeps its own share, so that the norm is eps again by itself;
      AutoAttack's code mixes the channels' shares, and then rescales the whole image.

    Every image has squares of its own. AutoAttack draws one for the whole batch: its results depend on the batch. It
    also never draws the last row and column of positions; here all are equally likely. The schedule of the squares'
    sides is that for 10,000 queries, whatever ``queries`` is, as in AutoAttack's evaluation.

    Raises ValueError for images that are not square, and what :func:`nanomr.attacks.pgd` raises.
    """
    painter = (_Linf if batch.ball.name == "linf" else _L2)(batch.ball)
    return _search(batch.model, painter, batch.x, batch.labels, batch.draws(SQUARE), queries)


def area(query: int) -> float:
    """The share of the image that a square of this query covers: 0.8, halved again and again."""
    return 0.8 / 2 ** sum(query > last for last in HALVINGS)


def side(query: int, size: int, norm: str = "linf") -> int:
    """The side of this query's squares, in pixels, for images of ``size`` x ``size``. Odd and at least 3 in l2."""
    pixels = round((area(query) * size * size) ** 0.5)
    return min(max(pixels, 1) if norm == "linf" else max(pixels, 3) | 1, size)


def _search(model, painter, x, labels, generators, queries):
    """(images, fooled) after random search from the painter's start. ``x`` (N, H, H, C): images that are right."""
    xp, size = array_module(x), x.shape[1]
    adversarial, fooled = x.copy(), xp.zeros(len(x), bool)
    left, best, numbers = xp.arange(len(x)), xp.full(len(x), xp.inf), None
    x, current = xp.ascontiguousarray(x), xp.ascontiguousarray(painter.start(x, generators))
    for query in range(queries):
        patches, row = [], (query - 1) % BLOCK
        if query > 0:
            if row == 0:
                width = painter.numbers + x.shape[3]
                numbers = xp.asarray(np.array([g.random((BLOCK, width)) for g in generators]))
            patches = painter.patches(x, current, numbers[:, row], side(query, size, painter.ball.name))
        # A candidate differs from the image in a few pixels: paint it there, and paint it over where it is no better.
        flat = current.reshape(-1)
        before = [flat[where] for where, _ in patches]
        for where, pixels in patches:
            flat[where] = pixels
        logits, _ = model.forward(current)
        margin, wrong = _margin(logits, labels), misclassified(logits, labels)
        if wrong.any():  # the check guards what is promised; a rounded l2 norm may be too long
            wrong[wrong] = painter.ball.inside(x[wrong], current[wrong])
            adversarial[left[wrong]], fooled[left[wrong]] = current[wrong], True
        better = margin < best
        for (where, _), pixels in zip(patches, before, strict=True):
            flat[where[~better]] = pixels[~better]
        best = xp.where(better, margin, best)
        if wrong.any():
            go = ~wrong
            left, x, labels, current, best = left[go], x[go], labels[go], current[go], best[go]
            numbers = numbers if numbers is None else numbers[go]
            generators = [g for g, stays in zip(generators, go.tolist(), strict=True) if stays]
            if len(left) == 0:
                break
    return adversarial, fooled


def _margin(logits, labels):
    """The label's logit minus the largest other one, (N,)."""
    rows, others = array_module(logits).arange(len(labels)), logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(1)


def _corner(uniforms, size, side):
    """The upper left corners (N, 2) of squares in the image, from uniform numbers (N, 2)."""
    return (uniforms * (size - side + 1)).astype(np.int64)


def _window(corner, side, shape):
    """Where each image's square lies in the flat array: (N, side, side, C) indices. ``shape`` is the images'."""
    xp, (n, height, width, channels) = array_module(corner), shape
    first = ((xp.arange(n) * height + corner[:, 0]) * width + corner[:, 1]) * channels
    rows, pixels = xp.arange(side) * (width * channels), xp.arange(side * channels)
    return (first[:, None, None] + rows[:, None] + pixels).reshape(n, side, side, channels)


class _Linf:
    """Every pixel is as high or as low as ball and box allow; a sign for each channel of a square."""

    numbers = 2  # uniform numbers for a candidate, besides one for each channel

    def __init__(self, ball):
        self.ball = ball

    def start(self, x, generators):
        """Vertical stripes of one pixel: a sign for each column and channel."""
        uniforms = np.array([g.random((1, *x.shape[2:])) for g in generators])
        return self._paint(x, array_module(x).asarray(uniforms))

    def patches(self, x, current, uniforms, side):
        """The changes (where, pixels) that make ``current`` the next candidate."""
        where = _window(_corner(uniforms[:, :2], x.shape[1], side), side, x.shape)
        return [(where, self._paint(x.reshape(-1)[where], uniforms[:, None, None, 2:]))]

    def _paint(self, x, uniforms):
        low, high = self.ball.bounds(x)
        return array_module(x).where(uniforms < 0.5, low, high)


class _L2:
    """The whole budget is spent, in bumps; a candidate moves some of it from one window to another."""

    numbers = 5

    def __init__(self, ball):
        self.ball = ball

    def _radius(self, x):
        """A little less than eps: pixels are rounded when a change is added to them."""
        return max(self.ball.eps * (1 - 1e-6) - 2 * float(np.finfo(x.dtype).eps), 0.0)

    def start(self, x, generators):
        """5 x 5 bumps in the middle, a sign for each tile and channel."""
        xp, size, channels = array_module(x), x.shape[1], x.shape[3]
        tiles = min(5, size)
        side = size // tiles
        first = (size - side * tiles) // 2
        uniforms = xp.asarray(np.array([g.random((tiles, tiles, 1 + channels)) for g in generators]))
        change = xp.zeros(x.shape)
        for i in range(tiles):
            for j in range(tiles):
                row, column = first + i * side, first + j * side
                change[:, row : row + side, column : column + side] = _bumps(uniforms[:, i, j], side)
        change *= per_image(self._radius(x) / l2(change), x)
        return xp.clip(x + change.astype(x.dtype), 0, 1)

    def patches(self, x, current, uniforms, side):
        """The changes (where, pixels), in this order, that make ``current`` the next candidate."""
        xp, size, dtype = array_module(x), x.shape[1], x.dtype
        to, source = _corner(uniforms[:, :2], size, side), _corner(uniforms[:, 2:4], size, side)
        offset = (source - to)[:, :, None] + xp.arange(side)  # of the source's rows and columns, in the target
        shared = (offset >= 0) & (offset < side)
        shared = shared[:, 0, :, None] & shared[:, 1, None, :]  # pixels of the source that lie in the target
        to, source = _window(to, side, x.shape), _window(source, side, x.shape)
        change = current - x
        x_to, x_source = x.reshape(-1)[to], x.reshape(-1)[source]
        old, erased = change.reshape(-1)[to], xp.where(shared[..., None], 0, change.reshape(-1)[source])
        spent = xp.einsum("nhwc,nhwc->n", change, change)
        budget = per_image(xp.maximum(self._radius(x) ** 2 - spent, 0), x) / x.shape[3]
        budget = budget + _squares(old) + _squares(erased)
        tiny = dtype.type(1e-12)
        new = _bumps(uniforms[:, 4:], side).astype(dtype) + old / (xp.sqrt(_squares(old)) + tiny)
        new = new * (xp.sqrt(budget) / (xp.sqrt(_squares(new)) + tiny))
        return [(source, x_source), (to, xp.clip(x_to + new, 0, 1))]


def _squares(window):
    """The sum of squares of each image's each channel, (N, 1, 1, C)."""
    return array_module(window).einsum("nijc,nijc->nc", window, window)[:, None, None, :]


def _bumps(uniforms, side):
    """A bump for each image (N, side, side, C): upright or lying, a sign for each channel. uniforms (N, 1 + C)."""
    xp = array_module(uniforms)
    both = xp.asarray(np.stack([_bump(side), _bump(side).T]))
    signs = xp.where(uniforms[:, 1:] < 0.5, -1.0, 1.0)
    return both[(uniforms[:, 0] < 0.5).astype(np.int64)][..., None] * signs[:, None, None, :]


@lru_cache(maxsize=64)
def _bump(side):
    """A hill over a valley (side, side), of norm 1: piles of squares around their middles, number k 1/k^2 high."""
    halves = []
    for rows, sign in ((side // 2, 1), (side - side // 2, -1)):
        i, j = np.indices((rows, side))
        ring = np.maximum(abs(i - rows // 2), abs(j - side // 2))  # 0 in the middle
        heights = 1 / np.arange(1, max(rows // 2, side // 2) + 2) ** 2
        half = sign * heights[::-1].cumsum()[::-1][ring]  # the squares that reach this ring: its own and all larger
        halves.append(half / max(np.sqrt((half * half).sum()), 1e-12))
    bump = np.concatenate(halves)
    return bump / np.sqrt((bump * bump).sum())
