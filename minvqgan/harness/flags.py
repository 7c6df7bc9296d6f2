"""The scripts' flags: presets as defaults, the ones that both training scripts share, and resuming with a run's own."""

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
    """Defaults are shown, but for those that say nothing: off, and not given."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown, no abbreviations, and errors of one line that name the nearest flag."""

    def __init__(self, description: str | None = None, **kwargs):
        first_line = (description or "").split("\n")[0]  # python -OO leaves no docstrings
        super().__init__(description=first_line, formatter_class=Help, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("-") and word.endswith("--") and word != "--":
                self.error(f"{word[:-2]} has no value")  # argparse would give an empty list, whatever the type
        known, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(known, action.dest, None)
            # An empty name is the current folder to some functions, and a flag that was not given to others.
            if isinstance(value, str) and not value.strip() and value != action.default:
                self.error(f"argument {action.option_strings[0]}: the name is empty")
        return known, others

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ", 1)[1].split()[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
            message = f"unknown flag {wrong}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        print(f"error: {printable(message)}", file=sys.stderr)
        raise SystemExit(2)


class Number:
    """Type of a flag: an int or float within bounds. What is out of range is refused where it is read.

    NaN is neither below nor above anything, so the comparisons ask for what is right and not for what is wrong.
    """

    def __init__(self, type_: type, least: float | None = None, most: float | None = None, above: float | None = None):
        self.type, self.least, self.most, self.above = type_, least, most, above
        self.__name__ = "whole number" if type_ is int else "number"  # argparse's word for text that is none

    def __call__(self, text: str):
        value = self.type(text)
        if self.least is not None and not value >= self.least:
            raise argparse.ArgumentTypeError(f"{value} is not a {self.__name__} from {self.least} on")
        if self.most is not None and not value <= self.most:
            raise argparse.ArgumentTypeError(f"{value} is more than {self.most}")
        if self.above is not None and not value > self.above:
            raise argparse.ArgumentTypeError(f"{value} is not a {self.__name__} above {self.above}")
        if not abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"{value} is not finite")
        return value


# Counts: beyond, a product of two would not fit into 64 bits.
MOST = 2**40
positive, natural, size = Number(int, 1, MOST), Number(int, 0, MOST), Number(int, 1, LARGEST)
fraction, weight, rate = Number(float, 0, 1), Number(float, 0), Number(float, above=0)
seed = Number(int, 0, 2**63 - 1)


def add_fields(group, config_class: type) -> None:
    """A flag for each field of a config dataclass that was made by `options.option`."""
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.metadata:
            continue
        how = {"default": field.default, "help": field.metadata["help"]}
        item = types[field.name]
        if typing.get_origin(item) is tuple:
            item = typing.get_args(item)[0]
            how["nargs"] = "+" if field.default else "*"
        if item is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif item is str:
            how["choices"] = field.metadata["choices"]
        else:
            largest = LARGEST if item is int else None
            how["type"] = Number(item, field.metadata["least"], field.metadata["most"] or largest)
        group.add_argument("--" + field.name.replace("_", "-"), **how)


