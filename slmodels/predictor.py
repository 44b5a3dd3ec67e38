"""Score rows that are not prepared: a trained model, and the log of a data set as the history of the rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from common.checkpoint import DIFFERS
from common.errors import UserError
from dataset.features import features_version
from dataset.loader import TensorLoader
from dataset.manifest import find_folder
from dataset.new_rows import NewRows, check_rows, with_history
from dataset.rtrl import Log, read_log
from dataset.vocabulary import Catemapper

BATCH = 4096  # rows


class Predictor:
    """A model with the folder that the features of new rows come from.

    Args:
        model: a model with its `metadata` and `catemapper`, as `load_model` gives it.
        path: of its file, for messages.
        datasets: the folder of data sets, or that of the data set itself.
        name: of the data set; default: that of the one which the model was trained on.
    """

    def __init__(self, model: nn.Module, path: Path, datasets: str | Path = "dataset", name: str = "") -> None:
        self.model, self.path, self.datasets = model, path, Path(datasets)
        self.name = name or str(self.metadata.get("dataset_name", ""))

    @property
    def folder(self) -> Path:
        """The folder of the data set. Raises UserError where nothing says its name."""
        folder = find_folder(self.datasets, self.name)
        if not self.name and folder == Path("dataset"):
            raise UserError(f"{self.path}: does not say which data set it was trained on: name it (predict.py: "
                            "--dataset_name=NAME; load_model: dataset=FOLDER)")
        return folder

    @functools.cached_property
    def log(self) -> Log:
        """The tables of the data set. Raises UserError where they do not have the model's fields and tasks."""
        metadata = self.metadata
        if metadata["features"] != ("" if metadata["numerical"] == "none" else features_version()):
            raise UserError(f"{self.path}: {DIFFERS['features']}: train it anew: python3 SLmain.py --model_name=NAME")
        log = read_log(self.folder)
        tasks = [str(task["name"]) for task in log.manifest["tasks"]][: len(metadata["tasks"])]
        if not tasks or metadata["tasks"] != tasks:
            raise self._misfit(f"tasks {', '.join(metadata['tasks'])}", f"{', '.join(tasks)}")
        missing = [field for field in self.catemapper.ids if field not in log.manifest["categorical"]]
        if missing:
            raise self._misfit(f"field '{missing[0]}'", f"{', '.join(log.manifest['categorical'])}")
        return log

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the model's file."""
        return cast(dict[str, Any], self.model.metadata)

    @property
    def catemapper(self) -> Catemapper:
        """The vocabulary of the model's file. Raises UserError where it has none."""
        catemapper = self.model.catemapper
        if not isinstance(catemapper, Catemapper):
            raise UserError(f"{self.path}: has no vocabulary, so it reads no rows: give a model that SLmain.py wrote")
        return catemapper

    def predict(self, table: pd.DataFrame, candidates: bool = False) -> pd.DataFrame:
        """Score rows: one column of probabilities (n,) for each task, named after it, with the index of `table`.

        Args:
            table: rows in the columns of the MDP tables: timestamp (ms), sessionid, the keys of the feature tables and
                the context fields; in any order. Labels and `<label>_time` are optional: an outcome of a new row that
                is not known counts as not having happened. The new rows count in each other's features as rows of the
                log do. A row that the log has already is not counted twice, and has the outcomes that the log says.
            candidates: score each row as the next impression of its session, as if none of the others were there.

        `.attrs["notes"]` of the result is a list of lines: how many rows are new, and of each field how many values the
        model does not know. Raises UserError where a column is missing or invalid, or the data set is not one that the
        model can read.
        """
        tasks = list(self.metadata["tasks"])
        if not len(table):
            return pd.DataFrame(columns=tasks, index=table.index, dtype=np.float32)
        new = self._new_rows(table, candidates)
        self.model.eval()
        with torch.no_grad():
            chunks = [self.model(*batch) for batch in self._batches(new)]
        result = pd.DataFrame(torch.cat(chunks).cpu().numpy(), columns=tasks, index=table.index)
        if not np.isfinite(result.to_numpy()).all():
            raise UserError(f"{self.path}: predictions contain NaN/Inf")
        result.attrs["notes"] = self._notes(table, new, candidates)
        return result

    def encode(self, table: pd.DataFrame, candidates: bool = False) -> tuple[Tensor, Tensor]:
        """What the model reads of the rows: ids (n, F) and numbers (n, N), not yet standardized; with an encoder of
        window W (n, W, F) and (n, W, N). For an exported model. Arguments and errors are those of `predict`."""
        ids, numbers = zip(*self._batches(self._new_rows(table, candidates)), strict=True)
        return torch.cat(ids).cpu(), torch.cat(numbers).cpu()

    def _new_rows(self, table: pd.DataFrame, candidates: bool) -> NewRows:
        rows, metadata = check_rows(table, self.log), self.metadata
        new = with_history(self.log, rows, metadata["numerical"], candidates)
        if metadata["data"] != self.log.fingerprint and metadata.get("numerical_names") != new.dataset.numerical_names:
            raise self._misfit(f"numerical features {', '.join(metadata.get('numerical_names', ['of unknown names']))}",
                               ", ".join(new.dataset.numerical_names))
        self.catemapper.map(new.dataset)
        return new

    def _batches(self, new: NewRows) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and numbers of the rows, on the device of the model."""
        device = next(self.model.parameters()).device
        loader = TensorLoader(new.dataset, BATCH, device, window=self.metadata["window"])
        for index in torch.from_numpy(new.positions).split(BATCH):
            ids, numbers, _ = loader.take(index.to(device))
            yield ids, numbers

    def _notes(self, table: pd.DataFrame, new: NewRows, candidates: bool) -> list[str]:
        """What to know of scored rows, one line each."""
        log, new_rows = self.log, int((~new.is_logged).sum())
        notes = [f"{len(table):,} rows, " + ("each as the next impression of its session" if candidates else
                                             f"{new_rows:,} of them not in the log of {self.folder}")]
        if self.metadata["data"] != log.fingerprint:
            notes.append(f"{self.folder} is not the data that the model was trained on; its log is the history")
        start = min(rows["timestamp"].min() for rows in log.tables.values())
        earlier = int((table["timestamp"].to_numpy() < start).sum())
        if earlier:
            notes.append(f"timestamp: {earlier:,} rows are earlier than every row of the log: are they milliseconds "
                         "since 1970?")
        unlabelled = [label for label in log.labels if label not in table]
        if unlabelled and new_rows and not candidates:
            notes.append(f"no column {', '.join(unlabelled)}: outcomes of new rows count as not having happened")
        for name, features in log.feature_tables.items():
            known = np.isin(new.dataset.keys[features.key][new.positions], features.table[features.key].to_numpy())
            if not known.all():
                notes.append(f"{features.key}: {int((~known).sum()):,} rows have one that is not in {name}: its fields "
                             "count as missing")
        for name, ids in self.catemapper.ids.items():
            column = new.dataset.fields[name]
            values, counts = np.unique(column.codes[new.positions], return_counts=True)
            unseen = [(code, count) for code, count in zip(values, counts, strict=True)
                      if code >= 0 and column.values[code] not in ids]
            if unseen:
                notes.append(f"{name}: {sum(count for _, count in unseen):,} rows have one of {len(unseen):,} values "
                             "that the model does not know (unseen or rare in training)")
        return notes

    def _misfit(self, needs: str, found: str) -> UserError:
        return UserError(f"{self.path}: the model has the {needs}, but {self.folder} has {found}: give the data "
                         "set that it was trained on, or train it anew: python3 SLmain.py --model_name=NAME")
