"""Corrupt files: each one loads as an independent reader reads it, or is refused in one line that names it.

A case corrupts one file (`corruption`) and reads it as the commands do. If it loads, the result is compared with a slow
reading of the same bytes (`reference_reader`), and repairs have to be printed with their number; if it is refused, the
message has to name the file, and the row and column of a table that the slow reader rejects. A traceback, a hang, a
number that is not in the file, or memory beyond reason fails.

`make test` runs a few cases of each kind, always the same; `make stress` 10,000, of the seed RMTL_SEED.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import corruption
import hypothesis
import numpy as np
import pytest
import reference_reader
import torch
from conftest import SUMMARY_LINES
from hypothesis import strategies as st
from reference_reader import ReferenceTable, prepare_rows, read_prepared_rows

from agents import ReplayBuffer
from common.checkpoint import load_weights
from common.csv_reader import write_csv
from common.errors import UserError, truncate
from common.fileio import CHECKSUM_LENGTH, CHECKSUM_PREFIX, sha256
from common.run_dir import RunDirectory
from dataset.kuairand import LOG_SCHEMA, USER_FIELDS, VIDEO_FIELDS
from dataset.prepare import prepare
from dataset.retailrocket import EVENT_SCHEMA, EVENTS, PROPERTIES, PROPERTY_SCHEMA
from dataset.rtrl import RetailRocketRLDataset, Splits, load_splits
from dataset.simulate import GROUND_TRUTH_SCHEMA, SimulationConfig, simulate
from dataset.tables import SPLITS
from dataset.vocabulary import Catemapper, encode_splits
from layers import CriticNeg
from SLmain import fit
from slmodels import build
from slmodels.model_file import save_model
from train.Arguments import SLArguments
from train.metrics import Metrics
from train.polish import comparison_table, make_polisher
from train.supervised import Training
from train.utils import EarlyStopper

QUICK_CASES = 250
SECONDS = 20  # a case takes a tenth of one
MEMORY = 4 * 2**30  # beyond what the tests take before
ORDERED = "rows sorted by session and time"
TREE_KINDS = {"categoryid": "id", "parentid": "optional_id"}
USER_KINDS = {"user_id": "id", **dict.fromkeys(USER_FIELDS, "optional_text")}
VIDEO_KINDS = {"video_id": "id", **dict.fromkeys((*VIDEO_FIELDS, "video_duration"), "optional_text")}
NO_PROBLEMS = ReferenceTable([], [])
METADATA = {"data": "fuzz", "field_dims": [4, 3, 2], "reward_type": "bce"}


class Case(NamedTuple):
    """A corrupt file in its place."""

    folder: Path  # of the intact files around it
    path: Path
    content: bytes
    original: bytes


class Target(NamedTuple):
    """A kind of file: where its intact files are, which of them are corrupted and how, and their reader.

    `read` reads as the commands do and compares; it lets UserError pass.
    """

    folder: Path
    files: list[str]
    corrupt: Callable[[random.Random, bytes], bytes]
    read: Callable[[Case], None]
    gzipped: bool = False  # may also be called .gz
    share: int = 1


def read_reference(case: Case, name: str, kinds: dict[str, Any], optional: tuple[str, ...] = (),
             empty: bool = False) -> ReferenceTable:
    """What the slow reader reads in a file, the corrupt one or another one of its folder."""
    damaged = case.path.name.removesuffix(".gz") == name
    if damaged and case.content is corruption.FOLDER:
        return reference_reader.unreadable()
    path = case.path if damaged else case.folder / name
    return reference_reader.read(path.read_bytes(), path.suffix == ".gz", kinds, optional, empty)


@contextlib.contextmanager
def assert_blamed(case: Case, expected: ReferenceTable, others: str = "") -> Iterator[None]:
    """Messages name what the slow reader rejects, or match `others` (a regular expression)."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if not expected.problems:
            assert others, text
            assert re.search(others, text), text
            raise
        if others and re.search(others, text):  # refused for its content, before the whole file was read
            raise
        line, column = expected.problems[0]
        assert text.startswith(str(case.path)), text
        if line:
            assert re.search(rf"\bline {line}\b", text), (text, expected.problems[:3])
        if column:
            shown = re.sub(r"[^\x20-\x7e]", "?", column)
            assert f"column '{truncate(shown, 40)}'" in text, (text, expected.problems[:3])
        raise
    assert not expected.problems, f"read without an error: {expected.problems[:3]}"


