"""Search for settings of a baseline by its validation score, with Optuna: the best ones are printed as a command line.

    python3 -m experiments.tune --model_name=ple --trials=50    # chkpt/tune/rt_ple
    python3 -m experiments.tune --model_name=ple --trials=50 --space=learning_rate,dropout --embed_dim=32

A trial trains as `SLmain.py` does, without its test: its value is what early stopping maximizes, the mean validation
AUC. The first trial has the settings as they are given. Then TPE proposes settings out of `SPACE`, and the median rule
stops bad trials early; every other flag of `SLmain.py` is a fixed setting. The study is a journal file: the same
command resumes it until there are --trials trials, and may run several times at once. trials.csv has a row a trial.
Needs requirements/tune.txt.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import UserError, cli_entry_point, truncate
from common.startup import before_torch
from slmodels import MODELS
from train.Arguments import SLArguments, option, parse, to_command_line

if TYPE_CHECKING:
    import optuna


class Range(NamedTuple):
    """Numbers from low to high, uniform, or uniform in their logarithm."""

    low: float
    high: float
    log: bool = False


SPACE: dict[str, Range | tuple[Any, ...]] = {  # what --space chooses from: ranges, or a tuple of values
    "learning_rate": Range(1e-4, 1e-2, log=True),
    "batch_size": (512, 1024, 2048, 4096),
    "dropout": Range(0.0, 0.7),
    "embed_dropout": Range(0.0, 0.7),
    "weight_decay": Range(1e-8, 1e-3, log=True),
    "embed_dim": (16, 32, 64, 128),
    "feature_map_rate": Range(0.2, 1.0),
    "expert_num": (2, 4, 8),  # of models with experts
    "bottom_mlp_dims": ((128, 64), (256, 128), (512, 256)),
    "tower_mlp_dims": ((32, 16), (64, 32), (128, 64)),
}
DIGITS = 3  # significant ones of a number of a range
STARTUP_TRIALS = 5  # finished ones before the first is pruned
WARMUP_EPOCHS = 2  # of every trial, which are not pruned


@dataclass(kw_only=True)
class TuneArguments(SLArguments):
    """Those of `SLmain.py`, the number of trials and the settings to search. Raises UserError."""

    trials: int = option(50, "trials of the study in total, with those of earlier and of other processes", low=1)
    space: str = option("", f"comma-separated settings to search (default all that are not given as flags): "
                        f"{', '.join(SPACE)}")
    polish_lambda: float = option(0.0, "0: baselines are tuned", flag="--polish", low=0, high=0)
    out: str = option("chkpt/tune", "where studies are saved; --save_dir is that of the printed command")

    def __post_init__(self) -> None:
        super().__post_init__()
        available = [name for name in SPACE
                     if name != "expert_num" or name in inspect.signature(MODELS[self.model_name]).parameters]
        names = self.space.split(",") if self.space else [name for name in available if name not in self.given]
        for name in names:
            if name not in available:
                raise UserError(f"--space: {self.model_name} has no '{name}' to search: some of {', '.join(available)}")
        if not names:
            raise UserError("--space: nothing to search, every setting is given: name those to search")
        self.searched = {name: SPACE[name] for name in names}

    @property
    def folder(self) -> Path:
        """The directory of the study: `<out>/<dataset>_<model>/`."""
        return Path(self.out) / self.run_dir.path.name

    def with_values(self, values: dict[str, Any], **changes: Any) -> SLArguments:
        """The settings of `SLmain.py` with these values of the searched ones."""
        own = {setting.name: getattr(self, setting.name) for setting in fields(SLArguments) if setting.name != "resume"}
        return SLArguments(**{**own, **values, **changes})


if __name__ == "__main__":
    before_torch(lambda: parse(TuneArguments, __doc__ or "").check_files())

import numpy as np
import torch
from filelock import FileLock

from common import distributed
from common.csv_reader import write_csv
from common.device import pick_device
from common.fileio import check_writable, exclusive_lock
from dataset.rtrl import Splits
from dataset.vocabulary import encode_splits
from SLmain import fit, init_model, make_training
from train.run import get_dataset


class Tuner:
    """A study in its directory, which several processes may share.

    An exclusive lock guards the start and the end of a trial, so that there are exactly `settings.trials`. A trial
    whose process has died is marked as failed, without an error; it does not count.

    Raises UserError where the journal is of other settings or data, or no journal.
    """

    def __init__(self, settings: TuneArguments, splits: Splits) -> None:
        self.settings, self.folder = settings, settings.folder
        self.splits = replace(splits, test=splits.val)  # trials must not read the test split
        self.device = pick_device(settings.device, settings.precision)
        if distributed.world_size() > 1:
            raise UserError("experiments.tune: a trial has one process: start the command several times instead")
        check_writable(self.folder, files=[self.folder / "trials.csv"])
        with self.study() as study:
            self._check_identity(study)

    @contextlib.contextmanager
    def study(self) -> Iterator[optuna.Study]:
        """The study as it is, locked. What it proposes is a function of its trials and of --seed."""
        from optuna import create_study, pruners, samplers
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        journal = self.folder / "study.journal"
        with FileLock(self.folder / ".study.lock"):
            try:
                study = create_study(
                    storage=JournalStorage(JournalFileBackend(str(journal))), study_name="tune", load_if_exists=True,
                    direction="maximize", pruner=pruners.MedianPruner(STARTUP_TRIALS, WARMUP_EPOCHS + 1))
                number = len(study.trials)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise UserError(f"{journal}: not the journal of a study: move it away") from error
            mixed = np.random.SeedSequence([self.settings.seed, number]).generate_state(1)
            study.sampler = samplers.TPESampler(seed=int(mixed[0]))
            yield study

    def _check_identity(self, study: optuna.Study) -> None:
        """Store what the values depend on; refuse a study of something else."""
        constant = {name: value for name, value in self.settings.with_values({}).plain().items()
                    if name not in (*self.settings.searched, "save_dir", "resume", "device", "pretrain_path", "track")}
        identity = json.loads(json.dumps({**constant, "space": self.settings.searched,
                                          "data": self.splits.fingerprint}))
        if "identity" not in study.user_attrs:
            study.set_user_attr("identity", identity)
            study.enqueue_trial(_first_params(self.settings))
        for name, value in study.user_attrs["identity"].items():
            if identity.get(name) != value:
                given = ",".join(value) if name == "space" else truncate(value)
                what = "is of other data" if name == "data" else f"has --{name}={given}"
                raise UserError(f"{self.folder}: its study {what}: give the same, or another --out")

    def run(self) -> None:
        """Run trials until there are enough."""
        while True:
            with contextlib.ExitStack() as stack:
                with self.study() as study:
                    self._fail_dead_trials(study)
                    if sum(map(_counts, study.trials)) >= self.settings.trials:
                        self._write_table(study)
                        return
                    trial = study.ask({name: _distribution(values) for name, values in self.settings.searched.items()})
                    stack.enter_context(exclusive_lock(self._trial_folder(trial.number)))
                value = self._train(trial)
                with self.study() as study:
                    states = _states()
                    state = (states.COMPLETE if value is not None else
                             states.FAIL if "error" in trial.user_attrs else states.PRUNED)
                    study.tell(trial.number, value, state)
                    self._write_table(study)
                    print(_trial_line(study, trial.number), flush=True)

    def _train(self, trial: optuna.Trial) -> float | None:
        """Train with the settings of a trial; the best validation score, None where it fails or is pruned.

        Reports the best score so far after every epoch. An error of the settings (out of memory, diverged) becomes
        the attribute `error`.
        """
        folder = self._trial_folder(trial.number)
        settings = self.settings.with_values(_values(trial.params), save_dir=str(folder), track="")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), \
                    contextlib.redirect_stderr(log):
                catemapper = encode_splits(self.splits, settings.feature_map_rate)
                model = init_model(settings, self.splits, self.device)
                training = make_training(settings, self.splits, catemapper, model, self.device)
                training.start(settings.plain(), resume=False)
                while training.should_continue and training.epoch < settings.epoch:
                    if training.epoch and trial.should_prune():
                        return None
                    fit(training, training.epoch + 1)
                    trial.set_user_attr("epochs", training.epoch)
                    trial.report(training.stopper.best_accuracy, training.epoch)
                return float(training.stopper.best_accuracy)
        except (UserError, MemoryError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("error", str(error).split("\n")[0] or "out of memory")
            return None
        finally:
            shutil.rmtree(settings.run_dir.path, ignore_errors=True)  # its weights; the log stays

    def _trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / str(number)

    def _fail_dead_trials(self, study: optuna.Study) -> None:
        """Mark running trials that no process has locked."""
        for trial in study.get_trials(deepcopy=False, states=[_states().RUNNING]):
            with contextlib.suppress(UserError), exclusive_lock(self._trial_folder(trial.number)):
                study.tell(trial.number, state=_states().FAIL)

    def _write_table(self, study: optuna.Study) -> None:
        """Write trials.csv."""
        rows = []
        for trial in study.trials:
            seconds = f"{trial.duration.total_seconds():.1f}" if trial.duration else ""
            text = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value
                    for name, value in _values(trial.params).items()}
            rows.append({"trial": trial.number, "state": _state(trial), "value": trial.value,
                         "epochs": trial.user_attrs.get("epochs", 0), "seconds": seconds, **text,
                         "error": trial.user_attrs.get("error", "")})
        if rows:
            write_csv(self.folder / "trials.csv", rows)


def _states() -> type[optuna.trial.TrialState]:
    from optuna.trial import TrialState

    return TrialState


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial is one of --trials: all but those that an interruption ended or that have not begun."""
    return _state(trial) not in ("interrupted", "waiting")


