"""Lists of instances: no wrong answer on any file. Brute force, every fault of 0.1.0, planted bugs."""

import gzip
import itertools
import json
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import highspy
import numpy as np
import programs
import pytest
from programs import assert_one_error_line
from test_milp import dense

from nanomr import models
from nanomr.errors import UserError
from nanomr.programs import verify as verify_small
from nanomr.verify.exact import milp
from nanomr.verify.formats.onnx_io import export_onnx
from nanomr.verify.formats.vnnlib import read_vnnlib
from nanomr.verify.proofs import witness
from nanomr.verify.proofs.network import CertificateError, read_network
from nanomr.verify.running import instances


def network(sizes, weights, biases):
    """An mlp (float32) with these weights (in, out)."""
    model = models.mlp(sizes, input_shape=(1, 1, sizes[0]))
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
        model.children[f"fc{i}"].params["weight"][...] = weight
        model.children[f"fc{i}"].params["bias"][...] = bias
    return model


def subject(model, place):
    model.save(place / "net.safetensors")
    return instances.Subject(model, read_network(place / "net.safetensors"))


def head(inputs, outputs):
    return "".join(f"(declare-const {k}_{i} Real)\n" for k, n in (("X", inputs), ("Y", outputs)) for i in range(n))


def box(low, high):
    return "".join(
        f"(assert (>= X_{i} {a}))(assert (<= X_{i} {b}))\n" for i, (a, b) in enumerate(zip(low, high, strict=True))
    )


@pytest.fixture(scope="module")
def solver():
    with milp.Solver() as solver:
        yield solver


@pytest.fixture
def decide(tmp_path, solver):
    """decide(model, text, seconds=20) -> the decision; its witness has been checked."""

    def call(model, text, seconds=20.0):
        about = subject(model, tmp_path)
        (tmp_path / "p.vnnlib").write_text(text)
        prop = read_vnnlib(tmp_path / "p.vnnlib", model.input_shape, about.chain.classes)
        end = time.process_time() + seconds
        found = instances.decide(about, prop, left=lambda: end - time.process_time(), limit=seconds, solver=solver)
        if found.witness:
            content, i = found.witness
            exact = prop.cases[i].exact
            check = (about.checked, exact.low, exact.high, exact.rows, exact.offsets)
            verdict = witness.check_witness(*check, content, predict=lambda x: model.forward(x)[0])
            assert verdict == found.verdict
        if found.verdict == "unsat":
            assert all(("row" in case) != ("split" in case) for case in found.cases)
        return found

    return call


# --- against brute force ----------------------------------------------------------------------------------------------


def smallest(chain, case):
    """The least of "the largest row + offset" in the box: of all ReLU patterns, a linear program each."""
    maps = [dense(stage) for stage in chain.stages]
    sizes, low, high = [len(b) for _, b in maps[:-1]], case.low.ravel(), case.high.ravel()
    best = np.inf
    for pattern in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        a, b, rows, limits, left = np.eye(low.size), np.zeros(low.size), [], [], np.array(pattern)
        for k, (weight, bias) in enumerate(maps):
            a, b = weight @ a, weight @ b + bias
            if k < len(sizes):
                on, left = left[: sizes[k]], left[sizes[k] :]
                sign = np.where(on, -1, 1)
                rows.append(np.c_[sign[:, None] * a, np.zeros(len(on))])
                limits.append(-sign * b)
                a, b = on[:, None] * a, on * b
        rows.append(np.c_[case.rows @ a, -np.ones(len(case.rows))])  # rows . y + offset <= t
        limits.append(-case.offsets - case.rows @ b)
        best = min(best, program(np.concatenate(rows), np.concatenate(limits), low, high))
    return best


def program(rows, limits, low, high):
    """min t over rows . (x, t) <= limits, x in the box; inf if there is none."""
    lp, columns = highspy.HighsLp(), len(low) + 1
    lp.num_col_, lp.num_row_ = columns, len(rows)
    lp.col_cost_ = np.append(np.zeros(len(low)), 1)
    lp.col_lower_, lp.col_upper_ = np.append(low, -1e6), np.append(high, 1e6)
    lp.row_lower_, lp.row_upper_ = np.full(len(rows), -np.inf), limits
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.arange(len(rows) + 1, dtype=np.int32) * columns
    lp.a_matrix_.index_ = np.tile(np.arange(columns, dtype=np.int32), len(rows))
    lp.a_matrix_.value_ = np.ascontiguousarray(rows).ravel()
    highs = highspy.Highs()
    for name, value in {"output_flag": False, "threads": 1, "primal_feasibility_tolerance": 1e-9}.items():
        highs.setOptionValue(name, value)
    highs.passModel(lp)
    highs.run()
    optimal = highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return highs.getInfo().objective_function_value if optimal else np.inf


