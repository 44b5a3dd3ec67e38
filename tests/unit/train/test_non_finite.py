"""Numbers that are none, critics that diverge, labels that leak: each is told in one line, with the names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error_message
from torch import Tensor, nn

import SLmain
from agents import DDPG_ESMM_BC, ReplayBuffer
from common.checkpoint import load_tensors
from common.finite import NonFiniteMonitor, first_nonfinite_tensor
from dataset.loader import TensorLoader
from dataset.rtrl import RetailRocketRLDataset, load_splits
from dataset.vocabulary import encode_splits
from layers import ESMM
from RLmain import main as train_critics
from slmodels import build
from train import run as loops
from train.Arguments import RLArguments
from train.metrics import auc_leakage_warnings, feature_leakage_warnings
from train.offline_rl import return_bound
from train.supervised import bce_loss, sltrain

SL = {"embed_dim": 8, "epoch": 3, "batch_size": 512, "device": "cpu"}
RL = {"embed_dim": 8, "epoch": 4, "epoch_updates": 10, "init_episode": 50, "batch_size": 64, "device": "cpu",
      "converge_tolerance": 0.0}


@pytest.fixture
def here(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def split(rt_tables: Path) -> RetailRocketRLDataset:
    splits = load_splits(rt_tables)
    encode_splits(splits, 0.2)
    return splits.train


# ------------------------------------------------------------------------------------------------------ losses, weights


def test_monitor_finds_the_first_nonfinite_loss() -> None:
    losses = [[1.0, 2.0], [1.0, float("nan")], [float("inf"), 1.0]]
    watch = NonFiniteMonitor("cpu", 100)
    assert watch.update(1, torch.tensor(losses[0])) is None
    assert watch.update(2, torch.tensor(losses[1])) == (1, 2)
    seldom = NonFiniteMonitor("cpu", 100)
    seldom.interval = 100  # as on a GPU, which is not waited for at every step
    assert [seldom.update(step, torch.tensor(one)) for step, one in enumerate(losses, start=1)] == [None] * 3
    assert seldom.update(4, torch.tensor(losses[0]), last=True) == (1, 2)


@pytest.mark.parametrize(("p", "y"), [(0.3, 1.0), (1.0, 0.0), (0.0, 1.0), (1e-9, 0.0), (0.0, 0.0)])
def test_bce_loss_equals_torch(p: float, y: float) -> None:
    mine, torchs = (torch.tensor([p], requires_grad=True) for _ in range(2))
    loss, expected = bce_loss(mine, torch.tensor([y])), nn.BCELoss(reduction="none")(torchs, torch.tensor([y]))
    loss.sum().backward()
    expected.sum().backward()
    assert torch.equal(loss, expected)
    assert torch.equal(mine.grad, torchs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_loss_of_nan_is_nan(value: float) -> None:
    assert torch.isnan(bce_loss(torch.tensor([[0.5, value]]), torch.ones(1, 2))).tolist() == [[False, True]]


class Weights:
    """A polisher whose weights are wrong for one task."""

    digest = ""

    def weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        return torch.ones_like(labels) * torch.tensor([1.0, float("inf")])

    def weight_statistics(self, task_names: object) -> dict[str, float]:
        return {}


def test_nan_loss_error_names_task_and_tensor(split: RetailRocketRLDataset) -> None:
    model = build("esmm", split.field_dims, split.numerical_num, 8, [16, 8], [8], 2, 4, 0.2)
    loader = TensorLoader(split, 256, seed=1)
    loader.epoch = 7

    def train(**more: Weights) -> None:
        sltrain(model, torch.optim.SGD(model.parameters(), 0.1), loader, bce_loss, "cpu", **more)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = user_error_message(lambda: train(polisher=Weights()))
    assert "task 1: loss is NaN/Inf at epoch 7, step 1 (NaN or infinity in the critics' weights)" in text
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "no step was made"

    bad_row = int(np.random.default_rng([1, 7]).permutation(len(split))[256 * 3 + 5])  # of the fourth batch
    loader.tensors[1][bad_row, 2] = float("nan")
    try:
        text = user_error_message(train)
    finally:
        loader.tensors[1][bad_row, 2] = 0.0
    assert "task 0: loss is NaN/Inf at epoch 7, step 4 (NaN or infinity in numerical_x)" in text

    with torch.no_grad():
        model.towers[1].output.bias.fill_(float("nan"))  # type: ignore[union-attr, index, operator]
    text = user_error_message(train)
    assert "task 1: loss is NaN/Inf at epoch 7, step 1 (NaN or infinity in towers.1.output.bias)" in text


def test_first_nonfinite_tensor_by_name() -> None:
    one, two = nn.Linear(2, 2), nn.BatchNorm1d(2)
    assert first_nonfinite_tensor({"one": one, "two": two}) == ""
    two.running_var[1] = float("inf")  # type: ignore[index]
    assert first_nonfinite_tensor({"one": one, "two": two}) == "two.running_var"
    assert first_nonfinite_tensor({"": two}) == "running_var"


def test_nan_keeps_the_last_good_checkpoint(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers go wrong in the second epoch: state and model are those of the first, and --resume goes on from there."""
    losses = ESMM.losses
    steps: list[int] = []

    def spoiled(self: ESMM, *batch: Any) -> Tensor:
        steps.append(1)
        return losses(self, *batch) * (float("nan") if len(steps) == 8 else 1.0)

    monkeypatch.setattr(ESMM, "losses", spoiled)
    text = user_error_message(lambda: SLmain.main(**SL))
    assert "at epoch 2, step 2 (NaN or infinity in predictions)" in text
    state = load_tensors(here / "chkpt/SL/rt_esmm/checkpoint.pt", "")
    assert state["epoch"] == 1
    saved = load_tensors(here / "chkpt/SL/rt_esmm/rt_esmm_0.0.pt", "")["weights"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in state["model"].items())
    monkeypatch.undo()
    monkeypatch.chdir(here)
    SLmain.main(**SL, resume=True)


