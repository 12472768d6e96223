"""One's own images: what a .npz file must hold, and the three programs on one."""

import json
from pathlib import Path

import numpy as np
import programs
import pytest
from programs import assert_one_error_line

from nanomr import checkpoint, data, models
from nanomr.errors import UserError
from nanomr.programs import attack, train


def images(n, seed=0, shape=(8, 6, 1)):
    """Bright on the left (0), on the right (1) or nowhere (2)."""
    draw = np.random.default_rng(seed)
    x, labels = draw.integers(0, 80, (n, *shape)), draw.integers(0, 3, n)
    for image, label in zip(x, labels, strict=True):
        image[:, [slice(0, 3), slice(3, 6), slice(0, 0)][label]] += 150
    return x.astype(np.uint8), labels


def arrays(n=60, m=20):
    (a, b), (c, d) = images(n), images(m, seed=1)
    return {"train_images": a, "train_labels": b, "test_images": c, "test_labels": d}


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_what_is_in_the_file_is_what_comes_out():
    found = arrays()
    np.savez("mine.npz", **found)
    dataset = data.load("mine.npz")
    for key, value in found.items():
        assert np.array_equal(getattr(dataset, key), value)
    assert dataset.train_images.dtype == np.uint8 and dataset.test_labels.dtype == np.int64
    assert dataset.name == "mine.npz" and dataset.classes == ("0", "1", "2")
    assert dataset.source["file"] == str(Path("mine.npz").absolute()) and len(dataset.source["sha256"]) == 64


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_in_0_1_names_and_one_channel_without_an_axis(kind):
    found = arrays()
    for key in ("train_images", "test_images"):
        found[key] = (found[key][..., 0] / 255).astype(kind)
    np.savez("mine.npz", **found, classes=["left", "right", "none"])
    dataset = data.load("mine.npz")
    assert dataset.train_images.dtype == np.float32 and dataset.train_images.shape == (60, 8, 6, 1)
    assert np.allclose(dataset.train_images[..., 0], found["train_images"]) and dataset.classes[0] == "left"


def test_without_a_test_set_a_fifth_is_one():
    x, labels = images(50)
    np.savez("mine.npz", images=x, labels=labels)
    dataset, again = data.load("mine.npz"), data.load("mine.npz")
    assert len(dataset.test_images) == 10 and len(dataset.train_images) == 40
    both = np.concatenate([dataset.train_images, dataset.test_images])
    assert sorted(i.tobytes() for i in both) == sorted(i.tobytes() for i in x)
    assert np.array_equal(dataset.test_images, again.test_images)
    for image, label in zip(dataset.test_images, dataset.test_labels, strict=True):
        assert label == labels[(x == image).all((1, 2, 3))][0]


def changed(key, change):
    def make(found):
        found[key] = change(found[key])

    return make


def at(where, value):
    def change(array):
        array = array.copy()
        array[where] = value
        return array

    return change


WRONG = {
    "train_images, train_labels": lambda f: f.pop("test_labels"),
    "(N, H, W, C)": changed("train_images", lambda x: x.reshape(60, -1)),
    "not of shape (60, 8, 6, 0)": changed("train_images", lambda x: x[..., :0]),
    "uint8, or floats": changed("train_images", lambda x: x.astype(np.int64)),
    "divide by 255": changed("train_images", lambda x: x.astype(float)),
    "not nan": changed("test_images", lambda x: at(3, np.nan)(x / 255)),
    "one shape": changed("test_images", lambda x: x[:, 1:]),
    "one type": changed("test_images", lambda x: x / 255),
    "60 whole numbers": changed("train_labels", lambda y: y[1:]),
    "20 whole numbers": changed("test_labels", lambda y: y.astype(float)),
    "not -1 to 2": changed("test_labels", at(0, -1)),
    "not 0 to 1000000": changed("train_labels", at(0, 10**6)),
    "each in training": changed("train_labels", lambda y: np.where(y == 1, 0, y)),
    "0 to 3 in the test": changed("test_labels", at(0, 3)),
    "at least two": changed("train_labels", lambda y: 0 * y),
    "classes must be 3 texts": lambda f: f.update(classes=["a", "b"]),
    "Object arrays": lambda f: f.update(train_labels=np.array([{}] * 60)),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_named(words):
    found = arrays()
    WRONG[words](found)
    np.savez("mine.npz", **found)
    with pytest.raises(UserError) as error:
        data.load("mine.npz")
    assert words in str(error.value) and "mine.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04" + bytes(50)], ids=["empty", "text", "cut"])
def test_what_is_no_npz_file_is_refused(content):
    Path("mine.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.npz"):
        data.load("mine.npz")
    with pytest.raises(UserError, match="no such file"):
        data.load("nowhere.npz")
    Path("folder.npz").mkdir()
    with pytest.raises(UserError, match="folder"):
        data.load("folder.npz")


