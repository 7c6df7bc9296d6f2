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

from minvqgan.course import checks, marking

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
- "Sec. n of the notebook" means `notebooks/{name}.ipynb` of the repository, which you may read like the package."""


def notebooks() -> list[Path]:
    """Those with exercises."""
    return sorted(HERE.glob("0[0-8]_*.ipynb"))


def is_exercise(cell: nbformat.NotebookNode) -> bool:
    return "exercise" in cell.metadata.get("tags", [])


def exercises(path: Path) -> nbformat.NotebookNode:
    """The cells of a notebook that are tagged `exercise`, below a head that makes them stand alone."""
    notebook = nbformat.read(path, 4)
    title = notebook.cells[0].source.splitlines()[0].strip("# ") + ": exercises"
    head = HEAD.format(title=title, name=path.stem, seconds=marking.SECONDS)
    notebook.cells = [nbformat.v4.new_markdown_cell(head, id="title"), *filter(is_exercise, notebook.cells)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(Sec\. \d+(?:(?:, | and | to )\d+)*) above", r"\1 of the notebook", cell.source)
            cell.source = cell.source.replace("as above", "as in the notebook")
    return notebook


def without(source: str, begin: str, end: str, instead: str) -> str:
    """The source with everything between the markers replaced by one line, indented as the first marker is."""
    lines, inside = [], False
    for line in source.splitlines():
        if line.strip() == begin:
            inside = True
            lines += [line[: len(line) - len(line.lstrip())] + instead] * bool(instead)
        elif line.strip() == end:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


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
    """Code whose functions and methods, but for __init__, are still to be written."""
    lines, nodes = source.splitlines(), ast.walk(ast.parse(source))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    for node in sorted(functions, key=lambda node: -node.lineno):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        todo = f'raise NotImplementedError("{marking.STUB.format(node.name)}")'
        lines[body[0].lineno - 1 : node.end_lineno] = [" " * body[0].col_offset + todo]
    return "\n".join(lines)


def capstone() -> nbformat.NotebookNode:
    """Notebook 09 with empty functions. `__init__` stays: its parameters must have the names of the checkpoints."""
    notebook = nbformat.read(CAPSTONE, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if not cell.metadata.get("tags"):  # what draws the world and the figures stays
                cell.source = emptied(cell.source)
    return notebook


def plain(out: Path) -> None:
    """The whole notebooks without solutions, hidden tests and outputs."""
    out.mkdir(parents=True, exist_ok=True)
    for path in notebooks():
        nbformat.write(unsolved(nbformat.read(path, 4)), out / path.name)
        print(out / path.name)
    nbformat.write(capstone(), out / CAPSTONE.name)
    print(out / CAPSTONE.name)


def release(course: Path, only: list[str] | None, hints: int, seed: int) -> list[str]:
    """source/, made once, and release/, made anew from it. -> names of the assignments."""
    source, made = course / "source", []
    for path in notebooks():
        wanted = any(path.stem.startswith(word) for word in only) if only else not source.exists()
        if wanted and not (source / path.stem).exists():
            made.append((path.stem, exercises(path)))
    for name, notebook in made:
        for cell in notebook.cells:
            cell.source = with_hints(cell.source, hints).replace(PUBLIC_SEED, f"seed={seed}")
        (source / name).mkdir(parents=True)
        nbformat.write(notebook, source / name / f"{name}.ipynb")
    names = sorted(path.parent.name for path in source.glob("*/*.ipynb"))
    names = [name for name in names if not only or any(name.startswith(word) for word in only)]
    for name in names:
        (course / "release" / name).mkdir(parents=True, exist_ok=True)
        handed_out = unsolved(nbformat.read(source / name / f"{name}.ipynb", 4))
        nbformat.write(handed_out, course / "release" / name / f"{name}.ipynb")
    if not names:
        raise SystemExit(f"error: no assignment to hand out: {only} begins no name of a notebook or of course/source")
    print(f"{len(names)} assignments to hand out: {course / 'release'}")
    return names


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


class Roster:
    """The rows of course/roster.csv: a gradebook as the learning platform exports it. Each name, number and address
    in a row that no other row has finds the student; first and last names count together, in both orders."""

    def __init__(self, path: Path):
        self.rows, self.index = table(path), {}
        for number, row in enumerate(self.rows):
            words = [letters(v) for v in row.values() if v] + [
                letters(v.split("@")[0]) for v in row.values() if "@" in v
            ]
            words += ["".join(pair) for pair in itertools.permutations(words, 2)]
            for word in set(words):
                self.index[word] = None if word in self.index else number

    def name(self, number: int) -> str:
        """The full name. Canvas has one column for it, Moodle two."""
        row = self.rows[number]
        full = [v for k, v in row.items() if letters(k) in ("student", "fullname", "name")]
        return (full or [" ".join(list(row.values())[:2])])[0].strip()

    def is_student(self, number: int) -> bool:
        return letters(self.name(number)) != "pointspossible"  # the second line of a Canvas export

    def find(self, words: list[str]) -> str | None:
        found = [self.index.get(letters(word)) for word in words]
        return next((self.name(number) for number in found if number is not None), None)


def whose(place: Path, assignments: list[str], roster: Roster) -> str | None:
    """The student of a file in submitted/, from the name of its folder or, if there is none, its own.

    Canvas (canvas-lms, lib/content_zipper.rb): lastnamefirstname_late_USER_FILE_name.ipynb, flat.
    Moodle (mod/assign/feedback/file/importziplib.php): "First Last_NUMBER_assignsubmission_file_/name.ipynb".
    """
    parts = place.parts
    if len(parts) > 1 and any(letters(name) in letters(parts[0]) for name in assignments):
        inside = whose(Path(*parts[1:]), assignments, roster)  # one folder for each assignment
        if inside:
            return inside
    name = parts[0]
    moodle = re.match(r"(.+?)_\d+_assignsubmission_", name)
    canvas = re.match(r"([^\W_]+)(?:_late)?_(\d+)_\w", name, flags=re.I)
    if moodle:
        return roster.find([moodle[1]]) or moodle[1]
    if canvas and len(parts) == 1:
        return roster.find([canvas[2], canvas[1]]) or f"{canvas[1]}_{canvas[2]}"
    return roster.find([name]) or name if len(parts) > 1 else None


def collect(course: Path, sources: dict, roster: Roster) -> tuple[dict, list[str]]:
    """-> {(student, assignment): files}, and what was ignored and why."""
    found, ignored = {}, []
    for path in sorted((course / "submitted").rglob("*")):
        place = path.relative_to(course / "submitted")
        if any(part.startswith(".") or part == "__MACOSX" for part in place.parts):
            continue  # what archives and editors leave behind
        if path.is_dir() and path.suffix != ".ipynb":
            continue
        if path.suffix != ".ipynb" or not path.is_file():
            ignored.append(f"{place}: no notebook")
            continue
        named = [name for part in reversed(place.parts) for name in sources if letters(name) in letters(part)]
        assignment = named[0] if named else by_content(path, sources)
        student = whose(place, list(sources), roster)
        if assignment and student:
            found.setdefault((student, assignment), []).append(path)
        else:
            ignored.append(f"{place}: {'no student in its name' if assignment else 'no assignment of this course'}")
    return found, ignored


def by_content(path: Path, sources: dict) -> str | None:
    try:
        inside = marking.read(path)[1]
    except marking.Unreadable:
        return None
    counts = {name: len(inside & marking.checks_of(source).keys()) for name, source in sources.items()}
    return max(counts, key=counts.get) if any(counts.values()) else None


def newest(paths: list[Path], source) -> Path:
    """Of several files of one assignment the newest in which something was written."""

    def order(path: Path) -> tuple:
        try:
            written = marking.is_touched(path, source)
        except marking.Unreadable:
            written = False
        return written, path.stat().st_mtime, path.name

    return max(paths, key=order)


def result_of(paths: list[Path], source, kept: Path) -> dict:
    """The marks of one student's assignment, from `kept` if they were made before. Never raises."""
    nothing = {n: {"points": 0, "of": of, "message": "not marked"} for n, (of, _) in marking.checks_of(source).items()}
    if not paths:
        return {"status": "not handed in", "look": [], "exercises": nothing}
    try:
        path = newest(paths, source)
        used = [path.read_bytes(), Path(checks.__file__).read_bytes(), Path(marking.__file__).read_bytes()]
        now = hashlib.sha256(b"".join([*used, nbformat.writes(source).encode()])).hexdigest()
        try:
            result = json.loads(kept.read_text())
        except (OSError, ValueError):  # not marked yet, or cut off while it was written
            result = {}
        if result.get("version") != now:
            result = marking.mark(path, source) | {"version": now}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(result, indent=1))
        if len(paths) > 1:
            result["look"] = [*result["look"], f"{len(paths)} files handed in, {path.name} was marked"]
        return result | {"path": path}
    except Exception as error:  # one student's file must not end the marking of the others; it is tried again next time
        return {"status": f"not marked: {type(error).__name__}: {error}", "look": [], "exercises": nothing}


