"""Hand out the notebooks' exercises and mark what comes back.

    python notebooks/coursework.py course            student versions in course/release,
                                                     and marks for all that lies in course/submitted
    python notebooks/coursework.py mine --plain      the whole notebooks without their solutions, for learning alone

An assignment is the cells of a notebook that are tagged `exercise`, so marking does not train the lesson's models. Call
it again at any time: only what is new is marked, and what was edited in course/source stays. notebooks/README.md says
how submissions may be named and what course/roster.csv and course/by_hand.csv are for.
"""

import argparse
import ast
import contextlib
import csv
import hashlib
import io
import itertools
import json
import re
import secrets
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

from minvqgan.course import checking, checks, marking

HERE = Path(__file__).resolve().parent
CAPSTONE = HERE / "09_from_scratch.ipynb"
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HIDDEN_BEGIN, HIDDEN_END = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
PUBLIC_SEED = "seed=20201217"  # in the notebooks' hidden tests, and public like them

WARNING = """\
Warning: what students wrote runs with your rights on this machine. notebooks/README.md has the command that does the
same in a container without a network."""

HEAD = """\
# {title}

Write the functions and classes below in place of the line `raise NotImplementedError(...)`. The cell under each of
them checks it: it prints *right*, or one sentence about what is wrong. Marking runs the same checks with other numbers
and sizes.

- Hand in this file under its name, `{name}.ipynb`.
- You may add cells and change all but the checking cells, which marking replaces by its own.
- A cell, and each call of a function of yours, may take {seconds} seconds. No other file is needed.
- "Sec. n" without "paper" is a section of `notebooks/{name}.ipynb` in the repository, which you may read."""


def notebooks() -> list[Path]:
    """Those with exercises."""
    return sorted(HERE.glob("0[0-8]_*.ipynb"))


def exercises(path: Path) -> nbformat.NotebookNode:
    """The cells of a notebook that are tagged `exercise`, below a head that makes them stand alone."""
    notebook = nbformat.read(path, 4)
    title = notebook.cells[0].source.splitlines()[0].strip("# ") + ": exercises"
    head = HEAD.format(title=title, name=path.stem, seconds=marking.SECONDS)
    tagged = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    notebook.cells = [nbformat.v4.new_markdown_cell(head, id="title"), *tagged]
    return notebook


def without(source: str, begin: str, end: str, instead: str) -> str:
    """The source with everything between the markers replaced by one line, indented as the first marker is."""
    instead = f"\\1{instead}\n" if instead else ""
    return re.sub(rf"^( *){begin}\n.*?^ *{end}(\n|\Z)", instead, source, flags=re.M | re.S).rstrip("\n")


