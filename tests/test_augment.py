"""From uint8 images to the network's input."""

from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
import torch.nn.functional as F
from test_cuda import needs_gpu
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from raycifar.data import CIFAR100
from raycifar.engine.augment import (
    ERASED_AREA,
    HOLE,
    PAD,
    REFLECTED,
    alternating_flips,
    as_trained,
    augment,
    erase,
    mix,
)
from raycifar.engine.hardware import GENERATOR_LOCK
from raycifar.engine.image_ops import (
    GEOMETRY,
    HISTOGRAM,
    LEVELS,
    TONE,
    apply_operations,
    blend,
    equalize,
    magnitudes,
    operation,
    operations,
    sample_operations,
    warp,
)
from raycifar.models.preprocess import preprocess
from raycifar.models.recipe import Recipe

SPACE = magnitudes("trivial", 32, 32)


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


def test_alternate_reflects_images_at_their_edges_and_flips_those_it_is_told_to(images):
    flipped = torch.arange(len(images)) % 3 == 0
    out = augment(images, "alternate", flipped)
    found = []
    for image, result, mirror in zip(images, out, flipped, strict=True):
        padded = F.pad(image[None].float(), (REFLECTED,) * 4, mode="reflect")[0].to(torch.uint8)
        windows = {
            (y, x): padded[:, y : y + 32, x : x + 32]
            for y in range(2 * REFLECTED + 1)
            for x in range(2 * REFLECTED + 1)
        }
        found += [at for at, window in windows.items() if torch.equal(window.flip(2) if mirror else window, result)]
    assert len(found) == len(images)
    assert len(set(found)) > 15


def test_each_image_is_flipped_every_other_epoch_and_half_of_them_in_each():
    index = torch.arange(50_000)
    first, second, third = (alternating_flips(index, torch.tensor(epoch)) for epoch in (1, 2, 3))
    assert torch.equal(first, third)
    assert torch.equal(first, ~second)
    assert 0.49 < first.float().mean() < 0.51
    assert 0.4 < (first[1:] == first[:-1]).float().mean() < 0.6


def test_cutout_blanks_a_square_inside_each_image(images):
    blank = (augment(images, "cutout") == 0).all(1)
    outside_of_crop = (augment(images, "crop") == 0).all(1)
    assert blank.sum() > outside_of_crop.sum()
    holes = blank[:, PAD:-PAD, PAD:-PAD].flatten(1).sum(1)
    assert holes.max() <= HOLE * HOLE


@pytest.mark.parametrize("kind", ["cutout", "trivial", "rand"])
def test_random_numbers_come_from_the_seed(images, kind):
    torch.manual_seed(3)
    first = augment(images, kind)
    torch.manual_seed(3)
    assert torch.equal(first, augment(images, kind))
    assert not torch.equal(first, augment(images, kind))


# TrivialAugment and RandAugment -----------------------------------------------------------------------


@pytest.fixture
def varied(images):
    """Noise, low contrast, one color, few colors, half black, a gradient and a dark square."""
    varied = images[:7].clone()
    varied[1] = varied[1] // 8 + 100
    varied[2] = torch.tensor([7, 200, 0])[:, None, None]
    varied[3] = varied[3] // 64 * 64
    varied[4, :, :, 16:] = 0
    varied[5] = torch.arange(32) * 4 + torch.arange(32)[:, None]
    varied[6, :, 8:24, 8:24] = 3
    return varied


def rows(name, values):
    return torch.tensor([operation(name, value, 32, 32) for value in values])


def of_torchvision(images, name, magnitude):
    return _apply_op(images, name, magnitude, InterpolationMode.NEAREST, fill=None)


@pytest.mark.parametrize("name", SPACE)
def test_an_operation_is_torchvision_s_at_each_magnitude(varied, name):
    for magnitude in SPACE[name]:
        out = apply_operations(varied, rows(name, [magnitude] * len(varied)))
        assert torch.equal(out, of_torchvision(varied, name, magnitude)), magnitude


def test_each_image_of_a_batch_has_its_own_operation(varied):
    generator = torch.Generator().manual_seed(0)
    pairs = [(name, magnitude) for name, values in SPACE.items() for magnitude in values]
    pairs = [pairs[k] for k in torch.randperm(len(pairs), generator=generator)]
    images = varied[torch.randint(len(varied), (len(pairs),), generator=generator)]
    out = apply_operations(images, torch.cat([rows(name, [magnitude]) for name, magnitude in pairs]))
    for image, result, (name, magnitude) in zip(images, out, pairs, strict=True):
        assert torch.equal(result, of_torchvision(image, name, magnitude)), (name, magnitude)


def test_what_is_done_to_all_images_changes_those_alone_that_it_is_for(varied):
    """A GPU does everything to all images, a CPU does each thing to some."""
    torch.manual_seed(0)
    images = varied.repeat(40, 1, 1, 1)
    drawn = sample_operations("trivial", images)
    out = equalize(blend(warp(images, drawn[:, GEOMETRY]), drawn[:, TONE]), drawn[:, HISTOGRAM])
    assert torch.equal(out, apply_operations(images, drawn))


