"""docs/custom-dataset.md: its importer runs, and its commands run on the result."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import REPOSITORY, run_in_process

from dataset.rtrl import load_splits

NUM_ROWS = 800
SMALL = ("--epoch=1", "--embed_dim=4", "--bottom_mlp_dims=8", "--tower_mlp_dims=4")


def test_the_page_on_custom_data_sets(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "custom-dataset.md").read_text(encoding="utf-8")
    (importer,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    commands = re.findall(r"^    python3 (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    rng = np.random.default_rng(1)
    played = rng.random(NUM_ROWS) < 0.3
    log = pd.DataFrame({"ms": np.sort(rng.integers(0, 10**9, NUM_ROWS)), "listener": rng.integers(0, 50, NUM_ROWS),
                        "song": rng.integers(0, 30, NUM_ROWS), "place": rng.choice(["radio", "search"], NUM_ROWS)})
    log["played_ms"] = (log["ms"] + 500).where(played).astype("Int64")
    log["bought_ms"] = (log["ms"] + 900).where(played & (rng.random(NUM_ROWS) < 0.4)).astype("Int64")
    log.to_csv(tmp_path / "songs.csv", index=False)
    pd.DataFrame({"song": range(25), "genre": rng.integers(0, 4, 25), "label": rng.integers(0, 9, 25)}).to_csv(
        tmp_path / "genres.csv", index=False)
    (tmp_path / "songs.py").write_text(importer)
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
