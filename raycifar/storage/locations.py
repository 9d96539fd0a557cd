"""Paths and URIs as users write them: which are taken, and how they are joined and taken apart."""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from raycifar.errors import RequestError

URI = re.compile(r"^([a-z][a-z0-9+.:-]+)://", re.IGNORECASE)
WRITABLE = ("file", "s3", "gs", "gcs", "abfs", "abfss")
SCHEMES = (*WRITABLE, "hf", "https", "http")

Location = str | os.PathLike[str]


def check_location(location: Location, what: str = "", *, to_write: bool = False) -> str:
    """Return a path or URI as text.

    Args:
        what: the option that names it, such as --data. to_write: something is to be written there.

    Raises:
        RequestError: it is empty, or a URI of a kind that isn't read, or written.
    """
    option = f"{what} " if what else ""
    if not isinstance(location, str | os.PathLike):
        raise RequestError(f"{option}{location!r} is not a path: give a folder, a file or a URI.")
    text = os.fspath(location)
    if not text.strip() or "\0" in text:
        raise RequestError(f"{option}{text!r} is not a path: give a folder, a file or a URI.")
    if not is_utf8(text):
        raise RequestError(f"{option}{text!r} is refused, because it isn't UTF-8: rename the file or folder.")
    if not (match := URI.match(text)):
        scheme, colon, _ = text.partition(":/")
        if colon and scheme.lower() in SCHEMES:
            meant = text.replace(":/", ":///" if scheme.lower() == "file" else "://", 1)
            raise RequestError(f"{option}{text} has one slash: give {meant}, or the path ./{text}.")
        return text
    scheme, schemes = match[1].lower(), WRITABLE if to_write else SCHEMES
    if scheme not in schemes or "::" in text:
        verb = "written to" if to_write else "read"
        why = "it chains several by ::" if scheme in schemes else f"{scheme}:// can't be {verb}"
        raise RequestError(f"{option}{text} is refused, because {why}: give a path, or a URI of {', '.join(schemes)}.")
    if scheme == "file":
        if text[7:8] != "/" and not text[7:].startswith("localhost/"):
            raise RequestError(f"{option}{text} names another host: a local file's URI has three slashes, file:///….")
    elif re.search(r"[\s'\"<>\\]", text):
        raise RequestError(f"{option}{text.split()[0]} … is not a URI: write a space as %20, and quotes likewise.")
    elif "***" in text:
        raise RequestError(f"{option}{text} lacks its secret, which is never written down: put it in the place of ***.")
    return text


def is_utf8(name: str) -> bool:
    """Return whether a file's name is UTF-8, as Arrow's file systems want it; Python gives others surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def to_path(text: str) -> str | None:
    """Return the local path that a path or a file URI names, absolute; None for other URIs.

    Raises:
        RequestError: there is no home directory for `~`.
    """
    if match := URI.match(text):
        if match[1].lower() != "file":
            return None
        text = unquote(text[7:].removeprefix("localhost"))
    elif (home := os.path.expanduser(text)) == text and re.match(r"~(/|$)", text):  # noqa: PTH111 (Path's raises)
        raise RequestError(f"{text}: this user has no home directory: give a full path.")
    else:
        text = home
    return os.path.realpath(text)  # unlike Path.resolve, it takes a link to itself


def join(location: str, name: str) -> str:
    """Return the location of something in a folder."""
    if not URI.match(location):
        return f"{location.rstrip('/')}/{name}"
    folder, mark, query = location.partition("?")
    return f"{folder.rstrip('/')}/{quote(name)}{mark}{query}"


def parent_and_name(location: str) -> tuple[str, str]:
    """Return the folder that holds a path or URI, and its name in it."""
    if path := to_path(location):
        return str(Path(path).parent), Path(path).name
    folder, mark, query = location.partition("?")
    parent, _, name = folder.rstrip("/").rpartition("/")
    if parent.endswith(":/"):  # a bucket
        return location, ""
    return f"{parent}{mark}{query}", unquote(name)
