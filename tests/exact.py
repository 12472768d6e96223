"""Balls without a rounding error: every float is a fraction, and so are eps, differences, squares and their sum."""

from fractions import Fraction


def inside(norm, eps, x, y):
    """Is each of the images ``y`` (N, ...) within eps of its ``x``, and in [0, 1], in rational arithmetic?"""
    eps = Fraction(eps)
    for before, after in zip(x.reshape(len(x), -1).tolist(), y.reshape(len(y), -1).tolist(), strict=True):
        change = [abs(Fraction(b) - Fraction(a)) for a, b in zip(before, after, strict=True) if a != b]
        length = max(change, default=0) if norm == "linf" else sum(c * c for c in change)
        if length > (eps if norm == "linf" else eps * eps) or min(after) < 0 or max(after) > 1:
            return False
    return True
