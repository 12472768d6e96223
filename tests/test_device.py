"""The contract of layers and losses, models and attacks, on the arrays of a device: CuPy's (``-m gpu``) or, where there
is none, those of ``fake_cupy.py``, so that what the GPU's tests do has been done before there is a GPU.

float64 takes the formulas of ``reference`` on the device, float32 our kernels (but for convolutions: im2col), bfloat16
images our kernels altogether.
"""

import copy

import numpy as np
import pytest
import test_kernels
from test_layers import TINY, applies, make_case
from test_losses import LOSSES
from test_losses import make as make_loss

from nanomr import models
from nanomr.attacks.apgd import apgd
from nanomr.attacks.autoattack import STAGES, cascade, quick
from nanomr.attacks.blackbox import corner_noise
from nanomr.attacks.fab import fab, project_l2, project_linf
from nanomr.attacks.pgd import pgd
from nanomr.attacks.square import square
from nanomr.attacks.wasserstein import wasserstein
from nanomr.backend import to_numpy
from nanomr.layers import PairBatch
from nanomr.losses import Hamming, cross_entropy, of_logits
from nanomr.manifold import corner_pairs, hamming_distance
from nanomr.metrics import accuracy, stability
from nanomr.ops import gpu
from nanomr.testing.contract import CHECKS, Case, FromHost, ScalesDx, cast, exact, is_caught, same, slots

DTYPES = ["float64", "float32", "bfloat16"]


def moved(cupy, case: Case, dtype) -> Case:
    """A copy of ``case`` on the device: images of this dtype, weights of float32 next to bfloat16."""
    layer = cast(copy.deepcopy(case.layer), np.float64 if dtype == "float64" else np.float32)
    for _, below in layer.walk():
        for store in (below.params, below.grads, below.buffers):
            store.update({name: cupy.asarray(value) for name, value in store.items()})
    return Case(layer, cupy.asarray(case.x.astype(dtype_of(dtype))), case.train, case.view)


def dtype_of(name):
    return gpu.bfloat16() if name == "bfloat16" else np.dtype(name)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY)
def test_gradients_along_random_directions(cupy, kind):
    """In float64: what ``gpu`` does where it has no kernels. A dx that is 1 % too large is noticed."""
    case = make_case(kind, *TINY[kind](), seed=7)
    case.layer = FromHost(case.layer)
    CHECKS["vjp"](case)
    assert is_caught(CHECKS["vjp"], ScalesDx, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TINY)
def test_contract(cupy, kind, dtype):
    """All checks that do not need a numerical derivative."""
    case = moved(cupy, make_case(kind, *TINY[kind](), seed=7), dtype)
    skipped = {"vjp", "jacobian"} | ({"dtype"} if dtype != "float64" else set())
    for check in CHECKS.keys() - skipped:
        if applies(check, kind):
            CHECKS[check](case)


def results(case, y, cache, dy):
    """{name: array}: y, dx, the parameters' gradients, the running statistics."""
    found = {"y": y, "dx": case.layer.backward(dy, cache)}
    return found | slots(case.layer, "grads") | slots(case.layer, "buffers")


def close(found, expected, tolerance):
    """{name: array} twice, in the l2 norm: a ReLU that takes the other branch changes one number by a lot. A gradient
    may be 0 but for rounding (of a bias before a batch norm): it is allowed a share of the largest."""
    assert found.keys() == expected.keys()
    found, expected = ({k: exact(v).astype(np.float64) for k, v in values.items()} for values in (found, expected))
    largest = max(np.linalg.norm(e) for e in expected.values())
    for name, e in expected.items():
        assert found[name].shape == e.shape, name
        assert np.linalg.norm(found[name] - e) <= tolerance * (np.linalg.norm(e) + 0.02 * largest), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("kind", TINY)
def test_results_are_the_cpus(cupy, kind, dtype, tolerance):
    """Those of the CPU in float64. For bfloat16 the bound is a rough one (``test_kernels.py`` has the sharp ones), and
    the CPU takes the same rounded images."""
    here = make_case(kind, *TINY[kind](), seed=7)
    here.x = here.x.astype(dtype_of(dtype)).astype(np.float64)
    there = moved(cupy, here, dtype)
    y, cache = here.forward()
    dy = here.upstream(y)
    expected = results(here, y, cache, dy)
    y, cache = there.forward()
    close(results(there, y, cache, cupy.asarray(dy.astype(y.dtype))), expected, tolerance)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if "hamming" in kind or kind == "intrinsic"])
def test_losses_are_the_cpus(cupy, kind, dtype):
    """Value and gradients; 0-d arrays stay on the device."""
    inputs = make_loss(kind, (3, 4), 1, np.dtype(dtype))
    expected, found = LOSSES[kind].function(*inputs), LOSSES[kind].function(*map(cupy.asarray, inputs))
    for f, e in zip(found, expected, strict=True):
        assert isinstance(f, cupy.ndarray) and f.dtype == dtype
        same(f, e, kind)


