"""Do our kernels run on this device? Each function that launches some, on small odd shapes, against the formulas of
``reference`` on the host (``probes.py``); then a CUDA graph; then each tile that a convolution may take, which is timed
as well. Programs ask before a first run, and ``python -m nanomr.backend --test`` whenever it is called.

    choose("auto") -> remembered(), or test() -> child process: probes.check(name) for each
                   -> replace() of what failed, use_tiles() of what was fastest

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
from . import conv, probes

COMMAND = [sys.executable, "-m", "nanomr.ops.gpu.selftest"]  # the child; the names to check follow
LIMIT = 60.0  # seconds for one function: compiling its kernels takes most of it, the first time
FUNCTIONS = (*gpu.OWN, "graph")
NAMES = (*FUNCTIONS, *probes.TILES)
BETTER = 0.97  # of the usual tile's time: what another must reach, so that noise does not choose

# What a check found: None if all is well, or the tile is for another card; a line that says what is wrong; a tile's us.
Found = str | float | None


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
            found = probes.check(name)
        except Exception as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        say(name=name, found=found)
        if isinstance(found, str):
            usable()  # raises after an illegal address: what comes next needs another process


def test(limit: float = LIMIT, report=lambda name, found: None) -> dict[str, Found]:
    """{function, "graph", or a tile's name in ``probes.TILES``: what was found}. ``report(name, found)`` as it goes.

    Raises UserError where not even CuPy's own kernels run."""
    results: dict[str, Found] = {}
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
                results[line["name"]] = line["found"]
                report(line["name"], line["found"])
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


def remembered() -> dict[str, Found] | None:
    try:
        results = json.loads(memory().read_text())[identity()]
        return results if results.keys() == set(NAMES) and all(map(_is_found, results.items())) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_found(item) -> bool:
    name, found = item
    return found is None or type(found) is str or (name in probes.TILES and type(found) is float and found > 0)


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
    instead = "another tile is taken" if name in probes.TILES else instead
    return f"GPU self-test: {name}: {problem}; {instead} (python -m nanomr.backend --test tests again)"


def tiles(results) -> dict[str, tuple[str, float, float | None]]:
    """{product: (the tile that is the fastest, its us, the usual one's us)}: the usual one unless another is faster by
    more than noise. Products without a time are not in it. NANOMR_TILES=usual: the usual ones, whatever was found."""
    wanted = os.environ.get("NANOMR_TILES") or "auto"
    if wanted not in ("auto", "usual"):
        raise UserError(f"NANOMR_TILES must be auto or usual, not {wanted!r}")
    chosen = {}
    for product in conv.PRODUCTS:
        us = {tile: results.get(name) for name, (of, tile) in probes.TILES.items() if of == product}
        us = {tile: t for tile, t in us.items() if isinstance(t, float) and (wanted == "auto" or tile == "usual")}
        if us:
            usual, best = us.get("usual"), min(us, key=us.get)
            best = "usual" if usual and us[best] > BETTER * usual else best
            chosen[product] = best, us[best], usual
    return chosen


def use_tiles(results) -> None:
    gpu.use_tiles({product: tile for product, (tile, *_) in tiles(results).items() if tile != "usual"})


def choose(kernels: str = "auto") -> None:
    """Put our own kernels to use ("own"), none of them ("plain"), or those that pass their test here, in the tiles that
    are the fastest here ("auto"). One line on stderr for each that does not pass."""
    if kernels not in ("auto", "own", "plain"):
        raise UserError(f"--kernels must be auto, own or plain, not {kernels!r}")
    if kernels != "auto":
        gpu.use_tiles()
        return gpu.replace(FUNCTIONS if kernels == "plain" else ())
    results = remembered()
    if results is None:
        print("GPU self-test: the first run on this device; kernels are compiled ...", file=sys.stderr, flush=True)
        results = test()
        if not any("OutOfMemory" in found for found in results.values() if isinstance(found, str)):  # somebody else's
            remember(results)
    failed = {name: found for name, found in results.items() if isinstance(found, str)}
    for name, problem in failed.items():
        print(problem_line(name, problem), file=sys.stderr, flush=True)
    gpu.replace([name for name in failed if name not in probes.TILES])
    use_tiles(results)


if __name__ == "__main__":
    child(sys.argv[1:])
