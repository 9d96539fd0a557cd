"""Images: where they come from, how they are split, and how they reach a worker's device.

The whole package speaks of images as Arrow tables of three columns, four once split:

    image   fixed-size binary of 3,072 bytes: 3×32×32 uint8, channels first
    fine    int64, the class, 0 to 99
    coarse  int64, the superclass, 0 to 19
    index   int64, the row in the source's training or test set
"""

from dataclasses import dataclass
from typing import Final

from raycifar.data.names import COARSE, FINE

CLASSES: Final = 100
SUPERCLASSES: Final = 20
SIDE: Final = 32
SHAPE: Final = (3, SIDE, SIDE)
BYTES: Final = 3 * 32 * 32

# Of the 50,000 training images, per channel, for pixels from 0 to 1.
MEAN: Final = (0.50708, 0.48655, 0.44092)
STD: Final = (0.26733, 0.25644, 0.27615)


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set: it travels with the images.

    image_size: pixels a side. mean, std: of the training images, per channel, for pixels from 0 to 1.
    """

    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

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


CIFAR100: Final = DatasetInfo(FINE, COARSE, SIDE, MEAN, STD)
