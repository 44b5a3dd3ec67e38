"""The offline MDP: logged sessions as a Gymnasium environment, one session or thousands at once.

    python3 env.py            # shows a few sessions of the prepared data

State s_t: ids and numbers of a session's t-th impression. Action a_t in [0, 1]^T: the predictions. Reward, one a task:
`bce` y log a + (1 - y) log(1 - a), a clipped to [1e-4, 1 - 1e-4]; `norm` -|a - y|. The next state is the session's
next impression whatever the action; the last impression terminates the episode.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.startup import before_torch


def parse() -> None:
    argparse.ArgumentParser(description="Print three random sessions of dataset/rt as the agent observes them."
                            ).parse_args()


if __name__ == "__main__":
    before_torch(parse)

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from common.errors import UserError, cli_entry_point
from dataset.rtrl import RetailRocketRLDataset, load_splits
from dataset.sessions import window_rows
from dataset.vocabulary import Catemapper

RewardType = Literal["bce", "norm"]
Floats = NDArray[np.float32]
MAX_IDS = 2**24
ROUNDING = 1e-6  # of a wrapper that scales actions
REWARD_PROB_EPS = 1e-4  # a prediction of exactly 0 or 1 that is wrong would cost infinitely much


def compute_reward(action: NDArray[Any], label: NDArray[Any], reward_type: RewardType) -> Floats:
    """Reward of predictions `action` for `label`, both (..., T), for each task (..., T). It is never positive: the
    critics (`layers.CriticNeg`) and `SessionTable.reward_space` depend on it."""
    if reward_type == "norm":
        return -np.abs(action - label).astype(np.float32)
    p = np.clip(action, REWARD_PROB_EPS, 1 - REWARD_PROB_EPS)
    return np.where(label > 0, np.log(p), np.log1p(-p)).astype(np.float32)


def check_actions(actions: Any, shape: tuple[int, ...]) -> Floats:
    """Actions as float32. Raises ValueError where they are not of this shape, or not predictions from 0 to 1."""
    given = np.asarray(actions, np.float32)
    if given.shape != shape:
        raise ValueError(f"action: shape {given.shape}, but a prediction for each task is needed, {shape}")
    if not ((given >= -ROUNDING) & (given <= 1 + ROUNDING)).all():  # NaN is neither
        raise ValueError(f"action: {given.tolist()} is not made of predictions from 0 to 1")
    return given


class SessionTable:
    """A mapped data set as states in rows, with its index of sessions. Shared by the environments over it.

    States are made of the data set's arrays when they are observed: no array of all rows is copied.
    """

    def __init__(self, dataset: RetailRocketRLDataset, reward_type: RewardType, is_seq: bool, window: int) -> None:
        if reward_type not in ("bce", "norm"):
            raise UserError(f"reward type: unknown '{reward_type}': one of bce, norm")
        self.metadata = dataset.metadata
        self.field_dims, self.numerical_num = list(dataset.field_dims), dataset.numerical_num
        if max(self.field_dims, default=0) > MAX_IDS:
            raise UserError(f"a field has {max(self.field_dims):,} ids: states hold them as float32, which is exact up "
                            f"to {MAX_IDS:,}: name it in the manifest's 'long_tailed', or lower --feature_map_rate")
        self.categorical, self.numerical = dataset.categorical, dataset.numerical
        self.labels, self.session, self.user = dataset.labels, dataset.session, dataset.user
        self.index = dataset.sessions
        self.reward_type, self.is_seq, self.window = reward_type, is_seq, window

        ids = np.array(self.field_dims, np.float32) - 1
        low = np.concatenate([np.full(len(ids), -1.0 if is_seq else 0.0), np.full(self.numerical_num, -np.inf)])
        high = np.concatenate([ids, np.full(self.numerical_num, np.inf)])
        if is_seq:
            low, high = np.tile(low, (window, 1)), np.tile(high, (window, 1))
        task_num = self.labels.shape[1]
        self.observation_space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        self.action_space = gym.spaces.Box(0.0, 1.0, (task_num,), np.float32)
        reward_low = np.float32(np.log(REWARD_PROB_EPS)) - 1e-3 if reward_type == "bce" else -1.0
        self.reward_space = gym.spaces.Box(reward_low, 0.0, (task_num,), np.float32)

    def observe(self, rows: NDArray[np.int64]) -> Floats:
        """The observations at `rows` (E,): (E, F + N), or with is_seq the last `window` impressions of the session so
        far (E, window, F + N), the present one last; places before the session's start have ids of -1."""
        if not self.is_seq:
            return self._states(rows)
        index, padding = window_rows(rows, self.index.row_start, self.window)
        window = self._states(index)
        window[padding] = np.append(np.full(len(self.field_dims), -1.0), np.zeros(self.numerical_num))
        return window

    def outcomes(self, rows: Any) -> Floats:
        """The labels of `rows`, (T,) of a number or (E, T) of an array, a copy."""
        return np.array(self.labels[rows], np.float32)

    @property
    def states(self) -> Floats:
        """The states of all rows (n, F + N), which are made anew at each access."""
        return self._states(np.arange(len(self)))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.session)

    def _states(self, rows: NDArray[np.int64]) -> Floats:
        """Ids and numbers of rows (...): (..., F + N)."""
        states = np.empty((*rows.shape, len(self.field_dims) + self.numerical_num), np.float32)
        states[..., :len(self.field_dims)] = self.categorical[rows]
        states[..., len(self.field_dims):] = self.numerical[rows]
        return states


