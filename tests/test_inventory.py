"""`raycifar runs` and `raycifar clean`: what is there, and what may go."""

import io
import json
import os
import re
import shutil

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from raycifar import clean as clean_door
from raycifar import runs as runs_door
from raycifar.errors import RequestError
from raycifar.storage.checkpoints import Checkpoints, checkpoint_name
from raycifar.storage.lock import locked
from raycifar.storage.run_folder import RunFolder
from raycifar.storage.schemas import EpochRecord
from raycifar.terminal import PlainConsole
from raycifar.terminal_tables import LESS_OF_RUNS, fit, runs_table
from raycifar.workflows import inventory
from raycifar.workflows.inventory import find_runs

ROW = {"train_loss": 3.0, "train_top1": 0.2, "val_top1": 0.3, "lr": 0.1, "images_per_second": 9.0}
ROW |= {"seconds": 50.0, "workers": 1}
TEST = {"images": 100, "loss": 2.0, "top1": 0.4, "top5": 0.7}


def make(storage, name, hour, result=None, epochs=2, model="cnn"):
    """Write what a run leaves, with three checkpoints."""
    run = RunFolder(str(storage), name)
    about = {"name": name, "model": model, "recipe": {"epochs": 4}, "created": f"2026-01-02T{hour:02}:00:00+0000"}
    run.write_json("run.json", about)
    run.write_history([EpochRecord(epoch=k + 1, **ROW) for k in range(epochs)])
    for epoch in range(1, 4):
        Checkpoints(run).write(checkpoint_name(epoch, 0), {"model.pt": bytes(1000)})
    if result:
        run.write_json(
            "result.json",
            {"status": result, "epochs": epochs, "reason": "it failed."}
            | ({"test": TEST} if result == "finished" else {}),
        )
    return run


@pytest.fixture
def storage(tmp_path):
    """Runs of each kind, a comparison that is stopped, and what is no run."""
    storage = tmp_path / "runs"
    make(storage, "old", 1, "finished")
    make(storage, "failed", 2, "failed")
    make(storage, "stopped", 3)
    make(storage, "new", 5, "finished", epochs=4, model="vgg16")
    RunFolder(str(storage), "broken").write("run.json", b"{")
    make(storage / "study", "cnn-s0", 4, "finished")
    make(storage / "study", "cnn-search-01", 4, "stopped")
    make(storage / "study", "vgg16-s0", 4, model="vgg16")
    study = {"seed": 0, "vgg16": {}, "vgg16 weights": "a", "cnn": {}, "cnn weights": "a"}
    RunFolder(str(storage), "study").write_json("study.json", study)
    (storage / "notes").mkdir()
    return storage


def listed(location):
    return {entry.name: entry for entry in find_runs(str(location))}


def test_the_newest_come_first_each_with_its_state(storage):
    found = listed(storage)
    assert [*found] == ["new", "study", "stopped", "failed", "old", "broken"]
    states = {name: str(entry.state) for name, entry in found.items()}
    assert states == {
        "new": "finished", "study": "stopped", "stopped": "stopped", "failed": "failed", "old": "finished",
        "broken": "damaged",
    }  # fmt: skip
    assert (found["new"].epochs, found["new"].of_epochs, found["new"].seconds) == (4, 4, 200)
    assert (found["old"].val_top1, found["old"].test_top1) == (0.3, [0.4])
    assert found["failed"].reason == "it failed."
    assert found["study"].models == ["vgg16", "cnn"]
    assert {trial.name: str(trial.state) for trial in found["study"].trials} == {
        "cnn-s0": "finished", "cnn-search-01": "stopped by search", "vgg16-s0": "stopped",
    }  # fmt: skip
    assert [*listed(storage / "study")] == ["cnn-s0", "cnn-search-01", "vgg16-s0"]
    assert [*listed(storage / "old")] == ["old"]
    (row,) = [list(column.cells)[1] for column in runs_table(list(found.values())).columns][3:4]
    assert row == "2/3 trials"


def test_a_comparison_s_page_has_the_models_in_the_order_given_also_before_its_end(storage):
    from raycifar.workflows.reporting import find_runs as runs_of

    assert [run.name for run in runs_of(RunFolder(str(storage), "study"), None)] == ["vgg16-s0", "cnn-s0"]


