"""When weights of the loss must help: the closed forms, the simulated cases, and a small run."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from factories import handmade
from torch import Tensor, nn

from common.csv_reader import read_csv_rows
from dataset.prepare import prepare
from dataset.rtrl import load_splits
from experiments import when_weighting_helps as module
from experiments.when_weighting_helps import (
    CASES,
    METHODS,
    MODELS,
    BlindModel,
    GivenWeights,
    WeightingArguments,
    add_bot_clicks,
    is_bot,
    metric_weights,
    paired,
    run_case,
)
from train.metrics import task_metrics
from train.polish import RlLossPolisher

# ------------------------------------------------------------------------------------------------------- closed forms

P = torch.tensor([0.2, 0.6])  # true probability of each id x
NOISE = torch.tensor([0.0, 0.4])  # a label is flipped so often in state z
X, Z = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])  # a row of each kind; its label is its probability
LABELS = (NOISE[Z] + (1 - 2 * NOISE[Z]) * P[X])[:, None]


class Cells(nn.Module):
    """A free parameter for every id and state."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(2, 2))

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        return torch.sigmoid(self.logit[categorical_x[:, 0], numerical_x[:, 0].long()])[:, None]


class NoiseCritic(nn.Module):
    """More loss, hence a lower Q, is expected in the noisy state."""

    def forward(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        return -0.3 - 2 * numerical_x[:, 0]


def weighted_fit(model: nn.Module, polisher: RlLossPolisher) -> tuple[Tensor, Tensor]:
    """The predictions (4,) that minimize the weighted loss, and the weights (4,)."""
    batch = X[:, None], Z[:, None].float(), torch.column_stack([LABELS, 1 - 2 * NOISE[Z], NOISE[Z] == 0])
    w = polisher.sample_weights(*batch)[:, :1]
    for _ in range(500):  # gradient descent on a convex function
        loss = (w / w.mean() * F.binary_cross_entropy(model(*batch[:2]), LABELS, reduction="none")).mean()
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())),
                                       strict=True):
            parameter.data -= 6 * gradient
    return model(*batch[:2]).detach()[:, 0], w[:, 0]


@pytest.mark.parametrize("method", ["constant", "full", "inverse", "contrast"])
def test_blind_model_aims_at_the_weighted_mean(method: str) -> None:
    """Its bias is (1 - 2 p) times the weighted noise rate of the states that it cannot tell apart."""
    model = BlindModel(Cells())
    fitted, w = weighted_fit(model, RlLossPolisher(model, [NoiseCritic()], 1.0, method))
    noise = torch.stack([(w * NOISE[Z])[id_ == X].sum() / w[id_ == X].sum() for id_ in (0, 1)])
    torch.testing.assert_close(fitted, (P + (1 - 2 * P) * noise)[X], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["constant", "full", "inverse", "contrast"])
def test_seeing_model_ignores_the_weights(method: str) -> None:
    model = Cells()
    fitted, _ = weighted_fit(model, RlLossPolisher(model, [NoiseCritic()], 1.0, method))
    torch.testing.assert_close(fitted, LABELS[:, 0], atol=1e-4, rtol=0)


