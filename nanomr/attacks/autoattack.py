"""AutoAttack (Croce & Hein 2020): attacks in a row, each on the images that have withstood those before it.

``STAGES["plus"]`` is the AutoAttack+ of the paper's Table 2. An image's random draws depend on nothing but (seed,
attack, id), so that each attack breaks the same images in the cascade as it does alone: the cascade's result is the
union of the attacks'.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..backend import array_module, to_numpy
from .apgd import apgd, apgd_targeted
from .common import check_inputs, check_logits, check_options, logits_of, predictions, recheck
from .fab import fab, fab_targeted
from .pgd import pgd
from .square import square

ROBUST, WRONG = -1, 0  # Outcome.by: withstood all; misclassified to begin with; k >= 1: broken by stage k - 1
BUDGETS = ("steps", "restarts", "queries", "every")  # what quick() divides


@dataclass(frozen=True)
class Stage:
    """One attack of a cascade: ``attack(model, x, labels, eps, norm=, seed=, ids=, ..., **options)``."""

    name: str
    attack: Callable
    options: dict = field(default_factory=dict)

    @property
    def least(self) -> int:
        """The fewest classes that it works with."""
        return self.attack.least(**self.options) if hasattr(self.attack, "least") else 2

    def check(self, shape) -> None:
        """Raises ValueError for options that make no sense, and images (N, H, W, C) that it cannot attack."""
        if hasattr(self.attack, "complete"):
            self.attack.complete(shape, **self.options)


APGD_T = Stage("apgd-t", apgd_targeted, {"steps": 100, "targets": 9})
FAB_T = Stage("fab-t", fab_targeted, {"steps": 100, "targets": 9})
SQUARE = Stage("square", square, {"queries": 5000})

STAGES = {
    "standard": (
        Stage("apgd-ce", apgd, {"loss": "ce", "steps": 100, "restarts": 1}),
        APGD_T,
        FAB_T,
        SQUARE,
    ),
    "plus": (
        Stage("apgd-ce", apgd, {"loss": "ce", "steps": 100, "restarts": 5}),
        Stage("apgd-dlr", apgd, {"loss": "dlr", "steps": 100, "restarts": 5}),
        Stage("fab", fab, {"steps": 100, "restarts": 5}),
        SQUARE,
        APGD_T,
        FAB_T,
    ),
    # not AutoAttack: the paper's Table 1
    "pgd": (Stage("pgd", pgd, {"steps": 20, "restarts": 10}),),
}


def quick(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages with a tenth of their steps, restarts and queries (at least one): a rehearsal, not a result."""
    return tuple(
        Stage(s.name, s.attack, {k: max(1, v // 10) if k in BUDGETS else v for k, v in s.options.items()})
        for s in stages
    )


def with_classes(stages: Sequence[Stage], classes: int) -> tuple[tuple[Stage, ...], tuple[str, ...]]:
    """(stages that work with so many classes, names of the others): DLR needs three, targeted DLR four."""
    enough = tuple(s for s in stages if s.least <= classes)
    return enough, tuple(s.name for s in stages if s.least > classes)


@dataclass
class Outcome:
    """What a cascade found. Arrays on the images' device, except for ``by`` and ``alone`` (NumPy)."""

    stages: tuple[str, ...]  # names, in order
    adversarial: np.ndarray  # (N, H, W, C); an image that no stage broke is itself
    by: np.ndarray  # (N,) int: ROBUST, WRONG, or 1 + the index of the first stage that broke it
    seconds: list[float]  # per stage
    refuted: list[int]  # per stage: successes it claimed that a fresh forward pass or the ball did not confirm
    alone: np.ndarray | None = None  # individual mode: (N, stages) bool, what each stage breaks by itself
    again: list[int] = field(default_factory=list)  # per stage: images that only the less precise network fell for
    left_out: tuple[str, ...] = ()  # stages that need more classes than the model has

    @property
    def fooled(self) -> np.ndarray:
        return self.by != ROBUST

    def robust_after(self) -> list[int]:
        """Images still classified correctly before the first stage, after it, after the second, ..."""
        return [int(((self.by == ROBUST) | (self.by > k)).sum()) for k in range(len(self.stages) + 1)]


def attempt(
    stage: Stage,
    model,
    x,
    labels,
    eps: float,
    *,
    norm: str,
    seed: int,
    ids,
    batch_size: int,
    progress: Callable | None = None,
    attacked=None,
):
    """(adversarial (N, H, W, C), broken (N,) bool, refuted, again) by one stage on ``x`` (N, H, W, C).

    An image is broken when :func:`recheck` says so: a fresh forward pass of ``model``, ball, box. ``attacked`` is what
    the stage sees, if not the model: the same network computed with less precision. What only that one falls for is
    attacked once more, the model itself this time; ``again`` counts these images. ``refuted``: successes on the model
    that were not confirmed.
    """
    xp, attacked = array_module(x), attacked or model
    adversarial, broken = x.copy(), xp.zeros(len(x), bool)
    left, refuted, again = xp.arange(len(x)), 0, 0
    for network in (attacked,) if attacked is model else (attacked, model):
        found, fooled = stage.attack(
            network, x[left], labels[left], eps, norm=norm, seed=seed, ids=ids[to_numpy(left)], batch_size=batch_size,
            progress=progress if network is attacked else None, **stage.options,
        )  # fmt: skip
        hit = xp.flatnonzero(fooled)
        found, left = found[hit], left[hit]
        sure = xp.zeros(0, bool)
        if len(left):
            sure = recheck(model, x[left], found, labels[left], eps, norm, batch_size)
            adversarial[left[sure]], broken[left[sure]] = found[sure], True
        left = left[~sure]
        if network is model:
            refuted = len(left)
        else:
            again = len(left)
        if len(left) == 0:
            break
    return adversarial, broken, refuted, again


def cascade(
    model,
    x,
    labels,
    eps: float,
    stages: Sequence[Stage] = STAGES["standard"],
    *,
    norm: str = "linf",
    seed: int = 0,
    ids=None,
    batch_size: int = 250,
    individual: bool = False,
    progress: Callable | None = None,
    attacked=None,
) -> Outcome:
    """Run ``stages`` on images ``x`` (N, H, W, C) in [0, 1] with ``labels`` (N,) that the model gets right.

    Each stage sees the images that are still robust; with ``individual``, all that were right at first, and the first
    stage that breaks an image still gets the credit. ``attacked``, the same network computed with less precision, is
    what the stages see if it is given; every verdict is the model's, see :func:`attempt`. Stages that need more classes
    than the model has are left out.
    ``progress(stage, done, left, robust)``: ``done`` of the stage's ``left`` images, and how many of all N may still be
    robust. Raises ValueError for odd input, as the attacks do, before the first stage.
    """
    _, labels, ids = check_inputs(x, labels, eps, norm=norm, ids=ids)
    check_options("cascade", {"batch_size": batch_size})
    for stage in stages:
        stage.check(x.shape)
    left_out = ()
    if len(x):
        logits = logits_of(model, x[:1])
        check_logits(logits, labels)
        stages, left_out = with_classes(stages, logits.shape[1])
        if not stages:
            raise ValueError(f"{', '.join(left_out)}: no stage works with the model's {logits.shape[1]} classes")
    xp = array_module(x)
    adversarial = x.copy()
    right = to_numpy(predictions(model, x, batch_size) == labels)
    by = np.where(right, ROBUST, WRONG)
    alone = np.zeros((len(x), len(stages)), bool) if individual else None
    seconds, refuted, again = [], [], []
    for k, stage in enumerate(stages):
        left = np.flatnonzero(right if individual else by == ROBUST)
        start = time.perf_counter()
        refuted.append(0)
        again.append(0)
        if len(left):
            where = xp.asarray(left)
            found, broken, refuted[k], again[k] = attempt(
                stage, model, x[where], labels[where], eps, norm=norm, seed=seed, ids=ids[left],
                batch_size=batch_size, progress=_advance(progress, stage.name, by, left), attacked=attacked,
            )  # fmt: skip
            broken = to_numpy(broken)
            new = broken & (by[left] == ROBUST)
            if new.any():
                adversarial[xp.asarray(left[new])] = found[xp.asarray(np.flatnonzero(new))]
            by[left[new]] = k + 1
            if individual:
                alone[left[broken], k] = True
        seconds.append(time.perf_counter() - start)
    return Outcome(tuple(s.name for s in stages), adversarial, by, seconds, refuted, alone, again, left_out)


def _advance(progress, name: str, by, left):
    """A stage's ``progress(done, robust)`` that calls the cascade's, or None."""
    # In a cascade all of ``left`` are still robust, and this is exact; in individual mode it is an estimate.
    share, total = (by[left] == ROBUST).mean(), int((by == ROBUST).sum())
    return progress and (lambda done, robust: progress(name, done, len(left), total - round((done - robust) * share)))


def autoattack(model, x, labels, eps, *, norm="linf", version="standard", **options):
    """(adversarial, fooled) of AutoAttack, ``version`` "standard" or "plus" (AutoAttack+); see :func:`cascade`."""
    if version not in ("standard", "plus"):
        raise ValueError(f"version must be 'standard' or 'plus', not {version!r}")
    outcome = cascade(model, x, labels, eps, STAGES[version], norm=norm, **options)
    return outcome.adversarial, array_module(x).asarray(outcome.fooled)
