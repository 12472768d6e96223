"""SGD and AdamW over one flat vector, the paper's piecewise-linear schedules, and recipes: what goes with what."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .backend import array_module
from .ops import ops_for


class Optimizer:
    """What both have. ``state``: the vectors that a resumed run needs, by name; ``steps``: how many were taken.

    ``clip``: the gradient is scaled down to this l2 norm when it is longer; None does not clip.
    """

    def __init__(self, model, names: tuple[str, ...], weight_decay: float, clip: float | None):
        self.model, self.weight_decay, self.clip, self.steps = model, weight_decay, clip, 0
        self.state = {name: array_module(model.weights).zeros_like(model.weights) for name in names}

    def step(self, lr: float):
        """One update from ``model.gradients``, which it then clears. Returns the gradient's norm before clipping.

        Raises ValueError when the model has got other layers, or another dtype, since the optimiser was made.
        """
        weights, gradients = self.model.weights, self.model.gradients
        if any(v.shape != weights.shape or v.dtype != weights.dtype for v in self.state.values()):
            raise ValueError("the model has other weights than when this optimiser was made: make a new one")
        norm = ops_for(weights).norm(gradients)
        if self.clip is not None:
            gradients *= array_module(norm).minimum(1.0, self.clip / (norm + 1e-12)).astype(gradients.dtype)
        self.steps += 1
        self.update(weights, gradients, lr)
        gradients[...] = 0
        return norm

    def update(self, weights, gradients, lr):
        raise NotImplementedError


class SGD(Optimizer):
    """PyTorch's SGD: v <- momentum v + g + weight_decay w; w <- w - lr v, for all parameters alike."""

    def __init__(self, model, momentum: float = 0.9, weight_decay: float = 5e-4, clip: float | None = None):
        super().__init__(model, ("velocity",), weight_decay, clip)
        self.momentum = momentum

    @property
    def velocity(self):
        return self.state["velocity"]

    def update(self, weights, gradients, lr):
        ops_for(weights).sgd_update(weights, gradients, self.velocity, lr, self.momentum, self.weight_decay)


class AdamW(Optimizer):
    """PyTorch's AdamW (Loshchilov & Hutter 2019), for all parameters alike: w <- (1 - lr weight_decay) w, then
    w <- w - lr m_hat / (sqrt(v_hat) + eps), of running means m of g and v of g^2, freed of their bias to 0."""

    def __init__(self, model, betas=(0.9, 0.999), weight_decay: float = 1e-5, clip: float | None = None):
        super().__init__(model, ("mean", "square"), weight_decay, clip)
        self.betas = betas

    def update(self, weights, gradients, lr):
        mean, square = self.state["mean"], self.state["square"]
        rates = (lr, *self.betas, self.weight_decay)
        ops_for(weights).adamw_update(weights, gradients, mean, square, self.steps, *rates)


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


def smooth(way: float, turn: float = 0.25) -> float:
    """From 0 to 1 as ``way`` goes there: like its fourth power up to ``turn``, from there on straight, with no kink."""
    way = min(max(way, 0.0), 1.0)
    scale = 1 / (4 * turn**3 * (1 - turn) + turn**4)
    return scale * (way**4 if way < turn else turn**4 + 4 * turn**3 * (way - turn))


def paper_schedule(config, epoch: float) -> dict:
    """Appendix B: "lr", "eps", and "ramp", how far eps has come."""
    return {
        "lr": learning_rate(epoch, config.epochs, config.lr),
        "eps": epsilon(epoch, config.epochs, config.eps_start, config.eps),
        "ramp": epsilon(epoch, config.epochs, 0.0, 1.0),
    }


def ramp_schedule(config, epoch: float) -> dict:
    """Certified training's: eps is 0 for the first ``ramp_from`` of the run, and full, by :func:`smooth`, from
    ``ramp_to`` of it on; lr is a fifth from 80 % on, a 25th from 92 % on."""
    done = epoch / max(config.epochs, 1)
    ramp = smooth((done - config.ramp_from) / max(config.ramp_to - config.ramp_from, 1e-9))
    return {
        "lr": config.lr * (1.0 if done < 0.8 else 0.2 if done < 0.92 else 0.04),
        "eps": config.eps * ramp,
        "ramp": ramp,
    }


class Recipe(NamedTuple):
    """A schedule, and what a run by it does unless it is told otherwise. ``defaults``: of Config's fields, None
    where they depend on the network."""

    schedule: Callable[..., dict]
    help: str
    defaults: dict


RECIPES = {
    "paper": Recipe(
        paper_schedule,
        "appendix B: lr up and down, eps from --eps-start",
        dict(optimizer="sgd", lr=None, weight_decay=5e-4, clip=None, pad=4),
    ),
    "ramp": Recipe(
        ramp_schedule,
        "eps from 0, slowly at first; lr in three steps",
        dict(optimizer="adamw", lr=1e-3, weight_decay=1e-5, clip=10.0, pad=2),
    ),
}
