"""Checks a verifier's results without trusting it: rigorous bounds, rounding errors included.

Nothing here is shared with the verifier: the network becomes sparse matrices (``network.py``), and a
proof is a tree of cases with numbers (slopes, multipliers) of which *any* valid choice gives true bounds. So backward
passes in float64, minus bounds on their own rounding errors, decide. ``docs/soundness.md`` derives every term.
``results.py`` holds what a run claims to it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, issparse

from .boxes import bound_of_parts
from .network import U32, U64, CertificateError, Map, Network, demand, gamma

TINY = 1e-200  # far more than all underflow together, as no activation exceeds LARGEST
LARGEST = 1e30  # of an activation
ROWS = 512  # carried back at once
TREE = {"units": "i", "parent": "i", "split": "i", "multipliers": "f", "limit": "f"}  # arrays, and their kinds
LINES = {"signs": "i", "values": "f"}  # of a tree whose nodes have slopes and betas
PROGRAMS = {  # of one whose nodes have the multipliers of a linear program
    "below": "f", "chord": "f", "weights": "f", "cut_unit": "i", "cut_start": "i", "cut_index": "i", "cut_value": "f"
}  # fmt: skip
LEMMAS = {  # of either, before it: trees about single ReLUs, one after another
    "side": "i", "sizes": "i", "units": "i", "parent": "i", "split": "i", "signs": "i", "values": "f"
}  # fmt: skip


# --- rigorous bounds --------------------------------------------------------------------------------------------------


class Lines(NamedTuple):
    """lower z <= relu(z) <= upper z + offset; ``force`` is added to the coefficients of z."""

    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray
    force: np.ndarray


class Reach(NamedTuple):
    """What a map's input can be in the box, and what its rounding errors are a share of."""

    low: np.ndarray  # before the ReLU
    high: np.ndarray
    largest: np.ndarray  # the largest |x|, behind the ReLU
    size: np.ndarray  # |weight| largest + |bias|
    lines: Lines | None


def _lines(low, high) -> Lines:
    """The triangle's chord above each unstable ReLU, and 0 or z below it, whichever is nearer."""
    unstable = (low < 0) & (high > 0)
    upper = np.where(unstable, np.clip(high / np.where(unstable, high - low, 1), 0, 1), low >= 0)
    offset = np.where(unstable, np.maximum(-upper * low, (1 - upper) * high) * (1 + 1e-15) + TINY, 0)
    return Lines(np.where(unstable, high > -low, upper).astype(float), upper, offset, np.zeros(len(low)))


def _linear(network: Network, reached: list[Reach], a):
    """(c, k): c . x + k is below the rows ``a`` (S, units), dense or sparse, times the output of the map
    ``len(reached) - 1``, for all images x of the box that the lines hold for. k has paid for all rounding errors, and
    for those of the sum of c . x at the box's worst corner."""
    value, charge = np.zeros(a.shape[0]), np.zeros(a.shape[0])
    for m, r in zip(reversed(network.maps[: len(reached)]), reversed(reached), strict=True):
        value += a @ m.bias
        charge += abs(a) @ r.size
        a = a @ m.weight
        if issparse(a) and 4 * a.nnz > math.prod(a.shape):
            a = a.toarray()
        if m.relu:
            line = r.lines
            value += 0.5 * ((a - abs(a)) @ line.offset)
            if issparse(a):  # a force comes with dense rows only
                a.data *= np.where(a.data > 0, line.lower[a.indices], line.upper[a.indices])
            else:
                a = a * np.where(a > 0, line.lower, line.upper) + line.force
    return a, value - network.slack * charge - TINY


def _least(box: Reach, c):
    """The minimum of c . x over the box of images."""
    return 0.5 * (c @ (box.low + box.high) - abs(c) @ (box.high - box.low))


def lower(network: Network, reached: list[Reach], a):
    """Lower bounds of the rows ``a`` (S, units), dense or sparse, times the output of the map ``len(reached) - 1``."""
    c, k = _linear(network, reached, a)
    return k + _least(reached[0], c)


