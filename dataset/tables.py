"""The MDP tables on disk: their columns, how an importer writes them, how one table is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from common.csv_reader import ColumnType, cell_location, read_chunks, read_table
from common.errors import UserError
from common.fileio import atomic_folder, check_writable, require_free_memory, sha256, write_json

SPLITS = ("train", "val", "test")
GZIP_RATIO = 6  # uncompressed bytes per byte of a .gz log, about
MINUTE_MS = 60_000


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
        rows: the output of `order_rows`; columns split, timestamp, sessionid, the keys of the feature tables, the
            context fields, and for each label `<label>` (0 or 1) and `<label>_time`, when its outcome was known, in ms;
            without that column, directly after the row. Other columns are not written.
        row_counts: how many raw rows were read, dropped, merged and kept.
        inputs: the raw files.
        feature_tables: file name to table.
        context: fields that are columns of the rows themselves.
        history_key: the key, such as the user's, over whose earlier rows the session features are computed; "": over
            the earlier rows of the session.
        long_tailed: fields of which only the frequent values are kept (`--feature_map_rate`).
        rates: fields, keys or pairs of them, such as userid&tab, whose counts and rates so far are numerical features
            (`dataset.features.running_rates`).
        tasks: objects with "name" and "label"; the first is CTR.
        simulation, ground_truth: of a simulated log, its settings and the true probabilities of the rows.
    """

    source: str
    rows: pd.DataFrame
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
        offsets = np.searchsorted(self.rows["split"], range(len(SPLITS) + 1))
        return {name: self.rows.iloc[start:stop]
                for name, start, stop in zip(SPLITS, offsets[:-1], offsets[1:], strict=True)}

    @property
    def labels(self) -> list[str]:
        return [task["label"] for task in self.tasks]


def number_sessions(key: ArrayLike, timestamp: ArrayLike, split: ArrayLike = 0,
                    gap_minutes: float = 0.0) -> NDArray[np.int64]:
    """The session of each of n rows, (n,), numbered from 0 by split, key and time.

    A session is the rows of one key, such as a user, inside a split; with `gap_minutes` it also ends after so many
    minutes without a row. `key`, `timestamp` (ms) and `split` are numbers, (n,) each, in any order.
    """
    columns = np.broadcast_arrays(split, key, timestamp)
    order = np.lexsort(columns[::-1])
    splits, keys, times = (column[order] for column in columns)
    is_start = np.ones(len(order), bool)
    is_start[1:] = (splits[1:] != splits[:-1]) | (keys[1:] != keys[:-1])
    if gap_minutes:
        is_start[1:] |= np.diff(times) > gap_minutes * MINUTE_MS
    session = np.empty(len(order), np.int64)
    session[order] = np.cumsum(is_start) - 1
    return session


def session_order(rows: pd.DataFrame) -> NDArray[np.int64]:
    """The row numbers (n,) in order of session start, session and time; rows at the same time keep their order."""
    time = rows["timestamp"].to_numpy()
    sessions, session = np.unique(rows["sessionid"].to_numpy(), return_inverse=True)
    start = np.full(len(sessions), np.iinfo(np.int64).max)
    np.minimum.at(start, session, time)
    return np.lexsort((time, session, start[session]))


def order_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """MDP rows in the order of the tables: by split, then as by `session_order`.

    `rows` has the columns `split` (0: train, 1: val, 2: test), `sessionid` and `timestamp` (ms), and any others.
    Raises UserError if a split is empty or a session is in two splits.
    """
    split = rows["split"].to_numpy()
    sessions = rows[["sessionid", "split"]].drop_duplicates()
    found = np.unique(split).tolist()
    if found != [*range(len(SPLITS))]:
        raise UserError(f"the remaining {len(sessions):,} sessions ({len(rows):,} rows) cannot be cut into train, val "
                        f"and test, 0, 1 and 2: they are in splits {found}: a larger log is needed")
    shared = sessions["sessionid"][sessions["sessionid"].duplicated()]
    if len(shared):
        raise UserError(f"session {shared.iloc[0]} is in two splits: number the sessions inside a split, see "
                        "dataset.tables.number_sessions")
    order = session_order(rows)
    return rows.iloc[order[np.argsort(split[order], kind="stable")]].reset_index(drop=True)


