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
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dataset.files import (
    Kind,
    UserError,
    check_file,
    check_memory,
    count_lines,
    is_file_name,
    one_spelling,
    read_json,
    read_table,
    repaired,
    sha256,
)
from dataset.mdp import SPLITS, SideTable
from dataset.retailrocket import LONG_TAILED, PROPERTIES, TASKS
from dataset.simulate import read_truth, size_of

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Numerical = Literal["session", "none"]
Batch = tuple[Tensor, Tensor, Tensor]  # ids (B, F), numbers (B, N), labels (B, T)

Example = tuple[Ids, Floats, Floats]  # the same of one row (F,), (N,), (T,), or of several rows

NUMERICAL = ("position", "click_rate", "pay_rate", "last_click", "last_pay", "log_gap")
_MEANING = ("categorical", "tables", "context", "long_tailed", "tasks")  # of a manifest: what the columns are
BYTES_A_ROW = 256  # at the most, while tables become arrays (measured by `bench.scale`)
_PUBLISHED: dict[str, Any] = {
    "source": "RetailRocket, tables as published by the paper's authors",
    "categorical": list(PROPERTIES),
    "tables": {"item_feadf.csv": {"key": "itemid", "fields": list(PROPERTIES)}},
    "context": [],
    "history": "",
    "long_tailed": list(LONG_TAILED),
    "tasks": list(TASKS),
}


