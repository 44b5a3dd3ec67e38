"""Supervised training: the documented loops `sltrain`, `sltest`, `slpred`, and the state of a run of `SLmain.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed
from common.checkpoint import load_optimizer_state, load_state_dict_strict, state_dict_hash
from common.csv_reader import write_csv
from common.device import set_seed
from common.errors import UserError
from common.finite import NonFiniteMonitor, first_nonfinite_column, first_nonfinite_tensor
from common.run_dir import RunDirectory
from dataset.loader import TensorLoader
from dataset.rtrl import RetailRocketRLDataset, Splits
from env import compute_reward
from layers.base import Batch, Criterion, Weights, task_losses
from train.metrics import Metrics, auc_leakage_warnings, compute_metrics, feature_leakage_warnings
from train.plots import plot_panels, varying
from train.polish import RlLossPolisher
from train.task_weighting import TaskWeighting
from train.tracking import Trackers
from train.utils import EarlyStopper

Predictions = list[NDArray[np.float32]]
EVALUATION_BATCH = 4096  # rows: activations that are still in the cache when the next layer reads them


def sltrain(model: nn.Module, optimizer: torch.optim.Optimizer, data_loader: Iterable[Any],
            criterion: Criterion, device: torch.device | str, polisher: RlLossPolisher | None = None,
            log_interval: int = 100, weighting: TaskWeighting | None = None) -> float:
    """Train for one epoch; of several processes (`common.distributed`) each computes its own rows of every batch.

    Args:
        model: a `layers.MultiTaskModel`, which has `losses` of its own; or any module that predicts (B, T).
        data_loader: gives batches (ids (B, F), numbers (B, N), labels (B, T)): the resident
            `dataset.loader.TensorLoader`, a torch `DataLoader`, or any other iterable of them. Whole batches are cut
            among the processes; a `TensorLoader` of so many processes gives each its own rows.
        criterion: predictions and labels (B, T) to losses, (B, T) or their mean (). A loss of torch's that averages,
            `nn.BCELoss()`, is used without its averaging: the mean is the same, and samples can be weighted.
        polisher: gives the sample weights (B, T). Raises ValueError with a criterion of one's own that averages.
        log_interval: steps between two updates of the loss in the progress bar.
        weighting: of the tasks' losses; default equal. Raises ValueError with a criterion that averages.

    Returns:
        The mean loss of the epoch. Raises UserError where a loss or a parameter is NaN or infinite, before the step is
        made (on a GPU: within `log_interval` steps), naming task, batch and tensor.
    """
    model.train()
    criterion, tasks_weighted = _without_mean(criterion), weighting is not None
    weighting = weighting or TaskWeighting()
    parallel = distributed.data_parallel(_Losses(model))
    is_own = getattr(data_loader, "world_size", 1) == distributed.world_size()
    if isinstance(polisher, RlLossPolisher) and polisher.model is None:
        polisher.model = model
    total, step = torch.zeros((), device=device), 0
    rows: Tensor | float = 0.0
    last = len(data_loader) if isinstance(data_loader, Sized) else None
    monitor, epoch = NonFiniteMonitor(device, log_interval), getattr(data_loader, "epoch", 1)
    with tqdm(data_loader, "train", unit="batch", leave=False, disable=None) as bar:
        for step, data in enumerate(bar, start=1):
            own_rows = data if is_own else distributed.shard(data)
            batch = _on_device(own_rows, device)
            losses = parallel(batch, criterion, None if polisher is None else partial(polisher.weights, *batch))
            mean_losses, fraction, batch_rows = distributed.batch_mean(losses, len(batch[2]))
            if tasks_weighted and not losses.ndim:
                raise ValueError("the criterion averages over the tasks: to weight them, a loss of each is needed: "
                                 "nn.BCELoss(reduction='none')")
            if nonfinite := monitor.update(step, mean_losses, step == last):
                raise _divergence_error(f"task {nonfinite[0]}: loss is NaN/Inf at epoch {epoch}, step {nonfinite[1]}",
                                        model, batch, polisher)
            optimizer.zero_grad()
            weighting.backward(fraction * losses, model)
            optimizer.step()
            weighting.step()
            total += mean_losses.mean() * batch_rows
            rows += batch_rows
            if step % log_interval == 0 or step == last:
                bar.set_postfix(loss=f"{float(total / rows):.4f}")
    if not step:
        raise UserError("training: the data loader has no batches")
    mean = float(total / rows)
    is_bad = torch.tensor(float(not np.isfinite(mean) or bool(first_nonfinite_tensor({"": model}))), device=device)
    if distributed.all_reduce_sum(is_bad):  # in one process, and all of them end
        raise _divergence_error(f"after epoch {epoch}, step {step}, the mean loss is {mean}", model)
    return mean


class _Losses(nn.Module):
    """A model's losses as a forward pass, which `DistributedDataParallel` needs; of a module that has no `losses` those
    of its predictions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, criterion: Criterion, weights: Weights | None) -> Tensor:
        losses = getattr(self.model, "losses", None)
        if losses is None:
            return task_losses(self.model(*batch[:2]), batch[2], criterion, weights)
        return losses(batch, criterion, weights)


