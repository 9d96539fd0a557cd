"""The architectures, for 32×32 images and 100 classes."""

import pytest
import torch
from torch import nn

from raycifar import models


@pytest.mark.parametrize(("name", "millions"), [("cnn", 4.2), ("vgg16", 15.0), ("resnet50", 23.7)])
def test_each_maps_images_to_logits_and_has_its_size(name, millions):
    model = models.build(name, 100)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_cnn_is_the_study_s_five_blocks():
    model = models.build("cnn", 100)
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512, 512]
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 5
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 2


def test_resnet50_keeps_torchvision_s_names_and_its_first_map_at_full_size():
    from torchvision.models import resnet50

    model = models.build("resnet50", 100, dropout=0.1)
    assert model.state_dict().keys() == resnet50().state_dict().keys()
    assert model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="vgg16"):
        models.build("vgg19", 100)
