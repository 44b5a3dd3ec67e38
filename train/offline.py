"""The loops of offline RL: filling the replay memory, training the critics, judging them on sessions held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tqdm import tqdm

from agents import DDPG_ESMM
from agents.DDPG_ESMM_BC import DDPG_ESMM_BC
from dataset.files import UserError, only_run
from env import MTEnv, reward_of
from layers.critic import zero_share
from train.checkpoint import RunFolder, save_tensors
from train.numbers import bad_tensor, worst_return
from train.plots import plot_panels
from train.utils import ConvergeStopper, measure, restore, set_seed, weights_digest

Floats = NDArray[np.float32]
Policy = Callable[[Floats], Floats]
LANES = 4096  # sessions stepped at once
DEAD, CONSTANT, REVIVALS = 0.99, 1e-6, 2  # share of zeros and spread of a dead critic; how often it is revived


def one_iter_offline(agent: DDPG_ESMM) -> int:
    """Let the agent, with its exploration noise, sample the logged data once into its memory; return how many."""
    return fill(agent, agent.select_action)


def fill(agent: DDPG_ESMM, policy: Policy, episodes: NDArray[np.int64] | None = None) -> int:
    """Step through the sessions `episodes` (default: all) once, and store every transition; return how many."""
    env = agent.env.vector(LANES, episodes)
    count, stored = len(env.episodes), 0
    state, _ = env.reset()
    with tqdm(total=count, desc="memory", unit=" sessions", leave=False, disable=None) as bar:
        while env.episode.min() < count:
            new = env.episode < count  # lanes that found no further session have begun the next pass
            action = np.zeros((len(new), agent.task_num), np.float32)
            action[new] = policy(state[new])
            next_state, reward, done, _, info = env.step(action)
            met = int(new.sum())
            agent.memory.store(state[new].reshape(met, -1), info["action"][new],
                               info["final_obs"][new].reshape(met, -1), reward[new], done[new], info["label"][new])
            state, stored = next_state, stored + met
            bar.update(int((done & new).sum()))
    return stored


def train_and_test_offline(environment: MTEnv, agent: DDPG_ESMM, epoch: int, init_episode: int, save_dir: str,
                           memory_path: str, *, run: RunFolder | None = None, seed: int = 2022,
                           memory_identity: dict[str, Any] | None = None, refill: bool = False,
                           epoch_updates: int = 200, stopper: ConvergeStopper | None = None,
                           settings: dict[str, Any] | None = None, manifest: dict[str, Any] | None = None,
                           resume: bool = False) -> list[dict[str, Any]]:
    """Fill the memory, or read it, and train until the critics converge; return a row of figures an epoch.

    Args:
        environment: sessions held out, on which the critics are judged after every epoch.
        agent: learns from the sessions of its own environment.
        epoch: epochs at the most, of `epoch_updates` updates each.
        init_episode: sessions of uniform actions, before the pass of the pretrained actor with noise.
        save_dir: where the agent is saved at the end, and the state to resume from after every epoch.
        memory_path: the memory is read from there if it is of `memory_identity`, else filled and written there.
        settings, manifest: of the run and its data, for the books.

    Raises UserError: a memory of another identity, a loss that is no number, a critic that diverges or stays dead.
    """
    run = run or RunFolder(Path(save_dir), Path(save_dir).name)
    stopper = stopper or ConvergeStopper(3, 0.02)
    fingerprint, origin = str(agent.identity.get("data")), {"start": weights_digest(agent.pretrain_actor)}
    state = run.open(settings or {}, manifest or {}, fingerprint, origin, resume)
    _prepare_memory(agent, init_episode, Path(memory_path), memory_identity or {}, seed, refill)
    if isinstance(agent, DDPG_ESMM_BC):
        agent.prepare()
    rows: list[dict[str, Any]] = []
    revived, first, going = 0, 1, True
    if state is not None:
        with run.restoring():
            agent.load_state_dict(state["agent"])
            restore(stopper, state["stopper"])
            rows, revived, first, going = state["metrics"], state["revived"], state["epoch"] + 1, state["going"]
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
        going = stopper.is_continuable(losses["critic_loss"]) or bool(dead)
        td, rank = ([figures[f"{name}_{task}"] for task in range(agent.task_num)]
                    for name in ("td_error", "rank_correlation"))
        print(f"epoch {number}: critic loss {losses['critic_loss']:.4f}; held-out TD error "
              + ", ".join(f"{one:.4f}" for one in td) + "; rank correlation " + ", ".join(f"{one:.3f}" for one in rank))
        save_tensors(run.state, {"epoch": number, "going": going, "agent": agent.state_dict(), "metrics": rows,
                                 "stopper": dict(vars(stopper)), "revived": revived, "settings": settings or {},
                                 "fingerprint": fingerprint, "origin": origin})
    print(f"converged in epoch {rows[-1]['epoch']}: the critic loss changed by less than {stopper.tolerance:.1%} for "
          f"{stopper.num_trials} epochs" if not going else
          f"stopped after epoch {rows[-1]['epoch']}, the last one (--epoch); last change of the critic loss "
          f"{stopper.change:.1%}")
    agent.save_or_load_agent(save_dir, if_save=True)
    run.write_metrics(rows)
    plot_loss(rows, run.curves)
    return rows


def _prepare_memory(agent: DDPG_ESMM, init_episode: int, path: Path, identity: dict[str, Any], seed: int,
                    refill: bool) -> None:
    if path.exists() and not refill:
        agent.memory.load(path, identity)
        print(f"{path}: {len(agent.memory):,} transitions")
        return
    rng = np.random.default_rng([seed, 0])
    count = len(agent.env.sessions.starts)
    chosen = np.resize(rng.permutation(count), init_episode)
    with only_run(path):
        if init_episode:
            fill(agent, lambda state: rng.random((len(state), agent.task_num), np.float32), chosen)
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


def _check_size(environment: MTEnv, agent: DDPG_ESMM, number: int, figures: dict[str, float]) -> None:
    """Refuse critics whose values no policy can have. Raises UserError."""
    sessions = environment.sessions
    longest = max(sessions.longest, agent.env.sessions.longest)
    bound = worst_return(float(sessions.reward_space.low[0]), agent.gamma, longest)
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


@torch.no_grad()
def play(environment: MTEnv, agent: DDPG_ESMM) -> dict[str, NDArray[Any]]:
    """The actor, without noise, in all sessions of an environment: actions, rewards, returns and Q, each (n, T)."""
    sessions = environment.sessions
    taken, values = [], []
    for rows in np.array_split(np.arange(len(sessions.states)), max(1, len(sessions.states) // 16_384)):
        states = sessions.observe(rows)
        taken.append(agent.select_action(states, noise=False))
        state, action = agent.split(torch.from_numpy(states).to(agent.device)), torch.from_numpy(taken[-1])
        values.append(torch.stack([critic.eval()(*state, action[:, task:task + 1].to(agent.device))
                                   for task, (critic, _, _) in enumerate(agent.critics())], dim=1).cpu().numpy())
    actions = np.concatenate(taken)
    rewards = reward_of(actions, sessions.labels, sessions.reward_type)
    returns = discounted_returns(rewards, sessions.starts, sessions.ends, agent.gamma)
    return {"action": actions, "reward": rewards, "return": returns, "q": np.concatenate(values)}


def judge(environment: MTEnv, agent: DDPG_ESMM) -> dict[str, float]:
    """Per task, on sessions held out: TD error (mean square), rank correlation (Spearman) of Q with the observed
    discounted return, share of zero outputs, standard deviation of Q and mean |Q|; and the score, a session's mean
    return without discount."""
    played, sessions = play(environment, agent), environment.sessions
    next_q = np.append(played["q"][1:], played["q"][:1], axis=0)
    next_q[sessions.ends] = 0.0  # nothing is expected past a session's end
    td = played["reward"] + agent.gamma * next_q - played["q"]
    figures = {"score": float(played["reward"].sum() / len(sessions.starts))}
    for task in range(agent.task_num):
        q = played["q"][:, task]
        figures[f"td_error_{task}"] = float((td[:, task] ** 2).mean())
        figures[f"rank_correlation_{task}"] = rank_correlation(q, played["return"][:, task])
        figures[f"zero_share_{task}"] = zero_share(torch.from_numpy(q))
        figures[f"spread_{task}"] = float(q.std())
        figures[f"mean_abs_q_{task}"] = float(np.abs(q).mean())
    return figures


def rank_correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(one, other).statistic)


def test(environment: MTEnv, agent: DDPG_ESMM, save_dir: str) -> dict[str, float]:
    """Read the agent saved in `save_dir` and play the test sessions with its actor; print and return its figures."""
    agent.save_or_load_agent(save_dir, if_save=False)
    played, sessions = play(environment, agent), environment.sessions
    figures: dict[str, float] = {"score": float(played["reward"].sum() / len(sessions.starts))}
    for task in range(agent.task_num):
        metrics = measure(played["action"][:, task], sessions.labels[:, task], sessions.session)
        figures |= {f"{name}_{task}": value for name, value in metrics._asdict().items()}
        print(f"test: actor, task {task}, AUC {metrics.auc:.4f}, Log-loss {metrics.logloss:.4f}")
    print(f"test: score {figures['score']:.4f}, the mean return of a session")
    return figures


def plot_loss(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw score, critic losses, actor loss and regularised actor loss over the epochs (PNG, no display)."""
    def curve(name: str) -> list[float]:
        return [row[name] for row in rows]

    ranks = sorted(name for name in rows[0] if name.startswith("rank_correlation"))
    plot_panels(path, {
        "score (held-out return of a session)": {"score": curve("score")},
        "critic loss": {f"critic {number}": curve(f"closs{number}") for number in range(1, len(ranks) + 1)},
        "actor loss": {"actor": curve("aloss"),
                       "with regulariser": [row["aloss"] + row["aloss_reg"] for row in rows]},
        "rank correlation of Q with the return": {f"critic {int(name[-1]) + 1}": curve(name) for name in ranks},
    })
