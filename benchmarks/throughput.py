"""One benchmark in a separate process; prints one line of JSON. `python3 -m benchmarks` runs all of them.

    python3 -m benchmarks.throughput train rmtl esmm
    python3 -m benchmarks.throughput train rechub esmm  # needs pip install --no-deps -r requirements/bench.txt

RMTL and torch-rechub 0.9.0 train on the same rows, with the same batch size, widths, dropout and optimizer, in the
loops that their users call. RMTL also reads the six session features; torch-rechub's ESMM has no input for them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agents import DDPG_ESMM_BC
from common.csv_reader import read_table
from common.device import pick_device, set_seed
from common.errors import cli_entry_point, command_line
from dataset.loader import TensorLoader
from dataset.prepare import prepare
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.simulate import SimulationConfig
from dataset.vocabulary import Catemapper, encode_splits
from env import MTEnv
from slmodels.model_file import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, save_model
from train.Arguments import SLArguments
from train.offline_rl import collect_transitions
from train.run import get_dataset, get_model, sltrain
from train.supervised import EVALUATION_BATCH, evaluate

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH, EMBED_DIM, EXPERTS, DROPOUT = 2048, 128, 8, 0.2
LEARNING_RATE, WEIGHT_DECAY, SEED = 1e-3, 1e-6, 2022
TRAINING_ROWS = 20 * BATCH
FULL_SCALE = SimulationConfig(events=2_756_101, items=417_053, property_rows=20_275_902)  # as RetailRocket
MODELS = {"esmm": "ESMM", "mmoe": "MMoE", "ple": "PLE"}
COMMANDS = (["SLmain.py", "--model_name=esmm"], ["RLmain.py"], ["SLmain.py", "--model_name=ple", "--polish=1"])
Metrics = dict[str, float]


def time_call(action: Callable[[], Any]) -> float:
    """Seconds of a call, with its output suppressed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        action()
        return time.perf_counter() - start


def throughput(action: Callable[[], Any], amount: float, repeats: int = 1) -> float:
    """Amount per second, after one warm-up call."""
    time_call(action)
    return amount * repeats / sum(time_call(action) for _ in range(repeats))


def load_data(folder: Path, numerical: str = "rates") -> Splits:
    """The default simulated data with mapped ids, created in `folder` on first use."""
    splits = get_dataset("rt", str(folder), numerical)
    encode_splits(splits, 0.2)
    return splits


def subset(split: RetailRocketRLDataset, rows: np.ndarray[Any, Any]) -> RetailRocketRLDataset:
    """The given rows of a mapped split."""
    chosen = object.__new__(RetailRocketRLDataset)
    chosen.session, chosen.labels, chosen.numerical = split.session[rows], split.labels[rows], split.numerical[rows]
    chosen.keys, chosen.history_key = {}, ""
    chosen.set_ids(split.categorical[rows], split.field_dims)
    return chosen


# ------------------------------------------------------------------------------------------------------------ models


def train(folder: Path, implementation: str, name: str) -> Metrics:
    """Training throughput, and the floating-point operations per row of a training step."""
    split = load_data(folder).train
    rows = subset(split, np.arange(min(len(split), TRAINING_ROWS)))
    target = IMPLEMENTATIONS[implementation](name, rows)
    with FlopCounterMode(display=False) as counter:
        target.train_step()
    return {"rows_per_s": throughput(target.train_epoch, len(rows)),
            "flop_per_row": counter.get_total_flops() / min(len(rows), BATCH)}


def evaluate_distinct(folder: Path, implementation: str, name: str) -> Metrics:
    """Evaluation throughput on distinct rows."""
    split = load_data(folder).test
    distinct = subset(split, np.sort(TensorLoader(split, BATCH).unique_rows[0].numpy()))
    return {"rows_per_s": throughput(IMPLEMENTATIONS[implementation](name, distinct).evaluate, len(distinct), 3)}


def evaluate_repeating(folder: Path, implementation: str, name: str) -> Metrics:
    """Evaluation throughput on the published features, with which rows repeat."""
    split = load_data(folder, "none").test
    rows = subset(split, np.arange(len(split)))
    return {"rows_per_s": throughput(IMPLEMENTATIONS[implementation](name, rows).evaluate, len(split), 3)}


class BenchTarget(NamedTuple):
    """The calls that are timed."""

    train_step: Callable[[], Any]
    train_epoch: Callable[[], Any]
    evaluate: Callable[[], Any]


