"""Attacks on a less precise network: it shows the way, and every verdict is that of the float32 network."""

import importlib
import json
import shutil
from pathlib import Path

import fake_cupy
import numpy as np
import programs
import pytest
import shim
from programs import assert_one_error_line

from nanomr import models
from nanomr.attacks import pgd, report
from nanomr.attacks.autoattack import ROBUST, STAGES, WRONG, Stage, cascade, quick
from nanomr.attacks.common import recheck
from nanomr.ops import gpu
from nanomr.programs import attack as attack_cifar

N, EPS = 60, 1 / 255


class Gullible:
    """The same gradients, but another class: it errs wherever the model is right, and at once."""

    def __init__(self, model):
        self.model = model

    def forward(self, x, **options):
        logits, cache = self.model.forward(x, **options)
        return np.roll(logits, 1, axis=1), cache

    def backward(self, dy, cache, **options):
        return self.model.backward(dy, cache, **options)


class Coarse(Gullible):
    """Images in steps of 1/16: errs here and there, and has gradients of another place."""

    def forward(self, x, **options):
        return self.model.forward((np.round(x * 16) / 16).astype(x.dtype), **options)


class Blind(Gullible):
    """Without a way."""

    def forward(self, x, **options):
        return self.model.forward(x, **options)

    def backward(self, dy, cache, **options):
        return 0 * self.model.backward(dy, cache, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    programs.save_memoriser(path, N, hidden=64, rcond=0.01)
    return path


@pytest.fixture
def network(weights):
    x, labels = programs.images_of(N)
    return models.load(weights), x, labels


HURRY = quick(STAGES["standard"])


@pytest.mark.parametrize("individual", [False, True])
def test_what_only_the_less_precise_network_falls_for_is_no_hit(network, individual):
    """All that it claims is refuted and attacked again, the model itself: the result is that of the model's attack."""
    model, x, labels = network
    options = dict(individual=individual, seed=3)
    expected = cascade(model, x, labels, EPS, HURRY, **options)
    found = cascade(model, x, labels, EPS, HURRY, attacked=Gullible(model), **options)
    assert (expected.by == ROBUST).sum() > 5 and (expected.by > 1).any() and (expected.by == WRONG).any()
    np.testing.assert_array_equal(found.by, expected.by)
    np.testing.assert_array_equal(found.adversarial, expected.adversarial)
    if individual:
        np.testing.assert_array_equal(found.alone, expected.alone)
    right = expected.robust_after()
    assert found.again == ([right[0]] * 4 if individual else right[:-1]) and found.refuted == [0] * 4
    assert expected.again == [0] * 4


def test_a_broken_image_is_broken_in_float32(network):
    """... in ball and box; few are attacked twice, and the others are not worse off."""
    model, x, labels = network
    found = cascade(model, x, labels, EPS, HURRY, attacked=Coarse(model))
    assert 0 < found.again[0] < found.robust_after()[0], "nothing to decide: take coarser steps"
    broken = found.by >= 1
    np.testing.assert_array_equal(recheck(model, x, found.adversarial, labels, EPS), broken | (found.by == WRONG))
    np.testing.assert_array_equal(found.by == WRONG, model.forward(x)[0].argmax(1) != labels)
    np.testing.assert_array_equal(found.adversarial[~broken], x[~broken])


def test_the_attack_does_see_the_less_precise_network(network):
    """The control: without its gradients PGD is no more than its random start."""
    model, x, labels = network
    stages = (Stage("pgd", pgd, {"steps": 10}),)
    strong, weak = (cascade(model, x, labels, EPS, stages, attacked=a) for a in (None, Blind(model)))
    assert strong.robust_after()[1] + 5 < weak.robust_after()[1]


def test_an_image_goes_on_to_the_next_stage(network):
    """A stage that fools the other network alone, twice: again the model, then the next stage, and nobody's credit."""
    model, x, labels = network
    seen = []

    def claims(network, x, labels, eps, *, ids, **_):
        seen.append((network is model, ids.tolist()))
        return x.copy(), np.ones(len(x), bool)

    stages = (Stage("claims", claims), Stage("pgd", pgd, {"steps": 10}))
    found = cascade(model, x, labels, EPS, stages, attacked=Coarse(model))
    expected = cascade(model, x, labels, EPS, stages[1:], attacked=Coarse(model))
    right = np.flatnonzero(expected.by != WRONG).tolist()
    assert seen == [(False, right), (True, right)]
    assert found.again[0] == found.refuted[0] == len(right)
    np.testing.assert_array_equal(found.by, np.where(expected.by > 0, 2, expected.by))
    assert (found.by == 2).any()


def test_the_check_alone_goes_the_same_way(network):
    """An image ends alone as in its batch, also where it takes the second attack."""
    model, x, labels = network
    found = cascade(model, x, labels, EPS, HURRY, attacked=Gullible(model))
    checked = report.checks(
        model, x, labels, np.arange(N), found.by, norm="linf", eps=EPS, stage=HURRY[0], seed=0, steps=10,
        attacked=Gullible(model),
    )  # fmt: skip
    assert checked["alone_images"] == 4 and checked["alone"] == 0


# --- the program ------------------------------------------------------------------------------------------------------

FLAGS = "--data shapes10 --n 6 --chunk 3 --eps 1/255 --quick --weights model.safetensors".split()


@pytest.fixture
def program(monkeypatch, capsys, tmp_path, weights):
    programs.isolate(monkeypatch, tmp_path, train=10, test=N)
    shutil.copy(weights, "model.safetensors")
    return programs.caller(attack_cifar, monkeypatch, capsys)


def test_a_cpu_has_no_tf32(program):
    result = program(*FLAGS, "--device", "cpu", "--precision", "tf32")
    assert_one_error_line(result, "--precision tf32 needs a GPU: use --precision fp32 or bf16")
    assert not Path("runs").exists()


def test_a_cpu_attacks_in_bf16(program):
    """Gradients in bfloat16; float32 bears the verdicts out."""
    code, out, err = program(*FLAGS, "--device", "cpu", "--attack", "pgd", "--precision", "bf16", "--out", "b")
    assert code == 0 and "in bfloat16" in " ".join(out.split()), err
    code, _, err = program("--check", "b/examples.npz", "--weights", "model.safetensors", "--device", "cpu")
    assert code == 0, err


@pytest.fixture
def fake(monkeypatch, program):
    """The program on a machine with a GPU that is none; ``tf32`` has what was asked of cuBLAS."""
    if shim.missing():
        pytest.skip(shim.missing())
    fake_cupy.install(monkeypatch)
    fake_cupy.tf32 = []
    monkeypatch.setattr(gpu, "set_tf32", fake_cupy.tf32.append)
    yield fake_cupy
    fake_cupy.forget()


def outcome(folder):
    found = json.loads((Path(folder) / "report.json").read_text())
    return found, [json.loads(line)["by"] for line in (Path(folder) / "per_image.jsonl").read_text().splitlines()]


def flags_of(attack, radius):
    """FLAGS; the Wasserstein adversary has this radius in the place of eps."""
    at = FLAGS.index("--eps")
    return FLAGS if attack != "wasserstein" else [*FLAGS[:at], *FLAGS[at + 2 :], "--radius", radius]


@pytest.mark.parametrize("attack", ["pgd", "autoattack", "wasserstein"])
def test_a_gpu_attacks_in_each_precision(program, fake, attack):
    """Report and configuration have it, a table says so, no other precision goes on with the run; and a fresh process
    in float32 on a CPU bears the verdicts out."""
    for precision in ("fp32", "tf32", "bf16") if attack == "pgd" else ("bf16",):
        fake.counts.clear()
        fake.tf32.clear()
        flags = [
            *flags_of(attack, "0.002"),
            "--device",
            "gpu",
            "--attack",
            attack,
            "--precision",
            precision,
            "--out",
            precision,
        ]
        code, out, err = program(*flags)
        assert code == 0, err
        out = " ".join(out.split())  # as if the terminal were wide
        found, by = outcome(precision)
        assert found["precision"] == json.loads(Path(precision, "config.json").read_text())["precision"] == precision
        warned = [line for line in found["warnings"] if "--precision bf16" in line and "weaker" in line]
        out = " ".join(out.split())  # lines are folded
        assert len(warned) == (precision == "bf16") and all(" ".join(line.split()) in out for line in warned)
        assert all(("again" in row) == (precision != "fp32") for row in found["after"])
        assert (True in fake.tf32) == (precision == "tf32") and fake.tf32[-1] is False
        assert ("in bfloat16" in out) == (precision == "bf16")
        code, _, err = program(
            "--check", f"{precision}/examples.npz", "--weights", "model.safetensors", "--device", "cpu"
        )
        assert code == 0, err
    assert_one_error_line(
        program(*flags, "--precision", "fp32", "--resume"), "was begun with precision = bf16, not fp32"
    )
    assert {b for b in by if b} - {"clean"} or attack == "wasserstein", "nothing was broken"


def test_verdicts_are_never_in_tf32(program, fake, monkeypatch):
    """The model itself is asked with TF32 off, whatever the attack has switched on before."""
    asked = []

    def watched(*args):
        asked.append(fake.tf32[-1])
        return recheck(*args)

    monkeypatch.setattr(importlib.import_module("nanomr.attacks.autoattack"), "recheck", watched)
    code, _, err = program(*FLAGS, "--device", "gpu", "--attack", "pgd", "--precision", "tf32", "--out", "run")
    assert code == 0, err
    assert True in fake.tf32 and len(asked) >= 3 and not any(asked)


def test_tf32_ends_with_its_block(monkeypatch):
    """... also by an error, and around a function in each call anew."""
    switched = []
    monkeypatch.setattr(gpu, "set_tf32", switched.append)
    with pytest.raises(KeyError), gpu.tf32():
        assert switched.pop() is True
        raise KeyError
    assert switched.pop() is False
    twice = gpu.tf32()(lambda number: (switched.copy(), 2 * number))
    assert twice(2) == ([True], 4) and twice(3) == ([True, False, True], 6) and switched[-1] is False


def test_a_run_of_before_there_was_a_choice_is_resumed_in_float32(program):
    flags = [*FLAGS, "--device", "cpu", "--attack", "pgd", "--out", "run"]
    assert program(*flags)[0] == 0
    for name in ("config.json", "report.json"):
        path = Path("run", name)
        old = json.loads(path.read_text())
        assert old.pop("precision") == "fp32"
        path.write_text(json.dumps(old))
    code, out, err = program(*flags, "--resume")
    assert code == 0 and "finished already" in out, err
    assert program("--table", "run")[0] == 0


@pytest.mark.parametrize("attack", ["wasserstein", "pgd"])
def test_the_program_asks_the_model_itself(program, monkeypatch, attack):
    """With a network beside it that errs at once, each image ends as without, radius and all."""
    flags = [*flags_of(attack, "0.03"), "--n", "20", "--device", "cpu", "--attack", attack]
    assert program(*flags, "--out", "alone")[0] == 0
    monkeypatch.setitem(attack_cifar.PRECISIONS, "fp32", Gullible)
    assert program(*flags, "--out", "both")[0] == 0
    alone, both = (Path(name, "per_image.jsonl").read_text() for name in ("alone", "both"))
    assert alone == both and f'"{attack}"' in alone
    (before,), (after,) = (outcome(name)[0]["after"] for name in ("alone", "both"))
    assert after["again"] == before["attacked"] > before["broken"] and after["refuted"] == before["refuted"] == 0
