"""Attack a network: PGD, AutoAttack, AutoAttack+ and the Wasserstein adversary of Jin & Rinard (2020), Tables 1 and 2.

nanomr attack --weights runs/x --attack pgd           # linf, eps 8/255
nanomr attack --weights runs/x --norm l2 --out a/l2   # AutoAttack+
nanomr attack --weights runs/x --norm l2 --out a/l2 --resume
nanomr attack --weights runs/x --attack all --out a/all
nanomr attack --table a/all a/l2           # our rows and the paper's
nanomr attack --check a/l2/examples.npz --weights runs/x
"""

import argparse
import io
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import __version__, checkpoint, cli, metrics, models, parallel, plots
from ..attacks import report as reporting
from ..attacks.autoattack import ROBUST, STAGES, WRONG, Stage, cascade, quick, with_classes
from ..attacks.common import l2, logits_of, predictions, recheck
from ..attacks.transport import least_cost
from ..attacks.wasserstein import wasserstein
from ..backend import to_device, to_numpy, use_device
from ..errors import UserError
from ..ops import gpu
from . import common

VERSIONS = {"pgd": "pgd", "autoattack": "standard", "autoattack+": "plus"}
ALL = ("pgd", "autoattack+", "wasserstein")  # AutoAttack+ breaks whatever AutoAttack breaks
WASSERSTEIN = {"steps": 400, "every": 10}  # ten steps at each radius: up to 0.1 (the paper's) it takes 300
EPS = {"linf": 8 / 255, "l2": 0.5}
PRECISIONS = {"fp32": lambda model: None, "tf32": models.InTf32, "bf16": models.InBfloat16}
CHECKED = set("check weights data data_dir no_download batch_size device kernels".split())  # what --check heeds
USES = {  # what a flag is for, and the attacks that heed it
    "radius": ("wasserstein", ("wasserstein", "all")),
    "norm": ("the other attacks", (*VERSIONS, "all")),
    "eps": ("the other attacks", (*VERSIONS, "all")),
    "individual": ("autoattack and autoattack+", ("autoattack", "autoattack+", "all")),
}
FREE = ("batch_size", "device")  # what a resumed run may change: no result depends on the first
EARLIER = {
    "precision": "fp32",
    "start": 0,
    "ids": None,
    "stages": None,
    "steps": None,
}  # runs of before there was a choice
PART = {"seconds", "refuted", "again"}  # what a part holds of each stage, beside its arrays


def parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    positive, natural = cli.number(int, low=1), cli.number(int, low=0)
    non_negative = cli.number(cli.fraction, low=0)

    g = p.add_argument_group("what to do", "one of --attack, --table, --check")
    text = "all: pgd, autoattack+ and wasserstein, each in a folder of its own"
    g.add_argument("--attack", choices=(*VERSIONS, "wasserstein", "all"), default="autoattack+", help=text)
    text = "print rows of Tables 1 and 2 from these run folders (or report.json files) of one network, and stop"
    g.add_argument("--table", type=Path, nargs="+", metavar="RUN", help=text)
    text = "evaluate a run's examples.npz again, and stop; exit code 2 when it does not bear the report out"
    g.add_argument("--check", type=Path, metavar="NPZ", help=text)

    g = p.add_argument_group("network and images")
    g.add_argument("--weights", type=Path, metavar="FILE", help="the network: a .safetensors file, or a run folder")
    text = "whose test images; default: of what the network was trained on, by its file, else shapes10"
    common.add_data(g, text)
    text = "so many test images, from --start on; 0: all. With --resume: more than before go on"
    g.add_argument("--n", type=natural, default=1000, help=text)
    g.add_argument("--start", type=natural, default=0, help="the number of the first of these test images")
    g.add_argument("--ids", type=natural, nargs="+", metavar="ID", help="these test images, and no others")

    g = p.add_argument_group("the attack")
    g.add_argument("--norm", choices=tuple(EPS), default="linf", help="of the perturbation; not for wasserstein")
    text = "radius of that ball, pixels in [0, 1]; default: 8/255 (linf), 0.5 (l2)"
    g.add_argument("--eps", type=non_negative, help=text)
    g.add_argument("--radius", type=non_negative, default=0.1, help="of the Wasserstein ball, in the images' mass")
    text = "run each attack of AutoAttack alone on all images; its result is the same, and takes longer"
    g.add_argument("--individual", action="store_true", help=text)
    names = sorted({stage.name for version in VERSIONS.values() for stage in STAGES[version]})
    text = f"of the attack's stages only these, in its order: {', '.join(names)}"
    g.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help=text)
    g.add_argument("--steps", type=positive, help="of every stage that takes steps, in place of the attack's own")
    g.add_argument("--quick", action="store_true", help="a tenth of the steps, restarts and queries: a rehearsal")
    seed = cli.number(int, low=0, high=2**63 - 1)
    g.add_argument("--seed", type=seed, default=0, help="of random starts and searches")

    g = p.add_argument_group("run")
    g.add_argument("--batch-size", type=positive, default=250, help="images in a forward pass; decides no result")
    g.add_argument("--chunk", type=positive, default=250, help="images between saves: a kill loses no more than these")
    g.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="where to compute")
    text = "on a GPU: auto tests ours on the first run, and replaces what fails there by plain CuPy, which is slower"
    g.add_argument("--kernels", choices=("auto", "own", "plain"), default="auto", help=text)
    text = "of the network that attacks see (tf32 on a GPU alone); verdicts are float32's. bf16 may attack less"
    g.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help=text)
    text = "mpi: the ranks of mpiexec -n RANKS python -m mpi4py attack_cifar.py ... divide the chunks among them"
    g.add_argument("--executor", choices=("process", "mpi"), default="process", help=text)
    text = (
        "only each N-th chunk, from the I-th on (0 <= I < N), for job arrays; when all are done, --resume without it "
        "makes the report"
    )
    g.add_argument("--shard", type=common.shard, metavar="I/N", help=text)
    g.add_argument("--out", type=Path, help="run folder; default: runs/WEIGHTS-ATTACK-NORM")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out; give the same flags again")
    return p


# --- what is attacked -------------------------------------------------------------------------------------------------


def configure(args, attack: str, weights: dict, dataset) -> dict:
    """config.json: all that decides the outcome of one attack's run. Stages are pinned with all their options."""
    eps = args.radius if attack == "wasserstein" else EPS[args.norm] if args.eps is None else args.eps
    only = {"stages": args.stages, "steps": args.steps}
    settings = [{"name": s.name, **s.options} for s in stages_of(attack, args.norm, eps, args.quick, **only)]
    n = len(dataset.test_images)
    if args.ids and (max(args.ids) >= n or len(set(args.ids)) < len(args.ids)):
        raise UserError(f"--ids: {dataset.name} has the test images 0 to {n - 1}, each to be named once")
    if args.start >= n:
        raise UserError(f"--start {args.start}: {dataset.name} has the test images 0 to {n - 1}")
    left = n - args.start
    return {
        "nanomr": __version__, "attack": attack, "norm": "wasserstein" if attack == "wasserstein" else args.norm,
        "eps": eps, "individual": args.individual and attack.startswith("autoattack"), "quick": args.quick,
        "seed": args.seed, "n": len(args.ids) if args.ids else min(args.n, left) if args.n else left,
        "start": args.start, "ids": args.ids, **only, "chunk": args.chunk, "batch_size": args.batch_size,
        "device": args.device, "precision": args.precision, "settings": settings,
        "weights": weights, "data": {"name": dataset.name, "source": dataset.source},
    }  # fmt: skip


def stages_of(attack: str, norm: str, eps: float, hurry: bool, stages=None, steps=None) -> tuple[Stage, ...]:
    """The attack's stages, or those of them in ``stages``; PGD's step is 2/255 in linf and 2.5 eps / steps in l2."""
    only = stages
    if attack == "wasserstein":
        stages = (Stage("wasserstein", wasserstein, {**WASSERSTEIN, "max_radius": eps}),)
    else:
        stages = STAGES[VERSIONS[attack]]
    stages = [s for s in stages if not only or s.name in only]
    if missing := sorted(set(only or ()) - {s.name for s in stages}):
        raise UserError(f"--stages: {attack} has no stage {missing[0]}")
    stages = quick(stages) if hurry else tuple(stages)
    if steps:
        stages = tuple(
            Stage(s.name, s.attack, s.options | ({"steps": steps} if "steps" in s.options else {})) for s in stages
        )
    if attack == "pgd":
        options = stages[0].options
        step = 2 / 255 if norm == "linf" else 2.5 * eps / options["steps"]
        stages = (Stage("pgd", stages[0].attack, {**options, "step_size": step}),)
    return stages


