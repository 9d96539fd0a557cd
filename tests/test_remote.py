"""Web servers and object stores: what is read, how long is waited, and what is said when they fail."""

import datetime
import http.server
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from functools import partial

import pytest
from command import Report
from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

from raycifar.errors import RequestError, StorageError
from raycifar.models.initial_weights import read_tensors
from raycifar.storage import remote
from raycifar.storage.checkpoints import Checkpoints
from raycifar.storage.files import list_files, locate, locate_images, read_file, write_file
from raycifar.storage.run_folder import RunFolder

CONTENT = bytes(range(256)) * 4000


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Nothing is tried again."""
    monkeypatch.setattr(remote, "PAUSES", ())


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT without ranges, and fails in the way that the path names."""

    def do_GET(self):
        path, _, self.server.query = self.path.partition("?")
        self.server.credentials = self.headers.get("Authorization")
        assert "Range" not in self.headers
        if path[1:].isdigit():
            self.send_error(int(path[1:]))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if path == "/slow":
            self.wfile.write(CONTENT[:600_000])
            time.sleep(1.2)
            self.wfile.write(CONTENT[600_000:])
            return
        self.wfile.write(CONTENT if path == "/whole" else CONTENT[:100_000])
        if path == "/silent":
            self.wfile.flush()
            time.sleep(3)
        if path == "/reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Web servers ----------------------------------------------------------------------------------------


def test_a_file_is_read_in_one_request_with_the_password_and_the_signature_of_its_address(server):
    address = server.url.replace("//", "//user:word@")
    assert read_file(f"{address}/whole?sig=abc") == CONTENT
    assert server.query == "sig=abc"
    assert server.credentials == "Basic dXNlcjp3b3Jk"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("401", "refuses to give it (401)"),
        ("403", "refuses to give it (403): it may need a password, or a new signature"),
        ("404", "there is no such file (404)"),
        ("418", "answers with the status 418"),
        ("500", "the server failed (500): try again later"),
        ("cut", "the connection was cut"),
        ("reset", "the connection was cut"),
        ("silent", "the server has sent nothing for 1 s"),
    ],
)
def test_each_failure_of_a_server_has_its_own_sentence(server, path, says, monkeypatch):
    monkeypatch.setattr(remote, "READ_SECONDS", 1)
    with pytest.raises(RequestError) as refusal:
        read_tensors(f"{server.url}/{path}?sig=abc")
    assert says in str(refusal.value)
    assert f"--pretrained {server.url}/{path}?sig=*** can't be read: " in str(refusal.value)


def test_a_server_that_can_t_be_reached_has_its_own_sentence(server):
    for address, says in {
        f"http://127.0.0.1:{free_port()}/a": "refuses the connection",
        "http://no-such-host.invalid/a": "no host of that name is found",
        f"https://127.0.0.1:{server.server_port}/a": "no secure connection is possible: wrong version number",
    }.items():
        with pytest.raises(OSError, match=says):
            read_file(address)


def test_the_hub_without_a_network_is_named():
    program = "from raycifar.storage import remote; remote.PAUSES = ()\n"
    program += "from raycifar.data.sources import load; load('hf://datasets/a/b/c')"
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert "RequestError: hf://datasets/a/b/c can't be read: the server refuses the connection" in done.stderr


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "pem").write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(OSError, match="no secure connection is possible: self-signed certificate"):
            read_file(f"https://127.0.0.1:{server.server_port}/whole")
        server.shutdown()


def test_a_file_that_is_too_large_is_not_read_to_its_end(server):
    with pytest.raises(OSError, match="at most 500,000 are read"):
        remote.download(*locate(f"{server.url}/whole"), 500_000)


