"""Images: sources, splits, and the way to a worker's device.

Images are held in Arrow tables of three columns, and a fourth once they are split:

    image   fixed-size binary: uint8 pixels, channels first
    fine    int64, the class, from 0
    coarse  int64, the superclass, from 0
    index   int64, the row in the source's training or test set
"""

from dataclasses import dataclass
from typing import Final

from raycifar.data.names import COARSE, FINE, SUPERCLASS_OF


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set."""

    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...]
    image_size: int  # pixels per side
    mean: tuple[float, ...]  # of the training images, per channel, for pixels from 0 to 1
    std: tuple[float, ...]  # likewise
    superclass_of: tuple[int, ...]  # of each class

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_superclasses(self) -> int:
        return len(self.superclass_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return len(self.mean), self.image_size, self.image_size

    @property
    def image_bytes(self) -> int:
        return len(self.mean) * self.image_size**2


CIFAR100: Final = DatasetInfo(
    class_names=FINE,
    superclass_names=COARSE,
    image_size=32,
    mean=(0.50708, 0.48655, 0.44092),
    std=(0.26733, 0.25644, 0.27615),
    superclass_of=SUPERCLASS_OF,
)