# --- a run ------------------------------------------------------------------------------------------------------------


class Run:
    """One attack on the first images of a test set, in a folder of its own.

    Chunks of images are finished one after another, each saved whole under ``parts``; a resumed run takes those that
    are there, does the others, and comes to the same result, since no draw depends on what else is in a batch.
    """

    def __init__(self, folder: Path, config: dict, model, dataset):
        self.folder, self.config, self.model, self.dataset = folder, config, model, dataset
        self.ids = np.array(config["ids"] or range(config["start"], config["start"] + config["n"]), int)
        self.x = metrics.as_float(to_device(dataset.test_images[self.ids], config["device"]))
        self.labels = to_device(dataset.test_labels[self.ids], config["device"])
        only = {"stages": config["stages"], "steps": config["steps"]}
        stages = stages_of(config["attack"], config["norm"], config["eps"], config["quick"], **only)
        classes = logits_of(model, self.x[:1]).shape[1]
        self.stages, left_out = with_classes(stages, classes)
        if left_out and config["stages"]:
            raise UserError(f"{', '.join(left_out)}: too few classes ({classes}) for what --stages names; leave it out")
        if self.x.shape[1] != self.x.shape[2] and "square" in [s.name for s in self.stages]:
            others = " ".join(s.name for s in self.stages if s.name != "square")
            raise UserError(f"square needs square images: --stages {others}")
        if left_out:
            names = [s.name for s in self.stages]
            settings = [s for s in config["settings"] if s["name"] in names]
            self.config = {**config, "settings": settings, "left_out": left_out, "classes": classes}
        self.attacked = PRECISIONS[config["precision"]](model)  # None: the model itself

    def make(self):
        """The folder. Raises UserError when that is not possible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror or error}") from error

    def open(self, resume: bool) -> bool:
        """Find the run in the folder, or begin it; True when it is finished. Raises UserError."""
        path = self.folder / "config.json"
        if os.path.lexists(path) and not resume:
            raise UserError(f"{self.folder} holds a run already: --resume goes on with it, --out chooses another")
        if os.path.lexists(path):
            old, new = checkpoint.read_json(path), json.loads(json.dumps(self.config))
            old = EARLIER | old if isinstance(old, dict) else {}
            for key in new:
                before, now = (c.get(key) for c in (old, new))
                if key == "weights":  # the SHA-256 says it all
                    before, now = (c.get("sha256") if isinstance(c, dict) else c for c in (before, now))
                more = key == "n" and type(before) is int and before < now and not new["ids"]
                if key not in FREE and before != now and not more:
                    raise UserError(f"{self.folder} was begun with {key} = {before}, not {now}: --out elsewhere")
            if self._reported() == self.config["n"]:
                return True
            if self._reported():
                self._take_apart()
        checkpoint.write_json(path, self.config)
        return False

    def _reported(self) -> int:
        """How many images the report in the folder is about."""
        path = self.folder / "report.json"
        return read_reports([path])[0].get("images", 0) if os.path.lexists(path) else 0

    def _take_apart(self):
        """A finished run of fewer images becomes the first part of this one."""
        first = self.folder / "parts" / f"{0:06d}.safetensors"
        if first.exists():
            return
        report, records = read_reports([self.folder / "report.json"])[0], checkpoint.read_jsonl(self._log)
        saved = _read_npz(self.folder / "examples.npz")
        codes = {None: ROBUST, "clean": WRONG} | {stage.name: i for i, stage in enumerate(self.stages, 1)}
        try:
            found = {"adversarial": saved["adversarial"], "by": np.array([codes[r["by"]] for r in records])}
            if "radius" in records[0]:
                found["radius"] = np.array([np.inf if r["radius"] is None else r["radius"] for r in records])
            if "alone" in records[0]:
                found["alone"] = np.array([[s.name in r["alone"] for s in self.stages] for r in records])
            rows = {key: [row.get(key, 0) for row in report["after"]] for key in ("seconds", "refuted", "again")}
            whole = [r["id"] for r in records] == saved["ids"].tolist() == self.ids[: len(records)].tolist()
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self._log} is not what {self.folder}/report.json is about ({error}): --out elsewhere"
            ) from None
        if not (whole and len(records) == report["images"]):
            raise UserError(f"{self.folder}: its images are not those that this run would begin with: --out elsewhere")
        first.parent.mkdir(exist_ok=True)
        checkpoint.save_tensors(first, found, rows)

    @property
    def _log(self) -> Path:
        return self.folder / "per_image.jsonl"

    def _parts(self):
        """(images, what became of them) of every part on the disk, in order."""
        first = 0
        while (path := self.folder / "parts" / f"{first:06d}.safetensors").exists():
            found = self._read(path, first)
            part = slice(first, first + len(found["by"]))
            yield part, found
            first = part.stop

    def attack(self):
        """Finish all chunks. A progress bar counts images whose fate is known."""
        n = self.config["n"]
        checkpoint.write_jsonl(self._log, [])
        (self.folder / "parts").mkdir(exist_ok=True)
        done = robust = 0
        with tqdm(total=n, desc=self.config["attack"], unit="img", disable=None) as bar:

            def finished(part, found):
                nonlocal done, robust
                done, robust = part.stop, robust + int((found["by"] == ROBUST).sum())
                _append(self._log, self._records(part, found))
                bar.set_postfix_str(f"robust so far {robust / done:.2%}, {n - done} left")
                bar.update(done - bar.n)

            for part, path in self._chunks():
                finished(part, self._read(path, part.start) if path.exists() else self._finish(part, path, bar, robust))

    def attack_some(self, i: int, n: int):
        """Finish each n-th chunk from the i-th on; the others are other processes'."""
        (self.folder / "parts").mkdir(exist_ok=True)
        with tqdm(total=self.config["n"], desc=self.config["attack"], unit="img", disable=True if i else None) as bar:
            for number, (part, path) in enumerate(self._chunks()):
                if number % n == i and not path.exists():
                    self._finish(part, path, bar)

    def _chunks(self):
        """(images, file) of every part, on the disk or not, in order. Only a part that is there ends within a chunk."""
        first, n, chunk = 0, self.config["n"], self.config["chunk"]
        while first < n:
            path = self.folder / "parts" / f"{first:06d}.safetensors"
            there = first + len(self._read(path, first)["by"]) if path.exists() else 0
            part = slice(first, there or min(first - first % chunk + chunk, n))
            yield part, path
            first = part.stop

    def _finish(self, part, path, bar, robust=0) -> dict:
        """Attack these images; what becomes of them is on the disk when this returns."""
        found = self._attack_chunk(part, bar, robust)
        tensors = {k: v for k, v in found.items() if isinstance(v, np.ndarray)}
        checkpoint.save_tensors(path, tensors, {k: found[k] for k in ("seconds", "refuted", "again")})
        return found

    def _attack_chunk(self, part, bar, robust) -> dict:
        x, labels, ids = self.x[part], self.labels[part], self.ids[part]
        common = dict(seed=self.config["seed"], ids=ids, batch_size=self.config["batch_size"])

        def advance(name, done, left, alive):
            settled = part.stop - part.start - alive
            text = f"{name} {done}/{left}, robust so far {(robust + alive) / part.stop:.2%}"
            bar.set_postfix_str(f"{text}, {self.config['n'] - part.start - settled} left")
            bar.update(max(part.start + settled - bar.n, 0))

        if self.config["attack"] != "wasserstein":
            found = cascade(
                self.model, x, labels, self.config["eps"], self.stages, norm=self.config["norm"],
                individual=self.config["individual"], progress=advance, attacked=self.attacked, **common,
            )  # fmt: skip
            result = {"adversarial": to_numpy(found.adversarial), "by": found.by}
            if found.alone is not None:
                result["alone"] = found.alone
            return {**result, "seconds": found.seconds, "refuted": found.refuted, "again": found.again}

        def transported(done, alive):
            advance("wasserstein", done, len(x), len(x) - done + alive)

        return self._transport(x, labels, common, transported)

    def _transport(self, x, labels, common, progress) -> dict:
        """The Wasserstein attack's; what only a less precise network falls for is attacked once more, in float32."""
        start, attacked = time.perf_counter(), self.attacked or self.model
        wrong = to_numpy(predictions(self.model, x) != labels)
        adversarial, radius = to_numpy(x).copy(), np.full(len(x), np.inf)
        by, left, refuted, again = np.where(wrong, WRONG, ROBUST), np.arange(len(x)), 0, 0
        for network in (attacked,) if attacked is self.model else (attacked, self.model):
            where = to_device(left, self.config["device"])
            found, at = self.stages[0].attack(
                network, x[where], labels[where], progress=progress if network is attacked else None,
                **common | {"ids": common["ids"][left]}, **self.stages[0].options,
            )  # fmt: skip
            fresh = to_numpy(recheck(self.model, x[where], found, labels[where], 1.0))  # eps 1: the box
            found, at = to_numpy(found), to_numpy(at).astype(np.float64)
            claimed = ~wrong[left] & np.isfinite(at) & (at <= self.config["eps"])
            hit = claimed & fresh
            adversarial[left[hit]], radius[left[hit]], by[left[hit]] = found[hit], at[hit], 1
            left = left[claimed & ~fresh]
            if network is self.model:
                refuted = len(left)
            else:
                again = len(left)
            if len(left) == 0:
                break
        radius[wrong] = 0
        seconds = time.perf_counter() - start
        found = {"adversarial": adversarial, "by": by, "radius": radius}
        return {**found, "seconds": [seconds], "refuted": [refuted], "again": [again]}

    def _read(self, path: Path, first: int) -> dict:
        tensors, metadata = checkpoint.load_tensors(path)
        by = tensors.get("by", np.empty(()))
        fits = by.ndim == 1 and 0 < len(by) <= self.config["n"] - first
        if not (fits and len(tensors.get("adversarial", ())) == len(by) and PART <= metadata.keys()):
            raise UserError(f"{path} is not a part of this run: delete it, and its images are attacked again")
        return {**tensors, **metadata}

    def _records(self, part, found: dict) -> list[dict]:
        x, adversarial = to_numpy(self.x[part]).astype(np.float64), found["adversarial"].astype(np.float64)
        length, largest = l2(adversarial - x), abs(adversarial - x).reshape(len(x), -1).max(1)
        records, labels = [], to_numpy(self.labels[part]).tolist()
        for i, by in enumerate(found["by"].tolist()):
            record = {"id": int(self.ids[part.start + i]), "label": labels[i], "by": self._name(by)}
            record |= {"linf": float(largest[i]), "l2": float(length[i])}
            if "radius" in found:
                record["radius"] = float(found["radius"][i]) if by != ROBUST else None
            if "alone" in found:
                record["alone"] = [s.name for s, hit in zip(self.stages, found["alone"][i], strict=True) if hit]
            records.append(record)
        return records

    def _name(self, by: int) -> str | None:
        """None: robust; "clean": misclassified to begin with; else the attack."""
        return {ROBUST: None, WRONG: "clean"}.get(by) if by < 1 else self.stages[by - 1].name

    def finish(self) -> dict:
        """Checks, examples.npz, examples.png, and at last report.json, which marks the run as finished."""
        config, parts = self.config, [found for _, found in self._parts()]
        arrays = [key for key, value in parts[0].items() if isinstance(value, np.ndarray)]
        joined = {key: np.concatenate([p[key] for p in parts]) for key in arrays}
        spatial = config["attack"] != "wasserstein"
        found = reporting.checks(
            self.model, self.x, self.labels, self.ids, joined["by"], norm=config["norm"], eps=config["eps"],
            stage=self.stages[0] if spatial else None, seed=config["seed"], steps=10 if config["quick"] else 100,
            batch_size=config["batch_size"], attacked=self.attacked,
        )  # fmt: skip
        report = reporting.assemble(
            config, joined["by"], np.sum([p["seconds"] for p in parts], axis=0).tolist(),
            np.sum([p["refuted"] for p in parts], axis=0).tolist(), found,
            alone=joined.get("alone"), radius=joined.get("radius"),
            again=np.sum([p["again"] for p in parts], axis=0).tolist() if self.attacked else None,
        )  # fmt: skip
        x, labels = to_numpy(self.x), to_numpy(self.labels)
        file = io.BytesIO()
        np.savez(file, x=x, adversarial=joined["adversarial"], labels=labels, ids=self.ids)
        checkpoint.write_atomic(self.folder / "examples.npz", file.getvalue())
        shown = np.flatnonzero(joined["by"] >= 1)[:8]
        if len(shown):
            adversarial = joined["adversarial"][shown]
            predicted = to_numpy(self.model.forward(to_device(adversarial, config["device"]))[0].argmax(1))
            names = [*self.dataset.classes, *map(str, range(len(self.dataset.classes), int(predicted.max()) + 1))]
            plots.examples(x[shown], adversarial, labels[shown], predicted, names, self.folder / "examples.png")
        checkpoint.write_json(self.folder / "report.json", report)
        return report


