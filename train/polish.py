"""Polishing: the critics' weights of the loss, which critics are used, and the result beside its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.checkpoint import check_metadata, load_tensors, state_dict_hash
from common.errors import UserError
from common.run_dir import agent_dir, critic_names, network_path
from layers import CriticNeg
from slmodels.model_file import critic_from_file
from train.Arguments import SLArguments
from train.critic_weights import CRITIC_WEIGHTS, POLISH_METHODS, UNSHUFFLED, controls_of
from train.metrics import Metrics, read_test_metrics


class RlLossPolisher:
    """Weights of the supervised loss from the critics: w_k = 1 - lambda Q_k(s, a_k), (B, T), detached.

    Critics and model predict in eval mode: the weight of a sample depends on the sample, the critics and the model's
    current parameters, and on nothing else in the batch, nor on dropout.

    Args:
        model: the model that is polished; a_k is its prediction. Or, as published, an environment: then the second
            argument is a model's name, its critics are read from `<critic_dir>/res_TD3BC_<name>`, and the model is
            the one that `sltrain` trains.
        critics: one a task; none are needed for `constant`.
        lambda_: lambda.
        method: one of `train.critic_weights.CRITIC_WEIGHTS`, such as `full`, 1 - lambda Q, or `contrast`,
            exp(-lambda (Q - mean Q) / std Q), over the batch: lambda sets the spread of the weights; `constant` 1;
            `shuffled`, `contrast_shuffled`, ...: those of `full`, `contrast`, ..., permuted over the samples of the
            batch (a control: the same weights on the wrong samples).
        normalize: divide a task's weights by their mean over the batch, so that they change which samples count, not
            how large the step is. This and `contrast` are the exceptions to "nothing else in the batch".

    Raises UserError where there are no critics, or critics of other data, features or ids than the environment's.
    """

    METHODS = POLISH_METHODS

    def __init__(self, model: nn.Module | gym.Env[Any, Any], critics: Sequence[nn.Module] | str, lambda_: float = 0.5,
                 method: str = "full", normalize: bool = False, critic_dir: str | Path = "./chkpt/RL",
                 device: torch.device | str = "cpu") -> None:
        if method not in self.METHODS:
            raise ValueError(f"unknown method '{method}': one of {', '.join(self.METHODS)}")
        if lambda_ < 0:
            raise ValueError(f"lambda_ is {lambda_}: 0 or more is needed")
        if isinstance(critics, str):
            critics = _published_critics(model, critics, critic_dir, device)
        self.model = model if isinstance(model, nn.Module) else None
        self.polish_lambda, self.method, self.normalize = lambda_, method, normalize
        self.critics = list(critics)
        self.window = max([0, *(getattr(critic, "window", 0) for critic in self.critics)])  # of the batches to weight
        self.digest = state_dict_hash(*critics)
        self._weight_buffer: list[Tensor] = []

    def weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        """`sample_weights`, which `weight_statistics` summarizes later."""
        weights = self.sample_weights(categorical_x, numerical_x, labels)
        self._weight_buffer.append(weights)
        return weights

    @torch.no_grad()
    def sample_weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        """The weights (B, T) of a batch of ids (B, F), numbers (B, N) and labels (B, T); of windows, for critics with
        an encoder of the session."""
        if self.method == "constant":
            return torch.ones_like(labels)
        if self.model is None:
            raise ValueError("the polisher has no model whose predictions the critics could evaluate: sltrain gives it "
                             "the one that it trains; by hand: polisher.model = model")
        was_training = self.model.training
        action = self.model.eval()(categorical_x, numerical_x)
        self.model.train(was_training)
        return self._weights_of(action, categorical_x, numerical_x, labels)

    def polish_loss(self, categorical_fields: Tensor, numerical_fields: Tensor, labels: Tensor,
                    y: Tensor | Sequence[Tensor]) -> Tensor:
        """The weighted loss () of predictions y, (B, T) or T of (B,): the mean over tasks and samples of
        w_k BCE(y_k, label_k). Its gradient flows to y, not through the weights."""
        predictions = y if isinstance(y, Tensor) else torch.stack(list(y), dim=1)
        labels = labels[:, : predictions.shape[1]].to(predictions.dtype)
        with torch.no_grad():
            weights = (torch.ones_like(labels) if self.method == "constant" else
                       self._weights_of(predictions, categorical_fields, numerical_fields, labels))
        return (weights * F.binary_cross_entropy(predictions, labels, reduction="none")).mean()

    def _weights_of(self, action: Tensor, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        if action.ndim != 2 or action.shape[1] != len(self.critics):
            raise ValueError(f"{len(self.critics)} critics for predictions of shape {tuple(action.shape)}: one critic "
                             "a task is needed, and predictions (B, T)")
        modes = [critic.training for critic in self.critics]
        q = torch.stack([critic.eval()(categorical_x, numerical_x, action[:, task:task + 1])
                         for task, critic in enumerate(self.critics)], dim=1)  # (B, T)
        for critic, was_training in zip(self.critics, modes, strict=True):
            critic.train(was_training)
        method = CRITIC_WEIGHTS[UNSHUFFLED.get(self.method, self.method)]
        weights = method.weights(q, labels[:, : q.shape[1]], self.polish_lambda)
        if self.method in UNSHUFFLED:
            full_batch = distributed.all_gather_rows(weights)
            order = distributed.from_main(torch.randperm(len(full_batch), device=weights.device))
            (weights,) = distributed.shard([full_batch[order]])
        if self.normalize:
            weights = weights / distributed.all_gather_rows(weights).mean(dim=0)
        return weights

    def weight_statistics(self, task_names: Sequence[str]) -> dict[str, float]:
        """Per task: mean and quantiles of the weights since the last call, effective sample size, the fraction at 1.

        Effective sample size, as a fraction of the samples: (sum w)^2 / (n sum w^2), 1 where all weights are equal.
        """
        weights = distributed.all_gather_rows(torch.cat(self._weight_buffer))  # (n, T)
        self._weight_buffer = []
        statistics: dict[str, float] = {}
        for task, name in enumerate(task_names[: weights.shape[1]]):
            w = weights[:, task].double().cpu().numpy()
            statistics[f"weight_mean_{name}"] = float(w.mean())
            for q in (0.05, 0.5, 0.95):
                statistics[f"weight_q{100 * q:02.0f}_{name}"] = float(np.quantile(w, q))
            statistics[f"weight_ess_{name}"] = float(w.sum() ** 2 / (len(w) * (w**2).sum()))
            statistics[f"weight_at_1_{name}"] = float((np.abs(w - 1) < 1e-6).mean())
        return statistics


def make_polisher(settings: SLArguments, data: Mapping[str, Any], model: nn.Module,
                  device: torch.device) -> RlLossPolisher:
    """Find and load the critics, and print which they are. Raises UserError where there are none that fit.

    data: `RetailRocketRLDataset.metadata`.
    """
    if settings.polish_method == "constant":
        print("control: constant weights (critics unused)")
        return RlLossPolisher(model, [], settings.polish_lambda, "constant")
    owner, directory = settings.find_critics()
    train_own, train_owners = (settings.suggest_command("RLmain.py", "actor_name", name)
                               for name in (settings.model_name, owner))
    print(f"critics of {owner} weight the loss of {settings.model_name}, from {directory}"
          + ("" if owner == settings.model_name else f" (transfer); for critics of its own: {train_own}"))
    if owner == settings.model_name and _has_other_baseline(directory, settings.baseline(owner)):
        print(f"these critics were trained with another baseline of {owner} than today's; for critics of this one: "
              + train_own)
    encoder = settings.resolved_critic_encoder
    expected = {**settings.metadata(settings.model_name, data), "critic_encoder": encoder,
                "critic_window": 0 if encoder == "none" else settings.window}
    critics = load_critics(directory, expected, len(expected["tasks"]), f"train critics for this data: {train_owners}",
                           device)
    return RlLossPolisher(model, critics, settings.polish_lambda, settings.polish_method, settings.polish_normalize)


def load_critics(directory: Path, metadata: Mapping[str, Any], task_num: int, hint: str,
                 device: torch.device | str = "cpu") -> list[CriticNeg]:
    """The first `task_num` critics of an agent's directory, of the sizes that their files contain.

    Raises UserError, which ends in `hint`, where their data, features, ids or encoders are not those of `metadata`, or
    where they are of two agents.
    """
    names = ("data", "numerical", "features", "field_dims", "vocabulary", "critic_encoder", "critic_window")
    expected = {name: metadata[name] for name in names if name in metadata}
    critics = []
    for name in critic_names(task_num):
        path = network_path(directory, name)
        saved = load_tensors(path, hint)
        expected.setdefault("agent", saved.get("agent"))
        check_metadata(saved, expected, path, hint)
        critics.append(critic_from_file(saved, path, hint).to(device))
    return critics


def _published_critics(env: nn.Module | gym.Env[Any, Any], actor_name: str, critic_dir: str | Path,
                       device: torch.device | str) -> list[CriticNeg]:
    """The critics of an actor that fit an environment's data. Raises UserError."""
    sessions = None if isinstance(env, nn.Module) else getattr(env.unwrapped, "sessions", None)
    if sessions is None:
        raise UserError(f"critics of '{actor_name}': {type(env).__name__} is no env.MTEnv, whose data they have to fit"
                        ": give the critics themselves (train.polish.load_critics reads them)")
    return load_critics(agent_dir(critic_dir, "rt", "bc", actor_name), sessions.metadata,
                        sessions.labels.shape[1], f"train them: python3 RLmain.py --actor_name={actor_name}", device)


