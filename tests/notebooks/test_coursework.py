"""The whole way of an exercise: handed out, handed in by a class with its accidents, mistakes and cheats, marked twice,
handed back. The class is a table, CLASS. What ends or changes an interpreter gets a process of its own in a slow test.
"""

import copy
import csv
import getpass
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from minvqgan.course import marking

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))
import coursework  # noqa: E402

TOUR, QUANTIZER = "00_tour", "02_quantizer"
RANGE, BITS = "to_model_range", "bits_per_pixel"
SOLUTION = {
    RANGE: "return pixels.movedim(-1, -3).float() / 127.5 - 1",
    BITS: "return (H // f) * (W // f) * math.log2(K) / (H * W)",
}
STUB = {name: f'raise NotImplementedError("{marking.STUB.format(name)}")' for name in SOLUTION}


def cell_of(notebook, name: str):
    return next(cell for cell in notebook.cells if marking.grade_id(cell) == name)


def wrote(range_: str = SOLUTION[RANGE], bits: str = SOLUTION[BITS], above: str = "") -> Callable:
    """What the student wrote in the two functions, and in a cell above all others."""

    def edit(notebook) -> None:
        for name, code in ((RANGE, range_), (BITS, bits)):
            cell = cell_of(notebook, name)
            assert SOLUTION[name] in cell.source
            cell.source = cell.source.replace(SOLUTION[name], code)
        if above:
            notebook.cells.insert(1, nbformat.v4.new_code_cell(above))

    return edit


# What else can happen to a solved notebook.


def copied(notebook) -> None:
    """An older try stands above, under the same id."""
    place = notebook.cells.index(cell_of(notebook, RANGE))
    notebook.cells.insert(place, copy.deepcopy(notebook.cells[place]))
    notebook.cells[place].source = "def to_model_range(pixels):\n    return pixels"


def deleted(notebook) -> None:
    notebook.cells = [cell for cell in notebook.cells if not marking.grade_id(cell).endswith("_check")]


def merged(notebook) -> None:
    """Function and marking cell in one; the editor keeps the metadata of the second."""
    check, function = cell_of(notebook, f"{RANGE}_check"), cell_of(notebook, RANGE)
    check.source = function.source + "\n" + check.source
    notebook.cells.remove(function)


def tried(notebook) -> None:
    """The function and a call of it in one cell."""
    cell_of(notebook, RANGE).source += "\n\ntry:\n    to_model_range\nexcept NotImplementedError:\n    pass"


def without_metadata(notebook) -> None:
    for cell in notebook.cells:
        cell.metadata = {}


def other_kernel(notebook) -> None:
    notebook.metadata["kernelspec"] = {"name": "julia-1.9", "display_name": "Julia", "language": "julia"}


def stub_below(notebook) -> None:
    """The solution in a new cell, and the stub still below it."""
    wrote(STUB[RANGE], above=cell_of(notebook, RANGE).source)(notebook)


SOLVED = wrote()
BLACK = wrote("return pixels.movedim(-1, -3) / 255")
UNTOUCHED = wrote(*STUB.values())
IMPORT = "from minvqgan.course import checks"
CHEAT = "return None"
ALWAYS = """import torch
class Yes(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return True
"""


@dataclass
class Student:
    name: str
    edit: Callable | str  # of the solved notebook, or the text of the file
    points: float
    status: str = "marked"  # how it begins
    look: str = ""  # a word of it; "": nothing
    told: str = ""  # a word of the feedback
    file: str = f"{TOUR}/{TOUR}.ipynb"
    alone: bool = False  # it ends or changes the interpreter


