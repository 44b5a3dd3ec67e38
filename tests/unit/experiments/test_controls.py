"""Controls without critics: targets and models in closed form, and their runs beside constant weights."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import user_error_message
from factories import SIZES
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

import SLmain
from common.checkpoint import load_tensors
from common.csv_reader import read_csv_rows
from common.fileio import read_json
from dataset.sessions import SessionIndex
from dataset.vocabulary import encode_splits
from experiments import controls
from experiments.arguments import CONTROLS, ControlArguments
from experiments.conditions import ExperimentArguments, ExperimentRun, conditions
from experiments.controls import Auxiliary, Average, Ensemble, later_outcomes
from experiments.runner import execute
from layers.base import MultiTaskModel
from slmodels import MODELS, build
from slmodels.model_file import load_model
from train.Arguments import SLArguments, parse
from train.run import get_dataset, slpred
from train.supervised import bce_loss, evaluation_loader

TINY: dict[str, Any] = {"embed_dim": 4, "bottom_mlp_dims": (8,), "tower_mlp_dims": (4,), "epoch": 2, "batch_size": 512,
                        "device": "cpu"}
CONSTANT = Path("chkpt/SL/rt_esmm/rt_esmm_1.0_constant")


def make_model(name: str = "esmm") -> MultiTaskModel:
    return build(name, [3, 4], 2, SIZES["embed_dim"], SIZES["bottom_mlp_dims"], SIZES["tower_mlp_dims"], 2, 2, 0.0)


def make_batch(rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, numbers, and labels of two tasks followed by their targets."""
    labels = torch.cat([torch.randint(2, (rows, 2)), torch.rand(rows, 2)], dim=1)
    return torch.randint(3, (rows, 2)), torch.randn(rows, 2), labels


# ---------------------------------------------------------------------------------------------------------- closed form


def test_later_outcomes_by_hand() -> None:
    """Sessions 1 0 1 and 1 1, gamma 1/2: 0 / 2 + 1 / 4, 1 / 2, nothing; 1 / 2, nothing. The second task has none."""
    labels = np.float32([[1, 0], [0, 0], [1, 0], [1, 0], [1, 0]])
    targets = later_outcomes(labels, SessionIndex(np.array([7, 7, 7, 9, 9])), 0.5)
    np.testing.assert_allclose(targets, np.log([[1.25, 1], [1.5, 1], [1, 1], [1.5, 1], [1, 1]]), rtol=1e-6)


def test_auxiliary_loss_in_closed_form() -> None:
    """Heads start at the targets' means: what is added is the mean square of the deviations."""
    model, batch = make_model(), make_batch()
    targets = batch[2][:, 2:]
    added = Auxiliary(model, 3.0, targets.mean(dim=0)).losses(batch, bce_loss) - model.losses(batch, bce_loss)
    torch.testing.assert_close(added, 3 * targets.var(dim=0, correction=0))


@pytest.mark.parametrize("name", MODELS)
def test_auxiliary_gradient_reaches_inputs_alone(name: str) -> None:
    """The embeddings of every task, and no layer behind them."""
    model, batch = make_model(name), make_batch()
    gradients = []
    for weight in (0.0, 1.0):
        auxiliary = Auxiliary(model, weight, torch.zeros(2))
        for head in auxiliary.heads:
            nn.init.ones_(head.weight)
        model.zero_grad()
        auxiliary.losses(batch, bce_loss).sum().backward()
        gradients.append({parameter: parameter.grad.clone() for parameter in model.parameters()
                          if parameter.grad is not None})
    inputs = {parameter for task in (0, 1) for parameter in model.input_layer(task).parameters()}
    assert gradients[0].keys() >= inputs
    for parameter, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][parameter]) == (parameter not in inputs)


