"""The scripts' flags: presets as defaults, the ones that both training scripts share, and resuming with a run's own."""

import argparse
import difflib
import math
import sys
from pathlib import Path

from ..sampler import Sampling
from . import checkpoint
from .runtime import UserError


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown, but for those that say nothing: off, and not given."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown, no abbreviations, and errors of one line that name the nearest flag."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ", 1)[1].split()[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
            message = f"unknown flag {wrong}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


# Types of flags: what is out of range is refused where it is read. NaN is neither below nor above anything, so the
# comparisons ask for what is right and not for what is wrong.


def positive(text: str) -> int:
    """1, 2, 3, ..."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def natural(text: str) -> int:
    """0, 1, 2, ..."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def share(text: str) -> float:
    """0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not a share between 0 and 1")
    return value


def weight(text: str) -> float:
    """0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 0 on")
    return value


def rate(text: str) -> float:
    """More than 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def check_image_size(size: int, f: int) -> None:
    """Raises UserError for pictures of sides that f does not divide, naming the nearest that it does."""
    below = size // f * f
    if size != below:
        nearest = f"{below} or {below + f}" if below else f"{f}"
        raise UserError(f"--image-size {size} is not divisible by f = {f}; use {nearest}")


def add_run_flags(p: Parser, presets: dict, out: str):
    """The flags that both training scripts have, under one name. Returns their group, for more."""
    g = p.add_argument_group("data and run")
    g.add_argument("--out", default=out, help="run folder")
    g.add_argument("--preset", default="tiny", choices=presets, help="defaults of all flags")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out, with its flags")
    g.add_argument("--seed", type=natural, default=0, help="of the weights, the data order and the crops")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 mixed precision (on CUDA yes)")
    g.add_argument("--compile", action="store_true", help="torch.compile: slower to start, faster to run")
    g.add_argument("--workers", type=natural, help="processes that read pictures (0 on a CPU, 8 for a GPU)")
    g.add_argument("--log-every", type=positive, help="steps between rows of metrics.csv")
    g.add_argument("--val-every", type=positive, help="steps between held-out metrics and grids")
    g.add_argument("--val-images", type=positive, default=500, help="held-out pictures used, at most")
    g.add_argument("--save-every", type=positive, help="steps between checkpoints")
    return g


def add_sampling_flags(p: Parser) -> None:
    """How codes are drawn, for the scripts that sample."""
    g = p.add_argument_group("sampling")
    g.add_argument("--temperature", type=weight, default=1.0, help="below 1 sharpens; 0 takes the likeliest code")
    g.add_argument("--top-k", type=positive, help="only the k likeliest codes")
    g.add_argument("--top-p", type=share, help="only the likeliest codes that together have this probability")
    g.add_argument("--guidance", type=weight, default=1.0, help="above 1 exaggerates the condition")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="the transformer in bfloat16 (where faster)")


def sampling(args) -> Sampling:
    """What `add_sampling_flags` read. Raises UserError for values that make no sense."""
    try:
        return Sampling(args.temperature, args.top_k, args.top_p, args.guidance)
    except ValueError as error:
        raise UserError(str(error)) from None


def parse(p: Parser, presets: dict, kind: str, resume_needs: dict, may_change: list[str]):
    """(flags, checkpoint to go on from or None). Defaults come from the preset, on --resume from the run's own flags.

    A preset says what differs from the first one. resume_needs: see `checkpoint.read`. may_change: flags that a resumed
    run may be given anew. Raises UserError.
    """
    first = Parser(add_help=False)  # which defaults hold must be known before the rest is read
    first.add_argument("--preset")
    first.add_argument("--out", default=p.get_default("out"))
    first.add_argument("--resume", action="store_true")
    early, _ = first.parse_known_args()
    p.set_defaults(**next(iter(presets.values())) | presets.get(early.preset, {}))
    if not early.resume:
        return p.parse_args(), None
    saved = checkpoint.read(Path(early.out) / "last.pt", kind, needs=resume_needs)
    p.set_defaults(**saved["flags"])
    args = p.parse_args()
    for name, value in saved["flags"].items():
        if name not in may_change and getattr(args, name, None) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} was {value} in {args.out}; a resumed run keeps it, so choose another --out")
    return args, saved
