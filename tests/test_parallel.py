"""Several ranks are one process: the same gradient, one writer, and an end for all when one fails.

Most ranks are played in turns by this process (``parallel.InTurns``); those of the slow tests are MPI's.
"""

import contextlib
import copy
import ctypes
import importlib.util
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import programs
import pytest
from test_train import CONFIG, STEPS, log, toy

from nanomr import checkpoint, manifold, models, optim, parallel, rng, train
from nanomr.errors import UserError
from nanomr.layers import BatchNorm2d
from nanomr.methods import METHODS
from nanomr.parallel import ALONE, WHOLE, InTurns, Nccl, Share
from nanomr.programs import attack as attacking
from nanomr.programs import train as training
from nanomr.train import Interrupted, Trainer

LOOK = dict(input_shape=(4, 4, 3), classes=3, mean=(0.5,) * 3, std=(0.25,) * 3)
NETWORKS = {
    "mlp": CONFIG.architecture,
    "small": models.small_cnn(hidden=8, **LOOK).architecture,
    "norms": models.small_cnn(hidden=8, batchnorm=True, **LOOK).architecture,
    "resnet": models.preact_resnet18(width=2, **LOOK | {"input_shape": (8, 8, 3)}).architecture,
}
DIVIDED = [name for name, method in METHODS.items() if method.ranks]


def trainer(folder, ranks=ALONE, config=CONFIG, **options):
    return Trainer(config, toy(side=models.build(config.architecture).input_shape[0]), folder, ranks=ranks, **options)


def run(folder, count, config=CONFIG, resume=False):
    """A whole run by ``count`` ranks."""

    def work(ranks):
        one = trainer(folder, ranks, config)
        if resume:
            one.resume()
        one.run()

    InTurns(count).run(work)


def stepped(count, config, step=7, dtype=np.float32, device="cpu"):
    """(gradient, reported values, running statistics) of a step by ``count`` ranks; equal on all of them."""

    def work(ranks):
        one = trainer("nowhere", ranks, config, device=device)
        one.model.astype(dtype)
        one.optimizer, one.step, batch, found = optim.SGD(one.model), step, one.batch, []
        one.batch = lambda step: (batch(step)[0].astype(dtype), batch(step)[1])
        one.optimizer.step = lambda lr: found.append(one.model.gradients.copy()) or 0.0
        values = one.train_step()
        norms = [layer.buffers for _, layer in one.model.walk() if isinstance(layer, BatchNorm2d)]
        return found[0], values, np.concatenate([np.zeros(1), *(v.ravel() for b in norms for v in b.values())])

    first, *others = InTurns(count).run(work)
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    return first


