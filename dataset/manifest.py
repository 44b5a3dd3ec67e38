"""manifest.json: the schema of a folder of MDP tables. Every entry is checked before it is used."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.fileio import is_safe_filename, read_json, sha256
from dataset.retailrocket import LONG_TAILED, PROPERTIES, TASKS
from dataset.simulate import config_from_manifest
from dataset.tables import SPLITS, read_feature_table, read_split

# the entries that define the columns
FINGERPRINT_KEYS = ("categorical", "tables", "context", "long_tailed", "tasks", "rates")
PAPER_MANIFEST: dict[str, Any] = {
    "source": "RetailRocket, tables as published by the paper's authors",
    "categorical": list(PROPERTIES),
    "tables": {"item_feadf.csv": {"key": "itemid", "fields": list(PROPERTIES)}},
    "context": [],
    "history": "",
    "long_tailed": list(LONG_TAILED),
    "rates": [],
    "tasks": list(TASKS),
}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a manifest. Raises UserError naming an entry that is missing or invalid."""
    manifest = read_json(path)
    for key, expected_type in {"outputs": dict, "categorical": list, "long_tailed": list, "tasks": list}.items():
        if not isinstance(manifest.get(key), expected_type):
            raise UserError(f"{path}: '{key}' is missing or of the wrong type: run python3 -m dataset.prepare again")
    if manifest.get("format", 1) != 1:
        raise UserError(f"{path}: 'format' is {manifest['format']!r:.40}, this version reads 1: run python3 -m "
                        "dataset.prepare again")
    # Manifests of earlier versions have a single table.
    manifest = {"tables": {"item_feadf.csv": {"key": "itemid", "fields": manifest["categorical"]}}, "context": [],
                "history": "", "rates": [], **manifest}
    tables, context, tasks, history = (manifest[key] for key in ("tables", "context", "tasks", "history"))
    if len(tasks) != 2 or not all(
            isinstance(task, dict) and _is_identifier(task.get("name")) and _is_identifier(task.get("label"))
            for task in tasks):
        raise UserError(f"{path}: 'tasks' is a list of two objects with a name and a label: letters, digits and _ - .")
    if not isinstance(context, list) or not isinstance(tables, dict) or not all(
            isinstance(table, dict) and isinstance(table.get("key"), str) and isinstance(table.get("fields"), list)
            for table in tables.values()):
        raise UserError(f"{path}: 'tables' maps each feature table to a key and a list of fields; 'context' is a list "
                        "of fields")
    keys = [table["key"] for table in tables.values()]
    if history not in ("", *keys):
        raise UserError(f"{path}: 'history' is the key of one of the tables, not {history!r}")
    for entry in ("outputs", "tables"):
        for name in manifest[entry]:
            _require_safe_name(path, entry, name)
    fields = [*context, *(field for table in tables.values() for field in table["fields"])]
    categorical = manifest["categorical"]
    if not categorical or not all(isinstance(field, str) for field in (*fields, *categorical)):
        raise UserError(f"{path}: 'categorical' and the fields of 'tables' and 'context' are lists of names")
    _require_known(path, "categorical", categorical, fields, "it is in no table and not in 'context'")
    for entry in ("long_tailed", "rates"):
        if not isinstance(manifest[entry], list):
            raise UserError(f"{path}: '{entry}' is a list of fields")
        names = [name for field in manifest[entry] for name in (str(field).split("&") if entry == "rates" else [field])]
        _require_known(path, entry, names, [*categorical, *keys] if entry == "rates" else categorical,
                       "it is not in 'categorical'")
    labels = [task["label"] for task in tasks]
    columns = ["timestamp", "sessionid", "visitorid", *context, *labels, *(f"{label}_time" for label in labels),
               *set(keys)]
    for names in (categorical, fields, columns, [task["name"] for task in tasks]):
        duplicates = [name for name in names if names.count(name) > 1]
        if duplicates:
            raise UserError(f"{path}: name '{duplicates[0]}' is not unique: fields, keys, labels and task names must "
                            "differ")
    if "truth.csv" in manifest["outputs"]:
        config_from_manifest(manifest.get("simulation"), path)
    return manifest


def _require_known(path: Path, entry: str, fields: Sequence[Any], known: Sequence[str], reason: str) -> None:
    unknown = [field for field in fields if field not in known]
    if unknown:
        raise UserError(f"{path}: '{entry}' contains unknown field '{unknown[0]}': {reason}")


def _is_identifier(value: Any) -> bool:
    """Whether a name is usable as a column header and in the legend of a plot."""
    return isinstance(value, str) and re.fullmatch(r"[\w][\w .-]{0,63}", value) is not None


def _require_safe_name(path: Path, entry: str, name: str) -> None:
    """Raise UserError if a name of the manifest `path` is not that of a file in its directory."""
    if not is_safe_filename(name):
        raise UserError(f"{path}: '{name:.60}' of '{entry}' is not a file name: must be a file in the manifest's "
                        "directory")
    if Path(os.path.realpath(path.parent)) not in Path(os.path.realpath(path.parent / name)).parents:
        raise UserError(f"{path}: '{name:.60}' of '{entry}' is a link to another directory: must be a file in the "
                        "manifest's directory")


def verify_checksums(folder: Path, files: Sequence[str], manifest: dict[str, Any]) -> None:
    """Raise UserError if a file is missing, not in the manifest, or different from its SHA-256 there."""
    for name in files:
        if name not in manifest["outputs"]:
            raise UserError(f"{folder / 'manifest.json'}: 'outputs' does not contain {name}: run python3 -m "
                            "dataset.prepare again")
    for name, digest in manifest["outputs"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} missing: put the file back, or make the folder again with "
                            "python3 -m dataset.prepare")
        if sha256(path) != digest:
            if name.removesuffix(".csv") in SPLITS:  # the error of an invalid cell or column is more precise
                read_split(path, manifest)
            if name in manifest["tables"]:
                read_feature_table(path, manifest["tables"][name]["key"], manifest["tables"][name]["fields"])
            raise UserError(f"{path}: checksum mismatch (its SHA-256 differs from manifest.json): was it edited or cut "
                            "short? Prepare the folder again")
