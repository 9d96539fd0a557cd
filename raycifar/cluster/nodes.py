"""Checks that a run's nodes are compatible. Workers import this module, so it stays small."""

import platform
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raycifar
from raycifar.cluster.sizing import Workers, placeable
from raycifar.errors import RequestError, in_a_line
from raycifar.storage.remote import tell
from raycifar.words import count

LOOK_SECONDS = 1  # between two looks at which nodes have answered
MIN_SECONDS = 60  # for them to answer: the first task on a node imports PyTorch
MUST_AGREE = ("python", "ray", "torch", "raycifar")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on.

    These versions are the ones in use: the packages in a job's working directory take precedence over installed ones.
    Builds of one version for different hardware count as one.
    """
    import numpy
    import torch
    import torchvision

    packages = {package.__name__: package.__version__ for package in (raycifar, ray, torch, torchvision, numpy)}
    return {"python": platform.python_version()} | {name: text.split("+")[0] for name, text in packages.items()}


def objection(file: str | None, expected: dict[str, str]) -> str | None:
    """Return why this node can't take part in a run, or None.

    Args:
        file: path of a file that the driver has written to the run's storage.
        expected: the driver's `versions`.
    """
    own = versions()
    different = [name for name in MUST_AGREE if own[name] != expected[name]]
    if different:
        here, there = (", ".join(f"{name} {of[name]}" for name in different) for of in (own, expected))
        return f"it has {here}, but the driver has {there}: install the same versions on all nodes"
    if file and not Path(file).exists():
        return f"it can't see {Path(file).parent}: give --storage a URI, such as s3://bucket/runs, or a shared folder"
    return None


def check_nodes(workers: Workers, file: str | None, seconds: float) -> None:
    """Raise RequestError, and say why, if another node which could hold a worker can't take part.

    Args:
        seconds: for the nodes to answer, which may first have to install what the job brings along.
    """
    here = ray.get_runtime_context().get_node_id()
    asked = {
        ray.remote(objection)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(file, versions()): node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and placeable([node["Resources"]], workers.resources)
    }
    seconds = max(MIN_SECONDS, seconds)
    waiting, ends = list(asked), time.monotonic() + seconds
    while waiting and time.monotonic() < ends:
        tell.get()(f"waiting for {count(len(waiting), 'node')} to load the code, for at most {seconds:g} s (--wait)")
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_SECONDS)
    for question, node in asked.items():
        try:
            late = f"it didn't answer within {seconds:g} s (--wait)"
            complaint = late if question in waiting else ray.get(question, timeout=0)
        except Exception as error:
            complaint = f"it can't run raycifar ({in_a_line(error)}): submit the job with its code, or install it there"
        if complaint:
            raise RequestError(f"Node {node['NodeManagerAddress']} can't take part: {complaint}.")
