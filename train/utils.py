"""Tools of the loops: the mapping of values to ids, stoppers, seeds, devices and metrics."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from dataset.files import UserError, read_json, write_json
from dataset.rtrl import RetailRocketRLDataset


class Catemapper:
    """Values of categorical fields to ids: per field 0 = unseen, missing or rare, then 1, 2, ... by frequency.

    Args:
        threshold: long-tailed fields keep their most frequent values until these cover this share of the rows that
            have one; all other values become id 0, so that the embedding does not explode.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.ids: dict[str, dict[str, int]] = {}  # field -> value -> id

    @property
    def field_dims(self) -> list[int]:
        """The number of ids of each field, id 0 included."""
        return [len(values) + 1 for values in self.ids.values()]

    def fit(self, dataset: RetailRocketRLDataset, long_tailed: Sequence[str] = ()) -> Catemapper:
        """Learn the values of a data set, the training split; ties in frequency are broken by the value."""
        for name, column in dataset.fields.items():
            counts = np.bincount(column.codes[column.codes >= 0], minlength=len(column.values))
            order = sorted(np.flatnonzero(counts), key=lambda code: (-counts[code], column.values[code]))
            if name in long_tailed and order:
                share = np.cumsum(counts[order]) / counts.sum()
                order = order[: int(np.searchsorted(share, self.threshold - 1e-12)) + 1] if self.threshold else []
            self.ids[name] = {str(column.values[code]): number for number, code in enumerate(order, start=1)}
        return self

    def map(self, dataset: RetailRocketRLDataset) -> RetailRocketRLDataset:
        """Give the data set its ids (n, F)."""
        columns = []
        for name, ids in self.ids.items():
            column = dataset.fields[name]
            lookup = np.array([*(ids.get(str(value), 0) for value in column.values), 0], np.int64)  # [-1]: missing
            columns.append(lookup[column.codes])
        dataset.set_ids(np.column_stack(columns), self.field_dims)
        return dataset

    def save(self, path: Path) -> None:
        """Write JSON."""
        write_json(path, {"threshold": self.threshold, "ids": {name: list(ids) for name, ids in self.ids.items()}})

    @classmethod
    def load(cls, path: Path) -> Catemapper:
        """Read what `save` wrote. Raises UserError."""
        saved = read_json(path)
        fields = saved.get("ids")
        if not isinstance(saved.get("threshold"), int | float) or not isinstance(fields, dict) or not all(
                isinstance(values, list) and len({str(value) for value in values}) == len(values)
                for values in fields.values()):
            raise UserError(f"{path}: not a category mapping: 'threshold' and, per field in 'ids', a list of values")
        mapper = cls(float(saved["threshold"]))
        mapper.ids = {name: {str(value): number for number, value in enumerate(values, start=1)}
                      for name, values in fields.items()}
        return mapper


class EarlyStopper:
    """Stop when the validation score has not risen for `num_trials` epochs in a row; keep the best weights.

    The best score starts below every score, so that the first one offered, be it a warm start's own, is the one to
    beat.
    """

    def __init__(self, num_trials: int) -> None:
        self.num_trials, self.trial_counter = num_trials, 0
        self.best_accuracy, self.best_epoch = -np.inf, -1
        self.best_state: dict[str, Tensor] = {}

    def is_continuable(self, model: nn.Module, accuracy: float, epoch: int) -> bool:
        """Take the score of an epoch; return whether to go on."""
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_epoch, self.trial_counter = accuracy, epoch, 0
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        else:
            self.trial_counter += 1
        return self.trial_counter < self.num_trials

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Metrics(NamedTuple):
    """One task's figures on one split."""

    auc: float  # nan where the split has one class only
    logloss: float
    session_logloss: float  # s-Logloss: mean over sessions of the mean logloss inside the session


def measure(predictions: NDArray[np.floating[Any]], labels: NDArray[np.float32], session: NDArray[np.int64]) -> Metrics:
    """Compare one task's predictions (n,) with labels (n,); rows of a session are neighbours."""
    p = np.clip(predictions.astype(np.float64), 1e-7, 1 - 1e-7)
    losses = -np.where(labels > 0, np.log(p), np.log1p(-p))
    starts = np.flatnonzero(np.append(True, session[1:] != session[:-1]))
    by_session = np.add.reduceat(losses, starts) / np.diff(np.append(starts, len(session)))
    auc = roc_auc_score(labels, predictions) if 0 < labels.sum() < len(labels) else float("nan")
    return Metrics(float(auc), float(losses.mean()), float(by_session.mean()))


def get_optim_param(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's state, in order of its parameters: what a checkpoint keeps of it."""
    return [tensor for state in optimizer.state_dict()["state"].values()
            for tensor in state.values() if isinstance(tensor, Tensor)]


def set_optim_param(optimizer: torch.optim.Adam, tensors: Sequence[Tensor]) -> None:
    """Put back what `get_optim_param` took from an Adam; an empty list is an Adam that made no step yet."""
    saved = optimizer.state_dict()
    names = ("step", "exp_avg", "exp_avg_sq")
    groups = [tensors[at:at + len(names)] for at in range(0, len(tensors), len(names))]
    saved["state"] = {number: dict(zip(names, group, strict=True)) for number, group in enumerate(groups)}
    optimizer.load_state_dict(saved)


def set_seed(seed: int, *more: int) -> None:
    """Seed python, numpy and torch with a function of the numbers given, such as (seed, epoch)."""
    mixed = int(np.random.SeedSequence([seed, *more]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 -- for code of others that draws from the global one
    torch.manual_seed(mixed % 2**63)


def pick_device(name: str) -> torch.device:
    """Give the device of that name; `auto` is the best there is. Raises UserError where it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: '{name}' cannot be used here: {reason} (try --device=cpu)") from error
    return device
