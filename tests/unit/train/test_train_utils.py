"""The tools of the loops: category mapping, stoppers, metrics, optimiser states, checkpoints, settings."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import user_error_message
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from common.checkpoint import FORMAT, check_metadata, get_optim_param, load_optimizer_state, load_weights, save_tensors
from common.device import pick_device, set_seed
from dataset.rtrl import RetailRocketRLDataset, load_splits
from dataset.vocabulary import Catemapper, encode_splits
from layers import ESMM
from slmodels.model_file import save_model
from train.Arguments import ALIASES, Arguments, RLArguments, SLArguments, parse
from train.metrics import Metrics, group_auc, task_metrics
from train.plots import varying
from train.supervised import validation_score
from train.utils import EarlyStopper


def data_set(*columns: Sequence[str]) -> RetailRocketRLDataset:
    """One session with these values of the fields "a", "b", ..., row by row; "" is a missing one."""
    names = [chr(ord("a") + number) for number in range(len(columns))]
    rows = range(len(columns[0]))
    items = pd.DataFrame({"itemid": rows, **dict(zip(names, map(list, columns), strict=True))})
    table = pd.DataFrame({"timestamp": rows, "sessionid": 1, "itemid": rows, "click": 0, "pay": 0})
    return RetailRocketRLDataset(table, items, names, ["click", "pay"])


def ids_of(mapper: Catemapper, *columns: Sequence[str]) -> list[list[int]]:
    """The ids of each field, row by row."""
    return [list(column) for column in mapper.map(data_set(*columns)).categorical.T]


# ---------------------------------------------------------------------------------------------------------- Catemapper


def test_ids_follow_frequency_and_0_is_missing() -> None:
    """x three times, y twice, z once; missing values have id 0 and no place in the order."""
    column = ["y", "x", "", "z", "x", "", "y", "x", "", ""]
    mapper = Catemapper(0.2).fit(data_set(column))
    assert ids_of(mapper, column) == [[2, 1, 0, 3, 1, 0, 2, 1, 0, 0]]
    assert mapper.field_dims == [4]


def test_equal_frequencies_are_ordered_by_value() -> None:
    assert Catemapper(0.2).fit(data_set(["b", "c", "a", "c", "b", "a"])).ids == {"a": {"a": 1, "b": 2, "c": 3}}


def test_every_field_counts_for_itself() -> None:
    mapper = Catemapper(0.2).fit(data_set(["p", "q", "q"], ["q", "p", "p"]))
    assert ids_of(mapper, ["p", "q", "r"], ["p", "q", "r"]) == [[2, 1, 0], [1, 2, 0]]
    assert mapper.field_dims == [3, 3]


def test_unseen_values_have_id_0() -> None:
    mapper = Catemapper(0.2).fit(data_set(["x", "x", "y"]))
    assert ids_of(mapper, ["new", "y", "x", ""]) == [[0, 2, 1, 0]]


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, ""), (0.2, "x"), (0.5, "x"), (0.51, "xy"), (0.8, "xy"),
                                                 (0.81, "xyz"), (1.0, "xyz")])
def test_long_tailed_field_keeps_values_up_to_threshold(threshold: float, kept: str) -> None:
    """Shares of the rows that have a value: x 0.5, y 0.3, z 0.2. The other field is not long-tailed."""
    column = [*"xxxxxyyyzz", "", "", ""]
    mapper = Catemapper(threshold).fit(data_set(column, column), long_tailed=["a"])
    assert list(mapper.ids["a"]) == list(kept)
    assert list(mapper.ids["b"]) == list("xyz")
    assert mapper.field_dims == [len(kept) + 1, 4]


def test_field_without_values_has_only_id_0() -> None:
    mapper = Catemapper(0.2).fit(data_set(["", ""], ["", ""]), long_tailed=["b"])
    assert mapper.field_dims == [1, 1]
    assert ids_of(mapper, ["", "x"], ["x", ""]) == [[0, 0], [0, 0]]


def test_vocabulary_is_of_the_training_split(rt_tables: Path) -> None:
    splits = load_splits(rt_tables)
    mapper = encode_splits(splits, 0.8)
    assert mapper.ids == Catemapper(0.8).fit(load_splits(rt_tables).train, splits.long_tailed).ids
    new = 0
    for split in (splits.val, splits.test):
        for number, (name, column) in enumerate(split.fields.items()):
            of_train = {splits.train.fields[name].values[code] for code in splits.train.fields[name].codes if code >= 0}
            unseen = np.array([code >= 0 and column.values[code] not in of_train for code in column.codes])
            new += int(unseen.sum())
            assert not split.categorical[unseen, number].any()
    assert new > 0, "the simulated log has values that only later splits have"


def test_ids_are_below_field_dims(rt_tables: Path) -> None:
    splits = load_splits(rt_tables)
    dims = np.array(encode_splits(splits, 0.2).field_dims)
    for split in (splits.train, splits.val, splits.test):
        assert split.categorical.dtype == np.int64
        assert split.field_dims == dims.tolist()
        assert (split.categorical >= 0).all()
        assert (split.categorical < dims).all()
    assert (splits.train.categorical.max(axis=0) == dims - 1).all()


def test_a_smaller_threshold_makes_smaller_tables(rt_tables: Path) -> None:
    splits = load_splits(rt_tables)
    few, many = (dict(zip(splits.train.fields, encode_splits(splits, share).field_dims, strict=True))
                 for share in (0.2, 0.9))
    assert [name for name in few if few[name] != many[name]] == ["364", "776"]
    assert few["364"] < many["364"]


def test_a_mapping_there_and_back(tmp_path: Path) -> None:
    column = ["12", "é", "x,y", "12", "", "n1.000"]
    mapper = Catemapper(0.25).fit(data_set(column))
    mapper.save(tmp_path / "catemapper.json")
    read = Catemapper.load(tmp_path / "catemapper.json")
    assert (read.threshold, read.ids, read.field_dims) == (0.25, mapper.ids, mapper.field_dims)
    assert ids_of(read, column) == ids_of(mapper, column)


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", '{"threshold": 0.2}', '{"ids": {}}', '{"threshold": "a", "ids": {}}',
    '{"threshold": 0.2, "ids": []}', '{"threshold": 0.2, "ids": {"785": "x"}}',
    '{"threshold": 0.2, "ids": {"785": ["x", "x"]}}', '{"threshold": 0.2, "ids": {"785": ["1", 1]}}',
    '{"threshold": 0.2, "ids": {}}', '{"threshold": 1.5, "ids": {"785": []}}', '{"threshold": NaN, "ids": {"785": []}}',
    '{"threshold": true, "ids": {"785": []}}', '{"threshold": 0.2, "ids": {"785": [["x"]]}}',
    '{"threshold": 0.2, "ids": {"785": [""]}}', '{"threshold": 0.2, "ids": {"785": ["x"], "785": ["y"]}}'])
def test_a_malformed_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "catemapper.json"
    path.write_text(content)
    assert str(path) in user_error_message(lambda: Catemapper.load(path))


def test_mapping_with_missing_field_is_refused(tmp_path: Path) -> None:
    mapper = Catemapper(0.2)
    mapper.ids = {"colour": {"red": 1}}
    assert "field 'colour'" in user_error_message(lambda: mapper.map(data_set(["a"])))


# -------------------------------------------------------------------------------------------------------- EarlyStopper


def numbered(number: float) -> nn.Linear:
    """A model that is told by its weight."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, number)
    return model


