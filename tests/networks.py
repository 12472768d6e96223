"""Networks with random weights, and boxes of images, for what bounds them."""

import numpy as np

from nanomr.layers import AveragePool2d, BatchNorm2d, Conv2d, Flatten, Linear, Normalize, ReLU
from nanomr.models import Model
from nanomr.ops import ops_for


class Inputs:
    """A tap that keeps the input of every ReLU."""

    def __init__(self):
        self.z = []

    def forward(self, z):
        self.z.append(z)
        return ops_for(z).relu(z), None


def forward(model, x):
    """(logits, [the input of every ReLU, in forward order])."""
    tap = Inputs()
    return model.forward(x, tap=tap)[0], tap.z


def randomise(model, draw, dtype=np.float64):
    """Weights of both signs everywhere, also of batch norms, and running statistics that do something."""
    model.astype(dtype)
    for _, layer in model.walk():
        if isinstance(layer, BatchNorm2d):
            shape = layer.params["weight"].shape
            layer.params["weight"][...] = draw.uniform(0.3, 1.5, shape) * draw.choice([-1, 1], shape)
            layer.params["bias"][...] = draw.normal(0, 0.3, shape)
            layer.buffers["running_mean"][...] = draw.normal(0, 0.5, shape)
            layer.buffers["running_var"][...] = draw.uniform(0.05, 3, shape)
        elif isinstance(layer, Normalize):
            layer.buffers["mean"][...] = draw.uniform(0.2, 0.8, layer.buffers["mean"].shape)
            layer.buffers["std"][...] = draw.uniform(0.1, 0.5, layer.buffers["std"].shape)
        elif layer.params:
            layer.params["weight"] *= draw.uniform(1, 3)
            if "bias" in layer.params:
                layer.params["bias"][...] = draw.normal(0, 0.3, layer.params["bias"].shape)
    return model


def sequence(layers, input_shape, draw):
    """A model of these layers behind a normalisation, with random weights."""
    channels = input_shape[-1]
    children = {"normalize": Normalize((0.0,) * channels, (1.0,) * channels)}
    children.update({str(i): layer for i, layer in enumerate(layers)})
    return randomise(Model(children, {"name": "test"}, input_shape, seed=int(draw.integers(1000))), draw)


def conv_net(draw, first, second, size=(7, 6), *, classes=3, hidden=4, norm=False, bias=True, pool=None):
    """Two convolutions of (kernel, stride, padding) each, and two linear layers: the small network in tiny.

    ``norm``: a batch norm after each convolution; ``pool``: average pooling before the first.
    """
    layers, z, channels = [], np.zeros((1, *size, 2)), (2, 2, 3)
    if pool:
        layers.append(AveragePool2d(pool))
        z = layers[-1].apply(z)
    for i, (kernel, stride, padding) in enumerate((first, second)):
        layers.append(Conv2d(channels[i], channels[i + 1], kernel, stride, padding, bias=bias))
        z = layers[-1].apply(z)
        layers += [BatchNorm2d(channels[i + 1])] * norm + [ReLU()]
    layers += [Flatten(), Linear(z.size, hidden), ReLU(), Linear(hidden, classes)]
    return sequence(layers, (*size, 2), draw)


def box(model, draw, eps, n=2):
    """Boxes [low, high] around images: of every width up to eps, cut at 0 and 1, some pixels fixed."""
    x = draw.random((n, *model.input_shape))
    width = eps * draw.choice([0, 0.5, 1], x.shape, p=[0.1, 0.3, 0.6])
    return np.clip(x - width, 0, 1).astype(model.dtype), np.clip(x + width, 0, 1).astype(model.dtype)


def points(low, high, draw, count=6):
    """Points of the box: its ends, random corners, random points."""
    yield low
    yield high
    for _ in range(count):
        yield np.where(draw.random(low.shape) < 0.5, low, high)
        yield low + draw.random(low.shape) * (high - low)
