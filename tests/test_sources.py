"""Finding and reading CIFAR-100 in every layout, and refusing what is none."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import threading
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import Data, finish
from conftest import write_archive
from PIL import Image

from raycifar.data import CIFAR100, sources
from raycifar.data.dataset import to_images
from raycifar.data.pictures import find_images
from raycifar.data.synthetic import synthetic
from raycifar.errors import RequestError


def python_files(arrays):
    """The files of cifar-100-python, its keys bytes as Python 2 left them."""
    files = {"meta": pickle.dumps({b"fine_label_names": []}, protocol=2)}
    for split, (images, fine, coarse) in arrays.items():
        raw = {b"data": images.reshape(len(images), -1), b"filenames": [b"x.png"] * len(images)}
        raw |= {b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist(), b"batch_label": b"1 of 1"}
        files[split] = pickle.dumps(raw, protocol=2)
    return files


def parquet_files(arrays):
    """The Hugging Face layout: PNG files in a struct, one file a split."""

    def png(image):
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    files = {}
    for split, (images, fine, coarse) in arrays.items():
        table = pa.table({"img": [png(image) for image in images], "fine_label": fine, "coarse_label": coarse})
        file = io.BytesIO()
        pq.write_table(table, file)
        files[f"{split}-00000-of-00001.parquet"] = file.getvalue()
    return files


def write_folder(path, files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return str(path)


@contextlib.contextmanager
def serving(folder, handler=http.server.SimpleHTTPRequestHandler):
    """A web server on loopback that serves a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Exact(Quiet):
    """Has nothing at an address with two slashes in a row."""

    def do_GET(self):
        if "//" in self.path:
            self.send_error(404)
        else:
            super().do_GET()


def assert_same(source, arrays):
    for split, (images, fine, coarse) in arrays.items():
        table = getattr(source, split)
        assert np.array_equal(to_images(table["image"]), images)
        assert np.array_equal(table["fine"].to_numpy(), fine)
        assert np.array_equal(table["coarse"].to_numpy(), coarse)


# What is read ---------------------------------------------------------------------------------------


def test_the_official_archives_are_read(tmp_path, small, small_arrays):
    assert_same(sources.load(small), small_arrays)
    (tmp_path / "python").mkdir()
    python = write_archive(tmp_path / "python/a.tar.gz", python_files(small_arrays), "cifar-100-python")
    for path in (python, tmp_path):  # the folder above, as a cache keeps it
        assert_same(sources.load(str(path)), small_arrays)


def test_a_uri_is_read_like_a_path(tmp_path, small_files, small_arrays):
    write_archive(tmp_path / "a.tar.gz", small_files)
    assert_same(sources.load(f"file://{tmp_path}/a.tar.gz"), small_arrays)
    with serving(tmp_path, Quiet) as url:
        assert_same(sources.load(f"{url}/a.tar.gz"), small_arrays)


def test_folders_of_a_web_server_are_read_by_their_lists(tmp_path, small_files, small_arrays):
    write_folder(tmp_path / "a/parquet data", parquet_files(small_arrays))
    write_folder(tmp_path / "b/binary", small_files)
    (tmp_path / "c").mkdir()
    write_archive(tmp_path / "c/a copy.tar.gz", small_files)
    with serving(tmp_path, Exact) as url:
        for folder in ("a/", "b/", "b/binary/", "c/"):
            assert_same(sources.load(f"{url}/{folder}"), small_arrays)


def test_names_in_a_web_server_s_lists_are_those_of_the_files(tmp_path, small_arrays):
    for split, (images, fine, _) in small_arrays.items():
        for row, (image, label) in enumerate(zip(images, fine, strict=True)):
            folder = tmp_path / "my data/100%" / split / CIFAR100.class_names[label].replace("_", " ")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{row} ä%20#.png")
    with serving(tmp_path, Exact) as url:
        source = sources.load(f"{url}/my%20data/")
        apples, _ = find_images(f"{url}/my%20data/100%25/test/apple/")
    assert source.fingerprint == sources.load(str(tmp_path / "my data")).fingerprint
    row = int(np.flatnonzero(small_arrays["test"][1] == CIFAR100.class_names.index("apple"))[0])
    assert f"{url}/my%20data/100%25/test/apple/{row}%20%C3%A4%2520%23.png" in [image.name for image in apples]


def test_an_archive_may_have_one_gibibyte(tmp_path):
    with (tmp_path / "a.tar").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(RequestError, match="has 1,073,741,825 bytes, and at most 1,073,741,824 are read"):
        sources.load(str(tmp_path / "a.tar"))


def test_the_fingerprint_is_of_the_content(tmp_path, small, small_arrays):
    folder = write_folder(tmp_path / "python", python_files(small_arrays))
    assert sources.load(small).fingerprint == sources.load(folder).fingerprint
    images, fine, coarse = small_arrays["train"]
    other = {**small_arrays, "train": (images[::-1], fine[::-1], coarse[::-1])}
    changed = write_folder(tmp_path / "other", python_files(other))
    assert sources.load(changed).fingerprint != sources.load(small).fingerprint


