"""Train critics offline on the logged sessions; their scores weight the loss of a polish run.

    python3 RLmain.py                            # critics of the esmm baseline: chkpt/RL/res_TD3BC_esmm
    python3 RLmain.py --actor_name=ple
    python3 RLmain.py --agent=td3bc --init_training_step=1000   # the actor trains through them, too
    python3 RLmain.py --critic_encoder=gru --memory_path=pretrain/windows.npz    # critics that read the session so far
    python3 RLmain.py --resume                   # continue a stopped run
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from common.startup import before_torch
from train.Arguments import RLArguments, parse

if __name__ == "__main__":
    before_torch(lambda: parse(RLArguments, __doc__ or "").check_files())

import gymnasium as gym
import numpy as np
import torch

from agents import AGENTS, DDPG_ESMM
from common.checkpoint import check_metadata, load_tensors
from common.csv_reader import write_csv
from common.device import pick_device, set_seed
from common.errors import UserError, cli_entry_point
from common.fileio import check_writable, exclusive_lock
from common.run_dir import network_names, network_path
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.sessions import SessionIndex
from dataset.simulate import config_from_manifest, expected_return
from dataset.vocabulary import encode_splits
from env import MTEnv, RewardType, compute_reward
from train.offline_rl import discounted_returns, rank_correlation, rows_of, sample_sessions
from train.run import get_dataset, test, train_and_test_offline
from train.tracking import Trackers
from train.utils import ActionNormalizer, ConvergeStopper

UNIFORM_SESSIONS = 10_000  # of uniform actions, unless --init_episode says otherwise or the log is small
REPORTED_ROWS = 32_768  # whose true expected return is simulated


def create_sub_agent(env: gym.Env[Any, Any], actor_name: str, agentcls: type[DDPG_ESMM], hyparams: Any) -> DDPG_ESMM:
    """Make an agent of a class, with a model of `slmodels` as its actor.

    hyparams: a dictionary of the agent's documented parameters, or an object that has them among its attributes:
        `Arguments`, `RLArguments`, an argparse.Namespace. What is not given has its documented default.

    Raises UserError without the actor's baseline, where it does not fit the environment, and for a name in the
    dictionary that is no parameter of an agent.
    """
    known = [name for name in inspect.signature(agentcls).parameters if name not in ("env", "actor_name")]
    if isinstance(hyparams, Mapping):
        unknown = [name for name in hyparams if name not in known and name != "actor_name"]
        if unknown:
            meant = difflib.get_close_matches(str(unknown[0]), known, 1)
            raise UserError(f"hyparams: {agentcls.__name__} has no parameter '{unknown[0]}'"
                            + (f" (did you mean {meant[0]}?)" if meant else "") + ": one of " + ", ".join(known))
        if hyparams.get("actor_name", actor_name) != actor_name:
            raise UserError(f"hyparams: actor_name is '{hyparams['actor_name']}', not '{actor_name}'")
        given = dict(hyparams)
    else:
        given = dict(vars(hyparams))
    if given.get("device") == "auto":
        given["device"] = pick_device("auto")
    return agentcls(env, actor_name, **{name: given[name] for name in known if name in given})


def main(settings: RLArguments) -> DDPG_ESMM:
    """One run from the tables and the baseline to critics that have converged. Raises UserError."""
    settings.check_files()
    device = pick_device(settings.device, settings.precision)
    with exclusive_lock(settings.run_dir.path):
        return train_critics(settings, device)


def train_critics(settings: RLArguments, device: torch.device) -> DDPG_ESMM:
    """The run, alone in its directory."""
    run_dir, baseline = settings.run_dir, settings.baseline(settings.actor_name)
    train_baseline = settings.suggest_command("SLmain.py", "model_name", settings.actor_name)
    trackers = Trackers(settings.track)
    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical, settings.task_num,
                         settings.data)
    memory_path = Path(settings.memory_path)
    check_writable(run_dir.path, memory_path.parent,
                   files=[*run_dir.files, memory_path, *(network_path(run_dir.path, name)
                                                         for name in network_names(len(splits.task_names)))])
    encode_splits(splits, settings.feature_map_rate)
    check_metadata(load_tensors(baseline, f"train it first: {train_baseline}"),
                   settings.metadata(settings.actor_name, splits.train.metadata), baseline,
                   f"give the settings that it was trained with, or train one of these: {train_baseline}")

    def environment(split: RetailRocketRLDataset, is_test: bool = False) -> gym.Env[Any, Any]:
        env = MTEnv(split, cast(RewardType, settings.reward_type), is_test, settings.state_context > 0, settings.window)
        return ActionNormalizer(env) if settings.action_normalizer else env

    set_seed(settings.seed)
    agent = create_sub_agent(environment(splits.train), settings.actor_name, AGENTS[settings.agent],
                             SimpleNamespace(**{**vars(settings), "device": device}))
    init_episode = settings.init_episode
    if init_episode < 0:  # so that uniform actions are at most a third of the replay buffer
        init_episode = min(UNIFORM_SESSIONS, len(splits.train.sessions.starts) // 2)
    history = train_and_test_offline(
        environment(splits.val), agent, settings.epoch, init_episode, run_dir.path, memory_path,
        seed=settings.seed, refill=settings.refill, epoch_updates=settings.epoch_updates,
        stopper=ConvergeStopper(num_trials=settings.converge_trials, tolerance=settings.converge_tolerance),
        settings=settings.plain(), manifest=splits.manifest, resume=settings.resume, trackers=trackers)

    print()
    print_critic_report(splits, settings.reward_type, agent, history[-1])
    metrics = test(environment(splits.test, is_test=True), agent, run_dir.path)
    test_row = {"epoch": history[-1]["epoch"], **metrics}
    write_csv(run_dir.test_metrics, [test_row])
    trackers.log_row({"split": "test", **test_row})
    trackers.finish()
    print(f"saved the agent in {run_dir.path}; curves: {run_dir.curves}")
    return agent


def print_critic_report(splits: Splits, reward_type: str, agent: DDPG_ESMM, last: Mapping[str, Any]) -> None:
    """Print how good the critics are on validation sessions, and what is possible where the truth is known."""
    val, expected, of_sample = splits.val, None, ""
    if val.ground_truth is not None and reward_type == "bce":
        simulation = config_from_manifest(splits.manifest["simulation"], Path("manifest.json"))
        episodes = sample_sessions(val.sessions, REPORTED_ROWS, agent.seed, 9)
        rows = rows_of(val.sessions, episodes)
        of_sample = f", of {len(rows):,} rows" if episodes is not None else ""
        ground_truth = val.ground_truth.iloc[rows]
        expected = expected_return(simulation, ground_truth, agent.gamma)
        oracle = ground_truth[["p_click", "p_pay"]].to_numpy(np.float64)[:, : agent.task_num]
        observed = discounted_returns(compute_reward(oracle, val.labels[rows], "bce"), SessionIndex(val.session[rows]),
                                      agent.gamma)
    for task in range(agent.task_num):
        line = (f"critic {task + 1} ({splits.task_names[task]}): held-out TD error {last[f'td_error_{task}']:.4f}, "
                f"rank correlation of Q with the return {last[f'rank_correlation_{task}']:.3f}")
        if expected is not None:
            oracle_correlation = rank_correlation(expected[:, task], observed[:, task])
            line += f" (ideal predictions and their true expected return: {oracle_correlation:.3f}{of_sample})"
        print(line + f", zero outputs {last[f'zero_fraction_{task}']:.1%}")


@partial(cli_entry_point, resumable=True)
def cli() -> None:
    main(parse(RLArguments, __doc__ or ""))


if __name__ == "__main__":
    cli()
