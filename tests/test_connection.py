"""Connecting leaves this process as it was, and works again."""

import logging
import os
import subprocess
import sys

from raycifar.cluster.connection import environment, quiet

TWICE = """
import logging, os, ray
from ray._private import worker
from raycifar.cluster.connection import connected

def state():
    return logging.getLogger("ray").level, worker.print_to_stdstream, dict(os.environ), ray.is_initialized()

ray.logger
before = state()
for _ in range(2):
    with connected(debug=False):
        assert ray.is_initialized()
        assert worker.print_to_stdstream is not before[1]
    assert state() == before, (state(), before)
print("twice")
"""


def test_connecting_twice_in_a_process_works_and_leaves_nothing_behind():
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", TWICE], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "twice\n", done.stderr


def test_ray_is_quiet_for_a_while():
    logger = logging.getLogger("ray.tune")
    before = logger.level
    with quiet(debug=False):
        assert logger.level == logging.CRITICAL
    assert logger.level == before
    with quiet(debug=True):
        assert logger.level == before


def test_the_environment_is_as_it_was_afterwards(monkeypatch):
    monkeypatch.setenv("A", "1")
    monkeypatch.delenv("B", raising=False)
    with environment(A="2", B="3"):
        assert (os.environ["A"], os.environ["B"]) == ("2", "3")
    assert os.environ["A"] == "1"
    assert "B" not in os.environ
