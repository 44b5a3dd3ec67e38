"""The MDP tables on disk: their columns, how an importer writes them, how one table is read."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from common.csv_reader import (
    ColumnType,
    as_relation,
    cell_location,
    is_parquet,
    quoted,
    read_header,
    require_columns,
    scan,
    select,
    to_frame,
)
from common.duck import MEMORY_LIMIT, connect
from common.errors import UserError
from common.fileio import atomic_folder, check_writable, sha256, write_json
from dataset.engine import MINUTE_MS
from dataset.manifest import SPLITS, id_columns, read_manifest, table_file, task_parents

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

Table: TypeAlias = Any  # of pandas, in memory, or a relation of DuckDB
FORMATS = ("csv", "parquet")


@dataclass(frozen=True)
class CountRow:
    """A number of raw rows, printed and listed in manifest.json."""

    label: str
    count: int
    indent: int = 1


class FeatureTable(NamedTuple):
    """Features of items, or of users: one column is an id of the MDP rows, its key, the others are fields."""

    key: str
    table: Table

    @property
    def fields(self) -> list[str]:
        return [str(name) for name in self.table.columns if name != self.key]


@dataclass(frozen=True)
class PreparedDataset:
    """The MDP tables that an importer makes of raw logs.

    Attributes:
        rows: the output of `order_rows`, or a relation in that order; columns split, timestamp, sessionid, the keys of
            the feature tables, the context fields, and for each label `<label>` (0 or 1) and `<label>_time`, when its
            outcome was known, in ms; without that column, directly after the row. Other columns are not written, and
            named.
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
    rows: Table
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
    ground_truth: Table | None = None

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
    def splits(self) -> dict[str, Table]:
        """The rows of each split, in the columns that are written."""
        columns = ["timestamp", "sessionid", *id_columns(self.schema), *self.context, *reversed(self.labels)]
        if not isinstance(self.rows, pd.DataFrame):
            times = ", ".join(f"CASE WHEN {quoted(label)} > 0 THEN {quoted(self._known_from(label))} END AS "
                              f"{quoted(f'{label}_time')}" for label in self.labels)
            return {name: self.rows.filter(f"split = {number}").project(f"{', '.join(map(quoted, columns))}, {times}")
                    for number, name in enumerate(SPLITS)}
        written = self.rows[["split", *columns]].copy()
        for label in self.labels:
            known_from = self.rows[self._known_from(label)]
            known_from = known_from.where(pd.to_numeric(self.rows[label], errors="coerce") > 0)
            with contextlib.suppress(TypeError, ValueError):  # no whole numbers: reading them names the cell
                known_from = known_from.astype("Int64")
            written[f"{label}_time"] = known_from
        return {name: written[written["split"] == number].drop(columns="split") for number, name in enumerate(SPLITS)}

    def _known_from(self, label: str) -> str:
        return f"{label}_time" if f"{label}_time" in self.rows.columns else "timestamp"

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
    require_splits(len(sessions), len(rows), np.unique(split).tolist())
    shared = sessions["sessionid"][sessions["sessionid"].duplicated()]
    if len(shared):
        raise UserError(f"session {shared.iloc[0]} is in two splits: number the sessions inside a split, see "
                        "dataset.tables.number_sessions")
    order = session_order(rows)
    return rows.iloc[order[np.argsort(split[order], kind="stable")]].reset_index(drop=True)


def require_splits(sessions: int, rows: int, found: Sequence[int]) -> None:
    """Raise UserError unless the splits that were found are all of them."""
    if [*found] != [*range(len(SPLITS))]:
        raise UserError(f"the remaining {sessions:,} sessions ({rows:,} rows) cannot be cut into train, val and test, "
                        f"0, 1 and 2: they are in splits {found}: a larger log is needed")


def validation_start(rows: Table) -> int:
    """When validation starts, ms: feature tables must contain nothing later."""
    return int(select(rows, "SELECT min(timestamp) FROM rows WHERE split = 1")[0][0])


def require_new_folder(out_dir: Path) -> None:
    """Raise UserError if a folder exists already or cannot be written: an import fails at its start."""
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already: delete it to make it again (rm -r {out_dir}), or write to another "
                        "folder (another --out)")
    check_writable(out_dir.parent)


