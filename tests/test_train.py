"""The training loop: what a run leaves, and that a run that was stopped anywhere ends as if it never had been."""

import contextlib
import json
import os
import re
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest

from nanomr import checkpoint, metrics, models, train
from nanomr.data import Dataset
from nanomr.errors import UserError
from nanomr.layers import BatchNorm2d
from nanomr.methods import manifold
from nanomr.train import Config, Interrupted, Trainer

ARCHITECTURE = models.mlp((48, 12, 3), input_shape=(4, 4, 3), mean=(0.5,) * 3, std=(0.25,) * 3).architecture
# 64 of the 76 images are trained on: 6 steps of 10 an epoch, 4 images are left over
CONFIG = Config(
    architecture=ARCHITECTURE, method="manifold", data="toy", epochs=2, batch_size=10, hold_out=12, lr=0.1, gamma_h=1.0
)  # fmt: skip
STEPS = 6


def toy(n=76, side=4) -> Dataset:
    """Noise whose label is its brightest channel. Image i is marked: pixel (0, 0) is (i, i, i)."""
    draw = np.random.default_rng(0)
    labels = np.arange(n, dtype=np.int64) % 3
    images = draw.integers(0, 160, (n, side, side, 3), dtype=np.uint8)
    images[np.arange(n), :, :, labels] += 90
    images[:, 0, 0] = np.arange(n)[:, None]
    return Dataset("toy", ("red", "green", "blue"), images, labels, images[:9], labels[:9], {})


def trainer(folder, config=CONFIG, resume=False) -> Trainer:
    result = Trainer(config, toy(side=models.build(config.architecture).input_shape[0]), folder)
    if resume:
        result.resume()
    return result


def results(folder):
    """All that two equal runs must agree on: the bytes of both checkpoints, and the log but for the clock."""
    files = [(folder / name).read_bytes() for name in ("model.safetensors", "last.safetensors")]
    return files, [{k: v for k, v in r.items() if k not in ("images_per_s", "seconds")} for r in log(folder)]


def log(folder):
    path = folder / "log.jsonl"
    return checkpoint.read_jsonl(path) if path.exists() else []


