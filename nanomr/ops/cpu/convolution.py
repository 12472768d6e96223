"""Convolutions on the CPU: which kernel a layer gets, and the tables of offsets that ``gather_gemm`` follows.

float32, 3 x 3, stride 1, at least 32 channels      ``winograd``
float32, 4 x 4, stride 2, at least 16 channels      ``winograd_strided``, backwards only
bfloat16, channels that fill tiles, where they are  ``amx``
all others                                          ``gather_gemm``
"""

from functools import lru_cache

import numpy as np

from ..reference import conv2d_shape
from . import amx, simd, winograd, winograd_strided
from .gather_gemm import (
    agree,
    bias_of,
    columns_of,
    gather_gemm,
    gather_gemm_reduce,
    gather_gemm_reduce_pairs,
    lanes_of,
    panels_of,
    runs_of,
    sum_parts,
    threads,
)
from .memory import empty, numbers, ready
from .simd import MAX_LANES, ROWS, WIDTH

PRODUCT = simd.PRODUCTS[0]  # how words are multiplied on this machine
TILES = amx.Tiles("amx") if amx.works() else None  # ... or by tiles, where channels fill them


def kernel(precision: str) -> str:
    """How this machine multiplies: what the last bits of a result depend on. ``precision`` "fp32" or "bf16"."""
    floats = "fma, " + ("AVX-512" if simd.AVX512 else "256 bits or less")
    if precision == "bf16" and TILES is not None:
        return "amx"
    return "avx512_bf16" if precision == "bf16" and PRODUCT == "avx512_bf16" else floats


# --- tables -----------------------------------------------------------------------------------------------------------


def _grid(*axes):
    """Sums of one element of each axis, in row-major order: offsets into an array, int64."""
    total = np.zeros(1, np.int64)
    for axis in axes:
        total = (total[:, None] + np.asarray(axis, np.int64)).ravel()
    return total


@lru_cache(256)
def _forward_tables(x_shape, w_shape, stride, padding):
    """(pixels a, their outputs o, taps b, (top, left, row, size) of the padded image), for x_shape[0] images."""
    (n, h, w, c), (kh, kw, _, c_out), (top, bottom, left, right) = x_shape, w_shape, padding
    _, ho, wo, _ = conv2d_shape(x_shape, w_shape, stride, padding)
    row = (w + left + right) * c
    size = (h + top + bottom) * row
    pixels = _grid(np.arange(n) * size, np.arange(ho) * stride * row, np.arange(wo) * stride * c)
    taps = _grid(np.arange(kh) * row, np.arange(kw) * c, np.arange(c))
    return pixels, np.arange(n * ho * wo) * c_out, taps, (top, left * c, row, size)


