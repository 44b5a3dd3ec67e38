"""Everything that touches the disk: one-line errors, atomic writing, checked reading.

What is read is checked here, once: a bad cell is named by file, row and column; what is put right while reading is
counted and shown (`repaired`). What is written goes to a temporary name (`*.partial`) and is moved into place, so that
no reader ever meets half a file; archives of numbers carry their checksum (`seal`). No pickle, anywhere.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import difflib
import functools
import gzip
import hashlib
import itertools
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
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd

if sys.platform != "win32":
    import fcntl

Kind = Literal["id", "optional_id", "label", "number", "text", "optional_text"]
Problem = tuple[int, str, str]  # line, column, what is wrong

csv.field_size_limit(2**31 - 1)  # a cell may be long; the default of 128 KiB would hide the error behind it
BLANKS = " \t\v\f"  # around a number, as pandas leaves them out
MISSING = ("NULL", "null", "NA", "NaN", "nan")  # an optional id that is not there, in words
TRUTH_WORDS = ("True", "TRUE", "true", "False", "FALSE", "false")  # pandas would read a column of them as 1 and 0
MAX_ID = 2**53  # the largest integer up to which a float64, hence "1.44E+12", is exact


class UserError(Exception):
    """A mistake of the user's, told in one line: where it is and what to do. Ends the program with exit code 2.

    What is quoted from a damaged file may hold anything: characters that do not print become question marks.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(char if char.isprintable() else "?" for char in text))


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
            if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # so until here; one that is ignored stays ignored
                signal.signal(signal.SIGINT, signal.default_int_handler)
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


def seal(path: Path) -> None:
    """Write the SHA-256 of a zip archive (`.pt`, `.npz`) into its comment, where it disturbs no reader of zip."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
        file.write(SEAL_LENGTH.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(SEAL + digest.encode())


SEAL = b"sha256:"
SEAL_LENGTH = len(SEAL) + 64


# ---------------------------------------------------------------------------------------------------------- reading


def repaired(path: Path, count: int, what: str) -> None:
    """Say what was put right in a file while it was read: nothing is repaired in silence."""
    if count:
        print(f"{path}: repaired: {count:,} {what}")


def is_file_name(name: str) -> bool:
    """Whether a text is the name of a file, and of one in the folder that it is looked for in."""
    return (name not in ("", ".", "..") and name.isprintable() and Path(name).name == name
            and len(os.fsencode(name)) <= 200)


def check_file(path: Path) -> None:
    """Raise UserError where there is no file, or something else in its place: a folder, a pipe that never ends."""
    if not os.path.exists(path):  # unlike Path.exists it takes any name
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")


@contextmanager
def open_sealed(path: Path, remedy: str) -> Iterator[BinaryIO]:
    """Open an archive that `seal` closed. Raises UserError, which ends in `remedy`, where a single byte has changed.

    An archive whose parts are compressed is refused as well: ours never are, and a small one could fill the memory.
    """
    try:
        check_file(path)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - SEAL_LENGTH))
        found, start = file.read(), max(0, size - SEAL_LENGTH)
        if not found.startswith(SEAL):
            file.seek(0)
            older = file.read(4) == b"PK\3\4"
            raise UserError(f"{path}: " + ("without a checksum: damaged, or of an earlier version" if older else
                                          "not a file that this program wrote") + f": {remedy}")
        digest, left = hashlib.sha256(), start
        file.seek(0)
        while left:
            block = file.read(min(left, 1 << 20))
            digest.update(block)
            left -= len(block)
        if found != SEAL + digest.hexdigest().encode():
            raise UserError(f"{path}: damaged: its SHA-256 is not the one that was written into it: {remedy}")
        try:
            parts = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: not a file that this program wrote ({error}): {remedy}") from error
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise UserError(f"{path}: not a file that this program wrote (its parts are compressed): {remedy}")
        file.seek(0)
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError, naming line and column, where it is none; or a key stands there twice."""
    try:
        check_file(path)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not a {type(value).__name__}")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{_short(next(name for name in names if names.count(name) > 1))}' stands there twice")
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


