#!/usr/bin/env python3
"""Strong scaling, "since they increase batch sizes rather than epochs": does it hold? ``docs/claims.md``.

python bench/claims/scaling.py accuracy --data-dir DIR --out bench/results/claims/scaling_accuracy.jsonl
python bench/claims/scaling.py times --json bench/results/claims/scaling_times.json         # on a quiet machine
python bench/claims/scaling.py report --json bench/results/claims/scaling.json --picture docs/img/claims_scaling.png
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nanomr import checkpoint, data, metrics, models, optim, parallel
from nanomr.errors import UserError
from nanomr.methods import METHODS
from nanomr.train import Config, Trainer

RESULTS = Path("bench/results/claims")

# --- accuracy after equal epochs --------------------------------------------------------------------------------------

SMALL = dict(gamma_i=10.0, gamma_h=600.0, clip=1.0)  # train_cifar.py's for the small network then, at N = 128
BASE = 128
FIRST = {  # peak learning rates to begin with, between those that grow with N's root and with N
    "manifold": {
        128: (0.03, 0.06), 256: (0.06, 0.03), 512: (0.06, 0.12), 1024: (0.12, 0.24), 2048: (0.12, 0.24),
        4096: (0.24, 0.48),
    },
    "pgd": {128: (0.03, 0.06), 512: (0.06, 0.12), 2048: (0.12, 0.24)},
    "ibp": {128: (5e-4, 1e-3), 512: (1e-3, 2e-3), 2048: (2e-3, 4e-3)},
}  # fmt: skip
MOST = {"manifold": 4, "pgd": 3, "ibp": 2}  # learning rates that are tried for one N
SEEDS = {"manifold": (1, 2), "pgd": (1,), "ibp": ()}  # beside 0, of the best learning rate
PAIRS = (2, 4)


class Run(Trainer):
    """A training in which each image of a batch occurs ``pairs`` times, each time with corners of its own."""

    pairs, judges = 1, 2000

    def batch(self, step):
        return [np.repeat(part, self.pairs, 0) for part in super().batch(step)]

    def _record(self):
        images, labels = self.held[: self.judges], self.held_labels[: self.judges]
        robust = metrics.robust_accuracy(
            self.finished(), images, labels, self.config.eps, steps=10, seed=self.config.seed
        )
        return super()._record() | {"held_pgd10": robust}


def config_of(setting: dict, dataset, epochs: int) -> Config:
    """A setting is {"batch", "lr", "seed", "pairs", "method", "scaled"}; what it lacks of the last four is PLAIN's.

    The norm "over the batch" of the Hamming term falls with the root of its rows, and so does its gradient: ``scaled``
    makes up for that, so that the objective is the same for every N and every number of pairs. PGD has the manifold
    method's schedule, IBP its own and its batch norms.
    """
    batch, pairs, method = setting.get("batch", BASE), setting.get("pairs", 1), setting.get("method", "manifold")
    own = dict(SMALL, recipe="paper")
    if setting.get("scaled", True):
        own["gamma_h"] *= (batch * pairs / BASE) ** 0.5
    if method == "pgd":
        own["constants"] = {"steps": 7}
    if method == "ibp":
        own = optim.RECIPES["ramp"].defaults | {"recipe": "ramp"}
    own["lr"] = setting.get("lr", 0.03)
    network = models.small_cnn(input_shape=dataset.train_images.shape[1:], batchnorm=METHODS[method].finish is not None)
    return Config(
        architecture=network.architecture, method=method, data=dataset.name, epochs=epochs, batch_size=batch,
        seed=setting.get("seed", 0), hold_out=min(len(dataset.train_images) // 10, 5000), **own,
    ).checked()  # fmt: skip


def train(setting: dict, dataset, epochs: int, runs: Path) -> dict:
    """One run, which goes on where it stopped: what the held-out images say after each epoch, and all of them and the
    test images at the end."""
    config = config_of(setting, dataset, epochs)
    folder = runs / "-".join(f"{key}{value:g}" if key != "method" else value for key, value in sorted(setting.items()))
    trainer = Run(config, dataset, folder)
    trainer.pairs = setting.get("pairs", 1)
    row = {"setting": setting, "epochs": epochs, "data": dataset.name, "steps": trainer.steps_per_epoch * epochs}
    if (folder / "last.safetensors").exists():
        trainer.resume()
    try:
        model = trainer.run()
    except UserError as error:
        return {**row, "stopped": str(error).split(";")[0].split(":")[0]}
    judged = {"held": (trainer.held, trainer.held_labels), "test": (dataset.test_images, dataset.test_labels)}
    for name, (x, labels) in judged.items():  # the first choose the learning rate, the second nothing
        robust = metrics.robust_accuracy(model, x, labels, config.eps, steps=10, seed=config.seed)
        row[name] = {"images": len(x), "clean": metrics.accuracy(model, x, labels), "pgd10": robust}
    keys = ("epoch", "loss", "accuracy", "held_pgd10", "unstable", "gradient_norm", "seconds")
    row["judges"] = min(trainer.judges, len(trainer.held))
    return row | {"log": [{k: r[k] for k in keys} for r in trainer.log]}


def score(row: dict) -> float:
    """Of a run, by which learning rates are compared: robust accuracy of held-out images; 0 of one that collapsed."""
    return row["held"]["pgd10"] if "held" in row else 0.0


PLAIN = {"pairs": 1, "method": "manifold", "scaled": True, "seed": 0}


def alike(rows: list[dict], **which) -> list[dict]:
    """The runs whose settings are ``which``, and otherwise PLAIN; of any learning rate."""
    return [r for r in rows if (PLAIN | r["setting"]) == PLAIN | which | {"lr": r["setting"]["lr"]}]


def chosen(rows: list[dict], **which) -> dict | None:
    """The best of them, None without any."""
    return max(alike(rows, **which), key=score, default=None)


def followed(rows: list[dict], rates, most: int, **which):
    """Settings of ``which`` with these learning ``rates``, then, as long as the best of them is the largest or the
    smallest, with the next one beyond it; ``most`` in all. ``rows``: what is done, to which the caller adds."""
    for lr in rates:
        yield which | {"lr": lr, "seed": 0}
    while len(rates := [r["setting"]["lr"] for r in alike(rows, **which)]) < most:
        lr = chosen(rows, **which)["setting"]["lr"]
        if lr not in (min(rates), max(rates)):
            break
        yield which | {"lr": lr * 2 if lr == max(rates) else lr / 2, "seed": 0}


def wanted(rows: list[dict], first: dict = FIRST):
    """Settings, in the order in which they are to be run: of each method the learning rates for every N, then further
    seeds of the best ones; of the manifold method also more pairs an image, at N = BASE."""
    for method, batches in first.items():
        own = {} if method == "manifold" else {"method": method}
        for batch, rates in batches.items():
            yield from followed(rows, rates, MOST[method], batch=batch, **own)
        for pairs in PAIRS if method == "manifold" else ():
            yield chosen(rows, batch=BASE)["setting"] | {"pairs": pairs}
        for seed in SEEDS[method]:
            for batch in batches:
                yield chosen(rows, batch=batch, **own)["setting"] | {"seed": seed}


def accuracy(args):
    dataset = data.load(args.data, args.data_dir, download=False)
    rows = checkpoint.read_jsonl(args.out) if args.out.exists() else []
    rows = [r for r in rows if r["epochs"] == args.epochs]
    todo = wanted(rows) if not args.setting else iter(args.setting)
    for setting in todo:
        if any(r["setting"] == setting for r in rows):
            continue
        start = time.monotonic()
        row = train(setting, dataset, args.epochs, args.runs)
        rows.append(row)
        checkpoint.append_jsonl(args.out, row)
        print(f"{setting} {row.get('held', row.get('stopped'))} {time.monotonic() - start:.0f} s", flush=True)


# --- seconds of a step ------------------------------------------------------------------------------------------------

GLOBAL = (128, 512, 1024, 4096)  # images a step, of all ranks
LOCAL = tuple(2**i for i in range(13))  # images a step, of one rank alone
FITTED = 2048  # up to so many: beyond them a step's arrays are new memory each time
TIMED = ("manifold", "pgd", "ibp")
LAUNCHES = ((1, 1), (2, 1), (1, 2))  # (ranks, threads of each)
PARTS = ("compute", "sum", "wait", "rest")


class Timed(parallel.Ranks):
    """Ranks that say how long their sums took, and how long the one that came first waited."""

    def __init__(self, ranks):
        self.inner, self.rank, self.size = ranks, ranks.rank, ranks.size
        self.seconds = {"sum": 0.0, "wait": 0.0}

    def sum_(self, vector):
        start = time.perf_counter()
        self.inner.barrier()
        met = time.perf_counter()
        self.inner.sum_(vector)
        self.seconds["wait"] += met - start
        self.seconds["sum"] += time.perf_counter() - met
        return vector


def noise(n: int) -> data.Dataset:
    """n training images of noise, 32x32: the time of a step does not depend on what they show."""
    g = np.random.default_rng(0)
    images, labels = g.integers(0, 256, (n + 1, 32, 32, 3), np.uint8), g.integers(0, 10, n + 1)
    return data.Dataset("noise", data.CIFAR10_CLASSES, images, labels, images[:1], labels[:1], {})


def time_step(method: str, n: int, ranks=parallel.ALONE, seconds: float = 0.4) -> dict:
    """Seconds of this rank's step of a global batch of n images, median of so many as fit in ``seconds`` (2 at least),
    and the means of its PARTS. Certified methods have their batch norms, as train_cifar.py has them."""
    architecture = models.small_cnn(batchnorm=METHODS[method].finish is not None).architecture
    own = SMALL | dict(constants={"steps": 7} if method == "pgd" else {})
    config = Config(architecture=architecture, method=method, data="noise", epochs=100, batch_size=n, hold_out=1, **own)
    timed, spent = Timed(ranks), {"compute": 0.0}
    trainer = Trainer(config, noise(n), tempfile.gettempdir(), ranks=timed if ranks.size > 1 else ranks)
    step = trainer.method.step

    def compute(*args):
        before, start = sum(timed.seconds.values()), time.perf_counter()
        parts = step(*args)
        spent["compute"] += time.perf_counter() - start - (sum(timed.seconds.values()) - before)
        return parts

    trainer.method = trainer.method._replace(step=compute)
    once = []
    for _ in range(2):  # the second is of a step that has compiled
        ranks.barrier()
        start = time.perf_counter()
        trainer.train_step()
        once.append(time.perf_counter() - start)
    count = ranks.broadcast_(np.array([min(max(seconds / once[-1], 2), 100)]))
    spent["compute"], timed.seconds["sum"], timed.seconds["wait"], each = 0.0, 0.0, 0.0, []
    for _ in range(int(count[0])):
        ranks.barrier()
        start = time.perf_counter()
        trainer.train_step()
        each.append(time.perf_counter() - start)
    parts = {name: value / len(each) for name, value in (spent | timed.seconds).items()}
    parts["rest"] = sum(each) / len(each) - sum(parts.values())
    return {"method": method, "n": n, "seconds": statistics.median(each), "steps": len(each), **parts}


def time_sum(ranks, repeats: int = 100) -> float:
    """Seconds of the one sum of a step: the small network's weights and the k numbers behind them."""
    vector, each = np.zeros(models.small_cnn().weights.size + 5, np.float32), []
    for _ in range(repeats):
        ranks.barrier()
        start = time.perf_counter()
        ranks.sum_(vector)
        each.append(time.perf_counter() - start)
    return statistics.median(each)


