"""Tools of the loops: the mapping of values to ids, stoppers, seeds, devices and metrics."""

from __future__ import annotations

import ctypes
import hashlib
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from dataset.files import UserError, read_json, write_json
from dataset.rtrl import RetailRocketRLDataset, Splits
from layers.session import window_of
from train import world


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
        """Give the data set its ids (n, F). Raises UserError where it lacks a field of the mapping."""
        strange = [name for name in self.ids if name not in dataset.fields]
        if strange:
            raise UserError(f"category mapping: field '{strange[0]}' is not one of {', '.join(dataset.fields)}")
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
        threshold = saved.get("threshold")
        if (not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold <= 1
                or not isinstance(fields, dict) or not fields):
            raise UserError(f"{path}: not a category mapping: 'threshold' from 0 to 1, and 'ids'")
        for name, values in fields.items():
            if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
                raise UserError(f"{path}: '{name:.60}' of 'ids' is not a list of values, texts that are not empty")
            if len(set(values)) < len(values):
                raise UserError(f"{path}: '{name:.60}' of 'ids' has a value twice: it would have two ids")
        mapper = cls(float(threshold))
        mapper.ids = {name: {value: number for number, value in enumerate(values, start=1)}
                      for name, values in fields.items()}
        return mapper


def map_splits(splits: Splits, threshold: float) -> Catemapper:
    """Fit a mapping on the training split, and give all three splits their ids."""
    catemapper = Catemapper(threshold).fit(splits.train, splits.long_tailed)
    for split in (splits.train, splits.val, splits.test):
        catemapper.map(split)
    return catemapper


def weights_digest(*models: nn.Module) -> str:
    """A fingerprint of the weights of a model, or of several."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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
        restore(self, state)


class ConvergeStopper:
    """Stop when the loss has changed by less than a share `tolerance` for `num_trials` epochs in a row: converged."""

    def __init__(self, num_trials: int, tolerance: float) -> None:
        self.num_trials, self.tolerance = num_trials, tolerance
        self.trial_counter, self.last, self.change = 0, float("inf"), float("inf")

    def is_continuable(self, loss: float) -> bool:
        """Take the loss of an epoch; return whether to go on."""
        self.change = abs(loss - self.last) / max(abs(self.last), 1e-12) if np.isfinite(self.last) else float("inf")
        self.trial_counter = self.trial_counter + 1 if self.change < self.tolerance else 0
        self.last = loss
        return self.trial_counter < self.num_trials


def restore(stopper: EarlyStopper | ConvergeStopper, state: Mapping[str, Any]) -> None:
    """Give a stopper its attributes back. Raises ValueError where they are others, or of other types."""
    def kind(value: Any) -> type:
        return float if isinstance(value, float) else type(value)  # numpy's floats are floats

    own = vars(stopper)
    if {name: kind(value) for name, value in own.items()} != {name: kind(value) for name, value in state.items()}:
        raise ValueError("not the state of a stopper")
    own.update(state)


class ActionNormalizer(gym.wrappers.RescaleAction[Any, Any, Any]):
    """An environment for agents that act in [-1, 1]: action a becomes 0.5 a + 0.5, once.

    The environment reports the action that it rewarded in `info["action"]`; that one belongs into a replay memory.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env, np.float32(-1), np.float32(1))


class RlLossPolisher:
    """Weights of the supervised loss from the critics: w_k = 1 - lambda Q_k(s, a_k), (B, T), detached.

    Critics and model answer in eval mode, row by row: the weight of a sample depends on the sample, the critics and
    the model's present parameters, and on nothing else in the batch, nor on dropout.

    Args:
        model: the model that is polished; a_k is its prediction.
        critics: one a task; none are needed for `constant`.
        polish_lambda: lambda.
        method: `full` 1 - lambda Q; `label` 1 - lambda y Q; `critic` -Q; `inverse` 1 / (1 - lambda Q); `contrast`
            exp(-lambda (Q - mean Q) / std Q), over the batch, so that lambda says how far the weights spread;
            `constant` 1; `shuffled` and `contrast_shuffled`: those of `full` and `contrast`, permuted over the samples
            of the batch (a control: the same weights on the wrong samples).
        normalise: divide a task's weights by their mean over the batch, so that they change which samples count, not
            how large the step is. This and `contrast` are the exceptions to "nothing else in the batch".
    """

    METHODS = ("full", "label", "constant", "critic", "inverse", "contrast", "shuffled", "contrast_shuffled")

    def __init__(self, model: nn.Module, critics: Sequence[nn.Module], polish_lambda: float,
                 method: str = "full", normalise: bool = False) -> None:
        if method not in self.METHODS:
            raise ValueError(f"unknown method '{method}': one of {', '.join(self.METHODS)}")
        self.model, self.polish_lambda, self.method, self.normalise = model, polish_lambda, method, normalise
        self.critics = [critic.eval().requires_grad_(False) for critic in critics]
        self.window = max([0, *map(window_of, self.critics)])  # of the batches that are to be weighted
        self.digest = weights_digest(*critics)
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        """The weights (B, T) of a batch of ids (B, F), numbers (B, N) and labels (B, T); of windows, where one sees
        the session."""
        if self.method == "constant":
            w = torch.ones_like(labels)
        else:
            was_training = self.model.training
            action = self.model.eval()(categorical_x, numerical_x)
            self.model.train(was_training)
            q = torch.stack([critic(categorical_x, numerical_x, action[:, task:task + 1])
                             for task, critic in enumerate(self.critics)], dim=1)  # (B, T)
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
        self.seen.append(w)
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


def set_seed(seed: int, *more: int) -> None:
    """Seed python, numpy and torch with a function of the numbers given, such as (seed, epoch)."""
    mixed = int(np.random.SeedSequence([seed, *more]).generate_state(1, np.uint64)[0])
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 -- for code of others that draws from the global one
    torch.manual_seed(mixed % 2**63)


def pick_device(name: str, precision: str = "float32") -> torch.device:
    """Give the device of that name; `auto` is the best there is. Raises UserError where it cannot be used.

    precision: of matrix products from now on (`tf32`, `bf16`: rounded factors, sums in float32).
    """
    torch.set_float32_matmul_precision({"float32": "highest", "tf32": "high", "bf16": "medium"}[precision])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: '{name}' cannot be used here: {reason} (try --device=cpu)") from error
    if device.type == "cpu":
        _keep_freed_memory()
    return world.join(device)


def _keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks at once instead of returning them to the system.

    Training frees and allocates the same activations every step; fetching their pages anew each time costs up to half
    of it. Other C libraries have no such switch, and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 2**30)
