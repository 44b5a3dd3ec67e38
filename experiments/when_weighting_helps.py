"""Two simulated cases in which theory says that weights of the loss must help, and what the critics' weights do there.

    python3 -m experiments.when_weighting_helps                       # minutes; chkpt/experiments
    python3 -m experiments.when_weighting_helps --out=docs/results    # the files of docs/when-weighting-helps.md

The minimizer of E[w BCE(p(x), y)] is E[w y | x] / E[w | x]: what a model reads, x, is fixed, so weights can only shift
it among rows that the model cannot tell apart. `BlindModel` reads the ids alone and cannot tell apart what the critics
can, who read the session so far as well. The cases: `bots`, whose labels are noise, and `sessions`, where a metric
counts rows unequally. Weights that count rows as the metric does (`metric_weights`) are the oracle of each case.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import RLmain
import SLmain
from agents import DDPG_ESMM
from common.csv_reader import write_csv
from common.device import set_seed
from common.errors import cli_entry_point
from common.fileio import check_writable
from dataset.loader import TensorLoader
from dataset.prepare import prepare
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.simulate import SimulationConfig, expected_return, simulate
from dataset.vocabulary import encode_splits
from env import compute_reward
from experiments.statistics import PairedTest, paired_t_test
from train.Arguments import RLArguments, Settings, option, parse
from train.offline_rl import discounted_returns
from train.plots import save_figure
from train.polish import RlLossPolisher
from train.run import get_dataset, get_model, slpred, sltrain
from train.supervised import bce_loss, evaluation_loader

Floats = NDArray[np.float64]
Row = dict[str, Any]
CASES = {"bots": ("logloss",), "sessions": ("s-Logloss", "to-come logloss")}  # the metrics that theory speaks of
MODELS = ("blind", "seeing")
MEANS = ("mean prediction", "weighted click rate", "effective sample size", "weight on bots")
METHODS = {"constant": ("constant", 1.0), "shuffled": ("shuffled", 1.0), "full": ("full", 1.0),
           "contrast": ("contrast", 0.5), "inverse": ("inverse", 1.0), "inverse, λ 10": ("inverse", 10.0)}
BOT_DIGITS, BOT_CLICKS = 3, 0.5  # of ten last digits of a visitor's number; a bot's click rate on the items it likes
SIZES: dict[str, Any] = {"embed_dim": 8, "bottom_mlp_dims": (64, 32), "tower_mlp_dims": (16, 8)}
BATCH_SIZE, LEARNING_RATE, ROLLOUTS = 2048, 2e-3, 8


@dataclass(kw_only=True)
class WeightingArguments(Settings):
    """What is run, and how much of it. Raises UserError."""

    seeds: int = option(8, "number of seeds; each has its own logs, critics and models", low=2, high=1000)
    first_seed: int = option(1, "first seed; the others are consecutive", low=0, high=2**30)
    events: int = option(200_000, "events of a simulated log, about", low=2000)
    epoch: int = option(10, "epochs of a model before it is weighted; with weights it trains for half as many", low=2)
    critic_epoch: int = option(30, "maximum epochs of the critics", low=1)
    critic_updates: int = option(200, "critic updates per epoch", low=1)
    out: str = option("chkpt/experiments", "output directory")


def is_bot(visitors: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which visitors (a session each) are bots, (n,). Numbers are random: a bot's hidden state is anybody's."""
    return visitors % 10 < BOT_DIGITS


def add_bot_clicks(raw: Path, seed: int) -> None:
    """Let the bots of a simulated log click, at random, items of every other value of a property; they never buy."""
    truth, events = pd.read_csv(raw / "truth.csv"), pd.read_csv(raw / "events.csv")
    properties = pd.concat([pd.read_csv(path, dtype={"value": str}) for path in raw.glob("item_properties_part*.csv")])
    values = properties[properties["property"].astype(str) == "785"].drop_duplicates("itemid")
    liked = truth["itemid"].isin(values["itemid"][values["value"].astype(int) % 2 == 0]).to_numpy()
    is_clicked = np.random.default_rng([seed, 5]).random(len(truth)) < BOT_CLICKS
    clicks = truth[is_bot(truth["visitorid"].to_numpy()) & liked & is_clicked].assign(event="addtocart")
    clicks["timestamp"] += 1  # ms: known when the next impression is shown
    pd.concat([events, clicks])[events.columns].to_csv(raw / "events.csv", index=False)


def metric_weights(case: str, split: RetailRocketRLDataset) -> dict[str, Floats]:
    """How each metric of a case counts the rows, (n,): `logloss` people only; `s-Logloss` a session as much as any
    other; `to-come logloss` a row by the discounted number of impressions from it on: -Q if each cost 1."""
    if case == "bots":
        return {"logloss": np.where(is_bot(split.session), 0.0, 1.0)}
    index = split.sessions
    to_come = discounted_returns(np.ones((len(split), 1), np.float32), index, RLArguments().gamma)[:, 0]
    return {"s-Logloss": np.repeat(1.0 / index.lengths, index.lengths), "to-come logloss": to_come}


