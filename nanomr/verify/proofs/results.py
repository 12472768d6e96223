"""What a run of ``verify_small.py`` claims, line by line, held to the proofs of ``checker.py``."""

import hashlib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ...checkpoint import load_tensors, read_json, read_jsonl
from ...errors import UserError
from .checker import check_image, lower, margins, reach
from .network import CertificateError, demand, read_network, weights_file

BROKEN, UNFINISHED = ("attacked", "falsified", "misclassified"), ("timeout", "unknown", "error")
FINISHED = ("verified", *BROKEN)
UNCHECKABLE = ("milp",)  # ways to exclude a rival that leave no proof: HiGHS


def check_results(folder, weights, images, labels, predict: Callable | None = None, progress: Callable | None = None):
    """A report on every claim in the folder of a run of ``verify_small.py``, for the same weights and images.

    images (N, H, W, C) float32 in [0, 1] and labels (N,), by the ids of the results. ``predict(images)``: labels, by
    the deployed float32 forward pass, which counterexamples must fool as well. ``progress(done, total)``.

    Returns a dict: how many ``images`` there are, and how many of each ``verdicts``; of the verified ones, how many
    are ``confirmed`` (rigorous in real arithmetic), confirmed for ``float32``, and ``solver_only`` (HiGHS excluded a
    rival, tolerance 1e-9, which leaves no proof); how many ``counterexamples`` are confirmed; and the lists
    ``refused`` and ``contradictions`` of {"id", "reason"}: neither may have an entry. Raises UserError when files are
    missing or the weights are others.
    """
    folder, report = Path(folder), Counter(confirmed=0, float32=0, solver_only=0, counterexamples=0)
    config, files = read_json(folder / "config.json"), sorted(folder.glob("results*.jsonl"))
    demand(files, f"{folder} holds no results.jsonl: give the --out folder of a run of verify_small.py")
    try:
        known, eps = config["weights"]["sha256"], float(config["eps"])
    except (KeyError, TypeError, ValueError):
        raise CertificateError(f"{folder / 'config.json'} does not name the weights' sha256 and eps") from None
    network, file = read_network(weights), weights_file(weights)
    demand(hashlib.sha256(file.read_bytes()).hexdigest() == known, f"{file} is not the file that was verified")
    refused, contradictions, last = [], [], {}
    for record in (record for file in files for record in read_jsonl(file)):
        i, verdict = record.get("id"), record.get("verdict")
        demand(type(i) is int and 0 <= i < len(images), f"{folder}: a result is about image {i}, which is none")
        before = last.get(i, {}).get("verdict")
        if {before, verdict} in [{"verified", broken} for broken in BROKEN]:
            contradictions.append({"id": i, "reason": f"{before} on one line, {verdict} on another"})
        if before not in FINISHED or verdict in FINISHED:
            last[i] = record
    for done, (i, record) in enumerate(last.items(), 1):
        verdict, image, label = record.get("verdict"), images[i], int(labels[i])
        try:
            demand(record.get("label") == label, f"the label is {label}, not {record.get('label')}")
            if verdict in ("attacked", "falsified"):
                _check_counterexample(network, _load(folder, i), image, label, eps, predict)
                report["counterexamples"] += 1
            elif verdict == "misclassified":
                _check_counterexample(network, image, image, label, eps, predict)
            elif verdict == "verified":
                if (folder / "counterexamples" / f"{i:05d}.npz").exists():
                    contradictions.append({"id": i, "reason": "verified, but a counterexample was saved"})
                report.update(_check_verified(network, folder, record, image, label, eps))
            else:
                demand(verdict in UNFINISHED, f"unknown verdict {verdict!r}")
        except UserError as error:
            refused.append({"id": i, "reason": str(error)})
        if progress:
            progress(done, len(last))
    verdicts = dict(Counter(record.get("verdict") for record in last.values()))
    return {"images": len(last), "verdicts": verdicts, **report, "refused": refused, "contradictions": contradictions}


def _check_verified(network, folder, record, image, label, eps) -> list[str]:
    """The counts of the report that a verified image adds to."""
    how, claims, tensors = record.get("how") or {}, record.get("bound") or {}, {}
    demand(isinstance(how, dict) and isinstance(claims, dict), "how and bound must have an entry for each rival")
    if (file := folder / "proofs" / f"{record['id']:05d}.safetensors").exists():
        tensors, _ = load_tensors(file)
    proofs: dict[int, dict] = {}
    for name, value in tensors.items():
        rival, _, array = name.partition("/")
        demand(rival.isdecimal(), f"{file.name}: {name!r} belongs to no rival")
        proofs.setdefault(int(rival), {})[array] = value
    checked = check_image(network, image, label, eps, proofs)
    rivals = [t for t in checked.bound if how.get(str(t)) not in UNCHECKABLE]
    for t in rivals:
        bound, claim = checked.bound[t], claims.get(str(t))
        demand(bound > 0, f"rival {t}: the margin is only proved to be above {bound:.3g}")
        demand(isinstance(claim, float | int) and claim <= bound + 1e-6 * (1 + abs(bound)),
                f"rival {t}: the bound {claim} is claimed, {bound:.9g} proved")  # fmt: skip
    float32 = all(checked.bound[t] > checked.float32_error[t] for t in rivals)
    demand(float32 or not record.get("verified_float32"), "claimed for float32, which is not proved")
    if len(rivals) < len(checked.bound):
        return ["solver_only"]
    return ["confirmed", "float32"] if float32 else ["confirmed"]


def _load(folder: Path, i: int):
    file = folder / "counterexamples" / f"{i:05d}.npz"
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return arrays["adversarial"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CertificateError(f"{file.name}: no counterexample can be read ({error})") from None


def _check_counterexample(network, adversarial, image, label, eps, predict=None):
    """Raise CertificateError unless ``adversarial`` is in the box, exactly, and certainly not the label's."""
    _, rows = margins(network, adversarial, label)
    x, x0 = adversarial.astype(np.float64).ravel(), image.astype(np.float64).ravel()
    distance = abs(x - x0)  # rounded: never from above eps to below it, but perhaps onto it
    doubtful = np.flatnonzero(distance == eps)
    inside = all(abs(Fraction(x[i]) - Fraction(x0[i])) <= Fraction(eps) for i in doubtful)
    demand((distance <= eps).all() and inside, "the counterexample is outside of the box")
    upper = -lower(network, reach(network, x, x.copy()), -rows)  # bounds of the margins at this very point
    demand((upper <= 0).any(), f"the counterexample is not misclassified: its margin may be {upper.min():.3g}")
    demand(predict is None or int(predict(adversarial[None])[0]) != label, "float32 classifies it as its label")
