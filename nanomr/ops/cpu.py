"""float32 on the CPU: Numba kernels. The same functions as ``reference``, which is their oracle.

Every pass of a convolution is one sum, the gather-GEMM, with other tables of offsets (``derivations/convolution.md``):

    out[o_i + c] += sum over r of in[a_i + b_r] * w[r, c]

    forward          i: output pixels            r: taps x input channels       w: the weights
    input gradient   i: input pixels, by parity  r: taps x output channels      w: the weights transposed
    weight gradient  i: taps x input channels    r: output pixels               w: dy

so one micro-kernel serves the three: a tile of ROWS x 16 sums stays in registers while r runs. There is no im2col.
"""

import os
import sys
import threading
from functools import lru_cache

# A thread that waits for the others spins for a moment (kernels follow each other closely), then sleeps: with GNU
# OpenMP's own, far longer spinning, a step beside another busy process takes ten times as long. It is read once, when
# Numba starts its threads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numba
import numpy as np
from numba import njit, prange

from . import reference, simd
from .reference import average_pool, average_pool_backward, conv2d_shape  # noqa: F401
from .simd import MAX_LANES, ROWS, WIDTH

_ZERO = np.float32(0)
FLAGS = dict(fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True)  # but NaN and infinity stay what they are

# --- memory -----------------------------------------------------------------------------------------------------------

_SMALL = 1 << 14  # floats; below, malloc is as fast
_LINE = 16  # floats in a cache line
_LIMIT = 1 << 30  # bytes of idle buffers that a thread may keep
_local = threading.local()


def _references(buffers):
    for buffer in buffers:
        return sys.getrefcount(buffer)


_IDLE = _references([np.empty(1, np.float32)])  # what _references says of a buffer that only its list knows


