"""Pictures, drawn only where matplotlib is installed (``pip install 'nanomr[plots]'``)."""

from pathlib import Path


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(log: list[dict], path) -> Path | None:
    """Accuracy, loss terms, ReLU stability and schedules, from the records of a run's log. None without matplotlib."""
    plt = _pyplot()
    if plt is None:
        return None
    epochs = [r["epoch"] for r in log]

    def series(key, scale=1.0):
        return [None if r[key] is None else r[key] * scale for r in log]

    figure, ((accuracy, loss), (relus, schedule)) = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    accuracy.plot(epochs, series("accuracy", 100), label="clean")
    accuracy.plot(epochs, series("pgd10", 100), label="PGD-10, 500 images")
    accuracy.set(title="Accuracy on held-out images", ylabel="%", ylim=(0, 100))
    loss.plot(epochs, series("loss"), "k", label="loss")
    loss.plot(epochs, series("cross_entropy"), label="cross-entropy")
    for name, gamma in (("intrinsic", "gamma_i"), ("hamming", "gamma_h")):
        loss.plot(epochs, [r[name] * r[gamma] for r in log], label=f"{gamma} x {name}")
    loss.set(title="Loss and its terms", ylim=(0, None))
    relus.plot(epochs, series("unstable", 100), label="unstable in the eps-ball (interval bounds)")
    for key in ("switching", "dead"):
        relus.plot(epochs, [100 * r[key] / r["relus"] for r in log], label=f"{key} over 500 images")
    relus.set(title="ReLUs", ylabel="%", ylim=(0, 100))
    schedule.plot(epochs, [r["lr"] / max(max(series("lr")), 1e-12) for r in log], label=f"lr / {max(series('lr')):.3g}")
    schedule.plot(epochs, [r["eps"] * 255 / 8 for r in log], label="eps / (8/255)")
    for gamma in ("gamma_i", "gamma_h"):
        if top := max(series(gamma)):
            schedule.plot(epochs, [r[gamma] / top for r in log], label=f"{gamma} / {top:.4g}")
    schedule.set(title="Schedules", ylim=(0, 1.05))
    for axes in (accuracy, loss, relus, schedule):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return Path(path)