def validation_start(rows: pd.DataFrame) -> int:
    """When validation starts, ms: feature tables must contain nothing later."""
    return int(rows["timestamp"][rows["split"] == 1].min())


def require_new_folder(out_dir: Path) -> None:
    """Raise UserError if a folder exists already or cannot be written: an import fails at its start."""
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already: choose another name, or move that folder away first")
    check_writable(out_dir.parent)


def write_dataset(dataset: PreparedDataset, out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder `out_dir`: a CSV per split, the feature tables, and `manifest.json`, which describes them.

    Raises UserError if it exists already.
    """
    require_new_folder(out_dir)
    keys = list(dict.fromkeys(table.key for table in dataset.feature_tables.values()))
    columns = ["timestamp", "sessionid", *keys, *dataset.context, *reversed(dataset.labels)]
    with atomic_folder(out_dir) as folder:
        for name, split in dataset.splits.items():
            written = split[columns].copy()
            for label in dataset.labels:
                known_from = split.get(f"{label}_time", split["timestamp"])
                written[f"{label}_time"] = known_from.astype("Int64").where(split[label] > 0)
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
            "boundary": validation_start(dataset.rows),
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
        lengths = split.groupby("sessionid").size()
        rates = "".join(f"{split[label].mean():>{max(9, len(label) + 2)}.2%}" for label in dataset.labels)
        print(f"{name:<8}{len(split):>12,}{len(lengths):>12,}{rates}"
              f"   {lengths.median():.0f}, {lengths.quantile(0.99):.0f}, {lengths.max()}")
    cutoff = validation_start(dataset.rows)
    after_cutoff = int((dataset.splits["train"]["timestamp"] > cutoff).sum())
    print(f"the first validation session starts at {pd.Timestamp(cutoff, unit='ms'):%Y-%m-%d %H:%M:%S} UTC; "
          f"{after_cutoff:,} train rows after the cutoff\n")


def require_memory_for(memory_factor: Mapping[Path, float]) -> None:
    """Raise UserError if raw files do not fit into memory. `memory_factor`: bytes of memory per byte of each CSV."""
    sizes = {path: path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1) for path in memory_factor}
    require_free_memory(sum(sizes[path] * factor for path, factor in memory_factor.items()),
                        f"{next(iter(sizes)).parent}: {sum(sizes.values()) / 2**30:.1f} GiB of CSV")


def find_csv(raw_dir: Path, pattern: str, description: str, option: str = "--raw") -> list[Path]:
    """The files `<pattern>.csv` and `<pattern>.csv.gz` of a folder, by name. Raises UserError if there are none."""
    paths = sorted(path for suffix in (".csv", ".csv.gz") for path in raw_dir.glob(pattern + suffix) if path.exists())
    if not paths:
        raise UserError(f"{raw_dir / pattern}.csv: no such file: {option} takes the folder of {description}")
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


def read_split(path: Path, manifest: Mapping[str, Any], labels_optional: bool = False) -> pd.DataFrame:
    labels = [str(task["label"]) for task in manifest["tasks"]]
    keys = [str(table["key"]) for table in manifest["tables"].values()]
    event_times = [f"{label}_time" for label in labels]
    schema: dict[str, ColumnType] = {
        **dict.fromkeys(["timestamp", "sessionid", "visitorid", *keys], "id"),
        **dict.fromkeys(manifest["context"], "optional_text"),
        **dict.fromkeys(labels, "label"),
        **dict.fromkeys(event_times, "optional_id"),
    }
    table = read_table(path, schema, optional=["sessionid", "visitorid", *event_times, *labels * labels_optional])
    if "sessionid" not in table:
        if "visitorid" not in table:
            raise UserError(f"{path}, line 1: column 'sessionid' is missing (or the published 'visitorid')")
        table = table.rename(columns={"visitorid": "sessionid"})
    return table
