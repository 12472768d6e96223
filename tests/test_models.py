"""The networks: the layers' contract as a whole, PyTorch's names and shapes, files, and the 3N batch as a PairBatch."""

import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanomr as mr
from nanomr.checkpoint import load_tensors, save_tensors
from nanomr.errors import UserError
from nanomr.gradcheck import check_vjp
from nanomr.layers import Conv2d, Linear, PairBatch
from nanomr.losses import Hamming, cross_entropy, hamming, intrinsic
from nanomr.methods import manifold_step, standard_step
from nanomr.testing.contract import CHECKS, MUTANTS, Case, is_caught, prepare, same, slots, snapshot
from nanomr.testing.strategies import fewer, seeds

MODELS = {
    "mlp": lambda seed=0: mr.models.mlp((12, 6, 5, 3), seed=seed, input_shape=(2, 2, 3), mean=(0.5,), std=(0.3,)),
    "mlp, linear": lambda seed=0: mr.models.mlp((12, 3), seed=seed, input_shape=(2, 2, 3)),
    "small_cnn": lambda seed=0: mr.models.small_cnn(seed=seed, hidden=8),
    "small_cnn, kernel 5": lambda seed=0: mr.models.small_cnn(seed=seed, kernel=5, hidden=8),
    "resnet": lambda seed=0: mr.models.preact_resnet18(seed=seed, width=2),
    "resnet, pools at once": lambda seed=0: mr.models.preact_resnet18(seed=seed, width=2, bn_before_fc=False),
    "resnet, raw shortcut": lambda seed=0: mr.models.preact_resnet18(seed=seed, width=2, out_shortcut=False),
    "resnet, jin_v1": lambda seed=0: mr.models.preact_resnet18(seed=seed, width=2, jin_v1=True),
}
RELUS = {"mlp": 2, "mlp, linear": 0, "small_cnn": 3, "small_cnn, kernel 5": 3}
RELUS |= {"resnet": 17, "resnet, pools at once": 16, "resnet, raw shortcut": 17, "resnet, jin_v1": 17}
every_model = pytest.mark.parametrize("kind", MODELS)


def images(model, n, rng, dtype=np.float64):
    return rng.random((n, *model.input_shape)).astype(dtype)


def make_case(kind, train=True, seed=0) -> Case:
    rng = np.random.default_rng(seed)
    model = prepare(MODELS[kind](), rng)
    return Case(model, images(model, 3, rng), train)


# --- the contract of the layers, for whole networks -------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("train", [True, False])
def test_gradients(kind, train):
    """By the input and every parameter, in training and in evaluation mode."""
    CHECKS["vjp"](make_case(kind, train))


@every_model
def test_gradients_with_the_hamming_tap(kind, rng):
    model = MODELS[kind]().astype(np.float64)
    x = images(model, 2, rng)
    pairs = PairBatch(x, 0.05 * rng.choice([-1.0, 1.0], x.shape))
    tap = (lambda: Hamming(8.0, 100.0)) if RELUS[kind] else None
    mr.gradcheck(model, pairs.full(), tap=tap, directions=1)


@every_model
@pytest.mark.parametrize("check", [c for c in CHECKS if c not in ("vjp", "jacobian", "batch_mates")])
def test_contract(check, kind):
    CHECKS[check](make_case(kind))


@every_model
def test_evaluation_does_not_see_batch_mates(kind):
    CHECKS["batch_mates"](make_case(kind, train=False))


def test_every_entry_of_the_jacobian():
    """Of networks that are small enough."""
    for kind in ("mlp", "mlp, linear"):
        CHECKS["jacobian"](make_case(kind))


@every_model
@fewer(0.06)
@given(seed=seeds)
def test_single_entries_of_the_gradient(kind, seed):
    """One random entry of the input and of every parameter at a time, by central differences."""
    case = make_case(kind, seed=seed % 3)
    rng = np.random.default_rng(seed)
    model, h = case.layer, 1e-6
    model.zero_grad()
    y, cache = case.forward()
    dy = case.upstream(y)
    dx = model.backward(dy, cache)
    choices = list(slots(model, "params"))
    for name in ["x", *rng.choice(choices, min(len(choices), 6), replace=False)]:
        p, gradient = (case.x, dx) if name == "x" else (slots(model, "params")[name], slots(model, "grads")[name])
        at = tuple(rng.integers(0, p.shape))
        kept, quotients = p[at], []
        for step in (h, h / 30):  # two steps: a kink of one of thousands of ReLUs may lie within the first
            p[at] = kept + step
            above = (case.forward()[0] * dy).sum()
            p[at] = kept - step
            quotients.append((above - (case.forward()[0] * dy).sum()) / (2 * step))
            p[at] = kept
        scale = np.abs(gradient).max() + np.abs(y).max()
        assert min(abs(q - gradient[at]) for q in quotients) < 1e-6 * scale, (name, at, quotients, gradient[at])


