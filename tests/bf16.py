"""What a module of kernels must give for bfloat16 pictures: held to ``reference``, on a CPU and on a GPU.

A bfloat16 number has 8 significant bits: whatever is stored as one may be off by 2^-8 of itself, besides float32's 1e-5
of the terms of a sum (see ``test_ops.py``). The inputs are bfloat16 to begin with, so that only what is stored is
rounded. Each check takes the module, ``ops``, and its array module, ``xp``.
"""

import ml_dtypes
import numpy as np
from test_ops import OPERATIONS, TOLERANCE, as_tuple

from nanomr.backend import to_numpy
from nanomr.ops import reference

BF16 = np.dtype(ml_dtypes.bfloat16)
ROUNDING = 2.0**-8
ALL_ROUND = (1, 1, 1, 1)


def exact(a):
    return a.astype(np.float64) if getattr(a, "dtype", None) in (np.float32, BF16) else a


def rounded(a):
    """To the nearest bfloat16, kept as float32."""
    return np.asarray(a, np.float32).astype(BF16).astype(np.float32)


def check(found, expected, bound, what, dtype=None):
    """``found`` is within ``bound`` of ``expected``, plus bfloat16's rounding where it is one."""
    for k, (f, e, b) in enumerate(zip(as_tuple(found), as_tuple(expected), as_tuple(bound), strict=True)):
        assert dtype is None or f.dtype == dtype, f"{what}[{k}] is {f.dtype}"
        f = to_numpy(f)
        assert f.shape == e.shape, f"{what}[{k}] is {f.shape}, not {e.shape}"
        excess = np.abs(exact(f) - e) - b - (ROUNDING * np.abs(e) if f.dtype == BF16 else 0)
        assert not np.isnan(excess).any(), f"{what}[{k}] has NaN"
        worst = np.unravel_index(excess.argmax(), excess.shape) if excess.ndim else ()
        assert excess[worst] <= 1e-30, f"{what}[{k}] at {worst}: {f[worst]}, not {e[worst]} (bound {b[worst]})"


# Which arguments are pictures, stored as bfloat16; the others stay float32.
PICTURES = {
    "linear": (0,),
    "linear_weight_gradient": (0,),
    "relu": (0,),
    "relu_backward": (0, 1),
    "relu_hamming": (0,),
    "relu_hamming_backward": (0, 1),
    "box_around": (0,),
    "relu_box": (0, 1),
    "relu_box_backward": (0, 1, 2, 3),
    "batchnorm_relu_box": (0, 1),
    "batchnorm_relu_box_backward": (0, 1, 2, 3),
    "expand_pair": (0, 1),
    "contract_pair": (0,),
    "normalize": (0,),
    "batchnorm_statistics": (0,),
    "batchnorm": (0,),
    "batchnorm_parameter_gradient": (0, 1),
    "batchnorm_backward": (0, 1, 7),
    "scale_channels": (0, 2),
    "average_pool": (0,),
    "average_pool_backward": (0,),
}


def check_operation(ops, xp, operation, args):
    """The inputs are bfloat16 to begin with, so that only what is stored is rounded."""
    args = [rounded(a).astype(BF16) if i in PICTURES[operation] and a is not None else a for i, a in enumerate(args)]
    numbers = [exact(a) for a in args]
    found = getattr(ops, operation)(*[xp.asarray(a) if isinstance(a, np.ndarray) else a for a in args])
    bound = [TOLERANCE * b for b in as_tuple(OPERATIONS[operation].magnitude(*numbers))]
    check(found, getattr(reference, operation)(*numbers), tuple(bound), operation)
    first = as_tuple(found)[0]
    small = operation in ("linear", "linear_weight_gradient", "batchnorm_statistics", "batchnorm_parameter_gradient")
    assert first.dtype == (np.float32 if small else BF16)


def check_pairs(ops, xp, shape, seed, rounds=True):
    """The 3N batch is rounded (or never stored), then all is that of relu_hamming; contracting rounds once more."""
    g, alpha = np.random.default_rng(seed), 8.0
    u, v = (rounded(g.standard_normal(shape)).astype(BF16) for _ in range(2))
    dy = rounded(g.standard_normal((3 * shape[0], *shape[1:]))).astype(BF16)
    weight = g.standard_normal(shape[0]).astype(np.float32)
    z = reference.expand_pair(u.astype(np.float32), v.astype(np.float32))
    z = exact(rounded(z) if rounds else z)
    y, squares = ops.relu_hamming_pair(xp.asarray(u), xp.asarray(v), alpha)
    expected_y, expected_squares = reference.relu_hamming(z, alpha)
    bound = 0 * expected_y, TOLERANCE * 4 * z[0].size + 0 * expected_squares
    check((y, squares), (expected_y, expected_squares), bound, "y")
    found = ops.relu_hamming_pair_backward(*(xp.asarray(a) for a in (dy, u, v)), alpha, xp.asarray(weight))
    dz = reference.relu_hamming_backward(exact(dy), z, alpha, exact(weight))
    tanh_error = TOLERANCE * 4 * np.abs(exact(weight)).reshape(-1, *[1] * (z.ndim - 1))
    size = ROUNDING * np.abs(reference.contract_pair(np.abs(dz))[0]) + tanh_error
    check(found, reference.contract_pair(dz), (size, size), "du, dv", BF16)


