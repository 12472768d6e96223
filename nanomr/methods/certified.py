"""Certified training: cross-entropy of the worst that bounds allow. ``docs/derivations/interval.md``."""

import math

import numpy as np

from .. import rng
from ..backend import array_module
from ..batches import Box, NormalizedBox, PairBatch
from ..borders import check, check_labels
from ..layers import Linear, Normalize, ReLU, Sequential
from ..losses import Hamming, cross_entropy, intrinsic, rivals_gain, rivals_gain_backward
from ..metrics import as_float
from ..ops import ops_for
from .adversarial import attacked, pgd
from .manifold import drawn_corners


def box_around(x, eps) -> Box:
    """The ball of radius eps within [0, 1], [x; its centre], and its radius."""
    check("box_around", "x", x, (...,))
    return Box(*ops_for(x).box_around(x, eps)[:2])


def halves(model):
    """(all layers but the last, the last one). ValueError unless that is linear."""
    *names, last = model.children
    if not isinstance(model.children[last], Linear):
        raise ValueError(f"bounds on margins take a network that ends with a Linear layer, not {model.children[last]}")
    model._settled()
    return Sequential({name: model.children[name] for name in names}), model.children[last]


def entered(body, x, eps, box=None):
    """(What ``body``'s Normalize makes of :func:`box_around`, or of ``box``; its radii's mean; the layers behind it).

    In one pass, where the box is not given.
    """
    children, entry = dict(body.children), None
    if type(next(iter(children.values()), None)) is Normalize:  # not a subclass's, which may do something else
        entry = children.pop(next(iter(children)))
    if box:
        box = entry.forward(box)[0] if entry else box
        return box, box.radius.mean(dtype=np.float64), Sequential(children)
    if entry:
        entry.output_shape(x)
    *box, sums = ops_for(x).box_around(x, eps, *((entry.buffers["mean"], entry.buffers["std"]) if entry else ()))
    return Box(*box), sums.sum() / x.size, Sequential(children)


class Balance:
    """Shi et al.'s (2021) regulariser as a tap: boxes must not grow from the input (radius T0) on, nor their ReLUs be
    mostly on or mostly off. Per ReLU layer relu(tau - T0/T) / tau, and the same of the ratios (below 1) of the sums and
    the variances of the centres that are on and off; the mean over the layers."""

    takes_normalized = True

    def __init__(self, first, layers, weight, tau=0.5):
        self.first, self.layers, self.weight, self.tau, self.value = first, layers, weight, tau, 0.0

    def forward(self, z):
        y, sums = z.relu_and_sums()
        on, on1, on2, off, off1, off2, every, size = map(float, sums)
        total, tau, k, grown = y.radius.size, self.tau, 1 / (self.tau * self.layers), 0.0
        mean, size = every / total, size / total
        if size > 0 and tau - self.first / size > 0:
            self.value += k * (tau - self.first / size)
            grown = k * self.first / size**2 / total
        gp, gq = self._hinge(on1 / total, -off1 / total, k)
        # sums of (c - mean)^2, whose derivative by c is 2 (c - mean); by the mean, which all c move, what is left over
        vp, vq = self._hinge(on2 - 2 * mean * on1 + mean**2 * on, off2 - 2 * mean * off1 + mean**2 * off, k)
        shared = -2 * (vp * (on1 - mean * on) + vq * (off1 - mean * off)) / total
        gains = gp / total - 2 * vp * mean, 2 * vp, -gq / total - 2 * vq * mean, 2 * vq, shared, grown
        return y, tuple(self.weight * gain for gain in gains)

    def _hinge(self, p, q, k):
        """Adds k relu(tau - min(p / q, q / p)); its derivatives by p and q."""
        if not (p > 0 and q > 0) or min(p / q, q / p) >= self.tau:
            return 0.0, 0.0
        self.value += k * (self.tau - min(p / q, q / p))
        return (-k / q, k * p / q**2) if p <= q else (k * q / p**2, -k / p)

    def backward(self, dy, z, gains):
        return z.relu_backward(dy, gains)


