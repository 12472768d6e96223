"""The networks of nanomr as ``torch.nn`` modules, and the paper's loss in PyTorch. Needs only torch and safetensors.

    import torch, torch_twin                                    # this file, wherever you copied it
    net = torch_twin.load("runs/x/model.safetensors").eval()    # weights and architecture come from the file
    logits = net(torch.rand(8, 3, 32, 32))                      # NCHW images in [0, 1]; normalisation is inside

The other way: ``torch_twin.save(path, net, architecture)``, then ``nanomr.load(path)``. A ``.pt`` or ``.pth`` file
that holds a state dict with these names becomes a nanomr file with

    python torch_twin.py weights.pt model.safetensors '{"name": "preact_resnet18", "bn_before_fc": false}'

The architecture is ``nanomr.models.Model.architecture``, which names the layers, or in short a builder's name and its
arguments. Left out, these take the same defaults as there.
"""

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class Normalize(nn.Module):
    """(x - mean) / std per channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class Conv2d(nn.Conv2d):
    """With ``padding`` = one number or (top, bottom, left, right)."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0, bias=True):
        top, bottom, left, right = (padding,) * 4 if isinstance(padding, int) else padding
        self.sides = (left, right, top, bottom)
        same = len(set(self.sides)) == 1
        super().__init__(in_channels, out_channels, kernel, stride, top if same else 0, bias=bias)
        self.sides = () if same else self.sides

    def forward(self, x):
        return super().forward(F.pad(x, self.sides) if self.sides else x)


class BatchNorm2d(nn.BatchNorm2d):
    """Of images (N, C, H, W), and of what a linear layer makes, (N, C)."""

    def _check_input_dim(self, x):
        if x.ndim != 2:
            super()._check_input_dim(x)


class Flatten(nn.Module):
    """(N, C, H, W) -> (N, everything else), in PyTorch's order; ``nhwc``: in nanomr's, for a Linear without image."""

    def __init__(self, nhwc):
        super().__init__()
        self.nhwc = nhwc

    def forward(self, x):
        return (x.permute(0, 2, 3, 1) if self.nhwc and x.ndim == 4 else x).flatten(1)


class AveragePool2d(nn.Module):
    """Mean over window x window tiles; ``window=None`` pools the whole image to 1 x 1."""

    def __init__(self, window=None):
        super().__init__()
        self.window = window

    def forward(self, x):
        return F.avg_pool2d(x, self.window) if self.window else F.adaptive_avg_pool2d(x, 1)


class Mlp(nn.Sequential):
    """Images -> logits by fully connected layers; ``sizes`` = (inputs, hidden ..., classes)."""

    def __init__(self, sizes=(3072, 256, 256, 10), input_shape=None, mean=(0.0,), std=(1.0,)):
        super().__init__()  # input_shape, (H, W, C), is the caller's affair here: any image of sizes[0] values fits
        self.normalize, self.flatten = Normalize(mean, std), nn.Flatten()
        for i in range(1, len(sizes)):
            self.add_module(f"fc{i}", nn.Linear(sizes[i - 1], sizes[i]))
            if i < len(sizes) - 1:
                self.add_module(f"relu{i}", nn.ReLU())


class SmallCNN(nn.Sequential):
    """The verification network: Wong et al.'s (``kernel=4``), or Xiao et al.'s with SAME padding (``kernel=5``)."""

    def __init__(
        self, kernel=4, hidden=128, classes=10, mean=CIFAR_MEAN, std=CIFAR_STD, input_shape=(32, 32, 3),
        batchnorm=False,
    ):  # fmt: skip
        super().__init__()
        padding = 1 if kernel == 4 else (1, 2, 1, 2)  # SAME padding of an even image, stride 2
        h, w, c = input_shape
        hidden_layers = (
            ("conv1", Conv2d(c, 16, kernel, 2, padding, bias=not batchnorm), 16),
            ("conv2", Conv2d(16, 32, kernel, 2, padding, bias=not batchnorm), 32),
            ("fc1", nn.Linear((h // 4) * (w // 4) * 32, hidden, bias=not batchnorm), hidden),
        )
        self.normalize = Normalize(mean, std)
        for i, (name, layer, channels) in enumerate(hidden_layers, 1):
            if name == "fc1":
                self.flatten = nn.Flatten()
            self.add_module(name, layer)
            if batchnorm:
                self.add_module(f"bn{i}", BatchNorm2d(channels))
            self.add_module(f"relu{i}", nn.ReLU())
        self.fc2 = nn.Linear(hidden, classes)


class PreActBlock(nn.Module):
    """conv2(relu(bn2(conv1(h)))) + shortcut, h = relu(bn1(x)); the flags say which of x and h the shortcut reads."""

    def __init__(self, in_channels, channels, stride, out_shortcut, activated_identity):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut, self.shortcut_reads_h = nn.Identity(), activated_identity
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut_reads_h = out_shortcut

    def forward(self, x):
        h = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(h))))
        return y + self.shortcut(h if self.shortcut_reads_h else x)


