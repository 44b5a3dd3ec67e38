"""MDP tables to arrays: the output of `dataset.prepare`, or the tables that the paper's authors published.

A folder contains `train.csv`, `val.csv`, `test.csv` and feature tables such as `item_feadf.csv`. If there is a
`manifest.json`, the files are checked against it, and it names the tables, the fields and the tasks. Otherwise the
folder is read as the published tables (columns timestamp, visitorid, itemid, click, pay, state, next_state; the last
two are not used).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch.utils.data import Dataset

from common.csv_reader import cell_location, count_rows, log_repairs, normalize_category
from common.errors import UserError
from common.fileio import require_free_memory, require_regular_file, sha256
from common.memory import available_memory
from dataset.arrays import Arrays, MappedColumn, MappedIds, open_arrays
from dataset.features import (
    Floats,
    Ids,
    NumericalMode,
    features_version,
    running_rates,
    session_feature_names,
    session_features,
    user_history_features,
)
from dataset.manifest import FINGERPRINT_KEYS, SPLITS, id_columns, read_manifest, table_file, task_parents
from dataset.retailrocket import PAPER_MANIFEST
from dataset.sessions import SessionIndex
from dataset.simulate import config_from_manifest, read_ground_truth
from dataset.tables import FeatureTable, find_contradiction, read_tables, session_order, verify_checksums

Example = tuple[Ids, Floats, Floats]  # ids (F,), numerical (N,), labels (T,) of one row, or of several rows

BYTES_PER_ROW = 256  # of memory while tables become arrays in memory, an upper bound (measured by `benchmarks.scaling`)
MEMORY_FRACTION = 0.5  # of the free memory, which the tables may need; beyond, their arrays are memory-mapped
DataMode = Literal["auto", "memory", "mapped"]


@dataclass(frozen=True)
class CategoricalColumn:
    """One categorical field of n rows: `values[codes[i]]` is row i's value; code -1: missing."""

    codes: NDArray[np.int64]  # (n,)
    values: NDArray[np.object_]  # (number of distinct values,) of str

    def __len__(self) -> int:
        """The number of distinct values."""
        return len(self.values)

    @functools.cached_property
    def _ranking(self) -> tuple[Ids, list[str]]:
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.values))
        order = sorted(np.flatnonzero(counts), key=lambda code: (-counts[code], self.values[code]))
        return counts[order], [str(self.values[code]) for code in order]

    @property
    def frequencies(self) -> Ids:
        """How many rows have each of the values, the most frequent first; of equally frequent ones the smaller."""
        return self._ranking[0]

    def most_frequent(self, number: int) -> list[str]:
        """The first values in the order of `frequencies`."""
        return self._ranking[1][:number]

    def lookup(self, ids: Mapping[str, int]) -> Ids:
        """The id of each code, 0 for values without one and, in the last place, for missing ones."""
        return np.array([*(ids.get(str(value), 0) for value in self.values), 0], np.int64)


