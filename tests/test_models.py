"""The architectures: what they build, what they say of themselves, and that a new one is one file."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from command import ROOT
from safetensors.torch import load_file
from torch import nn

from raycifar import models
from raycifar.errors import RequestError
from raycifar.models import Architecture, Preprocessing
from raycifar.models.layers import whitening_filters


@pytest.mark.parametrize(("name", "millions"), [("cnn", 4.2), ("speedrun", 6.5), ("vgg16", 15.0), ("resnet50", 23.7)])
def test_each_maps_images_to_logits_and_has_its_size(name, millions):
    model = Architecture(name).build()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("depth", [1, 2])
def test_cnn_is_the_study_s_five_blocks(depth):
    model = Architecture("cnn", options={"depth": depth}).build()
    filters = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert filters == [count for count in (64, 128, 256, 512, 512) for _ in range(depth)]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 5
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 2


@pytest.mark.parametrize("name", ["cnn", "vgg16"])
def test_pooling_before_the_relu_is_pooling_after_it(name):
    torch.manual_seed(0)
    ours = Architecture(name).build()
    usual = copy.deepcopy(ours)
    for block in [m for m in usual.modules() if isinstance(m, nn.Sequential)]:
        for k in [k for k, layer in enumerate(block) if isinstance(layer, nn.MaxPool2d)]:
            assert isinstance(block[k + 1], nn.ReLU)
            block[k], block[k + 1] = block[k + 1], block[k]
    images = torch.randn(8, 3, 32, 32)
    outputs = [network(images) for network in (ours, usual)]
    gradients = [
        torch.autograd.grad(out.square().sum(), [p for p in network.parameters() if p.requires_grad])
        for out, network in zip(outputs, (ours, usual), strict=True)
    ]
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *gradients))


def test_vgg16_leaves_biases_alone_whose_gradients_are_zero():
    torch.manual_seed(0)
    network = Architecture("vgg16").build().double()
    fixed = [p for p in network.parameters() if not p.requires_grad]
    assert [p.shape for p in fixed] == [m.bias.shape for m in network.modules() if isinstance(m, nn.Conv2d)]
    for bias in fixed:
        bias.requires_grad_()
    network(torch.randn(8, 3, 32, 32).double()).square().sum().backward()
    assert max(bias.grad.abs().max() for bias in fixed) < 1e-9
    assert min(p.grad.abs().max() for p in network.parameters() if p.ndim > 1) > 1e-3


def test_resnet50_keeps_torchvision_s_names_and_its_first_map_at_full_size():
    from torchvision.models import resnet50

    model = Architecture("resnet50").build(dropout=0.1)
    assert model.state_dict().keys() == resnet50().state_dict().keys()
    assert model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("name", models.names())
def test_every_parameter_is_of_one_layer_and_the_head_is_last(name):
    architecture = Architecture(name)
    network = architecture.build()
    layers = architecture.layers(network)
    assert sorted(name for names in layers for name in names) == sorted(name for name, _ in network.named_parameters())
    assert next(iter(network.state_dict())) in layers[0]
    assert layers[-1] == [n for n, _ in network.named_parameters() if n.startswith(architecture.heads(network))]
    assert [p.shape[0] for n, p in network.named_parameters() if n in layers[-1]][-1] == 100


@pytest.mark.parametrize("name", models.names())
def test_each_takes_images_of_other_sizes(name):
    assert Architecture(name, num_classes=7, large_stem=True).build().eval()(torch.randn(1, 3, 96, 96)).shape == (1, 7)


def test_a_network_with_tta_flip_answers_alike_for_an_image_and_its_mirror_image():
    flipped, plain = Architecture("cnn", tta_flip=True).build(), Architecture("cnn").build()
    plain.load_state_dict(flipped.state_dict())
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(flipped.train()(images), plain.train()(images))
        answers = flipped.eval()(images)
        both = [plain.eval()(side) for side in (images, images.flip(3))]
        assert torch.allclose(answers, (both[0] + both[1]) / 2, atol=1e-5)
        assert not torch.allclose(*both, atol=1e-3)


@pytest.mark.parametrize("size", [2, 3])
def test_whitened_patches_are_uncorrelated_and_of_variance_one(size):
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(50, 3, 34, 34)).cumsum(2).cumsum(3)
    pixels = ((smooth - smooth.mean()) / smooth.std()).astype(np.float32)
    filters = whitening_filters(torch.from_numpy(pixels), size)
    out = torch.nn.functional.conv2d(torch.from_numpy(pixels), filters).permute(1, 0, 2, 3).flatten(1).double()
    strong = out.var(1) > 0.9  # the others vary less than noise, and are left small
    assert strong.sum() >= 3
    assert torch.allclose(torch.cov(out)[strong][:, strong], torch.eye(int(strong.sum())).double(), atol=0.1)
    assert out.var(1).max() < 1.01


# What an architecture says of itself ----------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture("resnet50", 10, True, Preprocessing(64, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "bicubic")),
        Architecture("cnn", tta_flip=True, options={"whiten": True, "depth": 2}),
        Architecture("timm:test_vit"),
    ],
    ids=lambda architecture: architecture.model,
)
def test_an_architecture_travels_as_json(architecture):
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture


@pytest.mark.parametrize(
    ("model", "options"), [("cnn", {"whiten": True, "depth": 2}), ("vgg16", {"whiten": False, "depth": 1})]
)
def test_an_architecture_that_an_earlier_version_wrote_is_read(model, options):
    pixels = {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "interpolation": "bilinear"}
    old = {"model": model, "classes": 7, "large_stem": False, "preprocessing": pixels, "mirror": True, **options}
    read = Architecture.from_json(old)
    assert (read.num_classes, read.tta_flip, read.preprocessing.mean) == (7, True, (0.1, 0.2, 0.3))
    assert read.options == (options if model == "cnn" else {})


def test_options_that_are_not_given_have_their_defaults():
    assert Architecture("cnn") == Architecture("cnn", options={"depth": 1, "whiten": False})
    assert Architecture("cnn") != Architecture("cnn", options={"depth": 2})
    assert models.flops(Architecture("cnn", options={"depth": 2})) > models.flops(Architecture("cnn"))


def test_to_know_the_models_and_their_options_takes_no_pytorch():
    code = "import sys; from raycifar.models.recipes import recipe_fields; assert 'depth' in recipe_fields()"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("name", "said"), [("vgg19", "vgg16"), ("timm:resnet_50", "timm has no model")])
def test_an_unknown_name_is_refused_with_known_ones(name, said):
    with pytest.raises(RequestError, match=said):
        models.find_family(name)


# A new one ------------------------------------------------------------------------------------------

TINY = """
from dataclasses import dataclass

