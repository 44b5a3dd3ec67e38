"""Train a multi-task model on logged sessions; or polish it with the weights of critics.

    python3 SLmain.py --model_name=esmm            # a baseline: chkpt/SL/rt_esmm, pretrain/rt_esmm.pt
    python3 SLmain.py --model_name=ple --polish=1  # fine-tune with w = 1 - 1 Q(s, a); RLmain.py makes the critics
    python3 SLmain.py --model_name=ple --polish=1 --polish_method=constant  # the control: constant weights
    python3 SLmain.py --model_name=ple --weighting=uncertainty  # other ways to weight the tasks
    python3 SLmain.py --model_name=esmm --encoder=gru    # a model that reads the session so far: chkpt/SL/rt_esmm_gru
    python3 SLmain.py --model_name=esmm --resume   # continue a stopped run
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common.startup import before_torch
from train.Arguments import SLArguments, parse

if __name__ == "__main__":
    before_torch(lambda: parse(SLArguments, __doc__ or "").check_files())

import numpy as np
import torch
from torch import Tensor, nn

from common import distributed
from common.checkpoint import load_weights, state_dict_hash
from common.csv_reader import write_csv
from common.device import pick_device, set_seed
from common.errors import UserError, cli_entry_point
from common.fileio import check_writable, exclusive_lock
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.vocabulary import Catemapper, encode_splits
from layers import set_embedding_dropout, standardize
from slmodels.model_file import keep_previous, save_model
from train.metrics import Metrics, compute_metrics, task_metrics
from train.polish import RlLossPolisher, comparison_table, make_polisher
from train.run import get_dataset, get_model, slpred, sltest, sltrain
from train.supervised import Training, bce_loss, evaluate, evaluation_loader, loss_by_weight_decile
from train.task_weighting import make_task_weighting
from train.tracking import Trackers
from train.utils import EarlyStopper


def main(dataset_name: str = "rt", dataset_path: str = "dataset", task_num: int = 0, expert_num: int = 8,
         model_name: str = "esmm", epoch: int = 50, learning_rate: float = 1e-3, feature_map_rate: float = 0.2,
         batch_size: int = 2048, embed_dim: int = 128, weight_decay: float = 1e-6, polish_lambda: float = 0.0,
         device: str = "auto", save_dir: str = "chkpt/SL", **more: Any) -> list[Metrics]:
    """Train, test and save one model; `more` are further fields of `SLArguments`. Return the test metrics per task.

    Raises UserError for a mistake of the user.
    """
    settings = SLArguments(
        dataset_name=dataset_name, dataset_path=dataset_path, task_num=task_num, expert_num=expert_num,
        model_name=model_name, epoch=epoch, learning_rate=learning_rate, feature_map_rate=feature_map_rate,
        batch_size=batch_size, embed_dim=embed_dim, weight_decay=weight_decay, polish_lambda=polish_lambda,
        device=device, save_dir=save_dir, **more)
    settings.check_files()
    if not settings.polish_lambda:
        return run_exclusively(train_baseline, settings)
    baseline = settings.baseline(model_name)
    if not baseline.exists() and settings.weighting == "equal":
        print(f"{baseline}: no baseline of {model_name} yet: it is trained first\n")
        run_exclusively(train_baseline, replace(settings, polish_lambda=0.0, polish_method="full", critic_model=""))
        print(f"\nnow polishing {model_name}")
    return run_exclusively(polish, settings)


def run_exclusively(work: Callable[[SLArguments, torch.device], list[Metrics]],
                    settings: SLArguments) -> list[Metrics]:
    """Do a run as the only one that writes to its directory and, if it makes one, to the baseline. Raises UserError."""
    device = pick_device(settings.device, settings.precision)
    if settings.shard_embeddings and distributed.world_size() == 1:
        raise UserError("--shard_embeddings: there is one process, and it has the whole tables: leave the switch out, "
                        "or start several processes: torchrun --nproc_per_node=2 SLmain.py ...")
    makes_baseline = not settings.polish_lambda and settings.weighting == "equal"
    with exclusive_lock(settings.run_dir.path, *[settings.baseline(settings.model_name)] * makes_baseline):
        return work(settings, device)


def train_baseline(settings: SLArguments, device: torch.device) -> list[Metrics]:
    """From the tables to a tested model, which later runs start from."""
    run_dir, baseline = settings.run_dir, settings.baseline(settings.model_name)
    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical, settings.task_num,
                         settings.data)
    check_writable(run_dir.path, baseline.parent, files=[*run_dir.files, baseline])
    catemapper = encode_splits(splits, settings.feature_map_rate)
    model = init_model(settings, splits, device)
    training = make_training(settings, splits, catemapper, model, device)
    training.start(settings.plain(), settings.resume)
    fit(training, settings.epoch)
    training.restore_best()
    metrics = test(training)
    training.finish(metrics)
    catemapper.save(run_dir.catemapper)
    saved = [run_dir.model]
    if settings.weighting == "equal":  # other task weightings are measured against the baseline, and leave it alone
        keep_previous(baseline, settings.metadata(settings.model_name, splits.train.metadata), settings.trained_with)
        training.save_model(baseline, training.stopper.best_state)
        saved.append(baseline)
    print(f"saved {' and '.join(map(str, saved))}; curves: {run_dir.curves}")
    return metrics


def polish(settings: SLArguments, device: torch.device) -> list[Metrics]:
    """From a baseline and critics to a model fine-tuned with their weights."""
    run_dir = settings.run_dir
    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical, settings.task_num,
                         settings.data)
    check_writable(run_dir.path, files=run_dir.files)
    catemapper = encode_splits(splits, settings.feature_map_rate)
    model = init_model(settings, splits, device)
    initial_state = copy.deepcopy(model.state_dict())  # the baseline's own: constant weights reproduce the baseline
    load_baseline(settings, splits, model)
    names = splits.task_names
    baseline_metrics = evaluate(model, evaluation_loader(model, splits.test, device), len(names), device)
    polisher = make_polisher(settings, splits.train.metadata, model, device)
    if settings.polish_init == "scratch":
        model.load_state_dict(initial_state)
    start = state_dict_hash(model)
    deciles = loss_by_weight_decile(model, polisher, splits.val, names, device)
    training = make_training(settings, splits, catemapper, model, device, polisher)
    training.start(settings.plain(), settings.resume, warm_start=settings.is_finetuning)
    fit(training, settings.epoch)
    training.save_model(run_dir.last_model, model.state_dict())
    last_metrics = evaluate(model, training.test_loader, len(names), device)
    training.restore_best()
    metrics = test(training)
    training.finish(metrics)
    write_csv(run_dir.weight_deciles, deciles)

    print("\n" + comparison_table(settings, start, baseline_metrics, metrics, last_metrics, names))
    if training.stopper.best_epoch == 0:
        print("no epoch beat the baseline on validation: the weights are the baseline's")
    weights = ""
    if polisher.method != "constant":
        last = training.history[-1]
        print("the loss of an epoch is the weighted one; mean weight in the last epoch: "
              + ", ".join(f"{name} {last.get(f'weight_mean_{name}', float('nan')):.2f}" for name in names))
        weights = f"weights: {run_dir.weights_plot}, "
    print(f"saved {run_dir.model} and, of the last epoch, {run_dir.last_model}; {weights}curves: {run_dir.curves}")
    return metrics


def init_model(settings: SLArguments, splits: Splits, device: torch.device) -> nn.Module:
    """The untrained model of the settings; the same seed gives the same weights."""
    set_seed(settings.seed)
    model = get_model(settings.model_name, splits.train.field_dims, splits.train.numerical_num, len(splits.task_names),
                      settings.expert_num, settings.embed_dim, settings.dropout, settings.calibrator_weight,
                      settings.encoder, settings.window, settings.bottom_mlp_dims, settings.tower_mlp_dims,
                      splits.given)
    standardize(model, torch.from_numpy(splits.train.numerical))
    set_embedding_dropout(model, settings.embed_dropout)
    return model.to(device)


def load_baseline(settings: SLArguments, splits: Splits, model: nn.Module) -> None:
    """Give the model the weights of its baseline. Raises UserError where there is none that fits."""
    name = settings.model_name
    load_weights(settings.baseline(name), model, settings.metadata(name, splits.train.metadata),
                 "give the same settings as then, or train the baseline again: "
                 + settings.suggest_command("SLmain.py", "model_name", name))


def make_training(settings: SLArguments, splits: Splits, catemapper: Catemapper, model: nn.Module,
                  device: torch.device, polisher: RlLossPolisher | None = None) -> Training:
    """A run of the settings."""
    metadata = {**settings.metadata(settings.model_name, splits.train.metadata),
                "dataset_name": settings.dataset_name, "numerical_names": splits.train.numerical_names}

    def save(path: Path, state: Mapping[str, Tensor]) -> None:
        save_model(path, state, metadata, catemapper, settings.trained_with)

    parameters: Any = model.parameters()
    if settings.shard_embeddings:
        from layers.sharding import parameter_groups, shard_embeddings

        shard_embeddings(model)
        parameters = parameter_groups(model)
    rate = settings.learning_rate * (settings.polish_lr_ratio if settings.is_finetuning else 1.0)
    return Training(
        model, splits,
        torch.optim.Adam(parameters, lr=rate, weight_decay=settings.weight_decay, fused=True),
        EarlyStopper(settings.patience), settings.run_dir, save, device, batch_size=settings.batch_size,
        seed=settings.seed, polisher=polisher,
        weighting=make_task_weighting(settings.weighting, len(splits.task_names), settings.learning_rate, device),
        trackers=Trackers(settings.track))


def fit(training: Training, epochs: int, after_epoch: Callable[[], None] | None = None) -> None:
    """Train until validation no longer improves; `after_epoch` is called before an epoch's validation."""
    model, device, val = training.model, training.device, training.splits.val
    while training.next_epoch(epochs):
        loss = sltrain(model, training.optimizer, training.train_loader, bce_loss, device, training.polisher,
                       weighting=training.weighting)
        if after_epoch is not None:
            after_epoch()
        predictions = slpred(model, training.val_loader, len(training.task_names), device)
        training.end_epoch(loss, compute_metrics(predictions, val.labels, val.session, val.user))


