"""Train a multi-task model on logged sessions; or polish it with the weights of critics.

    python3 SLmain.py --model_name=esmm            # a baseline: chkpt/SL/rt_esmm, pretrain/rt_esmm.pt
    python3 SLmain.py --model_name=ple --polish=1  # fine-tune with w = 1 - 1 Q(s, a); RLmain.py makes the critics
    python3 SLmain.py --model_name=ple --polish=1 --polish_method=constant  # the control: weights of 1
    python3 SLmain.py --model_name=ple --weighting=uncertainty  # other ways to weight the tasks
    python3 SLmain.py --model_name=esmm --encoder=gru    # a model that sees the session so far: chkpt/SL/rt_esmm_gru
    python3 SLmain.py --model_name=esmm --resume   # go on where a run was stopped
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program begins: Ctrl-C while torch loads is no traceback

import numpy as np
import torch
from torch import Tensor, nn

from dataset.files import check_writable, exit_on_user_error, only_run
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.vocabulary import map_splits
from train.Arguments import SLArguments, parse
from train.checkpoint import RunFolder, load_weights, save_model, set_aside, weights_digest, write_rows
from train.memory import check_training, size_of
from train.metrics import Metrics, compute_metrics, measure
from train.polish import find_critics, make_polisher, summary
from train.run import (
    Training,
    cross_entropy,
    evaluate,
    evaluation_batches,
    get_dataset,
    get_model,
    slpred,
    sltest,
    sltrain,
    weights_against_loss,
)
from train.utils import pick_device, set_seed


def main(dataset_name: str = "rt", dataset_path: str = "dataset", task_num: int = 2, expert_num: int = 8,
         model_name: str = "esmm", epoch: int = 50, learning_rate: float = 1e-3, feature_map_rate: float = 0.2,
         batch_size: int = 2048, embed_dim: int = 128, weight_decay: float = 1e-6, polish_lambda: float = 0.0,
         device: str = "auto", save_dir: str = "chkpt/SL", **more: Any) -> list[Metrics]:
    """Train, test and save one model; `more` are further fields of `SLArguments`. Return the test metrics per task.

    Raises UserError for whatever is the user's to mend.
    """
    settings = SLArguments(
        dataset_name=dataset_name, dataset_path=dataset_path, task_num=task_num, expert_num=expert_num,
        model_name=model_name, epoch=epoch, learning_rate=learning_rate, feature_map_rate=feature_map_rate,
        batch_size=batch_size, embed_dim=embed_dim, weight_decay=weight_decay, polish_lambda=polish_lambda,
        device=device, save_dir=save_dir, **more)
    if not settings.polish_lambda:
        return alone(train_baseline, settings)
    if settings.polish_method != "constant":
        find_critics(settings)  # better refused now than after the baseline's training
    if not settings.baseline(model_name).exists() and settings.weighting == "equal":
        print(f"{settings.baseline(model_name)}: no baseline of {model_name} yet: it is trained first\n")
        alone(train_baseline, replace(settings, polish_lambda=0.0, polish_method="full", critic_from=""))
        print(f"\nnow polishing {model_name}")
    return alone(polish, settings)


def alone(work: Callable[[SLArguments, RunFolder, torch.device], list[Metrics]],
          settings: SLArguments) -> list[Metrics]:
    """Do a run as the only one that writes to its folder and, if it makes one, to the baseline. Raises UserError."""
    device, run = pick_device(settings.device, settings.precision), settings.run
    makes_baseline = not settings.polish_lambda and settings.weighting == "equal"
    with only_run(run.books, *([settings.baseline(settings.model_name)] if makes_baseline else [])):
        return work(settings, run, device)


def train_baseline(settings: SLArguments, run: RunFolder, device: torch.device) -> list[Metrics]:
    """From the tables to a tested model, which later runs start from."""
    baseline = settings.baseline(settings.model_name)
    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical)
    check_writable(run.books, baseline.parent, files=[*run.files, baseline])
    catemapper = map_splits(splits, settings.feature_map_rate)
    metadata = settings.metadata(settings.model_name, splits.train.metadata)

    def write(path: Path, weights: dict[str, Tensor]) -> None:
        save_model(path, weights, metadata, catemapper, settings.trained_with)

    model = fresh_model(settings, splits, device)
    training = Training(model, splits, settings, run, write, device)
    fit(training)
    training.take_best()
    metrics = test(training)
    training.finish(metrics)
    catemapper.save(run.catemapper)
    saved = [run.model]
    if settings.weighting == "equal":  # other weightings are measured against the baseline, and leave it alone
        set_aside(baseline, metadata, settings.trained_with)
        write(baseline, training.stopper.best_state)
        saved.append(baseline)
    print(f"saved {' and '.join(map(str, saved))}; curves: {run.curves}")
    return metrics


def polish(settings: SLArguments, run: RunFolder, device: torch.device) -> list[Metrics]:
    """From a baseline and critics to a model fine-tuned with their weights."""
    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical)
    check_writable(run.books, files=run.files)
    catemapper = map_splits(splits, settings.feature_map_rate)
    metadata = settings.metadata(settings.model_name, splits.train.metadata)

    def write(path: Path, weights: dict[str, Tensor]) -> None:
        save_model(path, weights, metadata, catemapper, settings.trained_with)

    model = fresh_model(settings, splits, device)
    scratch = copy.deepcopy(model.state_dict())  # where the baseline itself began: with weights of 1 it comes out again
    load_weights(settings.baseline(settings.model_name), model, metadata,
                 "give the same settings as then, or train the baseline again: "
                 + settings.command("SLmain.py", "model_name", settings.model_name))
    baseline = evaluate(model, evaluation_batches(model, splits.test, device), settings.task_num, device)
    polisher = make_polisher(model, settings, metadata, device)
    if settings.polish_start == "scratch":
        model.load_state_dict(scratch)
    start = weights_digest(model)
    weights = weights_against_loss(model, polisher, splits.val, splits.task_names, device)
    training = Training(model, splits, settings, run, write, device, polisher)
    fit(training)
    write(run.last, model.state_dict())
    last = evaluate(model, training.test, settings.task_num, device)
    training.take_best()
    metrics = test(training)
    training.finish(metrics)
    write_rows(run.weights_table, weights)

    print("\n" + summary(settings, start, baseline, metrics, last, splits.task_names))
    if training.stopper.best_epoch == 0:
        print("no epoch beat the baseline on validation: the weights are the baseline's")
    print(f"saved {run.model} and, of the last epoch, {run.last}; weights: {run.weights}, curves: {run.curves}")
    return metrics


def fit(training: Training) -> None:
    """Train until validation no longer improves."""
    model, device, splits = training.model, training.device, training.splits
    while training.next_epoch():
        loss = sltrain(model, training.optimizer, training.train, cross_entropy, device, training.polisher,
                       weighting=training.weighting)
        predictions = slpred(model, training.val, training.settings.task_num, device)
        training.commit(loss, compute_metrics(predictions, splits.val.labels, splits.val.session))


def test(training: Training) -> list[Metrics]:
    """Print the documented result on the test split, then what it is measured against."""
    split, names = training.splits.test, training.task_names
    print("\n" + ", ".join(f"task {task} = {name}" for task, name in enumerate(names))
          + "; 'best auc' is the mean over the tasks on the validation split, the lines below it are the test split")
    print(f"test: best auc: {training.stopper.best_accuracy}", flush=True)
    aucs, loglosses = sltest(training.model, training.test, len(names), training.device)
    for task, (auc, logloss) in enumerate(zip(aucs, loglosses, strict=True)):
        print(f"task {task}, AUC {auc}, Log-loss {logloss}")
    predictions = slpred(training.model, training.test, len(names), training.device)
    metrics = compute_metrics(predictions, split.labels, split.session)
    print("s-Logloss, the mean over sessions: " + ", ".join(f"task {task} {one.session_logloss:.4f}"
                                                            for task, one in enumerate(metrics)))
    for task, one in enumerate(metrics):
        print_possible(split, task, one)
    return metrics


def fresh_model(settings: SLArguments, splits: Splits, device: torch.device) -> nn.Module:
    """The untrained model of the settings; the same seed gives the same weights. One whose training would not fit is
    refused before it takes any memory: UserError."""
    field_dims = splits.train.field_dims
    build = partial(get_model, settings.model_name, field_dims, splits.train.numerical_num, settings.task_num,
                    settings.expert_num, settings.embed_dim, settings.dropout, settings.calibrator, settings.encoder,
                    settings.window, settings.bottom_mlp_dims, settings.tower_mlp_dims)
    check_training(size_of(build, field_dims, settings.embed_dim), settings.model_name,
                   min(settings.batch_size, len(splits.train)), device)
    set_seed(settings.seed)
    return build().to(device)


def print_possible(test: RetailRocketRLDataset, task: int, metrics: Metrics) -> None:
    """Print the best possible AUC where the truth is known, and why there is none where there is none."""
    if np.isnan(metrics.auc):
        print(f"task {task}: AUC is nan, because every label of the test split is {test.labels[0, task]:.0f}")
    elif test.best is not None:
        best = measure(test.best[:, task], test.labels[:, task], test.session).auc
        print(f"task {task}, best possible AUC {best:.4f} (simulated data: the true probabilities); the model is "
              f"{(metrics.auc - 0.5) / (best - 0.5):.0%} of the way from 0.5")


@partial(exit_on_user_error, resumes=True)
def _command() -> None:
    main(**vars(parse(SLArguments, __doc__ or "")))


if __name__ == "__main__":
    _command()
