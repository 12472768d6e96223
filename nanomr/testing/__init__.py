"""Property tests for layers: the contract of ``nanomr/layers.py`` as checks, which are checked themselves.

    from nanomr.testing import layer_test
    from nanomr.testing.strategies import images

    test_scale = layer_test(images().map(lambda shape: (Scale(shape[-1]), shape)))

``docs/testing.md`` goes through it. :func:`check_layer` is the same at one input, without Hypothesis.
"""

import copy

import numpy as np

from ..layers import Layer
from .contract import CHECKS, MUTANTS, Case, cast, is_caught, prepare, require

__all__ = ["CHECKS", "MUTANTS", "Case", "check_layer", "is_caught", "layer_test", "prepare"]

# The whole Jacobian is for tiny inputs alone: along random directions "vjp" notices the same mutants.
_CHECKED = [name for name in CHECKS if name != "jacobian"]


def check_layer(layer: Layer, x, train=True, view=False):
    """Raise AssertionError unless ``layer`` keeps the contract at ``x``, and unless each check can fail there.

    A copy of it is checked, in float64, with the parameters it has: random ones (:func:`prepare` draws some), since at
    zeros errors hide. ``x`` (N, ...), N >= 2, of any float dtype; ``train``: in training or in evaluation mode;
    ``view``: may the output be a view of the input, as a reshape is? GradientError, an AssertionError, is for a wrong
    gradient, and names the array.
    """
    case = Case(cast(copy.deepcopy(layer), np.float64), np.array(x, np.float64), train, view)
    alive = _mutants()
    _check(case, alive)
    _require_none(alive)


def layer_test(layers, view=False):
    """A test function, for pytest or to be called: the layers that ``layers`` draws keep the contract.

    ``layers``: a Hypothesis strategy of (layer, shape of x (N, ...)). Parameters, running statistics and x are random,
    in training and in evaluation mode; Hypothesis' profile says how many are drawn, and shrinks what fails.
    The negative control is part of it: each deliberately broken version of the layer (:data:`MUTANTS`) must fail its
    check at one of the inputs at least. ``view`` as in :func:`check_layer`. Raises UserError without Hypothesis.
    """
    from .strategies import seeds  # isort: skip  # first: it says what is missing without Hypothesis

    from hypothesis import given, settings
    from hypothesis import strategies as st

    def test():
        alive = _mutants()

        @settings(deadline=None)  # the first call of a kernel compiles it
        @given(drawn=layers, train=st.booleans(), seed=seeds)
        def keeps_the_contract(drawn, train, seed):
            layer, shape = drawn
            rng = np.random.default_rng(seed)
            _check(Case(prepare(layer, rng), rng.standard_normal(shape), train, view), alive)

        keeps_the_contract()
        _require_none(alive)

    return test


def _mutants() -> dict:
    """{(check, mutant): was it a defect anywhere?}: those that no check has caught yet."""
    return {(check, mutant): False for check in _CHECKED for mutant in MUTANTS[check]}


def _check(case: Case, alive: dict):
    """All checks of a case, and, when it passes, all mutants that are still alive."""
    for name in _CHECKED:
        try:
            CHECKS[name](copy.deepcopy(case))
        except AssertionError as error:
            error.add_note(f"the contract of layers, {name}: {CHECKS[name].__doc__}")
            raise
    for check, mutant in list(alive):
        if mutant.is_a_defect_of(copy.deepcopy(case)):
            alive[check, mutant] = True
            if is_caught(CHECKS[check], mutant, case):
                del alive[check, mutant]


def _require_none(alive: dict):
    names = [f"{mutant.__name__} ({check})" for (check, mutant), is_a_defect in alive.items() if is_a_defect]
    text = "broken versions of the layer pass their checks, which then prove nothing: is its gradient zero here?"
    require(not names, f"{text} {', '.join(names)}")
