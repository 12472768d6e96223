"""The gradients of 4 x 4 convolutions of stride 2 in float32, by 9 multiplications where there are 16: Winograd's
F(2 x 2, 2 x 2) of every second pixel.

Pixels (2 i + p, 2 j + q) of the padded image, one for each p, q in {0, 1}, are four images of half the size; together
they are one with four times the channels, (p, q, c), which the window meets as one of 2 x 2 and stride 1. Two by two
outputs y see a tile d (3 x 3) of it through such a window g. With * entry by entry,

    y = G^T (U * V) G,    U = G g G^T,    V = B^T d B             (docs/derivations/convolution.md)

and read from the end, these are the gradients:

    dd = B (U * dM) B^T,    dg = G^T (V * dM) G,    dM = G dy G^T

The forward pass stays the plain sum of products: what is proved of a network in float32 is about such sums.
"""

from functools import lru_cache

import numpy as np
from numba import njit, prange

from . import simd
from .flags import FLAGS, kernel
from .gather_gemm import lanes_of, place_image, reduce, runs_of, sum_parts, sweep, threads, window
from .memory import empty, ready
from .simd import ROWS, WIDTH
from .winograd import add_parts, room_for_tiles, rows_of, two_by_two, where_tile

ENTRIES = 9  # of a tile
LEAST = 16, 32  # channels, read and stored, below which the transforms cost what they save
BLOCK = 64  # tiles at a time: what is made of them stays in the cache until it is used


def fits(w_shape, stride):
    """Is it the right kernel, and are there enough channels? The number of images has no say: an image's result must
    not depend on who is beside it."""
    kh, kw, c, c_out = w_shape
    return (kh, kw, stride) == (4, 4, 2) and not (c % LEAST[0] or c_out % LEAST[1])


# --- the transforms, a vector of channels at a time -------------------------------------------------------------------


@njit(inline="always")
def _load(x, at, step, lanes):
    """Three vectors, ``step`` numbers apart."""
    return simd.load_sums(x, at, lanes), simd.load_sums(x, at + step, lanes), simd.load_sums(x, at + 2 * step, lanes)


@njit(inline="always")
def _store(x, at, step, values):
    simd.store(x, at, values[0], 0, WIDTH)
    simd.store(x, at + step, values[1], 0, WIDTH)
    simd.store(x, at + 2 * step, values[2], 0, WIDTH)


@njit(inline="always")
def _b(v):
    """B^T v."""
    return simd.minus(v[0], v[1]), v[1], simd.minus(v[2], v[1])


@njit(inline="always")
def _b_transposed(v):
    """B v."""
    return v[0], simd.minus(simd.minus(v[1], v[0]), v[2]), v[2]


@njit(inline="always")
def _g(v):
    """G v."""
    return v[0], simd.total(v[0], v[1]), v[1]


@njit(inline="always")
def _g_transposed(v):
    """G^T v."""
    return simd.total(v[0], v[1]), simd.total(v[1], v[2])


@njit(inline="always")
def _pick(columns, i):
    return columns[0][i], columns[1][i], columns[2][i]


@kernel(**FLAGS)
def _tile_of_input(x, at, row, channels, v, to, step, lanes):
    """v[to + e step + c] = entry e of B^T d B, d the tile at x[at] in the padded image, a row of which has ``row``
    numbers and a pixel ``channels``; c counts (p, q, channel)."""
    for p in range(2):
        for c in range(0, 2 * channels, WIDTH):
            k = at + p * row + c
            columns = (
                _b(_load(x, k, 2 * row, lanes)),
                _b(_load(x, k + 2 * channels, 2 * row, lanes)),
                _b(_load(x, k + 4 * channels, 2 * row, lanes)),
            )
            k = to + 2 * p * channels + c
            _store(v, k, step, _b(_pick(columns, 0)))
            _store(v, k + 3 * step, step, _b(_pick(columns, 1)))
            _store(v, k + 6 * step, step, _b(_pick(columns, 2)))


