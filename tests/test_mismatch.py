"""A test set that doesn't mean what the validation images do."""

import numpy as np
import pyarrow as pa
import pytest
from histories import made_up

from raycifar.analysis.gallery import choose_pictures
from raycifar.analysis.mismatch import find_mismatch
from raycifar.analysis.reports import report_run
from raycifar.analysis.run_files import RunFiles
from raycifar.data.dataset import Source, to_images, to_table
from raycifar.data.synthetic import synthetic
from raycifar.storage.parquet import to_lists


def answered(labels, predicted):
    """The predictions file of a network that answers this."""
    top5 = np.stack([np.asarray(predicted), *[np.zeros(len(labels), int)] * 4], axis=1)
    probabilities = np.eye(100, dtype="f4")[predicted]
    return pa.table({"label": labels, "top5": to_lists(top5), "probabilities": to_lists(probabilities)})


def scored(top1, val=0.3, images=10_000):
    test = {"images": images, "top1": top1, "top5": 0.5, "loss": 6.19}
    return made_up(val_top1=lambda e: val, result={"status": "finished", "test": test})


def pictures_of(source):
    return choose_pictures(RunFiles("a", made_up()), source)


@pytest.fixture
def honest():
    """Labels, and answers that are right for 30 %."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 100)
    return labels, np.where(rng.random(10_000) < 0.3, labels, rng.integers(0, 100, 10_000))


def test_labels_in_another_order_are_found_and_named(honest):
    labels, predicted = honest
    order = np.roll(np.arange(100), 1)
    file = answered(order[labels], predicted)
    (finding,) = find_mismatch(scored(0.0176), file, None)
    assert (
        "Accuracy is 0.300 on the validation images and 0.018 on the test images: 28.2 points apart" in finding.evidence
    )
    assert (
        "“apple” is what the network calls “aquarium fish”, “aquarium fish” is what the network calls “baby”"
        in finding.evidence
    )
    assert 0.29 < finding.metrics["restored"] < 0.34
    assert len(finding.metrics["pairs"]) == 100
    assert "in the order of the training labels" in finding.advice


def test_it_comes_first_and_nothing_is_called_healthy(honest):
    labels, predicted = honest
    report = report_run(RunFiles("a", scored(0.0176), answered((labels + 1) % 100, predicted), None))
    assert report["findings"][0]["kind"] == "test-differs"
    assert "healthy" not in {finding["kind"] for finding in report["findings"]}
    assert report["headline"].startswith("the test set doesn't match")


def test_the_same_answer_for_all_is_told(honest):
    labels, _ = honest
    (finding,) = find_mismatch(scored(0.01), answered(labels, np.full(10_000, 41)), None)
    assert "the same answer, lawn mower, to 100% of the test images" in finding.evidence


def test_images_that_are_prepared_otherwise_are_told():
    source = synthetic(200, 100)
    dark = to_images(source.test["image"]) // 4
    labels = {level: source.test[level].to_numpy() for level in ("fine", "coarse")}
    darkened = Source("dark", source.train, to_table(dark, labels, "dark"))
    (finding,) = find_mismatch(scored(0.05), None, pictures_of(darkened))
    assert "The test images look different" in finding.evidence
    assert "look different" not in find_mismatch(scored(0.05), None, pictures_of(source))[0].evidence


def test_images_in_the_order_of_their_classes_look_the_same_in_any_order():
    """The first classes are dark, or the last."""
    pixels = np.full((10_000, 3, 32, 32), 40, np.uint8)
    pixels[5_000:] = 200
    labels = {"fine": np.repeat(np.arange(100), 100), "coarse": np.repeat(np.arange(20), 500)}
    train, test = (to_table(each, labels, "sorted") for each in (pixels, pixels[::-1]))
    found = find_mismatch(scored(0.05), None, pictures_of(Source("sorted", train, test)))
    assert "look different" not in found[0].evidence


@pytest.mark.parametrize(("val", "test"), [(0.30, 0.305), (0.62, 0.60), (0.30, 0.32)])
def test_what_sampling_or_a_slightly_harder_test_set_explains_is_no_finding(val, test):
    assert find_mismatch(scored(test, val), None, None) == []


def test_few_test_images_are_allowed_to_differ():
    assert find_mismatch(scored(0.2, images=100), None, None) == []


def test_without_a_test_or_validation_there_is_nothing_to_hold_against_each_other():
    assert find_mismatch(made_up(), None, None) == []
    assert find_mismatch(made_up(val=0, result=scored(0.1).result), None, None) == []


def test_a_network_that_is_just_bad_on_the_test_set_is_not_explained_away(honest):
    labels, _ = honest
    guesses = np.random.default_rng(1).integers(0, 100, 10_000)
    (finding,) = find_mismatch(scored(0.01), answered(labels, guesses), None)
    assert "another order" not in finding.evidence
    assert "Check where the test images and their labels come from" in finding.advice
