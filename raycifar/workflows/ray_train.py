"""Ray Train's trainer of a run: the same for one process, one machine and a cluster."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import fsspec
from pyarrow import fs
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from raycifar.cluster import ray_internals
from raycifar.cluster.failures import FailureCounter, StartFailureCounter, prepare_restart, reason_to_end
from raycifar.cluster.nodes import versions
from raycifar.cluster.status import Failure, FailureCause, StatusStore
from raycifar.cluster.stoppable import StoppableTrainer
from raycifar.data.shards import ExactShards, to_datasets
from raycifar.engine.config import TrainLoopConfig
from raycifar.errors import ResumableError, in_a_line
from raycifar.redaction import redact
from raycifar.workflows.training_run import TrainingRun

RESIZE_SECONDS = 15  # between two checks whether an elastic run can grow


def build_trainer(
    run: TrainingRun, loop: Callable[[dict[str, Any]], Any], options: Mapping[str, Any]
) -> StoppableTrainer:
    """Return Ray Train's trainer for the run.

    Args:
        loop: the workers' training function. options: fields that its configuration adds to `TrainLoopConfig`.
    """
    # Ray Train takes one report per poll, every 2 s by default; on a GPU, epochs are shorter than that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    workers, folder, splits = run.workers, run.folder, run.inputs.splits
    if workers.min_workers is not None:  # a node that has just died is still counted for a while: look again
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    tables = {name: table for name, table in splits.tables().items() if name != "test" or run.request.test}
    return StoppableTrainer(
        loop,
        key=run.status_store.key,
        train_loop_config={**vars(build_config(run)), **options},
        datasets=to_datasets(tables, range(workers.needed, workers.count + 1)),
        dataset_config=ExactShards(),
        scaling_config=ScalingConfig(
            num_workers=workers.count if workers.min_workers is None else (workers.min_workers, workers.count),
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.resources,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        # NCCL can't put two workers on one GPU; None lets Ray Train choose.
        torch_config=TorchConfig(backend="gloo" if workers.share_gpus else None),
        run_config=RunConfig(
            name=quote(folder.name),  # a tag of metrics, so in ASCII
            # Ray Train stores nothing: what it writes to see whether it could goes to this process's memory.
            storage_path="/raycifar",
            storage_filesystem=fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory"))),
            failure_config=FailureConfig(max_failures=-1),  # our callbacks count
            callbacks=[
                counter(run.status_store, run.request.max_failures) for counter in (FailureCounter, StartFailureCounter)
            ],
            logging_config=LoggingConfig("INFO" if run.debug else "ERROR"),
        ),
    )


def build_config(run: TrainingRun) -> TrainLoopConfig:
    request, inputs = run.request, run.inputs
    return TrainLoopConfig(
        folder=run.folder,
        status_store=run.status_store,
        initial=inputs.initial,
        recipe=replace(request.recipe, pretrained=redact(request.recipe.pretrained)),  # Ray's dashboard shows it
        seed=request.seed,
        superclass_of=inputs.source.superclass_of(),
        num_train_images=len(inputs.splits.train),
        num_val_images=len(inputs.splits.val),
        num_test_images=len(inputs.splits.test) if request.test else 0,
        gpus=run.workers.gpus,
        device="mps" if run.workers.mps else "cpu",
        threads=run.workers.threads,
        in_process=run.workers.count == 0,
        versions=versions(),
        compile=request.compile,
        track_examples=request.record,
        checkpoint_steps=request.checkpoint_steps,
        profile=request.profile,
        rungs=request.rungs,
        near_duplicates=inputs.near_duplicates() if request.test else None,
    )


def fit_with_restarts(trainer: StoppableTrainer, status_store: StatusStore, max_failures: int) -> Any:
    """Return the result of the training function; Ray Train's controller is started again when it dies.

    Raises:
        ResumableError: training failed, or there were more than `max_failures`.
    """
    while True:
        try:
            return trainer.fit().return_value
        except Exception as error:
            # What a callback in the controller raises, and a worker's death while Ray Train starts it, is wrapped.
            cause = getattr(error, "controller_failure", error)
            reason = in_a_line(cause)
            if isinstance(cause, RayActorError | OutOfMemoryError):
                memory = ray_internals.is_out_of_memory(cause)
                failure = Failure(FailureCause.MEMORY if memory else FailureCause.CONTROLLER, reason)
                died = f"Ray Train's controller died: {reason}"
                end = reason_to_end(failure, died, status_store, max_failures)
                if not end:
                    prepare_restart(failure, status_store)
                    continue
                reason = end
            raise ResumableError(f"training failed: {reason}.") from error
