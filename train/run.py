"""The loops: they are handed models, loaders, environments and agents.

Supervised: `get_dataset`, `get_model`, `sltrain`, `sltest`, `slpred`; `Training` is what a run of `SLmain.py` keeps
from epoch to epoch. The loops of offline RL are in `train.offline` and can be had from here too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dataset.files import UserError
from dataset.prepare import prepare
from dataset.rtrl import Batches, Numerical, RetailRocketRLDataset, Splits, find_folder, load_splits
from dataset.simulate import Size, simulate
from env import reward_of
from layers.session import inner_of, window_of
from slmodels import AITM, MetaHeac, build
from train import world
from train.Arguments import SLArguments
from train.checkpoint import (
    BOTTOM_MLP_DIMS,
    TOWER_MLP_DIMS,
    RunFolder,
    get_optim_param,
    load_model,
    put_weights,
    save_tensors,
    set_optim_param,
    weights_digest,
)
from train.metrics import Metrics, compute_metrics
from train.numbers import FirstBad, bad_column, bad_tensor, leaking_features, leaking_scores
from train.offline import (
    discounted_returns,
    one_iter_offline,
    plot_loss,
    rank_correlation,
    test,
    train_and_test_offline,
)
from train.plots import plot_panels
from train.polish import RlLossPolisher
from train.utils import EarlyStopper, set_seed
from train.weighting import Weighting, make_weighting

__all__ = [
    "Training",
    "discounted_returns",
    "evaluate",
    "get_dataset",
    "get_model",
    "load_model",
    "one_iter_offline",
    "plot_loss",
    "rank_correlation",
    "slpred",
    "sltest",
    "sltrain",
    "test",
    "train_and_test_offline",
    "validation_score",
]

Predictions = list[NDArray[np.float32]]
DROPOUT = 0.2
EVALUATION_BATCH = 4096  # rows: activations that are still in the cache when the next layer reads them


class Polisher(Protocol):
    """What weights the loss: given a batch, of windows if it needs them, a weight for every sample and task (B, T)."""

    def weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor: ...


def get_dataset(name: str, path: str | Path, numerical: str = "session") -> Splits:
    """Read the MDP tables of a data set; where `rt` is absent it is simulated first.

    path: the folder above that of the data set, which has its `name`; or that folder itself, or its train.csv.

    Raises UserError where the folder is incomplete or a file in it is wrong; and where `rt` is absent, but there are
    tables of somebody's in the place where it would be simulated.
    """
    folder = find_folder(Path(path), name)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        hint = (f"make it with python3 -m dataset.prepare --raw DIR --out {folder} (KuaiRand: --source kuairand)")
        if name != "rt":
            raise UserError(f"{folder}: no such data set: {hint}")
        raw, theirs = folder.parent / "simulated", sorted(folder.parent.glob("*.csv*"))
        if theirs:
            raise UserError(f"{folder}: no such data set, and none is simulated beside {theirs[0].name}: {hint}")
        print(f"{folder} is not there: simulating a shopping log into {raw} and preparing it.\n"
              f"For your own RetailRocket files: python3 -m dataset.prepare --raw DIR --out {folder}\n")
        if not raw.exists():
            simulate(raw, Size())
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        prepare(raw, folder)
    return load_splits(folder, cast(Numerical, numerical))


def get_model(name: str, categorical_field_dims: Sequence[int], numerical_num: int, task_num: int, expert_num: int,
              embed_dim: int, dropout: float = DROPOUT, calibrator: float = 0.0, encoder: str = "none",
              window: int = 10, bottom_mlp_dims: Sequence[int] = BOTTOM_MLP_DIMS,
              tower_mlp_dims: Sequence[int] = TOWER_MLP_DIMS) -> nn.Module:
    """Build a model of `slmodels`. Raises UserError, with the list, for an unknown name.

    calibrator: weight of AITM's behavioural-expectation calibrator; no other model has one.
    encoder, window: what it sees of the session (`layers.session`), or none.
    """
    try:
        model = build(name, [int(dim) for dim in categorical_field_dims], numerical_num, embed_dim, bottom_mlp_dims,
                      tower_mlp_dims, task_num, expert_num, dropout, encoder, window)
    except ValueError as error:
        raise UserError(str(error)) from error
    inner = inner_of(model)
    if calibrator and not isinstance(inner, AITM):
        raise UserError(f"--calibrator: only aitm has one, not {name}")
    if isinstance(inner, AITM):
        inner.calibrator = calibrator
    if isinstance(model, MetaHeac) and world.SIZE > 1:
        raise UserError("metaheac trains in one process: its inner step looks at half of the whole batch")
    return model


def sltrain(model: nn.Module, optimizer: torch.optim.Optimizer, data_loader: Iterable[Any],
            criterion: Callable[[Tensor, Tensor], Tensor], device: torch.device | str,
            polisher: Polisher | None = None, log_interval: int = 100, weighting: Weighting | None = None) -> float:
    """Train for one epoch; with several processes (`train.world`) each works on its share of every batch.

    Args:
        data_loader: gives batches (ids (B, F), numbers (B, N), labels (B, T)): the resident `dataset.rtrl.Batches`, a
            torch `DataLoader`, or anything else that does.
        criterion: predictions and labels (B, T) to losses, (B, T) or their mean (). A loss of torch's that averages,
            `nn.BCELoss()`, is taken without its averaging: the mean is the same, and samples can be weighted.
        polisher: weights the losses of samples and tasks. Raises ValueError with a criterion of one's own that
            averages: there is nothing left to weight.
        log_interval: steps between two updates of the loss in the progress bar.
        weighting: how the tasks' losses become one step; default equal. As the polisher it needs every loss.

    Returns:
        The mean loss of the epoch. Raises UserError where a loss or a parameter is no number, before the step is made
        (on a GPU: within `log_interval` steps), naming task, batch and tensor.
    """
    model.train()
    criterion, needs_all = _without_mean(criterion), polisher is not None or weighting is not None
    weighting = weighting or Weighting()
    if isinstance(polisher, RlLossPolisher) and polisher.model is None:
        polisher.model = model
    total, rows, step = torch.zeros((), device=device), 0, 0
    last = len(data_loader) if isinstance(data_loader, Sized) else None
    watch, epoch = FirstBad(device, log_interval), getattr(data_loader, "epoch", 1)
    with tqdm(data_loader, "train", unit="batch", leave=False, disable=None) as bar:
        for step, batch in enumerate(bar, start=1):
            (categorical_x, numerical_x, labels), part = world.share(_on_device(batch, device))
            losses = _losses(model, categorical_x, numerical_x, labels, criterion, polisher, needs_all)
            if bad := watch.see(step, losses, step == last):
                raise _diverged(f"the loss of task {bad[0]} is no number at epoch {epoch}, step {bad[1]}",
                                model, (categorical_x, numerical_x, labels), polisher)
            optimizer.zero_grad()
            weighting.backward(part * losses, model)
            world.sum_gradients(model)
            optimizer.step()
            weighting.step()
            total += losses.detach().mean() * len(labels)
            rows += len(labels)
            if step % log_interval == 0 or step == last:
                bar.set_postfix(loss=f"{float(total) / rows:.4f}")
    if not step:
        raise UserError("training: the data loader has no batches")
    total, count = world.total(torch.stack([total, torch.tensor(rows, dtype=total.dtype, device=total.device)]))
    mean = float(total / count)
    if not np.isfinite(mean) or bad_tensor({"": model}):
        raise _diverged(f"after epoch {epoch}, step {step}, the mean loss is {mean}", model)
    return mean


def _on_device(batch: Sequence[Any], device: torch.device | str) -> list[Tensor]:
    """Ids, numbers and labels of a batch, which may be arrays, on the device."""
    if len(batch) != 3:
        raise ValueError(f"a batch of {len(batch)} parts: ids (B, F), numbers (B, N) and labels (B, T) are needed")
    ids, numbers, labels = (torch.as_tensor(part).to(device) for part in batch)
    return [ids, numbers.to(torch.float32), labels.to(torch.float32)]


def _without_mean(criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of torch's that averages, without its averaging; any other criterion as it is."""
    if isinstance(criterion, nn.Module) and getattr(criterion, "reduction", "") == "mean":
        criterion = copy.copy(criterion)
        criterion.reduction = "none"  # type: ignore[assignment]
    return criterion


