"""The registry: every method trains and logs what its step names, and a stopped run ends as if it never had been."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from test_train import CONFIG, assert_same, log, stop_at, trainer

from nanomr import models
from nanomr.errors import UserError
from nanomr.methods import METHODS
from nanomr.optim import RECIPES
from nanomr.programs import train as program
from nanomr.train import EARLIER, Config, Interrupted

OTHERS = [name for name, method in METHODS.items() if method.corners is None]
SMALL = models.small_cnn(hidden=6, classes=3, input_shape=(4, 4, 3), batchnorm=True).architecture
RAMP = replace(CONFIG, architecture=SMALL, recipe="ramp", optimizer="adamw", lr=1e-3, clip=10.0, pad=2, ramp_from=0.0)


@pytest.mark.parametrize("method", OTHERS)
def test_a_stopped_run_of_every_method_goes_on_bit_for_bit(tmp_path, monkeypatch, method):
    config = replace(RAMP, method=method)
    final = trainer(tmp_path / "straight", config).run()
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Interrupted):
            trainer(tmp_path / "run", config).run()
    trainer(tmp_path / "run", config, resume=True).run()
    assert_same(tmp_path / "run", tmp_path / "straight")
    names = {"loss", "cross_entropy", *METHODS[method].reports}
    assert all(names <= r.keys() for r in log(tmp_path / "run"))
    assert all(("ibp_verified" in r) == METHODS[method].certifies for r in log(tmp_path / "run"))
    saved = models.load(tmp_path / "run")
    assert np.array_equal(saved.weights, final.weights)
    if METHODS[method].finish is models.fold:
        assert not any(name.startswith("bn") for name in saved.children)


CHANGED = {
    **{"gamma_i": 7.0, "gamma_h": 7.0, "gamma_factor": 3.0, "alpha": 2.0, "hamming_norm": "sample"},
    **{"eps_start": 1 / 255, "ramp_from": 0.05, "ramp_to": 0.9, "momentum": 0.5, "pad": 1},
}
OF_METHODS = list(CHANGED)[:5]


def test_flags_that_may_change_nothing_are_all_tried():
    assert CHANGED.keys() | {"kernel", "batch_norm", "width", "jin_v1"} == program.USES.keys()


def after_some_steps(folder, config):
    run = trainer(folder, config)
    run.step = 3  # of 12: epsilon and the regularisers' weights are on their ways
    results = [run.train_step(), run.train_step()]  # what the log has is a use, too
    return run.model.weights.tobytes(), repr(results)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_no_use_for_a_flag_that_is_refused_and_one_for_the_others(tmp_path, method):
    constants = {"steps": 1} if "steps" in METHODS[method].constants else {}
    config = replace(RAMP, method=method, gamma_i=1.0, constants=constants)
    plain = after_some_steps(tmp_path / "plain", config)
    for flag in OF_METHODS:
        changed = after_some_steps(tmp_path / flag, replace(config, **{flag: CHANGED[flag]})) != plain
        assert changed == program.USES[flag][1](config), flag


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_no_use_for_a_flag_that_is_refused_and_one_for_the_others(tmp_path, recipe, optimizer, augment):
    config = replace(RAMP, method="manifold", recipe=recipe, optimizer=optimizer, augment=augment, gamma_i=1.0)
    plain = after_some_steps(tmp_path / "plain", config)
    for flag in CHANGED:
        changed = after_some_steps(tmp_path / flag, replace(config, **{flag: CHANGED[flag]})) != plain
        assert changed == program.USES[flag][1](config), flag


@pytest.mark.parametrize("flag", program.USES)
def test_a_flag_that_would_change_nothing_is_refused(flag):
    model = models.preact_resnet18(width=8) if flag in ("kernel", "batch_norm") else models.build(SMALL)
    config = replace(RAMP, method="pgd", augment=False, recipe="cyclic", architecture=model.architecture)
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} is for .*leave it out"):
        program.refuse_unused({"method", flag}, config)
    program.refuse_unused({"method", "lr", "eps"}, config)


def test_a_configuration_of_before_these_fields_loads():
    config, _ = program.read_config(Path(__file__).parent.parent / "pretrained/small_cnn-cifar10/config.json")
    assert {name: getattr(config, name) for name in EARLIER} == EARLIER


def test_a_run_of_before_these_fields_goes_on(tmp_path):
    """Its last.safetensors says nothing of them."""
    from nanomr import checkpoint

    run = trainer(tmp_path, replace(CONFIG, epochs=1))
    run.run()
    tensors, metadata = checkpoint.load_tensors(tmp_path / "last.safetensors")
    metadata["config"] = {k: v for k, v in metadata["config"].items() if k not in EARLIER}
    checkpoint.save_tensors(tmp_path / "last.safetensors", tensors, metadata)
    assert trainer(tmp_path, replace(CONFIG, epochs=1), resume=True).step == run.step
    with pytest.raises(UserError, match="another configuration"):
        trainer(tmp_path, replace(CONFIG, epochs=1, pad=2), resume=True)


@pytest.mark.parametrize(
    ("constants", "words"), [({"kapa": 1.0}, "kappa=0.2"), ({"kappa": 2.0}, "from 0 to 1"), ({"kappa": "x"}, "number")]
)
def test_a_constant_that_the_method_does_not_have_is_refused(constants, words):
    with pytest.raises(ValueError, match=words):
        METHODS["ibp"].filled(constants)
    with pytest.raises(ValueError, match=words):
        Config(**json.loads(json.dumps(asdict(replace(RAMP, method="ibp", constants=constants))))).checked()
    assert METHODS["ibp"].filled({"kappa": 0.5})["kappa"] == 0.5
