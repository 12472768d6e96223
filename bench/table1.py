#!/usr/bin/env python3
"""Table 1: rows of methods, each trained, attacked and verified on the same network and the same images.

    python bench/table1.py rows.json --data-dir DIR                # a JSON line a row into bench/results/table1.jsonl
    python bench/table1.py trials.json --data-dir DIR --held-out   # judged on the images held out: to choose constants
    python bench/table1.py --draw                                  # docs/img/table1.png, the tables in docs/table1.md

``rows.json`` is a list of {"method": "pgd", "constants": {"steps": 10}, "epochs": 100, "seed": 0, "eps": "8/255"}; all
but the method have these defaults. "flags" are further ones of train_cifar.py ({"lr": 0.05}); "verify": only the first
so many images; "name": what the table calls the row, if its settings are too many to be read. Kill it where you like:
the same command goes on, and leaves out the rows that the file has.

The last training images (5,000 of CIFAR-10's) are held out of every run. Test images are not to choose: without
``--held-out`` a row is judged on them, so that is for rows whose constants are chosen.
"""

import argparse
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from nanomr import checkpoint, cli, data, metrics
from nanomr.attacks.report import fraction
from nanomr.backend import to_device, use_device
from nanomr.errors import UserError
from nanomr.programs import attack as attacking
from nanomr.programs import common
from nanomr.programs import train as training
from nanomr.programs import verify as verifying
from nanomr.train import Interrupted, Trainer
from nanomr.verify.running import pipeline

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TRIALS = ROOT / "bench/results/table1.jsonl", ROOT / "bench/results/trials.jsonl"
PAGE, PICTURE = ROOT / "docs/table1.md", ROOT / "docs/img/table1.png"
DEFAULTS = {"constants": {}, "epochs": 100, "seed": 0, "eps": "8/255", "flags": {}, "verify": 0}
FATAL = ("became NaN", "collapsed")  # how a run that will never get further says so

# (what, network, clean %, verified %): certified.md 1.1 and Table 1 of the paper, CIFAR-10 itself, 8/255
PUBLISHED = (
    ("Jin & Rinard 2020", "this one", 36.66, 21.04),
    ("Xiao et al. 2019", "this one, 100 hidden units", 40.45, 20.27),
    ("Wong et al. 2018", "this one, 100 hidden units", 27.8, 20.8),
    ("DiffAI ConvMed", "this one, 100 hidden units", 43.6, 24.7),
    ("DiffAI ConvSmall", "without padding", 42.6, 24.9),
    ("Gowal et al. 2018, small", "2.25 times as wide behind the convolutions", 43.55, 26.01),
)


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The rows of the file, each with every key of DEFAULTS. Raises UserError."""
    rows = checkpoint.read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a list of rows such as " + '{"method": "pgd", "epochs": 100}')
    for number, row in enumerate(rows, 1):
        unknown = sorted(row.keys() - DEFAULTS.keys() - {"method", "name"})
        if unknown or "method" not in row:
            what = f"has the key {unknown[0]!r}, which is none" if unknown else "names no method"
            raise UserError(f"{path}, row {number}, {what}: the keys are method, name, {', '.join(DEFAULTS)}")
        if not re.fullmatch("[^|\n]+", str(row.get("name", "none"))):
            raise UserError(f"{path}, row {number}: a name is one line, without |")
    return [DEFAULTS | row for row in rows]


def command(row: dict, data_name: str) -> list[str]:
    """The flags of train_cifar.py for the row: what the table's reader would type, but for this machine's."""
    flags = ["--method", row["method"], "--data", data_name]
    for name in ("epochs", "seed", "eps"):
        flags += [f"--{name}", str(row[name])]
    for name, value in row["constants"].items():
        flags += ["--constant", f"{name}={value}"]
    for name, value in row["flags"].items():
        switch = isinstance(value, bool)
        flags += [f"--{'no-' if value is False else ''}{name}"] if switch else [f"--{name}", str(value)]
    return flags


def configure(row: dict, number: int, args, dataset):
    """The row's Config, as train_cifar.py would have it. Raises UserError, naming the row, for what that refuses."""
    try:
        here = ["--device", args.device, "--no-download", *(["--data-dir", args.data_dir] if args.data_dir else [])]
        flags = training.parser().parse_args(command(row, args.data) + here)
        config = training.configure(flags, args.device, dataset).checked()
        training.refuse_unused({name.replace("-", "_") for name in row["flags"]}, config)
        return config
    except (UserError, ValueError) as error:
        raise UserError(f"{args.rows}, row {number}: {error}") from None


