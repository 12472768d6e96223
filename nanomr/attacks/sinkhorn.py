"""The projected Sinkhorn iteration on the CPU: Numba, all images side by side. ``wasserstein`` imports it on first use.

The same iteration as ``wasserstein._project_log``, its oracle, with e^alpha and e^beta themselves instead of their
logarithms. That costs one logarithm per pixel and iteration instead of twenty exponentials, but the numbers must not
leave the range of a float64; for images where they would, it gives up. ``derivations/sinkhorn.md``.
"""

import numpy as np
from numba import njit, prange

from ..ops.cpu.flags import FLAGS, kernel
from .wasserstein import FARTHEST

LOG2 = 0.6931471805599453
ROOT_HALF = int(np.float64(0.5**0.5).view(np.int64))  # as bits
LIMIT = 500.0  # beyond e^500 we give up: products of two such numbers and a pixel must still be finite
SMALLEST, LARGEST = np.exp(-LIMIT), np.exp(LIMIT)
TINY = 1e-100  # less than this share of the image's mass counts as none
TO_INTEGER = 1.5 * 2.0**52  # a number added to it is an integer, in the lowest bits
ONE = int(np.float64(1).view(np.int64))

# All of these loops are inlined into _image: beside the arrays that it makes itself, the compiler sees that no two of
# them overlap. In functions of their own it would have to look, gives that up, and takes a number at a time.


@njit(inline="always")
def _log(v):
    """The natural logarithm of a normal number v > 0, in sums and products: a loop of it becomes vectors."""
    bits = np.float64(v).view(np.int64)
    shift = (bits - ROOT_HALF) >> 52  # v = 2^shift m, m from sqrt(1/2) to sqrt(2)
    m = np.int64(bits - (shift << 52)).view(np.float64)
    s = (m - 1) / (m + 1)
    z = s * s  # <= 0.0295; log m = 2 artanh s
    rest = 1 / 15 + z * (1 / 17 + z / 19)
    rest = 1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + z * rest)))
    return np.float64(shift) * LOG2 + 2 * (s + s * z * (1 / 3 + z * (1 / 5 + z * rest)))


@njit(inline="always")
def _exp(t):
    """e^t for abs(t) <= LIMIT, in sums and products too: to 13 digits, as n log 2 is rounded."""
    n = np.floor(t / LOG2 + 0.5)  # e^t = 2^n e^r
    r = t - n * LOG2
    e = 1 / 5040 + r * (1 / 40320 + r * (1 / 362880 + r * (1 / 3628800 + r * (1 / 39916800 + r / 479001600))))
    e = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * e))))))
    return e * np.int64((np.float64(n + TO_INTEGER).view(np.int64) << 52) + ONE).view(np.float64)


@njit(inline="always")
def _sums(v, near, length, a, b, s0):
    """Sums of five taps along a row, weighted by K; v begins two pixels of ``near`` numbers before."""
    v0, v1, v2 = v[:length], v[near : near + length], v[2 * near : 2 * near + length]
    v3, v4 = v[3 * near : 3 * near + length], v[4 * near : 4 * near + length]
    for j in range(length):
        s0[j] = v2[j] + a * (v1[j] + v3[j]) + b * (v0[j] + v4[j])


@njit(inline="always")
def _sums_and_costs(v, near, length, a, b, s0, s1, s2):
    """:func:`_sums`, and the same weighted by C K and C^2 K."""
    v0, v1, v2 = v[:length], v[near : near + length], v[2 * near : 2 * near + length]
    v3, v4 = v[3 * near : 3 * near + length], v[4 * near : 4 * near + length]
    for j in range(length):
        one, two = a * (v1[j] + v3[j]), b * (v0[j] + v4[j])
        s0[j] = v2[j] + one + two
        s1[j] = one + 4 * two
        s2[j] = one + 16 * two


