"""Paths and URIs: what is read, and what writing leaves behind."""

import os
import resource
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest
from pyarrow import fs

from raycifar.command import ending
from raycifar.data.sources import load
from raycifar.data.synthetic import synthetic
from raycifar.errors import RequestError, StorageError
from raycifar.models.recipes import choose_recipe
from raycifar.storage.files import list_files, locate, open_file, read_file, write_file, write_whole
from raycifar.storage.locations import check_location, join, parent_and_name, to_path
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.workflows import benchmark, reporting
from raycifar.workflows.datasets import write_parquet
from raycifar.workflows.duplicates import list_duplicates
from raycifar.workflows.evaluation import EvaluationRequest, evaluate
from raycifar.workflows.exporting import export
from raycifar.workflows.requests import ComparisonRequest, TrainingRequest
from raycifar.workflows.speedrun import speedrun

LOCAL = fs.LocalFileSystem()


# Writing --------------------------------------------------------------------------------------------


def test_writing_follows_no_link_and_leaves_nothing_beside_the_file(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_bytes(b"mine")
    folder.mkdir()
    for name in ("report.html", ".report.html.part"):
        (folder / name).symlink_to(victim)
    write_whole(LOCAL, str(folder / "report.html"), b"the report")
    assert victim.read_bytes() == b"mine"
    assert (folder / "report.html").read_bytes() == b"the report"
    assert not (folder / "report.html").is_symlink()
    assert {file.name for file in folder.iterdir()} == {"report.html", ".report.html.part"}


def test_a_file_s_permissions_are_those_of_the_umask_and_its_name_may_be_long(tmp_path):
    path = tmp_path / ("n" * 255)
    before = os.umask(0o027)
    try:
        write_whole(LOCAL, str(path), b"x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_can_t_be_written_leaves_nothing(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(LOCAL, str(tmp_path / "report.html"), b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "link"):
        with pytest.raises(StorageError, match="can't be written: it is a device, a pipe or a socket, not a file"):
            write_file(str(tmp_path / name), b"x")
    assert (tmp_path / "fifo").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "link"}


def test_a_file_that_lost_its_beginning_is_written_whole_when_it_is_appended_to(tmp_path):
    folder = RunFolder(str(tmp_path), "a")
    for there in (None, b"", b"ab", b"abc", b"abcd"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a/x").unlink(missing_ok=True)
        if there is not None:
            (tmp_path / "a/x").write_bytes(there)
        folder.append("x", b"abc", b"def")
        assert folder.read("x") == b"abcdef"


def test_the_name_of_a_file_is_on_the_disk_too_once_it_is_written(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()))
    write_whole(LOCAL, str(tmp_path / "x"), b"y")
    assert synced[1:] == [tmp_path]


WRITERS = {
    "export": lambda run, out: export(str(run), "safetensors", Screen(quiet=True), out=out, data="synthetic:200"),
    "report --out": lambda run, out: reporting.report(
        RunFolder.at(str(run)), Screen(quiet=True), out=RunFolder.at(out), kind="md"
    ),
    "data prepare": lambda run, out: write_parquet(synthetic(200, 100), out, Screen(quiet=True)),
    "bench --out": lambda run, out: benchmark.keep({}, RunFolder.at(out)),
}


PLACES = {"file/x": "{tmp}/file is not a folder", "/proc/x": "No such file or directory", "full": "File too large"}


@pytest.mark.parametrize(
    ("writer", "out", "says"),
    [
        (writer, *place)
        for writer in WRITERS
        for place in PLACES.items()
        if writer != "export" or place[0] == "full"  # it refuses the others before the work
    ],
)
def test_every_writer_says_in_one_sentence_what_it_can_t_write(writer, out, says, trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if out == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        with pytest.raises(StorageError) as failure:
            WRITERS[writer](trained, str(tmp_path / out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    code, sentence = ending(failure.value)
    assert code == 1
    assert sentence.startswith(f"Error: {tmp_path / out}")
    assert sentence.endswith(f"can't be written: {says.format(tmp=tmp_path)}.")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"file"}


@pytest.mark.parametrize("out", ["file", "file/x", "/proc/x"])
def test_a_folder_for_results_that_can_t_be_written_is_refused_before_the_work(out, tmp_path):
    (tmp_path / "file").touch()
    place = str(tmp_path / out)
    request = {"data": "synthetic:200", "val_size": 0, "workers": 0, "limit": 100}
    quiet, nothing = Screen(quiet=True), ExitStack()
    for work in (
        lambda: speedrun(TrainingRequest.of("cnn", **request), quiet, pytest.fail, runs=1, out=place),
        lambda: benchmark.bench(
            benchmark.BenchRequest(TrainingRequest.of("cnn", **request), out=place), quiet, nothing, pytest.fail
        ),
        lambda: evaluate(EvaluationRequest("nowhere", out=place), quiet, nothing),
        lambda: list_duplicates("synthetic:200", place, quiet),
    ):
        with pytest.raises(RequestError, match=r"can't be written: .*\. Give another --out\."):
            work()
    assert {path.name for path in tmp_path.rglob("*")} == {"file"}


# Reading --------------------------------------------------------------------------------------------


def test_only_files_are_read_and_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for place in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/zero"), tmp_path):
        for read in (read_file, RunFolder.at(str(place.parent)).read):
            with pytest.raises(OSError, match=r"not a file|No such device|directory"):
                read(place if read is read_file else place.name)
    server.close()


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(OSError, match="8,589,934,592 bytes"):
        read_file(tmp_path / "sparse")


def test_a_run_s_files_are_in_its_folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"mine")
    run = RunFolder(str(tmp_path / "runs"), "a")
    run.write("here", b"x")
    for name, target in {"run.json": tmp_path / "secret", "result.json": "here"}.items():
        (tmp_path / "runs/a" / name).symlink_to(target)
    with pytest.raises(StorageError, match=r"run.json can't be read: it is a link to a place outside the folder"):
        run.read("run.json")
    assert run.read("result.json") == b"x"
    with open_file(LOCAL, str(tmp_path / "runs/a/run.json")) as file:  # what users name themselves may be a link
        assert file.read() == b"mine"


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RequestError, match="loop does not exist: give --data"):
        load(str(tmp_path / "loop"))
    with pytest.raises(StorageError, match="loop can't be read: Too many levels of symbolic links"):
        RunFolder.at(str(tmp_path)).read("loop")


def test_links_to_folders_are_not_followed_and_that_is_said(tmp_path, caplog):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/image.png").touch()
    (tmp_path / "a/blob").symlink_to("b/image.png")  # as in a cache of the hub
    (tmp_path / "a/b/around").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "a/fifo")
    assert list_files(LOCAL, str(tmp_path / "a")) == [str(tmp_path / "a" / name) for name in ("b/image.png", "blob")]
    assert caplog.messages == [f"Note: {tmp_path}/a/b/around is skipped: it is a link to a folder."]
    (tmp_path / "a/away").symlink_to("nowhere")
    list_files(LOCAL, str(tmp_path / "a"))
    assert caplog.messages[1:] == [f"Note: {tmp_path}/a/away is skipped, and 1 more: it is a link that leads nowhere."]


