"""nanomr against PyTorch, by docs/torch_twin.py: models, the manifold objective, the optimiser, the weight files.

PyTorch computes in float64, so that what is left in a float32 comparison is our own rounding.
"""

import copy
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import nanomr as mr

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch)")
pytestmark = pytest.mark.torch

TWIN = Path(__file__).resolve().parent.parent / "docs" / "torch_twin.py"
_spec = importlib.util.spec_from_file_location("torch_twin", TWIN)
torch_twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_twin)

CIFAR = (32, 32, 3)


def own():
    """What no builder makes: uneven padding, a block, nested layers, a linear layer that flattens as we do."""
    layers = mr.layers
    children = {
        "norm": layers.Normalize((0.4, 0.5), (0.2, 0.3)),
        "conv": layers.Conv2d(2, 4, 3, 2, (0, 1, 1, 2), bias=False),
        "block": layers.PreActBlock(4, 6, 2),
        "sum": layers.Residual(
            {"body": layers.Sequential({"conv": layers.Conv2d(6, 6, 1, bias=False), "relu": layers.ReLU()})}
        ),
        "both": layers.Residual(
            {"body": layers.Conv2d(6, 6, 3, 1, 1, bias=False), "shortcut": layers.Conv2d(6, 6, 1, bias=False)}
        ),
        "end": layers.Sequential(
            {"bn": layers.BatchNorm2d(6, eps=1e-3), "relu": layers.ReLU(), "flatten": layers.Flatten()}
        ),
        "fc1": layers.Linear(4 * 4 * 6, 7),
        "relu": layers.ReLU(),
        "fc2": layers.Linear(7, 10, bias=False),
    }
    return mr.models.Model(children, "own", (15, 15, 2))


NETWORKS = {
    "mlp": dict(name="mlp", sizes=[3072, 20, 16, 10]),
    "mlp, other images": dict(
        name="mlp", sizes=[60, 12, 5], input_shape=[4, 5, 3], mean=[0.4, 0.5, 0.6], std=[0.2] * 3
    ),
    "linear": dict(name="mlp", sizes=[3072, 10]),
    "small_cnn 4": dict(name="small_cnn", kernel=4),
    "small_cnn 5": dict(name="small_cnn", kernel=5, hidden=100),
    "small_cnn batch norm": dict(name="small_cnn", batchnorm=True),
    "resnet He": dict(name="preact_resnet18", width=4),
    "resnet raw shortcut": dict(name="preact_resnet18", width=4, out_shortcut=False),
    "resnet no last bn": dict(name="preact_resnet18", width=4, bn_before_fc=False),
    "resnet Wong": dict(name="preact_resnet18", width=4, bn_before_fc=False, out_shortcut=False),
    "small_cnn, other images": dict(name="small_cnn", hidden=9, input_shape=[9, 13, 1], mean=[0.5], std=[0.2]),
    "own": own().architecture,
    "resnet Jin v1": dict(name="preact_resnet18", width=4, jin_v1=True),
}
TOLERANCE = {np.float32: 1e-4, np.float64: 1e-9}  # relative to the largest value of the tensor

