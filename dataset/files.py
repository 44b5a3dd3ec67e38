"""Everything that touches the disk: one-line errors, atomic writing, checked reading.

What is read is checked here, once: a bad cell is named by file, row and column. What is written goes to a temporary
name (`*.partial`) and is moved into place, so that no reader ever meets half a file. No pickle, anywhere.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import difflib
import functools
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

if sys.platform != "win32":
    import fcntl

Kind = Literal["id", "optional_id", "label", "number", "text", "optional_text"]
Problem = tuple[int, str, str]  # line, column, what is wrong

csv.field_size_limit(2**31 - 1)  # a cell may be long; the default of 128 KiB would hide the error behind it
MAX_ID = 2**53  # the largest integer up to which a float64, hence "1.44E+12", is exact


class UserError(Exception):
    """A mistake of the user's, told in one line: where it is and what to do. Ends the program with exit code 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever ends well on Ctrl-C ends well on this."""


def exit_on_user_error(main: Callable[[], None], resumes: bool = False) -> Callable[[], None]:
    """Wrap a program's entry: it ends in one line and a code that says how.

    2: `UserError`, or the system refuses (memory, a full disk under the output). 130 and 143: Ctrl-C and SIGTERM, with
    the command that goes on: the same, with `--resume` where the program `resumes` and has begun its books.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            main()
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            more = " --resume" if resumes and books_begun and "--resume" not in sys.argv else ""
            if (stop := _interruption(error)) is not None:
                _end(f"stopped: nothing is left half-written; to go on: {own_command()}{more}",
                     143 if isinstance(stop, Terminated) else 130)
            if isinstance(error, UserError):
                _end(f"error: {error}", 2)
            if isinstance(error, MemoryError):
                _end(f"error: out of memory ({error or 'no more is given'}): take fewer rows, a smaller batch or model",
                     2)
            if isinstance(error, OSError):
                _end(f"error: {error.filename or 'the output'}: {error.strerror or error}", 2)
            raise

    return wrapped


books_begun = False  # whether there is something to resume: set by `train.checkpoint.RunFolder.open`


def own_command() -> str:
    """The command that started this program, as it is typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python3", *program, *sys.argv[1:]])


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM that an error is, or came of: libraries that are stopped while they write say so with
    errors of their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated


def _end(line: str, code: int) -> None:
    """Say one line, below a progress bar if there is one, and exit."""
    with contextlib.suppress(OSError):
        if company.leads:
            print(("\n" if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more, or its disk is full: the interpreter shall not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------- writing


class Company:
    """The processes that run the same program on the same data side by side: one writes, the others wait for it.

    A program is alone unless `train.world` finds others.
    """

    leads = True

    def wait(self) -> None:
        """Until all have come here."""


company = Company()


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal (full disk, no permission, a folder in the way) into one line."""
    try:
        yield
    except OSError as error:
        blamed = str(error.filename or path)
        if blamed.endswith(f".{os.getpid()}.partial"):  # the user knows it by its final name
            blamed = str(path)
        raise UserError(f"{blamed}: cannot be written: {error.strerror or error}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is synced and replaces `path`, on failure nothing is left."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with _as_user_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            company.wait()  # nobody looks for the file any more, and nobody goes on before it is there
            if company.leads:
                os.replace(partial, path)
            company.wait()
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`, which must not exist yet, on failure it goes."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with _as_user_error(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            company.wait()
            if company.leads:
                os.rename(partial, path)
            company.wait()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_writable(*folders: Path, files: Sequence[Path] = ()) -> None:
    """Make the folders and try to write in each, and see that the places of `files` are free: better refused now than
    after an hour. What processes now dead had begun to write there is removed. Raises UserError."""
    for folder in folders:
        with atomic_file(folder / ".writable") as partial:
            partial.touch()
        (folder / ".writable").unlink(missing_ok=True)
        _sweep(folder)
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: cannot be written: a folder is in the way of the file: move it away")


def _sweep(folder: Path) -> None:
    """Remove the `<name>.<process id>.partial` of processes that are dead."""
    for path in folder.glob("*.partial"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and not _is_alive(int(owner)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no process id at all
        pass
    return True


@contextmanager
def only_run(*places: Path) -> Iterator[None]:
    """Be the only run that writes to these folders and files. Raises UserError naming the run that is there already.

    The lock of a place is `.<name>.lock` beside it. The kernel holds it (flock) as long as the process lives, so one
    left behind by a dead process stops nobody, however it died and whoever has its id now. Of several processes that
    run together (`company`) the leader locks.
    """
    with contextlib.ExitStack() as held:
        for place in places if company.leads else ():
            lock = place.parent / f".{place.name}.lock"
            with _as_user_error(lock):
                lock.parent.mkdir(parents=True, exist_ok=True)
                file = _locked(lock, place)
            held.callback(os.close, file)
            held.callback(lock.unlink, missing_ok=True)  # first: once it is closed another may have it
        yield


def _locked(lock: Path, place: Path) -> int:
    """Open and lock the file `lock`, and write into it who holds it; return its descriptor."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if sys.platform != "win32":  # there two runs are not told apart
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), lock.stat()):
                break
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{place}: {_holder(lock)} is writing there: wait until it has ended, or stop it") from None
        except FileNotFoundError:  # removed by the one that had it, between two looks at it: the next one is new
            pass
        os.close(file)
    try:
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "started": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
                                   "command": own_command()}).encode())
    except OSError:
        lock.unlink(missing_ok=True)
        os.close(file)
        raise
    return file


