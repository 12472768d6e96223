"""Convolutions and linear layers on the CPU, float32: one sum, the gather-GEMM, for all their passes.

    out[o_i + c] += sum over r of in[a_i + b_r] * w[r, c]                 (docs/derivations/convolution.md)

    forward          i: output pixels            r: taps x input channels       w: the weights
    input gradient   i: input pixels, by parity  r: taps x output channels      w: the weights transposed
    weight gradient  i: taps x input channels    r: output pixels               w: dy

One micro-kernel serves the three: a tile of ROWS x 16 (or 32) sums stays in registers while r runs. There is no im2col.
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
from . import simd
from .flags import FLAGS
from .memory import empty
from .simd import MAX_LANES, ROWS, WIDTH


def ready(x):
    """x as a C-contiguous float32 array; itself if it is one."""
    return np.ascontiguousarray(x, np.float32)


def threads():
    """Numba's threads: into how many chunks a kernel cuts its work. Never a sum: see :func:`sum_parts`."""
    return numba.get_num_threads()


def sum_parts(size):
    """Into how many parts a sum of ``size`` numbers over images is cut: whatever the threads, so that its bits are the
    same for any number of them. Few where it is large, since each part is written and read once more."""
    return 16 if size <= 1 << 14 else 8 if size <= 1 << 16 else 4 if size <= 1 << 20 else 2


# --- the gather-GEMM --------------------------------------------------------------------------------------------------


@njit(**FLAGS)
def _place(image, padded, top, left, row):
    """Copy an image (H, W C) into the middle of a padded one, flat with rows of ``row`` floats."""
    for h in range(image.shape[0]):
        start = (top + h) * row + left
        for j in range(image.shape[1]):
            padded[start + j] = image[h, j]


@njit(**FLAGS)
def _window(padded, image, top, left, row):
    """The inverse of :func:`_place`."""
    for h in range(image.shape[0]):
        start = (top + h) * row + left
        for j in range(image.shape[1]):
            image[h, j] = padded[start + j]


