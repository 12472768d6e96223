"""Attacks on a model's own input gradients. Images and eps are in [0, 1] units."""

from .apgd import apgd, apgd_targeted
from .pgd import fgsm, pgd

__all__ = ["apgd", "apgd_targeted", "fgsm", "pgd"]
