"""The critics' weights on the loss, and the polish run of SLmain with its controls."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error_message
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import SLmain
from common.checkpoint import load_tensors
from common.csv_reader import write_csv
from common.errors import UserError
from dataset.rtrl import load_splits
from dataset.vocabulary import encode_splits
from layers import ESMM, CriticNeg
from slmodels.model_file import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, save_model
from train.Arguments import SLArguments
from train.critic_weights import SHUFFLED, controls_of
from train.metrics import Metrics, read_test_metrics
from train.polish import RlLossPolisher, comparison_table


class Actor(nn.Module):
    """Predictions 0.2 and 0.1 times the first number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.2, 0.1]))

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        return self.scale * numerical_x[:, :1]


class FakeCritic(nn.Module):
    """Q = -(base + action), in closed form."""

    def __init__(self, base: float) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.tensor(base))

    def forward(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
        return -(self.base + action[:, 0])


BATCH = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.0, 0], [1, 0],
                                                                                                  [1, 1]])
Q = torch.tensor([[-1.2, -2.1], [-1.4, -2.2], [-1.6, -2.3]])


@pytest.mark.parametrize(("method", "expected"), [
    ("full", 1 - 0.5 * Q),
    ("label", 1 - 0.5 * BATCH[2] * Q),
    ("critic", -Q),
    ("constant", torch.ones(3, 2)),
    ("inverse", 1 / (1 - 0.5 * Q)),
    ("contrast", torch.exp(-0.5 * (Q - Q.mean(0)) / Q.std(0, correction=0))),
])
def test_weights_by_their_closed_form(method: str, expected: Tensor) -> None:
    polisher = RlLossPolisher(Actor(), [FakeCritic(1.0), FakeCritic(2.0)], 0.5, method)
    torch.testing.assert_close(polisher.weights(*BATCH), expected)


@pytest.mark.parametrize("method", ["full", "label", "critic", "inverse", "contrast", "constant"])
def test_normalized_weights_have_mean_1(method: str) -> None:
    critics = [FakeCritic(1.0), FakeCritic(2.0)]
    plain, normalized = (RlLossPolisher(Actor(), critics, 0.5, method, normalize).weights(*BATCH)
                         for normalize in (False, True))
    torch.testing.assert_close(normalized.mean(dim=0), torch.ones(2))
    torch.testing.assert_close(normalized * plain.mean(dim=0), plain)


def test_contrast_spread_is_independent_of_q_scale() -> None:
    """With a large Q, 1 - lambda Q tends to -lambda Q, whose proportions no lambda changes; contrast's do change."""
    batch = BATCH[0], 1000 * BATCH[1], BATCH[2]

    def spread(method: str, polish_lambda: float) -> float:
        w = RlLossPolisher(Actor(), [FakeCritic(1.0), FakeCritic(2.0)], polish_lambda, method).weights(*batch)
        return float(w[:, 0].max() / w[:, 0].min())

    assert spread("full", 10.0) == pytest.approx(spread("full", 1.0), rel=0.01)
    assert spread("contrast", 1.0) == pytest.approx(spread("contrast", 0.5) ** 2)


@pytest.mark.parametrize(("method", "expected"), [
    ("full", [0.2, 0.5]), ("shuffled", [0.2, 0.5]), ("label", [0.2 * 3 / (0.2 * 3 + 0.8), 0.5 * 5 / (0.5 * 5 + 0.5)])])