def oracle_weights(case: str, train: RetailRocketRLDataset, config: SimulationConfig) -> dict[str, Floats]:
    """Weights (n,) that need the truth: those of the metrics, and what critics could know of them at best: the
    fraction of people among rows of the same past, or the true expected return."""
    weights = {f"oracle: {name}": values for name, values in metric_weights(case, train).items()}
    if case == "bots":
        position = np.arange(len(train)) - train.sessions.row_start
        clicks = np.rint(train.numerical[:, train.numerical_names.index("click_rate")] * (position + 1))
        past = pd.Series(weights["oracle: logloss"]).groupby([position.clip(max=10), clicks.clip(max=5)])
        return weights | {"oracle: by the past": past.transform("mean").to_numpy()}
    assert train.ground_truth is not None
    q = expected_return(config, train.ground_truth, RLArguments().gamma, ROLLOUTS)[:, 0]
    return weights | {"ideal Q: full": 1 - q, "ideal Q: inverse, λ 10": 1 / (1 - 10 * q)}


class BlindModel(nn.Module):
    """A model that reads the ids alone, of the numbers nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> Tensor:
        return self.model(categorical_x, torch.zeros_like(numerical_x))


class GivenWeights(RlLossPolisher):
    """Weights that are a column of the labels."""

    def __init__(self, model: nn.Module, column: int) -> None:
        super().__init__(model, [], method="constant")
        self.column = column

    def sample_weights(self, categorical_x: Tensor, numerical_x: Tensor, labels: Tensor) -> Tensor:
        return labels[:, self.column, None]


def train_critics(folder: Path, seed: int, settings: WeightingArguments) -> DDPG_ESMM:
    """The agent that the two programs make of the tables `folder`/rt: a baseline of ESMM, and its critics."""
    shared: dict[str, Any] = {"dataset_path": str(folder), "pretrain_path": str(folder / "pretrain"), "seed": seed,
                              "device": "cpu", **SIZES}
    SLmain.main(**shared, save_dir=str(folder / "SL"), learning_rate=LEARNING_RATE, epoch=2 * settings.epoch)
    return RLmain.main(RLArguments(**shared, save_dir=str(folder / "RL"), memory_path=str(folder / "memory.npz"),
                                   epoch=settings.critic_epoch, epoch_updates=settings.critic_updates))


def fit(model: nn.Module, loader: TensorLoader, polisher: RlLossPolisher, seed: int,
        rates: Mapping[int, float]) -> None:
    """Train with a polisher's weights; `rates` are the epochs and their learning rates."""
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-6, fused=True)
    for epoch, rate in rates.items():
        optimizer.param_groups[0]["lr"] = rate
        set_seed(seed, epoch)
        loader.epoch = epoch
        sltrain(model, optimizer, loader, bce_loss, "cpu", polisher)


