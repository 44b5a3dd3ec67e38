"""Atomic writes, locks, verified archives, JSON, free memory."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import user_error_message

from common.fileio import (
    append_checksum,
    atomic_file,
    atomic_folder,
    check_writable,
    exclusive_lock,
    is_safe_filename,
    open_verified,
    read_json,
    require_regular_file,
    sha256,
    write_json,
)

# ------------------------------------------------------------------------------------------------------- atomic writes


def fail_in(write: Callable[[Path], Any], path: Path) -> None:
    """Write something to the temporary path, then fail."""
    def write_half() -> None:
        with write(path) as tmp_path:
            (tmp_path / "train.csv" if tmp_path.is_dir() else tmp_path).write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()


def test_atomic_file_replaces_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for old, new in ((None, "first"), ("first", "second")):
        with atomic_file(path) as temporary:
            temporary.write_text(new)
            assert (path.read_text() if old else path.exists()) == (old or False)
        assert path.read_text() == new
    assert os.listdir(path.parent) == ["a.txt"]


def test_atomic_file_that_fails_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    fail_in(atomic_file, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_folder_appears_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "rt") as temporary:
        (temporary / "train.csv").write_text("x")
        assert not (tmp_path / "rt").exists()
    assert os.listdir(tmp_path) == ["rt"]
    assert os.listdir(tmp_path / "rt") == ["train.csv"]


def test_atomic_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    fail_in(atomic_folder, tmp_path / "rt")
    assert os.listdir(tmp_path) == []


def test_atomic_folder_never_replaces_files(tmp_path: Path) -> None:
    (tmp_path / "rt").mkdir()
    (tmp_path / "rt" / "train.csv").write_text("mine")

    def overwrite() -> None:
        with atomic_folder(tmp_path / "rt") as temporary:
            (temporary / "train.csv").write_text("other")

    assert str(tmp_path / "rt") in user_error_message(overwrite)
    assert (tmp_path / "rt" / "train.csv").read_text() == "mine"
    assert os.listdir(tmp_path) == ["rt"]


def test_check_writable_creates_folders_and_removes_stale_files(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True,
                           check=True).stdout.strip()
    (tmp_path / f"train.csv.{ended}.partial").touch()
    (tmp_path / f"rt.{ended}.partial").mkdir()
    (tmp_path / f"val.csv.{os.getppid()}.partial").touch()
    check_writable(tmp_path, tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", f"val.csv.{os.getppid()}.partial"]
    assert os.listdir(tmp_path / "a" / "b") == []


def test_check_writable_refuses_what_blocks_a_path(tmp_path: Path) -> None:
    (tmp_path / "chkpt").write_text("not a folder")
    message = user_error_message(lambda: check_writable(tmp_path / "chkpt" / "SL"))
    assert message.startswith(f"{tmp_path / 'chkpt'}")
    assert "cannot write: " in message
    (tmp_path / "state.pt").mkdir()
    message = user_error_message(lambda: check_writable(tmp_path, files=[tmp_path / "state.pt"]))
    assert message == f"{tmp_path / 'state.pt'}: cannot write: path is a directory: move it away"


# --------------------------------------------------------------------------------------------------------------- locks


def test_a_lock_names_its_owner(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "rt"):
        owner = json.loads((tmp_path / ".rt.lock").read_text())
        assert owner["pid"] == os.getpid()

        def lock_again() -> None:
            with exclusive_lock(tmp_path / "val", tmp_path / "rt"):
                pass

        assert user_error_message(lock_again).startswith(
            f"{tmp_path / 'rt'}: locked by process {os.getpid()} (started {owner['started']}: ")
    assert os.listdir(tmp_path) == [], "the refused lock is released as well"


# ------------------------------------------------------------------------------------------------------------ archives


def make_archive(path: Path, compression: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("weights", b"\1\2\3\0" * 20)
    append_checksum(path)
    return path.read_bytes()


def open_error(path: Path) -> str:
    def read() -> None:
        with open_verified(path, "train it again"):
            pass

    return user_error_message(read)


def test_a_verified_archive_is_readable(tmp_path: Path) -> None:
    make_archive(tmp_path / "a.pt")
    with open_verified(tmp_path / "a.pt", "") as file:
        assert zipfile.ZipFile(file).read("weights") == b"\1\2\3\0" * 20


def test_any_changed_or_missing_byte_is_detected(tmp_path: Path) -> None:
    """In the content, in the zip headers, in the checksum itself."""
    path = tmp_path / "a.pt"
    content = make_archive(path)
    for index in range(len(content)):
        for corrupt in (content[:index] + bytes([content[index] ^ 1]) + content[index + 1:], content[:index]):
            path.write_bytes(corrupt)
            message = open_error(path)
            assert message.startswith(f"{path}: ")
            assert message.endswith(": train it again")


@pytest.mark.parametrize(("content", "reason"), [
    (b"PK\3\4" + b"x" * 100, "no checksum (corrupt or from an older version)"),
    (pickle.dumps({"weights": 1}), "not a file that this program wrote"), (b"", "not a file that this program wrote"),
    (None, "no such file")], ids=["older", "pickle", "empty", "absent"])
def test_a_file_without_checksum_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    assert open_error(tmp_path / "a.pt") == f"{tmp_path / 'a.pt'}: {reason}: train it again"


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    make_archive(tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    assert "compressed archive" in open_error(tmp_path / "a.pt")


# --------------------------------------------------------------------------------------------------- names, paths, JSON


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\nb", "a\0b", "x" * 300], ids=ascii)
def test_unsafe_filenames(name: str) -> None:
    assert is_safe_filename("train.csv")
    assert not is_safe_filename(name)


def test_directories_and_pipes_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert user_error_message(lambda path=path: require_regular_file(path)) == f"{path}: not a file"  # type: ignore[misc]
        assert str(path) in user_error_message(lambda path=path: read_json(path))  # type: ignore[misc]
    assert user_error_message(lambda: require_regular_file(tmp_path / "x")) == f"{tmp_path / 'x'}: no such file"


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"command": "python3 SLmain.py", "π": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "line 1, column 1: not valid JSON"), (b"{", "line 1, column 2: not valid JSON"),
    (b'{"a":\n 1,}', "line 2, column "), (b"[1, 2]", "expected a JSON object, not a list"),
    (b"12", "expected a JSON object, not a int"), (b"\xff\xfe", "not valid JSON"), (b"[" * 100_000, "not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"), (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    (b'{"a": "\\ud800"}', "not valid JSON")],
    ids=["empty", "cut", "comma", "list", "number", "bytes", "deep", "digits", "duplicate", "surrogate"])
def test_invalid_json_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    message = user_error_message(lambda: read_json(path))
    assert message.startswith(str(path))
    assert reason in message


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
