"""Beginning with weights that are there: read whole or refused in a sentence, trained in stages, resumed exactly."""

import dataclasses
import json
import signal

import pytest
import safetensors.torch
import torch
from command import Command
from conftest import checkpoints, history, wait_until
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import ResNet50_Weights, resnet18, resnet50, vgg16_bn
from torchvision.transforms import v2

from raycifar.data.sources import load
from raycifar.data.tables import to_numpy
from raycifar.engine.augment import preprocess
from raycifar.engine.state import TENSORS, TrainingState
from raycifar.errors import RequestError
from raycifar.models import Architecture
from raycifar.models import initial_weights as pretrained
from raycifar.recipes import recipe_for
from raycifar.storage.weights import to_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def theirs():
    """A ResNet-50 as torchvision makes it, with running statistics that are not the first ones."""
    torch.manual_seed(1)
    network = resnet50()
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64))
    return network.eval()


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    """Its state dict, as torchvision's weights are published."""
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(theirs.state_dict(), path)
    return path


def load_initial_weights(path, model="resnet50", **changes):
    return pretrained.load_initial_weights(model, dataclasses.replace(recipe_for(model, str(path)), **changes))


def state_of(start, recipe, seed=0):
    return TrainingState(start.architecture, start.weights, recipe, seed, CPU)


# Reading --------------------------------------------------------------------------------------------


def test_the_first_batch_gives_the_features_of_torchvision_s_own_model(theirs, file, small):
    images = to_numpy(load(small).train["image"].combine_chunks(), "image")[:8].copy()
    published = ResNet50_Weights.IMAGENET1K_V2.transforms()
    pipeline = v2.Compose(
        [
            v2.Resize((224, 224), interpolation=published.interpolation, antialias=published.antialias),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(published.mean, published.std),
        ]
    )
    pictures = torch.stack([pipeline(Image.fromarray(image.transpose(1, 2, 0))) for image in images])
    start = load_initial_weights(file)
    ours = state_of(start, recipe_for("resnet50", str(file))).model.eval()
    inputs = preprocess(torch.from_numpy(images), start.architecture.preprocessing)
    assert (inputs - pictures).abs().max() < 1.01 / 255 / min(published.std)  # PIL rounds to whole pixels, twice
    with torch.no_grad():
        ours.fc, head = torch.nn.Identity(), ours.fc
        features, expected = ours(pictures), torch.nn.Sequential(*list(theirs.children())[:-1])(pictures).flatten(1)
        ours.fc = head
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", ["prefixed", "wrapped", "safetensors"])
def test_other_ways_to_save_the_same_weights_are_read_alike(theirs, file, tmp_path, saved):
    tensors, path = theirs.state_dict(), tmp_path / "weights"
    if saved == "safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        prefixed = {f"module.{name}": value for name, value in tensors.items()}
        torch.save({"epoch": 90, "state_dict": prefixed} if saved == "wrapped" else prefixed, path)
    assert load_initial_weights(path).fingerprint() == load_initial_weights(file).fingerprint()


def test_a_head_for_other_classes_is_dropped_and_one_for_the_same_is_kept(file, tmp_path):
    assert "fc.weight" not in load_initial_weights(file).weights
    torch.manual_seed(2)
    hundred = resnet50(num_classes=100)
    torch.save(hundred.state_dict(), tmp_path / "hundred.pth")
    state = state_of(load_initial_weights(tmp_path / "hundred.pth"), recipe_for("resnet50", "x"))
    assert torch.equal(state.model.fc.weight, hundred.fc.weight)


def test_vgg16_takes_torchvision_s_features_and_a_head_of_its_own(tmp_path):
    torch.manual_seed(3)
    network = vgg16_bn(num_classes=10)
    network.classifier = torch.nn.Linear(25088, 10)  # smaller to write
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    state = state_of(load_initial_weights(tmp_path / "vgg.pth", "vgg16"), recipe_for("vgg16", "x"))
    assert torch.equal(state.model.features[40].weight, network.features[40].weight)


def test_raycifar_s_own_weights_bring_their_stem_and_their_pixels(tmp_path):
    architecture = Architecture("resnet50")
    (tmp_path / "own.safetensors").write_bytes(to_file(architecture.build().state_dict(), architecture))
    start = load_initial_weights(tmp_path / "own.safetensors", image_size=32)
    assert start.architecture == architecture
    assert "fc.weight" in start.weights
    with pytest.raises(RequestError, match=r"holds the weights of a resnet50, not of a vgg16\.$"):
        load_initial_weights(tmp_path / "own.safetensors", "vgg16")


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/raycifar-was-here",)


def write_unusable(path, kind, file):
    match kind:
        case "text":
            path.write_text("these are no weights, " * 100)
        case "malicious":
            torch.save({"conv1.weight": torch.zeros(1), "payload": Malicious()}, path)
        case "another model":
            torch.save(resnet18().state_dict(), path)
        case "truncated":
            path.write_bytes(file.read_bytes()[:1_000_000])
        case "truncated safetensors":
            save_file({"a": torch.zeros(1000)}, path)
            path.write_bytes(path.read_bytes()[:500])
        case "a list":
            torch.save([torch.zeros(1)], path)
        case "an optimiser":
            torch.save({"lr": 0.1, "momentum": 0.9}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text", "is no PyTorch or safetensors file, or a truncated one"),
        ("malicious", r"is refused: its pickle asks for (posix|nt|os)\.system, which no state dict needs"),
        ("another model", "doesn't fit resnet50: 165 missing: layer1.0.conv3.weight, .* and others; 23 of another"),
        ("truncated", "is no PyTorch or safetensors file, or a truncated one"),
        ("truncated safetensors", "no safetensors file, or a damaged one"),
        ("a list", "holds a list, not a state dict"),
        ("an optimiser", "holds a dictionary of float, not a state dict"),
        ("nothing", "can't be read"),
    ],
)
def test_what_holds_no_weights_of_the_model_is_refused_in_a_sentence(file, tmp_path, kind, said):
    with pytest.raises(RequestError, match=said) as refusal:
        load_initial_weights(write_unusable(tmp_path / "weights", kind, file))
    assert refusal.value.exit_code == 2
    assert "\n" not in refusal.value.message
    assert refusal.value.message.count(". ") <= 1
    assert len(refusal.value.message) < 500