each_network = pytest.mark.parametrize("name", NETWORKS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def couple(name, dtype, rng):
    """A network and its float64 twin, with the same weights and with BatchNorm far from its initial values."""
    model = mr.models.build(NETWORKS[name], seed=3)
    for _, layer in model.walk():
        if isinstance(layer, mr.layers.BatchNorm2d):
            for values in (*layer.params.values(), layer.buffers["running_mean"], layer.buffers["running_var"]):
                values += rng.uniform(-0.2, 0.2, values.shape)
    model.astype(dtype)
    net = torch_twin.twin(model.architecture).double()
    net.load_state_dict({key: torch.from_numpy(value) for key, value in model.state_dict().items()})
    return model, net


def images(model, n, rng):
    return rng.random((n, *model.input_shape)).astype(model.dtype)


def corners(x, rng, eps=8 / 255):
    return (eps * rng.choice([-1, 1], x.shape)).astype(x.dtype)


def away_from_kinks(net, draw):
    """``draw()``, again and again until no ReLU of ``net`` gets so near to 0 that rounding decides on its branch.

    A branch taken otherwise is a gradient of its own, not an error. ``draw`` gives images, and what goes with them.
    """
    probe, nearest = copy.deepcopy(net), []
    for module in probe.modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_pre_hook(lambda _, args: nearest.append(args[0].abs().min().item()))
    for _ in range(500):
        drawn = draw()
        nearest.clear()
        with torch.no_grad():
            probe(nchw(np.concatenate(drawn)))
        if min(nearest, default=1.0) > (1e-5 if drawn[0].dtype == np.float32 else 1e-12):
            return drawn
    raise AssertionError("every batch came near a kink: draw smaller ones")


def pairs(model, n, rng):
    """(x, x + rho, x - rho)"""
    x = images(model, n, rng)
    rho = corners(x, rng)
    return x, x + rho, x - rho


def nchw(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().double()


def as_state_dict(model, arrays: dict):
    """Values given as {layer path: {name: array}}, by PyTorch's names and in its layouts."""
    layers = dict(model.walk())
    return {f"{path}.{n}": layers[path].to_torch(n, a) for path, store in arrays.items() for n, a in store.items()}


def gradients(model):
    return as_state_dict(model, {path: layer.grads for path, layer in model.walk()})


def assert_close(actual, wanted, tolerance, what=""):
    wanted = wanted.detach().numpy() if isinstance(wanted, torch.Tensor) else np.asarray(wanted)
    error = np.abs(np.asarray(actual) - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    assert np.shape(actual) == wanted.shape and error <= tolerance, f"{what}: off by {error:.1e} of the largest value"


def assert_same_gradients(model, net, tolerance):
    found, wanted = gradients(model), {key: p.grad for key, p in net.named_parameters()}
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert_close(found[key], wanted[key], tolerance, key)


# --- networks ---------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@each_network
def test_logits_gradients_and_running_statistics_are_pytorchs(name, train, dtype, rng):
    model, net = couple(name, dtype, rng)
    net.train(train)
    (x,) = away_from_kinks(net, lambda: (images(model, 3, rng),))
    image = nchw(x).requires_grad_()
    wanted = net(image)
    dy = rng.standard_normal(wanted.shape).astype(dtype)
    wanted.backward(torch.from_numpy(dy).double())

    logits, cache = model.forward(x, train=train)
    dx = model.backward(dy, cache)

    tolerance = TOLERANCE[dtype]
    assert_close(logits, wanted, tolerance, "logits")
    assert_close(dx, image.grad.permute(0, 2, 3, 1), tolerance, "the gradient by the images")
    assert_same_gradients(model, net, tolerance)
    found = model.state_dict()
    for key, buffer in net.named_buffers():
        assert_close(found[key], buffer, tolerance, key)
    assert logits.dtype == dx.dtype == model.gradients.dtype == dtype


@pytest.mark.parametrize("name", ["small_cnn 5", "resnet He"])
def test_the_gradient_by_the_images_alone_is_pytorchs(name, rng):
    model, net = couple(name, np.float64, rng)
    x = images(model, 3, rng)
    image = nchw(x).requires_grad_()
    wanted = net.eval()(image)
    wanted.square().sum().backward()
    logits, cache = model.forward(x)
    dx = model.backward(2 * logits, cache, param_grads=False)
    assert_close(dx, image.grad.permute(0, 2, 3, 1), 1e-9)
    assert not model.gradients.any()


def test_the_padding_of_the_5x5_kernel_is_one_pixel_before_and_two_after(rng):
    """Symmetric padding is another network: this test and the twin would notice."""
    model, net = couple("small_cnn 5", np.float64, rng)
    x = images(model, 2, rng)
    logits, _ = model.forward(x)
    assert_close(logits, net.eval()(nchw(x)), 1e-9)
    net.conv1.sides = (2, 1, 2, 1)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(logits, net(nchw(x)), 1e-4)


@pytest.mark.parametrize("name", ["small_cnn 4", "resnet Jin v1"])
def test_a_wrong_gradient_is_caught(name, rng):
    """The comparisons above can fail: one element, one per mille of the largest, is enough."""
    model, net = couple(name, np.float32, rng)
    (x,) = away_from_kinks(net, lambda: (images(model, 3, rng),))
    logits, cache = model.forward(x, train=True)
    dy = rng.standard_normal(logits.shape).astype(np.float32)
    model.backward(dy, cache)
    net(nchw(x)).backward(torch.from_numpy(dy).double())
    assert_same_gradients(model, net, 1e-4)
    for _, layer in model.walk():
        for gradient in layer.grads.values():
            at = tuple(rng.integers(size) for size in gradient.shape)
            before = gradient[at]
            gradient[at] += 1e-3 * np.abs(gradient).max()
            with pytest.raises(AssertionError, match="off by"):
                assert_same_gradients(model, net, 1e-4)
            gradient[at] = before


# --- the manifold objective -------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("per_sample", [False, True], ids=["one norm a batch", "one norm a sample"])
@each_network
def test_the_manifold_objective_is_pytorchs(name, per_sample, dtype, rng):
    model, net = couple(name, dtype, rng)
    if name == "linear":  # no ReLU, no Hamming term: torch_twin would divide by no layers
        per_sample = False
    x = images(model, 5, rng)
    rho, labels = (
        corners(x, rng),
        rng.integers(0, NETWORKS[name].get("classes", NETWORKS[name].get("sizes", [10])[-1]), 5),
    )
    options = dict(gamma_i=0.4, gamma_h=30.0, alpha=8.0, per_sample=per_sample)
    wanted = torch_twin.manifold_loss(net, nchw(x), torch.from_numpy(labels), nchw(rho), **options)
    wanted["loss"].backward()
    found = mr.methods.manifold_step(model, x, labels, rho, **options)

    tolerance = TOLERANCE[dtype]
    assert found.keys() == wanted.keys()
    for part in wanted:
        assert_close(found[part], wanted[part], tolerance, part)
    assert (found["hamming"] > 0) == (name != "linear")
    assert_same_gradients(model, net, tolerance)


@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.7, 0.0), (0.0, 50.0)], ids=["neither", "intrinsic", "hamming"])
def test_each_term_alone_is_pytorchs(gammas, rng):
    model, net = couple("resnet He", np.float64, rng)
    x, labels = images(model, 4, rng), rng.integers(0, 10, 4)
    rho = corners(x, rng)
    torch_twin.manifold_loss(net, nchw(x), torch.from_numpy(labels), nchw(rho), *gammas)["loss"].backward()
    mr.methods.manifold_step(model, x, labels, rho, *gammas)
    assert_same_gradients(model, net, 1e-9)


