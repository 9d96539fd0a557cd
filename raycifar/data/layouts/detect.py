"""Finding the one data set among files, whatever its layout."""

import re
from collections import Counter, defaultdict
from pathlib import PurePosixPath

import pyarrow as pa

from raycifar.data.dataset import Source
from raycifar.data.labels import numbers_of
from raycifar.data.layouts import (
    SHARD,
    SPLITS,
    Layout,
    arrays,
    binary,
    columns,
    folders,
    place_named,
    place_shard,
    python,
    text,
)
from raycifar.data.pictures import SUFFIXES
from raycifar.data.trees import READABLE, Tree
from raycifar.errors import RequestError

NAMED = "must say train and test in their names, as train.{0} and test.{0}, or in their folders' names"
LAYOUTS = (
    Layout("binary", (".bin",), "must be called train.bin and test.bin", place_named, binary.read),
    Layout("cifar-100-python", ("",), "must be called train and test", place_named, python.read),
    Layout("Parquet", (".parquet",), NAMED.format("parquet"), place_shard, columns.read_parquet_files),
    Layout("Arrow", (".arrow",), NAMED.format("arrow"), place_shard, columns.read_arrow_files),
    Layout("CSV", (".csv",), NAMED.format("csv"), place_shard, text.read),
    Layout("NumPy", (".npy",), "must be called x_train, y_train, x_test and y_test", arrays.place, arrays.read),
    Layout("picture", SUFFIXES, "must be in folders train/CLASS and test/CLASS", folders.place, folders.read),
)
BY_SUFFIX = {suffix: layout for layout in LAYOUTS for suffix in layout.suffixes}
NUMBERED = ("binary", "cifar-100-python")  # whose labels are numbers, and whose names lie beside
Found = dict[tuple[Layout, PurePosixPath], dict[str, dict[str, list[PurePosixPath]]]]  # by split and series


def read_tree(tree: Tree, *, test_alone: bool) -> Source:
    """Return the data set that a tree holds.

    Args:
        test_alone: take a test set without training images, too.

    Raises:
        RequestError: it holds none, more than one, or one that can't be read.
    """
    found = find(tree.paths)
    whole = {key: splits for key, splits in found.items() if len(splits) == len(SPLITS)}
    if test_alone and not whole:
        whole = {key: splits for key, splits in found.items() if "test" in splits}
    if len(whole) > 1:
        first, second = (f"{root} ({layout.name})" for layout, root in sorted(whole, key=lambda key: str(key[1]))[:2])
        raise RequestError(f"{tree.name} holds more than one data set, {first} and {second}: give the folder of one.")
    if not whole:
        raise RequestError(f"{tree.name} is not CIFAR-100: {what_is_there(tree.paths, found)} {READABLE}")
    ((layout, root), splits) = whole.popitem()
    files = {split: one_series(tree, splits[split]) for split in SPLITS if split in splits}
    tables = {split: layout.read(tree, paths, origin(tree, root, paths)) for split, paths in files.items()}
    for level, (names, where) in names_beside(tree, root).items() if layout.name in NUMBERED else ():
        tables = {split: renumbered(table, level, names, where) for split, table in tables.items()}
    return Source(tree.name, **{"train": tables["test"].slice(0, 0), **tables})


def names_beside(tree: Tree, root: PurePosixPath) -> dict[str, tuple[list[str], str]]:
    """Return the names of the classes that a data set's numbers stand for, by level, each with its file."""
    found = {}
    for level in ("fine", "coarse"):
        if (path := root / f"{level}_label_names.txt") in tree.paths:
            found[level] = tree.read(path).decode("utf-8", "replace").split("\n"), f"{tree.name}: {path}"
    if (path := root / "meta") in tree.paths:
        found |= {level: (names, f"{tree.name}: {path}") for level, names in python.read_names(tree.read(path)).items()}
    return found


def renumbered(table: pa.Table, level: str, names: list[str], origin: str) -> pa.Table:
    """Return a table whose labels are numbers of `names` with CIFAR-100's own numbers."""
    numbers = numbers_of([name.strip() for name in names if name.strip()], level, origin)
    column = pa.array(numbers[table[level].to_numpy()])
    return table.set_column(table.column_names.index(level), level, column)


def find(paths: list[PurePosixPath]) -> Found:
    """Return the files of each layout, by the folder of their data set, their split and their series."""
    found: Found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in paths:
        layout = BY_SUFFIX.get(path.suffix.lower())
        if layout and (place := layout.place(path)):
            found[layout, place.root][place.split][place.series].append(path)
    return found


def one_series(tree: Tree, series: dict[str, list[PurePosixPath]]) -> list[PurePosixPath]:
    """Return the files of a split in order, by their own names with numbers as numbers.

    Raises:
        RequestError: there is more than one series of files, or one isn't complete.
    """
    if len(series) > 1:
        first, second = (sorted(paths)[0] for paths in list(series.values())[:2])
        raise RequestError(f"{tree.name} holds several series of files, {first} and {second}: give a folder of one.")
    (paths,) = series.values()
    paths.sort(key=lambda path: (in_order(path.stem), in_order(str(path))))
    if (shard := SHARD.search(paths[0].stem)) and shard[2] and int(shard[2]) != len(paths):
        raise RequestError(
            f"{tree.name} is not complete: {paths[0]} is one of {int(shard[2]):,} files, and {len(paths):,} are there."
        )
    return paths


def in_order(name: str) -> str:
    return re.sub(r"\d+", lambda number: number[0].zfill(20), name)


def origin(tree: Tree, root: PurePosixPath, paths: list[PurePosixPath]) -> str:
    """Return what an error about a split begins with: its file, or the folder that its files are in."""
    place = paths[0] if len(paths) == 1 else root.joinpath(*paths[0].relative_to(root).parent.parts[:1])
    return f"{tree.name}: {place}" if place.parts else tree.name


def what_is_there(paths: list[PurePosixPath], found: Found) -> str:
    """Return why these files aren't a data set, and what the nearest ones lack to be one."""
    if found:
        (layout, _), splits = next(iter(found.items()))
        (missing,) = set(SPLITS) - set(splits)
        (there,) = splits
        example = next(iter(splits[there].values()))[0]
        return f"it has no {missing} split beside {example}; {layout.name} files {layout.hint}."
    suffixes = Counter(path.suffix.lower() for path in paths)
    known = [suffix for suffix, _ in suffixes.most_common() if suffix and suffix in BY_SUFFIX]
    examples = ", ".join(str(path) for path in sorted(paths)[:4]) or "nothing"
    hint = f"; its {known[0]} files {BY_SUFFIX[known[0]].hint}" if known else ""
    return f"it holds {examples}{hint}."
