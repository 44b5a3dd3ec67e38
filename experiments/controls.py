"""Controls without critics beside constant weights, from the same baseline: what a gain of the critics has to beat.

    python3 -m experiments.controls --control=auxiliary --model_name=esmm    # chkpt/controls/rt_esmm_auxiliary
    python3 -m experiments.controls --control=average --model_name=esmm
    python3 -m experiments.controls --control=ensemble --model_name=esmm     # trains a second model

- auxiliary: fine-tuning with constant weights and an auxiliary loss: a linear head on the embeddings predicts how many
  outcomes follow in the session, what critics learn, without RL (after Labarca Silva et al., ICML 2024: in place of RL
  as an auxiliary loss, a prediction of the number of items the user interacted with does as well). The column `loss`
  of metrics.csv includes it; the saved model has no head.
- average: fine-tuning with constant weights; what is validated, tested and saved is the mean of the baseline's weights
  and of those after each epoch so far (Izmailov et al., UAI 2018).
- ensemble: the mean of the predictions of the baseline and of a second one, which this run trains, with seed + 1000 and
  otherwise the same settings: the budget of a whole baseline, more than that of fine-tuning. Its metrics.csv has one
  row of validation, epoch 0.

`SLmain.py` trains the baseline, with the same settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import ClassVar

from common.startup import before_torch
from experiments.arguments import ControlArguments
from train.Arguments import SLArguments, parse

if __name__ == "__main__":
    before_torch(lambda: parse(ControlArguments, __doc__ or "").check_files())

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from common.device import pick_device
from common.errors import cli_entry_point
from common.fileio import check_writable, exclusive_lock
from dataset.features import Floats
from dataset.rtrl import Splits
from dataset.sessions import SessionIndex
from dataset.vocabulary import Catemapper, encode_splits
from layers.base import Batch, Criterion, MultiTaskModel, Weights
from layers.layers import linear
from SLmain import fit, init_model, load_baseline, make_training, test
from train.metrics import Metrics
from train.offline_rl import discounted_returns
from train.polish import make_polisher
from train.run import get_dataset
from train.supervised import Training

GAMMA = 0.9  # discount of later outcomes, the critics' default
SEED_STEP = 1000  # between the seeds of the two models of an ensemble


def later_outcomes(labels: Floats, sessions: SessionIndex, gamma: float = GAMMA) -> Floats:
    """The auxiliary targets: log(1 + sum_{i >= 1} gamma^i y_{t+i}) over the later rows of the session; labels (n, T)
    -> (n, T)."""
    return np.log1p(discounted_returns(labels, sessions, gamma) - labels).astype(np.float32)


class Auxiliary(MultiTaskModel):
    """A model with a linear head on its input layer, on each one where the tasks do not share it.

    A head predicts the targets of all tasks. Its squared errors, times `weight`, join the tasks' losses.

    Args:
        weight: of the auxiliary loss; with 0 the model trains as it does alone.
        target_means: (T,), what the heads predict at first.
    """

    saved: ClassVar[str] = "model."  # the prefix of the weights that are saved

    def __init__(self, model: MultiTaskModel, weight: float, target_means: Tensor) -> None:
        super().__init__()
        self.model, self.weight, self.task_num = model, weight, len(target_means)
        self.layers = [layer for layer in dict.fromkeys(map(model.input_layer, range(self.task_num))) if layer]
        heads = [nn.Linear(layer.output_dim, self.task_num) for layer in self.layers]
        for head in heads:
            nn.init.zeros_(head.weight)
            head.bias.data.copy_(target_means)
        self.heads = nn.ModuleList(heads)

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        return self.model(categorical_x, numerical_x)

    def losses(self, batch: Batch, criterion: Criterion, weights: Weights | None = None) -> Tensor:
        """The model's losses plus the auxiliary ones (T,); the last T columns of the labels are the targets."""
        targets, losses = batch[2][:, -self.task_num:], self.model.losses(batch, criterion, weights)
        for layer, head in zip(self.layers, self.heads, strict=True):
            assert isinstance(head, nn.Linear)
            predicted = linear(layer(*batch[:2]), head.weight, head.bias)  # (B, T)
            losses = losses + self.weight * (predicted - targets).square().mean(dim=0)
        return losses


