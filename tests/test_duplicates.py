"""Near duplicates: planted copies of real images, and what is said of them."""

import csv
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from raycifar.data.dataset import Source, to_images, to_table
from raycifar.data.duplicates import NEAR, SIMILAR, find_pairs, most_alike
from raycifar.data.sources import load
from raycifar.models import Architecture
from raycifar.storage.weights import to_file
from raycifar.terminal import Screen
from raycifar.workflows.datasets import write_parquet
from raycifar.workflows.duplicates import (
    DUPLICATES,
    DUPLICATES_PAGE,
    DUPLICATES_PICTURE,
    known_duplicates,
    known_pairs,
    list_duplicates,
    search,
)

NUM_TEST, NUM_TRAIN, COPIES = 1_000, 4_000, 100


def shift(image, draw):
    x, y = draw.choice([(x, y) for x in range(5) for y in range(5) if (x, y) != (2, 2)])
    return pad(image[None], (2, 2, 2, 2), mode="reflect")[0, :, y : y + 32, x : x + 32]


def zoom_in(image, draw):
    return interpolate(image[None, :, 1:30, 1:30], size=(32, 32), mode="bilinear", antialias=True)[0]


def zoom_out(image, draw):
    small = interpolate(image[None], size=(29, 29), mode="bilinear", antialias=True)
    return pad(small, (1, 2, 1, 2), mode="reflect")[0]


def compress(image, draw):
    stream = io.BytesIO()
    Image.fromarray(image.byte().numpy().transpose(1, 2, 0)).save(stream, "JPEG", quality=60)
    return torch.from_numpy(np.array(Image.open(stream)).transpose(2, 0, 1)).float()


def change_contrast(image, draw):
    return (image - image.mean()) * draw.uniform(0.8, 1.2) + image.mean()


def tint(image, draw):
    return image * torch.tensor([draw.uniform(0.85, 1.15) for _ in range(3)])[:, None, None]


CHANGES = {
    "shift": shift,
    "mirror": lambda image, draw: image.flip(-1),
    "brightness": lambda image, draw: image * draw.uniform(0.8, 1.2),
    "contrast": change_contrast,
    "tint": tint,
    "compress": compress,
    "zoom in": zoom_in,
    "zoom out": zoom_out,
}


@pytest.fixture(scope="module")
def planted(cifar):
    """Real images, some test images being changed copies of training images; the pairs of rows, with their changes."""
    draw, source = random.Random(1), load(cifar)
    test = torch.from_numpy(to_images(source.test["image"])[:NUM_TEST].copy())
    train = torch.from_numpy(to_images(source.train["image"])[:NUM_TRAIN].copy())
    copies = {}
    places, originals = draw.sample(range(NUM_TEST), COPIES), draw.sample(range(NUM_TRAIN), COPIES)
    for row, original in zip(places, originals, strict=True):
        names, image = draw.sample([*CHANGES], draw.choice([1, 2])), train[original].float()
        for name in names:
            image = CHANGES[name](image, draw).clamp(0, 255).round()
        test[row] = image.byte()
        copies[row, original] = names
    return test, train, copies


def test_changed_copies_of_real_images_are_found(planted):
    test, train, copies = planted
    pairs = find_pairs(torch.cat([test, train]))
    near = pairs.similarity >= NEAR
    found = set(zip(pairs.first[near].tolist(), (pairs.second[near] - NUM_TEST).tolist(), strict=True))
    missed = [names for pair, names in copies.items() if pair not in found]
    assert len(missed) <= 0.03 * COPIES, missed


def test_copies_with_equal_pixels_are_exact_also_mirrored_ones(planted):
    _, train, _ = planted
    images = torch.cat([train[:50], train[3:4], train[7:8].flip(-1)])
    pairs = find_pairs(images)
    exact = set(zip(pairs.first[pairs.exact].tolist(), pairs.second[pairs.exact].tolist(), strict=True))
    assert exact == {(3, 50), (7, 51)}
    assert (pairs.similarity[pairs.exact] == 1).all()


def test_equal_plain_images_are_exact_pairs_and_each_of_many_has_some(planted):
    test, train, _ = planted
    images = torch.cat([test[:20], train[:20], train[5:6]])
    images[:12] = images[30] = 7  # eleven more than are paired with each
    pairs = find_pairs(images)
    assert pairs.exact.all() == (pairs.similarity == 1).all()
    exact = set(zip(pairs.first[pairs.exact].tolist(), pairs.second[pairs.exact].tolist(), strict=True))
    assert {(row, 30) for row in range(12)} | {(row, row + 1) for row in range(11)} | {(25, 40)} <= exact
    assert len(exact) == pairs.exact.sum() < 13 * 16


def test_the_pairs_of_noise_are_none():
    noise = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not len(find_pairs(noise).first)


