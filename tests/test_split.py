"""Validation and training images: shared equally by the classes, by seed, never from the test set."""

import numpy as np
import pytest

from raycifar.data.dataset import split, to_images
from raycifar.data.synthetic import synthetic
from raycifar.errors import RequestError


@pytest.fixture(scope="module")
def source():
    return synthetic(5000, 300)


def test_each_class_gives_the_same_number_and_no_image_is_in_two_splits(source):
    splits = split(source, val_size=1000, limit=2000, seed=0)
    for table, count in ((splits.train, 20), (splits.val, 10)):
        assert np.bincount(table["fine"].to_numpy()).tolist() == [count] * 100
    train, val = (set(table["index"].to_pylist()) for table in (splits.train, splits.val))
    assert len(train) == 2000
    assert len(val) == 1000
    assert not train & val


def test_a_row_s_index_leads_back_to_its_image(source):
    splits = split(source, val_size=500, limit=None, seed=3)
    originals = to_images(source.train["image"])
    for table in (splits.train, splits.val):
        rows = table["index"].to_numpy()
        assert np.array_equal(to_images(table["image"]), originals[rows])
        assert np.array_equal(table["fine"].to_numpy(), source.train["fine"].to_numpy()[rows])
    assert splits.test.drop(["index"]).equals(source.test)


def test_the_split_comes_from_the_seed(source):
    first, again, other = (split(source, 1000, None, seed) for seed in (0, 0, 1))
    assert first.val.equals(again.val)
    assert first.train.equals(again.train)
    assert not first.val.equals(other.val)


def test_val_size_0_trains_on_everything(source):
    splits = split(source, 0, None, 0)
    assert sorted(splits.train["index"].to_pylist()) == list(range(5000))
    assert len(splits.val) == 0
    assert "val" not in splits.tables()


def test_training_rows_are_not_sorted_by_class(source):
    fine = split(source, 0, None, 0).train["fine"].to_numpy()
    assert len(set(fine[:200])) > 60


def test_no_image_with_a_copy_is_held_out_and_without_copies_nothing_changes(source):
    copied = np.random.default_rng(0).choice(5000, 1000, replace=False)
    plain, none = (split(source, 1000, 2000, 0, copies) for copies in (None, np.array([], int)))
    assert plain.val.equals(none.val)
    assert plain.train.equals(none.train)
    splits = split(source, 1000, 2000, 0, copied)
    train, val = (table["index"].to_numpy() for table in (splits.train, splits.val))
    assert np.bincount(splits.val["fine"].to_numpy()).tolist() == [10] * 100
    assert np.bincount(splits.train["fine"].to_numpy()).tolist() == [20] * 100
    assert not set(val) & {*train, *copied}
    with pytest.raises(RequestError, match="with --separate-copies: of one class only 0 training images have no copy"):
        split(source, 1000, None, 0, np.flatnonzero(source.train["fine"].to_numpy() == 3))
