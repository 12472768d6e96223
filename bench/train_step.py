"""How fast is one training step? nanomr against PyTorch eager, on the CPU. ``bench/README.md`` says how it is measured.

python bench/train_step.py                  # about a minute; the last line is JSON
python bench/train_step.py --profile        # where nanomr's own step spends its time, by kernel and shape
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections import defaultdict
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

N = 128  # clean images a step; the manifold step sends 3 N through the network
EPS, ALPHA, GAMMA_I, GAMMA_H = 8 / 255, 8.0, 0.4, 600.0
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
FORCED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # make OpenBLAS use kernels for another CPU
FORMATS = ("contiguous", "channels_last")
DISCARD = 2  # steps at the start of a burst: the other library's threads still spin


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of both libraries (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="every round times every variant once (%(default)s)")
    parser.add_argument("--burst", type=int, default=8, help="timed steps of a variant in a round (%(default)s)")
    parser.add_argument("--side", choices=("both", "nanomr", "torch"), default="both", help="time one library alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the JSON line here too")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds; its figures mean nothing")
    parser.add_argument("--profile", action="store_true", help="only: nanomr's manifold step, split by kernel")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.burst = 2, 2
    return args


def fix_environment(threads: int):
    """Thread counts, before NumPy is imported; start again without the variables that slow OpenBLAS down."""
    if found := [name for name in FORCED if name in os.environ]:
        kept = {name: value for name, value in os.environ.items() if name not in FORCED}
        kept["NANOMR_BENCH_DROPPED"] = " ".join(found)
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], kept)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)


# --- the steps --------------------------------------------------------------------------------------------------------


def batch():
    """(x, rho, labels), NHWC: random images; the time does not depend on what they show."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.random((N, 32, 32, 3), np.float32)
    rho = np.where(rng.random(x.shape) < 0.5, np.float32(EPS), np.float32(-EPS))
    return x, rho, rng.integers(0, 10, N)


def nanomr_steps(x, rho, labels) -> dict:
    """{"manifold", "standard", "plain_3n"}: functions that take one whole step and return the loss."""
    import numpy as np

    import nanomr as mr

    def step(run):
        model = mr.models.small_cnn(seed=0)
        optimiser = mr.optim.SGD(model, MOMENTUM, WEIGHT_DECAY)

        def one_step():
            loss = run(model)["loss"]
            optimiser.step(LEARNING_RATE)
            return loss

        return one_step

    x3, labels3 = np.concatenate([x, x + rho, x - rho]), np.tile(labels, 3)
    return {
        "manifold": step(lambda m: mr.methods.manifold_step(m, x, labels, rho, GAMMA_I, GAMMA_H, ALPHA)),
        "standard": step(lambda m: mr.methods.standard_step(m, x, labels)),
        "plain_3n": step(lambda m: mr.methods.standard_step(m, x3, labels3)),
    }


