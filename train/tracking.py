"""Experiment trackers, `--track`: the rows of metrics.csv, the settings and the plots of a run, written there as well.

- tensorboard: `<run>/tensorboard/`, for `tensorboard --logdir=chkpt`.
- wandb: `<run>/wandb/`, offline unless WANDB_MODE says otherwise; WANDB_DIR and WANDB_PROJECT are followed.
- mlflow: `<save_dir>/mlruns/`, unless MLFLOW_TRACKING_URI says otherwise; MLFLOW_EXPERIMENT_NAME is followed.

The packages are optional (`pip install -r requirements/tracking.txt`), and imported where they are asked for. Nothing
leaves the machine unless the user's own variables say so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common import distributed
from common.errors import UserError
from common.fileio import read_json, write_json
from common.run_dir import RunDirectory

PROJECT = "rmtl"


class Tracker(Protocol):
    """One run in a tracker. `run_id` continues an earlier one; "" begins a new one."""

    run_id: str

    def __init__(self, run_dir: RunDirectory, run_id: str) -> None: ...

    def log_settings(self, settings: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None: ...

    def log_test(self, metrics: Mapping[str, float], epoch: int) -> None: ...

    def log_plot(self, path: Path, epoch: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files of a run in a folder of their own."""

    def __init__(self, run_dir: RunDirectory, run_id: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        self.writer = SummaryWriter(str(run_dir.path / "tensorboard" / self.run_id))

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        self.writer.add_text("settings", "    " + json.dumps(settings, indent=4).replace("\n", "\n    "))

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    log_test = log_metrics

    def log_plot(self, path: Path, epoch: int) -> None:
        from matplotlib.image import imread

        self.writer.add_image(path.stem, imread(path), epoch, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb: its steps are the epochs; what is known at the end, test metrics and plots, is its summary."""

    def __init__(self, run_dir: RunDirectory, run_id: str) -> None:
        import wandb

        self.run_id, offline = run_id or uuid.uuid4().hex[:8], "WANDB_MODE" not in os.environ
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=self.run_id, name=run_dir.name, resume="allow",
            mode="offline" if offline else None, reinit="create_new",
            dir=None if "WANDB_DIR" in os.environ else run_dir.path,
            settings=wandb.Settings(console="off", silent=offline, x_transaction_log_flush_interval=1.0))  # seconds

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        self.run.config.update(dict(settings), allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(metrics), step=epoch, commit=True)

    def log_test(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.run.summary.update(dict(metrics))

    def log_plot(self, path: Path, epoch: int) -> None:
        import wandb

        self.run.summary.update({path.stem: wandb.Image(str(path))})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of mlflow; its steps are the epochs."""

    def __init__(self, run_dir: RunDirectory, run_id: str) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the store that needs no further package
            uri = (run_dir.folder.parent / "mlruns").absolute().as_uri()
        self.client, name = MlflowClient(uri), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if not run_id:
            experiment = self.client.get_experiment_by_name(name)
            run_id = self.client.create_run(experiment.experiment_id if experiment else
                                            self.client.create_experiment(name), run_name=run_dir.name).info.run_id
        self.run_id: str = run_id
        self.client.update_run(run_id, status="RUNNING")

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            self.client.log_param(self.run_id, name, value)

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run_id, [Metric(name, value, now, epoch) for name, value in metrics.items()])

    log_test = log_metrics

    def log_plot(self, path: Path, epoch: int) -> None:
        self.client.log_artifact(self.run_id, str(path))

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


BACKENDS: dict[str, tuple[type[Tracker], str, dict[str, str]]] = {
    # Class, the package that it needs, and defaults for that: no reports to its makers.
    "tensorboard": (TensorBoard, "tensorboard", {}),
    "wandb": (WeightsAndBiases, "wandb", {"WANDB_ERROR_REPORTING": "false",
                                          "WANDB_DISABLE_WEAVE": "true"}),  # it takes our `agents` for another package
    "mlflow": (MLflow, "mlflow", {"MLFLOW_DISABLE_TELEMETRY": "true"}),
}


class Trackers:
    """The trackers of a run; of several processes the main one has them. None where `names` is "".

    `track.json` in the run's folder holds what each has: a resumed run continues there, and logs nothing twice. A
    tracker that fails is dropped with one line: the run goes on.

    Args:
        names: of `BACKENDS`, with commas. Raises UserError where a package is missing.
    """

    def __init__(self, names: str) -> None:
        self.names = [name for name in dict.fromkeys(names.split(",")) if name]
        self.trackers: dict[str, Tracker] = {}
        self.state: dict[str, dict[str, Any]] = {}
        self.epoch = 0
        for name in self.names:
            _, package, variables = BACKENDS[name]
            for variable, value in variables.items():
                os.environ.setdefault(variable, value)
            if importlib.util.find_spec(package) is None:
                raise UserError(f"--track: '{name}' needs the package {package}, which is missing: pip install -r "
                                "requirements/tracking.txt")

    def start(self, run_dir: RunDirectory, settings: Mapping[str, Any]) -> None:
        """Begin the runs, or continue those of `track.json`. After `RunDirectory.start`, which moves the file of an
        earlier run away. Raises UserError where a tracker refuses."""
        self.run_dir = run_dir
        if self.names and run_dir.tracking.exists():
            self.state = read_json(run_dir.tracking)
        for name in self.names if distributed.is_main_process() else ():
            try:
                state = self.state.setdefault(name, {"run_id": "", "logged": []})
                self.trackers[name] = BACKENDS[name][0](run_dir, state["run_id"])
                state["run_id"] = self.trackers[name].run_id
            except Exception as error:
                raise UserError(f"--track: {name}: {_first_words(error)}") from error
        self._log("settings", lambda tracker: tracker.log_settings(settings))

    def log_row(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.csv under the names that it has there; those of the test split begin with "test/", and
        belong to the last epoch ("test/epoch" is that of the weights). What is not a finite number is left out."""
        metrics = {name: float(value) for name, value in row.items() if name != "split" and math.isfinite(value)}
        if row.get("split") == "test":
            metrics = {f"test/{name}": value for name, value in metrics.items()}
            self._log(f"test {self.epoch}", lambda tracker: tracker.log_test(metrics, self.epoch))
        else:
            self.epoch = int(metrics.pop("epoch"))
            self._log(f"epoch {self.epoch}", lambda tracker: tracker.log_metrics(metrics, self.epoch))

    def finish(self) -> None:
        """Log the plots of the run, and close the trackers."""
        for path in (self.run_dir.curves, self.run_dir.weights_plot):
            if path.exists():
                self._log(f"{path.name} {self.epoch}", partial(_log_plot, path, self.epoch))
        for name in list(self.trackers):
            self._call(name, lambda tracker: tracker.close())

    def _log(self, key: str, action: Callable[[Tracker], None]) -> None:
        """Let the trackers do what they have not done yet."""
        for name in list(self.trackers):
            if key not in self.state[name]["logged"] and self._call(name, action):
                self.state[name]["logged"].append(key)
        if self.names:
            write_json(self.run_dir.tracking, self.state)

    def _call(self, name: str, action: Callable[[Tracker], None]) -> bool:
        """Whether a tracker did it; one that fails is dropped."""
        try:
            action(self.trackers[name])
        except Exception as error:  # of somebody else's library: hours of training are worth more
            print(f"--track: {name} failed, and is left out from here on: {_first_words(error)}")
            del self.trackers[name]
            return False
        return True


def _log_plot(path: Path, epoch: int, tracker: Tracker) -> None:
    tracker.log_plot(path, epoch)


def _first_words(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