def _append(path: Path, records: list[dict]):
    """All of a chunk's lines at once, on the disk when this returns."""
    try:
        with open(path, "a") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def evaluate(folder: Path, config: dict, model, dataset, resume: bool, ranks=parallel.ALONE) -> dict | None:
    """The report of one attack, from the folder's own files as far as they go. Of several ``ranks``, which all attack
    chunks, rank 0 writes it, and the others get None."""
    run = Run(folder, config, model, dataset)
    if ranks.rank:
        if not ranks.broadcast_(np.zeros(1)):
            run.attack_some(ranks.rank, ranks.size)
            ranks.barrier()
        return None
    run.make()
    with checkpoint.locked(folder):
        if ranks.broadcast_(np.array([float(run.open(resume))])):
            print(f"{folder}: finished already")
            report = checkpoint.read_json(folder / "report.json")
        else:
            if ranks.size > 1:
                run.attack_some(0, ranks.size)
                ranks.barrier()  # all chunks are there
            run.attack()
            report = run.finish()
        shutil.rmtree(folder / "parts", ignore_errors=True)  # examples.npz and per_image.jsonl have it all
    print(cli.fold(reporting.lines(report)))
    return report


def evaluate_shard(folder: Path, config: dict, model, dataset, shard: tuple[int, int]):
    """A share of the chunks. Other shards may be at work in the folder; the report is for another run to make."""
    run = Run(folder, config, model, dataset)
    run.make()
    if run.open(resume=True):
        return
    (folder / "parts").mkdir(exist_ok=True)
    mine = folder / "parts" / "shard-{}-of-{}".format(*shard)
    mine.touch()
    with checkpoint.locked(mine):
        run.attack_some(*shard)


