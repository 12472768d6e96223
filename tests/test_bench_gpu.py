"""bench/gpu.py runs before it meets a GPU: our side on the stand-in for CuPy, PyTorch's on a CPU.

What it finds there means nothing; that it finds it, and where it writes it, does.
"""

import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
import shim
from test_kernels import tiny_model

from nanomr import layers, models
from nanomr.attacks.autoattack import STAGES, Stage
from nanomr.ops.gpu import cuda

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)  # dataclasses look there
    path, loaded = list(sys.path), set(sys.modules)
    spec.loader.exec_module(module)
    sys.path[:] = path
    yield module
    for name in set(sys.modules) - loaded:  # its parts, whose FLUSH and so on a test may have changed
        if name.startswith("gpu_"):
            del sys.modules[name]


@pytest.fixture
def fake(monkeypatch, bench):
    """A machine with a GPU that is none, and a small one."""
    if shim.missing():
        pytest.skip(shim.missing())
    fake_cupy.install(monkeypatch)
    monkeypatch.setitem(models.BUILDERS, "tiny", tiny_model)
    monkeypatch.setattr(bench.gpu_plan, "FLUSH", 64)
    monkeypatch.delenv("OUT", raising=False)
    yield fake_cupy
    fake_cupy.forget()


def little(bench, **changes):
    stages = tuple(
        Stage(s.name, s.attack, {k: min(v, 1) if isinstance(v, int) else v for k, v in s.options.items()})
        for s in STAGES["standard"]
    )
    work = bench.gpu_plan.Work(2, 8, 8, {"name": "tiny"}, pgd_images=3, pgd_steps=2, auto_images=2, stages=stages)
    return replace(work, **changes)


def arguments(bench, folder, *flags):
    return bench.parse(["--seconds", "0", "--budget", "1000", "--out", str(folder), *flags])


OURS = ("ours", "ours graph", "ours fp32", "ours tf32")


def test_our_side_runs_from_end_to_end(bench, fake, tmp_path, monkeypatch):
    """Every section, without one failure; the file is there, whole, and what measure() says."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    work = little(bench)
    found = bench.measure(arguments(bench, tmp_path / "results", "--no-torch"), work)
    assert found["notes"] == []
    assert found["device"] == "Stand-in (CPU)" and found["cupy"] == np.__version__ and found["images"] == 6
    for folder in ("results", "out"):
        assert json.loads((tmp_path / folder / "stand-in-cpu.json").read_text()) == json.loads(json.dumps(found))
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["stand-in-cpu.json"]
    assert [(r["name"], r["direction"]) for r in found["convolutions"]] == list(
        itertools.product([c.name for c in bench.gpu_plan.convolutions(work)], bench.gpu_plan.DIRECTIONS)
    )
    for row in found["convolutions"]:
        assert all(row[key] > 0 for key in ("us", "tflops", "gb_per_s", "share_of_floor"))
    for row in found["convolutions"]:  # of a network of 8 channels, most of whose products are narrow
        names = {key for key in row if key in ("usual_us", "square_us", "deep_us", "wgmma_us")}
        assert names in ({"wgmma_us"}, set()) and all(row[key] > 0 for key in names)
    assert any("wgmma_us" in row for row in found["convolutions"]) and found["tiles"] == {}
    assert len(found["passes"]) == 12 and all(r["us"] > 0 and r["gb_per_s"] > 0 for r in found["passes"])
    assert tuple(found["steps_us"]) == OURS and min(found["steps_us"].values()) > 0
    assert found["epoch_s"] > 0 and found["training_minutes"] == pytest.approx(found["epoch_s"] * 100 / 60)
    assert found["peak_memory_mb"] > 0 and "step_vs_torch_best" not in found
    best = min(found["steps_us"].values())
    assert found["floor_share"] == {key: us / best for key, us in found["floor_us"].items()}
    names = [f"{a} {p} images/s" for a in ("PGD-2", "AutoAttack/10") for p in ("bfloat16", "float32")]
    assert list(found["attacks"]) == names and min(found["attacks"].values()) > 0
    kernels = found["kernels_us"]
    assert list(kernels.values()) == sorted(kernels.values(), reverse=True)
    expected = {f"convolve ({d})" for d in bench.gpu_plan.DIRECTIONS[:2]} | {
        "weight_gradient",
        "sgd_update",
        bench.gpu_ours.REST,
    }
    assert expected <= kernels.keys() and all(us > 0 for us in kernels.values())


def test_steps_take_the_tiles_that_the_self_test_chose(bench, fake, tmp_path, monkeypatch):
    """... they are named in the file and the report, and all other tiles are timed beside them."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    gpu_report, selftest = importlib.import_module("gpu_report"), bench.selftest
    timed = {"y narrow, usual": 50.0, "y narrow, wgmma": 40.0, "dx wide, usual": 90.0, "dx wide, deep": 95.0}
    monkeypatch.setattr(selftest, "remembered", lambda: dict.fromkeys(selftest.NAMES) | timed)
    work = little(bench)
    args = arguments(bench, tmp_path, "--no-torch", "--no-attacks")
    monkeypatch.setattr(bench.Bench, "step", lambda self, name: None)
    found = bench.measure(args, work)
    assert found["tiles"] == {"y narrow": ["wgmma", 40.0, 50.0], "dx wide": ["usual", 90.0, 90.0]}
    assert bench.conv.tiles_in_use == {"y narrow": "wgmma"}
    row = found["convolutions"][0]
    assert row["direction"] == "forward" and row["usual_us"] > 0 and "wgmma_us" not in row
    out = "\n".join(gpu_report.figures(found))
    assert "| y narrow | wgmma | 40 | 50 |" in out and "us, usual | us, square | us, deep | us, wgmma |" in out
    monkeypatch.setattr(selftest, "remembered", lambda: None)
    found = bench.measure(arguments(bench, tmp_path / "new", "--only", "nothing"), work)
    assert found["notes"] == ["tiles: the usual ones; python -m nanomr.backend --test chooses them"]


