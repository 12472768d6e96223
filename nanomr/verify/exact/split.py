"""Branch and bound on the input, for networks with few inputs. ``docs/derivations/input_split.md``.

A box is cut in two along an input until linear bounds exclude every part. In a small box few ReLUs are unstable, and
the network is affine in the inputs and those ReLUs' outputs: CROWN on that collapsed network costs microseconds.
"""

import time
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ...ops.cpu.flags import FLAGS, kernel
from ..chain import Chain
from .bab import Tree

MOST_INPUTS = 12  # that are free: more are not for this search
MOST_NUMBERS = 2**23  # in the maps' matrices; 64 MB
MOST_RELUS = 1500  # all of them unstable, a box takes seconds
BATCH = 512  # boxes at once, at most; fewer where they take longer than SECONDS
SECONDS = 0.2
GRID = 4096  # points at first, about
STEPS, CLIMBERS = (0.1, 0.05, 0.025, 0.012, 0.006, 0.003), 16  # of the box's sides; points that take them
TOPS, SWEEPS = 4, 2  # slopes that are improved in turn, and how often
SLACK = 1e-12  # a bound must be above the threshold by this share of all that was added up: more than the checker's


# --- one box ----------------------------------------------------------------------------------------------------------


class Units(NamedTuple):
    """The unstable ReLUs of a box as they are found: ``low``, ``high`` of the input z; lower z <= relu(z) <=
    upper z + offset; z = rows . (the inputs' offsets from the box's centre, the outputs of the first ``before`` units)
    + constant; its ``number`` among all ReLUs."""

    low: np.ndarray
    high: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    offset: np.ndarray
    constant: np.ndarray
    before: np.ndarray
    number: np.ndarray
    rows: np.ndarray


@kernel(**FLAGS)
def _carry(row, constant, count, inputs, units):
    """``row`` (on the inputs and ``count`` units' outputs), in place, on the inputs alone: a lower bound of it, by the
    units' lines; its constant."""
    for u in range(count - 1, -1, -1):
        a = row[inputs + u]
        if a != 0:
            slope = units.lower[u] if a > 0 else units.upper[u]
            if not a > 0:
                constant += a * units.offset[u]
            if slope != 0:
                constant += a * slope * units.constant[u]
                for t in range(inputs + units.before[u]):
                    row[t] += a * slope * units.rows[u, t]
    return constant


@kernel(**FLAGS)
def _least(row, constant, radius):
    for d in range(len(radius)):
        constant -= abs(row[d]) * radius[d]
    return constant


@kernel(**FLAGS)
def _mix(weight, rows, constants, row):
    """The sum of rows, weighted, into ``row``; its constant."""
    constant = 0.0
    row[:] = 0
    for i in range(len(weight)):
        if weight[i] > 0:
            constant += weight[i] * constants[i]
            for t in range(len(row)):
                row[t] += weight[i] * rows[i, t]
    return constant


@kernel(**FLAGS)
def _line_search(row, constant, change, change_of_constant, radius, most, best):
    """(t in [0, most] at which the least of row + t change in the box is largest, that): piecewise linear, so a kink or
    an end. ``best``: what is there at t = 0, or so far."""
    at = 0.0
    for kink in range(len(radius) + 1):
        t = most
        if kink < len(radius):
            if change[kink] == 0:
                continue
            t = -row[kink] / change[kink]
        if 0 < t <= most:
            value = constant + t * change_of_constant
            for d in range(len(radius)):
                value -= abs(row[d] + t * change[d]) * radius[d]
            if value > best:
                best, at = value, t
    return at, best


@kernel(**FLAGS)
def _choose_weights(coefficients, constants, radius, weight, row, change):
    """Climb: move ``weight`` (M,), which adds up to 1, between two rows at a time; the bound of the weighted sum."""
    inputs = len(radius)
    constant = _mix(weight, coefficients, constants, row)
    best = _least(row, constant, radius)
    for _ in range(4):
        old = best
        for i in range(len(weight)):
            for j in range(len(weight)):
                if i != j and weight[j] > 0:
                    for d in range(inputs):
                        change[d] = coefficients[i, d] - coefficients[j, d]
                    t, best = _line_search(row, constant, change, constants[i] - constants[j], radius, weight[j], best)
                    if t > 0:
                        weight[i] += t
                        weight[j] -= t
                        constant += t * (constants[i] - constants[j])
                        for d in range(inputs):
                            row[d] += t * change[d]
        if best <= old + 1e-9 * abs(old):
            break
    return best