def folder_of(row: dict, config, args) -> Path:
    """Where the row's run is: the same network for every judge."""
    said = json.dumps(asdict(config), sort_keys=True)
    return args.work / f"{row['method']}-{row['seed']}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"


def held_out(dataset, n: int):
    """The data set with the ``n`` images that are held out of training in the place of its test images."""
    _, _, images, labels = dataset.hold_out(n)
    name = f"{dataset.name}, held out"
    return replace(dataset, name=name, test_images=images, test_labels=labels, source=dataset.source | {"held_out": n})


# --- one row: train, attack, verify -----------------------------------------------------------------------------------


def measure(row: dict, config, dataset, args) -> dict:
    """The row's line. Everything that it stands on is kept in its folder, so that it is begun but once."""
    folder = folder_of(row, config, args)
    line = {"row": row, "judge": judge_of(args), "data": dataset.name, "source": dataset.source, "quick": args.quick}
    line |= {
        "command": " ".join(command(row, args.data)),
        "config": {k: v for k, v in asdict(config).items() if k != "architecture"},
    }
    trainer = Trainer(config, dataset, folder, args.device)
    trainer.open_folder()
    trainer.save_config()  # what is interrupted says that train_cifar.py --resume goes on, too
    if (folder / "last.safetensors").exists():
        trainer.resume()
    elif "init" in row["flags"]:
        training.begin_with(trainer, Path(row["flags"]["init"]))
    try:
        trainer.run()
    except UserError as error:
        if not any(text in str(error) for text in FATAL):
            raise  # of this machine, not of the method
        return line | {"stopped": str(error).split(";")[0].replace(str(folder), folder.name)}
    trainer.plot()
    judge = held_out(dataset, config.hold_out) if args.held_out else dataset
    model, weights = common.load_network(folder, judge, args.device)
    place = folder / (judge_of(args).replace(" ", "-") + ("-quick" if args.quick else ""))
    found = {}
    for attack, n in (("pgd", args.pgd_images), ("autoattack", args.auto_images)):
        report = attacked(attack, n, place / attack, model, weights, judge, config, args)
        found[attack] = {key: report[key] for key in ("images", "robust", "interval", "warnings")}
    proved = verified(row, place / "verify", folder, weights, judge, config, args)
    kept = "images verified verified_float32 open stages unstable seconds warnings".split()
    found["proofs"] = {key: proved[key] for key in kept} | {"upper": at_most(place), "time_limit": args.time_limit}
    images, labels = (to_device(a, args.device) for a in (judge.test_images, judge.test_labels))
    return line | {
        "images": len(labels), "weights": weights["sha256"], "clean": metrics.accuracy(model, images, labels), **found,
        "train_seconds": round(sum(record["seconds"] for record in trainer.log), 1),
        "images_per_s": trainer.log[-1]["images_per_s"] if trainer.log else None,
    }  # fmt: skip


def judge_of(args) -> str:
    return "held out" if args.held_out else "test"


def attacked(attack: str, n: int, folder: Path, model, weights, judge, config, args) -> dict:
    """The report of ``nanomr attack --attack ATTACK`` on the first ``n`` images (0: all)."""
    flags = ["--attack", attack, "--n", n, "--seed", config.seed, "--eps", config.eps, "--device", args.device]
    options = attacking.parser().parse_args([*map(str, flags), *["--quick"] * args.quick])
    settings = attacking.configure(options, attack, weights, judge)
    return attacking.evaluate(folder, settings, model, judge, resume=True)


