"""Watching over Ray's own processes: when one dies, Ray's calls wait for a minute, and then end the caller."""

import os
import socket
import time

from raycifar.cluster import ray_internals
from raycifar.errors import RayDiedError

LOOK_SECONDS = 1
RESTARTED = (
    "RAY_gcs_rpc_server_reconnect_timeout_s"  # set where a control service that died is started again, by KubeRay
)


class RayWatch:
    """Raises an error once a process of Ray doesn't listen any more."""

    def __init__(self) -> None:
        self.processes = ray_internals.control_processes()
        self.patience = float(os.environ.get(RESTARTED, 0)) * 0.8
        self.looked = self.answered = time.monotonic()

    def look(self) -> None:
        """Look, at most once a second.

        Raises:
            RayDiedError: a process has died.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        dead = [name for name, address in self.processes.items() if not listens(address)]
        if not dead:
            self.answered = now
        elif now - self.answered >= self.patience:
            raise RayDiedError(
                f"Ray's {dead[0]} has died, and this run's processes with it. The same command continues from the last "
                "checkpoint."
            )


def listens(address: tuple[str, int]) -> bool:
    """Return False if nothing listens at an address; a machine that doesn't answer may only be slow."""
    try:
        socket.create_connection(address, timeout=LOOK_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass
    return True