def by_hand(course: Path, students: list[str], sources: dict) -> tuple[dict, list[str]]:
    """course/by_hand.csv, which the instructor writes: {(student, exercise): row}, and lines that fit nothing."""
    path = course / "by_hand.csv"
    if not path.exists():
        path.write_text("student,exercise,points,comment\n")
    names, known = {letters(s): s for s in students}, {n for source in sources.values() for n in points_of(source)}
    rows, wrong = {}, []
    for row in table(path):
        student, exercise, points = (row.get(name, "").strip() for name in ("student", "exercise", "points"))
        student = names.get(letters(student))
        if student and exercise in known and re.fullmatch(r"\d+(\.\d+)?", points):
            rows[student, exercise] = row
        else:
            wrong.append(f"by_hand.csv: {', '.join(row.values())}: no such student, exercise or number of points")
    return rows, wrong


def points_of(source) -> dict[str, float]:
    """Points of all exercises, with the open experiment that is marked by hand."""
    graded = [c for c in source.cells if c.metadata.get("nbgrader", {}).get("grade")]
    return {marking.grade_id(c).removesuffix("_check"): c.metadata.nbgrader.points for c in graded}


def with_hand(result: dict, student: str, source, hand: dict) -> dict:
    used = {exercise for _, exercise in hand}
    exercises = dict(result["exercises"])
    for name, of in points_of(source).items():
        row = hand.get((student, name))
        if row:
            exercises[name] = {
                "points": float(row["points"]),
                "of": of,
                "message": f"by hand: {row.get('comment', '')}",
            }
        elif name in used and name not in exercises:
            exercises[name] = {"points": 0, "of": of, "message": "not marked yet"}
    return result | {"exercises": exercises}


