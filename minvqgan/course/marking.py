"""Marks one handed-in notebook: its cells run in a process of their own, with the instructor's checks between them.

A class has accidents. A cell that runs too long or ends the process is left out, and the rest is run again; copied,
split, moved and deleted cells change nothing; a file that cannot be read gets a status and no points.

A student's code runs in the same process as the checks and with the marker's rights. The process works in a temporary
folder with a copy of the package, so it finds no solutions, seeds or other students there. What the checks use is
compared before and after each check with references that were taken before the student's first cell. This stops and
shows the plain ways to cheat, not all of them: see notebooks/README.md.
"""

import contextlib
import json
import os
import queue
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS = 20  # for a cell, and for each call of a student's function by a check
LONGEST = 200  # seconds for all calls of one check together
ATTEMPTS = 12  # runs of one notebook: one more for each cell that hangs or ends the process

PACKAGE = Path(__file__).resolve().parents[1]
STUB = "{} is still to be written: replace this line"

# Words that no solution needs and that reach the checks, their source or the files of the machine.
SUSPICIOUS = re.compile(
    r"_getframe|currentframe|f_back|f_locals|\bgc\.|settrace|setprofile|\bsys\.|\bsetattr\(|__code__|__globals__|ctypes"
    r"|subprocess|get_ipython|\bIn\[|\b_ih\b|\bchecks\.[\w.]+\s*=(?!=)|importlib|\breload\(|__path__|__import__|builtins"
    r"|__dict__|input_transformer|(?<![.\w])(?:open|exec|eval|globals|getattr)\(|read_text|read_bytes|\bos\.|\bglob\b"
    r"|__file__|\binspect\b|\.ipynb|__torch_function__|TorchFunctionMode|TorchDispatchMode|\bTensor\.\w+\s*=(?!=)"
    r"|__eq__|base64"
)


class Unreadable(Exception):
    """The file is no notebook of this assignment; the message says why."""


def grade_id(cell) -> str:
    return str(cell.metadata.get("nbgrader", {}).get("grade_id", ""))


def checks_of(source) -> dict[str, tuple[float, str]]:
    """The marking cells of an assignment: name of the exercise -> (points, code)."""
    graded = [c for c in source.cells if c.cell_type == "code" and c.metadata.get("nbgrader", {}).get("grade")]
    return {grade_id(c).removesuffix("_check"): (c.metadata.nbgrader.points, c.source) for c in graded}


def read(path: Path):
    """A handed-in notebook. Raises Unreadable."""
    import nbformat

    try:
        with warnings.catch_warnings():  # copied cells have copied ids
            warnings.simplefilter("ignore")
            notebook = nbformat.reads(path.read_text(encoding="utf-8"), 4)
        _ = [(cell.cell_type, cell.source + "", cell.metadata.get("nbgrader", {}).get) for cell in notebook.cells]
    except Exception as error:  # whatever a broken file makes nbformat say
        raise Unreadable(f"unreadable: {type(error).__name__} (is the file complete?)") from error
    return notebook


def code_of(notebook) -> list[tuple[str | None, str, set[str]]]:
    """Its code cells: (exercise that the cell checks, code, functions and classes that it defines).

    Some editors drop the metadata, so a marking cell is also known by its call, checks.NAME(NAME).
    """
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            defined = set(re.findall(r"^(?:def|class)\s+(\w+)", cell.source, flags=re.M))
            called = re.search(r"^checks\.(\w+)\(", cell.source, flags=re.M)
            by_id = grade_id(cell).removesuffix("_check") if grade_id(cell).endswith("_check") else None
            found.append((None if defined else by_id or (called and called[1]), cell.source, defined))
    return found


def exercises_in(notebook) -> set[str]:
    return {name for checked, _, defined in code_of(notebook) for name in defined | {checked} if name}


def definitions(notebook, name: str) -> list[bool]:
    """For each cell that defines an exercise, in order: was it written, that is, more than the stub?"""
    return [STUB.format(name) not in code for _, code, defined in code_of(notebook) if name in defined]


def touched(notebook, names) -> bool:
    return any(any(definitions(notebook, name)) for name in names)


