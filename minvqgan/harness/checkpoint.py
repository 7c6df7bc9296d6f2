"""Checkpoints: plain tensors in plain containers, written whole or not at all, read without executing anything.

    minvqgan.load("runs/vqgan/last.pt")         the model of a file, in eval mode
    checkpoint.save_model("mine.pt", model)     a model alone, without what only training needs
    checkpoint.init_from("old.pt", model)       copies into a new model what fits of a file's weights

A file can be broken, incomplete or of another version. Whatever it raises becomes one line in `door`. Any other error
is an error of the program and stays a traceback.
"""

import contextlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..conditioning import ClassCondition, Condition, CoordinateCondition, NoCondition, SpatialCondition
from ..gpt import GPT, GPTConfig
from ..two_stage import TwoStage, TwoStageConfig
from ..vqgan import VQGAN, VQGANConfig
from . import runtime
from .runtime import UserError, first_line

FORMAT = "minvqgan 1"
File = str | Path | BinaryIO

OFFICIAL = "An official checkpoint needs --official-config with its yaml"

# What broken or unexpected content makes torch, pickle and our constructors raise.
FILE_ERRORS = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)
FILE_ERRORS += (pickle.UnpicklingError,)


@contextlib.contextmanager
def door(file: File) -> Iterator[None]:
    """Turns what a file's content raises into a UserError of one line: the file and what is wrong."""
    try:
        yield
    except FILE_ERRORS as error:
        words = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{file} does not fit: {words[:300]}") from error


def save(path: str | Path, kind: str, **content) -> None:
    """Write a checkpoint of a kind ("vqgan", "classifier", ...). `content`: tensors in plain containers.

    If that fails, the old file at `path` stays intact. Raises OSError (disk full), or UserError for weights that are
    NaN or infinite.
    """
    path = Path(path)
    for name, tensor in tensors(content):
        if not tensor.isfinite().all():
            raise UserError(f"{name} is no longer finite, so {path} was not written; try a lower --lr")
    try:
        with runtime.written_whole(path) as file:
            torch.save({"format": FORMAT, "kind": kind, **content}, file)
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError of its own
        raise OSError(28, f"the disk is full or the file too large ({first_line(error)})", str(path)) from None


