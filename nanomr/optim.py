"""SGD with momentum and weight decay over one flat vector, and the paper's piecewise-linear schedules."""

import numpy as np

from .backend import array_module
from .ops import ops_for


class SGD:
    """PyTorch's SGD: v <- momentum v + g + weight_decay w; w <- w - lr v, for all parameters alike.

    ``clip``: the gradient is scaled down to this l2 norm when it is longer; None does not clip.
    """

    def __init__(self, model, momentum: float = 0.9, weight_decay: float = 5e-4, clip: float | None = None):
        self.model, self.momentum, self.weight_decay, self.clip = model, momentum, weight_decay, clip
        self.velocity = array_module(model.weights).zeros_like(model.weights)

    def step(self, lr: float):
        """One update from ``model.gradients``, which it then clears. Returns the gradient's norm before clipping.

        Raises ValueError when the model has got other layers, or another dtype, since the optimiser was made.
        """
        weights, gradients = self.model.weights, self.model.gradients
        if self.velocity.shape != weights.shape or self.velocity.dtype != weights.dtype:
            raise ValueError("the model has other weights than when this optimiser was made: make a new one")
        ops = ops_for(weights)
        norm = ops.norm(gradients)
        if self.clip is not None:
            gradients *= array_module(norm).minimum(1.0, self.clip / (norm + 1e-12)).astype(gradients.dtype)
        ops.sgd_update(weights, gradients, self.velocity, lr, self.momentum, self.weight_decay)
        gradients[...] = 0
        return norm


PAPER_EPOCHS = 100


def piecewise(epoch: float, epochs: float, knots, values) -> float:
    """Linear interpolation between (knots, values), constant outside. ``knots`` are epochs of the paper's 100-epoch
    schedule; a run of another length walks through it in proportion."""
    return float(np.interp(epoch * PAPER_EPOCHS / epochs, knots, values))


def learning_rate(epoch: float, epochs: float, peak: float = 0.1) -> float:
    """Appendix B: 0 to the peak (0.1) over 40 epochs, to a twentieth of it over the next 40, to 0 over the last 20."""
    return piecewise(epoch, epochs, (0, 40, 80, 100), (0.0, peak, peak / 20, 0.0))


def epsilon(epoch: float, epochs: float, start: float = 2 / 255, end: float = 8 / 255) -> float:
    """Appendix B: from 2/255 to 8/255 over epochs 10 to 35."""
    return piecewise(epoch, epochs, (10, 35), (start, end))


def gamma_factor(epoch: float, epochs: float, factor: float = 10.0) -> float:
    """Appendix B: both regularisers' weights grow linearly, up to ten times, over epochs 20 to 80."""
    return piecewise(epoch, epochs, (20, 80), (1.0, factor))
