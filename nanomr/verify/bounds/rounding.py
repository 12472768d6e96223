"""How far the deployed float32 forward pass can be from real arithmetic. Higham 2002, chapter 3; ``docs/soundness.md``.

A sum of n products, in any order and with or without fused multiply-add, is off by at most gamma_n times the sum of
the absolute values, gamma_n = n u / (1 - n u), u = 2^-24. Errors of the inputs go through |A|.
"""

from functools import singledispatch

import numpy as np

from ...layers import Affine, AveragePool2d, Conv2d, Flatten, Linear, Normalize
from ..chain import Chain
from .crown import inner
from .interval import propagate

TINY = 2.0**-124  # what an underflow can lose, also where subnormal numbers are flushed to zero


def gamma(n: int) -> float:
    """The relative error of n float32 roundings."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def float32_errors(chain: Chain, low, high, relus, rows, owner):
    """(S,): bounds on |rows . float32 logits - rows . real logits| over boxes of float32 images [low, high].

    low, high (B, H, W, C); ``relus``: the bounds of every ReLU's input (:func:`nanomr.verify.bounds.crown.crown`); rows
    (S, K), owner (S,): which box each is about. Infinite for a network with batch norms, which are folded here and
    round otherwise as they are deployed, and for one whose convolutions may go by Winograd's algorithm.

    The difference of the two networks is itself a network, linear through every ReLU that is surely on in both: the
    rows go back through it, signs and all, and each layer's own rounding is charged as they come by. Where a ReLU may
    be on in one and off in the other, the largest error of its input is charged instead.
    """
    if not chain.sums:
        return np.full(len(rows), np.inf)
    owner = np.asarray(owner)
    largest, error = np.maximum(abs(low), abs(high)), np.zeros_like(low)
    own, inputs = [], []  # of each stage's layers, their own rounding; of each ReLU layer, the error of its input
    for k, stage in enumerate(chain.stages):
        if k:
            inputs.append(error)
            largest, error = np.maximum(relus[k - 1][1], 0), np.where(relus[k - 1][1] + error < 0, 0, error)
        own.append([])
        for layer in stage.layers:
            largest, through, rounding = _through(layer, largest, error)
            error = through + rounding
            own[k].append(rounding)
    total, a = np.zeros(len(rows)), rows
    for k in reversed(range(len(chain.stages))):
        stage = chain.stages[k]
        for layer, zero, rounding in reversed(list(zip(stage.layers, stage.inputs, own[k], strict=True))):
            total += inner(abs(a), rounding[owner])
            a = layer.transpose(a, np.broadcast_to(zero, (len(a), *zero.shape[1:])))
        if k:
            (z_low, z_high), error = relus[k - 1], inputs[k - 1]
            on, off = z_low > error, z_high < -error
            total += inner(abs(a), np.where(on | off, 0, error)[owner])
            a = a * on[owner]
    return total


def _magnitude(layer, size):
    """|A| size."""
    return propagate(layer, 0 * size, size, [])[1]


def _dot(layer, largest, error, terms):
    bias = abs(layer.params.get("bias", 0.0))
    size, through = _magnitude(layer, largest), _magnitude(layer, error)
    return size + bias, through, gamma(terms + 1) * (size + through + bias) + terms * TINY


@singledispatch
def _through(layer: Affine, largest, error):
    """(largest |output|, the input's error at the output, the layer's own rounding) from (largest |input|, error)."""
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
    size, through = (largest + mean) * scale, error * scale
    return size, through, gamma(4) * (size + through) + TINY


@_through.register
def _(layer: AveragePool2d, largest, error):
    size, through = layer.apply(largest), layer.apply(error)
    window = layer.window or largest.shape[1]
    return size, through, gamma(window * window + 1) * (size + through) + TINY


@_through.register
def _(layer: Flatten, largest, error):
    return layer.apply(largest), layer.apply(error), layer.apply(0 * error)