def test_of_many_images_few_are_compared_at_a_time_and_the_pairs_are_the_same(planted, monkeypatch):
    test, train, _ = planted
    images, sizes = torch.cat([test, train]), []
    whole = find_pairs(images)

    def measured(alike, *args):
        sizes.append(alike.numel())
        return most_alike(alike, *args)

    monkeypatch.setattr("raycifar.data.duplicates.most_alike", measured)
    monkeypatch.setattr("raycifar.data.duplicates.MAX_VALUES", 2**20)
    parts = find_pairs(images)
    assert max(sizes) <= 2**20
    first, second, similarity, exact = vars(whole).values()
    assert torch.equal(parts.first, first)
    assert torch.equal(parts.second, second)
    assert torch.equal(parts.exact, exact)
    torch.testing.assert_close(parts.similarity, similarity)


@pytest.fixture
def copied(tmp_path, planted):
    """A data set whose first test image is training image 5, under another label."""
    _, train, _ = planted
    pixels, fine = train[:200].numpy(), np.arange(200) % 100
    test = np.concatenate([pixels[5:6], 255 - pixels[100:120]])
    labels = np.concatenate([[6], np.arange(20)])
    parts = [(pixels, fine), (test, labels)]
    source = Source("copied", *(to_table(x, {"fine": y, "coarse": y // 5}, "copied") for x, y in parts))
    write_parquet(source, str(tmp_path / "copied"), Screen(quiet=True))
    return tmp_path / "copied"


def test_pairs_are_listed_with_their_labels_and_kept(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path / "cache"))
    found, folder = list_duplicates(str(copied), str(tmp_path / "out"), Screen(quiet=True))
    rows = list(csv.DictReader((folder.read(DUPLICATES) or b"").decode().splitlines()))
    assert rows[0] == {
        "split": "test",
        "index": "0",
        "other_split": "train",
        "other_index": "5",
        "kind": "exact",
        "similarity": "1.0",
        "same_label": "false",
    }
    assert found.counts()["test", "train"]["exact"] == 1
    assert (folder.read(DUPLICATES_PAGE) or b"").count(b"data:image/png") == 2 * len(rows)
    assert Image.open(io.BytesIO(folder.read(DUPLICATES_PICTURE))).size[0] > 500
    monkeypatch.setattr("raycifar.workflows.duplicates.search", None)  # the second time they come from the cache
    again, _ = list_duplicates(str(copied), str(tmp_path / "again"), Screen(quiet=True))
    assert again.to_csv() == found.to_csv()


def test_features_bring_together_what_lighting_keeps_apart(planted):
    _, train, _ = planted
    images = train[:300].clone()
    images[299] = (0.45 * images[7] + torch.linspace(0, 140, 32)[:, None]).byte()  # brighter and brighter downwards
    features = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    features[299] = features[7]
    pair = {(7, 299)}
    found, by_features = (find_pairs(images, features=each) for each in (None, features))
    assert not pair & set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pair <= set(zip(by_features.first.tolist(), by_features.second.tolist(), strict=True))
    assert len(by_features.first) == len(found.first) + 1  # each pair once


def test_a_run_s_network_takes_part(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "cnn.safetensors"
    architecture = Architecture("cnn", tta_flip=True)
    weights.write_bytes(to_file(architecture.build().state_dict(), architecture))
    found, _ = list_duplicates(str(copied), str(tmp_path / "out"), Screen(quiet=True), str(weights))
    assert found.counts()["test", "train"]["exact"] == 1
    assert not (tmp_path / "cache").exists()  # they are the network's own


@pytest.mark.slow
def test_the_pairs_that_raycifar_has_at_hand_are_those_that_it_finds(cifar):
    """But for pairs at the threshold, which another processor's rounding lifts above it or not."""
    source = load(cifar)
    found, known = (
        {(row["first"], row["second"]): row["similarity"] for row in table.to_pylist()}
        for table in (search(source, Screen(quiet=True)), known_pairs(source.fingerprint))
    )
    shared = found.keys() & known.keys()
    assert [found[pair] for pair in shared] == pytest.approx([known[pair] for pair in shared], abs=1e-5)
    assert all((found | known)[pair] == pytest.approx(SIMILAR, abs=1e-5) for pair in found.keys() ^ known.keys())


def test_only_copies_among_the_rows_that_are_trained_on_count(cifar):
    found = known_duplicates(load(cifar))
    assert {kind: found.counts()["test", "train"][kind] for kind in ("exact", "near")} == {"exact": 10, "near": 501}
    every, some = (found.test_copies(rows) for rows in (np.arange(50_000), np.arange(0, 50_000, 2)))
    assert len(every) == 511
    assert 200 < len(some) < 350
    pairs = found.near_duplicates("test")
    assert set(some) == {test for test, train in pairs.tolist() if train % 2 == 0}


def test_a_cache_that_cannot_be_written_does_no_harm(copied, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYCIFAR_CACHE", str(tmp_path / "file"))
    found, _ = list_duplicates(str(copied), str(tmp_path / "out"), Screen(quiet=True))
    assert found.counts()["test", "train"]["exact"] == 1
