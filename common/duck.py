"""DuckDB, embedded: queries over tables that do not fit into memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.fileio import scratch_folder

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

    with scratch_folder(folder or Path(tempfile.gettempdir()), "rmtl") as scratch:
        options: dict[str, Any] = {
            "memory_limit": f"{memory_limit}B" if str(memory_limit).isdigit() else memory_limit,
            "temp_directory": str(scratch), **({"threads": threads} if threads else {})}
        try:
            with duckdb.connect(":memory:", config=options) as connection:
                yield connection
        except duckdb.ParserException as error:
            raise UserError(f"--memory_limit: '{memory_limit}' is not a number of bytes, such as 2GB") from error
        except duckdb.OutOfMemoryException as error:
            raise UserError(f"--memory_limit: {memory_limit} bytes are not enough, or the disk of {scratch} is full "
                            f"({str(error).splitlines()[0]})") from error
        except duckdb.IOException as error:
            raise UserError(f"{scratch}: {str(error).splitlines()[0]}") from error
