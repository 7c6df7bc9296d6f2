"""The published models of the paper's authors (CompVis/taming-transformers) in ours, and our first-stage models in
their layout.

    python -m minvqgan.harness.official last.ckpt project.yaml OUT.pt             theirs -> ours, once
    python -m minvqgan.harness.official --export OURS.pt last.ckpt project.yaml   ours -> theirs

Both sides hold the same tensors, so the mapping is a table from our names to the official ones, made by walking a
configuration as the official constructors do. Every key of a file is used, known to be unneeded, or reported: a
checkpoint that is loaded only in part gives images that are almost right, and costs days to find.
"""

import contextlib
from collections import OrderedDict
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conditioning import ClassCondition, Condition, CoordinateCondition, NoCondition, SpatialCondition
from ..gpt import GPT, GPTConfig
from ..two_stage import TwoStage, TwoStageConfig
from ..vqgan import VQGAN, VQGANConfig
from . import checkpoint, flags, runtime
from .runtime import UserError, first_line

# What an official file holds beside the model: the discriminator and LPIPS, and random colours to paint label maps in.
UNNEEDED = ("loss.", "colorize")

# The last part of the official class names is enough to tell them apart.
FIRST_STAGES = ("VQModel", "VQNoDiscModel", "VQSegmentationModel", "GumbelVQ")
ORDER_NAMES = {
    "Identity": "row",
    "Subsample": "subsample",
    "ZCurve": "z-curve",
    "SpiralOut": "spiral-out",
    "SpiralIn": "spiral-in",
    "AlternateParsing": "alternate",
}


class Inert:
    """Stands in for every class that a file mentions. Calling it gives a plain dict, the one type whose attributes and
    items torch's safe unpickler sets."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def _content(path: str | Path):
    """What somebody else's checkpoint holds. It is mapped from the file, so a large one takes memory only where it is
    used.

    Files of old Lightning versions hold pickled callbacks and hyper-parameters beside the weights. They are read as
    `Inert`: nothing of theirs is imported or executed. Raises UserError.
    """
    classes = []
    with contextlib.suppress(*checkpoint.FILE_ERRORS):  # `unpickled` says what is wrong
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Inert, name) for name in classes]):
        return checkpoint.unpickled(path, mmap=True)


def read(path: str | Path) -> dict[str, Tensor]:
    """The `state_dict` of an official checkpoint. Raises UserError."""
    content = _content(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} has no state_dict of tensors")
    return dict(state)


def class_name(node: dict) -> str:
    """Of a yaml's {target, params}: `taming.models.vqgan.VQModel` -> `VQModel`."""
    return str(node["target"]).rsplit(".", 1)[-1]


def vqgan_config(
    ddconfig: dict, n_embed: int, embed_dim: int, beta: float = 0.25, legacy: bool = True, **ours
) -> VQGANConfig:
    """Our configuration from the official `ddconfig`, `n_embed` and `embed_dim`.

    legacy: the published models were trained with beta on the codebook term. Further fields of VQGANConfig
    (`input_kind`, `gumbel`) pass through. Raises ValueError for what no published VQGAN uses (double_z, other channels
    out than in), and ValueError or TypeError for what no VQGAN can be.
    """
    dd = dict(ddconfig)
    if dd.pop("double_z", False):
        raise ValueError("double_z = True is a KL autoencoder, not a VQGAN")
    if dd.pop("out_ch", dd["in_channels"]) != dd["in_channels"]:
        raise ValueError("out_ch differs from in_channels; a VQGAN reconstructs what it reads")
    dd |= {"image_size": dd.pop("resolution"), "norm_groups": 32, "codebook_size": n_embed, "code_dim": embed_dim}
    return checkpoint.config_from(VQGANConfig, dd | {"beta": beta, "legacy": legacy} | ours)


def first_stage_config(node: dict, key: str = "image") -> VQGANConfig:
    """From a yaml's {target, params} of a first stage. key: what it is fed with (`image`, `depth`, `segmentation`);
    where params name an image_key, that counts. Raises ValueError for a model that is none of FIRST_STAGES."""
    name, params = class_name(node), node["params"]
    if name not in FIRST_STAGES:
        raise ValueError(f"{name} is not one of {', '.join(FIRST_STAGES)}")
    if params.get("remap"):
        raise ValueError("remapped codebooks (remap) are not supported")
    kind = {"segmentation": "labels", "depth": "depth"}.get(params.get("image_key", key), "rgb")
    if name == "VQSegmentationModel":
        kind = "labels"
    elif kind == "rgb" and params["ddconfig"]["in_channels"] == 1:
        kind = "gray"
    sizes = (params["ddconfig"], params["n_embed"], params["embed_dim"])
    return vqgan_config(*sizes, input_kind=kind, gumbel=name == "GumbelVQ")


