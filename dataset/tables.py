"""The MDP tables on disk: their columns, how an importer writes them, how one table is read."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from common.csv_reader import ColumnType, cell_location, read_chunks, read_header, read_table, require_columns
from common.errors import UserError
from common.fileio import atomic_folder, check_writable, require_free_memory, sha256, write_json
from dataset.manifest import SPLITS, id_columns, read_manifest, task_parents

GZIP_RATIO = 6  # uncompressed bytes per byte of a .gz log, about
MINUTE_MS = 60_000


@dataclass(frozen=True)
class CountRow:
    """A number of raw rows, printed and listed in manifest.json."""

    label: str
    count: int
    indent: int = 1


class FeatureTable(NamedTuple):
    """Features of items, or of users: one column is an id of the MDP rows, its key, the others are fields."""

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
            without that column, directly after the row. Other columns are not written, and named.
        row_counts: how many raw rows were read, dropped, merged and kept.
        inputs: the raw files.
        feature_tables: file name to table.
        context: fields that are columns of the rows themselves.
        history_key: the id, such as the user's, over whose earlier rows the session features are computed; "": over
            the earlier rows of the session.
        long_tailed: fields of which only the frequent values are kept (`--feature_map_rate`).
        rates: fields, keys or pairs of them, such as userid&tab, whose counts and rates so far are numerical features
            (`dataset.features.running_rates`).
        numbers: fields that are numerical features, not categories; a missing one has the mean of the training rows.
        id_fields: ids of the rows, such as `itemid`, that are fields as well: each value has an embedding.
        tasks: objects with "name", "label" and "given", see `dataset.manifest.task_parents`.
        simulation, ground_truth: of a simulated log, its settings and the true probabilities of the rows.

    Raises UserError if a column is missing from the rows, or if one is the time of no label.
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
    numbers: Sequence[str] = ()
    id_fields: Sequence[str] = ()
    simulation: dict[str, Any] | None = None
    ground_truth: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        check_columns("rows", [str(name) for name in self.rows.columns if name != "split"], self.schema)

    @property
    def schema(self) -> dict[str, Any]:
        """The entries of manifest.json that define columns."""
        fields = [*self.context, *(field for table in self.feature_tables.values() for field in table.fields)]
        return {
            "categorical": [*(field for field in fields if field not in self.numbers), *self.id_fields],
            "long_tailed": self.long_tailed,
            "rates": list(self.rates),
            "numbers": list(self.numbers),
            "id_fields": list(self.id_fields),
            "context": self.context,
            "history": self.history_key,
            "tables": {name: {"key": table.key, "fields": table.fields}
                       for name, table in self.feature_tables.items()},
            "tasks": self.tasks,
        }

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
    Raises UserError if one of these is missing or not of whole numbers, if a split is empty or a session is in two.
    """
    require_columns("rows", [*map(str, rows.columns)], ["split", "sessionid", "timestamp"])
    for name, hint in (("split", "0: train, 1: val, 2: test"), ("timestamp", "ms since 1970"),
                       ("sessionid", "see dataset.tables.number_sessions")):
        if not pd.api.types.is_integer_dtype(rows[name]) or rows[name].isna().any():
            raise UserError(f"rows: column '{name}' is not of whole numbers ({rows[name].dtype}): {hint}")
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
        raise UserError(f"{out_dir} exists already: delete it to make it again (rm -r {out_dir}), or write to another "
                        "folder (another --out)")
    check_writable(out_dir.parent)


