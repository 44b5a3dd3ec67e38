"""From the rows of results.csv to a report: means, paired differences with interval and test, and plots.

A difference is taken seed by seed between a run and its control, which share data, seed and start; its interval and its
two-sided p-value are those of Student's t for paired samples. Where a table asks many questions at once, its p-values
are Holm's, which bound the chance of any false alarm in the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from common.csv_reader import read_csv_rows, write_csv
from common.errors import UserError
from common.fileio import write_text
from train.plots import save_figure

Pair = tuple[str, str, str]  # model, arm, control
LEVEL = 0.05
FIRST = ("dataset", "tasks", "table", "model", "arm", "control", "critics", "seed", "epoch", "epochs")
LAST = ("fingerprint", "machine", "seconds", "command")  # and between them what was measured
NUMBERS = ("seed", "epoch", "epochs", "seconds")
MEASURED = ("auc_", "logloss_", "session_logloss_", "val_", "weight_")
CONTROLS = ("baseline", "constant", "shuffled")
MARKS = "<!-- results, written by experiments.py -->", "<!-- end of results -->"
TITLES = {"ablation": "Combinations of the weights", "tried": "What else was tried with the critics",
          "transfer": "Critics of one model weight another", "lambda": "Lambda", "gamma": "Gamma, the critics' horizon",
          "tau": "Tau, the critics' soft update", "weighting": "Other ways to weight the tasks",
          "session": "What the state sees of the session"}
FIGURES = {"auc": "AUC", "logloss": "Logloss", "session_logloss": "s-Logloss"}


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of results.csv. Raises UserError naming line and column where something is missing or no number."""
    rows = read_csv_rows(path, (*FIRST, *LAST))
    for number, row in enumerate(rows, start=2):
        for column, cell in row.items():
            if (column in NUMBERS or column.startswith(MEASURED)) and not _fits(cell, column):
                raise UserError(f"{path}, line {number}, column '{column}': '{cell[:40]}' is not a number")
    return rows


