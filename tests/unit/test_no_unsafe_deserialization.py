"""No file that is read can run code: no pickle, `torch.load` and `numpy.load` only in their safe modes."""

from __future__ import annotations

import ast
import re

import pytest
from test_architecture import MODULES

# Modules that turn bytes into objects of any class, hence into calls; functions that do, and those that run text.
UNSAFE_MODULES = {"pickle", "_pickle", "pickletools", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle",
                  "jsonpickle", "yaml", "dbm", "code", "codeop", "runpy", "imp"}
HARMLESS = {"pickle.UnpicklingError", "pickle.PicklingError"}  # exceptions, to be caught
UNSAFE_CALLS = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__|execfile)|importlib\.import_module|numpy\.(fromfile|loadtxt|genfromtxt)"
    r"|pandas\.(read_pickle|read_hdf|eval)|torch\.(jit|hub|package|serialization)\..*|torch\.classes\..*"
    r"|torch\.export\.(?!(export|save|Dim|ExportedProgram)$).*"  # those make and write
    r"|logging\.config\..*|.*\.(to_pickle|read_pickle|add_safe_globals|safe_globals)")
GUARDED = {"torch.load": {"weights_only": True}, "numpy.load": {"allow_pickle": False},
           "numpy.lib.format.read_array": {"allow_pickle": False}, "numpy.lib.npyio.NpzFile": {"allow_pickle": False},
           "numpy.lib.format.open_memmap": {"mode": "w+"}}  # it writes


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
            if any(given.get(key) != value for key, value in GUARDED[name].items()):
                found.append(f"line {node.lineno}: {name} without {GUARDED[name]}")
        elif UNSAFE_CALLS.fullmatch(name) or (name.split(".")[0] in UNSAFE_MODULES & imported and name not in HARMLESS):
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_deserializes_code(module: str) -> None:
    """No pickle, in whatever wrapping; torch.load always with weights_only=True, numpy with allow_pickle=False."""
    found = unsafe(MODULES[module].read_text(encoding="utf-8"))
    if module == "experiments.cluster":  # Dask's own protocol, between a user's processes; no file is read
        found = [line for line in found if not line.endswith((": pickle.dumps", ": pickle.loads"))]
    assert found == []


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
    "import torch\ntorch.jit.load(f)", "from torch.export import load\nload(f)",
    "import torch\ntorch.export.load(f)", "import torch\ntorch.serialization.add_safe_globals([A])",
    "save(x, allow_pickle=True)", "__import__('os')", "import importlib\nimportlib.import_module(name)"])
def test_unsafe_calls_are_found(source: str) -> None:
    assert unsafe(source), source


@pytest.mark.parametrize("source", [
    "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass", "from pickle import UnpicklingError",
    "import torch\ntorch.load(f, weights_only=True)", "import numpy as np\nnp.load(f, allow_pickle=False)",
    "import torch\ntorch.export.save(torch.export.export(model, x), f)",
    "model.eval()", "import re\nre.compile('x')", "import json\njson.load(f)", "code = 1\nprint(code.real)"])
def test_safe_calls_are_not_found(source: str) -> None:
    assert not unsafe(source)
