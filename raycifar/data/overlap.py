"""Images that a data set holds more than once, equal pixel by pixel."""

from dataclasses import dataclass

import numpy as np

from raycifar.data import CIFAR100
from raycifar.data.tables import Source, to_images


@dataclass(frozen=True)
class Repeats:
    """How many training images repeat another one, and how many test images are also among the training images."""

    within_training: int
    test_in_training: int


def count_repeats(source: Source) -> Repeats:
    """Return how many images repeat others; 60,000 take a fraction of a second."""
    train, test = (to_images(table["image"]) for table in (source.train, source.test))
    weights = np.random.default_rng(0).integers(0, 2**63, CIFAR100.image_bytes // 8).astype(np.uint64)
    train_keys, test_keys = (images.reshape(len(images), -1).view(np.uint64) @ weights for images in (train, test))
    distinct, counts = np.unique(train_keys, return_counts=True)
    again = np.isin(train_keys, distinct[counts > 1])
    both = np.isin(train_keys, test_keys)
    # Few images have a key in common; only these are compared.
    known = {image.tobytes() for image in train[both]}
    return Repeats(
        within_training=int(again.sum()) - len({image.tobytes() for image in train[again]}),
        test_in_training=sum(image.tobytes() in known for image in test[np.isin(test_keys, train_keys)]),
    )
