"""docs/custom-dataset.md: its importer reads its sample, and its commands run on the result."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
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
        log = pd.read_csv("songs.csv")
        log.sample(frac=1, random_state=1).to_csv("songs.csv", index=False)  # the order of the file does not matter
    for command in commands:
        program, *flags = command.split()
        if program == "songs.py":
            program = str(tmp_path / program)
        else:
            flags += [*SMALL, *(["--epoch_updates=5", "--init_episode=5"] if program == "RLmain.py" else [])]
        result = run_in_process(tmp_path, program, *flags)
        assert result.returncode == 0, result.stderr
    splits = load_splits(tmp_path / "dataset" / "songs")
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts] == [0.6 * NUM_ROWS, 0.2 * NUM_ROWS, 0.2 * NUM_ROWS]
    assert set(splits.train.fields) == {"place", "genre", "label"}
    np.testing.assert_array_equal(np.sort(np.concatenate([part.timestamp for part in parts])), log["ms"])
    for part, start in zip(parts, log["ms"][[0, int(0.6 * NUM_ROWS), int(0.8 * NUM_ROWS)]], strict=True):
        assert part.timestamp.min() == start
        listeners = log.set_index("ms")["listener"][part.timestamp].to_numpy()
        assert len(set(zip(part.session, listeners, strict=True))) == part.session.max() - part.session.min() + 1
        assert len(set(listeners)) == len(set(part.session))
    happened = sum(part.labels.sum(axis=0) for part in parts)
    assert happened.tolist() == log[["played_ms", "bought_ms"]].notna().sum().tolist()