def test_a_malicious_file_starts_nothing_and_executes_nothing(train, file, small, tmp_path):
    from pathlib import Path

    proof = Path("/tmp/raycifar-was-here")
    proof.unlink(missing_ok=True)
    path = write_unusable(tmp_path / "weights.pth", "malicious", file)
    refused = train("--model", "resnet50", "--pretrained", path, "--data", small, "--val-size", 200, code=2)
    assert "Error: --pretrained" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert not proof.exists()


def test_weights_that_cannot_be_fetched_name_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V2.value, "url", "http://127.0.0.1:9/resnet50-11ad3fa6.pth")
    with pytest.raises(RequestError, match=r"can't be fetched \(.*\): give a weights file with --pretrained FILE, or"):
        load_initial_weights("imagenet")
    with pytest.raises(RequestError, match="there are no ImageNet weights of cnn"):
        load_initial_weights("imagenet", "cnn")


def test_weights_in_the_cache_are_used_and_checked(monkeypatch, tmp_path, theirs):
    """torchvision's own cache and digest, with a file of its layout in the place of the published one."""
    import hashlib

    content = tmp_path / "w"
    torch.save(theirs.state_dict(), content)
    digest = hashlib.sha256(content.read_bytes()).hexdigest()[:8]
    url = f"http://127.0.0.1:9/resnet50-{digest}.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V2.value, "url", url)
    cached = tmp_path / "hub/checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    content.rename(cached)
    start = load_initial_weights("imagenet")
    assert torch.equal(torch.tensor(start.weights["layer4.2.conv3.weight"]), theirs.layer4[2].conv3.weight)


# Training in stages ---------------------------------------------------------------------------------


def one_step(state):
    state.train_mode()
    state.model(torch.randn(4, 3, 64, 64)).sum().backward()
    state.optimizer.step()


def test_what_is_frozen_has_no_gradient_no_optimiser_state_and_keeps_its_statistics(file):
    recipe = dataclasses.replace(recipe_for("resnet50", str(file)), head_epochs=1, image_size=64)
    state = state_of(load_initial_weights(file, image_size=64), recipe)
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
    assert not [name for name in safetensors.torch.load(state.snapshot()()[TENSORS]) if name.startswith("optimizer.")]
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    one_step(state)
    moved = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"conv1.weight", "bn1.running_mean", "layer3.0.conv2.weight", "fc.weight"} <= moved


def test_the_nearer_to_the_input_the_smaller_the_learning_rate(file):
    recipe = dataclasses.replace(recipe_for("resnet50", str(file)), head_epochs=0, layer_decay=0.5)
    state = state_of(load_initial_weights(file), recipe)
    scale = {id(p): group["lr_scale"] for group in state.optimizer.param_groups for p in group["params"]}
    model = state.model
    found = [scale[id(p)] for p in (model.fc.bias, model.layer4[0].bn1.weight, model.layer1[0].conv1.weight)]
    assert found == [1.0, 0.5, 0.0625]
    assert scale[id(model.conv1.weight)] == 0.5**5
    decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    assert decay[id(model.conv1.weight)] == recipe.weight_decay
    assert decay[id(model.bn1.weight)] == 0


def test_frozen_statistics_stay_while_the_weights_of_the_norms_move(file):
    recipe = dataclasses.replace(recipe_for("resnet50", str(file)), head_epochs=0, batch_norm="frozen")
    state = state_of(load_initial_weights(file), recipe)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    one_step(state)
    after = state.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name)
    assert not torch.equal(after["layer2.0.bn1.weight"], before["layer2.0.bn1.weight"])


RUN = ("--val-size", 100, "--limit", 400, "--epochs", 3, "--head-epochs", 1, "--batch-size", 50, "--image-size", 32)
RUN += ("--no-report",)


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
    train, file, small, tmp_path, request, model, workers
):
    env = request.getfixturevalue("cluster") if workers else None
    if model.startswith("timm:"):
        torch.manual_seed(4)
        file = tmp_path / "timm.pth"
        torch.save(Architecture(model, classes=1000).build().state_dict(), file)
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


# timm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
def test_timm_s_networks_are_read_for_images_of_another_size(tmp_path, name):
    torch.manual_seed(4)
    published = Architecture(name, classes=1000, preprocessing=begin_preprocessing(name, 160)).build()
    torch.save(published.state_dict(), tmp_path / "w.pth")
    recipe = recipe_for(name, str(tmp_path / "w.pth"))
    start = load_initial_weights(tmp_path / "w.pth", name, image_size=64)
    state = state_of(start, recipe)
    assert state.model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 100)
    body = [n for n, v in published.state_dict().items() if not n.startswith(start.architecture.heads(published))]
    same = [n for n in body if torch.equal(state.model.state_dict()[n], published.state_dict()[n])] if body else []
    assert len(same) >= len(body) - 1  # a transformer's position embeddings are interpolated
    assert set(state.layers[-1]) == {n for n, p in state.model.named_parameters() if p.requires_grad}


def begin_preprocessing(name, size):
    from raycifar import models

    return models.find(name).imagenet_preprocessing(size)
