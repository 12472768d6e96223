"""How fast are our kernels on a GPU? Whole steps, layers and single kernels, beside PyTorch and cuDNN, in one run.

python bench/gpu.py --dry-run     # the plan: what is timed, with its floor; needs no GPU
python bench/gpu.py               # within --budget; writes bench/results/<device>.json; last line: JSON
python bench/gpu.py --only "torch compile"     # these sections alone, added to that file

The file is written anew after each section, and copied to $OUT where that is set: what has been measured survives a
kill. gpu_plan.py says what is timed, gpu_ours.py and gpu_torch.py time it, gpu_report.py makes a report of the file;
docs/gpu.md says what the figures mean.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_ours
import gpu_plan
import gpu_torch
import numpy as np
from gpu_plan import BYTES, DIRECTIONS, EPOCHS, FULL, STEPS, TRAINING_IMAGES, Clock, Work, convolutions, passes

from nanomr import checkpoint
from nanomr.ops import gpu
from nanomr.ops.gpu import conv, selftest


class OutOfTime(BaseException):
    """The budget is used up. No Exception: whoever tries something and goes on must not take it for a failure."""


@contextmanager
def alarm(seconds: float):
    """Raise OutOfTime in what runs within it after so many seconds, even in the middle of a compilation."""

    def ring(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def slug(device: str) -> str:
    return re.sub(r"\W+", "-", device).strip("-").lower()


class Bench:
    """One run. ``result`` is what is known so far; ``clocks`` are those of ours and of PyTorch's device."""

    def __init__(self, args, work: Work, device: str, torch_device: str = "cuda"):
        self.args, self.work, self.began, self.torch_device = args, work, time.perf_counter(), torch_device
        self.file = args.out / f"{slug(device)}.json"
        self.clock = gpu_ours.CupyClock(args.seconds)
        self.result = {"device": device, "images": work.images, "notes": []}
        self.result |= {"floor_us": gpu_plan.floors(work), "steps_us": {}}
        if args.only and self.file.exists():  # figures of an earlier call on this device stay
            self.result |= json.loads(self.file.read_text())
            self.result["notes"] = [note for note in self.result["notes"] if args.only not in note]

    def report(self, text: str):
        self.result["notes"].append(text)
        print(text, flush=True)

    def left(self) -> float:
        return self.args.budget - (time.perf_counter() - self.began)

    def sections(self) -> list[tuple]:
        """(name, seconds below which it is not begun, what to do), what matters most first."""
        rows = [(name, 5, lambda name=name: self.step(name)) for name in STEPS if name.startswith("ours")]
        if not self.args.no_torch:
            rows += [(name, 8, lambda name=name: self.step(name)) for name in ("torch eager", "torch graph")]
        rows.append(("our convolutions", 8, self.our_convolutions))
        if not self.args.no_torch:
            for dtype in ("bfloat16", "float32"):
                rows.append((f"cuDNN {dtype}", 8, lambda dtype=dtype: self.cudnn(dtype)))
        rows += [("passes", 5, self.passes), ("time by kernel", 5, self.by_kernel), ("tiles", 10, self.tiles)]
        if not self.args.no_attacks:
            for attack in (f"PGD-{self.work.pgd_steps}", "AutoAttack/10"):
                for precision in ("bfloat16", "float32"):
                    name = f"{attack} {precision}"
                    rows.append((name, 10, lambda a=attack, p=precision: self.attack(a, p)))
        if not self.args.no_torch:
            if self.args.only:  # minutes of compiling: a call of its own
                compiled = ("torch compile", "torch compile graph")
                rows += [(name, 20, lambda name=name: self.step(name)) for name in compiled]
        return [row for row in rows if not self.args.only or self.args.only in row[0]]

    def run(self) -> dict:
        for name, least, section in self.sections():
            try:
                if self.left() < (least if self.args.seconds else least / 20):
                    self.report(f"{name}: left out, only {max(self.left(), 0):.0f} s of --budget were left")
                else:
                    with alarm(self.left()):
                        section()
            except OutOfTime:
                self.report(f"{name}: stopped, --budget is used up")
            except Exception as error:  # what fails must not cost the other figures
                traceback.print_exc()
                self.report(f"{name} failed: {type(error).__name__}: {str(error)[:500]}")
            self.save()
        if not (self.args.only or self.args.no_torch):
            self.report('torch compile: a call of its own, --only "torch compile"')
            self.save()
        return self.result

    def save(self):
        """Write what is known, atomically; into $OUT, too: a lent machine gives back what lies there."""
        self.result["seconds"] = time.perf_counter() - self.began
        for folder in (self.args.out, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomic(folder / self.file.name, json.dumps(self.result, indent=1) + "\n")

    def torch_clock(self):
        return (gpu_torch.TorchClock if self.torch_device == "cuda" else Clock)(self.args.seconds)

    def step(self, name: str):
        result, n = self.result, self.work.n
        if name.startswith("ours"):
            us, memory = gpu_ours.time_our_step(self.clock, self.work, name)
        else:
            us, memory = gpu_torch.time_torch_step(self.torch_clock(), self.work, name, self.torch_device)
        result["steps_us"][name] = us
        result.setdefault("memory_mb", {})[name] = memory
        print(f"{name:22} {us / 1e3:7.2f} ms a step, {n / us * 1e6:7.0f} images/s", flush=True)
        steps = result["steps_us"].items()
        best = {side: min((t for key, t in steps if key.startswith(side)), default=None) for side in ("ours", "torch")}
        if best["ours"]:
            result["peak_memory_mb"] = result["memory_mb"].get("ours")
            result["floor_share"] = {key: floor / best["ours"] for key, floor in result["floor_us"].items()}
            result["epoch_s"] = best["ours"] * (TRAINING_IMAGES // n) / 1e6
            result["training_minutes"] = result["epoch_s"] * EPOCHS / 60
        if best["ours"] and best["torch"]:
            result["step_vs_torch_best"] = best["ours"] / best["torch"]
            result["torch_best_of"] = [key for key, _ in steps if key.startswith("torch")]  # compiled ones too?

    def our_convolutions(self):
        found, rows = gpu_ours.our_convolutions(self.clock, self.work), []
        for layer in convolutions(self.work):
            for direction in DIRECTIONS:
                us = found[layer.name][direction]
                row = {"name": layer.name, "direction": direction, "us": us, "tflops": layer.flops / us / 1e6}
                rows.append(row | {"gb_per_s": layer.bytes / us / 1e3, "share_of_floor": layer.floor_us / us})
                figures = f"{us:7.1f} us {row['tflops']:5.0f} TFLOP/s {rows[-1]['gb_per_s']:5.0f} GB/s"
                print(f"{layer.name:22} {direction:15} {figures} {layer.floor_us / us:4.0%} of the floor", flush=True)
        self.result["convolutions"] = rows

    def cudnn(self, dtype: str):
        found = gpu_torch.torch_convolutions(self.torch_clock(), self.work, dtype, self.torch_device)
        for row in self.result.get("convolutions", []):
            row[f"cudnn_{dtype}_us"] = us = found[row["name"]][row["direction"]]
            beside = f"cuDNN {dtype} {us:7.1f} us, ours {row['us'] / us:5.2f} times that"
            print(f"{row['name']:22} {row['direction']:15} {beside}", flush=True)

    def tiles(self):
        """The convolutions in the other tiles that the self-test chooses from."""
        for name in dict.fromkeys(name for tiles in conv.TILES.values() for name in tiles):
            if name == "wgmma" and gpu_ours.compute_capability() != "90":
                continue
            found = gpu_ours.our_convolutions(self.clock, self.work, name)
            for row in self.result.get("convolutions", []):
                if us := found[row["name"]].get(row["direction"]):
                    row[f"{name}_us"] = us
                    beside = f"{row['us'] / us:5.2f} times as fast"
                    print(f"{row['name']:22} {row['direction']:15} {name} {us:7.1f} us, {beside}", flush=True)

    def passes(self):
        timed, rows = gpu_ours.our_passes(self.clock, self.work), []
        for name, shape, times in passes(self.work):
            moved = 2.0 * np.prod(shape) * times
            row = {"name": name, "us": timed[name], "gb_per_s": moved / timed[name] / 1e3}
            rows.append(row | {"share_of_floor": 1e6 * moved / BYTES / timed[name]})
            print(f"{name:24} {row['us']:7.1f} us {row['gb_per_s']:5.0f} GB/s", flush=True)
        self.result["passes"] = rows

    def by_kernel(self):
        found = gpu_ours.time_by_kernel(self.clock, self.work)
        total = sum(found.values())
        self.result["kernels_us"] = found
        for name, us in found.items():
            print(f"{name:28} {us:8.1f} us {us / total:6.1%}", flush=True)

    def attack(self, attack: str, precision: str):
        rate = gpu_ours.attack_rate(self.work, precision, attack)
        self.result.setdefault("attacks", {})[f"{attack} {precision} images/s"] = rate
        print(f"{attack} in {precision}: {rate:.1f} images/s", flush=True)


def measure(args, work: Work = FULL, torch_device: str = "cuda") -> dict:
    import cupy as cp

    device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    gpu.set_tf32(False)  # whatever CUPY_TF32 says
    bench = Bench(args, work, device, torch_device)
    bench.result["cupy"] = cp.__version__
    results = selftest.remembered()
    if results is None:
        bench.report("tiles: the usual ones; python -m nanomr.backend --test chooses them")
    else:
        selftest.use_tiles(results)
        bench.result["tiles"] = {of: list(tile) for of, tile in selftest.tiles(results).items()}
    return bench.run()


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan; nothing is timed, no GPU is needed")
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--no-attacks", action="store_true", help="leave the attacks out")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure; 0: does it run? (%(default)s)")
    parser.add_argument("--only", metavar="WORDS", help="sections with these words in their name, added to the file")
    text = "in all; what comes last is cut off or left out (%(default)s)"
    parser.add_argument("--budget", type=float, default=280, metavar="SECONDS", help=text)
    parser.add_argument(
        "--out", type=Path, default=gpu_plan.ROOT / "bench" / "results", help="folder for the JSON file"
    )
    return parser.parse_args(arguments)


def main():
    args = parse()
    if args.dry_run:
        print(json.dumps({"dry_run": True, **{f"{key}_floor_us": us for key, us in gpu_plan.show_plan().items()}}))
        return
    from nanomr.backend import gpu_available

    if not gpu_available():
        print("bench/gpu.py: no GPU: CuPy with a CUDA device is needed; --dry-run prints the plan", file=sys.stderr)
        raise SystemExit(2)
    result = measure(args)
    print(json.dumps(result))
    if any(" failed: " in note for note in result["notes"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
