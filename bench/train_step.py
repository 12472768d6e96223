"""How fast is one training step? nanomr against PyTorch's best, on the CPU. ``bench/README.md`` says how it is timed.

python bench/train_step.py                  # the small network, a few minutes; the last line is JSON
python bench/train_step.py --model preact_resnet18 --precision bf16     # half an hour: PyTorch compiles and is slow
python bench/train_step.py --method ibp     # of interval training, in the place of the manifold step
python bench/train_step.py --costs          # every method's step of ours over the standard step
python bench/train_step.py --profile        # where nanomr's own step spends its time, by kernel and shape
"""

import argparse
import contextlib
import gc
import json
import math
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

N = 128  # clean images a step, unless --images says otherwise; the manifold step sends 3 N through the network
EPS, ALPHA, GAMMA_I, GAMMA_H = 8 / 255, 8.0, 0.4, 600.0
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
FORCED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # make OpenBLAS use kernels for another CPU
METHODS = ("manifold", "ibp")  # those that PyTorch has here: docs/torch_twin.py
RAMP = 0.5  # where interval training is on its way: its regulariser is there until eps is full
PRECISIONS = ("fp32", "bf16")
DISCARD = 2  # steps at the start of a burst: the other library's threads still spin
KEEP = 1.3  # a variant of PyTorch's that was slower than this, beside its best of this precision, is timed no more
NARROWEST = 8  # with AVX2, oneDNN 3.12's gradient of a 1 x 1 convolution of stride 2, channels last, stores 8 channels
DEFAULTS = {"small": (20, 8), "preact_resnet18": (5, 1)}  # rounds, and timed steps of a variant in each


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(DEFAULTS), default="small", help="which network (%(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of preact_resnet18 (%(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of our step; fp32 is timed too")
    parser.add_argument("--method", choices=METHODS, default="manifold", help="whose step (%(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of both libraries (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, help="every round times every variant once (20; preact_resnet18, --costs: 5)"
    )
    parser.add_argument(
        "--burst", type=int, help="timed steps of a variant in a round (8; preact_resnet18: 1; --costs: 2)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--side", choices=("both", "nanomr", "torch"), default="both", help="time one library alone")
    parser.add_argument("--images", type=int, default=N, help="clean images a step (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the JSON line here too")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds; its figures mean nothing")
    parser.add_argument("--profile", action="store_true", help="only: nanomr's step of the method, split by kernel")
    parser.add_argument("--costs", action="store_true", help="only: each method's step of nanomr over the standard one")
    args = parser.parse_args()
    if (args.method == "ibp" or args.costs) and (args.model != "small" or args.precision != "fp32"):
        parser.error("--method ibp and --costs are for --model small and --precision fp32")
    if args.model != "small" and args.width < NARROWEST and args.side != "nanomr":
        parser.error(f"--width below {NARROWEST} is for --side nanomr: PyTorch writes beyond its arrays there (AVX2)")
    if args.rounds is not None and args.rounds < 2:
        parser.error(f"--rounds takes 2 or more, between which quartiles are taken, not {args.rounds}")
    rounds, burst = (5, 2) if args.costs else DEFAULTS[args.model]  # a step of msd takes seconds
    rounds, burst = (2, 1 if args.costs else 2) if args.quick else (rounds, burst)
    args.rounds, args.burst = args.rounds or rounds, args.burst or burst
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


def kinds_of(args) -> tuple:
    return args.method, "standard"


