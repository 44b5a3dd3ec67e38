"""The books of a run: the best model, the state to resume from, config.json, metrics.csv and the learning curves."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset import files
from dataset.files import UserError, atomic_file, open_sealed, read_json, read_table, seal, write_json, write_text
from train.Arguments import RLArguments, SLArguments, named
from train.utils import Metrics

# What a model file says of the model besides its weights; a reader whose own differ refuses the file.
Identity = Mapping[str, Any]
MAY_DIFFER = ("resume", "device", "epoch", "refill")  # settings that a run which goes on may change


def save_tensors(path: Path, value: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts, lists and dictionaries of them, atomically and with their checksum; the same
    value, the same bytes."""
    with atomic_file(path) as partial:
        with open(partial, "wb") as file:  # given a path, torch writes its name into the file
            try:
                torch.save(dict(value), file)
            except RuntimeError as error:  # torch hides behind it what the system said: that the disk is full, say
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        seal(partial)


def load_tensors(path: Path, remedy: str) -> dict[str, Any]:
    """Read what `save_tensors` wrote, byte for byte; nothing that is read can run code, nor take more memory than the
    file has bytes. Raises UserError, which ends in `remedy`."""
    with open_sealed(path, remedy) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns about is refused below, in one line
        try:
            value = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file that was made to mislead leads torch to
            reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a checkpoint that can be read ({reason[:90]}): {remedy}") from error
    if not isinstance(value, dict) or not _is_plain(value):
        raise UserError(f"{path}: not a checkpoint of this program: {remedy}")
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is made of texts, numbers, lists, dictionaries and dense tensors of finite numbers alone."""
    waiting, met = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            if (one.layout != torch.strided or one.is_quantized or one.device.type != "cpu"
                    or one.numel() * one.element_size() > one.untyped_storage().nbytes()  # one number as many
                    or not torch.isfinite(one).all()):
                return False
        elif isinstance(one, dict | list | tuple):
            if id(one) not in met:  # a list that holds itself has no end
                met.add(id(one))
                waiting += [*one, *one.values()] if isinstance(one, dict) else one
        elif not (one is None or isinstance(one, str | int | float)):
            return False
    return True


def save_model(path: Path, model: nn.Module | Mapping[str, torch.Tensor], identity: Identity) -> None:
    """Write a model's weights and what it is."""
    weights = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    save_tensors(path, {"weights": {name: tensor.cpu() for name, tensor in weights.items()}, **identity})


