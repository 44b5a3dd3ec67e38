"""report.md: means, paired differences and plots, from the rows of results.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.fileio import write_text
from experiments.plots import plot_differences, plot_learning, plot_sensitivity, plot_weights
from experiments.statistics import ALPHA, CONTROLS, MAIN_PAIRS, REFERENCE, Pair, PairedTest, Results

TITLES = {"ablation": "Ablation of the weights", "exploratory": "Exploratory conditions",
          "controls": "Controls without critics", "transfer": "Critics of another model", "lambda": "Lambda",
          "gamma": "Gamma (discount)", "tau": "Tau (target averaging)", "weighting": "Task weighting",
          "session": "Session features and encoders"}
METRICS = {"auc": "AUC", "logloss": "Logloss", "session_logloss": "s-Logloss", "session_gauc": "s-GAUC",
           "user_gauc": "u-GAUC"}


def write_report(rows: Sequence[dict[str, str]], out: Path, command: str) -> None:
    """Write report.md and its plots to the directory `out`."""
    sections = [_section(results, dataset, out) for dataset, results in Results.by_dataset(rows).items()]
    write_text(out / "report.md", "\n\n".join([_head(rows, command), *sections]) + "\n")


def _head(rows: Sequence[dict[str, str]], command: str) -> str:
    hours = np.sum([float(row["seconds"]) for row in rows]) / 3600
    fingerprints = {row["dataset"]: row["fingerprint"] for row in reversed(rows)}
    data = ", ".join(f"{name} (`{fingerprints[name]}`)" for name in dict.fromkeys(row["dataset"] for row in rows))
    return f"""# Results

Written by

    {command}

from {len(rows)} runs ({hours:.1f} hours of one thread each) on data {data} with {len({row["seed"] for row in rows})} \
seeds, on
{" / ".join(dict.fromkeys(row["machine"] for row in rows))}. Every run is a row of `results.csv`, with its command.

Metrics are of the test split, mean ± standard deviation over the seeds. Differences are paired by seed, in ×10⁻³ AUC,
with the 95 % interval and the two-sided p-value of a paired t-test (Holm: corrected over all comparisons of the table).
**constant** is the control: constant weights, with the same initial weights and training budget. **shuffled** assigns
the critics' weights to the wrong samples."""


def _section(results: Results, dataset: str, out: Path) -> str:
    parts = [f"## {dataset}"]
    if results.models:
        plot_differences(results, out / f"{dataset}_gain.png", f"{dataset}, {results.table['seed'].nunique()} seeds")
        parts += [headline(results), f"![differences in AUC]({dataset}_gain.png)", main_table(results),
                  difference_table(results, [(model, *pair) for model in results.models for pair in MAIN_PAIRS])]
    else:
        parts.append("No model has a complete set of runs (baseline, controls and RMTL).")
    if len(results.rows(*REFERENCE)):
        parts += ["### Against gradient-boosted trees",
                  "**boosting** is scikit-learn's `HistGradientBoostingClassifier` on the inputs of the models, one a "
                  "task (`experiments/boosting.py`).",
                  difference_table(results, [(model, "baseline", REFERENCE[1]) for model in results.baselines],
                                   means=True)]
    for name, title in TITLES.items():
        with_selected, pairs = results.comparisons(name)
        if pairs:
            parts += [f"### {title}", difference_table(with_selected, pairs, means=True)]
    if not results.models:
        return "\n\n".join(parts)
    if any(results.pairs(name) for name in ("lambda", "gamma", "tau")):
        plot_sensitivity(results, out / f"{dataset}_sensitivity.png")
        parts.append(f"![sensitivity]({dataset}_sensitivity.png)")
    plot_weights(results, out / f"{dataset}_weights.png")
    plot_learning(results, out / f"{dataset}_learning.png")
    return "\n\n".join([*parts, "### Critics and weights", critics_table(results), weights_table(results),
                        f"![loss by weight]({dataset}_weights.png)", "### Learning curves",
                        f"![learning curves]({dataset}_learning.png)"])