def unsolved(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without solutions, hidden tests and outputs; marking cells locked against accidents."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            todo = f'raise NotImplementedError("{marking.STUB.format(marking.grade_id(cell))}")'
            cell.source = without(cell.source, BEGIN, END, todo)
            cell.source = without(cell.source, HIDDEN_BEGIN, HIDDEN_END, "")
            cell.outputs, cell.execution_count = [], None
            if cell.metadata.get("nbgrader", {}).get("grade"):
                cell.metadata |= {"editable": False, "deletable": False}
                cell.metadata.setdefault("tags", []).append("raises-exception")  # Run All goes on where one is unsolved
    return notebook


def with_hints(source: str, count: int) -> str:
    """The text of an exercise with the first `count` of its hints, which go from vague to plain."""

    def cut(found: re.Match) -> str:
        first, *hints = re.split(r"^(?=\d\. )", found[0], flags=re.M)
        return first + "".join(hints[:count]) + "\n</details>" if count else ""

    return re.sub(r"<details><summary>Hints.*?</details>", cut, source, flags=re.S)


def emptied(source: str) -> str:
    """Code whose functions and methods are still to be written. `__init__` stays, for the checkpoints' names."""
    lines, nodes = source.splitlines(), ast.walk(ast.parse(source))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    for node in sorted(functions, key=lambda node: -node.lineno):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        todo = f'raise NotImplementedError("{marking.STUB.format(node.name)}")'
        lines[body[0].lineno - 1 : node.end_lineno] = [" " * body[0].col_offset + todo]
    return "\n".join(lines)


def plain(out: Path) -> None:
    """The whole notebooks without solutions, hidden tests and outputs, and notebook 09 with empty functions."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*notebooks(), CAPSTONE]:
        notebook = unsolved(nbformat.read(path, 4))
        for cell in notebook.cells:
            # What draws the world and the figures of 09 is tagged, and stays.
            if path == CAPSTONE and cell.cell_type == "code" and not cell.metadata.get("tags"):
                cell.source = emptied(cell.source)
        nbformat.write(notebook, out / path.name)
        print(out / path.name)


def release(course: Path, only: tuple[str, ...], hints: int, seed: int) -> dict[str, nbformat.NotebookNode]:
    """source/, made once, and release/, made anew from it. -> the sources of the assignments by name."""
    first = not (course / "source").exists()
    for path in notebooks():
        wanted = path.stem.startswith(only) if only else first
        if wanted and not (course / "source" / path.stem).exists():
            notebook = exercises(path)
            for cell in notebook.cells:
                cell.source = with_hints(cell.source, hints).replace(PUBLIC_SEED, f"seed={seed}")
            (course / "source" / path.stem).mkdir(parents=True)
            nbformat.write(notebook, course / "source" / path.stem / path.name)
    sources = {}
    for path in sorted((course / "source").glob("*/*.ipynb")):
        if not only or path.stem.startswith(only):
            sources[path.stem] = nbformat.read(path, 4)
            (course / "release" / path.stem).mkdir(parents=True, exist_ok=True)
            nbformat.write(unsolved(nbformat.read(path, 4)), course / "release" / path.stem / path.name)
    if not sources:
        raise SystemExit(f"error: no assignment in {course / 'source'}, and no notebook begins with {','.join(only)}")
    print(f"{len(sources)} assignments to hand out: {course / 'release'}")
    return sources


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFC", text).lower())


def table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","  # spreadsheets write either
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [{k: v or "" for k, v in row.items() if k} for row in reader]


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class Roster:
    """course/roster.csv: a gradebook as the learning platform exports it. Each name, number and address in a row that
    no other row has finds the student; first and last names count together, in both orders."""

    def __init__(self, path: Path):
        self.rows, self.index = table(path), {}
        # Canvas has one column for the name, Moodle two.
        single = [key for row in self.rows[:1] for key in row if letters(key) in ("student", "fullname", "name")]
        self.names = [" ".join(row[key] for key in (single or list(row)[:2])).strip() for row in self.rows]
        for name, row in zip(self.names, self.rows, strict=True):
            words = [letters(part) for value in row.values() for part in {value, value.split("@")[0]} if part]
            words += ["".join(pair) for pair in itertools.permutations(words, 2)]
            for word in set(words):
                self.index[word] = None if word in self.index else name
        # The second line of a Canvas export is none of a student.
        self.students = [name for name in self.names if letters(name) != "pointspossible"]

    def find(self, *words: str) -> str | None:
        return next(filter(None, (self.index.get(letters(word)) for word in words)), None)


def whose(parts: tuple[str, ...], assignments: list[str], roster: Roster) -> str | None:
    """The student of a file in submitted/, from the name of its folder or, if there is none, its own.

    Canvas (canvas-lms, lib/content_zipper.rb): lastnamefirstname_late_USER_FILE_name.ipynb, flat.
    Moodle (mod/assign/feedback/file/importziplib.php): "First Last_NUMBER_assignsubmission_file_/name.ipynb".
    """
    inside = None
    if len(parts) > 1 and any(letters(name) in letters(parts[0]) for name in assignments):
        inside = whose(parts[1:], assignments, roster)  # one folder for each assignment
    moodle = re.match(r"(.+?)_\d+_assignsubmission_", parts[0])
    canvas = re.match(r"([^\W_]+)(?:_late)?_(\d+)_\w", parts[0], flags=re.I) if len(parts) == 1 else None
    if moodle:
        return inside or roster.find(moodle[1]) or moodle[1]
    if canvas:
        return roster.find(canvas[2], canvas[1]) or f"{canvas[1]}_{canvas[2]}"
    return inside or (roster.find(parts[0]) or parts[0] if len(parts) > 1 else None)


def collect(folder: Path, sources: dict, roster: Roster) -> tuple[dict[tuple[str, str], list[Path]], list[str]]:
    """-> {(student, assignment): files}, and what was ignored and why."""
    found, ignored = {}, []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if any(part.startswith(".") or part == "__MACOSX" for part in place.parts):
            continue  # what archives and editors leave behind
        if path.suffix != ".ipynb" or not path.is_file():
            ignored += [f"{place}: no notebook"] * (path.suffix == ".ipynb" or not path.is_dir())
            continue
        named = [name for part in reversed(place.parts) for name in sources if letters(name) in letters(part)]
        if not named:
            count, name = max((marking.peek(path, source)[0], name) for name, source in sources.items())
            named = [name] * (count > 0)
        student = whose(place.parts, list(sources), roster)
        if named and student:
            found.setdefault((student, named[0]), []).append(path)
        else:
            ignored.append(f"{place}: {'no student in its name' if named else 'no assignment of this course'}")
    return found, ignored


def result_of(paths: list[Path], source, kept: Path) -> dict:
    """The marks of one student's assignment, from `kept` if they were made before. Never raises."""
    if not paths:
        return marking.unmarked(source, "not handed in")
    try:
        # The newest in which something was written.
        path = max(paths, key=lambda path: (marking.peek(path, source)[1], path.stat().st_mtime, path.name))
        used = [path, *(Path(module.__file__) for module in (checking, checks, marking))]
        parts = [nbformat.writes(source).encode(), *(file.read_bytes() for file in used)]
        now = hashlib.sha256(b"".join(parts)).hexdigest()
        result = {}
        with contextlib.suppress(OSError, ValueError):  # not marked yet, or cut off while it was written
            result = json.loads(kept.read_text())
        if result.get("version") != now:
            result = marking.mark(path, source) | {"version": now}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(result, indent=1))
        if len(paths) > 1:
            result["look"].append(f"{len(paths)} files handed in, {path.name} was marked")
        return result | {"path": path}
    except Exception as error:  # one student's file must not end the marking of the others; it is tried again next time
        return marking.unmarked(source, f"not marked: {type(error).__name__}: {error}") | {"path": paths[0]}


