"""float32 on the CPU: Numba kernels. The same functions as ``reference``, which is their oracle.

``gather_gemm``: convolutions and linear layers. ``elementwise``, ``attacks``, ``training``: what touches each number
once. ``simd``: vectors in registers. ``memory``: recycled arrays.
"""

from ..reference import (  # noqa: F401  (offered from here)
    average_pool,
    average_pool_backward,
    batchnorm,
    batchnorm_backward,
    batchnorm_parameter_gradient,
    batchnorm_statistics,
    scale_channels,
)
from .attacks import linf_bounds, linf_step, plane_step  # noqa: F401
from .elementwise import (  # noqa: F401
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
from .gather_gemm import (  # noqa: F401
    conv2d,
    conv2d_input_gradient,
    conv2d_shape,
    conv2d_weight_gradient,
    linear,
    linear_input_gradient,
    linear_weight_gradient,
)
from .memory import release  # noqa: F401
from .training import corners, crop_flip, sgd_update  # noqa: F401
