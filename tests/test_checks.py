"""The marking of the exercises is itself tested by mutation: the solutions pass with any seed, a typical wrong answer
fails, and the message says what is wrong with it. The wrong answers are in wrong_answers.txt."""

import ast
import functools
import json
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from minvqgan.course import checking, checks

sys.path.insert(0, str(ROOT / "notebooks"))
from coursework import BEGIN, END, without


def wrong_answers() -> list[tuple[str, str, str, str]]:
    """(exercise, code of its solution, what a student wrote instead, words of the message) from wrong_answers.txt."""
    found = []
    for part in (ROOT / "tests" / "wrong_answers.txt").read_text().split("\n# ")[1:]:
        name, *lines = part.rstrip("\n").split("\n")
        found += [(name, *line.replace("\\n", "\n").split(" => ")) for line in lines]
    return found


WRONG = wrong_answers()


def solution_cells() -> dict[str, str]:
    """The solutions as they stand in the notebooks, by exercise."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code" and cell["metadata"].get("nbgrader", {}).get("solution"):
                found[cell["metadata"]["nbgrader"]["grade_id"]] = "".join(cell["source"])
    return found


SOLUTIONS = solution_cells()


IMPORTS = """\
import math
from collections.abc import Callable, Sequence
import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""


def function(name: str, source: str):
    """The student's function or class, as a cell of the notebook defines it, without the exercises it builds on."""
    names: dict = {}
    exec(IMPORTS + source, names)
    return names[name]


def mutated(name: str, old: str, new: str) -> str:
    head, begin, body = SOLUTIONS[name].partition(BEGIN)
    assert old in body, f"{name}: the solution has no {old!r}"
    return head + begin + body.replace(old, new)


@functools.cache
def said(name: str, old: str, new: str, seed: int) -> str:
    with pytest.raises(AssertionError) as error:
        checking.ALL[name](function(name, mutated(name, old, new)), seed=seed)
    return str(error.value)


# Other right answers: (exercise, what stands in the solution, what is as good).
ALSO_RIGHT = [
    ("ResDown", "3, padding=1", '3, padding="same"'),
    ("PrefixBlock", "nn.GELU()", 'nn.GELU("tanh")'),
    ("stage_one", "hinge_loss(disc(x), disc(x_hat.detach())).backward()",
     "(0.5 * (1 - disc(x)).relu().mean() + 0.5 * (1 + disc(x_hat.detach())).relu().mean()).backward()"),
    ("nearest_in_chunks", "part.square().sum(1) - 2 * z @ part.T", "torch.cdist(z, part)"),
    ("revive", "torch.randperm(len(latents))", "torch.multinomial(torch.ones(len(latents)), len(latents))"),
    ("learn", "torch.randint(len(s), (32,))", "torch.arange(len(s))"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), ALSO_RIGHT)
def test_other_right_answers_are_right(name, old, new):
    for seed in (0, 5):
        checking.ALL[name](function(name, mutated(name, old, new)), seed=seed)


def test_every_exercise_has_a_check_and_wrong_answers():
    assert SOLUTIONS.keys() == {name for name, *_ in WRONG} == checking.ALL.keys()


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_is_right_with_any_seed(name, capsys):
    seeds = (0, 1, 20201217) if name in ("stage_one", "learn") else range(10)
    for seed in seeds:
        checking.ALL[name](function(name, SOLUTIONS[name]), seed=seed)
    assert capsys.readouterr().out.count(f"right: {name}") == len(seeds)


@pytest.mark.parametrize(("name", "old", "new", "word"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, old, new, word):
    for seed in (0, 5):
        assert word in said(name, old, new, seed)


def sentences() -> list[str]:
    """Patterns of all sentences that the checks can say: their strings that are longer than a name."""
    found = []

    class Strings(ast.NodeVisitor):
        def visit_Expr(self, node):
            if not isinstance(node.value, ast.Constant):  # not a docstring
                self.generic_visit(node)

        def visit_JoinedStr(self, node):
            found.append("".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".*" for p in node.values))

        def visit_Constant(self, node):
            if isinstance(node.value, str):
                found.append(re.escape(node.value))

    for module in (checking, checks):
        Strings().visit(ast.parse(Path(module.__file__).read_text()))
    return [pattern for pattern in found if pattern.count(" ") > 3]


def test_every_sentence_has_a_wrong_answer():
    messages = [said(name, old, new, 0) for name, old, new, _ in WRONG]
    unheard = [p for p in sentences() if not any(re.search(p, message, re.S) for message in messages)]
    assert len(sentences()) > 100 and not unheard, "\n".join(unheard)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_explained(name):
    """Typed, with a docstring that gives shapes, and failing with the sentence of what to do."""
    stub = function(name, without(SOLUTIONS[name], BEGIN, END, 'raise NotImplementedError("still to be written")'))
    typed = stub.forward if isinstance(stub, type) else stub
    assert stub.__doc__ and len(stub.__doc__) > 20 and typed.__annotations__
    with pytest.raises(NotImplementedError, match="still to be written"):
        checking.ALL[name](stub)