@pytest.mark.parametrize("kind", ["mlp", "small_cnn", "resnet", "resnet, jin_v1"])
@pytest.mark.parametrize("check", [c for c in CHECKS if c != "jacobian"])
def test_contract_catches_its_mutants(check, kind):
    case = make_case(kind, train=check != "batch_mates")
    for mutant in MUTANTS[check]:
        assert is_caught(CHECKS[check], mutant, case), f"{mutant.__name__} survives"


# --- the 3N batch [x; x + rho; x - rho] as a PairBatch ----------------------------------------------------------------


def _step_by(route, model, x, rho, dy, options):
    """(logits, tap's value, dx, gradients) of the 3N batch; ``route``: as a PairBatch, or as one plain batch."""
    model.zero_grad()
    tap = Hamming(**options) if options else None
    pair = PairBatch(x, rho)
    logits, cache = model.forward(pair if route == "pair" else pair.full(), train=True, tap=tap)
    dx = model.backward(dy, cache)
    dx = dx if route == "pair" else PairBatch.gradient(dx)
    return logits, np.asarray(tap.value if tap else 0.0), *dx, model.gradients.copy()


@every_model
@pytest.mark.parametrize("tap", [True, False], ids=["tap", "no tap"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_pair_route_is_the_plain_batch(kind, tap, dtype, tolerance, rng):
    """Where the network is still linear it sees x and rho; all results are those of the plain 3N batch.

    float32: batch statistics of a channel that hardly varies magnify rounding, so that the models get 8 images.
    """
    model = MODELS[kind]().astype(dtype)
    n = 8
    x = images(model, n, rng, dtype)
    rho = (8 / 255 * rng.choice([-1.0, 1.0], x.shape)).astype(dtype)
    dy = rng.standard_normal((3 * n, model.forward(x[:1])[0].shape[1])).astype(dtype)
    options = dict(alpha=2.0, weight=20.0, per_sample=bool(len(kind) % 2)) if tap else None
    expected = _step_by("plain", model, x, rho, dy, options)
    for found, wanted in zip(_step_by("pair", model, x, rho, dy, options), expected, strict=True):
        assert found.shape == wanted.shape and (found.dtype == dtype or found.ndim == 0)
        error = np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) + 1e-30)
        assert error <= tolerance, error


@every_model
def test_pair_route_without_input_or_parameter_gradients(kind, rng):
    model = MODELS[kind]().astype(np.float64)
    x = images(model, 2, rng)
    pair = PairBatch(x, 0.03 * rng.choice([-1.0, 1.0], x.shape))
    logits, cache = model.forward(pair, train=True)
    dy = rng.standard_normal(logits.shape)
    dx = model.backward(dy, cache)
    gradients = model.gradients.copy()
    model.zero_grad()
    assert model.backward(dy, cache, input_grad=False) is None
    same(model.gradients, gradients, "gradients without dx")
    model.zero_grad()
    for found, wanted in zip(model.backward(dy, cache, param_grads=False), dx, strict=True):
        same(found, wanted, "dx without parameter gradients")
    assert not model.gradients.any()


# --- one step of the method -------------------------------------------------------------------------------------------

GAMMAS = dict(gamma_i=0.7, gamma_h=50.0, alpha=4.0)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "mlp, linear", "small_cnn", "resnet"])
def test_manifold_step_is_the_sum_of_its_losses(kind, per_sample, rng):
    """Its value, put together from the unfused losses at the pre-activations that a plain tap collects."""

    class Collect:
        def __init__(self):
            self.z = []

        def forward(self, z):
            self.z.append(z)
            return np.maximum(z, 0), None

    model = MODELS[kind]().astype(np.float64)
    n, labels = 4, np.array([0, 1, 2, 1])
    x = images(model, n, rng)
    rho = 0.03 * rng.choice([-1.0, 1.0], x.shape)
    collect = Collect()
    logits, _ = model.forward(PairBatch(x, rho).full(), train=True, tap=collect)
    values = [hamming(z[n : 2 * n], z[2 * n :], 4.0, per_sample)[0] for z in collect.z]
    assert len(values) == RELUS[kind]
    expected = {
        "cross_entropy": cross_entropy(logits[:n], labels)[0],
        "intrinsic": intrinsic(logits[n : 2 * n], logits[2 * n :])[0],
        "hamming": np.mean(values) if values else 0.0,
    }
    expected["loss"] = expected["cross_entropy"] + 0.7 * expected["intrinsic"] + 50 * expected["hamming"]
    found = manifold_step(model, x, labels, rho, **GAMMAS, per_sample=per_sample)
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "mlp, linear", "small_cnn", "resnet"])
def test_gradient_of_the_manifold_step(kind, per_sample, rng):
    """d(loss)/d(weights) of the whole objective, as the optimiser gets it."""
    model = MODELS[kind]().astype(np.float64)
    x, labels = images(model, 3, rng), np.array([0, 1, 2])
    rho = 0.03 * rng.choice([-1.0, 1.0], x.shape)

    def loss(weights):
        model.weights[...] = weights
        model.zero_grad()
        return np.asarray(manifold_step(model, x, labels, rho, **GAMMAS, per_sample=per_sample)["loss"])

    def gradient(dy):
        loss(start)
        return (dy * model.gradients,)

    start = model.weights.copy()
    check_vjp(loss, gradient, [start], directions=2)
    with pytest.raises(AssertionError):
        check_vjp(loss, lambda dy: (1.01 * gradient(dy)[0],), [start])


