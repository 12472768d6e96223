"""A model that looks alive is alive: however its parameters, gradients or layers were exchanged, and however it was
copied, the flat vectors are what the layers compute with, and the optimiser moves both."""

import copy
import pickle

import numpy as np
import pytest

import nanomr as mr
from nanomr import UserError, backend, losses, optim
from nanomr.layers import Flatten, Layer, Linear, PreActBlock, ReLU, Sequential
from nanomr.models import Model
from nanomr.testing.contract import slots

SHAPE = (2, 2, 3)


def small(seed=0):
    return mr.models.mlp((12, 6, 4), seed=seed, input_shape=SHAPE)


def resnet():
    return mr.models.preact_resnet18(width=1)


def loss(model, x, labels):
    logits, passed = model.forward(x, train=True)
    value, gradient = losses.cross_entropy(logits, labels)
    model.backward(gradient, passed)
    return float(value)


def alive(model):
    """Its parameters are views of its vectors, and training lowers its loss, by way of every one of them."""
    x, labels = np.random.default_rng(0).random((8, *model.input_shape), np.float32), np.arange(8) % 4
    first, vectors = model.weights, {"params": model.weights, "grads": model.gradients}
    assert first is model.weights and first.flags.writeable
    for store, vector in vectors.items():
        parts = slots(model, store).values()
        assert all(np.shares_memory(part, vector) for part in parts) and sum(p.size for p in parts) >= vector.size
        vector[...] = np.arange(vector.size)
        together = np.unique(np.concatenate([part.ravel() for part in parts]))
        np.testing.assert_array_equal(together, np.arange(vector.size))
    generator = np.random.default_rng(1)
    model.weights[...] = generator.standard_normal(first.shape) / 2
    model.zero_grad()
    optimizer, before = optim.SGD(model, weight_decay=0.0), model.weights.copy()
    values = [loss(model, x, labels)]
    for _ in range(3):
        assert optimizer.step(0.02) > 0
        values.append(loss(model, x, labels))
    assert values[-1] < values[0]
    assert np.mean(model.weights != before) > 0.4  # what is behind a dead ReLU stays
    assert model.weights is first


def pickled(model, protocol=pickle.HIGHEST_PROTOCOL):
    return pickle.loads(pickle.dumps(model, protocol))


def out_of_band(model):
    """As joblib and others do with large arrays: the buffers beside the pickle, and read-only."""
    buffers: list = []
    data = pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "out of band": out_of_band}
COPIES |= {f"pickle {p}": lambda model, p=p: pickled(model, p) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)}


@pytest.mark.parametrize("make", [small, resnet])
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_alive_and_the_same(how, make):
    model = make()
    model.gradients[...] = np.arange(model.gradients.size)
    twin = COPIES[how](model)
    for store in ("params", "grads", "buffers"):
        for name, value in slots(model, store).items():
            np.testing.assert_array_equal(slots(twin, store)[name], value)
    assert twin.dtype == model.dtype and twin.architecture == model.architecture
    kept = model.weights.copy()
    alive(twin)
    assert (how == "copy") != np.array_equal(model.weights, kept)  # copy.copy shares, as it does everywhere
    alive(model)
    assert pickled(twin.astype(np.float64)).dtype == np.float64


def test_a_trained_pickle_and_its_original_stay_equal():
    """Bit by bit, step by step."""
    x, labels = np.random.default_rng(0).random((8, *SHAPE), np.float32), np.arange(8) % 4
    model = small()
    twin = pickled(model)
    optimizers = [optim.SGD(m) for m in (model, twin)]
    for _ in range(3):
        assert loss(model, x, labels) == loss(twin, x, labels)
        assert all(optimizer.step(0.1) > 0 for optimizer in optimizers)
    np.testing.assert_array_equal(model.weights, twin.weights)


def fc(model):
    return model.children["fc2"]


def assign(model):
    fc(model).params["weight"] = fc(model).params["weight"] * 0.5


def assign_float64(model):
    fc(model).params["bias"] = np.ones(4)


def update(model):
    fc(model).params.update(weight=np.ones((6, 4), np.float32))
    fc(model).params |= {"bias": np.ones(4, np.float32)}


def whole_dict(model):
    fc(model).params = {name: value + 1 for name, value in fc(model).params.items()}


def gradient(model):
    fc(model).grads["weight"] = np.zeros((6, 4), np.float32)
    del model.children["fc1"].grads["bias"]
    fc(model).grads = {}


def swap(model):
    a, b = Linear(4, 4), Linear(4, 4)
    model.children |= {"relu2": ReLU(), "fc3": a, "fc4": b}
    model.weights[...] = np.arange(model.weights.size)
    a.params["weight"], b.params["weight"] = b.params["weight"], a.params["weight"]
    assert a.params["weight"].min() > b.params["weight"].max()
    kept = [layer.params["weight"].copy() for layer in (a, b)]
    assert model.weights.size  # a look
    for layer, value in zip((a, b), kept, strict=True):
        np.testing.assert_array_equal(layer.params["weight"], value)


