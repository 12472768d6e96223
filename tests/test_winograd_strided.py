"""The gradients of 4 x 4 convolutions of stride 2 by Winograd's algorithm: against the reference, in their bounds, and
whoever else is in the batch."""

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_borders import Zones
from test_ops import as_tuple, compare

from nanomr.ops import cpu, reference
from nanomr.ops.cpu import convolution, winograd_strided
from nanomr.testing.strategies import seeds

ALL_ROUND = (1, 1, 1, 1)


def arguments(rng, n, h, w, c_in, c_out, padding):
    """Those of the two passes."""
    x, window = rng.standard_normal((n, h, w, c_in)), rng.standard_normal((4, 4, c_in, c_out))
    dy = rng.standard_normal(reference.conv2d_shape(x.shape, window.shape, 2, padding))
    plus = rng.standard_normal(x.shape)
    x, window, dy, plus = (a.astype(np.float32) for a in (x, window, dy, plus))
    return {
        "conv2d_input_gradient": (dy, window, 2, padding, x.shape, plus),
        "conv2d_weight_gradient": (x, dy, window.shape, 2, padding),
    }


B = np.array([[1, -1, 0], [0, 1, 0], [0, -1, 1]])  # B^T and G of the derivation
G = np.array([[1, 0], [1, 1], [0, 1]])


def plainly(name, args, of=np.asarray):
    """One of the two passes by the equations, in NumPy; ``of`` np.abs: what rounding errors are relative to."""
    x_shape, padding = (args[4], args[3]) if name == "conv2d_input_gradient" else (args[0].shape, args[4])
    dy = args[0] if name == "conv2d_input_gradient" else args[1]
    (n, h, w_x, c), (_, height, width, c_out), (top, _, left, _) = x_shape, dy.shape, padding
    rows, columns, b, g = -(-height // 2), -(-width // 2), of(B), of(G)
    filled = np.zeros((n, 2 * rows, 2 * columns, c_out))
    filled[:, :height, :width] = of(dy)
    m = np.einsum("er,ntrusc,fs->ntucef", g, filled.reshape(n, rows, 2, columns, 2, -1), g)
    padded = np.zeros((n, max(4 * rows + 2, top + h), max(4 * columns + 2, left + w_x), c))
    inside = slice(None), slice(top, top + h), slice(left, left + w_x)
    if name == "conv2d_input_gradient":
        u = np.einsum("ea,apbqkc,fb->pqkcef", g, of(args[1]).reshape(2, 2, 2, 2, c, c_out), g)
        d = np.einsum("ei,ntucef,pqkcef,fj->ntuipjqk", b, m, u, b)
        for t in range(rows):
            for s in range(columns):
                padded[:, 4 * t : 4 * t + 6, 4 * s : 4 * s + 6] += d[:, t, s].reshape(n, 6, 6, c)
        return padded[inside] + of(args[5])
    padded[inside] = of(args[0])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (6, 6), (1, 2))[:, ::4, ::4][:, :rows, :columns]
    v = np.einsum("ei,ntukipjq,fj->ntupqkef", b, windows.reshape(*windows.shape[:4], 3, 2, 3, 2), b)
    dw = np.einsum("ea,ntupqkef,ntucef,fb->apbqkc", g, v, m, g)
    return dw.reshape(4, 4, c, c_out), of(dy).sum((0, 1, 2))


def exactly(args):
    return [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args]


def check(passes):
    """Each pass agrees with the reference, to 1e-5 of what is added up on the way: more than the products of a sum, as
    entries of a tile cancel."""
    for name, args in passes.items():
        exact = exactly(args)
        compare(getattr(cpu, name)(*args), getattr(reference, name)(*exact), plainly(name, exact, np.abs), name)


def test_the_equations_are_a_convolution(rng):
    for padding in ((1, 0, 2, 1), ALL_ROUND):
        for name, args in arguments(rng, 2, 7, 6, 3, 2, padding).items():
            exact = exactly(args)
            pairs = zip(as_tuple(plainly(name, exact)), as_tuple(getattr(reference, name)(*exact)), strict=True)
            for found, wanted in pairs:
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max(), err_msg=name)


def results(passes):
    dx, (dw, db) = (getattr(cpu, name)(*args) for name, args in passes.items())
    return [dx, dw, db]


