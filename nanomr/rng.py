"""Randomness without state: every draw is a function of (seed, stream, step), by the Philox counter generator.

A resumed run, and a run on another device, draw the same numbers.
"""

import numpy as np

INIT, SHUFFLE, AUGMENT, CORNERS, ATTACK, DATA = range(6)  # the streams


def generator(seed: int, stream: int, step: int = 0) -> np.random.Generator:
    """A NumPy generator of its own for this (seed, stream, step)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]))


def words(seed: int, stream: int, step: int, count: int) -> np.ndarray:
    """``count`` random uint64."""
    return np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]).random_raw(count)