from raycifar.models.recipe import Recipe, option


@dataclass(frozen=True)
class TinyRecipe(Recipe):
    width: int = option(8, "channels of the one convolution")


LAYERS = (("0.",), ("3.",))
RECIPES = {"scratch": TinyRecipe(lr=0.01), "tuned": TinyRecipe(lr=0.03, width=4)}
PURPOSES = {"tuned": "a test"}


def build(num_classes, dropout, width):
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""
BESIDE = "import sys, runpy, raycifar.models.architectures as a; a.__path__.append(sys.argv.pop(1)); "
BESIDE += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


@pytest.mark.slow  # the documentation's example is trained, too
def test_a_new_architecture_is_one_file(small, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.py").write_text(TINY)

    def raycifar(command, *args, code=0):
        line = [sys.executable, "-c", BESIDE, tmp_path / "models", f"raycifar.{command}", *args]
        done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    shown = raycifar("train", "--help")
    assert "resnet50, speedrun, tiny, vgg16" in shown
    assert "--width N" in " ".join(shown.split())
    assert "channels of the one convolution" in raycifar("recipes", "tiny")
    assert "lr = 0.03" in raycifar("recipes", "tiny", "--recipe", "tuned")
    run = ("--data", small, "--limit", 200, "--val-size", 100, "--epochs", 1, "--workers", 0, "--no-report")
    run += ("--storage", tmp_path / "runs", "--name", "a")
    assert "width is an option of tiny, not of vgg16." in raycifar(
        "train", "--model", "vgg16", "--width", 3, *run, code=2
    )
    raycifar("train", "--model", "tiny", "--recipe", "tuned", "--width", 3, *run)
    about = json.loads((tmp_path / "runs/a/run.json").read_text())
    assert (about["recipe"]["lr"], about["recipe"]["width"]) == (0.03, 3)
    assert about["architecture"]["options"] == {"width": 3}
    assert load_file(tmp_path / "runs/a/model.safetensors")["0.weight"].shape == (3, 3, 3, 3)
