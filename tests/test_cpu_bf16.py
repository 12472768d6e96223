"""bfloat16 on a CPU: the same checks as of the GPU's kernels (``bf16.py``), by every product that this machine has."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
from bf16 import (
    ALL_ROUND,
    BF16,
    NETWORKS,
    PICTURES,
    check_batchnorm_relu,
    check_casts,
    check_convolutions,
    check_operation,
    check_pairs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_layers import TINY, applies, make_case
from test_ops import CHANNELS, OPERATIONS, feature_maps

from nanomr.ops import cpu, ops_for
from nanomr.ops.cpu import amx, convolution, gather_gemm, simd
from nanomr.testing.contract import CHECKS, Case, cast
from nanomr.testing.strategies import convolutions, seeds

few = settings(
    max_examples=max(3, settings().max_examples * 2 // 5), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPES = [  # beside those of the networks: batches that are no pairs, a last group of images that is not full
    *NETWORKS,
    ((7, 4, 4, 32), (3, 3, 32, 16), 1, ALL_ROUND),
    ((17, 2, 3, 6), (3, 3, 6, 5), 1, ALL_ROUND),
    ((1, 5, 5, 1), (3, 3, 1, 1), 1, ALL_ROUND),
]


TILES = {"amx": amx.Tiles("amx"), "emulated tiles": amx.Tiles("emulated")}


@pytest.fixture(params=[*simd.PRODUCTS, *["amx"] * amx.works()])
def product(request, monkeypatch):
    """Each way to multiply that this machine has."""
    monkeypatch.setattr(convolution, "TILES", TILES.get(request.param))
    if request.param not in TILES:
        monkeypatch.setattr(convolution, "PRODUCT", request.param)


@pytest.fixture(params=["emulated tiles", *["amx"] * amx.works()])
def tiles(request, monkeypatch):
    monkeypatch.setattr(convolution, "TILES", TILES[request.param])


def test_the_dtype_decides():
    assert ops_for(np.zeros(1, BF16)) is cpu


# --- each function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "padding"), SHAPES)
def test_convolutions_of_the_networks(product, x_shape, w_shape, stride, padding, rng):
    check_convolutions(cpu, np, rng, x_shape, w_shape, stride, padding)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "stride", "padding"),
    [
        ((3, 4, 4, 32), (3, 3, 32, 32), 1, ALL_ROUND),
        ((33, 3, 5, 64), (3, 3, 64, 32), 2, ALL_ROUND),  # a second block of images, nearly empty; odd sizes
        ((2, 4, 4, 32), (1, 1, 32, 64), 2, (0, 0, 0, 0)),  # a shortcut
        ((2, 5, 3, 32), (2, 3, 32, 32), 1, (0, 1, 2, 0)),
    ],
)
def test_convolutions_by_tiles(tiles, x_shape, w_shape, stride, padding, rng, monkeypatch):
    used = []

    def counted(function):
        return lambda *args: (used.append(function), function(*args))

    for name in ("gather", "reduce"):
        monkeypatch.setattr(amx, name, counted(getattr(amx, name)))
    check_convolutions(cpu, np, rng, x_shape, w_shape, stride, padding)
    assert len(used) == 6, "some pass was not computed by tiles"


@pytest.mark.slow
def test_tiles_compile_to_tiles():
    """For a CPU that has them, whatever this one is: every pass has its instructions, and no block of instructions that
    has one of them calls a function, which might use the tiles."""
    features = (
        "64bit adx aes amx-bf16 amx-int8 amx-tile avx avx2 avx512bf16 avx512bw avx512cd avx512dq avx512f avx512ifma "
        "avx512vbmi avx512vbmi2 avx512vl avx512vnni bmi bmi2 cmov cx16 f16c fma fxsr gfni lzcnt mmx movbe popcnt sse "
        "sse2 sse3 sse4.1 sse4.2 ssse3 xsave"
    )
    environment = {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in features.split()),
        "NANOMR_NO_AMX": "1",  # they are not run
    }
    script = """
import numba
from numba import types as t
from nanomr.ops.cpu import amx, simd

words, floats, table = (t.Array(kind, 1, "C") for kind in (t.int32, t.float32, t.int64))
cube = lambda kind: t.Array(kind, 3, "C")
place, number = t.UniTuple(t.int64, 4), t.int64
tiles, config = numba.typeof(amx.Tiles("amx")), numba.typeof(amx.CONFIG)
kernels = {
    "gather": (cube(t.int32), number, place, words, floats, cube(t.uint16), cube(t.uint16), *[table] * 5,
               number, number, tiles, config, numba.typeof(simd.Lanes(1))),
    "reduce": (cube(t.uint16), number, place, cube(t.uint16), table, table, cube(t.float32),
               t.Array(t.float32, 2, "C"), tiles, config, numba.typeof(simd.Lanes(1, "avx512_bf16"))),
}
for name, signature in kernels.items():
    kernel = numba.njit(**{**amx.FLAGS, "cache": False})(getattr(amx, name).py_func)
    kernel.compile(signature)
    found, block = {}, set()
    for line in "\\n".join(kernel.inspect_asm().values()).splitlines():
        word = line.split()[0] if line.split() else ""
        found[word] = found.get(word, 0) + 1
        block = set() if word.endswith(":") or word.startswith("j") else block | {word[:5]}
        busy = block & {"tilez", "tilel", "tdpbf", "tiles"}  # from the first sum to the last store
        assert not (busy and block & {"call", "callq"}), (name, line)
    for word in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert found.get(word), (name, word)
