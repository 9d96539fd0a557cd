"""What is shown of a run: plain lines where there is no terminal, a line that changes where there is one."""

import io
import re
import threading
from dataclasses import replace
from functools import partial
from threading import Thread

import pyte
import pytest
from rich.console import Console
from rich.table import Table

from raycifar import terminal as room
from raycifar.cluster.status import (
    Failure,
    FailureCause,
    ModelFacts,
    PartStatus,
    Phase,
    StepStatus,
    WorkerStatus,
)
from raycifar.models.recipes import recipe_for
from raycifar.storage.schemas import EpochRecord
from raycifar.terminal import PlainConsole, Screen, trial_lines, trial_table
from raycifar.words import duration
from raycifar.workflows.background import run_in_thread
from raycifar.workflows.trial import Trial, TrialStatus

STEP = StepStatus(
    epoch=2,
    step=5,
    steps=10,
    lr=0.1,
    loss=2.5,
    top1=0.25,
    images_per_second=50.0,
    seconds_of_epoch=20,
    seconds_left=7200,
)
SCORING = PartStatus(what="validating", done=2400, total=5000)
MODEL = ModelFacts(parameters=4_226_212, device="cpu", threads=2, precision="bfloat16")


def record(epoch, **changes):
    values = {"train_loss": 3.0, "train_top1": 0.2, "val_loss": 2.9, "val_top1": 0.3, "val_top5": 0.6, "lr": 0.1}
    return EpochRecord(**{"epoch": epoch, **values, "images_per_second": 900.0, "seconds": 5.0, "workers": 1} | changes)


@pytest.fixture
def trial(store):
    recipe = recipe_for("cnn")
    return Trial("cnn-s0", "cnn", 0, recipe, search=False, setting="lr 0.2", status_store=store)


def screen(*, terminal: bool = False, **options) -> Screen:
    made = Screen()
    made.console = PlainConsole(file=io.StringIO(), force_terminal=terminal, width=120, **options)
    return made


def said(made: Screen) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", made.console.file.getvalue())


@pytest.mark.parametrize("terminal", [True, False])
def test_no_name_is_obeyed(terminal):
    """Markup and emoji codes of rich, an escape sequence, line ends and a byte that is no text."""
    name, made = "[red]a[/b] :smile: \x1b]0;title\x07\r\n\udcff", screen(terminal=terminal)
    table = Table(name)
    table.add_row(name)
    made.say(name)
    made.facts(name, {"data": name})
    made.console.print(table)
    with made.waiting(name), made.line() as line:
        line.show(name, None)
    with made.progress(name):
        pass
    written = made.console.file.getvalue()
    assert written.count(r"[red]a[/b] :smile: \x1b]0;title\x07\r\n\udcff") >= 6
    assert "\x1b]" not in written
    assert "\x07" not in written


def follow(made, store, looks, waiting=lambda: None):
    """Follow a run that ends after a number of polls, each of which may change its status first."""
    steps, refreshed = iter(looks), []

    def running():
        change = next(steps, None)
        if change:
            change()
        return change is not None

    made.follow(store, running, 3, waiting, lambda: refreshed.append(1))
    return refreshed


