"""Train a multi-task model on logged sessions: the baseline of RMTL.

    python3 SLmain.py --model_name=esmm          # train, test and save a baseline: chkpt/SL/rt_esmm, pretrain/
    python3 SLmain.py --model_name=mmoe --seed=1 --numerical=none
    python3 SLmain.py --model_name=esmm --resume  # go on where a run was stopped
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dataset.files import check_writable, exit_on_user_error
from dataset.rtrl import Splits
from train.Arguments import SLArguments, parse
from train.checkpoint import RunFolder, model_identity, save_model
from train.run import get_dataset, get_model, slfit
from train.utils import Catemapper, Metrics, measure, pick_device, set_seed


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
        batch_size=batch_size, embed_dim=embed_dim, weight_decay=weight_decay, device=device, save_dir=save_dir, **more)
    return train_baseline(settings)


def train_baseline(settings: SLArguments) -> list[Metrics]:
    """One run from the tables to the tested model."""
    device = pick_device(settings.device)
    run = RunFolder(settings.save_dir, settings.dataset_name, settings.model_name)
    baseline = Path(settings.pretrain_path) / f"{settings.dataset_name}_{settings.model_name}.pt"
    check_writable(run.books, baseline.parent)

    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical)
    catemapper = Catemapper(settings.feature_map_rate).fit(splits.train, splits.long_tailed)
    for split in (splits.train, splits.val, splits.test):
        catemapper.map(split)
    catemapper.save(run.books / "catemapper.json")

    set_seed(settings.seed)
    model = get_model(settings.model_name, catemapper.field_dims, splits.train.numerical_num, settings.task_num,
                      settings.expert_num, settings.embed_dim, settings.dropout, settings.calibrator)
    identity = model_identity(settings, splits.fingerprint, catemapper.field_dims)
    stopper, metrics = slfit(model, splits, settings, run, identity, device)
    save_model(baseline, model, identity)

    report(splits, stopper.best_accuracy, metrics)
    print(f"saved {run.model} and {baseline}; curves: {run.curves}")
    return metrics


def report(splits: Splits, best_accuracy: float, metrics: list[Metrics]) -> None:
    """Print the documented result, then what it is measured against."""
    print("\n" + ", ".join(f"task {task} = {name}" for task, name in enumerate(splits.task_names[: len(metrics)]))
          + "; best auc: mean over the tasks, on the validation split")
    print(f"test: best auc: {best_accuracy:.4f}")
    for task, one in enumerate(metrics):
        print(f"task {task}, AUC {one.auc:.4f}, Log-loss {one.logloss:.4f}")
    print("s-Logloss, the mean over sessions: " + ", ".join(f"task {task} {one.session_logloss:.4f}"
                                                            for task, one in enumerate(metrics)))
    test = splits.test
    for task, one in enumerate(metrics):
        if np.isnan(one.auc):
            print(f"task {task}: AUC is nan, because every label of the test split is {test.labels[0, task]:.0f}")
        elif test.best is not None:
            best = measure(test.best[:, task], test.labels[:, task], test.session).auc
            print(f"task {task}, best possible AUC {best:.4f} (simulated data: the true probabilities); the model is "
                  f"{(one.auc - 0.5) / (best - 0.5):.0%} of the way from 0.5")


@exit_on_user_error
def _command() -> None:
    main(**vars(parse(SLArguments, __doc__ or "")))


if __name__ == "__main__":
    _command()