def assemble(notebook, source) -> list[tuple[str | None, str]]:
    """What is run, in order: (None, a cell of the student's) or (exercise, its check).

    A check runs where the student had it, else below the last definition, else at the end. Code below the
    assignment's last check only demonstrates the functions and is left out.
    """
    checks, own = checks_of(source), code_of(notebook)
    if not checks.keys() & exercises_in(notebook):
        others = sorted(exercises_in(notebook))
        what = f"its exercises are {', '.join(others[:2])} ..." if others else "it has no exercises"
        raise Unreadable(f"another notebook: {what}")
    last_check = max(i for i, (name, _, _) in enumerate(code_of(source)) if name in checks)
    left_out = {"".join(code.split()) for _, code, _ in code_of(source)[last_check + 1 :]}
    place = {}
    for name in checks:
        defined = [i for i, cell in enumerate(own) if name in cell[2]]
        checked = [i for i, cell in enumerate(own) if name == cell[0] and (not defined or i > defined[0])]
        place[name] = (checked or defined or [len(own)])[-1]
    cells = []
    for i, (checked, code, _) in enumerate([*own, ("end", "", set())]):
        if checked is None and "".join(code.split()) not in left_out:
            cells.append((None, code))
        cells += [(name, checks[name][1]) for name in checks if place[name] == i]
    return cells


def run(cells: list, skip: set[int], done: dict[int, dict]) -> tuple[int, str] | None:
    """Runs the cells in a new process. Results go to `done`; (cell, why) if one hung or ended the process."""
    word = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as room:
        shutil.copytree(PACKAGE, Path(room) / "minvqgan")
        for folder in ("notebooks/checkpoints", "figures", "results"):  # what whole notebooks load
            if (PACKAGE.parent / folder).is_dir():
                shutil.copytree(PACKAGE.parent / folder, Path(room) / folder, ignore=shutil.ignore_patterns("*.py"))
        env = os.environ | {"PYTHONPATH": room, "QUICK": "1", "MPLBACKEND": "Agg", "IPYTHONDIR": room, "PWD": room}
        user = os.environ.get("MARKING_USER")  # in a container: one who cannot read solutions and seeds
        if user:
            shutil.chown(room, user)
        child = subprocess.Popen(
            [sys.executable, "-m", "minvqgan.course.marking"],
            cwd=room,
            env=env | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            user=user,
        )
        try:
            child.stdin.write(json.dumps({"word": word, "cells": cells, "skip": [*skip]}))
            child.stdin.close()
            return follow(events(child.stdout, word), done)
        finally:
            with contextlib.suppress(
                OSError, AttributeError
            ):  # and what the student's code has started; not on Windows
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.wait()


def events(stream, word: str) -> Callable[[float], tuple[str, int, dict] | None]:
    """A function of a number of seconds: what the process reports next, None at its end. Raises queue.Empty."""
    lines = queue.Queue()

    def listen() -> None:
        for line in stream:
            if line.startswith(word):
                lines.put(json.loads(line[len(word) :]))
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    return lambda seconds: lines.get(timeout=seconds)


def follow(report: Callable, done: dict[int, dict]) -> tuple[int, str] | None:
    current, started, patience = -1, time.monotonic(), 300.0  # importing may take long, and is not the student's
    while True:
        try:
            event = report(min(patience, max(0.1, started + LONGEST - time.monotonic())) if current >= 0 else patience)
        except queue.Empty:
            return current, f"ran longer than {SECONDS} s"
        if event is None:
            return current, "ended the process"
        kind, cell, result = event
        if kind == "finished":
            return None
        if kind == "begin":
            current, started, patience = cell, time.monotonic(), SECONDS
        elif kind == "end":
            done[cell] = result


def watched() -> dict:
    """References to what the checks use: {module or class: {name: (object, its code)}}."""
    import builtins
    import functools
    import itertools
    import math
    import operator

    import torch

    from minvqgan.course import checks

    things = [checks, builtins, functools, itertools, math, operator, torch, torch.Tensor, torch.autograd]
    things += [torch.nn, torch.nn.functional, torch.nn.Module]
    things += [value for value in vars(checks).values() if isinstance(value, type)]
    return {thing: current(thing) for thing in things}


def current(thing) -> dict:
    # torch replaces manual_seed when it first compiles something and Storage with the default dtype, copy adds
    # __slotnames__, IPython uses _.
    ignored = ("manual_seed", "Storage", "__slotnames__", "_")
    return {n: (v, getattr(v, "__code__", None)) for n, v in vars(thing).items() if n not in ignored}


def restored(references: dict) -> Iterator[str]:
    """Puts back what was replaced, and gives its names."""
    for thing, was in references.items():
        now = current(thing)
        for name in [n for n in was.keys() | now.keys() if was.get(n) != now.get(n)]:
            if name in was:
                setattr(thing, name, was[name][0])
                if was[name][1]:
                    was[name][0].__code__ = was[name][1]
            elif isinstance(thing, type):  # modules gain names by imports
                delattr(thing, name)
            else:
                continue
            yield f"{thing.__name__}.{name}"


