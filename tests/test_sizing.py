"""How many workers fit on GPUs, whole and shared, of any kind and of one; Ray only says that there are some."""

import time
from contextlib import ExitStack

import pytest
import ray
import torch.distributed as dist
from command import Command, finish
from ray.util.placement_group import placement_group, remove_placement_group

from raycifar.cluster import sizing
from raycifar.cluster.sizing import HEAD as ON_HEAD
from raycifar.cluster.sizing import Workers, describe, placeable, size_trials, size_workers
from raycifar.cluster.waiting import lacking
from raycifar.errors import RequestError
from raycifar.storage.run_folder import RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.training import allocate_workers, begin, fit, read_inputs
from raycifar.workflows.training_run import TrainingRun

A100 = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:A100": 1.0}
L4 = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
HEAD = {"CPU": 2.0}
CNN = ("--model", "cnn", "--data", "synthetic", "--limit", 200, "--val-size", 100, "--epochs", 1, "--no-report")


def wait_while(running):
    while running():
        time.sleep(0.1)


@pytest.fixture
def cluster_of(monkeypatch):
    """Have the cluster consist of these nodes, and an autoscaler that may add others."""

    def consist(*nodes, to_come=()):
        monkeypatch.setattr(sizing, "alive_nodes", lambda: list(nodes))
        monkeypatch.setattr(sizing, "nodes_to_come", lambda: list(to_come))

    return consist


@pytest.mark.parametrize(("there", "to_come"), [(0, 4), (1, 3), (4, 0), (5, 0)])
def test_an_autoscaler_adds_no_more_nodes_than_it_may_in_all(there, to_come, monkeypatch):
    small, large = {"CPU": 2}, {"CPU": 8, "GPU": 1}
    kinds = {"ray.head.default": {"resources": small}, "small": {"resources": small, "max_workers": 1}}
    kinds |= {name: {"resources": large, "max_workers": 3} for name in ("spot", "on_demand")}
    config = {"max_workers": 4, "available_node_types": kinds}
    monkeypatch.setattr(sizing.ray_internals, "autoscaler_config", lambda: config)
    monkeypatch.setattr(sizing, "alive_nodes", lambda: [{**small, ON_HEAD: 1}, *[large] * there])
    coming = sizing.nodes_to_come()
    assert placeable(coming, {"GPU": 1}) == to_come
    assert coming.count({"CPU": 2, "GPU": 0}) == min(1, to_come)


@pytest.mark.parametrize(
    ("share", "fit"), [(1, 3), (0.6, 3), (0.5, 6), (0.4, 6), (0.3333, 9), (0.3, 9), (0.1, 30), (0.05, 60)]
)
def test_a_share_is_of_one_gpu(share, fit):
    assert placeable([A100, L4, HEAD], {"GPU": share}) == fit
    assert placeable([{"GPU": 1.4}], {"GPU": 0.4}) == 3


def test_a_worker_takes_a_gpu_and_its_part_of_the_cpus(cluster_of):
    cluster_of(HEAD, A100, L4)
    assert size_workers(None, "auto", None, 1, None) == Workers(3, 4, 1)
    assert size_workers(None, "cpu", None, 1, None) == Workers(1, 15)
    assert size_workers(6, "auto", None, 0.5, None) == Workers(6, 4, 0.5)
    assert size_workers(None, "auto", None, 0.5, None) == Workers(1, 4, 0.5)  # several would be packed on one GPU
    assert size_workers(30, "auto", None, 0.1, None) == Workers(30, 0.8, 0.1)
    assert size_workers(6, "auto", None, 1 / 6, None).gpus == 0.1666


def test_workers_keep_to_the_kind_of_gpu_that_is_asked_for(cluster_of):
    cluster_of(HEAD, A100, L4)
    workers = size_workers(None, "auto", None, 1, "A100")
    assert workers == Workers(2, 4, 1, "A100")
    assert workers.resources == {"CPU": 4, "GPU": 1, "accelerator_type:A100": 0.001}
    assert describe(workers.resources) == "4 CPUs, 1 GPU, A100"
    with pytest.raises(RequestError, match="--accelerator H100: this cluster has A100, L4"):
        size_workers(1, "auto", None, 1, "H100")
    with pytest.raises(RequestError, match="has 16 CPUs, 2 GPUs, room for at most 2 of them"):
        size_workers(3, "auto", None, 1, "A100")
    cluster_of(HEAD, to_come=[L4] * 4)
    assert size_workers(4, "auto", None, 1, "L4") == Workers(4, 4, 1, "L4")
    with pytest.raises(RequestError, match="this cluster can have L4"):
        size_workers(1, "auto", None, 1, "A100")