@njit(inline="always")
def _depart(x, s0, s1, s2, i, a, b, u):
    """Row i of e^alpha = x / K e^beta; and of the plan's cost, and of C^2. The rows of s begin two before x's."""
    a0, a1, a2, a3, a4 = s0[i], s0[i + 1], s0[i + 2], s0[i + 3], s0[i + 4]
    b0, b1, b2, b3, b4 = s1[i], s1[i + 1], s1[i + 2], s1[i + 3], s1[i + 4]
    c0, c1, c2, c3, c4 = s2[i], s2[i + 1], s2[i + 2], s2[i + 3], s2[i + 4]
    cost = square = 0.0
    for j in range(len(x)):
        one, two = a * (a1[j] + a3[j]), b * (a0[j] + a4[j])
        mixed, mixed_far = a * (b1[j] + b3[j]), b * (b0[j] + b4[j])
        moved = b2[j] + mixed + mixed_far + one + 4 * two
        far_moved = c2[j] + a * (c1[j] + c3[j]) + b * (c0[j] + c4[j]) + 2 * mixed + 8 * mixed_far + one + 16 * two
        mass = x[j] if x[j] > TINY else 0.0
        pixel = mass / (a2[j] + one + two)
        u[j] = pixel
        cost += pixel * moved
        square += pixel * far_moved
    return cost, square


@njit(inline="always")
def _towards(w, r):
    """One step from w to the solution of w + log w = what it is here + r, as a factor. Fritsch, Shafer, Crowley: order
    4, if |r| <= (1 + w) / 2."""
    q = 2 * (1 + w) * (1 + w + r * (2 / 3))
    return 1 + r * (q - r) / ((1 + w) * (q - 2 * r))


@njit(inline="always")
def _arrive(y, v, s0, i, a, b, strength, out, beta, factor):
    """Row i of what the plan brings, and of the factor by which e^beta moves towards what y asks for. (The sum of what
    is missing, how many pixels are too far for :func:`_towards`.)"""
    a0, a1, a2, a3, a4 = s0[i], s0[i + 1], s0[i + 2], s0[i + 3], s0[i + 4]
    residual, far, per = 0.0, 0, 1 / strength
    for j in range(len(y)):
        z = v[j] * (a2[j] + a * (a1[j] + a3[j]) + b * (a0[j] + a4[j]))
        out[j], beta[j] = z, _log(v[j])
        # w + log w = strength y + log(strength s), from where beta puts w: r is what is missing
        w = strength * z
        r = strength * y[j] - w - beta[j]
        step = _towards(w, r)
        far += 0 if abs(r) <= 0.5 * (1 + w) else 1
        residual += abs(z - w * step * per)
        factor[j] = step
    return residual, far


@njit(inline="always")
def _arrive_from_far(y, out, beta, strength, factor):
    """The same where some are: w is doubled or halved first, by which log w changes by a constant. (What is missing, or
    infinity where that is beyond all measure.)"""
    residual = 0.0
    for j in range(len(y)):
        w = strength * out[j]
        r = strength * y[j] - w - beta[j]
        if not -w - 20 * LIMIT < r < 20 * LIMIT:
            return np.inf
        doubled = 1.0
        while r > 0.5 * (1 + w):
            r -= w + LOG2
            w, doubled = 2 * w, 2 * doubled
        while r < -0.5 * (1 + w):
            r += 0.5 * w + LOG2
            w, doubled = 0.5 * w, 0.5 * doubled
        step = _towards(w, r)
        residual += abs(out[j] - w * step / strength)
        factor[j] = doubled * step
    return residual


@njit(inline="always")
def _moved(v, factor):
    """v times factor; how many leave the range."""
    lost = 0
    for j in range(len(v)):
        v[j] *= factor[j]
        lost += 0 if SMALLEST < v[j] < LARGEST else 1
    return lost


@njit(inline="always")
def _total(row):
    total = 0.0
    for j in range(len(row)):
        total += np.float64(row[j])
    return total


@njit(inline="always")
def _begin(x0, y0, mass, beta, x, y, v):
    """A row in shares of the mass, and e^beta; how many leave the range."""
    lost = 0
    for j in range(len(x0)):
        x[j] = x0[j] / mass
        y[j] = min(max(y0[j] / mass, -FARTHEST), FARTHEST)
        lost += 0 if abs(beta[j]) < LIMIT else 1
        v[j] = _exp(beta[j])
    return lost


