"""A run's complete state between two steps, and its form in a checkpoint.

Tensors are saved as safetensors, the rest as JSON: reading a checkpoint runs no code.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from raycifar.engine.distributed import all_gather_rows, all_reduce_mean, broadcast, rank, world_size
from raycifar.engine.epoch_meter import EpochTotals
from raycifar.engine.hardware import autocast_to, choose_precision, seeded, to_device
from raycifar.engine.optimizers import build_optimizer
from raycifar.engine.order import Segment
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe, Stage
from raycifar.storage.checkpoints import PROGRESS
from raycifar.storage.schemas import EpochRecord

TENSORS = "state.safetensors"
PER_EXAMPLE = {"example_stats": "images", "val_correct": "val_right"}  # and what earlier versions called them


@dataclass
class Progress:
    """A run's progress."""

    epoch: int = 1  # the current one, from 1
    segments: list[Segment] = field(default_factory=list)  # its completed steps, by number of workers
    totals: EpochTotals = field(default_factory=EpochTotals)  # the metrics of these steps
    restarts: int = 0  # during the epoch
    history: list[EpochRecord] = field(default_factory=list)  # of earlier epochs

    @property
    def step(self) -> int:
        """The current epoch's completed steps."""
        return sum(segment.steps for segment in self.segments)

    @property
    def best(self) -> EpochRecord | None:
        """The first epoch with the highest validation top-1; None without validation."""
        validated = [record for record in self.history if record.val_top1 is not None]
        return max(validated, key=attrgetter("val_top1"), default=None)

    @property
    def ends_with_best(self) -> bool:
        """Whether the best epoch is the last one, and no step was taken since."""
        return self.best is not None and self.best is self.history[-1] and not self.step

    def to_json(self) -> bytes:
        return json.dumps(asdict(self) | {"history": [record.to_json() for record in self.history]}).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Progress":
        values = json.loads(content)
        return cls(
            epoch=values["epoch"],
            segments=[Segment(**segment) for segment in values["segments"]],
            totals=EpochTotals.from_json(values),
            restarts=values["restarts"],
            history=[EpochRecord.from_json(record) for record in values["history"]],
        )


