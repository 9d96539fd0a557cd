"""What a request would train, on what and for how long, without starting anything."""

import time
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING

from raycifar import models
from raycifar.cluster.connection import cluster_address
from raycifar.engine.order import steps_per_epoch
from raycifar.storage.run_folder import RunFolder
from raycifar.workflows.identity import Inputs, earlier_result, identify, overview
from raycifar.workflows.requests import TrainingRequest
from raycifar.workflows.training import allocate_workers, read_inputs

if TYPE_CHECKING:
    from raycifar.terminal import Screen

PASSES = 3  # forward passes that a training step takes the time of: one forward, two back
PROBE = 2048  # rows of the matrices by whose product the machine's rate is measured


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
    """Return about how long training takes on this machine's CPU, from its rate in matrix products, in words."""
    import torch

    from raycifar.engine.hardware import choose_precision, find_device

    if request.device != "cpu" and find_device("auto").type != "cpu":
        return "on a GPU: raycifar bench measures it"
    dtype = choose_precision(request.recipe.precision, torch.device("cpu"))
    a, b = torch.ones(2, PROBE, PROBE, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    num_images = request.recipe.epochs * len(inputs.splits.train)
    seconds = PASSES * num_images * models.flops(inputs.start.architecture) * min(times) / (2 * PROBE**3)
    return f"about {timedelta(seconds=round(seconds))} on this machine's CPU, training alone"
