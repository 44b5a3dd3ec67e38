"""The hand-written operations against plain torch: same values, same gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layers import ops
from layers.layers import FeatureEmbedding
from layers.ops import FieldLinear, FieldLookup, GatedSum, grouped_linear, linear_onednn, relu_dropout

FIELD_DIMS = [5, 1, 7]
D, N, H, B = 4, 3, 6, 40


def inputs(dtype: torch.dtype, rows: int = B) -> tuple[Tensor, list[Tensor]]:
    """Ids counted over all fields (B, F), and numbers, table, A, c, W, b."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randint(dim, (rows,), generator=generator) for dim in FIELD_DIMS], dim=1)
    ids += torch.tensor([0, *FIELD_DIMS[:-1]]).cumsum(0)
    shapes = [(rows, N), (sum(FIELD_DIMS), D), (D, N), (D,), (H, (len(FIELD_DIMS) + 1) * D), (H,)]
    tensors = [torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes]
    for tensor in tensors:  # the numbers too: a network before them may have made them
        tensor.requires_grad_()
    return ids, tensors


def plain(ids: Tensor, numbers: Tensor, table: Tensor, a: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What FieldLinear stands for."""
    return F.linear(torch.cat([table[ids].flatten(1), F.linear(numbers, a, c)], dim=1), weight, bias)


def gradients(y: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss that weighs every output differently."""
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), of)


def test_field_linear_equals_linear_on_concatenation() -> None:
    ids, tensors = inputs(torch.float32)
    y = FieldLinear.apply(FieldLookup(ids, sum(FIELD_DIMS)), FIELD_DIMS, *tensors)
    expected = plain(ids, *tensors)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_field_linear_passes_gradcheck_in_double_precision() -> None:
    ids, tensors = inputs(torch.float64, rows=8)
    gather = FieldLookup(ids, sum(FIELD_DIMS))
    assert torch.autograd.gradcheck(lambda *p: FieldLinear.apply(gather, FIELD_DIMS, *p), tensors)


