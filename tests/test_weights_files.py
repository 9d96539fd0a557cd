"""Weights that others made: as training scripts leave them, damaged, absurd, or made to do harm."""

import argparse
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet50, vgg16_bn

from raycifar.data import CIFAR100
from raycifar.data.synthetic import synthetic
from raycifar.errors import RequestError, WorkError
from raycifar.models import CIFAR, Architecture
from raycifar.models.initial_weights import load_initial_weights
from raycifar.models.recipes import choose_recipe
from raycifar.storage.pickles import MAX_STEPS
from raycifar.storage.torch_files import LEGACY, read_state_dict
from raycifar.storage.weights import to_file
from raycifar.terminal import Screen
from raycifar.workflows.evaluation import EvaluationRequest, evaluate
from raycifar.workflows.exporting import export
from raycifar.workflows.prediction import Weights, predict_files, read_weights
from raycifar.workflows.requests import TrainingRequest

SMALL = "timm:test_resnet"


@pytest.fixture(scope="module")
def weights():
    """The state dict of a small network, for 1,000 classes."""
    torch.manual_seed(0)
    return Architecture(SMALL, num_classes=1000).build().state_dict()


def load(path, model=SMALL, **options):
    return load_initial_weights(model, choose_recipe(model, pretrained=str(path), **options), synthetic(100, 100))


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# Ways to save the same weights ----------------------------------------------------------------------