def feedback(assignment: str, points: float, of: float, result: dict) -> str:
    """What may be handed to the student: no hidden test, no seed, no traceback."""
    lines = [f"# {assignment}: {points:g} of {of:g} points", ""]
    lines += [f"Note: {result['status']}", ""] * (result["status"] != "marked")
    for name, exercise in result["exercises"].items():
        lines.append(f"- `{name}`, {exercise['points']:g} of {exercise['of']:g}: {exercise['message']}")
    return "\n".join(lines) + "\n"


def mark(course: Path, assignments: list[str], jobs: int) -> None:
    """grades.csv, gradebook.csv and feedback/, with a row for every student, whatever was handed in."""
    sources = {name: nbformat.read(course / "source" / name / f"{name}.ipynb", 4) for name in assignments}
    roster = Roster(course / "roster.csv")
    found, ignored = collect(course, sources, roster)
    listed = [roster.name(number) for number in range(len(roster.rows)) if roster.is_student(number)]
    students = listed + sorted({student for student, _ in found} - set(listed))
    hand, wrong = by_hand(course, students, sources)
    print(WARNING * bool(found), file=sys.stderr)

    def one(case: tuple[str, str]) -> dict:
        student, assignment = case
        kept = course / "marked" / letters(student) / f"{assignment}.json"
        result = result_of(found.get(case, []), sources[assignment], kept)
        result = with_hand(result, student, sources[assignment], hand)
        points, of = (sum(e[key] for e in result["exercises"].values()) for key in ("points", "of"))
        look = result["look"] + ["not in roster.csv"] * (bool(listed) and student not in listed)
        look += ["several students of this name"] * (listed.count(student) > 1)
        row = {"student": student, "assignment": assignment, "points": points, "of": of, "status": result["status"]}
        if case in found:
            place = result.get("path", found[case][0]).relative_to(course / "submitted")
            told = (course / "feedback" / place).with_suffix(".md")  # the name under which platforms take it back
            told.parent.mkdir(parents=True, exist_ok=True)
            told.write_text(feedback(assignment, points, of, result))
            print(f"{student}  {assignment}  {points:g} of {of:g}  {result['status']}  {'; '.join(look)}".rstrip())
        return row | {"look": "; ".join(look)}

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(one, itertools.product(students, assignments)))
    if rows:
        write(course / "grades.csv", rows)
        write(course / "gradebook.csv", gradebook(rows, roster))
    print(*(f"ignored: {line}" for line in ignored), *wrong, sep="\n", file=sys.stderr)


