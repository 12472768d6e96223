"""How fast are our kernels on a GPU? Layer by layer and as a whole step, beside PyTorch and cuDNN, in one run.

python bench/gpu.py --dry-run     # the plan: what is timed, with its floor; needs no GPU
python bench/gpu.py               # under 8 minutes on an H100; writes bench/results/<device>.json; last line: JSON

docs/gpu.md says what the figures mean.
"""

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np  # noqa: E402

from nanomr import attacks, graph, methods, models, train  # noqa: E402
from nanomr.ops import gpu  # noqa: E402
from nanomr.ops.reference import conv2d_shape  # noqa: E402

N = 128  # clean images a step: 3 N go through the network
EPS, ALPHA, GAMMA_I, GAMMA_H = 8 / 255, 8.0, 0.4, 9000.0
LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
TRAINING_IMAGES, EPOCHS = 45_000, 100
# An H100 (SXM): what it reached in other people's measurements, 80 % of its data sheet. Floors are computed from these.
FLOPS, BYTES = 800e12, 3.0e12  # a second, bf16
DIRECTIONS = ("forward", "input gradient", "weight gradient")


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


def convolutions(images: int = 3 * N) -> list[Conv]:
    found = [Conv("conv1 3->64", (images, 32, 32, 3), (3, 3, 3, 64), 1, 1)]
    for stage, (size, c) in enumerate(((32, 64), (16, 128), (8, 256), (4, 512))):
        if stage:
            before = (images, 2 * size, 2 * size, c // 2)
            found.append(Conv(f"3x3/2 {c // 2}->{c} @{2 * size}", before, (3, 3, c // 2, c), 2, 1))
            found.append(Conv(f"1x1/2 {c // 2}->{c} @{2 * size}", before, (1, 1, c // 2, c), 2, 1))
        shape = (images, size, size, c)
        found.append(Conv(f"3x3 {c} @{size}", shape, (3, 3, c, c), 1, 3 if stage else 4))
    return found


def passes(images: int = 3 * N) -> list[tuple[str, tuple, int]]:
    """(name, shape, times that the picture is moved) of the fused batch norm + ReLU + Hamming passes."""
    shapes = [(images, s, s, c) for s, c in ((32, 64), (16, 128), (8, 256), (4, 512))]
    kinds = (("statistics", 1), ("forward", 2), ("backward", 5))
    return [(f"{kind} {s[1]}x{s[1]}x{s[3]}", s, times) for s in shapes for kind, times in kinds]


STEPS = {  # name: what it is
    "ours": "manifold step in bfloat16, from Python",
    "ours graph": "the same, one CUDA graph",
    "ours fp32": "im2col + cuBLAS in float32",
    "ours tf32": "im2col + cuBLAS in TF32",
    "torch eager": "autocast bfloat16, channels_last, fused SGD",
    "torch compile": "the same through torch.compile",
    "torch graph": "the same as a CUDA graph",
    "torch compile graph": "torch.compile(mode='max-autotune-no-cudagraphs') in a CUDA graph",
}


def show_plan():
    print(f"convolutions, {3 * N} images, bfloat16; floors from {FLOPS / 1e12:.0f} TFLOP/s and {BYTES / 1e12:.1f} TB/s")
    total = 0.0
    for conv in convolutions():
        plans = [our_plan(conv, d) for d in range(3)]
        tiles = " ".join(f"{p.tile.bm}x{p.tile.bn}:{int(np.prod(p.grid))}" for p in plans)
        total += conv.count * conv.floor_us * (2 if conv.x_shape[3] == 3 else 3)
        figures = f"{conv.flops / 1e9:6.1f} GFLOP {conv.bytes / 1e6:6.1f} MB  floor {conv.floor_us:5.1f} us"
        print(f"  {conv.count} x {conv.name:22} {figures}  tiles:blocks {tiles}")
    print(f"  all of them, forward and backward: floor {total / 1e3:.2f} ms a step")
    print("passes over pictures (batch norm + ReLU + Hamming), bfloat16")
    for name, shape, times in passes():
        print(f"  {name:24} floor {2e6 * np.prod(shape) * times / BYTES:5.1f} us")
    print("whole steps: PreActResNet18, the manifold objective, SGD")
    for name, what in STEPS.items():
        print(f"  {name:20} {what}")
    print("attacks: PGD-20 and AutoAttack, images a second, in float32 (as reported) and in bfloat16 (our kernels)")
    return total


def our_plan(conv, direction):
    eight = -(-conv.x_shape[3] // 8) * 8
    x_shape, w_shape = (*conv.x_shape[:3], eight), (*conv.w_shape[:2], eight, conv.w_shape[3])
    return gpu.conv_plan(direction, x_shape, w_shape, conv.stride, conv.padding)


# --- on the device ----------------------------------------------------------------------------------------------------


class Clock:
    """Medians of device time, by events. Everything is warm: three runs before."""

    def __init__(self, seconds: float):
        import cupy

        self.cupy, self.seconds = cupy, seconds

    def us(self, run, stream=None) -> float:
        event, synchronize = self.cupy.cuda.Event, self.cupy.cuda.Device().synchronize
        for _ in range(3):
            run()
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        once = time.perf_counter() - start
        found = []
        for _ in range(max(5, min(100, int(self.seconds / max(once, 1e-5))))):
            first, last = event(), event()
            first.record(stream)
            run()
            last.record(stream)
            last.synchronize()
            found.append(1e3 * self.cupy.cuda.get_elapsed_time(first, last))
        return statistics.median(found)


def our_convolutions(clock) -> dict:
    """{name: {direction: us}} of the kernels alone: inputs are bfloat16 already."""
    import cupy as cp

    found = {}
    for conv in convolutions():
        plans = [our_plan(conv, d) for d in range(3)]
        c, co = plans[0].sizes[3], conv.w_shape[3]
        rng = cp.random.default_rng(0)

        def draw(*shape, rng=rng):
            return gpu.cast(rng.standard_normal(shape, cp.float32), gpu.bfloat16())

        x, dy, w = draw(*conv.x_shape[:3], c), draw(*conv.y_shape), draw(*conv.w_shape[:2], c, co)
        y, dx, dw = cp.empty_like(dy), cp.empty_like(x), cp.empty(w.shape, np.float32)
        partial = cp.empty((plans[2].splits, *w.shape), np.float32)

        def weights(x=x, dy=dy, dw=dw, partial=partial, plan=plans[2]):
            plan.launch(x, dy, partial)
            plan.sum_splits(partial, dw)

        found[conv.name] = {
            "forward": clock.us(lambda x=x, w=w, y=y, p=plans[0]: p.launch(x, w, None, None, y)),
            "input gradient": clock.us(lambda dy=dy, w=w, dx=dx, p=plans[1]: p.launch(dy, w, None, None, dx)),
            "weight gradient": clock.us(weights),
        }
    return found


def torch_convolutions(clock, dtype: str) -> dict:
    """The same through cuDNN, channels_last: bfloat16, or float32 with TF32 allowed."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    kind, found = getattr(torch, dtype), {}
    stream = _torch_stream()
    for conv in convolutions():
        n, h, w_, c = conv.x_shape
        x = torch.randn(n, c, h, w_, device="cuda", dtype=kind).to(memory_format=torch.channels_last)
        w = torch.randn(conv.w_shape[3], c, *conv.w_shape[:2], device="cuda", dtype=kind)
        w = w.to(memory_format=torch.channels_last)
        pad, stride = conv.padding[0], conv.stride

        def backward(mask, dy, x=x, w=w, pad=pad, stride=stride):
            sizes = [[stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1]
            return torch.ops.aten.convolution_backward(dy, x, w, None, *sizes, mask)

        dy = torch.nn.functional.conv2d(x, w, None, stride, pad)
        found[conv.name] = {
            "forward": clock.us(lambda x=x, w=w, s=stride, p=pad: torch.nn.functional.conv2d(x, w, None, s, p), stream),
            "input gradient": clock.us(lambda dy=dy, b=backward: b([True, False, False], dy), stream),
            "weight gradient": clock.us(lambda dy=dy, b=backward: b([False, True, False], dy), stream),
        }
    return found


def _torch_stream():
    import cupy
    import torch

    return cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)


def our_passes(clock) -> dict:
    """{name: us} of the fused passes."""
    import cupy as cp

    found, rng = {}, cp.random.default_rng(0)
    for name, shape, _ in passes():
        x, dy = (gpu.cast(rng.standard_normal(shape, cp.float32), gpu.bfloat16()) for _ in range(2))
        c = shape[-1]
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
        found[name] = clock.us(run)
    return found


def batch():
    rng = np.random.default_rng(0)
    x = rng.random((N, 32, 32, 3), np.float32)
    return x, np.float32(EPS) * rng.choice(np.float32([-1, 1]), x.shape), rng.integers(0, 10, N)


def our_step(dtype: str):
    """A function that takes one whole step: forward, backward, update. Nothing in it waits for the device."""
    import cupy as cp

    model = models.preact_resnet18(seed=0).to("gpu")
    velocity, lr = cp.zeros_like(model.weights), cp.asarray(LR, np.float32)
    kind = gpu.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    x, rho, labels = (cp.asarray(a) for a in batch())
    x, rho, labels = gpu.cast(x, kind), gpu.cast(rho, kind), labels.astype(np.int32)
    gammas = cp.asarray([GAMMA_I, GAMMA_H], np.float32)  # a captured step must not bring numbers from the host

    def step():
        methods.manifold_step(model, x, labels, rho, gammas[0], gammas[1], ALPHA)
        gpu.sgd_update(model.weights, model.gradients, velocity, lr, MOMENTUM, WEIGHT_DECAY)
        model.gradients[...] = 0

    return step


def our_steps(clock, report) -> dict:
    import cupy as cp

    found = {}
    for name in ("ours", "ours graph", "ours fp32", "ours tf32"):
        gpu.set_tf32(name == "ours tf32")
        pool = cp.get_default_memory_pool()
        pool.free_all_blocks()
        try:
            step = our_step("float32" if "32" in name else "bfloat16")
            found[name] = clock.us(graph.Replayed(step) if name == "ours graph" else step)
        except Exception as error:  # one variant that fails must not cost the figures of the others
            report(f"{name} failed: {type(error).__name__}: {error}")
        if name == "ours":
            found["ours memory MB"] = pool.total_bytes() / 1e6
    gpu.set_tf32(False)
    return found


def torch_steps(clock, report) -> dict:
    import torch
    import torch_twin

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    found, source = {}, models.preact_resnet18(seed=0)
    state = {name: torch.from_numpy(value) for name, value in source.state_dict().items()}
    x, rho, labels = (torch.from_numpy(a).cuda() for a in batch())
    x, rho = (a.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last) for a in (x, rho))

    def make(compiled):
        net = torch_twin.twin(source.architecture).cuda().to(memory_format=torch.channels_last).train()
        net.load_state_dict(state)
        options = dict(lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
        optimiser = torch.optim.SGD(net.parameters(), **options)

        def loss():
            with torch.autocast("cuda", torch.bfloat16):
                return torch_twin.manifold_loss(net, x, labels, rho, GAMMA_I, GAMMA_H, ALPHA)["loss"]

        run = (
            torch.compile(loss, mode="max-autotune-no-cudagraphs" if "graph" in compiled else None)
            if compiled
            else loss
        )

        def step():
            optimiser.zero_grad(set_to_none=False)
            run().backward()
            optimiser.step()

        return step

    for name, compiled in (("eager", ""), ("compile", "yes"), ("graph", ""), ("compile graph", "graph")):
        try:
            step = make(compiled)
            if "graph" in name:
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    for _ in range(3):
                        step()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                step = graph.replay
            found[f"torch {name}"] = clock.us(step, _torch_stream())
        except Exception as error:  # as above
            report(f"torch {name} failed: {type(error).__name__}: {error}")
    return found


def attack_rates() -> dict:
    """Images a second of an untrained network whose own predictions are the labels: float32, as attacks are reported,
    and through the kernels of bfloat16, as training looks at its network."""
    import cupy as cp

    float32 = models.preact_resnet18(seed=0).to("gpu")
    x, found = cp.asarray(np.random.default_rng(0).random((512, 32, 32, 3), np.float32)), {}
    runs = {
        "PGD-20": (512, lambda model, x, y: attacks.pgd(model, x, y, EPS, steps=20)),
        "AutoAttack": (32, lambda model, x, y: attacks.autoattack(model, x, y, EPS)),
    }
    for kind, model in (("float32", float32), ("bfloat16", train.InBfloat16(float32))):
        labels = model.forward(x)[0].argmax(1)
        for name, (count, run) in runs.items():
            run(model, x[:8], labels[:8])
            cp.cuda.Device().synchronize()
            start = time.perf_counter()
            run(model, x[:count], labels[:count])
            cp.cuda.Device().synchronize()
            found[f"{name} {kind} images/s"] = count / (time.perf_counter() - start)
    return found


def measure(args) -> dict:
    import cupy as cp

    began, notes = time.perf_counter(), []

    def report(text):
        notes.append(text)
        print(text, flush=True)

    device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    clock, result = Clock(args.seconds), {"device": device, "cupy": cp.__version__, "images": 3 * N}
    ours = our_convolutions(clock)
    yardsticks = {}
    if not args.no_torch:
        yardsticks = {kind: torch_convolutions(clock, kind) for kind in ("bfloat16", "float32")}
    result["convolutions"] = []
    for conv in convolutions():
        for direction in DIRECTIONS:
            us = ours[conv.name][direction]
            row = {"name": conv.name, "direction": direction, "us": us, "tflops": conv.flops / us / 1e6}
            row |= {"gb_per_s": conv.bytes / us / 1e3, "share_of_floor": conv.floor_us / us}
            row |= {f"cudnn_{kind}_us": found[conv.name][direction] for kind, found in yardsticks.items()}
            result["convolutions"].append(row)
            beside = "  ".join(f"cuDNN {kind} {found[conv.name][direction]:7.1f}" for kind, found in yardsticks.items())
            figures = f"{us:7.1f} us {row['tflops']:5.0f} TFLOP/s {row['gb_per_s']:5.0f} GB/s"
            print(
                f"{conv.name:22} {direction:15} {figures} {row['share_of_floor']:4.0%} of the floor  {beside}",
                flush=True,
            )
    timed = our_passes(clock)
    result["passes"] = []
    for name, shape, times in passes():
        rate = 2 * np.prod(shape) * times / timed[name] / 1e3
        result["passes"].append({"name": name, "us": timed[name], "gb_per_s": rate})
        print(f"{name:24} {timed[name]:7.1f} us {rate:5.0f} GB/s", flush=True)
    steps = our_steps(clock, report)
    result["peak_memory_mb"] = steps.pop("ours memory MB", None)
    if not args.no_torch:
        steps |= torch_steps(clock, report)
    result["steps_us"] = steps
    for name, us in steps.items():
        print(f"{name:22} {us / 1e3:7.2f} ms a step, {N / us * 1e6:7.0f} images/s", flush=True)
    best = {
        side: min((us for name, us in steps.items() if name.startswith(side)), default=None)
        for side in ("ours", "torch")
    }
    if best["ours"]:
        result["epoch_s"] = best["ours"] * (TRAINING_IMAGES // N) / 1e6
        result["training_minutes"] = result["epoch_s"] * EPOCHS / 60
    if best["ours"] and best["torch"]:
        result["step_vs_torch_best"] = best["ours"] / best["torch"]
    if not args.no_attacks:
        try:
            result["attacks"] = attack_rates()
        except Exception as error:  # as above
            report(f"the attacks failed: {type(error).__name__}: {error}")
    return result | {"notes": notes, "seconds": time.perf_counter() - began}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan; nothing is timed, no GPU is needed")
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--no-attacks", action="store_true", help="leave the attacks out")
    parser.add_argument("--seconds", type=float, default=0.3, help="device time for each figure (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
    args = parser.parse_args()
    if args.dry_run:
        print(json.dumps({"dry_run": True, "convolutions_floor_us": show_plan()}))
        return
    from nanomr.backend import gpu_available

    if not gpu_available():
        print("bench/gpu.py: no GPU: CuPy with a CUDA device is needed; --dry-run prints the plan", file=sys.stderr)
        raise SystemExit(2)
    result = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", result["device"]).strip("-").lower()
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
