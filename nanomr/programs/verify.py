"""Prove it: for how many test images is no adversarial example within eps, exactly?

nanomr verify --weights runs/x --n 200              # eps 8/255
nanomr verify --weights runs/x --n 0 --out v        # every test image
nanomr verify --weights runs/x --n 0 --out v --resume
nanomr verify --weights runs/x --eps 2/255 4/255    # a curve
nanomr verify --weights runs/x --check v            # every proof again
nanomr verify --report v                            # the table again
nanomr verify --instances instances.csv --out v     # VNN-COMP's
nanomr verify --weights runs/x --n 50 --export o    # ONNX, VNN-LIB
"""

import argparse
import hashlib
import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path

import numba
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .. import __version__, checkpoint, cli, metrics, plots
from ..errors import UserError
from ..verify.chain import Chain
from ..verify.exact import milp
from ..verify.formats import vnnlib
from ..verify.proofs.results import check_instances, check_results
from ..verify.running import instances, pipeline, results
from . import common

CHUNK = 16  # images screened together: bounds and attacks work on batches
NETWORK = {"weights", "data", "data_dir", "no_download"}
HEEDED = {  # by what is done instead of deciding images
    "report": {"report"},
    "instances": {"instances", "wall", "time_limit", "seed", "jobs", "shard", "out", "resume", "retry"},
    "check": {"check", *NETWORK},
    "export": {"export", *NETWORK, "n", "eps", "time_limit"},
}


def parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    positive, natural = cli.number(int, low=1), cli.number(int, low=0)

    g = p.add_argument_group("what to do", "verify --weights, or one of these")
    text = "re-evaluate the proofs and counterexamples of this folder; exit code 2 when one does not hold"
    g.add_argument("--check", type=Path, metavar="RESULTS", help=text)
    text = "the table and the pictures from these result folders, and stop; several eps make a curve"
    g.add_argument("--report", type=Path, nargs="+", metavar="RESULTS", help=text)
    text = "write ONNX, VNN-LIB and instances.csv for other verifiers, and stop"
    g.add_argument("--export", type=Path, metavar="DIR", help=text)
    text = "decide the lines network.onnx,property.vnnlib,seconds of a VNN-COMP list: sat, unsat, timeout, ..."
    g.add_argument("--instances", type=Path, metavar="CSV", help=text)
    g.add_argument("--wall", action="store_true", help="its seconds are wall-clock time, not CPU time")
    g.add_argument("--estimate", action="store_true", help="50 of the images, spread over them; what all would take")

    g = p.add_argument_group("network and images")
    g.add_argument("--weights", type=Path, metavar="FILE", help="the network: a .safetensors file, or a run folder")
    text = "whose test images; default: of what the network was trained on, by its file, else shapes10"
    common.add_data(g, text)
    g.add_argument("--n", type=natural, default=1000, help="the first so many test images; 0: all")

    g = p.add_argument_group("verification")
    text = "linf radius, pixels in [0, 1]; several: a folder each, and a curve (default: 8/255)"
    g.add_argument("--eps", type=cli.linf_radius, nargs="+", help=text)
    seconds = cli.number(float, above=0)
    g.add_argument(
        "--time-limit",
        type=seconds,
        default=120.0,
        help="CPU seconds for an image, all stages, or for each of --instances in place of its own",
    )
    seed = cli.number(int, low=0, high=2**63 - 1)
    g.add_argument("--seed", type=seed, default=0, help="of the attacks' random starts")

    g = p.add_argument_group("run")
    g.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="worker processes, one thread each")
    text = "mpi: under mpiexec -n RANKS python -m mpi4py.futures verify_small.py ..."
    g.add_argument("--executor", choices=("processes", "mpi"), default="processes", help=text)
    g.add_argument(
        "--shard", type=common.shard, metavar="I/N", help="only the I-th of N parts (0 <= I < N), for job arrays"
    )
    g.add_argument("--out", type=Path, help="result folder; default: runs/WEIGHTS-verify")
    g.add_argument("--resume", action="store_true", help="go on with the results in --out; give the same flags again")
    text = "with --resume: decide again the images that ran into the time limit, or (all) are undecided otherwise too"
    g.add_argument("--retry", choices=("timeout", "all"), help=text)
    return p


# --- a run ------------------------------------------------------------------------------------------------------------