@dataclass(frozen=True)
class Field:
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
        so_far: the numbers of `table`'s rows (n, N), where they look back further than the session (`history_so_far`).

    Attributes:
        fields: per field name its `Field`, before any mapping to ids.
        categorical: (n, F) int64 ids; set by `Catemapper.map`, before that a UserError.
        numerical: (n, N) float32, the session or the user so far (`NUMERICAL`), or one column of zeros.
        labels: (n, T) float32, 0 or 1; T = 2: CTR, CTCVR.
        session: (n,) int64; rows of one session are neighbours.
        keys: per key its ids (n,) int64: `itemid`, and of other tables of features, such as the user's.
        timestamp: (n,) int64 ms.
        truth: what the simulator knows of each row (`dataset.simulate.TRUTH_KINDS`) if the log is simulated, else None.
        long_tailed: fields of which only the frequent values are kept; None where nobody said.
    """

    def __init__(self, table: str | Path | pd.DataFrame, items: pd.DataFrame | Sequence[SideTable] = (),
                 field_names: Sequence[str] = (), label_names: Sequence[str] = (), numerical: Numerical = "session",
                 truth: pd.DataFrame | None = None, so_far: Floats | None = None) -> None:
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
        self.truth = None if truth is None else truth.iloc[order].reset_index(drop=True)
        self.fields: dict[str, Field] = {}
        self.keys: dict[str, Ids] = {}
        for key, side in [SideTable("itemid", items)] if isinstance(items, pd.DataFrame) else items:
            self.keys[key] = table[key].to_numpy(copy=True)
            at = pd.Index(side[key]).get_indexer(pd.Index(table[key]))  # -1: an item, or user, without properties
            self.fields |= {name: _field(side[name].to_numpy(), at) for name in field_names if name in side}
        rows = np.arange(len(table))
        self.fields = {name: self.fields[name] if name in self.fields else _field(table[name].to_numpy(), rows)
                       for name in field_names}
        if numerical == "none":
            self.numerical: Floats = np.zeros((len(table), 1), np.float32)
        else:
            self.numerical = session_so_far(table, label_names) if so_far is None else so_far[order]
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
    def best(self) -> NDArray[np.float64] | None:
        """The true probabilities (n, T) if the log is simulated, else None: no model can rank better."""
        return None if self.truth is None else self.truth[["p_click", "p_pay"]].to_numpy(np.float64)

    @property
    def numerical_num(self) -> int:
        return self.numerical.shape[1]

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


class Batches:
    """A data set on a device, cut into batches by index; iterates over (ids, numbers, labels).

    With a window W, ids (B, W, F) and numbers (B, W, N) are those of the last W rows of the session so far, the row
    itself last; places before the session's start have ids of -1 and numbers of 0. Labels are the row's own.

    Args:
        dataset: a mapped data set, n rows.
        batch_size: B; the last batch holds what is left.
        device: where the tensors live, all of them, from now on.
        seed: None: in order. A number: every pass in an order of its own, a function of (seed, `epoch`) alone.
        window: W; 0: rows by themselves, ids (B, F) and numbers (B, N).
    """

    def __init__(self, dataset: RetailRocketRLDataset, batch_size: int, device: torch.device | str = "cpu",
                 seed: int | None = None, window: int = 0) -> None:
        self.tensors: Batch = (torch.from_numpy(dataset.categorical).to(device),
                               torch.from_numpy(dataset.numerical).to(device),
                               torch.from_numpy(dataset.labels).to(device))
        self.session = dataset.session
        self.batch_size, self.seed, self.epoch, self.window = batch_size, seed, 0, window
        self.first = torch.from_numpy(first_rows(dataset.session)).to(device)  # (n,)

    def __len__(self) -> int:
        return -(-len(self.session) // self.batch_size)

    def rows(self, index: Tensor) -> Batch:
        """The batch of the rows `index` (B,)."""
        ids, numbers, labels = self.tensors
        if not self.window:
            return ids[index], numbers[index], labels[index]
        at = index[:, None] - torch.arange(self.window - 1, -1, -1, device=index.device)  # (B, W)
        before = (at < self.first[index][:, None]).unsqueeze(2)
        at = at.clamp(min=0)
        return ids[at].masked_fill(before, -1), numbers[at].masked_fill(before, 0), labels[index]

    @functools.cached_property
    def distinct(self) -> tuple[Tensor, Tensor]:
        """Rows (d,) no two of which have the same features, and for each row (n,) the place of its equal among them.
        Of windows all features have to be the same.

        A model in eval mode says the same about equal rows: x = distinct_x[place].
        """
        ids, numbers, _ = self.tensors
        place = np.zeros(len(ids), np.int64)
        for column in (*ids.cpu().numpy().T, *numbers.cpu().numpy().view(np.int32).T):
            codes, values = pd.factorize(column)
            place = pd.factorize(place * len(values) + codes)[0]
        alone, start, rows = place + 1, self.first.cpu().numpy(), np.arange(len(ids))
        for back in range(1, self.window):
            earlier = np.where(rows - back >= start, alone[rows - back], 0)  # 0: before the session's start
            place = pd.factorize(place * (len(ids) + 1) + earlier)[0]
        first = np.unique(place, return_index=True)[1]
        return torch.from_numpy(first).to(ids.device), torch.from_numpy(place).to(ids.device)

    def __iter__(self) -> Iterator[Batch]:
        ids, numbers, labels = self.tensors
        if self.seed is None and not self.window:
            yield from zip(ids.split(self.batch_size), numbers.split(self.batch_size), labels.split(self.batch_size),
                           strict=True)
            return
        order = (np.arange(len(ids)) if self.seed is None
                 else np.random.default_rng([self.seed, self.epoch]).permutation(len(ids)))
        for index in torch.from_numpy(order).to(ids.device).split(self.batch_size):
            yield self.rows(index)


def first_rows(session: Ids) -> Ids:
    """The first row of each row's session, (n,); rows of one session are neighbours."""
    opens = np.append(True, session[1:] != session[:-1])
    return np.maximum.accumulate(np.where(opens, np.arange(len(session)), 0))


