"""The replay buffer and the agents: targets, updates, starts, weights, files."""

from __future__ import annotations

import gc
import importlib
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error_message
from factories import REWARDS, handmade, make_agent, same, uniform, weights
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from agents import AGENTS, DDPG_ESMM, DDPG_ESMM_BC, TD3BC_ESMM, DDPG_ESMM_multiweight, ReplayBuffer
from agents.DDPG_ESMM import Tensors
from agents.DDPG_ESMM_BC import TARGET_SMOOTHING_CLIP
from common.errors import UserError
from common.fileio import CHECKSUM_LENGTH
from dataset.rtrl import RetailRocketRLDataset
from env import MTEnv, RewardType, compute_reward
from layers import CriticNeg
from layers.critic import zero_fraction
from slmodels import MODELS
from slmodels.model_file import save_model
from train.offline_rl import collect_transitions, rollout

Floats = NDArray[np.float32]


def sample(agent: DDPG_ESMM) -> Tensors:
    return agent.process_batch(agent.memory.sample_batch())


# ------------------------------------------------------------------------------------------------------------ buffer


def transitions(count: int, seed: int = 0) -> dict[str, Floats]:
    """`count` transitions, each known by its first number."""
    rng = np.random.default_rng(seed)
    widths = {"state": 3, "action": 2, "next_state": 3, "reward": 2, "label": 2}
    rows = {name: rng.random((count, width), np.float32) for name, width in widths.items()}
    rows["state"][:, 0] = np.arange(count)
    return {**rows, "done": (np.arange(count) % 3 == 0).astype(np.float32)}


def buffer(size: int = 100, batch_size: int = 8, filled: int = 0) -> ReplayBuffer:
    memory = ReplayBuffer(3, 2, size, batch_size)
    if filled:
        memory.store(**transitions(filled))
    return memory


@pytest.mark.parametrize("count", [4, 10, 17, 25])
def test_single_and_batched_storing_agree(count: int) -> None:
    """Also where the ring is full: the oldest go first."""
    rows, single, batched, whole = transitions(count), buffer(10), buffer(10), buffer(10)
    for at in range(count):
        single.store(**{name: value[at] for name, value in rows.items()})
    for part in np.array_split(np.arange(count), 4):
        batched.store(**{name: value[part] for name, value in rows.items()})
    whole.store(**rows)
    assert len(single) == len(batched) == len(whole) == min(count, 10)
    np.testing.assert_array_equal(single.storage, batched.storage)
    kept = np.arange(count)[-10:]
    for memory in (single, whole):
        assert sorted(memory.data["state"][: len(memory), 0]) == kept.tolist()
    for at in range(len(single)):
        source = int(single.data["state"][at, 0])
        for name, value in rows.items():
            np.testing.assert_array_equal(single.data[name][at], value[source])


def test_full_buffer_overwrites_the_oldest() -> None:
    memory = buffer(10)
    memory.store(**transitions(25))
    memory.store(**{name: value[:1] - 1 for name, value in transitions(1).items()})
    assert sorted(memory.data["state"][:, 0]) == [-1, *range(16, 25)]


def test_a_batch_has_no_repetition_and_is_uniform() -> None:
    memory, seen = buffer(100, 30, 60), np.zeros(60)
    for _ in range(200):
        batch = memory.sample_batch()
        first = batch["state"][:, 0].astype(int)
        assert len(set(first)) == 30
        seen[first] += 1
        for name, value in transitions(60).items():
            np.testing.assert_array_equal(batch[name], value[first])
    assert np.abs(seen - 100).max() < 5 * (200 * 0.25) ** 0.5
    assert len(buffer(100, 30, 7).sample_batch()["done"]) == 7


def test_sampling_is_reproduced_by_the_seed() -> None:
    memory = buffer(100, 8, 60)
    drawn = []
    for seed in ((1, 2), (1, 2), (1, 3)):
        memory.reseed(*seed)
        drawn.append([memory.sample_batch()["state"][:, 0].tolist() for _ in range(3)])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_sampling_time_is_independent_of_size() -> None:
    """A permutation of the whole memory would cost 100 times as much."""
    times = []
    for size in (10_000, 1_000_000):
        memory, best = ReplayBuffer(1, 1, size, 256), float("inf")
        memory.size = size
        for _ in range(10):
            begin = time.perf_counter()
            for _ in range(5):
                memory.sample_batch()
            best = min(best, time.perf_counter() - begin)
        times.append(best)
    assert times[1] < 20 * times[0]


MEMORY = {"data": "abc", "reward_type": "bce", "field_dims": [3, 4]}


