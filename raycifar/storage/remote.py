"""Object stores and web servers: reaching them, with a limit on each wait, and saying in plain words why one can't be.

Each request runs in its own thread, so that Ctrl-C ends a wait that a library would not give up. A request that fails
for a temporary reason, such as an overloaded server or a cut connection, is retried after a pause.
"""

import io
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from html import unescape
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin

import pyarrow as pa
from pyarrow import fs

from raycifar.errors import in_a_line

Answer = TypeVar("Answer")

CONNECT_SECONDS = 10
READ_SECONDS = 20  # without a byte
SILENCE_SECONDS = 60  # of anything, retries included
SLOWEST = 2.5e5  # bytes per second of an upload, which tells nothing of its progress
TELL_SECONDS = 1
PAUSES = (1, 4, 10)  # seconds before each new try
CHUNK = 2**16
MAX_PAGE_BYTES = 2**24  # of a folder's list on a web server
MAX_LEVELS = 4  # of folders on a web server

BUGS = (AttributeError, NameError, TypeError, AssertionError)  # raised as they are


class PassingError(OSError):
    """An error that may be gone when the same is tried again."""


tell: ContextVar[Callable[[str], None]] = ContextVar("tell", default=lambda text: None)


@contextmanager
def telling(show: Callable[[str], None]) -> Iterator[None]:
    """Call `show` with the progress of slow reads: the bytes so far, or for how long nothing came."""
    token = tell.set(show)
    try:
        yield
    finally:
        tell.reset(token)


def ask(work: Callable[[Callable[[int], None]], Answer], patience: float = SILENCE_SECONDS) -> Answer:
    """Return what `work` returns.

    Args:
        work: is called with a function, to which it tells how many bytes it has read so far.
        patience: seconds to wait for the answer, or for more bytes, at each try.
    """
    for pause in PAUSES:
        try:
            return ask_once(work, patience)
        except PassingError as error:
            tell.get()(f"{error}; the next try is in {pause} s")
            time.sleep(pause)
    return ask_once(work, patience)


def ask_once(work: Callable[[Callable[[int], None]], Answer], patience: float) -> Answer:
    heard: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def run() -> None:
        try:
            heard.put(("answer", work(lambda count: heard.put(("bytes", count)))))
        except BaseException as error:
            heard.put(("error", error))

    Thread(target=run, daemon=True).start()
    heard_last = told_last = time.monotonic()
    while (silent := time.monotonic() - heard_last) < patience:
        try:
            kind, value = heard.get(timeout=TELL_SECONDS)
        except Empty:
            kind, value = "nothing", silent
        else:
            heard_last = time.monotonic()
        if kind == "answer":
            return value
        if kind == "error":
            raise value if isinstance(value, BUGS) else plain(value) from value
        if time.monotonic() - told_last >= TELL_SECONDS:
            told_last = time.monotonic()
            tell.get()(
                f"{value / 1e6:,.0f} MB so far"
                if kind == "bytes"
                else f"no answer for {told_last - heard_last:.0f} s, of {patience:.0f} s at most"
            )
    raise TimeoutError(f"no answer has come within {patience:.0f} s")


def connect(uri: str) -> tuple[fs.FileSystem, str]:
    """Return a URI's file system, with limits on its waits, and the path there."""
    if re.match("https?://", uri, re.IGNORECASE):
        address, mark, query = uri.partition("?")
        return fs.PyFileSystem(Web(mark + query)), address
    filesystem, path = fs.FileSystem.from_uri(uri)
    limits: dict[str, Any] = {}
    if isinstance(filesystem, fs.S3FileSystem):
        limits = {"connect_timeout": CONNECT_SECONDS, "request_timeout": READ_SECONDS}
    elif filesystem.type_name == "gcs":
        limits = {"retry_time_limit": timedelta(seconds=READ_SECONDS)}
    if limits:  # a URI can't give them: rebuild it as unpickling does
        rebuild, (options, *others) = filesystem.__reduce__()
        filesystem = rebuild({**options, **limits}, *others)
    return filesystem, path


def download(filesystem: fs.FileSystem, path: str, max_bytes: int) -> bytes:
    """Return a file's content, read once from front to back."""

    def work(beat: Callable[[int], None]) -> bytes:
        if filesystem.type_name != "py::web":  # there, the answer to the request itself says so
            info = filesystem.get_file_info(path)
            if info.type == fs.FileType.NotFound:
                raise FileNotFoundError("there is no such file")
            check_size(info.size or 0, max_bytes)
        content = io.BytesIO()
        with filesystem.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(CHUNK if filesystem.type_name.startswith("py::") else 2**23):
                content.write(chunk)
                check_size(content.tell(), max_bytes)
                beat(content.tell())
        return content.getvalue()  # without a copy

    return ask(work)


