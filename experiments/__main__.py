"""Reproduce every table of the paper with our models, each result beside its control: results.csv, report.md and plots.

    python3 experiments.py --quick        # every table, small models, 3 seeds: minutes
    python3 experiments.py                # full size: hours
    python3 experiments.py --datasets=kr --embed_dim=64 --feature_map_rate=0.8 --learning_rate=0.0003
    python3 experiments.py --report       # the report again, from the runs that are there

A run of the grid is a run of `SLmain.py` or `RLmain.py` with one thread, in a folder of its own; as many go side by
side as there are cores. A finished run is a row of results.csv, which names its command; stopped at any point, the same
command goes on from there. Everything else is written from results.csv (`grid.report`).
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program begins: Ctrl-C while torch loads is no traceback

from common.errors import UserError, cli_entry_point
from common.fileio import check_writable, exclusive_lock
from experiments.conditions import GridArguments
from experiments.report import put_into_readme, read_results, write_report, write_results
from experiments.runner import run_grid
from train.Arguments import parse, to_command_line


@cli_entry_point
def cli() -> None:
    settings = parse(GridArguments, __doc__ or "")
    path, failure = settings.folder / "results.csv", ""
    if not settings.report:
        with exclusive_lock(settings.folder):
            check_writable(settings.folder, files=[path, settings.folder / "report.md"])
            failure = run_grid(settings, path)
    if not path.exists():
        raise UserError(failure or f"{path}: no results yet: run this command without --report")
    asked = to_command_line("experiments.py", replace(settings, report=False, publish="", out="", workers=0))
    rows = read_results(path)
    for folder in filter(None, (str(settings.folder), settings.publish)):
        write_report(rows, Path(folder), asked)
    if settings.publish:
        write_results(Path(settings.publish) / "results.csv", rows)
        put_into_readme(Path("README.md"), rows, Path(settings.publish), asked)
    print(f"written to {settings.folder}: results.csv, report.md and plots")
    if failure:
        raise UserError(failure)


if __name__ == "__main__":
    cli()