CLASS = [
    # Mistakes
    Student("solved", SOLVED, 4),
    Student("untouched", UNTOUCHED, 0, "untouched", told="to_model_range is still to be written: replace this line"),
    Student("half", wrote(STUB[RANGE]), 2, told="to_model_range is still to be written"),
    Student("black", BLACK, 2, told="black (0) must become -1"),
    Student("allwrong", wrote("return 1 / 0", "return K"), 0, told="ZeroDivisionError at `return 1 / 0`"),
    Student("noreturn", wrote(SOLUTION[RANGE][7:]), 2, told="is the `return` missing?"),
    Student("syntax", wrote("return ("), 2, told="SyntaxError"),
    # Accidents with cells
    Student("copied", copied, 4),
    Student("deleted", deleted, 4),
    Student("merged", merged, 4),
    Student("tried", tried, 4),
    Student("lost", without_metadata, 4),
    Student("above", stub_below, 2, look="a solution above the stub", told="the stub below replaces it"),
    Student("julia", other_kernel, 4),
    Student("names", wrote(above="vars = 3\nprint = None\nchecks = None\nlen = 7"), 4),
    Student("float64", wrote(above="import torch\ntorch.set_default_dtype(torch.float64)"), 4),
    Student("loud", wrote(above="print('x' * 10_000_000)"), 4),
    Student("error", wrote(above="import a_package_that_is_nowhere"), 4),
    Student("exit", wrote(above="exit()"), 4, alone=True),
    Student("leaves", wrote("raise SystemExit"), 2, told="SystemExit"),
    Student("dies", wrote("import os; os._exit(1)"), 2, "marked; to_model_range ended", "os.", alone=True),
    Student("loops", wrote("while True: print('still here')"), 2, told="ran longer than", alone=True,
            status="marked; to_model_range ran longer than"),
    Student("twice", wrote("while True: pass", "while True: pass"), 0, alone=True,
            status="marked; to_model_range ran longer than 8 s; bits_per_pixel ran longer than 8 s"),
    Student("stuck", wrote(above="while True: pass"), 4, alone=True,
            status="marked; without a cell that ran longer than 8 s: while True: pass"),
    # Accidents with files
    Student("truncated", "{ \"cells\": [", 0, "unreadable"),
    Student("list", "[1, 2]", 0, "unreadable"),
    Student("renamed", SOLVED, 4, file=f"{TOUR}/{TOUR} (1).ipynb"),
    Student("Ada Lovelace", SOLVED, 4, file="00 tour.ipynb"),
    Student("homework", SOLVED, 4, file="my homework.ipynb"),
    Student("notes", "", 0, "not handed in", file="notes.txt"),
    Student("doejane_12345", SOLVED, 4, file="../doejane_late_12345_678910_00_tour-1.ipynb"),
    Student("Łukasz O'Brien 2", SOLVED, 4, file="../Łukasz O'Brien 2_4711_assignsubmission_file_/00_tour.ipynb"),
    # Cheats
    Student("replaces", wrote(CHEAT, above=f"{IMPORT}\nchecks.to_model_range = print"), 0, alone=True,
            look="minvqgan.course.checks.to_model_range", told="replaced, though the checks use it"),
    Student("recodes", wrote("return pixels",
            above="from minvqgan.course import checking\nchecking.compare.__code__ = (lambda *a, **k: 0).__code__"), 0,
            look="minvqgan.course.checking.compare", alone=True),
    Student("during", wrote(f"{IMPORT}; checks.compare = print; return pixels"), 0, alone=True,
            look="minvqgan.course.checks.compare"),
    Student("frames", wrote("import sys; return sys._getframe(3).f_locals['p']"), 2, look="_getframe"),
    Student("yes", wrote("return Yes()", above=ALWAYS), 2, look="__torch_function__",
            told="expected a tensor, got Yes"),
    Student("item", wrote(CHEAT, above="import torch\ntorch.Tensor.item = lambda self: 0.0"), 0, alone=True,
            look="Tensor.item"),
    Student("imports", wrote(CHEAT, above="import importlib\nimportlib.import_module = lambda name: None"), 2,
            look="uses importlib", alone=True),
    Student("lines", wrote(CHEAT, above="get_ipython().input_transformers_cleanup.append(lambda lines: [])"), 0,
            look="input_transformer", alone=True, told="NameError"),
    Student("reload", wrote(CHEAT, above="import minvqgan, importlib\nminvqgan.__path__[:] = ['.']"), 2,
            look="__path__", alone=True),
    Student("reads", wrote(*STUB.values(), above="from minvqgan.course import notebook as n\n"
            "exec(open(n.CHECKPOINTS.parent / '00_tour.ipynb').read())"), 0, "untouched"),
    Student("finds", wrote("assert not ok; return pixels",
            above="import glob, minvqgan\nhere = minvqgan.__path__[0] + '/..'\n"
            "assert not glob.glob(here + '/notebooks/*.ipynb') and not glob.glob('**/*.ipynb', recursive=True)\n"
            "ok = True"), 2, look="glob", told="at `assert not ok", alone=True),
]  # fmt: skip


