"""bench/table1.py: rows are trained, attacked and verified once, whatever kills it; the table says what was found."""

import importlib.util
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import programs
import pytest

from nanomr import checkpoint, plots
from nanomr.errors import UserError
from nanomr.methods import METHODS
from nanomr.programs import attack as attacking
from nanomr.programs import verify as verifying
from nanomr.train import Trainer
from nanomr.verify.running import pipeline

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("table1", ROOT / "bench" / "table1.py")
table1 = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table1)

FLAGS = {"hold-out": 12, "batch-size": 20, "augment": False}
ROW = {"method": "standard", "epochs": 1, "eps": "1/255", "flags": FLAGS}
TRAIN, TEST = 52, 20  # 40 are trained on, in two steps
CLOCKS = ("train_seconds", "images_per_s")  # no two runs agree on these


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """tiny.npz, and shapes10 of as many images; workers are this process; nothing is drawn on the way."""
    programs.isolate(monkeypatch, tmp_path, train=TRAIN, test=TEST)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (TRAIN + TEST, 8, 8, 3), dtype=np.uint8)
    labels = images.reshape(len(images), -1, 3).sum(1).argmax(1)
    parts = {"train": slice(TRAIN), "test": slice(TRAIN, None)}
    named = {f"{part}_images": images[where] for part, where in parts.items()}
    named |= {f"{part}_labels": labels[where] for part, where in parts.items()}
    np.savez("tiny.npz", **named)
    monkeypatch.setattr(plots, "_pyplot", lambda: None)
    monkeypatch.setattr(
        verifying, "make_executor", lambda args, eps, weights: programs.here(weights)(args, eps, weights)
    )


@pytest.fixture
def run(monkeypatch, capsys):
    def call(rows, *flags, out="table1.jsonl", data="tiny.npz"):
        Path("rows.json").write_text(json.dumps(rows) if not isinstance(rows, str) else rows)
        common = ("--data", data, "--quick", "--out", out, "--time-limit", "1")
        return programs.caller_of(table1.main, "table1.py", monkeypatch, capsys)("rows.json", *common, *flags)

    return call


def lines(path="table1.jsonl"):
    return checkpoint.read_jsonl(path)


def without_clocks(line):
    proofs = {k: v for k, v in line["proofs"].items() if k != "seconds"}
    return {k: v for k, v in line.items() if k not in CLOCKS} | {"proofs": proofs}


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_row_is_trained_attacked_and_verified_and_said_in_a_line(run):
    code, out, _ = run([ROW], data="shapes10")
    assert code == 0 and "verified" in out.splitlines()[-1]
    (line,) = lines()
    assert line["row"] == table1.DEFAULTS | ROW and line["judge"] == "test" and line["images"] == 20
    assert line["pgd"]["images"] == line["autoattack"]["images"] == line["proofs"]["images"] == 20
    assert line["proofs"]["verified"] <= line["proofs"]["upper"] <= line["pgd"]["robust"] <= line["clean"]
    assert line["autoattack"]["robust"] >= line["proofs"]["verified"] and line["config"]["hold_out"] == 12
    (folder,) = Path("runs/table1").iterdir()
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "log.jsonl", "test-quick"}
    kept = verifying.results.read(folder / "test-quick" / "verify")[1]
    assert sorted(kept) == list(range(20))


def test_held_out_images_judge_instead_of_test_images(run, monkeypatch):
    """Test images are replaced by noise: nothing of the line changes."""
    assert run([ROW], "--held-out")[0] == 0
    (line,) = lines()
    assert line["judge"] == "held out" and line["images"] == 12 == line["pgd"]["images"] == line["proofs"]["images"]
    load = table1.data.load

    def blind(*args, **options):
        dataset = load(*args, **options)
        dataset.test_images[...] = np.random.default_rng(0).integers(0, 256, dataset.test_images.shape)
        return dataset

    monkeypatch.setattr(table1.data, "load", blind)
    assert run([ROW], "--held-out", "--work", "again", out="again.jsonl")[0] == 0
    assert without_clocks(lines("again.jsonl")[0]) == without_clocks(line)


def test_the_held_out_images_are_the_last_ones_and_are_not_trained_on(run, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "__init__", _noting(Trainer.__init__, seen))
    run([ROW], "--held-out")
    with np.load("tiny.npz") as own:
        images, labels = own["train_images"], own["train_labels"]
    np.testing.assert_array_equal(seen[0].images, images[:40])
    judge = table1.held_out(seen[0].dataset, 12)
    np.testing.assert_array_equal(judge.test_images, images[40:])
    np.testing.assert_array_equal(judge.test_labels, labels[40:])


