"""Certified training by linear bounds: each ReLU between two lines, coefficients carried back from the margins to the
image, and the gradient of the bound by every weight. ``docs/derivations/crown_ibp.md``, ``dual.md``, ``predictor.md``.

The verifier's bounds (:mod:`nanomr.verify.bounds.crown`) are the same; these are of a batch in training, batch norms
and all, and go backwards. What a layer is to them (``Lines``, ``Scale``, ``Map``) says what it does to coefficients on
the way ``down`` to the image, and to points on the way ``up`` again.
"""

from typing import NamedTuple

import numpy as np

from ..backend import array_module, to_numpy
from ..batches import Box, NormalizedBox
from ..borders import check_labels
from ..layers import Affine, BatchNorm2d, Layer, Normalize, ReLU, Sequential
from ..losses import cross_entropy, rivals_gain, rivals_gain_backward
from ..models import build, fold
from ..ops import ops_for
from . import certified

ROWS = 2048  # so many rows are carried at once: their coefficients are arrays of as many images


def crown_ibp(model, x, labels, draw, now) -> dict:
    """:func:`nanomr.methods.certified.ibp` with a share of each worst margin by CROWN in the place of intervals: beta,
    which goes from 1 to ``now["beta_end"]`` with the ramp. The bounds of the ReLUs' inputs are intervals. Zhang et al.
    2020; ``docs/derivations/crown_ibp.md``."""
    beta = 1 - (1 - now["beta_end"]) * now["ramp"]
    if beta == 0:
        parts = certified.ibp(model, x, labels, draw, now)
        return parts | {"bounds": parts.pop("interval")}
    return _worst_margins(model, x, labels, now, adaptive, beta)


def dual(model, x, labels, draw, now) -> dict:
    """kappa CE(clean) + (1 - kappa) CE(worst margins by parallel lines). Wong & Kolter 2018, reduced: ReLU layers of
    more than ``most`` units have intervals as bounds. ``docs/derivations/dual.md``."""
    parts = _worst_margins(model, x, labels, now | {"balance": 0}, parallel, most=int(now["most"]))
    del parts["balance"]
    return parts


def predictor(model, x, labels, draw, now) -> dict:
    """The same by lines whose slopes a small network predicts that is trained along. Dvijotham et al. 2018, reduced:
    ``docs/derivations/predictor.md``."""
    parts = _worst_margins(model, x, labels, now | {"balance": 0}, predicted)
    del parts["balance"]
    return parts


def _worst_margins(model, x, labels, now, slopes, beta=1.0, most=0) -> dict:
    """kappa CE(clean) + (1 - kappa) CE(beta of the worst margins by lines, 1 - beta of those by intervals) + Shi's
    regulariser, as ``now`` has it; gradients are added."""
    labels, n, xp = check_labels(labels, len(x)), len(x), array_module(x)
    kappa, box = 1 - (1 - now["kappa"]) * now["ramp"], certified.box_around(x, now["eps"])
    tap = certified.balance(model, certified.entered(model, x, now["eps"], box)[1], now)
    network = Relaxed(model, box, slopes, most, tap)
    features, last = network.features, network.steps[-1].layer
    logits, at_last = last.forward(features.points)
    classes, rows = logits.shape[1], xp.arange(n)[:, None]
    unit, rivals = xp.eye(classes, dtype=x.dtype), (labels[:, None] + xp.arange(1, classes)) % classes
    low, _, record = network.bounds(unit[labels][:, None] - unit[rivals])
    worst = xp.zeros_like(logits[n:])
    worst[rows, rivals] = -beta * low
    if beta < 1:
        gain = rivals_gain(features.radius, last.params["weight"], labels)
        worst += (1 - beta) * (logits[n:] + gain)
    clean, d_clean = cross_entropy(logits[:n], labels)
    bounds, d_worst = cross_entropy(worst, labels)
    d_worst *= 1 - kappa
    network.bounds_backward(record, -beta * d_worst[rows, rivals], 0 * low)
    d_worst *= 1 - beta
    points, radius = last.backward(xp.concatenate([kappa * d_clean, d_worst]), at_last), xp.zeros_like(features.radius)
    if beta < 1:
        radius, d_weight = rivals_gain_backward(d_worst, features.radius, last.params["weight"], labels)
        last.accumulate(weight=d_weight)
    network.backward(Box(points, radius))
    balance = tap.value if tap else 0.0
    loss = kappa * clean + (1 - kappa) * bounds + (tap.weight * balance if tap else 0.0)
    return {"loss": loss, "cross_entropy": clean, "bounds": bounds, "balance": balance}


