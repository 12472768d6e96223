"""nanomr.shapes10: the same bytes everywhere, ten balanced classes, and out of a linear classifier's reach."""

import hashlib

import numpy as np
import pytest

from nanomr import shapes10


@pytest.fixture(scope="module")
def train():
    return shapes10.generate(4000, shapes10.SEED)


@pytest.fixture(scope="module")
def test_set():
    return shapes10.generate(1000, shapes10.SEED + 1)


def test_the_bytes_are_pinned():
    """Runs, checkpoints and tables name the seed only: other bytes would make them wrong."""
    images, _ = shapes10.generate(10, 0)
    assert (
        hashlib.sha256(images.tobytes()).hexdigest()
        == "27dd2bfa1f224432304b23d25e89a8b882d377b7d5714e85bb1e4803b4d571a0"
    )


def test_types_and_range(train):
    images, labels = train
    assert images.shape == (4000, 32, 32, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert labels.shape == (4000,) and labels.dtype == np.int64
    assert images.min() == 0 and images.max() == 255
    assert len(shapes10.CLASSES) == len(set(shapes10.CLASSES)) == len(shapes10.SHAPES) == 10
    empty, none = shapes10.generate(0, 0)
    assert empty.shape == (0, 32, 32, 3) and none.shape == (0,)


def test_every_slice_is_balanced(train):
    for start, stop in ((0, 4000), (130, 230), (3990, 4000)):
        assert (np.bincount(train[1][start:stop], minlength=10) == (stop - start) // 10).all()


def test_a_shorter_set_is_the_start_of_a_longer_one(train):
    for n in (1, shapes10.BLOCK, shapes10.BLOCK + 1):
        images, labels = shapes10.generate(n, shapes10.SEED)
        assert np.array_equal(images, train[0][:n]) and np.array_equal(labels, train[1][:n])


def test_no_two_images_are_equal(train, test_set):
    """Other seeds and other blocks draw other images."""
    both = np.concatenate([train[0], test_set[0]])
    assert len({image.tobytes() for image in both}) == len(both)


def brightness(images):
    return images.astype(np.float64).mean(axis=-1) / 255


@pytest.mark.parametrize("name", shapes10.CLASSES)
def test_class_names_fit_the_drawn_shapes(name):
    """Facts about each shape that a person would use, on the shape without rotation, colour or noise."""
    axis = np.linspace(-1.5, 1.5, 300)  # no point lies on an edge by design, where rounding decides
    x, y = np.meshgrid(axis, axis)
    inside = dict(zip(shapes10.CLASSES, shapes10.SHAPES, strict=True))[name](x, y) < 0
    area = inside.mean() * 9

    def at(px, py):
        return bool(inside[np.abs(axis - py).argmin(), np.abs(axis - px).argmin()])

    assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any()  # bounded
    flipped = inside[::-1] if name == "moon" else inside[:, ::-1]
    assert (inside == flipped).mean() > 0.999  # an axis of symmetry, so that a flipped image is in the same class
    tips = np.arange(5) * 2 * np.pi / 5
    facts = {
        "circle": abs(area - np.pi * 0.85**2) < 0.05,
        "ring": not at(0, 0) and at(0.72, 0) and at(-0.72, 0) and at(0, 0.72) and at(0, -0.72),
        "square": abs(area - 1.5**2) < 0.1 and at(0.7, 0.7) and at(-0.7, -0.7),
        "triangle": abs(area - 3 * np.sqrt(3) * 0.5**2) < 0.05,
        "cross": at(0.8, 0) and at(0, 0.8) and at(-0.8, 0) and at(0, -0.8) and not at(0.5, 0.5),
        "star": all(at(0.9 * np.sin(t), 0.9 * np.cos(t)) for t in tips)
        and not any(at(0.6 * np.sin(t + np.pi / 5), 0.6 * np.cos(t + np.pi / 5)) for t in tips),
        "heart": at(0, 0.9) and not at(0.3, 0.9) and at(0.4, -1) and at(-0.4, -1) and not at(0, -1),
        "moon": at(-0.6, 0) and not at(0.3, 0) and at(0.3, 0.82) and at(0.3, -0.82),
        "arrow": at(0, -0.9) and at(0, 0.8) and at(0.7, -0.2) and not at(0.7, 0.2),
        "stripes": [at(0, v) for v in (-0.66, -0.33, 0, 0.33, 0.66)] == [True, False, True, False, True],
    }
    assert facts[name]


def test_contrast_and_polarity(train):
    """A perturbation of 8/255 cannot hide a shape; one image in five is dark on light."""
    images, labels = train
    grey = brightness(images)
    low, high = np.quantile(grey, 0.02, axis=(1, 2)), np.quantile(grey, 0.98, axis=(1, 2))
    assert (high - low).min() > 10 * 8 / 255
    edge = np.concatenate([grey[:, [0, -1]].reshape(len(grey), -1), grey[:, :, [0, -1]].reshape(len(grey), -1)], axis=1)
    dark_on_light = np.median(edge, axis=1) > 0.5
    assert abs(dark_on_light.mean() - 0.2) < 0.03
    for label in range(10):  # and it tells nothing about the class
        assert abs(dark_on_light[labels == label].mean() - 0.2) < 0.08


def test_a_linear_classifier_fails(train, test_set):
    """Multinomial logistic regression on the pixels by gradient descent with momentum: its best moment is near 30 %."""

    def features(images):
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255 - 0.5
        return np.concatenate([pixels, np.ones((len(images), 1), np.float32)], axis=1)

    x, target, x_test = features(train[0]), np.eye(10, dtype=np.float32)[train[1]], features(test_set[0])
    w, velocity, accuracies = np.zeros((x.shape[1], 10), np.float32), 0.0, []
    for step in range(150):
        z = x @ w
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        velocity = 0.9 * velocity - 0.01 * (x.T @ (p - target) / len(x) + 1e-3 * w)
        w += velocity
        if step % 10 == 9:
            accuracies.append((np.argmax(x_test @ w, axis=1) == test_set[1]).mean())
    assert (np.argmax(x @ w, axis=1) == train[1]).mean() > 0.35  # it was trained
    assert 0.2 < max(accuracies) < 0.4
