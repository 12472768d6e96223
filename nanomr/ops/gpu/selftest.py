"""Do our kernels run on this device? Each function that launches some, on small odd shapes, against the formulas of
``reference`` on the host (``probes.py``); then a CUDA graph. Programs ask before a first run, and
``python -m nanomr.backend --test`` whenever it is called.

    choose("auto") -> remembered(), or test() -> child process: probes.check(name) for each -> replace() of what failed

A kernel may hang, or leave the device unusable: so the checks run in a process of their own, a line for each, under a
time limit. What they found is remembered for this card, driver, CuPy and source of ours, in the user's cache folder.
"""

import functools
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

from ... import __version__, checkpoint
from ...backend import cache_folder, find_cupy
from ...errors import UserError
from .. import gpu
from . import probes

COMMAND = [sys.executable, "-m", "nanomr.ops.gpu.selftest"]  # the child; the names to check follow
LIMIT = 60.0  # seconds for one function: compiling its kernels takes most of it, the first time
NAMES = (*gpu.OWN, "graph")


# --- all of them, in a child process ----------------------------------------------------------------------------------


def child(names) -> None:
    """Print a line of JSON before and behind each check. Ends early where the device is no longer usable."""

    def say(**line):
        print(json.dumps(line), flush=True)

    xp = find_cupy()

    def usable():  # raises otherwise
        return float(xp.arange(4.0).sum())

    usable()
    for name in names:
        say(begins=name)
        try:
            problem = probes.check(name)
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        say(name=name, problem=problem)
        if problem:
            usable()  # raises after an illegal address: what comes next needs another process


def test(limit: float = LIMIT, report=lambda name, problem: None) -> dict[str, str | None]:
    """{function, or "graph": what is wrong with it, None if nothing is}. ``report(name, problem)`` as it goes.

    Raises UserError where not even CuPy's own kernels run."""
    results: dict[str, str | None] = {}
    root = str(Path(__file__).resolve().parents[3])  # where the package lies, installed or not
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    while waiting := [name for name in NAMES if name not in results]:
        process = subprocess.Popen(
            [*COMMAND, *waiting], env=os.environ | {"PYTHONPATH": paths}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        lines: queue.Queue = queue.Queue()
        reader = threading.Thread(target=lambda p=process, q=lines: [*map(q.put, p.stdout), q.put(None)], daemon=True)
        reader.start()
        under_way, said = None, "it said nothing"
        while True:
            try:
                text = lines.get(timeout=limit)
            except queue.Empty:
                end = f"not done after {limit:g} s"
                break
            if text is None:
                end = f"it ended the process ({process.wait()})"
                break
            try:
                line = json.loads(text)
                under_way = line.get("begins")
            except (ValueError, AttributeError):  # a warning, a traceback
                said = text.strip() or said
                continue
            if "name" in line:
                results[line["name"]] = line["problem"]
                report(line["name"], line["problem"])
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver may keep a process for as long as its kernel runs
            process.wait(timeout=10)
            reader.join()
            process.stdout.close()
        if under_way:
            results[under_way] = end
            report(under_way, end)
        elif waiting[0] not in results:
            where = "see python -m nanomr.backend, or use --device cpu"
            raise UserError(f"CuPy's own kernels do not run here ({said[:200]}; {end}): {where}")
    return results


# --- what is remembered -----------------------------------------------------------------------------------------------


@functools.cache
def identity() -> str:
    """Card, driver, versions and sources: whatever decides the outcome."""
    xp = find_cupy()
    runtime, card = xp.cuda.runtime, xp.cuda.runtime.getDeviceProperties(0)
    driver = Path("/proc/driver/nvidia/version")
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.read_bytes())
    parts = [
        card["name"].decode(), f"{card.get('major')}.{card.get('minor')}",
        driver.read_text().splitlines()[0] if driver.exists() else "",
        runtime.driverGetVersion(), runtime.runtimeGetVersion(), xp.__version__, np.__version__, __version__,
        digest.hexdigest()[:16],
    ]  # fmt: skip
    return " | ".join(map(str, parts))


def memory() -> Path:
    return cache_folder() / "gpu-selftest.json"


def remembered() -> dict[str, str | None] | None:
    try:
        results = json.loads(memory().read_text())[identity()]
        return results if results.keys() == set(NAMES) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(results) -> None:
    """Or not, where the folder cannot be written."""
    try:
        memory().parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(memory().read_text())
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        checkpoint.write_atomic(memory(), json.dumps(known | {identity(): results}, indent=1) + "\n")
    except (OSError, UserError):
        pass


def problem_line(name: str, problem: str) -> str:
    instead = "steps are started from Python" if name == "graph" else "plain CuPy computes it, slower"
    return f"GPU self-test: {name}: {problem}; {instead} (python -m nanomr.backend --test tests again)"


def choose(kernels: str = "auto") -> None:
    """Put our own kernels to use ("own"), none of them ("plain"), or those that pass their test here ("auto"). One line
    on stderr for each function that does not."""
    if kernels not in ("auto", "own", "plain"):
        raise UserError(f"--kernels must be auto, own or plain, not {kernels!r}")
    if kernels != "auto":
        return gpu.replace(NAMES if kernels == "plain" else ())
    results = remembered()
    if results is None:
        print("GPU self-test: the first run on this device; kernels are compiled ...", file=sys.stderr, flush=True)
        results = test()
        if not any("OutOfMemory" in (problem or "") for problem in results.values()):  # somebody else's memory
            remember(results)
    failed = {name: problem for name, problem in results.items() if problem}
    for name, problem in failed.items():
        print(problem_line(name, problem), file=sys.stderr, flush=True)
    gpu.replace(failed)


if __name__ == "__main__":
    child(sys.argv[1:])
