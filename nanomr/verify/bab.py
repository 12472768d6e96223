"""Branch and bound with beta-CROWN (Wang et al. 2021): one image, one rival. ``docs/derivations/beta_crown.md``.

An unstable ReLU is split into the case "its input is >= 0", where it is the identity, and "<= 0", where it is 0. The
case itself is a constraint, and a multiplier beta >= 0 brings it into the linear bound: alpha and beta climb together.
The search runs in float32 on the network with its stable ReLUs folded into matrices; what is claimed is
:func:`leaf_bounds`, in float64 on the network itself.
"""

import heapq
import time
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

from .chain import Chain
from .crown import Box, Found, Lines, inner, lower, margin_rows
from .halfspace import least

RATE, BETA_RATE, DECAY = 0.1, 0.5, 0.9  # Adam's first step for alpha, and for beta per unit of its coefficient
CHILDREN = 8  # units whose two children are bounded, not yet optimised, before one is chosen
ROUNDS, AGE = 3, 1  # of drawing in a domain's bounds; splits after which it is done again
SLACK_64 = 1e-9  # every bound that is drawn in is this much (relatively) looser: rounding stays inside
SLACK = 1e-5  # a float32 bound must be above the threshold by this before float64 is asked


class Tree(NamedTuple):
    """What :func:`branch_and_bound` found.

    ``status``: "proved": the margin is > threshold in the whole box, by the float64 bounds of ``leaves``;
    "candidate": ``image`` (H, W, C) float64, in the box, has a margin <= threshold; "timeout": it gave up.
    ``bound``: the worst bound, of a leaf or of an open domain. ``leaves``: arrays ``units``, ``alpha``, ``split`` and
    ``beta`` as proof files hold them, or None. ``domains``: how many were bounded; ``seconds`` of CPU time.
    """

    status: str
    image: np.ndarray | None
    bound: float
    leaves: dict[str, np.ndarray] | None
    domains: int
    seconds: float


class Collapsed(NamedTuple):
    """The margin as a function of the unstable ReLUs' inputs z (U,) and of y in [-1, 1] (D,), the place in the box:

    z = image y + bias + between relu(z),  margin = row_image . y + row_units . relu(z) + row_bias

    ``between`` is strictly lower triangular by layers, ``layers`` their slices of the units. upper, offset, lower: the
    lines of :class:`~nanomr.verify.crown.Lines`. ``units``: flat unit indices.
    """

    image: np.ndarray
    bias: np.ndarray
    between: np.ndarray
    row_image: np.ndarray
    row_units: np.ndarray
    row_bias: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray
    units: np.ndarray
    layers: list[slice]

    def single(self) -> "Collapsed":
        """The same in float32."""
        return Collapsed(*(np.asarray(v, np.float32) for v in self[:-2]), *self[-2:])


def _flat(layers):
    """What each ReLU layer has, (1, ...), one after another."""
    return np.concatenate([np.zeros(0), *(np.ravel(v) for v in layers)])


def collapse(chain: Chain, low, high, relus, row) -> Collapsed:
    """The network in the box [low, high] (1, H, W, C), its stable ReLUs replaced by 0 or the identity.

    relus: the bounds of every ReLU's input, (1, ...) each; row (K,): the margin is row . logits.
    """
    box, lines = Box.between(low, high), [Lines.around(*r) for r in relus]
    places = [np.flatnonzero(line.unstable) for line in lines]
    ends = np.cumsum([0, *map(len, places)])
    layers, n = [slice(a, b) for a, b in pairwise(ends)], ends[-1]
    image, bias, between = np.zeros((n + 1, low.size)), np.zeros(n + 1), np.zeros((n + 1, n))
    for m, at in enumerate([*layers, slice(n, n + 1)]):
        if at.start == at.stop:
            continue
        if m < len(lines):
            a = np.zeros((len(places[m]), lines[m].lower.size))
            a[np.arange(len(a)), places[m]] = 1
            a = a.reshape(-1, *lines[m].lower.shape[1:])
        else:
            a = np.asarray(row, np.float64)[None]
        for k in range(m, -1, -1):
            bias[at] += inner(a, chain.stages[k].bias)
            a = chain.stages[k].transpose(a)
            if k:
                line = lines[k - 1]
                between[at, layers[k - 1]] = a.reshape(len(a), -1)[:, places[k - 1]]
                a = a * np.where(line.unstable, 0, line.lower)
        image[at] = a.reshape(len(a), -1)
    bias += image @ box.centre.ravel()
    image *= box.radius.ravel()
    units = np.flatnonzero(_flat([line.unstable for line in lines])).astype(np.int32)
    own = [_flat([getattr(line, name) for line in lines])[units] for name in ("lower", "upper", "offset")]
    return Collapsed(image[:n], bias[:n], between[:n], image[n], between[n], bias[n], *own, units, layers)


