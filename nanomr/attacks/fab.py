"""FAB (Croce & Hein 2020, arXiv:1907.02044): walks along the decision boundary towards the image.

The distance is minimised, not given: eps only says which misclassified points count.
"""

import numpy as np

from ..backend import array_module
from ..ops import ops_for
from .common import FAB, FAB_T, Batch, attack, l2, misclassified, per_image, threat

ALPHA, ETA, BETA = 0.1, 1.05, 0.9  # largest pull to the image, overshoot beyond the plane, way back after a success


@attack()
def fab(batch: Batch, *, steps: int = 100, restarts: int = 5):
    """(adversarial, fooled): images (N, H, W, C) within eps of x and in [0, 1]; does the model err on them (N,)?

    A step linearises the logits' differences to all other classes (one forward pass, then one backward pass for each
    class from the same cache), takes the class whose plane is nearest, and projects the point and the image onto that
    plane. The first restart begins at x, later ones at random points at eps / 2. An image is done as soon as it is
    misclassified within eps.

    At the end of a restart, the closest misclassified point is pulled into the ball, and so is the image's projection
    onto that point's plane: overshoot alone keeps the walk 1% outside. This is the paper's final search, for a known
    eps; AutoAttack's code leaves it out.

    Raises what :func:`nanomr.attacks.pgd` raises.
    """
    others = _ranked(batch.logits)
    return _runs(batch, FAB, [(others, restart) for restart in range(restarts)], steps)


@attack()
def fab_targeted(batch: Batch, *, targets: int = 9, steps: int = 100, restarts: int = 1):
    """:func:`fab` with one class after another: the ``targets`` likeliest wrong classes of the unchanged image.

    One backward pass a step. Any misclassification counts, not the target's alone. Where there are fewer classes, all
    of them are targets. Raises what :func:`nanomr.attacks.pgd` raises.
    """
    others = _ranked(batch.logits)[:, :targets]
    runs = [(others[:, t : t + 1], restart) for t in range(others.shape[1]) for restart in range(restarts)]
    return _runs(batch, FAB_T, runs, steps)


def project_linf(points, w, b):
    """d (N, ...): points + d is the Linf-nearest point to ``points`` on the plane w z = b, within the box [0, 1].

    points and w (N, ...), points in [0, 1]; b (N,). Where the box does not reach the plane, points + d is the corner
    that comes nearest to it. Coordinates with w = 0 stay.
    """
    return ops_for(points).plane_step(points, w, b, False)


def project_l2(points, w, b):
    """:func:`project_linf` in the l2 norm."""
    return ops_for(points).plane_step(points, w, b, True)


def _ranked(logits):
    """The classes but the first, from likely to unlikely (N, K - 1). Of equals the lower first, as in argmax."""
    return array_module(logits).argsort(-logits, axis=1, kind="stable")[:, 1:]


def _runs(batch, salt, runs, steps):
    """(images, fooled) by one of ``runs`` after another on those left: (classes to go for (N, any number), restart)."""
    xp, ball = array_module(batch.x), batch.ball
    adversarial, fooled = batch.x.copy(), xp.zeros(len(batch.x), bool)
    for run, (others, restart) in enumerate(runs):
        left = xp.flatnonzero(~fooled)
        if len(left) == 0:
            break
        x = start = batch.x[left]
        if restart > 0:
            start = threat(ball.name, ball.eps / 2).random_start(x, batch.draws(salt, run, left), edge=True)
        found, hit = _run(batch.model, ball, x, batch.labels[left], others[left], start, steps)
        adversarial[left[hit]], fooled[left[hit]] = found[hit], True
    return adversarial, fooled


def _run(model, ball, x, labels, classes, current, steps):
    """(images, fooled) of one walk from ``current``."""
    xp = array_module(x)
    adversarial, fooled, left = x.copy(), xp.zeros(len(x), bool), xp.arange(len(x))
    closest, distance = x.copy(), xp.full(len(x), xp.inf)
    for _ in range(steps):
        if len(left) == 0:
            break
        current = _step(model, ball, x, current, labels, classes)
        wrong = misclassified(model.forward(current)[0], labels)
        if not wrong.any():
            continue
        now = xp.where(wrong, ball.distance(x, current), xp.inf)
        closer = now < distance
        closest[closer], distance = current[closer], xp.where(closer, now, distance)
        hit = wrong & ball.inside(x, current)
        adversarial[left[hit]], fooled[left[hit]] = current[hit], True
        current = xp.where(per_image(wrong, x), x + x.dtype.type(BETA) * (current - x), current)
        if hit.any():
            left, x, labels, classes = left[~hit], x[~hit], labels[~hit], classes[~hit]
            current, closest, distance = current[~hit], closest[~hit], distance[~hit]
    seen = xp.isfinite(distance)
    if seen.any():
        left, x, labels, classes, closest = left[seen], x[seen], labels[seen], classes[seen], closest[seen]
        for candidate in (closest, _onto_plane(model, ball, x, closest, labels, classes)):
            candidate = ball.project(x, candidate)
            hit = misclassified(model.forward(candidate)[0], labels)
            adversarial[left[hit]], fooled[left[hit]] = candidate[hit], True
    return adversarial, fooled


def _step(model, ball, x, current, labels, classes):
    """The next point: between the projections of ``current`` and of ``x`` onto the nearest plane, and beyond it."""
    xp, dtype = array_module(x), x.dtype
    w, b = _nearest_plane(model, ball, current, labels, classes)
    project = project_linf if ball.name == "linf" else project_l2
    d, d0 = project(current, w, b), project(x, w, b)
    length, length0 = (xp.maximum(_length(ball, way), 1e-8) for way in (d, d0))
    alpha = per_image(xp.minimum(length / (length + length0), ALPHA).astype(dtype), x)
    ahead, pulled = current + dtype.type(ETA) * d, x + dtype.type(ETA) * d0
    return xp.clip((1 - alpha) * ahead + alpha * pulled, 0, 1)


def _onto_plane(model, ball, x, current, labels, classes):
    """``x`` moved towards the plane nearest to ``current``, as far as the ball goes."""
    w, b = _nearest_plane(model, ball, current, labels, classes)
    d = (project_linf if ball.name == "linf" else project_l2)(x, w, b)
    stretch = ball.eps / array_module(x).maximum(_length(ball, d), 1e-8)
    return x + per_image(stretch.astype(x.dtype), x) * d


def _nearest_plane(model, ball, current, labels, classes):
    """(w, b) of the plane w z = b on which logits of the label and of one of ``classes`` are equal, to first order."""
    xp = array_module(current)
    logits, cache = model.forward(current)
    rows, n = xp.arange(len(current)), len(current)
    w, gap, nearest = xp.zeros_like(current), xp.zeros(n, logits.dtype), xp.full(n, xp.inf)
    for other in classes.T:
        dlogits = xp.zeros_like(logits)
        dlogits[rows, labels], dlogits[rows, other] = -1, 1
        gradient = model.backward(dlogits, cache, param_grads=False)
        difference = logits[rows, other] - logits[rows, labels]
        flat = gradient.reshape(n, -1)
        distance = abs(difference) / ((abs(flat).sum(1) if ball.name == "linf" else l2(flat)) + 1e-12)
        closer = distance < nearest
        w[closer], gap[closer] = gradient[closer], difference[closer]
        nearest = xp.where(closer, distance, nearest)
    return w, (w * current).reshape(n, -1).sum(1, dtype=np.float64) - gap


def _length(ball, d):
    """|d| of each image in the ball's norm, (N,)."""
    return abs(d).reshape(len(d), -1).max(1) if ball.name == "linf" else l2(d)