# --- slopes of the lines below: (they, the way back to those of the chords, which are the lines above) ----------------


def adaptive(layer, chord):
    """CROWN's: 0 or 1, by which the smaller area is wasted. They do not move."""
    return (chord > 0.5).astype(chord.dtype), lambda d: 0


def parallel(layer, chord):
    """Wong & Kolter's: the chord's."""
    return chord, lambda d: d


def predicted(layer, chord):
    """The chord's, moved on the logistic scale by weight (2 chord - 1) + bias, which ``layer`` learns per channel."""
    xp, t, (weight, bias) = array_module(chord), 2 * chord - 1, layer.params["predictor"]
    shift = weight * t + bias
    small, falls = xp.maximum(xp.exp(-abs(shift)), 1e-12), shift < 0  # no 0 / 0
    top, rest = xp.where(falls, chord * small, chord), xp.where(falls, 1 - chord, (1 - chord) * small)
    slope = top / (top + rest)

    def backward(d):
        d_shift, channels = d * slope * (1 - slope), tuple(range(chord.ndim - 1))
        layer.accumulate(predictor=xp.stack([(d_shift * t).sum(channels), d_shift.sum(channels)]))
        return d * small / (top + rest) ** 2 + 2 * weight * d_shift

    return slope, backward


def begin_predictor(model, generator: np.random.Generator):
    """:func:`nanomr.methods.certified.begin`, and what :func:`predicted` learns in every ReLU layer: at 0, which makes
    Wong & Kolter's lines."""
    certified.begin(model, generator)
    channels = 1
    for _, layer in model.walk():
        if "weight" in layer.params:
            channels = layer.params["weight"].shape[-1]
        elif isinstance(layer, ReLU):
            layer.params["predictor"] = np.zeros((2, channels), np.float32)
    model._settled()


def finish_predictor(model):
    """The network by itself, batch norms folded."""
    plain = build(model.architecture).astype(model.dtype)
    names = plain.state_dict()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    return fold(plain.to("cpu" if array_module(model.weights) is np else "gpu"))


# --- the three kinds of steps -----------------------------------------------------------------------------------------


class Lines:
    """lower z <= relu(z) <= upper z + offset for low <= z <= high, all (N, ...): above the chord, below what ``slopes``
    say. A ReLU that is on (off) there is the line z (0).

    ``gradients``: by lower, upper and offset, to which every pass through the lines adds.
    """

    def __init__(self, layer, low, high, slopes):
        self.low, self.high = low, high
        self.upper, self.offset = ops_for(low).chord(low, high)
        self.lower, self.slopes_backward = slopes(layer, self.upper)  # of a slope of 0 or 1 all make the same
        self.gradients = [array_module(low).zeros_like(low) for _ in range(3)]

    def down(self, a, at):
        return ops_for(a).lines_down(a, self.lower[at], self.upper[at], self.offset[at])

    def up(self, z, a, low, high, at):
        z, *found = ops_for(a).lines_up(z, a, low, high, self.lower[at], self.upper[at], self.offset[at])
        for gradient, part in zip(self.gradients, found, strict=True):
            gradient[at] += part
        return z

    def backward(self):
        """The gradients by (low, high); what the slopes learn is added to their layer's."""
        d_lower, d_upper, d_offset = self.gradients
        d_upper = d_upper + self.slopes_backward(d_lower)  # where a ReLU is on or off, nothing comes of it
        return ops_for(self.low).chord_backward(d_upper, d_offset, self.low, self.high)


