"""Every sentence of findings, pages and commands, in the singular, in the plural and at extremes."""

import re
from collections.abc import Iterator

import pytest
from histories import GUESSES, OVERFITS, made_up
from provoked import PROVOKED, recorded

from raycifar.analysis.comparison import sentence
from raycifar.analysis.comparison_report import shared_conditions
from raycifar.analysis.diagnosis import PHRASES, seed_variance
from raycifar.analysis.markdown import to_markdown
from raycifar.analysis.reports import report_run
from raycifar.analysis.run_files import RunFiles
from raycifar.workflows.benchmark import noise

WRONG = re.compile(
    r"(?<![\w.,-])1 (?:[\w-]+ )?(?:epochs|images|steps|runs|workers|seeds)\b"
    r"|(?<![\w.,-])(?:[02-9]|[\d,]*\d\d) (?:epoch|image|step|run|worker|seed)\b"
    r"|-0\.0+\b|\bnan\b|\binf\b|100% sure|  |\.\.|\s[.,;:]"
)
NOT_FINITE = {"status": "failed", "failure": "not-finite", "reason": "the loss is no longer finite: epoch 1, step 1"}


def histories() -> Iterator:
    """Runs of all kinds, small and large."""
    for epochs in (0, 1, 2, 25):
        for train, val in ((1, 0), (1, 1), (100, 1), (45_000, 5000)):
            run = {"limit": train if train < 45_000 else None, "name": "a"}
            for columns in ({}, OVERFITS, GUESSES, {"val_top1": lambda e: 0.5}, {"val_top1": lambda e: 0.02 * e}):
                for recipe in ({"epochs": epochs or 1}, {"epochs": 30, "dropout": 0.9, "batch_size": 4}):
                    yield made_up(epochs, val, None, recipe, train, run, **columns)
    yield made_up(0, result=NOT_FINITE, recipe={"epochs": 1})
    yield made_up(
        val_loss=lambda e: 1.5 + 2 * (e == 12), val_top1=lambda e: 0.5 - 0.2 * (e == 12), restarts=lambda e: e == 12
    )
    yield made_up(
        val_loss=lambda e: 1.5 + 2 * (e == 12),
        val_top1=lambda e: 0.5 - 0.2 * (e == 12),
        stage=lambda e: "head" if e < 12 else "whole",
    )
    yield made_up(val_loss=lambda e: 1.5 if e < 12 else 4.5, train_loss=lambda e: 1.5 if e < 12 else 4.5)
    for epochs in (1, 2, 22):
        for columns in ({}, GUESSES, {"val_top1": lambda e: 0.02 * e}):
            for train in (100, 45_000):
                yield made_up(epochs, result={"status": "stopped"}, recipe={"epochs": 200}, train=train, **columns)
    for lr in (0.0, 1e-4, 0.05):
        little = {name: lambda e: 4.5 for name in ("train_loss", "train_eval_loss", "val_loss")}
        yield made_up(epochs=1, recipe={"lr": lr}, **little)
    yield made_up(recipe={"lr": 5.0}, **GUESSES)
    yield made_up(train_top1=lambda e: 0.4, train_eval_top1=lambda e: 0.62)
    for name in PROVOKED:
        yield from recorded(name)


def check(text: str) -> None:
    assert not WRONG.search(text), (WRONG.search(text), text)
    assert text[0].isupper() or text.startswith(("cnn", "vgg16")), text
    assert text.endswith((".", ":")), text


def test_all_sentences_agree_in_number_and_hold_no_nonsense():
    seen = set()
    for history in histories():
        report = report_run(RunFiles("a", history))
        said = [finding[key] for finding in report["findings"] for key in ("evidence", "advice")]
        for text in (report["state"], report["paragraph"], *said):
            check(text)
        assert not WRONG.search(" ".join(step["reason"] for step in report["next"]))
        assert not WRONG.search(to_markdown(report).replace("      ", "").replace("  ", " "))
        assert all(finding["confidence"] < 1 for finding in report["findings"])
        seen |= {finding["kind"] for finding in report["findings"]}
    assert seen >= PHRASES.keys() - {"test-differs", "seed-variance"}


@pytest.mark.parametrize("train", [1, 2000])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("verdict", ["better", "worse", "undecided"])
@pytest.mark.parametrize("p", [0.0, 0.024, 1.0])
def test_sentences_of_comparisons(train, epochs, verdict, p):
    sign = -1 if verdict == "worse" else 1
    pair = {"a": "cnn", "b": "vgg16", "low": 0.01 * sign, "high": 0.03 * sign, "difference": 0.02 * sign, "pairs": 1}
    pair |= {"verdict": verdict, "epochs": epochs, "train_images": train, "immature": True, "seeds_measured": False}
    pair |= {"too_early": False, "hardly_learned": [], "p_adjusted": p}
    text = sentence(pair | {"images": 10_000, "seeds_needed": 3, "runs": [3, 3]})
    check(text)
    assert "p = 0)" not in text
    assert "show it" not in text or "4 seeds of each model would show it" in text  # three did not
    assert text.startswith(f"After {epochs} epoch")


def test_sentences_of_seeds_and_conditions():
    check(seed_variance("cnn", [0.1, 0.6], 10_000).evidence)
    one, three = [made_up(1, 0, train=1, run={"seed": 3})], [made_up(run={"seed": seed}) for seed in range(3)]
    assert shared_conditions([RunFiles("a", h) for h in one]).startswith(
        "Conditions: 1 epoch, 1 training image, 0 validation"
    )
    assert shared_conditions([RunFiles("a", h) for h in three]).endswith("10,000 test images, seeds 0, 1 and 2.")


def stage(share, low=100.0, high=101.0):
    return {"share": {"median": share}, "images_per_second": {"median": 100.0, "low": low, "high": high}}


def test_a_bench_says_when_its_figures_cannot_be():
    assert noise({"stages": {"bare": stage(1.0), "images": stage(1.04), "train": stage(0.9, 100, 119)}}) == []
    (one,) = noise({"stages": {"bare": stage(1.0), "images": stage(1.3)}})
    assert one.startswith("This is noise: images can't be faster than the bare step alone, but was timed at up to 1.30")
    (two,) = noise({"stages": {"images": stage(1.06), "train": stage(1.2)}})
    assert "images and train can't be faster than the bare step alone, but were timed" in two
    (rounds,) = noise({"stages": {"bare": stage(1.0), "train": stage(0.9, 100, 125)}})
    assert rounds.startswith("This is noise: the rounds of train differ by 25%, more than a fifth.")
