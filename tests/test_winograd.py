"""Winograd's convolutions on the CPU: against the reference, in its bounds, and whoever else is in the batch."""

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_borders import Zones
from test_ops import as_tuple, compare

from nanomr.ops import cpu, reference
from nanomr.ops.cpu import convolution, winograd
from nanomr.testing.strategies import seeds

ALL_ROUND = (1, 1, 1, 1)


def arguments(rng, n, h, w, c_in, c_out, padding):
    """Those of the three passes."""
    x, window = rng.standard_normal((n, h, w, c_in)), rng.standard_normal((3, 3, c_in, c_out))
    b, shape = rng.standard_normal(c_out), reference.conv2d_shape(x.shape, window.shape, 1, padding)
    dy, plus, plus_x = (rng.standard_normal(s) for s in (shape, shape, x.shape))
    x, window, b, dy, plus, plus_x = (a.astype(np.float32) for a in (x, window, b, dy, plus, plus_x))
    return {
        "conv2d": (x, window, b, 1, padding, plus),
        "conv2d_input_gradient": (dy, window, 1, padding, x.shape, plus_x),
        "conv2d_weight_gradient": (x, dy, window.shape, 1, padding),
    }


B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])  # B^T, G and A^T of the derivation
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])


def plainly(x, w, dy, padding, of=np.asarray):
    """(y, (dw, db)) by the equations, in NumPy; ``of`` np.abs: what rounding errors are relative to."""
    (n, h, w_x, c), (top, bottom, left, right) = x.shape, padding
    height, width = h + top + bottom - 2, w_x + left + right - 2
    rows, columns = -(-height // 2), -(-width // 2)
    padded = np.zeros((n, 2 * rows + 2, 2 * columns + 2, c))
    padded[:, top : top + h, left : left + w_x] = of(x)
    filled = np.zeros((n, 2 * rows, 2 * columns, w.shape[3]))
    filled[:, :height, :width] = of(dy)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (1, 2))[
        :, ::2, ::2
    ]  # (N, rows, columns, C, 4, 4)
    b, g, a = of(B), of(G), of(A)
    v = np.einsum("ei,ntucij,fj->ntucef", b, windows, b)
    u = np.einsum("ep,pqkc,fq->kcef", g, of(w), g)
    y = np.einsum("re,ntucef,sf->ntrusc", a, np.einsum("ntukef,kcef->ntucef", v, u), a)
    m = np.einsum("re,ntrusc,sf->ntucef", a, filled.reshape(n, rows, 2, columns, 2, -1), a)
    dw = np.einsum("ep,kcef,fq->pqkc", g, np.einsum("ntukef,ntucef->kcef", v, m), g)
    return y.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width], (dw, of(dy).sum((0, 1, 2)))


def pass_plainly(name, args, of=np.asarray):
    """One of the three passes, by :func:`plainly`."""
    if name == "conv2d":
        x, w, b, _, padding, plus = args
        y = reference.conv2d(x, w, None, 1, padding)
        return plainly(x, w, y, padding, of)[0] + of(b) + of(plus)
    if name == "conv2d_input_gradient":
        dy, w, _, padding, x_shape, plus = args
        mirrored, other = w[::-1, ::-1].swapaxes(2, 3), tuple(2 - p for p in padding)
        return plainly(dy, mirrored, np.zeros(x_shape), other, of)[0] + of(plus)
    x, dy, w_shape, _, padding = args
    return plainly(x, np.zeros(w_shape), dy, padding, of)[1]


def check(passes):
    """Each pass agrees with the reference, to 1e-5 of what is added up on the way: more than the products of a sum, as
    entries of a tile cancel."""
    for name, args in passes.items():
        exact = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args]
        compare(getattr(cpu, name)(*args), getattr(reference, name)(*exact), pass_plainly(name, exact, np.abs), name)


def test_the_equations_are_a_convolution(rng):
    for name, args in arguments(rng, 2, 5, 4, 3, 2, (1, 0, 2, 1)).items():
        exact = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args]
        for found, expected in zip(
            as_tuple(pass_plainly(name, exact)), as_tuple(getattr(reference, name)(*exact)), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max(), err_msg=name)


def results(passes):
    found = [getattr(cpu, name)(*args) for name, args in passes.items()]
    return [found[0], found[1], *found[2]]


@pytest.fixture
def counted(monkeypatch):
    """How often winograd was called: a test of it must not be one of another kernel."""
    calls = []
    for name in ("conv2d", "conv2d_weight_gradient"):
        original = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *args, run=original: (calls.append(1), run(*args))[1])
    return calls


@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((3, 32, 32, 64, 64), ALL_ROUND),  # the main network's
        ((3, 16, 16, 128, 128), ALL_ROUND),
        ((29, 4, 4, 64, 32), ALL_ROUND),  # one image more than fill a block of tiles
        ((2, 7, 5, 32, 64), ALL_ROUND),  # half tiles
        ((1, 1, 1, 32, 32), (2, 2, 2, 2)),
        ((2, 3, 3, 32, 32), (0, 0, 0, 0)),  # one pixel
        ((2, 9, 4, 32, 32), (0, 2, 1, 0)),
    ],
)
def test_the_three_passes(shape, padding, rng, counted):
    check(arguments(rng, *shape, padding))
    assert len(counted) == 3


