"""The scripts' flags: presets as defaults, those that both training scripts share, and a resumed run's own."""

import argparse
import dataclasses
import difflib
import math
import sys
import typing
from pathlib import Path

from ..options import LARGEST
from ..sampler import Sampling
from . import checkpoint
from .runtime import UserError, printable


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults other than None and False."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown, no abbreviations, and errors of one line that name the nearest flag."""

    def __init__(self, description: str, **kwargs):
        super().__init__(description=description.split("\n")[0], formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ", 1)[1].split()[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
            message = f"unknown flag {wrong}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        print(f"error: {printable(message)}", file=sys.stderr)
        raise SystemExit(2)


class Number:
    """Type of a flag: an int or float within bounds."""

    def __init__(self, type_: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf):
        self.type, self.least, self.most, self.above = type_, least, most, above
        self.__name__ = "whole number" if type_ is int else "number"  # argparse's word for text that is none

    def __call__(self, text: str):
        value = self.type(text)
        if self.least <= value <= self.most and self.above < value < math.inf:  # NaN is in no interval
            return value
        first = f"from {self.least}" if self.above == -math.inf else f"above {self.above}"
        last = f" to {self.most}" if self.most < math.inf else ""
        raise argparse.ArgumentTypeError(f"{value} is not a {self.__name__} {first}{last}")


# 2^40: a count times a batch still fits into 64 bits.
positive, natural, size = Number(int, 1, 2**40), Number(int, 0, 2**40), Number(int, 1, LARGEST)
fraction, weight, rate = Number(float, 0, 1), Number(float, 0), Number(float, above=0)
seed = Number(int, 0, 2**63 - 1)


def filled(text: str) -> str:
    """Type of --out: "" would be the folder one stands in."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def add_fields(group, config_class: type) -> None:
    """A flag for each field that `options.option` has made. The dataclass itself checks the bounds."""
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.metadata:
            continue
        how, type_ = {"default": field.default, "help": field.metadata["help"]}, types[field.name]
        if typing.get_origin(type_) is tuple:
            type_ = typing.get_args(type_)[0]
            how["nargs"] = "+" if field.default else "*"
        if type_ is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif type_ is str:
            how["choices"] = field.metadata["choices"]
        else:
            how["type"] = type_
        group.add_argument("--" + field.name.replace("_", "-"), **how)


def config(config_class: type, args, **others):
    """The dataclass, filled from the flags that `add_fields` made of it and from `others`. Raises UserError."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(config_class) if f.metadata}
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, **others)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_image_size(size: int, f: int) -> None:
    """Raises UserError for a size that f does not divide, naming the nearest that work."""
    if size % f:
        nearest = f"{size // f * f} or {size // f * f + f}" if size > f else f"{f}"
        raise UserError(f"--image-size {size} is not divisible by f = {f}; use {nearest}")


# What may be given anew with --resume: where a run is computed and for how long, what it writes, and what helps against
# a loss of NaN or too little memory. Anything else would make another model.
MAY_CHANGE = """
    steps device amp compile cuda_graph checkpoint_grad workers resume val_every val_images save_every log_every
    data out lr disc_lr accumulate""".split()


def add_run_flags(p: Parser, presets: dict, out: str):
    """The flags that both training scripts have, under one name. Returns their last group, for more."""
    g, switch = p.add_argument_group("run"), argparse.BooleanOptionalAction
    g.add_argument("--out", type=filled, default=out, help="run folder")
    g.add_argument("--preset", default="tiny", choices=presets, help="defaults of all flags")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, with its flags")
    g.add_argument("--init", metavar="FILE", help="begin with what fits of a checkpoint's weights, ours or official")
    g.add_argument("--seed", type=seed, default=0, help="of weights, data order, crops, dropout")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--amp", action=switch, help="bfloat16 mixed precision (where it is faster)")
    g.add_argument("--compile", action="store_true", help="torch.compile instead of --cuda-graph; starts in minutes")
    graph = "on a GPU, record a step's kernels once and replay them: Python is the bottleneck of small models"
    g.add_argument("--cuda-graph", action=switch, default=True, help=graph)
    g.add_argument("--workers", type=Number(int, 0, 1024), help="processes that read images (0 on a CPU, 8 for a GPU)")
    g.add_argument("--log-every", type=positive, help="steps between rows of metrics.csv")
    g.add_argument("--val-every", type=positive, help="steps between held-out metrics and grids")
    g.add_argument("--val-images", type=positive, default=500, help="held-out images used, at most")
    g.add_argument("--save-every", type=positive, help="steps between checkpoints")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=positive, help="optimizer steps in all")
    g.add_argument("--batch-size", type=positive, help="images a step, over all processes")
    accumulate = "micro-batches a batch, to save memory; lambda, D's BatchNorm and dead codes are those of each"
    g.add_argument("--accumulate", type=positive, default=1, help=accumulate)
    g.add_argument("--warmup", type=fraction, help="fraction of the steps over which lr rises")
    return g


def add_sampling_flags(p: Parser, batch_size: int) -> None:
    """The flags that sample.py and evaluate.py share."""
    g = p.add_argument_group("sampling")
    g.add_argument("--temperature", type=weight, default=1.0, help="below 1 sharpens; 0 takes the likeliest code")
    g.add_argument("--top-k", type=positive, help="only the k likeliest codes")
    g.add_argument("--top-p", type=fraction, help="only the likeliest codes that together have this probability")
    g.add_argument("--guidance", type=Number(float, 0, 1e4), default=1.0, help="above 1 exaggerates the condition")
    g = p.add_argument_group("how")
    g.add_argument("--official-config", metavar="YAML", help="the model is an official checkpoint; this is its yaml")
    g.add_argument("--classifier", metavar="FILE", help="of minvqgan.harness.judges, to reject or judge new images")
    g.add_argument("--seed", type=seed, default=0, help="image i of a seed is the same in any batch (but for rounding)")
    g.add_argument("--batch-size", type=positive, default=batch_size, help="images at a time")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="the transformer in bfloat16 (where faster)")


def sampling(args) -> Sampling:
    """What `add_sampling_flags` has read. Raises UserError for values that make no sense."""
    try:
        return Sampling(args.temperature, args.top_k, args.top_p, args.guidance)
    except ValueError as error:
        raise UserError(str(error)) from None


def parse(p: Parser, presets: dict, kind: str, argv: list[str] | None):
    """(flags, checkpoint to resume from or None). Defaults come from the preset, on --resume from the run's own flags.

    presets: lines of flags by name. A run of an older version resumes: flags that it did not have take their defaults,
    those that are gone are ignored. Raises UserError.
    """
    given = p.parse_args(argv)
    if not given.resume:
        p.set_defaults(**vars(p.parse_args(presets[given.preset].split())))
        return p.parse_args(argv), None
    path = Path(given.out) / "last.pt"
    saved, known = checkpoint.read(path, kind), vars(given).keys()
    with checkpoint.door(path):
        kept = {name: value for name, value in saved["flags"].items() if name in known}
        p.set_defaults(**vars(p.parse_args(presets[kept["preset"]].split())))
    p.set_defaults(**kept | {"out": given.out, "resume": True})  # the folder may have been moved
    args = p.parse_args(argv)
    for name, value in kept.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} was {value} in {args.out}; a resumed run keeps it, so choose another --out")
    return args, saved