def configure(args, eps: float, weights: dict, dataset) -> dict:
    """config.json: all that decides the verdicts, but for the time limit, which only decides how many there are."""
    settings = pipeline.Settings(eps, args.seed, args.time_limit)._asdict()
    del settings["time_limit"]
    return {
        "nanomr": __version__, **settings, "weights": weights,
        "data": {"name": dataset.name, "source": dataset.source}, "highspy": metadata.version("highspy"),
    }  # fmt: skip


def make_executor(args, eps: float, weights: Path) -> Executor:
    """Worker processes, each with one thread, the network and a solver of its own."""
    start = dict(
        initializer=pipeline.start_worker,
        initargs=(str(weights), pipeline.Settings(eps, args.seed, args.time_limit)),
    )
    if args.executor == "processes":
        context = multiprocessing.get_context("spawn")  # a fork would copy Numba's threads, which then hang
        executor = ProcessPoolExecutor(args.jobs, mp_context=context, **start)
        with single_threads():
            executor.submit(int)  # the first call starts them all
        return executor
    try:
        from mpi4py.futures import MPIPoolExecutor
    except ImportError:
        raise UserError("--executor mpi needs mpi4py and an MPI library: pip install 'nanomr[mpi]'") from None
    return MPIPoolExecutor(**start, env=dict.fromkeys(THREADS, "1"))


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@contextmanager
def single_threads():
    """Processes that are started within it have one thread each: NumPy and Numba read it when they are imported.

    Not for longer: this process's Numba would refuse to compile anything more.
    """
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Tally:
    """What the progress line says."""

    def __init__(self, records):
        self.n = {"verified": 0, "attacked": 0, "timeout": 0, "wrong": 0}
        self.unstable: list[int] = []
        self.switching = 0
        for record in records:
            self.add(record)

    def add(self, record: dict):
        key = {"misclassified": "wrong", "falsified": "attacked"}.get(record["verdict"], record["verdict"])
        self.n[key if key in self.n else "timeout"] += 1
        if "unstable" in record:
            self.unstable.append(sum(record["unstable"]))
            self.switching += sum(record["switching"])

    def text(self, total: int, open_: int) -> str:
        n = self.n
        low, high = n["verified"] / total, 1 - (n["wrong"] + n["attacked"]) / total
        return (
            f"verified {n['verified']}, attacked {n['attacked']}, open {open_}, undecided {n['timeout']}, "
            f"verified accuracy {low:.2%} to {high:.2%}"
        )


def verify(args, eps: float, folder: Path, weights: dict, dataset, ids: np.ndarray) -> dict:
    """Decide these test images, keep every verdict in ``folder``, and report on all that it holds."""
    kept = results.Folder(folder, args.shard)
    kept.open(configure(args, eps, weights, dataset), args.resume)
    kept.log.touch()
    with checkpoint.locked(kept.log):  # another shard has a log of its own
        return _verify(args, eps, kept, dataset, ids)


def _verify(args, eps: float, kept: results.Folder, dataset, ids: np.ndarray) -> dict:
    folder = kept.path
    done: dict[int, dict] = {}
    if any(folder.glob("results*.jsonl")):
        done = results.read(folder)[1]
    again = {"timeout": ("timeout",), "all": pipeline.UNFINISHED, None: ()}[args.retry]
    old = [done[i] for i in ids.tolist() if i in done and done[i]["verdict"] not in again]
    finished = {record["id"] for record in old}
    todo = np.array([i for i in ids if i not in finished], int)
    if len(todo):
        with tqdm(total=len(ids), initial=len(old), desc=f"eps {eps * 255:.3g}/255", unit="img", disable=None) as bar:
            decide_all(args, eps, kept, dataset, todo, Tally(old), bar)
    config, records = results.read(folder)
    report = results.summarise(config, records)
    checkpoint.write_json(folder / "report.json", report)
    plots.unstable_relus(list(records.values()), folder / "unstable.png")
    return report


