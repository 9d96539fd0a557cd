"""Errors that raycifar raises. Commands print each as one sentence; Python programs catch them."""

import functools
import logging
import re
from collections.abc import Sequence
from enum import StrEnum
from errno import EACCES, EDQUOT, EISDIR, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS

from raycifar.redaction import redact

MAX_NAMES = 3  # in a sentence

log = logging.getLogger(__name__)


class FailureKind(StrEnum):
    """Why a run failed, as its `result.json` says."""

    NOT_FINITE = "not-finite"
    NODE_MISMATCH = "node-mismatch"


class StopTrainingError(Exception):
    """Training can't continue, and a retry would fail again."""

    def __init__(self, reason: str, kind: FailureKind) -> None:
        super().__init__(reason)
        self.kind = kind


class PreemptedError(Exception):
    """Ends a worker whose run continues elsewhere; it doesn't count as a failure."""

    def __init__(self, reason: str = "a node of this run is being preempted") -> None:  # given when it is unpickled
        super().__init__(reason)


class RaycifarError(Exception):
    """An error that raycifar raises on purpose; its message is one or more whole sentences, without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class RequestError(RaycifarError):
    """The request is wrong, and nothing was started or written."""


class DamagedFileError(RequestError):
    """A file of a run can't be read, or doesn't hold what it should."""


class WorkError(RaycifarError):
    """The work started and failed."""


class ResumableError(WorkError):
    """The work failed, and the same request with the same name may continue it: the caller says how."""


class RayDiedError(ResumableError):
    """A process of Ray that everything depends on has died."""


class StorageError(OSError):
    """A file can't be written, or one of a run can't be read."""

    @classmethod
    def of(cls, location: str, cause: OSError, verb: str = "written") -> "StorageError":
        return cls(cause.errno or 0, f"{redact(location)} can't be {verb}: {in_a_line(cause)}")

    def __str__(self) -> str:
        return self.strerror or ""

    @property
    def permanent(self) -> bool:
        """Whether a retry is bound to fail, as on a full disk; a network may come back."""
        return self.errno in (EACCES, EDQUOT, EISDIR, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS)


def in_a_line(error: BaseException) -> str:
    """Return an error's message in one line: the last line of a traceback, else the first line; without secrets."""
    message = (isinstance(error, OSError) and error.strerror) or str(error)
    message = re.sub(r"^Failed .* Detail: \[errno \d+\] ", "", message)  # Arrow's, of a local file
    lines = message.strip().splitlines() or [type(error).__name__]
    line = lines[-1 if any(line.startswith("Traceback") for line in lines) else 0]
    return redact(line.removeprefix("raycifar.errors.StorageError: ").rstrip(".: "))


def as_sentence(message: str) -> str:
    """Return a message with a full stop, unless it ends with a question."""
    return message if message.endswith("?") else f"{message}."


def first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + " and others" * (len(names) > MAX_NAMES)


def printable(text: str) -> str:
    """Return text with its control characters, which a terminal would obey, as escapes; line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\N{NO-BREAK SPACE}" else ascii(c)[1:-1] for c in text)


@functools.cache
def notice(sentence: str) -> None:
    """Tell the user something, once in a process, on standard error."""
    log.warning("Note: %s", printable(sentence))
