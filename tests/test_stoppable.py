"""A run that its own process ends: within seconds, while it trains and while it waits, and nothing stays reserved."""

import threading
import time
from pathlib import Path

import pytest
import ray
from conftest import wait_until
from ray.train import RunConfig, ScalingConfig
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from raycifar.cluster.connection import connected
from raycifar.cluster.stoppable import AbortedError, StoppableTrainer, release


def endless():
    """Return a training function without end; it travels to the workers whole, as they don't know this file."""

    def loop(config):
        Path(config["file"]).touch()
        while True:
            time.sleep(0.1)

    return loop


class Fit:
    """A `fit` in a thread of its own."""

    def __init__(self, folder, workers=1):
        self.file, self.outcome = folder / "began", []
        self.trainer = StoppableTrainer(
            endless(),
            train_loop_config={"file": str(self.file)},
            key=str(self.file),
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="a", storage_path=str(folder)),
        )
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            self.outcome.append(self.trainer.fit())
        except Exception as error:
            self.outcome.append(error)

    def abort(self):
        begun = time.monotonic()
        self.trainer.abort()
        self.thread.join(5)
        assert isinstance(self.outcome[0], AbortedError)
        return time.monotonic() - begun


def reserved():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.mark.slow  # under `uv run`, whose environment Ray copies for each worker of this process
def test_a_run_that_trains_is_ended(local_ray, tmp_path):
    run = Fit(tmp_path)
    wait_until(lambda: run.file.exists() or run.outcome, 60, "training")
    assert not run.outcome
    assert run.abort() < 15
    wait_until(lambda: ray.available_resources().get("CPU") == 1, 10, "the end of what was reserved")
    assert reserved() == []


@pytest.mark.slow
def test_what_a_driver_leaves_that_died_in_a_job_that_goes_on_is_released(local_ray, tmp_path):
    """As the driver of a comparison's trial does; no dashboard runs, nor a process that looks after it."""

    @ray.remote(num_cpus=0)
    class Driver:
        def fit(self, loop, key, folder):
            StoppableTrainer(
                loop,
                train_loop_config={"file": f"{folder}/began"},
                key=key,
                scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
                run_config=RunConfig(name="a", storage_path=folder),
            ).fit()

    driver = Driver.remote()
    driver.fit.remote(endless(), "left", str(tmp_path))
    wait_until((tmp_path / "began").exists, 60, "training")
    ray.kill(driver)
    time.sleep(3)
    assert ray.available_resources().get("CPU", 0) == 0
    release("left")
    wait_until(lambda: ray.available_resources().get("CPU") == 1, 10, "the end of what was reserved")
    assert reserved() == []


def test_a_run_that_waits_for_room_is_ended(local_ray, tmp_path):
    held = placement_group([{"CPU": 1}])
    ray.get(held.ready())
    run = Fit(tmp_path)
    wait_until(lambda: len(reserved()) == 2, 60, "the controller's request")
    assert run.abort() < 15
    assert [group["placement_group_id"] for group in reserved()] == [held.id.hex()]
    remove_placement_group(held)
    wait_until(lambda: ray.available_resources().get("CPU") == 1, 10, "the end of what was reserved")
    assert not run.file.exists()


def test_a_run_that_is_ended_before_it_begins_does_not_begin(local_ray, tmp_path):
    trainer = StoppableTrainer(endless(), key="a", run_config=RunConfig(storage_path=str(tmp_path)))
    trainer.ended.set()
    trainer.abort()
    with pytest.raises(AbortedError):
        trainer.fit()


def test_the_caller_s_ray_is_joined_and_left_as_it_was(local_ray):
    job = ray.get_runtime_context().get_job_id()
    with connected(debug=False):
        assert ray.get_runtime_context().get_job_id() == job
    assert ray.is_initialized()