def other_layer(model):
    model.children["fc2"] = Linear(6, 4, bias=False)


def nested(model):
    model.children["more"] = Sequential({"relu": ReLU(), "fc": Linear(4, 4)})
    assert model.weights.size
    model.children["more"].children["fc"] = Linear(4, 4, bias=False)


def removed(model):
    del model.children["fc2"], model.children["relu1"]


def tied(model):
    """One layer under two names: one set of parameters, which gets the gradients of both."""
    model.children["relu2"] = ReLU()
    model.children["fc3"] = model.children["fc4"] = Linear(4, 4)


EXCHANGES = [assign, assign_float64, update, whole_dict, gradient, swap, other_layer, nested, removed, tied]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whatever_is_exchanged_the_model_is_alive(exchange, dtype):
    model = small().astype(dtype)
    exchange(model)
    values = {name: value.copy() for name, value in slots(model, "params").items()}
    model.forward(np.zeros((1, *SHAPE), dtype))  # the first look
    for name, value in slots(model, "params").items():
        np.testing.assert_array_equal(value, values[name])
        assert value.dtype == dtype
    alive(model.astype(np.float32))


def test_the_vectors_stay_where_they_are_while_they_fit():
    """Whoever holds them, and a captured CUDA graph, goes on with them."""
    model = small()
    weights, gradients = model.weights, model.gradients
    assign(model)
    assign_float64(model)
    assert model.weights is weights and model.gradients is gradients
    np.testing.assert_array_equal(weights[-4:], 1)


def test_gradients_are_kept_when_a_parameter_is_exchanged():
    model = small()
    model.gradients[...] = 3
    assign(model)
    assert (model.gradients == 3).all()
    other_layer(model)
    assert (model.gradients == 3).mean() == (12 * 6 + 6) / model.gradients.size
    assert (model.children["fc1"].grads["weight"] == 3).all() and not fc(model).grads["weight"].any()


def test_whole_vectors_can_be_assigned():
    model = small()
    held = model.weights
    model.weights = 2 * np.ones(held.shape)
    model.weights -= 1
    model.gradients = 0
    assert model.weights is held and (held == 1).all() and (fc(model).params["bias"] == 1).all()
    for wrong in (np.ones(1), np.ones(held.size + 1), np.ones((1, held.size))):
        with pytest.raises(ValueError, match="takes a vector"):
            model.weights = wrong


def test_a_parameter_of_another_shape_is_named():
    model = small()
    fc(model).params["weight"] = np.zeros((6, 5), np.float32)
    with pytest.raises(ValueError, match=r"Linear\(.*takes weight \(6, 4\)"):
        model.forward(np.zeros((1, *SHAPE), np.float32))


def test_two_models_that_share_a_layer_share_its_weights():
    """The second model does not cut the first one off; nor does making it draw trained weights anew."""
    first = small()
    kept = first.children["fc1"].params["weight"].copy()
    shared = {**first.children, "fc2": Linear(6, 4)}
    second = Model(shared, {"name": "own"}, SHAPE, seed=1)
    np.testing.assert_array_equal(second.children["fc1"].params["weight"], kept)
    assert fc(second).params["weight"].any()
    for model in (first, second, first):
        alive(model)
        np.testing.assert_array_equal(first.children["fc1"].params["weight"], second.children["fc1"].params["weight"])


def test_an_optimiser_of_another_size_or_dtype_is_refused():
    model = small()
    optimizer = optim.SGD(model)
    for change in (lambda: model.astype(np.float64), lambda: other_layer(model.astype(np.float32))):
        change()
        with pytest.raises(ValueError, match="other weights"):
            optimizer.step(0.1)
    alive(model)


def test_saved_is_what_was_assigned(tmp_path):
    model = small()
    assign_float64(model)
    model.save(tmp_path / "model.safetensors")
    again = mr.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(fc(again).params["bias"], np.ones(4, np.float32))
    whole_dict(model)
    model.load_state_dict(again.state_dict())
    np.testing.assert_array_equal(model.weights, again.weights)


def test_layers_without_a_model_are_pickled_too():
    for layer in (PreActBlock(2, 3, 2), Sequential({"flat": Flatten(), "fc": Linear(12, 2)}), Layer()):
        twin = pickled(layer)
        assert repr(twin) == repr(layer) and slots(twin, "params").keys() == slots(layer, "params").keys()


def test_without_cupy_a_model_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(backend, "find_cupy", lambda: None)
    model = small()
    with pytest.raises(UserError, match="without CuPy: pip install"):
        model.to("gpu")
    with pytest.raises(ValueError, match="'cpu' or 'gpu', not 'cuda'"):
        model.to("cuda")
    alive(model.to("cpu"))
