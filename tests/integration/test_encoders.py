"""The programs with an encoder of the session: their files are apart from those without one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, command, read_tree, user_error_message

import RLmain
import SLmain
from train.Arguments import RLArguments

TINY: dict[str, Any] = {"embed_dim": 8, "expert_num": 2, "device": "cpu"}


def model_run(**settings: Any) -> None:
    SLmain.main(**{**TINY, "epoch": 1, **settings})


def critics_run(**settings: Any) -> None:
    RLmain.main(RLArguments(**{**TINY, "epoch": 1, "epoch_updates": 5, "init_episode": 200, "batch_size": 64,
                               **settings}))


@pytest.fixture(scope="module")
def plain(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a baseline and critics that do not see the session. Read only."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model_run()
        critics_run()
    return folder


@pytest.fixture
def shop(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and this process in it."""
    folder = Path(shutil.copytree(plain, tmp_path / "shop"))
    monkeypatch.chdir(folder)
    return folder


def test_encoder_runs_leave_plain_files_unchanged(
        shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_tree(shop)
    sees: dict[str, Any] = {"encoder": "gru", "window": 4, "memory_path": "pretrain/memory_gru.npz"}
    command = "python3 SLmain.py --model_name=esmm --expert_num=2 --embed_dim=8 --encoder=gru --window=4"
    assert command in user_error_message(lambda: critics_run(**sees))
    seen = {"encoder": "gru", "window": 4}
    model_run(**seen)
    assert "saved chkpt/SL/rt_esmm_gru/rt_esmm_gru_0.0.pt and pretrain/rt_esmm_gru.pt" in capsys.readouterr().out
    command = "python3 RLmain.py --actor_name=esmm --expert_num=2 --embed_dim=8 --encoder=gru --window=4"
    assert command in user_error_message(lambda: model_run(**seen, polish_lambda=1.0))
    assert "memory.npz: replay buffer metadata mismatch: its window" in user_error_message(lambda: critics_run(**seen))
    critics_run(**sees)
    model_run(**seen, polish_lambda=1.0)
    said = capsys.readouterr().out
    assert "critics of esmm weight the loss of esmm, from chkpt/RL/res_TD3BC_esmm_gru" in said
    assert (shop / "chkpt/SL/rt_esmm_gru/rt_esmm_gru_1.0.pt").exists()
    after = read_tree(shop)
    assert {name: after[name] for name in before} == before

    assert "window is 4, not 5" in user_error_message(lambda: critics_run(**{**sees, "window": 5}))
    assert "memory_gru.npz: replay buffer metadata mismatch" in user_error_message(
        lambda: critics_run(memory_path="pretrain/memory_gru.npz"))
    assert "MetaHeac" in user_error_message(lambda: model_run(**seen, model_name="metaheac"))


def test_critic_encoder_runs_leave_plain_files_unchanged(
        shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_tree(shop)
    sees: dict[str, Any] = {"critic_encoder": "attention", "window": 4}
    command = "python3 RLmain.py --actor_name=esmm --expert_num=2 --embed_dim=8 --critic_encoder=attention --window=4"
    assert command in user_error_message(lambda: model_run(**sees, polish_lambda=1.0))
    assert "memory.npz: replay buffer metadata mismatch: its window" in user_error_message(lambda: critics_run(**sees))
    critics_run(**sees, memory_path="windows.npz")
    model_run(**sees, polish_lambda=1.0)
    assert "from chkpt/RL/res_TD3BC_esmm_critic_attention" in capsys.readouterr().out
    assert (shop / "chkpt/SL/rt_esmm/rt_esmm_1.0_critic_attention.pt").exists()
    after = read_tree(shop)
    assert {name: after[name] for name in before} == before
    text = user_error_message(lambda: model_run(**{**sees, "window": 5}, polish_lambda=1.0))
    assert "critic_window is 4, not 5" in text


def test_killed_encoder_run_resumes_to_same_bytes(shop: Path, tmp_path: Path) -> None:
    model_run(encoder="gru", epoch=3, pretrain_path=str(tmp_path / "p"), save_dir=str(tmp_path / "s"))
    folder = shop / "chkpt/SL/rt_esmm_gru"
    flags = [*(f"--{name}={value}" for name, value in TINY.items()), "--epoch=3", "--encoder=gru"]
    process = subprocess.Popen(command("SLmain.py", *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=ENVIRONMENT)
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed before it ended"
    model_run(encoder="gru", epoch=3, resume=True)
    for mine, other in ((folder / "metrics.csv", tmp_path / "s/rt_esmm_gru/metrics.csv"),
                        (shop / "pretrain/rt_esmm_gru.pt", tmp_path / "p/rt_esmm_gru.pt")):
        assert mine.read_bytes() == other.read_bytes()
