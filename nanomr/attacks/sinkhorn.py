"""The projected Sinkhorn iteration on the CPU: Numba, all images side by side. ``wasserstein`` imports it on first use.

The same iteration as ``wasserstein._project_log``, its oracle, with e^alpha and e^beta themselves instead of their
logarithms. That costs one logarithm per pixel and iteration instead of twenty exponentials, but the numbers must not
leave the range of a float64; for images where they would, it gives up. ``derivations/sinkhorn.md``.
"""

import numpy as np
from numba import njit, prange

from ..ops.cpu.flags import FLAGS

LOG2 = 0.6931471805599453
LIMIT = 500.0  # beyond e^500 we give up: products of two such numbers and a pixel must still be finite
SMALLEST, LARGEST = np.exp(-LIMIT), np.exp(LIMIT)
TINY = 1e-100  # less than this share of the image's mass counts as none


@njit(**FLAGS)
def _image(x, y, radius, strength, tolerance, most, channels, beta, psi, out):
    """One image: (iterations, psi, cost, residual); ``beta`` and ``out`` are written. 0 iterations: gave up.

    x, y, beta, out (H, W C): rows of interleaved channels, so that a shift by a pixel is a shift by ``channels``.
    """
    height, length = x.shape
    near, middle, far, end = channels, 2 * channels, 3 * channels, 4 * channels
    u = np.zeros((height, length + end))  # e^alpha, and e^beta, with two pixels of nothing to the left and right
    v = np.zeros((height, length + end))
    s0 = np.zeros((height + 4, length))  # sums along rows, weighted by K, C K and C^2 K; two rows of nothing
    s1 = np.zeros((height + 4, length))
    s2 = np.zeros((height + 4, length))
    for i in range(height):
        for j in range(length):
            if not abs(beta[i, j]) < LIMIT:
                return 0, psi, 0.0, 0.0
            v[i, j + middle] = np.exp(beta[i, j])
    for iteration in range(most):
        a, b = np.exp(-psi), np.exp(-4 * psi)  # K is separable: exp(-psi (r^2 + c^2)) = exp(-psi r^2) exp(-psi c^2)
        for i in range(height):
            for j in range(length):
                one, two = a * (v[i, j + near] + v[i, j + far]), b * (v[i, j] + v[i, j + end])
                s0[i + 2, j] = v[i, j + middle] + one + two
                s1[i + 2, j] = one + 4 * two
                s2[i + 2, j] = one + 16 * two
        cost, square = 0.0, 0.0  # of the plan: the sums of C and of C^2
        for i in range(height):
            for j in range(length):
                one, two = a * (s0[i + 1, j] + s0[i + 3, j]), b * (s0[i, j] + s0[i + 4, j])
                mixed = a * (s1[i + 1, j] + s1[i + 3, j])
                mixed_far = b * (s1[i, j] + s1[i + 4, j])
                moved = s1[i + 2, j] + mixed + mixed_far + one + 4 * two
                far_moved = s2[i + 2, j] + a * (s2[i + 1, j] + s2[i + 3, j]) + b * (s2[i, j] + s2[i + 4, j])
                far_moved += 2 * mixed + 8 * mixed_far + one + 16 * two
                pixel = x[i, j] / (s0[i + 2, j] + one + two) if x[i, j] > TINY else 0.0
                u[i, j + middle] = pixel
                cost += pixel * moved
                square += pixel * far_moved
        last = iteration + 1 == most
        fits = abs(cost - radius) <= tolerance * radius or (psi == 0 and cost <= radius)
        if not fits and not last:
            psi = max(psi + np.log(cost / radius) * cost / square, 0.0) if cost > 1e-300 else 0.0
            a, b = np.exp(-psi), np.exp(-4 * psi)
        for i in range(height):
            for j in range(length):
                s0[i + 2, j] = u[i, j + middle] + a * (u[i, j + near] + u[i, j + far]) + b * (u[i, j] + u[i, j + end])
        residual = 0.0
        for i in range(height):
            for j in range(length):
                s = s0[i + 2, j] + a * (s0[i + 1, j] + s0[i + 3, j]) + b * (s0[i, j] + s0[i + 4, j])
                out[i, j] = v[i, j + middle] * s  # what the plan brings here
                beta[i, j] = np.log(v[i, j + middle])
                # w + log w = strength y + log(strength s), from where beta puts w: r is what is missing
                w = strength * out[i, j]
                r = strength * y[i, j] - w - beta[i, j]
                if not -w - 20 * LIMIT < r < 20 * LIMIT:
                    return 0, psi, 0.0, 0.0
                factor = 1.0
                while r > 0.5 * (1 + w):
                    r -= w + LOG2
                    w, factor = 2 * w, 2 * factor
                while r < -0.5 * (1 + w):
                    r += 0.5 * w + LOG2
                    w, factor = 0.5 * w, 0.5 * factor
                q = 2 * (1 + w) * (1 + w + r * (2 / 3))
                step = 1 + r / (1 + w) * (q - r) / (q - 2 * r)  # Fritsch, Shafer, Crowley: order 4
                residual += abs(out[i, j] - w * step / strength)
                s1[i + 2, j] = factor * step
        if last or (fits and residual <= tolerance * radius):
            return iteration + 1, psi, cost, residual
        for i in range(height):
            for j in range(length):
                v[i, j + middle] *= s1[i + 2, j]
                if not SMALLEST < v[i, j + middle] < LARGEST:
                    return 0, psi, 0.0, 0.0
    return 0, psi, 0.0, 0.0


@njit(parallel=True, **FLAGS)
def project(x, y, radius, strength, tolerance, most, channels, beta, psi, out, cost, residual, iterations):
    """:func:`_image` for each of x, y (N, H, W C) float64; writes beta, psi, out, cost, residual, iterations."""
    for n in prange(len(x)):
        iterations[n], psi[n], cost[n], residual[n] = _image(
            x[n], y[n], radius, strength, tolerance, most, channels, beta[n], psi[n], out[n]
        )
