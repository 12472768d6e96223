"""The figures of the log, on networks whose every number is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import metrics, models
from nanomr.testing.strategies import seeds


def by_hand(weights, biases, images=2):
    """One hidden layer on images of 1 x 1 x ``images`` pixels; the logits are 0 and the sum of the ReLUs minus 1."""
    weights = np.array(weights, np.float32)
    model = models.mlp((images, weights.shape[1], 2), input_shape=(1, 1, images))
    model.children["fc1"].params["weight"][...] = weights
    model.children["fc1"].params["bias"][...] = biases
    model.children["fc2"].params["weight"][...] = [[0, 1]] * weights.shape[1]
    model.children["fc2"].params["bias"][...] = [0, -1]
    return model


def pixels(*rows):
    return np.array(rows, np.uint8).reshape(len(rows), 1, 1, -1)


def test_as_float_is_the_fraction_of_255_and_stays_in_the_box():
    values = np.arange(256, dtype=np.uint8)
    found = metrics.as_float(values)
    assert found.dtype == np.float32 and found[0] == 0 and found[-1] == 1 and found.max() <= 1
    np.testing.assert_allclose(found, np.arange(256) / 255, rtol=1e-6)
    assert np.array_equal(np.rint(found * 255), values)


@given(seed=seeds, batch_size=st.integers(1, 50))
def test_accuracy_is_the_share_of_right_answers_for_any_batch_size(seed, batch_size):
    draw = np.random.default_rng(seed)
    model = models.mlp((12, 5, 3), seed=seed % 1000, input_shape=(2, 2, 3))
    images, labels = draw.integers(0, 256, (40, 2, 2, 3), dtype=np.uint8), draw.integers(0, 3, 40)
    right = sum(
        int(np.argmax(model.forward(image[None] / np.float32(255))[0][0]) == label)
        for image, label in zip(images, labels, strict=True)
    )
    assert metrics.accuracy(model, images, labels, batch_size) == right / 40


def test_accuracy_of_a_known_network():
    model = by_hand([[3], [0]], [0])  # class 1 where x0 > 1/3
    images = pixels((0, 255), (84, 0), (86, 0), (255, 0))
    assert metrics.accuracy(model, images, np.array([0, 0, 1, 1])) == 1
    assert metrics.accuracy(model, images, np.array([0, 0, 0, 1])) == 0.75
    assert metrics.accuracy(model, images, np.array([1, 1, 0, 0])) == 0


# x0 is 0, 127/255 and 1; x1 is 1, 0.4 and 0.
IMAGES = pixels((0, 255), (127, 102), (255, 0))
EPS = 0.1


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [  # (corner distance, unstable, switching, dead), of one ReLU
        ((1, 0), -0.5, (1 / 3, 1 / 3, 1, 0)),  # x0 > 0.5: off, off but near, on
        ((0, 0), -1.0, (0, 0, 0, 1)),  # never on
        ((0, 0), 1.0, (0, 0, 0, 0)),  # always on
        ((0, 1), 1.0, (0, 0, 0, 0)),  # always on, whatever the image
        ((1, 0), -1.02, (1 / 3, 0, 0, 1)),  # off at every image; its corner at x0 = 1.1 would be on, outside of the box
        ((1, 0), -0.95, (1 / 3, 1 / 3, 1, 0)),  # on at x0 = 1 only
        ((0, 1), -0.05, (1 / 3, 1 / 3, 1, 0)),  # x1 > 0.05: at x1 = 0 the corner 0.1 is on
        ((0, 0), 0.0, (0, 0, 0, 1)),  # exactly 0 is off, and stable
        ((1, 0), -0.7, (0, 0, 1, 0)),  # switches between images, and in no ball
    ],
)
def test_stability_of_one_relu(weight, bias, expected):
    found = metrics.stability(by_hand([[w] for w in weight], [bias]), IMAGES, EPS)
    assert found["relus"] == 1
    assert (found["corner_distance"], found["unstable"], found["switching"], found["dead"]) == pytest.approx(expected)


def test_stability_of_a_layer_is_that_of_its_relus_and_no_batch_changes_it():
    model = by_hand([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0]], [-0.5, -1, 1, -0.7, -0.95])
    expected = {"corner_distance": 2 / 3, "unstable": 2 / 15, "switching": 3, "dead": 1, "relus": 5}
    for batch_size in (1, 2, 3, 500):
        assert metrics.stability(model, IMAGES, EPS, batch_size=batch_size) == pytest.approx(expected)


def test_a_dead_relu_is_dead_for_all_images_not_only_for_the_last_batch():
    model = by_hand([[1, -1], [0, 0]], [-0.5, 0.5])  # on for the bright, on for the dark
    found = metrics.stability(model, pixels((255, 0), (0, 0)), 0.01, batch_size=1)
    assert found["dead"] == 0 and found["switching"] == 2
    found = metrics.stability(model, pixels((255, 0), (255, 9)), 0.01, batch_size=1)
    assert found["dead"] == 1 and found["switching"] == 0


def test_without_a_ball_nothing_is_unstable_and_a_larger_one_has_more():
    model = models.mlp((27, 16, 8, 3), input_shape=(3, 3, 3))
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 3, 3), dtype=np.uint8)
    shares = [metrics.stability(model, images, eps) for eps in (0, 0.01, 0.05, 0.2)]
    assert shares[0]["unstable"] == shares[0]["corner_distance"] == 0
    assert sorted(s["unstable"] for s in shares) == [s["unstable"] for s in shares]
    assert 0 < shares[1]["unstable"] < shares[3]["unstable"] <= 1
    assert shares[0]["switching"] == shares[3]["switching"] and shares[0]["relus"] == 24


def test_the_seed_draws_the_corners_and_nothing_else():
    model = models.mlp((27, 64, 3), input_shape=(3, 3, 3))
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 3, 3), dtype=np.uint8)
    one, same, other = (metrics.stability(model, images, 0.1, seed=s) for s in (0, 0, 1))
    assert one == same
    assert one.pop("corner_distance") != other.pop("corner_distance") and one == other


def test_images_and_model_stay_as_they_are():
    model = models.preact_resnet18(width=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    before, state = images.copy(), model.state_dict()
    metrics.stability(model, images, 0.03)
    metrics.accuracy(model, images, np.zeros(3, int))
    metrics.robust_accuracy(model, images, np.zeros(3, int), 0.03, steps=1)
    assert np.array_equal(images, before) and not model.gradients.any()
    assert all(np.array_equal(value, state[name]) for name, value in model.state_dict().items())
