"""Bounds on what a network can do inside an input box."""

from .bounds.interval import interval

__all__ = ["interval"]