def test_label_free_weights_keep_the_optimum(method: str, expected: list[float]) -> None:
    """argmin_p E[w(x) BCE(p(x), y)] = P(y | x) for every positive w(x): a critic that sees the sample, not its label,
    can only change how a model errs, not what it aims at. Weights that see the label aim elsewhere."""
    cells = torch.arange(2).repeat_interleave(100)  # two kinds of samples; 20 % and 50 % of them are positive
    labels = torch.cat([torch.arange(100) < 20, torch.arange(100) < 50]).float()[:, None]

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit = nn.Parameter(torch.zeros(2))

        def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
            return torch.sigmoid(self.logit[categorical_x])

    class Knows(nn.Module):
        def forward(self, categorical_x: Tensor, numerical_x: Tensor, action: Tensor) -> Tensor:
            return torch.tensor([-2.0, -4.0])[categorical_x[:, 0]]

    model = Cells()
    polisher = RlLossPolisher(model, [Knows()], 1.0, method)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    means = []
    for step in range(1200):
        optimizer.zero_grad()
        w = polisher.weights(cells[:, None], torch.zeros(200, 1), labels)
        (w * nn.BCELoss(reduction="none")(model(cells[:, None], torch.zeros(200, 1)), labels)).mean().backward()
        optimizer.step()
        if step >= 400:
            means.append(torch.sigmoid(model.logit.detach()))
    torch.testing.assert_close(torch.stack(means).mean(dim=0), torch.tensor(expected), atol=0.01, rtol=0)


@pytest.mark.parametrize(("method", "control"), SHUFFLED.items())
def test_shuffled_weights_are_a_permutation(method: str, control: str) -> None:
    """Of whole samples: both tasks' weights of one sample stay together. Every method has such a control."""
    model = ESMM([5, 5], 1, 8, (16, 8), (8, 4), 2, 0.2)
    critics = [CriticNeg([5, 5], 1, 8, (16, 8), (8, 4)) for _ in range(2)]
    batch = torch.randint(5, (50, 2)), torch.randn(50, 1), torch.ones(50, 2)
    plain = RlLossPolisher(model, critics, 1.0, method).weights(*batch)
    shuffled = RlLossPolisher(model, critics, 1.0, control).weights(*batch)
    assert not torch.equal(plain, shuffled)
    assert sorted(map(tuple, plain.tolist())) == sorted(map(tuple, shuffled.tolist()))


def test_every_method_has_its_own_controls() -> None:
    assert {method: controls_of(method) for method in ("full", "contrast", "contrast_shuffled", "constant")} == {
        "full": ("constant", "shuffled"), "contrast": ("constant", "contrast_shuffled"),
        "contrast_shuffled": ("constant", "contrast_shuffled"), "constant": ("constant", "shuffled")}
    assert {"full", "label", "constant", "critic", "inverse", "contrast", "shuffled",
            "contrast_shuffled"} < set(RlLossPolisher.METHODS)


def test_constant_needs_no_critics() -> None:
    assert torch.equal(RlLossPolisher(Actor(), [], 1.0, "constant").weights(*BATCH), torch.ones(3, 2))
    with pytest.raises(ValueError, match="full, label"):
        RlLossPolisher(Actor(), [], 1.0, "half")


@given(dropout=st.sampled_from([0.0, 0.2, 0.9]), seed=st.integers(0, 99), size=st.integers(1, 40),
       method=st.sampled_from(["full", "label", "critic"]), train_mode=st.booleans())
def test_a_samples_weight_depends_on_the_sample_alone(dropout: float, seed: int, size: int, method: str,
                                                      train_mode: bool) -> None:
    """Not on dropout, nor on which rows share its batch, nor on their order, nor on the mode things were left in."""
    torch.manual_seed(1)
    rows = torch.randint(5, (40, 2)), torch.randn(40, 1), torch.randint(2, (40, 2)).float()

    def polisher(dropout: float) -> RlLossPolisher:
        torch.manual_seed(2)
        model = ESMM([5, 5], 1, 8, (16, 8), (8, 4), 2, dropout).train(train_mode)
        critics = [CriticNeg([5, 5], 1, 8, (16, 8), (8, 4), dropout).train(train_mode) for _ in range(2)]
        return RlLossPolisher(model, critics, 0.7, method)

    expected = polisher(0.0).weights(*rows)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(40)[:size].copy())
    torch.manual_seed(seed)
    asked = polisher(dropout)
    torch.testing.assert_close(asked.weights(*(one[order] for one in rows)), expected[order], rtol=1e-5, atol=1e-6)
    assert [network.training for network in (asked.model, *asked.critics)] == [train_mode] * 3
    assert float(expected.std()) > 0


