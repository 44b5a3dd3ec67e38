"""MetaHeac against its equations, and its meta-training against a second derivative taken by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import user_error_message
from torch import Tensor, nn

from common import distributed
from dataset.loader import TensorLoader
from dataset.rtrl import load_splits
from dataset.vocabulary import encode_splits
from slmodels import MetaHeac
from slmodels.metaheac import INNER_LR
from train.polish import RlLossPolisher
from train.run import get_model, sltrain

SIZES = ([4, 9, 3], 5, 6, (12, 10), (8, 6), 2, 4, 0.0)


def batch(rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randint(dim, (rows,)) for dim in SIZES[0]], dim=1)  # type: ignore[attr-defined]
    return ids, torch.randn(rows, 5), torch.randint(2, (rows, 2)).float()


def test_the_prediction_step_by_step() -> None:
    model, (ids, numbers, _) = MetaHeac(*SIZES), batch()
    x = model.input(ids, numbers).materialize()
    mean = x.reshape(12, 4, 6).mean(dim=1)
    for task in range(2):
        asked = torch.cat([model.tasks.weight[task].repeat(12, 1), mean], dim=1)
        gate = F.softmax(model.expert_gate(asked), dim=1)
        h = sum(gate[:, e, None] * expert(x) for e, expert in enumerate(model.experts))
        shares = F.softmax(model.critic_gate(asked), dim=1)
        p = sum(shares[:, k] * torch.sigmoid(critic(h))[:, 0] for k, critic in enumerate(model.critics))
        torch.testing.assert_close(model(ids, numbers)[:, task], p)


def test_metaheac_predictions_are_not_capped() -> None:
    """The published mean over critics could not pass 1 / 5."""
    model, (ids, numbers, _) = MetaHeac(*SIZES), batch()
    with torch.no_grad():
        for critic in model.critics:
            critic[-1].bias.fill_(9.0)  # type: ignore[index]
    assert model(ids, numbers).min() > 0.99


def test_inner_step_leaves_the_model_unchanged() -> None:
    model, (ids, numbers, labels) = MetaHeac(*SIZES), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stepped = MetaHeac(*SIZES)
    stepped.load_state_dict(before)
    loss = F.binary_cross_entropy(stepped(ids[:6], numbers[:6]), labels[:6])
    slopes = torch.autograd.grad(loss, list(stepped.parameters()))
    for parameter, slope in zip(stepped.parameters(), slopes, strict=True):
        parameter.data -= INNER_LR * slope
    adapted = model.forward_adapted((ids[:6], numbers[:6]), lambda p: F.binary_cross_entropy(p, labels[:6]),
                            (ids[6:], numbers[6:]))
    torch.testing.assert_close(adapted, stepped(ids[6:], numbers[6:]))
    assert not torch.equal(adapted, model(ids[6:], numbers[6:]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_outer_gradient_goes_through_the_inner_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences of the whole meta-loss, with an inner step large enough to matter."""
    monkeypatch.setattr("slmodels.metaheac.INNER_LR", 0.5)
    model = MetaHeac(*SIZES).double()
    ids, numbers, labels = (x.double() if x.is_floating_point() else x for x in batch())

    def meta_loss() -> Tensor:
        predictions = model.forward_adapted((ids[:6], numbers[:6]), lambda p: F.binary_cross_entropy(p, labels[:6]),
                                    (ids[6:], numbers[6:]))
        return F.binary_cross_entropy(predictions, labels[6:])

    bias, small = model.expert_gate.bias, 1e-5
    (slope,) = torch.autograd.grad(meta_loss(), bias)
    (first_order,) = torch.autograd.grad(F.binary_cross_entropy(model(ids[6:], numbers[6:]), labels[6:]), bias)
    for place in range(len(bias)):
        values = []
        for step in (small, -2 * small):
            with torch.no_grad():
                bias[place] += step
            values.append(float(meta_loss().detach()))
        with torch.no_grad():
            bias[place] += small
        assert (values[0] - values[1]) / (2 * small) == pytest.approx(float(slope[place]), rel=1e-4, abs=1e-9)
    assert not torch.allclose(slope, first_order, rtol=1e-2)


@pytest.mark.parametrize("rows", [1, 7, 8])
@pytest.mark.parametrize("polished", [False, True])
def test_epoch_loss_is_the_outer_loss(rows: int, polished: bool) -> None:
    model, (ids, numbers, labels) = MetaHeac(*SIZES), batch(rows)
    half = (rows + 1) // 2
    weight = 2.0 if polished else 1.0
    expected = weight * F.binary_cross_entropy(
        model.forward_adapted((ids[:half], numbers[:half]), lambda p: weight * F.binary_cross_entropy(p, labels[:half]),
                      (ids[-half:], numbers[-half:])), labels[-half:])
    polisher = _Twice(model) if polished else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [value.clone() for value in model.parameters()]
    loss = sltrain(model, optimizer, [(ids, numbers, labels)], nn.BCELoss(reduction="none"), "cpu",  # type: ignore[arg-type]
                   polisher)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert all(not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True)
               if two is not model.input.embedding.embedding.weight)


class _Twice(RlLossPolisher):
    """Weights of 2."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, [], 1.0, "constant")

    def weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        return 2 * super().weights(categorical_x, numerical_x, labels)


def test_it_learns(rt_tables: Path) -> None:
    splits = load_splits(rt_tables)
    dims = encode_splits(splits, 0.2).field_dims
    model = get_model("metaheac", dims, splits.train.numerical_num, 2, 2, 8)
    optimizer, loader = torch.optim.Adam(model.parameters(), 3e-3), TensorLoader(splits.train, 256, seed=1)
    losses = [sltrain(model, optimizer, loader, nn.BCELoss(reduction="none"), "cpu") for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert "one process" in user_error_message(lambda: get_model("metaheac", [3], 1, 2, 2, 4))
