"""docs/tour.ipynb runs from its first cell to its last, as in a fresh clone."""

from __future__ import annotations

from pathlib import Path

import nbformat
from conftest import REPOSITORY
from nbclient import NotebookClient


def test_the_tour_runs(tmp_path: Path) -> None:
    for path in REPOSITORY.iterdir():
        if path.name not in ("chkpt", "docs") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    notebook = nbformat.read(REPOSITORY / "docs" / "tour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path / "docs"}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    for part in ("validation AUC", "rank correlation", "control: constant", "this run: full"):
        assert part in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert "CTCVR" in outputs[-1]["data"]["text/plain"]
    assert (tmp_path / "chkpt" / "tour").is_dir()