def test_the_stopper_counts_epochs_without_a_better_score() -> None:
    stopper = EarlyStopper(2)
    scores = [0.5, 0.6, 0.6, 0.7, 0.1, 0.7]
    went_on = [stopper.is_continuable(numbered(epoch), score, epoch) for epoch, score in enumerate(scores)]
    assert went_on == [True, True, True, True, True, False]
    assert (stopper.best_accuracy, stopper.best_epoch, stopper.trial_counter) == (0.7, 3, 2)
    assert stopper.best_state["weight"].item() == 3


def test_stopper_copies_the_best_weights() -> None:
    stopper, model = EarlyStopper(2), numbered(1)
    stopper.is_continuable(model, 0.5, 1)
    nn.init.constant_(model.weight, 99)
    assert stopper.best_state["weight"].item() == 1


@pytest.mark.parametrize("score", [0.5, 0.0, -3.0, -1e30])
def test_stopper_accepts_negative_first_score(score: float) -> None:
    """A warm start's own score counts: the published stopper started from 0 and forgot it."""
    stopper = EarlyStopper(1)
    assert stopper.is_continuable(numbered(1), score, 0)
    assert (stopper.best_accuracy, stopper.best_epoch) == (score, 0)
    assert not stopper.is_continuable(numbered(2), score - 0.1 - abs(score), 1)
    assert stopper.best_state["weight"].item() == 1