def upload(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a file in one upload."""

    def work(beat: Callable[[int], None]) -> None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)

    ask(work, SILENCE_SECONDS + len(content) / SLOWEST)


def list_all(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    """Return all that is in a folder and its subfolders; a web server has a list of each."""

    def work(beat: Callable[[int], None]) -> list[fs.FileInfo]:
        found = []
        if not isinstance(web := getattr(filesystem, "handler", None), Web):
            return filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
        for entry in web.entries(f"{folder.rstrip('/')}/", MAX_LEVELS):
            found.append(entry)
            beat(web.listed)
        return found

    return ask(work)


def check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(f"it has {size:,} bytes or more, and at most {max_bytes:,} are read")


# Web servers ----------------------------------------------------------------------------------------


class Web(fs.FSSpecHandler):
    """Files of a web server, which are read in one request each, and its folders, whose addresses end with a slash.

    Args:
        query: of all addresses, such as a signature.
    """

    def __init__(self, query: str = "") -> None:
        super().__init__(None)
        self.query = query
        self.listed = 0  # bytes of folders' lists, so far
        self.addresses: dict[str, str] = {}  # of what is listed, by paths, whose names are not percent-encoded

    def get_type_name(self) -> str:
        return "web"

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [fs.FileInfo(path, self.kind(path)) for path in paths]

    def kind(self, path: str) -> fs.FileType:
        """Return what is there; what is listed is a file, and so is what a server doesn't tell: a read will show."""
        if path.endswith("/") or path in self.addresses:
            return kind_of(path)
        import requests

        response = requests.head(path + self.query, timeout=(CONNECT_SECONDS, READ_SECONDS), allow_redirects=True)
        if response.status_code >= 500 or response.status_code in BUSY:
            response.raise_for_status()
        missing = response.status_code in (404, 410)
        return fs.FileType.NotFound if missing else kind_of(response.url.partition("?")[0])

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return list(self.entries(f"{selector.base_dir.rstrip('/')}/", MAX_LEVELS if selector.recursive else 1))

    def entries(self, folder: str, levels: int) -> Iterator[fs.FileInfo]:
        address = self.addresses.get(folder, folder)
        page = self.open_input_stream(folder).read(MAX_PAGE_BYTES).decode(errors="replace")
        self.listed += len(page)
        hrefs = map(unescape, re.findall(r'href="([^"]+)"', page))
        links = [urljoin(address, href) for href in hrefs if not {"?", "#"} & {*href}]
        paths = {folder + unquote(link.removeprefix(address)): link for link in links if link.startswith(address)}
        for path, link in sorted(paths.items()):
            if re.fullmatch(r"(?!\.\.?/?$)[^/]+/?", path.removeprefix(folder)):
                self.addresses[path] = link
                yield fs.FileInfo(path.rstrip("/"), kind_of(path))
                if path.endswith("/") and levels > 1:
                    yield from self.entries(path, levels - 1)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        import requests

        address, timeout = self.addresses.get(path, path) + self.query, (CONNECT_SECONDS, READ_SECONDS)
        response = requests.get(address, stream=True, timeout=timeout, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        response.raw.auto_close = False  # at its end, before its last bytes are taken
        return pa.PythonFile(response.raw, mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError("a web server takes no files: give --out")


def kind_of(address: str) -> fs.FileType:
    return fs.FileType.Directory if address.endswith("/") else fs.FileType.File


# Errors ---------------------------------------------------------------------------------------------

BUSY = (408, 429)  # statuses: a time-out, and too many requests
# What the message of an object store's library holds where a new try may help.
PASSING = (
    r"HTTP status (5\d\d|408|429)|NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|REQUEST_TIME_?OUT|INTERNAL_FAILURE"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
)
# What a library's message holds, and what it means.
SIGNS = {
    "OAuth2 access token": "no credentials for Google's cloud are found: set GOOGLE_APPLICATION_CREDENTIALS, or give "
    "gs://anonymous@BUCKET for a public bucket",
    "DefaultAzureCredential": "no credentials for Azure are found: set AZURE_TENANT_ID, AZURE_CLIENT_ID and "
    "AZURE_CLIENT_SECRET, or log in with `az login`",
}


def plain(error: BaseException) -> OSError:
    """Return the error of a library as an `OSError` whose message says what is wrong, in plain words."""
    if status := getattr(getattr(error, "response", None), "status_code", None):
        if status == 404:
            return FileNotFoundError(f"there is no such file ({status})")
        return (PassingError if status >= 500 or status in BUSY else OSError)(refusal(status))
    for cause in causes(error):
        match cause:
            case socket.gaierror():
                return OSError("no host of that name is found: check the name, and the network")
            case ConnectionRefusedError():
                return PassingError("the server refuses the connection: check that it runs and listens on that port")
            case ssl.SSLError():
                reason = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or in_a_line(cause)
                return OSError(f"no secure connection is possible: {reason.replace('_', ' ').lower()}")
    names = {type(cause).__name__ for cause in causes(error)}
    if names & {"ConnectTimeout", "ConnectTimeoutError"}:
        return PassingError(f"the server doesn't answer within {CONNECT_SECONDS} s")
    if names & {"ReadTimeout", "ReadTimeoutError"}:
        return PassingError(f"the server has sent nothing for {READ_SECONDS} s")
    if names & {"IncompleteRead", "RemoteDisconnected", "ConnectionResetError", "ProtocolError", "RemoteProtocolError"}:
        return PassingError("the connection was cut: try again")
    text = in_a_line(error)
    for sign, sentence in SIGNS.items():
        if sign in text:
            return OSError(sentence)
    passes = re.search(PASSING, text)
    if detail := re.search(r"AWS Error .*Details: (.*)", text):
        text = detail[1]
    if passes:
        return PassingError(text)
    if isinstance(error, ImportError):
        return OSError(f"the package {error.name} is needed, and isn't installed")
    return type(error)(text) if isinstance(error, FileNotFoundError | PermissionError) else OSError(text)


def refusal(status: int) -> str:
    if status in (401, 403):
        return f"the server refuses to give it ({status}): it may need a password, or a new signature"
    if status >= 500:
        return f"the server failed ({status}): try again later"
    return f"the server answers with the status {status}"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the nearest first."""
    following: BaseException | None = error
    for _ in range(20):
        if following:
            yield following
            following = following.__cause__ or following.__context__
