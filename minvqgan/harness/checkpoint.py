"""Checkpoints: plain tensors in plain containers, written whole or not at all, read without executing anything.

    minvqgan.load("runs/vqgan/last.pt")         the model of a file, in eval mode
    checkpoint.save_model("mine.pt", model)     a model alone, without what only training needs
    checkpoint.init_from("old.pt", model)       copies into a new model what fits of a file's weights

A file can be broken, incomplete or of another version. Whatever it raises becomes one line in `door`. Any other error
is an error of the program and stays a traceback.
"""

import contextlib
import os
import pickle
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
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
FILE_ERRORS = (AttributeError, EOFError, LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError)
FILE_ERRORS += (pickle.UnpicklingError, struct.error)


@contextlib.contextmanager
def door(file: File, says: str = "") -> Iterator[None]:
    """Turns what a file's content raises into a UserError of one line: the file and the first thing wrong.

    says: replaces the error's own words.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # not the file's fault
        raise
    except FILE_ERRORS as error:
        words = f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
        if isinstance(error, pickle.UnpicklingError) and ("Unsupported" in str(error) or "GLOBAL" in str(error)):
            says = "holds objects other than tensors; nothing in it was executed. " + OFFICIAL
        raise UserError(f"{name_of(file)} {says or f'does not fit: {words[:300]}'}") from error


def name_of(file: File) -> str:
    """The name of a path or an open file, for messages."""
    return str(file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "the file"))


def save(path: str | Path, kind: str, **content) -> None:
    """Write a checkpoint of a kind ("vqgan", "classifier", ...). `content`: tensors in plain containers.

    The file is written under a temporary name beside `path`, synced to disk and then renamed, so `path` always holds
    either the old checkpoint or the new one. Raises OSError (disk full), or UserError for weights that are NaN or
    infinite; the old file stays intact.
    """
    path = Path(path)
    broken = _not_finite(content)
    if broken:
        kept = f"; {path} keeps the last good state" if path.exists() else ""
        raise UserError(f"{broken} is no longer finite{kept}. Try a lower --lr")
    try:
        with runtime.written_whole(path) as file:
            torch.save({"format": FORMAT, "kind": kind, **content}, file)
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError of its own
        raise OSError(28, f"the disk is full or the file too large ({first_line(error)})", str(path)) from None


def _not_finite(content, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds NaN or infinity."""
    if isinstance(content, Tensor):
        return name if content.is_floating_point() and not content.isfinite().all() else None
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else []
    found = (_not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next((broken for broken in found if broken), None)


def unpickled(file: File, mmap: bool = False):
    """What a file holds, on the CPU; nothing in it is executed. Raises UserError."""
    if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):
        raise UserError(f"no checkpoint at {file}")
    with door(file, "is truncated or not a checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old pickle protocols
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def read(file: File, kind: str | None = None, needs: Iterable[str] = ()) -> dict:
    """The content of one of our checkpoints, on the CPU. kind: what it must hold. needs: what resuming needs of it.

    Raises UserError for a file that is missing, broken, incomplete, of another kind, or that holds code.
    """
    content, name = unpickled(file), name_of(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "kind" not in content:
        raise UserError(f"{name} is not a minvqgan checkpoint. {OFFICIAL}")
    if kind and content["kind"] != kind:
        raise UserError(f"{name} holds a {content['kind']}, not a {kind}")
    missing = next((need for need in needs if need not in content), None)
    if missing:
        raise UserError(f"{name} has no {missing}; training cannot resume from it")
    return content


def data_of(flags: dict, path: str | Path) -> str:
    """A run's --data, found from any folder: a relative path that does not exist is taken from where the run was
    started, as its run folder lies to it. So a project may be moved as a whole."""
    name, out = flags["data"], flags.get("out", "")
    beside = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), os.path.relpath(name, out or ".")))
    relative = name != "shapes" and not os.path.isabs(name) and not os.path.isabs(out)
    return beside if relative and not os.path.exists(name) and os.path.isdir(beside) else name