def _noting(original, seen):
    def noted(self, *args, **options):
        seen.append(self)
        return original(self, *args, **options)

    return noted


def test_rows_that_the_file_has_are_left_out_and_others_are_added(run, monkeypatch):
    run([ROW])
    before = Path("table1.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", programs.stop)
        assert run([ROW])[0] == 0
    assert run([ROW, ROW | {"seed": 1}])[0] == 0
    assert Path("table1.jsonl").read_bytes().startswith(before)
    assert [line["row"]["seed"] for line in lines()] == [0, 1]


def test_parts_share_the_rows(run):
    rows = [ROW | {"seed": seed, "verify": 1} for seed in range(3)]
    small = ("--pgd-images", "1", "--auto-images", "1")
    assert run(rows, "--part", "1/2", *small)[0] == 0
    assert [line["row"]["seed"] for line in lines()] == [1]
    assert run(rows, "--part", "0/2", *small)[0] == 0
    assert [line["row"]["seed"] for line in lines()] == [1, 0, 2]
    assert all(line["pgd"]["images"] == line["proofs"]["images"] == 1 for line in lines())


# --- killed -----------------------------------------------------------------------------------------------------------


def _signal_in_training(monkeypatch):
    train_step = Trainer.train_step

    def killed(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", killed)


def _second(module, name):
    """Its second call is stopped by Ctrl-C."""

    def patch(monkeypatch):
        original, calls = getattr(module, name), []

        def killed(*args, **options):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args, **options)

        monkeypatch.setattr(module, name, killed)

    return patch


PLACES = {
    "in training": _signal_in_training,
    "between pgd and autoattack": _second(attacking, "cascade"),
    "in verification": _second(pipeline.Verifier, "screen"),
    "before its line": lambda monkeypatch: monkeypatch.setattr(checkpoint, "append_jsonl", _only_logs),
}


def _only_logs(path, record, append=checkpoint.append_jsonl):
    if Path(path).name == "table1.jsonl":
        raise KeyboardInterrupt
    append(path, record)


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_row_goes_on_and_nothing_is_done_twice(run, monkeypatch, place):
    run([ROW], "--work", "straight", out="straight.jsonl")
    steps, train_step = [], Trainer.train_step

    def counted(self):
        steps.append(self.step)
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", counted)
    with monkeypatch.context() as patch:
        PLACES[place](patch)
        code, out, _ = run([ROW])
        assert code == 130, out
        assert not Path("table1.jsonl").exists()
    assert run([ROW])[0] == 0
    assert steps == [0, 1]
    assert without_clocks(lines()[0]) == without_clocks(lines("straight.jsonl")[0])


def test_a_killed_row_may_be_trained_on_by_train_cifar(run, monkeypatch, capsys):
    run([ROW], "--work", "straight", out="straight.jsonl")
    with monkeypatch.context() as patch:
        _signal_in_training(patch)
        _, out, _ = run([ROW])
    (said,) = re.findall(r"--resume (\S+)", out)
    train = programs.caller_of(table1.training.main, "train_cifar.py", monkeypatch, capsys)
    assert train("--resume", said, "--test-images", 0)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", programs.stop)
        assert run([ROW])[0] == 0
    assert without_clocks(lines()[0]) == without_clocks(lines("straight.jsonl")[0])


def test_what_an_attack_broke_is_not_at_most_verified_and_a_contradiction_stops_it(run):
    run([ROW])
    line, (folder,) = lines()[0], Path("runs/table1").iterdir()
    place = folder / "test-quick"
    verdicts, attacks = place / "verify" / "results.jsonl", place / "autoattack" / "per_image.jsonl"
    records, broken = lines(verdicts), lines(attacks)
    open_ = next(r["id"] for r in records if r["verdict"] in ("verified", "attacked"))
    for record in records:
        if record["id"] == open_:
            record |= {"verdict": "timeout", "verified_float32": False}
    checkpoint.write_jsonl(verdicts, records)
    verified = sum(r["verdict"] == "verified" for r in records) / TEST
    for by, upper in ((None, verified + 1 / TEST), ("square", verified)):
        checkpoint.write_jsonl(attacks, [r | ({"by": by} if r["id"] == open_ else {}) for r in broken])
        checkpoint.write_jsonl(place / "pgd" / "per_image.jsonl", [{"id": open_, "by": None}])
        assert table1.at_most(place) == pytest.approx(upper)
    assert line["proofs"]["upper"] <= line["autoattack"]["robust"]
    checkpoint.write_jsonl(verdicts, [r | {"verdict": "verified", "verified_float32": True} for r in records])
    with pytest.raises(UserError, match="both verified and broken"):
        table1.at_most(place)


