"""What raycifar needs of the machine that it runs on, and what it does where that is missing."""

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import raycifar
from raycifar.cluster import nodes
from raycifar.machine import available_cpus, cpu_quota, private_folder

RUN = ("--model", "cnn", "--limit", "100", "--val-size", "0", "--epochs", "1", "--batch-size", "50", "--no-report")
LINUX_ALONE = "sched_getaffinity sched_setaffinity posix_fadvise memfd_create pidfd_open eventfd getresuid O_TMPFILE"
ELSEWHERE = f"""
import os, runpy, signal, sys
from raycifar import machine

for name in {LINUX_ALONE!r}.split():
    vars(os).pop(name)
vars(signal).pop("sigtimedwait"), vars(signal).pop("SIGRTMIN")
machine.cpu_quota.__defaults__ = (machine.Path("/nowhere"),) * 2
runpy.run_module("raycifar.train", run_name="__main__")
"""
HOMELESS = """
import os
from pathlib import Path
import raycifar.data.sources as sources
from raycifar.machine import provide_home

os.environ.pop("HOME")
os.environ.pop("RAYCIFAR_CACHE", None)
os.setuid(12345)
provide_home()
print(Path.home(), sources.cache_folder(), os.environ.get("MPLCONFIGDIR"))
os.environ["HOME"] = "/"
provide_home()
print(Path.home(), sources.cache_folder(), os.environ["MPLCONFIGDIR"])
"""


def test_the_cpus_are_those_that_this_process_is_bound_to():
    code = "from raycifar.machine import available_cpus as f; print(f())"
    pinned = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c", code]
    assert subprocess.run(pinned, capture_output=True, text=True, check=True).stdout == "1\n"
    assert available_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),  # version 2, in a container
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),  # as of Slurm and systemd
        ("0::/gone", {"cpu.max": "50000 100000"}, 0.5),
        ("3:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "1"}, math.inf),
        ("3:cpu,cpuacct:/d", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2),
        ("3:cpuset:/\n2:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "3", "cpu/a/cpu.cfs_period_us": "1"}, 3),
        ("", {}, math.inf),
    ],
)
def test_the_quota_is_the_least_of_the_cgroups_above(own, files, cpus, tmp_path):
    (tmp_path / "own").write_text(own + "\n" * bool(own))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert cpu_quota(tmp_path, tmp_path / "own") == cpus
    assert cpu_quota(tmp_path, tmp_path / "nowhere") == math.inf


def test_a_private_folder_is_never_one_that_others_have_made(tmp_path):
    folder = private_folder("a", tmp_path)
    assert private_folder("a", tmp_path) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert private_folder("a", tmp_path) != folder
    (tmp_path / f"b-{os.getuid()}").symlink_to(folder)
    assert private_folder("b", tmp_path).name not in ("a", folder.name, f"b-{os.getuid()}")


@pytest.mark.skipif(os.getuid() != 0, reason="acts as another user")
def test_a_user_without_a_home_gets_a_private_one():
    done = subprocess.run([sys.executable, "-c", HOMELESS], capture_output=True, text=True, check=True, cwd="/")
    unset, read_only = (line.split() for line in done.stdout.splitlines())
    own = unset[0]
    assert Path(own).stat().st_uid == 12345
    assert unset == [own, f"{own}/.cache/raycifar", "None"]
    assert read_only == ["/", own, own]


def test_the_versions_are_of_what_runs(monkeypatch):
    """A job's working directory has none that are installed, or lies over another version's."""

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert nodes.versions()["raycifar"] == raycifar.__version__


def test_nothing_but_linux_s_names_are_needed_to_train(small, tmp_path):
    """Neither those, nor an output in UTF-8, nor a Ray Train that nobody has switched off."""
    args = [*RUN, "--workers", "0", "--data", small, "--name", "ü", "--storage", str(tmp_path)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "RAY_TRAIN_V2_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *args], capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Run folder: " in done.stdout
    run = json.loads((tmp_path / "ü/run.json").read_text())
    assert run["cpus_per_worker"] == os.cpu_count()
