"""Checkpoints: plain tensors in plain containers, written whole or not at all, read without executing anything.

    minvqgan.load("runs/vqgan/last.pt")          the model of a file, in eval mode
    checkpoint.save_model("mine.pt", model)      a model alone, without what only training needs
    checkpoint.init_from("old.pt", model)        what fits of a file's weights into a new model

A file can be broken, incomplete or of another version. Everything that it can raise passes `door`, which makes one line
of it; elsewhere an error is an error of the program and stays a traceback.
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
    """Whatever a file's content raises within becomes a UserError of one line: the file and the first thing wrong.

    says: words in place of the error's own, where those would help nobody.
    """
    try:
        yield
    except FILE_ERRORS as error:
        words = f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
        if isinstance(error, pickle.UnpicklingError) and ("Unsupported" in str(error) or "GLOBAL" in str(error)):
            says = "holds objects other than tensors; nothing in it was executed. " + OFFICIAL
        raise UserError(f"{name_of(file)} {says or f'does not fit: {words[:300]}'}") from error


def name_of(file: File) -> str:
    """For messages: of a path, or of an open file if it has a name."""
    return str(file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "the file"))


def save(path: str | Path, kind: str, **content) -> None:
    """Write a checkpoint of a kind ("vqgan", "classifier", ...). `content`: tensors in plain containers.

    It is written to a temporary name beside `path` and renamed once it is complete and on the disk, so `path` is always
    either the old file or the new one. Raises OSError (disk full), or UserError for weights that are no longer finite,
    with the old file intact.
    """
    path = Path(path)
    broken = _not_finite(content)
    if broken:
        kept = f"; {path} keeps the last good state" if path.exists() else ""
        raise UserError(f"{broken} is not finite any more{kept}. Try a lower --lr")
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
    """The content of a checkpoint of ours, on the CPU. kind: what it must hold. needs: names it must have to resume.

    Raises UserError for a file that is missing, broken, of another kind or incomplete, or that holds code.
    """
    content, name = unpickled(file), name_of(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{name} is not a minvqgan checkpoint. {OFFICIAL}")
    if kind and content.get("kind") != kind:
        raise UserError(f"{name} holds a {str(content.get('kind'))[:40]}, not a {kind}")
    missing = next((need for need in needs if need not in content), None)
    if missing:
        raise UserError(f"{name} has no {missing}; training cannot resume from it")
    return content


def trained_with(path: str | Path) -> dict:
    """The flags of the training that made a checkpoint, as far as other scripts ask for them: data, image_size,
    resize, flip and seed, or fewer. Raises UserError."""
    with door(path):
        flags = dict(read(path).get("flags", {}))
    names = ("data", "image_size", "resize", "flip", "seed")
    return {name: flags[name] for name in names if flags.get(name) is not None}


def config_from(cls, values: dict):
    """A config dataclass from a checkpoint's plain dict. A field that the file lacks takes its default: a file from
    before the field existed still loads. Raises ValueError for a field that this version does not know."""
    unknown = sorted(map(str, values.keys() - {field.name for field in fields(cls)}))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; is the file of a newer version?")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fit(module: nn.Module, state: dict[str, Tensor], assign: bool = False) -> None:
    """`load_state_dict`, strictly. Raises ValueError that names the first key that does not fit.

    A module on the meta device gets memory only here, after everything was compared: a configuration that asks for a
    gigantic model costs nothing. assign: the file's tensors become the module's own, without a copy.
    """
    own = module.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in state or key not in own:
            raise ValueError(f"{key} is {'missing' if key in own else 'unknown'}; the file is of another configuration")
        if own[key].shape != state[key].shape:
            raise ValueError(f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} by its config")
    if any(t.is_meta for t in own.values()):
        module.to_empty(device="cpu")
        for name, buffer in module.named_buffers():
            if name not in own:
                buffer.zero_()  # counters, which are not saved
    module.load_state_dict(state, assign=assign)


def _fit_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Adam's saved state. Rates and betas stay as the script has set them.

    The fused Adam writes through bare pointers, so a state of another shape or layout than its parameter's would crash
    the process: each tensor is compared and copied into the layout of its parameter. Raises ValueError.
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
    """Fill each part (a module or an optimizer) from saved[name]. Raises UserError naming what does not fit."""
    for name, part in parts.items():
        with door(path):
            (fit if isinstance(part, nn.Module) else _fit_optimizer)(part, saved[name])


def _build_vqgan(content: dict) -> VQGAN:
    """A VQGAN from {"config", "model"}, in eval mode."""
    with torch.device("meta"):  # see `fit`
        model = VQGAN(config_from(VQGANConfig, content["config"]))
    fit(model, content["model"])
    return model.eval()


def load_vqgan(path: str | Path) -> VQGAN:
    """The VQGAN of a checkpoint (`last.pt`, `best.pt`), in eval mode, on the CPU. Raises UserError."""
    content = read(path, "vqgan")
    with door(path):
        return _build_vqgan(content)


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
    """The model of a checkpoint's content, in eval mode. Raises UserError for parts that do not fit each other."""
    with door(path):
        vqgan, condition = _build_vqgan(content["vqgan"]), _build_condition(content["condition"])
        with torch.device("meta"):
            gpt = GPT(config_from(GPTConfig, content["gpt_config"]))
        fit(gpt, content["gpt"])
        return TwoStage(vqgan, condition, gpt, config_from(TwoStageConfig, content["config"])).eval()