def test_the_test_set_is_scored_after_the_last_epoch_s_line_though_that_is_stored_later(store, monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    scoring = WorkerStatus(attempt=1, phase=Phase.SCORING_TEST)
    looks = [lambda: store.put_worker(scoring), lambda: store.put_history([record(e) for e in (1, 2, 3)])]
    made = screen()
    follow(made, store, looks)
    assert [line.split(" ")[0] for line in said(made).splitlines()[-4:]] == ["epoch", "epoch", "epoch", "scoring"]


@pytest.mark.parametrize("terminal", [False, True])
def test_each_epoch_notice_and_failure_is_said_once(store, monkeypatch, terminal):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    first = WorkerStatus(attempt=1, phase=Phase.TRAINING, notices=["Note."], model=MODEL)

    def begin():
        store.put_worker(first)
        store.put_history([record(1)])

    def fail():
        store.add_failure(Failure(FailureCause.WORKER, "out of memory", [1]))
        store.put_worker(WorkerStatus(attempt=1, notices=["Note."], model=MODEL))

    def go_on():
        store.put_worker(WorkerStatus(attempt=2, phase=Phase.TRAINING, notices=["Continuing."], model=MODEL, step=STEP))
        store.put_history([record(1), record(2)])

    made = screen(terminal=terminal)
    refreshed = follow(made, store, [lambda: None, begin, begin, fail, go_on, go_on])
    text = said(made)
    assert len(refreshed) == 2
    for line in (
        "4,226,212 parameters, bfloat16 on cpu",
        "Note.",
        "Continuing.",
        "epoch 1/3  loss 3.0000",
        "epoch 2/3",
    ):
        assert text.count(line) == 1, (line, text)
    assert "Worker 1 failed (out of memory); the workers are restarted from the last checkpoint." in text
    if not terminal:
        assert text.startswith("starting the workers …\n")
        assert text.count("training …") == 2


def test_what_workers_wait_for_is_said_until_they_start(store, monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 0.01)
    made = screen()
    looks = [lambda: None, lambda: store.put_worker(WorkerStatus(attempt=1, phase=Phase.TRAINING))]
    follow(made, store, looks, waiting=lambda: "waiting for 1 worker")
    assert said(made) == "waiting for 1 worker …\ntraining …\n"


def test_a_step_is_told_every_half_minute_with_the_time_that_is_left(monkeypatch):
    monkeypatch.setattr(room, "LINE_SECONDS", 0)
    lines = []
    line = room.PlainLine(lines.append)
    line.show("training", None)
    line.show("training", STEP)
    line.show("training", SCORING)
    ends = room.time_of_day(7200)
    assert lines == [
        "training …",
        f"epoch 2, step 5 of 10: loss 2.500  top-1 0.250  50 images/s, ends {ends}",
        "validating 2,400 of 5,000 …",
    ]


def test_an_epoch_without_validation_or_with_a_loss_that_is_not_finite_has_a_line():
    bare = room.epoch_line(record(1, val_loss=None, val_top1=None, val_top5=None), 10)
    assert "validation" not in bare
    assert bare == "epoch  1/10  loss 3.0000  top-1 0.2000 | 900 images/s  5 s"
    assert "loss nan" in room.epoch_line(record(1, train_loss=None), 10)


def test_a_trial_is_told_from_its_start_to_its_end(trial, store):
    assert trial_lines(trial) == []
    trial.status = TrialStatus.RUNNING
    store.put_waiting("waiting for 1 worker")
    store.add_failure(Failure(FailureCause.DRIVER, "it died"))
    store.put_worker(WorkerStatus(notices=["Continuing."]))
    store.put_history([record(1)])
    trial.status, trial.reason = TrialStatus.FAILED, "the disk is full."
    lines = trial_lines(trial)
    assert lines[:4] == [
        "running lr 0.2",
        "waiting for 1 worker",
        "Its driver failed (it died) and is restarted.",
        "Continuing.",
    ]
    assert lines[4].startswith("epoch   1/")
    assert lines[5] == "failed: the disk is full."


def test_the_table_shows_where_each_trial_stands(trial, store):
    def cells():
        return [next(iter(column.cells)) for column in trial_table([trial]).columns]

    assert cells() == ["cnn-s0", "waiting", *[""] * 5]
    trial.status = TrialStatus.RUNNING
    assert cells()[1] == "starting"
    store.put_waiting("waiting for 1 worker")
    assert cells()[1] == "waiting for 1 worker"
    store.put_worker(WorkerStatus(attempt=1))  # after it has lost its workers
    assert cells()[1] == "waiting for 1 worker"
    store.put_history([record(1)])
    store.put_worker(WorkerStatus(phase=Phase.TRAINING, step=STEP))
    epochs = trial.recipe.epochs
    assert cells() == ["cnn-s0", "training", f"2/{epochs}", "2.500", "0.3000", "50", "2 h 0 min"]
    store.put_worker(WorkerStatus(phase=Phase.TRAINING, step=STEP, part=SCORING))
    assert cells()[1] == "validating"
    trial.status = TrialStatus.FINISHED
    assert cells()[1] == "finished"


def test_in_a_notebook_plain_lines_are_shown(store, monkeypatch):
    """Rich shows each through IPython; a line that changes would need widgets."""
    made = Screen()
    made.console = Console(file=io.StringIO(), force_jupyter=True, highlight=False)
    shown = []
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: shown.append(text))
    with made.waiting("Starting Ray"):
        pass
    follow(made, store, [])
    assert [text.strip() for text in shown] == ["Starting Ray …", "starting the workers …"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_can_be_followed_from_any_thread(store, terminal):
    made = screen(terminal=terminal)
    outcome = []

    def work():
        outcome.append(
            run_in_thread(lambda: 7, lambda running: made.follow_phase(store, running, lambda: None), Thread.join)
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert outcome == [7]


def test_what_the_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        run_in_thread(lambda: 1 / 0, lambda running: None, Thread.join)


# A real terminal, read as one ------------------------------------------------------------------------


def shown(made: Screen, height: int = 30) -> list[str]:
    """Return what a terminal of 100 columns shows."""
    terminal = pyte.Screen(100, height)
    pyte.Stream(terminal).feed(made.console.file.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in terminal.display]


def terminal_screen(height: int = 30) -> Screen:
    made = Screen()
    made.console = PlainConsole(file=io.StringIO(), force_terminal=True, width=100, height=height)
    return made


def test_scoring_has_a_bar_of_its_own_and_a_long_run_says_when_it_ends(store, monkeypatch):
    monkeypatch.setattr(room, "POLL_SECONDS", 1)  # several times what the screen is drawn in
    monkeypatch.setattr(room, "MEASURED_SECONDS", 0.1)
    made, seen = terminal_screen(), []
    statuses = [
        WorkerStatus(attempt=1, phase=Phase.TRAINING, step=STEP),
        WorkerStatus(attempt=1, phase=Phase.TRAINING, step=replace(STEP, step=6)),
        WorkerStatus(attempt=1, phase=Phase.TRAINING, step=replace(STEP, step=10), part=SCORING),
        None,
    ]

    def look(status):
        seen.append("\n".join(shown(made)))
        if status:
            store.put_worker(status)

    follow(made, store, [partial(look, status) for status in statuses])
    assert re.search(r"epoch 2, step 6 of 10 ━.* loss 2.500  top-1 0.250  50 images/s  ends .*\d\d:\d\d", seen[2]), (
        seen[2]
    )
    assert re.search(r"validating 2,400 of 5,000 ━", seen[3]), seen[3]
    (told,) = [line for line in shown(made) if line.startswith("An epoch takes")]
    assert re.fullmatch(r"An epoch takes about 20 s, scoring included; the run ends at about .*, in 2 h 0 min\.", told)


@pytest.mark.parametrize("left", [30, 7200])
def test_only_a_long_run_says_when_it_ends(left, monkeypatch):
    monkeypatch.setattr(room, "MEASURED_SECONDS", 0)
    ahead = room.Ahead()
    assert ahead.say(replace(STEP, seconds_left=left)) == []
    assert len(ahead.say(replace(STEP, step=6, seconds_left=left))) == (left > 60)
    assert ahead.say(replace(STEP, step=7, seconds_left=left)) == []


def look(made: Screen, looks: list[list[str]]) -> bool:
    looks.append(shown(made, made.console.height))
    return len(looks) < 3


def test_the_columns_of_trials_keep_their_places_and_running_trials_are_in_sight(trial, store):
    made, trials = terminal_screen(20), [replace(trial, name=f"cnn-s{k:02}") for k in range(40)]
    trials[30] = replace(trial, name="cnn-s30", status=TrialStatus.RUNNING)
    headings = []
    for status in (WorkerStatus(phase=Phase.TRAINING), WorkerStatus(phase=Phase.COMPARING, step=STEP)):
        store.put_worker(status)
        made.console.file, looks = io.StringIO(), []
        made.follow_trials(lambda: trials, partial(look, made, looks), lambda: None, lambda: 7200.0)
        live = looks[-1]
        assert any(line.startswith(" cnn-s30") for line in live), live
        assert any(line.startswith("0 of 40 trials are over, 1 running, 39 waiting; all end at about") for line in live)
        headings.append(next(line for line in said(made).splitlines() if "val top-1" in line))
    assert headings[0] == headings[1]


@pytest.mark.parametrize(
    ("epoch", "epochs", "speed", "seconds"), [(7, 30, 812, 56), (200, 200, 123_456, 0), (1000, 1000, 9, 5000)]
)
def test_an_epoch_s_line_fits_100_columns(epoch, epochs, speed, seconds):
    line = room.epoch_line(record(epoch, images_per_second=float(speed), seconds=float(seconds)), epochs)
    assert len(line) <= 100
    assert "val loss 2.9000  top-1 0.3000" in line


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5000, "83 min"),
        (10_380, "2 h 53 min"),
        (86_400 * 3 + 7200, "3 days 2 h"),
    ],
)
def test_lengths_of_time_are_said_as_people_say_them(seconds, says):
    assert duration(seconds) == says


@pytest.mark.parametrize("terminal", [False, True])
def test_no_secret_is_shown_by_a_bar(terminal):
    made, secret = screen(terminal=terminal), "s3://bucket/a?access_key=SECRET1&secret_key=SECRET2"
    with made.progress(f"Reading {secret}") as progress:
        progress(0.5)
    with made.line() as line:
        line.show(f"reading {secret}", None)
    assert "***" in said(made)
    assert "SECRET" not in said(made)