def far(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# --- ranks and shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(10, 1), (10, 3), (3, 3), (2, 5), (1, 4)])
def test_the_rows_of_all_ranks_are_the_batch_and_a_mean_of_theirs_is_its(n, size):
    shares = InTurns(size).run(lambda ranks: Share(ranks, n))
    rows = [np.arange(n)[share.rows] for share in shares]
    assert np.concatenate([r for r, s in zip(rows, shares, strict=True) if s.weight]).tolist() == list(range(n))
    assert all(len(r) >= 1 for r in rows) and sum(s.weight for s in shares) == pytest.approx(1)
    assert max(len(r) for r in rows) - min(len(r) * (s.weight > 0) for r, s in zip(rows, shares, strict=True)) <= 1
    x = np.random.default_rng(0).standard_normal((n, 4))

    def means(ranks):
        share = Share(ranks, n)
        mean, var = share.moments(x[share.rows].mean(0), x[share.rows].var(0))
        return share.means(x[share.rows].mean(0), x[share.rows, :2].mean(0)), mean, var

    for (whole, part), mean, var in InTurns(size).run(means):
        np.testing.assert_allclose(whole, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(part, x.mean(0)[:2], rtol=1e-12)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(var, x.var(0), rtol=1e-12, atol=1e-15)


def test_ranks_in_turns_add_up_and_take_the_first_ones():
    def work(ranks):
        vector = np.full(3, 10.0**ranks.rank, np.float32)
        ranks.barrier()
        total, first = ranks.sum_(vector.copy()), ranks.broadcast_(vector.copy())
        return total.tolist(), first.tolist(), total.dtype

    assert InTurns(3).run(work) == [([111.0] * 3, [1.0] * 3, np.float32)] * 3
    nested = InTurns(2).run(lambda outer: InTurns(2, outer).run(work))
    assert nested == [[([1111.0] * 3, [1.0] * 3, np.float32)] * 2] * 2


@pytest.mark.parametrize("which", range(3))
def test_a_failure_of_one_rank_is_the_failure_of_all(which):
    def work(ranks):
        ranks.barrier()
        if ranks.rank == which:
            raise UserError(f"rank {which} had enough")
        ranks.barrier()

    with pytest.raises(UserError, match=f"rank {which} had enough"):
        InTurns(3).run(work)


@pytest.mark.parametrize("which", range(3))
def test_a_rank_that_adds_up_less_often_is_noticed_not_waited_for(which):
    with pytest.raises(RuntimeError, match="another rank has ended"):
        InTurns(3).run(lambda ranks: ranks.rank == which or ranks.barrier())


def test_vectors_of_two_lengths_are_noticed():
    with pytest.raises(ValueError, match="same shape"):
        InTurns(2).run(lambda ranks: ranks.sum_(np.zeros(1 + ranks.rank)))


def test_rank_0_goes_first():
    order = []

    def work(ranks):
        with ranks.first():
            order.append(ranks.rank)

    InTurns(3).run(work)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_ranks_in_turns_have_as_many_threads_as_who_plays_them(monkeypatch):
    limits, limit = [], numba.set_num_threads
    monkeypatch.setattr(parallel.numba, "set_num_threads", lambda n: limits.append(n) or limit(n))
    assert numba.get_num_threads() == 1  # of two, by conftest.py, but where the environment says one
    assert InTurns(3).run(lambda ranks: numba.get_num_threads()) == [1, 1, 1] and limits == [1, 1]


def test_a_copied_or_pickled_network_is_one_processs():
    model = InTurns(2).run(lambda ranks: trainer("nowhere", ranks, replace(CONFIG, architecture=NETWORKS["norms"])))[1]
    model = model.model
    assert model.share.ranks.size == 2 and not model.children["bn1"].share.whole
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.share.whole for _, layer in other.walk())


def test_what_ends_one_rank_ends_all_and_says_once_why(monkeypatch):
    """The others' message comes a second later: rank 0, which fails of the same, has ended them by then."""
    slept = []
    monkeypatch.setattr(parallel.time, "sleep", slept.append)
    for error, status in ((UserError("full"), 2), (KeyboardInterrupt(), 130), (ZeroDivisionError("full"), 1)):
        for rank, size in ((0, 1), (0, 2), (1, 2)):
            ranks, ended = parallel.Ranks(), []
            ranks.rank, ranks.size, ranks.fail = rank, size, ended.append
            with pytest.raises(type(error)) as caught, ranks.together():
                raise error
            assert ended == [status] * (size > 1) and slept == [1] * rank
            assert str(caught.value) == "rank 1: " * (rank == 1 and status == 2) + str(error)
            slept.clear()


@pytest.mark.parametrize(
    ("program", "flags", "wanted"),
    [
        (training, "--lr much", "auto"),
        (training, "--lr much --parallel mpi", "auto"),
        (training, "--lr much --parallel=none", "none"),  # of a job array: the others may be at work
        (attacking, "--n many", "none"),
        (attacking, "--n many --executor mpi", "auto"),
    ],
)
def test_what_argparse_refuses_is_refused_among_the_ranks(monkeypatch, program, flags, wanted):
    started, within, alone = [], [], parallel.Ranks()
    alone.together = lambda: contextlib.nullcontext(within.append(len(started)))
    monkeypatch.setattr(parallel, "start", lambda *how: started.append(how) or alone)
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    with pytest.raises(UserError, match=r"argument --[a-z]+: 'm[a-z]+' is not a") as caught:
        program.main()
    assert started == [(wanted, "cpu")] and within == [1] and caught.value.head.endswith("\nx: error:")


# --- a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 63, 64, 130])
def test_corners_of_later_rows_are_those_of_the_batch(before):
    words = rng.words(3, rng.CORNERS, 4, 9)
    whole = manifold.corners_of(np.zeros(500, np.float32), 0.5, words)
    assert np.array_equal(manifold.corners_of(np.zeros(300, np.float32), 0.5, words, before), whole[before:][:300])


@pytest.mark.parametrize("count", [2, 3, 12])
@pytest.mark.parametrize("method", DIVIDED)
def test_the_sum_of_gradients_is_the_one_processs(method, count):
    """Uneven rows (10 images), and ranks without any (12 ranks)."""
    constants = {"steps": 3} if "steps" in METHODS[method].constants else {}
    config = replace(CONFIG, method=method, constants=constants, gamma_h=30.0)
    (gradient, values, _), (expected, one, _) = stepped(count, config), stepped(1, config)
    assert far(gradient, expected) < 1e-6
    np.testing.assert_allclose(values, one, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("small", {}),
        ("small", dict(hamming_norm="sample")),
        ("norms", {}),
        ("norms", dict(hamming_norm="sample")),
        ("norms", dict(method="standard")),
        ("norms", dict(method="trades", constants={"steps": 2})),
        ("resnet", {}),
    ],
)
def test_in_float64_it_is_so_to_12_digits(network, options, count):
    """With batch norms too, of which float32's own rounding is amplified. Their running statistics are the batch's."""
    config = replace(CONFIG, architecture=NETWORKS[network], gamma_h=30.0, **options)
    found, expected = (stepped(n, config, dtype=np.float64) for n in (count, 1))
    assert far(found[0], expected[0]) < 1e-12
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-10)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", ["manifold", "standard"])
def test_the_cpus_kernels_of_batch_norm_and_relu_take_the_batchs_sums(method, count):
    """As far as one process's float32 is from float64, several times 1e-6: of the rows' own sums it would be 1e-2."""
    config = replace(CONFIG, architecture=NETWORKS["resnet"], gamma_h=30.0, method=method)
    found, expected = stepped(count, config), stepped(1, config)
    assert far(found[0], expected[0]) < 5e-5
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-6)