class PreActResNet18(nn.Sequential):
    """He et al.'s (2016) network for 32x32 images, and the variants that go by its name; see nanomr's builder."""

    def __init__(
        self, bn_before_fc=True, out_shortcut=True, jin_v1=False, width=64, classes=10, mean=CIFAR_MEAN, std=CIFAR_STD,
        input_shape=(32, 32, 3),
    ):  # fmt: skip
        super().__init__()
        if jin_v1:
            bn_before_fc, out_shortcut = False, True
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(input_shape[2], width, 3, 1, 1, bias=False)
        if jin_v1:
            self.bn1, self.relu1 = nn.BatchNorm2d(width), nn.ReLU()
        channels = width
        for i, stride in enumerate((1, 2, 2, 2)):
            out = width * 2**i
            first = PreActBlock(channels, out, stride, out_shortcut, jin_v1)
            self.add_module(f"layer{i + 1}", nn.Sequential(first, PreActBlock(out, out, 1, out_shortcut, jin_v1)))
            channels = out
        if bn_before_fc:
            self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(channels, classes)


class Residual(nn.Sequential):
    """The sum of what the one or two branches make of x; of a single one, and x itself."""

    def forward(self, x):
        return sum((branch(x) for branch in self), 0 if len(self) > 1 else x)


BUILDERS = {"mlp": Mlp, "small_cnn": SmallCNN, "preact_resnet18": PreActResNet18}


LAYERS = {  # from the arguments in a header
    "AveragePool2d": AveragePool2d,
    "BatchNorm2d": lambda channels, eps, momentum, **_: BatchNorm2d(channels, eps, momentum),
    "Conv2d": Conv2d,
    "Linear": lambda in_features, out_features, bias, **_: nn.Linear(in_features, out_features, bias),
    "Normalize": Normalize,
    "PreActBlock": PreActBlock,
    "ReLU": nn.ReLU,
}


def _sequential(nodes: dict, after=()) -> nn.Sequential:
    """The modules of a tree's ``nodes``; ``after``: the nodes that come behind them."""
    module, nodes = nn.Sequential(), list(nodes.items())
    for i, (name, node) in enumerate(nodes):
        behind, options = [*(other for _, other in nodes[i + 1 :]), *after], dict(node)
        kind = options.pop("type")
        if kind == "Sequential":
            layer = _sequential(options["layers"], behind)
        elif kind == "Flatten":  # the next linear layer says in which order its columns are
            linear = next((other for other in _flat(behind) if other["type"] == "Linear"), {})
            layer = Flatten(nhwc=not linear.get("image"))
        elif kind == "Residual":
            layer = Residual(OrderedDict(_sequential(options["layers"], behind).named_children()))
        else:
            layer = LAYERS[kind](**options)
        module.add_module(name, layer)
    return module


def _flat(nodes):
    for node in nodes:
        yield from _flat(node["layers"].values()) if "layers" in node else [node]


def twin(architecture: dict) -> nn.Module:
    """The module of an ``architecture``, with PyTorch's random weights."""
    if "layers" in architecture:
        return _sequential(architecture["layers"])
    options = dict(architecture)
    return BUILDERS[options.pop("name")](**options)