def test_buffer_file_round_trip(tmp_path: Path) -> None:
    memory, path = buffer(10, filled=8), tmp_path / "memory.npz"
    memory.store(**transitions(6, seed=1))
    memory.save(path, MEMORY)
    read = buffer(10)
    read.load(path, MEMORY)
    np.testing.assert_array_equal(read.storage, memory.storage)
    assert (len(read), read.ptr) == (10, 4)
    part = buffer(10, filled=6)
    part.save(path, MEMORY)
    read.load(path, MEMORY)
    assert len(read) == 6
    np.testing.assert_array_equal(read.storage[:6], part.storage[:6])


def test_a_buffer_larger_than_memory_is_refused() -> None:
    text = user_error_message(lambda: ReplayBuffer(15, 2, 10**11, 8))
    assert text.startswith("a replay buffer of 100,000,000,000 transitions of 148 bytes: about 13783.6 GiB of memory")


def test_a_buffer_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer(filled=60).save(tmp_path / "memory.npz", MEMORY)
    monkeypatch.setattr(importlib.import_module("agents.ReplayBuffer"), "BLOCK_ROWS", 7)
    memory = buffer()
    memory.load(tmp_path / "memory.npz", MEMORY)
    np.testing.assert_array_equal(memory.storage, buffer(filled=60).storage)


@pytest.mark.parametrize(("name", "value"), [("data", "other"), ("reward_type", "norm"), ("field_dims", [3, 5])])
def test_a_memory_of_another_kind_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    buffer(filled=6).save(tmp_path / "memory.npz", MEMORY)
    memory = buffer()
    text = user_error_message(lambda: memory.load(tmp_path / "memory.npz", {**MEMORY, name: value}))
    assert name.replace("_", " ") in text
    assert "--refill" in text
    assert len(memory) == 0


def test_a_memory_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module("agents.ReplayBuffer"), "VERSION", 0)
        buffer(filled=6).save(tmp_path / "memory.npz", MEMORY)
    assert "version" in user_error_message(lambda: buffer().load(tmp_path / "memory.npz", MEMORY))


def test_buffer_file_of_other_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.npz"
    buffer(filled=60).save(path, MEMORY)
    assert "60" in user_error_message(lambda: buffer(20).load(path, MEMORY))
    user_error_message(lambda: ReplayBuffer(4, 2, 100, 8).load(path, MEMORY))
    buffer().save(path, MEMORY)
    user_error_message(lambda: buffer().load(path, MEMORY))
    assert "no such file" in user_error_message(lambda: buffer().load(tmp_path / "none.npz", MEMORY))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["state", "reward", "done"])
def test_buffer_file_with_nan_is_refused(tmp_path: Path, name: str, bad: float) -> None:
    memory = buffer(filled=6)
    memory.data[name][3] = bad
    memory.save(tmp_path / "memory.npz", MEMORY)
    assert f"'{name}'" in user_error_message(lambda: buffer().load(tmp_path / "memory.npz", MEMORY))


def saved_bytes() -> bytes:
    """A memory as a file."""
    with tempfile.TemporaryDirectory() as folder:
        buffer(filled=6).save(Path(folder) / "memory.npz", MEMORY)
        return (Path(folder) / "memory.npz").read_bytes()


@pytest.mark.parametrize("following", ["3", None, -1, 7, 1.5], ids=str)
def test_buffer_file_with_bad_pointer_is_refused(tmp_path: Path, following: Any) -> None:
    memory = buffer(filled=6)
    memory.ptr = following
    memory.save(tmp_path / "memory.npz", MEMORY)
    assert "the next one at" in user_error_message(lambda: buffer().load(tmp_path / "memory.npz", MEMORY))


def test_buffer_file_without_checksum_is_refused(tmp_path: Path) -> None:
    whole = saved_bytes()
    (tmp_path / "old.npz").write_bytes(whole[:-CHECKSUM_LENGTH - 2] + bytes(2))
    text = user_error_message(lambda: buffer().load(tmp_path / "old.npz", MEMORY))
    assert "older version): run RLmain.py with --refill" in text


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.98])
def test_a_truncated_memory_is_refused(tmp_path: Path, keep: float) -> None:
    whole, path = saved_bytes(), tmp_path / "memory.npz"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert "--refill" in user_error_message(lambda: buffer().load(path, MEMORY))
    gc.collect()  # a file that was left open is this test's failure, not a later one's


DIRECTORY = saved_bytes().index(b"PK\x01\x02")  # of the archive: + 6 the version it needs, + 8 whether it is encrypted