@needs_gpu
@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_gpu_gives_what_a_cpu_gives_and_never_waits(varied, policy):
    images, device = varied.repeat(40, 1, 1, 1), torch.device("cuda")
    drawn = sample_operations(policy, images)
    there = images.to(device), drawn.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = apply_operations(*there)
        erase(augment(there[0], policy).float(), 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.cpu(), apply_operations(images, drawn))


@pytest.mark.parametrize(
    ("policy", "space", "levels"),
    [
        ("trivial", TrivialAugmentWide()._augmentation_space(LEVELS), slice(None)),
        ("rand", RandAugment()._augmentation_space(LEVELS, (32, 32)), slice(9, 10)),
    ],
)
def test_a_policy_draws_from_torchvision_s_space(policy, space, levels):
    expected = {
        name: [0.0]
        if not values.ndim
        else [sign * v for sign in (1, -1)[: 1 + signed] for v in values[levels].tolist()]
        for name, (values, signed) in space.items()
    }
    assert magnitudes(policy, 32, 32) == expected
    table = operations(policy, 32, 32, torch.device("cpu"))
    for name, values in expected.items():  # the identity is also what some have at a strength of 0
        least = len(table) // len(expected) // len(values)
        assert all((table == row).all(1).sum() >= least for row in rows(name, values))


def test_operations_are_drawn_evenly(images):
    torch.manual_seed(0)
    drawn = sample_operations("rand", images[:1].expand(2800, -1, -1, -1))
    found = [count.item() for count in drawn.unique(dim=0, return_counts=True)[1]]
    assert len(found) == 5 + 2 * 9
    assert sorted(found)[:18] == pytest.approx([100] * 18, abs=40)
    assert sorted(found)[18:] == pytest.approx([200] * 5, abs=60)


@pytest.mark.parametrize("kind", ["trivial", "rand"])
def test_a_policy_follows_the_shifts(images, kind):
    torch.manual_seed(1)
    shifted = augment(images, "crop")
    for _ in range(1 + (kind == "rand")):
        shifted = apply_operations(shifted, sample_operations(kind, shifted))
    torch.manual_seed(1)
    assert torch.equal(augment(images, kind), shifted)


# Random erasing -------------------------------------------------------------------------------------


def test_erasing_blanks_one_rectangle_in_some_images(images):
    torch.manual_seed(0)
    inputs = images.repeat(20, 1, 1, 1).float()
    out = erase(inputs, 0.4)
    blank = (out == 0).all(1)
    assert torch.equal(torch.where(blank[:, None], 0, inputs), out)
    erased = blank.flatten(1).any(1)
    assert erased.float().mean() == pytest.approx(0.4, abs=0.05)
    heights, widths = (blank.any(dim).sum(1)[erased] for dim in (2, 1))
    areas = blank.sum((1, 2))[erased]
    assert torch.equal(areas, heights * widths)
    low, high = ERASED_AREA
    assert areas.min() >= low * 1024 * 0.8  # sides are whole pixels
    assert areas.max() <= high * 1024 * 1.05
    assert areas.float().mean() == pytest.approx((low + high) / 2 * 1024, rel=0.07)
    assert heights.max() < 32
    assert 0.25 < (heights / widths).min() < 0.45
    assert blank[erased].float().mean(0).min() > 0  # no pixel is spared
    assert erase(preprocess(images), 0.4).is_contiguous(memory_format=torch.channels_last)


def test_without_erasing_nothing_is_drawn(images):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert erase(images, 0.0) is images
    assert torch.equal(torch.rand(3), expected)


# The network's input --------------------------------------------------------------------------------


def test_normalise_matches_torchvision(images):
    from torchvision.transforms import v2

    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(CIFAR100.mean, CIFAR100.std)])
    out = preprocess(images)
    assert torch.allclose(out, reference(images), atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_images_shown_beside_training_wait_for_the_step_and_change_nothing_that_it_draws(images):
    torch.manual_seed(0)
    expected = torch.rand(8)
    with ThreadPoolExecutor() as pool, GENERATOR_LOCK:
        torch.manual_seed(0)
        shown = pool.submit(as_trained, images.numpy(), Recipe(augment="crop"), 1)
        assert wait([shown], timeout=0.2).not_done
        assert torch.equal(torch.rand(8), expected)
    assert shown.result().shape == images.shape


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_are_shares_of_two_classes(images, kind):
    inputs, targets = mix(preprocess(images), torch.arange(64), Recipe(**{kind: 1.0}), 100)
    assert inputs.shape == images.shape
    assert targets.shape == (64, 100)
    assert torch.allclose(targets.sum(1), torch.ones(64))
    assert ((targets > 0).sum(1) <= 2).all()


def test_images_are_shown_as_they_are_trained_on(images):
    shown = as_trained(images.numpy(), Recipe(augment="none"), 0)
    assert (torch.from_numpy(shown) == images).all()
    state = torch.get_rng_state()
    recipe = Recipe(augment="cutout", erasing=1.0, mixup=1.0)
    first, again = (as_trained(images.numpy(), recipe, 0) for _ in range(2))
    assert first.shape == images.shape
    assert (first == again).all()
    assert not (torch.from_numpy(first) == images).flatten(1).all(1).any()
    assert (torch.get_rng_state() == state).all()
