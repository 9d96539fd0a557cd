"""From uint8 images to the network's input."""

import pytest
import torch
import torch.nn.functional as F

from raycifar.data import MEAN, STD
from raycifar.engine.augment import HOLE, PAD, augment, mix, preprocess
from raycifar.recipes import Recipe


@pytest.fixture
def images():
    return torch.randint(1, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_none_changes_nothing(images):
    assert torch.equal(augment(images, "none"), images)


def test_flip_mirrors_about_half_of_the_images_whole(images):
    out = augment(images, "flip")
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 15 < same.sum() < 49


def test_crop_gives_each_image_its_own_shift_and_mirror(images):
    out = augment(images, "crop")
    assert out.dtype == torch.uint8
    found = []
    for image, result in zip(images, out, strict=True):
        padded = F.pad(image, (PAD,) * 4)
        windows = {
            (y, x, mirror): (window.flip(2) if mirror else window)
            for y in range(2 * PAD + 1)
            for x in range(2 * PAD + 1)
            for mirror in (False, True)
            if (window := padded[:, y : y + 32, x : x + 32]) is not None
        }
        found.append(next(key for key, window in windows.items() if torch.equal(window, result)))
    assert len(set(found)) > 30
    assert {mirror for _, _, mirror in found} == {False, True}


def test_cutout_blanks_a_square_inside_each_image(images):
    blank = (augment(images, "cutout") == 0).all(1)
    outside_of_crop = (augment(images, "crop") == 0).all(1)
    assert blank.sum() > outside_of_crop.sum()
    holes = blank[:, PAD:-PAD, PAD:-PAD].flatten(1).sum(1)
    assert holes.max() <= HOLE * HOLE


def test_random_numbers_come_from_the_seed(images):
    torch.manual_seed(3)
    first = augment(images, "cutout")
    torch.manual_seed(3)
    assert torch.equal(first, augment(images, "cutout"))


def test_normalise_matches_torchvision(images):
    from torchvision.transforms import v2

    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    out = preprocess(images)
    assert torch.allclose(out, reference(images), atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_are_shares_of_two_classes(images, kind):
    inputs, targets = mix(preprocess(images), torch.arange(64), Recipe(**{kind: 1.0}))
    assert inputs.shape == images.shape
    assert targets.shape == (64, 100)
    assert torch.allclose(targets.sum(1), torch.ones(64))
    assert ((targets > 0).sum(1) <= 2).all()
