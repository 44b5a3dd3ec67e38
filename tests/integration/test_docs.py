"""docs/interface.md: its signatures equal those of the code, and all of its examples run."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "interface.md"
LINES = PAGE.read_text(encoding="utf-8").splitlines()
SCRIPTS = ("Train critics by hand", "Train a model from a torch DataLoader")  # headings of blocks that stand alone
SIGNATURE = re.compile(r"(?P<name>\w+(\.\w+)+)\((?P<parameters>.*)\)")
Parameters = list[tuple[str, Any, Any]]  # of each its name, kind and default


class Block(NamedTuple):
    """A python block of the page."""

    heading: str
    line: int  # of the page, where it begins
    code: str


def blocks() -> list[Block]:
    found, heading, begin = [], "", 0
    for number, line in enumerate(LINES, start=1):
        if begin and line == "```":
            found.append(Block(heading, begin, "\n".join(LINES[begin:number - 1])))
            begin = 0
        elif line.startswith("```"):
            begin = number
        elif not begin and line.startswith("#"):
            heading = line.strip("# ")
    return found


def signatures() -> list[str]:
    """Lines outside of the blocks, indented by four blanks; what is indented further continues the line before."""
    found: list[str] = []
    inside = False
    for line in LINES:
        inside ^= line.startswith("```")
        if inside or not line.startswith("    "):
            continue
        if line.startswith("     "):
            found[-1] += " " + line.strip()
        else:
            found.append(line.strip())
    return found


BLOCKS = blocks()
STANDALONE = [block for block in BLOCKS if block.heading in SCRIPTS]


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Tracebacks name the line of the page."""
    exec(compile("\n" * block.line + block.code, str(PAGE), "exec"), namespace)


class Examples(NamedTuple):
    """A working directory after the setup, and the names that the setup has made."""

    folder: Path
    namespace: dict[str, Any]


@pytest.fixture(scope="module")
def examples(rt_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder, namespace = tmp_path_factory.mktemp("examples"), {"__name__": "examples"}
    shutil.copytree(rt_tables, folder / "dataset" / "rt")
    with contextlib.chdir(folder):
        run_block(BLOCKS[0], namespace)
    return Examples(folder, namespace)


def test_examples_of_the_page_run(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace."""
    monkeypatch.chdir(examples.folder)
    for block in BLOCKS[1:]:
        if block not in STANDALONE:
            run_block(block, examples.namespace)


@pytest.mark.parametrize("heading", SCRIPTS)
def test_scripts_of_the_page_run(heading: str, examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a namespace of its own, of at most twelve lines: imports are counted, blank lines are not."""
    monkeypatch.chdir(examples.folder)
    (script,) = (block for block in STANDALONE if block.heading == heading)
    assert len([line for line in script.code.splitlines() if line.strip()]) <= 12
    for picture in examples.folder.glob("*.png"):
        picture.unlink()
    run_block(script, {"__name__": "script"})
    assert [picture.name for picture in examples.folder.glob("*.png")] == re.findall(r"\w+\.png", script.code)


def parse_signature(parameters: str) -> Parameters:
    """The parameters that a signature of the page lists."""
    function = ast.parse(f"def f({parameters}): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    given, kind = function.args, inspect.Parameter
    free: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults))
    found: Parameters = [(one.arg, kind.POSITIONAL_OR_KEYWORD, default_of(value))
                         for one, value in zip(given.args, [*free, *given.defaults], strict=True)]
    if given.vararg:
        found.append((given.vararg.arg, kind.VAR_POSITIONAL, kind.empty))
    found += [(one.arg, kind.KEYWORD_ONLY, default_of(value))
              for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        found.append((given.kwarg.arg, kind.VAR_KEYWORD, kind.empty))
    return found


def default_of(default: ast.expr | None) -> Any:
    return inspect.Parameter.empty if default is None else ast.literal_eval(default)


def parameters_of(name: str) -> Parameters:
    """The parameters that the object of that name takes, without self."""
    parts = name.split(".")
    size = max(size for size in range(1, len(parts)) if (REPOSITORY / Path(*parts[:size]).with_suffix(".py")).exists())
    found: Any = importlib.import_module(".".join(parts[:size]))
    for part in parts[size:]:
        found = getattr(found, part)
    return [(one.name, one.kind, one.default) for one in inspect.signature(found).parameters.values()
            if one.name != "self"]


@pytest.mark.parametrize("signature", signatures(), ids=lambda text: text.split("(")[0])
def test_signature_equals_the_code(signature: str) -> None:
    """Names, order, kinds and defaults; numbers with their types."""
    match = SIGNATURE.fullmatch(signature)
    assert match, signature
    expected, found = parse_signature(match["parameters"]), parameters_of(match["name"])
    assert found == expected
    assert [type(default) for _, _, default in found] == [type(default) for _, _, default in expected]


def test_lines_are_at_most_120_wide() -> None:
    assert [line for line in LINES if len(line) > 120 and not line.startswith("|")] == []
