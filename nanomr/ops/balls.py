"""Balls around images: what the kernels of all devices mean by one."""

import numpy as np


def rounding_slack(x):
    """A bound on the relative error of a distance in float64: differences, squares, a sum and a root, each rounded."""
    return (x[:1].size + 8) * 2.0**-53


def radius_within(eps, x):
    """A radius a little short of eps, onto which images like ``x`` are projected: factor, product and sum are rounded,
    to one digit in the last place each."""
    return eps * (1 - 4 * float(np.finfo(x.dtype).eps) - rounding_slack(x))


def project_l1(change, eps: float):
    """The nearest points to ``change`` (N, ...) with an l1 norm of at most eps: sign(c) max(|c| - tau, 0).

    tau >= 0 is where the norm is eps: of the descending sizes s_1, s_2, ..., the r that stay above it have
    s_1 + ... + s_r - r tau = eps (Duchi et al. 2008). ``docs/derivations/msd.md``.
    """
    size = abs(change)
    falling = -np.sort(-size.reshape(len(change), -1), axis=1)
    tau = (falling.cumsum(1) - eps) / np.ones_like(falling).cumsum(1)  # if exactly so many stayed
    tau = np.maximum(tau.max(1), 0)  # of which the right one is the largest
    return np.sign(change) * np.maximum(size - tau.reshape(-1, *[1] * (change.ndim - 1)), 0)