def test_what_fails_is_noted_and_costs_nothing_else(bench, fake, tmp_path, monkeypatch, capsys):
    """The control of the test above: its notes can be otherwise."""

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench.gpu_ours, "our_passes", broken)
    found = bench.measure(arguments(bench, tmp_path, "--no-torch", "--no-attacks"), little(bench))
    assert found["notes"] == ["passes failed: RuntimeError: no such kernel"]
    assert "passes" not in found and found["kernels_us"] and found["convolutions"] and len(found["steps_us"]) == 4
    assert "in broken" in capsys.readouterr().err, "the traceback helps whoever has a GPU for half an hour"


def test_a_second_call_adds_to_the_file(bench, fake, tmp_path, monkeypatch):
    """PyTorch's compiler has a call of its own: the figures of the first one stay, and the ratio is of both."""
    timed = {"ours": 3.0, "torch eager": 4.0, "torch compile": 2.0, "torch compile graph": 1.5}
    monkeypatch.setattr(bench.gpu_ours, "time_our_step", lambda clock, work, name: (timed.get(name, 9.0), 1.0))
    monkeypatch.setattr(bench.gpu_torch, "time_torch_step", lambda clock, work, name, _: (timed[name], 1.0))
    for only in ("our_", "ours", "torch eager"):
        found = bench.measure(arguments(bench, tmp_path, "--only", only), little(bench), "cpu")
    assert found["step_vs_torch_best"] == 0.75 and found["torch_best_of"] == ["torch eager"] and not found["notes"]
    found = bench.measure(arguments(bench, tmp_path, "--only", "torch compile"), little(bench), "cpu")
    assert found["step_vs_torch_best"] == 2 and found["steps_us"]["ours"] == 3 and len(found["torch_best_of"]) == 3
    assert json.loads((tmp_path / "stand-in-cpu.json").read_text()) == found


