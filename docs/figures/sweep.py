#!/usr/bin/env python3
"""The sweep for the small network's constants, as a Markdown table and a picture, from bench/results/sweep.jsonl.

python docs/figures/sweep.py [--out docs/img/sweep.png]
"""

import argparse
from pathlib import Path

from nanomr.checkpoint import read_jsonl

COLLAPSED = 0.12  # clean accuracy; chance is 0.1
ROOT = Path(__file__).resolve().parents[2]


def table(rows) -> str:
    lines = [
        "| # | epochs | gamma_i | gamma_h | norm | lr | clip | clean % | PGD-20x2 % | unstable % | switching | dead |",
        "|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for number, r in enumerate(rows, 1):
        s = r["settings"]
        scores = f"{100 * r['clean']:.1f} | {100 * r['pgd20x2']:.1f} | {100 * r['unstable']:.1f}"
        lines.append(
            f"| {number} | {r['epochs']} | {s['gamma_i']:g} | {s['gamma_h']:g} | {s.get('hamming_norm', 'batch')} "
            f"| {s['lr']:g} | {s['clip'] or '-'} | {scores} | {r['switching']} | {r['dead']} |"
        )
    return "\n".join(lines)


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    alive = [r for r in rows if r["clean"] > COLLAPSED]
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    for epochs, marker in ((10, "o"), (20, "s")):
        part = [r for r in alive if r["epochs"] == epochs]
        x, y, colour = ([100 * r[key] for r in part] for key in ("clean", "pgd20x2", "unstable"))
        style = dict(s=70, cmap="viridis", vmin=0, vmax=20, edgecolor="k", linewidth=0.5)
        points = axes.scatter(x, y, c=colour, marker=marker, label=f"{epochs} epochs", **style)
    for r in alive:
        at, number = (100 * r["clean"], 100 * r["pgd20x2"]), str(rows.index(r) + 1)
        axes.annotate(number, at, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.axvline(36.66, color="0.6", lw=0.8, ls="--")
    axes.axhline(25.56, color="0.6", lw=0.8, ls="--")
    axes.annotate("the paper's small network\n(100 epochs, test set)", (30.2, 25.7), fontsize=8, color="0.4")
    axes.set(xlabel="clean accuracy, held-out images, %", ylabel="PGD-20 x 2 accuracy at 8/255, %")
    axes.set_title("Short runs; numbers as in the table; those that collapsed are left out", fontsize=10)
    figure.colorbar(points, label="ReLUs that interval bounds leave unstable, %")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img/sweep.png")
    rows = read_jsonl(ROOT / "bench/results/sweep.jsonl")
    print(table(rows))
    draw(rows, parser.parse_args().out)


if __name__ == "__main__":
    main()
