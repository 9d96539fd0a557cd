"""Following every training image: what is kept is what it says, and wrong labels come first."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from command import Command
from relabelled import relabel

from raycifar.analysis.suspects import rank_suspects
from raycifar.engine.example_stats import (
    BEFORE,
    LOSS,
    MARGIN,
    RIVAL,
    SEEN,
    blank_stats,
    describe_rise,
    end_epoch,
    to_example_stats_file,
    update_stats,
)


def test_margins_losses_and_rivals_are_those_of_the_epochs():
    generator = torch.Generator().manual_seed(0)
    images, epochs = 50, 7
    labels = torch.randint(0, 10, (images,), generator=generator)
    logits = torch.randn(epochs, images, 10, generator=generator)
    logits[:, :20, 3] += 5.0  # for these, one class is nearly always the likeliest
    labels[:20] = 7
    stats = blank_stats(images, torch.device("cpu"))
    for epoch in range(epochs):
        for rows in torch.randperm(images, generator=generator).split(8):
            update_stats(stats, rows, logits[epoch, rows], labels[rows])
        before = stats[:, BEFORE].clone()
        loss = F.cross_entropy(logits[epoch], labels, reduction="none")
        assert torch.allclose(stats[:, LOSS], loss, atol=1e-5)
        end_epoch(stats)
        assert epoch == 0 or torch.allclose(
            before, F.cross_entropy(logits[epoch - 1], labels, reduction="none"), atol=1e-5
        )
    own = logits.gather(2, labels.expand(epochs, -1)[..., None])[..., 0]
    others = logits.scatter(2, labels.expand(epochs, -1)[..., None], -torch.inf)
    assert torch.allclose(stats[:, MARGIN], (own - others.amax(2)).sum(0), atol=1e-4)
    assert (stats[:, SEEN] == epochs).all()
    assert (stats[:20, RIVAL] == 3).float().mean() > 0.9


def test_a_rise_is_told_with_the_images_that_make_it():
    values = torch.zeros(1000, 6)
    values[:, BEFORE], values[:, LOSS] = 1.0, 0.9
    values[17, LOSS] = 50.0
    rise = describe_rise(values, torch.arange(1000) + 5000)
    assert rise["fraction"] == pytest.approx(1.0)
    assert rise["indices"][0] == 5017
    assert describe_rise(blank_stats(10, torch.device("cpu")), torch.arange(10)) is None


def test_suspects_are_sorted_by_their_margin():
    values = torch.zeros(4, 6)
    values[:, SEEN] = torch.tensor([2.0, 2, 0, 1])
    values[:, MARGIN] = torch.tensor([4.0, -6, 0, 1])
    values[:, RIVAL] = torch.tensor([1.0, 9, 0, 3])
    file = to_example_stats_file(values, torch.tensor([30, 10, 20, 40]), torch.arange(4))
    found = rank_suspects(pq.read_table(io.BytesIO(file)))
    assert found.index.tolist() == [10, 40, 30]
    assert found.label.tolist() == [1, 3, 0]
    assert found.suggested.tolist() == [9, 3, 1]
    assert found.score[0] == 1
    assert (np.diff(found.score) < 0).all()
    assert found.to_csv().splitlines()[1].startswith("10,aquarium_fish,bottle,1.000000,")


def test_the_file_has_each_training_image_once():
    values = torch.rand(100, 6)
    table = pq.read_table(io.BytesIO(to_example_stats_file(values, torch.randperm(100), torch.arange(100))))
    assert table["index"].to_pylist() == list(range(100))


@pytest.mark.slow
def test_wrong_labels_are_found_in_real_images(cifar, tmp_path):
    changed = set(relabel(cifar, tmp_path / "data", 0.05, seed=7).tolist())
    args = ("--model", "cnn", "--workers", 0, "--epochs", 5, "--limit", 20_000, "--name", "a")
    done = Command(*args, "--data", tmp_path / "data", storage=tmp_path).finish(timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(",") for line in (tmp_path / "a/suspects.csv").read_text().splitlines()[1:]]
    wrong = np.array([int(row[0]) in changed for row in rows])
    chance = wrong.mean()
    top = wrong[: len(wrong) // 100].mean()
    precision = (np.cumsum(wrong) / np.arange(1, len(wrong) + 1))[wrong].mean()
    print(f"chance {chance:.3f}, precision at the top 1 % {top:.3f}, average precision {precision:.3f}")
    assert top >= 5 * chance
