"""The least value of a linear function over a box and a half-space."""

import numpy as np
from numba import njit


@njit(fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True)
def least(w, c, k, steps=10):
    """Lower bounds of w . y, w (S, D), over the y in [-1, 1] with c . y + k <= 0: (S,).

    Of the dual, max over m >= 0 of m k - |w + m c|, a concave function: every m gives a bound, bisection a good one.
    """
    best = np.empty(len(w))
    size = np.abs(c).sum()
    for i in range(len(w)):
        row, left, m = w[i], 0.0, 0.0
        best[i] = -np.abs(row).sum()
        right = -8 * best[i] / size if size > 0 else 0.0
        for _ in range(steps):
            value, slope = m * k, k
            for j in range(len(c)):
                sum_ = row[j] + m * c[j]
                value -= abs(sum_)
                slope -= c[j] if sum_ > 0 else -c[j]
            best[i] = max(best[i], value)
            if slope > 0:
                left = m
            else:
                right = m
                if m == 0:
                    break
            m = 0.5 * (left + right)
    return best