@pytest.fixture
def counted(monkeypatch):
    """How often it was called: a test of it must not be one of another kernel."""
    calls = []
    for name in ("input_gradient", "weight_gradient"):
        original = getattr(winograd_strided, name)
        monkeypatch.setattr(winograd_strided, name, lambda *args, run=original: (calls.append(1), run(*args))[1])
    return calls


@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((5, 16, 16, 16, 32), ALL_ROUND),  # the small network's; one image more than fill a block of tiles
        ((2, 32, 32, 32, 64), ALL_ROUND),
        ((3, 9, 7, 16, 32), ALL_ROUND),  # half tiles
        ((66, 4, 4, 16, 32), (0, 0, 0, 0)),  # one pixel
        ((1, 1, 1, 16, 32), (2, 1, 1, 2)),
        ((2, 10, 12, 16, 64), (1, 0, 2, 1)),  # rows that no window meets
        ((2, 11, 10, 48, 32), (0, 2, 3, 0)),
    ],
)
def test_the_two_passes(shape, padding, rng, counted):
    check(arguments(rng, *shape, padding))
    assert len(counted) == 2


@given(
    shape=st.tuples(st.integers(1, 9), *[st.integers(4, 13)] * 2, st.sampled_from([16, 32]), st.sampled_from([32, 64])),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    seed=seeds,
)
def test_the_two_passes_of_any_shape(shape, padding, seed):
    check(arguments(np.random.default_rng(seed), *shape, padding))


@pytest.mark.parametrize(
    ("w_shape", "stride"),
    [((4, 4, 3, 16), 2), ((4, 4, 24, 32), 2), ((4, 4, 16, 16), 2), ((4, 4, 16, 32), 1), ((4, 3, 16, 32), 2)],
)
def test_other_layers_are_left_alone(w_shape, stride):
    assert not winograd_strided.fits(w_shape, stride) and winograd_strided.fits((4, 4, 16, 32), 2)


def test_the_forward_pass_is_a_sum_of_products(rng):
    """A proof about float32 is about such sums: one product, far larger than all else, comes out exactly, and a number
    that is not finite spoils the outputs that see it, not their neighbours."""
    x, w = np.zeros((1, 16, 16, 16), np.float32), rng.standard_normal((4, 4, 16, 32)).astype(np.float32)
    x[0, 7, 7, 3] = np.inf
    spoilt = ~np.isfinite(cpu.conv2d(x, w, None, 2, ALL_ROUND)).all(3)
    np.testing.assert_array_equal(spoilt, ~np.isfinite(reference.conv2d(x, w, None, 2, ALL_ROUND)).all(3))
    assert spoilt.sum() == 4
    x[0, 7, 7, 3], w[1, 1] = 1.0, 1 + 2.0**-20
    np.testing.assert_array_equal(cpu.conv2d(x, w, None, 2, ALL_ROUND), reference.conv2d(x, w, None, 2, ALL_ROUND))


@pytest.mark.parametrize("chunks", [2, 3])
def test_an_image_does_not_depend_on_the_batch_or_the_threads(chunks, rng, monkeypatch):
    """Not by one bit: attacks and attacked shards would disagree."""
    passes = arguments(rng, 5, 17, 14, 16, 32, ALL_ROUND)
    together = results(passes)
    dy, w, _, _, shape, plus = passes["conv2d_input_gradient"]
    for n in range(len(dy)):
        one = slice(n, n + 1)
        alone = cpu.conv2d_input_gradient(dy[one], w, 2, ALL_ROUND, (1, *shape[1:]), plus[one])
        np.testing.assert_array_equal(alone, together[0][one])
    monkeypatch.setattr(winograd_strided, "threads", lambda: chunks)
    for again, before in zip(results(passes), together, strict=True):
        np.testing.assert_array_equal(again, before)


def test_it_stays_within_its_arrays(rng, monkeypatch):
    """Kernels count in raw addresses."""
    zones = Zones()
    for name in ("convolution", "winograd", "winograd_strided", "gather_gemm"):
        monkeypatch.setattr(importlib.import_module(f"nanomr.ops.cpu.{name}"), "empty", zones.empty)
    for shape, padding in (
        ((2, 9, 11, 16, 32), ALL_ROUND),
        ((1, 8, 10, 32, 32), (1, 0, 1, 0)),
        ((5, 16, 16, 16, 64), (0, 3, 3, 0)),
    ):
        passes = arguments(rng, *shape, padding)
        placed = {k: [zones.place(a) if isinstance(a, np.ndarray) else a for a in args] for k, args in passes.items()}
        found = results(placed)
        assert not zones.broken() and all(np.isfinite(a).all() for a in found)