class TrainingState:
    """A model, its optimizer, its running average, its progress, and statistics of each image.

    Args:
        seed: of the weights that `weights` lacks, the same on every worker.
        weights: the initial weights, by name; None initializes all by the seed.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, np.ndarray] | None,
        recipe: Recipe,
        seed: int,
        device: torch.device,
    ) -> None:
        with seeded(seed, torch.device("cpu")):
            model = architecture.build(recipe.dropout)
        # Arrays in Ray's object store are read-only.
        model.load_state_dict({name: torch.tensor(value) for name, value in (weights or {}).items()}, strict=False)
        self.architecture, self.recipe, self.layers = architecture, recipe, architecture.layers(model)
        self.dtype = choose_precision(recipe.precision, device)
        self.autocast = autocast_to(self.dtype, device)  # the precision to compute in
        self.fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.model = to_device(model, device)
        broadcast(parameters_and_buffers(self.model))
        self.ema = ExponentialMovingAverage(self.model, recipe.ema) if recipe.ema else None
        self.progress = Progress()
        self.example_stats: Tensor | None = None  # of all workers' images: see `example_stats`
        self.val_correct: Tensor | None = None  # (n,) float32: 1 where the last validation was correct
        self.worker_buffers: Tensor | None = None  # (workers, n) float32, mid-epoch: see `gather_buffers`
        self.stage: Stage | None = None
        self.enter_stage()

    def enter_stage(self) -> bool:
        """Enter the current epoch's stage; return whether that changes the stage.

        Each stage has its own optimizer. Frozen parameters have no gradient, so the optimizer doesn't hold them, and
        workers don't exchange them.
        """
        if self.stage == (stage := self.recipe.stage(self.progress.epoch)):
            return False
        self.stage = stage
        head = set(self.layers[-1])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in self.fixed and (stage == "whole" or name in head))
        self.optimizer = build_optimizer(self.model, self.layers, self.recipe)
        return True

    def train_mode(self) -> None:
        """Put the network into training mode; frozen layers' batch norm keeps its statistics."""
        self.model.train()
        if self.stage == "head" or self.recipe.batch_norm == "frozen":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    @property
    def eval_model(self) -> nn.Module:
        """The network that is scored and saved: the running average if there is one."""
        return self.ema.module if self.ema else self.model

    def average_buffers(self) -> None:
        """Replace batch norm's running statistics, which differ between workers, by their mean, if they are trained."""
        self.worker_buffers = None
        if any(module.training for module in self.model.modules() if isinstance(module, _BatchNorm)):
            all_reduce_mean(*self.running_statistics())

    def gather_buffers(self) -> None:
        """Keep each worker's running statistics for a checkpoint: a resumed run continues with its own."""
        if world_size() > 1 and (buffers := self.running_statistics()):
            own = torch.cat([buffer.flatten() for buffer in buffers])
            self.worker_buffers = all_gather_rows(own[None], world_size())

    def running_statistics(self) -> list[Tensor]:
        networks = [self.model, self.ema] if self.ema else [self.model]
        return [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]

    def load_checkpoint(self, contents: Mapping[str, bytes]) -> None:
        tensors = safetensors.torch.load(contents[TENSORS])
        self.progress = Progress.from_json(contents[PROGRESS])
        self.enter_stage()
        device = next(self.model.parameters()).device
        for name, earlier_name in PER_EXAMPLE.items():
            value = tensors.get(name, tensors.get(earlier_name))
            setattr(self, name, None if value is None else value.to(device))
        self.model.load_state_dict(strip_prefix(tensors, "model."))
        if self.ema:
            self.ema.load_state_dict(strip_prefix(tensors, "average."))
        if (rows := tensors.get("worker_buffers")) is not None:
            own = (rows[rank()] if len(rows) == world_size() else rows.mean(0)).to(device)
            buffers = self.running_statistics()
            for buffer, values in zip(buffers, own.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))
        saved = self.optimizer.state_dict()
        for key, value in strip_prefix(tensors, "optimizer.").items():
            index, slot = key.split(".", 1)
            saved["state"].setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(saved)
        # With the same memory layout, the optimizer's arithmetic stays the same, bit for bit.
        for parameter, slots in self.optimizer.state.items():
            for slot, value in slots.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    slots[slot] = torch.empty_like(parameter).copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state by name; they are not copied, and change with it.

        Raises:
            TypeError: the optimizer's state contains other values, which a checkpoint would lose.
        """
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        if self.ema:
            tensors |= {f"average.{key}": value for key, value in self.ema.state_dict().items()}
        others = (*PER_EXAMPLE, "worker_buffers")
        tensors |= {name: value for name in others if (value := getattr(self, name)) is not None}
        for index, slots in self.optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                if not torch.is_tensor(value):
                    name = type(self.optimizer).__name__
                    raise TypeError(f"{name} keeps {slot} as {type(value).__name__}; a checkpoint takes only tensors.")
                tensors[f"optimizer.{index}.{slot}"] = value
        return tensors


class ExponentialMovingAverage(AveragedModel):
    """A running average of a network's weights and buffers, whose decay increases with the number of steps.

    With a fixed decay, the average of a short run would keep much of the random initial weights. After n updates the
    decay is at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage. PyTorch's implementation counts
    on the device, which would wait for a GPU in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay
        pairs = list(zip(parameters_and_buffers(self.module), parameters_and_buffers(model), strict=True))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        averages, values = zip(*self.floats, strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        if self.counts:
            counts, values = zip(*self.counts, strict=True)
            torch._foreach_copy_(counts, values)
        self.n_averaged += 1


def parameters_and_buffers(network: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(network.parameters(), network.buffers())


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
