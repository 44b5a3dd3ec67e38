"""The books of a run: the best model, the state to resume from, config.json, metrics.csv and the learning curves."""

from __future__ import annotations

import csv
import io
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset import files
from dataset.files import UserError, atomic_file, write_json, write_text
from train.Arguments import RLArguments, SLArguments

# What a model file says of the model besides its weights; a reader whose own differ refuses the file.
Identity = Mapping[str, Any]
MAY_DIFFER = ("resume", "device", "epoch", "refill")  # settings that a run which goes on may change


def save_tensors(path: Path, value: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts, lists and dictionaries of them, atomically; the same value, the same bytes."""
    with atomic_file(path) as partial, open(partial, "wb") as file:  # given a path, torch writes its name into the file
        try:
            torch.save(dict(value), file)
        except RuntimeError as error:  # torch hides behind it what the system said: that the disk is full, say
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_tensors(path: Path, remedy: str) -> dict[str, Any]:
    """Read what `save_tensors` wrote; nothing that is read can run code. Raises UserError, which ends in `remedy`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns about is refused below, in one line
            value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: {remedy}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a checkpoint that can be read ({reason[:90]}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a checkpoint of this program: {remedy}")
    return value


def save_model(path: Path, model: nn.Module | Mapping[str, torch.Tensor], identity: Identity) -> None:
    """Write a model's weights and what it is."""
    weights = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    save_tensors(path, {"weights": {name: tensor.cpu() for name, tensor in weights.items()}, **identity})


def load_model(path: Path, model: nn.Module, identity: Identity, remedy: str) -> None:
    """Put the weights of a file into a model that is the same in everything `identity` names. Raises UserError."""
    saved = load_tensors(path, remedy)
    for name, value in identity.items():
        if saved.get(name) != value:
            raise UserError(f"{path}: its {name} is {_short(saved.get(name))}, not {_short(value)}: {remedy}")
    try:
        model.load_state_dict(saved["weights"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: its weights do not fit the model ({reason}): {remedy}") from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def model_identity(model_name: str, settings: SLArguments | RLArguments, fingerprint: str,
                   field_dims: Sequence[int]) -> dict[str, Any]:
    """What a model is: two models of the same identity can exchange their weights."""
    return {"model_name": model_name, "data": fingerprint, "numerical": settings.numerical,
            "field_dims": list(field_dims), "task_num": settings.task_num, "embed_dim": settings.embed_dim,
            "expert_num": settings.expert_num}


class RunFolder:
    """Where a run writes: its books (config.json, metrics.csv, curves.png, state.pt) and, beside them or in the folder
    above, its best model `<name>.pt`.

    What lies there is of one run, whenever it was stopped: a run that starts anew sets aside all that an earlier one
    left, and one that goes on the metrics, which are written at the end only. So metrics.csv is what came of
    config.json, or not there.
    """

    def __init__(self, folder: Path, name: str, books: Path | None = None) -> None:
        self.folder, self.name, self.books = folder, name, books or folder
        self.model = folder / f"{name}.pt"
        self.state = self.books / "state.pt"
        self.config = self.books / "config.json"
        self.metrics = self.books / "metrics.csv"
        self.curves = self.books / "curves.png"
        self.weights = self.books / "weights.png"
        self.catemapper = self.books / "catemapper.json"
        self.files = [self.state, self.metrics, self.curves, self.weights, self.catemapper, self.model, self.config]

    @classmethod
    def of_model(cls, settings: SLArguments) -> RunFolder:
        """`<save_dir>/<dataset>_<model>/`, with `<dataset>_<model>_<lambda>.pt`; the books of a polish run lie in a
        folder of its name there. Another weighting than equal is part of the name."""
        name = f"{settings.dataset_name}_{settings.model_name}"
        if settings.weighting != "equal":
            name += f"_{settings.weighting}"
        folder, run = Path(settings.save_dir) / name, f"{name}_{settings.polish_lambda}"
        if settings.polish_lambda and settings.polish_method != "full":
            run += f"_{settings.polish_method}"
        return cls(folder, run, folder / run if settings.polish_lambda else None)

    @classmethod
    def of_agent(cls, save_dir: str, dataset_name: str, agent: str, actor_name: str) -> RunFolder:
        """`<save_dir>/res_<agent>_<actor>/`, for data sets other than rt `res_<agent>_<dataset>_<actor>/`."""
        middle = agent if dataset_name == "rt" else f"{agent}_{dataset_name}"
        name = f"res_{middle}_{actor_name}"
        return cls(Path(save_dir) / name, name)

    def open(self, settings: Mapping[str, Any], manifest: Mapping[str, Any], fingerprint: str,
             origin: Mapping[str, str], resume: bool) -> dict[str, Any] | None:
        """Begin: write config.json, and return the state to go on from, or None.

        Without `resume` what an earlier run left is set aside as `state.previous.pt`, `metrics.previous.csv` and so on.

        Args:
            settings: what was asked for.
            manifest, fingerprint: of the data.
            origin: digests of what the run starts from: `start`, the weights; of a polish run `critics`, too.
            resume: go on from `state.pt`. Raises UserError if it is of other settings, data or origin.
        """
        state = self._state_of(settings, fingerprint, origin) if resume else None
        if files.company.leads:
            for path in [self.metrics] if state is not None else self.files:
                if path.exists():
                    os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
        files.company.wait()
        write_json(self.config, {"command": files.own_command(), "settings": dict(settings),
                                 "torch": torch.__version__, "threads": torch.get_num_threads(), **origin,
                                 "data_fingerprint": fingerprint, "data": dict(manifest)})
        files.books_begun = True
        return state

    def _state_of(self, settings: Mapping[str, Any], fingerprint: str,
                  origin: Mapping[str, str]) -> dict[str, Any] | None:
        """The state of the run that was stopped; None where there is none."""
        if not self.state.exists():
            print(f"{self.books}: nothing to resume: starting from the first epoch")
            return None
        anew = "run without --resume to start anew"
        state = load_tensors(self.state, anew)
        if state.get("fingerprint") != fingerprint:
            raise UserError(f"{self.state}: that run was on other data: {anew}")
        saved = state.get("settings", {})
        other = [name for name, value in settings.items() if saved.get(name) != value and name not in MAY_DIFFER]
        if other:
            raise UserError(f"{self.state}: that run had --{other[0]}={saved.get(other[0])}, this one has "
                            f"{settings[other[0]]}: use the same settings, or {anew}")
        for name, digest in origin.items():
            if state.get("origin", {}).get(name) != digest:
                what = {"start": "another baseline", "critics": "other critics"}[name]
                raise UserError(f"{self.state}: that run began with {what}, trained anew since then: {anew}")
        return state

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the table of metrics, figures in full; columns are those of all rows, in order of appearance."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics, text.getvalue())