class Course:
    """A course folder, and students who hand in what the tests make of the solutions."""

    def __init__(self, folder: Path, *words: str):
        self.folder = folder
        coursework.main([str(folder), "--seed", "770077", "--hints", "1", *words])
        source = self.source()  # the instructor drops an exercise
        source.cells = [cell for cell in source.cells if not re.search(r"Exercise 0\.3|\binside\(", cell.source)]
        nbformat.write(source, folder / "source" / TOUR / f"{TOUR}.ipynb")

    def source(self):
        return nbformat.read(self.folder / "source" / TOUR / f"{TOUR}.ipynb", 4)

    def solved(self, edit: Callable = SOLVED):
        notebook = self.source()
        edit(notebook)
        return notebook

    def hand_in(self, student: str, work: Callable | str, file: str = f"{TOUR}/{TOUR}.ipynb", when=None) -> Path:
        """work: what happens to the solved notebook, or the text of the file. when: its time."""
        path = Path(os.path.normpath(self.folder / "submitted" / student / file))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(work if isinstance(work, str) else nbformat.writes(self.solved(work)))
        if when:
            os.utime(path, (when, when))
        return path

    def mark(self, *words: str) -> dict[tuple[str, str], dict]:
        coursework.main([str(self.folder), "--jobs", "1", *words])
        return {(row["student"], row["assignment"]): row for row in self.rows("grades.csv")}

    def rows(self, name: str) -> list[dict]:
        return coursework.table(self.folder / name)

    def feedback(self, place: str) -> str:
        return (self.folder / "feedback" / place).with_suffix(".md").read_text()


def run_here(job, done):
    """marking.run without a process: for students who leave the interpreter as it is."""
    InteractiveShell.clear_instance()
    InteractiveShell.instance(history_load_length=0)
    marking.work(job, lambda kind, key, said: kind == "end" and done.update({key: said}))
    InteractiveShell.clear_instance()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(marking, "SECONDS", 8)


@pytest.fixture
def here(monkeypatch, capsys):
    monkeypatch.setattr(marking, "run", run_here)


@pytest.fixture
def course(tmp_path, here):
    """Of one assignment, 00."""
    return Course(tmp_path / "course", "--only", "00")


def mark_twice(course: Course, students: list[Student]) -> None:
    for student in students:
        course.hand_in(student.name, student.edit, student.file)
    rows = course.mark()
    assert course.mark() == rows  # the second time nothing is marked again
    assert len(rows) == sum(student.file.endswith("ipynb") for student in students)
    for student in students:
        if (student.name, TOUR) in rows:
            row, told = rows[student.name, TOUR], course.feedback(os.path.normpath(f"{student.name}/{student.file}"))
            assert float(row["points"]) == student.points and float(row["of"]) == 4, row
            plain = student.status == "marked"
            assert row["status"] == "marked" if plain else row["status"].startswith(student.status), row
            assert student.look in row["look"] and (student.look or not row["look"]), row
            assert student.told in told, told
            assert not re.search(r"770077|Traceback|seed|HIDDEN|\.py|/root|/home|/tmp", told), told


def test_a_class(course):
    mark_twice(course, [student for student in CLASS if not student.alone])


@pytest.mark.slow
def test_the_whole_class(tmp_path, monkeypatch):
    """All of them, each in a process of its own and of a chosen user; and a whole notebook, handed in by mistake."""
    monkeypatch.setenv("MARKING_USER", getpass.getuser())
    course = Course(tmp_path / "course", "--only", "00")
    mark_twice(course, CLASS)
    assert len(CLASS) >= 40
    monkeypatch.setattr(marking, "SECONDS", 60)  # it imports and draws more than an assignment does
    course.hand_in("whole", (ROOT / "notebooks" / f"{TOUR}.ipynb").read_text())
    row = course.mark()["whole", TOUR]
    assert (row["points"], row["status"], row["look"]) == ("4", "marked", "")