def batch(n: int = N):
    """(x, rho, labels), NHWC: random images; the time does not depend on what they show."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.random((n, 32, 32, 3), np.float32)
    rho = np.where(rng.random(x.shape) < 0.5, np.float32(EPS), np.float32(-EPS))
    return x, rho, rng.integers(0, 10, n)


def build(args, kind="manifold"):
    """The network that a step of this kind trains, as it is in the beginning."""
    import nanomr as mr

    if args.model != "small":
        return mr.models.preact_resnet18(width=args.width)
    method = mr.methods.METHODS[kind]
    model = mr.models.small_cnn(batchnorm=method.finish is not None)  # as train_cifar.py has it
    if method.begin:
        method.begin(model, mr.rng.generator(0, mr.rng.INIT))
    return model


def schedule(kind: str) -> dict:
    """``now`` of a step of this method: eps is on its way, everything else as it is by default."""
    import nanomr as mr

    paper = {"gamma_i": GAMMA_I, "gamma_h": GAMMA_H, "alpha": ALPHA, "hamming_norm": "batch"}
    constants = mr.methods.METHODS[kind].filled({})
    return {"eps": RAMP * EPS, "eps_end": EPS, "ramp": RAMP, "lr": LEARNING_RATE, **paper, **constants}


def nanomr_steps(args, x, rho, labels, kinds) -> dict:
    """{"manifold fp32", "standard fp32", ...}: functions that take one whole step and return the loss."""
    import nanomr as mr
    from nanomr.ops import bfloat16

    def step(kind, precision):
        model, now, method = build(args, kind), schedule(kind), mr.methods.METHODS[kind]
        optimiser = mr.optim.SGD(model, MOMENTUM, WEIGHT_DECAY)
        images, corners = (a if precision == "fp32" else a.astype(bfloat16()) for a in (x, rho))

        def one_step():
            if kind == "manifold":
                loss = mr.methods.manifold_step(model, images, labels, corners, GAMMA_I, GAMMA_H, ALPHA)["loss"]
            else:
                loss = method.step(model, images, labels, lambda stream: mr.rng.generator(0, stream), now)["loss"]
            optimiser.step(LEARNING_RATE)
            return loss

        return one_step

    precisions = dict.fromkeys(("fp32", args.precision))
    return {f"{kind} {precision}": step(kind, precision) for precision in precisions for kind in kinds}


def plain_3n(args, x, rho, labels):
    """Our standard step on a batch of 3 N images, for its memory."""
    import numpy as np

    x3, labels3 = np.concatenate([x, x + rho, x - rho]), np.tile(labels, 3)
    return nanomr_steps(args, x3, x3, labels3, ["standard"])["standard fp32"]


def torch_forward(module, x, inputs: list):
    """module(x), for the twins; the inputs of its ReLUs are added to ``inputs``. Hooks would keep it from compiling."""
    import torch
    import torch_twin

    if isinstance(module, torch.nn.ReLU):
        inputs.append(x)
    if isinstance(module, torch_twin.PreActBlock):
        h = torch_forward(module.relu1, module.bn1(x), inputs)
        y = module.conv2(torch_forward(module.relu2, module.bn2(module.conv1(h)), inputs))
        return y + module.shortcut(h if module.shortcut_reads_h else x)
    if isinstance(module, torch.nn.Sequential):
        for child in module.children():
            x = torch_forward(child, x, inputs)
        return x
    return module(x)


def torch_steps(args, x, rho, labels) -> dict:
    """{"manifold eager fp32 contiguous", ...}, from the same weights as nanomr's."""
    import torch
    import torch_twin

    torch.set_num_threads(args.threads)
    targets = torch.from_numpy(labels)

    def step(kind, mode, precision, memory_format):
        source = build(args, kind)
        state = {name: torch.from_numpy(value) for name, value in source.state_dict().items()}
        net = torch_twin.twin(source.architecture)
        net.load_state_dict(state)
        net.to(memory_format=memory_format)
        images, corners = (
            torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(memory_format=memory_format) for a in (x, rho)
        )
        optimiser = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
        narrow = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

        now = schedule(kind)

        def loss_of(images, corners):
            if kind == "ibp":
                weights = 1 - (1 - now["kappa"]) * RAMP, now["balance"] * (1 - RAMP)
                return torch_twin.interval_loss(net, images, targets, now["eps"], *weights)["loss"]
            inputs = []
            with narrow:
                batch = torch.cat([images, images + corners, images - corners]) if kind == "manifold" else images
                logits = torch_forward(net, batch, inputs).float()
            if kind == "standard":
                return torch.nn.functional.cross_entropy(logits, targets)
            return torch_twin.objective(logits, inputs, targets, GAMMA_I, GAMMA_H, ALPHA)["loss"]

        loss_of = torch.compile(loss_of) if mode == "compiled" else loss_of

        def one_step():
            loss = loss_of(images, corners)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.detach()

        return one_step

    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    variants = [("eager", p, f) for p in dict.fromkeys(("fp32", args.precision)) for f in formats]
    if not args.no_compile:
        variants += [("compiled", p, "channels_last") for p in dict.fromkeys(("fp32", args.precision))]
    return {f"{kind} {m} {p} {f}": step(kind, m, p, formats[f]) for kind in kinds_of(args) for m, p, f in variants}