# --- the programs -----------------------------------------------------------------------------------------------------

TRAIN = "--data mine.npz --epochs 2 --batch-size 20 --test-images 10 --device cpu --eps 2/255".split()


@pytest.mark.parametrize("model", ["small", "mlp"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32], ids=["uint8", "float"])
def test_train_attack_and_verify(monkeypatch, capsys, model, kind):
    found = arrays()
    if kind is np.float32:
        found = {k: v / np.float32(255) if k.endswith("images") else v for k, v in found.items()}
    np.savez("mine.npz", **found)
    program = programs.caller(train, monkeypatch, capsys)
    code, out, err = program(*TRAIN, "--model", model)
    assert code == 0, err
    folder = Path(f"runs/{model}-mine-manifold-0")
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["hold_out"] == 6 and config["augment"] is False
    network = models.load(folder)
    assert network.input_shape == (8, 6, 1) and network.forward(np.zeros((1, 8, 6, 1), np.float32))[0].shape == (1, 3)
    assert abs(network.children["normalize"].buffers["mean"] - data.load("mine.npz").train_images.mean() / (
        1 if kind is np.float32 else 255)) < 1e-3  # fmt: skip
    assert program("--resume", folder, "--test-images", 0)[0] == 0

    program = programs.caller(attack, monkeypatch, capsys)
    for name in ("pgd", "autoattack", "wasserstein"):  # --data is what the network was trained on
        flags = ["--weights", folder, "--attack", name, "--quick", "--steps", 3, "--n", 6, "--out", f"a/{name}"]
        if name == "autoattack":  # three classes are too few for apgd-t, which is left out
            assert_one_error_line(program(*flags), "square needs square images", "--stages apgd-ce fab-t")
            assert_one_error_line(program(*flags, "--stages", "apgd-t"), "apgd-t: too few classes (3)")
            flags += ["--stages", "apgd-ce", "fab-t"]
        code, out, err = program(*flags)
        assert code == 0 and "mine.npz" in out, err
        code, out, err = program("--check", f"a/{name}/examples.npz", "--weights", folder)
        assert code == 0, err
    Path("mine.npz").rename("moved.npz")
    assert_one_error_line(program("--check", "a/pgd/examples.npz", "--weights", folder), "mine.npz")
    assert program("--check", "a/pgd/examples.npz", "--weights", folder, "--data", "moved.npz")[0] == 0
    np.savez("moved.npz", **arrays(61))
    assert_one_error_line(
        program("--check", "a/pgd/examples.npz", "--weights", folder, "--data", "moved.npz"), "SHA-256"
    )


def test_verify(monkeypatch, capsys):
    from nanomr.programs import verify

    np.savez("mine.npz", **arrays())
    models.mlp((48, 6, 3), input_shape=(8, 6, 1)).save("net.safetensors", data=str(Path("mine.npz").absolute()))
    with monkeypatch.context() as patch:
        patch.setattr(verify, "make_executor", programs.here("net.safetensors"))
        program = programs.caller(verify, monkeypatch, capsys)
        code, out, err = program("--weights", "net.safetensors", "--n", 6, "--eps", "1/255", "--out", "v")
    assert code == 0 and "mine.npz" in out, err
    assert program("--weights", "net.safetensors", "--check", "v")[0] == 0


def test_what_a_model_does_not_take(monkeypatch, capsys):
    program = programs.caller(train, monkeypatch, capsys)
    np.savez("mine.npz", **arrays())
    assert_one_error_line(program(*TRAIN, "--model", "preact_resnet18"), "square images", "8x6")
    np.savez("mine.npz", **{k: v[:, :3] if k.endswith("images") else v for k, v in arrays().items()})
    assert_one_error_line(program(*TRAIN, "--model", "small"), "4x4", "3x6")
    np.savez("mine.npz", **{k: v / 255 if k.endswith("images") else v for k, v in arrays().items()})
    assert_one_error_line(program(*TRAIN, "--model", "mlp", "--augment"), "--no-augment")
    assert not Path("runs").exists()


def test_a_changed_file_does_not_go_on_with_a_run(monkeypatch, capsys):
    program = programs.caller(train, monkeypatch, capsys)
    np.savez("mine.npz", **arrays())
    assert program(*TRAIN, "--model", "mlp", "--epochs", 1, "--test-images", 0, "--out", "run")[0] == 0
    np.savez("mine.npz", **arrays() | {"test_labels": arrays()["test_labels"][::-1]})
    assert_one_error_line(program("--resume", "run"), "mine.npz", "SHA-256")
    assert checkpoint.read_jsonl("run/log.jsonl")[0]["epoch"] == 1
