"""One measurement, in a process of its own; prints one line of JSON. `bench.__main__` runs them all.

    python3 -m bench.measure train ours esmm
    python3 -m bench.measure train peer esmm   # torch-rechub 0.9.0: pip install --no-deps -r requirements-bench.txt

Both sides get the same rows, batch, widths, dropout and optimizer, and run the loops that their users run. Ours reads
the six numbers of the session so far besides the seven fields; the peer's ESMM has no place for numbers.
"""

from __future__ import annotations

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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agents import DDPG_ESMM_BC
from common.csv_reader import read_table
from common.device import pick_device, set_seed
from dataset.loader import TensorLoader
from dataset.prepare import prepare
from dataset.rtrl import RetailRocketRLDataset, Splits
from dataset.simulate import SimulationConfig
from dataset.vocabulary import Catemapper, encode_splits
from env import MTEnv
from slmodels.model_file import BOTTOM_MLP_DIMS, TOWER_MLP_DIMS, save_model
from train.Arguments import SLArguments
from train.offline_rl import collect_transitions
from train.run import DROPOUT, get_dataset, get_model, sltrain
from train.supervised import EVALUATION_BATCH, evaluate

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH, EMBED_DIM, EXPERTS, LEARNING_RATE, WEIGHT_DECAY, SEED = 2048, 128, 8, 1e-3, 1e-6, 2022
TRAINING_ROWS = 20 * BATCH
REAL = SimulationConfig(events=2_756_101, items=417_053, property_rows=20_275_902)  # of the RetailRocket files
COMMANDS = (["SLmain.py", "--model_name=esmm"], ["RLmain.py"], ["SLmain.py", "--model_name=ple", "--polish=1"])
Figures = dict[str, float]


def seconds(action: Callable[[], Any]) -> float:
    """How long an action takes, its prints unseen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        action()
        return time.perf_counter() - start


def rate(action: Callable[[], Any], amount: float, repeats: int = 1) -> float:
    """Amount a second, after one run to warm up."""
    seconds(action)
    return amount * repeats / sum(seconds(action) for _ in range(repeats))


def data(folder: Path, numerical: str = "session") -> Splits:
    """The default simulated data, made in `folder` on first use, mapped as by default."""
    splits = get_dataset("rt", str(folder), numerical)
    encode_splits(splits, 0.2)
    return splits


def part(split: RetailRocketRLDataset, rows: np.ndarray[Any, Any]) -> RetailRocketRLDataset:
    """Some rows of a mapped split."""
    chosen = object.__new__(RetailRocketRLDataset)
    chosen.session, chosen.labels, chosen.numerical = split.session[rows], split.labels[rows], split.numerical[rows]
    chosen.set_ids(split.categorical[rows], split.field_dims)
    return chosen


# ---------------------------------------------------------------------------------------------- models, ours and theirs


def train(folder: Path, side: str, name: str) -> Figures:
    """Training rows a second, and the floating-point operations that a step executes for each row."""
    split = data(folder).train
    rows = part(split, np.arange(min(len(split), TRAINING_ROWS)))
    step, epoch = SIDES[side](name, rows)[:2]
    with FlopCounterMode(display=False) as counter:
        step()
    return {"rows_per_s": rate(epoch, len(rows)), "flop_per_row": counter.get_total_flops() / min(len(rows), BATCH)}


def evaluate_distinct(folder: Path, side: str, name: str) -> Figures:
    """Evaluated rows a second, with no two rows alike."""
    split = data(folder).test
    first = TensorLoader(split, BATCH).unique_rows[0].numpy()
    return {"rows_per_s": rate(SIDES[side](name, part(split, np.sort(first)))[2], len(first), 3)}


def evaluate_repeating(folder: Path, side: str, name: str) -> Figures:
    """Evaluated rows a second, published features: the same items come again and again."""
    split = data(folder, "none").test
    return {"rows_per_s": rate(SIDES[side](name, part(split, np.arange(len(split))))[2], len(split), 3)}


Run = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]  # one step, an epoch of training, an evaluation


def ours(name: str, rows: RetailRocketRLDataset) -> Run:
    device = pick_device("cpu")
    set_seed(SEED)
    model = get_model(name, rows.field_dims, rows.numerical_num, 2, EXPERTS, EMBED_DIM)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    loader, few = (TensorLoader(part(rows, np.arange(len(rows))[:count]), BATCH, device, SEED) for count in (None, BATCH))
    held_out, criterion = TensorLoader(rows, EVALUATION_BATCH, device), nn.BCELoss(reduction="none")
    return (lambda: sltrain(model, optimizer, few, criterion, device),
            lambda: sltrain(model, optimizer, loader, criterion, device),
            lambda: evaluate(model, held_out, 2, device))


def peer(name: str, rows: RetailRocketRLDataset) -> Run:
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
        whole: dict[str, Any] = {"dims": [*BOTTOM_MLP_DIMS, *TOWER_MLP_DIMS], "dropout": DROPOUT}
        model = ESMM(features[:1], features[1:], dict(whole), dict(whole))
        tasks, labels = ["classification"] * 3, np.column_stack([labels[:, 1], labels])  # CVR, CTR, CTCVR
    elif name == "mmoe":
        model = MMOE(features, tasks, EXPERTS, expert, towers)
    else:
        model = PLE(features, tasks, 1, EXPERTS // 2, EXPERTS // 2, expert, towers)
    adam = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    trainer = MTLTrainer(model, tasks, optimizer_params=adam, device="cpu")

    def loader(count: int, batch: int) -> Any:
        x = {str(f): rows.categorical[:count, f] for f in range(len(rows.field_dims))}
        some = {key: value[:2] for key, value in x.items()}
        return DataGenerator(x, labels[:count]).generate_dataloader(some, labels[:2], some, labels[:2],
                                                                    batch_size=batch)[0]

    few, many, held_out = loader(BATCH, BATCH), loader(len(rows), BATCH), loader(len(rows), EVALUATION_BATCH)
    return (lambda: trainer.train_one_epoch(few), lambda: trainer.train_one_epoch(many),
            lambda: trainer.evaluate(model, held_out))


SIDES = {"ours": ours, "peer": peer}


# --------------------------------------------------------------------------------------------- the machine, data and RL


def matrix_rate() -> Figures:
    """Floating-point operations a second in a product of 2,048 x 768 with 768 x 512, by torch's two libraries."""
    pick_device("cpu")
    x, weight = torch.randn(2048, 768), torch.randn(512, 768)
    image = x[None, None].permute(0, 3, 1, 2)
    work = 2.0 * x.numel() * len(weight)
    return {"mkl": rate(lambda: [F.linear(x, weight) for _ in range(50)], 50 * work, 3),
            "onednn": rate(lambda: [F.conv2d(image, weight[:, :, None, None]) for _ in range(50)], 50 * work, 3)}


