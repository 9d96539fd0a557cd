"""The common way to train on CIFAR-100, as a baseline: PIL, DataLoader, float32, default memory management.

It runs in a separate process beside each worker, because a worker's malloc settings hold for its whole process.
"""

import os
import signal
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


class Training:
    """The process's network, optimizer and data loader."""

    def __init__(self, setting: Setting) -> None:
        self.device = setting.device
        set_up(self.device, setting.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.loader = DataLoader(
            PilImages(setting),
            batch_size=setting.batch_size,
            shuffle=True,
            num_workers=min(4, setting.threads),
            persistent_workers=True,
            pin_memory=self.device.type == "cuda",
        )
        self.model = setting.architecture.build(setting.dropout).to(self.device)
        if setting.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, setting.address, rank=setting.rank, world_size=setting.world_size)
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)

    def epoch(self) -> None:
        self.model.train()
        for inputs, targets in self.loader:
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(inputs), targets).backward()
            self.optimizer.step()
        synchronize(self.device)


training: Training


def start(setting: Setting) -> None:
    """Set up training in a process that ends with its parent."""
    global training
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=end_after, args=(parent_process(),), daemon=True).start()
    training = Training(setting)


def end_after(process: BaseProcess) -> None:
    process.join()
    os._exit(0)


def train_epoch() -> None:
    training.epoch()
