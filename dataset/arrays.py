"""Memory-mapped arrays of a data set: the tables become `.npy` files once, and a run reads of them what it needs.

`open_arrays` makes them through DuckDB, in sorted streams of blocks, so that neither it nor a run needs memory for all
rows. They are bit for bit what `dataset.rtrl.make_datasets` makes in memory: the features come from the same functions,
block by block. Categories are stored as codes: per field 0 = missing, then 1, 2, ... by frequency in the training split
(ties by value), then the values that only other splits have. So the ids of any `--feature_map_rate` are the codes up to
a limit, and the arrays do not depend on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from common import distributed
from common.csv_reader import cell_location, literal, log_repairs, normalize_category, quoted
from common.duck import connect
from common.errors import UserError
from common.fileio import read_json, remove_stale_temp_files, sha256
from dataset.features import (
    Ids,
    NumericalMode,
    RunningCounts,
    features_version,
    rate_names,
    rate_priors,
    session_feature_names,
    session_features,
    smoothed_rates,
)
from dataset.manifest import SPLITS, id_columns, table_file
from dataset.sessions import SessionIndex
from dataset.simulate import GROUND_TRUTH_SCHEMA, config_from_manifest, scan_ground_truth
from dataset.tables import find_contradiction, scan_tables

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FORMAT = 1  # of the files here; another one is made again
CHUNK_VECTORS = 128  # of 2,048 rows, which DuckDB hands over at a time
VALUES_AT_ONCE = 2**18  # of a field, as texts


class MappedColumn:
    """One categorical field whose codes and values are files.

    Args:
        matrix: (n, F) int32 codes of all fields; `matrix[:, position]` are those of this one.
        counts: (K,) int64, how many training rows have the value of code 1, 2, ..., K; 0 for those of other splits.
        text, ends: the values in UTF-8, one after the other, (bytes,) uint8, and where each ends, (K,) int64.
    """

    def __init__(self, matrix: NDArray[np.int32], position: int, counts: Ids, text: NDArray[np.uint8],
                 ends: Ids) -> None:
        self.matrix, self.position, self.counts, self.text, self.ends = matrix, position, counts, text, ends

    def __len__(self) -> int:
        """The number of distinct values."""
        return len(self.counts)

    @property
    def codes(self) -> Ids:
        """As those of a `CategoricalColumn`: `values[codes[i]]` is row i's value; code -1: missing. For all rows."""
        return self.matrix[:, self.position].astype(np.int64) - 1

    @property
    def values(self) -> NDArray[np.object_]:
        """All distinct values, of str."""
        return np.array(self._values(0, len(self)), dtype=object)

    @functools.cached_property
    def frequencies(self) -> Ids:
        """How many rows of the training split have each of its values, the most frequent first."""
        return self.counts[: np.searchsorted(-self.counts, 0)]

    def most_frequent(self, number: int) -> list[str]:
        """The first values in the order of `frequencies`."""
        return self._values(0, number)

    def lookup(self, ids: Mapping[str, int]) -> NDArray[np.int32]:
        """The id of each code of values with these ids, 0 for all others; of larger codes it is the last entry."""
        found = np.zeros(len(self) + 2, np.int32)
        last = 0
        for start in range(0, len(self), VALUES_AT_ONCE):
            values = self._values(start, min(start + VALUES_AT_ONCE, len(self)))
            numbers = [ids.get(value, 0) for value in values]
            found[start + 1:start + 1 + len(numbers)] = numbers
            last = max(last, start + 1 + int(np.max(np.flatnonzero(numbers), initial=-1)))
            if np.count_nonzero(found) == len(ids):
                break  # the rest is rare
        return found[: last + 2].copy()

    def _values(self, start: int, stop: int) -> list[str]:
        bounds = [0 if start == 0 else int(self.ends[start - 1]), *self.ends[start:stop].tolist()]
        text = self.text[bounds[0]:bounds[-1]].tobytes()
        return [text[begin - bounds[0]:end - bounds[0]].decode() for begin, end in itertools.pairwise(bounds)]


