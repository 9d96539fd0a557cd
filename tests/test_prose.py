"""Runs in words."""

import pytest
from histories import GUESSES, OVERFITS, made_up

from raycifar.analysis.diagnosis import PHRASES, diagnose
from raycifar.analysis.prose import headline, next_steps, paragraph, state, to_command
from raycifar.words import count


def test_the_paragraph_names_scores_and_findings():
    history = made_up(result={"status": "finished", "test": {"images": 10_000, "top1": 0.6123, "top5": 0.8712}})
    text = paragraph(history, found := diagnose(history))
    assert text.startswith(
        "The cnn was trained from scratch on 45,000 CIFAR-100 images for 20 epochs, with 5,000 more held out for "
        "validation. Training ended at a loss of 1.255 and an accuracy of 64.9%. Validation ended at a loss of 1.451 "
        "and an accuracy of 62.1%, its best. On 10,000 test images, scored once, it reached a top-1 accuracy of 61.2% "
        "and a top-5 accuracy of 87.1%."
    )
    assert all(finding.evidence in text for finding in found)


def test_the_paragraph_of_one_epoch_and_of_none():
    one = made_up(epochs=1, val=0, run={"data": {"source": "/copies/cifar.tar.gz", "train": 1, "val": 0, "test": 1}})
    said = "The cnn was trained from scratch on 1 CIFAR-100 image for 1 epoch. Training ended"
    assert paragraph(one, []).startswith(said)
    none = made_up(epochs=0, recipe={"epochs": 5})
    said = "for 5 epochs, of which none is finished, with 5,000 more held out for validation."
    assert paragraph(none, []).endswith(said)


@pytest.mark.parametrize(
    ("done", "result", "said"),
    [
        (0, None, "This run is under way or was interrupted: 0 of 3 epochs recorded."),
        (1, None, "This run is under way or was interrupted: 1 of 3 epochs recorded."),
        (3, None, "This run has recorded 3 of 3 epochs, but no result yet."),
        (3, {"status": "finished"}, "This run is finished, after 3 epochs."),
        (1, {"status": "stopped"}, "A search stopped this run after 1 of 3 epochs, because others did better."),
        (
            2,
            {"status": "failed", "reason": "the disk is full."},
            "This run failed after 2 of 3 epochs: the disk is full.",
        ),
        (2, {"status": "failed"}, "This run failed after 2 of 3 epochs: the reason is not recorded."),
    ],
)
def test_the_state_of_a_run(done, result, said):
    assert state(made_up(epochs=done, result=result, recipe={"epochs": 3})) == said


def test_numbers_and_nouns_agree():
    assert [count(n, "epoch") for n in (0, 1, 2, 1000)] == ["0 epochs", "1 epoch", "2 epochs", "1,000 epochs"]


def test_the_headline_says_everything_once():
    found = diagnose(made_up(**OVERFITS))
    assert headline([*found, *found]) == headline(found)
    assert headline([]) == "nothing to read yet"
    assert "it overfits" in headline(found)
    assert all(phrase[0].islower() for phrase in PHRASES.values())


def test_a_command_has_values_in_full_for_another_value_is_another_run():
    history = made_up()
    assert "--lr 0.08374509876" in to_command(history.run, "train", {"lr": 0.08374509876})


def test_the_next_steps_are_commands_that_are_understood():
    from raycifar import compare, train

    shown = [
        made_up(),
        made_up(**OVERFITS),
        made_up(**OVERFITS, recipe={"cutmix": 0.8}, run={"limit": 2000}),
        made_up(val=200, recipe={"lr": 0.7, "augment": "flip"}),
        made_up(epochs=2, train_loss=lambda e: 4.606, train_top1=lambda e: 0.01),
    ]
    for history in shown:
        steps = next_steps(history, diagnose(history))
        assert steps
        for step in steps:
            _, command, *args = step["command"].split()
            context = {"train": train.main, "compare": compare.main}[command].make_context(command, list(args))
            assert {"train": "model", "compare": "names"}[command] in context.params


@pytest.mark.parametrize("limit", [None, 10_000])
@pytest.mark.parametrize("rises", [True, False])
def test_a_trial_that_a_search_stopped_is_trained_to_its_end_by_itself(rises, limit):
    top1 = {"val_top1": lambda e: 0.5 + 0.005 * e} if rises else {}
    history = made_up(
        22, result={"status": "stopped"}, recipe={"epochs": 150, "lr": 0.03}, run={"limit": limit}, **top1
    )
    (step,) = next_steps(history, diagnose(history))
    assert step["reason"] == "this recipe to its end, outside the search"
    assert "train --model cnn" in step["command"]
    assert "--epochs 150" in step["command"]
    assert "--lr 0.03" in step["command"]


@pytest.mark.parametrize(
    ("history", "said", "unsaid"),
    [
        (made_up(val=0, run={"val_size": 0}), "--val-size 5000", "--val-size 0"),
        (
            made_up(val=1000, train=48_000, run={"val_size": 1000, "limit": 48_000}),
            "--val-size 5000",
            "48000 --recipe study --epochs 20 --val-size 5000",
        ),
        (
            made_up(val=2000, val_top1=lambda e: 0.6 + 0.1 * (-1) ** e, val_loss=lambda e: 1.5, run={"val_size": 2000}),
            "--ema 0.999",
            "--val-size 5000",
        ),
        (made_up(**GUESSES, recipe={"optimizer": "adamw", "lr": 0.05}), "--lr 0.005", "--lr 0.025"),
    ],
    ids=["a search needs validation", "there are no more images", "the network swings", "another optimizer"],
)
def test_suggested_commands_are_possible_and_fit(history, said, unsaid):
    commands = "\n".join(step["command"] for step in next_steps(history, diagnose(history)))
    assert said in commands
    assert unsaid not in commands


@pytest.mark.parametrize(("head", "step"), [(0, "clipped gradients"), (11, "half the learning rate")])
def test_what_is_done_against_a_spike_fits_its_cause(head, step):
    history = made_up(
        val_loss=lambda e: 1.5 + 2 * (e == 12),
        val_top1=lambda e: 0.5 - 0.2 * (e == 12),
        stage=lambda e: "head" if e <= head else "whole",
        result={"status": "finished"},
    )
    reasons = [step["reason"] for step in next_steps(history, diagnose(history))]
    assert [reason for reason in reasons if "spikes" in reason] == [f"{step}, against spikes"]


def test_more_images_come_with_what_is_wrong_in_the_recipe_put_right():
    history = made_up(recipe={"augment": "none"}, run={"limit": 2000}, train=2000, **OVERFITS)
    steps = next_steps(history, diagnose(history))
    assert all("--augment none" not in step["command"] for step in steps)
    assert steps[0]["reason"].startswith("all images, with the augmentation of the study recipe: ")
