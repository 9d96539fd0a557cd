"""What is used of PyTorch's inside is still there, and does what it is used for."""

import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from raycifar.engine.optimizers import OPTIMIZERS, build_optimizer
from raycifar.engine.torch_internals import (
    EagerAdamW,
    EagerOptimizer,
    compiled,
    fused_sgd_,
    seed_cpu,
    start_tracer,
    waits_for_gpu,
)
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe

NO_COMPILER = """
import sys, torch
from raycifar.engine.optimizers import build_optimizer
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe
for name in {names}:
    architecture = Architecture("cnn")
    model = architecture.build()
    optimizer = build_optimizer(model, architecture.layers(model), Recipe(optimizer=name))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules, "PyTorch's compiler is imported by an optimizer"
"""


def test_optimizers_do_not_import_the_compiler():
    code = NO_COMPILER.format(names=list(OPTIMIZERS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_eager(name):
    architecture = Architecture("cnn")
    model = architecture.build()
    assert isinstance(build_optimizer(model, architecture.layers(model), Recipe(optimizer=name)), EagerOptimizer)


def test_adamw_without_wrappers_is_adamw():
    ours, theirs = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    for parameter, optimizer in ((ours, EagerAdamW([ours], lr=0.1)), (theirs, torch.optim.AdamW([theirs], lr=0.1))):
        parameter.grad = torch.ones(4)
        optimizer.step()
    assert torch.equal(ours, theirs)


def test_the_fused_step_takes_views():
    weight = torch.ones(2, 3, 4).permute(0, 2, 1)
    momentum = torch.zeros(2, 3, 4).permute(0, 2, 1)
    options = {"weight_decay": 0.0, "momentum": 0.9, "lr": 0.5, "dampening": 0.0, "nesterov": False, "maximize": False}
    fused_sgd_([weight], [torch.ones(2, 3, 4).permute(0, 2, 1)], [momentum], **options)
    assert torch.equal(weight, torch.full((2, 4, 3), 0.5))


def test_a_function_is_compiled_for_each_of_many_shapes(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for _ in range(2):
        double = compiled(lambda x: x * 2)
        for size in range(2, 14):
            assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert len(graphs) >= 12


def test_the_cpu_is_seeded_as_by_manual_seed():
    torch.manual_seed(7)
    expected = torch.rand(3)
    seed_cpu(7)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")
def test_a_function_that_waits_for_the_gpu_is_known():
    x = torch.ones(3, device="cuda")
    assert waits_for_gpu(lambda: x + 1)[1] is False
    output, waits = waits_for_gpu(lambda: x + x.sum().item())
    assert waits
    assert output.tolist() == [4.0] * 3


def test_a_gpu_s_memory_is_recorded_as_pytorch_itself_documents_it():
    wanted = inspect.signature(torch.cuda.memory._record_memory_history).parameters
    assert {"enabled", "stacks", "max_entries"} <= wanted.keys()
    assert callable(torch.cuda.memory._snapshot)


def test_the_tracer_starts_without_a_word(capfd):
    start_tracer([ProfilerActivity.CPU])
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        torch.zeros(2) + 1
    assert "aten::add" in [event.key for event in traced.key_averages()]
    assert all(hasattr(event, "is_user_annotation") for event in traced.key_averages())
    assert capfd.readouterr() == ("", "")
