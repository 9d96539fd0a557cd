"""Work in a thread of its own, while the caller's shows how it goes and hears Ctrl-C."""

from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def alongside(work: Callable[[], T], follow: Callable[[Callable[[], bool]], None], stop: Callable[[Thread], None]) -> T:
    """Do `work` in a thread while this one runs `follow`; return or raise as the work does.

    Args:
        follow: called with a function that tells whether the work goes on; returns when it doesn't.
        stop: called with the thread on KeyboardInterrupt; ends the work, as far as it can.
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
    except KeyboardInterrupt:
        stop(thread)
        raise
    if error := outcome.get("error"):
        raise error
    return outcome["returned"]
