"""The study's own network: five convolution blocks, then two dense layers."""

from collections import OrderedDict

from torch import nn

FILTERS = (64, 128, 256, 512, 512)
LAYERS = (*((f"features.{k}.",) for k in range(len(FILTERS))), ("head.",))


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )


def build(classes: int, dropout: float, large_stem: bool) -> nn.Module:
    """Return the network: 4.2 M parameters for 100 classes.

    Five poolings leave a 1×1 map of 32×32 pixels; the average pool is for images that are scaled up.
    """
    channels = (3, *FILTERS)
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*(block(i, o) for i, o in zip(channels, FILTERS, strict=False))),
            pool=nn.AdaptiveAvgPool2d(1),
            head=nn.Sequential(
                nn.Flatten(),
                nn.Dropout(dropout),
                nn.Linear(FILTERS[-1], 512),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(512, classes),
            ),
        )
    )
