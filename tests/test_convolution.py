"""Convolutions of small images, by matrix products."""

import copy

import pytest
import torch
from torch import nn

from raycifar.engine.convolution import Convolution, Dense, Shifts, use_products
from raycifar.models import Architecture


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("way", "size"), [(Dense, (2, 2)), (Shifts, (4, 4)), (Shifts, (2, 3)), (Shifts, (1, 1))])
def test_it_is_the_convolution_and_its_gradients_are_its_gradients(way, size, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, padding=1, bias=bias).double()
    images = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(way.apply(images, plain.weight, plain.bias), plain(images))
    assert torch.autograd.gradcheck(way.apply, (images, plain.weight, plain.bias))


@pytest.mark.parametrize(("way", "size"), [(Dense, (2, 2)), (Shifts, (4, 4))])
def test_no_images_have_no_outputs(way, size):
    plain = nn.Conv2d(3, 4, 3, padding=1)
    images = torch.randn(0, 3, *size, requires_grad=True)
    outputs = way.apply(images, plain.weight, plain.bias)
    assert outputs.shape == (0, 4, *size)
    outputs.sum().backward()
    assert images.grad.shape == images.shape
    assert (plain.weight.grad == 0).all()


@pytest.mark.parametrize("size", [2, 4])
def test_in_bfloat16_it_is_as_exact_as_the_convolution(size):
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 32, 3, padding=1)
    ours = nn.Sequential(copy.deepcopy(plain))
    use_products(ours)
    exact = copy.deepcopy(plain).double()
    images, weight = torch.randn(16, 64, size, size).bfloat16(), torch.randn(16, 32, size, size)
    found = []
    for layer in (exact, plain, ours):
        seen = images.to(torch.double if layer is exact else torch.bfloat16, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=layer is not exact):
            outputs = layer(seen)
        (outputs * weight).sum().backward()
        gradients = [tensor.grad for tensor in (seen, *layer.parameters())]
        found.append([tensor.double() for tensor in (outputs, *gradients)])
    for right, convolved, multiplied in zip(*found, strict=True):
        assert (multiplied - right).norm() <= 1.1 * (convolved - right).norm()


@pytest.mark.parametrize(("model", "dense", "shifts"), [("cnn", 1, 1), ("vgg16", 3, 3), ("resnet50", 0, 2)])
def test_it_is_used_where_an_image_has_become_small(model, dense, shifts, monkeypatch):
    network = Architecture(model).build()
    names = list(network.state_dict())
    use_products(network)
    assert list(network.state_dict()) == names
    used = []
    for way in (Dense, Shifts):
        apply = way.apply
        monkeypatch.setattr(way, "apply", lambda *given, way=way, apply=apply: used.append(way) or apply(*given))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.zeros(2, 3, 32, 32))
    assert (used.count(Dense), used.count(Shifts)) == (dense, shifts)
    used.clear()
    network(torch.zeros(2, 3, 32, 32))  # in float32
    assert (used.count(Dense), used.count(Shifts)) == (dense, 0)


def test_other_convolutions_stay_as_they_are():
    others = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 1),
    )
    use_products(others)
    assert not any(isinstance(module, Convolution) for module in others)