# ------------------------------------------------------------------------------------------------------- replay memory


@pytest.mark.parametrize(("name", "told"), [("reward", "the reward of transition 5, task 1, is nan"),
                                            ("action", "the action of transition 5, task 1, is nan"),
                                            ("state", "the state of transition 5, column 1, is nan")])
def test_buffer_refuses_nan(name: str, told: str) -> None:
    memory = ReplayBuffer(3, 2, 10, 2)
    rows = {"state": np.zeros((4, 3), np.float32), "action": np.zeros((4, 2), np.float32),
            "next_state": np.zeros((4, 3), np.float32), "reward": np.zeros((4, 2), np.float32),
            "done": np.zeros(4), "label": np.zeros((4, 2), np.float32)}
    memory.store(**rows)
    rows[name][1, 1] = float("nan")
    assert told in user_error_message(lambda: memory.store(**rows))
    assert len(memory) == 4


# ------------------------------------------------------------------------------------------------------------- critics


def test_return_bound_by_hand() -> None:
    assert return_bound(-1.0, 0.0, 10) == 1.0
    assert return_bound(-2.0, 0.9, 1000) == pytest.approx(20.0)
    assert return_bound(-2.0, 1.0, 10) == 22.0
    assert return_bound(-2.0, 0.99, 4) == 10.0


@pytest.fixture
def trained(here: Path) -> Path:
    SLmain.main(**{**SL, "epoch": 1})
    return here


@pytest.mark.parametrize("reward_type", ["bce", "norm"])
def test_diverged_critics_stop_the_run(trained: Path, reward_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**RL, "reward_type": reward_type, "refill": True}
    train_critics(RLArguments(**settings))
    monkeypatch.setattr(DDPG_ESMM_BC, "td3_target", lambda self, task, critic, target, batch: torch.full_like(
        batch["done"], -1e4 * (self.updates >= 20)))
    text = user_error_message(lambda: train_critics(RLArguments(**settings, critic_lr=0.1)))
    bound = return_bound(float(np.log(1e-4)) if reward_type == "bce" else 1.0, 0.9, 400)
    assert re.search(r"critic 1 \(task 0\) diverged in epoch 3: mean \|Q\| is \S+, its loss \S+: exceeds the "
                     rf"largest possible return \({bound:.3g}", text), text
    assert load_tensors(trained / "chkpt/RL/res_TD3BC_esmm/checkpoint.pt", "")["epoch"] == 2


def test_nan_critic_loss_stops_before_the_step(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = DDPG_ESMM_BC.td3_target
    monkeypatch.setattr(DDPG_ESMM_BC, "td3_target", lambda self, task, *rest: target(self, task, *rest) * (
        float("inf") if task == 1 and self.updates == 12 else 1.0))
    text = user_error_message(lambda: train_critics(RLArguments(**RL)))
    assert text.startswith("the loss of critic2 (task 1) is inf at update 13 (NaN or infinity in Q or the target, of ")
    assert load_tensors(trained / "chkpt/RL/res_TD3BC_esmm/checkpoint.pt", "")["epoch"] == 1


# --------------------------------------------------------------------------------------------------------------- leaks


def test_feature_leakage_is_warned_about(split: RetailRocketRLDataset) -> None:
    assert feature_leakage_warnings(split, "training", ["CTR", "CTCVR"]) == []
    whole = split.numerical.copy()
    try:
        split.numerical[:, 4] = -split.labels[:, 1]  # the other way round is a leak, too
        found = feature_leakage_warnings(split, "training", ["CTR", "CTCVR"])
        assert found == ["warning: CTCVR: the feature 'last_pay' alone has AUC 0.0000 on the training split: "
                         "possible label leakage"]
    finally:
        split.numerical[:] = whole


def test_implausible_auc_is_warned_about() -> None:
    assert auc_leakage_warnings([0.85, float("nan")], "test", ["CTR", "CTCVR"]) == []
    assert auc_leakage_warnings([0.5, 0.995], "test", ["CTR", "CTCVR"]) == [
        "warning: CTCVR: AUC 0.9950 on the test split is above 0.99: possible label leakage"]


def test_run_warns_of_leakage_only_if_present(here: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The label of a row among its own numbers, as a wrong join would put it there."""
    SLmain.main(**{**SL, "epoch": 1})
    assert "warning" not in capsys.readouterr().out
    honest = loops.load_splits

    def leaking(*args: object) -> object:
        splits = honest(*args)  # type: ignore[arg-type]
        for one in (splits.train, splits.val, splits.test):
            one.numerical[:, 3] = one.labels[:, 0]
        return splits

    monkeypatch.setattr(loops, "load_splits", leaking)
    SLmain.main(**{**SL, "epoch": 8, "learning_rate": 0.01})
    said = capsys.readouterr().out
    for split_name in ("training", "validation", "test"):
        assert f"warning: CTR: the feature 'last_click' alone has AUC 1.0000 on the {split_name} split" in said
    assert re.search(r"warning: CTR: AUC (0\.99\d\d|1\.0000) on the test split is above 0\.99", said)
