"""The results of a list of instances, re-checked; and every way in which they may be wrong."""

import json

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed (nanomr[onnx])")
from test_certificate import randomise

from nanomr import checkpoint, models
from nanomr.errors import UserError
from nanomr.programs import verify as verify_small
from nanomr.verify.chain import Chain
from nanomr.verify.exact import milp
from nanomr.verify.formats.onnx_io import export_onnx
from nanomr.verify.proofs.results import check_instances
from nanomr.verify.running import instances


def text(low, high, outputs, condition):
    lines = [f"(declare-const X_{i} Real)" for i in range(len(low))]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    lines += [
        f"(assert (>= X_{i} {a:.17f}))(assert (<= X_{i} {b:.17f}))"
        for i, (a, b) in enumerate(zip(low, high, strict=True))
    ]
    return "\n".join([*lines, condition])


class Results:
    """A run on one network: a hard property (parts of the box), an easy one (CROWN), one of two cases, a false one."""

    def __init__(self, folder):
        draw = np.random.default_rng(5)
        self.base, self.folder = folder, folder / "out"
        self.folder.mkdir()
        for part in ("proofs", "counterexamples"):
            (self.folder / part).mkdir()
        model = randomise(models.mlp((3, 8, 6, 3), seed=1, input_shape=(1, 1, 3)), draw, 1.5)
        export_onnx(model, folder / "net.onnx")
        chain, low = Chain(model), np.full(3, -1.0)
        high = low + 2
        side = np.linspace(-1, 1, 41)
        points = np.stack(np.meshgrid(side, side, side), -1).reshape(-1, 1, 1, 3)
        y = chain.forward(points)[0]
        least, most = y[:, 0].min(), y[:, 0].max()
        hard = (y[:, 1:] - y[:, :1]).max(1)  # max(Y_1, Y_2) - Y_0 - offset, somewhere <= 0?
        properties = {
            "hard": "".join(f"(assert (<= (+ Y_{t} {0.1 - hard.min():.6f}) Y_0))" for t in (1, 2)),
            "easy": f"(assert (>= Y_0 {most + 100:.6f}))",
            "either": f"(assert (or (>= Y_0 {most + 100:.6f}) (<= Y_0 {least - 0.1:.6f})))",
            "false": f"(assert (>= Y_0 {0.9 * most + 0.1 * least:.6f}))",
        }
        lines = []
        for name, condition in properties.items():
            (folder / f"{name}.vnnlib").write_text(text(low, high, 3, condition))
            lines.append(f"net.onnx,{name}.vnnlib,20\n")
        self.list = folder / "instances.csv"
        self.list.write_text("".join(lines))
        checkpoint.write_json(self.folder / "config.json", {"instances": str(self.list)})
        options = instances.Options(str(folder), str(self.folder))
        with milp.Solver() as solver:
            for line in instances.read_list(self.list):
                record, proof, witness = instances.run_line(line, options, solver)
                verify_small.keep_line(self.folder, self.folder / "results.jsonl", record, proof, witness)

    @property
    def records(self):
        return [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]

    def rewrite(self, number, **change):
        records = [r | change if r["id"] == number else r for r in self.records]
        checkpoint.write_jsonl(self.folder / "results.jsonl", records)

    def refused(self):
        report = check_instances(self.folder)
        assert not report["contradictions"]
        return {entry["id"]: entry["reason"] for entry in report["refused"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Results(tmp_path_factory.mktemp("list"))


@pytest.fixture
def run(built):
    """The results, put back as they were afterwards."""
    files = {file: file.read_bytes() for file in built.base.rglob("*") if file.is_file()}
    yield built
    for file in built.base.rglob("*"):
        if file.is_file() and file not in files:
            file.unlink()
    for file, content in files.items():
        file.write_bytes(content)


def test_a_run_is_confirmed(run):
    assert [r["verdict"] for r in run.records] == ["unsat", "unsat", "unsat", "sat"]
    assert run.records[0]["cases"][0]["how"] == "split"
    seen = []
    report = check_instances(run.folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 4) for n in (1, 2, 3, 4)]
    assert report["refused"] == report["contradictions"] == []
    assert report["instances"] == 4 and report["verdicts"] == {"unsat": 3, "sat": 1}
    assert (report["confirmed"], report["solver_only"], report["counterexamples"]) == (3, 0, 1)
    assert report["compared"] == (1 if has_onnxruntime() else 0)


def has_onnxruntime():
    try:
        import onnxruntime
    except ImportError:
        return False
    return bool(onnxruntime)


def test_one_digit_changed_in_a_certificate(run, rng):
    """Every number of the imported network's proof, changed at random: refused, or the bound still holds."""
    file = run.folder / "proofs" / "1.safetensors"
    tensors, _ = checkpoint.load_tensors(file)
    outcomes = [0, 0]
    for _ in range(60):
        proof = {name: value.copy() for name, value in tensors.items()}
        name = rng.choice([n for n in proof if proof[n].size])
        numbers = proof[name].reshape(-1)
        at = rng.integers(numbers.size)
        numbers[at] = numbers[at] + rng.choice([-1, 1, 1000]) * (1 if numbers.dtype.kind == "i" else 0.1)
        checkpoint.save_tensors(file, proof, {})
        outcomes[1 in run.refused()] += 1
    assert min(outcomes) > 3


def test_what_is_not_proved_is_refused(run):
    hard, either = run.records[0]["cases"], run.records[2]["cases"]
    for number, cases, message in (
        (1, [], "has 1 cases"),
        (1, hard * 2, "has 1 cases"),
        (1, [{"how": "split"}], "neither a row"),
        (1, [{"how": "crown", "row": 7}], "neither a row"),
        (1, [{"how": "point", "row": 0}], "not one point"),
        (3, either[:1], "has 2 cases"),
        (3, [{"how": "crown"}, either[1]], "neither a row"),
    ):
        before = run.records[number - 1]["cases"]
        run.rewrite(number, cases=cases)
        assert message in run.refused()[number], cases
        run.rewrite(number, cases=before)
    (run.folder / "proofs" / "1.safetensors").unlink()
    assert "only proved" in run.refused()[1]


def test_a_solver_leaves_no_proof(run):
    run.rewrite(3, cases=[case | {"how": "milp"} for case in run.records[2]["cases"]])
    report = check_instances(run.folder)
    assert not report["refused"] and (report["confirmed"], report["solver_only"]) == (2, 1)


def test_verdicts_are_held_to_the_property(run):
    """A false property that is called unsat, a true one that is called sat, with what others have proved."""
    run.rewrite(4, verdict="unsat", cases=[{"how": "crown", "row": 0}])
    report = check_instances(run.folder)
    assert "only proved" in report["refused"][0]["reason"]
    assert report["contradictions"] == [{"id": 4, "reason": "unsat, but a counterexample was saved"}]
    run.rewrite(4, verdict="sat-float32")
    assert "shows sat, not sat-float32" in run.refused()[4]
    run.rewrite(4, verdict="sat")
    (run.folder / "counterexamples" / "4.txt").replace(run.folder / "counterexamples" / "2.txt")
    run.rewrite(2, verdict="sat", case=0)
    refused = run.refused()
    assert "does not violate" in refused[2] and "no counterexample" in refused[4]
    run.rewrite(2, case=1)
    assert "no case" in run.refused()[2]
    run.rewrite(2, verdict="perhaps")
    assert "unknown verdict" in run.refused()[2]


def test_two_verdicts_contradict(run):
    record = run.records[3]
    checkpoint.append_jsonl(run.folder / "results.jsonl", record | {"verdict": "unsat"})
    assert check_instances(run.folder)["contradictions"][0]["id"] == 4


def test_other_files_are_refused(run):
    file = run.base / "easy.vnnlib"
    file.write_text(file.read_text() + "\n")
    assert "not the file that was verified" in run.refused()[2]
    (run.base / "net.onnx").write_bytes(b"")
    assert len(run.refused()) == 4
    (run.base / "net.onnx").unlink()
    assert len(run.refused()) == 4
    (run.folder / "results.jsonl").unlink()
    with pytest.raises(UserError, match=r"no results\.jsonl"):
        check_instances(run.folder)


def test_an_import_that_is_another_network_is_refused(run):
    """One weight of what the importer understood is another: all its lines are refused, by onnxruntime's logits."""
    pytest.importorskip("onnxruntime")
    (file,) = (run.folder / "networks").iterdir()
    model = models.load(file)
    model.children["fc1"].params["weight"][0, 0] += 1e-3
    model.save(file)
    refused = run.refused()
    assert len(refused) == 4 and all("onnxruntime" in reason for reason in refused.values())
