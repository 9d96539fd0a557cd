"""Tells Ray that a spot machine is about to be taken away, as soon as its cloud does.

    python -m raycifar.cluster.spot aws &          on each spot machine, after `ray start`

The cloud's metadata server is asked every few seconds. At a notice Ray drains the node: the run saves a checkpoint and
goes on elsewhere. Ray's autoscaler and managed services may do this themselves; self-managed clusters need it.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import click
import requests

POLL_SECONDS = 5
TIMEOUT_SECONDS = 2
NOTICE_SECONDS = 30  # left to a machine if its cloud doesn't say; GCP and Azure give no more
SERVERS = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal", "azure": "http://169.254.169.254"}


def aws(server: str) -> float | None:
    """Return the seconds until the machine is taken, or None.

    See "Spot Instance interruption notices" and "Use IMDSv2" in the Amazon EC2 User Guide.
    """
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = ask("PUT", f"{server}/latest/api/token", lifetime)
    notice = ask("GET", f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    return None if notice is None else seconds_until(datetime.fromisoformat(json.loads(notice)["time"]))


def gcp(server: str) -> float | None:
    """Return the seconds until the machine is taken, or None; see "Spot VMs: handle preemption" of Google Cloud."""
    preempted = ask("GET", f"{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return NOTICE_SECONDS if preempted == "TRUE" else None


def azure(server: str) -> float | None:
    """Return the seconds until the machine is taken, or None; see "Scheduled Events for Linux VMs" of Azure."""
    header = {"Metadata": "true"}
    name = ask("GET", f"{server}/metadata/instance/compute/name?api-version=2021-02-01&format=text", header)
    events = ask("GET", f"{server}/metadata/scheduledevents?api-version=2020-07-01", header)
    for event in json.loads(events or "{}").get("Events", []):
        if event["EventType"] == "Preempt" and name in event["Resources"]:
            return seconds_until(parsedate_to_datetime(event["NotBefore"])) if event["NotBefore"] else NOTICE_SECONDS
    return None


# Each returns the seconds that this machine has left by its cloud's metadata server, None without a notice.
NOTICES: dict[str, Callable[[str], float | None]] = {"aws": aws, "gcp": gcp, "azure": azure}


def ask(method: str, url: str, headers: dict[str, str]) -> str | None:
    """Return the metadata server's answer, or None if it has none."""
    response = requests.request(method, url, headers=headers, timeout=TIMEOUT_SECONDS)
    if response.status_code == requests.codes.not_found:
        return None
    response.raise_for_status()
    return response.text


def seconds_until(moment: datetime) -> float:
    return max(1.0, (moment - datetime.now(UTC)).total_seconds())


def drain(seconds: float, address: str, node_id: str | None) -> bool:
    """Tell Ray in how many seconds this node goes, and return whether Ray has received it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--node-id", node_id] if node_id else []
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "The cloud takes this machine away."]
    return subprocess.run([*command, "--deadline-remaining-seconds", str(int(seconds))], check=False).returncode == 0


@click.command(context_settings={"show_default": True})
@click.argument("cloud", type=click.Choice([*NOTICES]))
@click.option("--address", default="auto", help="Address of the Ray cluster.")
@click.option("--node-id", help="ID of the node.  [this machine's]")
@click.option("--server", help="Address of the metadata server.  [the cloud's]")
def main(cloud: str, address: str, node_id: str | None, server: str | None) -> None:
    """Drain this machine's Ray node as soon as CLOUD announces that it will take the machine away."""
    unreachable = False
    while True:
        try:
            seconds = NOTICES[cloud](server or SERVERS[cloud])
        except (requests.RequestException, ValueError, KeyError) as error:
            if not unreachable:
                click.echo(f"The metadata server of {cloud} doesn't answer: {error}", err=True)
            seconds, unreachable = None, True
        if seconds is not None:
            click.echo(f"This machine is taken away in {seconds:.0f} s: draining its node.")
            if drain(seconds, address, node_id):
                return
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