@pytest.mark.parametrize("path", coursework.notebooks(), ids=lambda path: path.stem)
def test_solutions_get_all_points(path, here, tmp_path):
    source, cells = coursework.exercises(path), nbformat.read(path, 4).cells
    nbformat.write(source, tmp_path / "solved.ipynb")
    result = marking.mark(tmp_path / "solved.ipynb", source)
    of = sum(c.metadata.get("nbgrader", {}).get("points", 0) for c in cells if c.cell_type == "code")
    assert result["status"] == "marked" and not result["look"]
    assert sum(e["points"] for e in result["exercises"].values()) == of


def test_the_time_limit_is_of_one_call(course, monkeypatch):
    """The clock begins anew at each call of a function: three sizes in the visible and in the hidden check."""
    events, work = [], marking.work
    monkeypatch.setattr(marking, "work", lambda job, report: work(job, lambda *e: events.append(e[:2]) or report(*e)))
    marking.mark(course.hand_in("ada", SOLVED), course.source())
    first = events.index(("begin", RANGE))
    assert events[first + 1 : first + 8] == [("call", None)] * 6 + [("end", RANGE)]


def test_nothing_about_one_file_ends_the_marking(tmp_path, course, monkeypatch):
    course.hand_in("fine", SOLVED)
    (course.folder / "submitted" / "folder" / TOUR / f"{TOUR}.ipynb").mkdir(parents=True)
    (course.folder / "submitted" / "fine" / "link.ipynb").symlink_to(tmp_path / "nowhere")
    course.hand_in("fine", "x", f"__MACOSX/{TOUR}/._{TOUR}.ipynb")
    course.hand_in("fine", SOLVED, f".ipynb_checkpoints/{TOUR}-checkpoint.ipynb")
    course.hand_in(".", "x", ".DS_Store")
    before = course.mark()
    assert before.keys() == {("fine", TOUR)} and before["fine", TOUR]["points"] == "4"
    kept_file = next((course.folder / "marked").rglob("*.json"))
    kept_file.write_text(kept_file.read_text()[:50])
    assert course.mark() == before
    monkeypatch.setattr(marking, "mark", lambda path, source: 1 / 0)
    course.hand_in("late", SOLVED)
    rows = course.mark()
    assert rows["late", TOUR]["status"] == "not marked: ZeroDivisionError: division by zero"
    assert rows["late", TOUR]["points"] == "0" and rows["fine", TOUR] == before["fine", TOUR]


def test_what_was_ignored_is_listed(course, capsys):
    course.hand_in(".", "x", "stray.zip")
    course.hand_in(".", SOLVED, f"{TOUR}.ipynb")
    course.hand_in("ada", nbformat.writes(nbformat.v4.new_notebook()), "poem.ipynb")
    course.mark()
    said = capsys.readouterr().err
    assert "ignored: stray.zip: no notebook" in said
    assert f"ignored: {TOUR}.ipynb: no student in its name" in said
    assert "ignored: ada/poem.ipynb: no assignment of this course" in said


def test_of_two_files_the_newest_that_was_touched(course):
    course.hand_in("ada", BLACK, f"{TOUR}/{TOUR} (1).ipynb", when=1e9)
    course.hand_in("ada", SOLVED, f"{TOUR}/{TOUR} (2).ipynb", when=1.5e9)
    course.hand_in("ada", UNTOUCHED, when=2e9)
    row = course.mark()["ada", TOUR]
    assert row["points"] == "4" and row["look"] == f"3 files handed in, {TOUR} (2).ipynb was marked"


CANVAS = """\
Student,ID,SIS User ID,SIS Login ID,Section,00_tour (501)
    Points Possible,,,,,4
"Doe, Jane",12345,s1,jane,A,
"Roe, John",12346,s2,john,A,
"Absent, Abe",12347,s3,abe,A,
"""
MOODLE = """\
First name,Last name,ID number,Email address
Jane,Doe,1,jane@school.org
John,Roe,2,john@school.org
Abe,Absent,3,abe@school.org
"""


