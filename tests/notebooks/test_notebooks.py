"""Every notebook runs from top to bottom with QUICK=1, and what is saved in it comes from a full run.

What the text claims of an output is asserted in the cell that makes it, so a full run tests it; with QUICK=1 claims
about trained models are left out.
"""

import ast
import json
import os
import re
import sys
from itertools import pairwise

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from minvqgan.course import notebook as course
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.objective import ObjectiveConfig, textbook_step
from minvqgan.perceptual import LPIPS
from minvqgan.vqgan import VQGAN, VQGANConfig

pytestmark = pytest.mark.slow

ROOT = course.CHECKPOINTS.parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
*LESSONS, SCRATCH = NOTEBOOKS  # the last one builds everything without the package


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
    assert (len(saved) >= 2 or path == SCRATCH) and listings(notebook) == saved
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
    if path == SCRATCH:
        return
    first = next(o for cell in code for o in cell.outputs if "image/png" in o.get("data", {}))
    assert first.metadata["image/png"]["alt"].startswith("The system: ")


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
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
    marked = [cell for cell in cells if "nbgrader" in cell.metadata]
    assert text.count("### Open experiment\n\n*10 points") == 1
    assert [c.metadata["nbgrader"]["points"] for c in marked if c.cell_type == "markdown"] == [10]
    titled = [cell for cell in cells if re.match(r"### (Exercise|Open experiment|Your )", cell.source)]
    assert all(cell.metadata.get("tags") == ["exercise"] for cell in marked + titled)  # an assignment is made of these


def before_the_package(notebook) -> list:
    """Code cells of 09 until the package is imported."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return code[: next(i for i, cell in enumerate(code) if "import minvqgan" in cell.source)]


def test_from_scratch_is_built_from_nothing_and_short():
    notebook = nbformat.read(SCRATCH, 4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for word in ("**Goals.**", "**Before.**", "**Run time.**", "*What to see.*", "breaks", "$$"):
        assert word in text, word
    assert text.count("**Question.**") == text.count("<details><summary>Answer</summary>") >= 5
    cells = before_the_package(notebook)
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = {"torch", "torchvision", "matplotlib", "IPython", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in names} <= allowed
    # What draws the world and the figures is tagged, and not counted.
    lines = sum(
        bool(line.strip()) for cell in cells if not cell.metadata.get("tags") for line in cell.source.split("\n")
    )
    assert lines <= 350 and f"{lines} lines" in text and f"{lines} lines" in (ROOT / "notebooks/README.md").read_text()


def test_the_step_from_scratch_is_the_textbooks():
    """The same gradients as `objective.textbook_step`, from the same weights and images."""
    tree = ast.parse("\n".join(cell.source for cell in before_the_package(nbformat.read(SCRATCH, 4))))
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    written = {}
    exec(compile(tree, str(SCRATCH), "exec"), written)
    torch.manual_seed(0)
    mine, my_disc, features = written["VQGAN"](), written["Discriminator"](), written["Features"]()
    written["features"] = features.eval().requires_grad_(False)
    theirs, their_disc = VQGAN(VQGANConfig()), PatchDiscriminator(channels=32, num_layers=2)
    theirs.load_state_dict(theirs.state_dict() | mine.state_dict())
    their_disc.load_state_dict(my_disc.state_dict())
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    seen = written["gradients"](mine, my_disc, x, 0.5)
    config = ObjectiveConfig(perceptual_weight=0.3, disc_weight=0.3, max_lambda=0.05)
    lambda_ = textbook_step(theirs, their_disc, LPIPS(features), x, config, 0.5)
    assert seen["lambda"] == pytest.approx(lambda_.item(), rel=1e-4)
    for a, b in ((mine, theirs), (my_disc, their_disc)):
        gradients = {name: p.grad for name, p in b.named_parameters()}
        largest = max(g.abs().max() for g in gradients.values())
        for name, p in a.named_parameters():
            assert (p.grad - gradients[name]).abs().max() < 1e-4 * largest, name


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
    for path in LESSONS:
        cells = nbformat.read(path, 4).cells
        points = sum(c.metadata.get("nbgrader", {}).get("points", 0) for c in cells if c.cell_type == "code")
        text = "\n".join(c.source for c in cells)
        minutes = sum(int(m) for m in re.findall(r"\*\d+ points, (\d+) minutes", text))
        row = next(line for line in table.splitlines() if f"]({path.name})" in line)
        assert row.endswith(f"| {minutes} min | {points} |"), (path.name, minutes, points)


def test_checkpoints_are_small():
    files = list(course.CHECKPOINTS.glob("*.pt"))
    assert {file.stem for file in files} == {"gpt", "spatial", "cifar_gpt", "scenes"}
    assert sum(file.stat().st_size for file in files) < 24e6


def test_no_path_of_a_machine_is_saved():
    for path in NOTEBOOKS:
        saved = json.dumps(json.loads(path.read_text()))
        assert not re.search(r"/(root|home|tmp|work)/", saved), path
