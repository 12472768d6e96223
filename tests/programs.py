"""What the tests of the three programs share."""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nanomr import cli, models, shapes10
from nanomr.programs import common

ROOT = Path(__file__).resolve().parent.parent


def isolate(monkeypatch, place, train, test):
    """shapes10 has so many images, the working folder is ``place``, and no CIFAR-10 of this machine is found."""
    monkeypatch.setattr(shapes10, "TRAIN", train)
    monkeypatch.setattr(shapes10, "TEST", test)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.delenv("NANOMR_DATA", raising=False)


def command_of(module):
    return module.__name__.replace("nanomr.programs.", "nanomr ")


def caller(module, monkeypatch, capsys):
    """call(*arguments) -> (exit code, stdout, stderr) of the program, in this process."""
    return caller_of(module.main, command_of(module), monkeypatch, capsys)


def caller_of(main, name, monkeypatch, capsys):
    """The same of any ``main``, started as ``name``."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
        return stopped.value.code, *capsys.readouterr()

    return call


def start(program, place, *arguments, train, test, patches="pass", launcher=(), runner="mpi4py.futures", threads="1"):
    """``program`` ("train", ...) in a process of its own, in ``place``, on a small shapes10.

    ``patches``: what to do first, where ``program`` is its module and ``train`` is nanomr.train.
    """
    script = Path(place) / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, time\nfrom nanomr import cli, shapes10, train\n"
        f"from nanomr.programs import {program} as program\n"
        f"shapes10.TRAIN, shapes10.TEST = {train}, {test}\n{patches}\n"
        "if __name__ == '__main__':\n    cli.run(program.main)\n"
    )
    names = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    paths = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(place), "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        [*launcher, sys.executable, *(("-m", runner) if launcher else ()), str(script), *map(str, arguments)],
        cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **dict.fromkeys(names, threads), **paths}, start_new_session=True,
    )  # fmt: skip


def stop(*_):
    """What Ctrl-C raises."""
    raise KeyboardInterrupt


@contextmanager
def another_process_in(path):
    """Within it, another process has locked ``path``; then it is killed, and keeps nothing."""
    code = f"from nanomr import checkpoint\nwith checkpoint.locked({str(path)!r}): print('mine', flush=True); input()"
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=env) as other:
        assert other.stdout.readline() == "mine\n"
        yield
        other.kill()


def assert_help_explains_every_flag(module, program):
    code, out, _ = program("--help")
    assert code == 0
    for action in module.parser()._actions:
        assert action.help and action.help != argparse.SUPPRESS
        assert all(flag in out for flag in action.option_strings)
    assert "default: None" not in " ".join(out.split())  # several say what their default is; None is not it
    examples = [line for line in out.splitlines() if line.startswith(command_of(module))]
    assert len(examples) >= 4 and max(len(line) for line in out.splitlines()) <= 80, out


def assert_refused(module, result, flags):
    """argparse's own error: it names the program and the flags, and nothing was done."""
    code, out, err = result
    assert code == 2 and out == "" and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"{command_of(module)}: error: ")
    assert all(word in last for word in re.split("[ =]", flags))


def assert_one_error_line(result, *words):
    code, _, err = result
    err = err.removeprefix(f"{common.COMPILES}\n")  # where no test before has used these kernels
    assert code == 2, (code, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert str(word) in err
    return err


def documented(section, file):
    """The names in the first column of docs/files.md's table of this file, in the section of ``nanomr SECTION``."""
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")
    part = next(part for part in text.split("\n## ") if f"`nanomr {section}`" in part.splitlines()[0])
    table = next(block for block in part.split("\n\n") if block.startswith(f"| in `{file}` |"))
    return {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}


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


def here(weights):
    """In place of verify.make_executor: one whose worker is this process."""
    from nanomr.verify.running import pipeline

    class Here:
        def __init__(self, args, eps, *_):
            settings = pipeline.Settings(eps, args.seed, args.time_limit)
            pipeline._verifier = pipeline.Verifier(models.load(weights), settings, pipeline.Solver())

        def submit(self, function, *arguments):
            future = Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

        def shutdown(self, **_):
            pipeline._verifier.solver.close()

    return Here
