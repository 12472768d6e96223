"""The self-test on first use, on the stand-in for CuPy: each kernel broken in turn ends in a right run."""

import json
import os
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
import shim
import test_kernels as kernels

from nanomr import backend, models
from nanomr.errors import UserError
from nanomr.ops import gpu
from nanomr.ops.gpu import conv, normalization, plain, probes, selftest

CHILD = [sys.executable, str(Path(__file__).with_name("stand_in_child.py"))]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A machine with a GPU that is none, and a user who has never used one."""
    if shim.missing():
        pytest.skip(shim.missing())
    remembered = selftest.remembered
    fake_cupy.install(monkeypatch)
    monkeypatch.setattr(selftest, "remembered", remembered)
    monkeypatch.setitem(models.BUILDERS, "tiny", kernels.tiny_model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(selftest, "COMMAND", [*CHILD, ""])
    identity = selftest.identity
    identity.cache_clear()
    yield fake_cupy
    identity.cache_clear()
    fake_cupy.forget()


@cache
def users() -> dict[str, set[str]]:
    """{kernel: the functions whose checks launch it}."""
    found: dict[str, set[str]] = {}
    for name in gpu.OWN:
        fake_cupy.launched.clear()
        assert probes.check(name) is None, name
        for kernel, _ in fake_cupy.launched:
            found.setdefault(kernel, set()).add(name)
    return found


KERNELS = """
    activate activate_backward add average_pool average_pool_backward begin_step channel_gradients
    contract_pair convert convolve corners crop_flip draw_augmentation draw_corners end_step expand_pair
    finish_gradients finish_moments hamming_norms hamming_weight losses matrix_product moments
    normalize_backward resize_rows sgd_update sum_rows sum_splits sum_squares weight_gradient widen
""".split()


def test_all_is_well_with_every_kernel(fake):
    assert sorted(users()) == KERNELS
    assert probes.check("graph") is None
    names = {name for file in Path(gpu.__file__).parent.glob("kernels/*.cu") for name in kernels_of(file)}
    assert names == set(KERNELS), "a kernel that no check launches"


def kernels_of(file):
    return re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", file.read_text())


@pytest.mark.parametrize("name", selftest.NAMES)
def test_a_check_passes(cupy, name):
    """On the stand-in here, and on a GPU there; a tile's has a time, if the card is not another."""
    found = probes.check(name)
    assert found is None or (name in probes.TILES and isinstance(found, float) and found > 0)


# --- each kernel broken in turn ---------------------------------------------------------------------------------------


def a_right_run(fake, folder):
    """Two steps in bfloat16 are the CPU's, as in test_kernels; what a broken kernel does would show in the losses."""
    here = kernels.trainer_of(folder, "cpu", precision="fp32")
    there = kernels.trainer_of(folder)
    for _ in range(2):
        here.advance()
        there.advance()
    expected, found = kernels.state_of(here), kernels.state_of(there)
    for name in ("totals", "running_mean", "running_var"):
        for key in (k for k in expected if k.endswith(name)):
            pick = [0, 1, 3] if name == "totals" else slice(None)  # the intrinsic term is a small difference
            np.testing.assert_allclose(found[key][pick], expected[key][pick], rtol=0.02, atol=0.01, err_msg=key)
    return there


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_wrong_number_is_seen_and_the_run_is_right(fake, kernel, tmp_path):
    """Of all that a launch writes, the last number is off by one. Functions that use it fail, unless that is a number
    that they do not use either: the run is right, and the functions that do not fail stay our own."""
    using = users()[kernel]
    fake.faults[kernel] = "wrong"
    problems = {name: probes.check(name) for name in gpu.OWN if name in using or name == "relu"}
    failed = [name for name, problem in problems.items() if problem]
    assert failed and set(failed) <= using
    gpu.replace(failed)
    there = a_right_run(fake, tmp_path)
    assert there._kernels() == {"plain_kernels": list(gpu.replaced), "graph": False, "tiles": {}}


