"""What is free: of the system, in control groups, of the address space; and an allocation that fails is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, command, user_error_message

from common import memory
from common.fileio import require_free_memory
from common.memory import available_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free, in this folder."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:  9999 kB\nMemAvailable:  {8 * 2**20} kB\n")
    return tmp_path


def make_group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_memory_of_the_system(machine: Path) -> None:
    assert available_memory() == 8 * GIB
    require_free_memory(7.9 * GIB, "big")
    message = user_error_message(lambda: require_free_memory(8.5 * GIB, "big"))
    assert message.startswith("big: about 8.5 GiB of memory are needed, 8.0 GiB are free:")
    (machine / "proc/meminfo").unlink()
    assert available_memory() == float("inf")
    require_free_memory(2**60, "unknown, so nothing is refused")


V2 = "memory.max", "memory.current"


def test_control_groups_of_version_2_are_nested(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/job/step\n")
    groups = machine / "cgroup"
    make_group(groups / "job/step", V2, "max", 0, "anon 1")
    assert available_memory() == 8 * GIB
    files = f"file {GIB}\ninactive_file {GIB // 4}\nactive_file {GIB // 4}"
    make_group(groups / "job", V2, str(3 * GIB), 2 * GIB, files)
    assert available_memory() == 1.5 * GIB, "pages of files are given back, those of tmpfs (in file) are not"
    make_group(groups / "job/step", V2, str(GIB), 0, "anon 1")
    assert available_memory() == GIB
    make_group(groups / "other", V2, "1", 0, "anon 1")
    assert available_memory() == GIB, "not a group of this process"


def test_control_groups_of_version_1(machine: Path) -> None:
    names = "memory.limit_in_bytes", "memory.usage_in_bytes"
    (machine / "proc/self/cgroup").write_text("5:devices:/a\n4:cpu,memory:/host/path\n0::/\n")
    root = machine / "cgroup/memory"
    make_group(root, names, str(3 * GIB), GIB, f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0")
    assert available_memory() == 3 * GIB, "in a container the path is the host's, and the container's group is the root"
    make_group(root / "host", names, str(2 * GIB), GIB, "total_inactive_file 0\ntotal_active_file 0")
    assert available_memory() == GIB
    make_group(root / "host/path", names, str(2**63 - 4096), GIB, "total_active_file 0")
    assert available_memory() == GIB


def python(code: str, limit: str = "unlimited") -> subprocess.CompletedProcess[str]:
    """Run Python code as a program, with `ulimit -v` of so many KiB."""
    program = f"from common.errors import cli_entry_point\n@cli_entry_point\ndef main():\n    {code}\nmain()"
    return subprocess.run(["sh", "-c", f'ulimit -v {limit}; exec "$@"', "sh", sys.executable, "-c", program],
                          cwd=Path(__file__).parents[3], env=ENVIRONMENT, capture_output=True, text=True, check=False)


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")


@linux
def test_address_space_that_is_left() -> None:
    done = python("from common.memory import available_memory; print(available_memory())", str(2**20))
    assert 0.7 * GIB < float(done.stdout) < GIB


@linux
def test_memory_that_is_not_free_is_not_taken(machine: Path) -> None:
    """Block after block: the kernel would grant each, whether there is memory for it or not."""
    (machine / "proc/meminfo").write_text(f"MemAvailable:  {100 * 2**10} kB\n")
    (machine / "proc/self").rmdir()
    (machine / "proc/self").symlink_to("/proc/self")
    done = subprocess.run([sys.executable, "-c", f"""
import pathlib
from common import errors, memory
memory.PROC, memory.NVIDIA = pathlib.Path({str(machine / "proc")!r}), pathlib.Path("none")
def main():
    taken = [bytes(2**20) for _ in range(50)]
    print("as much as is free", flush=True)
    taken += [bytes(2**20) for _ in range(100)]
errors.cli_entry_point(main)()
"""], cwd=Path(__file__).parents[3], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "as much as is free\n")
    assert done.stderr == ("error: out of memory (allocation failed): use fewer rows, a smaller batch or a smaller "
                           "model\n")


@linux
@pytest.mark.parametrize("code", [
    "bytes(2**50)", "import numpy as np; np.ones(2**46)", "import torch; torch.ones(2**46)",
    "import mmap; mmap.mmap(-1, 2**50)",
    "import duckdb; duckdb.connect(config={'memory_limit': '10MB', 'max_temp_directory_size': '0KB'}).execute("
    "'SELECT list(i) FROM range(100000000) t(i)').fetchall()"], ids=["Python", "numpy", "torch", "system", "DuckDB"])
def test_a_failed_allocation_is_one_line(code: str) -> None:
    done = python(code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: out of memory (")
    assert done.stderr.count("\n") == 1


@pytest.mark.stress
@linux
@pytest.mark.parametrize("mib", [1500, 2000, 2500, 3000, 4000])
@pytest.mark.parametrize("program", [["SLmain.py", "--epoch=1"], ["RLmain.py", "--epoch=1"]], ids=["SLmain", "RLmain"])
def test_little_address_space(tables: Path, program: list[str], mib: int) -> None:
    """Success or one line; what dies outside of Python says so itself, without a traceback."""
    folder = tables.parent.parent
    if program[0] == "RLmain.py":
        subprocess.run(command("SLmain.py", "--epoch=1"), cwd=folder, env=ENVIRONMENT, capture_output=True, check=True)
    done = subprocess.run(["sh", "-c", f'ulimit -v {mib * 1024}; exec "$@"', "sh", *command(*program)], cwd=folder,
                          env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    if done.returncode == 2:
        assert done.stderr.startswith("error: ")
