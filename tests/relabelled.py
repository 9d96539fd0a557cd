"""Real images of which some training labels are wrong: `python tests/relabelled.py SOURCE DESTINATION SHARE SEED`."""

import sys
from pathlib import Path

import numpy as np

from raycifar.data.dataset import to_images
from raycifar.data.sources import load
from raycifar.data.trees import RECORD


def relabel(source: str, destination: Path, share: float, seed: int) -> np.ndarray:
    """Write the data set in the binary layout with a share of its training labels changed; return the rows changed."""
    data = load(source)
    parents, rng = np.array(data.superclass_of()), np.random.default_rng(seed)
    destination.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        table = getattr(data, split)
        fine = table["fine"].to_numpy().copy()
        if split == "train":
            changed = np.sort(rng.choice(len(fine), int(share * len(fine)), replace=False))
            fine[changed] = (fine[changed] + rng.integers(1, 100, len(changed))) % 100
        images = to_images(table["image"]).reshape(len(fine), -1)
        records = np.concatenate([np.stack([parents[fine], fine], 1).astype(np.uint8), images], axis=1)
        assert records.shape[1] == RECORD
        (destination / f"{split}.bin").write_bytes(records.tobytes())
    return changed


if __name__ == "__main__":
    source, destination, share, seed = sys.argv[1:]
    np.save(Path(destination).with_suffix(".npy"), relabel(source, Path(destination), float(share), int(seed)))
