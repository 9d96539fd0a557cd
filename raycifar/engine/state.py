"""All that a run is made of between two steps, and its way to disk and back.

Tensors travel as safetensors, the rest as JSON: reading a checkpoint runs no code.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from raycifar.engine.hardware import place
from raycifar.engine.optimizers import build_optimizer
from raycifar.engine.order import Segment
from raycifar.models import Architecture
from raycifar.recipes import Recipe, Stage

TENSORS, PROGRESS = "state.safetensors", "progress.json"
FOLLOWED = ("images", "val_right")  # what is known of single images


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 1  # the one under way, from 1
    segments: list[Segment] = field(default_factory=list)  # its steps done, by number of workers
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # its images, loss and hits so far
    norms: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of its gradients: sum, largest, its step
    restarts: int = 0  # in it
    seconds: float = 0.0  # spent on its steps so far
    history: list[dict[str, Any]] = field(default_factory=list)  # of the epochs before it

    @property
    def step(self) -> int:
        """Steps done of the epoch under way."""
        return sum(segment.steps for segment in self.segments)

    @classmethod
    def from_json(cls, content: bytes) -> "Progress":
        values = json.loads(content)
        return cls(**{**values, "segments": [Segment(**segment) for segment in values["segments"]]})


class TrainingState:
    """A model, its optimiser, its running average, its progress, and what is known of single images.

    Args:
        seed: of what `weights` doesn't hold, the same on every worker.
        weights: to begin with, by name; None draws all.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Mapping[str, np.ndarray] | None,
        recipe: Recipe,
        seed: int,
        device: torch.device,
    ) -> None:
        torch.manual_seed(seed)
        model = architecture.build(recipe.dropout)
        # Ray's object store lends its arrays for reading only.
        model.load_state_dict({name: torch.tensor(value) for name, value in (weights or {}).items()}, strict=False)
        self.recipe, self.layers = recipe, architecture.layers(model)
        self.fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.model = place(model, device)
        self.average = Average(self.model, recipe.ema) if recipe.ema else None
        self.progress = Progress()
        self.images: Tensor | None = None  # `ExampleStats.values` of all workers
        self.val_right: Tensor | None = None  # (images,) float32: 1 where the last validation was right
        self.stage: Stage | None = None
        self.enter_stage()

    def enter_stage(self) -> bool:
        """Begin the stage of the epoch under way, if it isn't begun; return whether it was another before.

        A stage has an optimiser of its own. What it leaves frozen has no gradient, so no place in the optimiser
        and no part in what workers exchange.
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
        """Put the network into training mode; batch norm of what is frozen keeps the statistics that it has."""
        self.model.train()
        if self.stage == "head" or self.recipe.batch_norm == "frozen":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    @property
    def scored(self) -> nn.Module:
        """The network that is scored and kept: the running average where there is one."""
        return self.average.module if self.average else self.model

    def average_buffers(self) -> None:
        """Replace batch norm's running statistics, which are each worker's own, by their mean over workers."""
        if not dist.is_initialized():
            return
        networks = [self.model, self.average] if self.average else [self.model]
        for buffer in itertools.chain.from_iterable(network.buffers() for network in networks):
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()

    def snapshot(self) -> Callable[[], dict[str, bytes]]:
        """Return what gives the files of the state as it is now, when it is called, in another thread or later."""
        tensors, progress = copies(self._tensors()), json.dumps(asdict(self.progress)).encode()
        return lambda: {TENSORS: safetensors.torch.save(tensors()), PROGRESS: progress}

    def load_files(self, contents: Mapping[str, bytes]) -> None:
        tensors = safetensors.torch.load(contents[TENSORS])
        self.progress = Progress.from_json(contents[PROGRESS])
        self.enter_stage()
        device = next(self.model.parameters()).device
        for name in FOLLOWED:
            setattr(self, name, tensors[name].to(device) if name in tensors else None)
        self.model.load_state_dict(strip_prefix(tensors, "model."))
        if self.average:
            self.average.load_state_dict(strip_prefix(tensors, "average."))
        saved = self.optimizer.state_dict()
        for key, value in strip_prefix(tensors, "optimizer.").items():
            index, slot = key.split(".", 1)
            saved["state"].setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(saved)
        # In the memory layout they had: the optimiser's arithmetic then takes the same path, bit for bit.
        for parameter, slots in self.optimizer.state.items():
            for slot, value in slots.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    slots[slot] = torch.empty_like(parameter).copy_(value)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        tensors |= {name: value for name in FOLLOWED if (value := getattr(self, name)) is not None}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items() if torch.is_tensor(value)}
        return tensors


def copies(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to copy tensors to the computer's memory, and return what waits for the copies, contiguous, and gives them.

    A GPU copies while it computes: whoever trains need not wait.
    """
    copied = {name: t.contiguous().to("cpu", non_blocking=True, copy=True) for name, t in tensors.items()}
    done = torch.cuda.Event() if any(t.is_cuda for t in tensors.values()) else None
    if done:
        done.record()

    def wait() -> dict[str, Tensor]:
        if done:
            done.synchronize()
        return copied

    return wait


class Average(AveragedModel):
    """A running average of a network's weights and buffers, whose horizon grows with the steps taken, up to `decay`'s.

    A fixed decay would keep the random first weights in a short run's average. The number of updates bounds it to
    (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage. PyTorch's own way to do that counts on the
    device: a GPU would be waited for in each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        pairs = list(zip(parameters_and_buffers(self.module), parameters_and_buffers(model), strict=True))
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        for count, value in pairs:
            if not count.is_floating_point():
                count.copy_(value)
        self.n_averaged += 1


def parameters_and_buffers(network: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(network.parameters(), network.buffers())


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
