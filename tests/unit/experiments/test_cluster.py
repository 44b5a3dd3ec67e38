"""Experiments on a Dask cluster: two worker processes on this machine, which may be killed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, REPOSITORY, SUMMARY_LINES, command, user_error_message
from distributed import LocalCluster

from common.errors import UserError
from experiments.cluster import DaskExecutor, connect
from experiments.statistics import read_results

SMALL = ["--tables=main", "--models=esmm", "--name_filter=constant", "--seeds=2", "--embed_dim=4", "--epoch=2"]
BUSY = "import os, time\nopen(f'started.{os.getpid()}', 'w').close()\ntime.sleep(SECONDS)"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as started:
            yield started


@pytest.fixture
def executor(cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaskExecutor]:
    monkeypatch.chdir(tmp_path)
    with connect(cluster.scheduler_address) as connected:
        yield connected


def submit_busy(executor: DaskExecutor, seconds: float) -> Future[Any]:
    """A call that writes `started.<process id>` into the working directory and sleeps."""
    return executor.submit(exec, BUSY.replace("SECONDS", str(seconds)))


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("nothing happened within two minutes")


def started_pids() -> list[int]:
    return [int(path.suffix[1:]) for path in Path().glob("started.*")]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_call_of_a_killed_worker_is_done_again(executor: DaskExecutor) -> None:
    future = submit_busy(executor, 1)
    wait_until(started_pids)
    (pid,) = started_pids()
    os.kill(pid, signal.SIGKILL)
    assert future.result(30) is None
    assert len(started_pids()) == 2


def test_mistakes_of_a_call_reach_the_runner(executor: DaskExecutor) -> None:
    with pytest.raises(UserError, match="no such data set"):
        executor.submit(exec, "from common.errors import UserError\nraise UserError('no such data set')").result(30)


def test_runner_that_leaves_stops_its_calls(cluster: LocalCluster, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """One call runs, on a process that ends; the others were waiting and never start."""
    monkeypatch.chdir(tmp_path)
    with connect(cluster.scheduler_address) as executor:
        futures = [submit_busy(executor, 600) for _ in range(4)]
        wait_until(lambda: len(started_pids()) == 2)
    wait_until(lambda: not any(map(is_alive, started_pids())))
    assert len(started_pids()) == 2
    assert all(future.done() for future in futures)


def test_workers_that_cannot_do_a_run_are_refused(executor: DaskExecutor, rt_tables: Path, tmp_path: Path) -> None:
    executor.check_workers(tmp_path, [rt_tables])
    assert list(tmp_path.iterdir()) == []
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0", processes=False) as other, \
            connect(other.scheduler_address) as wrong:
        message = user_error_message(lambda: wrong.check_workers(tmp_path, [rt_tables]))
    assert "2 threads and no nanny" in message


def test_folder_that_a_worker_does_not_see(executor: DaskExecutor, rt_tables: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's path is another file for the worker, as where nothing is shared."""
    monkeypatch.setattr("experiments.cluster.write_text", lambda path, _: path.write_text("of another machine"))
    assert "share the folder" in user_error_message(lambda: executor.check_workers(tmp_path, [rt_tables]))
    monkeypatch.setattr("experiments.cluster.write_text", lambda *_: None)
    assert "No such file" in user_error_message(lambda: executor.check_workers(tmp_path, [rt_tables]))


def test_no_scheduler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect_to(address: str) -> None:
        with connect(address):
            pass

    monkeypatch.setattr("experiments.cluster.CONNECT_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:1", "127.0.0.1", "no such host"):
        assert "no Dask scheduler at" in user_error_message(lambda address=address: connect_to(address))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "requirements/cluster.txt" in user_error_message(lambda: connect_to("tcp://127.0.0.1:1"))


def test_scheduler_that_goes_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def lose_scheduler() -> None:
        with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", processes=False) as cluster, \
                connect(cluster.scheduler_address) as executor:
            future = submit_busy(executor, 1)
            wait_until(started_pids)
            cluster.close()
            wait([future])
            future.result()

    assert "went away: the same command resumes" in user_error_message(lose_scheduler)


@pytest.mark.stress
def test_killed_experiments_end_like_others(cluster: LocalCluster, rt_tables: Path, tmp_path: Path) -> None:
    """A worker or the runner is killed at 20 random moments: continued, the rows are those of one process."""
    draw = random.Random(2022)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "rt").symlink_to(rt_tables)
    killed = dict.fromkeys(("worker", "runner"), 0)

    def start(out: str, *flags: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command("experiments", *SMALL, f"--out={out}", *flags), cwd=tmp_path, env=ENVIRONMENT,
                                stdout=subprocess.DEVNULL)

    def rows(out: str) -> list[dict[str, str]]:
        """The rows without what differs between any two of them: seconds and paths."""
        path = tmp_path / out / "results.csv"
        return [{**row, "seconds": "", "command": row["command"].replace(out, "OUT")} for row in read_results(path)]

    assert start("expected", "--workers=1").wait() == 0
    expected, seconds = rows("expected"), 10.0
    while sum(killed.values()) < 20:
        out, victim = f"trial{sum(killed.values())}", min(killed, key=lambda name: killed[name])
        process = start(out, on_cluster := f"--scheduler={cluster.scheduler_address}")
        wait_until((tmp_path / out / "runs").exists)
        begin, moment = time.monotonic(), draw.uniform(0, seconds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if process.poll() is None:
            pid = process.pid if victim == "runner" else draw.choice(list(cluster.workers.values())).pid
            os.kill(pid, signal.SIGKILL)
            killed[victim] += 1
        if process.wait() == -signal.SIGKILL:
            assert start(out, on_cluster).wait() == 0
        else:
            assert process.returncode == 0
            seconds = time.monotonic() - begin
        assert rows(out) == expected
        assert not list((tmp_path / out).rglob("*.lock"))
        shutil.rmtree(tmp_path / out)
    SUMMARY_LINES.append(f"killed: {killed} of experiments on a cluster; all ended like the undisturbed one")