def load_model(path: Path, model: nn.Module, identity: Identity, remedy: str) -> None:
    """Put the weights of a file into a model that is the same in everything `identity` names. Raises UserError."""
    saved = load_tensors(path, remedy)
    for name, value in identity.items():
        if not _is_same(saved.get(name), value):
            raise UserError(f"{path}: its {name} is {_short(saved.get(name))}, not {_short(value)}: {remedy}")
    try:
        put_weights(model, saved["weights"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: its weights do not fit the model ({reason}): {remedy}") from error


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model weights of its own names, shapes and types. Raises RuntimeError or TypeError where they are others.
    """
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and tensor.dtype != own[name].dtype:  # torch would round
            raise TypeError(f"{name} is {tensor.dtype}, not {own[name].dtype}")
    model.load_state_dict(weights)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: a tensor of a 1 is no 1."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def model_identity(model_name: str, settings: SLArguments | RLArguments, fingerprint: str,
                   field_dims: Sequence[int]) -> dict[str, Any]:
    """What a model is: two models of the same identity can exchange their weights."""
    return {"model_name": model_name, "data": fingerprint, "numerical": settings.numerical,
            "field_dims": list(field_dims), "task_num": settings.task_num, "embed_dim": settings.embed_dim,
            "expert_num": settings.expert_num, **sight(settings.encoder, settings.window)}


def sight(encoder: str, window: int, whose: str = "") -> dict[str, Any]:
    """What of the session a network sees, for its identity; one without an encoder says nothing of it."""
    return {} if encoder == "none" else {f"{whose}encoder": encoder, f"{whose}window": window}


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
        self.test = self.books / "test.csv"  # of an agent's actor
        self.curves = self.books / "curves.png"
        self.weights = self.books / "weights.png"
        self.weights_table = self.books / "weights.csv"
        self.catemapper = self.books / "catemapper.json"
        self.files = [self.state, self.metrics, self.test, self.curves, self.weights, self.weights_table,
                      self.catemapper, self.model, self.config]

    @classmethod
    def of_model(cls, settings: SLArguments) -> RunFolder:
        """`<save_dir>/<dataset>_<model>/`, with `<dataset>_<model>_<lambda>.pt`; the books of a polish run lie in a
        folder of its name there. Another weighting than equal, an encoder, and critics of another one are part of the
        name."""
        name = f"{settings.dataset_name}_{named(settings.model_name, settings.encoder)}"
        if settings.weighting != "equal":
            name += f"_{settings.weighting}"
        folder, run = Path(settings.save_dir) / name, f"{name}_{settings.polish_lambda}"
        if settings.polish_lambda:
            run += "".join(f"_{what}" for what, said in (
                (settings.polish_method, settings.polish_method != "full"),
                ("normalised", settings.polish_normalise), ("scratch", settings.polish_start == "scratch")) if said)
            if settings.polish_method != "constant" and settings.critics_see != settings.encoder:
                run += f"_critic_{settings.critics_see}"
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
            left = [path for path in ([self.metrics, self.test] if state else self.files) if path.exists()]
            for path in left:
                os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
            if self.state in left:
                print(f"{self.books}: an earlier run is set aside, as *.previous.* (--resume goes on with one of the "
                      "same settings)\n")
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
        saved = state.get("settings")
        saved = saved if isinstance(saved, dict) else {}
        other = [name for name, value in settings.items()
                 if not _is_same(saved.get(name), value) and name not in MAY_DIFFER]
        if other:
            raise UserError(f"{self.state}: that run had --{other[0]}={_short(saved.get(other[0]))}, this one has "
                            f"{settings[other[0]]}: use the same settings, or {anew}")
        epoch, going, rows = (state.get(name) for name in ("epoch", "going", "metrics"))
        if type(epoch) is not int or not isinstance(going, bool) or not isinstance(rows, list) or not rows or not all(
                isinstance(row, dict) and "epoch" in row for row in rows):
            raise UserError(f"{self.state}: not the state of a run: {anew}")
        began = state.get("origin")
        for name, digest in origin.items():
            if not isinstance(began, dict) or began.get(name) != digest:
                what = {"start": "another baseline", "critics": "other critics"}[name]
                raise UserError(f"{self.state}: that run began with {what}, trained anew since then: {anew}")
        return state

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """While a run takes up the state that `open` gave. Raises UserError where that is the state of something else.
        """
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{self.state}: not the state of such a run ({reason}): run without --resume to start "
                            "anew") from error

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the table of metrics, figures in full."""
        write_rows(self.metrics, rows)

    def read_config(self) -> dict[str, Any]:
        """Read what `write_config` wrote. Raises UserError."""
        config = read_json(self.config)
        if not isinstance(config.get("settings"), dict) or not isinstance(config.get("start"), str):
            raise UserError(f"{self.config}: not the config of a run: 'settings' or 'start' is missing")
        return config

    def read_test(self, tasks: Sequence[str]) -> list[dict[str, float]]:
        """The test figures of each task, as `write_metrics` wrote them; none where the run has not come so far.

        Raises UserError naming line and column where a figure is none, or cannot be.
        """
        columns = {f"{figure}_{task}": figure for task in tasks for figure in Metrics._fields}
        table = read_table(self.metrics, {"split": "text", **dict.fromkeys(columns, "optional_text")})
        rows = [number for number, split in enumerate(table["split"]) if split == "test"]
        if not rows:
            return []
        if len(rows) > 1:
            raise UserError(f"{self.metrics}, line {rows[1] + 2}, column 'split': a second row of test figures")
        for column, figure in columns.items():
            cell = table[column][rows[0]]
            if not _is_figure(cell, figure):
                raise UserError(f"{self.metrics}, line {rows[0] + 2}, column '{column}': '{_short(cell)}' is no "
                                f"{figure.replace('_', ' ')}")
        row = table.loc[rows[0]]
        return [{figure: float(row[f"{figure}_{task}"]) for figure in Metrics._fields} for task in tasks]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file; its columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read what `write_rows` wrote, at least these columns, cells as they stand. Raises UserError."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from error
    lost = [name for name in columns if name not in header]
    if lost:
        raise UserError(f"{path}, line 1: column '{lost[0]}' is missing")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} cells, but the header has {len(header)}: is the file "
                            "cut short?")
    return [dict(zip(header, line, strict=True)) for line in lines]


def _is_figure(cell: str, figure: str) -> bool:
    """Whether a cell of metrics.csv can be that figure: an AUC from 0 to 1, a logloss from 0 to that of a prediction
    that is as wrong as can be (`train.utils.measure`)."""
    if figure == "auc" and cell == "nan":  # all labels of the split are the same
        return True
    try:
        value = float(cell) if cell.isascii() and "_" not in cell else -1.0
    except ValueError:
        return False
    return 0 <= value <= (1.0 if figure == "auc" else -math.log(1e-7) + 1e-3)