def test_average_is_of_start_and_epochs() -> None:
    model = make_model()
    average, batch = Average(model), make_batch()[:2]
    states = [[parameter.detach().clone() for parameter in model.parameters()]]
    assert torch.equal(average(*batch), model(*batch))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        average.update()
        states.append([parameter.detach().clone() for parameter in model.parameters()])
    for mean, *weights in zip(average.average.parameters(), *states, strict=True):
        torch.testing.assert_close(mean, torch.stack(weights).mean(dim=0))


def test_ensemble_is_the_mean_of_predictions() -> None:
    one, other, batch = make_model(), make_model(), make_batch()[:2]
    assert torch.equal(Ensemble(one, one)(*batch), one(*batch))
    torch.testing.assert_close(Ensemble(one, other)(*batch), (one(*batch) + other(*batch)) / 2)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a baseline, which was fine-tuned with constant weights. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "dataset").mkdir()
    (folder / "dataset" / "rt").symlink_to(rt_tables)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        SLmain.main(**TINY)
        SLmain.main(**TINY, polish_lambda=1.0, polish_method="constant")
    return folder


@pytest.fixture
def workdir(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of that directory, and this process in it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)


def run_control(control: str, **changes: Any) -> tuple[list[dict[str, str]], ControlArguments]:
    """The rows of metrics.csv, and the settings."""
    settings = ControlArguments(**{**TINY, **changes}, control=control)
    controls.main(settings)
    return read_csv_rows(settings.run_dir.metrics), settings


def weights_of(path: Path) -> dict[str, Tensor]:
    return dict(load_tensors(path, "")["weights"])


def test_auxiliary_weight_zero_is_constant(workdir: None) -> None:
    rows, _ = run_control("auxiliary", auxiliary_weight=0.0)
    assert rows == read_csv_rows(CONSTANT / "metrics.csv")
    assert run_control("auxiliary")[0][1:] != rows[1:], "with a weight it differs"


def test_average_trains_as_constant_does(workdir: None) -> None:
    rows, _ = run_control("average", learning_rate=0.1)
    SLmain.main(**TINY, learning_rate=0.1, polish_lambda=1.0, polish_method="constant")
    constant = read_csv_rows(CONSTANT / "metrics.csv")
    assert rows[0] == constant[0]
    assert [row["loss"] for row in rows] == [row["loss"] for row in constant]
    assert rows[1]["auc_CTR"] != constant[1]["auc_CTR"]