class Average(MultiTaskModel):
    """A model that trains, and the mean of its weights at the start and after each epoch, which predicts."""

    saved: ClassVar[str] = "average.module."

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model, self.average = model, AveragedModel(model)
        self.update()

    def update(self) -> None:
        """Take the present weights into the mean."""
        self.average.update_parameters(self.model)

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        return self.average(categorical_x, numerical_x)

    def losses(self, batch: Batch, criterion: Criterion, weights: Weights | None = None) -> Tensor:
        return self.model.losses(batch, criterion, weights)


class Ensemble(MultiTaskModel):
    """The mean of the predictions of several models."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def batch_forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        return torch.stack([model(categorical_x, numerical_x) for model in self.models]).mean(dim=0)


def fine_tune(settings: ControlArguments, splits: Splits, catemapper: Catemapper, model: MultiTaskModel,
              device: torch.device) -> Training:
    """Fine-tune the baseline as `auxiliary` or `average`, and restore the best epoch.

    The head starts untrained: it has the full learning rate, the model that of a polish run.
    """
    training = make_training(settings, splits, catemapper, model, device,
                             make_polisher(settings, splits.train.metadata, model, device))
    control: Auxiliary | Average
    after_epoch: Callable[[], None] | None = None
    if settings.control == "auxiliary":
        targets = later_outcomes(splits.train.labels, splits.train.sessions)
        training.train_loader.add_labels(targets)
        control = Auxiliary(model, settings.auxiliary_weight, torch.from_numpy(targets.mean(axis=0))).to(device)
        training.optimizer.add_param_group({"params": control.heads.parameters(), "lr": settings.learning_rate})
    else:
        control = Average(model)
        after_epoch = control.update
    training.model, save = control, training.save_model
    training.save_model = lambda path, state: save(path, {
        name.removeprefix(control.saved): tensor for name, tensor in state.items() if name.startswith(control.saved)})
    training.start(settings.plain(), settings.resume, warm_start=True)
    fit(training, settings.epoch, after_epoch)
    training.restore_best()
    return training


def join_second(settings: ControlArguments, splits: Splits, catemapper: Catemapper, model: nn.Module,
                device: torch.device) -> Training:
    """Train the second model, in the folder `second` of the run; return what tests the ensemble."""
    second = SLArguments(**{one.name: getattr(settings, one.name) for one in fields(SLArguments)} | {
        "seed": settings.seed + SEED_STEP, "polish_lambda": 0.0, "save_dir": settings.run_dir.path / "second"})
    print(f"the second model, of seed {second.seed}, trains")
    training = make_training(second, splits, catemapper, init_model(second, splits, device), device)
    training.start(second.plain(), second.resume)
    fit(training, second.epoch)
    training.restore_best()
    both = make_training(settings, splits, catemapper, model, device)
    both.model = Ensemble(model, training.model)
    both.start(settings.plain(), resume=False, warm_start=True)  # it does not train: nothing to resume
    return both


def main(settings: ControlArguments) -> list[Metrics]:
    """One run from the baseline to metrics.csv. Return the test metrics per task. Raises UserError."""
    device, run_dir = pick_device(settings.device, settings.precision), settings.run_dir
    with exclusive_lock(run_dir.path):
        splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical, settings.task_num)
        check_writable(run_dir.path, files=run_dir.files)
        catemapper = encode_splits(splits, settings.feature_map_rate)
        model = init_model(settings, splits, device)
        assert isinstance(model, MultiTaskModel)
        load_baseline(settings, splits, model)
        run = join_second if settings.control == "ensemble" else fine_tune
        training = run(settings, splits, catemapper, model, device)
        metrics = test(training)
        training.finish(metrics)
    print(f"saved {run_dir.metrics}")
    return metrics


@partial(cli_entry_point, resumable=True)
def cli() -> None:
    main(parse(ControlArguments, __doc__ or ""))


if __name__ == "__main__":
    cli()
