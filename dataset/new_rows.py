"""Rows that are not in a data set yet, such as those to score now: the log of the data set is their history.

Their features are computed by the functions that compute those of the log's own rows, over the log and the new rows
together, so that a model reads of a row what it would have read of it in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.csv_reader import MAX_EXACT_INT, MAX_FLOAT32, normalize_category
from common.errors import UserError, truncate
from dataset.features import Ids, NumericalMode
from dataset.manifest import id_columns
from dataset.rtrl import Log, RetailRocketRLDataset, make_datasets
from dataset.tables import session_order


class NewRows(NamedTuple):
    """New rows with the history that their features come from.

    Attributes:
        dataset: the rows of the log, and the new ones; without ids.
        positions: (n,) the row of `dataset` that each new row is.
        is_logged: (n,) whether it was in the log already.
    """

    dataset: RetailRocketRLDataset
    positions: Ids
    is_logged: NDArray[np.bool_]


def row_columns(manifest: Mapping[str, Any]) -> list[str]:
    """The columns that say which row one is: time, session, and ids, such as the item's."""
    return ["timestamp", "sessionid", *id_columns(manifest)]


def check_rows(table: pd.DataFrame, log: Log) -> pd.DataFrame:
    """A user's table as rows of MDP tables, in the types that a file's have. Labels and their times may be missing; an
    outcome that is not known did not happen. Raises UserError, naming the column."""
    if "sessionid" not in table and "visitorid" in table:
        table = table.rename(columns={"visitorid": "sessionid"})
    ids, context = row_columns(log.manifest), list(log.manifest["context"])
    missing = [name for name in [*ids, *context] if name not in table]
    if missing:
        raise UserError(f"the rows have no column '{missing[0]}': they need {', '.join([*ids, *context])}")
    columns: dict[str, Any] = {}
    for name in ids:
        values = _numbers(table, name)
        if not (np.isfinite(values) & (values == np.floor(values)) & (np.abs(values) < MAX_EXACT_INT)).all():
            raise UserError(f"column '{name}' of the rows: not whole numbers below 2^53 in every row")
        columns[name] = table[name].to_numpy().astype(np.int64)
    for name in set(context) & {*log.manifest["numbers"]}:
        columns[name] = _numbers(table, name)
        if not (np.isnan(columns[name]) | (np.abs(columns[name]) <= MAX_FLOAT32)).all():
            raise UserError(f"column '{name}' of the rows: a number is infinite, or beyond the range of float32")
    for name in set(context) - columns.keys():
        columns[name] = np.array(["" if pd.isna(value) else str(value) for value in table[name]], dtype=object)
    for label in log.labels:
        values = _numbers(table, label) if label in table else np.zeros(len(table))
        if not np.isin(values, (0.0, 1.0)).all():
            raise UserError(f"column '{label}' of the rows: a label is 0 or 1; leave the column out if it is not known")
        columns[label] = values.astype(np.float32)
        if f"{label}_time" in table:
            columns[f"{label}_time"] = _numbers(table, f"{label}_time")
    return pd.DataFrame(columns)


def _numbers(table: pd.DataFrame, name: str) -> NDArray[np.float64]:
    if table[name].dtype.kind in "mM":
        raise UserError(f"column '{name}' of the rows: dates, not numbers: times are whole milliseconds since 1970")
    try:
        return table[name].to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise UserError(f"column '{name}' of the rows: not numbers ({truncate(str(error))})") from error


