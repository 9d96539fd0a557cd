"""`raycifar export`: what is written answers as the network does."""

import io
import os
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from command import Export, finish
from safetensors.torch import load_file

from raycifar.data.dataset import to_images
from raycifar.data.sources import load
from raycifar.errors import RequestError
from raycifar.models import Architecture
from raycifar.models.preprocess import preprocess
from raycifar.storage.weights import to_file
from raycifar.terminal import Screen
from raycifar.workflows import exporting
from raycifar.workflows.exporting import export


@pytest.fixture
def network(tmp_path, name):
    """A network with weights that are not trained, but with running statistics that are not the first ones."""
    torch.manual_seed(0)
    model = Architecture(name).build()
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(to_file(model.state_dict(), Architecture(name)))
    return model.eval(), path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("resnet50", "onnx", marks=pytest.mark.slow),
        ("cnn", "onnx"),
        ("cnn", "torch-export"),
        ("speedrun", "torch-export"),
        ("cnn", "torchscript"),
        ("cnn", "safetensors"),
    ],
)
def test_what_is_written_chooses_the_same_classes(network, small, tmp_path, kind):
    model, path = network
    out = tmp_path / "out.bin"
    done = Export(path, "--to", kind, "--out", out, "--data", small, storage=None).finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The same class for each of 300 test images" in done.stdout
    assert done.stderr == ""
    images = to_images(load(small).test["image"])[:64].copy()
    with torch.inference_mode():
        expected = model(preprocess(torch.from_numpy(images))).numpy()
    match kind:
        case "onnx":
            found = onnxruntime.InferenceSession(out.read_bytes()).run(["logits"], {"images": images})[0]
        case "torch-export":
            program = torch.export.load(io.BytesIO(out.read_bytes()))
            with torch.inference_mode():
                found = program.module()(torch.from_numpy(images)).numpy()
        case "torchscript":
            assert "--to torch-export replaces it" in done.stdout
            with torch.inference_mode():
                found = torch.jit.load(io.BytesIO(out.read_bytes()))(torch.from_numpy(images)).numpy()
        case _:
            tensors = load_file(out)
            model.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if "network." in k})
            with torch.inference_mode():
                found = model((torch.from_numpy(images).float() - tensors["mean"]) / tensors["std"]).numpy()
    assert np.allclose(found, expected, atol=1e-3)
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("out", ["file/x", "/proc/x", "folder", "fifo", "/"])
def test_a_place_that_can_t_be_written_is_refused_before_the_work(out, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(exporting, "read_run", lambda folder: pytest.fail("the work began"))
    with pytest.raises(RequestError, match=r" can't be written: .*\. Give another --out\.$"):
        export(str(tmp_path / "network"), "safetensors", Screen(quiet=True), out=str(tmp_path / out))
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder", "fifo"}


def test_a_place_that_can_t_be_written_exits_with_2_and_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    done = Export("nowhere", "--to", "onnx", "--out", tmp_path / "file" / "x.onnx", storage=None).finish()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"Error: {tmp_path}/file can't be written: {tmp_path}/file is not a folder. Give another --out.\n"
    )


def test_a_missing_package_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: name != "onnxscript")
    with pytest.raises(RequestError, match=r"^--to onnx needs the package onnxscript: pip install "):
        export(str(tmp_path / "nowhere"), "onnx", Screen(quiet=True))


def test_without_out_the_file_replaces_no_folder_and_not_the_weights(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = (trained / "model.safetensors").read_bytes()
    (tmp_path / "cnn.safetensors").write_bytes(weights)
    (tmp_path / "cnn.pt").mkdir()
    monkeypatch.setattr(exporting, "load_images", lambda *args: pytest.fail("the work began"))
    for kind, says in (("safetensors", "would replace"), ("torchscript", "can't be written: it is not a file")):
        with pytest.raises(RequestError, match=says):
            export("cnn.safetensors", kind, Screen(quiet=True))
    assert (tmp_path / "cnn.safetensors").read_bytes() == weights


def test_files_of_a_run_are_not_replaced(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "a")
    shutil.copy(trained / "model.safetensors", tmp_path / "alone.safetensors")
    files = [path for path in (tmp_path / "a").iterdir() if path.is_file()]
    before = {path.name: path.read_bytes() for path in files}
    for network, out in [*(("a", f"a/{name}") for name in before), ("alone.safetensors",) * 2]:
        with pytest.raises(RequestError, match="would replace a file of a run, or the weights"):
            export(str(tmp_path / network), "safetensors", Screen(quiet=True), out=str(tmp_path / out))
    assert {path.name: path.read_bytes() for path in files} == before


def test_a_run_is_checked_on_its_own_images_without_being_told_where_they_are(trained, tmp_path):
    nowhere = {"RAYCIFAR_DATA": "", "RAYCIFAR_CACHE": str(tmp_path / "empty")}
    done = finish(Export(trained, "--to", "safetensors", "--out", tmp_path / "out", storage=None, env=nowhere))
    assert "The same class for each of 300 test images" in done.stdout
