"""What the tests of the three programs share."""

import sys

import numpy as np
import pytest

from nanomr import cli, models, shapes10


def isolate(monkeypatch, place, train, test):
    """shapes10 has so many images, the working folder is ``place``, and no CIFAR-10 of this machine is found."""
    monkeypatch.setattr(shapes10, "TRAIN", train)
    monkeypatch.setattr(shapes10, "TEST", test)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.delenv("NANOMR_DATA", raising=False)


def caller(module, monkeypatch, capsys):
    """call(*arguments) -> (exit code, stdout, stderr) of the program, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run(module.main)
        return stopped.value.code, *capsys.readouterr()

    return call


def assert_one_error_line(result, *words):
    code, _, err = result
    assert code == 2, (code, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert str(word) in err
    return err


def images_of(n):
    """The first n test images of shapes10, and their labels."""
    drawn, labels = shapes10.generate(n, shapes10.SEED + 1)
    return drawn * np.float32(1 / 255), labels


def save_memoriser(path, n, hidden, rcond):
    """A network that knows n test images by heart, with margins of all sizes: least squares on random features."""
    model = models.mlp((3072, hidden, 10), seed=1)
    x, labels = images_of(n)
    for name in ("normalize", "flatten", "fc1", "relu1"):
        x, _ = model.children[name].forward(x)
    last = model.children["fc2"].params
    last["weight"][...] = np.linalg.lstsq(x.astype(float), np.eye(10)[labels] - 0.1, rcond=rcond)[0]
    last["bias"][...] = 0
    model.save(path)
