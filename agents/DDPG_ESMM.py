"""DDPG with a multi-task model as actor and one critic a task (Liu et al., WWW 2023; Lillicrap et al., ICLR 2016)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.ReplayBuffer import ReplayBuffer, Transition
from dataset.files import UserError
from env import MTEnv
from layers import Critic, CriticNeg
from layers.session import SessionCritic, SessionModel, inner_of, input_of, make_critic
from slmodels import build
from train import world
from train.Arguments import named
from train.checkpoint import load_model, load_tensors, put_weights, save_model, sight
from train.numbers import FirstBad, bad_tensor
from train.utils import get_optim_param, set_optim_param, weights_digest

Tensors = dict[str, Tensor]
NETWORKS = ("pretrain_actor", "actor", "actor_target", "critic1", "critic2", "critic1_target", "critic2_target")
POLICY_NOISE, NOISE_CLIP = 0.01, 0.03  # TD3's 0.2 and 0.5 on [-1, 1], for predictions of a few per cent


class DDPG_ESMM:
    """Seven networks: pretrain_actor; actor, actor_target; critic1, critic2 and their targets.

    Args:
        env: the sessions that are learned from; windows of them (`is_seq`) for an encoder.
        actor_name: any model of `slmodels`; its baseline must lie in `pretrain_path`.
        identity: what that baseline must be (see `train.checkpoint.model_identity`); its file is
            `<pretrain_path>/<dataset_name>_<actor_name>.pt`, with an encoder `..._<actor_name>_<encoder>.pt`.
        encoder, critic_encoder: what actor and critics see of the session (`layers.session`), or none.
        gamma: discount of the next impression's reward.
        embed_dim, bottom_mlp_dims, tower_mlp_dims, drop_out: sizes of actor and critics.
        ou_noise_theta, ou_noise_gamma: mean and scale of the exploration noise.
        memory_size, batch_size: of the replay buffer.
        actor_reg: weight of the pull to the pretrained actor (BC).
        tau, soft_update_freq: share by which targets follow, and after how many updates.
        actor_update_freq, init_training_step: the actor trains every so many updates, after so many.
        ips: weight the critics' losses by inverse propensities (`DDPG_ESMM_multiweight` and its children).
        actor_lr, critic_lr: of Adam.
    """

    def __init__(self, env: MTEnv, actor_name: str = "esmm", gamma: float = 0.9, pretrain_path: str = "./pretrain", *,
                 identity: dict[str, Any], dataset_name: str = "rt", embed_dim: int = 128,
                 bottom_mlp_dims: Sequence[int] = (512, 256), tower_mlp_dims: Sequence[int] = (128, 64),
                 expert_num: int = 8, ou_noise_theta: float = 0.0, ou_noise_gamma: float = 0.4,
                 memory_size: int = 500_000, actor_reg: float = 0.0, tau: float = 0.2, soft_update_freq: int = 2,
                 actor_update_freq: int = 2, init_training_step: int = 10_000, ips: bool = False,
                 batch_size: int = 512, drop_out: float = 0.2, actor_lr: float = 1e-3, critic_lr: float = 1e-3,
                 device: torch.device | str = "cpu", seed: int = 2022, encoder: str = "none",
                 critic_encoder: str = "none") -> None:
        self.env, self.gamma, self.tau, self.device, self.identity = env, gamma, tau, device, identity
        self.noise_mean, self.noise_scale, self.actor_reg, self.ips = ou_noise_theta, ou_noise_gamma, actor_reg, ips
        self.soft_update_freq, self.actor_update_freq = soft_update_freq, actor_update_freq
        self.init_training_step, self.updates = init_training_step, 0
        self.critic_encoder, window = critic_encoder, env.sessions.window
        self.fields, numerical_num = len(env.sessions.field_dims), env.sessions.numerical_num
        self.state_shape = env.sessions.observation_space.shape  # (F + N,), or of windows (W, F + N)
        self.task_num = env.sessions.labels.shape[1]
        self.memory = ReplayBuffer(math.prod(self.state_shape), self.task_num, memory_size, batch_size, seed)
        self.rng = np.random.default_rng([seed, 7])

        actor = build(actor_name, env.sessions.field_dims, numerical_num, embed_dim, bottom_mlp_dims, tower_mlp_dims,
                      self.task_num, expert_num, drop_out, encoder, window).to(device)
        load_model(Path(pretrain_path) / f"{dataset_name}_{named(actor_name, encoder)}.pt", actor, identity,
                   f"train it first: python3 SLmain.py --model_name={actor_name}")
        self.pretrain_actor, self.actor, self.actor_target = actor, copy.deepcopy(actor), copy.deepcopy(actor)
        self.critic1, self.critic2 = (
            make_critic(critic_encoder, window, env.sessions.field_dims, numerical_num, embed_dim, bottom_mlp_dims,
                        tower_mlp_dims, drop_out).to(device) for _ in range(2))
        for task, critic in enumerate((self.critic1, self.critic2)):
            start_from_actor(critic, actor, task)
        self.critic1_target, self.critic2_target = copy.deepcopy(self.critic1), copy.deepcopy(self.critic2)
        for frozen in (self.pretrain_actor, self.actor_target, self.critic1_target, self.critic2_target):
            frozen.eval().requires_grad_(False)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=actor_lr, fused=True)
        self.watches = [FirstBad(device, 50) for _ in range(self.task_num)]  # of the critics' losses
        self.critic1_optimizer = torch.optim.Adam(self.critic1.parameters(), lr=critic_lr, fused=True)
        self.critic2_optimizer = torch.optim.Adam(self.critic2.parameters(), lr=critic_lr, fused=True)

    def critics(self) -> list[tuple[CriticNeg, CriticNeg, torch.optim.Adam]]:
        """Each task's critic, its target and its optimizer."""
        return [(self.critic1, self.critic1_target, self.critic1_optimizer),
                (self.critic2, self.critic2_target, self.critic2_optimizer)][: self.task_num]

    def networks(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in NETWORKS}

    @torch.no_grad()
    def select_action(self, state: NDArray[np.float32], noise: bool = True) -> NDArray[np.float32]:
        """The actor's predictions for one observation of the environment or a batch of them, (...) or (B, ...), with
        exploration noise, within [0, 1]: (T,) or (B, T)."""
        categorical_x, numerical_x = self.split(torch.from_numpy(state).to(self.device))
        self.actor.eval()
        action = self.actor(categorical_x, numerical_x).cpu().numpy()
        if noise:
            drawn = self.rng.normal(self.noise_mean, self.noise_scale, action.shape)
            action = np.clip(action + drawn, 0.0, 1.0).astype(np.float32)
        return action[0] if state.shape == self.state_shape else action

    def process_batch(self, transition: Transition) -> Tensors:
        """A sampled batch as tensors: states split into ids and numbers, the rest as it is."""
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in transition.items()}
        batch = {name: tensors[name] for name in ("action", "reward", "done", "label")}
        batch["categorical_x"], batch["numerical_x"] = self.split(tensors["state"])
        batch["next_categorical_x"], batch["next_numerical_x"] = self.split(tensors["next_state"])
        batch["weight"] = torch.ones_like(batch["reward"])
        batch["noise"] = torch.randn_like(batch["reward"])  # of the target policy
        return batch

    def sample(self) -> tuple[Tensors, float]:
        """A batch from the memory, this process's share of it, and which share that is (1 where it is alone)."""
        batch = self.process_batch(self.memory.sample_batch())
        tensors, part = world.share(list(batch.values()))
        return dict(zip(batch, tensors, strict=True)), part

    def get_closs(self, critic_id: int, critic: Critic, critic_target: Critic, transition: Tensors) -> Tensor:
        """Mean squared TD error of one critic, times the sample weight."""
        target = self.td_target(critic_id, critic, critic_target, transition)
        action = transition["action"][:, critic_id:critic_id + 1]
        q = critic(transition["categorical_x"], transition["numerical_x"], action)
        return (transition["weight"][:, critic_id] * (q - target) ** 2).mean()

    @torch.no_grad()
    def td_target(self, critic_id: int, critic: Critic, critic_target: Critic, transition: Tensors) -> Tensor:
        """r + gamma (1 - done) min(Q_target(s', a'), Q(s', a')), (B,); a' = actor_target(s') + clipped noise."""
        state = transition["next_categorical_x"], transition["next_numerical_x"]
        if "next_prediction" not in transition:  # both critics look at the same next states
            transition["next_prediction"] = self.actor_target(*state)
        action = transition["next_prediction"][:, critic_id:critic_id + 1]
        noise = transition["noise"][:, critic_id:critic_id + 1] * POLICY_NOISE
        action = (action + noise.clamp(-NOISE_CLIP, NOISE_CLIP)).clamp(0.0, 1.0)
        was_training = critic.training
        next_q = torch.minimum(critic_target(*state, action), critic.eval()(*state, action))
        critic.train(was_training)
        return transition["reward"][:, critic_id] + self.gamma * (1 - transition["done"]) * next_q

    def get_aloss(self, transition: Tensors, part: float = 1.0) -> tuple[Tensor, Tensor]:
        """The actor's two losses: -lambda mean(Q_1 + Q_2), and the pull to the pretrained actor, actor_reg
        mean (a - a_pretrained)^2. lambda = 1 / mean|Q(s, a)| over the batch's own actions (TD3+BC, equation (5)), the
        whole batch's where `transition` is a part of it."""
        state = transition["categorical_x"], transition["numerical_x"]
        action = self.actor(*state)
        q = self._values(state, action)
        with torch.no_grad():
            size = world.total(part * self._values(state, transition["action"]).abs().mean())
            scale = 1.0 / size.clamp(min=1e-6)
            pretrained = self.pretrain_actor(*state)
        return -scale * q.sum(dim=0).mean(), self.actor_reg * F.mse_loss(action, pretrained)

    def _values(self, state: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
        """Q of each task's action (T, B)."""
        return torch.stack([critic(*state, action[:, task:task + 1])
                            for task, (critic, _, _) in enumerate(self.critics())])

    def update(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One DDPG update: both critics, then, after init_training_step, the actor. Returns the losses of critic 1 and
        2 and of the actor, and its pull to the pretrained one."""
        transition, part = self.sample()
        closses = self._update_critics(transition, part)
        aloss, aloss_reg = self._actor_losses(transition, part)
        if self.updates > self.init_training_step and self.updates % self.actor_update_freq == 0:
            self.actor_optimizer.zero_grad()
            (part * (aloss + aloss_reg)).backward()
            world.sum_gradients(self.actor)
            self.actor_optimizer.step()
        if self.updates % self.soft_update_freq == 0:
            self._target_soft_update(self.tau)
        aloss, aloss_reg = world.total(part * torch.stack([aloss, aloss_reg]).detach())
        return closses[0], closses[-1], aloss, aloss_reg

    def _update_critics(self, transition: Tensors, part: float) -> Tensor:
        closses = []
        for task, (critic, target, optimizer) in enumerate(self.critics()):
            critic.train()
            closs = self.get_closs(task, critic, target, transition)
            if bad := self.watches[task].see(self.updates + 1, closs):
                raise self.diverged(f"the loss of critic{task + 1} (task {task}) is {float(closs.detach())}", bad[1])
            optimizer.zero_grad()
            (part * closs).backward()
            world.sum_gradients(critic)
            optimizer.step()
            closses.append(closs.detach())
        self.updates += 1
        return world.total(part * torch.stack(closses))

    def diverged(self, what: str, update: int) -> UserError:
        """The one line for a number that is none at an update; it names the tensor."""
        tensor = bad_tensor(self.networks()) or "Q or the target, of finite weights"
        return UserError(f"{what} at update {update} (NaN or infinity in {tensor}): try a smaller --critic_lr; "
                         "the last good epoch is kept")

    def _actor_losses(self, transition: Tensors, part: float) -> tuple[Tensor, Tensor]:
        self.actor.train()
        for critic, _, _ in self.critics():
            critic.eval()
        return self.get_aloss(transition, part)

    def _target_soft_update(self, tau: float) -> None:
        """Move every target by tau towards its network."""
        critics = [(critic, target) for critic, target, _ in self.critics()]
        self._follow([(self.actor, self.actor_target), *critics], tau)

    @torch.no_grad()
    def _follow(self, pairs: Sequence[tuple[nn.Module, nn.Module]], tau: float) -> None:
        for network, target in pairs:
            for follower, leader in zip(target.parameters(), network.parameters(), strict=True):
                follower.lerp_(leader, tau)

    def save_or_load_agent(self, cwd: str, if_save: bool) -> None:
        """Write the seven networks to, or read them from, `<cwd>/<network>.pth`. Raises UserError.

        Each says of which `agent` it is, so that networks of two runs, one stopped while it wrote, are told apart.
        """
        paths = {name: Path(cwd) / f"{name}.pth" for name in self.networks()}
        remedy = "train them anew: python3 RLmain.py"
        agent = (weights_digest(*self.networks().values()) if if_save
                 else load_tensors(paths["pretrain_actor"], remedy).get("agent"))
        identity = {**self.identity, **sight(self.critic_encoder, self.env.sessions.window, "critic_"), "agent": agent}
        for name, network in self.networks().items():
            if if_save:
                save_model(paths[name], network, identity)
            else:
                load_model(paths[name], network, identity, remedy)

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, but for the memory and the random numbers."""
        optimizers = {"actor": self.actor_optimizer, "critic1": self.critic1_optimizer,
                      "critic2": self.critic2_optimizer}
        return {"networks": {name: network.state_dict() for name, network in self.networks().items()},
                "optimizers": {name: get_optim_param(one) for name, one in optimizers.items()},
                "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, network in self.networks().items():
            put_weights(network, state["networks"][name])
        for name, tensors in state["optimizers"].items():
            set_optim_param(getattr(self, f"{name}_optimizer"), tensors)
        self.updates = state["updates"]

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, F) and numbers (B, N), of windows (B, W, F) and (B, W, N), of observations or of states as the memory
        has them, (B, W (F + N))."""
        state = state.reshape(-1, *self.state_shape)
        return state[..., : self.fields].long(), state[..., self.fields:]


@torch.no_grad()
def start_from_actor(critic: Critic, actor: nn.Module, task: int) -> None:
    """Let a critic's embedding begin where the actor's stands; a single-task actor has one for each task. So does its
    encoder of the session, if both have the same one."""
    source = input_of(inner_of(actor), task)
    critic.input.embedding.load_state_dict(source.embedding.state_dict())
    mine, theirs = critic.input.numerical, source.numerical
    both = min(mine.in_features, theirs.in_features)  # without the context where only one of them sees the session
    mine.weight[:, :both] = theirs.weight[:, :both]
    mine.bias.copy_(theirs.bias)
    if (isinstance(critic, SessionCritic) and isinstance(actor, SessionModel)
            and type(critic.encoder) is type(actor.encoder)):
        critic.encoder.load_state_dict(actor.encoder.state_dict())
