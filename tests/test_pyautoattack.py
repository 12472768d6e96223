"""Our AutoAttack against its authors' code (PyPI: pyautoattack), which attacks the same network through a bridge.

    pip install torch, then pip install --no-deps pyautoattack==0.2.0

The random draws differ, and so images at the very edge may fall to one and not to the other.
"""

import json
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from nanomr import models
from nanomr.attacks.autoattack import STAGES, Stage, cascade

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch)")
pyautoattack = pytest.importorskip("pyautoattack", reason="pip install --no-deps pyautoattack==0.2.0")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

N = 64
STEPS, QUERIES, RESTARTS = 12, 200, 2  # of 100, 5000, 5: both sides get the same


class Bridge(torch.autograd.Function):
    """nanomr's forward pass and input gradient, as PyTorch sees them: NCHW images, autograd."""

    @staticmethod
    def forward(ctx, x, model):
        logits, cache = model.forward(nhwc(x))
        ctx.model, ctx.cache = model, cache
        return torch.from_numpy(logits)

    @staticmethod
    def backward(ctx, dy):
        dx = ctx.model.backward(dy.numpy(), ctx.cache, param_grads=False)
        return nchw(dx), None


def nhwc(x):
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """NumPy's, Numba's and PyTorch's threads would wait for each other: many times slower."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture(scope="module")
def task():
    """(model, x, labels); the model gets all but two images right."""
    x = np.random.default_rng(5).random((N, 32, 32, 3), np.float32)
    model = models.mlp((3072, 24, 10), seed=0)
    *_, last = model.children.values()
    last.params["bias"] -= model.forward(x)[0].mean(0)
    labels = model.forward(x)[0].argmax(1)
    labels[:2] = (labels[:2] + 1) % 10
    return model, x, labels


def theirs(model, x, labels, norm, eps, version):
    """Accuracy that is left after each attack, by the authors' code. {"clean": ..., "apgd-ce": ..., ...}"""
    official = pyautoattack.AutoAttack(
        lambda images: Bridge.apply(images, model), norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, version=version,
        seed=0, device="cpu",
    )  # fmt: skip
    for attack in (official.apgd, official.apgd_targeted, official.fab):
        attack.n_iter = STEPS
        if version == "plus":
            attack.n_restarts = min(attack.n_restarts, RESTARTS)
    official.square.n_queries = QUERIES
    adversarial, _ = official.run_standard_evaluation(nchw(x), torch.from_numpy(labels), batch_size=N)
    change = (nhwc(adversarial).astype(float) - x).reshape(N, -1)
    length = abs(change).max(1) if norm == "linf" else np.sqrt((change**2).sum(1))
    assert length.max() <= eps * 1.001  # both sides attack the same ball
    return model.forward(nhwc(adversarial))[0].argmax(1) == labels


def ours(model, x, labels, norm, eps, version):
    small = {"steps": STEPS, "queries": QUERIES, "restarts": RESTARTS if version == "plus" else 1}
    stages = [Stage(s.name, s.attack, {k: small.get(k, v) for k, v in s.options.items()}) for s in STAGES[version]]
    return ~cascade(model, x, labels, eps, stages, norm=norm).fooled


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.002), ("l2", 0.08)])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_the_same_robust_accuracy_within_one_image(task, norm, eps, version):
    robust, official = (side(*task, norm, eps, version) for side in (ours, theirs))
    assert abs(int(robust.sum()) - int(official.sum())) <= 1
    assert (robust != official).sum() <= 2
    assert N / 5 < robust.sum() < 4 * N / 5  # else agreeing is easy
    if version == "standard":  # and a ball that is a little smaller would not agree
        assert ours(*task, norm, 0.85 * eps, version).sum() > robust.sum() + 1


def test_the_benchmark_prints_its_figures(tmp_path):
    program = Path(__file__).resolve().parent.parent / "bench" / "attacks.py"
    command = [sys.executable, program, "--quick", "--threads", "1", "--json", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "result.json").read_text())
    for name in ("pgd_ratio", "pgd_ratio_plain", "autoattack_ratio", "autoattack_s_per_image", "pgd_s_per_image"):
        assert found[name] > 0
    assert found["images"] == 8 and found["disagree"] <= 1
    assert list(found["autoattack_stage_s"]) == [s.name for s in STAGES["standard"]]
