"""Manifold regularisation: corner pairs, the graph Laplacian that they sparsify, and Hamming embeddings.

Sections 2 and 5 of the paper; ``docs/derivations/laplacian.md``.
"""

from . import rng
from .backend import array_module
from .borders import check
from .ops import ops_for


def corner_pairs(x, eps: float, seed: int, step: int):
    """rho in {+eps, -eps}^d, shaped as x (N, H, W, C): x + rho and x - rho are opposite corners of the eps-ball.

    Drawn afresh for each (seed, step), equal on every device. ``eps`` in pixel units ([0, 1]).
    """
    check("corner_pairs", "x", x, (...,))
    return corners_of(x, eps, rng.words(seed, rng.CORNERS, step, -(-x.size // 64)))


def corners_of(x, eps: float, words, before: int = 0):
    """The same of ``words``, one random uint64 for each 64 numbers of x, and of the ``before`` that come before it."""
    start, before = divmod(before, 64)
    words = array_module(x).asarray(words[start:])
    signs = ops_for(x).corners(words, (before + x.size,), eps)[before:]
    return signs.reshape(x.shape).astype(x.dtype, copy=False)


def heat_kernel(x, scale: float):
    """Weights exp(-|x_j - x_k|^2 / scale) between the points of each set: x (..., c, d) -> (..., c, c)."""
    check("heat_kernel", "x", x, (..., "d"))
    xp = array_module(x)
    difference = x[..., :, None, :] - x[..., None, :, :]
    return xp.exp((difference * difference).sum(-1) * (-1.0 / scale))


def laplacian(f, weights):
    """Eq. 2: (1/N^2 sum_ij |f_i - f_j|^2 L_ij, its gradient by f). f (N, K), weights L (N, N)."""
    check("laplacian", "f", f, ("N", "K"))
    check("laplacian", "weights", weights, (len(f), len(f)))
    value, gradient = resampled_laplacian(f[None], weights[None])
    return value, gradient[0]


def resampled_laplacian(f, weights):
    """Eq. 7: (1/(c N)^2 sum_i sum_jk |f_ij - f_ik|^2 L_ijk, its gradient by f). f (N, c, K), weights (N, c, c).

    Two points and a constant weight of 1 give the pair form: intrinsic(f+, f-) / (2 N).
    """
    check("resampled_laplacian", "f", f, ("N", "c", "K"))
    check("resampled_laplacian", "weights", weights, (*f.shape[:2], f.shape[1]))
    n, c, _ = f.shape
    scale = 1.0 / (c * n) ** 2
    difference = f[:, :, None] - f[:, None]
    value = ((difference * difference).sum(-1) * weights).sum() * scale
    symmetric = (weights + weights.swapaxes(1, 2))[..., None]
    return value, (symmetric * difference).sum(2) * (2 * scale)


class _Branches:
    """A tap that notes which branch each ReLU takes."""

    def __init__(self):
        self.bits = []

    def forward(self, z):
        self.bits.append(z > 0)
        return ops_for(z).relu(z), None


def hamming_embedding(model, x) -> list:
    """The activation pattern H(x) (section 5.3): for each ReLU layer, a boolean array (N, ...), True where z > 0."""
    tap = _Branches()
    model.forward(x, tap=tap)
    return tap.bits


def hamming_distance(model, x, y):
    """H(x, y): on how many ReLUs the two inputs take different branches, (N,) integers.

    It is the limit of sum |tanh(alpha z) - tanh(alpha z')| / 2 as alpha grows.
    """
    check("hamming_distance", "x", x, (...,))
    check("hamming_distance", "y", y, x.shape, x.dtype)
    pairs = zip(hamming_embedding(model, x), hamming_embedding(model, y), strict=True)
    return sum(((a != b).reshape(len(a), -1).sum(1) for a, b in pairs), start=array_module(x).zeros(len(x), int))
