"""Losses: each returns its value WITH its gradient. Derived in ``docs/derivations``.

Values are means over the batch. On a GPU they are 0-d arrays: reading one (``float``) waits for the device.
"""

import numpy as np

from .backend import array_module
from .batches import BehindReLU, Normalized, PairBatch
from .borders import check, check_labels, check_triple
from .ops import ops_for


def cross_entropy(logits, labels, q=0.0):
    """(mean of -log softmax(logits)[label], its gradient). logits (N, K), labels (N,) ints in [0, K).

    ``derivations/cross_entropy.md``: the gradient is (softmax - onehot) / N. With ``q`` in (0, 1], the mean of
    (1 - p^q) / q in place of -log p, p the label's softmax, which it is for q -> 0 (Zhang, Sabuncu 2018): an image's
    gradient is p^q times that, so that hopeless ones count for little. ValueError for other shapes or labels.
    """
    check("cross_entropy", "logits", logits, ("N", "K"))
    xp, (n, classes) = array_module(logits), logits.shape
    labels = check_labels(labels, n, classes)
    shifted = logits - logits.max(1, keepdims=True)
    exp = xp.exp(shifted)
    total = exp.sum(1, keepdims=True)
    rows = xp.arange(n)
    each = xp.log(total[:, 0]) - shifted[rows, labels]
    gradient = exp / total
    gradient[rows, labels] -= 1
    if q:
        power = xp.exp(-q * each)
        each, gradient = (1 - power) / q, gradient * power[:, None]
    return each.mean(), gradient * (1.0 / n)


def kl_divergence(z, z_moved):
    """(mean over the batch of KL(softmax(z) || softmax(z_moved)), gradient by z, gradient by z_moved). (N, K) logits.

    ``derivations/trades.md``. ValueError for other shapes.
    """
    check("kl_divergence", "z", z, ("N", "K"))
    check("kl_divergence", "z_moved", z_moved, z.shape, z.dtype)
    xp, share = array_module(z), 1.0 / len(z)
    log_p, log_q = (a - a.max(1, keepdims=True) for a in (z, z_moved))
    log_p, log_q = (a - xp.log(xp.exp(a).sum(1, keepdims=True)) for a in (log_p, log_q))
    p, gap = xp.exp(log_p), log_p - log_q
    each = (p * gap).sum(1, keepdims=True)
    return each.sum() * share, p * (gap - each) * share, (xp.exp(log_q) - p) * share


def max_mahalanobis(logits, labels, norm=10.0):
    """(mean over the batch of |z - mu_label|^2, its gradient by the logits). logits (N, K), labels (N,) ints in [0, K).

    mu are Pang et al.'s (2020) K centres, ``norm`` long and as far apart as can be, and z the logits, in coordinates in
    which the nearest centre is that of the largest logit. ``derivations/mmc.md``. ValueError for other shapes, labels.
    """
    check("max_mahalanobis", "logits", logits, ("N", "K"))
    xp, (n, classes) = array_module(logits), logits.shape
    labels = check_labels(labels, n, classes)
    if classes < 2:
        raise ValueError("max_mahalanobis needs at least 2 classes")
    scale = norm * (classes / (classes - 1)) ** 0.5
    difference = logits + scale / classes
    difference[xp.arange(n), labels] -= scale
    return (difference * difference).sum() * (1.0 / n), difference * (2.0 / n)


def intrinsic(f_plus, f_minus):
    """(mean over the batch of |f+ - f-|^2, gradient by f+, gradient by f-). (N, K) logits at opposite corners.

    Section 5.4 of the paper; ``derivations/intrinsic.md``.
    """
    check("intrinsic", "f_plus", f_plus, ("N", "K"))
    check("intrinsic", "f_minus", f_minus, f_plus.shape, f_plus.dtype)
    n = len(f_plus)
    difference = f_plus - f_minus
    d_plus = difference * (2.0 / n)
    return (difference * difference).sum() * (1.0 / n), d_plus, -d_plus


def of_logits(logits, labels, gamma_i=None):
    """(cross-entropy, intrinsic, gradient of cross-entropy + gamma_i intrinsic by the logits).

    Logits (3 N, K) of [x; x + rho; x - rho]; or, without ``gamma_i``, (N, K) for the cross-entropy alone. labels (N,).
    """
    check("of_logits", "logits", logits, ("N" if gamma_i is None else "3 N", "K"))
    ops, n = ops_for(logits), len(logits) // (1 if gamma_i is None else 3)
    check("of_logits", "logits", logits, (n if gamma_i is None else 3 * n, "K"))
    labels = check_labels(labels, n, logits.shape[1])
    if logits.dtype.name == "float32" and hasattr(ops, "losses"):  # one launch, which a CUDA graph can hold
        values, gradient = ops.losses(logits, labels, gamma_i)
        return values[0], values[1], gradient
    value, gradient = cross_entropy(logits[:n], labels)
    if gamma_i is None:
        return value, 0.0, gradient
    pair, d_plus, d_minus = intrinsic(logits[n : 2 * n], logits[2 * n :])
    gradient = array_module(logits).concatenate([gradient, gamma_i * d_plus, gamma_i * d_minus])
    return value, pair, gradient


