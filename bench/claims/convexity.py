#!/usr/bin/env python3
"""Section 5.3: do corners that agree say that the whole box does? ``docs/claims.md``.

python bench/claims/convexity.py --weights pretrained/small_cnn-cifar10 --data-dir DIR \
    --json bench/results/claims/convexity.json --picture docs/img/claims_convexity.png
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

import nanomr as mr
from nanomr import data, metrics
from nanomr.checkpoint import write_json
from nanomr.layers import Flatten, ReLU
from nanomr.manifold import hamming_embedding
from nanomr.models import Model
from nanomr.verify.bounds.crown import Box, Lines, crown, lower
from nanomr.verify.chain import Chain
from nanomr.verify.exact.bab import branch_and_bound

EPS = 8 / 255
PAIRS = (1, 10, 100, 1000)
COUNTEREXAMPLE = np.array([[-1, -1], [1, 1], [1, -1], [-1, 1]]), np.array([0.9, -1.1, -0.1, -0.1])  # laplacian.md's


def seen_by_corners(model, x, pairs, seed: int):
    """For each of ``pairs``: per layer (U,), does the ReLU take both branches over that many pairs of corners of x?"""
    g, on, off, found, done = np.random.default_rng(seed), None, None, [], 0
    for count in pairs:
        for first in range(done, count, 100):
            rho = g.choice(np.float32([-EPS, EPS]), (min(100, count - first), *x.shape))
            bits = [b.reshape(len(b), -1) for b in hamming_embedding(model, np.concatenate([x + rho, x - rho]))]
            on = [b.any(0) | o for b, o in zip(bits, on or [False] * len(bits), strict=True)]
            off = [(~b).any(0) | o for b, o in zip(bits, off or [False] * len(bits), strict=True)]
        found.append([a & b for a, b in zip(on, off, strict=True)])
        done = count
    return found


def prefixes(model) -> list[Chain]:
    """For each ReLU the network before it, flattened, as the verifier's chain: its outputs are that ReLU's inputs."""
    children, chains = {}, []
    for name, layer in model.children.items():
        if isinstance(layer, ReLU):
            flat = {} if any(isinstance(c, Flatten) for c in children.values()) else {"flat": Flatten()}
            chains.append(Chain(Model({**children, **flat}, input_shape=model.input_shape)))
        children[name] = layer
    return chains


def switching(chains, x, seen, seconds: float):
    """Per layer (U,): 1 where the ReLU takes both branches in the box around x, 0 where one, -1 undecided.

    The box is not clipped to [0, 1], as the corners of training are not. ``seen``: those of which it is known.
    """
    low, high = (x[None].astype(np.float64) + side for side in (-EPS, EPS))
    box, relus, found = Box.between(low, high), [], []
    for chain, known in zip(chains, seen, strict=True):
        units = chain.classes
        relus = crown(chain, low, high)
        lines, eye = [Lines.around(*r) for r in relus], np.eye(units)
        answer = np.where(known, 1, -1)
        for side in (1, -1):  # z > 0 everywhere, z < 0 everywhere
            at = np.flatnonzero(answer < 0)
            for part in np.array_split(at, max(len(at) // 256, 1)):
                bound = lower(chain, box, lines, side * eye[part], np.zeros(len(part), int))
                answer[part[bound.value > 0]] = 0
                if len(bound.image):
                    worst = box.centre - box.radius * np.sign(bound.image.reshape(len(part), *x.shape))
                    z = np.take_along_axis(chain.forward(worst)[0], part[:, None], 1)[:, 0]
                    z0 = chain.forward(x[None])[0][0, part]
                    answer[part[(answer[part] < 0) & (z * z0 < 0)]] = 1
        z0 = chain.forward(x[None])[0][0]
        for unit in np.flatnonzero(answer < 0):
            row = eye[unit] * np.sign(z0[unit])
            tree = branch_and_bound(chain, low, high, relus, row, cpu_limit=seconds)
            answer[unit] = {"proved": 0, "candidate": 1}.get(tree.status, -1)
        found.append(answer)
    return found


def measure(model, images, ids, seconds: float, seed: int) -> list[dict]:
    """One record an image: per layer how many ReLUs switch in the box, and how many of them corners show."""
    chains, records = prefixes(model), []
    for i in tqdm(ids, unit="img", disable=None):
        x = metrics.as_float(images[i])
        seen = seen_by_corners(model, x, PAIRS, seed + int(i))
        exact = switching(chains, x, seen[-1], seconds)
        records.append({
            "id": int(i), "switch": [int((e == 1).sum()) for e in exact],
            "undecided": [int((e < 0).sum()) for e in exact],
            "seen": {str(n): [int(s.sum()) for s in each] for n, each in zip(PAIRS, seen, strict=True)},
        })  # fmt: skip
    return records


def summary(records) -> dict:
    """Sums over the images; "agree": images of which all sampled corners agree on every ReLU, and of these those that
    hide one that switches."""
    switch = np.array([r["switch"] for r in records])
    result = {"images": len(records), "switch": switch.sum(0).tolist(),
              "undecided": np.array([r["undecided"] for r in records]).sum(0).tolist(), "seen": {}}  # fmt: skip
    for n in map(str, PAIRS):
        seen = np.array([r["seen"][n] for r in records])
        agree = seen.sum(1) == 0
        result["seen"][n] = {
            "by_layer": seen.sum(0).tolist(), "share": float(seen.sum() / max(switch.sum(), 1)),
            "agree": int(agree.sum()), "of_these_hide_one": int((agree & (switch.sum(1) > 0)).sum()),
        }  # fmt: skip
    return result


def draw(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    a, b = COUNTEREXAMPLE
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 401)] * 2, indexing="ij"), -1)
    bits = grid @ a.T + b > 0
    left.contourf(
        grid[..., 0], grid[..., 1], bits.sum(-1), levels=[-0.5, 0.5, 1.5, 2.5], colors=["white", "#cfe3f7", "#7aa6d6"]
    )
    for k in range(4):
        left.contour(grid[..., 0], grid[..., 1], (grid @ a.T + b)[..., k], levels=[0], colors="0.3", linewidths=1)
    middles = np.array([[0.5, 0], [0.5, 1]])
    left.plot(*np.array([[0, 0, 1, 1], [0, 1, 0, 1]]), "ks", label="corners: any two differ in 2 ReLUs", clip_on=False)
    left.plot(*middles.T, "ro-", label="these two differ in 4", clip_on=False)
    left.set(title="Four ReLUs, each on in one corner", aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), fontsize=9)
    layers = range(len(result["switch"]))
    for n in map(str, PAIRS):
        seen = np.array(result["seen"][n]["by_layer"]) / np.maximum(result["switch"], 1)
        right.plot(layers, 100 * seen, "o-", label=f"{n} pair{'s' * (n != '1')} of corners")
    right.set(xticks=layers, xticklabels=[f"ReLU layer {k + 1}" for k in layers], ylim=(0, 100),
              ylabel="% of the ReLUs that switch in the box", title="What corners show of them")  # fmt: skip
    right.legend(fontsize=9)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--weights", type=Path, default=Path("pretrained/small_cnn-cifar10"))
    p.add_argument("--data-dir", type=Path, help="folder with cifar-10-batches-bin")
    p.add_argument("--n", type=int, default=20, help="the first so many test images")
    p.add_argument("--seconds", type=float, default=10, help="of CPU time for one ReLU")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path)
    p.add_argument("--picture", type=Path)
    args = p.parse_args()
    images = data.load("cifar10", args.data_dir).test_images
    records = measure(mr.load(args.weights), images, range(args.n), args.seconds, args.seed)
    result = summary(records)
    for key, value in result.items():
        print(key, value)
    if args.json:
        write_json(args.json, {"seed": args.seed, "eps": EPS, **result, "each": records})
    if args.picture:
        draw(result, args.picture)


if __name__ == "__main__":
    main()