class Scale:
    """A batch norm, scale z + shift per channel by the clean batch's statistics; the gradients by both add up."""

    def __init__(self, norm, cache):
        box, self.mean, self.inv_std, _ = cache
        self.norm, self.clean = norm, box.points[: len(box.radius)]
        self.scale = norm.params["weight"] * self.inv_std
        self.shift = norm.params["bias"] - self.mean * self.scale
        self.d_scale, self.d_shift = 0 * self.scale, 0 * self.scale  # arrays, even where no row comes up

    def down(self, a, at):
        rows, constant = ops_for(a).scale_down(a, self.scale, self.shift)
        return rows, constant, constant

    def up(self, z, a, low, high, at):
        z, d_scale, d_shift = ops_for(a).scale_up(z, a, low + high, self.scale, self.shift)
        self.d_scale, self.d_shift = self.d_scale + d_scale, self.d_shift + d_shift
        return z

    def backward(self):
        """The gradient by the clean batch, whose mean and variance move it; the parameters' is added to the norm's."""
        d_weight = self.inv_std * (self.d_scale - self.mean * self.d_shift)
        self.norm.accumulate(weight=d_weight, bias=self.d_shift)
        args = self.norm.params["weight"], self.mean, self.inv_std, d_weight, self.d_shift
        return ops_for(self.clean).batchnorm_backward(0 * self.clean, self.clean, *args)


class Map:
    """An affine layer. ``like``: an input of it (1, ...)."""

    def __init__(self, layer, like):
        self.layer, self.like = layer, like
        self.at_zero = layer.apply(0 * like) if "bias" in layer.params or layer.buffers else None

    def down(self, a, at):
        constant = 0.0 if self.at_zero is None else _inner(a, self.at_zero)
        rows = a.reshape(-1, *a.shape[2:])
        like = array_module(a).broadcast_to(self.like, (len(rows), *self.like.shape[1:]))
        return self.layer.transpose(rows, like).reshape(*a.shape[:2], *self.like.shape[1:]), constant, constant

    def up(self, z, a, low, high, at):
        rows = z.reshape(-1, *z.shape[2:])
        if self.layer.params:
            self.layer.accumulate_from(rows, a.reshape(-1, *a.shape[2:]), bias=False)
        z = self.layer.apply(rows, bias=False).reshape(*z.shape[:2], *a.shape[2:])
        if "bias" in self.layer.params:
            bias = self.layer.params["bias"]
            z, _, d_bias = ops_for(a).scale_up(z, a, low + high, array_module(a).ones_like(bias), bias)
            self.layer.accumulate(bias=d_bias)
            return z
        return z if self.at_zero is None else z + _times(low + high, self.at_zero)


class Units:
    """The affine ``steps`` on top, for rows that begin as single units: each unit's goes down them but once, for all
    images, and on the way up its points of all images are added first. ``one`` (1, U, ...): the rows of all units.

    Where other steps have rows ``a`` (N, R, ...), these have which units they are, (N, R) ints, no image's twice.
    """

    def __init__(self, steps, one):
        xp = array_module(one)
        self.steps, self.coefficients, constant = steps, [], xp.zeros(one.shape[:2], one.dtype)
        for step in reversed(steps):
            self.coefficients.insert(0, one)
            one, more, _ = step.known.down(one, slice(None))
            constant = constant + more
        self.rows, self.constants = one[0], constant[0]
        self.points, self.total = xp.zeros_like(one), xp.zeros_like(constant)

    def down(self, units, at):
        constant = self.constants[units]
        return self.rows[units], constant, constant

    def up(self, z, units, low, high, at):
        for of, points, total in zip(units, z, low + high, strict=True):
            self.points[0, of] += points
            self.total[0, of] += total

    def backward(self):
        """Add what all :meth:`up` have left to the gradients of the steps."""
        z = self.points
        for step, a in zip(self.steps, self.coefficients, strict=True):
            z = step.known.up(z, a, self.total, 0 * self.total, slice(None))  # to affine maps low and high are one


def _inner(a, b):
    """(N, R): the sums of the products of a (N, R, ...) with b (N, ...); either N may be 1."""
    flat = a.reshape(*a.shape[:2], -1), b.reshape(len(b), -1)
    return array_module(a).einsum("nri,ni->nr", *flat)  # not by BLAS: see reference.rivals_gain


