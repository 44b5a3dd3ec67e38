"""Files: atomic writing, locks, checksums, JSON.

What is written goes to a temporary name (`*.partial`) and is moved into place, so that no reader ever sees half a file.
Archives of tensors and arrays carry a SHA-256 checksum. No pickle, anywhere.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from common import distributed
from common.errors import UserError, command_line, truncate


@contextmanager
def _wrap_os_error(path: Path) -> Iterator[None]:
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
    with _wrap_os_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            distributed.barrier()  # nobody looks for the file any more, and nobody goes on before it is there
            if distributed.is_main_process():
                os.replace(partial, path)
            distributed.barrier()
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`, which must not exist yet, on failure it goes."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with _wrap_os_error(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            distributed.barrier()
            if distributed.is_main_process():
                os.rename(partial, path)
            distributed.barrier()
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_writable(*folders: Path, files: Sequence[Path] = ()) -> None:
    """Make the folders and try to write in each, and see that the places of `files` are free: better refused now than
    after an hour. What processes now dead had begun to write there is removed. Raises UserError."""
    for folder in folders:
        with atomic_file(folder / ".writable") as partial:
            partial.touch()
        (folder / ".writable").unlink(missing_ok=True)
        _remove_stale_temp_files(folder)
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: cannot be written: a folder is in the way of the file: move it away")


def _remove_stale_temp_files(folder: Path) -> None:
    """Remove the `<name>.<process id>.partial` of processes that are dead."""
    for path in folder.glob("*.partial"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and not _pid_exists(int(owner)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _pid_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no process id at all
        pass
    return True


@contextmanager
def exclusive_lock(*paths: Path) -> Iterator[None]:
    """Be the only run that writes to these directories and files. Raises UserError naming the run that already does.

    The lock of a path is `.<name>.lock` beside it, with the process that holds it. The kernel holds the lock as long as
    the process lives: the file of a dead process locks nobody out. Of several processes that run together the main
    process locks.
    """
    with contextlib.ExitStack() as stack:
        for path in paths if distributed.is_main_process() else ():
            lock = FileLock(path.parent / f".{path.name}.lock", blocking=False)
            with _wrap_os_error(Path(lock.lock_file)):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                except Timeout:
                    raise UserError(f"{path}: locked by {_lock_owner(Path(lock.lock_file))}: wait until it has ended, "
                                    "or stop it") from None
                stack.callback(lock.release)
                stack.callback(Path(lock.lock_file).unlink, missing_ok=True)  # first: then another may lock it
                owner = {"pid": os.getpid(), "started": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
                         "command": command_line()}
                Path(lock.lock_file).write_text(json.dumps(owner), encoding="utf-8")
        yield


def _lock_owner(lock: Path) -> str:
    """The process that holds a lock; it writes that right after locking."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(lock.read_text(encoding="utf-8"))
            return f"process {saved['pid']} (started {saved['started']}: {saved['command']})"
        time.sleep(0.05)
    return "another process"


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_checksum(path: Path) -> None:
    """Write the SHA-256 of a zip archive (`.pt`, `.npz`) into its comment, where it disturbs no reader of zip."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
        file.write(CHECKSUM_LENGTH.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(CHECKSUM_PREFIX + digest.encode())


CHECKSUM_PREFIX = b"sha256:"
CHECKSUM_LENGTH = len(CHECKSUM_PREFIX) + 64


def is_safe_filename(name: str) -> bool:
    """Whether a text is the name of a file, and of one in the folder that it is looked for in."""
    return (name not in ("", ".", "..") and name.isprintable() and Path(name).name == name
            and len(os.fsencode(name)) <= 200)


def require_regular_file(path: Path) -> None:
    """Raise UserError where there is no file, or something else in its place: a folder, a pipe that never ends."""
    if not os.path.exists(path):  # unlike Path.exists it takes any name
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")


@contextmanager
def open_verified(path: Path, hint: str) -> Iterator[BinaryIO]:
    """Open an archive that `append_checksum` closed. Raises UserError, which ends in `hint`, where a single byte has changed.

    An archive whose parts are compressed is refused as well: ours never are, and a small one could fill the memory.
    """
    try:
        require_regular_file(path)
    except UserError as error:
        raise UserError(f"{error}: {hint}") from None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - CHECKSUM_LENGTH))
        found, start = file.read(), max(0, size - CHECKSUM_LENGTH)
        if not found.startswith(CHECKSUM_PREFIX):
            file.seek(0)
            older = file.read(4) == b"PK\3\4"
            raise UserError(f"{path}: " + ("without a checksum: damaged, or of an earlier version" if older else
                                          "not a file that this program wrote") + f": {hint}")
        digest, left = hashlib.sha256(), start
        file.seek(0)
        while left:
            block = file.read(min(left, 1 << 20))
            digest.update(block)
            left -= len(block)
        if found != CHECKSUM_PREFIX + digest.hexdigest().encode():
            raise UserError(f"{path}: damaged: its SHA-256 is not the one that was written into it: {hint}")
        try:
            parts = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: not a file that this program wrote ({error}): {hint}") from error
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise UserError(f"{path}: not a file that this program wrote (its parts are compressed): {hint}")
        file.seek(0)
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError, naming line and column, where it is none; or a key stands there twice."""
    try:
        require_regular_file(path)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_reject_duplicate_keys)
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


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{truncate(next(name for name in names if names.count(name) > 1))}' stands there twice")
    return value


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_memory(needed: float, what: str, free: float | None = None) -> None:
    """Raise UserError where so many bytes are not free (None: of the system's memory): better refused now than killed
    halfway."""
    free = _available_memory() if free is None else free
    if needed > free:
        raise UserError(f"{what}: about {needed / 2**30:.1f} GiB of memory are needed, {free / 2**30:.1f} GiB are "
                        "free: take fewer rows, something smaller, or a machine with more memory")


def _available_memory() -> float:
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
