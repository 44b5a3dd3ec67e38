"""manifest.json: what the columns of a folder of MDP tables are. Every entry is checked before it is used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.fileio import is_safe_filename, read_json, sha256
from dataset.retailrocket import LONG_TAILED, PROPERTIES, TASKS
from dataset.simulate import config_from_manifest
from dataset.tables import SPLITS, read_feature_table, read_split

FINGERPRINT_KEYS = ("categorical", "tables", "context", "long_tailed", "tasks")  # of a manifest: what the columns are
PAPER_MANIFEST: dict[str, Any] = {
    "source": "RetailRocket, tables as published by the paper's authors",
    "categorical": list(PROPERTIES),
    "tables": {"item_feadf.csv": {"key": "itemid", "fields": list(PROPERTIES)}},
    "context": [],
    "history": "",
    "long_tailed": list(LONG_TAILED),
    "tasks": list(TASKS),
}


def read_manifest(file: Path) -> dict[str, Any]:
    """Read and check a manifest: whatever it says is used, or is refused here. Raises UserError."""
    manifest = read_json(file)
    shape: Mapping[str, type] = {"outputs": dict, "categorical": list, "long_tailed": list, "tasks": list}
    for key, kind in shape.items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"{file}: '{key}' is missing or of the wrong kind: run python3 -m dataset.prepare again")
    if manifest.get("format", 1) != 1:
        raise UserError(f"{file}: 'format' is {manifest['format']!r:.40}, this version reads 1: run python3 -m "
                        "dataset.prepare again")
    manifest = {"tables": {"item_feadf.csv": {"key": "itemid", "fields": manifest["categorical"]}}, "context": [],
                "history": "", **manifest}  # as all manifests were before there were several tables
    tables, context, tasks, history = (manifest[key] for key in ("tables", "context", "tasks", "history"))
    if len(tasks) != 2 or not all(isinstance(task, dict) and _is_identifier(task.get("name")) and _is_identifier(task.get("label"))
                                  for task in tasks):
        raise UserError(f"{file}: 'tasks' is a list of two objects with a name and a label: letters, digits and _ - .")
    if not isinstance(context, list) or not isinstance(tables, dict) or not all(
            isinstance(one, dict) and isinstance(one.get("key"), str) and isinstance(one.get("fields"), list)
            for one in tables.values()):
        raise UserError(f"{file}: 'tables' gives each table of features a key and a list of fields; 'context' is a "
                        "list of fields")
    if history not in ("", *(one["key"] for one in tables.values())):
        raise UserError(f"{file}: 'history' is the key of one of the tables, not {history!r}")
    for key in ("outputs", "tables"):
        for name in manifest[key]:
            _require_safe_name(file, key, name)
    described = [*context, *(name for one in tables.values() for name in one["fields"])]
    categorical = manifest["categorical"]
    if not categorical or not all(isinstance(name, str) for name in (*described, *categorical)):
        raise UserError(f"{file}: 'categorical' and the fields of 'tables' and 'context' are lists of names")
    lost = [name for name in categorical if name not in described]
    if lost:
        raise UserError(f"{file}: field '{lost[0]}' of 'categorical' is in no table and not in 'context'")
    strange = [name for name in manifest["long_tailed"] if name not in categorical]
    if strange:
        raise UserError(f"{file}: '{strange[0]}' of 'long_tailed' is no field of 'categorical'")
    labels = [task["label"] for task in tasks]
    columns = ["timestamp", "sessionid", "visitorid", *context, *labels, *(f"{label}_time" for label in labels),
               *{one["key"] for one in tables.values()}]
    for names in (categorical, described, columns, [task["name"] for task in tasks]):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{file}: '{twice[0]}' stands for two things: fields, keys, labels and names of tasks "
                            "differ from each other")
    if "truth.csv" in manifest["outputs"]:
        config_from_manifest(manifest.get("simulation"), file)
    return manifest


def _is_identifier(value: Any) -> bool:
    """Whether a name can head a column and stand beside a curve."""
    return isinstance(value, str) and re.fullmatch(r"[\w][\w .-]{0,63}", value) is not None


def _require_safe_name(file: Path, key: str, name: str) -> None:
    """Raise UserError where a name of the manifest `file` is not that of a file in its folder."""
    if not is_safe_filename(name):
        raise UserError(f"{file}: '{name:.60}' of '{key}' is not a file name: what it lists lies in the manifest's own "
                        "folder")
    if Path(os.path.realpath(file.parent)) not in Path(os.path.realpath(file.parent / name)).parents:
        raise UserError(f"{file}: '{name:.60}' of '{key}' is a link that leaves the manifest's own folder: put the "
                        "file itself there")


def verify_checksums(path: Path, files: list[str], manifest: dict[str, Any]) -> None:
    file = path / "manifest.json"
    for name in files:
        if name not in manifest["outputs"]:
            raise UserError(f"{file}: 'outputs' does not list {name}: run python3 -m dataset.prepare again")
    for name, digest in manifest["outputs"].items():
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} missing: put the file back, or make the folder anew with "
                            "python3 -m dataset.prepare")
        if sha256(path / name) != digest:
            if name.removesuffix(".csv") in SPLITS:  # a bad cell or column says more than that the file has changed
                read_split(path / name, manifest)
            if name in manifest["tables"]:
                read_feature_table(path / name, manifest["tables"][name]["key"], manifest["tables"][name]["fields"])
            raise UserError(f"{path / name}: not the file that dataset.prepare wrote (its SHA-256 differs from "
                            "manifest.json): was it edited or cut short? Prepare the folder again")
