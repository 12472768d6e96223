"""The kernels. Three modules offer the same functions with the same signatures:

- ``reference``: the formula of the derivation page in plain NumPy, any dtype (float64, complex); the oracle
- ``cpu``: float32 and bfloat16 on the CPU, Numba kernels
- ``gpu``: CuPy

The data decides which one runs: see :func:`ops_for`.
"""

import functools
import importlib

import numpy as np

from . import reference


def bfloat16() -> np.dtype:
    """The dtype; NumPy and CuPy know it through the package ml_dtypes."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


@functools.cache
def _kernels(name: str):
    """The module ``cpu`` or ``gpu``, imported when it is first used."""
    return importlib.import_module(f".{name}", __name__)


def ops_for(x):
    """The module for ``x``: ``gpu`` for CuPy arrays, ``cpu`` for NumPy's float32 and bfloat16, else ``reference``."""
    if not isinstance(x, np.ndarray):
        return _kernels("gpu")
    return _kernels("cpu") if x.dtype == np.float32 or x.dtype.name == "bfloat16" else reference