def random_question(seed):
    """(model, text(shift) of a property with 1 to 3 cases of 1 to 3 rows and as many boxes)."""
    random = np.random.default_rng(seed)
    inputs, hidden = int(random.integers(1, 4)), [(3,), (2, 2), (4,), (), (3, 2)][seed % 5]
    model = models.mlp((inputs, *hidden, 3), seed, (1, 1, inputs))
    model.weights[...] = random.normal(0, 1, model.weights.shape)
    cases = []
    for _ in range(random.integers(1, 4)):
        low = random.random(inputs).round(3)
        high = low + (random.random(inputs) * (random.random(inputs) < 0.8)).round(3)
        cases.append((low, high, random.integers(-2, 3, (random.integers(1, 4), 3)), random.normal(0, 1, 3).round(2)))

    def text(shift):
        parts = []
        for low, high, rows, offsets in cases:
            bounds = [f"(>= X_{i} {a:.3f}) (<= X_{i} {b:.3f})" for i, (a, b) in enumerate(zip(low, high, strict=True))]
            sums = [f"(+ {' '.join(f'(* {c} Y_{j})' for j, c in enumerate([1, *row[1:]]))} {offset})"
                    for row, offset in zip(rows, offsets, strict=False)]  # fmt: skip
            parts.append(f"(and {' '.join(bounds)} {' '.join(f'(<= {s} {shift:.9f})' for s in sums)})")
        return head(inputs, 3) + f"(assert (or {' '.join(parts)}))"

    return model, text


def least_of(model, text, place):
    """The least of all cases, in the units of the file."""
    (place / "b.vnnlib").write_text(text)
    prop = read_vnnlib(place / "b.vnnlib", model.input_shape, 3)
    chain = instances.Chain(model)
    best = np.inf
    for case in prop.cases:
        scale = abs(case.rows[0, 0])  # the file's first coefficient is 1 in every row
        unscaled = case._replace(rows=case.rows / abs(case.rows[:, :1]), offsets=case.offsets / abs(case.rows[:, 0]))
        assert scale > 0
        best = min(best, smallest(chain, unscaled))
    return best


@pytest.mark.parametrize("part", range(4))
def test_properties_agree_with_brute_force(part, decide, tmp_path):
    verdicts = []
    for seed in range(10 * part, 10 * part + 10):
        model, text = random_question(seed)
        least = least_of(model, text(0.0), tmp_path)
        for distance in (-0.3, -1e-3, 1e-3, 0.3):
            found = decide(model, text(least + distance), 5.0)
            right = "sat" if distance > 0 else "unsat"
            assert found.verdict in (right, "unknown", "timeout"), (seed, distance, found)
            verdicts.append(found.verdict == right)
    assert np.mean(verdicts) > 0.9, verdicts


# --- every fault of 0.1.0 ---------------------------------------------------------------------------------------------

EYE = network((2, 2, 3), [np.eye(2), [[1, 0, 0], [0, 1, 0]]], [[0, 0], [0, 0, -1]])
APART = head(2, 3) + box(("0.6", "0.1"), ("0.8", "0.5"))
TWO = "(assert (or (and (>= Y_1 Y_0)) (and (>= Y_2 Y_0))))"


@pytest.fixture
def place(monkeypatch, tmp_path):
    """The working folder, with a.onnx and the properties c (unsat) and s (sat)."""
    pytest.importorskip("onnx", reason="onnx is not installed (pip install 'nanomr[onnx]')")
    monkeypatch.chdir(tmp_path)
    export_onnx(EYE, "a.onnx")
    Path("c.vnnlib").write_text(APART + TWO)
    Path("s.vnnlib").write_text(head(2, 3) + box(("0.3", "0.1"), ("0.8", "0.5")) + TWO)
    return tmp_path


@pytest.fixture
def run(place, monkeypatch, capsys):
    """run(list's text, *flags) -> (exit code, [fields of each line printed], stderr)."""
    call = programs.caller(verify_small, monkeypatch, capsys)

    def run(text, *flags):
        Path("list.csv").write_text(text)
        code, out, err = call("--instances", "list.csv", "--jobs", 1, *flags)
        return code, [line.split(",") for line in out.splitlines()], err

    return run


def verdicts(answer):
    return answer[0], [fields[2] for fields in answer[1]]


