"""What runs the SQL steps of an importer: one table a step, read by the later ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.csv_reader import ColumnType, scan
from common.errors import UserError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

MINUTE_MS = 60_000


class Engine:
    """DuckDB: tables that do not fit into the memory limit of the connection `con` lie in its temporary folder."""

    def __init__(self, con: DuckDBPyConnection) -> None:
        self.con = con

    def read(self, name: str, paths: Sequence[Path], schema: Mapping[str, ColumnType],
             may_be_empty: bool = False) -> int:
        """Make `name` the checked rows of files (`scan`), with `file`, from 0, and `row`; return their number.

        Raises UserError naming file, line and column of an invalid cell, and if there are no rows.
        """
        parts = [scan(self.con, path, schema, may_be_empty=True).project(f"*, {number} AS file")
                 for number, path in enumerate(paths)]
        self.view(name, functools.reduce(lambda rows, part: rows.union(part), parts))
        (rows,) = self.query(f"SELECT count(*) FROM {name}")
        if not rows and not may_be_empty:
            raise UserError(f"{paths[0]}: no rows below the header: is it the right file?")
        return int(rows)

    def view(self, name: str, relation: DuckDBPyRelation) -> None:
        """Call a relation of `con` by a name in later steps."""
        relation.create_view(name)

    def step(self, name: str, query: str, drop: Sequence[str] = ()) -> None:
        """Make the table `name` from a query; afterwards the tables `drop` are not needed any more."""
        self.con.execute(f"CREATE TEMP TABLE {name} AS {query}")
        for table in drop:
            self.con.execute(f"DROP TABLE {table}")

    def query(self, query: str) -> tuple[Any, ...]:
        """The first row of the result; None in every column if there is none."""
        result = self.con.execute(query)
        return [*result.fetchall(), (None,) * len(result.description)][0]

    def result(self, name: str) -> DuckDBPyRelation:
        """A table of a step, in its order."""
        return self.con.table(name)

    def count_sessions(self, name: str) -> tuple[int, int, list[int]]:
        """The numbers of sessions and of their rows, `num_rows`, and the splits that they are in."""
        found = [f"max(CASE WHEN split = {split} THEN 1 END)" for split in range(3)]
        sessions, rows, *is_found = self.query(
            f"SELECT count(*), coalesce(sum(num_rows), 0), {', '.join(found)} FROM {name}")
        return sessions, int(rows), [split for split, one in enumerate(is_found) if one]

    def cut_sessions(self, name: str, source: str, keys: str, time: str, gap_minutes: float) -> None:
        """Make `name` the rows of `source` with `sessionid`, numbered from 0 by `keys` and time (`number_sessions`).

        A session is the rows of equal `keys`; with `gap_minutes` it also ends after so many minutes without a row.
        """
        part, parts = "0", source
        if gap_minutes:
            part, parts = "part", f"{name}_parts"
            self.step(f"{name}_gaps", f"""
                SELECT *, CASE WHEN {time} - lag({time}) OVER (PARTITION BY {keys} ORDER BY {time})
                               > CAST('{gap_minutes * MINUTE_MS!r}' AS DOUBLE) THEN 1 ELSE 0 END AS is_after_gap
                FROM {source}""", drop=[source])
            self.step(parts, f"SELECT *, sum(is_after_gap) OVER (PARTITION BY {keys} ORDER BY {time}) AS part "
                             f"FROM {name}_gaps", drop=[f"{name}_gaps"])
        self.step(f"{name}_numbers", f"""
            SELECT {keys}, part, row_number() OVER (ORDER BY {keys}, part) - 1 AS sessionid
            FROM (SELECT DISTINCT {keys}, {part} AS part FROM {parts}) AS distinct_parts""")
        self.step(name, f"SELECT * FROM {parts} JOIN {name}_numbers USING ({keys}{', part' * bool(gap_minutes)})",
                  drop=[parts, f"{name}_numbers"])