def write_dataset(dataset: PreparedDataset, out_dir: Path, settings: Mapping[str, Any], file_format: str = "csv",
                  memory_limit: int | str = MEMORY_LIMIT) -> None:
    """Write the folder `out_dir`: a file per split, the feature tables, and `manifest.json`, which describes them.

    file_format: one of `FORMATS`. Raises UserError if the folder exists already, or where `load_splits` would: what was
    written is read again.
    """
    require_new_folder(out_dir)
    tables: dict[str, Table] = {**dataset.splits}
    tables |= {Path(name).stem: features.table for name, features in dataset.feature_tables.items()}
    if dataset.ground_truth is not None:
        tables["truth"] = dataset.ground_truth
    schema = dataset.schema
    schema["tables"] = {f"{Path(name).stem}.{file_format}": table for name, table in schema["tables"].items()}
    with atomic_folder(out_dir) as folder:
        for name, table in tables.items():
            _write_table(table, folder / f"{name}.{file_format}")
        manifest = {
            "format": 1,
            "source": dataset.source,
            "simulation": dataset.simulation,
            "inputs": {path.name: sha256(path) for path in dataset.inputs},
            "settings": dict(settings),
            "boundary": validation_start(dataset.rows),
            "row_counts": [[row.label, row.count] for row in dataset.row_counts],
            **schema,
            "rows": {name: select(tables[name], "SELECT count(*) FROM rows")[0][0] for name in SPLITS},
            "outputs": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        }
        write_json(folder / "manifest.json", manifest)
        try:
            with connect(memory_limit, folder=out_dir.parent) as con:
                scan_tables(con, folder, read_manifest(folder / "manifest.json"))
        except UserError as error:
            raise UserError(f"not written: {str(error).replace(str(folder), str(out_dir))}") from None


def _write_table(table: Table, path: Path) -> None:
    """Write a CSV file as pandas does, with empty cells for empty texts, or a Parquet file."""
    if is_parquet(path):
        as_relation(table).write_parquet(str(path), compression="zstd")
    elif isinstance(table, pd.DataFrame):
        table.to_csv(path, index=False)
    else:
        cells = [f"nullif({quoted(name)}, '') AS {quoted(name)}" if kind == "VARCHAR" else quoted(name)
                 for name, kind in zip(table.columns, table.types, strict=True)]
        table.project(", ".join(cells)).write_csv(str(path), header=True)


def print_row_counts(dataset: PreparedDataset) -> None:
    """Print how many raw rows were read, dropped, merged and kept, and statistics of the splits."""
    for row in dataset.row_counts:
        print(f"{'  ' * row.indent + row.label:<66}{row.count:>14,}")
    width = {label: max(9, len(label) + 2) for label in dataset.labels}
    print(f"\n{'':<8}{'rows':>12}{'sessions':>12}" + "".join(f"{label:>{width[label]}}" for label in dataset.labels)
          + "   rows per session: median, 99 %, max")
    outcomes = [f"TRY_CAST({quoted(label)} AS DOUBLE)" for label in dataset.labels]
    sums = "".join(f", sum({outcome}) AS sum_{i}, count({outcome}) AS count_{i}" for i, outcome in enumerate(outcomes))
    means = "".join(f", sum(sum_{i}) / sum(count_{i})" for i in range(len(outcomes)))
    for number, rows, sessions, median, most, longest, *rates in select(dataset.rows, f"""
            SELECT coalesce(split, {len(SPLITS)}) AS number, sum(length), count(*), quantile_cont(length, 0.5),
                   quantile_cont(length, 0.99), max(length){means}
            FROM (SELECT split, sessionid, count(*) AS length{sums} FROM rows GROUP BY split, sessionid)
            GROUP BY GROUPING SETS ((split), ()) ORDER BY number"""):
        print(f"{[*SPLITS, 'all'][number]:<8}{rows:>12,}{sessions:>12,}" + "".join(
            f"{rate:>{width[label]}.2%}" for label, rate in zip(dataset.labels, rates, strict=True))
            + f"   {median:.0f}, {most:.0f}, {longest}")
    cutoff = validation_start(dataset.rows)
    ((after_cutoff,),) = select(dataset.rows, f"SELECT count(*) FROM rows WHERE split = 0 AND timestamp > {cutoff}")
    print(f"the first validation session starts at {pd.Timestamp(cutoff, unit='ms'):%Y-%m-%d %H:%M:%S} UTC; "
          f"{after_cutoff:,} train rows after the cutoff\n")


def find_csv(raw_dir: Path, pattern: str, description: str, option: str = "--raw") -> list[Path]:
    """The files `<pattern>.csv` and `<pattern>.csv.gz` of a folder, by name. Raises UserError if there are none."""
    paths = sorted(path for suffix in (".csv", ".csv.gz") for path in raw_dir.glob(pattern + suffix) if path.exists())
    if not paths:
        raise UserError(f"{raw_dir / pattern}.csv: no such file: {option} takes the folder of {description}")
    return paths


