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
        return outputs.view(n, 2, 2, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        n, outputs = grad_output.shape[:2]
        grad_images = grad_weight = None
        grad_rows = grad_output.permute(0, 2, 3, 1).reshape(n, 4 * outputs)
        if ctx.needs_input_grad[0]:
            grad_images = (grad_rows @ matrix).view(n, 2, 2, matrix.shape[1] // 4).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            grad_matrix = (grad_rows.T @ rows).view(4, outputs, 2, 2, -1)
            filters = grad_rows.new_zeros(outputs, 3, 3, grad_matrix.shape[-1], dtype=sum_dtype(grad_output))
            for (row, column), part in zip(PIXELS, grad_matrix, strict=True):
                filters[:, 1 - row : 3 - row, 1 - column : 3 - column] += part
            grad_weight = filters.permute(0, 3, 1, 2)
        return grad_images, grad_weight, grad_bias(ctx, grad_output)


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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        outputs, inputs = weight.shape[:2]
        grad_images = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_images = conv2d_input(images.shape, weight, grad_output, padding=1)
        if ctx.needs_input_grad[1]:
            pixels, grads = images.permute(2, 3, 0, 1), grad_output.permute(2, 3, 0, 1)
            filters = grad_output.new_empty(outputs, 3, 3, inputs, dtype=sum_dtype(grad_output))
            for column, (columns_in, columns_out) in enumerate(shifts(images.shape[3])):
                some_pixels, some_grads = pixels[:, columns_in].contiguous(), grads[:, columns_out].contiguous()
                for row, (rows_in, rows_out) in enumerate(shifts(images.shape[2])):
                    x, grad = some_pixels[rows_in].view(-1, inputs), some_grads[rows_out].view(-1, outputs)
                    filters[:, row, column] = grad.T @ x
            grad_weight = filters.permute(0, 3, 1, 2)
        return grad_images, grad_weight, grad_bias(ctx, grad_output)


def shifts(size: int) -> list[tuple[slice, slice]]:
    """Return, for each row of a filter, the rows of an image (of `size` rows) that it reads, and for which outputs."""
    every = slice(0, size)
    return [(slice(0, size - 1), slice(1, size)), (every, every), (slice(1, size), slice(0, size - 1))]


def grad_bias(ctx: Any, grad_output: Tensor) -> Tensor | None:
    return grad_output.sum((0, 2, 3), dtype=sum_dtype(grad_output)) if ctx.needs_input_grad[2] else None


def sum_dtype(grad_output: Tensor) -> torch.dtype:
    """Return the type of sums, which is the weights': float32 for bfloat16."""
    return torch.promote_types(grad_output.dtype, torch.float32)
