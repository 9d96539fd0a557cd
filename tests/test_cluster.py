"""Which Ray is joined."""

import subprocess
import sys

from raycifar import cluster

OTHER = """
import ray
ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False)
print("up", flush=True)
input()
"""


def test_the_ray_that_another_program_runs_for_itself_is_left_alone(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    other = subprocess.Popen([sys.executable, "-c", OTHER], **pipes)
    try:
        assert other.stdout.readline() == "up\n"
        assert not cluster.started_here()
    finally:
        other.communicate("\n")