def _residues(size, k, before, stride, span):
    """Along one axis of the input gradient, for each group of pixels that meet the same taps: (where dx has them, the
    last entry of dy that they meet, the taps (in spans), how far before it each finds its entry); and the first real
    pixel of dx, and its length.

    A group is a residue modulo the stride. Or there is one group (``span`` = stride): ``stride`` neighbours, which meet
    the same entries of dy, are one pixel, and dx has a margin, since the padding may cut neighbours apart.
    """
    if span == 1:
        groups = []
        for residue in range(stride):
            xs, taps = np.arange((residue - before) % stride, size, stride), np.arange(residue, k, stride)
            groups.append((xs, (xs + before) // stride, taps, taps // stride))
        return groups, 0, size
    blocks, taps = np.arange(before // stride, (size - 1 + before) // stride + 1), np.arange(-(-k // stride))
    return [(stride * (blocks - blocks[0]), blocks, taps, taps)], before % stride, stride * len(blocks)


@lru_cache(256)
def _input_gradient_tables(x_shape, w_shape, stride, padding, spans):
    """The same for dx from dy, in groups of pixels, and also the rows of w, as (kh / spans[0], kw / spans[1], Cout),
    that the taps multiply, and (top, left, row, size) of the dx with margins; see :func:`_residues`. For x_shape[0]
    images, in each group one after another."""
    (n, h, w, c), (kh, kw, _, c_out), (top, _, left, _) = x_shape, w_shape, padding
    _, ho, wo, _ = conv2d_shape(x_shape, w_shape, stride, padding)
    low_h, low_w = (kh - 1) // stride, (kw - 1) // stride  # rows and columns of zeros before dy
    height = low_h + max(ho, (h - 1 + top) // stride + 1)
    row = (low_w + max(wo, (w - 1 + left) // stride + 1)) * c_out
    groups_h, margin_h, wide_h = _residues(h, kh, top, stride, spans[0])
    groups_w, margin_w, wide_w = _residues(w, kw, left, stride, spans[1])
    k_width = -(-kw // spans[1])
    image, dx_image = np.arange(n) * height * row, np.arange(n) * h * w * c
    a, o, b, index, pixels, taps = [], [], [], [], [0], [0]
    for ys, at_h, ps, back_h in groups_h:
        for xs, at_w, qs, back_w in groups_w:
            a.append(_grid(image, (at_h + low_h) * row, (at_w + low_w) * c_out))
            o.append(_grid(dx_image, ys * wide_w * c, xs * c))
            b.append(_grid(-back_h * row, -back_w * c_out, np.arange(c_out)))
            index.append(_grid(ps * k_width * c_out, qs * c_out, np.arange(c_out)))
            pixels.append(pixels[-1] + len(a[-1]))
            taps.append(taps[-1] + len(b[-1]))
    a, o, b, index = (np.concatenate(v) for v in (a, o, b, index))
    place, wide = (low_h, low_w * c_out, row, height * row), (margin_h, margin_w * c, wide_w * c, wide_h * wide_w * c)
    return a, o, np.array(pixels), b, np.array(taps), index, place, (0, 0, 0, 0) if spans == (1, 1) else wide


def _rows_of(x):
    """Images (N, H, W, C) as (N, H, W C); bfloat16 ones as 16-bit numbers."""
    n, h, w, c = x.shape
    return numbers(x).reshape(n, h, w * c)


def _source(x):
    """(images (N, H, W C) to be read, how many of their elements are a pixel, how they are multiplied): float32, or
    words, two channels each; an odd channel is given a black one."""
    if x.dtype == np.float32:
        return _rows_of(x), x.shape[3], "float32"
    if x.shape[3] % 2:
        x = np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)))
    rows = _rows_of(x)
    return rows.view(np.int32), x.shape[3] // 2, PRODUCT


def _even(w, axis):
    """w with a row of zeros added along ``axis`` if their number is odd."""
    return np.pad(w, [(0, w.shape[axis] % 2 if i == axis else 0) for i in range(w.ndim)]) if w.shape[axis] % 2 else w


FEW = 128  # pixels that make a sweep over the weights worth while: small images go through it together


def _together(pixels):
    """How many images of so many pixels."""
    return max(1, FEW // max(pixels, 1))


def _plus(plus, y):
    """``plus`` as rows of numbers, like y's; none: empty."""
    return _rows_of(y[:0]) if plus is None else _rows_of(plus.astype(y.dtype, copy=False))


def _fills_tiles(product, *channels):
    """Do so many channels, read and stored, fill AMX's tiles, and are there any?"""
    return TILES is not None and product != "float32" and all(c % amx.SUMS == 0 for c in channels)


def _by_tiles(x, words, place, w, bias, plus, y, a, o, pixels, b, taps, width):
    """:func:`gather_gemm` by tiles; ``width`` is how many pixels follow each other in a row."""
    run = width * -(-16 // width)  # enough of them for a panel of w to be worth reading
    amx.gather(
        x, words, place, w, bias, plus, y, a, o, pixels, b, taps, run, threads(), TILES, amx.CONFIG, simd.Lanes(1)
    )


def _by_winograd(x, w_shape, stride, padding):
    return x.dtype == np.float32 and winograd.fits(w_shape, stride, padding)


def _by_strided_winograd(x, w_shape, stride):
    return x.dtype == np.float32 and winograd_strided.fits(w_shape, stride)


def conv2d(x, w, b, stride, padding, plus=None):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    agree("plus", shape if plus is None else plus.shape, shape)
    if _by_winograd(x, w.shape, stride, padding):
        return winograd.conv2d(x, w, b, padding, plus, shape)
    rows, c, product = _source(x)
    w = w if product == "float32" else _even(w, 2)
    images = _together(shape[1] * shape[2])
    a, o, taps, place = _forward_tables((images, *x.shape[1:3], c), (*w.shape[:2], c, shape[3]), stride, padding)
    tiled = _fills_tiles(product, x.shape[3], shape[3])
    weights, lanes = panels_of(w.reshape(-1, shape[3]), product, amx.SUMS if tiled else None)
    y = empty(shape, x.dtype)
    if tiled:
        a, o, taps, place = _forward_tables((1, *x.shape[1:3], c), (*w.shape[:2], c, shape[3]), stride, padding)
        ends = np.array([0, len(a)]), taps, np.array([0, len(taps)])
        _by_tiles(rows, c, place, weights, bias_of(b, shape[3]), _plus(plus, y), _rows_of(y), a, o, *ends, shape[2])
        return y
    groups = np.array([0, len(a)]), taps, np.array([0, len(taps)])  # of pixels: one, which meets all taps
    inputs = (rows, place, weights, bias_of(b, shape[3]), _plus(plus, y), _rows_of(y), (0, 0, 0, 0), images)
    gather_gemm(*inputs, a, o, *groups, shape[3], 1, threads(), lanes)
    return y


def conv2d_input_gradient(dy, w, stride, padding, x_shape, plus=None):
    agree("dy", dy.shape, conv2d_shape(x_shape, w.shape, stride, padding))
    agree("plus", x_shape if plus is None else plus.shape, tuple(x_shape))
    if _by_winograd(dy, w.shape, stride, padding):
        mirrored = w[::-1, ::-1].swapaxes(2, 3)  # what padding there was, and what there was not
        return winograd.conv2d(dy, mirrored, None, tuple(2 - p for p in padding), plus, x_shape)
    if _by_strided_winograd(dy, w.shape, stride):
        return winograd_strided.input_gradient(dy, w, padding, x_shape, plus)
    (kh, kw, c, _), (_, h, w_x, _) = w.shape, x_shape
    rows, c_out, product = _source(dy)
    w = w if product == "float32" else _even(w, 3)
    # Neighbours together, where that makes fewer vectors: few channels would leave most of one empty.
    vectors = lambda s: -(-s[0] * s[1] * c // WIDTH)  # noqa: E731
    spans = next((s for s in ((stride,) * 2, (1, stride)) if vectors(s) <= min(MAX_LANES, s[0] * s[1] - 1)), (1, 1))
    images = _together(h * w_x // stride**2) if spans == (1, 1) else 1
    shapes = (images, *x_shape[1:]), (kh, kw, c, c_out)
    a, o, pixels, b, taps, index, place, wide = _input_gradient_tables(*shapes, stride, padding, spans)
    if kh % spans[0] or kw % spans[1]:
        w = np.pad(w, ((0, -kh % spans[0]), (0, -kw % spans[1]), (0, 0), (0, 0)))
    w = w.reshape(len(w) // spans[0], spans[0], w.shape[1] // spans[1], spans[1], c, w.shape[3])
    channels = spans[0] * spans[1] * c
    # (taps, elements of dy, numbers in an element, channels): the tables count elements
    w = w.transpose(0, 2, 5, 1, 3, 4).reshape(-1, 1 if product == "float32" else 2, channels)[index]
    tiled = spans == (1, 1) and _fills_tiles(product, dy.shape[3], channels)
    weights, lanes = panels_of(w.reshape(-1, channels), product, amx.SUMS if tiled else None)
    dx = empty(x_shape, dy.dtype)
    if tiled:
        one = (1, *x_shape[1:]), shapes[1]
        a, o, pixels, b, taps, _, place, _ = _input_gradient_tables(*one, stride, padding, spans)
        ends = a, o, pixels, b, taps, -(-w_x // stride)
        _by_tiles(rows, c_out, place, weights, bias_of(None, channels), _plus(plus, dx), _rows_of(dx), *ends)
        return dx
    inputs = (rows, place, weights, bias_of(None, channels), _plus(plus, dx), _rows_of(dx), wide)
    gather_gemm(*inputs, images, a, o, pixels, b, taps, channels, spans[0], threads(), lanes)
    return dx


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    agree("dy", dy.shape, conv2d_shape(x.shape, w_shape, stride, padding))
    if _by_winograd(x, w_shape, stride, padding):
        return winograd.conv2d_weight_gradient(x, dy, padding)
    if _by_strided_winograd(x, w_shape, stride):
        return winograd_strided.weight_gradient(x, dy, padding)
    c_out = w_shape[3]
    columns = c_out + -c_out % WIDTH
    images = _together(dy.shape[1] * dy.shape[2])
    pixels, _, taps, place = _forward_tables((images, *x.shape[1:]), w_shape, stride, padding)
    rows = runs_of(taps)
    parts = sum_parts(rows.size * columns)
    dw, db = np.zeros((parts, rows.size, columns), np.float32), np.zeros((parts, columns), np.float32)
    steps = np.arange(ROWS) * columns  # from one row of dw to the next
    if x.dtype == np.float32:
        flat = dy.reshape(-1, c_out)
        flat = (columns_of(flat) if c_out % WIDTH else ready(flat)).reshape(*dy.shape[:1], -1, columns)
        lanes = lanes_of(columns)
        gather_gemm_reduce(_rows_of(x), place, images, flat, rows, pixels, steps, dw, db, lanes)
    else:
        flat = numbers(dy.astype(x.dtype, copy=False)).reshape(len(dy), -1, c_out)
        if c_out != columns:
            flat = np.pad(flat, ((0, 0), (0, 0), (0, columns - c_out)))
        if _fills_tiles(PRODUCT, w_shape[2], c_out):
            pixels, _, taps, place = _forward_tables((1, *x.shape[1:]), w_shape, stride, padding)
            dw = np.zeros((parts, len(taps), columns), np.float32)
            tables = taps, pixels, dw, db, TILES, amx.CONFIG, simd.Lanes(1, PRODUCT)
            amx.reduce(_rows_of(x), w_shape[2], place, flat, *tables)
            return dw.sum(0).reshape(w_shape), db.sum(0)
        lanes = lanes_of(columns, PRODUCT)
        gather_gemm_reduce_pairs(_rows_of(x), place, images, flat, columns, rows, pixels, steps, dw, db, lanes)
    return dw.sum(0)[: len(taps), :c_out].reshape(w_shape), db.sum(0)[:c_out]