@pytest.mark.parametrize("gamma", [None, 0.4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_of_logits(cupy, dtype, gamma, rng):
    """float32 by one launch, float64 by the formulas; gamma on the device, as the training loop has it."""
    logits, labels = rng.standard_normal((3 if gamma is None else 9, 4)).astype(dtype), np.array([2, 0, 3])
    expected = of_logits(logits.astype(np.float64), labels, gamma)
    on = None if gamma is None else cupy.asarray(gamma, np.dtype(dtype))
    for f, e in zip(of_logits(cupy.asarray(logits), cupy.asarray(labels), on), expected, strict=True):
        same(f, e, "of_logits", 1e-5)
    for f, e in zip(
        cross_entropy(cupy.asarray(logits), cupy.asarray(labels[[0] * len(logits)])),
        cross_entropy(logits.astype(np.float64), labels[[0] * len(logits)]),
        strict=True,
    ):
        same(f, e, "cross_entropy", 1e-5)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("kind", ["relu", "sequential, training", "block, projection"])
def test_the_hamming_tap(cupy, kind, dtype, tolerance, per_sample, pair, rng):
    """The tap's value, and what it adds to the gradients; x and rho as a PairBatch, or as the 3N batch."""
    here = make_case(kind, *TINY[kind](), seed=7)
    x, rho = (a.astype(dtype_of(dtype)) for a in (here.x, 0.5 * rng.standard_normal(here.x.shape)))
    there, given = moved(cupy, here, dtype), PairBatch(cupy.asarray(x), cupy.asarray(rho))
    found = []
    for case, images in ((here, PairBatch(x.astype(np.float64), rho.astype(np.float64))), (there, given)):
        if not (pair and case.layer.takes_pairs):
            images = images.full()
        tap = Hamming(alpha=2.0, weight=3.0, per_sample=per_sample)
        y, cache = case.layer.forward(images, train=True, tap=tap)
        dy = case.upstream(y)
        dx = case.layer.backward(dy, cache)
        parts = {"x": dx.x, "rho": dx.rho} if isinstance(dx, PairBatch) else {"dx": dx}
        found.append({"y": y, "value": tap.value, **parts, **slots(case.layer, "grads")})
    close(found[1], found[0], tolerance)


# --- models and attacks -----------------------------------------------------------------------------------------------


def small_model(seed=3):
    return models.mlp((8 * 8 * 3, 12, 4), seed=seed, input_shape=(8, 8, 3))


@pytest.fixture
def images(rng):
    """(images, the labels that small_model gives them, but one)."""
    x = rng.random((6, 8, 8, 3)).astype(np.float32)
    labels = small_model().forward(x)[0].argmax(1)
    labels[0] = (labels[0] + 1) % 4
    return x, labels


def test_a_model_moves_there_and_back(cupy, images, tmp_path):
    """Weights, gradients and buffers are one vector there, too; copies and checkpoints are the same numbers."""
    x, _ = images
    here, there = small_model(), small_model().to("gpu")
    assert isinstance(there.weights, cupy.ndarray)
    same(there.forward(cupy.asarray(x))[0], here.forward(x)[0], "logits")
    twin = copy.deepcopy(there)
    twin.weights[...] = 0
    there.save(tmp_path / "model.safetensors")
    again = models.load(tmp_path / "model.safetensors", "gpu")
    for model in (there, again, copy.deepcopy(there).to("cpu")):
        np.testing.assert_array_equal(to_numpy(model.weights), here.weights)
    same(there.astype(np.float64).forward(cupy.asarray(x.astype(np.float64)))[0], here.forward(x)[0], "logits", 1e-5)


ATTACKS = {
    "pgd": lambda *a: pgd(*a, 0.1, steps=3, restarts=2),
    "pgd, l2": lambda *a: pgd(*a, 0.8, norm="l2", steps=3),
    "apgd": lambda *a: apgd(*a, 0.1, loss="dlr", steps=8),
    "apgd, l2": lambda *a: apgd(*a, 0.8, norm="l2", steps=8),
    "fab": lambda *a: fab(*a, 0.1, steps=4, restarts=2),
    "fab, l2": lambda *a: fab(*a, 0.8, norm="l2", steps=4, restarts=1),
    "square": lambda *a: square(*a, 0.1, queries=15),
    "square, l2": lambda *a: square(*a, 0.8, norm="l2", queries=15),
    "corners": lambda *a: corner_noise(*a, 0.1, draws=3),
    "wasserstein": lambda *a: wasserstein(*a, steps=4, start=0.05, every=1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_break_the_same_images(cupy, images, attack):
    """The draws are the host's, the steps the device's: but for rounding, the same images come out."""
    x, labels = images
    expected, broken = ATTACKS[attack](small_model(), x, labels)
    found, there = ATTACKS[attack](small_model().to("gpu"), cupy.asarray(x), cupy.asarray(labels))
    assert isinstance(found, cupy.ndarray) and isinstance(there, cupy.ndarray)
    np.testing.assert_array_equal(to_numpy(there), broken)
    off = abs(to_numpy(found) - expected)
    assert (off > 1e-4).mean() <= 0.02, "a sign of a gradient near 0 may differ, here and there"


def test_a_cascade(cupy, images):
    """AutoAttack's bookkeeping between host and device, at a small budget."""
    stages, (x, labels) = quick(quick(STAGES["plus"])), images
    expected = cascade(small_model(), x, labels, 0.05, stages)
    found = cascade(small_model().to("gpu"), cupy.asarray(x), cupy.asarray(labels), 0.05, stages)
    np.testing.assert_array_equal(found.fooled, expected.fooled)
    np.testing.assert_array_equal(found.by == 0, expected.by == 0)
    assert sum(found.refuted) == 0


@pytest.mark.parametrize("project", [project_linf, project_l2])
def test_projections_onto_a_plane(cupy, project, rng):
    points, w = rng.random((5, 4, 4, 1)).astype(np.float32), rng.standard_normal((5, 4, 4, 1)).astype(np.float32)
    b = (w * points).reshape(5, -1).sum(1, dtype=np.float64) + np.array([0.3, -2, 100, -100, 0])
    same(project(*map(cupy.asarray, (points, w, b))), project(points, w, b), "d")


def test_what_the_log_says_of_a_model(cupy, rng):
    """accuracy, stability, Hamming distances: integers, and shares of them."""
    x, labels = rng.integers(0, 256, (6, 8, 8, 3), np.uint8), rng.integers(0, 4, 6)
    here, there, x_there = small_model(), small_model().to("gpu"), cupy.asarray(x)
    assert accuracy(there, x_there, cupy.asarray(labels)) == accuracy(here, x, labels)
    assert stability(there, x_there, 8 / 255) == stability(here, x, 8 / 255)
    images = (x / 255).astype(np.float32)
    rho, on = corner_pairs(images, 0.1, 1, 2), cupy.asarray(images)
    found = corner_pairs(on, 0.1, 1, 2)
    np.testing.assert_array_equal(to_numpy(found), rho)
    distance = hamming_distance(there, on + found, on - found)
    np.testing.assert_array_equal(to_numpy(distance), hamming_distance(here, images + rho, images - rho))


# --- training: on the stand-in these are in test_kernels.py, or take --stand-in ---------------------------------------

gpu_alone = pytest.mark.parametrize("cupy", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def tiny(monkeypatch):
    """Helpers of test_kernels.py, and its network by name."""
    monkeypatch.setitem(models.BUILDERS, "tiny", test_kernels.tiny_model)
    return test_kernels


@gpu_alone
@pytest.mark.parametrize(
    "options",
    [{}, dict(hamming_norm="sample", augment=False, clip=0.0), dict(late_norm=False), dict(method="standard")],
    ids=str,
)
def test_a_graphs_steps_are_eager_steps(cupy, tiny, options, tmp_path):
    """Bit for bit, over the end of an epoch."""
    eager, captured = tiny.trainer_of(tmp_path, graph=False, **options), tiny.trainer_of(tmp_path, **options)
    for _ in range(6):
        eager.advance()
        captured.advance()
        tiny.assert_equal_states(tiny.state_of(captured), tiny.state_of(eager))
    assert captured._on_device.graph is not None


@gpu_alone
@pytest.mark.parametrize("method", ["manifold", "standard"])
def test_five_steps_are_the_cpus(cupy, tiny, method, tmp_path):
    """In float32: the weights' way, and the sums for the log."""
    here = tiny.trainer_of(tmp_path, "cpu", precision="fp32", method=method)
    there = tiny.trainer_of(tmp_path, precision="fp32", method=method)
    start = here.model.weights.copy()
    for _ in range(5):
        here.advance()
        there.advance()
    off = to_numpy(there.model.weights) - here.model.weights
    assert np.linalg.norm(off) <= 1e-3 * np.linalg.norm(here.model.weights - start)
    np.testing.assert_allclose(to_numpy(there.totals), here.totals, rtol=1e-3)


@gpu_alone
@pytest.mark.parametrize("precision", ["bf16", "fp32", "tf32"])
def test_a_run_from_end_to_end(cupy, tiny, precision, tmp_path, monkeypatch):
    """Epochs, what the log says of the model, checkpoints; resumed in the middle, it ends at the same bits. TF32 is on
    within a run's steps and looks alone, and so in no closing table."""
    switched, switch = [], gpu.set_tf32
    monkeypatch.setattr(gpu, "set_tf32", lambda on: (switched.append(on), switch(on)))
    straight = tiny.trainer_of(tmp_path / "a", precision=precision)
    straight.run()
    times = switched.count(True)
    assert switched == [False] + [True, False] * times  # CUPY_TF32 counts for nothing
    assert times >= 12 + 4 if precision == "tf32" else times == 0  # 12 steps, 4 epochs
    assert len(straight.log) == 4 and all(np.isfinite(record["loss"]) for record in straight.log)
    first, second = (tiny.trainer_of(tmp_path / "b", precision=precision) for _ in range(2))
    first.open_folder()
    for _ in range(4):
        first.advance()
    first.save()
    second.resume()
    for _ in range(4, 12):
        second.advance()
    np.testing.assert_array_equal(to_numpy(second.model.weights), to_numpy(straight.model.weights))