def trained_with(path: str | Path) -> dict:
    """Those of --data, --image-size, --resize, --flip and --seed that a model was trained with. Raises UserError."""
    flags, names = read(path).get("flags", {}), ("data", "image_size", "resize", "flip", "seed")
    found = {name: flags[name] for name in names if flags.get(name) is not None}
    return found | ({"data": data_of(flags, path)} if "data" in found else {})


def config_from(cls, values: dict):
    """A config dataclass from a checkpoint's plain dict. A field that the file lacks takes its default, so files from
    before the field existed still load. Raises ValueError for a field that this version does not know."""
    unknown = sorted(map(str, values.keys() - {field.name for field in fields(cls)}))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; was it written by a newer version?")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fit(module: nn.Module, state: dict[str, Tensor], assign: bool = False) -> None:
    """A strict `load_state_dict` whose ValueError names the first key that does not fit.

    A module on the meta device gets its memory here, after all shapes were compared with the file's, so a config that
    asks for a gigantic model is refused first. assign: the module takes over the file's tensors instead of copying.
    """
    own = module.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in state or key not in own:
            raise ValueError(f"{key} is {'missing' if key in own else 'unknown'}; its config describes another model")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} by its config")
        if state[key].untyped_storage().nbytes() < state[key].nbytes:  # a gigantic one of a few bytes
            raise ValueError(f"{key} overlaps itself")
    if any(t.is_meta for t in own.values()):
        module.to_empty(device="cpu")
        for name, buffer in module.named_buffers():
            if name not in own:
                buffer.zero_()  # a counter; counters are not saved
    module.load_state_dict(state, assign=assign)


def _fit_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load Adam's saved state; learning rates and betas stay as the script has set them. Raises ValueError.

    Fused Adam writes through raw pointers, so a state of another shape or memory layout than its parameter would crash
    the process. Shapes are compared, and each tensor is copied into its parameter's layout.
    """
    parameters, states = [p for group in optimizer.param_groups for p in group["params"]], {}
    for i, state in saved["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameters[i].shape:
                raise ValueError(f"{name} of parameter {i} is {tuple(state[name].shape)}")
        states[i] = {name: torch.empty_like(parameters[i]).copy_(state[name]) for name in ("exp_avg", "exp_avg_sq")}
        states[i]["step"] = torch.tensor(float(state["step"]))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def restore(saved: dict, parts: dict, path: str | Path) -> None:
    """Fill each part (module, optimizer or tensor) from saved[name]. Raises UserError that names what does not fit."""
    for name, part in parts.items():
        with door(path):
            if isinstance(part, Tensor):
                part.copy_(saved.get(name, part))  # a run of an older version may lack a counter
            else:
                (fit if isinstance(part, nn.Module) else _fit_optimizer)(part, saved[name])


def _build_vqgan(content: dict) -> VQGAN:
    """A VQGAN from {"config", "model"}, in eval mode."""
    with torch.device("meta"):  # see `fit`
        model = VQGAN(config_from(VQGANConfig, content["config"]))
    fit(model, content["model"])
    return model.eval()


def pack_two_stage(model: TwoStage) -> dict:
    """Everything that `unpack_two_stage` needs, the first-stage models included: one file is enough to sample."""
    condition = {"kind": model.condition.kind}
    if condition["kind"] == "class":
        condition["num_classes"] = model.condition.num_tokens
    if condition["kind"] == "coords":
        condition |= {"f": model.condition.f, "levels": model.condition.levels}
    if condition["kind"] == "spatial":
        condition |= {"config": asdict(model.condition.vqgan.config), "model": model.condition.vqgan.state_dict()}
    return {
        "config": asdict(model.config),
        "gpt_config": asdict(model.gpt.config),
        "gpt": model.gpt.state_dict(),
        "vqgan": {"config": asdict(model.vqgan.config), "model": model.vqgan.state_dict()},
        "condition": condition,
    }


def _build_condition(stored: dict) -> Condition:
    if stored["kind"] == "none":
        return NoCondition()
    if stored["kind"] == "class":
        return ClassCondition(stored["num_classes"])
    if stored["kind"] == "coords":
        return CoordinateCondition(stored["f"], stored["levels"])
    return SpatialCondition(_build_vqgan(stored))


def unpack_two_stage(content: dict, path: File) -> TwoStage:
    """The model of a checkpoint's content, in eval mode. Raises UserError for parts that were not made together."""
    with door(path):
        vqgan, condition = _build_vqgan(content["vqgan"]), _build_condition(content["condition"])
        with torch.device("meta"):
            gpt = GPT(config_from(GPTConfig, content["gpt_config"]))
        fit(gpt, content["gpt"])
        return TwoStage(vqgan, condition, gpt, config_from(TwoStageConfig, content["config"])).eval()


