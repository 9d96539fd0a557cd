"""Images: sources, splits, and the way to a worker's device.

Images are held in Arrow tables of three columns, and a fourth once they are split:

    image   fixed-size binary: uint8 pixels, channels first
    fine    int64, the class, from 0
    coarse  int64, the superclass, from 0
    index   int64, the row in the source's training or test set
"""

from dataclasses import dataclass
from typing import Final


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


# In the order of the labels.
CLASS_NAMES: Final = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)
SUPERCLASS_NAMES: Final = tuple(
    """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2
    """.split()
)
SUPERCLASS_OF: Final = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1),
    *(10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12),
    *(12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0),
    *(17, 8, 14, 13),
)
CIFAR100: Final = DatasetInfo(
    class_names=CLASS_NAMES,
    superclass_names=SUPERCLASS_NAMES,
    image_size=32,
    mean=(0.50708, 0.48655, 0.44092),
    std=(0.26733, 0.25644, 0.27615),
    superclass_of=SUPERCLASS_OF,
)
