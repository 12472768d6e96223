"""How far the deployed float32 forward pass can be from real arithmetic. Higham 2002, chapter 3; ``docs/soundness.md``.

A sum of n products, in any order and with or without fused multiply-add, is off by at most gamma_n times the sum of
the absolute values, gamma_n = n u / (1 - n u), u = 2^-24. Errors of the inputs go through |A|.
"""

from functools import singledispatch

import numpy as np

from ..layers import Affine, AveragePool2d, Conv2d, Flatten, Linear, Normalize
from .bounds import propagate
from .chain import Chain

TINY = 2.0**-149  # what an underflow can lose


def gamma(n: int) -> float:
    """The relative error of n float32 roundings."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def float32_error(chain: Chain, low, high, relus):
    """(B, K): bounds on |float32 logit - real logit| over boxes of float32 images [low, high] (B, H, W, C).

    ``relus``: the bounds of every ReLU's input (:func:`nanomr.verify.crown.crown`). Infinite for a network with batch
    norms: folded, they round otherwise than as they are deployed.
    """
    if chain.folded:
        return np.full((len(low), chain.classes), np.inf)
    largest, error = np.maximum(abs(low), abs(high)), np.zeros_like(low)
    for k, stage in enumerate(chain.stages):
        if k:
            largest = np.maximum(relus[k - 1][1], 0)
        for layer in stage.layers:
            largest, error = _through(layer, largest, error)
    return error


def _magnitude(layer, size):
    """|A| size."""
    return propagate(layer, 0 * size, size, [])[1]


def _dot(layer, largest, error, terms):
    bias = abs(layer.params.get("bias", 0.0))
    size = _magnitude(layer, largest)
    wrong = _magnitude(layer, error)
    return size + bias, wrong + gamma(terms + 1) * (size + wrong + bias) + terms * TINY


@singledispatch
def _through(layer: Affine, largest, error):
    """(largest |output|, its error) after ``layer``, from those of its input."""
    raise NotImplementedError(f"no rounding error for {type(layer).__name__}")


@_through.register
def _(layer: Conv2d, largest, error):
    return _dot(layer, largest, error, int(np.prod(layer.params["weight"].shape[:3])))


@_through.register
def _(layer: Linear, largest, error):
    return _dot(layer, largest, error, len(layer.params["weight"]))


@_through.register
def _(layer: Normalize, largest, error):  # (x - mean) times 1 / std, which is rounded as well: three roundings
    mean, scale = abs(layer.buffers["mean"]), abs(1 / layer.buffers["std"])
    size, wrong = (largest + mean) * scale, error * scale
    return size, wrong + gamma(4) * (size + wrong) + TINY


@_through.register
def _(layer: AveragePool2d, largest, error):
    size, wrong = layer.apply(largest), layer.apply(error)
    window = layer.window or largest.shape[1]
    return size, wrong + gamma(window * window + 1) * (size + wrong) + TINY


@_through.register
def _(layer: Flatten, largest, error):
    return layer.apply(largest), layer.apply(error)