def test_another_number_of_outputs_is_refused(run):
    """Rivals that the network does not have, and one that the property does not know."""
    for outputs in (2, 4):
        Path("p.vnnlib").write_text((APART + "(assert (>= Y_1 Y_0))").replace(head(2, 3), head(2, outputs)))
        answer = run("a.onnx,p.vnnlib,20\n")
        assert verdicts(answer) == (2, ["error"])
        assert f"line 1: cannot read p.vnnlib: it declares {outputs} outputs, the network has 3" in answer[2]


def test_a_coordinate_that_is_no_float32_number(decide):
    """float32(0.1) is above 0.1: what it is fed there is outside of the box."""
    model = network((1, 1, 2), [[[1]], [[0, 1]]], [[-0.1 + 6e-9], [6.5e-9, 0]])
    fixed = head(1, 2) + box(["0.1"], ["0.1"])
    found = decide(model, fixed + "(assert (>= Y_1 Y_0))")
    assert (found.verdict, found.note) == ("unsat", "")  # float32 cannot be fed it
    found = decide(model, fixed + "(assert (>= Y_1 0))")
    assert found.verdict == "sat" and "(X_0 0.1)" in found.witness[0]
    third = head(1, 2) + "(assert (<= (* 3 X_0) 1)) (assert (>= (* 3 X_0) 1))" + "(assert (<= Y_0 1))"
    assert "(X_0 (/ 1 3))" in decide(model, third).witness[0]
    near = head(1, 2) + box(["0.1"], ["0.1000000001"])
    assert decide(model, near + "(assert (>= Y_1 Y_0))").verdict == "unsat"
    assert decide(model, near + "(assert (<= Y_1 Y_0))").verdict in ("sat", "sat-real")


def test_an_end_that_rounds_onto_a_float32_number(decide):
    """Its next float64 number outwards is 0.5, a float32 number that is not in the box."""
    model = network((1, 1, 2), [[[1]], [[1, 0]]], [[0], [0, 0]])
    text = head(1, 2) + box(["0.5000000000000000000001"], ["1"])
    assert decide(model, text + "(assert (<= Y_0 0.5))").verdict in ("unsat", "unknown")
    assert decide(model, text + "(assert (<= Y_0 0.50001))").verdict == "sat"


def test_a_fixed_coordinate_beside_a_wide_one(decide):
    model = network((2, 1, 2), [[[0.5], [1]], [[0, 1]]], [[-0.1 + 6e-9], [6.5e-9, 0]])
    found = decide(model, head(2, 2) + box(["-1", "0.1"], ["0", "0.1"]) + "(assert (>= Y_1 Y_0))")
    assert (found.verdict, found.stage) == ("unsat", "crown")  # by less than what its rounding may be


def test_absorption(decide):
    """0.5 + 2**24 is 2**24 in float32."""
    model = network((1, 2, 2), [[[1, 0]], [[1, 0], [-1, 0]]], [[2**24, 2**24], [0, 0.25]])
    found = decide(model, head(1, 2) + box(["0.5"], ["0.5"]) + "(assert (>= Y_1 Y_0))")
    assert (found.verdict, found.note) == ("unsat", "in real arithmetic; float32 differs")
    found = decide(model, head(1, 2) + box(["0.5"], ["0.5"]) + "(assert (<= Y_1 Y_0))")
    assert found.verdict == "sat-real"
    wide = head(1, 2) + box(["0.4"], ["0.6"]) + "(assert (>= Y_1 Y_0))"
    found = decide(model, wide)
    assert found.verdict in ("unsat", "sat-float32")
    assert found.verdict != "unsat" or "float32 differs" in found.note


def test_a_witness_beyond_where_float32_alone_is_violated(decide):
    """x + 2**24 - 2**24 is 0 in float32 for x <= 1, so y <= 0.6 seems to hold: truly only below 0.6."""
    model = network((1, 2, 2), [[[1, 0]], [[1, 0], [-1, 0]]], [[2**24, 2**24], [0, 0]])
    found = decide(model, head(1, 2) + box(["0.4"], ["1"]) + "(assert (<= Y_0 0.6))")
    assert found.verdict == "sat"
    found = decide(model, head(1, 2) + box(["0.7"], ["1"]) + "(assert (<= Y_0 0.6))")
    assert (found.verdict, found.note) == ("unsat", "in real arithmetic; float32 differs")


