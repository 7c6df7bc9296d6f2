"""Checkpoints: plain tensors and containers, written whole or not at all, read without executing anything.

What a file holds is checked once, where it is read (`schema.py`): what comes after can rely on it.
"""

import pickle
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import torch

from ..conditioning import ClassCondition, Condition, CoordinateCondition, NoCondition, SpatialCondition
from ..gpt import GPT, GPTConfig
from ..two_stage import TwoStage, TwoStageConfig, sequence_length
from ..vqgan import VQGAN, VQGANConfig
from . import runtime, schema
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
        kept = f"; {path} keeps the last good state" if path.exists() else ""
        raise UserError(f"{broken} is not finite any more{kept}. Try a lower --lr")
    try:
        with runtime.written_whole(path) as file:
            torch.save({"format": FORMAT, "kind": kind, **content}, file)
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError of its own
        raise OSError(28, f"the disk is full or the file too large ({first_line(error)})", str(path)) from None


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


def _check_not_packed(path: Path) -> None:
    """torch stores tensors as they are. A file whose entries are compressed is not from torch, and may unpack to a
    thousand times its size. Raises ValueError."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")


def read(path: str | Path, kind: str | None = None, needs: dict[str, schema.Check] | None = None) -> dict:
    """The content of a checkpoint, on the CPU, each field checked by `schema`.

    kind: what it must hold. needs: more that must be there, beside what its kind has. Raises UserError, one line, for a
    file that is missing, broken, of another kind, incomplete, or that holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        _check_not_packed(path)
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
    if kind and content["kind"] != kind:
        raise UserError(f"{path} holds a {content['kind'][:40]}, not a {kind}")
    if content["kind"] not in schema.KINDS:
        raise UserError(f"{path} holds a {content['kind'][:40]}, which this version does not know")
    missing = next((name for name in needs or {} if name not in content), None)
    if missing:
        raise UserError(f"{path} has no {missing}; training cannot resume from it")
    try:
        schema.record(schema.KINDS[content["kind"]] | (needs or {}))(content, "")
    except schema.Misfit as error:
        raise UserError(f"{path}: {error}") from None
    return content


def trained_with(path: str | Path) -> dict:
    """The flags of the training that made a checkpoint, as far as other scripts ask for them: data, image_size,
    resize, flip and seed, or fewer. Raises UserError."""
    flags = read(path).get("flags", {})
    try:
        schema.record({}, schema.TRAINED_WITH)(flags, "flags")
    except schema.Misfit as error:
        raise UserError(f"{path}: {error}") from None
    return {name: flags[name] for name in schema.TRAINED_WITH if flags.get(name) is not None}


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
        _check_not_packed(path)
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
    try:
        schema.named(schema.plain_tensor)(state, "state_dict")
    except schema.Misfit as error:
        raise UserError(f"{path} has no state_dict of tensors: {error}") from None
    if not state:
        raise UserError(f"{path} has no state_dict of tensors")
    return dict(state)


def config_from(cls, values: dict):
    """A config dataclass from a checkpoint's plain dict, which `schema` has passed."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def fill(module: torch.nn.Module, state: dict, path: str | Path) -> None:
    """load_state_dict, strictly, with a UserError of one line that names the first key that does not fit. A module on
    the meta device gets memory only once everything fits."""
    own = module.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in state or key not in own:
            raise UserError(
                f"{path}: {key} is {'missing' if key in own else 'unknown'}; the file is of another configuration"
            )
        if own[key].shape != state[key].shape:
            raise UserError(f"{path}: {key} has another shape than the configuration says")
        if own[key].is_floating_point() != state[key].is_floating_point():
            raise UserError(f"{path}: {key} holds {state[key].dtype}, not {own[key].dtype}")
    if any(t.is_meta for t in own.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(state)


def fit_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """An optimizer's saved state, in tensors that lie in memory as the parameters do, for `load_state_dict`.

    The fused Adam writes through bare pointers: a state of another shape or layout than its parameter's is memory
    corrupted. Rates and betas stay as the script has set them. Raises ValueError for what does not fit.
    """
    own = optimizer.state_dict()
    if [g["params"] for g in saved["param_groups"]] != [g["params"] for g in own["param_groups"]]:
        raise ValueError("it is of other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {}
    for i, state in saved["state"].items():
        if not 0 <= i < len(parameters) or state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the state of parameter {i} is not Adam's")
        shapes = {"step": torch.Size()} | dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[i].shape)
        for name, value in state.items():
            if (
                value.shape != shapes[name]
                or not value.is_floating_point()
                or (name != "exp_avg" and (value < 0).any())
            ):
                raise ValueError(f"{name} of parameter {i} is {tuple(value.shape)}, {value.dtype}")
        like = torch.empty_like(parameters[i], device="cpu")
        states[i] = {name: torch.empty_like(like).copy_(state[name]) for name in ("exp_avg", "exp_avg_sq")}
        states[i]["step"] = state["step"].float()
    return own | {"state": states}


def restore(saved: dict, parts: dict, path: str | Path) -> None:
    """Fill each part (a module or an optimizer) from saved[name]. Raises UserError naming what does not fit."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            fill(part, saved[name], path)
            continue
        try:
            part.load_state_dict(fit_optimizer(part, saved[name]))
        except ValueError as error:
            raise UserError(f"{path}: {name} does not fit ({error})") from None


