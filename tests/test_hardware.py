"""What a worker computes in."""

import pytest
import torch

from raycifar.engine.hardware import choose_precision

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
