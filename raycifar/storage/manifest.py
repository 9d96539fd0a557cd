"""The manifest of a finished run or comparison: a digest of each file that is read again, so that a change shows."""

import hashlib
from collections.abc import Callable
from functools import cached_property

from raycifar.errors import DamagedFileError, notice
from raycifar.storage.folder import Folder

MANIFEST = "manifest.json"


class Manifest:
    """The manifest of a folder; without one, nothing counts as changed."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @cached_property
    def digests(self) -> dict[str, str]:
        try:
            return self.folder.read_as(MANIFEST, dict[str, str]) or {}
        except DamagedFileError as error:
            notice(f"{error} Whether other files have changed can't be told.")
            return {}

    def seal(self, *files: str) -> None:
        """Record the digests of files as they are now."""
        contents = {file: self.folder.read(file) for file in files}
        digests = {file: digest(content) for file, content in contents.items() if content is not None}
        self._forget()
        self.folder.write_json(MANIFEST, {**self.digests, **digests})
        self._forget()

    def renew(self, *files: str) -> None:
        """Record the digests of files that have been written again; without a manifest, none is created."""
        if self.folder.exists(MANIFEST):
            self.seal(*files)

    def delete(self) -> None:
        self.folder.delete(MANIFEST)
        self._forget()

    def lost(self, *files: str) -> list[str]:
        """Return those of `files` that no longer exist."""
        return [file for file in files if file in self.digests and not self.folder.exists(file)]

    def check(self, file: str, content: bytes) -> None:
        """Raise DamagedFileError if what was read of a file isn't what was sealed."""
        if self._has_changed(file, content):
            raise DamagedFileError(
                f"{self.folder.location}/{file} is damaged: it has changed since {MANIFEST} was written."
            )

    def warn_of_change(self, file: str, content: bytes, warn: Callable[[str], None]) -> None:
        """Call `warn` with a sentence if what was read of a file isn't what was sealed."""
        if self._has_changed(file, content):
            warn(f"{self.folder.location}/{file} has changed since {MANIFEST} was written: what it says may be wrong.")

    def _has_changed(self, file: str, content: bytes) -> bool:
        if file not in self.digests or self.digests[file] == (found := digest(content)):
            return False
        self._forget()
        return self.digests.get(file, found) != found

    def _forget(self) -> None:
        vars(self).pop("digests", None)  # another process may have written the manifest since


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
