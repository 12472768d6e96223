"""nanomr.testing, as somebody uses it who has written a layer: it passes what is right, and fails what is wrong."""

import importlib
import re
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from test_layers import KINDS, TINY, make_case

from nanomr import testing
from nanomr.errors import UserError
from nanomr.gradcheck import GradientError
from nanomr.layers import BatchNorm2d, Linear, ReLU
from nanomr.testing import CHECKS, MUTANTS, check_layer, layer_test, prepare

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"
ALL_MUTANTS = [(check, mutant) for check in MUTANTS if check != "jacobian" for mutant in MUTANTS[check]]


def few_examples(count=10):
    """Hypothesis' settings with this many examples, none of them shrunk, for what calls a property."""
    settings = hypothesis.settings(max_examples=count, database=None, phases=[hypothesis.Phase.generate])

    class Profile:
        def __enter__(self):
            self.before = hypothesis.settings.get_current_profile_name()
            hypothesis.settings.register_profile("few", settings)
            hypothesis.settings.load_profile("few")

        def __exit__(self, *error):
            hypothesis.settings.load_profile(self.before)

    return Profile()


def run_page() -> dict:
    """All names that the page's code defines. It is run on the way."""
    names = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S):
        exec(block, names)
    return names


def test_the_page():
    """Its test passes, its broken layer fails, and the message is the one that it prints, but for the numbers."""
    names = run_page()
    names["test_scale"]()
    with few_examples(), pytest.raises(GradientError) as caught:
        names["test_broken"]()
    printed = re.search(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1].strip()
    note = next(note for note in caught.value.__notes__ if note.startswith("the contract"))
    found = f"nanomr.gradcheck.GradientError: {caught.value}\n{note}"

    def words(text):
        return re.sub(r"-?\d[\d.e+-]*", "#", text)

    assert words(found) == words(printed)


@pytest.mark.parametrize("kind", ["conv", "relu", "batchnorm, training", "flatten", "normalize", "block, projection"])
def test_our_layers_pass(kind):
    with few_examples():
        layer_test(KINDS[kind], view=kind == "flatten")()


@pytest.mark.parametrize(("check", "mutant"), ALL_MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_every_broken_layer_fails(check, mutant):
    """Each mutant, handed in as if somebody had written it, by both functions."""
    case = make_case("conv", *TINY["conv"](), seed=7)
    with pytest.raises(AssertionError):
        check_layer(mutant(case.layer), case.x)
    with few_examples(5), pytest.raises(AssertionError):
        layer_test(st.builds(lambda: (mutant(TINY["conv"]()[0]), TINY["conv"]()[1])))()


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "jacobian"])
def test_a_check_that_does_nothing_is_found_out(name, monkeypatch):
    """The negative control: without one of the checks, its mutants live."""
    monkeypatch.setitem(CHECKS, name, lambda case: None)
    case = make_case("conv", *TINY["conv"](), seed=7)
    with pytest.raises(AssertionError, match=rf"{MUTANTS[name][0].__name__} \({name}\)"):
        check_layer(case.layer, case.x)
    with few_examples(5), pytest.raises(AssertionError, match=rf"{MUTANTS[name][0].__name__} \({name}\)"):
        layer_test(st.builds(TINY["conv"]))()


def test_a_layer_at_zeros_is_not_declared_right():
    """All weights zero: dx is zero, whatever is wrong with it."""
    x = np.random.default_rng(0).standard_normal((3, 4))
    layer = Linear(4, 2)
    layer.params["weight"][...] = 0
    with pytest.raises(AssertionError, match="is its gradient zero here"):
        check_layer(layer, x)
    check_layer(prepare(Linear(4, 2), np.random.default_rng(0)), x)


def test_the_layer_is_left_as_it_was():
    layer = BatchNorm2d(2)
    layer.params["weight"][...] = 0.7
    check_layer(layer, np.random.default_rng(0).standard_normal((3, 2, 2, 2)))
    assert layer.params["weight"].dtype == np.float32 and layer.grads == {}
    assert layer.buffers["num_batches_tracked"] == 0 and (layer.buffers["running_mean"] == 0).all()


def test_views_must_be_allowed():
    flatten, shape = TINY["flatten"]()
    x = np.random.default_rng(0).standard_normal(shape)
    check_layer(flatten, x, view=True)
    with pytest.raises(AssertionError, match="y lies in x"):
        check_layer(flatten, x)


def test_without_hypothesis(monkeypatch):
    """check_layer works; what needs Hypothesis says so in one line."""
    monkeypatch.setitem(sys.modules, "hypothesis", None)  # None makes the import fail
    for name in [name for name in sys.modules if name.startswith("nanomr.testing")]:
        monkeypatch.delitem(sys.modules, name)
    fresh = importlib.import_module("nanomr.testing")
    monkeypatch.setattr("nanomr.testing", testing)  # the attribute, too, is the old module again afterwards
    assert fresh is not testing
    fresh.check_layer(ReLU(), np.random.default_rng(0).standard_normal((3, 5)))
    with pytest.raises(UserError, match=r"pip install 'nanomr\[test\]'"):
        fresh.layer_test(None)
