"""The polish run: how the critics weight the loss, which critics do, and how the result stands beside the controls."""

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

from dataset.files import UserError
from layers import CriticNeg
from layers.session import window_of
from slmodels import MODELS
from train import world
from train.Arguments import POLISH_METHODS, SLArguments, agent_folder
from train.checkpoint import check_metadata, critic_of, load_tensors, weights_digest
from train.metrics import Metrics

CRITICS = ("critic1", "critic2")


class RlLossPolisher:
    """Weights of the supervised loss from the critics: w_k = 1 - lambda Q_k(s, a_k), (B, T), detached.

    Critics and model answer in eval mode, row by row: the weight of a sample depends on the sample, the critics and
    the model's present parameters, and on nothing else in the batch, nor on dropout.

    Args:
        model: the model that is polished; a_k is its prediction. Or, as published, an environment: then the second
            argument is a model's name, and its critics are read from `<critic_dir>/res_TD3BC_<name>`; the model is
            that which `sltrain` trains.
        critics: one a task; none are needed for `constant`.
        lambda_: lambda.
        method: `full` 1 - lambda Q; `label` 1 - lambda y Q; `critic` -Q; `inverse` 1 / (1 - lambda Q); `contrast`
            exp(-lambda (Q - mean Q) / std Q), over the batch, so that lambda says how far the weights spread;
            `constant` 1; `shuffled` and `contrast_shuffled`: those of `full` and `contrast`, permuted over the samples
            of the batch (a control: the same weights on the wrong samples).
        normalise: divide a task's weights by their mean over the batch, so that they change which samples count, not
            how large the step is. This and `contrast` are the exceptions to "nothing else in the batch".

    Raises UserError where there are no critics, or critics of other data, features or ids than the environment's.
    """

    METHODS = POLISH_METHODS

    def __init__(self, model: nn.Module | gym.Env[Any, Any], critics: Sequence[nn.Module] | str, lambda_: float = 0.5,
                 method: str = "full", normalise: bool = False, critic_dir: str | Path = "./chkpt/RL",
                 device: torch.device | str = "cpu") -> None:
        if method not in self.METHODS:
            raise ValueError(f"unknown method '{method}': one of {', '.join(self.METHODS)}")
        self.model = model if isinstance(model, nn.Module) else None
        if isinstance(critics, str):
            folder = agent_folder(str(critic_dir), "rt", "TD3BC", critics).folder
            sessions = None if isinstance(model, nn.Module) else getattr(model.unwrapped, "sessions", None)
            if sessions is None:
                raise UserError(f"critics of '{critics}': {type(model).__name__} is no env.MTEnv, whose data they have "
                                "to fit: give the critics themselves (train.polish.load_critics reads them)")
            data = sessions.metadata
            critics = load_critics(folder, data, len(CRITICS), f"train them: python3 RLmain.py --actor_name={critics}",
                                   device)
        if lambda_ < 0:
            raise ValueError(f"lambda_ is {lambda_}: 0 or more is needed")
        self.polish_lambda, self.method, self.normalise = lambda_, method, normalise
        self.critics = list(critics)
        self.window = max([0, *map(window_of, self.critics)])  # of the batches that are to be weighted
        self.digest = weights_digest(*critics)
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        """The weights (B, T) of a batch of ids (B, F), numbers (B, N) and labels (B, T); of windows, where one sees
        the session."""
        action = torch.empty(0)
        if self.method != "constant":
            if self.model is None:
                raise ValueError("the polisher has no model whose predictions the critics could judge: sltrain gives "
                                 "it the one that it trains; by hand: polisher.model = model")
            was_training = self.model.training
            action = self.model.eval()(categorical_x, numerical_x)
            self.model.train(was_training)
        w = self._weights_of(action, categorical_x, numerical_x, labels)
        self.seen.append(w)
        return w

    def polish_loss(self, categorical_fields: Tensor, numerical_fields: Tensor, labels: Tensor,
                    y: Tensor | Sequence[Tensor]) -> Tensor:
        """The weighted loss () of predictions y, (B, T) or T of (B,): the mean over tasks and samples of
        w_k BCE(y_k, label_k). Its gradient flows to y, not through the weights."""
        predictions = y if isinstance(y, Tensor) else torch.stack(list(y), dim=1)
        labels = labels[:, : predictions.shape[1]].to(predictions.dtype)
        with torch.no_grad():
            w = self._weights_of(predictions, categorical_fields, numerical_fields, labels)
        return (w * F.binary_cross_entropy(predictions, labels, reduction="none")).mean()

    def _weights_of(self, action: Tensor, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        if self.method == "constant":
            w = torch.ones_like(labels)
        else:
            if action.ndim != 2 or action.shape[1] != len(self.critics):
                raise ValueError(f"{len(self.critics)} critics for predictions of shape {tuple(action.shape)}: one "
                                 "critic a task is needed, and predictions (B, T)")
            modes = [critic.training for critic in self.critics]
            q = torch.stack([critic.eval()(categorical_x, numerical_x, action[:, task:task + 1])
                             for task, critic in enumerate(self.critics)], dim=1)  # (B, T)
            for critic, was_training in zip(self.critics, modes, strict=True):
                critic.train(was_training)
            if self.method == "label":
                q = labels * q
            w = -q if self.method == "critic" else 1 - self.polish_lambda * q
            if self.method == "inverse":
                w = 1 / w
            elif self.method.startswith("contrast"):
                std, mean = torch.std_mean(world.gather([q]), dim=0, correction=0)
                w = torch.exp(-self.polish_lambda * (q - mean) / std.clamp(min=1e-6))
            if self.method.endswith("shuffled"):
                whole = world.gather([w])
                (w,), _ = world.share([whole[torch.randperm(len(whole), device=w.device)]])
            if self.normalise:
                w = w / world.gather([w]).mean(dim=0)
        return w

    def summary(self, task_names: Sequence[str]) -> dict[str, float]:
        """Per task: quantiles of the weights since the last call, effective sample size and the share at 1.

        Effective sample size, as a share of the samples: (sum w)^2 / (n sum w^2), 1 where all weights are equal.
        """
        w = world.gather(self.seen).double().cpu().numpy()  # (n, T)
        self.seen = []
        figures: dict[str, float] = {}
        for task, name in enumerate(task_names[: w.shape[1]]):
            column = w[:, task]
            for share in (0.05, 0.5, 0.95):
                figures[f"weight_q{100 * share:02.0f}_{name}"] = float(np.quantile(column, share))
            figures[f"weight_ess_{name}"] = float(column.sum() ** 2 / (len(column) * (column**2).sum()))
            figures[f"weight_at_1_{name}"] = float((np.abs(column - 1) < 1e-6).mean())
        return figures


def make_polisher(model: nn.Module, settings: SLArguments, metadata: Mapping[str, Any],
                  device: torch.device) -> RlLossPolisher:
    """Find the critics, read them, and say which they are. Raises UserError where there are none that fit.

    metadata: of the model.
    """
    if settings.polish_method == "constant":
        print("control: every weight is 1, no critic is asked")
        return RlLossPolisher(model, [], settings.polish_lambda, "constant")
    folder, owner = find_critics(settings)
    print(f"critics of {owner} weight the loss of {settings.model_name}, from {folder}"
          + ("" if owner == settings.model_name else " (transfer); for critics of its own: "
             + settings.command("RLmain.py", "actor_name", settings.model_name)))
    same = {**metadata, "critic_encoder": settings.critics_see,
            "critic_window": 0 if settings.critics_see == "none" else settings.window}
    of_actor = folder / "pretrain_actor.pth"
    if owner == settings.model_name and of_actor.exists():
        own, theirs = (load_tensors(path, "train it anew")["weights"]
                       for path in (settings.baseline(owner), of_actor))
        if own.keys() != theirs.keys() or not all(torch.equal(own[name], theirs[name]) for name in own):
            print(f"these critics were trained with another baseline of {owner} than today's; for critics of this one: "
                  + settings.command("RLmain.py", "actor_name", owner))
    critics = load_critics(folder, same, settings.task_num, "train critics for this data: "
                           + settings.command("RLmain.py", "actor_name", owner), device)
    return RlLossPolisher(model, critics, settings.polish_lambda, settings.polish_method, settings.polish_normalise)


def load_critics(folder: Path, metadata: Mapping[str, Any], task_num: int, hint: str,
                 device: torch.device | str = "cpu") -> list[CriticNeg]:
    """The first `task_num` critics of an agent's folder, of the sizes that their files tell.

    Raises UserError, which ends in `hint`, where they are of other data, features, ids or encoders than `metadata`
    says, or of two runs.
    """
    names = ("data", "numerical", "features", "field_dims", "vocabulary", "critic_encoder", "critic_window")
    same = {name: metadata[name] for name in names if name in metadata}
    critics = []
    for name in CRITICS[:task_num]:
        path = folder / f"{name}.pth"
        saved = load_tensors(path, hint)
        same.setdefault("agent", saved.get("agent"))
        check_metadata(saved, same, path, hint)
        critics.append(critic_of(saved, path, hint).to(device))
    return critics


def find_critics(settings: SLArguments) -> tuple[Path, str]:
    """The folder of the critics of `--critic_from`, else of this model, else of the first model that has some; and
    whose they are. Raises UserError, naming the command that makes them, where there are none."""
    def folder(name: str) -> Path:
        return agent_folder(settings.critic_dir, settings.dataset_name, "TD3BC", settings.critics_name(name)).folder

    if settings.critic_from and settings.critic_from not in MODELS:
        raise UserError(f"--critic_from: unknown '{settings.critic_from}': one of {', '.join(MODELS)}")
    wanted = [settings.critic_from] if settings.critic_from else [settings.model_name, "esmm", *MODELS]
    for name in wanted:
        if all((folder(name) / f"{critic}.pth").exists() for critic in CRITICS):
            return folder(name), name
    raise UserError(f"{folder(wanted[0])}: no critics there: train them first: "
                    + settings.command("RLmain.py", "actor_name", settings.critic_from or "esmm"))


def summary(settings: SLArguments, start: str, baseline: Sequence[Metrics], polished: Sequence[Metrics],
            last: Sequence[Metrics], task_names: Sequence[str]) -> str:
    """A table of test figures: baseline, the controls run with these settings from the same weights `start`, this run
    (the best epoch on validation) and its last epoch."""
    rows: dict[str, list[dict[str, float]]] = {"baseline": [one._asdict() for one in baseline]}
    left_out = []
    for method in ("constant", "shuffled"):
        if method != settings.polish_method:
            try:
                found = _of_control(replace(settings, polish_method=method), start, task_names[: len(baseline)])
            except UserError as error:  # this run is at its end: its own figures are worth more than the comparison
                left_out.append(f"control: {method} is left out: {error}")
                continue
            if found:
                rows[f"control: {method}"] = found
    rows[f"this run: {settings.polish_method}"] = [one._asdict() for one in polished]
    rows["  its last epoch"] = [one._asdict() for one in last]
    lines = [f"{'test split':<22}" + "".join(f"{name + ' AUC':>12}{'Logloss':>10}{'s-Logloss':>11}"
                                             for name in task_names[: len(baseline)])]
    for title, tasks in rows.items():
        lines.append(f"{title:<22}" + "".join(
            f"{one['auc']:>12.4f}{one['logloss']:>10.4f}{one['session_logloss']:>11.4f}" for one in tasks))
    if "control: constant" not in rows and settings.polish_method != "constant":
        lines.append("no control yet: a gain over the baseline may come from training longer alone; run the same "
                     "command with --polish_method=constant")
    return "\n".join([*lines, *left_out])


def _of_control(settings: SLArguments, start: str, task_names: Sequence[str]) -> list[dict[str, float]]:
    """The test figures of a finished control of the same settings and start, hence of the same data; or none.

    Raises UserError where its books cannot be read.
    """
    run = settings.run
    if not run.metrics.exists() or not run.config.exists():
        return []
    config, free = run.read_config(), ("resume", "device", "critic_from", "critic_dir", "critic_encoder")
    if config["start"] != start or any(config["settings"].get(name) != value
                                       for name, value in settings.plain().items() if name not in free):
        return []
    return run.read_test(task_names)
