"""The files that clusters and jobs are made from."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from command import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job import job_supervisor

import raycifar
from raycifar.engine.reporter import METRICS
from raycifar.workflows.training import MAX_STOP_SECONDS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(pin.split("==") for pin in PROJECT["tool"]["uv"]["constraint-dependencies"])
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
JOB = yaml.safe_load((ROOT / "jobs/rayjob.yaml").read_text())


def test_the_cluster_passes_ray_s_own_schema_and_preparation():
    prepared = prepare_config(CLUSTER)
    validate_config(prepared)
    assert prepared["max_workers"] == 8
    assert prepared["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_a_misspelt_key_would_be_found():
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config({**CLUSTER, "idle_timeout_minute": 5}))


def test_workers_are_spot_machines_from_none_up_and_on_demand_ones_beside_them():
    kinds = CLUSTER["available_node_types"]
    spot, full = kinds["gpu_spot"], kinds["gpu_on_demand"]
    assert (spot["min_workers"], spot["max_workers"]) == (0, CLUSTER["max_workers"])
    market = spot["node_config"].pop("InstanceMarketOptions")
    assert market == {"MarketType": "spot"}
    assert spot["node_config"] == full["node_config"]


def test_images_have_the_ray_and_the_python_that_are_tested():
    images = [CLUSTER["docker"]["image"], re.search(r"^FROM (.+)$", (ROOT / "jobs/Dockerfile").read_text(), re.M)[1]]
    assert images == [f"rayproject/ray:{PINS['ray']}-py312-gpu"] * 2
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    text = (ROOT / "jobs/rayjob.yaml").read_text()
    assert text.count(f"raycifar:{raycifar.__version__}") == 1


def test_every_start_of_ray_asks_for_a_token():
    starts = [*CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert JOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_kubernetes_job_asks_for_what_its_nodes_have():
    cluster = JOB["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 8)
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "--workers 1:8" in JOB["spec"]["entrypoint"]


def test_the_grafana_dashboard_asks_for_the_metrics_that_runs_have():
    board = json.loads((ROOT / "jobs/grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {re.fullmatch(r'ray_raycifar_(\w+)\{run=~"\$run"\}', query)[1] for query in queries}
    assert asked == set(METRICS)
    (run,) = (variable for variable in board["templating"]["list"] if variable["name"] == "run")
    assert run["query"] == "label_values(ray_raycifar_epoch, run)"


@pytest.mark.parametrize("script", sorted((ROOT / "jobs").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound_and_may_be_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o100


def test_options_of_the_jobs_exist():
    from raycifar import compare, train

    for text, command in (
        ((ROOT / "jobs/train.sh").read_text(), train.main),
        ((ROOT / "jobs/compare.sh").read_text(), compare.main),
        (JOB["spec"]["entrypoint"], train.main),
    ):
        known = {name for option in command.params for name in option.opts}
        used = re.search(r"python -m raycifar.*", text.replace("\\\n", " ").replace("\n", " "))[0]
        assert set(re.findall(r"--[a-z-]+", used)) <= known


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_table_of_results_is_printed_though_a_trial_failed(code, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$2"\n[ "$2" != raycifar.compare ] || exit {code}\n')
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "jobs/reproduce.sh"], env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True
    )
    assert done.returncode == code
    assert ("raycifar.report\nimport sys" in done.stdout) is (code <= 1)


def test_an_image_and_a_job_leave_out_the_same():
    excludes = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())["excludes"]
    assert (ROOT / ".dockerignore").read_text().split() == excludes


def test_a_job_that_is_stopped_has_the_time_that_a_checkpoint_may_take():
    waits = "RAY_JOB_STOP_WAIT_TIME_S"
    environment = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())["env_vars"]
    assert int(environment[waits]) >= MAX_STOP_SECONDS + 10
    assert f'"{waits}"' in Path(job_supervisor.__file__).read_text(), "Ray has another name for it now"
