"""The offline MDP: rewards, ends of sessions, orders, windows; one session at a time and many at once."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import user_error_message
from factories import REWARDS, handmade
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray

from dataset.rtrl import RetailRocketRLDataset, load_splits
from dataset.vocabulary import encode_splits
from env import MTEnv, RewardType, compute_reward
from train.utils import ActionNormalizer

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def train(rt_tables: Path) -> RetailRocketRLDataset:
    """The simulated training split with its ids."""
    splits = load_splits(rt_tables)
    encode_splits(splits, 0.2)
    return splits.train


def checker_complaints(env: gym.Env[Any, Any]) -> list[str]:
    """What Gymnasium's checker warns of; what it takes for an error is raised."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    return [str(one.message) for one in caught]


class FreshWeights(gym.Wrapper[Any, Any, Any, Any]):
    """LinearReward puts one and the same array of weights into every info, which the checker forbids."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Copy it."""
        *result, info = self.env.step(action)
        return *result, {**info, "reward_weights": info["reward_weights"].copy()}  # type: ignore[return-value]


NO_SPEC = "not having a spec"  # nobody registers an environment that needs a data set
UNBOUNDED = "Box observation space m"  # minimum / maximum value is infinite: numbers have no bounds


@pytest.mark.parametrize("is_seq", [False, True])
def test_gymnasiums_checker_passes(train: RetailRocketRLDataset, is_seq: bool) -> None:
    """It knows no vector rewards, which are MO-Gymnasium's convention, and says so; it finds nothing else."""
    said = checker_complaints(MTEnv(train, is_seq=is_seq))
    assert [one for one in said if not any(
        known in one for known in (NO_SPEC, UNBOUNDED, "reward returned by `step()` must be a float"))] == []


@pytest.mark.parametrize("reward_type", REWARDS)
def test_mo_gymnasiums_linear_reward_wraps_it(train: RetailRocketRLDataset, reward_type: RewardType) -> None:
    mo_gymnasium = pytest.importorskip("mo_gymnasium")
    env = mo_gymnasium.wrappers.LinearReward(MTEnv(train, reward_type), weight=np.array([0.25, 0.75]))
    said = checker_complaints(FreshWeights(env))
    assert [one for one in said if not any(
        known in one for known in (NO_SPEC, UNBOUNDED, "different from the unwrapped version"))] == []
    env.reset(seed=1)
    _, reward, _, _, info = env.step(np.array([0.3, 0.6], np.float32))
    expected = compute_reward(np.array([0.3, 0.6], np.float32), info["label"], reward_type)
    assert reward == pytest.approx(0.25 * expected[0] + 0.75 * expected[1], rel=1e-6)


def test_step_returns_are_in_the_spaces(train: RetailRocketRLDataset) -> None:
    for reward_type in REWARDS:
        for is_seq in (False, True):
            env = MTEnv(train, reward_type, is_seq=is_seq)
            observation, _ = env.reset(seed=0)
            assert env.observation_space.contains(observation)
            for corner in ([0, 0], [1, 1], [0, 1], [0.5, 0.5]):
                observation, reward, terminated, truncated, info = env.step(np.array(corner, np.float32))
                assert env.observation_space.contains(observation)
                assert env.reward_space.contains(reward)
                assert isinstance(terminated, bool)
                assert truncated is False
                assert info["label"].shape == reward.shape == (2,)
                if terminated:
                    env.reset()


@pytest.mark.parametrize(("reward_type", "action", "label", "expected"), [
    ("bce", 0.3, 1, math.log(0.3)),
    ("bce", 0.3, 0, math.log(0.7)),
    ("bce", 0.0, 1, math.log(1e-4)),
    ("bce", 1.0, 0, math.log(1e-4)),
    ("bce", 1.0, 1, math.log(1 - 1e-4)),
    ("bce", 0.00005, 0, math.log(1 - 1e-4)),
    ("norm", 0.3, 1, -0.7),
    ("norm", 0.3, 0, -0.3),
    ("norm", 0.0, 0, 0.0),
])
def test_reward_by_its_closed_form(reward_type: RewardType, action: float, label: int, expected: float) -> None:
    """Of either task, whatever the other's; also in float32, whose 1 - 1e-4 must not reach 1."""
    env = MTEnv(handmade([1], [[label, 1 - label]]), reward_type)
    env.reset()
    _, reward, _, _, _ = env.step(np.array([action, 1 - action], np.float32))
    assert reward == pytest.approx([expected, expected], rel=1e-3, abs=1e-6)
    assert compute_reward(np.float64([action]), np.float32([label]), reward_type) == pytest.approx([expected], rel=1e-6)


def test_an_unknown_reward_type_is_refused() -> None:
    assert "bce, norm" in user_error_message(lambda: MTEnv(handmade([2]), "mse"))  # type: ignore[arg-type]