@njit(inline="always")
def _add(x, at, step, values, lanes):
    """Three vectors, ``step`` numbers apart, are added to what is there."""
    there = _load(x, at, step, lanes)
    sums = simd.total(there[0], values[0]), simd.total(there[1], values[1]), simd.total(there[2], values[2])
    _store(x, at, step, sums)


@kernel(**FLAGS)
def _tile_to_input(m, start, step, x, at, row, channels, lanes):
    """The transpose: B M B^T is added to the tile at x[at]."""
    for p in range(2):
        for c in range(0, 2 * channels, WIDTH):
            k = start + 2 * p * channels + c
            columns = (
                _b_transposed(_load(m, k, 3 * step, lanes)),
                _b_transposed(_load(m, k + step, 3 * step, lanes)),
                _b_transposed(_load(m, k + 2 * step, 3 * step, lanes)),
            )
            k = at + p * row + c
            _add(x, k, 2 * channels, _b_transposed(_pick(columns, 0)), lanes)
            _add(x, k + 2 * row, 2 * channels, _b_transposed(_pick(columns, 1)), lanes)
            _add(x, k + 4 * row, 2 * channels, _b_transposed(_pick(columns, 2)), lanes)


@kernel(**FLAGS)
def _tile_of_gradient(dy, at, row, inside, channels, m, to, step, lanes):
    """m[to + e step + c] = entry e of G dy G^T, of the :func:`two_by_two` at dy[at]."""
    for c in range(0, channels, WIDTH):
        y00, y01, y10, y11 = two_by_two(dy, at + c, row, inside, channels, lanes)
        left, other = _g((y00, y10)), _g((y01, y11))
        k = to + c
        _store(m, k, step, _g((left[0], other[0])))
        _store(m, k + 3 * step, step, _g((left[1], other[1])))
        _store(m, k + 6 * step, step, _g((left[2], other[2])))


