"""Can the margin of one image come down to a threshold in its box? A mixed-integer program, decided by HiGHS.

The big-M model of Tjeng, Xiao and Tedrake (2019), collapsed: only the ReLUs that are unstable in the box get
variables, and everything between them is multiplied out (:mod:`~nanomr.verify.exact.collapsed`). The question is put as
"margin <= threshold: infeasible?", not "how small is the margin?": that is the faster one by far.

It begins where the root of a tree (:mod:`~nanomr.verify.exact.bab`) ends: with bounds of the ReLUs' inputs at the
images with margin <= threshold alone.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import highspy
import numpy as np

from ..chain import Chain
from .bab import branch_and_bound
from .collapsed import Collapsed, collapse

SMALL = 1e-9  # HiGHS drops matrix entries up to this size
SLACK = 1e-8  # every bound and the threshold are this much (relatively) looser than asked for: rounding stays inside
GRACE = 1.0  # seconds that HiGHS may take to notice an interrupt; then its process is killed
LARGE = 1e15  # HiGHS refuses larger matrix entries
OPTIONS = {
    "output_flag": False,
    "threads": 1,
    "parallel": "off",
    "mip_max_improving_sols": 1,
    "mip_feasibility_tolerance": 1e-9,
    "primal_feasibility_tolerance": 1e-9,
    "dual_feasibility_tolerance": 1e-9,
    "small_matrix_value": SMALL,
    "large_matrix_value": LARGE,
}


class Answer(NamedTuple):
    """What became of the question "is there an image in the box with margin <= threshold?".

    status: "infeasible" (there is none), "candidate" (``image``, to be checked by a forward pass), "timeout" or
    "error". Anything that is not understood is an error.
    """

    status: str
    image: np.ndarray | None  # (H, W, C) float64, in the box
    bound: float  # a lower bound of the margin in the box (at most the threshold), or nan
    nodes: int
    seconds: float  # CPU; of a child that died, or where processes have no clocks: wall-clock
    message: str


class Program(NamedTuple):
    """A model in HiGHS's arrays: rows a t <= upper etc. of variables (pixels, relu outputs, slacks, binaries)."""

    cost: np.ndarray
    offset: float
    column_low: np.ndarray
    column_high: np.ndarray
    row_low: np.ndarray
    row_high: np.ndarray
    start: np.ndarray  # rows, compressed
    index: np.ndarray
    value: np.ndarray
    binaries: int  # the last so many columns


def decide(
    chain: Chain, low, high, relus, row, *, threshold: float = 0.0, cpu_limit: float = 120.0,
    left: Callable[[], float] | None = None, options: dict | None = None,
) -> Answer:  # fmt: skip
    """Is there an image in the box [low, high] with a margin row . logits <= threshold?

    low, high (H, W, C), or with a leading 1; row (K,); relus: the bounds [(low, high)] of every ReLU layer's input in
    this box, as :func:`nanomr.verify.bounds.crown.crown` gives them; ``chain`` in float64. ``cpu_limit``: CPU seconds
    (of this process); ``left()``: seconds of another clock, which must be above 0 as well. ``options``: of HiGHS, over
    those of ``OPTIONS``.

    "infeasible" is proved up to HiGHS's tolerance, 1e-9. Raises ValueError for a row of another length.
    """
    begin = time.process_time()
    task = _prepare(chain, low, high, relus, row, threshold, cpu_limit)
    if isinstance(task, Answer):
        return task
    program, low, high = task
    used = time.process_time() - begin
    return _answer(solve(program, cpu_limit - used, options, left), low, high, threshold, used)


