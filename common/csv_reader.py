"""Tables in CSV and Parquet files: each cell is checked; errors name file, line and column, repairs are counted and
printed.

DuckDB reads and checks a file. Where it finds anything unusual, Python's `csv` reads the file once more, row by row: it
names the first invalid cell, or reads what DuckDB does not, such as blanks around quotes.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import functools
import glob
import gzip
import io
import itertools
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import numpy as np
import pandas as pd

from common.errors import UserError, truncate
from common.fileio import require_regular_file, write_text

if TYPE_CHECKING:  # DuckDB takes a tenth of a second to import
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

csv.field_size_limit(2**31 - 1)  # a cell may exceed the default of 128 KiB

ColumnType = Literal["id", "optional_id", "label", "number", "optional_number", "text", "optional_text"]
WHITESPACE = " \t\v\f"  # ignored around a number
NA_VALUES = ("NULL", "null", "NA", "NaN", "nan")  # an optional id or number that is missing
MAX_FLOAT32 = float(np.finfo(np.float32).max)
OPTIONAL_NUMBERS = ("optional_id", "optional_number")
MAX_EXACT_INT = 2**53  # the largest integer up to which a float64, hence "1.44E+12", is exact
ROWS_AT_ONCE = 100_000
NOT_UTF8 = "not UTF-8 text: save it as UTF-8 CSV"

# The value of a text cell, NULL if it is invalid. Casts alone are not strict: BIGINT takes 12.7 and 0x1f, DOUBLE 1_0.
CELL_MACROS = f"""
CREATE OR REPLACE TEMP MACRO is_na(cell) AS cell = '' OR trim(cell, '{WHITESPACE}') IN ('', {str(NA_VALUES)[1:-1]});
CREATE OR REPLACE TEMP MACRO as_number(cell) AS CASE
    WHEN isfinite(TRY_CAST(cell AS DOUBLE)) AND NOT contains(cell, '_') AND NOT contains(cell, '+-')
    THEN TRY_CAST(cell AS DOUBLE) END;
CREATE OR REPLACE TEMP MACRO as_id(cell) AS CASE
    WHEN CAST(TRY_CAST(cell AS BIGINT) AS VARCHAR) = cell
    AND TRY_CAST(cell AS BIGINT) BETWEEN {1 - MAX_EXACT_INT} AND {MAX_EXACT_INT - 1} THEN TRY_CAST(cell AS BIGINT)
    WHEN as_number(cell) = floor(as_number(cell)) AND abs(as_number(cell)) < {MAX_EXACT_INT}
    THEN CAST(as_number(cell) AS BIGINT) END;