def empty(shape) -> np.ndarray:
    """An uninitialised float32 array whose memory is recycled: fresh pages cost more than most passes over them.

    A buffer is handed out again only when nothing but this list refers to it (views keep their base alive).
    """
    size = int(np.prod(shape))
    if size < _SMALL:
        return _take(np.empty(size + _LINE, np.float32), shape, size)
    step = 1 << (size.bit_length() - 4)  # sizes within an eighth share buffers
    rounded = -(-size // step) * step
    pool = _local.__dict__.setdefault("pool", {})
    for buffer in pool.setdefault(rounded, []):
        if sys.getrefcount(buffer) == _IDLE:
            return _take(buffer, shape, size)
    if 4 * sum(key * len(buffers) for key, buffers in pool.items()) > _LIMIT:
        release()
        pool[rounded] = []
    pool[rounded].append(np.empty(rounded + _LINE, np.float32))
    return _take(pool[rounded][-1], shape, size)


def _take(buffer, shape, size):
    """The array of this shape at the buffer's first cache line: a vector load across two lines costs double."""
    first = -(buffer.ctypes.data // 4) % _LINE
    return buffer[first : first + size].reshape(shape)


def release():
    """Forget this thread's recycled buffers (arrays in use stay valid)."""
    _local.__dict__.pop("pool", None)


def _ready(x):
    return np.ascontiguousarray(x, np.float32)


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
def _input_gradient_tables(x_shape, w_shape, stride, padding):
    """The same for dx from dy, one group of pixels for each residue of (row, column) modulo the stride: they meet the
    same taps. Also the rows of w, as (kh kw Cout, C), that the taps multiply."""
    (_, h, w, c), (kh, kw, _, c_out), (top, _, left, _) = x_shape, w_shape, padding
    _, ho, wo, _ = conv2d_shape(x_shape, w_shape, stride, padding)
    low_h, low_w = (kh - 1) // stride, (kw - 1) // stride  # rows and columns of zeros before dy
    height = low_h + max(ho, (h - 1 + top) // stride + 1)
    row = (low_w + max(wo, (w - 1 + left) // stride + 1)) * c_out
    a, o, b, index, pixels, taps = [], [], [], [], [0], [0]
    for rh in range(stride):
        for rw in range(stride):
            ys, xs = np.arange((rh - top) % stride, h, stride), np.arange((rw - left) % stride, w, stride)
            ps, qs = np.arange(rh, kh, stride), np.arange(rw, kw, stride)
            a.append(_grid(((ys + top) // stride + low_h) * row, ((xs + left) // stride + low_w) * c_out))
            o.append(_grid(ys * w * c, xs * c))
            b.append(_grid(-(ps // stride) * row, -(qs // stride) * c_out, np.arange(c_out)))
            index.append(_grid(ps * kw * c_out, qs * c_out, np.arange(c_out)))
            pixels.append(pixels[-1] + len(a[-1]))
            taps.append(taps[-1] + len(b[-1]))
    a, o, b, index = (np.concatenate(v) for v in (a, o, b, index))
    return a, o, np.array(pixels), b, np.array(taps), index, (low_h, low_w * c_out, row, height * row)


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
    return _ready(x).reshape(n, h, w * c)


def conv2d(x, w, b, stride, padding):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    a, o, taps, place = _forward_tables((0, *x.shape[1:]), w.shape, stride, padding)
    weights, lanes = _panels(w.reshape(-1, shape[3]))
    y = empty(shape)
    inputs = (_rows_of(x), *place, weights, _bias(b, shape[3]))
    tables = (a, o, np.array([0, len(a)]), taps, np.array([0, len(taps)]))  # one group of pixels, which meet all taps
    _gather_gemm(*inputs, y.reshape(len(x), -1), *tables, shape[3], _chunks(), lanes)
    return y


def conv2d_input_gradient(dy, w, stride, padding, x_shape):
    a, o, pixels, b, taps, index, place = _input_gradient_tables((0, *x_shape[1:]), w.shape, stride, padding)
    weights, lanes = _panels(w.transpose(0, 1, 3, 2).reshape(-1, w.shape[2])[index])
    dx = empty((len(dy), *x_shape[1:]))
    inputs = (_rows_of(dy), *place, weights, _bias(None, x_shape[3]))
    _gather_gemm(*inputs, dx.reshape(len(dy), -1), a, o, pixels, b, taps, x_shape[3], _chunks(), lanes)
    return dx


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    pixels, _, taps, place = _forward_tables((0, *x.shape[1:]), w_shape, stride, padding)
    flat = dy.reshape(-1, w_shape[3])
    flat = (_columns(flat) if w_shape[3] % WIDTH else _ready(flat)).reshape(len(x), len(pixels), -1)
    rows = np.zeros(-(-len(taps) // ROWS) * ROWS, np.int64)  # the rows added are computed and thrown away
    rows[: len(taps)] = taps
    columns, chunks = flat.shape[2], _chunks()
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


def _chunks():
    return numba.get_num_threads()


# --- linear -----------------------------------------------------------------------------------------------------------
# A matrix product is a gather-GEMM too, as fast as BLAS for these shapes. With both, BLAS's idle threads would spin
# beside Numba's: a whole step took twice as long with two threads of each as with one.

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
                panels[p, r, j] = w[row, r] if row < w.shape[0] else _ZERO


def linear(x, w, b):
    panels, lanes = _panels(w)
    y = empty((len(x), w.shape[1]))
    _gather_gemm_rows(_ready(x), panels, _bias(b, w.shape[1]), y.reshape(-1), w.shape[1], _chunks(), lanes)
    return y


def linear_input_gradient(dy, w):
    n = len(w)
    columns = n + -n % WIDTH
    lanes = _lanes(columns)
    width = WIDTH * len(lanes)
    panels = empty((columns // width, w.shape[1], width))
    _transposed_panels(_ready(w), panels)
    dx = empty((len(dy), n))
    _gather_gemm_rows(_ready(dy), panels.reshape(-1), _bias(None, n), dx.reshape(-1), n, _chunks(), lanes)
    return dx


def linear_weight_gradient(x, dy):
    n = dy.shape[1]
    panels, lanes = _panels(dy)
    dw = empty((x.shape[1], n))
    _gather_gemm_columns(_ready(x), panels, _bias(None, n), dw.reshape(-1), n, _chunks(), lanes)
    return dw, dy.sum(0)


# --- ReLU and the Hamming regulariser ---------------------------------------------------------------------------------

_ONE, _EIGHT = np.float32(1), np.float32(8)
# tanh(x) = x P(x^2) / Q(x^2) for |x| <= 8: a least-squares fit of relative error 7e-9, so that float32's rounding
# decides (3.4e-7); plain arithmetic, which LLVM turns into SIMD where libm's tanh is a call for each number.
_P = tuple(
    np.float32(v)
    for v in (
        0.9999999936323325,
        0.13444519612112016,
        0.003571623570895721,
        2.1895079306142738e-05,
        1.5230996862533344e-08,
    )
)
_Q = tuple(
    np.float32(v) for v in (0.46777846953670105, 0.02616454046641119, 0.00034113336282947087, 8.52268307981854e-07)
)


@njit(inline="always", **{**FLAGS, "cache": False})
def _tanh(x):
    x = -_EIGHT if x < -_EIGHT else (_EIGHT if x > _EIGHT else x)
    s = x * x
    top = x * (_P[0] + s * (_P[1] + s * (_P[2] + s * (_P[3] + s * _P[4]))))
    return top / (_ONE + s * (_Q[0] + s * (_Q[1] + s * (_Q[2] + s * _Q[3]))))


@njit(inline="always", **{**FLAGS, "cache": False})
def _max0(z):
    return _ZERO if z <= _ZERO else z  # NaN stays NaN


@njit(parallel=True, **FLAGS)
def _relu(z, y):
    for i in prange(len(z)):
        for j in range(z.shape[1]):
            y[i, j] = _max0(z[i, j])


@njit(parallel=True, **FLAGS)
def _relu_backward(dy, z, dz):
    for i in prange(len(z)):
        for j in range(z.shape[1]):
            dz[i, j] = dy[i, j] if z[i, j] > _ZERO else _ZERO


@njit(parallel=True, **FLAGS)
def _relu_hamming(z, alpha, y, squares):
    n = len(squares)
    for i in prange(n):
        total = _ZERO
        for j in range(z.shape[1]):
            plus, minus = z[n + i, j], z[2 * n + i, j]
            y[i, j], y[n + i, j], y[2 * n + i, j] = _max0(z[i, j]), _max0(plus), _max0(minus)
            d = _tanh(alpha * plus) - _tanh(alpha * minus)
            total += d * d
        squares[i] = total


@njit(parallel=True, **FLAGS)
def _relu_hamming_backward(dy, z, alpha, weight, dz):
    n = len(weight)
    for i in prange(n):
        scale = weight[i]
        for j in range(z.shape[1]):
            plus, minus = z[n + i, j], z[2 * n + i, j]
            t_plus, t_minus = _tanh(alpha * plus), _tanh(alpha * minus)
            d = scale * (t_plus - t_minus)
            dz[i, j] = dy[i, j] if z[i, j] > _ZERO else _ZERO
            dz[n + i, j] = (dy[n + i, j] if plus > _ZERO else _ZERO) + d * (_ONE - t_plus * t_plus)
            dz[2 * n + i, j] = (dy[2 * n + i, j] if minus > _ZERO else _ZERO) - d * (_ONE - t_minus * t_minus)


@njit(parallel=True, **FLAGS)
def _relu_hamming_pair(u, v, alpha, y, squares):
    n = len(squares)
    for i in prange(n):
        total = _ZERO
        for j in range(u.shape[1]):
            plus, minus = u[i, j] + v[i, j], u[i, j] - v[i, j]
            y[i, j], y[n + i, j], y[2 * n + i, j] = _max0(u[i, j]), _max0(plus), _max0(minus)
            d = _tanh(alpha * plus) - _tanh(alpha * minus)
            total += d * d
        squares[i] = total


@njit(parallel=True, **FLAGS)
def _relu_hamming_pair_backward(dy, u, v, alpha, weight, du, dv):
    n = len(weight)
    for i in prange(n):
        scale = weight[i]
        for j in range(u.shape[1]):
            plus, minus = u[i, j] + v[i, j], u[i, j] - v[i, j]
            t_plus, t_minus = _tanh(alpha * plus), _tanh(alpha * minus)
            d = scale * (t_plus - t_minus)
            d_plus = (dy[n + i, j] if plus > _ZERO else _ZERO) + d * (_ONE - t_plus * t_plus)
            d_minus = (dy[2 * n + i, j] if minus > _ZERO else _ZERO) - d * (_ONE - t_minus * t_minus)
            du[i, j] = (dy[i, j] if u[i, j] > _ZERO else _ZERO) + d_plus + d_minus
            dv[i, j] = d_plus - d_minus


def _flat(*arrays):
    """Arrays (N, ...) as contiguous (N, features)."""
    return [_ready(x).reshape(len(x), -1) for x in arrays]


def relu(z):
    y = empty(z.shape)
    _relu(*_flat(z, y))
    return y


def relu_backward(dy, z):
    dz = empty(z.shape)
    _relu_backward(*_flat(dy, z, dz))
    return dz


def relu_hamming(z, alpha):
    y, squares = empty(z.shape), np.empty(len(z) // 3, np.float32)
    flat_z, flat_y = _flat(z, y)
    _relu_hamming(flat_z, np.float32(alpha), flat_y, squares)
    return y, squares


def relu_hamming_backward(dy, z, alpha, weight):
    dz = empty(z.shape)
    flat_dy, flat_z, flat_dz = _flat(dy, z, dz)
    _relu_hamming_backward(flat_dy, flat_z, np.float32(alpha), _ready(weight), flat_dz)
    return dz


def relu_hamming_pair(u, v, alpha):
    y, squares = empty((3 * len(u), *u.shape[1:])), np.empty(len(u), np.float32)
    flat_u, flat_v, flat_y = _flat(u, v, y)
    _relu_hamming_pair(flat_u, flat_v, np.float32(alpha), flat_y, squares)
    return y, squares


def relu_hamming_pair_backward(dy, u, v, alpha, weight):
    du, dv = empty(u.shape), empty(v.shape)
    flat_dy, flat_u, flat_v, flat_du, flat_dv = _flat(dy, u, v, du, dv)
    _relu_hamming_pair_backward(flat_dy, flat_u, flat_v, np.float32(alpha), _ready(weight), flat_du, flat_dv)
    return du, dv


def expand_pair(u, v):
    n = len(u)
    y = empty((3 * n, *u.shape[1:]))
    y[:n] = u
    np.add(u, v, out=y[n : 2 * n])
    np.subtract(u, v, out=y[2 * n :])
    return y


def contract_pair(dy):
    centre, plus, minus = np.split(dy, 3)
    du, dv = empty(centre.shape), empty(centre.shape)
    np.add(plus, minus, out=du)
    du += centre
    return du, np.subtract(plus, minus, out=dv)


@njit(parallel=True, **FLAGS)
def _scale_shift(x, scale, shift, y):
    for i in prange(len(x)):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j] * scale[j] + shift[j]


def normalize(x, mean, std):
    n, h, w, c = x.shape
    y, scale = empty(x.shape), np.broadcast_to(1 / std, c).astype(np.float32)
    shift = np.zeros(c, np.float32) if mean is None else -mean * scale
    _scale_shift(_ready(x).reshape(n * h, w * c), np.tile(scale, w), np.tile(shift, w), y.reshape(n * h, w * c))
    return y


# --- batch normalisation ---------------------------------------------------------------------------------------------

batchnorm_statistics = reference.batchnorm_statistics
batchnorm = reference.batchnorm
batchnorm_parameter_gradient = reference.batchnorm_parameter_gradient
batchnorm_backward = reference.batchnorm_backward


# --- optimiser and data -----------------------------------------------------------------------------------------------


@njit(parallel=True, **FLAGS)
def _sgd_update(w, g, velocity, lr, momentum, weight_decay, chunks):
    for t in prange(chunks):
        for i in range(len(w) * t // chunks, len(w) * (t + 1) // chunks):
            velocity[i] = momentum * velocity[i] + (g[i] + weight_decay * w[i])
            w[i] -= lr * velocity[i]


def sgd_update(w, g, velocity, lr, momentum, weight_decay):
    _sgd_update(w, g, velocity, *(np.float32(v) for v in (lr, momentum, weight_decay)), _chunks())


@njit(parallel=True, **FLAGS)
def _crop_flip(images, index, top, left, flip, pad, out):
    n, height, width, channels = out.shape
    scale = np.float32(1 / 255)
    for i in prange(n):
        for h in range(height):
            source = h + top[i] - pad
            for w in range(width):
                column = (width - 1 - w if flip[i] else w) + left[i] - pad
                inside = 0 <= source < height and 0 <= column < width
                for c in range(channels):
                    out[i, h, w, c] = np.float32(images[index[i], source, column, c]) * scale if inside else _ZERO


def crop_flip(images, index, top, left, flip, pad=4):
    out = empty((len(index), *images.shape[1:]))
    _crop_flip(images, index, top, left, flip, pad, out)
    return out


@njit(parallel=True, **FLAGS)
def _corners(words, eps, rho):
    for k in prange(len(words)):
        word = words[k]
        for j in range(64 * k, min(64 * k + 64, len(rho))):
            rho[j] = -eps if word & np.uint64(1) else eps
            word >>= np.uint64(1)


def corners(words, shape, eps):
    rho = empty(shape)
    _corners(words, np.float32(eps), rho.reshape(-1))
    return rho