def assert_same(folder, other):
    (files, lines), (other_files, other_lines) = results(folder), results(other)
    assert lines == other_lines
    assert files == other_files


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    trainer(folder).run()
    return folder


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Make the next run send itself a signal during this training step."""
    train_step = Trainer.train_step

    def stopped(self):
        if self.step == step:
            os.kill(os.getpid(), number)
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", stopped)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_model_and_a_line_an_epoch(straight):
    records = log(straight)
    assert [r["epoch"] for r in records] == [1, 2]
    assert records[1]["cross_entropy"] < records[0]["cross_entropy"]
    data = toy()
    model = models.load(straight)
    assert metrics.accuracy(model, data.train_images[-12:], data.train_labels[-12:]) == records[-1]["accuracy"] > 0.5
    _, metadata = checkpoint.load_tensors(straight / "model.safetensors")
    assert metadata["epoch"] == 2 and metadata["data"] == "toy"
    assert sorted(p.name for p in straight.iterdir()) == ["last.safetensors", "log.jsonl", "model.safetensors"]


def test_the_log_holds_the_terms_of_the_loss_and_the_schedule(straight):
    start = 0
    for r in log(straight):
        # The weights of the terms change within the epoch: the mean loss lies between those of its ends.
        ends = [CONFIG.schedule(start), CONFIG.schedule(r["epoch"])]
        low, high = (r["cross_entropy"] + e["gamma_i"] * r["intrinsic"] + e["gamma_h"] * r["hamming"] for e in ends)
        assert low - 1e-6 <= r["loss"] <= high + 1e-6
        assert {k: r[k] for k in ends[1]} == ends[1]
        assert 0 <= r["pgd10"] <= r["accuracy"] <= 1 and r["relus"] == 12 and r["gradient_norm"] > 0
        start = r["epoch"]
    assert all(r["hamming"] > 0 and r["intrinsic"] > 0 for r in log(straight))


def test_the_log_means_are_those_of_the_steps(tmp_path, monkeypatch):
    steps, train_step = [], Trainer.train_step

    def noted(self):
        steps.append(train_step(self))
        return steps[-1]

    monkeypatch.setattr(Trainer, "train_step", noted)
    monkeypatch.setattr(train, "CHECK_EVERY", 4)
    trainer(tmp_path).run()
    for i, r in enumerate(log(tmp_path)):
        found = [r[k] for k in ("loss", "cross_entropy", "intrinsic", "hamming", "gradient_norm")]
        np.testing.assert_allclose(found, np.mean(steps[i * STEPS : (i + 1) * STEPS], 0), rtol=1e-12)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(straight, tmp_path):
    trainer(tmp_path / "again").run()
    assert_same(tmp_path / "again", straight)
    trainer(tmp_path / "other", replace(CONFIG, seed=1)).run()
    weights = [checkpoint.load_tensors(f / "model.safetensors")[0] for f in (tmp_path / "other", straight)]
    assert all(not np.array_equal(weights[0][k], v) for k, v in weights[1].items() if k.startswith("fc"))


@pytest.mark.parametrize("method", ["manifold", "intrinsic", "hamming", "standard"])
def test_a_method_has_its_terms_and_no_other(tmp_path, method):
    trainer(tmp_path, replace(CONFIG, method=method, epochs=1)).run()
    (r,) = log(tmp_path)
    assert (r["gamma_i"] > 0) == (method in ("manifold", "intrinsic"))
    assert (r["gamma_h"] > 0) == (method in ("manifold", "hamming"))
    if method == "standard":
        assert r["loss"] == r["cross_entropy"] and r["intrinsic"] == r["hamming"] == 0


def test_the_schedule_is_the_papers_and_scales_with_the_epochs():
    config = replace(CONFIG, epochs=20, gamma_i=0.5, gamma_h=3.0, gamma_factor=10.0)
    expected = {  # epoch: lr / 0.1, eps * 255, what the gammas are multiplied by
        0: (0, 2, 1), 2: (0.25, 2, 1), 4: (0.5, 2 + 6 * (20 - 10) / (35 - 10), 1), 8: (1, 8, 4), 12: (0.525, 8, 7),
        16: (0.05, 8, 10), 18: (0.025, 8, 10), 20: (0, 8, 10),
    }  # fmt: skip
    for epoch, (lr, eps, factor) in expected.items():
        found = config.schedule(epoch)
        assert found == pytest.approx(
            {"lr": 0.1 * lr, "eps": eps / 255, "gamma_i": 0.5 * factor, "gamma_h": 3 * factor}
        )


# --- batches ----------------------------------------------------------------------------------------------------------


def marks(run, steps):
    """The numbers of the images in the batches of these steps (no augmentation), in order."""
    return [int(mark) for step in steps for mark in np.rint(run.batch(step)[0][:, 0, 0, 0] * 255)]


def test_an_epoch_shows_every_training_image_once_and_none_that_is_held_out(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, augment=False))
    assert run.steps_per_epoch == STEPS
    epochs = [marks(run, range(e * STEPS, (e + 1) * STEPS)) for e in range(8)]
    for seen in epochs:
        assert len(set(seen)) == len(seen) == 60 and max(seen) < 64
    assert len({tuple(seen) for seen in epochs}) == 8  # another order each
    assert set().union(*epochs) == set(range(64))  # what one epoch leaves over, another shows
    other = trainer(tmp_path, replace(CONFIG, augment=False, seed=1))
    assert marks(other, range(STEPS)) != epochs[0]


def test_a_batch_without_augmentation_is_the_images_and_their_labels(tmp_path):
    run, data = trainer(tmp_path, replace(CONFIG, augment=False)), toy()
    x, labels = run.batch(3)
    index = marks(run, [3])
    assert np.array_equal(x, metrics.as_float(data.train_images[index])) and x.dtype == np.float32
    assert np.array_equal(labels, data.train_labels[index])


def test_without_padding_augmentation_is_flips_alone(tmp_path):
    run, whole = trainer(tmp_path, replace(CONFIG, pad=0)), trainer(tmp_path, replace(CONFIG, augment=False))
    batches = [(run.batch(step)[0], whole.batch(step)[0]) for step in range(STEPS)]
    flipped = [np.array_equal(x, image[:, ::-1]) for xs, images in batches for x, image in zip(xs, images, strict=True)]
    same = [np.array_equal(x, image) for xs, images in batches for x, image in zip(xs, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True)) and 10 < sum(flipped) < 50


def test_a_batch_is_a_function_of_its_step_alone(tmp_path):
    run = trainer(tmp_path)
    forward = [run.batch(step) for step in range(2 * STEPS)]
    backward = [trainer(tmp_path).batch(step) for step in reversed(range(2 * STEPS))][::-1]
    for (x, labels), (x2, labels2) in zip(forward, backward, strict=True):
        assert np.array_equal(x, x2) and np.array_equal(labels, labels2)


def test_augmentation_crops_and_flips_differently_at_each_step(tmp_path):
    run, plain = trainer(tmp_path), trainer(tmp_path, replace(CONFIG, augment=False))
    shown, seen = {}, 0
    for step in range(8 * STEPS):
        x, labels = run.batch(step)
        assert np.array_equal(labels, plain.batch(step)[1])
        assert x.min() >= 0 and x.max() <= 1
        for mark, image in zip(marks(plain, [step]), x, strict=True):
            if image.any():  # else the crop shows only padding: a third of the 162 ways do, at this size
                shown.setdefault(mark, set()).add(image.tobytes())
                seen += 1
    assert seen > 200 and sum(map(len, shown.values())) > 0.9 * seen


def test_train_images_is_a_limit_and_hold_out_zero_watches_training_images(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, train_images=20, augment=False))
    assert sorted(marks(run, range(2))) == list(range(20)) and run.steps_per_epoch == 2
    run = trainer(tmp_path, replace(CONFIG, hold_out=0, augment=False))
    assert len(run.images) == 76 and run.steps_per_epoch == 7
    assert len(run.held) == 76 and len(run.held_labels) == 76


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(batch_size=65), "--batch-size 65"),
        (dict(train_images=9), "--batch-size 10"),
        (dict(hold_out=76), "hold out 76"),
        (dict(hold_out=-1), "hold out -1"),
    ],
)
def test_data_that_does_not_fit_the_batches_is_refused(tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        trainer(tmp_path, replace(CONFIG, **changes))


# --- stop and go on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(2 * STEPS))
def test_interrupted_in_any_step_and_resumed_equals_the_straight_run(straight, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step, signal.SIGTERM if step % 2 else signal.SIGINT)
        with pytest.raises(Interrupted, match=f"after {step + 1} of 12 steps and saved.* --resume {tmp_path}"):
            trainer(tmp_path).run()
    assert [r["epoch"] for r in log(tmp_path)] == list(range(1, (step + 1) // STEPS + 1))
    resumed = trainer(tmp_path, resume=True)
    assert resumed.step == step + 1
    resumed.run()
    assert_same(tmp_path, straight)


def test_interrupted_again_and_again_equals_the_straight_run(straight, tmp_path, monkeypatch):
    for step in range(0, 2 * STEPS - 1):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted):
                trainer(tmp_path, resume=step > 0).run()
    trainer(tmp_path, resume=True).run()
    assert_same(tmp_path, straight)


def test_interrupts_are_caught_only_while_the_run_lasts(tmp_path, monkeypatch):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    during = []
    monkeypatch.setattr(Trainer, "_record", lambda self: during.append(signal.getsignal(signal.SIGINT)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path).run()
    assert during[0] is not before[0]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


class Killed(BaseException):
    """As a SIGKILL: nothing in the program may catch it."""


@pytest.mark.parametrize("step", range(1, 2 * STEPS))
def test_killed_in_any_step_goes_on_from_the_last_save(straight, tmp_path, monkeypatch, step):
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    trainer(tmp_path / "straight").run()
    train_step = Trainer.train_step

    def killed(self):
        if self.step == step:
            raise Killed
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(Killed):
            trainer(tmp_path / "run").run()
    resumed = start_or_resume(tmp_path / "run")
    assert resumed.step == step  # a save is due after each: a kill costs no more than SAVE_EVERY and a step
    resumed.run()
    assert_same(tmp_path / "run", tmp_path / "straight")


def kill_at_write(monkeypatch, number, after):
    """Kill the run at its write of this number (checkpoints and lines of the log), before it or just after it.
    Returns the list of the files written."""
    written = []
    for name in ("write_atomic", "append_jsonl"):
        write = getattr(checkpoint, name)

        def guarded(path, data, write=write):
            written.append(path.name)
            if len(written) == number and not after:
                raise Killed
            write(path, data)
            if len(written) == number:
                raise Killed

        monkeypatch.setattr(checkpoint, name, guarded)
    return written


def start_or_resume(folder, config=CONFIG):
    """As train_cifar.py: a folder without a checkpoint is started in, another can only be gone on with."""
    return trainer(folder, config, resume=(folder / "last.safetensors").exists())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("first", range(1, 10))
def test_killed_between_any_two_writes_and_killed_again_in_the_resume(straight, tmp_path, monkeypatch, first, after):
    """Neither a line of the log is lost or doubled, nor does the model stay behind the state."""
    for second in (1, 2, 3, 4):  # the log is written anew, then a line, the model, the state
        folder = tmp_path / str(second)
        for number in (first, second):
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                kill_at_write(patch, number, after)
                start_or_resume(folder).run()
        start_or_resume(folder).run()
        assert_same(folder, straight)


def test_a_run_writes_less_than_ten_times(tmp_path, monkeypatch):
    """The test above kills at each of them."""
    written = kill_at_write(monkeypatch, 0, False)
    trainer(tmp_path).run()
    assert 6 <= len(written) < 10 and set(written) == {"log.jsonl", "last.safetensors", "model.safetensors"}


def test_a_resume_that_cannot_write_loses_no_line_of_the_log(straight, tmp_path, monkeypatch):
    copy(straight, tmp_path)

    def full(path, data):
        raise UserError("cannot write: no space left on device")

    for name in ("append_jsonl", "write_atomic"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with contextlib.suppress(UserError):
                trainer(tmp_path, resume=True)
        assert log(tmp_path) == log(straight)


def copy(source, target):
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_finished_run_is_not_trained_further(straight, tmp_path, monkeypatch):
    copy(straight, tmp_path)
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("a step of a finished run"))
    resumed = trainer(tmp_path, resume=True)
    model = resumed.run()
    assert_same(tmp_path, straight)
    assert log(tmp_path) == log(straight) == resumed.log  # images_per_s too
    assert np.array_equal(model.weights, models.load(straight).weights)


def test_batch_norms_running_statistics_survive(tmp_path, monkeypatch):
    architecture = models.preact_resnet18(width=4, classes=3).architecture
    config = replace(CONFIG, architecture=architecture, batch_size=16, hold_out=6, train_images=32, gamma_h=100.0)
    final = trainer(tmp_path / "straight", config).run()
    for step in range(3):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted):
                trainer(tmp_path / "run", config, resume=step > 0).run()
    resumed = trainer(tmp_path / "run", config, resume=True)
    norms = [layer for _, layer in resumed.model.walk() if isinstance(layer, BatchNorm2d)]
    assert len(norms) == 17
    for norm in norms:
        assert norm.buffers["num_batches_tracked"] == 3
        assert np.any(norm.buffers["running_mean"] != 0) and np.any(norm.buffers["running_var"] != 1)
    resumed.run()
    assert_same(tmp_path / "run", tmp_path / "straight")
    assert all(norm.buffers["num_batches_tracked"] == 4 for norm in norms)
    reloaded = models.load(tmp_path / "run").state_dict()
    assert all(np.array_equal(reloaded[name], value) for name, value in final.state_dict().items())


def test_a_checkpoint_of_another_configuration_is_refused(straight, tmp_path):
    copy(straight, tmp_path)
    before = results(tmp_path)
    for change in (dict(lr=0.2), dict(seed=1), dict(architecture={**ARCHITECTURE, "name": "another"})):
        with pytest.raises(UserError, match="another configuration"):
            trainer(tmp_path, replace(CONFIG, **change), resume=True)
    assert results(tmp_path) == before


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign", "not ours"])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(straight, tmp_path, damage):
    copy(straight, tmp_path)
    path = tmp_path / "last.safetensors"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "not ours":
        checkpoint.save_tensors(path, {"a": np.zeros(3)}, {})
    elif damage == "foreign":  # this configuration, another network
        checkpoint.save_tensors(path, {"optimizer.velocity": np.zeros(3)}, checkpoint.load_tensors(path)[1])
    else:
        path.write_bytes(whole[: {"empty": 0, "cut": len(whole) // 2}[damage]])
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, resume=True)
    assert "last.safetensors" in str(caught.value) or damage == "foreign"
    assert log(tmp_path) == log(straight)


@pytest.mark.parametrize("text", ["nonsense\n", "[1]\n", "{}\n"])
def test_a_damaged_log_is_refused_or_mended_in_one_line(straight, tmp_path, text):
    copy(straight, tmp_path)
    path = tmp_path / "log.jsonl"
    path.write_text(text + path.read_text())
    before = path.read_text()
    with pytest.raises(UserError, match=r"log\.jsonl"):
        trainer(tmp_path, resume=True)
    assert path.read_text() == before


def test_a_half_line_in_the_log_is_left_out(straight, tmp_path):
    copy(straight, tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    assert trainer(tmp_path, resume=True).log == log(straight) == log(tmp_path)


def test_a_lost_log_does_not_stop_the_resume(straight, tmp_path):
    copy(straight, tmp_path)
    (tmp_path / "log.jsonl").unlink()
    run = trainer(tmp_path, resume=True)
    run.run()
    assert run.log == [] and run.plot() is None


def test_the_configuration_survives_json():
    assert Config(**json.loads(json.dumps(asdict(CONFIG)))) == CONFIG


# --- collapse and NaN -------------------------------------------------------------------------------------------------


def poison(monkeypatch, step, **terms):
    """Let these terms of the loss be NaN from this step on, as far as the loop can see."""
    counted = []

    def wrap(function):
        def poisoned(*args, **kwargs):
            counted.append(None)
            parts = function(*args, **kwargs)
            return parts | terms if len(counted) > step else parts

        return poisoned

    for name in ("manifold_step", "standard_step"):
        monkeypatch.setattr(manifold, name, wrap(getattr(manifold, name)))


NAMES = {"cross_entropy": "cross-entropy", "intrinsic": "intrinsic term", "hamming": "Hamming term"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("term", NAMES)
def test_nan_names_its_term_and_leaves_the_last_good_epoch(straight, tmp_path, monkeypatch, term, value):
    with monkeypatch.context() as patch:
        poison(patch, STEPS + 2, loss=value, **{term: value})
        with pytest.raises(UserError) as caught:
            trainer(tmp_path).run()
    message = str(caught.value)
    assert min((name for name in NAMES.values() if name in message), key=message.index) == NAMES[term]
    assert str(tmp_path) in message and "--lr" in message
    assert log(tmp_path)[0]["loss"] == log(straight)[0]["loss"] and len(log(tmp_path)) == 1
    assert np.isfinite(models.load(tmp_path).weights).all()
    resumed = trainer(tmp_path, resume=True)  # nothing poisons it now
    assert resumed.step == STEPS
    resumed.run()
    assert_same(tmp_path, straight)


def test_nan_is_seen_within_check_every_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECK_EVERY", 2)
    poison(monkeypatch, 2, loss=np.nan, hamming=np.nan)
    run = trainer(tmp_path)
    with pytest.raises(UserError, match="Hamming"):
        run.run()
    assert run.step <= 4


def spoil_weights(monkeypatch, step):
    train_step = Trainer.train_step

    def spoiled(self):
        result = train_step(self)
        if self.step == step:
            self.model.weights[0] = np.nan
        return result

    monkeypatch.setattr(Trainer, "train_step", spoiled)


@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS - 1, 2 * STEPS])
def test_a_nan_in_the_weights_is_not_saved(tmp_path, monkeypatch, step):
    """Also not when the very last update of an epoch makes it, which no loss has seen."""
    spoil_weights(monkeypatch, step)
    with np.errstate(all="ignore"), pytest.raises(UserError, match="NaN or infinite"):
        trainer(tmp_path, replace(CONFIG, epochs=3)).run()
    assert np.isfinite(models.load(tmp_path).weights).all()
    assert checkpoint.load_tensors(tmp_path / "model.safetensors")[1]["epoch"] == 1
    assert len(log(tmp_path)) == 1


def test_interrupted_with_a_nan_the_last_good_state_stays(tmp_path, monkeypatch):
    spoil_weights(monkeypatch, STEPS + 1)
    stop_at(monkeypatch, STEPS + 2)
    with np.errstate(all="ignore"), pytest.raises(UserError, match="NaN"):
        trainer(tmp_path).run()
    assert np.isfinite(models.load(tmp_path).weights).all()
    assert trainer(tmp_path, resume=True).step == STEPS


def test_a_nan_in_the_first_epoch_promises_no_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, 1, loss=np.nan, intrinsic=np.nan)
    with pytest.raises(UserError, match="intrinsic") as caught:
        trainer(tmp_path).run()
    assert (tmp_path / "last.safetensors").exists() or "holds the last good epoch" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(gamma_h=1e7), "Hamming"),
        (dict(gamma_i=1e7, gamma_h=0.0), "intrinsic"),
        (dict(method="intrinsic", gamma_i=1e7), "intrinsic"),
        (dict(method="standard", lr=1e6), "cross-entropy|gradient|logits of the images that are watched"),
        (dict(method="standard", lr=1e30), "cross-entropy|gradient"),
    ],
)
def test_a_constant_far_too_large_is_named(tmp_path, changes, word):
    """Really trained: by the time that anyone looks, every term is NaN. The one that did it is to be named."""
    with np.errstate(all="ignore"), pytest.raises(UserError, match=word):
        trainer(tmp_path, replace(CONFIG, epochs=8, **changes)).run()
    if (tmp_path / "model.safetensors").exists():
        assert np.isfinite(models.load(tmp_path).weights).all()


def collapse(monkeypatch, **fields):
    """Write these fields into every record of the log."""
    record = Trainer._record
    monkeypatch.setattr(Trainer, "_record", lambda self: record(self) | fields)


DEAD = dict(accuracy=1 / 3, unstable=0.0)


@pytest.mark.parametrize(
    ("terms", "flag", "other"),
    [
        (dict(intrinsic=0.1, hamming=1e-6, gamma_i=0.4, gamma_h=9000.0), "--gamma-i", "--gamma-h"),
        (dict(intrinsic=0.1, hamming=1e-4, gamma_i=0.4, gamma_h=9000.0), "--gamma-h", "--gamma-i"),
        (dict(intrinsic=9.0, hamming=1e-4, gamma_i=0.0, gamma_h=9000.0), "--gamma-h", "--gamma-i"),
        (dict(intrinsic=0.1, hamming=9.0, gamma_i=0.4, gamma_h=0.0), "--gamma-i", "--gamma-h"),
    ],
)
def test_a_collapse_names_its_term_and_is_saved_first(tmp_path, monkeypatch, terms, flag, other):
    collapse(monkeypatch, **DEAD, **terms)
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, replace(CONFIG, epochs=5)).run()
    message = str(caught.value)
    assert "collapsed at epoch 2" in message and flag in message and other not in message
    assert len(log(tmp_path)) == 2  # two epochs running, and no third
    assert trainer(tmp_path, replace(CONFIG, epochs=5), resume=True).step == 2 * STEPS
    assert np.isfinite(models.load(tmp_path).weights).all()


@pytest.mark.parametrize("fields", [dict(accuracy=0.9, unstable=0.0), dict(accuracy=1 / 3, unstable=0.01)])
def test_neither_a_stable_network_nor_a_slow_start_is_a_collapse(tmp_path, monkeypatch, fields):
    collapse(monkeypatch, **fields)
    trainer(tmp_path, replace(CONFIG, epochs=3)).run()
    assert len(log(tmp_path)) == 3


def test_one_bad_epoch_is_not_a_collapse_and_a_resume_remembers_the_last(tmp_path, monkeypatch):
    config = replace(CONFIG, epochs=4)
    records = []
    record = Trainer._record

    def every_other(self):
        records.append(None)
        return record(self) | (DEAD if len(records) % 2 else dict(accuracy=0.9, unstable=0.5))

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", every_other)
        trainer(tmp_path / "a", config).run()
    collapse(monkeypatch, **DEAD)
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS)
        with pytest.raises(Interrupted):
            trainer(tmp_path / "b", config).run()
    with pytest.raises(UserError, match="collapsed at epoch 2"):
        trainer(tmp_path / "b", config, resume=True).run()


def kill_relus(run):
    run.model.children["fc1"].params["bias"][...] = -100


@pytest.mark.parametrize(
    ("method", "wrong"), [("standard", "--gamma-[ih]"), ("hamming", "--gamma-i"), ("intrinsic", "--gamma-h")]
)
def test_a_network_that_dies_is_stopped_and_no_term_is_blamed_that_was_not_there(tmp_path, method, wrong):
    run = trainer(tmp_path, replace(CONFIG, method=method, epochs=5))
    kill_relus(run)
    with pytest.raises(UserError, match="collapsed at epoch 2") as caught:
        run.run()
    assert log(tmp_path)[-1]["dead"] == 12
    assert not re.search(wrong, str(caught.value))
