"""The common way to train on CIFAR-100, as a baseline: PIL, DataLoader, float32, default memory management.

It runs in a separate process beside each worker, because a worker's malloc settings hold for its whole process.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from threading import Thread

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from raycifar.engine.hardware import set_up, synchronize
from raycifar.models import Architecture


@dataclass(frozen=True)
class Setting:
    """What the process trains on."""

    architecture: Architecture
    dropout: float
    images: np.ndarray  # (N, 32, 32, 3) uint8
    labels: list[int]
    batch_size: int  # of this worker
    device: torch.device
    threads: int
    rank: int
    world_size: int
    address: str | None  # of the rendezvous, if there are several workers


class PilImages(Dataset):
    """Images that pass through torchvision's transforms one by one."""

    def __init__(self, setting: Setting) -> None:
        pixels, image_size = setting.architecture.preprocessing, setting.images.shape[1]
        self.images, self.labels = setting.images, setting.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(image_size, padding=4),
                transforms.RandomHorizontalFlip(),
                *([transforms.Resize(pixels.size)] if pixels.size != image_size else []),
                transforms.ToTensor(),
                transforms.Normalize(pixels.mean, pixels.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def build(setting: Setting) -> Callable[[], None]:
    """Return a function that trains for an epoch."""
    device, on_gpu = setting.device, setting.device.type == "cuda"
    set_up(device, setting.threads)
    if on_gpu:
        torch.cuda.set_device(device)
    loader = DataLoader(
        PilImages(setting),
        batch_size=setting.batch_size,
        shuffle=True,
        num_workers=min(4, setting.threads),
        persistent_workers=True,
        pin_memory=on_gpu,
    )
    model = setting.architecture.build(setting.dropout).to(device)
    if setting.world_size > 1:
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, setting.address, rank=setting.rank, world_size=setting.world_size)
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)

    def epoch() -> None:
        model.train()
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        synchronize(device)

    return epoch


epoch: Callable[[], None]  # of this process


def start(setting: Setting) -> None:
    """Set up training in a process that ends with its parent."""
    global epoch
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_after, args=(parent_process(),), daemon=True).start()
    epoch = build(setting)


def end_after(process: BaseProcess) -> None:
    process.join()
    os._exit(0)


def train_epoch() -> None:
    epoch()