# Paths and URIs -------------------------------------------------------------------------------------


def test_a_folder_is_found_by_its_path_and_by_its_uri(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name = "größe a%20b#c?d"
    RunFolder(str(tmp_path), name).write("run.json", b"{}")
    quoted = quote(name)
    for place in (tmp_path / name, f"~/{name}", name, f"./{name}/", f"file://{tmp_path}/{quoted}"):
        run = RunFolder.at(str(place))
        assert run.read("run.json") == b"{}"
        assert run.location == f"{tmp_path}/{name}"
    assert read_file(f"file://localhost{tmp_path}/{quoted}/run.json") == b"{}"
    write_file(f"file://{tmp_path}/new%20folder/x", b"y")
    assert (tmp_path / "new folder/x").read_bytes() == b"y"


def test_a_uri_is_taken_apart_and_put_together_beside_its_parameters():
    uri = "s3://bucket/runs/gr%C3%B6%C3%9Fe?region=eu"
    assert parent_and_name(uri) == ("s3://bucket/runs?region=eu", "größe")
    assert join(*parent_and_name(uri)) == uri
    assert parent_and_name("s3://bucket?region=eu") == ("s3://bucket?region=eu", "")
    assert to_path(uri) is None


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("", "'' is not a path"),
        (" ", "' ' is not a path"),
        ("a\0b", "is not a path"),
        ("memory://a/b", "memory:// can't be read"),
        ("fsspec+s3://a/b", "fsspec+s3:// can't be read"),
        ("reference://a", "reference:// can't be read"),
        ("simplecache::s3://a/b", "simplecache::s3:// can't be read"),
        ("zip://a::http://b", "zip:// can't be read"),
        ("s3://a::file://b", "it chains several by ::"),
        ("file://tmp/x", "names another host"),
        ("s3:/bucket/x", "s3:/bucket/x has one slash: give s3://bucket/x, or the path ./s3:/bucket/x"),
        ("file:/tmp/x", "give file:///tmp/x"),
        ("https://host/a b?sig=c", "write a space as %20"),
    ],
)
def test_what_is_no_place_is_refused_in_a_sentence(location, says):
    for refuse in (check_location, locate, RunFolder.at, lambda place: choose_recipe("vgg16", pretrained=place)):
        with pytest.raises(RequestError, match=r"^[^\n]*\.$") as refusal:
            refuse(location)
        assert says in str(refusal.value)
    for options in ({"data": location}, {"storage": location}):
        for request in (TrainingRequest.of, lambda model, **options: ComparisonRequest.of([model], **options)):
            with pytest.raises(RequestError):
                request("cnn", **options)


@pytest.mark.parametrize("storage", ["http://host/runs", "https://host/runs", "hf://datasets/me/runs"])
def test_what_can_only_be_read_is_refused_as_a_storage_at_once(storage):
    with pytest.raises(RequestError, match=r"--storage .* can't be written to"):
        TrainingRequest.of("cnn", storage=storage)


def test_without_a_home_a_path_in_it_is_refused(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(RequestError, match="~/data: this user has no home directory: give a full path"):
        locate("~/data")
