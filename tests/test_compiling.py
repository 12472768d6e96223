"""Whether Numba compiles is known when it does, and only then; what it keeps is the right kernel's."""

import os
import signal
import subprocess
import sys

import pytest
from numba import njit
from numba.core import caching
from numba.core.dispatcher import Dispatcher

from nanomr import compiling
from nanomr.attacks import sinkhorn
from nanomr.ops.cpu import amx, attacks, boxes, elementwise, gather_gemm, lines, normalization, simd
from nanomr.train import Interrupted, Trainer
from nanomr.verify.exact import halfspace, split

ONE = 1  # a constant that a kernel takes from here


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


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept(folder, function=None, **options) -> compiling.Kept:
    return compiling.Kept(njit(**options)(function or (lambda x: x + ONE)), folder, "kernel")


def numbas(folder) -> caching.IndexDataCacheFile:
    return caching.IndexDataCacheFile(str(folder), "kernel", "stamp")


@pytest.mark.parametrize(("files", "right"), [(kept, True), (numbas, False)], ids=["ours", "Numba's"])
def test_two_processes_that_keep_kernels_at_once_keep_both(tmp_path, monkeypatch, files, right):
    """One is asked for its next number before the other has written its index. Numba's own files are mixed up."""
    one, other = files(tmp_path), files(tmp_path)
    save = type(one)._save_data

    def late(self, name, data):
        monkeypatch.undo()
        index = {path: path.read_bytes() for path in tmp_path.glob("*.nbi")}
        for path in index:
            path.unlink()  # it was not there yet when the other looked
        other.save("other", "the other's")
        save(self, name, data)

    monkeypatch.setattr(type(one), "_save_data", late)
    one.save("one", "the one's")
    assert (files(tmp_path).load("other") == "the other's") == right
    assert not right or files(tmp_path).load("one") == "the one's"


def test_a_kernel_is_found_by_all_that_it_was_made_of(tmp_path, monkeypatch):
    kept(tmp_path).save(("float32",), "compiled")
    assert kept(tmp_path).load(("float32",)) == "compiled"
    assert kept(tmp_path).load(("float64",)) is None
    assert kept(tmp_path, lambda x: x + ONE, fastmath={"nsz"}).load(("float32",)) is None
    monkeypatch.setitem(globals(), "ONE", 2)
    assert kept(tmp_path).load(("float32",)) is None
    monkeypatch.undo()
    assert kept(tmp_path).load(("float32",)) == "compiled"


@pytest.mark.parametrize("what", ["damaged", "another's", "gone"])
def test_a_file_that_is_not_the_kernels_is_none(tmp_path, what):
    files = kept(tmp_path)
    files.save("key", "compiled")
    (file,) = tmp_path.iterdir()
    if what == "damaged":
        file.write_bytes(file.read_bytes()[:-9])
    elif what == "gone":
        file.unlink()
    else:
        files.save("another", "another's")
        (other,) = set(tmp_path.iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    assert files.load("key") is None
    files.save("key", "compiled again")
    assert files.load("key") == "compiled again"


def test_changed_sources_are_compiled_anew_and_old_files_go(tmp_path, monkeypatch):
    """Also those that a kernel is given by another file, at second hand; files of another kernel stay."""
    kernel = normalization._activate_hamming  # its tanh is in elementwise.py, its loads are in simd.py
    files, stranger = compiling.Kept(kernel, tmp_path, "kernel"), tmp_path / "kernel2.0.0.nbc"
    stranger.touch()
    files.save("key", "compiled")
    files.save("key2", "compiled, too")
    for module in (normalization, elementwise, simd):
        monkeypatch.setitem(compiling.SOURCES, module.__file__, "changed")
        assert files.load("key") is None
        monkeypatch.undo()
    monkeypatch.setattr(elementwise, "_P", (1.0,))  # the tanh's
    assert files.load("key") is None
    monkeypatch.undo()
    assert files.load("key") == "compiled"
    monkeypatch.setitem(compiling.SOURCES, boxes.__file__, "changed")  # nothing of it is in that kernel
    assert files.load("key") == "compiled"
    monkeypatch.setitem(compiling.SOURCES, simd.__file__, "changed")
    files.save("key", "compiled anew")
    assert files.load("key") == "compiled anew" and len(list(tmp_path.iterdir())) == 2 and stranger.exists()


def test_every_kernel_is_kept_so():
    """Also with this version of Numba, of which this asks for more than it promises."""
    found = [
        value
        for module in (amx, attacks, boxes, elementwise, gather_gemm, halfspace, lines, normalization, sinkhorn, split)
        for value in vars(module).values()
        if isinstance(value, Dispatcher) and not isinstance(value._cache, caching.NullCache)
    ]
    assert len(found) > 50 and all(isinstance(kernel._cache._cache_file, compiling.Kept) for kernel in found)


def test_the_next_process_compiles_nothing(tmp_path):
    code = (
        "import numpy as np; from nanomr import compiling; from nanomr.ops import cpu;"
        "compiling.announce(lambda: print('compiles')); x = np.linspace(-1, 1, 9, dtype=np.float32)[None];"
        "print(cpu.relu(x).sum())"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout
        for _ in range(2)
    ]
    assert said == ["compiles\n2.5\n", "2.5\n"]
