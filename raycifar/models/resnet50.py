"""ResNet-50 (He et al., 2016, arXiv:1512.03385), torchvision's, with a stem for 32×32 images."""

from torch import nn
from torchvision.models import resnet50


def build(classes: int, dropout: float) -> nn.Module:
    """Return the network from scratch: 23.7 M parameters for 100 classes.

    torchvision's 7×7 stride-2 convolution and max pool would leave an 8×8 map of 32×32 pixels before
    the first block; a 3×3 stride-1 convolution and no pool keep all 32×32, as He et al. do on CIFAR.
    """
    model = resnet50(weights=None, zero_init_residual=True)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(dropout))
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model
