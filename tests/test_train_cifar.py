"""The program: its flags, its exit codes, and that a kill costs no more than the work since the last save."""

import hashlib
import json
import os
import random
import re
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import programs
import pytest
from programs import assert_one_error_line

from nanomr import backend, checkpoint, data, models, shapes10, train
from nanomr.methods import METHODS
from nanomr.programs import train as train_cifar
from nanomr.train import Config

# A run of a second or two: 400 images, of which 100 are held out, a small network.
TINY = "--model mlp --hold-out 100 --batch-size 50 --epochs 2 --test-images 20 --device cpu".split()
FOLDER = "runs/mlp-shapes10-manifold-0"


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    programs.isolate(monkeypatch, tmp_path, train=400, test=60)


@pytest.fixture
def program(monkeypatch, capsys):
    return programs.caller(train_cifar, monkeypatch, capsys)


def configuration(out):
    """What the program printed first, and what came after it."""
    return json.JSONDecoder().raw_decode(out)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, stdout) of a finished run."""
    place = tmp_path_factory.mktemp("finished")
    result = start(place, *TINY).communicate(timeout=100)
    return place / FOLDER, result[0]


def start(place, *arguments, **options):
    return programs.start("train", place, *arguments, train=400, test=60, **options)


def test_every_name_in_the_log_is_documented(finished):
    names = set().union(*map(set, checkpoint.read_jsonl(finished[0] / "log.jsonl")))
    names |= {name for method in METHODS.values() for name in method.reports}
    documented = programs.documented("train", "log.jsonl")
    assert names <= documented, names - documented
    rest = {"fgsm", "warning", "ranks", "plain_kernels", "graph", "tiles", "ibp_verified", "ramp"}  # of other runs
    assert documented == names | rest


def test_a_run_leaves_everything_and_says_so(finished):
    folder, out = finished
    files = {"config.json", "last.safetensors", "log.jsonl", "model.safetensors", "test.json"}
    with_plots = files | ({"curves.png"} if "curves.png" in out else set())
    assert {p.name for p in folder.iterdir()} == with_plots
    last = out.strip().split("\n\n")[-1]
    assert all(name in last for name in ("model.safetensors", "log.jsonl", "test.json"))
    assert models.load(folder).architecture["name"] == "mlp"


def test_curves_are_drawn_where_matplotlib_is(finished):
    pytest.importorskip("matplotlib")
    folder, out = finished
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and "curves.png" in out


def test_the_configuration_comes_first_and_is_the_one_that_is_saved(finished):
    folder, out = finished
    printed, end = configuration(out)
    saved = json.loads((folder / "config.json").read_text())
    network = {"architecture": "mlp, 855050 weights"}
    assert printed == {"run": FOLDER, "device": "cpu", **saved["config"], **network}
    assert set(saved["config"]) == set(Config.__dataclass_fields__)
    assert saved["source"]["layout"] == "drawn by nanomr.shapes10"
    assert "epoch" in out[end:]


def test_a_line_an_epoch(finished):
    folder, out = finished
    records = checkpoint.read_jsonl(folder / "log.jsonl")
    assert [r["epoch"] for r in records] == [1, 2]
    assert train.line() in out and max(map(len, out.splitlines())) <= 80, out
    assert all(out.count(train.line(r)) == 1 for r in records)


def test_the_table_is_of_the_test_images_and_is_saved(finished):
    folder, out = finished
    table = json.loads((folder / "test.json").read_text())
    assert table["test_images"] == 60 and table["attacked_images"] == 20 and table["eps"] == 8 / 255
    test_images, test_labels = shapes10.generate(60, shapes10.SEED + 1)
    model = models.load(folder)
    right = model.forward(test_images * np.float32(1 / 255))[0].argmax(1) == test_labels
    assert table["clean"] == right.mean() and table["clean_attacked"] == right[:20].mean()
    assert 0 <= table["pgd20x10"] <= table["clean_attacked"]
    assert f"{table['clean']:.2%}" in out and f"{table['pgd20x10']:.2%}" in out


def test_no_table_without_test_images_and_nothing_is_announced_that_is_not_there(program):
    code, out, _ = program(*TINY, "--test-images", 0, "--epochs", 1)
    assert code == 0 and not Path(FOLDER, "test.json").exists()
    last = out.strip().split("\n\n")[-1]
    for name in re.findall(r"\w+\.(?:jsonl|json|safetensors|png)", last):
        assert Path(FOLDER, name).exists(), name


def test_zero_epochs_train_nothing_and_leave_a_run(program):
    code, out, _ = program(*TINY, "--epochs", 0)
    assert code == 0
    for name in re.findall(r"\w+\.(?:jsonl|json|safetensors|png)", out.strip().split("\n\n")[-1]):
        assert Path(FOLDER, name).exists(), name
    fresh = models.mlp((3072, 256, 256, 10))
    assert np.array_equal(models.load(FOLDER).weights, fresh.weights)
    assert program("--resume", FOLDER, "--test-images", 0)[0] == 0


def test_out_names_the_folder_and_the_seed_the_default(program):
    assert program(*TINY, "--epochs", 1, "--test-images", 0, "--out", "a/b")[0] == 0
    assert Path("a/b/model.safetensors").exists() and not Path("runs").exists()
    arguments = "--epochs 1 --test-images 0 --seed 7 --method standard --train-images 100".split()
    assert program(*TINY, *arguments)[0] == 0
    assert Path("runs/mlp-shapes10-standard-7/model.safetensors").exists()


def test_a_run_begins_with_anothers_weights_and_says_whose(program, finished):
    arguments = (*TINY, "--epochs", 0, "--test-images", 0, "--out", "second", "--init")
    assert program(*arguments, finished[0])[0] == 0
    assert np.array_equal(models.load("second").weights, models.load(finished[0]).weights)
    digest = hashlib.sha256((finished[0] / "last.safetensors").read_bytes()).hexdigest()
    assert json.loads(Path("second/config.json").read_text())["config"]["init"] == digest
    assert program("--resume", "second", "--test-images", 0)[0] == 0  # the other run is not needed any more
    assert_one_error_line(program(*arguments, "nowhere", "--out", "third"), "--init nowhere", "last.safetensors")
    other = ("--model", "small", "--method", "standard", "--out", "fourth")
    assert_one_error_line(program(*arguments, finished[0], *other), "another network")


def test_dead_channels_of_the_weights_it_begins_with_are_revived(program, finished, monkeypatch):
    def revive(model, images, eps, draw):
        assert images.dtype == np.uint8 and len(images) == 300 and eps == 8 / 255
        model.weights[...] = draw.uniform()

    monkeypatch.setattr(train_cifar.certified, "revive", revive)
    arguments = (*TINY, "--epochs", 0, "--test-images", 0, "--revive", "--pad", 1, "--out", "second")
    assert_one_error_line(program(*arguments), "--revive", "--init")
    assert program(*arguments, "--init", finished[0])[0] == 0
    assert len(set(models.load("second").weights.tolist())) == 1
    config = json.loads(Path("second/config.json").read_text())["config"]
    assert config["revive"] is True and config["pad"] == 1


@pytest.mark.parametrize("columns", [200, 80, 60, 30, 1])
def test_rows_fit_the_terminal(finished, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    (record, *_) = checkpoint.read_jsonl(finished[0] / "log.jsonl")
    head, row = train.line(), train.line(record)
    assert len(head) == len(row) <= max(columns, 5) and head.split()[0] == "epoch" and row.split()[0] == "1"
    assert columns < 80 or head.split()[-1] == "img/s"


# --- flags ------------------------------------------------------------------------------------------------------------


def configure(*arguments, device="cpu"):
    args = train_cifar.parser().parse_args(list(map(str, arguments)))
    return train_cifar.configure(args, device, data.load("shapes10"))


def test_the_defaults_depend_on_the_device_and_the_model_and_flags_go_before_them():
    assert configure().architecture["name"] == "small_cnn"
    assert configure(device="gpu").architecture["name"] == "preact_resnet18"
    assert configure("--model", "small", device="gpu").architecture["name"] == "small_cnn"
    for key, values in train_cifar.DEFAULTS.items():
        model, _, data = key.partition(" on ")
        config = asdict(configure("--model", model, "--data", data or "cifar10"))
        assert {k: config[k] for k in values} == values
        assert configure("--model", model, "--gamma-h", 0, "--lr", 0.5, "--clip", 0).gamma_h == 0
        assert configure("--model", model, "--gamma-h", 0, "--lr", 0.5, "--clip", 0).lr == 0.5
        assert configure("--model", model, "--gamma-h", 0, "--lr", 0.5, "--clip", 0).clip == 0
    assert configure().epochs == 30 and configure("--data", "cifar10").epochs == 100
    assert configure("--epochs", 0).epochs == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--eps 2/255 --eps-start 1/255", dict(eps=2 / 255, eps_start=1 / 255)),
        ("--eps 0.1", dict(eps=0.1)),
        ("--weight-decay 1/1000 --momentum 1/2 --lr 1/40", dict(weight_decay=1 / 1000, momentum=0.5, lr=0.025)),
        ("--gamma-i 3/4 --gamma-h 1e4", dict(gamma_i=0.75, gamma_h=1e4)),
        ("--gamma-factor 2 --alpha 5", dict(gamma_factor=2, alpha=5)),
        ("--hamming-norm sample --method hamming", dict(hamming_norm="sample", method="hamming")),
        ("--hold-out 0 --train-images 9 --batch-size 3", dict(hold_out=0, train_images=9, batch_size=3)),
        ("--no-augment --seed 5 --epochs 7", dict(augment=False, seed=5, epochs=7)),
        ("--clip 2", dict(clip=2)),
    ],
)
def test_every_flag_reaches_the_configuration(arguments, expected):
    config = asdict(configure(*arguments.split()))
    default = asdict(configure())
    assert {k: v for k, v in config.items() if v != default[k]} == expected


def test_the_data_set_decides_some_defaults():
    cifar10, shapes10 = configure("--data", "cifar10"), configure("--data", "shapes10")
    assert (cifar10.data, cifar10.epochs, cifar10.hold_out) == ("cifar10", 100, 5000)
    assert (shapes10.data, shapes10.epochs, shapes10.hold_out) == ("shapes10", 30, 2000)


def test_the_networks_variants_are_flags():
    assert configure("--kernel", 5).architecture == models.small_cnn(kernel=5).architecture
    jin = configure("--model", "preact_resnet18", "--jin-v1").architecture
    assert jin == models.preact_resnet18(jin_v1=True).architecture
    assert [layer.get("out_features") for layer in configure("--model", "mlp").architecture["layers"].values()] == [
        None, None, 256, None, 256, None, 10,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    (
        *("--jin-v1", "--width 8", "--model mlp --kernel 5", "--model preact_resnet18 --kernel 4"),
        *("--model mlp --no-batch-norm", "--model preact_resnet18 --batch-norm", "--model mlp --ramp-from 0.9"),
    ),
)
def test_flags_that_the_model_or_recipe_has_no_use_for_are_refused(program, flags):
    flag = next(word for word in flags.split() if word.startswith("--") and word != "--model").replace("no-", "")
    code, _, err = program("--hold-out", 100, "--batch-size", 50, *flags.split())
    assert_one_error_line((code, "", err), flag, "leave it out")
    assert not Path("runs").exists()


@pytest.mark.parametrize("flag", ["--gamma-i", "--gamma-h"])
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].corners])
def test_the_papers_weights_are_for_the_papers_methods(program, method, flag):
    words = ["--constant"] if method in ("worst-corner", "ibp-manifold") else ["leave"]
    assert_one_error_line(program("--method", method, flag, 5), flag, *words)
    assert not Path("runs").exists()


def test_help_explains_every_flag(program):
    programs.assert_help_explains_every_flag(train_cifar, program)


BAD_FLAGS = """--eps -1|--eps 2|--eps nan|--eps 8/0|--eps-start=-1/255|--batch-size 0|--batch-size -5|--batch-size 1.5
--epochs -3|--epochs x|--lr nan|--lr inf|--lr -0.1|--momentum 1.5|--weight-decay -1|--clip -1|--gamma-i -1
--gamma-h inf|--gamma-factor -2|--alpha -8|--seed -1|--seed x|--hold-out -1|--train-images -1|--test-images -1
--model vgg|--method adversarial|--data mnist|--device tpu|--kernel 3|--hamming-norm l1|--nonsense|stray"""


@pytest.mark.parametrize("flags", BAD_FLAGS.replace("\n", "|").split("|"))
def test_a_bad_flag_is_named_and_nothing_is_made(program, flags, tmp_path):
    programs.assert_refused(train_cifar, program(*TINY, *flags.split()), flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30])
def test_a_large_seed_works_or_is_refused_in_one_line(program, seed):
    code, _, err = program(*TINY, "--epochs", 0, "--test-images", 0, "--seed", seed)
    assert code == 0 or (code == 2 and str(seed) in err.strip().splitlines()[-1])
    assert "Traceback" not in err


def test_no_two_seeds_are_the_same():
    weights = []
    for seed in (0, 1, 2**32, 2**53, 2**53 + 1, 2**63 - 1):
        weights.append(models.mlp((48, 2), seed=seed, input_shape=(4, 4, 3)).weights.tobytes())
    assert len(set(weights)) == len(weights)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_images_that_do_not_suffice(program):
    assert_one_error_line(program(*TINY, "--hold-out", 400), "hold out 400 of 400")
    assert_one_error_line(program(*TINY, "--batch-size", 301), "--batch-size 301", "300 training images")
    assert_one_error_line(program(*TINY, "--train-images", 20), "--batch-size 50", "20 training images")
    assert not Path("runs").exists()


def test_missing_data(program, tmp_path):
    arguments = (*TINY, "--data", "cifar10", "--no-download")
    assert_one_error_line(program(*arguments), "cifar-10-batches-bin", "--data shapes10")
    assert_one_error_line(program(*arguments, "--data-dir", "nowhere"), "nowhere")
    assert not Path("runs").exists() and not Path("nowhere").exists()


def test_truncated_data(program, tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in data.BIN_FILES:
        (folder / name).write_bytes(bytes(3073))
    err = assert_one_error_line(program(*TINY, "--data", "cifar10", "--data-dir", tmp_path), "data_batch_1.bin", "3073")
    assert "replace" in err and not Path("runs").exists()


def test_no_gpu(program, monkeypatch):
    monkeypatch.setattr(backend, "find_cupy", lambda: None)
    assert_one_error_line(program(*TINY, "--device", "gpu"), "--device gpu", "--device cpu")
    assert not Path("runs").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "/dev/null/run", "/proc/run"])
def test_a_run_folder_that_cannot_be_made(program, out):
    Path("file").write_text("mine")
    assert_one_error_line(program(*TINY, "--out", out), out)
    assert Path("file").read_text() == "mine"


def test_an_existing_run_is_not_overwritten(program, finished, tmp_path):
    folder = copy_run(finished, tmp_path)
    before = snapshot(folder)
    err = assert_one_error_line(program(*TINY, "--seed", 0), FOLDER, "--resume", "--out")
    assert f"--resume {FOLDER}" in err and snapshot(folder) == before
    assert_one_error_line(program(*TINY, "--out", folder, "--lr", 1), "--resume")
    assert snapshot(folder) == before


def copy_run(finished, place):
    folder = place / FOLDER
    folder.mkdir(parents=True)
    for name, content in snapshot(finished[0]).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_missing_run_cannot_be_resumed(program):
    assert_one_error_line(program("--resume", "nowhere"), "nowhere")
    Path("file").write_text("")
    assert_one_error_line(program("--resume", "file"), "file")
    Path("empty").mkdir()
    assert_one_error_line(program("--resume", "empty"), "empty")
    assert not list(Path("empty").iterdir()) and not Path("nowhere").exists()


FOREIGN = {
    "not json": "nonsense", "cut": '{"config": {"archi', "a list": "[]", "a number": "3", "no config": "{}",
    "null": '{"config": null}', "another program's": '{"config": {"learning_rate": 0.1}}',
    "a list in it": '{"config": []}', "empty config": '{"config": {}}', "binary": "\x00\x01",
}  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_or_damaged_configuration(program, finished, tmp_path, text):
    folder = copy_run(finished, tmp_path)
    (folder / "config.json").write_text(text)
    before = snapshot(folder)
    assert_one_error_line(program("--resume", FOLDER, "--test-images", 0), "config.json")
    assert snapshot(folder) == before


CHANGES = [
    ("lr", 0.5), ("lr", "fast"), ("lr", None), ("data", "mnist"), ("method", "nonsense"), ("epochs", "20"),
    ("batch_size", 301), ("architecture", {"name": "vgg"}), ("architecture", {"name": "mlp", "depth": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CHANGES, ids=str)
def test_a_changed_configuration(program, finished, tmp_path, key, value):
    folder = copy_run(finished, tmp_path)
    saved = json.loads((folder / "config.json").read_text())
    saved["config"][key] = value
    (folder / "config.json").write_text(json.dumps(saved))
    before = snapshot(folder)
    assert_one_error_line(program("--resume", FOLDER, "--test-images", 0))
    assert snapshot(folder) == before


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "pickle", "another network"])
def test_a_damaged_or_wrong_checkpoint(program, finished, tmp_path, damage):
    folder = copy_run(finished, tmp_path)
    path = folder / "last.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "another network":
        _, metadata = checkpoint.load_tensors(path)
        state = models.small_cnn(hidden=8).state_dict()
        velocity = np.zeros(sum(v.size for k, v in state.items() if not k.startswith("normalize")), np.float32)
        checkpoint.save_tensors(path, state | {"optimizer.velocity": velocity}, metadata)
    else:
        path.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2], "pickle": b"\x80\x04\x95" + bytes(99)}[damage]
        )
    before = snapshot(folder)
    assert_one_error_line(program("--resume", FOLDER, "--test-images", 0))
    assert snapshot(folder) == before


def test_nan_stops_with_one_line_and_code_2(tmp_path):
    """Warnings included: NumPy's overflows on the way to NaN are no news to the user."""
    process = start(tmp_path, *TINY, "--lr", "1e9", "--epochs", 3, "--method", "standard", "--clip", 0)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "NaN" in err and "--lr" in err
    printed, _ = configuration(out)
    assert printed["lr"] == 1e9


