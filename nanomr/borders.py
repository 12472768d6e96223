"""What a public call takes is checked once, where it enters: behind these borders kernels index freely.

Every check raises a ValueError that names who was called, what it takes and what it got. None reads a number that is on
a device, which would wait for it.
"""

import operator

import numpy as np

from .backend import array_module

# (found, wanted): dtypes that may meet though they differ. Pictures are bfloat16 where weights, logits and what comes
# back from them are float32; a complex step goes through float64; weights narrower than pictures lose nothing.
BFLOAT16 = {("bfloat16", "float32")}
MIXED = {("float32", "bfloat16"), ("complex128", "float64"), ("float64", "complex128")}
WEIGHTS = BFLOAT16 | MIXED | {("float64", "float32"), ("complex128", "float32")}


def whole(who: str, name: str, value, least: int = 1) -> int:
    """``value`` as an int, if it is a whole number from ``least`` on."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{who} takes a whole number from {least} on as {name}, not {value!r}")
    return number


def four_sides(who: str, padding) -> tuple:
    """``padding``, one number from 0 on or (top, bottom, left, right), as four."""
    sides = padding if isinstance(padding, tuple | list) else (padding,) * 4
    if len(sides) != 4:
        raise ValueError(f"{who} takes one number of padding, or (top, bottom, left, right), not {padding!r}")
    return tuple(whole(who, "padding", side, 0) for side in sides)


def check(who, name: str, x, shape: tuple, dtype=None, mixed=MIXED) -> None:
    """``x`` must be an array of floats of this shape, and of this dtype or one that may be ``mixed`` with it.

    ``shape``: numbers, letters where any size from 1 on will do, and perhaps ... in the first place.
    """
    found, kind = getattr(x, "shape", None), getattr(x, "dtype", None)
    fits = found == shape or (isinstance(found, tuple) and _fits(found, shape))
    if fits and (kind is dtype or _meets(kind, dtype, mixed)):
        return
    takes = ", ".join("..." if size is ... else str(size) for size in shape)
    takes = f"({takes}{',' * (len(shape) == 1)}) {'floats' if dtype is None else dtype}"
    got = type(x).__name__ if found is None or kind is None else f"{tuple(found)} {kind}"
    raise ValueError(f"{who} takes {name} {takes}, not {got}{': nothing may be empty' if found and 0 in found else ''}")


def _fits(found, shape):
    if shape and shape[0] is ...:
        if 0 in found or len(found) < len(shape):
            return False
        return len(shape) == 1 or _fits(found[1 - len(shape) :], shape[1:])
    if len(found) != len(shape):
        return False
    for size, wanted in zip(found, shape, strict=True):
        if size != wanted and (size < 1 or not isinstance(wanted, str)):
            return False
    return True


def _meets(kind, dtype, mixed):
    if dtype is None:
        return getattr(kind, "kind", None) in ("f", "c") or getattr(kind, "name", None) == "bfloat16"
    return kind is not None and (kind == dtype or (getattr(kind, "name", None), np.dtype(dtype).name) in mixed)


def check_plus(who, plus, shape: tuple, dtype) -> None:
    """``plus``, None or what is to be added to a result of this shape."""
    if plus is not None:
        check(who, "plus", plus, shape, dtype)


def check_triple(who, x) -> None:
    """``x`` must be a 3N batch [x; x + rho; x - rho], or a gradient of one: its rows are cut in three."""
    check(who, "[x; x + rho; x - rho]", x, (...,))
    if len(x) % 3:
        raise ValueError(f"{who} takes [x; x + rho; x - rho], 3N rows, not {len(x)}")


def check_labels(labels, n: int, classes: int | None = None):
    """``labels``, an array or a list, as an array: (``n``,) whole numbers, each in [0, classes)."""
    labels = labels if hasattr(labels, "dtype") else np.asarray(labels)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or n == 0:
        takes = f"({n},) whole numbers" if n else "at least one image"
        raise ValueError(f"labels must be {takes}, one for each image, not {labels.shape} {labels.dtype}")
    if array_module(labels) is np:  # on a device a look would wait: there labels are checked before they enter
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            end = "on" if classes is None else f"to {classes - 1}, one of the {classes} classes"
            raise ValueError(f"labels must be from 0 {end}, not {low if low < 0 else high}")
    return labels