def test_a_network_that_the_checker_cannot_read(tmp_path, solver):
    """Its proofs are no certificates, and its witnesses are held to float64 with its error alone: a tie is open."""
    for text, verdict, note in (
        (APART + TWO, "unsat", "no certificate"),
        (head(2, 3) + box(("0.3", "0.1"), ("0.8", "0.5")) + TWO, "sat", ""),
        (head(2, 3) + box(("0.5", "0.5"), ("0.5", "0.5")) + TWO, "unknown", ""),
    ):
        (tmp_path / "p.vnnlib").write_text(text)
        prop = read_vnnlib(tmp_path / "p.vnnlib", (1, 1, 2), 3)
        found = instances.decide(instances.Subject(EYE, None), prop, left=lambda: 5.0, limit=5.0, solver=solver)
        assert (found.verdict, found.note) == (verdict, note)


def test_overflow(decide):
    """Real arithmetic has an answer where float32 has none."""
    model = network((1, 1, 2), [[[1e30]], [[1e30, 0]]], [[0], [0, 1]])
    found = decide(model, head(1, 2) + box(["1"], ["1"]) + "(assert (>= Y_0 Y_1))")
    assert found.verdict in ("sat-real", "unknown") and found.verdict != "sat"
    assert decide(model, head(1, 2) + box(["1"], ["2"]) + "(assert (<= Y_0 Y_1))").verdict in ("unsat", "unknown")


def test_ends_that_float32_lacks(decide):
    """Beyond its largest number, between two of its numbers, and below its smallest."""
    model = network((1, 1, 2), [[[1e-30]], [[1, 0]]], [[0], [0, 1e-3]])
    for low, high in (("-1e300", "1e300"), ("1e200", "1e250"), ("1e-300", "1e-299"), ("0.1", "0.10000000000000000001")):
        for verdict, term in (("sat", "(<= Y_1 1)"), ("unsat", "(>= Y_1 0.002)")):
            found = decide(model, head(1, 2) + box([low], [high]) + f"(assert {term})").verdict
            assert found == verdict or (found in (f"{verdict}-real", "unknown") and float(high) > 1)


def test_many_cases_are_bounded_in_parts(decide, monkeypatch):
    model, text = random_question(4)
    monkeypatch.setattr(instances, "ROWS", 2)
    assert decide(model, text(-100.0)).verdict == "unsat" and decide(model, text(100.0)).verdict == "sat"


def test_a_tie_counts_whatever_the_classes_are_called(decide):
    for order in itertools.permutations(range(3)):
        model = network((2, 2, 3), [np.eye(2), np.eye(3)[:2, order]], [[0, 0], np.array([0, 0, -1])[list(order)]])
        a, b, c = (order.index(k) for k in range(3))
        text = head(2, 3) + box(("0.5", "0.1"), ("0.8", "0.5"))
        found = decide(model, text + f"(assert (or (and (>= Y_{b} Y_{a})) (and (>= Y_{c} Y_{a}))))")
        assert found.verdict == "sat" and "(X_0 0.5)\n(X_1 0.5)" in found.witness[0]
        point = head(2, 3) + box(("0.5", "0.5"), ("0.5", "0.5"))
        assert decide(model, point + f"(assert (>= Y_{b} Y_{a}))").verdict == "sat"
        assert decide(model, point + f"(assert (<= Y_{b} Y_{a}))").verdict == "sat"
        assert decide(model, point + f"(assert (>= (- Y_{b} 1e-30) Y_{a}))").verdict == "unsat"


def test_lines_that_cannot_be_read_do_not_stop_the_others(run):
    Path("bad.onnx").write_bytes(b"no network")
    Path("bad.vnnlib").write_text("(assert")
    text = "a.onnx,c.vnnlib,abc\na.onnx,nowhere.vnnlib,20\n\nbad.onnx,c.vnnlib,20\na.onnx,bad.vnnlib,20\none,two\n"
    answer = run(text + "a.onnx,c.vnnlib,-1\na.onnx,c.vnnlib,nan\na.onnx, c.vnnlib ,20\na.onnx,s.vnnlib,20")
    assert verdicts(answer) == (2, ["error"] * 7 + ["unsat", "sat"])
    assert_one_error_line((answer[0], "", answer[2]), "list.csv, line 1: 'abc'")
    assert "and 6 more of 9 lines" in answer[2]
    assert_one_error_line((*run("\n")[:1], "", run("\n")[2]), "names no instance")


