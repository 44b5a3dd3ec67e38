"""Other ways to weight the tasks: by their closed forms, and through the program."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_tree, user_error_message
from torch import Tensor, nn

from common import distributed
from SLmain import main
from train.Arguments import WEIGHTINGS
from train.task_weighting import TaskWeighting, Uncertainty, make_task_weighting

SMALL = {"embed_dim": 8, "expert_num": 2, "batch_size": 512, "model_name": "ple", "epoch": 2}


class Point(nn.Module):
    """Two losses of one point in the plane, whose gradients are the rows of `slopes`."""

    def __init__(self, slopes: list[list[float]]) -> None:
        super().__init__()
        self.at, self.slopes = nn.Parameter(torch.zeros(2)), torch.tensor(slopes, dtype=torch.float32)

    def losses(self) -> Tensor:
        return self.slopes @ self.at


def direction(weighting: TaskWeighting, slopes: list[list[float]]) -> list[float]:
    point = Point(slopes)
    weighting.backward(point.losses(), point)
    assert point.at.grad is not None
    return point.at.grad.tolist()


def test_equal_is_the_gradient_of_the_mean() -> None:
    assert direction(make_task_weighting("equal", 2, 0.1, "cpu"), [[2, 0], [0, 4]]) == [1, 2]


def test_uncertainty_weighs_by_the_variance_it_learns() -> None:
    """With constant losses sigma^2 goes to 2 L: where exp(-s) L + s / 2 is least."""
    weighting, losses = Uncertainty(2, 0.05, "cpu"), torch.tensor([0.1, 3.0])
    assert direction(weighting, [[2, 0], [0, 4]]) == [1, 2], "it starts from equal weights"
    for _ in range(1000):
        weighting.backward(losses, nn.Identity())
        weighting.step()
    torch.testing.assert_close(weighting.log_variance.detach(), torch.log(2 * losses), atol=1e-3, rtol=0)
    assert direction(weighting, [[2, 0], [0, 4]]) == pytest.approx([1 / 0.2, 2 / 6], rel=2e-3)


def test_conflicting_gradients_combine_as_published() -> None:
    pytest.importorskip("torchjd")
    conflict = [[1.0, 0.0], [-1.0, 1.0]]
    # PCGrad: each gradient loses its part against the other: (1/2, 1/2) and (0, 1), added up.
    assert direction(make_task_weighting("pcgrad", 2, 0.1, "cpu"), conflict) == pytest.approx([0.5, 1.5])
    # UPGrad projects onto the cone in which no loss rises; the mean of both.
    assert direction(make_task_weighting("upgrad", 2, 0.1, "cpu"), conflict) == pytest.approx([0.25, 0.75], abs=1e-3)
    # MGDA: the shortest vector of the segment between them, (1, 0) + t (-2, 1) at t = 2 / 5.
    assert direction(make_task_weighting("mgda", 2, 0.1, "cpu"), conflict) == pytest.approx([0.2, 0.4], abs=1e-2)
    for name in ("upgrad", "pcgrad", "cagrad", "mgda"):
        step = torch.tensor(direction(make_task_weighting(name, 2, 0.1, "cpu"), conflict))
        assert (torch.tensor(conflict) @ step > 0).all(), f"{name}: no task is sacrificed"


@pytest.fixture
def here(tables: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tables.parent.parent
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "equal"])
def test_each_weighting_trains_beside_the_baseline(here: Path, name: str) -> None:
    if name != "uncertainty":
        pytest.importorskip("torchjd")
    metrics = main(**SMALL, weighting=name)
    assert all(math.isfinite(one.logloss) for one in metrics)
    assert (here / f"chkpt/SL/rt_ple_{name}/rt_ple_{name}_0.0.pt").exists()
    assert not list(here.glob("pretrain/*")), "the baseline is that of equal weights"


def test_weightings_differ(here: Path) -> None:
    pytest.importorskip("torchjd")
    losses = {name: main(**SMALL, weighting=name)[0].logloss for name in ("equal", "uncertainty", "pcgrad")}
    assert len(set(losses.values())) == 3


def test_resumed_run_restores_the_task_weighting(here: Path) -> None:
    main(**SMALL, weighting="uncertainty")
    whole = (here / "chkpt/SL/rt_ple_uncertainty/metrics.csv").read_bytes()
    main(**{**SMALL, "epoch": 1}, weighting="uncertainty")
    main(**SMALL, weighting="uncertainty", resume=True)
    assert (here / "chkpt/SL/rt_ple_uncertainty/metrics.csv").read_bytes() == whole


def test_a_missing_package_is_named_with_the_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    before = set(read_tree(here))
    text = user_error_message(lambda: main(**SMALL, weighting="upgrad"))
    assert "pip install -r requirements/weighting.txt" in text
    assert not [name for name in set(read_tree(here)) - before if name.endswith(".pt")]


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert "one process" in user_error_message(lambda: make_task_weighting("uncertainty", 2, 0.1, "cpu"))