def test_episode_ends_at_the_sessions_last_row() -> None:
    env = MTEnv(handmade([2, 1, 4]), is_test=True)
    for length, first in ((2, 0), (1, 2), (4, 3), (2, 0)):  # is_test: in order of time, again and again
        observation, info = env.reset()
        seen, ends = [observation[2]], []
        for _ in range(length):
            observation, _, terminated, truncated, info = env.step(np.full(2, 0.5, np.float32))
            assert truncated is False
            seen.append(observation[2])
            ends.append(terminated)
        assert ends == [False] * (length - 1) + [True]
        assert seen == [*range(first, first + length), first + length - 1]
        assert info["session"] == env.sessions.session[first]


def test_reward_is_of_the_shown_impression() -> None:
    labels = [[0, 0], [1, 0], [1, 1]]
    env = MTEnv(handmade([3], labels), "norm")
    env.reset()
    for label in labels:
        _, reward, _, _, info = env.step(np.array([0.2, 0.2], np.float32))
        assert info["label"].tolist() == label
        assert reward.tolist() == pytest.approx([-abs(0.2 - y) for y in label])


def test_step_returns_are_copies() -> None:
    """Whoever keeps observations, labels and actions owns them; and the caller may reuse its array of actions."""
    env, action = MTEnv(handmade([2], [[1, 0], [0, 1]])), np.full(2, 0.25, np.float32)
    observation, _ = env.reset()
    observation[:] = -7
    observation, _, _, _, info = env.step(action)
    action[:] = 0.5
    assert info["action"].tolist() == [0.25, 0.25]
    for array in (observation, info["label"], info["action"]):
        array[:] = -7
    assert env.reset()[0].tolist() == [0, 0, 0, 0]
    assert env.step(action)[-1]["label"].tolist() == [1, 0]


def test_reset_takes_a_session_or_a_seed() -> None:
    env = MTEnv(handmade([2, 3, 1]))
    for number, first in enumerate((0, 2, 5)):
        observation, info = env.reset(options={"session": number})
        assert observation[2] == first
        assert info["session"] == 10 * (number + 1)
    with pytest.raises(ValueError, match="0 to 2"):
        env.reset(options={"session": 3})
    many = MTEnv(handmade([1] * 200))

    def drawn(seed: int) -> list[int]:
        return [many.reset(seed=seed)[1]["session"], *(many.reset()[1]["session"] for _ in range(20))]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert len(set(drawn(5))) > 10


def test_window_contains_only_its_session() -> None:
    env = MTEnv(handmade([2, 4]), is_test=True, is_seq=True, window=3)
    nothing = [-1, -1, 0, 0]

    def row(number: int) -> list[int]:
        return [number % 3, number % 4, number, -number]

    assert env.reset()[0].tolist() == [nothing, nothing, row(0)]
    assert env.step(np.zeros(2, np.float32))[0].tolist() == [nothing, row(0), row(1)]
    assert env.step(np.zeros(2, np.float32))[0].tolist() == [nothing, row(0), row(1)]  # its end
    windows = [env.reset()[0].tolist(), *(env.step(np.zeros(2, np.float32))[0].tolist() for _ in range(3))]
    assert windows == [[nothing, nothing, row(2)], [nothing, row(2), row(3)], [row(2), row(3), row(4)],
                       [row(3), row(4), row(5)]]


@pytest.mark.parametrize("num_envs", [1, 3, 64, 100_000])
@pytest.mark.parametrize(("reward_type", "is_seq"), [("bce", False), ("norm", True)])
def test_vector_env_equals_single_env(
        train: RetailRocketRLDataset, num_envs: int, reward_type: RewardType, is_seq: bool) -> None:
    """Step for step, every session exactly once, in a pass over all of them in any order."""
    single = MTEnv(train, reward_type, is_seq=is_seq, window=4)
    count = len(single.sessions.index.starts) if num_envs > 1 else 40
    order = np.random.default_rng(1).permutation(len(single.sessions.index.starts))[:count]
    vector, rng = single.vector(num_envs, order), np.random.default_rng(2)
    assert vector.num_envs == min(num_envs, count)
    got: dict[int, list[tuple[Any, ...]]] = {number: [] for number in range(count)}
    state, info = vector.reset()
    assert info["episode"].tolist() == list(range(vector.num_envs))
    while vector.episode.min() < count:
        actions = rng.random((vector.num_envs, 2), np.float32)
        after, reward, terminated, truncated, info = vector.step(actions)
        assert not truncated.any()
        for lane, number in enumerate(info["episode"]):
            if number < count:
                got[number].append((state[lane], actions[lane], reward[lane], terminated[lane],
                                    info["final_obs"][lane], info["label"][lane]))
                follows = after[lane] if not terminated[lane] else info["final_obs"][lane]
                np.testing.assert_array_equal(follows, info["final_obs"][lane])
        state = after
    for number, steps in got.items():
        observation, _ = single.reset(options={"session": order[number]})
        for before, action, reward_, terminated_, after_, label in steps:
            np.testing.assert_array_equal(observation, before)
            observation, single_reward, single_terminated, _, single_info = single.step(action)
            np.testing.assert_array_equal(observation, after_)
            np.testing.assert_array_equal(single_reward, reward_)
            np.testing.assert_array_equal(single_info["label"], label)
            assert single_terminated == terminated_
        assert [step[3] for step in steps] == [False] * (len(steps) - 1) + [True]


