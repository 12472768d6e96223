"""One sum, the gather-GEMM, for all passes of convolutions and linear layers on the CPU; and the linear layers.

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
from math import gcd

# A thread that waits for the others spins for a moment (kernels follow each other closely), then sleeps: with GNU
# OpenMP's own, far longer spinning, a step beside other busy processes can take ten times as long. The variable is
# read once, when Numba starts its threads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numba
import numpy as np
from numba import prange

from . import simd
from .flags import FLAGS, kernel
from .memory import BFLOAT16, can_be_written, empty, ready
from .simd import MAX_LANES, ROWS, WIDTH


def threads():
    """Numba's threads: into how many chunks a kernel cuts its work. Never a sum: see :func:`sum_parts`."""
    return numba.get_num_threads()


def sum_parts(size):
    """Into how many parts a sum of ``size`` numbers over images is cut: whatever the threads, so that its bits are the
    same for any number of them. Few where it is large, since each part is written and read once more."""
    return 16 if size <= 1 << 14 else 8 if size <= 1 << 17 else 4


# --- the gather-GEMM --------------------------------------------------------------------------------------------------


@kernel(**FLAGS)
def place_image(image, padded, start, place):
    """Copy an image (H, W C) into the middle of a padded one that begins at ``start``: place = (top, left, row, size)
    in elements, of which a row has ``row``.

    Here and below, rows are slices: of an index that is a sum the compiler must think that it may be negative and
    count from the end, and so it scatters number by number what it could copy by vectors.
    """
    top, left, row, _ = place
    width = image.shape[1]
    for h in range(image.shape[0]):
        at = start + (top + h) * row + left
        into = padded[at : at + width]
        for j in range(width):
            into[j] = image[h, j]


@kernel(**FLAGS)
def _place_pair(x, n, padded, start, place):
    """Images n and n + 1 of x (N, H, W C), 16-bit numbers, side by side: word (h, j) is the two of them. Behind the
    last image there is a black one."""
    top, left, row, _ = place
    width = x.shape[2]
    for h in range(x.shape[1]):
        at = start + (top + h) * row + left
        into = padded[at : at + width]
        if n + 1 < len(x):
            for j in range(width):
                into[j] = np.int32(x[n, h, j]) | (np.int32(x[n + 1, h, j]) << np.int32(16))
        else:
            for j in range(width):
                into[j] = np.int32(x[n, h, j])


@kernel(**FLAGS)
def window(sums, plus, n, out, place):
    """Image n of ``out`` (N, H, W C) from the middle of a padded one, inverse of :func:`place_image`; and ``plus``."""
    top, left, row, _ = place
    width = out.shape[2]
    for h in range(out.shape[1]):
        at = (top + h) * row + left
        source = sums[at : at + width]
        for j in range(width):
            more = simd.widen(plus[n, h, j]) if len(plus) else np.float32(0)
            out[n, h, j] = simd.narrow(source[j] + more, out)


