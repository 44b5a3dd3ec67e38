"""The MDP tables: their schema, how an importer writes them, how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.csv_reader import ColumnType, read_chunks, read_table
from common.errors import UserError
from common.fileio import atomic_folder, require_free_memory, sha256, write_json

SPLITS = ("train", "val", "test")
GZIP_RATIO = 6  # bytes of a log in a byte of its .gz, about
NO_EVENT_MS = np.iinfo(np.int64).max


class CountRow(NamedTuple):
    """How many raw rows something happened to; printed, and listed in manifest.json."""

    label: str
    rows: int
    indent: int = 1


class FeatureTable(NamedTuple):
    """Features of items, or of users: one column is the key that the MDP rows have too, the others are fields."""

    key: str
    table: pd.DataFrame

    @property
    def fields(self) -> list[str]:
        return [str(name) for name in self.table.columns if name != self.key]


@dataclass(frozen=True)
class PreparedDataset:
    """The MDP tables that an importer makes of raw logs.

    Attributes:
        rows: in order of split, session start and time; columns timestamp, sessionid, `session_index` (0, 1, ...),
            the keys of the feature tables, the context fields, and for each label `<label>` and `<label>_time` (ms;
            `NO_EVENT_MS`, or missing, where it did not happen).
        split_offsets: the row numbers (0, a, b, rows) where train, val and test begin and end; no session is in two splits.
        train_end_ms: when validation starts, ms; feature tables contain nothing later where the source has times.
        row_counts: what became of the raw rows.
        inputs: the raw files.
        feature_tables: file name to table.
        context: fields that are columns of the rows themselves.
        history_key: the key, such as the user's, over whose earlier rows the session features are computed; "": over
            the session's only.
        long_tailed: fields of which only the frequent values are kept (`--feature_map_rate`).
        tasks: objects with "name" and "label"; the first is CTR.
        simulation, ground_truth: of a simulated log, its settings and the true probabilities of the rows.
    """

    source: str
    rows: pd.DataFrame
    split_offsets: list[int]
    train_end_ms: int
    row_counts: list[CountRow]
    inputs: list[Path]
    feature_tables: dict[str, FeatureTable]
    context: list[str]
    long_tailed: list[str]
    tasks: list[dict[str, str]]
    history_key: str = ""
    simulation: dict[str, Any] | None = None
    ground_truth: pd.DataFrame | None = None

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        return {name: self.rows.iloc[start:stop]
                for name, start, stop in zip(SPLITS, self.split_offsets[:-1], self.split_offsets[1:], strict=True)}

    @property
    def labels(self) -> list[str]:
        return [task["label"] for task in self.tasks]


def write_dataset(tables: PreparedDataset, out: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder `out`: a CSV a split, the feature tables and `manifest.json`, which describes them all."""
    keys = list(dict.fromkeys(table.key for table in tables.feature_tables.values()))
    columns = ["timestamp", "sessionid", *keys, *tables.context, *reversed(tables.labels),
               *(f"{name}_time" for name in tables.labels)]
    with atomic_folder(out) as folder:
        for name, split in tables.splits.items():
            written = split[columns].copy()
            for label in tables.labels:
                when = written[f"{label}_time"]
                written[f"{label}_time"] = when.astype("Int64").mask(when == NO_EVENT_MS)
            written.to_csv(folder / f"{name}.csv", index=False)
        for name, table in tables.feature_tables.items():
            table.table.to_csv(folder / name, index=False)
        if tables.ground_truth is not None:
            tables.ground_truth.to_csv(folder / "truth.csv", index=False)
        manifest = {
            "format": 1,
            "source": tables.source,
            "simulation": tables.simulation,
            "inputs": {path.name: sha256(path)
                       for path in tqdm(tables.inputs, "fingerprints", leave=False, disable=None)},
            "settings": dict(settings),
            "boundary": tables.train_end_ms,
            "row_counts": [[line.label, line.rows] for line in tables.row_counts],
            "categorical": [*tables.context, *(name for table in tables.feature_tables.values()
                                               for name in table.fields)],
            "long_tailed": tables.long_tailed,
            "context": tables.context,
            "history": tables.history_key,
            "tables": {name: {"key": table.key, "fields": table.fields}
                       for name, table in tables.feature_tables.items()},
            "tasks": tables.tasks,
            "rows": {name: len(split) for name, split in tables.splits.items()},
            "outputs": {path.name: sha256(path) for path in sorted(folder.glob("*.csv"))},
        }
        write_json(folder / "manifest.json", manifest)


