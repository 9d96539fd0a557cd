"""VGG-16 (Simonyan and Zisserman, 2015, arXiv:1409.1556), torchvision's, with batch norm."""

from torch import nn
from torchvision.models import vgg16_bn


def build(classes: int, dropout: float) -> nn.Module:
    """Return the network: 15.0 M parameters for 100 classes.

    Five poolings leave a 1×1 map of 32×32 pixels, so torchvision's 7×7 average pool and its head of
    25,088 inputs give way to a head of 512.
    """
    model = vgg16_bn(weights=None, num_classes=classes)
    model.avgpool = nn.Identity()
    model.classifier = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(512, classes),
    )
    return model
