"""What bench/gpu.py times: the work, its floors, and the clock that reads it. Needs no GPU."""

import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np  # noqa: E402

from nanomr.attacks.autoattack import STAGES, quick  # noqa: E402
from nanomr.ops import gpu  # noqa: E402
from nanomr.ops.reference import conv2d_shape  # noqa: E402

EPS, ALPHA, GAMMA_I, GAMMA_H = 8 / 255, 8.0, 0.4, 9000.0
LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
TRAINING_IMAGES, EPOCHS = 45_000, 100
# An H100 (SXM): what it reached in other people's measurements, 80 % of its data sheet. Floors are computed from these.
FLOPS, BYTES = 800e12, 3.0e12  # a second, bf16
DIRECTIONS = ("forward", "input gradient", "weight gradient")


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


def our_plan(conv, direction, tile=None):
    eight = -(-conv.x_shape[3] // 8) * 8
    x_shape, w_shape = (*conv.x_shape[:3], eight), (*conv.w_shape[:2], eight, conv.w_shape[3])
    return gpu.conv_plan(direction, x_shape, w_shape, conv.stride, conv.padding, tile)


def batch(work: Work):
    rng = np.random.default_rng(0)
    x = rng.random((work.n, work.size, work.size, 3), np.float32)
    return x, np.float32(EPS) * rng.choice(np.float32([-1, 1]), x.shape), rng.integers(0, 10, work.n)


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

    def hold(self, seconds):
        """Keep the device busy for at least so long, by one launch."""

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
