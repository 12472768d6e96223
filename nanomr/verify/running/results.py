"""A folder of verdicts: config.json, results*.jsonl (a line an image), proofs/, counterexamples/; what they add up to.

Several runs (shards, retries, machines) may write to one folder, each to a file of its own: they merge by image.
"""

import io
from pathlib import Path

import numpy as np

from ... import checkpoint
from ...attacks.report import fraction, wilson
from ...errors import UserError
from .pipeline import FINISHED, UNFINISHED, Outcome

PAPER = {  # percent, CIFAR-10 at 8/255: Table 1 of Jin & Rinard (2020)
    "Manifold Regularization (small)": {"clean": 36.66, "pgd": 25.56, "verified": 21.04},
    "Xiao et al.": {"clean": 40.45, "pgd": 26.78, "verified": 20.27},
    "Wong et al. (small)": {"clean": 28.67, "verified": 21.78},
}
MANY = 500  # unstable ReLUs an image: beyond, most proofs fail (measured by the prototype: 1,200 leave a quarter open)


class Folder:
    """Where one network's verdicts at one eps are kept. ``shard``: (i, n), for a file of its own."""

    def __init__(self, path: Path, shard: tuple[int, int] | None = None):
        self.path = Path(path)
        self.log = self.path / ("results.jsonl" if shard is None else "results-{}-of-{}.jsonl".format(*shard))

    def open(self, config: dict, resume: bool):
        """Make the folder, or check that what is there was begun with the same ``config``. Raises UserError."""
        file = self.path / "config.json"
        if file.exists():
            old = checkpoint.read_json(file)
            for key, value in config.items():
                before = old.get(key) if isinstance(old, dict) else None
                if key == "weights":  # the SHA-256 says it all
                    before, value = (v.get("sha256") if isinstance(v, dict) else v for v in (before, value))
                if before != value:
                    raise UserError(f"{self.path} was begun with {key} = {before}, not {value}: choose another --out")
            if self.log.exists() and not resume:
                raise UserError(f"{self.path} holds results already: --resume goes on, --out chooses another folder")
            return
        if any(self.path.glob("results*.jsonl")):
            raise UserError(f"{self.path} holds results but no config.json: choose another --out")
        try:
            for folder in ("proofs", "counterexamples"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.path}: {error.strerror or error}") from error
        checkpoint.write_json(file, config)

    def add(self, outcome: Outcome):
        """Save the proof or the counterexample, then the line: a line means that its files are there."""
        record = outcome.record
        if outcome.proof:
            checkpoint.save_tensors(self.path / "proofs" / f"{record['id']:05d}.safetensors", outcome.proof, {})
        if outcome.adversarial is not None:
            file = io.BytesIO()
            np.savez(file, adversarial=outcome.adversarial)
            checkpoint.write_atomic(self.path / "counterexamples" / f"{record['id']:05d}.npz", file.getvalue())
        checkpoint.append_jsonl(self.log, record)


def read(path: Path) -> tuple[dict, dict[int, dict]]:
    """(config, {id: record}) of a folder, all its result files merged: a finished verdict beats an unfinished one.

    Raises UserError when there is none, or when two runs contradict each other.
    """
    files = sorted(Path(path).glob("results*.jsonl"))
    if not files:
        raise UserError(f"{path} holds no results.jsonl: give the --out folder of a run of verify_small.py")
    config, records = checkpoint.read_json(Path(path) / "config.json"), {}
    if not isinstance(config, dict) or not {"eps", "weights", "data"} <= config.keys():
        raise UserError(f"{path}/config.json was not written by verify_small.py")
    for file in files:
        for record in checkpoint.read_jsonl(file):
            if not {"id", "verdict", "label"} <= record.keys() or record["verdict"] not in FINISHED + UNFINISHED:
                raise UserError(f"{file}: a line is not a result of verify_small.py ({str(record)[:60]}...)")
            old = records.get(record["id"])
            if old and "verified" in (pair := {old["verdict"], record["verdict"]}) and pair & {"attacked", "falsified"}:
                raise UserError(f"{path}: image {record['id']} is both verified and broken: this is a bug, report it")
            if old is None or record["verdict"] in FINISHED or old["verdict"] in UNFINISHED:
                records[record["id"]] = record
    return config, dict(sorted(records.items()))


