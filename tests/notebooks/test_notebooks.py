"""Every notebook runs from top to bottom with QUICK=1, and what is saved in it comes from a full run."""

import json
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from minvqgan.course import notebook as course

ROOT = course.CHECKPOINTS.parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def test_there_are_nine():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(9)]


def listings(notebook) -> list[str]:
    """The package's code that a notebook shows."""
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    texts = (output.get("data", {}).get("text/markdown", "") for output in outputs)
    return [text for text in texts if text.startswith("`minvqgan/")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, monkeypatch, tmp_path):
    """And the code that is saved in it is the package's own of today."""
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    notebook = nbformat.read(path, 4)
    saved = listings(notebook)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    assert len(saved) >= 2 and listings(notebook) == saved


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_saved(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not run from top to bottom"
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kinds
    printed = "".join(o.get("text", "") for cell in code for o in cell.outputs if o.output_type == "stream")
    assert "Traceback" not in printed and "Warning" not in printed
    for cell in code:  # marked right, without the words of a QUICK run or a missing solution
        if cell.metadata.get("nbgrader", {}).get("grade"):
            assert "right: " in cell.outputs[0].text
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    for picture in pictures:
        assert len(picture.metadata["image/png"]["alt"]) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    """Goals, run time, equations, questions, something to see and something that breaks; every exercise complete."""
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for word in ("**Goals.**", "**Before.**", "**Run time.**", "**Question.**", "*What to see.*", "breaks", "$$"):
        assert word in text, word
    for number, points in re.findall(r"### Exercise (\d\.\d).*?\n\n\*(\d+) points, \d+ minutes, [^*]+\*", text):
        assert int(points) > 0 and number[0] == str(int(path.name[:2]))
    graded = [c.metadata["nbgrader"] for c in cells if "nbgrader" in c.metadata]
    assert len(graded) >= 4 and len({g["grade_id"] for g in graded}) == len(graded)
    assert text.count("### Exercise") == sum(g["grade"] for g in graded) == text.count("<details>")


def test_checkpoints_are_small():
    files = list(course.CHECKPOINTS.glob("*.pt"))
    assert {file.name for file in files} == {"gpt.pt", "spatial.pt"}
    assert sum(file.stat().st_size for file in files) < 5e6


def test_no_path_of_a_machine_is_saved():
    for path in NOTEBOOKS:
        saved = json.dumps(json.loads(path.read_text()))
        assert not re.search(r"/(root|home|tmp|work)/", saved), path
