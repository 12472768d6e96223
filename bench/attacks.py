"""How long do PGD-20 and AutoAttack take for an image? nanomr against PyTorch and pyautoattack, on the CPU.

python bench/attacks.py                           # minutes; the last line is JSON
python bench/attacks.py --weights runs/x --data cifar10 --eps 8/255
python bench/attacks.py --quick                   # does it run? the figures mean nothing

Needs torch; for AutoAttack also: pip install --no-deps pyautoattack==0.2.0. bench/README.md says how it is measured.
"""

import argparse
import json
import os
import sys
import time
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "bench")]

import train_step  # noqa: E402  (the other benchmark: threads and machine)

STEP = 2 / 255


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "a small_cnn (file or run folder) instead of a random one"
    parser.add_argument("--weights", type=Path, help=text)
    parser.add_argument("--data", choices=("random", "shapes10", "cifar10"), default="random", help="images to attack")
    parser.add_argument("--data-dir", help="folder with cifar-10-batches-bin")
    parser.add_argument("--images", type=int, default=64, help="how many (%(default)s)")
    text = "linf radius; default: where about half of the images withstand PGD-20"
    parser.add_argument("--eps", type=Fraction, help=text)
    parser.add_argument("--version", choices=("standard", "plus"), default="standard", help="of AutoAttack")
    parser.add_argument("--skip-autoattack", action="store_true", help="PGD only")
    text = "of both libraries (%(default)s)"
    parser.add_argument("--threads", type=int, default=train_step.usable_cores(), help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the JSON line here too")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    args = parser.parse_args()
    args.eps = None if args.eps is None else float(args.eps)
    if args.quick:
        args.images = min(args.images, 8)
    return args


def task(args):
    """(model, images (N, 32, 32, 3), labels): random images take the network's own words as labels."""
    import numpy as np

    from nanomr import data, metrics, models

    model = models.load(args.weights) if args.weights else models.small_cnn(seed=0)
    if args.data == "random":
        x = np.random.default_rng(0).random((args.images, 32, 32, 3), np.float32)
        *_, last = model.children.values()
        last.params["bias"] -= model.forward(x)[0].mean(0)  # else one class wins everywhere
        return model, x, model.forward(x)[0].argmax(1)
    dataset = data.load(args.data, args.data_dir, download=False)
    x, labels = metrics.as_float(dataset.test_images), dataset.test_labels
    right = np.flatnonzero(model.forward(x[: 100 * args.images])[0].argmax(1) == labels[: 100 * args.images])
    return model, np.ascontiguousarray(x[right[: args.images]]), labels[right[: args.images]]


def our_pgd(model, x, labels, eps):
    from nanomr.attacks.pgd import pgd

    return ~pgd(model, x, labels, eps, step_size=STEP, steps=20, restarts=1, batch_size=len(x))[1]


def torch_pgd(net, x, labels, eps, drop: bool):
    """PGD-20 in PyTorch; with ``drop``, images that are fooled leave the batch, as ours do."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        robust = net(x).argmax(1) == labels
    left = torch.nonzero(robust)[:, 0] if drop else torch.arange(len(x))
    x, labels = x[left], labels[left]
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    current = (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(low, high)
    for step in range(21):
        current.requires_grad_(step < 20)
        logits = net(current)
        hit = logits.argmax(1) != labels
        robust[left[hit]] = False
        if step == 20 or (drop and hit.all()):
            break
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, current)
        current = current.detach().add_(gradient.sign_(), alpha=STEP).clamp_(low, high)
        if drop and hit.any():
            left, labels, current, low, high = (a[~hit] for a in (left, labels, current, low, high))
    return robust.numpy()


def half_way(model, x, labels) -> float:
    """The eps, of a few, at which PGD-20 leaves closest to half of the images."""
    grid = [k / 255 / 8 for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)]
    return min(grid, key=lambda eps: abs(our_pgd(model, x, labels, eps).mean() - 0.5))


def timed(repeats: int, *functions):
    """[(best seconds, result)] of functions that take turns; each runs once before."""
    results = [function() for function in functions]
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for k, function in enumerate(functions):
            start = time.perf_counter()
            results[k] = function()
            best[k] = min(best[k], time.perf_counter() - start)
    return list(zip(best, results, strict=True))


def our_autoattack(model, x, labels, eps, version, hurry):
    """(seconds, robust, seconds per stage)."""
    from nanomr.attacks.autoattack import STAGES, cascade, quick

    stages = STAGES[version]
    stages = quick(stages) if hurry else stages
    start = time.perf_counter()
    found = cascade(model, x, labels, eps, stages, batch_size=len(x))
    stage_seconds = dict(zip(found.stages, found.seconds, strict=True))
    return time.perf_counter() - start, ~found.fooled, stage_seconds


def their_autoattack(net, x, labels, eps, version, quick):
    """(seconds, robust) of the authors' code."""
    import torch
    from pyautoattack import AutoAttack

    official = AutoAttack(net, norm="Linf", eps=eps, version=version, seed=0, device="cpu")
    if quick:
        for attack in (official.apgd, official.apgd_targeted, official.fab):
            attack.n_iter, attack.n_restarts = 10, 1
        official.square.n_queries = 500
    start = time.perf_counter()
    adversarial, _ = official.run_standard_evaluation(x, labels, batch_size=len(x))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return seconds, (net(adversarial).argmax(1) == labels).numpy()


def main():
    args = arguments()
    train_step.fix_environment(args.threads)
    import numpy as np
    import torch
    import torch_twin

    torch.set_num_threads(args.threads)
    model, x, labels = task(args)
    net = torch_twin.twin(model.architecture).eval()
    net.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    for parameter in net.parameters():
        parameter.requires_grad_(False)  # no weight gradients on their side either
    tx, ty = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    with torch.no_grad():
        if not np.allclose(net(tx).numpy(), model.forward(x)[0], atol=1e-3):
            raise SystemExit("the two networks disagree")
    eps = half_way(model, x, labels) if args.eps is None else args.eps
    train_step.print_machine(args.threads, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)
    n = len(x)
    found = {"threads": args.threads, "images": n, "eps": eps, "data": args.data, "quick": args.quick}

    (ours, mine), (same, theirs), (plain, _) = timed(
        1 if args.quick else 5,
        lambda: our_pgd(model, x, labels, eps),
        lambda: torch_pgd(net, tx, ty, eps, True),
        lambda: torch_pgd(net, tx, ty, eps, False),
    )
    found |= {
        "pgd_s_per_image": ours / n, "torch_pgd_s_per_image": same / n, "torch_pgd_plain_s_per_image": plain / n,
        "pgd_ratio": same / ours, "pgd_ratio_plain": plain / ours,
        "pgd_robust": float(mine.mean()), "torch_pgd_robust": float(theirs.mean()),
    }  # fmt: skip
    print(f"PGD-20, {n} images, linf eps {eps * 255:g}/255      ms per image   robust")
    print(f"  nanomr                                {1e3 * ours / n:10.2f}   {mine.mean():.2%}")
    print(f"  PyTorch, the same                     {1e3 * same / n:10.2f}   {theirs.mean():.2%}")
    print(f"  PyTorch, fooled images stay           {1e3 * plain / n:10.2f}")

    if not args.skip_autoattack:
        ours, mine, stages = our_autoattack(model, x, labels, eps, args.version, args.quick)
        found |= {
            "version": args.version, "autoattack_s_per_image": ours / n, "autoattack_robust": float(mine.mean()),
            "autoattack_stage_s": {name: round(seconds, 3) for name, seconds in stages.items()},
        }  # fmt: skip
        print(f"AutoAttack, {args.version}                   s per image   robust")
        print(f"  nanomr                                {ours / n:10.3f}   {mine.mean():.2%}")
        print("   ", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()))
        try:
            seconds, theirs = their_autoattack(net, tx, ty, eps, args.version, args.quick)
        except ImportError:
            print("  pyautoattack is not installed: pip install --no-deps pyautoattack==0.2.0")
        else:
            found |= {
                "pyautoattack_s_per_image": seconds / n, "pyautoattack_robust": float(theirs.mean()),
                "autoattack_ratio": seconds / ours, "disagree": int((mine != theirs).sum()),
            }  # fmt: skip
            print(f"  pyautoattack                          {seconds / n:10.3f}   {theirs.mean():.2%}")
    line = json.dumps(found)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
