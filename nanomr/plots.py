"""Pictures, drawn only where matplotlib is installed (``pip install 'nanomr[plots]'``)."""

import math
from pathlib import Path

import numpy as np


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# what the steps of other methods report beside the loss: nanomr.methods.METHODS
METHOD_TERMS = ("adversarial", "balance", "bounds", "interval", "kl", "stability")


def curves(log: list[dict], path, held: bool = True) -> Path | None:
    """Accuracy, loss terms, ReLU stability and schedules, from the records of a run's log; ``held``: were the images
    that it was judged on held out? None without matplotlib."""
    plt = _pyplot()
    if plt is None:
        return None
    epochs = [r["epoch"] for r in log]

    def series(key, scale=1.0):
        return np.array([math.nan if r.get(key) is None else r[key] * scale for r in log])

    figure, ((accuracy, loss), (relus, schedule)) = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    accuracy.plot(epochs, series("accuracy", 100), label="clean")
    accuracy.plot(epochs, series("pgd10", 100), label="PGD-10, 500 images")
    if any(r.get("ibp_verified") is not None for r in log):
        accuracy.plot(epochs, series("ibp_verified", 100), label="proved by intervals, at the full eps")
    accuracy.set(title=f"Accuracy on {'held-out' if held else 'training'} images", ylabel="%", ylim=(0, 100))
    loss.plot(epochs, series("loss"), "k", label="loss")
    loss.plot(epochs, series("cross_entropy"), label="cross-entropy")
    weights = {"intrinsic": "gamma_i", "hamming": "gamma_h"}
    for name in (*weights, *METHOD_TERMS):
        if any(r.get(name) is not None for r in log):
            weight = weights.get(name)
            values = series(name) * (series(weight) if weight else 1)
            loss.plot(epochs, values, label=f"{weight} x {name}" if weight else f"{name} (unweighted)")
    loss.set(title="Loss and its terms", ylim=(0, None))
    relus.plot(epochs, series("unstable", 100), label="unstable in the eps-ball (interval bounds)")
    for key in ("switching", "dead"):
        relus.plot(epochs, series(key, 100) / series("relus"), label=f"{key} over 500 images")
    relus.set(title="ReLUs", ylabel="%", ylim=(0, 100))
    schedule.plot(epochs, series("eps", 255 / 8), label="eps / (8/255)")
    if top := np.fmax.reduce(series("lr"), initial=0):
        schedule.plot(epochs, series("lr", 1 / top), label=f"lr / {top:.4g}")
    schedule.set(title="Schedules", ylim=(0, 1.05))
    gammas = {key: series(key) for key in ("gamma_i", "gamma_h") if np.fmax.reduce(series(key), initial=0) > 0}
    if gammas:  # both grow by the same factor: on an axis of their own, and logarithmic, they do not hide each other
        weights = schedule.twinx()
        for (key, values), style in zip(gammas.items(), ("C2--", "C3-."), strict=False):
            weights.plot(epochs, np.where(values > 0, values, math.nan), style, label=key)
            schedule.plot([], [], style, label=f"{key} (right)")  # for the legend
        weights.set(yscale="log", ylabel="gamma")
    for axes in (accuracy, loss, relus, schedule):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)


def examples(x, adversarial, labels, predicted, classes, path, count: int = 8) -> Path | None:
    """The first ``count`` images: clean, what the attack added (magnified), adversarial, and what both are called.

    ``x`` and ``adversarial`` (N, H, W, C) in [0, 1]; ``labels`` and ``predicted`` (N,) index ``classes``. None for no
    images, and without matplotlib.
    """
    plt = _pyplot()
    count = min(count, len(x))
    if plt is None or count == 0:
        return None
    figure, axes = plt.subplots(3, count, figsize=(1.5 * count + 0.6, 5.2), layout="constrained", squeeze=False)
    for i in range(count):
        change = np.asarray(adversarial[i], float) - x[i]
        largest = float(abs(change).max())
        shown = 0.5 + change / (2 * largest) if largest else np.full_like(change, 0.5)  # grey: unchanged
        factor = f"x {0.5 / largest:.3g}" if largest else "nothing"
        titles = (classes[int(labels[i])], factor, classes[int(predicted[i])])
        for axis, image, title in zip(axes[:, i], (x[i], shown, adversarial[i]), titles, strict=True):
            if image.shape[-1] != 3:  # no colours: the mean of the channels, in grey
                image = np.repeat(image.mean(-1, keepdims=True), 3, -1)
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.set(xticks=[], yticks=[])
    for axis, text in zip(axes[:, 0], ("clean", "added, magnified", "adversarial"), strict=True):
        axis.set_ylabel(text)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)


def accuracy_by_eps(reports: list[dict], path) -> Path | None:
    """Clean, PGD and verified accuracy against eps, from the reports of ``nanomr verify``. None without matplotlib.

    Those of ``bench/verify_preact.py`` have what intervals and CROWN verify each, and radii of several magnitudes.
    """
    plt = _pyplot()
    if plt is None:
        return None
    reports = sorted(reports, key=lambda r: r["eps"])
    x = [255 * r["eps"] for r in reports]
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    names = {"clean": "clean", "pgd": "PGD (paper)", "pgd_strong": "PGD (strong)", "verified": "verified"}
    names |= {"crown": "verified (CROWN)", "interval": "verified (intervals)"}
    for (key, name), style in zip(names.items(), ("k:", "o--", "s--", "D-", "D-", "v-"), strict=True):
        if key in reports[0]:
            axes.plot(x, [100 * r[key] for r in reports], style, label=name, markersize=4)
    if "upper" in reports[0]:
        axes.fill_between(x, [100 * r["verified"] for r in reports], [100 * r["upper"] for r in reports], alpha=0.25)
    if x[-1] > 100 * x[0] > 0:
        axes.set_xscale("log")
    n = min(r["images"] for r in reports)
    axes.set(xlabel="eps (1/255)", ylabel="accuracy (%)", ylim=(0, None), title=f"{n} test images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)


def unstable_relus(records: list[dict], path) -> Path | None:
    """How many ReLUs of each layer are unstable in an image's box, by what became of the image. None without
    matplotlib, or when no image got as far as bounds."""
    plt, records = _pyplot(), [r for r in records if "unstable" in r]
    if plt is None or not records:
        return None
    layers = len(records[0]["unstable"])
    figure, row = plt.subplots(1, layers, figsize=(3.2 * layers + 0.8, 3.4), layout="constrained", squeeze=False)
    kinds = [kind for kind in ("verified", "attacked", "falsified") if any(r["verdict"] == kind for r in records)]
    kinds += ["undecided"] if any(r["verdict"] in ("timeout", "unknown", "error") for r in records) else []
    for k, axes in enumerate(row[0]):
        counts = [[r["unstable"][k] for r in records if _kind(r) == kind] for kind in kinds]
        top = max(max(c) for c in counts) + 1
        axes.hist(counts, bins=np.linspace(0, top, min(top, 30) + 1), stacked=True, label=kinds)
        axes.set(title=f"ReLU layer {k + 1}", xlabel="unstable ReLUs after CROWN")
    row[0][0].set_ylabel("images")
    row[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)


def _kind(record: dict) -> str:
    return record["verdict"] if record["verdict"] in ("verified", "attacked", "falsified") else "undecided"
