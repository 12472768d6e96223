"""shapes10: ten drawn shapes in CIFAR-10's format, for when there is no CIFAR-10 and for quick runs. No download.

A shape is a signed distance function d(x, y): negative inside, positive outside, in units of the shape's size.
An image is one shape with a random place, size, rotation and colour on a random two-tone, striped background, plus
a little noise. One image in five is dark on light, and so no pixel says much about the class: a linear classifier gets
a third right, a small convolutional network nearly all. (At one in two, the linear one falls to a sixth, but then the
start of training is so flat that adversarial training of that network stayed at 10 %.) Every shape has an axis of
symmetry and is turned by any angle, so that horizontal flips keep the class.

Only +, -, *, /, sqrt and comparisons of float32 numbers touch the pixels: IEEE 754 fixes each result,
and so the same seed gives the same bytes on every platform.
"""

from math import cos, pi, sin, sqrt

import numpy as np

CLASSES = ("circle", "ring", "square", "triangle", "cross", "star", "heart", "moon", "arrow", "stripes")
SEED, TRAIN, TEST = 0, 20_000, 2_000  # what data.load("shapes10") draws: training from SEED, test from SEED + 1
DARK_ON_LIGHT = 0.2  # share of the images
BLOCK = 500  # images drawn at once: bounds the memory, and makes generate(n) the start of every longer generate


def generate(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` images (n, 32, 32, 3) uint8 and labels (n,) int64; image i is of class i % 10, so every slice is balanced.

    Same seed, same bytes. A smaller ``n`` gives the first images of a larger one.
    """
    blocks = [_draw_block(seed, i) for i in range(-(-n // BLOCK))]
    images = np.concatenate([np.empty((0, 32, 32, 3), np.uint8), *blocks])[:n]
    return images, np.arange(n, dtype=np.int64) % len(CLASSES)


# ---------------------------------------------------------------- signed distances, x and y of any equal shape


def _half_planes(x, y, count, inset):
    """Distances to ``count`` lines around the origin at distance ``inset``, evenly turned: (count, ...)."""
    turns = [2 * pi * k / count for k in range(count)]
    return np.stack([sin(t) * x + cos(t) * y - inset for t in turns])


def _box(x, y, half_width, half_height):
    return np.maximum(abs(x) - half_width, abs(y) - half_height)


def _disc(x, y, radius):
    return np.sqrt(x * x + y * y) - radius


def circle(x, y):
    return _disc(x, y, 0.85)


def ring(x, y):
    return abs(_disc(x, y, 0.72)) - 0.2


def square(x, y):
    return _box(x, y, 0.75, 0.75)


def triangle(x, y):
    return _half_planes(x, y, 3, 0.5).max(axis=0)


def cross(x, y):
    return np.minimum(_box(x, y, 0.95, 0.27), _box(x, y, 0.27, 0.95))


def star(x, y):
    # a pentagram's points lie outside at most one of its five lines: the second largest distance decides
    return np.sort(_half_planes(x, y, 5, 0.34), axis=0)[-2]


def heart(x, y):
    x, y = 1.15 * abs(x), 0.95 * y - 0.09  # a square on its tip, a disc on each of its two upper sides, stretched
    return np.minimum((x + abs(y) - 0.9) * sqrt(0.5), _disc(x - 0.45, y + 0.45, 0.9 * sqrt(0.5)))


def moon(x, y):
    return np.maximum(_disc(x, y, 0.95), -_disc(x - 0.5, y, 0.75))


def arrow(x, y):
    head = np.maximum((abs(x) - y - 1.0) * sqrt(0.5), y + 0.1)
    return np.minimum(head, _box(x, y - 0.4, 0.24, 0.55))


def stripes(x, y):
    nearest = np.clip(np.rint(y / 0.66), -1, 1)  # three bars
    return _box(x, y - 0.66 * nearest, 0.9, 0.19)


SHAPES = (circle, ring, square, triangle, cross, star, heart, moon, arrow, stripes)


# ---------------------------------------------------------------- images


def _draw_block(seed, index):
    """Images ``index * BLOCK`` to ``(index + 1) * BLOCK - 1`` of the stream ``seed``: (BLOCK, 32, 32, 3) uint8."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))

    def uniform(low, high, *shape):
        return low + (high - low) * rng.random((BLOCK, *shape), np.float32)

    grid = np.arange(32, dtype=np.float32) - 15.5
    px, py = grid[None, None, :], grid[None, :, None]

    # where the shape lies (pixels): a large one has less room to move
    size = uniform(9.0, 13.0, 1, 1)
    room = 15.0 - size
    cx, cy = uniform(-1, 1, 1, 1) * room, uniform(-1, 1, 1, 1) * room
    c, s = _direction(uniform(0, 2 * pi, 1, 1))
    x, y = (c * (px - cx) + s * (py - cy)) / size, (c * (py - cy) - s * (px - cx)) / size
    distance = np.empty((BLOCK, 32, 32), np.float32)
    for label, shape in enumerate(SHAPES):
        mine = slice(label, None, len(SHAPES))
        distance[mine] = shape(x[mine], y[mine])
    inside = np.clip(0.5 - distance * size, 0, 1)[..., None]  # the share of the pixel that the shape covers

    # the background: a slow change from one side to the other, and stripes (a triangle wave), in a random direction
    c, s = _direction(uniform(0, 2 * pi, 1, 1))
    along = c * px + s * py
    phase = along / uniform(3.0, 9.0, 1, 1) + uniform(0, 1, 1, 1)
    wave = abs(phase - np.floor(phase) - 0.5) * 4 - 1
    shade = uniform(-0.12, 0.12, 1, 1) * along / 16 + uniform(0, 0.08, 1, 1) * wave

    # one colour is dark and one is light; the shape is mostly the light one
    dark, light = _colour(uniform, 0.08, 0.32), _colour(uniform, 0.68, 0.92)
    swap = uniform(0, 1, 1, 1, 1) < DARK_ON_LIGHT
    front, back = np.where(swap, dark, light), np.where(swap, light, dark) + shade[..., None]
    noise = uniform(-0.04, 0.04, 32, 32, 3)
    return (np.clip(back + inside * (front - back) + noise, 0, 1) * 255 + 0.5).astype(np.uint8)


def _direction(angle):
    """Cosine and sine, rounded from float64: the float32 ones may differ in the last bit between platforms."""
    angle = angle.astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _colour(uniform, darkest, lightest):
    """A random colour (BLOCK, 1, 1, 3) whose mean over R, G, B lies between ``darkest`` and ``lightest``."""
    hue = uniform(-0.3, 0.3, 1, 1, 3)
    hue = hue - (hue[..., :1] + hue[..., 1:2] + hue[..., 2:]) / 3
    return uniform(darkest, lightest, 1, 1, 1) + hue
