"""The programs on corrupt files: exit code 0, or 2 with one line that names the file, and no traceback."""

from __future__ import annotations

import random
import shutil
import zlib
from pathlib import Path

import corruption
import pytest
from conftest import SUMMARY_LINES, make_once, run, run_in_process

from dataset.prepare import prepare
from dataset.simulate import SimulationConfig, simulate

SIZES = ("--embed_dim=4", "--epoch=1", "--device=cpu")
SL = ("SLmain.py", "--model_name=esmm", *SIZES)
RL = ("RLmain.py", *SIZES, "--epoch_updates=2", "--init_episode=10", "--batch_size=32")
POLISH = (*SL, "--polish=1")
CONSTANT = (*POLISH, "--polish_method=constant")
PREPARE = ("dataset.prepare", "--raw=raw", "--out=out")
CONTROL = "chkpt/SL/rt_esmm/rt_esmm_1.0_constant"
READERS: dict[str, tuple[str, ...]] = {  # file -> the command that reads it
    **{f"raw/{name}": PREPARE for name in ("events.csv", "item_properties_part1.csv", "category_tree.csv", "truth.csv",
                                           "simulation.json")},
    **{f"dataset/rt/{name}": SL for name in ("train.csv", "test.csv", "item_feadf.csv", "truth.csv", "manifest.json")},
    "pretrain/rt_esmm.pt": RL, "pretrain/memory.npz": RL, "chkpt/RL/res_TD3BC_esmm/critic1.pth": POLISH,
    "chkpt/SL/rt_esmm/checkpoint.pt": (*SL, "--resume"), "chkpt/RL/res_TD3BC_esmm/checkpoint.pt": (*RL, "--resume"),
    f"{CONTROL}/config.json": POLISH, f"{CONTROL}/metrics.csv": POLISH}


@pytest.fixture(scope="session")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which every command has been run. Read only."""
    def make(folder: Path) -> None:
        simulate(folder / "raw", SimulationConfig(events=1500, items=80, property_rows=100, seed=1))
        prepare(folder / "raw", folder / "dataset" / "rt")
        for command in (SL, RL, CONSTANT):
            done = run_in_process(folder, *command)
            assert done.returncode == 0, done.stderr
    return make_once(tmp_path_factory, "commands", make)


@pytest.mark.stress
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("file", READERS)
def test_programs_on_a_corrupt_file(pipeline_run: Path, tmp_path: Path, file: str, number: int) -> None:
    rng = random.Random(zlib.crc32(f"{file} {number}".encode()))
    folder = Path(shutil.copytree(pipeline_run, tmp_path / "copy"))
    path = folder / file
    content = path.read_bytes()
    corrupt = (corruption.corrupt_table(rng, content) if path.suffix == ".csv" else
               corruption.corrupt_json(rng, content) if path.suffix == ".json" else
               rng.choice(corruption.BYTES)(rng, content))
    path.unlink()
    if corrupt is corruption.FOLDER:
        path.mkdir()
    else:
        path.write_bytes(corrupt)
    done = run(folder, *READERS[file])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
    SUMMARY_LINES.append(f"command on corrupt {file}: " + (lines[0][:100] if done.returncode else "loaded"))
