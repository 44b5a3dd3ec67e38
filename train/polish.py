"""The polish run: which critics weight the loss, and how its result stands beside the baseline and the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset.files import UserError
from dataset.rtrl import Batches, RetailRocketRLDataset
from env import reward_of
from layers.session import make_critic, window_of
from slmodels import MODELS
from train.Arguments import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, SLArguments
from train.checkpoint import RunFolder, load_model, load_tensors, sight
from train.run import EVALUATION_BATCH, slpred
from train.utils import Metrics, RlLossPolisher

CRITICS = ("critic1", "critic2")


def make_polisher(model: nn.Module, settings: SLArguments, identity: Mapping[str, Any], numerical_num: int,
                  device: torch.device) -> RlLossPolisher:
    """Find the critics, read them, and say which they are. Raises UserError where there are none that fit."""
    if settings.polish_method == "constant":
        print("control: every weight is 1, no critic is asked")
        return RlLossPolisher(model, [], settings.polish_lambda, "constant")
    folder, owner = find_critics(settings)
    print(f"critics of {owner} weight the loss of {settings.model_name}, from {folder}"
          + ("" if owner == settings.model_name else " (transfer); for critics of its own: "
             + settings.command("RLmain.py", "actor_name", settings.model_name)))
    same = {**{name: identity[name] for name in ("data", "numerical", "field_dims")},
            **sight(settings.critics_see, settings.window, "critic_")}
    critics: list[nn.Module] = []
    for name in CRITICS[: settings.task_num]:
        path = folder / f"{name}.pth"
        remedy = "train critics for this data: " + settings.command("RLmain.py", "actor_name", owner)
        saved = load_tensors(path, remedy)
        same.setdefault("agent", saved.get("agent"))  # both critics of one run
        embed_dim = saved.get("embed_dim")
        # Its embedding alone has so many bytes; a file that claims to be larger than it is does not fit.
        smallest = 4 * sum(identity["field_dims"])
        embed_dim = embed_dim if isinstance(embed_dim, int) and 0 < embed_dim * smallest <= path.stat().st_size else 1
        critic = make_critic(settings.critics_see, settings.window, identity["field_dims"], numerical_num, embed_dim,
                             BOTTOM_MLP_DIMS, TOWER_MLP_DIMS)
        load_model(path, critic, same, remedy)
        critics.append(critic.to(device))
    return RlLossPolisher(model, critics, settings.polish_lambda, settings.polish_method, settings.polish_normalise)


def find_critics(settings: SLArguments) -> tuple[Path, str]:
    """The folder of the critics of `--critic_from`, else of this model, else of the first model that has some; and
    whose they are. Raises UserError, naming the command that makes them, where there are none."""
    def folder(name: str) -> Path:
        return RunFolder.of_agent(settings.critic_dir, settings.dataset_name, "TD3BC",
                                  settings.critics_name(name)).folder

    if settings.critic_from and settings.critic_from not in MODELS:
        raise UserError(f"--critic_from: unknown '{settings.critic_from}': one of {', '.join(MODELS)}")
    wanted = [settings.critic_from] if settings.critic_from else [settings.model_name, "esmm", *MODELS]
    for name in wanted:
        if all((folder(name) / f"{critic}.pth").exists() for critic in CRITICS):
            return folder(name), name
    raise UserError(f"{folder(wanted[0])}: no critics there: train them first: "
                    + settings.command("RLmain.py", "actor_name", settings.critic_from or "esmm"))


@torch.no_grad()
def weights_against_loss(model: nn.Module, polisher: RlLossPolisher, split: RetailRocketRLDataset,
                         task_names: Sequence[str], device: torch.device, groups: int = 10) -> list[dict[str, float]]:
    """The samples of a split in ten groups of equal size, by their weight: per task and group the mean weight, the
    model's mean logloss and the share of positive labels."""
    batches = Batches(split, EVALUATION_BATCH, device, window=max(window_of(model), polisher.window))
    weights = torch.cat([polisher.weights(*batch) for batch in batches]).double().cpu().numpy()  # (n, T)
    polisher.seen.clear()
    predictions = np.column_stack(slpred(model, batches, weights.shape[1], device))
    losses = -reward_of(predictions, split.labels[:, : weights.shape[1]], "bce")
    rows: list[dict[str, float]] = [{} for _ in range(groups)]
    for task, name in enumerate(task_names[: weights.shape[1]]):
        order = np.argsort(weights[:, task], kind="stable")
        for row, group in zip(rows, np.array_split(order, groups), strict=True):
            row |= {f"{what}_{name}": float(values[group, task].mean())
                    for what, values in (("weight", weights), ("loss", losses), ("label", split.labels))}
    return rows


def summary(settings: SLArguments, start: str, baseline: Sequence[Metrics], polished: Sequence[Metrics],
            task_names: Sequence[str]) -> str:
    """A table of test figures: baseline, the controls run with these settings from the same weights `start`, this run.
    """
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
    run = RunFolder.of_model(settings)
    if not run.metrics.exists() or not run.config.exists():
        return []
    config, free = run.read_config(), ("resume", "device", "critic_from", "critic_dir", "critic_encoder")
    if config["start"] != start or any(config["settings"].get(name) != value
                                       for name, value in asdict(settings).items() if name not in free):
        return []
    return run.read_test(task_names)