def test_saved_model_is_the_best_average(workdir: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three epochs the second has the best score: the mean of the start and the first two is saved, and tested."""
    def set_scores(*scores: float) -> None:
        left = iter(scores)
        monkeypatch.setattr("train.supervised.validation_score", lambda _metrics: next(left))

    epochs = []
    for number in (1, 2):
        set_scores(0.1, 0.2, 0.3)
        SLmain.main(**{**TINY, "epoch": number}, polish_lambda=1.0, polish_method="constant")
        epochs.append(weights_of(CONSTANT.parent / "rt_esmm_1.0_constant.pt"))
    set_scores(0.1, 0.2, 0.3, 0.2)
    rows, settings = run_control("average", epoch=3)
    assert (rows[-1]["split"], rows[-1]["epoch"]) == ("test", "2")
    saved = weights_of(settings.run_dir.model)
    start = weights_of(settings.baseline("esmm"))
    assert saved.keys() == start.keys()
    for name, mean in saved.items():
        torch.testing.assert_close(mean, (start[name] + epochs[0][name] + epochs[1][name]) / 3)


def test_auxiliary_model_is_saved_without_heads(workdir: None) -> None:
    _, settings = run_control("auxiliary")
    load_model(settings.run_dir.model)
    assert weights_of(settings.run_dir.model).keys() == weights_of(settings.baseline("esmm")).keys()


def test_ensemble_joins_two_baselines(workdir: None) -> None:
    """The metrics are those of the mean of the predictions; the second model is the baseline of seed + 1000."""
    rows, settings = run_control("ensemble")
    other = SLArguments(**TINY, seed=settings.seed + 1000, pretrain_path="other", save_dir="other")
    SLmain.main(**vars(other))
    models = [load_model(each.baseline("esmm")) for each in (settings, other)]
    splits = get_dataset("rt", "dataset")
    encode_splits(splits, settings.feature_map_rate)
    assert [(row["split"], row["epoch"]) for row in rows] == [("val", "0"), ("test", "0")]
    for row, split in zip(rows, (splits.val, splits.test), strict=True):
        mean = np.mean([slpred(model, evaluation_loader(model, split, "cpu"), 2, "cpu") for model in models], axis=0)
        for task, name in enumerate(("CTR", "CTCVR")):
            assert float(row[f"auc_{name}"]) == pytest.approx(roc_auc_score(split.labels[:, task], mean[task]))
            assert float(row[f"logloss_{name}"]) == pytest.approx(log_loss(split.labels[:, task], mean[task]), rel=1e-5)


@pytest.mark.parametrize("control", CONTROLS)
def test_resumed_control_equals_the_uninterrupted(workdir: None, control: str) -> None:
    rows, settings = run_control(control)
    shutil.rmtree(settings.run_dir.path)
    run_control(control, epoch=1)
    assert run_control(control, resume=True)[0] == rows


def test_mistakes_give_one_line(workdir: None) -> None:
    assert "--encoder" in user_error_message(lambda: ControlArguments(control="auxiliary", encoder="gru"))
    assert "--polish_method" in user_error_message(lambda: ControlArguments(polish_method="full"))
    assert "--control" in user_error_message(lambda: ControlArguments(control="none"))
    shutil.rmtree("pretrain")
    assert "SLmain.py --model_name=esmm" in user_error_message(lambda: controls.main(ControlArguments(**TINY)))


# -------------------------------------------------------------------------------------------------------- experiments


def test_controls_have_constant_weights_settings() -> None:
    """Of every model, the same baseline, seed and budget; they depend on the baseline alone."""
    experiment = ExperimentArguments(tables="controls")
    by_name = {(one.model, one.name): one for one in conditions(experiment)}
    assert {one.table for one in by_name.values()} == {"main", "controls"}
    for model in ("esmm", "mmoe", "ple"):
        constant = by_name[model, "constant"]
        for name in CONTROLS:
            condition = by_name[model, name]
            assert (condition.control, condition.dependencies) == ("constant", constant.dependencies)
            treated, expected = (vars(ExperimentRun("rt", one, 3).settings(experiment))
                                 for one in (condition, constant))
            assert {key for key, value in expected.items() if treated[key] != value} == {"save_dir"}
            assert treated["control"] == name


def test_experiment_runs_controls(rt_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row each, without model files; the command of a row repeats its metrics."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "rt").symlink_to(rt_tables)
    experiment = ExperimentArguments(tables="controls", models="esmm", embed_dim=4, epoch=1, out="results")
    runs = {one.name: ExperimentRun("rt", one, 1) for one in conditions(experiment)}
    rows = {name: execute(runs[name], experiment) for name in ("baseline", *CONTROLS)}
    for name in CONTROLS:
        assert (rows[name]["table"], rows[name]["control"]) == ("controls", "constant")
        settings = runs[name].settings(experiment)
        assert read_json(settings.run_dir.config)["settings"] == {**settings.plain(), "resume": True}
        assert not [*runs[name].folder(experiment).rglob("*.pt")]
    python, module, program, *flags = shlex.split(rows["auxiliary"]["command"])
    assert (python, module, program) == ("python3", "-m", "experiments.controls")
    repeated = controls.main(parse(ControlArguments, "", [*flags, "--save_dir=again"]))
    for task, metrics in zip(("CTR", "CTCVR"), repeated, strict=True):
        expected = {f"{metric}_{task}": str(value) for metric, value in metrics._asdict().items()}
        assert expected.items() <= rows["auxiliary"].items()
