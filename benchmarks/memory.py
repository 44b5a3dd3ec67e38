"""Peak of anonymous memory of each program against rows: `python3 -m benchmarks.memory 0.1 1` (million impressions).

Simulates a log of that many impressions in sessions, prepares it, trains ESMM for one epoch and critics on it; prints
a row of docs/scale.md for each size. Anonymous memory (RssAnon of Linux) is what the kernel cannot take back: pages
of mapped files are not part of it. It is read 50 times a second, child processes included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.throughput import REPOSITORY
from common.errors import UserError, cli_entry_point, command_line

EVENTS_PER_IMPRESSION = 2.484  # of a simulated log, in sessions of two impressions or more
PROGRAMS = {
    "dataset.simulate": "-m dataset.simulate --out raw --events {events}",
    "dataset.prepare": "-m dataset.prepare --raw raw --out dataset/rt",
    "SLmain, 1 epoch": "SLmain.py --model_name=esmm --epoch=1",
    "RLmain, 1 epoch": "RLmain.py --epoch=1",
}


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and its children; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")]
    return sum(own) + sum(anonymous_bytes(int(child)) for child in children)


def measure(command: list[str], folder: Path) -> tuple[float, int]:
    """Seconds of a Python command in `folder`, and its peak of anonymous memory in bytes. Raises UserError."""
    start, peak = time.perf_counter(), 0
    paths = [str(REPOSITORY / word) if word.endswith(".py") else word for word in command]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen([sys.executable, *paths], cwd=folder, stdout=log, stderr=log,
                                   env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{' '.join(command)}: exit code {process.returncode}: {folder / 'log'}")
    return time.perf_counter() - start, peak


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(prog=command_line([]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("millions", type=float, nargs="+", help="million impressions")
    parser.add_argument("--folder", type=Path, help="where the data go, and stay (default: a temporary folder)")
    arguments = parser.parse_args()
    print("| million impressions | " + " | ".join(PROGRAMS) + " |\n|" + "---|" * (len(PROGRAMS) + 1))
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.folder / f"{millions:g}" if arguments.folder else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            cells = []
            for command in PROGRAMS.values():
                words = command.format(events=round(millions * 1e6 * EVENTS_PER_IMPRESSION)).split()
                seconds, peak = measure(words, folder)
                cells.append(f"{peak / 2**30:.2f} GiB, {seconds:.0f} s")
            print(f"| {millions:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
