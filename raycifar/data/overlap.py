"""Images that a data set holds more than once, equal pixel by pixel."""

from dataclasses import dataclass

from raycifar.data.tables import Source, to_images


@dataclass(frozen=True)
class Repeats:
    """How many training images repeat another one, and how many test images are also among the training images."""

    within_training: int
    test_in_training: int


def count_repeats(source: Source) -> Repeats:
    """Return how many images repeat others; 60,000 take a fraction of a second."""
    # Hashes of 64 bits: the chance that two of a million different images share one is below 1 in 10 million.
    train, test = (
        [hash(image.tobytes()) for image in to_images(table["image"])] for table in (source.train, source.test)
    )
    distinct = set(train)
    return Repeats(len(train) - len(distinct), sum(image in distinct for image in test))
