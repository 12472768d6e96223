"""Convolutions in bfloat16 by AMX tiles (Intel, since Sapphire Rapids): ``gather_gemm``'s sums, 32 images at a time.

A tile is 16 rows of 16 words (pairs of bfloat16 numbers), or of 16 float32 sums; one instruction adds the product of
two tiles of words to one of sums. Rows of a tile must lie equally far apart, which 16 pixels of an image often do not,
but 16 images do: 32 images are stored side by side, pixel by pixel, and the tables of ``convolution`` say for one image
where each pixel and tap begins. Four tiles hold 32 x 32 sums, two the operands of either side.

    forward, input gradient    rows: 32 images        words: pairs of channels     columns: 32 output channels
    weight gradient            rows: 32 channels      words: pairs of images       columns: 32 output channels

Shapes whose channels do not fill tiles are left to ``gather_gemm``'s vectors, which every CPU with AMX has, too.

``Tiles("emulated")`` computes the same with loops: the layout is tested where there are no tiles.
"""

import ctypes
import os
import platform
from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, prange
from numba.core import types
from numba.extending import NativeValue, intrinsic, models, overload, register_model, typeof_impl, unbox

from . import simd
from .flags import FLAGS, kernel

IMAGES = 32  # side by side
SUMS = 32  # x 32 of them in four tiles
WORDS = 16  # in a row of a tile


class Tiles(NamedTuple):
    """What computes: "amx", or "emulated"."""

    kind: str


class _TilesType(types.Type):
    def __init__(self, kind):
        self.kind = kind
        super().__init__(name=f"Tiles({kind})")


register_model(_TilesType)(models.OpaqueModel)


@typeof_impl.register(Tiles)
def _typeof(value, _):
    return _TilesType(value.kind)


@unbox(_TilesType)
def _unbox(kind, _, context):
    return NativeValue(context.context.get_dummy_value())


# --- permission -------------------------------------------------------------------------------------------------------


def permitted() -> bool:
    """Does this CPU have tiles for bfloat16, and does the operating system let this process use them? It is asked once
    a process, before any thread touches one: Linux's ARCH_REQ_XCOMP_PERM, for the state of the tiles."""
    here = platform.machine() == "x86_64" and platform.system() == "Linux"
    if not (here and simd.has("amx-bf16") and simd.has("amx-tile") and "NANOMR_NO_AMX" not in os.environ):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


@cache
def works() -> bool:
    """Permitted, and a product of tiles is right: a last look before they are trusted."""
    if not permitted():
        return False
    rng = np.random.default_rng(0)
    a, b = (np.float32(rng.integers(-8, 9, (32, 32))) for _ in range(2))
    words = [_as_words(a), _as_words(b.reshape(16, 2, 32).swapaxes(1, 2).reshape(16, 64))]
    out = np.zeros((32, 32), np.float32)
    _one_product(*(w.reshape(-1) for w in words), out.reshape(-1), Tiles("amx"), CONFIG)
    return bool((out == a @ b).all())


def _as_words(rows):
    """Small whole numbers (R, 2 C) as words (R, C): they are bfloat16 numbers, exactly."""
    return np.ascontiguousarray((rows.view(np.uint32) >> 16).astype(np.uint16)).view(np.int32)


# --- the tiles --------------------------------------------------------------------------------------------------------

CONFIG = np.zeros(64, np.uint8)  # palette 1; eight tiles of 16 rows of 64 bytes
CONFIG[0] = 1
CONFIG[16:32] = np.full(8, 64, np.uint16).view(np.uint8)
CONFIG[48:56] = 16

# Tiles 0 to 3 are sums: rows 0-15 x columns 0-15, the columns beyond, the rows beyond, both. 4, 5: A; 6, 7: B.
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
_I8, _I64 = ir.IntType(8), ir.IntType(64)
_BYTES = _I8.as_pointer()


def _instruct(builder, name, *arguments):
    simd.call(builder, f"llvm.x86.{name}", ir.VoidType(), list(arguments))


def _tile(number):
    return ir.Constant(_I8, number)


