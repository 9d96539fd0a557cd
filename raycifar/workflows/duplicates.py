"""Which images of a data set show one photograph: found once for a data set, listed in a table and shown on a page."""

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from raycifar.data import CIFAR100
from raycifar.data.sources import cache_folder, load
from raycifar.data.tables import Source, to_images, to_parquet
from raycifar.storage.files import locate, read_file, write_whole
from raycifar.storage.locations import check_location
from raycifar.storage.parquet import ParquetError, read_parquet
from raycifar.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from raycifar.terminal import Screen

DUPLICATES, DUPLICATES_PAGE = "duplicates.csv", "duplicates.html"
KINDS = ("exact", "near", "similar")
BETWEEN = {
    ("test", "train"): "Test images that are also among the training images",
    ("test", "test"): "Test images that repeat another test image",
    ("train", "train"): "Training images that repeat another training image",
}
SHOWN = 60  # pairs of each kind, in each section of the page
METHOD = 1  # counts up with each change of what is found


@dataclass(frozen=True)
class Duplicates:
    """Pairs of images that show one photograph, the most alike first.

    split, other_split: (n,) "test" or "train". index, other_index: (n,) rows of these sets. kind: (n,) one of `KINDS`.
    similarity: (n,) up to 1. same_label: (n,) bool.
    """

    split: np.ndarray
    index: np.ndarray
    other_split: np.ndarray
    other_index: np.ndarray
    kind: np.ndarray
    similarity: np.ndarray
    same_label: np.ndarray

    def to_csv(self) -> bytes:
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(pa.table(vars(self)), sink, pyarrow.csv.WriteOptions(quoting_style="none"))
        return sink.getvalue().to_pybytes()

    def counts(self) -> dict[tuple[str, str], dict[str, int]]:
        """Return, for each pair of splits, how many images have a copy there, by the kind of the best one."""
        counts = {}
        for split, other in BETWEEN:
            rows = (self.split == split) & (self.other_split == other)
            _, first = np.unique(self.index[rows], return_index=True)
            kinds = self.kind[rows][first]
            counts[split, other] = {kind: int((kinds == kind).sum()) for kind in KINDS}
        return counts

    def summary(self) -> dict[str, str]:
        """Return how many there are, in words."""
        return {
            BETWEEN[splits].lower(): ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
            for splits, counts in self.counts().items()
        }


def list_duplicates(data: str, out: str, screen: "Screen") -> tuple[Duplicates, RunFolder]:
    """Find the duplicates of a data set, and write duplicates.csv and a page of them.

    Args:
        out: the folder or URI to write to.

    Raises:
        RequestError: the data set can't be read.
    """
    check_location(out, "--out", to_write=True)
    with screen.waiting(f"Reading {data}"):
        source = load(data)
    found = find_duplicates(source, screen)
    folder = RunFolder.at(out)
    folder.write(DUPLICATES, found.to_csv())
    folder.write(DUPLICATES_PAGE, to_page(found, source).encode())
    return found, folder


def find_duplicates(source: Source, screen: "Screen") -> Duplicates:
    """Return the images of a data set that show one photograph: from the cache, or found and put there."""
    filesystem, path = locate(cache_folder() / "duplicates" / f"{source.fingerprint()}-{METHOD}.parquet")
    columns = {"first": "integers", "second": "integers", "similarity": "real numbers", "kind": "integers"}
    try:
        pairs = read_parquet(read_file(path), columns)
    except (OSError, ParquetError):
        pairs = search(source, screen)
        with suppress(OSError):  # without a cache it takes longer
            write_whole(filesystem, path, to_parquet(pairs))
    first, second, similarity, kind = (pairs[name].to_numpy() for name in columns)
    num_test = len(source.test)
    fine = np.concatenate([source.test["fine"], source.train["fine"]])
    return Duplicates(
        split=np.where(first < num_test, "test", "train"),
        index=np.where(first < num_test, first, first - num_test),
        other_split=np.where(second < num_test, "test", "train"),
        other_index=np.where(second < num_test, second, second - num_test),
        kind=np.array(KINDS)[kind],
        similarity=similarity.round(4),
        same_label=fine[first] == fine[second],
    )


def search(source: Source, screen: "Screen") -> pa.Table:
    """Return the pairs of a data set's images, numbered from the first test image; training images follow."""
    with screen.waiting("Loading PyTorch"):
        import torch

        from raycifar.data.duplicates import NEAR, find_pairs
    images = torch.from_numpy(np.concatenate([to_images(table["image"]) for table in (source.test, source.train)]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with screen.progress("Comparing the images") as progress:
        pairs = find_pairs(images.to(device), progress)
    columns = {name: values.cpu().numpy() for name, values in vars(pairs).items()}
    exact, near = columns.pop("exact"), columns["similarity"] >= NEAR
    return pa.table(columns | {"kind": np.where(exact, 0, np.where(near, 1, 2))})


def to_page(found: Duplicates, source: Source) -> str:
    """Return `duplicates.html`: the pairs, side by side."""
    from raycifar.analysis.page import render

    sections = []
    for (split, other), counts in found.counts().items():
        shown = []
        for kind in KINDS:
            rows = np.flatnonzero((found.split == split) & (found.other_split == other) & (found.kind == kind))
            shown.append({"kind": kind, "pairs": [to_figure(found, row, source) for row in rows[:SHOWN]]})
        sections.append({"heading": BETWEEN[split, other], "counts": counts, "kinds": shown})
    num_images = {"test": len(source.test), "train": len(source.train)}
    return render("duplicates.html", {}, title="Duplicates", source=source.name, sections=sections, images=num_images)


def to_figure(found: Duplicates, row: int, source: Source) -> dict[str, Any]:
    """Return a pair: pictures, and their places and labels."""
    from raycifar.analysis.reports import picture

    pictures = []
    for split, index in (
        (found.split[row], int(found.index[row])),
        (found.other_split[row], int(found.other_index[row])),
    ):
        table = source.test if split == "test" else source.train
        label = CIFAR100.class_names[table["fine"][index].as_py()].replace("_", " ")
        pictures.append({"uri": picture(table, index), "words": f"{split} {index}: {label}", "label": label})
    return {"pictures": pictures, "similarity": found.similarity[row], "same_label": bool(found.same_label[row])}
