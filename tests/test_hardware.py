"""What a worker computes in."""

import pytest
import torch

from raycifar.engine.hardware import SUM_DTYPE, choose_precision, find_device
from raycifar.errors import RequestError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, torch.float32),  # has it, and is slower in it
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Neoverse", "bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_that_is_faster(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_precision("auto", CPU) == dtype
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("float32", CPU) == torch.float32


@pytest.mark.parametrize(
    ("cuda", "mps", "found"), [(False, False, "cpu"), (False, True, "mps"), (True, False, "cuda"), (True, True, "cuda")]
)
def test_auto_is_whatever_gpu_there_is_and_a_gpu_that_is_not_there_is_refused(monkeypatch, cuda, mps, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto").type == found
    assert find_device("cpu") == CPU
    assert found in SUM_DTYPE
    for wanted, there in (("gpu", cuda), ("mps", mps)):
        if not there:
            with pytest.raises(RequestError, match=f"--device {wanted}: this machine has no GPU"):
                find_device(wanted)