"""
CELL_VALUES = {
    "id": "as_id({0})",
    "optional_id": "CASE WHEN {0} <> '' THEN CAST(as_id({0}) AS DOUBLE) END",
    "label": "CASE WHEN {0} IN ('0', '1') THEN CAST({0} AS FLOAT) "
             "WHEN as_number({0}) IN (0, 1) THEN CAST(as_number({0}) AS FLOAT) END",
    "number": "as_number({0})",
    "optional_number": f"CASE WHEN {{0}} <> '' AND abs(as_number({{0}})) <= {MAX_FLOAT32!r} THEN as_number({{0}}) END",
    "text": "nullif({0}, '')",
    "optional_text": "{0}",
}


def log_repairs(path: Path, count: int, repair: str) -> None:
    """Print how many cells or rows were repaired while a file was read."""
    if count:
        print(f"{path}: repaired: {count:,} {repair}")


def cell_location(path: Path, row: int, column: str) -> str:
    """The location of a cell of a table that `scan` read, as messages name it; `row` counts from 0.

    The file is read again: blank lines and cells of several lines shift the line.
    """
    lines = (line for line, cells, _ in _iter_rows(path) if cells)
    return _location(path, next(itertools.islice(lines, row, None)), column)


def _location(path: Path, line: int, column: str) -> str:
    return f"{path}, {'row' if is_parquet(path) else 'line'} {line}, column '{_printable(column)}'"


def normalize_category(value: str) -> str:
    """Strip whitespace around a category, and the ".0" that spreadsheets add to whole numbers."""
    value = value.strip()
    return value[:-2] if value.endswith(".0") and value[:-2].lstrip("-").isdigit() else value


def count_rows(path: Path) -> int:
    """The number of lines of a CSV file, or of rows of a Parquet file."""
    if is_parquet(path):
        return int(_connection().cursor().read_parquet(str(path)).count("*").fetchall()[0][0])
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def read_table(path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = (),
               may_be_empty: bool = False) -> pd.DataFrame:
    """Read a whole file into memory; see `scan`. An id is int64, a label float32, another number float64, NaN where it
    is missing."""
    with _connection().cursor() as con:
        return to_frame(scan(con, path, columns, optional, may_be_empty))


def to_frame(relation: DuckDBPyRelation) -> pd.DataFrame:
    """The rows of a relation of `scan` in memory, without `row`; text is of dtype object."""
    table: pd.DataFrame = relation.project("* EXCLUDE (row)").df()
    return table.astype({name: object for name in table.columns if table[name].dtype == "str"})


def as_relation(table: pd.DataFrame | DuckDBPyRelation) -> DuckDBPyRelation:
    """A table of SQL; of a table in memory one that refers to it."""
    return _connection().cursor().from_df(table) if isinstance(table, pd.DataFrame) else table


def select(table: pd.DataFrame | DuckDBPyRelation, query: str) -> list[tuple[Any, ...]]:
    """The result of a query on a table, which is called `rows` there."""
    result = as_relation(table).query("rows", query)
    return result.fetchall() if result else []


@functools.cache
def _connection() -> DuckDBPyConnection:
    """The connection of tables that are read into memory; opening one takes longer than reading a small file."""

    # No threads of its own, so that a process may fork; no temporary files, since the result is in memory anyway.
    return duckdb.connect(":memory:", config={"threads": 1, "temp_directory": ""})


def scan(con: DuckDBPyConnection, path: Path, columns: Mapping[str, ColumnType], optional: Sequence[str] = (),
         may_be_empty: bool = False) -> DuckDBPyRelation:
    """The given columns of a CSV (plain or .gz) or Parquet file, checked; and `row`, BIGINT, from 0, in file order.

    The relation reads the file again when it is used. Column types: `id` a whole number below 2^53 (`12`, `12.0`,
    `1.44E+12`), BIGINT; `optional_id` the same or empty, DOUBLE; `label` 0 or 1, FLOAT; `number` finite, DOUBLE;
    `optional_number` empty, or finite and in the range of float32, DOUBLE; `text` not empty, VARCHAR; `optional_text`
    text, may be empty. Columns in `optional` may be missing from the file. Its further columns are ignored.

    Repairs, counted and printed: blank lines are skipped; NULL, NA, nan and blank cells of an `optional_id` or
    `optional_number` are empty.
    Raises UserError naming file, line and column of an invalid cell, or if there are no rows (unless `may_be_empty`).
    """

    header = read_header(path)
    require_columns(f"{path}, line 1", header, columns, optional)
    schema = {f"coalesce(c{header.index(name)}, '')": (name, column_type) for name, column_type in columns.items()
              if name in header}
    con.execute(CELL_MACROS)
    source, blank_lines, counts = _cells_of(path, header), 0, None
    facts = (0, 0, False) if is_parquet(path) else _count_bytes(path)
    if facts and (len(header) > 1 or is_parquet(path)):  # a blank line is a row to DuckDB if there is one column
        with contextlib.suppress(duckdb.InvalidInputException, duckdb.IOException):
            rows, num_invalid, num_na, commas, lines = counts = _count_cells(con, source, header, schema, facts[2])
            blank_lines = 0 if is_parquet(path) else facts[1] - lines
            if num_invalid or (facts[0] != commas and not is_parquet(path)):  # it drops an empty cell too many
                counts = None
    if counts is None:
        source, blank_lines = _copy_rows(con, path, header, dict(schema.values()))
        rows, _, num_na, _, _ = _count_cells(con, source, header, schema, False)
    if not rows and not may_be_empty:
        raise UserError(f"{path}: no rows below the header: is it the right file?")
    log_repairs(path, blank_lines, "blank lines skipped")
    log_repairs(path, num_na, "NULL, NA, nan or blank cells read as empty")
    values = ", ".join(f"{CELL_VALUES[column_type].format(cell)} AS {quoted(name)}"
                       for cell, (name, column_type) in schema.items())
    return con.sql(f"SELECT {values}, row_number() OVER () - 1 AS row FROM {source}")


def quoted(name: str) -> str:
    """A name as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: Any) -> str:
    """A text or path as a literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _cells_of(path: Path, header: Sequence[str]) -> str:
    """SQL for the cells of a file as text, columns c0, c1, ..., all of which are in the header."""
    file = literal(glob.escape(str(path.absolute())))
    if is_parquet(path):
        cells = ", ".join(f"CAST({quoted(name)} AS VARCHAR) AS c{i}" for i, name in enumerate(header))
        return f"(SELECT {cells} FROM read_parquet({file}, hive_partitioning = false))"
    names = ", ".join(f"c{i}: 'VARCHAR'" for i in range(len(header)))
    compression = "gzip" if path.suffix == ".gz" else "none"
    return (f"read_csv({file}, columns = {{{names}}}, header = true, delim = ',', quote = '\"', escape = '\"', "
            f"auto_detect = false, hive_partitioning = false, compression = '{compression}')")


def _count_cells(con: DuckDBPyConnection, source: str, header: Sequence[str],
                 schema: Mapping[str, tuple[str, ColumnType]], is_quoted: bool) -> list[int]:
    """The numbers of rows, of rows with an invalid cell, of NA cells, and of commas and line ends in the file."""
    optional = [cell for cell, (_, column_type) in schema.items() if column_type in OPTIONAL_NUMBERS]
    invalid = [f"{CELL_VALUES[column_type].format(cell)} IS NULL" + f" AND NOT is_na({cell})" * (cell in optional)
               for cell, (_, column_type) in schema.items() if column_type != "optional_text"]
    na = [f"count(*) FILTER ({cell} <> '' AND is_na({cell}))" for cell in optional]
    text = " || ".join(f"coalesce(c{number}, '')" for number in range(len(header))) if is_quoted else "''"
    line = ",".join(header)
    outside = {",": f"{line.count(',')} + count(*) * {len(header) - 1}", "\n": f"{line.count(chr(10))} + count(*) + 1"}
    ends = [f"{count} + coalesce(sum(length({text}) - length(replace({text}, '{char}', ''))), 0)"
            for char, count in outside.items()]
    return [*con.execute(f"SELECT count(*), count(*) FILTER ({' OR '.join(invalid) or 'false'}), "
                         f"{' + '.join(na) or '0'}, {', '.join(ends)} FROM {source}").fetchall()[0]]


def _count_bytes(path: Path) -> tuple[int, int, bool] | None:
    """The numbers of commas and lines of a CSV file, and whether there are quotes; None if it is not UTF-8, or if it
    has NUL bytes, mixed line ends or blanks around quotes, which DuckDB reads in another way.

    Raises UserError if the file is corrupt.
    """
    commas = lines = returns = 0
    is_quoted, last = False, b"\n"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open_maybe_gzip(path, "rb") as file:
            while block := file.read(1 << 20):
                array = np.frombuffer(block, np.uint8)
                commas += int(np.count_nonzero(array == ord(",")))
                lines += int(np.count_nonzero(array == ord("\n")))
                decoder.decode(block)
                block = last + block  # both sides of the cut
                returns += block.count(b"\r\n")
                is_quoted |= b'"' in block
                if b"\0" in block or (b"\r" in block and re.search(rb"\r(?!\n|\Z)", block)) or (
                        is_quoted and re.search(rb'[ \t]"|"[ \t]', block)):
                    return None
                last = block[-1:]
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    return (commas, lines + (last != b"\n"), is_quoted) if returns in (0, lines) and last != b"\r" else None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: corrupt or cut short: {getattr(error, 'strerror', None) or error}")


def _copy_rows(con: DuckDBPyConnection, path: Path, header: Sequence[str],
               schema: Mapping[str, ColumnType]) -> tuple[str, int]:
    """The name of a temporary table of the cells of a file, and the number of its blank lines; read row by row.

    Raises UserError naming the first invalid cell.
    """
    blank_lines = 0

    def rows() -> Iterator[list[str]]:
        nonlocal blank_lines
        for line, row, is_open in _iter_rows(path):
            blank_lines += not row
            if row:
                column, problem = _row_error(header, schema, row, is_open)
                if problem:
                    raise UserError(f"{_location(path, line, column)}: {problem}")
                yield row

    names = [f"c{number}" for number in range(len(header))]
    table = f"cells_{secrets.token_hex(8)}"
    con.execute(f"CREATE TEMP TABLE {table} ({', '.join(f'{name} VARCHAR' for name in names)})")
    try:
        remaining = rows()
        while chunk := list(itertools.islice(remaining, ROWS_AT_ONCE)):
            con.register("new_rows", pd.DataFrame(chunk, columns=names, dtype=object))
            con.execute(f"INSERT INTO {table} SELECT * FROM new_rows")
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise _unreadable(path, error) from error
    return table, blank_lines


def _row_error(header: Sequence[str], schema: Mapping[str, ColumnType], row: Sequence[str],
               is_open: bool) -> tuple[str, str]:
    """The column of the first error of a row, and what is wrong; "" if nothing is."""
    if len(row) > len(header):
        return header[-1], f"{len(row)} cells, but the header has {len(header)}"
    if len(row) < len(header):
        return header[len(row)], f"only {len(row)} of {len(header)} cells: is the file cut short?"
    for name, cell in zip(header, row, strict=True):
        problem = ("NUL bytes: the file is corrupt" * ("\0" in cell) or NOT_UTF8 * (not _is_utf8(cell))
                   or _cell_error(cell, schema.get(name)))
        if problem:
            return name, problem
    return header[-1], "unterminated quote: is the file cut short?" * is_open


def require_columns(where: str, header: Sequence[str], columns: Iterable[str], optional: Sequence[str] = ()) -> None:
    """Raise UserError, beginning with `where`, if one of `columns` is not in a header, unless it is optional."""
    columns = list(columns)
    missing = [name for name in columns if name not in header and name not in optional]
    if not missing:
        return
    if not set(columns) & set(header) and any(map(_is_number, header)):
        raise UserError(f"{where}: a row, not a header ({truncate(','.join(header))}): write the names of the columns "
                        f"into a line above it: {','.join(columns)}")
    suggestion = difflib.get_close_matches(missing[0], [name for name in header if name not in columns], n=1)
    hint = f"; is '{suggestion[0]}' misspelt?" if suggestion else ""
    raise UserError(f"{where}: column '{missing[0]}' is missing (available: {truncate(', '.join(header), 400)}){hint}")


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(np.isfinite(float(text)))
    return False


def _iter_rows(path: Path) -> Iterator[tuple[int, list[str], bool]]:
    """Of each row below the header: its first line (of Parquet: its number), its cells as text, none if the line is
    blank, and whether the file ends inside a quote of it."""
    if is_parquet(path):
        with _connection().cursor() as con:
            result = con.execute(f"SELECT coalesce(COLUMNS(*), '') FROM {_cells_of(path, read_header(path))}")
            rows = itertools.chain.from_iterable(iter(lambda: result.fetchmany(ROWS_AT_ONCE), []))
            yield from ((number, list(cells), False) for number, cells in enumerate(rows, start=1))
        return
    with _open_maybe_gzip(path, "rt") as file:
        raw, is_end = "", False

        def lines() -> Iterator[str]:
            nonlocal raw, is_end
            for raw in file:  # noqa: UP028 -- the last line is used below
                yield raw
            is_end = True

        reader, end = csv.reader(lines()), 0
        for cells in reader:
            line, end = end + 1, reader.line_num
            if line > 1:
                is_blank = len(cells) == 1 and '"' not in raw and not cells[0].strip(" \t")
                yield line, [] if is_blank else cells, is_end


def _open_maybe_gzip(path: Path, mode: Literal["rb", "rt"]) -> Any:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode) if mode == "rb" else opener(path, mode, encoding="utf-8-sig", errors="surrogateescape",
                                                          newline="")


def read_header(path: Path) -> list[str]:
    """The names of the columns of a CSV file. Raises UserError if it has none, or one twice."""
    require_regular_file(path)
    if is_parquet(path):
        return _parquet_header(path)
    try:
        with _open_maybe_gzip(path, "rt") as file:
            header = next(csv.reader(file), [])
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    if header and header[0].startswith("\x1f\udc8b"):
        raise UserError(f"{path}: not UTF-8 text but gzip: name it {path.name}.gz, or unpack it")
    if not all(map(_is_utf8, header)):
        raise UserError(f"{path}, line 1: {NOT_UTF8}")
    if not any(header):
        raise UserError(f"{path}: the file is empty: expected a CSV header in line 1")
    duplicates = [name for name in header if header.count(name) > 1]
    if duplicates:
        raise UserError(f"{path}, line 1: duplicate column '{_printable(duplicates[0])}': rename or remove one"
                        + "; or is this a row, not a header?" * _is_number(duplicates[0]))
    if any("\0" in name for name in header):
        raise UserError(f"{path}, line 1: NUL bytes: corrupt, or not UTF-8 text: save it as UTF-8 CSV")
    return header


def _parquet_header(path: Path) -> list[str]:
    import duckdb

    try:
        with _connection().cursor() as con:
            return con.read_parquet(glob.escape(str(path.absolute())), hive_partitioning=False).columns
    except duckdb.Error as error:
        raise UserError(f"{path}: cannot read as Parquet: {str(error).splitlines()[0]}") from None


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= char <= "\udcff" for char in text)


def _cell_error(cell: str, column_type: ColumnType | None) -> str:
    """Why a cell is invalid for its column type; "" if it is valid."""
    if column_type in (None, "optional_text") or (column_type in OPTIONAL_NUMBERS and _is_na(cell)):
        return ""
    if column_type == "text":
        return "" if cell else "is empty"
    cell = cell.strip(WHITESPACE)
    if not cell:
        return "is empty: give a number" if column_type != "label" else "is empty: a label is 0 or 1"
    try:
        # Python accepts 1_0 and digits of other scripts.
        value = float(cell) if cell.isascii() and "_" not in cell else float("not a number")
    except ValueError:
        return f"'{_printable(cell)}' is not a number"
    is_id = column_type in ("id", "optional_id")
    problems = {"not a label: 0 or 1": column_type == "label" and value not in (0.0, 1.0),
                "not a finite number": not np.isfinite(value),
                "not a whole number": is_id and value != np.floor(value),
                "too large for an id (2^53 and more)": is_id and abs(value) >= MAX_EXACT_INT,
                "too large for a number (3.4e38 and more)": (
                    column_type == "optional_number" and abs(value) > MAX_FLOAT32)}
    return next((f"'{_printable(cell)}' is {problem}" for problem, is_wrong in problems.items() if is_wrong), "")


def _is_na(cell: str) -> bool:
    return cell.strip(WHITESPACE) in ("", *NA_VALUES)


def _printable(cell: str) -> str:
    return truncate(re.sub(r"[^\x20-\x7e]", "?", cell), 40)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file; its columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a file of `write_csv` as text cells. Raises UserError if one of `columns` is missing."""
    schema: dict[str, ColumnType] = dict.fromkeys([*columns, *read_header(path)], "optional_text")
    return read_table(path, schema, may_be_empty=True).to_dict("records")
