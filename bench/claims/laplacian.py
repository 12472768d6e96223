#!/usr/bin/env python3
"""Proposition 5.1 and section 5.2 on manifolds whose Laplace-Beltrami operator is known. ``docs/claims.md``.

python bench/claims/laplacian.py --json bench/results/claims/laplacian.json --picture docs/img/claims_laplacian.png
"""

import argparse
import math
from pathlib import Path

import numpy as np

from nanomr.checkpoint import write_json

RATIOS = {"eps^2 = s n^(-1/4)": None, "eps^2 = s / 4": 0.25, "eps^2 = s": 1.0, "eps^2 = 4 s": 4.0}
SIZES = [int(n) for n in np.geomspace(1e3, 1e6, 7)]


def circle(g, n):
    angle = g.uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def sphere(g, n):
    x = g.normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def torus(g, n):
    """The flat one, in four dimensions."""
    return np.hstack([circle(g, n), circle(g, n)])


# name: (draw, dimension, volume, -Laplace-Beltrami of f(x) = x_1 over f)
MANIFOLDS = {
    "circle": (circle, 1, 2 * np.pi, 1.0),
    "sphere": (sphere, 2, 4 * np.pi, 2.0),
    "torus": (torus, 2, 4 * np.pi**2, 1.0),
}


def scale(n: int, dimension: int) -> float:
    """s for which the error's two parts, of order s and (n s^(d/2 + 1))^(-1/2), fall alike."""
    return n ** (-2 / (dimension + 6))


def in_ball(g, n, d, eps):
    """Uniform in the ball of radius eps in d dimensions."""
    x = g.normal(size=(n, d))
    return x * (eps * g.random(n) ** (1 / d) / np.linalg.norm(x, axis=1))[:, None]


def operator(points, x, s, chunk=20_000):
    """The paper's L f at the points x (M, D), from samples (N, D), f(x) = x_1: mean of k_s(x, x_i) (f(x) - f(x_i))."""
    total = np.zeros(len(x))
    for i in range(0, len(points), chunk):
        part = points[i : i + chunk]
        squares = (x * x).sum(1)[:, None] + (part * part).sum(1) - 2 * x @ part.T
        weights = np.exp(-np.maximum(squares, 0) / s)
        total += weights.sum(1) * x[:, 0] - weights @ part[:, 0]
    return total / len(points)


def resampled(g, samples, eps, c):
    """c points in the eps-ball around each sample."""
    n, d = samples.shape
    return (samples[:, None] + in_ball(g, n * c, d, eps).reshape(n, c, d)).reshape(-1, d)


def medians(runs: list[list[dict]]) -> list[dict]:
    """The runs' rows, which differ in their figures alone, with each figure's median."""
    return [
        {k: float(np.median([r[k] for r in rows])) if isinstance(v, float) else v for k, v in rows[0].items()}
        for rows in zip(*runs, strict=True)
    ]


