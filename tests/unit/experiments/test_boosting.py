"""Boosted trees: target means without the row's own session, and a run of the experiments."""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import user_error_message
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from common.csv_reader import read_csv_rows
from dataset.rtrl import Splits, load_splits
from dataset.vocabulary import encode_splits
from experiments import boosting
from experiments.arguments import BoostingArguments
from experiments.boosting import TargetMeans, choose_classifier, make_features, session_folds
from experiments.conditions import ExperimentArguments
from experiments.runner import run_experiments
from experiments.statistics import read_results
from train.Arguments import parse


@pytest.fixture
def splits(rt_tables: Path) -> Splits:
    loaded = load_splits(rt_tables)
    encode_splits(loaded, 1.0)
    return loaded


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boosting, "GRID", boosting.GRID[:2])
    monkeypatch.setattr(boosting, "MAX_TREES", 4)


def test_target_means_by_hand() -> None:
    """Folds 0, 0, 1, 1 with smoothing 1. Fold 0 sees labels 1, 0 of fold 1: prior 1/2; id 2 has the label 1 there:
    (1 + 1/2) / 2. Fold 1 sees 1, 1: prior 1; id 2 has one row there, id 0 none: (0 + 1) / 1."""
    ids, fold = np.array([1, 2, 2, 0]), np.array([0, 0, 1, 1])
    means = TargetMeans(ids, np.float32([[1], [1], [1], [0]]), fold, 4, 1.0)
    np.testing.assert_allclose(means.of_train(ids, fold),
                               [[0.5, 0], [0.75, np.log(2)], [1, np.log(2)], [1, 0]], rtol=1e-6)
    prior = 3 / 4
    np.testing.assert_allclose(means.of_later(np.array([2, 0, 3])),
                               [[(2 + prior) / 3, np.log(3)], [prior / 2, np.log(2)], [prior, 0]], rtol=1e-6)


@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1), st.integers(0, 1)),
                     min_size=2, max_size=40), smoothing=st.floats(0.5, 30))
def test_target_means_are_a_loop_over_rows(rows: list[tuple[int, int, int, int]], smoothing: float) -> None:
    table = np.array(rows)
    ids, session, labels = table[:, 0], np.sort(table[:, 1]), table[:, 2:].astype(np.float32)
    fold = session_folds(session, 3, 1)
    features = TargetMeans(ids, labels, fold, 4, smoothing).of_train(ids, fold)
    for row, one in enumerate(features):
        others = fold != fold[row]
        same = others & (ids == ids[row])
        prior = labels[others].mean(axis=0) if others.any() else np.zeros(2)
        expected = (labels[same].sum(axis=0) + smoothing * prior) / (same.sum() + smoothing)
        np.testing.assert_allclose(one, [*expected, np.log1p(same.sum())], rtol=1e-5)
        assert set(fold[session == session[row]]) == {fold[row]}, "a session is in one fold"


def test_features_ignore_labels_of_own_session(splits: Splits) -> None:
    """Other labels of one session change features of other sessions, and of later splits, alone."""
    train = splits.train
    before = make_features(splits, 5, 20.0, 1)
    own = train.session == train.session[len(train) // 2]
    train.labels = np.where(own[:, None], 1 - train.labels, train.labels)
    after = make_features(splits, 5, 20.0, 1)
    np.testing.assert_array_equal(after[0][own], before[0][own])
    assert (after[0] != before[0]).any()
    assert all((one != other).any() for one, other in zip(after[1:], before[1:], strict=True))
    assert [part.shape for part in after] == [
        (len(part), part.numerical_num + 3 * len(part.field_dims)) for part in (train, splits.val, splits.test)]
    splits.test.labels = 1 - splits.test.labels
    np.testing.assert_array_equal(make_features(splits, 5, 20.0, 1)[2], after[2])


def test_best_trees_are_chosen_by_validation(few_trees: None) -> None:
    rng = np.random.default_rng(0)
    x, val_x = (rng.normal(size=(300, 2)).astype(np.float32) for _ in range(2))
    y, val_y = ((part[:, 0] + rng.normal(size=300) > 0).astype(np.float32) for part in (x, val_x))
    with contextlib.redirect_stdout(io.StringIO()):
        chosen = choose_classifier(x, y, val_x, val_y)
    aucs = [roc_auc_score(val_y, p[:, 1]) for p in chosen.classifier.staged_predict_proba(val_x)]
    assert chosen.auc == max(aucs) == aucs[chosen.trees - 1] == roc_auc_score(val_y, chosen.predict(val_x))
    assert chosen.auc > 0.7


def test_experiment_runs_boosting(rt_tables: Path, tmp_path: Path, few_trees: None,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each seed with all metrics, and the command that repeats it."""
    monkeypatch.chdir(tmp_path)
    settings = parse(ExperimentArguments, "", ["--name_filter=boosting", "--seeds=2", "--workers=1", "--out=results",
                                               f"--dataset_path={rt_tables.parent}"])
    assert run_experiments(settings, Path("results/results.csv")) == ""
    rows = read_results(Path("results/results.csv"))
    assert [(row["model"], row["condition"], row["seed"]) for row in rows] == [
        ("scikit-learn", "boosting", "1"), ("scikit-learn", "boosting", "2")]
    assert rows[0]["auc_CTR"] != rows[1]["auc_CTR"], "the folds differ"
    python, module, program, *flags = shlex.split(rows[0]["command"])
    assert (python, module, program) == ("python3", "-m", "experiments.boosting")
    repeated = boosting.main(parse(BoostingArguments, "", [*flags, "--save_dir=again"]))
    for task, metrics in zip(("CTR", "CTCVR"), repeated, strict=True):
        assert {f"{name}_{task}": str(value) for name, value in metrics._asdict().items()}.items() <= rows[0].items()
    val, test = read_csv_rows(Path("again/rt_boosting/metrics.csv"))
    assert (val["split"], test["split"]) == ("val", "test")
    assert rows[0]["val_auc_CTR"] == val["auc_CTR"]


def test_labels_of_one_class_are_refused(tmp_path: Path, splits: Splits,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    splits.val.labels[:, 1] = 0
    monkeypatch.setattr(boosting, "get_dataset", lambda *_arguments: splits)
    monkeypatch.setattr(boosting, "choose_classifier", lambda *_arguments: None)
    message = user_error_message(lambda: boosting.main(BoostingArguments(save_dir=str(tmp_path))))
    assert "CTCVR: every label of the training or validation split is the same" in message