class MappedIds:
    """Ids (n, F) of mapped rows, which are looked up when they are read: `ids[rows]` is an array of int64."""

    dtype, ndim = np.dtype(np.int64), 2

    def __init__(self, columns: Sequence[MappedColumn], ids: Sequence[Mapping[str, int]]) -> None:
        self.codes, self.positions = columns[0].matrix, [column.position for column in columns]
        self.lookups = [column.lookup(of_field) for column, of_field in zip(columns, ids, strict=True)]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), len(self.positions)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Ids:
        codes = np.asarray(self.codes[rows])
        found = np.empty((*codes.shape[:-1], len(self.positions)), np.int64)
        for field, (position, lookup) in enumerate(zip(self.positions, self.lookups, strict=True)):
            found[..., field] = lookup[np.minimum(codes[..., position], len(lookup) - 1)]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.int64, copy=False)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of a split, as views of the files.

    Attributes: those of `dataset.rtrl.RetailRocketRLDataset` of the same names.
    """

    fields: dict[str, MappedColumn]
    numerical: NDArray[np.float32]
    numerical_names: list[str]
    labels: NDArray[np.float32]
    session: Ids
    timestamp: Ids
    keys: dict[str, Ids]
    sessions: SessionIndex
    ground_truth: pd.DataFrame | None


def prefetch(array: NDArray[Any], start: int, stop: int) -> None:
    """Ask the system to read rows of a mapped array ahead, in one piece."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if isinstance(root.base, mmap.mmap) and stop > start:
        first = array[start:].ctypes.data - root.ctypes.data + root.offset % mmap.ALLOCATIONGRANULARITY
        size = (stop - start) * array.strides[0]
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        root.base.madvise(mmap.MADV_WILLNEED, page, min(first - page + size, len(root.base) - page))


def open_arrays(path: Path, files: Mapping[str, Path], manifest: Mapping[str, Any], fingerprint: str,
                numerical: NumericalMode, is_published: bool) -> dict[str, Arrays]:
    """The arrays of each split of a folder of MDP tables. They are made where they are not there yet, or damaged.

    Args:
        files: the tables by name, `train`, `val`, `test` and those of the manifest.
        fingerprint: of the content of the folder.
        is_published: the folder has no manifest of its own.

    Raises UserError where the tables are wrong, and where the folder cannot be written.
    """
    version = "" if numerical == "none" else features_version()
    description = {"format": FORMAT, "data": fingerprint, "numerical": numerical, "features": version}
    folder = path / f"arrays-{fingerprint}-{numerical}-{version[:8]}"
    if distributed.is_main_process() and _find_damage(folder, description):
        try:
            with _only_maker(path):
                if problem := _find_damage(folder, description):
                    if folder.exists():
                        print(f"{folder}: {problem}: the arrays are made again")
                        shutil.rmtree(folder)
                    print(f"{path}: the tables become memory-mapped arrays, once, in {folder}", flush=True)
                    _make(folder, description, partial(_Builder, path, files, manifest, numerical, is_published))
        except OSError as error:
            raise UserError(f"{path}: memory-mapped arrays cannot be written beside the tables: "
                            f"{error.strerror or error}: make room or the folder writable, or use --data=memory"
                            ) from error
    distributed.barrier()
    return _split_arrays(folder, manifest)