@kernel(**FLAGS)
def sweep(x, a, first, last, b, r0, r1, w, bias, plus, out, start, o, channels, parts, step, lanes):
    """out[start + o_i + c] = bias[c] + sum over r0 <= r < r1 of x[a_i + b_r] w[r, c], for first <= i < last; and plus
    what ``plus`` has there, unless it is empty.

    All arrays are flat; w is in panels (see panels_of); ``channels`` of the columns of w, and of bias, are real. They
    are ``parts`` pieces, the next of which is stored ``step`` behind the last.
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


@kernel(parallel=True, **FLAGS)
def gather_gemm(x, place, w, bias, plus, out, wide, images, a, o, pixels, b, taps, channels, parts, chunks, lanes):
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
                place_image(x[n + k], padded, k * place[3], place)
            for g in range(len(pixels) - 1):
                i0, r = pixels[g], (taps[g], taps[g + 1], w, bias)
                i, columns = (i0, i0 + (pixels[g + 1] - i0) // images * count, b), (o, channels, parts, wide[2], lanes)
                if wide[3]:
                    sweep(padded, a, *i, *r, no_plus, margins, 0, *columns)
                else:
                    sweep(padded, a, *i, *r, flat_plus, flat_out, n * size, *columns)
            if wide[3]:
                window(margins, plus, n, out, wide)


@kernel(**FLAGS)
def reduce(padded, taps, dy, first, columns, pixels, dw, at, db, at_db, stored, lanes):
    """dw[at + k columns + c] += sum over pixels r of padded[taps_k + pixels_r] dy[first + r columns + c], and
    db[at_db + c] += the sum of dy. ``taps`` as :func:`runs_of` gives them."""
    width = simd.width(lanes)
    for c in range(0, columns, width):
        total = simd.load_sums(db, at_db + c, lanes)
        for r in range(len(pixels)):
            total = simd.add(total, simd.load(dy, first + r * columns + c, lanes))
        simd.store(db, at_db + c, total, 0, width)
        for k in range(0, taps.size, ROWS):
            corner, rows = at + k * columns + c, simd.tile_rows(padded, taps, k)
            sums = simd.tile_load(stored, corner, lanes)
            for r in range(len(pixels)):
                row_of_dy = simd.load(dy, first + r * columns + c, lanes)
                sums = simd.tile_fma(rows, simd.offset(pixels, r), row_of_dy, sums)
            simd.tile_store(stored, corner, sums, 0, width)


@kernel(parallel=True, **FLAGS)
def gather_gemm_reduce(x, place, images, dy, taps, pixels, steps, dw, db, lanes):
    """dw[t, k, c] += sum over images and pixels r of padded(x[n])[taps_k + pixels_r] dy[n, r, c]; db[t, c] += dy.

    x (N, H, W C), dy (N, pixels, columns), float32; columns a multiple of 16; dw (chunks, K, columns), K a multiple of
    ROWS: a part for each chunk t of the images, which the caller adds up, so that the result does not depend on who
    finishes first. ``pixels`` are those of ``images`` images, one after another.
    """
    n_images, n_pixels, columns = dy.shape
    chunks, k_taps = dw.shape[:2]
    flat_dy, flat_dw, flat_db = dy.reshape(-1), dw.reshape(-1), db.reshape(-1)
    stored = simd.tile_rows(flat_dw, steps, 0)
    for t in prange(chunks):
        padded, end = np.zeros(images * place[3], x.dtype), n_images * (t + 1) // chunks
        for n in range(n_images * t // chunks, end, images):
            count = min(images, end - n)
            for i in range(count):
                place_image(x[n + i], padded, i * place[3], place)
            at, now = n * n_pixels * columns, pixels[: count * n_pixels]
            where = t * k_taps * columns, flat_db, t * columns
            reduce(padded, taps, flat_dy, at, columns, now, flat_dw, *where, stored, lanes)


@kernel(parallel=True, **FLAGS)
def gather_gemm_reduce_pairs(x, place, pairs, dy, columns, taps, pixels, steps, dw, db, lanes):
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
            reduce(padded, taps, words, 0, columns, now, flat_dw, *where, stored, lanes)


def runs_of(taps):
    """Taps, int64, filled up to a multiple of ROWS: the rows added are computed and thrown away. As a table of two
    dimensions if each ROWS of them follow each other: it tells :func:`simd.tile_rows` so."""
    table = np.zeros(-(-len(taps) // ROWS) * ROWS, np.int64)
    table[: len(taps)] = taps
    runs = table.reshape(-1, ROWS)
    return runs if (runs == runs[:, :1] + np.arange(ROWS)).all() else table


# --- what both kinds of layers need ----------------------------------------------------------------------------------


def agree(what, found, wanted):
    """ValueError unless the two shapes, or sizes, are equal: a kernel would leave its arrays."""
    if found != wanted:
        raise ValueError(f"{what} {found} does not fit: {wanted} is wanted")


def _words(w):
    """w (R, C) float32, R even, as words (R / 2, C): rows 2 r and 2 r + 1, rounded to bfloat16."""
    return np.ascontiguousarray(w.astype(BFLOAT16).reshape(len(w) // 2, 2, -1).swapaxes(1, 2)).view(np.int32)[..., 0]


def panels_of(w, product, width=None):
    """(w (R, C) cut into panels as wide as a vector (or ``width``), one after another, flat; its Lanes): a sweep over r
    then reads memory in order. Columns are filled up with zeros to a multiple of 16. Words, unless ``product`` is
    "float32"."""
    w = w if product == "float32" else _words(w)
    r, c = w.shape
    columns = c + -c % WIDTH
    lanes = lanes_of(columns, product)
    width = width or WIDTH * lanes.count
    panels = empty((columns // width, r, width)).view(w.dtype)
    full = c // width
    panels[:full] = w[:, : full * width].reshape(r, full, width).swapaxes(0, 1)
    if full < len(panels):
        panels[full, :, : c - full * width] = w[:, full * width :]
        panels[full, :, c - full * width :] = 0
    return panels.reshape(-1), lanes


def lanes_of(columns, product="float32"):
    """As many vectors side by side as registers allow and the columns fill."""
    count = MAX_LANES
    while columns % (count * WIDTH):
        count -= 1
    return simd.Lanes(count, product)


def columns_of(w):
    """w (R, C) at the start of a cache line, its columns filled up with zeros to a multiple of 16."""
    r, c = w.shape
    filled = empty((r, c + -c % WIDTH))
    filled[:, :c] = w
    filled[:, c:] = 0
    return filled


def bias_of(b, channels):
    """b (or zeros), filled up with zeros to a multiple of 16."""
    filled = np.zeros(channels + -channels % WIDTH, np.float32)
    if b is not None:
        filled[:channels] = b
    return filled


# --- linear -----------------------------------------------------------------------------------------------------------
# A matrix product is a gather-GEMM too. On one thread it keeps up with OpenBLAS in the small network, but for the
# weight gradient (1.11 against 0.87 ms). With both, BLAS's idle threads spin beside Numba's: a step that took 14 ms
# with one thread of each took 17 to 24 with two.

_STRIP = 4 * ROWS


@kernel(parallel=True, **FLAGS)
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
            sweep(flat_x, a, *rows, b, 0, k, panel, bias[c : c + width], no_plus, out, c, o, count, 1, 0, lanes)


@kernel(parallel=True, **FLAGS)
def _gather_gemm_columns(x, w, bias, adds, out, channels, chunks, lanes):
    """out (M, channels) = x^T w + bias, or ``adds`` that to what is there; the columns of x (K, M) in parallel, a strip
    of them at a time: copied, since rows that lie a power of two apart would not fit the cache together."""
    k, m = x.shape
    a, o, b = np.arange(_STRIP), np.arange(_STRIP) * channels, np.arange(k) * _STRIP
    strips = (m + _STRIP - 1) // _STRIP
    for t in prange(chunks):
        strip, plus = np.empty(k * _STRIP, np.float32), out[: len(out) if adds else 0]
        for first in range(strips * t // chunks * _STRIP, strips * (t + 1) // chunks * _STRIP, _STRIP):
            count = min(_STRIP, m - first)
            for r in range(k):
                into, source = strip[r * _STRIP : (r + 1) * _STRIP], x[r, first : first + count]
                if count == _STRIP:  # a number that the compiler knows
                    for i in range(_STRIP):
                        into[i] = source[i]
                else:
                    for i in range(count):
                        into[i] = source[i]
            sweep(strip, a, 0, count, b, 0, k, w, bias, plus, out, first * channels, o, channels, 1, 0, lanes)


def _product(x, w, transposed, b):
    """x W + b, W = w or its transpose. The work is cut by columns, and by rows only where threads would have none."""
    n = w.shape[0 if transposed else 1]
    agree("x", x.shape[1:], w.shape[1:] if transposed else w.shape[:1])
    bias, y, chunks = bias_of(b, n), empty((len(x), n)), threads()
    lanes = lanes_of(len(bias))
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


def linear_weight_gradient(x, dy, into=None):
    agree("dy", len(dy), len(x))
    n = dy.shape[1]
    panels, lanes = panels_of(dy, "float32")
    agree("into", (x.shape[1], n) if into is None else into.shape, (x.shape[1], n))
    at_once = into is not None and can_be_written(into, np.float32)
    at_once = at_once and x.shape[1] % ROWS == 0  # else tiles overlap, which would add some numbers twice
    dw = into if at_once else empty((x.shape[1], n))
    _gather_gemm_columns(ready(x), panels, bias_of(None, n), at_once, dw.reshape(-1), n, threads(), lanes)
    if into is not None and not at_once:
        into += dw
    return dw if into is None else into, dy.sum(0)