def print_row_counts(tables: PreparedDataset) -> None:
    """Print what became of every raw row, and what the splits are like."""
    for line in tables.row_counts:
        print(f"{'  ' * line.indent + line.label:<66}{line.rows:>14,}")
    shares = "".join(f"{name:>{max(9, len(name) + 2)}}" for name in tables.labels)
    print(f"\n{'':<8}{'rows':>12}{'sessions':>12}{shares}   rows a session: median, 99 %, longest")
    for name, split in {**tables.splits, "all": tables.rows}.items():
        lengths = split.groupby("session_index").size()
        shares = "".join(f"{split[label].mean():>{max(9, len(label) + 2)}.2%}" for label in tables.labels)
        print(f"{name:<8}{len(split):>12,}{len(lengths):>12,}{shares}"
              f"   {lengths.median():.0f}, {lengths.quantile(0.99):.0f}, {lengths.max()}")
    after = int((tables.splits["train"]["timestamp"] > tables.train_end_ms).sum())
    start = pd.Timestamp(tables.train_end_ms, unit="ms")
    print(f"the first validation session starts at {start:%Y-%m-%d %H:%M:%S} UTC; "
          f"{after:,} train rows after the cutoff\n")


def require_memory_for(memory_factor: Mapping[Path, float]) -> None:
    """Refuse raw files that would not fit into memory; of each the bytes that a byte of CSV takes. Raises UserError."""
    sizes = {path: path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1) for path in memory_factor}
    require_free_memory(sum(sizes[path] * factor for path, factor in memory_factor.items()),
                 f"{next(iter(sizes)).parent}: {sum(sizes.values()) / 2**30:.1f} GiB of CSV")


def find_csv(raw: Path, stem: str, what: str) -> Path:
    """The file `<stem>.csv`, or `.csv.gz`, in a folder. Raises UserError."""
    for path in (raw / f"{stem}.csv", raw / f"{stem}.csv.gz"):
        if path.exists():
            return path
    raise UserError(f"{raw / stem}.csv: no such file: --raw takes the folder of {what}")


def read_with_progress(path: Path, schema: Mapping[str, ColumnType]) -> Iterator[pd.DataFrame]:
    """The checked rows of a raw file, half a million at a time."""
    with tqdm(desc=path.name, unit=" rows", unit_scale=True, leave=False, disable=None) as bar:
        for chunk in read_chunks(path, schema, chunk_rows=500_000):
            yield chunk
            bar.update(len(chunk))


def read_feature_table(path: Path, key: str, fields: Sequence[str]) -> FeatureTable:
    schema: dict[str, ColumnType] = {key: "id", **dict.fromkeys(fields, "optional_text")}
    table = read_table(path, schema)
    twice = table[key].duplicated().to_numpy()
    if twice.any():
        line = int(twice.argmax())
        raise UserError(f"{path}, line {line + 2}, column '{key}': {key.removesuffix('id')} {table[key][line]} stands "
                        "there twice")
    return FeatureTable(key, table)


def read_split(path: Path, manifest: Mapping[str, Any]) -> pd.DataFrame:
    labels = [str(task["label"]) for task in manifest["tasks"]]
    keys = [str(one["key"]) for one in manifest["tables"].values()]
    schema: dict[str, ColumnType] = {"timestamp": "id", "sessionid": "id", "visitorid": "id", **dict.fromkeys(keys, "id"),
                              **dict.fromkeys(manifest["context"], "optional_text"),
                              **dict.fromkeys(labels, "label"),
                              **{f"{name}_time": "optional_id" for name in labels}}
    optional = ["sessionid", "visitorid", *(f"{name}_time" for name in labels)]
    table = read_table(path, schema, optional)
    if "sessionid" not in table:
        if "visitorid" not in table:
            raise UserError(f"{path}, line 1: column 'sessionid' is missing (the published 'visitorid' is taken too)")
        table = table.rename(columns={"visitorid": "sessionid"})
    return table
