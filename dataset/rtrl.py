"""MDP tables to arrays: what `dataset.prepare` wrote, or the tables that the paper's authors published.

A folder holds `train.csv`, `val.csv`, `test.csv` and tables of features such as `item_feadf.csv`. With a
`manifest.json` beside them the files are checked against it, and it names the tables, the fields and the tasks; without
one the folder is read as the published tables (columns timestamp, visitorid, itemid, click, pay, state, next_state; the
last two are not used).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch.utils.data import Dataset

from common.csv_reader import count_lines, log_repairs, normalize_category
from common.errors import UserError
from common.fileio import require_free_memory, require_regular_file, sha256
from dataset.features import (
    Floats,
    Ids,
    NumericalMode,
    features_version,
    session_features,
    user_history_features,
)
from dataset.manifest import FINGERPRINT_KEYS, PAPER_MANIFEST, read_manifest, verify_checksums
from dataset.sessions import SessionIndex
from dataset.simulate import config_from_manifest, read_truth
from dataset.tables import SPLITS, FeatureTable, read_feature_table, read_split

Example = tuple[Ids, Floats, Floats]  # ids (F,), numbers (N,), labels (T,) of one row, or of several rows

BYTES_PER_ROW = 256  # at the most, while tables become arrays (measured by `benchmarks.scaling`)


@dataclass(frozen=True)
class CategoricalColumn:
    """One categorical field of n rows: `values[codes[i]]` is row i's value; code -1 is a missing one."""

    codes: NDArray[np.int64]  # (n,)
    values: NDArray[np.object_]  # (number of distinct values,) of str


class RetailRocketRLDataset(Dataset[Example]):
    """One split of the MDP tables as arrays, rows in order of session and time; a torch `Dataset` once it has ids.

    `RetailRocketRLDataset("dataset/rt/train.csv")` reads a split of a data set's folder; `load_splits` makes all three.

    Args:
        table: the path of `train.csv`, `val.csv` or `test.csv`, or the rows themselves; then the next three are needed.
        items: the item table, or several tables of features; a field that is in none is a column of `table`.
        field_names, label_names: the categorical fields, and the labels, one a task.
        numerical: the session so far, or `none`: the published single zero.
        history_features: the numbers of `table`'s rows (n, N), where they look back further than the session (`user_history_features`).

    Attributes:
        fields: per field name its `CategoricalColumn`, before any mapping to ids.
        categorical: (n, F) int64 ids; set by `Catemapper.map`, before that a UserError.
        numerical: (n, N) float32, the session or the user so far (`NUMERICAL_FEATURES`), or one column of zeros.
        labels: (n, T) float32, 0 or 1; T = 2: CTR, CTCVR.
        session: (n,) int64; rows of one session are neighbours.
        keys: per key its ids (n,) int64: `itemid`, and of other tables of features, such as the user's.
        timestamp: (n,) int64 ms.
        ground_truth: what the simulator knows of each row (`dataset.simulate.TRUTH_KINDS`) if the log is simulated, else None.
        long_tailed: fields of which only the frequent values are kept; None where nobody said.
    """

    def __init__(self, table: str | Path | pd.DataFrame, items: pd.DataFrame | Sequence[FeatureTable] = (),
                 field_names: Sequence[str] = (), label_names: Sequence[str] = (), numerical: NumericalMode = "session",
                 ground_truth: pd.DataFrame | None = None, history_features: Floats | None = None) -> None:
        if not isinstance(table, pd.DataFrame):
            self.__dict__ |= vars(_read_one_split(Path(table), numerical))
            return
        self.source: dict[str, Any] = {}
        self.long_tailed: list[str] | None = None
        label_names = list(label_names)
        order = _session_order(table)
        table = table.iloc[order]
        self.session: Ids = table["sessionid"].to_numpy(copy=True)
        self.timestamp: Ids = table["timestamp"].to_numpy(copy=True)
        self.labels: Floats = table[label_names].to_numpy(np.float32, copy=True)
        self.ground_truth = None if ground_truth is None else ground_truth.iloc[order].reset_index(drop=True)
        self.fields: dict[str, CategoricalColumn] = {}
        self.keys: dict[str, Ids] = {}
        for key, side in [FeatureTable("itemid", items)] if isinstance(items, pd.DataFrame) else items:
            self.keys[key] = table[key].to_numpy(copy=True)
            at = pd.Index(side[key]).get_indexer(pd.Index(table[key]))  # -1: an item, or user, without properties
            self.fields |= {name: _field(side[name].to_numpy(), at) for name in field_names if name in side}
        rows = np.arange(len(table))
        self.fields = {name: self.fields[name] if name in self.fields else _field(table[name].to_numpy(), rows)
                       for name in field_names}
        if numerical == "none":
            self.numerical: Floats = np.zeros((len(table), 1), np.float32)
        else:
            self.numerical = session_features(table, label_names) if history_features is None else history_features[order]
        self._numerical_mode = numerical
        self._categorical: Ids | None = None
        self.field_dims: list[int] = []
        self.vocabulary = ""

    @property
    def categorical(self) -> Ids:
        if self._categorical is None:
            raise UserError("the data set has no ids yet: Catemapper(0.2).fit(train).map(dataset) gives it some")
        return self._categorical

    def set_ids(self, categorical: Ids, field_dims: Sequence[int], vocabulary: str = "") -> None:
        """Give the rows their ids (n, F); `vocabulary` is the digest of the mapping that they come from."""
        self._categorical, self.field_dims, self.vocabulary = categorical, list(field_dims), vocabulary

    @property
    def itemid(self) -> Ids:
        """The item of each row, (n,)."""
        return self.keys["itemid"]

    @property
    def metadata(self) -> dict[str, Any]:
        """What a model of these features has to fit: data, features with their version, ids and tasks."""
        features = features_version() if self._numerical_mode == "session" else ""
        return {"data": "", "tasks": [], **self.source, "numerical": self._numerical_mode, "features": features,
                "field_dims": list(self.field_dims), "vocabulary": self.vocabulary,
                "numerical_num": self.numerical_num}

    @property
    def oracle_probabilities(self) -> NDArray[np.float64] | None:
        """The true probabilities (n, T) if the log is simulated, else None: no model can rank better."""
        return None if self.ground_truth is None else self.ground_truth[["p_click", "p_pay"]].to_numpy(np.float64)

    @property
    def numerical_num(self) -> int:
        return self.numerical.shape[1]

    @functools.cached_property
    def sessions(self) -> SessionIndex:
        """Where sessions begin and end."""
        return SessionIndex(self.session)

    def __len__(self) -> int:
        return len(self.session)

    def __getitem__(self, index: Any) -> Example:
        """Return ids, numbers and labels of the rows `index` (a number, a slice or an array)."""
        return self.categorical[index], self.numerical[index], self.labels[index]


