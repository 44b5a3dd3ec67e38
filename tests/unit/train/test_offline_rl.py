"""Filling the replay buffer, training to convergence, judging, resuming; by hand and on the simulated sessions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import user_error_message
from factories import REWARDS, handmade, make_agent, same, uniform, weights
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from agents import DDPG_ESMM, DDPG_ESMM_BC
from common.run_dir import RunDirectory
from dataset.loader import TensorLoader
from dataset.rtrl import RetailRocketRLDataset, load_splits
from dataset.sessions import SessionIndex
from dataset.vocabulary import encode_splits
from env import MTEnv, RewardType, compute_reward
from train import offline_rl as offline
from train.metrics import group_auc
from train.offline_rl import (
    collect_transitions,
    discounted_returns,
    evaluate_critics,
    one_iter_offline,
    plot_loss,
    rank_correlation,
    train_and_test_offline,
)
from train.offline_rl import test as play_test_sessions
from train.supervised import evaluate, slpred
from train.utils import ActionNormalizer, ConvergeStopper

AnyEnv = gym.Env[Any, Any]


@pytest.fixture(scope="module")
def data(rt_tables: Path) -> tuple[RetailRocketRLDataset, RetailRocketRLDataset]:
    """The simulated training and validation splits with their ids."""
    splits = load_splits(rt_tables)
    encode_splits(splits, 0.2)
    return splits.train, splits.val


Data = tuple[RetailRocketRLDataset, RetailRocketRLDataset]


def test_discounted_returns_by_hand() -> None:
    rewards = np.float32([[-1, 0], [-2, -4], [-3, -1], [-5, -7], [-8, 0]])
    index = SessionIndex(np.array([7, 7, 7, 2, 5]))
    expected = [[-1 - 1 - 0.75, -2 - 0.25], [-2 - 1.5, -4 - 0.5], [-3, -1], [-5, -7], [-8, 0]]
    np.testing.assert_allclose(discounted_returns(rewards, index, 0.5), expected)
    np.testing.assert_array_equal(discounted_returns(rewards, index, 0.0), rewards)
    assert rewards[0, 0] == -1, "the rewards are left as they are"


def as_counter(*columns: NDArray[Any]) -> Counter[tuple[float, ...]]:
    return Counter(map(tuple, np.hstack([column.reshape(len(column), -1) for column in columns]).tolist()))


@pytest.mark.parametrize("lanes", [1, 7, 4096])
@pytest.mark.parametrize("reward_type", REWARDS)
def test_each_logged_transition_is_stored_exactly_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int,
                                                       reward_type: RewardType) -> None:
    monkeypatch.setattr(offline, "NUM_ENVS", lanes)
    dataset = handmade([3, 1, 2, 5, 1, 4, 2])
    agent = make_agent(tmp_path, dataset, reward_type=reward_type)
    assert one_iter_offline(agent) == len(agent.memory) == len(dataset)
    stored = {name: value[: len(dataset)] for name, value in agent.memory.data.items()}
    states, ends = agent.env.sessions.states, agent.env.sessions.index.ends
    rows = np.arange(len(dataset))
    done = np.isin(rows, ends)
    assert as_counter(stored["state"], stored["next_state"], stored["done"], stored["label"]) == as_counter(
        states, states[np.where(done, rows, rows + 1)], done.astype(np.float32), dataset.labels)
    np.testing.assert_array_equal(stored["reward"], compute_reward(stored["action"], stored["label"], reward_type))
    assert ((stored["action"] >= 0) & (stored["action"] <= 1)).all()


@pytest.mark.parametrize("lanes", [2, 4096])
def test_chosen_sessions_are_stored_that_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    monkeypatch.setattr(offline, "NUM_ENVS", lanes)
    agent = make_agent(tmp_path, handmade([3, 1, 2]))
    count = collect_transitions(agent, lambda state: np.full((len(state), 2), 0.5, np.float32), np.array([2, 0, 2, 2]))
    assert count == 9
    assert Counter(agent.memory.data["state"][:9, 2].tolist()) == {0: 1, 1: 1, 2: 1, 4: 3, 5: 3}


def trained(folder: Path, data: Data, epoch: int, cls: type[DDPG_ESMM] = DDPG_ESMM_BC, resume: bool = False,
            change: Callable[[DDPG_ESMM], None] = lambda agent: None,
            **more: Any) -> tuple[DDPG_ESMM, list[dict[str, Any]]]:
    """A small run into `folder`: the same seed, hence the same baseline."""
    torch.manual_seed(11)
    folder.mkdir(exist_ok=True)
    hyparams = {name: more.pop(name) for name in ("critic_lr", "reward_type") if name in more}
    agent = make_agent(folder, data[0], cls, memory_size=20_000, batch_size=32, init_training_step=2, **hyparams)
    change(agent)
    rows = train_and_test_offline(MTEnv(data[1]), agent, epoch, 50, str(folder), str(folder / "memory.npz"),
                                  seed=3, epoch_updates=8, resume=resume,
                                  **{"stopper": ConvergeStopper(num_trials=3, tolerance=1e-6), **more})
    return agent, rows


def test_a_log_larger_than_the_buffer_is_sampled(tmp_path: Path, data: Data,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Whole sessions from everywhere in the log, a function of the seed; uniform actions take a third."""
    def stored(name: str, seed: int) -> NDArray[np.float32]:
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(11)
        agent = make_agent(folder, handmade([3, 1, 2] * 200), memory_size=300)
        offline._fill_replay_buffer(agent, 100, folder / "memory.npz", seed, {})
        assert len(agent.memory) == 300
        return agent.memory.storage.copy()

    first = stored("first", 1)
    assert "sessions of uniform actions, and" in (said := capsys.readouterr().out)
    assert re.search(r" 1\d\d, drawn at random, of 600 of the pretrained actor", said)
    np.testing.assert_array_equal(stored("again", 1), first)
    rows = first[:, 2].astype(int)  # of the log
    assert Counter(rows // 400).keys() == {0, 1, 2}, "from every third of the log"
    assert not np.array_equal(np.sort(stored("other", 2)[:, 2]), np.sort(first[:, 2]))
    counts = np.zeros(600)
    index = SessionIndex(np.repeat(np.arange(600), [3, 1, 2] * 200))
    for seed in range(200):
        chosen = offline.sample_sessions(index, 300, seed)
        assert chosen is not None
        assert 300 <= index.lengths[chosen].sum() < 303
        counts[chosen] += 1
    assert counts.reshape(-1, 3).mean(axis=0) == pytest.approx([50, 50, 50], rel=0.05), "whatever their lengths"
    assert offline.sample_sessions(index, 1_200, 1) is None


def test_held_out_sessions_are_sampled(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    agent, _ = trained(tmp_path / "all", data, 1)
    environment = MTEnv(data[1])
    whole = offline.rollout(environment, agent)
    episodes = offline.sample_sessions(data[1].sessions, 100, 5)
    assert episodes is not None
    rows = offline.rows_of(data[1].sessions, episodes)
    monkeypatch.setattr(offline, "EVALUATION_ROWS", 10)
    for played in (offline.rollout(environment, agent, episodes), offline.step_rollout(environment, agent, episodes)):
        for name in ("action", "reward", "label", "q", "returns"):
            np.testing.assert_allclose(getattr(played, name), getattr(whole, name)[rows], rtol=1e-4, atol=1e-6)
    assert "held-out metrics are of" not in capsys.readouterr().out
    monkeypatch.setattr(offline, "EVALUATED_ROWS", 100)
    (one, rows_one), (_, rows_two) = (trained(tmp_path / name, data, 2) for name in ("one", "two"))
    assert re.search(r"held-out metrics are of \d+ of \d+ sessions, drawn at random", capsys.readouterr().out)
    assert rows_one == rows_two
    assert one is not None


def test_uniform_actions_cover_the_unit_interval(
        tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    agent, _ = trained(tmp_path, data, 1)
    uniform_rows = len(agent.memory) - len(data[0])
    assert uniform_rows >= 100, "50 sessions of 2 impressions and more"
    actions = agent.memory.data["action"][: len(agent.memory)]
    for task in range(2):
        counts, _ = np.histogram(actions[:uniform_rows, task], bins=4, range=(0, 1))
        assert counts.min() > uniform_rows / 8
    rewards = agent.memory.data["reward"][: len(agent.memory)]
    labels = agent.memory.data["label"][: len(agent.memory)]
    np.testing.assert_array_equal(rewards, compute_reward(actions, labels, "bce"))
    assert "50 sessions of uniform actions" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [DDPG_ESMM_BC, DDPG_ESMM])
def test_same_seed_gives_same_buffer_and_critics(tmp_path: Path, data: Data, cls: type[DDPG_ESMM]) -> None:
    (one, rows), (other, other_rows) = (trained(tmp_path / name, data, 2, cls) for name in ("one", "other"))
    np.testing.assert_array_equal(one.memory.storage, other.memory.storage)
    assert rows == other_rows
    for name, network in one.networks().items():
        assert same(weights(network), weights(other.networks()[name])), name
    assert same(weights(one.actor), weights(one.pretrain_actor)) == (cls is DDPG_ESMM_BC)


@pytest.mark.parametrize("cls", [DDPG_ESMM_BC, DDPG_ESMM])
def test_resumed_critics_equal_uninterrupted_critics(tmp_path: Path, data: Data, cls: type[DDPG_ESMM]) -> None:
    whole, rows = trained(tmp_path / "whole", data, 4, cls)
    trained(tmp_path / "parts", data, 2, cls)
    again, again_rows = trained(tmp_path / "parts", data, 4, cls, resume=True)
    assert [row["epoch"] for row in again_rows] == [1, 2, 3, 4]
    assert again_rows == rows
    for name, network in whole.networks().items():
        assert same(weights(network), weights(again.networks()[name])), name
    metrics = (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert (tmp_path / "parts" / "metrics.csv").read_bytes() == metrics


def test_resume_refuses_other_settings(tmp_path: Path, data: Data) -> None:
    trained(tmp_path, data, 1, settings={"gamma": 0.9})
    text = user_error_message(lambda: trained(tmp_path, data, 2, resume=True, settings={"gamma": 0.5}))
    assert "--gamma" in text
    trained(tmp_path, data, 1)
    assert (tmp_path / "checkpoint.previous.pt").exists()


def test_convergence_stops_training_and_is_printed(tmp_path: Path, data: Data,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Every change is less than 1000 %: after the first epoch two more are enough."""
    _, rows = trained(tmp_path, data, 9, stopper=ConvergeStopper(num_trials=2, tolerance=10.0))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    said = capsys.readouterr().out
    assert "converged in epoch 3: the critic loss changed by less than 1000.0% for 2 epochs" in said
    trained(tmp_path, data, 2)
    assert "stopped after epoch 2, the last one (--epoch)" in capsys.readouterr().out


def test_resuming_a_finished_run_trains_no_epoch(tmp_path: Path, data: Data) -> None:
    _, rows = trained(tmp_path, data, 9, stopper=ConvergeStopper(num_trials=1, tolerance=10.0))
    agent, again = trained(tmp_path, data, 9, stopper=ConvergeStopper(num_trials=1, tolerance=10.0), resume=True)
    assert again == rows
    assert agent.updates == 8 * len(rows)


def kill_critic(agent: DDPG_ESMM) -> None:
    """Critic 2 and its target: -1000 before the ReLU for every state."""
    with torch.no_grad():
        for critic in (agent.critic2, agent.critic2_target):
            assert critic.tower.output is not None
            critic.tower.output.bias.fill_(-1000.0)


def test_collapsed_critic_is_reset_and_printed(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    agent, rows = trained(tmp_path, data, 4, change=kill_critic)
    said = capsys.readouterr().out
    assert said.count("critic 2 collapsed (100% zero outputs, standard deviation of Q 0): re-initialized") == 1
    assert "critic 1 collapsed" not in said
    assert rows[0]["zero_fraction_1"] == 1
    assert rows[0]["zero_fraction_0"] < 0.99
    assert rows[-1]["zero_fraction_1"] < 0.99
    assert evaluate_critics(MTEnv(data[1]), agent)["zero_fraction_1"] < 0.99


def test_permanently_collapsed_critic_fails_the_run(tmp_path: Path, data: Data) -> None:
    def for_good(agent: DDPG_ESMM) -> None:
        kill_critic(agent)
        for critic in (agent.critic2, agent.critic2_target):
            critic.reset_head = lambda: None  # type: ignore[method-assign]

    text = user_error_message(lambda: trained(tmp_path, data, 50, change=for_good))
    assert "critic 2 collapsed" in text
    assert "100%" in text


def test_collapse_in_last_epoch_fails_the_run(tmp_path: Path, data: Data) -> None:
    """Reviving at the very end would leave an untrained critic: the run fails, and hands none out."""
    text = user_error_message(lambda: trained(tmp_path, data, 1, change=kill_critic))
    assert "critic 2 collapsed" in text
    assert "or no epoch is left for it" in text
    assert not (tmp_path / "critic2.pth").exists()


def test_nan_parameter_stops_the_run(tmp_path: Path, data: Data) -> None:
    def spoil(agent: DDPG_ESMM) -> None:
        with torch.no_grad():
            agent.critic1.first.weight.fill_(float("nan"))

    text = user_error_message(lambda: trained(tmp_path, data, 2, change=spoil))
    assert "critic1" in text
    assert "nan" in text
    assert "--critic_lr" in text
    assert not (tmp_path / "critic1.pth").exists()


def test_buffer_is_reloaded_unless_metadata_differ(
        tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = trained(tmp_path, data, 1)
    stamp = (tmp_path / "memory.npz").stat().st_mtime_ns
    assert "filled with" in capsys.readouterr().out
    second, _ = trained(tmp_path, data, 1)
    assert "filled with" not in capsys.readouterr().out
    assert (tmp_path / "memory.npz").stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(first.memory.storage, second.memory.storage)
    text = user_error_message(lambda: trained(tmp_path, data, 1, reward_type="norm"))
    assert "its reward type is" in text
    trained(tmp_path, data, 1, reward_type="norm", refill=True)
    assert "filled with" in capsys.readouterr().out


def test_used_buffer_is_cleared_before_filling(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written under the agent's name is what such an agent fills, not what it happened to hold before."""
    clean, _ = trained(tmp_path / "clean", data, 1)
    held, _ = trained(tmp_path / "held", data, 1, change=uniform)
    assert f"replay buffer: discarding its {len(data[0]):,} transitions" in capsys.readouterr().out
    assert len(held.memory) == len(clean.memory)
    with np.load(tmp_path / "clean/memory.npz") as one, np.load(tmp_path / "held/memory.npz") as other:
        np.testing.assert_array_equal(one["action"], other["action"])


def test_loaded_buffer_trains_as_the_filled_one(tmp_path: Path, data: Data) -> None:
    first, rows = trained(tmp_path, data, 2)
    second, again = trained(tmp_path, data, 2)
    assert rows == again
    assert same(weights(first.critic1), weights(second.critic1))


# ----------------------------------------------------------------------------------------------------------- judging


def answers(values: dict[str, NDArray[Any]]) -> Callable[..., dict[str, NDArray[Any]]]:
    """A `rollout` whose Q is what the test says."""
    def played(environment: MTEnv, agent: DDPG_ESMM, episodes: None) -> dict[str, NDArray[Any]]:
        return values

    return played


def test_exact_q_has_no_td_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sessions whose rewards are known: Q = the discounted return."""
    agent = uniform(make_agent(tmp_path, handmade([3, 1, 2, 5], [[row % 2, row % 3 == 0] for row in range(11)])))
    played = offline.rollout(agent.env, agent)
    exact = played._replace(q=played.returns)
    monkeypatch.setattr(offline, "rollout", answers(exact))
    figures = evaluate_critics(agent.env, agent)
    for task in range(2):
        assert figures[f"td_error_{task}"] == pytest.approx(0, abs=1e-12)
        assert figures[f"rank_correlation_{task}"] == pytest.approx(1)
        assert figures[f"zero_fraction_{task}"] == 0
    assert figures["score"] == pytest.approx(float(played.reward.sum()) / 4, rel=1e-5)

    monkeypatch.setattr(offline, "rollout", answers(played._replace(q=-played.returns)))
    assert evaluate_critics(agent.env, agent)["rank_correlation_0"] == pytest.approx(-1)
    monkeypatch.setattr(offline, "rollout", answers(played._replace(q=np.zeros((11, 2)))))
    figures = evaluate_critics(agent.env, agent)
    assert figures["zero_fraction_1"] == 1
    assert figures["rank_correlation_1"] == 0
    assert figures["td_error_1"] == pytest.approx(float((played.reward[:, 1] ** 2).mean()))


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation(np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3])) == pytest.approx(0.6)
    assert rank_correlation(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])) == 0


def test_rollout_equals_single_steps(tmp_path: Path) -> None:
    dataset = handmade([3, 1, 2])
    agent, env = make_agent(tmp_path, dataset), MTEnv(dataset, is_test=True)
    played, row = offline.rollout(env, agent), 0
    for length in (3, 1, 2):
        state, _ = env.reset()
        rewards = []
        for _ in range(length):
            action = agent.select_action(state, noise=False)
            np.testing.assert_allclose(action, played.action[row], rtol=1e-5)
            state, reward, _, _, _ = env.step(action)
            rewards.append(reward)
            np.testing.assert_allclose(reward, played.reward[row], rtol=1e-4)
            row += 1
        discounted = sum(0.9**t * reward for t, reward in enumerate(rewards))
        np.testing.assert_allclose(played.returns[row - length], discounted, rtol=1e-4)


def test_test_loads_the_saved_agent(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    agent, _ = trained(tmp_path, data, 1, DDPG_ESMM)
    env = MTEnv(data[1], is_test=True)
    expected = float(offline.rollout(env, agent).score)
    with torch.no_grad():
        for one in agent.actor.parameters():
            one.zero_()
    figures = play_test_sessions(env, agent, str(tmp_path))
    assert figures["score"] == pytest.approx(expected)
    said = capsys.readouterr().out
    for task in range(2):
        line = f"task {task}, AUC {figures[f'auc_{task}']}, Log-loss {figures[f'logloss_{task}']}"
        assert line in said
        assert figures[f"auc_{task}"] != 0.5, "the zeroed actor would reach that"


@pytest.mark.parametrize("wrap", [MTEnv, lambda dataset: ActionNormalizer(MTEnv(dataset, is_test=True))])
def test_gauc_of_sessions_and_users(tmp_path: Path, wrap: Callable[[RetailRocketRLDataset], AnyEnv]) -> None:
    """Of a model's evaluation and of the actor's test; a user has two of the sessions."""
    labels = np.random.default_rng(1).integers(0, 2, (60, 2))
    dataset = handmade([4, 1, 7, 3] * 4, labels.tolist())
    dataset.keys["userid"], dataset.history_key = dataset.session // 10 % 8, "userid"
    agent = make_agent(tmp_path, dataset)
    agent.save_or_load_agent(tmp_path, True)
    figures = play_test_sessions(wrap(dataset), agent, tmp_path)
    predictions = np.column_stack(slpred(agent.actor, TensorLoader(dataset, 9), 2, "cpu"))
    for task, metrics in enumerate(evaluate(agent.actor, TensorLoader(dataset, 9), 2, "cpu")):
        expected = [group_auc(predictions[:, task], dataset.labels[:, task], group)
                    for group in (dataset.session, dataset.keys["userid"])]
        assert [metrics.session_gauc, metrics.user_gauc] == expected
        assert [figures[f"{name}_gauc_{task}"] for name in ("session", "user")] == pytest.approx(expected)
        assert expected[0] != expected[1]
    plain = evaluate(agent.actor, DataLoader(dataset, 9), 2, "cpu")
    assert np.isnan([(one.session_gauc, one.user_gauc) for one in plain]).all(), "each row is a session of its own"


def test_untrained_agents_are_refused(tmp_path: Path, data: Data) -> None:
    agent = make_agent(tmp_path, data[0])
    assert user_error_message(agent.update).startswith("the replay buffer is empty: fill it first")
    message = user_error_message(lambda: play_test_sessions(MTEnv(data[1], is_test=True), agent, tmp_path / "empty"))
    assert str(tmp_path / "empty") in message


def test_critics_that_rank_nothing_are_a_warning(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each, with what to do; none for a critic that ranks."""
    correlations = iter([0.01, 0.4])
    monkeypatch.setattr(offline, "rank_correlation", lambda *_: next(correlations))
    trained(tmp_path, data, 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: critic 1: rank correlation 0.010")
    assert "--converge_tolerance" in line


def test_losses_are_drawn_into_a_png(tmp_path: Path) -> None:
    figures = ("score", "closs1", "closs2", "aloss", "aloss_reg", "rank_correlation_0", "rank_correlation_1")
    plot_loss([dict.fromkeys(figures, 0.5), dict.fromkeys(figures, 0.25)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_run_writes_its_files(tmp_path: Path, data: Data) -> None:
    trained(tmp_path, data, 2)
    run = RunDirectory.of_agent(tmp_path)
    lines = run.metrics.read_text().splitlines()
    assert len(lines) == 3
    assert {"epoch", "closs1", "closs2", "aloss", "aloss_reg", "score", "td_error_0", "rank_correlation_1",
            "zero_fraction_0"} <= set(lines[0].split(","))
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    assert run.checkpoint.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_refused_buffer_leaves_files_unchanged(tmp_path: Path, data: Data) -> None:
    """The refusal comes before anything is set aside, however often the run is tried."""
    trained(tmp_path, data, 1)
    baseline = "rt_esmm.pt"  # written by the helper of these tests
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != baseline}
    for _ in range(2):
        assert "its reward type is" in user_error_message(lambda: trained(tmp_path, data, 1, reward_type="norm"))
    with pytest.raises(ValueError, match="at least 1"):
        trained(tmp_path, data, 0)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob("*.previous.*"))
