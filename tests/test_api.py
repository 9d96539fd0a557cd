"""raycifar from Python: in a fresh process, a thread, a notebook, and under a Ray that the caller has started."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Program, finish
from PIL import Image

from raycifar import api
from raycifar.api import compare, open_comparison, open_run, train
from raycifar.data.dataset import to_images
from raycifar.data.sources import load
from raycifar.errors import RequestError, WorkError
from raycifar.workflows import training

BEGIN = """
import json, os, pathlib, signal, sys, threading, time
from raycifar.api import *

OPTIONS = dict(data=sys.argv[1], limit=200, val_size=100, epochs=3, batch_size=20)
OPTIONS |= dict(cpus_per_worker=1, storage="runs", report=False)
"""
INTERRUPT = """
def interrupt_in(folder, epoch):
    def look():
        history = pathlib.Path(folder) / "metrics.jsonl"
        while not history.exists() or len(history.read_text().splitlines()) < epoch:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=look, daemon=True).start()
"""


@pytest.fixture
def program(tmp_path, small):
    """Run a program that begins by importing the API, and return what it printed."""

    def run(code, env=None):
        return finish(Program(tmp_path / "program.py", BEGIN + code, small, env=env)).stdout

    return run


# A run ----------------------------------------------------------------------------------------------


def test_a_run_is_what_its_folder_holds(trained):
    run = open_run(trained)
    assert (run.name, run.folder) == ("a", str(trained))
    assert list(run.history.index) == [1, 2, 3]
    assert run.history["val_top1"].max() == run.history["val_top1"][run.result["best_epoch"]]
    assert run.test == json.loads((trained / "result.json").read_text())["test"]
    assert run.findings == json.loads((trained / "report.json").read_text())["findings"]
    assert "finished" in repr(run)
    assert f"{run.test['top1']:.4f}" in run._repr_html_()
    assert len(run.plot().axes) == 4
    assert open_run(str(trained)).name == "a"


def test_what_a_report_draws_beside_training_in_this_process_changes_no_weight(program):
    said = program("""
import numpy as np
from raycifar.engine.augment import as_trained
from raycifar.models.recipe import Recipe

OPTIONS |= dict(epochs=1)

def draw():
    while not done.is_set():
        as_trained(np.zeros((16, 3, 32, 32), np.uint8), Recipe(), 0)

done = threading.Event()
train("cnn", name="alone", **OPTIONS, workers=0)
threading.Thread(target=draw, daemon=True).start()
train("cnn", name="beside", **OPTIONS, workers=0)
done.set()
alone, beside = (pathlib.Path(f"runs/{name}/model.safetensors").read_bytes() for name in ("alone", "beside"))
print(alone == beside)
""")
    assert said.splitlines()[-1] == "True"


def test_a_run_that_has_just_begun_has_no_epochs_and_no_scores(trained, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/run.json").write_text((trained / "run.json").read_text())
    run = open_run(tmp_path / "b")
    assert run.test is None
    assert len(run.history) == 0
    assert "val_top1" in run.history
    run.plot()
    run._repr_html_()
    with pytest.raises(RequestError, match="does not exist"):
        run.load()
    with pytest.raises(RequestError, match="is not a run's folder"):
        open_run(tmp_path)
    for wrong in (None, 3):
        with pytest.raises(RequestError, match=f"^{wrong} is not a path: give a folder"):
            open_run(wrong)


def test_images_of_any_kind_are_asked_about(trained, small, tmp_path):
    model = open_run(trained).load(device="cpu")
    pixels = to_images(load(small).test["image"])[:4].transpose(0, 2, 3, 1)
    classes, probabilities = model.predict(pixels)
    assert len(classes) == 4
    assert set(classes) <= set(model.class_names)
    assert probabilities.shape == (4, 100)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    pictures = [Image.fromarray(image) for image in pixels]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for same in (torch.from_numpy(pixels.copy()), list(pixels), pictures, files, str(tmp_path)):
        assert np.array_equal(model.predict(same).probabilities, probabilities)
    for one in (pixels[0], pictures[0], files[0]):
        assert np.allclose(model.predict(one).probabilities, probabilities[:1], atol=1e-5)
    assert model.predict(Image.new("L", (200, 100))).probabilities.shape == (1, 100)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((2, 3, 32, 32), np.uint8), r"uint8 of shape \(2, 3, 32, 32\)"),
        (np.zeros((2, 32, 32, 3), np.float32), "float32 of shape"),
        ([], "the list of images is empty"),
        ("nowhere.png", "nowhere.png does not exist"),
        ("photos", r"^photos/broken\.png can't be read: it is not an image of a known format\.$"),
        (None, "^NoneType is not a kind of image: give PIL images, paths or an array"),
        ([None], "^NoneType is not a kind of image"),
    ],
)
def test_what_is_no_image_is_refused(trained, images, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos/broken.png").write_text("no image")
    with pytest.raises(RequestError, match=says):
        open_run(trained).load(device="cpu").predict(images)


# Training -------------------------------------------------------------------------------------------


def test_a_recipe_of_one_model_needs_no_model_and_without_either_one_is_asked_for():
    with pytest.raises(RequestError, match=r"--workers 'many'"):
        train(recipe="speedrun", workers="many")
    for options in ({}, {"recipe": "study"}):
        with pytest.raises(RequestError, match=r"give --model: cnn, .*speedrun.*, or timm:NAME\."):
            train(**options)


def test_in_the_program_s_own_process_twice_and_in_a_thread(program, trained, tmp_path):
    printed = program("""