def test_packed_files_by_either_name_and_a_byte_order_mark(run):
    Path("g.vnnlib.gz").write_bytes(gzip.compress((APART + TWO).encode()))
    Path("b.vnnlib").write_bytes(b"\xef\xbb\xbf" + (APART + TWO).encode().replace(b"\n", b"\r\n"))
    Path("z.onnx.gz").write_bytes(gzip.compress(Path("a.onnx").read_bytes()))
    lines = ["a.onnx,g.vnnlib.gz", "a.onnx,g.vnnlib", "a.onnx,b.vnnlib", "z.onnx,c.vnnlib", "z.onnx.gz,c.vnnlib.gz"]
    assert verdicts(run("\ufeff" + ",20\r\n".join(lines) + ",20")) == (0, ["unsat"] * 5)
    Path("d.onnx.gz").write_bytes(gzip.compress(Path("a.onnx").read_bytes())[:-9])
    assert verdicts(run("d.onnx.gz,c.vnnlib,20\n")) == (2, ["error"])


def test_some_rivals_only_and_a_rival_that_is_named_twice(run):
    Path("one.vnnlib").write_text(APART + "(assert (>= Y_1 Y_0))")
    Path("twice.vnnlib").write_text(APART + TWO.replace("Y_2 Y_0))", "Y_2 Y_0)) (and (>= Y_1 Y_0))"))
    assert verdicts(run("a.onnx,one.vnnlib,20\na.onnx,twice.vnnlib,20\n")) == (0, ["unsat"] * 2)


def test_no_list_ends_in_a_traceback(place, solver):
    """Lines put together at random: every one ends in a verdict or in one line that says what is wrong."""
    random = np.random.default_rng(0)
    pieces = [
        "a.onnx",
        "c.vnnlib",
        "20",
        "",
        " ",
        "nowhere",
        "\x00",
        "-1",
        "1e999",
        "é",
        '"',
        ".",
        "list.csv",
        "/",
        "a" * 500,
    ]
    seen = set()
    for _ in range(60):
        text = "\n".join(",".join(random.choice(pieces, random.integers(1, 5))) for _ in range(8))
        Path("list.csv").write_text(text)
        for line in instances.read_list(Path("list.csv")):
            record, *_ = instances.run_line(line, instances.Options("."), solver)
            assert "\n" not in record["note"] and not record["note"].startswith(("Type", "Index", "Attribute", "Key"))
            seen.add((record["verdict"], record["note"][:12]))
    assert len(seen) > 5, seen


@pytest.mark.parametrize("order", [None, [0, 1, 2, 3], [3, 1, 0, 2]])
def test_inputs_in_another_order(order, tmp_path, solver):
    """(2 pixels, 2 channels): by default X_1 is the first channel of the second pixel; else as ``order`` says."""
    model = models.mlp((4, 2), input_shape=(1, 2, 2))
    model.children["fc1"].params["weight"][...] = np.array([[1, 0], [10, 0], [100, 0], [1000, 0]])
    model.children["fc1"].params["bias"][...] = 0
    about = subject(model, tmp_path)
    x = [0.5, 0.25, 0.75, 1.0]  # as the file counts them
    image = np.zeros(4)
    image[[0, 2, 1, 3] if order is None else order] = x
    y = image @ [1, 10, 100, 1000]
    for high, edge, verdict in ((x, y, "sat"), (x, np.nextafter(y, 0), "unsat"), ([*x[:3], 1.5], y, "sat")):
        (tmp_path / "p.vnnlib").write_text(head(4, 2) + box(x, high) + f"(assert (<= Y_0 {float(edge)!r}))")
        prop = read_vnnlib(tmp_path / "p.vnnlib", (1, 2, 2), 2, order)
        found = instances.decide(about, prop, left=lambda: 9.0, limit=9.0, solver=solver)
        assert found.verdict == verdict
        if found.witness:
            exact = prop.cases[0].exact
            assert "(X_0 0.5)\n(X_1 0.25)\n(X_2 0.75)\n(X_3 1.0)" in found.witness[0]
            check = about.checked, exact.low, exact.high, exact.rows, exact.offsets, found.witness[0]
            assert witness.check_witness(*check, order=order) == "sat"


# --- planted bugs -----------------------------------------------------------------------------------------------------


def strictly(monkeypatch):
    """> for >=."""
    right = instances.Subject.violates

    def wrong(self, case, *arguments):
        exact = case.exact._replace(offsets=tuple(o + Fraction(1, 10**40) for o in case.exact.offsets))
        return right(self, case._replace(exact=exact), *arguments)

    monkeypatch.setattr(instances.Subject, "violates", wrong)


def rounded_points(monkeypatch):
    """The point is what float32 is fed, wherever that is."""

    def wrong(self, image):
        return [Fraction(float(v)) for v in image.transpose(2, 0, 1).ravel()]

    monkeypatch.setattr(instances.Region, "point", wrong)


