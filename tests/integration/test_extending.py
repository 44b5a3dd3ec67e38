"""docs/extending.md: a copy of the repository with its files, its changes and its commands, section by section."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ENVIRONMENT, REPOSITORY

from common.checkpoint import load_tensors

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
PACKAGES = ("common", "dataset", "layers", "slmodels", "agents", "train")
PROGRAMS = ("env.py", "SLmain.py", "RLmain.py")
SIZES = ["--epoch=1", "--embed_dim=4", "--bottom_mlp_dims=8", "--tower_mlp_dims=4"]
SMALL = {"SLmain.py": SIZES, "RLmain.py": [*SIZES, "--epoch_updates=5", "--init_episode=5"]}
# One process for all sections, since importing torch takes longer than they do; their modules are imported anew. Plots
# are not drawn.
FOLLOW = """
import json, runpy, sys
from pathlib import Path
from matplotlib.figure import Figure
Figure.savefig = lambda figure, path, **options: Path(path).touch()
sys.path.insert(0, ".")
for files, commands in json.load(sys.stdin):
    for path, text in files.items():
        Path(path).write_text(text, encoding="utf-8")
    for module in [name for name in sys.modules if Path(name.split(".")[0]).is_dir() or Path(name + ".py").exists()]:
        del sys.modules[module]
    for words in commands:
        sys.argv = words[1:] if words[0] == "-m" else words
        (runpy.run_module if words[0] == "-m" else runpy.run_path)(sys.argv[0], run_name="__main__")
    print("end of section")
"""


def changed(text: str, change: str) -> str:
    """The text with the lines of each hunk that begin with a blank or - replaced by those with a blank or +."""
    for hunk in change.split("@@\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in signs)
                    for signs in (" -", " +"))
        assert text.count(old) == 1, f"these lines are there {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def extended(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The copy after the page, and what the commands of each section print."""
    folder = tmp_path_factory.mktemp("extended")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "rt", "kr"))
    for name in PROGRAMS:
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    sections, now = [], dict[str, str]()
    for section in PAGE.split("\n## ")[1:]:
        files = dict(re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)```", section, re.DOTALL | re.MULTILINE))
        changes = re.findall(r"In `([\w/]+\.py)`:\n\n```diff\n(.*?)```", section, re.DOTALL)
        for path, change in changes:
            files[path] = changed(now.get(path) or (REPOSITORY / path).read_text(encoding="utf-8"), change)
        now |= files
        commands = [line.split() for line in re.findall(r"^    python3 (.*)$", section, re.MULTILINE)]
        for sample in re.findall(r"to try it:\n\n```python\n(.*?)```", section, re.DOTALL):
            files["sample.py"] = sample
            commands.insert(0, ["sample.py"])
        assert section.count("```diff") == len(changes)
        assert section.count("```python") == len({*files} - {path for path, _ in changes}), "all blocks are followed"
        sections.append((files, [[*words, *SMALL.get(words[0], [])] for words in commands]))
    result = subprocess.run([sys.executable, "-B", "-c", FOLLOW], cwd=folder, input=json.dumps(sections), text=True,
                            capture_output=True, env={**ENVIRONMENT, "PYTHONPATH": ""}, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout.split("end of section\n")


def test_every_section_runs(extended: tuple[Path, list[str]]) -> None:
    """Each command of SLmain and RLmain reports the metrics of both tasks."""
    assert [printed.count("task 1, AUC ") for printed in extended[1]] == [2, 3, 1, 1, 1, 0]


def test_new_weighting_has_its_controls(extended: tuple[Path, list[str]]) -> None:
    table = extended[1][1].split("test split")[-1]
    assert [line[:30].strip().split("  ")[0] for line in table.splitlines()[1:6]] == [
        "baseline", "control: constant", "control: root_shuffled", "this run: root", "its last epoch"]


def test_new_feature_is_read(extended: tuple[Path, list[str]]) -> None:
    before, after = (load_tensors(extended[0] / "pretrain" / f"rt_{name}.pt", "")["numerical_num"]
                     for name in ("logistic", "esmm"))
    assert after == before + 1


def test_new_source_and_its_other_task(extended: tuple[Path, list[str]]) -> None:
    folder = extended[0]
    ratings = pd.read_csv(folder / "raw" / "ratings.csv")["rating"]
    for name, label, threshold in (("ratings", "pay", 5.0), ("loved", "loved", 4.5)):
        rows = pd.concat(pd.read_csv(folder / "dataset" / name / f"{split}.csv") for split in ("train", "val", "test"))
        assert rows[["click", label]].sum().tolist() == [(ratings >= 4).sum(), (ratings >= threshold).sum()]
    assert "Loved" in extended[1][4]
