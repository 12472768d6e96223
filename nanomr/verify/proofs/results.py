"""What a run of ``verify_small.py`` claims, line by line, held to the proofs of ``checker.py``."""

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ...checkpoint import load_tensors, read_json, read_jsonl
from ...errors import UserError
from .checker import check_case, check_image, float32_error, lower, margins, reach
from .network import CertificateError, Network, demand, read_network, weights_file

BROKEN, UNFINISHED = ("attacked", "falsified", "misclassified"), ("timeout", "unknown", "error")
FINISHED = ("verified", *BROKEN)
UNCHECKABLE = ("milp",)  # ways to exclude a rival that leave no proof: HiGHS
WITNESSED = ("sat", "sat-real", "sat-float32")  # verdicts on instances that a counterexample shows
LONGEST = 2**26  # bytes of a counterexample
POINTS, TOLERANCE = 16, 1e-5  # at which onnxruntime is asked; beyond its rounding, per unit of the largest logit


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


# --- lists of instances -----------------------------------------------------------------------------------------------


def check_instances(folder, progress: Callable | None = None) -> dict:
    """A report on every claim in the folder of a run of ``verify_small.py --instances``.

    Networks are read from the folder, as the importer understood them: where onnxruntime is installed, their logits
    must be the file's. Properties are read again. ``progress(done, total)``.

    Returns a dict: how many ``instances`` there are, and how many of each ``verdicts``; of the unsat ones, how many
    are ``confirmed`` (all cases, rigorously in real arithmetic), confirmed for ``float32`` and ``solver_only``; how
    many ``counterexamples`` are confirmed; how many networks were ``compared`` with onnxruntime; and the lists
    ``refused`` and ``contradictions`` of {"id", "reason"}: neither may have an entry. Raises UserError when files are
    missing.
    """
    folder = Path(folder)
    config, files = read_json(folder / "config.json"), sorted(folder.glob("results*.jsonl"))
    demand(files, f"{folder} holds no results.jsonl: give the --out folder of a run of verify_small.py --instances")
    demand(
        isinstance(config, dict) and isinstance(config.get("instances"), str), f"{folder} is of no list of instances"
    )
    base, records, refused, contradictions = Path(config["instances"]).parent, {}, [], []
    for record in (record for file in files for record in read_jsonl(file)):
        i, verdict = record.get("id"), record.get("verdict")
        demand(type(i) is int, f"{folder}: a result is about line {i!r}, which is none")
        before = records.get(i, {}).get("verdict")
        if {before, verdict} == {"unsat", "sat"} or {before, verdict} == {"unsat", "sat-real"}:
            contradictions.append({"id": i, "reason": f"{before} on one line, {verdict} on another"})
        if before not in ("unsat", "sat") or verdict in ("unsat", "sat"):
            records[i] = record
    report, networks = Counter(confirmed=0, float32=0, solver_only=0, counterexamples=0, compared=0), {}
    for done, (i, record) in enumerate(records.items(), 1):
        try:
            if record.get("verdict") in ("unsat", *WITNESSED):
                if record["verdict"] == "unsat" and (folder / "counterexamples" / f"{i}.txt").exists():
                    contradictions.append({"id": i, "reason": "unsat, but a counterexample was saved"})
                report.update(_check_instance(folder, base, record, networks))
            else:
                demand(record.get("verdict") in UNFINISHED, f"unknown verdict {record.get('verdict')!r}")
        except (UserError, OSError) as error:
            refused.append({"id": i, "reason": str(error)})
        if progress:
            progress(done, len(records))
    verdicts = dict(Counter(record.get("verdict") for record in records.values()))
    return {"instances": len(records), "verdicts": verdicts, **report, "refused": refused,
            "contradictions": contradictions}  # fmt: skip


def _check_instance(folder: Path, base: Path, record: dict, networks: dict) -> list[str]:
    """The counts of the report that a decided instance adds to. ``networks``: {SHA-256: what was read before}."""
    from ..formats.vnnlib import read_vnnlib  # trusted: what the property says
    from .witness import input_order

    counts, paths = [], []
    for kind in ("network", "property"):
        path, known = base / str(record.get(kind)), record.get(f"{kind}_sha256")
        other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
        paths.append(other if other.is_file() and not path.exists() else path)
        same = hashlib.sha256(paths[-1].read_bytes()).hexdigest() == known
        demand(same, f"{paths[-1]} is not the file that was verified")
    known = record["network_sha256"]
    kept = folder / "networks" / f"{known}.safetensors"
    first = known not in networks
    if first:
        networks[known] = read_network(kept), input_order(kept)
    demand(not isinstance(networks[known], CertificateError), str(networks[known]))
    network, order = networks[known]
    prop = read_vnnlib(paths[1], network.input_shape, len(network.maps[-1].bias), order)
    if first:
        try:
            counts += _compare(network, order, paths[0], prop.cases[0])
        except CertificateError as error:
            networks[known] = error  # of every line that is about it
            raise
    if record["verdict"] == "unsat":
        return counts + _check_unsat(network, order, folder, record, prop)
    return counts + _check_sat(network, order, folder, kept, record, prop)