@example(at=DIRECTORY + 6, flip=128)
@example(at=DIRECTORY + 8, flip=1)
@given(at=st.integers(0, len(saved_bytes()) - 1), flip=st.integers(1, 255))
def test_corrupt_buffer_file_is_refused_or_unchanged(tmp_path_factory: pytest.TempPathFactory, at: int,
                                                     flip: int) -> None:
    """Whatever byte is wrong; bytes that no reader looks at may be."""
    damaged, path = bytearray(saved_bytes()), tmp_path_factory.getbasetemp() / "damaged.npz"
    damaged[at] ^= flip
    path.write_bytes(damaged)
    memory = buffer()
    try:
        memory.load(path, MEMORY)
    except UserError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "\n" not in said
        assert len(memory) == 0
    else:
        np.testing.assert_array_equal(memory.storage[:6], buffer(filled=6).storage[:6])


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, wrapped: bool) -> None:
    path, mark = tmp_path / "memory.npz", tmp_path / "exploded"
    if wrapped:
        np.savez(path, identity=np.array([Bomb(mark)], dtype=object))
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    assert "--refill" in user_error_message(lambda: buffer().load(path, MEMORY))
    assert not mark.exists()


# ----------------------------------------------------------------------------------------------------------- targets


def chain(sessions: int = 40) -> RetailRocketRLDataset:
    """Sessions of two states, ids 0 and 1, with fixed labels: click 1 then 0, pay 0 then 1; no numbers to speak of."""
    ids, labels = [[0], [1]] * sessions, [[1, 0], [0, 1]] * sessions
    dataset = handmade([2] * sessions, labels, ids, [2])
    dataset.numerical = np.zeros((2 * sessions, 1), np.float32)
    return dataset


@pytest.mark.parametrize("reward_type", REWARDS)
def test_critics_learn_returns_of_two_state_chain(tmp_path: Path, reward_type: RewardType) -> None:
    """Q(s1, a) = r(a, y1) and Q(s0, a) = r(a, y0) + gamma r(actor(s1), y1), within 2 % for all actions stored."""
    agent = make_agent(tmp_path, chain(), reward_type=reward_type, batch_size=80, drop_out=0.0,
                       bottom_mlp_dims=(64, 32), tower_mlp_dims=(32, 32))
    assert isinstance(agent, DDPG_ESMM_BC)
    rng, levels = np.random.default_rng(0), np.float32([0.3, 0.5, 0.7])

    def policy(state: Floats) -> Floats:
        """Half of the actions are the actor's, whose value is bootstrapped from."""
        drawn = rng.choice(levels, (len(state), 2))
        return np.where(rng.random((len(state), 2)) < 0.5, agent.select_action(state, noise=False), drawn)

    collect_transitions(agent, policy)
    agent.fit_normalizer_and_cache()
    stored = {name: value[: len(agent.memory)] for name, value in agent.memory.data.items()}
    later = compute_reward(rollout(agent.env, agent).action[1], np.float32([0, 1]), reward_type)  # the actor, in s1
    opens = stored["state"][:, :1] == 0
    expected = compute_reward(stored["action"], np.where(opens, [1, 0], [0, 1]), reward_type) + 0.9 * later * opens
    batch, q = agent.process_batch(stored), np.zeros_like(expected)
    for _ in range(12):  # enough is enough
        for step in range(300):
            for _, _, optimizer in agent.critics():
                optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
            agent.update()
        with torch.no_grad():
            q = np.column_stack([critic.eval()(batch["categorical_x"], batch["numerical_x"],
                                               batch["action"][:, task:task + 1]).numpy()
                                 for task, (critic, _, _) in enumerate(agent.critics())])
        if np.allclose(q, expected, rtol=0.02, atol=0):
            break
    np.testing.assert_allclose(q, expected, rtol=0.02)