def work(job: dict, report: Callable[[str, int, dict], None]) -> None:
    """In the process of the student's code: runs the cells in an IPython shell, and each check outside of it."""
    import torch
    from IPython.core.interactiveshell import InteractiveShell

    from minvqgan.course import checks

    shell = InteractiveShell.instance()
    checks.on_call = lambda: report("call", 0, {})
    references, execute, names = watched(), exec, {name for name, _ in job["cells"]}
    for i, (name, code) in enumerate(job["cells"]):
        if i in job["skip"]:
            continue
        report("begin", i, {})
        if name is None:
            error = shell.run_cell(code)
            error = error.error_before_exec or error.error_in_exec
            report("end", i, {"said": error and message(error), "changed": []})
            continue
        changed = [*restored(references)]
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        said = "right"
        try:
            own = {n: shell.user_ns[n] for n in names & shell.user_ns.keys()}
            execute(code, own | {"checks": checks})
        except BaseException as error:  # SystemExit, too
            said = message(error)
        during = [*restored(references)]
        if during:
            said = "the function replaces what its check uses"
        report("end", i, {"said": said, "changed": changed + during})
    report("finished", 0, {})


def message(error: BaseException) -> str:
    """What a student is told: the check's sentence, or another error with its name; never a traceback."""
    said = re.sub(r"\([^()]*, line", "(line", str(error))
    return (
        said if said and isinstance(error, (AssertionError, NotImplementedError)) else f"{type(error).__name__}: {said}"
    )


def main() -> None:
    """The process of the student's code: a job from stdin, reports to stdout, all other output to nowhere."""
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    # An editable installation has the repository on the path, with the solutions in it.
    sys.path[:] = [p for p in sys.path if p == os.environ["PYTHONPATH"] or not os.path.isdir(f"{p}/notebooks")]
    word = job.pop("word")
    work(job, lambda *event: print(word + json.dumps(event), file=out, flush=True))
    os._exit(0)  # threads that the student's code has started do not matter


def mark(path: Path, source) -> dict:
    """-> status, exercises (name -> points, of, message) and look: what the instructor should look at.

    source: the instructor's version of the assignment, with its hidden tests.
    """
    names = checks_of(source)
    exercises = {n: {"points": 0, "of": of, "message": "not marked"} for n, (of, _) in names.items()}
    result = {"status": "marked", "look": [], "exercises": exercises}
    try:
        notebook = read(path)
        cells = assemble(notebook, source)
    except Unreadable as error:
        return result | {"status": str(error)}
    if not touched(notebook, names):
        for name, exercise in exercises.items():
            exercise["message"] = STUB.format(name) if definitions(notebook, name) else f"{name} is not in the file"
        return result | {"status": "untouched"}
    look = [
        f"uses {word}" for word in sorted({m[0] for n, code in cells if n is None for m in SUSPICIOUS.finditer(code)})
    ]
    done, stopped = {}, {}
    for _ in range(ATTEMPTS):
        # What was marked is not marked again, but the student's own cells must run.
        hung = run(cells, stopped.keys() | {i for i in done if cells[i][0]}, done)
        if hung is None or hung[0] in stopped or hung[0] < 0:
            break
        stopped[hung[0]] = hung[1]
    notes = [f"{cells[i][0]} {why}" for i, why in stopped.items() if cells[i][0]]
    notes += [f"without a cell that {why}: {cells[i][1].strip()[:50]}" for i, why in stopped.items() if not cells[i][0]]
    result["status"] = f"marked; {'; '.join(notes)}".replace("\n", " ") if notes else "marked"
    failed = [done[i]["said"] for i, (name, _) in enumerate(cells) if name is None and i in done and done[i]["said"]]
    for i, (name, _) in enumerate(cells):
        if name is None:
            continue
        said = done[i]["said"] if i in done else f"your function {stopped.get(i, 'was not reached')}"
        written = definitions(notebook, name)
        if any(written) and not written[-1]:
            said += " (your solution is in a cell above, but the stub below replaces it)"
            look.append(f"{name}: a solution above the stub")
        elif failed and said.startswith("NameError"):
            said += f" (the first cell that fails says {failed[0]})"
        exercises[name] |= {"message": said, "points": exercises[name]["of"] if said == "right" else 0}
        look += [f"replaced {', '.join(done[i]['changed'])}"] if i in done and done[i]["changed"] else []
    return result | {"look": list(dict.fromkeys(look))}


if __name__ == "__main__":
    main()
