"""Attacks on a model's own input gradients. Images and eps are in [0, 1] units."""

from .pgd import pgd

__all__ = ["pgd"]