def one_row_of_several(monkeypatch):
    """A conjunction is its first row."""
    right = instances.decide

    def wrong(about, prop, **options):
        cut = [c._replace(rows=c.rows[:1], offsets=c.offsets[:1], exact=c.exact._replace(
            rows=c.exact.rows[:1], offsets=c.exact.offsets[:1])) for c in prop.cases]  # fmt: skip
        return right(about, prop._replace(cases=cut), **options)

    monkeypatch.setattr(instances, "decide", wrong)


def float32_alone(monkeypatch):
    monkeypatch.setattr(instances.Subject, "violates", lambda self, *_: True)


PLANTED = [
    (strictly, test_a_tie_counts_whatever_the_classes_are_called),
    (rounded_points, test_a_coordinate_that_is_no_float32_number),
    (float32_alone, test_absorption),
]


@pytest.mark.parametrize(("bug", "test"), PLANTED)
def test_planted_bugs_are_seen(bug, test, monkeypatch, decide):
    bug(monkeypatch)
    with pytest.raises((AssertionError, CertificateError)):
        test(decide)


def test_a_dropped_conjunct_is_seen(monkeypatch, decide, tmp_path):
    one_row_of_several(monkeypatch)
    with pytest.raises((AssertionError, CertificateError)):
        test_properties_agree_with_brute_force(0, decide, tmp_path)


def loose_bounds(monkeypatch):
    """A case is excluded by a margin that is not quite above 0."""
    right = instances.lower

    def wrong(*arguments):
        bound = right(*arguments)
        return bound._replace(value=bound.value + 0.01)

    monkeypatch.setattr(instances, "lower", wrong)


def trees_without_the_constant(monkeypatch):
    monkeypatch.setattr(instances.split, "suits", lambda *_: False)
    right = instances.settle
    monkeypatch.setattr(
        instances, "settle", lambda *a, threshold, **k: right(*a, threshold=min(threshold, 0.0) - 1, **k)
    )


def parts_without_the_constant(monkeypatch):
    right = instances.split.search
    monkeypatch.setattr(instances.split, "search", lambda *a, **k: right(*a[:4], a[4] + 0.01, **k))


@pytest.mark.parametrize("bug", [None, loose_bounds, trees_without_the_constant, parts_without_the_constant])
def test_planted_bugs_in_proofs_are_seen(bug, monkeypatch, decide, tmp_path):
    """With no attack before the proof, which would find most points first."""
    for name in ("_attack", "_search"):
        monkeypatch.setattr(instances.Run, name, lambda *_, **__: None)
    if bug is None:
        return test_properties_agree_with_brute_force(0, decide, tmp_path)
    bug(monkeypatch)
    with pytest.raises(AssertionError, match=r"unsat|True"):
        test_properties_agree_with_brute_force(0, decide, tmp_path)


# --- witnesses --------------------------------------------------------------------------------------------------------


def test_a_changed_witness_is_refused(tmp_path):
    checked = subject(EYE, tmp_path).checked
    low, high, rows, offsets = (
        (Fraction(1, 2), Fraction(0)),
        (Fraction(1), Fraction(1, 2)),
        ({0: 1, 1: -1},),
        (Fraction(0),),
    )

    def check(text, predict=None):
        return witness.check_witness(checked, low, high, rows, offsets, text, predict)

    text = witness.text("sat", [Fraction(1, 2)] * 2, [Fraction(1, 2)] * 2 + [Fraction(-1)])
    assert text == "sat\n((X_0 0.5)\n(X_1 0.5)\n(Y_0 0.5)\n(Y_1 0.5)\n(Y_2 -1.0))\n"
    assert check(text) == "sat" and check(text, lambda x: EYE.forward(x)[0]) == "sat"
    tiny = "0.5" + "0" * 60 + "1"
    for old, new in (
        ("X_0 0.5", f"X_0 {tiny}"),  # off the tie by 1e-62
        ("X_1 0.5", f"X_1 {tiny}"),  # out of the box
        ("Y_0 0.5", f"Y_0 {tiny}"),
        ("(X_1 0.5)\n", ""),
        ("(Y_2 -1.0)", ""),
        ("X_1", "X_0"),
        ("X_0 0.5", "X_0 nan"),
        ("sat", "unsat"),
        ("Y_0 0.5", "Y_0 (/ 1 0)"),
    ):
        with pytest.raises(CertificateError):
            check(text.replace(old, new))
    with pytest.raises(CertificateError, match="float32"):
        check(text, lambda x: EYE.forward(x)[0] + np.float32([0.1, 0, 0]))
    assert check(text.replace("sat", "sat-real"), lambda x: EYE.forward(x)[0] + np.float32([0.1, 0, 0])) == "sat-real"


