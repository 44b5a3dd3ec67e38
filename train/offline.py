"""The loops of offline RL: filling the replay memory, training the critics, judging them on sessions held out.

They take an `env.MTEnv`, and step thousands of its sessions at once; or any Gymnasium environment of this kind, wrapped
or not, which they step one by one: its `info` has "label" (T,), and "action" (T,) if another one than the agent's was
rewarded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tqdm import tqdm

from agents import DDPG_ESMM
from dataset.files import UserError, only_run
from env import MTEnv, describe, reward_of, to_action_space
from layers.critic import zero_share
from train.checkpoint import RunFolder, save_tensors, weights_digest
from train.metrics import measure
from train.numbers import bad_tensor, worst_return
from train.plots import plot_panels
from train.utils import ConvergeStopper, restore, set_seed

Floats = NDArray[np.float32]
Policy = Callable[[Floats], Floats]
LANES = 4096  # sessions stepped at once
EPISODES = 1000  # of an environment that does not say how many there are
DEAD, CONSTANT, REVIVALS = 0.99, 1e-6, 2  # share of zeros and spread of a dead critic; how often it is revived
EVALUATION_ROWS = 16_384  # states that networks are asked about at once


def one_iter_offline(agent: DDPG_ESMM) -> int:
    """Let the agent, with its exploration noise, sample the logged data once into its memory; return how many."""
    return fill(agent, agent.select_action)


def fill(agent: DDPG_ESMM, policy: Policy, episodes: NDArray[np.int64] | None = None) -> int:
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
    env = environment.vector(LANES, episodes)
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
                           save_dir: str | Path, memory_path: str | Path, *, run: RunFolder | None = None,
                           seed: int = 2022, refill: bool = False, epoch_updates: int = 200,
                           stopper: ConvergeStopper | None = None, settings: dict[str, Any] | None = None,
                           manifest: dict[str, Any] | None = None, resume: bool = False) -> list[dict[str, Any]]:
    """Fill the memory, or read it, and train until the critics converge; return a row of figures an epoch.

    An agent that trains its actor (`DDPG_ESMM`) has not converged before it did so for as many epochs as the stopper
    looks at.

    Args:
        environment: sessions held out, on which the critics are judged after every epoch.
        agent: learns from the sessions of its own environment.
        epoch: epochs at the most, of `epoch_updates` updates each.
        init_episode: sessions of uniform actions, before the pass of the pretrained actor with noise.
        save_dir: where the agent is saved at the end, and the state to resume from after every epoch.
        memory_path: the memory is read from there if it is what this agent would fill, else filled and written there.
        settings, manifest: of the run and its data, for the books.

    Raises UserError: a memory of another reward type, actor or data, a loss that is no number, a critic that diverges
    or stays dead, an environment held out whose states are others than the agent's.
    """
    _check_same_states(environment, agent)
    run = run or RunFolder(Path(save_dir), Path(save_dir).name)
    stopper = stopper or ConvergeStopper(num_trials=3, tolerance=0.02)
    if agent.trains_actor and epoch * epoch_updates <= agent.init_training_step:
        print(f"the actor does not train: {epoch} epochs of {epoch_updates} updates end before its first update, after "
              f"{agent.init_training_step:,} (init_training_step)")
    fingerprint, origin = str(agent.metadata.get("data")), {"start": weights_digest(agent.pretrain_actor)}
    if epoch < 1 or epoch_updates < 1:
        raise ValueError(f"{epoch} epochs of {epoch_updates} updates: at least 1 of each is needed")
    memory = {**agent.memory_metadata(init_episode), "seed": seed}
    found = Path(memory_path).exists() and not refill
    if found:  # refused, if at all, before an earlier run's files are touched
        agent.memory.load(memory_path, memory)
        print(f"{memory_path}: {len(agent.memory):,} transitions")
    state = run.open(settings or {}, manifest or {}, fingerprint, origin, resume)
    if not found:
        _fill_memory(agent, init_episode, Path(memory_path), seed, memory)
    agent.prepare()
    rows: list[dict[str, Any]] = []
    revived, first, going, actor_epochs = 0, 1, True, 0
    if state is not None:
        with run.restoring():
            agent.load_state_dict(state["agent"])
            restore(stopper, state["stopper"])
            rows, revived, first, going = state["metrics"], state["revived"], state["epoch"] + 1, state["going"]
            actor_epochs = int(state["actor_epochs"])
        print(f"resuming after epoch {state['epoch']}")
    for number in range(first, epoch + 1):
        if not going:
            break
        set_seed(seed, number)
        agent.memory.reseed(seed, number)
        losses = _train_epoch(agent, epoch_updates)
        figures = judge(environment, agent)
        _check_size(environment, agent, number, {**losses, **figures})
        rows.append({"epoch": number, **losses, **figures})
        dead = [task for task in range(agent.task_num)
                if figures[f"zero_share_{task}"] > DEAD or figures[f"spread_{task}"] < CONSTANT]
        for task in dead:
            zeros = figures[f"zero_share_{task}"]
            what = f"critic {task + 1} is dead (" + (f"0 for {zeros:.0%} of the states)" if zeros > DEAD
                                                     else "the same for all states)")
            if revived >= REVIVALS * agent.task_num or number == epoch:
                why = "no epoch is left to revive it" if number == epoch else "reviving did not help"
                raise UserError(f"{what}, and {why}: try a smaller --critic_lr")
            print(f"{what}: revived")
            critic, target, _ = agent.critics()[task]
            critic.revive()
            target.load_state_dict(critic.state_dict())
            revived += 1
        actor_epochs += agent.updates > agent.init_training_step
        going = stopper.is_continuable(losses["critic_loss"]) or bool(dead) or (
            agent.trains_actor and actor_epochs < stopper.num_trials)
        td, rank = ([figures[f"{name}_{task}"] for task in range(agent.task_num)]
                    for name in ("td_error", "rank_correlation"))
        print(f"epoch {number}: critic loss {losses['critic_loss']:.4f}; held-out TD error "
              + ", ".join(f"{one:.4f}" for one in td) + "; rank correlation " + ", ".join(f"{one:.3f}" for one in rank))
        save_tensors(run.state, {"epoch": number, "going": going, "agent": agent.state_dict(), "metrics": rows,
                                 "stopper": dict(vars(stopper)), "revived": revived, "actor_epochs": actor_epochs,
                                 "settings": settings or {},
                                 "fingerprint": fingerprint, "origin": origin})
    def change(value: float) -> str:
        return f"{value:.1%}" if stopper.relative else f"{value:.4g}"

    print(f"converged in epoch {rows[-1]['epoch']}: the critic loss changed by less than {change(stopper.tolerance)} "
          f"for {stopper.num_trials} epochs" if not going else
          f"stopped after epoch {rows[-1]['epoch']}, the last one (--epoch)"
          + (f"; last change of the critic loss {change(stopper.change)}" if np.isfinite(stopper.change) else ""))
    agent.save_or_load_agent(save_dir, if_save=True)
    run.write_metrics(rows)
    plot_loss(rows, run.curves)
    return rows


def _check_same_states(environment: gym.Env[Any, Any], agent: DDPG_ESMM) -> None:
    theirs, own = describe(environment), agent.states
    for name in ("shape", "task_num", "field_dims"):
        if getattr(theirs, name) != getattr(own, name):
            raise UserError(f"the environment held out has states of {name} {getattr(theirs, name)}, the agent's has "
                            f"{getattr(own, name)}: make both of one data set, mapped alike")


def _fill_memory(agent: DDPG_ESMM, init_episode: int, path: Path, seed: int, identity: dict[str, Any]) -> None:
    if len(agent.memory):
        print(f"the {len(agent.memory):,} transitions that the memory held are left out: it is filled anew")
        agent.memory.clear()
    rng = np.random.default_rng([seed, 0])
    count = getattr(agent.env.unwrapped, "num_sessions", EPISODES)
    chosen = np.resize(rng.permutation(count), init_episode)
    with only_run(path):
        if init_episode:
            fill(agent, lambda state: to_action_space(agent.env, rng.random((len(state), agent.task_num), np.float32)),
                 chosen)
        one_iter_offline(agent)
        agent.memory.save(path, identity)
    print(f"{path}: filled with {len(agent.memory):,} transitions: {init_episode:,} sessions of uniform actions, and "
          f"all {count:,} of the pretrained actor with noise")


def _train_epoch(agent: DDPG_ESMM, updates: int) -> dict[str, float]:
    """Make an epoch's updates; return the mean losses. Raises UserError where a loss or a parameter is no number."""
    sums = torch.zeros(4, device=agent.device)
    with tqdm(range(1, updates + 1), "critics", unit="update", leave=False, disable=None) as bar:
        for step in bar:
            sums += torch.stack(agent.update())
            if step % 50 == 0 or step == updates:
                bar.set_postfix(critic_loss=f"{float(sums[0] + sums[1]) / step:.4f}")
    closs1, closs2, aloss, aloss_reg = (sums / updates).tolist()
    for name, value in (("critic1", closs1), ("critic2", closs2), ("actor", aloss + aloss_reg)):
        if not np.isfinite(value):
            raise agent.diverged(f"the mean loss of {name} is {value}", agent.updates)
    if bad_tensor(agent.networks()):
        raise agent.diverged("a weight is no number", agent.updates)
    return {"critic_loss": closs1 + closs2, "closs1": closs1, "closs2": closs2, "aloss": aloss, "aloss_reg": aloss_reg}


