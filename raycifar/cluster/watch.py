"""Watching over Ray's own processes: when one dies, Ray's calls wait for a minute, and then end the caller."""

import os
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from ray.exceptions import RpcError

from raycifar.cluster import ray_internals
from raycifar.errors import RayDiedError

T = TypeVar("T")

CONNECT_SECONDS = 1
RETRY_SECONDS = 0.1
RESTARTED = "RAY_gcs_rpc_server_reconnect_timeout_s"  # set by KubeRay, which starts a dead control service again


class RayWatch:
    """Notices when a process of Ray dies."""

    def __init__(self) -> None:
        self.processes = ray_internals.control_processes()
        self.answered = time.monotonic()

    def look(self) -> None:
        """Raise RayDiedError if a process no longer listens."""
        now = time.monotonic()
        dead = [name for name, address in self.processes.items() if not listens(address)]
        if not dead:
            self.answered = now
        elif now - self.answered >= patience():
            raise died(dead[0])


def answered(call: Callable[[], T]) -> T:
    """Repeat a call of Ray's control service until it is answered, or raise RayDiedError once the service has died."""
    began = time.monotonic()
    while True:
        try:
            return call()
        except RpcError:
            name, address = ray_internals.control_service()
            waited = time.monotonic() - began
            if not listens(address) and waited >= patience():
                raise died(name) from None
            if waited > max(60, patience()):
                raise
            time.sleep(RETRY_SECONDS)


def patience() -> float:
    """Return the seconds that Ray's control service may be away."""
    return float(os.environ.get(RESTARTED, 0)) * 0.8


def died(process: str) -> RayDiedError:
    return RayDiedError(f"Ray's {process} has died, and this run's processes with it.")


def listens(address: tuple[str, int]) -> bool:
    """Return False if nothing listens at an address; a machine that doesn't answer may only be slow."""
    try:
        socket.create_connection(address, timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass
    return True
