"""Time and memory of 1, 10 and 30 million rows: `python3 -m benchmarks.scaling` writes scale.json and scale.png.

The default simulated tables are repeated with new session ids; then SLmain.py trains ESMM on them for one epoch, from
the CSV files to the test metrics, with the data in memory-mapped files. Memory is the anonymous memory (RssAnon) of the
process, sampled: pages of mapped files do not count, the system takes them back where it needs them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.__main__ import hardware_info
from benchmarks.memory import measure
from benchmarks.throughput import REPOSITORY, cache_folder, load_data
from common.errors import cli_entry_point, command_line
from common.fileio import write_json
from dataset.manifest import SPLITS
from train.plots import save_figure

ROWS = (1_000_000, 10_000_000, 30_000_000)
COMMAND = ("SLmain.py", "--dataset_name=scaled", "--model_name=esmm", "--epoch=1")


def tile_tables(source: Path, folder: Path, rows: int) -> int:
    """Repeat the tables in `source` up to about `rows` rows in `folder`; return the number of rows."""
    folder.mkdir(parents=True)
    (folder / "item_feadf.csv").write_bytes((source / "item_feadf.csv").read_bytes())
    tables = {name: pd.read_csv(source / f"{name}.csv") for name in SPLITS}
    sessions = 1 + max(int(table["sessionid"].max()) for table in tables.values())
    count = sum(map(len, tables.values()))
    written = 0
    for name, table in tables.items():
        missing, copy = round(rows * len(table) / count), 0
        while missing > 0:
            piece = table.head(missing).copy()
            piece["sessionid"] += copy * sessions
            piece.to_csv(folder / f"{name}.csv", mode="a", header=copy == 0, index=False)
            missing, copy, written = missing - len(piece), copy + 1, written + len(piece)
    return written


def profile_run(folder: Path, *flags: str) -> dict[str, float]:
    """Seconds and peak anonymous memory (GiB) of the command in `folder`, in a separate process. Raises UserError."""
    seconds, peak = measure([*COMMAND, *flags], folder)
    return {"seconds": seconds, "gib": peak / 2**30}


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(prog=command_line([]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="how many (default 1, 10 and 30 million)")
    parser.add_argument("--data", choices=["mapped", "memory"], default="mapped", help="where the data are")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "performance", help="the folder of the "
                        "results")
    given = parser.parse_args()
    cache, results = cache_folder(), []
    load_data(cache)
    for count in given.rows:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            rows = tile_tables(cache / "rt", Path(folder) / "dataset" / "scaled", count)
            results.append({"rows": rows, **profile_run(Path(folder), f"--data={given.data}")})
        print(json.dumps(results[-1]), flush=True)
    write_json(given.out / "scale.json", {"machine": hardware_info(), "command": " ".join(COMMAND),
                                          "data": given.data, "results": results})
    plot(results, given.out / "scale.png")


def plot(results: list[dict[str, float]], path: Path) -> None:
    """Seconds and memory against rows, with the line from the first point to the last."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    millions = [result["rows"] / 1e6 for result in results]
    for axes, (key, label) in zip(figure.subplots(1, 2), (("seconds", "seconds"), ("gib", "anonymous memory (GiB)")),
                                  strict=True):
        values = [result[key] for result in results]
        slope = (values[-1] - values[0]) / ((millions[-1] - millions[0]) or 1)
        axes.plot(millions, [values[0] + slope * (x - millions[0]) for x in millions], ":", color="grey",
                  label="linear")
        axes.plot(millions, values, "o", label=f"measured: {slope:.2g} per million rows")
        axes.set_xlabel("million rows")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("SLmain.py, from CSV to test metrics: ESMM, 1 epoch", fontsize=10)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
