"""Attacks on a model's own input gradients. Images and eps are in [0, 1] units.

Every attack is a function (model, x, labels, eps, ...) -> (adversarial, fooled); see ``common``. Here are those that
training uses; the others are imported from their modules:

    from nanomr.attacks.autoattack import autoattack      # the cascades "standard" and "plus"
    from nanomr.attacks.fab import fab, fab_targeted
    from nanomr.attacks.square import square
    from nanomr.attacks.wasserstein import wasserstein
"""

from .apgd import apgd, apgd_targeted
from .pgd import fgsm, pgd

__all__ = ["apgd", "apgd_targeted", "fgsm", "pgd"]