def assert_repair_logged(out: str, path: Path, count: int, what: str) -> None:
    """A repair is shown with its count; what was not repaired is not."""
    line = f"{path}: repaired: {count:,} {what}"
    assert (line in out) == (count > 0), (line, out)


# ---------------------------------------------------------------------------------------------------- raw RetailRocket


def prepared(case: Case, source: str = "retailrocket") -> Path:
    """The folder that `dataset.prepare` makes of the case; it is empty before, and not needed afterwards."""
    out = case.folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    prepare(case.folder, out, source=source)
    return out


def printed() -> str:
    stream = sys.stdout
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def read_retailrocket(case: Case) -> None:
    events = read_reference(case, "events.csv", EVENT_SCHEMA)
    parts = [read_reference(case, f"item_properties_part{number}.csv", PROPERTY_SCHEMA, empty=True)
             for number in (1, 2)]
    tree = read_reference(case, "category_tree.csv", TREE_KINDS)
    stems = ("events", "item_properties_part1", "item_properties_part2", "category_tree")
    damaged = dict(zip(stems, (events, *parts, tree), strict=True))[case.path.name.split(".")[0]]
    unknown = [number for number, row in enumerate(events.rows) if row["event"] not in EVENTS]
    expected = None
    if not events.problems and not unknown:
        rows = [(row["timestamp"], row["visitorid"], row["event"], row["itemid"], row["transactionid"])
                for row in events.rows]
        expected = prepare_rows(rows)  # type: ignore[arg-type]
    others = ""
    if unknown:
        others = r"events\.csv(\.gz)?, line \d+, column 'event': unknown event"
    elif not events.problems and expected is None:
        others = "no session has|cannot be cut into"
    with assert_blamed(case, damaged, others):
        out = prepared(case)
    assert expected is not None
    assert read_prepared_rows(out) == expected
    assert_repair_logged(printed(), case.path, damaged.blank_lines, "blank lines skipped")
    assert_repair_logged(printed(), case.path, damaged.na_cells, "NULL, NA, nan or blank cells read as empty")

    boundary = expected[1][0].timestamp
    last: dict[tuple[int, str], tuple[int, str]] = {}
    for part in parts:
        for row in part.rows:
            if row["timestamp"] <= boundary and row["property"] in PROPERTIES:
                key = row["itemid"], row["property"]
                last[key] = max(last.get(key, (-(10**18), "")), (row["timestamp"], row["value"]))
    items = reference_reader.read((out / "item_feadf.csv").read_bytes(), False,
                         {"itemid": "id", **dict.fromkeys(PROPERTIES, "optional_text")})
    assert [row["itemid"] for row in items.rows] == sorted({row.itemid for split in expected for row in split})
    for row in items.rows:
        assert {name: row[name] for name in PROPERTIES} == {
            name: last.get((row["itemid"], name), (0, ""))[1] for name in PROPERTIES}


def read_truth(case: Case) -> None:
    truth = read_reference(case, "truth.csv", GROUND_TRUTH_SCHEMA)
    if case.path.name == "simulation.json":
        with assert_blamed(case, NO_PROBLEMS, re.escape(str(case.path))):
            out = prepared(case)
        assert json.loads((out / "manifest.json").read_text())["simulation"] == json.loads(case.content)
    else:
        with assert_blamed(case, truth, r"truth\.csv, line \d+, column '\w+': .*(is not between|"
                           r"duplicate row)|truth\.csv: no row for item"):
            out = prepared(case)
    facts = {(row["timestamp"], row["visitorid"], row["itemid"]): row for row in truth.rows}
    written = reference_reader.read((out / "truth.csv").read_bytes(), False,
                           {"sessionid": "id", **{k: v for k, v in GROUND_TRUTH_SCHEMA.items() if k != "visitorid"}})
    rows = [row for split in read_prepared_rows(out) for row in split]
    assert [(row["timestamp"], row["sessionid"], row["itemid"]) for row in written.rows] == [row[:3] for row in rows]
    for row in written.rows:
        fact = facts[row["timestamp"], row["sessionid"], row["itemid"]]
        assert {name: row[name] for name in GROUND_TRUTH_SCHEMA if name != "visitorid"} == {
            name: fact[name] for name in GROUND_TRUTH_SCHEMA if name != "visitorid"}


# -------------------------------------------------------------------------------------------------------- raw KuaiRand


