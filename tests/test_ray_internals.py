"""Each private part of Ray that raycifar uses, against the Ray that is installed; and that none is used elsewhere."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ray
from ray.train import UserCallback
from ray.util.placement_group import placement_group, remove_placement_group

import raycifar
from raycifar.cluster import ray_internals

PRIVATE = r"ray\._private|ray\._raylet|ray\.core\.generated|internal_kv|train\.v2|tune\.progress_reporter|monitor\.py"
PRIVATE += r"|ray\.autoscaler|print_to_stdstream|auto_init_hook"


def test_no_other_file_of_the_package_uses_a_private_part_of_ray():
    package = Path(raycifar.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(PRIVATE, path.read_text()) and path.name != "ray_internals.py"
    }
    assert found == set(), f"these files use private parts of Ray, which belong in cluster/ray_internals.py: {found}"


def test_workers_do_not_import_what_commands_need():
    code = "import sys, raycifar.cluster.nodes, raycifar.engine.reporter; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    before = subprocess.run(
        [sys.executable, "-c", "import sys, ray.train; print(*sys.modules)"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"yaml", "click", "psutil", "rich", "ray.tune"} & (set(loaded) - set(before)) == set()


def test_the_key_value_store(local_ray):
    assert ray_internals.kv_get("raycifar/test") is None
    ray_internals.kv_put("raycifar/test", b"1")
    ray_internals.kv_put("raycifar/test", b"2")
    assert ray_internals.kv_get("raycifar/test") == b"2", "Ray's key-value store no longer overwrites"


def test_a_ray_of_this_process_is_not_one_that_ray_start_has_begun(local_ray):
    from ray._private import services

    addresses = services.find_gcs_addresses()
    assert ray.get_runtime_context().gcs_address in addresses, "Ray no longer finds the clusters of this machine"
    announced = services.find_bootstrap_address(None)
    assert ray_internals.own_cluster() == (announced if announced in addresses else None)


def test_errors_are_not_echoed_for_a_while(capsys):
    from ray._private import worker

    echo = {"lines": ["a node died"], "pid": "raylet", "is_err": False, "ip": "", "job": None}
    before = worker.print_to_stdstream
    with ray_internals.without_error_echo():
        worker.print_to_stdstream(echo, ignore_prefix=False)
        assert worker.print_to_stdstream is not before
    assert worker.print_to_stdstream is before
    assert "print_to_stdstream(" in Path(worker.__file__).read_text().split("def listen_error_messages")[1], (
        "Ray prints cluster errors by another function now"
    )
    assert capsys.readouterr().out == ""


def test_the_command_that_ray_records_has_no_secrets():
    from ray._private import worker

    program = "from ray._private import utils; from raycifar.cluster.ray_internals import *\n"
    program += "with entrypoint_without_secrets(): print(utils.get_entrypoint_name())"
    command = [sys.executable, "-c", program, "--data", "https://host/a?sig=abc"]
    recorded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert recorded.endswith("--data https://host/a?sig=***\n")
    assert "ray._private.utils.get_entrypoint_name()" in Path(worker.__file__).read_text()


def test_ray_is_not_started_by_a_thread_that_goes_on(monkeypatch):
    from ray._private import auto_init_hook

    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)  # put back afterwards
    ray_internals.forbid_auto_init()
    assert auto_init_hook.enable_auto_connect is False
    if not ray.is_initialized():
        auto_init_hook.auto_init_ray()
        assert not ray.is_initialized(), "Ray starts by itself although it is told not to"


def test_the_cluster_s_nodes_have_their_free_resources_and_nothing_is_on_the_way(local_ray):
    status = ray_internals.cluster_status()
    (node,) = [*status.active_nodes, *status.idle_nodes]
    assert node.available_resources()["CPU"] == 1
    assert status.pending_nodes == []
    assert sum(launch.count for launch in status.pending_launches) == 0


def test_without_an_autoscaler_nothing_is_infeasible(local_ray):
    group = placement_group([{"CPU": 64}])
    try:
        assert ray_internals.is_infeasible(group) is False
    finally:
        remove_placement_group(group)
    from ray.core.generated.autoscaler_pb2 import AutoscalingState

    assert "infeasible_gang_resource_requests" in AutoscalingState.DESCRIPTOR.fields_by_name


def test_the_autoscaler_s_configuration_is_read_where_ray_starts_it(local_ray, tmp_path, monkeypatch):
    """The real monitor has none; one that has is made up, as Ray's services would start it."""
    import psutil
    from ray._private import services

    assert ray_internals.autoscaler_config() == {}, "Ray's monitor process can't be found by its command line"
    assert '"--autoscaling-config=" + str(autoscaling_config)' in Path(services.__file__).read_text(), (
        "Ray passes the autoscaler's configuration in another way now"
    )
    config = tmp_path / "config.yaml"
    config.write_text("max_workers: 3")
    address = ray.get_runtime_context().gcs_address
    command = ["python", "/ray/autoscaler/v2/monitor.py", f"--gcs-address={address}", f"--autoscaling-config={config}"]
    process = SimpleNamespace(info={"cmdline": command})
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: [process])
    assert ray_internals.autoscaler_config() == {"max_workers": 3}


