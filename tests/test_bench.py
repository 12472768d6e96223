"""The benchmark runs and prints what its readers parse. How fast it is, is not asked here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanomr.methods import METHODS

TRAIN_STEP = Path(__file__).resolve().parent.parent / "bench" / "train_step.py"
FIGURES = (
    "images_per_s torch_images_per_s ratio_vs_torch ratio_fp32 overhead_vs_standard memory_vs_plain_3n gflops "
    "tile_peak_gflops sgemm_gflops "
    "standard_images_per_s torch_standard_images_per_s standard_ratio_vs_torch torch_overhead_vs_standard"
).split()


def run(*options) -> list[str]:
    result = subprocess.run(
        [sys.executable, TRAIN_STEP, "--quick", "--threads", "1", *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.torch
@pytest.mark.parametrize("model", ["small", "preact_resnet18"])
def test_the_last_line_is_json_with_every_figure(model, tmp_path):
    """torch.compile takes minutes; nothing else is left out."""
    options = ["--no-compile", "--precision", "bf16", "--model", model]
    options += [] if model == "small" else ["--width", "8", "--images", "16"]
    lines = run("--json", str(tmp_path / "result.json"), *options)
    found = json.loads(lines[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["threads"] == 1 and found["torch_best"].split()[0] == "eager" and "fp32" in found["torch_best_fp32"]
    assert model == "small" or "memory_vs_plain_3n" not in found
    assert all(found[name] > 0 for name in FIGURES if model == "small" or not name.startswith("memory"))


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--quick", "--model", "preact_resnet18", "--width", "4"], "--side nanomr"),  # PyTorch overwrites memory
        (["--rounds", "1"], "2 or more"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, advice):
    result = subprocess.run([sys.executable, TRAIN_STEP, "--no-compile", *options], capture_output=True, text=True)
    assert result.returncode == 2 and advice in result.stderr.splitlines()[-1]


@pytest.mark.torch
def test_interval_training_is_compared_too():
    """The losses of both agree, or the benchmark ends with an error."""
    found = json.loads(run("--method", "ibp", "--no-compile")[-1])
    assert found["method"] == "ibp" and found["ratio_vs_torch"] > 0 and found["overhead_vs_standard"] > 0


@pytest.mark.slow
def test_the_costs_are_every_methods():
    lines = run("--costs")
    found = json.loads(lines[-1])["over_standard"]
    assert set(found) == set(METHODS) and found["standard"] == 1 and found["pgd"] > 1
    assert {line.split()[0] for line in lines[-1 - len(METHODS) : -1]} == set(METHODS)


def test_nanomr_alone_needs_no_pytorch():
    found = json.loads(run("--side", "nanomr")[-1])
    assert found["images_per_s"] > 0 and not [name for name in found if "torch" in name]


def test_the_profile_is_a_table():
    lines = run("--profile")
    assert any(line.startswith("conv2d_weight_gradient") for line in lines)
    assert lines[-1].startswith("the whole step") and lines[-1].endswith("100.0%")


@pytest.mark.parametrize("limit", ["1", pytest.param("120", marks=pytest.mark.slow)])
def test_the_verifiers_last_line_is_json(tmp_path, limit):
    script = TRAIN_STEP.parent / "verify.py"
    flags = ["--quick", "--eps", "1", "--time-limit", limit, "--json", str(tmp_path / "result.json")]
    result = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["proofs"] > 0 and found["crown_s"] > 0 and found["median_s"] > 0


def test_the_curve_of_the_main_network(tmp_path):
    script = TRAIN_STEP.parent / "verify_preact.py"
    flags = ["--quick", "--images", "2", "--threads", "1", "--json", str(tmp_path / "result.json")]
    result = subprocess.run(
        [sys.executable, script, *flags, "--plot", str(tmp_path / "curve.png")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert [r["eps"] for r in found["curve"]] == sorted(r["eps"] for r in found["curve"])
    for name in ("pgd", "crown", "interval"):  # of a random network and its own labels
        values = [r[name] for r in found["curve"]]
        assert values == sorted(values, reverse=True)
    assert all(r["clean"] >= r["pgd"] >= r["crown"] >= r["interval"] for r in found["curve"])
    assert found["curve"][0]["crown"] > 0 == found["curve"][-1]["crown"]