def save_model(path: str | Path, model: VQGAN | TwoStage) -> None:
    """Write a model alone, without what only training needs. `load` reads it back."""
    if isinstance(model, VQGAN):
        save(path, "vqgan", config=asdict(model.config), model=model.state_dict())
    else:
        save(path, "two_stage", **pack_two_stage(model))


def load(file: File, kind: str | None = None) -> VQGAN | TwoStage:
    """The model of a checkpoint, in eval mode, on the CPU. file: a path, or an open binary file that can seek. kind:
    "vqgan" or "two_stage", where only one will do. Raises UserError."""
    content = read(file, kind)
    if content["kind"] == "two_stage":
        return unpack_two_stage(content, file)
    if content["kind"] != "vqgan":
        raise UserError(f"{name_of(file)} holds a {content['kind']}, not a vqgan or two_stage model")
    with door(file):
        return _build_vqgan(content)


def load_vqgan(path: File) -> VQGAN:
    """`load` for a file that must hold a VQGAN."""
    return load(path, "vqgan")


def init_from(path: str | Path, model: VQGAN | TwoStage, **others: nn.Module) -> str:
    """Copy what fits of a checkpoint's weights, ours or official, into a new model. Returns a line that says what fits.

    A VQGAN takes the first stage's weights, a TwoStage the transformer's (it has a first stage already). others:
    `discriminator=D`, filled if the file has one. A tensor fits if it has the same place in the network (its official
    name says which) and the same shape. If the codebooks differ in size, the first codes are copied; the rest keep
    their values and count as dead, so call this before the first `revive_dead_codes`. Raises UserError if nothing fits.
    """
    from . import official  # here, because it imports this module

    part, module = ("gpt", model.gpt) if isinstance(model, TwoStage) else ("vqgan", model)
    found, said = official.weights(path), []
    for name, own in {part: module, **others}.items():
        if name == part or found.get(name):
            with door(path):
                said.append(f"{name}: " + _take(own, found.get(name, {}), official.names(own)))
    return f"weights from {path}; " + "; ".join(said)


# One row per code: if the codebooks differ in size, the first rows are copied.
CODE_ROWS = ("quantizer.codebook.weight", "quantizer.recent_use", "head.weight", "codes")


@torch.no_grad()
def _take(module: nn.Module, found: dict[str, Tensor], names: dict[str, str]) -> str:
    """Copy what fits and say what did and what did not. names: our key -> the one in `found`."""
    own = module.state_dict()
    new = {key: found[names.get(key, key)] for key in own if names.get(key, key) in found}
    if "token_embedding.weight" in new:  # condition tokens come after the codes
        for state in (own, new):
            K, tokens = len(state["head.weight"]), state.pop("token_embedding.weight")
            state |= {"codes": tokens[:K], "condition tokens": tokens[K:]}
    rows, left = "", []
    for key, tensor in own.items():
        if key in new and new[key].shape == tensor.shape:
            tensor.copy_(new[key])
        elif key in new and key in CODE_ROWS and new[key].shape[1:] == tensor.shape[1:]:
            tensor[: len(new[key])] = new[key][: len(tensor)]
            rows = f", the first {min(len(new[key]), len(tensor))} of {len(tensor)} codes"
        else:
            left.append(key)
    if len(left) == len(own):
        raise ValueError("none of its weights has a place in this model")
    more = f" and {len(left) - 8} more" if left[8:] else ""
    unfit = f"; not in it or of another shape: {', '.join(left[:8])}{more}" if left else ""
    return f"{len(own) - len(left)} of {len(own)} tensors{rows}{unfit}"
