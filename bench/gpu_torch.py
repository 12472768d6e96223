"""PyTorch's side of bench/gpu.py, cuDNN included; on a "cpu" only to see that it runs."""

import gpu_plan
from gpu_plan import ALPHA, GAMMA_H, GAMMA_I, LR, MOMENTUM, WEIGHT_DECAY, Clock, Work, batch, convolutions

from nanomr import models


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
            self.buffer = self.torch.empty(gpu_plan.FLUSH, dtype=self.torch.uint8, device="cuda")
        self.buffer.zero_()


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
        inputs.clear()  # what still holds them on return, a compiled step must return, and so keep
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
