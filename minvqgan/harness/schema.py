"""What a checkpoint may hold. A stranger's file is checked here, at the door, before anything is built from it.

A *check* is a function of (value, where) that raises Misfit, in words for the user. Those of a model's configuration
are derived from its dataclass: the types from the annotations, the bounds from `options.option`. What has passed makes
a model without an error, so the code behind the door need not catch any.
"""

import dataclasses
import math
import typing
from collections.abc import Callable

import torch
from torch import Tensor

from ..gpt import GPTConfig
from ..two_stage import TwoStageConfig
from ..vqgan import VQGANConfig

Check = Callable[[object, str], None]
LARGEST = 2**20  # of any size in a configuration: products of two and a kernel still fit in 64 bits
MOST = 2**40  # of what is counted: a step times a batch still fits
# Of tensors. torch has more, of 8 bits and unsigned ones, with which it cannot even compare.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES += (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Misfit(ValueError):
    """The first field that is not what it should be."""


def shown(value) -> str:
    """A value in an error message: short, and never a whole tensor or a number of thousands of digits."""
    if isinstance(value, (bool, float, str, type(None))) or (isinstance(value, int) and abs(value) < 10**20):
        return repr(value)[:40]
    return f"a {type(value).__name__}"


def whole(least: int = 0, most: int = 2**53) -> Check:
    def check(value, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise Misfit(f"{where} is {shown(value)}, not a whole number from {least} to {most}")

    return check


def number(least: float = 0.0, most: float = math.inf) -> Check:
    def check(value, where: str) -> None:
        if type(value) not in (int, float) or not least <= value <= most:  # NaN is not
            raise Misfit(f"{where} is {shown(value)}, not a number from {least} to {most}")

    return check


def text(choices: tuple[str, ...] = ()) -> Check:
    def check(value, where: str) -> None:
        if not isinstance(value, str) or (choices and value not in choices):
            raise Misfit(f"{where} is {shown(value)}, not {'one of ' + ', '.join(choices) if choices else 'a text'}")

    return check


def flag(value, where: str) -> None:
    if not isinstance(value, bool):
        raise Misfit(f"{where} is {shown(value)}, not true or false")


def plain_tensor(value, where: str) -> None:
    """A dense one, in memory of its own."""
    if not isinstance(value, Tensor):
        raise Misfit(f"{where} is {shown(value)}, not a tensor")
    if value.layout != torch.strided or value.is_meta or value.dtype not in DTYPES:
        raise Misfit(f"{where} is no plain tensor but {value.dtype}, {value.layout}, on {value.device}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise Misfit(f"{where} overlaps itself")


def tensor(value, where: str) -> None:
    """A plain one of finite numbers."""
    plain_tensor(value, where)
    if value.is_floating_point() and not value.isfinite().all():
        raise Misfit(f"{where} holds numbers that are not finite")


def several(item: Check, length: int | None = None) -> Check:
    """A list or tuple."""

    def check(value, where: str) -> None:
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            raise Misfit(f"{where} is {shown(value)}, not a list" + (f" of {length}" if length else ""))
        for i, one in enumerate(value):
            item(one, f"{where}[{i}]")

    return check


def named(item: Check) -> Check:
    """A dict from names to values of one kind."""

    def check(value, where: str) -> None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise Misfit(f"{where} is {shown(value)}, not a dict of names")
        for key, one in value.items():
            item(one, f"{where}.{key}")

    return check


def record(fields: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """A dict that holds these names at least."""

    def check(value, where: str) -> None:
        if not isinstance(value, dict):
            raise Misfit(f"{where} is {shown(value)}, not a dict")
        for key, one in fields.items():
            if key not in value:
                raise Misfit(f"{f'{where}.{key}'.lstrip('.')} is missing")
            one(value[key], f"{where}.{key}".lstrip("."))
        for key, one in (optional or {}).items():
            if key in value:
                one(value[key], f"{where}.{key}".lstrip("."))

    return check


def either(*checks: Check) -> Check:
    """What passes one of them; else the last one's words."""

    def check(value, where: str) -> None:
        for one in checks[:-1]:
            try:
                return one(value, where)
            except Misfit:
                pass
        return checks[-1](value, where)

    return check


def nothing(value, where: str) -> None:
    if value is not None:
        raise Misfit(f"{where} is {shown(value)}, not None")


# Fields that are no options and so have no bounds of their own: [least of an int, or choices].
BUILT_FOR = {"num_cond": 0, "input_kind": ("rgb", "gray", "edges", "lowres", "labels", "depth")}


def of_field(field: dataclasses.Field, type_) -> Check:
    """The check of one field of a configuration."""
    bounds = field.metadata or {"least": 1, "most": None, "choices": ()}
    if typing.get_origin(type_) is tuple:
        item = dataclasses.field(metadata=dict(bounds))
        return several(of_field(item, typing.get_args(type_)[0]))
    if type_ is bool:
        return flag
    if type_ is str:
        return text(bounds["choices"] or BUILT_FOR.get(field.name, ()))
    least = bounds["least"] if field.metadata else BUILT_FOR.get(field.name, 1)
    if type_ is int:
        return whole(least, bounds["most"] or LARGEST)
    return number(least, 1e30 if bounds["most"] is None else bounds["most"])


def configuration(cls: type) -> Check:
    """A config dataclass as a dict: all of its fields and no others, each of its type and within its bounds, and what
    the dataclass asks of them together."""
    types = typing.get_type_hints(cls)
    checks = {field.name: of_field(field, types[field.name]) for field in dataclasses.fields(cls)}

    def check(value, where: str) -> None:
        if not isinstance(value, dict) or value.keys() != checks.keys():
            odd = sorted(map(str, checks.keys() ^ set(value))) if isinstance(value, dict) else [shown(value)]
            raise Misfit(f"{where} does not fit this version ({', '.join(odd)[:80]})")
        record(checks)(value, where)
        try:
            cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
        except ValueError as error:
            raise Misfit(f"{where}: {error}") from None

    return check


TENSORS = named(tensor)
VQGAN_CONFIG, GPT_CONFIG = configuration(VQGANConfig), configuration(GPTConfig)
VQGAN_PARTS = {"config": VQGAN_CONFIG, "model": TENSORS}
CONDITION = {
    "none": {},
    "class": {"num_classes": whole(1, LARGEST)},
    "coords": {"f": whole(1, 2**11), "levels": whole(1, LARGEST)},
    "spatial": VQGAN_PARTS,
}


def condition(value, where: str) -> None:
    record({"kind": text(tuple(CONDITION))})(value, where)
    record(CONDITION[value["kind"]])(value, where)


def random_state(value, where: str) -> None:
    """State of torch's generators in one process, see `runtime.random_states`."""
    record({"cpu": tensor, "cuda": several(tensor)})(value, where)
    try:
        torch.Generator().set_state(value["cpu"])  # the one that knows
    except (RuntimeError, TypeError):
        raise Misfit(f"{where}.cpu is no state of a random generator") from None
    if any(t.dtype != torch.uint8 or t.shape != (16,) for t in value["cuda"]):
        raise Misfit(f"{where}.cuda is no state of a random generator")


def sum_and_count(value, where: str) -> None:
    several(number(-math.inf), 2)(value, where)
    whole(1)(value[1], f"{where}[1]")


def optimizer_state(value, where: str) -> None:
    """What torch's optimizers save. `fit` compares it with the parameters, which only the script knows."""
    record({"state": anything, "param_groups": several(record({"params": several(whole())}))})(value, where)
    states = value["state"]
    if not isinstance(states, dict) or not all(type(key) is int for key in states):
        raise Misfit(f"{where}.state is no dict of the states of parameters")
    for key, one in states.items():
        TENSORS(one, f"{where}.state.{key}")


def anything(value, where: str) -> None:
    """Checked elsewhere."""


STEP = whole(0, MOST)

# What a run adds to its model in last.pt, see `run.Run`. `state` is the script's own, `flags` are checked as flags.
RUN = {"step": STEP, "seconds": number(0, 1e12), "best": number(-math.inf), "best_step": STEP}
RUN |= {
    "state": named(anything),
    "sums": named(sum_and_count),
    "random": several(random_state),
    "flags": named(anything),
}

# What each kind of file must hold.
KINDS = {
    "vqgan": VQGAN_PARTS,
    "two_stage": {
        "config": configuration(TwoStageConfig),
        "gpt_config": GPT_CONFIG,
        "gpt": TENSORS,
        "vqgan": record(VQGAN_PARTS),
        "condition": condition,
    },
    "classifier": {"classes": several(text()), "network": text(), "model": TENSORS},
    "codes": {"identity": text(), "s": tensor, "r": tensor},
}

# The flags of a training that later scripts ask for: see `checkpoint.trained_with`.
TRAINED_WITH = {
    "data": either(nothing, text()),
    "image_size": either(nothing, whole(1, LARGEST)),
    "resize": either(nothing, whole(1, LARGEST)),
    "flip": either(nothing, flag),
    "seed": whole(0, 2**63 - 1),
}