@pytest.mark.parametrize("per_sample", [False, True])
def test_equal_corners_have_no_gradient_there_either(per_sample, rng):
    """rho = 0 is where the Hamming term has its kink; both sides say 0, and neither says NaN."""
    model, net = couple("small_cnn 4", np.float64, rng)
    x, labels = images(model, 4, rng), rng.integers(0, 10, 4)
    rho, options = np.zeros_like(x), dict(gamma_i=1.0, gamma_h=100.0, per_sample=per_sample)
    loss = torch_twin.manifold_loss(net, nchw(x), torch.from_numpy(labels), nchw(rho), **options)
    loss["loss"].backward()
    found = mr.methods.manifold_step(model, x, labels, rho, **options)
    assert found["hamming"] == 0 == loss["hamming"].item()
    assert_same_gradients(model, net, 1e-9)


# --- the optimiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_cnn 4", "resnet He"])
def test_ten_steps_of_sgd_are_pytorchs(name, rng):
    model, net = couple(name, np.float64, rng)
    ours = mr.optim.SGD(model, momentum=0.9, weight_decay=5e-4)
    theirs = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    for step in range(10):
        x, labels = images(model, 4, rng), rng.integers(0, 10, 4)
        rho, lr = corners(x, rng), 0.002 * (step + 1)  # moves, as the paper's does
        mr.methods.manifold_step(model, x, labels, rho, gamma_i=0.4, gamma_h=10.0)
        ours.step(lr)
        theirs.zero_grad()
        theirs.param_groups[0]["lr"] = lr
        torch_twin.manifold_loss(net, nchw(x), torch.from_numpy(labels), nchw(rho), 0.4, 10.0)["loss"].backward()
        theirs.step()
    found = model.state_dict()
    for key, value in net.state_dict().items():
        assert_close(found[key], value, 1e-8, key)


def test_clipping_the_gradient_is_pytorchs(rng):
    model, net = couple("small_cnn 4", np.float64, rng)
    ours = mr.optim.SGD(model, momentum=0.9, weight_decay=5e-4, clip=0.05)
    theirs = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        x, labels = images(model, 4, rng), rng.integers(0, 10, 4)
        mr.methods.standard_step(model, x, labels)
        norm = ours.step(0.1)
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(net(nchw(x)), torch.from_numpy(labels)).backward()
        assert_close(norm, torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05), 1e-9)
        theirs.step()
    found = model.state_dict()
    for key, value in net.state_dict().items():
        assert_close(found[key], value, 1e-4, key)  # PyTorch adds 1e-6 to the norm


