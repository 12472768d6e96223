"""What layers hand to each other in the place of an array: a pair of batches, a batch of boxes, and what the next layer
will compute along with its own work."""

from typing import NamedTuple

from .borders import check, check_triple
from .ops import ops_for


class PairBatch(NamedTuple):
    """The 3N batch [x; x + rho; x - rho] as two arrays, (N, ...) each. ``docs/derivations/pair_batch.md``.

    A linear map acts on x and on rho alone, A(x +- rho) + b = (A x + b) +- A rho, so that it is applied to two
    batches, not three. The first layer that is not linear gets the 3N batch.
    """

    x: object
    rho: object

    def checked(self) -> "PairBatch":
        """Itself, if there is a rho for each x."""
        check("a PairBatch", "x", self.x, (...,))
        check("a PairBatch", "rho", self.rho, self.x.shape, self.x.dtype, mixed=())
        return self

    def full(self):
        """The 3N batch itself."""
        return ops_for(self.checked().x).expand_pair(self.x, self.rho)

    @staticmethod
    def gradient(d_full) -> "PairBatch":
        """The gradient with respect to (x, rho), from the one with respect to the 3N batch."""
        check_triple("PairBatch.gradient", d_full)
        return PairBatch(*ops_for(d_full).contract_pair(d_full))


class Box(NamedTuple):
    """What activations may be: within ``radius`` (N, ...) of the centres. ``docs/derivations/interval.md``.

    ``points``: the centres (N, ...), or [x; centres] (2N, ...) with the clean batch x, whose statistics a batch norm in
    training takes. A linear map acts on points as on images, on radii by its absolute values. In backward: the
    gradients by both.
    """

    points: object
    radius: object

    def checked(self) -> "Box":
        """Itself, if there are one or two points for each radius."""
        check("a Box", "radius", self.radius, (...,))
        n = len(self.radius) * (1 + (len(getattr(self.points, "shape", ())) and len(self.points) != len(self.radius)))
        check("a Box", "points", self.points, (n, *self.radius.shape[1:]), self.radius.dtype, mixed=())
        return self

    def relu(self) -> "Box":
        return Box(*ops_for(self.points).relu_box(*self))

    def relu_and_sums(self):
        """(:meth:`relu`, ``box_sums``)."""
        return self.relu(), ops_for(self.points).box_sums(*self)

    def relu_backward(self, dy: "Box", gains=None) -> "Box":
        return Box(*ops_for(self.points).relu_box_backward(*dy, *self, gains))


class Normalized(NamedTuple):
    """gamma (x - mean) inv_std + beta, not computed yet: the ReLU behind it does both in one pass.

    Going back, ReLU hands its dy over as :class:`BehindReLU`, and batch normalisation does both again.
    """

    x: object
    gamma: object
    beta: object
    mean: object
    inv_std: object

    def full(self):
        return ops_for(self.x).batchnorm(*self)

    def relu(self):
        return ops_for(self.x).batchnorm_relu(*self)


class BehindReLU(NamedTuple):
    """The gradient behind a ReLU, and what the Hamming regulariser adds in front of it (None without)."""

    dy: object
    alpha: float | None = None
    weight: object = None


class NormalizedBox(NamedTuple):
    """A batch norm's :class:`Box`, not computed yet, as :class:`Normalized`; going back, its ReLU is a
    :class:`BoxBehindReLU`."""

    box: Box
    gamma: object
    beta: object
    mean: object
    inv_std: object

    def full(self) -> Box:
        """Radii are scaled by |gamma| inv_std."""
        (points, radius), gamma, _, _, inv_std = self
        ops = ops_for(gamma)
        return Box(ops.batchnorm(points, *self[1:]), ops.scale_channels(radius, abs(gamma) * inv_std))

    def relu(self) -> Box:
        return self.relu_and_sums()[0]

    def relu_and_sums(self):
        points, radius, sums = ops_for(self.gamma).batchnorm_relu_box(*self.box, *self[1:])
        return Box(points, radius), sums

    def relu_backward(self, dy: Box, gains=None) -> "BoxBehindReLU":
        return BoxBehindReLU(dy, gains)


class BoxBehindReLU(NamedTuple):
    """The gradient behind a ReLU, a :class:`Box`, and the gains that are added in front of it (None without).
    ``spend``: its arrays may be overwritten."""

    dy: Box
    gains: tuple | None
    spend: bool = False
