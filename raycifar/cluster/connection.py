"""Joining or starting Ray, and leaving it as it was."""

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
    """Use the caller's Ray, else a cluster (RAY_ADDRESS, or `ray start` on this machine), else start a new Ray.

    The caller's Ray keeps running; any other is left at the end. Changes to this process are undone.

    Args:
        debug: let Ray log to this process's output.
        dashboard: start a new Ray with its dashboard. It takes time, but Ray Train needs it to clean up after a
            training driver that died.

    Raises:
        WorkError: the cluster can't be reached or joined.
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
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # for the dashboard to show the run
    where = f"{address} (RAY_ADDRESS)" if address else "this machine"
    try:
        if address and (match := re.fullmatch(r"([^/]+):(\d+)", address)):  # Ray would try for ten minutes
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_SECONDS).close()
        init(address="auto", **options)
    except (OSError, ray.exceptions.AuthenticationError) as error:  # Ray's ConnectionError is an OSError
        if "authentication token" in "".join(traceback.format_exception(error)).lower():
            raise WorkError(
                f"the Ray cluster at {where} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's token."
            ) from error
        raise WorkError(f"the Ray cluster at {where} can't be reached: {error}.") from error
    except RuntimeError as error:  # versions of Ray or Python differ
        reason = " ".join(str(error).split())
        raise WorkError(f"the Ray cluster at {where} can't be joined: {reason.rstrip('.')}.") from error


def init(**options: Any) -> None:
    """Call `ray.init`, and keep this process's handler of SIGTERM: Ray's prints a stack trace and aborts."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():  # in other threads, Ray sets no handler
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def quiet(*, debug: bool) -> Iterator[None]:
    """Keep Ray's log messages out of this process's output."""
    # raycifar itself reports trials and jobs that fail.
    quieted = {"ray": logging.ERROR, "ray.tune": logging.CRITICAL, "ray.data": logging.CRITICAL}
    wanted = {} if debug else quieted
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
    """Set environment variables temporarily."""
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