def test_a_run_under_way_has_the_host_it_runs_on(storage):
    with locked(RunFolder(str(storage), "stopped"), print), locked(RunFolder(str(storage), "study"), print):
        found = listed(storage)
        for entry in (found["stopped"], found["study"], found["study"].trials[2]):
            assert entry.state == "running"
            assert entry.host
        assert found["study"].trials[0].state == "finished"
        assert [what.run.name for what in inventory.removable(str(storage))] == ["new", "old"]
        assert list(inventory.removable(str(storage / "study"))) == []


def test_another_machine_s_run_is_under_way_while_it_renews_its_claim(storage, monkeypatch):
    with locked(RunFolder(str(storage), "stopped"), print):
        monkeypatch.setattr("raycifar.storage.lock.machine", lambda: "another")
        assert listed(storage)["stopped"].state == "running"
        monkeypatch.setattr("raycifar.storage.lock.DEAD_SECONDS", 0)
        assert listed(storage)["stopped"].state == "stopped"


@pytest.fixture
def run(in_process):
    return lambda door, *args, **options: in_process(door.main, *args, **options)


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (93, "name model state epochs val test time"),
        (80, "name model state epochs test"),
        (50, "name state test"),
        (40, "name state"),
        (15, "name"),
    ],
)
def test_a_narrow_terminal_shows_fewer_columns_and_breaks_no_word(storage, width, columns):
    make(storage, "a-name-of-several-words", 6, "finished", model="resnet50")
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=width)
    console.print(fit(runs_table(find_runs(str(storage))), console, LESS_OF_RUNS))
    said = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()
    assert max(map(len, said)) <= width
    assert said[1].replace("top-1", "").split() == columns.split()
    if width > 23:
        whole = ("a-name-of-several-words", "resnet50", "finished", "", "0.3000", "0.4000")
        shown = dict(zip("name model state epochs val test".split(), whole, strict=True))
        assert any(all(shown.get(name, "") in line for name in columns.split()) for line in said)


def test_in_a_pipe_no_line_of_a_table_is_wrapped(storage, run):
    make(storage, "a-long-name-" * 10, 6, "finished", model="resnet50")
    row = next(line for line in run(runs_door, storage)[1].splitlines() if "a-long-name-" * 10 in line)
    assert row.split()[1:] == ["resnet50", "finished", "2/4", "0.3000", "0.4000", "2", "min"]


def checkpoints(storage):
    return {path.parent.relative_to(storage).as_posix() for path in storage.glob("**/checkpoint_*")}


def test_only_checkpoints_of_finished_runs_go_once_that_is_wanted(storage, run):
    before, files = checkpoints(storage), set(storage.glob("**/*.json*"))
    code, said = run(clean_door, storage, answer="n\n")
    assert code == 0
    assert "Nothing was removed." in said.splitlines()[-1]
    assert f"{storage}/old: 3 checkpoints, 0.0 MB" in said
    assert "Remove 12 checkpoints, 0.0 MB, of 4 finished runs? [y/N]" in said
    code, said = run(clean_door, storage)
    assert code == 2
    assert said.splitlines()[-1].startswith("Error: nobody can answer here, so nothing was removed: give --yes")
    assert checkpoints(storage) == before
    assert run(clean_door, storage, answer="y\n")[0] == 0
    assert checkpoints(storage) == {"failed", "stopped", "study/vgg16-s0"}
    assert {file for file in files if "checkpoint_" not in str(file)} <= set(storage.glob("**/*.json*"))
    assert "has checkpoints" in run(clean_door, storage, "--yes")[1]


def test_a_run_that_is_begun_again_in_the_meantime_keeps_its_checkpoints(storage):
    (what,) = inventory.removable(str(storage / "old"))
    what.run.delete("result.json")
    said = []
    assert not inventory.remove(what, said.append)
    assert "is no longer finished, and is left alone" in said[0]
    assert "old" in checkpoints(storage)