def test_batch_norms_between_ranks_without_rows():
    config = replace(CONFIG, architecture=NETWORKS["norms"], batch_size=2)
    found, expected = (stepped(n, config, dtype=np.float64) for n in (5, 1))
    assert far(found[0], expected[0]) < 1e-10  # of two images: the variances are small
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-12)


def sums(monkeypatch, config):
    """The lengths of the sums of one step by two ranks."""
    lengths, added = [], parallel._Played.sum_

    def noted(self, vector):
        if self.rank == 0:
            lengths.append(len(vector))
        return added(self, vector)

    monkeypatch.setattr(parallel._Played, "sum_", noted)
    stepped(2, config)
    return lengths


def test_a_step_is_one_sum_and_small_ones_in_the_middle(monkeypatch):
    size = models.build(CONFIG.architecture).weights.size
    assert sums(monkeypatch, replace(CONFIG, method="standard")) == [size + 3]  # loss, cross-entropy, who stops
    assert sums(monkeypatch, CONFIG) == [1, size + 5]  # the norm of one layer of ReLUs
    assert sums(monkeypatch, replace(CONFIG, hamming_norm="sample")) == [size + 5]
    config = replace(CONFIG, architecture=NETWORKS["norms"], method="standard")
    size = models.build(config.architecture).weights.size
    assert sums(monkeypatch, config) == [32, 64, 16, 16, 64, 32, size + 3]
    config = replace(config, local_batchnorm=True)
    assert sums(monkeypatch, config) == [size + 2 * (16 + 32 + 8) + 3]


