"""Paths and URIs: what is read, and what writing leaves behind."""

import os
import socket
from pathlib import Path

import pytest
from pyarrow import fs

from raycifar.storage.files import open_file, read_file, write_whole
from raycifar.storage.run_folder import RunFolder

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
    with pytest.raises(PermissionError, match="outside the folder"):
        run.read("run.json")
    assert run.read("result.json") == b"x"
    with open_file(LOCAL, str(tmp_path / "runs/a/run.json")) as file:  # what users name themselves may be a link
        assert file.read() == b"mine"