def _check_size(environment: gym.Env[Any, Any], agent: DDPG_ESMM, number: int, figures: dict[str, float]) -> None:
    """Refuse critics whose values no policy can have. Raises UserError."""
    if type(environment) is MTEnv and type(agent.env) is MTEnv:
        low = float(environment.reward_space.low[0])
        longest: float = max(environment.sessions.longest, agent.env.sessions.longest)
    else:  # wrappers may reward otherwise
        low, longest = float(np.abs(agent.memory.data["reward"][: agent.memory.size]).max()), float("inf")
    bound = worst_return(low, agent.gamma, longest)
    for task in range(agent.task_num):
        size, loss = figures[f"mean_abs_q_{task}"], figures[f"closs{task + 1}"]
        if size > bound or (loss > bound**2 and not agent.ips):
            raise UserError(f"critic {task + 1} (task {task}) diverged in epoch {number}: its mean |Q| is {size:.4g}, "
                            f"its loss {loss:.4g}, but no return is beyond {bound:.4g}: try a smaller --critic_lr or "
                            "--gamma; the last good epoch is kept")


def discounted_returns(rewards: Floats, starts: NDArray[np.int64], ends: NDArray[np.int64],
                       gamma: float) -> NDArray[np.float64]:
    """G_t = r_t + gamma G_{t+1} inside each session, rows `starts[k]` to `ends[k]`; rewards (n, T) -> (n, T)."""
    returns = rewards.astype(np.float64)
    at = ends - 1
    while (inside := at >= starts).any():
        rows = at[inside]
        returns[rows] += gamma * returns[rows + 1]
        at = at - 1
    return returns


