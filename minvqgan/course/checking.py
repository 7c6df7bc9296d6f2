"""How the answer to an exercise is compared with the right one, and what is said where they differ. A check reads

    @check
    def half(student, g):
        '''half of x'''
        x = torch.randn(3, generator=g)
        ask(student, (x,), lambda x: x / 2, {"this is twice x": lambda x: 2 * x})

A right answer prints `right: half`. A wrong one raises an AssertionError with one sentence: that of a known mistake if
the answer is what this mistake gives, else "expected half of x: got 0.31, right is 0.62 at [1]".
"""

import functools
import math
import operator
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

ALL: dict[str, Callable] = {}  # name of the exercise -> its check
NOT_THE_STUDENTS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


class Wrong(AssertionError):
    def _render_traceback_(self) -> list[str]:
        """Jupyter shows the sentence alone: the lines of this file would not help a student."""
        return [f"Not right yet: {self}"]


def check(body: Callable) -> Callable:
    """Makes a check from a function of (student's answer, generator of random numbers)."""

    def run(student: Callable, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                body(student, torch.Generator().manual_seed(seed))
            except AssertionError as error:
                raise Wrong(str(error).replace("DOCSTRING", body.__doc__ or "")) from None
            except NotImplementedError as error:  # the stub
                raise error from None
            except Exception as error:  # `call` has caught the student's own
                raise Wrong(f"expected {body.__doc__}: {type(error).__name__}: {error}") from None
        print(f"right: {body.__name__}")

    ALL[body.__name__] = functools.update_wrapper(run, body)
    return run


def on_call() -> None:
    """Called before each call of a student's function: marking restarts its clock here."""


def shown(a) -> str:
    if isinstance(a, Tensor):
        return f"{a.dtype} {tuple(a.shape)}".replace("torch.", "")
    if isinstance(a, tuple | list):
        return f"({', '.join(map(shown, a))})"
    return type(a).__name__ if callable(a) else str(a)


def call(student: Callable, *args):
    """The student's result. An error inside becomes a sentence, and the arguments must stay as they were."""
    on_call()
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    try:
        found = student(*args)
    except NotImplementedError:  # the stub
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.line for f in frames if f.line and not f.filename.startswith(NOT_THE_STUDENTS)]
        where = f" at `{lines[-1]}`" if lines else ""
        raise AssertionError(f"{type(error).__name__}{where}: {error} (called with {shown(args)[1:-1]})") from error
    for number, (now, then) in enumerate(zip(args, before, strict=True), start=1):
        assert not isinstance(now, Tensor) or torch.equal(now, then), (
            f"argument {number} was changed in place, but the caller still needs it: make a new tensor instead"
        )
    assert found is not None, "the function returned None: is the `return` missing?"
    return found


def gradients(of: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the sum of `of`, weighted by random numbers; zeros where there is none."""
    if not of.requires_grad or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    upstream = torch.randn(of.shape, generator=torch.Generator().manual_seed(1)) if of.ndim else None
    return list(torch.autograd.grad(of, inputs, upstream, retain_graph=True, allow_unused=True, materialize_grads=True))


def difference(found, truth, inputs: dict[str, Tensor], tolerance: float) -> str:
    """How a result differs from the right one in form, numbers or gradients with respect to inputs; "": it does not."""
    if isinstance(truth, tuple | list):
        if not isinstance(found, tuple | list) or len(found) != len(truth):
            return f"got {shown(found)}, right is {shown(truth)}"
        parts = [difference(a, b, inputs, tolerance) for a, b in zip(found, truth, strict=True)]
        return next((f"result {number}: {part}" for number, part in enumerate(parts, start=1) if part), "")
    if isinstance(truth, float):
        same = math.isclose(float(found), truth, rel_tol=tolerance)
        return "" if same else f"got {float(found):.5g}, right is {truth:.5g}"
    if not isinstance(truth, Tensor):
        number = operator.index(found) if isinstance(truth, int) else found
        return "" if number == truth else f"got {shown(found)}, right is {truth}"
    if type(found) not in (Tensor, nn.Parameter):
        return f"expected a tensor, got {type(found).__name__}"
    if shown(found) != shown(truth):
        return f"got {shown(found)}, right is {shown(truth)}"
    a, b = found.detach().double(), truth.detach().double()
    if b.numel() and not ((a - b).abs() <= tolerance * b.abs().max().clamp(min=0.01)).all():
        place = tuple(map(int, torch.unravel_index((a - b).abs().argmax(), a.shape)))
        return f"got {a[place].item():.5g}, right is {b[place].item():.5g}" + f" at {list(place)}" * bool(place)
    pairs = zip(*(gradients(x, tuple(inputs.values())) for x in (found, truth)), strict=True)
    parts = {name: difference(*pair, {}, tolerance) for name, pair in zip(inputs, pairs, strict=True)}
    return next((f"the gradient at {name}: {part}" for name, part in parts.items() if part), "")


def compare(found, args: tuple, right: Callable, mistakes: dict, inputs=(), tolerance: float = 1e-4) -> None:
    """found must be right(*args), with the same gradients at inputs, a dict from their names.

    mistakes: sentence -> a function that makes this mistake, or keywords with which `right` makes it.
    """
    wrong = difference(found, right(*args), dict(inputs), tolerance)
    if wrong:
        for sentence, mistake in mistakes.items():
            result = mistake(*args) if callable(mistake) else right(*args, **mistake)
            assert difference(found, result, dict(inputs), tolerance), sentence
        called = f" (called with {shown(args)[1:-1]})" if args else ""
        raise AssertionError(f"expected DOCSTRING: {wrong}{called}")  # that of the check


def ask(student: Callable, args: tuple, right: Callable, mistakes=None, **options):
    """The student's result for args, compared with that of `right`."""
    found = call(student, *args)
    compare(found, args, right, mistakes or {}, **options)
    return found


def integer(g: torch.Generator, low: int, high: int) -> int:
    """A random one from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def copy_of(block: nn.Module, expected: dict[str, nn.Module]) -> nn.ModuleDict:
    """Modules of our own with the weights of a student's, which must have the same types, sizes and options."""
    for name, part in expected.items():
        have = repr(getattr(block, name, None)).replace("padding=same", "padding=(1, 1)")
        assert have == repr(part), f"self.{name} must be {part}, got {have}"
    wanted, count = (sum(p.numel() for m in ms for p in m.parameters()) for ms in (expected.values(), [block]))
    assert count == wanted, f"the module has {count} parameters, expected {wanted}: a layer too many or a bias too few?"
    with torch.no_grad():  # fresh weights are too small, and biases too equal, to tell mistakes apart
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    for name, part in expected.items():
        part.load_state_dict(getattr(block, name).state_dict())
    return nn.ModuleDict(expected)


def with_helpers(student: Callable, *helpers: Callable):
    """Correct versions of earlier exercises, in place of the student's own: one mistake costs points once."""
    names = getattr(student, "forward", student).__globals__
    return mock.patch.dict(names, {helper.__name__.strip("_"): helper for helper in helpers})