def with_history(log: Log, rows: pd.DataFrame, numerical: NumericalMode, candidates: bool = False) -> NewRows:
    """The rows (n) of `check_rows` behind those of the log.

    A row of a session that the log has continues it. A row that the log has, with equal time, session, keys and
    context, is the log's row, with the outcomes that the log has of it; it is not counted twice.

    candidates: each row is the next impression of its session, after the log's rows of earlier times, as if none of the
        other new rows were there: to rank what could be shown.
    """
    counts = [len(table) for table in log.tables.values()]
    split = np.repeat(np.arange(len(counts)), counts)
    # Only these columns, and only times of outcomes that the log has: without them an outcome counts at once.
    first = next(iter(log.tables.values()))
    names = [name for name in (*row_columns(log.manifest), *log.manifest["context"], *log.labels,
                               *(f"{label}_time" for label in log.labels)) if name in first]
    logged = pd.concat(log.tables.values(), ignore_index=True)[names].assign(split=split)
    # Sessions are of splits; tables without a manifest may have the same in several: then it is the last one's.
    last = pd.Series(split, logged["sessionid"]).groupby(level=0).max()
    rows = rows.reindex(columns=names)
    rows["split"] = rows["sessionid"].map(last).fillna(len(counts) - 1).astype(int)
    key = str(log.manifest["history"])
    if candidates:
        positions = len(logged) + np.arange(len(rows))
        parts = [logged.assign(owner=-1), rows.assign(owner=np.arange(len(rows))), _copies(logged, rows, key)]
    else:
        found = _find_logged(logged, rows, [*row_columns(log.manifest), *log.manifest["context"]])
        is_new = found < 0
        positions = np.where(is_new, len(logged) + np.cumsum(is_new) - 1, found)
        parts = [logged.assign(owner=-1), rows[is_new].assign(owner=-1)]
    table = pd.concat(parts, ignore_index=True)
    groups = {"history group": table.groupby(["owner", key], sort=False).ngroup()} if key else {}
    table = table.assign(sessionid=table.groupby(["owner", "split", "sessionid"], sort=False).ngroup(), **groups)
    counted = np.arange(len(table)) < len(logged) if candidates else None
    dataset = make_datasets(log, {"all": table}, numerical, history_key="".join(groups), counted=counted)["all"]
    return NewRows(dataset, np.argsort(session_order(table))[positions], positions < len(logged))


def _copies(logged: pd.DataFrame, rows: pd.DataFrame, key: str) -> pd.DataFrame:
    """For each of `rows`, its `owner`, a copy of the log's rows that its features come from: those of its session, and
    of the users whom it and that session have."""
    by_session = logged.groupby("sessionid").indices
    by_user, user = (logged.groupby(key).indices, logged[key].to_numpy()) if key else ({}, np.zeros(0, np.int64))
    nothing = np.zeros(0, np.int64)
    related: dict[tuple[int, int], Ids] = {}
    pairs = list(zip(rows["sessionid"].tolist(), rows[key or "sessionid"].tolist(), strict=True))
    for session, own in dict.fromkeys(pairs):
        found = by_session.get(session, nothing)
        users = {own, *user[found].tolist()} if key else set()
        related[session, own] = np.unique(np.concatenate([found, *(by_user.get(one, nothing) for one in users)]))
    indices = [related[pair] for pair in pairs]
    owner = np.repeat(np.arange(len(rows)), [len(index) for index in indices])
    return logged.iloc[np.concatenate([nothing, *indices])].assign(owner=owner)


def _find_logged(logged: pd.DataFrame, rows: pd.DataFrame, names: Sequence[str]) -> Ids:
    """The position in the log of each row (n,) that is there with equal columns `names`, -1 for the others. Of several
    equal rows the first is the first one, and so on; the last split comes first."""
    order = np.argsort(-logged["split"].to_numpy(), kind="stable")
    order = order[np.isin(logged["timestamp"].to_numpy()[order], rows["timestamp"].to_numpy())]

    def numbered(table: pd.DataFrame) -> pd.DataFrame:
        columns = pd.DataFrame({name: table[name].to_numpy() if table[name].dtype.kind in "if" else
                                np.array([normalize_category(value) for value in table[name]], dtype=object)
                                for name in names})
        return columns.assign(number=columns.groupby([*names]).cumcount())

    known = numbered(logged.iloc[order]).assign(position=order)
    return numbered(rows).merge(known, how="left", on=[*names, "number"])["position"].fillna(-1).to_numpy(np.int64)
