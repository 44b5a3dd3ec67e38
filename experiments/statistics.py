"""results.csv, and paired comparisons of its rows.

A run and its control share data, seed and initial weights. Their differences, seed by seed, get the 95 % interval and
the two-sided p-value of a paired t-test, and Holm's correction over all comparisons of a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from common.csv_reader import read_csv_rows, write_csv
from common.errors import UserError

Pair = tuple[str, str, str]  # model, condition, control
ALPHA = 0.05
LEADING_COLUMNS = ("dataset", "tasks", "table", "model", "condition", "control", "critics", "seed", "epoch", "epochs")
TRAILING_COLUMNS = ("fingerprint", "machine", "seconds", "command")  # the metrics are between them
NUMERIC_COLUMNS = ("seed", "epoch", "epochs", "seconds")
METRIC_PREFIXES = ("auc_", "logloss_", "session_logloss_", "session_gauc_", "user_gauc_", "val_", "weight_")
CONTROLS = ("baseline", "constant", "shuffled")
MAIN_PAIRS = (("RMTL", "constant"), ("RMTL", "shuffled"), ("RMTL", "baseline"), ("constant", "baseline"))
REFERENCE = ("scikit-learn", "boosting")  # its model and condition: a control of every model


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of results.csv. Raises UserError with line and column of a missing or non-numeric cell."""
    rows = read_csv_rows(path, (*LEADING_COLUMNS, *TRAILING_COLUMNS))
    for line, row in enumerate(rows, start=2):
        for column, cell in row.items():
            if (column in NUMERIC_COLUMNS or column.startswith(METRIC_PREFIXES)) and not _is_valid_cell(cell, column):
                raise UserError(f"{path}, line {line}, column '{column}': '{cell[:40]}' is not a number")
    return rows


def write_results(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write results.csv, with its metric columns in alphabetical order."""
    metrics = sorted({name for row in rows for name in row} - {*LEADING_COLUMNS, *TRAILING_COLUMNS})
    write_csv(path, [{name: row.get(name, "") for name in (*LEADING_COLUMNS, *metrics, *TRAILING_COLUMNS)}
                     for row in rows])


def _is_valid_cell(cell: str, column: str) -> bool:
    """Whether a cell is a finite number. An AUC may be nan, and a metric of other programs is empty."""
    if not cell or column == "seed":
        return column not in NUMERIC_COLUMNS or cell.isdecimal()
    try:
        return math.isfinite(float(cell)) or (cell == "nan" and "auc_" in column)
    except ValueError:
        return False


class PairedTest(NamedTuple):
    """Mean of paired differences, its 95 % interval, the two-sided p-value and the number of pairs."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired_t_test(values: Sequence[float], control: Sequence[float]) -> PairedTest:
    """Student's t-test of paired samples; p is nan for fewer than two pairs, and 1 for equal samples."""
    differences = np.subtract(values, control)
    mean, n = float(differences.mean()) if len(differences) else np.nan, len(differences)
    if n < 2:
        return PairedTest(mean, np.nan, np.nan, np.nan, n)
    if differences.std() < 1e-12:  # constant up to rounding: t is not defined
        return PairedTest(mean, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0, n)
    test = stats.ttest_rel(values, control)
    low, high = test.confidence_interval(1 - ALPHA)
    return PairedTest(mean, float(low), float(high), float(test.pvalue), n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): the k-th smallest of m times (m - k + 1), never below a smaller one's."""
    order, adjusted = np.argsort(p), np.empty(len(p))
    scaled = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.fmin(scaled, 1))  # nan counts as 1
    return [float(value) for value in adjusted]


