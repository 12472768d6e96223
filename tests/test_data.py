"""nanomr.data: files on disk, the download from a local server, and everything that can go wrong with either."""

import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nanomr import data
from nanomr.errors import UserError

RECORDS = 3  # in each tiny file
META = "\n".join(data.CIFAR10_CLASSES) + "\n"


@pytest.fixture(autouse=True)
def _no_outside(monkeypatch, tmp_path):
    """No test sees the user's cache, data folder or proxy, or can reach the real server by mistake."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NANOMR_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "TIMEOUT", 5.0)


def tiny_files(seed=0) -> dict[str, bytes]:
    """The seven files, with RECORDS random records in each .bin file."""
    rng = np.random.default_rng(seed)
    files = {data.META_FILE: META.encode()}
    for name in data.BIN_FILES:
        raw = rng.integers(0, 256, (RECORDS, 3073), dtype=np.uint8)
        raw[:, 0] %= 10
        files[name] = raw.tobytes()
    return files


def write_folder(folder: Path, seed=0) -> Path:
    folder.mkdir(parents=True)
    for name, content in tiny_files(seed).items():
        (folder / name).write_bytes(content)
    return folder


def read(data_dir=None, **options):
    return data.load_cifar10(data_dir, **{"download": False, "progress": False, "records": RECORDS} | options)


def assert_is_seed(dataset, seed):
    assert dataset.test_images[0, 0, 0, 0] == tiny_files(seed)["test_batch.bin"][1]
    assert dataset.source["sha256"] == {k: hashlib.sha256(v).hexdigest() for k, v in tiny_files(seed).items()}


def fails(match, call, *args, **options):
    """``call`` raises a UserError of one line that matches; the message."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- files on disk


def test_every_pixel_is_where_the_format_says(tmp_path):
    dataset = read(write_folder(tmp_path / data.FOLDER).parent)
    assert (dataset.name, dataset.classes) == ("cifar10", data.CIFAR10_CLASSES)
    for images, labels, names in [
        (dataset.train_images, dataset.train_labels, data.TRAIN_FILES),
        (dataset.test_images, dataset.test_labels, [data.TEST_FILE]),
    ]:
        content = b"".join(tiny_files()[name] for name in names)
        count = len(names) * RECORDS
        assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
        assert labels.shape == (count,) and labels.dtype == np.int64
        for n in range(count):
            assert labels[n] == content[n * 3073]
            for i, j, c in np.ndindex(32, 32, 3):
                assert images[n, i, j, c] == content[n * 3073 + 1 + c * 1024 + i * 32 + j]


def test_the_source_is_honest_and_names_no_path(tmp_path):
    dataset = read(write_folder(tmp_path / data.FOLDER))
    assert dataset.source["layout"] == data.FOLDER and dataset.source["verified"] is False
    assert_is_seed(dataset, 0)
    assert str(tmp_path) not in json.dumps(dataset.source)


def test_search_order(tmp_path, monkeypatch):
    cache = write_folder(tmp_path / "cache" / "nanomr" / data.FOLDER, seed=1)
    assert_is_seed(read(), 1)
    write_folder(tmp_path / "env" / data.FOLDER, seed=2)
    monkeypatch.setenv("NANOMR_DATA", str(tmp_path / "env"))
    assert_is_seed(read(), 2)
    write_folder(tmp_path / "mine" / data.FOLDER, seed=3)
    assert_is_seed(read(tmp_path / "mine"), 3)
    assert_is_seed(read(str(tmp_path / "mine" / data.FOLDER)), 3)
    assert_is_seed(read(cache.rename(tmp_path / "another name")), 1)
    assert_is_seed(read(tmp_path / "nothing here"), 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_is_seed(read("~/mine"), 3)


def test_the_cache_defaults_to_dot_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / ".cache" / "nanomr" / data.FOLDER, seed=4)
    assert_is_seed(read(), 4)


def test_found_nowhere_names_the_places_and_a_way_out(tmp_path):
    message = fails("no cifar-10-batches-bin", read, tmp_path / "mine")
    assert str(tmp_path / "mine" / data.FOLDER) in message and str(tmp_path / "cache") in message
    assert "--data shapes10" in message