def test_local_batch_norms_are_another_algorithm_with_one_running_statistic():
    config = replace(CONFIG, architecture=NETWORKS["norms"])
    local, whole = stepped(2, replace(config, local_batchnorm=True)), stepped(2, config)
    assert far(local[0], whole[0]) > 1e-2
    halves = stepped(1, replace(config, local_batchnorm=True))
    assert far(halves[0], whole[0]) < 1e-4  # of one process they are the batch's


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(DIVIDED)))
@pytest.mark.parametrize(("exact", "advice"), [(False, "use --par"), (True, "leave out --exact, and use --par")])
def test_what_cannot_be_divided_is_refused_before_it_begins(method, exact, advice, tmp_path):
    said = rf"--method {method} cannot be divided among ranks \(manifold, .*\): {advice}"
    with pytest.raises(UserError, match=said):
        run(tmp_path / "x", 2, replace(CONFIG, method=method, exact=exact))
    assert not (tmp_path / "x").exists()


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run by one process."""
    folder = tmp_path_factory.mktemp("straight")
    trainer(folder).run()
    return folder


def assert_close(folder, other, tolerance=1e-3):
    """Two runs that differ by rounding, which a dozen steps amplify."""
    (tensors, metadata), (others, _) = (checkpoint.load_tensors(f / "last.safetensors") for f in (folder, other))
    for name, value in others.items():
        assert far(tensors[name].astype(float), value.astype(float)) < tolerance or name.endswith("tracked"), name
    for line, one in zip(log(folder), log(other), strict=True):
        for key in ("loss", "cross_entropy", "intrinsic", "hamming", "gradient_norm"):
            assert line[key] == pytest.approx(one[key], rel=1e-4)
        assert line["epoch"] == one["epoch"] and line["accuracy"] == pytest.approx(one["accuracy"], abs=0.1)
    return metadata


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_is_the_one_processs_and_rank_0_alone_writes(straight, tmp_path, monkeypatch, count):
    written, write = [], checkpoint.write_atomic

    def noted(path, contents):
        written.append(Path(path).name)
        write(path, contents)

    monkeypatch.setattr(checkpoint, "write_atomic", noted)
    run(tmp_path, count)
    assert written == ["log.jsonl", *3 * ["model.safetensors", "last.safetensors"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.safetensors", "log.jsonl", "model.safetensors"]
    assert_close(tmp_path, straight)
    assert [line["ranks"] for line in log(tmp_path)] == [count] * 2 and "ranks" not in log(straight)[0]


@pytest.mark.parametrize("then", [1, 3])
def test_ctrl_c_on_any_rank_stops_all_saved_and_another_number_goes_on(straight, tmp_path, monkeypatch, then, capsys):
    over_ranks = Trainer._over_ranks

    def signalled(self, parts):
        if self.step == STEPS + 2 and self.ranks.rank == 1:
            self.caught.append(signal.SIGINT)
        return over_ranks(self, parts)

    monkeypatch.setattr(Trainer, "_over_ranks", signalled)
    ended, waits, barrier = [], [], parallel._Played.barrier

    def waited(self):
        waits.append((self.rank, checkpoint.load_tensors(tmp_path / "last.safetensors")[1]["state"]["step"]))
        barrier(self)

    monkeypatch.setattr(parallel._Played, "barrier", waited)

    def work(ranks):
        with pytest.raises(Interrupted, match=f"stopped after {STEPS + 3} of {2 * STEPS} steps and saved"):
            trainer(tmp_path, ranks).run()
        ended.append((ranks.rank, checkpoint.load_tensors(tmp_path / "last.safetensors")[1]["state"]["step"]))

    InTurns(2).run(work)
    assert ended == [(0, STEPS + 3), (1, STEPS + 3)]
    assert waits[-2:] == ended  # the last that both do is to wait for each other, rank 0 when it has saved
    monkeypatch.undo()
    run(tmp_path, then, resume=True)
    assert_close(tmp_path, straight)


def test_a_rank_without_rows_is_heard_too(tmp_path):
    def work(ranks):
        one = trainer(tmp_path, ranks, replace(CONFIG, batch_size=2))
        one.caught = [signal.SIGINT] * (ranks.rank == 2)
        one.train_step()
        return one.share.weight, one.stopping

    assert InTurns(4).run(work) == [(0, True), (0.5, True), (0, True), (0.5, True)]  # no rows, 0, none, 1


def test_rank_0_compiles_before_the_others_look(tmp_path, monkeypatch):
    steps, step = [], Trainer.train_step

    def noted(self):
        steps.append((self.ranks.rank, self.ranks.size))
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", noted)
    run(tmp_path, 2, replace(CONFIG, epochs=1))
    assert steps[0] == (0, 1) and steps.count((0, 1)) == 1 and steps.count((1, 2)) == STEPS


@pytest.mark.parametrize(
    ("who", "what"),
    [
        (0, lambda one: one.model.weights),
        (1, lambda one: one.model.weights),
        (1, lambda one: one.optimizer.state["velocity"]),
        (1, lambda one: one.model.children["bn2"].buffers["running_var"]),
    ],
)
def test_what_drifts_apart_is_noticed(tmp_path, monkeypatch, who, what):
    step = Trainer.train_step

    def drifting(self):
        values = step(self)
        if self.ranks.size > 1 and self.ranks.rank == who and self.step == 4:
            what(self)[5] += 1e-6
        return values

    monkeypatch.setattr(Trainer, "train_step", drifting)
    monkeypatch.setattr(train, "COMPARE_EVERY", 4)
    with pytest.raises(UserError, match=r"1 of 2 ranks have another .* than rank 0 \(step 4\): start all"):
        run(tmp_path, 2, replace(CONFIG, architecture=NETWORKS["norms"]))


@pytest.mark.parametrize("what", ["lr", "labels", "source"])
def test_ranks_of_two_runs_do_not_begin(tmp_path, what):
    def work(ranks):
        dataset, config = toy(), CONFIG
        if what == "lr" and ranks.rank:
            config = replace(CONFIG, lr=2 * CONFIG.lr)
        if what == "labels" and ranks.rank:
            dataset.train_labels[:5] = 0
        if what == "source" and ranks.rank:
            dataset.source["sha256"] = "another file's"
        Trainer(config, dataset, tmp_path, ranks=ranks).run()

    with pytest.raises(UserError, match="1 of 2 ranks have another configuration"):
        InTurns(2).run(work)
    assert not (tmp_path / "last.safetensors").exists()


def test_rank_0_with_a_full_disk_ends_all_and_leaves_no_half_file(tmp_path, monkeypatch):
    renames, rename = [], os.replace

    def full(source, target):
        renames.append(target)
        if len(renames) > 3:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(tmp_path, 3)
    assert checkpoint.load_tensors(tmp_path / "last.safetensors")[1]["state"]["step"] == 0
    assert not list(tmp_path.glob(".*.tmp"))


def test_nan_is_every_ranks(tmp_path):
    with pytest.raises(UserError, match="became NaN or infinite"):
        run(tmp_path, 2, replace(CONFIG, lr=1e9, clip=0.0))


def test_the_log_and_the_folder_are_rank_0s(tmp_path):
    def work(ranks):
        one = trainer(tmp_path / str(ranks.rank), ranks)
        with one.own_folder():
            one.save()

    InTurns(2).run(work)
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


# --- exact ------------------------------------------------------------------------------------------------------------

EXACT = replace(CONFIG, architecture=NETWORKS["norms"], exact=True, epochs=1)


def exactly(folder, processes, config=EXACT, resume=False):
    def work(ranks):
        one = trainer(folder, ranks, config)
        if resume:
            one.resume()
        one.run()

    InTurns(processes).run(lambda outer: parallel.play(work, outer))
    return [(folder / name).read_bytes() for name in ("model.safetensors", "last.safetensors")]


def test_exact_runs_have_the_same_bits_on_1_to_4_processes(tmp_path, monkeypatch):
    one = exactly(tmp_path / "1", 1)
    assert all(exactly(tmp_path / str(count), count) == one for count in (2, 3, 4))
    plain = [(tmp_path / name, count) for name, count in (("two", 2), ("three", 3))]
    for folder, count in plain:
        run(folder, count, EXACT)
    assert len({(folder / "model.safetensors").read_bytes() for folder, _ in plain}) == 2  # as others do not


def test_exact_takes_what_divides_it():
    with pytest.raises(UserError, match="--exact takes a number of ranks that divides 12, not 5"):
        InTurns(5).run(lambda outer: parallel.play(lambda ranks: None, outer))


# --- who starts them --------------------------------------------------------------------------------------------------


@pytest.fixture
def unlaunched(monkeypatch):
    for name in parallel.LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def test_a_process_that_nobody_launched_is_alone_and_imports_no_mpi(unlaunched, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # its import would fail
    assert parallel.start() is ALONE and parallel.start("none") is ALONE
    assert WHOLE.whole and Share(ALONE, 7).rows == slice(0, 7)


def test_without_mpi4py_ranks_are_refused_in_one_line(unlaunched, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"need mpi4py and an MPI library .*pip install 'nanomr\[mpi\]', or --parallel"):
        parallel.start("mpi")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="need mpi4py"):
        parallel.start()
    assert parallel.start("none") is ALONE


class Comm:
    """What we use of an mpi4py communicator, between ranks in turns."""

    def __init__(self, ranks):
        self.ranks, self.Get_rank, self.Get_size = ranks, lambda: ranks.rank, lambda: ranks.size
        self.Barrier, self.Bcast = ranks.barrier, ranks.broadcast_
        self.Iallreduce, self.Ibcast = self.at_once(self.Allreduce), self.at_once(self.Bcast)

    def at_once(self, call):
        """A call that returns a request, which has ended already."""

        def begin(*args):
            call(*args)
            return types.SimpleNamespace(Test=lambda: True)

        return begin

    def Split_type(self, kind):
        return self

    def Allreduce(self, mine, into, op=None):
        assert isinstance(into, np.ndarray)
        if isinstance(mine, np.ndarray):
            into[...] = mine
        if op == "min":
            into[...] = self.ranks.sum_(into) == self.ranks.size
        else:
            self.ranks.sum_(into)


@pytest.fixture
def mpi4py(monkeypatch, unlaunched):
    """A module of this name; its COMM_WORLD is ``world``'s."""
    world = types.SimpleNamespace(IN_PLACE="in place", MIN="min", COMM_TYPE_SHARED=0, COMM_WORLD=Comm(ALONE))
    module = types.ModuleType("mpi4py")
    module.MPI = world
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", world)
    monkeypatch.setattr(parallel, "threadpool_limits", lambda threads: None)
    return world