@dataclass(frozen=True)
class Splits:
    """The three splits of a data set, its description, and the fingerprint that names this very data."""

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


def load_splits(path: Path, numerical: NumericalMode = "session") -> Splits:
    """Read a folder of MDP tables. Raises UserError naming the file, line and column that is missing or wrong."""
    if not path.exists():
        raise UserError(f"{path}: no such data set: python3 SLmain.py simulates one, python3 -m dataset.prepare makes "
                        "one of your own files")
    prepared = os.path.lexists(path / "manifest.json")
    manifest = read_manifest(path / "manifest.json") if prepared else dict(PAPER_MANIFEST)
    layout = manifest["tables"]
    files = [*(f"{name}.csv" for name in SPLITS), *layout]
    missing = [name for name in files if not (path / name).exists()]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing: put the file back, or move the folder away and make it "
                        "anew with python3 -m dataset.prepare")
    for name in files:
        require_regular_file(path / name)
    rows = sum(count_lines(path / f"{name}.csv") for name in SPLITS)
    require_free_memory(rows * BYTES_PER_ROW, f"{path}: {rows:,} rows")
    if prepared:
        verify_checksums(path, files, manifest)
    outputs = manifest["outputs"] if prepared else {name: sha256(path / name) for name in files}
    meaning = json.dumps([manifest[key] for key in FINGERPRINT_KEYS], sort_keys=True)
    fingerprint = hashlib.sha256(("".join(outputs[name] for name in files) + meaning).encode()).hexdigest()[:16]

    names = [str(name) for name in manifest["categorical"]]
    labels = [str(task["label"]) for task in manifest["tasks"]]
    sides = [read_feature_table(path / name, one["key"], one["fields"]) for name, one in layout.items()]
    tables = {name: read_split(path / f"{name}.csv", manifest) for name in SPLITS}
    for one, two in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = np.intersect1d(tables[one]["sessionid"], tables[two]["sessionid"])
        if len(shared) and prepared:
            raise UserError(f"{path / two}.csv: session {shared[0]} is in {one}.csv too: splits share no sessions")
    truth = _read_truth(path / "truth.csv", tables, manifest) if "truth.csv" in outputs else {}
    for name, table in tables.items():
        _log_repairs(path / f"{name}.csv", table, labels)
    for (name, _), (_, side) in zip(layout.items(), sides, strict=True):
        _log_normalized(path / name, side)
    history = user_history_features(tables, manifest["history"], labels) if manifest["history"] else {}
    splits = {name: RetailRocketRLDataset(tables[name], sides, names, labels, numerical, truth.get(name),
                                          history.get(name)) for name in SPLITS}
    for split in splits.values():
        split.source = {"data": fingerprint, "tasks": [str(task["name"]) for task in manifest["tasks"]]}
        split.long_tailed = list(manifest["long_tailed"])
    return Splits(splits["train"], splits["val"], splits["test"], manifest, fingerprint)


