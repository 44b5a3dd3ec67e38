"""A trained model as one file for other programs: `.pt2` of torch.export, or `.onnx`.

Inputs are `ids` (B, F) int64 and `numbers` (B, N) float32, as the model's own, of an encoder `(B, W, F)` and
`(B, W, N)`; the output is `predictions` (B, T). B is any number of rows. Numbers are standardized inside.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from common.errors import UserError
from common.fileio import atomic_file
from dataset.vocabulary import Catemapper

FORMATS = (".pt2", ".onnx")
MAX_ONNX_BYTES = 2**31  # of one protobuf message
DESCRIPTION = "rmtl.json"  # the name, in a file, of the JSON with the metadata and the vocabulary


def check_export(path: Path) -> None:
    """Raise UserError where a file of that name cannot be made: its ending, or a package that is missing."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: unknown format '{path.suffix}': {' or '.join(FORMATS)}")
    if path.suffix == ".onnx":
        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path}: {error.name} is not installed: pip install -r requirements/export.txt") from error


def export_model(model: nn.Module, path: str | Path) -> None:
    """Write a model of `load_model` to `path`, whose ending is the format: `.pt2` or `.onnx`.

    The file has the model's metadata and vocabulary, too: JSON of {"metadata", "catemapper"} under the name
    `DESCRIPTION`, in `extra_files` of `torch.export.load` or in the custom metadata of an ONNX session. Raises
    UserError.
    """
    path = Path(path)
    check_export(path)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if path.suffix == ".onnx" and size >= MAX_ONNX_BYTES:
        raise UserError(f"{path}: the model has {size / 2**30:.1f} GiB, an ONNX file takes less than 2: export to .pt2")
    catemapper = model.catemapper.state_dict() if isinstance(model.catemapper, Catemapper) else None
    description = json.dumps({"metadata": model.metadata, "catemapper": catemapper})
    program = export_program(model)
    with atomic_file(path) as partial, _quiet():
        if path.suffix == ".pt2":
            with open(partial, "wb") as file:
                torch.export.save(program, file, extra_files={DESCRIPTION: description})
            return
        onnx = torch.onnx.export(program, input_names=["ids", "numbers"], output_names=["predictions"], dynamo=True,
                                 verbose=False)
        assert onnx is not None
        onnx.model.metadata_props[DESCRIPTION] = description
        onnx.save(partial)


def export_program(model: nn.Module) -> ExportedProgram:
    """The graph of a model in eval mode, of any number of rows."""
    metadata = cast(dict[str, Any], model.metadata)
    rows = (3, metadata["window"]) if metadata["window"] else (3,)
    example = (torch.zeros(*rows, len(metadata["field_dims"]), dtype=torch.int64),
               torch.zeros(*rows, metadata["numerical_num"]))
    batch = {0: Dim("batch")}
    with torch.no_grad(), _quiet():
        return torch.export.export(copy.deepcopy(model).cpu().eval(), example, dynamic_shapes=(batch, batch),
                                   strict=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of its own packages and layers; errors are raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
