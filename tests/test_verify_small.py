"""The program: its files, its exit codes, that a kill loses no finished image, and that --check trusts nothing."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import programs
import pytest
from programs import assert_one_error_line

from nanomr import checkpoint, models, plots
from nanomr.attacks import pgd
from nanomr.errors import UserError
from nanomr.programs import verify as verify_small
from nanomr.verify.running import pipeline, results

N = 40  # test images
FLAGS = "--data shapes10 --n 40 --eps 1/255 --jobs 1 --weights model.safetensors --out v".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    programs.save_memoriser(path, N, hidden=48, rcond=0.02)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path, weights):
    programs.isolate(monkeypatch, tmp_path, train=10, test=N)
    shutil.copy(weights, "model.safetensors")


@pytest.fixture
def program(monkeypatch, capsys):
    """The program, its workers too, in this process."""

    monkeypatch.setattr(verify_small, "make_executor", programs.here("model.safetensors"))
    return programs.caller(verify_small, monkeypatch, capsys)


def records(folder="v"):
    return results.read(Path(folder))[1]


def verdicts(folder="v"):
    return {i: record["verdict"] for i, record in records(folder).items()}


def test_a_run_decides_every_image_and_check_agrees(program):
    code, out, err = program(*FLAGS)
    assert code == 0, err
    found = records()
    assert list(found) == list(range(N))
    kinds = {record["verdict"] for record in found.values()}
    assert {"verified", "attacked"} <= kinds and not kinds & set(pipeline.UNFINISHED), kinds
    assert {"crown", "pgd"} <= {record["stage"] for record in found.values()}
    report = json.loads(Path("v/report.json").read_text())
    assert programs.documented("verify", "report.json") == set(report)
    names = set().union(*map(set, found.values()))
    assert programs.documented("verify", "results.jsonl") == names | {"solver", "error"}  # of harder images
    count = sum(record["verdict"] == "verified" for record in found.values())
    assert report["verified"] == count / N and report["images"] == N and report["warnings"] == []
    assert report["verified_float32"] <= report["verified"] <= report["upper"] <= report["pgd_strong"] <= report["pgd"]
    assert f"{count / N:.2%}" in out and "verified by crown" in out
    assert max(map(len, out.splitlines())) <= 80, out
    for i, record in found.items():
        assert (Path("v/counterexamples") / f"{i:05d}.npz").exists() == (record["verdict"] in ("attacked", "falsified"))

    code, out, err = program("--weights", "model.safetensors", "--check", "v")
    assert code == 0, err
    assert f"{count} proved again" in out
    assert json.loads(Path("v/check.json").read_text())["confirmed"] == count
    code, again, _ = program("--report", "v")
    assert code == 0 and f"{count / N:.2%}" in again
    if plots._pyplot():
        assert Path("v/unstable.png").exists()

    x, labels = programs.images_of(N)
    _, fooled = pgd(models.load("model.safetensors"), x, labels, 1 / 255, steps=30, restarts=3, seed=7)
    assert not any(fooled[i] and record["verdict"] == "verified" for i, record in found.items())


def test_a_folder_is_one_processs(program):
    assert program(*FLAGS, "--n", 2)[0] == 0
    with programs.another_process_in("v/results.jsonl"):
        assert_one_error_line(program(*FLAGS, "--resume"), "another process")
        assert program(*FLAGS, "--n", 2, "--shard", "0/2")[0] == 0  # has a log of its own
    assert program(*FLAGS, "--n", 3, "--resume")[0] == 0


def test_check_refuses_what_does_not_hold(program):
    program(*FLAGS)
    lines = Path("v/results.jsonl").read_text().splitlines()
    attacked = next(i for i, verdict in verdicts().items() if verdict == "attacked")
    check = ("--weights", "model.safetensors", "--check", "v")

    record = records()[attacked]
    proven = next(r for r in records().values() if r["verdict"] == "verified")
    claim = {**record, "verdict": "verified", "stage": "crown", "verified_float32": False}
    claim |= {key: proven[key] for key in ("bound", "how", "float32_error")}
    changed = [json.dumps(claim) if json.loads(line)["id"] == attacked else line for line in lines]
    Path("v/results.jsonl").write_text("\n".join(changed) + "\n")
    assert_one_error_line(program(*check), f"image {attacked}")
    Path("v/results.jsonl").write_text("\n".join(lines) + "\n")
    assert program(*check)[0] == 0

    example = Path(f"v/counterexamples/{attacked:05d}.npz")
    saved = np.load(example)["adversarial"]
    np.savez(example, adversarial=np.clip(saved + np.float32(1e-3), 0, 1))
    assert_one_error_line(program(*check), f"image {attacked}")
    np.savez(example, adversarial=saved)

    models.mlp((3072, 48, 10), seed=2).save("model.safetensors")
    assert_one_error_line(program(*check), "model.safetensors")


def test_the_same_flags_give_the_same_verdicts_and_shards_merge(program):
    program(*FLAGS)
    whole = records()
    for i in range(3):
        code, _, err = program(*FLAGS[:-1], "parts", "--shard", f"{i}/3", "--resume")
        assert code == 0, err
    assert len(list(Path("parts").glob("results-*-of-3.jsonl"))) == 3
    merged = records("parts")
    assert list(merged) == list(whole)
    for i, record in whole.items():
        assert merged[i]["verdict"] == record["verdict"] and merged[i]["stage"] == record["stage"]
        for t, bound in record.get("bound", {}).items():
            assert abs(merged[i]["bound"][t] - bound) < 1e-4
    assert program("--weights", "model.safetensors", "--check", "parts")[0] == 0


def test_finished_images_are_not_done_again(program, monkeypatch):
    program(*FLAGS)
    before = Path("v/results.jsonl").read_text()
    assert_one_error_line(program(*FLAGS), "--resume")
    monkeypatch.setattr(pipeline, "screen", lambda *_: pytest.fail("an image was decided twice"))
    code, _, err = program(*FLAGS, "--resume")
    assert code == 0, err
    assert Path("v/results.jsonl").read_text() == before
    assert_one_error_line(program(*FLAGS, "--resume", "--eps", "2/255"), "eps")
    assert_one_error_line(program(*FLAGS, "--resume", "--seed", "2"), "seed")
    models.mlp((3072, 48, 10), seed=2).save("model.safetensors")
    assert_one_error_line(program(*FLAGS, "--resume"), "weights")


def test_time_outs_are_told_and_tried_again(program, monkeypatch):
    blind(monkeypatch)
    code, out, err = program(*FLAGS, "--time-limit", "1e-9")
    assert code == 0, err
    late = [i for i, verdict in verdicts().items() if verdict == "timeout"]
    assert late and "undecided" in out and "--retry" in out


def blind(monkeypatch):
    """No attack finds anything, so that images are left for the exact solvers."""

    def nothing(model, chain, x, *_, **__):
        x = x[0] if isinstance(x, tuple) else x
        return x, np.zeros(len(x), bool)

    for name in ("paper_pgd", "targeted_pgd"):
        monkeypatch.setattr(pipeline, name, nothing)


def test_a_retry_decides_what_was_late(program, monkeypatch):
    with monkeypatch.context() as patch:
        blind(patch)
        program(*FLAGS, "--time-limit", "1e-9")
    late = {i for i, verdict in verdicts().items() if verdict == "timeout"}
    before = Path("v/results.jsonl").read_text().splitlines()
    code, _, err = program(*FLAGS, "--resume")
    assert code == 0 and set(before) == set(Path("v/results.jsonl").read_text().splitlines()), err
    code, _, err = program(*FLAGS, "--retry", "timeout")
    assert code == 0, err
    after = verdicts()
    assert late and not set(after.values()) & set(pipeline.UNFINISHED)
    assert len(Path("v/results.jsonl").read_text().splitlines()) == N + len(late)  # these again, and no others
    assert program("--weights", "model.safetensors", "--check", "v")[0] == 0


def test_an_error_of_one_image_is_told_and_the_others_go_on(program, monkeypatch):
    def fails(image, outcome):
        raise RuntimeError("out of cheese")

    blind(monkeypatch)
    monkeypatch.setattr(pipeline, "decide", fails)
    code, out, err = program(*FLAGS)
    assert code == 0, err
    errors = [record for record in records().values() if record["verdict"] == "error"]
    assert errors and all("out of cheese" in record["error"] for record in errors) and "error" in out
    assert len(records()) == N


def test_several_eps_make_a_curve_and_more_of_it_is_less(program):
    code, _, err = program(*FLAGS[:3], "16", *FLAGS[6:], "--eps", "1/1000", "1/255", "4/255")
    assert code == 0, err
    reports = [json.loads(f.read_text()) for f in sorted(Path("v").glob("eps-*/report.json"))]
    reports.sort(key=lambda r: r["eps"])
    assert len(reports) == 3
    for key in ("verified", "pgd_strong"):
        assert reports[0][key] >= reports[1][key] >= reports[2][key]
    assert reports[0]["verified"] > reports[2]["verified"]
    assert program("--report", "v")[0] == 0
    if plots._pyplot():
        assert Path("v/accuracy.png").exists()


def test_an_estimate_is_of_images_all_over_the_set_and_counts(program):
    code, out, err = program(*FLAGS, "--n", "0", "--estimate")
    assert code == 0, err
    assert f"all {N} images: about" in out and "minutes" in out
    shutil.rmtree("v")
    code, out, err = program(*FLAGS, "--n", N - 1, "--estimate")
    assert code == 0 and f"all {N - 1} images: about" in out and set(records()) <= set(range(N - 1)), err
    assert program(*FLAGS, "--resume")[0] == 0 and len(records()) == N


def test_instances_for_other_verifiers_come_back_to_ours(program, monkeypatch):
    pytest.importorskip("onnx", reason="onnx is not installed (pip install 'nanomr[onnx]')")
    flags = [*FLAGS[:6], *FLAGS[8:10]]  # without --jobs and --out
    code, out, err = program(*flags, "--export", "ex", "--n", "12", "--time-limit", "50")
    assert code == 0 and "12 VNN-LIB files" in out, err
    assert Path("ex/instances.csv").read_text().splitlines()[3] == "model.onnx,vnnlib/img_3.vnnlib,50"
    assert program(*FLAGS, "--n", "12")[0] == 0
    code, out, err = program("--instances", "ex/instances.csv", "--jobs", 1)
    assert code == 0, err
    words = {"verified": "unsat"}
    ours = [words.get(verdict, "sat") for _, verdict in sorted(verdicts().items())]
    assert [line.split(",")[2] for line in out.splitlines()] == ours and set(ours) == {"sat", "unsat"}
    with monkeypatch.context() as patch:
        patch.setattr(verify_small.instances, "run_line", programs.stop)
        code, out, err = program("--instances", "ex/instances.csv", "--jobs", 1, "--out", "list")
        assert code == 130 and "list: every finished line is kept" in out and "--resume" in out and not err
    assert program("--instances", "ex/instances.csv", "--jobs", 1, "--out", "list", "--resume")[0] == 0
    assert program("--check", "list")[0] == 0
    code, out, err = program("--check", "list", *flags[-2:])
    assert (code, out) == (2, "") and "--weights changes nothing with --check of a list" in err.splitlines()[-1]
    Path("ex/instances.csv").write_text("one,two\n")
    assert_one_error_line(program("--instances", "ex/instances.csv"), "instances.csv")
    assert_one_error_line(program("--instances", "nowhere.csv"), "nowhere.csv")
    for flags in ("--eps 8/255", "--n 5", "--estimate", "--weights model.safetensors", "--executor processes"):
        code, out, err = program("--instances", "ex/instances.csv", *flags.split())
        assert (code, out) == (2, "") and f"{flags.split()[0]} changes nothing with --instances" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("--report v", "--n 5,--weights model.safetensors,--out w,--estimate,--check v"),
        ("--check v --weights model.safetensors", "--n 5,--eps 1/255,--out w,--time-limit 3,--jobs 2"),
        ("--export e --weights model.safetensors", "--out w,--jobs 2,--estimate,--shard 0/2,--resume"),
    ],
)
def test_flags_that_change_nothing_are_refused(program, mode, flags):
    assert program(*FLAGS, "--n", "3")[0] == 0
    for flag in flags.split(","):
        code, out, err = program(*mode.split(), *flag.split())
        said = f"{flag.split()[0]} changes nothing with {mode.split()[0]}: leave it out"
        assert (code, out) == (2, "") and said in err.splitlines()[-1]
        assert not Path("w").exists() and not Path("e").exists()
    assert program(*mode.split())[0] == 0  # without them it is done


def test_an_estimate_is_of_all_images(program):
    code, _, err = program(*FLAGS, "--estimate", "--shard", "0/2")
    assert code == 2 and "leave --shard out" in err.splitlines()[-1]


BAD = [
    (("--eps", "-1/255"), "eps"),
    (("--eps", "2"), "eps"),
    (("--time-limit", "0"), "time-limit"),
    (("--shard", "3/3"), "shard"),
    (("--shard", "x"), "shard"),
    (("--jobs", "0"), "jobs"),
    (("--n", "-1"), "n"),
]


@pytest.mark.parametrize(("flags", "word"), BAD, ids=lambda x: "-".join(x) if type(x) is tuple else x)
def test_a_flag_out_of_range_is_refused(program, flags, word):
    code, _, err = program(*FLAGS, *flags)
    assert code == 2 and word in err.splitlines()[-1] and "Traceback" not in err
    assert not Path("v").exists()


def test_bad_input_gets_one_line_and_exit_code_2(program, monkeypatch):
    assert program("--n", "1")[0] == 2  # no --weights
    assert_one_error_line(program(*FLAGS, "--weights", "nowhere"), "nowhere")
    Path("cut.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:500])
    assert_one_error_line(program(*FLAGS, "--weights", "cut.safetensors"), "cut.safetensors")
    models.preact_resnet18(width=2).save("resnet.safetensors")
    assert_one_error_line(program(*FLAGS, "--weights", "resnet.safetensors"), "layer1", "PreActBlock")
    model = models.load("model.safetensors")
    model.weights[7] = np.nan
    model.save("nan.safetensors")
    assert_one_error_line(program(*FLAGS, "--weights", "nan.safetensors"), "finite")
    assert_one_error_line(program("--report", "nowhere"), "nowhere")
    Path("empty").mkdir()
    assert_one_error_line(program("--weights", "model.safetensors", "--check", "empty"), "empty")
    assert not Path("v").exists()
    Path("v").write_text("a file")
    assert_one_error_line(program(*FLAGS), "v")


def test_contradicting_results_are_a_bug_that_is_shouted(program):
    program(*FLAGS)
    i, record = next((i, r) for i, r in records().items() if r["verdict"] == "verified")
    checkpoint.append_jsonl(Path("v/results-0-of-2.jsonl"), {**record, "verdict": "attacked", "stage": "pgd"})
    with pytest.raises(UserError, match=f"image {i} is both"):
        results.read(Path("v"))


def test_a_finished_verdict_beats_an_unfinished_one_wherever_it_stands(program):
    program(*FLAGS)
    i, record = next((i, r) for i, r in records().items() if r["verdict"] == "verified")
    checkpoint.append_jsonl(Path("v/results-0-of-2.jsonl"), {**record, "verdict": "timeout"})
    checkpoint.append_jsonl(Path("v/results.jsonl"), {**record, "verdict": "timeout"})
    assert verdicts()[i] == "verified"


def test_a_linear_network_and_an_unstable_one_are_pointed_out(program, monkeypatch):
    program(*FLAGS)
    config, found = results.read(Path("v"))
    for record in found.values():
        if "switching" in record:
            record["switching"], record["unstable"] = [0], [0]
    assert any("linear" in line for line in results.summarise(config, found)["warnings"])
    for record in found.values():
        if "switching" in record:
            record["switching"], record["unstable"] = [1], [results.MANY + 1]
    assert any("unstable" in line for line in results.summarise(config, found)["warnings"])


def test_the_papers_rows_stand_beside_cifar10_at_8_255_only(program):
    program(*FLAGS)
    config, found = results.read(Path("v"))
    assert "21.04" not in "\n".join(results.lines(results.summarise(config, found)))
    config |= {"data": {"name": "cifar10"}, "eps": 8 / 255}
    text = results.lines(results.summarise(config, found))
    assert "21.04" in "\n".join(text) and max(map(len, text[:8])) <= 80


# --- processes --------------------------------------------------------------------------------------------------------


def start(place, *arguments, **options):
    """With real workers."""
    return programs.start("verify", place, *arguments, train=10, test=N, **options)


def assert_gone(run):
    """Nothing of its process group is left."""
    with pytest.raises(ProcessLookupError):
        for _ in range(200):  # a process may take a moment to go
            os.killpg(run.pid, 0)
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_loses_no_finished_image_and_resumes(tmp_path, program):
    run = start(tmp_path, *FLAGS, patches="program.CHUNK = 2")
    log = tmp_path / "v" / "results.jsonl"
    give_up = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 4) and run.poll() is None:
        assert time.monotonic() < give_up, "no result within two minutes"
        time.sleep(0.01)
    run.kill()  # the parent alone: its workers must notice, and end
    run.communicate()
    assert_gone(run)
    kept = records()
    assert 4 <= len(kept) <= N
    with open(log, "a") as file:
        file.write('{"id": 39, "verd')  # and half a line
    code, _, err = program(*FLAGS, "--resume")
    assert code == 0, err
    after = records()
    assert len(after) == N and all(after[i] == record for i, record in kept.items())
    assert program("--weights", "model.safetensors", "--check", "v")[0] == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name != "posix", reason="Ctrl-C is sent as a signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_is_finished_and_leave_no_process(tmp_path, number):
    run = start(tmp_path, *FLAGS, "--n", "0", patches="program.CHUNK = 1")
    log = tmp_path / "v" / "results.jsonl"
    give_up = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2) and run.poll() is None:
        assert time.monotonic() < give_up, "no result within two minutes"
        time.sleep(0.01)
    os.killpg(run.pid, number)  # as a terminal does: to every process of the group
    out, err = run.communicate(timeout=60)
    if run.returncode == 0:
        pytest.skip("it had finished before the signal came")
    assert run.returncode == 130 and "Traceback" not in err and "--resume" in out, err
    assert len(records()) >= 2
    assert_gone(run)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed (nanomr[mpi])")
def test_mpi_ranks_come_to_the_same(tmp_path, program):
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpiexec is None:
        pytest.skip("no mpiexec (pip install mpich)")
    run = start(tmp_path, *FLAGS, "--executor", "mpi", launcher=(mpiexec, "-n", "2"))
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    ranks = records()
    shutil.rmtree("v")
    assert program(*FLAGS)[0] == 0
    assert verdicts() == {i: record["verdict"] for i, record in ranks.items()}


def test_a_network_whose_answers_are_not_finite_is_one_line(program, monkeypatch):
    """With finite weights: for all images, or only for one that is not the first. Neither misclassified, nor proved."""
    model = models.load("model.safetensors")
    model.weights *= 1e20
    model.save("other.safetensors")
    assert_one_error_line(program(*FLAGS, "--weights", "other.safetensors"), "NaN or infinite for 1 of 1")
    forward, taken = models.Model.forward, programs.images_of(N)[0][7]

    def sometimes(self, x, **options):
        logits, cache = forward(self, x, **options)
        logits[(x == taken).all((1, 2, 3))] = np.nan
        return logits, cache

    monkeypatch.setattr(models.Model, "forward", sometimes)
    assert_one_error_line(program(*FLAGS), "NaN or infinite for 1 of 16")


def test_eps_without_255_is_asked_about(program):
    code, _, err = program(*FLAGS, "--eps", "8/255", "8")
    assert code == 2 and "did you mean 8/255?" in err.splitlines()[-1] and not Path("v").exists()
    assert "warning: a linf radius of 0.6" in program(*FLAGS, "--eps", "0.6", "--n", 1)[2]
