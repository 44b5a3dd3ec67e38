"""Reproduce every table of the paper, each result beside its control: results.csv, report.md and plots.

    python3 -m experiments --quick         # every table, small models, 3 seeds: minutes
    python3 -m experiments                 # full size: hours
    python3 -m experiments --datasets=kr --embed_dim=64 --feature_map_rate=0.8 --learning_rate=0.0003
    python3 -m experiments --report_only   # report.md and plots from an existing results.csv

A run is one call of `SLmain.py`, `RLmain.py`, `experiments.boosting` or `experiments.controls` with one thread, in its
own directory; `--workers` of them run in parallel, with `--scheduler` on the workers of a Dask cluster. A finished run
is a row of results.csv with its command. After an interruption the same command resumes. report.md and the plots are
written from results.csv alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from common.startup import before_torch
from experiments.conditions import ExperimentArguments
from train.Arguments import parse, to_command_line

if __name__ == "__main__":
    before_torch(lambda: parse(ExperimentArguments, __doc__ or "").check_files())

from common.errors import UserError, cli_entry_point
from common.fileio import check_writable, exclusive_lock
from experiments.cluster import connect
from experiments.report import write_report
from experiments.runner import run_experiments
from experiments.statistics import read_results, write_results


@cli_entry_point
def cli() -> None:
    settings = parse(ExperimentArguments, __doc__ or "")
    path, failure = settings.folder / "results.csv", ""
    if not settings.report_only:
        with exclusive_lock(settings.folder):
            check_writable(settings.folder, files=[path, settings.folder / "report.md"])
            with connect(settings.scheduler) if settings.scheduler else contextlib.nullcontext() as executor:
                failure = run_experiments(settings, path, executor)
    if not path.exists():
        raise UserError(failure or f"{path}: no results yet: run this command without --report_only")
    command = to_command_line("-m experiments", replace(settings, report_only=False, publish_to="", out="", workers=0,
                                                        scheduler=""))
    rows = read_results(path)
    write_report(rows, settings.folder, command)
    if settings.publish_to:
        write_report(rows, Path(settings.publish_to), command)
        write_results(Path(settings.publish_to) / "results.csv", rows)
    print(f"wrote results.csv, report.md and plots to {settings.folder}")
    if failure:
        raise UserError(failure)


if __name__ == "__main__":
    cli()