def _build_vqgan(content: dict, path: str | Path) -> VQGAN:
    """A VQGAN from {"config", "model"}, in eval mode. Raises UserError for weights of another configuration."""
    with torch.device("meta"):  # a file that asks for a gigantic model is found out before it gets the memory
        model = VQGAN(config_from(VQGANConfig, content["config"]))
    fill(model, content["model"], path)
    return model.eval()


def load_vqgan(path: str | Path) -> VQGAN:
    """The VQGAN of a checkpoint (`last.pt`, `best.pt`), in eval mode, on the CPU. Raises UserError."""
    return _build_vqgan(read(path, "vqgan"), path)


def pack_two_stage(model: TwoStage) -> dict:
    """Everything that `unpack_two_stage` needs: its first-stage models too, so one file samples."""
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


def _build_condition(stored: dict, path: str | Path) -> Condition:
    if stored["kind"] == "none":
        return NoCondition()
    if stored["kind"] == "class":
        return ClassCondition(stored["num_classes"])
    if stored["kind"] == "coords":
        return CoordinateCondition(stored["f"], stored["levels"])
    return SpatialCondition(_build_vqgan(stored, path))


def unpack_two_stage(content: dict, path: str | Path) -> TwoStage:
    """The model of a checkpoint's content, in eval mode. Raises UserError for parts that do not fit each other."""
    vqgan, condition = _build_vqgan(content["vqgan"], path), _build_condition(content["condition"], path)
    with torch.device("meta"):
        gpt = GPT(config_from(GPTConfig, content["gpt_config"]))
    fill(gpt, content["gpt"], path)
    config = config_from(TwoStageConfig, content["config"])
    wrong = _unlike(vqgan, condition, gpt.config, config)
    if wrong:
        raise UserError(f"{path}: its parts are not of one model: {wrong}")
    return TwoStage(vqgan, condition, gpt, config).eval()


def _unlike(vqgan: VQGAN, condition: Condition, gpt: GPTConfig, config: TwoStageConfig) -> str | None:
    """What does not fit between the parts of a second stage, or None."""
    length = sequence_length(condition, config.n)
    if length > gpt.block_size:
        return f"sequences of {length} tokens, a transformer for {gpt.block_size}"
    need = (0 if config.shared_range else gpt.num_codes) + condition.num_tokens + config.guided
    if need > gpt.num_codes + gpt.num_cond or vqgan.config.codebook_size > gpt.num_codes:
        return f"{need} tokens or {vqgan.config.codebook_size} codes, a transformer for {gpt.num_codes} codes"
    if condition.kind == "class" and len(config.classes) not in (0, condition.num_tokens):
        return f"{condition.num_tokens} classes of which {len(config.classes)} have names"
    f = {"coords": lambda: condition.f, "spatial": lambda: condition.vqgan.config.f}
    if condition.kind in f and f[condition.kind]() != vqgan.config.f:
        return f"f = {f[condition.kind]()} of the condition, {vqgan.config.f} of the image"
    return None


def save_model(path: str | Path, model: VQGAN | TwoStage) -> None:
    """Write a model alone, without what only training needs."""
    if isinstance(model, VQGAN):
        save(path, "vqgan", config=asdict(model.config), model=model.state_dict())
    else:
        save(path, "two_stage", **pack_two_stage(model))


def load(path: str | Path) -> VQGAN | TwoStage:
    """The model that a checkpoint holds, in eval mode, on the CPU. Raises UserError."""
    content = read(path)
    if content["kind"] == "two_stage":
        return unpack_two_stage(content, path)
    if content["kind"] == "vqgan":
        return _build_vqgan(content, path)
    raise UserError(f"{path} holds a {content['kind']}, not a vqgan or two_stage model")
