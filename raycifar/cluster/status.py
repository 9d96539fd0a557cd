"""What a run's processes let the driver know while it runs: each topic's latest value.

In a cluster it is kept in Ray's own key-value store, so it costs no process and reaches over nodes;
without one, in this process.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

STARTING = "starting the workers"  # the phase before there is a worker to tell of one

_here: dict[str, bytes] = {}


@dataclass(frozen=True)
class StatusStore:
    """The status_store of one invocation of one run; `key` is unique to it."""

    key: str

    def put(self, topic: str, value: Any) -> None:
        content = json.dumps(value).encode()
        if in_a_cluster():
            from ray.experimental import internal_kv

            internal_kv._internal_kv_put(f"raycifar/{self.key}/{topic}", content, overwrite=True)
        else:
            _here[f"{self.key}/{topic}"] = content

    def get(self, topic: str) -> Any:
        """Return the topic's latest value, or None."""
        if in_a_cluster():
            from ray.experimental import internal_kv

            content = internal_kv._internal_kv_get(f"raycifar/{self.key}/{topic}")
        else:
            content = _here.get(f"{self.key}/{topic}")
        return None if content is None else json.loads(content)

    def request_stop(self) -> None:
        """Ask the run to save what it has trained, and to end."""
        self.put("stop", True)

    def stop_requested(self) -> bool:
        return bool(self.get("stop"))


def in_a_cluster() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()
