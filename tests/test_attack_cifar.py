"""The program: its files, its exit codes, that a kill loses no finished chunk, and that --check trusts nothing."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import programs
import pytest
from programs import assert_one_error_line

from nanomr import backend, checkpoint, data, models, parallel, plots
from nanomr.attacks import pgd
from nanomr.attacks.autoattack import STAGES
from nanomr.programs import attack as attack_cifar

N = 60  # test images
FILES = {"config.json", "report.json", "per_image.jsonl", "examples.npz"}
# about half of the images fall to AutoAttack
FLAGS = "--data shapes10 --n 40 --chunk 10 --eps 1/255 --quick --device cpu --weights model.safetensors".split()
WASSERSTEIN = [*FLAGS[:6], *FLAGS[8:], "--attack", "wasserstein"]  # which has no use for --eps


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    programs.save_memoriser(path, N, hidden=64, rcond=0.01)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path, weights):
    programs.isolate(monkeypatch, tmp_path, train=10, test=N)
    shutil.copy(weights, "model.safetensors")


@pytest.fixture
def program(monkeypatch, capsys):
    return programs.caller(attack_cifar, monkeypatch, capsys)


def start(place, *arguments, **options):
    return programs.start("attack", place, *arguments, train=10, test=N, **options)


def result(folder):
    """report.json without what differs from run to run."""
    report = json.loads((Path(folder) / "report.json").read_text())
    report.pop("seconds")
    for row in report["after"]:
        row.pop("seconds")
    return report


def records(folder):
    return checkpoint.read_jsonl(Path(folder) / "per_image.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, weights):
    """(folder, stdout, stderr) of AutoAttack in a process of its own."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copy(weights, place)
    process = start(place, *FLAGS, "--attack", "autoattack", "--out", "run")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return place / "run", out, err


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_and_says_so(finished):
    folder, out, _ = finished
    pictures = {"examples.png"} if "examples.png" in out else set()
    assert {p.name for p in folder.iterdir()} == FILES | pictures
    assert all(name in out.split("\n\n")[-1] for name in FILES - {"config.json"})


def test_every_name_is_documented(finished):
    others = {"per_image.jsonl": {"radius", "alone"}, "report.json": {"left_out", "classes", "alone", "robust_at"}}
    found = set(json.loads((finished[0] / "report.json").read_text())), set().union(*map(set, records(finished[0])))
    for file, names in zip(("report.json", "per_image.jsonl"), found, strict=True):
        assert programs.documented("attack", file) == names | others[file]


def test_the_report_says_what_was_done(finished, weights):
    report = json.loads((finished[0] / "report.json").read_text())
    assert [row["attack"] for row in report["after"]] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert report["settings"][1] == {"name": "apgd-t", "steps": 10, "targets": 9} and report["quick"] is True
    assert (report["attack"], report["norm"], report["eps"]) == ("autoattack", "linf", 1 / 255)
    assert (report["seed"], report["images"], report["batch_size"]) == (0, 40, 250)
    assert report["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert report["weights"]["architecture"]["name"] == "mlp" and report["device"] == "cpu"
    assert report["data"] == {"name": "shapes10", "source": report["data"]["source"]} and report["data"]["source"]
    assert any("--quick" in line for line in report["warnings"])
    assert report["checks"]["images"] == 40 and "unbounded" in report["checks"]
    assert report["seconds"] == pytest.approx(sum(row["seconds"] for row in report["after"]), abs=0.01)
    assert 0.1 < report["robust"] < report["clean"] - 0.1  # else there is little to look at


def test_records_and_examples_bear_the_report_out(finished, weights):
    folder = finished[0]
    report, lines, model = result(folder), records(folder), models.load(weights)
    with np.load(folder / "examples.npz") as file:
        x, adversarial, labels, ids = (file[name] for name in ("x", "adversarial", "labels", "ids"))
    expected, truth = programs.images_of(N)
    assert np.array_equal(x, expected[:40]) and np.array_equal(labels, truth[:40]) and x.dtype == np.float32
    assert ids.tolist() == [r["id"] for r in lines] == list(range(40))
    wrong, fooled = (model.forward(a)[0].argmax(1) != labels for a in (x, adversarial))
    by = np.array([str(r["by"]) for r in lines])
    assert np.array_equal(wrong, by == "clean") and np.array_equal(fooled, by != "None")
    for row in report["after"]:
        assert row["broken"] == (by == row["attack"]).sum()
    assert report["robust"] == (~fooled).mean() and report["clean"] == (~wrong).mean()
    change = (adversarial.astype(float) - x).reshape(40, -1)
    assert np.allclose([r["linf"] for r in lines], abs(change).max(1), rtol=1e-9)
    assert np.allclose([r["l2"] for r in lines], np.sqrt((change**2).sum(1)), rtol=1e-9)
    assert abs(change).max() <= 1 / 255 + 1e-7 and not change[~fooled | wrong].any()


def test_the_accuracy_after_each_attack_is_printed(finished):
    folder, out, _ = finished
    assert max(map(len, out.splitlines())) <= 80, out
    for row in json.loads((folder / "report.json").read_text())["after"]:
        assert re.search(rf"{row['attack']} +{row['robust']:.2%}", out)
    assert "Table 2" in out and "57.53" in out and "not comparable" in out


def test_the_progress_bar_shows_what_is_left(program, monkeypatch):
    monkeypatch.setattr(attack_cifar.tqdm, "__init__", _always_on(attack_cifar.tqdm.__init__))
    code, _, err = program(*FLAGS, "--attack", "autoattack", "--out", "a")
    robust = json.loads(Path("a/report.json").read_text())["robust"]
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert code == 0 and "40/40" in last and f"robust so far {robust:.2%}" in last and "0 left" in last
    for words in ("apgd-ce", "square", "left"):
        assert words in err


def _always_on(init):
    def call(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "disable": False, "mininterval": 0})

    return call


