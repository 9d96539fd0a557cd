"""What a worker computes on: its threads, its precision, and the workers beside it."""

import ctypes
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn

from raycifar.engine.convolution import use_products
from raycifar.recipes import Precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def set_up(device: torch.device, threads: int) -> None:
    """Use so many CPU threads, and on a GPU the fastest algorithms found by trial."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def keep_memory() -> None:
    """Have glibc keep the memory of large tensors for the next step; new pages take 13 to 22 % of one (AMD Zen 5)."""
    with suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on the device, in the layout and with the convolutions that are fastest there."""
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cpu":
        use_products(network)
    return network


def seed(value: int, device: torch.device) -> None:
    """Seed what a step draws from; torch.manual_seed takes a hundred times as long, for devices that aren't there."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def choose_precision(wanted: Precision, device: torch.device) -> torch.dtype:
    """Return the type to multiply in; `auto` is bfloat16 if every worker's hardware gains by it, else float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    able = torch.tensor(float(gains_by_bfloat16(device)), device=device)
    if dist.is_initialized():
        dist.all_reduce(able, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if able else torch.float32


def gains_by_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies faster in bfloat16 than in float32.

    Where AVX-512 alone has it, and no matrix unit, AMD's processors (Zen 4) double their rate; Intel's are slower
    than in float32 (0.80 to 0.95 of its rate with `vgg16` and `cnn`).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    vectors = able.get("avx512_bf16") and str(able.get("cpu_name")).startswith("AMD")
    return bool(vectors or able.get("amx_bf16") or able.get("bf16"))


def parallelise(model: nn.Module, size: int, device: torch.device, autocast: torch.autocast) -> nn.Module:
    """Return the model as Ray Train prepares it: gradients are averaged over workers where there are several.

    Batch norm's running statistics stay each worker's own; they are averaged when they are read.

    Args:
        size: side of the images, in pixels.
    """
    import ray.train.torch  # asking a trained network has no need of it

    parallel = ray.train.torch.prepare_model(
        model,
        move_to_device=device,
        parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True},
    )
    if parallel is not model:
        settle_buckets(parallel, size, device, autocast)
    return parallel


def settle_buckets(model: nn.Module, size: int, device: torch.device, autocast: torch.autocast) -> None:
    """Take one pass that leaves no trace but the final layout of DDP's gradient buckets.

    DDP regroups its buckets after its first backward pass. With three workers or more the order of the
    additions follows the buckets, so a run that has just been resumed would round otherwise than one that
    was never stopped.
    """
    kept = [buffer.clone() for buffer in model.buffers()]
    model.train()
    for _ in range(2):
        with autocast:
            logits = model(torch.zeros(2, 3, size, size, device=device).contiguous(memory_format=torch.channels_last))
        logits.float().sum().backward()
        model.zero_grad()
    for buffer, value in zip(model.buffers(), kept, strict=True):
        buffer.copy_(value)
