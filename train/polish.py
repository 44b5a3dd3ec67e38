"""The polish run: which critics weight the loss, and how its result stands beside the baseline and the controls."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.files import UserError, read_json
from layers import CriticNeg
from slmodels import MODELS
from train.Arguments import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, SLArguments
from train.checkpoint import RunFolder, load_model, load_tensors
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
    same = {name: identity[name] for name in ("data", "numerical", "field_dims")}
    critics: list[nn.Module] = []
    for name in CRITICS[: settings.task_num]:
        path = folder / f"{name}.pth"
        remedy = "train critics for this data: " + settings.command("RLmain.py", "actor_name", owner)
        saved = load_tensors(path, remedy)
        same.setdefault("agent", saved.get("agent"))  # both critics of one run
        embed_dim = saved.get("embed_dim")
        embed_dim = embed_dim if isinstance(embed_dim, int) and 0 < embed_dim <= 65536 else 1
        critic = CriticNeg(identity["field_dims"], numerical_num, embed_dim, BOTTOM_MLP_DIMS, TOWER_MLP_DIMS)
        load_model(path, critic, same, remedy)
        critics.append(critic.to(device))
    return RlLossPolisher(model, critics, settings.polish_lambda, settings.polish_method)


def find_critics(settings: SLArguments) -> tuple[Path, str]:
    """The folder of the critics of `--critic_from`, else of this model, else of the first model that has some; and
    whose they are. Raises UserError, naming the command that makes them, where there are none."""
    def folder(name: str) -> Path:
        return RunFolder.of_agent(settings.critic_dir, settings.dataset_name, "TD3BC", name).folder

    if settings.critic_from and settings.critic_from not in MODELS:
        raise UserError(f"--critic_from: unknown '{settings.critic_from}': one of {', '.join(MODELS)}")
    wanted = [settings.critic_from] if settings.critic_from else [settings.model_name, "esmm", *MODELS]
    for name in wanted:
        if all((folder(name) / f"{critic}.pth").exists() for critic in CRITICS):
            return folder(name), name
    raise UserError(f"{folder(wanted[0])}: no critics there: train them first: "
                    + settings.command("RLmain.py", "actor_name", settings.critic_from or "esmm"))


def summary(settings: SLArguments, start: str, baseline: Sequence[Metrics], polished: Sequence[Metrics],
            task_names: Sequence[str]) -> str:
    """A table of test figures: baseline, the controls run with these settings from the same weights `start`, this run.
    """
    rows: dict[str, list[dict[str, float]]] = {"baseline": [one._asdict() for one in baseline]}
    for method in ("constant", "shuffled"):
        if method != settings.polish_method:
            found = _of_control(replace(settings, polish_method=method), start, task_names[: len(baseline)])
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
    return "\n".join(lines)


def _of_control(settings: SLArguments, start: str, task_names: Sequence[str]) -> list[dict[str, float]]:
    """The test figures of a finished control of the same settings and start, hence of the same data; or none."""
    run = RunFolder.of_model(settings)
    if not run.metrics.exists() or not run.config.exists():
        return []
    config = read_json(run.config)
    saved, free = config.get("settings", {}), ("resume", "device", "critic_from", "critic_dir")
    if config.get("start") != start or any(
            saved.get(name) != value for name, value in asdict(settings).items() if name not in free):
        return []
    with open(run.metrics, encoding="utf-8", newline="") as file:
        last = [row for row in csv.DictReader(file) if row.get("split") == "test"]
    return [{figure: float(last[-1][f"{figure}_{name}"]) for figure in Metrics._fields}
            for name in task_names] if last else []
