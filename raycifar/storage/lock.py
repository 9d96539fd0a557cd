"""The lock of a run folder: one process at a time trains the run, on a disk or in an object store.

A process claims a folder by its own file there, `.lock-OWNER`, and renews it as long as the process lives. Who comes
first is decided by Lamport's bakery algorithm (1974), which asks of a storage only that it returns what was written
last: not every storage can create a file exclusively.
"""

import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

import psutil

from raycifar.errors import DamagedFileError, RequestError, StorageError
from raycifar.storage.files import ask
from raycifar.storage.run_folder import RunFolder
from raycifar.storage.schemas import Count, Real

CLAIM = ".lock-"  # and its owner
BEAT_SECONDS = 10  # between two renewals
DEAD_SECONDS = 90  # without one, after which another machine's process counts as dead; NFS caches names for 60 s
LOOK_SECONDS = 0.2
TOLERANCE = 2  # seconds between two measurements of a process's start

Say = Callable[[str], None]


@dataclass(frozen=True)
class Claim:
    """A process's claim to a folder."""

    owner: str
    pid: Count
    host: str
    machine: str
    started: Real  # seconds from the machine's boot, which no clock changes
    since: str
    number: Count = 0  # the claim with the least is the first; 0 while it is being chosen
    beats: Count = 0

    @classmethod
    def of_this_process(cls) -> "Claim":
        started, since = seconds_after_boot(psutil.Process()), f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        return cls(uuid.uuid4().hex, os.getpid(), platform.node(), machine(), started, since)

    @property
    def file(self) -> str:
        return CLAIM + self.owner

    @property
    def place(self) -> tuple[int, str]:
        return self.number, self.owner

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_alive(self) -> bool | None:
        """Return whether the process is alive, or None if it is another machine's."""
        if self.machine != machine():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(seconds_after_boot(process) - self.started) < TOLERANCE
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@contextmanager
def locked(folder: RunFolder, say: Say, *, also: Iterable[RunFolder] = ()) -> Iterator[RunFolder]:
    """Hold the lock of a folder; yield the folder, which is written only as long as the lock is held.

    The lock of a process that died is taken over, with a message.

    Args:
        also: other folders that no other process may hold.

    Raises:
        RequestError: another process holds it; nothing was written.
        StorageError: the folder can't be written.
    """
    places, ended = (folder, *also), Event()
    claim = Claim.of_this_process()
    clear(places, claim, say)
    with removing_empty(folder):
        try:
            write(folder, claim)
            claim = replace(claim, number=1 + max(rival.number for _, rival in claims(places)))
            write(folder, claim)
            clear(places, claim, say)
            beating = Thread(target=renew, args=(folder, claim, ended), daemon=True)
            beating.start()
            try:
                yield replace(folder, claim=folder.path(claim.file))
            finally:
                ended.set()
                beating.join(BEAT_SECONDS)  # or it may write the claim again
        finally:
            with suppress(OSError):  # or it would hide what the storage has refused before; a claim that stays is dead
                folder.delete(claim.file)


def clear(places: Iterable[RunFolder], claim: Claim, say: Say) -> None:
    """Raise RequestError if a living process's claim precedes `claim`, and delete those of the dead."""
    for place, found in claims(places):
        rival = await_number(place, found) if claim.number else found
        if not rival or not rival.number or (claim.number and claim.place <= rival.place):
            continue
        if is_alive(place, rival, say):
            raise RequestError(
                f"{place.location} is being trained by {rival}. Wait for it to end, or end it. The lock of a process "
                f"that has died is taken over automatically, within {DEAD_SECONDS} s."
            )
        if place.read(rival.file) is not None:
            say(f"{place.location} was being trained by {rival}, which died: its lock is taken over.")
            place.delete(rival.file)


def living_claim(folder: RunFolder) -> Claim | None:
    """Return the claim of a process that seems to be alive: another machine's by when it was renewed last.

    Raises:
        DamagedFileError: a claim can't be read.
    """
    for place, claim in claims([folder]):
        alive = claim.is_alive()
        if alive or (alive is None and seconds_since_renewed(place, claim) < DEAD_SECONDS):
            return claim
    return None


def seconds_since_renewed(place: RunFolder, claim: Claim) -> float:
    """Return a claim's age by the clocks of this machine and of the storage; infinity if it is withdrawn."""
    renewed = ask(place.filesystem, lambda: place.filesystem.get_file_info(place.path(claim.file)).mtime)
    return (datetime.now(UTC) - renewed).total_seconds() if renewed else math.inf


def delete_stale_locks(folder: RunFolder) -> None:
    """Delete the claims of processes of this machine that died, of a folder that nobody trains in."""
    for place, claim in claims([folder]):
        if claim.is_alive() is False:
            with suppress(OSError):
                place.delete(claim.file)


def await_number(place: RunFolder, rival: Claim | None) -> Claim | None:
    """Return the claim once its number is chosen, or None if it is withdrawn or its process died."""
    while rival and not rival.number:
        if not is_alive(place, rival, lambda text: None):
            place.delete(rival.file)
            return None
        time.sleep(LOOK_SECONDS)
        rival = read(place, rival.file)
    return rival


def is_alive(place: RunFolder, claim: Claim, say: Say) -> bool:
    """Return whether a claim's process is alive; another machine's is if it renews its claim or withdraws it."""
    if (alive := claim.is_alive()) is not None:
        return alive
    say(f"{place.location} is locked by {claim}: waiting up to {DEAD_SECONDS} s for a sign of life …")
    deadline = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        if (now := read(place, claim.file)) != claim:
            return now is not None
    return False


def renew(folder: RunFolder, claim: Claim, ended: Event) -> None:
    """Renew a claim until the end, or until another process has taken over."""
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError, DamagedFileError):  # a storage that can't be reached for a while
            if read(folder, claim.file) is None:
                return
            claim = replace(claim, beats=claim.beats + 1)
            write(folder, claim)


def claims(places: Iterable[RunFolder]) -> list[tuple[RunFolder, Claim]]:
    found = [(place, read(place, file)) for place in places for file in place.file_names() if file.startswith(CLAIM)]
    return [(place, claim) for place, claim in found if claim]


def read(place: RunFolder, file: str) -> Claim | None:
    try:
        return place.read_as(file, Claim)
    except DamagedFileError as error:
        if isinstance(error.__cause__, StorageError):  # the storage fails, and the claim may be a living process's
            raise
        raise DamagedFileError(f"{error} Delete it if nothing trains this run.") from error


def write(folder: RunFolder, claim: Claim) -> None:
    folder.write_json(claim.file, asdict(claim))


@contextmanager
def removing_empty(folder: RunFolder) -> Iterator[None]:
    """Remove the local folders that didn't exist before and are empty in the end."""
    path = Path(folder.path())
    created = [] if folder.is_remote else [each for each in (path, *path.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in created:
            with suppress(OSError):
                each.rmdir()


def seconds_after_boot(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


def machine() -> str:
    """Return the scope in which process IDs are unique: a boot of the system and a namespace, else the host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()
