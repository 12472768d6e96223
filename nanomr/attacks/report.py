"""What an evaluation says: accuracies with intervals, signs that it cannot be trusted, and the paper's tables."""

import math

import numpy as np

from ..backend import array_module, to_numpy
from ..errors import UserError
from .apgd import apgd
from .autoattack import ROBUST, WRONG, Stage, attempt
from .blackbox import corner_noise
from .objectives import cross_entropy_each, dlr, margin

CORNERS = 10  # random corners of the ball that each image is shown with
# What the checks tolerate, in points of accuracy where that applies.
GAP, SQUARE_GAIN = 0.05, 0.002  # the second is AutoAttack's own threshold

# From Tables 1 and 2 of Jin & Rinard (2020), in percent.
LARGE, SMALL = "Manifold Regularization (large)", "Manifold Regularization (small)"
TABLE_1 = {
    SMALL: {"pgd": 25.56, "clean": 36.66},
    LARGE: {"pgd": 40.54, "clean": 69.95},
    "PGD (Madry et al.)": {"pgd": 45.8, "clean": 87.3},
}
TABLE_2 = {
    LARGE: {"l2": 57.53, "linf": 36.90, "wasserstein": 66.02, "clean": 69.95},
    "Maini et al.": {"l2": 66.0, "linf": 49.8, "clean": 81.7},
    "Wong et al.": {"wasserstein": 76.0, "clean": 80.69},
}
PAPER_EPS = {"linf": 8 / 255, "l2": 0.5, "wasserstein": 0.1}


