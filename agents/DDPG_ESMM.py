"""Plain DDPG (Lillicrap et al., ICLR 2016), a multi-task model as actor, one critic a task (Liu et al., WWW 2023)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from agents.ReplayBuffer import ReplayBuffer, Transition
from common import distributed
from common.checkpoint import (
    check_metadata,
    load_optimizer_state,
    load_state_dict_strict,
    load_tensors,
    load_weights,
    state_dict_hash,
)
from common.distributed import Network
from common.errors import UserError
from common.finite import NonFiniteMonitor, first_nonfinite_tensor
from common.run_dir import baseline_path, critic_names, network_names, network_path
from env import Floats, describe, to_action_space
from layers import Critic, CriticNeg, MultiTaskModel, set_embedding_dropout
from layers.sequence import SequenceCritic, SequenceModel, make_critic
from slmodels.model_file import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, model_from_file, save_model

Tensors = dict[str, Tensor]


class DDPG_ESMM:
    """The networks, seven for two tasks: pretrain_actor; actor, actor_target; critic1 ... criticT and their targets.

    Args:
        env: the sessions that are learned from, an `env.MTEnv` or one in wrappers; windows of them (`is_seq`) for an
            encoder.
        actor_name: any model of `slmodels`; its baseline is `<pretrain_path>/<dataset_name>_<actor_name>.pt`, with an
            encoder `..._<actor_name>_<encoder>.pt`. The file contains its metadata, which have to fit the environment.
        gamma: discount of the next impression's reward.
        embed_dim, bottom_mlp_dims, tower_mlp_dims: sizes of actor and critics. Their defaults stand for the baseline's
            own; any other value raises.
        ou_noise_theta, ou_noise_gamma: mean and variance of the exploration noise (`select_action`).
        memory_size, batch_size: of the replay buffer, in transitions.
        actor_reg: weight of the behavior-cloning penalty towards the pretrained actor.
        tau, soft_update_freq: coefficient of Polyak averaging of the targets, and updates between two of them.
        actor_update_freq, init_training_step: the actor trains every so many updates, after so many.
        ips: weight the critics' losses by inverse propensities (`sample_weights`).
        drop_out, embed_dropout: dropout probability of hidden units, and of the actor's embeddings.
        actor_lr, critic_lr: of Adam.
        encoder, critic_encoder: what actor and critics read of the session (`layers.sequence`), or none.

    Raises UserError where there is no baseline, or it does not fit: other data, ids, features or sizes.
    """

    trains_actor = True
    critic1: CriticNeg
    critic1_target: CriticNeg
    critic1_optimizer: torch.optim.Adam
    critic2: CriticNeg  # of two tasks or more; critic3 and so on are attributes as well
    critic2_target: CriticNeg
    critic2_optimizer: torch.optim.Adam

    def __init__(self, env: gym.Env[Any, Any], actor_name: str = "esmm", gamma: float = 0.9,
                 pretrain_path: str | Path = "./pretrain", embed_dim: int = 128,
                 bottom_mlp_dims: Sequence[int] = BOTTOM_MLP_DIMS, tower_mlp_dims: Sequence[int] = TOWER_MLP_DIMS,
                 ou_noise_theta: float = 0.0, ou_noise_gamma: float = 0.4, memory_size: int = 500_000,
                 actor_reg: float = 0.0, tau: float = 0.2, soft_update_freq: int = 2, actor_update_freq: int = 2,
                 init_training_step: int = 10_000, ips: bool = False, batch_size: int = 512, drop_out: float = 0.2,
                 actor_lr: float = 1e-3, critic_lr: float = 1e-3, *, dataset_name: str = "rt",
                 encoder: str = "none", critic_encoder: str = "same", embed_dropout: float = 0.0,
                 device: torch.device | str = "cpu", seed: int = 2022) -> None:
        self.env, self.gamma, self.tau, self.device, self.seed = env, gamma, tau, device, seed
        self.noise_mean, self.noise_variance, self.actor_reg, self.ips = ou_noise_theta, ou_noise_gamma, actor_reg, ips
        self.soft_update_freq, self.actor_update_freq = soft_update_freq, actor_update_freq
        self.init_training_step, self.updates = init_training_step, 0
        self.critic_encoder = encoder if critic_encoder == "same" else critic_encoder
        self.states = describe(env)
        self.state_shape, self.task_num = self.states.shape, self.states.task_num
        self.memory = ReplayBuffer(math.prod(self.state_shape), self.task_num, memory_size, batch_size, seed)
        self.rng = np.random.default_rng([seed, 7])
        self._label_counts = np.zeros(0), 0  # counts (2^T,), and the buffer version they are of

        sizes = {"embed_dim": (embed_dim, 128), "bottom_mlp_dims": (list(bottom_mlp_dims), list(BOTTOM_MLP_DIMS)),
                 "tower_mlp_dims": (list(tower_mlp_dims), list(TOWER_MLP_DIMS))}
        path, hint = baseline_path(pretrain_path, dataset_name, actor_name, encoder), _hint(actor_name)
        saved = self._read_baseline(path, hint, actor_name, encoder, sizes)
        self.metadata = {name: value for name, value in saved.items()
                         if name not in ("weights", "catemapper", "settings")}
        actor = model_from_file(saved, path, hint, drop_out).to(device)
        set_embedding_dropout(actor, embed_dropout)
        self.pretrain_actor, self.actor, self.actor_target = actor, copy.deepcopy(actor), copy.deepcopy(actor)
        widths = saved["embed_dim"], saved["bottom_mlp_dims"], saved["tower_mlp_dims"]
        for task, name in enumerate(critic_names(self.task_num)):
            critic = make_critic(self.critic_encoder, self.states.window, self.states.field_dims,
                                 self.states.numerical_num, *widths, drop_out).to(device)
            init_critic_from_actor(critic, actor, task)
            setattr(self, name, critic)
            setattr(self, f"{name}_target", copy.deepcopy(critic))
            setattr(self, f"{name}_optimizer", torch.optim.Adam(critic.parameters(), lr=critic_lr, fused=True))
        for frozen in (self.pretrain_actor, self.actor_target, *(target for _, target, _ in self.critics())):
            frozen.eval().requires_grad_(False)
        self._parallel: dict[nn.Module, nn.Module] = {}
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=actor_lr, fused=True)
        self.nan_monitors = [NonFiniteMonitor(device, 50) for _ in range(self.task_num)]  # of the critics' losses

    def _read_baseline(self, path: Path, hint: str, actor_name: str, encoder: str,
                       sizes: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
        """What the baseline's file holds. Raises UserError where it does not fit the environment, or a size of `sizes`,
        each with its default, is neither that nor the baseline's."""
        saved = load_tensors(path, hint)
        window = {} if encoder == "none" else {"window": self.states.window}
        check_metadata(saved, {"model_name": actor_name, "encoder": encoder, "task_num": self.task_num, **window,
                               **self.states.metadata}, path, hint)
        for name, (value, default) in sizes.items():
            if value not in (default, saved.get(name)):
                raise UserError(f"{path}: its {name} is {saved.get(name)}, not {value}: leave {name} out, or train a "
                                f"baseline of that size: {hint} --{name}="
                                + ",".join(map(str, value if isinstance(value, list) else [value])))
        return saved

    def critics(self) -> list[tuple[CriticNeg, CriticNeg, torch.optim.Adam]]:
        """Each task's critic, its target and its optimizer."""
        return [(getattr(self, name), getattr(self, f"{name}_target"), getattr(self, f"{name}_optimizer"))
                for name in critic_names(self.task_num)]

    def parallel(self, network: Network) -> Network:
        """A network to compute losses with: of several processes each trains it on its own rows."""
        if network not in self._parallel:
            self._parallel[network] = distributed.data_parallel(network)
        return cast(Network, self._parallel[network])

    def networks(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in network_names(self.task_num)}

    def select_action(self, state: ArrayLike, noise: bool = True) -> Floats:
        """The actor's predictions for one observation of the environment or a batch of them, (...) or (B, ...), within
        the environment's action space: (T,) or (B, T).

        noise: add exploration noise, Gaussian of the agent's mean and variance, reflected where it leaves [0, 1]; so
            actions spread over the interval and do not pile up at its ends.
        """
        return to_action_space(self.env, self.predict(state, noise))

    @torch.no_grad()
    def predict(self, state: ArrayLike, noise: bool = False) -> Floats:
        """The same as predictions in [0, 1], whatever the environment's action space."""
        observed = np.asarray(state, np.float32)
        categorical_x, numerical_x = self.split_state(torch.from_numpy(observed).to(self.device))
        self.actor.eval()
        action: Floats = self.actor(categorical_x, numerical_x).cpu().numpy()
        if noise:
            drawn = self.rng.normal(self.noise_mean, math.sqrt(self.noise_variance), action.shape)
            action = (1.0 - np.abs((action + drawn) % 2.0 - 1.0)).astype(np.float32)
        return action[0] if observed.shape == self.state_shape else action

    def process_batch(self, transition: Transition) -> Tensors:
        """A sampled batch as tensors: states split into ids and numbers, the sample weights, the rest as it is."""
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in transition.items()}
        batch = {name: tensors[name] for name in ("action", "reward", "done", "label")}
        batch["categorical_x"], batch["numerical_x"] = self.split_state(tensors["state"])
        batch["next_categorical_x"], batch["next_numerical_x"] = self.split_state(tensors["next_state"])
        batch["weight"] = self.sample_weights(batch["label"]) if self.ips else torch.ones_like(batch["reward"])
        return batch

    def sample_weights(self, label: Tensor) -> Tensor:
        """One weight a sample, (B, T): 1 / (K P(y)). P is the fraction of the buffer's samples with these labels, K the
        number of combinations that occur. Every combination has the same total weight; the mean weight is 1."""
        counts = self.label_counts()
        shares = torch.from_numpy(counts / counts.sum()).to(label)
        kind = (label @ (2.0 ** torch.arange(self.task_num, device=label.device))).long()
        weight = 1.0 / (float((counts > 0).sum()) * shares[kind])
        return weight[:, None].expand_as(label)

    def label_counts(self) -> NDArray[np.float64]:
        """How often each combination of labels is in the replay buffer, (2^T,); combination sum_k y_k 2^k."""
        counts, stored = self._label_counts
        if stored != self.memory.total_added:
            labels = self.memory.data["label"][: self.memory.size]
            kinds = (labels @ 2 ** np.arange(self.task_num)).astype(np.int64)
            counts = np.bincount(kinds, minlength=2**self.task_num).astype(np.float64)
            self._label_counts = counts, self.memory.total_added
        return counts

    def fit_normalizer_and_cache(self) -> None:
        """Take from the filled replay buffer what no update changes: nothing here."""

    def sample_shard(self) -> Tensors:
        """This process's rows of a batch from the replay buffer."""
        batch = self.process_batch(self.memory.sample_batch())
        return dict(zip(batch, distributed.shard(list(batch.values())), strict=True))

    def get_closs(self, critic_id: int, critic: Critic, critic_target: Critic, transition: Tensors) -> Tensor:
        """The mean squared TD error of one critic, times the sample weight: a scalar."""
        return self._td_error(critic_id, critic, transition,
                              self.td_target(critic_id, critic_target, transition))

    def _td_error(self, critic_id: int, critic: Critic, transition: Tensors, target: Tensor) -> Tensor:
        action = transition["action"][:, critic_id:critic_id + 1]
        q = critic(transition["categorical_x"], transition["numerical_x"], action)
        return (transition["weight"][:, critic_id] * (q - target) ** 2).mean()

    @torch.no_grad()
    def td_target(self, critic_id: int, critic_target: Critic, transition: Tensors) -> Tensor:
        """r + gamma (1 - done) Q_target(s', a'), (B,), with a' = actor_target(s')."""
        state = transition["next_categorical_x"], transition["next_numerical_x"]
        next_q = critic_target(*state, self.next_prediction(transition)[:, critic_id])
        return self._discounted(critic_id, transition, next_q)

    def next_prediction(self, transition: Tensors) -> Tensor:
        """actor_target(s'), (B, T); all critics look at the same next states."""
        if "next_prediction" not in transition:
            transition["next_prediction"] = self.actor_target(transition["next_categorical_x"],
                                                              transition["next_numerical_x"])
        return transition["next_prediction"]

    def _discounted(self, critic_id: int, transition: Tensors, next_q: Tensor) -> Tensor:
        return transition["reward"][:, critic_id] + self.gamma * (1 - transition["done"]) * next_q

    def get_aloss(self, transition: Tensors) -> tuple[Tensor, Tensor]:
        """The actor's two losses: -mean(Q_1 + ... + Q_T), and the penalty actor_reg mean (a - a_pretrained)^2."""
        state = transition["categorical_x"], transition["numerical_x"]
        action = self.parallel(self.actor)(*state)
        with torch.no_grad():
            pretrained = self.pretrain_actor(*state)
        q = self._q_values(state, action)
        return -q.sum(dim=0).mean(), self.actor_reg * F.mse_loss(action, pretrained)

    def _q_values(self, state: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
        """Q of each task's action (T, B)."""
        return torch.stack([critic(*state, action[:, task:task + 1])
                            for task, (critic, _, _) in enumerate(self.critics())])

    def update(self) -> tuple[Tensor, ...]:
        """One DDPG update: all critics, then, after init_training_step, the actor. Returns T + 2 tensors (): the losses
        of critic 1 to T and of the actor, and its penalty."""
        transition = self.sample_shard()
        closses = self._update_critics(transition)
        trains = self.updates > self.init_training_step and self.updates % self.actor_update_freq == 0
        with torch.set_grad_enabled(trains):
            losses = self._actor_losses(transition)
        mean_losses, fraction, _ = distributed.batch_mean(losses, len(transition["action"]))
        if trains:
            self.actor_optimizer.zero_grad()
            (fraction * losses.sum()).backward()
            self.actor_optimizer.step()
        if self.updates % self.soft_update_freq == 0:
            self._target_soft_update(self.tau)
        return *closses, *mean_losses

    def _update_critics(self, transition: Tensors) -> list[Tensor]:
        closses = []
        for task, (critic, target, optimizer) in enumerate(self.critics()):
            critic.train()
            closs = self.get_closs(task, self.parallel(critic), target, transition)
            mean_closs, fraction, _ = distributed.batch_mean(closs, len(transition["action"]))
            if bad := self.nan_monitors[task].update(self.updates + 1, mean_closs):
                raise self.divergence_error(f"the loss of critic{task + 1} (task {task}) is {float(mean_closs)}",
                                            bad[1])
            optimizer.zero_grad()
            (fraction * closs).backward()
            optimizer.step()
            closses.append(mean_closs)
        self.updates += 1
        return closses

    def divergence_error(self, what: str, update: int) -> UserError:
        """The error of a NaN at an update; it names the tensor."""
        tensor = first_nonfinite_tensor(self.networks()) or "Q or the target, of finite weights"
        return UserError(f"{what} at update {update} (NaN or infinity in {tensor}): try a smaller --critic_lr; "
                         "the last good epoch is kept")

    def _actor_losses(self, transition: Tensors) -> Tensor:
        """The actor's losses (2,), of critics in eval mode."""
        self.parallel(self.actor).train()
        for critic, _, _ in self.critics():
            critic.eval()
        return torch.stack(self.get_aloss(transition))

    def _target_soft_update(self, tau: float) -> None:
        """Move every target by tau towards its network."""
        soft_update(self.actor_target, self.actor, tau)
        self._soft_update_critics(tau)

    def _soft_update_critics(self, tau: float) -> None:
        for critic, target, _ in self.critics():
            soft_update(target, critic, tau)

    def save_or_load_agent(self, cwd: str | Path, if_save: bool) -> None:
        """Write all networks to, or read them from, `<cwd>/<network>.pth`. Raises UserError.

        Each file contains the hash of its `agent`, so that networks of two runs, one stopped while it wrote, are
        distinguished.
        """
        paths = {name: network_path(cwd, name) for name in self.networks()}
        hint = "train them anew: python3 RLmain.py"
        agent = (state_dict_hash(*self.networks().values()) if if_save
                 else load_tensors(paths["pretrain_actor"], hint).get("agent"))
        metadata = {**self.metadata, "critic_encoder": self.critic_encoder,
                    "critic_window": 0 if self.critic_encoder == "none" else self.states.window, "agent": agent}
        for name, network in self.networks().items():
            if if_save:
                save_model(paths[name], network, metadata)
            else:
                load_weights(paths[name], network, metadata, hint)

    def memory_metadata(self, init_episode: int) -> dict[str, Any]:
        """The metadata of a replay buffer that this agent fills from its environment."""
        return {**self.states.metadata, "window": self.states.window if len(self.state_shape) > 1 else 0,
                "reward_type": self.states.reward_type, "wrappers": self.states.wrappers,
                "actor": state_dict_hash(self.pretrain_actor), "init_episode": init_episode,
                "ou_noise_theta": self.noise_mean, "ou_noise_gamma": self.noise_variance,
                "memory_size": self.memory.max_size, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, but for the replay buffer and the random numbers."""
        optimizers = {name: getattr(self, f"{name}_optimizer") for name in ("actor", *critic_names(self.task_num))}
        return {"networks": {name: network.state_dict() for name, network in self.networks().items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, network in self.networks().items():
            load_state_dict_strict(network, state["networks"][name])
        for name, saved in state["optimizers"].items():
            load_optimizer_state(getattr(self, f"{name}_optimizer"), saved)
        self.updates = state["updates"]

    def split_state(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, F) and numbers (B, N), of windows (B, W, F) and (B, W, N), of observations or of states as the
        replay buffer has them, (B, W (F + N))."""
        state = state.reshape(-1, *self.state_shape)
        num_fields = len(self.states.field_dims)
        return state[..., :num_fields].long(), state[..., num_fields:]


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Polyak averaging: theta_target <- (1 - tau) theta_target + tau theta, every parameter."""
    for target_parameter, parameter in zip(target.parameters(), source.parameters(), strict=True):
        target_parameter.lerp_(parameter, tau)


def _hint(actor_name: str) -> str:
    return f"train it first: python3 SLmain.py --model_name={actor_name}"


@torch.no_grad()
def init_critic_from_actor(critic: Critic, actor: nn.Module, task: int) -> None:
    """Copy the actor's embedding of a task into a critic; and its encoder of the session, if both have the same one.
    An actor without an input layer of the same ids leaves the critic as it is."""
    source = actor.input_layer(task) if isinstance(actor, MultiTaskModel) else None
    if source is None:
        return
    critic.input.embedding.load_state_dict(source.embedding.state_dict())
    dst, src = critic.input.numerical, source.numerical
    shared_dim = min(dst.in_features, src.in_features)  # without the context where only one of them has an encoder
    dst.weight[:, :shared_dim] = src.weight[:, :shared_dim]
    dst.bias.copy_(src.bias)
    for name, values in critic.input.standardizer.named_buffers():
        values[:shared_dim] = getattr(source.standardizer, name)[:shared_dim]
    if (isinstance(critic, SequenceCritic) and isinstance(actor, SequenceModel)
            and type(critic.encoder) is type(actor.encoder)):
        critic.encoder.load_state_dict(actor.encoder.state_dict())