def decide_all(args, eps, kept, dataset, todo, tally: Tally, bar):
    """First every image's attacks and bounds, in chunks; then the exact solvers, the most hopeful images first."""
    total, warned = bar.total, False

    def keep(outcome):
        nonlocal warned
        kept.add(outcome)
        tally.add(outcome.record)
        bar.update()
        bar.set_postfix_str(tally.text(total, len(undecided)))
        if len(tally.unstable) >= 50 and not warned:
            warned = True
            if np.mean(tally.unstable) > results.MANY:
                bar.write(
                    f"warning: {np.mean(tally.unstable):.0f} unstable ReLUs an image: expect many undecided images"
                )
            if tally.switching == 0:
                bar.write("warning: no ReLU switches in any box: around the images this network is linear")

    undecided = []
    executor = make_executor(args, eps, args.weights)
    try:
        futures = {}
        for first in range(0, len(todo), CHUNK):
            part = todo[first : first + CHUNK]
            images = metrics.as_float(dataset.test_images[part])
            futures[executor.submit(pipeline.screen, images, dataset.test_labels[part], part)] = None
        for outcomes in _completed(futures):
            fresh = [o for o in outcomes.result() if o.record["verdict"] is None]
            undecided += fresh
            for outcome in outcomes.result():
                if outcome.record["verdict"] is not None:
                    keep(outcome)
        undecided.sort(key=lambda o: -min(o.record["bound"].values()))
        futures = {}
        for outcome in undecided:
            image = metrics.as_float(dataset.test_images[outcome.record["id"]])
            futures[executor.submit(pipeline.decide, image, outcome)] = outcome
        for future in _completed(futures):
            outcome = futures[future]
            undecided.remove(outcome)
            try:
                outcome = future.result()
            except BrokenExecutor:
                raise
            except Exception as error:  # of one image: the others go on, and the report counts it
                record = outcome.record | {"verdict": "error", "stage": "exact", "verified_float32": False}
                outcome = pipeline.Outcome(record | {"error": f"{type(error).__name__}: {error}"}, {}, None)
            keep(outcome)
    except BrokenExecutor:
        raise UserError("a worker process died (out of memory?): fewer --jobs; --resume goes on") from None
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # in the middle of a solve, perhaps
            process.kill()
        raise
    executor.shutdown()


def _completed(futures: dict):
    """The futures as they finish."""
    left = set(futures)
    while left:
        finished, left = wait(left, return_when=FIRST_COMPLETED)
        yield from finished


# --- --check, --report, --export --------------------------------------------------------------------------------------


def check(args) -> int:
    """Every proof and counterexample again, by a checker that shares no code with the verifier."""
    config, records = results.read(args.check)
    dataset = common.load_data(args, config["data"])
    model, _ = common.load_network(args.weights, dataset, "cpu")
    if max(records) >= len(dataset.test_labels):
        raise UserError(
            f"{args.check}: image {max(records)} is not in the data set ({len(dataset.test_labels)} images)"
        )
    with tqdm(total=len(records), desc="checking", unit="img", disable=None) as bar:
        found = check_results(
            args.check, common.weights_file(args.weights), metrics.as_float(dataset.test_images), dataset.test_labels,
            predict=lambda x: model.forward(x)[0].argmax(1), progress=lambda done, _: bar.update(done - bar.n),
        )  # fmt: skip
    checkpoint.write_json(args.check / "check.json", found)
    verified = found["verdicts"].get("verified", 0)
    print(
        f"{args.check}: {found['images']} images, {verified} verified\n"
        f"  {found['confirmed']} proved again, rigorously in real arithmetic\n"
        f"  {found['solver_only']} rest, for a rival, on HiGHS (tolerance 1e-9), which leaves no proof to check\n"
        f"  {found['float32']} proved for the deployed float32 network too, in any order of summation\n"
        f"  {found['counterexamples']} counterexamples checked: in the box, without tolerance, and misclassified"
    )
    return _hold(args.check, found, "image")


def _hold(folder: Path, found: dict, kind: str) -> int:
    if wrong := found["contradictions"] + found["refused"]:
        first = f"{kind} {wrong[0]['id']}: {wrong[0]['reason']}"
        raise UserError(f"{folder}: {len(wrong)} results do not hold; check.json names them. {first}")
    return 0


def is_list(folder: Path) -> bool:
    """Was the folder made by --instances?"""
    file = folder / "config.json"
    config = checkpoint.read_json(file) if file.exists() else None
    return isinstance(config, dict) and "instances" in config


def list_records(folder: Path) -> dict[int, dict]:
    """{line: what was found last} of a folder of --instances, all its files merged: an answer beats none."""
    found: dict[int, dict] = {}
    for log in sorted(folder.glob("results*.jsonl")):
        for record in checkpoint.read_jsonl(log):
            if not {"id", "verdict", "seconds", "network", "property"} <= record.keys():
                raise UserError(f"{log}: a line is not a result of --instances ({str(record)[:60]}...)")
            old = found.get(record["id"])
            if old is None or old["verdict"] not in instances.ANSWERED or record["verdict"] in instances.ANSWERED:
                found[record["id"]] = record
    return dict(sorted(found.items()))


