"""What the tests share: real images where they are at hand, one Ray for the session, and the command itself."""

import raycifar  # noqa: F401 (before Ray, which reads from the environment what this sets)

# isort: split
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from pathlib import Path

import click
import numpy as np
import psutil
import pytest
import ray
import torch
from click.testing import CliRunner
from command import Command, finish, free_ports, reset_auth_token_state
from cpus import free_cpus, who_has_them
from ray.cluster_utils import Cluster
from torchvision.models import resnet50

from raycifar.cluster.status import StatusStore
from raycifar.data.dataset import to_images
from raycifar.data.sources import load
from raycifar.data.synthetic import synthetic

torch.set_num_threads(1)  # of this process; commands set their own
os.environ.update(RAY_worker_niceness="0")  # with Ray's own, 15, its workers wait for what the other process tests

SMALL = {"train": 800, "test": 300}
RAY_FIXTURES = {"cluster", "local_ray", "nodes"}
OWN_RAY = {  # files whose tests start a Ray by themselves
    f"test_{name}.py"
    for name in (
        "cluster",
        "connection",
        "deploy",
        "elastic",
        "evidence",
        "ray_internals",
        "sizing",
        "spot",
        "stoppable",
    )
}
RUN = ("--model", "cnn", "--limit", 200, "--val-size", 100, "--epochs", 3, "--batch-size", 20)  # 10 steps an epoch
RUN += ("--cpus-per-worker", 1)  # threads of two tests at a time would wait for each other, ten times as long


@pytest.fixture(scope="session", autouse=True)
def no_cache(tmp_path_factory):
    """An empty cache for what tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYCIFAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache(no_cache, tmp_path_factory, monkeypatch):
    """An empty cache for each test: what another has found of a data set changes what a run says of it."""
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items):
    """Have one process take all tests that start Ray, and deal out the others by file: see `-n` in pyproject.toml.

    Ray's tests count processes and CPUs, and wait for others more than they compute.
    """
    for item in items:
        its_own = item.path.name in OWN_RAY or RAY_FIXTURES & set(item.fixturenames)
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("ray" if its_own else item.path.name))


@pytest.fixture(scope="session")
def cifar():
    """The path of the real data set."""
    path = os.environ.get("RAYCIFAR_DATA")
    if not path:
        pytest.skip("needs the real CIFAR-100: set RAYCIFAR_DATA to its archive or folder")
    return str(Path(path).resolve())


@pytest.fixture(scope="session")
def small_arrays():
    """A few images a class, as arrays by split: real ones where they are at hand, else synthetic."""
    source = load(os.environ["RAYCIFAR_DATA"]) if "RAYCIFAR_DATA" in os.environ else synthetic(10_000, 2_000)
    arrays = {}
    for split, count in SMALL.items():
        table = getattr(source, split)
        fine = table["fine"].to_numpy()
        rows = np.concatenate([np.flatnonzero(fine == label)[: count // 100] for label in range(100)])
        rows = np.random.default_rng(0).permutation(rows)
        images = to_images(table["image"])[rows]
        arrays[split] = images, fine[rows], table["coarse"].to_numpy()[rows]
    return arrays


@pytest.fixture(scope="session")
def small_files(small_arrays):
    """The small data set's files in the official binary layout, by name."""
    files = {}
    for split, (images, fine, coarse) in small_arrays.items():
        labels = np.stack([coarse, fine], axis=1).astype(np.uint8)
        files[f"{split}.bin"] = np.concatenate([labels, images.reshape(len(images), -1)], axis=1).tobytes()
    return files


@pytest.fixture(scope="session")
def small(small_files, tmp_path_factory):
    """The path of an archive of 800 training and 300 test images."""
    return write_archive(tmp_path_factory.mktemp("data") / "cifar-100-binary.tar.gz", small_files)


def write_archive(path: Path, files: dict[str, bytes], folder: str = "cifar-100-binary") -> str:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.fixture(scope="session")
def trained(small, tmp_path_factory):
    """The folder of a run that nothing disturbed, with its report; tests that change it take a copy."""
    storage = tmp_path_factory.mktemp("trained")
    args = (*RUN, "--workers", 0, "--data", small, "--name", "a")
    assert "What the curves show: " in finish(Command(*args, storage=storage)).stdout
    return storage / "a"


@pytest.fixture(scope="session")
def published_resnet50():
    """A ResNet-50 as torchvision makes it, with running statistics that are not the first ones."""
    torch.manual_seed(1)
    network = resnet50()
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64))
    return network.eval()