@kernel(**FLAGS)
def _improve(z, z_constant, count, units, radius, weight, coefficients, constants, changed, best, scratch):
    """Climb in the lower slopes of the few units that err most, and in the weights, in turn; the bound."""
    inputs, columns = len(radius), z.shape[1]
    row, off, on, gap = scratch[0, :columns], scratch[1, :columns], scratch[2, :columns], scratch[3, :count]
    for _ in range(SWEEPS):
        old = best
        constant = _mix(weight, z, z_constant, row)
        _carry(row, constant, count, inputs, units)
        for u in range(count):
            gap[u] = row[inputs + u] * min(units.high[u], -units.low[u])
        for _ in range(min(TOPS, count)):
            u = np.argmax(gap)
            if not gap[u] > 0:
                break
            gap[u], before = 0, units.lower[u]
            units.lower[u] = 0
            a = _mix(weight, z, z_constant, off)
            a = _carry(off, a, count, inputs, units)
            units.lower[u] = 1
            b = _mix(weight, z, z_constant, on)
            b = _carry(on, b, count, inputs, units)
            for d in range(inputs):
                on[d] -= off[d]
            t, found = _line_search(off, a, on, b - a, radius, 1.0, _least(off, a, radius))
            units.lower[u] = before
            if found > best:
                best, units.lower[u], changed[u] = found, np.float64(np.float32(t)), True
        if len(weight) > 1 and not best > 0:
            for i in range(len(weight)):
                row[:] = z[i]
                constants[i] = _carry(row, z_constant[i], count, inputs, units)
                coefficients[i] = row[:inputs]
            best = _choose_weights(coefficients, constants, radius, weight, off, on)
        if best > 0 or best <= old + 1e-3 * abs(old):
            break
    return best


@kernel(**FLAGS)
def _product(weight, bias, active, columns, a, a_constant, z, z_constant):
    """z[:, :columns] = weight[:, active] a[active, :columns], with the constants."""
    n = len(active) - len(active) % 4
    for i in range(len(weight)):
        total, row = bias[i], z[i, :columns]
        row[:] = 0
        for q in range(0, n, 4):
            j0, j1, j2, j3 = active[q], active[q + 1], active[q + 2], active[q + 3]
            w0, w1, w2, w3 = weight[i, j0], weight[i, j1], weight[i, j2], weight[i, j3]
            total += w0 * a_constant[j0] + w1 * a_constant[j1] + w2 * a_constant[j2] + w3 * a_constant[j3]
            for t in range(columns):
                row[t] += w0 * a[j0, t] + w1 * a[j1, t] + w2 * a[j2, t] + w3 * a[j3, t]
        for q in range(n, len(active)):
            j = active[q]
            total += weight[i, j] * a_constant[j]
            for t in range(columns):
                row[t] += weight[i, j] * a[j, t]
        z_constant[i] = total


@kernel(**FLAGS)
def _bound_of_unit(row, constant, count, radius, units, scratch):
    """(low, high) of a ReLU's input: the unstable outputs below it anywhere in [0, high]; CROWN, if that leaves it
    unstable."""
    inputs = len(radius)
    low = high = constant
    for d in range(inputs):
        low -= abs(row[d]) * radius[d]
        high += abs(row[d]) * radius[d]
    for u in range(count):
        if row[inputs + u] > 0:
            high += row[inputs + u] * units.high[u]
        else:
            low += row[inputs + u] * units.high[u]
    if count and low < 0 < high:
        scratch[:] = row
        bound = _carry(scratch, constant, count, inputs, units)
        low = max(low, _least(scratch, bound, radius))
        if low < 0:
            scratch[:] = -row
            bound = _carry(scratch, -constant, count, inputs, units)
            high = min(high, -_least(scratch, bound, radius))
    return low, high


