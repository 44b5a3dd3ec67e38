"""Run all benchmarks, one process at a time; write results.json, results.png and report.md to docs/performance.

    python3 -m benchmarks                # three repeats: some 20 minutes
    python3 -m benchmarks --repeats=1    # a first look
    python3 -m benchmarks --report_only  # results.png and report.md from an existing results.json

RMTL and torch-rechub take turns, so that a slower machine slows both. A ratio is of one repeat; the tables contain the
median and the range over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.throughput import IMPLEMENTATIONS, MODELS, REPOSITORY
from common.errors import UserError, cli_entry_point, command_line
from common.fileio import read_json, write_json, write_text
from train.plots import save_figure

COMPARED = {"train": "training", "evaluate_distinct": "evaluation, every row distinct",
            "evaluate_repeating": "evaluation, published features (rows repeat)"}
MIN_RATIO = {"train": (4.0, 3.0, 2.5), "evaluate_distinct": (5.0, 3.0, 3.0), "evaluate_repeating": (8.0, 8.0, 8.0)}
ABSOLUTE = {"sessions": ("sessions built from the table", "rows/s", "rows_per_s"),
            "replay_buffer": ("replay buffer filled through the vector environment", "transitions/s", "rows_per_s"),
            "critics": ("critic updates, both critics, batch 2,048", "rows/s", "rows_per_s"),
            "full_scale_prepare": ("`dataset.prepare` at full scale (2.73 M events, 20.3 M property rows)", "s",
                                   "seconds"),
            "commands": ("the three commands end to end", "s", "seconds")}
TARGETS = {"sessions": 1e6, "replay_buffer": 5e5, "critics": 15e3, "full_scale_prepare": 120.0, "commands": 180.0}
Results = dict[str, list[dict[str, float]]]  # "train rmtl esmm" -> the metrics of each repeat


def run_benchmark(benchmark: str) -> dict[str, float]:
    """The metrics of one benchmark, run in a separate process. Raises UserError."""
    process = subprocess.run([sys.executable, "-m", "benchmarks.throughput", *benchmark.split()], cwd=REPOSITORY,
                             capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError(f"{benchmark}: {(process.stderr.strip() or str(process.returncode)).splitlines()[-1]}")
    return {name: float(value) for name, value in json.loads(process.stdout.splitlines()[-1]).items()}


def ratios(results: Results, benchmark: str, model: str) -> list[float]:
    """Throughput of RMTL over that of torch-rechub, per repeat."""
    return [rmtl["rows_per_s"] / rechub["rows_per_s"] for rmtl, rechub in zip(
        results[f"{benchmark} rmtl {model}"], results[f"{benchmark} rechub {model}"], strict=True)]


def gemm_efficiency(results: Results, implementation: str, model: str) -> float:
    """FLOP/s of a training step as a fraction of the peak of a matrix product."""
    return median(metrics["rows_per_s"] * metrics["flop_per_row"] / max(peak.values())
                  for metrics, peak in zip(results[f"train {implementation} {model}"], results["peak_gemm"],
                                           strict=True))


def format_range(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def tables(results: Results) -> str:
    """Markdown: throughput beside torch-rechub, arithmetic of a training step, RMTL alone."""
    lines = ["| rows/s, batch 2,048 | RMTL | torch-rechub 0.9.0 | ratio (range) | at least |", "|---|---|---|---|---|"]
    for benchmark, title in COMPARED.items():
        for (model, name), target in zip(MODELS.items(), MIN_RATIO[benchmark], strict=True):
            rmtl, rechub = (median(metrics["rows_per_s"] for metrics in results[f"{benchmark} {side} {model}"])
                            for side in IMPLEMENTATIONS)
            lines.append(f"| {name} {title} | {rmtl:,.0f} | {rechub:,.0f} | "
                         f"{format_range(ratios(results, benchmark, model), '.1f')} | {target:g} |")
    mkl, onednn = (median(peak[library] for peak in results["peak_gemm"]) / 1e9 for library in ("mkl", "onednn"))
    lines += ["", f"A training step beside one matrix product, which reaches {mkl:.0f} GFLOP/s with MKL and "
              f"{onednn:.0f} with oneDNN:", "", "| training | RMTL: MFLOP per row | fraction of that peak | "
              "torch-rechub: MFLOP per row | fraction of that peak |", "|---|---|---|---|---|"]
    for model, name in MODELS.items():
        cells = [f"{results[f'train {implementation} {model}'][0]['flop_per_row'] / 1e6:.1f} | "
                 f"{gemm_efficiency(results, implementation, model):.0%}" for implementation in IMPLEMENTATIONS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| benchmark | RMTL (range) | target |", "|---|---|---|"]
    for benchmark, (title, unit, metric) in ABSOLUTE.items():
        values = [metrics[metric] for metrics in results[benchmark]]
        bound = "under" if unit == "s" else "at least"
        lines.append(f"| {title} | {format_range(values, ',.0f')} {unit} | {bound} {TARGETS[benchmark]:,.0f} |")
    return "\n".join(lines)


def report(measured: dict[str, Any]) -> str:
    """report.md, from the content of results.json."""
    machine = measured["machine"]
    return f"""# Benchmark

