"""Exporting a trained network for other programs, with its preprocessing."""

import copy
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from pyarrow.fs import FileType

from raycifar.data import CIFAR100
from raycifar.data.dataset import to_images
from raycifar.errors import RequestError, WorkError
from raycifar.models import slug
from raycifar.storage.files import file_type, write_file
from raycifar.storage.locations import check_location, parent_and_name
from raycifar.storage.run_folder import BEST, MODEL, RUN, RunFolder
from raycifar.terminal import Screen
from raycifar.workflows.prediction import Model, Weights, check_finite
from raycifar.workflows.reporting import load_images
from raycifar.workflows.training_run import read_run

if TYPE_CHECKING:
    from torch import Tensor, nn

Network = Callable[["Tensor"], "Tensor"]  # images (n, 3, 32, 32) uint8 to logits (n, classes)

CHECKED = 1000  # images for which the exported file must predict the network's classes
WRITABLE = (FileType.File, FileType.NotFound)
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript")}
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "safetensors": ".safetensors"}


@dataclass(frozen=True)
class Export:
    """An exported file, its size, and the largest difference of its logits from the network's on `num_images`."""

    file: str
    num_bytes: int
    num_images: int
    difference: float


def export(network: str, kind: str, screen: Screen, *, out: str | None = None, data: str | None = None) -> Export:
    """Write a network as `kind`, one of `SUFFIXES`.

    The result maps images (n, 3, 32, 32) uint8, channels first, to logits (n, classes) float32.

    Args:
        network: a run's folder, or a weights file. out: the file, or URI.
        data: test images for the check, by default the run's.

    Raises:
        RequestError: the network or the images don't exist, a package is missing, or the file can't be written.
        WorkError: the result predicts other classes than the network; nothing was written.
    """
    if missing := [name for name in PACKAGES.get(kind, ()) if not find_spec(name)]:
        raise RequestError(f"--to {kind} needs the package {missing[0]}: pip install 'raycifar[{kind}]'.")
    if out is not None:
        check_out(out, network, kind)
    folder = RunFolder.at(network)
    run = None if folder.name.endswith(".safetensors") else read_run(folder)
    with screen.waiting("Loading PyTorch"):
        import torch

        model = Model(network, "cpu")
    if out is None:
        out = f"{slug(model.weights.architecture.model)}{SUFFIXES[kind]}"
        check_out(out, network, kind)
    with screen.waiting("Reading the images"):
        images = to_images(load_images(run, data).test["image"].slice(0, CHECKED)).copy()
    expected = check_finite(model.logits(images), network).numpy()
    with screen.waiting(f"Writing {kind}"), warnings.catch_warnings(action="ignore"):  # the result is checked
        content, read_back = FORMATS[kind](with_preprocessing(model.weights))
        with torch.inference_mode():
            found = read_back(torch.from_numpy(images)).numpy()
    differing = int((found.argmax(1) != expected.argmax(1)).sum())
    largest = float(np.abs(found - expected).max())
    if differing:
        raise WorkError(
            f"as {kind}, the network predicts another class for {differing} of {len(images)} images (logits differ by "
            f"up to {largest:.2g}): nothing was written."
        )
    write_file(out, content)
    return Export(out, len(content), len(images), largest)


def check_out(out: str, network: str, kind: str) -> None:
    """Raise RequestError if a file can't be written, or would replace the network's weights or a file of a run.

    Whether a remote one can be written shows only at the end.
    """
    location, name = parent_and_name(check_location(out, "--out", to_write=True))
    folder = RunFolder.at(location)
    with folder.marker("--out"):
        pass
    if not folder.is_remote and file_type(folder.filesystem, folder.path(name)) not in WRITABLE:
        raise RequestError(f"{out} can't be written: it is not a file. Give another --out.")
    may_be_of_run = name in (MODEL, BEST) or not name.endswith(SUFFIXES[kind])
    if parent_and_name(network) == (location, name) or (may_be_of_run and folder.exists(RUN)):
        raise RequestError(f"--out {out} would replace a file of a run, or the weights to be exported: give another.")


def with_preprocessing(weights: "Weights") -> "nn.Module":
    """Return a network that maps (n, 3, 32, 32) uint8 to logits."""
    import torch
    from torch import Tensor, nn

    from raycifar.models.preprocess import resize

    class Whole(nn.Module):
        mean: Tensor
        std: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.preprocessing = weights.architecture.preprocessing
            self.register_buffer("mean", 255 * torch.tensor(self.preprocessing.mean)[:, None, None])
            self.register_buffer("std", 255 * torch.tensor(self.preprocessing.std)[:, None, None])
            self.network = weights.build()

        def forward(self, images: Tensor) -> Tensor:
            return self.network((resize(images.float(), self.preprocessing) - self.mean) / self.std)

    return Whole().eval()


# A format: the content of its file, and the network that this content holds.


def to_onnx(whole: "nn.Module") -> tuple[bytes, Network]:
    import onnxruntime
    import torch

    program = torch.onnx.export(
        whole,
        (torch.zeros(2, *CIFAR100.image_shape, dtype=torch.uint8),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("n")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_torch_export(whole: "nn.Module") -> tuple[bytes, Network]:
    import torch

    images, stream = torch.zeros(2, *CIFAR100.image_shape, dtype=torch.uint8), io.BytesIO()
    program = torch.export.export(whole, (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, stream)
    content = stream.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def to_torchscript(whole: "nn.Module") -> tuple[bytes, Network]:
    import torch

    images, stream = torch.zeros(2, *CIFAR100.image_shape, dtype=torch.uint8), io.BytesIO()
    torch.jit.save(torch.jit.trace(whole, images), stream)
    content = stream.getvalue()
    return content, torch.jit.load(io.BytesIO(content))


def to_safetensors(whole: Any) -> tuple[bytes, Network]:
    import safetensors.torch

    tensors = {name: value.contiguous() for name, value in whole.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={"preprocessing": json.dumps(asdict(whole.preprocessing))})
    read_back = copy.deepcopy(whole)
    for value in read_back.state_dict().values():
        value.zero_()
    read_back.load_state_dict(safetensors.torch.load(content))
    return content, read_back


FORMATS = {
    "onnx": to_onnx,
    "torch-export": to_torch_export,
    "torchscript": to_torchscript,
    "safetensors": to_safetensors,
}
