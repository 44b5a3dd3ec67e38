"""What a program does before it imports torch, which takes seconds: it reads its command line, and chooses how threads
wait."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

from common.errors import cli_entry_point, while_importing

STAT, CGROUPS, OWN_CGROUPS = Path("/proc/stat"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SAMPLE_SECONDS = 0.1  # of the load, at least
BUSY = 0.3  # of one processor: from here on there is other work


def before_torch(parse: Callable[[], object]) -> None:
    """Call `parse`, which reads the command line and checks what it can: --help and mistakes end the program here.

    Then the program may import torch; until its entry point begins, Ctrl-C ends it without a traceback.
    """
    line = "" if "torch" in sys.modules else choose_threads(os.environ)

    def parsed() -> None:
        parse()

    cli_entry_point(parsed)()
    if line and os.environ.get("RANK", "0") == "0":
        print(line)
    while_importing()


def choose_threads(environment: MutableMapping[str, str]) -> str:
    """Set what torch's OpenMP (libgomp) reads once, when it is loaded; return what there is to say, "" for nothing.

    As many threads as the quota of the control group allows, if these are fewer than processors. Where other processes
    use the processors too, waiting threads sleep at once: by default they spin for a while, and a thread that waits for
    one that has no processor then takes the processor that this one needs. On an idle machine spinning is faster.
    Results depend on the number of threads, but not on how they wait, so not on the load. What is set already stays.
    """
    processors, quota, lines = usable_processors(), cpu_quota(), []
    if "OMP_NUM_THREADS" not in environment and quota < len(processors):
        environment["OMP_NUM_THREADS"] = str(max(1, math.floor(quota)))
        lines.append(f"{environment['OMP_NUM_THREADS']} threads, as the control group has a quota of {quota:g} "
                     "processors")
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys() and environment.get("OMP_NUM_THREADS") != "1":
        busy = other_load(processors)
        if busy >= BUSY:
            environment["OMP_WAIT_POLICY"] = "passive"
            lines.append(f"other processes use {busy:.1f} of {len(processors)} processors: waiting threads sleep")
    return "; ".join(lines)


def usable_processors() -> Sequence[int]:
    """The numbers of the processors that this process may use (`taskset`)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def cpu_quota() -> float:
    """The processors that the control groups of this process allow, versions 1 and 2; infinity without a limit."""
    quota = math.inf
    try:
        groups = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return quota
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / "cpu" if controllers else CGROUPS
        own = root / path.lstrip("/")
        quota = min(quota, *map(_quota_of, (own, *own.parents)))
    return quota


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(limit) / float(period) if limit != "max" and float(limit) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf


def other_load(processors: Sequence[int]) -> float:
    """How many of these processors other processes use, measured over a tenth of a second; 0.0 if unknown."""
    try:
        begin, own, used = time.monotonic(), _own_seconds(), _used_seconds(processors)
        time.sleep(SAMPLE_SECONDS)
        return max(0.0, (_used_seconds(processors) - used - (_own_seconds() - own)) / (time.monotonic() - begin))
    except (OSError, ValueError):
        return 0.0


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _used_seconds(processors: Sequence[int]) -> float:
    """Seconds that these processors have worked, for whomever: user, nice, system, irq, softirq and stolen time."""
    names = {f"cpu{number}" for number in processors}
    ticks = [[int(word) for word in words[1:]] for words in map(str.split, STAT.read_text().splitlines())
             if words and words[0] in names]
    return sum(sum(row[:3] + row[5:8]) for row in ticks) / os.sysconf("SC_CLK_TCK")