def run_case(case: str, seed: int, settings: WeightingArguments, folder: Path) -> list[Row]:
    """Log, critics and weighted models of a case and a seed, in an empty folder; a row of metrics a model and weight.

    Every weight continues from the same initial weights with the same batches: `constant` is the control.
    """
    config = SimulationConfig(settings.events, settings.events // 25, settings.events * 4 // 5, seed)
    simulate(folder / "raw", config)
    if case == "bots":
        add_bot_clicks(folder / "raw", seed)
    prepare(folder / "raw", folder / "rt")
    critics = [critic for critic, _, _ in train_critics(folder, seed, settings).critics()][:1]  # of CTR
    splits = get_dataset("rt", folder)
    encode_splits(splits, 0.2)
    oracles = oracle_weights(case, splits.train, config)
    loader = TensorLoader(splits.train, BATCH_SIZE, seed=seed)
    given = np.column_stack([weights / weights.mean() for weights in oracles.values()]).astype(np.float32)
    loader.add_labels(given)
    first, last = settings.epoch, settings.epoch + settings.epoch // 2
    decaying = {epoch: LEARNING_RATE * (last + 1 - epoch) / (last - first) for epoch in range(first + 1, last + 1)}
    rows = []
    for name in MODELS:
        set_seed(seed)
        start = get_model("esmm", splits.train.field_dims, splits.train.numerical_num, 1, 2, **SIZES)
        start = BlindModel(start) if name == "blind" else start
        fit(start, loader, RlLossPolisher(start, [], method="constant"), seed,
            dict.fromkeys(range(1, first + 1), LEARNING_RATE))
        for number, weights in enumerate((*METHODS, *oracles)):
            model = copy.deepcopy(start)
            if weights in METHODS:
                method, lambda_ = METHODS[weights]
                polisher = RlLossPolisher(model, critics, lambda_, method, normalize=True)
            else:
                polisher = GivenWeights(model, splits.train.labels.shape[1] + number - len(METHODS))
            fit(model, loader, polisher, seed, decaying)
            rows.append({"case": case, "seed": seed, "model": name, "weights": weights,
                         **measure(case, model, splits, polisher.sample_weights(*loader.tensors)[:, 0].numpy())})
    return rows


def measure(case: str, model: nn.Module, splits: Splits, weights: NDArray[np.float32]) -> dict[str, float]:
    """Test metrics of a model's CTR and its mean prediction; and of its weights (n,) of the training rows: the weighted
    click rate, towards which the mean prediction of a blind model moves, effective sample size, fraction on bots' rows.
    """
    train, test, w = splits.train, splits.test, weights.astype(np.float64)
    labels, counted = test.labels[:, 0], metric_weights(case, test)
    p = slpred(model, evaluation_loader(model, test, torch.device("cpu")), 1, "cpu")[0]
    losses, rows = -compute_reward(p, labels, "bce"), counted[CASES[case][0]] > 0
    values = [p[rows].mean(), np.average(train.labels[:, 0], weights=w), w.sum() ** 2 / (len(w) * (w**2).sum()),
              *([np.average(is_bot(train.session), weights=w)] if case == "bots" else [])]
    return {**{name: float(np.average(losses, weights=row_weights)) for name, row_weights in counted.items()},
            "AUC": float(roc_auc_score(labels[rows], p[rows])), **dict(zip(MEANS, map(float, values), strict=False))}


def paired(rows: Sequence[Row], case: str, model: str, weights: str, metric: str) -> PairedTest:
    """The difference of a metric from constant weights over the seeds, in 10⁻³."""
    values, control = ([1000 * row[metric] for row in rows if (row["case"], row["model"], row["weights"])
                        == (case, model, name)] for name in (weights, "constant"))
    return paired_t_test(values, control)


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for each case and model: differences from constant weights (×10⁻³, 95 % interval), and seed means."""
    lines = []
    for case, model in itertools.product(CASES, MODELS):
        table = pd.DataFrame([row for row in rows if (row["case"], row["model"]) == (case, model)])
        averages = table.groupby("weights", sort=False).mean(numeric_only=True)
        tested, means = [*CASES[case], "AUC"], [name for name in averages if name in MEANS]
        lines += [f"\n{case}, {model} model\n", "| weights | " + " | ".join([*tested, *means]) + " |",
                  "|---" * (1 + len(tested) + len(means)) + "|"]
        for name, average in averages.iterrows():
            tests = [paired(rows, case, model, str(name), metric) for metric in tested]
            cells = ([f"{average[metric]:.4f}" for metric in tested] if name == "constant" else
                     [f"{test.mean:+.2f} ({test.low:+.2f} to {test.high:+.2f})" for test in tests])
            lines.append(f"| {name} | " + " | ".join([*cells, *(f"{average[mean]:.3f}" for mean in means)]) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel a metric: differences from constant weights with their intervals, of the blind and the seeing model."""
    panels = [(case, metric) for case, metrics in CASES.items() for metric in metrics]
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    for axis, (case, metric) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        names = list(dict.fromkeys(row["weights"] for row in rows if row["case"] == case))[1:]
        for shift, (model, color) in enumerate(zip(MODELS, ("tab:blue", "tab:orange"), strict=True)):
            tests = [paired(rows, case, model, name, metric) for name in names]
            axis.errorbar([test.mean for test in tests], np.arange(len(names)) + 0.3 * shift - 0.15, fmt="o",
                          xerr=[test.high - test.mean for test in tests], color=color, label=f"{model} model")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks((-100, -10, -1, 0, 1, 10, 100), ("-100", "-10", "-1", "0", "+1", "+10", "+100"))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(f"{case}: {metric}", fontsize=10)
        axis.set_xlabel("difference from constant weights (×10⁻³)\nlogarithmic, but linear from -1 to +1")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


@cli_entry_point
def cli() -> None:
    settings = parse(WeightingArguments, __doc__ or "")
    torch.set_num_threads(1)
    out, rows = Path(settings.out), list[Row]()
    check_writable(out)
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                rows += run_case(case, seed, settings, Path(folder))
            print(f"seed {seed}, {case}: done", flush=True)
    write_csv(out / "when_weighting_helps.csv", rows)
    plot(rows, out / "when_weighting_helps.png")
    print(to_markdown(rows))
    print(f"\nwrote when_weighting_helps.csv and when_weighting_helps.png to {out}")


if __name__ == "__main__":
    cli()