# --- the bound of a domain, and its gradient --------------------------------------------------------------------------
# A domain is a row of ``signs`` (S, U): 0 not split, +1 "z >= 0", -1 "z <= 0"; and one of ``values`` (S, U): alpha of
# an unstable ReLU that is not split, beta of one that is.


class Part(NamedTuple):
    """``bound`` (S,); the coefficients on the relus (S, U) and on y (S, D); the lines in use (S, U) each."""

    bound: np.ndarray
    relus: np.ndarray
    image: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray


def backward(net: Collapsed, signs, values, chords=None) -> Part:
    """beta-CROWN bounds: the coefficient of a split ReLU's input is that on its output, or 0, minus sign beta.

    ``chords``: (upper, offset) of each domain, (S, U), where they are not the network's.
    """
    free, on = signs == 0, (signs > 0).astype(values.dtype)
    upper, offset = (net.upper, net.offset) if chords is None else chords
    below, above = np.where(free, values, on), np.where(free, upper, on)
    offset, force = np.where(free, offset, 0 * on), np.where(free, 0 * on, -signs * values)
    relus, inputs = np.empty_like(values), np.empty_like(values)
    for at in reversed(net.layers):
        a = net.row_units[at] + inputs[:, at.stop :] @ net.between[at.stop :, at]
        negative = np.minimum(a, 0)
        relus[:, at] = a
        inputs[:, at] = (a - negative) * below[:, at] + negative * above[:, at] + force[:, at]
    image = inputs @ net.image
    image += net.row_image
    bound = inputs @ net.bias + inner(np.minimum(relus, 0), offset) + net.row_bias - abs(image).sum(1)
    return Part(bound, relus, image, below, above, offset)


def forward(net: Collapsed, part: Part):
    """(z (S, U), relaxed outputs (S, U), true margins (S,), corners y (S, D)) at the minimisers of the bounds.

    z and the outputs are those of the relaxed network; the margins are the network's own at the same y.
    """
    y = -np.sign(part.image)
    true = y @ net.image.T + net.bias
    z, out, kept = true.copy(), np.empty_like(true), np.empty_like(true)
    for at in net.layers:
        z[:, at] += out[:, : at.start] @ net.between[at, : at.start].T
        true[:, at] += kept[:, : at.start] @ net.between[at, : at.start].T
        lines = part.lower[:, at] * z[:, at], part.upper[:, at] * z[:, at] + part.offset[:, at]
        out[:, at] = np.where(part.relus[:, at] >= 0, *lines)
        kept[:, at] = np.maximum(true[:, at], 0)
    return z, out, y @ net.row_image + kept @ net.row_units + net.row_bias, y


def gradient(signs, part: Part, z):
    """The derivatives of the bounds by ``values``: the positive part of the coefficient times z; -sign z for beta."""
    return np.where(signs == 0, np.maximum(part.relus, 0) * z, -signs * z)


class Climb(NamedTuple):
    """The best bounds (S,) of some domains, the values (S, U) that give them; the lowest margin seen, and where."""

    bound: np.ndarray
    values: np.ndarray
    margin: float
    y: np.ndarray