first = train("cnn", workers=0, name="first", **OPTIONS)
print("between")
box = []
work = lambda: box.append(train("cnn", workers=0, name="second", progress=False, **OPTIONS))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print("after", box[0].name, train("cnn", workers=0, name="first", progress=False, **OPTIONS).test == first.test)
for wrong in ({"epoch": 3}, {"val_size": 7}, {"lr": 0.3, "name": "first"}):
    try:
        train("cnn", **{**OPTIONS, "workers": 0, "progress": False, **wrong})
    except RequestError as error:
        print("refused:", error)
try:
    train("cnn", workers=0, precision="float32", warmup=0.0, name="hot", progress=False, **{**OPTIONS, "lr": 1e9})
except WorkError as error:
    print("failed:", error)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""")
    before, _, after = printed.partition("between\n")
    assert "epoch 3/3  loss " in before
    assert after.startswith("after second True\n")
    for name in ("first", "second"):
        weights = tmp_path / "runs" / name / "model.safetensors"
        assert weights.read_bytes() == (trained / "model.safetensors").read_bytes()
    assert "refused: unknown option 'epoch'; did you mean 'epochs'?" in after
    assert "refused: --val-size 7 can't be divided" in after
    assert "is another run: lr 0.05 there, 0.3 here" in after
    assert "failed: the loss is no longer finite" in after
    assert after.endswith("True\n")


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("names", ["a", pytest.param("ab", marks=pytest.mark.slow)])
def test_under_the_caller_s_ray_which_is_left_running(program, names):
    printed = program(
        f"""
import ray

settings = {{"debug_dump_period_milliseconds": 12345}}
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=settings)
mine = ray.put("still there")
for name in {names!r}:
    run = train("cnn", workers=1, name=name, **OPTIONS)
    print(run, ray.is_initialized(), ray.get(mine), len(run.history))
print(train("cnn", workers=0, name="c", **OPTIONS), ray.get(mine))
print(ray._raylet.Config.debug_dump_period_milliseconds())
""",
        env={"RAY_AUTH_MODE": "disabled"},
    )
    assert printed.count("True still there 3") == len(names)
    assert printed.endswith("12345\n")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_training_leaves_a_checkpoint_and_goes_on_by_the_same_call(program, tmp_path, workers):
    program(
        INTERRUPT
        + f"""
OPTIONS |= dict(workers={workers}, epochs=4, progress=False)
train("cnn", name="whole", **OPTIONS)
interrupt_in("runs/a", 2)
try:
    train("cnn", name="a", **OPTIONS)
    print("not interrupted")
except KeyboardInterrupt:
    assert 2 <= len(open_run("runs/a").history) < 4
    assert open_run("runs/a").result is None
