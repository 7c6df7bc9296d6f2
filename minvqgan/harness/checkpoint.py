"""Checkpoints: plain tensors and containers, written whole or not at all, read without executing anything."""

import os
import pickle
import warnings
from collections import OrderedDict
from dataclasses import asdict, fields
from pathlib import Path

import torch

from ..conditioning import ClassCondition, CoordinateCondition, NoCondition, SpatialCondition
from ..gpt import GPT, GPTConfig
from ..two_stage import TwoStage, TwoStageConfig
from ..vqgan import VQGAN, VQGANConfig
from .runtime import UserError, first_line

FORMAT = "minvqgan 1"


def save(path: str | Path, kind: str, **content) -> None:
    """Write a checkpoint of a kind ("vqgan", "classifier", ...). `content`: tensors in plain containers.

    It goes to a temporary name beside `path` and is renamed when it is complete and on the disk: whatever happens on
    the way, `path` is the old file or the new one. Raises OSError (disk full), or UserError for weights that are not
    finite any more, with the old file intact.
    """
    path = Path(path)
    broken = _not_finite(content)
    if broken:
        raise UserError(f"{broken} is not finite any more; {path} keeps the last good state. Try a lower --lr")
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save({"format": FORMAT, "kind": kind, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError of its own
        raise OSError(28, f"the disk is full or the file too large ({first_line(error)})", str(path)) from None
    finally:
        part.unlink(missing_ok=True)


# What last.pt holds of any run, with types: see `run.Run`.
RUN_NEEDS = {"step": int, "seconds": float, "best": float, "best_step": int, "state": dict, "sums": dict}
RUN_NEEDS |= {"flags": dict, "random": list}


def _not_finite(content, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds NaN or infinity."""
    if isinstance(content, torch.Tensor):
        return name if content.is_floating_point() and not content.isfinite().all() else None
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else []
    found = (_not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
    return next((broken for broken in found if broken), None)


def _unpickled(path: Path, mmap: bool = False):
    """What the file holds; torch's warnings about strange pickles would only stand before the one line that we give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read(path: str | Path, kind: str | None = None, needs: dict[str, type] | None = None) -> dict:
    """The content of a checkpoint, on the CPU.

    kind: what it must hold. needs: names that must be there, with their types. Raises UserError, one line, for a file
    that is missing, broken, of another kind, incomplete, or that holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        content = _unpickled(path)
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("Unsupported global", "Unsupported operand", "GLOBAL")):
            raise UserError(
                f"{path} holds objects other than tensors; nothing in it was executed. "
                "An official checkpoint needs --official-config with its yaml"
            ) from None
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    except Exception:  # a broken zip, tar or pickle ends in any of a dozen kinds
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("kind"), str):
        hint = ""
        if isinstance(content, dict) and "state_dict" in content:
            hint = "; if it is an official one, name its yaml by --official-config"
        raise UserError(f"{path} is not a minvqgan checkpoint{hint}")
    if kind and content.get("kind") != kind:
        raise UserError(f"{path} holds a {content.get('kind')}, not a {kind}")
    for name, type_ in (needs or {}).items():
        if not isinstance(content.get(name), type_):
            raise UserError(f"{path} has no {name}; training cannot go on from it")
    return content


# Names that only classes of training frameworks carry, and a few harmless types: what old Lightning files mention.
FRAMEWORKS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "torch.optim", "typing", "taming")
FRAMEWORKS += ("main", "__main__")
HARMLESS = "types.SimpleNamespace argparse.Namespace collections.defaultdict pathlib.PosixPath pathlib.Path".split()
HARMLESS += [f"{module}.{name}" for module in ("builtins", "__builtin__") for name in "int dict list object".split()]
HARMLESS += "numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray.scalar _codecs.encode".split()


class Inert:
    """Stands in for a class that is not installed: whatever it is called with, a plain dict comes back, for that is the
    one thing that torch's safe unpickler lets attributes and items be put into."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def _is_known_class(name: str) -> bool:
    package, _, last = name.rpartition(".")
    known = any(package == f or package.startswith(f + ".") for f in FRAMEWORKS)
    return name in HARMLESS or (known and last.lstrip("_")[:1].isupper())


def read_foreign(path: str | Path) -> dict[str, torch.Tensor]:
    """The `state_dict` of somebody else's checkpoint, mapped from the file instead of read: a large one costs memory
    only where it is touched.

    Files of old Lightning versions hold pickled callbacks and hyper-parameters beside the weights. Nothing of theirs is
    imported or executed: known classes become `Inert`, any other name ends the reading. Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        strangers = sorted(name for name in names if not _is_known_class(name))
        if not strangers:
            with torch.serialization.safe_globals([(Inert, name) for name in names]):
                content = _unpickled(path, mmap=True)
    except Exception:  # a broken zip, tar or pickle ends in any of a dozen kinds
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    if strangers:
        raise UserError(f"{path} would run code when loaded ({strangers[0]}); nothing in it was executed")
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path} has no state_dict of tensors")
    return dict(state)


def config_from(cls, values: dict, path: str | Path):
    """A config dataclass from a checkpoint's plain dict. Raises UserError for fields that are unknown or missing."""
    known = {f.name for f in fields(cls)}
    if not isinstance(values, dict) or values.keys() != known:
        odd = sorted(known ^ set(values)) if isinstance(values, dict) else ["config"]
        raise UserError(f"{path}: the configuration does not fit this version ({', '.join(odd)})")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fill(module: torch.nn.Module, state: dict, path: str | Path) -> None:
    """load_state_dict, strictly, with a UserError of one line that names the first key that does not fit. A module on
    the meta device gets memory only once everything fits."""
    own = module.state_dict()
    if not isinstance(state, dict):
        raise UserError(f"{path}: the weights are not a dict of tensors")
    for key in sorted(own.keys() | state.keys(), key=str):
        if key not in state or key not in own:
            raise UserError(
                f"{path}: {key} is {'missing' if key in own else 'unknown'}; the file is of another configuration"
            )
        if not isinstance(state[key], torch.Tensor) or own[key].shape != state[key].shape:
            raise UserError(f"{path}: {key} has another shape than the configuration says")
        if own[key].is_floating_point() != state[key].is_floating_point():
            raise UserError(f"{path}: {key} holds {state[key].dtype}, not {own[key].dtype}")
    if any(t.is_meta for t in own.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(state)


def restore(saved: dict, parts: dict, path: str | Path) -> None:
    """Fill each part (a module or an optimizer) from saved[name]. Raises UserError naming what does not fit."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            fill(part, saved[name], path)
            continue
        try:
            part.load_state_dict(saved[name])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {name} does not fit ({first_line(error)})") from None


# What the constructors raise for numbers that make no model.
BUILD_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    ZeroDivisionError,
    IndexError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


def _build_vqgan(content: dict, path: str | Path) -> VQGAN:
    """A VQGAN from {"config", "model"}, in eval mode. Raises UserError."""
    try:
        with torch.device("meta"):  # a file that asks for a gigantic model is found out before it gets the memory
            model = VQGAN(config_from(VQGANConfig, content.get("config"), path))
    except BUILD_ERRORS as error:
        raise UserError(f"{path}: no model can be built from its configuration ({first_line(error)})") from None
    fill(model, content.get("model"), path)
    return model.eval()


def load_vqgan(path: str | Path) -> VQGAN:
    """The VQGAN of a checkpoint (`last.pt`, `best.pt`), in eval mode, on the CPU. Raises UserError."""
    return _build_vqgan(read(path, "vqgan"), path)


def pack_two_stage(model: TwoStage) -> dict:
    """Everything that `unpack_two_stage` needs: both first stages travel with the transformer, so one file samples."""
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


def unpack_two_stage(content: dict, path: str | Path) -> TwoStage:
    """The model of a checkpoint's content, in eval mode. Raises UserError."""
    for name in ("vqgan", "condition"):
        if not isinstance(content.get(name), dict):
            raise UserError(f"{path} has no {name}")
    stored = content["condition"]
    try:
        kind = stored.get("kind")
        if kind == "none":
            condition = NoCondition()
        elif kind == "class":
            condition = ClassCondition(stored["num_classes"])
        elif kind == "coords":
            condition = CoordinateCondition(stored["f"], stored["levels"])
        elif kind == "spatial":
            condition = SpatialCondition(_build_vqgan(stored, path))
        else:
            raise UserError(f"{path} has a condition of unknown kind {str(kind)[:40]!r}")
        with torch.device("meta"):
            gpt = GPT(config_from(GPTConfig, content.get("gpt_config"), path))
        fill(gpt, content.get("gpt"), path)
        config = config_from(TwoStageConfig, content.get("config"), path)
        return TwoStage(_build_vqgan(content["vqgan"], path), condition, gpt, config).eval()
    except BUILD_ERRORS as error:
        raise UserError(f"{path}: no model can be built from its configuration ({first_line(error)})") from None


def save_model(path: str | Path, model: VQGAN | TwoStage) -> None:
    """Write a model alone, without what only training needs."""
    if isinstance(model, VQGAN):
        save(path, "vqgan", config=asdict(model.config), model=model.state_dict())
    else:
        save(path, "two_stage", **pack_two_stage(model))


def load(path: str | Path) -> VQGAN | TwoStage:
    """The model that a checkpoint holds, in eval mode, on the CPU. Raises UserError."""
    content = read(path)
    if content.get("kind") == "two_stage":
        return unpack_two_stage(content, path)
    return load_vqgan(path)
