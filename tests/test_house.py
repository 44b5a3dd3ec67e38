"""The house is one-way: a room imports only from its own floor or below (README, "The way of the data")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "layers": 1, "dataset": 1,
    "slmodels": 2, "train": 2,
    "env": 3, "agents": 3,
    "train.run": 4, "train.offline": 4, "train.polish": 4,
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


def test_nothing_reads_or_writes_pickle() -> None:
    """torch.load always with weights_only=True, numpy always with allow_pickle=False."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
                if called in safe:
                    assert safe[called] in ast.unparse(node), f"{path.name}, line {node.lineno}"
                assert called not in ("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "pd.read_pickle")