WAYS = {
    "plain": lambda w: dict(w),
    "distributed": lambda w: prefixed("module.", w),
    "compiled, then distributed": lambda w: prefixed("module._orig_mod.", w),
    "distributed, then compiled": lambda w: prefixed("_orig_mod.module.", w),
    "net": lambda w: {"net": prefixed("module.", w), "acc": 60.1, "epoch": 9},
    "params": lambda w: {"params": w},
    "ema": lambda w: {"ema_state_dict": w},
    "lightning": lambda w: {"epoch": 3, "state_dict": prefixed("model.", w), "hyper_parameters": {"lr": 0.1}},
    "lightning, compiled": lambda w: {"state_dict": prefixed("net._orig_mod.", w)},
    "arrays": lambda w: {name: value.numpy() for name, value in w.items()},
    "arrays by column": lambda w: {n: np.asfortranarray(v) if v.ndim == 2 else v.numpy() for n, v in w.items()},
    "parameters": lambda w: {n: nn.Parameter(v) if v.is_floating_point() else v for n, v in w.items()},
    "double": lambda w: {n: v.double() if v.is_floating_point() else v for n, v in w.items()},
    "transposed": lambda w: {n: v.t().contiguous().t() if v.ndim == 2 else v for n, v in w.items()},
    "beside a namespace": lambda w: {"model": w, "args": argparse.Namespace(lr=0.1)},
    "beside a scalar": lambda w: {"state_dict": w, "metric": np.float64(0.76), "when": np.datetime64("2026-01-01")},
    "beside others": lambda w: {"state_dict": w, "log": defaultdict(list, a=[1]), "names": {"a"}, "rate": 1 + 2j},
    "beside an optimizer": lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_weights_are_read_however_they_were_saved(weights, tmp_path, way, legacy):
    torch.save(WAYS[way](weights), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    initial = load(tmp_path / "w.pth")
    for name, values in initial.weights.items():
        assert np.array_equal(values, weights[name].numpy())
    assert len(initial.weights) == len(weights) - 2  # all but the head
    assert initial.notes == (f"The head of {tmp_path}/w.pth is left out: it is for 1,000 classes.",)


def test_the_same_weights_are_read_from_safetensors(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    assert load(tmp_path / "w.pth").fingerprint() == load(tmp_path / "w.safetensors").fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_read(weights, tmp_path, dtype):
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    torch.save(half, tmp_path / "w.pth")
    found = load(tmp_path / "w.pth").weights
    assert all(np.array_equal(values, half[name].float().numpy()) for name, values in found.items())


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_what_is_left_out_is_named(weights, tmp_path, kind):
    state = prefixed("model.", weights) | {"criterion.weight": torch.ones(100)}
    if kind == "pth":
        torch.save({"state_dict": {**state, "model.note": argparse.Namespace()}}, tmp_path / "w")
    else:
        save_file(state, tmp_path / "w")
    notes = load(tmp_path / "w").notes
    assert notes[0].startswith(f"{tmp_path}/w holds more than the weights of {SMALL}; left out: ")
    assert "criterion.weight" in notes[0]
    assert ("model.note" in notes[0]) == (kind == "pth")


def test_two_networks_in_a_file_are_not_chosen_from(weights, tmp_path):
    torch.save(prefixed("model.", weights) | prefixed("net.", weights), tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"holds two networks, model\.\* and net\.\*: save one"):
        load(tmp_path / "w.pth")


# Weights from CIFAR-100 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar_resnet50(tmp_path_factory):
    """As most scripts for CIFAR-100 make it."""
    with torch.device("meta"):
        network = resnet50(num_classes=100)
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save({name: torch.ones(value.shape, dtype=value.dtype) for name, value in network.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(("options", "size"), [({}, 32), ({"image_size": 64}, 64), ({"recipe": "transfer"}, 32)])
def test_a_small_stem_means_small_images_and_a_head_of_these_classes_is_kept(cifar_resnet50, options, size):
    initial = load(cifar_resnet50, "resnet50", **options)
    pixels = initial.architecture.preprocessing
    assert (pixels.size, pixels.mean, pixels.std) == (size, CIFAR100.mean, CIFAR100.std)
    assert not initial.architecture.large_stem
    assert "fc.weight" in initial.weights
    assert f"was trained on small images, so images have {size} pixels a side here, too" in initial.notes[0]
    assert len(initial.notes) == 1
    assert initial.resolve(choose_recipe("resnet50", pretrained="x")).image_size == size


def test_a_map_of_one_pixel_means_small_images_and_another_head_is_left_out(tmp_path):
    with torch.device("meta"):
        network = vgg16_bn(num_classes=100)
        network.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 100))
    tensors = {name: torch.ones(value.shape, dtype=value.dtype) for name, value in network.state_dict().items()}
    torch.save(tensors, tmp_path / "w.pth")
    initial = load(tmp_path / "w.pth", "vgg16")
    assert (initial.architecture.preprocessing.size, initial.architecture.preprocessing.mean) == (32, CIFAR100.mean)
    assert initial.notes[1] == f"The head of {tmp_path}/w.pth is left out: it has other layers."
    own = Architecture("vgg16")
    torch.save(
        {n: torch.ones(v.shape, dtype=v.dtype) for n, v in own.build_on_meta().state_dict().items()}, tmp_path / "w.pth"
    )
    assert "classifier.4.weight" in load(tmp_path / "w.pth", "vgg16").weights


def test_a_model_without_imagenet_weights_means_small_images(tmp_path):
    torch.save(Architecture("cnn").build().state_dict(), tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", "cnn").architecture.preprocessing == CIFAR


def test_raycifar_s_own_weights_keep_their_image_size_unless_another_is_given(tmp_path):
    own = Architecture("cnn")
    (tmp_path / "own.safetensors").write_bytes(to_file(own.build().state_dict(), own))
    assert load(tmp_path / "own.safetensors", "cnn").architecture.preprocessing.size == 32
    assert load(tmp_path / "own.safetensors", "cnn", image_size=64).architecture.preprocessing.size == 64


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_other_kinds_of_numbers_may_stand_beside_the_weights(weights, tmp_path, legacy):
    others = {kind: torch.zeros(3, dtype=getattr(torch, kind)) for kind in ("complex64", "complex128", "uint16")}
    others |= {
        kind: torch.quantize_per_tensor(torch.zeros(3), 1, 0, getattr(torch, kind)) for kind in ("quint8", "qint32")
    }
    for content in ({"model": weights, **others}, {**others, "model": {**weights, "empty": torch.zeros(0)}}):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        tensors, left = read_state_dict((tmp_path / "w.pth").read_bytes(), "w.pth")
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)
    assert (tensors["empty"].shape, left) == ((0,), [])
    torch.save({**weights, **others}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert read_state_dict((tmp_path / "w.pth").read_bytes(), "w.pth")[1] == [*others]


# Pickles that would do harm -------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled, in one of the ways that pickles have."""

    def __init__(self, path, way):
        self.path, self.way = path, way

    def __reduce__(self):
        match self.way:
            case "reduce":
                return open, (str(self.path), "w")
            case "eval":
                return eval, (f"open({str(self.path)!r}, 'w')",)
            case "system":
                return os.system, (f"touch {self.path}",)
            case "build":
                return argparse.Namespace, (), {"a": Payload(self.path, "reduce")}
            case "items":
                return OrderedDict, (), None, None, iter([("a", Payload(self.path, "reduce"))])
            case "appends":
                return list, (), None, iter([Payload(self.path, "system")])
            case "setter":
                return argparse.Namespace, (), (None, {"a": Payload(self.path, "eval")})


@pytest.mark.parametrize("way", ["reduce", "eval", "system", "build", "items", "appends", "setter"])
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_that_a_pickle_names_is_run(weights, tmp_path, way, legacy):
    payload = Payload(tmp_path / "CODE_WAS_RUN", way)
    content = {"model": {**weights, "payload": payload}, "args": payload}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    initial = load(tmp_path / "w.pth")
    assert len(initial.weights) == len(weights) - 2
    assert not (tmp_path / "CODE_WAS_RUN").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "CODE_WAS_RUN").exists()  # the payload works


class Forged:
    """An array whose type or state isn't what NumPy writes."""

    def __init__(self, code, state, shape=(4,), content=b"AAAAAAAA" * 4):
        self.code, self.state, self.shape, self.content = code, state, shape, content

    def __reduce__(self):
        from numpy._core.multiarray import _reconstruct

        return _reconstruct, (np.ndarray, (0,), b"b"), (1, self.shape, ForgedType(self), False, self.content)


class ForgedType:
    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return np.dtype, (self.array.code, False, True), self.array.state


PLAIN = (3, "<", None, None, None, -1, -1, 0)
FORGED = {
    "objects that are said to be none": Forged("O8", (3, "|", None, None, None, -1, -1, 0)),
    "a larger type": Forged("f8", (3, "<", None, None, None, 1 << 40, 8, 0), (4,), b"A" * 8),
    "fields": Forged("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 27)),
    "a negative shape": Forged("f8", PLAIN, (-1, -4)),
    "more numbers than bytes": Forged("f8", PLAIN, (1 << 40,)),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_arrays_are_refused_without_being_built(weights, tmp_path, kind):
    torch.save({**weights, "array": FORGED[kind]}, tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"is damaged: its tensors don't fit in their numbers\.$"):
        load(tmp_path / "w.pth")


def zipped(path, pickled, storage=b"\0" * 16, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", storage)


def tensor_pickle(size, stride, offset=0):
    """The pickle of {"a": a tensor of storage 0}, with whatever is said of its shape."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Place(), offset, size, stride, False, OrderedDict())

    class Place:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(obj, Place) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": Tensor()})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 40,), (0,), 0),
        ((4,), (1 << 40,), 0),
        ((4,), (1,), 1 << 40),
        ((-4,), (1,), 0),
        ((2,), (-1,), 2),
        ("a", 1, 0),
    ],
)
def test_a_tensor_lies_in_its_numbers(tmp_path, size, stride, offset):
    zipped(tmp_path / "w.pth", tensor_pickle((2, 2), (1, 2)), np.arange(4, dtype=np.float32).tobytes())
    tensors, _ = read_state_dict((tmp_path / "w.pth").read_bytes(), "w.pth")
    assert tensors["a"].tolist() == [[0, 2], [1, 3]]
    zipped(tmp_path / "w.pth", tensor_pickle(size, stride, offset))
    with pytest.raises(RequestError, match="don't fit in their numbers"):
        load(tmp_path / "w.pth")


ABSURD = {
    "a place in memory that is far away": b"\x80\x02Kar\xff\xff\xff\x7f.",  # LONG_BINPUT
    "a long array of bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a long string": b"\x80\x02X\xff\xff\xff\x7fa.",
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "endless lists": b"\x80\x02" + b"]" * (MAX_STEPS + 1) + b".",
    "endless names": b"\x80\x02" + b"".join(b"ca\n%d\n0" % k for k in range(5000)) + b"N.",
    "an extension": b"\x80\x02\x82\x01.",
    "arguments of many calls": b"\x80\x02(" + b"N" * 300 + b"tq\x000ca\nb\nh\x00R.",
    "pairs of many dictionaries": b"\x80\x02ccollections\nOrderedDict\nq\x000K\x01K\x01\x86q\x010]("
    + b"h\x01" * 2**17
    + b"e\x85q\x020]("
    + b"h\x00h\x02R" * 20
    + b"e.",
    "a text as many bytes": b"\x80\x02c_codecs\nencode\nq\x000X\xe8\x03\0\0"
    + b"a" * 1000
    + b"X\x06\0\0\0latin1\x86q\x010]h\x00h\x01Rah\x00h\x01Ra.",
    "a storage with a deep key": b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n)"
    + b"\x85" * 10**5
    + b"X\x03\0\0\0cpuK\x01tQ.",
    "attributes of a class": b"\x80\x02ca\nb\n}U\x01aK\x01sb.",
}


@pytest.mark.parametrize("kind", ABSURD)
def test_an_absurd_pickle_is_refused(tmp_path, kind):
    zipped(tmp_path / "w.pth", ABSURD[kind])
    with pytest.raises(RequestError, match=r"is not a PyTorch .* or is damaged\.$|holds an int, not a"):
        load(tmp_path / "w.pth")


def test_a_legacy_file_with_a_deep_key_is_refused(tmp_path):
    start = (pickle.dumps(value, 2) for value in (LEGACY, 1001, {}, {}))
    (tmp_path / "w.pth").write_bytes(b"".join(start) + b"\x80\x02])" + b"\x85" * 10**5 + b"a.")
    with pytest.raises(RequestError, match="is not a PyTorch or safetensors file, or is damaged"):
        load(tmp_path / "w.pth")


def test_an_array_under_many_names_takes_no_memory(tmp_path):
    array = np.zeros(2**22, np.uint8)
    torch.save({"here": array, "there": array}, tmp_path / "w.pth")
    tensors, _ = read_state_dict((tmp_path / "w.pth").read_bytes(), "w.pth")
    assert [*tensors] == ["here", "there"]
    torch.save({f"array {k}": array for k in range(9)}, tmp_path / "w.pth")
    with pytest.raises(RequestError, match="don't fit in their numbers"):
        load(tmp_path / "w.pth")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    zipped(tmp_path / "w.pth", tensor_pickle((4,), (1,)), b"\0" * (1 << 28), zipfile.ZIP_DEFLATED)
    with pytest.raises(RequestError, match="is not a PyTorch or safetensors file, or is damaged"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("path", ["/dev/zero", "fifo", "folder"])
def test_only_files_are_read(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match="can't be read: "):
        load(tmp_path / path)


def test_a_whole_model_is_refused_with_the_line_that_saves_its_weights(tmp_path):
    torch.manual_seed(1)
    network = Architecture(SMALL, num_classes=1000).build()
    for content, where in ((network, ""), ({"net": network, "epoch": 3}, "['net']")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(RequestError, match=r"holds a whole model, timm\.models\.resnet\.ResNet, ") as refusal:
            load(tmp_path / "w.pth")
        line = str(refusal.value).partition("save its weights: ")[2].removesuffix(".")
        assert f"{where}.state_dict()" in line
        exec(line.replace('"weights.pth"', f'"{tmp_path}/weights.pth"'))
        found = load(tmp_path / "weights.pth").weights["conv1.0.weight"]
        assert np.array_equal(found, network.conv1[0].weight.detach())


# Weights that raycifar wrote, and someone changed ---------------------------------------------------


@pytest.fixture(scope="module")
def cnn_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cnn") / "model.safetensors"
    path.write_bytes(to_file(Architecture("cnn").build().state_dict(), Architecture("cnn")))
    return path


def changed(source, path, **values):
    """Write a weights file with other values in its description."""
    content = source.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header["__metadata__"]["raycifar"])
    header["__metadata__"]["raycifar"] = json.dumps({**about, **values})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return path


@pytest.mark.parametrize("about", ["5", "[1]", '"cnn"'])
def test_a_description_that_is_no_dictionary_is_refused(tmp_path, about):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"raycifar": about})
    with pytest.raises(RequestError, match=r"w\.safetensors is refused: its description is no dictionary\.$"):
        read_weights(str(tmp_path / "w.safetensors"))


PIXELS = {"size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}


@pytest.mark.parametrize(
    "values",
    [
        {"num_classes": 10**9},
        {"num_classes": -1},
        {"num_classes": 99},
        {"num_classes": True},
        {"num_classes": 100.0},
        {"classes": "100"},
        {"model": 7},
        {"model": "vgg17"},
        {"model": "vgg16"},
        {"model": "timm:vit_giant_patch14_224"},
        {"model": ["cnn"]},
        {"options": {"depth": 100_000}},
        {"options": {"depth": 3}},
        {"options": {"depth": 0}},
        {"options": {"depth": "1"}},
        {"options": {"whiten": 1}},
        {"options": {"whiten": True}},
        {"options": []},
        {"large_stem": "yes"},
        {"tta_flip": 2},
        {"preprocessing": None},
        {"preprocessing": {}},
        {"preprocessing": {**PIXELS, "size": 10**6}},
        {"preprocessing": {**PIXELS, "size": -32}},
        {"preprocessing": {**PIXELS, "mean": [0.5]}},
        {"preprocessing": {**PIXELS, "mean": ["a"] * 3}},
        {"preprocessing": {**PIXELS, "mean": [float("nan")] * 3}},
        {"preprocessing": {**PIXELS, "std": [0.0] * 3}},
        {"preprocessing": {**PIXELS, "interpolation": "nearest-exact"}},
    ],
    ids=str,
)
def test_a_description_that_the_tensors_do_not_fit_is_refused(cnn_file, tmp_path, values):
    path = changed(cnn_file, tmp_path / "w.safetensors", **values)
    for read in (read_weights, lambda path: load(path, "cnn")):
        with pytest.raises(RequestError) as refusal:
            read(str(path))
        assert str(path) in str(refusal.value)
        assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 10) + b"{" * 10,
        struct.pack("<Q", 2) + b"{}" + b"more",
        b"\0" * 8 + b"{",
    ],
)
def test_an_absurd_header_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match="not a safetensors file, or is damaged"):
        read_weights(str(tmp_path / "w.safetensors"))


def test_a_description_that_is_nested_without_end_is_refused(cnn_file, tmp_path):
    tensors = load_file(cnn_file)
    save_file(tensors, tmp_path / "w.safetensors", metadata={"raycifar": "[" * 100_000})
    with pytest.raises(RequestError, match="is refused: maximum recursion depth"):
        read_weights(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(cnn_file, weights, tmp_path, value):
    tensors = load_file(cnn_file)
    tensors["head.2.bias"][3] = value
    (tmp_path / "w.safetensors").write_bytes(to_file(tensors, Architecture("cnn")))
    for read in (read_weights, lambda path: load(path, "cnn")):
        with pytest.raises(RequestError, match=r"weights that aren't finite numbers: head\.2\.bias"):
            read(str(tmp_path / "w.safetensors"))
    broken = {name: tensor.clone() for name, tensor in weights.items()}
    broken["conv1.0.weight"][0] = value
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(RequestError, match=r"weights that aren't finite numbers: conv1\.0\.weight"):
        load(tmp_path / "w.pth")


def ask_in_each_way(network, folder, data):
    """Yield a function for each of `predict`, `evaluate` and `export`."""
    out, screen = str(folder / "out"), Screen(quiet=True)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    request = EvaluationRequest(device="cpu", network=network, data=data, count=0, out=out)
    yield lambda: predict_files(network, [str(folder / "a.png")], "cpu")
    yield lambda: evaluate(request, screen, ExitStack())
    yield lambda: export(network, "safetensors", screen, out=out, data=data)


def test_answers_that_are_not_finite_are_refused(cnn_file, small, tmp_path):
    """Each weight is a number, and their products are too large to be one."""
    tensors = load_file(cnn_file)
    tensors["head.2.weight"][:] = tensors["head.5.weight"][:] = 3e38
    (tmp_path / "w.safetensors").write_bytes(to_file(tensors, Architecture("cnn")))
    for ask in ask_in_each_way(str(tmp_path / "w.safetensors"), tmp_path, small):
        with pytest.raises(WorkError, match=r"w\.safetensors gives answers that aren't finite numbers"):
            ask()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", ["missing", "cut", "folder", "fifo", "of other classes"])
def test_a_run_whose_weights_are_missing_or_damaged_is_refused(cnn_file, tmp_path, state):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/model.safetensors"
    match state:
        case "cut":
            path.write_bytes(cnn_file.read_bytes()[:-1])
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "of other classes":
            other = Architecture("cnn", num_classes=10)
            path.write_bytes(to_file(other.build().state_dict(), other))
    for ask in ask_in_each_way(str(tmp_path / "run"), tmp_path, "synthetic:100"):
        with pytest.raises(RequestError, match=r"run/model\.safetensors (does not exist|is not|can't be|tells 10 cla)"):
            ask()
    assert not (tmp_path / "out").exists()


def test_what_raycifar_writes_is_read(cnn_file):
    weights = read_weights(str(cnn_file))
    assert isinstance(weights, Weights)
    assert weights.architecture == Architecture("cnn")
    deep = Architecture("cnn", options={"depth": 3, "whiten": True}, tta_flip=True)
    path = cnn_file.with_name("deep.safetensors")
    path.write_bytes(to_file(deep.build().state_dict(), deep))
    assert read_weights(str(path)).architecture == deep


# timm -----------------------------------------------------------------------------------------------


def test_timm_s_networks_that_cannot_take_the_images_are_refused_before_anything_starts():
    source = synthetic(100, 100)
    for name, said in (("timm:inception_v3", "Kernel size"), ("timm:cait_xxs24_224", "24")):
        with pytest.raises(RequestError, match=rf"^{name} can't take images of 32 pixels \(.*{said}.*\): give another"):
            load_initial_weights(name, choose_recipe(name, pretrained="none"), source)
    with pytest.raises(RequestError, match=r"^timm has no weights 'nonsense' of resnet18: resnet18\."):
        TrainingRequest.of("timm:resnet18.nonsense")
