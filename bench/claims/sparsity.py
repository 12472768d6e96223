#!/usr/bin/env python3
"""Section 5.2: is the data sparse enough to drop the Laplacian's long edges (eq. 7)? ``docs/claims.md``.

python bench/claims/sparsity.py --data-dir DIR --json bench/results/claims/sparsity.json \
    --picture docs/img/claims_sparsity.png
"""

import argparse
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanomr import data, metrics
from nanomr.checkpoint import write_json

EPS = 8 / 255
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 100)


def squared_distances(queries, images, block: int = 500):
    """Yield (rows, squared l2 distances (R, N)) of flat float32 images, by blocks of queries."""
    norms = np.einsum("nd,nd->n", images, images)
    for i in tqdm(range(0, len(queries), block), unit="block", disable=None):
        part = queries[i : i + block]
        squares = np.einsum("nd,nd->n", part, part)[:, None] + norms - 2 * part @ images.T
        yield slice(i, i + len(part)), np.maximum(squares, 0)


def nearest(queries, images, ids, scales):
    """Of each query, which is images[ids]: (distance to the nearest other image, which one, sum of exp(-d^2 / s) over
    all others for each s (Q, S))."""
    least, which = np.empty(len(queries)), np.empty(len(queries), int)
    mass = np.empty((len(queries), len(scales)))
    for rows, squares in squared_distances(queries, images):
        squares[np.arange(len(squares)), ids[rows]] = np.inf
        which[rows] = squares.argmin(1)
        for k, s in enumerate(scales):
            mass[rows, k] = np.exp(squares * np.float32(-1 / s)).sum(1, dtype=float)
        least[rows] = [np.linalg.norm(q - images[j]) for q, j in zip(queries[rows], which[rows], strict=True)]
    return least, which, mass


def measure(images, labels, count: int, seed: int) -> dict:
    """What the long edges weigh beside the short ones, over a range of s.

    Short: the one edge of a corner pair, 2 eps sqrt(d) long, in both directions; of 2 points an image, so the long ones
    count four times each: from each of the image's two points to each of the other's two. Distances between centres
    stand for them (their mean square differs by 2 eps^2 d).
    """
    flat = metrics.as_float(images).reshape(len(images), -1)
    ids = np.sort(np.random.default_rng(seed).choice(len(flat), count, replace=False))
    d = flat.shape[1]
    short = 2 * EPS * math.sqrt(d)
    shares = np.append(np.linspace(0.02, 0.96, 21), math.exp(-1))  # the weight that the short edge has
    shares.sort()
    scales = short**2 / -np.log(shares)
    least, which, mass = nearest(flat[ids], flat, ids, scales)
    between = np.exp(-2 * EPS**2 * d / scales)  # a long edge's mean square length is that much longer
    long = 4 * mass * between
    kept = 2 * shares / (2 * shares + long.mean(0))
    linf = np.array([abs(flat[i] - flat[j]).max() for i, j in zip(ids, which, strict=True)])
    at = np.abs(shares - math.exp(-1)).argmin()
    sorted_mass = np.sort(long[:, at])[::-1]
    near, same = least < short, labels[ids] == labels[which]
    return {
        "queries": count, "images": len(flat), "seed": seed, "eps": EPS, "short_edge": short,
        "nearest_l2": dict(zip(map(str, PERCENTILES), np.percentile(least, PERCENTILES).tolist(), strict=True)),
        "nearer_than_short_edge": int(near.sum()), "of_these_with_the_same_label": int(same[near].sum()),
        "nearest_has_the_same_label": float(same.mean()),
        "boxes_that_meet_the_nearest": float((linf <= 2 * EPS).mean()),
        "short_weight": shares.tolist(), "scale": scales.tolist(), "kept_share": kept.tolist(),
        "median_long_over_short": (np.median(long, axis=0) / (2 * shares)).tolist(),
        "at_exp_-1": {
            "kept_share": float(kept[at]), "mean_long_over_short": float(long[:, at].mean() / (2 * shares[at])),
            "of_the_long_weight_in_the_densest_percent": float(sorted_mass[: count // 100].sum() / sorted_mass.sum()),
            "images_whose_long_edges_weigh_more": float((long[:, at] > 2 * shares[at]).mean()),
        },
        "distances": least.tolist(),
    }  # fmt: skip


def draw(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    left.hist(result["distances"], bins=80, color="#7aa6d6")
    left.axvline(result["short_edge"], color="black", ls="--")
    left.text(result["short_edge"], left.get_ylim()[1] * 0.94, " opposite corners of one box", fontsize=9)
    left.set(xlabel="l2 distance to the nearest other training image", ylabel="images")
    right.plot(result["short_weight"], result["kept_share"], "o-", ms=3, label="share of the weight that is kept, mean")
    median = 1 / (1 + np.array(result["median_long_over_short"]))
    right.plot(result["short_weight"], median, "o-", ms=3, label="the same for the median image")
    right.set(xlabel="weight of the short edge, exp(-(2 eps)^2 d / s)", xlim=(0, 1), ylim=(-0.02, 1.02))
    right.legend(fontsize=9)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir", type=Path, help="folder with cifar-10-batches-bin")
    p.add_argument("--queries", type=int, default=2000, help="training images whose neighbours are looked for")
    p.add_argument("--images", type=int, default=50_000, help="training images in all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path)
    p.add_argument("--picture", type=Path)
    args = p.parse_args()
    dataset = data.load("cifar10", args.data_dir)
    images, labels = dataset.train_images[: args.images], dataset.train_labels[: args.images]
    result = measure(images, labels, args.queries, args.seed)
    if args.picture:
        draw(result, args.picture)
    del result["distances"]
    for key, value in result.items():
        print(key, value)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
