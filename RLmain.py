"""Train critics offline on the logged sessions; their scores weight the loss of a polish run.

    python3 RLmain.py                            # critics of the esmm baseline: chkpt/RL/res_TD3BC_esmm
    python3 RLmain.py --actor_name=ple
    python3 RLmain.py --agent=td3bc --init_training_step=1000   # the actor trains through them too
    python3 RLmain.py --critic_encoder=gru --memory_path=pretrain/windows.npz    # critics that see the session so far
    python3 RLmain.py --resume                   # go on where a run was stopped
"""

from __future__ import annotations

import difflib
import inspect
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program begins: Ctrl-C while torch loads is no traceback

import gymnasium as gym
import torch

from agents import AGENTS, DDPG_ESMM
from agents.DDPG_ESMM import NETWORKS
from dataset.files import UserError, check_writable, exit_on_user_error, only_run
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.simulate import Size, expected_return
from dataset.vocabulary import map_splits
from env import MTEnv, RewardType, reward_of
from layers.session import make_critic
from train.Arguments import RLArguments, parse
from train.checkpoint import RunFolder, check_metadata, load_tensors, write_rows
from train.memory import check_agent, size_of
from train.run import discounted_returns, get_dataset, get_model, rank_correlation, test, train_and_test_offline
from train.utils import ActionNormalizer, ConvergeStopper, pick_device, set_seed


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
            raise UserError(f"hyparams: actor_name is '{hyparams['actor_name']}', but '{actor_name}' is asked for")
        given = dict(hyparams)
    else:
        given = dict(vars(hyparams))
    if given.get("device") == "auto":
        given["device"] = pick_device("auto")
    return agentcls(env, actor_name, **{name: given[name] for name in known if name in given})


def main(settings: RLArguments) -> DDPG_ESMM:
    """One run from the tables and the baseline to critics that have converged. Raises UserError."""
    updates = settings.epoch * settings.epoch_updates
    if settings.agent != "bc" and updates <= settings.init_training_step:
        raise UserError(f"--agent={settings.agent}: its actor would not train: {settings.epoch} epochs of "
                        f"{settings.epoch_updates} updates are {updates:,}, and it begins after "
                        f"{settings.init_training_step:,}: raise --epoch, or lower --init_training_step")
    device = pick_device(settings.device, settings.precision)
    with only_run(settings.run.books):
        return train_critics(settings, settings.run, device)


def train_critics(settings: RLArguments, run: RunFolder, device: torch.device) -> DDPG_ESMM:
    """The run, alone in its folder."""
    baseline = settings.baseline(settings.actor_name)
    hint = "train it first: " + settings.command("SLmain.py", "model_name", settings.actor_name)
    if not baseline.exists():
        raise UserError(f"{baseline}: no such baseline: {hint}")
    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical)
    memory_path = Path(settings.memory_path)
    check_writable(run.books, memory_path.parent,
                   files=[*run.files, memory_path, *(run.folder / f"{name}.pth" for name in NETWORKS)])
    map_splits(splits, settings.feature_map_rate)
    check_metadata(load_tensors(baseline, hint), settings.metadata(settings.actor_name, splits.train.metadata),
                   baseline, "give the settings that it was trained with, or train one of these: "
                   + settings.command("SLmain.py", "model_name", settings.actor_name))

    def environment(split: RetailRocketRLDataset, is_test: bool = False) -> gym.Env[Any, Any]:
        env = MTEnv(split, cast(RewardType, settings.reward_type), is_test, settings.state_window > 0, settings.window)
        return ActionNormalizer(env) if settings.action_normalizer else env

    env, val_env, test_env = environment(splits.train), environment(splits.val), environment(splits.test, True)
    check_fits(settings, splits, device)
    set_seed(settings.seed)
    agent = create_sub_agent(env, settings.actor_name, AGENTS[settings.agent],
                             SimpleNamespace(**{**vars(settings), "device": device}))
    rows = train_and_test_offline(
        val_env, agent, settings.epoch, settings.init_episode, run.folder, settings.memory_path, run=run,
        seed=settings.seed, refill=settings.refill, epoch_updates=settings.epoch_updates,
        stopper=ConvergeStopper(num_trials=settings.converge_trials, tolerance=settings.converge_tolerance),
        settings=settings.plain(), manifest=splits.manifest, resume=settings.resume)

    print()
    report(splits, settings, agent, rows[-1])
    figures = test(test_env, agent, run.folder)
    write_rows(run.test, [{"epoch": rows[-1]["epoch"], **figures}])
    print(f"saved the agent in {run.folder}; curves: {run.curves}")
    return agent


def check_fits(settings: RLArguments, splits: Splits, device: torch.device) -> None:
    """Refuse what would not fit into memory, before it takes any. Raises UserError."""
    field_dims, numbers = splits.train.field_dims, splits.train.numerical_num
    widths = settings.bottom_mlp_dims, settings.tower_mlp_dims
    actor = size_of(lambda: get_model(settings.actor_name, field_dims, numbers, settings.task_num, settings.expert_num,
                                      settings.embed_dim, encoder=settings.encoder, window=settings.window,
                                      bottom_mlp_dims=widths[0], tower_mlp_dims=widths[1]),
                    field_dims, settings.embed_dim)
    critic = size_of(lambda: make_critic(settings.critics_see, settings.window, field_dims, numbers, settings.embed_dim,
                                         *widths), field_dims, settings.embed_dim)
    judged = len(splits.val) if splits.val.truth is not None and settings.reward_type == "bce" else 0
    state = (len(field_dims) + numbers) * max(1, settings.state_window)
    transition = 4 * (2 * state + 3 * settings.task_num + 1)  # bytes: numbers of 4 each
    check_agent(actor, critic, settings.batch_size, settings.memory_size, transition, judged, device)


def report(splits: Splits, settings: RLArguments, agent: DDPG_ESMM, last: dict[str, Any]) -> None:
    """Print how good the critics are on validation sessions, and what is possible where the truth is known."""
    truth, ideal, possible = splits.val.truth, splits.val.best, None
    if truth is not None and ideal is not None and settings.reward_type == "bce":
        simulation = Size(**{name: splits.manifest["simulation"][name] for name in Size.__dataclass_fields__})
        possible = expected_return(simulation, truth, agent.gamma)
        sessions = MTEnv(splits.val).sessions
        observed = discounted_returns(reward_of(ideal, sessions.labels, "bce"), sessions.starts, sessions.ends,
                                      agent.gamma)
    for task in range(agent.task_num):
        line = (f"critic {task + 1} ({splits.task_names[task]}): held-out TD error {last[f'td_error_{task}']:.4f}, "
                f"rank correlation of Q with the return {last[f'rank_correlation_{task}']:.3f}")
        if possible is not None:
            reached = rank_correlation(possible[:, task], observed[:, task])
            line += f" (ideal predictions and their true expected return: {reached:.3f})"
        print(line + f", zero outputs {last[f'zero_share_{task}']:.1%}")


@partial(exit_on_user_error, resumes=True)
def _command() -> None:
    main(parse(RLArguments, __doc__ or ""))


if __name__ == "__main__":
    _command()