def test_what_is_left_alone_is_not_counted_as_removed(storage, run, monkeypatch):
    def begin_again(location):
        for what in [*inventory.removable(location)]:
            if what.run.name == "old":
                what.run.delete("result.json")
            yield what

    monkeypatch.setattr(clean_door, "removable", begin_again)
    _, said = run(clean_door, storage, "--yes")
    assert said.splitlines()[-1] == "Removed 9 checkpoints, 0.0 MB, of 3 finished runs."
    assert "old" in checkpoints(storage)
    make(storage, "old", 1, "finished")
    _, said = run(clean_door, storage / "old", "--yes")
    assert said.splitlines()[-1] == "Nothing was removed."


def test_a_run_that_goes_between_listing_and_reading_is_damaged(storage):
    run = RunFolder(str(storage), "old")
    run.delete("run.json")
    found = inventory.list_run(run)
    assert (str(found.state), found.reason) == ("damaged", f"{storage}/old holds no run.json.")


def test_json_is_for_programs_and_what_is_no_folder_is_refused(storage, run, tmp_path, monkeypatch):
    rows = json.loads(run(runs_door, storage, "--json")[1])
    assert [row["name"] for row in rows][:2] == ["new", "study"]
    assert rows[0]["state"] == "finished"
    assert run(runs_door, storage)[1].count("finished") == 2
    monkeypatch.chdir(storage / "notes")
    assert f"There are no runs in {storage}/notes.\n" in run(runs_door, ".")[1]
    assert run(runs_door, tmp_path / "nothing")[0] == 2
    with pytest.raises(RequestError, match="does not exist"):
        find_runs(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    assert run(runs_door, tmp_path / "file")[0] == run(clean_door, tmp_path / "file")[0] == 2
    with pytest.raises(RequestError, match="file is not a folder"):
        find_runs(str(tmp_path / "file"))
    assert RunFolder.at("/").exists("")  # which `runs /` lists


def test_names_that_others_gave_break_no_line_and_what_is_wrong_is_said_below(storage, run):
    make(storage, "two\nlines", 7, "finished")
    (storage / os.fsdecode(b"not-\xff-utf-8")).mkdir()
    (storage / "old" / os.fsdecode(b"\xff")).touch()
    code, said = run(runs_door, storage)
    assert code == 0
    lines = [line.strip() for line in said.splitlines()]
    assert [line for line in lines if line.startswith(r"two\nlines")]
    assert f"broken: {storage}/broken/run.json is damaged: " in said
    assert "failed: it failed." in lines
    assert rf"{storage}/two\nlines: 3 checkpoints, 0.0 MB" in run(clean_door, storage, answer="n\n")[1].splitlines()
    code, said = run(runs_door, storage / os.fsdecode(b"not-\xff-utf-8"))
    assert code == 2
    assert "isn't UTF-8: rename the file or folder" in said


def test_an_object_store_is_listed_and_cleaned_as_a_disk_is(storage, monkeypatch, run):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    server = ThreadedMotoServer("127.0.0.1", 5547, verbose=False)
    server.start()
    try:
        query = "?endpoint_override=127.0.0.1:5547&scheme=http&region=us-east-1&allow_bucket_creation=true"
        filesystem, _ = fs.FileSystem.from_uri(f"s3://bucket{query}")
        filesystem.create_dir("bucket")
        shutil.rmtree(storage / "notes")
        fs.copy_files(str(storage), "bucket", destination_filesystem=filesystem)
        found = listed(f"s3://bucket{query}")
        assert [*found] == ["new", "study", "stopped", "failed", "old", "broken"]
        assert [trial.name for trial in find_runs(f"s3://bucket/study{query}")] == [
            t.name for t in found["study"].trials
        ]
        code, said = run(runs_door, f"s3://a:sekret@bucket{query}", "--json")
        assert code == 0
        assert "sekret" not in said
        assert run(clean_door, f"s3://bucket{query}", "--yes")[0] == 0
        left = filesystem.get_file_info(fs.FileSelector("bucket", recursive=True))
        kept = {entry.path.split("/checkpoint_")[0] for entry in left if "checkpoint_" in entry.path}
        assert kept == {"bucket/failed", "bucket/stopped", "bucket/study/vgg16-s0"}
    finally:
        server.stop()
