"""Randomness without state: every draw is a function of (seed, stream, step), by the Philox counter generator.

A resumed run, and a run on another device, draw the same numbers.
"""

import numpy as np

# the streams; METHOD: what a step draws beside corners, ATTACK: what an evaluation does
INIT, SHUFFLE, AUGMENT, CORNERS, ATTACK, DATA, METHOD = range(7)


def _philox(seed, stream, step):
    # uint64 by hand: NumPy would read a list with a number above 2^63 as float64, and round it
    key, counter = np.array([seed, stream], np.uint64), np.array([0, step, 0, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter)


def generator(seed: int, stream: int, step: int = 0) -> np.random.Generator:
    """A NumPy generator of its own for this (seed, stream, step)."""
    return np.random.Generator(_philox(seed, stream, step))


def words(seed: int, stream: int, step: int, count: int) -> np.ndarray:
    """``count`` random uint64."""
    return _philox(seed, stream, step).random_raw(count)
