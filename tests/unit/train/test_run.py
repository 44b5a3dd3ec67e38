"""The supervised loops by themselves; `test_SLmain.py` runs them as a user does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import user_error_message

from common.device import pick_device
from dataset.loader import TensorLoader
from dataset.rtrl import load_splits
from dataset.vocabulary import encode_splits
from slmodels import MODELS, build
from train.run import get_dataset
from train.supervised import slpred


def test_nothing_is_simulated_beside_other_tables(tmp_path: Path) -> None:
    assert "no such data set" in user_error_message(lambda: get_dataset("other", tmp_path))
    (tmp_path / "train.csv").write_text("timestamp,sessionid\n")
    message = user_error_message(lambda: get_dataset("rt", tmp_path / "rt"))
    assert "none is simulated beside train.csv" in message
    assert "dataset.prepare" in message
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


@pytest.mark.parametrize("numerical", ["session", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_rows_are_predicted_once(rt_tables: Path, name: str, numerical: str) -> None:
    splits = load_splits(rt_tables, numerical)  # type: ignore[arg-type]
    encode_splits(splits, 0.2)
    split = splits.val
    model = build(name, split.field_dims, split.numerical_num, 8, [16, 8], [8], 2, 4, 0.2)
    with torch.no_grad():
        plain = model.eval()(torch.from_numpy(split.categorical), torch.from_numpy(split.numerical)).numpy()
    asked: list[int] = []
    model.register_forward_hook(lambda _module, inputs, _output: asked.append(len(inputs[0])))
    got = slpred(model.train(), TensorLoader(split, 100), 2, "cpu")
    np.testing.assert_allclose(np.column_stack(got), plain, atol=1e-6, rtol=1e-5)
    rows = len(np.unique(np.hstack([split.categorical, split.numerical]), axis=0))
    assert sum(asked) == rows < len(split)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_stays_close(precision: str) -> None:
    """Whether this processor rounds or not: the flag is taken, and put back."""
    model = build("mmoe", [50, 30], 4, 64, [512, 256], [128], 2, 4, 0.0)
    ids, numbers = torch.randint(30, (300, 2)), torch.randn(300, 4)
    try:
        pick_device("cpu", precision)
        coarse = model(ids, numbers)
    finally:
        pick_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    torch.testing.assert_close(coarse, model(ids, numbers), atol=0.02, rtol=0.05)