"""
    subprocess.run([sys.executable, "-c", script], env=os.environ | environment, check=True)


@few
@given(
    case=convolutions(batch=(1, 2, 5), channels=CHANNELS, kernel=4, stride=3, size=7, square=False),
    seed=seeds,
)
def test_convolutions_of_any_shape(product, case, seed):
    check_convolutions(cpu, np, np.random.default_rng(seed), case.x_shape, case.w_shape, case.stride, case.padding)


@pytest.mark.parametrize("operation", PICTURES)
@few
@given(data=st.data())
def test_operations(operation, data):
    check_operation(cpu, np, operation, data.draw(OPERATIONS[operation].draw))


@few
@given(shape=feature_maps, seed=seeds)
def test_pairs(shape, seed):
    check_pairs(cpu, np, shape, seed, rounds=False)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_casts(size, rng):
    check_casts(cpu, np, rng, size)


@pytest.mark.parametrize("hamming", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 4, 5, 16), (3, 3, 2, 5), (3, 1, 2, 264), (99, 2, 2, 3)])
def test_batchnorm_relu_in_one_pass(hamming, dtype, shape, rng):
    check_batchnorm_relu(cpu, np, rng, shape, dtype, hamming)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_passes_through(dtype, rng):
    """Through a convolution, a normalisation, and every way to store a number."""
    x = rng.standard_normal((6, 4, 4, 4)).astype(dtype)
    x[2, 1, 1, 3] = np.nan
    w, constants = rng.standard_normal((3, 3, 4, 5)).astype(np.float32), np.ones((4, 4), np.float32)
    assert np.isnan(cpu.conv2d(x, w, None, 1, ALL_ROUND).astype("f4")).any((1, 2, 3)).tolist() == [0, 0, 1, 0, 0, 0]
    mean, var = cpu.batchnorm_statistics(x)
    assert np.isnan(mean).tolist() == np.isnan(var).tolist() == [False, False, False, True]
    y, squares = cpu.batchnorm_relu_hamming(x, *constants, 8.0)
    assert np.isnan(y.astype("f4")).sum() == 1 and np.isnan(squares).tolist() == [True, False]
    assert np.isnan(cpu.batchnorm_relu(x, *constants).astype("f4")).sum() == 1


def test_results_do_not_depend_on_the_threads(monkeypatch, rng):
    """Sums over the batch are cut into fixed parts."""
    x, dy = (rng.standard_normal((9, 6, 6, 16)).astype(BF16) for _ in range(2))
    w, constants = rng.standard_normal((3, 3, 16, 16)).astype(np.float32), np.ones((4, 16), np.float32)

    def results():
        return [
            cpu.conv2d(x, w, None, 1, ALL_ROUND),
            cpu.conv2d_input_gradient(dy, w, 1, ALL_ROUND, x.shape),
            *cpu.conv2d_weight_gradient(x, dy, w.shape, 1, ALL_ROUND),
            *cpu.batchnorm_statistics(x),
            *cpu.batchnorm_relu_backward(dy, x, *constants, 8.0, np.ones(3, np.float32)),
        ]

    monkeypatch.setattr(convolution, "threads", lambda: 1)
    alone = results()
    monkeypatch.setattr(convolution, "threads", lambda: 5)
    for one, many in zip(alone, results(), strict=True):
        np.testing.assert_array_equal(one, many)


# --- the layers' contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY)
def test_contract(kind):
    """All checks that do not need a numerical derivative, on bfloat16 images and float32 weights."""
    case = make_case(kind, *TINY[kind](), seed=7)
    case = Case(cast(copy.deepcopy(case.layer), np.float32), case.x.astype(BF16), case.train, case.view)
    for check in CHECKS.keys() - {"vjp", "jacobian", "dtype"}:
        if applies(check, kind):
            CHECKS[check](case)


# --- planted faults ---------------------------------------------------------------------------------------------------


def _swapped_pairs(words):
    return lambda w: words(w.reshape(-1, 2, w.shape[1])[:, ::-1].reshape(w.shape))


def _skipped_tap(tables):
    def wrong(*args):
        pixels, o, taps, place = tables(*args)
        return pixels, o, np.where(np.arange(len(taps)) == len(taps) - 1, taps[0], taps), place

    return wrong


def _wrong_images(tables):
    """The second image of those that go together is taken for the first."""

    def wrong(shape, *args):
        pixels, o, taps, place = tables(shape, *args)
        each = len(pixels) // shape[0]
        return np.concatenate([pixels[:each], *[pixels[: len(pixels) - each]] * (shape[0] > 1)]), o, taps, place

    return wrong


def _last_image_twice(reduce):
    """Behind an odd number of images there is no black one."""

    def wrong(x, place, images, dy, *args):
        if len(x) % 2:
            x, dy = (np.concatenate([a, a[-1:]]) for a in (x, dy))
        return reduce(x, place, images, dy, *args)

    return wrong


FAULTS = {
    "a swapped pair": (gather_gemm, "_words", _swapped_pairs),
    "a skipped tap": (convolution, "_forward_tables", _skipped_tap),
    "a wrong block of images": (convolution, "_forward_tables", _wrong_images),
    "a batch that is no multiple": (convolution, "gather_gemm_reduce_pairs", _last_image_twice),
    "truncated, not rounded": (gather_gemm, "_words", lambda words: lambda w: words(w) & np.int32(-0x10001)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(product, fault, rng, monkeypatch):
    shape = ((7, 4, 4, 4), (3, 3, 4, 5), 1, ALL_ROUND)
    check_convolutions(cpu, np, rng, *shape)
    module, name, wrong = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError):
        check_convolutions(cpu, np, rng, *shape)