def _place_of(context, builder, array_type, array, index):
    return builder.bitcast(simd.address(context, builder, array_type, array, index), _BYTES)


def _bytes(builder, stride):
    return builder.mul(stride, ir.Constant(_I64, 4))


@intrinsic
def _configure(typingctx, config):
    def codegen(context, builder, signature, args):
        at = _place_of(context, builder, signature.args[0], args[0], ir.Constant(_I64, 0))
        _instruct(builder, "ldtilecfg", at)
        return context.get_dummy_value()

    return types.void(config), codegen


@intrinsic
def _release(typingctx):
    def codegen(context, builder, signature, args):
        _instruct(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _zero(typingctx):
    def codegen(context, builder, signature, args):
        for number in range(4):
            _instruct(builder, "tilezero", _tile(number))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _product(typingctx, a, first, second, a_step, b, at, b_step):
    def codegen(context, builder, signature, args):
        a_type, b_type = signature.args[0], signature.args[4]
        a0, a1 = (_place_of(context, builder, a_type, args[0], index) for index in args[1:3])
        beside = builder.add(args[5], ir.Constant(_I64, WORDS))
        b0, b1 = (_place_of(context, builder, b_type, args[4], index) for index in (args[5], beside))
        a_bytes, b_bytes = _bytes(builder, args[3]), _bytes(builder, args[6])
        for number, place, step in ((4, a0, a_bytes), (6, b0, b_bytes)):
            _instruct(builder, "tileloadd64", _tile(number), place, step)
        _instruct(builder, "tdpbf16ps", *map(_tile, (0, 4, 6)))
        _instruct(builder, "tileloadd64", _tile(7), b1, b_bytes)
        _instruct(builder, "tdpbf16ps", *map(_tile, (1, 4, 7)))
        _instruct(builder, "tileloadd64", _tile(5), a1, a_bytes)
        _instruct(builder, "tdpbf16ps", *map(_tile, (2, 5, 6)))
        _instruct(builder, "tdpbf16ps", *map(_tile, (3, 5, 7)))
        return context.get_dummy_value()

    return types.void(a, types.intp, types.intp, types.intp, b, types.intp, types.intp), codegen


def _moving(name):
    @intrinsic
    def move(typingctx, array, index, step):
        def codegen(context, builder, signature, args):
            for number, (down, right) in enumerate(_CORNERS):
                at = builder.add(args[1], ir.Constant(_I64, 16 * right))
                at = builder.add(at, builder.mul(args[2], ir.Constant(_I64, 16 * down)))
                place = _place_of(context, builder, signature.args[0], args[0], at)
                _instruct(builder, name, _tile(number), place, _bytes(builder, args[2]))
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp), codegen

    return move


_load, _store = _moving("tileloadd64"), _moving("tilestored64")


# Python's functions of these names are what the kernels call; ``tiles`` decides. ``sums`` (32, 32) is the emulation's.


def begin(tiles, config): ...
def end(tiles): ...
def clear(tiles, sums): ...
def multiply(tiles, sums, a, first, second, a_step, b, at, b_step): ...
def fetch(tiles, sums, array, index, step): ...
def put(tiles, sums, array, index, step): ...


@overload(begin, inline="always")
def _(tiles, config):
    if tiles.kind == "amx":
        return lambda tiles, config: _configure(config)
    return lambda tiles, config: None


@overload(end, inline="always")
def _(tiles):
    if tiles.kind == "amx":
        return lambda tiles: _release()
    return lambda tiles: None


@overload(clear, inline="always")
def _(tiles, sums):
    if tiles.kind == "amx":
        return lambda tiles, sums: _zero()

    def emulated(tiles, sums):
        sums[...] = np.float32(0)

    return emulated


