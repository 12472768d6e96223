"""Our side of bench/gpu.py: whole steps, the kernels alone, a step by kernel, attacks. Needs CuPy and a GPU."""

import re
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import gpu_plan
import numpy as np
from gpu_plan import (
    ALPHA,
    DIRECTIONS,
    GAMMA_H,
    GAMMA_I,
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    Clock,
    Work,
    batch,
    convolutions,
    our_plan,
    passes,
)

from nanomr import attacks, graph, methods, models
from nanomr.attacks.autoattack import cascade
from nanomr.ops import gpu
from nanomr.ops.gpu import cuda

REST = "CuPy's own kernels and gaps"

# One thread, one product after another: 4 cycles each, 2 ns at the clock of an H100, more on any other GPU.
SPIN = """extern "C" __global__ void spin(float* x, int count) {
  float y = *x;
  for (int i = 0; i < count; i++) y = y * 0.999f + 1.f;
  *x = y;
}"""


class CupyClock(Clock):
    def __init__(self, seconds: float):
        import cupy

        super().__init__(seconds)
        self.cupy, self.buffer, self.spin = cupy, None, None

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
            self.buffer = self.cupy.empty(gpu_plan.FLUSH, np.uint8)
        self.buffer.fill(0)

    def hold(self, seconds):
        if self.spin is None:
            code = cuda.source("device.cuh") + SPIN
            self.spin = self.cupy.RawModule(code=code, options=("-std=c++17",)).get_function("spin")
            self.number = self.cupy.zeros(1, np.float32)
        self.spin((1, 1, 1), (1, 1, 1), (self.number, np.int32(min(seconds / 2e-9, 2**31 - 1))))


# --- our side ---------------------------------------------------------------------------------------------------------


def noise(*shape):
    """Normally distributed numbers on the device. Long arrays repeat themselves; cuRAND need not be installed."""
    import cupy as cp

    return cp.asarray(np.resize(np.random.default_rng(0).standard_normal(1 << 20, np.float32), shape))


def our_convolutions(clock, work: Work, tile=None) -> dict:
    """{name: {direction: us}} of the kernels alone: inputs are bfloat16 already. ``tile``: of
    the products that have one of this name which is not in use. By default in what is in use."""
    import cupy as cp

    found = {}
    for conv in convolutions(work):
        plans = [our_plan(conv, d, tile) for d in range(3)]
        c, co = plans[0].sizes[3], conv.w_shape[3]
        shapes = (*conv.x_shape[:3], c), conv.y_shape, (*conv.w_shape[:2], c, co)
        x, dy, w = (gpu.cast(noise(*shape), gpu.bfloat16()) for shape in shapes)
        y, dx, dw = cp.empty_like(dy), cp.empty_like(x), cp.empty(w.shape, np.float32)
        partial = cp.empty((plans[2].splits, *w.shape), np.float32)

        def weights(x=x, dy=dy, dw=dw, partial=partial, plan=plans[2]):
            plan.launch(x, dy, partial)
            plan.sum_splits(partial, dw)

        runs = (
            lambda x=x, w=w, y=y, p=plans[0]: p.launch(x, w, None, None, y),
            lambda dy=dy, w=w, dx=dx, p=plans[1]: p.launch(dy, w, None, None, dx),
            weights,
        )
        found[conv.name] = {}
        for direction, (name, run) in enumerate(zip(DIRECTIONS, runs, strict=True)):
            at, others = plans[direction].tile, [our_plan(conv, direction, other).tile for other in (None, "usual")]
            if tile is None or at not in (others[:1] if tile == "usual" else others):
                found[conv.name][name] = clock.kernel(run)
    return found


def compute_capability() -> str:
    """ "90" of an H100."""
    import cupy as cp

    return str(cp.cuda.Device().compute_capability)


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
            for _ in range(3):  # two as they are, one captured
                step()
            if step.failure:
                raise RuntimeError(step.failure)
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
    waits for nobody; by one kernel, since the queue takes about 1,000 launches before it stops the host. Medians of a
    few steps. The events themselves take a little of the device's time.
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

        clock.flush()
        clock.hold(4 * host if clock.seconds else 0)
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
            attacks.pgd(attacked, x, labels, 0.0, steps=work.pgd_steps, batch_size=len(x))
        else:
            cascade(attacked, x, labels, 0.0, work.stages, batch_size=len(x))

    run(x[:8], labels[:8])  # compiles: CuPy's reductions, too, which take seconds
    cp.cuda.Device().synchronize()
    start = time.perf_counter()
    run(x, labels)
    cp.cuda.Device().synchronize()
    return count / (time.perf_counter() - start)
