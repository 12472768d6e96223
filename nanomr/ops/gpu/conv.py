"""The launches of ``kernels/conv.cu``: convolutions in bfloat16. Other dtypes are ``plain``'s, im2col with a matrix
product (cuBLAS). docs/gpu.md draws the tiles."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from ...backend import array_module
from ..reference import conv2d_shape
from . import plain
from .cuda import BLOCKS, ceil, has_kernels, launch, ready
from .elementwise import add, resize_rows, to_bf16
from .normalization import batchnorm_statistics

FORWARD, INPUT, WEIGHT = range(3)  # y, dx, dw


@dataclass(frozen=True)
class Tile:
    """How a block and its warps share out a product; see ``conv.cu``."""

    bm: int
    bn: int
    bk: int = 32
    wm: int = 64
    wn: int = 32
    stages: int = 4
    wgmma: bool = False  # by Hopper's instruction: wm = 16, wn = bn, bk = 64

    @property
    def threads(self) -> int:
        return 32 * (self.bm // self.wm) * (self.bn // self.wn)

    def defines(self, direction: int) -> tuple[str, ...]:
        names = ("BM", "BN", "BK", "WM", "WN", "STAGES", "WGMMA")
        given = [f"{name}={int(value)}" for name, value in zip(names, vars(self).values(), strict=True)]
        return f"DIRECTION={direction}", *given[: len(given) - (not self.wgmma)]

    def shared(self, direction: int) -> int:
        """Bytes of dynamic shared memory: the tiles on their way, or the result's in float32, whichever is more."""
        skew = 0 if self.wgmma else 8
        a = self.bk * (self.bm + skew) if direction == WEIGHT else self.bm * (self.bk + skew)
        b = self.bn * (self.bk + skew) if direction == INPUT else self.bk * (self.bn + skew)
        return max(2 * self.stages * (a + b), 4 * self.bm * (self.bn + 8) if direction != WEIGHT else 0)


# What a product may be cut into, by its kind. The usual tile was chosen from registers and shared memory; which one is
# the fastest on a device, selftest.py finds out. Tiles of a kind are of one size, and dw's terms are split alike for
# all of them, so that each number is the same sum in the same order.
TILES = {
    "narrow": {"usual": Tile(128, 64), "wgmma": Tile(128, 64, 64, 16, 64, 4, True)},
    "wide": {
        "usual": Tile(128, 128),
        "square": Tile(128, 128, 32, 64, 64),  # a third fewer loads from shared memory, at half the warps
        "deep": Tile(128, 128, 64, 64, 64, 3),
        "wgmma": Tile(128, 128, 64, 16, 128, 3, True),
    },
    "tall": {"usual": Tile(192, 64), "wgmma": Tile(192, 64, 64, 16, 64, 3, True)},
}
PRODUCTS = {  # name of a direction and a kind of product: (direction, kind)
    "y narrow": (FORWARD, "narrow"),
    "y wide": (FORWARD, "wide"),
    "dx narrow": (INPUT, "narrow"),
    "dx wide": (INPUT, "wide"),
    "dw wide": (WEIGHT, "wide"),
    "dw tall": (WEIGHT, "tall"),
}
SPLIT = 64  # terms of dw come in multiples of it: of every tile's bk
tiles_in_use: dict[str, str] = {}  # product: the name of its tile, where that is not the usual one


def use_tiles(names=()) -> None:
    """Let these products {name: tile's name} be cut so from now on, and all others as usual."""
    tiles_in_use.clear()
    tiles_in_use.update(names)
    conv_plan.cache_clear()


def _tile(direction: int, terms: int, channels: int, name: str | None) -> Tile:
    """For a result of so many channels. ``name``: as of ``conv_plan``."""
    kind = "wide" if channels > 64 else "tall" if direction == WEIGHT and terms > 128 else "narrow"
    if name is None:
        name = tiles_in_use.get(f"{('y', 'dx', 'dw')[direction]} {kind}")
    return TILES[kind].get(name, TILES[kind]["usual"])


@dataclass(frozen=True)
class ConvPlan:
    """One launch of ``conv.cu``: what is computed where. Channels are multiples of 8."""

    direction: int
    tile: Tile
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]  # the kernel's int arguments
    splits: int = 1  # of the pixels, for dw

    def launch(self, *arrays):
        name = "weight_gradient" if self.direction == WEIGHT else "convolve"
        defines, shared = self.tile.defines(self.direction), self.tile.shared(self.direction)
        launch("conv.cu", defines, name, self.grid, self.tile.threads, (*arrays, *self.sizes), shared)

    def sum_splits(self, partial, dw, more=False):
        """dw = the sum of the splits' ``partial`` (splits, ...), always in the same order; ``more``: added to dw."""
        arguments = (partial, dw, dw.size, self.splits, int(more))
        launch("conv.cu", self.tile.defines(WEIGHT), "sum_splits", (ceil(dw.size, 256),), 256, arguments)


