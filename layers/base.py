"""The parent of all multi-task models: what a model predicts for a batch, and the loss that it trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from layers.layers import FeatureEmbedding

Batch = tuple[Tensor, Tensor, Tensor]  # ids (B, F), numerical features (B, N), labels (B, T)
Criterion = Callable[[Tensor, Tensor], Tensor]  # predictions and labels (B, T) to losses (B, T), or their mean ()
Weights = Callable[[], Tensor]  # gives weights (B, T) of samples and tasks; called once a batch


class MultiTaskModel(nn.Module):
    """A child defines `batch_forward`; and `losses`, where it trains on more than its predictions.

    Attributes:
        window: impressions of the session that the model reads; 0: the current one alone.
        encodable: whether an encoder of the session may stand before the model (`layers.sequence`).
        data_parallel: whether several processes may train it.
    """

    window = 0
    encodable: ClassVar[bool] = True
    data_parallel: ClassVar[bool] = True

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        """Take ids (B, F) and numbers (B, N), or one sample (F,) and (N,); return predictions (B, T) or (T,)
        in (0, 1)."""
        if categorical_x.ndim == 1:
            return self.batch_forward(categorical_x[None], numerical_x[None])[0]
        return self.batch_forward(categorical_x, numerical_x)

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        """Predictions (B, T) of ids (B, F) and numbers (B, N)."""
        raise NotImplementedError

    def losses(self, batch: Batch, criterion: Criterion, weights: Weights | None = None) -> Tensor:
        """The tasks' mean losses (T,) on a batch; their mean () where the criterion averages.

        weights: of samples and tasks. Raises ValueError with a criterion that averages.
        """
        categorical_x, numerical_x, labels = batch
        return task_losses(self(categorical_x, numerical_x), labels, criterion, weights)

    def input_layer(self, task: int) -> FeatureEmbedding | None:
        """The layer that embeds the fields for a task; None where a model reads them by other means."""
        layer = getattr(self, "input", None)
        return layer if isinstance(layer, FeatureEmbedding) else None


def check_given(given: Sequence[int], task_num: int) -> list[int]:
    """The number of the task that each task is given, -1 for none, (T,). Raises ValueError where it is no earlier one.
    """
    if len(given) != task_num or any(type(number) is not int or not -1 <= number < task
                                     for task, number in enumerate(given)):
        raise ValueError(f"given is {given}: for each of {task_num} tasks the number of an earlier one, or -1")
    return list(given)


def task_losses(predictions: Tensor, labels: Tensor, criterion: Criterion, weights: Weights | None = None) -> Tensor:
    """Mean losses (T,) of predictions (B, T); their mean () where the criterion averages. See `MultiTaskModel.losses`.
    """
    labels = labels[:, : predictions.shape[1]]
    losses = criterion(predictions, labels)
    if weights is not None:
        if losses.shape != labels.shape:
            raise ValueError(f"the criterion gives losses of shape {tuple(losses.shape)}: to weight samples or tasks, "
                             f"one of each is needed, {tuple(labels.shape)}: nn.BCELoss(reduction='none')")
        losses = losses * weights()[:, : predictions.shape[1]]
    return losses.mean(dim=0) if losses.ndim else losses