@pytest.mark.parametrize("name", [*data.BIN_FILES, data.META_FILE])
def test_a_missing_file_is_named(tmp_path, name):
    (write_folder(tmp_path / data.FOLDER) / name).unlink()
    fails(name, read, tmp_path)


@pytest.mark.parametrize("change", [-1, +1, 3073])
def test_a_file_of_the_wrong_size_is_named_with_both_sizes(tmp_path, change):
    path = write_folder(tmp_path / data.FOLDER) / "data_batch_4.bin"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    fails(rf"data_batch_4\.bin has {RECORDS * 3073 + change} bytes, not {RECORDS * 3073}", read, tmp_path)


def test_a_label_above_9_is_named_with_its_record(tmp_path):
    path = write_folder(tmp_path / data.FOLDER) / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[2 * 3073] = 10
    path.write_bytes(content)
    fails(r"data_batch_2\.bin: record 2 has label 10", read, tmp_path)


def test_other_class_names_are_refused(tmp_path):
    (write_folder(tmp_path / data.FOLDER) / data.META_FILE).write_text(META.replace("cat", "cow"))
    fails("batches.meta.txt does not name", read, tmp_path)


def test_class_names_may_lack_the_last_newline(tmp_path):
    (write_folder(tmp_path / data.FOLDER) / data.META_FILE).write_text(META.rstrip())
    read(tmp_path)


def test_hold_out_takes_the_last_images_and_copies_nothing(tmp_path):
    dataset = read(write_folder(tmp_path / data.FOLDER))
    train, train_labels, held, held_labels = dataset.hold_out(4)
    assert len(train) == len(train_labels) == 5 * RECORDS - 4 and len(held) == len(held_labels) == 4
    assert np.array_equal(np.concatenate([train, held]), dataset.train_images)
    assert np.array_equal(np.concatenate([train_labels, held_labels]), dataset.train_labels)
    assert np.shares_memory(train, dataset.train_images) and np.shares_memory(held, dataset.train_images)
    assert len(dataset.hold_out(0)[0]) == 5 * RECORDS and len(dataset.hold_out(0)[2]) == 0
    for n in (-1, 5 * RECORDS):
        fails(f"cannot hold out {n} of {5 * RECORDS}", dataset.hold_out, n)


def test_load_chooses_by_name(tmp_path, monkeypatch):
    for size, number in (("TRAIN", 30), ("TEST", 20)):
        monkeypatch.setattr(data.shapes10, size, number)
    dataset = data.load()
    assert (dataset.name, dataset.classes) == ("shapes10", data.shapes10.CLASSES)
    assert dataset.train_images.shape == (30, 32, 32, 3) and dataset.test_labels.shape == (20,)
    assert not np.array_equal(dataset.train_images[:20], dataset.test_images)  # not the same stream
    assert json.loads(json.dumps(dataset.source)) == dataset.source
    assert (dataset.source["train"], dataset.source["test"], dataset.source["seed"]) == (30, 20, 0)
    fails("no cifar-10-batches-bin", data.load, "cifar10", tmp_path, download=False)
    fails("'mnist': use --data shapes10, --data cifar10 or --data FILE.npz", data.load, "mnist")


# ---------------------------------------------------------------- the download


def archive_of(files: dict[str, bytes], extra=()) -> bytes:
    """A .tar.gz in the official layout, with ``extra`` TarInfo objects at its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        top = tarfile.TarInfo(data.FOLDER)
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
        for name, content in files.items():
            info = tarfile.TarInfo(f"{data.FOLDER}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


@pytest.fixture
def server():
    """A server on 127.0.0.1 that answers with ``server.body``; ``server.mode`` makes it misbehave."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            if self.server.mode == "404":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            half = self.server.body[: len(self.server.body) // 2]
            self.wfile.write(self.server.body if self.server.mode == "good" else half)
            self.wfile.flush()
            if self.server.mode == "stall":
                self.server.release.wait(20)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.requests, httpd.mode, httpd.release = 0, "good", threading.Event()
        httpd.body = archive_of({**tiny_files(), "readme.html": b"<html>"})
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.release.set()
        httpd.shutdown()
        thread.join()


def fetch(server, data_dir=None, **options):
    facts = {"size": len(server.body), "md5": hashlib.md5(server.body).hexdigest()}
    url = f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
    return read(data_dir, **{"download": True, "url": url} | facts | options)