def test_a_stopper_goes_on_from_its_state() -> None:
    def feed(stopper: EarlyStopper, scores: list[float], start: int) -> list[bool]:
        return [stopper.is_continuable(numbered(start + k), score, start + k) for k, score in enumerate(scores)]

    whole, first, second = EarlyStopper(3), EarlyStopper(3), EarlyStopper(3)
    scores = [0.3, 0.5, 0.4, 0.2, 0.45]
    expected = feed(whole, scores, 0)
    got = feed(first, scores[:3], 0)
    second.load_state_dict(first.state_dict())
    assert got + feed(second, scores[3:], 3) == expected
    assert second.best_epoch == whole.best_epoch == 1
    assert torch.equal(second.best_state["weight"], whole.best_state["weight"])


def test_validation_score_is_the_mean_finite_auc() -> None:
    nan = float("nan")
    assert validation_score([Metrics(0.7, 9, 9, 9, 9), Metrics(0.8, 9, 9, 9, 9)]) == pytest.approx(0.75)
    assert validation_score([Metrics(0.7, 9, 9, 9, 9), Metrics(nan, 9, 9, 9, 9)]) == 0.7
    assert validation_score([Metrics(nan, 0.2, 9, 9, 9), Metrics(nan, 0.4, 9, 9, 9)]) == pytest.approx(-0.3)


# ------------------------------------------------------------------------------------------------------------- metrics


@given(rows=st.lists(st.tuples(st.floats(1e-6, 1 - 1e-6), st.integers(0, 1)), min_size=2, max_size=50))
def test_auc_and_logloss_are_those_of_scikit_learn(rows: list[tuple[float, int]]) -> None:
    p, y = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], np.float32)
    got = task_metrics(p, y, np.zeros(len(rows), np.int64), np.arange(len(rows)))
    assert got.logloss == pytest.approx(log_loss(y, p, labels=[0, 1]), rel=1e-9)
    if 0 < y.sum() < len(y):
        assert got.auc == pytest.approx(roc_auc_score(y, p))
        assert got.session_gauc == pytest.approx(got.auc), "all rows are one session"
        assert np.isnan(got.user_gauc), "every row is a user of its own"
    else:
        assert np.isnan(got.auc)


def test_session_logloss_is_mean_over_sessions() -> None:
    """Three sessions of 1, 2 and 3 rows; the losses are logs of 2, 4, 4, 8, 8, 8."""
    p = np.array([1 / 2, 1 / 4, 3 / 4, 7 / 8, 1 / 8, 7 / 8])
    y = np.array([1, 1, 0, 0, 1, 0], np.float32)
    session = np.array([7, 3, 3, 9, 9, 9])
    got = task_metrics(p, y, session, session)
    assert got.session_logloss == pytest.approx(np.log(2) * (1 + 2 + 3) / 3)
    assert got.logloss == pytest.approx(np.log(2) * (1 + 2 + 2 + 3 + 3 + 3) / 6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_auc_of_one_class_is_nan(label: float) -> None:
    got = task_metrics(np.array([0.2, 0.7]), np.full(2, label, np.float32), np.array([1, 2]), np.array([1, 1]))
    assert np.isnan([got.auc, got.session_gauc, got.user_gauc]).all()
    assert np.isfinite([got.logloss, got.session_logloss]).all()


def test_logloss_of_0_and_1_is_finite() -> None:
    session = np.array([1, 1])
    got = task_metrics(np.array([0.0, 1.0], np.float32), np.array([1, 0], np.float32), session, session)
    assert 10 < got.logloss < 20
    assert got.auc == got.session_gauc == 0


@pytest.mark.parametrize("positives", [0.1, 0.8])
def test_metrics_of_many_rows_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch, positives: float) -> None:
    """With ties, and users whose rows are everywhere; a session may be longer than a block."""
    rng = np.random.default_rng(2)
    predictions = rng.integers(0, 60, 3000).astype(np.float32) / 60
    labels = (rng.random(3000) < positives * (0.5 + predictions / 2)).astype(np.float32)
    session, user = np.sort(rng.integers(0, 400, 3000)), rng.integers(0, 300, 3000) * 7
    session[500:900] = session[500]
    whole = task_metrics(predictions, labels, session, user)
    monkeypatch.setattr("train.metrics.BLOCK_ROWS", 100)
    assert task_metrics(predictions, labels, session, user) == pytest.approx(whole, rel=1e-12)
    alone = task_metrics(predictions, np.ones(3000, np.float32), session, session)
    assert np.isnan([alone.auc, alone.session_gauc, alone.user_gauc]).all()


