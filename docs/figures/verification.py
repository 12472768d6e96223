#!/usr/bin/env python3
"""One proof's way through the rooms of nanomr/verify, with how many images ended where, from the shipped run's report.

python docs/figures/verification.py [--report FILE] [--out docs/img/verification.png]
"""

import argparse
from pathlib import Path

from nanomr.checkpoint import read_json

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "bench/results/verify/small_cnn-cifar10-8_255.json"
COLOURS = {
    "running": "#e8e8e8", "bounds": "#cfe3f7", "exact": "#fbe3c0", "proofs": "#d5efd5", "formats": "#ead9f2"
}  # fmt: skip
STEPS = (  # (room, what happens there, the stages of the report that end images there)
    ("running", "forward pass", ("misclassified",)),
    ("running", "PGD\nattack.py", ("attacked by pgd",)),
    ("bounds", "intervals, CROWN\ncrown.py", ("verified by crown",)),
    ("bounds", "better slopes\nalpha-CROWN", ("verified by alpha-crown",)),
    ("running", "targeted PGD\nattack.py", ("attacked by targeted pgd",)),
    ("exact", "trees of cases\nbab.py", ("verified by bab", "falsified by bab")),
    ("exact", "programs, cuts\nhull.py", ("verified by hull", "falsified by hull")),
    ("exact", "MILP\nmilp.py", ("verified by milp", "falsified by milp")),
)


def draw(report: dict, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    stages = report["stages"] | {"misclassified": round((1 - report["clean"]) * report["images"])}
    figure, axes = plt.subplots(figsize=(13, 4.6), layout="constrained")

    def box(x, y, text, room, width=1.5):
        shape = FancyBboxPatch(
            (x - width / 2, y - 0.3), width, 0.6, boxstyle="round,pad=0.02", fc=COLOURS[room], ec="0.3"
        )
        axes.add_patch(shape)
        axes.text(x, y, text, ha="center", va="center", fontsize=9)

    def arrow(start, end, colour="0.3"):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2})

    left = report["images"]
    for n, (room, text, ends) in enumerate(STEPS):
        x = 1.9 * n
        box(x, 0, text, room)
        if n:
            arrow((x - 1.12, 0), (x - 0.78, 0))
            axes.text(x - 0.95, 0.38, f"{left:,}", ha="center", fontsize=9, color="0.25")
        for stage in ends:
            count = stages.get(stage, 0)
            left -= count
            up = stage.startswith("verified")
            if count:
                end = 1.0 if up else -1.0
                arrow((x, 0.33 if up else -0.33), (x, end), "green" if up else "firebrick")
                axes.text(
                    x + 0.08, 0.62 if up else -0.66, f"{count:,}", fontsize=10, color="green" if up else "firebrick"
                )
    last = 1.9 * (len(STEPS) - 1)
    axes.text(last + 0.95, 0, f"{left:,}\nundecided", ha="left", va="center", fontsize=9, color="0.25")
    proof = (
        "a proof: slopes, splits, multipliers in proofs/ID.safetensors;  proofs/checker.py evaluates it again, "
        "rounding errors included, with no code of the others"
    )
    box(last / 2, 1.35, proof, "proofs", 13.3)
    box(last / 2, -1.35, "a counterexample, held to the box and to both arithmetics again", "proofs", 13.3)
    for n, (room, colour) in enumerate(COLOURS.items()):
        axes.text(0.2 + 1.7 * n, -2.05, f"verify/{room}/", fontsize=9, bbox={"fc": colour, "ec": "0.3", "pad": 3})
    axes.text(
        0.2 + 1.7 * len(COLOURS), -2.05, "other people's networks and properties come in through formats/", fontsize=9
    )
    axes.set(xlim=(-0.9, last + 1.9), ylim=(-2.3, 1.8))
    axes.set_title(
        f"Where {report['images']:,} test images end (small network, {report['eps'] * 255:.0f}/255, JPEG copy)"
    )
    axes.axis("off")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img/verification.png")
    args = parser.parse_args()
    draw(read_json(args.report), args.out)


if __name__ == "__main__":
    main()