def test_half_a_line_is_written_anew(run):
    run([ROW])
    whole = Path("table1.jsonl").read_bytes()
    Path("table1.jsonl").write_bytes(whole[:-40])
    assert run([ROW])[0] == 0
    assert without_clocks(lines()[0]) == without_clocks(json.loads(whole))


def test_a_run_that_collapses_is_a_line_and_others_follow(run, monkeypatch):
    original = Trainer.run

    def collapsing(self):
        if self.config.seed == 1:
            raise UserError(f"collapsed at epoch 2: accuracy 10%; {self.folder} holds it")
        return original(self)

    monkeypatch.setattr(Trainer, "run", collapsing)
    code, out, _ = run([ROW | {"seed": 1}, ROW])
    assert code == 0 and "collapsed" in out
    assert lines()[0]["stopped"] == "collapsed at epoch 2: accuracy 10%" and "clean" in lines()[1]
    monkeypatch.setattr(Trainer, "run", lambda self: (_ for _ in ()).throw(UserError("cannot write x: disk full")))
    code, _, err = run([ROW | {"seed": 2}])
    assert code == 2 and "disk full" in err and len(lines()) == 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("{}", ["list of rows"]),
        ("[1]", ["list of rows"]),
        ("nonsense", ["JSON"]),
        ([ROW, {"epochs": 3}], ["row 2", "no method", "constants"]),
        ([{"method": "standard", "epoch": 3}], ["row 1", "'epoch'", "epochs"]),
        ([ROW, {"method": "nonsense"}], ["row 2", "nonsense", "standard"]),
        ([{"method": "standard", "eps": "8"}], ["row 1", "8/255"]),
        ([{"method": "standard", "flags": {"lrate": 1}}], ["row 1", "--lrate"]),
        ([ROW, {"method": "pgd", "flags": {"gamma-h": 3}}], ["row 2", "--gamma-h", "leave it out"]),
        ([{"method": "standard", "constants": {"beta": 1}}], ["row 1", "beta"]),
        ([{"method": "standard", "name": "ours | theirs"}], ["row 1", "a name is one line"]),
    ],
)
def test_odd_rows_are_refused_before_anything_is_trained(run, rows, words, monkeypatch):
    monkeypatch.setattr(table1, "measure", programs.stop)
    programs.assert_one_error_line(run(rows), "rows.json", *words)


def test_held_out_needs_images_that_are(run):
    programs.assert_one_error_line(run([ROW | {"flags": FLAGS | {"hold-out": 0}}], "--held-out"), "row 1", "held out")


# --- the table and the picture ----------------------------------------------------------------------------------------


def made_up(method="ibp", seed=0, clean=0.4, verified=0.25, upper=None, **row):
    row = table1.DEFAULTS | {"method": method, "seed": seed} | row
    proofs = {"images": 100, "verified": verified, "upper": upper or verified, "seconds": {"total_cpu": 300.0}}
    attack = {"images": 100, "robust": clean - 0.1, "interval": [0, 1], "warnings": []}
    return {
        "row": row, "judge": "test", "quick": False, "data": "cifar10", "source": {"verified": False}, "images": 100,
        "clean": clean, "pgd": attack, "autoattack": attack, "proofs": proofs, "train_seconds": 60.0,
    }  # fmt: skip


def test_the_table_has_a_row_for_each_setting_and_the_seeds_range():
    found = [made_up(seed=0), made_up(seed=1, clean=0.42), made_up("pgd", verified=0.01, upper=0.3)]
    found += [made_up(epochs=400, constants={"kappa": 0.2}, verified=0.28)]
    hidden = [made_up("hidden") | {"judge": "held out"}, made_up("hidden") | {"quick": True}]
    rows = table1.table(found + hidden).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| ibp, kappa 0.2, 400 epochs",
        "| ibp, 100 epochs",
        "| pgd, 100 epochs",
    ]
    named = [line | {"row": line["row"] | {"name": "ours"}} for line in found]
    assert [row.split(" | ")[:2] for row in table1.table(named).splitlines()[2:]] == [["| ours", "4"]]
    assert "| 2 | 41.00 (40.00-42.00) |" in rows[1]
    assert "| 1.00 | 30.00 |" in rows[2]


def test_a_row_that_was_stopped_or_verified_in_part_says_so():
    stopped = made_up("ibp") | {"stopped": "collapsed at epoch 2"}
    del stopped["proofs"], stopped["clean"]
    part = made_up("pgd")
    part["proofs"]["images"] = 50
    rows = table1.table([stopped, part]).splitlines()[2:]
    assert "25.00 (first 50)" in rows[0] and "collapsed at epoch 2" in rows[1]
    assert {row.count("|") for row in table1.table([stopped, part]).splitlines()} == {10}


