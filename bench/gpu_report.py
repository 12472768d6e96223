"""A report of a day with a GPU, as Markdown to paste into an issue: of bench/gpu.py's file and of gpu_all.sh's.

python bench/gpu_report.py [FOLDER [DEVICE]]       # bench/results, the newest file there
"""

import json
import sys
from pathlib import Path

TILES = ("usual", "square", "deep", "wgmma")  # of nanomr.ops.gpu.conv


def table(head: str, rows: list[list[str]]) -> list[str]:
    columns = head.split(" | ")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def figures(found: dict) -> list[str]:
    """The sections that are there; those that are not are named."""
    lines, missing = [], []
    steps, memory = found.get("steps_us", {}), found.get("memory_mb", {})
    if steps:
        n = found["images"] / 3
        rows = [
            [name, f"{us / 1e3:.2f}", f"{n / us * 1e6:.0f}", f"{memory[name]:.0f}" if memory.get(name) else ""]
            for name, us in steps.items()
        ]
        lines += table("manifold step | ms | images/s | MB", rows)
    if "step_vs_torch_best" in found:
        of = found["torch_best_of"]
        unseen = [name for name in ("torch compile", "torch compile graph") if name not in of]
        but = f"; not measured, so that it flatters us: {', '.join(unseen)}" if unseen else ""
        ratio = f"**ours / PyTorch's best: {found['step_vs_torch_best']:.2f}**"
        lines += [f"{ratio} (the best of {', '.join(of)}{but})", ""]
    else:
        missing.append("PyTorch")
    if "training_minutes" in found:
        lines += [f"100 epochs at this pace: {found['training_minutes']:.0f} minutes.", ""]
    if found.get("tiles"):
        rows = [
            [of, name, f"{us:.0f}", f"{usual:.0f}" if usual else ""] for of, (name, us, usual) in found["tiles"].items()
        ]
        lines += table("product | its tile, by the self-test | us | us, the usual one", rows)
    if rows := found.get("convolutions"):
        cells = []
        for r in rows:
            ratio = f"{r['us'] / r['cudnn_bfloat16_us']:.2f}" if "cudnn_bfloat16_us" in r else ""
            speed = f"{r['us']:.0f}", f"{r['tflops']:.0f}", f"{r['share_of_floor']:.0%}"
            tiles = [f"{r[f'{name}_us']:.0f}" if f"{name}_us" in r else "" for name in TILES]
            cells.append([r["name"], r["direction"], *speed, ratio, *tiles])
        head = "convolution | direction | us | TFLOP/s | of the floor | times cuDNN's"
        lines += table(" | ".join([head, *(f"us, {name}" for name in TILES)]), cells)
    if rows := found.get("passes"):
        cells = [[r["name"], f"{r['us']:.0f}", f"{r['gb_per_s']:.0f}", f"{r['share_of_floor']:.0%}"] for r in rows]
        lines += table("pass | us | GB/s | of the floor", cells)
    if kernels := found.get("kernels_us"):
        total = sum(kernels.values())
        rows = [[name, f"{us:.0f}", f"{us / total:.1%}"] for name, us in list(kernels.items())[:15]]
        lines += table("kernel, of a step from Python | us | share", rows)
    if attacks := found.get("attacks"):
        lines += table("attack | images/s", [[k.removesuffix(" images/s"), f"{v:.1f}"] for k, v in attacks.items()])
    names = {"convolutions": "convolutions", "passes": "passes", "kernels_us": "a step by kernel", "attacks": "attacks"}
    missing += [name for key, name in names.items() if not found.get(key)]
    return lines + [f"- {name}: not measured" for name in missing] + [f"- {note}" for note in found.get("notes", [])]


def report(folder: Path, device: str | None = None) -> str:
    """Of ``device``, the name of its files; None: of the newest."""
    files = sorted(folder.glob("*-tests.txt"), key=lambda path: path.stat().st_mtime)
    device = device or (files[-1].name.removesuffix("-tests.txt") if files else "gpu")
    tests, numbers = folder / f"{device}-tests.txt", folder / f"{device}.json"
    lines = [f"## nanomr on {device}", ""]
    if tests.exists():
        lines += ["```", tests.read_text().rstrip(), "```", ""]
    if numbers.exists():
        lines += figures(json.loads(numbers.read_text()))
    else:
        lines.append(f"There are no figures: {numbers.name} does not exist.")
    return "\n".join(lines)


def main(arguments=None):
    given = sys.argv[1:] if arguments is None else arguments
    print(report(Path(given[0] if given else "bench/results"), *given[1:2]))


if __name__ == "__main__":
    main()
