"""Baselines that are judged by attacks: adversarial training, and centres for the logits. ``docs/table1.md``.

Attacks see a network in evaluation mode (batch norms use their running statistics), but where the source trains
otherwise: there they see it in training mode. Then comes one step on the images that the attack made; "cross_entropy"
is that of the images that the loss has it of.
"""

from .. import rng
from ..attacks.common import L1, L2, Linf, input_gradient
from ..attacks.objectives import cross_entropy_each
from ..attacks.pgd import ascend
from ..attacks.wasserstein import ascend as wasserstein_ascend
from ..backend import array_module
from ..borders import check_labels
from ..losses import cross_entropy, kl_divergence, max_mahalanobis
from .manifold import standard_step


def attacked(model, x, labels, draw, now, train=False):
    """The images (N, H, W, C) at the end of ``steps`` steps of ``step_size`` eps up the cross-entropy.

    They begin at random in the ball, of which ``start`` is the share that starts are drawn from.
    """
    ball, labels, generator = Linf(now["eps"]), check_labels(labels, len(x)), draw(rng.METHOD)
    generator.random((model.share.rows.start, *x.shape[1:]))  # of the images that other ranks have
    start = Linf(now["start"] * now["eps"]).random_start(x, [generator] * len(x))
    return ascend(
        model, ball, x, start, lambda z: cross_entropy_each(z, labels)[1], now["step_size"] * now["eps"],
        int(now["steps"]), train,
    )  # fmt: skip


def pgd(model, x, labels, draw, now, train=False) -> dict:
    """Cross-entropy of :func:`attacked` images (Madry et al. 2018)."""
    return standard_step(model, attacked(model, x, labels, draw, now, train), labels)


def fgsm(model, x, labels, draw, now) -> dict:
    """:func:`pgd` in a single step (Wong, Rice, Kolter 2020), which sees the network in training mode, as theirs."""
    return pgd(model, x, labels, draw, now | {"steps": 1}, train=True)


def trades(model, x, labels, draw, now) -> dict:
    """Cross-entropy at x, and ``beta`` times the divergence from there to the worst point found (Zhang et al. 2019).

    {"loss", "cross_entropy", "kl"}, the last unweighted. ``docs/derivations/trades.md``.
    """
    ball, labels, clean = Linf(now["eps"]), check_labels(labels, len(x)), model.forward(x)[0]
    generator = draw(rng.METHOD)
    generator.standard_normal((model.share.rows.start, *x.shape[1:]))  # of the images that other ranks have
    noise = 0.001 * generator.standard_normal(x.shape)  # at x itself the divergence has no gradient
    start = ball.project(x, x + array_module(x).asarray(noise, x.dtype))
    moved = ascend(
        model, ball, x, start, lambda z: kl_divergence(clean, z)[2], now["step_size"] * now["eps"], int(now["steps"])
    )
    (z, cache), (z_moved, cache_moved) = (model.forward(images, train=True) for images in (x, moved))
    ce, gradient = cross_entropy(z, labels)
    kl, by_z, by_moved = kl_divergence(z, z_moved)
    model.backward(gradient + now["beta"] * by_z, cache, input_grad=False)
    model.backward(now["beta"] * by_moved, cache_moved, input_grad=False)
    return {"loss": ce + now["beta"] * kl, "cross_entropy": ce, "kl": kl}


def mmc(model, x, labels, draw, now) -> dict:
    """The squared distance of the last layer's output from its class's centre (Pang et al. 2020), on clean images.

    In coordinates in which the nearest centre is the largest logit's: what is trained, saved and verified is a plain
    network. ``docs/derivations/mmc.md``.
    """
    logits, cache = model.forward(x, train=True)
    loss, gradient = max_mahalanobis(logits, labels, now["norm"])
    model.backward(gradient, cache, input_grad=False)
    return {"loss": loss, "cross_entropy": cross_entropy(logits, labels)[0]}


def msd(model, x, labels, draw, now) -> dict:
    """Cross-entropy at the worst image that ``steps`` multi-steepest descents came by (Maini, Wong, Kolter 2020).

    A step goes up the loss in linf, l2 and l1, each into its own ball, and on from the worst of the three. While eps
    grows, all radii do. ``docs/derivations/msd.md``.
    """
    labels = check_labels(labels, len(x))
    return standard_step(model, union_ascent(model, x, labels, draw(rng.METHOD), now), labels)


def union_ascent(model, x, labels, generator, now):
    """The images (N, H, W, C) that :func:`msd` learns from: each in one of the three balls, and in the box."""
    xp = array_module(x)
    current, best, highest = x, x.copy(), xp.full(len(x), -float("inf"))
    plain, eps_l1 = (Linf(now["eps"]), L2(now["ramp"] * now["eps_l2"])), now["ramp"] * now["eps_l1"]
    for _ in range(int(now["steps"])):
        gradient = input_gradient(model, current, lambda z: cross_entropy_each(z, labels)[1])
        balls = *plain, L1(eps_l1, int(generator.integers(5, 21)))
        sizes = *(now["step_size"] * ball.eps for ball in plain), now["ramp"] * now["step_l1"]
        three = [
            b.step(x, current, gradient, xp.full(len(x), size, x.dtype)) for b, size in zip(balls, sizes, strict=True)
        ]
        losses = xp.stack([cross_entropy_each(model.forward(images)[0], labels)[0] for images in three])
        current, worst, loss = three[0], losses.argmax(0), losses.max(0)
        for ball in (1, 2):
            of = xp.flatnonzero(worst == ball)
            current[of] = three[ball][of]
        better = xp.flatnonzero(loss > highest)
        best[better], highest[better] = current[better], loss[better]
    return best


def wasserstein(model, x, labels, draw, now) -> dict:
    """Cross-entropy at the images of the Wasserstein adversary (Wong, Schmidt, Kolter 2019), in training mode.

    ``radius`` is what its ball begins with, and ``factor`` what it grows by after every ``every`` of ``steps`` steps.
    Images that are wrong to begin with stay as they are; those that it does not fool are taken as it left them. A few
    ``iterations`` a projection do: the next goes on from its prices (``docs/derivations/sinkhorn.md``).
    """
    labels, xp = check_labels(labels, len(x)), array_module(x)
    radii = [now["radius"] * now["factor"] ** (step // int(now["every"])) for step in range(int(now["steps"]))]
    right = xp.flatnonzero(model.forward(x, train=True)[0].argmax(1) == labels)
    moved = x.copy()
    if len(right) and radii:
        moved[right], _ = wasserstein_ascend(
            model, x[right], labels[right], radii, now["step_size"], now["regularization"], int(now["iterations"]),
            train=True,
        )  # fmt: skip
    return standard_step(model, moved, labels)


def overfitted(fgsm: float, pgd: float, classes: int) -> bool:
    """Catastrophic overfitting (Wong, Rice, Kolter 2020): a step's attack hardly fools the network any more, several
    steps do. From the accuracies of the same images under both."""
    return fgsm > 2 / classes and pgd < fgsm / 4
