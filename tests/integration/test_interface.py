"""The documented interface, written from the user's page alone: each item of that page, called as documented.

Positional and by keyword, texts and paths, lists and arrays, torch's DataLoader and the resident loader, plain and
wrapped environments. What a call gives is compared with a closed form wherever there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import inspect
import io
import json
import math
import os
import pty
import re
import shutil
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, read_tree, run_in_process, user_error_message
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit, TransformReward
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

import RLmain
import SLmain
from agents.DDPG_ESMM import DDPG_ESMM
from agents.DDPG_ESMM_BC import DDPG_ESMM_BC
from agents.DDPG_ESMM_multiweight import DDPG_ESMM_multiweight
from agents.ReplayBuffer import ReplayBuffer
from common.checkpoint import get_optim_param
from common.errors import UserError
from dataset.loader import TensorLoader
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.vocabulary import Catemapper
from env import MTEnv, compute_reward
from layers.critic import Critic, CriticNeg
from layers.esmm import ESMM
from layers.layers import EmbeddingLayer, MultiLayerPerceptron
from slmodels import MODELS
from train import run as loops
from train.Arguments import Arguments, RLArguments, SLArguments
from train.polish import RlLossPolisher
from train.utils import ActionNormalizer, ConvergeStopper, EarlyStopper

Floats = NDArray[np.float32]
AnyEnv = gym.Env[Any, Any]
MakeAgent = Callable[..., DDPG_ESMM]

SIZES: dict[str, Any] = {"embed_dim": 4, "bottom_mlp_dims": (8, 4), "tower_mlp_dims": (4,)}
FLAGS = ["--embed_dim=4", "--bottom_mlp_dims=8,4", "--tower_mlp_dims=4", "--expert_num=2", "--device=cpu"]
SL_FLAGS = [*FLAGS, "--epoch=1", "--batch_size=512"]
RL_FLAGS = [*FLAGS, "--epoch=1", "--epoch_updates=5", "--init_episode=50", "--batch_size=64"]
AGENT_CLASSES = (DDPG_ESMM, DDPG_ESMM_multiweight, DDPG_ESMM_BC)
NETWORKS = ("pretrain_actor", "actor", "actor_target", "critic1", "critic2", "critic1_target", "critic2_target")
FUNCTIONS = ("get_dataset", "get_model", "sltrain", "sltest", "slpred")  # that SLmain.py imports
MAIN: dict[str, Any] = {  # in the page's order
    "dataset_name": "rt", "dataset_path": "dataset", "task_num": 2, "expert_num": 2, "model_name": "esmm", "epoch": 1,
    "learning_rate": 2e-3, "feature_map_rate": 0.2, "batch_size": 512, "embed_dim": 4, "weight_decay": 1e-5,
    "polish_lambda": 0.0, "device": "cpu", "save_dir": "chkpt/SL"}
FIELD_DIMS = (3, 5)


# ------------------------------------------------------------------------------------------------------ shared fixtures


@dataclass(frozen=True)
class BaselineRun:
    """A working folder after one documented call of `main`: its output and result, and the functions it called.
    """

    folder: Path
    printed: str
    metrics: list[Any]
    called: set[str]

    @property
    def pretrain(self) -> Path:
        return self.folder / "pretrain"


@pytest.fixture(scope="module")
def baseline_run(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> BaselineRun:
    """The esmm baseline, trained by `main` with its fourteen arguments by position. Read only."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    called: set[str] = set()

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(loops, name)

        @functools.wraps(function)
        def noted(*given: Any, **more: Any) -> Any:
            called.add(name)
            return function(*given, **more)

        return noted

    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        for name in FUNCTIONS:
            patch.setattr(SLmain, name, watched(name), raising=False)
        metrics = SLmain.main(*MAIN.values(), bottom_mlp_dims=(8, 4), tower_mlp_dims=(4,))
    return BaselineRun(folder, printed.getvalue(), metrics, called)


@pytest.fixture
def workdir(baseline_run: BaselineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the baseline_run, and this process in it."""
    folder = Path(shutil.copytree(baseline_run.folder, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def splits(baseline_run: BaselineRun) -> Splits:
    """The data set with its ids, by the documented calls. Read only."""
    found = loops.get_dataset("rt", str(baseline_run.folder / "dataset"))
    catemapper = Catemapper(0.2).fit(found.train)
    for split in (found.train, found.val, found.test):
        catemapper.map(split)
    return found


@pytest.fixture(scope="module")
def make_agent(baseline_run: BaselineRun, splits: Splits) -> MakeAgent:
    """Makes an agent of a class on the validation sessions, or on an environment that is given."""
    def make(cls: type[DDPG_ESMM] = DDPG_ESMM, env: AnyEnv | None = None, **hyparams: Any) -> DDPG_ESMM:
        return cls(MTEnv(splits.val) if env is None else env, pretrain_path=baseline_run.pretrain,
                   **{"memory_size": 5_000, "batch_size": 64, **hyparams})
    return make


def load_weights(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=True)["weights"])


def copy_weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def has_changed(network: nn.Module, before: dict[str, Tensor]) -> bool:
    return not same_weights(copy_weights(network), before)


def constant(network: nn.Module, value: float = 0.5) -> nn.Module:
    """The network with every parameter of one value, in eval mode: its output is then simple arithmetic."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)
    return network.eval()


def batch(size: int, dims: Sequence[int] = FIELD_DIMS, numerical_num: int = 2) -> tuple[Tensor, Tensor]:
    """Random ids (B, F) and numbers (B, N)."""
    return (torch.stack([torch.randint(dim, (size,)) for dim in dims], dim=1), torch.randn(size, numerical_num))


def first_rows(split: RetailRocketRLDataset, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first rows of a split as tensors: ids, numbers, labels."""
    ids, numbers, labels = (torch.from_numpy(one[:count]) for one in (split.categorical, split.numerical, split.labels))
    return ids, numbers, labels


def all_states(split: RetailRocketRLDataset) -> Floats:
    """The states of a split as an environment shows them, (n, F + N)."""
    return np.hstack([split.categorical, split.numerical]).astype(np.float32)


def transitions(split: RetailRocketRLDataset, count: int = 60) -> dict[str, Floats]:
    """Transitions by hand; every third one ends its session."""
    states, rng = all_states(split), np.random.default_rng(3)
    return {"state": states[:count], "action": rng.random((count, 2), np.float32), "next_state": states[1:count + 1],
            "reward": -rng.random((count, 2), np.float32), "done": (np.arange(count) % 3 == 2).astype(np.float32),
            "label": split.labels[:count]}


def handmade(lengths: Sequence[int], labels: Sequence[Sequence[int]]) -> RetailRocketRLDataset:
    """Sessions of these lengths with these labels, of three items, with ids."""
    rows = np.arange(sum(lengths))
    table = pd.DataFrame({"timestamp": 1000 * rows, "sessionid": np.repeat(np.arange(len(lengths)), lengths),
                          "itemid": rows % 3, "click": [row[0] for row in labels], "pay": [row[1] for row in labels]})
    items = pd.DataFrame({"itemid": [0, 1, 2], "785": ["a", "b", "a"], "591": ["c", "d", "e"]})
    dataset = RetailRocketRLDataset(table, items, ["785", "591"], ["click", "pay"])
    return Catemapper(1.0).fit(dataset).map(dataset)


class ConstantCritic(CriticNeg):
    """A critic whose output is a constant."""

    def __init__(self, split: RetailRocketRLDataset, value: float) -> None:
        super().__init__(split.field_dims, split.numerical_num, 4, (8, 4), (4,))
        self.value = value

    def forward(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        return torch.full((len(categorical_x),), self.value) + 0 * action.sum()


class CountingEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Counts the steps that an environment makes and the sessions that it begins."""

    def __init__(self, env: AnyEnv) -> None:
        super().__init__(env)
        self.steps, self.resets = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.resets += 1
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        return super().step(action)


# ------------------------------------------------------------------------------------------ the page: the code's layout

NAMES = [
    ("layers.layers", "EmbeddingLayer"), ("layers.layers", "MultiLayerPerceptron"), ("layers.critic", "Critic"),
    ("layers.critic", "CriticNeg"), ("layers.esmm", "ESMM"), ("dataset.rtrl", "RetailRocketRLDataset"),
    ("env", "MTEnv"), ("agents.ReplayBuffer", "ReplayBuffer"), ("agents.DDPG_ESMM", "DDPG_ESMM"),
    ("agents.DDPG_ESMM_multiweight", "DDPG_ESMM_multiweight"), ("agents.DDPG_ESMM_BC", "DDPG_ESMM_BC"),
    ("train.Arguments", "Arguments"), ("train.utils", "get_optim_param"), ("train.utils", "Catemapper"),
    ("train.utils", "EarlyStopper"), ("train.utils", "ConvergeStopper"), ("train.utils", "ActionNormalizer"),
    ("train.utils", "RlLossPolisher"), *(("train.run", name) for name in FUNCTIONS), ("train.run", "one_iter_offline"),
    ("train.run", "train_and_test_offline"), ("train.run", "test"), ("train.run", "plot_loss"),
    ("train.run", "load_model"), ("SLmain", "main"), ("RLmain", "create_sub_agent"),
]


def test_each_documented_name_is_where_documented() -> None:
    page = (REPOSITORY / "docs" / "interface.md").read_text(encoding="utf-8")
    for module, name in NAMES:
        assert re.search(rf"\b{name}\b", page), name
        found = getattr(importlib.import_module(module), name)
        assert callable(found)
        assert inspect.getdoc(found)


def test_each_documented_folder_is_there() -> None:
    for folder in ("layers", "slmodels", "agents", "train", "dataset", "chkpt", "pretrain"):
        assert (REPOSITORY / folder).is_dir()


SIZES_OF_NETWORKS = ["categorical_field_dims", "numerical_num", "embed_dim", "bottom_mlp_dims", "tower_mlp_dims"]
SIGNATURES: list[tuple[Callable[..., Any], list[str], dict[str, Any]]] = [
    (EmbeddingLayer, ["field_dims", "embed_dim"], {}),
    (MultiLayerPerceptron, ["input_dim", "embed_dims", "dropout", "output_layer"], {"output_layer": True}),
    (Critic, [*SIZES_OF_NETWORKS, "dropout"], {"dropout": 0.2}),
    (CriticNeg, [*SIZES_OF_NETWORKS, "dropout"], {"dropout": 0.2}),
    (ESMM, [*SIZES_OF_NETWORKS, "task_num", "dropout"], {"dropout": 0.2}),
    (Critic.forward, ["self", "categorical_x", "numerical_x", "action"], {}),
    (CriticNeg.forward, ["self", "categorical_x", "numerical_x", "action"], {}),
    (ESMM.forward, ["self", "categorical_x", "numerical_x"], {}),
    (loops.get_dataset, ["name", "path"], {}),
    (loops.get_model, ["name", "categorical_field_dims", "numerical_num", "task_num", "expert_num", "embed_dim"], {}),
    (loops.sltrain, ["model", "optimizer", "data_loader", "criterion", "device", "polisher", "log_interval"],
     {"polisher": None, "log_interval": 100}),
    (loops.sltest, ["model", "data_loader", "task_num", "device"], {}),
    (loops.slpred, ["model", "data_loader", "task_num", "device"], {}),
    (SLmain.main, list(MAIN), {"dataset_name": "rt", "model_name": "esmm", "polish_lambda": 0.0, "embed_dim": 128}),
    (ReplayBuffer, ["state_dim", "action_dim", "size", "batch_size"], {}),
    (RLmain.create_sub_agent, ["env", "actor_name", "agentcls", "hyparams"], {}),
    (loops.one_iter_offline, ["agent"], {}),
    (loops.train_and_test_offline, ["environment", "agent", "epoch", "init_episode", "save_dir", "memory_path"], {}),
    (loops.test, ["environment", "agent", "save_dir"], {}),
    *((getattr(cls, name), ["self", *arguments], {}) for cls in AGENT_CLASSES for name, arguments in {
        "select_action": ["state"], "process_batch": ["transition"], "get_aloss": ["transition"], "update": [],
        "get_closs": ["critic_id", "critic", "critic_target", "transition"], "_target_soft_update": ["tau"],
        "save_or_load_agent": ["cwd", "if_save"]}.items()),
]


def test_arguments_have_documented_names_and_order() -> None:
    """Whatever comes after the documented ones has a default, or gathers what is left."""
    for function, names, defaults in SIGNATURES:
        parameters = list(inspect.signature(function).parameters.values())
        assert [one.name for one in parameters[:len(names)]] == names
        assert all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters[:len(names)])
        assert {one.name: one.default for one in parameters if one.name in defaults} == defaults
        for one in parameters[len(names):]:
            assert one.default is not one.empty or one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL)


