"""Training on from weights that are there: in stages, resumed exactly."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from command import Command
from conftest import checkpoints, history, wait_until
from test_initial_weights import load_initial_weights, state_of

from raycifar.models import Architecture
from raycifar.models.recipes import recipe_for

PROOF = Path("/tmp/raycifar-was-here")


class Malicious:
    def __reduce__(self):
        import os

        return os.system, (f"touch {PROOF}",)


def test_a_malicious_file_starts_nothing_and_executes_nothing(train, small, tmp_path):
    PROOF.unlink(missing_ok=True)
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1), "payload": Malicious()}, path)
    refused = train("--model", "resnet50", "--pretrained", path, "--data", small, "--val-size", 200, code=2)
    assert "Error: --pretrained" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert not PROOF.exists()


# Training in stages ---------------------------------------------------------------------------------


def one_step(state):
    state.train_mode()
    state.model(torch.randn(4, 3, 64, 64)).sum().backward()
    state.optimizer.step()


def test_what_is_frozen_has_no_gradient_no_optimizer_state_and_keeps_its_statistics(resnet50_file):
    recipe = dataclasses.replace(recipe_for("resnet50", str(resnet50_file)), head_epochs=1, image_size=64)
    state = state_of(load_initial_weights(resnet50_file, image_size=64), recipe)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    one_step(state)
    moved = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    assert {name for name, p in state.model.named_parameters() if p.grad is not None} == moved
    assert len(state.optimizer.state) == 2
    assert {group["lr_scale"] for group in state.optimizer.param_groups} == {1.0}

    state.progress.epoch = 2
    assert state.enter_stage()
    assert not state.enter_stage()
    assert not [name for name in state.tensors() if name.startswith("optimizer.")]
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    one_step(state)
    moved = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"conv1.weight", "bn1.running_mean", "layer3.0.conv2.weight", "fc.weight"} <= moved


def test_the_nearer_to_the_input_the_smaller_the_learning_rate(resnet50_file):
    recipe = dataclasses.replace(recipe_for("resnet50", str(resnet50_file)), head_epochs=0, layer_decay=0.5)
    state = state_of(load_initial_weights(resnet50_file), recipe)
    scale = {id(p): group["lr_scale"] for group in state.optimizer.param_groups for p in group["params"]}
    model = state.model
    found = [scale[id(p)] for p in (model.fc.bias, model.layer4[0].bn1.weight, model.layer1[0].conv1.weight)]
    assert found == [1.0, 0.5, 0.0625]
    assert scale[id(model.conv1.weight)] == 0.5**5
    decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    assert decay[id(model.conv1.weight)] == recipe.weight_decay
    assert decay[id(model.bn1.weight)] == 0


def test_frozen_statistics_stay_while_the_weights_of_the_norms_move(resnet50_file):
    recipe = dataclasses.replace(recipe_for("resnet50", str(resnet50_file)), head_epochs=0, batch_norm="frozen")
    state = state_of(load_initial_weights(resnet50_file), recipe)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    one_step(state)
    after = state.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name)
    assert not torch.equal(after["layer2.0.bn1.weight"], before["layer2.0.bn1.weight"])


RUN = ("--val-size", 100, "--limit", 400, "--epochs", 3, "--head-epochs", 1, "--batch-size", 50, "--image-size", 32)
RUN += ("--no-report", "--cpus-per-worker", 1)


@pytest.mark.parametrize(
    ("model", "workers"),
    [
        ("timm:test_resnet", 0),
        pytest.param("resnet50", 0, marks=pytest.mark.slow),
        pytest.param("resnet50", 2, marks=pytest.mark.slow),
        pytest.param("timm:test_resnet", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_in_the_middle_of_the_second_stage_ends_with_the_same_weights(
    train, small, tmp_path, request, model, workers
):
    env = request.getfixturevalue("cluster") if workers else None
    if model.startswith("timm:"):
        torch.manual_seed(4)
        file = tmp_path / "timm.pth"
        torch.save(Architecture(model, num_classes=1000).build().state_dict(), file)
    else:
        file = request.getfixturevalue("resnet50_file")
    args = ("--model", model, "--pretrained", file, "--data", small, "--workers", workers, *RUN)
    train(*args, "--name", "whole", "--checkpoint-steps", 3, env=env)
    command = Command(*args, "--name", "a", "--checkpoint-steps", 3, storage=tmp_path / "runs", env=env)

    def in_stage_two():
        assert not command.ended, "the run ended before it could be disturbed"
        newest = next(iter(checkpoints(tmp_path / "runs/a")), None)
        progress = json.loads((newest / "progress.json").read_text()) if newest else {"epoch": 0}
        return progress["epoch"] == 2 and progress["segments"]

    wait_until(in_stage_two, what="a checkpoint in the middle of epoch 2")
    command.kill(signal.SIGKILL)
    resumed = train(*args, "--name", "a", "--checkpoint-steps", 3, env=env)
    assert "Continuing from epoch 2, step" in resumed.stdout
    whole, a = tmp_path / "runs/whole", tmp_path / "runs/a"
    assert (a / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [row["stage"] for row in history(a)] == ["head", "whole", "whole"]
