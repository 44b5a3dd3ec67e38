"""The MDP tables: what a source of raw logs hands over, and how it is written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from dataset.files import Kind, UserError, atomic_folder, check_memory, read_chunks, sha256, write_json

SPLITS = ("train", "val", "test")
GZIP = 6  # bytes of a log in a byte of its .gz, about
NEVER = np.iinfo(np.int64).max


class Line(NamedTuple):
    """A line of the account: what, how many."""

    what: str
    rows: int
    indent: int = 1


class SideTable(NamedTuple):
    """Features of items, or of users: a column of the MDP rows is its key, all its other columns are fields."""

    key: str
    table: pd.DataFrame

    @property
    def fields(self) -> list[str]:
        return [str(name) for name in self.table.columns if name != self.key]


@dataclass(frozen=True)
class Tables:
    """What a source makes of its raw logs.

    Attributes:
        rows: in order of split, session start and time; columns timestamp, sessionid, `number` (the sessions counted),
            the keys of the side tables, the context fields, and for each label `<label>` and `<label>_time` (ms;
            `NEVER`, or missing, where it did not happen).
        cuts: the row numbers (0, a, b, rows) between which train, val and test lie; no session straddles one.
        boundary: when validation starts, ms; side tables know nothing later where the source can tell.
        sides: file name to table.
        context: fields that are columns of the rows themselves.
        history: the key over whose earlier rows the session-so-far numbers look back, such as the user's; "": the
            session's only.
        long_tailed: fields of which only the frequent values are kept (`--feature_map_rate`).
        tasks: objects with "name" and "label"; the first is CTR.
        simulation, truth: of a simulated log, its settings and the true probabilities of the rows.
    """

    source: str
    rows: pd.DataFrame
    cuts: list[int]
    boundary: int
    account: list[Line]
    inputs: list[Path]
    sides: dict[str, SideTable]
    context: list[str]
    long_tailed: list[str]
    tasks: list[dict[str, str]]
    history: str = ""
    simulation: dict[str, Any] | None = None
    truth: pd.DataFrame | None = None

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        return {name: self.rows.iloc[start:stop]
                for name, start, stop in zip(SPLITS, self.cuts[:-1], self.cuts[1:], strict=True)}

    @property
    def labels(self) -> list[str]:
        return [task["label"] for task in self.tasks]


def write(tables: Tables, out: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder `out`: a CSV a split, the side tables and `manifest.json`, which describes them all."""
    keys = list(dict.fromkeys(side.key for side in tables.sides.values()))
    columns = ["timestamp", "sessionid", *keys, *tables.context, *reversed(tables.labels),
               *(f"{name}_time" for name in tables.labels)]
    with atomic_folder(out) as folder:
        for name, split in tables.splits.items():
            written = split[columns].copy()
            for label in tables.labels:
                when = written[f"{label}_time"]
                written[f"{label}_time"] = when.astype("Int64").mask(when == NEVER)
            written.to_csv(folder / f"{name}.csv", index=False)
        for name, side in tables.sides.items():
            side.table.to_csv(folder / name, index=False)
        if tables.truth is not None:
            tables.truth.to_csv(folder / "truth.csv", index=False)
        manifest = {
            "format": 1,
            "source": tables.source,
            "simulation": tables.simulation,
            "inputs": {path.name: sha256(path)
                       for path in tqdm(tables.inputs, "fingerprints", leave=False, disable=None)},
            "settings": dict(settings),
            "boundary": tables.boundary,
            "account": [[line.what, line.rows] for line in tables.account],
            "categorical": [*tables.context, *(name for side in tables.sides.values() for name in side.fields)],
            "long_tailed": tables.long_tailed,
            "context": tables.context,
            "history": tables.history,
            "tables": {name: {"key": side.key, "fields": side.fields} for name, side in tables.sides.items()},
            "tasks": tables.tasks,
            "rows": {name: len(split) for name, split in tables.splits.items()},
            "outputs": {path.name: sha256(path) for path in sorted(folder.glob("*.csv"))},
        }
        write_json(folder / "manifest.json", manifest)


def print_account(tables: Tables) -> None:
    """Print what became of every raw row, and what the splits are like."""
    for line in tables.account:
        print(f"{'  ' * line.indent + line.what:<66}{line.rows:>14,}")
    shares = "".join(f"{name:>{max(9, len(name) + 2)}}" for name in tables.labels)
    print(f"\n{'':<8}{'rows':>12}{'sessions':>12}{shares}   rows a session: median, 99 %, longest")
    for name, split in {**tables.splits, "all": tables.rows}.items():
        lengths = split.groupby("number").size()
        shares = "".join(f"{split[label].mean():>{max(9, len(label) + 2)}.2%}" for label in tables.labels)
        print(f"{name:<8}{len(split):>12,}{len(lengths):>12,}{shares}"
              f"   {lengths.median():.0f}, {lengths.quantile(0.99):.0f}, {lengths.max()}")
    after = int((tables.splits["train"]["timestamp"] > tables.boundary).sum())
    print(f"the first validation session starts at {pd.Timestamp(tables.boundary, unit='ms'):%Y-%m-%d %H:%M:%S} UTC; "
          f"{after:,} rows of train sessions are later than that\n")


def check_sizes(bytes_a_byte: Mapping[Path, float]) -> None:
    """Refuse raw files that would not fit into memory; of each the bytes that a byte of CSV takes. Raises UserError."""
    sizes = {path: path.stat().st_size * (GZIP if path.suffix == ".gz" else 1) for path in bytes_a_byte}
    check_memory(sum(sizes[path] * factor for path, factor in bytes_a_byte.items()),
                 f"{next(iter(sizes)).parent}: {sum(sizes.values()) / 2**30:.1f} GiB of CSV")


def find(raw: Path, stem: str, what: str) -> Path:
    """The file `<stem>.csv`, or `.csv.gz`, in a folder. Raises UserError."""
    for path in (raw / f"{stem}.csv", raw / f"{stem}.csv.gz"):
        if path.exists():
            return path
    raise UserError(f"{raw / stem}.csv: no such file: --raw takes the folder of {what}")


def read_with_progress(path: Path, kinds: Mapping[str, Kind]) -> Iterator[pd.DataFrame]:
    """The checked rows of a raw file, half a million at a time."""
    with tqdm(desc=path.name, unit=" rows", unit_scale=True, leave=False, disable=None) as bar:
        for chunk in read_chunks(path, kinds, chunk_rows=500_000):
            yield chunk
            bar.update(len(chunk))