def kuairand_raw(folder: Path) -> None:
    rng = random.Random(3)
    folder.mkdir(parents=True)
    lines = [f"{rng.randrange(6)},{rng.randrange(9)},20220425,{1_650_000_000_000 + rng.randrange(60) * 60_000},"
             f"{rng.randrange(2)},{rng.randrange(2)},{rng.randrange(60_000)},{rng.randrange(3)}" for _ in range(90)]
    for number, part in enumerate((lines[:60], lines[60:]), start=1):
        (folder / f"log_standard_part{number}.csv").write_text(
            "\n".join(["user_id,video_id,date,time_ms,is_click,long_view,play_time_ms,tab", *part]) + "\n")
    (folder / "user_features_1k.csv").write_text("\n".join([
        ",".join(["user_id", *USER_FIELDS]), *(",".join(str(rng.randrange(5)) for _ in range(27)) for _ in "1"),
        *(",".join([str(user), *(str(rng.randrange(-1, 4)) for _ in USER_FIELDS)]) for user in range(9, 2, -1)), ""]))
    (folder / "video_features_basic_1k.csv").write_text("\n".join([
        ",".join(["video_id", *VIDEO_FIELDS, "video_duration"]),
        *(",".join([str(video), *(str(rng.randrange(4)) for _ in VIDEO_FIELDS), f"{rng.randrange(90_000)}.0"])
          for video in range(8))]) + "\n")


def read_kuairand(case: Case) -> None:
    files = {"log_standard_part1.csv": LOG_SCHEMA, "log_standard_part2.csv": LOG_SCHEMA,
             "user_features_1k.csv": USER_KINDS, "video_features_basic_1k.csv": VIDEO_KINDS}
    plain = {name: read_reference(case, name, kinds, empty=name.startswith("log"))  # type: ignore[arg-type]
             for name, kinds in files.items()}
    damaged = plain[case.path.name.removesuffix(".gz")]
    log = [row for number in (1, 2) for row in plain[f"log_standard_part{number}.csv"].rows]
    kept: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in log:
        key = row["time_ms"], row["user_id"], row["video_id"]
        kept[key] = min(kept.get(key, row), row,
                        key=lambda r: (-r["play_time_ms"], -r["long_view"], -r["is_click"], r["tab"]))
    rows = [kept[key] for key in sorted(kept)]
    times = [row["time_ms"] for row in rows]
    cuts = [sum(time < times[min(int(share * len(times)), len(times) - 1)] for time in times) for share in (0.6, 0.8)]
    parts = [rows[:cuts[0]], rows[cuts[0]:cuts[1]], rows[cuts[1]:]]
    late = max((row["time_ms"] + max(row["play_time_ms"], 0) for row in rows), default=0)
    with assert_blamed(case, damaged, "" if all(parts) and late < 2**53 else "cannot be cut into|too large for an id"):
        out = prepared(case, "kuairand")
    assert_repair_logged(printed(), case.path, damaged.blank_lines, "blank lines skipped")

    for name, part in zip(SPLITS, parts, strict=True):
        text = reference_reader.read((out / f"{name}.csv").read_bytes(), False, {
            "timestamp": "id", "sessionid": "id", "userid": "id", "itemid": "id", "tab": "optional_text",
            "click": "label", "long_view": "label", "click_time": "optional_id", "long_view_time": "optional_id"})
        expected = []
        for row in part:
            long_view = row["is_click"] * row["long_view"]
            expected.append((row["time_ms"], row["user_id"], row["video_id"], row["tab"], row["is_click"], long_view,
                             row["time_ms"] if row["is_click"] else None,
                             row["time_ms"] + row["play_time_ms"] if long_view else None))
        names = ("timestamp", "userid", "itemid", "tab", "click", "long_view", "click_time", "long_view_time")
        assert sorted(map(str, expected)) == sorted(str(tuple(row[n] for n in names)) for row in text.rows)
        sessions = {(row["sessionid"], row["userid"]) for row in text.rows}
        assert len(sessions) == len({one for one, _ in sessions}) == len({user for _, user in sessions})
    for file, key, name, kinds in (("user_features_1k.csv", "user_id", "userid", USER_KINDS),
                                   ("video_features_basic_1k.csv", "video_id", "itemid", VIDEO_KINDS)):
        known = {row[key]: row for row in reversed(plain[file].rows)}  # the first listing counts
        fields = [one for one in kinds if one not in (key, "video_duration")]
        table = reference_reader.read((out / f"{name.removesuffix('id')}_feadf.csv").read_bytes(), False,
                             {name: "id", **dict.fromkeys(fields, "optional_text"), "video_duration": "optional_text"},
                             ("video_duration",))
        assert [row[name] for row in table.rows] == sorted({row[key] for row in rows})
        for row in table.rows:
            raw = known.get(row[name], dict.fromkeys(kinds, ""))
            assert [row[one] for one in fields] == [reference_reader.normalize_category(raw[one]) for one in fields]
            if key == "video_id":
                assert row["video_duration"] == power_of_two(raw["video_duration"])


