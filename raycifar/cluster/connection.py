"""Joining or starting Ray, and leaving it as it was."""

import logging
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.job_config import JobConfig

from raycifar.cluster import ray_internals
from raycifar.errors import RequestError, WorkError, in_a_line
from raycifar.machine import available_cpus, private_folder

CONNECT_SECONDS = 10
MAX_FOLDER_BYTES = 40  # Ray's sockets lie 64 below, and macOS takes 104 for a socket's path


@contextmanager
def connected(*, debug: bool, name: str | None = None) -> Iterator[None]:
    """Use the caller's Ray, else a cluster (RAY_ADDRESS, or this user's `ray start`), else start a new Ray.

    The caller's Ray keeps running; any other is left at the end. Changes to this process are undone.

    Args:
        debug: let Ray log to this process's output.
        name: of the job, in the dashboard of a cluster that is joined.

    Raises:
        RequestError: RAY_ADDRESS isn't a cluster's address, or RAY_TMPDIR can't be used.
        WorkError: the cluster can't be reached or joined, or Ray can't be started.
    """
    with ExitStack() as undo:
        undo.enter_context(quiet(debug=debug))
        joined = ray.is_initialized()
        if not joined:
            undo.callback(ray_internals.read_token_again)
        undo.callback(restore_environment, dict(os.environ))
        if not joined:
            if not debug:
                undo.enter_context(ray_internals.without_error_echo())
            undo.callback(ray.shutdown)
            options = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
            if address := cluster_address():
                join(address, job_config=JobConfig(metadata={"job_name": name} if name else {}), **options)
            else:
                start(include_dashboard=False, **options)
        yield


def cluster_address() -> str | None:
    """Return the address of the cluster to join: RAY_ADDRESS, or where this user's `ray start` has made this a node."""
    given = os.environ.get("RAY_ADDRESS")
    return None if given == "local" else given or ray_internals.own_cluster()


def start(**options: Any) -> None:
    """Start a Ray that only this user can use: on loopback, with a token, and its files in a private folder.

    Raises:
        RequestError: RAY_TMPDIR can't be used. WorkError: Ray doesn't start.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray_internals.read_token_again()
    folder = ray_folder()
    try:
        with ray_internals.loopback_alone():
            init(address="local", num_cpus=available_cpus(), _node_ip_address="127.0.0.1", _temp_dir=folder, **options)
    except Exception as error:  # many kinds; with any of them, Ray can't start
        raise WorkError(f"Ray can't be started here: {in_a_line(error)}. Its logs are in {folder}.") from error


def ray_folder() -> str:
    """Return the folder for the sockets and logs of a new Ray, in RAY_TMPDIR or the temporary folder.

    Raises:
        RequestError: RAY_TMPDIR is too long, or can't be written to.
    """
    given = os.environ.get("RAY_TMPDIR")
    parent = given or tempfile.gettempdir()
    if len(os.fsencode(parent)) + len(f"/ray-{os.getuid()}/ray") > MAX_FOLDER_BYTES:
        if given:
            raise RequestError(
                f"RAY_TMPDIR={given} is too long: the paths of Ray's sockets have a limit of 107 bytes. Set it to a "
                "shorter one, such as /tmp."
            )
        parent = "/tmp"
    try:
        # Ray opens its folder to all users, so the folder lies in a private one.
        return str(private_folder("ray", parent) / "ray")
    except OSError as error:
        raise RequestError(
            f"{parent} can't be written to ({error.strerror}): set RAY_TMPDIR to a short path, for Ray's files."
        ) from error


def join(address: str, **options: Any) -> None:
    """Join a running cluster.

    Raises:
        RequestError: that isn't the address of one. WorkError: it can't be reached or joined.
    """
    given = os.environ.get("RAY_ADDRESS")
    where = f"{address} (RAY_ADDRESS)" if given else "this machine"
    match = re.fullmatch(r"([^/\s]+):(\d{1,5})", address)
    if not match and address != "auto":
        raise RequestError(
            f"RAY_ADDRESS={address} isn't the address of a Ray cluster: give HOST:PORT, such as 10.0.0.1:6379, or use "
            "`ray job submit` to run on a cluster from outside it."
        )
    try:
        if match:  # Ray would try for minutes
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_SECONDS).close()
            if not ray_internals.is_answered(address, CONNECT_SECONDS):
                raise TimeoutError(f"nothing there speaks Ray's protocol, or not within {CONNECT_SECONDS} s")
        if not given:
            ray_internals.use_own_token()
        init(address=address, **options)
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
    with ray_internals.entrypoint_without_secrets():
        ray.init(**options)
    if threading.current_thread() is threading.main_thread():  # in other threads, Ray sets no handler
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def quiet(*, debug: bool) -> Iterator[None]:
    """Keep Ray's log messages out of this process's output."""
    # raycifar itself reports trials and jobs that fail.
    levels = {"ray": logging.ERROR, "ray.tune": logging.CRITICAL, "ray.data": logging.CRITICAL} if not debug else {}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def restore_environment(before: dict[str, str]) -> None:
    """Restore the former values of the variables that are set for Ray, or by Ray in this process."""
    for name in os.environ.keys() | before.keys():
        if name.startswith(("RAY_", "TUNE_")) or name == "PYTHONBREAKPOINT":
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)