def _holder(lock: Path) -> str:
    """Who holds a lock; it writes that right after taking it."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(lock.read_text(encoding="utf-8"))
            return f"process {saved['pid']}, started {saved['started']} ({saved['command']}),"
        time.sleep(0.05)
    return "another process"


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError, naming line and column, where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not a {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_memory(needed: float, what: str, free: float | None = None) -> None:
    """Raise UserError where so many bytes are not free (None: of the system's memory): better refused now than killed
    halfway."""
    free = _free_memory() if free is None else free
    if needed > free:
        raise UserError(f"{what}: about {needed / 2**30:.1f} GiB of memory are needed, {free / 2**30:.1f} GiB are "
                        "free: take fewer rows, something smaller, or a machine with more memory")


def _free_memory() -> float:
    """Bytes that the system, or the control group this process lives in, can still give; infinity where unknown."""
    free = float("inf")
    with contextlib.suppress(OSError, ValueError, IndexError):
        (line,) = re.findall(r"MemAvailable:\s+(\d+) kB", (PROC / "meminfo").read_text())
        free = int(line) * 1024.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        (cached,) = re.findall(r"^file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, float(limit - used + int(cached)))
    return free


PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def count_lines(path: Path) -> int:
    """How many lines a file has, without reading it whole."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def read_table(path: Path, columns: Mapping[str, Kind], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file (plain or .gz) whole; see `read_chunks`. Raises UserError where it has no rows."""
    table = pd.concat(list(read_chunks(path, columns, optional, chunk_rows=None)), ignore_index=True)
    if table.empty:
        raise UserError(f"{path}: no rows below the header: is it the right file?")
    return table


def read_chunks(
    path: Path, columns: Mapping[str, Kind], optional: Sequence[str] = (), chunk_rows: int | None = 2_000_000
) -> Iterator[pd.DataFrame]:
    """Yield the named columns of a CSV file in tables of `chunk_rows` rows, every cell checked.

    Kinds: `id` a whole number below 2^53 (`12`, `12.0`, `1.44E+12`), int64; `optional_id` the same or empty, float64;
    `label` 0 or 1, float32; `number` finite, float64; `text` not empty; `optional_text` empty becomes "".
    Columns in `optional` may be absent from the file. Other columns of the file are not read.

    Raises UserError naming file, line and column for whatever does not fit.
    """
    header = _read_header(path)
    missing = [name for name in columns if name not in header and name not in optional]
    if missing:
        near = difflib.get_close_matches(missing[0], header, n=1)
        hint = f"; is '{near[0]}' misspelt?" if near else ""
        raise UserError(f"{path}, line 1: column '{missing[0]}' is missing (there are: {', '.join(header)}){hint}")
    kinds = {name: kind for name, kind in columns.items() if name in header}
    numbers = [name for name, kind in kinds.items() if kind in ("id", "optional_id", "label", "number")]
    options: dict[str, Any] = {
        # Every column is parsed, also those nobody asked for: a row with too many cells must not shift unnoticed.
        "dtype": {name: "float64" if name in numbers else object if name in kinds else "category" for name in header},
        "na_values": {name: ["", "nan", "NaN", "NULL", "null", "NA"] for name in numbers},
        "keep_default_na": False,
        "index_col": False,
        "encoding": "utf-8-sig",
    }
    rows = 0
    try:
        with pd.read_csv(path, chunksize=chunk_rows or sys.maxsize, **options) as reader:
            while (chunk := _next_chunk(reader)) is not None:
                rows += len(chunk)
                checked = _checked(chunk, kinds)
                if checked is None:
                    raise _explained(path, header, kinds)
                yield checked
        if _has_short_row(path, rows, len(header)):
            raise _explained(path, header, kinds)
    except UserError:
        raise
    except (ValueError, OverflowError, OSError, EOFError, zlib.error, csv.Error, pd.errors.ParserWarning) as error:
        raise _explained(path, header, kinds, error) from error


def _next_chunk(reader: Any) -> pd.DataFrame | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # the first row is longer than the header
        return next(reader, None)


def _has_short_row(path: Path, rows: int, cells: int) -> bool:
    """Say whether a row ends early, which pandas fills up in silence. Longer rows were refused, so commas tell."""
    commas = 0
    with _open(path, "rb") as file:
        while block := file.read(1 << 24):
            if b'"' in block:
                break
            commas += block.count(b",")
        else:
            return commas != (rows + 1) * (cells - 1)
    with _open(path, "rt") as file:  # commas inside quotes: count cells instead
        return any(row and len(row) != cells for row in csv.reader(file))


def _open(path: Path, mode: Literal["rb", "rt"]) -> Any:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode) if mode == "rb" else opener(path, mode, encoding="utf-8-sig", newline="")


