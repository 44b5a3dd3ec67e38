"""The operations that training spends its time in, each with a gradient of its own, exact up to rounding.

`tests/test_kernels.py` holds them against plain torch. Nothing here has parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Gather:
    """Which row of the table (V, H) each sample takes from each field; ids (B, F) are counted over all fields.

    Made once a batch and shared by all layers that read the same fields.
    """

    def __init__(self, ids: Tensor, rows: int) -> None:
        self.ids, self.rows = ids, rows

    @functools.cached_property
    def takers(self) -> tuple[Tensor, Tensor]:
        """The samples grouped by the row that they take (B F,), and where each row's group begins (V,)."""
        ordered, order = self.ids.flatten().sort()
        return order // self.ids.shape[1], torch.searchsorted(ordered, torch.arange(self.rows, device=ordered.device))

    def forward(self, table: Tensor) -> Tensor:
        """sum_f table[ids_f]: (V, H) -> (B, H)."""
        return F.embedding_bag(self.ids, table, mode="sum")

    def backward(self, grad: Tensor) -> Tensor:
        """Its transpose, row by row of the table: (B, H) -> (V, H)."""
        return F.embedding_bag(self.takers[0], grad, self.takers[1], mode="sum")


class FieldLinear(torch.autograd.Function):
    """y = sum_f W_f e_f[x_f] + W_n (A n + c) + b, the linear layer over concatenated fields and embedded numbers.

    The product of a field's whole table with its block of W, T_f = E_f W_f^T, costs (rows of the tables) D H once a
    batch instead of B F D H, and leaves a sum of F gathered rows for each sample. The numbers' block is
    (W_n A) n + W_n c. With G = dL/dT = the gathered rows of g = dL/dy: dE_f = G_f W_f, dW_f = G_f^T E_f; with
    S = g^T n: dW_n = S A^T + (sum g) c^T, dA = W_n^T S, dc = W_n^T sum g. Blocks are read and written in place, for
    splitting and joining W costs as much as the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, gather: Gather, field_dims: Sequence[int], numbers: Tensor, table: Tensor, a: Tensor,
                c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.gather, ctx.field_dims = gather, field_dims
        ctx.save_for_backward(numbers, table, a, c, weight)
        products = table.new_empty(len(table), len(weight))  # (V, H)
        for rows, block in _blocks(field_dims, table.shape[1]):
            torch.mm(table[rows], weight[:, block].T, out=products[rows])
        of_numbers = weight[:, -table.shape[1]:]  # (H, D)
        return gather.forward(products).addmm_(numbers, (of_numbers @ a).T).add_(bias + of_numbers @ c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.needs_input_grad[2]:
            raise NotImplementedError("FieldLinear gives no gradient to the numbers: use Fields.concat()")
        numbers, table, a, c, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_products, d_table, d_weight = ctx.gather.backward(grad), torch.empty_like(table), torch.empty_like(weight)
        for rows, block in _blocks(ctx.field_dims, table.shape[1]):
            torch.mm(d_products[rows], weight[:, block], out=d_table[rows])
            torch.mm(d_products[rows].T, table[rows], out=d_weight[:, block])
        total, s = grad.sum(dim=0), grad.T @ numbers  # (H,), (H, N)
        of_numbers = weight[:, -table.shape[1]:]
        torch.addmm(torch.outer(total, c), s, a.T, out=d_weight[:, -table.shape[1]:])
        return None, None, None, d_table, of_numbers.T @ s, of_numbers.T @ total, d_weight, total


def _blocks(field_dims: Sequence[int], width: int) -> list[tuple[slice, slice]]:
    """Of each field: its rows in the table, its columns in W."""
    ends = np.cumsum(field_dims).tolist()
    return [(slice(end - rows, end), slice(f * width, (f + 1) * width))
            for f, (rows, end) in enumerate(zip(field_dims, ends, strict=True))]


class Mixture(torch.autograd.Function):
    """y = sum_e g_e h_e, gates (B, E) and experts (B, E, H) -> (B, H); dh_e = g_e dy as one outer product.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(gate, experts)
        return torch.bmm(gate.unsqueeze(1), experts).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, experts = ctx.saved_tensors
        grad = grads[0]
        return torch.bmm(experts, grad.unsqueeze(2)).squeeze(2), torch.einsum("be,bh->beh", gate, grad)


class ReluDropout(torch.autograd.Function):
    """ReLU, then dropout with probability p: what passes is scaled by 1 / (1 - p).

    On a CPU torch draws its masks one number after the other, a quarter of a training step. Here one torch number
    seeds SFC64, which fills 16 bits a number; p is rounded to a multiple of 2^-16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * 65536)
        words = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 4))
        bits = torch.from_numpy(words.view(np.int16)[: x.numel()].reshape(x.shape))
        # A mask of numbers, by way of bytes: multiplying by booleans would convert them one at a time.
        mask = (bits >= dropped - 32768).view(torch.uint8).to(x.dtype).mul_(65536 / (65536 - dropped))
        output = F.relu(x).mul_(mask)
        ctx.save_for_backward(output, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        output, mask = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grads[0] * mask, output, 0), None


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """dropout(relu(x)), as `F.dropout(F.relu(x), p, training)`."""
    if not training or p == 0.0:
        return F.relu(x)
    if x.device.type != "cpu":
        return F.dropout(F.relu(x), p)
    return ReluDropout.apply(x, p)