def error(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def proposition(name: str, sizes, ambient: int, c: int, seed: int, where: int = 100) -> list[dict]:
    """For each n: relative errors over ``where`` points of the manifold, in ``ambient`` dimensions (zeros appended).

    "to_laplace": of 4 vol / (s (pi s)^(d/2)) L_c f against -Laplace-Beltrami f; "to_original": of L_c f against L f;
    "up_to_factor": the same after the best constant factor, which is "factor".
    """
    draw, d, volume, eigenvalue = MANIFOLDS[name]
    g = np.random.default_rng([seed, ambient, c])
    x = draw(g, where)
    pad = [(0, 0), (0, max(ambient - x.shape[1], 0))]
    x, rows = np.pad(x, pad), []
    for n in sizes:
        s, samples = scale(n, d), np.pad(draw(g, n), pad)
        normal = 4 * volume / (s * (np.pi * s) ** (d / 2))
        original = operator(samples, x, s)
        rows.append(dict(manifold=name, ambient=x.shape[1], n=n, s=s, ratio="no resampling",
                         to_laplace=error(normal * original, eigenvalue * x[:, 0])))  # fmt: skip
        for label, ratio in RATIOS.items():
            eps = math.sqrt(s * (n**-0.25 if ratio is None else ratio))
            found = operator(resampled(g, samples, eps, c), x, s)
            factor = float(found @ original / (original @ original))
            rows.append(
                dict(manifold=name, ambient=x.shape[1], n=n, s=s, eps=eps, c=c, ratio=label,
                     to_laplace=error(normal * found, eigenvalue * x[:, 0]), to_original=error(found, original),
                     factor=factor, up_to_factor=error(found, factor * original))
            )  # fmt: skip
    return rows


def fixed(n: int, ambient: int, seed: int) -> list[dict]:
    """Fixed s and eps, eps^2 < s, as the proposition is written: does L_c f tend to L f on the circle?

    "predicted" is (s / (s + 2 v))^((D - 1) / 2), v = eps^2 / (D + 2): the factor for Gaussian perturbations of the
    ball's variance v in D dimensions, around a line (``docs/claims.md``).
    """
    g, s = np.random.default_rng([seed, 5]), 0.1
    x, samples = (np.pad(circle(g, m), [(0, 0), (0, ambient - 2)]) for m in (100, n))
    original, rows = operator(samples, x, s), []
    for ratio in (0.01, 0.1, 0.25, 0.5, 0.99):
        eps = math.sqrt(ratio * s)
        found = operator(resampled(g, samples, eps, 1), x, s)
        predicted = (1 + 2 * ratio / (ambient + 2)) ** (-(ambient - 1) / 2)
        rows.append(dict(n=n, ambient=ambient, s=s, ratio=ratio, to_original=error(found, original),
                         factor=float(found @ original / (original @ original)), predicted=predicted))  # fmt: skip
    return rows


def sparsified(n: int, seed: int, draws: int = 400) -> dict:
    """Section 5.2: edges kept with probability equal to their weight (unbiased), and long edges dropped (not)."""
    g, s = np.random.default_rng([seed, 6]), 0.05
    points = circle(g, n)
    weights = np.exp(-((points[:, None] - points) ** 2).sum(2) / s)
    form = ((points[:, None, 0] - points[None, :, 0]) ** 2) / n**2
    exact = float((form * weights).sum())
    upper = np.triu_indices(n, 1)
    w, each = weights[upper], 2 * form[upper]
    drawn = np.array([(each * (g.random(len(w)) < w)).sum() for _ in range(draws)])
    kept = {f"{share:g}": float((each * w)[w >= share].sum()) / exact for share in (0.001, 0.01, 0.1, 0.37)}
    deviation = drawn.std(ddof=1) / math.sqrt(draws)
    return dict(n=n, s=s, draws=draws, mean_over_exact=float(drawn.mean()) / exact, edges=float(w.sum() / len(w)),
                standard_errors=float((drawn.mean() - exact) / deviation), kept_above=kept)  # fmt: skip


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(MANIFOLDS)
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.9), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for label in ("no resampling", *RATIOS):
            line = [r for r in rows if r["manifold"] == name and r["ratio"] == label and r["ambient"] <= 4]
            style = {"color": "black", "ls": "--"} if label == "no resampling" else {}
            axis.loglog([r["n"] for r in line], [r["to_laplace"] for r in line], "o-", ms=3, label=label, **style)
        axis.set(title=name, xlabel="samples n")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the Laplace-Beltrami operator")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    p.add_argument("--seeds", type=int, default=5, help="runs, of which each figure is the median")
    p.add_argument("--json", type=Path)
    p.add_argument("--picture", type=Path)
    args = p.parse_args()
    seeds, rows = range(args.seeds), []
    for name in MANIFOLDS:
        rows += medians([proposition(name, args.sizes, ambient=0, c=2, seed=seed) for seed in seeds])
    rows += medians([proposition("circle", args.sizes[:5], ambient=50, c=2, seed=seed) for seed in seeds])
    constant = [row for d in (2, 50) for row in medians([fixed(max(args.sizes[:5]), d, seed) for seed in seeds])]
    sparse = sparsified(400, 0)
    for row in rows:
        print(" ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    for row in constant:
        print("fixed:", " ".join(f"{k} {v:.4g}" for k, v in row.items()))
    print("sparsified:", sparse)
    if args.json:
        write_json(args.json, {"seeds": args.seeds, "convergence": rows, "fixed": constant, "sparsified": sparse})
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
