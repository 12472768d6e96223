"""What one training step minimises: ``METHODS``, by name.

Every step function has one face:

    step(model, x, labels, draw, now) -> {"loss", "cross_entropy", ...}

It adds the gradient of the loss to ``model.gradients``, and returns floats or 0-d arrays: the loss, the cross-entropy
of the images that it trains on (clean, but in adversarial training), and what else its ``Method.reports`` names.
x (N, H, W, C), labels (N,). ``draw(stream)`` is a NumPy generator of (seed, stream, step), see :mod:`nanomr.rng`: a
step draws from nothing else. ``now`` holds what the schedule says ("eps", "lr", and "ramp", how far eps has come, from
0 to 1; of the paper's methods "gamma_i" and "gamma_h" instead), the method's constants by name, and "eps_end".

A method is a function with this face in a file of this package, and a line here.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ..models import fold
from . import adversarial, certified, linear_bounds, manifold
from .manifold import manifold_step, standard_step

__all__ = ["METHODS", "Constant", "Method", "manifold_step", "standard_step"]


class Constant(NamedTuple):
    """A number that a method has for itself: what it is by default, and between which it lies."""

    default: float
    help: str
    low: float = 0.0
    high: float = float("inf")


class Method(NamedTuple):
    step: Callable
    help: str
    constants: Mapping[str, Constant] = MappingProxyType({})
    reports: tuple[str, ...] = ()  # what its step names beside "loss" and "cross_entropy"
    recipe: str = "ramp"  # the one of optim.RECIPES that it is trained by
    corners: bool | None = None  # the paper's, whose steps run on a GPU without the host: does it draw corners there?
    begin: Callable | None = None  # begin(model, generator): the weights that it begins with; None: as they were made
    finish: Callable | None = None  # finish(model) -> the network that is saved for use; None: the model itself
    bf16: bool = False  # may its pictures be bfloat16's, though it is not the paper's?
    certifies: bool = False  # do its bounds prove something? Then the log counts what they prove
    ranks: bool = False  # may ranks divide a batch? Its loss is a mean over images, and no attack trains the network

    @property
    def precisions(self) -> tuple[str, ...]:
        """What its steps may multiply in."""
        return ("fp32", "tf32", "bf16") if self.corners is not None else ("fp32", *["bf16"] * self.bf16)

    def filled(self, given: dict) -> dict:
        """Every constant's value: the ``given`` ones, the others' defaults. Raises ValueError, listing those that there
        are, for one that the method does not have or that is out of its range."""
        for name, value in given.items():
            if name not in self.constants:
                raise ValueError(f"{name[:40]!r} is not one of its constants: {self.listed()}")
            low, high = self.constants[name].low, self.constants[name].high
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
            if not (number and low <= value <= high):
                raise ValueError(f"{name} is a number from {low:g} to {high:g}, not {str(value)[:40]!r}")
        return {name: constant.default for name, constant in self.constants.items()} | given

    def listed(self) -> str:
        """Its constants, in words."""
        return ", ".join(f"{name}={c.default:g} ({c.help})" for name, c in self.constants.items()) or "it has none"


_PAIR = dict(reports=("intrinsic", "hamming"), recipe="paper", ranks=True)
_START = {"start": Constant(1.0, "share of the ball that it begins in", high=1.0)}
_STEPS = {"steps": Constant(10, "of the attack", low=1), "step_size": Constant(0.25, "of the attack, in eps")}
_KAPPA = {"kappa": Constant(0.2, "weight of the clean cross-entropy at the end", high=1.0)}
_ROBUST = Constant(0.0, "weight of the clean cross-entropy at the end", high=1.0)
_Q = {"q": Constant(0.0, "at the end worst margins cost (1 - p^q) / q; 0: -log p", high=1.0)}
_BALANCE = {"balance": Constant(0.5, "weight of Shi et al.'s regulariser at the beginning")}
_CERTIFIED = dict(begin=certified.begin, finish=fold, certifies=True)
METHODS: dict[str, Method] = {
    "manifold": Method(manifold.manifold, "the paper's: both regularisers, on corner pairs", corners=True, **_PAIR),
    "intrinsic": Method(manifold.manifold, "the intrinsic regulariser alone: logits agree", corners=True, **_PAIR),
    "hamming": Method(manifold.manifold, "the Hamming regulariser alone: ReLUs agree", corners=True, **_PAIR),
    "worst-corner": Method(
        manifold.worst_corner, "the paper's terms, on pairs that a step of an attack chooses",
        {
            "share": Constant(1.0, "of the cross-entropy that is taken at the worse corner", high=1.0),
            "start": Constant(0.5, "share of the drawn corner at which the step begins", high=1.0),
            "gamma_i": Constant(0.1, "weight of the intrinsic regulariser"),
            "gamma_h": Constant(100.0, "weight of the Hamming regulariser"),
        }, reports=("intrinsic", "hamming", "adversarial"), recipe="cyclic", ranks=True, bf16=True,
    ),
    "ibp": Method(
        certified.ibp, "interval bounds, batch norm folded (Gowal et al.; Shi et al.)", _KAPPA | _BALANCE | _Q,
        reports=("interval", "balance"), **_CERTIFIED,
    ),
    "ibp-manifold": Method(
        certified.ibp_manifold, "ibp with the paper's terms while eps grows",
        {
            "gamma_i": Constant(0.0, "weight of the intrinsic regulariser"),
            "gamma_h": Constant(300.0, "weight of the Hamming regulariser"),
            "rest": Constant(0.0, "share of both that is left at the end", high=1.0),
        } | _KAPPA | {"balance": Constant(0.0, "weight of Shi et al.'s regulariser at the beginning")} | _Q,
        reports=("interval", "balance", "intrinsic", "hamming"), **_CERTIFIED,
    ),
    "mtl-ibp": Method(
        certified.mtl_ibp, "ibp with adversarial images beside the bounds (De Palma et al.)",
        {
            "alpha_end": Constant(0.95, "weight of the bounds at the end", high=1.0),
            "steps": Constant(1, "of the attack", low=1), "step_size": Constant(10.0, "of the attack, in eps"),
        } | _START | _BALANCE, reports=("interval", "balance", "adversarial"), **_CERTIFIED,
    ),
    "sabr": Method(
        certified.sabr, "ibp in smaller boxes around adversarial images (Mueller et al.)",
        {
            "share": Constant(0.7, "of the radius that the smaller boxes have", high=1.0),
            "steps": Constant(8, "of the attack", low=1), "step_size": Constant(0.5, "of the attack, in eps"),
        } | _START | _KAPPA | _BALANCE, reports=("interval", "balance"), **_CERTIFIED,
    ),
    "crown-ibp": Method(
        linear_bounds.crown_ibp, "ibp with linear bounds while eps grows (Zhang et al. 2020)",
        {"beta_end": Constant(0.0, "share of the linear bounds at the end", high=1.0)} | _KAPPA | _BALANCE,
        reports=("bounds", "balance"), **_CERTIFIED,
    ),
    "dual": Method(
        linear_bounds.dual, "linear bounds, parallel lines; reduced (Wong & Kolter 2018); slow",
        {
            "most": Constant(256, "units of a layer that has linear bounds of its own"),
            "kappa": _ROBUST,
        }, reports=("bounds",), **_CERTIFIED,
    ),
    "predictor": Method(
        linear_bounds.predictor, "linear bounds, learned slopes; reduced (Dvijotham et al. 2018)",
        {"kappa": _ROBUST}, reports=("bounds",),
        **_CERTIFIED | dict(begin=linear_bounds.begin_predictor, finish=linear_bounds.finish_predictor),
    ),
    "diffai": Method(
        certified.diffai, "random boxes and adversarial images (Mirman et al.)",
        {
            "share": Constant(0.5, "of the boxes in the loss at the end", high=1.0),
            "steps": Constant(3, "of the attack", low=1), "step_size": Constant(0.5, "of the attack, in eps"),
        } | _START, reports=("interval", "adversarial"), certifies=True,
    ),
    "rs": Method(
        certified.rs, "pgd, and ReLUs that are stable over intervals (Xiao et al.)",
        {
            "rs": Constant(1e-3, "weight of the stability loss"), "l1": Constant(1e-5, "weight of the l1 norm"),
            "steps": Constant(8, "of the attack", low=1), "step_size": Constant(0.25, "of the attack, in eps"),
        } | _START, reports=("stability",), certifies=True,
    ),
    "standard": Method(manifold.standard, "cross-entropy alone", corners=False, **_PAIR),
    "fgsm": Method(
        adversarial.fgsm, "adversarial images of a single step (Wong et al. 2020)",
        {"step_size": Constant(1.25, "of the attack, in eps")} | _START, recipe="cyclic",
    ),
    "pgd": Method(
        adversarial.pgd, "adversarial images of several (Madry et al.)", _STEPS | _START, recipe="steps", ranks=True,
    ),
    "trades": Method(
        adversarial.trades, "agreement with the worst image (Zhang et al. 2019)",
        {"beta": Constant(6.0, "weight of the divergence")} | _STEPS, reports=("kl",), recipe="steps",
        ranks=True,
    ),
    "mmc": Method(
        adversarial.mmc, "logits at fixed centres (Pang et al. 2020)",
        {"norm": Constant(10.0, "length of the centres")}, recipe="steps", ranks=True,
    ),
    "msd": Method(
        adversarial.msd, "the worst images of linf, l2 and l1 balls (Maini et al. 2020)",
        {
            "steps": Constant(50, "of the attack", low=1),
            "step_size": Constant(0.1, "of linf and l2, in their radii"), "step_l1": Constant(1.0, "of l1"),
            "eps_l2": Constant(0.5, "radius of the l2 ball"), "eps_l1": Constant(12.0, "radius of the l1 ball"),
        }, recipe="cyclic", ranks=True,
    ),
    "wasserstein": Method(
        adversarial.wasserstein, "images whose mass is moved (Wong et al. 2019); slow",
        {
            "steps": Constant(50, "of the attack", low=1), "step_size": Constant(0.1, "of each pixel"),
            "radius": Constant(0.01, "of the ball that it begins with", low=1e-6),
            "factor": Constant(1.5, "that the radius grows by", low=1), "every": Constant(5, "so many steps", low=1),
            "regularization": Constant(3000.0, "of the projection: larger blurs less", low=1),
            "iterations": Constant(2, "of each projection, at most", low=2),
        }, recipe="steps",
    ),
}  # fmt: skip
