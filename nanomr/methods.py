"""What one training step minimises: its value and its gradient, added to ``model.gradients``.

    cross-entropy(clean) + gamma_i intrinsic(pair) + gamma_h hamming(pair)          section 5.4, "the final objective"

The ambient term gamma_K |w|^2 is the optimiser's weight decay.
"""

from .backend import array_module
from .layers import PairBatch
from .losses import Hamming, cross_entropy, intrinsic

METHODS = ("manifold", "intrinsic", "hamming", "standard")


def standard_step(model, x, labels) -> dict:
    """Cross-entropy on x (N, H, W, C) and labels (N,): {"loss", "cross_entropy"}."""
    logits, cache = model.forward(x, train=True)
    value, gradient = cross_entropy(logits, labels)
    model.backward(gradient, cache, input_grad=False)
    return {"loss": value, "cross_entropy": value}


def manifold_step(model, x, labels, rho, gamma_i=0.0, gamma_h=0.0, alpha=8.0, per_sample=False) -> dict:
    """Cross-entropy on x, both regularisers on the corners x + rho and x - rho, in one 3N batch [x; x + rho; x - rho].

    x, rho (N, H, W, C); labels (N,). {"loss", "cross_entropy", "intrinsic", "hamming"}, the last two unweighted.
    ``docs/derivations/pair_batch.md``.
    """
    n = len(x)
    tap = Hamming(alpha, gamma_h, per_sample)
    logits, cache = model.forward(PairBatch(x, rho), train=True, tap=tap)
    ce, d_clean = cross_entropy(logits[:n], labels)
    pair, d_plus, d_minus = intrinsic(logits[n : 2 * n], logits[2 * n :])
    gradient = array_module(x).concatenate([d_clean, gamma_i * d_plus, gamma_i * d_minus])
    model.backward(gradient, cache, input_grad=False)
    loss = ce + gamma_i * pair + gamma_h * tap.value
    return {"loss": loss, "cross_entropy": ce, "intrinsic": pair, "hamming": tap.value}
