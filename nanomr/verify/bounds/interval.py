"""Interval bounds: what every ReLU's input can be while the image moves in a box. Gowal et al. 2018.

A box is a centre and a radius, (c, r). A linear map takes it to (A c + b, |A| r); anything monotone acts on both ends.
"""

from functools import singledispatch

from ...layers import (
    AveragePool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    Normalize,
    Normalized,
    PreActBlock,
    ReLU,
    Residual,
    Sequential,
)
from ...ops import ops_for


def interval(model, low, high):
    """((low, high) of the logits, [(low, high) of each ReLU's input, in forward order]) for images in [low, high].

    low, high (N, H, W, C), of the model's dtype; batch norms are in evaluation mode. Sound up to float rounding.
    """
    relus = []
    centre, radius = propagate(model, 0.5 * (low + high), 0.5 * (high - low), relus)
    return (centre - radius, centre + radius), relus


@singledispatch
def propagate(layer, centre, radius, relus):
    """(centre, radius) after ``layer``; ReLUs add the bounds of their input to the list ``relus``."""
    raise NotImplementedError(f"no interval bounds for {type(layer).__name__}")


@propagate.register
def _(layer: AveragePool2d | Flatten, centre, radius, relus):
    return layer.apply(centre), layer.apply(radius)  # their matrices have no negative entry


@propagate.register
def _(layer: Normalize, centre, radius, relus):
    return layer.apply(centre), ops_for(radius).normalize(radius, None, abs(layer.buffers["std"]))


@propagate.register
def _(layer: Conv2d, centre, radius, relus):
    weight = abs(layer.params["weight"])
    return layer.apply(centre), ops_for(radius).conv2d(radius, weight, None, layer.stride, layer.padding)


@propagate.register
def _(layer: Linear, centre, radius, relus):
    return layer.apply(centre), ops_for(radius).linear(radius, abs(layer.params["weight"]), None)


@propagate.register
def _(layer: BatchNorm2d, centre, radius, relus):
    scale = layer.params["weight"] / (layer.buffers["running_var"] + layer.eps) ** 0.5
    y, _ = layer.forward(centre)
    return (y.full() if isinstance(y, Normalized) else y), radius * abs(scale)


@propagate.register
def _(layer: ReLU, centre, radius, relus):
    low, high = centre - radius, centre + radius
    relus.append((low, high))
    relu = ops_for(low).relu
    low, high = relu(low), relu(high)
    return 0.5 * (low + high), 0.5 * (high - low)


@propagate.register
def _(layer: Sequential, centre, radius, relus):
    for child in layer.children.values():
        centre, radius = propagate(child, centre, radius, relus)
    return centre, radius


@propagate.register
def _(layer: Residual, centre, radius, relus):
    ends = [propagate(branch, centre, radius, relus) for branch in layer.children.values()]
    (c, r), (d, s) = [*ends, (centre, radius)][:2]
    return c + d, r + s


@propagate.register
def _(layer: PreActBlock, centre, radius, relus):
    start, box = (centre, radius), (centre, radius)
    for name in ("bn1", "relu1", "conv1", "bn2", "relu2", "conv2"):
        box = propagate(layer.children[name], *box, relus)
        if name == "relu1" and layer.shortcut_reads_h:
            start = box
    if layer.projects:
        start = propagate(layer.children["shortcut"], *start, relus)
    return box[0] + start[0], box[1] + start[1]
