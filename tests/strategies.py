"""What the tests draw: shapes, arrays, memory layouts. Hypothesis draws the shape and a seed; NumPy draws the numbers.

A failing example is then a small dataclass and a seed, not a page of floats.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from nanomr.layers import AveragePool2d, BatchNorm2d, Conv2d, Flatten, Linear, Normalize, ReLU
from nanomr.models import Model
from nanomr.ops import ops_for

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


# --- networks and boxes of images, for what bounds them ---------------------------------------------------------------


class Inputs:
    """A tap that keeps the input of every ReLU."""

    def __init__(self):
        self.z = []

    def forward(self, z):
        self.z.append(z)
        return ops_for(z).relu(z), None


def forward(model, x):
    """(logits, [the input of every ReLU, in forward order])."""
    tap = Inputs()
    return model.forward(x, tap=tap)[0], tap.z


def randomise(model, draw, dtype=np.float64):
    """Weights of both signs everywhere, also of batch norms, and running statistics that do something."""
    model.astype(dtype)
    for _, layer in model.walk():
        if isinstance(layer, BatchNorm2d):
            shape = layer.params["weight"].shape
            layer.params["weight"][...] = draw.uniform(0.3, 1.5, shape) * draw.choice([-1, 1], shape)
            layer.params["bias"][...] = draw.normal(0, 0.3, shape)
            layer.buffers["running_mean"][...] = draw.normal(0, 0.5, shape)
            layer.buffers["running_var"][...] = draw.uniform(0.05, 3, shape)
        elif isinstance(layer, Normalize):
            layer.buffers["mean"][...] = draw.uniform(0.2, 0.8, layer.buffers["mean"].shape)
            layer.buffers["std"][...] = draw.uniform(0.1, 0.5, layer.buffers["std"].shape)
        elif layer.params:
            layer.params["weight"] *= draw.uniform(1, 3)
            if "bias" in layer.params:
                layer.params["bias"][...] = draw.normal(0, 0.3, layer.params["bias"].shape)
    return model


def sequence(layers, input_shape, draw):
    """A model of these layers behind a normalisation, with random weights."""
    channels = input_shape[-1]
    children = {"normalize": Normalize((0.0,) * channels, (1.0,) * channels)}
    children.update({str(i): layer for i, layer in enumerate(layers)})
    return randomise(Model(children, {"name": "test"}, input_shape, seed=int(draw.integers(1000))), draw)


def conv_net(draw, first, second, size=(7, 6), *, classes=3, hidden=4, norm=False, bias=True, pool=None):
    """Two convolutions of (kernel, stride, padding) each, and two linear layers: the small network in tiny.

    ``norm``: a batch norm after each convolution; ``pool``: average pooling before the first.
    """
    layers, z, channels = [], np.zeros((1, *size, 2)), (2, 2, 3)
    if pool:
        layers.append(AveragePool2d(pool))
        z = layers[-1].apply(z)
    for i, (kernel, stride, padding) in enumerate((first, second)):
        layers.append(Conv2d(channels[i], channels[i + 1], kernel, stride, padding, bias=bias))
        z = layers[-1].apply(z)
        layers += [BatchNorm2d(channels[i + 1])] * norm + [ReLU()]
    layers += [Flatten(), Linear(z.size, hidden), ReLU(), Linear(hidden, classes)]
    return sequence(layers, (*size, 2), draw)


def box(model, draw, eps, n=2):
    """Boxes [low, high] around images: of every width up to eps, cut at 0 and 1, some pixels fixed."""
    x = draw.random((n, *model.input_shape))
    width = eps * draw.choice([0, 0.5, 1], x.shape, p=[0.1, 0.3, 0.6])
    return np.clip(x - width, 0, 1).astype(model.dtype), np.clip(x + width, 0, 1).astype(model.dtype)


def points(low, high, draw, count=6):
    """Points of the box: its ends, random corners, random points."""
    yield low
    yield high
    for _ in range(count):
        yield np.where(draw.random(low.shape) < 0.5, low, high)
        yield low + draw.random(low.shape) * (high - low)
