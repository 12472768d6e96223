"""What tests of layers draw: shapes and memory layouts. Hypothesis draws the shape and a seed; NumPy draws the numbers.

A failing example is then a small dataclass and a seed, not a page of floats.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import UserError

try:
    from hypothesis import settings
    from hypothesis import strategies as st
except ImportError:
    raise UserError("property tests need Hypothesis: pip install 'nanomr[test]'") from None

seeds = st.integers(0, 2**32 - 1)


def fewer(share):
    """Settings for an expensive property: this share of the profile's examples, but at least 3."""
    return settings(max_examples=max(3, int(settings().max_examples * share)))


@dataclass(frozen=True)
class ConvCase:
    """A convolution that fits: the (padded) image is at least as large as the kernel."""

    n: int
    h: int
    w: int
    c_in: int
    c_out: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int, int, int]  # top, bottom, left, right

    @property
    def x_shape(self):
        return self.n, self.h, self.w, self.c_in

    @property
    def w_shape(self):
        return *self.kernel, self.c_in, self.c_out

    @property
    def y_shape(self):
        top, bottom, left, right = self.padding
        rows = (self.h + top + bottom - self.kernel[0]) // self.stride + 1
        columns = (self.w + left + right - self.kernel[1]) // self.stride + 1
        return self.n, rows, columns, self.c_out


@st.composite
def convolutions(draw, batch=(1, 2), channels=(1, 2, 3), kernel=3, stride=3, size=5, square=True):
    """Square and oblong images, 1x1 kernels, strides beyond the kernel, windows that see nothing but padding."""
    kh = draw(st.integers(1, kernel))
    kw = kh if square else draw(st.integers(1, kernel))
    padding = draw(st.tuples(*[st.integers(0, k) for k in (kh, kh, kw, kw)]))
    smallest = [max(1, kh - padding[0] - padding[1]), max(1, kw - padding[2] - padding[3])]
    h, w = (draw(st.integers(s, max(s, size))) for s in smallest)
    c_in, c_out = draw(st.sampled_from(channels)), draw(st.sampled_from(channels))
    return ConvCase(draw(st.sampled_from(batch)), h, w, c_in, c_out, (kh, kw), draw(st.integers(1, stride)), padding)


def images(n=(1, 3), size=(1, 4), channels=(1, 3)):
    """Shapes (N, H, W, C)."""
    return st.tuples(*[st.integers(*bounds) for bounds in (n, size, size, channels)])


def _transposed(a, xp):
    return xp.ascontiguousarray(xp.asarray(a).transpose()).transpose()


def _beside(a):
    """What lies beside the elements of a view: reading it by mistake shows."""
    return np.nan if a.dtype.kind == "f" else 77


def _strided(a, xp):
    base = xp.full([2 * size for size in a.shape], _beside(a), a.dtype)
    view = base[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = xp.asarray(a)
    return view


def _slice(a, xp):
    base = xp.full([size + 2 for size in a.shape], _beside(a), a.dtype)
    view = base[tuple(slice(1, -1) for _ in a.shape)]
    view[...] = xp.asarray(a)
    return view


def _reversed(a, xp):
    flip = tuple(slice(None, None, -1) for _ in a.shape)
    return xp.ascontiguousarray(xp.asarray(a)[flip])[flip]


LAYOUTS = {
    "contiguous": lambda a, xp: xp.ascontiguousarray(xp.asarray(a)),
    "transposed": _transposed,
    "strided": _strided,
    "slice": _slice,
    "reversed": _reversed,
}
layouts = st.sampled_from(sorted(LAYOUTS))
