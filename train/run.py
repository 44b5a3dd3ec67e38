"""The loops: they are handed models, loaders, environments and agents.

Supervised: `get_dataset`, `get_model`, `sltrain`, `sltest`, `slpred`, and `slfit`, the run from the first epoch to the
best model. The loops of offline RL are in `train.offline` and can be had from here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from dataset.rtrl import Batches, Numerical, RetailRocketRLDataset, Splits, load_splits
from dataset.simulate import Size, simulate
from layers.session import inner_of, window_of
from slmodels import AITM, MetaHeac, build
from train import world
from train.Arguments import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, SLArguments
from train.checkpoint import RunFolder, put_weights, save_model, save_tensors
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
from train.utils import EarlyStopper, Metrics, get_optim_param, measure, set_optim_param, set_seed, weights_digest
from train.weighting import Weighting, make_weighting

__all__ = [
    "discounted_returns",
    "evaluate",
    "get_dataset",
    "get_model",
    "one_iter_offline",
    "plot_loss",
    "rank_correlation",
    "slfit",
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

    window: int

    digest: str  # of the critics

    def weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor: ...

    def summary(self, task_names: Sequence[str]) -> dict[str, float]: ...


def get_dataset(name: str, path: str, numerical: str = "session") -> Splits:
    """Read the MDP tables in the folder `path`/`name`; where `rt` is absent it is simulated first.

    Raises UserError where the folder is incomplete or a file in it is wrong.
    """
    folder = Path(path) / name
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if name != "rt":
            raise UserError(f"{folder}: no such data set: make it with python3 -m dataset.prepare --raw DIR "
                            f"--out {folder} (KuaiRand: --source kuairand)")
        raw = Path(path) / "simulated"
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
              window: int = 10) -> nn.Module:
    """Build a model of `slmodels` with the documented widths. Raises UserError, with the list, for an unknown name.

    calibrator: weight of AITM's behavioural-expectation calibrator; no other model has one.
    encoder, window: what it sees of the session (`layers.session`), or none.
    """
    try:
        model = build(name, categorical_field_dims, numerical_num, embed_dim, BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, task_num,
                      expert_num, dropout, encoder, window)
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


def sltrain(model: nn.Module, optimizer: torch.optim.Optimizer, data_loader: Batches,
            criterion: Callable[[Tensor, Tensor], Tensor], device: torch.device | str,
            polisher: Polisher | None = None, log_interval: int = 100, weighting: Weighting | None = None) -> float:
    """Train for one epoch; with several processes (`train.world`) each works on its share of every batch.

    Args:
        criterion: predictions and labels (B, T) to losses, (B, T) or their mean ().
        polisher: weights the losses of samples and tasks; it needs a criterion that does not average.
        log_interval: steps between two updates of the loss in the progress bar.
        weighting: how the tasks' losses become one step; default equal. It needs a criterion that does not average.

    Returns:
        The mean loss of the epoch. Raises UserError where a loss or a parameter is no number, before the step is made
        (on a GPU: within `log_interval` steps), naming task, batch and tensor.
    """
    model.train()
    weighting = weighting or Weighting()
    total, rows = torch.zeros((), device=device), 0
    watch, last = FirstBad(device, log_interval), len(data_loader)
    with tqdm(data_loader, "train", unit="batch", leave=False, disable=None) as bar:
        for step, (categorical_x, numerical_x, labels) in enumerate(bar, start=1):
            (categorical_x, numerical_x, labels), part = world.share(
                [x.to(device) for x in (categorical_x, numerical_x, labels)])
            losses = _losses(model, categorical_x, numerical_x, labels, criterion, polisher)
            if bad := watch.see(step, losses, step == last):
                raise _diverged(f"the loss of task {bad[0]} is no number at epoch {data_loader.epoch}, step {bad[1]}",
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
    total, count = world.total(torch.stack([total, torch.tensor(rows, dtype=total.dtype, device=total.device)]))
    mean = float(total / count)
    if not np.isfinite(mean) or bad_tensor({"": model}):
        raise _diverged(f"after epoch {data_loader.epoch}, step {last}, the mean loss is {mean}", model)
    return mean


def _losses(model: nn.Module, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor,
            criterion: Callable[[Tensor, Tensor], Tensor], polisher: Polisher | None) -> Tensor:
    """The tasks' mean losses (T,) on a batch, its samples weighted; where the criterion averages, their mean ().

    AITM's come with its calibrator, MetaHeac's after its step on half of the batch.
    """
    if isinstance(model, MetaHeac):
        labels = labels[:, : model.tasks.num_embeddings]
        weights = (torch.ones_like(labels) if polisher is None
                   else polisher.weights(categorical_x, numerical_x, labels))
        half = -(-len(labels) // 2)  # of an odd number of rows the middle one is in both halves
        predictions = model.adapted((categorical_x[:half], numerical_x[:half]),
                                    lambda p: (criterion(p, labels[:half]) * weights[:half]).mean(),
                                    (categorical_x[-half:], numerical_x[-half:]))
        return (criterion(predictions, labels[-half:]) * weights[-half:]).mean(dim=0)
    predictions = model(categorical_x, numerical_x)
    labels = labels[:, : predictions.shape[1]]
    losses = criterion(predictions, labels)
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


@torch.no_grad()
def slpred(model: nn.Module, data_loader: Batches, task_num: int, device: torch.device | str) -> Predictions:
    """Predict; return for each of `task_num` tasks the predictions of all rows (n,), in the order of the data set.

    Rows that are equal are predicted once (`Batches.distinct`), by one of the processes.
    """
    model.eval()
    distinct, place = data_loader.distinct
    (distinct,), _ = world.share([distinct])
    parts = [model(*(x.to(device) for x in data_loader.rows(rows)[:2]))
             for rows in tqdm(distinct.split(data_loader.batch_size), "predict", unit="batch", leave=False,
                              disable=None)]
    whole = world.gather(parts)[place.to(device)].cpu().numpy()
    return [whole[:, task] for task in range(task_num)]


def sltest(model: nn.Module, data_loader: Batches, task_num: int,
           device: torch.device | str) -> tuple[list[float], list[float]]:
    """Test; return AUC per task (nan where there is one class only) and logloss per task."""
    metrics = evaluate(model, data_loader, task_num, device)
    return [one.auc for one in metrics], [one.logloss for one in metrics]


def evaluate(model: nn.Module, data_loader: Batches, task_num: int, device: torch.device | str) -> list[Metrics]:
    """AUC, logloss and s-Logloss of each task."""
    labels = data_loader.tensors[2].cpu().numpy()
    predictions = slpred(model, data_loader, task_num, device)
    bad = bad_column(np.column_stack(predictions))
    if bad is not None:
        raise _diverged(f"predictions of task {bad} are no numbers", model)
    return [measure(predictions[task], labels[:, task], data_loader.session) for task in range(task_num)]


def evaluate_split(model: nn.Module, split: RetailRocketRLDataset, task_num: int,
                   device: torch.device | str) -> list[Metrics]:
    """AUC, logloss and s-Logloss of each task on a split."""
    return evaluate(model, Batches(split, EVALUATION_BATCH, device, window=window_of(model)), task_num, device)


def slfit(model: nn.Module, splits: Splits, settings: SLArguments, run: RunFolder, identity: dict[str, Any],
          device: torch.device, polisher: Polisher | None = None) -> tuple[EarlyStopper, list[Metrics]]:
    """Train until validation no longer improves; return the stopper, which has the best weights, and test metrics.

    A polish run that starts from a baseline is a fine-tuning, at a rate of its own: the model's own score, before the
    first epoch, is the one to beat.

    Each epoch ends with a commit to `run`. All that is random in an epoch is a function of (seed, epoch), so that a
    run that was stopped and goes on ends the same. At the end the model has its best weights.
    """
    rate = settings.learning_rate * (settings.polish_rate if settings.finetunes else 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=settings.weight_decay, fused=True)
    stopper = EarlyStopper(settings.patience)
    window = window_of(model)
    train = Batches(splits.train, settings.batch_size, device, seed=settings.seed,
                    window=max(window, polisher.window if polisher is not None else 0))
    val = Batches(splits.val, EVALUATION_BATCH, device, window=window)
    weighting = make_weighting(settings.weighting, settings.task_num, settings.learning_rate, device)
    rows: list[dict[str, Any]] = []
    first, going = 1, True
    names = splits.task_names[: settings.task_num]
    for split, title in ((splits.train, "training"), (splits.val, "validation"), (splits.test, "test")):
        _warn(leaking_features(split, title, names))

    origin = {"start": weights_digest(model), **({} if polisher is None else {"critics": polisher.digest})}
    state = run.open(asdict(settings), splits.manifest, splits.fingerprint, origin, settings.resume)
    if state is not None:
        with run.restoring():
            put_weights(model, state["stopper"]["best_state"])  # better refused now than at the end
            put_weights(model, state["model"])
            set_optim_param(optimizer, state["optimizer"])
            stopper.load_state_dict(state["stopper"])
            weighting.load_state_dict(state["weighting"])
            rows, first, going = state["metrics"], state["epoch"] + 1, state["going"]
            _curves(splits.task_names, rows)  # drawn at the end
        print(f"resuming after epoch {state['epoch']}" + ("" if going else ": training had ended"))
    elif settings.finetunes:
        metrics = evaluate(model, val, settings.task_num, device)
        stopper.is_continuable(model, validation_score(metrics), 0)
        rows.append({"split": "val", "epoch": 0, "loss": float("nan"), **_named(splits, metrics)})
    for epoch in range(first, settings.epoch + 1):
        if not going:
            break
        set_seed(settings.seed, epoch)
        train.epoch = epoch
        loss = sltrain(model, optimizer, train, cross_entropy, device, polisher, weighting=weighting)
        metrics = evaluate(model, val, settings.task_num, device)
        going = stopper.is_continuable(model, validation_score(metrics), epoch)
        rows.append({"split": "val", "epoch": epoch, "loss": loss, **_named(splits, metrics)})
        if polisher is not None:
            rows[-1] |= polisher.summary(splits.task_names)
        print(f"epoch {epoch}: loss {loss:.4f}, validation AUC "
              + ", ".join(f"{name} {one.auc:.4f}" for name, one in zip(splits.task_names, metrics, strict=False)))
        if stopper.best_epoch == epoch:
            save_model(run.model, stopper.best_state, identity)
        save_tensors(run.state, {"epoch": epoch, "going": going, "model": model.state_dict(), "metrics": rows,
                                 "optimizer": get_optim_param(optimizer), "stopper": stopper.state_dict(),
                                 "weighting": weighting.state_dict(),
                                 "settings": asdict(settings), "fingerprint": splits.fingerprint, "origin": origin})
    if going:
        print(f"stopped after epoch {rows[-1]['epoch']}, the last one (--epoch): validation AUC may still rise")
    model.load_state_dict(stopper.best_state)
    save_model(run.model, stopper.best_state, identity)
    metrics = evaluate_split(model, splits.test, settings.task_num, device)
    run.write_metrics([*rows, {"split": "test", "epoch": stopper.best_epoch, **_named(splits, metrics)}])
    best = next(row for row in rows if row["epoch"] == stopper.best_epoch)
    _warn(leaking_scores([best[f"auc_{name}"] for name in names], "validation", names))
    _warn(leaking_scores([one.auc for one in metrics], "test", names))
    plot_panels(run.curves, _curves(splits.task_names, rows), [row["epoch"] for row in rows], mark=stopper.best_epoch,
                title=run.name)
    if polisher is not None:
        trained = [row for row in rows if row["epoch"]]
        plot_panels(run.weights, _weight_curves(splits.task_names, trained), title=f"weights of {run.name}")
    return stopper, metrics


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