def test_without_regularisers_the_step_is_the_standard_one_on_three_batches(rng):
    """gamma = 0 leaves the cross-entropy of the clean third (of a network without batch norm: the standard step)."""
    model = MODELS["small_cnn"]().astype(np.float64)
    x, labels = images(model, 3, rng), np.array([0, 1, 2])
    found = manifold_step(model, x, labels, 0.1 * np.ones_like(x))
    gradients = model.gradients.copy()
    model.zero_grad()
    assert standard_step(model, x, labels)["loss"] == pytest.approx(found["loss"], rel=1e-12)
    same(model.gradients, gradients, "gradients")


# --- the architecture -------------------------------------------------------------------------------------------------


@every_model
def test_number_of_relus_that_a_tap_sees(kind, rng):
    model = MODELS[kind]()
    tap = Hamming()
    model.forward(images(model, 3, rng, np.float32), tap=tap)
    assert tap.layers == RELUS[kind]


def test_number_of_parameters():
    """He et al.'s network: 11 171 146 without the last batch normalisation, as published; it adds 2 x 512."""
    assert mr.models.preact_resnet18(bn_before_fc=False).weights.size == 11_171_146
    assert mr.models.preact_resnet18().weights.size == 11_172_170
    assert mr.models.preact_resnet18(jin_v1=True).weights.size == 11_171_146 + 2 * 64
    assert mr.models.small_cnn().weights.size == 784 + 8224 + 262_272 + 1290
    assert mr.models.mlp().weights.size == 3072 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


SMALL_CNN = {
    "normalize.mean": (3, 1, 1),
    "normalize.std": (3, 1, 1),
    "conv1.weight": (16, 3, 4, 4),
    "conv1.bias": (16,),
    "conv2.weight": (32, 16, 4, 4),
    "conv2.bias": (32,),
    "fc1.weight": (128, 2048),
    "fc1.bias": (128,),
    "fc2.weight": (10, 128),
    "fc2.bias": (10,),
}
MLP = {
    "normalize.mean": (1, 1, 1),
    "normalize.std": (1, 1, 1),
    "fc1.weight": (256, 3072),
    "fc1.bias": (256,),
    "fc2.weight": (256, 256),
    "fc2.bias": (256,),
    "fc3.weight": (10, 256),
    "fc3.bias": (10,),
}


def _bn(name, channels):
    names = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return names | {f"{name}.num_batches_tracked": ()}


def _resnet():
    names = {"normalize.mean": (3, 1, 1), "normalize.std": (3, 1, 1), "conv1.weight": (64, 3, 3, 3)}
    for block, before, after in (
        ("layer1.0", 64, 64),
        ("layer1.1", 64, 64),
        ("layer2.0", 64, 128),
        ("layer2.1", 128, 128),
        ("layer3.0", 128, 256),
        ("layer3.1", 256, 256),
        ("layer4.0", 256, 512),
        ("layer4.1", 512, 512),
    ):
        names |= _bn(f"{block}.bn1", before) | _bn(f"{block}.bn2", after)
        names[f"{block}.conv1.weight"] = (after, before, 3, 3)
        names[f"{block}.conv2.weight"] = (after, after, 3, 3)
        if before != after:
            names[f"{block}.shortcut.0.weight"] = (after, before, 1, 1)
    return names | {"linear.weight": (10, 512), "linear.bias": (10,)}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (mr.models.mlp, MLP),
        (mr.models.small_cnn, SMALL_CNN),
        (
            lambda: mr.models.small_cnn(kernel=5),
            SMALL_CNN | {"conv1.weight": (16, 3, 5, 5), "conv2.weight": (32, 16, 5, 5)},
        ),
        (mr.models.preact_resnet18, _resnet() | _bn("bn", 512)),
        (lambda: mr.models.preact_resnet18(out_shortcut=False), _resnet() | _bn("bn", 512)),
        (lambda: mr.models.preact_resnet18(bn_before_fc=False), _resnet()),
        (lambda: mr.models.preact_resnet18(jin_v1=True), _resnet() | _bn("bn1", 64)),
    ],
    ids=["mlp", "small_cnn", "small_cnn, kernel 5", "resnet", "raw shortcut", "no bn_before_fc", "jin_v1"],
)
def test_names_and_shapes_are_pytorchs(make, expected):
    state = make().state_dict()
    assert {name: value.shape for name, value in state.items()} == expected
    for name, value in state.items():
        assert value.flags.c_contiguous and value.dtype == (np.int64 if "num_batches" in name else np.float32)