class Solver:
    """:func:`decide` in a process of its own, which is killed if it hangs.

    That is, if it does not stop within a second of its limit: HiGHS looks at it at certain points only. ``allowance``:
    wall-clock seconds for one solve, 2 cpu_limit + 60 by default. The child lives until :meth:`close` (or the end of
    the ``with`` block), and is started again when it had to be killed or died.
    """

    def __init__(self, allowance: float | None = None):
        self.allowance = allowance
        self._process = self._connection = None

    def decide(
        self, chain: Chain, low, high, relus, row, *, threshold: float = 0.0,
        cpu_limit: float = 120.0, left: Callable[[], float] | None = None, options: dict | None = None,
    ) -> Answer:  # fmt: skip
        """As the function :func:`decide`; a child that was killed is a "timeout", one that died an "error"."""
        begin, wall = time.process_time(), time.monotonic()
        task = _prepare(chain, low, high, relus, row, threshold, cpu_limit)
        if isinstance(task, Answer):
            return task
        program, low, high = task
        used = time.process_time() - begin
        if self._process is None or not self._process.is_alive():
            self.close()
            self._start()
        allowance = 2 * cpu_limit + 60 if self.allowance is None else self.allowance
        try:
            before, spent = _cpu_seconds(self._process.pid), 0.0
            self._connection.send((program, cpu_limit - used, options))
            while not self._connection.poll(0.05):
                now = _cpu_seconds(self._process.pid)
                spent = time.monotonic() - wall - used if now is None or before is None else now - before
                late = spent > cpu_limit - used + GRACE or (left is not None and left() < -GRACE)
                if late or time.monotonic() - wall > allowance:
                    self.close()
                    return Answer("timeout", None, np.nan, 0, used + spent, "killed")
            found = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            message = f"the solver's process died (exit code {self._process.exitcode})"
            self.close()
            return Answer("error", None, np.nan, 0, time.monotonic() - wall, message)
        return _answer(found, low, high, threshold, used)

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child,), daemon=True)
        self._process.start()
        child.close()  # so that the child's end shows its death

    def close(self):
        """End the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._connection.close()
        self._process = self._connection = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _cpu_seconds(pid: int) -> float | None:
    """CPU time of another process, where the system has clocks for that (clock_getcpuclockid's number, on Linux)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except (AttributeError, OSError):
        return None


def end_with_parent():
    """Let this process end when the one that started it does, even if that one was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch():
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _serve(connection):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    end_with_parent()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(solve(*task))


def _prepare(chain, low, high, relus, row, threshold, cpu_limit):
    """(program, low, high (H, W, C)), or the Answer where no solver is needed."""
    if chain.dtype != np.float64:
        raise ValueError(f"a proof needs a chain in float64, not {chain.dtype}")
    row = np.asarray(row, np.float64)
    if row.shape != (chain.classes,) or not np.isfinite(row).all():
        raise ValueError(f"the margin's row must be {chain.classes} finite numbers, one for each logit")
    begin = time.process_time()

    def done(status, message):
        return Answer(status, None, threshold if status == "infeasible" else np.nan, 0,
                      time.process_time() - begin, message)  # fmt: skip

    low, high = (np.asarray(x, np.float64).reshape(1, *chain.input_shape) for x in (low, high))
    relus = [tuple(np.array(z, np.float64).reshape(1, *shape) for z in bounds)
             for bounds, shape in zip(relus, chain.relu_shapes, strict=True)]  # fmt: skip
    if not all(np.isfinite(x).all() for x in (low, high, threshold, *(z for bounds in relus for z in bounds))):
        return done("error", "the box, its bounds or the threshold are not finite")
    if not (low <= high).all():
        return done("error", "the box is empty")
    inputs = chain.forward(0.5 * (low + high))[1]
    for z, (z_low, z_high) in zip(inputs, relus, strict=True):
        slack = 1e-6 * (1 + abs(z))
        if not ((z >= z_low - slack) & (z <= z_high + slack)).all():
            return done("error", "a ReLU's bounds are wrong: the middle of the box is outside of them")
    root = branch_and_bound(
        chain, low, high, relus, row, threshold=threshold, cpu_limit=0.5 * cpu_limit, rounds=8, max_domains=1
    )
    if root.status == "proved":
        return done("infeasible", "the tree's root")
    if root.status == "candidate":
        return done("candidate", "the tree's root")._replace(image=root.image)
    if root.root is None or not np.isfinite(root.root).all():
        return done("error", "bounds that are not finite")
    net = collapse(chain, low, high, relus, row)
    program = build(net, *root.root, threshold)
    for values in (
        program.value, program.column_low, program.column_high, program.cost, -program.row_low, program.row_high,
    ):  # fmt: skip
        if not (abs(values[values != np.inf]) < LARGE).all():
            return done("error", "the model's numbers are not finite, or too large")
    return program, low[0], high[0]


def _answer(found, low, high, threshold, used):
    """The Answer to the question, from that about the program."""
    image = None
    if found.image is not None:
        image = np.clip(0.5 * (low + high) + 0.5 * (high - low) * found.image.reshape(low.shape), low, high)
    bound = threshold if found.status == "infeasible" else min(found.bound, threshold)
    return found._replace(image=image, bound=bound, seconds=found.seconds + used)


# --- the program ------------------------------------------------------------------------------------------------------


def build(net: Collapsed, low, high, threshold: float = 0.0) -> Program:
    """The big-M model of "margin <= threshold", from bounds (U,) of the unstable ReLUs' inputs.

    Variables: the pixels, as t in [-1, 1], their places in the box; of every unstable ReLU its output a in [0, up], the
    slack s = a - z in [0, down] and a binary d, with a <= up d and s <= down (1 - d). One dense row a - s = z each, and
    one for the sign of each that these bounds make stable: they may hold at images with margin <= threshold alone.
    """
    pixels = net.image.shape[1]
    weight = np.block([[net.image, net.between], [net.row_image, net.row_units]])
    bias = np.append(net.bias, net.row_bias)
    on, unstable = low >= 0, (low < 0) & (high > 0)  # what these bounds make stable is folded in as well
    through = weight[:, pixels:][:, on] @ np.linalg.inv(np.eye(on.sum()) - net.between[np.ix_(on, on)])
    weight, bias = weight + through @ weight[:-1][on], bias + through @ bias[:-1][on]
    order = np.concatenate([np.flatnonzero(unstable), np.flatnonzero(~unstable), [len(low)]])
    weight, bias = weight[order][:, np.append(np.ones(pixels, bool), unstable)], bias[order]
    signs, size = np.where(on, 1, -1)[~unstable], np.maximum(abs(low), abs(high))[~unstable]
    low, high, units = low[unstable], high[unstable], int(unstable.sum())
    kept = slice(units, len(order) - 1)

    # A wider big-M, a wider bound or a looser threshold is a relaxation: rounding cannot cut off an image.
    down, up = -low + SLACK * (1 - low), high + SLACK * (1 + high)
    threshold = threshold + SLACK * (1 + abs(threshold))

    # HiGHS would drop tiny entries, and with them perhaps the only counterexample. They are dropped here, and what
    # they could have added, over the variables' bounds, goes to the row's bounds: a relaxation again.
    small = np.where(abs(weight) <= SMALL, weight, 0)
    weight -= small
    by_pixels = abs(small[:, :pixels]).sum(1)
    below = np.minimum(small[:, pixels:], 0) @ up - by_pixels
    above = np.maximum(small[:, pixels:], 0) @ up + by_pixels

    sums = np.concatenate([-weight[:-1], np.zeros((len(order) - 1, units))], axis=1)
    one = np.arange(units)  # a - s - weight . (t, a), but without a - s for the stable ones
    sums[one, pixels + one] += 1
    sums[one, pixels + units + one] -= 1
    kept_low = np.where(signs > 0, -np.inf, bias[kept] + below[kept] - SLACK * (1 + size))
    kept_high = np.where(signs < 0, np.inf, bias[kept] + above[kept] + SLACK * (1 + size))
    margin = weight[-1]
    entries = sums != 0
    margin_at = np.flatnonzero(margin)
    a, s, d = (pixels + j * units + one for j in range(3))
    lengths = np.concatenate([entries.sum(1), np.full(2 * units, 2), [len(margin_at)]])
    none, ones = np.zeros(2 * units), np.ones(units)
    edge = np.ones(pixels)
    return Program(
        cost=np.concatenate([margin, none]),
        offset=float(bias[-1] + below[-1]),
        column_low=np.concatenate([-edge, np.zeros(3 * units)]),
        column_high=np.concatenate([edge, up, down, ones]),
        row_low=np.concatenate([bias[:units] + below[:units], kept_low, np.full(2 * units + 1, -np.inf)]),
        row_high=np.concatenate([bias[:units] + above[:units], kept_high, np.zeros(units), down,
                                 [threshold - bias[-1] - below[-1]]]),
        start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        index=np.concatenate([np.nonzero(entries)[1], np.stack([a, d], 1).ravel(), np.stack([s, d], 1).ravel(),
                              margin_at]).astype(np.int32),
        value=np.concatenate([sums[entries], np.stack([ones, -up], 1).ravel(), np.stack([ones, down], 1).ravel(),
                              margin[margin_at]]),
        binaries=units,
    )  # fmt: skip


# --- HiGHS ------------------------------------------------------------------------------------------------------------


def solve(program: Program, cpu_limit: float, options: dict | None = None, left=None) -> Answer:
    """Give the program to HiGHS, for at most ``cpu_limit`` CPU seconds; ``image`` are the columns' first values, t.

    ``left``: as :func:`decide` takes it.
    """
    ok, model_status = highspy.HighsStatus.kOk, highspy.HighsModelStatus
    begin = time.process_time()
    highs = highspy.Highs()

    def answer(status, message, image=None, bound=np.nan, nodes=0):
        message = f"{message}, HiGHS {highs.version()}"
        return Answer(status, image, bound, nodes, time.process_time() - begin, message)

    # The limit is on CPU time, which HiGHS does not count: the callbacks do. Wall-clock is the second net.
    for name, value in {**OPTIONS, "time_limit": 10 * max(cpu_limit, 0) + 60, **(options or {})}.items():
        if highs.setOptionValue(name, value) != ok:
            return answer("error", f"no option {name} = {value}")

    def interrupt(event):
        if time.process_time() - begin > cpu_limit or (left is not None and not left() > 0):
            event.interrupt()

    for callback in (highs.cbMipInterrupt, highs.cbSimplexInterrupt, highs.cbIpmInterrupt):
        callback.subscribe(interrupt)
    if highs.passModel(_model(program)) != ok:
        return answer("error", "the model was refused or changed")
    highs.run()
    status, info = highs.getModelStatus(), highs.getInfo()
    message, nodes = highs.modelStatusToString(status), max(info.mip_node_count, 0)
    if status == model_status.kInfeasible:
        return answer("infeasible", message, nodes=nodes)
    bound = info.mip_dual_bound if program.binaries else np.nan
    bound = bound if np.isfinite(bound) else np.nan
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        pixels = len(program.column_low) - 3 * program.binaries
        image = np.array(highs.getSolution().col_value)[:pixels]
        if np.isfinite(image).all():
            return answer("candidate", message, image, bound, nodes)
    if status in (model_status.kInterrupt, model_status.kTimeLimit):
        return answer("timeout", message, None, bound, nodes)
    return answer("error", message, None, bound, nodes)


def _model(program):
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(program.cost), len(program.row_low)
    model.col_cost_, model.offset_ = program.cost, program.offset
    model.col_lower_, model.col_upper_ = program.column_low, program.column_high
    model.row_lower_, model.row_upper_ = program.row_low, program.row_high
    matrix = model.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.start_, matrix.index_, matrix.value_ = program.start, program.index, program.value
    kinds = highspy.HighsVarType
    real = model.num_col_ - program.binaries
    model.integrality_ = [kinds.kContinuous] * real + [kinds.kInteger] * program.binaries if program.binaries else []
    return model