def gradebook(rows: list[dict], roster: Roster) -> list[dict]:
    """One row for each student: the columns of the roster, as the platform exported them, with the points filled in.

    A Canvas export already has a column for each assignment, "02_quantizer (1234)"; otherwise one is added, which
    Canvas's and Moodle's gradebook import both take. What was not handed in stays empty.
    """
    points = {(row["student"], row["assignment"]): row for row in rows}
    students = list(dict.fromkeys(row["student"] for row in rows))
    book = []
    for number, old in enumerate(roster.rows or [{"student": student} for student in students]):
        name = roster.name(number) if roster.rows else old["student"]
        new = dict(old)
        for assignment in dict.fromkeys(row["assignment"] for row in rows):
            column = next((c for c in old if letters(assignment) in letters(c)), assignment)
            row = points.get((name, assignment), {"points": points[students[0], assignment]["of"], "status": ""})
            new[column] = "" if row["status"] == "not handed in" else f"{row['points']:g}"
        book.append(new)
    return book


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def autograder(course: Path, folder: Path) -> None:
    """Marks folder/submission as Gradescope's container has it, and writes folder/results/results.json
    (https://gradescope-autograders.readthedocs.io/en/latest/specs/)."""
    sources = {path.stem: nbformat.read(path, 4) for path in sorted((course / "source").glob("*/*.ipynb"))}
    found = {}
    for path in sorted((folder / "submission").rglob("*.ipynb")):
        named = [name for name in sources if letters(name) in letters(path.name)] or [by_content(path, sources)]
        found.setdefault(named[0], []).append(path)
    name = next((name for name in sources if name in found), None)
    results = {"score": 0, "output": "There is no notebook of this assignment among the files."}
    if name:
        result = result_of(found[name], sources[name], folder / "marked.json")
        tests = [
            {"name": n, "score": e["points"], "max_score": e["of"], "output": e["message"], "visibility": "visible"}
            for n, e in result["exercises"].items()
        ]
        look = {"name": "look", "score": 0, "max_score": 0, "output": "; ".join(result["look"]), "visibility": "hidden"}
        results = {"output": result["status"], "tests": tests + [look] * bool(result["look"])}
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "results.json").write_text(json.dumps(results, indent=1))


def main(words: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("course", type=Path, help="folder to make, or to continue with")
    p.add_argument("--plain", action="store_true", help="whole notebooks without solutions, with all hints")
    p.add_argument("--only", type=lambda text: text.split(","), help="assignments that are set, such as 02,05")
    p.add_argument("--hints", type=int, choices=(0, 1, 2), help="hints for each; the third is the answer (default: 2)")
    p.add_argument("--seed", type=int, help="of the hidden tests (default: drawn once, kept in course/source)")
    p.add_argument("--jobs", type=int, default=2, help="notebooks that are marked at the same time (default: 2)")
    p.add_argument("--autograder", type=Path, metavar="FOLDER", help="mark FOLDER/submission for Gradescope")
    args = p.parse_args(words)
    given = args.hints is not None or args.seed is not None
    if args.plain and given:
        p.error("--plain hands out everything: --hints and --seed are for a course")
    if args.plain:
        return plain(args.course)
    if args.autograder:
        return autograder(args.course, args.autograder)
    if given and not args.only and (args.course / "source").exists():
        p.error(f"{args.course / 'source'} exists and stays as it is: edit it, or move it away to choose anew")
    seed = secrets.randbelow(10**9) if args.seed is None else args.seed
    assignments = release(args.course, args.only, 2 if args.hints is None else args.hints, seed)
    mark(args.course, assignments, args.jobs)


if __name__ == "__main__":
    main()
