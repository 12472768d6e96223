"""CuPy, and our own kernels. The same functions as ``reference``; the kernels are in ``kernels/*.cu``, docs/gpu.md.

The data decides. bfloat16 pictures (``precision="bf16"``) go through our kernels, convolutions on tensor cores; what
belongs to channels or weights (statistics, gradients of parameters, logits) is float32. float32 pictures use our
kernels for all that only moves numbers, and im2col with a matrix product (cuBLAS) for convolutions: simple, any shape,
the oracle of the others. Everything else (float64) takes ``reference``'s formulas, as do NumPy arrays.

``conv``, ``normalization``, ``elementwise`` and ``training`` launch one file of kernels each, by way of ``cuda``.
Nothing imports CuPy before a kernel is launched on a CuPy array. A function whose kernels fail on this device can be
replaced by ``plain``'s, or left out: :func:`replace`; ``selftest`` finds out which.
"""

from contextlib import contextmanager

import numpy as np

from .. import bfloat16  # noqa: F401  (offered from here)
from ..reference import (  # noqa: F401  (as they are)
    adamw_update,
    chord,
    chord_backward,
    conv2d_shape,
    l1_step,
    l2_step,
    lines_corner,
    lines_down,
    lines_reach,
    lines_up,
    linf_bounds,
    linf_step,
    plane_step,
    scale_down,
    scale_up,
)
from . import plain
from .conv import (  # noqa: F401
    conv2d,
    conv2d_dw,
    conv2d_input_gradient,
    conv2d_weight_gradient,
    conv_plan,
    tiles_in_use,
    use_tiles,
)
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
    batchnorm_training,
    normalize,
    relu,
    relu_backward,
    relu_hamming,
    relu_hamming_backward,
    relu_hamming_pair,
    relu_hamming_pair_backward,
    scale_channels,
)
from .plain import (  # noqa: F401
    batchnorm_relu_box,
    batchnorm_relu_box_backward,
    box_around,
    box_sums,
    relu_box,
    relu_box_backward,
    rivals_gain,
    rivals_gain_backward,
    times_sign,
)
from .training import (  # noqa: F401
    begin_step,
    corners,
    crop_flip,
    draw_augmentation,
    draw_corners,
    end_step,
    hamming_norms,
    hamming_weight,
    linear,
    linear_input_gradient,
    linear_weight_gradient,
    losses,
    norm,
    sgd_update,
)

# What launches kernels of ours. ``plain`` has the same functions but for those that a CPU does not have either: layers
# and losses know what to do without.
OPTIONAL = ("batchnorm_training", "conv2d_dw", "hamming_norms", "hamming_weight", "losses")
OWN = {
    name: function
    for name, function in list(globals().items())
    if hasattr(plain, name) or name in OPTIONAL
    if getattr(function, "__module__", "").startswith(__name__ + ".")
}
replaced: tuple[str, ...] = ()  # those that are not in use, and "graph" where CUDA graphs are not


def replace(names=()):
    """Let these functions of ``OWN`` be ``plain``'s, or missing where it has none, and all others our own."""
    global replaced
    replaced = tuple(names)
    for name, own in OWN.items():
        function = getattr(plain, name, None) if name in names else own
        if function:
            globals()[name] = function
        else:
            globals().pop(name, None)


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