def _losses(model: nn.Module, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor,
            criterion: Callable[[Tensor, Tensor], Tensor], polisher: Polisher | None, needs_all: bool) -> Tensor:
    """The tasks' mean losses (T,) on a batch, its samples weighted; where the criterion averages, their mean ().

    AITM's come with its calibrator, MetaHeac's after its step on half of the batch.

    needs_all: whether a loss of every sample and task is needed.
    """
    def losses_of(predictions: Tensor, labels: Tensor) -> Tensor:
        losses = criterion(predictions, labels)
        if needs_all and losses.shape != labels.shape:
            raise ValueError(f"the criterion gives losses of shape {tuple(losses.shape)}: to weight samples or tasks, "
                             f"one of each is needed, {tuple(labels.shape)}: nn.BCELoss(reduction='none')")
        return losses

    if isinstance(model, MetaHeac):
        labels = labels[:, : model.tasks.num_embeddings]
        weights = (torch.ones_like(labels) if polisher is None
                   else polisher.weights(categorical_x, numerical_x, labels))
        half = -(-len(labels) // 2)  # of an odd number of rows the middle one is in both halves
        predictions = model.adapted((categorical_x[:half], numerical_x[:half]),
                                    lambda p: (losses_of(p, labels[:half]) * weights[:half]).mean(),
                                    (categorical_x[-half:], numerical_x[-half:]))
        return (losses_of(predictions, labels[-half:]) * weights[-half:]).mean(dim=0)
    predictions = model(categorical_x, numerical_x)
    labels = labels[:, : predictions.shape[1]]
    losses = losses_of(predictions, labels)
    if polisher is not None:
        losses = losses * polisher.weights(categorical_x, numerical_x, labels)
    losses = losses.mean(dim=0) if losses.ndim else losses
    inner = inner_of(model)
    return losses + inner.penalty(predictions) if isinstance(inner, AITM) else losses


def cross_entropy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy (B, T). Where a prediction is no number the loss is none either, and the loops say so;
    torch's own stops the program there, and on a GPU the whole device."""
    numbers = predictions.nan_to_num(0.5, 0.5, 0.5)
    return F.binary_cross_entropy(numbers, labels, reduction="none") + (predictions - predictions).detach()


def _diverged(what: str, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor] | None = None,
              polisher: Polisher | None = None) -> UserError:
    """The one line. It names the tensor: a parameter, the batch's numbers, the critics' weights; else predictions."""
    tensor = bad_tensor({"": model})
    if not tensor and batch is not None:
        if not torch.isfinite(batch[1]).all():
            tensor = "numerical_x"
        elif polisher is not None and not torch.isfinite(polisher.weights(*batch)).all():
            tensor = "the critics' weights"
    return UserError(f"training diverged: {what} (NaN or infinity in {tensor or 'predictions'}): try a smaller "
                     "--learning_rate; the last good epoch is kept")