def _read_header(path: Path) -> list[str]:
    try:
        with _open(path, "rt") as file:
            header = next(csv.reader(file), [])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8 CSV") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not any(header):
        raise UserError(f"{path}: the file is empty: a CSV header is expected in line 1")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}, line 1: column '{twice[0]}' stands there {header.count(twice[0])} times")
    return header


def _checked(chunk: pd.DataFrame, kinds: Mapping[str, Kind]) -> pd.DataFrame | None:
    """Give each column its final type; None where a cell does not fit its kind."""
    done: dict[str, Any] = {}
    for name, kind in kinds.items():
        values = chunk[name].to_numpy()
        if kind in ("text", "optional_text"):
            if kind == "text" and (values == "").any():
                return None
            done[name] = values
            continue
        finite = np.isfinite(values)
        if kind == "optional_id":
            finite |= np.isnan(values)
        if not finite.all():
            return None
        if kind in ("id", "optional_id"):
            known = values[~np.isnan(values)]
            if (known != np.floor(known)).any() or (np.abs(known) >= MAX_ID).any():
                return None
            done[name] = values.astype(np.int64) if kind == "id" else values
        elif kind == "label":
            if not np.isin(values, (0.0, 1.0)).all():
                return None
            done[name] = values.astype(np.float32)
        else:
            done[name] = values
    return pd.DataFrame(done, index=chunk.index)


def _explained(path: Path, header: list[str], kinds: Mapping[str, Kind], error: Exception | None = None) -> UserError:
    """Read the file again, slowly, to say which line and column is wrong."""
    try:
        problem = _first_problem(path, header, kinds)
    except UnicodeDecodeError as bad:
        return UserError(f"{path}: not UTF-8 text ({bad.reason}): save it as UTF-8 CSV")
    except (OSError, EOFError, zlib.error, csv.Error) as bad:
        return UserError(f"{path}: damaged or cut short: {getattr(bad, 'strerror', None) or bad}")
    if problem is None:
        return UserError(f"{path}: cannot be read as CSV: {' '.join(str(error).split())}")
    line, column, what = problem
    return UserError(f"{path}, line {line}, column '{column}': {what}")


def _first_problem(path: Path, header: list[str], kinds: Mapping[str, Kind]) -> Problem | None:
    with _open(path, "rt") as file:
        reader = csv.reader(file)
        next(reader)
        for row in reader:
            if not row:
                continue
            if len(row) > len(header):
                return reader.line_num, header[-1], f"{len(row)} cells, but the header has {len(header)}"
            if len(row) < len(header):
                what = f"the row ends after {len(row)} of {len(header)} cells: is the file cut short?"
                return reader.line_num, header[len(row)], what
            for name, kind in kinds.items():
                what = _problem(row[header.index(name)].strip(" \t"), kind)
                if what:
                    return reader.line_num, name, what
    return None


def _problem(cell: str, kind: Kind) -> str:
    """Say what keeps one cell from being of its kind; "" where nothing does."""
    if kind == "optional_text" or (kind == "optional_id" and not cell):
        return ""
    if kind == "text":
        return "" if cell else "is empty"
    if not cell:
        return "is empty: give a number" if kind != "label" else "is empty: a label is 0 or 1"
    try:
        # Python would also read 1_0 and digits of other scripts, which pandas does not.
        value = float(cell) if cell.isascii() and "_" not in cell else float("not a number")
    except ValueError:
        return f"'{_short(cell)}' is not a number"
    if kind == "label":
        return "" if value in (0.0, 1.0) else f"'{_short(cell)}' is not a label: 0 or 1"
    if not np.isfinite(value):
        return f"'{_short(cell)}' is not a finite number"
    if kind in ("id", "optional_id"):
        if value != np.floor(value):
            return f"'{_short(cell)}' is not a whole number"
        if abs(value) >= MAX_ID:
            return f"'{_short(cell)}' is too large for an id (2^53 and more)"
    return ""


def _short(cell: str) -> str:
    printable = re.sub(r"[^\x20-\x7e]", "?", cell)
    return printable if len(printable) <= 40 else printable[:37] + "..."