# ---------------------------------------------------------------------------------------- the page: reading and writing


def test_tables_have_the_documented_columns(baseline_run: BaselineRun) -> None:
    folder = baseline_run.folder / "dataset" / "rt"
    assert (folder / "train.csv").read_text().splitlines()[0].split(",")[:5] == [
        "timestamp", "sessionid", "itemid", "pay", "click"]
    items = (folder / "item_feadf.csv").read_text().splitlines()[0].split(",")
    assert items[0] == "itemid"
    assert len(items) > 1


def test_sessions_are_split_six_two_two(splits: Splits) -> None:
    counts = [len(set(split.session)) for split in (splits.train, splits.val, splits.test)]
    np.testing.assert_allclose(np.array(counts) / sum(counts), [0.6, 0.2, 0.2], atol=0.03)
    assert not set(splits.train.session) & set(splits.test.session)


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_the_data_set_reads_a_path(baseline_run: BaselineRun, name: str) -> None:
    """Ids of items and sessions, times and labels are those of the table, in order of session and time."""
    for kind in (str, Path):
        path = baseline_run.folder / "dataset" / "rt" / f"{name}.csv"
        dataset = RetailRocketRLDataset(kind(path))
        with path.open() as file:
            table = sorted((int(row["sessionid"]), int(row["timestamp"]), int(row["itemid"]), float(row["click"]),
                            float(row["pay"])) for row in csv.DictReader(file))
        found = zip(dataset.session.tolist(), dataset.timestamp.tolist(), dataset.itemid.tolist(),
                    *dataset.labels.T.tolist(), strict=True)
        assert sorted(found) == table
        assert (np.diff(np.flatnonzero(np.append(True, np.diff(dataset.session) != 0))) > 0).all()
        starts = 1 + int((np.diff(dataset.session) != 0).sum())
        assert len(set(dataset.session)) == starts, "a session's rows are together"
        assert dataset.numerical.shape == (len(dataset), dataset.numerical_num)
        assert "ids" in user_error_message(lambda dataset=dataset: dataset.categorical)


def test_an_example_is_ids_numbers_labels(splits: Splits) -> None:
    ids, numbers, labels = splits.train[5]
    assert ids.shape == (len(splits.train.field_dims),)
    assert ids.dtype == np.int64
    assert numbers.shape == (splits.train.numerical_num,)
    assert labels.shape == (2,)
    np.testing.assert_array_equal(ids, splits.train.categorical[5])
    np.testing.assert_array_equal(labels, splits.train.labels[5])


def test_the_data_set_works_in_dataloaders(splits: Splits) -> None:
    batches = list(DataLoader(splits.val, batch_size=128))
    for column, expected in zip(zip(*batches, strict=True), first_rows(splits.val), strict=True):
        assert torch.equal(torch.cat(column), expected)


# ----------------------------------------------------------------------------------------------------- the page: layers


def test_embeddings_give_each_field_its_table() -> None:
    """(B, F) ids to (B, F, D): one vector for every value of every field, and no two the same."""
    for kind in (list, tuple, np.array):
        layer = EmbeddingLayer(field_dims=kind([2, 3]), embed_dim=4)
        assert sum(parameter.numel() for parameter in layer.parameters()) == (2 + 3) * 4
        every = layer(torch.tensor([[0, 0], [1, 1], [0, 2]]))
        assert every.shape == (3, 2, 4)
        assert torch.equal(every[0, 0], every[2, 0])
        distinct = torch.stack([every[0, 0], every[1, 0], every[0, 1], every[1, 1], every[2, 1]])
        assert len(distinct.detach().unique(dim=0)) == 5


def test_perceptron_with_and_without_output_layer() -> None:
    """All parameters 0.5: 3 * 0.5 + 0.5 = 2 in each hidden unit, and 2 * 2 * 0.5 + 0.5 = 2.5 out of two of them."""
    for kind in (list, tuple, np.array):
        ones = torch.ones(7, 3)
        with_output = constant(MultiLayerPerceptron(3, kind([2]), 0.2))(ones)
        assert with_output.shape == (7, 1)
        assert with_output.flatten().tolist() == pytest.approx([2.5] * 7)
        perceptron = MultiLayerPerceptron(input_dim=3, embed_dims=kind([2]), dropout=0.2, output_layer=False)
        without = constant(perceptron)(ones)
        assert without.shape == (7, 2)
        assert without.flatten().tolist() == pytest.approx([2.0] * 14)


def test_perceptron_drops_units_in_training_only() -> None:
    perceptron = MultiLayerPerceptron(3, [64], 0.5, output_layer=False)
    x = torch.ones(1, 3)
    alive = perceptron.eval()(x) > 0
    dropped = (perceptron.train()(x) == 0) & alive
    assert 0.2 < dropped.sum() / alive.sum() < 0.8


@pytest.mark.parametrize(("cls", "expected"), [(Critic, 1.25), (CriticNeg, -1.25)])
def test_critic_by_its_closed_form(cls: type[Critic], expected: float) -> None:
    """All parameters 0.5, all widths 1: blocks 0.5 and 0.5 (ids), 1 and 1 (number and action), then three layers."""
    critic = constant(cls([2, 3], 1, 1, [1], [1], 0.2))
    q = critic(torch.tensor([[1, 2]] * 4), torch.ones(4, 1), torch.ones(4, 1))
    assert q.shape == (4,)
    assert q.tolist() == pytest.approx([expected] * 4)


@pytest.mark.parametrize("cls", [Critic, CriticNeg])
def test_critic_takes_positions_keywords_arrays(cls: type[Critic]) -> None:
    for kind in (list, tuple, np.array):
        by_position = cls(kind(FIELD_DIMS), 2, 4, kind([8, 4]), kind([4]))
        by_keyword = cls(categorical_field_dims=kind(FIELD_DIMS), numerical_num=2, embed_dim=4,
                         bottom_mlp_dims=kind([8, 4]), tower_mlp_dims=kind([4]), dropout=0.2)
        by_keyword.load_state_dict(by_position.state_dict())
        ids, numbers = batch(6)
        action = torch.rand(6, 1)
        assert torch.equal(by_position.eval()(ids, numbers, action), by_keyword.eval()(
            categorical_x=ids, numerical_x=numbers, action=action))


@pytest.mark.parametrize("cls", [Critic, CriticNeg])
def test_flat_actions_equal_column_actions(cls: type[Critic]) -> None:
    """Also where B is a width of the network, such as 512: nothing may be spread over the wrong axis."""
    for size in (1, 2, 4, 8, 512):
        critic = cls(FIELD_DIMS, 2, 4, (512, 8), (4,)).eval()
        ids, numbers = batch(size)
        action = torch.rand(size)
        q = critic(ids, numbers, action)
        assert q.shape == (size,)
        assert torch.equal(q, critic(ids, numbers, action[:, None]))
        alone = torch.cat([critic(ids[[at]], numbers[[at]], action[at:at + 1]) for at in range(min(size, 8))])
        torch.testing.assert_close(q[:8], alone)


@pytest.mark.parametrize("cls", [Critic, CriticNeg])
def test_one_sample_gives_one_score(cls: type[Critic]) -> None:
    for shape in ((), (1,)):
        critic = cls(FIELD_DIMS, 2, 4, (8, 4), (4,)).eval()
        ids, numbers = batch(3)
        q = critic(ids[1], numbers[1], torch.full(shape, 0.3))
        assert q.shape == (1,)
        torch.testing.assert_close(q, critic(ids, numbers, torch.full((3, 1), 0.3))[1:2])


def test_other_shapes_of_action_are_refused() -> None:
    for shape in ((6, 2), (5,), (5, 1), (1, 6), (6, 1, 1), ()):
        critic = CriticNeg(FIELD_DIMS, 2, 4, (8, 4), (4,))
        with pytest.raises(ValueError, match="action"):
            critic(*batch(6), torch.rand(shape))


def test_critic_sees_ids_numbers_and_action() -> None:
    critic = Critic(FIELD_DIMS, 2, 16, (32, 16), (16,)).eval()
    ids, numbers, action = torch.tensor([[0, 0]]), torch.zeros(1, 2), torch.zeros(1)
    q = critic(ids, numbers, action)
    for other in ((torch.tensor([[1, 0]]), numbers, action), (torch.tensor([[0, 4]]), numbers, action),
                  (ids, torch.tensor([[1.0, 0.0]]), action), (ids, torch.tensor([[0.0, 1.0]]), action),
                  (ids, numbers, torch.ones(1))):
        assert not torch.equal(q, critic(*other))


def test_negative_critic_is_never_positive() -> None:
    q = CriticNeg(FIELD_DIMS, 2, 4, (8, 4), (4,)).eval()(*batch(500), torch.rand(500))
    assert (q <= 0).all()
    assert (q < 0).any()


@pytest.mark.parametrize("cls", [Critic, CriticNeg])
def test_critic_dropout_defaults_to_a_fifth(cls: type[Critic]) -> None:
    for dropout in (None, 0.0):
        critic = cls(FIELD_DIMS, 2, 4, (64, 32), (32,), *([] if dropout is None else [dropout])).train()
        ids, numbers = batch(20)
        action = torch.rand(20)
        again = torch.equal(critic(ids, numbers, action), critic(ids, numbers, action))
        assert again == (dropout == 0.0)


def test_esmm_by_its_closed_form() -> None:
    """All parameters 0.5, all widths 1: each tower's score is 1.125; later tasks are products with the first."""
    for task_num in (1, 2, 3):
        model = constant(ESMM([2, 3], 1, 1, [1], [1], task_num, 0.2))
        p = 1 / (1 + math.exp(-1.125))
        out = model(torch.tensor([[1, 2]] * 4), torch.ones(4, 1))
        assert out.shape == (4, task_num)
        assert out[0].tolist() == pytest.approx([p, *[p * p] * (task_num - 1)])


def test_esmm_takes_positions_keywords_arrays() -> None:
    for kind in (list, tuple, np.array):
        by_position = ESMM(kind(FIELD_DIMS), 2, 4, kind([8, 4]), kind([4]), 2, 0.2)
        by_keyword = ESMM(categorical_field_dims=kind(FIELD_DIMS), numerical_num=2, embed_dim=4,
                          bottom_mlp_dims=kind([8, 4]), tower_mlp_dims=kind([4]), task_num=2)
        by_keyword.load_state_dict(by_position.state_dict())
        ids, numbers = batch(6)
        assert torch.equal(by_position.eval()(ids, numbers),
                           by_keyword.eval()(categorical_x=ids, numerical_x=numbers))


# --------------------------------------------------------------------------------------------------- the page: slmodels


@pytest.mark.parametrize("name", MODELS)
def test_models_take_and_give_the_same(name: str) -> None:
    """(B, F) and (B, N) to (B, T) probabilities; one sample without a batch axis to (T,)."""
    for kind in (list, np.array):
        model = loops.get_model(name, kind(FIELD_DIMS), 2, 2, 2, 4, bottom_mlp_dims=kind([8, 4]),
                                tower_mlp_dims=kind([4]))
        ids, numbers = batch(6)
        out = model.eval()(ids, numbers)
        assert out.shape == (6, 2)
        assert ((out > 0) & (out < 1)).all()
        one = model(ids[2], numbers[2])
        assert one.shape == (2,)
        torch.testing.assert_close(one, out[2])


@pytest.mark.parametrize("name", MODELS)
def test_models_have_preset_widths(name: str) -> None:
    """The six documented arguments are enough."""
    model = loops.get_model(name=name, categorical_field_dims=[2, 3], numerical_num=1, task_num=2, expert_num=2,
                            embed_dim=4)
    widths = {size for parameter in model.parameters() for size in parameter.shape}
    assert {256, 128, 64} <= widths
    assert any(size % 512 == 0 for size in widths), "experts may lie side by side"
    assert model.eval()(*batch(3, (2, 3), 1)).shape == (3, 2)


def test_the_linked_model_package_is_credited() -> None:
    texts = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/interface.md")]
    assert any("github.com/easezyc/Multitask-Recommendation-Library" in text for text in texts)


# ------------------------------------------------------------------------------ the page: SLmain.py, imported functions


def test_get_dataset_takes_folder_parent_or_table(baseline_run: BaselineRun, splits: Splits) -> None:
    for where in ("dataset", "dataset/rt", "dataset/rt/train.csv"):
        for kind in (str, Path):
            before = read_tree(baseline_run.folder)
            found = loops.get_dataset(name="rt", path=kind(baseline_run.folder / where))
            assert found.fingerprint == splits.fingerprint
            assert found.task_names == ["CTR", "CTCVR"]
            assert [len(one) for one in (found.train, found.val, found.test)] == [
                len(one) for one in (splits.train, splits.val, splits.test)]
            assert read_tree(baseline_run.folder) == before, "a getter writes nothing"


