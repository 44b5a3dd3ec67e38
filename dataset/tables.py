"""The MDP tables on disk: their columns, how an importer writes them, how one table is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.csv_reader import ColumnType, cell_location, read_chunks, read_table
from common.errors import UserError
from common.fileio import atomic_folder, require_free_memory, sha256, write_json

SPLITS = ("train", "val", "test")
GZIP_RATIO = 6  # uncompressed bytes per byte of a .gz log, about
NO_EVENT_MS = np.iinfo(np.int64).max


@dataclass(frozen=True)
class CountRow:
    """A number of raw rows, printed and listed in manifest.json."""

    label: str
    count: int
    indent: int = 1


class FeatureTable(NamedTuple):
    """Features of items, or of users: one column is a key of the MDP rows, the others are fields."""

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
            `NO_EVENT_MS` or missing: it did not happen).
        split_offsets: the row numbers (0, a, b, rows) between which train, val and test are; splits share no session.
        train_end_ms: when validation starts, ms; feature tables contain nothing later if the source has times.
        row_counts: how many raw rows were read, dropped, merged and kept.
        inputs: the raw files.
        feature_tables: file name to table.
        context: fields that are columns of the rows themselves.
        history_key: the key, such as the user's, over whose earlier rows the session features are computed; "": over
            the earlier rows of the session.
        long_tailed: fields of which only the frequent values are kept (`--feature_map_rate`).
        rates: fields whose counts and rates so far are numerical features (`dataset.features.running_rates`).
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
    rates: Sequence[str] = ()
    simulation: dict[str, Any] | None = None
    ground_truth: pd.DataFrame | None = None

    @property
    def splits(self) -> dict[str, pd.DataFrame]:
        return {name: self.rows.iloc[start:stop]
                for name, start, stop in zip(SPLITS, self.split_offsets[:-1], self.split_offsets[1:], strict=True)}

    @property
    def labels(self) -> list[str]:
        return [task["label"] for task in self.tasks]


def write_dataset(dataset: PreparedDataset, out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder `out_dir`: a CSV per split, the feature tables, and `manifest.json`, which describes them."""
    keys = list(dict.fromkeys(table.key for table in dataset.feature_tables.values()))
    columns = ["timestamp", "sessionid", *keys, *dataset.context, *reversed(dataset.labels),
               *(f"{label}_time" for label in dataset.labels)]
    with atomic_folder(out_dir) as folder:
        for name, split in dataset.splits.items():
            written = split[columns].copy()
            for label in dataset.labels:
                event_time = written[f"{label}_time"]
                written[f"{label}_time"] = event_time.astype("Int64").mask(event_time == NO_EVENT_MS)
            written.to_csv(folder / f"{name}.csv", index=False)
        for name, feature_table in dataset.feature_tables.items():
            feature_table.table.to_csv(folder / name, index=False)
        if dataset.ground_truth is not None:
            dataset.ground_truth.to_csv(folder / "truth.csv", index=False)
        manifest = {
            "format": 1,
            "source": dataset.source,
            "simulation": dataset.simulation,
            "inputs": {path.name: sha256(path)
                       for path in tqdm(dataset.inputs, "fingerprints", leave=False, disable=None)},
            "settings": dict(settings),
            "boundary": dataset.train_end_ms,
            "row_counts": [[row.label, row.count] for row in dataset.row_counts],
            "categorical": [*dataset.context, *(field for table in dataset.feature_tables.values()
                                                for field in table.fields)],
            "long_tailed": dataset.long_tailed,
            "rates": list(dataset.rates),
            "context": dataset.context,
            "history": dataset.history_key,
            "tables": {name: {"key": table.key, "fields": table.fields}
                       for name, table in dataset.feature_tables.items()},
            "tasks": dataset.tasks,
            "rows": {name: len(split) for name, split in dataset.splits.items()},
            "outputs": {path.name: sha256(path) for path in sorted(folder.glob("*.csv"))},
        }
        write_json(folder / "manifest.json", manifest)


