"""How Numba compiles every kernel of the package; and whether there is a place to keep what it has compiled."""

import multiprocessing
import warnings

from numba import njit

from ...compiling import keep


def _can_cache() -> bool:
    """Does Numba find a folder for its cache: $NUMBA_CACHE_DIR, ``__pycache__`` here, or the user's own?"""
    try:
        njit(cache=True)(_can_cache)  # looks for the folder; compiles nothing
    except RuntimeError:
        if multiprocessing.parent_process():
            return False  # a worker: it was said
        warnings.warn(
            "kernels are compiled again in every process, for seconds to a minute: neither the installation nor a home "
            "folder can be written to; NUMBA_CACHE_DIR may name a folder that can",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


# Sums may be reordered, but NaN and infinity stay what they are; a division by zero makes them, as in NumPy (to look
# for one would keep a loop from becoming vectors).
FLAGS = dict(fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy", cache=_can_cache())
EXACT = {**FLAGS, "fastmath": False}  # where the last bit counts, or the inverse of a divisor may be infinite


def kernel(**options):
    """A decorator: numba.njit with ``options``, FLAGS or EXACT among them; what it compiles is kept by
    :func:`nanomr.compiling.keep`."""
    return lambda function: keep(njit(**options)(function))