def session_so_far(table: pd.DataFrame, labels: Sequence[str] = ("click", "pay")) -> Floats:
    """Numbers known when a row is shown, from earlier rows of its session alone; (n, 6) float32, see `NUMERICAL`.

    With t the row's place in its session, from 0, and c, p the clicks and purchases among its earlier rows so far:
    log(1 + t), c / (t + 1), p / (t + 1), whether the row before was clicked, was paid, and log(1 + seconds since the
    row before) / 10. Where the table has click_time and pay_time, an outcome counts only once it has happened: a
    purchase at the session's end says nothing to the rows before it. Without them (the published tables) it counts
    from the next row on. `table` is in session order; `labels` are its columns of clicks and purchases, or of whatever
    the two tasks are.
    """
    time, rows = table["timestamp"].to_numpy(), np.arange(len(table))
    start = first_rows(table["sessionid"].to_numpy())
    place = (rows - start).astype(np.float64)
    gap = np.where(place == 0, 0.0, np.diff(time, prepend=time[:1]) / 1000.0)

    columns = [np.log1p(place)]
    lasts = []
    for label in labels:
        known, last = _known_outcomes(table, label, start, rows)
        columns.append(known / (place + 1.0))
        lasts.append(last)
    return np.column_stack([*columns, *lasts, np.log1p(gap) / 10.0]).astype(np.float32)


def history_so_far(tables: Mapping[str, pd.DataFrame], key: str, labels: Sequence[str]) -> dict[str, Floats]:
    """`session_so_far` of all that has the same `key`, a user, across the borders of sessions and splits.

    The splits follow each other in time, so that a test row may know what the user did in training: it was known when
    the row was shown. Takes the tables by split, in order; gives each one's numbers (n, 6), row by row.
    """
    rows = pd.concat(tables.values(), ignore_index=True).assign(sessionid=lambda whole: whole[key])
    order = np.lexsort((np.arange(len(rows)), rows["timestamp"], rows["sessionid"]))
    numbers = np.empty((len(rows), len(NUMERICAL)), np.float32)
    numbers[order] = session_so_far(rows.iloc[order].reset_index(drop=True), labels)
    ends = np.cumsum([len(table) for table in tables.values()])
    return dict(zip(tables, np.split(numbers, ends[:-1]), strict=True))


def features_version() -> str:
    """A digest of what `session_so_far` and `history_so_far` make of a small log: another one, other features.

    It is part of what models, critics and replay buffers say of themselves, so that none is used with numbers that
    mean something else. Values are rounded to five decimals, which machines agree in.
    """
    rows = np.arange(24)
    log = pd.DataFrame({"timestamp": 7_000 * rows + 900 * rows**2, "sessionid": rows // 5, "user": rows // 10,
                        "click": np.isin(rows % 7, (0, 2, 3)).astype(float), "pay": (rows % 7 == 2).astype(float)})
    times = {f"{label}_time": (log["timestamp"] + delay).where(log[label] > 0)
             for label, delay in (("click", 9_000.0), ("pay", 60_000.0))}
    looks = (session_so_far(log), session_so_far(log.assign(**times)),
             history_so_far({"train": log.assign(**times)}, "user", ("click", "pay"))["train"])
    return hashlib.sha256(np.round(np.stack(looks).astype(np.float64), 5).tobytes()).hexdigest()[:16]


def _known_outcomes(table: pd.DataFrame, label: str, start: Ids, rows: Ids) -> tuple[NDArray[Any], NDArray[Any]]:
    """How many outcomes of earlier rows are known at each row, and whether the row before has a known one."""
    happened = table[label].to_numpy() > 0
    follows = start < rows
    if f"{label}_time" not in table:
        before = np.concatenate([[0], np.cumsum(happened)])[:-1]
        return before - before[start], np.append(False, happened[:-1]) & follows
    time = table["timestamp"].to_numpy()
    # Outcomes by (session, time); those of rows before a given row and earlier than its time are known to it. An
    # outcome is never earlier than its own row, so "earlier than row t" already means "of a row before t" (or a tie).
    when = np.maximum(table[f"{label}_time"].fillna(0).to_numpy(np.int64), time)
    order = np.lexsort((when[happened], start[happened]))
    keys = start[happened][order], when[happened][order]
    known = _count_before(keys, start, time) - _count_before(keys, start, np.zeros_like(time))
    last = np.append(False, happened[:-1] & (when[:-1] < time[1:])) & follows
    return known, last


