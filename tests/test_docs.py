"""docs/interface.md: its examples run, from top to bottom, and its signatures are those of the code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "interface.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python( script)?\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
EXAMPLES = [text for script, text in BLOCKS if not script]
SCRIPTS = [text for script, text in BLOCKS if script]
SIGNATURES = re.findall(r"^\*\*`([\w.]+)\((.*)\)`\*\*$", PAGE, flags=re.MULTILINE)


def execute(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, "docs/interface.md", "exec"), names)


def found(name: str) -> Any:
    """The object of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"{name}: no such module")


def signature(value: Any) -> str:
    """Names and defaults, as the page writes them."""
    words, starred = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(f"{star}{parameter.name}{default}")
    return ", ".join(words)


@pytest.mark.parametrize(("name", "written"), SIGNATURES, ids=[name for name, _ in SIGNATURES])
def test_signatures_are_those_of_the_code(name: str, written: str) -> None:
    assert signature(found(name)) == written


def test_examples_and_scripts_run(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples share their names; a script starts with none, in the folder that the examples leave."""
    folder = tables.parent.parent
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        execute(example, names)
    for script in SCRIPTS:
        execute(script, {"__name__": "script"})
    for name in ("losses.png", "curves.png", "four.png", "catemapper.json", "best.pt"):
        assert (folder / name).exists(), name


def test_the_two_scripts_have_twelve_lines() -> None:
    assert [len(script.splitlines()) <= 12 for script in SCRIPTS] == [True, True]