def _has_other_baseline(directory: Path, baseline: Path) -> bool:
    """Whether the agent of a directory started from another baseline than the one in the file. Raises UserError."""
    actor = network_path(directory, "pretrain_actor")
    if not actor.exists():
        return False
    current, started_from = (load_tensors(path, "train it again")["weights"] for path in (baseline, actor))
    return current.keys() != started_from.keys() or not all(torch.equal(current[name], started_from[name])
                                                            for name in current)


def comparison_table(settings: SLArguments, start: str, baseline: Sequence[Metrics], polished: Sequence[Metrics],
                     last: Sequence[Metrics], task_names: Sequence[str]) -> str:
    """A table of test metrics: the baseline, the finished controls of these settings and initial weights `start`, this
    run (the best epoch on validation) and its last epoch."""
    rows, problems = {"baseline": baseline}, []
    for method in controls_of(settings.polish_method):
        if method != settings.polish_method:
            try:
                control = _control_metrics(replace(settings, polish_method=method), start, task_names)
            except UserError as error:  # this run is at its end: its own metrics are worth more than the comparison
                problems.append(f"control: {method} is skipped: {error}")
                continue
            if control:
                rows[f"control: {method}"] = control
    rows |= {f"this run: {settings.polish_method}": polished, "  its last epoch": last}
    first = max(22, *(len(title) for title in rows))
    widths = [max(12, len(f"{name} AUC") + 2) for name in task_names]
    lines = [f"{'test split':<{first}}" + "".join(
        f"{name + ' AUC':>{width}}{'Logloss':>10}{'s-Logloss':>11}{'s-GAUC':>8}{'u-GAUC':>8}"
        for name, width in zip(task_names, widths, strict=True))]
    lines += [f"{title:<{first}}" + "".join(
        f"{task.auc:>{width}.4f}{task.logloss:>10.4f}{task.session_logloss:>11.4f}{task.session_gauc:>8.4f}"
        f"{task.user_gauc:>8.4f}" for task, width in zip(metrics, widths, strict=True))
              for title, metrics in rows.items()]
    if "control: constant" not in rows and settings.polish_method != "constant":
        lines.append("no control run found: a gain over the baseline may be due to the additional training; run the "
                     "same command with --polish_method=constant")
    return "\n".join([*lines, *problems])


def _control_metrics(settings: SLArguments, start: str, task_names: Sequence[str]) -> list[Metrics]:
    """The test metrics of a finished run of these settings and initial weights, hence of the same data; or none.

    Raises UserError where its files cannot be read.
    """
    run_dir = settings.run_dir
    if not run_dir.metrics.exists() or not run_dir.config.exists():
        return []
    config = run_dir.read_config()
    free = ("resume", "data", "device", "track", "shard_embeddings", "task_num", "critic_model", "critic_dir",
            "critic_encoder")
    if config["start"] != start or any(config["settings"].get(name) != value
                                       for name, value in settings.plain().items() if name not in free):
        return []
    return read_test_metrics(run_dir.metrics, task_names)