@pytest.mark.parametrize(
    ("roster", "jane", "john"),
    [
        (CANVAS, "doejane_12345_900_00_tour.ipynb", "roejohn_late_12346_901_00_tour-1.ipynb"),
        (CANVAS, "00_tour/doejane_12345_900_x.ipynb", "00_tour/roejohn_12346_901_x.ipynb"),
        (MOODLE, "Jane Doe_77_assignsubmission_file_/00_tour.ipynb", "John Roe_78_assignsubmission_file/x.ipynb"),
        (MOODLE, "Download of 00 tour/Jane Doe_77_assignsubmission_file_/work.ipynb", "john/00_tour.ipynb"),
    ],
)
def test_a_zip_of_a_platform(course, roster, jane, john):
    """Names by the platforms' own rules; students by their gradebook's export, into which the points go."""
    (course.folder / "roster.csv").write_text("\ufeff" + roster)
    with zipfile.ZipFile(course.folder / "all.zip", "w") as archive:
        archive.writestr(jane, nbformat.writes(course.solved()))
        archive.writestr(john, nbformat.writes(course.solved(BLACK)))
    zipfile.ZipFile(course.folder / "all.zip").extractall(course.folder / "submitted")
    rows = course.mark()
    canvas = roster == CANVAS
    names = ["Doe, Jane", "Roe, John", "Absent, Abe"] if canvas else ["Jane Doe", "John Roe", "Abe Absent"]
    assert [student for student, _ in rows] == names and [row["points"] for row in rows.values()] == ["4", "2", "0"]
    assert rows[names[2], TOUR]["status"] == "not handed in"
    column, points = ("00_tour (501)", ["4", "4", "2", ""]) if canvas else (TOUR, ["4", "2", ""])
    expected = [row | {column: p} for row, p in zip(csv.DictReader(io.StringIO(roster)), points, strict=True)]
    assert course.rows("gradebook.csv") == expected
    told = {str(p.relative_to(course.folder / "feedback")) for p in (course.folder / "feedback").rglob("*.md")}
    assert told == {name.removesuffix("ipynb") + "md" for name in (jane, john)}


def test_students_of_one_name_and_tables_of_other_spreadsheets(course):
    """Moodle's number in a folder's name is no ID number: it must not give one student's work to another."""
    rows = ["First name;Last name;ID number", "Jane;Doe;1", "Jane;Doe;2", "John;Roe;77"]
    (course.folder / "roster.csv").write_text("\n".join(rows))
    course.hand_in("Jane Doe_77_assignsubmission_file_", SOLVED, f"{TOUR}.ipynb")
    (course.folder / "by_hand.csv").write_text("student;exercise;points\nJohn Roe;open_00;5\n")
    marks = course.mark()
    assert marks["John Roe", TOUR]["status"] == "not handed in" and marks["John Roe", TOUR]["points"] == "5.0"
    assert marks["Jane Doe", TOUR]["look"] == "several students of this name"
    with pytest.raises(SystemExit, match="no assignment"):
        course.mark("--only", "77")


def test_points_by_hand_are_added_and_never_overwritten(course):
    course.hand_in("ada", SOLVED)
    course.hand_in("ben", BLACK)
    assert course.mark()["ada", TOUR]["of"] == "4"  # the open experiment counts once it is marked
    path = course.folder / "by_hand.csv"
    assert path.read_text() == "student,exercise,points,comment\n"
    written = path.read_text() + "ada,open_00,7.5,a good figure\nben,to_model_range,1,the idea is right\nx,y,z,\n"
    path.write_text(written)
    rows = course.mark()
    assert path.read_text() == written
    assert [(row["points"], row["of"]) for row in rows.values()] == [("11.5", "14"), ("3.0", "14")]
    assert "`open_00`, 7.5 of 10: by hand: a good figure" in course.feedback(f"ada/{TOUR}/{TOUR}")
    assert "`open_00`, 0 of 10: not marked yet" in course.feedback(f"ben/{TOUR}/{TOUR}")