def sessions(folder: Path) -> Figures:
    """Rows a second from the tables as read to an environment: order, features, ids, sessions."""
    splits = data(folder)
    names, labels = splits.manifest["categorical"], [task["label"] for task in splits.manifest["tasks"]]
    kinds: dict[str, Any] = {"timestamp": "id", "sessionid": "id", "itemid": "id", **dict.fromkeys(labels, "label"),
                             **{f"{name}_time": "optional_id" for name in labels}}
    table = read_table(folder / "rt" / "train.csv", kinds)
    items = read_table(folder / "rt" / "item_feadf.csv", {"itemid": "id", **dict.fromkeys(names, "optional_text")})
    mapper = Catemapper(0.2).fit(splits.train)
    built = splits.train
    return {"rows_per_s": rate(lambda: MTEnv(mapper.map(RetailRocketRLDataset(table, items, names, labels))),
                               len(table), 5),
            "from_arrays": rate(lambda: MTEnv(built), len(table), 20)}


def agent_of(folder: Path, **hyparams: Any) -> DDPG_ESMM_BC:
    train_split = data(folder).train
    device = pick_device("cpu")
    set_seed(SEED)
    actor = get_model("esmm", train_split.field_dims, train_split.numerical_num, 2, EXPERTS, EMBED_DIM)
    with tempfile.TemporaryDirectory() as pretrain:
        metadata = SLArguments(expert_num=EXPERTS, embed_dim=EMBED_DIM).metadata("esmm", train_split.metadata)
        save_model(Path(pretrain) / "rt_esmm.pt", actor, metadata)
        return DDPG_ESMM_BC(MTEnv(train_split), "esmm", pretrain_path=pretrain, device=device, **hyparams)


def memory(folder: Path) -> Figures:
    """Transitions a second through the vector environment into the replay buffer: uniform actions, or the actor's."""
    agent, rng = agent_of(folder), np.random.default_rng(SEED)
    rows = len(data(folder).train)
    return {"rows_per_s": rate(lambda: collect_transitions(agent, lambda state: rng.random((len(state), 2), np.float32)), rows, 5),
            "with_actor": rate(lambda: collect_transitions(agent, agent.select_action), rows, 3)}


def critics(folder: Path) -> Figures:
    """Rows a second in updates of both critics, batch 2,048 and the default 512."""
    figures = {}
    for batch in (BATCH, 512):
        agent = agent_of(folder, batch_size=batch)
        collect_transitions(agent, agent.select_action)
        updates = 20 * BATCH // batch
        figures["rows_per_s" if batch == BATCH else f"batch_{batch}"] = rate(
            lambda agent=agent, updates=updates: [agent.update() for _ in range(updates)],  # type: ignore[misc]
            updates * batch, 2)
    return figures


def real_size(folder: Path) -> Figures:
    """Seconds and memory of dataset.prepare on as many rows as RetailRocket has."""
    if not (folder / "real").exists():  # by a process of its own: its memory is not prepare's
        sizes = [f"--{name}={getattr(REAL, name)}" for name in ("events", "items", "property_rows")]
        subprocess.run([sys.executable, "-m", "dataset.simulate", "--out", str(folder / "real"), *sizes],
                       cwd=REPOSITORY, check=True, capture_output=True)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        took = seconds(lambda: prepare(folder / "real", Path(out) / "rt"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": took, "rows_per_s": (REAL.events + REAL.property_rows) / took, "gib": peak}


def commands(folder: Path) -> Figures:
    """Seconds of the three commands, in an empty folder."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        for program, *flags in COMMANDS:
            took = seconds(lambda program=program, flags=flags: subprocess.run(  # type: ignore[misc]
                [sys.executable, str(REPOSITORY / program), *flags], cwd=empty, check=True, capture_output=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)}))
            figures[" ".join([program, *flags])] = took
    return {"seconds": sum(figures.values()), **figures}


def main(work: str, *more: str) -> None:
    folder = Path(os.environ.get("RMTL_BENCH", tempfile.gettempdir())) / "rmtl-bench"
    folder.mkdir(parents=True, exist_ok=True)
    works: dict[str, Callable[..., Figures]] = {
        "train": train, "evaluate_distinct": evaluate_distinct, "evaluate_repeating": evaluate_repeating,
        "sessions": sessions, "memory": memory, "critics": critics, "real_size": real_size, "commands": commands}
    print(json.dumps(matrix_rate() if work == "matrix_rate" else works[work](folder, *more)))


if __name__ == "__main__":
    main(*sys.argv[1:])