def climb(net: Collapsed, signs, values, scale, steps: int, target: float, chords=None) -> Climb:
    """Adam on alpha and beta together, projected; the best of ``steps`` + 1 points. A bound > target is left alone."""
    best, kept = np.full(len(values), -np.inf, values.dtype), values.copy()
    margin, where, left = np.inf, np.zeros_like(net.row_image), np.arange(len(values))
    first, second = np.zeros_like(values), np.zeros_like(values)
    for step in range(steps + 1):
        part = backward(net, signs, values, chords)
        better = part.bound > best[left]
        best[left[better]], kept[left[better]] = part.bound[better], values[better]
        z, _, margins, y = forward(net, part)
        if margins.min() < margin:
            margin, where = float(margins.min()), y[margins.argmin()]
        on = ~(part.bound > target)
        if step == steps or not on.any():
            break
        slope = gradient(signs, part, z)
        left, signs, values, first, second, slope = (
            v if on.all() else v[on] for v in (left, signs, values, first, second, slope)
        )
        if chords is not None and not on.all():
            chords = chords[0][on], chords[1][on]
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope * slope
        move = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        free = signs == 0
        values = values + DECAY**step * np.where(free, RATE, BETA_RATE * scale) * move
        values = np.clip(values, 0, np.where(free, 1, np.inf)).astype(kept.dtype)
    return Climb(best, kept, margin, where)


# --- branching --------------------------------------------------------------------------------------------------------