def show_lists(folders: list[Path]) -> int:
    """What became of the lines, and how many there are of each verdict."""
    for folder in folders:
        records = list_records(folder).values()
        for record in records:
            print(f"{record['network']},{record['property']},{record['verdict']},{record['seconds']:.2f}")
        counts = Counter(record["verdict"] for record in records)
        total = sum(record["seconds"] for record in records)
        print(
            f"{folder}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + f"; {total:.0f} CPU seconds"
        )
    return 0


def check_list(folder: Path) -> int:
    """Every proof and counterexample of a list again, by a checker that shares no code with the verifier."""
    with tqdm(desc="checking", unit="line", disable=None) as bar:

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        found = check_instances(folder, progress)
    checkpoint.write_json(folder / "check.json", found)
    print(
        f"{folder}: {found['instances']} instances, {found['verdicts'].get('unsat', 0)} unsat\n"
        f"  {found['confirmed']} proved again, rigorously in real arithmetic\n"
        f"  {found['solver_only']} rest, for a case, on HiGHS (tolerance 1e-9), which leaves no proof to check\n"
        f"  {found['float32']} proved for the deployed float32 network too, in any order of summation\n"
        f"  {found['counterexamples']} counterexamples checked: in the box, exactly, and violating the property\n"
        f"  {found['compared']} networks compared with onnxruntime's logits"
    )
    return _hold(folder, found, "line")


def show(paths: list[Path]) -> int:
    """Tables of result folders, or of the folders inside; with several eps also the curve."""
    folders = []
    for path in paths:
        inside = sorted(f.parent for f in path.glob("*/config.json")) if not (path / "config.json").exists() else [path]
        folders += inside or [path]
    reports = []
    for folder in folders:
        config, records = results.read(folder)
        reports.append(results.summarise(config, records))
        checkpoint.write_json(folder / "report.json", reports[-1])
        plots.unstable_relus(list(records.values()), folder / "unstable.png")
        print(cli.fold(results.lines(reports[-1])))
    curve(reports, paths[0])
    return 0


def curve(reports: list[dict], folder: Path):
    if len({report["eps"] for report in reports}) > 1:
        plots.accuracy_by_eps(reports, folder / "accuracy.png")


def export(args, dataset, model, ids) -> int:
    if len(args.eps) > 1:
        raise UserError("--export takes one --eps")
    images, labels = metrics.as_float(dataset.test_images[ids]), dataset.test_labels[ids]
    vnnlib.export_instances(model, images, labels, args.eps[0], args.export, timeout=int(args.time_limit), ids=ids)
    print(f"{args.export}: model.onnx, {len(ids)} VNN-LIB files, instances.csv")
    return 0


# --- lists of instances -----------------------------------------------------------------------------------------------


def run_instances(args) -> int:
    """Decide a VNN-COMP list: a line "network,property,verdict,seconds" as each is done, all kept in --out.

    A line that cannot be decided has the verdict "error", and the exit code is 2 at the end.
    """
    file, kept, done = args.instances, None, {}
    lines = instances.read_list(file)
    if args.shard:
        lines = lines[args.shard[0] :: args.shard[1]]
    options = instances.Options(str(file.parent), args.out and str(args.out), args.wall, args.time_limit, args.seed)
    if args.out:
        kept = results.Folder(args.out, args.shard)
        text = file.read_bytes()
        config = {
            "nanomr": __version__, "instances": str(file.resolve()), "sha256": hashlib.sha256(text).hexdigest(),
            "wall": args.wall, "seed": args.seed, "highspy": metadata.version("highspy"),
        }  # fmt: skip
        kept.open(config, args.resume)
        kept.log.touch()
        again = {"timeout": ("timeout", "error"), "all": instances.UNANSWERED, None: ("error",)}[args.retry]
        done = {n: record for n, record in list_records(args.out).items() if record["verdict"] not in again}
    failed = []
    with checkpoint.locked(kept.log) if kept else nullcontext():
        for record, proof, text in _decided(args, [line for line in lines if line.number not in done], options):
            if kept:
                keep_line(args.out, kept.log, record, proof, text)
            note = f" ({record['note']})" if record["note"] and record["verdict"] != "error" else ""
            print(
                f"{record['network']},{record['property']},{record['verdict']}{note},{record['seconds']:.2f}",
                flush=True,
            )
            if record["verdict"] == "error":
                failed.append(record)
    if failed:
        others = f" (and {len(failed) - 1} more of {len(lines)} lines)" if len(failed) > 1 else ""
        raise UserError(f"{file}, line {failed[0]['id']}: {failed[0]['note']}{others}")
    return 0


