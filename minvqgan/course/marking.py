"""Marks one handed-in notebook: its cells run in a process of their own, and then the instructor's checks.

A class has accidents. A cell that runs too long or ends the process is left out, and the rest is run again; copied,
split, moved and deleted cells change nothing; a file that cannot be read gets a status and no points.

A student's code runs in the same process as the checks and with the marker's rights. It works in a temporary folder
with a copy of the package, without solutions, seeds and other students' files. Once something that the checks use has
been replaced, nothing counts as right. This stops the plain ways to cheat, not all of them: see notebooks/README.md.
"""

import contextlib
import faulthandler
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

SECONDS = 20  # for a cell, and for each call of a student's function by a check
LONGEST = 600  # seconds for a whole notebook
ATTEMPTS = 12  # runs of one notebook: one more for each cell that hangs or ends the process

PACKAGE = Path(__file__).resolve().parents[1]
STUB = "{} is still to be written: replace this line"

# Words that no solution needs and that reach the checks, their source or the files of the machine.
SUSPICIOUS = re.compile(
    r"_getframe|currentframe|f_back|f_locals|\bgc\.|settrace|setprofile|\bsys\.|\bsetattr\(|__code__|__globals__|ctypes"
    r"|subprocess|get_ipython|\bIn\[|\b_ih\b|\bcheck(?:s|ing)\.[\w.]+\s*=(?!=)|importlib|\breload\(|__path__|__import__"
    r"|builtins|__dict__|input_transformer|(?<![.\w])(?:open|exec|eval|globals|getattr)\(|read_text|read_bytes|\bos\.|\bglob\b"
    r"|__file__|\binspect\b|\.ipynb|__torch_function__|TorchFunctionMode|TorchDispatchMode|\bTensor\.\w+\s*=(?!=)"
    r"|__eq__|base64|faulthandler"
)


class Unreadable(Exception):
    """The file is no notebook of this assignment; the message says why."""


def grade_id(cell) -> str:
    return str(cell.metadata.get("nbgrader", {}).get("grade_id", ""))


def checks_of(source) -> dict[str, tuple[float, str]]:
    """The marking cells of an assignment: name of the exercise -> (points, code)."""
    graded = [c for c in source.cells if c.cell_type == "code" and c.metadata.get("nbgrader", {}).get("grade")]
    return {grade_id(c).removesuffix("_check"): (c.metadata.nbgrader.points, c.source) for c in graded}


def read(path: Path) -> tuple[list[tuple[str, list[str]]], set[str]]:
    """-> the student's own cells (code, the functions and classes that it defines), and all exercises in the file.

    A marking cell is known by its id or, since some editors drop the metadata, by its call, checks.NAME(NAME).
    """
    import nbformat

    own, exercises = [], set()
    try:
        with warnings.catch_warnings():  # copied cells have copied ids
            warnings.simplefilter("ignore")
            cells = nbformat.reads(path.read_text(encoding="utf-8"), 4).cells
        for cell in cells:
            if cell.cell_type == "code":
                defined = re.findall(r"^(?:def|class)\s+(\w+)", cell.source, flags=re.M)
                called = re.findall(r"^checks\.(\w+)\(", cell.source, flags=re.M)
                exercises |= {*defined, *called}
                if defined or not (called or grade_id(cell).endswith("_check")):
                    own.append((cell.source, defined))
    except Exception as error:  # whatever a broken file makes nbformat say
        raise Unreadable(f"unreadable: {type(error).__name__} (is the file complete?)") from error
    return own, exercises


def written(own: list, name: str) -> list[bool]:
    """For each cell that defines an exercise, in order: is it more than the stub?"""
    return [STUB.format(name) not in code for code, defined in own if name in defined]


def peek(path: Path, source) -> tuple[int, bool]:
    """How many exercises of an assignment a file has, and whether something was written in it."""
    try:
        own, exercises = read(path)
    except Unreadable:
        return 0, False
    return len(exercises & checks_of(source).keys()), any(any(written(own, name)) for name in checks_of(source))