def children(signs, values, relus, unit):
    """(signs, values) (2 S, U): each domain with its ``unit`` (S,) split, first >= 0, then <= 0.

    The new beta starts where the child's linear function is its parent's (coefficient >= 0), or above it (< 0).
    """
    signs, values = np.repeat(signs, 2, 0), np.repeat(values, 2, 0)
    row, unit = np.arange(len(signs)), np.repeat(unit, 2)
    sign = np.tile(np.array([1, -1], signs.dtype), len(signs) // 2)
    alpha, positive = values[row, unit], np.maximum(np.repeat(relus, 2, 0)[row, unit], 0)
    signs[row, unit] = sign
    values[row, unit] = np.where(sign > 0, positive * (1 - alpha), positive * alpha)
    return signs, values


def branch(net: Collapsed, signs, values, target: float, chords=None):
    """(children's signs, values), two for each domain, which must have a unit left to split.

    The CHILDREN units at which the relaxation errs most at the minimiser are tried: the product of what the two
    bounds gain decides, as in mixed-integer solvers' strong branching; a gain beyond the target counts no more.
    """
    part = backward(net, signs, values, chords)
    z, out, _, _ = forward(net, part)
    error = np.where(signs == 0, abs(part.relus * (out - np.maximum(z, 0))), -1)
    tried = min(CHILDREN, error.shape[1])
    units = np.argpartition(-error, tried - 1, axis=1)[:, :tried]
    domain = np.repeat(np.arange(len(signs)), tried)
    tries = children(signs[domain], values[domain], part.relus[domain], units.ravel())
    theirs = None if chords is None else [np.repeat(c[domain], 2, 0) for c in chords]
    gain = (
        np.minimum(backward(net, *tries, theirs).bound.reshape(len(signs), tried, 2), target)
        - part.bound[:, None, None]
    )
    gain = np.maximum(gain, 1e-6).prod(2)
    gain[signs[np.arange(len(signs))[:, None], units] != 0] = -1  # fewer units left than are tried
    unit = units[np.arange(len(signs)), np.nan_to_num(gain, nan=-1).argmax(1)]
    return children(signs, values, part.relus, unit)


# --- float64: what is claimed -----------------------------------------------------------------------------------------


def leaf_bounds(chain: Chain, low, high, relus, label: int, rival: int, leaves: dict) -> np.ndarray:
    """The lower bounds (L,) of the margin in the leaves of a proof, by :func:`~nanomr.verify.crown.lower`.

    ``leaves``: the arrays of a proof file. low, high (1, H, W, C); relus as :func:`~nanomr.verify.crown.crown` gave
    them for this box. That the leaves cover everything is not checked here.
    """
    alpha, split, beta = leaves["alpha"], leaves["split"], leaves["beta"]
    sizes = [r[0].size for r in relus]
    n, size = len(alpha), sum(sizes)
    slopes = np.tile(_flat([Lines.around(*r).lower for r in relus]), (n, 1))
    slopes[:, leaves["units"]] = alpha
    z_low, z_high = (np.tile(_flat(side), (n, 1)) for side in (zip(*relus, strict=True) if relus else ((), ())))
    forces = np.zeros((n, size))
    leaf, column = np.nonzero(split)
    unit, sign = abs(split[leaf, column]) - 1, np.sign(split[leaf, column])
    z_low[leaf[sign > 0], unit[sign > 0]] = np.maximum(z_low[leaf[sign > 0], unit[sign > 0]], 0)
    z_high[leaf[sign < 0], unit[sign < 0]] = np.minimum(z_high[leaf[sign < 0], unit[sign < 0]], 0)
    np.subtract.at(forces, (leaf, unit), sign * beta[leaf, column].astype(np.float64))

    def layered(values):
        parts = np.split(values, np.cumsum(sizes, dtype=int), axis=1)[:-1]
        return [p.reshape(n, *r[0].shape[1:]) for p, r in zip(parts, relus, strict=True)]

    lines = [Lines.around(*bounds) for bounds in zip(layered(z_low), layered(z_high), strict=True)]
    rows = np.repeat(margin_rows([label], [rival], chain.classes), n, 0)
    owner = np.zeros(n, int)  # one box, but lines for each row: they are not gathered
    return lower(chain, Box.between(low, high), lines, rows, owner, layered(slopes), layered(forces)).value


def _proof(net: Collapsed, signs, values) -> dict[str, np.ndarray]:
    """Domains as the arrays of a proof file."""
    depth = int((signs != 0).sum(1).max(initial=0))
    order = np.argsort(signs == 0, axis=1, kind="stable")[:, :depth]
    sign = np.take_along_axis(signs, order, 1).astype(np.int32)
    beta = np.where(sign != 0, np.take_along_axis(values, order, 1), 0)
    alpha = np.where(signs == 0, values, 0)
    split = sign * (net.units[order] + 1)
    return {"units": net.units, "alpha": alpha.astype(np.float32), "split": split, "beta": beta.astype(np.float32)}


def _solve_leaf(net: Collapsed, sign, threshold: float, seconds: float):
    """(values (U,), y (D,)): the best beta of a domain in which every unit is split, and the minimiser; either or both
    None where HiGHS is not installed, fails, or takes longer than ``seconds``.

    Such a domain is a linear program, and the betas are its dual solution. If no point is in it, they are a multiple
    of the duals of "how far is every point from it", large enough to prove anything.
    """
    try:
        import highspy
    except ImportError:
        return None, None
    z, constant = np.zeros_like(net.image), np.zeros_like(net.bias)  # z_j = z[j] . y + constant[j], by layers
    on = (sign > 0).astype(np.float64)
    for at in net.layers:
        through = net.between[at, : at.start] * on[: at.start]
        z[at] = net.image[at] + through @ z[: at.start]
        constant[at] = net.bias[at] + through @ constant[: at.start]
    cost = net.row_image + (net.row_units * on) @ z
    least = net.row_bias + (net.row_units * on) @ constant - abs(cost).sum()  # of the margin, without the constraints

    def solve(objective, matrix, distance):
        """min objective . (y, t) with matrix (y, t) >= -sign constant, t up to ``distance``."""
        columns = len(objective)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = columns, len(matrix)
        lp.col_cost_ = objective
        lp.col_lower_, lp.col_upper_ = np.append(-np.ones(columns - 1), 0), np.append(np.ones(columns - 1), distance)
        lp.row_lower_, lp.row_upper_ = -sign * constant, np.full(len(matrix), highspy.kHighsInf)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        row, column = np.nonzero(matrix)
        lp.a_matrix_.start_ = np.append(0, np.cumsum(np.bincount(row, minlength=len(matrix)))).astype(np.int32)
        lp.a_matrix_.index_, lp.a_matrix_.value_ = column.astype(np.int32), matrix[row, column]
        highs = highspy.Highs()
        options = {"output_flag": False, "threads": 1, "time_limit": max(seconds, 0.0)}
        options |= {f"{side}_feasibility_tolerance": 1e-9 for side in ("primal", "dual")}
        for option, value in options.items():
            highs.setOptionValue(option, value)
        highs.passModel(lp)
        highs.run()
        found = highs.getSolution()
        optimal = highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return optimal, np.array(found.col_value), np.maximum(found.row_dual, 0)

    matrix = np.hstack([sign[:, None] * z, np.ones((len(z), 1))])
    optimal, point, dual = solve(np.append(cost, 0), matrix, 0)
    if optimal:
        return dual, point[:-1]
    optimal, point, dual = solve(np.append(np.zeros(len(cost)), 1), matrix, np.inf)
    if not optimal or not point[-1] > 0:
        return None, None
    return dual * max(0, (1 + threshold - least) / point[-1]), None


# --- what is known where the margin is small --------------------------------------------------------------------------


class Frame(NamedTuple):
    """Bounds (U,), float64, of the units' inputs at the images of a domain with margin <= threshold; their chords,
    (upper, offset) float32."""

    low: np.ndarray
    high: np.ndarray
    upper: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, low, high) -> "Frame":
        lines = Lines.around(low, high)
        return cls(low, high, lines.upper.astype(np.float32), lines.offset.astype(np.float32))