def one_spelling(value: str) -> str:
    """A category without blanks around it, and 12 for the 12.0 that spreadsheets make of it."""
    value = value.strip()
    return value[:-2] if value.endswith(".0") and value[:-2].lstrip("-").isdigit() else value


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

    Repairs, counted and shown: blank lines are left out; `optional_id` takes NULL, NA, nan and blanks for empty.
    Raises UserError naming file, line and column for whatever does not fit.
    """
    header = _read_header(path)
    missing = [name for name in columns if name not in header and name not in optional]
    if missing:
        near = difflib.get_close_matches(missing[0], [name for name in header if name not in columns], n=1)
        hint = f"; is '{near[0]}' misspelt?" if near else ""
        there = ", ".join(header)
        raise UserError(f"{path}, line 1: column '{missing[0]}' is missing (there are: "
                        f"{there if len(there) <= 400 else there[:397] + '...'}){hint}")
    kinds = {name: kind for name, kind in columns.items() if name in header}
    numbers = [name for name, kind in kinds.items() if kind in ("id", "label", "number")]
    texts = [name for name in kinds if name not in numbers]
    options: dict[str, Any] = {
        # Every column is parsed, also those nobody asked for: a row with too many cells must not shift unnoticed.
        "dtype": {name: "float64" if name in numbers else object if name in texts else "category" for name in header},
        "na_values": {name: ["", *MISSING, *TRUTH_WORDS] for name in numbers},
        "keep_default_na": False,
        "index_col": False,
        "encoding": "utf-8-sig",
    }
    rows = words = 0
    try:
        if _first_width(path) > len(header):  # the empty ones of these would be cut off in silence
            raise _explained(path, header, kinds)
        with pd.read_csv(path, chunksize=chunk_rows or sys.maxsize, **options) as reader:
            while (chunk := _next_chunk(reader)) is not None:
                rows += len(chunk)
                checked = _checked(chunk, kinds)
                if checked is None:
                    raise _explained(path, header, kinds)
                words += sum(int((checked[name].isna() & (chunk[name] != "")).sum())
                             for name, kind in kinds.items() if kind == "optional_id")
                yield checked
        blank_lines = _blank_lines(path, rows, len(header))
        if blank_lines is None:
            raise _explained(path, header, kinds)
    except UserError:
        raise
    except (ValueError, OverflowError, OSError, EOFError, zlib.error, csv.Error, pd.errors.ParserWarning) as error:
        raise _explained(path, header, kinds, error) from error
    repaired(path, blank_lines, "blank lines left out")
    repaired(path, words, "cells taken for empty that say NULL, NA or nan, or are blank")


def _next_chunk(reader: Any) -> pd.DataFrame | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # the first row is longer than the header
        return next(reader, None)


def _blank_lines(path: Path, rows: int, cells: int) -> int | None:
    """Look at the bytes once more: how many lines are blank; None where a row ends early, which pandas fills up in
    silence, or a byte is NUL. Longer rows were refused, so commas tell."""
    commas = lines = 0
    quoted, last = False, b"\n"
    with _open(path, "rb") as file:
        while block := file.read(1 << 24):
            if b"\0" in block:
                return None
            quoted = quoted or b'"' in block
            commas += block.count(b",")
            lines += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            lines -= last == b"\r" and block[:1] == b"\n"
            last = block[-1:]
    if not quoted:
        return lines + (last not in b"\r\n") - (rows + 1) if commas == (rows + 1) * (cells - 1) else None
    blank = 0
    with _open(path, "rt") as file:  # commas inside quotes: count cells instead
        for _, row in _rows(file):
            if not row:
                blank += 1
            elif len(row) != cells:
                return None
    return blank


def _rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The line on which each row begins, and its cells; none where the line is blank, which pandas leaves out."""
    raw = ""

    def lines() -> Iterator[str]:
        nonlocal raw
        for raw in file:  # noqa: UP028 -- what the row was made of is looked at below
            yield raw

    reader, end = csv.reader(lines()), 0
    for row in reader:
        line, end = end + 1, reader.line_num
        yield line, row if len(row) != 1 or '"' in raw or row[0].strip(" \t") else []


def _open(path: Path, mode: Literal["rb", "rt"]) -> Any:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode) if mode == "rb" else opener(path, mode, encoding="utf-8-sig", newline="")


def _read_header(path: Path) -> list[str]:
    check_file(path)
    try:
        with _open(path, "rt") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError:
        raise _not_text(path) from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not any(header):
        raise UserError(f"{path}: the file is empty: a CSV header is expected in line 1")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}, line 1: column '{_short(twice[0])}' stands there {header.count(twice[0])} times")
    if any("\0" in name for name in header):
        raise UserError(f"{path}, line 1: NUL bytes: damaged, or not UTF-8 text: save it as UTF-8 CSV")
    return header