# --- weight files -----------------------------------------------------------------------------------------------------


@each_network
def test_a_saved_network_loads_in_pytorch(name, rng, tmp_path):
    model, _ = couple(name, np.float32, rng)
    for precision in ("bf16", "fp32"):
        model.save(tmp_path / "model.safetensors", precision, epoch=3)
        for path in (tmp_path / "model.safetensors", tmp_path):
            net = torch_twin.load(path).double().eval()  # strict: every name must be there
            x = images(model, 4, rng)
            assert_close(mr.load(path).forward(x)[0], net(nchw(x)), 1e-4)


@each_network
def test_a_pytorch_network_loads_in_nanomr(name, rng, tmp_path):
    torch.manual_seed(1)
    net = torch_twin.twin(NETWORKS[name])
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.add_(torch.rand_like(values), alpha=0.4)
    torch_twin.save(tmp_path / "net.safetensors", net, NETWORKS[name])
    model = mr.load(tmp_path / "net.safetensors")
    x = images(model, 4, rng)
    assert_close(model.forward(x)[0], net.double().eval()(nchw(x)), 1e-4)
    assert model.weights.dtype == np.float32


def test_a_file_goes_through_pytorch_bit_for_bit(rng, tmp_path):
    model, _ = couple("resnet Wong", np.float32, rng)
    model.save(tmp_path / "a.safetensors")
    torch_twin.save(tmp_path / "b.safetensors", torch_twin.load(tmp_path / "a.safetensors"), model.architecture)
    a, b = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert mr.load(tmp_path / "b.safetensors").architecture == model.architecture


def test_the_command_converts_a_pt_file(rng, tmp_path):
    architecture = {"name": "small_cnn", "hidden": 20, "mean": [0.5] * 3, "std": [0.25] * 3}
    net = torch_twin.twin(architecture)
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("normalize.")}
    torch.save(state, tmp_path / "weights.pt")
    command = [sys.executable, TWIN, tmp_path / "weights.pt", tmp_path / "net.safetensors", json.dumps(architecture)]
    subprocess.run(command, check=True)
    model = mr.load(tmp_path / "net.safetensors")
    x = images(model, 2, rng)
    assert_close(model.forward(x)[0], net.double().eval()(nchw(x)), 1e-4)


def test_weights_of_another_network_are_refused(tmp_path):
    state = torch_twin.twin(NETWORKS["small_cnn 4"]).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        torch_twin.convert(tmp_path / "net.safetensors", state, NETWORKS["small_cnn 5"])
    assert not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize("ramp", [0.4, 1.0])
@pytest.mark.parametrize("name", ["small_cnn 4", "small_cnn 5", "small_cnn batch norm"])
def test_interval_training(name, ramp, rng):
    """One step's loss, its parts, its whole gradient, and what batch norms remember: float64 against autograd."""
    model, net = couple(name, np.float64, rng)
    method = mr.methods.METHODS["ibp"]
    for _, layer in model.walk():  # more ReLUs are on than off, so that no hinge of the regulariser is shut
        if "bias" in layer.params and layer.params["bias"].size > 10:
            layer.params["bias"] += 0.5
    net.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in model.state_dict().items()})
    x, labels = images(model, 5, rng), rng.integers(0, 10, 5)
    now = {"eps": 1e-3 * ramp, "eps_end": 1e-3, "ramp": ramp, **method.filled({"balance": 2.0})}
    model.zero_grad()
    found = method.step(model, x, labels, None, now)
    kappa, weight = 1 - (1 - now["kappa"]) * ramp, now["balance"] * (1 - ramp)
    wanted = torch_twin.interval_loss(net, nchw(x), torch.from_numpy(labels), now["eps"], kappa, weight)
    wanted["loss"].backward()
    assert ramp == 1 or found["balance"] > 0.1
    for part, value in wanted.items():
        assert float(found[part]) == pytest.approx(value.item(), rel=1e-9, abs=1e-12), part
    assert_same_gradients(model, net, 1e-9)
    remembered = model.state_dict()
    for key, value in net.named_buffers():
        assert_close(remembered[key], value, 1e-9, key)


def test_the_twins_take_the_builders_arguments_and_defaults():
    for name, builder in mr.models.BUILDERS.items():
        ours = {p.name: p.default for p in inspect.signature(builder).parameters.values() if p.name != "seed"}
        theirs = {p.name: p.default for p in inspect.signature(torch_twin.BUILDERS[name]).parameters.values()}
        assert ours == theirs