def run(job: dict, done: dict) -> tuple[int | str, str] | None:
    """Runs the cells and checks of a job in a new process. What they said goes to `done`, by the number of the cell or
    the name of the exercise. -> (cell or exercise, why) if one hung or ended the process."""
    word = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as room, tempfile.TemporaryFile("w+") as reports:
        shutil.copytree(PACKAGE, Path(room) / "minvqgan")
        whole = any("notebook." in code for code, _ in job["cells"])
        for folder in ("notebooks/checkpoints", "figures", "results") * whole:  # what a whole notebook loads
            if (PACKAGE.parent / folder).is_dir():
                shutil.copytree(PACKAGE.parent / folder, Path(room) / folder, ignore=shutil.ignore_patterns("*.py"))
        user = os.environ.get("MARKING_USER")  # in a container: one who cannot read solutions and seeds
        if user:
            shutil.chown(room, user)
        env = {"PYTHONPATH": room, "QUICK": "1", "MPLBACKEND": "Agg", "IPYTHONDIR": room, "PWD": room}
        child = subprocess.Popen(
            [sys.executable, "-m", "minvqgan.course.marking"],
            cwd=room,
            env=os.environ | env | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=reports,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            user=user,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(json.dumps(job | {"word": word, "seconds": SECONDS}), timeout=LONGEST)
        late = child.poll() is None
        with contextlib.suppress(OSError, AttributeError):  # and what the student's code has started; not on Windows
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.wait()
        reports.seek(0)
        lines = reports.read().split("\n")
    events = [json.loads(line.removeprefix(word)) for line in lines if line.startswith(word)]
    done |= {key: said for kind, key, said in events if kind == "end"}
    current = next((key for kind, key, _ in reversed(events) if kind == "begin" and key not in done), None)
    if [kind for kind, *_ in events[-1:]] == ["finished"] or current is None:
        return None
    late = late or any(line.startswith("Timeout (") for line in lines)  # faulthandler's word
    return current, f"ran longer than {SECONDS} s" if late else "ended the process"


def watched() -> dict[str, tuple]:
    """References to what the checks use: name -> (object, its code)."""
    import builtins
    import functools
    import itertools
    import math
    import operator

    import torch

    from minvqgan.course import checking, checks

    things = [checks, checking, builtins, functools, itertools, math, operator, torch, torch.autograd, torch.nn]
    things += [torch.nn.functional, torch.Tensor, torch.nn.Module, checking.Wrong]
    things += [value for value in vars(checks).values() if isinstance(value, type)]
    # torch replaces manual_seed when it first compiles something and Storage with the default dtype, copy adds
    # __slotnames__, IPython uses _.
    ignored = ("manual_seed", "Storage", "__slotnames__", "_")
    names = [(thing, name) for thing in things for name in (dir(thing) if isinstance(thing, type) else vars(thing))]
    found = {f"{thing.__name__}.{name}": getattr(thing, name, None) for thing, name in names if name not in ignored}
    return {name: (value, getattr(value, "__code__", None)) for name, value in found.items()}


def work(job: dict, report: Callable) -> None:
    """In the process of the student's code: runs the cells in an IPython shell, and the checks outside of it."""
    import torch
    from IPython.core.interactiveshell import InteractiveShell

    from minvqgan.course import checking, checks

    shell, own = InteractiveShell.instance(), {}
    checking.on_call = lambda: report("call", None, None)
    before, execute = watched(), exec
    for number, (code, defined) in enumerate(job["cells"]):
        if number not in job["skip"]:
            report("begin", number, None)
            result = shell.run_cell(code)
            error = result.error_before_exec or result.error_in_exec
            own |= {name: shell.user_ns[name] for name in defined if name in shell.user_ns}
            report("end", number, error and message(error))
    for name, code in job["checks"].items():
        if name in job["skip"]:
            continue
        report("begin", name, None)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        said = "right"
        try:
            execute(code, {"checks": checks} | {n: v for n, v in (shell.user_ns | own).items() if n == name})
        except BaseException as error:  # SystemExit, too
            said = message(error)
        now = watched()
        replaced = [key for key, was in before.items() if now.get(key) != was]
        report("end", name, f"replaced, though the checks use it: {', '.join(replaced)}" if replaced else said)
    report("finished", None, None)


def message(error: BaseException) -> str:
    """What a student is told: the check's sentence, or another error with its name; never a traceback."""
    said = re.sub(r"\([^()]*, line", "(line", str(error))
    plain = said and isinstance(error, AssertionError | NotImplementedError)
    return said if plain else f"{type(error).__name__}: {said}"


def main() -> None:
    """The process of the student's code: a job from stdin, reports to stdout, all other output to nowhere."""
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    # An editable installation has the repository on the path, with the solutions in it.
    sys.path[:] = [p for p in sys.path if p == os.environ["PYTHONPATH"] or not os.path.isdir(f"{p}/notebooks")]
    word, seconds = job.pop("word"), job.pop("seconds")

    def report(kind: str, key, said) -> None:
        if kind in ("begin", "call"):  # a new clock, which ends this process whatever the student's code does
            faulthandler.dump_traceback_later(seconds, exit=True, file=out)
        if kind != "call":
            print(word + json.dumps([kind, key, said]), file=out, flush=True)

    work(job, report)
    os._exit(0)  # threads that the student's code has started do not matter


def unmarked(source, status: str) -> dict:
    """status, exercises (name -> points, of, message), and look: what the instructor should look at."""
    exercises = {n: {"points": 0, "of": of, "message": "not marked"} for n, (of, _) in checks_of(source).items()}
    return {"status": status, "look": [], "exercises": exercises}


def mark(path: Path, source) -> dict:
    """The marks of a file, in the form of `unmarked`.

    source: the instructor's version of the assignment, with its hidden tests. Cells that only show exercises at work
    are not run; they catch NotImplementedError and define none.
    """
    checks, result = checks_of(source), unmarked(source, "untouched")
    exercises = result["exercises"]
    try:
        own, found = read(path)
    except Unreadable as error:
        return unmarked(source, str(error))
    if not checks.keys() & found:
        return unmarked(source, f"another notebook: its exercises are {', '.join(sorted(found)[:2]) or 'none'}")
    if not any(any(written(own, name)) for name in checks):
        for name, exercise in exercises.items():
            exercise["message"] = STUB.format(name) if written(own, name) else f"{name} is not in the file"
        return result
    shows = "except NotImplementedError"
    cells = [(code, defined) for code, defined in own if shows not in code or checks.keys() & set(defined)]
    job = {"cells": cells, "checks": {name: code for name, (_, code) in checks.items()}}
    done, stopped = {}, {}
    for _ in range(ATTEMPTS):
        # What was marked is not marked again, but the student's own cells must run.
        hung = run(job | {"skip": [*stopped, *(key for key in done if key in checks)]}, done)
        if hung is None or hung[0] in stopped:
            break
        stopped[hung[0]] = hung[1]
    without = {key: cells[key][0].strip()[:50].replace("\n", " ") for key in stopped if key not in checks}
    notes = [f"without a cell that {why}: {without[k]}" if k in without else f"{k} {why}" for k, why in stopped.items()]
    failed = [said for key, said in done.items() if key not in checks and said]
    look = [f"uses {word}" for word in sorted({m[0] for code, _ in cells for m in SUSPICIOUS.finditer(code)})]
    for name, exercise in exercises.items():
        said = done.get(name, f"your function {stopped.get(name, 'was not reached')}")
        if said == "right":
            exercise["points"] = exercise["of"]
        elif said.startswith("replaced"):
            look.append(said)
        elif any(written(own, name)) and not written(own, name)[-1]:
            said += " (your solution is in a cell above, but the stub below replaces it)"
            look.append(f"{name}: a solution above the stub")
        elif failed and said.startswith("NameError"):
            said += f" (the first cell that fails says {failed[0]})"
        exercise["message"] = said
    return result | {"status": "; ".join(["marked", *notes]), "look": list(dict.fromkeys(look))}


if __name__ == "__main__":
    main()