def test_collapse_stops_with_one_line_and_code_2(program, monkeypatch):
    record = train.Trainer._record
    changes = dict(accuracy=0.1, unstable=0.0, gamma_h=1.0, hamming=9.0)
    monkeypatch.setattr(train.Trainer, "_record", lambda self: record(self) | changes)
    assert_one_error_line(program(*TINY, "--epochs", 4), "collapsed at epoch 2", "Hamming", "--gamma-h")
    assert len(checkpoint.read_jsonl(Path(FOLDER, "log.jsonl"))) == 2
    assert models.load(FOLDER).architecture["name"] == "mlp"


def test_a_full_disk_stops_with_one_line_and_keeps_the_last_save(program, monkeypatch):
    replace, names = os.replace, []

    def full(source, target):
        names.append(Path(target).name)
        if names.count("last.safetensors") == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert_one_error_line(program(*TINY), "No space left on device", "last.safetensors")
    assert program("--resume", FOLDER, "--test-images", 0)[0] == 0
    assert [r["epoch"] for r in checkpoint.read_jsonl(Path(FOLDER, "log.jsonl"))] == [1, 2]


# --- stop and go on ---------------------------------------------------------------------------------------------------


def outcome(folder):
    """What two equal runs agree on."""
    log = [
        {k: v for k, v in r.items() if k not in ("images_per_s", "seconds")}
        for r in checkpoint.read_jsonl(folder / "log.jsonl")
    ]
    return log, *((folder / name).read_bytes() for name in ("model.safetensors", "last.safetensors", "config.json"))


