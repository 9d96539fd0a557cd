"""A worker's hardware: threads, memory, random numbers and precision."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

import torch
import torch.distributed as dist
from torch import nn

from raycifar.engine.convolution import use_products
from raycifar.engine.torch_internals import seed_cpu
from raycifar.errors import RequestError
from raycifar.models.recipe import Precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
DEVICES = {"gpu": "GPU", "mps": "GPU of Apple's"}
SUM_DTYPE = {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}
GENERATOR_LOCK = Lock()  # held from seeding to the last number drawn: all threads share PyTorch's generators


def find_device(wanted: str) -> torch.device:
    """Return the device of this process: auto is a GPU, Nvidia's or Apple's, if there is one, else the CPU.

    Raises:
        RequestError: there is no such device.
    """
    if wanted in ("auto", "gpu") and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if wanted not in ("auto", "cpu"):
        raise RequestError(f"--device {wanted}: this machine has no {DEVICES[wanted]} that PyTorch can use.")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_up(device: torch.device, threads: int) -> None:
    """Set the number of CPU threads, and have a GPU benchmark its algorithms."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def limit_gpu_memory(gpus: float) -> None:
    """Take no more than this share of the current GPU's memory: a process that wants more fails, not its neighbors.

    What CUDA itself takes, some hundred MB for each process, isn't counted.
    """
    if 0 < gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)


def retain_malloc_pages(device: torch.device) -> None:
    """On a CPU, make glibc keep large tensors' memory for the next step; new pages take 13 to 22 % of one (Zen 5)."""
    if device.type != "cpu":
        return
    with suppress(AttributeError, OSError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network on the device, with the memory layout and convolutions that are fastest there."""
    memory_format = torch.contiguous_format if device.type == "mps" else torch.channels_last
    network = network.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    if device.type == "cpu":
        use_products(network)
    return network


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and the device, and keep other threads from drawing until the exit."""
    with GENERATOR_LOCK:
        seed_cpu(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def choose_precision(wanted: Precision, device: torch.device) -> torch.dtype:
    """Return the type of products; `auto` is bfloat16 if it is faster on every worker, else float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    able = torch.tensor(float(has_fast_bfloat16(device)), device=device)
    if dist.is_initialized():
        dist.all_reduce(able, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if able else torch.float32


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the context in which products are computed in bfloat16, or float32; see `choose_precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait until all work on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies faster in bfloat16 than in float32.

    With AVX-512 but no matrix unit, AMD's processors (Zen 4) are twice as fast, while Intel's reach 0.80 to 0.95 of
    float32's rate (`vgg16` and `cnn`).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False  # unproven
    able = torch.cpu.get_capabilities()
    vectors = able.get("avx512_bf16") and str(able.get("cpu_name")).startswith("AMD")
    return bool(vectors or able.get("amx_bf16") or able.get("bf16"))
