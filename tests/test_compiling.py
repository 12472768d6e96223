"""Whether Numba compiles is known when it does, and only then; what it keeps is the right kernel's."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from numba import config, njit
from numba.core import caching
from numba.core.dispatcher import Dispatcher

from nanomr import compiling
from nanomr.attacks import sinkhorn
from nanomr.ops.cpu import (
    amx,
    boxes,
    elementwise,
    gather_gemm,
    normalization,
    simd,
    training,
    winograd,
    winograd_strided,
)
from nanomr.train import Interrupted, Trainer
from nanomr.verify.exact import split

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


@njit(fastmath={"nsz"})
def add_one(x):
    return x + ONE


def kept(folder, module=__name__) -> compiling.Kept:
    compiling.SOURCES[__name__] = "this file"
    return compiling.Kept(module, folder, "kernel")


def numbas(folder) -> caching.IndexDataCacheFile:
    return caching.IndexDataCacheFile(str(folder), "kernel", "stamp")


@pytest.mark.parametrize(("files", "right"), [(kept, True), (numbas, False)], ids=["ours", "Numba's"])
def test_two_processes_that_keep_kernels_at_once_keep_both(tmp_path, monkeypatch, files, right):
    """One is asked for its next number before the other has written its index. Numba's own files are mixed up."""
    one, other = files(tmp_path), files(tmp_path)
    save = type(one)._save_data

    def late(self, name, data):
        monkeypatch.undo()
        for index in tmp_path.glob("*.nbi"):
            index.unlink()  # it was not there yet when the other looked
        other.save("other", "the other's")
        save(self, name, data)

    monkeypatch.setattr(type(one), "_save_data", late)
    one.save("one", "the one's")
    assert (files(tmp_path).load("other") == "the other's") == right
    assert not right or files(tmp_path).load("one") == "the one's"


def test_a_kernel_is_found_by_all_that_it_was_made_of(tmp_path, monkeypatch):
    kept(tmp_path).save(("float32",), "compiled")

    def found(key=("float32",)):
        here = kept(tmp_path).load(key)
        monkeypatch.undo()
        return here

    assert found() == "compiled" and found(("float64",)) is None
    monkeypatch.setitem(globals(), "ONE", 2)
    assert found() is None
    monkeypatch.setitem(globals(), "add_one", njit(fastmath={"arcp"})(add_one.py_func))
    assert found() is None
    monkeypatch.setattr(caching.numba, "__version__", "0.1")
    assert found() is None
    for name, value in dict(BOUNDSCHECK=1, OPT=1, LOOP_VECTORIZE=0, SLP_VECTORIZE=1).items():
        monkeypatch.setattr(config, name, value)
        assert found() is None
    assert found() == "compiled"


