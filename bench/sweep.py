#!/usr/bin/env python3
"""Find the constants of a network: short runs on 45,000 training images, judged on the 5,000 held out.

    python bench/sweep.py --data-dir DIR --epochs 12 --out bench/results/sweep.jsonl --settings settings.json

``settings.json`` is a list of objects with Config fields ({"gamma_i": 4, "gamma_h": 1000, "lr": 0.03, "clip": 1}; the
small network unless there is an "architecture", such as {"name": "preact_resnet18", "width": 16});
settings that the output file already has for this number of epochs are skipped, so that it can be stopped, extended
and run again, and several processes may share a file (``--part 0/2`` and ``--part 1/2``).
"""

import argparse
import json
import tempfile
from pathlib import Path

from nanomr import checkpoint, data, metrics, models
from nanomr.errors import UserError
from nanomr.train import Config, Trainer


def measure(settings: dict, epochs: int, dataset, judges: int) -> dict:
    """One run; its settings and what the held-out images say of it at the end."""
    fields = dict(architecture=models.small_cnn().architecture, method="manifold", data=dataset.name, epochs=epochs)
    config = Config(**{**fields, **settings})
    row = {"settings": settings, "epochs": epochs, "data": dataset.name}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, dataset, folder)
        try:
            model = trainer.run()
        except UserError as error:
            return {**row, "stopped": str(error).split(";")[0].replace(folder, "")}
        last = trainer.log[-1]
        images, labels = trainer.held[:judges], trainer.held_labels[:judges]
        robust = metrics.robust_accuracy(model, images, labels, config.eps, steps=20, restarts=2)
        keys = (
            "unstable",
            "switching",
            "dead",
            "corner_distance",
            "cross_entropy",
            "intrinsic",
            "hamming",
            "images_per_s",
        )
        clean = metrics.accuracy(model, images, labels)
        scores = {"images": len(images), "clean": clean, "pgd20x2": robust}
        return {**row, **scores, **{k: last[k] for k in keys}}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data", default="cifar10", choices=("cifar10", "shapes10"))
    p.add_argument("--data-dir")
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--judges", type=int, default=5000, help="held-out images for the scores at the end")
    p.add_argument("--settings", type=Path, required=True)
    p.add_argument("--part", default="0/1", help="i/n: every n-th setting, from the i-th")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    part, parts = map(int, args.part.split("/"))
    dataset = data.load(args.data, args.data_dir, download=False)
    for settings in json.loads(args.settings.read_text())[part::parts]:
        done = checkpoint.read_jsonl(args.out) if args.out.exists() else []
        if any(r["settings"] == settings and r["epochs"] == args.epochs for r in done):
            continue
        row = measure(settings, args.epochs, dataset, args.judges)
        checkpoint.append_jsonl(args.out, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