def worker(args):
    """What one launch of ``times`` measures; rank 0 prints it."""
    ranks = parallel.start()
    with ranks.together():
        rows = []
        for method in TIMED:
            for n in args.sizes:
                if ranks.size == 1 or METHODS[method].ranks:
                    rows.append(time_step(method, n, ranks))
        one_sum = time_sum(ranks)
        if ranks.rank == 0:
            print(json.dumps({"rows": rows, "sum": one_sum}))


def launch(ranks: int, threads: int, sizes) -> dict:
    """A run of :func:`worker` by ``mpiexec -n ranks``."""
    names = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    mpiexec = mpiexec if mpiexec.exists() else "mpiexec"
    command = [mpiexec, "-n", ranks, sys.executable, "-m", "mpi4py", __file__, "worker", "--sizes", *sizes]
    command = [str(c) for c in command]
    done = subprocess.run(command, env=os.environ | {n: str(threads) for n in names}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def busy() -> tuple[float, float, float]:
    """(seconds by the clock, CPU seconds of the whole machine, of this process and those that it waited for)."""
    jiffies = [int(word) for word in Path("/proc/stat").read_text().split(None, 9)[1:9]]
    own = os.times()
    whole = (sum(jiffies) - jiffies[3] - jiffies[4]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), whole, sum(own[:4])


def times(args):
    """(a) by launches of their own, (b) in a launch of one rank with one thread: in rounds, of which each figure is the
    median. A file that is there already gets further rounds. "others": how many cores other processes had meanwhile."""
    found = checkpoint.read_json(args.json) if args.json and args.json.exists() else {"rounds": []}
    for _ in range(args.rounds):
        before = busy()
        ranks = [{"ranks": p, "threads": t, **launch(p, t, args.sizes)} for p, t in LAUNCHES]
        local = launch(1, 1, args.local)["rows"]
        clock, whole, own = (after - b for after, b in zip(busy(), before, strict=True))
        found["rounds"].append({"others": (whole - own) / clock, "ranks": ranks, "local": local})
        if args.json:
            checkpoint.write_json(args.json, found)


# --- the report -------------------------------------------------------------------------------------------------------


def fit(n, seconds) -> tuple[float, float]:
    """(t0, t_img) of seconds = t0 + n t_img, of which the relative errors are smallest; none is negative."""
    n, seconds = np.asarray(n, float), np.asarray(seconds, float)
    columns = np.stack([1 / seconds, n / seconds], 1)
    t0, each = np.linalg.lstsq(columns, np.ones(len(n)), rcond=None)[0]
    return max(float(t0), 0.0), float(each)


def model(p, n: int, t0: float, each: float, a: float):
    """Seconds of a step of n images on p ranks: a model, t0 + n t_img / p + a log2 p."""
    return t0 + n * each / np.asarray(p, float) + a * np.log2(p)


def medians(rounds: list[dict]) -> dict:
    """{"ranks": rows with "ranks" and "threads", "local": rows, "sum": {ranks: seconds}}: medians over the rounds."""

    def middle(rows):
        return {k: statistics.median(r[k] for r in rows) if isinstance(v, float) else v for k, v in rows[0].items()}

    flat = [[dict(row, ranks=one["ranks"], threads=one["threads"]) for one in r["ranks"] for row in one["rows"]]
            for r in rounds]  # fmt: skip
    sums = {}
    for one in (one for r in rounds for one in r["ranks"] if one["threads"] == 1):
        sums.setdefault(str(one["ranks"]), []).append(one["sum"])
    return {
        "rounds": len(rounds), "others": [round(r["others"], 2) for r in rounds],
        "ranks": [middle(rows) for rows in zip(*flat, strict=True)],
        "local": [middle(rows) for rows in zip(*(r["local"] for r in rounds), strict=True)],
        "sum": {p: statistics.median(values) for p, values in sums.items()},
    }  # fmt: skip


def to_reach(row: dict, target: float) -> int | None:
    """Steps until the held-out robust accuracy was ``target`` for the first time, at the end of an epoch."""
    for record in row.get("log", []):
        if record["held_pgd10"] >= target:
            return record["epoch"] * row["steps"] // row["epochs"]
    return None


def over(judged: list[dict]) -> dict:
    """Of what runs of one setting, which differ by seed, were judged to be: the means, and PGD-10's standard error by
    their spread. All are judged on the same images, whose choice is not in it."""
    if not judged:
        return {"runs": 0}
    clean, robust = (np.array([j[key] for j in judged]) for key in ("clean", "pgd10"))
    error = float(robust.std(ddof=1) / len(robust) ** 0.5) if len(robust) > 1 else None
    return {"runs": len(judged), "clean": float(clean.mean()), "pgd10": float(robust.mean()), "pgd10_error": error}


def summary(found: dict, rows: list[dict], target: float) -> dict:
    """Of the medians of ``times`` and the runs of ``accuracy``: fits, the model, what each N comes to."""
    fits = {}
    for method in TIMED:
        local = [(r["n"], r["seconds"]) for r in found["local"] if r["method"] == method and r["n"] <= FITTED]
        t0, each = fit(*zip(*local, strict=True))
        worst = max(abs(t0 + n * each - seconds) / seconds for n, seconds in local)
        fits[method] = {"t0": t0, "t_img": each, "worst_relative_error": worst}
    a = found["sum"]["2"]  # of one message, and the work of the sum: log2(2) times
    modelled = []
    for n in sorted({*GLOBAL, *(r["setting"]["batch"] for r in rows)}):
        for p in (2**i for i in range(13) if 2**i <= n):
            seconds = {m: float(model(p, n, fits[m]["t0"], fits[m]["t_img"], a)) for m in ("manifold", "pgd")}
            modelled.append({"n": n, "ranks": p, **seconds, "ratio": seconds["pgd"] / seconds["manifold"]})
    batches = []
    for method, batch in sorted({(r["setting"].get("method", "manifold"), r["setting"]["batch"]) for r in rows}):
        best = chosen(rows, batch=batch, method=method)
        same = [r for r in rows if PLAIN | r["setting"] | {"seed": 0} == PLAIN | best["setting"] and "held" in r]
        if not same:
            continue
        reached, t = [to_reach(r, target) for r in same], fits[method]
        steps = None if None in reached else statistics.median(reached)
        least = min((m for m in modelled if m["n"] == batch and method in m), key=lambda m: m[method], default=None)
        batches.append({
            "method": method, "batch": batch, "lr": best["setting"]["lr"], "steps": best["steps"],
            "tried": {f"{r['setting']['lr']:g}": score(r) for r in alike(rows, batch=batch, method=method)},
            "seeds": {str(r["setting"]["seed"]): score(r) for r in same}, **over([r["held"] for r in same]),
            "test": over([r["test"] for r in same if "test" in r and r["setting"]["seed"]]),  # seed 0 chose the rate
            "steps_to_target": reached,
            "seconds_to_target_1_rank": steps and steps * (t["t0"] + batch * t["t_img"]),
            "modelled_best_ranks": least and least["ranks"],
            "modelled_seconds_to_target_best_ranks": steps and least and steps * least[method],
        })  # fmt: skip
    wide = [(k, chosen(rows, batch=BASE, pairs=k)) for k in (1, *PAIRS)]
    pairs = [{"pairs": k, "lr": r["setting"]["lr"], **r["held"]} for k, r in wide if r]
    return {"target": target, "epochs": rows[0]["epochs"], "fits": fits, "sum_log2": a, "model": modelled,
            "batches": batches, "pairs": pairs, "times": found}  # fmt: skip


def draw(result: dict, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    (bars, local), (modelled, learned) = axes
    color = dict(zip(TIMED, ("#1f77b4", "#d62728", "#2ca02c"), strict=True))
    names = []
    measured = {(r["method"], r["n"], r["ranks"], r["threads"]): r for r in result["times"]["ranks"]}
    for method in ("manifold", "pgd"):
        for n in GLOBAL:
            for ranks, threads in LAUNCHES:
                row, alone = measured[method, n, ranks, threads], measured[method, n, 1, 1]
                bottom, x, whole = 0.0, len(names), sum(row[part] for part in PARTS)
                for part, shade in zip(PARTS, ("#4c78a8", "#e45756", "#f2a0a0", "#bbbbbb"), strict=True):
                    height = row[part] / whole * row["seconds"] / alone["seconds"]
                    bars.bar(x, height, bottom=bottom, color=shade, label=part if x == 0 else None)
                    bottom += height
                names.append(f"{'PGD-7' if method == 'pgd' else method} {n}: {ranks} x {threads}")
    bars.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    bars.axhline(0.5, color="black", ls=":", lw=1)
    bars.set(title="Measured: a step, over that of 1 rank x 1 thread", ylim=(0, 1.3))
    bars.legend(fontsize=8, ncols=4)
    for method in TIMED:
        line = [(r["n"], 1e3 * r["seconds"]) for r in result["times"]["local"] if r["method"] == method]
        local.loglog(
            *zip(*line, strict=True), "o", ms=4, color=color[method], label="PGD-7" if method == "pgd" else method
        )
        n, of = np.array([x for x, _ in line if x <= FITTED]), result["fits"][method]
        local.loglog(n, 1e3 * (of["t0"] + n * of["t_img"]), "-", lw=1, color=color[method])
    local.set(
        title="Measured, one thread; lines: t0 + n t_img", xlabel="images n of the local batch", ylabel="ms a step"
    )
    local.legend(fontsize=8)
    for n, shade in zip(GLOBAL, ("#9ecae1", "#6baed6", "#3182bd", "#08519c"), strict=True):
        line = [m for m in result["model"] if m["n"] == n]
        modelled.semilogx([m["ranks"] for m in line], [m["ratio"] for m in line], "--", color=shade, label=f"N = {n}")
    modelled.set(title="Model, not measured: a PGD-7 step over a manifold step", xlabel="ranks, one thread each")
    modelled.legend(fontsize=8)
    for method in sorted({b["method"] for b in result["batches"]}, key=TIMED.index):
        own, name = [b for b in result["batches"] if b["method"] == method], "PGD-7" if method == "pgd" else method
        x, robust = [b["batch"] for b in own], [100 * b["pgd10"] for b in own]
        learned.semilogx(x, robust, "-", color=color[method], label=f"{name}: PGD-10, mean of seeds, best rate")
        learned.semilogx(x, [100 * b["clean"] for b in own], ":", color=color[method], label=f"{name}: clean")
        for key, mark in (("seeds", "o"), ("tried", "_")):
            points = [(b["batch"], 100 * v) for b in own for v in b[key].values()]
            learned.plot(*zip(*points, strict=True), mark, ms=4, color=color[method])
    learned.set(
        title=f"Measured: held-out accuracy after {result['epochs']} epochs", ylabel="%",
        xlabel="images N a step (dots: seeds; dashes: other learning rates)",
    )  # fmt: skip
    x = sorted({b["batch"] for b in result["batches"]})
    learned.set_xticks(x, x, fontsize=8)
    learned.set_xticks([], minor=True)
    learned.legend(fontsize=7)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def report(args):
    found, rows = medians(checkpoint.read_json(args.times)["rounds"]), checkpoint.read_jsonl(args.accuracy)
    rows = [r for r in rows if r["epochs"] == args.epochs]
    result = summary(found, rows, args.target)
    for key in ("fits", "sum_log2"):
        print(key, result[key])
    for row in (*result["batches"], *result["pairs"]):
        print(row)
    for row in found["ranks"]:
        print(row)
    if args.json:
        checkpoint.write_json(args.json, result)
    if args.picture:
        draw(result, args.picture)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = p.add_subparsers(dest="part", required=True)
    one = parts.add_parser("accuracy", help="trainings of equal epochs, batches of 128 to 4,096")
    one.add_argument("--data", default="cifar10", choices=("cifar10", "shapes10"))
    one.add_argument("--data-dir", type=Path, help="folder with cifar-10-batches-bin")
    one.add_argument("--epochs", type=int, default=6)
    one.add_argument("--setting", type=json.loads, action="append", help="instead of the whole sweep: JSON of one run")
    one.add_argument("--runs", type=Path, default=Path("runs/scaling"), help="folder of the run folders")
    one.add_argument("--out", type=Path, required=True, help="a line a run; what it has is not run again")
    one.set_defaults(call=accuracy)
    one = parts.add_parser("times", help="seconds of a step, against ranks and against the local batch")
    one.add_argument("--sizes", type=int, nargs="+", default=GLOBAL, help="images a step, of all ranks")
    one.add_argument("--local", type=int, nargs="+", default=LOCAL, help="images a step, of one")
    one.add_argument("--rounds", type=int, default=1, help="that the file is to have more")
    one.add_argument("--json", type=Path)
    one.set_defaults(call=times)
    one = parts.add_parser("worker", help="what mpiexec starts for times")
    one.add_argument("--sizes", type=int, nargs="+", default=GLOBAL)
    one.set_defaults(call=worker)
    one = parts.add_parser("report", help="fits, the model for more ranks, pictures, of what the others left")
    one.add_argument("--times", type=Path, default=RESULTS / "scaling_times.json")
    one.add_argument("--accuracy", type=Path, default=RESULTS / "scaling_accuracy.jsonl")
    one.add_argument("--epochs", type=int, default=6)
    one.add_argument("--target", type=float, default=0.2, help="held-out robust accuracy that is to be reached")
    one.add_argument("--json", type=Path)
    one.add_argument("--picture", type=Path)
    one.set_defaults(call=report)
    args = p.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