@kernel(**FLAGS)
def _row_to_weights(du, k, rows, channels, c_out, parts, dw, lanes):
    """dw[p, q] of channel k % channels for (p, q) = k // channels, in the two rows and columns of the window that have
    them: G^T (the sum over the parts of du) G, for all c."""
    step, q = rows * c_out, channels * c_out
    p, k_q = divmod(k // channels, 2)
    to = (4 * p + k_q) * q + k % channels * c_out  # the first of the four taps; the others are 2 and 8 pixels on
    for c in range(0, c_out, WIDTH):
        at = k * c_out + c
        add_parts(du, at, step, ENTRIES, parts, lanes)
        columns = (
            _g_transposed(_load(du, at, 3 * step, lanes)),
            _g_transposed(_load(du, at + step, 3 * step, lanes)),
            _g_transposed(_load(du, at + 2 * step, 3 * step, lanes)),
        )
        for a in range(2):
            left, right = _g_transposed(_pick(columns, a))
            simd.store(dw, to + 8 * a * q + c, left, 0, WIDTH)
            simd.store(dw, to + (8 * a + 2) * q + c, right, 0, WIDTH)


# --- blocks of tiles --------------------------------------------------------------------------------------------------


@kernel(**FLAGS)
def _gradient_block(dy, first, count, grid, shape, m, step, lanes):
    """dM of the tiles first to first + count of dy, images of ``shape`` (H, W, C): m[e step + t C + c]."""
    height, width, channels = shape
    for t in range(count):
        image, i, j = where_tile(first + t, grid)
        at, inside = ((image * height + 2 * i) * width + 2 * j) * channels, (2 * i + 1 < height, 2 * j + 1 < width)
        _tile_of_gradient(dy, at, width * channels, inside, channels, m, t * channels, step, lanes)


@njit(inline="always")
def _corner(t, grid, place, channels):
    """Where tile t begins in the padded images."""
    image, i, j = where_tile(t, grid)
    return image * place[3] + 4 * i * place[2] + 4 * j * channels


# --- the passes -------------------------------------------------------------------------------------------------------


@kernel(**FLAGS)
def _input_gradient_of(dy, begin, end, u, place, grid, plus, dx, images, v, m, a, o, b, lanes, one):
    """Images begin <= n < end of :func:`_input_gradient`; v (9, step), m (9, step'): room for a block."""
    shape, tiles = dy.shape[1:], grid[0] * grid[1]
    size, columns = shape[0] * shape[1] * shape[2], u.shape[1] // shape[2]
    channels, no_plus, no_bias = columns // 4, np.empty(0, np.float32), np.zeros(columns, np.float32)
    padded, flat_m = np.empty(images * place[3], np.float32), m.reshape(-1)
    for n in range(begin, end, images):
        now = min(images, end - n)
        padded[:] = 0
        these = dy.reshape(-1)[n * size :]
        for first in range(0, now * tiles, BLOCK):
            count = min(BLOCK, now * tiles - first)
            _gradient_block(these, first, count, grid, shape, v.reshape(-1), v.shape[1], one)
            for e in range(ENTRIES):
                rows = b, 0, shape[2], u[e], no_bias, no_plus
                sweep(v[e], a, 0, count, *rows, m[e], 0, o, columns, 1, 0, lanes)
            for t in range(count):
                at = _corner(first + t, grid, place, channels)
                _tile_to_input(flat_m, t * columns, m.shape[1], padded, at, place[2], channels, one)
        for k in range(now):
            window(padded[k * place[3] :], plus, n + k, dx, place)


@kernel(parallel=True, **FLAGS)
def _input_gradient(dy, u, place, grid, plus, dx, images, v, m, a, o, b, lanes, one):
    """dx (N, H, W C) from dy (N, H', W', C') and U (9, C' 4 C) (+ plus), ``images`` at a time; v[t], m[t]: room for
    thread t."""
    n, chunks = len(dy), len(v)
    for t in prange(chunks):
        begin, end = n * t // chunks, n * (t + 1) // chunks
        _input_gradient_of(dy, begin, end, u, place, grid, plus, dx, images, v[t], m[t], a, o, b, lanes, one)


@kernel(**FLAGS)
def _reduce_images(x, begin, end, place, grid, dy, images, v, m, taps, pixels, steps, du, db, lanes, one):
    """Images begin <= n < end of :func:`_reduce_parts`, one part of it: du (9, K, C'), db (9, C')."""
    shape, tiles, channels = dy.shape[1:], grid[0] * grid[1], pixels[1] // 4  # pixels are 4 C numbers apart
    flat_dy, flat_du, flat_db, flat_v = dy.reshape(-1), du.reshape(-1), db.reshape(-1), v.reshape(-1)
    stored, k_taps, size = simd.tile_rows(flat_du, steps, 0), taps.size, shape[0] * shape[1] * shape[2]
    padded = np.zeros(images * place[3], np.float32)
    flat_du[:] = 0
    for n in range(begin, end, images):
        now = min(images, end - n)
        for k in range(now):
            place_image(x[n + k], padded, k * place[3], place)
        these = flat_dy[n * size :]
        for first in range(0, now * tiles, BLOCK):
            count = min(BLOCK, now * tiles - first)
            for t in range(count):
                at = _corner(first + t, grid, place, channels)
                _tile_of_input(padded, at, place[2], channels, flat_v, t * 4 * channels, v.shape[1], one)
            _gradient_block(these, first, count, grid, shape, m.reshape(-1), m.shape[1], one)
            for e in range(ENTRIES):
                rows, where = (v[e], taps, m[e], 0, shape[2]), (e * k_taps * shape[2], flat_db, e * shape[2])
                reduce(*rows, pixels[:count], flat_du, *where, stored, lanes)


@kernel(parallel=True, **FLAGS)
def _reduce_parts(x, place, grid, dy, images, v, m, taps, pixels, steps, du, db, lanes, one):
    """du (parts, 9, K, C') = for each part of the images the sum of V * dM; db (parts, 9, C') that of dM."""
    n, parts, chunks = len(x), len(du), len(v)
    for chunk in prange(chunks):
        room = v[chunk], m[chunk]
        for t in range(parts * chunk // chunks, parts * (chunk + 1) // chunks):
            begin, end = n * t // parts, n * (t + 1) // parts
            _reduce_images(x, begin, end, place, grid, dy, images, *room, taps, pixels, steps, du[t], db[t], lanes, one)


@kernel(parallel=True, **FLAGS)
def _transform_back(du, dw, lanes):
    """dw (4, 4, C, C'), of du (parts, 9, K, C'), of whose rows the first 4 C, (p, q, c), are real."""
    channels = dw.shape[2]
    for k in prange(4 * channels):
        _row_to_weights(du.reshape(-1), k, du.shape[2], channels, dw.shape[3], len(du), dw.reshape(-1), lanes)


@lru_cache(256)
def _geometry(x_shape, y_shape, padding):
    """(the grid of tiles, place of an image in the padded one, images at a time that fill a block)."""
    (_, h, w, c), (_, ho, wo, _), (top, _, left, _) = x_shape, y_shape, padding
    grid = -(-ho // 2), -(-wo // 2)
    height, width = max(4 * grid[0] + 2, top + h), max(4 * grid[1] + 2, left + w)  # some pixels no window may meet
    return grid, (top, left * c, width * c, height * width * c), -(-BLOCK // (grid[0] * grid[1]))


def _taller(w, axis):
    """G along an axis of two."""
    first, second = np.take(w, 0, axis), np.take(w, 1, axis)
    return np.stack([first, first + second, second], axis)


def input_gradient(dy, w, padding, x_shape, plus):
    """dx (N, H, W, C) of such a convolution by w (4, 4, C, C'), + ``plus`` (or None)."""
    c, c_out = w.shape[2:]
    lanes, one = lanes_of(4 * c), simd.Lanes(1)
    width = WIDTH * lanes.count
    g = _taller(_taller(ready(w).reshape(2, 2, 2, 2, c, c_out), 0), 2).transpose(0, 2, 5, 1, 3, 4)
    u = g.reshape(ENTRIES, c_out, -1, width).swapaxes(1, 2).reshape(ENTRIES, -1)
    grid, place, images = _geometry(x_shape, dy.shape, padding)
    dx, chunks = empty(x_shape), threads()
    tables = np.arange(BLOCK) * c_out, np.arange(BLOCK) * 4 * c, np.arange(c_out)
    room = [room_for_tiles(chunks, ENTRIES, BLOCK, channels) for channels in (c_out, 4 * c)]
    plus = rows_of(dx[:0] if plus is None else plus)
    _input_gradient(ready(dy), u, place, grid, plus, rows_of(dx), images, *room, *tables, lanes, one)
    return dx


def weight_gradient(x, dy, padding):
    """(dw, db) of such a convolution."""
    c, c_out, one = x.shape[3], dy.shape[3], simd.Lanes(1)
    taps = runs_of(np.arange(4 * c))
    parts = sum_parts(ENTRIES * taps.size * c_out)
    du, db = empty((parts, ENTRIES, taps.size, c_out)), np.zeros((parts, ENTRIES, c_out), np.float32)
    grid, place, images = _geometry(x.shape, dy.shape, padding)
    tables = taps, np.arange(BLOCK) * 4 * c, np.arange(ROWS) * c_out
    room = [room_for_tiles(threads(), ENTRIES, BLOCK, channels) for channels in (4 * c, c_out)]
    _reduce_parts(rows_of(x), place, grid, ready(dy), images, *room, *tables, du, db, lanes_of(c_out), one)
    dw = empty((4, 4, c, c_out))
    _transform_back(du, dw, one)
    return dw, db[:, 4].sum(0)