def conv_arguments(g, case):
    x, w = rounded(g.standard_normal(case[0])), rounded(g.standard_normal(case[1]))
    b = g.standard_normal(case[1][3]).astype(np.float32)
    dy = rounded(g.standard_normal(reference.conv2d_shape(*case)))
    return x, w, b, dy


def check_convolutions(ops, xp, g, x_shape, w_shape, stride, padding):
    """y and dx, with and without something added, dw and db of a convolution, in bfloat16, against the reference."""
    x, w, b, dy = conv_arguments(g, (x_shape, w_shape, stride, padding))
    plus, plus_dx = (rounded(g.standard_normal(shape)) for shape in (dy.shape, x_shape))
    x_, dy_, plus_, plus_dx_ = (xp.asarray(a.astype(BF16)) for a in (x, dy, plus, plus_dx))
    w_, b_ = xp.asarray(w), xp.asarray(b)
    window, numbers = (stride, padding), [a.astype(np.float64) for a in (x, w, b, dy)]

    def expected(function, *args):
        sizes = function(*[np.abs(a) if isinstance(a, np.ndarray) else a for a in args])
        return function(*args), tuple(TOLERANCE * s for s in as_tuple(sizes))

    x64, w64, b64, dy64 = numbers
    plus64, plus_dx64 = exact(plus), exact(plus_dx)
    check(ops.conv2d(x_, w_, b_, *window), *expected(reference.conv2d, x64, w64, b64, *window), "y", BF16)
    found = ops.conv2d(x_, w_, None, *window, plus_)
    check(found, *expected(reference.conv2d, x64, w64, None, *window, plus64), "y + plus", BF16)
    found = ops.conv2d_input_gradient(dy_, w_, *window, x_shape)
    check(found, *expected(reference.conv2d_input_gradient, dy64, w64, *window, x_shape), "dx", BF16)
    found = ops.conv2d_input_gradient(dy_, w_, *window, x_shape, plus_dx_)
    check(found, *expected(reference.conv2d_input_gradient, dy64, w64, *window, x_shape, plus_dx64), "dx + plus", BF16)
    found = ops.conv2d_weight_gradient(x_, dy_, w_shape, *window)
    check(found, *expected(reference.conv2d_weight_gradient, x64, dy64, w_shape, *window), "dw, db", np.float32)
    again = ops.conv2d_weight_gradient(x_, dy_, w_shape, *window)
    np.testing.assert_array_equal(to_numpy(found[0]), to_numpy(again[0]), err_msg="the same call gives other bits")


def check_casts(ops, xp, rng, size):
    """To bfloat16 and back: to nearest, ties to even; NaN and infinity stay."""
    x = rng.standard_normal(size).astype(np.float32) * 10.0 ** rng.integers(-30, 30, size)
    x = np.concatenate([x, [0, -0.0, np.nan, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3e38]]).astype(np.float32)
    narrow = ops.cast(xp.asarray(x), BF16)
    assert narrow.dtype == BF16
    np.testing.assert_array_equal(to_numpy(narrow).astype(np.float32), rounded(x))
    wide = ops.cast(narrow, np.float32)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(to_numpy(wide), rounded(x))


NETWORKS = [
    ((2, 9, 8, 3), (3, 3, 3, 64), 1, ALL_ROUND),  # the first layer: 3 channels become 8
    ((3, 8, 8, 64), (3, 3, 64, 64), 1, ALL_ROUND),  # TALL weight gradient, two blocks of pixels
    ((2, 9, 7, 64), (3, 3, 64, 128), 2, ALL_ROUND),  # stride 2, odd sizes: phases of unequal size
    ((2, 8, 8, 64), (1, 1, 64, 128), 2, (0, 0, 0, 0)),  # a shortcut: three phases of dx are zero
    ((1, 4, 4, 136), (3, 3, 136, 136), 1, ALL_ROUND),  # two tiles of channels, the second nearly empty
    ((2, 8, 8, 16), (5, 5, 16, 32), 2, (1, 2, 1, 2)),  # small_cnn's
]