def test_an_mpiexec_of_another_library_is_noticed(mpi4py, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="this mpiexec is of another MPI library than mpi4py's"):
        parallel.start()


def test_ranks_of_one_machine_divide_its_cores(mpi4py, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(parallel.numba.config, "NUMBA_NUM_THREADS", 64)
    threads = []
    monkeypatch.setattr(parallel.numba, "set_num_threads", threads.append)
    InTurns(3).run(lambda ranks: parallel._keep_to_own_cores(Comm(ranks)))
    assert sorted(threads[-3:]) == [2, 2, 2]

    def bound(ranks):  # by the launcher, each to cores of its own
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4 * ranks.rank, 4 * ranks.rank + 4), raising=False)
        parallel._keep_to_own_cores(Comm(ranks))

    InTurns(2).run(bound)
    assert threads[-2:] == [4, 4]


def test_mpi_ranks_add_up_arrays_of_the_host_and_of_a_device(mpi4py, cupy):
    def work(ranks):
        one = parallel.Mpi(Comm(ranks))
        assert (one.rank, one.size) == (ranks.rank, ranks.size)
        vector = cupy.asarray(np.array([1.0, ranks.rank], np.float32))
        assert one.sum_(vector) is vector and one.broadcast_(cupy.asarray(np.arange(2.0) + ranks.rank)).tolist() == [
            0,
            1,
        ]
        one.barrier()
        return vector.tolist(), one.sum_(np.array([2.0])).tolist()

    assert InTurns(3).run(work) == [([3.0, 3.0], [6.0])] * 3


