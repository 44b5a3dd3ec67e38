"""The books of a run: the best model, the state to resume from, config.json, metrics.csv and the learning curves."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import os
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dataset import files
from dataset.files import UserError, atomic_file, open_sealed, read_json, read_table, seal, write_json, write_text
from dataset.vocabulary import Catemapper
from layers import CriticNeg
from layers.session import ENCODERS, make_critic
from slmodels import MODELS, build
from train.metrics import Metrics

MAY_DIFFER = ("resume", "device", "epoch", "refill")  # settings that a run which goes on may change
FORMAT = 2  # of model files; 1 did not say which ids, features and widths a model has
BOTTOM_MLP_DIMS: tuple[int, ...] = (512, 256)  # the documented widths of all models and critics
TOWER_MLP_DIMS: tuple[int, ...] = (128, 64)


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


def model_metadata(data: Mapping[str, Any], model_name: str, task_num: int, embed_dim: int, expert_num: int,
                   bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], encoder: str = "none",
                   window: int = 0) -> dict[str, Any]:
    """What a model is, beside its weights: two with the same metadata can exchange these.

    data: `RetailRocketRLDataset.metadata`; of its tasks a model has the first `task_num`.
    """
    return {"format": FORMAT, **data, "tasks": list(data["tasks"])[:task_num], "model_name": model_name,
            "task_num": task_num, "embed_dim": embed_dim, "expert_num": expert_num,
            "bottom_mlp_dims": list(bottom_mlp_dims), "tower_mlp_dims": list(tower_mlp_dims), "encoder": encoder,
            "window": 0 if encoder == "none" else window}


def save_model(path: Path, model: nn.Module | Mapping[str, torch.Tensor], metadata: Mapping[str, Any],
               catemapper: Catemapper | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Write a model's weights, what it is, its vocabulary, and the settings that it was trained with."""
    weights = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    save_tensors(path, {"weights": {name: tensor.cpu() for name, tensor in weights.items()}, **metadata,
                        "catemapper": None if catemapper is None else catemapper.state_dict(),
                        "settings": None if settings is None else _as_plain(settings)})


