"""Images: where they come from, how they are split, and how they reach a worker's device.

The whole package speaks of images as Arrow tables of three columns, four once split:

    image   fixed-size binary of 3,072 bytes: 3×32×32 uint8, channels first
    fine    int64, the class, 0 to 99
    coarse  int64, the superclass, 0 to 19
    index   int64, the row in the source's training or test set
"""

from typing import Final

CLASSES: Final = 100
SUPERCLASSES: Final = 20
SIDE: Final = 32
SHAPE: Final = (3, SIDE, SIDE)
BYTES: Final = 3 * 32 * 32

# Of the 50,000 training images, per channel, for pixels from 0 to 1.
MEAN: Final = (0.50708, 0.48655, 0.44092)
STD: Final = (0.26733, 0.25644, 0.27615)