@overload(multiply, inline="always")
def _(tiles, sums, a, first, second, a_step, b, at, b_step):
    """sums (32 x 32) += the rows of words at a[first + i a_step] and a[second + i a_step], 16 each, times the 16 rows
    of 32 words at b[at + k b_step]."""
    if tiles.kind == "amx":
        return lambda tiles, sums, a, first, second, a_step, b, at, b_step: _product(
            a, first, second, a_step, b, at, b_step
        )

    def emulated(tiles, sums, a, first, second, a_step, b, at, b_step):
        for i in range(SUMS):
            row = (first if i < 16 else second) + i % 16 * a_step
            for k in range(WORDS):
                for j in range(SUMS):
                    u, v = a[row + k], b[at + k * b_step + j]
                    for shift in (0, 16):
                        one, other = np.uint16((u >> shift) & 0xFFFF), np.uint16((v >> shift) & 0xFFFF)
                        sums[i, j] += simd.widen(one) * simd.widen(other)

    return emulated


@overload(fetch, inline="always")
def _(tiles, sums, array, index, step):
    """sums = array[index + i step + j]."""
    if tiles.kind == "amx":
        return lambda tiles, sums, array, index, step: _load(array, index, step)

    def emulated(tiles, sums, array, index, step):
        for i in range(SUMS):
            for j in range(SUMS):
                sums[i, j] = array[index + i * step + j]

    return emulated


@overload(put, inline="always")
def _(tiles, sums, array, index, step):
    """array[index + i step + j] = sums."""
    if tiles.kind == "amx":
        return lambda tiles, sums, array, index, step: _store(array, index, step)

    def emulated(tiles, sums, array, index, step):
        for i in range(SUMS):
            for j in range(SUMS):
                array[index + i * step + j] = sums[i, j]

    return emulated


@njit
def _one_product(a, b, out, tiles, config):
    """out (32 x 32) = a b, for a of 32 rows of 16 words, b of 16 rows of 32."""
    sums = np.empty((SUMS, SUMS), np.float32)
    begin(tiles, config)
    clear(tiles, sums)
    multiply(tiles, sums, a, 0, 16 * WORDS, WORDS, b, 0, SUMS)
    put(tiles, sums, out, 0, SUMS)
    end(tiles)


# --- the sums of gather_gemm ------------------------------------------------------------------------------------------


@kernel(**FLAGS)
def _place_row(x, n, count, padded, place, r, words, vector):
    """Row r of the padded images n to n + count, x (N, H, W words): pixel by pixel, image by image."""
    top, left, row, _ = place
    h = r - top
    if not 0 <= h < x.shape[1]:
        return  # a margin, which stays black
    flat, stride, length = x.reshape(-1), x.shape[1] * x.shape[2], x.shape[2]
    for i in range(count):
        source = (n + i) * stride + h * length
        for w in range(0, length, words):
            target = (r * row + left + w) * IMAGES + i * words
            for k in range(0, words, WORDS):
                simd.copy(flat, source + w + k, padded, target + k, vector)