def scan_tables(con: DuckDBPyConnection, folder: Path, manifest: Mapping[str, Any], is_published: bool = False,
                ) -> tuple[dict[str, DuckDBPyRelation], dict[str, DuckDBPyRelation]]:
    """The rows of each split, and the feature tables by file name, each cell checked; in columns as by `scan`.

    is_published: the folder has no manifest of its own: a session may be in two splits, further columns are expected.
    Raises UserError naming file, line and column.
    """
    feature_tables = {name: scan_feature_table(con, folder / name, table["key"], table["fields"], manifest["numbers"])
                      for name, table in manifest["tables"].items()}
    paths = {split: folder / table_file(manifest, split) for split in SPLITS}
    tables = {split: scan_split(con, path, manifest) for split, path in paths.items()}
    if is_published:
        return tables, feature_tables
    for split, path in paths.items():
        contradiction = find_contradiction(path, tables[split], manifest["tasks"])
        if contradiction and any("given" in task for task in manifest["tasks"]):
            raise UserError(contradiction)
        check_columns(f"{path}, line 1", read_header(path), manifest)
    for earlier, later in itertools.combinations(SPLITS, 2):
        (shared,) = tables[earlier].project("sessionid").intersect(tables[later].project("sessionid")).min(
            "sessionid").fetchall()[0]
        if shared is not None:
            raise UserError(f"{paths[later]}: session {shared} is in {paths[earlier].name} too: splits must not share "
                            "sessions")
        different = sorted(set(tables[earlier].columns) ^ set(tables[later].columns))
        if different:
            raise UserError(f"{paths[later]}: column '{different[0]}' is in it or in {paths[earlier].name}, not in "
                            "both")
    return tables, feature_tables


def read_tables(folder: Path, manifest: Mapping[str, Any],
                is_published: bool = False) -> tuple[dict[str, pd.DataFrame], dict[str, FeatureTable]]:
    """The tables of `scan_tables` in memory."""
    with connect() as con:
        tables, feature_tables = scan_tables(con, folder, manifest, is_published)
        return ({split: to_frame(table) for split, table in tables.items()},
                {name: FeatureTable(manifest["tables"][name]["key"], to_frame(table))
                 for name, table in feature_tables.items()})


def find_contradiction(path: Path, table: Table, tasks: Sequence[Mapping[str, str]]) -> str:
    """What the first row says that has an outcome without the one that it is given (`task_parents`); "" for none."""
    parents = task_parents(tasks, path)
    for task, parent in zip(tasks, [-1, 0] if parents is None else parents, strict=False):
        label, given = task["label"], tasks[parent]["label"]
        ((row, count),) = select(table, f"""
            SELECT min(number), count(*) FROM (SELECT *, row_number() OVER () - 1 AS number FROM rows)
            WHERE {quoted(label)} > {quoted(given)}""")
        if parent >= 0 and count:
            return (f"{cell_location(path, row, label)}: 1, but '{given}', which it implies, is 0 "
                    f"({count:,} such rows)")
    return ""


def scan_feature_table(con: DuckDBPyConnection, path: Path, key: str, fields: Sequence[str],
                       numbers: Sequence[str] = ()) -> DuckDBPyRelation:
    schema: dict[str, ColumnType] = {
        key: "id", **{field: "optional_number" if field in numbers else "optional_text" for field in fields}}
    table = scan(con, path, schema)
    for row, value in select(table, f"""SELECT max(row), {quoted(key)} FROM rows GROUP BY {quoted(key)}
                                        HAVING count(*) > 1 ORDER BY max(row) LIMIT 1"""):
        raise UserError(f"{cell_location(path, row, key)}: duplicate {key.removesuffix('id')} {value}: remove one of "
                        "its rows")
    return table


def scan_split(con: DuckDBPyConnection, path: Path, manifest: Mapping[str, Any],
               labels_optional: bool = False) -> DuckDBPyRelation:
    schema, optional = _split_schema(manifest, labels_optional)
    table = scan(con, path, schema, optional)
    if "sessionid" not in table.columns:
        if "visitorid" not in table.columns:
            raise UserError(f"{path}, line 1: column 'sessionid' is missing (or the published 'visitorid')")
        table = table.project("* RENAME (visitorid AS sessionid)")
    return table


def read_split(path: Path, manifest: Mapping[str, Any], labels_optional: bool = False) -> pd.DataFrame:
    with connect() as con:
        return to_frame(scan_split(con, path, manifest, labels_optional))


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
            with connect() as con:  # the error of an invalid cell or column is more precise
                if path.stem in SPLITS:
                    scan_split(con, path, manifest)
                if table := manifest["tables"].get(name):
                    scan_feature_table(con, path, table["key"], table["fields"], manifest["numbers"])
            raise UserError(f"{path}: checksum mismatch (its SHA-256 differs from manifest.json): was it edited or cut "
                            "short? Prepare the folder again")