@contextlib.contextmanager
def _only_maker(path: Path) -> Iterator[None]:
    """Wait until no other program makes arrays in this folder. Its unfinished ones are removed if it was killed."""
    lock = FileLock(path / ".arrays.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{path}: another program makes the arrays: waiting for it", flush=True)
        lock.acquire()
    try:
        remove_stale_temp_files(path)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _make(folder: Path, description: Mapping[str, Any], builder: Callable[[Path], _Builder]) -> None:
    """Write a folder of arrays as a whole, or not at all."""
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        unfinished.mkdir()
        content = builder(unfinished).run()
        digests = {file.name: sha256(file) for file in sorted(unfinished.iterdir())}
        (unfinished / "arrays.json").write_text(json.dumps({**description, **content, "sha256": digests}))
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _find_damage(folder: Path, description: Mapping[str, Any]) -> str:
    """Why the arrays of a folder cannot be used; "" if they can."""
    if not folder.exists():
        return "missing"
    try:
        content = read_json(folder / "arrays.json")
    except UserError as error:
        return str(error)
    if any(content.get(name) != value for name, value in description.items()):
        return "of another version"
    for name, digest in content["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            return f"{name} is damaged"
    return ""


def _split_arrays(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Arrays]:
    content = read_json(folder / "arrays.json")

    @functools.cache
    def read(name: str) -> NDArray[Any]:
        # Private and writable, so that torch takes it without a warning; nothing writes.
        array: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False).view(np.ndarray)
        return array

    arrays = {}
    for number, split in enumerate(SPLITS):
        rows = slice(content["offsets"][number], content["offsets"][number + 1])
        of_sessions = slice(content["sessions"][number], content["sessions"][number + 1])
        index = SessionIndex.of(read("starts")[of_sessions], read("ends")[of_sessions], read("row_start")[rows])
        codes = read("codes")[rows]
        fields = {field: MappedColumn(codes, at, read(f"counts-{at}"), read(f"values-{at}"), read(f"ends-{at}"))
                  for at, field in enumerate(manifest["categorical"])}
        truth = {name: read(f"truth-{name}")[rows] for name in content["truth"]}
        arrays[split] = Arrays(
            fields, read("numbers")[rows], content["numerical_names"], read("labels")[rows], read("session")[rows],
            read("timestamp")[rows], {key: read(f"key-{at}")[rows] for at, key in enumerate(id_columns(manifest))},
            index, pd.DataFrame(truth, copy=False) if truth else None)
    return arrays


