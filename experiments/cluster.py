"""Runs of the experiments on the workers of a Dask cluster (`--scheduler`), a run a task.

Every worker shares the runner's directory. The run of a worker that dies is done again on another one, from its
checkpoint. A run that nobody waits for any longer, because the runner was stopped or died, ends with its worker's
process, which Dask's nanny starts again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.fileio import sha256, write_text

if TYPE_CHECKING:
    import distributed

CONNECT_SECONDS = 10
REPOSITORY = Path(__file__).resolve().parent.parent


class DaskExecutor(Executor):
    """Executes each call on a worker, in the runner's directory."""

    def __init__(self, client: distributed.Client) -> None:
        self.client = client

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        call = pickle.dumps((function, args, options))  # the scheduler unpickles arguments, too: it needs no torch
        task = self.client.submit(_execute, os.getcwd(), call, pure=False)
        task.add_done_callback(partial(_set_outcome, future))
        return future

    def check_workers(self, folder: Path, datasets: Sequence[Path]) -> None:
        """Raise UserError, naming the worker, unless every worker can do runs of this process: it has one thread, a
        nanny, this program, this output folder and the data sets in these folders. Waits for the first worker."""
        try:
            self.client.run_on_scheduler(_is_importable)
        except ImportError as error:
            raise UserError(f"--scheduler: the scheduler cannot import this program ({error}): start it with "
                            f"PYTHONPATH={REPOSITORY}") from error
        if not self.client.nthreads():
            print("waiting for the first worker of the cluster", flush=True)
        self.client.wait_for_workers(1)
        for address, worker in self.client.scheduler_info(n_workers=-1)["workers"].items():
            if worker["nthreads"] != 1 or not worker["nanny"]:
                raise UserError(f"--scheduler: worker {address} has {worker['nthreads']} threads and "
                                f"{'a' if worker['nanny'] else 'no'} nanny: a run needs a process of its own: start "
                                "workers with --nthreads=1 --nanny")
        token, expected = folder / ".cluster", uuid.uuid4().hex
        write_text(token, expected)
        manifests = {str(path / "manifest.json"): sha256(path / "manifest.json") for path in datasets}
        try:
            problems = self.client.run(_find_problem, os.getcwd(), token, expected, manifests, on_error="return")
        finally:
            token.unlink(missing_ok=True)
        for address, problem in problems.items():
            if problem:
                raise UserError(f"--scheduler: worker {address} " + (problem[0] if isinstance(problem, list) else (
                    f"cannot import this program ({problem}): start it with PYTHONPATH={REPOSITORY}")))


def require_distributed() -> None:
    """Raise UserError where Dask is not installed."""
    if importlib.util.find_spec("distributed") is None:
        raise UserError("--scheduler: needs dask and distributed: pip install -r requirements/cluster.txt")


@contextlib.contextmanager
def connect(address: str) -> Iterator[DaskExecutor]:
    """Executor on the cluster of a scheduler; its runs are stopped at the end. Raises UserError where the scheduler
    cannot be reached, or goes away."""
    require_distributed()
    import distributed

    for name in ("distributed", "distributed.client"):  # its warnings, which repeat the one line below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--scheduler: no Dask scheduler at '{address}' ({reason}): start one with: dask scheduler"
                        ) from error
    with client:
        try:
            yield DaskExecutor(client)
        except CancelledError as error:
            raise UserError(f"--scheduler: the scheduler at {address} went away: the same command resumes once there "
                            "is one again") from error


def _set_outcome(future: Future[Any], task: distributed.Future[Any]) -> None:
    """Give a future the outcome of its task."""
    import distributed

    if task.status == "finished":
        future.set_result(task.result())
        return
    error: BaseException = CancelledError() if task.status != "error" else task.exception()
    if isinstance(error, distributed.KilledWorker):
        error = UserError(f"{error.allowed_failures + 1} workers died while they did it (out of memory?)")
    future.set_exception(error)


def _is_importable() -> bool:
    return True


def _find_problem(folder: str, token: Path, expected: str, manifests: Mapping[str, str]) -> list[str]:
    """What this worker lacks of the runner's files, in words; [] for nothing."""
    try:
        with contextlib.chdir(folder):
            if token.read_text(encoding="utf-8") != expected:
                return [f"has another {token.parent} than this process: share the folder"]
            for path, digest in manifests.items():
                if sha256(Path(path)) != digest:
                    return [f"has other data than this process: {path}"]
    except OSError as error:
        return [f"does not see this process's {error.filename} ({error.strerror}): share the folder {folder}"]
    return []


def _execute(folder: str, call: bytes) -> Any:
    """Do a pickled call on a worker, in a folder; the process ends if the call is cancelled meanwhile."""
    import distributed

    worker = distributed.get_worker()
    key, finished = worker.get_current_task(), threading.Event()

    def exit_when_cancelled() -> None:
        while not finished.wait(0.5):
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                os._exit(1)  # a thread cannot be stopped; the nanny starts another process

    threading.Thread(target=exit_when_cancelled, daemon=True).start()
    try:
        with contextlib.chdir(folder):
            function, args, options = pickle.loads(call)
            return function(*args, **options)
    finally:
        finished.set()
