"""Where runs write: every path rule, and the files of a run with what `--resume` needs.

    <pretrain_path>/<dataset>_<model>.pt               a baseline
    <save_dir>/<dataset>_<model>/                      a supervised run, with <dataset>_<model>_<lambda>.pt
    <save_dir>/res_<agent>[_<dataset>]_<actor>/        an agent, with critic1.pth and its other networks
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import distributed
from common.errors import UserError, command_line, mark_run_started, truncate
from common.fileio import read_json, write_json

AGENT_DIR_NAMES = {"bc": "TD3BC", "td3bc": "TD3BCactor", "ddpg": "DDPG", "multiweight": "DDPGmw"}
MUTABLE_ON_RESUME = ("resume", "data", "device", "epoch", "refill", "track")  # settings that a resumed run may change


def critic_names(task_num: int) -> list[str]:
    """The names of an agent's critics, one a task: critic1, critic2, ..."""
    return [f"critic{number}" for number in range(1, task_num + 1)]


def network_names(task_num: int) -> list[str]:
    """The names of all networks of an agent, of its attributes and files."""
    critics = critic_names(task_num)
    return ["pretrain_actor", "actor", "actor_target", *critics, *(f"{critic}_target" for critic in critics)]


def model_stem(model_name: str, encoder: str) -> str:
    """The name of a model in file names: `esmm`, and with an encoder `esmm_gru`."""
    return model_name if encoder == "none" else f"{model_name}_{encoder}"


def baseline_path(pretrain_path: str | Path, dataset_name: str, model_name: str, encoder: str = "none") -> Path:
    """The file of a baseline: `<pretrain_path>/<dataset>_<model>.pt`."""
    return Path(pretrain_path) / f"{dataset_name}_{model_stem(model_name, encoder)}.pt"


def agent_dir(save_dir: str | Path, dataset_name: str, agent: str, actor_stem: str) -> Path:
    """`<save_dir>/res_<agent>_<actor>`, for data sets other than rt `res_<agent>_<dataset>_<actor>`.

    agent: a key of `AGENT_DIR_NAMES`.
    """
    dataset = "" if dataset_name == "rt" else f"{dataset_name}_"
    return Path(save_dir) / f"res_{AGENT_DIR_NAMES[agent]}_{dataset}{actor_stem}"


def network_path(agent_dir: str | Path, name: str) -> Path:
    """The file of one of `network_names`."""
    return Path(agent_dir) / f"{name}.pth"


