"""Marks one handed-in notebook: it runs in a kernel of its own, with the checks put back as they were handed out.

The accidents of a class are expected. A cell that runs too long or kills the kernel is left out and the rest is run
again; a copied, split, moved or deleted cell changes nothing; a file that cannot be read gets a status and no points.

A student's code runs in the same process as the checks and with the marker's rights. The checks are imported anew
before each use and compared with what the student's code left behind, which finds the plain ways to cheat. It is no
wall: for one, run the marking in a container (notebooks/README.md).
"""

import os
import re
import secrets
import tempfile
import warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

SECONDS = 20  # for one cell
ATTEMPTS = 6  # so many cells of one notebook may hang or kill the kernel

# The first cell, before any of the student's: importing takes seconds, which are not the student's.
WARM_UP = "import torch\nfrom minvqgan.course import checks"

# Around each check: the checks as they are on disk, what was changed of them, and a word that only a check that went
# through prints. (SystemExit ends a cell without being recorded as an error.)
CHECK = """
import importlib, sys
_left = vars(sys.modules.pop("minvqgan.course.checks", None) or object)
checks = importlib.import_module("minvqgan.course.checks")
for _name, _f in vars(checks).items():
    if hasattr(_f, "__code__") and getattr(_left.get(_name), "__code__", None) != _f.__code__:
        print("{word} changed", _name)
{check}
print("{word} passed")
"""

# Words that a solution does not need and that reach into the checks.
SUSPICIOUS = re.compile(
    r"\b(_getframe|currentframe|f_back|f_locals|gc\.get_\w+|settrace|setprofile|sys\.modules|setattr|__code__|ctypes"
    r"|subprocess|get_ipython|_ih|checks\.\w+\s*=(?!=))|\bIn\["
)


class Unreadable(Exception):
    """The file is no notebook of this assignment; the message says why."""


def grade_id(cell: NotebookNode) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def checks_of(source: NotebookNode) -> dict[str, tuple[float, str]]:
    """The marking cells of an assignment: name of the exercise -> (points, code)."""
    found = {}
    for cell in source.cells:
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade"):
            found[grade_id(cell).removesuffix("_check")] = (cell.metadata.nbgrader.points, cell.source)
    return found


def demonstrations(source: NotebookNode) -> set[str]:
    """Code below the last check: it shows what the functions are good for, and marking leaves it out."""
    graded = [cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade") for cell in source.cells]
    last = max(i for i, is_graded in enumerate(graded) if is_graded)
    return {cell.source for cell in source.cells[last + 1 :] if cell.cell_type == "code"}


def read(path: Path) -> NotebookNode:
    """A handed-in notebook. Raises Unreadable."""
    try:
        with warnings.catch_warnings():  # copied cells have copied ids
            warnings.simplefilter("ignore")
            notebook = nbformat.reads(path.read_text(encoding="utf-8"), 4)
        _ = [(cell.cell_type, cell.source + "", cell.metadata.get("nbgrader", {}).get) for cell in notebook.cells]
    except Exception as error:  # whatever a broken file makes nbformat say
        raise Unreadable(f"unreadable: {type(error).__name__} (is the file complete?)") from error
    return notebook


def assemble(
    notebook: NotebookNode, checks: dict[str, tuple[float, str]], left_out: set[str]
) -> list[tuple[str | None, str]]:
    """What is run, in order: (None, a cell of the student's) or (exercise, its check, where the student had it).

    Raises Unreadable where no exercise of the assignment is in it.
    """
    last = {grade_id(cell): i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    if not any(name in last or f"{name}_check" in last for name in checks):
        others = sorted({name.removesuffix("_check") for name in last if isinstance(name, str)})
        what = f"its exercises are {', '.join(others[:2])} ..." if others else "it has no exercises"
        raise Unreadable(f"another notebook: {what}")
    # Where the check stood, else below the function, else at the end.
    place = {name: last.get(f"{name}_check", last.get(name, len(notebook.cells))) for name in checks}
    cells = []
    for i, cell in enumerate(notebook.cells):
        is_check = str(grade_id(cell)).removesuffix("_check") in checks and str(grade_id(cell)).endswith("_check")
        if cell.cell_type == "code" and not is_check and cell.source not in left_out:
            cells.append((None, cell.source))
        cells += [(name, checks[name][1]) for name in checks if place[name] == i]
    return cells + [(name, checks[name][1]) for name in checks if place[name] == len(notebook.cells)]


def run(cells: list[tuple[str | None, str]], without: dict[int, str], word: str, folder: str):
    """-> (outputs by cell, None), or (outputs, (cell, why)) where a cell hung or killed the kernel."""
    codes = [CHECK.format(word=word, check=code) if name else code for name, code in cells]
    nodes = [nbformat.v4.new_code_cell(code) for code in [WARM_UP, *codes]]
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=nodes), kernel_name="python3", allow_errors=True, shutdown_kernel="immediate"
    )
    client.extra_arguments = ["--Application.log_level=ERROR"]
    client.log.setLevel("CRITICAL")  # a cell that hangs gets a status, not a line in the log
    client.resources = {"metadata": {"path": folder}}
    with client.setup_kernel(env=os.environ | {"QUICK": "1"}):
        for i, cell in enumerate(nodes, start=-1):
            if i in without:
                continue
            client.timeout = 300 if i == -1 else SECONDS
            try:
                client.execute_cell(cell, i + 1)
            except CellTimeoutError:
                return [], (i, f"ran longer than {SECONDS} s")
            except DeadKernelError:
                return [], (i, "ended the kernel")
    return [cell.outputs for cell in nodes[1:]], None