@pytest.mark.parametrize("rank", [0, 2])
def test_a_sum_to_which_not_all_come_is_waited_for_so_long(mpi4py, monkeypatch, rank):
    """Rank 2 for two seconds more, in which rank 0 has said so and ended it."""
    comm, clock = Comm(ALONE), [0.0]

    class Request:
        def Test(self):
            clock[0] += 0.5
            assert clock[0] < 100, "it waits for ever"

    comm.Get_rank = lambda: rank
    comm.Iallreduce = comm.Ibcast = lambda *args: Request()
    monkeypatch.setattr(parallel.time, "monotonic", lambda: clock[0])
    ranks = parallel.Mpi(comm, timeout=5)
    for call, what in ((ranks.sum_, "the sum"), (ranks.broadcast_, "the broadcast")):
        clock[0] = 0.0
        with pytest.raises(UserError, match=f"for 5 s not all ranks have come to {what} of 1,000 numbers.*--par"):
            call(np.zeros(1000))
        assert clock[0] == 5.5 + rank
    with pytest.raises(AssertionError, match="it waits for ever"):
        parallel.Mpi(comm, timeout=float("inf")).sum_(np.zeros(1))  # --parallel-timeout 0


def stand_in_nccl():
    """A NCCL whose communicators add up memory that they know by its address."""
    name = tuple(range(-64, 64))
    kinds = {7: ctypes.c_float, 8: ctypes.c_double}

    class Communicator:
        def __init__(self, size, given, rank):
            assert given == name
            self.ranks = stand_in_nccl.ranks[rank]
            assert self.ranks.size == size

        def allReduce(self, source, target, count, kind, operation, stream):
            assert source == target and operation == 0
            self.ranks.sum_(np.ctypeslib.as_array(ctypes.cast(target, ctypes.POINTER(kinds[kind])), (count,)))

    return types.SimpleNamespace(
        available=True, NCCL_FLOAT32=7, NCCL_FLOAT64=8, NCCL_SUM=0, get_unique_id=lambda: name,
        NcclCommunicator=Communicator,
    )  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch, mpi4py):
    """CuPy with NCCL and two devices, as fake_cupy.py and this file have them."""
    import fake_cupy
    import shim

    if shim.missing():
        pytest.skip(shim.missing())
    fake_cupy.install(monkeypatch)
    cuda, used = sys.modules["cupy"].cuda, []
    monkeypatch.setattr(cuda, "nccl", stand_in_nccl(), raising=False)
    monkeypatch.setattr(cuda, "Device", lambda i=0: types.SimpleNamespace(use=lambda: used.append(i)))
    monkeypatch.setattr(cuda.runtime, "getDeviceCount", lambda: 2, raising=False)
    stand_in_nccl.ranks = {}
    yield used
    fake_cupy.forget()


def nccl_ranks(mpi4py, ranks, wanted="auto"):
    stand_in_nccl.ranks[ranks.rank] = ranks
    ranks.barrier()
    mpi4py.COMM_WORLD = Comm(ranks)
    os.environ["PMI_SIZE"] = str(ranks.size)
    return parallel.start(wanted)


