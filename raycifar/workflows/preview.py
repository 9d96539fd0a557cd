"""What a request would train, on what and for how long, without starting anything."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from raycifar.cluster.connection import cluster_address
from raycifar.durations import duration
from raycifar.engine.order import steps_per_epoch
from raycifar.storage.run_folder import RunFolder
from raycifar.workflows.estimate import cpu_seconds, operations_of
from raycifar.workflows.identity import Inputs, earlier_result, identify, overview
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.training import allocate_workers, read_inputs

if TYPE_CHECKING:
    from raycifar.terminal import Screen


def preview(request: TrainingRequest, screen: "Screen", connection: ExitStack, *, debug: bool = False) -> None:
    """Show recipe, data, split, workers and an estimate of the time; write nothing, and start no Ray.

    Raises:
        RequestError: the request is wrong.
        WorkError: the cluster can't be reached.
    """
    folder = RunFolder(request.storage, request.name)
    with screen.waiting(f"Reading {request.data}"):
        inputs = read_inputs(request)
        identity = identify(request, inputs)
    screen.lines(inputs.start.notes)
    finished = earlier_result(folder, identity)
    if request.workers == 0 or cluster_address():
        workers = str(allocate_workers(request, folder, connection, debug=debug))
    else:
        unchecked = f"; whether it has {request.accelerator} can't be told before" if request.accelerator else ""
        workers = f"{request.workers or 'one'}, in a Ray that is started on this machine{unchecked}"
    num_steps = steps_per_epoch(len(inputs.splits.train), request.recipe.batch_size)
    facts = {**overview(identity, workers, folder.folder), "steps": f"{num_steps:,} in each epoch"}
    screen.facts(request.name, facts | {"time": estimate(request, inputs)})
    screen.say("This run is finished: nothing would be trained." if finished else "Nothing was started.")


def estimate(request: TrainingRequest, inputs: Inputs) -> str:
    """Return about how long training takes on this machine's CPUs, in words."""
    from raycifar.engine.hardware import find_device

    if request.device != "cpu" and find_device("auto").type != "cpu":
        return "on a GPU: raycifar bench measures it"
    operations = operations_of(request.recipe, inputs.start.architecture, inputs.splits)
    return f"about {duration(cpu_seconds(operations, request.recipe))} on this machine's CPU"
