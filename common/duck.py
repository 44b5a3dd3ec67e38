"""DuckDB, embedded: queries over tables that do not fit into memory."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.fileio import scratch_folder

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MEMORY_LIMIT = 2**30  # bytes


@contextlib.contextmanager
def connect(memory_limit: int = MEMORY_LIMIT, threads: int = 0, folder: Path | None = None) -> Iterator[DuckDBPyConnection]:
    """A connection that keeps at most `memory_limit` bytes in memory, and the rest in a temporary folder.

    threads: 0: as many as there are cores. Results keep the order of the rows, whatever the number. folder: where the
    temporary folder is made; None: in the system's. Raises UserError if memory or disk do not suffice.
    """
    import duckdb  # a tenth of a second

    with scratch_folder(folder or Path(tempfile.gettempdir()), "rmtl") as scratch:
        options: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_limit}B", "temp_directory": str(scratch),
            "preserve_insertion_order": "true", **({"threads": str(threads)} if threads else {})}
        try:
            with duckdb.connect(":memory:", config=options) as connection:
                yield connection
        except duckdb.OutOfMemoryException as error:
            raise UserError(f"a memory limit of {memory_limit / 2**20:,.0f} MiB is too small, or the disk of {scratch} is "
                            f"full ({str(error).splitlines()[0]})") from error
        except duckdb.IOException as error:
            raise UserError(f"{scratch}: {str(error).splitlines()[0]}") from error


def parse_bytes(text: str) -> int:
    """The bytes of a text such as 2GB, 500MiB or 1000000. Raises UserError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(|[kmgt]i?)b?", text.strip().lower())
    if not match:
        raise UserError(f"'{text:.40}' is not a number of bytes, such as 2GB or 500MiB")
    prefix = match[2]
    return int(float(match[1]) * (1024 if prefix.endswith("i") else 1000) ** (" kmgt".index(prefix[0]) if prefix else 0))