@pytest.mark.parametrize("where", ["mine", "mine/train.csv"])
def test_get_dataset_reads_a_folder_named_otherwise(rt_tables: Path, splits: Splits, tmp_path: Path,
                                                    where: str) -> None:
    shutil.copytree(rt_tables, tmp_path / "mine")
    assert loops.get_dataset("rt", tmp_path / where).fingerprint == splits.fingerprint
    assert read_tree(tmp_path / "mine") == read_tree(rt_tables)
    assert os.listdir(tmp_path) == ["mine"]


def small_model(splits: Splits, task_num: int = 2) -> nn.Module:
    """A small model without dropout, the same every time."""
    torch.manual_seed(1)
    return loops.get_model("esmm", splits.train.field_dims, splits.train.numerical_num, task_num, 2, 4,
                           bottom_mlp_dims=(8, 4), tower_mlp_dims=(4,), dropout=0.0)


def train_one_epoch(splits: Splits, loader: Any, criterion: Any, polisher: Any = None,
                    rate: float = 0.1) -> tuple[dict[str, Tensor], float]:
    """The weights after an epoch of SGD, and its loss."""
    model = small_model(splits)
    loss = loops.sltrain(model, torch.optim.SGD(model.parameters(), rate), loader, criterion, "cpu", polisher)
    return copy_weights(model), loss


def make_loader(split: RetailRocketRLDataset, kind: str, batch_size: int = 200) -> Any:
    """The same batches in four forms: resident, torch's, torch's with a worker, a plain list."""
    if kind == "resident":
        return TensorLoader(split, batch_size)
    if kind == "list":
        return list(DataLoader(split, batch_size))
    return DataLoader(split, batch_size, num_workers=int(kind == "worker"))


LOADERS = ["resident", "torch", "worker", "list"]


@pytest.mark.parametrize("kind", LOADERS[1:])
def test_sltrain_takes_any_loader(splits: Splits, kind: str) -> None:
    """The same batches, the same steps, the same loss."""
    weights, loss = train_one_epoch(splits, make_loader(splits.val, kind), nn.BCELoss())
    expected, expected_loss = train_one_epoch(splits, make_loader(splits.val, "resident"), nn.BCELoss())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name])
    assert not same_weights(weights, copy_weights(small_model(splits)))


def test_sltrain_returns_the_epochs_mean_loss(splits: Splits) -> None:
    """With a rate of 0 it is the cross-entropy of the model as it is."""
    ids, numbers, labels = first_rows(splits.val)
    with torch.no_grad():
        expected = F.binary_cross_entropy(small_model(splits)(ids, numbers), labels)
    for criterion in (nn.BCELoss(), nn.BCELoss(reduction="none"), F.binary_cross_entropy):
        _, loss = train_one_epoch(splits, DataLoader(splits.val, batch_size=900), criterion, rate=0.0)
        assert isinstance(loss, float)
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_sltrain_takes_keywords_and_torch_devices(splits: Splits) -> None:
    model = small_model(splits)
    loops.sltrain(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1),
                  data_loader=make_loader(splits.val, "resident"), criterion=nn.BCELoss(), device=torch.device("cpu"),
                  polisher=None, log_interval=1)
    expected, _ = train_one_epoch(splits, make_loader(splits.val, "resident"), nn.BCELoss())
    assert same_weights(copy_weights(model), expected)


def make_polisher(splits: Splits, model: nn.Module | None = None, method: str = "label") -> RlLossPolisher:
    """By `label`: weights of 1 where there is no click, 4 where there is one, 6 where there is a purchase."""
    critics = [ConstantCritic(splits.train, -3.0), ConstantCritic(splits.train, -5.0)]
    return RlLossPolisher(small_model(splits) if model is None else model, critics, 1.0, method)


def test_critics_weights_act_on_bceloss(splits: Splits) -> None:
    """One step of SGD is -rate times the gradient of mean(w * cross-entropy), for every reduction."""
    for reduction in ("mean", "none"):
        for kind in ("resident", "torch"):
            ids, numbers, labels = first_rows(splits.val)
            model = small_model(splits)
            start = copy_weights(model)
            w = 1 + torch.tensor([3.0, 5.0]) * labels
            (w * F.binary_cross_entropy(model(ids, numbers), labels, reduction="none")).mean().backward()
            weights, _ = train_one_epoch(splits, make_loader(splits.val, kind, 900), nn.BCELoss(reduction=reduction),
                                        make_polisher(splits))
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                torch.testing.assert_close(weights[name], start[name] - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)
            plain, _ = train_one_epoch(splits, make_loader(splits.val, kind, 900), nn.BCELoss())
            assert max(float((weights[name] - plain[name]).abs().max()) for name in weights) > 1e-4


def test_an_averaging_criterion_with_polisher_is_refused(splits: Splits) -> None:
    model = small_model(splits)
    before = copy_weights(model)
    with pytest.raises(ValueError, match=r"polish|weight|averag|reduction"):
        loops.sltrain(model, torch.optim.SGD(model.parameters(), 0.1), make_loader(splits.val, "torch"),
                      F.binary_cross_entropy, "cpu", make_polisher(splits))
    assert same_weights(copy_weights(model), before)


def test_an_unreduced_criterion_function_is_weighted(splits: Splits) -> None:
    def criterion(p: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(p, y, reduction="none")

    one, _ = train_one_epoch(splits, make_loader(splits.val, "torch"), criterion, make_polisher(splits))
    two, _ = train_one_epoch(splits, make_loader(splits.val, "torch"), nn.BCELoss(), make_polisher(splits))
    plain, _ = train_one_epoch(splits, make_loader(splits.val, "torch"), criterion)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name])
    assert max(float((tensor - plain[name]).abs().max()) for name, tensor in one.items()) > 1e-4


def test_sltest_gives_auc_and_logloss(splits: Splits) -> None:
    """As scikit-learn computes them, one number a task."""
    for kind in LOADERS:
        model = small_model(splits)
        with torch.no_grad():
            p = model.eval()(*first_rows(splits.test)[:2]).double().numpy()
        auc, logloss = loops.sltest(model, make_loader(splits.test, kind), 2, "cpu")
        assert [type(one) for one in (*auc, *logloss)] == [float] * 4
        labels = splits.test.labels
        assert auc == pytest.approx([roc_auc_score(labels[:, task], p[:, task]) for task in range(2)], abs=1e-6)
        assert logloss == pytest.approx([log_loss(labels[:, task], p[:, task]) for task in range(2)], rel=1e-5)


def test_slpred_gives_each_tasks_predictions(splits: Splits) -> None:
    """In the order of the rows, without dropout."""
    for kind in LOADERS:
        model = small_model(splits).train()
        predictions = loops.slpred(model=model, data_loader=make_loader(splits.test, kind), task_num=2, device="cpu")
        assert isinstance(predictions, list)
        assert [type(one) for one in predictions] == [np.ndarray, np.ndarray]
        with torch.no_grad():
            expected = model.eval()(*first_rows(splits.test)[:2]).numpy()
        np.testing.assert_allclose(np.column_stack(predictions), expected, rtol=1e-5)


def test_one_task_is_tested_alone(splits: Splits) -> None:
    model = small_model(splits, 1)
    auc, logloss = loops.sltest(model, DataLoader(splits.val, 200), 1, "cpu")
    assert len(auc) == len(logloss) == len(loops.slpred(model, DataLoader(splits.val, 200), 1, "cpu")) == 1


def test_data_of_the_users_own_are_trained(splits: Splits) -> None:
    """Whoever makes ids, numbers and labels trains, tests and predicts with them."""
    dataset = handmade([3, 2, 4], [[1, 1], [0, 0], [1, 0]] * 3)
    model = loops.get_model("mmoe", dataset.field_dims, dataset.numerical_num, 2, 2, 4,
                            bottom_mlp_dims=(8, 4), tower_mlp_dims=(4,))
    loader = DataLoader(dataset, 4, shuffle=True)
    assert loops.sltrain(model, torch.optim.Adam(model.parameters()), loader, nn.BCELoss(), "cpu") > 0
    assert len(loops.sltest(model, DataLoader(dataset, 4), 2, "cpu")[0]) == 2


# -------------------------------------------------------------------------------------------- the page: SLmain.py, main


def test_every_argument_of_main_has_a_default() -> None:
    parameters = inspect.signature(SLmain.main).parameters
    assert all(parameters[name].default is not inspect.Parameter.empty for name in MAIN)


def test_each_argument_by_position_arrives(baseline_run: BaselineRun) -> None:
    for name in MAIN:
        config = json.loads((baseline_run.folder / "chkpt/SL/rt_esmm/config.json").read_text())
        assert config["settings"][name] == MAIN[name]


def test_main_calls_each_documented_function(baseline_run: BaselineRun) -> None:
    assert baseline_run.called == set(FUNCTIONS)
    assert all(getattr(SLmain, name) is getattr(loops, name) for name in FUNCTIONS)


def test_main_returns_one_figure_set_a_task(baseline_run: BaselineRun) -> None:
    assert isinstance(baseline_run.metrics, list)
    assert [0 < one.auc < 1 and one.logloss > 0 for one in baseline_run.metrics] == [True, True]


def test_main_prints_figures_in_full(baseline_run: BaselineRun) -> None:
    lines = baseline_run.printed.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("test: best auc: "))
    assert re.fullmatch(r"test: best auc: 0\.\d{6,}", lines[at])
    assert lines[at + 1:at + 3] == [f"task {task}, AUC {one.auc!r}, Log-loss {one.logloss!r}"
                                    for task, one in enumerate(baseline_run.metrics)]


def test_the_best_auc_is_the_saved_models(baseline_run: BaselineRun, splits: Splits) -> None:
    """The mean over the tasks on the validation split; the figures of the tasks are those on the test split."""
    model = loops.load_model(baseline_run.folder / "chkpt/SL/rt_esmm/rt_esmm_0.0.pt")
    auc, _ = loops.sltest(model, DataLoader(splits.val, 300), 2, "cpu")
    found = re.search(r"test: best auc: (\S+)", baseline_run.printed)
    assert found
    assert float(found[1]) == pytest.approx(np.mean(auc), abs=1e-6)
    auc, logloss = loops.sltest(model, DataLoader(splits.test, 300), 2, "cpu")
    assert auc == pytest.approx([one.auc for one in baseline_run.metrics], abs=1e-6)
    assert logloss == pytest.approx([one.logloss for one in baseline_run.metrics], rel=1e-5)


def test_the_saved_model_is_ready(baseline_run: BaselineRun, splits: Splits) -> None:
    for kind in (str, Path):
        model = loops.load_model(kind(baseline_run.pretrain / "rt_esmm.pt"), device="cpu")
        assert not model.training
        assert same_weights(copy_weights(model), load_weights(baseline_run.folder / "chkpt/SL/rt_esmm/rt_esmm_0.0.pt"))
        mapped = model.catemapper.map(loops.get_dataset("rt", baseline_run.folder / "dataset").test)
        np.testing.assert_array_equal(mapped.categorical, splits.test.categorical)


def test_the_saved_model_knows_its_sizes(baseline_run: BaselineRun) -> None:
    for name, value in (
        ("model_name", "esmm"), ("task_num", 2), ("tasks", ["CTR", "CTCVR"]), ("embed_dim", 4), ("expert_num", 2),
        ("bottom_mlp_dims", [8, 4]), ("tower_mlp_dims", [4]), ("encoder", "none")):
        found = loops.load_model(baseline_run.pretrain / "rt_esmm.pt").metadata[name]
        assert (list(found) if isinstance(value, list) else found) == value


def test_the_saved_model_knows_its_data(baseline_run: BaselineRun, splits: Splits) -> None:
    metadata = loops.load_model(baseline_run.pretrain / "rt_esmm.pt").metadata
    assert list(metadata["field_dims"]) == splits.train.field_dims
    assert metadata["numerical_num"] == splits.train.numerical_num
    assert metadata["data"] == splits.fingerprint
    assert metadata["features"] == splits.train.metadata["features"]


def test_keywords_lists_and_paths_give_the_same(workdir: Path) -> None:
    """Another folder for the trial; the baseline stays byte for byte, and nothing is set aside."""
    baseline = (workdir / "pretrain/rt_esmm.pt").read_bytes()
    SLmain.main(**{**MAIN, "dataset_path": Path("dataset"), "save_dir": Path("trial")}, bottom_mlp_dims=[8, 4],
                tower_mlp_dims=[4])
    weights = load_weights(workdir / "trial/rt_esmm/rt_esmm_0.0.pt")
    assert same_weights(weights, load_weights(workdir / "pretrain/rt_esmm.pt"))
    assert same_weights(weights, load_weights(workdir / "chkpt/SL/rt_esmm/rt_esmm_0.0.pt"))
    assert (workdir / "pretrain/rt_esmm.pt").read_bytes() == baseline
    assert [path.name for path in (workdir / "pretrain").iterdir()] == ["rt_esmm.pt"]