def tensors(content, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts, with their names."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from tensors(value, f"{name}.{key}".lstrip("."))


class Inert:
    """Stands in for a class of another package. Its objects are of the one type that torch lets a file fill."""

    def __new__(cls, *args):
        return OrderedDict()


def unpickled(file: File, official: bool = False):
    """What a file holds, on the CPU; nothing in it is executed. Raises UserError.

    official: Lightning's pickled callbacks become `Inert`, and tensors stay in the file until they are used.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if official else []
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=official)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {file}") from None
    except FILE_ERRORS as error:
        says = "is truncated or not a checkpoint"
        if re.search("nsupported (?!operand)", str(error)):  # an operand is that of a file which is no pickle at all
            says = f"holds objects other than tensors; nothing in it was executed. {OFFICIAL}"
        raise UserError(f"{file} {says}") from error


def read(file: File, kind: str | None = None) -> dict:
    """The content of one of our checkpoints, on the CPU. kind: what it must hold. Raises UserError."""
    content = unpickled(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "kind" not in content:
        raise UserError(f"{file} is not a minvqgan checkpoint. {OFFICIAL}")
    if kind and content["kind"] != kind:
        raise UserError(f"{file} holds a {content['kind']}, not a {kind}")
    return content


def trained_with(path: str | Path) -> dict:
    """Those of --data, --image-size, --resize, --flip and --seed that a model was trained with. Raises UserError."""
    flags, names = read(path).get("flags", {}), ("data", "image_size", "resize", "flip", "seed")
    return {name: flags[name] for name in names if flags.get(name) is not None}


def empty(network: type[nn.Module], config) -> nn.Module:
    """A network for `fill`. It gets no initial weights, which would take time and draw random numbers."""
    with torch.device("meta"):
        module = network(config)
    module.to_empty(device="cpu")
    for buffer in module.buffers():
        buffer.zero_()  # counters, which are not saved
    return module


def fill(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The module takes over a file's tensors, without a copy if they have its precision, and goes to eval mode."""
    own = module.state_dict()
    state = {key: t.to(own[key].dtype).contiguous() if key in own else t for key, t in state.items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def _fit_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load Adam's running means; learning rates and betas stay as the script has set them.

    Fused Adam writes through raw pointers, so means of another shape or memory layout than their parameter would crash
    the process. Shapes are compared, and each tensor is copied into its parameter's layout.
    """
    parameters, states = [p for group in optimizer.param_groups for p in group["params"]], saved["state"]
    for i, state in states.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameters[i].shape:
                raise ValueError(f"{name} of parameter {i} is {tuple(state[name].shape)}")
            state[name] = torch.empty_like(parameters[i]).copy_(state[name])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def restore(saved: dict, parts: dict, path: str | Path) -> None:
    """Fill each part (module, optimizer or tensor) from saved[name]. Raises UserError that names what does not fit."""
    for name, part in parts.items():
        with door(path):
            if isinstance(part, Tensor):
                part.copy_(saved.get(name, part))  # a run of an older version may lack a counter
            elif isinstance(part, nn.Module):
                part.load_state_dict(saved[name])
            else:
                _fit_optimizer(part, saved[name])


def _pack_vqgan(model: VQGAN) -> dict:
    return {"config": asdict(model.config), "model": model.state_dict()}


def _build_vqgan(content: dict) -> VQGAN:
    return fill(empty(VQGAN, VQGANConfig(**content["config"])), content["model"])


def pack_two_stage(model: TwoStage) -> dict:
    """Everything that `unpack_two_stage` needs, the first-stage models included: one file is enough to sample."""
    condition, stored = model.condition, {"kind": model.condition.kind}
    if isinstance(condition, ClassCondition):
        stored |= {"num_classes": condition.num_tokens}
    elif isinstance(condition, CoordinateCondition):
        stored |= {"f": condition.f, "levels": condition.levels}
    elif isinstance(condition, SpatialCondition):
        stored |= _pack_vqgan(condition.vqgan)
    own = {"config": asdict(model.config), "gpt_config": asdict(model.gpt.config), "gpt": model.gpt.state_dict()}
    return own | {"vqgan": _pack_vqgan(model.vqgan), "condition": stored}


def _build_condition(kind: str, **stored) -> Condition:
    if kind == "spatial":
        return SpatialCondition(_build_vqgan(stored))
    return {"none": NoCondition, "class": ClassCondition, "coords": CoordinateCondition}[kind](**stored)


def unpack_two_stage(content: dict, path: File) -> TwoStage:
    """The model of a checkpoint's content, in eval mode. Raises UserError for parts that were not made together."""
    with door(path):
        vqgan, condition = _build_vqgan(content["vqgan"]), _build_condition(**content["condition"])
        gpt = fill(empty(GPT, GPTConfig(**content["gpt_config"])), content["gpt"])
        return TwoStage(vqgan, condition, gpt, TwoStageConfig(**content["config"])).eval()


def save_model(path: str | Path, model: VQGAN | TwoStage) -> None:
    """Write a model alone, without what only training needs. `load` reads it back. The model may be wrapped by
    torch.compile, DataParallel or DistributedDataParallel, which would prefix the names of the weights."""
    while not isinstance(model, VQGAN | TwoStage):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    if isinstance(model, VQGAN):
        save(path, "vqgan", **_pack_vqgan(model))
    else:
        save(path, "two_stage", **pack_two_stage(model))


def load(file: File, kind: str | None = None) -> VQGAN | TwoStage:
    """The model of a checkpoint, in eval mode, on the CPU. file: a path, or an open binary file that can seek. kind:
    "vqgan" or "two_stage", where only one will do. Raises UserError."""
    content = read(file, kind)
    with door(file):
        if content["kind"] == "vqgan":
            return _build_vqgan(content)
        if content["kind"] == "two_stage":
            return unpack_two_stage(content, file)
    raise UserError(f"{file} holds a {content['kind']}, not a vqgan or two_stage model")


def load_vqgan(path: File) -> VQGAN:
    """`load` for a file that must hold a VQGAN."""
    return load(path, "vqgan")


def init_from(path: str | Path, model: VQGAN | TwoStage, **others: nn.Module) -> str:
    """Copy what fits of a checkpoint's weights, ours or official, into a new model. Returns a line that says what fits.

    A VQGAN takes those of a VQGAN, or of the one in a stage-two file; a TwoStage those of a transformer. others:
    `discriminator=D`, filled if the file has one. A tensor fits if it has the same place in the network and the same
    shape. Of a codebook of another size the first codes are copied; the rest count as dead, so call this before the
    first `revive_dead_codes`. Raises UserError if nothing fits.
    """
    from . import official  # here, because it imports this module

    found, part = official.weights(path), "gpt" if isinstance(model, TwoStage) else "vqgan"
    modules = {part: getattr(model, "gpt", model)} | {name: other for name, other in others.items() if found[name]}
    with door(path):
        said = [f"{name}: {_take(own, found[name], official.names(own))}" for name, own in modules.items()]
    return f"weights from {path}; " + "; ".join(said)


# A row for each code (and each condition token, after the codes): of another number of rows the first are copied.
ROWS = ("quantizer.codebook.weight", "quantizer.recent_use", "token_embedding.weight", "head.weight")


@torch.no_grad()
def _take(module: nn.Module, found: dict[str, Tensor], official: dict[str, str]) -> str:
    """Copy what fits and say what does not. official: our key -> the official one."""
    own, left = module.state_dict(), []
    for key, tensor in own.items():
        new = found.get(official.get(key, key), found.get(key))
        if new is not None and key in ROWS and new.shape[1:] == tensor.shape[1:]:
            tensor[: len(new)] = new[: len(tensor)]
        elif new is not None and new.shape == tensor.shape:
            tensor.copy_(new)
        else:
            left.append(key)
    if len(left) == len(own):
        raise ValueError("none of its weights has a place in this model")
    unfit = f"; not in it or of another shape: {', '.join(left[:8])}{', ...' if left[8:] else ''}" if left else ""
    return f"{len(own) - len(left)} of {len(own)} tensors{unfit}"