def test_the_weights_are_numbers_to_the_gradient() -> None:
    """Each sample's loss counts with its weight; no gradient passes through the weight, nor reaches a critic."""
    model = ESMM([5, 5], 1, 8, (16, 8), (8, 4), 2, 0.0)
    critics = [CriticNeg([5, 5], 1, 8, (16, 8), (8, 4)) for _ in range(2)]
    batch = torch.randint(5, (6, 2)), torch.randn(6, 1), torch.randint(2, (6, 2)).float()
    w = RlLossPolisher(model, critics, 1.0).weights(*batch)
    assert not w.requires_grad
    losses = nn.BCELoss(reduction="none")(model(*batch[:2]), batch[2])
    parameters = list(model.parameters())
    got = torch.autograd.grad((losses * w).mean(), parameters, retain_graph=True)
    expected = [torch.zeros_like(one) for one in parameters]
    for row in range(6):
        for task in range(2):
            for total, one in zip(expected, torch.autograd.grad(losses[row, task], parameters, retain_graph=True,
                                                                allow_unused=True), strict=True):
                total += 0 if one is None else float(w[row, task]) * one / 12
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(one.grad is None for critic in critics for one in critic.parameters())


def test_weight_statistics_by_hand() -> None:
    polisher = RlLossPolisher(Actor(), [], 1.0, "constant")
    for part in ([[1.0, 1], [1, 2]], [[1, 3], [1, 4], [1, 1]]):
        polisher._weight_buffer.append(torch.tensor(part))
    figures = polisher.weight_statistics(["CTR", "CTCVR"])
    assert figures["weight_mean_CTCVR"] == pytest.approx(11 / 5)
    assert figures["weight_ess_CTR"] == figures["weight_at_1_CTR"] == 1
    assert [figures[f"weight_q{q}_CTR"] for q in ("05", "50", "95")] == [1, 1, 1]
    assert figures["weight_ess_CTCVR"] == pytest.approx(11**2 / (5 * (1 + 4 + 9 + 16 + 1)))
    assert figures["weight_at_1_CTCVR"] == pytest.approx(0.4)
    assert [figures[f"weight_q{q}_CTCVR"] for q in ("05", "50", "95")] == pytest.approx([1, 2, 3.8])
    polisher.weights(*BATCH)
    assert polisher.weight_statistics(["CTR", "CTCVR"])["weight_ess_CTCVR"] == 1, "only what came since the last call"


# ------------------------------------------------------------------------------------------------------- the program

TINY: dict[str, Any] = {"embed_dim": 8, "expert_num": 2, "epoch": 1, "device": "cpu"}


def polished(**settings: Any) -> Any:
    """A polish run in the working folder."""
    return SLmain.main(**{**TINY, "model_name": "esmm", "polish_lambda": 1.0, **settings})