def torch_steps(x, rho, labels, threads: int) -> dict:
    """{"manifold contiguous", "manifold channels_last", "standard ...", ...}, from the same weights as nanomr's."""
    import torch
    import torch_twin

    import nanomr as mr

    torch.set_num_threads(threads)
    source = mr.models.small_cnn(seed=0)
    state = {name: torch.from_numpy(value) for name, value in source.state_dict().items()}
    targets = torch.from_numpy(labels)

    def step(kind, memory_format):
        net = torch_twin.twin(source.architecture)
        net.load_state_dict(state)
        net.to(memory_format=memory_format)
        images, corners = (
            torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(memory_format=memory_format) for a in (x, rho)
        )
        optimiser = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)

        def one_step():
            if kind == "manifold":
                loss = torch_twin.manifold_loss(net, images, targets, corners, GAMMA_I, GAMMA_H, ALPHA)["loss"]
            else:
                loss = torch.nn.functional.cross_entropy(net(images), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.detach()

        return one_step

    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return {f"{kind} {name}": step(kind, formats[name]) for kind in ("manifold", "standard") for name in FORMATS}


def flops() -> float:
    """Of nanomr's manifold step, two a multiply-add, convolutions and fully connected layers only.

    Forward, weight gradient and input gradient on 3 N images; conv1 needs no input gradient and sees 2 N (pairs).
    """
    conv1, others = 16 * 16 * 16 * (4 * 4 * 3), 8 * 8 * 32 * (4 * 4 * 16) + 2048 * 128 + 128 * 10
    return 2.0 * N * (2 * 2 * conv1 + 3 * 3 * others)


# --- measuring --------------------------------------------------------------------------------------------------------


def time_rounds(steps: dict, rounds: int, burst: int) -> dict:
    """Seconds a step of every variant: name -> one median a round. The variants take turns, A B C A B C ..."""
    times = {name: [] for name in steps}
    for step in steps.values():  # compile, and fill the caches
        step(), step()
    for _ in range(rounds):
        for name, step in steps.items():
            seconds = []
            for _ in range(DISCARD + burst):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            times[name].append(statistics.median(seconds[DISCARD:]))
    return times


def peak_memory(step) -> int:
    """Bytes that NumPy holds at the worst moment of a step, beyond the weights and the batch."""
    from nanomr.ops import cpu

    step()  # nothing is compiled or set up while it is watched
    getattr(cpu, "release", lambda: None)()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(3):
            step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        getattr(cpu, "release", lambda: None)()


def sgemm_gflops(size: int = 1024, repeats: int = 12) -> float:
    """The best of several float32 matrix products in NumPy: what this machine's BLAS can do."""
    import numpy as np

    a, b, out = (np.random.default_rng(i).random((size, size), np.float32) for i in range(3))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        np.matmul(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def machine() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {usable_cores()} cores usable"


# --- profile ----------------------------------------------------------------------------------------------------------


def profile(step, steps: int) -> str:
    """A table: time of one step by kernel of ``nanomr.ops.cpu`` and shapes, each kernel less those that it calls."""
    import numpy as np

    from nanomr.ops import cpu, reference

    spent, calls, open_children = defaultdict(float), defaultdict(int), [0.0]

    def timed(name, function):
        @wraps(function)
        def wrapper(*args, **kwargs):
            open_children.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                shapes = [str(a.shape).replace(" ", "") for a in args[:2] if isinstance(a, np.ndarray)]
                key = f"{name:28} {' '.join(shapes)}"
                spent[key] += elapsed - open_children.pop()
                calls[key] += 1
                open_children[-1] += elapsed

        return wrapper

    public = {n: f for n in dir(reference) if not n.startswith("_") and callable(f := getattr(cpu, n, None))}
    for name, function in public.items():
        setattr(cpu, name, timed(name, function))
    try:
        for _ in range(5):
            step()
        spent.clear(), calls.clear()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - start
    finally:
        for name, function in public.items():
            setattr(cpu, name, function)
    rows = sorted(spent.items(), key=lambda item: -item[1])
    rows.append(("outside the kernels", total - sum(spent.values())))
    lines = [f"{'kernel':28} {'first arguments':34} {'calls':>5} {'ms':>8} {'share':>6}"]
    for key, seconds in [*rows, ("the whole step", total)]:
        count = f"{calls[key] / steps:.0f}" if key in calls else ""
        lines.append(f"{key:63} {count:>5} {1e3 * seconds / steps:8.3f} {100 * seconds / total:5.1f}%")
    return "\n".join(lines)


# --- the report -------------------------------------------------------------------------------------------------------


def best_format(times: dict, kind: str) -> str | None:
    """The memory format in which PyTorch is faster at this kind of step."""
    found = [name for name in FORMATS if f"{kind} {name}" in times]
    return min(found, key=lambda name: statistics.median(times[f"{kind} {name}"]), default=None)


def ratio(slow: list, fast: list) -> float:
    """The median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def summary(times: dict, memory: dict, threads: int, sgemm: float, load: float) -> dict:
    """The figures of the JSON line; the ones of a library that was not timed are missing."""
    found = {"threads": threads, "load_average": load, "sgemm_gflops": sgemm, "images_per_step": N}
    rates = {name: N / statistics.median(values) for name, values in times.items()}
    for kind, prefix in (("manifold", ""), ("standard", "standard_")):
        if kind in times:
            found[f"{prefix}images_per_s"] = rates[kind]
        if name := best_format(times, kind):
            found[f"torch_{prefix}images_per_s"] = rates[f"{kind} {name}"]
            found[f"torch_{prefix}format"] = name
            found |= {f"torch_{prefix}images_per_s_{other}": rates[f"{kind} {other}"] for other in FORMATS}
            if kind in times:
                found[f"{prefix}ratio_vs_torch"] = ratio(times[f"{kind} {name}"], times[kind])
                best = min(min(times[f"{kind} {other}"]) for other in FORMATS)
                found[f"{prefix}ratio_vs_torch_best"] = best / min(times[kind])
    if "manifold" in times:
        found["overhead_vs_standard"] = ratio(times["manifold"], times["standard"])
        found["gflops"] = flops() / statistics.median(times["manifold"]) / 1e9
    if (manifold := best_format(times, "manifold")) and (standard := best_format(times, "standard")):
        slow, fast = times[f"manifold {manifold}"], times[f"standard {standard}"]
        found["torch_overhead_vs_standard"] = ratio(slow, fast)
    if memory:
        found["memory_manifold_mib"], found["memory_plain_3n_mib"] = (
            memory[k] / 2**20 for k in ("manifold", "plain_3n")
        )
        found["memory_vs_plain_3n"] = memory["manifold"] / memory["plain_3n"]
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}


def table(times: dict) -> str:
    """Milliseconds (median, best and quartiles over the rounds) and images a second of every variant."""
    lines = [f"{'step':34} {'ms':>8} {'best':>8} {'quartiles':>18} {'images/s':>10}"]
    for name, values in times.items():
        low, middle, high = statistics.quantiles([1e3 * v for v in values], n=4)
        label, spread = f"{'PyTorch' if ' ' in name else 'nanomr'} {name}", f"{low:.2f} .. {high:.2f}"
        lines.append(f"{label:34} {middle:8.2f} {1e3 * min(values):8.2f} {spread:>18} {1e3 * N / middle:10.0f}")
    return "\n".join(lines)


def print_machine(threads: int, load: float):
    import numba
    import numpy as np

    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, Numba {numba.__version__}"
    if torch := sys.modules.get("torch"):
        versions += f", PyTorch {torch.__version__}"
    print(f"machine: {machine()}; {threads} threads; {versions}")
    if dropped := os.environ.get("NANOMR_BENCH_DROPPED"):
        print(f"note: started again without {dropped}, which slow NumPy down")
    if load > 0.3 * usable_cores():
        print(f"warning: the load average was {load:.1f} at the start: the machine is busy.")
        print("         Figures of several threads mean nothing then (they wait for each other); try --threads 1")


def main():
    args = arguments()
    fix_environment(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    x, rho, labels = batch()
    if args.profile:
        steps = nanomr_steps(x, rho, labels)
        print_machine(args.threads, load)
        print(profile(steps["manifold"], 10 if args.quick else 50))
        return

    ours = nanomr_steps(x, rho, labels) if args.side != "torch" else {}
    theirs = torch_steps(x, rho, labels, args.threads) if args.side != "nanomr" else {}
    print_machine(args.threads, load)
    for kind in ("manifold", "standard"):  # the first losses: all variants must compute the same thing
        losses = [float(step()) for name, step in {**ours, **theirs}.items() if name.split()[0] == kind]
        if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
            raise SystemExit(f"the variants of the {kind} step disagree on the loss: {losses}")
    sgemm = sgemm_gflops()
    memory = {name: peak_memory(ours[name]) for name in ("manifold", "plain_3n") if name in ours}
    turns = {name: ours[name] for name in ("manifold", "standard") if name in ours} | theirs
    times = time_rounds(dict(sorted(turns.items())), args.rounds, args.burst)
    found = summary(times, memory, args.threads, sgemm, load)

    print(table(times))
    for key, text in REPORT.items():
        if key in found:
            print(f"{text:74} {found[key]:8}")
    line = json.dumps(found)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


REPORT = {
    "ratio_vs_torch": "manifold step: times as fast as PyTorch",
    "ratio_vs_torch_best": "the same, by the best round of each",
    "standard_ratio_vs_torch": "standard step: times as fast as PyTorch",
    "overhead_vs_standard": "manifold step / standard step (below 2.7)",
    "torch_overhead_vs_standard": "the same of PyTorch",
    "memory_vs_plain_3n": "peak memory, manifold step / plain step on 3 N images (at most 1.05)",
    "gflops": "GFLOP/s in the manifold step",
    "sgemm_gflops": "GFLOP/s of a 1024 x 1024 x 1024 matrix product in NumPy",
}

if __name__ == "__main__":
    main()