def _count_before(keys: tuple[Ids, Ids], session: Ids, time: Ids) -> Ids:
    """For each (session, time) the number of `keys`, sorted pairs, that are smaller."""
    both = np.concatenate([session, keys[0]]), np.concatenate([time, keys[1]])
    is_key = np.append(np.zeros(len(session), bool), np.ones(len(keys[0]), bool))
    order = np.lexsort((is_key, both[1], both[0]))  # at a tie the row comes first: the outcome is not known yet
    counts = np.empty(len(order), np.int64)
    counts[order] = np.cumsum(is_key[order])
    return counts[: len(session)]


def load_splits(path: Path, numerical: Numerical = "session") -> Splits:
    """Read a folder of MDP tables. Raises UserError naming the file, line and column that is missing or wrong."""
    if not path.exists():
        raise UserError(f"{path}: no such data set: python3 SLmain.py simulates one, python3 -m dataset.prepare makes "
                        "one of your own files")
    prepared = os.path.lexists(path / "manifest.json")
    manifest = _read_manifest(path / "manifest.json") if prepared else dict(_PUBLISHED)
    layout = manifest["tables"]
    files = [*(f"{name}.csv" for name in SPLITS), *layout]
    missing = [name for name in files if not (path / name).exists()]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing: put the file back, or move the folder away and make it "
                        "anew with python3 -m dataset.prepare")
    for name in files:
        check_file(path / name)
    rows = sum(count_lines(path / f"{name}.csv") for name in SPLITS)
    check_memory(rows * BYTES_A_ROW, f"{path}: {rows:,} rows")
    if prepared:
        _check_files(path, files, manifest)
    outputs = manifest["outputs"] if prepared else {name: sha256(path / name) for name in files}
    meaning = json.dumps([manifest[key] for key in _MEANING], sort_keys=True)
    fingerprint = hashlib.sha256(("".join(outputs[name] for name in files) + meaning).encode()).hexdigest()[:16]

    names = [str(name) for name in manifest["categorical"]]
    labels = [str(task["label"]) for task in manifest["tasks"]]
    sides = [_read_side(path / name, one["key"], one["fields"]) for name, one in layout.items()]
    tables = {name: _read_split(path / f"{name}.csv", manifest) for name in SPLITS}
    for one, two in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = np.intersect1d(tables[one]["sessionid"], tables[two]["sessionid"])
        if len(shared) and prepared:
            raise UserError(f"{path / two}.csv: session {shared[0]} is in {one}.csv too: splits share no sessions")
    truth = _read_truth(path / "truth.csv", tables, manifest) if "truth.csv" in outputs else {}
    for name, table in tables.items():
        _show_repairs(path / f"{name}.csv", table, labels)
    for (name, _), (_, side) in zip(layout.items(), sides, strict=True):
        _show_spellings(path / name, side)
    history = history_so_far(tables, manifest["history"], labels) if manifest["history"] else {}
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


def _read_one_split(path: Path, numerical: Numerical) -> RetailRocketRLDataset:
    if path.stem not in SPLITS or path.suffix != ".csv":
        raise UserError(f"{path}: not a split of a data set: the path of its train.csv, val.csv or test.csv is needed")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    splits = load_splits(path.parent, numerical)
    return {"train": splits.train, "val": splits.val, "test": splits.test}[path.stem]


