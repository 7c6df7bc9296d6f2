"""Hand out the notebooks' exercises and mark what comes back.

    python notebooks/coursework.py course            student versions in course/release, by nbgrader
                                                     and marks for all that lies in course/submitted
    python notebooks/coursework.py mine --plain      the whole notebooks without their solutions, for learning alone

An assignment is a notebook from its heading `## Exercises` on, so that marking does not train anything. A submission
lies in course/submitted/STUDENT/ASSIGNMENT/ASSIGNMENT.ipynb; the points go to course/grades.csv.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HIDDEN_BEGIN, HIDDEN_END = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"


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
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
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


def plain(out: Path) -> None:
    """The whole notebooks without solutions, hidden tests and outputs."""
    out.mkdir(parents=True, exist_ok=True)
    for path in notebooks():
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source = without(cell.source, BEGIN, END, "raise NotImplementedError")
                cell.source = without(cell.source, HIDDEN_BEGIN, HIDDEN_END, "")
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, out / path.name)
        print(out / path.name)


def grader(course: Path):
    """nbgrader on a course folder."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    # nbgrader starts `alembic` by its name, which is found only if the environment's programs are, active or not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    config = Config()
    config.CourseDirectory.root = str(course.resolve())
    config.CourseDirectory.course_id = "minvqgan"
    config.ExecutePreprocessor.timeout = 120
    config.Application.log_level = "ERROR"
    return NbGraderAPI(config=config)


def checked(result: dict, what: str) -> None:
    if not result["success"]:
        raise SystemExit(f"error: {what} failed\n{result.get('error') or result.get('log')}")


def generate(course: Path) -> None:
    """source/ and release/ of every notebook."""
    api = grader(course)
    for path in notebooks():
        source = course / "source" / path.stem / path.name
        source.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(exercises(path), source)
        checked(api.generate_assignment(path.stem, force=True), f"generating {path.stem}")
        print(course / "release" / path.stem / path.name)


def mark(course: Path) -> None:
    """Points of all submissions, printed and in grades.csv."""
    os.environ["QUICK"] = "1"
    api, rows = grader(course), []
    for folder in sorted((course / "submitted").glob("*/*")):
        student, name = folder.parent.name, folder.name
        if not (folder / f"{name}.ipynb").exists() or not (course / "release" / name).exists():
            print(f"skipped {folder}: no such assignment, or no {name}.ipynb in it", file=sys.stderr)
            continue
        checked(api.autograde(name, student, force=True), f"marking {folder}")
        with api.gradebook as gradebook:
            submission = gradebook.find_submission(name, student)
            points = {"points": submission.score, "of": submission.max_score}
            rows.append({"student": student, "assignment": name} | points)
        print("{student}  {assignment}  {points:g} of {of:g} points".format(**rows[-1]))
    if rows:
        with open(course / "grades.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("course", type=Path, help="folder to make, or to go on with")
    p.add_argument("--plain", action="store_true", help="whole notebooks without solutions, without nbgrader")
    args = p.parse_args()
    if args.plain:
        plain(args.course)
    else:
        generate(args.course)
        mark(args.course)


if __name__ == "__main__":
    main()
