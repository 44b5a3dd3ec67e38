"""Train critics offline on the logged sessions; their scores weight the loss of a polish run.

    python3 RLmain.py                            # critics of the esmm baseline: chkpt/RL/res_TD3BC_esmm
    python3 RLmain.py --actor_name=ple
    python3 RLmain.py --agent=ddpg --init_training_step=1000    # the actor trains too
    python3 RLmain.py --critic_encoder=gru --memory_path=pretrain/windows.npz    # critics that see the session so far
    python3 RLmain.py --resume                   # go on where a run was stopped
"""

from __future__ import annotations

import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the program begins: Ctrl-C while torch loads is no traceback

import torch

from agents import AGENTS, DDPG_ESMM
from agents.DDPG_ESMM import NETWORKS
from dataset.files import UserError, check_writable, exit_on_user_error, only_run
from dataset.rtrl import Splits
from dataset.simulate import Size, expected_return
from env import MTEnv, RewardType, reward_of
from layers.session import make_critic
from train.Arguments import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, RLArguments, parse
from train.checkpoint import RunFolder, model_identity, write_rows
from train.memory import check_agent, size_of
from train.run import discounted_returns, get_dataset, get_model, rank_correlation, test, train_and_test_offline
from train.utils import ConvergeStopper, map_splits, pick_device, set_seed, weights_digest

NAMES = {"bc": "TD3BC", "ddpg": "DDPG", "multiweight": "DDPGmw"}  # of the result folders


def create_sub_agent(env: MTEnv, actor_name: str, agentcls: type[DDPG_ESMM], hyparams: dict[str, Any]) -> DDPG_ESMM:
    """Make an agent of a class, with a model of `slmodels` as its actor. Raises UserError without its baseline."""
    return agentcls(env, actor_name, **hyparams)


def main(settings: RLArguments) -> DDPG_ESMM:
    """One run from the tables and the baseline to critics that have converged. Raises UserError."""
    device = pick_device(settings.device, settings.precision)
    run = RunFolder.of_agent(settings.save_dir, settings.dataset_name, NAMES[settings.agent],
                             settings.critics_name(settings.actor_name))
    with only_run(run.books):
        return train_critics(settings, run, device)


def train_critics(settings: RLArguments, run: RunFolder, device: torch.device) -> DDPG_ESMM:
    """The run, alone in its folder."""
    baseline = settings.baseline(settings.actor_name)
    if not baseline.exists():
        raise UserError(f"{baseline}: no such baseline: run this first: "
                        + settings.command("SLmain.py", "model_name", settings.actor_name))
    splits = get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical)
    memory_path = Path(settings.memory_path)
    check_writable(run.books, memory_path.parent,
                   files=[*run.files, memory_path, *(run.folder / f"{name}.pth" for name in NETWORKS)])
    field_dims = map_splits(splits, settings.feature_map_rate).field_dims
    reward_type = cast(RewardType, settings.reward_type)
    state: dict[str, Any] = {"is_seq": settings.state_window > 0, "window": settings.window}
    env, val_env = (MTEnv(split, reward_type, **state) for split in (splits.train, splits.val))
    test_env = MTEnv(splits.test, reward_type, is_test=True, **state)

    check_fits(settings, splits, field_dims, device)
    set_seed(settings.seed)
    identity = model_identity(settings.actor_name, settings, splits.fingerprint, field_dims)
    same_names = ("gamma", "pretrain_path", "dataset_name", "embed_dim", "expert_num", "ou_noise_theta",
                  "ou_noise_gamma", "memory_size", "actor_reg", "tau", "soft_update_freq", "actor_update_freq",
                  "init_training_step", "ips", "batch_size", "drop_out", "actor_lr", "critic_lr", "seed", "encoder")
    hyparams = {name: getattr(settings, name) for name in same_names}
    agent = create_sub_agent(env, settings.actor_name, AGENTS[settings.agent],
                             {**hyparams, "critic_encoder": settings.critics_see, "identity": identity,
                              "device": device})
    memory = {**identity, **({"window": settings.state_window} if settings.state_window else {}),
              "actor": weights_digest(agent.pretrain_actor),
              **{name: getattr(settings, name) for name in ("reward_type", "init_episode", "ou_noise_theta",
                                                            "ou_noise_gamma", "memory_size", "seed")}}
    rows = train_and_test_offline(
        val_env, agent, settings.epoch, settings.init_episode, str(run.folder), settings.memory_path, run=run,
        seed=settings.seed, memory_identity=memory, refill=settings.refill, epoch_updates=settings.epoch_updates,
        stopper=ConvergeStopper(settings.converge_trials, settings.converge_tolerance), settings=asdict(settings),
        manifest=splits.manifest, resume=settings.resume)

    print()
    report(splits, val_env, agent, rows[-1])
    figures = test(test_env, agent, str(run.folder))
    write_rows(run.test, [{"epoch": rows[-1]["epoch"], **figures}])
    print(f"saved the agent in {run.folder}; curves: {run.curves}")
    return agent


def check_fits(settings: RLArguments, splits: Splits, field_dims: list[int], device: torch.device) -> None:
    """Refuse what would not fit into memory, before it takes any. Raises UserError."""
    numbers, sizes = splits.train.numerical_num, (settings.embed_dim, BOTTOM_MLP_DIMS, TOWER_MLP_DIMS)
    actor = size_of(lambda: get_model(settings.actor_name, field_dims, numbers, settings.task_num, settings.expert_num,
                                      settings.embed_dim, encoder=settings.encoder, window=settings.window),
                    field_dims, settings.embed_dim)
    critic = size_of(lambda: make_critic(settings.critics_see, settings.window, field_dims, numbers, *sizes),
                     field_dims, settings.embed_dim)
    judged = len(splits.val) if splits.val.truth is not None and settings.reward_type == "bce" else 0
    state = (len(field_dims) + numbers) * max(1, settings.state_window)
    transition = 4 * (2 * state + 3 * settings.task_num + 1)  # bytes: numbers of 4 each
    check_agent(actor, critic, settings.batch_size, settings.memory_size, transition, judged, device)


def report(splits: Splits, val_env: MTEnv, agent: DDPG_ESMM, last: dict[str, Any]) -> None:
    """Print how good the critics are on validation sessions, and what is possible where the truth is known."""
    truth, ideal, possible = splits.val.truth, splits.val.best, None
    if truth is not None and ideal is not None and val_env.sessions.reward_type == "bce":
        simulation = Size(**{name: splits.manifest["simulation"][name] for name in Size.__dataclass_fields__})
        possible = expected_return(simulation, truth, agent.gamma)
        sessions = val_env.sessions
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