def set_aside(path: Path, metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Keep a model file that was trained with other settings, or is of other metadata, under another name; say so."""
    if not path.exists() or not files.company.leads:
        return
    saved: Mapping[str, Any] = {}
    with contextlib.suppress(UserError):
        saved = load_tensors(path, "")
    if all(_is_same(saved.get(name), value) for name, value in {**metadata, "settings": _as_plain(settings)}.items()):
        return
    names = (f"{path.stem}.previous{number}{path.suffix}" for number in ("", *range(2, 10_000)))
    other = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.replace(path, other)
    print(f"{path}: the baseline that was there, of other settings, is kept as {other}")


def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a file that `SLmain.py` wrote, ready to predict: in eval mode, of the sizes that the file tells.

    Besides, it has `metadata`, what the file says of it (`model_metadata`), and `catemapper`, its vocabulary, which
    gives a data set the ids that it was trained with: `model.catemapper.map(split)`. Raises UserError.
    """
    path, hint = Path(path), "train it anew: python3 SLmain.py --model_name=NAME"
    saved = load_tensors(path, hint)
    model = model_of(saved, path, hint).to(device).eval()
    model.metadata = {name: value for name, value in saved.items()  # type: ignore[assignment]
                      if name not in ("weights", "catemapper", "settings")}
    mapping = saved.get("catemapper")
    model.catemapper = Catemapper.from_state_dict(mapping, path) if mapping else None  # type: ignore[assignment]
    return model


def model_of(saved: Mapping[str, Any], path: Path, hint: str, dropout: float = 0.2) -> nn.Module:
    """Build the model that a file's contents describe, with its weights. Raises UserError."""
    check_format(saved, path, hint)
    name, names = saved.get("model_name"), ("task_num", "expert_num", "window")
    if name not in MODELS or any(type(saved.get(key)) is not int or not 0 <= saved[key] <= 4096 for key in names):
        raise UserError(f"{path}: not a model that this version knows ({_short(name)}): {hint}")
    return _filled(lambda: build(str(name), *_sizes(saved, path, hint), saved["task_num"], saved["expert_num"], dropout,
                                 saved.get("encoder", "none"), saved["window"]), saved, path, hint)


def critic_of(saved: Mapping[str, Any], path: Path, hint: str) -> CriticNeg:
    """Build the critic that a file's contents describe, with its weights. Raises UserError."""
    check_format(saved, path, hint)
    encoder, window = saved.get("critic_encoder"), saved.get("critic_window")
    if encoder not in ENCODERS or type(window) is not int or not 0 <= window <= 4096:
        raise UserError(f"{path}: not a critic that this version knows ({_short(encoder)}): {hint}")
    return _filled(lambda: make_critic(str(encoder), window, *_sizes(saved, path, hint)), saved, path, hint)


def check_format(saved: Mapping[str, Any], path: Path, hint: str) -> None:
    """Raise UserError where a file is of an earlier version, which did not say all that matters."""
    if saved.get("format") != FORMAT:
        raise UserError(f"{path}: of an earlier version, which did not say which ids, features and widths it has: "
                        f"{hint}")


def check_metadata(saved: Mapping[str, Any], expected: Mapping[str, Any], path: Path, hint: str) -> None:
    """Raise UserError where a file says anything else of itself than `expected`; it ends in `hint`."""
    check_format(saved, path, hint)
    for name, value in expected.items():
        if not _is_same(saved.get(name), value):
            found = saved.get(name)
            what = DIFFERS.get(name, f"its {name} is {_short(found)}, not {_short(value)}")
            if name in FLAGS:
                fitting = [f"--{flag}={_typed(saved[flag])}" for flag in FLAGS
                           if flag in expected and flag in saved and not _is_same(saved[flag], expected[flag])]
                what += f" ({' '.join(fitting)} fits it)"
            raise UserError(f"{path}: {what}: {hint}")


def _typed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else _short(value)


FLAGS = ("embed_dim", "expert_num", "bottom_mlp_dims", "tower_mlp_dims", "encoder", "window", "numerical")
DIFFERS = {"features": "its features are computed in another way than this version does",
           "vocabulary": "its ids stand for other values (another --feature_map_rate, or other data)"}


def load_weights(path: Path, model: nn.Module, expected: Mapping[str, Any], hint: str) -> None:
    """Put the weights of a file into a model that is the same in everything `expected` names. Raises UserError."""
    saved = load_tensors(path, hint)
    check_metadata(saved, expected, path, hint)
    try:
        put_weights(model, saved["weights"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise _misfit(path, error, hint) from error


Network = TypeVar("Network", bound=nn.Module)


def _filled(make: Callable[[], Network], saved: Mapping[str, Any], path: Path, hint: str) -> Network:
    """Make a network and give it the weights of a file; shapes are compared first, without taking any memory."""
    try:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in make().state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in saved["weights"].items()}:
            raise ValueError("their shapes are those of other sizes")
        network = make()
        put_weights(network, saved["weights"])
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise _misfit(path, error, hint) from error
    return network


def _misfit(path: Path, error: Exception, hint: str) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(f"{path}: its weights do not fit the model ({reason}): {hint}")


def _sizes(saved: Mapping[str, Any], path: Path, hint: str) -> tuple[list[int], int, int, list[int], list[int]]:
    """field_dims, numerical_num, embed_dim, bottom_mlp_dims and tower_mlp_dims of a file. Raises UserError."""
    def is_size(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**31

    found = tuple(saved.get(name) for name in ("field_dims", "numerical_num", "embed_dim", "bottom_mlp_dims",
                                               "tower_mlp_dims"))
    for value in found:
        if not (is_size(value) or (isinstance(value, list) and 0 < len(value) <= 4096 and all(map(is_size, value)))):
            raise UserError(f"{path}: not a model that this version knows (a size of {_short(value)}): {hint}")
    return found  # type: ignore[return-value]


def _as_plain(value: Any) -> Any:
    """Tuples as the lists that files hold."""
    if isinstance(value, Mapping):
        return {name: _as_plain(one) for name, one in value.items()}
    return [_as_plain(one) for one in value] if isinstance(value, list | tuple) else value


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
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def weights_digest(*models: nn.Module) -> str:
    """A fingerprint of the weights of a model, or of several."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def get_optim_param(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state, in order of its parameters: what a checkpoint keeps of it."""
    return [tensor for state in optimizer.state_dict()["state"].values()
            for tensor in state.values() if isinstance(tensor, Tensor)]


def set_optim_param(optimizer: torch.optim.Adam, tensors: Sequence[Tensor]) -> None:
    """Put back what `get_optim_param` took from an Adam; an empty list is an Adam that made no step yet.

    Raises ValueError where it was an Adam of other parameters.
    """
    saved = optimizer.state_dict()
    names = ("step", "exp_avg", "exp_avg_sq")
    groups = [tensors[at:at + len(names)] for at in range(0, len(tensors), len(names))]
    shapes = [[(), p.shape, p.shape] for group in optimizer.param_groups for p in group["params"]]
    if groups and ([[tensor.shape for tensor in group] for group in groups] != shapes
                   or any(tensor.dtype != torch.float32 for tensor in tensors)):
        raise ValueError("an optimizer of other parameters")
    saved["state"] = {number: dict(zip(names, group, strict=True)) for number, group in enumerate(groups)}
    optimizer.load_state_dict(saved)


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
        self.last = folder / f"{name}_last.pt"  # of a polish run: the weights of its last epoch
        self.state = self.books / "state.pt"
        self.config = self.books / "config.json"
        self.metrics = self.books / "metrics.csv"
        self.test = self.books / "test.csv"  # of an agent's actor
        self.curves = self.books / "curves.png"
        self.weights = self.books / "weights.png"
        self.weights_table = self.books / "weights.csv"
        self.catemapper = self.books / "catemapper.json"
        self.files = [self.state, self.metrics, self.test, self.curves, self.weights, self.weights_table,
                      self.catemapper, self.model, self.last, self.config]

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
    that is as wrong as can be (`train.metrics.compute_metrics`)."""
    if figure == "auc" and cell == "nan":  # all labels of the split are the same
        return True
    try:
        value = float(cell) if cell.isascii() and "_" not in cell else -1.0
    except ValueError:
        return False
    return 0 <= value <= (1.0 if figure == "auc" else -math.log(1e-7) + 1e-3)