def fails_and_leaves_nothing(match, server, data_dir, **options):
    message = fails(match, fetch, server, data_dir, **options)
    assert str(data_dir / data.FOLDER) in message and "--data shapes10" in message
    assert not data_dir.exists() or list(data_dir.iterdir()) == []
    fails("no cifar-10-batches-bin", read, data_dir)


def test_a_download_is_verified_kept_and_used_again(server, tmp_path, capfd):
    dataset = fetch(server, tmp_path / "new" / "place")
    assert_is_seed(dataset, 0)
    assert dataset.source["verified"] is True
    assert sorted(p.name for p in (tmp_path / "new" / "place").iterdir()) == [data.FOLDER]
    requests = server.requests
    assert fetch(server, tmp_path / "new" / "place").source == dataset.source
    assert server.requests == requests  # found, not downloaded again
    assert capfd.readouterr().err == ""  # progress=False is silent


def test_without_data_dir_a_download_goes_to_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOMR_DATA", str(tmp_path / "env"))
    fetch(server)
    assert (tmp_path / "cache" / "nanomr" / data.FOLDER).is_dir() and not (tmp_path / "env").exists()


def test_data_dir_may_be_the_folder_to_make(server, tmp_path):
    fetch(server, tmp_path / data.FOLDER)
    assert [p.name for p in tmp_path.iterdir()] == [data.FOLDER]
    assert (tmp_path / data.FOLDER / data.TEST_FILE).is_file()


def test_changed_files_are_no_longer_verified(server, tmp_path):
    fetch(server, tmp_path)
    path = tmp_path / data.FOLDER / "data_batch_1.bin"
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    assert fetch(server, tmp_path).source["verified"] is False


def test_only_the_official_md5_counts_as_verified(server, tmp_path):
    fetch(server, tmp_path)
    assert read(tmp_path).source["verified"] is False  # read() asks for the official one, the archive had another
    (tmp_path / data.FOLDER / data.MARKER).write_text("{broken")
    assert fetch(server, tmp_path).source["verified"] is False


def test_the_progress_bar_counts_bytes(server, tmp_path, capfd):
    fetch(server, tmp_path, progress=True)
    assert "CIFAR-10: 100%" in capfd.readouterr().err


def test_a_wrong_hash_installs_nothing(server, tmp_path):
    good = hashlib.md5(server.body).hexdigest()
    server.body = server.body[:-1] + bytes([server.body[-1] ^ 1])
    fails_and_leaves_nothing(f"has md5 .*, not {good}", server, tmp_path / "d", md5=good)


def test_a_truncated_archive_installs_nothing(server, tmp_path):
    whole = len(server.body)
    server.body = server.body[:-100]
    fails_and_leaves_nothing(f"sent only {whole - 100} of {whole} bytes", server, tmp_path / "d", size=whole)


def test_too_long_an_archive_installs_nothing(server, tmp_path):
    whole = len(server.body)
    server.body += b"x"
    fails_and_leaves_nothing(f"sent more than {whole} bytes", server, tmp_path / "d", size=whole)


def test_an_endless_answer_is_cut_off(server, tmp_path, monkeypatch):
    answer = iter([b"x" * 1000] * 1000)
    monkeypatch.setattr(data, "_chunks", lambda url: answer)
    fails_and_leaves_nothing("sent more than", server, tmp_path / "d")
    assert len(list(answer)) > 1000 - len(server.body) // 1000 - 2  # the rest was not asked for


def test_the_finished_folder_appears_by_one_rename(server, tmp_path, monkeypatch):
    seen, rename = [], Path.rename

    def watched(source, target):
        seen.append(({p.name for p in source.iterdir()}, Path(target)))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", watched)
    fetch(server, tmp_path)
    assert seen == [({*data.BIN_FILES, data.META_FILE, data.MARKER, "readme.html"}, tmp_path / data.FOLDER)]


def test_a_server_that_goes_away_half_way(server, tmp_path):
    server.mode = "half"
    half, whole = len(server.body) // 2, len(server.body)
    fails_and_leaves_nothing(rf"only {half} of {whole} bytes|IncompleteRead", server, tmp_path / "d")


