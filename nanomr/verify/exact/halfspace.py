"""The least value of a linear function over a box and a half-space."""

from typing import NamedTuple

import numpy as np

from ...ops.cpu.flags import FLAGS, kernel

STEPS = 10  # of bisection
_jit = kernel(**FLAGS)


class Rows(NamedTuple):
    """A matrix (U, D) with many zeros: of row u the ``values`` and their ``columns``, from start[u] to start[u + 1]."""

    start: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, matrix) -> "Rows":
        row, column = np.nonzero(matrix)
        start = np.append(0, np.cumsum(np.bincount(row, minlength=len(matrix))))
        return cls(start, column.astype(np.int32), matrix[row, column])


@_jit
def _climb(w, c, n, rest, k):
    """(bound, m) of the first n entries of w and c; ``rest``: the sum of |c| where w is 0."""
    least, size = 0.0, rest
    for j in range(n):
        least -= abs(w[j])
        size += abs(c[j])
    left, m, right = 0.0, 0.0, -8 * least / size if size > 0 else 0.0
    best, best_m = least, 0.0
    for _ in range(STEPS):
        value, slope = m * (k - rest), k - rest
        for j in range(n):
            sum_ = w[j] + m * c[j]
            value -= abs(sum_)
            slope -= c[j] if sum_ > 0 else -c[j]
        if value > best:
            best, best_m = value, m
        if slope > 0:
            left = m
        else:
            right = m
            if m == 0:
                break
        m = 0.5 * (left + right)
    best_m = np.float64(np.float32(best_m))  # what a proof file holds
    value = best_m * (k - rest)
    for j in range(n):
        value -= abs(w[j] + best_m * c[j])
    return (value, best_m) if value > least else (least, 0.0)


@_jit
def least_dense(w, c, k):
    """:func:`least` of rows w (S, D) themselves."""
    best, m = np.empty(len(w)), np.empty(len(w))
    for i in range(len(w)):
        best[i], m[i] = _climb(w[i], c, len(c), 0.0, k)
    return best, m


@_jit
def least(factors, start, columns, values, c, k):
    """Lower bounds of w . y over the y in [-1, 1] with c . y + k <= 0, for w = factors (S, U) @ the matrix (U, D) of a
    :class:`Rows`: (bounds, multipliers m), (S,) each.

    Of the dual, max over m >= 0 of m k - |w + m c|, a concave function: every m gives a bound, bisection a good one. A
    multiplier is a float32 number, and its bound is that number's.
    """
    best, m = np.empty(len(factors)), np.empty(len(factors))
    total, last = np.empty(len(c)), np.full(len(c), -1)  # w, and the row that each of its entries is of
    place, w, on = np.empty(len(c), np.int64), np.empty(len(c)), np.empty(len(c))
    size = np.abs(c).sum()
    for i in range(len(factors)):
        n = 0
        for u in range(factors.shape[1]):
            factor = factors[i, u]
            if factor != 0:
                for q in range(start[u], start[u + 1]):
                    column = columns[q]
                    if last[column] != i:
                        last[column], total[column], place[n] = i, 0.0, column
                        n += 1
                    total[column] += factor * values[q]
        rest = size
        for j in range(n):
            w[j], on[j] = total[place[j]], c[place[j]]
            rest -= abs(on[j])
        best[i], m[i] = _climb(w, on, n, max(rest, 0.0), k)
    return best, m
