"""No file that is read can run code, and no name that is read or given leads out of its folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import complaint
from corruption import resealed
from test_corrupt_files import Target, _quick_and_small, judge, targets  # noqa: F401 -- fixtures

import RLmain
import SLmain
from common.fileio import sha256
from dataset.rtrl import load_splits
from train.Arguments import RLArguments, SLArguments, parse
from train.run import get_dataset

# ------------------------------------------------------------------------------------------------------------ no pickle


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def of_torch(payload: Any, scratch: Path) -> bytes:
    torch.save({"weights": payload, "settings": payload, "data": "x"}, scratch)
    return scratch.read_bytes()


def of_old_torch(payload: Any, scratch: Path) -> bytes:
    torch.save({"weights": payload}, scratch, _use_new_zipfile_serialization=False)
    return scratch.read_bytes()


def of_numpy(payload: Any, scratch: Path) -> bytes:
    out = io.BytesIO()
    objects = np.array([payload], dtype=object)
    np.savez(out, **dict.fromkeys(("identity", "state", "action", "next_state", "reward", "done", "label"), objects))
    return out.getvalue()


def of_numpy_alone(payload: Any, scratch: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([payload], dtype=object), allow_pickle=True)
    return out.getvalue()


WRAPPINGS: dict[str, Callable[[Any, Path], bytes]] = {
    "text pickle": lambda payload, _: pickle.dumps(payload, 0),
    "pickle": lambda payload, _: pickle.dumps({"weights": payload, "ids": payload}, 4),
    "torch": of_torch, "torch with a checksum": lambda payload, scratch: resealed(of_torch(payload, scratch), scratch),
    "old torch": of_old_torch, "numpy archive": of_numpy, "numpy": of_numpy_alone,
    "numpy archive with a checksum": lambda payload, scratch: resealed(of_numpy(payload, scratch), scratch),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_malicious_pickle_under_any_of_our_names_is_refused_and_runs_nothing(
        targets: dict[str, Target], wrapping: str, tmp_path: Path) -> None:  # noqa: F811
    """Every file that any command reads, by the readers of the commands."""
    marker = tmp_path / "owned"
    content = WRAPPINGS[wrapping](Malicious(marker), tmp_path / "scratch")
    names = set()
    for target in targets.values():
        for file in set(target.files):
            assert judge(target, file, content, renamed=False) == "refused", file
            assert not marker.exists(), file
            names.add(file)
    assert names >= {"events.csv", "item_properties_part1.csv", "category_tree.csv", "truth.csv", "simulation.json",
                     "user_features_1k.csv", "train.csv", "item_feadf.csv", "manifest.json", "catemapper.json",
                     "memory.npz", "rt_esmm.pt", "critic1.pth", "state.pt", "config.json", "metrics.csv"}


def test_the_malicious_pickles_work_where_pickle_is_used(tmp_path: Path) -> None:
    for name, wrap in WRAPPINGS.items():
        marker = tmp_path / f"owned by {name}"
        content = io.BytesIO(wrap(Malicious(marker), tmp_path / "scratch"))
        if "torch" in name:
            torch.load(content, weights_only=False)
        elif "numpy" in name:
            loaded = np.load(content, allow_pickle=True)
            if "archive" in name:
                loaded["state"].tolist()
        else:
            pickle.load(content)
        assert marker.exists(), name


@pytest.mark.parametrize(("command", "file"), [
    (SLmain.cli, "dataset/rt/train.csv"), (SLmain.cli, "dataset/rt/manifest.json"),
    (RLmain.cli, "pretrain/rt_esmm.pt")])
def test_the_commands_end_with_one_line(tables: Path, tmp_path: Path, command: Callable[[], None], file: str,
                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    marker, path = tmp_path / "owned", tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(of_torch(Malicious(marker), tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert path.name in line
    assert not marker.exists()


def test_an_archive_cannot_take_more_memory_than_it_has_bytes(targets: dict[str, Target],  # noqa: F811
                                                              tmp_path: Path) -> None:
    """One number that claims to be a terabyte, and a gigabyte of zeros in a small file."""
    scratch, out = tmp_path / "scratch", io.BytesIO()
    torch.save({"weights": {"a": torch.zeros(1).expand(10**6, 10**6)}}, scratch)
    expanded = resealed(scratch.read_bytes(), scratch)
    np.savez_compressed(out, identity=np.zeros(1, np.uint8), state=np.zeros(2**26, np.float32))
    bomb = resealed(out.getvalue(), scratch)
    claims = np.lib.format.magic(1, 0) + np.uint16(118).tobytes() + (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + "\n").encode()
    with zipfile.ZipFile(tmp_path / "claims", "w") as archive:
        for name in ("identity", "state"):
            archive.writestr(f"{name}.npy", claims)
    claimed = resealed((tmp_path / "claims").read_bytes(), scratch)
    for name in ("replay memory", "baseline", "critics", "state of a run"):
        for content in (expanded, bomb, claimed):
            assert judge(targets[name], targets[name].files[0], content, renamed=False) == "refused"


# ---------------------------------------------------------------------------------------------------------------- paths


OUTSIDE = ["../outside.csv", "sub/outside.csv", "/etc/passwd", "..", ".", "", "a\0b", "a\nb", "x" * 300,
           "./outside.csv", "../rt/train.csv", "link.csv"]


@pytest.mark.parametrize("key", ["outputs", "tables"])
@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name)[:30])
def test_a_name_in_a_manifest_cannot_leave_its_folder(tables: Path, key: str, name: str) -> None:
    """Neither outputs nor tables; and what lies outside is not even opened: a pipe that never ends is there."""
    os.mkfifo(tables.parent / "outside.csv")
    (tables / "link.csv").symlink_to(tables.parent / "outside.csv")
    manifest = json.loads((tables / "manifest.json").read_text())
    manifest["outputs"][name] = sha256(tables / "item_feadf.csv")
    if key == "tables":
        manifest["tables"] = {name: manifest["tables"]["item_feadf.csv"]}
    (tables / "manifest.json").write_text(json.dumps(manifest))
    text = complaint(lambda: load_splits(tables))
    assert text.startswith(f"{tables / 'manifest.json'}: ")
    assert "must be a file in the manifest's directory" in text


@pytest.mark.parametrize("name", ["train.csv", "item_feadf.csv", "truth.csv"])
def test_a_link_that_leaves_the_folder_is_refused_even_with_the_right_content(tables: Path, name: str) -> None:
    shutil.move(tables / name, tables.parent / name)
    (tables / name).symlink_to(tables.parent / name)
    assert "is a link to another directory" in complaint(lambda: load_splits(tables))
    (tables / name).unlink()
    shutil.move(tables.parent / name, tables / f"kept_{name}")
    (tables / name).symlink_to(tables / f"kept_{name}")  # inside it may point where it likes
    load_splits(tables)


def test_the_folder_itself_may_be_a_link(tables: Path) -> None:
    (tables.parent / "linked").symlink_to(tables)
    assert load_splits(tables.parent / "linked").fingerprint == load_splits(tables).fingerprint


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp", "..", ".", "", "a\nb", "x" * 300], ids=ascii)
@pytest.mark.parametrize("kind", [SLArguments, RLArguments])
def test_the_name_of_a_data_set_is_a_name(kind: type[Any], name: str) -> None:
    assert "--dataset_name: " in complaint(lambda: parse(kind, "", [f"--dataset_name={name}"]))


@pytest.mark.parametrize("flag", ["model_name", "critic_model"])
def test_the_name_of_a_model_is_one_of_the_list(flag: str, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tables.parent.parent)
    assert f"--{flag}: unknown '../x'" in complaint(lambda: SLmain.main(**{"polish_lambda": 1.0, flag: "../x"}))
    assert "--actor_name: unknown '../x'" in complaint(lambda: RLmain.main(RLArguments(actor_name="../x")))


def test_a_file_in_place_of_the_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    assert str(tmp_path / "mine") in complaint(lambda: get_dataset("mine", str(tmp_path)))