class Probe(nn.Module):
    """A critic that answers a constant and remembers what it was asked."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer, self.asked = answer, torch.zeros(0)

    def forward(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        assert not self.training, "targets are computed in eval mode"
        self.asked = action[:, 0]
        return torch.full_like(action[:, 0], self.answer)


@pytest.mark.parametrize(("current", "target"), [(-0.3, -0.7), (-0.7, -0.3)])
def test_td3_target_takes_the_smaller_q(tmp_path: Path, current: float, target: float) -> None:
    agent = uniform(make_agent(tmp_path, handmade([2, 3, 1]), gamma=0.5))
    batch = sample(agent)
    for task in range(2):
        probes = Probe(current).train(), Probe(target).eval()
        y = agent.td3_target(task, *probes, batch)  # type: ignore[arg-type]
        expected = batch["reward"][:, task] - 0.5 * 0.7 * (1 - batch["done"])
        torch.testing.assert_close(y, expected)
        assert probes[0].training, "the critic is left in the mode it was in"
        assert batch["done"].sum() == 3


def test_nothing_is_bootstrapped_past_a_sessions_end(tmp_path: Path) -> None:
    agent = uniform(make_agent(tmp_path, handmade([2, 3, 1, 1])))
    transition = agent.memory.sample_batch()
    done = transition["done"] == 1
    assert done.sum() == 4
    targets = []
    for _ in range(2):
        torch.manual_seed(1)
        batch = agent.process_batch(transition)
        targets.append(torch.stack([agent.td3_target(task, critic, target, batch)
                                    for task, (critic, target, _) in enumerate(agent.critics())], dim=1))
        transition["next_state"][done] = [2, 3, 1e6, -1e6]
    assert torch.equal(*targets)
    np.testing.assert_array_equal(targets[0][torch.from_numpy(done)], transition["reward"][done])
    transition["next_state"][:] = [2, 3, 1e6, -1e6]  # elsewhere it counts
    batch = agent.process_batch(transition)
    critic, target, _ = agent.critics()[0]
    assert not torch.equal(agent.td3_target(0, critic, target, batch), targets[0][:, 0])


def test_td3_target_noise_and_action_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = uniform(make_agent(tmp_path, handmade([3] * 60), batch_size=180))
    batch, probe = sample(agent), Probe(0.0).eval()
    predicted = agent.actor_target(batch["next_categorical_x"], batch["next_numerical_x"])[:, 0]
    agent.td3_target(0, probe, probe, batch)  # type: ignore[arg-type]
    noise = (probe.asked - predicted).abs()
    assert 0.002 < float(noise.mean()) < 0.02
    monkeypatch.setattr(importlib.import_module("agents.DDPG_ESMM_BC"), "TARGET_SMOOTHING_SIGMA", 10.0)
    agent.td3_target(0, probe, probe, batch)  # type: ignore[arg-type]
    torch.testing.assert_close((probe.asked - predicted).abs().max(), torch.tensor(TARGET_SMOOTHING_CLIP), atol=1e-6,
                               rtol=0)
    batch["next_prediction"] = torch.tensor([[0.0, 1.0]]).expand(180, 2)
    for task in range(2):
        agent.td3_target(task, probe, probe, batch)  # type: ignore[arg-type]
        assert 0 <= float(probe.asked.min()) < float(probe.asked.max()) <= 1


def test_critic_loss_is_weighted_squared_td_error(tmp_path: Path) -> None:
    agent = uniform(make_agent(tmp_path, handmade([1] * 8), drop_out=0.0))
    batch = sample(agent)
    batch["weight"] = torch.rand(8, 2)
    critic, target, _ = agent.critics()[1]
    q = critic(batch["categorical_x"], batch["numerical_x"], batch["action"][:, 1:])
    expected = (batch["weight"][:, 1] * (q - batch["reward"][:, 1]) ** 2).mean()  # every row ends its session
    torch.testing.assert_close(agent.get_closs(1, critic, target, batch), expected)


# ------------------------------------------------------------------------------------------------- batches, numbers


@pytest.mark.parametrize("cls", AGENTS.values())
def test_ids_reach_the_critics_as_they_are(tmp_path: Path, cls: type[DDPG_ESMM]) -> None:
    """Not standardized, not cut: whole numbers of their field, also after the BC agent's normalisation."""
    dataset = handmade([2] * 20, field_dims=[30, 7])
    agent = uniform(make_agent(tmp_path, dataset, cls, batch_size=40))
    if isinstance(agent, DDPG_ESMM_BC):
        agent.fit_normalizer_and_cache()
    transition = agent.memory.sample_batch()
    batch = agent.process_batch(transition)
    row = transition["state"][:, 2].astype(int)  # the first number is the row
    assert sorted(row) == list(range(40))
    assert batch["categorical_x"].dtype == torch.int64
    np.testing.assert_array_equal(batch["categorical_x"], dataset.categorical[row])
    np.testing.assert_array_equal(batch["numerical_x"], dataset.numerical[row])
    following = np.where(row % 2 == 0, row + 1, row)
    np.testing.assert_array_equal(batch["next_categorical_x"], dataset.categorical[following])


