#!/usr/bin/env python3
"""Does the manifold method scale with the batch, "since it increases batch sizes rather than epochs"? ``docs/claims.md``.

python bench/claims/scaling.py accuracy --data-dir DIR --out bench/results/claims/scaling_accuracy.jsonl
"""

import argparse
import time
from pathlib import Path

import numpy as np

from nanomr import checkpoint, data, metrics, models
from nanomr.errors import UserError
from nanomr.train import Config, Trainer

# --- accuracy after equal epochs --------------------------------------------------------------------------------------

SMALL = dict(gamma_i=10.0, gamma_h=600.0, clip=1.0)  # train_cifar.py's for the small network, at N = 128
BASE = 128
FIRST = {  # peak learning rates to begin with, between those that grow with N's root and with N
    128: (0.03, 0.06), 1024: (0.12, 0.06), 4096: (0.24, 0.12), 512: (0.06, 0.12), 2048: (0.12, 0.24), 256: (0.06, 0.03),
}  # fmt: skip
MOST = 4  # learning rates that are tried for one N


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
    """A setting is {"batch", "lr", "seed", "pairs", "method", "scaled"}; what it lacks is 128, 0.03, 0, 1, manifold, True.

    The norm "over the batch" of the Hamming term falls with the root of its rows, and so does its gradient: ``scaled``
    makes up for that, so that the objective is the same for every N and every number of pairs.
    """
    batch, pairs, method = setting.get("batch", BASE), setting.get("pairs", 1), setting.get("method", "manifold")
    own = dict(SMALL, constants={"steps": 7} if method == "pgd" else {})
    if setting.get("scaled", True):
        own["gamma_h"] *= (batch * pairs / BASE) ** 0.5
    if method != "manifold":
        own["recipe"] = "paper"  # one schedule for both
    return Config(
        architecture=models.small_cnn(input_shape=dataset.train_images.shape[1:]).architecture, method=method,
        data=dataset.name, epochs=epochs, batch_size=batch, lr=setting.get("lr", 0.03), seed=setting.get("seed", 0),
        hold_out=5000 if dataset.name == "cifar10" else 2000, **own,
    ).checked()  # fmt: skip


def train(setting: dict, dataset, epochs: int, runs: Path) -> dict:
    """One run, which goes on where it stopped: what the held-out images say after each epoch, and all of them at the
    end."""
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
    held = trainer.held, trainer.held_labels
    row["held"] = {
        "images": len(held[0]), "clean": metrics.accuracy(model, *held),
        "pgd10": metrics.robust_accuracy(model, *held, config.eps, steps=10, seed=config.seed),
    }  # fmt: skip
    keys = ("epoch", "loss", "accuracy", "held_pgd10", "unstable", "gradient_norm", "seconds")
    return {**row, "judges": min(trainer.judges, len(held[0])), "log": [{k: r[k] for k in keys} for r in trainer.log]}


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


def wanted(rows: list[dict], first: dict, most: int = MOST):
    """Settings, in the order in which they are to be run: the ``first`` learning rates for every N, two pairs an image,
    further learning rates where the best is the largest or the smallest, ``most`` in all, four pairs, second seeds.
    ``rows``: what is done, to which the caller adds."""
    for i in range(max(map(len, first.values()))):
        for batch, rates in first.items():
            if i < len(rates):
                yield {"batch": batch, "lr": rates[i], "seed": 0}
    yield chosen(rows, batch=BASE)["setting"] | {"pairs": 2}
    for batch in first:
        while len(rates := [r["setting"]["lr"] for r in alike(rows, batch=batch)]) < most:
            lr = chosen(rows, batch=batch)["setting"]["lr"]
            if lr not in (min(rates), max(rates)):
                break
            yield {"batch": batch, "lr": lr * 2 if lr == max(rates) else lr / 2, "seed": 0}
    yield chosen(rows, batch=BASE)["setting"] | {"pairs": 4}
    for batch in first:
        yield chosen(rows, batch=batch)["setting"] | {"seed": 1}


def accuracy(args):
    dataset = data.load(args.data, args.data_dir, download=False)
    rows = checkpoint.read_jsonl(args.out) if args.out.exists() else []
    todo = wanted(rows, FIRST) if not args.setting else iter(args.setting)
    for setting in todo:
        if any(r["setting"] == setting and r["epochs"] == args.epochs for r in rows):
            continue
        start = time.monotonic()
        row = train(setting, dataset, args.epochs, args.runs)
        rows.append(row)
        checkpoint.append_jsonl(args.out, row)
        print(f"{setting} {row.get('held', row.get('stopped'))} {time.monotonic() - start:.0f} s", flush=True)


def main():
    import json

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
    args = p.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
