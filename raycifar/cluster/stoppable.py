"""A Ray Train trainer that can be aborted."""

import threading
import uuid
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.util.placement_group import remove_placement_group

from raycifar.cluster import ray_internals
from raycifar.cluster.controller_callbacks import TiedToDriver

GRACE_SECONDS = 3  # for the controller to end the workers and itself
LOOK_SECONDS = 0.1


class AbortedError(Exception):
    """The run was aborted by `StoppableTrainer.abort`."""


class StoppableTrainer(TorchTrainer):
    """A TorchTrainer whose `fit` another thread can abort, and whose controller ends with this process.

    Ray Train itself aborts a run only on SIGINT, in a script whose main thread waits in `fit`.
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
        """Train.

        Raises:
            AbortedError: `abort` was called.
        """
        if self.aborted.is_set():
            raise AbortedError
        self.ended.clear()
        if not self.in_process:
            ray_internals.kv_put(self.key, b"")  # forget an earlier call's controller
        try:
            return super().fit()
        except RayError as error:
            if self.aborted.is_set():
                raise AbortedError from error
            self.release()
            raise
        finally:
            self.ended.set()

    def abort(self) -> None:
        """Abort another thread's `fit` within seconds, end its workers, and release its resources.

        A run without workers, in this process, can't be aborted: `StatusStore.request_stop` asks it to stop.
        """
        self.aborted.set()
        while not self.in_process and not self.ended.wait(LOOK_SECONDS):
            if announced := ray_internals.kv_get(self.key):
                _, controller = cloudpickle.loads(announced)
                controller.abort.remote()
                if not self.ended.wait(GRACE_SECONDS):  # a controller that waits for resources doesn't react
                    ray.kill(controller)
                    self.ended.wait(GRACE_SECONDS)
                self.release()

    def release(self) -> None:
        """Release the resources of a controller that has ended, and end workers that are left."""
        if announced := ray_internals.kv_get(self.key):
            for group in ray_internals.placement_groups_of(cloudpickle.loads(announced)[0]):
                remove_placement_group(group)
