"""The two ways a command ends badly; both are shown to the user as one sentence."""

import errno
import os

import click


class RequestError(click.ClickException):
    """The request was wrong, and nothing was started or written."""

    exit_code = 2


class StorageError(OSError):
    """A file of a run can't be written."""

    FOR_GOOD = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

    @classmethod
    def of(cls, place: str, cause: OSError) -> "StorageError":
        return cls(f"{place} can't be written: {cause.strerror or in_a_line(cause)}")

    @classmethod
    def for_good(cls, text: str) -> bool:
        """Return whether an error with that text stays: a network may come back by itself, a full disk does not."""
        return "can't be written" in text and any(os.strerror(number) in text for number in cls.FOR_GOOD)


class WorkError(click.ClickException):
    """The work began and failed."""

    exit_code = 1


def in_a_line(error: BaseException) -> str:
    """Return what an error says in one line: of a text with a traceback the last, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1 if any(line.startswith("Traceback") for line in lines) else 0]
    return line.removeprefix("raycifar.errors.StorageError: ").rstrip(".: ")