def write_results(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write results.csv; its columns stand in the same order whatever was measured first."""
    measured = sorted({name for row in rows for name in row} - {*FIRST, *LAST})
    write_csv(path, [{name: row.get(name, "") for name in (*FIRST, *measured, *LAST)} for row in rows])


def _fits(cell: str, column: str) -> bool:
    """Whether a cell can be this column's: a finite number; an AUC may be nan, and what was not measured empty."""
    if not cell or column == "seed":
        return column not in NUMBERS or cell.isdecimal()
    try:
        return math.isfinite(float(cell)) or (cell == "nan" and "auc_" in column)
    except ValueError:
        return False


class Difference(NamedTuple):
    """Mean of paired differences, its 95 % interval, the two-sided p-value and the number of pairs."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def difference(ours: Sequence[float], control: Sequence[float]) -> Difference:
    """Compare paired samples. Where they are equal throughout p is 1; with fewer than two pairs it is nan."""
    d = np.asarray(ours, float) - np.asarray(control, float)
    if len(d) < 2:
        return Difference(float(d.mean()) if len(d) else np.nan, np.nan, np.nan, np.nan, len(d))
    mean, spread = float(d.mean()), float(d.std(ddof=1)) / len(d) ** 0.5
    if spread < 1e-12:  # rounding
        return Difference(mean, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0, len(d))
    reach = float(stats.t.ppf(1 - LEVEL / 2, len(d) - 1)) * spread
    return Difference(mean, mean - reach, mean + reach, 2 * float(stats.t.sf(abs(mean) / spread, len(d) - 1)),
                      len(d))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): the k-th smallest of m times (m - k + 1), never below a smaller one's."""
    order, adjusted, above = np.argsort(p), np.empty(len(p)), 0.0
    for rank, at in enumerate(order):
        above = max(above, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = above
    return [float(one) for one in adjusted]


class Results:
    """The rows of one data set; `models` are those whose main comparison is complete."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self.tasks = str(table["tasks"].iloc[0]).split()
        main = table[table["table"] == "main"].groupby("model", sort=False)["arm"]
        self.models = [str(model) for model, arms in main if {"RMTL", *CONTROLS} <= set(arms)]

    def arms(self, name: str) -> list[tuple[str, str, str]]:
        """Model, arm and control of a table's arms, where both are there, in order."""
        rows = self.table[(self.table["table"] == name) & (self.table["control"] != "")]
        pairs = dict.fromkeys(zip(rows["model"], rows["arm"], rows["control"], strict=True))
        there = set(zip(self.table["model"], self.table["arm"], strict=True))
        return [(model, arm, control) for model, arm, control in pairs if (model, control) in there]

    def of(self, model: str, arm: str, figure: str) -> pd.Series:
        """A figure of an arm by seed."""
        rows = self.table[(self.table["model"] == model) & (self.table["arm"] == arm)]
        return rows.set_index("seed")[figure].astype(float)

    def compare(self, model: str, arm: str, control: str, figure: str) -> Difference:
        pairs = pd.concat([self.of(model, arm, figure), self.of(model, control, figure)], axis=1, join="inner")
        return difference(pairs.iloc[:, 0].tolist(), pairs.iloc[:, 1].tolist())

    def judge(self, pairs: Sequence[Pair]) -> dict[tuple[Pair, str], tuple[Difference, float]]:
        """Per pair and task the difference in AUC, and its p-value among all of these (Holm's)."""
        found = {(pair, task): self.compare(*pair, f"auc_{task}") for pair in pairs for task in self.tasks}
        adjusted = holm([one.p for one in found.values()])
        return {key: (one, p) for (key, one), p in zip(found.items(), adjusted, strict=True)}

    def mean(self, model: str, arm: str, figure: str) -> str:
        """Mean +- standard deviation over the seeds."""
        values = self.of(model, arm, figure)
        return f"{values.mean():.4f} ± {values.std():.4f}" if len(values) else "-"

    def table_of(self, name: str) -> tuple[Results, list[Pair]]:
        """The comparisons of a table, RMTL itself among its variants, and the results that they are made on."""
        pairs, results = self.arms(name), self
        studied = pairs[0][0] if pairs else ""
        if name in ("ablation", "lambda", "gamma", "tau") and studied in self.models:
            pairs = [(studied, "RMTL", "constant"), *pairs]
            if name == "lambda":
                results = self.by_validation([arm for _, arm, _ in pairs], studied, "lambda by validation")
                pairs = [*pairs, (studied, "lambda by validation", "constant")]
        return results, pairs

    def by_validation(self, arms: Sequence[str], model: str, name: str) -> Results:
        """With one more arm: for every seed the one of `arms` that was best on validation."""
        rows = self.table[(self.table["model"] == model) & self.table["arm"].isin(arms)].copy()
        score = rows[[f"val_auc_{task}" for task in self.tasks]].astype(float).mean(axis=1)
        best = rows.loc[score.groupby(rows["seed"]).idxmax()].assign(arm=name)
        return Results(pd.concat([self.table, best], ignore_index=True))


def write_report(rows: Sequence[dict[str, str]], out: Path, command: str) -> None:
    """Write report.md and its plots into the folder `out`."""
    table = pd.DataFrame(rows).fillna("")
    parts = [_head(table, command)]
    parts += [_section(results, dataset, out) for dataset, results in _by_dataset(table)]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")


def put_into_readme(readme: Path, rows: Sequence[dict[str, str]], folder: Path, command: str) -> None:
    """Write the summary of the results, which lie in `folder`, between the two marks of a README. Raises UserError."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if not text.count(MARKS[0]) == text.count(MARKS[1]) == 1:
        raise UserError(f"{readme}: the lines '{MARKS[0]}' and '{MARKS[1]}', between which results go, are missing")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    write_text(readme, f"{before}{MARKS[0]}\n\n{summary(rows, folder, command)}\n\n{MARKS[1]}{after}")


def summary(rows: Sequence[dict[str, str]], folder: Path, command: str) -> str:
    """What the README says of the results: verdict, main comparison and where the rest is."""
    table = pd.DataFrame(rows).fillna("")
    parts = [f"    {command}"]
    for dataset, results in [pair for pair in _by_dataset(table) if pair[1].models]:
        parts += [f"{dataset}: {verdict(results)}", gain_table(results, [
            (model, arm, control) for model in results.models
            for arm, control in (("RMTL", "constant"), ("RMTL", "shuffled"), ("constant", "baseline"))], means=True)]
        parts += [f"![gains]({folder.as_posix()}/{dataset}_gain.png)", noticed(results)]
    places = f"[report]({folder.as_posix()}/report.md) and [results.csv]({folder.as_posix()}/results.csv)"
    runs, seeds = len(table), table["seed"].nunique()
    parts.append("Differences in thousandths of test AUC, with the 95 % interval and the p-value of a paired t-test "
                 f"over {seeds} seeds; all {runs} runs, every other table and the reasons are in {places}.")
    return "\n\n".join(parts)


def _by_dataset(table: pd.DataFrame) -> list[tuple[str, Results]]:
    """Each data set's rows, without the columns that others measured."""
    return [(str(name), Results(rows.loc[:, (rows != "").any() | rows.columns.isin(FIRST)].reset_index(drop=True)
                                .astype({"seed": int}))) for name, rows in table.groupby("dataset", sort=False)]


def _head(table: pd.DataFrame, command: str) -> str:
    hours = table["seconds"].astype(float).sum() / 3600
    data = ", ".join(f"{name} (`{rows['fingerprint'].iloc[0]}`)" for name, rows in table.groupby("dataset", sort=False))
    machines = " / ".join(dict.fromkeys(table["machine"]))
    return f"""# Results

Written by

    {command}

from {len(table)} runs ({hours:.1f} hours of one thread each) on data {data} with {table["seed"].nunique()} seeds, on
{machines}. Every run is a row of `results.csv`, with its command.

Figures are of the test split, mean ± standard deviation over the seeds. Differences are taken seed by seed, in
thousandths of AUC, with the 95 % interval and the two-sided p-value of a paired t-test (Holm: for all questions of the
table together). **constant** is the control: the same start, the same budget, weights of 1. **shuffled** has the
critics' weights on the wrong samples."""


def _section(results: Results, dataset: str, out: Path) -> str:
    parts = [f"## {dataset}"]
    if results.models:
        parts += [verdict(results), f"![gains]({dataset}_gain.png)", main_table(results),
                  gain_table(results, [(model, *pair) for model in results.models for pair in (
                      ("RMTL", "constant"), ("RMTL", "shuffled"), ("RMTL", "baseline"), ("constant", "baseline"))])]
        plot_gains(results, out / f"{dataset}_gain.png", f"{dataset}, {results.table['seed'].nunique()} seeds")
    else:
        parts.append("For no model are baseline, controls and RMTL all there.")
    for name, title in TITLES.items():
        with_best, pairs = results.table_of(name)
        if not pairs:
            continue
        parts += [f"### {title}", gain_table(with_best, pairs, means=True)]
    if not results.models:
        return "\n\n".join(parts)
    if any(results.arms(name) for name in ("lambda", "gamma", "tau")):
        plot_sensitivity(results, out / f"{dataset}_sensitivity.png")
        parts.append(f"![sensitivity]({dataset}_sensitivity.png)")
    parts += ["### What the critics know, and what their weights do", why(results), critics_table(results)]
    plot_weights(results, out / f"{dataset}_weights.png")
    plot_learning(results, out / f"{dataset}_learning.png")
    parts += [f"![weights against loss]({dataset}_weights.png)", "### Learning curves",
              f"![learning curves]({dataset}_learning.png)"]
    return "\n\n".join(parts)


# ----------------------------------------------------------------------------------------------------------- the tables


def verdict(results: Results) -> str:
    """What the main comparison supports, in words."""
    judged = results.judge([(model, "RMTL", "constant") for model in results.models])
    found = [one for one, _ in judged.values()]
    better, worse = ([f"{pair[0]} {task} ({_thousandths(one)})" for (pair, task), (one, p) in judged.items()
                      if p < LEVEL and sign * one.mean > 0] for sign in (1, -1))
    parts = [*([f"beats its control on {', '.join(better)}"] if better else []),
             *([f"falls behind its control on {', '.join(worse)}"] if worse else [])]
    if not parts:
        low, high = min(one.low for one in found), max(one.high for one in found)
        parts = [f"is not told apart from its control in any of {len(found)} comparisons (Holm, 5 %); all intervals "
                 f"lie between {1000 * low:+.2f} and {1000 * high:+.2f} thousandths of AUC"]
    pairs = found[0].n
    return f"**RMTL {' and '.join(parts)}** (test AUC, {pairs} seeds)."


def noticed(results: Results) -> str:
    """What differs from its control in the other tables, with p < 0.05 for a task."""
    lines = []
    for name, title in TITLES.items():
        with_best, pairs = results.table_of(name)
        judged = with_best.judge(pairs)
        for pair in results.arms(name):
            of_tasks = [(task, *judged[pair, task]) for task in results.tasks]
            if any(one.p < LEVEL for _, one, _ in of_tasks):
                lines.append(f"- {title}: {pair[0]}, {pair[1]}, against {pair[2]}: " + "; ".join(
                    f"{task} {_thousandths(one)}, p {one.p:.3f}, Holm {p:.3f}" for task, one, p in of_tasks))
    asked = sum(len(results.arms(name)) for name in TITLES)
    return "\n".join([f"Of {asked} comparisons in the other tables these have p < 0.05 for a task:", "", *lines]
                     if lines else [f"Of {asked} comparisons in the other tables none has p < 0.05 for a task."])


def main_table(results: Results) -> str:
    head = [f"{task} {title}" for task in results.tasks for title in FIGURES.values()]
    lines = [_row(["model", "run", *head]), _row(["---"] * (2 + len(head)))]
    for model in results.models:
        lines += [_row([model, arm, *(results.mean(model, arm, f"{figure}_{task}")
                                      for task in results.tasks for figure in FIGURES)]) for arm in (*CONTROLS, "RMTL")]
    return "\n".join(lines)


def gain_table(results: Results, pairs: Sequence[Pair], means: bool = False) -> str:
    """Differences in AUC of arms to their controls; with `means` the arms' own AUC, too."""
    head = [text for task in results.tasks for text in (
        *([f"{task} AUC"] if means else []), f"{task}: difference (interval)", "p", "p (Holm)")]
    judged = results.judge(pairs)
    lines = [_row(["model", "run", "against", *head]), _row(["---"] * (3 + len(head)))]
    for model, arm, control in pairs:
        cells = []
        for task in results.tasks:
            one, p = judged[(model, arm, control), task]
            cells += [*([results.mean(model, arm, f"auc_{task}")] if means else []), _thousandths(one), f"{one.p:.3f}",
                      f"{p:.3f}"]
        lines.append(_row([model, arm, control, *cells]))
    return "\n".join(lines)


def critics_table(results: Results) -> str:
    """Per critics: rank correlation of Q with the return, held out; per weighted run: the spread of its weights."""
    lines = [_row(["model", "critics", *(f"{task}: {what}" for task in results.tasks
                                         for what in ("rank correlation", "zero outputs"))]),
             _row(["---"] * (2 + 2 * len(results.tasks)))]
    rows = results.table[results.table["arm"].str.startswith("critics")]
    rows = rows[rows[f"val_rank_correlation_{results.tasks[0]}"] != ""] if len(rows) else rows
    for model, arm in dict.fromkeys(zip(rows["model"], rows["arm"], strict=True)):
        if (results.table["critics"] == f"{model} {arm}").any():
            lines.append(_row([model, arm, *(
                f"{results.of(model, arm, f'val_{figure}_{task}').mean():.{digits}}" for task in results.tasks
                for figure, digits in (("rank_correlation", "3f"), ("zero_fraction", "1%")))]))
    lines += ["", _row(["model", "run", *(f"{task}: {what}" for task in results.tasks for what in (
        "weights, 5 % / 50 % / 95 %", "effective sample size"))]), _row(["---"] * (2 + 2 * len(results.tasks)))]
    weighted = results.table[results.table["critics"] != ""]
    for model, arm in dict.fromkeys(zip(weighted["model"], weighted["arm"], strict=True)):
        cells = []
        for task in results.tasks:
            quantiles = [results.of(model, arm, f"weight_{name}_{task}").mean() for name in ("q05", "q50", "q95")]
            cells += [" / ".join(f"{one:.2f}" for one in quantiles),
                      f"{results.of(model, arm, f'weight_ess_{task}').mean():.0%}"]
        lines.append(_row([model, arm, *cells]))
    return "\n".join(lines)


def why(results: Results) -> str:
    """The reasons that theory gives for a gain or its absence, each with the figure that was measured."""
    rows = results.table[(results.table["arm"] == "RMTL") & results.table["model"].isin(results.models)]
    ess = min(results.of(model, "RMTL", f"weight_ess_{task}").mean()
              for model in results.models for task in results.tasks)
    stayed = (rows["epoch"].astype(int) == 0).sum()
    going_on = [results.compare(model, "constant", "baseline", f"auc_{task}").mean
                for model in results.models for task in results.tasks]
    low, high = 1000 * min(going_on), 1000 * max(going_on)
    return f"""- The weight of a sample depends on the sample, not on its label. The minimiser of E[w(x) BCE(p(x), y)]
  is P(y | x) for every positive w(x): such weights cannot move what a model aims at, only where a model of limited
  size or training errs (`tests/test_polish.py`, in closed form). Weights that see the label, `label`, do aim
  elsewhere.
- Adam divides by the size of the gradients, so the mean weight cancels. What is left is the spread: the effective
  sample size of RMTL's weights is {ess:.0%} of the samples or more, mean over the seeds. Where |Q| is large beside 1,
  lambda does not widen it: 1 - lambda Q tends to -lambda Q. `contrast` does.
- What is predicted does not change which impression comes next. The derivative of Q with respect to the action is
  that of the immediate reward, minus the cross-entropy: an actor that follows its critics aims where supervised
  training aims already, by way of an approximation.
- A polish run continues training. That alone, with weights of 1, changes test AUC by {low:+.2f} to {high:+.2f}
  thousandths, mean over the seeds; without this control it would count as a gain of the weights. In {stayed} of
  {len(rows)} runs of RMTL no epoch beat the baseline on validation, which then stays."""


def _thousandths(one: Difference) -> str:
    return f"{1000 * one.mean:+.2f} ({1000 * one.low:+.2f} to {1000 * one.high:+.2f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ------------------------------------------------------------------------------------------------------------ the plots


def plot_gains(results: Results, path: Path, title: str) -> None:
    """Gain of RMTL over its controls with its interval, per model and task."""
    figure = Figure(figsize=(5.2 * len(results.tasks), 0.8 + 0.8 * len(results.models)), layout="constrained")
    against = {"constant": ("tab:blue", "weights of 1, same budget"), "shuffled": ("tab:orange", "shuffled weights"),
               "baseline": ("tab:grey", "baseline")}
    axes = figure.subplots(1, len(results.tasks), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, results.tasks, strict=True):
        for row, model in enumerate(results.models):
            for shift, (control, (colour, _)) in zip((-0.22, 0.0, 0.22), against.items(), strict=True):
                one = results.compare(model, "RMTL", control, f"auc_{task}")
                axis.plot([1000 * one.low, 1000 * one.high], [row + shift] * 2, color=colour, linewidth=2)
                axis.plot(1000 * one.mean, row + shift, "o", color=colour, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(results.models)), results.models)
        axis.set_ylim(len(results.models) - 0.5, -0.5)
        axis.set_xlabel(f"gain in {task} test AUC, thousandths, 95 % interval")
        _tidy(axis)
    handles = [axes[0].plot([], [], "o-", color=colour, label=f"RMTL - {what}")[0] for colour, what in against.values()]
    figure.legend(handles=handles, title=title, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_sensitivity(results: Results, path: Path) -> None:
    """Gain over the control against lambda, gamma and tau."""
    model = results.models[0]
    names = [name for name in ("lambda", "gamma", "tau") if results.arms(name)]
    figure = Figure(figsize=(4.4 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        default = {"lambda": 1.0, "gamma": 0.9, "tau": 0.2}[name]
        found = sorted([(default, "RMTL"), *((float(arm.split()[-1]), arm) for _, arm, _ in results.arms(name)
                                             if arm.startswith(name))])
        for shift, task in enumerate(results.tasks):
            ones = [results.compare(model, arm, "constant", f"auc_{task}") for _, arm in found]
            reach = [1000 * (one.high - one.mean) for one in ones]
            axis.errorbar(np.arange(len(found)) + 0.08 * shift, [1000 * one.mean for one in ones], reach, marker="o",
                          markersize=4, capsize=3, label=task)
        axis.set_xticks(range(len(found)), [f"{value:g}" for value, _ in found])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel(name)
        _tidy(axis)
    figure.axes[0].set_ylabel("AUC, thousandths, beside weights of 1")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{model}: gain over the control, 95 % interval", fontsize=11)
    save_figure(figure, path)


def plot_weights(results: Results, path: Path) -> None:
    """The baseline's loss on validation against the critics' weights of the same samples, by tenth of the weights."""
    figure = Figure(figsize=(4.6 * len(results.tasks), 3.4), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(results.tasks), squeeze=False)[0], results.tasks, strict=True):
        for model in results.models:
            weight, loss = (_curves(results, model, "RMTL", f"deciles_{name}_{task}") for name in ("weight", "loss"))
            axis.plot(np.nanmean(weight / np.nanmean(weight, axis=1, keepdims=True), axis=0), np.nanmean(loss, axis=0),
                      marker="o", markersize=4, label=model)
        axis.set_xlabel("weight, relative to the mean")
        axis.set_ylabel("logloss")
        axis.set_title(task, fontsize=10)
        _tidy(axis)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("weights against loss, validation, by tenth", fontsize=11)
    save_figure(figure, path)


def plot_learning(results: Results, path: Path) -> None:
    """Validation AUC, the mean of the tasks, by epoch: baselines; and what follows from each, weighted or not."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, model in enumerate(results.models):
        for axis, arm, style in ((left, "baseline", "-"), (right, "RMTL", "-"), (right, "constant", "--")):
            curves = np.mean([_curves(results, model, arm, f"curve_auc_{task}") for task in results.tasks], axis=0)
            some = np.isfinite(curves).sum(axis=0) > len(curves) / 2  # epochs that most seeds reached
            first = 1 if arm == "baseline" else 0
            axis.plot(np.flatnonzero(some) + first, np.nanmean(curves[:, some], axis=0), style, color=f"C{number}",
                      marker="o", markersize=3, label=f"{model}, {arm}")
    left.set_title("baseline", fontsize=10)
    right.set_title("from the baseline on: RMTL, and weights of 1", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        _tidy(axis)
    left.set_ylabel("validation AUC, mean of the tasks")
    save_figure(figure, path)


def _curves(results: Results, model: str, arm: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The lists of numbers in a column (seeds, longest), the shorter ones filled up with nan."""
    rows = results.table[(results.table["model"] == model) & (results.table["arm"] == arm)]
    lists = [np.fromstring(text, sep=" ") for text in rows[name]]
    longest = max(map(len, lists), default=0)
    return np.array([np.pad(one, (0, longest - len(one)), constant_values=np.nan) for one in lists])


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