def balance(body, radius, now):
    """:class:`Balance` for a step through ``body`` from a box of this mean ``radius``, as the ramp has it; None when
    there is none."""
    if now["ramp"] == 1 or now["eps"] <= 2e-4 * now["eps_end"] or now["balance"] == 0:  # smaller radii underflow
        return None
    relus = sum(isinstance(layer, ReLU) for _, layer in body.walk())
    return Balance(float(radius), relus, now["balance"] * (1 - now["ramp"]))


def ibp(model, x, labels, draw, now) -> dict:
    """kappa CE(clean) + (1 - kappa) CE(worst margins by intervals) + balance (1 - ramp) Shi's regulariser; kappa goes
    from 1 to ``now["kappa"]`` with the ramp. Gowal et al. 2018. A q above 0, to which it grows, makes the worst
    margins' cross-entropy a generalised one, which lets hopeless images go (:func:`nanomr.losses.cross_entropy`)."""
    kappa = 1 - (1 - now["kappa"]) * now["ramp"]
    return _worst_case(model, x, labels, now, kappa, 1 - kappa, q=now.get("q", 0.0) * now["ramp"])


def ibp_manifold(model, x, labels, draw, now) -> dict:
    """:func:`ibp`, and the paper's regularisers on a drawn pair of corners in the place of Shi's: w (gamma_i intrinsic
    + gamma_h Hamming), w going from 1 to ``now["rest"]`` with the ramp. The pair has batch norms in training mode, with
    its own 3N batch's statistics. Ours; ``docs/derivations/interval.md``."""
    parts, n, weight = ibp(model, x, labels, draw, now), len(x), 1 - (1 - now["rest"]) * now["ramp"]
    if weight == 0:
        return parts | {"intrinsic": 0.0, "hamming": 0.0}
    tap = Hamming(now["alpha"], weight * now["gamma_h"], now["hamming_norm"] == "sample")
    logits, cache = model.forward(PairBatch(x, drawn_corners(model, x, draw, now)), train=True, tap=tap)
    agree, by_plus, by_minus = intrinsic(logits[n : 2 * n], logits[2 * n :])
    gamma_i = weight * now["gamma_i"]
    gradient = array_module(x).concatenate([0 * by_plus, gamma_i * by_plus, gamma_i * by_minus])
    model.backward(gradient, cache, input_grad=False)
    loss = parts["loss"] + gamma_i * agree + tap.weight * tap.value
    return parts | {"loss": loss, "intrinsic": agree, "hamming": tap.value}


def mtl_ibp(model, x, labels, draw, now) -> dict:
    """ramp (alpha CE(worst margins) + (1 - alpha) CE(adversarial)) + (1 - ramp) CE(clean) + the regulariser of
    :func:`ibp`. De Palma et al. 2024; the attack is in evaluation mode."""
    parts = _worst_case(model, x, labels, now, 1 - now["ramp"], now["ramp"] * now["alpha_end"])
    return _and_attacked(parts, model, x, labels, draw, now, now["ramp"] * (1 - now["alpha_end"]))


def _and_attacked(parts, model, x, labels, draw, now, weight) -> dict:
    """And weight CE(adversarial)."""
    logits, cache = model.forward(attacked(model, x, labels, draw, now))
    value, gradient = cross_entropy(logits, labels)
    model.backward(weight * gradient, cache, input_grad=False)
    return parts | {"loss": parts["loss"] + weight * value, "adversarial": value}


def diffai(model, x, labels, draw, now) -> dict:
    """b CE(worst margins in a box within the ball) + (1 - b) CE(adversarial), b growing to ``share`` with the ramp: a
    box of the ramp's share of the radius, anywhere in the ball at random. Mirman et al. 2018, 2019 ("InSamp")."""
    whole, xp, b = box_around(x, now["eps"]), array_module(x), now["share"] * now["ramp"]
    noise = xp.asarray(draw(rng.METHOD).uniform(-1, 1, x.shape).astype(x.dtype))
    centres = whole.points[len(x) :] + noise * (1 - now["ramp"]) * whole.radius
    box = Box(xp.concatenate([x, centres]), now["ramp"] * whole.radius)
    parts = _worst_case(model, x, labels, now | {"balance": 0}, 0.0, b, box)
    del parts["balance"]
    return _and_attacked(parts, model, x, labels, draw, now, 1 - b)