def _read_manifest(file: Path) -> dict[str, Any]:
    """Read and check a manifest: whatever it says is used, or is refused here. Raises UserError."""
    manifest = read_json(file)
    shape: Mapping[str, type] = {"outputs": dict, "categorical": list, "long_tailed": list, "tasks": list}
    for key, kind in shape.items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"{file}: '{key}' is missing or of the wrong kind: run python3 -m dataset.prepare again")
    if manifest.get("format", 1) != 1:
        raise UserError(f"{file}: 'format' is {manifest['format']!r:.40}, this version reads 1: run python3 -m "
                        "dataset.prepare again")
    manifest = {"tables": {"item_feadf.csv": {"key": "itemid", "fields": manifest["categorical"]}}, "context": [],
                "history": "", **manifest}  # as all manifests were before there were several tables
    tables, context, tasks, history = (manifest[key] for key in ("tables", "context", "tasks", "history"))
    if len(tasks) != 2 or not all(isinstance(task, dict) and _is_name(task.get("name")) and _is_name(task.get("label"))
                                  for task in tasks):
        raise UserError(f"{file}: 'tasks' is a list of two objects with a name and a label: letters, digits and _ - .")
    if not isinstance(context, list) or not isinstance(tables, dict) or not all(
            isinstance(one, dict) and isinstance(one.get("key"), str) and isinstance(one.get("fields"), list)
            for one in tables.values()):
        raise UserError(f"{file}: 'tables' gives each table of features a key and a list of fields; 'context' is a "
                        "list of fields")
    if history not in ("", *(one["key"] for one in tables.values())):
        raise UserError(f"{file}: 'history' is the key of one of the tables, not {history!r}")
    for key in ("outputs", "tables"):
        for name in manifest[key]:
            _check_name(file, key, name)
    described = [*context, *(name for one in tables.values() for name in one["fields"])]
    categorical = manifest["categorical"]
    if not categorical or not all(isinstance(name, str) for name in (*described, *categorical)):
        raise UserError(f"{file}: 'categorical' and the fields of 'tables' and 'context' are lists of names")
    lost = [name for name in categorical if name not in described]
    if lost:
        raise UserError(f"{file}: field '{lost[0]}' of 'categorical' is in no table and not in 'context'")
    strange = [name for name in manifest["long_tailed"] if name not in categorical]
    if strange:
        raise UserError(f"{file}: '{strange[0]}' of 'long_tailed' is no field of 'categorical'")
    labels = [task["label"] for task in tasks]
    columns = ["timestamp", "sessionid", "visitorid", *context, *labels, *(f"{label}_time" for label in labels),
               *{one["key"] for one in tables.values()}]
    for names in (categorical, described, columns, [task["name"] for task in tasks]):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{file}: '{twice[0]}' stands for two things: fields, keys, labels and names of tasks "
                            "differ from each other")
    if "truth.csv" in manifest["outputs"]:
        size_of(manifest.get("simulation"), file)
    return manifest


def _is_name(value: Any) -> bool:
    """Whether a name can head a column and stand beside a curve."""
    return isinstance(value, str) and re.fullmatch(r"[\w][\w .-]{0,63}", value) is not None


def _check_name(file: Path, key: str, name: str) -> None:
    """Raise UserError where a name of the manifest `file` is not that of a file in its folder."""
    if not is_file_name(name):
        raise UserError(f"{file}: '{name:.60}' of '{key}' is not a file name: what it lists lies in the manifest's own "
                        "folder")
    if Path(os.path.realpath(file.parent)) not in Path(os.path.realpath(file.parent / name)).parents:
        raise UserError(f"{file}: '{name:.60}' of '{key}' is a link that leaves the manifest's own folder: put the "
                        "file itself there")


def _check_files(path: Path, files: list[str], manifest: dict[str, Any]) -> None:
    file = path / "manifest.json"
    for name in files:
        if name not in manifest["outputs"]:
            raise UserError(f"{file}: 'outputs' does not list {name}: run python3 -m dataset.prepare again")
    for name, digest in manifest["outputs"].items():
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} missing: put the file back, or make the folder anew with "
                            "python3 -m dataset.prepare")
        if sha256(path / name) != digest:
            if name.removesuffix(".csv") in SPLITS:  # a bad cell or column says more than that the file has changed
                _read_split(path / name, manifest)
            if name in manifest["tables"]:
                _read_side(path / name, manifest["tables"][name]["key"], manifest["tables"][name]["fields"])
            raise UserError(f"{path / name}: not the file that dataset.prepare wrote (its SHA-256 differs from "
                            "manifest.json): was it edited or cut short? Prepare the folder again")