def check_batchnorm_relu(ops, xp, rng, shape, dtype, hamming):
    """Equal to the steps one after another; 264 and 2056 channels are beyond what the kernels take in some dtypes."""
    x, c, alpha = rounded(rng.standard_normal(shape) * 2 + 1).astype(dtype), shape[-1], 8.0
    gamma, beta = (rng.standard_normal(c).astype(np.float32) for _ in range(2))
    mean, var = (a.astype(np.float32) for a in reference.batchnorm_statistics(exact(x)))
    inv_std = ((var + 1e-5) ** -0.5).astype(np.float32)
    dy, weight = rounded(rng.standard_normal(shape)).astype(dtype), rng.standard_normal(shape[0] // 3).astype("f4")
    normal = (x, gamma, beta, mean, inv_std)
    on = [xp.asarray(a) for a in normal]
    x64, *normal64 = (exact(a) for a in normal)
    z = reference.batchnorm(x64, *normal64)
    size = np.abs(x64 - mean) * np.abs(inv_std * gamma) + np.abs(beta)
    # tanh's argument is off by TOLERANCE alpha |z|, and x (1 - tanh(x)^2) < 1/2: that is half of TOLERANCE in tanh.
    slack = np.abs(exact(weight)).reshape(-1, 1, 1, 1) * 12 * TOLERANCE * alpha if hamming else 0
    slack = np.concatenate([0 * slack, slack, slack]) if hamming else 0
    if hamming:
        y, squares = ops.batchnorm_relu_hamming(*on, alpha)
        expected, expected_squares = reference.relu_hamming(z, alpha)
        bound = 8 * TOLERANCE * (1 + 0 * squares) * x[0].size
        check((y, squares), (expected, expected_squares), (TOLERANCE * size, to_numpy(bound)), "y, squares")
        dz = reference.relu_hamming_backward(exact(dy), z, alpha, exact(weight))
    else:
        y = ops.batchnorm_relu(*on)
        check(y, reference.relu(z), TOLERANCE * size, "y")
        dz = reference.relu_backward(exact(dy), z)
    assert y.dtype == x.dtype
    extra = (alpha, xp.asarray(weight)) if hamming else ()
    found = ops.batchnorm_relu_backward(xp.asarray(dy), *on, *extra)
    d_slack = TOLERANCE * np.abs(dz) + slack
    x_hat = np.abs(x64 - mean) * inv_std
    dgamma, dbeta = reference.batchnorm_parameter_gradient(dz, x64, normal64[2], normal64[3])
    of_gamma, of_beta = (d_slack * x_hat).sum((0, 1, 2)), (d_slack + 0 * x_hat).sum((0, 1, 2))
    of_gamma = of_gamma + TOLERANCE * (np.abs(dz) * np.abs(inv_std) * (np.abs(x64) + np.abs(mean))).sum((0, 1, 2))
    check(found[1:], (dgamma, dbeta), (of_gamma, of_beta), "dgamma, dbeta", np.float32)
    dx = reference.batchnorm_backward(dz, x64, normal64[0], normal64[2], normal64[3], dgamma, dbeta)
    m = x64.size / c
    of_dx = d_slack + (x_hat * of_gamma + of_beta) / m + TOLERANCE * (x_hat * np.abs(dgamma) + np.abs(dbeta)) / m
    of_dx = of_dx * np.abs(gamma * inv_std)
    check(found[0], dx, of_dx, "dx")
    plus = rounded(rng.standard_normal(shape)).astype(dtype)
    found = ops.batchnorm_relu_backward(xp.asarray(dy), *on, *(extra or (None, None)), xp.asarray(plus))
    check(found[0], dx + exact(plus), of_dx + TOLERANCE * np.abs(exact(plus)), "dx + plus", x.dtype)
    into = tuple(xp.ones(c, np.float32) for _ in range(2))  # and with constants for statistics
    arguments = (xp.asarray(dy), *on, *(extra or (None, None)), xp.asarray(plus), False)
    constant, *nothing = ops.batchnorm_relu_backward(*arguments)
    assert nothing == [None, None]
    found = ops.batchnorm_relu_backward(*arguments, into)
    np.testing.assert_array_equal(exact(to_numpy(constant)), exact(to_numpy(found[0])))
    bound = d_slack * np.abs(gamma * inv_std) + TOLERANCE * np.abs(exact(plus))
    check(constant, dz * exact(gamma * inv_std) + exact(plus), bound, "dx + plus, evaluation", x.dtype)
    bounds = of_gamma + 1e-6 * (1 + np.abs(dgamma)), of_beta + 1e-6 * (1 + np.abs(dbeta))
    check(into, (1 + dgamma, 1 + dbeta), bounds, "what was added", np.float32)
