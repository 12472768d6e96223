"""What the attacks climb: losses of single images, each WITH its gradient by that image's logits.

All of them grow as the label loses: a network errs where ``margin`` is positive. Each takes logits (N, K) and labels
(N,) ints, and returns (values (N,), gradients (N, K)), row i being the derivative of value i: no means here, since an
image's attack must not depend on its neighbours. Derived in ``docs/derivations/dlr.md``.
"""

import numpy as np

from ..backend import array_module

SMALL = 1e-12  # keeps a denominator away from zero, as in the reference


def cross_entropy_each(logits, labels):
    """-log softmax(logits)[label] and softmax - onehot, to full relative precision however small they are.

    A confident network's probability of its own label is 1 in float32, but 1 minus it is the sum of the other
    probabilities, which are not 0 until exp underflows: neither value nor gradient subtracts two numbers near 1.
    """
    xp = array_module(logits)
    rows, top = xp.arange(len(logits)), logits.argmax(1)
    shifted = logits - logits.max(1, keepdims=True)
    gradient = xp.exp(shifted)
    gradient[rows, top] = 0
    rest = gradient.sum(1)  # all but the largest term, which is 1
    gradient[rows, top] = 1
    gradient /= 1 + rest[:, None]
    gradient[rows, labels] = 0
    gradient[rows, labels] = -gradient.sum(1)
    return xp.log1p(rest) - shifted[rows, labels], gradient


def margin(logits, labels):
    """max over the other classes of z_i, minus z_label: positive where the network errs."""
    xp = array_module(logits)
    rows, other = xp.arange(len(logits)), _strongest_other(logits, labels)
    gradient = xp.zeros_like(logits)
    gradient[rows, other] += 1
    gradient[rows, labels] -= 1
    return logits[rows, other] - logits[rows, labels], gradient


def dlr(logits, labels):
    """The difference of logits ratio, (max_{i != y} z_i - z_y) / (z_(1) - z_(3)) (Croce and Hein 2020, eq. 6).

    z_(k) is the k-th largest logit. Adding a number to all logits, or multiplying them by one, changes nothing, so that
    no scale of the logits hides the way. Raises ValueError below 3 classes.
    """
    _need(logits, 3, "dlr")
    rank = _ranked(logits)
    return _ratio(logits, labels, _strongest_other(logits, labels), rank, ((0, 1.0), (2, -1.0)))


def dlr_targeted(logits, labels, targets):
    """The targeted ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce and Hein 2020, eq. 7).

    ``targets`` (N,) ints, none of them its image's label. Raises ValueError below 4 classes.
    """
    _need(logits, 4, "dlr_targeted")
    return _ratio(logits, labels, targets, _ranked(logits), ((0, 1.0), (2, -0.5), (3, -0.5)))


def _ratio(logits, labels, targets, rank, weights):
    """(z_target - z_label) / D with D = sum of weight * (logit of that rank), and its gradient by the quotient rule."""
    xp, rows = array_module(logits), array_module(logits).arange(len(logits))
    scale = sum(weight * logits[rows, rank[:, k]] for k, weight in weights) + SMALL
    value = (logits[rows, targets] - logits[rows, labels]) / scale
    gradient = xp.zeros_like(logits)
    gradient[rows, targets] += 1
    gradient[rows, labels] -= 1
    for k, weight in weights:  # one class may be label, target and an order statistic: all of it adds up
        gradient[rows, rank[:, k]] -= weight * value
    return value, gradient / scale[:, None]


def _strongest_other(logits, labels):
    """The class with the largest logit but for the label's, (N,)."""
    xp = array_module(logits)
    others = logits.copy()
    others[xp.arange(len(logits)), labels] = -np.inf
    return others.argmax(1)


def _ranked(logits):
    """(N, K): the classes from the largest logit to the smallest."""
    return (-logits).argsort(1)


def _need(logits, least, name):
    if logits.shape[1] < least:
        raise ValueError(f"{name} needs at least {least} classes, the model has {logits.shape[1]}")
