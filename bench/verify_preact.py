"""How small must eps be before bounds prove anything of the main network? Accuracies against eps.

python bench/verify_preact.py --weights runs/x --data cifar10 --images 100     # hours on a CPU; the last line is JSON
python bench/verify_preact.py --quick                                          # does it run? the figures mean nothing

For each eps: the share of test images that are right, that withstand PGD-20, and that intervals and CROWN (on bounds
carried forwards) verify: in real arithmetic, up to float64's rounding. bench/README.md says how it is measured.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
EPS = "1e-5,2e-5,5e-5,1e-4,2e-4,5e-4,1e-3,2e-3,1/255,2/255,4/255,8/255"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="a network (file or run folder) instead of a random one")
    parser.add_argument("--data", choices=("shapes10", "cifar10"), default="shapes10", help="images to verify")
    parser.add_argument("--data-dir", help="folder with cifar-10-batches-bin")
    parser.add_argument("--images", type=int, default=100, help="the first test images (%(default)s)")
    parser.add_argument("--eps", default=EPS, help="linf radii, ascending (%(default)s)")
    text = "a layer with more unstable ReLUs in an image is not tightened by CROWN (%(default)s)"
    parser.add_argument("--most", type=int, default=512, help=text)
    parser.add_argument("--batch", type=int, default=4, help="images at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads of kernels and BLAS (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the JSON line here too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (PNG)")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.images, args.eps, args.most = min(args.images, 4), "1e-5,1e-3,8/255", 8
    if args.threads:  # before NumPy
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(args.threads)
    return args


def verified(bound, images, labels, classes: int, eps: float, batch: int):
    """(N,) bool: is every margin's lower bound, by ``bound(low, high, rows, owner)``, above 0?"""
    import numpy as np

    from nanomr.verify.bounds.crown import image_box, margin_rows

    found = np.zeros(len(images), bool)
    for first in range(0, len(images), batch):
        part = slice(first, first + batch)
        pairs = [(i, y, t) for i, y in enumerate(labels[part]) for t in range(classes) if t != y]
        owner, label, rival = np.array(pairs).T
        margins = bound(*image_box(images[part], eps), margin_rows(label, rival, classes), owner)
        found[part] = (margins.reshape(-1, classes - 1) > 0).all(1)  # NaN is no proof
    return found


def main():
    args = arguments()
    import numpy as np

    from nanomr import data, metrics, models, plots
    from nanomr.attacks import pgd
    from nanomr.cli import fraction
    from nanomr.verify.bounds import tree
    from nanomr.verify.bounds.forms import forms

    radii = sorted(fraction(text) for text in args.eps.split(","))
    if args.weights:
        model = models.load(args.weights)
    else:
        model = models.preact_resnet18(width=2)
    dataset = data.load(args.data, args.data_dir)
    images = metrics.as_float(dataset.test_images[: args.images])
    labels = dataset.test_labels[: args.images]
    network, n = tree.Tree(model), len(images)
    right = np.flatnonzero(model.forward(images)[0].argmax(1) == labels)
    if not args.weights:  # a random network is right about too few
        labels, right = model.forward(images)[0].argmax(1), np.arange(n)

    def intervals(*box_and_rows):
        return tree.interval_margins(network, *box_and_rows)

    def crown(low, high, rows, owner):
        return tree.margins(network, low, high, rows, owner, 0, forms(network, low, high, args.most))

    left, reports = {"interval": right, "crown": right}, []
    for eps in radii:
        start, report = time.time(), {"eps": eps, "images": n, "clean": len(right) / n}
        _, fooled = pgd(model, images[right], labels[right], eps, steps=20)
        report["pgd"] = 1 - (n - len(right) + int(fooled.sum())) / n
        safe = set(right[~fooled])
        for name, bound in (("interval", intervals), ("crown", crown)):
            # what was not verified with a smaller eps, or is fooled, is not tried again
            at = np.array([i for i in left[name] if i in safe], int)
            left[name] = at[verified(bound, images[at], labels[at], network.classes, eps, args.batch)]
            report[name] = len(left[name]) / n
        report["seconds"] = round(time.time() - start, 1)
        reports.append(report)
        names = ", ".join(f"{key} {100 * report[key]:.1f} %" for key in ("clean", "pgd", "interval", "crown"))
        print(f"eps {eps:.2e} ({255 * eps:.3g}/255): {names}; {report['seconds']} s", flush=True)
    found = {"network": model.name, "parameters": int(model.weights.size), "data": args.data, "images": n}
    found |= {"most": args.most, "curve": reports}
    if args.plot:
        plots.accuracy_by_eps(reports, args.plot)
    line = json.dumps(found)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
