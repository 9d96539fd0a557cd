"""ResNet-50 (He et al., 2016, arXiv:1512.03385), torchvision's."""

from torch import nn
from torchvision.models import resnet50

IMAGENET = "ResNet50_Weights.IMAGENET1K_V2"
LAYERS = (("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",), ("fc.",))


def build(classes: int, dropout: float, large_stem: bool) -> nn.Module:
    """Return the network: 23.7 M parameters for 100 classes.

    torchvision's own stem, a 7×7 stride-2 convolution and a max pool, is kept where ImageNet weights go in.
    It would leave an 8×8 map of 32×32 pixels before the first block; from scratch, a 3×3 stride-1 convolution
    and no pool keep all 32×32, as He et al. do on CIFAR.
    """
    model = resnet50(weights=None, zero_init_residual=True)
    if not large_stem:
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(dropout))
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model