def power_of_two(text: str) -> str:
    if not reference_reader.NUMBER.fullmatch(text.strip()) or not 0 <= float(text) / 1000 <= 366 * 24 * 3600:
        return ""
    power = 1
    while 2 * power <= float(text) / 1000:
        power *= 2
    return str(power)


# ---------------------------------------------------------------------------------------------------------- MDP tables


def read_tables(case: Case, manifest: str = "none") -> None:
    """The tables as published (no manifest), with a manifest that agrees with the damage, or with one that does not."""
    manifest_file = case.folder / "manifest.json"
    saved = manifest_file.read_bytes()
    try:
        if manifest == "none":
            manifest_file.unlink()
        elif manifest == "agrees" and case.path.is_file():
            described = json.loads(saved)
            described["outputs"][case.path.name] = sha256(case.path)
            manifest_file.write_text(json.dumps(described))
        compare_tables(case, manifest)
    finally:
        manifest_file.write_bytes(saved)


def compare_tables(case: Case, manifest: str) -> None:
    kinds = {"timestamp": "id", "sessionid": "id", "visitorid": "id", "itemid": "id", "click": "label", "pay": "label",
             "click_time": "optional_id", "pay_time": "optional_id"}
    optional = ("sessionid", "visitorid", "click_time", "pay_time")
    plain = {name: read_reference(case, f"{name}.csv", kinds, optional) for name in SPLITS}
    items = read_reference(case, "item_feadf.csv", {"itemid": "id", **dict.fromkeys(PROPERTIES, "optional_text")})
    damaged = {**plain, "item_feadf": items}[case.path.stem]
    others = [r"SHA-256 differs"] if manifest == "differs" else []
    ids = [row["itemid"] for row in items.rows]
    if len(set(ids)) < len(ids):
        others.append(r"item_feadf\.csv, line \d+, column 'itemid': duplicate item -?\d+")
    if damaged.rows and "sessionid" not in damaged.rows[0] and "visitorid" not in damaged.rows[0]:
        others.append("line 1: column 'sessionid' is missing")
    if manifest == "agrees":
        others.append(r"splits must not share sessions|truth\.csv(, line \d+, column '\w+')?: ")
    if case.content is corruption.FOLDER:
        others.append(f"{re.escape(str(case.path))}: not a file|missing: put the file back")
        damaged = NO_PROBLEMS
    with assert_blamed(case, damaged, "|".join(others)):
        splits = load_splits(case.folder)
    if manifest == "differs":
        assert case.content == case.original
    assert_repair_logged(printed(), case.path, damaged.blank_lines, "blank lines skipped")
    assert_repair_logged(printed(), case.path, damaged.na_cells, "NULL, NA, nan or blank cells read as empty")

    by_item = {row["itemid"]: row for row in items.rows}
    for name in SPLITS:
        rows = [{"sessionid": row.get("visitorid"), **row} for row in plain[name].rows]
        first: dict[int, int] = {}
        for row in rows:
            first[row["sessionid"]] = min(first.get(row["sessionid"], 2**60), row["timestamp"])
        order = sorted(range(len(rows)), key=lambda k: (first[rows[k]["sessionid"]], rows[k]["sessionid"],
                                                        rows[k]["timestamp"], k))
        moved = sum(place != k for place, k in enumerate(order))
        assert_repair_logged(printed(), case.folder / f"{name}.csv", moved, ORDERED)
        rows = [rows[k] for k in order]
        split: RetailRocketRLDataset = getattr(splits, name)
        assert split.session.tolist() == [row["sessionid"] for row in rows]
        assert split.timestamp.tolist() == [row["timestamp"] for row in rows]
        assert split.labels.tolist() == [[row["click"], row["pay"]] for row in rows]
        unknown = dict.fromkeys(PROPERTIES, "")
        assert values_of(split) == [[reference_reader.normalize_category(by_item.get(row["itemid"], unknown)[field])
                                     for field in PROPERTIES] for row in rows]
        sessions: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            sessions.setdefault(row["sessionid"], []).append(row)
        numbers = [numbers for session in sessions.values()
                   for numbers in reference_reader.session_features(session, ("click", "pay"))]
        np.testing.assert_allclose(split.numerical, np.array(numbers), rtol=1e-5, atol=1e-6)