@pytest.mark.parametrize("seed", range(5))
def test_exact_outputs_are_those_of_fractions(seed, tmp_path):
    """By another evaluation, layer by layer; and the float64 chain is next to them."""
    random = np.random.default_rng(seed)
    model = models.mlp((4, 5, 3), seed, (2, 2, 1), (0.5,), (0.25,))
    model.weights[...] = random.normal(0, 1, model.weights.shape) * 2.0 ** random.integers(-20, 5, model.weights.shape)
    checked = subject(model, tmp_path).checked
    x = [Fraction(int(n), 7) for n in random.integers(-20, 20, 4)]
    y = [(v - Fraction(1, 2)) * 4 for v in x]
    for name in ("fc1", "fc2"):
        weight, bias = (model.children[name].params[k].astype(float).tolist() for k in ("weight", "bias"))
        y = [sum(Fraction(weight[i][j]) * v for i, v in enumerate(y)) + Fraction(bias[j]) for j in range(len(bias))]
        y = [max(v, 0) for v in y] if name == "fc1" else y
    assert witness.outputs(checked, x) == y
    image = np.array([float(v) for v in x]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(
        instances.Chain(model).forward(image)[0][0], [float(v) for v in y], rtol=1e-12, atol=1e-12
    )
    row = {0: Fraction(1), 2: Fraction(-1)}
    for shift, answer in ((0, True), (Fraction(1, 10**50), False), (-Fraction(1, 10**50), True)):
        assert witness.violates(checked, x, [row], [y[2] - y[0] + shift]) is answer
        assert witness.excludes(checked, x, x, row, y[2] - y[0] + shift) is not answer
        assert not witness.excludes(checked, x, [*x[:3], x[3] + 1], row, y[2] - y[0] + shift)
    third = models.mlp((4, 5, 3), seed, (2, 2, 1), (0.5,), (0.3,))  # 1 / 0.3 is rounded
    third = subject(third, tmp_path).checked
    assert witness.outputs(third, x) is None
    assert [witness.violates(third, x, [row], [Fraction(s)]) for s in (-1000, 1000)] == [True, False]


# --- a list as a run --------------------------------------------------------------------------------------------------

LIST = "a.onnx,c.vnnlib,20\na.onnx,s.vnnlib,20\na.onnx,nowhere.vnnlib,20\n"


def log(name="v/results.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_what_a_run_keeps_and_how_it_goes_on(run, monkeypatch, capsys):
    assert verdicts(run(LIST, "--out", "v")) == (2, ["unsat", "sat", "error"])
    first, second, third = log()
    assert (first["id"], first["network"], first["property"], first["verdict"]) == (1, "a.onnx", "c.vnnlib", "unsat")
    assert [case["row"] for case in first["cases"]] == [0, 0] and first["seconds"] > 0 and first["wall"] > 0
    assert len(first["property_sha256"]) == 64 and "nowhere.vnnlib" in third["note"]
    assert Path(f"v/networks/{first['network_sha256']}.safetensors").exists()
    assert Path("v/counterexamples/2.txt").read_text().startswith("sat\n((X_0 ") and second["case"] == 0
    assert_one_error_line((*run(LIST, "--out", "v")[:1], "", run(LIST, "--out", "v")[2]), "--resume")
    assert verdicts(run(LIST, "--out", "v", "--resume")) == (2, ["error"])  # only that one again
    Path("nowhere.vnnlib").write_text(APART + TWO)
    assert verdicts(run(LIST, "--out", "v", "--resume")) == (0, ["unsat"])
    assert verdicts(run(LIST, "--out", "v", "--resume")) == (0, [])
    assert_one_error_line(
        (*run(LIST + LIST, "--out", "v", "--resume")[:1], "", run(LIST + LIST, "--out", "v", "--resume")[2]), "sha256"
    )
    call = programs.caller(verify_small, monkeypatch, capsys)
    code, out, _ = call("--report", "v")
    assert code == 0 and "1 sat" in out and "2 unsat" in out


def test_check_confirms_a_list_and_refuses_what_was_changed(run, monkeypatch, capsys):
    model, text = random_question(22)
    export_onnx(model, "r.onnx")
    least = least_of(model, text(0.0), Path())
    Path("r.vnnlib").write_text(text(least - 1e-3))
    Path("p.vnnlib").write_text(head(2, 3) + box(("0.5", "0.3"), ("0.5", "0.3")) + TWO)
    answer = run("a.onnx,c.vnnlib,20\na.onnx,s.vnnlib,20\nr.onnx,r.vnnlib,20\na.onnx,p.vnnlib,20\n", "--out", "v")
    assert verdicts(answer) == (0, ["unsat", "sat", "unsat", "unsat"])
    assert {case["how"] for record in log() for case in record["cases"] if case} >= {"crown", "split", "point"}
    call = programs.caller(verify_small, monkeypatch, capsys)

    def check():
        return call("--check", "v")

    code, out, err = check()
    assert code == 0 and "3 proved again" in out and "1 counterexamples checked" in out, err
    kept = {path: path.read_bytes() for path in Path("v").rglob("*") if path.is_file()}
    for name, old, new, line in (
        ("counterexamples/2.txt", b"(X_0 0.", b"(X_0 1.", 2),
        ("counterexamples/2.txt", b"(Y_2 ", b"(Y_3 ", 2),
        ("results.jsonl", b'"verdict": "sat"', b'"verdict": "unsat"', 2),
        ("results.jsonl", b'"how": "point"', b'"how": "guess"', None),
        ("results.jsonl", b'"row": 0, "bound"', b'"row": 1, "bound"', 1),
    ):
        file = Path("v") / name
        assert old in kept[file]
        file.write_bytes(kept[file].replace(old, new, 1))
        code, _, err = check()
        assert (code == 0) == (line is None) and (line is None or f"line {line}: " in err), (name, err)
        file.write_bytes(kept[file])
    (proof,) = Path("v/proofs").iterdir()
    proof.unlink()
    assert_one_error_line((*check()[:1], "", check()[2]), "line 3: ")
    proof.write_bytes(kept[proof])
    Path("c.vnnlib").write_text(head(2, 3) + box(("0.3", "0.1"), ("0.8", "0.5")) + TWO)
    assert "not the file that was verified" in check()[2]


def test_shards_and_jobs(run):
    for i in range(2):
        run(LIST.replace("nowhere", "c"), "--out", "v", "--shard", f"{i}/2", "--jobs", 2 if i == 0 else 1)
    found = {r["id"]: r["verdict"] for i in range(2) for r in log(f"v/results-{i}-of-2.jsonl")}
    assert found == {1: "unsat", 2: "sat", 3: "unsat"}


def hard(seed=0):
    """A question that takes minutes: a random network with many inputs, at the edge of what is true."""
    random = np.random.default_rng(seed)
    model = models.mlp((20, 60, 60, 2), seed, (1, 1, 20))
    model.weights *= 2
    text = head(20, 2) + box(["0"] * 20, ["1"] * 20)
    values = model.forward(random.random((5000, 1, 1, 20), np.float32))[0]
    least = (values[:, 0] - values[:, 1]).min()
    return model, text + f"(assert (<= (- Y_0 Y_1) {least - 3 * abs(least):.4f}))"


@pytest.mark.parametrize("wall", [False, True])
def test_the_time_limit_holds(wall, place, solver):
    model, text = hard()
    export_onnx(model, "h.onnx")
    Path("h.vnnlib").write_text(text)
    line = instances.Line(1, "h.onnx", "h.vnnlib", 100.0, "")
    record, *_ = instances.run_line(line, instances.Options(".", None, wall, 2.0), solver)
    assert record["verdict"] == "timeout", record
    assert record["wall" if wall else "seconds"] <= 2 + 2, record


def test_milps_say_that_they_leave_no_certificate(decide, monkeypatch):
    answer = SimpleNamespace(verdict="proved", stage="milp", bound=0.5, proof={}, notes=[], solver_seconds=0.0)
    monkeypatch.setattr(instances, "settle", lambda *_, **__: answer)
    found = decide(*hard())
    assert (found.verdict, found.stage, found.note) == ("unsat", "milp", "no certificate")


def test_a_bug_in_one_line_is_that_lines_error(place, solver, monkeypatch):
    monkeypatch.setattr(instances.Run, "_bounds", lambda self: 1 / 0)
    line = instances.Line(1, "a.onnx", "c.vnnlib", 20.0, "")
    record, *_ = instances.run_line(line, instances.Options("."), solver)
    assert record["verdict"] == "error" and "ZeroDivisionError" in record["note"]


def test_properties_of_another_network(tmp_path):
    (tmp_path / "x.vnnlib").write_text(APART + TWO)
    about = subject(network((2, 2), [np.eye(2)], [[0, 0]]), tmp_path)
    prop = read_vnnlib(tmp_path / "x.vnnlib", (1, 1, 2), 3)
    with pytest.raises(UserError, match="3 outputs, the network has 2"):
        instances.decide(about, prop, left=lambda: 1.0, limit=1.0, solver=None)