class MTEnv(gym.Env[Floats, Floats]):
    """One logged session an episode.

    Args:
        dataset: a mapped split.
        reward_type: `bce` or `norm`.
        is_test: sessions in order of time, again and again; else each reset draws one, from the environment's seed.
        is_seq: observe the session so far, not the present impression alone.
        window: with is_seq, how many impressions at the most.

    The reward is a vector of T (MO-Gymnasium's convention, with `reward_space`); `info` has the label and the action
    that was rewarded, and the session's id. Importing this module also registers it for
    `gym.make("RMTL/MTEnv-v0", dataset=...)`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 -- Gymnasium's own attribute

    def __init__(self, dataset: RetailRocketRLDataset, reward_type: RewardType = "bce", is_test: bool = False,
                 is_seq: bool = False, window: int = 10) -> None:
        self.sessions = SessionTable(dataset, reward_type, is_seq, window)
        self.is_test = is_test
        self.observation_space = self.sessions.observation_space
        self.action_space = self.sessions.action_space
        self.reward_space = self.sessions.reward_space
        self.episode, self.row = -1, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Begin a session: `options={"session": k}` the k-th in time, else the next one (`is_test`) or a random one."""
        super().reset(seed=seed)
        count = len(self.sessions.index.starts)
        if options and "session" in options:
            self.episode = int(options["session"])
            if not 0 <= self.episode < count:
                raise ValueError(f"there are sessions 0 to {count - 1}, not {self.episode}")
        else:
            self.episode = (self.episode + 1) % count if self.is_test else int(self.np_random.integers(count))
        self.row = int(self.sessions.index.starts[self.episode])
        return self._observe(), {"session": int(self.sessions.session[self.row])}

    def step(self, action: Floats) -> tuple[Floats, Floats, bool, bool, dict[str, Any]]:
        """Reward the prediction (T,) for the present impression and move to the next one.

        Raises ValueError for an action of another shape, or outside of [0, 1]. At the session's end the last
        observation is returned again.
        """
        assert self.row >= 0, "call reset first"
        label = self.sessions.outcomes(self.row)
        action = check_actions(action, label.shape).copy()
        reward = compute_reward(action, label, self.sessions.reward_type)
        info = {"label": label, "action": action, "session": int(self.sessions.session[self.row])}
        terminated = self.row == self.sessions.index.ends[self.episode]
        self.row += not terminated
        return self._observe(), reward, bool(terminated), False, info

    @property
    def num_sessions(self) -> int:
        """The episodes that there are."""
        return len(self.sessions.index.starts)

    def vector(self, num_envs: int, episodes: NDArray[np.int64] | None = None) -> MTVectorEnv:
        """The same sessions, `num_envs` at once."""
        return MTVectorEnv(self.sessions, num_envs, episodes)

    def _observe(self) -> Floats:
        return self.sessions.observe(np.array([self.row]))[0]


class States(NamedTuple):
    """The observations, actions and rewards of an environment, as an agent needs them."""

    field_dims: list[int]
    numerical_num: int
    task_num: int
    shape: tuple[int, ...]  # of one observation, (F + N,), or of windows (W, F + N)
    window: int
    reward_type: str
    wrappers: list[str]  # names of the wrappers around the environment, the outermost first
    metadata: dict[str, Any]  # what a model of these states has to fit (`RetailRocketRLDataset.metadata`)