def assert_same(folder, other):
    for found, expected in zip(outcome(folder), outcome(other), strict=True):
        assert found == expected


def go_on(place, *arguments):
    process = start(place, "--resume", FOLDER, "--test-images", 0, *arguments)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out


# SAVE_EVERY and CHECK_EVERY: also within the epochs. The step is slowed so that the moment hits anything.
SAVES = "train.SAVE_EVERY = -1; train.CHECK_EVERY = 1"


@pytest.fixture(scope="module")
def seed():
    return random.Random(int(os.environ.get("NANOMR_KILL_SEED", "0")))


@pytest.mark.parametrize("attempt", range(2))
def test_killed_at_any_moment_and_resumed_equals_the_straight_run(finished, tmp_path, seed, attempt):
    process = start(tmp_path, *TINY, patches=SAVES)
    path = tmp_path / FOLDER / "last.safetensors"
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    time.sleep(seed.uniform(0, 0.3))
    process.kill()
    process.communicate()
    models.load(path)  # whole
    out = go_on(tmp_path)
    assert_same(tmp_path / FOLDER, finished[0])
    assert configuration(out)[0] == configuration(finished[1])[0]


def signal_at(step, number):
    """A patch: the program sends itself this signal in this step."""
    return (
        "\nimport os\nplain = train.Trainer.train_step\n"
        f"def stopped(self):\n    if self.step == {step}: os.kill(os.getpid(), {int(number)})\n    return plain(self)\n"
        "train.Trainer.train_step = stopped\n"
    )


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 2), (signal.SIGTERM, 8)])
def test_ctrl_c_and_sigterm_save_say_how_to_go_on_and_exit_with_130(finished, tmp_path, number, step):
    process = start(tmp_path, *TINY, patches=signal_at(step, number))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err, err
    last = out.strip().split("\n\n")[-1]
    assert f"--resume {FOLDER}" in last and f"{step + 1} of 12 steps" in last
    go_on(tmp_path)
    assert_same(tmp_path / FOLDER, finished[0])


