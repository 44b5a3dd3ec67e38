"""DuckDB, embedded: queries over tables that do not fit into memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import duckdb

MEMORY_LIMIT = 2**30  # bytes


@contextlib.contextmanager
def connect(memory_limit: int = MEMORY_LIMIT, threads: int = 0) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that keeps at most `memory_limit` bytes in memory, and the rest in a temporary folder.

    threads: 0: as many as there are cores. Results keep the order of the rows, whatever the number.
    """
    with tempfile.TemporaryDirectory(prefix="rmtl-") as folder:
        options: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_limit}B", "temp_directory": folder,
            "preserve_insertion_order": "true", **({"threads": str(threads)} if threads else {})}
        with duckdb.connect(":memory:", config=options) as connection:
            yield connection
