"""The vocabulary: maps values of categorical fields to ids, fitted on the training split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.fileio import read_json, write_json
from dataset.arrays import MappedColumn, MappedIds
from dataset.features import Ids
from dataset.rtrl import RetailRocketRLDataset, Splits

MANY_VALUES = 100  # a field with more is long-tailed, if the data set has no list of long-tailed fields


class Catemapper:
    """Maps values of categorical fields to ids: per field 0 = unknown, missing or rare, then 1, 2, ... by frequency.

    Args:
        threshold: a long-tailed field keeps its most frequent values, as many as cover this fraction of the rows with
            a value; all others are mapped to id 0, which bounds the size of the embedding.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"category mapping: the threshold is a fraction of the rows, from 0 to 1, not {threshold}")
        self.threshold = threshold
        self.ids: dict[str, dict[str, int]] = {}  # field -> value -> id

    @property
    def field_dims(self) -> list[int]:
        """The number of ids of each field, id 0 included."""
        return [len(values) + 1 for values in self.ids.values()]

    @property
    def digest(self) -> str:
        """A hash of the mapping: equal digests, equal ids."""
        values = json.dumps({name: list(ids) for name, ids in self.ids.items()})
        return hashlib.sha256(values.encode()).hexdigest()[:16]

    def fit(self, dataset: RetailRocketRLDataset, long_tailed: Sequence[str] | None = None) -> Catemapper:
        """Fit the vocabulary to a data set, the training split; ties in frequency are broken by the value.

        long_tailed: the fields that the threshold applies to; default: those of the data set's manifest, or without a
        manifest those with more than `MANY_VALUES` values.
        """
        if long_tailed is None:
            long_tailed = dataset.long_tailed
        if long_tailed is None:
            long_tailed = [name for name, column in dataset.fields.items() if len(column) > MANY_VALUES]
        self.ids = {}
        for name, column in dataset.fields.items():
            frequencies = column.frequencies
            kept = len(frequencies)
            if name in long_tailed and kept:
                coverage = np.cumsum(frequencies) / frequencies.sum()
                kept = int(np.searchsorted(coverage, self.threshold - 1e-12)) + 1 if self.threshold else 0
            self.ids[name] = {value: number for number, value in enumerate(column.most_frequent(kept), start=1)}
        return self

    def map(self, dataset: RetailRocketRLDataset) -> RetailRocketRLDataset:
        """Set the ids (n, F) of the data set. Raises UserError if a field of the mapping is missing from it."""
        missing = [name for name in self.ids if name not in dataset.fields]
        if missing:
            raise UserError(f"category mapping: field '{missing[0]}' is not one of {', '.join(dataset.fields)}")
        columns = [dataset.fields[name] for name in self.ids]
        mapped = [column for column in columns if isinstance(column, MappedColumn)]
        categorical: Ids | MappedIds = MappedIds(mapped, [*self.ids.values()]) if mapped else np.column_stack(
            [column.lookup(ids)[column.codes] for column, ids in zip(columns, self.ids.values(), strict=True)])
        dataset.set_ids(categorical, self.field_dims, self.digest)
        return dataset

    def state_dict(self) -> dict[str, Any]:
        """The threshold, and the values of each field in order of their ids."""
        return {"threshold": self.threshold, "ids": {name: list(ids) for name, ids in self.ids.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], path: str | Path) -> Catemapper:
        """The mapping of a `state_dict` that was read from `path`. Raises UserError if it is invalid."""
        fields, threshold = state.get("ids"), state.get("threshold")
        if (not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold <= 1
                or not isinstance(fields, dict) or not fields):
            raise UserError(f"{path}: not a category mapping: 'threshold' from 0 to 1, and 'ids'")
        for name, values in fields.items():
            if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
                raise UserError(f"{path}: '{name:.60}' of 'ids' is not a list of non-empty texts")
            if len(set(values)) < len(values):
                raise UserError(f"{path}: '{name:.60}' of 'ids' contains a duplicate value")
        mapper = cls(float(threshold))
        mapper.ids = {name: {value: number for number, value in enumerate(values, start=1)}
                      for name, values in fields.items()}
        return mapper

    def save(self, path: str | Path) -> None:
        """Write the mapping as JSON."""
        write_json(Path(path), self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> Catemapper:
        """Read a file of `save`. Raises UserError."""
        return cls.from_state_dict(read_json(Path(path)), path)


def encode_splits(splits: Splits, threshold: float) -> Catemapper:
    """Fit a mapping on the training split, and map all three splits."""
    catemapper = Catemapper(threshold).fit(splits.train)
    for split in (splits.train, splits.val, splits.test):
        catemapper.map(split)
    return catemapper