def headline(results: Results) -> str:
    """The outcome of the main comparison."""
    tests = results.paired_tests([(model, "RMTL", "constant") for model in results.models])
    better, worse = (", ".join(f"{pair[0]} {task} ({_format_ci(test)})" for (pair, task), (test, p) in tests.items()
                               if p < ALPHA and sign * test.mean > 0) for sign in (1, -1))
    outcome = " and ".join([f"is significantly better than its control on {better}"] * bool(better)
                           + [f"is significantly worse than its control on {worse}"] * bool(worse))
    all_tests = [test for test, _ in tests.values() if np.isfinite(test.mean)] or [test for test, _ in tests.values()]
    low, high = (1000 * limit for limit in (min(test.low for test in all_tests), max(test.high for test in all_tests)))
    counts = sorted({test.n for test in all_tests})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    family = f"({len(tests)} comparisons, Holm, α = {ALPHA:g})"
    return (f"**RMTL {outcome or 'shows no significant difference from its control'}** {family}. All 95 % intervals "
            f"are between {low:+.2f} and {high:+.2f} ×10⁻³ test AUC ({seeds} seeds).")


def main_table(results: Results) -> str:
    """Test metrics of baseline, controls, RMTL and the reference; without those that all rows lack."""
    columns = {f"{metric}_{task}": f"{task} {title}" for task in results.tasks for metric, title in METRICS.items()
               if f"{metric}_{task}" in results.table}
    runs = [(model, condition) for model in results.models for condition in (*CONTROLS, "RMTL")]
    runs += [REFERENCE] * bool(len(results.rows(*REFERENCE)))
    return _table(["model", "run", *columns.values()], [
        [*run, *(results.mean(*run, column) for column in columns)] for run in runs])


def difference_table(results: Results, pairs: Sequence[Pair], means: bool = False) -> str:
    """Differences in AUC between conditions and their controls; with `means` also the AUC of the conditions."""
    head = [title for task in results.tasks for title in (
        *[f"{task} AUC"] * means, f"{task}: difference (interval)", "p", "p (Holm)")]
    tests, rows = results.paired_tests(pairs), []
    for pair in pairs:
        cells = [*pair]
        for task in results.tasks:
            test, p = tests[pair, task]
            cells += [*[results.mean(*pair[:2], f"auc_{task}")] * means, _format_ci(test), f"{test.p:.3f}", f"{p:.3f}"]
        rows.append(cells)
    return _table(["model", "run", "against", *head], rows)


def critics_table(results: Results) -> str:
    """Per critics: held-out rank correlation of Q with the return, and the fraction of zero outputs."""
    trained = results.table[results.table["condition"].str.startswith("critics")
                            & (results.table.get(f"val_rank_correlation_{results.tasks[0]}", "") != "")]
    used = set(results.table["critics"])
    metrics = {"rank_correlation": ("rank correlation", ".3f"), "zero_fraction": ("zero outputs", ".1%")}
    head = [f"{task}: {title}" for task in results.tasks for title, _ in metrics.values()]
    return _table(["model", "critics", *head], [
        [model, condition, *(format(results.values(model, condition, f"val_{metric}_{task}").mean(), form)
                             for task in results.tasks for metric, (_, form) in metrics.items())]
        for model, condition in dict.fromkeys(zip(trained["model"], trained["condition"], strict=True))
        if f"{model} {condition}" in used])


def weights_table(results: Results) -> str:
    """Per run with critics: quantiles and effective sample size of its weights."""
    weighted = results.table[results.table["critics"] != ""]
    rows = []
    for model, condition in dict.fromkeys(zip(weighted["model"], weighted["condition"], strict=True)):
        cells = [model, condition]
        for task in results.tasks:
            q05, q50, q95, ess = (results.values(model, condition, f"weight_{name}_{task}").mean()
                                  for name in ("q05", "q50", "q95", "ess"))
            cells += [f"{q05:.2f} / {q50:.2f} / {q95:.2f}", f"{ess:.0%}"]
        rows.append(cells)
    return _table(["model", "run", *(f"{task}: {title}" for task in results.tasks for title in (
        "weights, 5 % / 50 % / 95 %", "effective sample size"))], rows)


def _format_ci(test: PairedTest) -> str:
    """Mean and interval in ×10⁻³."""
    return f"{1000 * test.mean:+.2f} ({1000 * test.low:+.2f} to {1000 * test.high:+.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