def find_folder(path: Path, name: str) -> Path:
    """The folder of a data set, told by that folder, by its `train.csv`, or by the folder above it and a name."""
    if path.suffix == ".csv" or path.is_file():
        return path.parent
    inner, named = path / name, path.name == name
    holds_splits = any(os.path.lexists(path / file) for file in ("manifest.json", "train.csv"))
    if (named and holds_splits) or (not inner.exists() and (named or holds_splits)):
        return path
    return inner


def _read_one_split(path: Path, numerical: NumericalMode) -> RetailRocketRLDataset:
    if path.stem not in SPLITS or path.suffix != ".csv":
        raise UserError(f"{path}: not a split of a data set: the path of its train.csv, val.csv or test.csv is needed")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    splits = load_splits(path.parent, numerical)
    return {"train": splits.train, "val": splits.val, "test": splits.test}[path.stem]


def _read_truth(path: Path, tables: dict[str, pd.DataFrame], manifest: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    truth = read_truth(path, config_from_manifest(manifest["simulation"], path.parent / "manifest.json"), optional=["visitorid"])
    if len(truth) != sum(map(len, tables.values())):
        raise UserError(f"{path}: {len(truth)} rows, but the tables have {sum(map(len, tables.values()))}")
    for name in ("timestamp", "itemid"):
        other = truth[name].to_numpy() != np.concatenate([tables[split][name] for split in SPLITS])
        if other.any():
            row = int(other.argmax())
            raise UserError(f"{path}, row {row + 1} (about line {row + 2}), column '{name}': {truth[name][row]} is not "
                            "what the tables have in that row")
    ends = np.cumsum([len(tables[name]) for name in SPLITS])
    return {name: truth.iloc[end - len(tables[name]):end] for name, end in zip(SPLITS, ends, strict=True)}


def _log_repairs(path: Path, table: pd.DataFrame, labels: Sequence[str]) -> None:
    """Count and show what becomes of rows that contradict themselves; the files of `dataset.prepare` have none."""
    order = _session_order(table)
    log_repairs(path, int((order != np.arange(len(order))).sum()), "rows put into the order of session and time")
    shown = table["timestamp"].to_numpy()
    for label in labels:
        if f"{label}_time" not in table:
            continue
        when, happened = table[f"{label}_time"].to_numpy(), table[label].to_numpy() > 0
        log_repairs(path, int((happened & (when < shown)).sum()),
                 f"times in column '{label}_time' before their own row: taken for the row's")
        log_repairs(path, int((happened & np.isnan(when)).sum()),
                 f"times in column '{label}_time' missing: taken for the row's")
        log_repairs(path, int((~happened & ~np.isnan(when)).sum()),
                 f"times in column '{label}_time' of what did not happen ('{label}' is 0): left out")


def _log_normalized(path: Path, side: pd.DataFrame) -> None:
    """Count and show the values that `normalize_category` spells otherwise."""
    changed = {}
    for name in side.columns[1:]:
        values, count = np.unique(side[name].to_numpy().astype(str), return_counts=True)
        changed[str(name)] = sum(int(n) for value, n in zip(values, count, strict=True) if normalize_category(value) != value)
    names = [name for name, rows in changed.items() if rows]
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    log_repairs(path, sum(changed.values()),
             f"values in column{'s' * (len(names) > 1)} {some} without their blanks or the .0 of a whole number")


def _session_order(table: pd.DataFrame) -> Ids:
    """Sessions by their first row's time, rows of a session by time; ties as they stand in the file."""
    session, time = table["sessionid"].to_numpy(), table["timestamp"].to_numpy()
    names, number = np.unique(session, return_inverse=True)
    first = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(first, number, time)
    return np.lexsort((np.arange(len(table)), time, number, first[number]))


def _field(of_items: NDArray[np.object_], at: NDArray[np.int64]) -> CategoricalColumn:
    texts = np.array([normalize_category(text) for text in of_items], dtype=object)
    codes, values = pd.factorize(texts)
    empty = np.flatnonzero(values == "")
    codes = np.where(np.isin(codes, empty), -1, codes)
    return CategoricalColumn(np.append(codes, -1)[at].astype(np.int64), np.asarray(values, dtype=object))