def test_normalization_is_saved_with_the_critic(tmp_path: Path) -> None:
    agent = uniform(make_agent(tmp_path, handmade([3] * 20), memory_size=200, batch_size=60))
    assert isinstance(agent, DDPG_ESMM_BC)
    memory = agent.memory.storage.copy()
    before = {name: {key: value.clone() for key, value in network.state_dict().items()}
              for name, network in agent.networks().items()}
    batch = sample(agent)  # needs no call before it
    np.testing.assert_array_equal(agent.memory.storage, memory)
    for name, network in agent.networks().items():
        changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[name][key])}
        fitted = {f"input.standardizer.{statistic}" for statistic in ("mean", "std")}
        assert changed == (fitted if name.startswith("critic") else set())
    numbers = agent.memory.data["state"][:60, 2:]
    np.testing.assert_allclose(agent.critic1.input.standardizer.mean, numbers.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(agent.critic1.input.standardizer.std, numbers.std(axis=0, ddof=1), rtol=1e-3)

    save_model(tmp_path / "critic1.pth", agent.critic1, {})
    read = CriticNeg([3, 4], 2, 8, (16, 8), (8, 4))
    read.load_state_dict(torch.load(tmp_path / "critic1.pth", weights_only=True)["weights"])
    plain = CriticNeg([3, 4], 2, 8, (16, 8), (8, 4))
    plain.load_state_dict({**read.state_dict(), "input.standardizer.mean": torch.zeros(2),
                           "input.standardizer.std": torch.ones(2)})
    ids, n, action = batch["categorical_x"], batch["numerical_x"], batch["action"][:, :1]
    q = agent.critic1.eval().pre_activation(ids, n, action)
    torch.testing.assert_close(read.eval().pre_activation(ids, n, action), q)
    mean, std = (torch.from_numpy(one) for one in (numbers.mean(axis=0), numbers.std(axis=0, ddof=1) + 1e-3))
    torch.testing.assert_close(plain.eval().pre_activation(ids, (n - mean) / std, action), q, rtol=1e-4, atol=1e-4)


def test_bc_predicts_next_states_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its predictions are those of asking again; they are dropped as soon as the memory has changed."""
    monkeypatch.setattr(importlib.import_module("agents.DDPG_ESMM_BC"), "INFERENCE_BATCH", 7)
    agent = uniform(make_agent(tmp_path, handmade([3] * 20), memory_size=200, batch_size=30))
    assert isinstance(agent, DDPG_ESMM_BC)
    batch = sample(agent)
    expected = agent.actor_target(batch["next_categorical_x"], batch["next_numerical_x"])
    torch.testing.assert_close(batch["next_prediction"], expected, atol=1e-6, rtol=1e-5)
    agent.memory.store(**{name: value[:1] for name, value in agent.memory.data.items()})
    assert "next_prediction" not in sample(agent)


def test_ips_weights_are_inverse_label_frequencies(tmp_path: Path) -> None:
    labels = [[1, 1], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    for cls in (DDPG_ESMM_multiweight, DDPG_ESMM_BC):
        agent = uniform(make_agent(tmp_path, handmade([8], labels), cls, ips=True))
        batch = sample(agent)
        expected = torch.where(batch["label"] > 0, torch.tensor([8 / 4, 8 / 2]), torch.tensor([8 / 12, 8 / 14]))
        torch.testing.assert_close(batch["weight"], expected)
        torch.testing.assert_close(batch["weight"].mean(dim=0), torch.ones(2))
        agent.ips = False
        assert torch.equal(sample(agent)["weight"], torch.ones(8, 2))


def test_ddpg_ips_weights_are_joint(tmp_path: Path) -> None:
    """1 / (K P(y)): here three kinds of labels, one weight for both tasks, and mean 1."""
    labels = [[1, 1], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    batch = sample(uniform(make_agent(tmp_path, handmade([8], labels), DDPG_ESMM, ips=True)))
    expected = torch.where(batch["label"][:, 0] > 0, 8 / 3, 8 / 18)
    torch.testing.assert_close(batch["weight"], expected[:, None].expand(8, 2))
    torch.testing.assert_close(batch["weight"].mean(dim=0), torch.ones(2))


def test_plain_ddpg_bootstraps_from_the_target_critic(tmp_path: Path) -> None:
    """r + gamma (1 - done) Q_target(s', actor_target(s')): no noise, no minimum."""
    agent = uniform(make_agent(tmp_path, handmade([2, 3, 1]), DDPG_ESMM, gamma=0.5))
    batch = sample(agent)
    state = batch["next_categorical_x"], batch["next_numerical_x"]
    for task, (critic, target, _) in enumerate(agent.critics()):
        with torch.no_grad():
            for one in target.parameters():
                one += 0.01
            next_q = target(*state, agent.actor_target(*state)[:, task])
        y = batch["reward"][:, task] + 0.5 * (1 - batch["done"]) * next_q
        torch.testing.assert_close(agent.td_target(task, target, batch), y)
        critic.eval()
        q = critic(batch["categorical_x"], batch["numerical_x"], batch["action"][:, task])
        torch.testing.assert_close(agent.get_closs(task, critic, target, batch), ((q - y) ** 2).mean())


def test_exploration_noise_spreads_over_the_unit_interval(tmp_path: Path) -> None:
    """Of variance 0.4 it is reflected at both ends: nearly uniform, and nowhere exactly at an end."""
    agent = make_agent(tmp_path, handmade([2000]), ou_noise_gamma=0.4)
    states = agent.env.sessions.states
    exact, noisy = agent.select_action(states, noise=False), agent.select_action(states)
    assert noisy.dtype == np.float32
    assert 0 < noisy.min() < noisy.max() < 1
    counts, _ = np.histogram(noisy, bins=4, range=(0, 1))
    assert counts.min() > 0.2 * noisy.size
    np.testing.assert_array_equal(agent.select_action(states, noise=False), exact)
    agent.noise_mean, agent.noise_variance = 0.0, 1e-4
    assert 0.008 < (agent.select_action(states) - exact).std() < 0.012, "the variance is documented, not the deviation"
    agent.noise_mean, agent.noise_variance = 0.1, 0.0
    np.testing.assert_allclose(agent.select_action(states), 1 - np.abs(exact + 0.1 - 1), atol=1e-6)
    np.testing.assert_allclose(agent.select_action(states[3], noise=False), exact[3], rtol=1e-5)
    assert agent.select_action(states[3]).shape == (2,)


# ----------------------------------------------------------------------------------------------------------- updates


def test_bc_update_trains_critics_only(tmp_path: Path) -> None:
    agent = uniform(make_agent(tmp_path, handmade([3] * 20), init_training_step=0, actor_update_freq=1))
    before = {name: weights(network) for name, network in agent.networks().items()}
    for _ in range(6):
        assert all(torch.isfinite(loss) for loss in agent.update())
    for name, network in agent.networks().items():
        assert same(weights(network), before[name]) != name.startswith("critic"), name


def test_td3bc_predicts_next_states_every_update(tmp_path: Path) -> None:
    """Also about a batch that the agent looked at before; its target follows it."""
    agent = uniform(make_agent(tmp_path, handmade([3] * 20), TD3BC_ESMM, init_training_step=0, actor_update_freq=1))
    target = weights(agent.actor_target)
    for _ in range(4):
        agent.update()
    assert not same(weights(agent.actor_target), target)
    batch = sample(agent)
    expected = agent.actor_target(batch["next_categorical_x"], batch["next_numerical_x"])
    torch.testing.assert_close(agent.next_prediction(batch), expected)


@pytest.mark.parametrize("cls", [DDPG_ESMM, DDPG_ESMM_multiweight, TD3BC_ESMM])
def test_ddpg_trains_actor_after_init_training_step(tmp_path: Path, cls: type[DDPG_ESMM]) -> None:
    agent = uniform(make_agent(tmp_path, handmade([3] * 20), cls, init_training_step=4, actor_update_freq=3))
    pretrained, moved = weights(agent.pretrain_actor), []
    for number in range(1, 13):
        actor, critic = weights(agent.actor), weights(agent.critic2)
        agent.update()
        assert not same(critic, weights(agent.critic2))
        if not same(actor, weights(agent.actor)):
            moved.append(number)
    assert moved == [6, 9, 12]
    assert same(weights(agent.pretrain_actor), pretrained)
    assert not same(weights(agent.actor_target), pretrained)


@pytest.mark.parametrize("cls", [DDPG_ESMM, DDPG_ESMM_BC])
def test_the_actors_losses_by_their_closed_form(tmp_path: Path, cls: type[DDPG_ESMM]) -> None:
    """Plain DDPG's, and TD3+BC's, in which Q is divided by its mean size."""
    agent = uniform(make_agent(tmp_path, handmade([3] * 5), cls, actor_reg=2.5))
    batch = sample(agent)
    for network in (agent.actor, agent.critic1, agent.critic2):
        network.eval()
    with torch.no_grad():
        for one in agent.actor.parameters():
            one += 0.1
    state = batch["categorical_x"], batch["numerical_x"]
    action, pretrained = agent.actor(*state), agent.pretrain_actor(*state)
    q = torch.stack([agent.critic1(*state, action[:, :1]), agent.critic2(*state, action[:, 1:])])
    stored = torch.stack([agent.critic1(*state, batch["action"][:, :1]), agent.critic2(*state, batch["action"][:, 1:])])
    aloss, aloss_reg = agent.get_aloss(batch)
    size = stored.abs().mean() if cls is DDPG_ESMM_BC else 1.0
    torch.testing.assert_close(aloss, -(q[0] + q[1]).mean() / size, rtol=1e-4, atol=0)
    torch.testing.assert_close(aloss_reg, 2.5 * ((action - pretrained) ** 2).mean())
    assert float(aloss_reg.detach()) > 0


@pytest.mark.parametrize("cls", [DDPG_ESMM, DDPG_ESMM_BC])
def test_targets_follow_by_tau(tmp_path: Path, cls: type[DDPG_ESMM]) -> None:
    agent = make_agent(tmp_path, handmade([2]), cls)
    pairs = [(agent.critic1, agent.critic1_target), (agent.critic2, agent.critic2_target)]
    pairs += [(agent.actor, agent.actor_target)] if cls is DDPG_ESMM else []  # type: ignore[list-item]
    for network, target in pairs:
        for one in network.parameters():
            one.data += 1.0
        assert not any(one.requires_grad for one in target.parameters())
        assert not target.training
    leaders = [[one.clone() for one in network.parameters()] for network, _ in pairs]
    expected = [[0.7 * old + 0.3 * new for old, new in zip(target.parameters(), network.parameters(), strict=True)]
                for network, target in pairs]
    agent._target_soft_update(0.3)
    for (network, target), wanted, leader in zip(pairs, expected, leaders, strict=True):
        torch.testing.assert_close(list(target.parameters()), wanted)
        assert same(list(network.parameters()), leader)


@pytest.mark.parametrize("freq", [1, 3])
def test_targets_follow_every_soft_update_freq(tmp_path: Path, freq: int) -> None:
    agent, moved = uniform(make_agent(tmp_path, handmade([3] * 5), soft_update_freq=freq)), []
    sample(agent)  # the first batch brings the normalisation, to targets too
    for number in range(1, 7):
        target = weights(agent.critic1_target)
        agent.update()
        moved += [number] * (not same(target, weights(agent.critic1_target)))
    assert moved == list(range(freq, 7, freq))


THREE_TASKS = [[row % 2, row % 2 * (row % 3 == 0), row % 5 == 0] for row in range(60)]


@pytest.mark.parametrize("cls", [DDPG_ESMM, DDPG_ESMM_multiweight, DDPG_ESMM_BC, TD3BC_ESMM])
@pytest.mark.parametrize("task_num", [1, 3])
def test_any_number_of_tasks_has_as_many_critics(tmp_path: Path, cls: type[DDPG_ESMM], task_num: int) -> None:
    data = handmade([3] * 20, [labels[:task_num] for labels in THREE_TASKS])
    agent = uniform(make_agent(tmp_path, data, cls, init_training_step=0, ips=True))
    assert agent.env.action_space.shape == agent.select_action(np.zeros(4)).shape == (task_num,)
    before = {name: weights(network) for name, network in agent.networks().items()}
    for _ in range(4):
        losses = agent.update()
    assert len(losses) == task_num + 2
    changed = {name for name, network in agent.networks().items() if not same(weights(network), before[name])}
    critics = {f"critic{number}{suffix}" for number in range(1, task_num + 1) for suffix in ("", "_target")}
    assert changed == critics | ({"actor", "actor_target"} if agent.trains_actor else set())
    agent.save_or_load_agent(tmp_path / "agent", if_save=True)
    assert {path.stem for path in (tmp_path / "agent").glob("critic*.pth")} == critics


def test_each_critic_learns_its_own_task(tmp_path: Path) -> None:
    """The loss of critic k reads action, reward and weight k, and its gradient reaches critic k alone."""
    agent = uniform(make_agent(tmp_path, handmade([3] * 20, THREE_TASKS)))
    batch = sample(agent)
    trained = [critic for critic, _, _ in agent.critics()]
    for task, (critic, target, _) in enumerate(agent.critics()):
        critic.eval()
        loss = agent.get_closs(task, critic, target, batch)
        loss.backward()
        has_gradient = [any(one.grad is not None for one in other.parameters()) for other in trained]
        assert has_gradient == [other is critic for other in trained]
        critic.zero_grad()
        others = torch.arange(3) != task
        for name in ("action", "reward", "weight"):
            changed = {**batch, name: batch[name] + 0.3 * others}
            torch.testing.assert_close(agent.get_closs(task, critic, target, changed), loss)
        assert not torch.isclose(agent.get_closs(task, critic, target, {**batch, "reward": batch["reward"] - 1}), loss)


# ------------------------------------------------------------------------------------------------ starts and endings


@pytest.mark.parametrize("actor_name", MODELS)
def test_critics_start_from_the_actors_embedding(tmp_path: Path, actor_name: str) -> None:
    """Critic k of a single-task actor from task k's own; and every model can act and be asked for its losses."""
    agent = uniform(make_agent(tmp_path, handmade([3] * 5), DDPG_ESMM, actor_name, init_training_step=0))
    for task, (critic, target, _) in enumerate(agent.critics()):
        actor: Any = agent.pretrain_actor
        source = actor.inputs[task] if actor_name == "singletask" else actor.input
        for one in (critic, target):
            assert same(weights(one.input), weights(source))
    own = same(weights(agent.critic1.input), weights(agent.critic2.input))
    assert own == (actor_name != "singletask")
    agent.update()
    assert not same(weights(agent.critic1.input), weights(agent.critic1_target.input)), "a copy, not the actor's own"
    assert same(weights(agent.critic1_target.input), weights(getattr(agent.pretrain_actor, "input", None)
                                                            or agent.pretrain_actor.inputs[0]))  # type: ignore[index]