def _on_device(batch: Sequence[Any], device: torch.device | str) -> Batch:
    """Ids, numbers and labels of a batch, which may be arrays, on the device."""
    if len(batch) != 3:
        raise ValueError(f"a batch of {len(batch)} parts: ids (B, F), numbers (B, N) and labels (B, T) are needed")
    ids, numbers, labels = (torch.as_tensor(part).to(device) for part in batch)
    return ids, numbers.to(torch.float32), labels.to(torch.float32)


def _without_mean(criterion: Criterion) -> Criterion:
    """A loss of torch's that averages, without its averaging; any other criterion as it is."""
    if isinstance(criterion, nn.Module) and getattr(criterion, "reduction", "") == "mean":
        criterion = copy.copy(criterion)
        criterion.reduction = "none"  # type: ignore[assignment]
    return criterion


def bce_loss(predictions: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy (B, T). The loss of a NaN is NaN, and the loops report it; torch's own function stops the
    program there, and on a GPU the whole device."""
    numbers = predictions.nan_to_num(0.5, 0.5, 0.5)
    return F.binary_cross_entropy(numbers, labels, reduction="none") + (predictions - predictions).detach()


def _divergence_error(what: str, model: nn.Module, batch: Batch | None = None,
                      polisher: RlLossPolisher | None = None) -> UserError:
    """The one line. It names the tensor: a parameter, the batch's numbers, the critics' weights; else predictions."""
    tensor = first_nonfinite_tensor({"": model})
    if not tensor and batch is not None:
        if not torch.isfinite(batch[1]).all():
            tensor = "numerical_x"
        elif (polisher is not None and distributed.world_size() == 1  # those of others may have ended already
              and not torch.isfinite(polisher.weights(*batch)).all()):
            tensor = "the critics' weights"
    return UserError(f"training diverged: {what} (NaN or infinity in {tensor or 'predictions'}): try a smaller "
                     "--learning_rate; the last good epoch is kept")


def slpred(model: nn.Module, data_loader: Iterable[Any], task_num: int, device: torch.device | str) -> Predictions:
    """Predict; return for each of `task_num` tasks the predictions of all rows (n,), in the order of the loader.

    data_loader: as `sltrain`'s. Equal rows of a `TensorLoader` are predicted once, by one of the processes.
    """
    predictions = _predict(model, data_loader, task_num, device)[0]
    return [predictions[:, task] for task in range(task_num)]


def sltest(model: nn.Module, data_loader: Iterable[Any], task_num: int,
           device: torch.device | str) -> tuple[list[float], list[float]]:
    """Test; return AUC per task (nan where there is one class only) and logloss per task. On a terminal its progress
    bar stays.

    data_loader: as `sltrain`'s.
    """
    metrics = evaluate(model, data_loader, task_num, device, leave=True)
    return [one.auc for one in metrics], [one.logloss for one in metrics]


@torch.no_grad()
def _predict(model: nn.Module, data_loader: Iterable[Any], task_num: int, device: torch.device | str,
             leave: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Predictions and labels (n, task_num) of all rows, in the order of the loader.

    leave: whether the progress bar stays, as the documented one.
    """
    model.eval()
    bar: dict[str, Any] = {"leave": leave, "disable": None, **({} if leave else {"desc": "predict", "unit": "batch"})}
    if isinstance(data_loader, TensorLoader):
        rows, inverse = ((torch.arange(len(data_loader.session)), None) if data_loader.is_large else
                         data_loader.unique_rows)
        rows = distributed.equal_part(rows)
        predictions = distributed.all_gather_rows(_in_rows(
            len(rows), (model(*(x.to(device) for x in data_loader.take(part)[:2])) for part in
                        tqdm(rows.split(data_loader.batch_size), **bar))))
        predictions = predictions[:len(data_loader.session)] if inverse is None else predictions[inverse.to(device)]
        labels = data_loader.labels
    else:
        pairs = [(model(ids, numbers), labels) for ids, numbers, labels in
                 (_on_device(batch, device) for batch in tqdm(data_loader, **bar))]
        if not pairs:
            raise UserError("prediction: the data loader has no batches")
        predictions, labels = (torch.cat(chunks) for chunks in zip(*pairs, strict=True))
    for what, tensor in (("the model has", predictions), ("the labels have", labels)):
        if tensor.shape[1] < task_num:
            raise ValueError(f"{task_num} tasks are expected, but {what} {tensor.shape[1]}")
    values = predictions[:, :task_num].cpu().numpy()
    nonfinite = first_nonfinite_column(values)
    if nonfinite is not None:
        raise _divergence_error(f"task {nonfinite}: predictions contain NaN/Inf", model)
    return values, labels[:, :task_num].cpu().numpy()


def _in_rows(count: int, chunks: Iterable[Tensor]) -> Tensor:
    """The rows of all chunks, `count` together, of which no second copy is made."""
    rows, filled = torch.empty(0), 0
    for chunk in chunks:
        if not filled:
            rows = chunk.new_empty(count, *chunk.shape[1:])
        rows[filled:filled + len(chunk)] = chunk
        filled += len(chunk)
    return rows


def evaluate(model: nn.Module, data_loader: Iterable[Any], task_num: int, device: torch.device | str,
             leave: bool = False) -> list[Metrics]:
    """The metrics of each task. A `TensorLoader` has the sessions and users; in any other loader each row is a session
    of its own, so that GAUC is nan."""
    predictions, labels = _predict(model, data_loader, task_num, device, leave)
    session = user = np.arange(len(labels))
    if isinstance(data_loader, TensorLoader):
        session, user = data_loader.session, data_loader.user
    return compute_metrics(list(predictions.T), labels, session, user)


def evaluation_loader(model: nn.Module, split: RetailRocketRLDataset, device: torch.device | str,
                      window: int = 0) -> TensorLoader:
    """The resident loader that a model is evaluated on: of windows, if it or somebody else reads them."""
    return TensorLoader(split, EVALUATION_BATCH, device, window=max(getattr(model, "window", 0), window))


@torch.no_grad()
def loss_by_weight_decile(model: nn.Module, polisher: RlLossPolisher, split: RetailRocketRLDataset,
                          task_names: Sequence[str], device: torch.device, groups: int = 10) -> list[dict[str, float]]:
    """The samples of a split in ten groups of equal size, by their weight: per task and group the mean weight, the
    model's mean logloss and the fraction of positive labels."""
    loader = evaluation_loader(model, split, device, polisher.window)
    own = ((batch, polisher.sample_weights(*distributed.shard(batch))) for batch in loader)
    weights = torch.cat([distributed.all_gather_rows(part)[:len(batch[2])] for batch, part in own]
                        ).double().cpu().numpy()  # (n, T)
    predictions = np.column_stack(slpred(model, loader, weights.shape[1], device))
    losses = -compute_reward(predictions, split.labels[:, : weights.shape[1]], "bce")
    rows: list[dict[str, float]] = [{} for _ in range(groups)]
    for task, name in enumerate(task_names[: weights.shape[1]]):
        order = np.argsort(weights[:, task], kind="stable")
        for row, group in zip(rows, np.array_split(order, groups), strict=True):
            row |= {f"{what}_{name}": float(values[group, task].mean())
                    for what, values in (("weight", weights), ("loss", losses), ("label", split.labels))}
    return rows


class Training:
    """The state of a supervised run from epoch to epoch: loaders, stopper, history of metrics and checkpoint.

    All random numbers of an epoch are a function of (seed, epoch), so that a resumed run ends as one that was not
    stopped.

    Args:
        model, optimizer, stopper: what is trained, how, and the rule of early stopping.
        splits: mapped; batches of `batch_size` rows in an order of (seed, epoch).
        run_dir: where every epoch is saved.
        save_model: writes weights to a path, as a model file.
        polisher: gives the sample weights of a polish run.
        weighting: of the tasks.
        trackers: what --track asks for.
    """

    def __init__(self, model: nn.Module, splits: Splits, optimizer: torch.optim.Adam, stopper: EarlyStopper,
                 run_dir: RunDirectory, save_model: Callable[[Path, Mapping[str, Tensor]], None],
                 device: torch.device, *, batch_size: int, seed: int,
                 polisher: RlLossPolisher | None = None, weighting: TaskWeighting | None = None,
                 trackers: Trackers | None = None) -> None:
        self.model, self.splits, self.optimizer, self.stopper = model, splits, optimizer, stopper
        self.run_dir, self.save_model, self.device, self.seed = run_dir, save_model, device, seed
        self.polisher, self.weighting = polisher, weighting or TaskWeighting()
        self.trackers = trackers or Trackers("")
        self.task_names = splits.task_names
        window = max(getattr(model, "window", 0), polisher.window if polisher is not None else 0)
        self.train_loader = TensorLoader(splits.train, batch_size, device, seed=seed, window=window,
                                         rank=distributed.rank(), world_size=distributed.world_size())
        self.val_loader, self.test_loader = (evaluation_loader(model, split, device)
                                             for split in (splits.val, splits.test))
        self.history: list[dict[str, Any]] = []
        self.epoch, self.should_continue = 0, True
        self.saved: dict[str, Any] = {}  # what every checkpoint repeats
        for split, name in ((splits.train, "training"), (splits.val, "validation"), (splits.test, "test")):
            _print_lines(feature_leakage_warnings(split, name, self.task_names))

    def start(self, settings: Mapping[str, Any], resume: bool, warm_start: bool = False) -> None:
        """Start the run, or resume it. Raises UserError where the checkpoint is of another run.

        warm_start: the score of the model as it is, epoch 0, is the one to beat.
        """
        origin = {"start": state_dict_hash(self.model),
                  **({} if self.polisher is None else {"critics": self.polisher.digest})}
        self.saved = {"settings": dict(settings), "fingerprint": self.splits.fingerprint, "origin": origin}
        checkpoint = self.run_dir.start(settings, self.splits.manifest, self.splits.fingerprint, origin, resume)
        if checkpoint is not None:
            with self.run_dir.resume_errors():
                load_state_dict_strict(self.model, checkpoint["stopper"]["best_state"])  # refused now, not at the end
                load_state_dict_strict(self.model, checkpoint["model"])
                load_optimizer_state(self.optimizer, checkpoint["optimizer"])
                self.stopper.load_state_dict(checkpoint["stopper"])
                self.weighting.load_state_dict(checkpoint["weighting"])
                self.history, self.epoch = checkpoint["history"], checkpoint["epoch"]
                self.should_continue = checkpoint["should_continue"]
                _learning_curves(self.task_names, self.history)  # drawn at the end
            print(f"resuming after epoch {self.epoch}" + ("" if self.should_continue else ": training had ended"))
        elif warm_start:
            metrics = evaluate(self.model, self.val_loader, len(self.task_names), self.device)
            self.stopper.is_continuable(self.model, validation_score(metrics), 0)
            self.history.append({"split": "val", "epoch": 0, "loss": float("nan"), **self._metric_columns(metrics)})
        self.trackers.start(self.run_dir, settings)
        for row in self.history:
            self.trackers.log_row(row)

    def next_epoch(self, epochs: int) -> bool:
        """Begin the next of at most `epochs` epochs; False where the stopper has ended training, or it was the last."""
        if not self.should_continue or self.epoch >= epochs:
            return False
        self.epoch += 1
        set_seed(self.seed, self.epoch, own=True)
        self.train_loader.epoch = self.epoch
        return True

    def end_epoch(self, loss: float, metrics: Sequence[Metrics]) -> None:
        """Take an epoch's loss and validation metrics: save the best weights, and the checkpoint."""
        self.should_continue = self.stopper.is_continuable(self.model, validation_score(metrics), self.epoch)
        self.history.append({"split": "val", "epoch": self.epoch, "loss": loss, **self._metric_columns(metrics)})
        if self.polisher is not None:
            self.history[-1] |= self.polisher.weight_statistics(self.task_names)
        print(f"epoch {self.epoch}: loss {loss:.4f}, validation AUC "
              + ", ".join(f"{name} {task.auc:.4f}" for name, task in zip(self.task_names, metrics, strict=True)))
        if self.stopper.best_epoch == self.epoch:
            self.save_model(self.run_dir.model, self.stopper.best_state)
        self.run_dir.save_checkpoint({
            "epoch": self.epoch, "should_continue": self.should_continue, "model": self.model.state_dict(),
            "history": self.history, "optimizer": self.optimizer.state_dict(), "stopper": self.stopper.state_dict(),
            "weighting": self.weighting.state_dict(), **self.saved})
        self.trackers.log_row(self.history[-1])

    def restore_best(self) -> None:
        """Give the model its best weights, and save them."""
        if self.should_continue:
            print(f"stopped after epoch {self.history[-1]['epoch']}, the last one (--epoch): validation AUC may still "
                  "rise")
        self.model.load_state_dict(self.stopper.best_state)
        self.save_model(self.run_dir.model, self.stopper.best_state)

    def finish(self, metrics: Sequence[Metrics]) -> None:
        """Take the test metrics of the best weights: write metrics.csv and the plots."""
        history, best_epoch = self.history, self.stopper.best_epoch
        test_row = {"split": "test", "epoch": best_epoch, **self._metric_columns(metrics)}
        write_csv(self.run_dir.metrics, [*history, test_row])
        best = next(row for row in history if row["epoch"] == best_epoch)
        _print_lines(auc_leakage_warnings([best[f"auc_{name}"] for name in self.task_names], "validation",
                                          self.task_names))
        _print_lines(auc_leakage_warnings([task.auc for task in metrics], "test", self.task_names))
        plot_panels(self.run_dir.curves, _learning_curves(self.task_names, history),
                    [row["epoch"] for row in history], best_epoch=best_epoch, title=self.run_dir.name)
        if self.polisher is not None and self.polisher.method != "constant":  # whose weights are all 1
            trained = [row for row in history if row["epoch"]]
            plot_panels(self.run_dir.weights_plot, varying(_weight_curves(self.task_names, trained)),
                        title=f"weights of {self.run_dir.name}")
        self.trackers.log_row(test_row)
        self.trackers.finish()

    def _metric_columns(self, metrics: Sequence[Metrics]) -> dict[str, float]:
        return {f"{metric}_{name}": value for name, task in zip(self.task_names, metrics, strict=True)
                for metric, value in task._asdict().items()}


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def validation_score(metrics: Sequence[Metrics]) -> float:
    """What early stopping maximizes: the mean AUC of the tasks that have one, else minus the mean logloss."""
    aucs = [task.auc for task in metrics if np.isfinite(task.auc)]
    return float(np.mean(aucs)) if aucs else -float(np.mean([task.logloss for task in metrics]))


def _learning_curves(tasks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    return {
        "training loss": {"loss": [row["loss"] for row in rows]},
        "validation AUC": {name: [row[f"auc_{name}"] for row in rows] for name in tasks},
        "validation logloss": {name: [row[f"logloss_{name}"] for row in rows] for name in tasks},
    }


def _weight_curves(tasks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    titles = {"q05": "5 % quantile", "q50": "median", "q95": "95 % quantile"}
    curves = {f"{name}: weights": {title: [row[f"weight_{key}_{name}"] for row in rows]
                                   for key, title in titles.items()} for name in tasks}
    curves["effective sample size"] = {name: [row[f"weight_ess_{name}"] for row in rows] for name in tasks}
    curves["fraction of weights at 1"] = {name: [row[f"weight_at_1_{name}"] for row in rows] for name in tasks}
    return curves
