"""Faster convolutions of small images on a CPU.

oneDNN's loops are optimized for long rows of pixels. At 2×2 and 4×4 pixels with 512 channels, matrix products take a
third of the time, and half of it for the weights' gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

PLAIN = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "padding_mode": "zeros",
    "dilation": (1, 1),
    "groups": 1,
}
SMALL = 4  # pixels per side
PIXELS = ((0, 0), (0, 1), (1, 0), (1, 1))  # rows and columns of an image of 2×2


def use_products(model: nn.Module) -> None:
    """Make the model's 3×3 convolutions use matrix products on small images; its weights don't change."""
    for module in model.modules():
        if type(module) is nn.Conv2d and all(getattr(module, name) == value for name, value in PLAIN.items()):
            module.__class__ = Convolution


class Convolution(nn.Conv2d):
    """A 3×3 convolution padded by one pixel."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own word)
        if input.shape[-2:] == (2, 2):
            return Dense.apply(input, self.weight, self.bias)
        if max(input.shape[-2:]) <= SMALL and input.dtype == torch.bfloat16:
            return Shifts.apply(input, self.weight, self.bias)
        return super().forward(input)


class Dense(torch.autograd.Function):
    """A convolution of 2×2 pixels as a dense layer: each output pixel depends on every input pixel.

    A convolution multiplies padding in 20 of its 36 products.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, outputs, 2, 2) of images (N, inputs, 2, 2), weight (outputs, inputs, 3, 3), bias (outputs,)."""
        n, inputs = images.shape[:2]
        filters = weight.permute(0, 2, 3, 1)
        parts = [filters[:, 1 - row : 3 - row, 1 - column : 3 - column] for row, column in PIXELS]
        matrix = torch.stack(parts).view(4 * len(weight), 4 * inputs)  # (output pixels, input pixels)
        rows = images.permute(0, 2, 3, 1).reshape(n, 4 * inputs)
        ctx.save_for_backward(rows, matrix)
        outputs = F.linear(rows, matrix, bias if bias is None else bias.repeat(4))
        return outputs.view(n, 2, 2, -1).permute(0, 3, 1, 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        n, outputs = gradient.shape[:2]
        of_images = of_weight = None
        by_rows = gradient.permute(0, 2, 3, 1).reshape(n, 4 * outputs)
        if ctx.needs_input_grad[0]:
            of_images = (by_rows @ matrix).view(n, 2, 2, -1).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            of_matrix = (by_rows.T @ rows).view(4, outputs, 2, 2, -1)
            filters = by_rows.new_zeros(outputs, 3, 3, of_matrix.shape[-1], dtype=precise(gradient))
            for (row, column), part in zip(PIXELS, of_matrix, strict=True):
                filters[:, 1 - row : 3 - row, 1 - column : 3 - column] += part
            of_weight = filters.permute(0, 3, 1, 2)
        return of_images, of_weight, of_bias(ctx, gradient)


class Shifts(torch.autograd.Function):
    """A convolution whose weights' gradient is nine matrix products, one for each pixel of a filter.

    Each multiplies the outputs' gradients by the images shifted by that pixel, where both are inside.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, outputs, H, W) of images (N, inputs, H, W), weight (outputs, inputs, 3, 3), bias (outputs,)."""
        ctx.save_for_backward(images, weight)
        return F.conv2d(images, weight, bias, padding=1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        outputs, inputs = weight.shape[:2]
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = conv2d_input(images.shape, weight, gradient, padding=1)
        if ctx.needs_input_grad[1]:
            pixels, slopes = images.permute(2, 3, 0, 1), gradient.permute(2, 3, 0, 1)
            filters = gradient.new_empty(outputs, 3, 3, inputs, dtype=precise(gradient))
            for column, (seen, seeing) in enumerate(shifts(images.shape[3])):
                some, of_some = pixels[:, seen].contiguous(), slopes[:, seeing].contiguous()
                for row, (seen, seeing) in enumerate(shifts(images.shape[2])):
                    filters[:, row, column] = of_some[seeing].view(-1, outputs).T @ some[seen].view(-1, inputs)
            of_weight = filters.permute(0, 3, 1, 2)
        return of_images, of_weight, of_bias(ctx, gradient)


def shifts(size: int) -> list[tuple[slice, slice]]:
    """Return, for each row of a filter, the rows of an image (of `size` rows) that it reads, and for which outputs."""
    every = slice(0, size)
    return [(slice(0, size - 1), slice(1, size)), (every, every), (slice(1, size), slice(0, size - 1))]


def of_bias(ctx: Any, gradient: Tensor) -> Tensor | None:
    return gradient.sum((0, 2, 3), dtype=precise(gradient)) if ctx.needs_input_grad[2] else None


def precise(gradient: Tensor) -> torch.dtype:
    """Return the type of sums, which is the weights': float32 for bfloat16."""
    return torch.promote_types(gradient.dtype, torch.float32)
