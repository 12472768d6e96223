import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanomr import checkpoint
from nanomr.checkpoint import append_jsonl, load_tensors, read_json, read_jsonl, save_tensors, write_atomic, write_json
from nanomr.errors import UserError

TENSORS = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fc.bias": np.array([0.1, -0.2]),
    "steps": np.array(7),
}
META = {"model": "mlp", "sizes": [3, 2]}

arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(st.text(max_size=8), json_values, max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all examples of a property (tmp_path is made once for each test function)."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_tensors(path, TENSORS, META)
    return path


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()  # NaN and -0.0 too


def message(path, read=load_tensors) -> str:
    """The one line with which ``read`` refuses the file."""
    with pytest.raises(UserError) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# Tensors


@given(st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), arrays, max_size=4), records)
def test_tensors_round_trip(folder, tensors, metadata):
    save_tensors(folder / "t.safetensors", tensors, metadata)
    found, found_metadata = load_tensors(folder / "t.safetensors")
    assert_same_bits(found, tensors)
    assert found_metadata == metadata
    assert all(tensor.flags.writeable for tensor in found.values())


@given(arrays, st.data())
def test_views_are_saved_as_what_they_show(folder, tensor, data):
    axes = data.draw(st.permutations(range(tensor.ndim)))
    view = tensor.transpose(axes)[..., ::-1] if tensor.ndim else tensor
    save_tensors(folder / "v.safetensors", {"w": view}, {})
    assert_same_bits(load_tensors(folder / "v.safetensors")[0], {"w": view})


def test_other_tools_read_our_files_and_we_read_theirs(saved, tmp_path):
    assert_same_bits(safetensors.numpy.load_file(saved), TENSORS)
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file(TENSORS, tmp_path / "foreign.safetensors", metadata)
        tensors, found = load_tensors(tmp_path / "foreign.safetensors")
        assert_same_bits(tensors, TENSORS)
        assert found == {}


def test_every_truncation_is_refused(saved, tmp_path):
    whole = saved.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        assert "damaged or cut short" in message(cut), length
    cut.write_bytes(whole + b"x")
    assert "damaged or cut short" in message(cut)


@given(st.data())
def test_a_flipped_header_byte_is_refused_or_harmless(folder, data):
    save_tensors(folder / "flip.safetensors", TENSORS, META)
    raw = bytearray((folder / "flip.safetensors").read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "flip.safetensors").write_bytes(raw)
    try:
        tensors, metadata = load_tensors(folder / "flip.safetensors")
    except UserError:
        return
    assert isinstance(metadata, dict)  # the flip hit a name, a number or our metadata's text, and it still fits
    assert all(isinstance(tensor, np.ndarray) for tensor in tensors.values())


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000], ids=lambda text: text[:4] or "empty")
def test_corrupt_metadata_is_refused(tmp_path, text):
    safetensors.numpy.save_file(TENSORS, tmp_path / "m.safetensors", {"nanomr": text})
    assert "damaged" in message(tmp_path / "m.safetensors")