def test_the_job_of_a_driver_that_lives_is_not_over(local_ray):
    assert ray_internals.is_job_over() is False
    from ray._private.state import jobs

    assert ray.get_runtime_context().get_job_id() in [job["JobID"] for job in jobs()]


def test_controller_callbacks_hear_of_the_controller_and_of_its_workers():
    hooks = dir(ray_internals.controller_callback_class())
    assert "after_controller_start" in hooks
    assert "on_controller_start_worker_group" in hooks
    assert "after_controller_start" not in dir(UserCallback), "UserCallback hears of it by now: use that"


def test_of_ray_s_callbacks_only_the_cleaner_of_placement_groups_is_left_out(tmp_path):
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    from raycifar.cluster.stoppable import StoppableTrainer, TiedToDriver

    def kinds(trainer, **options):
        made = trainer(lambda: None, run_config=RunConfig(storage_path=str(tmp_path)), **options)
        return [type(callback) for callback in made._create_default_callbacks()]

    theirs, ours = kinds(TorchTrainer), kinds(StoppableTrainer, key="a")
    assert PlacementGroupCleanerCallback in theirs, "Ray Train starts no cleaner by now: use TorchTrainer itself"
    assert ours == [*(kind for kind in theirs if kind is not PlacementGroupCleanerCallback), TiedToDriver]


def test_what_a_worker_raised_or_died_of_is_found():
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    cause = ValueError("out of memory")
    assert ray_internals.cause_of(cause) is cause
    assert ray_internals.cause_of(WorkerHealthCheckFailedError("A worker failed.", failure=cause)) is cause
    assert ray_internals.cause_of(UserExceptionWithTraceback(cause, "Traceback …")) is cause


def test_an_actor_s_placement_groups_are_known_also_after_its_death(local_ray):
    @ray.remote(num_cpus=0)
    class Holder:
        def reserve(self):
            placement_group([{"CPU": 1}])
            placement_group([{"CPU": 2}])
            return ray.get_runtime_context().get_actor_id()

    other = placement_group([{"CPU": 3}])
    holder = Holder.remote()
    actor_id = ray.get(holder.reserve.remote())
    ray.kill(holder)
    groups = ray_internals.placement_groups_of(actor_id)
    assert len(groups) == 2
    for group in (*groups, other):
        remove_placement_group(group)
    assert ray_internals.placement_groups_of(actor_id) == []


def test_ray_tune_takes_our_callback_for_its_own():
    from ray.tune.utils.callback import _create_default_callbacks

    class Silent(ray_internals.progress_callback_class()):
        pass

    silent = Silent()
    made = _create_default_callbacks([silent])
    assert [c for c in made if isinstance(c, ray_internals.progress_callback_class())] == [silent]
    assert hasattr(silent, "on_trial_recover")
