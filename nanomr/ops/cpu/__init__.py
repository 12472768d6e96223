"""The CPU: Numba kernels for float32 and bfloat16. The same functions as ``reference``, which is their oracle.

``convolution``: which kernel a convolution gets. ``gather_gemm``: the sum behind all layers, and the linear ones;
``amx``: the same by tiles; ``winograd``, ``winograd_strided``: with fewer multiplications. ``normalization``: batch
norm and the ReLU behind it. ``elementwise``, ``boxes``, ``lines``, ``attacks``, ``training``: what touches each number
once. ``simd``: vectors, kept in registers. ``memory``: recycled arrays.

bfloat16 is the dtype of pictures alone: weights, statistics, sums, logits and gradients of parameters are float32.
"""

from .attacks import l1_step, l2_step, linf_bounds, linf_step, plane_step  # noqa: F401  (offered from here)
from .boxes import (  # noqa: F401
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
from .convolution import (  # noqa: F401
    conv2d,
    conv2d_input_gradient,
    conv2d_shape,
    conv2d_weight_gradient,
    kernel,
)
from .elementwise import (  # noqa: F401
    average_pool,
    average_pool_backward,
    cast,
    contract_pair,
    expand_pair,
    normalize,
    relu,
    relu_backward,
    relu_hamming,
    relu_hamming_backward,
    relu_hamming_pair,
    relu_hamming_pair_backward,
)
from .gather_gemm import linear, linear_input_gradient, linear_weight_gradient  # noqa: F401
from .lines import (  # noqa: F401
    chord,
    chord_backward,
    lines_corner,
    lines_down,
    lines_reach,
    lines_up,
    scale_down,
    scale_up,
)
from .memory import release  # noqa: F401
from .normalization import (  # noqa: F401
    batchnorm,
    batchnorm_backward,
    batchnorm_parameter_gradient,
    batchnorm_relu,
    batchnorm_relu_backward,
    batchnorm_relu_hamming,
    batchnorm_statistics,
    scale_channels,
)
from .training import adamw_update, corners, crop_flip, norm, sgd_update  # noqa: F401
