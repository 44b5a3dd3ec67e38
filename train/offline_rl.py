"""Offline RL: fill the replay buffer, train the critics, evaluate them on held-out sessions.

They take an `env.MTEnv`, and step thousands of its sessions at once; or any Gymnasium environment of this kind, wrapped
or not, which they step session by session: its `info` has "label" (T,), and "action" (T,) if not the agent's own was
rewarded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tqdm import tqdm

from agents import DDPG_ESMM
from common import distributed
from common.checkpoint import save_tensors, state_dict_hash
from common.csv_reader import write_csv
from common.device import set_seed
from common.errors import UserError
from common.fileio import exclusive_lock
from common.finite import first_nonfinite_tensor
from common.run_dir import RunDirectory, critic_names
from dataset.sessions import SessionIndex
from env import MTEnv, SessionTable, compute_reward, describe, to_action_space
from layers.critic import zero_fraction
from train.metrics import task_metrics
from train.plots import plot_panels, varying
from train.tracking import Trackers
from train.utils import ConvergeStopper, load_attributes

Floats = NDArray[np.float32]
Policy = Callable[[Floats], Floats]
NUM_ENVS = 4096  # sessions stepped at once
EPISODES = 1000  # of an environment without num_sessions
MAX_ZERO_FRACTION, MIN_Q_STD = 0.99, 1e-6  # beyond these a critic has collapsed
MAX_RESETS = 2  # of each critic
MIN_RANK_CORRELATION = 0.05  # of Q with the return; below it, critics rank held-out states no better than chance
EVALUATION_ROWS = 16_384  # states in one forward pass
EVALUATED_ROWS = 500_000  # of held-out sessions, at most, after each epoch


def one_iter_offline(agent: DDPG_ESMM) -> int:
    """Let the agent, with its exploration noise, sample the logged data once into its memory; return how many."""
    return collect_transitions(agent, agent.select_action)


def collect_transitions(agent: DDPG_ESMM, policy: Policy, episodes: NDArray[np.int64] | None = None) -> int:
    """Step through the sessions `episodes` (default: all) once, and store every transition; return how many.

    policy: states (n, ...) to actions of the agent's environment (n, T). What is stored is the action that the
    environment rewarded.
    """
    stored = 0
    for step in step_through(agent.env, policy, episodes, "memory"):
        count = len(step["done"])
        agent.memory.store(step["state"].reshape(count, -1), step["action"], step["next_state"].reshape(count, -1),
                           step["reward"], step["done"], step["label"])
        stored += count
    return stored


Steps = dict[str, NDArray[Any]]


def step_through(environment: gym.Env[Any, Any], policy: Policy, episodes: NDArray[np.int64] | None = None,
                 title: str = "episodes") -> Iterator[Steps]:
    """Step an environment through the sessions `episodes` (default: all) once, with the actions of a policy.

    Yields transitions, n at a time: episode (n,) counts the sessions handed out, state and next_state (n, ...), action,
    reward and label (n, T), done (n,). The action is the one that was rewarded.
    """
    if type(environment) is MTEnv:
        yield from _step_vector(environment, policy, episodes, title)
        return
    if episodes is None:
        count = getattr(environment.unwrapped, "num_sessions", EPISODES)
        episodes = np.arange(count)
    for number, session in enumerate(tqdm(episodes, title, unit=" sessions", leave=False, disable=None)):
        state, _ = environment.reset(options={"session": int(session)})
        steps: list[tuple[Any, ...]] = []
        ended = False
        while not ended:
            action = policy(np.asarray(state, np.float32)[None])[0]
            next_state, reward, done, truncated, info = environment.step(action)
            if "label" not in info:
                raise UserError(f"{type(environment.unwrapped).__name__}: its step gives no info['label'], the outcome "
                                "of each task (T,), which the agents learn from")
            steps.append((state, info.get("action", action), next_state, reward, done, info["label"]))
            state, ended = next_state, done or truncated
        names = ("state", "action", "next_state", "reward", "done", "label")
        episode = {name: np.asarray(values, np.float32)
                   for name, values in zip(names, zip(*steps, strict=True), strict=True)}
        if episode["reward"].shape != episode["action"].shape:
            raise UserError(f"{type(environment).__name__}: a reward for each task is needed, shape "
                            f"{episode['action'].shape[1:]}, not {episode['reward'].shape[1:]}")
        yield {"episode": np.full(len(steps), number), **episode}


def _step_vector(environment: MTEnv, policy: Policy, episodes: NDArray[np.int64] | None, title: str) -> Iterator[Steps]:
    env = environment.vector(NUM_ENVS, episodes)
    count = len(env.episodes)
    state, _ = env.reset()
    with tqdm(total=count, desc=title, unit=" sessions", leave=False, disable=None) as bar:
        while env.episode.min() < count:
            new = env.episode < count  # lanes that found no further session have begun the next pass
            episode = env.episode[new]
            action = np.zeros((len(new), env.sessions.labels.shape[1]), np.float32)
            action[new] = policy(state[new])
            next_state, reward, done, _, info = env.step(action)
            yield {"episode": episode, "state": state[new], "action": info["action"][new],
                   "next_state": info["final_obs"][new], "reward": reward[new], "done": done[new],
                   "label": info["label"][new]}
            state = next_state
            bar.update(int((done & new).sum()))


def train_and_test_offline(environment: gym.Env[Any, Any], agent: DDPG_ESMM, epoch: int, init_episode: int,
                           save_dir: str | Path, memory_path: str | Path, *, seed: int = 2022, refill: bool = False,
                           epoch_updates: int = 200, stopper: ConvergeStopper | None = None,
                           settings: dict[str, Any] | None = None, manifest: dict[str, Any] | None = None,
                           resume: bool = False, trackers: Trackers | None = None) -> list[dict[str, Any]]:
    """Fill the replay buffer, or load it, and train until the critics converge; return a row of metrics an epoch.

    An agent that trains its actor (`DDPG_ESMM`) has not converged before it did so for as many epochs as the stopper
    compares.

    Args:
        environment: held-out sessions, on which the critics are evaluated after every epoch; a sample of them where
            they have more than `EVALUATED_ROWS` rows.
        agent: learns from the sessions of its own environment.
        epoch: epochs at most, of `epoch_updates` updates each.
        init_episode: sessions of uniform actions, before the pass of the pretrained actor with noise.
        save_dir: where the agent is saved at the end, and a checkpoint after every epoch.
        memory_path: the replay buffer is loaded from there if it is what this agent would fill, else filled and saved.
        settings, manifest: of the run and its data, for config.json.
        trackers: what --track asks for; they are left open.

    Raises UserError: a replay buffer of another reward type, actor or data, a NaN loss, a critic that diverges or has
    collapsed, held-out sessions whose states are others than the agent's.
    """
    _check_same_states(environment, agent)
    if epoch < 1 or epoch_updates < 1:
        raise ValueError(f"{epoch} epochs of {epoch_updates} updates: at least 1 of each is needed")
    run_dir, stopper = RunDirectory.of_agent(Path(save_dir)), stopper or ConvergeStopper(num_trials=3, tolerance=0.02)
    if agent.trains_actor and epoch * epoch_updates <= agent.init_training_step:
        print(f"the actor does not train: {epoch} epochs of {epoch_updates} updates end before its first update, after "
              f"{agent.init_training_step:,} (init_training_step)")
    buffer_metadata = {**agent.memory_metadata(init_episode), "seed": seed}
    load = Path(memory_path).exists() and not refill
    if load:  # refused, if at all, before an earlier run's files are touched
        agent.memory.load(memory_path, buffer_metadata)
        print(f"{memory_path}: {len(agent.memory):,} transitions")
    fingerprint, origin = str(agent.metadata.get("data")), {"start": state_dict_hash(agent.pretrain_actor)}
    checkpoint = run_dir.start(settings or {}, manifest or {}, fingerprint, origin, resume)
    if not load:
        _fill_replay_buffer(agent, init_episode, Path(memory_path), seed, buffer_metadata)
    agent.fit_normalizer_and_cache()
    history: list[dict[str, Any]] = []
    first_epoch, should_continue, num_resets, actor_epochs = 1, True, 0, 0
    if checkpoint is not None:
        with run_dir.resume_errors():
            agent.load_state_dict(checkpoint["agent"])
            load_attributes(stopper, checkpoint["stopper"])
            history, first_epoch = checkpoint["history"], checkpoint["epoch"] + 1
            should_continue, num_resets = checkpoint["should_continue"], checkpoint["num_resets"]
            actor_epochs = int(checkpoint["actor_epochs"])
        print(f"resuming after epoch {checkpoint['epoch']}")
    trackers = trackers or Trackers("")
    trackers.start(run_dir, settings or {})
    for row in history:
        trackers.log_row(row)
    index = _index_of(environment)
    held_out = None if index is None else sample_sessions(index, EVALUATED_ROWS, seed, 8)
    if index is not None and held_out is not None:
        print(f"held-out metrics are of {len(held_out):,} of {len(index.starts):,} sessions, drawn at random")
    for number in range(first_epoch, epoch + 1):
        if not should_continue:
            break
        set_seed(seed, number, own=True)
        agent.memory.reseed(seed, number)
        losses = _train_epoch(agent, epoch_updates)
        metrics = evaluate_critics(environment, agent, held_out)
        _require_bounded_q(environment, agent, number, {**losses, **metrics})
        history.append({"epoch": number, **losses, **metrics})
        resets_left = 0 if number == epoch else MAX_RESETS * agent.task_num - num_resets
        resets = _reset_collapsed_critics(agent, metrics, resets_left)
        num_resets += resets
        actor_epochs += agent.updates > agent.init_training_step
        should_continue = stopper.is_continuable(losses["critic_loss"]) or resets > 0 or (
            agent.trains_actor and actor_epochs < stopper.num_trials)
        tasks = range(agent.task_num)
        print(f"epoch {number}: critic loss {losses['critic_loss']:.4f}; held-out TD error "
              + ", ".join(f"{metrics[f'td_error_{task}']:.4f}" for task in tasks) + "; rank correlation "
              + ", ".join(f"{metrics[f'rank_correlation_{task}']:.3f}" for task in tasks))
        save_tensors(run_dir.checkpoint, {
            "epoch": number, "should_continue": should_continue, "agent": agent.state_dict(), "history": history,
            "stopper": dict(vars(stopper)), "num_resets": num_resets, "actor_epochs": actor_epochs,
            "settings": settings or {}, "fingerprint": fingerprint, "origin": origin})
        trackers.log_row(history[-1])
    change = ".1%" if stopper.relative else ".4g"
    print(f"converged in epoch {history[-1]['epoch']}: the critic loss changed by less than "
          f"{stopper.tolerance:{change}} for {stopper.num_trials} epochs" if not should_continue else
          f"stopped after epoch {history[-1]['epoch']}, the last one (--epoch)"
          + (f"; last change of the critic loss {stopper.change:{change}}" if np.isfinite(stopper.change) else ""))
    _warn_of_uninformed_critics(agent, history[-1])
    agent.save_or_load_agent(save_dir, if_save=True)
    write_csv(run_dir.metrics, history)
    plot_loss(history, run_dir.curves)
    return history


def _warn_of_uninformed_critics(agent: DDPG_ESMM, metrics: Mapping[str, float]) -> None:
    """Print a line for each critic that has not learned to rank, whether its loss has converged or not."""
    for task in range(agent.task_num):
        correlation = metrics[f"rank_correlation_{task}"]
        if correlation < MIN_RANK_CORRELATION:
            print(f"warning: critic {task + 1}: rank correlation {correlation:.3f}: its Q says next to nothing about "
                  "the return of held-out sessions, and neither would its weights: train longer (more "
                  "--epoch, a smaller --converge_tolerance), or on a larger log")


def _reset_collapsed_critics(agent: DDPG_ESMM, metrics: Mapping[str, float], resets_left: int) -> int:
    """Re-initialize the critics whose output is 0 or constant; return how many. Raises UserError where too many are."""
    resets = 0
    for task, (critic, target, _) in enumerate(agent.critics()):
        zero, std = metrics[f"zero_fraction_{task}"], metrics[f"q_std_{task}"]
        if zero <= MAX_ZERO_FRACTION and std >= MIN_Q_STD:
            continue
        collapsed = f"critic {task + 1} collapsed ({zero:.0%} zero outputs, standard deviation of Q {std:.2g})"
        if resets >= resets_left:
            raise UserError(f"{collapsed}; re-initialization failed, or no epoch is left for it: try a smaller "
                            "--critic_lr")
        print(f"{collapsed}: re-initialized")
        critic.reset_head()
        for parameter in critic.parameters():
            distributed.from_main(parameter.detach())
        target.load_state_dict(critic.state_dict())
        resets += 1
    return resets


def _check_same_states(environment: gym.Env[Any, Any], agent: DDPG_ESMM) -> None:
    theirs, own = describe(environment), agent.states
    for name in ("shape", "task_num", "field_dims"):
        if getattr(theirs, name) != getattr(own, name):
            raise UserError(f"the environment held out has states of {name} {getattr(theirs, name)}, the agent's has "
                            f"{getattr(own, name)}: make both of one data set, mapped alike")


def _fill_replay_buffer(agent: DDPG_ESMM, init_episode: int, path: Path, seed: int, metadata: dict[str, Any]) -> None:
    if len(agent.memory):
        print(f"replay buffer: discarding its {len(agent.memory):,} transitions: it is filled anew")
        agent.memory.clear()
    rng = np.random.default_rng([seed, 0])
    num_sessions = getattr(agent.env.unwrapped, "num_sessions", EPISODES)
    order = rng.permutation(num_sessions)
    sessions, logged = np.resize(order, init_episode), None
    index = _index_of(agent.env)
    size = agent.memory.max_size
    if index is not None and index.lengths[sessions].sum() + index.lengths.sum() > size:
        sessions = _take_sessions(index, sessions, size // 3)
        logged = _take_sessions(index, order, max(1, size - int(index.lengths[sessions].sum())))

    def uniform(state: Floats) -> Floats:
        return to_action_space(agent.env, rng.random((len(state), agent.task_num), np.float32))

    with exclusive_lock(path):
        if len(sessions):
            collect_transitions(agent, uniform, sessions)
        collect_transitions(agent, agent.select_action, logged)
        agent.memory.save(path, metadata)
    whole = "all" if logged is None else f"{len(logged):,}, drawn at random, of"
    print(f"{path}: filled with {len(agent.memory):,} transitions: {len(sessions):,} sessions of uniform actions, and "
          f"{whole} {num_sessions:,} of the pretrained actor with noise")


def _index_of(environment: gym.Env[Any, Any]) -> SessionIndex | None:
    """The sessions of an `MTEnv`, plain or in wrappers; None of another environment, whose lengths are unknown."""
    inner = environment.unwrapped
    return inner.sessions.index if type(inner) is MTEnv else None


def sample_sessions(index: SessionIndex, rows: int, *seed: int) -> NDArray[np.int64] | None:
    """Sessions drawn uniformly, at least so many rows; a function of the seed. None where the log has no more rows."""
    if index.ends[-1] < rows:
        return None
    return _take_sessions(index, np.random.default_rng(seed).permutation(len(index.starts)), rows)


def _take_sessions(index: SessionIndex, order: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """The first sessions of `order` until they have so many rows together, in the order of the log."""
    lengths = index.lengths[order]
    return np.sort(order[np.cumsum(lengths) - lengths < rows])


def _train_epoch(agent: DDPG_ESMM, updates: int) -> dict[str, float]:
    """Make an epoch's updates; return the mean losses. Raises UserError where a loss or a parameter is no number."""
    sums = torch.zeros(agent.task_num + 2, device=agent.device)
    with tqdm(range(1, updates + 1), "critics", unit="update", leave=False, disable=None) as bar:
        for step in bar:
            sums += torch.stack(agent.update())
            if step % 50 == 0 or step == updates:
                bar.set_postfix(critic_loss=f"{float(sums[:-2].sum()) / step:.4f}")
    *closses, aloss, aloss_reg = (sums / updates).tolist()
    names = [*critic_names(agent.task_num), "actor"]
    for name, value in zip(names, [*closses, aloss + aloss_reg], strict=True):
        if not np.isfinite(value):
            raise agent.divergence_error(f"the mean loss of {name} is {value}", agent.updates)
    if first_nonfinite_tensor(agent.networks()):
        raise agent.divergence_error("a parameter is NaN/Inf", agent.updates)
    return {"critic_loss": sum(closses), **{f"closs{number}": closs for number, closs in enumerate(closses, start=1)},
            "aloss": aloss, "aloss_reg": aloss_reg}