class RetailRocketRLDataset(Dataset[Example]):
    """One split of the MDP tables as arrays, rows in order of session and time; a torch `Dataset` once it has ids.

    `RetailRocketRLDataset("dataset/rt/train.csv")` reads a split of a data set's folder; `load_splits` reads all three.

    Args:
        table: the path of `train.csv`, `val.csv` or `test.csv`, or the rows themselves, which require the next three.
        items: the item table, or several feature tables; a field that is in none is a column of `table`, and their
            keys may be fields too.
        field_names, label_names: the categorical fields, and the labels, one per task.
        numerical: `session`: the session features; `rates`: these and `rates`; `none`: one column of zeros, as
            published.
        ground_truth: of a simulated log, the state of the simulator at each row of `table`.
        history_features: features (n, N) of the rows of `table` that replace the session features, such as
            `user_history_features`.
        rates: further features of the rows of `table`, a column each, such as `running_rates`; unless `none`.

    Attributes:
        fields: field name to its `CategoricalColumn`, before any mapping to ids; `dataset.arrays.MappedColumn` where
            the arrays are memory-mapped.
        categorical: (n, F) int64 ids; set by `Catemapper.map`, before that a UserError. Of memory-mapped arrays
            `dataset.arrays.MappedIds`, which are looked up when they are indexed.
        numerical: (n, N) float32: session or history features (`session_feature_names`), running rates and the numbers
            of the tables; or one column of zeros.
        numerical_names: of the columns of `numerical`.
        labels: (n, T) float32, 0 or 1.
        session: (n,) int64; rows of one session are adjacent.
        keys: key to its ids (n,) int64: `itemid`, and the keys of other feature tables, such as the user's.
        history_key: the key of the user, whose earlier rows the history features are of; "": there is none.
        timestamp: (n,) int64 ms.
        ground_truth: `dataset.simulate.GROUND_TRUTH_SCHEMA` of each row if the log is simulated, else None.
        long_tailed: fields of which only the frequent values are kept; None if unknown.
    """

    def __init__(self, table: str | Path | pd.DataFrame, items: pd.DataFrame | Sequence[FeatureTable] = (),
                 field_names: Sequence[str] = (), label_names: Sequence[str] = (), numerical: NumericalMode = "rates",
                 ground_truth: pd.DataFrame | None = None, history_features: Floats | None = None,
                 rates: pd.DataFrame | None = None) -> None:
        if not isinstance(table, pd.DataFrame):
            self.__dict__ |= vars(_read_one_split(Path(table), numerical))
            return
        self.source: dict[str, Any] = {}
        self.long_tailed: list[str] | None = None
        self.history_key = ""
        label_names = list(label_names)
        order = session_order(table)
        table = table.iloc[order]
        self.session: Ids = table["sessionid"].to_numpy(copy=True)
        self.timestamp: Ids = table["timestamp"].to_numpy(copy=True)
        self.labels: Floats = table[label_names].to_numpy(np.float32, copy=True)
        self.ground_truth = None if ground_truth is None else ground_truth.iloc[order].reset_index(drop=True)
        feature_tables = [FeatureTable("itemid", items)] if isinstance(items, pd.DataFrame) else items
        self.keys: dict[str, Ids] = {key: table[key].to_numpy(copy=True) for key, _ in feature_tables}
        self.fields: Mapping[str, CategoricalColumn | MappedColumn] = _categorical_columns(table, feature_tables,
                                                                                           field_names)
        self.numerical_names = ["zero"] if numerical == "none" else session_feature_names(label_names)
        if numerical == "none":
            self.numerical: Floats = np.zeros((len(table), 1), np.float32)
        else:
            self.numerical = (session_features(table, label_names) if history_features is None
                              else history_features[order])
            if rates is not None:
                self.numerical = np.hstack([self.numerical, rates.to_numpy(np.float32)[order]])
                self.numerical_names += map(str, rates.columns)
        self._numerical_mode = numerical
        self._categorical: Ids | MappedIds | None = None
        self.field_dims: list[int] = []
        self.vocabulary = ""

    @classmethod
    def of(cls, arrays: Arrays, numerical: NumericalMode) -> RetailRocketRLDataset:
        """A split whose arrays are memory-mapped."""
        dataset = cls.__new__(cls)
        dataset.__dict__ |= {field.name: getattr(arrays, field.name) for field in dataclasses.fields(arrays)}
        dataset.source, dataset._numerical_mode, dataset._categorical = {}, numerical, None
        dataset.field_dims, dataset.vocabulary = [], ""
        return dataset

    @property
    def is_mapped(self) -> bool:
        """Whether the arrays are memory-mapped files."""
        return any(isinstance(column, MappedColumn) for column in self.fields.values())

    @property
    def categorical(self) -> Ids | MappedIds:
        if self._categorical is None:
            raise UserError("the data set has no ids yet: map it, Catemapper(0.2).fit(train).map(dataset)")
        return self._categorical

    def set_ids(self, categorical: Ids | MappedIds, field_dims: Sequence[int], vocabulary: str = "") -> None:
        """Set the ids (n, F) of the rows; `vocabulary` is the digest of their mapping."""
        self._categorical, self.field_dims, self.vocabulary = categorical, list(field_dims), vocabulary

    @property
    def itemid(self) -> Ids:
        """The item of each row, (n,)."""
        return self.keys["itemid"]

    @property
    def user(self) -> Ids:
        """The user of each row, (n,): by the history key; without one each session is a user of its own."""
        return self.keys[self.history_key] if self.history_key else self.session

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that a model of these features must match: data, features with their version, ids and tasks."""
        features = "" if self._numerical_mode == "none" else features_version()
        return {"data": "", "tasks": [], "given": None, **self.source, "numerical": self._numerical_mode,
                "features": features, "field_dims": list(self.field_dims), "vocabulary": self.vocabulary,
                "numerical_num": self.numerical_num}

    @property
    def oracle_probabilities(self) -> NDArray[np.float64] | None:
        """The true probabilities (n, T) if the log is simulated, else None. No model can rank better."""
        return (None if self.ground_truth is None
                else self.ground_truth[["p_click", "p_pay"]].to_numpy(np.float64)[:, : self.labels.shape[1]])

    @property
    def numerical_num(self) -> int:
        return self.numerical.shape[1]

    @functools.cached_property
    def sessions(self) -> SessionIndex:
        """The index of the sessions of the rows."""
        return SessionIndex(self.session)

    def __len__(self) -> int:
        return len(self.session)

    def __getitem__(self, index: Any) -> Example:
        """Ids, numerical features and labels of the rows `index` (a number, a slice or an array)."""
        return self.categorical[index], self.numerical[index], self.labels[index]


@dataclass(frozen=True)
class Splits:
    """The three splits of a data set, its manifest (whose tasks are those that were asked for), and the fingerprint of
    its content."""

    train: RetailRocketRLDataset
    val: RetailRocketRLDataset
    test: RetailRocketRLDataset
    manifest: dict[str, Any]
    fingerprint: str

    @property
    def long_tailed(self) -> list[str]:
        return list(self.manifest["long_tailed"])

    @property
    def task_names(self) -> list[str]:
        return [task["name"] for task in self.manifest["tasks"]]

    @property
    def given(self) -> list[int] | None:
        """The number of the task that each task is given, -1 for none, (T,); None: not in the manifest."""
        return task_parents(self.manifest["tasks"], "manifest.json")


@dataclass(frozen=True)
class Log:
    """The tables of a data set as they were read: its rows by split, its feature tables by file name, its manifest, and
    the fingerprint of its content."""

    tables: dict[str, pd.DataFrame]
    feature_tables: dict[str, FeatureTable]
    manifest: dict[str, Any]
    fingerprint: str

    @property
    def labels(self) -> list[str]:
        return [str(task["label"]) for task in self.manifest["tasks"]]


@dataclass(frozen=True)
class Folder:
    """A folder of MDP tables before they are read: the files of its tables by name, its manifest, and the fingerprint
    of its content."""

    path: Path
    files: dict[str, Path]
    manifest: dict[str, Any]
    fingerprint: str
    has_manifest: bool

    @property
    def row_count(self) -> int:
        """The number of rows, about: that of the lines."""
        return sum(count_rows(self.files[split]) for split in SPLITS)


def load_splits(path: Path, numerical: NumericalMode = "rates", task_num: int = 0, data: DataMode = "auto") -> Splits:
    """Read a folder of MDP tables, with the labels of its first `task_num` tasks (0: of all); features are those of all
    tasks.

    data: `memory`: arrays in memory; `mapped`: memory-mapped files, which are made beside the tables once; `auto`:
        mapped where the tables would need more than half of the free memory.

    Raises UserError naming file, line and column of an error, and where there are fewer tasks.
    """
    folder = open_folder(path)
    manifest, fingerprint = folder.manifest, folder.fingerprint
    tasks = manifest["tasks"]
    if task_num > len(tasks):
        raise UserError(f"--task_num: {task_num}, but {path} has {len(tasks)}: "
                        + ", ".join(task["name"] for task in tasks))
    needed = 0 if data == "mapped" else folder.row_count * BYTES_PER_ROW
    if data == "memory":
        require_free_memory(needed, f"{path}, its tables (--data=mapped needs less)")
    if data == "mapped" or (data == "auto" and needed > MEMORY_FRACTION * available_memory()):
        arrays = open_arrays(path, folder.files, manifest, fingerprint, numerical, not folder.has_manifest)
        datasets = {split: RetailRocketRLDataset.of(arrays[split], numerical) for split in SPLITS}
    else:
        log = read_tables_of(folder)
        truth = table_file(manifest, "truth")
        is_simulated = truth in manifest.get("outputs", ())
        ground_truth = _read_ground_truth(path / truth, log.tables, manifest) if is_simulated else {}
        datasets = make_datasets(log, log.tables, numerical, ground_truth)
    splits = Splits(**datasets, manifest={**manifest, "tasks": tasks[: task_num or len(tasks)]},
                    fingerprint=fingerprint)
    for dataset in datasets.values():
        kept = len(splits.task_names)
        if kept < dataset.labels.shape[1]:
            dataset.labels = dataset.labels[:, :kept] if dataset.is_mapped else dataset.labels[:, :kept].copy()
        _describe(dataset, manifest, fingerprint)
        dataset.source |= {"tasks": splits.task_names, "given": splits.given}
    return splits


def open_folder(path: Path) -> Folder:
    """Check that a folder of MDP tables is complete and unchanged. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such data set: python3 SLmain.py simulates one, python3 -m dataset.prepare makes "
                        "one from raw files")
    has_manifest = os.path.lexists(path / "manifest.json")
    manifest = read_manifest(path / "manifest.json") if has_manifest else dict(PAPER_MANIFEST)
    files = {**{split: table_file(manifest, split) for split in SPLITS}, **{name: name for name in manifest["tables"]}}
    missing = [name for name in files.values() if not (path / name).exists()]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing: put the file back, or move the folder away and make it "
                        "again with python3 -m dataset.prepare")
    for name in files.values():
        require_regular_file(path / name)
    if has_manifest:
        verify_checksums(path, [*files.values()], manifest)
    outputs = manifest["outputs"] if has_manifest else {name: sha256(path / name) for name in files.values()}
    schema = [manifest[key] for key in FINGERPRINT_KEYS]
    schema += [manifest[key] for key in ("numbers", "id_fields") if manifest[key]]
    schema_json = json.dumps(schema, sort_keys=True)
    digests = "".join(outputs[name] for name in files.values())
    fingerprint = hashlib.sha256((digests + schema_json).encode()).hexdigest()[:16]
    return Folder(path, {key: path / name for key, name in files.items()}, manifest, fingerprint, has_manifest)