def _read_side(path: Path, key: str, fields: Sequence[str]) -> SideTable:
    kinds: dict[str, Kind] = {key: "id", **dict.fromkeys(fields, "optional_text")}
    table = read_table(path, kinds)
    twice = table[key].duplicated().to_numpy()
    if twice.any():
        line = int(twice.argmax())
        raise UserError(f"{path}, line {line + 2}, column '{key}': {key.removesuffix('id')} {table[key][line]} stands "
                        "there twice")
    return SideTable(key, table)


def _read_split(path: Path, manifest: Mapping[str, Any]) -> pd.DataFrame:
    labels = [str(task["label"]) for task in manifest["tasks"]]
    keys = [str(one["key"]) for one in manifest["tables"].values()]
    kinds: dict[str, Kind] = {"timestamp": "id", "sessionid": "id", "visitorid": "id", **dict.fromkeys(keys, "id"),
                              **dict.fromkeys(manifest["context"], "optional_text"),
                              **dict.fromkeys(labels, "label"),
                              **{f"{name}_time": "optional_id" for name in labels}}
    optional = ["sessionid", "visitorid", *(f"{name}_time" for name in labels)]
    table = read_table(path, kinds, optional)
    if "sessionid" not in table:
        if "visitorid" not in table:
            raise UserError(f"{path}, line 1: column 'sessionid' is missing (the published 'visitorid' is taken too)")
        table = table.rename(columns={"visitorid": "sessionid"})
    return table


def _read_truth(path: Path, tables: dict[str, pd.DataFrame], manifest: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    truth = read_truth(path, size_of(manifest["simulation"], path.parent / "manifest.json"), optional=["visitorid"])
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


def _show_repairs(path: Path, table: pd.DataFrame, labels: Sequence[str]) -> None:
    """Count and show what becomes of rows that contradict themselves; the files of `dataset.prepare` have none."""
    order = _session_order(table)
    repaired(path, int((order != np.arange(len(order))).sum()), "rows put into the order of session and time")
    shown = table["timestamp"].to_numpy()
    for label in labels:
        if f"{label}_time" not in table:
            continue
        when, happened = table[f"{label}_time"].to_numpy(), table[label].to_numpy() > 0
        repaired(path, int((happened & (when < shown)).sum()),
                 f"times in column '{label}_time' before their own row: taken for the row's")
        repaired(path, int((happened & np.isnan(when)).sum()),
                 f"times in column '{label}_time' missing: taken for the row's")
        repaired(path, int((~happened & ~np.isnan(when)).sum()),
                 f"times in column '{label}_time' of what did not happen ('{label}' is 0): left out")


def _show_spellings(path: Path, side: pd.DataFrame) -> None:
    """Count and show the values that `one_spelling` spells otherwise."""
    changed = {}
    for name in side.columns[1:]:
        values, count = np.unique(side[name].to_numpy().astype(str), return_counts=True)
        changed[str(name)] = sum(int(n) for value, n in zip(values, count, strict=True) if one_spelling(value) != value)
    names = [name for name, rows in changed.items() if rows]
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    repaired(path, sum(changed.values()),
             f"values in column{'s' * (len(names) > 1)} {some} without their blanks or the .0 of a whole number")


def _session_order(table: pd.DataFrame) -> Ids:
    """Sessions by their first row's time, rows of a session by time; ties as they stand in the file."""
    session, time = table["sessionid"].to_numpy(), table["timestamp"].to_numpy()
    names, number = np.unique(session, return_inverse=True)
    first = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(first, number, time)
    return np.lexsort((np.arange(len(table)), time, number, first[number]))


def _field(of_items: NDArray[np.object_], at: NDArray[np.int64]) -> Field:
    texts = np.array([one_spelling(text) for text in of_items], dtype=object)
    codes, values = pd.factorize(texts)
    empty = np.flatnonzero(values == "")
    codes = np.where(np.isin(codes, empty), -1, codes)
    return Field(np.append(codes, -1)[at].astype(np.int64), np.asarray(values, dtype=object))