@kernel(**FLAGS)
def _bound_all(low, high, widths, numbers, biases, units, bound, rows, weights, slopes, score):
    """The bound of every box [low, high] (S, D): of weights . (the last map's output), where a choice of ``weights``
    (S, M) and of ``slopes`` (S, R), NaN where they are as always, is made for it; into ``bound`` (S,), with the linear
    function's coefficients ``rows`` (S, D); and a ``score`` (S, D) for each input: how much a cut there would help.

    widths: of the inputs and each map's output; numbers, biases: of all maps, in a row.
    """
    maps, inputs, widest = len(widths) - 1, low.shape[1], widths[1:].max()
    a, z = np.zeros((widest, units.rows.shape[1])), np.zeros((widest, units.rows.shape[1]))
    a_constant, z_constant, scratch = np.zeros(widest), np.zeros(widest), np.zeros((4, units.rows.shape[1]))
    active, unstable = np.zeros(widest, np.int64), np.zeros(widest, np.int64)
    coefficients, constants = np.zeros((widths[-1], inputs)), np.zeros(widths[-1])
    changed = np.zeros(len(units.low), np.bool_)
    for s in range(len(low)):
        radius, centre = 0.5 * (high[s] - low[s]), 0.5 * (low[s] + high[s])
        count = before = at = bias_at = relu = on = off = 0
        for k in range(maps):
            n, m = widths[k + 1], widths[k]
            weight, bias = numbers[at : at + n * m].reshape(n, m), biases[bias_at : bias_at + n]
            columns, last = inputs + count, k == maps - 1
            if k == 0:
                z[:n, :inputs] = weight
                for i in range(n):
                    z_constant[i] = bias[i]
                    for d in range(inputs):
                        z_constant[i] += weight[i, d] * centre[d]
            else:
                _product(weight, bias, active[:on], inputs + before, a, a_constant, z, z_constant)
                for q in range(off):
                    for i in range(n):
                        z[i, inputs + before + q] = weight[i, unstable[q]]
            if last:
                break
            on = off = 0
            before = count
            for i in range(n):
                row = z[i, :columns]
                least, most = _bound_of_unit(row, z_constant[i], before, radius, units, scratch[0, :columns])
                if least >= 0:
                    active[on] = i
                    on += 1
                elif not most <= 0:
                    unstable[off] = i
                    off += 1
                    upper = most / (most - least)
                    units.low[count], units.high[count] = least, most
                    units.lower[count] = 1.0 if most > -least * (1 + 1e-6) else 0.0  # a tie rounds nowhere
                    units.upper[count], units.offset[count] = upper, -least * upper
                    units.constant[count], units.before[count] = z_constant[i], before
                    units.number[count], changed[count] = relu + i, False
                    units.rows[count, :columns] = row
                    count += 1
            a, z, a_constant, z_constant = z, a, z_constant, a_constant
            at, bias_at, relu = at + n * m, bias_at + n, relu + n
        z_rows, row = z[:n, :columns], scratch[0, :columns]
        best, best_row = -np.inf, 0
        for i in range(n):
            row[:] = z_rows[i]
            constants[i] = _carry(row, z_constant[i], count, inputs, units)
            coefficients[i] = row[:inputs]
            value = _least(row, constants[i], radius)
            if value > best:
                best, best_row = value, i
        weights[s] = 0
        weights[s, best_row] = 1
        if n > 1 and not best > 0:
            best = _choose_weights(coefficients, constants, radius, weights[s], scratch[1], scratch[2])
        if count and not best > 0:
            _improve(
                z_rows, z_constant, count, units, radius, weights[s], coefficients, constants, changed, best, scratch
            )
        for i in range(n):
            weights[s, i] = np.float32(weights[s, i])  # as the proof has them
        constant = _carry(row, _mix(weights[s], z_rows, z_constant, row), count, inputs, units)
        bound[s] = _least(row, constant, radius)
        rows[s], slopes[s], score[s] = row[:inputs], np.nan, 0
        for u in range(count):
            if changed[u]:
                slopes[s, units.number[u]] = units.lower[u]
        if not bound[s] > 0:
            _score(row, count, radius, units, scratch[1], score[s])


@kernel(**FLAGS)
def _score(row, count, radius, units, scratch, score):
    """The errors of the units' lines, shared out to the inputs that move them, most to the one that moves most."""
    inputs = len(radius)
    for u in range(count):
        a = row[inputs + u]
        if a != 0:
            error = a * min(units.high[u], -units.low[u]) if a > 0 else -a * units.offset[u]
            through = scratch[: inputs + units.before[u]]
            through[:] = units.rows[u, : len(through)]
            _carry(through, 0.0, units.before[u], inputs, units)
            total = 0.0
            for d in range(inputs):
                total += abs(through[d]) * radius[d]
            if total > 0:
                for d in range(inputs):
                    score[d] += error * (abs(through[d]) * radius[d] / total) ** 2