def slpred(model: nn.Module, data_loader: Iterable[Any], task_num: int, device: torch.device | str) -> Predictions:
    """Predict; return for each of `task_num` tasks the predictions of all rows (n,), in the order of the loader.

    data_loader: as `sltrain`'s. Rows of a `Batches` that are equal are predicted once, by one of the processes.
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
    if isinstance(data_loader, Batches):
        distinct, place = data_loader.distinct
        (distinct,), _ = world.share([distinct])
        parts = [model(*(x.to(device) for x in data_loader.rows(rows)[:2]))
                 for rows in tqdm(distinct.split(data_loader.batch_size), **bar)]
        predictions, labels = world.gather(parts)[place.to(device)], data_loader.tensors[2]
    else:
        pairs = [(model(ids, numbers), labels) for ids, numbers, labels in
                 (_on_device(batch, device) for batch in tqdm(data_loader, **bar))]
        if not pairs:
            raise UserError("prediction: the data loader has no batches")
        predictions, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    for what, tensor in (("the model has", predictions), ("the labels have", labels)):
        if tensor.shape[1] < task_num:
            raise ValueError(f"{task_num} tasks are asked for, but {what} {tensor.shape[1]}")
    values = predictions[:, :task_num].cpu().numpy()
    bad = bad_column(values)
    if bad is not None:
        raise _diverged(f"predictions of task {bad} are no numbers", model)
    return values, labels[:, :task_num].cpu().numpy()


def evaluate(model: nn.Module, data_loader: Iterable[Any], task_num: int, device: torch.device | str,
             leave: bool = False) -> list[Metrics]:
    """AUC, logloss and s-Logloss of each task. Only a `Batches` knows the sessions; elsewhere each row is its own."""
    predictions, labels = _predict(model, data_loader, task_num, device, leave)
    session = data_loader.session if isinstance(data_loader, Batches) else np.arange(len(labels))
    return compute_metrics(list(predictions.T), labels, session)


def evaluation_batches(model: nn.Module, split: RetailRocketRLDataset, device: torch.device | str) -> Batches:
    """The resident loader that a model is evaluated on: of windows, if it sees the session."""
    return Batches(split, EVALUATION_BATCH, device, window=window_of(model))


@torch.no_grad()
def weights_against_loss(model: nn.Module, polisher: RlLossPolisher, split: RetailRocketRLDataset,
                         task_names: Sequence[str], device: torch.device, groups: int = 10) -> list[dict[str, float]]:
    """The samples of a split in ten groups of equal size, by their weight: per task and group the mean weight, the
    model's mean logloss and the share of positive labels."""
    batches = Batches(split, EVALUATION_BATCH, device, window=max(window_of(model), polisher.window))
    weights = torch.cat([polisher.weights(*batch) for batch in batches]).double().cpu().numpy()  # (n, T)
    polisher.seen.clear()
    predictions = np.column_stack(slpred(model, batches, weights.shape[1], device))
    losses = -reward_of(predictions, split.labels[:, : weights.shape[1]], "bce")
    rows: list[dict[str, float]] = [{} for _ in range(groups)]
    for task, name in enumerate(task_names[: weights.shape[1]]):
        order = np.argsort(weights[:, task], kind="stable")
        for row, group in zip(rows, np.array_split(order, groups), strict=True):
            row |= {f"{what}_{name}": float(values[group, task].mean())
                    for what, values in (("weight", weights), ("loss", losses), ("label", split.labels))}
    return rows