class Stability:
    """Xiao et al.'s (2019) ReLU stability loss as a tap: the mean over the batch of -sum tanh(1 + l u) over all ReLUs,
    of the bounds l, u of their inputs: least where both have one sign. ``value`` is unweighted."""

    def __init__(self, weight):
        self.weight, self.value = weight, 0.0

    def forward(self, z):
        xp, c, r = array_module(z.radius), z.points[-len(z.radius) :], z.radius
        low, high = c - r, c + r
        t = xp.tanh(1 + low * high)
        self.value -= t.sum() / len(r)
        slope = (t * t - 1) / len(r)
        return z.relu(), (slope * (low + high), slope * (low - high))  # by c; by r, which moves the ends apart

    def backward(self, dy, z, record):
        (dc, dr), dz = record, z.relu_backward(dy)
        dz.points[-len(z.radius) :] += self.weight * dc
        return Box(dz.points, dz.radius + self.weight * dr)


def rs(model, x, labels, draw, now) -> dict:
    """CE(adversarial) + rs (ReLU stability over intervals) + l1 (the sum of |w| over all weights, biases not among
    them). Xiao et al. 2019; both weights are full from the start, the bounds those of the eps of the moment."""
    body, _ = halves(model)
    tap, xp = Stability(now["rs"]), array_module(x)
    features, cache = body.forward(box_around(x, now["eps"]), train=True, tap=tap)
    body.backward(Box(xp.zeros_like(features.points), xp.zeros_like(features.radius)), cache, input_grad=False)
    total = 0.0
    for layer in (layer for _, layer in model.walk() if layer.fan_in):
        layer.accumulate(weight=now["l1"] * xp.sign(layer.params["weight"]))
        total += abs(layer.params["weight"]).sum()
    parts = pgd(model, x, labels, draw, now)
    loss = parts["loss"] + now["rs"] * tap.value + now["l1"] * total
    return parts | {"loss": loss, "stability": tap.value}


def sabr(model, x, labels, draw, now) -> dict:
    """:func:`ibp` in boxes of ``share`` of the radius, as near to an adversarial image as the whole box has room for.
    Mueller et al. 2023."""
    whole, xp = box_around(x, now["eps"]), array_module(x)
    centre, room = whole.points[len(x) :], (1 - now["share"]) * whole.radius
    moved = xp.clip(attacked(model, x, labels, draw, now), centre - room, centre + room)
    box = Box(xp.concatenate([x, moved]), now["share"] * whole.radius)
    kappa = 1 - (1 - now["kappa"]) * now["ramp"]
    return _worst_case(model, x, labels, now, kappa, 1 - kappa, box)


def _worst_case(model, x, labels, now, kappa, weight, box=None, q=0.0) -> dict:
    """kappa CE(clean) + weight CE(worst margins) + Shi's regulariser, as ``now`` has it; gradients are added.

    The margins are those in ``box``, [x; centres] and radii: by default the whole one.
    """
    check_labels(labels, len(x))
    n, xp, (body, last) = len(x), array_module(x), halves(model)
    box, radius, body = entered(body, x, now["eps"], box)
    tap = balance(body, radius, now)
    features, cache = body.forward(box, train=True, tap=tap)
    logits, at_last = last.forward(features.points)
    gain = rivals_gain(features.radius, last.params["weight"], labels)
    clean, d_clean = cross_entropy(logits[:n], labels)
    worst, d_worst = cross_entropy(logits[n:] + gain, labels, q)
    d_worst *= weight
    points = last.backward(xp.concatenate([kappa * d_clean, d_worst]), at_last)
    radius, d_weight = rivals_gain_backward(d_worst, features.radius, last.params["weight"], labels)
    last.accumulate(weight=d_weight)
    body.backward(Box(points, radius), cache, input_grad=False, spend=True)
    loss = kappa * clean + weight * worst
    value = tap.value if tap else 0.0
    return {
        **{"loss": loss + (tap.weight * value if tap else 0.0), "cross_entropy": clean},
        **{"interval": worst, "balance": value},
    }


