"""Files of tensors: round trip; no pickle and no NaN/Inf gets in."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from conftest import user_error_message

from common.checkpoint import load_tensors, save_tensors
from common.fileio import append_checksum


class MaliciousPickle:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_tensors_round_trip(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.pt", {"x": torch.arange(3), "names": ["a", "b"], "epoch": 2})
    value = load_tensors(tmp_path / "a.pt", "")
    assert torch.equal(value.pop("x"), torch.arange(3))
    assert value == {"names": ["a", "b"], "epoch": 2}


def test_a_pickle_with_a_checksum_runs_nothing(tmp_path: Path) -> None:
    payload = MaliciousPickle(tmp_path / "owned")
    torch.save({"weights": payload}, tmp_path / "a.pt")
    append_checksum(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in user_error_message(lambda: load_tensors(tmp_path / "a.pt", "train it again"))
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "owned").exists(), "the payload does what it claims"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_refused(tmp_path: Path, value: float) -> None:
    save_tensors(tmp_path / "a.pt", {"weights": {"a": torch.tensor([1.0, value])}})
    assert "not a checkpoint" in user_error_message(lambda: load_tensors(tmp_path / "a.pt", "train it again"))