Written by

    python3 -m benchmarks

on {machine["cores"]} cores ({machine["capability"]}), torch {machine["torch"]}; medians of {measured["repeats"]} \
repeats. What is compared: [performance](../performance.md).

{tables(measured["results"])}

![rows/s of RMTL as a multiple of torch-rechub's](results.png)
"""


def plot(results: Results, path: Path) -> None:
    """Bars of the ratios with their range and target."""
    labels, medians, low, high, targets = [], [], [], [], []
    for benchmark, title in COMPARED.items():
        for (model, name), target in zip(MODELS.items(), MIN_RATIO[benchmark], strict=True):
            values = ratios(results, benchmark, model)
            labels.append(f"{name} {title.split(' (')[0]}")
            medians.append(median(values))
            low.append(median(values) - min(values))
            high.append(max(values) - median(values))
            targets.append(target)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(labels), 0, -1)
    axes.barh(positions, medians, xerr=[low, high], color="tab:blue", alpha=0.8, capsize=3)
    axes.plot(targets, positions, "|", color="black", markersize=14, markeredgewidth=2, label="target")
    axes.axvline(1, color="grey", linewidth=1)
    for position, value, above in zip(positions, medians, high, strict=True):
        axes.annotate(f"{value:.1f} ×", (value + above, position), xytext=(5, 0), textcoords="offset points",
                      va="center")
    axes.set_xscale("log")
    axes.set_xlim(0.9, 2 * max(medians))
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.set_yticks(list(positions), labels)
    axes.set_xlabel("rows/s as a multiple of torch-rechub 0.9.0 (same table, same machine), logarithmic")
    axes.legend(loc="upper right")
    save_figure(figure, path)


def hardware_info() -> dict[str, Any]:
    """What the results depend on."""
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability()}


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(prog=command_line([]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="repeats of every benchmark (default 3)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "performance", help="output directory")
    parser.add_argument("--report_only", action="store_true", help="measure nothing: use the results.json in --out")
    arguments = parser.parse_args()
    path = arguments.out / "results.json"
    if not arguments.report_only:
        write_json(path, {"machine": hardware_info(), "repeats": arguments.repeats,
                          "results": run_all(arguments.repeats)})
    measured = read_json(path)
    plot(measured["results"], arguments.out / "results.png")
    write_text(arguments.out / "report.md", report(measured))
    print(f"{tables(measured['results'])}\n\nwrote results.json, results.png and report.md to {arguments.out}")


def run_all(repeats: int) -> Results:
    """The metrics of every benchmark."""
    benchmarks = ["peak_gemm", *(f"{benchmark} {implementation} {model}" for benchmark in COMPARED for model in MODELS
                                 for implementation in IMPLEMENTATIONS), *ABSOLUTE]
    results: Results = {benchmark: [] for benchmark in benchmarks}
    with tqdm(total=repeats * len(benchmarks), unit=" benchmarks", disable=None) as bar:
        for _ in range(repeats):
            for benchmark in benchmarks:
                bar.set_description(benchmark)
                results[benchmark].append(run_benchmark(benchmark))
                bar.update()
    return results


if __name__ == "__main__":
    main()