def test(training: Training) -> list[Metrics]:
    """Print the documented result on the test split, then what it is measured against."""
    split, names = training.splits.test, training.task_names
    print("\n" + ", ".join(f"task {task} = {name}" for task, name in enumerate(names))
          + "; 'best auc' is the mean over the tasks on the validation split, the lines below it are the test split")
    print(f"test: best auc: {training.stopper.best_accuracy}", flush=True)
    aucs, loglosses = sltest(training.model, training.test_loader, len(names), training.device)
    for task, (auc, logloss) in enumerate(zip(aucs, loglosses, strict=True)):
        print(f"task {task}, AUC {auc}, Log-loss {logloss}")
    predictions = slpred(training.model, training.test_loader, len(names), training.device)
    metrics = compute_metrics(predictions, split.labels, split.session, split.user)
    for title, metric in (("s-Logloss, the mean over sessions", "session_logloss"),
                          ("s-GAUC, the AUC inside a session, weighted by impressions", "session_gauc"),
                          ("u-GAUC, the same of users", "user_gauc")):
        print(f"{title}: " + ", ".join(f"task {task} {getattr(of_task, metric):.4f}"
                                       for task, of_task in enumerate(metrics)))
    for task, of_task in enumerate(metrics):
        print_oracle_auc(split, task, of_task)
    return metrics


def print_oracle_auc(test: RetailRocketRLDataset, task: int, metrics: Metrics) -> None:
    """Print the best possible AUC where the true probabilities are known; and why an AUC is nan."""
    if np.isnan(metrics.auc):
        print(f"task {task}: AUC is nan, because every label of the test split is {test.labels[0, task]:.0f}")
    elif test.oracle_probabilities is not None:
        best = task_metrics(test.oracle_probabilities[:, task], test.labels[:, task], test.session, test.user).auc
        print(f"task {task}, best possible AUC {best:.4f} (simulated data: the true probabilities); the model is "
              f"{(metrics.auc - 0.5) / (best - 0.5):.0%} of the way from 0.5")


@partial(cli_entry_point, resumable=True)
def cli() -> None:
    main(**vars(parse(SLArguments, __doc__ or "")))


if __name__ == "__main__":
    cli()
