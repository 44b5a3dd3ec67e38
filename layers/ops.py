"""Fast operations, each an `autograd.Function` with a gradient of its own, exact up to rounding; no parameters.

`tests/unit/layers/test_ops.py` compares them with plain torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class FieldLookup:
    """The row of the table (V, H) that each sample looks up in each field; ids (B, F) are counted over all fields.

    Made once a batch and shared by all layers over the same fields.
    """

    def __init__(self, ids: Tensor, rows: int) -> None:
        self.ids, self.rows = ids, rows

    @functools.cached_property
    def inverse_index(self) -> tuple[Tensor, Tensor]:
        """The samples grouped by the row that they look up (B F,), and where each row's group begins (V,)."""
        ordered, order = self.ids.flatten().sort()
        return order // self.ids.shape[1], torch.searchsorted(ordered, torch.arange(self.rows, device=ordered.device))

    def forward(self, table: Tensor) -> Tensor:
        """sum_f table[ids_f]: (V, H) -> (B, H)."""
        return F.embedding_bag(self.ids, table, mode="sum")

    def backward(self, grad: Tensor) -> Tensor:
        """Its transpose, row by row of the table: (B, H) -> (V, H)."""
        return F.embedding_bag(self.inverse_index[0], grad, self.inverse_index[1], mode="sum")


class FieldLinear(torch.autograd.Function):
    """y = sum_f W_f e_f[x_f] + W_n (A n + c) + b, the linear layer over concatenated fields and embedded numbers.

    The product of a field's whole table with its block of W, T_f = E_f W_f^T, costs (rows of the tables) D H once a
    batch instead of B F D H, and leaves a sum of F gathered rows for each sample. The numbers' block is
    (W_n A) n + W_n c. With G = dL/dT = the gathered rows of g = dL/dy: dE_f = G_f W_f, dW_f = G_f^T E_f; with
    S = g^T n: dW_n = S A^T + (sum g) c^T, dA = W_n^T S, dc = W_n^T sum g; and dn = g W_n A, where the numbers are not
    data. Blocks are read and written in place, for splitting and joining W costs as much as the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, gather: FieldLookup, field_dims: Sequence[int], numbers: Tensor, table: Tensor, a: Tensor,
                c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.gather, ctx.field_dims = gather, field_dims
        ctx.save_for_backward(numbers, table, a, c, weight)
        products = table.new_empty(len(table), len(weight))  # (V, H)
        for rows, block in _blocks(field_dims, table.shape[1]):
            torch.mm(table[rows], weight[:, block].T, out=products[rows])
        w_numerical = weight[:, -table.shape[1]:]  # (H, D)
        return gather.forward(products).addmm_(numbers, (w_numerical @ a).T).add_(bias + w_numerical @ c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        numbers, table, a, c, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_products, d_table, d_weight = ctx.gather.backward(grad), torch.empty_like(table), torch.empty_like(weight)
        for rows, block in _blocks(ctx.field_dims, table.shape[1]):
            torch.mm(d_products[rows], weight[:, block], out=d_table[rows])
            torch.mm(d_products[rows].T, table[rows], out=d_weight[:, block])
        total, s = grad.sum(dim=0), (numbers.T @ grad).T  # (H,), (H, N); grad.T @ numbers takes ten times as long
        w_numerical = weight[:, -table.shape[1]:]
        torch.addmm(torch.outer(total, c), s, a.T, out=d_weight[:, -table.shape[1]:])
        d_numbers = grad @ (w_numerical @ a) if ctx.needs_input_grad[2] else None
        return None, None, d_numbers, d_table, w_numerical.T @ s, w_numerical.T @ total, d_weight, total


def _blocks(field_dims: Sequence[int], width: int) -> list[tuple[slice, slice]]:
    """Of each field: its rows in the table, its columns in W."""
    ends = np.cumsum(field_dims).tolist()
    return [(slice(end - rows, end), slice(f * width, (f + 1) * width))
            for f, (rows, end) in enumerate(zip(field_dims, ends, strict=True))]


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y = x W^T + b, (B, K) and (H, K) -> (B, H).

    Large products go to oneDNN, as convolutions over one pixel, wherever the processor has AVX-512: MKL, torch's choice
    for `F.linear`, keeps AMD's at AVX2, half their speed. Same arithmetic in float32, summed in another order.
    """
    if not _onednn_is_faster(x, *weight.shape):
        return F.linear(x, weight, bias)
    return _from_image(F.conv2d(_as_image(x), weight.unsqueeze(2).unsqueeze(3), bias))


