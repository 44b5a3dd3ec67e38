"""Checkpoints: files of tensors with metadata, which are refused where they do not fit.

A checkpoint holds tensors and metadata. `torch.load(path, weights_only=True)` reads it, too.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.errors import UserError, truncate
from common.fileio import append_checksum, atomic_file, open_verified

FORMAT = 3  # of model files; 1 was without ids, features and widths, 2 without the means of the numbers


def save_tensors(path: Path, value: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts, lists and dictionaries of them, atomically and with their checksum; the same
    value, the same bytes."""
    with atomic_file(path) as partial:
        with open(partial, "wb") as file:  # given a path, torch writes its name into the file
            try:
                torch.save(dict(value), file)
            except RuntimeError as error:  # torch raises it for an error of the system, such as a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        append_checksum(partial)


def load_tensors(path: Path, hint: str) -> dict[str, Any]:
    """Read what `save_tensors` wrote, byte for byte; nothing that is read can run code, nor take more memory than the
    file has bytes. Raises UserError, which ends in `hint`."""
    with open_verified(path, hint) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns about is refused below, in one line
        try:
            value = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a forged file may raise anything in torch
            reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a checkpoint that can be read ({reason[:90]}): {hint}") from error
    if not isinstance(value, dict) or not _is_safe_payload(value):
        raise UserError(f"{path}: not a checkpoint of this program: {hint}")
    return value


def _is_safe_payload(value: Any) -> bool:
    """Whether a value is made of texts, numbers, lists, dictionaries and dense tensors of finite numbers alone."""
    waiting, visited = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            if (item.layout != torch.strided or item.is_quantized or item.device.type != "cpu"
                    or item.numel() * item.element_size() > item.untyped_storage().nbytes()  # a broadcast view
                    or not torch.isfinite(item).all()):
                return False
        elif isinstance(item, dict | list | tuple):
            if id(item) not in visited:  # a list may contain itself
                visited.add(id(item))
                waiting += [*item, *item.values()] if isinstance(item, dict) else item
        elif not (item is None or isinstance(item, str | int | float)):
            return False
    return True


def check_format(saved: Mapping[str, Any], path: Path, hint: str) -> None:
    """Raise UserError where a file is of an earlier version, without all metadata."""
    if saved.get("format") != FORMAT:
        raise UserError(f"{path}: of an earlier version, without its ids, features and widths: "
                        f"{hint}")


def check_metadata(saved: Mapping[str, Any], expected: Mapping[str, Any], path: Path, hint: str) -> None:
    """Raise UserError, which ends in `hint`, where the metadata of a file differ from `expected`."""
    check_format(saved, path, hint)
    for name, value in expected.items():
        if not strict_equal(saved.get(name), value):
            found = saved.get(name)
            values = truncate(found), truncate(value)
            what = DIFFERS.get(name, f"its {name} is {values[0]}, not {values[1]}" if values[0] != values[1] else
                               f"its {name} differs (another --feature_map_rate, or data)")
            if name in FLAGS:
                fitting = [f"--{flag}={_typed(saved[flag])}" for flag in FLAGS
                           if flag in expected and flag in saved and not strict_equal(saved[flag], expected[flag])]
                what += f" ({' '.join(fitting)} fits it)"
            raise UserError(f"{path}: {what}: {hint}")


def _typed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else truncate(value)


FLAGS = ("embed_dim", "expert_num", "bottom_mlp_dims", "tower_mlp_dims", "encoder", "window", "numerical")
DIFFERS = {"features": "its features are computed in another way than this version does",
           "vocabulary": "its vocabulary differs: its ids are of other values (another --feature_map_rate, or data)"}


def load_weights(path: Path, model: nn.Module, expected: Mapping[str, Any], hint: str) -> None:
    """Put the weights of a file into a model that is the same in everything `expected` names. Raises UserError."""
    saved = load_tensors(path, hint)
    check_metadata(saved, expected, path, hint)
    try:
        load_state_dict_strict(model, saved["weights"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise misfit_error(path, error, hint) from error


def misfit_error(path: Path, error: Exception, hint: str) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(f"{path}: its weights do not fit the model ({reason}): {hint}")


def as_plain(value: Any) -> Any:
    """Tuples as the lists that files hold."""
    if isinstance(value, Mapping):
        return {name: as_plain(item) for name, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, list | tuple) else value


def load_state_dict_strict(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model weights of its own names, shapes and types. Raises RuntimeError or TypeError where they are others.
    """
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and tensor.dtype != own[name].dtype:  # torch would round
            raise TypeError(f"{name} is {tensor.dtype}, not {own[name].dtype}")
    model.load_state_dict(weights)


def strict_equal(item: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: a tensor of a 1 is no 1."""
    if isinstance(item, list) and isinstance(other, list):
        return len(item) == len(other) and all(map(strict_equal, item, other))
    if isinstance(item, dict) and isinstance(other, dict):
        return item.keys() == other.keys() and all(strict_equal(item[name], other[name]) for name in item)
    return type(item) is type(other) and bool(item == other)


def state_dict_hash(*models: nn.Module) -> str:
    """A fingerprint of the weights of a model, or of several."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + distributed.full_tensor(tensor).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def get_optim_param(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state, in order of its parameters: what a checkpoint keeps of it."""
    return [tensor for state in optimizer.state_dict()["state"].values()
            for tensor in state.values() if isinstance(tensor, Tensor)]


def load_optimizer_state(optimizer: torch.optim.Adam, saved: Mapping[str, Any]) -> None:
    """Restore the moments of an `optimizer.state_dict()`; the optimizer's own settings stay. Raises ValueError where
    they are those of other parameters."""
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
    for parameter, moments in optimizer.state.items():
        shapes = {name: tensor.shape for name, tensor in moments.items()}
        if (not isinstance(parameter, Tensor) or len(optimizer.state) != sum(len(g["params"]) for g in
                                                                              optimizer.param_groups)
                or shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}):
            raise ValueError("an optimizer of other parameters")
