"""The house is one-way: a room imports only from its own floor or below (README, "The way of the data")."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "layers": 1, "dataset": 1,
    "slmodels": 2, "train": 2,
    "env": 3, "agents": 3,
    "train.run": 4, "train.offline": 4,
    "SLmain": 5, "RLmain": 5,
    "bench": 6, "grid": 6, "experiments": 6,
}
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in FLOORS]


def floor_of(module: str) -> int | None:
    """The floor of a module of the project; None for one of somebody else's."""
    return FLOORS.get(".".join(module.split(".")[:2]), FLOORS.get(module.split(".")[0]))


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_its_own_floor_or_below(path: Path) -> None:
    mine = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert mine is not None
    for module in imports_of(path):
        theirs = floor_of(module)
        assert theirs is None or theirs <= mine, f"{path.name} (floor {mine}) imports {module} (floor {theirs})"


def test_rooms_of_the_ground_floor_do_not_know_each_other() -> None:
    """Data know nothing of models, nor models of data."""
    for room, other in (("layers", "dataset"), ("dataset", "layers")):
        for path in (ROOT / room).glob("*.py"):
            assert not any(module.split(".")[0] == other for module in imports_of(path)), path


# ----------------------------------------------------------------------------------------------- no code among the data

# Modules that turn bytes into objects of any class, hence into calls; functions that do, and those that run text.
UNSAFE_MODULES = {"pickle", "_pickle", "pickletools", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle",
                  "jsonpickle", "yaml", "dbm", "code", "codeop", "runpy", "imp"}
HARMLESS = {"pickle.UnpicklingError", "pickle.PicklingError"}  # exceptions, to be caught
UNSAFE_CALLS = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__|execfile)|importlib\.import_module|numpy\.(fromfile|loadtxt|genfromtxt)"
    r"|pandas\.(read_pickle|read_hdf|eval)|torch\.(jit|hub|package|serialization|export)\..*|torch\.classes\..*"
    r"|logging\.config\..*|.*\.(to_pickle|read_pickle|add_safe_globals|safe_globals)")
GUARDED = {"torch.load": {"weights_only": True}, "numpy.load": {"allow_pickle": False},
           "numpy.lib.format.read_array": {"allow_pickle": False}, "numpy.lib.npyio.NpzFile": {"allow_pickle": False},
           "numpy.lib.format.open_memmap": {"allow_pickle": False}}


def unsafe(source: str) -> list[str]:
    """What in a program reads data in a way that can run code, by line; imports are followed under any name."""
    tree, found = ast.parse(source), []
    names: dict[str, str] = {}  # here -> in full
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            names |= {alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    imported = {name.split(".")[0] for name in names.values()}

    def full(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and (
                (node.arg, bool(node.value.value)) in (("weights_only", False), ("allow_pickle", True))):
            found.append(f"line {node.value.lineno}: {node.arg}={node.value.value}")
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"line {node.lineno}: {node.module}.{alias.name}" for alias in node.names
                      if node.module.split(".")[0] in UNSAFE_MODULES and f"{node.module}.{alias.name}" not in HARMLESS]
        if not isinstance(node, ast.Name | ast.Attribute) or id(node) in inside:
            continue
        name, call = full(node), calls.get(id(node))
        if name in GUARDED:
            given = {} if call is None else {one.arg: getattr(one.value, "value", None) for one in call.keywords}
            if any(given.get(key) is not value for key, value in GUARDED[name].items()):
                found.append(f"line {node.lineno}: {name} without {GUARDED[name]}")
        elif UNSAFE_CALLS.fullmatch(name) or (name.split(".")[0] in UNSAFE_MODULES & imported and name not in HARMLESS):
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    """No pickle, in whatever wrapping; torch.load always with weights_only=True, numpy with allow_pickle=False."""
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "import pickle\npickle.load(f)", "from pickle import loads", "import pickle as p\np.Unpickler(f)",
    "import torch\ntorch.load(f)", "import torch as t\nt.load(f, weights_only=False)",
    "from torch import load\nload(f)", "from torch import load as get\nget(f, map_location='cpu')",
    "import torch\nread = torch.load", "import numpy as np\nnp.load(f)",
    "import numpy\nnumpy.load(f, allow_pickle=True)", "from numpy import load as x\nx(f)",
    "import numpy as np\nnp.lib.format.read_array(f)", "eval('1')", "exec(text)", "import builtins\nbuiltins.eval(x)",
    "import pandas as pd\npd.read_pickle(f)", "table.to_pickle(f)", "import joblib\njoblib.load(f)",
    "from joblib import load", "import yaml\nyaml.load(f)", "from yaml import unsafe_load",
    "import dill\ndill.loads(b)", "import shelve\nshelve.open(f)", "import marshal\nmarshal.loads(b)",
    "import torch\ntorch.jit.load(f)", "import torch\ntorch.serialization.add_safe_globals([A])",
    "save(x, allow_pickle=True)", "__import__('os')", "import importlib\nimportlib.import_module(name)"])
def test_the_check_knows_what_can_run_code(source: str) -> None:
    assert unsafe(source), source


@pytest.mark.parametrize("source", [
    "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass", "from pickle import UnpicklingError",
    "import torch\ntorch.load(f, weights_only=True)", "import numpy as np\nnp.load(f, allow_pickle=False)",
    "model.eval()", "import re\nre.compile('x')", "import json\njson.load(f)", "code = 1\nprint(code.real)"])
def test_the_check_lets_pass_what_cannot(source: str) -> None:
    assert not unsafe(source)
