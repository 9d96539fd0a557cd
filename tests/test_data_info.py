"""What is known of a data set travels with its images, and decides what is made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raycifar.data import CIFAR100, DatasetInfo
from raycifar.data.tables import Source, split, to_images, to_table
from raycifar.errors import RequestError
from raycifar.models.initial_weights import load_initial_weights
from raycifar.models.recipe import Recipe
from raycifar.tables import evaluation_table
from raycifar.workflows.evaluation import score_predictions, to_page

SMALL = DatasetInfo(("cat", "dog", "oak"), ("animal", "plant"), 16, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


@pytest.fixture
def source():
    """30 images of 16×16 pixels, of three classes in two superclasses."""
    fine = np.arange(30) % 3
    pixels = np.random.default_rng(0).integers(0, 256, (30, *SMALL.image_shape), np.uint8)
    table = to_table(pixels, fine, fine // 2, "made up", SMALL)
    return Source("made up", table, table, SMALL)


def test_cifar_100_is_what_its_authors_describe():
    assert (CIFAR100.num_classes, CIFAR100.num_superclasses) == (100, 20)
    assert (CIFAR100.image_shape, CIFAR100.image_bytes) == ((3, 32, 32), 3072)
    assert (CIFAR100.class_names[23], CIFAR100.superclass_names[10]) == ("cloud", "large_natural_outdoor_scenes")


def test_a_test_set_may_lack_classes():
    pixels, fine = np.zeros((2, *CIFAR100.image_shape), np.uint8), np.array([3, 7])
    table = to_table(pixels, fine, None, "few")
    source = Source("few", table[:0], table, CIFAR100)
    assert source.superclass_of() == CIFAR100.superclass_of
    evaluation, _ = score_predictions(torch.eye(100)[[4, 8]], table, source)
    assert {*evaluation_table(evaluation).columns[0].cells} == {"bear", "beetle"}
    page = to_page({"network": "a", "data": "few", "split": "test", **evaluation}, "a")
    assert page.index("<td>bear</td>") < page.index("<td>apple</td>")


def test_images_of_another_data_set_are_split_by_its_classes(source):
    splits = split(source, val_size=6, limit=9, seed=0)
    assert np.bincount(splits.val["fine"].to_numpy()).tolist() == [2, 2, 2]
    assert np.bincount(splits.train["fine"].to_numpy()).tolist() == [3, 3, 3]
    assert to_images(splits.train["image"], SMALL).shape == (9, 3, 16, 16)
    assert source.superclass_of() == (0, 0, 1)
    with pytest.raises(RequestError, match="--val-size 4 can't be divided among 3 classes"):
        split(source, val_size=4, limit=None, seed=0)


def test_its_classes_and_pixels_decide_the_architecture(source):
    architecture = load_initial_weights("vgg16", Recipe(), source).architecture
    assert architecture.num_classes == 3
    assert (architecture.preprocessing.mean, architecture.preprocessing.std) == (SMALL.mean, SMALL.std)


def test_a_label_that_it_does_not_have_is_refused():
    images = np.zeros((3, *SMALL.image_shape))
    with pytest.raises(RequestError, match="the fine label of image 2 is 2"):
        to_table(images, np.arange(3), np.zeros(3, int), "x", replace(SMALL, class_names=("a", "b")))
