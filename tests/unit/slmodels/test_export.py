"""Exported models: equal to the model, for any number of rows."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from conftest import user_error_message
from torch import Tensor

from dataset.vocabulary import Catemapper
from layers.ops import FieldLinear
from slmodels import MODELS, build
from slmodels import export as export_module
from slmodels.export import DESCRIPTION, check_export, export_model
from slmodels.model_file import load_model, model_metadata, save_model

FIELD_DIMS, NUMBERS, WINDOW = [7, 5], 3, 4
SIZES: dict[str, Any] = {"embed_dim": 4, "bottom_mlp_dims": (8, 6), "tower_mlp_dims": (4,), "expert_num": 2}
ALL = [*((name, "none") for name in MODELS),
       *((name, encoder) for encoder in ("gru", "attention") for name in MODELS if name != "metaheac")]
QUICK_PT2 = [*((name, "none") for name in MODELS), ("esmm", "gru"), ("esmm", "attention")]
QUICK_ONNX = [("mmoe", "none"), ("esmm", "gru"), ("sharedbottom", "attention")]


def saved_model(folder: Path, name: str, encoder: str) -> Any:
    """A model of a file, of random weights; its means and standard deviations are not 0 and 1."""
    model = build(name, FIELD_DIMS, NUMBERS, SIZES["embed_dim"], SIZES["bottom_mlp_dims"], SIZES["tower_mlp_dims"], 2,
                  SIZES["expert_num"], 0.2, encoder, WINDOW)
    for part, buffer in model.named_buffers():
        if part.endswith(("mean", "std")):
            buffer.uniform_(1, 3)
    data = {"data": "", "tasks": ["CTR", "CTCVR"], "field_dims": FIELD_DIMS, "numerical_num": NUMBERS}
    mapper = Catemapper(1.0)
    mapper.ids = {"kind": {f"v{number}": number for number in range(1, 7)}, "place": {"home": 1}}
    save_model(folder / "model.pt", model, model_metadata(data, name, 2, **SIZES, encoder=encoder, window=WINDOW),
               mapper)
    return load_model(folder / "model.pt")


def batch(rows: int, window: int) -> tuple[Tensor, Tensor]:
    """Random rows; of windows, sessions of any length, padded in front."""
    shape = (rows, window) if window else (rows,)
    ids = torch.stack([torch.randint(dim, shape) for dim in FIELD_DIMS], dim=-1)
    numbers = 2 + 3 * torch.randn(*shape, NUMBERS)
    if window:
        padding = torch.arange(window) < torch.randint(window, (rows, 1))
        ids[padding], numbers[padding] = -1, 0.0
    return ids, numbers


def description_of(path: Path) -> dict[str, Any]:
    """What the exported file says of the model."""
    if path.suffix == ".pt2":
        extra = {DESCRIPTION: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[DESCRIPTION])
    return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map[DESCRIPTION])


def run_file(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The exported model, as another program runs it."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path)
    return lambda ids, numbers: torch.from_numpy(
        session.run(["predictions"], {"ids": ids.numpy(), "numbers": numbers.numpy()})[0])


def assert_export_equals_model(folder: Path, name: str, encoder: str, suffix: str) -> None:
    model = saved_model(folder, name, encoder)
    export_model(model, folder / f"model{suffix}")
    assert [path.name for path in folder.iterdir() if path.name != "model.pt"] == [f"model{suffix}"]
    exported = run_file(folder / f"model{suffix}")
    for rows in (1, 4, 64, 5000):
        ids, numbers = batch(rows, model.window)
        with torch.no_grad():
            expected = model(ids, numbers)
            torch.testing.assert_close(exported(ids, numbers), expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 1e-3, "the model does not predict the same for all rows"
    description = description_of(folder / f"model{suffix}")
    assert description["metadata"] == model.metadata
    assert Catemapper.from_state_dict(description["catemapper"], "").ids == model.catemapper.ids


@pytest.mark.parametrize(("name", "encoder"), QUICK_PT2)
def test_torch_export_equals_the_model(name: str, encoder: str, tmp_path: Path) -> None:
    assert_export_equals_model(tmp_path, name, encoder, ".pt2")


@pytest.mark.parametrize(("name", "encoder"), QUICK_ONNX)
def test_onnx_equals_the_model(name: str, encoder: str, tmp_path: Path) -> None:
    assert_export_equals_model(tmp_path, name, encoder, ".onnx")


@pytest.mark.stress
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(("name", "encoder"), ALL)
def test_all_exports_equal_their_models(name: str, encoder: str, suffix: str, tmp_path: Path) -> None:
    assert_export_equals_model(tmp_path, name, encoder, suffix)


def test_large_batches_keep_the_fast_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before and after an export; the exported graph does not take it."""
    calls: list[int] = []
    model = saved_model(tmp_path, "sharedbottom", "none")
    ids, numbers = batch(64, 0)
    apply = FieldLinear.apply
    monkeypatch.setattr(FieldLinear, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    for expected in (1, 2):
        model(ids, numbers)
        assert len(calls) == expected
        export_module.export_program(model)
        assert len(calls) == expected


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = saved_model(tmp_path, "esmm", "gru")
    inputs = batch(9, WINDOW)
    before = model(*inputs)
    export_module.export_program(model.train())
    assert model.training
    assert torch.equal(model.eval()(*inputs), before)
    model(*inputs).sum().backward()


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_onnx(name: str, *args: Any, **options: Any) -> Any:
        if name == "onnxscript":
            raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    message = user_error_message(lambda: check_export(Path("model.onnx")))
    assert message == "model.onnx: onnxscript is not installed: pip install -r requirements/export.txt"
    check_export(Path("model.pt2"))


def test_an_unknown_format_is_refused() -> None:
    assert "unknown format '.h5'" in user_error_message(lambda: check_export(Path("model.h5")))


def test_onnx_refuses_models_of_two_gigabytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_module, "MAX_ONNX_BYTES", 100)
    model = saved_model(tmp_path, "sharedbottom", "none")
    assert "export to .pt2" in user_error_message(lambda: export_model(model, tmp_path / "model.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