def test_small_cnn_from_its_state_dict_in_pytorchs_layout(rng):
    """Images NCHW, weights OIHW, flatten in NCHW order: computed from the file's tensors, the same logits."""
    model = mr.models.small_cnn(hidden=8).astype(np.float64)
    x, state = images(model, 2, rng), model.state_dict()

    def conv(x, name):
        w, padded = state[f"{name}.weight"], np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (2, 3))[:, :, ::2, ::2]
        return np.einsum("nchwij,ocij->nohw", windows, w) + state[f"{name}.bias"][:, None, None]

    h = (x.transpose(0, 3, 1, 2) - state["normalize.mean"]) / state["normalize.std"]
    h = np.maximum(conv(np.maximum(conv(h, "conv1"), 0), "conv2"), 0).reshape(2, -1)
    h = np.maximum(h @ state["fc1.weight"].T + state["fc1.bias"], 0)
    np.testing.assert_allclose(model.forward(x)[0], h @ state["fc2.weight"].T + state["fc2.bias"], rtol=1e-6)


# --- initial weights --------------------------------------------------------------------------------------------------


@every_model
def test_the_seed_decides_the_weights(kind):
    first, again, other = MODELS[kind](3), MODELS[kind](3), MODELS[kind](4)
    np.testing.assert_array_equal(first.weights, again.weights)
    assert (first.weights != other.weights).mean() > 0.5


@pytest.mark.parametrize("make", [mr.models.mlp, mr.models.small_cnn, lambda: mr.models.preact_resnet18(width=16)])
def test_initial_weights_fill_their_bounds(make):
    """Uniform within 1 / sqrt(fan in), as PyTorch: never beyond, and close to it; mean 0."""
    for _, layer in make().walk():
        if isinstance(layer, Conv2d | Linear):
            weight = layer.params["weight"]
            bound = np.prod(weight.shape[:-1]) ** -0.5
            for value in layer.params.values():
                assert np.abs(value).max() <= bound * (1 + 1e-6)
            assert np.abs(weight).max() > 0.95 * bound
            assert abs(weight.mean()) < 5 * bound / (3 * weight.size) ** 0.5


# --- flat vectors -----------------------------------------------------------------------------------------------------


@every_model
def test_parameters_are_views_of_one_vector(kind, rng):
    model = MODELS[kind]()
    for dtype in (np.float32, np.float64):
        model.astype(dtype)
        for vector, store in ((model.weights, "params"), (model.gradients, "grads")):
            parts = slots(model, store)
            assert vector.ndim == 1 and vector.dtype == dtype and sum(p.size for p in parts.values()) == vector.size
            vector[...] = np.arange(vector.size)
            flat = np.concatenate([p.ravel() for p in parts.values()])
            np.testing.assert_array_equal(flat, np.arange(vector.size))
        model.zero_grad()
        assert not model.gradients.any()


@every_model
def test_astype_and_to_keep_the_values(kind):
    model = MODELS[kind]()
    before = model.state_dict()
    after = model.astype(np.float64).to("cpu").astype(np.float32).state_dict()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


# --- inputs that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (2, 3, 32, 32), (32, 32, 3), (2, 16, 16, 3), (2, 3072)])
@pytest.mark.parametrize("pair", [False, True])
def test_refuses_other_shapes(shape, pair):
    x = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"takes images \(N, 32, 32, 3\) float32, not \(") as error:
        mr.models.small_cnn().forward(PairBatch(x, x) if pair else x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8])
@pytest.mark.parametrize("pair", [False, True])
def test_refuses_other_dtypes(dtype, pair):
    x = np.zeros((2, 32, 32, 3), dtype)
    with pytest.raises(ValueError, match=rf"takes images \(.*\) float32, not \(.*\) {np.dtype(dtype)}"):
        mr.models.small_cnn().forward(PairBatch(x, x) if pair else x)