def gradient(critic: CriticNeg, batch: Tensors) -> float:
    critic.zero_grad()
    q = critic(batch["categorical_x"], batch["numerical_x"], batch["action"][:, :1])
    (q + 0.5).square().mean().backward()
    return sum(float(one.grad.abs().sum()) for one in critic.parameters() if one.grad is not None)


def test_critic_starts_active_and_head_resets(tmp_path: Path) -> None:
    agent = uniform(make_agent(tmp_path, handmade([3] * 20), batch_size=60))
    batch = sample(agent)

    def zeros(critic: CriticNeg) -> float:
        return zero_fraction(critic.eval()(batch["categorical_x"], batch["numerical_x"], batch["action"][:, :1]))

    for seed in range(20):
        torch.manual_seed(seed)
        fresh = CriticNeg([3, 4], 2, 8, (16, 8), (8, 4))
        assert zeros(fresh) < 0.5, seed
        assert gradient(fresh, batch) > 0
    critic = agent.critic1
    with torch.no_grad():
        critic.tower.output.bias.fill_(-100.0)  # type: ignore[union-attr]
    assert zeros(critic) == 1
    assert gradient(critic, batch) > 0, "a target below 0 leads it back"
    critic.reset_head()
    assert zeros(critic) < 0.5
    assert gradient(critic, batch) > 0