def rivals_gain(radius, weight, labels):
    """(N, K): by how much each class's logit may gain on the label's, sum_f |W_fj - W_fy| r_f, in the last layer's box.

    radius (N, F), weight (F, K). Added to the centre's logits it makes the worst that there may be of all margins at
    once: the last layer "elided" (``derivations/interval.md``). Cross-entropy does not see what all logits share.
    """
    check("rivals_gain", "radius", radius, ("N", "F"))
    return ops_for(radius).rivals_gain(radius, weight, check_labels(labels, len(radius), weight.shape[1]))


def rivals_gain_backward(d_gain, radius, weight, labels):
    """(d_radius, d_weight) of :func:`rivals_gain`."""
    return ops_for(radius).rivals_gain_backward(d_gain, radius, weight, labels)


def hamming(z_plus, z_minus, alpha=8.0, per_sample=False):
    """(H, dH/dz+, dH/dz-) of one layer: the l2 norm of |tanh(alpha z+) - tanh(alpha z-)|, over twice its elements.

    z+, z- (N, ...). Section 5.3 of the paper; ``derivations/hamming.md``. The norm is taken over the whole batch
    tensor, or per sample (then averaged over the batch). At z+ = z-, where H has a kink, the gradient is 0.
    This is the formula; training computes the same, fused with ReLU, through :class:`Hamming`.
    """
    check("hamming", "z_plus", z_plus, (...,))
    check("hamming", "z_minus", z_minus, z_plus.shape, z_plus.dtype)
    xp = array_module(z_plus)
    t_plus, t_minus = xp.tanh(alpha * z_plus), xp.tanh(alpha * z_minus)
    difference = t_plus - t_minus
    axes = tuple(range(1 if per_sample else 0, z_plus.ndim))
    norm = xp.sqrt((difference * difference).sum(axes, keepdims=True))
    unit = difference / xp.maximum(norm, 1e-12) * (alpha / (2 * z_plus.size))
    return norm.sum() / (2 * z_plus.size), unit * (1 - t_plus * t_plus), -unit * (1 - t_minus * t_minus)


class Hamming:
    """The Hamming regulariser as a tap: sees each ReLU's input [z0; z+; z-] as the forward pass goes by.

    Pass a fresh one to ``model.forward(x, tap=...)``; ``value`` is then the mean over the layers, and
    ``model.backward`` adds ``weight`` times its gradient on the way back, at the same places. Nothing is stored but
    the norms: one number a layer, or N with ``per_sample``. Where the rows of a batch are divided among ranks,
    :meth:`gather` comes between the two passes.
    """

    takes_normalized = True

    def __init__(self, alpha: float = 8.0, weight: float = 1.0, per_sample: bool = False):
        self.alpha, self.weight, self.per_sample = alpha, weight, per_sample
        self.layers, self.total = 0, 0.0
        self.norms, self.sizes = [], []  # by layer: the norms, the numbers an image

    @property
    def value(self):
        return self.total / max(self.layers, 1)

    def gather(self, share, n):
        """Make the norms over these ``n`` images those over the whole batch, of which they are ``share``."""
        if share.whole or self.per_sample or not self.norms:
            return
        (squares,) = share.means(array_module(self.norms[0]).concatenate(self.norms).astype(np.float64) ** 2 / n)
        self.total = 0.0
        for norm, size, square in zip(self.norms, self.sizes, squares, strict=True):
            norm[...] = (square * share.n) ** 0.5  # in place: the layers have it in their caches
            self.total = self.total + norm.sum() / (2 * size * share.n)

    def forward(self, z):
        """(relu(z), norms); called by ReLU."""
        if not isinstance(z, PairBatch):
            check_triple("Hamming", z.x if isinstance(z, Normalized) else z)
        if isinstance(z, PairBatch):
            y, squares = ops_for(z.x).relu_hamming_pair(z.x, z.rho, self.alpha)
        elif isinstance(z, Normalized):
            y, squares = ops_for(z.x).batchnorm_relu_hamming(*z, self.alpha)
        else:
            y, squares = ops_for(z).relu_hamming(z, self.alpha)
        ops, share = ops_for(squares), 1 / (2 * y.size // 3)
        if squares.dtype.name == "float32" and hasattr(ops, "hamming_norms"):
            norms, self.total = ops.hamming_norms(squares, self.total, share, self.per_sample)
        else:
            norms = squares**0.5 if self.per_sample else squares.sum(keepdims=True) ** 0.5
            self.total = self.total + norms.sum() * share
        self.layers += 1
        self.norms.append(norms)
        self.sizes.append(y.size // len(y))
        return y, norms

    def backward(self, dy, z, norms):
        """dz: ReLU's gradient plus this regulariser's; called by ReLU."""
        xp, ops, n = array_module(dy), ops_for(dy), len(dy) // 3
        factor = self.alpha / (self.layers * 2 * (dy.size // 3))
        if norms.dtype.name == "float32" and hasattr(ops, "hamming_weight"):
            weight = ops.hamming_weight(norms, self.weight, factor, n)
        else:
            weight = xp.broadcast_to(self.weight * factor / xp.maximum(norms, 1e-12), (n,))
        if isinstance(z, PairBatch):
            return PairBatch(*ops.relu_hamming_pair_backward(dy, z.x, z.rho, self.alpha, weight))
        if isinstance(z, Normalized):
            return BehindReLU(dy, self.alpha, weight)
        return ops.relu_hamming_backward(dy, z, self.alpha, weight)
