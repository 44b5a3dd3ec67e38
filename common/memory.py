"""Memory: what is free, and a limit at which an allocation fails, before the kernel kills the process."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
NVIDIA = Path("/dev/nvidiactl")


def available_memory() -> float:
    """Free bytes of the system, of the control groups that this process is nested in (v1 and v2) and of its address
    space (`ulimit -v`), the fewest of them; infinity if unknown."""
    free = [float("inf")]
    with contextlib.suppress(OSError, ValueError):
        (line,) = re.findall(r"MemAvailable:\s+(\d+) kB", (PROC / "meminfo").read_text())
        free.append(int(line) * 1024.0)
    with contextlib.suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                free += _free_in_groups(CGROUP / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes",
                                        "total_")
            elif not controllers:
                free += _free_in_groups(CGROUP, path, "memory.max", "memory.current", "")
    with contextlib.suppress(OSError):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(float(limit - _mapped_bytes(0)))
    return min(free)


def _free_in_groups(root: Path, path: str, limit: str, used: str, prefix: str) -> list[float]:
    """Free bytes of a control group and each group around it that has a limit. Pages of files count as free. In a
    container the path may be that of the host: what is mounted at `root` is looked at in any case."""
    free, group = [], root / path.lstrip("/")
    for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
        with contextlib.suppress(OSError, ValueError):
            files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", (folder / "memory.stat").read_text(), re.M)
            free.append(float(int((folder / limit).read_text()) - int((folder / used).read_text())
                              + sum(map(int, files))))
    return free


def _mapped_bytes(field: int) -> int:
    """Bytes that this process has mapped: field 0 of statm all, 5 those that no other process can write to."""
    return int((PROC / "self/statm").read_text().split()[field]) * resource.getpagesize()


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Let an allocation fail that exceeds the memory that is free now: the kernel grants it, and kills when it is used.

    Linux counts what is mapped to be written by this process alone (RLIMIT_DATA), so mapped files are not counted. Not
    limited: where it is unknown what is free, and beside CUDA, which reserves far more addresses than it uses.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    free = available_memory()
    with contextlib.suppress(OSError, ValueError):
        if free != float("inf") and not NVIDIA.exists():
            limits = [int(_mapped_bytes(5) + free), *(limit for limit in before if limit != resource.RLIM_INFINITY)]
            resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
