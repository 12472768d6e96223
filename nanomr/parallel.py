"""Several processes that train as one: who adds up, and which rows of a batch each computes. ``docs/distributed.md``.

Every rank has all the weights, draws the whole batch from (seed, step), computes its rows of it, and takes the same
step as all others, by the sum of their gradients.
"""

import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import numba
import numpy as np
from threadpoolctl import threadpool_limits

from .backend import array_module, find_cupy, gpu_available, to_numpy
from .errors import UserError

TIMEOUT = 1800.0  # seconds that a rank waits for the others: rank 0 looks at held-out images meanwhile, and saves
PARTS = 12  # ranks of an exact run, whoever plays them: 1, 2, 3, 4, 6 or 12 processes


class Ranks:
    """``rank`` of ``size`` processes, and what they do together. This one is alone, and has nothing to add up.

    A vector is flat and contiguous, NumPy's or CuPy's. All ranks call the same in the same order, with vectors of one
    length and dtype; all find the same bits in theirs. For a sum or a broadcast they wait as long as the backend says,
    at a barrier until all have come.
    """

    rank, size = 0, 1

    def sum_(self, vector):
        """``vector``, in place the sum of all ranks'."""
        return vector

    def broadcast_(self, vector):
        """``vector``, in place that of rank 0."""
        return vector

    def barrier(self):
        """Wait until all have come here."""

    def fail(self, status: int):
        """What is to be done within an ``except``, for this process's exit to end the others."""

    @contextmanager
    def first(self):
        """Within it, rank 0 is alone: what it leaves on the disk (kernels, a data set), the others find there."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    @contextmanager
    def together(self):
        """Within it, a rank that fails ends all, with its message."""
        try:
            yield
        except BaseException as error:
            if self.size == 1:
                raise
            self.fail(2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1)
            if self.rank == 0:
                raise
            time.sleep(1)  # where all fail of one thing, rank 0 says so, and ends this one before it does
            if isinstance(error, UserError):
                raise UserError(f"rank {self.rank}: {error}") from None
            raise


ALONE = Ranks()


class Mpi(Ranks):
    """The processes of an MPI communicator (mpi4py's). Device arrays go by way of the host.

    A sum or a broadcast to which the others have not come within ``timeout`` seconds is a UserError: one of them hangs.
    """

    def __init__(self, comm, timeout: float = TIMEOUT):
        self.comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()
        self.timeout = timeout

    def _on_host(self, begin, vector, what):
        """``begin(host)`` is a request of MPI's; asking for its end is as fast as a call that returns at its end."""
        host = to_numpy(vector)
        request, began = begin(host), time.monotonic()
        while not request.Test():
            if time.monotonic() - began > self.timeout + self.rank:  # of all that wait, one is the first to say so
                raise UserError(
                    f"for {self.timeout:g} s not all ranks have come to {what} of {host.size:,} numbers: one hangs, or "
                    "needs longer (--parallel-timeout)"
                )
        if host is not vector:
            vector[...] = array_module(vector).asarray(host)
        return vector

    def sum_(self, vector):
        from mpi4py.MPI import IN_PLACE

        return self._on_host(lambda host: self.comm.Iallreduce(IN_PLACE, host), vector, "the sum")

    def broadcast_(self, vector):
        return self._on_host(self.comm.Ibcast, vector, "the broadcast")

    def barrier(self):
        self.comm.Barrier()

    def fail(self, status):
        from mpi4py.run import set_abort_status  # as `python -m mpi4py` does, which need not be there then

        set_abort_status(status)


class Nccl(Mpi):
    """The same, where each process has a GPU of its own: NCCL adds device arrays up, without a limit of time; MPI does
    all else."""

    def __init__(self, comm, timeout: float = TIMEOUT):
        super().__init__(comm, timeout)
        self.nccl = nccl()
        name = np.array(self.nccl.get_unique_id() if self.rank == 0 else [0] * 128, np.int8)
        comm.Bcast(name)
        self.communicator = self.nccl.NcclCommunicator(self.size, tuple(name.tolist()), self.rank)

    def sum_(self, vector):
        if array_module(vector) is np:
            return super().sum_(vector)
        kind = {"float32": self.nccl.NCCL_FLOAT32, "float64": self.nccl.NCCL_FLOAT64}[vector.dtype.name]
        pointer, stream = vector.data.ptr, find_cupy().cuda.get_current_stream().ptr
        self.communicator.allReduce(pointer, pointer, vector.size, kind, self.nccl.NCCL_SUM, stream)
        return vector


class InTurns:
    """``count`` ranks played by each of the ``outer`` ones: threads, of which one at a time runs, from sum to sum.

    They add up row by row, in the order of their ranks: the bits do not depend on how many processes play them.
    """

    def __init__(self, count: int, outer: Ranks = ALONE):
        self.count, self.outer = count, outer
        self.turns = [threading.Semaphore(0) for _ in range(count)]
        self.given: list = [None] * count
        self.sums, self.result, self.ended, self.failure = 0, None, False, None

    def run(self, work: Callable) -> list:
        """[work(ranks) for each of them], the first in this thread. Raises what the first one that failed raised."""
        results, limit = [None] * self.count, numba.get_num_threads()

        def play(i):
            try:
                if i:
                    self.turns[i].acquire()
                    numba.set_num_threads(limit)  # which is a thread's own
                if self.failure is None:
                    results[i] = work(_Played(self, i))
            except BaseException as error:
                self.failure = self.failure or error
            self.ended = True
            self.turns[(i + 1) % self.count].release()

        threads = [threading.Thread(target=play, args=(i,), daemon=True) for i in range(1, self.count)]
        for thread in threads:
            thread.start()
        play(0)
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return results

    def exchange(self, i, vector, combine):
        """``vector``, in place the ``combine`` of what all played ranks give, which the last of them calls."""
        mine = self.sums
        if not self.ended:
            self.given[i] = vector
            if i == self.count - 1:
                self.result = combine(np.stack([to_numpy(each) for each in self.given]))
                self.sums += 1
            self.turns[(i + 1) % self.count].release()
            self.turns[i].acquire()
        if self.sums == mine:
            raise RuntimeError("another rank has ended, and this one waits for a sum with it")
        vector[...] = array_module(vector).asarray(self.result)
        return vector


class _Played(Ranks):
    def __init__(self, stage: InTurns, i: int):
        self.stage, self.i = stage, i
        self.rank, self.size = stage.outer.rank * stage.count + i, stage.outer.size * stage.count

    def sum_(self, vector):
        def combine(rows):
            every = np.zeros((self.size, *rows.shape[1:]), rows.dtype)
            every[self.rank - self.i :][: len(rows)] = rows
            self.stage.outer.sum_(every.reshape(-1))  # with zeros: nothing is rounded
            total = np.zeros_like(rows[0])
            for row in every:
                total += row
            return total

        return self.stage.exchange(self.i, vector, combine)

    def broadcast_(self, vector):
        return self.stage.exchange(self.i, vector, lambda rows: self.stage.outer.broadcast_(rows[0]))

    def barrier(self):
        self.sum_(np.zeros(1))


def play(work: Callable, ranks: Ranks):
    """``work`` of :data:`PARTS` ranks, divided among these: what the first of this process's makes of it."""
    if PARTS % ranks.size:
        raise UserError(f"--exact takes a number of ranks that divides {PARTS}, not {ranks.size}")
    return InTurns(PARTS // ranks.size, ranks).run(work)[0]


class Share:
    """A rank's ``rows`` of a batch of ``n`` images, which count with ``weight``, their share of them.

    What we minimise is a mean over the batch, and so are the statistics of a batch norm: the weighted sum of the ranks'
    means. A rank without rows computes the first image, with weight 0: it is there for every sum.
    """

    def __init__(self, ranks: Ranks, n: int):
        start, stop = (n * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        self.ranks, self.n, self.weight = ranks, n, (stop - start) / n
        self.rows = slice(start, stop) if stop > start else slice(0, 1)

    def __reduce__(self):  # of a copied or pickled network
        return Share, (ALONE, 1)

    @property
    def whole(self) -> bool:
        """Is it all of the batch?"""
        return self.ranks.size == 1

    def scaled(self, count: int) -> int:
        """How many there are in the batch, of what there are ``count`` in the rows."""
        return count if self.whole else count * self.n // (self.rows.stop - self.rows.start)

    def means(self, *arrays):
        """The means over the batch, of those over its rows: arrays of one device, which are added up in float64."""
        if self.whole:
            return arrays
        xp = array_module(arrays[0])
        flat = xp.concatenate([a.ravel() for a in arrays]).astype(np.float64)
        flat *= self.weight
        self.ranks.sum_(flat)
        ends = np.cumsum([a.size for a in arrays]).tolist()
        parts = zip(arrays, [0, *ends], ends, strict=False)
        return [flat[start:end].reshape(a.shape).astype(a.dtype) for a, start, end in parts]

    def moments(self, mean, var):
        """(mean, var) (C,) over the batch, of those over its rows."""
        if self.whole:
            return mean, var
        wide = mean.astype(np.float64)
        wide, squares = self.means(wide, var + wide * wide)
        return wide.astype(mean.dtype), array_module(wide).maximum(squares - wide * wide, 0).astype(var.dtype)


WHOLE = Share(ALONE, 1)  # the batch, however large it is


# --- who starts them --------------------------------------------------------------------------------------------------

LAUNCHED = ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE")  # what launchers of MPI (mpiexec, srun) leave behind


def start(wanted: str = "auto", device: str = "auto", timeout: float = TIMEOUT) -> Ranks:
    """The ranks that this process is one of, by ``--parallel auto|none|mpi|nccl``: "auto" is one alone, unless mpiexec
    started it. Each keeps to its part of the machine's cores, takes a GPU of its own, and waits for the others for
    ``timeout`` seconds. Raises UserError."""
    launched = any(name in os.environ for name in LAUNCHED)
    if wanted == "none" or (wanted == "auto" and not launched):
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"several ranks need mpi4py and an MPI library ({error}): pip install 'nanomr[mpi]', or --parallel none"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() == 1 and int(os.environ.get("PMI_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", 1))) > 1:
        raise UserError("this mpiexec is of another MPI library than mpi4py's: use the one that lies beside python")
    here = comm.Split_type(MPI.COMM_TYPE_SHARED)
    if comm.Get_size() > 1:
        _keep_to_own_cores(here)
    gpus = find_cupy().cuda.runtime.getDeviceCount() if device != "cpu" and gpu_available() else 0
    if gpus:
        find_cupy().cuda.Device(here.Get_rank() % gpus).use()
    one_each = np.array([gpus >= here.Get_size() and nccl() is not None], np.int32)
    comm.Allreduce(MPI.IN_PLACE, one_each, MPI.MIN)  # on all machines, or on none
    if wanted == "nccl" and not one_each:
        raise UserError(
            f"--parallel nccl needs CuPy, NCCL (pip install 'nanomr[nccl12]', or [nccl13]) and a GPU a rank: here "
            f"are {gpus} GPUs, {here.Get_size()} ranks{'' if nccl() else ', and no NCCL'}; or --parallel mpi"
        )
    kind = Nccl if one_each and (wanted == "nccl" or comm.Get_size() > 1) else Mpi
    return kind(comm, timeout)


def nccl():
    """CuPy's NCCL module; None where CuPy or the library is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CuPy, which says what to install
        found = getattr(getattr(find_cupy(), "cuda", None), "nccl", None)
    return found if getattr(found, "available", False) else None


def _keep_to_own_cores(here):
    """As many threads as this rank has cores, where those ``here``, on one machine, may share them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    mine = np.zeros(4096)
    mine[cores] = 1
    users = np.zeros_like(mine)
    here.Allreduce(mine, users)
    threads = max(1, int((mine[cores] / users[cores]).sum() + 1e-9))
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    threadpool_limits(threads)