def test_nccl_adds_up_on_the_devices_one_for_each_rank(stand_in, mpi4py, monkeypatch):
    import fake_cupy as cupy

    monkeypatch.setenv("PMI_SIZE", "2")
    fetched = []

    def work(ranks):
        one = nccl_ranks(mpi4py, ranks)
        assert type(one) is Nccl
        vector = cupy.asarray(np.array([1, ranks.rank, 2.5], np.float32))
        get, cupy.ndarray.get = cupy.ndarray.get, lambda self: fetched.append(self) or get(self)
        one.sum_(vector)
        cupy.ndarray.get = get
        return vector.tolist(), one.sum_(cupy.asarray(np.ones(2))).tolist(), one.sum_(np.ones(1)).tolist()

    assert InTurns(2).run(work) == [([2.0, 1.0, 5.0], [2.0, 2.0], [2.0])] * 2
    assert not fetched and sorted(stand_in) == [0, 1]


def test_more_ranks_than_gpus_go_by_way_of_the_host_or_are_refused(stand_in, mpi4py, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "3")
    assert all(type(one) is parallel.Mpi for one in InTurns(3).run(lambda ranks: nccl_ranks(mpi4py, ranks)))
    with pytest.raises(UserError, match=r"--parallel nccl needs CuPy, NCCL .* 2 GPUs, 3 ranks; or --parallel mpi"):
        InTurns(3).run(lambda ranks: nccl_ranks(mpi4py, ranks, "nccl"))


def test_one_machine_without_gpus_is_enough_for_all_to_go_by_way_of_the_host(stand_in, mpi4py, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    devices = {}  # of each rank's machine
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDeviceCount", lambda: devices[threading.get_ident()])

    def work(ranks):
        devices[threading.get_ident()] = 2 if ranks.rank == 0 else 0
        return type(nccl_ranks(mpi4py, ranks))

    assert InTurns(2).run(work) == [parallel.Mpi] * 2


@pytest.mark.parametrize("network", ["norms", "resnet"])
def test_a_step_on_devices_is_the_one_processs(stand_in, mpi4py, monkeypatch, network):
    monkeypatch.setenv("PMI_SIZE", "2")
    config = replace(CONFIG, architecture=NETWORKS[network])

    def work(ranks):
        one = trainer("nowhere", nccl_ranks(mpi4py, ranks) if ranks.size > 1 else ALONE, config, device="gpu")
        found = []
        one.optimizer.step = lambda lr: found.append(one.model.gradients.get()) or 0.0
        return (one.train_step(), found[0])[::-1]

    (expected, one), (found, values) = InTurns(1).run(work)[0], InTurns(2).run(work)[1]
    assert far(found, expected) < 1e-5
    np.testing.assert_allclose(values, one, rtol=1e-4)


@pytest.mark.gpu
def test_nccl_of_one_gpu():
    cupy, MPI = pytest.importorskip("cupy"), pytest.importorskip("mpi4py.MPI")
    if parallel.nccl() is None:
        pytest.skip("CuPy finds no NCCL (pip install nvidia-nccl-cu12)")
    ranks = Nccl(MPI.COMM_SELF)
    for dtype in (np.float32, np.float64):
        assert ranks.sum_(cupy.arange(5, dtype=dtype)).get().tolist() == [0, 1, 2, 3, 4]


# --- ranks of MPI -----------------------------------------------------------------------------------------------------

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
TINY = "--model mlp --hold-out 100 --batch-size 64 --epochs 2 --test-images 0 --lr 0.05 --out x".split()
needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIEXEC is None, reason="no mpi4py and mpiexec (nanomr[mpi])"
)
DURING = """
step = train.Trainer.train_step
def {name}(self):
    if self.ranks.size > 1 and self.ranks.rank == {rank} and self.step == {step}:
        {what}
    return step(self)
train.Trainer.train_step = {name}
"""