def test_inverse_and_oracle_reduce_the_error() -> None:
    """Of the clean parameter: in this order, from the worst to the exact one."""
    models = [BlindModel(Cells()) for _ in range(5)]
    polishers = [*(RlLossPolisher(model, [NoiseCritic()], 1.0, method)
                   for model, method in zip(models, ("full", "constant", "inverse"), strict=False)),
                 GivenWeights(models[3], 1), GivenWeights(models[4], 2)]
    errors = [float((weighted_fit(model, polisher)[0] - P[X]).abs().mean())
              for model, polisher in zip(models, polishers, strict=True)]
    assert all(worse > better + 0.01 for worse, better in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(0, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- the cases


def test_session_metrics_count_rows_as_documented() -> None:
    split = handmade([2, 4])
    weights = metric_weights("sessions", split)
    p = np.linspace(0.1, 0.9, 6)
    losses = -np.where(split.labels[:, 0] > 0, np.log(p), np.log1p(-p))
    expected = task_metrics(p, split.labels[:, 0], split.session, split.user).session_logloss
    assert np.average(losses, weights=weights["s-Logloss"]) == pytest.approx(expected)
    left = np.array([2, 1, 4, 3, 2, 1])
    np.testing.assert_allclose(weights["to-come logloss"], (1 - 0.9**left) / 0.1)


def test_bots_click_and_never_buy(raw_log: Path, rt_tables: Path, tmp_path: Path) -> None:
    """People's rows stay as they are; bots click about half of the items that they like."""
    raw = Path(shutil.copytree(raw_log, tmp_path / "raw"))
    add_bot_clicks(raw, seed=1)
    prepare(raw, tmp_path / "rt")
    before, after = load_splits(rt_tables).train, load_splits(tmp_path / "rt").train
    bot = is_bot(after.session)
    np.testing.assert_array_equal(before.session, after.session)
    np.testing.assert_array_equal(before.labels[~bot], after.labels[~bot])
    np.testing.assert_array_equal(before.labels[:, 1], after.labels[:, 1])
    assert (before.labels[bot, 0] <= after.labels[bot, 0]).all()
    new = pd.Series(after.labels[:, 0] - before.labels[:, 0])[bot & (before.labels[:, 0] == 0)]
    value = pd.Series(after.fields["785"].codes)[new.index]
    liked = new.groupby(value).transform("max") > 0
    assert new[liked].mean() == pytest.approx(0.5, abs=0.08)
    assert 0.2 < liked.mean() < 0.8
    assert metric_weights("bots", after)["logloss"].mean() == pytest.approx(1 - bot.mean())


# ------------------------------------------------------------------------------------------------------------ the run

SMALL = WeightingArguments(events=2000, epoch=2, critic_epoch=1, critic_updates=3)


@pytest.mark.parametrize("case", CASES)
def test_small_run_of_a_case(case: str, tmp_path: Path) -> None:
    rows = run_case(case, 1, SMALL, tmp_path)
    names = list(dict.fromkeys(row["weights"] for row in rows))
    assert names[:6] == list(METHODS)
    assert [(row["model"], row["weights"]) for row in rows] == list(itertools.product(MODELS, names))
    train, by_name = load_splits(tmp_path / "rt").train, {row["weights"]: row for row in rows}
    assert by_name["constant"]["effective sample size"] == pytest.approx(1)
    assert by_name["constant"]["weighted click rate"] == pytest.approx(train.labels[:, 0].mean())
    if case == "bots":
        people = ~is_bot(train.session)
        assert by_name["oracle: logloss"]["weight on bots"] == 0
        assert by_name["oracle: logloss"]["effective sample size"] == pytest.approx(people.mean(), rel=1e-5)
        assert by_name["oracle: by the past"]["weight on bots"] < by_name["constant"]["weight on bots"]
    else:
        expected = np.average(train.labels[:, 0], weights=metric_weights(case, train)["s-Logloss"])
        assert by_name["oracle: s-Logloss"]["weighted click rate"] == pytest.approx(expected, rel=1e-5)
        assert by_name["ideal Q: full"]["effective sample size"] < 1


def test_program_writes_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    """Differences are paired by seed."""
    def fake_case(case: str, seed: int, *_: Any) -> list[dict[str, Any]]:
        metrics = dict.fromkeys((*CASES[case], "AUC", "mean prediction"), 0.5)
        return [{"case": case, "seed": seed, "model": model, "weights": weights, **metrics, CASES[case][0]: value}
                for model in MODELS for weights, value in (("constant", seed), ("full", seed + 0.002 + seed / 1e4))]

    monkeypatch.setattr(module, "run_case", fake_case)
    monkeypatch.setattr("sys.argv", ["when_weighting_helps", "--seeds=3", f"--out={tmp_path}"])
    module.cli()
    said = capsys.readouterr().out
    assert said.count("| full | +2.20 (+1.95 to +2.45) |") == 4
    assert (tmp_path / "when_weighting_helps.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_csv_rows(tmp_path / "when_weighting_helps.csv")) == 3 * len(CASES) * 4
    rows = [row for seed in (1, 2, 3) for row in fake_case("bots", seed)]
    assert paired(rows, "bots", "blind", "full", "logloss").mean == pytest.approx(2.2)


def test_page_has_the_published_differences() -> None:
    page = (REPOSITORY / "docs" / "when-weighting-helps.md").read_text(encoding="utf-8")
    rows = pd.read_csv(REPOSITORY / "docs" / "results" / "when_weighting_helps.csv").to_dict("records")
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    compared = [(case, model, metric) for case, metrics in CASES.items() for model in MODELS for metric in metrics]
    for case, model, metric in compared:
        for weights in {row["weights"] for row in rows if row["case"] == case} - {"constant"}:
            test = paired(rows, case, model, weights, metric)
            cell = f"| {test.mean:+.2f} ({test.low:+.2f} to {test.high:+.2f}) |"
            assert sum(cell in line for line in tables) == 1, (case, model, metric, weights)