def write_dataset(dataset: PreparedDataset, out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder `out_dir`: a CSV per split, the feature tables, and `manifest.json`, which describes them.

    Raises UserError if it exists already, or where `load_splits` would: what was written is read again.
    """
    require_new_folder(out_dir)
    with atomic_folder(out_dir) as folder:
        columns = ["timestamp", "sessionid", *id_columns(dataset.schema), *dataset.context, *reversed(dataset.labels)]
        for name, split in dataset.splits.items():
            written = split[columns].copy()
            for label in dataset.labels:
                known_from = split.get(f"{label}_time", split["timestamp"])
                known_from = known_from.where(pd.to_numeric(split[label], errors="coerce") > 0)
                with contextlib.suppress(TypeError, ValueError):  # no whole numbers: reading them names the cell
                    known_from = known_from.astype("Int64")
                written[f"{label}_time"] = known_from
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
            **dataset.schema,
            "rows": {name: len(split) for name, split in dataset.splits.items()},
            "outputs": {path.name: sha256(path) for path in sorted(folder.glob("*.csv"))},
        }
        write_json(folder / "manifest.json", manifest)
        try:
            read_tables(folder, read_manifest(folder / "manifest.json"))
        except UserError as error:
            raise UserError(f"not written: {str(error).replace(str(folder), str(out_dir))}") from None


def print_row_counts(dataset: PreparedDataset) -> None:
    """Print how many raw rows were read, dropped, merged and kept, and statistics of the splits."""
    for row in dataset.row_counts:
        print(f"{'  ' * row.indent + row.label:<66}{row.count:>14,}")
    rates = "".join(f"{label:>{max(9, len(label) + 2)}}" for label in dataset.labels)
    print(f"\n{'':<8}{'rows':>12}{'sessions':>12}{rates}   rows per session: median, 99 %, max")
    for name, split in {**dataset.splits, "all": dataset.rows}.items():
        lengths = split.groupby("sessionid").size()
        rates = "".join(f"{pd.to_numeric(split[label], errors='coerce').mean():>{max(9, len(label) + 2)}.2%}"
                        for label in dataset.labels)
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


def read_tables(folder: Path, manifest: Mapping[str, Any],
                is_published: bool = False) -> tuple[dict[str, pd.DataFrame], dict[str, FeatureTable]]:
    """The rows of each split, and the feature tables by file name, each cell checked.

    is_published: the folder has no manifest of its own: a session may be in two splits, further columns are expected.
    Raises UserError naming file, line and column.
    """
    feature_tables = {name: read_feature_table(folder / name, table["key"], table["fields"], manifest["numbers"])
                      for name, table in manifest["tables"].items()}
    tables = {split: read_split(folder / f"{split}.csv", manifest) for split in SPLITS}
    if is_published:
        return tables, feature_tables
    for split in SPLITS:
        contradiction = find_contradiction(folder / f"{split}.csv", tables[split], manifest["tasks"])
        if contradiction and any("given" in task for task in manifest["tasks"]):
            raise UserError(contradiction)
        check_columns(f"{folder / split}.csv, line 1", read_header(folder / f"{split}.csv"), manifest)
    for earlier, later in itertools.combinations(SPLITS, 2):
        shared = np.intersect1d(tables[earlier]["sessionid"], tables[later]["sessionid"])
        if len(shared):
            raise UserError(f"{folder / later}.csv: session {shared[0]} is in {earlier}.csv too: splits must not share "
                            "sessions")
        different = sorted(set(tables[earlier]) ^ set(tables[later]))
        if different:
            raise UserError(f"{folder / later}.csv: column '{different[0]}' is in it or in {earlier}.csv, not in both")
    return tables, feature_tables


def find_contradiction(path: Path, table: pd.DataFrame, tasks: Sequence[Mapping[str, str]]) -> str:
    """What the first row says that has an outcome without the one that it is given (`task_parents`); "" for none."""
    parents = task_parents(tasks, path)
    for task, parent in zip(tasks, [-1, 0] if parents is None else parents, strict=False):
        label, given = task["label"], tasks[parent]["label"]
        is_wrong = (table[label] > table[given]).to_numpy()
        if parent >= 0 and is_wrong.any():
            return (f"{cell_location(path, int(is_wrong.argmax()), label)}: 1, but '{given}', which it implies, is 0 "
                    f"({int(is_wrong.sum()):,} such rows)")
    return ""


def read_feature_table(path: Path, key: str, fields: Sequence[str], numbers: Sequence[str] = ()) -> FeatureTable:
    schema: dict[str, ColumnType] = {
        key: "id", **{field: "optional_number" if field in numbers else "optional_text" for field in fields}}
    table = read_table(path, schema)
    duplicates = table[key].duplicated().to_numpy()
    if duplicates.any():
        row = int(duplicates.argmax())
        raise UserError(f"{cell_location(path, row, key)}: duplicate {key.removesuffix('id')} "
                        f"{table[key][row]}: remove one of its rows")
    return FeatureTable(key, table)


def read_split(path: Path, manifest: Mapping[str, Any], labels_optional: bool = False) -> pd.DataFrame:
    schema, optional = _split_schema(manifest, labels_optional)
    table = read_table(path, schema, optional)
    if "sessionid" not in table:
        if "visitorid" not in table:
            raise UserError(f"{path}, line 1: column 'sessionid' is missing (or the published 'visitorid')")
        table = table.rename(columns={"visitorid": "sessionid"})
    return table


def check_columns(where: str, names: Sequence[str], manifest: Mapping[str, Any]) -> None:
    """Raise UserError, beginning with `where`, if a column of the rows is missing, or is the time of no label; print
    which columns are not used."""
    schema, optional = _split_schema(manifest)
    require_columns(where, names, schema, optional)
    unused = [name for name in names if name not in schema]
    labels = ", ".join(str(task["label"]) for task in manifest["tasks"])
    for name in unused:
        if name.endswith("_time"):
            raise UserError(f"{where}: column '{name}' is the time of no label ({labels}): is it misspelt? Rename or "
                            "remove it")
    if unused:
        print(f"{where}: not used, since no entry of the manifest names them: {', '.join(unused)}")


def _split_schema(manifest: Mapping[str, Any],
                  labels_optional: bool = False) -> tuple[dict[str, ColumnType], list[str]]:
    """The columns of a split with their types, and which of them may be absent."""
    labels = [str(task["label"]) for task in manifest["tasks"]]
    event_times = [f"{label}_time" for label in labels]
    return {
        **dict.fromkeys(["timestamp", "sessionid", "visitorid", *id_columns(manifest)], "id"),
        **{field: "optional_number" if field in manifest["numbers"] else "optional_text"
           for field in manifest["context"]},
        **dict.fromkeys(labels, "label"),
        **dict.fromkeys(event_times, "optional_id"),
    }, ["sessionid", "visitorid", *event_times, *labels * labels_optional]


def verify_checksums(folder: Path, files: Sequence[str], manifest: dict[str, Any]) -> None:
    """Raise UserError if a file is missing, not in the manifest, or different from its SHA-256 there."""
    for name in files:
        if name not in manifest["outputs"]:
            raise UserError(f"{folder / 'manifest.json'}: 'outputs' does not contain {name}: run python3 -m "
                            "dataset.prepare again")
    for name, digest in manifest["outputs"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} missing: put the file back, or make the folder again with "
                            "python3 -m dataset.prepare")
        if sha256(path) != digest:
            if name.removesuffix(".csv") in SPLITS:  # the error of an invalid cell or column is more precise
                read_split(path, manifest)
            if name in manifest["tables"]:
                table = manifest["tables"][name]
                read_feature_table(path, table["key"], table["fields"], manifest["numbers"])
            raise UserError(f"{path}: checksum mismatch (its SHA-256 differs from manifest.json): was it edited or cut "
                            "short? Prepare the folder again")
