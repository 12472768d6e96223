"""How fast are our kernels on a GPU? Whole steps, layers and single kernels, beside PyTorch and cuDNN, in one run.

python bench/gpu.py --dry-run     # the plan: what is timed, with its floor; needs no GPU
python bench/gpu.py               # within --budget; writes bench/results/<device>.json; last line: JSON

The file is written anew after each section, and copied to $OUT where that is set: what has been measured survives a
kill. docs/gpu.md says what the figures mean.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np  # noqa: E402

from nanomr import attacks, checkpoint, graph, methods, models  # noqa: E402
from nanomr.attacks.autoattack import STAGES, cascade, quick  # noqa: E402
from nanomr.ops import gpu  # noqa: E402
from nanomr.ops.gpu import cuda  # noqa: E402
from nanomr.ops.reference import conv2d_shape  # noqa: E402

EPS, ALPHA, GAMMA_I, GAMMA_H = 8 / 255, 8.0, 0.4, 9000.0
LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
TRAINING_IMAGES, EPOCHS = 45_000, 100
# An H100 (SXM): what it reached in other people's measurements, 80 % of its data sheet. Floors are computed from these.
FLOPS, BYTES = 800e12, 3.0e12  # a second, bf16
DIRECTIONS = ("forward", "input gradient", "weight gradient")
REST = "CuPy's own kernels and gaps"


@dataclass(frozen=True)
class Work:
    """What is timed. The defaults are the paper's network and batch; tests have smaller ones."""

    n: int = 128  # clean images a step: 3 N go through the network
    size: int = 32  # of an image
    width: int = 64  # channels of the first stage
    architecture: dict = field(default_factory=lambda: {"name": "preact_resnet18"})
    pgd_images: int = 512
    pgd_steps: int = 20
    auto_images: int = 128
    stages: tuple = quick(STAGES["standard"])

    @property
    def images(self) -> int:
        return 3 * self.n

    @property
    def pictures(self) -> list[tuple]:
        """Shapes of the four stages' pictures."""
        return [(self.images, self.size >> k, self.size >> k, self.width << k) for k in range(4)]


FULL = Work()


@dataclass(frozen=True)
class Conv:
    """One of PreActResNet18's convolutions, at 3 N images; ``count`` of them are in the network."""

    name: str
    x_shape: tuple
    w_shape: tuple
    stride: int
    count: int

    @property
    def padding(self):
        return (self.w_shape[0] // 2,) * 4

    @property
    def y_shape(self):
        return conv2d_shape(self.x_shape, self.w_shape, self.stride, self.padding)

    @property
    def flops(self) -> float:
        return 2.0 * np.prod(self.y_shape) * np.prod(self.w_shape[:3])

    @property
    def bytes(self) -> float:
        """Of x, w and y, each moved once, in bfloat16."""
        return 2.0 * (np.prod(self.x_shape) + np.prod(self.w_shape) + np.prod(self.y_shape))

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.flops / FLOPS, self.bytes / BYTES)