def test_refuses_a_perturbation_of_another_shape_or_dtype():
    """A rho that broadcasts, or promotes the whole network to float64, would go unnoticed."""
    x = np.zeros((2, 32, 32, 3), np.float32)
    for rho in (x.astype(np.float64), x[:1]):
        with pytest.raises(ValueError):
            mr.models.small_cnn(hidden=4).forward(PairBatch(x, rho))


@pytest.mark.parametrize("options", [dict(sizes=(10, 3)), dict(sizes=(3072,)), dict(sizes=(12, 3))])
def test_mlp_refuses_sizes_that_do_not_fit(options):
    with pytest.raises(ValueError, match="mlp"):
        mr.models.mlp(**options)


@pytest.mark.parametrize("kernel", [3, 6])
def test_small_cnn_refuses_other_kernels(kernel):
    with pytest.raises(ValueError, match=r"kernel must be 4 .* or 5"):
        mr.models.small_cnn(kernel=kernel)


# --- files ------------------------------------------------------------------------------------------------------------


@every_model
def test_load_is_the_inverse_of_save(kind, tmp_path, rng):
    """Bit-equal: weights, running statistics, logits; other seeds' weights are overwritten; a run folder will do."""
    model = prepare(MODELS[kind](5), rng, np.float32)
    model.forward(images(model, 3, rng, np.float32), train=True)
    model.save(tmp_path / "model.safetensors", epoch=3)
    assert load_tensors(tmp_path / "model.safetensors")[1]["epoch"] == 3
    x = images(model, 3, rng, np.float32)
    for path in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        loaded = mr.load(path)
        assert loaded.architecture == model.architecture
        np.testing.assert_array_equal(loaded.weights, model.weights)
        for name, value in slots(model, "buffers").items():
            np.testing.assert_array_equal(slots(loaded, "buffers")[name], value)
        np.testing.assert_array_equal(loaded.forward(x)[0], model.forward(x)[0])


@every_model
def test_a_file_of_half_the_size_holds_the_weights_rounded_to_bfloat16(kind, tmp_path, rng):
    """Round to nearest, ties to even, in the upper 16 bits; running statistics stay as they are."""
    model = prepare(MODELS[kind](5), rng, np.float32)
    model.save(tmp_path / "whole.safetensors")
    model.save(tmp_path / "model.safetensors", precision="bf16", epoch=3)
    loaded = mr.load(tmp_path)
    assert load_tensors(tmp_path / "model.safetensors")[1]["epoch"] == 3
    saved = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "model")]
    assert abs(saved[0] - saved[1] - 2 * model.weights.size) < 200  # but for the headers
    bits = model.weights.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint32) << 16
    np.testing.assert_array_equal(loaded.weights.view(np.uint32), expected)
    assert not np.array_equal(loaded.weights, model.weights)
    for name, value in slots(model, "buffers").items():
        np.testing.assert_array_equal(slots(loaded, "buffers")[name], value)
    with pytest.raises(ValueError, match="fp32 or bf16, not 'tf32'"):
        model.save(tmp_path / "model.safetensors", precision="tf32")


def test_state_dict_is_a_copy():
    model = MODELS["mlp"]()
    state = model.state_dict()
    for value in state.values():
        value[...] = 99
    assert not (model.weights == 99).any()


def damaged(state, kind):
    state = dict(state)
    if kind == "missing":
        del state["conv2.bias"]
    elif kind == "unknown":
        state["conv3.weight"] = np.zeros(1, np.float32)
    elif kind == "transposed":
        state["fc2.weight"] = state["fc2.weight"].T
    elif kind == "HWIO":
        state["conv1.weight"] = state["conv1.weight"].transpose(2, 3, 1, 0)
    elif kind == "scalar":
        state["fc2.bias"] = np.float32(0)[None]
    elif kind == "empty":
        state = {}
    return state


@pytest.mark.parametrize("kind", ["missing", "unknown", "transposed", "HWIO", "scalar", "empty"])
def test_a_foreign_checkpoint_changes_nothing(kind, tmp_path):
    """All or nothing, and one line that says what is wrong."""
    model, other = mr.models.small_cnn(hidden=8), mr.models.small_cnn(seed=1, hidden=8)
    before = model.weights.copy()
    state = damaged(other.state_dict(), kind)
    with pytest.raises(UserError, match="another network") as error:
        model.load_state_dict(state)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(model.weights, before)
    save_tensors(tmp_path / "m.safetensors", state, {"architecture": model.architecture})
    with pytest.raises(UserError, match="another network"):
        mr.load(tmp_path / "m.safetensors")


def test_load_ignores_the_optimiser(tmp_path):
    model = MODELS["mlp"]()
    state = model.state_dict() | {"optimizer.velocity": np.zeros(3, np.float32)}
    save_tensors(tmp_path / "m.safetensors", state, {"architecture": model.architecture})
    np.testing.assert_array_equal(mr.load(tmp_path / "m.safetensors").weights, model.weights)