@given(
    shape=st.tuples(st.integers(1, 9), *[st.integers(3, 9)] * 2, *[st.sampled_from([32, 64])] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    seed=seeds,
)
def test_the_three_passes_of_any_shape(shape, padding, seed):
    check(arguments(np.random.default_rng(seed), *shape, padding))


@pytest.mark.parametrize(
    ("w_shape", "stride", "padding"),
    [
        ((3, 3, 32, 16), 1, ALL_ROUND),
        ((3, 3, 48, 32), 1, ALL_ROUND),
        ((3, 3, 32, 32), 2, ALL_ROUND),
        ((3, 1, 32, 32), 1, ALL_ROUND),
        ((3, 3, 32, 32), 1, (3, 1, 1, 1)),
    ],
)
def test_other_layers_are_left_alone(w_shape, stride, padding):
    assert not winograd.fits(w_shape, stride, padding) and winograd.fits((3, 3, 32, 32), 1, (2, 0, 1, 0))


@pytest.mark.parametrize("chunks", [2, 3])
def test_an_image_does_not_depend_on_the_batch_or_the_threads(chunks, rng, monkeypatch):
    """Not by one bit: attacks and attacked shards would disagree."""
    passes = arguments(rng, 5, 7, 8, 32, 32, ALL_ROUND)
    together = results(passes)
    (x, w, b, *rest), (dy, *_) = passes["conv2d"], passes["conv2d_input_gradient"]
    for n in range(len(x)):
        one = slice(n, n + 1)
        np.testing.assert_array_equal(cpu.conv2d(x[one], w, b, 1, ALL_ROUND, rest[2][one]), together[0][one])
        dx = cpu.conv2d_input_gradient(dy[one], w, 1, ALL_ROUND, x[one].shape, passes["conv2d_input_gradient"][5][one])
        np.testing.assert_array_equal(dx, together[1][one])
    monkeypatch.setattr(winograd, "threads", lambda: chunks)
    for again, before in zip(results(passes), together, strict=True):
        np.testing.assert_array_equal(again, before)


def test_it_stays_within_its_arrays(rng, monkeypatch):
    """Kernels count in raw addresses."""
    zones = Zones()
    for name in ("convolution", "winograd", "gather_gemm"):
        monkeypatch.setattr(importlib.import_module(f"nanomr.ops.cpu.{name}"), "empty", zones.empty)
    for shape, padding in (
        ((2, 5, 7, 32, 32), ALL_ROUND),
        ((1, 4, 4, 32, 64), (0, 0, 2, 2)),
        ((3, 8, 9, 64, 32), (1,) * 4),
    ):
        passes = arguments(rng, *shape, padding)
        placed = {k: [zones.place(a) if isinstance(a, np.ndarray) else a for a in args] for k, args in passes.items()}
        found = results(placed)
        assert not zones.broken() and all(np.isfinite(a).all() for a in found)


def test_a_bias_of_another_length_is_refused(rng):
    x, w, b, *_ = arguments(rng, 1, 4, 4, 32, 32, ALL_ROUND)["conv2d"]
    for wrong in (b[:31], np.append(b, b)):
        with pytest.raises(ValueError):
            cpu.conv2d(x, w, wrong, 1, ALL_ROUND)


def test_what_is_not_finite_shows(rng):
    """It may spread over its tile, but not to another image, and is never lost."""
    x, w, *_ = arguments(rng, 3, 8, 8, 32, 32, ALL_ROUND)["conv2d"]
    for bad in (np.nan, np.inf):
        x[1, 2, 3, 4] = bad
        assert (~np.isfinite(cpu.conv2d(x, w, None, 1, ALL_ROUND))).any((1, 2, 3)).tolist() == [False, True, False]


def test_it_rounds_no_worse_than_the_long_sum(rng, monkeypatch):
    """Sums over channels are shorter than those over taps and channels: what transforms lose, this returns."""
    x, w, *_ = arguments(rng, 2, 8, 8, 64, 64, ALL_ROUND)["conv2d"]
    exact = reference.conv2d(x.astype(np.float64), w.astype(np.float64), None, 1, ALL_ROUND)
    short = np.abs(cpu.conv2d(x, w, None, 1, ALL_ROUND) - exact).mean()
    monkeypatch.setattr(winograd, "fits", lambda *_: False)
    assert short <= np.abs(cpu.conv2d(x, w, None, 1, ALL_ROUND) - exact).mean()


def _an_entry_lost(transform):
    def wrong(w, u, *rest):
        transform(w, u, *rest)
        u[6] = 0

    return wrong


def _shifted(geometry):
    def wrong(x_shape, padding):
        grid, (top, left, row, size), images = geometry(x_shape, padding)
        return grid, (top, left - x_shape[3], row, size), images

    return wrong


FAULTS = {
    "an entry lost": ("_transform_weights", _an_entry_lost),
    "a pixel to the left": ("_geometry", _shifted),
    "a part of the sum": ("_transform_back", lambda f: lambda du, dw, one: f(du[:1].copy(), dw, one)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, rng, monkeypatch):
    passes = arguments(rng, 6, 4, 4, 32, 32, ALL_ROUND)
    check(passes)
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(winograd, name, wrong(getattr(winograd, name)))
    with pytest.raises(AssertionError):
        check(passes)


def test_a_window_that_is_not_mirrored_is_caught(rng, monkeypatch):
    passes = arguments(rng, 2, 4, 4, 32, 32, ALL_ROUND)
    run = winograd.conv2d
    monkeypatch.setattr(convolution.winograd, "conv2d", lambda x, w, *rest: run(x, w[::-1, ::-1], *rest))
    with pytest.raises(AssertionError):
        check({"conv2d_input_gradient": passes["conv2d_input_gradient"]})
