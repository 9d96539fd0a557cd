"""What is provoked is found again, and nothing else: recorded runs on real images; `provoked.py` says how each trained.

`python tests/test_provoked.py` prints the table.
"""

import json
from collections import Counter

import pytest
from provoked import FOLDER, LENGTHS, PICTURED, PROVOKED, TRENDS, recorded, to_history

from raycifar.analysis.diagnosis import diagnose, seed_variance
from raycifar.analysis.findings import COARSE, Finding
from raycifar.analysis.history import RunHistory
from raycifar.analysis.rules.generalization import generalization_gap

WHOLE = FOLDER.parent / "whole.jsonl"  # runs on all 45,000 images, up to 185 epochs, on an H100


def diseases(history: RunHistory) -> dict[str, Finding]:
    """Return what isn't right with a run, by kind; what is explained is right."""
    found = {finding.kind: finding for finding in diagnose(history)}
    return {k: v for k, v in found.items() if k not in TRENDS and not v.metrics.get("explained")}


def healthy_readings() -> list[tuple[str, int, set[str]]]:
    """Return what is wrong with each healthy run after each of its epochs: its model, the epoch, and the kinds.

    A gap is no false alarm where there is one.
    """
    readings = []
    for line in WHOLE.read_text().splitlines():
        whole = to_history(json.loads(line))
        for epochs in range(1, len(whole.records) + 1):
            history = RunHistory(whole.run, whole.records[:epochs], None)
            found = set(diseases(history))
            if generalization_gap(history)[0][-1] > COARSE:
                found -= {"generalization-gap"}
            readings.append((whole.run["name"], epochs, found))
    return readings


@pytest.mark.parametrize("name", PROVOKED | PICTURED)
def test_what_is_provoked_is_found_and_nothing_else(name):
    disease, runs = (PROVOKED | PICTURED)[name], list(recorded(name))
    assert {run.recipe.epochs for run in runs} == set(disease.lengths)
    for run in runs:
        found = {finding.kind: finding for finding in diagnose(run)}
        where = (name, run.recipe.epochs, run.run["seed"], [*found])
        gap = {"generalization-gap"} if "overfitting" in found else set()  # which isn't told twice
        assert disease.found <= found.keys() | gap, where
        assert set(diseases(run)) - disease.found <= disease.may, where
        assert "healthy" not in found, where
        if disease.cause:
            assert any(disease.cause in finding.metrics.get("recipe", {}) for finding in found.values()), where


def test_seeds_of_an_unstable_recipe_differ_by_more_than_sampling():
    tests = [run.result["test"] for run in recorded("differs by seed")]
    assert seed_variance("cnn", [test["top1"] for test in tests], tests[0]["images"])


def test_a_network_that_begins_to_learn_in_its_second_epoch_is_not_called_dead():
    for run in recorded("spikes"):
        for epochs in range(1, 5):
            found = diagnose(RunHistory(run.run, run.records[:epochs], None))
            assert "collapse" not in {finding.kind for finding in found}, (run.run["seed"], epochs)


def test_after_few_epochs_a_healthy_run_is_so_only_so_far():
    for line in WHOLE.read_text().splitlines():
        whole = to_history(json.loads(line))
        for epochs in range(1, 6):
            for finding in diagnose(RunHistory(whole.run, whole.records[:epochs], None)):
                if finding.kind == "healthy":
                    assert "fall together so far" in finding.evidence
                    assert finding.advice == "Nothing needs fixing so far."
                if finding.kind == "validation-above-training":
                    ahead = finding.evidence.partition(", no less:")[1]
                    assert bool(ahead) == (
                        whole.records[epochs - 1].train_eval_top1 >= whole.records[epochs - 1].val_top1
                    )


def test_healthy_runs_are_alarmed_at_most_once_in_fifty_readings():
    readings = healthy_readings()
    alarms = [reading for reading in readings if reading[2]]
    assert len(readings) >= 300
    assert len(alarms) <= len(readings) / 50, alarms


@pytest.mark.parametrize("line", WHOLE.read_text().splitlines(), ids=lambda line: json.loads(line)["run"]["name"])
def test_validation_that_is_ahead_of_augmented_images_is_explained(line):
    whole = to_history(json.loads(line))
    for epochs in LENGTHS:
        history = RunHistory(whole.run, whole.records[:epochs], None)
        found = {finding.kind: finding for finding in diagnose(history)}
        if len(history.records) == epochs:
            assert found["validation-above-training"].metrics["explained"], epochs
            assert not diseases(history).keys() - {"generalization-gap"}, epochs


def table() -> str:
    kinds = [*sorted({kind for d in PROVOKED.values() for kind in d.found | d.may} - TRENDS), "too-early", "healthy"]
    lines = [
        f"{'provoked':<32}{'runs':>5}  " + " ".join(f"{kind.replace('learning-rate', 'lr')[:12]:>12}" for kind in kinds)
    ]
    for name in PROVOKED:
        for length in LENGTHS:
            runs = [run for run in recorded(name) if run.recipe.epochs == length]
            found = Counter(finding.kind for run in runs for finding in diagnose(run))
            if runs:
                cells = " ".join(f"{found[kind] or '·':>12}" for kind in kinds)
                lines.append(f"{f'{name}, {length} epochs':<32}{len(runs):>5}  {cells}")
    readings = healthy_readings()
    alarms = sum(bool(found) for *_, found in readings)
    return "\n".join([*lines, f"Healthy runs on all images: {alarms} false alarms in {len(readings)} readings."])


if __name__ == "__main__":
    print(table())