class Results:
    """The rows of one data set; `models` are those with a complete main comparison."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self.tasks = str(table["tasks"].iloc[0]).split()
        by_model = table[table["table"] == "main"].groupby("model", sort=False)["condition"]
        self.models = [str(model) for model, names in by_model if {"RMTL", *CONTROLS} <= set(names)]
        self.baselines = [str(model) for model, names in by_model if "baseline" in set(names)]

    @staticmethod
    def by_dataset(rows: Sequence[dict[str, str]]) -> dict[str, Results]:
        """The results of each data set, without the columns that it leaves empty."""
        table = pd.DataFrame(rows).fillna("").astype({"seed": int})
        return {str(name): Results(part.loc[:, (part != "").any() | part.columns.isin(LEADING_COLUMNS)]
                                   .reset_index(drop=True)) for name, part in table.groupby("dataset", sort=False)}

    def rows(self, model: str, condition: str) -> pd.DataFrame:
        """The rows of a condition; those of the reference whatever the model."""
        model = REFERENCE[0] if condition == REFERENCE[1] else model
        return self.table[(self.table["model"] == model) & (self.table["condition"] == condition)]

    def pairs(self, name: str) -> list[Pair]:
        """Model, condition and control of a table, in order, where both have run."""
        rows = self.table[(self.table["table"] == name) & (self.table["control"] != "")]
        pairs = dict.fromkeys(zip(rows["model"], rows["condition"], rows["control"], strict=True))
        return [pair for pair in pairs if len(self.rows(pair[0], pair[2]))]

    def values(self, model: str, condition: str, metric: str) -> pd.Series:
        """A metric of a condition by seed; nan in rows of an earlier version, which have no such metric."""
        return self.rows(model, condition).set_index("seed")[metric].replace("", "nan").astype(float)

    def lists(self, model: str, condition: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The lists of numbers in a column (seeds, longest), padded with nan."""
        lists = [np.fromstring(text, sep=" ") for text in self.rows(model, condition)[name]]
        width = max(map(len, lists), default=0)
        return np.array([np.pad(values, (0, width - len(values)), constant_values=np.nan) for values in lists])

    def mean(self, model: str, condition: str, metric: str) -> str:
        """Mean ± standard deviation over the seeds."""
        values = self.values(model, condition, metric)
        return f"{values.mean():.4f} ± {values.std():.4f}" if values.notna().any() else "-"

    def paired(self, model: str, condition: str, control: str, metric: str) -> PairedTest:
        """The test of a metric over the seeds that condition and control share."""
        columns = [self.values(model, name, metric) for name in (condition, control)]
        pairs = pd.concat(columns, axis=1, join="inner")
        return paired_t_test(pairs.iloc[:, 0].tolist(), pairs.iloc[:, 1].tolist())

    def paired_tests(self, pairs: Sequence[Pair]) -> dict[tuple[Pair, str], tuple[PairedTest, float]]:
        """Per pair and task: the test of the AUC, and its p-value with Holm's correction over all of these."""
        tests = {(pair, task): self.paired(*pair, f"auc_{task}") for pair in pairs for task in self.tasks}
        adjusted = holm([test.p for test in tests.values()])
        return {key: (test, p) for (key, test), p in zip(tests.items(), adjusted, strict=True)}

    def comparisons(self, name: str) -> tuple[Results, list[Pair]]:
        """The comparisons of a table, with RMTL among its variants, and the results that contain them."""
        pairs, results = self.pairs(name), self
        model = pairs[0][0] if pairs else ""
        if name in ("ablation", "lambda", "gamma", "tau") and model in self.models:
            pairs = [(model, "RMTL", "constant"), *pairs]
            if name == "lambda":
                best = "lambda by validation"
                results = self._select_by_validation([condition for _, condition, _ in pairs], model, best)
                pairs = [*pairs, (model, best, "constant")]
        return results, pairs

    def _select_by_validation(self, names: Sequence[str], model: str, new_name: str) -> Results:
        """Add a condition: for every seed the one of `names` with the best validation AUC."""
        rows = self.table[(self.table["model"] == model) & self.table["condition"].isin(names)].copy()
        score = rows[[f"val_auc_{task}" for task in self.tasks]].astype(float).mean(axis=1)
        best = rows.loc[score.groupby(rows["seed"]).idxmax()].assign(condition=new_name)
        return Results(pd.concat([self.table, best], ignore_index=True))
