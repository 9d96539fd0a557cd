"""A Ray Train trainer that can be aborted."""

import os
import threading
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.util.placement_group import remove_placement_group

from raycifar.cluster import ray_internals

GRACE_SECONDS = 3  # for the controller to end the workers and itself
LOOK_SECONDS = 0.1


class AbortedError(Exception):
    """The run was aborted by `StoppableTrainer.abort`."""


class TiedToDriver(ray_internals.controller_callback_class()):  # type: ignore[misc]
    """Lets the driver end Ray Train's controller, and ends the controller once the driver is gone.

    When a driver ends, Ray first releases its job's reservations, and then ends the job's processes one by one. A
    controller that notices the first would reserve resources again, which nothing would ever release.
    """

    def __init__(self, key: str) -> None:
        self.key = key  # under which the driver finds the controller

    def after_controller_start(self, train_run_context: Any) -> None:
        context = ray.get_runtime_context()
        ray_internals.kv_put(self.key, cloudpickle.dumps((context.get_actor_id(), context.current_actor)))

    def on_controller_start_worker_group(self, **size: Any) -> None:
        if ray_internals.is_job_over():
            os._exit(1)


class StoppableTrainer(TorchTrainer):
    """A TorchTrainer whose `fit` another thread can abort, and whose controller ends with this process.

    Ray Train itself aborts a run only on SIGINT, in a script whose main thread waits in `fit`.

    Args:
        key: of the run, unique in the cluster, for `release`.
    """

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key
        self.run_config.callbacks = [*self.run_config.callbacks, TiedToDriver(controller_key(key))]
        self.aborted, self.ended = threading.Event(), threading.Event()

    def _create_default_callbacks(self) -> list[Any]:
        return ray_internals.without_cleaner(super()._create_default_callbacks())

    @property
    def in_process(self) -> bool:
        return self.scaling_config.num_workers == 0

    def fit(self) -> Result:
        """Train, or raise AbortedError once `abort` is called."""
        if self.aborted.is_set():
            raise AbortedError
        self.ended.clear()
        if not self.in_process:
            release(self.key)  # an earlier call's, or that of a process that died
            ray_internals.kv_put(controller_key(self.key), b"")
        try:
            return super().fit()
        except RayError as error:
            release(self.key)
            if self.aborted.is_set():
                raise AbortedError from error
            raise
        finally:
            self.ended.set()

    def abort(self) -> None:
        """Abort another thread's `fit` within seconds, end its workers, and release its resources.

        A run without workers, in this process, can't be aborted: `StatusStore.request_stop` asks it to stop.
        """
        self.aborted.set()
        while not self.in_process and not self.ended.wait(LOOK_SECONDS):
            if announced := ray_internals.kv_get(controller_key(self.key)):
                _, controller = cloudpickle.loads(announced)
                controller.abort.remote()
                if not self.ended.wait(GRACE_SECONDS):  # a controller that waits for resources doesn't react
                    release(self.key)
                    self.ended.wait(GRACE_SECONDS)


def controller_key(key: str) -> str:
    """Return the key under which a run's controller announces itself."""
    return f"raycifar/{key}/controller"


def release(key: str) -> None:
    """End a run's controller and workers, wherever they were started from, and release their resources."""
    if announced := ray_internals.kv_get(controller_key(key)):
        actor_id, controller = cloudpickle.loads(announced)
        ray.kill(controller)
        for group in ray_internals.placement_groups_of(actor_id):
            remove_placement_group(group)
