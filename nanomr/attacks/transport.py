"""The exact Wasserstein distance of two images, by linear programs: what the attack's radii are checked against."""

import highspy
import numpy as np

from .wasserstein import REACH

ROUNDING = 2.0**-22  # of the pixels of an image that was computed in float64 and kept in float32


def least_cost(x, y):
    """(N,) float64: the least cost of a transport from ``x`` to ``y``, as :mod:`.wasserstein` counts it; inf for none.

    x, y (N, H, W, C) in [0, 1], NumPy. The attack clips: a pixel of y that is 1 may stand for more, and pixels are
    rounded to float32. A linear program for each image and channel, solved by HiGHS to its tolerance of 1e-7.
    """
    height, width = x.shape[1:3]
    pixels, row, column = height * width, *(i.ravel() for i in np.indices((height, width)))
    ways = [(down, right) for down in range(-REACH, REACH + 1) for right in range(-REACH, REACH + 1)]
    inside = [(0 <= row + d) & (row + d < height) & (0 <= column + r) & (column + r < width) for d, r in ways]
    source = np.concatenate([np.flatnonzero(fits) for fits in inside])
    step = np.concatenate([np.full(fits.sum(), d * width + r) for (d, r), fits in zip(ways, inside, strict=True)])
    price = np.concatenate(
        [np.full(fits.sum(), d * d + r * r, float) for (d, r), fits in zip(ways, inside, strict=True)]
    )
    solver, program = highspy.Highs(), highspy.HighsLp()
    solver.setOptionValue("output_flag", False)
    program.num_col_, program.num_row_ = len(source), 2 * pixels
    program.col_cost_, program.col_lower_, program.col_upper_ = price, 0 * price, np.full(len(price), np.inf)
    matrix = program.a_matrix_  # a way's mass leaves its source, and comes to a destination
    matrix.format_, matrix.start_ = highspy.MatrixFormat.kColwise, np.arange(0, 2 * len(source) + 1, 2, np.int32)
    matrix.index_ = np.stack([source, pixels + source + step], 1).astype(np.int32).ravel()
    matrix.value_ = np.ones(2 * len(source))
    costs = np.zeros(len(x))
    for n, (before, after) in enumerate(zip(x.astype(np.float64), y.astype(np.float64), strict=True)):
        for channel in range(x.shape[3]):
            a, b = before[..., channel].ravel(), after[..., channel].ravel()
            program.row_lower_ = np.concatenate([a, b * (1 - ROUNDING)])
            program.row_upper_ = np.concatenate([a, np.where(b < 1, b * (1 + ROUNDING), np.inf)])
            solver.passModel(program)
            solver.run()
            found = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
            costs[n] += solver.getInfo().objective_function_value if found else np.inf
        costs[n] /= max(before.sum(), 1e-300)
    return costs