def test_group_auc_by_hand() -> None:
    """Group 5: pairs (0.9, 0.1) right and (0.9, 0.9) a tie, 3 rows of AUC 3/4. Group 2: one pair, wrong, 2 rows of AUC
    0. Group 8 has one class: left out. (3 x 3/4 + 2 x 0) / 5."""
    group = np.array([5, 2, 8, 5, 8, 2, 5])
    labels = np.array([1, 1, 1, 0, 1, 0, 0], np.float32)
    predictions = np.array([0.9, 0.3, 0.2, 0.9, 0.4, 0.5, 0.1])
    assert group_auc(predictions, labels, group) == pytest.approx(3 * 0.75 / 5)
    assert group_auc(np.full(7, 0.5), labels, group) == 0.5
    assert group_auc(labels, labels, group) == 1


@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), st.integers(-3, 3)), min_size=1, max_size=60))
def test_group_auc_is_a_loop_over_scikit_learn(rows: list[tuple[int, int, int]]) -> None:
    """Few predictions, so that ties are common; also in another order of the rows."""
    p, y, group = np.array([row[0] / 4 for row in rows]), np.float32([row[1] for row in rows]), np.array(
        [row[2] for row in rows])
    members = [group == one for one in np.unique(group) if np.ptp(y[group == one])]
    expected = (np.average([roc_auc_score(y[at], p[at]) for at in members], weights=[at.sum() for at in members])
                if members else np.nan)
    order = np.random.default_rng(0).permutation(len(p))
    assert group_auc(p, y, group) == pytest.approx(expected, nan_ok=True)
    assert group_auc(p[order], y[order], group[order]) == pytest.approx(expected, nan_ok=True)


# ---------------------------------------------------------------------------------------------------- optimiser, seeds


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("done", [0, 1, 5])
def test_an_optimiser_goes_on_from_its_parameters(done: int) -> None:
    batches = [torch.randn(8, 3) for _ in range(9)]
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.Adam(first.parameters(), lr=0.1)
    steps(first, optimizer, batches[:done])
    second.load_state_dict(first.state_dict())
    fresh = torch.optim.Adam(second.parameters(), lr=0.1)
    load_optimizer_state(fresh, copy.deepcopy(optimizer.state_dict()))

    steps(first, optimizer, batches[done:])
    steps(second, fresh, batches[done:])
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def corrupt(state: dict[int, dict[str, Any]], kind: str) -> dict[int, dict[str, Any]]:
    """The moments of an Adam over two parameters, as those of another."""
    if kind == "missing parameter":
        return {0: state[0]}
    if kind == "additional parameter":
        return {**state, 2: state[0]}
    if kind == "missing moment":
        return {**state, 0: {"step": state[0]["step"], "exp_avg": state[0]["exp_avg"]}}
    return {**state, 0: {**state[0], "exp_avg": 5 if kind == "number" else state[0]["exp_avg"].T}}


@pytest.mark.parametrize("kind", ["missing parameter", "additional parameter", "missing moment", "transposed",
                                  "number"])