def summarise(config: dict, records: dict[int, dict]) -> dict:
    """report.json: accuracies with 95 % intervals, how images were decided, ReLUs, seconds, warnings."""
    done, n = list(records.values()), len(records)

    def count(*verdicts):
        return sum(r["verdict"] in verdicts for r in done)

    open_, right = count(*UNFINISHED), n - count("misclassified")
    pgd = right - sum(r["verdict"] == "attacked" and r["stage"] == "pgd" for r in done)
    numbers = {
        "clean": right,
        "pgd": pgd,
        "pgd_strong": right - count("attacked"),
        "verified": count("verified"),
        "verified_float32": sum(r["verified_float32"] for r in done),
        "upper": count("verified") + open_,
    }
    proofs = [r for r in done if r.get("bound") and r["verdict"] != "attacked"]
    seconds = np.array([r["seconds"] for r in proofs] or [0.0])
    tried = [r for r in done if "unstable" in r]
    report = {
        **config,
        "images": n,
        **{key: value / max(n, 1) for key, value in numbers.items()},
        "intervals": {key: wilson(value, n) for key, value in numbers.items()},
        "open": {verdict: count(verdict) for verdict in UNFINISHED},
        "stages": _stages(done),
        "unstable": _mean([r["unstable"] for r in tried]),
        "switching": _mean([r["switching"] for r in tried]),
        "seconds": {
            "total_cpu": round(sum(r["seconds"] for r in done), 1),
            "proof_median": round(float(np.median(seconds)), 4),
            "proof_p95": round(float(np.quantile(seconds, 0.95)), 4),
            "largest": round(max((r["seconds"] for r in done), default=0.0), 2),
        },
    }
    report["warnings"] = warnings(report, tried)
    return report


def _stages(done) -> dict[str, int]:
    """How many images each stage decided: {"verified by crown": 1200, ...}."""
    stages: dict[str, int] = {}
    for r in done:
        if r["verdict"] in ("attacked", "verified", "falsified"):
            name = f"{r['verdict']} by {r['stage']}"
            stages[name] = stages.get(name, 0) + 1
    return dict(sorted(stages.items()))


def _mean(rows) -> list[float]:
    return [round(float(v), 2) for v in np.mean(rows, axis=0)] if rows else []


def warnings(report: dict, tried: list[dict]) -> list[str]:
    """What a reader must know before believing the figures; ``tried``: records of images that survived PGD."""
    found = []
    if len(tried) >= 20 and not any(sum(r["switching"]) for r in tried):
        found.append(
            "no ReLU switches in any image's box: around the images the network is linear; compare with a linear "
            "classifier, and look whether ReLUs switch between images (the training log's 'switching')"
        )
    if tried and sum(report["unstable"]) > MANY:
        found.append(
            f"{sum(report['unstable']):.0f} unstable ReLUs an image after CROWN: many images will stay undecided; "
            "train with more Hamming regularisation, or verify a smaller eps"
        )
    if any(report["open"].values()):
        text = ", ".join(f"{count} {name}" for name, count in report["open"].items() if count)
        found.append(f"undecided: {text}; --resume --retry all tries them again, with a longer --time-limit")
    return found


def lines(report: dict) -> list[str]:
    """A report for the terminal, with the paper's rows where they compare."""
    n, open_ = report["images"], sum(report["open"].values())
    names = {
        "clean": "clean", "pgd": "PGD (paper)", "pgd_strong": "PGD (strong)", "verified": "verified",
        "verified_float32": "verified, float32",
    }  # fmt: skip
    out = [f"{n} test images of {report['data']['name']}, linf, eps {fraction(report['eps'])}"]
    paper = PAPER if report["data"]["name"] == "cifar10" and fraction(report["eps"]) == "8/255" else {}
    out.append(f"  {'accuracy':18}{'':>8}{'95 % interval':>18}" + "".join(f"{name.split()[0]:>11}" for name in paper))
    for key, name in names.items():
        low, high = report["intervals"][key]
        cells = "".join(f"{f'{row[key]:.2f}%' if key in row else '-':>11}" for row in paper.values())
        out.append(f"  {name:18}{report[key]:8.2%}{f'{low:.1%} - {high:.1%}':>18}{cells}")
    out.append(f"  {'undecided':18}{open_ / max(n, 1):8.2%}")
    if paper:
        out.append(f"  the paper's rows are of {', '.join(paper)}")
    out.append("  decided: " + (", ".join(f"{count} {how}" for how, count in report["stages"].items()) or "none"))
    if report["unstable"]:
        layers = ", ".join(f"{a:.0f} ({b:.0f})" for a, b in zip(report["unstable"], report["switching"], strict=True))
        out.append(f"  unstable ReLUs an image after CROWN, by layer (in brackets: seen to switch): {layers}")
    s = report["seconds"]
    out.append(
        f"  CPU seconds: {s['total_cpu']:.0f} in all; an image that needed a proof: median {s['proof_median']:.2f}, "
        f"95 % within {s['proof_p95']:.2f}, longest {s['largest']:.1f}"
    )
    return out + [f"  warning: {line}" for line in report["warnings"]]