class RunDirectory:
    """The files of a run: config.json, metrics.csv, plots and checkpoint.pt in `path`, the best model in `folder`.

    All of them are of one run. A new run moves what an earlier one left to `*.previous.*`. A resumed run moves the
    metrics, which are written at its end. So metrics.csv belongs to config.json, or is missing.

    Args:
        folder: where the best model `<name>.pt` is written.
        name: of the run.
        path: where everything else is written; default `folder`.
    """

    def __init__(self, folder: Path, name: str, path: Path | None = None) -> None:
        self.folder, self.name, self.path = folder, name, path or folder
        self.model = folder / f"{name}.pt"
        self.last_model = folder / f"{name}_last.pt"  # of a polish run: the last epoch's
        self.checkpoint = self.path / "checkpoint.pt"
        self.shards = self.path / "checkpoint.dcp"  # with --shard_embeddings: the folder of the tables
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.csv"
        self.test_metrics = self.path / "test.csv"  # of an agent's actor
        self.curves = self.path / "curves.png"
        self.weights_plot = self.path / "weights.png"
        self.weight_deciles = self.path / "weights.csv"
        self.catemapper = self.path / "catemapper.json"
        self.tracking = self.path / "track.json"  # of a run with --track: what the trackers have
        self.files = [self.checkpoint, self.metrics, self.test_metrics, self.curves, self.weights_plot,
                      self.weight_deciles, self.catemapper, self.model, self.last_model, self.tracking, self.config]

    @classmethod
    def of_agent(cls, folder: Path) -> RunDirectory:
        """That of an agent, by its folder."""
        return cls(folder, folder.name)

    def start(self, settings: Mapping[str, Any], manifest: Mapping[str, Any], fingerprint: str,
              origin: Mapping[str, str], resume: bool) -> dict[str, Any] | None:
        """Write config.json, and return the checkpoint to resume from, or None.

        Without `resume` the files of an earlier run are moved to `checkpoint.previous.pt`, `metrics.previous.csv` ...

        Args:
            settings: of this run.
            manifest, fingerprint: of the data.
            origin: hashes of what the run starts from: `start`, the weights; of a polish run `critics`, too.
            resume: resume from `checkpoint.pt`. Raises UserError if its settings, data or origin are others.
        """
        import torch

        checkpoint = self._load_checkpoint(settings, fingerprint, origin) if resume else None
        if distributed.is_main_process():
            existing = [path for path in ([self.metrics, self.test_metrics] if checkpoint else self.files)
                        if path.exists()]
            for path in existing:
                os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
            if checkpoint is None and self.shards.exists():
                previous = self.shards.with_name("checkpoint.previous.dcp")
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(self.shards, previous)
            if self.checkpoint in existing:
                print(f"{self.path}: existing run moved to *.previous.* (--resume continues a run of the same settings)"
                      "\n")
        distributed.barrier()
        write_json(self.config, {"command": command_line(), "settings": dict(settings),
                                 "torch": torch.__version__, "threads": torch.get_num_threads(), **origin,
                                 "data_fingerprint": fingerprint, "data": dict(manifest)})
        mark_run_started()
        return checkpoint

    def _load_checkpoint(self, settings: Mapping[str, Any], fingerprint: str,
                         origin: Mapping[str, str]) -> dict[str, Any] | None:
        """The checkpoint of a run of these settings, data and origin; None where there is none. Raises UserError."""
        from common.checkpoint import load_tensors, strict_equal

        if not self.checkpoint.exists():
            print(f"{self.path}: nothing to resume: starting from the first epoch")
            return None
        hint = "run without --resume to start a new run"
        saved = load_tensors(self.checkpoint, hint)
        if saved.get("fingerprint") != fingerprint:
            raise UserError(f"{self.checkpoint}: checkpoint is of other data: {hint}")
        saved_settings = saved.get("settings")
        saved_settings = saved_settings if isinstance(saved_settings, dict) else {}
        changed = [name for name, value in settings.items()
                   if not strict_equal(saved_settings.get(name), value) and name not in MUTABLE_ON_RESUME]
        if changed:
            raise UserError(f"{self.checkpoint}: checkpoint has --{changed[0]}="
                            f"{truncate(saved_settings.get(changed[0]))}, not {settings[changed[0]]}: use the same "
                            f"settings, or {hint}")
        epoch, should_continue, history = (saved.get(name) for name in ("epoch", "should_continue", "history"))
        if (type(epoch) is not int or not isinstance(should_continue, bool) or not isinstance(history, list)
                or not history or not all(isinstance(row, dict) and "epoch" in row for row in history)):
            raise UserError(f"{self.checkpoint}: not the checkpoint of a run: {hint}")
        saved_origin = saved.get("origin")
        for name, digest in origin.items():
            if not isinstance(saved_origin, dict) or saved_origin.get(name) != digest:
                what = {"start": "a different baseline", "critics": "different critics"}[name]
                raise UserError(f"{self.checkpoint}: checkpoint was started from {what}: {hint}")
        if saved_settings.get("shard_embeddings"):
            from common.sharded_checkpoint import read_shards

            return read_shards(self.shards, saved, hint)
        return saved

    def save_checkpoint(self, value: Mapping[str, Any]) -> None:
        """Write checkpoint.pt, and what is sharded in it to the folder beside it."""
        from common.checkpoint import save_tensors

        value = dict(value)
        if distributed.world_size() > 1:
            from common.sharded_checkpoint import write_shards

            value = write_shards(self.shards, value)
        save_tensors(self.checkpoint, value)

    @contextlib.contextmanager
    def resume_errors(self) -> Iterator[None]:
        """While a run takes over the checkpoint. Raises UserError where that is the checkpoint of something else."""
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{self.checkpoint}: not the checkpoint of such a run ({reason}): run without --resume to "
                            "start a new run") from error

    def read_config(self) -> dict[str, Any]:
        """Read config.json. Raises UserError."""
        config = read_json(self.config)
        if not isinstance(config.get("settings"), dict) or not isinstance(config.get("start"), str):
            raise UserError(f"{self.config}: not the config of a run: 'settings' or 'start' is missing")
        return config
