"""One place for an option: a field of a dataclass that carries its help, its bounds and its choices.

The training scripts make a flag of each such field (`harness/flags.py`), so a new option is one line in its dataclass
and one where it acts.
"""

from dataclasses import field, fields

LARGEST = 2**20  # of any number in a config: products of a few of them still fit in 64 bits


def option(default, help: str, least: float = 0, most: float = LARGEST, choices: tuple = ()):
    """A dataclass field with what a flag needs. Its annotation is the type; bounds of a tuple hold for each item."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


def check(config) -> None:
    """For a config's `__post_init__`. Raises ValueError for an option out of its bounds, or not one of its choices."""
    for f in fields(config):
        if not f.metadata:
            continue
        value, least, most, choices = getattr(config, f.name), *(f.metadata[m] for m in ("least", "most", "choices"))
        for one in value if isinstance(value, (tuple, list)) else [value]:
            fits = one in choices if choices else least <= one <= most  # NaN is not
            if not fits:
                number = "a number" if isinstance(f.default, float) else "a whole number"
                wanted = f"one of {', '.join(choices)}" if choices else f"{number} from {least} to {most}"
                raise ValueError(f"--{f.name.replace('_', '-')} is {one!r:.40}, not {wanted}")
