"""The end of a program: one line, an exit code, and the command that resumes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import errors
from common.errors import Terminated, UserError, cli_entry_point, mark_run_started, truncate


@pytest.fixture(autouse=True)
def _restore_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raise_error(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def write_to_a_directory() -> None:
    Path("/").write_text("")


def interrupted_library() -> None:
    """torch, for example, raises an error of its own when a write is interrupted."""
    try:
        raise Terminated
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


@pytest.mark.parametrize(("main", "code", "line"), [
    (raise_error(UserError("a.csv, line 2: bad")), 2, "error: a.csv, line 2: bad"),
    (raise_error(MemoryError("17 GiB")), 2, "error: out of memory (17 GiB): use fewer rows, a smaller batch or a "
                                            "smaller model"),
    (write_to_a_directory, 2, "error: /: Is a directory"),
    (raise_error(OSError(28, "No space left on device")), 2, "error: the output: No space left on device"),
    (raise_error(KeyboardInterrupt()), 130, "interrupted; resume with: python3 main.py --epoch=2"),
    (raise_error(Terminated()), 143, "interrupted; resume with: python3 main.py --epoch=2"),
    (interrupted_library, 143, "interrupted; resume with: python3 main.py --epoch=2"),
], ids=["user", "memory", "directory", "disk full", "Ctrl-C", "SIGTERM", "interrupted library"])
def test_a_program_ends_with_one_line(main: Callable[[], None], code: int, line: str,
                                      capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "command_line", lambda: "python3 main.py --epoch=2")
    with pytest.raises(SystemExit) as exit_info:
        cli_entry_point(main)()
    assert exit_info.value.code == code
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(("resumable", "started", "flags", "suffix"), [
    (True, True, [], " --resume"), (True, True, ["--resume"], " --resume"),
    (True, False, [], ""), (False, True, [], "")])
def test_a_started_resumable_run_suggests_resume(resumable: bool, started: bool, flags: list[str], suffix: str,
                                                 capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", *flags])
    monkeypatch.setattr(errors, "command_line", lambda: " ".join(["python3", "main.py", *flags]))
    monkeypatch.setattr(errors, "_resumable_run_started", False)
    if started:
        mark_run_started()
    with pytest.raises(SystemExit):
        cli_entry_point(raise_error(KeyboardInterrupt()), resumable)()
    assert capsys.readouterr().err == f"interrupted; resume with: python3 main.py{suffix}\n"


def test_other_exceptions_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli_entry_point(raise_error(ZeroDivisionError()))()


def test_unprintable_characters_become_question_marks() -> None:
    assert str(UserError("a\x1b[31m\nb")) == "a?[31m?b"


@pytest.mark.parametrize(("value", "text"), [
    ("abc", "abc"), ("x" * 11, "x" * 7 + "..."), (list("abcdefgh"), "['a', '..."), (12, "12")],
    ids=["short", "long", "list", "number"])
def test_truncate(value: object, text: str) -> None:
    assert truncate(value, 10) == text