def begin(model, generator: np.random.Generator):
    """Shi et al.'s weights, by which radii neither grow nor shrink: N(0, 2 pi / fan_in^2), but for the last layer."""
    layers = [layer for _, layer in model.walk() if layer.fan_in]
    for layer in layers[:-1]:
        weight = layer.params["weight"]
        drawn = generator.normal(0, math.sqrt(2 * math.pi) / layer.fan_in, weight.shape)
        weight[...] = array_module(weight).asarray(drawn.astype(weight.dtype))


def revive(model, images, eps, generator: np.random.Generator, noise=0.1) -> int:
    """Give each channel that no box of radius eps around these uint8 ``images`` turns on the work of a live one: its
    weights, and a share of what it says to the next layer. Returns how many. ValueError unless the model is a chain.

    Shares differ from weight to weight, but for the last layer, whose rows are subtracted from each other: with
    ``noise`` 0 logits and interval bounds stay as they are. Otherwise the two have weights (1 + noise) and (1 - noise)
    times as long, with signs at random, so that they part. ``docs/derivations/interval.md``.
    """
    layers, n = list(model.children.values()), len(images)
    halves(model)  # it ends with a linear layer
    if any(layer.children for layer in layers):
        raise ValueError(f"dead channels are revived in a chain of layers, and {model.name} has branches")
    at, seen = box_around(as_float(images), eps), {}
    for i, layer in enumerate(layers[:-1]):
        at, z = layer.forward(at)[0], at
        if isinstance(layer, ReLU):
            z = z.full() if isinstance(z, NormalizedBox) else z
            axes = tuple(range(z.radius.ndim - 1))
            seen[i] = (z.points[n:] + z.radius > 0).any(axes), at.radius.mean(axes)
    number = 0
    for i, (on, radius) in seen.items():
        first = max(k for k in range(i) if layers[k].fan_in)
        reader = next(layer for layer in layers[i:] if layer.fan_in)
        heard = reader.params["weight"]
        heard = heard.reshape(-1, len(on), heard.shape[-1])
        order = np.argsort(-radius * abs(heard).sum((0, 2)), kind="stable")[: on.sum()]
        for k, dead in enumerate(np.flatnonzero(~on) if len(order) else ()):
            live, number = order[k % len(order)], number + 1
            for layer in layers[first:i]:
                for value in (*layer.params.values(), *layer.buffers.values()):
                    if value.ndim:
                        value[..., dead] = value[..., live]
            weight = layers[first].params["weight"]
            signs = noise * generator.choice([-1, 1], weight.shape[:-1]).astype(weight.dtype)
            weight[..., dead] *= 1 + signs
            weight[..., live] *= 1 - signs
            share = 0.5 if reader is layers[-1] else generator.uniform(0, 1, heard[:, live].shape).astype(heard.dtype)
            heard[:, dead] = (1 - share) * heard[:, live]
            heard[:, live] *= share
    return number


def verified(model, images, labels, eps, batch_size=500) -> float:
    """Share of uint8 ``images`` whose label float32 intervals prove within eps: a diagnostic, not the verifier's."""
    (body, last), right = halves(model), 0
    for i in range(0, len(images), batch_size):
        y = labels[i : i + batch_size]
        features, _ = body.forward(box_around(as_float(images[i : i + batch_size]), eps))
        n, rows = len(y), array_module(y).arange(len(y))
        worst = last.apply(features.points[n:]) + rivals_gain(features.radius, last.params["weight"], y)
        own = worst[rows, y].copy()
        worst[rows, y] = -np.inf
        right += int((worst.max(1) < own).sum())
    return right / len(images)