def test_the_normaliser_maps_actions_once() -> None:
    env = ActionNormalizer(MTEnv(handmade([3], [[0, 0]] * 3)))
    assert env.action_space.low.tolist() == [-1, -1]
    assert env.action_space.high.tolist() == [1, 1]
    env.reset(seed=0)
    for given, rewarded in ((-1.0, 0.0), (0.0, 0.5), (1.0, 1.0)):
        _, _, _, _, info = env.step(np.full(2, given, np.float32))
        assert info["action"].tolist() == [rewarded, rewarded]


@pytest.mark.parametrize("reward_type", REWARDS)
@pytest.mark.parametrize("wrappers", ["", "normaliser", "limit", "normaliser limit", "limit normaliser",
                                      "normaliser linear", "statistics normaliser", "normaliser statistics limit"])
def test_info_has_the_rewarded_action(train: RetailRocketRLDataset, reward_type: RewardType, wrappers: str) -> None:
    """The pair that goes into a replay memory, for every combination of wrappers around the environment."""
    env: gym.Env[Any, Any] = MTEnv(train, reward_type)
    for name in wrappers.split():
        if name == "normaliser":
            env = ActionNormalizer(env)
        elif name == "limit":
            env = gym.wrappers.TimeLimit(env, 50)
        else:
            mo = pytest.importorskip("mo_gymnasium").wrappers
            env = mo.LinearReward(env) if name == "linear" else mo.MORecordEpisodeStatistics(env)
    env.action_space.seed(3)
    env.reset(seed=3)
    for _ in range(40):
        asked = env.action_space.sample()
        _, reward, terminated, _, info = env.step(asked)
        expected = compute_reward(info["action"], info["label"], reward_type)
        np.testing.assert_array_equal(info.get("vector_reward", reward), expected)
        meant = 0.5 * asked + 0.5 if "normaliser" in wrappers else asked
        np.testing.assert_allclose(info["action"], meant, atol=1e-6)
        if terminated:
            env.reset()


@pytest.mark.parametrize("action", [0.1, [0.1], [[0.1, 0.2]], [[0.1], [0.2]], [0.1, 0.2, 0.3], [np.nan, 0.2],
                                    [1.5, 0.2], [0.1, -0.2]], ids=str)
def test_an_action_that_is_no_prediction_is_refused(action: Any) -> None:
    """Of another shape it would be broadcast into a reward of another shape."""
    env = MTEnv(handmade([3]))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action: "):
        env.step(action)
    many = MTEnv(handmade([3, 2])).vector(2)
    many.reset()
    with pytest.raises(ValueError, match="action: "):
        many.step(np.asarray(action, np.float32))


def test_mapped_arrays_are_observed_like_those_in_memory(train: RetailRocketRLDataset, tmp_path: Path) -> None:
    """Ids of 32 bits and labels of 8, in files: rows are read when they are observed."""
    mapped = copy.copy(train)
    for name, values in (("_categorical", train.categorical.astype(np.int32)), ("numerical", train.numerical),
                         ("labels", train.labels.astype(np.uint8)), ("session", train.session)):
        np.save(tmp_path / f"{name}.npy", values)
        setattr(mapped, name, np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    for is_seq in (False, True):
        envs = [MTEnv(dataset, is_seq=is_seq, window=3).vector(50) for dataset in (train, mapped)]
        np.testing.assert_array_equal(*(env.reset()[0] for env in envs))
        for _ in range(20):
            actions = np.random.default_rng(1).random((50, 2), np.float32)
            steps = [env.step(actions) for env in envs]
            for expected, got in zip(*(step[:3] for step in steps), strict=True):
                np.testing.assert_array_equal(got, expected)
                assert got.dtype == expected.dtype
            assert steps[1][4]["label"].dtype == np.float32
    single = MTEnv(mapped, is_test=True)
    single.reset()
    np.testing.assert_array_equal(single.step(np.float32([0.5, 0.5]))[4]["label"], train.labels[0])
    assert not any(isinstance(value, np.ndarray) and value.size > train.labels.size and value.base is None
                   for value in vars(single.sessions).values()), "no array of all rows is copied"
