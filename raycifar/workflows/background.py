"""Work in a thread, while the caller's thread shows progress and handles Ctrl-C."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

from raycifar.cluster.status import in_a_cluster
from raycifar.errors import RayDiedError

T = TypeVar("T")
Running = Callable[[], bool]  # returns whether the work is running
Follow = Callable[[Running], None]  # shows progress; returns once nothing is running


def run_in_thread(work: Callable[[], T], follow: Follow, stop: Callable[[Thread], None]) -> T:
    """Run `work` in a thread and `follow` in this one; return or raise as `work` does.

    Args:
        follow: shows progress until nothing is running.
        stop: called with the thread to end the work, if `follow` raises, as KeyboardInterrupt.

    Raises:
        RayDiedError: Ray has died, so that the work can't end.
    """
    outcome: Future[T] = Future()

    def do() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = Thread(target=do, daemon=True)
    thread.start()
    try:
        follow(watched(thread.is_alive))
    except RayDiedError:
        raise
    except BaseException:
        stop(thread)
        raise
    return outcome.result()


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