@njit(inline="always")
def _end(x, share, mass, out):
    """A row of the image: ``share`` of the way to what the plan brings."""
    for j in range(len(x)):
        out[j] = (x[j] + share * (out[j] - x[j])) * mass


@kernel(**FLAGS)
def _image(x0, y0, radius, strength, tolerance, most, channels, beta, psi, out):
    """One image: (iterations, psi, cost, residual); ``beta`` and ``out`` are written. 0 iterations: gave up.

    x0, y0, beta, out (H, W C): rows of interleaved channels, so that a shift by a pixel is a shift by ``channels``.
    """
    height, length = x0.shape
    start, end = 2 * channels, 2 * channels + length
    u = np.zeros((height, length + 4 * channels))  # e^alpha, and e^beta, with two pixels of nothing on either side
    v = np.zeros((height, length + 4 * channels))
    s0 = np.zeros((height + 4, length))  # sums along rows, weighted by K, C K and C^2 K; two rows of nothing
    s1 = np.zeros((height + 4, length))
    s2 = np.zeros((height + 4, length))
    x, y, factor = np.empty((height, length)), np.empty((height, length)), np.empty((height, length))
    mass = 0.0
    for i in range(height):
        mass += _total(x0[i])
    mass = mass if mass > 0 else 1.0
    for i in range(height):
        if _begin(x0[i], y0[i], mass, beta[i], x[i], y[i], v[i, start:end]):
            return 0, psi, 0.0, 0.0
    for iteration in range(most):
        a, b = np.exp(-psi), np.exp(-4 * psi)  # K is separable: exp(-psi (r^2 + c^2)) = exp(-psi r^2) exp(-psi c^2)
        for i in range(height):
            _sums_and_costs(v[i], channels, length, a, b, s0[i + 2], s1[i + 2], s2[i + 2])
        cost, square = 0.0, 0.0  # of the plan: the sums of C and of C^2
        for i in range(height):
            row_cost, row_square = _depart(x[i], s0, s1, s2, i, a, b, u[i, start:end])
            cost, square = cost + row_cost, square + row_square
        last = iteration + 1 == most
        fits = abs(cost - radius) <= tolerance * radius or (psi == 0 and cost <= radius)
        if not fits and not last:
            psi = max(psi + np.log(cost / radius) * cost / square, 0.0) if cost > 1e-300 else 0.0
            a, b = np.exp(-psi), np.exp(-4 * psi)
        for i in range(height):
            _sums(u[i], channels, length, a, b, s0[i + 2])
        residual = 0.0
        for i in range(height):
            missing, far = _arrive(y[i], v[i, start:end], s0, i, a, b, strength, out[i], beta[i], factor[i])
            if far:
                missing = _arrive_from_far(y[i], out[i], beta[i], strength, factor[i])
                if missing == np.inf:
                    return 0, psi, 0.0, 0.0
            residual += missing
        if last or (fits and residual <= tolerance * radius):
            # The ball is convex: a share of the way to a plan that costs too much.
            share = min(1.0, radius / cost) if cost > 0 else 1.0
            for i in range(height):
                _end(x[i], share, mass, out[i])
            return iteration + 1, psi, share * cost, residual
        for i in range(height):
            if _moved(v[i, start:end], factor[i]):
                return 0, psi, 0.0, 0.0
    return 0, psi, 0.0, 0.0


@kernel(parallel=True, **FLAGS)
def project(x, y, radius, strength, tolerance, most, channels, beta, psi, out, cost, residual, iterations):
    """:func:`_image` for each of x, y (N, H, W C); writes beta, psi, out, cost, residual, iterations, all float64 but
    the last."""
    for n in prange(len(x)):
        iterations[n], psi[n], cost[n], residual[n] = _image(
            x[n], y[n], radius, strength, tolerance, most, channels, beta[n], psi[n], out[n]
        )