# --- the search -------------------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """A chain as matrices: on the inputs that are free in a box alone, with the case's rows as its last map."""

    widths: np.ndarray
    numbers: np.ndarray
    biases: np.ndarray
    maps: list[tuple[np.ndarray, np.ndarray]]

    def forward(self, x):
        """The rows (N, M) at the points x (N, D)."""
        return self._inputs(x)[-1]

    def gradient(self, x):
        """Of the largest row, (N, D)."""
        *inputs, values = self._inputs(x)
        a = np.eye(values.shape[1])[values.argmax(1)] @ self.maps[-1][0]
        for (weight, _), z in zip(reversed(self.maps[:-1]), reversed(inputs), strict=True):
            a = (a * (z > 0)) @ weight
        return a

    def _inputs(self, x):
        inputs = []
        for k, (weight, bias) in enumerate(self.maps):
            x = (np.maximum(x, 0) if k else x) @ weight.T + bias
            inputs.append(x)
        return inputs


def suits(chain: Chain, low, high) -> bool:
    """Has [low, high] few enough free inputs, and the chain few enough numbers, for :func:`search`?"""
    sizes = [int(np.prod(shape)) for shape in (chain.input_shape, *chain.relu_shapes, (chain.classes,))]
    numbers = sum(a * b for a, b in pairwise(sizes))
    fits = numbers <= MOST_NUMBERS and sum(sizes[1:-1]) <= MOST_RELUS
    return fits and int((np.asarray(low) < np.asarray(high)).sum()) <= MOST_INPUTS


def dense(chain: Chain, low, free, rows, offsets) -> Dense:
    """The chain of rows . logits + offsets at the flat inputs ``free``, the others as they are in ``low``."""
    maps = []
    for k, stage in enumerate(chain.stages):
        n = int(np.prod(stage.out_shape))
        weight = stage.transpose(np.eye(n).reshape(n, *stage.out_shape)).reshape(n, -1)
        bias = stage.bias.ravel()
        if k == 0:
            bias = bias + np.delete(weight, free, 1) @ np.delete(np.ravel(low), free)
            weight = weight[:, free]
        maps.append((weight, bias))
    weight, bias = maps[-1]
    maps[-1] = rows @ weight, rows @ bias + offsets
    widths = np.array([len(free), *(len(bias) for _, bias in maps)])
    return Dense(widths, np.concatenate([w.ravel() for w, _ in maps]), np.concatenate([b for _, b in maps]), maps)


def _size(net: Dense, low, high) -> float:
    """What a pass through all maps adds up, in absolute values, in the box at most."""
    size = total = np.maximum(abs(low), abs(high))
    for weight, bias in net.maps:
        size = abs(weight) @ size + abs(bias)
        centre, radius = 0.5 * (low + high), 0.5 * (high - low)
        centre, radius = weight @ centre + bias, abs(weight) @ radius
        low, high = np.maximum(centre - radius, 0), np.maximum(centre + radius, 0)
        total, size = size, np.minimum(size, high)
    return float(total.max())