def points_of(source) -> dict[str, float]:
    """Points of all exercises, with the open experiment that is marked by hand."""
    graded = [c for c in source.cells if c.metadata.get("nbgrader", {}).get("grade")]
    return {marking.grade_id(c).removesuffix("_check"): c.metadata.nbgrader.points for c in graded}


def by_hand(path: Path, students: list[str], sources: dict) -> tuple[dict[tuple[str, str], dict], list[str]]:
    """course/by_hand.csv, which the instructor writes: {(student, exercise): marks}, and lines that fit nothing."""
    if not path.exists():
        path.write_text("student,exercise,points,comment\n")
    names = {letters(student): student for student in students}
    of = {name: points for source in sources.values() for name, points in points_of(source).items()}
    marks, wrong = {}, []
    for row in table(path):
        student, exercise, points = (row.get(key, "").strip() for key in ("student", "exercise", "points"))
        student = names.get(letters(student))
        if student and exercise in of and re.fullmatch(r"\d+(\.\d+)?", points):
            comment = f"by hand: {row.get('comment', '')}"
            marks[student, exercise] = {"points": float(points), "of": of[exercise], "message": comment}
        else:
            wrong.append(f"by_hand.csv: {', '.join(row.values())}: no such student, exercise or number of points")
    return marks, wrong


def feedback(assignment: str, row: dict, exercises: dict) -> str:
    """What may be handed to the student: no hidden test, no seed, no traceback."""
    lines = [f"# {assignment}: {row['points']:g} of {row['of']:g} points", ""]
    lines += [f"Note: {row['status']}", ""] * (row["status"] != "marked")
    lines += [f"- `{name}`, {e['points']:g} of {e['of']:g}: {e['message']}" for name, e in exercises.items()]
    return "\n".join(lines) + "\n"