def test_a_trial_keeps_the_good_baseline_aside(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial of other sizes and rates in a folder of its own replaces the baseline, and prints in one line what it
    keeps; its feature_map_rate makes other field dims."""
    good = load_weights(workdir / "pretrain/rt_esmm.pt")
    SLmain.main(**{**MAIN, "save_dir": "trial", "embed_dim": 3, "feature_map_rate": 0.9}, bottom_mlp_dims=(6, 5),
                tower_mlp_dims=(4,))
    assert same_weights(load_weights(workdir / "pretrain/rt_esmm.previous.pt"), good)
    lines = [line for line in capsys.readouterr().out.splitlines() if "rt_esmm.previous.pt" in line]
    assert len(lines) == 1
    before, now = (loops.load_model(workdir / "pretrain" / name).metadata
                   for name in ("rt_esmm.previous.pt", "rt_esmm.pt"))
    assert now["embed_dim"] == 3
    assert list(now["bottom_mlp_dims"]) == [6, 5]
    assert sum(now["field_dims"]) > sum(before["field_dims"])


def test_weight_decay_acts(workdir: Path) -> None:
    SLmain.main(**{**MAIN, "weight_decay": 0.1, "save_dir": "trial"}, bottom_mlp_dims=(8, 4), tower_mlp_dims=(4,))
    assert not same_weights(load_weights(workdir / "trial/rt_esmm/rt_esmm_0.0.pt"),
                    load_weights(workdir / "chkpt/SL/rt_esmm/rt_esmm_0.0.pt"))


# ---------------------------------------------------------------------------------------- the page: the documented runs


@dataclass(frozen=True)
class TerminalRun:
    """What a command left: its folder, its standard output, and the lines that stay on the terminal."""

    folder: Path
    printed: str
    screen: list[str]


@pytest.fixture(scope="module")
def terminal_run(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> TerminalRun:
    """`python3 SLmain.py --model_name=esmm` with its error stream on a terminal. Read only."""
    folder = tmp_path_factory.mktemp("typed")
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (50, 120))
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(terminal, 4096):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(its_end, "w", encoding="utf-8") as stream:
        done = run_in_process(folder, "SLmain.py", "--model_name=esmm", *SL_FLAGS, stderr=stream)
    reader.join()
    os.close(terminal)
    text = b"".join(shown).decode()
    assert done.returncode == 0, text
    return TerminalRun(folder, done.stdout, list(screen(text)))


def screen(shown: str) -> Iterator[str]:
    """The lines as a reader sees them at the end: what comes after a carriage return is written over what was there."""
    for line in shown.split("\n"):
        text = ""
        for part in line.split("\r"):
            text = part + text[len(part):]
        yield text.rstrip()


def test_the_final_bar_stays_on_terminals(terminal_run: TerminalRun) -> None:
    bars = [line for line in terminal_run.screen if re.search(r"100%\|.*\|\s*(\d+)/\1\b", line)]
    assert len(bars) == 1, "that of the final test, and those of the epochs are gone"


def test_flags_of_widths_reach_the_model(terminal_run: TerminalRun) -> None:
    metadata = loops.load_model(terminal_run.folder / "pretrain/rt_esmm.pt").metadata
    assert list(metadata["bottom_mlp_dims"]) == [8, 4]
    assert list(metadata["tower_mlp_dims"]) == [4]


@pytest.mark.parametrize("script", ["SLmain.py", "RLmain.py"])
def test_widths_that_cannot_be_are_refused(tmp_path: Path, script: str) -> None:
    for flag in ("--bottom_mlp_dims=0,4", "--tower_mlp_dims=wide", "--bottom_mlp_dims="):
        done = run_in_process(tmp_path, script, flag)
        assert done.returncode == 2
        assert flag.split("=")[0] in done.stderr
        assert done.stderr.count("\n") == 1
        assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------- the page: agents, ReplayBuffer


def test_the_buffer_stores_and_samples_documented_names() -> None:
    """What is drawn is what was stored, row by row; no transition twice in a batch."""
    memory = ReplayBuffer(state_dim=3, action_dim=2, size=50, batch_size=20)
    rng = np.random.default_rng(0)
    rows = [{"state": rng.random(3, np.float32), "action": rng.random(2, np.float32),
             "next_state": rng.random(3, np.float32), "reward": rng.random(2, np.float32), "done": number % 2 == 0,
             "label": rng.integers(0, 2, 2).astype(np.float32)} for number in range(30)]
    for row in rows:
        memory.store(*row.values())
    assert len(memory) == 30
    drawn = memory.sample_batch()
    assert {"state", "action", "next_state", "reward", "done", "label"} <= drawn.keys()
    assert drawn["state"].shape == drawn["next_state"].shape == (20, 3)
    assert drawn["action"].shape == drawn["reward"].shape == drawn["label"].shape == (20, 2)
    assert drawn["done"].shape == (20,)
    by_first = {float(row["state"][0]): row for row in rows}
    assert len({float(one) for one in drawn["state"][:, 0]}) == 20
    for at in range(20):
        row = by_first[float(drawn["state"][at, 0])]
        assert all(np.array_equal(drawn[name][at], value) for name, value in row.items())


def test_the_buffer_takes_keywords_and_many() -> None:
    for kind in (list, np.array):
        for name in ("next_state", "nstate"):
            memory = ReplayBuffer(1, 2, 4, 8)
            many = {"state": [[0], [1], [2], [3], [4], [5]], "action": [[0, 1]] * 6, "reward": [[-1, -2]] * 6,
                    "done": [0, 0, 1, 0, 0, 1], "label": [[1, 0]] * 6, name: [[1], [2], [3], [4], [5], [6]]}
            memory.store(**{key: kind(value) for key, value in many.items()})
            assert len(memory) == 4, "the oldest two are gone"
            drawn = memory.sample_batch()
            assert sorted(drawn["state"].ravel().tolist()) == [2, 3, 4, 5]
            np.testing.assert_array_equal(drawn["next_state"], drawn["state"] + 1)
            np.testing.assert_array_equal(drawn["done"], np.isin(drawn["state"].ravel(), [2, 5]))


# ------------------------------------------------------------------------------ the page: agents, DDPG_ESMM, its tables

TABLES: dict[str, Any] = {
    "env": inspect.Parameter.empty, "actor_name": "esmm", "gamma": 0.9, "pretrain_path": "./pretrain",
    "embed_dim": 128, "bottom_mlp_dims": (512, 256), "tower_mlp_dims": (128, 64), "ou_noise_theta": 0,
    "ou_noise_gamma": 0.4, "memory_size": 500_000, "actor_reg": 0, "tau": 0.2, "soft_update_freq": 2,
    "actor_update_freq": 2, "init_training_step": 10_000, "ips": False, "batch_size": 512, "drop_out": 0.2,
    "actor_lr": 1e-3, "critic_lr": 1e-3}


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_each_row_of_the_tables(cls: type[DDPG_ESMM]) -> None:
    """Name, place and default, as `help` shows them."""
    for place, name in enumerate(TABLES):
        shown = list(inspect.signature(cls).parameters.values())
        assert shown[place].name == name
        assert shown[place].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert shown[place].default == TABLES[name]


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_the_environment_alone_is_enough(cls: type[DDPG_ESMM], baseline_run: BaselineRun, splits: Splits,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven networks, all of the sizes of the baseline in ./pretrain."""
    monkeypatch.chdir(baseline_run.folder)
    agent = cls(MTEnv(splits.train))
    for name in NETWORKS:
        network = getattr(agent, name)
        assert isinstance(network, CriticNeg if "critic" in name else ESMM)
        assert 512 not in {size for parameter in network.parameters() for size in parameter.shape}
    for name in ("pretrain_actor", "actor", "actor_target"):
        assert same_weights(copy_weights(getattr(agent, name)), load_weights(baseline_run.pretrain / "rt_esmm.pt"))
    for name in ("critic1", "critic2"):
        assert same_weights(copy_weights(getattr(agent, name)), copy_weights(getattr(agent, f"{name}_target")))
    assert isinstance(agent.memory, ReplayBuffer)


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_all_documented_arguments_by_position(cls: type[DDPG_ESMM], baseline_run: BaselineRun, splits: Splits) -> None:
    given = {**TABLES, "env": MTEnv(splits.val), "pretrain_path": str(baseline_run.pretrain), "embed_dim": 4,
             "bottom_mlp_dims": [8, 4], "tower_mlp_dims": np.array([4]), "memory_size": 100, "batch_size": 8}
    agent = cls(*given.values())
    loops.one_iter_offline(agent)
    assert len(agent.memory) == 100
    assert len(agent.memory.sample_batch()["done"]) == 8


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_a_size_unlike_the_baselines_is_refused(cls: type[DDPG_ESMM], make_agent: MakeAgent) -> None:
    for size in ({"embed_dim": 5}, {"bottom_mlp_dims": (8, 5)}, {"tower_mlp_dims": (5,)}):
        assert next(iter(size)) in user_error_message(lambda size=size: make_agent(cls, **size))


def test_an_agent_without_its_baseline_is_refused(splits: Splits, baseline_run: BaselineRun, tmp_path: Path) -> None:
    env = MTEnv(splits.val)
    assert "rt_esmm.pt" in user_error_message(lambda: DDPG_ESMM(env, pretrain_path=tmp_path))
    assert "rt_ple.pt" in user_error_message(lambda: DDPG_ESMM(env, "ple", pretrain_path=str(baseline_run.pretrain)))


def test_a_baseline_of_other_data_is_refused(make_agent: MakeAgent) -> None:
    assert user_error_message(lambda: make_agent(env=MTEnv(handmade([3, 2], [[0, 0]] * 5))))


def test_a_baseline_of_other_ids_is_refused(baseline_run: BaselineRun, make_agent: MakeAgent) -> None:
    found = loops.get_dataset("rt", baseline_run.folder / "dataset")
    Catemapper(0.9).fit(found.train).map(found.val)
    assert user_error_message(lambda: make_agent(env=MTEnv(found.val)))


def test_a_baseline_of_other_features_is_refused(baseline_run: BaselineRun, make_agent: MakeAgent,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The same columns computed in another way are other features, though they have the same shapes."""
    computed = importlib.import_module("dataset.rtrl").session_features
    for module in ("dataset.rtrl", "dataset.features"):  # where they are computed, and where their digest is
        monkeypatch.setattr(f"{module}.session_features", lambda *given, **more: 2 * computed(*given, **more))
    found = loops.get_dataset("rt", baseline_run.folder / "dataset")
    Catemapper(0.2).fit(found.train).map(found.val)
    assert "feature" in user_error_message(lambda: make_agent(env=MTEnv(found.val)))


# ----------------------------------------------------------------------------- the page: agents, DDPG_ESMM, its methods


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_an_action_for_any_numeric_state(cls: type[DDPG_ESMM], make_agent: MakeAgent, splits: Splits) -> None:
    for dtype in (np.float32, np.float64, np.float16, np.int64, list):
        agent, state = make_agent(cls), np.round(all_states(splits.val)[7])
        given = state.tolist() if dtype is list else state.astype(dtype)
        action = agent.select_action(given)
        assert isinstance(action, np.ndarray)
        assert action.shape == (2,)
        assert agent.env.action_space.contains(action)
        np.testing.assert_allclose(agent.select_action(given, noise=False), agent.select_action(state, noise=False),
                                   rtol=1e-6)


def prediction(agent: DDPG_ESMM, split: RetailRocketRLDataset, row: int) -> Floats:
    """The actor's prediction for one row."""
    ids, numbers, _ = split[row]
    with torch.no_grad():
        answer: Floats = agent.actor.eval()(torch.from_numpy(ids)[None], torch.from_numpy(numbers)[None])[0].numpy()
    return answer


def test_without_noise_the_action_is_the_prediction(make_agent: MakeAgent, splits: Splits) -> None:
    agent = make_agent()
    np.testing.assert_allclose(agent.select_action(all_states(splits.val)[7], noise=False),
                               prediction(agent, splits.val, 7), rtol=1e-6)


def test_noise_has_the_documented_mean_and_variance(make_agent: MakeAgent, splits: Splits) -> None:
    """Reflection at 0 and 1 leaves cos(pi a) as it is, and its mean is cos(pi (p + mean)) exp(-pi^2 variance / 2)."""
    for mean, variance in ((0.0, 0.4), (0.0, 0.02), (0.3, 0.02)):
        agent, state = make_agent(ou_noise_theta=mean, ou_noise_gamma=variance), all_states(splits.val)[7]
        actions = np.array([agent.select_action(state) for _ in range(600)])
        assert ((actions >= 0) & (actions <= 1)).all()
        assert ((actions == 0) | (actions == 1)).mean() < 0.01, "no mass on the edges"
        expected = np.cos(np.pi * (prediction(agent, splits.val, 7) + mean)) * np.exp(-np.pi**2 * variance / 2)
        np.testing.assert_allclose(np.cos(np.pi * actions).mean(axis=0), expected, atol=0.1)


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_a_batch_becomes_tensors(cls: type[DDPG_ESMM], make_agent: MakeAgent, splits: Splits) -> None:
    agent = make_agent(cls)
    agent.memory.store(**transitions(splits.val))
    sampled = agent.memory.sample_batch()
    processed = agent.process_batch(sampled)
    assert processed
    assert all(isinstance(one, Tensor) for one in processed.values())
    for name in ("action", "reward", "done", "label"):
        np.testing.assert_array_equal(processed[name].numpy(), sampled[name])


def critic_loss(agent: DDPG_ESMM, sampled: dict[str, Any], task: int = 0, critic: nn.Module | None = None,
                target: nn.Module | None = None) -> float:
    """The critic's loss of a processed batch, by the documented call."""
    pair = [(agent.critic1, agent.critic1_target), (agent.critic2, agent.critic2_target)][task]
    loss = agent.get_closs(task, (critic or pair[0]).eval(), (target or pair[1]).eval(), agent.process_batch(sampled))
    assert isinstance(loss, Tensor)
    assert loss.shape == ()
    return float(loss.detach())


def test_plain_critics_target_in_closed_form(make_agent: MakeAgent, splits: Splits) -> None:
    """mean (r + gamma (1 - done) Q_target(s', actor_target(s')) - Q(s, a))^2, computed from the states by hand."""
    agent, given = make_agent(gamma=0.7, drop_out=0.0), transitions(splits.val)
    agent.memory.store(**given)
    sampled = agent.memory.sample_batch()
    fields = len(splits.val.field_dims)
    with torch.no_grad():
        now, after = ((torch.from_numpy(sampled[name][:, :fields]).long(), torch.from_numpy(sampled[name][:, fields:]))
                      for name in ("state", "next_state"))
        follows = agent.actor_target(*after)
        for task, (critic, target) in enumerate(((agent.critic1, agent.critic1_target),
                                                 (agent.critic2, agent.critic2_target))):
            q = critic(*now, torch.from_numpy(sampled["action"][:, task]))
            expected = torch.from_numpy(sampled["reward"][:, task]) + 0.7 * (
                1 - torch.from_numpy(sampled["done"])) * target(*after, follows[:, task])
            assert critic_loss(agent, sampled, task) == pytest.approx(float(((expected - q) ** 2).mean()), rel=1e-4)


@pytest.mark.parametrize(("cls", "next_value"), [(DDPG_ESMM, -1.0), (DDPG_ESMM_BC, -2.0)])
def test_only_bc_takes_the_smaller_value(cls: type[DDPG_ESMM], next_value: float, make_agent: MakeAgent,
                                         splits: Splits) -> None:
    """A critic of -2, a target of -1."""
    agent, given = make_agent(cls, gamma=0.5), transitions(splits.val)
    agent.memory.store(**given)
    expected = ((given["reward"][:, 1] + 0.5 * (1 - given["done"]) * next_value + 2.0) ** 2).mean()
    found = critic_loss(agent, agent.memory.sample_batch(), 1, ConstantCritic(splits.val, -2.0),
                        ConstantCritic(splits.val, -1.0))
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("cls", "smooths"), [(DDPG_ESMM, False), (DDPG_ESMM_BC, True)])
def test_only_bc_smooths_the_target(cls: type[DDPG_ESMM], smooths: bool, make_agent: MakeAgent, splits: Splits) -> None:
    """With noise on the next action the same batch gives another loss each time; without it the same."""
    agent = make_agent(cls)
    agent.memory.store(**transitions(splits.val))
    sampled = agent.memory.sample_batch()
    losses = {critic_loss(agent, sampled) for _ in range(5)}
    assert (len(losses) > 1) == smooths
    assert max(losses) - min(losses) < 0.1


@pytest.mark.parametrize(("cls", "normalizes"), [(DDPG_ESMM, False), (DDPG_ESMM_BC, True)])
def test_only_bc_normalizes_numbers(cls: type[DDPG_ESMM], normalizes: bool, make_agent: MakeAgent,
                                    splits: Splits) -> None:
    """Numbers in another unit give the same loss where they are normalized by the memory, without a further call.
    Every transition is a last one, so that no actor is needed."""
    agents = [make_agent(cls, drop_out=0.0), make_agent(cls, drop_out=0.0)]
    agents[1].critic1.load_state_dict(agents[0].critic1.state_dict())
    fields, losses = len(splits.val.field_dims), []
    for agent, (scale, shift) in zip(agents, ((1_000.0, 0.0), (8_000.0, 500.0)), strict=True):
        given = {**transitions(splits.val), "done": np.ones(60, np.float32)}
        for name in ("state", "next_state"):
            given[name] = given[name].copy()
            given[name][:, fields:] = given[name][:, fields:] * scale + shift
        agent.memory.store(**given)
        losses.append(critic_loss(agent, agent.memory.sample_batch()))
    assert (losses[0] == pytest.approx(losses[1], rel=0.01)) == normalizes


@pytest.mark.parametrize(("cls", "value", "expected"), [
    (DDPG_ESMM, -3.0, 6.0), (DDPG_ESMM, -6.0, 12.0), (DDPG_ESMM_BC, -3.0, 2.0), (DDPG_ESMM_BC, -6.0, 2.0)])
def test_actor_loss_in_closed_form(cls: type[DDPG_ESMM], value: float, expected: float, make_agent: MakeAgent,
                                   splits: Splits) -> None:
    """-mean(Q_1 + Q_2), by BC divided by mean |Q|."""
    agent = make_agent(cls)
    agent.critic1, agent.critic2 = ConstantCritic(splits.val, value), ConstantCritic(splits.val, value)
    agent.memory.store(**transitions(splits.val))
    aloss, aloss_reg = agent.get_aloss(agent.process_batch(agent.memory.sample_batch()))
    assert aloss.shape == aloss_reg.shape == ()
    assert float(aloss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(aloss_reg.detach()) == 0


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_the_pull_grows_with_actor_reg(cls: type[DDPG_ESMM], make_agent: MakeAgent, splits: Splits) -> None:
    """actor_reg times the mean squared distance to the pretrained actor: 0 where the two are one."""
    found = []
    for actor_reg, moves in ((0.0, True), (1.0, True), (3.0, True), (3.0, False)):
        agent = make_agent(cls, actor_reg=actor_reg, drop_out=0.0)
        if moves:
            constant(agent.actor, 0.1)
        agent.memory.store(**transitions(splits.val))
        found.append(float(agent.get_aloss(agent.process_batch(agent.memory.sample_batch()))[1].detach()))
    assert found[0] == 0
    assert found[1] > 0
    assert found[2] == pytest.approx(3 * found[1], rel=1e-4)
    assert found[3] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_an_update_returns_four_losses(cls: type[DDPG_ESMM], make_agent: MakeAgent, splits: Splits) -> None:
    agent = make_agent(cls)
    agent.memory.store(**transitions(splits.val))
    before = {name: copy_weights(getattr(agent, name)) for name in NETWORKS}
    losses = agent.update()
    assert len(losses) == 4
    assert all(isinstance(one, Tensor) and one.shape == () and torch.isfinite(one) for one in losses)
    assert float(losses[0]) > 0
    assert {name for name in NETWORKS if has_changed(getattr(agent, name), before[name])} >= {"critic1", "critic2"}
    assert not has_changed(agent.pretrain_actor, before["pretrain_actor"])


@pytest.mark.parametrize(("cls", "trains"), [(DDPG_ESMM, True), (DDPG_ESMM_multiweight, True), (DDPG_ESMM_BC, False)])
def test_the_actor_trains_after_init_training_step(cls: type[DDPG_ESMM], trains: bool, make_agent: MakeAgent,
                                                   splits: Splits) -> None:
    agent = make_agent(cls, init_training_step=3, actor_update_freq=1)
    agent.memory.store(**transitions(splits.val))
    before = copy_weights(agent.actor)
    for _ in range(3):
        agent.update()
    assert not has_changed(agent.actor, before)
    for _ in range(2):
        agent.update()
    assert has_changed(agent.actor, before) == trains


def test_the_actor_trains_every_so_many_updates(make_agent: MakeAgent, splits: Splits) -> None:
    agent, steps = make_agent(init_training_step=0, actor_update_freq=3), []
    agent.memory.store(**transitions(splits.val))
    for _ in range(9):
        before = copy_weights(agent.actor)
        agent.update()
        steps.append(has_changed(agent.actor, before))
    assert sum(steps) == 3
    at = [number for number, step in enumerate(steps) if step]
    assert np.diff(at).tolist() == [3, 3]


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_targets_follow_every_so_many_updates(cls: type[DDPG_ESMM], make_agent: MakeAgent, splits: Splits) -> None:
    """With tau = 1 they arrive at once."""
    agent = make_agent(cls, soft_update_freq=3, tau=1.0)
    agent.memory.store(**transitions(splits.val))
    equal = []
    for _ in range(6):
        agent.update()
        equal.append(same_weights(copy_weights(agent.critic1), copy_weights(agent.critic1_target)))
    assert equal == [False, False, True] * 2


def test_a_rate_of_zero_moves_nothing(make_agent: MakeAgent, splits: Splits) -> None:
    for name in ("critic_lr", "actor_lr"):
        agent = make_agent(init_training_step=0, actor_update_freq=1, **{name: 0.0})
        agent.memory.store(**transitions(splits.val))
        before = {one: copy_weights(getattr(agent, one)) for one in ("actor", "critic1", "critic2")}
        for _ in range(3):
            agent.update()
        still = {one for one in before if all(
            torch.equal(parameter, before[one][key]) for key, parameter in getattr(agent, one).named_parameters())}
        assert still == ({"critic1", "critic2"} if name == "critic_lr" else {"actor"})


def test_drop_out_reaches_the_critics(make_agent: MakeAgent, splits: Splits) -> None:
    for drop_out in (0.0, 0.5):
        agent = make_agent(drop_out=drop_out)
        ids, numbers, _ = first_rows(splits.val, 50)
        critic = agent.critic1.train()
        answers = [critic(ids, numbers, torch.zeros(50)) for _ in range(2)]
        assert torch.equal(*answers) == (drop_out == 0.0)


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_soft_updates_in_closed_form(cls: type[DDPG_ESMM], make_agent: MakeAgent) -> None:
    """(1 - tau) target + tau network."""
    for tau in (0.0, 0.25, 1.0):
        agent = make_agent(cls)
        pairs = [("critic1", "critic1_target"), ("critic2", "critic2_target")]
        pairs += [("actor", "actor_target")] if cls is not DDPG_ESMM_BC else []
        for network, target in pairs:
            constant(getattr(agent, network), 3.0)
            constant(getattr(agent, target), 1.0)
        agent._target_soft_update(tau=tau)
        for network, target in pairs:
            for parameter in getattr(agent, target).parameters():
                assert torch.allclose(parameter, torch.tensor(1.0 + 2.0 * tau))
            for parameter in getattr(agent, network).parameters():
                assert (parameter == 3.0).all()


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_seven_networks_are_saved_and_loaded(cls: type[DDPG_ESMM], make_agent: MakeAgent, tmp_path: Path) -> None:
    """torch alone reads the files; loading gives every network its weights back."""
    for kind in (str, Path):
        agent = make_agent(cls)
        before = {name: copy_weights(getattr(agent, name)) for name in NETWORKS}
        agent.save_or_load_agent(kind(tmp_path / "saved"), True)
        assert {path.name for path in (tmp_path / "saved").iterdir()} == {f"{name}.pth" for name in NETWORKS}
        for name in NETWORKS:
            assert same_weights(load_weights(tmp_path / "saved" / f"{name}.pth"), before[name])
            constant(getattr(agent, name), 0.25)
        agent.save_or_load_agent(cwd=kind(tmp_path / "saved"), if_save=False)
        for name in NETWORKS:
            assert not has_changed(getattr(agent, name), before[name])


def test_loading_from_an_empty_folder_is_refused(make_agent: MakeAgent, tmp_path: Path) -> None:
    agent = make_agent()
    before = {name: copy_weights(getattr(agent, name)) for name in NETWORKS}
    assert user_error_message(lambda: agent.save_or_load_agent(str(tmp_path), False))
    assert not any(has_changed(getattr(agent, name), before[name]) for name in NETWORKS)


def loss_share(agent: DDPG_ESMM, labels: Floats, chosen: NDArray[np.bool_], task: int, splits: Splits) -> float:
    """The loss of a critic that is right everywhere but on the chosen samples, whose error is 1."""
    given = {**transitions(splits.val, len(labels)), "done": np.ones(len(labels), np.float32), "label": labels}
    given["reward"] = np.where(chosen[:, None], -1.0, -2.0).astype(np.float32).repeat(2, axis=1)
    agent.memory.store(**given)
    critic = ConstantCritic(splits.val, -2.0)
    return critic_loss(agent, agent.memory.sample_batch(), task, critic, critic)


PAIRS = np.array([[0, 0]] * 40 + [[1, 0]] * 15 + [[1, 1]] * 5, np.float32)  # of click and purchase


def test_ips_weighs_pairs_of_labels_alike(make_agent: MakeAgent, splits: Splits) -> None:
    """DDPG_ESMM, one weight a sample: with ips every pair of labels has the same share of the loss; without it the
    share that it has among the samples."""
    for ips in (True, False):
        for task in (0, 1):
            shares = [loss_share(make_agent(ips=ips), PAIRS, np.all(pair == PAIRS, axis=1), task, splits)
                      for pair in ([0, 0], [1, 0], [1, 1])]
            expected = [1 / 3] * 3 if ips else [40 / 60, 15 / 60, 5 / 60]
            np.testing.assert_allclose(np.array(shares) / sum(shares), expected, rtol=1e-3)


@pytest.mark.parametrize("cls", [DDPG_ESMM_multiweight, DDPG_ESMM_BC])
def test_ips_weighs_each_tasks_labels_alike(cls: type[DDPG_ESMM], make_agent: MakeAgent, splits: Splits) -> None:
    """One weight a sample and task: with ips positives have half of a task's loss, be they ever so few."""
    for ips in (True, False):
        for task, positives in ((0, 20), (1, 5)):
            shares = [loss_share(make_agent(cls, ips=ips), PAIRS, PAIRS[:, task] == label, task, splits)
                      for label in (0, 1)]
            np.testing.assert_allclose(np.array(shares) / sum(shares),
                                       [0.5, 0.5] if ips else [1 - positives / 60, positives / 60], rtol=1e-3)


def test_bc_trains_critics_only(make_agent: MakeAgent, splits: Splits) -> None:
    agent = make_agent(DDPG_ESMM_BC, init_training_step=0, actor_update_freq=1)
    assert isinstance(agent, DDPG_ESMM_multiweight)
    loops.one_iter_offline(agent)
    before = {name: copy_weights(getattr(agent, name)) for name in NETWORKS}
    for _ in range(4):
        agent.update()
    trained = {name for name in NETWORKS if any(not torch.equal(parameter, before[name][key])
                                                for key, parameter in getattr(agent, name).named_parameters())}
    assert trained == {"critic1", "critic2", "critic1_target", "critic2_target"}


# ----------------------------------------------------------------------------------------------------- the page: env.py


def test_the_environment_rewards_each_task() -> None:
    """Observation, vector reward, two flags and info, session after session."""
    for reward_type, label, expected in (
        ("bce", 1, math.log(0.3)), ("bce", 0, math.log(0.7)), ("norm", 1, -0.7), ("norm", 0, -0.3)):
        env = MTEnv(handmade([2, 1], [[label, 1 - label]] * 3), reward_type=reward_type, is_test=True)
        ends = []
        for _ in range(2):
            observation, _ = env.reset(seed=1)
            terminated = False
            while not terminated:
                assert env.observation_space.contains(observation)
                observation, reward, terminated, truncated, info = env.step(np.array([0.3, 0.7], np.float32))
                assert reward.tolist() == pytest.approx([expected, expected], rel=1e-5)
                assert info["label"].tolist() == [label, 1 - label]
                assert info["action"].tolist() == pytest.approx([0.3, 0.7])
                assert truncated is False
                ends.append(terminated)
        assert ends == [False, True, True]


def test_gymnasium_makes_the_environment_by_name(splits: Splits) -> None:
    env = gym.make("RMTL/MTEnv-v0", dataset=splits.val, reward_type="norm")
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    action = np.array([0.25, 0.5], np.float32)
    _, reward, _, _, info = env.step(action)
    np.testing.assert_allclose(np.asarray(reward), -np.abs(action - info["label"]), rtol=1e-6)


def test_a_vector_environment_of_summed_rewards(splits: Splits) -> None:
    """SyncVectorEnv supports scalar rewards only: a wrapper sums the tasks."""
    def one() -> AnyEnv:
        return TransformReward(MTEnv(splits.val), lambda reward: float(np.sum(reward)))

    many = gym.vector.SyncVectorEnv([one, one])
    observations, _ = many.reset(seed=1)
    assert observations.shape[0] == 2
    action = np.full((2, 2), 0.25, np.float32)
    _, rewards, _, _, info = many.step(action)
    np.testing.assert_allclose(rewards, compute_reward(action, info["label"], "bce").sum(axis=1), rtol=1e-5)


# ------------------------------------------------------------------------------------------- the page: train, Arguments


def test_arguments_has_all_three_kinds() -> None:
    for name in (
        "task_num", "expert_num", "embed_dim", "bottom_mlp_dims", "tower_mlp_dims",  # of the model
        "epoch", "batch_size", "seed", "device",  # of training
        "dataset_name", "dataset_path", "pretrain_path", "save_dir"):
        assert hasattr(Arguments(), name)
        assert getattr(Arguments(**{name: getattr(Arguments(), name)}), name) == getattr(Arguments(), name)


@pytest.mark.parametrize("kind", [SLArguments, RLArguments])
def test_the_programs_settings_extend_arguments(kind: type[Arguments]) -> None:
    assert issubclass(kind, Arguments)
    assert is_dataclass(kind)
    assert {one.name for one in fields(Arguments)} < {one.name for one in fields(kind)}
    assert kind().bottom_mlp_dims == (512, 256)
    assert kind().tower_mlp_dims == (128, 64)
    with pytest.raises(TypeError):
        kind(2)  # type: ignore[call-arg]


def test_arguments_refuses_what_cannot_be() -> None:
    assert "--embed_dim" in user_error_message(lambda: Arguments(embed_dim=0))
    assert "--batch_size" in user_error_message(lambda: Arguments(batch_size=0))


def test_settings_have_the_documented_defaults() -> None:
    """Those of the tables, and of `main`."""
    settings = RLArguments()
    for name, value in TABLES.items():
        if name not in ("env", "pretrain_path"):
            assert getattr(settings, name) == value, name
    assert Path(settings.pretrain_path) == Path("./pretrain")
    assert settings.epoch * settings.epoch_updates > settings.init_training_step, "ddpg's actor trains by default"
    defaults = {name: one.default for name, one in inspect.signature(SLmain.main).parameters.items() if name in MAIN}
    assert {name: getattr(SLArguments(), name) for name in MAIN} == defaults


# ----------------------------------------------------------------------------------------------- the page: train, utils


def test_get_optim_param_gives_the_optimizers_tensors() -> None:
    """Of Adam: step, mean and square of each parameter's gradient."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    assert get_optim_param(optimizer) == []
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    found = get_optim_param(optimizer)
    assert [tuple(one.shape) for one in found] == [(), (2, 3), (2, 3), (), (2,), (2,)]
    torch.testing.assert_close(found[1], torch.full((2, 3), 0.1))


def long_tail(count: int, most: int) -> RetailRocketRLDataset:
    """One field of `count` values; the first has `most` rows, the others one each."""
    values = ["a"] * most + [f"b{number:03}" for number in range(count - 1)]
    rows = np.arange(len(values))
    table = pd.DataFrame({"timestamp": rows, "sessionid": rows, "itemid": rows, "click": 0, "pay": 0})
    return RetailRocketRLDataset(table, pd.DataFrame({"itemid": rows, "785": values}), ["785"], ["click", "pay"])


def test_the_threshold_acts_on_many_values() -> None:
    """Without naming a field: 300 of 600 rows have one value. Unseen and rare values are id 0."""
    for threshold, kept in ((0.1, 1), (0.5, 1), (0.6, 61), (1.0, 301)):
        dataset = long_tail(301, 300)
        catemapper = Catemapper(threshold).fit(dataset)
        assert catemapper.field_dims == [kept + 1]
        ids = catemapper.map(dataset).categorical
        assert ids.shape == (600, 1)
        assert (ids[:300] == 1).all()
        assert int((ids == 0).sum()) == 301 - kept
        unseen = catemapper.map(long_tail(1, 2))
        assert (unseen.categorical == 1).all()


def test_the_threshold_spares_fields_of_few_values() -> None:
    assert Catemapper(0.1).fit(long_tail(20, 300)).field_dims == [21]


def test_catemapper_follows_the_data_sets_own_list(baseline_run: BaselineRun, splits: Splits) -> None:
    """The manifest names the long-tailed fields: all others keep every value."""
    train = loops.get_dataset("rt", baseline_run.folder / "dataset").train
    named = splits.manifest["long_tailed"]
    small, whole = (dict(zip(train.fields, Catemapper(rate).fit(train).field_dims, strict=True)) for rate in (0.2, 1))
    assert named
    for name in train.fields:
        assert (small[name] < whole[name]) == (name in named), name


def test_catemapper_is_saved_and_loaded(baseline_run: BaselineRun, splits: Splits, tmp_path: Path) -> None:
    for kind in (str, Path):
        found = loops.get_dataset("rt", baseline_run.folder / "dataset")
        Catemapper(threshold=0.2).fit(found.train).save(kind(tmp_path / "catemapper.json"))
        Catemapper.load(kind(tmp_path / "catemapper.json")).map(found.test)
        np.testing.assert_array_equal(found.test.categorical, splits.test.categorical)
        assert found.test.field_dims == splits.test.field_dims


def test_early_stopper_stops_after_num_trials(tmp_path: Path) -> None:
    """Two epochs in a row without a better score; the best model is kept, with a path as a file, too."""
    for kind in (str, Path, None):
        place = tmp_path / f"{kind}.pt"
        stopper = EarlyStopper(2) if kind is None else EarlyStopper(num_trials=2, save_path=kind(place))
        model, going = nn.Linear(1, 1), []
        for score in (0.5, 0.7, 0.6, 0.8, 0.8, 0.7):
            constant(model, score)
            going.append(stopper.is_continuable(model, score))
        assert going == [True, True, True, True, True, False]
        assert stopper.best_accuracy == 0.8
        assert float(stopper.best_state["weight"]) == pytest.approx(0.8)
        assert place.exists() == (kind is not None)
        if kind is not None:
            assert float(torch.load(place, weights_only=True)["weight"]) == pytest.approx(0.8)


def test_early_stopper_takes_the_epoch_too() -> None:
    stopper, model = EarlyStopper(1), nn.Linear(1, 1)
    assert stopper.is_continuable(model, 0.4, 3)
    assert stopper.is_continuable(model, 0.5, epoch=4)
    assert not stopper.is_continuable(model, 0.5, 5)
    assert stopper.best_epoch == 4


class RecordingAgent:
    """An agent that records how it is saved."""

    def __init__(self) -> None:
        self.saved: list[tuple[str, bool]] = []

    def save_or_load_agent(self, cwd: str | Path, if_save: bool) -> None:
        self.saved.append((str(cwd), if_save))


def test_converge_stopper_counts_small_changes() -> None:
    """By default twice in a row less than 0.003."""
    stopper = ConvergeStopper()
    losses = (1.0, 0.999, 0.9, 0.899, 0.904, 0.903, 0.9025)
    assert [stopper.is_continuable(loss) for loss in losses] == [True] * 6 + [False]


def test_converge_stopper_of_relative_changes() -> None:
    stopper = ConvergeStopper(num_trials=2, tolerance=0.05)
    losses = (100.0, 96.0, 80.0, 77.0, 75.0)
    assert [stopper.is_continuable(loss) for loss in losses] == [True] * 4 + [False]


def test_converge_stopper_saves_the_converged_agent() -> None:
    for kind in (str, Path):
        agent, stopper = RecordingAgent(), ConvergeStopper(kind("chkpt"), 1, 0.01)
        assert [stopper.is_continuable(agent, loss) for loss in (1.0, 0.5)] == [True, True]
        assert agent.saved == []
        assert not stopper.is_continuable(agent, 0.499)
        assert agent.saved == [("chkpt", True)]


def test_action_normalizer_maps_actions_once(splits: Splits) -> None:
    env = ActionNormalizer(MTEnv(splits.val))
    assert env.action_space.low.tolist() == [-1, -1]
    assert env.action_space.high.tolist() == [1, 1]
    env.reset(seed=1)
    for action, expected in (([-1, 1], [0, 1]), ([0, 0.5], [0.5, 0.75])):
        given = np.array(action, np.float32)
        np.testing.assert_allclose(env.action(given), expected)
        np.testing.assert_allclose(env.reverse_action(np.array(expected, np.float32)), action, atol=1e-6)
        _, reward, _, _, info = env.step(given)
        np.testing.assert_allclose(info["action"], expected)
        np.testing.assert_array_equal(reward, compute_reward(info["action"], info["label"], "bce"))


def test_polish_weights_in_closed_form(splits: Splits) -> None:
    """Of critics of -3 and -5, lambda = 1: w = 1 - lambda Q, and the other methods."""
    for method, no, yes in (
        ("full", [4.0, 6.0], [4.0, 6.0]), ("label", [1.0, 1.0], [4.0, 6.0]), ("constant", [1.0, 1.0], [1.0, 1.0]),
        ("critic", [3.0, 5.0], [3.0, 5.0]), ("inverse", [1 / 4, 1 / 6], [1 / 4, 1 / 6]),
        ("contrast", [1.0, 1.0], [1.0, 1.0]), ("shuffled", [4.0, 6.0], [4.0, 6.0])):
        ids, numbers, _ = first_rows(splits.val, 4)
        labels = torch.tensor([[0.0, 0.0], [1.0, 1.0]] * 2)
        w = make_polisher(splits, method=method).weights(ids, numbers, labels)
        assert w.shape == (4, 2)
        assert not w.requires_grad
        assert w.flatten().tolist() == pytest.approx([*no, *yes] * 2, rel=1e-4)


def test_polish_loss_of_model_and_critics(splits: Splits) -> None:
    """mean(w * cross-entropy), with the gradient of that to the predictions."""
    for as_list in (True, False):
        ids, numbers, labels = first_rows(splits.val, 50)
        y = torch.rand(50, 2).clamp(0.05, 0.95).requires_grad_()
        given = list(y.unbind(dim=1)) if as_list else y
        loss = make_polisher(splits).polish_loss(categorical_fields=ids, numerical_fields=numbers, labels=labels,
                                                 y=given)
        assert loss.shape == ()
        w = 1 + torch.tensor([3.0, 5.0]) * labels
        expected = (w * F.binary_cross_entropy(y, labels, reduction="none")).mean()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(loss, y)[0], torch.autograd.grad(expected, y)[0])


# --------------------------------------------------------------------------------------- the page: train, run: sampling


def stored_transitions(agent: DDPG_ESMM) -> dict[str, Any]:
    """All that a memory holds."""
    memory = agent.memory
    memory.batch_size = len(memory)
    return dict(memory.sample_batch())


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_one_pass_stores_every_transition_once(cls: type[DDPG_ESMM], make_agent: MakeAgent, splits: Splits) -> None:
    for reward_type in ("bce", "norm"):
        agent = make_agent(cls, MTEnv(splits.val, reward_type))
        assert loops.one_iter_offline(agent) == len(agent.memory) == len(splits.val)
        drawn, states = stored_transitions(agent), all_states(splits.val)
        assert sorted(map(tuple, drawn["state"].tolist())) == sorted(map(tuple, states.tolist()))
        assert drawn["done"].sum() == len(set(splits.val.session))
        np.testing.assert_allclose(drawn["reward"], compute_reward(drawn["action"], drawn["label"], reward_type),
                                   rtol=1e-6)
        np.testing.assert_allclose(drawn["label"].sum(axis=0), splits.val.labels.sum(axis=0))


WRAPPERS: dict[str, Callable[[AnyEnv], AnyEnv]] = {
    "plain": lambda env: env,
    "normalizer": ActionNormalizer,
    "limit": lambda env: TimeLimit(env, 100),
    "normalizer statistics limit": lambda env: TimeLimit(RecordEpisodeStatistics(ActionNormalizer(env)), 100),
}


@pytest.mark.parametrize("wrap", [name for name in WRAPPERS if name != "plain"])
def test_what_is_stored_is_what_was_rewarded(wrap: str, make_agent: MakeAgent, splits: Splits) -> None:
    """All sessions once, whatever is wrapped around them: probabilities, and the rewards of just these."""
    agent = make_agent(env=WRAPPERS[wrap](MTEnv(splits.val)))
    assert loops.one_iter_offline(agent) == len(splits.val)
    drawn = stored_transitions(agent)
    assert ((drawn["action"] >= 0) & (drawn["action"] <= 1)).all()
    assert drawn["action"].min() < 0.25
    assert drawn["action"].max() > 0.75
    np.testing.assert_allclose(drawn["reward"], compute_reward(drawn["action"], drawn["label"], "bce"), rtol=1e-6)
    assert sorted(map(tuple, drawn["state"].tolist())) == sorted(map(tuple, all_states(splits.val).tolist()))
    assert drawn["done"].sum() == len(set(splits.val.session))


def test_transformed_rewards_are_stored_as_transformed(make_agent: MakeAgent, splits: Splits) -> None:
    agent = make_agent(env=TransformReward(MTEnv(splits.val), lambda reward: 2 * reward))
    loops.one_iter_offline(agent)
    drawn = stored_transitions(agent)
    np.testing.assert_allclose(drawn["reward"], 2 * compute_reward(drawn["action"], drawn["label"], "bce"), rtol=1e-6)


def test_a_time_limit_cuts_sessions(make_agent: MakeAgent, splits: Splits) -> None:
    agent = make_agent(env=TimeLimit(MTEnv(splits.val), 2))
    lengths = np.unique(splits.val.session, return_counts=True)[1]
    assert loops.one_iter_offline(agent) == int(np.minimum(lengths, 2).sum())


def test_a_normalized_action_is_the_prediction(make_agent: MakeAgent, splits: Splits) -> None:
    """The action is in [-1, 1], and the environment makes the probability of it."""
    env = ActionNormalizer(MTEnv(splits.val, is_test=True))
    agent = make_agent(env=env)
    state, _ = env.reset()
    action = agent.select_action(state, noise=False)
    p = prediction(agent, splits.val, 0)
    np.testing.assert_allclose(action, 2 * p - 1, atol=1e-6)
    np.testing.assert_allclose(env.step(action)[4]["action"], p, atol=1e-6)
    drawn = np.array([agent.select_action(state) for _ in range(100)])
    assert ((drawn >= -1) & (drawn <= 1)).all()
    assert drawn.min() < -0.5


# --------------------------------------------------------------------------------------- the page: train, run: training


@dataclass(frozen=True)
class AgentRun:
    """What the documented call of six arguments left and gave."""

    agent: DDPG_ESMM
    rows: list[dict[str, Any]]
    folder: Path
    memory: Path
    printed: str


@pytest.fixture(scope="module")
def agent_run(make_agent: MakeAgent, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> AgentRun:
    """One epoch of BC. Read only."""
    folder, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    torch.manual_seed(0)
    agent = make_agent(DDPG_ESMM_BC, MTEnv(splits.val))
    with contextlib.redirect_stdout(printed):
        rows = loops.train_and_test_offline(MTEnv(splits.test), agent, 1, 30, folder / "agent", folder / "memory.npz")
    return AgentRun(agent, rows, folder / "agent", folder / "memory.npz", printed.getvalue())


def test_training_returns_a_row_an_epoch(agent_run: AgentRun) -> None:
    assert [row["epoch"] for row in agent_run.rows] == [1]
    for row in agent_run.rows:
        for name in ("score", "closs1", "closs2", "aloss", "aloss_reg"):
            assert math.isfinite(row[name])
        assert row["closs1"] > 0
        assert row["score"] < 0


def test_training_writes_the_documented_files(agent_run: AgentRun) -> None:
    written = {path.name for path in agent_run.folder.iterdir()}
    assert {*(f"{name}.pth" for name in NETWORKS), "metrics.csv", "curves.png", "checkpoint.pt",
            "config.json"} <= written
    assert agent_run.memory.exists()
    for name in NETWORKS:
        saved = load_weights(agent_run.folder / f"{name}.pth")
        assert same_weights(saved, copy_weights(getattr(agent_run.agent, name)))
    assert (agent_run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((agent_run.folder / "metrics.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in rows] == [row["score"] for row in agent_run.rows]


def test_training_moves_the_critics_alone(agent_run: AgentRun, make_agent: MakeAgent) -> None:
    saved = {name: load_weights(agent_run.folder / f"{name}.pth") for name in NETWORKS}
    assert same_weights(saved["actor"], saved["pretrain_actor"])
    for name in ("critic1", "critic2", "critic1_target", "critic2_target"):
        assert not same_weights(saved[name], copy_weights(getattr(make_agent(DDPG_ESMM_BC), name)))


@pytest.mark.parametrize(("cls", "wrap", "epoch"), [
    (DDPG_ESMM, "normalizer statistics limit", 1), (DDPG_ESMM_multiweight, "plain", 3)])
def test_training_takes_wrapped_environments(cls: type[DDPG_ESMM], wrap: str, epoch: int, make_agent: MakeAgent,
                                             splits: Splits, tmp_path: Path) -> None:
    """By keyword, with texts for paths; both environments are wrapped."""
    torch.manual_seed(0)
    agent = make_agent(cls, WRAPPERS[wrap](MTEnv(splits.val)), batch_size=16)
    rows = loops.train_and_test_offline(environment=WRAPPERS[wrap](MTEnv(splits.test)), agent=agent, epoch=epoch,
                                        init_episode=20, save_dir=str(tmp_path / "agent"),
                                        memory_path=str(tmp_path / "memory.npz"), epoch_updates=5)
    assert [row["epoch"] for row in rows] == list(range(1, epoch + 1))
    assert (tmp_path / "agent" / "critic2_target.pth").exists()
    drawn = stored_transitions(agent)
    np.testing.assert_allclose(drawn["reward"], compute_reward(drawn["action"], drawn["label"], "bce"), rtol=1e-6)


def test_replay_buffer_of_the_same_kind_is_read(agent_run: AgentRun, make_agent: MakeAgent, splits: Splits,
                                                tmp_path: Path) -> None:
    before = agent_run.memory.read_bytes()
    agent = make_agent(DDPG_ESMM_BC, MTEnv(splits.val))
    loops.train_and_test_offline(MTEnv(splits.test), agent, 1, 30, tmp_path / "agent", agent_run.memory,
                                 epoch_updates=2)
    assert agent_run.memory.read_bytes() == before
    one, two = stored_transitions(agent), stored_transitions(agent_run.agent)
    assert sorted(map(tuple, one["action"].tolist())) == sorted(map(tuple, two["action"].tolist()))


def test_a_memory_of_another_actor_is_refused(agent_run: AgentRun, polish_run: tuple[Path, str], splits: Splits,
                                              tmp_path: Path) -> None:
    agent = DDPG_ESMM_BC(MTEnv(splits.val), "ple", pretrain_path=polish_run[0] / "pretrain", memory_size=5_000)
    assert "actor" in user_error_message(lambda: loops.train_and_test_offline(MTEnv(splits.test), agent, 1, 30,
                                                                     tmp_path / "agent", agent_run.memory))
    assert len(agent.memory) == 0


@pytest.mark.parametrize(("wrap", "kind"), [
    ("plain", str), ("normalizer statistics limit", Path)])
def test_test_plays_the_saved_agent(wrap: str, kind: type[str] | type[Path], agent_run: AgentRun, make_agent: MakeAgent,
                                    splits: Splits, capsys: pytest.CaptureFixture[str]) -> None:
    """It steps every impression of the environment once, and prints in full how good the saved actor is; the agent that
    it is given stays as it was."""
    env = CountingEnv(WRAPPERS[wrap](MTEnv(splits.test, is_test=True)))
    agent = make_agent(DDPG_ESMM_BC, WRAPPERS[wrap](MTEnv(splits.val)))
    for name in NETWORKS:
        constant(getattr(agent, name), 0.125)
    before = {name: copy_weights(getattr(agent, name)) for name in NETWORKS}
    figures = loops.test(environment=env, agent=agent, save_dir=kind(agent_run.folder))
    assert env.steps == len(splits.test)
    assert env.resets == len(set(splits.test.session))
    assert not any(has_changed(getattr(agent, name), before[name]) for name in NETWORKS)
    auc, logloss = loops.sltest(agent_run.agent.actor, DataLoader(splits.test, 400), 2, "cpu")
    assert [figures["auc_0"], figures["auc_1"]] == pytest.approx(auc, abs=5e-3), "rows one by one may rank ties anew"
    assert [figures["logloss_0"], figures["logloss_1"]] == pytest.approx(logloss, rel=1e-5)
    lines = capsys.readouterr().out.splitlines()
    for task in (0, 1):
        assert (f"test: actor, task {task}, AUC {figures[f'auc_{task}']!r}, Log-loss {figures[f'logloss_{task}']!r}"
                in lines)
    p = np.column_stack(loops.slpred(agent_run.agent.actor, DataLoader(splits.test, 400), 2, "cpu"))
    total = compute_reward(p, splits.test.labels, "bce").sum() / len(set(splits.test.session))
    assert figures["score"] == pytest.approx(float(total), rel=1e-4)


def test_an_agent_of_other_actions_never_misleads(agent_run: AgentRun, make_agent: MakeAgent, splits: Splits) -> None:
    """Its own environment takes actions in [0, 1], the one of the test in [-1, 1]: minded, or refused."""
    env = ActionNormalizer(MTEnv(splits.test, is_test=True))
    try:
        figures = loops.test(env, make_agent(DDPG_ESMM_BC), agent_run.folder)
    except UserError:
        return
    _, logloss = loops.sltest(agent_run.agent.actor, DataLoader(splits.test, 400), 2, "cpu")
    assert [figures["logloss_0"], figures["logloss_1"]] == pytest.approx(logloss, rel=1e-5)


ROWS = [{"epoch": 1, "score": -1.5, "critic_loss": 0.75, "closs1": 0.5, "closs2": 0.25, "aloss": 0.3, "aloss_reg": 0.02,
         "rank_correlation_0": 0.1, "rank_correlation_1": 0.2},
        {"epoch": 2, "score": -1.25, "critic_loss": 0.5, "closs1": 0.4, "closs2": 0.1, "aloss": 0.2, "aloss_reg": 0.03,
         "rank_correlation_0": 0.3, "rank_correlation_1": 0.4}]


@pytest.fixture
def drawn_curves(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What is drawn from now on: the values of each curve."""
    axes = importlib.import_module("matplotlib.axes").Axes
    plot, curves = axes.plot, list[list[float]]()

    def noted(self: Any, *given: Any, **more: Any) -> Any:
        lines = plot(self, *given, **more)
        curves.extend([float(one) for one in line.get_ydata()] for line in lines)
        return lines

    monkeypatch.setattr(axes, "plot", noted)
    return curves


def curve(name: str) -> list[float]:
    return [float(row[name]) for row in ROWS]


def test_plot_loss_of_rows(tmp_path: Path, drawn_curves: list[list[float]]) -> None:
    """Score, critic loss, actor loss and the regularised part, each a curve of its own."""
    loops.plot_loss(ROWS, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("score", "aloss", "aloss_reg"):
        assert curve(name) in drawn_curves, name
    assert curve("closs1") in drawn_curves or curve("critic_loss") in drawn_curves


def test_plot_loss_of_lists(tmp_path: Path, drawn_curves: list[list[float]]) -> None:
    for form, kind in (("four lists", list), ("published", np.array)):
        names = ("score", "critic_loss", "aloss", "aloss_reg")
        lists = [kind(curve(name)) for name in names]
        if form == "four lists":
            loops.plot_loss(*lists, str(tmp_path / "curves.png"))
        else:
            loops.plot_loss(2, *lists, path=tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        for name in names:
            assert curve(name) in drawn_curves, name


# -------------------------------------------------------------------------------------------------- the page: RLmain.py

HYPARAMS = {
    "dict": {"gamma": 0.5, "batch_size": 32, "memory_size": 2_000},
    "Arguments": RLArguments(gamma=0.5, batch_size=32, memory_size=2_000),
    "Namespace": argparse.Namespace(gamma=0.5, batch_size=32, memory_size=2_000),
}


@pytest.mark.parametrize("cls", AGENT_CLASSES)
def test_create_sub_agent_takes_hyparams(cls: type[DDPG_ESMM], splits: Splits, baseline_run: BaselineRun,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    for form in HYPARAMS:
        monkeypatch.chdir(baseline_run.folder)
        agent = RLmain.create_sub_agent(env=MTEnv(splits.val), actor_name="esmm", agentcls=cls, hyparams=HYPARAMS[form])
        assert type(agent) is cls
        assert agent.gamma == 0.5
        loops.one_iter_offline(agent)
        assert len(agent.memory.sample_batch()["done"]) == 32


def test_create_sub_agent_has_defaults(splits: Splits, baseline_run: BaselineRun,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    for hyparams in ({}, Arguments()):
        monkeypatch.chdir(baseline_run.folder)
        agent = RLmain.create_sub_agent(MTEnv(splits.val), "esmm", DDPG_ESMM_BC, hyparams)
        assert agent.gamma == 0.9
        assert same_weights(copy_weights(agent.actor), load_weights(baseline_run.pretrain / "rt_esmm.pt"))


def test_create_sub_agent_takes_wrapped_environments(splits: Splits, baseline_run: BaselineRun) -> None:
    env = TimeLimit(ActionNormalizer(MTEnv(splits.val)), 100)
    agent = RLmain.create_sub_agent(env, "esmm", DDPG_ESMM,
                                    {"pretrain_path": baseline_run.pretrain, "memory_size": 5_000})
    assert agent.select_action(env.reset(seed=1)[0]).shape == (2,)


def test_create_sub_agent_refuses_unknown_names(splits: Splits, baseline_run: BaselineRun) -> None:
    text = user_error_message(lambda: RLmain.create_sub_agent(MTEnv(splits.val), "esmm", DDPG_ESMM,
                                                     {"pretrain_path": baseline_run.pretrain, "gama": 0.5}))
    assert "gama" in text


@pytest.fixture(scope="module")
def critics_run(baseline_run: BaselineRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of `baseline_run` after `python3 RLmain.py`, and its output. Read only."""
    folder = Path(shutil.copytree(baseline_run.folder, tmp_path_factory.mktemp("critics") / "copy"))
    done = run_in_process(folder, "RLmain.py", *RL_FLAGS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


def test_rlmain_prints_the_actors_test(critics_run: tuple[Path, str], baseline_run: BaselineRun) -> None:
    """The actor of BC is the baseline: its figures are the baseline's."""
    found = re.findall(r"^test: actor, task (\d), AUC (\S+), Log-loss (\S+)$", critics_run[1], flags=re.M)
    assert [task for task, _, _ in found] == ["0", "1"]
    for (_, auc, logloss), metrics in zip(found, baseline_run.metrics, strict=True):
        assert float(auc) == pytest.approx(metrics.auc, abs=2e-4)  # near ties: states are rounded otherwise
        assert float(logloss) == pytest.approx(metrics.logloss, rel=1e-5)
        assert len(auc) > 8


def test_ddpg_trains_its_actor_before_converging(baseline_run: BaselineRun, tmp_path: Path) -> None:
    """The critics count as converged at once; still the loop goes on until the actor has moved."""
    folder = Path(shutil.copytree(baseline_run.folder, tmp_path / "copy"))
    done = run_in_process(folder, "RLmain.py", "--agent=ddpg", *FLAGS, "--epoch=9", "--epoch_updates=10",
                               "--init_episode=50", "--batch_size=64", "--init_training_step=50",
                               "--converge_tolerance=1000", "--converge_trials=1")
    assert done.returncode == 0, done.stderr
    saved = folder / "chkpt/RL/res_DDPG_esmm"
    assert not same_weights(load_weights(saved / "actor.pth"), load_weights(saved / "pretrain_actor.pth"))
    assert "converged in epoch" in done.stdout
    rows = list(csv.DictReader((saved / "metrics.csv").read_text().splitlines()))
    assert 5 < len(rows) < 9


# ------------------------------------------------------------------------------------ the page: the run with --polish=1


@pytest.fixture(scope="module")
def polish_run(critics_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of `critics_run` after `python3 SLmain.py --model_name=ple --polish=1`, and its output. Read only."""
    folder = Path(shutil.copytree(critics_run[0], tmp_path_factory.mktemp("polished") / "copy"))
    done = run_in_process(folder, "SLmain.py", "--model_name=ple", "--polish=1", *SL_FLAGS)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_polish_prints_the_documented_lines(polish_run: tuple[Path, str]) -> None:
    """Twice: of the baseline that was missing, and of the polished model."""
    assert len(re.findall(r"^test: best auc: 0\.\d{6,}$", polish_run[1], flags=re.M)) == 2
    assert len(re.findall(r"^task 1, AUC 0\.\d{6,}, Log-loss \d\.\d{6,}$", polish_run[1], flags=re.M)) == 2


def test_polish_summary_has_the_last_model(polish_run: tuple[Path, str], splits: Splits) -> None:
    model = loops.load_model(polish_run[0] / "chkpt/SL/rt_ple/rt_ple_1.0_last.pt")
    auc, _ = loops.sltest(model, DataLoader(splits.test, 400), 2, "cpu")
    rows = [line for line in polish_run[1].splitlines() if "last" in line]
    printed = [[float(number) for number in re.findall(r"0\.\d{4}", line)] for line in rows]
    assert any(numbers[::5] == pytest.approx(auc, abs=2e-4) for numbers in printed if len(numbers) == 10)
    assert any(line.startswith("baseline") for line in polish_run[1].splitlines())


def test_any_model_can_be_the_actor(polish_run: tuple[Path, str], splits: Splits) -> None:
    agent = DDPG_ESMM_BC(MTEnv(splits.val), "ple", pretrain_path=polish_run[0] / "pretrain", memory_size=5_000)
    assert same_weights(copy_weights(agent.actor), load_weights(polish_run[0] / "pretrain/rt_ple.pt"))
    loops.one_iter_offline(agent)
    assert float(agent.update()[0]) > 0


def test_the_published_polisher_reads_saved_critics(critics_run: tuple[Path, str], splits: Splits,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda = 0 is the plain cross-entropy; the loss grows with lambda in a straight line, for no Q is positive."""
    for as_list in (True, False):
        monkeypatch.chdir(critics_run[0])
        ids, numbers, labels = first_rows(splits.val, 50)
        y = torch.rand(50, 2).clamp(0.05, 0.95).requires_grad_()
        losses = [RlLossPolisher(MTEnv(splits.val), "esmm", lambda_=one).polish_loss(
            ids, numbers, labels, list(y.unbind(dim=1)) if as_list else y) for one in (0.0, 0.5, 1.0)]
        assert all(loss.shape == () for loss in losses)
        plain = float(F.binary_cross_entropy(y.detach(), labels))
        none, half, full = (float(loss.detach()) for loss in losses)
        assert none == pytest.approx(plain, rel=1e-5)
        assert full > plain + 1e-4
        assert full - none == pytest.approx(2 * (half - none), rel=1e-3)
        assert float(torch.autograd.grad(losses[2], y)[0].abs().min()) > 0


def test_the_published_polisher_weights_training(critics_run: tuple[Path, str], splits: Splits) -> None:
    """Handed to `sltrain`, it changes the step; with lambda = 0 it does not."""
    folder, loader = critics_run[0] / "chkpt/RL", make_loader(splits.val, "torch", 900)
    plain, none, full = (train_one_epoch(splits, loader, nn.BCELoss(), polisher)[0] for polisher in (
        None, *(RlLossPolisher(MTEnv(splits.val), "esmm", one, critic_dir=folder) for one in (0.0, 1.0))))
    for name, tensor in plain.items():
        torch.testing.assert_close(none[name], tensor)
    assert max(float((full[name] - tensor).abs().max()) for name, tensor in plain.items()) > 1e-4


def test_the_published_polisher_defaults_and_folders(critics_run: tuple[Path, str], splits: Splits, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the way by default; the critics' folder can be given; without critics it is refused."""
    ids, numbers, labels = first_rows(splits.val, 50)
    y, env = torch.full((50, 2), 0.3), MTEnv(splits.val)
    given = RlLossPolisher(env, "esmm", lambda_=0.5, critic_dir=critics_run[0] / "chkpt/RL")
    assert user_error_message(lambda: RlLossPolisher(env, "esmm", critic_dir=str(tmp_path)))
    monkeypatch.chdir(critics_run[0])
    found = RlLossPolisher(env, "esmm")
    assert float(found.polish_loss(ids, numbers, labels, y)) == float(given.polish_loss(ids, numbers, labels, y))


# ----------------------------------------------------------------------------------------------- the page: the packages


def test_the_interface_page_says_what_differs() -> None:
    for word in ("gymnasium", "RMTL/MTEnv-v0", "SyncVectorEnv", "weights_only=True", "variance"):
        assert word.lower() in (REPOSITORY / "docs" / "interface.md").read_text(encoding="utf-8").lower()


def test_gymnasium_is_listed_and_explained() -> None:
    """The user's page names gym: the list of packages explains why it is Gymnasium."""
    assert re.search(r"^gymnasium==.*# .*\bgym\b", (REPOSITORY / "requirements.txt").read_text(), flags=re.M)
    page = (REPOSITORY / "docs" / "interface.md").read_text(encoding="utf-8")
    assert re.search(r"\bgym\b", page)
    assert "Gymnasium" in page