def convolutions(work: Work = FULL) -> list[Conv]:
    shapes = work.pictures
    found = [Conv(f"conv1 3->{work.width}", (*shapes[0][:3], 3), (3, 3, 3, work.width), 1, 1)]
    for stage, shape in enumerate(shapes):
        size, c = shape[2:]
        if stage:
            before = shapes[stage - 1]
            found.append(Conv(f"3x3/2 {c // 2}->{c} @{2 * size}", before, (3, 3, c // 2, c), 2, 1))
            found.append(Conv(f"1x1/2 {c // 2}->{c} @{2 * size}", before, (1, 1, c // 2, c), 2, 1))
        found.append(Conv(f"3x3 {c} @{size}", shape, (3, 3, c, c), 1, 3 if stage else 4))
    return found


def passes(work: Work = FULL) -> list[tuple[str, tuple, int]]:
    """(name, shape, times that the picture is moved) of the fused batch norm + ReLU + Hamming passes."""
    kinds = (("statistics", 1), ("forward", 2), ("backward", 5))
    return [(f"{kind} {s[1]}x{s[1]}x{s[3]}", s, times) for s in work.pictures for kind, times in kinds]


BATCH_NORMS = (5, 4, 4, 4)  # of PreActResNet18, by the stage whose pictures they see: the next stage's first is one


def floors(work: Work = FULL) -> dict:
    """us that a step takes at the least for its convolutions, and for its batch norms with what follows them."""
    of_convolutions = sum(c.count * c.floor_us * (2 if c.x_shape[3] == 3 else 3) for c in convolutions(work))
    moved = sum(count * 8 * 2.0 * np.prod(shape) for count, shape in zip(BATCH_NORMS, work.pictures, strict=True))
    found = {"convolutions": float(of_convolutions), "passes": float(1e6 * moved / BYTES)}
    return found | {"both": sum(found.values())}


STEPS = {  # name: what it is
    "ours": "manifold step in bfloat16, from Python",
    "ours graph": "the same, one CUDA graph",
    "ours fp32": "im2col + cuBLAS in float32",
    "ours tf32": "im2col + cuBLAS in TF32",
    "torch eager": "autocast bfloat16, channels_last, fused SGD",
    "torch graph": "the same as a CUDA graph",
    "torch compile": "the same through torch.compile",
    "torch compile graph": "torch.compile(mode='max-autotune-no-cudagraphs') in a CUDA graph",
}


def show_plan(work: Work = FULL):
    images, floor = work.images, floors(work)
    rates = f"{FLOPS / 1e12:.0f} TFLOP/s and {BYTES / 1e12:.1f} TB/s"
    print(f"convolutions, {images} images, bfloat16; floors from {rates}")
    for conv in convolutions(work):
        plans = [our_plan(conv, d) for d in range(3)]
        tiles = " ".join(f"{p.tile.bm}x{p.tile.bn}:{int(np.prod(p.grid))}" for p in plans)
        figures = f"{conv.flops / 1e9:6.1f} GFLOP {conv.bytes / 1e6:6.1f} MB  floor {conv.floor_us:5.1f} us"
        print(f"  {conv.count} x {conv.name:22} {figures}  tiles:blocks {tiles}")
    print(f"  all of them, forward and backward: floor {floor['convolutions'] / 1e3:.2f} ms a step")
    print("passes over pictures (batch norm + ReLU + Hamming), bfloat16")
    for name, shape, times in passes(work):
        print(f"  {name:24} floor {2e6 * np.prod(shape) * times / BYTES:5.1f} us")
    print(f"  all of them: floor {floor['passes'] / 1e3:.2f} ms a step")
    print("whole steps: PreActResNet18, the manifold objective, SGD")
    for name, what in STEPS.items():
        print(f"  {name:20} {what}")
    print("attacks: PGD-20 and a tenth of AutoAttack, in float32 and in bfloat16 (our kernels)")
    return floor


def our_plan(conv, direction):
    eight = -(-conv.x_shape[3] // 8) * 8
    x_shape, w_shape = (*conv.x_shape[:3], eight), (*conv.w_shape[:2], eight, conv.w_shape[3])
    return gpu.conv_plan(direction, x_shape, w_shape, conv.stride, conv.padding)


# --- clocks -----------------------------------------------------------------------------------------------------------


class Clock:
    """Medians of microseconds between events. ``seconds``: how long to measure, for each figure; 0: once, unwarmed.

    This one reads the wall clock, and so serves on a CPU alone; others have the events of a device.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.warm, self.least = (3, 5) if seconds else (0, 1)

    def event(self):
        """A mark in the order of the device's work."""
        return time.perf_counter()

    def synchronize(self):
        """Wait for the device."""

    def elapsed_us(self, first, last) -> float:
        return 1e6 * (last - first)

    def flush(self):
        """Write over the device's caches: a fifth of a millisecond in which the host gets ahead of it."""

    def _runs(self, run) -> int:
        """Warm up; how often is ``run`` to be measured?"""
        for _ in range(self.warm):
            run()
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        once = time.perf_counter() - start
        return max(self.least, min(100, int(self.seconds / max(once, 1e-5))))

    def kernel(self, run) -> float:
        """Of a few kernels alone: caches are cold, and the host has launched them before the device gets there."""
        pairs = []
        for _ in range(self._runs(run)):
            self.flush()
            first = self.event()
            run()
            pairs.append((first, self.event()))
        self.synchronize()
        return statistics.median(self.elapsed_us(*pair) for pair in pairs)

    def step(self, run) -> float:
        """Of a step among others, as in training: where the device waits for the host, that counts."""
        count, marks = self._runs(run), [self.event()]
        for _ in range(count):
            run()
            marks.append(self.event())
        self.synchronize()
        return statistics.median(self.elapsed_us(*pair) for pair in pairwise(marks))


FLUSH = 512 << 20  # bytes: ten times an H100's L2


class CupyClock(Clock):
    def __init__(self, seconds: float):
        import cupy

        super().__init__(seconds)
        self.cupy, self.buffer = cupy, None

    def event(self):
        event = self.cupy.cuda.Event()
        event.record()
        return event

    def synchronize(self):
        self.cupy.cuda.Device().synchronize()

    def elapsed_us(self, first, last):
        return 1e3 * self.cupy.cuda.get_elapsed_time(first, last)

    def flush(self):
        if self.buffer is None:
            self.buffer = self.cupy.empty(FLUSH, np.uint8)
        self.buffer.fill(0)


class TorchClock(Clock):
    def __init__(self, seconds: float):
        import torch

        super().__init__(seconds)
        self.torch, self.buffer = torch, None

    def event(self):
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self):
        self.torch.cuda.synchronize()

    def elapsed_us(self, first, last):
        return 1e3 * first.elapsed_time(last)

    def flush(self):
        if self.buffer is None:
            self.buffer = self.torch.empty(FLUSH, dtype=self.torch.uint8, device="cuda")
        self.buffer.zero_()


# --- our side ---------------------------------------------------------------------------------------------------------


def noise(*shape):
    """Normally distributed numbers on the device. Long arrays repeat themselves; cuRAND need not be installed."""
    import cupy as cp

    return cp.asarray(np.resize(np.random.default_rng(0).standard_normal(1 << 20, np.float32), shape))


def our_convolutions(clock, work: Work) -> dict:
    """{name: {direction: us}} of the kernels alone: inputs are bfloat16 already."""
    import cupy as cp

    found = {}
    for conv in convolutions(work):
        plans = [our_plan(conv, d) for d in range(3)]
        c, co = plans[0].sizes[3], conv.w_shape[3]
        shapes = (*conv.x_shape[:3], c), conv.y_shape, (*conv.w_shape[:2], c, co)
        x, dy, w = (gpu.cast(noise(*shape), gpu.bfloat16()) for shape in shapes)
        y, dx, dw = cp.empty_like(dy), cp.empty_like(x), cp.empty(w.shape, np.float32)
        partial = cp.empty((plans[2].splits, *w.shape), np.float32)

        def weights(x=x, dy=dy, dw=dw, partial=partial, plan=plans[2]):
            plan.launch(x, dy, partial)
            plan.sum_splits(partial, dw)

        found[conv.name] = {
            "forward": clock.kernel(lambda x=x, w=w, y=y, p=plans[0]: p.launch(x, w, None, None, y)),
            "input gradient": clock.kernel(lambda dy=dy, w=w, dx=dx, p=plans[1]: p.launch(dy, w, None, None, dx)),
            "weight gradient": clock.kernel(weights),
        }
    return found


def our_passes(clock, work: Work) -> dict:
    """{name: us} of the fused passes."""
    import cupy as cp

    found = {}
    for name, shape, _ in passes(work):
        x = gpu.cast(noise(*shape), gpu.bfloat16())
        dy, c = x.copy(), shape[-1]
        gamma, beta, weight = cp.ones(c, np.float32), cp.zeros(c, np.float32), cp.ones(len(x) // 3, np.float32)
        mean, var = gpu.batchnorm_statistics(x)
        normal = (gamma, beta, mean, (var + 1e-5) ** -0.5)
        run = {
            "statistics": lambda x=x: gpu.batchnorm_statistics(x),
            "forward": lambda x=x, normal=normal: gpu.batchnorm_relu_hamming(x, *normal, ALPHA),
            "backward": lambda x=x, dy=dy, normal=normal, weight=weight: gpu.batchnorm_relu_backward(
                dy, x, *normal, ALPHA, weight
            ),
        }[name.split()[0]]
        found[name] = clock.kernel(run)
    return found


def batch(work: Work):
    rng = np.random.default_rng(0)
    x = rng.random((work.n, work.size, work.size, 3), np.float32)
    return x, np.float32(EPS) * rng.choice(np.float32([-1, 1]), x.shape), rng.integers(0, 10, work.n)


def our_step(work: Work, dtype: str):
    """A function that takes one whole step: forward, backward, update. Nothing in it waits for the device."""
    import cupy as cp

    model = models.build(work.architecture, seed=0).to("gpu")
    velocity, lr = cp.zeros_like(model.weights), cp.asarray(LR, np.float32)
    kind = gpu.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    x, rho, labels = (cp.asarray(a) for a in batch(work))
    x, rho, labels = gpu.cast(x, kind), gpu.cast(rho, kind), labels.astype(np.int32)
    gammas = cp.asarray([GAMMA_I, GAMMA_H], np.float32)  # a captured step must not bring numbers from the host

    def step():
        methods.manifold_step(model, x, labels, rho, gammas[0], gammas[1], ALPHA)
        gpu.sgd_update(model.weights, model.gradients, velocity, lr, MOMENTUM, WEIGHT_DECAY)
        model.gradients[...] = 0

    return step


def time_our_step(clock, work: Work, name: str) -> tuple[float, float]:
    """(us, MB that the step takes from CuPy: weights, batch and all that lives at a time) of one of STEPS."""
    import cupy as cp

    cp.get_default_memory_pool().free_all_blocks()
    pool = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(pool.malloc), gpu.tf32() if name == "ours tf32" else nullcontext():
        step = our_step(work, "float32" if "32" in name else "bfloat16")
        if name == "ours graph":
            step = graph.Replayed(step)
            while step.graph is None:
                step()
            cp.cuda.Device().synchronize()
        us = clock.step(step)
        memory = pool.total_bytes() + (step.pool.total_bytes() if name == "ours graph" else 0)
    return us, memory / 1e6


# --- time by kernel ---------------------------------------------------------------------------------------------------


@contextmanager
def each_launch(seen):
    """Within it, ``seen(name, launch)`` is called for every launch of ours, in place of it: whichever module it is that
    calls ``cuda.launch``, by whatever name."""
    original = cuda.launch

    def launch(file, defines, name, *arguments, **options):
        direction = re.search(r"DIRECTION=(\d)", " ".join(defines))
        label = f"{name} ({DIRECTIONS[int(direction[1])]})" if direction and name == "convolve" else name
        seen(label, lambda: original(file, defines, name, *arguments, **options))

    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "nanomr"]
    places = [(module, key) for module in modules for key, value in vars(module).items() if value is original]
    for module, key in places:
        setattr(module, key, launch)
    try:
        yield
    finally:
        for module, key in places:
            setattr(module, key, original)


def time_by_kernel(clock, work: Work) -> dict:
    """{kernel: us} of one step in bfloat16, most first, with what is left between our kernels under REST.

    Each launch lies between two events, and the device is kept busy until the host has launched them all, so that it
    waits for nobody. Medians of a few steps. The events themselves take a little of the device's time.
    """
    step, runs = our_step(work, "bfloat16"), []
    for _ in range(max(clock.warm, 1)):  # compiles
        step()
    clock.synchronize()
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start  # an upper bound: what launching takes, or the step itself
    for _ in range(clock.least):
        marks = []

        def timed(name, launch, marks=marks):
            first = clock.event()
            launch()
            marks.append((name, first, clock.event()))

        for _ in range(1 + int(4 * host / 150e-6) if clock.seconds else 1):  # 512 MB take about 170 us to write
            clock.flush()
        with each_launch(timed):
            first = clock.event()
            step()
            last = clock.event()
        clock.synchronize()
        found = defaultdict(float)
        for name, *pair in marks:
            found[name] += clock.elapsed_us(*pair)
        runs.append(found | {REST: clock.elapsed_us(first, last) - sum(found.values())})
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


# --- attacks ----------------------------------------------------------------------------------------------------------


def attack_rate(work: Work, precision: str, attack: str) -> float:
    """Images a second of an untrained network whose own predictions are the labels. The radius is 0, so that none is
    ever broken: each image takes all the work there is. bfloat16 attacks through our kernels (--precision bf16)."""
    import cupy as cp

    model = models.build(work.architecture, seed=0).to("gpu")
    attacked = models.InBfloat16(model) if precision == "bfloat16" else model
    count = work.pgd_images if attack.startswith("PGD") else work.auto_images
    x = cp.asarray(np.random.default_rng(0).random((count, work.size, work.size, 3), np.float32))
    labels = attacked.forward(x)[0].argmax(1)

    def run(x, labels):
        if attack.startswith("PGD"):
            attacks.pgd(attacked, x, labels, 0.0, steps=work.pgd_steps, batch_size=count)
        else:
            cascade(attacked, x, labels, 0.0, work.stages, batch_size=count)

    if work == FULL:
        attacks.pgd(attacked, x, labels, 0.0, steps=1, batch_size=count)  # compiles
    cp.cuda.Device().synchronize()
    start = time.perf_counter()
    run(x, labels)
    cp.cuda.Device().synchronize()
    return count / (time.perf_counter() - start)


# --- PyTorch's side; on a "cpu" only to see that it runs --------------------------------------------------------------


def _allow_tf32():
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def torch_convolutions(clock, work: Work, dtype: str, device: str = "cuda") -> dict:
    """The same convolutions through cuDNN, channels_last: bfloat16, or float32 with TF32 allowed."""
    import torch

    _allow_tf32()
    kind, found = getattr(torch, dtype), {}
    for conv in convolutions(work):
        n, h, w_, c = conv.x_shape
        x = torch.randn(n, c, h, w_, device=device, dtype=kind).to(memory_format=torch.channels_last)
        w = torch.randn(conv.w_shape[3], c, *conv.w_shape[:2], device=device, dtype=kind)
        w = w.to(memory_format=torch.channels_last)
        pad, stride = conv.padding[0], conv.stride

        def backward(mask, dy, x=x, w=w, pad=pad, stride=stride):
            sizes = [[stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1]
            return torch.ops.aten.convolution_backward(dy, x, w, None, *sizes, mask)

        dy = torch.nn.functional.conv2d(x, w, None, stride, pad)
        found[conv.name] = {
            "forward": clock.kernel(lambda x=x, w=w, s=stride, p=pad: torch.nn.functional.conv2d(x, w, None, s, p)),
            "input gradient": clock.kernel(lambda dy=dy, b=backward: b([True, False, False], dy)),
            "weight gradient": clock.kernel(lambda dy=dy, b=backward: b([False, True, False], dy)),
        }
    return found


def torch_loss(net):
    """loss(x, labels, rho) of the paper's objective: torch_twin.manifold_loss with its hooks set once and for all.

    That function sets them in each call, which breaks torch.compile's graph in three: no fair yardstick.
    """
    import torch
    import torch.nn.functional as F

    inputs = []
    for module in net.modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    def loss(x, labels, rho):
        inputs.clear()
        clean, plus, minus = net(torch.cat([x, x + rho, x - rho])).chunk(3)
        hamming = 0.0
        for z in inputs:
            t_plus, t_minus = torch.tanh(ALPHA * z[len(x) :]).chunk(2)
            distance = t_plus - t_minus
            hamming = hamming + torch.linalg.vector_norm(distance) / (2 * distance.numel() * len(inputs))
        intrinsic = (plus - minus).square().sum(1).mean()
        return F.cross_entropy(clean, labels) + GAMMA_I * intrinsic + GAMMA_H * hamming

    return loss


def torch_step(work: Work, compiled: str | None = None, device: str = "cuda"):
    """As our_step, by PyTorch. ``compiled``: a mode of torch.compile."""
    import torch
    import torch_twin

    _allow_tf32()
    source = models.build(work.architecture, seed=0)
    x, rho, labels = (torch.from_numpy(a).to(device) for a in batch(work))
    x, rho = (a.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last) for a in (x, rho))
    net = torch_twin.twin(source.architecture).to(device).to(memory_format=torch.channels_last).train()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in source.state_dict().items()})
    options = dict(lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    optimiser, objective = torch.optim.SGD(net.parameters(), **options), torch_loss(net)

    def loss():
        with torch.autocast(device, torch.bfloat16):
            return objective(x, labels, rho)

    run = torch.compile(loss, mode=compiled) if compiled else loss

    def step():
        optimiser.zero_grad(set_to_none=False)
        value = run()
        value.backward()
        optimiser.step()
        return value

    return step


def time_torch_step(clock, work: Work, name: str, device: str = "cuda") -> tuple[float, float | None]:
    """(us, MB that PyTorch reserved, None on a CPU) of one of STEPS."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    mode = None
    if "compile" in name:
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs" if "graph" in name else "default"
    run = step = torch_step(work, mode, device)
    if "graph" in name:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        run = captured.replay
    us = clock.step(run)  # ``step`` holds the weights that a replay works on
    return us, torch.cuda.max_memory_reserved() / 1e6 if device == "cuda" else None


# --- the run ----------------------------------------------------------------------------------------------------------


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
        self.clock = CupyClock(args.seconds)
        self.result = {"device": device, "images": work.images, "notes": [], "floor_us": floors(work), "steps_us": {}}

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
        rows += [("passes", 5, self.passes), ("time by kernel", 5, self.by_kernel)]
        if not self.args.no_attacks:
            for attack in (f"PGD-{self.work.pgd_steps}", "AutoAttack/10"):
                for precision in ("bfloat16", "float32"):
                    name = f"{attack} {precision}"
                    rows.append((name, 10, lambda a=attack, p=precision: self.attack(a, p)))
        if not self.args.no_torch:
            rows += [(name, 20, lambda name=name: self.step(name)) for name in ("torch compile", "torch compile graph")]
        return rows

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
        return self.result

    def save(self):
        """Write what is known, atomically; into $OUT, too: a lent machine gives back what lies there."""
        self.result["seconds"] = time.perf_counter() - self.began
        for folder in (self.args.out, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomic(folder / self.file.name, json.dumps(self.result, indent=1) + "\n")

    def torch_clock(self):
        return (TorchClock if self.torch_device == "cuda" else Clock)(self.args.seconds)

    def step(self, name: str):
        result, n = self.result, self.work.n
        if name.startswith("ours"):
            us, memory = time_our_step(self.clock, self.work, name)
        else:
            us, memory = time_torch_step(self.torch_clock(), self.work, name, self.torch_device)
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

    def our_convolutions(self):
        found, rows = our_convolutions(self.clock, self.work), []
        for conv in convolutions(self.work):
            for direction in DIRECTIONS:
                us = found[conv.name][direction]
                row = {"name": conv.name, "direction": direction, "us": us, "tflops": conv.flops / us / 1e6}
                rows.append(row | {"gb_per_s": conv.bytes / us / 1e3, "share_of_floor": conv.floor_us / us})
                figures = f"{us:7.1f} us {row['tflops']:5.0f} TFLOP/s {rows[-1]['gb_per_s']:5.0f} GB/s"
                print(f"{conv.name:22} {direction:15} {figures} {conv.floor_us / us:4.0%} of the floor", flush=True)
        self.result["convolutions"] = rows

    def cudnn(self, dtype: str):
        found = torch_convolutions(self.torch_clock(), self.work, dtype, self.torch_device)
        for row in self.result.get("convolutions", []):
            row[f"cudnn_{dtype}_us"] = us = found[row["name"]][row["direction"]]
            beside = f"cuDNN {dtype} {us:7.1f} us, ours {row['us'] / us:5.2f} times that"
            print(f"{row['name']:22} {row['direction']:15} {beside}", flush=True)

    def passes(self):
        timed, rows = our_passes(self.clock, self.work), []
        for name, shape, times in passes(self.work):
            moved = 2.0 * np.prod(shape) * times
            row = {"name": name, "us": timed[name], "gb_per_s": moved / timed[name] / 1e3}
            rows.append(row | {"share_of_floor": 1e6 * moved / BYTES / timed[name]})
            print(f"{name:24} {row['us']:7.1f} us {row['gb_per_s']:5.0f} GB/s", flush=True)
        self.result["passes"] = rows

    def by_kernel(self):
        found = time_by_kernel(self.clock, self.work)
        total = sum(found.values())
        self.result["kernels_us"] = found
        for name, us in found.items():
            print(f"{name:28} {us:8.1f} us {us / total:6.1%}", flush=True)

    def attack(self, attack: str, precision: str):
        rate = attack_rate(self.work, precision, attack)
        self.result.setdefault("attacks", {})[f"{attack} {precision} images/s"] = rate
        print(f"{attack} in {precision}: {rate:.1f} images/s", flush=True)


def measure(args, work: Work = FULL, torch_device: str = "cuda") -> dict:
    import cupy as cp

    device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    gpu.set_tf32(False)  # whatever CUPY_TF32 says
    bench = Bench(args, work, device, torch_device)
    bench.result["cupy"] = cp.__version__
    return bench.run()


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan; nothing is timed, no GPU is needed")
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--no-attacks", action="store_true", help="leave the attacks out")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure; 0: does it run? (%(default)s)")
    text = "in all; what comes last is cut off or left out (%(default)s)"
    parser.add_argument("--budget", type=float, default=280, metavar="SECONDS", help=text)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
    return parser.parse_args(arguments)


def main():
    args = parse()
    if args.dry_run:
        print(json.dumps({"dry_run": True, **{f"{key}_floor_us": us for key, us in show_plan().items()}}))
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