def _encoder_names(c: VQGANConfig) -> list[str]:
    """Official names of the modules in `Encoder.layers`, in order."""
    names, resolution = ["conv_in"], c.image_size
    for level in range(len(c.ch_mult)):
        for block in range(c.num_res_blocks):
            names.append(f"down.{level}.block.{block}")
            if resolution in c.attn_resolutions:
                names.append(f"down.{level}.attn.{block}")
        if level < len(c.ch_mult) - 1:
            names.append(f"down.{level}.downsample")
            resolution //= 2
    return names + ["mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", "SiLU", "conv_out"]


def _decoder_names(c: VQGANConfig) -> list[str]:
    """Official names of the modules in `Decoder.layers`, in order."""
    names, resolution = ["conv_in", "mid.block_1", "mid.attn_1", "mid.block_2"], c.image_size // c.f
    for level in reversed(range(len(c.ch_mult))):
        for block in range(c.num_res_blocks + 1):
            names.append(f"up.{level}.block.{block}")
            if resolution in c.attn_resolutions:
                names.append(f"up.{level}.attn.{block}")
        if level > 0:
            names.append(f"up.{level}.upsample")
            resolution *= 2
    return names + ["norm_out"]


def names(module: nn.Module) -> dict[str, str]:
    """Our key -> the official one, of what both save of a VQGAN, a GPT (see `joined`) or a discriminator."""
    if isinstance(module, GPT):
        words = {"position_embedding": "pos_emb", "token_embedding": "tok_emb", "attention": "attn"}
        words |= {"norm1": "ln1", "norm2": "ln2", "norm": "ln_f"}
        return {key: ".".join(words.get(word, word) for word in key.split(".")) for key in module.state_dict()}
    if not isinstance(module, VQGAN):
        return {key: key.replace("layers.", "main.", 1) for key in module.state_dict()}
    layers = {f"encoder.layers.{i}": f"encoder.{name}" for i, name in enumerate(_encoder_names(module.config))}
    layers |= {f"decoder.layers.{i}": f"decoder.{name}" for i, name in enumerate(_decoder_names(module.config))}
    layers |= {"decoder.conv_out": "decoder.conv_out", "to_code": "quant_conv", "from_code": "post_quant_conv"}
    layers |= {"quantizer.codebook": "quantize.embed" if module.config.gumbel else "quantize.embedding"}
    layers |= {"quantizer.proj": "quantize.proj"}
    keys = {}
    for key in module.state_dict():
        layer = next((layer for layer in layers if key.startswith(layer + ".")), None)
        if layer:
            inner = key[len(layer) :].replace(".skip.", ".nin_shortcut.").replace(".proj.", ".proj_out.")
            keys[key] = layers[layer] + inner
    return keys


def first_stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official first stage's `state_dict` without what ours does not need, and with what only ours has: how often
    each code was chosen lately. All count as in use, or training would revive them."""
    state = {key: t for key, t in state.items() if not key.startswith(UNNEEDED)}
    K = len(state.get("quantize.embedding.weight", ()))
    return state | ({"quantizer.recent_use": torch.full((K,), 1 / K)} if K else {})


def joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official GPT's `state_dict` with one layer for query, key and value, positions (T, C) instead of (1, T, C),
    and without the causal masks (attn.mask)."""
    state = {key: t for key, t in state.items() if not key.endswith("attn.mask")}
    for query in [key for key in state if ".attn.query." in key]:
        parts = [query.replace("query", name) for name in ("query", "key", "value")]
        state[query.replace("query", "qkv")] = torch.cat([state.pop(part) for part in parts])
    if "pos_emb" in state:
        state["pos_emb"] = state["pos_emb"].flatten(0, -2)
    return state