# --- --table, --check -------------------------------------------------------------------------------------------------


def read_reports(paths: list[Path]) -> list[dict]:
    """The reports at these paths: files, run folders, or folders of run folders. Raises UserError for others."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*/report.json")) or [path / "report.json"]
            inside = [file for file in inside if file.exists()]
            if not inside:
                raise UserError(f"{path} holds no report.json: the run is not finished (--resume goes on with it)")
            files += inside
        else:
            files.append(path)
    reports = [checkpoint.read_json(file) for file in files]
    for file, report in zip(files, reports, strict=True):
        if not isinstance(report, dict) or not {"after", "checks", "weights", "robust"} <= report.keys():
            raise UserError(f"{file} is not a report of `nanomr attack`")
    return reports


def check(args, device: str) -> int:
    """Evaluate saved adversarial images in a fresh process, against report and records beside them."""
    folder = args.check.parent
    report, records = read_reports([folder / "report.json"])[0], checkpoint.read_jsonl(folder / "per_image.jsonl")
    saved = _read_npz(args.check)
    dataset = common.load_data(args, report["data"])
    model, weights = common.load_network(args.weights, dataset, device)
    wrong = disagreements(model, saved, report, records, dataset, weights, args.batch_size, device)
    if wrong:
        raise UserError(f"{args.check} does not bear out the report: {'; '.join(wrong)}")
    said = f"{len(records)} images agree with the report (ball, box, prediction)"
    print(f"{args.check}: {said}; accuracy {report['robust']:.2%}")
    return 0


def disagreements(model, saved, report, records, dataset, weights, batch_size, device) -> list[str]:
    """What is wrong with the saved images, one phrase for each kind."""
    x, adversarial, labels, ids = (saved[k] for k in ("x", "adversarial", "labels", "ids"))
    n = len(records)
    if weights["sha256"] != report["weights"]["sha256"]:
        return ["--weights is another network than the report's (SHA-256)"]
    if any(len(a) != n for a in saved.values()) or n != report["images"] or [r["id"] for r in records] != ids.tolist():
        return [f"{n} records, {len(x)} images and a report of {report['images']}, or their numbers differ"]
    if x.shape != adversarial.shape or x.shape[1:] != model.input_shape or x.dtype != np.float32:
        return [f"images of shape {x.shape} and {adversarial.shape}, {x.dtype}"]
    if len(ids) and (ids.min() < 0 or ids.max() >= len(dataset.test_labels)):
        return ["images that the data set does not have"]
    found = []

    def note(bad, text):
        if count := int(np.count_nonzero(bad)):
            found.append(f"{count} images {text}")

    original, truth = metrics.as_float(dataset.test_images[ids]), dataset.test_labels[ids]
    note((original != x).reshape(n, -1).any(1) | (truth != labels), "are not the data set's")
    named = np.array([r["label"] for r in records], int)
    note(named != truth, "have other labels in per_image.jsonl")
    by = [r["by"] for r in records]
    clean, robust = np.array([b == "clean" for b in by], bool), np.array([b is None for b in by], bool)
    norm, eps = ("linf", 1.0) if report["norm"] == "wasserstein" else (report["norm"], report["eps"])
    on_device = [to_device(a, device) for a in (original, adversarial, truth)]
    fooled = to_numpy(recheck(model, *on_device, eps, norm, batch_size))
    wrong = to_numpy(predictions(model, on_device[0], batch_size)) != truth
    note(wrong != clean, "are classified otherwise before the attack")
    note(~clean & ~robust & ~fooled, "are not broken: not misclassified, or outside ball or box")
    if report["norm"] == "wasserstein":
        radius = np.array([np.nan if r.get("radius") is None else r["radius"] for r in records], float)
        note(~clean & ~robust & ~(radius <= report["eps"]), "have a radius beyond the report's")
        cost = np.zeros(n)
        for i in tqdm(np.flatnonzero(fooled & ~clean & ~robust), desc="transport", unit="img", disable=None):
            cost[i : i + 1] = least_cost(original[i : i + 1], adversarial[i : i + 1])
        note(cost > radius * (1 + 1e-6) + 1e-7, "are not in the Wasserstein ball of their radius")
    note((clean | robust) & (adversarial != original).reshape(n, -1).any(1), "that no attack broke are changed")
    change = adversarial.astype(np.float64) - original
    for norm, length in (("linf", abs(change).reshape(n, -1).max(1, initial=0)), ("l2", l2(change))):
        claimed = np.array([np.nan if r[norm] is None else r[norm] for r in records], float)
        note(~(abs(length - claimed) <= 1e-6 * np.maximum(claimed, 1e-3)), f"lie at another {norm} distance")
    for key, count in (("clean", (~clean).sum()), ("robust", robust.sum())):
        if n and abs(report[key] - count / n) > 1e-12:
            found.append(f"{key} accuracy is {count / n:.2%} by per_image.jsonl, {report[key]:.2%} by the report")
    return found


def _read_npz(path: Path) -> dict:
    arrays = checkpoint.load_arrays(path)
    names = ("x", "adversarial", "labels", "ids")
    wrong = not set(names) <= set(arrays) or any(arrays[name].ndim == 0 for name in names)
    if wrong or arrays["ids"].dtype.kind not in "iu":
        raise UserError(f"{path} is not an examples.npz of `nanomr attack`")
    return {name: arrays[name] for name in names}


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> int:
    p = parser()
    args = common.arguments(p, "--executor", lambda value: value == "mpi")
    ranks = parallel.start("mpi", args.device, math.inf) if args.executor == "mpi" else parallel.ALONE
    with ranks.together():
        return _main(p, args, ranks)


def _main(p, args, ranks: parallel.Ranks) -> int:
    if ranks.rank == 0:
        common.announce_compilation()
    if args.eps is not None and args.norm == "linf":
        try:
            cli.linf_radius(f"{args.eps:g}")
        except argparse.ArgumentTypeError as error:
            p.error(f"argument --eps: {error}")
    if args.table:
        common.refuse_others(parser(), {"table"}, "--table")
        print(cli.fold(reporting.tables(read_reports(args.table)).splitlines()))
        return 0
    if args.check:
        common.refuse_others(parser(), CHECKED, "--check")
    if not args.weights:
        p.error("--weights FILE is needed: the network")
    with ranks.first():
        device = use_device(args.device, args.kernels)
    if device == "cpu" and args.precision == "tf32":
        raise UserError("--precision tf32 needs a GPU: use --precision fp32 or bf16")
    if device == "gpu":
        gpu.set_tf32(False)  # whatever CUPY_TF32 says: verdicts are float32's
    if args.check:
        return check(args, device)
    for flag in sorted(cli.given(parser()) & USES.keys()):
        use, attacks = USES[flag]
        if args.attack not in attacks:
            p.error(f"--{flag} is for {use}, and changes nothing with --attack {args.attack}: leave it out")
    if args.ids and (args.start or cli.given(parser()) & {"n"}):
        p.error("--ids names the images: leave --n and --start out")
    if (args.stages or args.steps) and args.attack == "all":
        p.error("--stages and --steps are for one --attack")
    if args.resume and not args.out:
        p.error("--resume needs --out: the folder of the run")
    if args.shard and not args.out:
        p.error("--shard needs --out: the folder of the run")
    with ranks.first():
        dataset = common.load_data(args, args.data or common.trained_on(args.weights))
    model, weights = common.load_network(args.weights, dataset, device)
    args.device = device
    file = common.weights_file(args.weights).resolve()
    name = file.parent.name if file.stem == "model" else file.stem
    folder = args.out or Path("runs") / f"{name}-{args.attack}-{args.norm}"
    attacks = ALL if args.attack == "all" else (args.attack,)
    if ranks.rank == 0:
        print(f"{folder}: {weights['file']} (SHA-256 {weights['sha256'][:12]}...) on {device}", flush=True)
    if args.resume and not folder.exists():
        raise UserError(f"--resume: {folder} holds no run; leave --resume out to begin one")
    reports = []
    for attack in attacks:
        inside = folder / attack if args.attack == "all" else folder
        what = inside, configure(args, attack, weights, dataset), model, dataset
        try:
            if args.shard:
                evaluate_shard(*what, args.shard)
            else:
                reports.append(evaluate(*what, args.resume, ranks))
        except KeyboardInterrupt:
            if ranks.rank:
                raise
            ranks.fail(130)
            print(f"\n{inside}: the same command with --out {folder} --resume goes on after the last finished chunk")
            return 130
    if args.shard or ranks.rank:
        return 0
    if any(r["attack"] != "pgd" or r["norm"] == "linf" for r in reports):
        print("\n" + cli.fold(reporting.tables(reports).splitlines()))
    if args.attack == "all":  # the one in each attack's folder is what --table and --check read
        checkpoint.write_json(folder / "report.json", {"attack": "all", "reports": reports})
    files = f"{folder}: report.json, per_image.jsonl, examples.npz{', examples.png' if _drawn(folder) else ''}"
    print("\n" + cli.fold([files]))
    return 0


def _drawn(folder: Path) -> bool:
    return any(folder.rglob("examples.png"))
