"""The whole way of an exercise: handed out, handed in by a class with the usual accidents, marked, handed back.

No more kernels are started than the accidents need: each takes seconds.
"""

import csv
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest

from minvqgan.course import marking

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "tests")]
import coursework  # noqa: E402
from test_checks import MUTATIONS  # noqa: E402

pytestmark = pytest.mark.slow

TOUR, QUANTIZER = "00_tour", "02_quantizer"
NAMES = [path.stem for path in coursework.notebooks()]


def cell_of(notebook, name: str):
    return next(cell for cell in notebook.cells if marking.grade_id(cell) == name)


class Class:
    """A course folder, and students who hand in what the tests make of the solutions."""

    def __init__(self, folder: Path):
        self.folder = folder
        coursework.main([str(folder), "--seed", "770077", "--hints", "1"])

    def source(self, name: str):
        return nbformat.read(self.folder / "source" / name / f"{name}.ipynb", 4)

    def hand_in(self, student: str, notebook, name: str = TOUR, file: str | None = None):
        path = self.folder / "submitted" / student / (file or f"{name}/{name}.ipynb")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = notebook if isinstance(notebook, str) else nbformat.writes(notebook)
        path.write_text(text)

    def mark(self) -> dict[tuple[str, str], dict]:
        coursework.main([str(self.folder)])
        with open(self.folder / "grades.csv") as file:
            return {(row["student"], row["assignment"]): row for row in csv.DictReader(file)}

    def feedback(self, student: str, name: str = TOUR) -> str:
        return (self.folder / "feedback" / student / f"{name}.md").read_text()


def changed(notebook, name: str, old: str, new: str):
    cell = cell_of(notebook, name)
    assert old in cell.source
    cell.source = cell.source.replace(old, new)
    return notebook


SOLUTION = "return pixels.movedim(-1, -3).float() / 127.5 - 1"


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """The class after marking: (class, rows of grades.csv)."""
    course = Class(tmp_path_factory.mktemp("courses") / "course")
    patch = pytest.MonkeyPatch()
    patch.setattr(marking, "SECONDS", 8)

    def solved(name: str = TOUR):
        return course.source(name)

    for name in NAMES:
        course.hand_in("solved", solved(name), name)
    course.hand_in("untouched", nbformat.read(course.folder / "release" / TOUR / f"{TOUR}.ipynb", 4))
    course.hand_in("wrong", changed(solved(), "to_model_range", "/ 127.5 - 1", "/ 255"))
    course.hand_in("syntax", changed(solved(), "to_model_range", SOLUTION, "return ("))

    copied = solved()  # an older try stands above, under the same id
    place = copied.cells.index(cell_of(copied, "to_model_range"))
    copied.cells.insert(place, nbformat.from_dict(json.loads(json.dumps(copied.cells[place]))))
    copied.cells[place].source = "def to_model_range(pixels):\n    return pixels"
    course.hand_in("copied", copied)

    split = solved()  # the function in one cell, a helper in another, and the marking cell in two pieces
    check = cell_of(split, "to_model_range_check")
    split.cells.insert(split.cells.index(check) + 1, nbformat.from_dict(json.loads(json.dumps(check))))
    check.source = "1 +"
    course.hand_in("split", split)

    deleted = solved()
    deleted.cells = [cell for cell in deleted.cells if not str(marking.grade_id(cell)).endswith("_check")]
    course.hand_in("deleted", deleted)

    course.hand_in("dies", changed(solved(), "to_model_range", SOLUTION, "import os; os._exit(1)"))
    course.hand_in("loops", changed(solved(), "to_model_range", SOLUTION, "while True: print('still here')"))
    stuck = solved()
    stuck.cells.insert(2, nbformat.v4.new_code_cell("while True: pass"))
    course.hand_in("stuck", stuck)
    course.hand_in("leaves", changed(solved(), "to_model_range", SOLUTION, "raise SystemExit"))

    course.hand_in("truncated", nbformat.writes(solved())[:900])
    course.hand_in("list", "[1, 2]")
    course.hand_in("other", solved(QUANTIZER))
    course.hand_in("renamed", solved(), file=f"{TOUR}/{TOUR} (1).ipynb")
    course.hand_in("Ada Lovelace", solved(), file="00 tour.ipynb")
    course.hand_in("empty", "", file="notes.txt")

    cheat = changed(solved(), "to_model_range", SOLUTION, "return None")
    cheat.cells.insert(3, nbformat.v4.new_code_cell("checks.to_model_range = lambda *a, **k: print('right')"))
    course.hand_in("cheat", cheat)
    frame = "import sys; x = sys._getframe(1).f_locals['pixels']; return x"
    course.hand_in("frame", changed(solved(), "to_model_range", SOLUTION, frame))
    (course.folder / "submitted" / "stray.zip").write_text("")
    yield course, course.mark()
    patch.undo()


def test_one_row_a_student_and_assignment(marked):
    course, rows = marked
    students = [path.name for path in (course.folder / "submitted").iterdir() if path.is_dir()]
    assert len(students) == 19 and rows.keys() == {(student, name) for student in students for name in NAMES}
    assert rows["empty", TOUR]["status"] == rows["wrong", QUANTIZER]["status"] == "not handed in"


def test_solutions_get_all_points(marked):
    _, rows = marked
    for name in NAMES:
        row, cells = rows["solved", name], nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
        of = sum(c.metadata.get("nbgrader", {}).get("points", 0) for c in cells if c.cell_type == "code")
        assert (row["status"], float(row["points"]), float(row["of"])) == ("marked", of, of)