def config(config_class: type, args, **others):
    """The dataclass, filled from the flags that `add_fields` made of it and from `others`. Raises UserError."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(config_class) if f.metadata}
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, **others)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_image_size(size: int, f: int) -> None:
    """Raises UserError for images of sides that f does not divide, naming the nearest that it does."""
    below = size // f * f
    if size != below:
        nearest = f"{below} or {below + f}" if below else f"{f}"
        raise UserError(f"--image-size {size} is not divisible by f = {f}; use {nearest}")


# What a resumed run may be given anew: where it runs and for how long, what it writes, and the ways out of a loss that
# is not a number and of too little memory. Everything else would make another model of it.
MAY_CHANGE = "steps device amp compile cuda_graph checkpoint_grad workers resume val_every val_images".split()
MAY_CHANGE += "save_every log_every tensorboard out lr disc_lr accumulate".split()


def add_run_flags(p: Parser, presets: dict, out: str):
    """The flags that both training scripts have, under one name. Returns their group, for more."""
    g = p.add_argument_group("run")
    g.add_argument("--out", default=out, help="run folder")
    g.add_argument("--preset", default="tiny", choices=presets, help="defaults of all flags")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, with its flags")
    g.add_argument("--seed", type=seed, default=0, help="of weights, data order, crops, and which 5 %% are held out")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 mixed precision (where it is faster)")
    g.add_argument(
        "--compile", action="store_true", help="torch.compile, instead of --cuda-graph: a minute and more to start"
    )
    g.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a step's kernels are recorded once and replayed: a GPU need not wait for Python (where it can be)",
    )
    g.add_argument("--workers", type=Number(int, 0, 1024), help="processes that read images (0 on a CPU, 8 for a GPU)")
    g.add_argument("--log-every", type=positive, help="steps between rows of metrics.csv")
    g.add_argument("--val-every", type=positive, help="steps between held-out metrics and grids")
    g.add_argument("--val-images", type=positive, default=500, help="held-out images used, at most")
    g.add_argument("--save-every", type=positive, help="steps between checkpoints")
    g.add_argument("--tensorboard", action="store_true", help="the same numbers and grids for TensorBoard")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=positive, help="optimizer steps in all")
    g.add_argument("--batch-size", type=positive, help="images a step, over all processes")
    g.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        help="micro-batches a batch, for small memory; lambda, D's BatchNorm and dead codes are those of each",
    )
    g.add_argument("--warmup", type=fraction, help="fraction of the steps over which lr rises")
    return g


def add_sampling_flags(p: Parser) -> None:
    """How codes are drawn, for the scripts that sample."""
    g = p.add_argument_group("sampling")
    g.add_argument("--temperature", type=weight, default=1.0, help="below 1 sharpens; 0 takes the likeliest code")
    g.add_argument("--top-k", type=positive, help="only the k likeliest codes")
    g.add_argument("--top-p", type=fraction, help="only the likeliest codes that together have this probability")
    g.add_argument("--guidance", type=Number(float, 0, 1e4), default=1.0, help="above 1 exaggerates the condition")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="the transformer in bfloat16 (where faster)")


def sampling(args) -> Sampling:
    """What `add_sampling_flags` read. Raises UserError for values that make no sense."""
    try:
        return Sampling(args.temperature, args.top_k, args.top_p, args.guidance)
    except ValueError as error:
        raise UserError(str(error)) from None


def parse(p: Parser, presets: dict, kind: str):
    """(flags, checkpoint to resume from or None). Defaults come from the preset, on --resume from the run's own flags.

    presets: lines of flags by name. A run of an older version resumes: flags that it did not have take their defaults,
    those that are gone are ignored. Raises UserError.
    """
    first = Parser(add_help=False)  # which defaults hold must be known before the rest is read
    first.add_argument("--preset", default=p.get_default("preset"))
    first.add_argument("--out", default=p.get_default("out"))
    first.add_argument("--resume", action="store_true")
    early, _ = first.parse_known_args()
    saved = checkpoint.read(Path(early.out) / "last.pt", kind, ("flags", "step", "random")) if early.resume else None
    preset = saved["flags"].get("preset") if saved else early.preset
    if preset in presets:  # else argparse says what there is, further down
        p.set_defaults(**vars(p.parse_args(presets[preset].split())))
    if not saved:
        return p.parse_args(), None
    known = {action.dest for action in p._actions}
    kept = {name: value for name, value in saved["flags"].items() if name in known}
    # The folder may have been moved, or be a stranger's: the file must not say where this run writes.
    p.set_defaults(**kept | {"out": early.out, "resume": False})
    args = p.parse_args()
    for name, value in kept.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} was {value} in {args.out}; a resumed run keeps it, so choose another --out")
    return args, saved
