"""Joining Ray, or starting it, and leaving it as it was."""

import logging
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from raycifar.cluster import ray_internals
from raycifar.errors import WorkError

CONNECT_SECONDS = 10


@contextmanager
def connected(*, debug: bool, dashboard: bool = False) -> Iterator[None]:
    """Be connected to Ray: the caller's, else a cluster (RAY_ADDRESS, or `ray start` on this machine), else a new one.

    The caller's Ray keeps running. What was joined or started here is left at the end, and what was changed in this
    process is as it was before.

    Args:
        debug: let Ray log to this process's output.
        dashboard: run one in a Ray that is started here. It takes time, but Ray Train cleans up after a training
            driver that died only where there is one.

    Raises:
        WorkError: the cluster refuses, or can't be reached.
    """
    with ExitStack() as undo:
        undo.enter_context(quiet(debug=debug))
        undo.callback(restore_environment, dict(os.environ))
        if not ray.is_initialized():
            if not debug:
                undo.enter_context(ray_internals.without_error_echo())
            undo.callback(ray.shutdown)
            connect(debug=debug, dashboard=dashboard)
        yield


def connect(*, debug: bool, dashboard: bool) -> None:
    options = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if not address and not ray_internals.is_part_of_cluster():
        init(address="local", include_dashboard=dashboard, _node_ip_address="127.0.0.1", **options)
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard then shows the run
    where = f"{address} (RAY_ADDRESS)" if address else "this machine"
    try:
        if address and (match := re.fullmatch(r"([^/]+):(\d+)", address)):  # Ray itself would try for ten minutes
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_SECONDS).close()
        init(address="auto", **options)
    except (OSError, ray.exceptions.AuthenticationError) as error:  # Ray's ConnectionError is an OSError
        if "authentication token" in "".join(traceback.format_exception(error)).lower():
            raise WorkError(
                f"the Ray cluster at {where} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's own."
            ) from error
        raise WorkError(f"the Ray cluster at {where} can't be reached: {error}.") from error
    except RuntimeError as error:  # other versions of Ray or Python
        reason = " ".join(str(error).split())
        raise WorkError(f"the Ray cluster at {where} can't be joined: {reason.rstrip('.')}.") from error


def init(**options: Any) -> None:
    """Call `ray.init`, and keep this process's own answer to SIGTERM: Ray's writes a stack and aborts."""
    if threading.current_thread() is not threading.main_thread():  # then Ray sets none
        ray.init(**options)
        return
    answer = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    signal.signal(signal.SIGTERM, answer)


@contextmanager
def quiet(*, debug: bool) -> Iterator[None]:
    """Leave what Ray logs in this process to its log files."""
    wanted = {} if debug else {"ray": logging.ERROR, "ray.tune": logging.CRITICAL}  # a failed trial is ours to report
    before = {name: logging.getLogger(name).level for name in wanted}
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def restore_environment(before: dict[str, str]) -> None:
    """Give the variables that Ray sets in its caller's process their former values."""
    for name in os.environ.keys() | before.keys():
        if name.startswith("RAY_") or name == "PYTHONBREAKPOINT":
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
