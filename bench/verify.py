"""How long does a proof take? Seconds per image and stage on one core, and the plain MILP formulation beside it.

python bench/verify.py --weights pretrained/small_cnn-cifar10 --data cifar10    # minutes; the last line is JSON
python bench/verify.py --quick                                                  # does it run? figures mean nothing

The plain formulation is what one writes down first: interval bounds, a variable for every ReLU's input and output,
every rival's margin minimised to its optimum. Needs highspy. bench/README.md says how it is measured.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"  # before NumPy
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "a network (file or run folder) instead of a random one"
    parser.add_argument("--weights", type=Path, help=text)
    parser.add_argument("--data", choices=("shapes10", "cifar10"), default="shapes10", help="images to verify")
    parser.add_argument("--data-dir", help="folder with cifar-10-batches-bin")
    parser.add_argument("--images", type=int, default=1000, help="test images to screen (%(default)s)")
    parser.add_argument("--eps", type=int, default=8, help="linf radius in 1/255 (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=120.0, help="CPU seconds an image (%(default)s)")
    text = "images that get to the proofs and are also verified by the plain formulation (%(default)s)"
    parser.add_argument("--plain", type=int, default=10, help=text)
    text = "CPU seconds for the plain formulation of an image, after which it counts as if it were finished"
    parser.add_argument("--plain-limit", type=float, default=60.0, help=text + " (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the JSON line here too")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.images, args.plain, args.plain_limit = min(args.images, 4), min(args.plain, 1), 2.0
    return args


def plain_seconds(chain, low, high, label: int, limit: float) -> tuple[float, str]:
    """(CPU seconds, outcome) of the plain formulation for one image, capped at ``limit``.

    Outcomes: "verified", "broken", "limit"; "failed" where HiGHS gives up, or calls a program infeasible: none is.
    """
    import highspy
    import numpy as np

    from nanomr.verify.bounds.crown import margin_rows
    from nanomr.verify.bounds.interval import propagate

    start = time.process_time()
    infinity, lp = highspy.kHighsInf, highspy.HighsLp()
    lower, upper, integer = [low.ravel()], [high.ravel()], [np.zeros(low.size, bool)]
    entries, bounds = [], []  # (rows, columns, values), (row lower, row upper)
    inputs, column, row = np.arange(low.size), low.size, 0
    centre, radius = 0.5 * (low + high), 0.5 * (high - low)
    for stage in chain.stages[:-1]:
        for layer in stage.layers:
            centre, radius = propagate(layer, centre, radius, [])
        z_low, z_high = (centre - radius).ravel(), (centre + radius).ravel()
        n = len(z_low)
        z, a, d = (column + k * n + np.arange(n) for k in range(3))
        column += 3 * n
        lower += [z_low, np.zeros(n), np.zeros(n)]
        upper += [z_high, np.maximum(z_high, 0), np.ones(n)]
        integer += [np.zeros(2 * n, bool), np.ones(n, bool)]
        for first in range(0, n, 512):  # z - A a' = b
            part = np.arange(first, min(first + 512, n))
            unit = np.zeros((len(part), n))
            unit[np.arange(len(part)), part] = 1
            weight = stage.transpose(unit.reshape(-1, *stage.out_shape)).reshape(len(part), -1)
            at, of = np.nonzero(weight)
            entries += [(row + part[at], inputs[of], -weight[at, of]), (row + part, z[part], np.ones(len(part)))]
        bounds.append((stage.bias.ravel(), stage.bias.ravel()))
        at = row + n + np.arange(n)
        entries += [(at, a, np.ones(n)), (at, z, -np.ones(n))]  # a - z >= 0
        bounds.append((np.zeros(n), np.full(n, infinity)))
        entries += [(at + n, a, np.ones(n)), (at + n, d, -np.maximum(z_high, 0))]  # a - u d <= 0
        bounds.append((np.full(n, -infinity), np.zeros(n)))
        entries += [(at + 2 * n, a, np.ones(n)), (at + 2 * n, z, -np.ones(n))]  # a - z - l d <= -l
        entries += [(at + 2 * n, d, -np.minimum(z_low, 0))]
        bounds.append((np.full(n, -infinity), -np.minimum(z_low, 0)))
        row += 4 * n
        inputs = a
        centre, radius = np.maximum(centre + radius, 0), np.maximum(centre - radius, 0)
        centre, radius = 0.5 * (centre + radius), 0.5 * (centre - radius)
    rows, columns, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    order = np.lexsort((columns, rows))
    lp.num_col_, lp.num_row_ = column, row
    lp.col_lower_, lp.col_upper_ = np.concatenate(lower), np.concatenate(upper)
    lp.row_lower_, lp.row_upper_ = (np.concatenate(part) for part in zip(*bounds, strict=True))
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.searchsorted(rows[order], np.arange(row + 1))
    lp.a_matrix_.index_, lp.a_matrix_.value_ = columns[order], values[order]
    kinds = highspy.HighsVarType
    lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in np.concatenate(integer)]
    last, classes = chain.stages[-1], chain.classes
    for rival in (k for k in range(classes) if k != label):
        left = limit - (time.process_time() - start)
        if left <= 0:
            return limit, "limit"
        margin = margin_rows([label], [rival], classes)
        cost = np.zeros(column)
        cost[inputs] = last.transpose(margin).ravel()
        lp.col_cost_, lp.offset_ = cost, float(margin[0] @ last.bias)
        solver = highspy.Highs()
        solver.silent()
        for option, value in {"threads": 1, "time_limit": left}.items():
            solver.setOptionValue(option, value)
        solver.passModel(lp)
        solver.run()
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kTimeLimit:
            return limit, "limit"
        if status != highspy.HighsModelStatus.kOptimal:
            return time.process_time() - start, "failed"
        if solver.getInfo().objective_function_value <= 0:
            return time.process_time() - start, "broken"
    return time.process_time() - start, "verified"


def main():
    args = arguments()
    import numpy as np

    from nanomr import data, metrics, models
    from nanomr.verify.bounds.crown import crown, image_box
    from nanomr.verify.exact.milp import Solver
    from nanomr.verify.running.pipeline import UNFINISHED, Outcome, Settings, Verifier

    load = os.getloadavg()[0]
    if load > 0.5 and not args.quick:
        print(f"warning: the machine is busy (load average {load:.1f}): wait, or do not believe what follows")
    model = models.load(args.weights) if args.weights else models.small_cnn(seed=0)
    dataset = data.load(args.data, args.data_dir, download=False)
    n = min(args.images, len(dataset.test_labels))
    x, labels = metrics.as_float(dataset.test_images[:n]), dataset.test_labels[:n]
    if not args.weights:  # a random network is right about nothing: its own words are the labels
        labels = model.forward(x)[0].argmax(1)
    done: list[Outcome] = []
    with Solver() as solver:
        verifier = Verifier(model, Settings(args.eps / 255, time_limit=args.time_limit), solver)
        verifier.screen(x[:1], labels[:1], [0])  # compiles, opens files
        start = time.perf_counter()
        for first in range(0, n, 16):
            part = np.arange(first, min(first + 16, n))
            for outcome in verifier.screen(x[part], labels[part], part):
                if outcome.record["verdict"] is None:
                    outcome = verifier.decide(x[outcome.record["id"]], outcome)
                done.append(outcome)
        wall = time.perf_counter() - start
    records = [o.record for o in done]
    stages: dict[str, list] = {}
    for record in records:
        for stage, seconds in record["stages"].items():
            stages.setdefault(stage, []).append(seconds)
    print(
        f"{n} images, {wall:.0f} s on one core; {'stage':14} {'images':>7} {'mean s':>8} {'median':>8} {'largest':>8}"
    )
    for stage, seconds in stages.items():
        print(
            f"{'':34}{stage:14} {len(seconds):7} {np.mean(seconds):8.4f} {np.median(seconds):8.4f} {max(seconds):8.2f}"
        )
    proofs = [r for r in records if "bound" in r and r["verdict"] != "attacked"]
    seconds = np.array([r["seconds"] for r in proofs] or [0.0])
    compared = proofs[:: max(1, len(proofs) // max(args.plain, 1))][: args.plain]
    ours, plain, finished = 0.0, 0.0, 0
    for record in compared:
        i = record["id"]
        low, high = image_box(x[i : i + 1], args.eps / 255)
        spent, outcome = plain_seconds(verifier.chain, low, high, record["label"], args.plain_limit)
        print(
            f"image {i}: {record['verdict']} in {record['seconds']:.2f} s; plain: {outcome} in {spent:.1f} s",
            flush=True,
        )
        contradiction = {"verified": "broken", "falsified": "verified"}.get(record["verdict"]) == outcome
        assert not contradiction, f"image {i}: the two formulations contradict each other"
        ours, plain, finished = ours + record["seconds"], plain + spent, finished + (outcome in ("verified", "broken"))
    low, high = image_box(x[: min(n, 16)], args.eps / 255)
    crown_s = []
    for _ in range(5):
        start = time.perf_counter()
        crown(verifier.chain, low, high)
        crown_s.append((time.perf_counter() - start) / len(low))
    line = json.dumps(
        {
            "images": n, "data": dataset.name, "eps": f"{args.eps}/255", "wall_s": round(wall, 1),
            "crown_s": round(float(np.median(crown_s)), 4), "median_s": round(float(np.median(seconds)), 4),
            "p95_s": round(float(np.quantile(seconds, 0.95)), 3), "largest_s": round(float(seconds.max()), 2),
            "proofs": len(proofs), "verified": sum(r["verdict"] == "verified" for r in records),
            "timeouts": sum(r["verdict"] in UNFINISHED for r in records),
            "vs_plain": round(plain / ours, 1) if compared else None,
            "plain_finished": f"{finished} of {len(compared)}", "load": round(load, 2), "quick": args.quick,
        }
    )  # fmt: skip
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
