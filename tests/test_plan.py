"""`raycifar bench --plan`: how many workers pay, and how much is timed for it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from command import ROOT, Bench, finish
from conftest import wait_until

from raycifar.analysis.charts import scaling
from raycifar.engine.bench import choose_steps
from raycifar.errors import RequestError
from raycifar.models.recipe import Recipe
from raycifar.workflows.planning import (
    INTERCONNECTS,
    Link,
    Measured,
    Place,
    Plan,
    counts_to_measure,
    exchange_seconds,
    parse_plan,
    sizes_to_time,
    summarize,
)

GPUS, ONE_MACHINE = Place(use_gpu=True, shared=False, most=1), Place(use_gpu=False, shared=True, most=3)
TINY = ("--model", "timm:test_resnet", "--pretrained", "none", "--batch-size", 50, "--limit", 200, "--val-size", 100)
TINY += ("--cpus-per-worker", 1)


def linear(counts, place=GPUS, *, interconnect="nvlink", fixed=0.001, buckets=(1_000_000, 25_000_000)):
    """A plan where a step takes 1 ms and 0.1 ms for each image."""
    recipe = Recipe(epochs=10, batch_size=128)
    sizes = sizes_to_time(counts, 1, place, 128)
    times = {size: fixed + size * 1e-4 for size in sizes}
    measured = {1: Measured(alone=times, buckets=buckets, rates=[9000.0, 9200.0], exchanging=times)}
    return Plan(recipe, counts, 12_800, place, measured, interconnect)


def test_numbers_of_workers_are_read_and_refused():
    assert parse_plan("4,1, 2,2", Recipe()) == [1, 2, 4]
    for text, said in (
        ("0,1", "0 is not a number"),
        ("-1", "-1 is not a number"),
        ("abc", "numbers of workers, such as"),
    ):
        with pytest.raises(RequestError, match=said):
            parse_plan(text, Recipe())
    with pytest.raises(RequestError, match="fewer than 2 images for each of 65 workers"):
        parse_plan("1,65", Recipe(batch_size=128))


def test_an_exchange_passes_each_byte_around_a_ring():
    link = Link(latency=1e-5, bandwidth=1e9)
    assert exchange_seconds([1_000_000], 2, link, hidden=0) == pytest.approx(2e-5 + 1e-3)
    assert exchange_seconds([1_000_000], 4, link, hidden=0) == pytest.approx(6e-5 + 1.5e-3)
    two = [9_000_000, 1_000_000]
    assert exchange_seconds(two, 2, link, hidden=0) == pytest.approx(4e-5 + 10e-3)
    assert exchange_seconds(two, 2, link, hidden=4e-3) == pytest.approx(4e-5 + 6e-3)
    assert exchange_seconds(two, 2, link, hidden=1) == pytest.approx(2e-5 + 1e-3)  # the last bucket


def test_what_is_measured_where():
    assert counts_to_measure([1, 2, 4], GPUS) == [1]
    assert counts_to_measure([1, 2, 8], ONE_MACHINE) == [1, 2, 3]
    assert sizes_to_time([1, 2, 4], 1, GPUS, 128) == [128, 64, 32]
    assert sizes_to_time([1, 2, 8], 3, ONE_MACHINE, 128) == [64, 43, 16]
    assert sizes_to_time([1, 2], 2, Place(use_gpu=True, shared=False, most=2), 128) == []


def test_a_plan_adds_up_and_says_from_where_workers_no_longer_help():
    plan = linear([1, 2, 4, 8], interconnect="ethernet-25")
    found = summarize(plan, price_per_hour=2.0)
    one, eight = found["workers"][1], found["workers"][8]
    assert one["images_per_second"] == pytest.approx(128 / 0.0138)
    assert one["seconds"] == pytest.approx(1000 * 0.0138)
    assert one["cost"] == pytest.approx(2 * one["device_hours"])
    assert eight["device_hours"] == pytest.approx(8 * eight["seconds"] / 3600)
    assert "no longer help" in found["sentences"][0]
    assert "--batch-size 512, 8 would train" in found["sentences"][1]
    fast = summarize(linear([1, 2, 4, 8], fixed=0.0, buckets=(1000,)), None)
    assert fast["sentences"][0].startswith("Up to 8, more workers help: 8 train 7.")
    assert fast["workers"][8]["cost"] is None
    assert any("nothing was measured" in line for line in fast["assumptions"])
    assert "predicted 9,275, measured 9,200" in found["sentences"][2]


def test_workers_that_share_cpus_take_turns():
    times = {128: 0.4, 64: 0.2, 32: 0.1}
    one = Measured(alone=times, buckets=[4_000_000], rates=[300.0], exchanging=times)
    two = Measured(alone={128: 0.6, 64: 0.3, 32: 0.16}, buckets=[4_000_000], rates=[300.0], link=(0.0, 4e9))
    plan = Plan(Recipe(), [1, 2, 4], 1280, ONE_MACHINE, {1: one, 2: two})
    assert plan.step_seconds(2, 128) == pytest.approx(0.301)
    assert plan.step_seconds(4, 128) == pytest.approx(0.16 * 2 + 0.0015)
    found = summarize(plan, 1.0)
    assert found["workers"][4]["device_hours"] == pytest.approx(found["workers"][4]["seconds"] / 3600)
    assert "2 workers: predicted 425, measured 300 images/s: +42%" in found["sentences"][-1]


def test_steps_are_chosen_to_end_in_time():
    assert choose_steps(100, 4, 1, most=50) == 20
    assert choose_steps(100, 4, 1, most=5) == 5
    assert choose_steps(100, 9, 10, most=50) == 4  # then fewer rounds
    assert choose_steps(100, 9, 200, most=50) == 1


def test_the_chart_has_both_lines_and_what_was_measured():
    svg = scaling({1: 100.0, 2: 180.0, 4: 200.0}, {1: (90.0, 95.0)}, "cnn")
    for text in ("predicted", "measured", "in proportion", "images per second"):
        assert text in svg


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plan", "0"), "0 is not a number of workers"),
        (("--plan", "-1"), "-1 is not a number of workers"),
        (("--plan", "abc"), "give numbers of workers"),
        (("--plan", "1,26"), "fewer than 2 images for each of 26 workers"),
        (("--plan", "1,2"), "give --interconnect nvlink"),
        (("--interconnect", "pcie"), "are for a plan"),
    ],
)
def test_what_cannot_be_planned_is_refused(small, tmp_path, options, said):
    bench = Bench(*TINY, "--data", small, "--workers", 0, *options, storage=None, cwd=tmp_path)
    assert said in finish(bench, 2).stderr
    assert not (tmp_path / "bench").exists()


def test_a_plan_for_many_such_machines_is_written_and_drawn(small, tmp_path):
    args = (*TINY, "--data", small, "--workers", 0, "--rounds", 1, "--plan", "1,2,4", "--price-per-hour", 2)
    done = finish(Bench(*args, "--interconnect", "ethernet-25", storage=None, cwd=tmp_path))
    plan = json.loads((tmp_path / "bench/bench.json").read_text())["plan"]
    assert list(plan["workers"]) == ["1", "2", "4"]
    assert all(figures["cost"] > 0 for figures in plan["workers"].values())
    assert [check["workers"] for check in plan["checked"]] == [1]
    assert INTERCONNECTS["ethernet-25"][1] in " ".join(plan["assumptions"])
    assert "device-hours" in done.stdout
    assert "1 worker: predicted" in done.stdout
    assert "<svg" in (tmp_path / "bench/plan.svg").read_text()


@pytest.mark.slow
def test_a_bench_that_is_stopped_shows_the_rounds_that_are_done(small, tmp_path):
    bench = Bench(*TINY, "--data", small, "--workers", 0, "--rounds", 100, storage=None, cwd=tmp_path)
    wait_until(lambda: "timing, round 2" in bench.said()[0], what="the second round")
    stopped = bench.kill(signal.SIGINT)
    assert stopped.returncode == 130
    assert "of the bare step's rate" in stopped.stdout
    assert json.loads((tmp_path / "bench/bench.json").read_text())["n"] >= 1


@pytest.mark.slow
def test_a_prediction_for_two_workers_is_held_against_what_two_make(cluster, small, tmp_path):
    args = (*TINY, "--data", small, "--rounds", 1, "--plan", "1,2", "--device", "cpu")
    finish(Bench(*args, storage=None, env=cluster, cwd=tmp_path))
    plan = json.loads((tmp_path / "bench/bench.json").read_text())["plan"]
    assert [check["workers"] for check in plan["checked"]] == [1, 2]
    assert plan["link"]["bytes_per_second"] > 0
    assert any("share the CPUs of this machine" in line for line in plan["assumptions"])


@pytest.mark.slow
def test_the_script_for_a_gpu_does_what_is_missing_and_then_nothing(small, tmp_path):
    environment = {**os.environ, "SMALL": "1", "PYTHON": sys.executable, "RAYCIFAR_DATA": small}
    command = [ROOT / "jobs/measure_gpu.sh", "60", tmp_path / "gpu.jsonl"]

    def call():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=True)
        return done.stdout, [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]

    said, records = call()
    names = ["tests", "bench-vgg16", "bench-cnn", "vgg16", "cnn", "vgg16-muon", "cnn-muon", "resnet50"]
    names += ["speedrun-profile", "speedrun-train", "speedrun", "speedrun-compiled"]
    assert {record["name"]: record["code"] for record in records} == dict.fromkeys(names, 0), said
    by_name = {record["name"]: record for record in records}
    assert by_name["bench-cnn"]["result"]["plan"]["workers"]["2"]["images_per_second"] > 0
    assert by_name["cnn"]["result"]["epochs"] == 1
    assert by_name["speedrun"]["result"]["top1"]["n"] == 1
    assert call() == ("", records)