def read_log(path: Path) -> Log:
    """Read a folder of MDP tables, as they are. Raises UserError naming file, line and column of an error, and
    where they would not fit into memory."""
    folder = open_folder(path)
    require_free_memory(folder.row_count * BYTES_PER_ROW, f"{path}, its tables")
    return read_tables_of(folder)


def read_tables_of(folder: Folder) -> Log:
    """The tables of a folder, in memory. Raises UserError as `read_log`."""
    tables, feature_tables = read_tables(folder.path, folder.manifest, is_published=not folder.has_manifest)
    log = Log(tables, feature_tables, folder.manifest, folder.fingerprint)
    for split, table in tables.items():
        _log_row_repairs(folder.files[split], table, log.labels)
        if contradiction := find_contradiction(folder.files[split], table, folder.manifest["tasks"]):
            print(contradiction)  # of a task that is given another by default
    for name, feature_table in feature_tables.items():
        _log_normalized(folder.files[name], feature_table, folder.manifest["categorical"])
    return log


def make_datasets(log: Log, tables: Mapping[str, pd.DataFrame], numerical: NumericalMode,
                  ground_truth: Mapping[str, pd.DataFrame] | None = None, history_key: str | None = None,
                  counted: NDArray[np.bool_] | None = None) -> dict[str, RetailRocketRLDataset]:
    """The arrays of tables, by name, whose fields and tasks are those of `log`.

    ground_truth: of a simulated log, by table. history_key: instead of the manifest's. counted: as of `running_rates`,
    of the rows of all tables.
    """
    manifest, ground_truth = log.manifest, ground_truth or {}
    fields = [str(field) for field in manifest["categorical"]]
    keyed = [*log.feature_tables.values()]
    keyed += [FeatureTable(key, pd.DataFrame({key: [0]})) for key in id_columns(manifest)
              if key not in {table.key for table in keyed}]  # ids without a table of features
    key = manifest["history"] if history_key is None else history_key
    history = user_history_features(tables, key, log.labels) if key else {}
    rows = pd.concat(tables.values(), ignore_index=True)
    rates = _running_rates(rows, keyed, manifest["rates"], log.labels, counted) if numerical == "rates" else None
    further = pd.concat([rates, _numbers(rows, keyed, manifest["numbers"], len(log.tables["train"]))], axis=1)
    ends = dict(zip(tables, np.cumsum([len(table) for table in tables.values()]), strict=True))
    datasets = {name: RetailRocketRLDataset(table, keyed, fields, log.labels, numerical, ground_truth.get(name),
                                            history.get(name), further.iloc[ends[name] - len(table):ends[name]])
                for name, table in tables.items()}
    for dataset in datasets.values():
        _describe(dataset, manifest, log.fingerprint)
    return datasets