def _require_bounded_q(environment: gym.Env[Any, Any], agent: DDPG_ESMM, epoch: int,
                       metrics: Mapping[str, float]) -> None:
    """Raise UserError for critics whose values exceed every possible return."""
    if type(environment) is MTEnv and type(agent.env) is MTEnv:
        reward_bound = float(environment.reward_space.low[0])
        max_length: float = max(environment.sessions.index.max_length, agent.env.sessions.index.max_length)
    else:  # wrappers may change rewards
        reward_bound = float(np.abs(agent.memory.data["reward"][: agent.memory.size]).max())
        max_length = float("inf")
    bound = return_bound(reward_bound, agent.gamma, max_length)
    for task in range(agent.task_num):
        mean_abs_q, loss = metrics[f"mean_abs_q_{task}"], metrics[f"closs{task + 1}"]
        if mean_abs_q > bound or (loss > bound**2 and not agent.ips):
            raise UserError(f"critic {task + 1} (task {task}) diverged in epoch {epoch}: mean |Q| is {mean_abs_q:.4g}, "
                            f"its loss {loss:.4g}: exceeds the largest possible return ({bound:.4g}): try a smaller "
                            "--critic_lr or --gamma; the last good epoch is kept")


def return_bound(reward_bound: float, gamma: float, max_length: float) -> float:
    """No policy's discounted return is further from 0: |r| (1 + gamma + gamma^2 + ...), over the max_length session."""
    steps = max_length + 1.0  # one more, for the reward in front of a target that is itself at the bound
    return abs(reward_bound) * (min(1.0 / (1.0 - gamma), steps) if gamma < 1 else steps)


