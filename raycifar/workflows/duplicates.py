"""The duplicates in a data set: found once and cached, listed in a table and shown on a page."""

import io
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycifar.data import CIFAR100
from raycifar.data.dataset import Source, to_images
from raycifar.data.sources import cache_folder, load
from raycifar.models.recipe import Recipe
from raycifar.storage.files import locate, write_whole
from raycifar.storage.parquet import to_parquet
from raycifar.storage.run_folder import RunFolder
from raycifar.storage.spreadsheets import to_csv
from raycifar.terminal import Screen
from raycifar.workflows.prediction import Model

DUPLICATES, DUPLICATES_PAGE, DUPLICATES_PICTURE = "duplicates.csv", "duplicates.html", "duplicates.png"
KINDS = ("exact", "near", "similar")
BETWEEN = {
    ("test", "train"): "Test images that are also among the training images",
    ("test", "test"): "Test images that repeat another test image",
    ("train", "train"): "Training images that repeat another training image",
}
SHOWN = 60  # pairs of each kind, in each section of the page
PICTURED = 6  # pairs of each kind, in the picture
METHOD = 2  # counts up with each change of what is found
KNOWN = Path(__file__).parents[1] / "data" / "known"  # CIFAR-100's own pairs: `search` returns the same
COLUMNS = ["first", "second", "similarity", "kind"]


@dataclass(frozen=True)
class Duplicates:
    """Pairs of duplicates, exact, near or similar, the most alike first."""

    split: np.ndarray  # (n,) "test" or "train"
    index: np.ndarray  # (n,) rows of that set
    other_split: np.ndarray  # (n,) "test" or "train"
    other_index: np.ndarray  # (n,) rows of that set
    kind: np.ndarray  # (n,) one of `KINDS`
    similarity: np.ndarray  # (n,) up to 1
    same_label: np.ndarray  # (n,) bool

    @classmethod
    def of(cls, pairs: pa.Table, source: Source) -> Self:
        """Return the pairs of a data set's images, which are numbered from the first test image."""
        first, second, similarity, kind = (pairs[name].to_numpy() for name in COLUMNS)
        num_test = len(source.test)
        fine = np.concatenate([source.test["fine"], source.train["fine"]])
        return cls(
            split=np.where(first < num_test, "test", "train"),
            index=np.where(first < num_test, first, first - num_test),
            other_split=np.where(second < num_test, "test", "train"),
            other_index=np.where(second < num_test, second, second - num_test),
            kind=np.array(KINDS)[kind],
            similarity=similarity.astype(float).round(4),
            same_label=fine[first] == fine[second],
        )

    def to_csv(self) -> bytes:
        columns = {**vars(self), "same_label": np.where(self.same_label, "true", "false")}
        return to_csv(columns, zip(*columns.values(), strict=True)).encode()

    def near_duplicates(self, split: str) -> np.ndarray:
        """Return the exact and near pairs (n, 2) of a split's images and training images, by their rows."""
        rows = (self.split == split) & (self.other_split == "train") & (self.kind != "similar")
        return np.stack([self.index[rows], self.other_index[rows]], 1)

    def test_copies(self, train_index: np.ndarray) -> np.ndarray:
        """Return the rows of test images that are near duplicates of the training images in these rows."""
        pairs = self.near_duplicates("test")
        return np.unique(pairs[np.isin(pairs[:, 1], train_index), 0])

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
        return {
            BETWEEN[splits].lower(): ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
            for splits, counts in self.counts().items()
        }


def list_duplicates(data: str, out: str, screen: Screen, run: str | None = None) -> tuple[Duplicates, RunFolder]:
    """Find the duplicates of a data set, and write duplicates.csv, a page and a picture of them.

    Args:
        out: the folder or URI to write to. run: a trained network, by whose features the images are compared, too.
    """
    folder = RunFolder.for_output(out)
    with screen.waiting(f"Reading {data}"):
        source = load(data)
    found = Duplicates.of(search(source, screen, run), source) if run else find_duplicates(source, screen)
    folder.write(DUPLICATES, found.to_csv())
    folder.write(DUPLICATES_PAGE, to_page(found, source).encode())
    folder.write(DUPLICATES_PICTURE, to_picture(found, source))
    return found, folder


def find_duplicates(source: Source, screen: Screen) -> Duplicates:
    """Return the duplicates in a data set: known ones, or found now and put into the cache."""
    fingerprint = source.fingerprint
    pairs = known_pairs(fingerprint)
    if pairs is None:
        pairs = search(source, screen)
        with suppress(OSError):  # without a cache it takes longer
            write_whole(*locate(cached(fingerprint)), to_parquet(pairs))
    return Duplicates.of(pairs, source)