def test_moments_of_other_parameters_are_refused(kind: str) -> None:
    """Torch takes tensors of any shape, and fails in the next step."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    steps(model, optimizer, [torch.randn(8, 3)])
    saved = optimizer.state_dict()
    with pytest.raises((ValueError, AttributeError)):
        load_optimizer_state(optimizer, {**saved, "state": corrupt(saved["state"], kind)})


@pytest.mark.parametrize("change", [{"further": 1}, {"num_trials": None}, {"is_continuable": 1}, {"best_epoch": "1"},
                                    {"best_accuracy": True}], ids=str)
def test_the_state_of_something_else_is_no_stoppers(change: dict[str, Any]) -> None:
    stopper = EarlyStopper(2)
    before = stopper.state_dict()
    with pytest.raises(ValueError, match="stopper"):
        stopper.load_state_dict({**before, **change})
    assert stopper.state_dict() == before


def test_optimiser_parameters_are_the_tensors_of_its_state() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    assert get_optim_param(optimizer) == []
    steps(model, optimizer, [torch.randn(8, 3)] * 4)
    shapes = [tuple(tensor.shape) for tensor in get_optim_param(optimizer)]
    assert shapes == [(), (2, 3), (2, 3), (), (2,), (2,)], "step, mean and mean square of each parameter"
    assert get_optim_param(optimizer)[0] == 4


def test_a_seed_seeds_everything() -> None:
    def draw(*seed: int) -> list[float]:
        set_seed(*seed)
        return [float(torch.rand(())), float(np.random.rand()), float(torch.randn(()))]  # noqa: NPY002

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(*seed)) for seed in ((1,), (2,), (1, 1), (1, 2), (2, 1))}) == 5


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "toaster"):
        text = user_error_message(lambda name=name: pick_device(name))
        assert text.startswith(f"--device: '{name}'")


# --------------------------------------------------------------------------------------------------------- checkpoints

IDENTITY = {"format": FORMAT, "model_name": "esmm", "data": "abc", "field_dims": [3, 4]}


def esmm(field_dims: Sequence[int] = (3, 4), seed: int = 0) -> ESMM:
    torch.manual_seed(seed)
    return ESMM(field_dims, 2, 4, (6,), (5,), 2, 0.0)


def test_a_model_there_and_back(tmp_path: Path) -> None:
    save_model(tmp_path / "m.pt", esmm(), IDENTITY)
    other = esmm(seed=1)
    load_weights(tmp_path / "m.pt", other, IDENTITY, "train it")
    for one, two in zip(esmm().parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.pt", "two.pt"):
        save_model(tmp_path / name, esmm(), IDENTITY)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


@pytest.mark.parametrize(("name", "value"), [("field_dims", [3, 5]), ("data", "other"), ("model_name", "ple")])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "m.pt"
    save_model(path, esmm(), {**IDENTITY, name: value})
    text = user_error_message(lambda: load_weights(path, esmm(), IDENTITY, "train it again"))
    assert text == f"{path}: its {name} is {value}, not {IDENTITY[name]}: train it again"


def test_values_that_differ_late_are_not_shown() -> None:
    saved = {**IDENTITY, "field_dims": [3] * 99}
    text = user_error_message(lambda: check_metadata(saved, {"field_dims": [3] * 98 + [4]}, Path("m.pt"), "train it"))
    assert text == "m.pt: its field_dims differs (another --feature_map_rate, or data): train it"


@pytest.mark.parametrize("value", [torch.tensor([3, 4]), [torch.tensor(3), torch.tensor(4)], (3, 4), [3.0, 4.0],
                                   [True, 4], {"3": 4}, None], ids=str)
def test_an_identity_of_another_type_is_another(tmp_path: Path, value: Any) -> None:
    save_model(tmp_path / "m.pt", esmm(), {**IDENTITY, "field_dims": value})
    text = user_error_message(lambda: load_weights(tmp_path / "m.pt", esmm(), IDENTITY, "train it again"))
    assert "its field_dims is " in text


@pytest.mark.parametrize("saved", [
    {}, {"weights": None}, {"weights": []}, {"weights": {}}, {"weights": {"bottom": torch.zeros(3)}},
    {"weights": esmm((3, 5)).state_dict()}, {"weights": dict.fromkeys(esmm().state_dict(), 1.0)},
    {"weights": {name: tensor.double() for name, tensor in esmm().state_dict().items()}},
    {"weights": {name: torch.ones(1).expand(tensor.shape) for name, tensor in esmm().state_dict().items()}},
    {"weights": {name: tensor.to_sparse() for name, tensor in esmm().state_dict().items()}}],
    ids=["nothing", "none", "list", "empty", "other names", "other field sizes", "numbers", "other types",
         "one number as many", "sparse"])
def test_checkpoint_of_other_shapes_is_refused(tmp_path: Path, saved: dict[str, Any]) -> None:
    path = tmp_path / "m.pt"
    save_tensors(path, {**saved, **IDENTITY})
    text = user_error_message(lambda: load_weights(path, esmm(), IDENTITY, "train it again"))
    assert text.startswith(f"{path}: ")
    assert text.endswith(": train it again")


# ------------------------------------------------------------------------------------------------------------ settings


def arguments(*flags: str) -> SLArguments:
    return parse(SLArguments, "", flags)


def test_defaults_are_those_documented() -> None:
    got = arguments()
    assert (got.dataset_name, got.model_name, got.task_num, got.expert_num) == ("rt", "esmm", 0, 8)
    assert (got.batch_size, got.learning_rate, got.weight_decay, got.embed_dim) == (2048, 1e-3, 1e-6, 128)
    assert (got.feature_map_rate, got.seed, got.save_dir, got.device) == (0.2, 2022, "chkpt/SL", "auto")
    assert got == SLArguments()


def test_flags_set_what_they_name() -> None:
    got = arguments("--model_name=ple", "--epoch", "3", "--resume", "--polish=0.5", "--learning_rate=1e-2")
    assert (got.model_name, got.epoch, got.resume, got.polish_lambda, got.learning_rate) == ("ple", 3, True, 0.5, 0.01)


@pytest.mark.parametrize(("flag", "words"), [
    ("--model_name=esm", ["--model_name", "'esm'", "singletask, sharedbottom, esmm, omoe, mmoe, ple, aitm"]),
    ("--numerical=all", ["--numerical", "session, none"]),
    ("--epoch=0", ["--epoch", "0"]),
    ("--epoch=2.5", ["--epoch", "2.5"]),
    ("--epoch=many", ["--epoch", "many"]),
    ("--batch_size=-1", ["--batch_size"]),
    ("--embed_dim=0", ["--embed_dim"]),
    ("--learning_rate=-1", ["--learning_rate"]),
    ("--learning_rate=nan", ["--learning_rate"]),
    ("--weight_decay=-1e-9", ["--weight_decay"]),
    ("--dropout=1", ["--dropout"]),
    ("--feature_map_rate=1.1", ["--feature_map_rate"]),
    ("--task_num=17", ["--task_num"]),
    ("--expert_num=1", ["--expert_num"]),
    ("--seed=-1", ["--seed"]),
    ("--polish=-1", ["--polish"]),
    ("--epochs=3", ["--epochs", "--help"]),
    ("--model=esmm", ["--model", "--help"]),
    ("esmm", ["esmm", "--help"]),
])
def test_invalid_flag_is_refused_in_one_line(flag: str, words: list[str]) -> None:
    text = user_error_message(lambda: arguments(flag))
    assert all(word in text for word in words)


@pytest.mark.parametrize(("kind", "flag", "meant"), [
    (SLArguments, "--model=ple", "--model_name"), (RLArguments, "--model=ple", "--actor_name"),
    (RLArguments, "--model_name=ple", "--actor_name"), (SLArguments, "--lr=0.1", "--learning_rate"),
    (RLArguments, "--lr=0.1", "--critic_lr"), (SLArguments, "--gpu", "--device=cuda"),
    (SLArguments, "--batch=64", "--batch_size"), (SLArguments, "--batch-size=64", "--batch_size"),
    (SLArguments, "--epochs=3", "--epoch"), (SLArguments, "--dim=8", "--embed_dim"),
    (SLArguments, "--lambda=1", "--polish"), (RLArguments, "--dropout=0.1", "--drop_out"),
])
def test_near_miss_of_a_flag_gets_a_hint(kind: type[Arguments], flag: str, meant: str) -> None:
    assert f"(did you mean {meant}? --help" in user_error_message(lambda: parse(kind, "", [flag]))


def test_every_alias_is_a_flag_of_some_program() -> None:
    flags = {name for kind in (SLArguments, RLArguments) for one in fields(kind)
             for name in (one.name, one.metadata["flag"].removeprefix("--"))} | {"out"}
    assert {alias.split("=")[0] for aliases in ALIASES.values() for alias in aliases} <= flags


def write_config(path: Path, config: Any) -> str:
    path.write_text(json.dumps(config), encoding="utf-8")
    return f"--config={path}"


def test_config_gives_settings_and_flags_win(tmp_path: Path) -> None:
    """Both forms; every type; a switch that is on in the file is switched off by --no-NAME. Not --resume."""
    written = SLArguments(model_name="ple", polish_lambda=0.5, bottom_mlp_dims=(32, 16), polish_normalize=True, seed=7)
    for config in ({"command": "c", "settings": {**written.plain(), "resume": True}}, written.plain()):
        flag = write_config(tmp_path / "run.json", config)
        assert arguments(flag) == written
        assert arguments("--seed=8", flag, "--no-polish_normalize", "--polish=0") == replace(
            written, seed=8, polish_normalize=False, polish_lambda=0.0)
    assert arguments(write_config(tmp_path / "part.json", {"embed_dim": 8})) == SLArguments(embed_dim=8)


@pytest.mark.parametrize(("config", "words"), [
    ({"settings": {"embed_dims": 8}}, "has no setting 'embed_dims' (did you mean embed_dim?)"),
    ({"settings": RLArguments().plain(), "command": "python3 RLmain.py"}, "the file is of: python3 RLmain.py"),
    ({"settings": {"embed_dim": 0}}, "--embed_dim: 0 is not between 1 and 65536"),
    ({"settings": {"embed_dim": "8"}}, "--embed_dim: '8' is of type str, not int"),
    ({"settings": {"bottom_mlp_dims": [8, "x"]}}, "--bottom_mlp_dims"),
    ({"settings": {"model_name": None}}, "--model_name: None is of type NoneType"),
    ({"settings": [1]}, "'settings' is not a JSON object"),
    ([1], "expected a JSON object"),
])
def test_wrong_config_is_one_line(tmp_path: Path, config: Any, words: str) -> None:
    flag = write_config(tmp_path / "run.json", config)
    text = user_error_message(lambda: arguments(flag))
    assert text.startswith(f"{tmp_path / 'run.json'}: ")
    assert words in text


def test_missing_config_is_one_line(tmp_path: Path) -> None:
    assert "no such file" in user_error_message(lambda: arguments(f"--config={tmp_path / 'none.json'}"))


@pytest.mark.parametrize("wrong", [{"model_name": "esm"}, {"embed_dim": 0}, {"learning_rate": float("nan")},
                                   {"learning_rate": float("inf")}], ids=str)
def test_settings_are_checked_without_a_command_line_too(wrong: dict[str, Any]) -> None:
    assert f"--{next(iter(wrong))}" in user_error_message(lambda: SLArguments(**wrong))


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for one in fields(SLArguments):
        assert f"--{one.name}" in text
    assert "(default 0.001)" in text


def test_settings_take_numpys_numbers_paths_and_devices() -> None:
    got = SLArguments(epoch=np.int64(3), learning_rate=np.float64(0.01), polish_lambda=1, save_dir=Path("here"),
                      device=torch.device("cpu"))
    assert (got.epoch, got.learning_rate, got.polish_lambda, got.save_dir, got.device) == (3, 0.01, 1.0, "here", "cpu")
    assert [type(one) for one in (got.epoch, got.learning_rate, got.polish_lambda)] == [int, float, float]


@pytest.mark.parametrize(("name", "value"), [("epoch", "1"), ("embed_dim", 8.5), ("learning_rate", "0.1"),
                                             ("resume", 1), ("model_name", None)])
def test_a_setting_of_another_type_is_refused(name: str, value: Any) -> None:
    assert f"--{name}: {value!r} is of type" in user_error_message(lambda: SLArguments(**{name: value}))


def test_panels_without_a_change_are_left_out() -> None:
    """All of them are kept where nothing could change, after one epoch."""
    panels = {"flat": {"a": [1.0, 1.0], "b": [0.0, 0.0]}, "one of them moves": {"a": [1.0, 1.0], "b": [0.0, 0.1]}}
    assert list(varying(panels)) == ["one of them moves"]
    single = {"a": {"a": [1.0]}, "b": {"b": [2.0]}}
    assert varying(single) == single