@pytest.mark.parametrize("rows", [3, 50])
def test_lazy_linear_is_equal_on_both_paths(rows: int) -> None:
    """With few rows the plain product is taken, with many the kernel; nobody can tell."""
    source = FeatureEmbedding(FIELD_DIMS, N, D)
    ids = torch.stack([torch.arange(rows) % dim for dim in FIELD_DIMS], dim=1)
    fields = source(ids, torch.randn(rows, N))
    weight, bias = torch.randn(H, source.output_dim, requires_grad=True), torch.randn(H)
    assert (ids.numel() >= sum(FIELD_DIMS)) == (rows == 50)
    y, expected = fields.linear(weight, bias), F.linear(fields.materialize(), weight, bias)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    parameters = [weight, *source.parameters()]
    for got, wanted in zip(gradients(y, parameters), gradients(expected, parameters), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def assert_same(y: Tensor, expected: Tensor, of: Sequence[Tensor]) -> None:
    """Same values and gradients, relative to the largest: float32, summed in another order."""
    pairs = zip([y, *gradients(y, of)], [expected, *gradients(expected, of)], strict=True)
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, atol=1e-5 * float(wanted.detach().abs().max()), rtol=1e-5)


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of computing a product, whatever the processor would choose."""
    monkeypatch.setattr(ops, "AVX512", request.param)
    return bool(request.param)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_large_product_is_a_linear_layer(onednn: bool, contiguous: bool) -> None:
    x = torch.randn(300, 260) if contiguous else torch.randn(260, 300).T
    weight, bias = torch.randn(130, 260), torch.randn(130)
    leaves = [one.requires_grad_() for one in (x, weight, bias)]
    assert ops._onednn_is_faster(x, 130, 260) is onednn
    y = linear_onednn(x, weight, bias)
    assert_same(y, F.linear(x, weight, bias), leaves)
    assert y.is_contiguous()


@pytest.mark.parametrize(("rows", "inputs"), [(300, 260), (5, 7)], ids=["large", "small"])
def test_grouped_linear_equals_linear_per_expert(onednn: bool, rows: int, inputs: int) -> None:
    h, weight, bias = torch.randn(rows, 3 * inputs), torch.randn(3, 130, inputs), torch.randn(3, 130)
    leaves = [one.requires_grad_() for one in (h, weight, bias)]
    assert ops._onednn_is_faster(h, 130, inputs) is (onednn and rows == 300)
    plain = [F.linear(part, w, b) for part, w, b in zip(h.split(inputs, dim=1), weight, bias, strict=True)]
    assert_same(grouped_linear(h, weight, bias), torch.cat(plain, dim=1), leaves)


def test_the_mixtures_gradient_passes_gradcheck() -> None:
    gates, bank = torch.rand(5, 2, 3, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(GatedSum.apply, (gates.requires_grad_(), bank.requires_grad_()))


def test_relu_dropout_is_independent_of_chunk_size() -> None:
    """Every row is written, the last, smaller block included."""
    x = torch.randn(ops.CHUNK_SIZE // 512 * 2 + 3, 512, requires_grad=True)
    p = 1e-9  # rounds to none dropped
    assert torch.equal(relu_dropout(x, p, True), F.relu(x))


def test_gather_backward_is_the_transpose_of_forward() -> None:
    """<forward(t), g> = <t, backward(g)>; rows that nobody takes, at the start, inside and at the end, get zero."""
    rows = 12
    ids = torch.tensor([[1, 5], [2, 5], [1, 9], [4, 7], [4, 4]])
    gather = FieldLookup(ids, rows)
    table, grad = torch.randn(rows, 3, dtype=torch.float64), torch.randn(len(ids), 3, dtype=torch.float64)
    back = gather.backward(grad)
    torch.testing.assert_close((gather.forward(table) * grad).sum(), (table * back).sum())
    untaken = [row for row in range(rows) if row not in ids]
    assert untaken[0] == 0
    assert untaken[-1] == rows - 1
    assert not back[untaken].any()
    torch.testing.assert_close(back[4], grad[3] + 2 * grad[4])
    torch.testing.assert_close(gather.forward(table)[4], 2 * table[4])


@pytest.mark.parametrize(("p", "training"), [(0.3, False), (0.0, True)])
def test_relu_dropout_without_dropout_is_relu(p: float, training: bool) -> None:
    x = torch.randn(50, 20)
    assert torch.equal(relu_dropout(x, p, training), F.relu(x))


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_relu_dropout_keeps_and_scales_as_dropout_does(p: float) -> None:
    x = torch.randn(400, 500).abs() + 0.1
    x.requires_grad_()
    y = relu_dropout(x, p, True)
    kept = y != 0
    n = x.numel()
    assert abs(float(kept.double().mean()) - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    scale = 65536 / (65536 - round(p * 65536))  # p as it is rounded
    assert scale == pytest.approx(1 / (1 - p), rel=1e-3)
    torch.testing.assert_close(y[kept], x[kept] * scale)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, kept)
    torch.testing.assert_close(grad[kept], torch.full_like(grad[kept], scale))
    error = float((x.detach() ** 2).mean() * p / (1 - p) / n) ** 0.5  # standard error of the mean of y
    assert abs(float((y - x).detach().mean())) < 4 * error


def test_relu_dropout_is_zero_without_gradient_below_zero() -> None:
    x = torch.randn(100, 100, requires_grad=True)
    y = relu_dropout(x, 0.2, True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not y[x <= 0].any()
    assert torch.equal(grad == 0, y == 0)


def test_relu_dropout_draws_its_mask_from_torchs_seed() -> None:
    x = torch.ones(64, 64)
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append([relu_dropout(x, 0.5, True), relu_dropout(x, 0.5, True)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][0], masks[2][0])
