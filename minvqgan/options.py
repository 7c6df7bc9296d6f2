"""One place for an option: a field of a dataclass that carries its help, its bounds and its choices.

The training scripts make a flag of each such field (`harness/flags.py`). Every config calls `check` when it is made,
whether from flags, a checkpoint or a notebook, so a new option is one line in its dataclass and one where it acts.
"""

import math
import typing
from dataclasses import field, fields

LARGEST = 2**20  # of any whole number in a config: products of a few of them still fit in 64 bits


def option(default, help: str, least: float | None = None, most: float | None = None, choices: tuple = ()):
    """A dataclass field with what a flag needs. Its annotation is the type; bounds of a tuple hold for each item."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


def check(config) -> None:
    """Called by `__post_init__` of each config. Raises ValueError, one sentence that spells a field as its flag, for a
    value of another type than the annotation, out of bounds, not finite, or not among the choices."""
    types = typing.get_type_hints(type(config))
    for f in fields(config):
        name, value, type_ = "--" + f.name.replace("_", "-"), getattr(config, f.name), types[f.name]
        if typing.get_origin(type_) is tuple:
            type_ = typing.get_args(type_)[0]
            if not isinstance(value, tuple):
                raise ValueError(f"{name} is {_shown(value)}, not a tuple")
        for one in value if isinstance(value, tuple) else (value,):
            _check_value(name, one, type_, **{k: v for k, v in f.metadata.items() if k != "help"})


def _check_value(name: str, value, type_: type, least=None, most=None, choices=()) -> None:
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type_]
    allowed = (int, float) if type_ is float else type_
    if not isinstance(value, allowed) or (isinstance(value, bool) and type_ is not bool):
        raise ValueError(f"{name} is {_shown(value)}, not {wanted}")
    if choices and value not in choices:
        raise ValueError(f"{name} is {_shown(value)}, not one of {', '.join(choices)}")
    if isinstance(value, bool) or type_ is str:
        return
    least = -math.inf if least is None else least
    most = (LARGEST if type_ is int else math.inf) if most is None else most
    if not least <= value <= most or abs(value) == math.inf:  # NaN is in no interval
        raise ValueError(f"{name} is {_shown(value)}, not {wanted} from {least} to {most}")


def _shown(value) -> str:
    return repr(value)[:40]
