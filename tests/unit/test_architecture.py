"""The packages import downwards only, without circles (docs/architecture.md)."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

LAYER = {"common": 0, "dataset": 1, "layers": 1, "slmodels": 2, "env": 2, "agents": 3, "train": 4, "SLmain": 5,
         "RLmain": 5, "predict": 5, "experiments": 6, "benchmarks": 6}
DOCUMENTED = {  # by the user's description
    "layers.layers": ["EmbeddingLayer", "MultiLayerPerceptron"], "layers.critic": ["Critic", "CriticNeg"],
    "layers.esmm": ["ESMM"], "agents.ReplayBuffer": ["ReplayBuffer"], "agents.DDPG_ESMM": ["DDPG_ESMM"],
    "agents.DDPG_ESMM_BC": ["DDPG_ESMM_BC"], "agents.DDPG_ESMM_multiweight": ["DDPG_ESMM_multiweight"],
    "train.Arguments": ["Arguments"], "env": ["MTEnv"], "dataset.rtrl": ["RetailRocketRLDataset"],
    "train.utils": ["get_optim_param", "Catemapper", "EarlyStopper", "ConvergeStopper", "ActionNormalizer",
                    "RlLossPolisher"],
    "train.run": ["get_dataset", "get_model", "sltrain", "sltest", "slpred", "one_iter_offline",
                  "train_and_test_offline", "test", "plot_loss"],
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(REPOSITORY.rglob("*.py"))
           if path.relative_to(REPOSITORY).parts[0].removesuffix(".py") in LAYER}


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    package = module.split(".")[0]
    for imported in imports_of(MODULES[module]):
        other = imported.split(".")[0]
        assert other == package or LAYER[other] < LAYER[package], f"{module} imports {imported}"


def test_imports_have_no_circle() -> None:
    order = TopologicalSorter({module: imports_of(path) - {module} for module, path in MODULES.items()})
    assert set(order.static_order()) == MODULES.keys()


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_names_are_importable(module: str) -> None:
    assert [name for name in DOCUMENTED[module] if not hasattr(importlib.import_module(module), name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_sets_globals_of_another(module: str) -> None:
    """`name.attribute = value` on an imported module, a hidden channel between packages."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    imported = {alias.asname or alias.name.split(".")[-1] for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
                if f"{getattr(node, 'module', '')}.{alias.name}" in MODULES or alias.name in MODULES}
    assigned = [target for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AugAssign)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    assert [ast.unparse(target) for target in assigned if isinstance(target, ast.Attribute)
            and isinstance(target.value, ast.Name) and target.value.id in imported] == []