class GroupedLinear(torch.autograd.Function):
    """y_e = h_e W_e^T + b_e for E experts side by side: (B, E K), (E, H, K), (E, H) -> (B, E H).

    One grouped convolution, as `product`; so is dh = dy W. dW_e = dy_e^T h_e is taken expert by expert, for which
    oneDNN is seven times as fast as for all groups at once.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        kernel = weight.flatten(0, 1)[:, :, None, None]
        return _from_image(F.conv2d(_as_image(h), kernel, bias.flatten(), groups=len(weight)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, weight = ctx.saved_tensors
        grad, (experts, _, width) = grads[0].contiguous(), weight.shape
        d_h = _from_image(_convolution_backward(grad, h, weight.flatten(0, 1), experts, (True, False, False))[0])
        d_weight = torch.empty_like(weight)
        for e, (grad_y, h_e) in enumerate(zip(grad.chunk(experts, 1), h.split(width, 1), strict=True)):
            d_weight[e] = _convolution_backward(grad_y, h_e, weight[e], 1, (False, True, False))[1].squeeze((2, 3))
        return d_h, d_weight, grad.sum(dim=0).view(experts, -1)


def grouped_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_e = h_e W_e^T + b_e: (B, E K), (E, H, K), (E, H) -> (B, E H), by oneDNN or as one batched product."""
    experts, out_width, in_width = weight.shape
    if _onednn_is_faster(h, out_width, in_width):
        return GroupedLinear.apply(h, weight, bias)
    by_expert = h.unflatten(1, (experts, -1)).transpose(0, 1)  # (E, B, K)
    return torch.baddbmm(bias.unsqueeze(1), by_expert, weight.transpose(1, 2)).transpose(0, 1).flatten(1)


def _onednn_is_faster(x: Tensor, out_width: int, in_width: int) -> bool:
    return (AVX512 and not torch.compiler.is_exporting() and x.device.type == "cpu" and x.dtype == torch.float32
            and len(x) >= 256 and in_width >= 256 and out_width >= 128
            and torch.get_float32_matmul_precision() != "medium")


AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _as_image(x: Tensor) -> Tensor:
    """(B, K) -> (1, K, 1, B), B pixels of K channels; the numbers stay where they are (channels last)."""
    return x.contiguous()[None, None].permute(0, 3, 1, 2)


def _from_image(y: Tensor) -> Tensor:
    return y.squeeze((0, 2)).T


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, groups: int,
                          wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The wanted gradients, to input, kernel and bias, of y = x W^T + b as a convolution."""
    return torch.ops.aten.convolution_backward(
        _as_image(grad), _as_image(x), weight[:, :, None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups,
        list(wanted))


class GatedSum(torch.autograd.Function):
    """y_g = sum_e a_ge h_e for G gates over one expert_outputs of experts: (B, G, E), (B, E, H) -> (B, G, H).

    dh_e = sum_g a_ge dy_g in one pass over the expert_outputs, however many gates read it; da = dy h^T.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, expert_outputs: Tensor) -> Tensor:
        ctx.save_for_backward(gates, expert_outputs)
        return torch.bmm(gates, expert_outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gates, expert_outputs = ctx.saved_tensors
        grad = grads[0].contiguous()  # torch copies what is not, sample by sample
        return torch.bmm(grad, expert_outputs.transpose(1, 2)), torch.bmm(gates.transpose(1, 2), grad)


class ReluDropout(torch.autograd.Function):
    """ReLU, then dropout with probability p: what passes is scaled by 1 / (1 - p). The mask need not be kept: what
    passed is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        output = torch.empty_like(x)
        ctx.scale = dropout_scale(p)
        for block, mask, result in masked_blocks(x, p, output):
            torch.clamp(block, min=0, out=result).mul_(mask)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grads[0], output, 0).mul_(ctx.scale), None


class Dropout(torch.autograd.Function):
    """Dropout with probability p of numbers that are not 0: what is 0 in the output was dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        output = torch.empty_like(x)
        ctx.scale = dropout_scale(p)
        for block, mask, result in masked_blocks(x, p, output):
            torch.mul(block, mask, out=result)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (output,) = ctx.saved_tensors
        return grads[0].mul(ctx.scale).masked_fill_(output == 0, 0.0), None


def masked_blocks(x: Tensor, p: float, output: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of rows of x, their dropout masks, 0 or 1 / (1 - p), and the same blocks of the output.

    On a CPU torch draws its masks one number after the other, a quarter of a training step. Here one torch number
    seeds PCG64, which fills 16 bits a number; p is rounded to a multiple of 2^-16. Work goes in blocks that stay in the
    processor's cache.
    """
    dropped, scale = round(p * 65536), dropout_scale(p)
    generator = np.random.PCG64DXSM(int(torch.randint(2**62, ())))
    random_bits = generator.random_raw(-(-x.numel() // 4)).view(np.int16)[: x.numel()]
    rows = max(1, CHUNK_SIZE // x[0].numel())
    for block, bits, result in zip(x.split(rows), torch.from_numpy(random_bits).view(x.shape).split(rows),
                                   output.split(rows), strict=True):
        # A mask of numbers, by way of bytes: multiplying by booleans would convert them one at a time.
        yield block, (bits >= dropped - 32768).view(torch.uint8).to(x.dtype).mul_(scale), result


def dropout_scale(p: float) -> float:
    """1 / (1 - p), p rounded as `masked_blocks` does."""
    return 65536 / (65536 - round(p * 65536))


CHUNK_SIZE = 2**18  # numbers


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """dropout(relu(x)), as `F.dropout(F.relu(x), p, training)`."""
    if not training or p == 0.0:
        return F.relu(x)
    if x.device.type != "cpu":
        return F.dropout(F.relu(x), p)
    return ReluDropout.apply(x, p)


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout(x, p)`."""
    return Dropout.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)
