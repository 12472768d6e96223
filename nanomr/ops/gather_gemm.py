"""Convolutions and linear layers on the CPU, float32: one sum, the gather-GEMM, for all their passes.

    out[o_i + c] += sum over r of in[a_i + b_r] * w[r, c]                 (docs/derivations/convolution.md)

    forward          i: output pixels            r: taps x input channels       w: the weights
    input gradient   i: input pixels, by parity  r: taps x output channels      w: the weights transposed
    weight gradient  i: taps x input channels    r: output pixels               w: dy

One micro-kernel serves the three: a tile of ROWS x 16 (or 32) sums stays in registers while r runs. There is no im2col.
"""

import os
from functools import lru_cache

# A thread that waits for the others spins for a moment (kernels follow each other closely), then sleeps: with GNU
# OpenMP's own, far longer spinning, a step beside other busy processes can take ten times as long. The variable is
# read once, when Numba starts its threads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numba
import numpy as np
from numba import njit, prange

from . import simd
from .memory import empty
from .reference import conv2d_shape
from .simd import MAX_LANES, ROWS, WIDTH

FLAGS = dict(fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True)  # but NaN and infinity stay what they are


def ready(x):
    """x as a C-contiguous float32 array; itself if it is one."""
    return np.ascontiguousarray(x, np.float32)


def threads():
    """Numba's threads: into how many chunks a kernel cuts its work."""
    return numba.get_num_threads()


# --- the gather-GEMM --------------------------------------------------------------------------------------------------


@njit(**FLAGS)
def _place(image, padded, top, left, row):
    """Copy an image (H, W C) into the middle of a padded one, flat with rows of ``row`` floats."""
    for h in range(image.shape[0]):
        start = (top + h) * row + left
        for j in range(image.shape[1]):
            padded[start + j] = image[h, j]


