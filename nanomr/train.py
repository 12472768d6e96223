"""The training loop: batches, schedules, log, checkpoints, resume.

A run folder holds ``config.json``, ``log.jsonl`` (a line an epoch), ``model.safetensors`` (the network),
``last.safetensors`` (the network, the optimiser's vectors and where the run stands) and ``curves.png``. The saved
network is as its method finishes it (:class:`nanomr.methods.Method`), the last one as it is trained.

Every random draw is a function of (seed, step), so that a resumed run continues bit for bit, and several ranks
(:mod:`nanomr.parallel`) draw the same batch, of which each computes its rows. Rank 0 alone writes and prints.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import checkpoint, compiling, metrics, models, optim, plots, rng
from .backend import array_module, find_cupy, to_device, to_numpy
from .data import Dataset
from .errors import NoClass, UserError
from .graph import Replayed
from .layers import BatchNorm2d
from .methods import METHODS, certified
from .methods.adversarial import overfitted
from .methods.manifold import at_corners, standard_step
from .models import InBfloat16, InTf32
from .ops import bfloat16, gpu, ops_for
from .parallel import ALONE, Ranks, Share

SAVE_EVERY = 120  # seconds between checkpoints within an epoch
COMPARE_EVERY = 100  # steps between comparisons of the ranks' weights
CHECK_EVERY = 50  # steps between looks at the loss on a CPU; on a GPU a look waits for the device: once an epoch


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run. Saved as ``config.json``; epochs of 0 train nothing."""

    architecture: dict  # models.build
    method: str  # methods.METHODS
    data: str
    epochs: int
    batch_size: int = 128
    hold_out: int = 5000  # the last training images, kept for monitoring and for choosing constants
    train_images: int = 0  # use only the first so many; 0: all
    seed: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 0.0  # gradient norm; 0: no clipping
    eps_start: float = 2 / 255
    eps: float = 8 / 255
    gamma_i: float = 0.4
    gamma_h: float = 9000.0
    gamma_factor: float = 10.0  # both gammas grow by it
    alpha: float = 8.0
    hamming_norm: str = "batch"  # or "sample"
    augment: bool = True
    precision: str = "fp32"  # or "bf16", on a GPU also "tf32": of what a step multiplies; weights are float32
    constants: dict = field(default_factory=dict)  # of the method itself, by name; its defaults for those that lack
    optimizer: str = "sgd"  # or "adamw"
    recipe: str = "paper"  # optim.RECIPES
    ramp_from: float = 0.02  # of recipe "ramp": shares of the run between which eps grows
    ramp_to: float = 0.6
    pad: int = 4  # black pixels around an image, within which it is cropped
    local_batchnorm: bool = False  # each rank's rows have statistics of their own: how many there are decides then, too
    init: str = ""  # SHA-256 of the last.safetensors whose weights it begins with; "": the method's own
    revive: bool = False  # init's dead channels are given part of the live ones' work: certified.revive
    exact: bool = False  # parallel.PARTS ranks, played by the processes that there are: the same bits for any number

    def checked(self) -> "Config":
        """Itself. Raises ValueError when a value, which may come from a file, is not of its field's type and range."""
        for one in fields(self):
            value = getattr(self, one.name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63
            if not (number if one.type in (int, float) else True) or not isinstance(
                value, int | float if one.type is float else one.type
            ):
                raise ValueError(f"{one.name} cannot be {str(value)[:40]!r}")
        choices = {
            **{"method": METHODS, "hamming_norm": ("batch", "sample"), "precision": ("fp32", *LOOKS)},
            **{"optimizer": ("sgd", "adamw"), "recipe": optim.RECIPES},
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)[:40]!r}, not one of {', '.join(known)}")
        if self.batch_size < 1:
            raise ValueError("batch_size must be 1 or more")
        method = METHODS[self.method]
        try:
            method.filled(self.constants)
        except ValueError as error:
            raise ValueError(f"constants of {self.method}: {error}") from None
        if self.precision not in method.precisions:
            able = " or ".join(method.precisions)
            raise ValueError(f"precision is {self.precision!r}, and {self.method} is trained in {able}")
        return self

    def schedule(self, epoch: float) -> dict:
        """What changes with the fractional epoch, by the recipe: lr, eps, and of the paper's methods gamma_i, gamma_h
        (appendix B, scaled to this run's length), of others ramp, how far eps has come."""
        now = optim.RECIPES[self.recipe].schedule(self, epoch)
        if METHODS[self.method].corners is None:
            return now
        factor = optim.gamma_factor(epoch, self.epochs, self.gamma_factor)
        return {
            **{"lr": now["lr"], "eps": now["eps"]},
            "gamma_i": factor * self.gamma_i if self.method in ("manifold", "intrinsic") else 0.0,
            "gamma_h": factor * self.gamma_h if self.method in ("manifold", "hamming") else 0.0,
        }

    @property
    def fixed(self) -> dict:
        """What a step is told beside the schedule: the constants."""
        constants = METHODS[self.method].filled(self.constants)
        return {"alpha": self.alpha, "hamming_norm": self.hamming_norm, "eps_end": self.eps, **constants}


