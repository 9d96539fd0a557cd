"""The architectures, for 32×32 images and 100 classes."""

import copy
import json

import pytest
import torch
from torch import nn

from raycifar import models
from raycifar.errors import RequestError
from raycifar.models import Architecture, Preprocessing


@pytest.mark.parametrize(("name", "millions"), [("cnn", 4.2), ("vgg16", 15.0), ("resnet50", 23.7)])
def test_each_maps_images_to_logits_and_has_its_size(name, millions):
    model = Architecture(name).build()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("depth", [1, 2])
def test_cnn_is_the_study_s_five_blocks(depth):
    model = Architecture("cnn", depth=depth).build()
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


@pytest.mark.parametrize("name", models.NAMES)
def test_every_parameter_is_of_one_layer_and_the_head_is_last(name):
    architecture = Architecture(name)
    network = architecture.build()
    layers = architecture.layers(network)
    assert sorted(name for names in layers for name in names) == sorted(name for name, _ in network.named_parameters())
    assert next(iter(network.state_dict())) in layers[0]
    assert layers[-1] == [n for n, _ in network.named_parameters() if n.startswith(architecture.heads(network))]
    assert [p.shape[0] for n, p in network.named_parameters() if n in layers[-1]][-1] == 100


@pytest.mark.parametrize("name", models.NAMES)
def test_each_takes_images_of_other_sizes(name):
    assert Architecture(name, classes=7, large_stem=True).build().eval()(torch.randn(1, 3, 96, 96)).shape == (1, 7)


def test_an_architecture_travels_as_json():
    architecture = Architecture("resnet50", 10, True, Preprocessing(64, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "bicubic"))
    assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture


@pytest.mark.parametrize(("name", "said"), [("vgg19", "vgg16"), ("timm:resnet_50", "timm has no model")])
def test_an_unknown_name_is_refused_with_known_ones(name, said):
    with pytest.raises(RequestError, match=said):
        models.find(name)
