"""How noisy do bfloat16 activations make the gradient? Of the cross-entropy and of the Hamming term, one by one.

python bench/bf16_noise.py        # PreActResNet18 at its first step, on the CPU: half a minute; the last line is JSON

Every picture, forward and backward, is rounded to bfloat16 as it is stored, as on a GPU (docs/gpu.md); sums and weights
stay float32. The noise of a gradient is the length of its difference from the float32 one, over its length.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from nanomr import data, layers, losses, manifold, models
from nanomr.ops import cpu


def rounded(x):
    """float32 numbers rounded to the nearest bfloat16 (ties to even)."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


class Rounded:
    """``ops.cpu``, with rounded pictures."""

    def __getattr__(self, name):
        function = getattr(cpu, name)

        def run(*args):
            result = function(*args)
            if name == "conv2d_weight_gradient":
                return result
            if isinstance(result, tuple):
                return tuple(rounded(r) if r.ndim == 4 else r for r in result)
            return rounded(result) if result.ndim == 4 else result

        return run


def gradients(model, ops, x, rho, labels) -> dict:
    """{"cross-entropy", "hamming"}: the flat gradient of each, alone."""
    layers.ops_for = losses.ops_for = lambda _: ops
    found = {}
    for term in ("cross-entropy", "hamming"):
        model.zero_grad()
        tap = losses.Hamming(weight=1.0)
        logits, cache = model.forward(layers.PairBatch(x, rho), train=True, tap=tap)
        d_logits = np.zeros_like(logits)
        if term == "cross-entropy":
            tap.weight = 0.0
            d_logits[: len(x)] = losses.cross_entropy(logits[: len(x)], labels)[1]
        model.backward(d_logits, cache, input_grad=False)
        found[term] = model.gradients.copy()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="clean images in the batch (%(default)s)")
    args = parser.parse_args()
    dataset = data.load("shapes10")
    x = (dataset.train_images[: args.images] / np.float32(255)).astype(np.float32)
    labels, model, result = dataset.train_labels[: args.images], models.preact_resnet18(seed=0), {}
    for eps in (2, 8):
        rho = manifold.corner_pairs(x, eps / 255, 0, 0)
        exact = gradients(model, cpu, x, rho, labels)
        noisy = gradients(model, Rounded(), rounded(x), rounded(rho), labels)
        for term, gradient in exact.items():
            noise = np.linalg.norm(noisy[term] - gradient) / np.linalg.norm(gradient)
            cosine = noisy[term] @ gradient / np.linalg.norm(noisy[term]) / np.linalg.norm(gradient)
            result[f"{term}, eps {eps}/255"] = {"noise": float(noise), "cosine": float(cosine)}
            print(f"eps {eps}/255  {term:14} noise {noise:6.2%}  cosine {cosine:.5f}", flush=True)
    print(json.dumps({"images": args.images, **result}))


if __name__ == "__main__":
    main()
