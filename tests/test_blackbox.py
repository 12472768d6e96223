"""Random corners, and images made for another network."""

import exact
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import models
from nanomr.attacks import pgd
from nanomr.attacks.blackbox import corner_noise, transfer
from nanomr.testing.strategies import fewer, seeds

SHAPE, N = (3, 3, 3), 24


def network(seed=0, dtype=np.float32, scale=8.0):
    """A small network, balanced so that no class wins everywhere, whose decisions change within small balls."""
    model = models.mlp((27, 12, 3), seed=seed, input_shape=SHAPE).astype(dtype)
    model.weights *= scale
    *_, last = model.children.values()
    last.params["bias"] -= model.forward(pictures(dtype=dtype))[0].mean(0)
    return model


def pictures(seed=0, dtype=np.float32):
    return np.clip(np.random.default_rng(seed).uniform(-0.3, 1.3, (N, *SHAPE)), 0, 1).astype(dtype)


def own(model, x):
    return model.forward(x)[0].argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@fewer(0.5)
@given(seed=seeds, eps=st.floats(0, 0.4), draws=st.integers(0, 4))
def test_corner_noise_keeps_its_promises(norm, dtype, seed, eps, draws):
    model, x = network(seed % 1000, dtype), pictures(seed, dtype)
    labels, before = np.random.default_rng(seed).integers(0, 3, N), x.copy()
    adversarial, fooled = corner_noise(model, x, labels, eps, draws, norm=norm, seed=seed, batch_size=7)
    assert np.array_equal(x, before) and adversarial.dtype == dtype and fooled.dtype == bool
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert exact.inside(norm, eps, x, adversarial)
    assert np.array_equal(fooled, own(model, adversarial) != labels)
    at_once = own(model, x) != labels
    assert np.all(fooled[at_once]) and np.array_equal(adversarial[at_once], x[at_once])
    assert np.array_equal(adversarial[~fooled], x[~fooled])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_they_are_corners(norm):
    model, x = network(dtype=np.float64), np.full((N, *SHAPE), 0.5)
    x += pictures(dtype=np.float64) * 0.01
    labels, eps = own(model, x), 0.2
    adversarial, fooled = corner_noise(model, x, labels, eps, 30, norm=norm)
    change = (adversarial - x)[fooled]
    assert len(change) > 3
    np.testing.assert_allclose(abs(change), eps if norm == "linf" else eps / np.sqrt(27), rtol=1e-9)
    share = (change > 0).mean((1, 2, 3))
    assert np.all((share > 0.1) & (share < 0.9)) and len(np.unique(change > 0, axis=0)) == len(change)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_but_seed_and_id_decides_the_draws(dtype):
    model, x = network(dtype=dtype), pictures(dtype=dtype)
    labels = own(model, x)
    adversarial, fooled = corner_noise(model, x, labels, 0.15, 5)
    assert 3 < fooled.sum() < N
    for size in (N, 7, 1):
        again, same = corner_noise(model, x, labels, 0.15, 5, batch_size=size)
        assert np.array_equal(again, adversarial) and np.array_equal(same, fooled)
    some = np.array([20, 1, 8, 9])
    again, same = corner_noise(model, x[some], labels[some], 0.15, 5, ids=some)
    assert np.array_equal(again, adversarial[some]) and np.array_equal(same, fooled[some])
    for other in (dict(seed=1), dict(ids=np.arange(N) + N)):
        again, same = corner_noise(model, x, labels, 0.15, 5, **other)
        both = fooled & same
        assert both.any() and not np.any((again == adversarial).all((1, 2, 3))[both])


def test_more_draws_fool_more_and_keep_what_was_found():
    model, x = network(), pictures()
    labels = own(model, x)
    found, numbers = None, []
    for draws in (0, 1, 3, 10):
        adversarial, fooled = corner_noise(model, x, labels, 0.12, draws)
        if found is not None:
            assert np.all(fooled[found[1]]) and np.array_equal(adversarial[found[1]], found[0][found[1]])
        found = adversarial, fooled
        numbers.append(int(fooled.sum()))
    assert numbers[0] == 0 < numbers[1] < numbers[3]


def test_a_network_that_cannot_be_fooled_and_settings_that_make_no_sense():
    model, x = network(), pictures()
    model.weights[...] = 0
    said = []
    adversarial, fooled = corner_noise(
        model, x, np.zeros(N, int), 0.5, 3, batch_size=10, progress=lambda *a: said.append(a)
    )
    assert not fooled.any() and np.array_equal(adversarial, x) and said == [(10, 10), (20, 20), (24, 24)]
    for bad in (dict(eps=-1), dict(eps=0.1, norm="l1")):
        with pytest.raises(ValueError):
            corner_noise(model, x, np.zeros(N, int), **bad)
    with pytest.raises(ValueError):
        corner_noise(model, x, np.full(N, 3), 0.1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_transfer_judges_images_by_this_network(norm):
    eps = 0.25 if norm == "linf" else 0.8
    source, target, x = network(), network(), pictures()
    target.weights *= 1 + 0.3 * np.sin(np.arange(len(target.weights)))  # not the same, but not unlike
    adversarial, _ = pgd(source, x, own(source, x), eps, norm=norm)
    labels = own(target, x)
    labels[[2, 5]] = (labels[[2, 5]] + 1) % 3  # wrong to begin with
    before = adversarial.copy()
    images, fooled = transfer(target, adversarial, x, labels, eps, norm, batch_size=7)
    at_once = own(target, x) != labels
    assert np.array_equal(adversarial, before) and at_once.sum() == 2
    assert np.array_equal(fooled, at_once | (own(target, adversarial) != labels))
    assert at_once.sum() + 2 < fooled.sum() < N
    taken = fooled & ~at_once
    assert np.array_equal(images[taken], adversarial[taken]) and np.array_equal(images[~taken], x[~taken])


def test_transfer_refuses_images_that_prove_nothing():
    model, x = network(), pictures()
    labels = own(model, x)
    images, fooled = transfer(model, x.copy(), x, labels, 0.0)
    assert not fooled.any() and np.array_equal(images, x)
    for place, value in (((3, 0, 0, 0), x[3, 0, 0, 0] + 0.2), ((1, 2, 2, 2), np.nan), ((0, 1, 1, 1), 1.001)):
        bad = x.copy()
        bad[place] = value
        with pytest.raises(ValueError, match="1 of 24"):
            transfer(model, bad, x, labels, 0.1)
    with pytest.raises(ValueError, match="float64"):
        transfer(model, x.astype(float), x, labels, 0.1)
    with pytest.raises(ValueError):
        transfer(model, x, x, labels + 3, 0.1)
    assert len(transfer(model, x[:0], x[:0], labels[:0], 0.1)[1]) == 0
