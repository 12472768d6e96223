"""Attacks on a model's own input gradients, or without them. Images and eps are in [0, 1] units.

Every attack is a function (model, x, labels, eps, ...) -> (adversarial, fooled); see ``common``. The Wasserstein
attack finds the radius: (model, x, labels, ...) -> (adversarial, radius).
"""

from .apgd import apgd, apgd_targeted
from .autoattack import autoattack
from .blackbox import corner_noise, transfer
from .fab import fab, fab_targeted
from .pgd import fgsm, pgd
from .square import square
from .wasserstein import wasserstein

__all__ = [
    "apgd", "apgd_targeted", "autoattack", "corner_noise", "fab", "fab_targeted", "fgsm", "pgd", "square", "transfer",
    "wasserstein",
]  # fmt: skip