def test_the_report_says_what_is_there_and_what_is_not(bench, fake, tmp_path, capsys, monkeypatch):
    """Of nothing, of half a run, of a whole one: Markdown, each time."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    gpu_report = importlib.import_module("gpu_report")

    gpu_report.main([str(tmp_path), "stand-in-cpu"])
    assert "no figures" in capsys.readouterr().out
    bench.measure(arguments(bench, tmp_path, "--no-torch", "--only", "ours"), little(bench))
    (tmp_path / "stand-in-cpu-tests.txt").write_text("gpu_all.sh on a card\n== passed, 3 s: pytest\n")
    gpu_report.main([str(tmp_path), "stand-in-cpu"])
    out = capsys.readouterr().out
    assert "== passed, 3 s: pytest" in out and "| ours graph |" in out and "PyTorch: not measured" in out
    assert "convolutions: not measured" in out and "step_vs_torch_best" not in out
    bench.measure(arguments(bench, tmp_path, "--no-torch"), little(bench))
    gpu_report.main([str(tmp_path), "stand-in-cpu"])
    out = capsys.readouterr().out
    assert "not measured" in out and "| conv1 3->8 | forward |" in out and "| weight_gradient |" in out
    assert "images/s" in out and "convolutions: not measured" not in out


def test_the_file_is_written_after_each_section(bench, fake, tmp_path, monkeypatch):
    """A kill in the middle costs no more than the section under way."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.gpu_ours, "our_convolutions", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.measure(arguments(bench, tmp_path, "--no-torch"), little(bench))
    found = json.loads((tmp_path / "stand-in-cpu.json").read_text())
    assert tuple(found["steps_us"]) == OURS and found["epoch_s"] > 0 and "convolutions" not in found


def test_the_budget_cuts_off_and_leaves_out(bench, fake, tmp_path, monkeypatch):
    """What hangs is stopped, also where somebody catches every Exception; whole steps come first, compilers last."""

    def hangs(*_):
        while True:
            try:
                time.sleep(60)
            except Exception:
                raise AssertionError("the alarm was taken for a failure") from None

    monkeypatch.setattr(bench.Bench, "step", lambda self, name: self.result["steps_us"].update({name: 1.0}))
    monkeypatch.setattr(bench.gpu_ours, "our_convolutions", hangs)
    args = bench.parse(["--seconds", "0", "--budget", "0.6", "--out", str(tmp_path)])
    began = time.perf_counter()
    found = bench.measure(args, little(bench))
    assert time.perf_counter() - began < 5
    assert list(found["steps_us"]) == [*OURS, "torch eager", "torch graph"]
    assert found["notes"][0] == "our convolutions: stopped, --budget is used up"
    left_out = [note.split(":")[0] for note in found["notes"][1:]]
    assert left_out[:2] == ["cuDNN bfloat16", "cuDNN float32"] and left_out[-1] == "torch compile"
    assert all("left out" in note for note in found["notes"][1:-1]) and "--only" in found["notes"][-1]
    assert json.loads((tmp_path / "stand-in-cpu.json").read_text())["notes"] == found["notes"]


def test_every_launch_is_seen_wherever_its_module_took_it_from(bench, fake, monkeypatch):
    """... by name, in the order of the step, as often as the device has it; then all is as before."""
    elsewhere = types.ModuleType("nanomr.elsewhere")
    elsewhere.start = original = cuda.launch
    monkeypatch.setitem(sys.modules, "nanomr.elsewhere", elsewhere)
    step, seen = bench.gpu_ours.our_step(little(bench), "bfloat16"), []
    fake.counts.clear()
    with bench.gpu_ours.each_launch(lambda name, launch: (seen.append(name), launch())):
        step()
        assert elsewhere.start is not original
    assert len(seen) == fake.counts["launch"] > 50 and seen[-1] == "sgd_update"
    of_each_file = {"convolve (forward)", "convert", "activate", "losses"}  # .cu, and so module
    assert of_each_file <= set(seen)
    assert elsewhere.start is original is cuda.launch
    step()
    assert len(seen) == fake.counts["launch"] / 2