def test_load_refuses_files_without_an_architecture(tmp_path):
    save_tensors(tmp_path / "m.safetensors", MODELS["mlp"]().state_dict(), {})
    with pytest.raises(UserError, match="not written by nanomr"):
        mr.load(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="no such file"):
        mr.load(tmp_path / "none.safetensors")


json_values = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-3, 3)
    | st.text(max_size=3)
    | st.lists(st.integers(-2, 2), max_size=3)
)


@pytest.mark.parametrize(
    "architecture",
    [
        None,
        "mlp",
        7,
        [],
        ["name"],
        {},
        {"name": None},
        {"name": ["mlp"]},
        {"name": "lenet"},
        {"name": "mlp", "layers": 3},
        {"name": "mlp", "sizes": 5},
        {"name": "mlp", "sizes": []},
        {"name": "mlp", "sizes": [12, 0, 3], "input_shape": [2, 2, 3]},
        {"name": "mlp", "sizes": [12, -1, 3], "input_shape": [2, 2, 3]},
        {"name": "small_cnn", "kernel": 3},
        {"name": "small_cnn", "hidden": 0},
        {"name": "small_cnn", "seed": 1},
        {"name": "preact_resnet18", "width": 0},
        {"name": "preact_resnet18", "width": "64"},
    ],
    ids=repr,
)
def test_build_refuses_unknown_architectures(architecture, tmp_path):
    """Files come from anywhere: an architecture that does not fit is the user's error, not a traceback."""
    with pytest.raises(UserError) as error:
        mr.models.build(architecture)
    assert "\n" not in str(error.value)


@fewer(0.5)
@given(name=st.sampled_from(sorted(mr.models.BUILDERS)), option=st.data())
def test_build_never_shows_a_traceback(name, option):
    """Whatever value an option has, ``build`` gives a network or a UserError."""
    known = {
        "mlp": ["sizes", "input_shape", "mean", "std"],
        "small_cnn": ["kernel", "hidden", "classes", "mean", "std"],
    }
    keys = known.get(name, ["bn_before_fc", "out_shortcut", "jin_v1", "width", "classes", "mean", "std"])
    base = {"mlp": {"sizes": [12, 3], "input_shape": [2, 2, 3]}, "small_cnn": {"hidden": 2}}.get(name, {"width": 1})
    architecture = {"name": name, **base, option.draw(st.sampled_from(keys)): option.draw(json_values)}
    try:
        model = mr.models.build(architecture)
    except UserError:
        return
    assert isinstance(model, mr.models.Model)


@every_model
def test_build_is_the_architecture(kind):
    model = MODELS[kind]()
    built = mr.models.build(model.architecture)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    np.testing.assert_array_equal(built.weights, model.weights)


def test_a_deep_copy_is_a_network_of_its_own():
    """Its parameters are views of its own vector: an optimiser's step on the copy moves the copy."""
    model = MODELS["mlp"]()
    twin = copy.deepcopy(model)
    twin.weights[...] = 7
    assert all((p == 7).all() for p in slots(twin, "params").values())
    assert not (model.weights == 7).any()


def test_evaluation_is_the_default(rng):
    model = prepare(MODELS["resnet"](), rng, np.float32)
    before = snapshot(model, "buffers")
    model.forward(images(model, 2, rng, np.float32))
    for name, value in slots(model, "buffers").items():
        np.testing.assert_array_equal(value, before[name])


# --- any network of our layers ----------------------------------------------------------------------------------------


def own(seed=0):
    """What no builder makes: uneven padding, a nested block, a linear layer without bias. Tuples and NumPy numbers."""
    layers = mr.layers
    end = layers.Sequential({"bn": layers.BatchNorm2d(6, eps=1e-3), "relu": layers.ReLU(), "flat": layers.Flatten()})
    return mr.models.Model(
        {
            "norm": layers.Normalize(np.array([0.4, 0.5]), (0.25, 0.5)),
            "conv": Conv2d(2, np.int64(4), 3, 2, (0, 1, 1, 2)),
            "block": layers.PreActBlock(4, 6, stride=2, out_shortcut=False),
            "end": layers.Sequential({"inner": end, "relu": layers.ReLU()}),
            "fc": Linear(2 * 2 * 6, 3, bias=False, image=(2, 2, 6)),
        },
        "own",
        (7, 7, 2),
        seed,
    )