@njit(**FLAGS)
def _sweep(x, a, first, last, b, r0, r1, w, bias, out, start, o, channels, parts, step, lanes):
    """out[start + o_i + c] = bias[c] + sum over r0 <= r < r1 of x[a_i + b_r] w[r, c], for first <= i < last.

    All arrays are flat; w is in panels (see _panels); ``channels`` of the columns of w, and of bias, are real. They are
    ``parts`` pieces, the next of which is stored ``step`` behind the last.
    """
    width, piece = WIDTH * len(lanes), channels // parts
    for c in range(0, len(bias), width):
        panel = c * (len(w) // len(bias))
        if last - first < ROWS:
            for i in range(first, last):
                acc = simd.load(bias, c, lanes)
                for r in range(r0, r1):
                    acc = simd.fma(x, a[i] + b[r], simd.load(w, panel + r * width, lanes), acc)
                for p in range(parts):
                    at = start + o[i] + c + p * (step - piece)
                    simd.store(out, at, acc, p * piece - c, (p + 1) * piece - c)
            continue
        for i0 in range(first, last, ROWS):
            i = min(i0, last - ROWS)  # the last tile overlaps its neighbour: same sums, stored twice
            rows = simd.tile_rows(x, a, i)
            sums = simd.tile_fill(simd.load(bias, c, lanes))
            for r in range(r0, r1):
                sums = simd.tile_fma(rows, simd.offset(b, r), simd.load(w, panel + r * width, lanes), sums)
            for p in range(parts):
                at = start + c + p * (step - piece)
                simd.tile_store(simd.tile_rows(out, o, i), at, sums, p * piece - c, (p + 1) * piece - c)


@njit(parallel=True, **FLAGS)
def _gather_gemm(x, place, w, bias, out, wide, a, o, pixels, b, taps, channels, parts, chunks, lanes):
    """The gather-GEMM of each image: out[n, o_i + c] = bias[c] + sum_r padded(x[n])[a_i + b_r] w[r, c].

    x (N, H, W C); out (N, H', W' C'). Group g has the pixels[g] <= i < pixels[g + 1] and the taps[g] <= r <
    taps[g + 1]. ``place`` and ``wide`` are (top, left, row, size) of the padded image, and of the one that o counts
    in: out lies within it, or is it (size 0).
    """
    n_images, flat_out, size = len(x), out.reshape(-1), out.shape[1] * out.shape[2]
    for chunk in prange(chunks):
        padded, margins = np.zeros(place[3], np.float32), np.empty(wide[3], np.float32)
        for n in range(n_images * chunk // chunks, n_images * (chunk + 1) // chunks):
            _place(x[n], padded, place[0], place[1], place[2])
            target, start = (margins, 0) if wide[3] else (flat_out, n * size)
            for g in range(len(pixels) - 1):
                i0, i1, r0, r1 = pixels[g], pixels[g + 1], taps[g], taps[g + 1]
                _sweep(padded, a, i0, i1, b, r0, r1, w, bias, target, start, o, channels, parts, wide[2], lanes)
            if wide[3]:
                _window(margins, out[n], wide[0], wide[1], wide[2])


@njit(parallel=True, **FLAGS)
def _gather_gemm_reduce(x, top, left, row, padded_size, dy, taps, pixels, steps, dw, db, lanes):
    """dw[t, k, c] += sum over images and pixels r of padded(x[n])[taps_k + pixels_r] dy[n, r, c]; db[t, c] += dy.

    dy (N, pixels, columns), columns a multiple of 16; dw (chunks, K, columns), K a multiple of ROWS: a part for each
    chunk t of the images, which the caller adds up, so that the result does not depend on who finishes first.
    """
    n_images, n_pixels, columns = dy.shape
    chunks, k_taps, width = dw.shape[0], dw.shape[1], WIDTH * len(lanes)
    flat_dy, flat_dw, flat_db = dy.reshape(-1), dw.reshape(-1), db.reshape(-1)
    stored = simd.tile_rows(flat_dw, steps, 0)
    for chunk in prange(chunks):
        padded = np.zeros(padded_size, np.float32)
        for n in range(n_images * chunk // chunks, n_images * (chunk + 1) // chunks):
            _place(x[n], padded, top, left, row)
            for c in range(0, columns, width):
                first = n * n_pixels * columns + c
                total = simd.load(flat_db, chunk * columns + c, lanes)
                for r in range(n_pixels):
                    total = simd.add(total, simd.load(flat_dy, first + r * columns, lanes))
                simd.store(flat_db, chunk * columns + c, total, 0, width)
                for k in range(0, k_taps, ROWS):
                    at, rows = (chunk * k_taps + k) * columns + c, simd.tile_rows(padded, taps, k)
                    sums = simd.tile_load(stored, at, lanes)
                    for r in range(n_pixels):
                        row_of_dy = simd.load(flat_dy, first + r * columns, lanes)
                        sums = simd.tile_fma(rows, simd.offset(pixels, r), row_of_dy, sums)
                    simd.tile_store(stored, at, sums, 0, width)


# --- convolution ------------------------------------------------------------------------------------------------------


def _grid(*axes):
    """Sums of one element of each axis, in row-major order: offsets into an array, int64."""
    total = np.zeros(1, np.int64)
    for axis in axes:
        total = (total[:, None] + np.asarray(axis, np.int64)).ravel()
    return total


@lru_cache(256)
def _forward_tables(x_shape, w_shape, stride, padding):
    """(pixels a, their outputs o, taps b, (top, left, row, size) of the padded image)."""
    (_, h, w, c), (kh, kw, _, c_out), (top, bottom, left, right) = x_shape, w_shape, padding
    _, ho, wo, _ = conv2d_shape(x_shape, w_shape, stride, padding)
    row = (w + left + right) * c
    pixels = _grid(np.arange(ho) * stride * row, np.arange(wo) * stride * c)
    taps = _grid(np.arange(kh) * row, np.arange(kw) * c, np.arange(c))
    return pixels, np.arange(ho * wo) * c_out, taps, (top, left * c, row, (h + top + bottom) * row)


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
    that the taps multiply, and (top, left, row, size) of the dx with margins; see :func:`_residues`."""
    (_, h, w, c), (kh, kw, _, c_out), (top, _, left, _) = x_shape, w_shape, padding
    _, ho, wo, _ = conv2d_shape(x_shape, w_shape, stride, padding)
    low_h, low_w = (kh - 1) // stride, (kw - 1) // stride  # rows and columns of zeros before dy
    height = low_h + max(ho, (h - 1 + top) // stride + 1)
    row = (low_w + max(wo, (w - 1 + left) // stride + 1)) * c_out
    groups_h, margin_h, wide_h = _residues(h, kh, top, stride, spans[0])
    groups_w, margin_w, wide_w = _residues(w, kw, left, stride, spans[1])
    k_width = -(-kw // spans[1])
    a, o, b, index, pixels, taps = [], [], [], [], [0], [0]
    for ys, at_h, ps, back_h in groups_h:
        for xs, at_w, qs, back_w in groups_w:
            a.append(_grid((at_h + low_h) * row, (at_w + low_w) * c_out))
            o.append(_grid(ys * wide_w * c, xs * c))
            b.append(_grid(-back_h * row, -back_w * c_out, np.arange(c_out)))
            index.append(_grid(ps * k_width * c_out, qs * c_out, np.arange(c_out)))
            pixels.append(pixels[-1] + len(a[-1]))
            taps.append(taps[-1] + len(b[-1]))
    a, o, b, index = (np.concatenate(v) for v in (a, o, b, index))
    place, wide = (low_h, low_w * c_out, row, height * row), (margin_h, margin_w * c, wide_w * c, wide_h * wide_w * c)
    return a, o, np.array(pixels), b, np.array(taps), index, place, (0, 0, 0, 0) if spans == (1, 1) else wide


def _columns(w):
    """w (R, C) at the start of a cache line, its columns filled up with zeros to a multiple of 16."""
    r, c = w.shape
    filled = empty((r, c + -c % WIDTH))
    filled[:, :c] = w
    filled[:, c:] = 0
    return filled


def _panels(w):
    """(w (R, C) cut into panels as wide as a vector, one after another, flat; the tuple ``lanes``): a sweep over r then
    reads memory in order. Columns are filled up with zeros to a multiple of 16."""
    r, c = w.shape
    columns = c + -c % WIDTH
    lanes = _lanes(columns)
    width = WIDTH * len(lanes)
    panels = empty((columns // width, r, width))
    full = c // width
    panels[:full] = w[:, : full * width].reshape(r, full, width).swapaxes(0, 1)
    if full < len(panels):
        panels[full, :, : c - full * width] = w[:, full * width :]
        panels[full, :, c - full * width :] = 0
    return panels.reshape(-1), lanes


def _bias(b, channels):
    """b (or zeros), filled up with zeros to a multiple of 16."""
    filled = np.zeros(channels + -channels % WIDTH, np.float32)
    if b is not None:
        filled[:channels] = b
    return filled


def _rows_of(x):
    """Images (N, H, W, C) as (N, H, W C)."""
    n, h, w, c = x.shape
    return ready(x).reshape(n, h, w * c)


def conv2d(x, w, b, stride, padding, plus=None):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    a, o, taps, place = _forward_tables((0, *x.shape[1:]), w.shape, stride, padding)
    weights, lanes = _panels(w.reshape(-1, shape[3]))
    y = empty(shape)
    groups = np.array([0, len(a)]), taps, np.array([0, len(taps)])  # of pixels: one, which meets all taps
    inputs = (_rows_of(x), place, weights, _bias(b, shape[3]), _rows_of(y), (0, 0, 0, 0))
    _gather_gemm(*inputs, a, o, *groups, shape[3], 1, threads(), lanes)
    return y if plus is None else np.add(y, plus, out=y)


def conv2d_input_gradient(dy, w, stride, padding, x_shape, plus=None):
    (kh, kw, c, c_out), (_, h, w_x, _) = w.shape, x_shape
    # Neighbours together, as long as they fit into a vector: few channels would leave most of it empty.
    spans = next(s for s in ((stride,) * 2, (1, stride), (1, 1)) if s[0] * s[1] * c <= WIDTH * MAX_LANES or s == (1, 1))
    a, o, pixels, b, taps, index, place, wide = _input_gradient_tables(
        (0, *x_shape[1:]), w.shape, stride, padding, spans
    )
    if kh % spans[0] or kw % spans[1]:
        w = np.pad(w, ((0, -kh % spans[0]), (0, -kw % spans[1]), (0, 0), (0, 0)))
    w = w.reshape(len(w) // spans[0], spans[0], w.shape[1] // spans[1], spans[1], c, c_out)
    channels = spans[0] * spans[1] * c
    weights, lanes = _panels(w.transpose(0, 2, 5, 1, 3, 4).reshape(-1, channels)[index])
    dx = empty((len(dy), h, w_x, c))
    inputs = (_rows_of(dy), place, weights, _bias(None, channels), _rows_of(dx), wide)
    _gather_gemm(*inputs, a, o, pixels, b, taps, channels, spans[0], threads(), lanes)
    return dx if plus is None else np.add(dx, plus, out=dx)


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    pixels, _, taps, place = _forward_tables((0, *x.shape[1:]), w_shape, stride, padding)
    flat = dy.reshape(-1, w_shape[3])
    flat = (_columns(flat) if w_shape[3] % WIDTH else ready(flat)).reshape(len(x), len(pixels), -1)
    rows = np.zeros(-(-len(taps) // ROWS) * ROWS, np.int64)  # the rows added are computed and thrown away
    rows[: len(taps)] = taps
    columns = flat.shape[2]
    chunks = sum_parts(len(rows) * columns)
    dw, db = np.zeros((chunks, len(rows), columns), np.float32), np.zeros((chunks, columns), np.float32)
    steps = np.arange(ROWS) * columns  # from one row of dw to the next
    _gather_gemm_reduce(_rows_of(x), *place, flat, rows, pixels, steps, dw, db, _lanes(columns))
    c_out = w_shape[3]
    return dw.sum(0)[: len(taps), :c_out].reshape(w_shape), db.sum(0)[:c_out]


def _lanes(columns):
    """As many vectors side by side as registers allow and the columns fill."""
    lanes = MAX_LANES
    while columns % (lanes * WIDTH):
        lanes -= 1
    return (0,) * lanes


# --- linear -----------------------------------------------------------------------------------------------------------
# A matrix product is a gather-GEMM too. On one thread it keeps up with OpenBLAS in the small network, but for the
# weight gradient (1.11 against 0.87 ms). With both, BLAS's idle threads spin beside Numba's: a step that took 14 ms
# with one thread of each took 17 to 24 with two.

_STRIP = 4 * ROWS


@njit(parallel=True, **FLAGS)
def _gather_gemm_rows(x, w, transposed, bias, out, channels, groups, panels, lanes):
    """out (M, channels) = x W + bias with W = w or its transpose; out flat. In parallel: each panel of W, of which
    its thread makes a copy in its row of ``panels``, times each of ``groups`` of the rows of x (M, K)."""
    (m, k), width, chunks = x.shape, WIDTH * len(lanes), len(panels)
    a, o, b = np.arange(m) * k, np.arange(m) * channels, np.arange(k)
    flat_x, flat_w, tasks = x.reshape(-1), w.reshape(-1), len(bias) // width * groups
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
                    simd.store(panel, r * width, simd.load(flat_w, r * channels + c, lanes), 0, width)
            else:
                for r in range(k):
                    for j in range(width):
                        panel[r * width + j] = w[r, c + j] if j < count else np.float32(0)
            rows = m * group // groups, m * (group + 1) // groups
            _sweep(flat_x, a, *rows, b, 0, k, panel, bias[c : c + width], out, c, o, count, 1, 0, lanes)


@njit(parallel=True, **FLAGS)
def _gather_gemm_columns(x, w, bias, out, channels, chunks, lanes):
    """out (M, channels) = x^T w + bias, the columns of x (K, M) in parallel, a strip of them at a time: copied, since
    rows that lie a power of two apart would not fit the cache together."""
    k, m = x.shape
    a, o, b = np.arange(_STRIP), np.arange(_STRIP) * channels, np.arange(k) * _STRIP
    strips = (m + _STRIP - 1) // _STRIP
    for t in prange(chunks):
        strip = np.empty(k * _STRIP, np.float32)
        for first in range(strips * t // chunks * _STRIP, strips * (t + 1) // chunks * _STRIP, _STRIP):
            count = min(_STRIP, m - first)
            for r in range(k):
                for i in range(count):
                    strip[r * _STRIP + i] = x[r, first + i]
            _sweep(strip, a, 0, count, b, 0, k, w, bias, out, first * channels, o, channels, 1, 0, lanes)


def _product(x, w, transposed, b):
    """x W + b, W = w or its transpose. The work is cut by columns, and by rows only where threads would have none."""
    n = w.shape[0 if transposed else 1]
    bias, y, chunks = _bias(b, n), empty((len(x), n)), threads()
    lanes = _lanes(len(bias))
    groups = chunks // gcd(chunks, len(bias) // (WIDTH * len(lanes)))
    panels = empty((chunks, x.shape[1] * WIDTH * len(lanes)))
    _gather_gemm_rows(ready(x), ready(w), transposed, bias, y.reshape(-1), n, groups, panels, lanes)
    return y


def linear(x, w, b):
    return _product(x, w, False, b)


def linear_input_gradient(dy, w):
    return _product(dy, w, True, None)


def linear_weight_gradient(x, dy):
    n = dy.shape[1]
    panels, lanes = _panels(dy)
    dw = empty((x.shape[1], n))
    _gather_gemm_columns(ready(x), panels, _bias(None, n), dw.reshape(-1), n, threads(), lanes)
    return dw, dy.sum(0)