def test_floors_are_of_the_network(bench):
    """How many batch norms, and how many convolutions of each shape, is counted in the network itself."""
    model, shapes, norms = models.preact_resnet18().astype(np.float64), [], []
    forward = {kind: kind.forward for kind in (layers.Conv2d, layers.BatchNorm2d)}
    x = np.zeros((1, 32, 32, 3))
    try:
        layers.Conv2d.forward = lambda self, x, *a, **k: (
            shapes.append((x.shape[1:], self.params["weight"].shape)),
            forward[layers.Conv2d](self, x, *a, **k),
        )[1]
        layers.BatchNorm2d.forward = lambda self, x, *a, **k: (
            norms.append(x.shape[1:]),
            forward[layers.BatchNorm2d](self, x, *a, **k),
        )[1]
        model.forward(x)
    finally:
        for kind, function in forward.items():
            kind.forward = function
    assert (
        tuple(norms.count(s[1:]) for s in bench.gpu_plan.FULL.pictures) == bench.gpu_plan.BATCH_NORMS
        and len(norms) == 17
    )
    listed = [(c.x_shape[1:], c.w_shape) for c in bench.gpu_plan.convolutions() for _ in range(c.count)]
    assert sorted(map(str, listed)) == sorted(map(str, shapes))
    found = bench.gpu_plan.floors()
    assert found["convolutions"] == pytest.approx(1770, rel=0.01) and found["passes"] == pytest.approx(1141, rel=0.01)
    assert found["both"] == found["convolutions"] + found["passes"]


def test_a_wall_clock_finds_how_long_a_sleep_is(bench):
    """Median of several; a step among others, and a few kernels alone."""
    for time_of in (bench.gpu_plan.Clock(0.02).step, bench.gpu_plan.Clock(0.02).kernel):
        assert 2000 <= time_of(lambda: time.sleep(0.002)) < 20_000


@pytest.mark.parametrize("notes", [[], ["torch graph failed: Error: no"], ["passes: left out, only 0 s"]], ids=str)
def test_the_exit_code_says_that_something_failed(bench, fake, monkeypatch, capsys, notes):
    """... and the last line is the JSON all the same; a section without time is no failure."""
    monkeypatch.setattr(bench, "measure", lambda args: {"notes": notes})
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    if notes and "failed" in notes[0]:
        with pytest.raises(SystemExit, match=r"^1$"):
            bench.main()
    else:
        bench.main()
    assert json.loads(capsys.readouterr().out) == {"notes": notes}


