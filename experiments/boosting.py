"""Gradient-boosted trees on the inputs of the models: the reference that needs no deep model.

    python3 -m experiments.boosting --dataset_name=kr    # chkpt/boosting/kr_boosting

scikit-learn's `HistGradientBoostingClassifier`, one a task. Its inputs are the numerical features and, for each
categorical field, the mean of each task's label over the training rows with the same id (target encoding), and the
logarithm of how many these are. A grid of settings and the number of trees are chosen by the validation AUC.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from common.startup import before_torch
from experiments.arguments import BoostingArguments
from train.Arguments import parse

if __name__ == "__main__":
    before_torch(lambda: parse(BoostingArguments, __doc__ or "").check_files())

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from common.csv_reader import write_csv
from common.errors import UserError, cli_entry_point
from common.fileio import check_writable, exclusive_lock
from dataset.features import Floats, Ids
from dataset.rtrl import Splits
from dataset.vocabulary import encode_splits
from train.metrics import Metrics, compute_metrics
from train.run import get_dataset

GRID: tuple[dict[str, Any], ...] = tuple(
    {"learning_rate": rate, "max_leaf_nodes": leaves, "l2_regularization": 10.0}
    for rate, leaves in itertools.product((0.05, 0.1), (7, 31)))
MAX_TREES, PATIENCE = 1000, 30  # trees at most; trees without a better validation logloss after which training stops


class TargetMeans:
    """Sums and counts of one field's ids over the training rows, in all and in each fold.

    Args:
        ids: (n,) from 0 to `size` - 1.
        labels: (n, T), 0 or 1.
        fold: (n,) from 0 to the number of folds - 1.
        smoothing: m; the mean of an id with c rows is (sum + m prior) / (c + m), the prior that of all these rows.
    """

    def __init__(self, ids: Ids, labels: Floats, fold: Ids, size: int, smoothing: float) -> None:
        self.smoothing, folds = smoothing, int(fold.max()) + 1
        columns = [np.ones(len(ids)), *labels.T]  # the counts come first
        self.by_fold = np.stack([np.bincount(fold * size + ids, column, folds * size).reshape(folds, size)
                                 for column in columns], axis=-1)  # (folds, size, 1 + T)

    def of_train(self, ids: Ids, fold: Ids) -> Floats:
        """Features (n, T + 1) of training rows, each from the rows of the other folds alone."""
        return self._features(self.by_fold.sum(axis=0) - self.by_fold)[fold, ids]

    def of_later(self, ids: Ids) -> Floats:
        """Features (n, T + 1) of rows of another split, from all training rows."""
        return self._features(self.by_fold.sum(axis=0))[ids]

    def _features(self, sums: NDArray[np.float64]) -> Floats:
        """Means of the labels and log(1 + count), (..., size, T + 1), of counts and sums (..., size, 1 + T)."""
        count, total = sums[..., :1], sums.sum(axis=-2, keepdims=True)
        prior = total[..., 1:] / np.maximum(total[..., :1], 1)
        means = (sums[..., 1:] + self.smoothing * prior) / np.maximum(count + self.smoothing, 1e-12)
        return np.concatenate([means, np.log1p(count)], axis=-1).astype(np.float32)


def session_folds(session: Ids, folds: int, seed: int) -> Ids:
    """The fold of each row (n,): sessions are dealt out at random, all rows of a session together."""
    sessions, index = np.unique(session, return_inverse=True)
    return np.random.default_rng(seed).permutation(np.arange(len(sessions)) % folds)[index]


def make_features(splits: Splits, folds: int, smoothing: float, seed: int) -> list[Floats]:
    """The inputs (n, N + F (T + 1)) of train, val and test, which are mapped to ids."""
    train, parts = splits.train, (splits.train, splits.val, splits.test)
    fold = session_folds(train.session, folds, seed)
    columns = [[part.numerical] for part in parts]
    for field, size in enumerate(train.field_dims):
        means = TargetMeans(train.categorical[:, field], train.labels, fold, size, smoothing)
        columns[0].append(means.of_train(train.categorical[:, field], fold))
        for later, part in zip(columns[1:], parts[1:], strict=True):
            later.append(means.of_later(part.categorical[:, field]))
    return [np.hstack(part) for part in columns]


class Chosen(NamedTuple):
    """The best classifier of a task, by its validation AUC."""

    auc: float
    trees: int
    classifier: HistGradientBoostingClassifier

    def predict(self, features: Floats) -> NDArray[np.float64]:
        """The probabilities (n,) after `trees` trees."""
        stages = self.classifier.staged_predict_proba(features)
        return next(itertools.islice(stages, self.trees - 1, None))[:, 1]


def choose_classifier(x: Floats, y: Floats, val_x: Floats, val_y: Floats) -> Chosen:
    """Fit every setting of the grid to features (n, K) and labels (n,); return the best one."""
    candidates = []
    for setting in GRID:
        classifier = HistGradientBoostingClassifier(max_iter=MAX_TREES, n_iter_no_change=PATIENCE, random_state=0,
                                                    early_stopping=True, **setting)
        classifier.fit(x, y, X_val=val_x, y_val=val_y)
        aucs = [roc_auc_score(val_y, p[:, 1]) for p in classifier.staged_predict_proba(val_x)]
        trees = int(np.argmax(aucs)) + 1
        candidates.append(Chosen(float(aucs[trees - 1]), trees, classifier))
        print(", ".join(f"{name} {value:g}" for name, value in setting.items())
              + f": validation AUC {candidates[-1].auc:.4f} after {trees} trees")
    return max(candidates, key=lambda one: one.auc)


def main(settings: BoostingArguments) -> list[Metrics]:
    """One run from the tables to metrics.csv, with one thread. Return the test metrics per task. Raises UserError."""
    run_dir = settings.run_dir
    with exclusive_lock(run_dir.path), threadpool_limits(1):
        splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical)
        check_writable(run_dir.path, files=run_dir.files)
        encode_splits(splits, settings.feature_map_rate)
        x, val_x, test_x = make_features(splits, settings.folds, settings.smoothing, settings.seed)
        run_dir.start(settings.plain(), splits.manifest, splits.fingerprint, {}, resume=False)
        chosen = []
        for task, name in enumerate(splits.task_names):
            y, val_y = splits.train.labels[:, task], splits.val.labels[:, task]
            if min(np.ptp(y), np.ptp(val_y)) == 0:
                raise UserError(f"{settings.dataset_name}: {name}: every label of the training or validation split is "
                                "the same: trees cannot be fitted")
            print(f"task {task} = {name}")
            chosen.append(choose_classifier(x, y, val_x, val_y))
        rows, metrics = [], []
        for name, split, features in (("val", splits.val, val_x), ("test", splits.test, test_x)):
            metrics = compute_metrics([one.predict(features) for one in chosen], split.labels, split.session,
                                      split.user)
            rows.append({"split": name, "epoch": 1} | {
                f"{column}_{task}": value for task, one, of_task in zip(splits.task_names, chosen, metrics, strict=True)
                for column, value in {**of_task._asdict(), "trees": one.trees, **{
                    setting: one.classifier.get_params()[setting] for setting in GRID[0]}}.items()})
        write_csv(run_dir.metrics, rows)
    for task, of_task in enumerate(metrics):
        print(f"test: task {task}, AUC {of_task.auc}, Log-loss {of_task.logloss}, s-GAUC {of_task.session_gauc:.4f}, "
              f"u-GAUC {of_task.user_gauc:.4f}")
    print(f"saved {run_dir.metrics}")
    return metrics


@cli_entry_point
def cli() -> None:
    main(parse(BoostingArguments, __doc__ or ""))


if __name__ == "__main__":
    cli()