@pytest.fixture
def shop(tables: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the simulated tables."""
    folder = tables.parent.parent
    monkeypatch.chdir(folder)
    return folder


def make_critics(model: str = "esmm", **changed: Any) -> None:
    """Fresh critics of this data where RLmain.py writes them."""
    splits = load_splits(Path("dataset/rt"))
    encode_splits(splits, 0.2)
    metadata = {**SLArguments(embed_dim=8).metadata(model, splits.train.metadata), "critic_encoder": "none",
                "critic_window": 0, **changed}
    for name in ("critic1", "critic2"):
        critic = CriticNeg(metadata["field_dims"], splits.train.numerical_num, 8, BOTTOM_MLP_DIMS, TOWER_MLP_DIMS)
        save_model(Path(f"chkpt/RL/res_TD3BC_{model}/{name}.pth"), critic, metadata)


def test_critics_that_weight_a_loss_go_on_training() -> None:
    """They answer in eval mode and come back in their own; their parameters keep their gradients."""
    critics = [CriticNeg([3, 4], 2, 8, (16, 8), (8, 4)).train() for _ in range(2)]
    RlLossPolisher(Actor(), critics, 1.0).weights(torch.zeros(5, 2, dtype=torch.long), torch.zeros(5, 2),
                                                  torch.zeros(5, 2))
    assert all(critic.training and parameter.requires_grad for critic in critics for parameter in critic.parameters())


def test_missing_critics_are_refused_before_training(shop: Path) -> None:
    assert "python3 RLmain.py --actor_name=esmm" in user_error_message(polished)
    assert "python3 RLmain.py --actor_name=ple" in user_error_message(lambda: polished(critic_model="ple"))
    assert "esmm, omoe" in user_error_message(lambda: polished(critic_model="bert"))
    assert {path.name for path in shop.iterdir()} == {"dataset"}


def test_polish_trains_baseline_and_transfers_critics(
        shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_critics("esmm")
    polished(model_name="sharedbottom")
    said = capsys.readouterr().out
    assert "no baseline of sharedbottom yet: it is trained first" in said
    assert "critics of esmm weight the loss of sharedbottom" in said
    assert "(transfer)" in said
    assert (shop / "pretrain/rt_sharedbottom.pt").exists()
    folder = shop / "chkpt/SL/rt_sharedbottom"
    assert {"rt_sharedbottom_0.0.pt", "rt_sharedbottom_1.0.pt"} <= {path.name for path in folder.iterdir()}
    make_critics("sharedbottom")
    polished(model_name="sharedbottom")
    said = capsys.readouterr().out
    assert "trained first" not in said
    assert "critics of sharedbottom weight the loss of sharedbottom" in said
    assert "(transfer)" not in said
    polished(model_name="sharedbottom", critic_model="esmm")
    assert "critics of esmm weight the loss of sharedbottom" in capsys.readouterr().out


def table_of(said: str) -> dict[str, list[float]]:
    """The summary's rows by title."""
    lines = said[said.index("test split"):].splitlines()[1:]
    return {line[:22].strip(): [float(one) for one in line[22:].split()] for line in lines
            if line.startswith(("baseline", "control:", "this run:"))}


def test_comparison_table_has_baseline_control_and_run(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_critics()
    metrics = polished()
    alone = capsys.readouterr().out
    assert set(table_of(alone)) == {"baseline", "this run: full"}
    assert "no control run found" in alone
    assert "--polish_method=constant" in alone

    control = polished(polish_method="constant", critic_dir="nowhere")
    said = capsys.readouterr().out
    assert "critics unused" in said
    assert set(table_of(said)) == {"baseline", "this run: constant"}

    metrics = polished()
    said = capsys.readouterr().out
    rows = table_of(said)
    assert list(rows) == ["baseline", "control: constant", "this run: full"]
    assert "no control run found" not in said
    for title, tasks in (("control: constant", control), ("this run: full", metrics)):
        expected = [figure for one in tasks for figure in one]
        assert rows[title] == pytest.approx(expected, abs=5.1e-5)
    baseline = SLmain.main(**TINY, model_name="esmm")
    assert rows["baseline"] == pytest.approx([figure for one in baseline for figure in one], abs=5.1e-5)


def test_columns_of_long_names_are_apart(tmp_path: Path) -> None:
    """Of tasks and methods; every figure ends below the end of its header."""
    metrics = [Metrics(*(0.5,) * len(Metrics._fields))] * 2
    settings = SLArguments(polish_lambda=1.0, polish_method="contrast_shuffled", save_dir=str(tmp_path))
    header, *rows = comparison_table(settings, "", metrics, metrics, metrics, ["profile_enter", "CTR"]).splitlines()[:4]
    assert header.split() == ["test", "split", "profile_enter", "AUC", "Logloss", "s-Logloss", "s-GAUC", "u-GAUC",
                              "CTR", "AUC", "Logloss", "s-Logloss", "s-GAUC", "u-GAUC"]
    ends = [match.end() for match in re.finditer(r"\S+", header)][3:]
    ends.remove(header.index("CTR") + 3)
    for row in rows:
        assert [match.end() for match in re.finditer(r"0\.5000", row)] == ends
    assert header.index("profile_enter") > len("this run: contrast_shuffled")


def test_constant_weights_are_not_drawn(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every panel would be flat; nor is a mean weight printed."""
    polished(polish_method="constant", critic_dir="nowhere")
    assert not list(shop.glob("chkpt/SL/**/weights.png"))
    said = capsys.readouterr().out
    assert "weights.png" not in said
    assert "mean weight" not in said


@pytest.mark.parametrize("change", [{"seed": 5}, {"learning_rate": 0.1}, {"epoch": 2}])
def test_control_of_other_settings_is_ignored(shop: Path, capsys: pytest.CaptureFixture[str],
                                              change: dict[str, Any]) -> None:
    """The same budget and settings, but for the weights: else the comparison says nothing."""
    make_critics()
    polished(polish_method="constant", **change)
    capsys.readouterr()
    polished()
    assert "control: constant" not in table_of(capsys.readouterr().out)


def test_constant_weights_from_scratch_reproduce_the_baseline(shop: Path) -> None:
    """So the baseline is the control of a model that is trained with the critics' weights from its first step."""
    metrics = polished(polish_method="constant", polish_init="scratch", epoch=2)
    baseline = SLmain.main(**{**TINY, "epoch": 2}, model_name="esmm")
    assert metrics == baseline
    one, other = (load_tensors(shop / f"chkpt/SL/rt_esmm/{name}.pt", "")["weights"]
                  for name in ("rt_esmm_0.0", "rt_esmm_1.0_constant_scratch"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_polish_lr_ratio_scales_the_learning_rate(shop: Path) -> None:
    make_critics()
    weights = []
    for shares in ({"learning_rate": 1e-3, "polish_lr_ratio": 0.5}, {"learning_rate": 5e-4, "polish_lr_ratio": 1.0}):
        polished(**shares)
        weights.append(load_tensors(shop / "chkpt/SL/rt_esmm/rt_esmm_1.0/checkpoint.pt", "")["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_loss_by_weight_decile_is_sorted(shop: Path) -> None:
    make_critics()
    polished(polish_method="label")
    with open(shop / "chkpt/SL/rt_esmm/rt_esmm_1.0_label/weights.csv", encoding="utf-8", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 10
    val = load_splits(shop / "dataset/rt").val
    for task, name in enumerate(("CTR", "CTCVR")):
        weights = [row[f"weight_{name}"] for row in rows]
        assert weights == sorted(weights)
        assert weights[0] == pytest.approx(1), "most samples have no click, hence a weight of 1"
        assert np.mean([row[f"label_{name}"] for row in rows]) == pytest.approx(val.labels[:, task].mean(), abs=0.01)
        assert rows[-1][f"label_{name}"] > 3 * val.labels[:, task].mean(), "those with one weigh more"
        assert rows[-1][f"loss_{name}"] > rows[0][f"loss_{name}"]


@pytest.mark.parametrize(("file", "old", "new", "told"), [
    ("metrics.csv", "\ntest,", "\ntest,,", "line 4"), ("metrics.csv", "auc_CTR", "auc", "column 'auc_CTR' is missing"),
    ("metrics.csv", "session_gauc_CTR", "of an earlier version", "column 'session_gauc_CTR' is missing"),
    ("metrics.csv", "\ntest,", "\ntest,\x00", "NUL"), ("config.json", '"start"', '"Start"', "'start' is missing"),
    ("config.json", "{", "[", "not valid JSON")])
def test_control_with_corrupt_files_is_skipped(shop: Path, capsys: pytest.CaptureFixture[str], file: str, old: str,
                                               new: str, told: str) -> None:
    """A finished run is not lost over it."""
    make_critics()
    polished(polish_method="constant")
    path = shop / "chkpt/SL/rt_esmm/rt_esmm_1.0_constant" / file
    path.write_text(path.read_text().replace(old, new, 1))
    polished()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert line.startswith("control: constant is skipped: ")
    assert path.name in line
    assert told in line


@pytest.mark.parametrize("cell", ["1.5", "-0.1", "inf", "x", "", "0_1", "1e300"])
def test_out_of_range_metric_is_refused(tmp_path: Path, cell: str) -> None:
    path, names = tmp_path / "metrics.csv", ["CTR", "CTCVR"]
    metrics = {f"{metric}_{task}": 0.5 for task in names for metric in Metrics._fields}
    write_csv(path, [{"split": "val"}, {"split": "test", **metrics}])
    assert read_test_metrics(path, names) == [Metrics(0.5, 0.5, 0.5, 0.5, 0.5)] * 2
    for column in ("auc_CTCVR", "user_gauc_CTR"):
        write_csv(path, [{"split": "val"}, {"split": "test", **metrics, column: cell}])
        text = user_error_message(lambda: read_test_metrics(path, names))
        assert text.startswith(f"{path}, line 3, column '{column}': ")
    write_csv(path, [{"split": "test", **metrics}, {"split": "test", **metrics}])
    assert "line 3, column 'split'" in user_error_message(lambda: read_test_metrics(path, names))


def test_weights_are_in_the_metrics_and_drawn(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_critics()
    polished(polish_lambda=0.5, epoch=2)
    books = shop / "chkpt/SL/rt_esmm/rt_esmm_0.5"
    with open(books / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] in ("1", "2") and row["split"] != "test"]
    assert len(rows) == 2
    for row in rows:
        for task in ("CTR", "CTCVR"):
            low, middle, high = (float(row[f"weight_q{q}_{task}"]) for q in ("05", "50", "95"))
            assert 1 <= low <= middle <= high
            assert 0 < float(row[f"weight_ess_{task}"]) <= 1
            assert 0 <= float(row[f"weight_at_1_{task}"]) <= 1
    assert (books / "weights.png").read_bytes().startswith(b"\x89PNG")
    means = ", ".join(f"{task} {float(rows[-1][f'weight_mean_{task}']):.2f}" for task in ("CTR", "CTCVR"))
    assert f"mean weight in the last epoch: {means}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("changed", "named"), [
    ({"data": "0123456789abcdef"}, "its data is"),
    ({"field_dims": [2] * 7}, "its field_dims is"),
    ({"numerical": "none"}, "its numerical is"),
    ({"embed_dim": 16}, "do not fit"),
    ({"embed_dim": None}, "a size of None"),
    ({"embed_dim": -3}, "a size of -3"),
    ({"embed_dim": 2**30}, "do not fit"),
    ({"features": "0123456789abcdef"}, "its features are computed in another way"),
    ({"vocabulary": "0123456789abcdef"}, "its vocabulary differs"),
    ({"bottom_mlp_dims": [512]}, "do not fit"),
])
def test_critics_of_something_else_are_refused(shop: Path, changed: dict[str, Any], named: str) -> None:
    SLmain.main(**TINY, model_name="esmm")
    make_critics(**changed)
    text = user_error_message(polished)
    assert named in text
    assert "critic1.pth" in text
    assert "python3 RLmain.py" in text


def test_a_baseline_of_other_sizes_is_refused(shop: Path) -> None:
    make_critics()
    SLmain.main(**{**TINY, "embed_dim": 4}, model_name="esmm")
    with pytest.raises(UserError, match="embed_dim is 4, not 8"):
        polished()


@pytest.mark.parametrize("count", [1, 3])
def test_a_critic_for_each_task_is_needed(count: int) -> None:
    critics = [CriticNeg([5, 5], 1, 8, (16, 8), (8, 4)) for _ in range(count)]
    model = ESMM([5, 5], 1, 8, (16, 8), (8, 4), 2, 0.0)
    batch = torch.randint(5, (6, 2)), torch.randn(6, 1), torch.zeros(6, 2)
    with pytest.raises(ValueError, match=f"{count} critics for predictions"):
        RlLossPolisher(model, critics, 1.0).weights(*batch)


def test_critics_of_another_baseline_are_told(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SLmain.main(**TINY, model_name="esmm")
    make_critics()
    actor = Path("chkpt/RL/res_TD3BC_esmm/pretrain_actor.pth")
    actor.write_bytes(Path("pretrain/rt_esmm.pt").read_bytes())
    polished()
    assert "another baseline" not in capsys.readouterr().out
    SLmain.main(**TINY, model_name="esmm", learning_rate=0.01)
    polished()
    assert "trained with another baseline of esmm than today's" in capsys.readouterr().out
