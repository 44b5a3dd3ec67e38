"""docs/custom-dataset.md: its importer reads its sample, and its commands run on the result."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from conftest import REPOSITORY, run_in_process

from dataset.rtrl import load_splits

NUM_ROWS = 20_000  # of the page's sample
SMALL = ("--epoch=1", "--embed_dim=4", "--bottom_mlp_dims=8", "--tower_mlp_dims=4")


def test_the_page_on_custom_data_sets(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "custom-dataset.md").read_text(encoding="utf-8")
    importer, sample = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    commands = re.findall(r"^    python3 (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    (tmp_path / "songs.py").write_text(importer)
    with contextlib.chdir(tmp_path):
        exec(compile(sample, "the sample", "exec"), {})
    for command in commands:
        program, *flags = command.split()
        if program == "songs.py":
            program = str(tmp_path / program)
        else:
            flags += [*SMALL, *(["--epoch_updates=5", "--init_episode=5"] if program == "RLmain.py" else [])]
        result = run_in_process(tmp_path, program, *flags)
        assert result.returncode == 0, result.stderr
    splits = load_splits(tmp_path / "dataset" / "songs")
    assert sum(map(len, (splits.train, splits.val, splits.test))) == NUM_ROWS
    assert set(splits.train.fields) == {"place", "genre", "label"}