def keep_line(folder: Path, log: Path, record: dict, proof: dict, text: str | None):
    """Save the proof or the counterexample, then the line: a line means that its files are there."""
    stale = [folder / "proofs" / f"{record['id']}.safetensors", folder / "counterexamples" / f"{record['id']}.txt"]
    for file in stale:
        file.unlink(missing_ok=True)  # of an earlier try
    if proof:
        checkpoint.save_tensors(stale[0], proof, {})
    if text:
        checkpoint.write_atomic(stale[1], text)
    checkpoint.append_jsonl(log, record)


@contextmanager
def _one_thread():
    """As the workers have: the products are small, and further threads would wait, on this process's CPU time."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        numba.set_num_threads(threads)


def _decided(args, lines, options):
    """What :func:`instances.run_line` says of each line, as they are done: here, or in --jobs processes."""
    if args.jobs == 1 or len(lines) < 2:
        with milp.Solver() as solver, _one_thread():
            for line in lines:
                yield instances.run_line(line, options, solver)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(args.jobs, len(lines)), mp_context=context, initializer=instances.start_worker)
    try:
        with single_threads():
            futures = {executor.submit(instances.in_worker, line, options): line for line in lines}
        for future in _completed(futures):
            yield future.result()
    except BrokenExecutor:
        raise UserError("a worker process died (out of memory?): fewer --jobs; --resume goes on") from None
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
        raise
    executor.shutdown()


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> int:
    p = parser()
    args = p.parse_args()
    common.announce_compilation()
    if args.retry:
        args.resume = True
    for mode in HEEDED:
        if getattr(args, mode):
            common.refuse_others(parser(), HEEDED[mode], f"--{mode}")
    args.eps = args.eps or [8 / 255]
    if args.report:
        return show_lists(args.report) if all(map(is_list, args.report)) else show(args.report)
    if args.instances:
        if args.resume and not args.out:
            p.error("--resume needs --out: the folder of the run")
        if "time_limit" not in cli.given(parser()):
            args.time_limit = None  # the lines' own
        try:
            return run_instances(args)
        except KeyboardInterrupt:
            if not args.out:
                raise
            print(f"\n{args.out}: every finished line is kept; the same command with --resume goes on")
            return 130
    if args.check and is_list(args.check):
        common.refuse_others(parser(), {"check"}, "--check of a list")
        return check_list(args.check)
    if args.wall:
        p.error("--wall is for --instances")
    if not args.weights:
        p.error("--weights FILE is needed: the network")
    if args.resume and not args.out:
        p.error("--resume needs --out: the folder of the run")
    if args.check:
        return check(args)
    if args.estimate and args.shard:
        p.error("--estimate is of all the images: leave --shard out")
    dataset = common.load_data(args, args.data or common.trained_on(args.weights))
    model, weights = common.load_network(args.weights, dataset, "cpu")
    Chain(model)  # refuses, by name, what cannot be verified
    total = len(dataset.test_labels)
    everything = ids = np.arange(min(args.n, total) if args.n else total)
    if args.export:
        return export(args, dataset, model, ids)
    if args.estimate:
        ids = np.unique(np.linspace(0, len(ids) - 1, min(50, len(ids))).astype(int))
    elif args.shard:
        ids = ids[args.shard[0] :: args.shard[1]]
    file = common.weights_file(args.weights).resolve()
    out = args.out or Path("runs") / f"{file.parent.name if file.stem == 'model' else file.stem}-verify"
    reports, start = [], time.monotonic()
    for eps in args.eps:
        folder = out / f"eps-{eps * 255:.4g}" if len(args.eps) > 1 else out
        try:
            reports.append(verify(args, eps, folder, weights, dataset, ids))
        except KeyboardInterrupt:
            print(f"\n{folder}: every finished image is kept; the same command with --out {out} --resume goes on")
            return 130
        print(cli.fold(results.lines(reports[-1])))
    curve(reports, out)
    if args.estimate:
        hours = (time.monotonic() - start) / len(ids) / len(args.eps) * len(everything) / 3600
        rest = f"about {hours * 60:.0f} minutes with {args.jobs} processes, by these {len(ids)}"
        text = f"all {len(everything)} images: {rest}"
        print(cli.fold([text]))
    files = f"{out}: results.jsonl, report.json, proofs/, counterexamples/; --check {out} re-evaluates them"
    print("\n" + cli.fold([files]))
    return 0
