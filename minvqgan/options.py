"""One place for an option: a field of a dataclass that carries its help, its bounds and its choices.

The training scripts make a flag of each such field (`harness/flags.py`), so a new option is one line in its dataclass
and one where it acts.
"""

import math
import typing
from dataclasses import field, fields

LARGEST = 2**20  # of any whole number in a config: products of a few of them still fit in 64 bits


def option(default, help: str, least: float = -math.inf, most: float = math.inf, choices: tuple = ()):
    """A dataclass field with what a flag needs. Its annotation is the type; bounds of a tuple hold for each item."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


def check(config) -> None:
    """Called by `__post_init__` of each config, whether from flags, a checkpoint or a notebook. Raises ValueError for a
    value of another type than the annotation, out of bounds, not finite, or not among the choices."""
    for f in fields(config):
        name, value, type_ = "--" + f.name.replace("_", "-"), getattr(config, f.name), f.type
        if typing.get_origin(type_) is tuple:
            type_ = typing.get_args(type_)[0]
            if not isinstance(value, tuple):
                raise ValueError(f"{name} is {value!r:.40}, not a tuple")
        for one in value if isinstance(value, tuple) else (value,):
            wanted = _wanted(one, type_, f.metadata)
            if wanted:
                raise ValueError(f"{name} is {one!r:.40}, not {wanted}")


def _wanted(value, type_, bounds) -> str | None:
    """What the value should be, or None if it is that."""
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type_]
    fits = isinstance(value, (int, float) if type_ is float else type_)
    if not fits or isinstance(value, bool) != (type_ is bool):
        return wanted
    if bounds.get("choices") and value not in bounds["choices"]:
        return f"one of {', '.join(bounds['choices'])}"
    if type_ in (bool, str):
        return None
    least, most = bounds.get("least", -math.inf), bounds.get("most", math.inf)
    most = min(most, LARGEST) if type_ is int else most
    inside = least <= value <= most and abs(value) < math.inf  # NaN is not
    return None if inside else f"{wanted} from {least} to {most}"
