"""Time and memory from 0.1 to 10 million rows: `python3 -m bench.scale` writes scale.json and scale.png.

The default simulated tables are laid end to end, with sessions of their own, as the published tables would be; then
SLmain.py trains ESMM on them for one epoch, from the CSV files to the test metrics.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.__main__ import machine
from benchmarks.throughput import REPOSITORY, data
from common.fileio import write_json
from dataset.tables import SPLITS
from train.plots import save_figure

MILLIONS = (0.1, 0.3, 1.0, 3.0, 10.0)
COMMAND = ("SLmain.py", "--dataset_name=scaled", "--model_name=esmm", "--epoch=1")


def lay_out(source: Path, folder: Path, rows: int) -> int:
    """Write tables of about so many rows to `folder`, from those in `source`; return how many there are."""
    folder.mkdir(parents=True)
    (folder / "item_feadf.csv").write_bytes((source / "item_feadf.csv").read_bytes())
    tables = {name: pd.read_csv(source / f"{name}.csv") for name in SPLITS}
    sessions = 1 + max(int(table["sessionid"].max()) for table in tables.values())
    count = sum(map(len, tables.values()))
    written = 0
    for name, table in tables.items():
        left, copy = round(rows * len(table) / count), 0
        while left > 0:
            piece = table.head(left).assign(sessionid=lambda one, copy=copy: one["sessionid"] + copy * sessions)
            piece.to_csv(folder / f"{name}.csv", mode="a", header=copy == 0, index=False)
            left, copy, written = left - len(piece), copy + 1, written + len(piece)
    return written


def measure(folder: Path) -> dict[str, float]:
    """Seconds and the most memory (GiB) of the command in `folder`, in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(REPOSITORY / COMMAND[0]), *COMMAND[1:]], cwd=folder,
                               stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(COMMAND)}: exit code {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.perf_counter() - start, "gib": usage.ru_maxrss / 2**20}


def main() -> None:
    out = REPOSITORY / "bench"
    cache = Path(os.environ.get("RMTL_BENCH", tempfile.gettempdir())) / "rmtl-bench"
    data(cache)
    results = []
    for millions in MILLIONS:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            rows = lay_out(cache / "rt", Path(folder) / "dataset" / "scaled", round(millions * 1e6))
            results.append({"rows": rows, **measure(Path(folder))})
        print(json.dumps(results[-1]), flush=True)
    write_json(out / "scale.json", {"machine": machine(), "command": " ".join(COMMAND), "results": results})
    plot(results, out / "scale.png")


def plot(results: list[dict[str, float]], path: Path) -> None:
    """Seconds and memory over the rows, beside the line from the first point to the last."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    rows_m = [one["rows"] / 1e6 for one in results]
    for axes, (key, label) in zip(figure.subplots(1, 2), (("seconds", "seconds"), ("gib", "GiB at the most")),
                                  strict=True):
        values = [one[key] for one in results]
        slope = (values[-1] - values[0]) / (rows_m[-1] - rows_m[0])
        axes.plot(rows_m, [values[0] + slope * (x - rows_m[0]) for x in rows_m], ":", color="grey", label="linear")
        axes.plot(rows_m, values, "o", label=f"measured: {slope:.2g} a million rows")
        axes.set_xlabel("million rows")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("SLmain.py, from CSV to test metrics: ESMM, 1 epoch", fontsize=10)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
