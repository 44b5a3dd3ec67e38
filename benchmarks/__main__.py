"""Time everything, one process after the other; print the ratios and write them as JSON and PNG.

    python3 -m bench              # what `make bench` runs: three repeats, some 20 minutes
    python3 -m bench --repeats=1  # a first look

Ours and the peer's take turns, so that a machine that slows down slows both. A ratio is of one repeat; the table gives
the median over the repeats, and their range.
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

from benchmarks.throughput import REPOSITORY
from common.errors import cli_entry_point
from common.fileio import write_json
from train.plots import save_figure

MODELS = ("esmm", "mmoe", "ple")
TITLES = {"esmm": "ESMM", "mmoe": "MMoE", "ple": "PLE"}
AGAINST_PEER = {"train": "training", "evaluate_distinct": "evaluation, every row distinct",
                "evaluate_repeating": "evaluation, published features (rows repeat)"}
FLOORS = {"train": (4.0, 3.0, 2.5), "evaluate_distinct": (5.0, 3.0, 3.0), "evaluate_repeating": (8.0, 8.0, 8.0)}
ALONE = {"sessions": ("sessions built from the table", "rows/s", "rows_per_s"),
         "memory": ("buffer fill through the vector environment", "transitions/s", "rows_per_s"),
         "critics": ("critic updates, both critics, batch 2,048", "rows/s", "rows_per_s"),
         "real_size": ("`dataset.prepare` at real size (2.73 M events, 20.3 M property rows)", "s", "seconds"),
         "commands": ("the three commands end to end", "s", "seconds")}
GOALS = {"sessions": 1e6, "memory": 5e5, "critics": 15e3, "real_size": 120.0, "commands": 180.0}
Results = dict[str, list[dict[str, float]]]  # "train ours esmm" -> the figures of each repeat


def measure(work: str) -> dict[str, float]:
    """Run one measurement to its end."""
    done = subprocess.run([sys.executable, "-m", "bench.measure", *work.split()], cwd=REPOSITORY, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{work}: {done.stderr.strip().splitlines()[-1]}")
    return {name: float(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


def ratios(results: Results, work: str, name: str) -> list[float]:
    """Ours over the peer's, repeat by repeat."""
    return [ours["rows_per_s"] / peer["rows_per_s"]
            for ours, peer in zip(results[f"{work} ours {name}"], results[f"{work} peer {name}"], strict=True)]


def share_of_matrix_rate(results: Results, side: str, name: str) -> float:
    """The share of the fastest matrix product's rate at which a training step executes what it must."""
    return median(one["rows_per_s"] * one["flop_per_row"] / max(rate.values())
                  for one, rate in zip(results[f"train {side} {name}"], results["matrix_rate"], strict=True))


def spread(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{median(values):{form}} ({low:{form}} to {high:{form}})"


def table(results: Results) -> str:
    """Markdown: against the peer; the arithmetic of a training step; ours alone."""
    lines = ["| rows a second, batch 2,048 | RMTL | torch-rechub 0.9.0 | ratio (range) | at least |",
             "|---|---|---|---|---|"]
    for work, title in AGAINST_PEER.items():
        for name, floor in zip(MODELS, FLOORS[work], strict=True):
            of_ours, of_peer = (median(one["rows_per_s"] for one in results[f"{work} {side} {name}"])
                                for side in ("ours", "peer"))
            lines.append(f"| {TITLES[name]} {title} | {of_ours:,.0f} | {of_peer:,.0f} | "
                         f"{spread(ratios(results, work, name), '.1f')} | {floor:g} |")
    rate = {name: median(one[name] for one in results["matrix_rate"]) / 1e9 for name in results["matrix_rate"][0]}
    lines += ["", "A training step beside the matrix product alone, which reaches "
              f"{rate['mkl']:.0f} GFLOP/s with MKL and "
              f"{rate['onednn']:.0f} with oneDNN:", "",
              "| training | RMTL: MFLOP a row | of the matrix rate | torch-rechub: MFLOP a row | of the matrix rate |",
              "|---|---|---|---|---|"]
    for name in MODELS:
        cells = [f"{results[f'train {side} {name}'][0]['flop_per_row'] / 1e6:.1f} | "
                 f"{share_of_matrix_rate(results, side, name):.0%}" for side in ("ours", "peer")]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    lines += ["", "| work | RMTL (range) | goal |", "|---|---|---|"]
    for work, (title, unit, figure) in ALONE.items():
        values, goal = [one[figure] for one in results[work]], GOALS[work]
        lines.append(f"| {title} | {spread(values, ',.0f')} {unit} | "
                     f"{'under' if unit == 's' else 'at least'} {goal:,.0f} |")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Bars of the ratios with their range, and the goal of each."""
    labels, middle, low, high, goals = [], [], [], [], []
    for work, title in AGAINST_PEER.items():
        for name, floor in zip(MODELS, FLOORS[work], strict=True):
            values = ratios(results, work, name)
            labels.append(f"{TITLES[name]} {title.split(' (')[0]}")
            middle.append(median(values))
            low.append(median(values) - min(values))
            high.append(max(values) - median(values))
            goals.append(floor)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(labels), 0, -1)
    axes.barh(places, middle, xerr=[low, high], color="tab:blue", alpha=0.8, capsize=3)
    axes.plot(goals, places, "|", color="black", markersize=14, markeredgewidth=2, label="goal")
    axes.axvline(1, color="grey", linewidth=1)
    for place, value, above in zip(places, middle, high, strict=True):
        axes.annotate(f"{value:.1f} x", (value + above, place), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_xscale("log")
    axes.set_xlim(0.9, 2 * max(middle))
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.set_yticks(list(places), labels)
    axes.set_xlabel("rows a second, times those of torch-rechub 0.9.0 (same table, same run)")
    axes.legend(loc="upper right")
    save_figure(figure, path)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability()}


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="how often everything is measured (default 3)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench", help="the folder of results.json and .png")
    arguments = parser.parse_args()
    works = ["matrix_rate", *(f"{work} {side} {name}" for work in AGAINST_PEER for name in MODELS
                              for side in ("ours", "peer")), *ALONE]
    results: Results = {work: [] for work in works}
    with tqdm(total=arguments.repeats * len(works), unit=" measurements", disable=None) as bar:
        for _ in range(arguments.repeats):
            for work in works:
                bar.set_description(work)
                results[work].append(measure(work))
                bar.update()
    print(table(results))
    write_json(arguments.out / "results.json", {"machine": machine(), "repeats": arguments.repeats, "results": results})
    plot(results, arguments.out / "results.png")
    print(f"\nwritten to {arguments.out / 'results.json'} and results.png")


if __name__ == "__main__":
    main()