class Played(NamedTuple):
    """The actor's predictions in all sessions of an environment, rows (n,) of a session one after the other."""

    action: Floats  # (n, T), as they were rewarded
    reward: Floats  # (n, T)
    label: Floats  # (n, T)
    q: Floats  # (n, T) of the state and this action
    returns: NDArray[np.float64]  # (n, T) discounted
    starts: NDArray[np.int64]  # (S,) first and last row of each session
    ends: NDArray[np.int64]
    session: NDArray[np.int64]  # (n,)

    @property
    def score(self) -> float:
        """A session's mean return without discount, all tasks together."""
        return float(self.reward.sum() / len(self.starts))


def play(environment: gym.Env[Any, Any], agent: DDPG_ESMM) -> Played:
    """The actor, without noise, in all sessions of an environment. Those of an `MTEnv`, where the next state is the
    same whatever the action, are not stepped through but looked up."""
    if type(environment) is not MTEnv:
        return rollout(environment, agent)
    sessions = environment.sessions
    parts = np.array_split(np.arange(len(sessions.states)), max(1, len(sessions.states) // EVALUATION_ROWS))
    actions = np.concatenate([agent.predict(sessions.observe(rows)) for rows in parts])
    q = np.concatenate([_q_of(agent, sessions.observe(rows), actions[rows]) for rows in parts])
    rewards = reward_of(actions, sessions.labels, sessions.reward_type)
    return Played(actions, rewards, sessions.labels, q,
                  discounted_returns(rewards, sessions.starts, sessions.ends, agent.gamma), sessions.starts,
                  sessions.ends, sessions.session)


def rollout(environment: gym.Env[Any, Any], agent: DDPG_ESMM) -> Played:
    """The same by stepping through the environment."""
    steps = list(step_through(environment, lambda state: to_action_space(environment, agent.predict(state))))
    order = np.argsort(np.concatenate([step["episode"] for step in steps]), kind="stable")
    session, state, action, reward, label = (
        np.concatenate([step[name] for step in steps])[order] for name in ("episode", "state", "action", "reward",
                                                                            "label"))
    starts = np.flatnonzero(np.append(True, session[1:] != session[:-1]))
    ends = np.append(starts[1:], len(session)) - 1
    parts = np.array_split(np.arange(len(state)), max(1, len(state) // EVALUATION_ROWS))
    q = np.concatenate([_q_of(agent, state[rows], action[rows]) for rows in parts])
    return Played(action, reward, label, q, discounted_returns(reward, starts, ends, agent.gamma), starts, ends,
                  session)


@torch.no_grad()
def _q_of(agent: DDPG_ESMM, states: Floats, actions: Floats) -> Floats:
    """Q of each task's action (n, T), critics in eval mode."""
    state, action = agent.split(torch.from_numpy(states).to(agent.device)), torch.from_numpy(actions).to(agent.device)
    q: Floats = torch.stack([critic.eval()(*state, action[:, task:task + 1])
                             for task, (critic, _, _) in enumerate(agent.critics())], dim=1).cpu().numpy()
    return q


def judge(environment: gym.Env[Any, Any], agent: DDPG_ESMM) -> dict[str, float]:
    """Per task, on sessions held out: TD error (mean square), rank correlation (Spearman) of Q with the observed
    discounted return, share of zero outputs, standard deviation of Q and mean |Q|; and the score, a session's mean
    return without discount."""
    played = play(environment, agent)
    next_q = np.append(played.q[1:], played.q[:1], axis=0)
    next_q[played.ends] = 0.0  # nothing is expected past a session's end
    td = played.reward + agent.gamma * next_q - played.q
    figures = {"score": played.score}
    for task in range(agent.task_num):
        q = played.q[:, task]
        figures[f"td_error_{task}"] = float((td[:, task] ** 2).mean())
        figures[f"rank_correlation_{task}"] = rank_correlation(q, played.returns[:, task])
        figures[f"zero_share_{task}"] = zero_share(torch.from_numpy(q))
        figures[f"spread_{task}"] = float(q.std())
        figures[f"mean_abs_q_{task}"] = float(np.abs(q).mean())
    return figures


def rank_correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(one, other).statistic)


def test(environment: gym.Env[Any, Any], agent: DDPG_ESMM, save_dir: str | Path) -> dict[str, float]:
    """The dynamic evaluation: step through the environment's sessions with the actor of the agent saved in `save_dir`;
    print and return its figures. The agent itself is as before."""
    own = copy.deepcopy(agent.state_dict()["networks"])
    try:
        agent.save_or_load_agent(save_dir, if_save=False)
        played = rollout(environment, agent)
    finally:
        for name, network in agent.networks().items():
            network.load_state_dict(own[name])
    figures: dict[str, float] = {"score": played.score}
    for task in range(agent.task_num):
        metrics = measure(played.action[:, task], played.label[:, task], played.session)
        figures |= {f"{name}_{task}": value for name, value in metrics._asdict().items()}
        print(f"test: actor, task {task}, AUC {metrics.auc}, Log-loss {metrics.logloss}")
    print(f"test: score {figures['score']:.4f}, the mean return of a session")
    return figures


def plot_loss(score: Any, critic_loss: Any = None, actor_loss: Any = None, actor_loss_reg: Any = None,
              *published: Any, path: str | Path = "curves.png") -> None:
    """Draw score, critic loss, actor loss and regularised actor loss over the epochs, a panel each (PNG, no display).

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
    else:
        curves = [np.asarray(value, np.float64) for value in (values[1:] if len(values) == 5 else values)]
        if len(curves) != 4 or any(curve.ndim != 1 or not len(curve) for curve in curves):
            raise ValueError("plot_loss takes the rows of train_and_test_offline, or four lists: score, critic loss, "
                             "actor loss, actor_loss_reg; then a path")
        panels = {title: {title: curve.tolist()} for title, curve in zip(titles, curves, strict=True)}
    plot_panels(Path(path), panels)
