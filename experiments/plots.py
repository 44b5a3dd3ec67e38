"""The plots of report.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.statistics import MAIN_PAIRS, Results
from train.plots import save_figure

COLORS = dict(zip(MAIN_PAIRS, ("tab:blue", "tab:orange", "tab:grey", "tab:olive"), strict=True))
LABELS = {"RMTL": "RMTL", "constant": "constant weights", "shuffled": "shuffled weights", "baseline": "the baseline"}
DEFAULTS = {"lambda": 1.0, "gamma": 0.9, "tau": 0.2}


def plot_differences(results: Results, path: Path, title: str) -> None:
    """The differences in AUC of the main table (`MAIN_PAIRS`) with their intervals, per model and task."""
    figure = Figure(figsize=(5.2 * len(results.tasks), 1.2 + 0.9 * len(results.models)), layout="constrained")
    axes = figure.subplots(1, len(results.tasks), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, results.tasks, strict=True):
        for row, model in enumerate(results.models):
            for shift, ((run, control), color) in zip((-0.3, -0.1, 0.1, 0.3), COLORS.items(), strict=True):
                test = results.paired(model, run, control, f"auc_{task}")
                axis.plot([1000 * test.low, 1000 * test.high], [row + shift] * 2, color=color, linewidth=2)
                axis.plot(1000 * test.mean, row + shift, "o", color=color, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(results.models)), results.models)
        axis.set_ylim(len(results.models) - 0.5, -0.5)
        axis.set_xlabel(f"difference in {task} test AUC (×10⁻³), 95 % interval")
        _style_axis(axis)
    handles = [axes[0].plot([], [], "o-", color=color, label=f"{LABELS[run]} minus {LABELS[control]}")[0]
               for (run, control), color in COLORS.items()]
    figure.legend(handles=handles, title=title, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_sensitivity(results: Results, path: Path) -> None:
    """Difference in AUC from the control of the tables of lambda, gamma and tau."""
    model = results.models[0]
    names = [name for name in DEFAULTS if results.pairs(name)]
    figure = Figure(figsize=(4.4 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        points = sorted([(DEFAULTS[name], "RMTL", "constant"), *(
            (float(condition.split()[-1]), condition, control) for _, condition, control in results.pairs(name)
            if condition.startswith(name))])
        for shift, task in enumerate(results.tasks):
            tests = [results.paired(model, condition, control, f"auc_{task}") for _, condition, control in points]
            half_widths = [1000 * (test.high - test.mean) for test in tests]
            axis.errorbar(np.arange(len(points)) + 0.08 * shift, [1000 * test.mean for test in tests], half_widths,
                          marker="o", markersize=4, capsize=3, label=task)
        axis.set_xticks(range(len(points)), [f"{value:g}" for value, _, _ in points])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"{name} (values in order, not to scale)")
        _style_axis(axis)
    figure.axes[0].set_ylabel("difference in test AUC (×10⁻³)")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{model}: RMTL minus its control (constant weights), 95 % interval", fontsize=11)
    save_figure(figure, path)


def plot_weights(results: Results, path: Path) -> None:
    """The baseline's validation loss by decile of the critics' weights of the same samples."""
    figure = Figure(figsize=(4.6 * len(results.tasks), 3.4), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(results.tasks), squeeze=False)[0], results.tasks, strict=True):
        for model in results.models:
            weight, loss = (results.lists(model, "RMTL", f"deciles_{name}_{task}") for name in ("weight", "loss"))
            axis.plot(np.nanmean(weight / np.nanmean(weight, axis=1, keepdims=True), axis=0), np.nanmean(loss, axis=0),
                      marker="o", markersize=4, label=model)
        axis.set_xlabel("weight / mean weight")
        axis.set_ylabel("logloss of the baseline")
        axis.set_title(task, fontsize=10)
        _style_axis(axis)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("loss by decile of the critics' weights, validation split", fontsize=11)
    save_figure(figure, path)


def plot_learning(results: Results, path: Path) -> None:
    """Validation AUC, the mean of the tasks that have one, by epoch: baselines, and the fine-tuning runs from them."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, model in enumerate(results.models):
        for axis, condition, style in ((left, "baseline", "-"), (right, "RMTL", "-"), (right, "constant", "--")):
            of_tasks = [results.lists(model, condition, f"curve_auc_{task}") for task in results.tasks]
            curves = np.mean([curve for curve in of_tasks if np.isfinite(curve).any()] or of_tasks, axis=0)
            common = np.isfinite(curves).sum(axis=0) > len(curves) / 2  # epochs that most seeds reached
            first_epoch = 1 if condition == "baseline" else 0
            axis.plot(np.flatnonzero(common) + first_epoch, np.nanmean(curves[:, common], axis=0), style,
                      color=f"C{number}", marker="o", markersize=3, label=f"{model}, {condition}")
    left.set_title("baseline", fontsize=10)
    right.set_title("fine-tuning from the baseline: RMTL and constant weights", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        _style_axis(axis)
    left.set_ylabel("validation AUC, mean of the tasks")
    save_figure(figure, path)


def _style_axis(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