STAND_IN = """#!/bin/sh
case "$*" in
  *--version*) echo Python 3.x ;;
  *"import cupy, torch"*) [ "${0##*/}" = python3 ] ; exit ;;
  *"import xdist"*) exit $NO_XDIST ;;
  *--tool*) echo ========= ERROR SUMMARY: $2 0 errors ;;
  *--query-gpu*) echo "NVIDIA H100 80GB HBM3" ;;
  *gpu.py*) echo figures ;;
  *backend*) echo "conv2d ok" ;;
  *gpu_report.py*) echo "the report" ;;
  *pytest*) echo test_this FAILED; echo "1 failed, 2 passed"; exit 1 ;;
esac
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
@pytest.mark.parametrize("xdist", [True, False])
def test_the_script_goes_on_after_a_failure_and_keeps_a_summary(tmp_path, xdist):
    """Each part's outcome and its last lines are in the summary, in $OUT as well; the exit code tells. Tests run side
    by side where pytest can do that; by the Python that has PyTorch. Parts by name add to what is there."""
    for name in ("python", "python3", "nvidia-smi", "compute-sanitizer"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": f"{tmp_path}/out", "RESULTS": f"{tmp_path}/found"}
    environment["NO_XDIST"] = str(int(not xdist))
    command = ["sh", ROOT / "bench" / "gpu_all.sh"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, result.stderr
    summary = (tmp_path / "found" / "nvidia-h100-80gb-hbm3-tests.txt").read_text()
    assert summary == (tmp_path / "out" / "nvidia-h100-80gb-hbm3-tests.txt").read_text()
    outcomes = [line.split(",")[0] for line in summary.splitlines() if line.startswith("==") and "=====" not in line]
    assert outcomes == ["== passed", "== passed", "== failed (1)", "== passed", "== passed", "== passed"]
    assert "python3 -u bench/gpu.py" in summary and "python -u" not in summary and "conv2d ok" in summary
    for folder in ("found", "out"):
        assert (tmp_path / folder / "nvidia-h100-80gb-hbm3.md").read_text() == "the report\n"
    assert ("-m pytest -q -W default -m gpu -n 8 tests\n" in summary) == xdist
    assert "1 failed, 2 passed" in summary and "memcheck 0 errors" in summary and "racecheck 0 errors" in summary
    assert "figures" in (tmp_path / "out" / "gpu_all.log").read_text() and "figures" in result.stdout
    environment["PARTS"] = "check"
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.endswith("the report\n")
    again = (tmp_path / "found" / "nvidia-h100-80gb-hbm3-tests.txt").read_text()
    assert again.startswith(summary) and again.count("\n== ") == summary.count("\n== ") + 1


# --- PyTorch's side, on a CPU -----------------------------------------------------------------------------------------


def torch_work(bench):
    return bench.gpu_plan.Work(2, 32, 8, {"name": "preact_resnet18", "width": 8})


@pytest.mark.torch
def test_pytorchs_convolutions_are_ours(bench):
    """The same list; and convolution_backward gives what it is timed for, and nothing else."""
    found = bench.gpu_torch.torch_convolutions(
        bench.gpu_plan.Clock(0), replace(torch_work(bench), size=8), "float32", "cpu"
    )
    ours = bench.gpu_plan.convolutions(replace(torch_work(bench), size=8))
    assert list(found) == [c.name for c in ours] and len(found) == 11
    assert all(tuple(row) == bench.gpu_plan.DIRECTIONS and min(row.values()) > 0 for row in found.values())


@pytest.mark.torch
def test_pytorchs_step_is_the_paper_s(bench, monkeypatch):
    """Its loss is torch_twin's, whose value the tests of that compare with ours; a step changes the weights; and
    torch.compile takes all of it as one graph: no handicap."""
    import torch
    import torch_twin

    monkeypatch.setattr(torch, "autocast", lambda *_: torch.inference_mode(False))  # float32: losses agree to 1e-5
    work = torch_work(bench)
    step = bench.gpu_torch.torch_step(work, device="cpu")
    net = torch_twin.twin(work.architecture)
    source = models.build(work.architecture, seed=0)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in source.state_dict().items()})
    x, rho, labels = map(torch.from_numpy, bench.gpu_plan.batch(work))
    x, rho = (a.permute(0, 3, 1, 2) for a in (x, rho))
    weights = bench.gpu_plan.GAMMA_I, bench.gpu_plan.GAMMA_H, bench.gpu_plan.ALPHA
    expected = torch_twin.manifold_loss(net, x, labels, rho, *weights)["loss"]
    first = float(step().detach())
    assert first == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(step().detach()) != first
    net = torch_twin.twin(work.architecture)
    assert torch._dynamo.explain(bench.gpu_torch.torch_loss(net))(x, labels, rho).graph_break_count == 0


@pytest.mark.torch
def test_both_sides_in_one_run(bench, fake, tmp_path, monkeypatch):
    """With PyTorch on a CPU: eager in bfloat16, cuDNN's place in the rows, the ratio. Graphs and compilers want a GPU
    and minutes: they are noted, if not for their own sake."""
    tiny, real = little(bench), torch_work(bench)
    timed = bench.gpu_torch.time_torch_step
    monkeypatch.setattr(bench.gpu_torch, "time_torch_step", lambda clock, work, *rest: timed(clock, real, *rest))
    sections = bench.Bench.sections
    wanted = {"ours", "torch eager", "torch graph", "our convolutions", "cuDNN bfloat16", "cuDNN float32"}
    monkeypatch.setattr(bench.Bench, "sections", lambda self: [s for s in sections(self) if s[0] in wanted])
    found = bench.measure(arguments(bench, tmp_path), tiny, torch_device="cpu")
    failed = [note for note in found["notes"] if not note.startswith("torch compile: a call of its own")]
    assert len(failed) == 1 and failed[0].startswith("torch graph failed")
    assert found["step_vs_torch_best"] == found["steps_us"]["ours"] / found["steps_us"]["torch eager"]
    assert all(row["cudnn_bfloat16_us"] > 0 and row["cudnn_float32_us"] > 0 for row in found["convolutions"])