def test_the_real_data_set(cifar):
    source = sources.load(cifar)
    assert (len(source.train), len(source.test)) == (50_000, 10_000)
    assert np.bincount(source.train["fine"].to_numpy()).tolist() == [500] * 100
    assert sorted(np.bincount(source.superclass_of())) == [5] * 20
    pixels = to_images(source.train["image"])
    assert pixels.mean((0, 2, 3)) / 255 == pytest.approx([0.50708, 0.48655, 0.44092], abs=1e-4)


# What is refused ------------------------------------------------------------------------------------


def relabelled(arrays, **changes):
    images, fine, coarse = arrays["train"]
    fine, coarse = changes.get("fine", fine).astype(int), changes.get("coarse", coarse).astype(int)
    return {**arrays, "train": (images, fine, coarse)}


class Bomb:
    """Unpickled by pickle.loads, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def bad_inputs(tmp_path, files, arrays):
    """Each bad input by name: its path, and words of its sentence."""
    write_archive(tmp_path / "whole.tar.gz", files)
    content = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "noise.tar.gz").write_bytes(b"no archive at all, " * 1000)
    (tmp_path / "one.parquet").write_bytes(parquet_files(arrays)["test-00000-of-00001.parquet"])
    labels = arrays["train"][1].copy()
    labels[7] = 100
    record = bytearray(files["train.bin"])
    record[1] = 100
    no_columns = io.BytesIO()
    pq.write_table(pa.table({"image": [1], "label": [2]}), no_columns)
    parquet = parquet_files(arrays)
    pickles = python_files(arrays)
    return {
        "a missing path": (tmp_path / "nowhere", "does not exist"),
        "a truncated archive": (tmp_path / "cut.tar.gz", "truncated"),
        "no archive": (tmp_path / "noise.tar.gz", "not a tar or zip archive"),
        "an archive of another kind": (
            write_archive(tmp_path / "cifar10.tar.gz", {"data_batch_1.bin": b"x" * 3073}, "cifar-10"),
            "it holds cifar-10/data_batch_1.bin",
        ),
        "an escaping member": (
            write_archive(tmp_path / "escape.tar.gz", {**files, "../../evil": b"x"}, ""),
            "points outside the archive's folder",
        ),
        "an absolute member": (
            write_archive(tmp_path / "absolute.tar.gz", {"/etc/evil": b"x", **files}, ""),
            "points outside the archive's folder",
        ),
        "records of a wrong length": (
            write_archive(tmp_path / "length.tar.gz", {**files, "test.bin": files["test.bin"][:-1]}),
            "not a multiple of a CIFAR-100 record's 3,074",
        ),
        "a label out of range": (
            write_archive(tmp_path / "label.tar.gz", {**files, "train.bin": bytes(record)}),
            "the fine label of image 0 is 100",
        ),
        "a label out of range in a pickle": (
            write_folder(tmp_path / "pickled-label", python_files(relabelled(arrays, fine=labels))),
            "the fine label of image 7 is 100",
        ),
        "a pickle that asks for a class": (
            write_folder(tmp_path / "bomb", {**pickles, "train": pickle.dumps(Bomb(tmp_path / "mark"))}),
            "the pickle asks for posix.mkdir",
        ),
        "a pickle of something else": (
            write_folder(tmp_path / "list", {**pickles, "train": pickle.dumps([1, 2])}),
            "holds a list",
        ),
        "a pickle cut short": (
            write_folder(tmp_path / "short", {**pickles, "train": pickles["train"][:-100]}),
            "not a readable pickle",
        ),
        "Parquet without the columns": (
            write_folder(tmp_path / "columns", {**parquet, "train-0.parquet": no_columns.getvalue()}),
            "has int64 in the column image, not bytes",
        ),
        "Parquet without a test split": (
            write_folder(tmp_path / "half", {"train-0.parquet": parquet["train-00000-of-00001.parquet"]}),
            "no test split",
        ),
        "one Parquet file": (tmp_path / "one.parquet", "one split"),
        "an empty split": (
            write_archive(tmp_path / "empty.tar.gz", {**files, "test.bin": b""}),
            "test.bin holds no images",
        ),
        "an empty folder": (write_folder(tmp_path / "void", {}), "it holds nothing"),
        "an unknown file system": ("nosuch://bucket/cifar", "nosuch:// can't be read"),
    }


def test_bad_inputs_are_refused_with_a_sentence(tmp_path, small_files, small_arrays):
    for what, (path, words) in bad_inputs(tmp_path, small_files, small_arrays).items():
        with pytest.raises(RequestError) as refusal:
            sources.load(str(path))
        message = str(refusal.value)
        assert words in message, f"{what}: {message}"
        assert str(path) in message
        assert "\n" not in message
        assert message.endswith(".")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--val-size", "150"], "--val-size 150 can't be divided among 100 classes: give 100 or 200."),
        (["--val-size", "800"], "leaves nothing to train on"),
        (["--limit", "50", "--val-size", "100"], "--limit 50 can't be divided among 100 classes: give 100."),
        (["--limit", "800", "--val-size", "100"], "700 training images remain"),
    ],
)
def test_a_wrong_request_ends_with_2_and_one_sentence_and_writes_nothing(train, small, tmp_path, args, words):
    done = train("--model", "cnn", "--data", small, *args, code=2, env={"RAYCIFAR_CACHE": str(tmp_path)})
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# The official archive -------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_archive_is_fetched_once_and_checked(tmp_path, cache, small_files):
    write_archive(tmp_path / "a.tar.gz", small_files)
    md5 = hashlib.md5((tmp_path / "a.tar.gz").read_bytes()).hexdigest()
    with serving(tmp_path, Quiet) as url:
        path = sources.fetch(f"{url}/a.tar.gz", md5)
    assert [file.name for file in cache.iterdir()] == ["a.tar.gz"]
    assert sources.fetch(f"{url}/a.tar.gz", md5) == path  # the server is gone


def test_a_server_that_fails_once_is_asked_again(tmp_path, cache, small_files):
    write_archive(tmp_path / "a.tar.gz", small_files)
    md5 = hashlib.md5((tmp_path / "a.tar.gz").read_bytes()).hexdigest()
    asked = []

    class Flaky(Quiet):
        def do_GET(self):
            asked.append(self.path)
            if len(asked) == 1:
                self.send_error(503)
            else:
                super().do_GET()

    with serving(tmp_path, Flaky) as url:
        assert sources.fetch(f"{url}/a.tar.gz", md5).exists()
    assert len(asked) == 2


def test_another_archive_than_the_official_one_is_refused_and_not_kept(tmp_path, cache, small_files):
    write_archive(tmp_path / "a.tar.gz", small_files)
    with serving(tmp_path, Quiet) as url, pytest.raises(RequestError, match="its md5 differs"):
        sources.fetch(f"{url}/a.tar.gz", "0" * 32)
    assert list(cache.iterdir()) == []


@pytest.fixture
def offline(monkeypatch):
    """Nothing is reached but this machine."""
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_without_a_network_images_that_are_asked_for_may_come_from_elsewhere(cache, offline):
    with pytest.raises(RequestError) as refusal:
        sources.load("cifar100")
    for words in ("--data PATH", "RAYCIFAR_DATA", "--data synthetic", str(cache / "cifar-100-binary.tar.gz")):
        assert words in str(refusal.value)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_without_a_network_fetch_says_where_a_copy_is_taken_from(tmp_path, cache, offline, small_files):
    refused = finish(Data("fetch", storage=None), code=2)
    assert len(refused.stderr.strip().splitlines()) == 1
    assert f"copy it to {cache / 'cifar-100-binary.tar.gz'}." in refused.stderr
    assert "--data" not in refused.stderr
    cache.mkdir(exist_ok=True)
    write_archive(cache / "a.tar.gz", small_files)
    md5 = hashlib.md5((cache / "a.tar.gz").read_bytes()).hexdigest()
    assert sources.fetch("http://127.0.0.1:9/a.tar.gz", md5) == cache / "a.tar.gz"


def test_a_cache_that_can_t_be_written_is_told_from_a_network_that_fails(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(RequestError, match=r"can't be kept in .*/file/cache \(.*\): set RAYCIFAR_CACHE to another"):
        sources.fetch()


# Synthetic images -----------------------------------------------------------------------------------


def test_synthetic_images_come_from_the_seed():
    first, again, other = synthetic(1000, 500), synthetic(1000, 500), synthetic(1000, 500, seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.bincount(first.train["fine"].to_numpy()).tolist() == [10] * 100
    assert first.superclass_of() == tuple(label // 5 for label in range(100))


def test_as_many_synthetic_images_are_made_as_are_asked_for():
    source = sources.load("synthetic:1200")
    assert (source.name, len(source.train), len(source.test)) == ("synthetic:1200", 1200, 10_000)
    with pytest.raises(RequestError, match="synthetic:1250"):
        sources.load("synthetic:1250")


def test_a_linear_model_does_not_get_synthetic_images_right():
    source = synthetic(8_000, 2_000)

    def arrays(table):
        pixels = to_images(table["image"]).reshape(len(table), -1)
        return pixels / 255 - 0.5, table["fine"].to_numpy()

    (x, y), (x_test, y_test) = arrays(source.train), arrays(source.test)
    ridge = x.T @ x + 30 * np.eye(x.shape[1])
    weights = np.linalg.solve(ridge, x.T @ np.eye(100)[y])
    top1 = ((x_test @ weights).argmax(1) == y_test).mean()
    assert 0.01 < top1 < 0.5