def _first_width(path: Path) -> int:
    """The number of cells of the first row, which pandas takes for the width of all."""
    with _open(path, "rt") as file:
        return next((len(row) for _, row in itertools.islice(_rows(file), 1, None) if row), 0)


def _not_text(path: Path) -> UserError:
    """Say where the first byte is that is not UTF-8."""
    header: list[str] = []
    with _open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return UserError(f"{path}: not UTF-8 text but gzip: name it {path.name}.gz, or unpack it")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                header = header or next(csv.reader([line.decode("utf-8-sig")]), [])
                line.decode()
            except UnicodeDecodeError as bad:
                before = next(csv.reader([line[: bad.start].decode()]), [""])
                column = f", column '{header[len(before) - 1]:.40}'" if 0 < len(before) <= len(header) else ""
                return UserError(f"{path}, line {number}{column}: not UTF-8 text ({bad.reason}): save it as UTF-8 CSV")
    return UserError(f"{path}: not UTF-8 text: save it as UTF-8 CSV")


def _checked(chunk: pd.DataFrame, kinds: Mapping[str, Kind]) -> pd.DataFrame | None:
    """Give each column its final type; None where a cell does not fit its kind."""
    done: dict[str, Any] = {}
    for name, kind in kinds.items():
        if kind == "optional_id":
            codes, cells = pd.factorize(chunk[name].to_numpy())
            if any(_problem(cell, kind) for cell in cells):
                return None
            done[name] = np.array([np.nan if _is_missing(cell) else float(cell) for cell in cells])[codes]
            continue
        values = chunk[name].to_numpy()
        if kind in ("text", "optional_text"):
            if kind == "text" and (values == "").any():
                return None
            done[name] = values
            continue
        if not np.isfinite(values).all():
            return None
        if kind == "id":
            if (values != np.floor(values)).any() or (np.abs(values) >= MAX_ID).any():
                return None
            done[name] = values.astype(np.int64)
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
        line, column, what = _first_problem(path, header, kinds)
    except UnicodeDecodeError:
        return _not_text(path)
    except (OSError, EOFError, zlib.error, csv.Error) as bad:
        return UserError(f"{path}: damaged or cut short: {getattr(bad, 'strerror', None) or bad}")
    if what:
        return UserError(f"{path}, line {line}, column '{_short(column)}': {what}")
    if "EOF inside string" in str(error):
        return UserError(f"{path}, line {line}, column '{_short(column)}': cannot be read as CSV: a quote that is "
                         "opened there never ends")
    return UserError(f"{path}, line {line}: cannot be read as CSV: {error}")


def _first_problem(path: Path, header: list[str], kinds: Mapping[str, Kind]) -> Problem:
    """The line on which the first bad row begins, the column, and what is wrong; "" where nothing is, of the last."""
    line, row = 1, header
    with _open(path, "rt") as file:
        rows = _rows(file)
        next(rows)
        for line, row in rows:
            if not row:
                continue
            if len(row) > len(header):
                return line, header[-1], f"{len(row)} cells, but the header has {len(header)}"
            if len(row) < len(header):
                what = f"the row ends after {len(row)} of {len(header)} cells: is the file cut short?"
                return line, header[len(row)], what
            for name, cell in zip(header, row, strict=True):
                what = "holds NUL bytes: the file is damaged" if "\0" in cell else _problem(cell, kinds.get(name))
                if what:
                    return line, name, what
    return line, header[max(0, len(row) - 1)], ""


def _problem(cell: str, kind: Kind | None) -> str:
    """Say what keeps one cell from being of its kind; "" where nothing does."""
    if kind in (None, "optional_text") or (kind == "optional_id" and _is_missing(cell)):
        return ""
    if kind == "text":
        return "" if cell else "is empty"
    cell = cell.strip(BLANKS)
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


def _is_missing(cell: str) -> bool:
    return cell.strip(BLANKS) in ("", *MISSING)


def _short(cell: str) -> str:
    printable = re.sub(r"[^\x20-\x7e]", "?", cell)
    return printable if len(printable) <= 40 else printable[:37] + "..."