def has_error(outputs: list[NotebookNode]) -> bool:
    return any(output.output_type == "error" for output in outputs)


def message(outputs: list[NotebookNode]) -> str:
    """What a student is told: the check's sentence, or the name of another error; never a traceback."""
    errors = [o for o in outputs if o.output_type == "error"]
    if not errors:
        return "the check was left before its end"
    name, value = errors[-1].ename, re.sub(r"\(\d+\.py, line", "(line", errors[-1].evalue)
    return value if value and name in ("AssertionError", "NotImplementedError") else f"{name}: {value}"


def opening(code: str) -> str:
    return (code.strip().splitlines() or [""])[0][:50]


def mark(path: Path, source: NotebookNode) -> dict:
    """-> status, exercises (name -> points, of, message) and look: what a human should look at. source: the
    instructor's version of the assignment, with its hidden tests."""
    checks = checks_of(source)
    result = {"status": "marked", "look": [], "exercises": {}}
    for name, (of, _) in checks.items():
        result["exercises"][name] = {"points": 0, "of": of, "message": "not marked"}
    try:
        notebook = read(path)
        cells = assemble(notebook, checks, demonstrations(source))
    except Unreadable as error:
        return result | {"status": str(error)}
    own = "\n".join(code for name, code in cells if name is None)
    result["look"] = [f"uses {found}" for found in sorted({m[0] for m in SUSPICIOUS.finditer(own)})]
    word, without, outputs = secrets.token_hex(8), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ATTEMPTS):
            outputs, stopped = run(cells, without, word, folder)
            if stopped is None:
                break
            without[stopped[0]] = stopped[1]
    for i, why in without.items():
        name, code = cells[i]
        if name is None:
            result["status"] = f"marked without a cell that {why}: {opening(code)}"
        else:
            result["status"] = f"{name} {why}"
            result["exercises"][name]["message"] = f"your function {why}"
    if not outputs:
        return result | {"status": f"given up: {ATTEMPTS} cells hung or ended the kernel"}
    failed = [message(outputs[i]) for i, (name, _) in enumerate(cells) if name is None and has_error(outputs[i])]
    for i, (name, _) in enumerate(cells):
        if name is None or i in without:
            continue
        said = "".join(o.text for o in outputs[i] if o.output_type == "stream" and o.name == "stdout")
        changed = re.findall(rf"{word} changed (\w+)", said)
        result["look"] += [f"changed the checks: {', '.join(changed)}"] * bool(changed)
        right = f"{word} passed" in said and not has_error(outputs[i])
        exercise = result["exercises"][name]
        exercise["message"] = "right" if right else message(outputs[i])
        if failed and exercise["message"].startswith("NameError"):
            exercise["message"] += f" (the first cell that fails says {failed[0]})"
        exercise["points"] = exercise["of"] if right else 0
    return result