def verified(row: dict, folder: Path, network: Path, weights, judge, config, args) -> dict:
    """The report of ``nanomr verify`` on all images, or the row's first."""
    flags = ["--weights", network, "--seed", config.seed, "--time-limit", args.time_limit, "--jobs", args.jobs]
    options = verifying.parser().parse_args([*map(str, flags), "--resume"])
    n = len(judge.test_labels)
    ids = np.arange(min(row["verify"] or n, n))
    return verifying.verify(options, config.eps, folder, weights, judge, ids)


def at_most(place: Path) -> float:
    """The share of images that are verified, or neither decided nor broken by any of the attacks.

    Raises UserError when one is proved for the float32 network, and broken.
    """
    records = verifying.results.read(place / "verify")[1]
    files = [place / attack / "per_image.jsonl" for attack in ("pgd", "autoattack")]
    broken = {record["id"] for file in files for record in checkpoint.read_jsonl(file) if record["by"] is not None}
    if wrong := [i for i, record in records.items() if record["verified_float32"] and i in broken]:
        raise UserError(f"{place}: image {wrong[0]} is both verified and broken: this is a bug, report it")
    left = [i for i, record in records.items() if record["verdict"] in pipeline.UNFINISHED and i not in broken]
    return (len(left) + sum(record["verdict"] == "verified" for record in records.values())) / len(records)


# --- what is said of them ---------------------------------------------------------------------------------------------


