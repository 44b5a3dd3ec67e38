"""Score rows with a trained model; or export the model for other programs (docs/serving.md).

    python3 predict.py --model=pretrain/rt_esmm.pt --rows=new.csv --out=scores.csv  # rows of your own
    python3 predict.py --model=pretrain/rt_esmm.pt --split=test --out=scores.csv    # a split of the data set
    python3 predict.py --model=pretrain/rt_esmm.pt --export=model.onnx              # or model.pt2
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, cli_entry_point
from common.startup import before_torch
from dataset.manifest import SPLITS, table_file
from train.Arguments import Settings, option, parse


@dataclass(kw_only=True)
class PredictArguments(Settings):
    """Scoring and export: `predict.py`."""

    model: str = option("", "the file of the model, such as pretrain/rt_esmm.pt")
    rows: str = option("", "CSV (or Parquet) of the rows to score, in the columns of the MDP tables; labels are "
                       "optional")
    split: str = option("", "score a split of the data set instead", choices=["", *SPLITS])
    candidates: bool = option(False, "score each row as the next impression of its session, without the other rows: to "
                              "rank what could be shown")
    out: str = option("scores.csv", "where the scores are written")
    export: str = option("", "write the model to this file, .pt2 (torch.export) or .onnx")
    dataset_name: str = option("", "the data set whose rows are the history (default that of the model's training)")
    dataset_path: str = option("dataset", "the folder of data sets")
    device: str = option("auto", "where to compute: cpu, cuda, cuda:1, mps; auto takes the best there is")

    def check_files(self) -> None:
        if not self.model:
            raise UserError("--model: the file of a model is needed, such as --model=pretrain/rt_esmm.pt")
        if bool(self.rows) + bool(self.split) + bool(self.export) != 1:
            raise UserError("give one of --rows=NEW.csv, --split=test and --export=model.onnx")
        if not Path(self.model).exists():
            raise UserError(f"{self.model}: no such file: train it anew: python3 SLmain.py --model_name=NAME")


if __name__ == "__main__":
    before_torch(lambda: parse(PredictArguments, __doc__ or "").check_files())

import pandas as pd

from common.device import pick_device
from common.fileio import atomic_file, check_writable
from dataset.new_rows import row_columns
from dataset.tables import read_split
from slmodels.export import check_export, export_model
from slmodels.model_file import load_model
from slmodels.predictor import Predictor


def main(settings: PredictArguments) -> None:
    """Do what the settings say. Raises UserError."""
    settings.check_files()
    path, export, out = Path(settings.model), Path(settings.export), Path(settings.out)
    if settings.export:
        check_export(export)
    device = pick_device(settings.device)
    model = load_model(path, device)
    if settings.export:
        check_writable(export.parent, files=[export])
        export_model(model, export)
        print(f"saved {export}")
        return
    check_writable(out.parent, files=[out])
    predictor = Predictor(model, path, settings.dataset_path, settings.dataset_name)
    score(predictor, Path(settings.rows) if settings.rows else None, settings, out)


def score(predictor: Predictor, source: Path | None, settings: PredictArguments, out: Path) -> None:
    """Score the rows of a CSV, or of the split; write and print."""
    manifest = predictor.log.manifest
    rows = read_split(source or predictor.folder / table_file(manifest, settings.split), manifest, labels_optional=True)
    scores = predictor.predict(rows, settings.candidates)
    with atomic_file(out) as partial:
        pd.concat([rows[row_columns(manifest)], scores], axis=1).to_csv(partial, index=False)
    print("\n".join([*scores.attrs["notes"], f"saved {out}"]))


@cli_entry_point
def cli() -> None:
    main(parse(PredictArguments, __doc__ or ""))


if __name__ == "__main__":
    cli()
