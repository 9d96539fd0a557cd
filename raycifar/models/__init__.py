"""The architectures, by name. Adding one is a module with a `build` function and a line here."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from raycifar.data import CLASSES, SHAPE

if TYPE_CHECKING:
    from torch import nn

NAMES = ("cnn", "vgg16", "resnet50")


def build(name: str, classes: int, dropout: float = 0.0) -> nn.Module:
    """Return the architecture, initialised from torch's default generator.

    Args:
        name: one of `NAMES`.
        classes: how many logits the network ends in.
        dropout: probability of zeroing a feature before a dense layer of the head.

    The network maps float images (N, 3, 32, 32), normalised, to logits (N, classes).
    """
    if name not in NAMES:
        raise ValueError(f"no model is named {name!r}: choose from {', '.join(NAMES)}")
    # Imported when asked for: a worker that trains `cnn` has no need of torchvision.
    module = importlib.import_module(f"raycifar.models.{name}")
    return module.build(classes, dropout)


@functools.cache
def flops(name: str, classes: int = CLASSES) -> int:
    """Return the floating-point operations of one image's forward pass; a multiply-add counts as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, image = build(name, classes).eval(), torch.empty(1, *SHAPE)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()
