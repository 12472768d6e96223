"""Bounds of what a network can do inside a box of inputs: intervals, CROWN, and float32's rounding."""