def restrict(net: Collapsed, sign, value, low, high, limit: float):
    """(low, high) (U,) that hold at the images of one domain with margin <= ``limit``; None if there are none.

    ``low``, ``high``: what is known already; all in float64. The domain's bound is a linear function c . y + k below
    the margin, so that these images lie in the half-space c . y + k <= limit; over it and the box, each unit's linear
    bounds are :func:`least` (the output-constrained bounds of Kotha et al., *Provably Bounding Neural Network
    Preimages*, 2023, with bisection in the place of their gradient search). ``docs/derivations/beta_crown.md``.
    """
    low, high = np.where(sign > 0, np.maximum(low, 0), low), np.where(sign < 0, np.minimum(high, 0), high)
    if (low > high).any():  # NaN, which is not >, goes on, and proves nothing
        return None
    lines = Lines.around(low, high)
    part = backward(net, sign[None], value[None], (lines.upper[None], lines.offset[None]))
    if part.bound[0] > limit:
        return None
    c = part.image[0]
    k = part.bound[0] + abs(c).sum() - limit
    for at in net.layers:
        units = at.start + np.flatnonzero((low[at] < 0) & (high[at] > 0))
        if len(units) == 0:
            continue
        n, before = len(units), slice(0, at.start)
        rows = np.concatenate([net.between[units, before], -net.between[units, before]])
        constant = np.concatenate([net.bias[units], -net.bias[units]])
        image = np.concatenate([net.image[units], -net.image[units]])
        inputs, lines = np.empty_like(rows), Lines.around(low[before], high[before])
        for e in reversed(net.layers[: net.layers.index(at)]):
            a = rows[:, e] + inputs[:, e.stop :] @ net.between[e.stop : at.start, e]
            negative = np.minimum(a, 0)
            constant += negative @ lines.offset[e]
            inputs[:, e] = (a - negative) * lines.lower[e] + negative * lines.upper[e]
        image += inputs @ net.image[before]
        bound = constant + inputs @ net.bias[before] + least(image, c, k)
        bound -= SLACK_64 * (1 + abs(bound))
        low[units], high[units] = np.maximum(low[units], bound[:n]), np.minimum(high[units], -bound[n:])
        if (low > high).any():
            return None
    return low, high


# --- the tree ---------------------------------------------------------------------------------------------------------


class Domain(NamedTuple):
    """A node of the tree: its ``signs`` and ``values`` (U,), the frame it is in (None: the root's bounds), and how
    many splits ago that was made."""

    signs: np.ndarray
    values: np.ndarray
    frame: Frame | None = None
    age: int = 0


def _stack(domains: list[Domain], net: Collapsed):
    """(signs, values, chords) of domains, (S, U) each."""
    signs, values = np.stack([d.signs for d in domains]), np.stack([d.values for d in domains])
    if all(d.frame is None for d in domains):
        return signs, values, None
    frames = [d.frame or net for d in domains]
    return signs, values, (np.stack([f.upper for f in frames]), np.stack([f.offset for f in frames]))


