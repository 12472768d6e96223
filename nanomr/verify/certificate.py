"""Checks a verifier's results without trusting it: rigorous bounds, rounding errors included.

Nothing here is shared with the verifier: the network becomes sparse matrices built by this file's own loops, and a
proof is a tree of cases with numbers (slopes, multipliers) of which *any* valid choice gives true bounds. So backward
passes in float64, minus bounds on their own rounding errors, decide. ``docs/soundness.md`` derives every term.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array, issparse

from ..checkpoint import load_tensors, read_json, read_jsonl
from ..errors import UserError

U64, U32 = 2.0**-53, 2.0**-24  # unit roundoffs
TINY = 1e-200  # far more than all underflow together, as no activation exceeds LARGEST
LARGEST, WIDEST = 1e30, 2**18  # of an activation; of a layer
ROWS = 512  # carried back at once
BATCH_NORM_EPS = 1e-5
ARRAYS = {"units": "i", "parent": "i", "split": "i", "signs": "i", "values": "f", "multipliers": "f", "limit": "f"}
BROKEN, UNFINISHED = ("attacked", "falsified", "misclassified"), ("timeout", "unknown", "error")
FINISHED = ("verified", *BROKEN)
UNCHECKABLE = ("milp",)  # ways to exclude a rival that leave no proof: HiGHS


class CertificateError(UserError):
    """A claim that does not hold, or that cannot be checked."""


def gamma(n, u):
    """n u / (1 - n u): the relative error of n roundings in a row. Higham 2002, lemma 3.1."""
    return n * u / (1 - n * u)


def _demand(fine, message: str):
    if not fine:
        raise CertificateError(message)


# --- the network, as matrices -----------------------------------------------------------------------------------------


class Map(NamedTuple):
    """y = weight x + bias, images flattened in NHWC order; x is relu(the map's input) if ``relu``."""

    relu: bool
    weight: csr_array
    absolute: csr_array  # |weight|
    bias: np.ndarray
    size: np.ndarray  # |bias|, or the absolute sum of what it was computed from
    extra: int  # float32 roundings of a term beside those of the product and the sum


class Network(NamedTuple):
    maps: list[Map]
    input_shape: tuple
    slack: float  # rounding error of any sum of the checker's, per unit of the sum's absolute value


def read_network(path) -> Network:
    """The network in a safetensors file of :meth:`nanomr.models.Model.save` (or a run folder): small_cnn or mlp.

    A batch norm ``bn<i>`` may follow the i-th layer. Raises CertificateError for another network, a tensor too many
    or of the wrong shape, and weights that are not finite float32.
    """
    tensors, metadata = load_tensors(_weights_file(path))
    tensors = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
    try:
        architecture = metadata["architecture"]
        if architecture["name"] == "small_cnn":
            kernel = architecture["kernel"]
            padding = {4: (1, 1, 1, 1), 5: (1, 2, 1, 2)}[kernel]
            wrong = [name for name in ("conv1", "conv2") if tensors[f"{name}.weight"].shape[2:] != (kernel, kernel)]
            _demand(not wrong, f"{wrong}: the kernels are not {kernel}x{kernel}")
            shape, names = (32, 32, 3), ["conv1", "conv2", "fc1", "fc2"]
        else:
            _demand(architecture["name"] == "mlp", f"the checker knows small_cnn and mlp, not {architecture['name']!r}")
            shape, names = tuple(architecture["input_shape"]), [f"fc{i}" for i in range(1, len(architecture["sizes"]))]
            padding = None
        return _build(tensors, shape, names, padding)
    except (KeyError, TypeError, ValueError) as error:
        raise CertificateError(f"{path} is not the network that its metadata says: {error}") from None


def _build(tensors, shape, names, padding) -> Network:
    def take(name):
        value = tensors.pop(name)
        _demand(value.dtype == np.float32 and np.isfinite(value).all(), f"{name}: must be finite float32 numbers")
        return value.astype(np.float64)

    def add(weight, bias, size, extra, relu=False):
        weight = csr_array(weight)
        fits = len(bias) == weight.shape[0] and (not maps or weight.shape[1] == maps[-1].weight.shape[0])
        _demand(fits and max(weight.shape) <= WIDEST, f"a layer of {weight.shape} numbers does not fit here")
        _demand(np.isfinite(weight.data).all() and np.isfinite(bias).all(), "a standard deviation or variance is 0")
        maps.append(Map(relu, weight, abs(weight), bias, size, extra))

    maps: list[Map] = []
    input_shape = shape
    mean, std = (np.broadcast_to(take(f"normalize.{name}").ravel(), shape).ravel() for name in ("mean", "std"))
    with np.errstate(divide="ignore", invalid="ignore"):  # refused by ``add``
        add(diags_array(1 / std), -mean / std, abs(mean / std), extra=2)
    for i, name in enumerate(names, 1):
        weight, bias = take(f"{name}.weight"), take(f"{name}.bias")
        if weight.ndim == 4:
            weight, shape = _convolution(weight, shape, 2, padding)
            bias = np.tile(bias, shape[0] * shape[1])
        else:
            if len(shape) == 3:  # PyTorch flattens CHW, we HWC
                h, w, c = shape
                weight = weight.reshape(-1, c, h, w).transpose(0, 2, 3, 1).reshape(len(weight), h * w * c)
            shape = (len(weight),)
        add(weight, bias, abs(bias), extra=0, relu=i > 1)
        if f"bn{i}.weight" in tensors:
            tensors.pop(f"bn{i}.num_batches_tracked", None)
            weight, bias, mean, var = (take(f"bn{i}.{n}") for n in ("weight", "bias", "running_mean", "running_var"))
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = weight / np.sqrt(var + BATCH_NORM_EPS)
                terms = np.tile([scale, bias - mean * scale, abs(bias) + abs(mean * scale)], math.prod(shape[:-1]))
            add(diags_array(terms[0]), terms[1], terms[2], extra=10)
    _demand(not tensors, f"the file holds {min(tensors, default='')!r}, which the checker has no place for")
    n = max(max(m.weight.shape) for m in maps) + 16 * len(maps)
    return Network(maps, input_shape, 8 * gamma(n, U64))


def _convolution(weight, shape, stride, padding):
    """(its matrix, (height, width, channels) of its output), for weight (out, in, kh, kw)."""
    (h, w, c), (out, channels, kh, kw), (top, bottom, left, right) = shape, weight.shape, padding
    _demand(channels == c, f"a convolution of {channels} channels does not fit an image of {c}")
    ho, wo = (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1
    rows, columns, values = [], [], []
    for i, j, p, q in np.ndindex(ho, wo, kh, kw):
        y, x = stride * i + p - top, stride * j + q - left
        if 0 <= y < h and 0 <= x < w:  # outside is padding: zeros behind the normalisation
            o, k = np.indices((out, c))
            rows.append((i * wo + j) * out + o)
            columns.append((y * w + x) * c + k)
            values.append(weight[:, :, p, q])
    rows, columns, values = (np.concatenate(part, None) for part in (rows, columns, values))
    return coo_array((values, (rows, columns)), (ho * wo * out, h * w * c)), (ho, wo, out)


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


def _lower(network: Network, reached: list[Reach], a):
    """Lower bounds of the rows ``a`` (S, units), dense or sparse, times the output of the map ``len(reached) - 1``."""
    c, k = _linear(network, reached, a)
    return k + _least(reached[0], c)


def _both(at, width: int):
    """The rows of z[at], and those of -z[at], for a z of that width."""
    n = np.arange(2 * len(at))
    return csr_array((np.where(n < len(at), 1.0, -1.0), (n, np.tile(at, 2))), (len(n), width))


def _reach(network: Network, low, high) -> list[Reach]:
    """What every map's input can be, for images in [low, high] (flat): intervals, and CROWN where they leave a ReLU
    unstable."""
    reached: list[Reach] = []
    for m in network.maps:
        lines, x_low, x_high = None, low, high
        if m.relu:
            if any(r.lines for r in reached):  # else the intervals are exact
                unstable = np.flatnonzero((low < 0) & (high > 0))
                for first in range(0, len(unstable), ROWS // 2):
                    at = unstable[first : first + ROWS // 2]
                    bound = _lower(network, reached, _both(at, len(low)))
                    low[at] = np.maximum(low[at], bound[: len(at)])
                    high[at] = np.minimum(high[at], -bound[len(at) :])
            lines = _lines(low, high)
            x_low, x_high = np.maximum(low, 0), np.maximum(high, 0)
        largest = np.maximum(abs(x_low), abs(x_high))
        size = m.absolute @ largest + m.size
        _demand((size < LARGEST).all(), "an activation may be NaN or too large for float32")
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
    _demand(math.isfinite(eps) and eps >= 0, f"eps must be a finite number >= 0, not {eps}")
    rivals, rows = _margins(network, image, label)
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are refused, or prove nothing
        reached = _reach(network, *_image_box(image, eps))
        bound = dict(zip(rivals, _lower(network, reached, rows).tolist(), strict=True))
        for rival, proof in (proofs or {}).items():
            _demand(rival in bound, f"a proof for the rival {rival}, which is none")
            try:
                bound[rival] = max(bound[rival], _replay(network, reached, rows[[rivals.index(rival)]], proof))
            except CertificateError as error:
                raise CertificateError(f"rival {rival}: {error}") from None
        error = _float32_error(network, reached, rows)
    return Checked(bound, dict(zip(rivals, error.tolist(), strict=True)))


def _margins(network: Network, image, label: int):
    """(rivals, rows (rivals, classes)): row . logits = logit[label] - logit[rival]. Checks the image, too."""
    _demand(image.shape == network.input_shape and image.dtype == np.float32,
            f"an image must be float32 {network.input_shape}, not {image.dtype} {image.shape}")  # fmt: skip
    _demand(((image >= 0) & (image <= 1)).all(), "an image must be in [0, 1]")
    classes = len(network.maps[-1].bias)
    _demand(0 <= label < classes, f"there is no class {label}")
    rivals = [t for t in range(classes) if t != label]
    return rivals, np.eye(classes)[label] - np.eye(classes)[rivals]


class Proof(NamedTuple):
    """A tree of cases; node 0 is the root. ``signs`` and ``values`` have a row for each leaf and each node with a
    restricted child, ``multipliers`` one for each restricted node; ``row`` and ``rank`` (N,): which."""

    units: np.ndarray
    parent: np.ndarray
    split: np.ndarray
    signs: np.ndarray
    values: np.ndarray
    multipliers: np.ndarray
    limit: float
    children: list[list[int]]
    row: np.ndarray
    rank: np.ndarray


def _read_proof(proof, relus: int) -> Proof:
    """The proof in these arrays, for a network of so many ReLUs, if it is one."""
    _demand("alpha" not in proof, "a list of leaves, as older versions wrote it, is no proof any more: verify again")
    _demand(set(proof) == set(ARRAYS), f"a proof must hold {', '.join(ARRAYS)}")
    arrays = {name: np.asarray(proof[name]) for name in ARRAYS}
    wrong = [name for name, kind in ARRAYS.items() if arrays[name].dtype.kind != kind]
    _demand(not wrong, f"{', '.join(wrong)}: integers must be integers, and floats floats")
    units, parent, split = (arrays[name].astype(np.int64) for name in ("units", "parent", "split"))
    signs, values, multipliers, limit = (arrays[name] for name in ("signs", "values", "multipliers", "limit"))
    fits = units.ndim == parent.ndim == 1 and parent.shape == split.shape and limit.shape == (1,)
    _demand(fits, "the shapes of units, parent, split and limit do not fit")
    _demand(((units >= 0) & (units < relus)).all() and ((split >= -relus) & (split <= relus)).all(), "no such ReLU")
    _demand(len(np.unique(units)) == len(units), "a ReLU has two columns")
    fine = len(parent) > 0 and parent[0] == -1 and split[0] == 0
    _demand(fine and ((parent >= 0) & (parent < np.arange(len(parent))))[1:].all(), "the nodes are not a tree")
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent[1:].tolist(), 1):
        children[above].append(node)
    kinds = [sorted(split[nodes].tolist()) for nodes in children]  # none, [0] or [-s, s]
    _demand(all(kind in ([], [0]) or (len(kind) == 2 and kind[0] == -kind[1] < 0) for kind in kinds),
            "the children of a node do not cover it")  # fmt: skip
    row, rank = np.cumsum([kind in ([], [0]) for kind in kinds]) - 1, np.cumsum(split == 0) - 2  # the root: split 0
    _demand(signs.shape == values.shape == (row[-1] + 1, len(units)), "the rows of signs and values do not fit")
    _demand(multipliers.shape == (rank[-1] + 1, 2, len(units)), "the rows of multipliers do not fit")
    _demand(((signs >= -1) & (signs <= 1)).all(), "a sign is not -1, 0 or 1")  # the absolute of int8's least is < 0
    _demand(((values >= 0) & np.isfinite(values)).all(), "a slope or a multiplier beta is not a number >= 0")
    _demand((values <= 1)[signs == 0].all(), "a slope alpha is above 1")
    _demand(((multipliers >= 0) & np.isfinite(multipliers)).all(), "a multiplier is not a number >= 0")
    _demand(rank[-1] < 0 or np.isfinite(limit).all(), "the limit is not a number")
    return Proof(units, parent, split, signs, values, multipliers, float(limit[0]), children, row, rank)


def _replay(network: Network, reached: list[Reach], row, proof) -> float:
    """A lower bound of row (1, classes) . logits, from the arrays of a proof."""
    low, high = (np.concatenate([[], *(r[side] for r in reached if r.lines)]) for side in (0, 1))
    tree = _read_proof(proof, len(low))
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
            c, k = _bound(network, reached, row, low, high, tree, tree.row[above])
            multipliers = tree.multipliers[tree.rank[node]].astype(np.float64)
            _restrict(network, reached, low, high, tree.units, multipliers, c, k, tree.limit)
        stack += [(child, low, high) for child in tree.children[node]]
        if not tree.children[node] and not (low > high).any():  # else no image is left: NaN is not above anything
            c, k = _bound(network, reached, row, low, high, tree, tree.row[node])
            bound = np.minimum(bound, k + _least(reached[0], c))
    return float(bound)


def _bound(network, reached, row, low, high, tree: Proof, i: int):
    """(c (pixels,), k): c . x + k <= row . logits where the ReLUs' inputs are in [low, high], by row i of a proof."""
    units, signs, values = tree.units, tree.signs[i], tree.values[i].astype(np.float64)
    _demand((low[units] >= 0)[signs > 0].all() and (high[units] <= 0)[signs < 0].all(),
            "a sign is not what the splits and restrictions above it say")  # fmt: skip
    lower, upper, offset, force = lines = np.array(_lines(low, high))
    lower[units] = np.where(signs != 0, signs > 0, values)  # of a stable ReLU, too: alpha z <= relu(z) for every z
    upper[units] = np.where(signs != 0, signs > 0, upper[units])
    offset[units] = np.where(signs != 0, 0, offset[units])
    force[units] = -signs * values
    parts = iter(np.split(lines, np.cumsum([len(r.low) for r in reached if r.lines]), axis=1))
    c, k = _linear(network, [r._replace(lines=Lines(*next(parts))) if r.lines else r for r in reached], row)
    return c[0], k[0]


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
                _demand(np.isfinite(bound).all(), "a restriction's bound is not a number")
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


# --- float32 ----------------------------------------------------------------------------------------------------------


def _float32_error(network: Network, reached: list[Reach], rows):
    """A bound of |rows . (float32 logits - real logits)| in the box, whatever the order of the float32 sums."""
    error, steps = np.zeros(network.maps[0].weight.shape[1]), []
    for m, r in zip(network.maps, reached, strict=True):
        if m.relu:
            error = np.where(r.high + error < 0, 0, error)  # off, in float32 as well
        x = r.largest + error
        carried = m.absolute @ error
        terms = (m.absolute != 0) @ (x > 0).astype(float) + 1 + m.extra  # exact zeros add no rounding
        own = (1 + network.slack / U32) * gamma(terms, U32) * (r.size + carried) + 2.0**-124 * (terms + x.sum())
        _demand((own < LARGEST).all(), "a float32 error is NaN or too large")
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


# --- the results of a run ---------------------------------------------------------------------------------------------


def check_results(folder, weights, images, labels, predict: Callable | None = None, progress: Callable | None = None):
    """A report on every claim in the folder of a run of ``verify_small.py``, for the same weights and images.

    images (N, H, W, C) float32 in [0, 1] and labels (N,), by the ids of the results. ``predict(images)``: labels, by
    the deployed float32 forward pass, which counterexamples must fool as well. ``progress(done, total)``.

    Returns a dict: how many ``images`` there are, and how many of each ``verdicts``; of the verified ones, how many
    are ``confirmed`` (rigorous in real arithmetic), confirmed for ``float32``, and ``solver_only`` (HiGHS excluded a
    rival, tolerance 1e-9, which leaves no proof); how many ``counterexamples`` are confirmed; and the lists
    ``refused`` and ``contradictions`` of {"id", "reason"}: neither may have an entry. Raises UserError when files are
    missing or the weights are others.
    """
    folder, report = Path(folder), Counter(confirmed=0, float32=0, solver_only=0, counterexamples=0)
    config, files = read_json(folder / "config.json"), sorted(folder.glob("results*.jsonl"))
    _demand(files, f"{folder} holds no results.jsonl: give the --out folder of a run of verify_small.py")
    try:
        known, eps = config["weights"]["sha256"], float(config["eps"])
    except (KeyError, TypeError, ValueError):
        raise CertificateError(f"{folder / 'config.json'} does not name the weights' sha256 and eps") from None
    network, file = read_network(weights), _weights_file(weights)
    _demand(hashlib.sha256(file.read_bytes()).hexdigest() == known, f"{file} is not the file that was verified")
    refused, contradictions, last = [], [], {}
    for record in (record for file in files for record in read_jsonl(file)):
        i, verdict = record.get("id"), record.get("verdict")
        _demand(type(i) is int and 0 <= i < len(images), f"{folder}: a result is about image {i}, which is none")
        before = last.get(i, {}).get("verdict")
        if {before, verdict} in [{"verified", broken} for broken in BROKEN]:
            contradictions.append({"id": i, "reason": f"{before} on one line, {verdict} on another"})
        if before not in FINISHED or verdict in FINISHED:
            last[i] = record
    for done, (i, record) in enumerate(last.items(), 1):
        verdict, image, label = record.get("verdict"), images[i], int(labels[i])
        try:
            _demand(record.get("label") == label, f"the label is {label}, not {record.get('label')}")
            if verdict in ("attacked", "falsified"):
                _check_counterexample(network, _load(folder, i), image, label, eps, predict)
                report["counterexamples"] += 1
            elif verdict == "misclassified":
                _check_counterexample(network, image, image, label, eps, predict)
            elif verdict == "verified":
                if (folder / "counterexamples" / f"{i:05d}.npz").exists():
                    contradictions.append({"id": i, "reason": "verified, but a counterexample was saved"})
                report.update(_check_verified(network, folder, record, image, label, eps))
            else:
                _demand(verdict in UNFINISHED, f"unknown verdict {verdict!r}")
        except UserError as error:
            refused.append({"id": i, "reason": str(error)})
        if progress:
            progress(done, len(last))
    verdicts = dict(Counter(record.get("verdict") for record in last.values()))
    return {"images": len(last), "verdicts": verdicts, **report, "refused": refused, "contradictions": contradictions}


def _weights_file(path) -> Path:
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def _check_verified(network, folder, record, image, label, eps) -> list[str]:
    """The counts of the report that a verified image adds to."""
    how, claims, tensors = record.get("how") or {}, record.get("bound") or {}, {}
    _demand(isinstance(how, dict) and isinstance(claims, dict), "how and bound must have an entry for each rival")
    if (file := folder / "proofs" / f"{record['id']:05d}.safetensors").exists():
        tensors, _ = load_tensors(file)
    proofs: dict[int, dict] = {}
    for name, value in tensors.items():
        rival, _, array = name.partition("/")
        _demand(rival.isdecimal(), f"{file.name}: {name!r} belongs to no rival")
        proofs.setdefault(int(rival), {})[array] = value
    checked = check_image(network, image, label, eps, proofs)
    rivals = [t for t in checked.bound if how.get(str(t)) not in UNCHECKABLE]
    for t in rivals:
        bound, claim = checked.bound[t], claims.get(str(t))
        _demand(bound > 0, f"rival {t}: the margin is only proved to be above {bound:.3g}")
        _demand(isinstance(claim, float | int) and claim <= bound + 1e-6 * (1 + abs(bound)),
                f"rival {t}: the bound {claim} is claimed, {bound:.9g} proved")  # fmt: skip
    float32 = all(checked.bound[t] > checked.float32_error[t] for t in rivals)
    _demand(float32 or not record.get("verified_float32"), "claimed for float32, which is not proved")
    if len(rivals) < len(checked.bound):
        return ["solver_only"]
    return ["confirmed", "float32"] if float32 else ["confirmed"]


def _load(folder: Path, i: int):
    file = folder / "counterexamples" / f"{i:05d}.npz"
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return arrays["adversarial"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CertificateError(f"{file.name}: no counterexample can be read ({error})") from None


def _check_counterexample(network, adversarial, image, label, eps, predict=None):
    """Raise CertificateError unless ``adversarial`` is in the box, exactly, and certainly not the label's."""
    _, rows = _margins(network, adversarial, label)
    x, x0 = adversarial.astype(np.float64).ravel(), image.astype(np.float64).ravel()
    distance = abs(x - x0)  # rounded: never from above eps to below it, but perhaps onto it
    doubtful = np.flatnonzero(distance == eps)
    inside = all(abs(Fraction(x[i]) - Fraction(x0[i])) <= Fraction(eps) for i in doubtful)
    _demand((distance <= eps).all() and inside, "the counterexample is outside of the box")
    upper = -_lower(network, _reach(network, x, x.copy()), -rows)  # bounds of the margins at this very point
    _demand((upper <= 0).any(), f"the counterexample is not misclassified: its margin may be {upper.min():.3g}")
    _demand(predict is None or int(predict(adversarial[None])[0]) != label, "float32 classifies it as its label")