@njit(**FLAGS)
def _sweep(x, a, first, last, b, r0, r1, w, bias, out, start, o, channels, lanes):
    """out[start + o_i + c] = bias[c] + sum over r0 <= r < r1 of x[a_i + b_r] w[r, c], for first <= i < last.

    All arrays are flat; w is in panels (see _panels); ``channels`` of the columns of w, and of bias, are real.
    """
    width = WIDTH * len(lanes)
    for c in range(0, len(bias), width):
        count, panel = min(width, channels - c), c * (len(w) // len(bias))
        if last - first < ROWS:
            for i in range(first, last):
                acc = simd.load(bias, c, lanes)
                for r in range(r0, r1):
                    acc = simd.fma(x, a[i] + b[r], simd.load(w, panel + r * width, lanes), acc)
                simd.store(out, start + o[i] + c, acc, count)
            continue
        for i0 in range(first, last, ROWS):
            i = min(i0, last - ROWS)  # the last tile overlaps its neighbour: same sums, stored twice
            rows = simd.tile_rows(x, a, i)
            sums = simd.tile_fill(simd.load(bias, c, lanes))
            for r in range(r0, r1):
                sums = simd.tile_fma(rows, simd.offset(b, r), simd.load(w, panel + r * width, lanes), sums)
            simd.tile_store(simd.tile_rows(out, o, i), start + c, sums, count)


@njit(parallel=True, **FLAGS)
def _gather_gemm(x, top, left, row, padded_size, w, bias, out, a, o, pixels, b, taps, channels, chunks, lanes):
    """The gather-GEMM of each image: out[n, o_i + c] = bias[c] + sum_r padded(x[n])[a_i + b_r] w[r, c].

    x (N, H, W C); out (N, size). Group g has the pixels[g] <= i < pixels[g + 1] and the taps[g] <= r <
    taps[g + 1].
    """
    n_images, flat_out = len(x), out.reshape(-1)
    for chunk in prange(chunks):
        padded = np.zeros(padded_size, np.float32)
        for n in range(n_images * chunk // chunks, n_images * (chunk + 1) // chunks):
            _place(x[n], padded, top, left, row)
            for g in range(len(pixels) - 1):
                i0, i1, r0, r1 = pixels[g], pixels[g + 1], taps[g], taps[g + 1]
                start = n * out.shape[1]
                _sweep(padded, a, i0, i1, b, r0, r1, w, bias, flat_out, start, o, channels, lanes)


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
                simd.store(flat_db, chunk * columns + c, total, width)
                for k in range(0, k_taps, ROWS):
                    at, rows = (chunk * k_taps + k) * columns + c, simd.tile_rows(padded, taps, k)
                    sums = simd.tile_load(stored, at, lanes)
                    for r in range(n_pixels):
                        row_of_dy = simd.load(flat_dy, first + r * columns, lanes)
                        sums = simd.tile_fma(rows, simd.offset(pixels, r), row_of_dy, sums)
                    simd.tile_store(stored, at, sums, width)


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


@lru_cache(256)
def _input_gradient_tables(x_shape, w_shape, stride, padding, span):
    """The same for dx from dy, one group of pixels for each residue of (row, column) modulo the stride: they meet the
    same taps. Also the rows of w, as (kh, kw / span, Cout), that the taps multiply, and dx's width and first column.

    With ``span`` = stride, ``stride`` neighbours in a row, which read the same pixels of dy, are one pixel of
    stride x C channels: else the few channels of an image would leave most of a vector empty. dx is then wider.
    """
    (_, h, w, c), (kh, kw, _, c_out), (top, _, left, _) = x_shape, w_shape, padding
    _, ho, wo, _ = conv2d_shape(x_shape, w_shape, stride, padding)
    low_h, low_w = (kh - 1) // stride, (kw - 1) // stride  # rows and columns of zeros before dy
    height = low_h + max(ho, (h - 1 + top) // stride + 1)
    row = (low_w + max(wo, (w - 1 + left) // stride + 1)) * c_out
    blocks = np.arange(left // stride, (w - 1 + left) // stride + 1)  # of ``stride`` columns, from -left
    width, first = (stride * len(blocks), left % stride) if span > 1 else (w, 0)
    k_width = -(-kw // span)
    a, o, b, index, pixels, taps = [], [], [], [], [0], [0]
    for rh in range(stride):
        ys, ps = np.arange((rh - top) % stride, h, stride), np.arange(rh, kh, stride)
        for rw in range(stride if span == 1 else 1):
            if span == 1:
                xs, qs = np.arange((rw - left) % stride, w, stride), np.arange(rw, kw, stride)
                at, back = (xs + left) // stride, qs // stride
            else:
                xs, qs = stride * (blocks - blocks[0]), np.arange(k_width)
                at, back = blocks, qs
            a.append(_grid(((ys + top) // stride + low_h) * row, (at + low_w) * c_out))
            o.append(_grid(ys * width * c, xs * c))
            b.append(_grid(-(ps // stride) * row, -back * c_out, np.arange(c_out)))
            index.append(_grid(ps * k_width * c_out, qs * c_out, np.arange(c_out)))
            pixels.append(pixels[-1] + len(a[-1]))
            taps.append(taps[-1] + len(b[-1]))
    a, o, b, index = (np.concatenate(v) for v in (a, o, b, index))
    place = (low_h, low_w * c_out, row, height * row)
    return a, o, np.array(pixels), b, np.array(taps), index, place, width, first


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


def conv2d(x, w, b, stride, padding):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    a, o, taps, place = _forward_tables((0, *x.shape[1:]), w.shape, stride, padding)
    weights, lanes = _panels(w.reshape(-1, shape[3]))
    y = empty(shape)
    inputs = (_rows_of(x), *place, weights, _bias(b, shape[3]))
    tables = (a, o, np.array([0, len(a)]), taps, np.array([0, len(taps)]))  # one group of pixels, which meet all taps
    _gather_gemm(*inputs, y.reshape(len(x), -1), *tables, shape[3], threads(), lanes)
    return y


def conv2d_input_gradient(dy, w, stride, padding, x_shape):
    (kh, kw, c, c_out), (_, h, w_x, _) = w.shape, x_shape
    span = stride if stride * c <= WIDTH else 1
    tables = _input_gradient_tables((0, *x_shape[1:]), w.shape, stride, padding, span)
    a, o, pixels, b, taps, index, place, width, first = tables
    spans = np.pad(w, ((0, 0), (0, -kw % span), (0, 0), (0, 0))).reshape(kh, -1, span, c, c_out)
    weights, lanes = _panels(spans.transpose(0, 1, 4, 2, 3).reshape(-1, span * c)[index])
    dx = empty((len(dy), h, width, c))
    inputs = (_rows_of(dy), *place, weights, _bias(None, span * c))
    _gather_gemm(*inputs, dx.reshape(len(dy), -1), a, o, pixels, b, taps, span * c, threads(), lanes)
    return dx[:, :, first : first + w_x]


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    pixels, _, taps, place = _forward_tables((0, *x.shape[1:]), w_shape, stride, padding)
    flat = dy.reshape(-1, w_shape[3])
    flat = (_columns(flat) if w_shape[3] % WIDTH else ready(flat)).reshape(len(x), len(pixels), -1)
    rows = np.zeros(-(-len(taps) // ROWS) * ROWS, np.int64)  # the rows added are computed and thrown away
    rows[: len(taps)] = taps
    columns, chunks = flat.shape[2], threads()
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
def _gather_gemm_rows(x, w, bias, out, channels, chunks, lanes):
    """out (M, channels) = x w + bias, the rows of x (M, K) in parallel; out flat, w in panels."""
    m, k = x.shape
    a, o, b = np.arange(m) * k, np.arange(m) * channels, np.arange(k)
    flat_x = x.reshape(-1)
    for t in prange(chunks):
        _sweep(flat_x, a, m * t // chunks, m * (t + 1) // chunks, b, 0, k, w, bias, out, 0, o, channels, lanes)


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
            _sweep(strip, a, 0, count, b, 0, k, w, bias, out, first * channels, o, channels, lanes)


@njit(parallel=True, **FLAGS)
def _transposed_panels(w, panels):
    """panels[p, r, j] = w[p width + j, r], or 0 behind the last row of w."""
    for p in prange(panels.shape[0]):
        width = panels.shape[2]
        for r in range(panels.shape[1]):
            for j in range(width):
                row = p * width + j
                panels[p, r, j] = w[row, r] if row < w.shape[0] else np.float32(0)


def linear(x, w, b):
    panels, lanes = _panels(w)
    y = empty((len(x), w.shape[1]))
    _gather_gemm_rows(ready(x), panels, _bias(b, w.shape[1]), y.reshape(-1), w.shape[1], threads(), lanes)
    return y


def linear_input_gradient(dy, w):
    n = len(w)
    columns = n + -n % WIDTH
    lanes = _lanes(columns)
    width = WIDTH * len(lanes)
    panels = empty((columns // width, w.shape[1], width))
    _transposed_panels(ready(w), panels)
    dx = empty((len(dy), n))
    _gather_gemm_rows(ready(dy), panels.reshape(-1), _bias(None, n), dx.reshape(-1), n, threads(), lanes)
    return dx


def linear_weight_gradient(x, dy):
    n = dy.shape[1]
    panels, lanes = _panels(dy)
    dw = empty((x.shape[1], n))
    _gather_gemm_columns(ready(x), panels, _bias(None, n), dw.reshape(-1), n, threads(), lanes)
    return dw, dy.sum(0)