class Leaves:
    """The nodes of a tree of boxes as its proof file has them (``docs/soundness.md``): at first a root alone."""

    def __init__(self, free):
        self.free, self.nodes = free, 1
        self.parents, self.splits, self.cuts = [np.array([-1])], [np.array([0])], [np.zeros(1)]
        self.closed: list[tuple] = []  # (nodes, weights, slopes) of leaves

    def split(self, parents, dimensions, cuts):
        """The numbers (2, S) of the nodes' children: below the cut, and above it."""
        numbers = self.nodes + np.arange(2 * len(parents)).reshape(2, -1)
        self.nodes += numbers.size
        self.parents.append(np.tile(parents, 2))
        self.splits.append(np.concatenate([-(self.free[dimensions] + 1), self.free[dimensions] + 1]))
        self.cuts.append(np.tile(cuts, 2))
        return numbers

    def close(self, nodes, weights, slopes):
        row, unit = np.nonzero(slopes == slopes)
        self.closed.append((nodes, weights.astype(np.float32), row, unit, slopes[row, unit].astype(np.float32)))

    def arrays(self) -> dict[str, np.ndarray]:
        nodes, weights = (np.concatenate([part[i] for part in self.closed]) for i in (0, 1))
        sizes = np.cumsum([0, *(len(part[0]) for part in self.closed)])
        row, unit, slope = (
            np.concatenate(
                [part[i] + (first if i == 2 else 0) for part, first in zip(self.closed, sizes[:-1], strict=True)]
            )
            for i in (2, 3, 4)
        )
        order = np.argsort(nodes)
        place = np.argsort(order)[row]
        by_place = np.argsort(place, kind="stable")
        return {
            "parent": np.concatenate(self.parents).astype(np.int32),
            "split": np.concatenate(self.splits).astype(np.int32),
            "cut": np.concatenate(self.cuts),
            "weights": weights[order],
            "slope_start": np.append(0, np.cumsum(np.bincount(place, minlength=len(nodes)))).astype(np.int32),
            "slope_unit": unit[by_place].astype(np.int32),
            "slope_value": slope[by_place],
        }