@pytest.mark.parametrize(
    ("student", "points", "status"),
    [
        ("untouched", 0, "marked"),
        ("wrong", 2, "marked"),
        ("syntax", 2, "marked"),
        ("copied", 4, "marked"),
        ("split", 4, "marked"),
        ("deleted", 4, "marked"),
        ("dies", 2, "to_model_range ended the kernel"),
        ("loops", 2, "to_model_range ran longer than"),
        ("stuck", 4, "marked without a cell that ran longer than 8 s: while True: pass"),
        ("leaves", 2, "marked"),
        ("truncated", 0, "unreadable"),
        ("list", 0, "unreadable"),
        ("other", 0, "another notebook: its exercises are Quantizer"),
        ("renamed", 4, "marked"),
        ("Ada Lovelace", 4, "marked"),
        ("cheat", 2, "marked"),
    ],
)
def test_accidents(marked, student, points, status):
    _, rows = marked
    row = rows[student, TOUR]
    assert float(row["points"]) == points and float(row["of"]) == 4 and row["status"].startswith(status), row


def test_reaching_into_the_checks_is_shown(marked):
    _, rows = marked
    assert "changed the checks: to_model_range" in rows["cheat", TOUR]["look"]
    assert "_getframe" in rows["frame", TOUR]["look"] and "f_locals" in rows["frame", TOUR]["look"]
    assert not any(rows[student, TOUR]["look"] for student in ("solved", "wrong", "copied", "untouched"))


def test_feedback_can_be_handed_out(marked):
    course, rows = marked
    assert "# 00_tour: 2 of 4 points" in course.feedback("wrong")
    assert MUTATIONS["to_model_range"][1][2] in course.feedback("wrong")
    assert "to_model_range is still to be written: replace this line" in course.feedback("untouched")
    assert "SyntaxError" in course.feedback("syntax")
    assert "`to_model_range`, 0 of 2: your function ran longer than" in course.feedback("loops")
    for student, name in rows:
        if rows[student, name]["status"] != "not handed in":
            told = course.feedback(student, name)
            assert not re.search(r"770077|Traceback|seed|HIDDEN|\.py|/", told), told
    assert not (course.folder / "feedback" / "empty").exists()


def test_only_what_is_new_is_marked_and_edits_stay(marked, monkeypatch):
    """And an edit of an exercise in source/ reaches the release and the marks of that assignment alone."""
    course, before = marked
    source = course.folder / "source" / TOUR / f"{TOUR}.ipynb"
    notebook = nbformat.read(source, 4)
    monkeypatch.setattr(marking, "mark", lambda path, source: pytest.fail(f"{path} is not new"))
    assert course.mark() == before
    cell_of(notebook, "bits_per_pixel_check").metadata.nbgrader.points = 5
    nbformat.write(notebook, source)
    course.hand_in("wrong", course.source(QUANTIZER), QUANTIZER)
    files = []

    def note(path, source):
        files.append(str(path.relative_to(course.folder / "submitted")))
        return {"status": "marked", "look": [], "exercises": {"x": {"points": 1, "of": 7, "message": "right"}}}

    monkeypatch.setattr(marking, "mark", note)
    after = course.mark()
    assert f"wrong/{QUANTIZER}/{QUANTIZER}.ipynb" in files and f"wrong/{TOUR}/{TOUR}.ipynb" in files
    assert not [file for file in files if "00" not in file and not file.startswith("wrong")]
    assert after["solved", QUANTIZER] == before["solved", QUANTIZER] and after["wrong", TOUR]["of"] == "7"
    assert '"points": 5' in (course.folder / "release" / TOUR / f"{TOUR}.ipynb").read_text()


def test_an_error_of_the_marking_is_a_status_too(marked, monkeypatch):
    course, _ = marked
    monkeypatch.setattr(marking, "mark", lambda path, source: 1 / 0)
    course.hand_in("late", course.source(TOUR))
    row = course.mark()["late", TOUR]
    assert row["status"] == "not marked: ZeroDivisionError: division by zero" and row["points"] == "0"


def test_student_versions_hold_no_solution_no_seed_and_no_answer(tmp_path):
    Class(tmp_path / "course")
    for path in (tmp_path / "course").glob("release/*/*.ipynb"):
        text = path.read_text()
        for word in ("BEGIN SOLUTION", "HIDDEN TESTS", "20201217", "seed="):
            assert word not in text, (path, word)
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("solution"):
                assert "raise NotImplementedError" in cell.source and '"""' in cell.source
            if cell.source.startswith("### Exercise"):
                assert len(re.findall(r"^\d\. ", cell.source, flags=re.M)) == 1
    with pytest.raises(SystemExit):  # nothing would come of it
        coursework.main([str(tmp_path / "course"), "--hints", "0"])


def test_hints():
    text = "Do.\n\n<details><summary>Hints, from vague to plain</summary>\n\n1. a\n2. b\n   c\n3. d\n\n</details>"
    assert coursework.with_hints(text, 0) == "Do.\n\n"
    assert coursework.with_hints(text, 1).count("\n1. a\n") == 1 and "2. b" not in coursework.with_hints(text, 1)
    assert "2. b\n   c" in coursework.with_hints(text, 2) and "3. d" not in coursework.with_hints(text, 2)
    assert coursework.with_hints(text, 2).endswith("</details>")


def test_plain_versions(tmp_path):
    coursework.main([str(tmp_path / "mine"), "--plain"])
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
