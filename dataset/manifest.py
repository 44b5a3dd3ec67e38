"""manifest.json: the schema of a folder of MDP tables. Every entry is checked before it is used."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.fileio import is_safe_filename, read_json

# the entries that define the columns
FINGERPRINT_KEYS = ("categorical", "tables", "context", "long_tailed", "tasks", "rates")
# entries that may be absent; manifests of earlier versions have none of them
DEFAULTS: dict[str, Any] = {"context": [], "history": "", "rates": [], "numbers": [], "id_fields": []}
MAX_TASKS = 16
SPLITS = ("train", "val", "test")


def find_folder(path: Path, name: str) -> Path:
    """The folder of the data set `name`, given that folder, its `train.csv`, or its parent folder."""
    if path.suffix in (".csv", ".parquet") or path.is_file():
        return path.parent
    child, is_named = path / name, path.name == name
    has_splits = any(os.path.lexists(path / file) for file in ("manifest.json", "train.csv"))
    if (is_named and has_splits) or (not child.exists() and (is_named or has_splits)):
        return path
    return child


def find_dataset(path: Path, name: str) -> tuple[Path, bool]:
    """The folder of a data set, and whether it is there; where `rt` is not, it can be simulated. Raises UserError where
    another is not, and where somebody's tables are in the place where `rt` would be simulated."""
    folder = find_folder(path, name)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return folder, True
    hint = f"make it with python3 -m dataset.prepare --raw DIR --out {folder} (KuaiRand: --source kuairand)"
    if name != "rt":
        raise UserError(f"{folder}: no such data set: {hint}")
    theirs = sorted(folder.parent.glob("*.csv*"))
    if theirs:
        raise UserError(f"{folder}: no such data set, and none is simulated beside {theirs[0].name}: {hint}")
    return folder, False


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
    manifest = {"tables": {"item_feadf.csv": {"key": "itemid", "fields": manifest["categorical"]}}, **DEFAULTS,
                **manifest}
    tables, context, tasks, history = (manifest[key] for key in ("tables", "context", "tasks", "history"))
    if not 1 <= len(tasks) <= MAX_TASKS or not all(
            isinstance(task, dict) and _is_identifier(task.get("name")) and _is_identifier(task.get("label"))
            for task in tasks):
        raise UserError(f"{path}: 'tasks' is a list of 1 to {MAX_TASKS} objects with a name and a label: letters, "
                        "digits and _ - .")
    task_parents(tasks, path)
    if not isinstance(context, list) or not isinstance(tables, dict) or not all(
            isinstance(table, dict) and isinstance(table.get("key"), str) and isinstance(table.get("fields"), list)
            for table in tables.values()):
        raise UserError(f"{path}: 'tables' maps each feature table to a key and a list of fields; 'context' is a list "
                        "of fields")
    if not isinstance(history, str):
        raise UserError(f"{path}: 'history' is the name of an id of the rows, not {history!r:.40}")
    for entry in ("outputs", "tables"):
        for name in manifest[entry]:
            _require_safe_name(path, entry, name)
    fields = [*context, *(field for table in tables.values() for field in table["fields"])]
    categorical = manifest["categorical"]
    if not categorical or not all(isinstance(field, str) for field in (*fields, *categorical)):
        raise UserError(f"{path}: 'categorical' and the fields of 'tables' and 'context' are lists of names")
    for entry in ("long_tailed", "rates", "numbers", "id_fields"):
        if not isinstance(manifest[entry], list):
            raise UserError(f"{path}: '{entry}' is a list of fields")
    _require_known(path, "categorical", categorical, [*fields, *manifest["id_fields"]],
                   "it is in no table, 'context' or 'id_fields'")
    _require_known(path, "numbers", manifest["numbers"], fields, "it is in no table and not in 'context'")
    for entry in ("long_tailed", "id_fields"):
        _require_known(path, entry, manifest[entry], categorical, "it is not in 'categorical'")
    names = [name for entry in manifest["rates"] for name in str(entry).split("&")]
    _require_known(path, "rates", names, [*categorical, *id_columns(manifest)], "it is not in 'categorical'")
    labels = [task["label"] for task in tasks]
    columns = ["timestamp", "sessionid", "visitorid", *context, *labels, *(f"{label}_time" for label in labels),
               *id_columns(manifest)]
    for names in ([*categorical, *manifest["numbers"]], fields, columns, [task["name"] for task in tasks]):
        duplicates = [name for name in names if names.count(name) > 1]
        if duplicates:
            raise UserError(f"{path}: name '{duplicates[0]}' is not unique: fields, keys, labels and task names must "
                            "differ")
    if table_file(manifest, "truth") in manifest["outputs"]:
        from dataset.simulate import config_from_manifest

        config_from_manifest(manifest.get("simulation"), path)
    return manifest


def task_parents(tasks: Sequence[Mapping[str, str]], source: str | Path) -> list[int] | None:
    """The number of the task that each task is given, -1 for none, (T,).

    "given" is the name of an earlier task that this one implies and is conditional on, as CTCVR is on CTR, or "" for
    none. One or two tasks may lack it: None, the second is then given the first. Raises UserError.
    """
    if len(tasks) <= 2 and not any("given" in task for task in tasks):
        return None
    names, parents = [task["name"] for task in tasks], []
    for number, task in enumerate(tasks):
        given = task.get("given", None if number else "")
        if given not in ("", *names[:number]):
            raise UserError(f"{source}: task '{task['name']}': 'given' is "
                            + ("missing" if given is None else f"{given!r:.40}")
                            + ': the name of the earlier task that it implies, or "" for none')
        parents.append(names.index(given) if given else -1)
    return parents


def _require_known(path: Path, entry: str, fields: Sequence[Any], known: Sequence[str], reason: str) -> None:
    unknown = [field for field in fields if field not in known]
    if unknown:
        raise UserError(f"{path}: '{entry}' contains unknown field '{unknown[0]}': {reason}")


def table_file(manifest: Mapping[str, Any], name: str) -> str:
    """The file of a table of a folder, such as `train`: CSV unless the manifest has it in Parquet."""
    return f"{name}.parquet" if f"{name}.parquet" in manifest.get("outputs", ()) else f"{name}.csv"


def id_columns(manifest: Mapping[str, Any]) -> list[str]:
    """The columns of the rows that are ids: the keys of the tables, of the history, and ids that are fields."""
    keys = [str(table["key"]) for table in manifest["tables"].values()]
    return [*dict.fromkeys([*keys, *filter(None, [manifest["history"]]), *manifest["id_fields"]])]


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