@cache
def conv_plan(direction: int, x_shape, w_shape, stride: int, padding, name: str | None = None) -> ConvPlan:
    """The plan for x (N, H, W, C) and w (kh, kw, C, Cout), all channels multiples of 8. ``name``: a tile's of
    ``TILES``, the usual one where its kind has none of that name; by default what is in use."""
    n, h, w, c = x_shape
    _, ho, wo, co = conv2d_shape(x_shape, w_shape, stride, padding)
    kh, kw, top, left = *w_shape[:2], padding[0], padding[2]
    if max(math.prod(x_shape), n * ho * wo * co) >= 2**31:
        raise ValueError(f"a convolution of {x_shape} counts beyond 2^31: use a smaller batch")
    window = (kh, kw, stride, top, left)
    if direction == FORWARD:
        tile = _tile(direction, kh * kw * c, co, name)
        grid = (ceil(n * ho * wo, tile.bm), ceil(co, tile.bn), 1)
        return ConvPlan(direction, tile, grid, (n, h, w, c, ho, wo, co, *window))
    if direction == INPUT:
        tile = _tile(direction, kh * kw * co, c, name)
        largest = n * ceil(h, stride) * ceil(w, stride)  # of the stride^2 phases
        grid = (ceil(largest, tile.bm), ceil(c, tile.bn), stride * stride)
        return ConvPlan(direction, tile, grid, (n, ho, wo, co, h, w, c, *window))
    terms, pixels = kh * kw * c, n * ho * wo
    tile = _tile(direction, terms, co, name)
    tiles = ceil(terms, tile.bm) * ceil(co, tile.bn)
    # More splits fill the multiprocessors, in whole waves at best, but each is written and read once. Seconds, roughly:
    multiply, move = 2 * pixels * terms * co / 400e12, 8 * terms * co / 3e12
    most = max(1, min(4 * BLOCKS // tiles, ceil(pixels, 4 * SPLIT)))  # each split fills the pipeline
    best = min(range(1, most + 1), key=lambda s: multiply * ceil(tiles * s, BLOCKS) * BLOCKS / (tiles * s) + move * s)
    per_split = ceil(ceil(pixels, best), SPLIT) * SPLIT
    splits = ceil(pixels, per_split)
    grid = (ceil(terms, tile.bm), ceil(co, tile.bn), splits)
    return ConvPlan(direction, tile, grid, (n, h, w, c, ho, wo, co, *window, per_split), splits)


# --- in bfloat16 -------------------------------------------------------------------------------------------


def _eights(channels):
    return ceil(channels, 8) * 8


def _weights(w):
    """w (kh, kw, C, Cout) as bfloat16, both numbers of channels filled up to multiples of 8."""
    kh, kw, c, co = w.shape
    w = to_bf16(w, _eights(co))
    return resize_rows(w.reshape(kh, kw, -1), _eights(c) * _eights(co)).reshape(kh, kw, _eights(c), _eights(co))


def conv2d(x, w, b, stride, padding, plus=None):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    if not has_kernels(x, "bfloat16"):
        y = plain.conv2d(x, w, b, stride, padding)
        return y if plus is None else add(y, plus)
    xp, x, w, co = array_module(x), to_bf16(x, _eights(x.shape[3])), _weights(w), shape[3]
    y = xp.empty((*shape[:3], w.shape[3]), x.dtype)
    if b is not None:
        b = ready(resize_rows(ready(b, np.float32), w.shape[3]))
    plus = None if plus is None else to_bf16(plus, w.shape[3])
    conv_plan(FORWARD, x.shape, w.shape, stride, tuple(padding)).launch(x, w, b, plus, y)
    return resize_rows(y, co)


def conv2d_input_gradient(dy, w, stride, padding, x_shape, plus=None):
    if not has_kernels(dy, "bfloat16"):
        dx = plain.conv2d_input_gradient(dy, w, stride, padding, x_shape)
        return dx if plus is None else add(dx, plus)
    xp, c, w = array_module(dy), x_shape[3], _weights(w)
    dy = to_bf16(dy, w.shape[3])
    dx = xp.empty((*x_shape[:3], w.shape[2]), dy.dtype)
    plus = None if plus is None else to_bf16(plus, w.shape[2])
    conv_plan(INPUT, dx.shape, w.shape, stride, tuple(padding)).launch(dy, w, None, plus, dx)
    return resize_rows(dx, c)


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    if not has_kernels(x, "bfloat16"):
        return plain.conv2d_weight_gradient(x, dy, w_shape, stride, padding)
    return conv2d_dw(x, dy, w_shape, stride, padding), batchnorm_statistics(dy)[0] * (dy.size // dy.shape[3])


def conv2d_dw(x, dy, w_shape, stride, padding, into=None):
    """dw of :func:`conv2d_weight_gradient` alone: db is a pass over dy, and most convolutions have no bias. ``into``:
    an array to which dw is added; the result is then None."""
    xp, (kh, kw, c, co) = array_module(x), w_shape
    if not has_kernels(x, "bfloat16"):
        dw = plain.conv2d_weight_gradient(x, dy, w_shape, stride, padding)[0]
    else:
        x, dy = to_bf16(x, _eights(c)), to_bf16(dy, _eights(co))
        full = (kh, kw, x.shape[3], dy.shape[3])
        plan = conv_plan(WEIGHT, x.shape, full, stride, tuple(padding))
        partial = xp.empty((plan.splits, *full), np.float32)
        plan.launch(x, dy, partial)
        if into is not None and full == tuple(w_shape):
            return plan.sum_splits(partial, into, more=True)
        dw = partial[0]
        if plan.splits > 1:
            dw = xp.empty(full, np.float32)
            plan.sum_splits(partial, dw)
        dw = dw[:, :, :c, :co]
    if into is None:
        return dw
    into += dw
