"""DuckDB, embedded: queries over tables that do not fit into memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.fileio import remove_stale_temp_files

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MEMORY_LIMIT = 2**30  # bytes


@contextlib.contextmanager
def connect(memory_limit: int | str = MEMORY_LIMIT, threads: int = 0,
            folder: Path | None = None) -> Iterator[DuckDBPyConnection]:
    """A connection that keeps at most `memory_limit` in memory (bytes, or a text such as 2GB), and the rest in a
    temporary folder.

    threads: 0: as many as there are cores. Results keep the order of the rows, whatever the number. folder: where the
    temporary folder is made; None: in the system's. Raises UserError if memory or disk do not suffice.
    """
    import duckdb  # a tenth of a second

    with temporary_folder(folder or Path(tempfile.gettempdir())) as scratch:
        options: dict[str, Any] = {
            "memory_limit": f"{memory_limit}B" if str(memory_limit).isdigit() else memory_limit,
            "temp_directory": scratch, **({"threads": threads} if threads else {})}
        try:
            connection = duckdb.connect(":memory:", config=options)
        except duckdb.Error as error:
            raise UserError(f"--memory_limit: '{memory_limit}' is not a number of bytes, such as 2GB") from error
        try:
            with connection:
                yield connection
        except duckdb.OutOfMemoryException as error:
            raise UserError(f"--memory_limit: {memory_limit} bytes are not enough, or the disk of {scratch} is full "
                            f"({str(error).splitlines()[0]})") from error
        except duckdb.IOException as error:
            raise UserError(f"{scratch}: {str(error).splitlines()[0]}") from error


def temporary_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder in `parent` that is removed on exit; those of killed processes are removed first."""
    remove_stale_temp_files(parent, "rmtl-")
    return tempfile.TemporaryDirectory(f".{os.getpid()}.partial", "rmtl-", parent, ignore_cleanup_errors=True)