# what a config.json of an earlier version lacks, and was
LATER = "precision optimizer recipe ramp_from ramp_to pad local_batchnorm exact init revive".split()
EARLIER = {"constants": {}} | {name: getattr(Config, name) for name in LATER}
LOOKS = {"tf32": InTf32, "bf16": InBfloat16}  # how the log looks at the network, by precision
SCHEDULED = ("lr", "eps", "gamma_i", "gamma_h")  # of the paper's methods, on a GPU
TERMS = {"cross_entropy": "cross-entropy", "hamming": "Hamming term", "gradient_norm": "gradient"}  # what is said of it
GAMMAS = {"intrinsic": "gamma_i", "hamming": "gamma_h"}  # each term's weight


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run is saved and can go on. The message says how."""


class Trainer:
    """One run. ``Trainer(config, dataset, folder, device).run()`` trains to the end and returns the model.

    On a GPU a step of the paper's methods needs nothing from the host (:meth:`device_step`); with ``graph`` it is
    replayed as a CUDA graph, in bf16: cuBLAS, which the other precisions need, cannot be captured. Other methods draw
    on the host there, too, and so do several ``ranks``, each of which has a Trainer.
    """

    def __init__(
        self, config: Config, dataset: Dataset, folder, device: str = "cpu", graph: bool = True, ranks: Ranks = ALONE
    ):
        self.config, self.dataset, self.folder, self.device = config, dataset, Path(folder), device
        if device == "cpu" and config.precision == "tf32":
            raise UserError("--precision tf32 needs a GPU: use --precision fp32 or bf16")
        if device == "gpu":
            gpu.set_tf32(False)  # whatever CUPY_TF32 says
        if ranks.size > 1 and not METHODS[config.method].ranks:
            able = ", ".join(name for name, method in METHODS.items() if method.ranks)
            advice = ("leave out --exact, and " if config.exact else "") + "use --parallel none"
            raise UserError(f"--method {config.method} cannot be divided among ranks ({able} can): {advice}")
        if config.augment and dataset.train_images.dtype != np.uint8:
            raise UserError("crops and flips are made of uint8 images, and these are floats: use --no-augment")
        images, labels, held, held_labels = dataset.hold_out(config.hold_out)
        if config.train_images:
            images, labels = images[: config.train_images], labels[: config.train_images]
        if len(images) < config.batch_size:
            raise UserError(f"--batch-size {config.batch_size} is more than the {len(images)} training images")
        if not config.hold_out:  # nothing is held out: watch the run on training images, and say so
            held, held_labels = images[-5000:], labels[-5000:]
        self.images, self.labels = to_device(images, device), to_device(labels, device)
        self.held, self.held_labels = to_device(held, device), to_device(held_labels, device)
        self.steps_per_epoch = len(images) // config.batch_size  # the last, incomplete batch is left for another epoch
        self.model = models.build(config.architecture, config.seed).to(device)
        self.ranks, self.share = ranks, Share(ranks, config.batch_size)
        self.apart = []  # what each rank has of its own: running statistics, with local_batchnorm
        for _, layer in self.model.walk():
            if config.local_batchnorm and isinstance(layer, BatchNorm2d):
                self.apart += [value for value in layer.buffers.values() if value.dtype == self.model.dtype]
            else:
                layer.share = self.share
        self.method, self.fixed = METHODS[config.method], config.fixed
        if self.method.begin:
            self.method.begin(self.model, rng.generator(config.seed, rng.INIT, 2))
        clip = config.clip or None
        if config.optimizer == "adamw":
            self.optimizer = optim.AdamW(self.model, weight_decay=config.weight_decay, clip=clip)
        else:
            self.optimizer = optim.SGD(self.model, config.momentum, config.weight_decay, clip)
        self.step, self.seconds, self.log = 0, 0.0, []
        self.caught, self.stopping = [], False  # signals; has any rank caught one?
        self.kernel = "gpu" if device == "gpu" else ops_for(self.model.weights).kernel(config.precision)
        self.names = ("loss", "cross_entropy", *self.method.reports, "gradient_norm")  # of what train_step returns
        self.captured = device == "gpu" and self.method.corners is not None and ranks.size == 1
        self.totals = to_device(np.zeros(len(self.names)), device)  # of that, over the epoch so far
        self._order = (-1, None)  # an epoch and its order
        # the most that the two weighted regularisers were, as multiples of the cross-entropy
        self.peaks = to_device(np.zeros(2), device)
        if device == "gpu":
            self.labels = self.labels.astype(np.int32)
        self._on_device = None
        if self.captured:
            if config.pad != Config.pad or config.optimizer != "sgd":
                raise UserError(f"on a GPU {config.method} is trained by SGD, and crops with 4 pixels of padding")
            self.counter = to_device(np.zeros(1, np.uint64), device)  # which step comes next
            self.order = to_device(np.zeros(self.steps_per_epoch * config.batch_size, np.int32), device)
            self.schedule = to_device(np.zeros((self.steps_per_epoch, 4), np.float32), device)
            captured = graph and config.precision == "bf16" and not gpu.replaced
            step = gpu.tf32()(self.device_step) if config.precision == "tf32" else self.device_step
            self._on_device = Replayed(step) if captured else step

    # --- one step -----------------------------------------------------------------------------------------------------

    def batch(self, step: int):
        """(x (N, H, W, C) float32, labels (N,)) of training step ``step``: shuffled, cropped, flipped. This rank's rows
        of them, which all ranks draw."""
        config, n = self.config, self.config.batch_size
        epoch, i = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        index = to_device(self._order[1][i * n : (i + 1) * n][self.share.rows], self.device)
        if not config.augment:
            return metrics.as_float(self.images[index]), self.labels[index]
        draw, places = rng.generator(config.seed, rng.AUGMENT, step), 2 * config.pad + 1
        drawn = draw.integers(0, places, n), draw.integers(0, places, n), draw.random(n) < 0.5
        drawn = [to_device(v[self.share.rows], self.device) for v in drawn]
        x = ops_for(self.model.weights).crop_flip(self.images, index, *drawn, config.pad)
        return x, self.labels[index]

    def _shuffled(self, epoch):
        return rng.generator(self.config.seed, rng.SHUFFLE, epoch).permutation(len(self.images))

    def train_step(self) -> np.ndarray:
        """Step, update; the numbers of ``names``. On a CPU, and of methods that draw on the host."""
        now = self.config.schedule(self.step / self.steps_per_epoch)
        x, labels = self.batch(self.step)
        draw = partial(rng.generator, self.config.seed, step=self.step)
        parts = self.method.step(self.model, self._rounded(x), labels, draw, now | self.fixed)
        if self.ranks.size > 1:
            parts = self._over_ranks(parts)
        parts["gradient_norm"] = self.optimizer.step(now["lr"])
        values = np.array([float(parts.get(name, 0.0)) for name in self.names])
        self.step += 1
        if self.device == "cpu" and self.method.corners is not None and not self.peaks.max() > 10:  # the first one did
            ratios = values[2:4] * np.array([now[name] for name in GAMMAS.values()]) / values[1]
            self.peaks = np.fmax(self.peaks, ratios)
        return values

    def _over_ranks(self, parts: dict) -> dict:
        """Make gradients (and running statistics that a rank has of its own) those of the whole batch; ``parts``
        likewise. The one sum of a step: P + k numbers, the last of which says who was asked to stop."""
        gradients = self.model.gradients
        xp, vectors = array_module(gradients), [gradients, *self.apart]
        values = xp.asarray([*map(float, parts.values()), 0], gradients.dtype)
        flat = xp.concatenate([*vectors, values])
        flat *= self.share.weight
        flat[-1] = len(self.caught)
        self.ranks.sum_(flat)
        for vector in vectors:
            vector[...], flat = flat[: len(vector)], flat[len(vector) :]
        *values, stopping = to_numpy(flat).tolist()
        self.stopping = stopping > 0
        return dict(zip(parts, values, strict=True))

    def device_step(self):
        """The same on a GPU, added to ``totals`` there. Step, images, draws and schedule come from the device."""
        config, n = self.config, self.config.batch_size
        index, labels, now = gpu.begin_step(self.counter, self.order, self.labels, self.schedule, n)
        if config.augment:
            x = gpu.crop_flip(self.images, index, *gpu.draw_augmentation(n, config.seed, self.counter))
        else:
            x = metrics.as_float(self.images[index])
        scalars = {name: now[i] for i, name in enumerate(SCHEDULED)}
        if self.method.corners:
            rho = self._rounded(gpu.draw_corners(x.shape, scalars["eps"], config.seed, self.counter))
            parts = at_corners(self.model, self._rounded(x), labels, rho, scalars | self.fixed)
        else:
            parts = standard_step(self.model, self._rounded(x), labels)
        parts["gradient_norm"] = self.optimizer.step(scalars["lr"])
        gpu.end_step([parts.get(name) for name in self.names], now, self.totals, self.peaks, self.counter)

    def _rounded(self, x):
        """Pictures in the precision of this run."""
        return ops_for(x).cast(x, bfloat16()) if self.config.precision == "bf16" else x

    def advance(self):
        """One step, added to ``totals``."""
        if not self.captured:
            self.totals += to_device(self.train_step(), self.device)
            return
        epoch = self.step // self.steps_per_epoch
        if self._order[0] != epoch:
            self._start_epoch(epoch)
        try:
            self._on_device()
        except MemoryError:
            self._on_device = None  # the graph's memory; a step's is held by the exception, until here
        if self._on_device is None:
            raise UserError(self._out_of_memory())
        self.step += 1

    def _out_of_memory(self) -> str:
        """Which batch does fit the GPU: halved until a step ends. The weights are of no use behind it."""
        n = self.config.batch_size
        full = f"the GPU's memory is full at --batch-size {n}"
        while n > 1:
            n //= 2
            self.config = replace(self.config, batch_size=n)
            try:
                find_cupy().get_default_memory_pool().free_all_blocks()
                self.device_step()
                return f"{full}: {n} fits"
            except MemoryError:
                pass
        return f"{full}, and not even 1 fits: does another program hold it (nvidia-smi)?"

    def _start_epoch(self, epoch):
        """What the host has to say of an epoch on a GPU: its order and its schedule. Nothing else is drawn there."""
        steps = self.steps_per_epoch
        schedules = [self.config.schedule((epoch * steps + i) / steps) for i in range(steps)]
        table = np.array([[now[name] for name in SCHEDULED] for now in schedules], np.float32)
        self.schedule[...] = to_device(table, self.device)
        self.order[...] = to_device(self._shuffled(epoch)[: self.order.size].astype(np.int32), self.device)
        self.counter[...] = self.step
        self._order = (epoch, None)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self):
        """Train to the last epoch; the network, finished. Raises UserError on NaN or collapse, Interrupted on Ctrl-C,
        the run saved."""
        with self.own_folder():
            try:
                return self._run()
            except KeyboardInterrupt:  # while a kernel was compiled: the run stands where the last save says
                if self.ranks.size > 1:  # and the others wait
                    raise
                raise Interrupted(f"stopped while kernels were compiled: go on with --resume {self.folder}") from None

    @contextmanager
    def own_folder(self):
        """Within it, the run folder is there, and this process's alone: rank 0's, of several. A UserError, when it
        cannot be made, or when another process is at work in it."""
        if self.writes:
            self.open_folder()
        with checkpoint.locked(self.folder) if self.writes else nullcontext():
            yield

    def save_config(self):
        """config.json, by which ``train_cifar.py --resume`` goes on. The folder is there."""
        said = {"config": asdict(self.config), "source": self.dataset.source}
        checkpoint.write_json(self.folder / "config.json", said)

    @property
    def writes(self) -> bool:
        """Is it this rank that writes and prints?"""
        return self.ranks.rank == 0

    def _run(self):
        total, n = self.config.epochs * self.steps_per_epoch, self.config.batch_size
        self.compare()
        if self.writes and self.step == 0:  # a log without a checkpoint is of a run that was killed before its first
            checkpoint.write_jsonl(self.folder / "log.jsonl", [])
            self.save()
        self._compile()
        style = dict(unit="img", unit_scale=True, smoothing=0.05, disable=None if self.writes else True)
        bar = tqdm(total=total * n, initial=self.step * n, **style)
        with bar, _interrupts() as self.caught, np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            clock = saved = time.monotonic()
            while self.step < total:
                self.advance()
                bar.update(n)
                interrupted = self.stopping if self.ranks.size > 1 else self.caught
                epoch_ends, now = self.step % self.steps_per_epoch == 0, time.monotonic()
                if epoch_ends or self.step % COMPARE_EVERY == 0:
                    self.compare()
                late = now - saved > SAVE_EVERY
                regular = self.step % CHECK_EVERY == 0
                look = late or regular if self.device == "cpu" else late and regular
                if not (epoch_ends or interrupted or look):
                    continue
                self._stop_on_nan()
                now = time.monotonic()
                self.seconds, clock = self.seconds + now - clock, now
                if epoch_ends:
                    self._end_epoch(bar)
                elif interrupted or now - saved > SAVE_EVERY:
                    self.save()
                else:
                    continue
                clock = saved = time.monotonic()
                if interrupted:
                    self.ranks.barrier()  # none leaves before rank 0 has saved
                    done = f"stopped after {self.step} of {total} steps and saved"
                    raise Interrupted(f"{done}: go on with --resume {self.folder}")
        return self.finished()

    def compare(self):
        """Raises UserError unless all ranks are of one run, and where it stands: data, weights, optimiser."""
        if self.ranks.size == 1:
            return
        tensors = [self.labels, self.model.weights, *self.optimizer.state.values()]
        tensors += [value for _, layer in self.model.walk() for value in layer.buffers.values()]
        stands = json.dumps([asdict(self.config), self.dataset.source, self.step], default=str)
        digest = hashlib.sha256(stands.encode())
        for tensor in tensors:
            digest.update(np.ascontiguousarray(to_numpy(tensor)))
        mine = np.frombuffer(digest.digest(), np.uint8).astype(np.float64)
        differs = not np.array_equal(mine, self.ranks.broadcast_(mine.copy()))
        if others := int(self.ranks.sum_(np.array([float(differs)]))[0]):
            raise UserError(
                f"{others} of {self.ranks.size} ranks have another configuration, data, weights or optimiser than rank "
                f"0 (step {self.step}): start all with the same files and flags, and resume from the last save"
            )

    def _compile(self):
        """One step of rank 0 alone, for nothing: kernels that it compiles, the other ranks find on the disk, where two
        that write at once spoil each other's. (A machine with another kind of CPU compiles its own.)"""
        if self.ranks.size > 1 and self.config.epochs:
            with self.ranks.first():
                if self.writes:
                    Trainer(self.config, self.dataset, self.folder, self.device, graph=False).train_step()

    def finished(self):
        """The network that is saved for use: the model itself, unless the method makes another one of it."""
        return self.method.finish(self.model) if self.method.finish else self.model

    def open_folder(self):
        """Make the run folder. Raises UserError when that is not possible."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the run folder {self.folder}: {error.strerror}; choose another --out"
            raise UserError(message) from None

    def _end_epoch(self, bar):
        if not self.writes:
            self.totals[...], self.seconds = 0, 0.0
            return
        try:
            record = self._record()
        except NoClass:
            self._stop_on_nan("logits of the images that are watched")
            raise
        self.log.append(record)
        checkpoint.append_jsonl(self.folder / "log.jsonl", record)
        self.totals[...], self.seconds = 0, 0.0
        self.save()
        if len(self.log) == 1:
            bar.write(line(None, self.method.reports))
        bar.write(line(record, self.method.reports))
        if "warning" in record:
            bar.write(f"warning: {record['warning']} (held-out accuracy {record['fgsm']:.1%}, {record['pgd10']:.1%})")
        self._stop_on_collapse()

    def _record(self) -> dict:
        """The epoch's line in the log: means over its steps, and the held-out images (training images without any)."""
        config, steps = self.config, self.steps_per_epoch
        epoch = self.step / steps
        few, few_labels = self.held[:500], self.held_labels[:500]
        finished = self.finished()
        model = LOOKS.get(config.precision, lambda model: model)(finished)
        record = {
            "epoch": round(epoch),
            **dict(zip(self.names, (to_numpy(self.totals) / steps).tolist(), strict=True)),
            "accuracy": metrics.accuracy(model, self.held, self.held_labels),
            "pgd10": metrics.robust_accuracy(model, few, few_labels, config.eps, steps=10, seed=config.seed),
            **(
                {"ibp_verified": certified.verified(finished, self.held, self.held_labels, config.eps)}
                if self.method.certifies
                else {}
            ),
            **metrics.stability(finished, few, config.eps, config.seed),
            **config.schedule(epoch),
            **{name: self.fixed[name] for name in GAMMAS.values() if name in self.fixed},
            "seconds": round(self.seconds, 2),
            "images_per_s": steps * config.batch_size / self.seconds,
            "kernel": self.kernel,
            **({"ranks": self.ranks.size} if self.ranks.size > 1 else {}),
            **(self._kernels() if self.device == "gpu" else {}),
        }
        if config.method == "fgsm":
            record["fgsm"] = metrics.robust_accuracy(
                model, few, few_labels, config.eps, steps=1, step_size=config.eps, random_start=False
            )
            if overfitted(record["fgsm"], record["pgd10"], len(self.dataset.classes)):
                record["warning"] = "catastrophic overfitting: one step of an attack hardly fools it, ten steps do"
        return record

    def _kernels(self) -> dict:
        """How steps are taken on this GPU: which functions are not our own kernels, is a step one CUDA graph, and which
        products take other tiles than the usual ones?"""
        graph = getattr(self._on_device, "graph", None) is not None
        plain = [name for name in gpu.replaced if name != "graph"]
        return {"plain_kernels": plain, "graph": graph, "tiles": dict(gpu.tiles_in_use)}

    def _stop_on_nan(self, seen: str = ""):
        """Raises UserError where a total or a weight is not finite, or what was ``seen`` not to be."""
        totals, weights = to_numpy(self.totals), self.model.weights
        if not seen and np.isfinite(totals).all() and array_module(weights).isfinite(weights).all():
            return
        names = [TERMS.get(name, name.replace("_", " ") + " term" * (name != "loss")) for name in self.names]
        bad = [name for name, value in zip(names, totals, strict=True) if not math.isfinite(value)]
        first = (bad[1] if len(bad) > 1 else bad[0]) if bad else seen or "weights"
        peaks = to_numpy(self.peaks)
        i = int(peaks.argmax())
        advice = "lower --lr"
        if peaks[i] > 10:
            first = names[2 + i]
            advice = f"it had reached {peaks[i]:.3g} times the cross-entropy: lower --gamma-{'ih'[i]}, or --lr"
        raise UserError(
            f"the {first} became NaN or infinite near step {self.step} (epoch {self.step / self.steps_per_epoch:.1f}): "
            f"{advice}, or clip gradients with --clip 1; {self.folder} holds the last good state"
        )

    def _stop_on_collapse(self):
        """All ReLUs stable and accuracy near chance, two epochs running: a regulariser has won."""
        chance = 1.5 / len(self.dataset.classes)
        last = self.log[-2:]
        if len(last) < 2 or any(r["accuracy"] > chance or r["unstable"] > 1e-3 for r in last):
            return
        weighted = {"": 0.0}
        if self.method.corners is not None:
            weighted = {
                "intrinsic (--gamma-i)": max(r["gamma_i"] * r["intrinsic"] for r in self.log),
                "Hamming (--gamma-h)": max(r["gamma_h"] * r["hamming"] for r in self.log),
            }
        name = max(weighted, key=weighted.get)
        if weighted[name] < 0.01:
            raise UserError(
                f"collapsed at epoch {last[-1]['epoch']}: accuracy {last[-1]['accuracy']:.1%}, no unstable ReLU, and "
                "no regulariser did it: lower --lr or --weight-decay, or try --clip 1"
            )
        raise UserError(
            f"collapsed at epoch {last[-1]['epoch']}: accuracy {last[-1]['accuracy']:.1%}, no unstable ReLU; "
            f"the {name} term did it (it reached {weighted[name]:.2f}, beside the cross-entropy): "
            "lower it, or --lr, or try --clip 1"
        )

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self):
        """Write ``last.safetensors`` (all that a resumed run needs) and ``model.safetensors``: rank 0 does."""
        if not self.writes:
            return
        state = {"step": self.step, "totals": to_numpy(self.totals).tolist(), "seconds": self.seconds}
        tensors = self.model.state_dict() | {f"optimizer.{k}": v for k, v in self.optimizer.state.items()}
        metadata = {"architecture": self.config.architecture, "state": state, "config": asdict(self.config)}
        self.finished().save(
            self.folder / "model.safetensors", epoch=self.step / self.steps_per_epoch, data=self.config.data
        )  # first: what a kill leaves behind here, the resumed run writes again
        checkpoint.save_tensors(self.folder / "last.safetensors", tensors, metadata)

    def resume(self):
        """Continue from the folder's ``last.safetensors``. Raises UserError for files that are damaged or another's."""
        path, log = self.folder / "last.safetensors", self.folder / "log.jsonl"
        tensors, metadata = checkpoint.load_tensors(path)
        earlier = metadata.get("config") if isinstance(metadata.get("config"), dict) else {}
        if EARLIER | earlier != asdict(self.config):  # runs of before there was a choice
            raise UserError(f"{path} belongs to another configuration than config.json: restore one of the two")
        records = checkpoint.read_jsonl(log) if os.path.lexists(log) else []
        if not all(_finite(record.get(key)) for record in records for key in self._logged()):
            raise UserError(f"{log} holds lines that are not of a run's log: restore or delete it")
        for name, value in self.optimizer.state.items():
            if tensors.get(f"optimizer.{name}", np.empty(0)).shape != value.shape:
                raise UserError(f"{path} is for another network")
        for name, value in tensors.items():
            if not np.isfinite(value).all():
                raise UserError(
                    f"{path} is damaged: {name} holds NaN or infinity; restore it, or train anew with --out"
                )
        state = metadata.get("state") if isinstance(metadata.get("state"), dict) else {}
        step, seconds, totals = (state.get(key) for key in ("step", "seconds", "totals"))
        most = self.config.epochs * self.steps_per_epoch
        fine = type(step) is int and 0 <= step <= most and _finite(seconds) and seconds >= 0
        if not (fine and isinstance(totals, list) and len(totals) == len(self.names) and all(map(_finite, totals))):
            raise UserError(f"{path} is damaged: it does not say where the run stands; restore it")
        kept = {name: tensors.pop(f"optimizer.{name}") for name in self.optimizer.state}
        self.model.load_state_dict(tensors)
        for name, value in kept.items():
            self.optimizer.state[name][...] = to_device(value, self.device)
        self.step, self.seconds, self.optimizer.steps = step, seconds, step
        self.totals[...] = to_device(np.array(totals), self.device)
        epochs = self.step // self.steps_per_epoch  # a kill between log and checkpoint leaves a line too many
        self.log = [r for r in records if r["epoch"] <= epochs]
        if not self.writes:
            return
        checkpoint.write_jsonl(log, self.log)
        before = self.log[-1].get("kernel", self.kernel) if self.log else self.kernel
        if before != self.kernel:
            print(f"note: the run began with another kernel ({before}; here: {self.kernel}): not bit for bit the same")

    def _logged(self) -> tuple:
        """What a resumed run reads of the log."""
        return ("epoch", "accuracy", "unstable", *(self.method.corners is not None) * (*GAMMAS, *GAMMAS.values()))

    def plot(self) -> Path | None:
        """Draw ``curves.png``; None without matplotlib or without an epoch to draw."""
        return plots.curves(self.log, self.folder / "curves.png", self.config.hold_out > 0) if self.log else None


