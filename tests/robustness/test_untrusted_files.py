"""Untrusted files: none can run code, and no name in a file or a flag leads out of its folder."""

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
from conftest import run_in_process, user_error_message
from corruption import with_checksum
from test_corrupt_files import Target, _quick_and_small, run_case, targets  # noqa: F401 -- fixtures

import RLmain
import SLmain
from common.fileio import sha256
from dataset.rtrl import load_splits
from train.Arguments import RLArguments, SLArguments, parse
from train.run import get_dataset

# ------------------------------------------------------------------------------------------------------------ no pickle


class MaliciousPickle:
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
    "torch": of_torch,
    "torch with a checksum": lambda payload, scratch: with_checksum(of_torch(payload, scratch), scratch),
    "old torch": of_old_torch, "numpy archive": of_numpy, "numpy": of_numpy_alone,
    "numpy archive with a checksum": lambda payload, scratch: with_checksum(of_numpy(payload, scratch), scratch),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_no_reader_runs_a_malicious_pickle(targets: dict[str, Target], wrapping: str,
                                           tmp_path: Path) -> None:
    """Every file that a command reads, by the readers of the commands. Where pickle is used, these pickles run."""
    marker, scratch = tmp_path / "owned", tmp_path / "scratch"
    content = WRAPPINGS[wrapping](MaliciousPickle(marker), scratch)
    names = set()
    for target in targets.values():
        for file in set(target.files):
            assert run_case(target, file, content, renamed=False) == "refused", file
            assert not marker.exists(), file
            names.add(file)
    assert names >= {"events.csv", "item_properties_part1.csv", "category_tree.csv", "truth.csv", "simulation.json",
                     "user_features_1k.csv", "train.csv", "item_feadf.csv", "manifest.json", "catemapper.json",
                     "memory.npz", "rt_esmm.pt", "critic1.pth", "checkpoint.pt", "config.json", "metrics.csv"}

    if "torch" in wrapping:
        torch.load(io.BytesIO(content), weights_only=False)
    elif "numpy" in wrapping:
        loaded = np.load(io.BytesIO(content), allow_pickle=True)
        if "archive" in wrapping:
            loaded["state"].tolist()
    else:
        pickle.loads(content)
    assert marker.exists()


@pytest.mark.parametrize(("program", "file"), [
    ("SLmain.py", "dataset/rt/train.csv"), ("SLmain.py", "dataset/rt/manifest.json"),
    ("RLmain.py", "pretrain/rt_esmm.pt")])
def test_programs_refuse_a_malicious_pickle(tables: Path, tmp_path: Path, program: str, file: str) -> None:
    marker, path = tmp_path / "owned", tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(of_torch(MaliciousPickle(marker), tmp_path / "scratch"))
    done = run_in_process(tmp_path, program)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert path.name in line
    assert not marker.exists()


def test_archives_take_no_more_memory_than_bytes(targets: dict[str, Target],  # noqa: F811
                                                 tmp_path: Path) -> None:
    """One number that claims to be a terabyte, and a gigabyte of zeros in a small file."""
    scratch, out = tmp_path / "scratch", io.BytesIO()
    torch.save({"weights": {"a": torch.zeros(1).expand(10**6, 10**6)}}, scratch)
    expanded = with_checksum(scratch.read_bytes(), scratch)
    np.savez_compressed(out, identity=np.zeros(1, np.uint8), state=np.zeros(2**26, np.float32))
    bomb = with_checksum(out.getvalue(), scratch)
    claims = np.lib.format.magic(1, 0) + np.uint16(118).tobytes() + (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + "\n").encode()
    with zipfile.ZipFile(tmp_path / "claims", "w") as archive:
        for name in ("identity", "state"):
            archive.writestr(f"{name}.npy", claims)
    claimed = with_checksum((tmp_path / "claims").read_bytes(), scratch)
    for name in ("replay buffer", "baseline", "critics", "checkpoint"):
        for content in (expanded, bomb, claimed):
            assert run_case(targets[name], targets[name].files[0], content, renamed=False) == "refused"


# ---------------------------------------------------------------------------------------------------------------- paths


OUTSIDE = ["../outside.csv", "sub/outside.csv", "/etc/passwd", "..", ".", "", "a\0b", "a\nb", "x" * 300,
           "./outside.csv", "../rt/train.csv", "link.csv"]


@pytest.mark.parametrize("key", ["outputs", "tables"])
def test_names_in_manifests_stay_in_their_folder(tables: Path, key: str) -> None:
    """And what is outside is not even opened: there is a pipe that never ends."""
    os.mkfifo(tables.parent / "outside.csv")
    (tables / "link.csv").symlink_to(tables.parent / "outside.csv")
    original = (tables / "manifest.json").read_text()
    for name in OUTSIDE:
        manifest = json.loads(original)
        manifest["outputs"][name] = sha256(tables / "item_feadf.csv")
        if key == "tables":
            manifest["tables"] = {name: manifest["tables"]["item_feadf.csv"]}
        (tables / "manifest.json").write_text(json.dumps(manifest))
        text = user_error_message(lambda: load_splits(tables))
        assert text.startswith(f"{tables / 'manifest.json'}: ")
        assert "must be a file in the manifest's directory" in text, name


@pytest.mark.parametrize("name", ["train.csv", "item_feadf.csv", "truth.csv"])
def test_links_out_of_the_folder_are_refused(tables: Path, name: str) -> None:
    """Even to the right content; links within the folder are allowed, and so is a link to the folder itself."""
    fingerprint = load_splits(tables).fingerprint
    shutil.move(tables / name, tables.parent / name)
    (tables / name).symlink_to(tables.parent / name)
    assert "is a link to another directory" in user_error_message(lambda: load_splits(tables))
    (tables / name).unlink()
    shutil.move(tables.parent / name, tables / f"kept_{name}")
    (tables / name).symlink_to(tables / f"kept_{name}")
    (tables.parent / "linked").symlink_to(tables)
    assert load_splits(tables.parent / "linked").fingerprint == fingerprint


@pytest.mark.parametrize("kind", [SLArguments, RLArguments])
def test_data_set_names_contain_no_path(kind: type[Any]) -> None:
    for name in ("../x", "a/b", "/tmp", "..", ".", "", "a\nb", "x" * 300):
        assert "--dataset_name: " in user_error_message(
            lambda name=name: parse(kind, "", [f"--dataset_name={name}"])), name


def test_model_names_are_those_of_the_list(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tables.parent.parent)
    for flag in ("model_name", "critic_model"):
        text = user_error_message(lambda flag=flag: SLmain.main(**{"polish_lambda": 1.0, flag: "../x"}))
        assert f"--{flag}: unknown '../x'" in text
    assert "--actor_name: unknown '../x'" in user_error_message(lambda: RLmain.main(RLArguments(actor_name="../x")))


def test_file_instead_of_a_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    assert str(tmp_path / "mine") in user_error_message(lambda: get_dataset("mine", str(tmp_path)))
