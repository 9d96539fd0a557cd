"""Work in a thread, while the caller's thread shows progress and handles Ctrl-C."""

from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def alongside(work: Callable[[], T], follow: Callable[[Callable[[], bool]], None], stop: Callable[[Thread], None]) -> T:
    """Run `work` in a thread and `follow` in this one; return or raise as `work` does.

    Args:
        follow: called with a function that returns whether the work is running; returns when it isn't.
        stop: called with the thread to end the work, if `follow` raises, as KeyboardInterrupt.
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
        follow(thread.is_alive)
    except BaseException:
        stop(thread)
        raise
    if error := outcome.get("error"):
        raise error
    return outcome["returned"]