def test_what_is_downloaded_is_in_memory_once(server):
    filesystem, path = locate(f"{server.url}/whole")
    tracemalloc.start()
    content = remote.download(filesystem, path, 2**30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert content == CONTENT
    assert peak < 1.7 * len(CONTENT)


def test_what_is_read_so_far_is_said(server, monkeypatch):
    said = []
    with remote.telling(said.append):
        read_file(f"{server.url}/slow")
    assert said == ["no answer for 1 s, of 60 s at most"]
    said.clear()
    monkeypatch.setattr(remote, "TELL_SECONDS", 0.001)
    with remote.telling(said.append):
        read_file(f"{server.url}/whole")
    assert any(line.endswith(" MB so far") for line in said)


class Folders(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and a list of one of its folders after a while; it signs nothing but GET."""

    def do_GET(self):
        if self.path.endswith("/"):
            time.sleep(0.3)
        super().do_GET()

    def do_HEAD(self):
        if "signed" in self.path:
            self.send_error(403)
        else:
            super().do_HEAD()

    def log_message(self, *args):
        pass


@pytest.fixture
def folders(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Folders, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_a_web_server_has_is_told_from_what_it_has_not(folders, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/run.json", "signed"):
        (tmp_path / name).write_bytes(b"{}")
    run = RunFolder.at(f"{folders}/a")
    assert (run.exists("run.json"), run.exists("comparison.json"), run.read("none")) == (True, False, None)
    kinds = {
        "a": fs.FileType.Directory,
        "a/run.json": fs.FileType.File,
        "signed": fs.FileType.File,
        "b": fs.FileType.NotFound,
    }
    assert {name: locate_images(f"{folders}/{name}?sig=x")[2] for name in kinds} == kinds
    assert [found.name for found in RunFolder.at(folders).runs()] == ["a"]
    with pytest.raises(
        StorageError, match=r"/a/report\.html can't be written: a web server takes no files: give --out$"
    ):
        run.write("report.html", b"x")


def test_a_long_list_is_waited_for_as_long_as_it_goes_on(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(remote.ask, "__defaults__", (1,))
    for k in range(6):
        (tmp_path / f"a/{k}").mkdir(parents=True)
        (tmp_path / f"a/{k}/x").touch()
    assert len(list_files(*locate(f"{folders}/a/"))) == 6


def test_nothing_is_written_to_a_web_server(server, small):
    with pytest.raises(RequestError, match="can't be written to"):
        write_file(f"{server.url}/new", b"x")


# Object stores --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket():
    """The URI of a bucket in an object store on loopback, with the credentials in it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    fs.FileSystem.from_uri(f"s3://KEY:SECRET@runs?{query}")[0].create_dir("runs")
    yield lambda path="": f"s3://KEY:SECRET@runs{path}?{query}"
    server.stop()


def test_a_run_in_an_object_store_is_found_by_a_uri_with_parameters(bucket):
    run = RunFolder(bucket(), "größe")
    run.write_json("about.json", {"data": bucket("/data")})
    run.write_json("run.json", {})
    assert RunFolder.at(run.location).name == "größe"
    assert (
        RunFolder.at(run.location).read_json("about.json")["data"].startswith("s3://***@runs/data?endpoint_override=")
    )
    assert RunFolder.at(bucket()).read("run.json") is None
    assert [found.name for found in RunFolder.at(bucket()).runs()] == ["größe"]
    write_file(bucket("/a b/model.bin".replace(" ", "%20")), CONTENT)
    assert read_file(bucket("/a%20b/model.bin")) == CONTENT
    assert "runs/a b/model.bin" in list_files(*locate(bucket()))


class Flaky:
    """An object store that fails some of its requests, loses the answers to others, and counts them all."""

    def __init__(self):
        self.store = DomainDispatcherApplication(create_backend_app)
        self.count, self.fails, self.status = 0, lambda count: False, "503 Slow Down"
        self.loses = lambda environ: False

    def __call__(self, environ, start):
        self.count += 1
        if self.loses(environ):
            b"".join(self.store(environ, lambda *answer: None))
        elif not self.fails(self.count):
            return self.store(environ, start)
        elif environ.get("wsgi.input_terminated"):
            environ["wsgi.input"].read()
        start(self.status, [("Content-Length", "0")])
        return [b""]


@pytest.fixture
def flaky(monkeypatch):
    """A run in such an object store, and the store; three more tries are made, without much of a pause."""
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01, 0.01))
    flaky = Flaky()
    server = make_server("127.0.0.1", 0, flaky, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    query = f"endpoint_override=127.0.0.1:{server.port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    fs.FileSystem.from_uri(f"s3://KEY:SECRET@runs?{query}")[0].create_dir("runs")
    yield RunFolder(f"s3://KEY:SECRET@runs?{query}", "a"), flaky
    server.shutdown()


def test_of_a_store_that_fails_every_third_request_nothing_is_noticed(flaky):
    run, store = flaky
    store.fails = lambda count: count % 3 == 0
    checkpoints = Checkpoints(run)
    for epoch in (1, 2):
        checkpoints.write(f"checkpoint_{epoch:04}_000000", {"state": CONTENT})
    checkpoints.delete(checkpoints.names()[1:])
    assert list(checkpoints.sound(print)) == [("checkpoint_0002_000000", {"state": CONTENT})]


def test_a_checkpoint_that_can_t_be_reached_is_not_taken_for_damaged(flaky):
    run, store = flaky
    Checkpoints(run).write("checkpoint_0001_000000", {"state": CONTENT})
    store.fails, store.status = lambda count: True, "403 Forbidden"
    with pytest.raises(StorageError, match=r"manifest\.json.* can't be read"):
        Checkpoints(run).read("checkpoint_0001_000000")


def test_what_fails_for_a_passing_reason_is_tried_again_later(flaky):
    """A request is sent three times by the store's own library, at once; these pauses are raycifar's."""
    run, store = flaky
    said = []
    last = store.count + 4
    store.fails = lambda count: count <= last
    with remote.telling(said.append):
        run.write("model.bin", CONTENT)
    (retried,) = [text for text in said if text.endswith("; the next try is in 0.01 s")]
    assert "503" in retried
    last = store.count + 4
    assert run.read("model.bin") == CONTENT
    last = store.count + 4
    run.delete("model.bin")
    assert not run.exists("model.bin")


def test_a_file_is_deleted_whatever_becomes_of_the_answer(flaky):
    run, store = flaky
    run.write("model.bin", CONTENT)
    lost = iter(range(4))
    store.loses = lambda environ: environ["REQUEST_METHOD"] == "DELETE" and next(lost, None) is not None
    run.delete("model.bin")
    assert not run.exists("model.bin")
    run.delete("model.bin")


def test_what_is_refused_is_not_tried_again(flaky):
    run, store = flaky
    store.fails, store.status, store.count = lambda count: True, "403 Forbidden", 0
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        run.write("model.bin", CONTENT)
    assert store.count == 1


def test_a_web_server_that_fails_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01))
    said = []
    with remote.telling(said.append), pytest.raises(OSError, match=r"the server failed \(500\)"):
        read_file(f"{server.url}/500")
    assert len(said) == 2
    with remote.telling(said.append), pytest.raises(OSError, match="there is no such file"):
        read_file(f"{server.url}/404")
    assert len(said) == 2


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_says_nothing_is_waited_for_no_longer_than_the_limit(scheme, monkeypatch):
    """Its connections are taken, and never answered."""
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 2)
    monkeypatch.setattr(remote.ask, "__defaults__", (2,))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        user = {"s3": "", "gs": "anonymous@"}[scheme]
        uri = f"{scheme}://{user}runs/a?endpoint_override=127.0.0.1:{listener.getsockname()[1]}&scheme=http"
        began, said = time.monotonic(), []
        with pytest.raises(OSError, match="no answer has come within 2 s"), remote.telling(said.append):
            RunFolder.at(uri).read("run.json")
        assert time.monotonic() - began < 5
        assert said[0] == "no answer for 1 s, of 2 s at most"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wait_that_a_library_does_not_let_go_of_is_interrupted(number):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        where = f"gs://anonymous@runs/a?endpoint_override=127.0.0.1:{listener.getsockname()[1]}&scheme=http"
        command = Report(where, storage=None)
        listener.accept()
        began = time.monotonic()
        done = command.kill(number)
    assert done.returncode == 130
    assert done.stderr.endswith("Interrupted.\n")
    assert time.monotonic() - began < 3


def test_stores_have_limits_of_their_own():
    """So that nothing which Ray or a thread asks of them waits for ever, either."""
    store, _ = locate("s3://b/x?region=us-east-1&endpoint_override=127.0.0.1:9")
    options = store.__reduce__()[1][0]
    assert (options["connect_timeout"], options["request_timeout"], options["endpoint_override"]) == (
        remote.CONNECT_SECONDS,
        remote.READ_SECONDS,
        "127.0.0.1:9",
    )
    store, _ = locate("gs://anonymous@b/x")
    assert store.__reduce__()[1][0]["retry_time_limit"].total_seconds() == remote.READ_SECONDS