def _compare(network: Network, order, path: Path, case) -> list[str]:
    """Raise CertificateError unless onnxruntime, if it is installed, gives the network's logits in the case's box."""
    try:
        import onnxruntime
    except ImportError:
        return []
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
    except (EOFError, zlib.error, RuntimeError, ValueError) as error:
        raise CertificateError(f"onnxruntime cannot read {path} ({error})") from None
    h, w, c = network.input_shape
    shape = [n if isinstance(n, int) and n > 0 else 1 for n in entry.shape]
    demand(int(np.prod(shape)) == h * w * c, f"onnxruntime reads an input {shape} in {path}")
    random = np.random.default_rng(0)
    for _ in range(POINTS):
        x = random.uniform(np.clip(case.low, -1e9, 1e9), np.clip(case.high, -1e9, 1e9)).astype(np.float32)
        fed = x.transpose(2, 0, 1) if order is None else x.ravel()[order]
        theirs = session.run(None, {entry.name: fed.reshape(shape)})[0].ravel()
        ours = x.astype(np.float64).ravel()
        reached = reach(network, ours, ours.copy())
        for m in network.maps:
            ours = m.weight @ (np.maximum(ours, 0) if m.relu else ours) + m.bias
        demand(theirs.shape == ours.shape, f"{path} has {theirs.size} outputs, the imported network {ours.size}")
        error = float32_error(network, reached, np.eye(len(ours))) + TOLERANCE * (1 + abs(ours).max())
        demand((abs(theirs - ours) <= error).all(), f"the imported network is not {path}: onnxruntime's logits differ")
    return ["compared"]


def _check_unsat(network: Network, order, folder: Path, record: dict, prop) -> list[str]:
    claims, tensors = record.get("cases"), {}
    fine = isinstance(claims, list) and all(isinstance(claim, dict) for claim in claims)
    demand(fine and len(claims) == len(prop.cases), f"the property has {len(prop.cases)} cases: all must be excluded")
    if (file := folder / "proofs" / f"{record['id']}.safetensors").exists():
        tensors, _ = load_tensors(file)
    proofs: dict[int, dict] = {}
    for name, value in tensors.items():
        number, _, array = name.partition("/")
        demand(number.isdecimal() and int(number) < len(claims), f"{file.name}: {name!r} belongs to no case")
        proofs.setdefault(int(number), {})[array] = value
    solver, float32 = False, True
    for i, (case, claim) in enumerate(zip(prop.cases, claims, strict=True)):
        row = claim.get("row")
        demand(claim.get("split") is True or (type(row) is int and 0 <= row < len(case.rows)),
                f"case {i}: neither a row of it nor its parts are said to exclude it")  # fmt: skip
        if claim.get("how") in UNCHECKABLE:
            solver = True
        elif claim.get("how") == "point":
            from .witness import excludes

            exact = case.exact
            fine = excludes(network, exact.low, exact.high, exact.rows[row], exact.offsets[row], order)
            demand(fine, f"case {i}: it is not one point, or that is not excluded")
            float32 = False
        else:
            box = case.low, case.high
            try:
                found = check_case(network, *box, case.rows, case.offsets, proofs.get(i), row)
            except CertificateError as error:
                raise CertificateError(f"case {i}: {error}") from None
            demand(found.bound > 0, f"case {i}: some row is only proved to be above {found.bound:.3g}")
            float32 = float32 and found.bound > found.float32_error
    if solver:
        return ["solver_only"]
    return ["confirmed", "float32"] if float32 else ["confirmed"]


def _check_sat(network: Network, order, folder: Path, kept: Path, record: dict, prop) -> list[str]:
    from ...models import load
    from .witness import check_witness

    number = record.get("case")
    demand(type(number) is int and 0 <= number < len(prop.cases), f"the property has no case {number!r}")
    file = folder / "counterexamples" / f"{record['id']}.txt"
    demand(file.is_file() and file.stat().st_size < LONGEST, f"{file.name}: there is no counterexample")
    content, model = file.read_text(encoding="utf-8", errors="replace"), load(kept)
    verdict = check_witness(network, *prop.cases[number].exact, content, lambda x: model.forward(x)[0], order)
    demand(verdict == record["verdict"], f"the counterexample shows {verdict}, not {record['verdict']}")
    return ["counterexamples"]
