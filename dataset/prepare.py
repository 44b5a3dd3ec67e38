"""Raw logs to the MDP tables that all other programs read.

    python3 -m dataset.prepare --raw DIR --out dataset/rt                      # RetailRocket (Kaggle)
    python3 -m dataset.prepare --source kuairand --raw DIR --out dataset/kr    # KuaiRand: Pure, 1K or 27K

The rules are in `dataset.retailrocket` and `dataset.kuairand`, as SQL steps. The output is `train.csv`, `val.csv`,
`test.csv`, `item_feadf.csv` (KuaiRand: `user_feadf.csv` too) and `manifest.json`; of a simulated log also `truth.csv`.
What does not fit into `--memory_limit` lies in a temporary folder beside the output. For a large log `--format=parquet`
is smaller and faster to read.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.duck import MEMORY_LIMIT, connect
from common.errors import UserError, cli_entry_point
from common.fileio import exclusive_lock
from dataset import kuairand, retailrocket
from dataset.engine import Engine
from dataset.spark import open_spark
from dataset.tables import FORMATS, print_row_counts, require_new_folder, write_dataset

IMPORTERS = {"retailrocket": retailrocket, "kuairand": kuairand}
ENGINES: dict[str, Callable[..., contextlib.AbstractContextManager[Engine]]] = {
    "duckdb": lambda con, _folder: contextlib.nullcontext(Engine(con)), "spark": open_spark}


def prepare(raw_dir: Path, out_dir: Path, session_gap: float = 0.0, min_session: int | None = None,
            source: str = "retailrocket", tasks: Sequence[str] = (), memory_limit: int | str = MEMORY_LIMIT,
            file_format: str = "csv", engine: str = "duckdb") -> None:
    """Turn the raw log in `raw_dir` into the folder `out_dir` of MDP tables; the importer's module has the rules.

    Args:
        raw_dir: folder of the raw files.
        out_dir: folder to write, in one step: complete or not at all.
        session_gap: minutes without an event that end a session; 0: a session is a visitor.
        min_session: sessions of fewer rows are dropped; None: the importer's default.
        source: one of `IMPORTERS`.
        tasks: of KuaiRand, labels of `kuairand.TASK_NAMES`; none: the importer's own two.
        memory_limit: bytes of memory for tables; the rest lies in a temporary folder beside `out_dir`.
        file_format: one of `dataset.tables.FORMATS`.
        engine: one of `ENGINES`, which runs the SQL steps.

    Raises:
        UserError: a file is missing, a cell is invalid (file, line and column are named), or `out_dir` exists.
    """
    if source not in IMPORTERS:
        raise UserError(f"--source: unknown '{source}': one of {', '.join(IMPORTERS)}")
    if tasks and source != "kuairand":
        raise UserError(f"--tasks: {source} has its own two tasks: only kuairand has others")
    min_session = IMPORTERS[source].MIN_SESSION_ROWS if min_session is None else min_session
    if session_gap < 0 or not np.isfinite(session_gap) or min_session < 1:
        raise UserError("--session_gap is minutes, 0 or more; --min_session is 1 or more")
    if not raw_dir.is_dir():
        raise UserError(f"{raw_dir}: no such folder: --raw takes the folder of the raw files")
    with exclusive_lock(out_dir):
        require_new_folder(out_dir)
        options = [tasks] if tasks else []
        with connect(memory_limit, folder=out_dir.parent) as con, ENGINES[engine](con, out_dir.parent) as runner:
            dataset = IMPORTERS[source].load_raw(runner, raw_dir, session_gap, min_session, *options)
            print_row_counts(dataset)
            write_dataset(dataset, out_dir, {"session_gap": session_gap, "min_session": min_session}, file_format,
                          memory_limit)


@cli_entry_point
def cli() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m dataset.prepare",
                                     description="Turn raw logs into MDP tables.")
    parser.add_argument("--raw", type=Path, required=True, help="folder of the raw files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, for example dataset/rt")
    parser.add_argument("--source", default="retailrocket", metavar="NAME",
                        help=f"layout of the raw files: {', '.join(IMPORTERS)} (default %(default)s)")
    parser.add_argument("--session_gap", type=float, default=0.0, metavar="MINUTES",
                        help="end a session after so many minutes without an event (default 0: a session is a visitor)")
    parser.add_argument("--min_session", type=int, default=None, metavar="ROWS",
                        help="drop sessions of fewer rows (default: " + ", ".join(
                            f"{name} {module.MIN_SESSION_ROWS}" for name, module in IMPORTERS.items()) + ")")
    parser.add_argument("--tasks", default="", metavar="LABELS",
                        help=f"of kuairand: the tasks, with commas, of {', '.join(kuairand.TASK_NAMES)} (default "
                        f"{','.join(kuairand.TASKS)})")
    parser.add_argument("--memory_limit", default=MEMORY_LIMIT, metavar="BYTES",
                        help="memory for tables, such as 2GB; the rest lies on the disk (default %(default)s)")
    parser.add_argument("--format", default="csv", choices=FORMATS, help="of the tables (default %(default)s)")
    parser.add_argument("--engine", default="duckdb", choices=ENGINES,
                        help="what runs the SQL steps (default %(default)s); spark needs requirements/spark.txt")
    args = parser.parse_args()
    prepare(args.raw, args.out, args.session_gap, args.min_session, args.source,
            [task for task in args.tasks.split(",") if task], args.memory_limit, args.format, args.engine)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli()