class Training:
    """What a run of `SLmain.py` has from epoch to epoch: optimizer, loaders, stopper, metrics; each epoch is committed.

    All that is random in an epoch is a function of (seed, epoch), so that a run that was stopped and goes on ends the
    same. A polish run that starts from a baseline is a fine-tuning, at a rate of its own: the model's own score, before
    the first epoch, is the one to beat.

    Args:
        model: what is trained.
        run: where each epoch is committed to; with `settings.resume` the run goes on from there.
        file: writes the best weights to a path, as a model file.
    """

    def __init__(self, model: nn.Module, splits: Splits, settings: SLArguments, run: RunFolder,
                 file: Callable[[Path, dict[str, Tensor]], None], device: torch.device,
                 polisher: RlLossPolisher | None = None) -> None:
        self.model, self.splits, self.settings, self.run, self.file = model, splits, settings, run, file
        self.device, self.polisher, self.task_names = device, polisher, splits.task_names[: settings.task_num]
        rate = settings.learning_rate * (settings.polish_rate if settings.finetunes else 1.0)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=settings.weight_decay, fused=True)
        self.stopper = EarlyStopper(settings.patience)
        self.train = Batches(splits.train, settings.batch_size, device, seed=settings.seed,
                             window=max(window_of(model), polisher.window if polisher is not None else 0))
        self.val, self.test = (evaluation_batches(model, split, device) for split in (splits.val, splits.test))
        self.weighting = make_weighting(settings.weighting, settings.task_num, settings.learning_rate, device)
        self.rows: list[dict[str, Any]] = []
        self.epoch, self.going = 0, True
        for split, title in ((splits.train, "training"), (splits.val, "validation"), (splits.test, "test")):
            _warn(leaking_features(split, title, self.task_names))

        self.origin = {"start": weights_digest(model), **({} if polisher is None else {"critics": polisher.digest})}
        state = run.open(settings.plain(), splits.manifest, splits.fingerprint, self.origin, settings.resume)
        if state is not None:
            with run.restoring():
                put_weights(model, state["stopper"]["best_state"])  # better refused now than at the end
                put_weights(model, state["model"])
                set_optim_param(self.optimizer, state["optimizer"])
                self.stopper.load_state_dict(state["stopper"])
                self.weighting.load_state_dict(state["weighting"])
                self.rows, self.epoch, self.going = state["metrics"], state["epoch"], state["going"]
                _curves(splits.task_names, self.rows)  # drawn at the end
            print(f"resuming after epoch {self.epoch}" + ("" if self.going else ": training had ended"))
        elif settings.finetunes:
            metrics = evaluate(model, self.val, settings.task_num, device)
            self.stopper.is_continuable(model, validation_score(metrics), 0)
            self.rows.append({"split": "val", "epoch": 0, "loss": float("nan"), **_named(splits, metrics)})

    def next_epoch(self) -> bool:
        """Begin the next epoch; False where there is none, because the stopper said so or it was the last one."""
        if not self.going or self.epoch >= self.settings.epoch:
            return False
        self.epoch += 1
        set_seed(self.settings.seed, self.epoch)
        self.train.epoch = self.epoch
        return True

    def commit(self, loss: float, metrics: Sequence[Metrics]) -> None:
        """Take an epoch's loss and validation metrics: keep the best weights, write what `--resume` needs."""
        self.going = self.stopper.is_continuable(self.model, validation_score(metrics), self.epoch)
        self.rows.append({"split": "val", "epoch": self.epoch, "loss": loss, **_named(self.splits, metrics)})
        if self.polisher is not None:
            self.rows[-1] |= self.polisher.summary(self.splits.task_names)
        print(f"epoch {self.epoch}: loss {loss:.4f}, validation AUC "
              + ", ".join(f"{name} {one.auc:.4f}" for name, one in zip(self.splits.task_names, metrics, strict=False)))
        if self.stopper.best_epoch == self.epoch:
            self.file(self.run.model, self.stopper.best_state)
        save_tensors(self.run.state, {
            "epoch": self.epoch, "going": self.going, "model": self.model.state_dict(), "metrics": self.rows,
            "optimizer": get_optim_param(self.optimizer), "stopper": self.stopper.state_dict(),
            "weighting": self.weighting.state_dict(), "settings": self.settings.plain(),
            "fingerprint": self.splits.fingerprint, "origin": self.origin})

    def take_best(self) -> None:
        """Give the model its best weights, and write them."""
        if self.going:
            print(f"stopped after epoch {self.rows[-1]['epoch']}, the last one (--epoch): validation AUC may still "
                  "rise")
        self.model.load_state_dict(self.stopper.best_state)
        self.file(self.run.model, self.stopper.best_state)

    def finish(self, metrics: Sequence[Metrics]) -> None:
        """Take the test metrics of the best weights: write the table of metrics and the curves."""
        rows, names, best_epoch = self.rows, self.task_names, self.stopper.best_epoch
        self.run.write_metrics([*rows, {"split": "test", "epoch": best_epoch, **_named(self.splits, metrics)}])
        best = next(row for row in rows if row["epoch"] == best_epoch)
        _warn(leaking_scores([best[f"auc_{name}"] for name in names], "validation", names))
        _warn(leaking_scores([one.auc for one in metrics], "test", names))
        plot_panels(self.run.curves, _curves(self.splits.task_names, rows), [row["epoch"] for row in rows],
                    mark=best_epoch, title=self.run.name)
        if self.polisher is not None:
            trained = [row for row in rows if row["epoch"]]
            plot_panels(self.run.weights, _weight_curves(self.splits.task_names, trained),
                        title=f"weights of {self.run.name}")


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def validation_score(metrics: Sequence[Metrics]) -> float:
    """What early stopping watches: the mean AUC of the tasks that have one, else minus the mean logloss."""
    known = [one.auc for one in metrics if np.isfinite(one.auc)]
    return float(np.mean(known)) if known else -float(np.mean([one.logloss for one in metrics]))


def _named(splits: Splits, metrics: Sequence[Metrics]) -> dict[str, float]:
    return {f"{figure}_{name}": value for name, one in zip(splits.task_names, metrics, strict=False)
            for figure, value in one._asdict().items()}


def _curves(tasks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    tasks = [name for name in tasks if f"auc_{name}" in rows[0]]
    return {
        "training loss": {"loss": [row["loss"] for row in rows]},
        "validation AUC": {name: [row[f"auc_{name}"] for row in rows] for name in tasks},
        "validation logloss": {name: [row[f"logloss_{name}"] for row in rows] for name in tasks},
    }


def _weight_curves(tasks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    titles = {"q05": "5 % quantile", "q50": "median", "q95": "95 % quantile"}
    named = [name for name in tasks if f"weight_q50_{name}" in rows[0]]
    curves = {f"{name}: weights": {title: [row[f"weight_{key}_{name}"] for row in rows]
                                   for key, title in titles.items()} for name in named}
    curves["effective sample size"] = {name: [row[f"weight_ess_{name}"] for row in rows] for name in named}
    curves["share of weights at 1"] = {name: [row[f"weight_at_1_{name}"] for row in rows] for name in named}
    return curves
