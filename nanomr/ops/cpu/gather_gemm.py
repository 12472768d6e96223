"""Convolutions and linear layers on the CPU: one sum, the gather-GEMM, for all their passes.

    out[o_i + c] += sum over r of in[a_i + b_r] * w[r, c]                 (docs/derivations/convolution.md)

    forward          i: output pixels            r: taps x input channels       w: the weights
    input gradient   i: input pixels, by parity  r: taps x output channels      w: the weights transposed
    weight gradient  i: taps x input channels    r: output pixels               w: dy

One micro-kernel serves the three: a tile of ROWS x 16 (or 32) sums stays in registers while r runs. There is no im2col.

It also serves bfloat16. Two numbers that are multiplied by two others and summed up are a word of 32 bits: two channels
of a pixel, and two rows of w, in the first two sums; the same number of two images in the third. The tables then count
words, and ``simd`` multiplies them; sums are float32 until they are stored.
"""

import os
from functools import lru_cache
from math import gcd

# A thread that waits for the others spins for a moment (kernels follow each other closely), then sleeps: with GNU
# OpenMP's own, far longer spinning, a step beside other busy processes can take ten times as long. The variable is
# read once, when Numba starts its threads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numba
import numpy as np
from numba import njit, prange

from ..reference import conv2d_shape
from . import amx, simd
from .flags import FLAGS
from .memory import BFLOAT16, empty, numbers, ready
from .simd import MAX_LANES, ROWS, WIDTH

PRODUCT = simd.PRODUCTS[0]  # how words are multiplied on this machine
TILES = amx.Tiles("amx") if amx.works() else None  # ... or by tiles, where channels fill them


def kernel(precision: str) -> str:
    """How this machine multiplies: what the last bits of a result depend on. ``precision`` "fp32" or "bf16"."""
    floats = "fma, " + ("AVX-512" if simd.AVX512 else "256 bits or less")
    if precision == "bf16" and TILES is not None:
        return "amx"
    return "avx512_bf16" if precision == "bf16" and PRODUCT == "avx512_bf16" else floats


def threads():
    """Numba's threads: into how many chunks a kernel cuts its work. Never a sum: see :func:`sum_parts`."""
    return numba.get_num_threads()


def sum_parts(size):
    """Into how many parts a sum of ``size`` numbers over images is cut: whatever the threads, so that its bits are the
    same for any number of them. Few where it is large, since each part is written and read once more."""
    return 16 if size <= 1 << 14 else 8 if size <= 1 << 17 else 4


# --- the gather-GEMM --------------------------------------------------------------------------------------------------


@njit(**FLAGS)
def _place(image, padded, start, place):
    """Copy an image (H, W C) into the middle of a padded one that begins at ``start``: place = (top, left, row, size)
    in elements, of which a row has ``row``."""
    top, left, row, _ = place
    for h in range(image.shape[0]):
        at = start + (top + h) * row + left
        for j in range(image.shape[1]):
            padded[at + j] = image[h, j]


@njit(**FLAGS)
def _place_pair(x, n, padded, start, place):
    """Images n and n + 1 of x (N, H, W C), 16-bit numbers, side by side: word (h, j) is the two of them. Behind the
    last image there is a black one."""
    top, left, row, _ = place
    for h in range(x.shape[1]):
        at = start + (top + h) * row + left
        if n + 1 < len(x):
            for j in range(x.shape[2]):
                padded[at + j] = np.int32(x[n, h, j]) | (np.int32(x[n + 1, h, j]) << np.int32(16))
        else:
            for j in range(x.shape[2]):
                padded[at + j] = np.int32(x[n, h, j])


@njit(**FLAGS)
def _window(sums, plus, n, out, place):
    """Image n of ``out`` (N, H, W C) from the middle of a padded one, the inverse of :func:`_place`; and ``plus``."""
    top, left, row, _ = place
    for h in range(out.shape[1]):
        at = (top + h) * row + left
        for j in range(out.shape[2]):
            more = simd.widen(plus[n, h, j]) if len(plus) else np.float32(0)
            out[n, h, j] = simd.narrow(sums[at + j] + more, out)