def launch(place, count, *arguments, rank=0, step=-1, what="pass", patches=None):
    """(exit code, stdout, stderr) of train_cifar.py by ``count`` ranks, one of which does ``what`` in a step."""
    patches = patches or DURING.format(name="disturbed", rank=rank, step=step, what=what)
    process = programs.start(
        "train", place, *arguments, train=400, test=60, patches=patches, launcher=(MPIEXEC, "-n", str(count)),
        runner="mpi4py",
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """The folder of a run by one process."""
    place = tmp_path_factory.mktemp("one")
    process = programs.start("train", place, *TINY, train=400, test=60)
    assert process.communicate(timeout=300) and process.returncode == 0
    return place / "x"


def steps_of(folder):
    return checkpoint.load_tensors(folder / "last.safetensors")[1]["state"]["step"]


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("count", [2, 3])
def test_mpi_ranks_train_the_one_processs_network_though_one_comes_late(by_one, tmp_path, count):
    code, out, err = launch(tmp_path, count, *TINY, rank=1, step=2, what="time.sleep(2)")
    assert code == 0, err
    assert f"{count} ranks, {64 // count} of 64 images here" in out and out.count('"run"') == 1
    assert_close(tmp_path / "x", by_one)


@pytest.mark.slow
@needs_mpi
def test_exact_mpi_ranks_have_the_same_bits(tmp_path):
    files = []
    for count in (1, 2, 3):
        (tmp_path / str(count)).mkdir()
        code, _, err = launch(tmp_path / str(count), count, *TINY, "--exact", "--epochs", 1)
        assert code == 0, err
        files.append((tmp_path / str(count) / "x" / "last.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("os.kill(os.getpid(), 9)", (9, 137), "signal 9"),
        ("raise program.UserError('had enough')", (2,), "had enough"),
        ("1 / 0", (1,), "ZeroDivisionError"),
    ],
)
def test_a_rank_that_fails_ends_all_within_seconds(tmp_path, rank, what, code, said):
    marked = f"open('failed', 'w').close(); {what}"
    found, out, err = launch(tmp_path, 2, *TINY, rank=rank, step=3, what=marked)
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 30  # "seconds", on a machine that is busy
    assert found in code and said in out + err and (rank == 0 or what[0] != "r" or "error: rank 1: had enough" in err)
    assert steps_of(tmp_path / "x") == 0
    assert not [p for p in (tmp_path / "x").iterdir() if p.name.endswith(".tmp")]


@pytest.mark.slow
@needs_mpi
def test_a_full_disk_of_rank_0_is_one_line_and_no_half_file(tmp_path):
    patches = """
rename = os.replace
def full(source, target):
    if "last" in str(target) and os.path.exists(target):
        raise OSError(28, "No space left on device")
    return rename(source, target)
os.replace = full
"""
    code, _, err = launch(tmp_path, 2, *TINY, patches=patches)
    assert code == 2 and err.count("error:") == 1 and "No space left on device" in err and "Traceback" not in err
    assert steps_of(tmp_path / "x") == 0 and not list((tmp_path / "x").glob(".*.tmp"))


@pytest.mark.slow
@needs_mpi
def test_what_all_ranks_refuse_rank_0_says_once(tmp_path):
    code, out, err = launch(tmp_path, 3, *TINY, "--method", "fgsm")
    assert code == 2 and out == "" and err.count("error:") == 1 and "rank 1" not in err


@pytest.mark.slow
@needs_mpi
def test_what_argparse_refuses_rank_0_says_once(tmp_path):
    code, out, err = launch(tmp_path, 2, *TINY, "--lr", "much")
    assert code == 2 and out == "" and err.count("usage:") == 1 and "rank 1" not in err
    assert err.count("error:") == 1 and "run.py: error: argument --lr: 'much' is not" in err


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_all_after_so_long(tmp_path, rank):
    """But not while rank 0 compiles, which takes twice as long here."""
    hang = DURING.format(name="hanging", rank=rank, step=3, what="open('hung', 'w').close(); time.sleep(600)")
    slow = """
before = train.Trainer.train_step
def compiling(self):
    time.sleep(4 * (self.ranks.size == 1))
    return before(self)
train.Trainer.train_step = compiling
"""
    code, _, err = launch(tmp_path, 2, *TINY, "--parallel-timeout", 2, patches=hang + slow)
    assert time.time() - (tmp_path / "hung").stat().st_mtime < 30  # of which 2 or 3 are the limit's
    who = "error: " if rank else "error: rank 1: "
    assert code == 2 and err.count("error:") == 1 and f"{who}for 2 s not all ranks have come to the sum of" in err
    assert steps_of(tmp_path / "x") == 0 and not list((tmp_path / "x").glob(".*.tmp"))


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("then", [1, 3])
def test_sigint_of_one_rank_saves_and_other_numbers_go_on(by_one, tmp_path, then):
    code, out, err = launch(tmp_path, 2, *TINY, rank=1, step=2, what="os.kill(os.getpid(), 2)")
    assert code == 130 and "stopped after 3 of 8 steps and saved: go on with --resume x" in out, err
    assert steps_of(tmp_path / "x") == 3
    code, _, err = launch(tmp_path, then, "--resume", "x", "--test-images", 0)
    assert code == 0, err
    assert_close(tmp_path / "x", by_one)