class _Builder:
    """Makes the arrays of a folder of tables. Columns of its tables have names of their own: k0, k1, ... are the ids of
    the rows, c0, ... the fields, x0, ... the numbers, l0, ... and t0, ... labels and the times of their outcomes."""

    def __init__(self, path: Path, files: Mapping[str, Path], manifest: Mapping[str, Any], numerical: NumericalMode,
                 is_published: bool, target: Path) -> None:
        self.path, self.files, self.manifest, self.target = path, files, manifest, target
        self.numerical, self.is_published = numerical, is_published
        self.arrays: dict[str, NDArray[Any]] = {}
        self.keys = id_columns(manifest)
        self.fields, self.numbers = [str(field) for field in manifest["categorical"]], list(manifest["numbers"])
        self.labels = [str(task["label"]) for task in manifest["tasks"]]
        self.table_of = {field: name for name, table in manifest["tables"].items() for field in table["fields"]}
        self.rates = list(manifest["rates"]) if numerical == "rates" else []
        self.numerical_names = ["zero"] if numerical == "none" else [
            *session_feature_names(self.labels), *rate_names(self.rates, self.labels), *self.numbers]

    def run(self) -> dict[str, Any]:
        """Write all arrays; return what `arrays.json` says of them."""
        scratch = self.target / "scratch"
        scratch.mkdir()
        # Beside the arrays, where there is as much space, and removed with them if this process is killed.
        with connect(folder=scratch) as self.con:
            for sql in (f"ATTACH {literal(scratch / 'staged.db')} AS staged", "USE staged"):
                self.con.execute(sql)
            self.con.create_function("normalize", normalize_category, ["VARCHAR"], "VARCHAR")
            self.tables, self.feature_tables = scan_tables(self.con, self.path, self.manifest, self.is_published)
            offsets = self._stage_rows()
            self._stage_fields()
            self._join()
            self.position = self._array("position", (offsets[-1],), np.int64, scratch)
            sessions = self._write_rows(offsets)
            if self.numerical != "none" and self.manifest["history"]:
                self._write_history()
            if self.rates:
                self._write_rates(scratch)
            is_simulated = table_file(self.manifest, "truth") in self.manifest.get("outputs", ())
            truth = self._write_ground_truth(offsets) if is_simulated else []
        for array in self.arrays.values():
            array.flush()  # type: ignore[attr-defined]
        shutil.rmtree(scratch)
        return {"offsets": offsets, "sessions": sessions, "numerical_names": self.numerical_names, "truth": truth}

    # ----------------------------------------------------------------------------------------------------------- tables

    def _stage_rows(self) -> list[int]:
        """Table `logged`: all rows, split by split in the files' order; return where the splits begin, and end."""
        offsets = [0]
        for number, split in enumerate(SPLITS):
            rows, file = self.tables[split], self.files[split]
            if contradiction := find_contradiction(file, rows, self.manifest["tasks"]):
                print(contradiction)  # of a task that is given another by default
            self.timed = [f"{label}_time" in rows.columns for label in self.labels]
            context = {field: self._field_sql(field) for field in self.manifest["context"]
                       if field in self.fields or field in self.numbers}
            selected = ", ".join([
                f"{number}::UTINYINT AS split", f"row + {offsets[-1]} AS row", "timestamp AS ts",
                "sessionid AS session",
                *(f"{quoted(key)} AS k{at}" for at, key in enumerate(self.keys)), *context.values(),
                *(f"{quoted(label)} AS l{at}" for at, label in enumerate(self.labels)),
                *(f"{quoted(label + '_time')} AS t{at}" for at, label in enumerate(self.labels) if self.timed[at])])
            rows.create_view("file_rows", replace=True)
            self.con.execute(("INSERT INTO logged " if number else "CREATE TABLE logged AS ")
                             + f"SELECT {selected} FROM file_rows")
            offsets.append(self._number("SELECT count(*) FROM logged"))
            self._log_outcome_times(number, file)
        return offsets

    def _field_sql(self, field: str) -> str:
        """A column of a file as a column here."""
        if field in self.numbers:
            return f"{quoted(field)} AS x{self.numbers.index(field)}"
        text = f"coalesce({quoted(field)}, '')"
        return (f"CASE WHEN regexp_matches({text}, '^ | $|[.]0$|[^ -~]') THEN normalize({text}) ELSE {text} END "
                f"AS c{self.fields.index(field)}")

    def _log_outcome_times(self, number: int, file: Path) -> None:
        """Print which times of outcomes are replaced or ignored in a split."""
        for at, label in enumerate(self.labels):
            if self.timed[at]:
                counts = self._first(
                    f"SELECT count(*) FILTER (l{at} > 0 AND t{at} < ts), count(*) FILTER (l{at} > 0 AND t{at} IS NULL)"
                    f", count(*) FILTER (l{at} = 0 AND t{at} IS NOT NULL) FROM logged WHERE split = {number}")
                for count, repair in zip(counts, ("before their row: replaced by the row's time",
                                                  "missing: replaced by the row's time",
                                                  f"ignored because '{label}' is 0"), strict=True):
                    log_repairs(file, count, f"times in column '{label}_time' {repair}")

    def _stage_fields(self) -> None:
        """Tables `d0`, ...: the values of a field with their codes; and of each feature table one of its keys with the
        codes and numbers."""
        self.joins, self.selected = "", {f"x{self.numbers.index(name)}": f"logged.x{self.numbers.index(name)}"
                                         for name in self.manifest["context"] if name in self.numbers}
        for number, (name, table) in enumerate(self.manifest["tables"].items()):
            self._stage_feature_table(number, name, table["key"], table["fields"])
        for at, field in enumerate(self.fields):
            if field in self.keys:
                value = f"k{self.keys.index(field)}"
                self._number_values(at, f"SELECT CAST({value} AS VARCHAR) AS value, {value} AS id, count(*) FILTER "
                                    f"(split = 0) AS n FROM logged GROUP BY ALL")
                self.joins += f" LEFT JOIN d{at} ON logged.{value} = d{at}.id"
            elif field not in self.table_of:
                self._number_values(at, f"SELECT c{at} AS value, count(*) FILTER (split = 0) AS n FROM logged "
                                    "GROUP BY ALL")
                self.joins += f" LEFT JOIN d{at} ON logged.c{at} = d{at}.value"
            else:
                continue
            self.selected[f"c{at}"] = f"coalesce(d{at}.code, 0)"

    def _stage_feature_table(self, number: int, name: str, key: str, fields: Sequence[str]) -> None:
        file, known = self.files[name], [field for field in fields if field in self.fields or field in self.numbers]
        self.feature_tables[name].create_view("file_rows", replace=True)
        selected = ", ".join(["row", f"{quoted(key)} AS key", *map(self._field_sql, known)])
        self.con.execute(f"CREATE TABLE f{number} AS SELECT {selected} FROM file_rows")
        texts = [field for field in known if field not in self.numbers]
        differ = [f"count(*) FILTER (coalesce({quoted(field)}, '') != c{self.fields.index(field)})" for field in texts]
        counts = self.con.execute(f"SELECT {', '.join(['1', *differ])} FROM (SELECT *, "
                                  f"{', '.join(['1', *map(self._field_sql, texts)])} FROM file_rows)").fetchone()
        changed = {field: count for field, count in zip(texts, (counts or ())[1:], strict=True) if count}
        k, joins, columns = f"k{self.keys.index(key)}", "", [f"f{number}.key"]
        for field in known:
            if field in self.keys:
                continue
            if field in self.numbers:
                columns.append(f"f{number}.x{self.numbers.index(field)}")
                self.selected[f"x{self.numbers.index(field)}"] = f"g{number}.x{self.numbers.index(field)}"
                continue
            at = self.fields.index(field)
            self._number_values(at, f"SELECT c{at} AS value, sum(n)::BIGINT AS n FROM f{number} JOIN (SELECT {k} AS key"
                                f", count(*) FILTER (split = 0) AS n FROM logged GROUP BY ALL) USING (key) GROUP BY "
                                f"c{at}")
            joins += f" LEFT JOIN d{at} ON f{number}.c{at} = d{at}.value"
            columns.append(f"coalesce(d{at}.code, 0) AS c{at}")
            self.selected[f"c{at}"] = f"coalesce(g{number}.c{at}, 0)"
        self.con.execute(f"CREATE TABLE g{number} AS SELECT {', '.join(columns)} FROM f{number}{joins}")
        self.joins += f" LEFT JOIN g{number} ON logged.{k} = g{number}.key"
        names = ", ".join([*changed][:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        log_repairs(file, sum(changed.values()),
                    f"values in column{'s' * (len(changed) > 1)} {names} stripped of whitespace or a final .0")

    def _number_values(self, at: int, counted: str) -> None:
        """Table `d<at>` of the values that `counted` selects with n, how many training rows have them; write them."""
        self.con.execute(f"CREATE TABLE d{at} AS SELECT *, (row_number() OVER (ORDER BY n DESC, value))::INTEGER AS "
                         f"code FROM ({counted}) WHERE value != ''")
        total = self._number(f"SELECT count(*) FROM d{at}")
        size = self._number(f"SELECT coalesce(sum(strlen(value)), 0)::BIGINT FROM d{at}")
        counts, ends, text = (self._array(f"{name}-{at}", shape, dtype) for name, shape, dtype in (
            ("counts", (total,), np.int64), ("ends", (total,), np.int64), ("values", (size,), np.uint8)))
        row = byte = 0
        for chunk in self._chunks(f"SELECT value, n FROM d{at} ORDER BY code"):
            values = [value.encode() for value in chunk["value"]]
            stop = row + len(values)
            counts[row:stop] = chunk["n"]
            ends[row:stop] = byte + np.cumsum([len(value) for value in values])
            text[byte:int(ends[stop - 1])] = np.frombuffer(b"".join(values), np.uint8)
            row, byte = stop, int(ends[stop - 1])

    def _join(self) -> None:
        """Table `coded`: each row with the start of its session, its codes and numbers."""
        own = ["row", "logged.split AS split", "start", "ts", "logged.session AS session",
               *(f"k{at}" for at in range(len(self.keys))),
               *(f"l{at}" for at in range(len(self.labels))),
               *(f"t{at}" for at in range(len(self.labels)) if self.timed[at])]
        self.con.execute(f"CREATE TABLE coded AS SELECT {', '.join(own)}, "
                         + ", ".join(f"{sql} AS {name}" for name, sql in self.selected.items())
                         + " FROM logged JOIN (SELECT split, session, min(ts) AS start FROM logged GROUP BY ALL) s ON "
                         "logged.split = s.split AND logged.session = s.session" + self.joins)
        self.con.execute("DROP TABLE logged")

    # ----------------------------------------------------------------------------------------------------------- arrays

    def _write_rows(self, offsets: Sequence[int]) -> list[int]:
        """The arrays in session order; return where the sessions of the splits begin, and end."""
        rows, count = offsets[-1], self._number("SELECT count(*) FROM (SELECT DISTINCT split, session FROM coded)")
        width = len(self.numerical_names)
        codes, labels, numbers = (self._array(name, (rows, columns), dtype) for name, columns, dtype in (
            ("codes", len(self.fields), np.int32), ("labels", len(self.labels), np.float32),
            ("numbers", width, np.float32)))
        session, timestamp, row_start = (self._array(name, (rows,), np.int64)
                                         for name in ("session", "timestamp", "row_start"))
        starts, ends = (self._array(name, (count,), np.int64) for name in ("starts", "ends"))
        keys = [self._array(f"key-{at}", (rows,), np.int64) for at in range(len(self.keys))]
        means = [self._number(f"SELECT coalesce(favg(x{at}) FILTER (split = 0), 0) FROM coded")
                 for at in range(len(self.numbers))]
        sessions = [0]
        for number, split in enumerate(SPLITS):
            row, moved, first = offsets[number], 0, sessions[-1]
            for block in self._blocks("SELECT * EXCLUDE (split, start) FROM coded WHERE split = "
                                      f"{number} ORDER BY start, session, ts, row", "session"):
                here = slice(row, row + len(block))
                order = block["row"].to_numpy()
                self.position[order] = np.arange(here.start, here.stop)
                moved += int((order != np.arange(here.start, here.stop)).sum())
                codes[here] = block[[f"c{at}" for at in range(len(self.fields))]].to_numpy(np.int32)
                labels[here] = block[[f"l{at}" for at in range(len(self.labels))]].to_numpy(np.float32)
                session[here], timestamp[here] = block["session"], block["ts"]
                for at, key in enumerate(keys):
                    key[here] = block[f"k{at}"]
                index, start = SessionIndex(block["session"].to_numpy()), row - offsets[number]
                row_start[here] = index.row_start + start
                new = slice(first, first + len(index.starts))
                starts[new], ends[new] = index.starts + start, index.ends + start
                if self.numerical != "none":
                    if not self.manifest["history"]:
                        numbers[here, : 2 + 2 * len(self.labels)] = session_features(self._named(block), self.labels)
                    for at, mean in enumerate(means):
                        values = block[f"x{at}"].to_numpy(np.float64)
                        numbers[here, width - len(means) + at] = np.where(np.isnan(values), mean, values)
                row, first = here.stop, new.stop
            log_repairs(self.files[split], moved, "rows sorted by session and time")
            sessions.append(first)
        return sessions

    def _write_history(self) -> None:
        """Features of all rows of a user so far, in place of those of the session."""
        columns = [name for name, has_time in zip((f"t{at}" for at in range(len(self.labels))), self.timed,
                                                  strict=True) if has_time]
        columns += [f"l{at}" for at in range(len(self.labels))]
        key = f"k{self.keys.index(self.manifest['history'])}"
        for block in self._blocks(f"SELECT row, ts, {key} AS session, {', '.join(columns)} FROM coded "
                                  "ORDER BY session, ts, row", "session"):
            features = session_features(self._named(block), self.labels)
            self.arrays["numbers"][self.position[block["row"]], : features.shape[1]] = features

    def _named(self, block: pd.DataFrame) -> pd.DataFrame:
        """A block in the names of the MDP tables."""
        labels = {f"l{at}": label for at, label in enumerate(self.labels)}
        times = {f"t{at}": f"{label}_time" for at, label in enumerate(self.labels)}
        return block.rename(columns={"session": "sessionid", "ts": "timestamp", **labels, **times})

    def _write_rates(self, scratch: Path) -> None:
        """The running rates, in one pass in order of time over the rows and the outcomes of each task."""
        joins, groups, sizes = "", [], []
        for number, entry in enumerate(self.rates):
            names = entry.split("&")
            columns = [f"c{self.fields.index(name)}" if name in self.fields else f"k{self.keys.index(name)}"
                       for name in names]
            if len(columns) == 1 and names[0] in self.fields:
                groups.append(columns[0])
                sizes.append(self._number(f"SELECT count(*) + 1 FROM d{self.fields.index(names[0])}"))
                continue
            missing = " OR ".join(["false", *(f"{column} = 0" for column in columns if column.startswith("c"))])
            parts = [f"CASE WHEN {missing} THEN -1 ELSE {column} END" for column in columns]
            self.con.execute(f"CREATE TABLE n{number} AS SELECT *, row_number() OVER () - 1 AS value FROM (SELECT "
                             f"DISTINCT {', '.join(f'{part} AS p{at}' for at, part in enumerate(parts))} FROM coded)")
            joins += f" JOIN n{number} ON " + " AND ".join(f"{part} = n{number}.p{at}"
                                                           for at, part in enumerate(parts))
            groups.append(f"n{number}.value")
            sizes.append(self._number(f"SELECT count(*) FROM n{number}"))
        named = [f"{group} AS g{number}" for number, group in enumerate(groups)]
        times = [f"CASE WHEN l{at} > 0 THEN " + (f"greatest(coalesce(t{at}::BIGINT, ts), ts)" if self.timed[at] else
                                                 "ts") + f" END AS o{at}" for at in range(len(self.labels))]
        self.con.execute(f"CREATE TABLE grouped AS SELECT row, ts, {', '.join([*times, *named])} FROM coded{joins}")
        outcomes = [_Stream(self._chunks(f"SELECT o{at} AS ts, * EXCLUDE (row, ts) FROM grouped WHERE o{at} IS NOT "
                                         f"NULL ORDER BY o{at}")) for at in range(len(self.labels))]
        counts = [RunningCounts(self._array(f"so far {number}", (1 + len(self.labels), size), np.int64, scratch))
                  for number, size in enumerate([1, *sizes])]
        width = 2 + 2 * len(self.labels)
        for block in self._blocks("SELECT row, ts, " + ", ".join(f"g{at}" for at in range(len(groups)))
                                  + " FROM grouped ORDER BY ts", "ts"):
            moments, moment = np.unique(block["ts"].to_numpy(), return_inverse=True)
            earlier = [stream.before(int(moments[-1])) for stream in outcomes]
            known_from = [np.searchsorted(moments, events["ts"].to_numpy(), side="right") for events in earlier]
            priors = rate_priors(*counts[0].add(np.zeros_like(moment), moment, [(np.zeros_like(known), known)
                                                                               for known in known_from]))
            place = self.position[block["row"]]
            for number, of_values in enumerate(counts[1:]):
                events = [(table[f"g{number}"].to_numpy(np.int64), known)
                          for table, known in zip(earlier, known_from, strict=True)]
                rates = smoothed_rates(*of_values.add(block[f"g{number}"].to_numpy(np.int64), moment, events), priors)
                at = width + number * len(rates)
                self.arrays["numbers"][place, at:at + len(rates)] = np.column_stack(rates)

    def _write_ground_truth(self, offsets: Sequence[int]) -> list[str]:
        """The truth of a simulated log, a column a file; return their names."""
        path = self.path / table_file(self.manifest, "truth")
        config = config_from_manifest(self.manifest["simulation"], self.path / "manifest.json")
        rows = scan_ground_truth(self.con, path, config, ["visitorid"])
        names = [name for name in rows.columns if name in GROUND_TRUTH_SCHEMA]
        rows.create_view("file_rows", replace=True)
        self.con.execute("CREATE TABLE truth AS SELECT * FROM file_rows")
        count = self._number("SELECT count(*) FROM truth")
        if count != offsets[-1]:
            raise UserError(f"{path}: {count} rows, but the tables have {offsets[-1]}")
        arrays = {name: self._array(f"truth-{name}", (count,), np.int64 if GROUND_TRUTH_SCHEMA[name] == "id" else
                                    np.float64) for name in names}
        tables = {"timestamp": self.arrays["timestamp"], "itemid": self.arrays[f"key-{self.keys.index('itemid')}"]}
        for block in self._chunks("SELECT * FROM truth ORDER BY row"):
            place = self.position[block["row"]]
            for name, array in arrays.items():
                array[place] = block[name]
            for name, column in tables.items():
                if (is_different := block[name].to_numpy() != column[place]).any():
                    row = int(is_different.argmax())
                    raise UserError(f"{cell_location(path, int(block['row'][row]), name)}: {block[name][row]} differs "
                                    "from that row of the tables")
        return names

    # ----------------------------------------------------------------------------------------------------------- pieces

    def _array(self, name: str, shape: tuple[int, ...], dtype: type, folder: Path | None = None) -> NDArray[Any]:
        """A new file of the arrays. Its space is reserved: a full disk is an error here, not a crash at a write."""
        path = (folder or self.target) / f"{name}.npy"
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self.arrays[name] = array
        return array

    def _cursor(self, query: str) -> DuckDBPyConnection:
        """The rows of a query, of which several may be open at once."""
        cursor = self.con.cursor()
        cursor.execute("USE staged")
        return cursor.execute(query)

    def _first(self, query: str) -> tuple[Any, ...]:
        """The first row of a query; () if it has none."""
        return self._cursor(query).fetchone() or ()

    def _number(self, query: str) -> Any:
        """The one value of a query."""
        return self._first(query)[0]

    def _chunks(self, query: str) -> Iterator[pd.DataFrame]:
        """The rows of a query, some at a time."""
        cursor = self._cursor(query)
        while len(chunk := cursor.fetch_df_chunk(CHUNK_VECTORS)):
            yield chunk

    def _blocks(self, query: str, until: str) -> Iterator[pd.DataFrame]:
        """The same in blocks that end where the column `until` changes."""
        rest = pd.DataFrame()
        for chunk in self._chunks(query):
            table = pd.concat([rest, chunk], ignore_index=True) if len(rest) else chunk
            values = table[until].to_numpy()
            cut = int(np.flatnonzero(values != values[-1]).max(initial=-1)) + 1
            if cut:
                yield table.iloc[:cut].reset_index(drop=True)
            rest = table.iloc[cut:]
        yield rest.reset_index(drop=True)


class _Stream:
    """Events in order of time, column ts, of which those before a time are taken."""

    def __init__(self, chunks: Iterator[pd.DataFrame]) -> None:
        self.chunks = chunks
        self.rest = next(chunks, pd.DataFrame({"ts": np.zeros(0, np.int64)}))

    def before(self, time: int) -> pd.DataFrame:
        """The events before a time that were not taken yet."""
        parts = []
        while True:
            cut = int(np.searchsorted(self.rest["ts"].to_numpy(), time))
            parts.append(self.rest.iloc[:cut])
            self.rest = self.rest.iloc[cut:]
            if len(self.rest) or (chunk := next(self.chunks, None)) is None:
                return pd.concat(parts, ignore_index=True)
            self.rest = chunk