def _describe(dataset: RetailRocketRLDataset, manifest: Mapping[str, Any], fingerprint: str) -> None:
    dataset.source = {"data": fingerprint, "tasks": [str(task["name"]) for task in manifest["tasks"]]}
    dataset.long_tailed = list(manifest["long_tailed"])
    dataset.history_key = str(manifest["history"])


def _read_one_split(path: Path, numerical: NumericalMode) -> RetailRocketRLDataset:
    if path.stem not in SPLITS or path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{path}: not a split of a data set: expected the path of a train.csv, val.csv or test.csv")
    require_regular_file(path)
    dataset: RetailRocketRLDataset = getattr(load_splits(path.parent, numerical), path.stem)
    return dataset


def _read_ground_truth(path: Path, tables: Mapping[str, pd.DataFrame],
                       manifest: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    config = config_from_manifest(manifest["simulation"], path.parent / "manifest.json")
    ground_truth = read_ground_truth(path, config, optional=["visitorid"])
    ends = np.cumsum([len(tables[split]) for split in SPLITS])
    if len(ground_truth) != ends[-1]:
        raise UserError(f"{path}: {len(ground_truth)} rows, but the tables have {ends[-1]}")
    for name in ("timestamp", "itemid"):
        is_different = ground_truth[name].to_numpy() != np.concatenate([tables[split][name] for split in SPLITS])
        if is_different.any():
            row = int(is_different.argmax())
            raise UserError(f"{cell_location(path, row, name)}: {ground_truth[name][row]} differs from that row of the "
                            "tables")
    return {split: ground_truth.iloc[end - len(tables[split]):end] for split, end in zip(SPLITS, ends, strict=True)}


def _log_row_repairs(path: Path, table: pd.DataFrame, labels: Sequence[str]) -> None:
    """Print how many rows contradict each other or themselves; the files of `dataset.prepare` have none."""
    order = session_order(table)
    log_repairs(path, int((order != np.arange(len(order))).sum()), "rows sorted by session and time")
    timestamp = table["timestamp"].to_numpy()
    for label in labels:
        if f"{label}_time" not in table:
            continue
        event_time, happened = table[f"{label}_time"].to_numpy(), table[label].to_numpy() > 0
        for is_repaired, repair in (
                (happened & (event_time < timestamp), "before their row: replaced by the row's time"),
                (happened & np.isnan(event_time), "missing: replaced by the row's time"),
                (~happened & ~np.isnan(event_time), f"ignored because '{label}' is 0")):
            log_repairs(path, int(is_repaired.sum()), f"times in column '{label}_time' {repair}")


def _log_normalized(path: Path, feature_table: FeatureTable, categorical: Sequence[str]) -> None:
    """Print how many values `normalize_category` changes."""
    changed = {}
    for field in (field for field in feature_table.fields if field in categorical):
        values, counts = np.unique(feature_table.table[field].to_numpy().astype(str), return_counts=True)
        is_changed = [normalize_category(value) != value for value in values]
        if any(is_changed):
            changed[field] = int(counts[is_changed].sum())
    fields = ", ".join([*changed][:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    log_repairs(path, sum(changed.values()),
                f"values in column{'s' * (len(changed) > 1)} {fields} stripped of whitespace or a final .0")


def _running_rates(rows: pd.DataFrame, feature_tables: Sequence[FeatureTable], entries: Sequence[str],
                   labels: Sequence[str], counted: NDArray[np.bool_] | None) -> pd.DataFrame:
    """`running_rates` of these fields, keys and pairs of them; `rows` are those of all tables."""
    names = [*dict.fromkeys(name for entry in entries for name in entry.split("&"))]
    columns = _categorical_columns(rows, feature_tables, names)
    groups = {}
    for entry in entries:
        groups[entry], *others = (columns[name].codes for name in entry.split("&"))
        for other in others:  # a value is a pair of values, missing where one of them is
            pair = np.where(np.minimum(groups[entry], other) < 0, -1, groups[entry] * (other.max() + 1) + other)
            values, groups[entry] = np.unique(pair, return_inverse=True)
            groups[entry] -= int(values[0] < 0)
    return running_rates(rows, groups, labels, counted)


def _numbers(rows: pd.DataFrame, feature_tables: Sequence[FeatureTable], names: Sequence[str],
             train_rows: int) -> pd.DataFrame:
    """The numbers of the rows, a column each, float32; a missing one is the mean of the first `train_rows` rows that
    have it, or 0 if none has."""
    columns = {}
    for name in names:
        key, features = next(((key, features) for key, features in feature_tables if name in features), ("", rows))
        index = pd.Index(features[key]).get_indexer(pd.Index(rows[key])) if key else np.arange(len(rows))
        column = pd.Series(np.append(features[name].to_numpy(), np.nan)[index])  # -1: missing from the feature table
        columns[name] = column.fillna(column[:train_rows].mean()).fillna(0.0)
    return pd.DataFrame(columns, index=rows.index, dtype=np.float32)


def _categorical_columns(rows: pd.DataFrame, feature_tables: Sequence[FeatureTable],
                         fields: Sequence[str]) -> dict[str, CategoricalColumn]:
    """The columns of these fields, in their order: from the tables by their keys, from the keys, or from the rows."""
    columns = {}
    for key, features in feature_tables:
        if key in fields:
            codes, ids = pd.factorize(rows[key].to_numpy())
            columns[key] = CategoricalColumn(codes.astype(np.int64), ids.astype(str).astype(object))
        index = pd.Index(features[key]).get_indexer(pd.Index(rows[key]))  # -1: missing from the feature table
        columns |= {field: _categorical_column(features[field].to_numpy(), index)
                    for field in fields if field in features and field != key}
    every = np.arange(len(rows))
    return {field: columns[field] if field in columns else _categorical_column(rows[field].to_numpy(), every)
            for field in fields}


def _categorical_column(values: NDArray[np.object_], index: NDArray[np.int64]) -> CategoricalColumn:
    """The column of rows whose values are `values[index]`; index -1: missing."""
    codes, distinct = pd.factorize(np.array([normalize_category(value) for value in values], dtype=object))
    codes = np.where(np.isin(codes, np.flatnonzero(distinct == "")), -1, codes)
    return CategoricalColumn(np.append(codes, -1)[index].astype(np.int64), np.asarray(distinct, dtype=object))