@pytest.fixture(scope="session")
def resnet50_file(published_resnet50, tmp_path_factory):
    """Its state dict, as torchvision's weights are published."""
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(published_resnet50.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def end_what_is_left(request):
    """End the commands that a test leaves behind when it fails, show what they said, and see the CPUs free again.

    A test that leaves the CPUs of the session's Ray taken fails itself, rather than all tests after it.
    """
    yield
    for command in Command.begun:
        if not command.ended:
            command.process.kill()
            print("Still running:", *command.args, "\n", *command.said())
    Command.begun.clear()
    if "cluster" in request.fixturenames:
        env = request.getfixturevalue("cluster")
        try:
            wait_until(lambda: free_cpus(env) == 2, 30, "the end of what used the CPUs")
        except AssertionError:
            print(who_has_them(env))
            raise


@pytest.fixture
def train(tmp_path):
    """Run a training command to its end."""

    def run(*args, code=0, storage=tmp_path / "runs", env=None):
        return finish(Command(*args, storage=storage, env=env), code)

    return run


@pytest.fixture
def in_process(monkeypatch):
    """Run a command in this process; return its exit code and what it said."""

    def leave(code, sentence=None, *more, **options):
        if sentence:
            click.echo(sentence, err=True)
        raise SystemExit(code)

    monkeypatch.setattr("raycifar.command.leave", leave)
    monkeypatch.setattr("raycifar.command.end_at_second_signal", lambda: None)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)

    def run(command, *args, answer=None):
        done = CliRunner().invoke(command, [*map(str, args)], input=answer)
        return done.exit_code, done.output

    return run


def wait_until(condition, seconds: float = 120, what: str = "it"):
    """Wait for a condition of the run under way, and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, the newest first."""
    return sorted((path.parent for path in folder.glob("checkpoint_*/manifest.json")), reverse=True)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def store():
    """What a run's processes tell each other, of no run in particular."""
    return StatusStore(uuid.uuid4().hex)


@pytest.fixture(scope="session")
def cluster():
    """One Ray on loopback for the whole session, with a token: the environment that reaches it.

    Its ports are free ones, so that two sessions of tests can run beside each other.
    """
    # A short path: Ray's sockets lie in it, and a socket's path is limited to 107 bytes.
    temp = Path(tempfile.mkdtemp(prefix="rc"))
    token = temp / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard_port, metrics_port, agent_port = free_ports(4)
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAYCIFAR_TEST_DASHBOARD": f"http://127.0.0.1:{dashboard_port}",
        "RAYCIFAR_TEST_METRICS": f"http://127.0.0.1:{metrics_port}/metrics",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated environment
    }
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    start += [f"--dashboard-port={dashboard_port}", f"--metrics-export-port={metrics_port}"]
    start += [f"--dashboard-agent-listen-port={agent_port}"]  # the usual one may be another Ray's: then no job starts
    start += ["--disable-usage-stats", f"--temp-dir={temp}"]
    start += ['--system-config={"metrics_report_interval_ms": 3000}']  # of runs that last only seconds
    started = {key: value for key, value in {**os.environ, **env}.items() if key != "RAY_ADDRESS"}
    try:
        # Left running by Ray, the daemons would hold a pipe open for ever: their output goes to a file.
        with (temp / "start.log").open("w") as log:
            subprocess.run(start, env=started, stdout=log, stderr=log, check=True, timeout=120)
        yield env
    finally:
        end_ray(token)
        shutil.rmtree(temp, ignore_errors=True)


def processes_of_ray(token: Path) -> list[psutil.Process]:
    """Return the processes that were started with this token's path in their environment."""
    everything = psutil.process_iter(["environ", "name"])
    return [each for each in everything if (each.info["environ"] or {}).get("RAY_AUTH_TOKEN_PATH") == str(token)]


def end_ray(token: Path) -> None:
    """Kill the processes that were started with this token's path in their environment, and those they started."""
    its = []
    for process in processes_of_ray(token):
        with contextlib.suppress(psutil.NoSuchProcess):
            its += [process, *process.children(recursive=True)]
    for process in its:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(its, timeout=10)


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of one CPU, without a dashboard, in this process."""
    reset_auth_token_state()  # which other tests have set
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


class Nodes:
    """Several nodes of Ray on this machine, each with processes of its own."""

    def __init__(self, *cpus: int, **head: object) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], **head})
        self.others = [self.cluster.add_node(num_cpus=count) for count in cpus[1:]]
        self.env = {"RAY_ADDRESS": self.cluster.address, "RAY_AUTH_MODE": "disabled"}

    def add(self, cpus: int = 1) -> None:
        self.others.append(self.cluster.add_node(num_cpus=cpus))

    def kill(self, number: int = -1) -> None:
        """Kill all processes of a node, not the head, with SIGKILL."""
        self.cluster.remove_node(self.others.pop(number), allow_graceful=False)


@pytest.fixture
def nodes(monkeypatch):
    """Start nodes with these numbers of CPUs, the head first."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reset_auth_token_state()  # an earlier Ray of this process had a token
    started = []

    def start(*cpus: int, **head: object) -> Nodes:
        started.append(Nodes(*cpus, **head))
        return started[-1]

    yield start
    for each in started:
        each.cluster.shutdown()


def ps() -> list[str]:
    return subprocess.run(
        ["ps", "-eo", "pid,args", "ww"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
