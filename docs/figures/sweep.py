#!/usr/bin/env python3
"""The sweep for the small network's constants, as a Markdown table and a picture, from bench/results/sweep.jsonl.

python docs/figures/sweep.py [--out docs/img/sweep.png]
"""

import argparse
from pathlib import Path

from nanomr.checkpoint import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def table(rows) -> str:
    lines = [
        "| epochs | gamma_i | gamma_h | norm | lr | clip | clean % | PGD-20x2 % | unstable % | switching | dead |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        s = r["settings"]
        scores = f"{100 * r['clean']:.1f} | {100 * r['pgd20x2']:.1f} | {100 * r['unstable']:.1f}"
        lines.append(
            f"| {r['epochs']} | {s['gamma_i']:g} | {s['gamma_h']:g} | {s.get('hamming_norm', 'batch')} | {s['lr']:g} | "
            f"{s['clip'] or '-'} | {scores} | {r['switching']} | {r['dead']} |"
        )
    return "\n".join(lines)


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    for epochs, marker in ((10, "o"), (20, "s")):
        part = [r for r in rows if r["epochs"] == epochs]
        points = axes.scatter(
            [100 * r["clean"] for r in part], [100 * r["pgd20x2"] for r in part], c=[100 * r["unstable"] for r in part],
            marker=marker, s=70, cmap="viridis", vmin=0, vmax=20, edgecolor="k", linewidth=0.5, label=f"{epochs} epochs",
        )  # fmt: skip
        for r in part:
            s = r["settings"]
            text = f"{s['gamma_i']:g}, {s['gamma_h']:g}" + (f", lr {s['lr']:g}" if s["lr"] != 0.03 else "")
            text += " (sample)" if s.get("hamming_norm") == "sample" else ""
            collapsed = r["clean"] < 0.12
            shift = (6, -14 if collapsed and "sample" not in text else 4)
            axes.annotate(
                text, (100 * r["clean"], 100 * r["pgd20x2"]), xytext=shift, textcoords="offset points", fontsize=7
            )
    axes.axvline(36.66, color="0.6", lw=0.8, ls="--")
    axes.axhline(25.56, color="0.6", lw=0.8, ls="--")
    axes.annotate("the paper, 100 epochs, test set", (12.5, 25.75), fontsize=7, color="0.4")
    axes.set(xlabel="clean accuracy, held-out images, %", ylabel="PGD-20 x 2 accuracy at 8/255, %")
    axes.set_title("Sweep of (gamma_i, gamma_h) on short runs, CIFAR-10 (JPEG copy)", fontsize=10)
    figure.colorbar(points, label="ReLUs that interval bounds leave unstable, %")
    axes.legend(loc="center left", fontsize=8)
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
