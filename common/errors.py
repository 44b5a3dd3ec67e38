"""What a program says to its user: errors and interruptions in one line, with an exit code."""

from __future__ import annotations

import contextlib
import functools
import os
import reprlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from common import distributed


class UserError(Exception):
    """A mistake of the user's, told in one line: where it is and what to do. Ends the program with exit code 2.

    What is quoted from a damaged file may hold anything: characters that do not print become question marks.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(char if char.isprintable() else "?" for char in text))


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever ends well on Ctrl-C ends well on this."""


def cli_entry_point(main: Callable[[], None], resumable: bool = False) -> Callable[[], None]:
    """Wrap a program's entry: it ends in one line and a code that says how.

    2: `UserError`, or the system refuses (memory, a full disk under the output). 130 and 143: Ctrl-C and SIGTERM, with
    the command that goes on: the same, with `--resume` where the program is `resumable` and has started a run.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _on_sigterm)
            if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # so until here; one that is ignored stays ignored
                signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            main()
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            more = " --resume" if resumable and _resumable_run_started and "--resume" not in sys.argv else ""
            if (stop := _root_interrupt(error)) is not None:
                _exit_with_message(f"stopped: nothing is left half-written; to go on: {command_line()}{more}",
                     143 if isinstance(stop, Terminated) else 130)
            if isinstance(error, UserError):
                _exit_with_message(f"error: {error}", 2)
            if isinstance(error, MemoryError):
                _exit_with_message(f"error: out of memory ({error or 'no more is given'}): take fewer rows, a smaller batch or model",
                     2)
            if isinstance(error, OSError):
                _exit_with_message(f"error: {error.filename or 'the output'}: {error.strerror or error}", 2)
            raise

    return wrapped


_resumable_run_started = False


def mark_run_started() -> None:
    """Tell `cli_entry_point` that this program has begun a run that `--resume` can continue."""
    global _resumable_run_started
    _resumable_run_started = True


def command_line() -> str:
    """The command that started this program, as it is typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python3", *program, *sys.argv[1:]])


def _root_interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM that an error is, or came of: libraries that are stopped while they write say so with
    errors of their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _on_sigterm(_number: int, _frame: object) -> None:
    raise Terminated


def _exit_with_message(line: str, code: int) -> None:
    """Say one line, below a progress bar if there is one, and exit."""
    with contextlib.suppress(OSError):
        if distributed.is_main_process():
            print(("\n" if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more, or its disk is full: the interpreter shall not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def truncate(value: Any, width: int = 60) -> str:
    """A value as text of at most `width` characters."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