def test_a_critics_output_is_never_positive() -> None:
    critic = CriticNeg([3, 4], 2, 8, (16, 8), (8, 4))
    q = critic(torch.randint(3, (200, 2)), 30 * torch.randn(200, 2), torch.rand(200, 1)).detach()
    assert q.shape == (200,)
    assert float(q.max()) <= 0
    assert float(q.min()) < 0


def test_the_seven_networks_are_saved_and_read_back(tmp_path: Path) -> None:
    agent = uniform(make_agent(tmp_path, handmade([3] * 20), DDPG_ESMM, init_training_step=0))
    for _ in range(5):
        agent.update()
    agent.save_or_load_agent(str(tmp_path / "agent"), if_save=True)
    names = {"pretrain_actor", "actor", "actor_target", "critic1", "critic2", "critic1_target", "critic2_target"}
    assert {path.stem for path in (tmp_path / "agent").glob("*.pth")} == names == set(agent.networks())
    other = make_agent(tmp_path, handmade([3] * 20), DDPG_ESMM)
    assert not same(weights(other.actor), weights(agent.actor))
    other.save_or_load_agent(str(tmp_path / "agent"), if_save=False)
    for name, network in agent.networks().items():
        assert same(weights(network), weights(other.networks()[name])), name


def test_agent_state_dict_restores_the_next_update(tmp_path: Path) -> None:
    """Two agents, the second made anew in the midst of it, end the same bit for bit."""
    def continued(agent: DDPG_ESMM) -> list[Tensor]:
        torch.manual_seed(5)
        agent.memory.reseed(5)
        for _ in range(4):
            agent.update()
        return [tensor for network in agent.networks().values() for tensor in weights(network)]

    agent = uniform(make_agent(tmp_path, handmade([3] * 20), DDPG_ESMM, init_training_step=0))
    for _ in range(3):
        agent.update()
    torch.save(agent.state_dict(), tmp_path / "state.pt")
    other = uniform(make_agent(tmp_path, handmade([3] * 20), DDPG_ESMM, init_training_step=0))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(continued(agent), continued(other))