def test_a_server_that_stalls(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    server.mode = "stall"
    start = time.monotonic()
    fails_and_leaves_nothing(r"nothing came for 0\.3 s", server, tmp_path / "d")
    assert time.monotonic() - start < 4


def test_an_http_error(server, tmp_path):
    server.mode = "404"
    fails_and_leaves_nothing("the server answers 404", server, tmp_path / "d")


def test_a_refused_connection(server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        fails_and_leaves_nothing("cannot download .*refused", server, tmp_path / "d", url=url)


def test_no_network(server, tmp_path, monkeypatch):
    def no_name(*args, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    fails_and_leaves_nothing("cannot download .*name resolution", server, tmp_path / "d")


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    fails("cannot store CIFAR-10 in .*file", fetch, server, tmp_path / "file" / "d")


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member(f"{data.FOLDER}/../../evil"),
        member("/tmp/nanomr-evil"),
        member(f"{data.FOLDER}/evil"),
        member(f"{data.FOLDER}/readme.html", tarfile.SYMTYPE, "/etc/passwd"),
        member(f"{data.FOLDER}/{data.META_FILE}", tarfile.LNKTYPE, f"{data.FOLDER}/{data.TEST_FILE}"),
        member(data.FOLDER, tarfile.SYMTYPE, "/tmp"),
        member(f"{data.FOLDER}/readme.html", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name} {info.type.decode()}",
)
def test_a_malicious_archive_is_not_unpacked(server, tmp_path, evil):
    server.body = archive_of(tiny_files(), [evil])
    fails_and_leaves_nothing("nothing was unpacked", server, tmp_path / "d")
    assert not (tmp_path / "evil").exists() and not Path("/tmp/nanomr-evil").exists()


def test_an_archive_that_lacks_something(server, tmp_path):
    server.body = archive_of({k: v for k, v in tiny_files().items() if k != "data_batch_3.bin"})
    fails_and_leaves_nothing("lacks .*data_batch_3.bin", server, tmp_path / "d")
    server.body = archive_of(tiny_files() | {"test_batch.bin": b"short"})
    fails_and_leaves_nothing("lacks .*test_batch.bin with", server, tmp_path / "d")
    server.body = archive_of({k: v for k, v in tiny_files().items() if k != data.META_FILE})
    fails_and_leaves_nothing("lacks .*batches.meta.txt", server, tmp_path / "d")


@pytest.mark.parametrize(
    "body",
    [b"not an archive", gzip.compress(b"not a tar"), archive_of(tiny_files())[:-3000]],
    ids=[
        "not gzip",
        "gzip of no tar",
        "cut short",
    ],  # not the bytes: gzip writes the second into them, and workers differ
)
def test_an_archive_that_cannot_be_unpacked(server, tmp_path, body):
    server.body = body
    fails_and_leaves_nothing("cannot unpack", server, tmp_path / "d")


def test_a_killed_download_is_not_mistaken_for_the_data(server, tmp_path):
    server.mode = "stall"
    url = f"http://127.0.0.1:{server.server_port}/x"
    code = f"from nanomr import data; data.load_cifar10({str(tmp_path)!r}, progress=False, url={url!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(data.__file__).parents[1])
    give_up = time.monotonic() + 20
    while not (server.requests and list(tmp_path.rglob("archive.tar.gz"))) and time.monotonic() < give_up:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.rglob("archive.tar.gz"))  # it was killed in the middle
    fails("no cifar-10-batches-bin", read, tmp_path)
    server.mode = "good"
    server.release.set()
    assert fetch(server, tmp_path).source["verified"] is True


def test_a_kill_after_unpacking_is_not_mistaken_for_the_data(server, tmp_path):
    write_folder(tmp_path / ".nanomr-download-abc" / data.FOLDER, seed=9)
    fails("no cifar-10-batches-bin", read, tmp_path)
    assert_is_seed(fetch(server, tmp_path), 0)


def test_the_slower_of_two_downloads_uses_what_is_there(server, tmp_path, monkeypatch):
    unpack = data._extract

    def slow(*args):
        folder = unpack(*args)
        write_folder(tmp_path / data.FOLDER, seed=5)  # the other process finishes now
        return folder

    monkeypatch.setattr(data, "_extract", slow)
    assert_is_seed(fetch(server, tmp_path), 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [data.FOLDER]