def test_what_is_not_finite_shows(rng):
    """It may spread over its tile, but not to another image, and is never lost."""
    passes = arguments(rng, 3, 16, 16, 16, 32, ALL_ROUND)
    dy, (x, *_) = passes["conv2d_input_gradient"][0], passes["conv2d_weight_gradient"]
    for bad in (np.nan, np.inf):
        dy[1, 2, 3, 4], x[0, 5, 5, 6] = bad, bad
        with np.errstate(invalid="ignore"):
            dx, dw, db = results(passes)
        assert (~np.isfinite(dx)).any((1, 2, 3)).tolist() == [False, True, False]
        assert not np.isfinite(dw[:, :, 6]).all((2,)).any() and not np.isfinite(db[4])


def test_it_rounds_hardly_worse_than_the_plain_sum(rng, monkeypatch):
    """Twice as much on average is what differences of normal numbers may cost."""
    passes = arguments(rng, 4, 16, 16, 16, 32, ALL_ROUND)
    exact = [as_tuple(getattr(reference, name)(*exactly(args)))[0] for name, args in passes.items()]
    error = lambda: [np.abs(f - e).mean() for f, e in zip(results(passes), exact, strict=False)]  # noqa: E731
    short = error()
    monkeypatch.setattr(winograd_strided, "fits", lambda *_: False)
    assert all(a <= 2 * b for a, b in zip(short, error(), strict=True))


def _a_pixel_to_the_left(geometry):
    def wrong(x_shape, *rest):
        grid, (top, left, row, size), images = geometry(x_shape, *rest)
        return grid, (top, left - x_shape[3], row, size), images

    return wrong


def _an_entry_lost(transform):
    def wrong(w, axis):
        taller = transform(w, axis).copy()
        taller[(slice(None),) * axis + (1,)] = 0
        return taller

    return wrong


def _without_the_last_image(kernel):
    def wrong(x, place, grid, dy, *rest):
        kernel(x[:-1], place, grid, dy[:-1], *rest)

    return wrong


FAULTS = {
    "a pixel to the left": ("_geometry", _a_pixel_to_the_left),
    "an entry lost": ("_taller", _an_entry_lost),
    "an image lost": ("_reduce_parts", _without_the_last_image),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, rng, monkeypatch):
    passes = arguments(rng, 6, 8, 8, 16, 32, ALL_ROUND)
    check(passes)
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(winograd_strided, name, wrong(getattr(winograd_strided, name)))
    with pytest.raises(AssertionError):
        check(passes)


def test_taps_that_follow_each_other_are_a_table_of_runs():
    """... and others are not: a run is read from one address."""
    from nanomr.ops.cpu.gather_gemm import runs_of
    from nanomr.ops.cpu.simd import ROWS

    runs = runs_of(np.concatenate([np.arange(ROWS) + start for start in (0, 100, 52)]))
    assert runs.shape == (3, ROWS) and runs[:, 0].tolist() == [0, 100, 52]
    broken = np.arange(2 * ROWS)
    broken[-1] += 1
    assert runs_of(broken).shape == (2 * ROWS,)
    assert runs_of(np.arange(ROWS + 1)).shape == (2 * ROWS,)  # filled up with zeros


def test_which_convolutions_have_runs(rng):
    """Four columns of 16 channels are runs, four of 3 are not; both are right (this pass by the plain sum)."""
    for c in (3, 16):
        x, dy = (rng.standard_normal(s).astype(np.float32) for s in ((3, 9, 9, c), (3, 3, 3, 16)))
        exact = reference.conv2d_weight_gradient(x.astype(float), dy.astype(float), (4, 4, c, 16), 2, (0, 0, 0, 0))
        for found, wanted in zip(
            convolution.conv2d_weight_gradient(x, dy, (4, 4, c, 16), 2, (0, 0, 0, 0)), exact, strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