def test_a_finished_run_is_resumed_without_a_step_and_gets_its_table(program, finished, tmp_path, monkeypatch):
    folder = copy_run(finished, tmp_path)
    (folder / "test.json").unlink()
    monkeypatch.setattr(train.Trainer, "train_step", lambda self: pytest.fail("a step of a finished run"))
    code, out, _ = program("--resume", FOLDER, "--test-images", 20, "--device", "cpu")
    assert code == 0 and configuration(out)[0]["run"] == FOLDER
    assert (folder / "log.jsonl").read_bytes() == (finished[0] / "log.jsonl").read_bytes()
    assert_same(folder, finished[0])
    assert json.loads((folder / "test.json").read_text())["attacked_images"] == 20


@pytest.mark.parametrize(
    "flags", ["--lr 3", "--data cifar10", "--out elsewhere --seed 0", "--no-augment", "--model mlp"]
)
def test_flags_that_resume_would_not_heed_are_refused(program, finished, tmp_path, flags):
    folder = copy_run(finished, tmp_path)
    before = snapshot(folder)
    flag = next(word for word in flags.split() if word.startswith("--")).replace("no-", "")
    assert_one_error_line(program("--resume", FOLDER, "--test-images", 0, *flags.split()), "leave out", flag)
    assert snapshot(folder) == before and not Path("elsewhere").exists()


