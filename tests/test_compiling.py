"""Whether Numba compiles is known when it does, and only then."""

import signal

import pytest
from numba import njit

from nanomr import compiling
from nanomr.train import Interrupted, Trainer


def test_it_is_said_once_and_only_when_something_is_compiled():
    said = []
    compiling.announce(lambda: said.append(compiling.now()))
    first, second = (njit(lambda x, k=k: x + k) for k in (1, 2))
    assert not said and not compiling.now()
    assert first(1) == 2 and said == [True] and not compiling.now()
    assert first(2) == 3 and second(1) == 3 and said == [True]


def test_an_error_in_a_compilation_ends_it():
    with pytest.raises(Exception, match="nothing"):
        njit(lambda x: x + nothing)(1)  # noqa: F821
    assert not compiling.now()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_breaks_into_a_compilation_and_loses_nothing(tmp_path, monkeypatch, number):
    """The signal comes while a kernel of the first step is compiled."""
    from test_train import CONFIG, toy

    run = Trainer(CONFIG, toy(side=4), tmp_path)
    compiling.announce(lambda: signal.raise_signal(number))
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (njit(lambda x: x)(1), step(self))[1])
    with pytest.raises(Interrupted, match=f"compiled: go on with --resume {tmp_path}"):
        run.run()
    monkeypatch.undo()
    again = Trainer(CONFIG, toy(side=4), tmp_path)
    again.resume()
    assert again.step == 0
    again.run()
