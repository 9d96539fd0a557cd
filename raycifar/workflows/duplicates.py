"""Which images of a data set show one photograph: found once for a data set, and listed in a table and on a page."""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raycifar.data.sources import cache_folder, load
from raycifar.data.tables import Source, to_images
from raycifar.storage.files import write_whole
from raycifar.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from raycifar.data.duplicates import Pairs
    from raycifar.terminal import Screen

DUPLICATES, DUPLICATES_PAGE = "duplicates.csv", "duplicates.html"
SHOWN = 120  # pairs of a section of the page
COLUMNS = ("split", "index", "other_split", "other_index", "kind", "similarity", "same_label")


@dataclass(frozen=True)
class Duplicates:
    """The pairs of a data set's images that show one photograph, or similar ones.

    The images are numbered from the first test image on; training images follow.
    """

    source: Source
    pairs: "Pairs"

    def rows(self) -> list[tuple[str, int, str, int, str, float, bool]]:
        """Return the pairs, the most alike first, as `COLUMNS` names them."""
        fine = np.concatenate([self.source.test["fine"], self.source.train["fine"]])
        first, second = self.pairs.first.numpy(), self.pairs.second.numpy()
        same = (fine[first] == fine[second]).tolist()
        places = zip(map(self.place, first.tolist()), map(self.place, second.tolist()), strict=True)
        values = zip(places, self.pairs.kinds(), self.pairs.similarity.tolist(), same, strict=True)
        return [(*one, *other, kind, round(similarity, 4), label) for (one, other), kind, similarity, label in values]

    def place(self, number: int) -> tuple[str, int]:
        """Return the split of an image, and its row there."""
        num_test = len(self.source.test)
        return ("test", number) if number < num_test else ("train", number - num_test)

    def to_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*row[:-1], str(row[-1]).lower()) for row in self.rows())
        return text.getvalue()

    def summary(self) -> dict[str, str]:
        """Return, for each pair of splits, how many images of the first have a copy in the second, and of what kind."""
        found: dict[tuple[str, str], dict[int, str]] = {}
        for split, index, other, _, kind, _, _ in self.rows():
            found.setdefault((split, other), {}).setdefault(index, kind)
        names = {("test", "train"): "test images like a training image", ("test", "test"): "like another test image"}
        names[("train", "train")] = "training images like another one"
        return {
            name: ", ".join(f"{Counter(found.get(splits, {}).values())[kind]:,} {kind}" for kind in self.pairs.KINDS)
            for splits, name in names.items()
        }


def find_duplicates(source: Source, screen: "Screen") -> Duplicates:
    """Return a data set's duplicates: from the cache, or found and put there."""
    from raycifar.data.duplicates import Pairs, find_pairs

    file = cache_folder() / "duplicates" / f"{source.fingerprint()}.npz"
    ...
