"""A model owns its loss: the default, the weights of samples and tasks, and models with a loss of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layers import MultiTaskModel
from layers.base import Batch, Criterion, Weights, task_losses
from slmodels import build
from train.supervised import sltrain

BCE = nn.BCELoss(reduction="none")
PREDICTIONS = torch.tensor([[0.5, 0.25], [0.5, 0.5]])
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


class Constant(MultiTaskModel):
    """Predicts one learned probability a task."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        return torch.sigmoid(self.logits).expand(len(categorical_x), 2)


class Penalized(Constant):
    def losses(self, batch: Batch, criterion: Criterion, weights: Weights | None = None) -> Tensor:
        return super().losses(batch, criterion, weights) + 10.0


BATCH = torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1), torch.tensor([[1.0, 0], [1, 1], [0, 0], [1, 1]])


def test_task_losses_by_hand() -> None:
    expected = -torch.log(torch.tensor([[0.5, 0.75], [0.5, 0.5]]))
    torch.testing.assert_close(task_losses(PREDICTIONS, LABELS, BCE), expected.mean(dim=0))
    weights = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    torch.testing.assert_close(task_losses(PREDICTIONS, LABELS, BCE, lambda: weights), (weights * expected).mean(dim=0))
    torch.testing.assert_close(task_losses(PREDICTIONS, LABELS, nn.BCELoss()), expected.mean())
    torch.testing.assert_close(task_losses(PREDICTIONS[:, :1], LABELS, BCE), expected[:, :1].mean(dim=0))


def test_weights_need_a_loss_per_sample() -> None:
    with pytest.raises(ValueError, match="one of each is needed"):
        task_losses(PREDICTIONS, LABELS, nn.BCELoss(), lambda: torch.ones(2, 2))


def test_sltrain_trains_on_the_models_own_losses() -> None:
    losses = [sltrain(model, torch.optim.SGD(model.parameters(), 0.0), [BATCH], BCE, "cpu")
              for model in (Constant(), Penalized())]
    assert losses[1] - losses[0] == pytest.approx(10)


def test_sltrain_takes_a_plain_module() -> None:
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.zeros(2))
    plain.forward = lambda ids, numbers: torch.sigmoid(plain.weight).expand(len(ids), 2)  # type: ignore[method-assign]
    loss = sltrain(plain, torch.optim.SGD(plain.parameters(), 1.0), [BATCH], BCE, "cpu")
    assert loss == pytest.approx(float(torch.log(torch.tensor(2.0))))
    assert bool((plain.weight != 0).any())


@pytest.mark.parametrize("name", ["esmm", "aitm", "metaheac"])
def test_weights_scale_the_losses_of_every_model(name: str) -> None:
    """Weights of 2 double the loss; they are computed once a batch."""
    torch.manual_seed(3)
    model = build(name, [5], 1, 4, (8, 6), (4,), 2, 2, 0.0)
    batch = torch.randint(5, (7, 1)), torch.randn(7, 1), (torch.rand(7, 2) < 0.5).float()
    calls: list[int] = []

    def weights(value: float) -> Weights:
        return lambda: calls.append(1) or torch.full((7, 2), value)  # type: ignore[func-returns-value]

    ones, twos = (model.losses(batch, BCE, weights(value)) for value in (1.0, 2.0))
    torch.testing.assert_close(ones, model.losses(batch, BCE))
    torch.testing.assert_close(twos, 2 * ones, rtol=2e-3, atol=0)  # metaheac: its inner step is twice as large
    assert len(calls) == 2