def shown(lines: list[dict]) -> dict[str, list[dict]]:
    """{a row's name: its lines, one a seed}: those that the table has, which are judged on test images."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        if line["judge"] == "test" and not line["quick"]:
            groups.setdefault(name_of(line["row"]), []).append(line)
    return groups


def name_of(row: dict) -> str:
    """What the tables call it: all seeds alike."""
    options = [f"{k} {v}" for k, v in (row["constants"] | row["flags"]).items()]
    options += [f"{row['epochs']} epochs"] + [f"eps {row['eps']}"] * (row["eps"] != DEFAULTS["eps"])
    return row.get("name") or f"{row['method']}, {', '.join(options)}"


def table(lines: list[dict]) -> str:
    """The lines as a Markdown table: the mean of a row's seeds, and their range."""
    out = [
        "| row | seeds | clean % | PGD-20x10 % | AutoAttack % | verified % | at most % | training s | proofs, CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in sorted(shown(lines).items(), key=lambda item: -_mean_verified(item[1])):
        alive = [line for line in group if "stopped" not in line]
        if not alive:
            out.append(f"| {name} | {len(group)} | {group[0]['stopped']} |" + " |" * 6)
            continue
        columns = [[line["clean"] for line in alive]]
        columns += [[line[key]["robust"] for line in alive] for key in ("pgd", "autoattack")]
        columns += [[line["proofs"][key] for line in alive] for key in ("verified", "upper")]
        cells = [_spread([100 * value for value in column]) for column in columns]
        few = min(line["proofs"]["images"] for line in alive)
        cells[3] += f" (first {few:,})" if few < alive[0]["images"] else ""
        seconds = [[line["train_seconds"] for line in alive], [_cpu(line) for line in alive]]
        cells += [f"{np.mean(column):,.0f}" for column in seconds]
        seeds = f"{len(alive)} of {len(group)}" if len(alive) < len(group) else str(len(group))
        out.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(out)


def _cpu(line) -> float:
    return line["proofs"]["seconds"]["total_cpu"]


def _mean_verified(group) -> float:
    return float(np.mean([line["proofs"]["verified"] if "proofs" in line else -1.0 for line in group]))


def _spread(values) -> str:
    text = f"{np.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}-{max(values):.2f})"


def generated(lines: list[dict]) -> str:
    """What docs/table1.md has between its two marks."""
    if not shown(lines):
        return "Nothing has been run yet."
    names = sorted({line["data"] for group in shown(lines).values() for line in group})
    files = [line["source"] for group in shown(lines).values() for line in group]
    copy = " (these files are not the published ones)" if any(s.get("verified") is False for s in files) else ""
    picture = "![Verified against clean accuracy](img/table1.png)"
    return f"{table(lines)}\n\nTest images of {', '.join(names)}{copy}.\n\n{picture}"


def trials(lines: list[dict]) -> str:
    """The held-out lines as a Markdown table. Of those that differ in constants and flags alone the best is bold: the
    most proved where every image was to be proved, else the most left by PGD."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        if line["judge"] == "held out" and not line["quick"]:
            row = line["row"]
            groups.setdefault((line["data"], *(row[k] for k in ("method", "epochs", "seed", "eps"))), []).append(line)
    out = ["| trial | clean % | PGD-20x10 % | verified % |", "|---|---:|---:|---:|"]
    for group in groups.values():
        alive = [line for line in group if "stopped" not in line]
        proved = all(line["proofs"]["images"] == line["images"] for line in alive)
        worth = {id(line): line["proofs"]["verified"] if proved else line["pgd"]["robust"] for line in alive}
        for line in group:
            name = name_of(line["row"])
            if id(line) not in worth:
                out.append(f"| {name} | {line['stopped']} | | |")
                continue
            name = f"**{name}**" if worth[id(line)] == max(worth.values()) else name
            verified_ = f"{100 * line['proofs']['verified']:.2f}" if proved else ""
            out.append(f"| {name} | {100 * line['clean']:.2f} | {100 * line['pgd']['robust']:.2f} | {verified_} |")
    return "\n".join(out)


def into_page(text: str, lines: list[dict], of_trials: list[dict]) -> str:
    """The page's text with new tables between its marks. Raises UserError where it has none."""
    for what, new in (("--draw", generated(lines)), ("--draw: trials", trials(of_trials))):
        begin, end = f"<!-- begin: bench/table1.py {what} -->\n", "<!-- end -->"
        head, mark, rest = text.partition(begin)
        _, stop, tail = rest.partition(end)
        if not (mark and stop):
            raise UserError(f"the page lacks the marks {begin.strip()} and {end}: restore them")
        text = f"{head}{mark}\n{new}\n\n{stop}{tail}"
    return text


def draw(lines: list[dict], path):
    """Verified against clean accuracy: a point a row and seed, a bar up to what stayed open; published ones hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods: dict[str, list[dict]] = {}
    for group in shown(lines).values():
        for line in group:
            if "stopped" not in line and fraction(cli.fraction(str(line["row"]["eps"]))) == DEFAULTS["eps"]:
                methods.setdefault(line["row"]["method"], []).append(line)
    figure, both = plt.subplots(1, 2, figsize=(14, 6.2), layout="constrained")
    near = [(clean, verified_) for *_, clean, verified_ in PUBLISHED]  # what the second panel shows
    for n, name in enumerate(sorted(methods, key=lambda name: -_mean_verified(methods[name]))):
        x = [100 * line["clean"] for line in methods[name]]
        low, high = ([100 * line["proofs"][key] for line in methods[name]] for key in ("verified", "upper"))
        near += [point for point in zip(x, low, strict=True) if point[1] > 15]
        style = {"color": f"C{n % 10}", "marker": "osD^vPX<>"[n % 9], "label": name}
        for axes in both:
            axes.vlines(x, low, high, color=style["color"], lw=1.2, alpha=0.6)
            axes.scatter(x, low, 45, **style, zorder=3)
    for letter, (name, _, clean, verified_) in zip("abcdefghij", PUBLISHED, strict=False):
        for axes in both:
            label = f"{letter}: {name}, published"
            axes.scatter(clean, verified_, 60, facecolors="none", edgecolors="0.25", zorder=4, label=label)
        both[1].annotate(letter, (clean, verified_), xytext=(5, 5), textcoords="offset points", color="0.25")
    (left, bottom), (right, top) = (np.array(near).min(0) - 1.5, np.array(near).max(0) + 1.5)
    both[0].set(title="One network, one exact verifier; a bar goes up to what stayed undecided", ylim=(-0.5, None))
    both[1].set(title="the same, where most is proved", xlim=(left, right), ylim=(bottom, top))
    for axes in both:
        axes.set(xlabel="clean accuracy, test images, %", ylabel="verified accuracy at 8/255, %")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    both[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- the program ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    positive, natural = cli.number(int, low=1), cli.number(int, low=0)
    p.add_argument("rows", type=Path, nargs="?", help="a JSON file: the list of rows")
    p.add_argument("--draw", action="store_true", help="the picture and the tables from --out and --trials, and stop")
    p.add_argument("--held-out", action="store_true", help="judge by the images that are held out, not by test images")
    p.add_argument("--part", type=common.shard, default=(0, 1), metavar="I/N", help="every N-th row, from the I-th")
    p.add_argument("--data", default="cifar10", help="as train_cifar.py has it (%(default)s)")
    p.add_argument("--data-dir", help="folder with cifar-10-batches-bin")
    p.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="trains and attacks; a CPU verifies")
    p.add_argument("--pgd-images", type=natural, default=0, help="first images for PGD-20x10; 0: all (%(default)s)")
    p.add_argument("--auto-images", type=natural, default=1000, help="first images for AutoAttack (%(default)s)")
    seconds = cli.number(float, above=0)
    p.add_argument("--time-limit", type=seconds, default=120.0, help="CPU seconds a proof (%(default)s)")
    p.add_argument("--jobs", type=positive, default=1, help="processes that verify (%(default)s)")
    p.add_argument("--work", type=Path, default=Path("runs/table1"), help="folder of the runs (%(default)s)")
    p.add_argument("--out", type=Path, default=RESULTS, help="a JSON line a row (%(default)s)")
    p.add_argument("--trials", type=Path, default=TRIALS, help="with --draw: lines that held-out images judged")
    p.add_argument("--page", type=Path, default=PAGE, help="with --draw: the page with the tables")
    p.add_argument("--picture", type=Path, default=PICTURE, help="with --draw: where it goes")
    p.add_argument("--quick", action="store_true", help="attacks with a tenth of their steps: a rehearsal, never drawn")
    return p


def main() -> int:
    p = parser()
    args = p.parse_args()
    if args.draw:
        lines, of_trials = (checkpoint.read_jsonl(file) if file.exists() else [] for file in (args.out, args.trials))
        checkpoint.write_atomic(args.page, into_page(args.page.read_text(encoding="utf-8"), lines, of_trials))
        if shown(lines):
            draw(lines, args.picture)
        return 0
    if not args.rows:
        p.error("a file of rows is needed, or --draw")
    rows = read_rows(args.rows)
    dataset = data.load(args.data, args.data_dir, download=False)
    configs = [configure(row, number, args, dataset) for number, row in enumerate(rows, 1)]  # all, before the first
    if args.held_out and 0 in (nothing := [config.hold_out for config in configs]):
        raise UserError(f"{args.rows}, row {nothing.index(0) + 1}: nothing is held out that could judge")
    common.announce_compilation()
    use_device(args.device)
    first, step = args.part
    for row, config in list(zip(rows, configs, strict=True))[first::step]:
        done = checkpoint.read_jsonl(args.out) if args.out.exists() else []
        mine = {"row": row, "judge": judge_of(args), "data": dataset.name, "quick": args.quick}
        if any(mine == {k: line.get(k) for k in mine} for line in done):
            continue
        try:
            line = measure(row, config, dataset, args)
        except (Interrupted, KeyboardInterrupt) as stopped:
            print(f"\n{stopped or 'stopped'}\nthe same command goes on")
            return 130
        args.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.append_jsonl(args.out, line)
        print(summary(line), flush=True)
    return 0


def summary(line: dict) -> str:
    """A line for the terminal."""
    name, judge = line["row"]["method"], line["judge"]
    if "stopped" in line:
        return f"{name}, seed {line['row']['seed']}: {line['stopped']}"
    return (
        f"{name}, seed {line['row']['seed']}, eps {fraction(line['config']['eps'])}, {judge} images: clean "
        f"{line['clean']:.2%}, PGD {line['pgd']['robust']:.2%}, AutoAttack {line['autoattack']['robust']:.2%}, "
        f"verified {line['proofs']['verified']:.2%} to {line['proofs']['upper']:.2%}"
    )


if __name__ == "__main__":
    cli.run(main)