def damage_state(change):
    def damage(folder):
        tensors, metadata = checkpoint.load_tensors(folder / "last.safetensors")
        change(metadata["state"], tensors)
        checkpoint.save_tensors(folder / "last.safetensors", tensors, metadata)

    return damage


def replace(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def edit_log(change):
    def damage(folder):
        records = checkpoint.read_jsonl(folder / "log.jsonl")
        change(records[0])
        checkpoint.write_jsonl(folder / "log.jsonl", records)

    return damage


def edit_config(key, value):
    def damage(folder):
        for_all = json.loads((folder / "config.json").read_text())
        for_all["config"][key] = value
        (folder / "config.json").write_text(json.dumps(for_all))
        tensors, metadata = checkpoint.load_tensors(folder / "last.safetensors")
        metadata["config"][key] = value
        checkpoint.save_tensors(folder / "last.safetensors", tensors, metadata)

    return damage


DAMAGE = {
    "no step": damage_state(lambda s, t: s.pop("step")),
    "a step of text": damage_state(lambda s, t: s.update(step="3")),
    "a step below zero": damage_state(lambda s, t: s.update(step=-1)),
    "a step beyond the end": damage_state(lambda s, t: s.update(step=10**9)),
    "half a step": damage_state(lambda s, t: s.update(step=1.5)),
    "four totals": damage_state(lambda s, t: s.update(totals=[0.0] * 4)),
    "a total that is none": damage_state(lambda s, t: s.update(totals=[None] * 5)),
    "no seconds": damage_state(lambda s, t: s.update(seconds=None)),
    "weights of NaN": damage_state(lambda s, t: t["fc1.weight"].__setitem__((0, 0), np.nan)),
    "momentum of infinity": damage_state(lambda s, t: t["optimizer.velocity"].__setitem__(3, np.inf)),
    "a pipe for the log": replace("log.jsonl", os.mkfifo),
    "a folder for the log": replace("log.jsonl", os.mkdir),
    "a pipe for the state": replace("last.safetensors", os.mkfifo),
    "a pipe for the configuration": replace("config.json", os.mkfifo),
    "a folder for the configuration": replace("config.json", os.mkdir),
    "a line without an epoch": edit_log(lambda r: r.pop("epoch")),
    "an epoch of text": edit_log(lambda r: r.update(epoch="1")),
    "no gamma": edit_log(lambda r: r.update(gamma_i=None)),
    "a method of another version": edit_config("method", "magic"),
    "a learning rate of text": edit_config("lr", "0.1"),
    "a flag of text": edit_config("augment", "yes"),
    "a batch of half an image": edit_config("batch_size", 0.5),
    "no batch": edit_config("batch_size", 0),
    "epochs below zero": edit_config("epochs", -3),
    "an architecture of text": edit_config("architecture", "mlp"),
    "data of a number": edit_config("data", 7),
    "true for a seed": edit_config("seed", True),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_one_line_and_code_2(program, finished, tmp_path, damage):
    """No traceback, no waiting for somebody to write to a pipe, and the learning rate is not to blame."""
    folder = copy_run(finished, tmp_path)
    damage(folder)
    err = assert_one_error_line(program("--resume", FOLDER, "--test-images", 0))
    assert "lower --lr" not in err


def test_a_folder_is_one_processs(program, finished, tmp_path):
    folder = copy_run(finished, tmp_path)
    before = snapshot(folder)
    with programs.another_process_in(FOLDER):
        assert_one_error_line(program("--resume", FOLDER, "--test-images", 0), "another process", FOLDER)
        assert snapshot(folder) == before
    assert program("--resume", FOLDER, "--test-images", 0)[0] == 0


def test_a_run_killed_before_its_first_save_can_be_started_again_or_resumed(program, finished, tmp_path):
    """The line of epoch 1 is on the disk, its checkpoint is not."""
    for arguments in (TINY, ["--resume", FOLDER]):
        folder = tmp_path / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        (folder / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
        first = (finished[0] / "log.jsonl").read_bytes().splitlines(keepends=True)[0]
        (folder / "log.jsonl").write_bytes(first)
        code, _, err = program(*arguments, "--test-images", 0)
        if code == 2:  # then it must say what to do, and lose nothing
            assert "Traceback" not in err and err.count("\n") == 1
            assert (folder / "log.jsonl").read_bytes() == first
            assert "last.safetensors" in err
        else:
            assert code == 0
            assert [r["epoch"] for r in checkpoint.read_jsonl(folder / "log.jsonl")] == [1, 2]


def test_a_closing_table_of_answers_that_are_not_finite_is_one_line(program, monkeypatch):
    """Not 10 % robust: a network that answers NaN has no accuracy at all."""
    monkeypatch.setattr(train.Trainer, "run", lambda self: (self.open_folder(), _broken(self.model))[1])
    monkeypatch.setattr(train.Trainer, "plot", lambda self: None)
    assert_one_error_line(program(*TINY), "logits are NaN or infinite for")
    assert not Path(FOLDER, "test.json").exists()


def _broken(model):
    model.weights *= 1e20
    return model


def test_eps_without_255_is_asked_about(program):
    for flag in ("--eps", "--eps-start"):
        code, _, err = program(*TINY, flag, "8")
        assert code == 2 and flag in err and "did you mean 8/255?" in err.splitlines()[-1]
    assert "warning: a linf radius of 0.6: " in program(*TINY, "--eps", "0.6", "--epochs", 0, "--test-images", 0)[2]