def weights(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of any checkpoint, ours or official, under their official names: of its "vqgan", "gpt" and
    "discriminator", as far as it has them. Raises UserError."""
    content = _content(path)
    if not isinstance(content, dict) or content.get("format") != checkpoint.FORMAT:
        state = read(path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}

        found = {"vqgan": first_stage(part("first_stage_model.") or state), "gpt": joined(part("transformer."))}
        return found | {"discriminator": part("loss.discriminator.")}
    model = checkpoint.load(path)
    modules = {"vqgan": model.vqgan, "gpt": model.gpt} if isinstance(model, TwoStage) else {"vqgan": model}
    found = {name: {names(m).get(key, key): t for key, t in m.state_dict().items()} for name, m in modules.items()}
    disc = content.get("discriminator", {})
    return found | {"discriminator": {key.replace("layers.", "main.", 1): t for key, t in disc.items()}}


def _fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The official tensors become the module's own, without a copy where they are float32 already. Raises ValueError
    that names the first key without a counterpart on the other side, or of another shape."""
    ours, own = {theirs: key for key, theirs in names(module).items()}, module.state_dict()
    new = {ours.get(key, key): tensor for key, tensor in state.items()}
    checkpoint.fit(module, {k: t.to(own[k].dtype) if k in own else t for k, t in new.items()}, assign=True)


def load_vqgan(state: dict[str, Tensor], config: VQGANConfig) -> VQGAN:
    """A VQGAN from an official VQModel's, VQSegmentationModel's or GumbelVQ's `state_dict`. Raises ValueError naming
    the first key that does not fit."""
    with torch.device("meta"):  # shapes without memory or initialisation: the file's own tensors take their places
        model = VQGAN(config)
    _fill(model, first_stage(state))
    return model.eval()


def load_discriminator(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Fill a `PatchDiscriminator` with the official NLayerDiscriminator's `state_dict` (keys main.*)."""
    _fill(module, state)
    return module


def load_gpt(state: dict[str, Tensor], config: dict) -> GPT:
    """A GPT from the official GPT's `state_dict` and its yaml's params. Raises ValueError naming what does not fit.

    Codes and condition share one range there, so every token is a code here and none is the condition's alone.
    """
    if config.get("n_unmasked"):
        raise ValueError("n_unmasked > 0: a transformer whose condition is read without a causal mask is not supported")
    sizes = {name: config[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        gpt = GPT(GPTConfig(num_codes=config["vocab_size"], num_cond=0, dropout=0.0, **sizes))
    _fill(gpt, joined(state))
    return gpt.eval()


def _condition(params: dict, config: VQGANConfig, state: dict[str, Tensor]) -> Condition:
    """The condition of an official Net2NetTransformer; state: that of its cond_stage_model."""
    node = params.get("cond_stage_config")
    if params.get("unconditional") or node == "__is_unconditional__":
        if params.get("sos_token", 0) != 0:
            raise ValueError(f"sos_token is {params['sos_token']}; 0 is supported, which all published models have")
        return NoCondition()
    if params.get("downsample_cond_size", -1) != -1:
        raise ValueError("downsample_cond_size: conditions of another size than the image are not supported")
    if node == "__is_first_stage__":
        return SpatialCondition(load_vqgan(state, config))
    if class_name(node) == "Labelator":
        return ClassCondition(node["params"]["n_classes"])
    if class_name(node) == "CoordStage":
        return CoordinateCondition(node["params"]["down_factor"], node["params"]["n_embed"])
    return SpatialCondition(load_vqgan(state, first_stage_config(node, params.get("cond_stage_key", "depth"))))


def load_two_stage(state: dict[str, Tensor], params: dict) -> TwoStage:
    """A whole model from the official Net2NetTransformer's `state_dict` and its yaml's `params`. Raises ValueError
    naming the first key that does not fit."""
    parts = {name: {} for name in ("first_stage_model", "cond_stage_model", "transformer", "permuter")}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ValueError(f"official key without a place here: {key}")
        parts[part][rest] = tensor
    config = first_stage_config(params["first_stage_config"], params.get("first_stage_key", "image"))
    vqgan = load_vqgan(parts["first_stage_model"], config)
    gpt = load_gpt(parts["transformer"], params["transformer_config"]["params"])
    condition = _condition(params, config, parts["cond_stage_model"])
    if parts["cond_stage_model"] and condition.kind != "spatial":
        raise ValueError(f"official key without a place here: cond_stage_model.{next(iter(parts['cond_stage_model']))}")
    # The grid is square: block_size holds T codes and as many condition tokens, or T codes and at most one.
    n = isqrt(gpt.config.block_size // 2 if condition.is_map else gpt.config.block_size)
    permuter = class_name(params.get("permuter_config") or {"target": "Identity"})
    if permuter not in ORDER_NAMES:
        raise ValueError(f"the permuter {permuter} is not one of {', '.join(ORDER_NAMES)}")
    classes = tuple(map(str, range(condition.num_tokens))) if condition.kind == "class" else ()
    config = TwoStageConfig(n=n, order=ORDER_NAMES[permuter], shared_range=True, classes=classes)
    model = TwoStage(vqgan, condition, gpt, config).eval()
    # A permuter saves its permutation and the way back; both must be those that its name stands for.
    orders = {"forward_shuffle_idx": model.order, "backward_shuffle_idx": model.order.argsort()}
    for key, tensor in parts["permuter"].items():
        if key not in orders or not torch.equal(tensor.long(), orders[key]):
            raise ValueError(f"permuter.{key} is another order than the configuration's")
    return model


def read_config(path: str | Path) -> dict:
    """The `model` part of an official yaml: {target, params}. Raises UserError, one line."""
    try:
        import yaml
    except ImportError:
        raise UserError("reading an official configuration needs PyYAML: pip install pyyaml") from None
    if not Path(path).is_file():
        raise UserError(f"no configuration at {path}")
    try:
        model = yaml.safe_load(Path(path).read_bytes())["model"]
        return {"target": model["target"], "params": model["params"]}
    except (yaml.YAMLError, *checkpoint.FILE_ERRORS) as error:
        raise UserError(f"{path} is not the yaml of an official model ({first_line(error)[:80]})") from None


def load(path: str | Path, config: str | Path) -> VQGAN | TwoStage:
    """The model of an official checkpoint and the yaml beside it, in eval mode, on the CPU. Raises UserError."""
    model = read_config(config)
    state = read(path)
    with checkpoint.door(f"{path} with {config}"):
        if class_name(model) == "Net2NetTransformer":
            return load_two_stage(state, model["params"])
        return load_vqgan(state, first_stage_config(model))


def export_vqgan(model: VQGAN) -> tuple[dict[str, Tensor], dict]:
    """(`state_dict` with the official keys, {target, params} for the yaml). Raises UserError for what has no place
    there: other than 32 norm groups, normalised codes, or a transformer, for there codes and condition share one range
    of numbers."""
    if not isinstance(model, VQGAN):
        raise UserError("only first-stage models can be exported: the official code numbers condition tokens otherwise")
    c, state = model.config, model.state_dict()
    if c.norm_groups != 32 or c.l2_norm:
        raise UserError("cannot be exported: the official code has 32 norm groups and no l2-normalised codes")
    dd = {name: getattr(c, name) for name in ("z_channels", "in_channels", "ch", "num_res_blocks", "dropout")}
    dd |= {"double_z": False, "resolution": c.image_size, "out_ch": c.in_channels}
    dd |= {"ch_mult": list(c.ch_mult), "attn_resolutions": list(c.attn_resolutions)}
    params = {"embed_dim": c.code_dim, "n_embed": c.codebook_size, "ddconfig": dd}
    params["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
    name = "GumbelVQ" if c.gumbel else "VQModel"
    if c.gumbel:
        params["temperature_scheduler_config"] = {"target": "taming.lr_scheduler.LambdaLinearScheduler"}
    if c.input_kind == "labels":
        name, params["n_labels"], params["image_key"] = "VQSegmentationModel", c.in_channels, "segmentation"
    elif c.input_kind == "depth":
        params["image_key"] = "depth"
    named = {theirs: state[ours] for ours, theirs in names(model).items()}
    return named, {"target": f"taming.models.vqgan.{name}", "params": params}


def export(model: VQGAN | TwoStage, path: str | Path, config: str | Path) -> None:
    """Write a first-stage model as the official code would: {"state_dict"} and its yaml. Raises UserError."""
    import yaml

    state, described = export_vqgan(model)
    torch.save({"state_dict": state}, path)
    Path(config).write_text(yaml.safe_dump({"model": described}, sort_keys=False))


def open_model(path: str | Path, config: str | Path | None) -> VQGAN | TwoStage:
    """The model of a checkpoint of ours, or of an official one if `config` names its yaml. Raises UserError."""
    return load(path, config) if config else checkpoint.load(path)


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(prog="python -m minvqgan.harness.official", description="Convert official checkpoints.")
    p.add_argument("--export", action="store_true", help="the other way: OURS.pt OUT.ckpt OUT.yaml")
    p.add_argument("files", nargs=3, metavar="FILE", help="IN.ckpt IN.yaml OUT.pt")
    args = p.parse_args(argv)
    first, second, third = args.files
    outputs = (second, third) if args.export else (third,)
    for path in outputs:
        if Path(path).exists():
            raise UserError(f"{path} exists already")
    if args.export:
        export(checkpoint.load(first), second, third)
    else:
        checkpoint.save_model(third, load(first, second))
    print(f"{first} -> {outputs[0]}")
    return 0


if __name__ == "__main__":
    runtime.run(main)