@pytest.mark.parametrize("fault", ["nan", "compile", "launch"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_other_fault_is_seen(fake, kernel, fault):
    using, failed = users()[kernel], set()
    fake.faults[kernel] = fault
    for name in using:
        gpu.cuda._function.cache_clear()
        try:
            problem = probes.check(name)
        except RuntimeError as error:
            problem = str(error)
        if problem:
            failed.add(name)
    assert failed == using if fault != "nan" else failed  # one number may be of no use


def test_a_hang_a_crash_and_a_spoilt_device_cost_their_functions_alone(fake, monkeypatch):
    """What comes behind them is checked, in another process."""
    monkeypatch.setattr(selftest, "COMMAND", [*CHILD, "sgd_update=hang,crop_flip=crash,corners=unusable"])
    monkeypatch.setattr(selftest, "NAMES", ("corners", "add", "crop_flip", "sgd_update", "relu"))
    seen = []
    found = selftest.test(limit=6, report=lambda *line: seen.append(line))
    assert list(found.items()) == seen and found["add"] is None and found["relu"] is None
    assert found["sgd_update"] == "not done after 6 s" and found["crop_flip"] == "it ended the process (139)"
    assert found["corners"].startswith("RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal")
    assert list(found) == list(selftest.NAMES)


def test_without_a_working_cupy_there_is_no_run(fake, monkeypatch, capsys):
    """... on the GPU: one line, exit code 2; and with --device auto the CPU's."""
    monkeypatch.setattr(selftest, "COMMAND", [sys.executable, "-c", "raise OSError('libcudart.so.12: no such file')"])
    with pytest.raises(UserError, match=r"CuPy's own kernels do not run here \(OSError: libcudart.*--device cpu"):
        backend.use_device("gpu")
    assert backend.use_device("auto") == "cpu" and "going on with the CPU" in capsys.readouterr().err


# --- what it chooses, and remembers -----------------------------------------------------------------------------------


@pytest.fixture
def tested(monkeypatch):
    """How often was it tested? ``tested.problems`` is what it finds."""

    def test(**_):
        test.times += 1
        return dict.fromkeys(selftest.NAMES) | test.problems

    test.times, test.problems = 0, {}
    monkeypatch.setattr(selftest, "test", test)
    return test


def test_a_first_run_tests_and_the_next_ones_remember(fake, tested, capsys, monkeypatch):
    tested.problems = {"losses": "it is wrong", "graph": "no"}
    for _ in range(2):
        gpu.replace()
        assert backend.use_device("gpu") == "gpu" and tested.times == 1
        assert gpu.replaced == ("losses", "graph") and not hasattr(gpu, "losses") and gpu.relu is gpu.OWN["relu"]
        lines = capsys.readouterr().err.splitlines()
        assert lines[-2].startswith("GPU self-test: losses: it is wrong; plain CuPy computes it, slower")
        assert lines[-1].startswith("GPU self-test: graph: no; steps are started from Python")
    before = selftest.identity()
    Path(gpu.__file__).touch()  # Python writes its __pycache__ anew
    selftest.identity.cache_clear()
    assert selftest.identity() == before
    monkeypatch.setattr(selftest, "identity", lambda: "another driver")
    tested.problems = {}
    backend.use_device("gpu")
    assert tested.times == 2 and gpu.replaced == () and len(json.loads(selftest.memory().read_text())) == 2
    selftest.memory().write_text("{")
    backend.use_device("gpu")
    assert tested.times == 3


def test_a_full_card_is_not_remembered(fake, tested):
    tested.problems = {"norm": "OutOfMemoryError: Out of memory"}
    backend.use_device("gpu")
    backend.use_device("gpu")
    assert tested.times == 2


@pytest.mark.skipif(os.name != "posix", reason="a file in the folder's place")
def test_a_folder_that_cannot_be_written_costs_the_memory_alone(fake, tested, tmp_path):
    (tmp_path / "cache").write_text("")
    backend.use_device("gpu")
    backend.use_device("gpu")
    assert tested.times == 2 and gpu.replaced == ()


def test_kernels_of_ones_choice(fake, tested):
    backend.use_device("gpu", "plain")
    assert gpu.replaced == selftest.FUNCTIONS and gpu.relu is plain.relu and not hasattr(gpu, "losses")
    backend.use_device("gpu", "own")
    assert gpu.replaced == () and all(getattr(gpu, name) is own for name, own in gpu.OWN.items()) and tested.times == 0
    with pytest.raises(UserError, match="--kernels must be"):
        backend.use_device("gpu", "mine")
    assert backend.use_device("cpu", "plain") == "cpu"


@pytest.mark.parametrize("problems", [{}, {"relu": "y is wrong"}])
def test_the_command_says_what_it_finds(fake, monkeypatch, capsys, problems):
    timed = {"y wide, usual": 123.0, "y wide, deep": 99.0, "dx wide, usual": 120.0}

    def test(report):
        for name in selftest.NAMES:
            report(name, (problems | timed).get(name))
        return dict.fromkeys(selftest.NAMES) | problems | timed

    monkeypatch.setattr(selftest, "test", test)
    monkeypatch.setattr(sys, "argv", ["backend", "--test"])
    with pytest.raises(SystemExit, match="1" if problems else "0"):
        backend.main()
    out, count = capsys.readouterr().out, len(selftest.NAMES)
    assert ("relu                         y is wrong\n" in out) == bool(problems)
    assert (
        "y wide, usual                123.0 us\n" in out and "y wide, wgmma                not for this card\n" in out
    )
    assert "tile of y wide               deep: 99.0 us, the usual one 123.0 us\n" in out
    assert "tile of dx wide              usual: 120.0 us\n" in out and "graph                        ok\n" in out
    assert out.splitlines()[-1] == (f"1 of {count} failed" if problems else f"all {count} passed")
    assert selftest.remembered()["relu"] == problems.get("relu")


# --- which tiles ------------------------------------------------------------------------------------------------------


def costs_of(**ms):
    """A device's clock: what a launch takes by its tile's name."""
    names = {}
    for direction, kind in conv.PRODUCTS.values():
        for name, tile in conv.TILES[kind].items():
            names[tile.defines(direction)] = name
    return lambda kernel, defines: ms.get(names.get(defines), 1.0)


def test_the_fastest_tile_is_taken_and_remembered(fake, monkeypatch, capsys):
    """By a clock that says which one it is; a tile that fails is dropped with a line. The next run does not ask again,
    unless what it remembers is damaged; NANOMR_TILES=usual and --kernels own take the usual ones."""
    fake.costs, times = costs_of(usual=5, deep=2, square=4.9, wgmma=1), []
    monkeypatch.setattr(probes, "check_cases", lambda *_: None)  # test_a_check_passes has it

    def test(**_):
        times.append(1)
        found = {name: probes.check(name) for name in probes.TILES}
        return dict.fromkeys(selftest.NAMES) | found | {"y wide, wgmma": "y is wrong"}

    monkeypatch.setattr(selftest, "test", test)
    expected = dict.fromkeys(conv.PRODUCTS, "wgmma") | {"y wide": "deep"}
    for _ in range(2):
        gpu.use_tiles()
        backend.use_device("gpu")
        assert conv.tiles_in_use == expected and len(times) == 1
    assert gpu.replaced == ()
    line = (
        "GPU self-test: y wide, wgmma: y is wrong; another tile is taken (python -m nanomr.backend --test tests again)"
    )
    assert capsys.readouterr().err.splitlines()[-1] == line
    x, w = (2, 8, 8, 128), (3, 3, 128, 128)
    assert gpu.conv_plan(conv.FORWARD, x, w, 1, (1,) * 4).tile == conv.TILES["wide"]["deep"]
    assert gpu.conv_plan(conv.INPUT, x, w, 1, (1,) * 4).tile.wgmma
    assert gpu.conv_plan(conv.WEIGHT, x, (3, 3, 128, 64), 1, (1,) * 4).tile == conv.TILES["tall"]["wgmma"]

    monkeypatch.setenv("NANOMR_TILES", "usual")
    backend.use_device("gpu")
    assert not conv.tiles_in_use and len(times) == 1
    assert gpu.conv_plan(conv.FORWARD, x, w, 1, (1,) * 4).tile == conv.TILES["wide"]["usual"]
    monkeypatch.setenv("NANOMR_TILES", "fast")
    with pytest.raises(UserError, match="NANOMR_TILES must be auto or usual, not 'fast'"):
        backend.use_device("gpu")
    monkeypatch.delenv("NANOMR_TILES")
    backend.use_device("gpu")
    assert conv.tiles_in_use == expected
    backend.use_device("gpu", "own")
    assert not conv.tiles_in_use

    good = json.loads(selftest.memory().read_text())
    for name, damage in (("y wide, deep", -1.0), ("y wide, deep", True), ("relu", 3.0), ("relu", ["no"])):
        known = {key: results | {name: damage} for key, results in good.items()}
        selftest.memory().write_text(json.dumps(known))
        count = len(times)
        backend.use_device("gpu")
        assert len(times) == count + 1 and conv.tiles_in_use == expected


def test_noise_does_not_choose(fake):
    """Another tile must be faster by more than 3 %."""
    found = dict.fromkeys(selftest.NAMES)
    for us, taken in ((98.0, "usual"), (96.0, "square")):
        found |= {"dx wide, usual": 100.0, "dx wide, square": us, "dx wide, deep": "no", "dx wide, wgmma": None}
        assert selftest.tiles(found) == {"dx wide": (taken, us if taken == "square" else 100.0, 100.0)}


def test_a_tile_that_does_not_compile_launch_or_agree_is_dropped(fake):
    for product in ("y wide", "dw wide"):
        kernel = "weight_gradient" if product == "dw wide" else "convolve"
        for fault, words in (("compile", "undefined"), ("launch", "invalid argument"), ("wrong", "numbers are wrong")):
            gpu.cuda._function.cache_clear()
            fake.faults = {kernel: fault}
            try:
                found = probes.check(f"{product}, square")
            except RuntimeError as error:
                found = str(error)
            assert isinstance(found, str) and words in found and not conv.tiles_in_use


@pytest.mark.parametrize("value", [7.0, np.nan])
@pytest.mark.parametrize("product", ["y narrow", "dx wide", "dw tall"])
def test_a_tile_that_is_wrong_only_where_it_is_timed_is_dropped(fake, product, value, monkeypatch):
    """Small products may be right where a full device's are not. Of one number, it is said."""
    launch = conv.ConvPlan.launch

    def broken(self, *arrays):
        launch(self, *arrays)
        if self.tile.wgmma:
            arrays[-1].a.reshape(-1)[3] += value

    monkeypatch.setattr(probes, "check_cases", lambda *_: None)
    assert isinstance(probes.check(f"{product}, wgmma"), float)
    monkeypatch.setattr(conv.ConvPlan, "launch", broken)
    assert probes.check(f"{product}, wgmma").startswith("1 of ")
    assert isinstance(probes.check(f"{product}, usual"), float)


def test_wgmma_is_for_hopper(fake, monkeypatch):
    """Nothing of it is compiled elsewhere, and nothing is said."""
    module = sys.modules["cupy"]
    monkeypatch.setattr(module.cuda, "Device", lambda: SimpleNamespace(compute_capability="100"))
    assert probes.check("y narrow, wgmma") is None and not fake.launched
    assert isinstance(probes.check("y narrow, usual"), float)


def test_tiles_are_checked_and_timed_in_the_child(fake, monkeypatch):
    """A hang costs this tile alone."""
    monkeypatch.setattr(selftest, "COMMAND", [*CHILD, "weight_gradient=hang"])
    monkeypatch.setattr(selftest, "NAMES", ("dw tall, usual", "y narrow, usual"))
    found = selftest.test(limit=6)
    assert found["dw tall, usual"] == "not done after 6 s" and found["y narrow, usual"] > 0


# --- plain CuPy, and what the checks cover ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["manifold", "standard"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_in_plain_cupy_is_right(fake, precision, method, tmp_path):
    """From end to end, without one launch of ours; the log says so."""
    gpu.replace(selftest.FUNCTIONS)
    here = kernels.trainer_of(tmp_path / "a", "cpu", precision="fp32", method=method)
    there = kernels.trainer_of(tmp_path / "b", precision=precision, method=method)
    here.run(), there.run()
    assert not fake.launched
    for name in ("loss", "cross_entropy", "hamming"):
        off = [abs(t[name] - h[name]) for h, t in zip(here.log, there.log, strict=True)]
        assert max(off) <= (1e-3 if precision == "fp32" else 0.05) * here.log[0][name], name
    record = json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[-1])
    assert record["graph"] is False and record["plain_kernels"] == list(gpu.OWN)
    assert not {"graph", "plain_kernels", "tiles"} & here.log[0].keys()


def test_every_instantiation_of_a_run_is_checked(fake, tmp_path):
    """Of this run, and of the paper's networks at the paper's batch, as far as plans tell."""
    users.cache_clear()
    users()
    checked = set()
    for name in gpu.OWN:
        fake.launched.clear()
        probes.check(name)
        checked |= fake.launched
    fake.launched.clear()
    for options in ({}, dict(method="standard", augment=False), dict(precision="fp32"), dict(late_norm=False)):
        trainer = kernels.trainer_of(tmp_path, **options)
        for _ in range(3):
            trainer.advance()
        trainer.seconds = 1.0
        trainer._record()
    assert fake.launched <= checked, fake.launched - checked
    defines = {(name, d) for name, d in checked if name in ("convolve", "weight_gradient")}
    for x, w, stride in [
        *kernels.NETWORK,
        ((384, 32, 32, 8), (4, 4, 8, 16), 2),
        ((384, 16, 16, 16), (4, 4, 16, 32), 2),
    ]:
        for direction, name in enumerate(("convolve", "convolve", "weight_gradient")):
            plan = gpu.conv_plan(direction, x, w, stride, (w[0] // 2,) * 4)
            assert (name, plan.tile.defines(direction)) in defines
    for shape in ((384, 32, 32, 64), (384, 4, 4, 512), (384, 32, 32, 3)):
        for dtype in ("float32", "bfloat16"):
            for activation in (0, 1, 2):
                plan = normalization.pass_plan(shape, dtype, activation, shape[3])
                assert ("activate", plan.defines) in checked


def test_a_graph_that_is_wrong_is_seen(fake, monkeypatch):
    """It replays, and other numbers come out: so no run takes one."""
    launch = fake.Graph.launch
    monkeypatch.setattr(fake.Graph, "launch", lambda self, stream: (launch(self, stream), launch(self, stream)))
    assert "other numbers" in probes.check("graph")

    def broken(*_):
        fake._capture = None
        return 1 / 0

    monkeypatch.setattr(fake.Stream, "end_capture", broken)
    assert "ZeroDivisionError" in probes.check("graph")
