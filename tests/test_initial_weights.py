"""The weights that training begins with: read whole or refused in a sentence."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import ResNet50_Weights, resnet18, resnet50, vgg16_bn
from torchvision.transforms import v2

from raycifar import models
from raycifar.data import CIFAR100
from raycifar.data.dataset import to_images
from raycifar.data.sources import load
from raycifar.data.synthetic import synthetic
from raycifar.engine.state import TrainingState
from raycifar.errors import RequestError
from raycifar.models import Architecture, initial_weights
from raycifar.models.architectures.cnn import CnnRecipe
from raycifar.models.layers import whitening_filters
from raycifar.models.preprocess import preprocess
from raycifar.models.recipe import Recipe
from raycifar.models.recipes import choose_recipe, recipe_for
from raycifar.storage.weights import to_file

CPU = torch.device("cpu")


def load_initial_weights(path, model="resnet50", **changes):
    recipe = dataclasses.replace(recipe_for(model, str(path)), **changes)
    return initial_weights.load_initial_weights(model, recipe, synthetic(100, 100))


def state_of(initial, recipe, seed=0):
    return TrainingState(initial.architecture, initial.weights, recipe, seed, CPU)


# From scratch ---------------------------------------------------------------------------------------


def test_from_scratch_the_recipe_decides_the_architecture():
    recipe = Recipe(image_size=64, tta_flip=True)
    initial = initial_weights.load_initial_weights("vgg16", recipe, synthetic(100, 100))
    assert (initial.weights, initial.fingerprint()) == (None, None)
    assert initial.architecture.preprocessing == dataclasses.replace(models.CIFAR, size=64)
    assert (initial.architecture.num_classes, initial.architecture.tta_flip) == (100, True)


def test_an_architecture_makes_weights_from_the_first_images():
    source = synthetic(1200, 100)
    initial = initial_weights.load_initial_weights("cnn", CnnRecipe(whiten=True), source)
    pixels = to_images(source.train["image"])[:1000].astype(np.float32) / 255
    mean, std = (np.float32(values)[:, None, None] for values in (CIFAR100.mean, CIFAR100.std))
    filters = whitening_filters(torch.from_numpy((pixels - mean) / std), 3)
    assert np.allclose(initial.weights["whiten.weight"], filters.numpy(), rtol=1e-3, atol=1e-4)
    assert initial.fingerprint() is None  # the images have one
    assert initial_weights.load_initial_weights("cnn", CnnRecipe(depth=2), source).weights is None


def test_images_are_whitened_at_the_size_that_the_network_sees():
    source, recipe = synthetic(1200, 100), CnnRecipe(whiten=True, image_size=64)
    initial = initial_weights.load_initial_weights("cnn", recipe, source)
    seen = preprocess(torch.from_numpy(to_images(source.train["image"])[:250]), initial.architecture.preprocessing)
    white = F.conv2d(seen, torch.from_numpy(initial.weights["whiten.weight"])).transpose(0, 1).flatten(1)
    covariance = torch.cov(white.double())
    assert covariance.diagonal()[-9:].tolist() == pytest.approx([1.0] * 9, abs=0.05)  # the largest variances
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.01


def test_options_cannot_change_a_network_whose_weights_are_there(tmp_path):
    plain, deep = tmp_path / "plain.pth", tmp_path / "deep.safetensors"
    torch.save(Architecture("cnn").build().state_dict(), plain)
    saved = Architecture("cnn", options={"depth": 2})
    deep.write_bytes(to_file(saved.build().state_dict(), saved))
    source = synthetic(100, 100)
    for recipe, named in (
        (CnnRecipe(pretrained=str(plain), whiten=True, depth=2), "--whiten and --depth"),
        (CnnRecipe(pretrained=str(deep), depth=3), "--depth"),
    ):
        with pytest.raises(RequestError, match=rf"^{named} can't be combined with --pretrained "):
            initial_weights.load_initial_weights("cnn", recipe, source)
    with pytest.raises(RequestError, match=r"holds weights of cnn, not of vgg16\.$"):
        initial_weights.load_initial_weights("vgg16", Recipe(pretrained=str(deep)), source)
    for depth in (1, 2):  # not given, and given rightly
        recipe = CnnRecipe(pretrained=str(deep), depth=depth)
        initial = initial_weights.load_initial_weights("cnn", recipe, source)
        assert initial.architecture.options["depth"] == initial.resolve(recipe).depth == 2
        assert initial.architecture_for(initial.resolve(recipe)) == initial.architecture


def test_weights_that_depend_on_the_image_size_fit_no_other(tmp_path):
    file, model = tmp_path / "vit.pth", "timm:test_vit"
    torch.save(models.find_family(model).build(100, 0.0, False, 64).state_dict(), file)
    recipe = choose_recipe(model, pretrained=str(file), image_size=64)
    initial = initial_weights.load_initial_weights(model, recipe, synthetic(100, 100))
    assert initial.architecture_for(recipe).preprocessing.size == 64
    with pytest.raises(RequestError, match=r"^the initial weights don't fit timm:test_vit: .*pos_embed"):
        initial.architecture_for(dataclasses.replace(recipe, image_size=96))


# From weights ---------------------------------------------------------------------------------------


def test_the_first_batch_gives_the_features_of_torchvision_s_own_model(published_resnet50, resnet50_file, small):
    images = to_images(load(small).train["image"])[:8].copy()
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
    initial = load_initial_weights(resnet50_file)
    ours = state_of(initial, recipe_for("resnet50", str(resnet50_file))).model.eval()
    inputs = preprocess(torch.from_numpy(images), initial.architecture.preprocessing)
    assert (inputs - pictures).abs().max() < 1.01 / 255 / min(published.std)  # PIL rounds to whole pixels, twice
    with torch.no_grad():
        ours.fc, head = torch.nn.Identity(), ours.fc
        features = ours(pictures)
        expected = torch.nn.Sequential(*list(published_resnet50.children())[:-1])(pictures).flatten(1)
        ours.fc = head
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_a_head_for_other_classes_is_dropped_and_one_for_the_same_is_kept(resnet50_file, tmp_path):
    assert "fc.weight" not in load_initial_weights(resnet50_file).weights
    torch.manual_seed(2)
    hundred = resnet50(num_classes=100)
    torch.save(hundred.state_dict(), tmp_path / "hundred.pth")
    state = state_of(load_initial_weights(tmp_path / "hundred.pth"), recipe_for("resnet50", "x"))
    assert torch.equal(state.model.fc.weight, hundred.fc.weight)


def test_a_head_of_other_layers_is_left_out_whatever_it_ends_with(tmp_path):
    state = Architecture("cnn").build().state_dict()
    layers = {name: value for name, value in state.items() if not name.startswith("head")}
    layers |= {"head.0.weight": torch.ones(7, 512), "head.0.num_batches_tracked": torch.tensor(3)}
    torch.save(layers, tmp_path / "other.pth")
    initial = load_initial_weights(tmp_path / "other.pth", "cnn")
    assert not any(name.startswith("head") for name in initial.weights)
    assert initial.notes[-1].endswith("is left out: it has other layers.")


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
    initial = load_initial_weights(tmp_path / "own.safetensors", image_size=32)
    assert initial.architecture == architecture
    assert "fc.weight" in initial.weights
    with pytest.raises(RequestError, match=r"holds weights of resnet50, not of vgg16\.$"):
        load_initial_weights(tmp_path / "own.safetensors", "vgg16")


def write_unusable(path, kind, whole):
    match kind:
        case "text":
            path.write_text("these are no weights, " * 100)
        case "another model":
            torch.save(resnet18().state_dict(), path)
        case "truncated":
            path.write_bytes(whole.read_bytes()[:1_000_000])
        case "truncated safetensors":
            save_file({"a": torch.zeros(1000)}, path)
            path.write_bytes(path.read_bytes()[:500])
        case "a list":
            torch.save([torch.zeros(1)], path)
        case "an optimizer":
            torch.save({"lr": 0.1, "momentum": 0.9}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text", "is not a PyTorch or safetensors file, or is damaged"),
        ("another model", "doesn't fit resnet50: 165 missing: layer1.0.conv3.weight, .* and others; 23 of another"),
        ("truncated", "is not a PyTorch or safetensors file, or is damaged"),
        ("truncated safetensors", "not a safetensors file, or is damaged"),
        ("a list", "holds a list, not a state dict"),
        ("an optimizer", "holds a dictionary of float, not a state dict"),
        ("nothing", "can't be read"),
    ],
)
def test_what_holds_no_weights_of_the_model_is_refused_in_a_sentence(resnet50_file, tmp_path, kind, said):
    with pytest.raises(RequestError, match=said) as refusal:
        load_initial_weights(write_unusable(tmp_path / "weights", kind, resnet50_file))
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).count(". ") <= 1
    assert len(str(refusal.value)) < 500


def test_weights_that_cannot_be_fetched_name_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V2.value, "url", "http://127.0.0.1:9/resnet50-11ad3fa6.pth")
    with pytest.raises(
        RequestError, match=r"can't be downloaded \(.*\): give a weights file with --pretrained FILE, or"
    ):
        load_initial_weights("imagenet")
    with pytest.raises(RequestError, match="there are no ImageNet weights of cnn"):
        load_initial_weights("imagenet", "cnn")


def test_weights_in_the_cache_are_used_and_checked(monkeypatch, tmp_path, published_resnet50):
    """torchvision's own cache and digest, with a file of its layout in the place of the published one."""
    import hashlib

    content = tmp_path / "w"
    torch.save(published_resnet50.state_dict(), content)
    digest = hashlib.sha256(content.read_bytes()).hexdigest()[:8]
    url = f"http://127.0.0.1:9/resnet50-{digest}.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V2.value, "url", url)
    cached = tmp_path / "hub/checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    content.rename(cached)
    initial = load_initial_weights("imagenet")
    ours = torch.tensor(initial.weights["layer4.2.conv3.weight"])
    assert torch.equal(ours, published_resnet50.layer4[2].conv3.weight)


# timm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
def test_timm_s_networks_are_read_for_images_of_another_size(tmp_path, name):
    torch.manual_seed(4)
    pixels = models.find_family(name).imagenet_preprocessing(160)
    published = Architecture(name, num_classes=1000, preprocessing=pixels).build()
    torch.save(published.state_dict(), tmp_path / "w.pth")
    recipe = recipe_for(name, str(tmp_path / "w.pth"))
    initial = load_initial_weights(tmp_path / "w.pth", name, image_size=64)
    state = state_of(initial, recipe)
    assert state.model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 100)
    body = [n for n, v in published.state_dict().items() if not n.startswith(initial.architecture.heads(published))]
    same = [n for n in body if torch.equal(state.model.state_dict()[n], published.state_dict()[n])] if body else []
    assert len(same) >= len(body) - 1  # a transformer's position embeddings are interpolated
    assert set(state.layers[-1]) == {n for n, p in state.model.named_parameters() if p.requires_grad}
