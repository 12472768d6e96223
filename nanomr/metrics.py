"""What the log says of a model after each epoch: accuracy, and how stable its ReLUs are around the images."""

from .attacks import pgd
from .attacks.common import logits_of
from .backend import array_module
from .borders import check_labels
from .manifold import corner_pairs, hamming_distance, hamming_embedding
from .verify import interval


def as_float(images):
    """uint8 images as float32 in [0, 1]; float32 images are that already."""
    return images if images.dtype.name == "float32" else images * array_module(images).float32(1 / 255)


def accuracy(model, images, labels, batch_size=1000) -> float:
    """Share of uint8 ``images`` (N, H, W, C) that the model classifies as ``labels`` (N,) say.

    Raises NoClass, a ValueError, when logits are NaN or infinite.
    """
    right, labels = 0, check_labels(labels, len(images))
    for i in range(0, len(images), batch_size):
        logits = logits_of(model, as_float(images[i : i + batch_size]))
        right += int((logits.argmax(1) == labels[i : i + batch_size]).sum())
    return right / len(images)


def robust_accuracy(model, images, labels, eps, progress=None, **options) -> float:
    """Share of ``images`` that survive :func:`nanomr.attacks.pgd` (its ``options``); raises as that does."""
    _, fooled = pgd(model, as_float(images), labels, eps, progress=progress, **options)
    return 1 - int(fooled.sum()) / len(images)


def stability(model, images, eps, seed=0, batch_size=500) -> dict:
    """How the ReLUs behave around uint8 ``images``:

    - "corner_distance": mean Hamming distance (ReLUs) between two random opposite corners of the eps-ball
    - "unstable": share of (ReLU, image) whose input may have either sign in the ball, by interval bounds (too many)
    - "switching": ReLUs that are on for some of the images and off for others; 0 means a linear classifier
    - "dead": ReLUs that are off for all of them; "relus": how many there are
    """
    distance, unstable, total, ever_on, ever_off = 0, 0, 0, None, None
    for i in range(0, len(images), batch_size):
        x = as_float(images[i : i + batch_size])
        xp = array_module(x)
        rho = corner_pairs(x, eps, seed, i)
        distance += int(hamming_distance(model, x + rho, x - rho).sum())
        _, bounds = interval(model, xp.clip(x - eps, 0, 1), xp.clip(x + eps, 0, 1))
        unstable += sum(int(((low < 0) & (high > 0)).sum()) for low, high in bounds)
        total += sum(low.size for low, _ in bounds)
        bits = hamming_embedding(model, x)
        on, off = [b.any(0) for b in bits], [(~b).any(0) for b in bits]
        ever_on = on if ever_on is None else [a | b for a, b in zip(ever_on, on, strict=True)]
        ever_off = off if ever_off is None else [a | b for a, b in zip(ever_off, off, strict=True)]
    return {
        "corner_distance": distance / len(images),
        "unstable": unstable / total,
        "switching": sum(int((a & b).sum()) for a, b in zip(ever_on, ever_off, strict=True)),
        "dead": sum(int((~a).sum()) for a in ever_on),
        "relus": sum(a.size for a in ever_on),
    }