def values_of(split: RetailRocketRLDataset) -> list[list[str]]:
    """The categorical values of each row, as texts; missing ones are empty."""
    columns = [[str(field.values[code]) if code >= 0 else "" for code in field.codes]
               for field in split.fields.values()]
    return [list(row) for row in zip(*columns, strict=True)]


def read_manifest(case: Case, original: Splits) -> None:
    with assert_blamed(case, NO_PROBLEMS, re.escape(str(case.folder))):
        splits = load_splits(case.folder)
    manifest = json.loads(case.content)
    fields = manifest["categorical"]
    labels = {"click": 0, "pay": 1}
    at = [labels[task["label"]] for task in manifest["tasks"]]
    same = all(splits.manifest[key] == original.manifest[key]
               for key in ("categorical", "tables", "context", "long_tailed", "tasks"))
    assert (splits.fingerprint == original.fingerprint) == same, "what columns mean is part of what data are"
    assert splits.task_names == [task["name"] for task in manifest["tasks"]]
    assert splits.long_tailed == manifest["long_tailed"]
    for name in SPLITS:
        one, two = getattr(splits, name), getattr(original, name)
        assert list(one.fields) == fields
        assert one.labels.tolist() == two.labels[:, at].tolist()
        assert one.session.tolist() == two.session.tolist()
        whole = dict(zip(two.fields, zip(*values_of(two), strict=True), strict=True))
        assert values_of(one) == [list(row) for row in zip(*(whole[field] for field in fields), strict=True)]
        assert (one.ground_truth is None) == ("truth.csv" not in manifest["outputs"])
    encode_splits(splits, 0.2)


def read_catemapper(case: Case, original: Splits) -> None:
    with assert_blamed(case, NO_PROBLEMS, re.escape(str(case.path))):
        mapper = Catemapper.load(case.path)
    saved = json.loads(case.content)
    assert mapper.threshold == saved["threshold"]
    assert mapper.ids == {name: {value: number for number, value in enumerate(values, start=1)}
                          for name, values in saved["ids"].items()}
    with assert_blamed(case, NO_PROBLEMS, "" if set(mapper.ids) <= set(original.val.fields) else "field"):
        mapped = mapper.map(original.val)
    columns = dict(zip(original.val.fields, zip(*values_of(original.val), strict=True), strict=True))
    for column, (name, ids) in zip(mapped.categorical.T, mapper.ids.items(), strict=True):
        assert column.tolist() == [ids.get(value, 0) if value else 0 for value in columns[name]]
        assert column.max() < len(ids) + 1


# -------------------------------------------------------------------------------------------- models and replay buffers


def has_checksum(content: bytes) -> bool:
    digest = hashlib.sha256(content[:-CHECKSUM_LENGTH]).hexdigest()
    return content[-CHECKSUM_LENGTH:] == CHECKSUM_PREFIX + digest.encode()


def saved_value(case: Case) -> Any:
    """What a checkpoint that was accepted holds, by torch itself."""
    assert has_checksum(case.content)
    return torch.load(io.BytesIO(case.content), weights_only=True)


def assert_weights(weights: dict[str, torch.Tensor], module: torch.nn.Module) -> None:
    own = module.state_dict()
    assert set(weights) == set(own)
    for name, tensor in own.items():
        assert torch.isfinite(tensor).all()
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name]), name


def small_model(dims: list[int], numbers: int) -> torch.nn.Module:
    return build("esmm", dims, numbers, 4, (8, 4), (4,), 2, 2, 0.2)


def read_baseline(case: Case, original: Splits, metadata: dict[str, Any]) -> None:
    model = small_model(metadata["field_dims"], original.train.numerical_num)
    with assert_blamed(case, NO_PROBLEMS, re.escape(str(case.path)) + ".*: make it anew$"):
        load_weights(case.path, model, metadata, "make it anew")
    value = saved_value(case)
    assert {name: value[name] for name in metadata} == metadata
    assert_weights(value["weights"], model)


def read_critic(case: Case, original: Splits, metadata: dict[str, Any], settings: SLArguments) -> None:
    model = small_model(metadata["field_dims"], original.train.numerical_num)
    with assert_blamed(case, NO_PROBLEMS, re.escape(str(case.path))
               + ".*: python3 RLmain.py --actor_name=esmm --expert_num=2 --embed_dim=4 --bottom_mlp_dims=8,4 "
               "--tower_mlp_dims=4$"):
        polisher = make_polisher(settings, metadata, model, torch.device("cpu"))
    value = saved_value(case)
    assert {name: value[name] for name in ("data", "numerical", "field_dims")} == {
        name: metadata[name] for name in ("data", "numerical", "field_dims")}
    assert_weights(value["weights"], polisher.critics[("critic1.pth", "critic2.pth").index(case.path.name)])


