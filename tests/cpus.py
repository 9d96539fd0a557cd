"""What is free of the session's Ray, and who has the rest."""

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from command import FORK, take_environment
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply


def free_cpus(env: dict[str, str]) -> float:
    """Return the CPUs of a Ray of one node that nobody has reserved, the fewest of two checks.

    What was asked for is given a moment after there is room.
    """
    here, there = FORK.Pipe()
    process = FORK.Process(target=answer, args=(env, there))  # of its own: a process has one token for good
    process.start()
    there.close()  # so that an answer that never comes is an error, and isn't waited for
    process.join()
    return here.recv()


def answer(env: dict[str, str], there: Connection) -> None:
    take_environment({**os.environ, **env})
    client, looks = GcsClient(address=env["RAY_ADDRESS"]), []
    for pause in (0, 0.5):
        time.sleep(pause)
        status = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10))
        (node,) = status.cluster_resource_state.node_states
        looks.append(node.available_resources.get("CPU", 0.0))
    there.send(min(looks))


def who_has_them(env: dict[str, str]) -> str:
    """Return all that tells why CPUs aren't free: reservations, actors, processes, Ray's own logs."""
    ray = [Path(sys.executable).with_name("ray"), "list", "--address", env["RAYCIFAR_TEST_DASHBOARD"], "--filter"]
    logs = Path(env["RAY_AUTH_TOKEN_PATH"]).parent / "session_latest/logs"
    commands = [
        [*ray, "STATE!=REMOVED", "placement-groups"],
        [*ray, "STATE!=DEAD", "actors"],
        ["ps", "-eo", "pid,ppid,ni,stat,pcpu,etime,args", "--sort=-pcpu"],
        ["tail", "-n", "40", logs / "gcs_server.out", logs / "raylet.out"],
    ]
    done = [
        subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
        for command in commands
    ]
    return "\n".join(process.stdout[:9_000] + process.stderr[-2_000:] for process in done)