def search(
    chain: Chain, low, high, rows, offsets, *, threshold: float = 0.0, cpu_limit: float = 60.0,
    max_domains: int = 5_000_000,
) -> Tree:  # fmt: skip
    """Has every X in [low, high] a row with rows . logits + offsets > threshold?

    chain: float64. low, high (1, H, W, C) float64; rows (M, K), offsets (M,). "proved": yes. "candidate": ``image``
    (H, W, C), in the box, has none above the threshold; its numbers are float32's where such a number is in the box.
    "timeout": after ``cpu_limit`` seconds of CPU time (of the whole process) or ``max_domains`` boxes, at a bound that
    is not a number, and at a box too small to be cut. ``bound``: the least, over the parts of the box, of a weighted
    mean of the rows. Raises ValueError where :func:`suits` says no, and for rows and offsets that do not fit.
    """
    begin = time.process_time()
    rows, offsets = np.asarray(rows, np.float64), np.asarray(offsets, np.float64)
    if rows.ndim != 2 or rows.shape[1] != chain.classes or offsets.shape != (len(rows),) or not len(rows):
        raise ValueError(f"rows must be (M, {chain.classes}) and offsets (M,), not {rows.shape} and {offsets.shape}")
    if not suits(chain, low, high):
        raise ValueError("a search by cutting inputs is for networks with few of them")
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    free = np.flatnonzero(low.ravel() < high.ravel())
    free = free if len(free) else np.zeros(1, int)  # a box of one point has a dimension, too
    net = dense(chain, low, free, rows, offsets - threshold)
    boxes = Open(np.zeros(1, int), np.array([-np.inf]), low.ravel()[None, free], high.ravel()[None, free])
    slack = SLACK * (1 + abs(threshold) + _size(net, boxes.low[0], boxes.high[0]))
    units, leaves = _room(int(net.widths[1:-1].sum()), len(free)), Leaves(free)
    visited, least, batch = 0, np.inf, 1

    def end(status, image=None):
        proof = leaves.arrays() if status == "proved" else None
        bound = min(least, boxes.bound.min(initial=np.inf)) + threshold
        return Tree(status, image, float(bound), proof, visited, time.process_time() - begin)

    if not all(np.isfinite(v).all() for v in (net.numbers, net.biases, boxes.low, boxes.high, slack)):
        return end("timeout")
    while len(boxes.node):
        if time.process_time() - begin >= cpu_limit or visited >= max_domains:
            return end("timeout")
        n, started = min(batch, len(boxes.node)), time.perf_counter()
        old = n // 4 if n < len(boxes.node) else 0  # a few are the oldest: to search widely, too
        now = Open(*(np.concatenate([v[:old], v[len(v) - n + old :]]) for v in boxes))
        rest = Open(*(v[old : len(v) - n + old] for v in boxes))
        visited += n
        found = _bounds(net, units, now.low, now.high)
        mean = found.bound / found.weights.sum(1)
        points = np.concatenate([np.where(found.coefficients > 0, now.low, now.high), 0.5 * (now.low + now.high)])
        if visited == n:
            points = np.concatenate([points, _grid(now.low[0], now.high[0])])
        image = _attack(chain, net, points, low, high, free, rows, offsets - threshold)
        if image is not None:
            return end("candidate", image)
        done = mean > slack
        least = min(least, mean[done].min(initial=np.inf))
        leaves.close(now.node[done], found.weights[done], found.slopes[done])
        now, score, left = Open(*(v[~done] for v in now))._replace(bound=mean[~done]), found.score[~done], ~done
        if left.any():
            children = _cut(now, score, leaves)
            if children is None:
                return end("timeout")
            order = np.argsort(-children.bound, kind="stable")  # the worst last: they are next
            boxes = Open(*(np.concatenate([v, w[order]]) for v, w in zip(rest, children, strict=True)))
        else:
            boxes = rest
        batch = max(1, min(BATCH, 2 * batch if time.perf_counter() - started < SECONDS else batch // 2))
    return end("proved")


class Open(NamedTuple):
    """Boxes that are still to be looked at, (S, D): the nodes' numbers, and the bounds of their parents."""

    node: np.ndarray
    bound: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Found(NamedTuple):
    """What :func:`_bound_all` says of some boxes."""

    bound: np.ndarray
    coefficients: np.ndarray
    weights: np.ndarray
    slopes: np.ndarray
    score: np.ndarray


def _room(relus: int, inputs: int) -> Units:
    """Space for as many units as there may be."""
    numbers, whole = np.zeros((6, relus)), np.zeros((2, relus), int)
    return Units(*numbers, *whole, np.zeros((relus, inputs + relus)))


def _bounds(net: Dense, units: Units, low, high) -> Found:
    n, d = low.shape
    found = Found(np.empty(n), np.empty((n, d)), np.empty((n, net.widths[-1])), np.empty((n, len(units.low))),
                  np.empty((n, d)))  # fmt: skip
    low, high = (np.ascontiguousarray(side) for side in (low, high))
    _bound_all(low, high, net.widths, net.numbers, net.biases, units, *found)
    return found


def _grid(low, high):
    """Points of the box (D,), its corners among them: networks are often lowest on its faces."""
    each = max(2, int(GRID ** (1 / len(low))))
    return np.stack(np.meshgrid(*np.linspace(low, high, each).T, indexing="ij"), -1).reshape(-1, len(low))


def _single(points, low, high):
    """The float32 numbers next to ``points``, where there are any in [low, high]."""
    near = points.astype(np.float32)
    near = np.where(near < low, np.nextafter(near, np.float32(np.inf)), near)
    near = np.where(near > high, np.nextafter(near, np.float32(-np.inf)), near)
    return np.where((near >= low) & (near <= high), near.astype(np.float64), points)


def _attack(chain: Chain, net: Dense, points, low, high, free, rows, offsets):
    """An image at which no row is above 0: one of ``points`` (S, D), or downhill from the lowest of them."""
    ends = low.ravel()[free], high.ravel()[free]
    for step in (*STEPS, 0.0):
        points = _single(points, *ends)
        most = np.nan_to_num(net.forward(points).max(1), nan=np.inf)
        best = np.argsort(most)[:CLIMBERS]
        if most[best[0]] <= 0:
            image = low.copy()
            image.reshape(-1)[free] = points[best[0]]
            return image[0] if (chain.forward(image)[0] @ rows.T + offsets <= 0).all() else None
        points = np.clip(points[best] - step * (ends[1] - ends[0]) * np.sign(net.gradient(points[best])), *ends)
    return None


def _cut(boxes: Open, score, leaves: Leaves) -> Open | None:
    """The halves of each box, cut where the score is highest; None where one is too small for that."""
    middle = boxes.low + 0.5 * (boxes.high - boxes.low)
    possible = (boxes.low < middle) & (middle < boxes.high)
    if not possible.any(1).all():
        return None
    at = np.arange(len(score))
    d = np.where(possible, np.nan_to_num(score, nan=0.0, posinf=0.0), -1).argmax(1)
    low, high, cut = np.tile(boxes.low, (2, 1)), np.tile(boxes.high, (2, 1)), middle[at, d]
    high[at, d] = low[at + len(at), d] = cut
    return Open(leaves.split(boxes.node, d, cut).ravel(), np.tile(boxes.bound, 2), low, high)