def discounted_returns(rewards: Floats, index: SessionIndex, gamma: float) -> NDArray[np.float64]:
    """G_t = r_t + gamma G_{t+1} inside each session; rewards (n, T) -> (n, T)."""
    returns = rewards.astype(np.float64)
    at = index.ends - 1
    while (inside := at >= index.starts).any():
        rows = at[inside]
        returns[rows] += gamma * returns[rows + 1]
        at = at - 1
    return returns


class Rollout(NamedTuple):
    """The actor's predictions in all sessions of an environment, rows (n,) of a session one after the other."""

    action: Floats  # (n, T), as they were rewarded
    reward: Floats  # (n, T)
    label: Floats  # (n, T)
    q: Floats  # (n, T) of the state and this action
    returns: NDArray[np.float64]  # (n, T) discounted
    sessions: SessionIndex
    session: NDArray[np.int64]  # (n,)

    @property
    def score(self) -> float:
        """A session's mean return without discount, all tasks together."""
        return float(self.reward.sum() / len(self.sessions.starts))


def rollout(environment: gym.Env[Any, Any], agent: DDPG_ESMM, episodes: NDArray[np.int64] | None = None) -> Rollout:
    """The actor, without noise, in the sessions `episodes` (default: all) of an environment. Those of an `MTEnv`, where
    the next state is the same whatever the action, are not stepped through but looked up. States are made in parts."""
    if type(environment) is not MTEnv:
        return step_rollout(environment, agent, episodes)
    sessions = environment.sessions
    rows = rows_of(sessions.index, episodes)
    parts = np.array_split(rows, max(1, len(rows) // EVALUATION_ROWS))
    actions, q = [], []
    for part in parts:
        states = sessions.observe(part)
        actions.append(agent.predict(states))
        q.append(_q_of(agent, states, actions[-1]))
    action, label, session = np.concatenate(actions), sessions.outcomes(rows), sessions.session[rows]
    reward, index = compute_reward(action, label, sessions.reward_type), SessionIndex(session)
    return Rollout(action, reward, label, np.concatenate(q), discounted_returns(reward, index, agent.gamma), index,
                   session)


def rows_of(index: SessionIndex, episodes: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The rows of sessions (None: of all), one session after the other, (n,)."""
    if episodes is None:
        return np.arange(index.ends[-1] + 1)
    lengths = index.lengths[episodes]
    return np.repeat(index.starts[episodes] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def step_rollout(environment: gym.Env[Any, Any], agent: DDPG_ESMM,
                 episodes: NDArray[np.int64] | None = None) -> Rollout:
    """The same by stepping through the environment."""
    steps = step_through(environment, lambda state: to_action_space(environment, agent.predict(state)), episodes)
    parts: list[Steps] = []
    for part in _join(steps, 2 * EVALUATION_ROWS):
        q = _q_of(agent, part["state"], part["action"])
        parts.append({"q": q, **{name: part[name] for name in ("episode", "action", "reward", "label")}})
    order = np.argsort(np.concatenate([part["episode"] for part in parts]), kind="stable")
    session, action, reward, label, q = (np.concatenate([part[name] for part in parts])[order]
                                         for name in ("episode", "action", "reward", "label", "q"))
    index = SessionIndex(session)
    return Rollout(action, reward, label, q, discounted_returns(reward, index, agent.gamma), index, session)


def _join(steps: Iterator[Steps], rows: int) -> Iterator[Steps]:
    """The transitions of `steps` again, at least `rows` at a time but for the last ones."""
    waiting: list[Steps] = []
    for step in chain(steps, [None]):
        waiting += [step] if step else []
        if waiting and (step is None or sum(len(each["done"]) for each in waiting) >= rows):
            yield {name: np.concatenate([each[name] for each in waiting]) for name in waiting[0]}
            waiting.clear()


@torch.no_grad()
def _q_of(agent: DDPG_ESMM, states: Floats, actions: Floats) -> Floats:
    """Q of each task's action (n, T), critics in eval mode."""
    state = agent.split_state(torch.from_numpy(states).to(agent.device))
    action = torch.from_numpy(actions).to(agent.device)
    q: Floats = torch.stack([critic.eval()(*state, action[:, task:task + 1])
                             for task, (critic, _, _) in enumerate(agent.critics())], dim=1).cpu().numpy()
    return q


def evaluate_critics(environment: gym.Env[Any, Any], agent: DDPG_ESMM,
                     episodes: NDArray[np.int64] | None = None) -> dict[str, float]:
    """Per task, on held-out sessions (default: all): TD error (mean square), rank correlation (Spearman) of Q with the
    observed discounted return, fraction of zero outputs, standard deviation of Q and mean |Q|; and the score, a
    session's mean return without discount."""
    played = rollout(environment, agent, episodes)
    next_q = np.append(played.q[1:], played.q[:1], axis=0)
    next_q[played.sessions.ends] = 0.0  # nothing is expected past a session's end
    td = played.reward + agent.gamma * next_q - played.q
    metrics = {"score": played.score}
    for task in range(agent.task_num):
        q = played.q[:, task]
        metrics[f"td_error_{task}"] = float((td[:, task] ** 2).mean())
        metrics[f"rank_correlation_{task}"] = rank_correlation(q, played.returns[:, task])
        metrics[f"zero_fraction_{task}"] = zero_fraction(torch.from_numpy(q))
        metrics[f"q_std_{task}"] = float(q.std())
        metrics[f"mean_abs_q_{task}"] = float(np.abs(q).mean())
    return metrics


def rank_correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(spearmanr(x, y).statistic)


def test(environment: gym.Env[Any, Any], agent: DDPG_ESMM, save_dir: str | Path) -> dict[str, float]:
    """The dynamic evaluation: step through the environment's sessions with the actor of the agent saved in `save_dir`;
    print and return its metrics. The agent itself is as before."""
    own = copy.deepcopy(agent.state_dict()["networks"])
    try:
        agent.save_or_load_agent(save_dir, if_save=False)
        played = step_rollout(environment, agent)
    finally:
        for name, network in agent.networks().items():
            network.load_state_dict(own[name])
    sessions, user = getattr(environment.unwrapped, "sessions", None), played.session
    if isinstance(sessions, SessionTable):
        user = sessions.user[sessions.index.starts[played.session]]
    metrics: dict[str, float] = {"score": played.score}
    for task in range(agent.task_num):
        of_task = task_metrics(played.action[:, task], played.label[:, task], played.session, user)
        metrics |= {f"{name}_{task}": value for name, value in of_task._asdict().items()}
        print(f"test: actor, task {task}, AUC {of_task.auc}, Log-loss {of_task.logloss}")
    print(f"test: score {metrics['score']:.4f}, the mean return of a session")
    return metrics


def plot_loss(score: Any, critic_loss: Any = None, actor_loss: Any = None, actor_loss_reg: Any = None,
              *published: Any, path: str | Path = "curves.png") -> None:
    """Draw score, critic loss, actor loss and regularized actor loss over the epochs, a panel each (PNG, no display).

    `plot_loss(rows, path)` takes what `train_and_test_offline` returns; `plot_loss(score, critic_loss, actor_loss,
    actor_loss_reg, path)` four curves; `plot_loss(frame_idx, scores, critic_losses, actor_losses1, actor_losses2)` is
    the published call. Raises ValueError for anything else.
    """
    values = [value for value in (score, critic_loss, actor_loss, actor_loss_reg, *published) if value is not None]
    if values and isinstance(values[-1], str | Path):
        path = values.pop()
    titles = ("score (held-out return of a session)", "critic loss", "actor loss", "actor_loss_reg")
    if len(values) == 1 and values[0] and all(isinstance(row, Mapping) for row in values[0]):
        rows = values[0]
        critics = sum(name.startswith("closs") for name in rows[0])
        panels = {titles[0]: {"score": [row["score"] for row in rows]},
                  titles[1]: {f"critic {number}": [row[f"closs{number}"] for row in rows]
                              for number in range(1, critics + 1)},
                  titles[2]: {"aloss": [row["aloss"] for row in rows]},
                  titles[3]: {"aloss_reg": [row["aloss_reg"] for row in rows]}}
        ranks = {f"critic {task + 1}": [row[f"rank_correlation_{task}"] for row in rows]
                 for task in range(critics) if f"rank_correlation_{task}" in rows[0]}
        panels |= {"rank correlation of Q with the return": ranks} if ranks else {}
        panels = varying(panels)  # where the actor does not train, the score is that of the baseline
    else:
        curves = [np.asarray(value, np.float64) for value in (values[1:] if len(values) == 5 else values)]
        if len(curves) != 4 or any(curve.ndim != 1 or not len(curve) for curve in curves):
            raise ValueError("plot_loss takes the rows of train_and_test_offline, or four lists: score, critic loss, "
                             "actor loss, actor_loss_reg; then a path")
        panels = {title: {title: curve.tolist()} for title, curve in zip(titles, curves, strict=True)}
    plot_panels(Path(path), panels)