def fit_once(model: torch.nn.Module, splits: Splits, settings: SLArguments, run_dir: RunDirectory) -> None:
    """Train as SLmain.py does, to the best weights."""
    training = Training(model, splits, torch.optim.Adam(model.parameters()), EarlyStopper(settings.patience), run_dir,
                        lambda path, weights: save_model(path, weights, {}), torch.device("cpu"),
                        batch_size=settings.batch_size, seed=settings.seed)
    training.start(settings.plain(), settings.resume)
    fit(training, settings.epoch)
    training.restore_best()


def read_checkpoint(case: Case, original: Splits, metadata: dict[str, Any], settings: SLArguments) -> None:
    model = small_model(metadata["field_dims"], original.train.numerical_num)
    run_dir = RunDirectory(case.folder, "rt_esmm_0.0")
    with assert_blamed(case, NO_PROBLEMS, f"{re.escape(str(case.path))}.*run without --resume to start a new run$"):
        fit_once(model, original, settings, run_dir)
    value = saved_value(case)
    assert value["fingerprint"] == original.fingerprint
    assert_weights(value["stopper"]["best_state"], model)


def read_replay_buffer(case: Case) -> None:
    buffer = ReplayBuffer(4, 2, 20, 4)
    with assert_blamed(case, NO_PROBLEMS, f"{re.escape(str(case.path))}.*run RLmain.py with --refill to fill a new"):
        try:
            buffer.load(case.path, METADATA)
        except UserError:
            assert len(buffer) == 0
            assert not buffer.storage.any()
            raise
    assert has_checksum(case.content)
    with np.load(io.BytesIO(case.content), allow_pickle=False) as file:
        for name, column in buffer.data.items():
            assert np.isfinite(column).all()
            assert column[: len(buffer)].tolist() == file[name].tolist()
        saved = json.loads(file["identity"].tobytes())
    assert {name: saved[name] for name in METADATA} == METADATA
    assert buffer.ptr == saved["next"] % buffer.max_size
    assert len(buffer.sample_batch()["index"]) == min(4, len(buffer))


# ----------------------------------------------------------------------------------------------- the files of a control


def read_control(case: Case, settings: SLArguments) -> None:
    """A corrupt control is skipped with a line that names the file, or its very metrics are in the table."""
    own = [Metrics(0.7, 0.2, 0.1, 0.6, 0.6), Metrics(0.8, 0.1, 0.05, 0.6, math.nan)]
    text = comparison_table(settings, "start", own, own, own, ["CTR", "CTCVR"])
    lines = text.splitlines()
    control = [line for line in lines if line.startswith("control: constant  ")]
    refused = [line for line in lines if line.startswith("control: constant is skipped: ")]
    if refused:
        assert str(case.path) in refused[0], refused
        raise UserError(refused[0])
    config = json.loads((case.folder / "config.json").read_bytes())
    plain = read_reference(case, "metrics.csv", dict.fromkeys(
        ["split", *(f"{figure}_{task}" for task in ("CTR", "CTCVR") for figure in Metrics._fields)], "optional_text"))
    if not control:
        last = [row for row in plain.rows if row["split"] == "test"]
        original = json.loads(case.original) if case.path.name == "config.json" else config
        assert config != original or not last
        return
    assert not plain.problems
    (row,) = [row for row in plain.rows if row["split"] == "test"]
    figures = [float(row[f"{figure}_{task}"]) for task in ("CTR", "CTCVR") for figure in Metrics._fields]
    assert control[0].split()[2:] == [f"{one:.4f}" for one in figures]
    for at, one in enumerate(figures):
        auc = Metrics._fields[at % len(Metrics._fields)].endswith("auc")
        assert 0 <= one <= (1 if auc else math.inf) or (auc and math.isnan(one))