@pytest.mark.parametrize("wanted", [{"gpus": 0.5}, {"accelerator": "H100"}])
def test_who_asks_for_a_part_or_a_kind_of_gpu_gets_no_cpu_instead(cluster_of, wanted):
    cluster_of(HEAD)
    with pytest.raises(RequestError, match=r"0 GPUs, room for at most 0|no GPU whose kind Ray knows"):
        size_workers(None, "auto", None, **{"gpus": 1, "accelerator": None, **wanted})


@pytest.mark.parametrize(
    ("gpus", "accelerator", "workers", "at_once"),
    [(1, None, 1, 3), (0.25, None, 1, 12), (0.25, "L4", 1, 4), (0.25, None, 2, 6), (1, "A100", 2, 1)],
)
def test_trials_share_gpus(cluster_of, gpus, accelerator, workers, at_once):
    cluster_of(HEAD, A100, L4)
    each, fit = size_trials(workers, "auto", None, gpus, accelerator, trials=100)
    assert (each.count, each.gpus, each.accelerator, fit) == (workers, gpus, accelerator, at_once)


@pytest.mark.parametrize(("gigabytes", "trials"), [(1, 1), (5, 2), (64, 32)])
def test_the_head_s_memory_bounds_the_trials_whose_drivers_run_there(cluster_of, gigabytes, trials):
    cluster_of({**A100, "memory": 500e9}, {**HEAD, "memory": gigabytes * 1e9, "node:__internal_head__": 1.0})
    assert sizing.trials_on_head() == trials


@pytest.mark.parametrize("ask", [size_workers, lambda *each: size_trials(*each, trials=6)])
def test_more_workers_than_cpus_can_be_shared_among_are_refused(cluster_of, ask):
    cluster_of(HEAD)
    with pytest.raises(RequestError, match="1000 workers can't share 2 CPUs: set --workers to at most 8"):
        ask(1000, "auto", None, 1, None)


def test_workers_that_may_share_a_gpu_are_told_from_others():
    assert Workers(2, 4, 0.5).share_gpus
    assert not Workers(2, 4, 0.6).share_gpus
    assert not Workers(1, 4, 0.25).share_gpus
    assert not Workers(2, 4).share_gpus


@pytest.mark.slow  # by itself: in a process that has used another Ray, the second one doesn't start its controller
def test_ray_places_shares_and_kinds_as_they_are_counted(nodes, tmp_path):
    two = nodes(8, num_gpus=2, resources={"accelerator_type:A100": 1})
    for options, says in (
        (("--gpus-per-worker", 0.4, "--workers", 5), "5 workers of 2 CPUs, 0.4 GPUs each can't be placed"),
        (("--gpus-per-worker", 0), "--gpus-per-worker 0: it must be a share of a GPU"),
        (("--gpus-per-worker", "nan"), "gpus_per_worker is nan: a finite number is needed"),
        (("--gpus-per-worker", 0.5, "--device", "cpu"), "is for workers on GPUs"),
        (("--accelerator", "H100"), "--accelerator H100: this cluster has A100."),
    ):
        refused = finish(Command(*CNN, *options, storage=tmp_path / "runs", env=two.env), 2)
        assert says in refused.stderr
    assert not (tmp_path / "runs").exists()

    ray.init(address=two.env["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    try:
        workers = size_workers(4, "auto", None, 0.4, "A100")
        assert workers.resources == {"CPU": 2, "GPU": 0.4, "accelerator_type:A100": 0.001}
        assert (placeable(sizing.alive_nodes(), workers.resources)) == 4
        for count, fits in ((5, False), (4, True)):
            group = placement_group([workers.resources] * count)
            assert group.wait(5) == fits
            remove_placement_group(group)

        request = TrainingRequest.of(
            "cnn", data="synthetic", limit=200, val_size=100, workers=2, gpus_per_worker=0.5, accelerator="A100",
            storage=str(tmp_path), name="a",
        )  # fmt: skip
        connection = ExitStack()
        folder, screen = RunFolder(request.storage, request.name), Screen(quiet=True)
        workers = allocate_workers(request, folder, screen, connection, debug=False)
        run = TrainingRun(request, folder, read_inputs(request, screen), workers)
        begin(run, screen)

        def loop(config):  # the GPU is there in name only
            return dist.get_backend(), ray.get_gpu_ids()

        assert fit(run, wait_while, loop) == ("gloo", [0])
        assert run.folder.read_json("run.json")["gpus_per_worker"] == 0.5
    finally:
        ray.shutdown()


def test_only_room_for_the_workers_is_taken_for_theirs(local_ray):
    """Ray Tune reserves room for each trial's driver, in the same job."""
    drivers, workers = placement_group([{ON_HEAD: 0.001}]), placement_group([{"CPU": 1.0}])
    try:
        ray.get([drivers.ready(), workers.ready()])
        assert "waiting for 1 worker of 4 CPUs" in lacking(Workers(1, 4.0))
        assert lacking(Workers(1, 1.0)) is None
    finally:
        remove_placement_group(drivers)
        remove_placement_group(workers)