def describe(env: gym.Env[Any, Any]) -> States:
    """Describe an `MTEnv`, plain or in wrappers; or another environment of this kind: observations of ids with an upper
    bound, then numbers without one, and an action of T predictions. Raises UserError where it is not of this kind."""
    inner, observed, action = env.unwrapped, env.observation_space, env.action_space
    if not isinstance(observed, gym.spaces.Box) or not isinstance(action, gym.spaces.Box) or len(action.shape) != 1:
        raise UserError(f"{type(inner).__name__}: observations and actions are Boxes: ids and numbers (F + N,), and "
                        "predictions (T,)")
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise UserError(f"{type(env).__name__}: its actions have no bounds, between which predictions could be scaled")
    wrappers, outer = [], env
    while isinstance(outer, gym.Wrapper):
        if not isinstance(outer, gym.wrappers.OrderEnforcing):  # it changes nothing, and gym.make always adds it
            wrappers.append(type(outer).__name__)
        outer = outer.env
    reward_type: str
    if isinstance(inner, MTEnv):
        sessions = inner.sessions
        field_dims, window, reward_type, data = (sessions.field_dims, sessions.window, sessions.reward_type,
                                                 sessions.metadata)
    else:
        high = observed.high if observed.high.ndim == 1 else observed.high[-1]
        field_dims = [int(bound) + 1 for bound in high[np.isfinite(high)]]
        if not np.isfinite(high[:len(field_dims)]).all() or any(bound % 1 for bound in high[:len(field_dims)]):
            raise UserError(f"{type(inner).__name__}: an observation is first its ids, whose upper bounds are whole "
                            "numbers, then its numbers, which have none")
        window = 0 if observed.high.ndim == 1 else len(observed.high)
        reward_type, data = type(inner).__name__, {}
    numerical_num = observed.shape[-1] - len(field_dims)
    names = ("data", "numerical", "features", "vocabulary")
    metadata = {**{name: data[name] for name in names if name in data}, "field_dims": field_dims,
                "numerical_num": numerical_num}
    return States(field_dims, numerical_num, action.shape[0], observed.shape, window, reward_type, wrappers, metadata)


def to_action_space(env: gym.Env[Any, Any], predictions: Floats) -> Floats:
    """Predictions in [0, 1] as actions of an environment, which an `ActionNormalizer` takes in [-1, 1]."""
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    return (space.low + predictions * (space.high - space.low)).astype(np.float32)


class MTVectorEnv(gym.vector.VectorEnv):
    """Many sessions at once, in the order of `episodes` (default: all, in time); a free lane takes the next one.

    After the last session they begin again. `info["episode"]` (E,) counts the sessions handed out, so a pass over the
    data is the transitions whose count is below `len(episodes)`; `info["final_obs"]` has the observation that ended
    an episode (`AutoresetMode.SAME_STEP`).
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, sessions: SessionTable, num_envs: int, episodes: NDArray[np.int64] | None = None) -> None:
        self.sessions = sessions
        self.episodes = np.arange(len(sessions.index.starts)) if episodes is None else episodes
        self.num_envs = min(num_envs, len(self.episodes))
        self.single_observation_space, self.single_action_space = sessions.observation_space, sessions.action_space
        self.observation_space = gym.vector.utils.batch_space(sessions.observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(sessions.action_space, self.num_envs)
        self.reward_space = sessions.reward_space

    def reset(self, *, seed: int | list[int | None] | None = None,
              options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Begin the first `num_envs` sessions."""
        self.episode = np.arange(self.num_envs)
        self.row = self.sessions.index.starts[self.episodes[self.episode]]
        return self.sessions.observe(self.row), {"episode": self.episode.copy()}

    def step(self, actions: Floats) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of every lane: observations (E, ...), rewards (E, T), terminations and truncations (E,), infos."""
        rows, episode, ends = self.row, self.episode, self.sessions.index.ends
        labels = self.sessions.outcomes(rows)
        actions = check_actions(actions, labels.shape)
        rewards = compute_reward(actions, labels, self.sessions.reward_type)
        done = rows == ends[self.episodes[episode % len(self.episodes)]]
        self.row = rows + ~done
        infos = {"label": labels, "action": actions, "episode": episode, "final_obs": self.sessions.observe(self.row)}
        self.episode = episode.copy()
        self.episode[done] = episode.max() + 1 + np.arange(int(done.sum()))
        self.row[done] = self.sessions.index.starts[self.episodes[self.episode[done] % len(self.episodes)]]
        observations = self.sessions.observe(self.row)
        return observations, rewards, done, np.zeros(self.num_envs, bool), infos


# Gymnasium's checker does not support vector rewards, and would warn of them.
if "RMTL/MTEnv-v0" not in gym.registry:
    gym.register("RMTL/MTEnv-v0", entry_point=f"{__name__}:MTEnv", disable_env_checker=True)


@cli_entry_point
def cli() -> None:
    parse()
    splits = load_splits(Path("dataset/rt"))
    env = MTEnv(Catemapper(0.2).fit(splits.train).map(splits.train))
    fields = len(env.sessions.field_dims)
    print(f"{env.num_sessions:,} sessions, {len(env.sessions):,} impressions; a state is {fields} ids "
          f"and {env.sessions.numerical_num} numbers; here every action is the base rate of each task")
    action, labels = env.sessions.labels.mean(axis=0), ", ".join(task["label"] for task in splits.manifest["tasks"])
    state, info = env.reset(seed=0)
    for _ in range(3):
        print(f"\nsession {info['session']}")
        terminated = False
        while not terminated:
            ids, numbers = state[:fields].astype(int).tolist(), " ".join(f"{number:.2f}" for number in state[fields:])
            state, reward, terminated, _, info = env.step(action)
            print(f"  ids {ids}  so far {numbers}  {labels} {info['label'].astype(int).tolist()}  reward "
                  + " ".join(f"{task_reward:.3f}" for task_reward in reward))
        state, info = env.reset()


if __name__ == "__main__":
    cli()