# Titles, keys and formats of what is printed of a record, what matters most first: log.jsonl has it all.
COLUMNS = (
    ("epoch", "epoch", "5d"), ("  loss", "loss", "6.3f"), (" clean", "accuracy", "6.1%"), ("PGD-10", "pgd10", "6.1%"),
    ("unstable", "unstable", "8.1%"), ("    CE", "cross_entropy", "6.3f"), ("    lr", "lr", "6.4f"),
    (" img/s", "images_per_s", "6.0f"),
)  # fmt: skip


def line(record: dict | None = None, reports=("intrinsic", "hamming")) -> str:
    """A record of the log as a row of a table, or the table's head: as many columns as the terminal has room for.
    ``reports``: of the method's step."""
    own = [(f"{name:>7}", name, f"{max(len(name), 7)}.1e") for name in reports]
    columns = [*COLUMNS[:6], *own, *COLUMNS[-2:]]
    cells = [title if record is None else format(record[key], form) for title, key, form in columns]
    widths = np.cumsum([1 + len(title) for title, _, _ in columns]) - 1
    return " ".join(cells[: max(1, int((widths < shutil.get_terminal_size().columns).sum()))])


def _finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def _interrupts():
    """Within it, Ctrl-C and SIGTERM fill the list that it yields instead of breaking into a step. A kernel that is
    being compiled, which may take half a minute, they break into: a KeyboardInterrupt."""
    caught: list = []
    previous = {}

    def handle(number, frame):
        if compiling.now():
            raise KeyboardInterrupt
        caught.append(number)

    for kind in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[kind] = signal.signal(kind, handle)
        except ValueError:  # not in the main thread: leave signals alone
            break
    try:
        yield caught
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