def known_duplicates(source: Source) -> Duplicates | None:
    """Return what `find_duplicates` would return, or None if it would have to search."""
    pairs = known_pairs(source.fingerprint)
    return None if pairs is None else Duplicates.of(pairs, source)


def known_training_copies(data: dict[str, Any]) -> np.ndarray | None:
    """Return the pairs (n, 2) of training images that are near duplicates, by their rows; None if they aren't known.

    Args:
        data: what `run.json` says of a data set.
    """
    pairs = known_pairs(data.get("fingerprint", ""))
    if pairs is None:
        return None
    first, second, kind = (pairs[name].to_numpy() for name in ("first", "second", "kind"))
    near = (first >= data["test"]) & (KINDS.index("near") >= kind)
    return np.stack([first[near], second[near]], 1) - data["test"]


def copied_images(source: Source, recipe: Recipe) -> np.ndarray | None:
    """Return the rows of training images that a recipe doesn't validate on, or None if it validates on any."""
    if not recipe.separate_copies:
        return None
    return np.unique(find_duplicates(source, Screen(quiet=True)).near_duplicates("train"))


def known_pairs(fingerprint: str) -> pa.Table | None:
    """Return the known pairs of a data set, by its fingerprint, which may come from someone else's `run.json`."""
    if not re.fullmatch("[0-9a-f]+", fingerprint):
        return None
    for path in (KNOWN / cached(fingerprint).name, cached(fingerprint)):
        with suppress(OSError, pa.ArrowException, KeyError):
            return pq.read_table(path).select(COLUMNS)
    return None


def cached(fingerprint: str) -> Path:
    return cache_folder() / "duplicates" / f"{fingerprint}-{METHOD}.parquet"


def search(source: Source, screen: Screen, run: str | None = None) -> pa.Table:
    """Return the pairs of a data set's images, numbered from the first test image; training images follow."""
    with screen.waiting("Loading PyTorch"):
        import torch

        from raycifar.data.duplicates import NEAR, find_pairs
    images = np.concatenate([to_images(table["image"]) for table in (source.test, source.train)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = None
    if run:
        model = Model(run, precision="auto")
        with screen.waiting(f"Asking the {model.weights.architecture.model}"):
            features = model.features(images)
    with screen.progress("Comparing the images") as progress:
        pairs = find_pairs(torch.from_numpy(images).to(device), progress, features)
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
    from raycifar.analysis.gallery import PNG, to_base64

    pictures = [
        {"uri": PNG + to_base64(getattr(source, split), index), "words": f"{split} {index}: {label}", "label": label}
        for split, index, label in images_of(found, row, source)
    ]
    return {"pictures": pictures, "similarity": found.similarity[row], "same_label": bool(found.same_label[row])}


def images_of(found: Duplicates, row: int, source: Source) -> list[tuple[str, int, str]]:
    """Return split, row there and class of the two images of a pair."""
    places = (found.split[row], found.index[row]), (found.other_split[row], found.other_index[row])
    labels = [getattr(source, split)["fine"][int(index)].as_py() for split, index in places]
    names = [CIFAR100.class_names[label].replace("_", " ") for label in labels]
    return [(str(split), int(index), name) for (split, index), name in zip(places, names, strict=True)]


def to_picture(found: Duplicates, source: Source) -> bytes:
    """Return `duplicates.png`: pairs of a test and a training image, a row of each kind, from the most alike on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.3), layout="constrained")
    grid = figure.subplots(len(KINDS), PICTURED, squeeze=False)
    for kind, axes in zip(KINDS, grid, strict=True):
        rows = np.flatnonzero((found.split == "test") & (found.other_split == "train") & (found.kind == kind))
        chosen = np.unique(np.linspace(0, len(rows) - 1, PICTURED).astype(int))[: len(rows)]
        axes[0].set_ylabel(kind)
        for spot in axes:
            spot.set(xticks=[], yticks=[], frame_on=False)
        for spot, row in zip(axes, rows[chosen], strict=False):
            pair = images_of(found, row, source)
            one, other = (to_images(getattr(source, split)["image"].slice(index, 1))[0] for split, index, _ in pair)
            gap = np.full((3, one.shape[1], 2), 255, np.uint8)
            spot.imshow(np.concatenate([one, gap, other], axis=2).transpose(1, 2, 0))
            names = " / ".join(dict.fromkeys(name for _, _, name in pair))
            spot.set_title(f"{names}\n{found.similarity[row]:.2f}", fontsize=7)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()
