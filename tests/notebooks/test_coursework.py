"""The whole way of an exercise: handed out, solved, not solved or solved wrongly, and marked by nbgrader."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from test_checks import MUTATIONS  # noqa: E402


def coursework(*words):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "notebooks" / "coursework.py"), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def cell_of(notebook, name: str):
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Three students hand in all assignments: the solutions, the untouched notebooks, and wrong answers throughout."""
    folder = tmp_path_factory.mktemp("course")
    done = coursework(folder)
    assert done.returncode == 0, done.stderr
    for release in (folder / "release").iterdir():
        name = release.name
        for student in ("solved", "untouched", "wrong"):
            (folder / "submitted" / student / name).mkdir(parents=True)
        file = f"{name}.ipynb"
        shutil.copy(release / file, folder / "submitted" / "untouched" / name / file)
        source = nbformat.read(folder / "source" / name / file, 4)
        nbformat.write(source, folder / "submitted" / "solved" / name / file)
        for cell in source.cells:
            grade = cell.metadata.get("nbgrader", {})
            if grade.get("solution"):
                head, body = cell.source.split("### BEGIN SOLUTION")
                old, new, _ = MUTATIONS[grade["grade_id"]][0]
                cell.source = head + body.replace(old, new)
        nbformat.write(source, folder / "submitted" / "wrong" / name / file)
    done = coursework(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_student_versions_hold_no_solution(course):
    for path in course.glob("release/*/*.ipynb"):
        text = path.read_text()
        assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text and "20201217" not in text
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.metadata.get("nbgrader", {}).get("solution"):
                assert "raise NotImplementedError" in cell.source
                assert '"""' in cell.source


def test_marks(course):
    with open(course / "grades.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 9
    for row in rows:
        assert float(row["of"]) >= 4
        assert float(row["points"]) == (float(row["of"]) if row["student"] == "solved" else 0), row
    graded = {row["assignment"]: float(row["of"]) for row in rows}
    for name, points in graded.items():
        cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        assert sum(c.metadata.get("nbgrader", {}).get("points", 0) for c in cells) == points


def test_a_wrong_answer_gets_a_helpful_message(course):
    for name, mutations in MUTATIONS.items():
        found = [p for p in course.glob("autograded/wrong/*/*.ipynb") if f'"grade_id": "{name}"' in p.read_text()]
        cell = cell_of(nbformat.read(found[0], 4), f"{name}_check")
        said = "".join("\n".join(o.traceback) for o in cell.outputs if o.output_type == "error")
        assert "AssertionError" in said and mutations[0][2] in said, (name, said[-500:])


def test_a_folder_that_is_no_assignment_is_skipped(course):
    (course / "submitted" / "lost" / "99_nothing").mkdir(parents=True)
    shutil.rmtree(course / "submitted" / "solved")
    shutil.rmtree(course / "submitted" / "wrong")
    for folder in list((course / "submitted" / "untouched").iterdir())[1:]:
        shutil.rmtree(folder)
    done = coursework(course)
    assert done.returncode == 0 and "skipped" in done.stderr and "99_nothing" in done.stderr


def test_plain_versions(tmp_path):
    done = coursework(tmp_path / "mine", "--plain")
    assert done.returncode == 0, done.stderr
    paths = sorted((tmp_path / "mine").glob("*.ipynb"))
    assert len(paths) == 9
    for path in paths:
        text = path.read_text()
        assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text and "raise NotImplementedError" in text
        original = nbformat.read(ROOT / "notebooks" / path.name, 4)
        assert len(nbformat.read(path, 4).cells) == len(original.cells)
        for cell in nbformat.read(path, 4).cells:  # still Python
            if cell.cell_type == "code":
                compile(cell.source, path.name, "exec")