def test_a_network_that_somebody_built_is_loaded_without_registration(tmp_path, rng):
    model = prepare(own(), rng, np.float32)
    model.save(tmp_path / "model.safetensors")
    loaded = mr.load(tmp_path)
    assert loaded.architecture == model.architecture and loaded.name == "own" and loaded.input_shape == (7, 7, 2)
    x = images(model, 3, rng, np.float32)
    np.testing.assert_array_equal(loaded.forward(x)[0], model.forward(x)[0])
    np.testing.assert_array_equal(mr.models.build(model.architecture, seed=5).weights, own(5).weights)


def test_the_header_is_the_networks_as_it_is_now():
    model = own()
    model.children["fc"] = Linear(24, 5)
    assert model.architecture["layers"]["fc"] == {
        "type": "Linear", "in_features": 24, "out_features": 5, "bias": True, "image": None,
    }  # fmt: skip
    assert copy.deepcopy(own()).architecture == own().architecture


SHORT = [
    ("small_cnn", {"name": "small_cnn", "kernel": 5, "hidden": 8, "classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3}),
    ("mlp", {"name": "mlp", "sizes": [12, 3], "input_shape": [2, 2, 3], "mean": [0.0], "std": [1.0]}),
    ("preact_resnet18", {"name": "preact_resnet18", "width": 2, "jin_v1": True, "classes": 4}),
]


@pytest.mark.parametrize(("builder", "short"), SHORT, ids=[name for name, _ in SHORT])
def test_files_of_older_versions_load(builder, short, tmp_path):
    """Their headers name the builder and its arguments, not the layers."""
    model = getattr(mr.models, builder)(seed=4, **{k: v for k, v in short.items() if k != "name"})
    save_tensors(tmp_path / "m.safetensors", model.state_dict(), {"architecture": short})
    loaded = mr.load(tmp_path / "m.safetensors")
    assert loaded.architecture == model.architecture
    np.testing.assert_array_equal(loaded.weights, model.weights)


@pytest.mark.parametrize(
    "folder, name, options, size",
    [
        ("small_cnn-cifar10", "small_cnn", {}, 272_570),
        ("small_cnn-cifar10-certified", "small_cnn", {}, 272_570),
        ("small_cnn-cifar10-diffai", "small_cnn", {}, 272_570),
        ("small_cnn-cifar10-pgd", "small_cnn", {}, 272_570),
        ("small_cnn-cifar10-standard", "small_cnn", {}, 272_570),
        ("preact_resnet18-cifar10", "preact_resnet18", {"width": 32}, 2_796_714),
        ("preact_resnet18-cifar10-worst-corner", "preact_resnet18", {"width": 32}, 2_796_714),
    ],
)
def test_the_published_networks_load(folder, name, options, size):
    model = mr.load(Path(__file__).parent.parent / "pretrained" / folder)
    assert model.name == name and model.weights.size == size
    assert model.architecture == mr.models.BUILDERS[name](**options).architecture


FC = {"type": "Linear", "in_features": 12, "out_features": 3}
DAMAGED = {
    "no layers": {},
    "layers of another type": [],
    "a layer of another type": {"fc": 3},
    "no type": {"fc": {"in_features": 12, "out_features": 3}},
    "a type that is none": {"fc": {**FC, "type": ["Linear"]}},
    "a type that is no layer": {"fc": {**FC, "type": "Layer"}},
    "a function": {"fc": {"type": "eval", "in_features": "exit()"}},
    "text for a number": {"fc": {**FC, "in_features": "12"}},
    "a float for a size": {"fc": {**FC, "in_features": 12.0}},
    "true for a size": {"fc": {**FC, "in_features": True}},
    "zero": {"fc": {**FC, "out_features": 0}},
    "below zero": {"fc": {**FC, "out_features": -1}},
    "one for a flag": {"fc": {**FC, "bias": 1}},
    "an argument too many": {"fc": {**FC, "depth": 1}},
    "the object itself": {"fc": {**FC, "self": 1}},
    "an argument too few": {"fc": {"type": "Linear", "in_features": 12}},
    "an image of another size": {"fc": {**FC, "image": [2, 2, 2]}},
    "an image of fractions": {"fc": {**FC, "image": [2.0, 2.0, 3.0]}},
    "a dot in a name": {"fc.1": FC},
    "no name": {"": FC},
    "a name of ours": {"optimizer": FC},
    "three sides": {"c": {"type": "Conv2d", "in_channels": 3, "out_channels": 1, "kernel": 1, "padding": [0, 0, 0]}},
    "outside": {"c": {"type": "Conv2d", "in_channels": 3, "out_channels": 1, "kernel": 1, "padding": -1}},
    "no stride": {"c": {"type": "Conv2d", "in_channels": 3, "out_channels": 1, "kernel": 1, "stride": 0}},
    "an empty mean": {"n": {"type": "Normalize", "mean": [], "std": [1.0]}},
    "a mean that is none": {"n": {"type": "Normalize", "mean": [None], "std": [1.0]}},
    "not a number": {"n": {"type": "Normalize", "mean": [float("nan")], "std": [1.0]}},
    "a sequence of nothing": {"s": {"type": "Sequential"}},
    "a sequence and more": {"s": {"type": "Sequential", "layers": {"fc": FC}, "bias": True}},
    "a terabyte": {"fc": {**FC, "in_features": 2**20, "out_features": 2**20}},
    "beyond int64": {"fc": {**FC, "out_features": 10**30}},
    "a gigabyte, bit by bit": {str(i): {**FC, "in_features": 2**13, "out_features": 2**13} for i in range(9)},
}


@pytest.mark.parametrize("layers", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_tree_is_refused_in_one_line(layers, tmp_path):
    architecture = {"name": "own", "input_shape": [2, 2, 3], "layers": layers}
    if not str(layers).startswith("{'0'"):
        with pytest.raises(UserError, match="damaged") as error:
            mr.models.build(architecture)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    if "nan" not in str(layers):
        save_tensors(
            tmp_path / "m.safetensors", {"fc.weight": np.zeros((3, 12), np.float32)}, {"architecture": architecture}
        )
        with pytest.raises(UserError, match=r"m\.safetensors: .*(damaged|another network)"):
            mr.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("shape", [[2, 2], [2, 2, 0], [2, 2, "3"], 5, None, [2.0, 2.0, 3.0]], ids=str)
def test_damaged_images_are_refused_in_one_line(shape):
    with pytest.raises(UserError, match="damaged"):
        mr.models.build({"name": "own", "input_shape": shape, "layers": {"fc": FC}})


def test_a_deep_tree_is_refused_in_one_line():
    node = FC
    for _ in range(10_000):
        node = {"type": "Sequential", "layers": {"a": node}}
    with pytest.raises(UserError, match="damaged"):
        mr.models.build({"name": "deep", "input_shape": [2, 2, 3], "layers": {"a": node}})


def test_a_layer_of_ones_own_is_saved_and_load_says_what_to_do(tmp_path):
    class Scale(mr.layers.ReLU):
        pass

    model = mr.models.Model({"flatten": mr.layers.Flatten(), "fc": Linear(12, 3), "scale": Scale()}, "own", (2, 2, 3))
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"'scale' is 'Scale', not one of .*load_state_dict"):
        mr.load(tmp_path / "m.safetensors")
    state, _ = load_tensors(tmp_path / "m.safetensors")
    model.load_state_dict(state)


def test_a_fresh_layer_has_drawn_weights():
    for layer in (Conv2d(3, 8, 3), Linear(27, 8)):
        weights = layer.params["weight"]
        assert weights.dtype == np.float32 and 0.1 < abs(weights).max() <= 27**-0.5 and len(np.unique(weights)) > 200
        np.testing.assert_array_equal(type(layer)(**layer.arguments).params["weight"], weights)


def test_names_and_shared_weights_that_a_file_cannot_have():
    layers = mr.layers
    fc = Linear(3, 3)
    for children, words in (
        ({"a.b": fc}, "dots"), ({1: fc}, "called 1"), ({"a": layers.Sequential({"optimizer": fc})}, "'optimizer'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            mr.models.Model(children, input_shape=(1, 1, 3))
    relu = layers.ReLU()
    model = mr.models.Model({"flatten": layers.Flatten(), "a": relu, "b": relu, "fc": fc}, input_shape=(1, 1, 3))
    assert len(model.architecture["layers"]) == 4
    shared = mr.models.Model({"flatten": layers.Flatten(), "a": fc, "b": fc}, input_shape=(1, 1, 3))
    with pytest.raises(ValueError, match="two names"):
        _ = shared.architecture
    with pytest.raises(ValueError, match="input_shape"):
        mr.models.Model({"fc": fc}, input_shape=(3,))


@pytest.mark.parametrize("shape", [(4, 4, 1), (9, 13, 2), (28, 28, 1), (33, 47, 3)], ids=str)
@pytest.mark.parametrize("kernel", [4, 5])
def test_small_cnn_follows_the_images(shape, kernel, rng):
    mean = [0.5] * shape[2]
    model = mr.models.small_cnn(kernel=kernel, hidden=3, classes=2, mean=mean, std=mean, input_shape=shape)
    assert model.forward(images(model, 2, rng, np.float32))[0].shape == (2, 2)
    with pytest.raises(ValueError, match="4x4"):
        mr.models.small_cnn(input_shape=(3, 8, 3))
    with pytest.raises(ValueError, match="square"):
        mr.models.preact_resnet18(width=1, input_shape=(8, 9, 3))
