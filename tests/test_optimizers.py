"""The optimizers, beside PyTorch's own."""

import copy

import torch

from raycifar.engine.optimizers import build_optimizer
from raycifar.models import Architecture
from raycifar.models.recipe import Recipe


def test_sgd_steps_as_pytorch_s_does():
    torch.manual_seed(0)
    architecture = Architecture("cnn")
    ours = architecture.build().to(memory_format=torch.channels_last)
    ours.head.requires_grad_(False)  # what is frozen takes no steps
    optimizer = build_optimizer(ours, architecture.layers(ours), Recipe())
    theirs = copy.deepcopy(ours)
    twin = dict(zip(ours.parameters(), theirs.parameters(), strict=True))
    groups = [{**group, "params": [twin[p] for p in group["params"]]} for group in optimizer.param_groups]
    expected = torch.optim.SGD(groups, fused=True)
    before = copy.deepcopy(ours)
    for _ in range(3):
        for p, q in twin.items():
            if p.requires_grad:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        optimizer.step()
        expected.step()
    for p, q, old in zip(ours.parameters(), theirs.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, old) != p.requires_grad
