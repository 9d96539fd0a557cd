"""Notices of the clouds, by servers of their layout."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import requests

from raycifar.cluster import spot
from raycifar.cluster.spot import NOTICE_SECONDS, NOTICES

PREEMPTED = "/computeMetadata/v1/instance/preempted"
ACTION, TOKEN = "/latest/meta-data/spot/instance-action", "/latest/api/token"
EVENTS, NAME = "/metadata/scheduledevents?api-version=2020-07-01", "/metadata/instance/compute/name"
HEADERS = {ACTION: ("X-aws-ec2-metadata-token", "abc"), PREEMPTED: ("Metadata-Flavor", "Google")}
HEADERS |= {EVENTS: ("Metadata", "true"), NAME: ("Metadata", "true")}


@pytest.fixture
def metadata_server():
    """A metadata server's address, and its answers by path, which a test may change."""
    answers = {TOKEN: "abc", NAME: "vm-1"}

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            path = self.path if self.path in answers else self.path.partition("?")[0]
            name, value = HEADERS.get(path, ("Host", self.headers["Host"]))
            allowed = self.headers.get(name) == value and (self.command == "PUT") == (path == TOKEN)
            self.send_response((200 if path in answers else 404) if allowed else 401)
            self.end_headers()
            self.wfile.write(answers.get(path, "").encode())

        do_GET = do_PUT = respond  # noqa: N815 (http.server's names)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def in_a_minute():
    return datetime.now(UTC) + timedelta(seconds=60)


def aws_notice():
    return json.dumps({"action": "terminate", "time": in_a_minute().strftime("%Y-%m-%dT%H:%M:%SZ")})


def azure_event(machine):
    moment = format_datetime(in_a_minute(), usegmt=True)
    return json.dumps({"Events": [{"EventType": "Preempt", "Resources": [machine], "NotBefore": moment}]})


@pytest.mark.parametrize(
    ("cloud", "calm", "notice", "seconds"),
    [
        ("aws", dict, lambda: {ACTION: aws_notice()}, 60),
        ("gcp", lambda: {PREEMPTED: "FALSE"}, lambda: {PREEMPTED: "TRUE"}, NOTICE_SECONDS),
        ("azure", lambda: {EVENTS: azure_event("vm-2")}, lambda: {EVENTS: azure_event("vm-1")}, 60),
    ],
)
def test_a_notice_says_how_long_the_machine_has_left(metadata_server, cloud, calm, notice, seconds):
    server, answers = metadata_server
    answers |= calm()
    assert NOTICES[cloud](server) is None
    answers |= notice()
    assert NOTICES[cloud](server) == pytest.approx(seconds, abs=30)


def test_a_server_that_refuses_gives_no_notice(metadata_server):
    server, answers = metadata_server
    del answers[TOKEN]
    with pytest.raises(requests.RequestException):
        NOTICES["aws"](server)


def test_a_node_that_could_not_be_drained_is_drained_again(metadata_server, monkeypatch):
    server, answers = metadata_server
    answers |= {PREEMPTED: "TRUE"}
    codes = [1, 0]
    monkeypatch.setattr(spot.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=codes.pop(0)))
    monkeypatch.setattr(spot, "POLL_SECONDS", 0.01)
    spot.main(["gcp", "--server", server], standalone_mode=False)
    assert codes == []