def test_a_picture_is_drawn_where_matplotlib_is(finished):
    pytest.importorskip("matplotlib")
    assert (finished[0] / "examples.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_clean_change_adversarial(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    x = np.full((9, 4, 4, 3), 0.5)
    adversarial = x.copy()
    adversarial[:, 0, 0, 0] += 0.1
    adversarial[:, 1, 1, 1] -= 0.05
    adversarial[2] = x[2]
    monkeypatch.setattr(pyplot, "close", lambda figure=None: None)
    path = tmp_path / "examples.png"
    names = ["cat", "dog"]
    assert plots.examples(x, adversarial, np.zeros(9, int), np.ones(9, int), names, path, count=3) == path
    axes = pyplot.gcf().axes
    shown = [np.asarray(a.images[0].get_array()) for a in axes]
    titles = [a.get_title() for a in axes]
    monkeypatch.undo()
    pyplot.close("all")
    assert len(axes) == 9 and titles.count("cat") == 3 and titles.count("dog") == 3
    clean, change, grey, bad = shown[0], shown[3], shown[5], shown[6]
    assert np.array_equal(clean, x[0]) and np.array_equal(bad, adversarial[0]) and "x 5" in titles[3]
    assert change[0, 0, 0] == pytest.approx(1) and change[1, 1, 1] == pytest.approx(0.25)
    assert change[2, 2, 2] == pytest.approx(0.5) and np.all(grey == 0.5)
    assert plots.examples(x[:0], x[:0], [], [], names, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_all_runs_every_attack_in_a_folder_of_its_own(program):
    code, out, _ = program(*FLAGS, "--attack", "all", "--n", 12, "--radius", 0.02, "--out", "a")
    assert code == 0 and "Table 1" in out and "Table 2" in out
    for attack in ("pgd", "autoattack+", "wasserstein"):
        assert {p.name for p in Path("a", attack).iterdir()} >= FILES
        report = json.loads(Path("a", attack, "report.json").read_text())
        assert report["attack"] == attack and report["images"] == 12
        assert program("--check", f"a/{attack}/examples.npz", "--weights", "model.safetensors")[0] == 0
    names = [s["name"] for s in json.loads(Path("a/autoattack+/report.json").read_text())["settings"]]
    assert names == [s.name for s in STAGES["plus"]]
    whole = json.loads(Path("a/report.json").read_text())
    assert [r["attack"] for r in whole["reports"]] == ["pgd", "autoattack+", "wasserstein"]
    pgd = json.loads(Path("a/pgd/report.json").read_text())
    assert pgd["settings"] == [{"name": "pgd", "steps": 2, "restarts": 1, "step_size": 2 / 255}]
    wasserstein = json.loads(Path("a/wasserstein/report.json").read_text())
    assert wasserstein["eps"] == 0.02 and wasserstein["robust"] == wasserstein["robust_at"]["0.02"]
    radii = [r["radius"] for r in records("a/wasserstein")]
    assert all((r is None) == (line["by"] is None) for r, line in zip(radii, records("a/wasserstein"), strict=True))
    code, out, _ = program("--table", "a")
    assert code == 0 and "Table 1" in out and "Table 2" in out
    assert program(*FLAGS, "--attack", "all", "--n", 12, "--radius", 0.02, "--out", "a", "--resume")[0] == 0


def test_a_wasserstein_run_takes_radii_on_trust_but_no_prediction_and_check_takes_nothing(program, monkeypatch):
    given = []

    def fake(model, x, labels, *, seed, ids, steps, every, max_radius, batch_size, progress):
        given.append((seed, ids.tolist(), steps, every, max_radius, batch_size, x.shape[0]))
        found, fooled = pgd(model, x, labels, 0.1)
        assert fooled.all()
        radius = np.array([0.001, 0.004, 0.05, 0.2, np.inf, 0.01])
        found[5] = x[5]  # claims what it has not done
        progress(6, 1)
        return found, radius

    monkeypatch.setattr(attack_cifar, "wasserstein", fake)
    model, (x, labels) = models.load("model.safetensors"), programs.images_of(N)
    assert np.array_equal(model.forward(x[:6])[0].argmax(1), labels[:6])
    flags = [f for f in WASSERSTEIN if f != "--quick"]
    assert program(*flags, "--n", 6, "--out", "a", "--seed", 5)[0] == 0
    assert given == [(5, list(range(6)), 400, 10, 0.1, 250, 6)]
    report, lines = result("a"), records("a")
    assert [r["by"] for r in lines] == ["wasserstein"] * 3 + [None] * 3
    assert [r["radius"] for r in lines] == [0.001, 0.004, 0.05, None, None, None]
    assert report["clean"] == 1 and report["robust"] == 0.5 and report["after"][0]["refuted"] == 1
    assert report["robust_at"] == pytest.approx({"0.005": 4 / 6, "0.01": 4 / 6, "0.02": 4 / 6, "0.05": 0.5, "0.1": 0.5})
    assert any("did not confirm: 1" in line for line in report["warnings"])
    check = "--check", "a/examples.npz", "--weights", "model.safetensors"
    assert_one_error_line(program(*check), "3 images are not in the Wasserstein ball of their radius")


@pytest.mark.parametrize("attack", ["autoattack", "pgd"])
def test_l2(program, attack):
    flags = [*FLAGS, "--attack", attack, "--norm", "l2", "--eps", "0.1", "--n", 20, "--out", "a"]
    assert program(*flags)[0] == 0
    report = result("a")
    assert report["norm"] == "l2" and report["robust"] < report["clean"]
    broken = [r for r in records("a") if r["by"] not in (None, "clean")]
    assert broken and max(r["l2"] for r in broken) <= 0.1 * (1 + 1e-6)
    if attack == "pgd":
        assert report["settings"][0]["step_size"] == pytest.approx(2.5 * 0.1 / 2)
    assert program("--check", "a/examples.npz", "--weights", "model.safetensors")[0] == 0


def test_n_zero_is_all(program):
    assert program(*FLAGS, "--attack", "pgd", "--n", 0, "--out", "a")[0] == 0
    assert checkpoint.read_json(Path("a/config.json"))["n"] == N == len(records("a"))


@pytest.mark.parametrize(("hurry", "steps"), [([], 100), (["--quick"], 10)])
def test_the_final_checks_take_as_many_steps_as_the_attacks_and_pictures_show_what_was_broken(
    program, monkeypatch, hurry, steps
):
    asked, shown = [], []
    checks = attack_cifar.reporting.checks
    monkeypatch.setattr(
        attack_cifar.reporting, "checks", lambda *a, **k: (asked.append(k["steps"]), checks(*a, **{**k, "steps": 2}))[1]
    )
    monkeypatch.setattr(plots, "examples", lambda x, adversarial, labels, *_: shown.append((x, adversarial)))
    flags = [f for f in FLAGS if f != "--quick"] + hurry
    assert program(*flags, "--attack", "pgd", "--eps", "1/700", "--n", 44, "--out", "a")[0] == 0
    assert asked == [steps]
    by = [r["by"] for r in records("a")]
    x = programs.images_of(N)[0][:44][[b == "pgd" for b in by]]
    assert by.count("clean") == 1 and 1 < len(x) < 8 and np.array_equal(x, shown[0][0])
    assert (shown[0][1] != x).any((1, 2, 3)).all()


def test_individual_mode_gives_the_same_images_and_each_attacks_own_accuracy(program, finished):
    assert program(*FLAGS, "--attack", "autoattack", "--individual", "--out", "a")[0] == 0
    report, cascade = result("a"), result(finished[0])
    assert report["robust"] == cascade["robust"] <= min(report["alone"].values())
    assert list(report["alone"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for mine, line in zip(records("a"), records(finished[0]), strict=True):
        assert mine["by"] == line["by"]
        assert mine["alone"][:1] == ([] if line["by"] in (None, "clean") else [line["by"]])
    n = len(records("a"))
    for name, share in report["alone"].items():
        broken = sum(name in r["alone"] for r in records("a"))
        assert share == pytest.approx(report["clean"] - broken / n)


def test_neither_batch_size_nor_chunk_decides(program, finished):
    flags = [*FLAGS, "--attack", "autoattack", "--batch-size", 7, "--chunk", 17, "--out", "a"]
    assert program(*flags)[0] == 0
    moved = 0
    for mine, line in zip(records("a"), records(finished[0]), strict=True):
        assert (mine["id"], mine["label"], mine["by"]) == (line["id"], line["label"], line["by"])
        moved += mine["l2"] != pytest.approx(line["l2"], rel=1e-4)
    assert moved <= 2  # float32 rounding, which may depend on the number of rows, is all that may differ
    mine, other = result("a"), result(finished[0])
    for key in ("robust", "clean", "interval"):
        assert mine[key] == other[key]


def test_another_seed_is_another_attack(program, finished):
    assert program(*FLAGS, "--attack", "autoattack", "--seed", 1, "--out", "a")[0] == 0
    assert [r["l2"] for r in records("a")] != [r["l2"] for r in records(finished[0])]


# --- kill and resume --------------------------------------------------------------------------------------------------

SLOW = """
import time
real = program.cascade
def slow(*args, **options):
    time.sleep(0.4)
    return real(*args, **options)
program.cascade = slow
"""


def test_a_killed_run_resumes_with_what_it_had_finished(program, finished, weights, tmp_path):
    flags = [*FLAGS, "--attack", "autoattack", "--out", "run"]
    process = start(tmp_path, *flags, patches=SLOW)
    parts = tmp_path / "run" / "parts"
    deadline = time.monotonic() + 100
    while len(list(parts.glob("*.safetensors"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "report.json").exists()
    there = {p: p.stat().st_mtime_ns for p in parts.glob("*.safetensors")}
    assert 2 <= len(there) < 4
    with open("run/per_image.jsonl", "a") as file:
        file.write('{"id": 2')  # a half line
    assert_one_error_line(program(*flags), "run holds a run already", "--resume")
    seen = []
    original = attack_cifar.checkpoint.save_tensors
    attack_cifar.checkpoint.save_tensors = lambda path, *rest: (seen.append(path.name), original(path, *rest))
    try:
        assert program(*flags, "--resume")[0] == 0
    finally:
        attack_cifar.checkpoint.save_tensors = original
    assert len(seen) == 4 - len(there) and not {p.name for p in there} & set(seen)
    assert result("run") == result(finished[0])
    assert Path("run/per_image.jsonl").read_bytes() == (finished[0] / "per_image.jsonl").read_bytes()
    assert Path("run/examples.npz").read_bytes() == (finished[0] / "examples.npz").read_bytes()
    assert not Path("run/parts").exists()


def test_an_interrupt_says_how_to_go_on(program, finished, monkeypatch):
    flags = [*FLAGS, "--attack", "autoattack", "--out", "run"]
    real, calls = attack_cifar.cascade, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(attack_cifar, "cascade", interrupted)
    code, out, err = program(*flags)
    assert code == 130 and "--out run --resume" in out and "Traceback" not in err
    assert len(records("run")) == 20 and not Path("run/report.json").exists()
    assert_one_error_line(program("--table", "run"), "not finished")
    assert program(*flags, "--resume")[0] == 0
    assert len(calls) == 5 and result("run") == result(finished[0])


def by_ranks(monkeypatch, count, *arguments):
    """The exit codes of ``count`` ranks, which this process plays in turns; which of them saved which chunk."""
    ranks, chunks, save = {}, [], checkpoint.save_tensors

    def noted(path, *rest):
        chunks.append((ranks[threading.get_ident()].rank, Path(path).name[:6]))
        save(path, *rest)

    def work(one):
        ranks[threading.get_ident()] = one
        return attack_cifar.main()

    monkeypatch.setattr(parallel, "start", lambda *_: ranks[threading.get_ident()])
    monkeypatch.setattr(checkpoint, "save_tensors", noted)
    monkeypatch.setattr(sys, "argv", ["nanomr attack", *map(str, arguments), "--executor", "mpi"])
    codes = parallel.InTurns(count).run(work)
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    return codes, chunks


def assert_same_run(folder, other):
    assert result(folder) == result(other)
    for name in ("per_image.jsonl", "examples.npz"):
        assert (Path(folder) / name).read_bytes() == (Path(other) / name).read_bytes()
    assert not (Path(folder) / "parts").exists()


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_divide_the_chunks_and_come_to_the_same(finished, monkeypatch, count, capsys):
    codes, chunks = by_ranks(monkeypatch, count, *FLAGS, "--attack", "autoattack", "--out", "run")
    assert codes == [0] * count
    assert sorted(chunks, key=lambda c: c[1]) == [(i % count, f"{10 * i:06d}") for i in range(4)]
    assert_same_run("run", finished[0])
    assert capsys.readouterr().out.count("report.json") == 1  # rank 0's
    codes, chunks = by_ranks(monkeypatch, count, *FLAGS, "--attack", "autoattack", "--out", "run", "--resume")
    assert codes == [0] * count and chunks == []


def test_shards_leave_chunks_and_a_resumed_run_the_report(program, finished, monkeypatch):
    flags = [*FLAGS, "--attack", "autoattack", "--out", "run"]
    for shard, there in (("2/3", ["000020"]), ("0/3", ["000000", "000020", "000030"])):
        assert program(*flags, "--shard", shard)[0] == 0
        assert sorted(p.stem for p in Path("run/parts").glob("*.safetensors")) == there
    assert_one_error_line(program(*flags, "--seed", 1, "--shard", "1/3"), "begun with seed = 0, not 1")
    with programs.another_process_in("run/parts/shard-0-of-3"):
        assert_one_error_line(program(*flags, "--shard", "0/3"), "another process")
    calls, real = [], attack_cifar.cascade
    monkeypatch.setattr(attack_cifar, "cascade", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert program(*flags, "--resume")[0] == 0 and len(calls) == 1  # the chunk of the shard that nobody ran
    assert_same_run("run", finished[0])
    assert program(*flags, "--shard", "1/3")[0] == 0 and len(calls) == 1  # it is finished
    for bad in ("3/3", "1", "-1/3"):
        assert program(*flags, f"--shard={bad}")[0] == 2
    assert program(*FLAGS, "--shard", "0/3")[0] == 2  # --out names the folder


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed (nanomr[mpi])")
def test_mpi_ranks_come_to_the_same(finished, weights, tmp_path):
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpiexec is None:
        pytest.skip("no mpiexec (pip install mpich)")
    flags = [*FLAGS, "--attack", "autoattack", "--out", "run", "--executor", "mpi"]
    process = start(tmp_path, *flags, launcher=(mpiexec, "-n", "2"), runner="mpi4py")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "run", finished[0])


def test_a_finished_run_is_not_run_again(program, monkeypatch):
    flags = [*FLAGS, "--attack", "pgd", "--n", 10, "--out", "run"]
    assert program(*flags)[0] == 0
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    monkeypatch.setattr(attack_cifar, "cascade", None)
    code, out, _ = program(*flags, "--resume")
    assert code == 0 and "finished already" in out and "Table 1" in out
    assert {p.name: p.read_bytes() for p in Path("run").iterdir()} == before


@pytest.mark.parametrize(
    "change", "--eps 2/255,--seed 1,--n 9,--start 1,--steps 1,--norm l2,--attack autoattack,--chunk 3".split(",")
)  # fmt: skip
def test_a_run_is_resumed_with_its_own_settings_only(program, change):
    flags = [*FLAGS, "--attack", "pgd", "--n", 10, "--out", "run"]
    assert program(*flags)[0] == 0
    name = change.split()[0].strip("-")
    assert_one_error_line(program(*flags, *change.split(), "--resume"), "run was begun with", name)
    assert program(*flags, "--batch-size", 3, "--resume")[0] == 0  # decides nothing


@pytest.mark.parametrize(
    "attack", [[*FLAGS, "--attack", "autoattack", "--individual"], [*WASSERSTEIN, "--steps", "20"]], ids=lambda x: x[-2]
)
@pytest.mark.parametrize("killed", [False, True], ids=["finished", "killed"])
def test_resume_with_more_images_goes_on(program, monkeypatch, attack, killed):
    """The same as all of them at once, and nothing is attacked twice."""
    flags = [*attack, "--chunk", 4]
    assert program(*flags, "--n", 12, "--out", "whole")[0] == 0
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(attack_cifar.Run, "finish", programs.stop)
            assert program(*flags, "--n", 6, "--out", "grown")[0] == 130
    else:
        assert program(*flags, "--n", 6, "--out", "grown")[0] == 0
    parts, real = [], attack_cifar.Run._attack_chunk
    monkeypatch.setattr(
        attack_cifar.Run, "_attack_chunk", lambda self, part, *a: (parts.append(part), real(self, part, *a))[1]
    )
    code, _, err = program(*flags, "--n", 12, "--out", "grown", "--resume")
    assert code == 0, err
    assert [(part.start, part.stop) for part in parts] == [(6, 8), (8, 12)]
    assert [(r["id"], r["by"]) for r in records("grown")] == [(r["id"], r["by"]) for r in records("whole")]
    assert result("grown")["robust"] == result("whole")["robust"] and result("grown")["images"] == 12
    assert {p.name for p in Path("grown").iterdir()} == {p.name for p in Path("whole").iterdir()}
    assert program("--check", "grown/examples.npz", "--weights", "model.safetensors")[0] == 0
    assert "finished already" in program(*flags, "--n", 12, "--out", "grown", "--resume")[1]
    assert_one_error_line(program(*flags, "--n", 6, "--out", "grown", "--resume"), "n = 12")


def test_some_images_and_some_stages(program):
    flags = [*FLAGS[:2], *FLAGS[4:], "--attack", "autoattack", "--stages", "apgd-ce", "square", "--steps", 3]
    assert program(*flags, "--start", 5, "--n", 4, "--out", "a")[0] == 0
    assert program(*flags, "--ids", 8, 5, "--out", "b")[0] == 0
    assert [r["id"] for r in records("a")] == [5, 6, 7, 8] and [r["id"] for r in records("b")] == [8, 5]
    assert [r["by"] for r in records("b")] == [records("a")[i]["by"] for i in (3, 0)]
    report = result("b")
    assert [(s["name"], s.get("steps")) for s in report["settings"]] == [("apgd-ce", 3), ("square", None)]
    assert program("--check", "b/examples.npz", "--weights", "model.safetensors")[0] == 0
    assert_one_error_line(program(*flags, "--ids", 60, "--out", "c"), "0 to 59")
    assert_one_error_line(program(*flags, "--ids", 1, 1, "--out", "c"), "once")
    assert_one_error_line(program(*flags, "--start", 60, "--out", "c"), "0 to 59")
    assert_one_error_line(program(*FLAGS, "--attack", "pgd", "--stages", "fab", "--out", "c"), "pgd has no stage fab")
    for extra in (["--n", 3], ["--start", 3]):
        code, _, err = program(*flags, "--ids", 1, *extra)
        assert code == 2 and "--ids names the images" in err
    assert not Path("c").exists()


def test_a_folder_is_one_processs(program):
    Path("a").mkdir()
    with programs.another_process_in("a"):
        assert_one_error_line(program(*FLAGS, "--attack", "pgd", "--out", "a"), "another process")
    assert program(*FLAGS, "--attack", "pgd", "--n", 2, "--out", "a")[0] == 0


def test_another_network_does_not_go_on_with_a_run(program):
    flags = [*FLAGS, "--attack", "pgd", "--n", 10, "--out", "run"]
    assert program(*flags)[0] == 0
    models.mlp((3072, 64, 10), seed=3).save("model.safetensors")
    assert_one_error_line(program(*flags, "--resume"), "run was begun with weights")


def test_a_part_that_is_damaged_or_not_ours_is_named(program, monkeypatch):
    flags = [*FLAGS, "--attack", "pgd", "--n", 20, "--out", "run"]

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(attack_cifar.Run, "finish", interrupted)
        assert program(*flags)[0] == 130
    part = Path("run/parts/000010.safetensors")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert_one_error_line(program(*flags, "--resume"), "000010.safetensors")
    part.write_bytes(Path("model.safetensors").read_bytes())
    assert_one_error_line(program(*flags, "--resume"), "000010.safetensors", "not a part")
    part.write_bytes(whole)
    assert program(*flags, "--resume")[0] == 0


# --- --check ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of the finished run; saved.change(name=function) rewrites its examples.npz."""
    folder = tmp_path / "saved"
    shutil.copytree(finished[0], folder)

    def change(**functions):
        with np.load(finished[0] / "examples.npz") as file:
            arrays = {name: file[name].copy() for name in file.files}
        for name, function in functions.items():
            value = function(arrays[name])
            arrays[name] = arrays[name] if value is None else value
        np.savez(folder / "examples.npz", **arrays)

    change.broken = [r["id"] for r in records(folder) if r["by"] not in (None, "clean")]
    change.robust = [r["id"] for r in records(folder) if r["by"] is None]
    return change


CHECK = ["--check", "saved/examples.npz", "--weights", "model.safetensors"]


def test_check_agrees_with_an_honest_run_in_a_fresh_process(saved, tmp_path, finished):
    process = start(tmp_path, *CHECK, "--batch-size", 9)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and err == ""
    assert "40 images agree" in out and f"{result(finished[0])['robust']:.2%}" in out


def set_row(row, value):
    def change(array):
        array[row] = value(array[row])

    return change


def test_check_finds_each_way_to_tamper(saved, program):
    hit, kept = saved.broken[0], saved.robust[0]
    clean = programs.images_of(N)[0]
    for words, change in {
        "not broken": dict(adversarial=set_row(hit, lambda _: clean[hit])),
        "not broken:": dict(adversarial=set_row(hit, lambda a: np.clip(a + 0.1, 0, 1))),
        "1 images are not broken": dict(adversarial=set_row(hit, lambda a: a * np.nan)),
        "no attack broke are changed": dict(adversarial=set_row(kept, lambda a: a * np.float32(0.999))),
        "are not the data set's": dict(x=set_row(hit, lambda a: a[::-1])),
        "not the data set's": dict(labels=set_row(kept, lambda a: (a + 1) % 10)),
        "numbers differ": dict(ids=set_row(3, lambda a: 4)),
        "40 records, 40 images": dict(labels=lambda a: a[:-1]),
        "float64": dict(x=lambda a: a.astype(float)),
        "linf distance": dict(adversarial=set_row(hit, lambda a: clean[hit] + (a - clean[hit]) * np.float32(0.999))),
    }.items():
        saved(**change)
        assert_one_error_line(program(*CHECK), "does not bear out", words)
    saved()
    assert program(*CHECK)[0] == 0


@pytest.mark.parametrize(
    ("pattern", "replacement", "words"),
    [
        (r'"by": null', '"by": "square"', "are not broken"),
        (r'"by": "apgd-ce"', '"by": null', "that no attack broke are changed"),
        (r'"by": "apgd-ce"', '"by": "clean"', "classified otherwise before"),
        (r'"label": \d', '"label": 7', "other labels"),
        (r'"l2": 0\.\d', '"l2": 0.9', "l2 distance"),
        (r'"l2": 0\.\d+', '"l2": null', "l2 distance"),
    ],
)
def test_check_finds_tampered_records(saved, program, pattern, replacement, words):
    path = Path("saved/per_image.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if re.search(pattern, line) and replacement not in line)
    path.write_text("".join([*lines[:at], re.sub(pattern, replacement, lines[at]), *lines[at + 1 :]]))
    assert_one_error_line(program(*CHECK), "does not bear out", words)


@pytest.mark.parametrize("key", ["robust", "clean", "images"])
def test_check_finds_a_tampered_report(saved, program, key):
    path = Path("saved/report.json")
    report = json.loads(path.read_text())
    report[key] += 1 if key == "images" else 0.025
    path.write_text(json.dumps(report))
    assert_one_error_line(program(*CHECK), "does not bear out", "report")


def test_check_wants_the_same_network(saved, program):
    models.mlp((3072, 64, 10), seed=3).save("model.safetensors")
    assert_one_error_line(program(*CHECK), "another network")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut short", "pickle", "one array", "no ids"])
def test_check_of_a_file_that_is_none(saved, program, content):
    path = Path("saved/examples.npz")
    if content == "pickle":
        np.savez(path, x=np.array([{}], object), adversarial=[0], labels=[0], ids=[0])
    elif content == "one array":
        np.save("saved/a.npy", np.zeros(3))
        shutil.move("saved/a.npy", path)
    elif content == "no ids":
        np.savez(path, x=[0], adversarial=[0], labels=[0])
    else:
        path.write_bytes(content)
    assert_one_error_line(program(*CHECK), "examples.npz")


def test_check_without_the_rest_of_the_run(saved, program):
    Path("saved/per_image.jsonl").unlink()
    assert_one_error_line(program(*CHECK), "per_image.jsonl")
    Path("saved/report.json").unlink()
    assert_one_error_line(program(*CHECK), "report.json")
    assert_one_error_line(program("--check", "nowhere/examples.npz", "--weights", "model.safetensors"), "nowhere")


# --- flags, and what goes wrong ---------------------------------------------------------------------------------------


def test_table_puts_the_papers_row_beside_ours(program, finished):
    folder = finished[0]
    report = result(folder)
    for argument in (folder, folder / "report.json", folder.parent):
        code, out, _ = program("--table", argument)
        assert code == 0 and "Table 2" in out and "Table 1" not in out
        assert re.search(rf"this network \(mlp\) +- +{100 * report['robust']:.2f} +- +", out)
        assert re.search(r"paper: Manifold Regularization \(large\) +57\.53 +36\.90 +66\.02 +69\.95", out)


def test_table_of_what_is_no_report(program):
    Path("file.json").write_text("[1]")
    Path("empty").mkdir()
    for argument, words in (("nowhere", "nowhere"), ("file.json", "not a report"), ("empty", "no report.json")):
        assert_one_error_line(program("--table", argument), words)


def test_help_explains_every_flag(program):
    programs.assert_help_explains_every_flag(attack_cifar, program)


def test_default_radii_are_the_papers():
    for norm, eps in (("linf", 8 / 255), ("l2", 0.5)):
        args = attack_cifar.parser().parse_args(["--norm", norm])
        dataset = data.load("shapes10")
        assert attack_cifar.configure(args, "autoattack+", {}, dataset)["eps"] == eps
        assert attack_cifar.configure(args, "wasserstein", {}, dataset)["eps"] == 0.1
        assert attack_cifar.configure(args, "pgd", {}, dataset)["n"] == N


BAD_FLAGS = """--eps=-1/255|--eps nan|--eps 8/0|--norm l1|--attack fgsm|--n -1|--batch-size 0|--chunk 0|--seed -1
--seed x|--radius -1|--data mnist|--device tpu|--nonsense|stray"""


@pytest.mark.parametrize("flags", BAD_FLAGS.replace("\n", "|").split("|"))
def test_a_bad_flag_is_named_and_nothing_is_made(program, flags, tmp_path):
    programs.assert_refused(attack_cifar, program(*FLAGS, *flags.split()), flags)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_flags_that_belong_together(program):
    code, _, err = program("--data", "shapes10")
    assert code == 2 and "--weights" in err.splitlines()[-1]
    code, _, err = program(*FLAGS, "--resume")
    assert code == 2 and "--out" in err.splitlines()[-1]
    assert_one_error_line(program(*FLAGS, "--resume", "--out", "nowhere"), "nowhere", "no run")


def test_missing_files(program, tmp_path):
    assert_one_error_line(program(*FLAGS, "--weights", "nowhere.safetensors"), "nowhere.safetensors")
    Path("model.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    assert_one_error_line(program(*FLAGS, "--weights", "model.pt"), "model.pt")
    arguments = (*FLAGS, "--data", "cifar10", "--no-download")
    assert_one_error_line(program(*arguments), "cifar-10-batches-bin", "shapes10")
    assert_one_error_line(program(*arguments, "--data-dir", "elsewhere"), "elsewhere")
    assert not Path("runs").exists()


def test_the_data_set_is_by_default_the_one_of_the_training(program):
    flags = ["--attack", "pgd", "--n", 4, "--quick", "--no-download"]
    model = models.load("model.safetensors")
    for metadata, words in (({}, None), ({"data": "shapes10"}, None), ({"data": "cifar10"}, "cifar-10-batches-bin")):
        model.save("other.safetensors", **metadata)
        result = program("--weights", "other.safetensors", *flags, "--out", f"run{len(str(metadata))}")
        if words:
            assert_one_error_line(result, words)
        else:
            assert result[0] == 0 and "shapes10" in result[1]


def test_a_network_that_does_not_fit(program):
    models.mlp((48, 10), input_shape=(4, 4, 3)).save("other.safetensors")
    assert_one_error_line(program(*FLAGS, "--weights", "other.safetensors"), "(4, 4, 3)", "(32, 32, 3)")
    models.mlp((3072, 5)).save("other.safetensors")
    assert_one_error_line(program(*FLAGS, "--weights", "other.safetensors"), "5 classes", "10")
    model = models.mlp((3072, 10))
    model.weights[7] = np.nan
    model.save("other.safetensors")
    assert_one_error_line(program(*FLAGS, "--weights", "other.safetensors"), "finite")
    assert not Path("runs").exists()


@pytest.mark.parametrize("attack", ["pgd", "autoattack", "wasserstein"])
def test_a_network_whose_answers_are_not_finite_is_one_line(program, monkeypatch, attack):
    """With finite weights: for all images, or only for one that is not the first."""
    model = models.load("model.safetensors")
    model.weights *= 1e20
    model.save("other.safetensors")
    flags = WASSERSTEIN if attack == "wasserstein" else [*FLAGS, "--attack", attack]
    assert_one_error_line(program(*flags, "--weights", "other.safetensors", "--out", "a"), "NaN or infinite for 1 of 1")
    assert not Path("a").exists()

    forward, taken = models.Model.forward, programs.images_of(N)[0][7]

    def sometimes(self, x, **options):
        logits, cache = forward(self, x, **options)
        logits[(x == taken).all((1, 2, 3))] = np.nan
        return logits, cache

    monkeypatch.setattr(models.Model, "forward", sometimes)
    assert_one_error_line(program(*flags, "--out", "a"), "NaN or infinite for 1 of 10")


def test_few_classes_leave_stages_out_and_the_report_says_so(program):
    images, _ = programs.images_of(N)
    two = models.mlp((3072, 16, 2), seed=3)
    two.children["fc2"].params["bias"] -= two.forward(images)[0].mean(0)
    two.save("two.safetensors")
    labels = two.forward(images)[0].argmax(1)
    np.savez("two.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    flags = [*FLAGS, "--data", "two.npz", "--weights", "two.safetensors", "--out", "a", "--attack", "autoattack+"]
    code, out, err = program(*flags)
    assert code == 0, err
    report = result("a")
    assert [row["attack"] for row in report["after"]] == ["apgd-ce", "fab", "square", "fab-t"]
    assert report["left_out"] == ["apgd-dlr", "apgd-t"] and report["classes"] == 2
    assert "left out, since the network knows 2 classes: apgd-dlr, apgd-t" in out
    assert program("--check", "a/examples.npz", "--weights", "two.safetensors")[0] == 0
    assert program(*flags, "--resume")[0] == 0


def test_eps_without_255_is_asked_about(program):
    code, _, err = program(*FLAGS, "--eps", "8", "--out", "a")
    assert code == 2 and "argument --eps: " in err and "did you mean 8/255?" in err.splitlines()[-1]
    assert not Path("a").exists()
    flags = [*FLAGS, "--attack", "pgd", "--n", 2, "--eps", "0.75"]
    code, _, err = program(*flags, "--out", "a")
    assert code == 0 and "warning: a linf radius of 0.75: " in err and "did you mean 0.75/255?" in err
    code, _, err = program(*flags, "--norm", "l2", "--out", "b")
    assert code == 0 and "warning" not in err


@pytest.mark.parametrize(
    ("attack", "flag"),
    [("wasserstein", "--norm l2"), ("wasserstein", "--eps 1/255"), ("wasserstein", "--individual")]
    + [(attack, "--radius 0.02") for attack in ("pgd", "autoattack", "autoattack+")] + [("pgd", "--individual")],
)  # fmt: skip
def test_a_flag_that_the_attack_does_not_heed_is_refused(program, attack, flag):
    flags = [*WASSERSTEIN, "--attack", attack, *flag.split(), "--out", "a"]
    code, _, err = program(*flags)
    name = flag.split()[0]
    assert code == 2 and f"{name} is for" in err.splitlines()[-1] and f"--attack {attack}: leave it out" in err
    assert not Path("a").exists()


def test_what_reads_a_run_refuses_flags_of_one_that_attacks(program):
    assert program(*FLAGS, "--attack", "pgd", "--n", 4, "--out", "a")[0] == 0
    reads = [["--table", "a"], ["--check", "a/examples.npz", "--weights", "model.safetensors"]]
    for words, flag in [
        (words, flag) for words in reads for flag in ("--attack pgd", "--eps 1/255", "--out b", "--n 4")
    ]:
        code, out, err = program(*words, *flag.split())
        assert (code, out) == (2, "") and f"{flag.split()[0]} changes nothing with {words[0]}" in err.splitlines()[-1]
        assert program(*words)[0] == 0
    assert program(*reads[1], "--batch-size", 3, "--data", "shapes10", "--device", "cpu", "--kernels", "plain")[0] == 0


def test_no_gpu(program, monkeypatch):
    monkeypatch.setattr(backend, "find_cupy", lambda: None)
    assert_one_error_line(program(*FLAGS, "--device", "gpu"), "--device gpu", "--device cpu")


@pytest.mark.parametrize("out", ["file", "file/run", "/dev/null/run"])
def test_a_run_folder_that_cannot_be_made(program, out):
    Path("file").write_text("mine")
    assert_one_error_line(program(*FLAGS, "--attack", "pgd", "--out", out), out)
    assert Path("file").read_text() == "mine"


def test_a_run_folder_of_the_networks_name_by_default(program):
    Path("runs/mine").mkdir(parents=True)
    shutil.copy("model.safetensors", "runs/mine")
    flags = [*FLAGS[:-2], "--attack", "pgd", "--n", 4]
    assert program(*flags, "--weights", "runs/mine")[0] == 0
    assert Path("runs/mine-pgd-linf/report.json").exists()
    assert program(*flags, "--weights", "runs/mine/model.safetensors", "--norm", "l2")[0] == 0
    assert Path("runs/mine-pgd-l2/report.json").exists()
