"""bfloat16 on a CPU: the same checks as of the GPU's kernels (``bf16.py``), by every product that this machine has."""

import copy

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
from contract import CHECKS, Case, cast
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import convolutions, seeds
from test_layers import TINY, applies, make_case
from test_ops import CHANNELS, OPERATIONS, feature_maps

from nanomr.ops import cpu, ops_for
from nanomr.ops.cpu import gather_gemm, simd

few = settings(
    max_examples=max(3, settings().max_examples * 2 // 5), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPES = [  # beside those of the networks: batches that are no pairs, a last group of images that is not full
    *NETWORKS,
    ((7, 4, 4, 32), (3, 3, 32, 16), 1, ALL_ROUND),
    ((17, 2, 3, 6), (3, 3, 6, 5), 1, ALL_ROUND),
    ((1, 5, 5, 1), (3, 3, 1, 1), 1, ALL_ROUND),
]


@pytest.fixture(params=simd.PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setattr(gather_gemm, "PRODUCT", request.param)


def test_the_dtype_decides():
    assert ops_for(np.zeros(1, BF16)) is cpu


# --- each function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "padding"), SHAPES)
def test_convolutions_of_the_networks(product, x_shape, w_shape, stride, padding, rng):
    check_convolutions(cpu, np, rng, x_shape, w_shape, stride, padding)


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

    monkeypatch.setattr(gather_gemm, "threads", lambda: 1)
    alone = results()
    monkeypatch.setattr(gather_gemm, "threads", lambda: 5)
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
    "a swapped pair": ("_words", _swapped_pairs),
    "a skipped tap": ("_forward_tables", _skipped_tap),
    "a wrong block of images": ("_forward_tables", _wrong_images),
    "a batch that is no multiple": ("_gather_gemm_reduce_pairs", _last_image_twice),
    "truncated, not rounded": ("_words", lambda words: lambda w: words(w) & np.int32(-0x10001)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(product, fault, rng, monkeypatch):
    shape = ((7, 4, 4, 4), (3, 3, 4, 5), 1, ALL_ROUND)
    check_convolutions(cpu, np, rng, *shape)
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(gather_gemm, name, wrong(getattr(gather_gemm, name)))
    with pytest.raises(AssertionError):
        check_convolutions(cpu, np, rng, *shape)
