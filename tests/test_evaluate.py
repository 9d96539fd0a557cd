"""The scores, held against torchmetrics."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from raycifar.analysis.run_files import RunFiles
from raycifar.engine.scoring import per_image, predict, score, to_predictions_file
from raycifar.engine.train_step import loss_and_counts
from raycifar.models.preprocess import preprocess

SUPERCLASS_OF = [label // 5 for label in range(100)]


def test_scores_match_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1234, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 100, (1234,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 100))
    with torch.no_grad():
        model[1].weight *= 20
        guesses = model(preprocess(images))
        easy = torch.arange(1234) < 600
        labels[easy] = guesses.argmax(1)[easy]
    logits = predict(model, images, torch.autocast("cpu", torch.bfloat16, enabled=False))
    scores = score(per_image(logits, labels, labels // 5, SUPERCLASS_OF))

    def accuracy(predicted, target, **options):
        return multiclass_accuracy(predicted, target, average="micro", **options).item()

    assert scores["images"] == 1234
    assert scores["loss"] == pytest.approx(nn.functional.cross_entropy(guesses, labels).item(), rel=1e-5)
    assert scores["top1"] == pytest.approx(accuracy(guesses, labels, num_classes=100))
    assert scores["top5"] == pytest.approx(accuracy(guesses, labels, num_classes=100, top_k=5))
    assert scores["superclass_top1"] == pytest.approx(accuracy(guesses.argmax(1) // 5, labels // 5, num_classes=20))
    assert scores["ece"] == pytest.approx(
        multiclass_calibration_error(guesses, labels, 100, n_bins=15).item(), abs=1e-5
    )


def test_ties_for_the_likeliest_class_are_decided_in_one_way():
    """In bfloat16 such ties are common; and other logits differ too little for their probabilities to differ."""
    logits = torch.randint(0, 3, (1000, 100), generator=torch.Generator().manual_seed(0)) * 1.0
    logits[0] = torch.arange(100) * 1e-10
    predicted = logits.argmax(1)
    images = per_image(logits, predicted, predicted // 5, SUPERCLASS_OF)
    assert images["top1"].all()
    assert images["top5"].all()
    file = pq.read_table(io.BytesIO(to_predictions_file(logits, predicted)))
    assert np.array_equal(RunFiles("a", None, file).answers.predicted, predicted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shares", [False, True])
def test_the_loss_is_torch_s_and_the_history_counts_plain_cross_entropy(smoothing, shares):
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 100), torch.randint(0, 100, (50,))
    if shares:
        targets = torch.randn(50, 100).softmax(1)
    loss, counts = loss_and_counts(logits, targets, smoothing)
    reference = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    plain = nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    labels = targets.argmax(1) if shares else targets
    assert counts.tolist() == pytest.approx([50, plain.item(), (logits.argmax(1) == labels).sum().item()], rel=1e-5)