def raw_file(path, dtype, data):
    """A safetensors file of one tensor "w", written by hand."""
    tensor = {"dtype": dtype, "shape": [len(data) // 2], "data_offsets": [0, len(data)]}
    header = json.dumps({"w": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_bfloat16_comes_as_float32(tmp_path):
    bits = np.array([0x3F80, 0xC049, 0x0001, 0x8000, 0x7F80, 0x7F7F], "<u2")  # 1, -pi, least, -0, infinity, greatest
    w = load_tensors(raw_file(tmp_path / "b.safetensors", "BF16", bits.tobytes()))[0]["w"]
    assert w.dtype == np.float32 and w.tolist() == [1, -3.140625, 2.0**-133, 0, np.inf, 2.0**128 - 2.0**120]
    assert np.signbit(w[3]) and w.flags.writeable


def test_a_dtype_that_numpy_lacks_is_named(tmp_path):
    path = raw_file(tmp_path / "b.safetensors", "F8_E4M3", b"\0\0")
    path.write_bytes(path.read_bytes().replace(b'"shape": [1]', b'"shape": [2]'))
    assert "F8_E4M3 is not supported; convert the tensors to float32" in message(path)


@pytest.mark.parametrize(
    "start", [b"PK\x03\x04\0\0\x08\x08", b"\x80\x02\x8a\nl\xfc\x9cF", b"\x89HDF\r\n", b"<html><body>"]
)
def test_another_format_is_told_where_to_go(tmp_path, start):
    for rest in (b"", bytes(range(100))):
        (tmp_path / "model.pt").write_bytes(start + rest)
        text = message(tmp_path / "model.pt")
        assert "not a safetensors file; a PyTorch .pt or .pth file must be converted: see docs/torch_twin.py" in text


@pytest.mark.parametrize("read", [load_tensors, read_json, read_jsonl])
def test_a_missing_file_and_a_folder_are_told_apart(tmp_path, read):
    assert "no such file" in message(tmp_path / "absent", read)
    assert "is a folder" in message(tmp_path, read)
    (tmp_path / "file").touch()
    assert "cannot read" in message(tmp_path / "file" / "below", read)


# Atomic writes


def test_write_atomic_takes_text_and_bytes_and_replaces(tmp_path):
    for data in (b"old", "α = 1\n", b""):
        write_atomic(tmp_path / "f", data)
        assert (tmp_path / "f").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(tmp_path) == ["f"]


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    write_atomic(tmp_path / "f", b"")
    (tmp_path / "plain").touch()
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_litter(saved, monkeypatch, step, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, step, fail)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            save_tensors(saved, {"other": np.zeros(3)}, {})
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {saved}: No space left on device"
    assert_same_bits(load_tensors(saved)[0], TENSORS)
    assert os.listdir(saved.parent) == [saved.name]


def test_the_data_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_atomic(tmp_path / "f", b"data")
    assert calls[:2] == [4, "replace"]  # not fsync of an empty file whose bytes still sit in Python's buffer
    assert len(calls) == 3  # and the folder, so that the rename lasts


@pytest.mark.parametrize("name", ["absent/f", "file/f", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for write in (write_atomic, append_jsonl):
        data = b"" if write is write_atomic else {}
        assert "cannot write" in message(tmp_path / name, lambda path, write=write, data=data: write(path, data))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_kill_in_the_middle_of_saving_leaves_a_whole_file(tmp_path):
    """Kills a process that saves without pause, at many moments; each file that it leaves must load whole."""
    path = tmp_path / "model.safetensors"
    code = """if True:
        import itertools, sys
        import numpy as np
        from nanomr.checkpoint import append_jsonl, save_tensors
        for i in itertools.count():
            save_tensors(sys.argv[1], {"w": np.full(300_000, i, np.int64)}, {"i": i})
            append_jsonl(sys.argv[2], {"i": i, "pad": "x" * 100_000})
            if i == 0:
                print("saved", flush=True)
    """
    log = tmp_path / "log.jsonl"
    for trial in range(8):
        arguments = [sys.executable, "-c", code, str(path), str(log)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"saved\n"
            time.sleep(0.0037 * (trial + 1))  # the moment of the kill, spread over the work of saving
            child.kill()
        tensors, metadata = load_tensors(path)
        assert tensors["w"].shape == (300_000,)
        assert (tensors["w"] == metadata["i"]).all()
        assert metadata["i"] - read_jsonl(log)[-1]["i"] in (0, 1)


# JSON


@given(records)
def test_json_round_trip(folder, value):
    write_json(folder / "v.json", value)
    assert read_json(folder / "v.json") == value


def test_json_takes_numpy_paths_tuples_and_turns_the_non_finite_into_null(tmp_path):
    value = {
        "loss": np.float32(0.5),
        "bad": [math.nan, -math.inf, np.float64("nan"), np.array([1.0, np.inf])],
        "path": Path("runs"),
        "shape": (np.int64(3), 2),
        "flag": np.True_,
    }
    write_json(tmp_path / "v.json", value)
    text = (tmp_path / "v.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)  # strict: no NaN, no Infinity in the text
    assert found == {"loss": 0.5, "bad": [None, None, None, [1, None]], "path": "runs", "shape": [3, 2], "flag": True}


def test_what_is_not_json_is_a_bug_of_the_caller_and_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "v.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "v.json", {"a": object()})
    assert read_json(tmp_path / "v.json") == {"a": 1}


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "half", "bytes", "deep"])
def test_corrupt_json_is_named(tmp_path, data):
    (tmp_path / "v.json").write_bytes(data)
    assert "not valid JSON" in message(tmp_path / "v.json", read_json)


@given(st.lists(records, max_size=4), records, st.data())
def test_a_log_cut_anywhere_reads_and_goes_on(folder, before, new, data):
    path = folder / "log.jsonl"
    path.unlink(missing_ok=True)
    for record in before:
        append_jsonl(path, record)
    path.touch()
    whole = path.read_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(cut)
    complete = cut.count(b"\n")
    found = read_jsonl(path)
    # A line that lacks nothing but its newline is whole.
    assert found == before[: len(found)]
    assert len(found) == complete + (len(whole) > len(cut) > 0 and whole[len(cut)] == ord("\n"))
    append_jsonl(path, new)
    assert read_jsonl(path) == [*found, new]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b"", b'{"a": "\xff"}'])
@pytest.mark.parametrize("rest", [b'{"epoch": 3}\n{"epo', b""], ids=["earlier", "last"])
def test_a_corrupt_line_that_was_ended_is_named(tmp_path, line, rest):
    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 1}\n' + line + b"\n" + rest)
    assert "line 2 is not a JSON object" in message(tmp_path / "log.jsonl", read_jsonl)


def test_a_line_of_the_log_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    append_jsonl(tmp_path / "log.jsonl", {"epoch": 1, "loss": math.nan})
    assert sizes == [len(b'{"epoch": 1, "loss": null}\n')]


# --- whose folder is it? ----------------------------------------------------------------------------------------------


def test_a_lock_may_be_nested_and_is_given_back(tmp_path):
    with checkpoint.locked(tmp_path), checkpoint.locked(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), checkpoint.locked(tmp_path):
        1 / 0  # noqa: B018
    with checkpoint.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_without_flock_an_open_file_is_the_lock(tmp_path, monkeypatch):
    """As on Windows, where a file that is open cannot be removed, and one that a dead process left can."""
    monkeypatch.setattr(checkpoint, "fcntl", None)
    (tmp_path / ".lock").write_text("left by a dead process")
    with checkpoint.locked(tmp_path), checkpoint.locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())

    def refused(self, missing_ok=False):
        raise PermissionError(13, "in use")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(UserError, match="another process"), checkpoint.locked(tmp_path):
            pass
