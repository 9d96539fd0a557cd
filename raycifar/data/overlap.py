"""Images that a data set holds more than once, equal pixel by pixel."""

import hashlib
from dataclasses import dataclass

from raycifar.data.tables import Source, to_images


@dataclass(frozen=True)
class Repeats:
    """How many training images repeat another one, and how many test images are also among the training images."""

    within_training: int
    test_in_training: int


def count_repeats(source: Source) -> Repeats:
    """Return how many images repeat others; 60,000 take a fraction of a second."""
    train, test = (
        [hashlib.blake2b(image, digest_size=16).digest() for image in to_images(table["image"])]
        for table in (source.train, source.test)
    )
    distinct = set(train)
    return Repeats(
        within_training=len(train) - len(distinct), test_in_training=sum(digest in distinct for digest in test)
    )