def rmtl(name: str, rows: RetailRocketRLDataset) -> BenchTarget:
    device = pick_device("cpu")
    set_seed(SEED)
    model = get_model(name, rows.field_dims, rows.numerical_num, 2, EXPERTS, EMBED_DIM)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    loader, one_batch = (TensorLoader(subset(rows, np.arange(len(rows))[:count]), BATCH, device, SEED)
                         for count in (None, BATCH))
    held_out, criterion = TensorLoader(rows, EVALUATION_BATCH, device), nn.BCELoss(reduction="none")
    return BenchTarget(lambda: sltrain(model, optimizer, one_batch, criterion, device),
                       lambda: sltrain(model, optimizer, loader, criterion, device),
                       lambda: evaluate(model, held_out, 2, device))


def rechub(name: str, rows: RetailRocketRLDataset) -> BenchTarget:
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.multi_task import ESMM, MMOE, PLE
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    set_seed(SEED)
    features = [SparseFeature(str(f), size, EMBED_DIM) for f, size in enumerate(rows.field_dims)]
    tasks = ["classification"] * 2
    labels = rows.labels
    expert: dict[str, Any] = {"dims": list(BOTTOM_MLP_DIMS), "dropout": DROPOUT}
    towers: list[dict[str, Any]] = [{"dims": list(TOWER_MLP_DIMS), "dropout": DROPOUT}] * 2
    if name == "esmm":
        tower: dict[str, Any] = {"dims": [*BOTTOM_MLP_DIMS, *TOWER_MLP_DIMS], "dropout": DROPOUT}
        model = ESMM(features[:1], features[1:], dict(tower), dict(tower))
        tasks, labels = ["classification"] * 3, np.column_stack([labels[:, 1], labels])  # CVR, CTR, CTCVR
    elif name == "mmoe":
        model = MMOE(features, tasks, EXPERTS, expert, towers)
    else:
        model = PLE(features, tasks, 1, EXPERTS // 2, EXPERTS // 2, expert, towers)
    adam = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    trainer = MTLTrainer(model, tasks, optimizer_params=adam, device="cpu")

    def loader(count: int, batch: int) -> Any:
        x = {str(f): rows.categorical[:count, f] for f in range(len(rows.field_dims))}
        unused = {key: value[:2] for key, value in x.items()}, labels[:2]
        return DataGenerator(x, labels[:count]).generate_dataloader(*unused, *unused, batch_size=batch)[0]

    one_batch, every_batch = loader(BATCH, BATCH), loader(len(rows), BATCH)
    held_out = loader(len(rows), EVALUATION_BATCH)
    return BenchTarget(lambda: trainer.train_one_epoch(one_batch), lambda: trainer.train_one_epoch(every_batch),
                       lambda: trainer.evaluate(model, held_out))


IMPLEMENTATIONS = {"rmtl": rmtl, "rechub": rechub}


# ------------------------------------------------------------------------------------------------ hardware, data and RL


def peak_gemm(_folder: Path) -> Metrics:
    """FLOP/s of a product of 2,048 x 768 with 768 x 512, by MKL and by oneDNN."""
    pick_device("cpu")
    x, weight = torch.randn(2048, 768), torch.randn(512, 768)
    nchw = x[None, None].permute(0, 3, 1, 2)
    flop = 2.0 * x.numel() * len(weight)
    return {"mkl": throughput(lambda: [F.linear(x, weight) for _ in range(50)], 50 * flop, 3),
            "onednn": throughput(lambda: [F.conv2d(nchw, weight[:, :, None, None]) for _ in range(50)], 50 * flop, 3)}


def sessions(folder: Path) -> Metrics:
    """Throughput from the tables in memory to an environment: order, features, ids, sessions."""
    splits = load_data(folder)
    names, labels = splits.manifest["categorical"], [task["label"] for task in splits.manifest["tasks"]]
    schema: dict[str, Any] = {"timestamp": "id", "sessionid": "id", "itemid": "id", **dict.fromkeys(labels, "label"),
                             **{f"{name}_time": "optional_id" for name in labels}}
    table = read_table(folder / "rt" / "train.csv", schema)
    items = read_table(folder / "rt" / "item_feadf.csv", {"itemid": "id", **dict.fromkeys(names, "optional_text")})
    mapper = Catemapper(0.2).fit(splits.train)

    def build() -> MTEnv:
        return MTEnv(mapper.map(RetailRocketRLDataset(table, items, names, labels)))

    return {"rows_per_s": throughput(build, len(table), 5),
            "from_arrays": throughput(lambda: MTEnv(splits.train), len(table), 20)}


def make_agent(folder: Path, **hyparams: Any) -> DDPG_ESMM_BC:
    train_split = load_data(folder).train
    device = pick_device("cpu")
    set_seed(SEED)
    actor = get_model("esmm", train_split.field_dims, train_split.numerical_num, 2, EXPERTS, EMBED_DIM)
    with tempfile.TemporaryDirectory() as pretrain:
        metadata = SLArguments(expert_num=EXPERTS, embed_dim=EMBED_DIM).metadata("esmm", train_split.metadata)
        save_model(Path(pretrain) / "rt_esmm.pt", actor, metadata)
        return DDPG_ESMM_BC(MTEnv(train_split), "esmm", pretrain_path=pretrain, device=device, **hyparams)


def replay_buffer(folder: Path) -> Metrics:
    """Transitions per second into the replay buffer, with uniform actions and with those of the actor."""
    agent, rng = make_agent(folder), np.random.default_rng(SEED)
    rows = len(load_data(folder).train)

    def uniform_actions(states: Any) -> Any:
        return rng.random((len(states), 2), np.float32)

    return {"rows_per_s": throughput(lambda: collect_transitions(agent, uniform_actions), rows, 5),
            "with_actor": throughput(lambda: collect_transitions(agent, agent.select_action), rows, 3)}


def critics(folder: Path) -> Metrics:
    """Throughput of updates of both critics, with batch 2,048 and the default 512."""
    metrics = {}
    for batch in (BATCH, 512):
        agent = make_agent(folder, batch_size=batch)
        collect_transitions(agent, agent.select_action)
        updates = 20 * BATCH // batch
        metrics["rows_per_s" if batch == BATCH else f"batch_{batch}"] = throughput(
            lambda agent=agent, updates=updates: [agent.update() for _ in range(updates)],  # type: ignore[misc]
            updates * batch, 2)
    return metrics


def full_scale_prepare(folder: Path) -> Metrics:
    """Seconds and memory of dataset.prepare with as many rows as RetailRocket."""
    if not (folder / "real").exists():  # in a separate process, whose memory does not count
        sizes = [f"--{name}={getattr(FULL_SCALE, name)}" for name in ("events", "items", "property_rows")]
        subprocess.run([sys.executable, "-m", "dataset.simulate", "--out", str(folder / "real"), *sizes],
                       cwd=REPOSITORY, check=True, capture_output=True)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        elapsed = time_call(lambda: prepare(folder / "real", Path(out) / "rt"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": elapsed, "rows_per_s": (FULL_SCALE.events + FULL_SCALE.property_rows) / elapsed, "gib": peak}


def commands(folder: Path) -> Metrics:
    """Seconds of the three commands in an empty directory."""
    metrics: Metrics = {}
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        for program, *flags in COMMANDS:
            elapsed = time_call(lambda program=program, flags=flags: subprocess.run(  # type: ignore[misc]
                [sys.executable, str(REPOSITORY / program), *flags], cwd=empty, check=True, capture_output=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)}))
            metrics[" ".join([program, *flags])] = elapsed
    return {"seconds": sum(metrics.values()), **metrics}


BENCHMARKS: dict[str, Callable[..., Metrics]] = {benchmark.__name__: benchmark for benchmark in (
    peak_gemm, train, evaluate_distinct, evaluate_repeating, sessions, replay_buffer, critics, full_scale_prepare,
    commands)}


def cache_folder() -> Path:
    """The directory of the data sets of all benchmarks, in $RMTL_BENCH or the system's temporary directory."""
    folder = Path(os.environ.get("RMTL_BENCH", tempfile.gettempdir())) / "rmtl-bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(prog=command_line([]), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        subcommand = subcommands.add_parser(name, help=benchmark.__doc__, description=benchmark.__doc__)
        if benchmark in (train, evaluate_distinct, evaluate_repeating):
            subcommand.add_argument("implementation", choices=IMPLEMENTATIONS)
            subcommand.add_argument("name", choices=MODELS)
    arguments = vars(parser.parse_args())
    print(json.dumps(BENCHMARKS[arguments.pop("benchmark")](cache_folder(), **arguments)))


if __name__ == "__main__":
    main()