def test_trials_are_compared_by_proofs_where_all_images_had_one_and_by_pgd_elsewhere():
    held = {"judge": "held out"}
    proved = [made_up(constants={"kappa": k}, clean=c, verified=v) | held for k, c, v in ((0, 0.4, 0.3), (1, 0.5, 0.2))]
    attacked = [made_up("pgd", constants={"steps": s}, clean=c, verified=0.1) | held for s, c in ((3, 0.5), (9, 0.6))]
    attacked[0]["proofs"] = attacked[0]["proofs"] | {"images": 20, "verified": 0.5}
    alone = made_up("pgd", epochs=10) | held  # is compared with none of these
    stopped = {
        k: v for k, v in (made_up(constants={"kappa": 2}) | held | {"stopped": "it fell"}).items() if k != "proofs"
    }
    hidden = [made_up("hidden"), made_up("hidden") | held | {"quick": True}]
    mixed = [attacked[0], proved[0], *hidden, proved[1], attacked[1], stopped, alone]
    assert table1.trials(mixed).splitlines()[2:] == [
        "| pgd, steps 3, 100 epochs | 50.00 | 40.00 |  |",
        "| **pgd, steps 9, 100 epochs** | 60.00 | 50.00 |  |",
        "| **ibp, kappa 0, 100 epochs** | 40.00 | 30.00 | 30.00 |",
        "| ibp, kappa 1, 100 epochs | 50.00 | 40.00 | 20.00 |",
        "| ibp, kappa 2, 100 epochs | it fell | | |",
        "| **pgd, 10 epochs** | 40.00 | 30.00 | 25.00 |",
    ]


def test_the_page_is_what_the_results_say():
    """docs/table1.md has the table of bench/results/table1.jsonl, and says so where there is none."""
    results = checkpoint.read_jsonl(table1.RESULTS) if table1.RESULTS.exists() else []
    text = table1.PAGE.read_text(encoding="utf-8")
    of_trials = checkpoint.read_jsonl(table1.TRIALS) if table1.TRIALS.exists() else []
    assert table1.into_page(text, results, of_trials) == text
    assert ("Nothing has been run yet." in text) == (not table1.shown(results))
    for name, network, clean, verified in table1.PUBLISHED:
        assert f"| {name} | {network} | {clean} | {verified} |" in text


def test_the_page_states_the_constants_and_recipes_that_methods_have():
    lines_ = table1.PAGE.read_text(encoding="utf-8").splitlines()
    rows = {match[1]: line for line in lines_ if (match := re.match(r"\| `(\w[\w-]*)` \|", line))}
    assert {"fgsm", "pgd", "trades", "mmc", "msd", "wasserstein"} <= rows.keys()
    for name in rows.keys() & METHODS.keys():
        assert f"| `{METHODS[name].recipe}` |" in rows[name]
        for key, constant in METHODS[name].constants.items():
            assert f"`{key}` {constant.default:g}" in rows[name], name


def test_draw_writes_page_and_picture_and_changes_no_other_line(run, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    page = Path("page.md")
    page.write_text(table1.PAGE.read_text(encoding="utf-8"))
    call = programs.caller_of(table1.main, "table1.py", monkeypatch, capsys)
    flags = ("--draw", "--page", page, "--picture", "picture.png", "--out", "made_up.jsonl", "--trials", "trials.jsonl")
    assert call(*flags)[0] == 0
    assert "Nothing has been run yet." in page.read_text() and not Path("picture.png").exists()
    checkpoint.write_jsonl("made_up.jsonl", [made_up(), made_up("pgd", verified=0.0, upper=0.2)])
    checkpoint.write_jsonl("trials.jsonl", [made_up("sabr") | {"judge": "held out"}])
    assert call(*flags)[0] == 0
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    before, after = (p.read_text(encoding="utf-8").split("<!-- ") for p in (table1.PAGE, page))
    assert len(before) == len(after) == 5  # before, between and behind two tables
    assert before[::2] == after[::2]
    assert "| ibp, 100 epochs | 1 |" in after[1] and "| **sabr, 100 epochs** | 40.00 |" in after[3]
    page.write_text("no marks")
    programs.assert_one_error_line(call(*flags), "marks")


def test_it_says_what_it_needs(run, monkeypatch, capsys):
    code, _, err = programs.caller_of(table1.main, "table1.py", monkeypatch, capsys)()
    assert code == 2 and "--draw" in err