def _times(g, b):
    """(N, R, ...): g (N, R) times b (N, ...)."""
    return g.reshape(*g.shape, *(1,) * (b.ndim - 1)) * b[:, None]


# --- the network ------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    layer: Layer
    known: Lines | Scale | Map
    cache: object = None  # of the layer's forward pass, on a box
    found: tuple | None = None  # of a ReLU layer with linear bounds of its own: see Relaxed._better


class Relaxed:
    """``model`` in training, in a ``box`` of N images, [x; centres] and radii: boxes go forwards and leave lines around
    every ReLU, by which linear functions of what is above go back to the box.

    ``slopes``: :func:`adaptive`, :func:`parallel`, :func:`predicted`. ReLU layers of at most ``most`` units, but the
    first, whose intervals are exact, have bounds by lines, too (parallel ones); the better of the two count, for what
    is above as well. ``features``: the last layer's box. ValueError for a layer that is neither affine, nor a batch
    norm, nor a ReLU.
    """

    def __init__(self, model, box, slopes, most=0, tap=None):
        (body, last), self.steps = certified.halves(model), []
        self.centre, self.radius = box.points[len(box.radius) :], box.radius
        xp, z = array_module(box.radius), box
        for layer in _flat(body):
            if isinstance(layer, Normalize) and not self.steps:
                z, _ = layer.forward(z)
                self.centre, self.radius = z.points[len(z.radius) :], z.radius
            elif isinstance(layer, ReLU):
                c, r, found = z.points[len(z.radius) :], z.radius, None
                low, high = c - r, c + r
                if c[0].size <= most and any(isinstance(step.known, Lines) for step in self.steps):
                    low, high, found = self._better(low, high)
                    z = Box(xp.concatenate([z.points[: len(c)], 0.5 * (low + high)]), 0.5 * (high - low))
                z, cache = layer.forward(z, train=True, tap=tap)
                self.steps.append(Step(layer, Lines(layer, low, high, slopes), cache, found))
            else:
                like = z.points[:1]
                z, cache = layer.forward(z, train=True)
                norm, z = isinstance(layer, BatchNorm2d), z.full() if isinstance(z, NormalizedBox) else z
                self.steps.append(Step(layer, Scale(layer, cache) if norm else Map(layer, like), cache))
        self.features = z
        self.steps.append(Step(last, Map(last, z.points[:1])))

    def _better(self, low, high):
        """The bounds (N, ...) of the last step's output, those of unstable units made better by lines; and what
        :meth:`_at_relu` needs: the units, and of each group of images which units (n, R) of which images, where lines
        are better below and above, the record; None where all are stable. A group's images have nearly as many
        unstable units as each other: few rows are in vain."""
        xp, shape, n, groups = array_module(low), low.shape, len(low), []
        top = 1 + max(i for i, step in enumerate(self.steps) if isinstance(step.known, Lines))
        low, high = low.reshape(n, -1).copy(), high.reshape(n, -1).copy()
        unstable = (low < 0) & (high > 0)
        counts = to_numpy(unstable.sum(1))
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        if not len(order):
            return low.reshape(shape), high.reshape(shape), None
        one = Units(self.steps[top:], xp.eye(low[0].size, dtype=low.dtype).reshape(1, -1, *shape[1:]))
        down = [*(step.known for step in self.steps[:top]), one]
        while len(order):
            most = int(counts[order[0]])
            size = np.count_nonzero(8 * counts[order] >= 7 * most)
            images, order = xp.asarray(order[:size]), order[size:]
            units = xp.argsort(~unstable[images], axis=1, kind="stable")[:, :most]  # and stable ones, to be even
            at = images[:, None], units
            low_too, high_too, record = self.bounds(units, images, down)
            by_low, by_high = unstable[at] & (low_too > low[at]), unstable[at] & (high_too < high[at])
            low[at], high[at] = xp.where(by_low, low_too, low[at]), xp.where(by_high, high_too, high[at])
            groups.append((at, by_low, by_high, record))
        return low.reshape(shape), high.reshape(shape), (one, groups)

    def bounds(self, a, images=None, down=None):
        """(low, high, record): low (n, R) <= a z over the box, z the output of the last step there is, a (n, R, ...) of
        these ``images`` of the box, all by default. Where all lines are parallel, a z <= high; where they are not, it
        means nothing. ``down``: what the rows go down, all steps by default."""
        xp, size = array_module(a), max(1, ROWS // a.shape[1])
        down = [step.known for step in self.steps] if down is None else down
        parts = [slice(i, i + size) for i in range(0, len(a), size)]
        of = parts if images is None else [images[part] for part in parts]
        found = [self._down(a[part], at, down) for part, at in zip(parts, of, strict=True)]
        low, high, record = zip(*found, strict=True)
        return xp.concatenate(low), xp.concatenate(high), (down, list(zip(parts, of, record, strict=True)))

    def _down(self, a, at, down):
        low, high, record = 0.0, 0.0, []
        for known in reversed(down):
            record.append(a)
            a, *constants = known.down(a, at)
            low, high = low + constants[0], high + constants[1]
        least, largest = ops_for(a).lines_reach(a, self.centre[at], self.radius[at])
        return low + least, high + largest, (a, record[::-1])

    def bounds_backward(self, record, d_low, d_high):
        """Add what the gradients by :meth:`bounds`, (N, R) each, make of all others.

        A bound is the value of the network with lines in the place of ReLUs at the worst corner: an ordinary pass goes
        up from there, and the coefficients are the upstream gradients. Points are weighted from the start, the corners
        of low and of high added.
        """
        xp, (down, parts) = array_module(d_low), record
        for part, at, (at_box, coefficients) in parts:
            low, high = d_low[part], d_high[part]
            moving = (low != 0) | (high != 0)
            most = int(moving.sum(1).max())
            if most == 0:
                continue
            some = slice(None)
            if most < low.shape[1]:  # of the other rows nothing comes
                some = xp.arange(len(low))[:, None], xp.argsort(~moving, axis=1, kind="stable")[:, :most]
            low, high = low[some], high[some]
            z = ops_for(low).lines_corner(at_box[some], low, high, self.centre[at], self.radius[at])
            for known, a in zip(down, coefficients, strict=True):
                z = known.up(z, a[some], low, high, at)

    def backward(self, dz):
        """Add what the gradient by ``features`` makes, and all that :meth:`bounds_backward` has left at the steps."""
        learns = [bool(step.layer.params) for step in self.steps]
        for i in reversed(range(len(self.steps) - 1)):
            layer, known, cache, found = self.steps[i]
            dz = layer.backward(dz, cache, input_grad=any(learns[:i]))
            if isinstance(known, Scale):
                d_clean = known.backward()
                if dz is not None:
                    dz.points[: len(d_clean)] += d_clean
            elif isinstance(known, Lines):
                dz = self._at_relu(known, dz, found)
            if dz is None:
                return

    def _at_relu(self, lines, dz, found):
        """The gradient by a ReLU layer's box as it came, from that by the box that it was given."""
        by_low, by_high = lines.backward()
        if dz is None:
            return None
        n, shape, c, r = len(by_low), by_low.shape, dz.points[len(by_low) :], dz.radius
        if found is None:  # all of it is the intervals'
            c += by_low + by_high
            return Box(dz.points, r + (by_high - by_low))
        ends, (one, groups) = [d.reshape(n, -1) for d in (by_low + 0.5 * (c - r), by_high + 0.5 * (c + r))], found
        for at, *better, record in groups:
            self.bounds_backward(record, *(d[at] * lines_are for d, lines_are in zip(ends, better, strict=True)))
            for d, lines_are in zip(ends, better, strict=True):
                d[at] *= ~lines_are
        one.backward()
        d_low, d_high = (d.reshape(shape) for d in ends)
        c[...] = d_low + d_high
        return Box(dz.points, d_high - d_low)


def _flat(layer):
    """The layers in a chain of Sequentials, in order. ValueError for one that lines have no rule for."""
    for child in layer.children.values():
        if isinstance(child, Sequential):
            yield from _flat(child)
        elif isinstance(child, Affine | BatchNorm2d | ReLU):
            yield child
        else:
            raise ValueError(f"linear bounds take a chain of affine layers, batch norms and ReLUs, not {child}")