@njit(**FLAGS)
def _sweep(x, a, first, last, b, r0, r1, w, bias, plus, out, start, o, channels, parts, step, lanes):
    """out[start + o_i + c] = bias[c] + sum over r0 <= r < r1 of x[a_i + b_r] w[r, c], for first <= i < last; and plus
    what ``plus`` has there, unless it is empty.

    All arrays are flat; w is in panels (see _panels); ``channels`` of the columns of w, and of bias, are real. They are
    ``parts`` pieces, the next of which is stored ``step`` behind the last.
    """
    width, piece = simd.width(lanes), channels // parts
    for c in range(0, len(bias), width):
        panel = c * (len(w) // len(bias))
        if last - first < ROWS:
            for i in range(first, last):
                acc = simd.load_sums(bias, c, lanes)
                for r in range(r0, r1):
                    acc = simd.fma(x, a[i] + b[r], simd.load(w, panel + r * width, lanes), acc)
                for p in range(parts):
                    at = start + o[i] + c + p * (step - piece)
                    if len(plus):
                        acc = simd.plus(plus, at, acc, p * piece - c, (p + 1) * piece - c)
                    simd.store(out, at, acc, p * piece - c, (p + 1) * piece - c)
            continue
        for i0 in range(first, last, ROWS):
            i = min(i0, last - ROWS)  # the last tile overlaps its neighbour: same sums, stored twice
            rows = simd.tile_rows(x, a, i)
            sums = simd.tile_fill(simd.load_sums(bias, c, lanes))
            for r in range(r0, r1):
                sums = simd.tile_fma(rows, simd.offset(b, r), simd.load(w, panel + r * width, lanes), sums)
            for p in range(parts):
                at = start + c + p * (step - piece)
                if len(plus):
                    sums = simd.tile_plus(simd.tile_rows(plus, o, i), at, sums, p * piece - c, (p + 1) * piece - c)
                simd.tile_store(simd.tile_rows(out, o, i), at, sums, p * piece - c, (p + 1) * piece - c)


@njit(parallel=True, **FLAGS)
def _gather_gemm(x, place, w, bias, plus, out, wide, images, a, o, pixels, b, taps, channels, parts, chunks, lanes):
    """The gather-GEMM of each image: out[n, o_i + c] = bias[c] + sum_r padded(x[n])[a_i + b_r] w[r, c] (+ plus).

    x (N, H, W C), float32 or words; out (N, H', W' C'), plus like it or (0,). ``images`` at a time have a and o of
    their own, image by image within each group g, which has the pixels[g] <= i < pixels[g + 1], and meets the
    taps[g] <= r < taps[g + 1]. ``place`` and ``wide`` are (top, left, row, size) of the padded image, and of the one
    that o counts in: out lies within it, or is it (size 0).
    """
    n_images, flat_out, size = len(x), out.reshape(-1), out.shape[1] * out.shape[2]
    flat_plus, no_plus = plus.reshape(-1), np.empty(0, np.float32)
    for chunk in prange(chunks):
        padded, margins = np.zeros(images * place[3], x.dtype), np.empty(wide[3], np.float32)
        end = n_images * (chunk + 1) // chunks
        for n in range(n_images * chunk // chunks, end, images):
            count = min(images, end - n)
            for k in range(count):
                _place(x[n + k], padded, k * place[3], place)
            for g in range(len(pixels) - 1):
                i0, r = pixels[g], (taps[g], taps[g + 1], w, bias)
                i, columns = (i0, i0 + (pixels[g + 1] - i0) // images * count, b), (o, channels, parts, wide[2], lanes)
                if wide[3]:
                    _sweep(padded, a, *i, *r, no_plus, margins, 0, *columns)
                else:
                    _sweep(padded, a, *i, *r, flat_plus, flat_out, n * size, *columns)
            if wide[3]:
                _window(margins, plus, n, out, wide)


@njit(**FLAGS)
def _reduce(padded, taps, k_taps, dy, first, columns, pixels, dw, at, db, at_db, stored, lanes):
    """dw[at + k columns + c] += sum over pixels r of padded[taps_k + pixels_r] dy[first + r columns + c], and
    db[at_db + c] += the sum of dy."""
    width = simd.width(lanes)
    for c in range(0, columns, width):
        total = simd.load_sums(db, at_db + c, lanes)
        for r in range(len(pixels)):
            total = simd.add(total, simd.load(dy, first + r * columns + c, lanes))
        simd.store(db, at_db + c, total, 0, width)
        for k in range(0, k_taps, ROWS):
            corner, rows = at + k * columns + c, simd.tile_rows(padded, taps, k)
            sums = simd.tile_load(stored, corner, lanes)
            for r in range(len(pixels)):
                row_of_dy = simd.load(dy, first + r * columns + c, lanes)
                sums = simd.tile_fma(rows, simd.offset(pixels, r), row_of_dy, sums)
            simd.tile_store(stored, corner, sums, 0, width)


@njit(parallel=True, **FLAGS)
def _gather_gemm_reduce(x, place, images, dy, taps, pixels, steps, dw, db, lanes):
    """dw[t, k, c] += sum over images and pixels r of padded(x[n])[taps_k + pixels_r] dy[n, r, c]; db[t, c] += dy.

    x (N, H, W C), dy (N, pixels, columns), float32; columns a multiple of 16; dw (chunks, K, columns), K a multiple of
    ROWS: a part for each chunk t of the images, which the caller adds up, so that the result does not depend on who
    finishes first. ``pixels`` are those of ``images`` images, one after another.
    """
    n_images, n_pixels, columns = dy.shape
    chunks, k_taps = dw.shape[0], dw.shape[1]
    flat_dy, flat_dw, flat_db = dy.reshape(-1), dw.reshape(-1), db.reshape(-1)
    stored = simd.tile_rows(flat_dw, steps, 0)
    for t in prange(chunks):
        padded, end = np.zeros(images * place[3], x.dtype), n_images * (t + 1) // chunks
        for n in range(n_images * t // chunks, end, images):
            count = min(images, end - n)
            for i in range(count):
                _place(x[n + i], padded, i * place[3], place)
            at, now = n * n_pixels * columns, pixels[: count * n_pixels]
            where = t * k_taps * columns, flat_db, t * columns
            _reduce(padded, taps, k_taps, flat_dy, at, columns, now, flat_dw, *where, stored, lanes)


@njit(parallel=True, **FLAGS)
def _gather_gemm_reduce_pairs(x, place, pairs, dy, columns, taps, pixels, steps, dw, db, lanes):
    """The same for 16-bit numbers, x (N, H, W C) and dy (N, pixels, C'), whose words are the same number of two images;
    ``pairs`` pairs of images at a time. C' is filled up with zeros to ``columns``."""
    n_images, n_pixels = dy.shape[:2]
    chunks, k_taps, n_pairs = dw.shape[0], dw.shape[1], (n_images + 1) // 2
    flat_dw, flat_db, dy_place = dw.reshape(-1), db.reshape(-1), (0, 0, columns, n_pixels * columns)
    stored = simd.tile_rows(flat_dw, steps, 0)
    for t in prange(chunks):
        padded, words = np.zeros(pairs * place[3], np.int32), np.zeros(pairs * dy_place[3], np.int32)
        end = n_pairs * (t + 1) // chunks
        for n in range(n_pairs * t // chunks, end, pairs):
            count = min(pairs, end - n)
            for i in range(count):
                _place_pair(x, 2 * (n + i), padded, i * place[3], place)
                _place_pair(dy, 2 * (n + i), words, i * dy_place[3], dy_place)
            now, where = pixels[: count * n_pixels], (t * k_taps * columns, flat_db, t * columns)
            _reduce(padded, taps, k_taps, words, 0, columns, now, flat_dw, *where, stored, lanes)


# --- convolution ------------------------------------------------------------------------------------------------------


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


def _words(w):
    """w (R, C) float32, R even, as words (R / 2, C): rows 2 r and 2 r + 1, rounded to bfloat16."""
    return np.ascontiguousarray(w.astype(BFLOAT16).reshape(len(w) // 2, 2, -1).swapaxes(1, 2)).view(np.int32)[..., 0]


def _panels(w, product):
    """(w (R, C) cut into panels as wide as a vector, one after another, flat; its Lanes): a sweep over r then reads
    memory in order. Columns are filled up with zeros to a multiple of 16. Words, unless ``product`` is "float32"."""
    w = w if product == "float32" else _words(w)
    r, c = w.shape
    columns = c + -c % WIDTH
    lanes = _lanes(columns, product)
    width = WIDTH * lanes.count
    panels = empty((columns // width, r, width)).view(w.dtype)
    full = c // width
    panels[:full] = w[:, : full * width].reshape(r, full, width).swapaxes(0, 1)
    if full < len(panels):
        panels[full, :, : c - full * width] = w[:, full * width :]
        panels[full, :, c - full * width :] = 0
    return panels.reshape(-1), lanes


def _lanes(columns, product="float32"):
    """As many vectors side by side as registers allow and the columns fill."""
    count = MAX_LANES
    while columns % (count * WIDTH):
        count -= 1
    return simd.Lanes(count, product)


def _columns(w):
    """w (R, C) at the start of a cache line, its columns filled up with zeros to a multiple of 16."""
    r, c = w.shape
    filled = empty((r, c + -c % WIDTH))
    filled[:, :c] = w
    filled[:, c:] = 0
    return filled


def _bias(b, channels):
    """b (or zeros), filled up with zeros to a multiple of 16."""
    filled = np.zeros(channels + -channels % WIDTH, np.float32)
    if b is not None:
        filled[:channels] = b
    return filled


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
    """:func:`_gather_gemm` by tiles; ``width`` is how many pixels follow each other in a row."""
    run = width * -(-16 // width)  # enough of them for a panel of w to be worth reading
    amx.gather(
        x, words, place, w, bias, plus, y, a, o, pixels, b, taps, run, threads(), TILES, amx.CONFIG, simd.Lanes(1)
    )


def conv2d(x, w, b, stride, padding, plus=None):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    _agree("plus", shape if plus is None else plus.shape, shape)
    rows, c, product = _source(x)
    w = w if product == "float32" else _even(w, 2)
    images = _together(shape[1] * shape[2])
    a, o, taps, place = _forward_tables((images, *x.shape[1:3], c), (*w.shape[:2], c, shape[3]), stride, padding)
    weights, lanes = _panels(w.reshape(-1, shape[3]), product)
    y = empty(shape, x.dtype)
    if _fills_tiles(product, x.shape[3], shape[3]):
        a, o, taps, place = _forward_tables((1, *x.shape[1:3], c), (*w.shape[:2], c, shape[3]), stride, padding)
        ends = np.array([0, len(a)]), taps, np.array([0, len(taps)])
        _by_tiles(rows, c, place, weights, _bias(b, shape[3]), _plus(plus, y), _rows_of(y), a, o, *ends, shape[2])
        return y
    groups = np.array([0, len(a)]), taps, np.array([0, len(taps)])  # of pixels: one, which meets all taps
    inputs = (rows, place, weights, _bias(b, shape[3]), _plus(plus, y), _rows_of(y), (0, 0, 0, 0), images)
    _gather_gemm(*inputs, a, o, *groups, shape[3], 1, threads(), lanes)
    return y


def _agree(what, found, wanted):
    """ValueError unless the two shapes, or sizes, are equal: a kernel would leave its arrays."""
    if found != wanted:
        raise ValueError(f"{what} {found} does not fit: {wanted} is wanted")


def conv2d_input_gradient(dy, w, stride, padding, x_shape, plus=None):
    _agree("dy", dy.shape, conv2d_shape(x_shape, w.shape, stride, padding))
    _agree("plus", x_shape if plus is None else plus.shape, tuple(x_shape))
    (kh, kw, c, _), (_, h, w_x, _) = w.shape, x_shape
    rows, c_out, product = _source(dy)
    w = w if product == "float32" else _even(w, 3)
    # Neighbours together, as long as they fit into a vector: few channels would leave most of it empty.
    spans = next(s for s in ((stride,) * 2, (1, stride), (1, 1)) if s[0] * s[1] * c <= WIDTH * MAX_LANES or s == (1, 1))
    images = _together(h * w_x // stride**2) if spans == (1, 1) else 1
    shapes = (images, *x_shape[1:]), (kh, kw, c, c_out)
    a, o, pixels, b, taps, index, place, wide = _input_gradient_tables(*shapes, stride, padding, spans)
    if kh % spans[0] or kw % spans[1]:
        w = np.pad(w, ((0, -kh % spans[0]), (0, -kw % spans[1]), (0, 0), (0, 0)))
    w = w.reshape(len(w) // spans[0], spans[0], w.shape[1] // spans[1], spans[1], c, w.shape[3])
    channels = spans[0] * spans[1] * c
    # (taps, elements of dy, numbers in an element, channels): the tables count elements
    w = w.transpose(0, 2, 5, 1, 3, 4).reshape(-1, 1 if product == "float32" else 2, channels)[index]
    weights, lanes = _panels(w.reshape(-1, channels), product)
    dx = empty(x_shape, dy.dtype)
    if spans == (1, 1) and _fills_tiles(product, dy.shape[3], channels):
        one = (1, *x_shape[1:]), shapes[1]
        a, o, pixels, b, taps, _, place, _ = _input_gradient_tables(*one, stride, padding, spans)
        ends = a, o, pixels, b, taps, -(-w_x // stride)
        _by_tiles(rows, c_out, place, weights, _bias(None, channels), _plus(plus, dx), _rows_of(dx), *ends)
        return dx
    inputs = (rows, place, weights, _bias(None, channels), _plus(plus, dx), _rows_of(dx), wide)
    _gather_gemm(*inputs, images, a, o, pixels, b, taps, channels, spans[0], threads(), lanes)
    return dx


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    _agree("dy", dy.shape, conv2d_shape(x.shape, w_shape, stride, padding))
    c_out = w_shape[3]
    columns = c_out + -c_out % WIDTH
    images = _together(dy.shape[1] * dy.shape[2])
    pixels, _, taps, place = _forward_tables((images, *x.shape[1:]), w_shape, stride, padding)
    rows = np.zeros(-(-len(taps) // ROWS) * ROWS, np.int64)  # the rows added are computed and thrown away
    rows[: len(taps)] = taps
    parts = sum_parts(len(rows) * columns)
    dw, db = np.zeros((parts, len(rows), columns), np.float32), np.zeros((parts, columns), np.float32)
    steps = np.arange(ROWS) * columns  # from one row of dw to the next
    if x.dtype == np.float32:
        flat = dy.reshape(-1, c_out)
        flat = (_columns(flat) if c_out % WIDTH else ready(flat)).reshape(*dy.shape[:1], -1, columns)
        lanes = _lanes(columns)
        _gather_gemm_reduce(_rows_of(x), place, images, flat, rows, pixels, steps, dw, db, lanes)
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
        lanes = _lanes(columns, PRODUCT)
        _gather_gemm_reduce_pairs(_rows_of(x), place, images, flat, columns, rows, pixels, steps, dw, db, lanes)
    return dw.sum(0)[: len(taps), :c_out].reshape(w_shape), db.sum(0)[:c_out]


# --- linear -----------------------------------------------------------------------------------------------------------
# A matrix product is a gather-GEMM too. On one thread it keeps up with OpenBLAS in the small network, but for the
# weight gradient (1.11 against 0.87 ms). With both, BLAS's idle threads spin beside Numba's: a step that took 14 ms
# with one thread of each took 17 to 24 with two.

_STRIP = 4 * ROWS


@njit(parallel=True, **FLAGS)
def _gather_gemm_rows(x, w, transposed, bias, out, channels, groups, panels, lanes):
    """out (M, channels) = x W + bias with W = w or its transpose; out flat. In parallel: each panel of W, of which
    its thread makes a copy in its row of ``panels``, times each of ``groups`` of the rows of x (M, K)."""
    (m, k), width, chunks = x.shape, simd.width(lanes), len(panels)
    a, o, b = np.arange(m) * k, np.arange(m) * channels, np.arange(k)
    flat_x, flat_w, tasks = x.reshape(-1), w.reshape(-1), len(bias) // width * groups
    no_plus = np.empty(0, np.float32)
    for t in prange(chunks):
        panel = panels[t]
        for task in range(tasks * t // chunks, tasks * (t + 1) // chunks):
            c, group = task // groups * width, task % groups
            count = min(width, channels - c)
            if transposed:
                for j in range(width):
                    for r in range(k):
                        panel[r * width + j] = w[c + j, r] if j < count else np.float32(0)
            elif count == width:
                for r in range(k):
                    simd.copy(flat_w, r * channels + c, panel, r * width, lanes)
            else:
                for r in range(k):
                    for j in range(width):
                        panel[r * width + j] = w[r, c + j] if j < count else np.float32(0)
            rows = m * group // groups, m * (group + 1) // groups
            _sweep(flat_x, a, *rows, b, 0, k, panel, bias[c : c + width], no_plus, out, c, o, count, 1, 0, lanes)


@njit(parallel=True, **FLAGS)
def _gather_gemm_columns(x, w, bias, out, channels, chunks, lanes):
    """out (M, channels) = x^T w + bias, the columns of x (K, M) in parallel, a strip of them at a time: copied, since
    rows that lie a power of two apart would not fit the cache together."""
    k, m = x.shape
    a, o, b = np.arange(_STRIP), np.arange(_STRIP) * channels, np.arange(k) * _STRIP
    strips, no_plus = (m + _STRIP - 1) // _STRIP, np.empty(0, np.float32)
    for t in prange(chunks):
        strip = np.empty(k * _STRIP, np.float32)
        for first in range(strips * t // chunks * _STRIP, strips * (t + 1) // chunks * _STRIP, _STRIP):
            count = min(_STRIP, m - first)
            for r in range(k):
                for i in range(count):
                    strip[r * _STRIP + i] = x[r, first + i]
            _sweep(strip, a, 0, count, b, 0, k, w, bias, no_plus, out, first * channels, o, channels, 1, 0, lanes)


def _product(x, w, transposed, b):
    """x W + b, W = w or its transpose. The work is cut by columns, and by rows only where threads would have none."""
    n = w.shape[0 if transposed else 1]
    _agree("x", x.shape[1:], w.shape[1:] if transposed else w.shape[:1])
    bias, y, chunks = _bias(b, n), empty((len(x), n)), threads()
    lanes = _lanes(len(bias))
    width = WIDTH * lanes.count
    groups = chunks // gcd(chunks, len(bias) // width)
    panels = empty((chunks, x.shape[1] * width))
    _gather_gemm_rows(ready(x), ready(w), transposed, bias, y.reshape(-1), n, groups, panels, lanes)
    return y


def linear(x, w, b):
    """bfloat16 x gives float32 y: logits, and all that comes after the first of these layers, are float32."""
    return _product(x, w, False, b)


def linear_input_gradient(dy, w):
    return _product(dy, w, True, None)


def linear_weight_gradient(x, dy):
    _agree("dy", len(dy), len(x))
    n = dy.shape[1]
    panels, lanes = _panels(dy, "float32")
    dw = empty((x.shape[1], n))
    _gather_gemm_columns(ready(x), panels, _bias(None, n), dw.reshape(-1), n, threads(), lanes)
    return dw, dy.sum(0)