@kernel(parallel=True, **FLAGS)
def gather(x, words, place, w, bias, plus, out, a, o, pixels, b, taps, run, chunks, tiles, config, vector):
    """``gather_gemm.gather_gemm`` for x (N, H, W words), a multiple of 16 words a pixel, w in panels of 32 columns,
    all of them channels. ``run`` pixels at a time meet each panel. Rows are placed as pixels come to need them."""
    blocks, size, row = -(-len(x) // IMAGES), out.shape[1] * out.shape[2], place[2]
    flat_out, flat_plus, furthest = out.reshape(-1), plus.reshape(-1), b.max()
    for chunk in prange(chunks):
        padded, buffer = np.zeros(place[3] * IMAGES, np.int32), np.empty(SUMS * SUMS, np.float32)
        sums = np.empty((SUMS, SUMS), np.float32)
        begin(tiles, config)
        for block in range(blocks * chunk // chunks, blocks * (chunk + 1) // chunks):
            n, placed = block * IMAGES, 0
            count = min(IMAGES, len(x) - n)
            for g in range(len(pixels) - 1):
                for first in range(pixels[g], pixels[g + 1], run):
                    last = min(first + run, pixels[g + 1])
                    for i in range(first, last):
                        while placed < min((a[i] + furthest) // row + 1, place[3] // row):
                            _place_row(x, n, count, padded, place, placed, words, vector)
                            placed += 1
                    for c in range(0, len(bias), SUMS):
                        panel = c * (len(w) // len(bias))
                        for i in range(first, last):
                            clear(tiles, sums)
                            for r in range(taps[g], taps[g + 1], words):
                                at = (a[i] + b[r]) * IMAGES
                                for k in range(0, words, WORDS):
                                    here, there = at + k, at + k + 16 * words
                                    multiply(tiles, sums, padded, here, there, words, w, panel + (r + k) * SUMS, SUMS)
                            put(tiles, sums, buffer, 0, SUMS)
                            for image in range(count):
                                target = (n + image) * size + o[i] + c
                                for j in range(0, SUMS, 16):
                                    total = simd.load_sums(buffer, image * SUMS + j, vector)
                                    total = simd.plus(bias, c + j, total, 0, 16)
                                    if len(plus):
                                        total = simd.plus(flat_plus, target + j, total, 0, 16)
                                    simd.store(flat_out, target + j, total, 0, 16)
        end(tiles)


@kernel(**FLAGS)
def _place_pairs(x, n, count, padded, start, place, channels, turned):
    """Images n to n + count of x (N, H, W C), 16-bit numbers, at their pixels of a padded image, 16 words for each
    channel: word j is the number of images 2 j and 2 j + 1. By channel and then by word (``turned``), or the other way.
    Images that are not there are black."""
    top, left, row, _ = place
    for h in range(x.shape[1]):
        for w in range(0, x.shape[2], channels):
            at = start + ((top + h) * row + left + w) * WORDS
            for j in range(WORDS):
                step, begins = (WORDS, at + j) if turned else (1, at + j * channels)
                for c in range(channels):
                    word = np.int32(x[n + 2 * j, h, w + c]) if 2 * j < count else np.int32(0)
                    if 2 * j + 1 < count:
                        word |= np.int32(x[n + 2 * j + 1, h, w + c]) << np.int32(16)
                    padded[begins + c * step] = word


@kernel(parallel=True, **FLAGS)
def reduce(x, channels, place, dy, taps, pixels, dw, db, tiles, config, lanes):
    """``gather_gemm.gather_gemm_reduce_pairs`` for x (N, H, W C), channels C a multiple of 32, and dy (N, pixels, C'),
    C' too. ``taps`` and ``pixels`` are those of one image; dw (parts, taps, C')."""
    n_pixels, columns = dy.shape[1:]
    parts, k_taps, blocks = dw.shape[0], len(taps), -(-len(x) // IMAGES)
    flat_dw, flat_db, dy_place = dw.reshape(-1), db.reshape(-1), (0, 0, columns, n_pixels * columns)
    for t in prange(parts):
        padded, words = np.zeros(place[3] * WORDS, np.int32), np.zeros(n_pixels * WORDS * columns, np.int32)
        sums = np.empty((SUMS, SUMS), np.float32)
        begin(tiles, config)
        for block in range(blocks * t // parts, blocks * (t + 1) // parts):
            n = block * IMAGES
            count = min(IMAGES, len(x) - n)
            _place_pairs(x, n, count, padded, 0, place, channels, True)
            _place_pairs(dy, n, count, words, 0, dy_place, columns, False)
            for c in range(0, columns, 16):
                total = simd.load_sums(flat_db, t * columns + c, lanes)
                for r in range(n_pixels * WORDS):
                    total = simd.add(total, simd.load(words, r * columns + c, lanes))
                simd.store(flat_db, t * columns + c, total, 0, 16)
            for k in range(0, k_taps, SUMS):
                for c in range(0, columns, SUMS):
                    corner = (t * k_taps + k) * columns + c
                    fetch(tiles, sums, flat_dw, corner, columns)
                    for r in range(n_pixels):
                        at, of_dy = (taps[k] + pixels[r]) * WORDS, r * WORDS * columns + c
                        multiply(tiles, sums, padded, at, at + 16 * WORDS, WORDS, words, of_dy, columns)
                    put(tiles, sums, flat_dw, corner, columns)
        end(tiles)
