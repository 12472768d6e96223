"""The kernels. Three modules offer the same functions with the same signatures:

- ``reference``: the formula of the derivation page in plain NumPy, any dtype (float64, complex); the oracle
- ``cpu``: float32 on the CPU, Numba kernels
- ``gpu``: CuPy

The data decides which one runs: see :func:`ops_for`.
"""

import numpy as np

from . import reference


def ops_for(x):
    """The module that computes on ``x``: ``gpu`` for CuPy arrays, ``cpu`` for NumPy float32, else ``reference``."""
    if not isinstance(x, np.ndarray):
        from . import gpu

        return gpu
    if x.dtype == np.float32:
        from . import cpu

        return cpu
    return reference
