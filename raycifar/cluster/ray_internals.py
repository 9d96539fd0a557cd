"""What raycifar uses of Ray's private parts."""

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController


class StoppableTrainer(TorchTrainer):
    """A trainer whose run can be ended from another thread: Ray Train's own way is SIGINT, in the main thread alone."""

    controller: Any = None

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        node = ray.get_runtime_context().get_node_id()
        actor = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node})(TrainController)
        self.controller = actor.remote(**options)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())

    def abort(self) -> None:
        if self.controller:
            self.controller.abort.remote()