def branch_and_bound(
    chain: Chain, low, high, relus, label: int, rival: int, *, threshold: float = 0.0, start: Found | None = None,
    cpu_limit: float = 60.0, batch: int = 64, steps: int = 8, max_domains: int = 200_000,
    restrict_after: float = np.inf,
) -> Tree:  # fmt: skip
    """Is logit[label] - logit[rival] > threshold for every image in [low, high], (1, H, W, C) float64?

    chain: float64. relus: [(low, high) (1, ...)] as :func:`~nanomr.verify.crown.crown` gives them. ``start``: slopes
    to begin with, (1, ...) each, as from :func:`~nanomr.verify.crown.alpha_crown`. The ``batch`` worst domains are
    split at once, and their children climb for ``steps`` steps. After ``restrict_after`` domains the ReLUs' bounds in
    a domain are drawn in to its images with margin <= threshold (:func:`restrict`): far smaller trees, but their
    proofs no longer fit the proof file; ``leaves`` is None.

    Gives up after ``cpu_limit`` seconds of CPU time (of the whole process), after ``max_domains`` domains (5 bytes of
    memory each for every unstable ReLU), at a bound that is not a number, and at a domain in which every ReLU is split
    if `highspy`, which would decide it, is not installed or its answer lies within rounding of the threshold.
    """
    begin = time.process_time()
    if not all(np.isfinite(side).all() for r in relus for side in r):
        return Tree("timeout", None, np.nan, None, 0, time.process_time() - begin)
    row = margin_rows([label], [rival], chain.classes)
    exact = collapse(chain, low, high, relus, row[0])
    net, box, target, visited = exact.single(), Box.between(low, high), threshold + SLACK, 1
    closed: list[tuple] = []  # (bounds, signs, values) of leaves that float64 has confirmed
    framed = False  # was one of them proved in a frame?
    ends = [_flat(side)[net.units] for side in zip(*relus, strict=True)] if relus else [np.zeros(0)] * 2
    tie, heap = count(), []

    def end(status, bound, image=None):
        leaves = None
        if status == "proved" and not framed:
            leaves = _proof(net, *(np.concatenate(v) for v in list(zip(*closed, strict=True))[1:]))
        return Tree(status, image, float(bound), leaves, visited, time.process_time() - begin)

    def counterexample(y):
        """The image at ``y`` if float64 agrees that its margin is <= threshold, else None."""
        x = np.clip(box.centre + y.reshape(low.shape) * box.radius, low, high)
        return x[0] if inner(row, chain.forward(x)[0])[0] <= threshold else None

    def confirm(domains: list[Domain]):
        """Close what float64 says is proved: which ones (S,), and every float64 bound."""
        nonlocal framed
        signs, values, _ = _stack(domains, net)
        bounds, plain = np.empty(len(domains)), np.array([d.frame is None for d in domains])
        if plain.any():
            proof = _proof(net, signs[plain], values[plain])
            bounds[plain] = leaf_bounds(chain, low, high, relus, label, rival, proof)
        for i in np.flatnonzero(~plain):
            lines, value = Lines.around(domains[i].frame.low, domains[i].frame.high), values[i].astype(np.float64)
            bound = backward(exact, signs[i][None], value[None], (lines.upper[None], lines.offset[None])).bound[0]
            bounds[i] = bound - SLACK_64 * (1 + abs(bound))
        fine = bounds > threshold
        framed |= bool((fine & ~plain).any())
        if fine.any():
            closed.append((bounds[fine], signs[fine], values[fine]))
        return fine, bounds

    def narrow(domain: Domain) -> Domain | Climb | None:
        """``domain`` in a frame of its own; None if that proves it; a Climb that came upon a low margin."""
        nonlocal framed
        sign, value, frame, _ = domain
        known = ends if frame is None else (frame.low, frame.high)
        limit, gap = threshold + SLACK_64 * (1 + abs(threshold)), np.inf
        for _ in range(ROUNDS):
            known = restrict(exact, sign.astype(np.float64), value.astype(np.float64), *known, limit)
            if known is None:
                framed = True
                closed.append((np.array([limit]), sign[None], value[None]))  # margin > limit: none is left
                return None
            frame = Frame.of(*known)
            stable = (sign == 0) & ~((frame.low < 0) & (frame.high > 0))
            sign = np.where(stable, np.where(frame.low >= 0, 1, -1), sign).astype(np.int8)
            value = np.where(stable, 0, value).astype(np.float32)
            chords = frame.upper[None], frame.offset[None]
            found = climb(net, sign[None], value[None], scale, steps, target, chords)
            value = found.values[0]
            if found.margin <= target and counterexample(found.y) is not None:
                return found
            domain = Domain(sign, value, frame)
            if (found.bound[0] > target and confirm([domain])[0][0]) or not found.bound[0] > -np.inf:
                return None if found.bound[0] > target else domain
            if not threshold - found.bound[0] < 0.8 * gap:
                break
            gap = threshold - found.bound[0]
        return domain

    root = Domain(np.zeros(len(net.units), np.int8), net.lower)
    if start is not None:
        root = root._replace(values=_flat(start.slopes)[net.units].astype(np.float32))
    relus_at_start = abs(backward(net, root.signs[None], root.values[None]).relus)
    scale = relus_at_start + 0.1 * relus_at_start.mean() if relus_at_start.size else relus_at_start
    domains = [root]
    found = climb(net, *_stack(domains, net)[:2], scale, 5 * steps, target)
    while True:
        domains = [d._replace(values=value.copy()) for d, value in zip(domains, found.values, strict=True)]
        if found.margin <= target and (image := counterexample(found.y)) is not None:
            return end("candidate", min(found.bound.min(), heap[0][0] if heap else np.inf), image)
        fine, bound = np.zeros(len(domains), bool), found.bound.astype(np.float64)
        if (ready := np.flatnonzero(bound > target)).size:
            fine[ready], bound[ready] = confirm([domains[i] for i in ready])
        bound[np.isnan(bound)] = -np.inf
        for i in np.flatnonzero(~fine):
            heapq.heappush(heap, (float(bound[i]), next(tie), domains[i]))
        if not heap:
            return end("proved", min(b.min() for b, _, _ in closed))
        worst = heap[0][0]
        if not worst > -np.inf or visited >= max_domains or time.process_time() - begin > cpu_limit:
            return end("timeout", worst)
        domains, left = [heapq.heappop(heap)[2] for _ in heap[:batch]], []
        for domain in domains:
            seconds = cpu_limit - (time.process_time() - begin)
            if (domain.signs != 0).all():
                beta, y = _solve_leaf(exact, domain.signs.astype(np.float64), threshold, seconds)
                if y is not None and (image := counterexample(y)) is not None:
                    return end("candidate", worst, image)
                if beta is None or not confirm([domain._replace(values=beta.astype(np.float32))])[0].all():
                    return end("timeout", worst)
            elif visited > restrict_after and (domain.frame is None or domain.age >= AGE) and seconds > 0:
                domain = narrow(domain)
                if isinstance(domain, Climb):
                    return end("candidate", worst, counterexample(domain.y))
                if domain is not None:
                    left.append(domain)
            else:
                left.append(domain)
        if any((d.signs != 0).all() for d in left):  # nothing to branch on: they come again, as linear programs
            for d in [d for d in left if (d.signs != 0).all()]:
                heapq.heappush(heap, (worst, next(tie), d))
            left = [d for d in left if not (d.signs != 0).all()]
        domains = []
        found = Climb(np.zeros(0, np.float32), np.zeros((0, len(net.units)), np.float32), np.inf, net.row_image)
        if left:
            signs, values, chords = _stack(left, net)
            signs, values = branch(net, signs, values, target, chords)
            chords = None if chords is None else [np.repeat(c, 2, 0) for c in chords]
            domains = [Domain(s.copy(), v, left[i // 2].frame, left[i // 2].age + 1)
                       for i, (s, v) in enumerate(zip(signs, values, strict=True))]  # fmt: skip
            visited += len(domains)
            found = climb(net, signs, values, scale, steps, target, chords)
