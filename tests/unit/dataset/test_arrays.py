"""Memory-mapped arrays are those in memory, bit for bit; they are made again where they are damaged."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import read_tree, user_error_message

from common.fileio import sha256
from dataset import arrays, loader, rtrl
from dataset.arrays import MappedIds
from dataset.features import NumericalMode
from dataset.loader import TensorLoader
from dataset.rtrl import Splits, load_splits
from dataset.vocabulary import Catemapper, encode_splits
from train.supervised import evaluate

ROWS = {"train": 4000, "val": 1500, "test": 1500}


def write_log(folder: Path, history: str = "userid", **manifest: Any) -> Path:
    """A log with all that a manifest can have: rows in any order and of equal times, values that are rare, missing,
    unseen in training or written in several ways, users across splits, outcomes that become known late."""
    rng, folder = np.random.default_rng(5), folder / "log"
    folder.mkdir()
    items = pd.DataFrame({"itemid": np.arange(300), "brand": [f"b {number % 40}, \"é\"" for number in range(300)],
                          "size": np.where(np.arange(300) % 7, (np.arange(300) % 11).astype(str), ""),
                          "price": np.where(np.arange(300) % 9, np.arange(300) / 7, np.nan)})
    items.loc[::13, "size"] = " 3.0 "
    users = pd.DataFrame({"userid": np.arange(80), "group": [f"g{number % 5}" for number in range(80)]})
    for number, (split, count) in enumerate(ROWS.items()):
        user = rng.integers(0, 90, count)
        time = np.sort(rng.integers(0, 5000, count)) * 1000 + number * 10**7
        click, delay = rng.random(count) < 0.3, rng.integers(-1000, 10**6, count)
        pay = click & (rng.random(count) < 0.4)
        rows = pd.DataFrame({
            "timestamp": time, "sessionid": number * 10**6 + user * 10 + rng.integers(0, 3, count), "userid": user,
            "itemid": np.minimum(rng.geometric(0.02, count), 310 - 10 * (number == 0)),
            "tab": rng.choice(["", "home", " home", "search", f"only {split}"], count),
            "hour": np.where(rng.random(count) < 0.1, "", (time // 1000 % 24).astype(str)),
            "pay": pay.astype(int), "click": click.astype(int),
            "click_time": pd.Series(np.where(click & (rng.random(count) < 0.9), time + delay, -1)).astype("Int64"),
            "pay_time": pd.Series(np.where(pay, time + delay, -1)).astype("Int64")})
        for name in ("click_time", "pay_time"):
            rows[name] = rows[name].where(rows[name] >= 0)
        rows.sample(frac=1, random_state=1).to_csv(folder / f"{split}.csv", index=False)
    items.to_csv(folder / "items.csv", index=False)
    users.to_csv(folder / "users.csv", index=False)
    names = [*(f"{split}.csv" for split in ROWS), "items.csv", "users.csv"]
    (folder / "manifest.json").write_text(json.dumps({
        "format": 1, "outputs": {name: sha256(folder / name) for name in names}, "history": history,
        "categorical": ["tab", "brand", "size", "group", "itemid"], "id_fields": ["itemid"],
        "context": ["tab", "hour"], "numbers": ["price", "hour"], "long_tailed": ["brand", "itemid"],
        "tables": {"items.csv": {"key": "itemid", "fields": ["brand", "size", "price"]},
                   "users.csv": {"key": "userid", "fields": ["group"]}},
        "rates": ["brand", "itemid", "userid", "userid&tab", "tab&size&group"],
        "tasks": [{"name": "CTR", "label": "click", "given": ""}, {"name": "CTCVR", "label": "pay", "given": "CTR"}],
        **manifest}))
    return folder


def both(folder: Path, numerical: NumericalMode = "rates", task_num: int = 0) -> tuple[Splits, Splits]:
    return load_splits(folder, numerical, task_num, "memory"), load_splits(folder, numerical, task_num, "mapped")


def parts(memory: Splits, mapped: Splits) -> Any:
    return [(getattr(memory, split), getattr(mapped, split)) for split in ("train", "val", "test")]


def assert_equal(memory: Splits, mapped: Splits) -> None:
    for rate in (0.2, 0.0, 0.7, 1.0):
        assert encode_splits(memory, rate).state_dict() == encode_splits(mapped, rate).state_dict()
        for own, other in parts(memory, mapped):
            assert isinstance(other.categorical, MappedIds)
            np.testing.assert_array_equal(own.categorical, other.categorical)
    for own, other in parts(memory, mapped):
        assert own.metadata == other.metadata
        assert own.numerical_names == other.numerical_names
        for name in ("numerical", "labels", "session", "timestamp", "user"):
            one, two = getattr(own, name), getattr(other, name)
            assert one.dtype == two.dtype, name
            assert one.tobytes() == np.ascontiguousarray(two).tobytes(), name
        assert own.keys.keys() == other.keys.keys()
        assert all(np.array_equal(own.keys[key], other.keys[key]) for key in own.keys)
        for name in ("starts", "ends", "row_start"):
            np.testing.assert_array_equal(getattr(own.sessions, name), getattr(other.sessions, name))
        for name, column in own.fields.items():
            mapped_column = other.fields[name]
            texts = [np.append(of.values, "")[of.codes].tolist() for of in (column, mapped_column)]
            assert texts[0] == texts[1], name
        for one, two in zip(own[np.array([5, 3])], other[np.array([5, 3])], strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("vectors", [1, arrays.CHUNK_VECTORS])
@pytest.mark.parametrize("history", ["userid", ""])
def test_all_that_a_manifest_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: int,
                                      history: str) -> None:
    """Also where blocks are small: sessions, users and moments do not end with them."""
    monkeypatch.setattr(arrays, "CHUNK_VECTORS", vectors)
    monkeypatch.setattr(arrays, "VALUES_AT_ONCE", 7)
    assert_equal(*both(write_log(tmp_path, history)))


@pytest.mark.parametrize("numerical", ["rates", "session", "none"])
def test_a_simulated_log(tables: Path, numerical: NumericalMode) -> None:
    memory, mapped = both(tables, numerical)
    assert_equal(memory, mapped)
    for own, other in parts(memory, mapped):
        pd.testing.assert_frame_equal(own.ground_truth, other.ground_truth)
    one, two = both(tables, numerical, task_num=1)
    assert_equal(one, two)


def test_published_tables_without_a_manifest(tables: Path) -> None:
    for name in ("manifest.json", "truth.csv"):
        (tables / name).unlink()
    assert_equal(*both(tables))


def test_what_is_printed_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_log(tmp_path)
    load_splits(folder, data="memory")
    memory = capsys.readouterr().out
    load_splits(folder, data="mapped")
    made = capsys.readouterr().out
    assert "rows sorted by session and time" in memory
    assert "stripped of whitespace" in memory
    assert "missing: replaced by the row's time" in memory
    assert sorted(memory.splitlines()) == sorted(line for line in made.splitlines() if "once, in" not in line)
    load_splits(folder, data="mapped")
    assert not capsys.readouterr().out, "they are there"


@pytest.mark.parametrize("change", ["session", "label", "key", "rows", "column"])
def test_errors_are_the_same(tmp_path: Path, change: str) -> None:
    folder = write_log(tmp_path)
    name = "items" if change == "key" else "val"
    rows = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
    if change == "session":
        rows.loc[7, "sessionid"] = str(pd.read_csv(folder / "train.csv")["sessionid"][3])
    elif change == "label":
        rows.loc[rows["click"] == "0", "pay"] = "1"
    elif change == "key":
        rows.loc[9, "itemid"] = "4"
    elif change == "rows":
        rows = rows.iloc[:0]
    else:
        rows = rows.drop(columns="click_time")
    rows.to_csv(folder / f"{name}.csv", index=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"][f"{name}.csv"] = sha256(folder / f"{name}.csv")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    messages = [user_error_message(lambda data=data: load_splits(folder, data=data)) for data in ("memory", "mapped")]
    assert messages[0] == messages[1]
    assert not list(folder.glob("arrays*")), "nothing half-written"


def test_arrays_are_made_once_and_again_if_damaged(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_splits(tables, data="mapped")
    (folder,) = tables.glob("arrays-*")
    files = read_tree(folder)
    assert "scratch" not in " ".join(files)
    load_splits(tables, data="mapped")
    for name, damaged in (("numbers.npy", files["numbers.npy"][:-1] + b"?"), ("codes.npy", files["codes.npy"][:-9]),
                          ("arrays.json", b"{"), ("labels.npy", None)):
        capsys.readouterr()
        (folder / name).unlink()
        if damaged is not None:
            (folder / name).write_bytes(damaged)
        load_splits(tables, data="mapped")
        assert "the arrays are made again" in capsys.readouterr().out
        assert read_tree(folder) == files
    assert whole.fingerprint in folder.name


def test_other_tables_have_other_arrays(tmp_path: Path) -> None:
    folder = write_log(tmp_path)
    load_splits(folder, data="mapped")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "numbers": [], "rates": [], "context": ["tab"]}))
    assert_equal(*both(folder))
    assert len(list(folder.glob("arrays-*"))) == 2


def test_mapped_where_the_tables_do_not_fit(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_splits(tables).train.is_mapped
    monkeypatch.setattr(rtrl, "available_memory", lambda: 2.0**20)
    assert load_splits(tables).train.is_mapped


@pytest.mark.parametrize("function", ["os.posix_fallocate", "os.rename", "pathlib.Path.mkdir"])
def test_arrays_that_cannot_be_written(tables: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """One line, and nothing half-written; then they are made."""
    before = read_tree(tables)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(function, lambda *_, **__: (_ for _ in ()).throw(full))
        message = user_error_message(lambda: load_splits(tables, data="mapped"))
    assert message == (f"{tables}: memory-mapped arrays cannot be written beside the tables: No space left on device: "
                       "make room or the folder writable, or use --data=memory")
    assert read_tree(tables) == before
    assert load_splits(tables, data="mapped").train.is_mapped


def test_what_a_killed_program_left_is_removed(tables: Path) -> None:
    (tables / "arrays-x.999999999.partial" / "scratch").mkdir(parents=True)
    load_splits(tables, data="mapped")
    assert not list(tables.glob("*.partial"))


# ------------------------------------------------------------------------------------------------------ ids of mappings


def test_a_mapping_of_other_data(tmp_path: Path) -> None:
    """Ids in another order, of some of the values and fields."""
    memory, mapped = both(write_log(tmp_path))
    values = {"size": ["3", "no such size", "10"], "itemid": ["309", "7", "1"]}
    mapper = Catemapper.from_state_dict({"threshold": 0.5, "ids": values}, "mapping")
    for own, other in parts(memory, mapped):
        np.testing.assert_array_equal(mapper.map(own).categorical, mapper.map(other).categorical)
        assert own.metadata == other.metadata


def test_mapped_ids_are_read_like_an_array(tables: Path) -> None:
    memory, mapped = both(tables)
    for splits in (memory, mapped):
        encode_splits(splits, 0.2)
    array, ids = memory.train.categorical, mapped.train.categorical
    assert (ids.shape, len(ids), ids.dtype, ids.ndim) == (array.shape, len(array), array.dtype, 2)
    for rows in (0, slice(3, 9), np.array([4, 0]), np.array([[1, 2], [3, 4]])):
        np.testing.assert_array_equal(array[rows], ids[rows])


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("permuted", [loader.PERMUTED_ROWS, 100])
def test_the_same_batches(tables: Path, monkeypatch: pytest.MonkeyPatch, window: int, seed: int | None,
                          permuted: int) -> None:
    """Of a large data set, too, whose rows are shuffled part by part; and with columns added to the labels."""
    monkeypatch.setattr(loader, "PERMUTED_ROWS", permuted)
    monkeypatch.setattr(loader, "BLOCK_ROWS", 64)
    monkeypatch.setattr(loader, "BLOCKS_AT_ONCE", 4)
    batches = []
    for splits in both(tables):
        encode_splits(splits, 0.2)
        data = TensorLoader(splits.train, 100, seed=seed, window=window)
        data.epoch = 2
        data.add_labels(np.arange(len(splits.train), dtype=np.float32)[:, None])
        batches.append(list(data))
        assert len(data) == len(batches[-1])
    for one, other in zip(*batches, strict=True):
        for own, mapped in zip(one, other, strict=True):
            assert own.dtype == mapped.dtype
            assert torch.equal(own, mapped)
    order = torch.cat([labels[:, -1] for _, _, labels in batches[0]]).long()
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    assert torch.equal(order, torch.arange(len(order))) == (seed is None)


def test_unique_rows_are_the_same(tables: Path) -> None:
    found = []
    for splits in both(tables, "none"):
        encode_splits(splits, 0.2)
        found.append(TensorLoader(splits.test, 100).unique_rows)
    assert len(found[0][0]) < len(found[0][1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Linear(torch.nn.Module):
    """Predictions of ids and numbers (B, F) and (B, N)."""

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        x = (ids.float().sum(dim=1) / 50 + numbers.sum(dim=1)).sigmoid()
        return torch.stack([x, 1 - x**2], dim=1)


@pytest.mark.parametrize("permuted", [loader.PERMUTED_ROWS, 100])
def test_the_same_metrics(tables: Path, monkeypatch: pytest.MonkeyPatch, permuted: int) -> None:
    monkeypatch.setattr(loader, "PERMUTED_ROWS", permuted)
    metrics = []
    for splits in both(tables):
        encode_splits(splits, 0.2)
        metrics.append(evaluate(Linear(), TensorLoader(splits.test, 100), 2, "cpu"))
    assert metrics[0] == metrics[1]