def wilson(count: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval (Wilson 1927) of a share of which ``count`` of ``n`` were seen. (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, spread = count / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # At the ends rounding may leave the share itself a hair outside.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


# --- does the network hide its gradients, does the evaluation repeat? -------------------------------------------------


def checks(model, x, labels, ids, by, *, norm: str, eps: float, stage: Stage | None, seed: int, steps: int = 100,
           batch_size: int = 250, attacked=None) -> dict:  # fmt: skip
    """Figures for :func:`warnings`, measured on images ``x`` (N, H, W, C) with the outcome ``by`` (N,) of an attack.

    - "zero_gradients", "zero_dlr_gradients": images where the input gradient of the cross-entropy (of the difference
      of logits ratio) is exactly zero: gradient attacks do not move there; "lost_gradients": where the first holds NaN
      or infinity
    - "unbounded": accuracy at eps = 1, where every image can become any other; of up to 100 images
    - "noise": accuracy on random corners of the ball; "noise_broke": images that withstood the attack, but not these
    - "alone": images, of the few whose first attack ran again alone, for which that ended differently; "logits_move":
      the largest difference of logits alone and in a batch, relative to the largest logit
    - "probabilities": the outputs are >= 0 and sum to 1: losses that expect logits are wrong then

    ``stage`` is the first of the attack's; None (the Wasserstein attack) leaves "alone" and the noise out. ``attacked``
    is what it saw, as in :func:`nanomr.attacks.autoattack.cascade`; all else is of the model itself.
    """
    by, xp = np.asarray(by), array_module(x)
    right = np.flatnonzero(by != WRONG)
    found: dict = {"images": len(x), "zero_gradients": 0, "zero_dlr_gradients": 0, "lost_gradients": 0}
    for first in range(0, len(right), batch_size):
        where = xp.asarray(right[first : first + batch_size])
        logits, cache = model.forward(x[where])
        ratio = dlr if logits.shape[1] > 2 else margin
        for name, loss in (("zero_gradients", cross_entropy_each), ("zero_dlr_gradients", ratio)):
            gradient = model.backward(loss(logits, labels[where])[1], cache, param_grads=False)
            gradient = gradient.reshape(len(where), -1)
            found[name] += int((~gradient.any(1)).sum())
            if loss is cross_entropy_each:
                found["lost_gradients"] += int((~xp.isfinite(gradient).all(1)).sum())
    some = xp.asarray(right[:100])
    _, fooled = apgd(
        model, x[some], labels[some], 1.0, norm="linf", loss="ce", steps=steps, restarts=1, seed=seed,
        ids=ids[right[:100]], batch_size=batch_size,
    )  # fmt: skip
    found["unbounded"] = 1 - int(fooled.sum()) / len(some) if len(some) else 0.0
    logits = model.forward(x[:16])[0]
    if len(logits):
        single = xp.concatenate([model.forward(x[i : i + 1])[0] for i in range(len(logits))])
        found["logits_move"] = float(abs(single - logits).max() / max(float(abs(logits).max()), 1e-30))
        found["probabilities"] = bool((logits >= 0).all() & (abs(logits.sum(1) - 1) < 1e-4).all())
    if stage is not None:
        _, fooled = corner_noise(
            model, x, labels, eps, CORNERS, norm=norm, seed=seed, ids=ids, batch_size=batch_size
        )  # fmt: skip
        fooled = to_numpy(fooled)
        found |= {"noise": float(1 - fooled.mean()), "noise_broke": int((fooled & (by == ROBUST)).sum())}
        # two that the first attack broke, and two that it did not: alone, each must end the same way
        again = np.concatenate([right[by[right] == 1][:2], right[by[right] != 1][:2]])
        found["alone_images"], found["alone"] = len(again), 0
        for i in again:
            _, broken, _, _ = attempt(
                stage, model, x[i : i + 1], labels[i : i + 1], eps, norm=norm, seed=seed, ids=ids[i : i + 1],
                batch_size=1, attacked=attacked,
            )  # fmt: skip
            found["alone"] += bool(broken[0]) != (by[i] == 1)
    return found


def warnings(report: dict) -> list[str]:
    """What in a report, its "checks" included, means that its accuracies may be too high. One line each."""
    found, said = report["checks"], []
    n, after = max(report["images"], 1), {row["attack"]: row for row in report["after"]}
    gap = dlr_gap(report)
    if gap is not None and gap > GAP:
        said.append(
            f"APGD with cross-entropy leaves {gap:.1%} of the images that APGD with DLR or targets breaks: gradients "
            "are masked or the logits' scale hides them; distrust attacks that use cross-entropy, PGD too"
        )
    if "square" in after:
        names = [row["attack"] for row in report["after"]]
        gain = after["square"]["broken"] / n
        if gain > SQUARE_GAIN:
            before = ", ".join(names[: names.index("square")])
            said.append(
                f"Square, which needs no gradient, broke {gain:.1%} of the images after {before}: gradients may be "
                "masked; give Square more queries"
            )
    for key, loss in (("zero_gradients", "cross-entropy"), ("zero_dlr_gradients", "difference of logits ratio")):
        if found.get(key):
            said.append(
                f"the {loss}'s input gradient is exactly zero at {found[key]} images: gradient attacks are blind there"
            )
    if found.get("lost_gradients"):
        said.append(
            f"the cross-entropy's input gradient is NaN or infinite at {found['lost_gradients']} images: gradient "
            "attacks are lost there"
        )
    if found.get("unbounded", 0) > 0:
        said.append(
            f"accuracy at eps = 1 is {found['unbounded']:.1%}, not zero: the attack fails where it cannot, so do not "
            "believe it at smaller eps"
        )
    if found.get("noise_broke"):
        said.append(f"random corners of the ball break {found['noise_broke']} images that withstood the attack")
    if found.get("alone"):
        said.append(
            f"{found['alone']} of {found['alone_images']} images end differently when they are attacked alone: the "
            "result depends on the batch, if only by its rounding"
        )
    if found.get("logits_move", 0) > 1e-4:
        said.append(f"logits of an image alone and in a batch differ by {found['logits_move']:.1e} of the largest")
    if found.get("probabilities"):
        said.append("the outputs look like probabilities: the attacks need logits")
    if refuted := sum(row["refuted"] for row in report["after"]):
        said.append(f"successes that a fresh forward pass did not confirm: {refuted}; they count as robust")
    if report.get("precision") == "bf16":
        said.append(
            "--precision bf16: gradients were those of the network in bfloat16; verdicts are float32's, yet the attack "
            "may be weaker than in float32: report figures of fp32 or tf32"
        )
    if report["quick"]:
        said.append("--quick: a tenth of the steps, restarts and queries; not a result to report")
    return said


def dlr_gap(report: dict) -> float | None:
    """By how much APGD-DLR and APGD-T lower the accuracy that APGD-CE leaves; None without both kinds.

    In a cascade: the images that they broke after it. In individual mode: their accuracies alone.
    """
    rows, n = {row["attack"]: row for row in report["after"]}, max(report["images"], 1)
    others = [rows[name] for name in ("apgd-dlr", "apgd-t") if name in rows]
    if "apgd-ce" not in rows or not others:
        return None
    if report.get("alone"):
        alone = report["alone"]
        return alone["apgd-ce"] - min(alone[row["attack"]] for row in others)
    return sum(row["broken"] for row in others) / n


# --- the report -------------------------------------------------------------------------------------------------------


def assemble(config: dict, by, seconds, refuted, found: dict, *, alone=None, radius=None, again=None) -> dict:
    """report.json: ``config`` (what was asked for), and what came out.

    ``by`` (N,) as :class:`Outcome` has it; ``seconds`` and ``refuted`` per stage, ``found`` from :func:`checks`;
    ``alone`` (N, stages) in individual mode; ``radius`` (N,), inf for never, of the Wasserstein attack; ``again`` per
    stage, where attacks saw a less precise network.
    """
    by = np.asarray(by)
    n, names = len(by), [stage["name"] for stage in config["settings"]]
    robust = [int(((by == ROBUST) | (by > k)).sum()) for k in range(len(names) + 1)]
    right = robust[0]

    def share(count):
        return count / n if n else 0.0

    report = dict(config)
    report |= {
        "images": n,
        "clean": share(right),
        "clean_interval": wilson(right, n),
        "after": [
            {
                "attack": name, "attacked": right if alone is not None else robust[k],
                "broken": robust[k] - robust[k + 1], "robust": share(robust[k + 1]),
                "interval": wilson(robust[k + 1], n), "seconds": round(seconds[k], 3), "refuted": int(refuted[k]),
            }
            for k, name in enumerate(names)
        ],
        "robust": share(robust[-1]),
        "interval": wilson(robust[-1], n),
    }  # fmt: skip
    if again is not None:
        for row, count in zip(report["after"], again, strict=True):
            row["again"] = int(count)
    if alone is not None:
        report["alone"] = {name: share(right - int(alone[:, k].sum())) for k, name in enumerate(names)}
    if radius is not None:
        radii = [r for r in (0.005, 0.01, 0.02, 0.05) if r < config["eps"]] + [config["eps"]]
        report["robust_at"] = {f"{r:g}": share(int((np.asarray(radius) > r).sum())) for r in radii}
    report["seconds"] = round(sum(seconds), 3)
    report["checks"] = found
    report["warnings"] = warnings(report)
    return report


def lines(report: dict) -> list[str]:
    """A report for the terminal."""
    low, high = report["clean_interval"]
    out = [
        f"{name_of(report)}: {report['images']} images of {report['data']['name']}",
        f"  {'attack':12} {'accuracy':>9}   {'95 % interval':17} {'broken':>7} {'seconds':>9}"
        + ("  alone" if "alone" in report else ""),
        f"  {'none':12} {report['clean']:9.2%}   {low:7.2%} - {high:7.2%}",
    ]
    for row in report["after"]:
        low, high = row["interval"]
        text = f"  {row['attack']:12} {row['robust']:9.2%}   {low:7.2%} - {high:7.2%} {row['broken']:7d}"
        alone = f"  {report['alone'][row['attack']]:.2%}" if "alone" in report else ""
        out.append(f"{text} {row['seconds']:9.1f}{alone}")
    if "robust_at" in report:
        out.append("  " + ", ".join(f"radius {r}: {share:.2%}" for r, share in report["robust_at"].items()))
    if "left_out" in report:
        out.append(f"  left out, since the network knows {report['classes']} classes: {', '.join(report['left_out'])}")
    return out + [f"  warning: {line}" for line in report["warnings"]]


def name_of(report: dict) -> str:
    """Which attack, in one phrase."""
    if report["attack"] == "wasserstein":
        return f"wasserstein, radius {report['eps']:g}"
    return f"{report['attack']}, {report['norm']}, eps {fraction(report['eps'])}"


def fraction(eps: float) -> str:
    """8/255 rather than 0.0313725."""
    steps = eps * 255
    return f"{steps:.0f}/255" if 0 < steps < 64 and abs(steps - round(steps)) < 1e-9 else f"{eps:g}"


# --- Tables 1 and 2 ---------------------------------------------------------------------------------------------------


def tables(reports: list[dict]) -> str:
    """Rows of the paper's Tables 1 and 2 from the reports of one network, with the paper's rows below.

    Raises UserError when the reports are of several networks or data sets, or none fits a table.
    """
    for what, key in (("networks", lambda r: r["weights"]["sha256"]), ("data sets", lambda r: r["data"]["name"])):
        if len({key(r) for r in reports}) > 1:
            raise UserError(f"these reports are of several {what}: a row is of one")
    cells: dict[str, dict] = {}
    for r in sorted(reports, key=lambda r: r["attack"] == "autoattack+"):  # the stronger one replaces the other
        if r["attack"] != "pgd":
            cells[r["norm"]] = r
        elif r["norm"] == "linf":
            cells["pgd"] = r
    parts = []
    if "pgd" in cells:
        columns = {"pgd": "PGD", "clean": "clean"}
        parts.append(_table("Table 1", columns, TABLE_1, {"pgd": cells["pgd"]}))
    second = {k: r for k, r in cells.items() if k != "pgd"}
    if second:
        columns = {"l2": "l2", "linf": "linf", "wasserstein": "Wasserstein", "clean": "clean"}
        parts.append(_table("Table 2", columns, TABLE_2, second))
    if not parts:
        raise UserError("no report here belongs in Table 1 (pgd, linf) or 2 (autoattack, wasserstein)")
    return "\n\n".join(parts)


def _table(title: str, columns: dict, paper: dict, cells: dict) -> str:
    any_ = next(iter(cells.values()))
    network = any_["weights"]["architecture"]["name"]
    ours = {k: f"{100 * r['robust']:.2f}" for k, r in cells.items()}
    largest = max(cells.values(), key=lambda r: r["images"])
    ours["clean"] = f"{100 * largest['clean']:.2f}"
    rows = [("", columns), (f"this network ({network})", ours)]
    for name, values in paper.items():
        if name != (LARGE if network == "small_cnn" and SMALL in paper else SMALL):
            rows.append((f"paper: {name}", {k: f"{v:.2f}" for k, v in values.items()}))
    width = max(len(name) for name, _ in rows)
    lines = [f"{title}: accuracy in percent on {any_['data']['name']}"]
    for name, row in rows:
        cells_ = (f"  {row.get(column, '-'):>{max(len(title), 6)}}" for column, title in columns.items())
        lines.append(f"  {name:{width}}" + "".join(cells_))
    for column, r in cells.items():
        eps = PAPER_EPS["linf" if column == "pgd" else column]
        low, high = (100 * share for share in r["interval"])
        notes = [f"{name_of(r)}, {r['images']} images, 95 % interval [{low:.1f}, {high:.1f}]"]
        if r.get("stages") or r.get("steps"):
            notes.append("--stages or --steps: not comparable")
        if not math.isclose(r["eps"], eps, rel_tol=1e-9):
            notes.append(f"the paper's is {fraction(eps)}: not comparable")
        if r["attack"] == "autoattack":
            notes.append("the paper's is AutoAttack+")
        if "left_out" in r:
            notes.append(f"without {', '.join(r['left_out'])}")
        if r.get("precision") == "bf16":
            notes.append("attacked in bfloat16")
        if r["quick"]:
            notes.append("--quick: not comparable")
        if count := len(r["warnings"]):
            notes.append(f"{count} warning{'s' * (count > 1)} in its report")
        lines.append(f"  {columns[column]}: {'; '.join(notes)}")
    if any_["data"]["name"] != "cifar10":
        lines.append("  the paper's rows are of cifar10: not comparable")
    elif any_["data"]["source"].get("verified") is False:
        lines.append("  these files are not the published CIFAR-10 (their checksums are unknown)")
    return "\n".join(lines)