# ----------------------------------------------------------------------------------------------------------- the trials


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """Every kind of file that a command reads, intact, and its readers."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        simulate(folder / "truth" / "raw", SimulationConfig(events=300, items=50, property_rows=100, seed=1))
        shutil.copytree(folder / "truth" / "raw", folder / "rr" / "raw",
                        ignore=shutil.ignore_patterns("truth.csv", "simulation.json"))
        kuairand_raw(folder / "kr" / "raw")
        prepare(folder / "truth" / "raw", folder / "tables" / "rt")
        splits = load_splits(folder / "tables" / "rt")
        mapper = encode_splits(splits, 0.2)

        settings = SLArguments(embed_dim=4, expert_num=2, bottom_mlp_dims=(8, 4), tower_mlp_dims=(4,), epoch=1,
                               save_dir=str(folder / "SL"), resume=True, batch_size=16, polish_lambda=0.0,
                               critic_dir=str(folder / "RL"))
        metadata = settings.metadata("esmm", splits.train.metadata)
        model = small_model(mapper.field_dims, splits.train.numerical_num)
        save_model(folder / "pretrain" / "rt_esmm.pt", model, metadata)
        state = RunDirectory(folder / "checkpoint", "rt_esmm_0.0")
        fit_once(model, splits, settings, state)
        polish = SLArguments(**{**vars(settings), "polish_lambda": 1.0, "resume": False})
        for critic in ("critic1", "critic2"):
            save_model(folder / "RL" / "res_TD3BC_esmm" / f"{critic}.pth", CriticNeg(
                mapper.field_dims, splits.train.numerical_num, 2, (8, 4), (4,)),
                {**metadata, "embed_dim": 2, "critic_encoder": "none", "critic_window": 0})
        controlled = SLArguments(**{**vars(polish), "polish_method": "constant"})
        control = controlled.run_dir
        config = {"settings": controlled.plain(), "start": "start"}
        control.path.mkdir(parents=True)
        control.config.write_text(json.dumps(config))
        figures = Metrics(0.625, 0.25, 0.125, 0.5, 0.75)._asdict()
        write_csv(control.metrics, [
            {"split": "val", "epoch": 1, "loss": 0.25, "auc_CTR": 0.61, "auc_CTCVR": 0.71},
            {"split": "test", "epoch": 1, **{f"{figure}_{task}": value for task in ("CTR", "CTCVR")
                                             for figure, value in figures.items()}}])
        mapper.save(folder / "mapper" / "catemapper.json")
        buffer = ReplayBuffer(4, 2, 20, 4)
        rng = np.random.default_rng(0)
        for _ in range(9):
            buffer.store(*(rng.random(size).astype(np.float32) for size in (4, 2, 4, 2)), False, np.ones(2, np.float32))
        buffer.save(folder / "memory" / "memory.npz", METADATA)

    def checkpoint(rng: random.Random, content: bytes) -> bytes:
        return corruption.corrupt_checkpoint(rng, content, folder / "scratch")

    def of_raw(rng: random.Random, content: bytes) -> bytes:
        corrupt = corruption.corrupt_json if content.startswith(b"{") else corruption.corrupt_table
        return corrupt(rng, content)

    tables = ["train.csv", "val.csv", "test.csv", "item_feadf.csv"]
    logs = ["log_standard_part1.csv", "log_standard_part2.csv", "user_features_1k.csv", "video_features_basic_1k.csv"]
    events = ["events.csv", "events.csv", "item_properties_part1.csv", "item_properties_part2.csv", "category_tree.csv"]
    known = splits, metadata
    return {
        "raw RetailRocket": Target(folder / "rr" / "raw", events, corruption.corrupt_table, read_retailrocket, True, 2),
        "raw KuaiRand": Target(folder / "kr" / "raw", logs, corruption.corrupt_table, read_kuairand, True),
        "truth and simulation": Target(folder / "truth" / "raw", ["truth.csv", "simulation.json"], of_raw, read_truth),
        "published tables": Target(folder / "tables" / "rt", tables, corruption.corrupt_table, read_tables, share=2),
        "tables, manifest agrees": Target(folder / "tables" / "rt", tables, corruption.corrupt_table,
                                          lambda case: read_tables(case, "agrees")),
        "tables, manifest differs": Target(folder / "tables" / "rt", tables, corruption.corrupt_table,
                                           lambda case: read_tables(case, "differs")),
        "manifest": Target(folder / "tables" / "rt", ["manifest.json"], corruption.corrupt_json,
                           lambda case: read_manifest(case, splits), share=2),
        "catemapper": Target(folder / "mapper", ["catemapper.json"], corruption.corrupt_json,
                             lambda case: read_catemapper(case, splits)),
        "replay buffer": Target(folder / "memory", ["memory.npz"],
                                lambda rng, content: corruption.corrupt_replay_buffer(rng, content, folder / "scratch"),
                                read_replay_buffer, share=2),
        "baseline": Target(folder / "pretrain", ["rt_esmm.pt"], checkpoint, lambda case: read_baseline(case, *known)),
        "critics": Target(folder / "RL" / "res_TD3BC_esmm", ["critic1.pth", "critic2.pth"], checkpoint,
                          lambda case: read_critic(case, *known, polish)),
        "checkpoint": Target(folder / "checkpoint", ["checkpoint.pt"], checkpoint,
                                 lambda case: read_checkpoint(case, *known, settings)),
        "files of a control": Target(control.path, ["config.json", "metrics.csv"], of_raw,
                                     lambda case: read_control(case, polish)),
    }


@pytest.fixture(autouse=True)
def _quick_and_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pictures are drawn, nothing waits for the disk, and no more memory is to be had than a reader may take."""
    monkeypatch.setattr("train.supervised.plot_panels", lambda *_, **__: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def on_timeout(_number: int, _frame: object) -> None:
    raise AssertionError(f"still reading after {SECONDS} s")


def run_case(target: Target, file: str, content: bytes, renamed: bool) -> str:
    """Put the corrupt file into its place, read it, put everything back; return the outcome."""
    original = (target.folder / file).read_bytes()
    path = target.folder / (f"{file}.gz" if renamed else file)
    (target.folder / file).unlink()
    before = set(target.folder.iterdir())
    out = io.StringIO()
    signal.signal(signal.SIGALRM, on_timeout)
    signal.alarm(SECONDS)
    try:
        if content is corruption.FOLDER:
            path.mkdir()
        else:
            path.write_bytes(content)
        with contextlib.redirect_stdout(out):
            target.read(Case(target.folder, path, content, original))
    except UserError as error:
        text = str(error)
        assert text.strip()
        assert text.isprintable(), text
        assert len(text) < 2000, text
        return "refused"
    except Exception as error:
        if content is not corruption.FOLDER:
            (target.folder.parent / f"failed {path.name}").write_bytes(content)
            error.add_note(f"the corrupt file: {target.folder.parent / f'failed {path.name}'}")
        raise
    finally:
        signal.alarm(0)
        for left in set(target.folder.iterdir()) - before:
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        (target.folder / file).write_bytes(original)
    return "loaded with repairs" if ": repaired: " in out.getvalue() else "loaded"


def fuzz(target: Target, cases: int, seed: int | None) -> Counter[str]:
    """Run so many cases of a kind, and count the outcomes; the same ones each time, or those of a seed."""
    counts: Counter[str] = Counter()

    @hypothesis.settings(max_examples=cases, derandomize=seed is None, database=None, deadline=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.randoms(use_true_random=False))
    def one(rng: random.Random) -> None:
        file = rng.choice(target.files)
        content = target.corrupt(rng, (target.folder / file).read_bytes())
        if target.gzipped and content is not corruption.FOLDER and rng.randrange(8) == 0:
            content = content if rng.randrange(4) == 0 else corruption.gzip.compress(content, mtime=0)
            counts[run_case(target, file, content, renamed=True)] += 1
        else:
            counts[run_case(target, file, content, renamed=False)] += 1

    if seed is not None:
        one = hypothesis.seed(seed)(one)
    one()
    return counts


def cases_of(targets: dict[str, Target], name: str, total: int) -> int:
    """The share of a kind in so many cases; the shares add up."""
    ends, parts = 0, sum(target.share for target in targets.values())
    for kind, target in targets.items():
        start, ends = ends, ends + target.share
        if kind == name:
            return total * ends // parts - total * start // parts
    raise KeyError(name)


KINDS = ("raw RetailRocket", "raw KuaiRand", "truth and simulation", "published tables", "tables, manifest agrees",
         "tables, manifest differs", "manifest", "catemapper", "replay buffer", "baseline", "critics", "checkpoint",
         "files of a control")


SEED = int(os.environ.get("RMTL_SEED", "2022"))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("total", "seed"), [(QUICK_CASES, None), pytest.param(10_000, SEED, marks=pytest.mark.stress)])
def test_corrupt_files_load_correctly_or_are_refused(targets: dict[str, Target], name: str, total: int,
                                                     seed: int | None) -> None:
    assert tuple(targets) == KINDS
    cases = cases_of(targets, name, total)
    counts = fuzz(targets[name], cases, seed)
    assert sum(counts.values()) >= cases
    SUMMARY_LINES.append(
        f"corrupt files, {name}: {sum(counts.values()):,} cases: {counts['loaded']:,} loaded, "
        f"{counts['loaded with repairs']:,} with repairs, {counts['refused']:,} refused (seed {seed or 'fixed'})")