def test_assignments_that_are_set(tmp_path, here):
    """--only adds assignments, one deleted from source/ stays away, edits of source/ reach release and marks."""
    course = Course(tmp_path / "course", "--only", "00,02")
    assert {path.name for path in (course.folder / "source").iterdir()} == {TOUR, QUANTIZER}
    course.hand_in("ada", SOLVED)
    assert course.mark().keys() == {("ada", TOUR), ("ada", QUANTIZER)}
    assert course.mark("--only", "00").keys() == {("ada", TOUR)}
    assert course.mark("--only", "00,01").keys() == {("ada", TOUR), ("ada", "01_autoencoder")}
    shutil.rmtree(course.folder / "source" / QUANTIZER)
    notebook = course.source()
    check = cell_of(notebook, "bits_per_pixel_check")
    check.source, check.metadata.nbgrader.points = "assert bits_per_pixel(8, 8, 2, 16) == 1", 5
    nbformat.write(notebook, course.folder / "source" / TOUR / f"{TOUR}.ipynb")
    rows = course.mark()
    assert rows.keys() == {("ada", TOUR), ("ada", "01_autoencoder")} and rows["ada", TOUR]["points"] == "7"
    assert '"points": 5' in (course.folder / "release" / TOUR / f"{TOUR}.ipynb").read_text()


def test_gradescope(tmp_path, course):
    """results.json as its specification has it: scores of the tests add up, the instructor's notes stay hidden."""
    folder = tmp_path / "autograder"
    (folder / "submission").mkdir(parents=True)

    def results() -> dict:
        coursework.main([str(course.folder), "--autograder", str(folder)])
        return json.loads((folder / "results" / "results.json").read_text())

    assert results()["output"] == "not handed in" and not any(test["score"] for test in results()["tests"])
    work = course.solved(wrote("return pixels.movedim(-1, -3) / 255", above="import glob"))
    nbformat.write(work, folder / "submission" / "a.ipynb")
    range_, bits, look = results()["tests"]
    assert (range_["name"], range_["score"], range_["max_score"]) == (RANGE, 0, 2)
    assert "black (0)" in range_["output"] and "visibility" not in range_
    assert bits["score"] == 2 and look["visibility"] == "hidden" and look["output"] == "uses glob"


def test_a_release_stands_alone_and_holds_no_answer(tmp_path):
    Course(tmp_path / "course")
    for path in (tmp_path / "course").glob("release/*/*.ipynb"):
        text = path.read_text()
        for word in ("BEGIN SOLUTION", "HIDDEN TESTS", "20201217", "seed=", "as above"):
            assert word not in text, (path, word)
        assert not re.search(r"Sec\. [\d, andto]+ above|(two|runs|plot|figure|cell|model|curve) above", text), path
        cells = nbformat.read(path, 4).cells
        for word in (f"`{path.name}`", f"{marking.SECONDS} seconds", "Marking runs the same checks", "checking cells"):
            assert word in cells[0].source
        for cell in cells:
            if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("solution"):
                assert "raise NotImplementedError" in cell.source and '"""' in cell.source
            if cell.source.startswith("### Exercise"):
                assert len(re.findall(r"^\d\. ", cell.source, flags=re.M)) == 1
    with pytest.raises(SystemExit):  # nothing would come of it
        coursework.main([str(tmp_path / "course"), "--hints", "0"])


def test_hints():
    text = "Do.\n\n<details><summary>Hints, from vague to plain</summary>\n\n1. a\n2. b\n   c\n3. d\n\n</details>"
    assert coursework.with_hints(text, 0) == "Do.\n\n"
    assert coursework.with_hints(text, 1) == text.replace("2. b\n   c\n3. d\n", "")
    assert coursework.with_hints(text, 2) == text.replace("3. d\n", "")


def test_plain_versions(tmp_path):
    coursework.main([str(tmp_path / "mine"), "--plain"])
    paths = sorted((tmp_path / "mine").glob("*.ipynb"))
    assert len(paths) == 10
    for path in paths:
        text = path.read_text()
        assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text and "raise NotImplementedError" in text
        cells = nbformat.read(path, 4).cells
        assert len(cells) == len(nbformat.read(ROOT / "notebooks" / path.name, 4).cells)
        for cell in cells:
            if cell.cell_type == "code":
                compile(cell.source, path.name, "exec")  # still Python
                # Run All goes on past an exercise that is not solved.
                assert "checks." not in cell.source or "raises-exception" in cell.metadata.tags
