"""VNN-LIB properties: what is read is what is written, to the last digit; everything else is refused, by name."""

import gzip
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr.errors import UserError
from nanomr.testing.strategies import fewer, seeds
from nanomr.verify.formats import vnnlib
from nanomr.verify.formats.vnnlib import read_vnnlib

HEAD = "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n(declare-const Y_2 Real)\n"
BOX = HEAD + "(assert (<= X_0 0.75))\n(assert (>= X_0 0.25))\n"
ROBUST = "(assert (>= Y_0 Y_1))"


@pytest.fixture
def read(tmp_path):
    """read(text or bytes, ...) -> the property."""

    def call(content, *arguments):
        path = tmp_path / "a.vnnlib"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_vnnlib(path, *arguments)

    return call


def rows(prop):
    """[(low, high, rows, offsets) of each case], as lists."""
    return [(c.low.ravel().tolist(), c.high.ravel().tolist(), c.rows.tolist(), c.offsets.tolist()) for c in prop.cases]


# --- forms ------------------------------------------------------------------------------------------------------------

R01, R21, R02 = [1, -1, 0], [0, -1, 1], [1, 0, -1]  # Y_1 >= Y_0, Y_1 >= Y_2, Y_2 >= Y_0
ONE = ([0.25], [0.75])
FORMS = {
    "(assert (or\n\t(and (>= Y_1 Y_0)) ; a rival\n\t(and (>= Y_2 Y_0))\n))": [([R01], [0]), ([R02], [0])],
    "(assert (or (<= Y_0 Y_1) (<= Y_0 Y_2)))": [([R01], [0]), ([R02], [0])],
    "( assert(or(and( <= Y_0 Y_1))(and(<= Y_0 Y_2)) ) )": [([R01], [0]), ([R02], [0])],
    "(assert (>= Y_1 Y_0))": [([R01], [0])],
    "(assert (or (and (>= Y_1 Y_0)) (and (>= Y_2 Y_0)) (and (>= Y_1 Y_0))))": [([R01], [0]), ([R02], [0])],
    "(assert (>= Y_1 Y_0)) (assert (>= Y_1 Y_2))": [([R01, R21], [0, 0])],
    "(assert (and (>= Y_1 Y_0) (>= Y_1 Y_2) (<= Y_0 Y_1)))": [([R01, R21], [0, 0])],
    "(assert (>= Y_1 Y_0)) (assert (or (>= Y_1 Y_2) (>= Y_2 Y_0)))": [([R01, R21], [0, 0]), ([R01, R02], [0, 0])],
    "(assert (and (or (>= Y_1 Y_0) (>= Y_2 Y_0)) (or (>= Y_1 Y_2) (and (>= Y_1 Y_0)))))": [
        ([R01, R21], [0, 0]), ([R01], [0]), ([R02, R21], [0, 0]), ([R02, R01], [0, 0])],
    "(assert (>= Y_0 3.5))": [([[-1, 0, 0]], [3.5])],
    "(assert (<= Y_0 -3))": [([[1, 0, 0]], [3])],
    "(assert (<= (+ Y_0 1.5) (- Y_1 Y_2 0.5)))": [([[1, -1, 1]], [2])],
    "(assert (<= (- Y_0) (* 0.5 (+ Y_1 (* 2 0.25)))))": [([[-1, -0.5, 0]], [-0.25])],
    "(assert (<= (* 4 Y_0) (* Y_1 -3)))": [([[1, 0.75, 0]], [0])],
    "(assert (<= (* 0.1 Y_0) 0.3))": [([[1, 0, 0]], [-3])],  # a multiple of it is exact
    "(assert (<= (* 0.1 Y_0) (* 0.3 Y_1)))": [([[0.5, -1.5, 0]], [0])],
    "(assert (<= (+ Y_0 Y_1) (+ Y_1 Y_2)))": [([R02], [0])],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_property(form, read):
    prop = read(f"; CIFAR-10, (not) an expression\n\n{BOX}{form}\n", (1, 1, 1), 3)
    assert rows(prop) == [(*ONE, *wanted) for wanted in FORMS[form]] and prop.outputs == 3


def test_several_boxes(read):
    """Disjunctions of bounds beside one of outputs, bounds and outputs mixed, an empty box, a box that comes twice."""
    left, right = "(<= X_0 0.5)", "(<= 0.5 X_0)"
    found = rows(read(BOX + f"(assert (or {left} (and {right})))" + "(assert (or (>= Y_1 Y_0) (>= Y_2 Y_0)))"))
    low, high = ([0.25], [0.5]), ([0.5], [0.75])
    assert found == [(*box, [row], [0]) for box in (low, high) for row in (R01, R02)]
    found = rows(read(BOX + f"(assert (or (and {left} (>= Y_1 Y_0)) (and (>= Y_2 Y_0) {right})))"))
    assert found == [(*low, [R01], [0]), (*high, [R02], [0])]
    found = rows(read(BOX + "(assert (or (and (>= X_0 1) (>= Y_1 Y_0)) (>= Y_2 Y_0)))"))
    assert found == [(*ONE, [R02], [0])]
    found = rows(read(BOX + f"(assert (or (and {left} (>= Y_1 Y_0)) (and (>= Y_1 Y_0) (>= 0.5 X_0) (<= X_0 0.6))))"))
    assert found == [(*low, [R01], [0])]
    found = rows(
        read(HEAD + "(assert (or (and (<= X_0 1) (>= X_0 0) (>= Y_1 Y_0)) (and (<= X_0 3) (>= X_0 2) (<= Y_0 1))))")
    )
    assert found == [([0], [1], [R01], [0]), ([2], [3], [[1, 0, 0]], [-1])]


def test_the_tightest_of_several_bounds_and_bounds_that_are_sums(read):
    prop = read(BOX + "(assert (>= 0.625 X_0)) (assert (<= X_0 0.875)) (assert (<= 0.1 X_0))" + ROBUST)
    assert rows(prop)[0][:2] == ([0.25], [0.625])
    prop = read(BOX + "(assert (<= (* -2 X_0) (- 0.25 1))) (assert (<= (* 3 X_0) 2))" + ROBUST)
    (case,) = prop.cases
    assert case.low == 0.375 and case.exact.high == (Fraction(2, 3),)
    assert Fraction(np.nextafter(case.high, 0)[0]) < Fraction(2, 3) <= Fraction(case.high[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_packed_files_byte_order_marks_and_ends_of_lines(packed, mark, end, read):
    text = mark + (BOX + "; (assert (>= Y_1 Y_0))\n" + ROBUST + "; the end").encode().replace(b"\n", end)
    prop = read(gzip.compress(text) if packed else text)
    assert rows(prop) == [(*ONE, [[-1, 1, 0]], [0])]


def test_declarations_as_functions_and_commands_that_say_nothing(read):
    text = (BOX + ROBUST).replace("(declare-const X_0 Real)", "(set-logic QF_LRA) (declare-fun X_0 () Real)")
    assert rows(read(text + "(check-sat) (exit)")) == [(*ONE, [[-1, 1, 0]], [0])]


# --- to the last digit ------------------------------------------------------------------------------------------------

decimals = st.decimals(-10, 10, places=25).map(str) | st.from_regex(
    r"-?[0-9]{1,3}\.[0-9]{0,30}(e-?[0-9]{1,2})?", fullmatch=True
)


@given(decimals, decimals, st.decimals(-10, 10, places=25).map(str))
def test_a_case_contains_the_decimal_one(tmp_path_factory, a, b, c):
    """Its box is the smallest float64 one, its offset the largest below the decimal one."""
    path = tmp_path_factory.mktemp("read") / "box.vnnlib"
    a, b = sorted((a, b), key=Fraction)
    path.write_text(HEAD + f"(assert (>= X_0 {a})) (assert (<= X_0 {b})) (assert (<= (+ Y_0 {c}) Y_1))")
    (case,) = read_vnnlib(path).cases
    assert Fraction(case.low[0]) <= Fraction(a) < Fraction(np.nextafter(case.low[0], np.inf))
    assert Fraction(np.nextafter(case.high[0], -np.inf)) < Fraction(b) <= Fraction(case.high[0])
    assert Fraction(case.offsets[0]) <= Fraction(c) < Fraction(np.nextafter(case.offsets[0], np.inf))
    assert case.exact == ((Fraction(a),), (Fraction(b),), ({0: 1, 1: -1},), (Fraction(c),))


class Formula:
    """A random property, as text, and as a predicate on exact points by another way: recursion on the formula."""

    def __init__(self, seed, inputs=2, outputs=3):
        self.random, self.inputs, self.outputs = np.random.default_rng(seed), inputs, outputs
        self.terms = [("<=", f"X_{i}", "1.1") for i in range(inputs)] + [(">=", f"X_{i}", "-.9") for i in range(inputs)]
        self.terms += [self.formula(3) for _ in range(self.random.integers(1, 3))]
        self.terms.append(self.outputs_only())

    def number(self):
        return self.random.choice(["0", "1", "-0.5", ".25", "0.1", "2.", "1e-1", "-3e0"])

    def sum_of(self, names, depth):
        kind = self.random.integers(0, 7)
        if depth == 0 or kind < 3:
            return self.random.choice(names) if kind else self.number()
        if kind == 3:
            return ["*", self.number(), self.sum_of(names, depth - 1)]
        if kind == 4:
            return ["-", self.sum_of(names, depth - 1)]
        return ["+" if kind == 5 else "-", *(self.sum_of(names, depth - 1) for _ in range(self.random.integers(2, 4)))]

    def outputs_only(self):
        names = [f"Y_{j}" for j in range(self.outputs)]
        return [
            self.random.choice(["<=", ">="]),
            self.random.choice(names),
            ["+", self.sum_of(names, 2), self.number()],
        ]

    def atom(self):
        if self.random.random() < 0.3:
            pair = [f"X_{self.random.integers(0, self.inputs)}", self.number()]
            return [self.random.choice(["<=", ">="]), *(pair if self.random.random() < 0.5 else pair[::-1])]
        return self.outputs_only()

    def formula(self, depth):
        if depth == 0 or self.random.random() < 0.3:
            return self.atom()
        return [
            self.random.choice(["and", "or"]),
            *(self.formula(depth - 1) for _ in range(self.random.integers(1, 4))),
        ]

    def text(self):
        names = [f"X_{i}" for i in range(self.inputs)] + [f"Y_{j}" for j in range(self.outputs)]
        lines = [f"(declare-const {name} Real)" for name in names] + [f"(assert {shown(term)})" for term in self.terms]
        return "\n".join(lines)

    def holds(self, point):
        return all(value(term, point) for term in self.terms)

    def point(self):
        names = [f"X_{i}" for i in range(self.inputs)] + [f"Y_{j}" for j in range(self.outputs)]
        return {name: Fraction(int(self.random.integers(-12, 13)), 10) for name in names}


def shown(term):
    return f"({' '.join(map(shown, term))})" if isinstance(term, list | tuple) else str(term)


def value(term, point):
    if not isinstance(term, list | tuple):
        return point[term] if term in point else Fraction(str(term).removesuffix("."))
    op, *parts = term
    parts = [value(part, point) for part in parts]
    if op in ("and", "or"):
        return all(parts) if op == "and" else any(parts)
    if op in ("<=", ">="):
        return parts[0] <= parts[1] if op == "<=" else parts[0] >= parts[1]
    if op == "*":
        return parts[0] * parts[1]
    return sum(parts) if op == "+" else -parts[0] if len(parts) == 1 else parts[0] - sum(parts[1:])


def contains(case, x, y):
    """Is the exact point in the exact case, and in the float64 one? (Never in the first alone.)"""
    exact = case.exact
    inside = all(a <= v <= b for v, a, b in zip(x, exact.low, exact.high, strict=True)) and all(
        sum(c * y[j] for j, c in row.items()) + offset <= 0
        for row, offset in zip(exact.rows, exact.offsets, strict=True)
    )
    around = all(Fraction(a) <= v <= Fraction(b) for v, a, b in zip(x, case.low, case.high, strict=True)) and all(
        sum(Fraction(c) * v for c, v in zip(row, y, strict=True)) + Fraction(offset) <= 0
        for row, offset in zip(case.rows.tolist(), case.offsets.tolist(), strict=True)
    )
    return inside, around


def disagreement(seed, path, read=read_vnnlib):
    """A point at which the cases say otherwise than the formula, or None."""
    formula = Formula(seed)
    path.write_text(formula.text())
    try:
        cases = read(path).cases
    except UserError as error:
        assert any(text in str(error) for text in ("no variable", "exclude each other")), error
        cases = [] if "exclude" in str(error) else None
    for _ in range(25):
        point = formula.point()
        x, y = ([v for name, v in point.items() if name[0] == kind] for kind in "XY")
        if cases is not None:
            found = [contains(case, x, y) for case in cases]
            if any(inside for inside, _ in found) != formula.holds(point) or any(i and not a for i, a in found):
                return point
    return None


@fewer(4)
@given(seeds)
def test_the_cases_are_the_formula(tmp_path_factory, seed):
    assert disagreement(seed, tmp_path_factory.mktemp("formula") / "a.vnnlib") is None


def wrong_direction(monkeypatch):
    monkeypatch.setattr(vnnlib, "_rounded", lambda value, outward, right=vnnlib._rounded: right(value, -outward))


def dropped_conjunct(monkeypatch):
    right = vnnlib._each_with_each
    monkeypatch.setattr(vnnlib, "_each_with_each", lambda a, b: right(a, b) if len(a) * len(b) == 1 else b)


def turned_round(monkeypatch):
    right = vnnlib._difference
    monkeypatch.setattr(vnnlib, "_difference", lambda a, b: {k: -v for k, v in right(a, b).items()})


def one_box_for_all(monkeypatch):
    right = vnnlib._box
    monkeypatch.setattr(vnnlib, "_box", lambda box, atoms: right(box, [a for a in atoms if not box[0]]))


@pytest.mark.parametrize("bug", [wrong_direction, dropped_conjunct, turned_round, one_box_for_all])
def test_planted_bugs_are_seen(bug, monkeypatch, tmp_path):
    assert all(disagreement(seed, tmp_path / "a") is None for seed in range(40))
    bug(monkeypatch)
    assert any(disagreement(seed, tmp_path / "a") is not None for seed in range(40))


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED_TEXTS = {
    "found (> Y_0 Y_1), not an inequality": BOX + "(assert (> Y_0 Y_1))",
    "found (= Y_0 Y_1), not an inequality": BOX + "(assert (= Y_0 Y_1))",
    "found (not (>= Y_0 Y_1)), not an inequality": BOX + "(assert (not (>= Y_0 Y_1)))",
    "found (>= Y_0 Y_1 Y_2), not an inequality": BOX + "(assert (>= Y_0 Y_1 Y_2))",
    "found (or), not an inequality": BOX + "(assert (or))",
    "found (and), not an inequality": BOX + "(assert (and))",
    "found or, not an inequality": BOX + "(assert or)",
    "found (>= Y_1 Y_1), an inequality of no variable": BOX + "(assert (>= Y_1 Y_1))",
    "found (<= 0 1), an inequality of no variable": BOX + "(assert (<= 0 1))",
    "found (<= X_0 Y_0), an inequality of inputs and outputs": BOX + "(assert (<= X_0 Y_0))",
    "found (<= X_0 X_1), an inequality of several inputs": BOX + "(assert (<= X_0 X_1))",
    "found (* Y_0 Y_1), a product": BOX + "(assert (<= (* Y_0 Y_1) 1))",
    "found (/ Y_0 2), not a sum": BOX + "(assert (<= (/ Y_0 2) 1))",
    "found (+), not a sum": BOX + "(assert (<= (+) Y_0))",
    "found (-), not a sum": BOX + "(assert (<= (-) Y_0))",
    "it says nothing of the outputs": BOX,
    "a case says nothing of the outputs": BOX + "(assert (or (<= X_0 0.5) (>= Y_0 Y_1)))",
    "found Z_0, not a decimal number": BOX + "(assert (<= Y_0 Z_0))",
    "found 1e999, which no float64": BOX + "(assert (<= X_0 1e999))" + ROBUST,
    "whose end no float64": BOX + "(assert (<= (* 1e-300 X_0) 1e300))" + ROBUST,
    "found nan, not a decimal": BOX + "(assert (<= X_0 nan))" + ROBUST,
    "found 1e99999, not a decimal": BOX + "(assert (<= X_0 1e99999))" + ROBUST,
    "found 1_0, not a decimal": BOX + "(assert (<= X_0 1_0))" + ROBUST,
    "found 111": BOX + f"(assert (<= X_0 {'1' * 5000}))" + ROBUST,
    "is compared with is too large": BOX + "(assert (<= Y_0 1e40))",
    "have no multiple in float64": BOX + "(assert (<= (* 0.1234567890123456789 Y_0) (* 1e9 Y_1)))",
    "X_0 has no upper bound": BOX.replace("(assert (<= X_0 0.75))", "") + ROBUST,
    "X_0 has no lower bound": BOX.replace("(assert (>= X_0 0.25))", "") + ROBUST,
    "X_1 is not declared": BOX + "(assert (<= X_1 0.5))" + ROBUST,
    "Y_3 is not declared": BOX + "(assert (>= Y_3 Y_0))",
    "the bounds of X_0 exclude each other": BOX + "(assert (<= X_0 0.2))" + ROBUST,
    "the variables X_0, X_1, ... are not all declared": BOX + "(declare-const X_2 Real)" + ROBUST,
    "the variables Y_0, Y_1, ... are not all declared": BOX + "(declare-const Y_4 Real)" + ROBUST,
    "found (declare-fun f (Real) Real), neither": "(declare-fun f (Real) Real)",
    "found (vnnlib-version <2.0>), neither": "(vnnlib-version <2.0>)",
    "found (declare-const X_0 Int), neither": "(declare-const X_0 Int)",
    "found word, neither": "word",
    "found (), neither": "()",
    "found (word word": f"({'word ' * 100})",
    "ends within a parenthesis": BOX + "(assert (or",
    "closes a parenthesis": ROBUST + ")",
    "nested too deeply": "(" * 100_000,
    "more than 10000 cases": BOX + "(assert (or (<= Y_0 1) (<= Y_0 2)))" * 20,
    "more than 10000 cases ": BOX + f"(assert (and {'(or (<= Y_0 1) (<= Y_0 2))' * 30}))",
    "has 1 inputs, the network takes 2 x 1 x 1": BOX + ROBUST,
    "declares 3 outputs, the network of 2": BOX + ROBUST,
    "declares 3 outputs, the network of 4": BOX + ROBUST,
    "it is damaged": gzip.compress((BOX + ROBUST).encode())[:-9],
}


@pytest.mark.parametrize("message", REFUSED_TEXTS)
def test_read_refuses_by_name(message, read):
    shape = (2, 1, 1) if "takes" in message else None
    outputs = int(message[-1]) if "outputs, the network" in message else None
    with pytest.raises(UserError) as caught:
        read(REFUSED_TEXTS[message], shape, outputs)
    said = str(caught.value)
    assert message.replace("network of", "network has").strip() in said and "\n" not in said
    assert len(said.split("a.vnnlib")[1]) < 150


def test_a_file_that_unpacks_to_too_much(read, monkeypatch):
    monkeypatch.setattr(vnnlib, "LARGEST", 1000)
    with pytest.raises(UserError, match="longer than"):
        read(gzip.compress(b" " * 2000))


# --- any text at all --------------------------------------------------------------------------------------------------

WORDS = [
    *("( ) (assert (or (and (<= (>= (+ (- (* X_0 X_1 Y_0 Y_1 Y_7 0.5 -1 1e9 () 1e = ; Y_ Int)").split(" "),
    "(declare-const", "Real)", "\n", "\r", "\ufeff", "\x00",
]  # fmt: skip


def test_any_text_is_read_or_refused_in_one_line(read):
    """2,000 files: words at random, and a right one with some bytes changed, cut off, or repeated."""
    generator, right, kinds = np.random.default_rng(0), (BOX + ROBUST + FORMULA).encode(), [0, 0]
    digits = [i for i, byte in enumerate(right) if chr(byte).isdigit()]
    for n in range(2000):
        text = bytearray(right)
        if n % 4 == 0:
            text = " ".join(generator.choice(WORDS, generator.integers(1, 30))).encode()
        for _ in range(generator.integers(1, 4) if n % 4 else 0):
            at = int(generator.integers(0, len(text)))
            if n % 4 == 1:
                text[generator.choice(digits)] = generator.choice([*b"0123456789.e- "])
            elif n % 4 == 2:
                text[at] = generator.integers(0, 256)
            else:
                text[at : at + int(generator.integers(0, 9))] = str(generator.choice(WORDS)).encode()
        try:
            cases = read(bytes(text), (1, 1, 1), 3).cases
            assert cases and all(np.isfinite([*c.low.flat, *c.high.flat, *c.offsets]).all() for c in cases)
            kinds[0] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            kinds[1] += 1
    assert min(kinds) > 100, kinds


FORMULA = "(assert (or (and (<= X_0 0.5) (>= (+ Y_0 (* 0.1 Y_1)) 2)) (and (>= X_0 .5) (<= Y_2 -1e-1) (<= Y_0 Y_2))))"
