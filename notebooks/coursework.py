"""Hand out the notebooks' exercises and mark what comes back.

    python notebooks/coursework.py course            student versions in course/release,
                                                     and marks for all that lies in course/submitted
    python notebooks/coursework.py mine --plain      the whole notebooks without their solutions, for learning alone

An assignment is a notebook from its heading `## Exercises` on, so that marking does not train anything. What is handed
in lies in course/submitted/STUDENT/ASSIGNMENT/ASSIGNMENT.ipynb. Points go to course/grades.csv, one row a student and
assignment, and what a student may read to course/feedback. Call it again at any time: only what is new is marked, and
what was edited in course/source stays.
"""

import argparse
import csv
import hashlib
import json
import re
import secrets
import sys
from pathlib import Path

import nbformat

from minvqgan.course import checks, marking

HERE = Path(__file__).resolve().parent
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HIDDEN_BEGIN, HIDDEN_END = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
PUBLIC_SEED = "seed=20201217"  # stands in the notebooks' hidden tests, and is public like them

WARNING = """\
Warning: what students wrote runs with your rights on this machine. notebooks/README.md has the command that does the
same in a container without a network."""


def notebooks() -> list[Path]:
    return sorted(HERE.glob("[0-9][0-9]_*.ipynb"))


def exercises(path: Path) -> nbformat.NotebookNode:
    """The notebook's title and its cells from `## Exercises` on."""
    notebook = nbformat.read(path, 4)
    first = next((i for i, cell in enumerate(notebook.cells) if "## Exercises" in cell.source), None)
    if first is None:
        raise SystemExit(f"error: {path} has no heading ## Exercises")
    title = nbformat.v4.new_markdown_cell(notebook.cells[0].source.splitlines()[0] + ": exercises", id="title")
    rest = notebook.cells[first].source.split("## Exercises")[1]
    heading = nbformat.v4.new_markdown_cell("## Exercises" + rest, id="heading")
    notebook.cells = [title, heading, *notebook.cells[first + 1 :]]
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
            todo = f'raise NotImplementedError("{marking.grade_id(cell)} is still to be written: replace this line")'
            cell.source = without(cell.source, BEGIN, END, todo)
            cell.source = without(cell.source, HIDDEN_BEGIN, HIDDEN_END, "")
            cell.outputs, cell.execution_count = [], None
            if cell.metadata.get("nbgrader", {}).get("grade"):
                cell.metadata |= {"editable": False, "deletable": False}
    return notebook


def with_hints(source: str, count: int) -> str:
    """The text of an exercise with the first `count` of its hints, which go from vague to plain."""

    def cut(found: re.Match) -> str:
        first, *hints = re.split(r"^(?=\d\. )", found[0], flags=re.M)
        return first + "".join(hints[:count]) + "\n</details>" if count else ""

    return re.sub(r"<details><summary>Hints.*?</details>", cut, source, flags=re.S)


def plain(out: Path) -> None:
    """The whole notebooks without solutions, hidden tests and outputs."""
    out.mkdir(parents=True, exist_ok=True)
    for path in notebooks():
        nbformat.write(unsolved(nbformat.read(path, 4)), out / path.name)
        print(out / path.name)


def release(course: Path, hints: int, seed: int) -> None:
    """source/, made once, and release/, made anew from it."""
    for path in notebooks():
        source, handed_out = (course / folder / path.stem / path.name for folder in ("source", "release"))
        if not source.exists():
            notebook = exercises(path)
            for cell in notebook.cells:
                cell.source = with_hints(cell.source, hints).replace(PUBLIC_SEED, f"seed={seed}")
            source.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, source)
        handed_out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(unsolved(nbformat.read(source, 4)), handed_out)
    print(f"{len(notebooks())} assignments to hand out: {course / 'release'}")


def letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def handed_in(student: Path, assignment: str) -> Path | None:
    """The file meant: under the right name, else the one that a browser or a student renamed a little."""
    exact = student / assignment / f"{assignment}.ipynb"
    if exact.is_file():
        return exact
    found = [
        path
        for path in sorted(student.rglob("*.ipynb"))
        if ".ipynb_checkpoints" not in path.parts
        and any(letters(part).startswith(letters(assignment)) for part in path.relative_to(student).parts)
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def version(path: Path, source: Path) -> str:
    """Changes with the student's file, the assignment, and the marking itself."""
    used = (path, source, Path(checks.__file__), Path(marking.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in used)).hexdigest()


def result_of(path: Path | None, source: Path, kept: Path) -> dict:
    """The marks of one file, from `kept` where they were made before."""
    nothing = {name: {"points": 0, "of": of} for name, (of, _) in marking.checks_of(nbformat.read(source, 4)).items()}
    if path is None:
        return {"status": "not handed in", "look": [], "exercises": nothing}
    now = version(path, source)
    if kept.exists():
        result = json.loads(kept.read_text())
        if result["version"] == now:
            return result
    try:
        result = marking.mark(path, nbformat.read(source, 4))
    except Exception as error:  # one student's file must not end the marking of the others; it is tried again next time
        return {"status": f"not marked: {type(error).__name__}: {error}", "look": [], "exercises": nothing}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result | {"version": now}, indent=1))
    return result


def feedback(assignment: str, points: float, of: float, result: dict) -> str:
    """What may be handed to the student: no hidden test, no seed, no traceback."""
    lines = [f"# {assignment}: {points:g} of {of:g} points", ""]
    lines += [f"Note: {result['status']}", ""] * (result["status"] != "marked")
    for name, exercise in result["exercises"].items():
        lines.append(f"- `{name}`, {exercise['points']:g} of {exercise['of']:g}: {exercise.get('message', '')}")
    return "\n".join(lines) + "\n"


def mark(course: Path) -> None:
    """grades.csv, a row a student and assignment whatever was handed in, and feedback/."""
    students = sorted(path for path in (course / "submitted").glob("*") if path.is_dir())
    assignments = sorted(path.name for path in (course / "source").iterdir() if path.is_dir())
    print(WARNING * bool(students), file=sys.stderr)
    rows = []
    for student in students:
        for assignment in assignments:
            path = handed_in(student, assignment)
            source = course / "source" / assignment / f"{assignment}.ipynb"
            result = result_of(path, source, course / "marked" / student.name / f"{assignment}.json")
            points, of = (sum(e[key] for e in result["exercises"].values()) for key in ("points", "of"))
            row = {"student": student.name, "assignment": assignment, "points": points, "of": of}
            rows.append(row | {"status": result["status"], "look": "; ".join(dict.fromkeys(result["look"]))})
            if path is not None:
                print("{student}  {assignment}  {points:g} of {of:g}  {status}  {look}".format(**rows[-1]).rstrip())
                told = course / "feedback" / student.name / f"{assignment}.md"
                told.parent.mkdir(parents=True, exist_ok=True)
                told.write_text(feedback(assignment, points, of, result))
    if rows:
        with open(course / "grades.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main(words: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("course", type=Path, help="folder to make, or to continue with")
    p.add_argument("--plain", action="store_true", help="whole notebooks without solutions, with all hints")
    p.add_argument("--hints", type=int, choices=(0, 1, 2), help="hints for each; the third is the answer (default: 2)")
    p.add_argument("--seed", type=int, help="of the hidden tests (default: drawn once, kept in course/source)")
    args = p.parse_args(words)
    given = args.hints is not None or args.seed is not None
    if args.plain and given:
        p.error("--plain hands out everything: --hints and --seed are for a course")
    if args.plain:
        return plain(args.course)
    if given and (args.course / "source").exists():
        p.error(f"{args.course / 'source'} exists and stays as it is: edit it, or move it away to choose anew")
    hints = 2 if args.hints is None else args.hints
    release(args.course, hints, secrets.randbelow(10**9) if args.seed is None else args.seed)
    mark(args.course)


if __name__ == "__main__":
    main()
