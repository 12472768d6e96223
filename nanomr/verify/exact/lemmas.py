"""Better bounds of single ReLUs' inputs, each with a small tree of its own. ``docs/derivations/beta_crown.md``.

A ReLU of an early convolution sees a patch of the image through a few unstable ReLUs, so that a tree of some dozen
cases is nearly exact where CROWN is not, and what follows from its bound (the chord above that ReLU, CROWN's bounds of
all later layers) helps every rival at once. From the first layer to the last, each with the bounds of those before.
"""

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

from ..bounds.crown import Box, Lines, lower, one_by_one
from ..chain import Chain
from .bab import Proof, branch
from .collapsed import Blocks, Collapsed, backward, climb, collapse
from .halfspace import Rows

ROOT_STEPS, STEPS = 20, 3  # of climbing, at a root and at a pair of children
BATCH = 16  # domains split at once
MOST = 100  # domains of a tree
TIGHT = 0.05  # a tree ends where its bound is off by that share of what CROWN's is, at most
WORTH = 0.02  # a bound is kept if it takes that share off the ReLU's range


class Lemma(NamedTuple):
    """A proof that the input z of the ReLU ``unit`` is >= ``bound`` (``sign`` 1), or -z is (-1), in the whole box."""

    unit: int  # of all ReLUs of the network
    sign: int
    bound: float
    proof: Proof


def tighten(chain: Chain, low, high, relus, left: Callable[[], float], most: int = MOST):
    """(relus with better bounds, lemmas): in the box [low, high] (1, H, W, C), while ``left()``, seconds, is above 0.

    relus: [(low, high) (1, ...)] as :func:`~nanomr.verify.bounds.crown.crown` gives them; the first layer's are exact.
    """
    relus, lemmas, box = [(z.copy(), y.copy()) for z, y in relus], [], Box.between(low, high)
    ends = np.cumsum([0, *(z.size for z, _ in relus)])
    for k in range(1, len(relus)):
        one_by_one(partial(lower, chain), box, [Lines.around(*r) for r in relus[:k]], *relus[k])
        net = collapse(chain, low, high, relus, np.zeros(chain.classes))
        z_low, z_high = (z.reshape(-1) for z in relus[k])  # views
        area = -z_low * z_high
        at = np.arange(net.layers[k].start, net.layers[k].stop)
        for j in at[np.argsort(-area[net.units[at] - ends[k]])]:
            here = net.units[j] - ends[k]
            for sign in (1, -1):
                if not left() > 0:
                    return relus, lemmas
                known = z_low[here] if sign > 0 else -z_high[here]
                found = least(local(net, k, j, sign), known, most)
                if found is None or not found[0] > known + WORTH * (z_high[here] - z_low[here]):
                    continue
                lemmas.append(Lemma(int(net.units[j]), sign, *found))
                side, value = (z_low, found[0]) if sign > 0 else (z_high, -found[0])
                side[here] = value
                if not z_low[here] < 0 < z_high[here]:
                    break
    return relus, lemmas


def arrays(lemmas: list[Lemma]) -> dict[str, np.ndarray]:
    """What a proof file holds of them, beside the tree that they help (``docs/soundness.md``), if there are any."""
    if not lemmas:
        return {}
    trees = [lemma.proof.arrays() for lemma in lemmas]
    found = {f"lemma_{name}": np.concatenate([tree[name].ravel() for tree in trees])
             for name in ("units", "parent", "split", "signs", "values")}  # fmt: skip
    sizes = [(len(tree["units"]), len(tree["parent"]), len(tree["signs"])) for tree in trees]
    side = [lemma.sign * (lemma.unit + 1) for lemma in lemmas]
    return found | {"lemma_side": np.array(side, np.int32), "lemma_sizes": np.array(sizes, np.int32)}


def local(net: Collapsed, layer: int, unit: int, sign: int) -> Collapsed:
    """sign * z[unit], a unit of that layer, as a margin: of the units and pixels that it depends on."""
    start, needed = net.layers[layer].start, np.zeros(len(net.units), bool)
    needed[:start] = net.between[unit, :start] != 0
    for e in reversed(net.layers[:layer]):
        at = e.start + np.flatnonzero(needed[e])
        needed[: e.start] |= (net.between[at, : e.start] != 0).any(0)
    units = np.flatnonzero(needed)
    pixels = np.flatnonzero((net.image[units] != 0).any(0) | (net.image[unit] != 0))
    ends = np.cumsum([0, *(needed[e].sum() for e in net.layers[:layer])])
    layers = [slice(a, b) for a, b in pairwise(ends)]
    image, between = net.image[np.ix_(units, pixels)], net.between[np.ix_(units, units)]
    return Collapsed(
        image, net.bias[units], between, sign * net.image[unit, pixels], sign * net.between[unit, units],
        sign * net.bias[unit], net.lower[units], net.upper[units], net.offset[units], Rows.of(image), net.units[units],
        layers, [Blocks.of(image[at]) for at in layers],
        [[Blocks.of(between[at, e]) for e in layers[:m]] for m, at in enumerate(layers)],
    )  # fmt: skip


def least(exact: Collapsed, known: float, most: int):
    """(bound, Proof) of the margin of ``exact``, float64, by a tree of at most ``most`` domains; None where it has
    nothing to split. The worst domains are split until the bound is above 0, or near a value that the margin takes."""
    if not len(exact.units):
        return None
    net, proof, tie = exact.single(), Proof(exact.units), count()
    signs, values = np.zeros((1, len(net.units)), np.int8), net.lower[None].copy()
    with np.errstate(invalid="ignore"):  # as :func:`climb`
        scale = abs(backward(net, signs, values).relus)[0]
    scale += 0.1 * scale.mean()
    open_, ceiling, visited = [], np.inf, 1

    def grow(nodes, signs, values, steps):
        nonlocal ceiling
        found = climb(net, signs, values, scale, steps, 0.0)
        ceiling = min(ceiling, found.margin)
        for node, bound, sign, value in zip(nodes, found.bound, signs, found.values, strict=True):
            heapq.heappush(open_, (float(bound), next(tie), node, sign, value))

    grow([0], signs, values, ROOT_STEPS)
    leaves = []
    while open_ and visited < most:
        enough = min(0.0, ceiling - TIGHT * max(0.0, ceiling - known))
        taken = []
        while open_ and open_[0][0] < enough and len(taken) < BATCH:
            domain = heapq.heappop(open_)
            (taken if (domain[3] == 0).any() else leaves).append(domain)
        if not taken:
            break
        *_, parents, signs, values = zip(*taken, strict=True)
        signs, values, unit = branch(net, np.stack(signs), np.stack(values), 0.0)
        split = signs[np.arange(len(signs)), np.repeat(unit, 2)] * (exact.units[np.repeat(unit, 2)] + 1)
        nodes = [proof.add(parent, int(s)) for parent, s in zip(np.repeat(parents, 2).tolist(), split, strict=True)]
        visited += len(nodes)
        grow(nodes, signs, values, STEPS)
    *_, nodes, signs, values = zip(*leaves, *open_, strict=True)
    proof.rows = {node: (sign, value) for node, sign, value in zip(nodes, signs, values, strict=True)}
    # As it is: whoever claims a margin leaves room for rounding; and a checker whose bounds are those to the last
    # digits takes the same of two lines below a ReLU.
    return float(backward(exact, np.stack(signs), np.stack(values).astype(np.float64)).bound.min()), proof