def _both(at, width: int):
    """The rows of z[at], and those of -z[at], for a z of that width."""
    n = np.arange(2 * len(at))
    return csr_array((np.where(n < len(at), 1.0, -1.0), (n, np.tile(at, 2))), (len(n), width))


def reach(network: Network, low, high, known: list[Reach] | None = None, lemmas=()) -> list[Reach]:
    """What every map's input can be, for images in [low, high] (flat): intervals, or what is ``known``; CROWN where
    these leave a ReLU unstable; and what ``lemmas`` prove, which helps CROWN in later layers."""
    reached: list[Reach] = []
    for m in network.maps:
        lines, x_low, x_high = None, low, high
        if m.relu:
            if known:  # no intervals anew: the verifier has none, and the slopes of CROWN's lines hang on every bound
                low, high = known[len(reached)].low.copy(), known[len(reached)].high.copy()
            if any(r.lines for r in reached):  # else the intervals are exact
                unstable = np.flatnonzero((low < 0) & (high > 0))
                for first in range(0, len(unstable), ROWS // 2):
                    at = unstable[first : first + ROWS // 2]
                    bound = lower(network, reached, _both(at, len(low)))
                    low[at] = np.maximum(low[at], bound[: len(at)])
                    high[at] = np.minimum(high[at], -bound[len(at) :])
            _draw_in(network, reached, low, high, lemmas)
            lines = _lines(low, high)
            x_low, x_high = np.maximum(low, 0), np.maximum(high, 0)
        largest = np.maximum(abs(x_low), abs(x_high))
        size = m.absolute @ largest + m.size
        demand((size < LARGEST).all(), "an activation may be NaN or too large for float32")
        reached.append(Reach(low, high, largest, size, lines))
        middle = m.weight @ (0.5 * (x_low + x_high)) + m.bias
        width = m.absolute @ (0.5 * (x_high - x_low)) + network.slack * size + TINY
        low, high = middle - width, middle + width
    return reached


def _image_box(image, eps: float):
    """(low, high), flat: every image in [0, 1] within eps of this one, and those that float32 counts as such."""
    x, e = image.astype(np.float64), np.float32(eps)
    low = np.minimum(np.nextafter(x - eps, -np.inf), image - e)
    high = np.maximum(np.nextafter(x + eps, np.inf), image + e)
    return np.maximum(low, 0).ravel(), np.minimum(high, 1).ravel()


# --- proofs -----------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """For each rival: margin >= bound in real arithmetic; |its float32 value - the real one| <= float32_error."""

    bound: dict[int, float]
    float32_error: dict[int, float]


def check_image(network: Network, image, label: int, eps: float, proofs: Mapping[int, Mapping] | None = None):
    """Checked: what is certain of logit[label] - logit[rival] for all images in [0, 1] within eps of ``image``.

    image (H, W, C) float32 in [0, 1]. proofs: for each rival that needs more than CROWN, a tree: arrays ``units``
    (U,), ``parent`` and ``split`` (N,), ``signs`` and ``values`` (B, U), ``multipliers`` (R, 2, U) and ``limit`` (1,),
    see ``docs/soundness.md``. Raises CertificateError for a proof that is not one. A NaN bound proves nothing: compare
    with ``bound > threshold``.
    """
    demand(math.isfinite(eps) and eps >= 0, f"eps must be a finite number >= 0, not {eps}")
    rivals, rows = margins(network, image, label)
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are refused, or prove nothing
        reached = reach(network, *_image_box(image, eps))
        bound = dict(zip(rivals, lower(network, reached, rows).tolist(), strict=True))
        for rival, proof in (proofs or {}).items():
            demand(rival in bound, f"a proof for the rival {rival}, which is none")
            try:
                known, tree = _with_lemmas(network, reached, proof)
                bound[rival] = max(bound[rival], _replay(network, known, rows[[rivals.index(rival)]], tree))
            except CertificateError as error:
                raise CertificateError(f"rival {rival}: {error}") from None
        error = _deployed_error(network, reached, rows)
    return Checked(bound, dict(zip(rivals, error.tolist(), strict=True)))


class CheckedCase(NamedTuple):
    """Everywhere in the box some row is >= bound in real arithmetic, and > bound - float32_error in float32's."""

    bound: float
    float32_error: float


def check_case(network: Network, low, high, rows, offsets, proof: Mapping | None = None, row: int | None = None):
    """CheckedCase: what is certain of rows . logits + offsets for all images in [low, high]; above 0, the case "every
    row <= 0" is excluded.

    low, high: float64, as many numbers as the network has inputs, in NHWC order; rows (M, classes), offsets (M,).
    proof: none where CROWN is one; the arrays of a tree (:func:`check_image`) of the ``row`` that it is about, its
    ``limit`` without the offset; or those of a tree of boxes, about any rows. Raises CertificateError for a box or
    rows that are none, and for a proof that is not one. A NaN bound proves nothing: compare with ``bound > 0``.
    """
    low, high, rows, offsets = (np.array(v, np.float64) for v in (low, high, rows, offsets))
    inputs, classes = math.prod(network.input_shape), len(network.maps[-1].bias)
    demand(low.size == high.size == inputs, f"a box must have {inputs} inputs, not {low.size} and {high.size}")
    low, high = low.ravel(), high.ravel()
    fine = (low <= high).all() and np.isfinite(low).all() and np.isfinite(high).all()
    demand(fine, "the box is empty or not finite")
    fits = rows.ndim == 2 and rows.shape[1] == classes and offsets.shape == (len(rows),) and len(rows)
    demand(fits, f"rows {rows.shape} and offsets {offsets.shape} do not fit {classes} outputs")
    demand(np.isfinite(rows).all() and np.isfinite(offsets).all(), "a row or an offset is not finite")
    demand(row is None or (type(row) is int and 0 <= row < len(rows)), f"there is no row {row}")
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are refused, or prove nothing
        reached = reach(network, low.copy(), high.copy())
        error = _deployed_error(network, reached, rows)
        if proof and "cut" in proof:
            with_rows = _with_rows(network, rows, offsets)
            bound = bound_of_parts(with_rows, reach(with_rows, low.copy(), high.copy()), proof)
            return CheckedCase(bound, float(error.max()))
        bounds = lower(network, reached, rows)
        if proof:
            demand(row is not None, "a tree must say of which row it is")
            known, tree = _with_lemmas(network, reached, proof)
            bounds[row] = max(bounds[row], _replay(network, known, rows[[row]], tree))
        bounds = np.nextafter(bounds + offsets, -np.inf)
        best = row if row is not None else int(np.nan_to_num(bounds - error, nan=-np.inf).argmax())
    return CheckedCase(float(bounds[best]), float(error[best]))


def _with_rows(network: Network, rows, offsets) -> Network:
    """The network whose outputs are rows . logits + offsets."""
    weight = csr_array(rows)
    maps = [*network.maps, Map(False, weight, abs(weight), offsets, abs(offsets), 0)]
    n = max(max(m.weight.shape) for m in maps) + 16 * len(maps)
    return network._replace(maps=maps, slack=8 * gamma(n, U64))


def margins(network: Network, image, label: int):
    """(rivals, rows (rivals, classes)): row . logits = logit[label] - logit[rival]. Checks the image, too."""
    demand(image.shape == network.input_shape and image.dtype == np.float32,
            f"an image must be float32 {network.input_shape}, not {image.dtype} {image.shape}")  # fmt: skip
    demand(((image >= 0) & (image <= 1)).all(), "an image must be in [0, 1]")
    classes = len(network.maps[-1].bias)
    demand(0 <= label < classes, f"there is no class {label}")
    rivals = [t for t in range(classes) if t != label]
    return rivals, np.eye(classes)[label] - np.eye(classes)[rivals]


class Tree(NamedTuple):
    """A tree of cases; node 0 is the root. ``row`` and ``rank`` (N,): which row of the nodes' numbers, and of
    ``multipliers`` (R, 2, U), is a node's: leaves and nodes with a restricted child have the one, restricted nodes the
    other."""

    units: np.ndarray
    parent: np.ndarray
    split: np.ndarray
    multipliers: np.ndarray
    limit: float
    children: list[list[int]]
    row: np.ndarray
    rank: np.ndarray


class Slopes(NamedTuple):
    """The rows (B, U) of beta-CROWN's nodes: signs -1, 0, 1; alpha where the sign is 0, otherwise beta."""

    signs: np.ndarray
    values: np.ndarray


class Programs(NamedTuple):
    """The multipliers of the nodes' linear programs, ``below`` and ``chord`` (B, U), ``weights`` (B, K) of the cuts:

        relu(z[unit]) <= pixels . x + outputs . a + (the least offset for which that holds in a box)

    with x the image, a the units' outputs. fold_pixels . x + fold_outputs . a + fold_constant is below -z[unit]."""

    below: np.ndarray
    chord: np.ndarray
    weights: np.ndarray
    unit: np.ndarray
    pixels: csr_array
    outputs: csr_array
    fold_pixels: np.ndarray
    fold_outputs: np.ndarray
    fold_constant: np.ndarray


def _read_tree(network: Network, reached: list[Reach], proof) -> tuple[Tree, Slopes | Programs]:
    """The proof in these arrays, if it is one."""
    demand("alpha" not in proof, "a list of leaves, as older versions wrote it, is no proof any more: verify again")
    kinds = TREE | (PROGRAMS if "below" in proof else LINES)
    demand(set(proof) == set(kinds), f"a proof must hold {', '.join(kinds)}")
    arrays = {name: np.asarray(proof[name]) for name in kinds}
    wrong = [name for name, kind in kinds.items() if arrays[name].dtype.kind != kind]
    demand(not wrong, f"{', '.join(wrong)}: integers must be integers, and floats floats")
    relus = sum(len(r.low) for r in reached if r.lines)
    units, parent, split = (arrays[name].astype(np.int64) for name in ("units", "parent", "split"))
    multipliers, limit = arrays["multipliers"], arrays["limit"]
    fits = units.ndim == parent.ndim == 1 and parent.shape == split.shape and limit.shape == (1,)
    demand(fits, "the shapes of units, parent, split and limit do not fit")
    demand(((units >= 0) & (units < relus)).all() and ((split >= -relus) & (split <= relus)).all(), "no such ReLU")
    demand(len(np.unique(units)) == len(units), "a ReLU has two columns")
    fine = len(parent) > 0 and parent[0] == -1 and split[0] == 0
    demand(fine and ((parent >= 0) & (parent < np.arange(len(parent))))[1:].all(), "the nodes are not a tree")
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent[1:].tolist(), 1):
        children[above].append(node)
    forks = [sorted(split[nodes].tolist()) for nodes in children]  # none, [0] or [-s, s]
    demand(all(fork in ([], [0]) or (len(fork) == 2 and fork[0] == -fork[1] < 0) for fork in forks),
            "the children of a node do not cover it")  # fmt: skip
    row, rank = np.cumsum([fork in ([], [0]) for fork in forks]) - 1, np.cumsum(split == 0) - 2  # the root: split 0
    demand(multipliers.shape == (rank[-1] + 1, 2, len(units)), "the rows of multipliers do not fit")
    demand(((multipliers >= 0) & np.isfinite(multipliers)).all(), "a multiplier is not a number >= 0")
    demand(rank[-1] < 0 or np.isfinite(limit).all(), "the limit is not a number")
    tree = Tree(units, parent, split, multipliers, float(limit[0]), children, row, rank)
    shape = (row[-1] + 1, len(units))
    if "below" in proof:
        return tree, _read_programs(network, reached, units, shape, arrays)
    signs, values = arrays["signs"], arrays["values"]
    demand(signs.shape == values.shape == shape, "the rows of signs and values do not fit")
    demand(((signs >= -1) & (signs <= 1)).all(), "a sign is not -1, 0 or 1")  # the absolute of int8's least is < 0
    demand(((values >= 0) & np.isfinite(values)).all(), "a slope or a multiplier beta is not a number >= 0")
    demand((values <= 1)[signs == 0].all(), "a slope alpha is above 1")
    return tree, Slopes(signs, values)


def _read_programs(network: Network, reached: list[Reach], units, shape, arrays) -> Programs:
    names = "below", "chord", "weights", "cut_value"
    below, chord, weights, value = (arrays[name].astype(np.float64) for name in names)
    unit, start, index = (arrays[name].astype(np.int64) for name in ("cut_unit", "cut_start", "cut_index"))
    pixels, k = math.prod(network.input_shape), unit.size
    fits = unit.shape == (k,) and start.shape == (k + 1,) and index.shape == value.shape == (index.size,)
    demand(below.shape == chord.shape == shape and weights.shape == (shape[0], k) and fits, "the rows do not fit")
    fine = all(((numbers >= 0) & np.isfinite(numbers)).all() for numbers in (below, chord, weights))
    demand(fine and np.isfinite(value).all(), "a multiplier is not a number >= 0, or a coefficient none")
    demand(((unit >= 0) & (unit < len(units))).all(), "a cut is above no unit")
    fits = start[0] == 0 and start[-1] == len(index) and (start[1:] >= start[:-1]).all()  # a difference may overflow
    demand(fits and ((index >= 0) & (index < pixels + len(units))).all(), "a cut's numbers are of no pixel or unit")
    cuts = csr_array((value, index, start), (k, pixels + len(units)))
    cuts.sum_duplicates()  # what is rounded below is a share of the sum
    fold_pixels, fold_outputs, fold_constant = (np.zeros((k, n)) for n in (pixels, len(units), 1))
    known, first = [], 0
    for r in reached:
        if r.lines:
            here = np.flatnonzero((units[unit] >= first) & (units[unit] < first + len(r.low)))
            for some in np.split(here, range(ROWS, len(here), ROWS)):
                rows = csr_array((np.full(len(some), -1.0), (np.arange(len(some)), units[unit[some]] - first)),
                                 (len(some), len(r.low)))  # fmt: skip
                fold_pixels[some], fold_constant[some, 0], fold_outputs[some] = _fold(network, known, rows, units)
            first += len(r.low)
        known.append(r)
    return Programs(below, chord, weights, unit, cuts[:, :pixels], cuts[:, pixels:], fold_pixels, fold_outputs,
                    fold_constant[:, 0])  # fmt: skip


def _replay(network: Network, reached: list[Reach], row, proof) -> float:
    """A lower bound of row (1, classes) . logits, from the arrays of a proof."""
    low, high = (np.concatenate([[], *(r[side] for r in reached if r.lines)]) for side in (0, 1))
    tree, rows = _read_tree(network, reached, proof)
    bound_of = _bound_by_slopes if isinstance(rows, Slopes) else _bound_by_program
    bound = tree.limit if len(tree.multipliers) else np.inf  # of the images with margin > limit
    stack = [(0, low, high)]
    while stack:
        node, low, high = stack.pop()  # the bounds are the parent's, and the sibling's as well
        above, split, low, high = tree.parent[node], tree.split[node], low.copy(), high.copy()
        if split > 0:
            low[split - 1] = max(low[split - 1], 0)
        elif split < 0:
            high[-split - 1] = min(high[-split - 1], 0)
        elif node > 0:
            c, k = bound_of(network, reached, row, low, high, tree.units, rows, tree.row[above])
            multipliers = tree.multipliers[tree.rank[node]].astype(np.float64)
            _restrict(network, reached, low, high, tree.units, multipliers, c, k, tree.limit)
        stack += [(child, low, high) for child in tree.children[node]]
        if not tree.children[node] and not (low > high).any():  # else no image is left: NaN is not above anything
            c, k = bound_of(network, reached, row, low, high, tree.units, rows, tree.row[node])
            bound = np.minimum(bound, k + _least(reached[0], c))
    return float(bound)


def _bound_by_slopes(network, reached, row, low, high, units, rows: Slopes, i: int):
    """(c (pixels,), k): c . x + k <= row . logits where the ReLUs' inputs are in [low, high], by row i of a proof."""
    signs, values = rows.signs[i], rows.values[i].astype(np.float64)
    demand((low[units] >= 0)[signs > 0].all() and (high[units] <= 0)[signs < 0].all(),
            "a sign is not what the splits and restrictions above it say")  # fmt: skip
    lower, upper, offset, force = lines = np.array(_lines(low, high))
    lower[units] = np.where(signs != 0, signs > 0, values)  # of a stable ReLU, too: alpha z <= relu(z) for every z
    upper[units] = np.where(signs != 0, signs > 0, upper[units])
    offset[units] = np.where(signs != 0, 0, offset[units])
    force[units] = -signs * values
    parts = iter(np.split(lines, np.cumsum([len(r.low) for r in reached if r.lines]), axis=1))
    c, k = _linear(network, [r._replace(lines=Lines(*next(parts))) if r.lines else r for r in reached], row)
    return c[0], k[0]


def _bound_by_program(network, reached, row, low, high, units, rows: Programs, i: int):
    """The same, by the multipliers of a linear program: with z the units' inputs, a their outputs,

        row . logits >= row . logits - below (a - z) - chord (upper z + offset - a) - weights (cut - a)

    Every bracket is >= 0. What is left of a is at least its least in the bounds."""
    lines, a_low, a_high = _lines(low, high), np.maximum(low[units], 0), np.maximum(high[units], 0)
    used = np.flatnonzero(rows.weights[i])
    below, chord, weights = rows.below[i], rows.chord[i], rows.weights[i][used]
    pixels, outputs, x = rows.pixels[used], rows.outputs[used], reached[0]
    slack = network.slack + 8 * gamma(len(used) + len(units) + 16, U64)

    # The least offsets for which the cuts are above 0, and above z, in this box.
    fold = tuple(part[used] for part in (rows.fold_pixels, rows.fold_outputs, rows.fold_constant))
    zero, size = _least_of_both(x, a_low, a_high, pixels, outputs)
    offset = -zero + slack * size + TINY
    input_, size = _least_of_both(x, a_low, a_high, pixels + fold[0], outputs + fold[1])
    size += abs(fold[0]) @ x.largest + abs(fold[1]) @ a_high + abs(fold[2])
    offset = np.maximum(offset, -(input_ + fold[2]) + slack * size + TINY)

    size = abs(pixels) @ x.largest + abs(outputs) @ a_high + abs(offset)
    carried, total = -(weights @ outputs), np.bincount(rows.unit[used], weights, len(units))
    value, charge = -(weights @ offset) - chord @ lines.offset[units], weights @ size + chord @ lines.offset[units]
    upper = total + chord

    def cross(a, first, r, z_size):
        """The coefficients ``a`` (1, n) on the outputs of a layer of ReLUs become those on its inputs."""
        nonlocal value, charge
        inside = np.flatnonzero((units >= first) & (units < first + len(r.low)))
        at, every = units[inside] - first, slice(first, first + len(r.low))
        line = Lines(*(part[every] for part in lines))
        left = a[0, at] + carried[inside] - below[inside] + upper[inside]
        value += np.minimum(left, 0) @ a_high[inside] + np.maximum(left, 0) @ a_low[inside]
        charge += (abs(a[0, at]) + abs(carried[inside]) + below[inside] + upper[inside]) @ a_high[inside]
        charge += (below[inside] + chord[inside]) @ z_size[at]
        a[0, at] = 0
        value += 0.5 * ((a - abs(a)) @ line.offset)[0]
        a = a * np.where(a > 0, line.lower, line.upper)
        a[0, at] = below[inside] - chord[inside] * line.upper[at]
        return a

    a, first = row, len(low)
    for m, r, before in zip(reversed(network.maps), reversed(reached), [*reversed(reached[:-1]), None], strict=True):
        value += (a @ m.bias)[0]
        charge += (abs(a) @ r.size)[0]
        a = a @ m.weight
        if m.relu:
            first -= len(r.low)
            a = cross(a, first, r, before.size)
    return a[0] - weights @ pixels, value - slack * charge - TINY


def _least_of_both(box: Reach, a_low, a_high, pixels, outputs):
    """(the least of pixels . x + outputs . a (K,), its absolute sum): x in the box, a in [a_low, a_high]."""
    size = abs(pixels) @ box.largest + abs(outputs) @ a_high
    of_a = 0.5 * (outputs @ (a_low + a_high) - abs(outputs) @ (a_high - a_low))
    return 0.5 * (pixels @ (box.low + box.high) - abs(pixels) @ (box.high - box.low)) + of_a, size


def _fold(network: Network, reached: list[Reach], a, units):
    """(c, k, q): c . x + q . (the outputs of ``units``) + k is below the rows ``a`` (S, units), times the output of the
    map ``len(reached) - 1``; other ReLUs are between their lines. k has paid for all rounding errors up to here."""
    value, charge, kept = np.zeros(a.shape[0]), np.zeros(a.shape[0]), np.zeros((a.shape[0], len(units)))
    first = sum(len(r.low) for r in reached if r.lines)
    for m, r in zip(reversed(network.maps[: len(reached)]), reversed(reached), strict=True):
        value += a @ m.bias
        charge += abs(a) @ r.size
        a = a @ m.weight
        a = a.toarray() if issparse(a) else a
        if m.relu:
            first -= len(r.low)
            inside = np.flatnonzero((units >= first) & (units < first + len(r.low)))
            kept[:, inside] = a[:, units[inside] - first]
            a[:, units[inside] - first] = 0
            value += 0.5 * ((a - abs(a)) @ r.lines.offset)
            a = a * np.where(a > 0, r.lines.lower, r.lines.upper)
    return a, value - network.slack * charge - TINY, kept


def _restrict(network, reached, low, high, units, multipliers, c, k, limit):
    """Draw low and high in, in place, to what the ReLUs' inputs are at the images with c . x + k <= limit."""
    known, start = [], 0  # what is below the ReLUs in turn
    for r in reached:
        if r.lines:
            at = slice(start, start := start + len(r.low))
            inside = (units >= at.start) & (units < at.stop)
            unstable = np.flatnonzero(inside & (low[units] < 0) & (high[units] > 0))
            for first in range(0, len(unstable), ROWS // 2):
                part = unstable[first : first + ROWS // 2]
                unit, m = units[part], multipliers[:, part].ravel()
                w, v = _linear(network, known, _both(unit - at.start, len(r.low)))
                bound = _least_of_slice(network, reached[0], w, v, m, c, k - limit, abs(k) + abs(limit))
                demand(np.isfinite(bound).all(), "a restriction's bound is not a number")
                low[unit] = np.maximum(low[unit], bound[: len(part)])
                high[unit] = np.minimum(high[unit], -bound[len(part) :])
            r = r._replace(lines=_lines(low[at], high[at]))
        known.append(r)


def _least_of_slice(network, box: Reach, w, v, m, c, gap, size):
    """Lower bounds of w . x + v (S,) at the images x of the box with c . x + gap <= 0, by multipliers m (S,) >= 0.

    ``gap`` is the rounded difference of two numbers whose absolute sum is ``size``.
    """
    bound = _least(box, w + m[:, None] * c) + v + m * gap
    size = abs(v) + m * size + abs(w) @ box.largest + m * (abs(c) @ box.largest)
    return bound - network.slack * size - TINY


# --- lemmas -----------------------------------------------------------------------------------------------------------


class Lemma(NamedTuple):
    """A tree that bounds the input z of the ReLU ``unit`` (its number) from below; with ``sign`` -1, -z."""

    unit: int
    sign: int
    proof: dict[str, np.ndarray]


def _with_lemmas(network: Network, reached: list[Reach], proof) -> tuple[list[Reach], dict]:
    """What is reached by the lemmas of a proof as well, if it has any; and the proof without them."""
    tree = {name: value for name, value in proof.items() if not name.startswith("lemma_")}
    if len(tree) == len(proof):
        return reached, tree
    lemmas = _read_lemmas({name[6:]: value for name, value in proof.items() if name not in tree}, reached)
    return reach(network, reached[0].low.copy(), reached[0].high.copy(), reached, lemmas), tree


def _read_lemmas(arrays, reached: list[Reach]) -> list[Lemma]:
    demand(set(arrays) == set(LEMMAS), f"lemmas must hold {', '.join(LEMMAS)}")
    arrays = {name: np.asarray(arrays[name]) for name in LEMMAS}
    wrong = [name for name, kind in LEMMAS.items() if arrays[name].dtype.kind != kind]
    demand(not wrong, f"lemmas, {', '.join(wrong)}: integers must be integers, and floats floats")
    side, sizes = arrays["side"].astype(np.int64), arrays["sizes"]
    demand(side.ndim == 1 and sizes.shape == (len(side), 3), "the sizes of the lemmas do not fit")
    relus, lemmas = sum(len(r.low) for r in reached if r.lines), []
    demand((side != 0).all() and (abs(side) <= relus).all(), "a lemma is about no ReLU")
    at = dict.fromkeys(("units", "parent", "split", "signs", "values"), 0)
    for signed, (units, nodes, rows) in zip(side.tolist(), sizes.tolist(), strict=True):
        demand(min(units, nodes, rows) >= 0, "the sizes of the lemmas do not fit")
        counts = {"units": units, "parent": nodes, "split": nodes, "signs": rows * units, "values": rows * units}
        own = {name: arrays[name][at[name] : at[name] + n] for name, n in counts.items()}
        demand(all(own[name].shape == (n,) for name, n in counts.items()), "the arrays of the lemmas are too short")
        at = {name: at[name] + n for name, n in counts.items()}
        own |= {name: own[name].reshape(rows, units) for name in ("signs", "values")}
        own |= {"multipliers": np.zeros((0, 2, units), np.float32), "limit": np.array([np.inf])}  # none is restricted
        lemmas.append(Lemma(abs(signed) - 1, 1 if signed > 0 else -1, own))
    demand(all(len(arrays[name]) == n for name, n in at.items()), "the arrays of the lemmas are too long")
    return lemmas


def _draw_in(network: Network, reached: list[Reach], low, high, lemmas: list[Lemma]):
    """Draw low and high in, in place, to what lemmas say of the inputs of the ReLUs behind what is ``reached``."""
    first = sum(len(r.low) for r in reached if r.lines)
    for lemma in lemmas:
        if first <= lemma.unit < first + len(low):
            row = np.zeros((1, len(low)))
            row[0, lemma.unit - first] = lemma.sign
            bound = _replay(network, reached, row, lemma.proof)
            demand(not math.isnan(bound), "a lemma's bound is not a number")
            if lemma.sign > 0:
                low[lemma.unit - first] = max(low[lemma.unit - first], bound)
            else:
                high[lemma.unit - first] = min(high[lemma.unit - first], -bound)


# --- float32 ----------------------------------------------------------------------------------------------------------


def float32_error(network: Network, reached: list[Reach], rows):
    """A bound of |rows . (float32 logits - real logits)| in the box, whatever the order of the float32 sums."""
    error, steps = np.zeros(network.maps[0].weight.shape[1]), []
    for m, r in zip(network.maps, reached, strict=True):
        if m.relu:
            error = np.where(r.high + error < 0, 0, error)  # off, in float32 as well
        x = r.largest + error
        carried = m.absolute @ error
        terms = (m.absolute != 0) @ (x > 0).astype(float) + 1 + m.extra  # exact zeros add no rounding
        own = (1 + network.slack / U32) * gamma(terms, U32) * (r.size + carried) + 2.0**-124 * (terms + x.sum())
        demand((own < LARGEST).all(), "a float32 error is NaN or too large")
        steps.append((m, r, error, own))
        error = carried + own
    total, a = np.zeros(len(rows)), rows
    for m, r, error, own in reversed(steps):
        total += abs(a) @ own
        a = a @ m.weight
        if m.relu:
            on, off = r.low - error >= 0, r.high + error <= 0
            total += abs(a) @ np.where(on | off, 0, error)
            a = a * on
    return total


def _deployed_error(network: Network, reached: list[Reach], rows):
    """:func:`float32_error`, but infinite for a network that float32 may compute by other sums."""
    return float32_error(network, reached, rows) if network.sums else np.full(len(rows), np.inf)
