"""One place for an option: a field of a dataclass that carries its help and its bounds.

The training scripts make a flag of each such field (`harness/flags.py`) and checkpoints are checked against its bounds,
so a new option of a model is one line in its dataclass and one where it acts.
"""

from dataclasses import field


def option(default, help: str, least: float | None = None, most: float | None = None, choices: tuple = ()):
    """A dataclass field with what a flag needs. The type is the field's annotation; for tuples the bounds hold for
    every item."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})