def load(path) -> nn.Module:
    """The network in a nanomr file (or run folder), in training mode, as every new module."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    with safetensors.safe_open(path, framework="pt") as file:
        architecture = json.loads(file.metadata()["nanomr"])["architecture"]
        state = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("optimizer.")}
    module = twin(architecture)
    module.load_state_dict(state)
    return module


def save(path, module: nn.Module, architecture: dict):
    """Write a file that ``nanomr.load`` reads."""
    convert(path, module.state_dict(), architecture)


def convert(path, state: dict, architecture: dict):
    """Write a nanomr file from a state dict. Raises RuntimeError when its names or shapes are not the architecture's.

    One without ``normalize.mean`` and ``normalize.std`` gets the architecture's.
    """
    module = twin(architecture)
    defaults = {name: value for name, value in module.state_dict().items() if name.startswith("normalize.")}
    module.load_state_dict({**defaults, **state})
    arrays = {name: value.contiguous() for name, value in module.state_dict().items()}
    safetensors.torch.save_file(arrays, path, {"nanomr": json.dumps({"architecture": architecture})})


def manifold_loss(module, x, labels, rho, gamma_i=0.0, gamma_h=0.0, alpha=8.0, per_sample=False) -> dict:
    """The objective of ``nanomr.methods.manifold_step``, for autograd: x, rho (N, C, H, W), labels (N,).

    {"loss", "cross_entropy", "intrinsic", "hamming"}; call ``["loss"].backward()``.
    """
    inputs = []  # of every ReLU, in forward order
    relus = [m for m in module.modules() if isinstance(m, nn.ReLU)]
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for m in relus]
    try:
        logits = module(torch.cat([x, x + rho, x - rho]))
    finally:
        for hook in hooks:
            hook.remove()
    return objective(logits, inputs, labels, gamma_i, gamma_h, alpha, per_sample)


def objective(logits, inputs, labels, gamma_i, gamma_h, alpha=8.0, per_sample=False) -> dict:
    """The same from the logits of the 3 N images and the inputs of the ReLUs, in forward order."""
    clean, plus, minus = logits.chunk(3)
    cross_entropy = F.cross_entropy(clean, labels)
    intrinsic = (plus - minus).square().sum(1).mean()
    hamming = logits.new_zeros(())
    for z in inputs:
        z = z.float() if z.dtype == torch.bfloat16 else z  # under autocast
        t_plus, t_minus = torch.tanh(alpha * z[len(labels) :]).chunk(2)
        distance = t_plus - t_minus
        norms = torch.linalg.vector_norm(distance, dim=tuple(range(1, z.ndim)) if per_sample else None)
        hamming = hamming + norms.sum() / (2 * distance.numel() * len(inputs))
    loss = cross_entropy + gamma_i * intrinsic + gamma_h * hamming
    return {"loss": loss, "cross_entropy": cross_entropy, "intrinsic": intrinsic, "hamming": hamming}


def interval_loss(module, x, labels, eps, kappa=0.2, balance=0.0, tau=0.5) -> dict:
    """The objective of nanomr's ``--method ibp``, for autograd: x (N, C, H, W), labels (N,); ``balance`` as it is at
    this point of the ramp. The network is a chain that ends with a linear layer; a batch norm takes the statistics of
    the clean images. {"loss", "cross_entropy", "interval", "balance"}; call ``["loss"].backward()``.
    """
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    points, radius = torch.cat([x, (low + high) / 2]), (high - low) / 2  # [clean; centres]
    n, first, terms = len(x), radius.mean(), []
    *body, last = module.children()
    for layer in body:
        if isinstance(layer, nn.ReLU):
            centre = points[n:]
            low, high = centre - radius, centre + radius
            if balance:
                terms += _balance_terms(centre, low > 0, high < 0, first / radius.mean(), tau)
            low, high = low.relu(), high.relu()
            points, radius = torch.cat([points[:n].relu(), (low + high) / 2]), (high - low) / 2
        elif isinstance(layer, BatchNorm2d):
            clean, axes = points[:n], [0, *range(2, points.ndim)]
            var, mean = torch.var_mean(clean, axes, unbiased=False, keepdim=True)
            scale = layer.weight.view(mean.shape) / (var + layer.eps).sqrt()
            points, radius = (points - mean) * scale + layer.bias.view(mean.shape), radius * scale.abs()
            with torch.no_grad():
                layer.num_batches_tracked += 1
                many = clean.numel() / mean.numel()
                layer.running_mean.lerp_(mean.flatten(), layer.momentum)
                layer.running_var.lerp_(var.flatten() * (many / (many - 1)), layer.momentum)
        elif isinstance(layer, nn.Conv2d):
            padded = F.pad(radius, layer.sides) if getattr(layer, "sides", ()) else radius
            points, radius = layer(points), layer._conv_forward(padded, layer.weight.abs(), None)
        elif isinstance(layer, nn.Linear):
            points, radius = layer(points), F.linear(radius, layer.weight.abs())
        else:
            points, radius = layer(points), radius / layer.std if isinstance(layer, Normalize) else layer(radius)
            first = radius.mean() if isinstance(layer, Normalize) else first
    logits, away = last(points), (last.weight[None] - last.weight[labels][:, None]).abs()  # (N, classes, features)
    cross_entropy = F.cross_entropy(logits[:n], labels)
    interval = F.cross_entropy(logits[n:] + torch.einsum("nkf,nf->nk", away, radius), labels)
    balance_term = sum(terms, logits.new_zeros(())) / max(sum(isinstance(m, nn.ReLU) for m in body), 1)
    loss = kappa * cross_entropy + (1 - kappa) * interval + balance * balance_term
    return {"loss": loss, "cross_entropy": cross_entropy, "interval": interval, "balance": balance_term}


def _balance_terms(centre, on, off, shrinking, tau):
    """Shi et al.'s (2021) three hinges of a ReLU layer."""
    away = (centre - centre.mean()).square()
    pairs = ((centre * on).mean(), -(centre * off).mean()), ((on * away).sum(), (off * away).sum())
    yield F.relu(tau - shrinking) / tau
    for p, q in pairs:
        ratio = torch.minimum(p, q) / torch.maximum(p, q).clamp(min=1e-30)
        yield torch.where((p > 0) & (q > 0), F.relu(tau - ratio) / tau, 0.0)


def main():
    parser = argparse.ArgumentParser(description="Convert a PyTorch state dict to a nanomr file.")
    parser.add_argument("source", help="a .pt or .pth file that holds a state dict")
    parser.add_argument("target", help="the .safetensors file to write")
    parser.add_argument("architecture", type=json.loads, help='JSON, for example \'{"name": "small_cnn"}\'')
    args = parser.parse_args()
    convert(args.target, torch.load(args.source, map_location="cpu", weights_only=True), args.architecture)


if __name__ == "__main__":
    main()
