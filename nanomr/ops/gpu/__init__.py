"""CuPy, and our own kernels. The same functions as ``reference``; the kernels are in ``kernels/*.cu``, docs/gpu.md.

The data decides. bfloat16 pictures (``precision="bf16"``) go through our kernels, convolutions on tensor cores; what
belongs to channels or weights (statistics, gradients of parameters, logits) is float32. float32 pictures use our
kernels for all that only moves numbers, and im2col with a matrix product (cuBLAS) for convolutions: simple, any shape,
the oracle of the others. Everything else (float64) takes ``reference``'s formulas, as do NumPy arrays.

``conv``, ``normalization``, ``elementwise`` and ``training`` launch one file of kernels each, by way of ``cuda``.
Nothing imports CuPy before a kernel is launched on a CuPy array.
"""

from contextlib import contextmanager

import numpy as np

from ..reference import conv2d_shape, linf_bounds, linf_step, plane_step  # noqa: F401  (the steps of attacks: as they are)
from .conv import (  # noqa: F401  (offered from here)
    conv2d,
    conv2d_dw,
    conv2d_input_gradient,
    conv2d_weight_gradient,
    conv_plan,
)
from .cuda import bfloat16  # noqa: F401
from .elementwise import (  # noqa: F401
    add,
    average_pool,
    average_pool_backward,
    cast,
    contract_pair,
    expand_pair,
)
from .normalization import (  # noqa: F401
    batchnorm,
    batchnorm_backward,
    batchnorm_parameter_gradient,
    batchnorm_relu,
    batchnorm_relu_backward,
    batchnorm_relu_hamming,
    batchnorm_statistics,
    normalize,
    relu,
    relu_backward,
    relu_hamming,
    relu_hamming_backward,
    relu_hamming_pair,
    relu_hamming_pair_backward,
    scale_channels,
)
from .training import (  # noqa: F401
    begin_step,
    corners,
    crop_flip,
    draw_augmentation,
    draw_corners,
    end_step,
    linear,
    linear_input_gradient,
    linear_weight_gradient,
    losses,
    norm,
    sgd_update,
)


def set_tf32(on: bool) -> None:
    """Whether cuBLAS may round float32 factors to TF32 (10 bits of fraction) for its tensor cores. Needs a GPU.

    A setting of the whole process, which the variable CUPY_TF32 may have made: programs switch it off when they begin,
    and on for as long as :func:`tf32` lasts."""
    from cupy import _core
    from cupy._core import _routines_linalg as types

    _core.set_compute_type(np.float32, types.COMPUTE_TYPE_TF32 if on else types.COMPUTE_TYPE_DEFAULT)


@contextmanager
def tf32():
    """In TF32 within it, and not behind it, whatever happens. Decorates functions, too."""
    set_tf32(True)
    try:
        yield
    finally:
        set_tf32(False)