def flops(step) -> float:
    """Of a step of ours, two a multiply-add, convolutions and linear layers only: counted as they are called."""
    from nanomr.ops import cpu

    total = [0.0]

    def counted(name, function):
        def wrapper(a, b, *rest):
            if name.startswith("linear"):
                total[0] += 2.0 * len(a) * a.shape[1] * (b.shape[1] if name != "linear_input_gradient" else b.shape[0])
            else:  # pixels of y, times the weights
                w_shape = rest[0] if name == "conv2d_weight_gradient" else b.shape
                y = function(a, b, *rest)
                pixels = y.shape[:3] if name == "conv2d" else (a if name == "conv2d_input_gradient" else b).shape[:3]
                total[0] += 2.0 * math.prod(pixels) * math.prod(w_shape)
                return y
            return function(a, b, *rest)

        return wrapper

    with replaced(cpu, counted, [n for n in vars(cpu) if n.startswith(("conv2d", "linear")) and n != "conv2d_shape"]):
        step()
    return total[0]


@contextlib.contextmanager
def replaced(module, wrap, names):
    """Within it, each of these functions of ``module`` is wrap(name, function)."""
    kept = {name: getattr(module, name) for name in names}
    for name, function in kept.items():
        setattr(module, name, wrap(name, function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds_of(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def contenders(steps: dict) -> dict:
    """``steps`` without the variants of PyTorch's that are far behind its best of the same kind and precision."""
    found = {}
    for name, step in steps.items():
        step()  # compiles
        found[name] = min(seconds_of(step) for _ in range(2))
    best = {}
    for name, seconds in found.items():
        best[group(name)] = min(best.get(group(name), seconds), seconds)
    return {name: step for name, step in steps.items() if found[name] <= KEEP * best[group(name)]}


def group(name: str) -> tuple:
    """(kind, precision, is it PyTorch's) of a variant."""
    words = name.split()
    return words[0], next(w for w in words if w in PRECISIONS), len(words) > 2


def time_rounds(steps: dict, rounds: int, burst: int) -> dict:
    """Seconds a step of every variant: name -> one median a round. The variants take turns, A B C A B C ..."""
    times, discard = {name: [] for name in steps}, DISCARD if burst > 1 else 0
    for _ in range(rounds):
        for name, step in steps.items():
            seconds = []
            for _ in range(discard + burst):
                seconds.append(seconds_of(step))
            times[name].append(statistics.median(seconds[discard:]))
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


def tile_peak_gflops(precision: str, threads: int) -> float:
    """GFLOP/s of the micro-kernel of convolutions on operands that fit the first cache: their ceiling."""
    import numba
    import numpy as np

    from nanomr.ops.cpu import convolution, gather_gemm, simd

    r, rows = 128, 4 * simd.ROWS
    lanes = simd.Lanes(simd.MAX_LANES, "float32" if precision == "fp32" else convolution.PRODUCT)
    width, dtype = simd.WIDTH * lanes.count, np.float32 if precision == "fp32" else np.int32
    x, w, bias = np.zeros(rows * r, dtype), np.zeros(r * width, dtype), np.zeros(width, np.float32)
    a, b, o, out = np.arange(rows) * r, np.arange(r), np.arange(rows) * width, np.zeros(rows * width, np.float32)

    # x and w are arguments, the sums are returned: products of what is known, or not asked for, are never computed
    @numba.njit(parallel=True)
    def run(times, x, w, lanes):
        found = np.empty(threads, np.float32)
        for thread in numba.prange(threads):
            mine, nothing = out.copy(), np.empty(0, np.float32)
            for _ in range(times):
                gather_gemm.sweep(x, a, 0, rows, b, 0, r, w, bias, nothing, mine, 0, o, width, 1, 0, lanes)
            found[thread] = mine.sum()
        return found

    times = 2000
    run(1, x, w, lanes)
    best = min(seconds_of(lambda: run(times, x, w, lanes)) for _ in range(8))
    return threads * times * rows * r * width * (2 if precision == "fp32" else 4) / best / 1e9


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

    public = [n for n in dir(reference) if not n.startswith("_") and callable(getattr(cpu, n, None))]
    with replaced(cpu, timed, public):
        for _ in range(2 if steps < 5 else 5):
            step()
        spent.clear(), calls.clear()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - start
    rows = sorted(spent.items(), key=lambda item: -item[1])
    rows.append(("outside the kernels", total - sum(spent.values())))
    lines = [f"{'kernel':28} {'first arguments':34} {'calls':>5} {'ms':>8} {'share':>6}"]
    for key, seconds in [*rows, ("the whole step", total)]:
        count = f"{calls[key] / steps:.0f}" if key in calls else ""
        lines.append(f"{key:63} {count:>5} {1e3 * seconds / steps:8.3f} {100 * seconds / total:5.1f}%")
    return "\n".join(lines)


# --- the report -------------------------------------------------------------------------------------------------------


def best(times: dict, kind: str, *precisions) -> str | None:
    """The variant of PyTorch's that is fastest at this kind of step, in one of these precisions."""
    found = [name for name in times if group(name)[0] == kind and group(name)[1] in precisions and group(name)[2]]
    return min(found, key=lambda name: statistics.median(times[name]), default=None)


def ratio(slow: list, fast: list) -> float:
    """The median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def summary(args, times: dict, memory: dict, figures: dict) -> dict:
    """The figures of the JSON line; the ones of a library that was not timed are missing."""
    found = {
        "model": args.model,
        "method": args.method,
        "precision": args.precision,
        "threads": args.threads,
        "images_per_step": args.images,
    } | figures
    if args.model != "small":
        found["width"] = args.width
    for kind, prefix in zip(kinds_of(args), ("", "standard_"), strict=True):
        ours, plain = (times.get(f"{kind} {precision}") for precision in (args.precision, "fp32"))
        if ours:
            found[f"{prefix}images_per_s"] = args.images / statistics.median(ours)
            found[f"{prefix}seconds"] = statistics.median(ours)
        if name := best(times, kind, *PRECISIONS):
            found[f"torch_{prefix}images_per_s"] = args.images / statistics.median(times[name])
            found[f"torch_{prefix}best"] = name.removeprefix(f"{kind} ")
            if ours:
                found[f"{prefix}ratio_vs_torch"] = ratio(times[name], ours)
                found[f"{prefix}ratio_vs_torch_best"] = min(times[name]) / min(ours)
        if (name := best(times, kind, "fp32")) and plain:
            found[f"{prefix}ratio_fp32"] = ratio(times[name], plain)
            found[f"torch_{prefix}best_fp32"] = name.removeprefix(f"{kind} ")
    if f"{args.method} {args.precision}" in times:
        step, standard = (times[f"{kind} {args.precision}"] for kind in kinds_of(args))
        found["overhead_vs_standard"] = ratio(step, standard)
        found["gflops"] = found.pop("flops") / statistics.median(step) / 1e9
    if (step := best(times, args.method, *PRECISIONS)) and (standard := best(times, "standard", *PRECISIONS)):
        found["torch_overhead_vs_standard"] = ratio(times[step], times[standard])
    if memory:
        found |= {f"memory_{name}_mib": size / 2**20 for name, size in memory.items()}
        found["memory_vs_plain_3n"] = memory["manifold"] / memory["plain_3n"]
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}


def table(times: dict, n: int = N) -> str:
    """Milliseconds (median, best and quartiles over the rounds) and images a second of every variant."""
    lines = [f"{'step':44} {'ms':>8} {'best':>8} {'quartiles':>18} {'images/s':>10}"]
    for name, values in times.items():
        low, middle, high = statistics.quantiles([1e3 * v for v in values], n=4)
        label, spread = f"{'PyTorch' if group(name)[2] else 'nanomr'} {name}", f"{low:.2f} .. {high:.2f}"
        lines.append(f"{label:44} {middle:8.2f} {1e3 * min(values):8.2f} {spread:>18} {1e3 * n / middle:10.0f}")
    return "\n".join(lines)


def costs(args, x, rho, labels) -> str:
    """A table of every method's step over the standard step, the medians of both in the same rounds; and its JSON."""
    from nanomr.methods import METHODS

    steps = nanomr_steps(args, x, rho, labels, list(METHODS))
    times = {name.split()[0]: seconds for name, seconds in time_rounds(steps, args.rounds, args.burst).items()}
    found = {name: float(f"{ratio(seconds, times['standard']):.4g}") for name, seconds in times.items()}
    lines = [f"{'step':14} {'ms':>9} {'over standard':>14}"]
    for name in sorted(found, key=found.get):
        lines.append(f"{name:14} {1e3 * statistics.median(times[name]):9.2f} {found[name]:14.2f}")
    line = json.dumps({"over_standard": found, "threads": args.threads, "images_per_step": args.images})
    if args.json:
        args.json.write_text(line + "\n")
    return "\n".join([*lines, line])


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
    x, rho, labels = batch(args.images)
    if args.costs:
        print_machine(args.threads, load)
        print(costs(args, x, rho, labels))
        return
    ours = nanomr_steps(args, x, rho, labels, kinds_of(args)) if args.side != "torch" else {}
    if args.profile:
        print_machine(args.threads, load)
        print(profile(ours[f"{args.method} {args.precision}"], 50 if args.model == "small" and not args.quick else 3))
        return

    theirs = torch_steps(args, x, rho, labels) if args.side != "nanomr" else {}
    print_machine(args.threads, load)
    check_losses(ours | theirs)
    figures = {"load_average": load, "sgemm_gflops": sgemm_gflops()}
    memory = {}
    if ours:
        from nanomr.ops.cpu import convolution

        figures["kernel"] = "fma" if args.precision == "fp32" else convolution.PRODUCT
        figures["tile_peak_gflops"] = tile_peak_gflops(args.precision, args.threads)
        figures["flops"] = flops(ours[f"{args.method} {args.precision}"])
        if args.model == "small" and args.method == "manifold":
            whole = {"manifold": ours["manifold fp32"], "plain_3n": plain_3n(args, x, rho, labels)}
            memory = {name: peak_memory(step) for name, step in whole.items()}
    turns = contenders(ours | theirs)
    times = time_rounds(dict(sorted(turns.items())), args.rounds, args.burst)
    found = summary(args, times, memory, figures)

    print(table(times, args.images))
    for key, text in REPORT.items():
        if key in found:
            print(f"{text:74} {found[key]:8}")
    line = json.dumps(found)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


def check_losses(steps: dict):
    """All variants must compute the same thing: their first losses agree, to bfloat16's rounding where it rounds."""
    losses = {name: float(step()) for name, step in steps.items()}
    for name, loss in losses.items():
        kind, precision, _ = group(name)
        exact = next(other for key, other in losses.items() if group(key)[:2] == (kind, "fp32"))
        if abs(loss - exact) > (1e-4 if precision == "fp32" else 2e-2) * abs(exact):
            raise SystemExit(f"the variants of the {kind} step disagree on the loss: {losses}")


REPORT = {
    "ratio_vs_torch": "the method's step: times as fast as PyTorch",
    "ratio_vs_torch_best": "the same, by the best round of each",
    "ratio_fp32": "the same, both in float32",
    "standard_ratio_vs_torch": "standard step: times as fast as PyTorch",
    "overhead_vs_standard": "the method's step / standard step (manifold: three times the images)",
    "torch_overhead_vs_standard": "the same of PyTorch",
    "memory_vs_plain_3n": "peak memory, manifold step / plain step on 3 N images (at most 1.05)",
    "gflops": "GFLOP/s in the method's step",
    "tile_peak_gflops": "GFLOP/s of the product alone, in the first cache",
    "sgemm_gflops": "GFLOP/s of a 1024 x 1024 x 1024 matrix product in NumPy",
}

if __name__ == "__main__":
    main()