run = train("cnn", name="a", **OPTIONS)
assert run.history["restarts"].sum() == 1
""",
        env={"RAY_AUTH_MODE": "disabled"},
    )
    whole, resumed = (tmp_path / f"runs/{name}/model.safetensors" for name in ("whole", "a"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_comparison_of_finished_runs_has_its_tables_as_data_frames(trained, tmp_path):
    other = Path(shutil.copytree(trained, tmp_path / "b"))
    (other / "manifest.json").unlink()
    (other / "run.json").write_text(json.dumps(json.loads((other / "run.json").read_text()) | {"seed": 1}))
    comparison = compare(runs=[open_run(trained), other], storage=str(tmp_path), name="c", progress=False)
    assert comparison.models.loc["cnn", "runs"] == 2
    assert comparison.models.loc["cnn", "top1"] == open_run(trained).test["top1"]
    assert list(comparison.pairs.columns)[:2] == ["a", "b"]
    assert [run.name for run in comparison.runs] == ["a", "b"]
    assert len(comparison.plot().axes) == 2
    assert "cnn" in comparison._repr_html_()
    assert open_comparison(tmp_path / "c").sentences == comparison.sentences
    with pytest.raises(RequestError, match="a is the same run as a"):
        compare(runs=[trained, open_run(trained)], storage=str(tmp_path), name="d", progress=False)
    for single in (str(trained), trained, open_run(trained), [trained]):
        with pytest.raises(RequestError, match="a is a single run: give at least two to compare"):
            compare(runs=single, storage=str(tmp_path), name="e", progress=False)
    assert not (tmp_path / "e").exists()
    for wrong in ({}, {"models": ["cnn"], "runs": [trained]}):
        with pytest.raises(RequestError, match="give either models"):
            compare(**wrong)


@pytest.mark.slow
def test_models_are_trained_and_compared_interrupted_and_continued(program):
    program(
        INTERRUPT
        + """
OPTIONS |= dict(seeds=2, epochs=6, name="c", progress=False)
interrupt_in("runs/c/cnn-s0", 2)
try:
    compare(["cnn"], **OPTIONS)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
comparison = compare(["cnn"], **OPTIONS)
assert comparison.models.loc["cnn", "runs"] == 2
assert [run.name for run in comparison.runs] == ["cnn-s0", "cnn-s1"]
assert len(comparison.runs[0].history) == 6
""",
        env={"RAY_AUTH_MODE": "disabled"},
    )


# A notebook -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_notebook_shows_how_it_goes_and_its_stop_button_stops_the_training(small, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = nbformat.v4.new_code_cell
    options = f"data={small!r}, limit=200, val_size=100, batch_size=20, cpus_per_worker=1, workers=0, report=False"
    long = code(f"run = train('cnn', epochs=300, name='long', {options})")
    cells = [
        code("from raycifar.api import train, open_run"),
        code(f"run = train('cnn', epochs=2, name='a', {options})"),
        code("run"),
        code("run.plot()"),
        code("run.load().predict(run.about and __import__('numpy').zeros((2, 32, 32, 3), 'uint8')).classes"),
        long,
        code("print(open_run('results/long').result, len(open_run('results/long').history) > 0)"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        notebook,
        timeout_func=lambda cell: 8 if cell["source"] == long["source"] else 120,
        interrupt_on_timeout=True,
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    outputs = [cell["outputs"] for cell in notebook["cells"]]
    assert "epoch 2/2  loss " in "".join(output.get("text", "") for output in outputs[1])
    assert "top1" in outputs[2][0]["data"]["text/html"]
    assert "image/png" in outputs[3][0]["data"]
    assert outputs[5][-1]["ename"] == "KeyboardInterrupt"
    assert outputs[6][0]["text"] == "None True\n"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_in_the_caller_s_process_leaves_no_status_behind_unless_it_may_still_be_told_to_stop(
    interrupted, tmp_path, monkeypatch
):
    stores = []

    def fit(run, follow):
        stores.append(run.status_store)
        if interrupted:
            run.status_store.request_stop()
            raise KeyboardInterrupt
        raise WorkError("training failed.")

    monkeypatch.setattr(training, "fit", fit)
    options = {"data": "synthetic:300", "val_size": 100, "workers": 0, "report": False, "storage": tmp_path}
    with pytest.raises((WorkError, KeyboardInterrupt)):
        api.train("cnn", progress=False, **options)
    assert (stores[0].worker() is not None) is interrupted