@pytest.mark.parametrize("what", ["cut off", "one letter", "another's", "gone"])
def test_a_file_that_is_not_the_kernels_is_none(tmp_path, what):
    files = kept(tmp_path)
    files.save("key", "compiled")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if what == "cut off":
        file.write_bytes(content[:-9])
    elif what == "one letter":
        file.write_bytes(content.replace(b"compiled", b"Compiled"))
    elif what == "gone":
        file.unlink()
    else:
        files.save("another", "another's")
        (other,) = set(tmp_path.iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    assert files.load("key") is None
    files.save("key", "compiled again")
    assert files.load("key") == "compiled again"
    files.flush()
    assert files.load("key") is None and not list(tmp_path.glob("kernel.*.nbc"))


@pytest.mark.parametrize(
    ("kernels", "parts", "others"),
    [
        (normalization, [normalization, elementwise, simd], [boxes, gather_gemm]),
        (gather_gemm, [gather_gemm, simd], [normalization]),
        (winograd_strided, [winograd_strided, winograd, gather_gemm, simd], [elementwise]),
        (amx, [amx, simd], [gather_gemm]),
    ],
)
def test_changed_sources_are_compiled_anew_and_old_files_go(tmp_path, monkeypatch, kernels, parts, others):
    """Also those of other modules, whose code is in a kernel; files of another kernel stay."""
    files, stranger = kept(tmp_path, kernels.__name__), tmp_path / "kernel2.0.0.nbc"
    stranger.touch()
    files.save("key", "compiled")
    files.save("key2", "compiled, too")
    for module in parts:
        monkeypatch.setitem(compiling.SOURCES, module.__name__, "changed")
        assert files.load("key") is None
        monkeypatch.undo()
    for module in others:
        monkeypatch.setitem(compiling.SOURCES, module.__name__, "changed")
    assert files.load("key") == "compiled" and files.load("key2") == "compiled, too"
    monkeypatch.setitem(compiling.SOURCES, simd.__name__, "changed")
    files.save("key", "compiled anew")
    assert files.load("key") == "compiled anew" and len(list(tmp_path.iterdir())) == 2 and stranger.exists()


def test_a_constant_or_a_flag_at_second_hand_counts(monkeypatch):
    before = compiling.made_of(normalization.__name__)
    monkeypatch.setattr(elementwise, "_P", (1.0,))  # of the tanh that normalization's kernels inline
    assert compiling.made_of(normalization.__name__) != before
    monkeypatch.undo()
    monkeypatch.setattr(elementwise, "_tanh", njit(elementwise._tanh.py_func))
    assert compiling.made_of(normalization.__name__) != before
    monkeypatch.undo()
    assert compiling.made_of(normalization.__name__) == before
    assert str(Path(compiling.__file__).parent) not in repr(before)  # a copy of both, sources and kernels, is as good


def test_numba_keeps_what_has_no_source_that_can_be_read(monkeypatch):
    monkeypatch.delitem(compiling.SOURCES, __name__, raising=False)
    monkeypatch.setitem(sys.modules, "nanomr.nowhere", ModuleType("nanomr.nowhere"))
    kernel = compiling.keep(njit(cache=True)(add_one.py_func))
    assert type(kernel._cache._cache_file) is caching.IndexDataCacheFile


def test_nothing_is_kept_of_what_numba_would_not_keep(monkeypatch):
    """No folder can be written to, or a tool compiles kernels in its own way (test_borders checks their indices)."""
    monkeypatch.setitem(compiling.SOURCES, __name__, "this file")
    kernel = compiling.keep(njit(add_one.py_func))
    assert kernel(1) == 2 and isinstance(kernel._cache, caching.NullCache)


def test_every_kernel_is_kept_so():
    """Also with this version of Numba, of which this asks for more than it promises."""
    modules = [module for name, module in sys.modules.items() if name.startswith("nanomr.")]
    values = [value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)]
    found = {value for value in values if not isinstance(value._cache, caching.NullCache)}
    assert {kernel.__module__ for kernel in found} > {m.__name__ for m in (amx, sinkhorn, split, training, winograd)}
    assert len(found) > 80 and all(isinstance(kernel._cache._cache_file, compiling.Kept) for kernel in found)


CODE = """if True:
    import numpy as np
    from nanomr import compiling
    from nanomr.ops import cpu
    compiling.announce(lambda: print("compiles"))
    print(cpu.relu(np.linspace(-1, 1, 9, dtype=np.float32)[None]).sum(), len(compiling.SOURCES) > 9)
"""


def test_the_next_process_compiles_nothing(tmp_path):
    assert process(CODE, tmp_path) == "compiles\n2.5 True\n" and process(CODE, tmp_path) == "2.5 True\n"


def test_a_kernel_is_kept_as_it_was_imported_whatever_its_file_is_later(tmp_path):
    """In a copy, by a path that is spelt in an odd way, while an editor has its lock in the folder."""
    package = Path(compiling.__file__).parent
    shutil.copytree(package, tmp_path / "nanomr", ignore=shutil.ignore_patterns("__pycache__"))
    kernels = tmp_path / "nanomr" / "ops" / "cpu" / "attacks.py"
    (kernels.parent / ".#attacks.py").symlink_to("nowhere")
    source = kernels.read_text()

    def length(before="", after=""):
        """Of four ones, in a process that spoils the file ``before`` or ``after`` it is imported; it is mended then."""
        code = f"""if True:
            import sys
            sys.path.insert(0, sys.argv[1] + "/./")
            import numpy as np, nanomr.compiling
            from pathlib import Path
            path = Path(sys.argv[2])
            {before}
            from nanomr.ops.cpu import attacks
            {after}
            import nanomr.verify.exact.halfspace
            nanomr.compiling.announce(lambda: print("compiles"))
            print(attacks._length(np.ones(4, np.float32)))
        """
        found = process(code, tmp_path / "cache", tmp_path, kernels)
        kernels.write_text(source)
        return found

    spoil = "path.write_text(path.read_text().replace('total = 0.0', 'total = 96.0'))"
    assert length(before=spoil) == "compiles\n10.0\n" and length(before=spoil) == "10.0\n"
    assert length(after=spoil) == "compiles\n2.0\n" and length() == "2.0\n"


def test_without_numba_all_is_plain_python(tmp_path):
    """NUMBA_DISABLE_JIT, by which one follows a kernel in a debugger."""
    code = "import numpy as np; from nanomr.ops.cpu import attacks; print(attacks._length(np.ones(4, np.float32)))"
    assert process(code, tmp_path, NUMBA_DISABLE_JIT="1") == "2.0\n"


def process(code, cache, *arguments, **environment) -> str:
    """What it prints; its kernels are kept in the folder ``cache``."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