def _state(trial: optuna.trial.FrozenTrial) -> str:
    """complete, pruned, failed, running, waiting, or interrupted: its process has ended before it."""
    if trial.state == _states().FAIL:
        return "failed" if "error" in trial.user_attrs else "interrupted"
    return trial.state.name.lower()


def _distribution(values: Range | tuple[Any, ...]) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(values, Range):
        return FloatDistribution(values.low, values.high, log=values.log)
    return CategoricalDistribution([json.dumps(value) for value in values])  # a choice of optuna is no tuple


def _first_params(settings: TuneArguments) -> dict[str, Any]:
    """The parameters of the first trial: the defaults, or what is given, so that the best is no worse. A value that the
    space lacks is left to the sampler."""
    params = {}
    for name, values in settings.searched.items():
        value = getattr(settings, name)
        if isinstance(values, Range) and values.low <= value <= values.high:
            params[name] = value
        elif not isinstance(values, Range) and value in values:
            params[name] = json.dumps(value)
    return params


def _values(params: dict[str, Any]) -> dict[str, Any]:
    """The settings of a trial: numbers of a range rounded to `DIGITS` digits, widths as a tuple."""
    values = {name: json.loads(value) if isinstance(value, str) else float(f"{value:.{DIGITS}g}")
              for name, value in params.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _trial_line(study: optuna.Study, number: int) -> str:
    """What is printed at the end of a trial."""
    trial = study.trials[number]
    value = "" if trial.value is None else f" {trial.value:.4f}"
    chosen = ", ".join(f"{name} {chosen}" for name, chosen in _values(trial.params).items())
    return f"trial {number}, {_state(trial)}{value}: {trial.user_attrs.get('error', chosen)}"


def main(settings: TuneArguments) -> SLArguments:
    """Run the study to its end; print and return the best settings. Raises UserError where no trial is complete."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("experiments.tune needs optuna: pip install -r requirements/tune.txt") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tuner = Tuner(settings, get_dataset(settings.dataset_name, settings.dataset_path, settings.numerical))
    tuner.run()
    with tuner.study() as study:
        trials = study.trials
        complete = study.get_trials(states=[_states().COMPLETE])
    running = sum(_state(trial) == "running" for trial in trials)
    if running:
        print(f"other processes still run {running} trials")
    if not complete:
        errors = [f"; the first error: {trial.user_attrs['error']}" for trial in trials if "error" in trial.user_attrs]
        raise UserError(f"{settings.folder}: no trial is complete{''.join(errors[:1])}")
    best = study.best_trial
    chosen = settings.with_values(_values(best.params))
    print(f"\n{len(complete)} of {sum(map(_counts, trials))} trials are complete; all of them: "
          f"{settings.folder / 'trials.csv'}\nbest: trial {best.number}, mean validation AUC {best.value:.4f} "
          f"(optimistic, as the best of many). Train and test it:\n{to_command_line('SLmain.py', chosen)}")
    return chosen


@cli_entry_point
def cli() -> None:
    main(parse(TuneArguments, __doc__ or ""))


if __name__ == "__main__":
    cli()
