"""A run of Ray Train that its own process can end."""

import threading
import uuid
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.util.placement_group import remove_placement_group

from raycifar.cluster import ray_internals
from raycifar.cluster.controller_callbacks import TiedToDriver

GRACE_SECONDS = 3  # for the controller to end the workers and itself
LOOK_SECONDS = 0.1


class AbortedError(Exception):
    """`StoppableTrainer.abort` ended the run."""


class StoppableTrainer(TorchTrainer):
    """Ray Train's trainer, whose `fit` another thread can end, and whose controller ends with this process.

    Ray Train's own way to end a run is a handler of SIGINT, for scripts whose main thread waits in `fit`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = f"raycifar/{uuid.uuid4().hex}/controller"
        self.run_config.callbacks = [*self.run_config.callbacks, TiedToDriver(self.key)]
        self.aborted, self.ended = threading.Event(), threading.Event()

    @property
    def in_process(self) -> bool:
        return self.scaling_config.num_workers == 0

    def fit(self) -> Result:
        """Train, as Ray Train does.

        Raises:
            AbortedError: `abort` was called.
        """
        if self.aborted.is_set():
            raise AbortedError
        self.ended.clear()
        if not self.in_process:
            ray_internals.kv_put(self.key, b"")  # a controller of an earlier call is gone
        try:
            return super().fit()
        except RayActorError as error:
            if self.aborted.is_set():
                raise AbortedError from error
            raise
        finally:
            self.ended.set()

    def abort(self) -> None:
        """End a `fit` that another thread waits for, and its workers, within seconds; what it reserved is free again.

        A run in this process, without workers, can't be ended: `StatusStore.request_stop` asks it to stop.
        """
        self.aborted.set()
        while not self.in_process and not self.ended.wait(LOOK_SECONDS):
            if announced := ray_internals.kv_get(self.key):
                self.end(*cloudpickle.loads(announced))

    def end(self, controller_id: str, controller: Any) -> None:
        """End a controller and what it has started."""
        controller.abort.remote()
        if not self.ended.wait(GRACE_SECONDS):  # while it waits for room, it does not hear that
            ray.kill(controller)
            self.ended.wait(GRACE_SECONDS)
        for group in ray_internals.placement_groups_of(controller_id):
            remove_placement_group(group)