def save_model(path: str | Path, model: VQGAN | TwoStage) -> None:
    """Write a model alone, without what only training needs: a file for `load`."""
    if isinstance(model, VQGAN):
        save(path, "vqgan", config=asdict(model.config), model=model.state_dict())
    else:
        save(path, "two_stage", **pack_two_stage(model))


def load(file: File) -> VQGAN | TwoStage:
    """The model that a checkpoint holds, in eval mode, on the CPU. file: a path, or an open binary file that can seek.
    Raises UserError."""
    content = read(file)
    if content.get("kind") == "two_stage":
        return unpack_two_stage(content, file)
    if content.get("kind") != "vqgan":
        raise UserError(f"{name_of(file)} holds a {str(content.get('kind'))[:40]}, not a vqgan or two_stage model")
    with door(file):
        return _build_vqgan(content)


def init_from(path: str | Path, model: VQGAN | TwoStage, **others: nn.Module) -> str:
    """Fill a new model with what fits of a checkpoint's weights, ours or official; returns a line that says what does.

    A VQGAN takes those of a first-stage model, a TwoStage those of a transformer (its first stage is given). others:
    `discriminator=D`, filled where the file has one. A tensor fits if it has the same place in the network, by its
    official name, and the same shape. From another codebook the first codes are taken; the rest stays as it is and
    counts as dead, so call this before the first `revive_dead_codes`. Raises UserError where nothing fits.
    """
    from . import official  # which reads files by means of this module

    part, module = ("gpt", model.gpt) if isinstance(model, TwoStage) else ("vqgan", model)
    found, said = official.weights(path), []
    for name, own in {part: module, **others}.items():
        if name == part or found.get(name):
            with door(path):
                said.append(f"{name}: " + _take(own, found.get(name, {}), official.names(own)))
    return f"weights from {path}; " + "; ".join(said)


# Their rows are codes: of another codebook size the first ones are taken.
CODE_ROWS = ("quantizer.codebook.weight", "quantizer.recent_use", "head.weight", "codes")


@torch.no_grad()
def _take(module: nn.Module, found: dict[str, Tensor], names: dict[str, str]) -> str:
    """Copy what fits; returns what did and what did not. names: our key -> that in `found`."""
    own = module.state_dict()
    new = {key: found[names.get(key, key)] for key in own if names.get(key, key) in found}
    if "token_embedding.weight" in new:  # condition tokens are numbered behind the codes
        for state in (own, new):
            K, tokens = len(state["head.weight"]), state.pop("token_embedding.weight")
            state |= {"codes": tokens[:K], "condition tokens": tokens[K:]}
    partly, left = [], []
    for key, tensor in own.items():
        if key in new and new[key].shape == tensor.shape:
            tensor.copy_(new[key])
        elif key in new and key in CODE_ROWS and new[key].shape[1:] == tensor.shape[1:]:
            tensor[: len(new[key])] = new[key][: len(tensor)]
            partly.append(f"the first {min(len(new[key]), len(tensor))} of {len(tensor)} rows of {key}")
        else:
            left.append(key)
    if len(left) == len(own):
        raise ValueError("nothing in it has the names and shapes of this model")
    line = ", ".join([f"{len(own) - len(left)} of {len(own)} tensors", *partly])
    more = f" and {len(left) - 8} more" if left[8:] else ""
    return line + (f"; not in it or of another shape: {', '.join(left[:8])}{more}" if left else "")