@pytest.mark.parametrize(("name", "value"), [("data", "other"), ("embed_dim", 16)])
def test_networks_of_another_kind_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    agent = make_agent(tmp_path, handmade([2]))
    agent.save_or_load_agent(str(tmp_path), if_save=True)
    agent.metadata[name] = value
    text = user_error_message(lambda: agent.save_or_load_agent(str(tmp_path), if_save=False))
    assert name in text
    assert "python3 RLmain.py" in text


def test_networks_of_other_field_sizes_are_refused(tmp_path: Path) -> None:
    """Also where the file claims the same ones."""
    agent = make_agent(tmp_path, handmade([2]))
    agent.save_or_load_agent(str(tmp_path), if_save=True)
    other = make_agent(tmp_path, handmade([2], field_dims=(3, 9)))
    assert "its field_dims is [3, 4]" in user_error_message(lambda: other.save_or_load_agent(tmp_path, if_save=False))
    other.metadata["field_dims"] = [3, 4]
    assert "do not fit" in user_error_message(lambda: other.save_or_load_agent(tmp_path, if_save=False))
    make_agent(tmp_path, handmade([2]))  # a baseline of other sizes
    env = MTEnv(handmade([2], field_dims=(3, 9)))
    text = user_error_message(lambda: DDPG_ESMM_BC(env, pretrain_path=tmp_path))
    assert "its field_dims is [3, 4], not [3, 9]" in text


def test_missing_baseline_error_names_the_command(tmp_path: Path) -> None:
    env = MTEnv(handmade([2]))
    text = user_error_message(lambda: DDPG_ESMM_BC(env, "ple", pretrain_path=str(tmp_path)))
    assert "python3 SLmain.py --model_name=ple" in text
