"""Bounds on what a network can do inside an input box."""

from .bounds import interval

__all__ = ["interval"]
