"""Model files: they contain all that is needed to use them, so that a path is enough to predict."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from common import distributed
from common.checkpoint import (
    FORMAT,
    as_plain,
    check_format,
    load_state_dict_strict,
    load_tensors,
    misfit_error,
    save_tensors,
    strict_equal,
)
from common.errors import UserError, truncate
from dataset.vocabulary import Catemapper
from layers import CriticNeg
from layers.sequence import make_critic
from slmodels import BOTTOM_MLP_DIMS, ENCODERS, MODELS, TOWER_MLP_DIMS, build
from slmodels.predictor import Predictor

__all__ = ["BOTTOM_MLP_DIMS", "TOWER_MLP_DIMS", "load_model", "model_metadata", "save_model"]


def model_metadata(data: Mapping[str, Any], model_name: str, task_num: int, embed_dim: int, expert_num: int,
                   bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], encoder: str = "none",
                   window: int = 0) -> dict[str, Any]:
    """The metadata of a model: two models with the same metadata can exchange their weights.

    data: `RetailRocketRLDataset.metadata`.
    """
    return {"format": FORMAT, **data, "model_name": model_name,
            "task_num": task_num, "embed_dim": embed_dim, "expert_num": expert_num,
            "bottom_mlp_dims": list(bottom_mlp_dims), "tower_mlp_dims": list(tower_mlp_dims), "encoder": encoder,
            "window": 0 if encoder == "none" else window}


def save_model(path: Path, model: nn.Module | Mapping[str, torch.Tensor], metadata: Mapping[str, Any],
               catemapper: Catemapper | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Write a model's weights, metadata and vocabulary, and the settings that it was trained with; sharded tables as a
    whole."""
    weights = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    save_tensors(path, {"weights": {name: distributed.full_tensor(tensor).cpu() for name, tensor in weights.items()},
                        **metadata, "catemapper": None if catemapper is None else catemapper.state_dict(),
                        "settings": None if settings is None else as_plain(settings)})


def keep_previous(path: Path, metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Rename a model file that was trained with other settings, or has other metadata, to `*.previous*`; print it."""
    if not path.exists() or not distributed.is_main_process():
        return
    saved: Mapping[str, Any] = {}
    with contextlib.suppress(UserError):
        saved = load_tensors(path, "")
    expected = {**metadata, "settings": as_plain(settings)}
    if all(strict_equal(saved.get(name), value) for name, value in expected.items()):
        return
    names = (f"{path.stem}.previous{number}{path.suffix}" for number in ("", *range(2, 10_000)))
    other = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.replace(path, other)
    print(f"{path}: the existing baseline, of other settings, is kept as {other}")


def load_model(path: str | Path, device: torch.device | str = "cpu", dataset: str | Path | None = None) -> nn.Module:
    """The model of a file that `SLmain.py` wrote, ready to predict: in eval mode, of the sizes in the file.

    Besides, it has `metadata`, the metadata of the file (`model_metadata`); `catemapper`, its vocabulary, which gives a
    data set the ids that it was trained with: `model.catemapper.map(split)`; and `predict` and `encode`, which score
    the rows of a table, or give what the model reads of them (`slmodels.predictor.Predictor`). Raises UserError.

    dataset: the folder of the data set whose rows are the history of those to score, or the one above it; default: that
        of the training, in `dataset/`. It is read at the first `predict`.
    """
    path, hint = Path(path), "train it anew: python3 SLmain.py --model_name=NAME"
    saved = load_tensors(path, hint)
    model = model_from_file(saved, path, hint).to(device).eval()
    model.metadata = {name: value for name, value in saved.items()  # type: ignore[assignment]
                      if name not in ("weights", "catemapper", "settings")}
    mapping = saved.get("catemapper")
    model.catemapper = Catemapper.from_state_dict(mapping, path) if mapping else None  # type: ignore[assignment]
    predictor = Predictor(model, path, dataset or "dataset")
    model.predict, model.encode = predictor.predict, predictor.encode  # type: ignore[assignment]
    return model


def model_from_file(saved: Mapping[str, Any], path: Path, hint: str, dropout: float = 0.2) -> nn.Module:
    """Build the model that a file's contents describe, with its weights. Raises UserError."""
    check_format(saved, path, hint)
    name, names = saved.get("model_name"), ("task_num", "expert_num", "window")
    if name not in MODELS or any(type(saved.get(key)) is not int or not 0 <= saved[key] <= 4096 for key in names):
        raise UserError(f"{path}: not a model of this version ({truncate(name)}): {hint}")
    return _filled(lambda: build(str(name), *_sizes(saved, path, hint), saved["task_num"], saved["expert_num"], dropout,
                                 saved.get("encoder", "none"), saved["window"], given=saved.get("given")), saved, path,
                   hint)


def critic_from_file(saved: Mapping[str, Any], path: Path, hint: str) -> CriticNeg:
    """Build the critic that a file's contents describe, with its weights. Raises UserError."""
    check_format(saved, path, hint)
    encoder, window = saved.get("critic_encoder"), saved.get("critic_window")
    if encoder not in ENCODERS or type(window) is not int or not 0 <= window <= 4096:
        raise UserError(f"{path}: not a critic of this version ({truncate(encoder)}): {hint}")
    return _filled(lambda: make_critic(str(encoder), window, *_sizes(saved, path, hint)), saved, path, hint)


Network = TypeVar("Network", bound=nn.Module)


def _filled(make: Callable[[], Network], saved: Mapping[str, Any], path: Path, hint: str) -> Network:
    """Make a network and give it the weights of a file; shapes are compared first, without taking any memory."""
    try:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in make().state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in saved["weights"].items()}:
            raise ValueError("their shapes are those of other sizes")
        network = make()
        load_state_dict_strict(network, saved["weights"])
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise misfit_error(path, error, hint) from error
    return network


def _sizes(saved: Mapping[str, Any], path: Path, hint: str) -> tuple[list[int], int, int, list[int], list[int]]:
    """field_dims, numerical_num, embed_dim, bottom_mlp_dims and tower_mlp_dims of a file. Raises UserError."""
    def is_size(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**31

    found = tuple(saved.get(name) for name in ("field_dims", "numerical_num", "embed_dim", "bottom_mlp_dims",
                                               "tower_mlp_dims"))
    for value in found:
        if not (is_size(value) or (isinstance(value, list) and 0 < len(value) <= 4096 and all(map(is_size, value)))):
            raise UserError(f"{path}: not a model of this version (a size of {truncate(value)}): {hint}")
    return found  # type: ignore[return-value]
