"""Work in a thread, while the caller's thread shows progress and handles Ctrl-C."""

from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

from raycifar.cluster.status import in_a_cluster
from raycifar.errors import RayDiedError

T = TypeVar("T")
Running = Callable[[], bool]  # returns whether the work is running
Follow = Callable[[Running], None]  # shows progress; returns once nothing is running


def alongside(work: Callable[[], T], follow: Follow, stop: Callable[[Thread], None]) -> T:
    """Run `work` in a thread and `follow` in this one; return or raise as `work` does.

    Args:
        follow: shows progress until nothing is running.
        stop: called with the thread to end the work, if `follow` raises, as KeyboardInterrupt.

    Raises:
        RayDiedError: Ray has died, so that the work can't end.
    """
    outcome: dict[str, Any] = {}

    def do() -> None:
        try:
            outcome["returned"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = Thread(target=do, daemon=True)
    thread.start()
    try:
        follow(watched(thread.is_alive))
    except RayDiedError:
        raise
    except BaseException:
        stop(thread)
        raise
    if error := outcome.get("error"):
        raise error
    return outcome["returned"]


def watched(running: Running) -> Running:
    """Return `running`, which also raises once Ray has died."""
    if not in_a_cluster():
        return running
    from raycifar.cluster.watch import RayWatch

    watch = RayWatch()

    def look() -> bool:
        watch.look()
        return running()

    return look
