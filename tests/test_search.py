"""A search trains what its trials' recipes say, and its result stays what the final runs were trained with."""

import json
import re
from dataclasses import replace

import pytest

from raycifar.cluster.sizing import Workers
from raycifar.cluster.status import Phase, StatusStore, WorkerStatus
from raycifar.errors import RequestError, ResumableError, WorkError
from raycifar.models import Architecture
from raycifar.models.initial_weights import load_initial_weights
from raycifar.models.recipes import choose_recipe
from raycifar.storage.run_folder import METRICS, RESULT, RUN, RunFolder
from raycifar.storage.weights import to_file
from raycifar.terminal import Screen
from raycifar.workflows import tuning
from raycifar.workflows.requests import ComparisonRequest
from raycifar.workflows.study import build_spaces, check_spaces, describe_search, finish, read_inputs
from raycifar.workflows.training import split_images
from raycifar.workflows.training_run import Inputs, TrainingRun
from raycifar.workflows.trial import Trial, TrialStatus
from raycifar.workflows.tuning import Study, StudySearcher

OPTIONS = {"data": "synthetic:300", "val_size": 100, "epochs": 1, "seeds": 1, "name": "c"}


def study_of(tmp_path, space=None, **options):
    """Return a study of the CNN with two search trials, its images, and what prepares and ends a trial of it."""
    if space:
        (tmp_path / "space.toml").write_text(space)
        options["space"] = str(tmp_path / "space.toml")
    options = {"storage": str(tmp_path), "search": 2} | OPTIONS | options
    request = ComparisonRequest.of(["cnn"], **options)
    source, _, initial = read_inputs(request, Screen(quiet=True))
    spaces = build_spaces(request)
    check_spaces(request, spaces, initial)
    recipes = {"cnn": initial["cnn"].resolve(request.recipes["cnn"])}
    return Study(request, RunFolder(request.storage, request.name), recipes, initial, spaces), source


def begin(study, source, trial):
    request = study.training_request(trial)
    inputs = Inputs(source, split_images(source, request), study.initial_by_model["cnn"].adapt(trial.recipe, source))
    workers = Workers(1, 1)
    tuning.begin(TrainingRun(request, study.folder_of(trial), inputs, workers), Screen(quiet=True))


def end(study, trial, top1):
    row = dict.fromkeys(("train_loss", "val_loss", "images_per_second", "seconds", "training_seconds", "lr"), 1.0)
    row |= {"epoch": 1, "train_top1": 0.1, "val_top1": top1, "val_top5": 0.5, "workers": 1}
    study.folder_of(trial).write(METRICS, json.dumps(row).encode() + b"\n")
    result = {"status": "finished", "epochs": 1, "best_epoch": 1, "train_seconds": 1.0, "images_per_second": 1.0}
    study.folder_of(trial).write_json(RESULT, result)


def test_a_trial_trains_the_network_and_the_image_size_of_its_recipe(tmp_path, monkeypatch):
    study, source = study_of(tmp_path)
    recipe = replace(study.recipes["cnn"], depth=2, whiten=True, image_size=40, tta_flip=True, progressive="36:0.5")
    trained = []
    monkeypatch.setattr(tuning, "fit", lambda run, follow: trained.append(run))
    monkeypatch.setattr(tuning, "finish", lambda run, outcome: None)
    trial = Trial("cnn-search-02", "cnn", 0, recipe, search=True)
    tuning.run_trial({"trial": trial}, study, source, Workers(1, 1))
    expected = load_initial_weights("cnn", recipe, source)
    found = trained[0].inputs.initial
    assert found.architecture == expected.architecture
    assert {name: values.tolist() for name, values in found.weights.items()} == {
        name: values.tolist() for name, values in expected.weights.items()
    }
    assert study.folder_of(trial).read_json(RUN)["architecture"]["options"] == {"depth": 2, "whiten": True}


def test_pretrained_weights_keep_their_network_in_every_trial(tmp_path):
    architecture = Architecture("cnn")
    weights = tmp_path / "cnn.safetensors"
    weights.write_bytes(to_file(architecture.build().state_dict(), architecture))
    recipe = choose_recipe("cnn", pretrained=str(weights), epochs=2)
    initial = load_initial_weights("cnn", recipe, None)
    larger = initial.adapt(replace(recipe, image_size=40, tta_flip=True), None)
    assert larger.weights is initial.weights
    assert larger.architecture.preprocessing.size == 40
    assert larger.architecture.options == initial.architecture.options
    with pytest.raises(RequestError, match=r"--depth can't be combined with --pretrained"):
        initial.adapt(replace(recipe, depth=3), None)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (
            "[batch_size]\nchoices = [1]",
            "finds no recipe that can be trained: .*: --batch-size 1",
        ),
        ("[mixup]\nmin = 0.6\nmax = 0.9\n[cutmix]\nmin = 0.6\nmax = 0.9", "their sum must be at most 1"),
    ],
)
def test_a_space_without_a_recipe_that_can_be_trained_is_refused(tmp_path, space, says):
    with pytest.raises(RequestError, match=says):
        study_of(tmp_path, space)