def print_row_counts(dataset: PreparedDataset) -> None:
    """Print how many raw rows were read, dropped, merged and kept, and statistics of the splits."""
    for row in dataset.row_counts:
        print(f"{'  ' * row.indent + row.label:<66}{row.count:>14,}")
    rates = "".join(f"{label:>{max(9, len(label) + 2)}}" for label in dataset.labels)
    print(f"\n{'':<8}{'rows':>12}{'sessions':>12}{rates}   rows per session: median, 99 %, max")
    for name, split in {**dataset.splits, "all": dataset.rows}.items():
        lengths = split.groupby("session_index").size()
        rates = "".join(f"{split[label].mean():>{max(9, len(label) + 2)}.2%}" for label in dataset.labels)
        print(f"{name:<8}{len(split):>12,}{len(lengths):>12,}{rates}"
              f"   {lengths.median():.0f}, {lengths.quantile(0.99):.0f}, {lengths.max()}")
    after_cutoff = int((dataset.splits["train"]["timestamp"] > dataset.train_end_ms).sum())
    cutoff = pd.Timestamp(dataset.train_end_ms, unit="ms")
    print(f"the first validation session starts at {cutoff:%Y-%m-%d %H:%M:%S} UTC; "
          f"{after_cutoff:,} train rows after the cutoff\n")


def require_memory_for(memory_factor: Mapping[Path, float]) -> None:
    """Raise UserError if raw files do not fit into memory. `memory_factor`: bytes of memory per byte of each CSV."""
    sizes = {path: path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1) for path in memory_factor}
    require_free_memory(sum(sizes[path] * factor for path, factor in memory_factor.items()),
                        f"{next(iter(sizes)).parent}: {sum(sizes.values()) / 2**30:.1f} GiB of CSV")


def require_three_splits(split_offsets: Sequence[int], description: str) -> None:
    """Raise UserError if a split is empty; `description` is what was cut."""
    if min(np.diff(split_offsets)) < 1:
        raise UserError(f"the {description} cannot be cut 6:2:2 into train, val and test: a larger log is needed")


def find_csv(raw_dir: Path, pattern: str, description: str) -> list[Path]:
    """The files `<pattern>.csv` and `<pattern>.csv.gz` of a folder, by name. Raises UserError if there are none."""
    paths = sorted(path for suffix in (".csv", ".csv.gz") for path in raw_dir.glob(pattern + suffix) if path.exists())
    if not paths:
        raise UserError(f"{raw_dir / pattern}.csv: no such file: --raw takes the folder of {description}")
    return paths


def read_with_progress(path: Path, schema: Mapping[str, ColumnType]) -> Iterator[pd.DataFrame]:
    """The checked rows of a raw file, half a million at a time, with a progress bar."""
    with tqdm(desc=path.name, unit=" rows", unit_scale=True, leave=False, disable=None) as bar:
        for chunk in read_chunks(path, schema, chunk_rows=500_000):
            yield chunk
            bar.update(len(chunk))


def read_feature_table(path: Path, key: str, fields: Sequence[str]) -> FeatureTable:
    schema: dict[str, ColumnType] = {key: "id", **dict.fromkeys(fields, "optional_text")}
    table = read_table(path, schema)
    duplicates = table[key].duplicated().to_numpy()
    if duplicates.any():
        row = int(duplicates.argmax())
        raise UserError(f"{cell_location(path, row, key)}: duplicate {key.removesuffix('id')} "
                        f"{table[key][row]}: remove one of its rows")
    return FeatureTable(key, table)


def read_split(path: Path, manifest: Mapping[str, Any]) -> pd.DataFrame:
    labels = [str(task["label"]) for task in manifest["tasks"]]
    keys = [str(table["key"]) for table in manifest["tables"].values()]
    event_times = [f"{label}_time" for label in labels]
    schema: dict[str, ColumnType] = {
        **dict.fromkeys(["timestamp", "sessionid", "visitorid", *keys], "id"),
        **dict.fromkeys(manifest["context"], "optional_text"),
        **dict.fromkeys(labels, "label"),
        **dict.fromkeys(event_times, "optional_id"),
    }
    table = read_table(path, schema, optional=["sessionid", "visitorid", *event_times])
    if "sessionid" not in table:
        if "visitorid" not in table:
            raise UserError(f"{path}, line 1: column 'sessionid' is missing (or the published 'visitorid')")
        table = table.rename(columns={"visitorid": "sessionid"})
    return table
