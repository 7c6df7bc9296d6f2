"""Every notebook runs from top to bottom with QUICK=1, and what is saved in it comes from a full run.

What the text claims of an output is asserted in the cell that makes it, so a full run tests it; with QUICK=1 claims
about trained models are left out.
"""

import json
import os
import re
from itertools import pairwise

import nbformat
import pytest
from nbclient import NotebookClient

from minvqgan.course import notebook as course

pytestmark = pytest.mark.slow

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
    assert all((ROOT / text.split("`")[1]).is_file() for text in saved)


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
    figures = 0
    for cell in code:  # below each figure its caption, which is also what those hear who cannot see it
        for output, below in pairwise([*cell.outputs, None]):
            if "image/png" in output.get("data", {}):
                figures += 1
                caption = output.metadata["image/png"]["alt"]
                assert len(caption) > 20 and below.data["text/markdown"] == f"*{caption}.*"
    assert figures >= 4
    first = next(o for cell in code for o in cell.outputs if "image/png" in o.get("data", {}))
    assert first.metadata["image/png"]["alt"].startswith("The system: ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    """Goals, run time, equations, questions, something to see and something that breaks; every exercise complete."""
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for word in ("**Goals.**", "**Before.**", "**Run time.**", "**Question.**", "*What to see.*", "breaks", "$$"):
        assert word in text, word
    for number, points in re.findall(r"### Exercise (\d\.\d).*?\n\n\*(\d+) points, \d+ minutes, [^*]+\*", text):
        assert int(points) > 0 and number[0] == str(int(path.name[:2]))
    graded = [c.metadata["nbgrader"] for c in cells if c.cell_type == "code" and "nbgrader" in c.metadata]
    assert len(graded) >= 4 and len({g["grade_id"] for g in graded}) == len(graded)
    assert text.count("### Exercise") == sum(g["grade"] for g in graded) == text.count("<details><summary>Hints")
    assert text.count("**Question.**") == text.count("<details><summary>Answer</summary>") >= 3
    assert text.count("### Open experiment\n\n*10 points") == 1 and cells[-1].metadata["nbgrader"]["points"] == 10


# The project's words: one name for one idea, and the field's.
NOT_USED = r"\b(pictures?|sentences?|shares?|dear|first stages?|by heart|gives up|leave away)\b"


def test_words():
    for path in NOTEBOOKS:
        text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
        # "Neighbours share a window" is another word.
        found = re.search(NOT_USED, text.replace("share a window", "").replace("share one range", ""), re.I)
        assert not found, (path.name, found)


def test_the_table_of_the_readme_counts_right():
    """Points and minutes of the exercises."""
    table = (ROOT / "notebooks" / "README.md").read_text()
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        points = sum(c.metadata.get("nbgrader", {}).get("points", 0) for c in cells if c.cell_type == "code")
        text = "\n".join(c.source for c in cells)
        minutes = sum(int(m) for m in re.findall(r"\*\d+ points, (\d+) minutes", text))
        row = next(line for line in table.splitlines() if f"]({path.name})" in line)
        assert row.endswith(f"| {minutes} min | {points} |"), (path.name, minutes, points)


def test_the_diagram_knows_its_parts():
    with pytest.raises(ValueError, match="the system has no part 'VGG'"):
        course.diagram("VGG")


def test_checkpoints_are_small():
    files = list(course.CHECKPOINTS.glob("*.pt"))
    assert {file.stem for file in files} == {"gpt", "spatial", "cifar_vqvae", "cifar_vqgan", "cifar_gpt"}
    assert sum(file.stat().st_size for file in files) < 15e6


def test_no_path_of_a_machine_is_saved():
    for path in NOTEBOOKS:
        saved = json.dumps(json.loads(path.read_text()))
        assert not re.search(r"/(root|home|tmp|work)/", saved), path