def mark(course: Path, sources: dict, jobs: int) -> None:
    """grades.csv, gradebook.csv and feedback/, with a row for every student, whatever was handed in."""
    roster = Roster(course / "roster.csv")
    found, ignored = collect(course / "submitted", sources, roster)
    students = roster.students + sorted({student for student, _ in found} - set(roster.students))
    hand, wrong = by_hand(course / "by_hand.csv", students, sources)
    counted = {exercise for _, exercise in hand}  # open experiments count for everyone once one is marked
    if found:
        print(WARNING, file=sys.stderr)

    def one(case: tuple[str, str]) -> dict:
        student, assignment = case
        kept = course / "marked" / letters(student) / f"{assignment}.json"
        result = result_of(found.get(case, []), sources[assignment], kept)
        marks = result["exercises"]
        for name, of in points_of(sources[assignment]).items():
            if name in counted:
                marks.setdefault(name, {"points": 0, "of": of, "message": "not marked yet"})
                marks[name] = hand.get((student, name), marks[name])
        look = result["look"] + ["not in roster.csv"] * (bool(roster.rows) and student not in roster.students)
        look += ["several students of this name"] * (roster.students.count(student) > 1)
        points, of = (sum(e[key] for e in marks.values()) for key in ("points", "of"))
        row = {"student": student, "assignment": assignment, "points": points, "of": of, "status": result["status"]}
        if "path" in result:
            # Platforms take feedback back under the name of the file.
            told = course / "feedback" / result["path"].relative_to(course / "submitted").with_suffix(".md")
            told.parent.mkdir(parents=True, exist_ok=True)
            told.write_text(feedback(assignment, row, marks))
            said = f"{student}  {assignment}  {points:g} of {of:g}  {result['status']}  {'; '.join(look)}"
            print(said.rstrip() + "\n", end="", flush=True)  # at once: other threads print, too
        return row | {"look": "; ".join(look)}

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(one, itertools.product(students, sources)))
    if rows:
        write(course / "grades.csv", rows)
        write(course / "gradebook.csv", gradebook(rows, roster))
    for line in [f"ignored: {line}" for line in ignored] + wrong:
        print(line, file=sys.stderr)


def gradebook(rows: list[dict], roster: Roster) -> list[dict]:
    """One row for each student: the columns of the roster, as the platform exported them, with the points filled in.

    A Canvas export already has a column for each assignment, "02_quantizer (1234)"; otherwise one is added, which
    Canvas's and Moodle's gradebook import both take. What was not handed in stays empty.
    """
    students, assignments = (list(dict.fromkeys(row[key] for row in rows)) for key in ("student", "assignment"))
    points = {("Points Possible", row["assignment"]): f"{row['of']:g}" for row in rows}
    for row in rows:
        handed_in = row["status"] != "not handed in"
        points[row["student"], row["assignment"]] = f"{row['points']:g}" if handed_in else ""
    book = [dict(row) for row in roster.rows or [{"student": student} for student in students]]
    for name, row in zip(roster.names or students, book, strict=True):
        for assignment in assignments:
            column = next((key for key in row if letters(assignment) in letters(key)), assignment)
            row[column] = points[name, assignment]
    return book


def autograder(sources: dict, folder: Path) -> None:
    """Marks folder/submission, of the course's one assignment, as Gradescope's container has it, and writes
    folder/results/results.json (https://gradescope-autograders.readthedocs.io/en/latest/specs/)."""
    (source,) = sources.values()
    result = result_of(sorted((folder / "submission").rglob("*.ipynb")), source, folder / "marked.json")
    tests = [
        {"name": name, "score": e["points"], "max_score": e["of"], "output": e["message"]}
        for name, e in result["exercises"].items()
    ]
    look = {"name": "look", "score": 0, "max_score": 0, "output": "; ".join(result["look"]), "visibility": "hidden"}
    (folder / "results").mkdir(exist_ok=True)
    text = json.dumps({"output": result["status"], "tests": tests + [look] * bool(result["look"])}, indent=1)
    (folder / "results" / "results.json").write_text(text)


def main(words: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("course", type=Path, help="folder to make, or to continue with")
    p.add_argument("--plain", action="store_true", help="whole notebooks without solutions, with all hints")
    p.add_argument("--only", type=lambda text: tuple(text.split(",")), default=(), help="assignments, such as 02,05")
    p.add_argument("--hints", type=int, choices=(0, 1, 2), help="hints for each; the third is the answer (default: 2)")
    p.add_argument("--seed", type=int, help="of the hidden tests (default: drawn once, kept in course/source)")
    p.add_argument("--jobs", type=int, default=2, help="notebooks that are marked at the same time (default: 2)")
    p.add_argument("--autograder", type=Path, metavar="FOLDER", help="mark FOLDER/submission for Gradescope")
    args = p.parse_args(words)
    if args.plain:
        return plain(args.course)
    if (args.hints, args.seed) != (None, None) and not args.only and (args.course / "source").exists():
        p.error(f"{args.course / 'source'} exists and stays as it is: edit it, or move it away to choose anew")
    seed = secrets.randbelow(10**9) if args.seed is None else args.seed
    sources = release(args.course, args.only, 2 if args.hints is None else args.hints, seed)
    if args.autograder:
        return autograder(sources, args.autograder)
    mark(args.course, sources, args.jobs)


if __name__ == "__main__":
    main()