def test_a_failed_trial_is_not_run_again_once_the_final_runs_have_its_search_s_recipe(tmp_path):
    study, source = study_of(tmp_path)
    searcher, trials = StudySearcher(study, 1), {}
    for key in ("first", "failed", "final"):
        searcher.suggest(key)
        trials[key] = searcher.running[key]
        begin(study, source, trials[key])
        if key != "failed":
            end(study, trials[key], top1=0.3)
        searcher.on_trial_complete(key, error=key == "failed")
    statuses = [trial.status for trial in searcher.trials]
    assert statuses == ["finished", "failed", "finished"]
    again = StudySearcher(study, 1)
    assert [trial.status for trial in again.trials] == statuses
    assert again.best("cnn").recipe == trials["first"].recipe
    (tmp_path / "c/cnn-s0").rename(tmp_path / "c-s0")  # without a final run, the failed trial is tried again
    assert [trial.status for trial in StudySearcher(study, 1).trials] == ["finished", "waiting"]


def test_the_recipe_itself_is_no_discovery_where_the_first_trial_failed(tmp_path):
    study, source = study_of(tmp_path, "[augment]\nchoices = ['cutout']")
    searcher = StudySearcher(study, 1)
    for key in ("failed", "same"):
        searcher.suggest(key)
        begin(study, source, trial := searcher.running[key])
        if key == "same":
            end(study, trial, top1=0.3)
        searcher.on_trial_complete(key, error=key == "failed")
    assert describe_search(searcher, "cnn")["sentence"].endswith(
        "found nothing better than its recipe in 2 trials: validation top-1 0.3000."
    )


def test_the_recipe_itself_is_no_discovery_after_a_resume(tmp_path):
    study, source = study_of(tmp_path)
    object.__setattr__(study, "recipes", {"cnn": replace(study.recipes["cnn"], pretrained="https://me:secret@a.b/c")})
    searcher = StudySearcher(study, 1)
    searcher.suggest("first")
    begin(study, source, searcher.running["first"])
    written = study.folder_of(searcher.running["first"]).read_json(RUN)
    assert "secret" not in json.dumps(written)
    (restored,) = StudySearcher(study, 1).trials
    assert restored.setting == "the recipe itself"


def test_a_trial_that_has_lost_its_workers_waits_for_room_as_a_new_one_does(store, monkeypatch):
    monkeypatch.setattr(tuning, "POLL_SECONDS", 0)
    trial = Trial("cnn-s0", "cnn", 0, choose_recipe("cnn"), search=False, status_store=store)
    for status, waits in ((WorkerStatus(phase=Phase.TRAINING), None), (WorkerStatus(attempt=1), "for a node")):
        store.put_worker(status)
        tuning.report_epochs(trial, iter([True, False]).__next__, lambda: "for a node")
        assert store.waiting() == waits
    tuning.report_epochs(trial, iter([True, True, False]).__next__, iter(["for a node", None]).__next__)
    assert store.waiting() is None


def test_trials_may_begin_and_end_while_another_thread_looks_at_them(tmp_path, monkeypatch):
    searcher = StudySearcher(study_of(tmp_path)[0], 2)
    first, second = (searcher.suggest(name) and searcher.running[name] for name in "ab")

    class Growing(list):
        def __iter__(self):
            searcher.finals["vgg16"] = []
            return super().__iter__()

    searcher.finals["cnn"] = Growing()
    assert searcher.trials == [first, second]
    monkeypatch.setattr(StatusStore, "request_stop", lambda store: searcher.running.clear())
    assert searcher.stop() == [first.status_store, second.status_store]


@pytest.mark.parametrize("reason", ["the disk is full.", "RuntimeError: no room"])
def test_failed_trials_are_said_to_be_tried_again_where_that_may_help(tmp_path, reason):
    study, source = study_of(tmp_path, seeds=2, search=0, report=False)
    searcher = StudySearcher(study, 1)
    for trial in searcher.trials:
        trial.status, trial.reason = TrialStatus.FAILED, reason
    (tmp_path / "c").mkdir()
    said = f"2 of 2 trials failed: cnn-s0: {reason.rstrip('.')}; cnn-s1: {reason.rstrip('.')}."
    for failed, kind in ((0, ResumableError), (1, ResumableError), (2, WorkError)):
        for trial in searcher.trials[:failed]:
            study.folder_of(trial).write_json(RESULT, {"status": "failed", "epochs": 0, "reason": "x"})
        with pytest.raises(WorkError, match=f"^{re.escape(said)}$") as raised:
            finish(searcher, source, Screen(quiet=True), lambda found: None)
        assert type(raised.value) is kind
