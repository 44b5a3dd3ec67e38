"""How a program ends: errors and interruptions are one line on stderr, with an exit code."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import reprlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from common import distributed
from common.memory import limited_memory

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
                 "Cannot allocate memory", "can't start new thread", "failed to map segment from shared object")


class UserError(Exception):
    """A mistake of the user: one line with its location and what to do. The program ends with exit code 2.

    Quotes from a corrupt file may contain any character: those that do not print become question marks.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(char if char.isprintable() else "?" for char in text))


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def cli_entry_point(main: Callable[[], None], resumable: bool = False) -> Callable[[], None]:
    """Wrap the entry point of a program: it ends with one line and an exit code.

    2: `UserError`, or an error of the system (out of memory, disk full). 130 and 143: Ctrl-C and SIGTERM, with the
    command that resumes: the same, with `--resume` if the program is `resumable` and has started a run.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _on_sigterm)
            if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # SIG_IGN stays
                signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with limited_memory():
                main()
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            if (interrupt := _root_interrupt(error)) is not None:
                flag = " --resume" if resumable and _resumable_run_started and "--resume" not in sys.argv else ""
                _exit_with_message(f"interrupted; resume with: {command_line()}{flag}",
                                   143 if isinstance(interrupt, Terminated) else 130)
            if isinstance(error, UserError):
                _exit_with_message(f"error: {error}", 2)
            _exit_if_out_of_memory(error)
            if isinstance(error, OSError):
                _exit_with_message(f"error: {error.filename or 'the output'}: {error.strerror or error}", 2)
            raise

    return wrapped


_resumable_run_started = False


def mark_run_started() -> None:
    """Let `cli_entry_point` suggest `--resume`: this program has started a run."""
    global _resumable_run_started
    _resumable_run_started = True


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that started this program, as typed in a shell; or the same with other arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python3", *program, *(sys.argv[1:] if arguments is None else arguments)])


def _root_interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM that caused an error, or None. An interrupted library may raise an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        if isinstance(error, RuntimeError) and str(error) == "Query interrupted":  # by DuckDB, without its cause
            return _interrupt
        error = error.__context__
    return error


def while_importing() -> None:
    """Until `cli_entry_point` takes over: Ctrl-C is no traceback, nor is a library for which there is no memory."""
    def print_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        _exit_if_out_of_memory(error)
        sys.__excepthook__(kind, error, traceback)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = print_error


def _exit_if_out_of_memory(error: BaseException) -> None:
    """Exit where an allocation failed: in Python, numpy, torch (CPU and CUDA), DuckDB, a C++ library, the system."""
    if (isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "OutOfMemoryException")
            or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or any(text in str(error) for text in OUT_OF_MEMORY)):
        reason = truncate(str(error).partition("\n")[0] or "allocation failed", 200)
        _exit_with_message(f"error: out of memory ({reason}): use fewer rows, a smaller batch or a smaller model", 2)


_interrupt = KeyboardInterrupt()  # what a signal raises, if one came


def _on_sigterm(_number: int, _frame: object) -> None:
    global _interrupt
    _interrupt = Terminated()
    raise _interrupt


def _exit_with_message(line: str, code: int) -> None:
    """Print one line, below a progress bar if there is one, and exit."""
    with contextlib.suppress(OSError):
        if distributed.is_main_process() and os.environ.get("RANK", "0") == "0":  # also before they are connected
            print(("\n" if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # closed pipe or full disk: the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def truncate(value: Any, width: int = 60) -> str:
    """A value as text of at most `width` characters."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
