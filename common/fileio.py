"""Files: atomic writes, locks, checksums, JSON.

A write goes to a temporary file (`*.partial`), which then replaces the target: no reader sees half a file. Archives of
tensors and arrays have a SHA-256 checksum. No pickle.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
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
from common.memory import available_memory

CHECKSUM_PREFIX = b"sha256:"
CHECKSUM_LENGTH = len(CHECKSUM_PREFIX) + 64


@contextmanager
def _wrap_os_error(path: Path) -> Iterator[None]:
    """Turn an error of the operating system (disk full, no permission, path is a directory) into a UserError."""
    try:
        yield
    except OSError as error:
        shown_path = str(error.filename or path)
        if shown_path.endswith(f".{os.getpid()}.partial"):  # a temporary name means nothing to the user
            shown_path = str(path)
        raise UserError(f"{shown_path}: cannot write: {error.strerror or error}") from error


def _tmp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is synced and replaces `path`, on failure it is removed."""
    tmp_path = _tmp_path(path)
    with _wrap_os_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield tmp_path
            with open(tmp_path, "rb+") as file:
                os.fsync(file.fileno())
            distributed.barrier()  # no process still reads the old file, and none continues before the new one exists
            if distributed.is_main_process():
                os.replace(tmp_path, path)
            distributed.barrier()
        finally:
            tmp_path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill; on success it becomes `path`, which must not exist, on failure it is
    removed."""
    tmp_path = _tmp_path(path)
    with _wrap_os_error(path):
        try:
            tmp_path.mkdir(parents=True)
            yield tmp_path
            distributed.barrier()
            if distributed.is_main_process():
                os.rename(tmp_path, path)
            distributed.barrier()
        finally:
            shutil.rmtree(tmp_path, ignore_errors=True)


def check_writable(*folders: Path, files: Sequence[Path] = ()) -> None:
    """Create the folders, write a test file in each, and check that none of `files` is a directory: a run fails at its
    start, not after an hour. Removes the temporary files of dead processes. Raises UserError."""
    for folder in folders:
        with atomic_file(folder / ".writable") as tmp_path:
            tmp_path.touch()
        (folder / ".writable").unlink(missing_ok=True)
        remove_stale_temp_files(folder)
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: cannot write: path is a directory: move it away")


def remove_stale_temp_files(folder: Path, name: str = "") -> None:
    """Remove the `<name>...<process id>.partial` of dead processes."""
    for path in folder.glob(f"{name}*.partial"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _pid_exists(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # a process of another user; a number too large for a process id
        pass
    return True


@contextmanager
def exclusive_lock(*paths: Path, wait: float = 0) -> Iterator[None]:
    """Lock these directories and files for one run. Raises UserError naming the process that has locked one already,
    and still has after `wait` seconds.

    The lock file of a path is `.<name>.lock` beside it, with the owner's process id. The kernel releases the lock when
    the process ends: the lock file of a dead process blocks no run. In a distributed run the main process locks.
    """
    with contextlib.ExitStack() as stack:
        for path in paths if distributed.is_main_process() else ():
            lock = FileLock(path.parent / f".{path.name}.lock", blocking=wait > 0, timeout=wait)
            lock_path = Path(lock.lock_file)
            with _wrap_os_error(lock_path):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                except Timeout:
                    raise UserError(f"{path}: locked by {_lock_owner(lock_path)}: wait until it has ended, or stop "
                                    "it") from None
                stack.callback(lock.release)
                stack.callback(lock_path.unlink, missing_ok=True)  # before the release: afterwards it may be another's
                owner = {"pid": os.getpid(), "started": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
                         "command": command_line()}
                lock_path.write_text(json.dumps(owner), encoding="utf-8")
        yield


def _lock_owner(lock_path: Path) -> str:
    """The process that has locked a path; it writes itself into the lock file right after locking."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(lock_path.read_text(encoding="utf-8"))
            return f"process {owner['pid']} (started {owner['started']}: {owner['command']})"
        time.sleep(0.05)
    return "another process"


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_checksum(path: Path) -> None:
    """Write the SHA-256 of a zip archive (`.pt`, `.npz`) into its comment, which zip readers ignore."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
        file.write(CHECKSUM_LENGTH.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(CHECKSUM_PREFIX + digest.encode())


@contextmanager
def open_verified(path: Path, hint: str) -> Iterator[BinaryIO]:
    """Open an archive that `append_checksum` has closed. Raises UserError, ending with `hint`, if a byte has changed.

    Compressed archives are refused: this program writes none, and a small one could expand to more than the memory.
    """
    with contextlib.ExitStack() as stack:
        try:
            require_regular_file(path)
            file = stack.enter_context(open(path, "rb"))
            _verify_archive(path, file)
        except UserError as error:
            raise UserError(f"{error}: {hint}") from error
        yield file


def _verify_archive(path: Path, file: BinaryIO) -> None:
    """Raise UserError if the checksum is missing or wrong, or if the file is no uncompressed zip archive."""
    is_zip = file.read(4) == b"PK\3\4"
    size = os.fstat(file.fileno()).st_size
    content_size = max(0, size - CHECKSUM_LENGTH)
    file.seek(content_size)
    checksum = file.read()
    if not checksum.startswith(CHECKSUM_PREFIX):
        raise UserError(f"{path}: no checksum (corrupt or from an older version)" if is_zip else
                        f"{path}: not a file that this program wrote")
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(content_size - file.tell(), 1 << 20)):
        digest.update(block)
    if checksum != CHECKSUM_PREFIX + digest.hexdigest().encode():
        raise UserError(f"{path}: corrupt: checksum mismatch (SHA-256)")
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a file that this program wrote ({error})") from error
    if (any(member.compress_type != zipfile.ZIP_STORED for member in members)
            or sum(member.file_size for member in members) > size):
        raise UserError(f"{path}: not a file that this program wrote (compressed archive)")
    file.seek(0)


def is_safe_filename(name: str) -> bool:
    """Whether a text is a file name without directories."""
    return (name not in ("", ".", "..") and name.isprintable() and Path(name).name == name
            and len(os.fsencode(name)) <= 200)


def require_regular_file(path: Path) -> None:
    """Raise UserError if the path is missing, a directory or a pipe (which might never end)."""
    if not os.path.exists(path):  # unlike Path.exists it accepts any name
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError naming line and column if it is invalid, or if a key is duplicate."""
    try:
        require_regular_file(path)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_reject_duplicate_keys)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be written again
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, not a {type(value).__name__}")
    return value


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, entry in pairs:
        if key in value:
            raise ValueError(f"duplicate key '{truncate(key)}'")
        value[key] = entry
    return value


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_memory(needed: float, description: str, free: float | None = None) -> None:
    """Raise UserError if fewer than `needed` bytes are free (`free`; None: of the system's memory): a run fails at its
    start, it is not killed halfway."""
    free = available_memory() if free is None else free
    if needed > free:
        raise UserError(f"{description}: about {needed / 2**30:.1f} GiB of memory are needed, {free / 2**30:.1f} GiB "
                        "are free: use fewer rows, a smaller model, or a machine with more memory")
