"""Converts between the official models (CompVis/taming-transformers) and ours.

    python -m minvqgan.harness.official last.ckpt project.yaml OUT.pt             official -> ours
    python -m minvqgan.harness.official --export OURS.pt last.ckpt project.yaml   ours -> official, first stages only

Both sides hold the same tensors under different names, so the mapping is a table of names. It is made by walking a
configuration as the official constructors do. Every key of a file is used, known to be unneeded, or reported: a
checkpoint loaded only in part gives images that are almost right, and the reason takes days to find.
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

# In a first stage's file beside the model: the discriminator, LPIPS, and random colours for showing label maps.
UNNEEDED = ("loss.", "colorize")

# Official class names, without their modules.
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
    """Stands in for every class that a file mentions. Its instances are plain dicts, the only objects that torch's safe
    unpickler lets a file set attributes and items of."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def _content(path: str | Path):
    """What a file holds, mapped into memory: of a large file only what is used is read. Raises UserError.

    Lightning saves pickled callbacks and hyperparameters beside the weights. They become `Inert`: nothing in the file
    is imported or executed.
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

    legacy: the published models were trained with beta on the codebook term. ours: further fields of VQGANConfig
    (`input_kind`, `gumbel`). Raises ValueError for unknown fields, bad values, and what no published VQGAN uses
    (double_z, out_ch unlike in_channels).
    """
    dd = dict(ddconfig)
    if dd.pop("double_z", False):
        raise ValueError("double_z = True is a KL autoencoder, not a VQGAN")
    if dd.pop("out_ch", dd["in_channels"]) != dd["in_channels"]:
        raise ValueError("out_ch differs from in_channels; a VQGAN reconstructs its input")
    dd |= {"image_size": dd.pop("resolution"), "norm_groups": 32, "codebook_size": n_embed, "code_dim": embed_dim}
    return checkpoint.config_from(VQGANConfig, dd | {"beta": beta, "legacy": legacy} | ours)


def first_stage_config(node: dict, key: str = "image") -> VQGANConfig:
    """From a yaml's {target, params} of a first stage. key: what the model reads (`image`, `depth`, `segmentation`),
    unless params have an image_key. Raises ValueError for a model that is none of FIRST_STAGES."""
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
    """Our key -> the official key, for each tensor of a VQGAN, GPT (see `joined`) or discriminator that both have."""
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
    """An official first stage's `state_dict` without UNNEEDED, plus the one tensor that only ours has, the recent use
    of each code. All codes count as used; otherwise further training would revive, that is replace, them."""
    state = {key: t for key, t in state.items() if not key.startswith(UNNEEDED)}
    K = len(state.get("quantize.embedding.weight", ()))
    return state | ({"quantizer.recent_use": torch.full((K,), 1 / K)} if K else {})


def joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official GPT's `state_dict` in our shapes: query, key and value in one layer, positions (T, C) instead of
    (1, T, C), no causal masks (attn.mask)."""
    state = {key: t for key, t in state.items() if not key.endswith("attn.mask")}
    for query in [key for key in state if ".attn.query." in key]:
        parts = [query.replace("query", name) for name in ("query", "key", "value")]
        state[query.replace("query", "qkv")] = torch.cat([state.pop(part) for part in parts])
    if "pos_emb" in state:
        state["pos_emb"] = state["pos_emb"].flatten(0, -2)
    return state


def weights(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, ours or official, under official names, for each of "vqgan", "gpt" and
    "discriminator" that it has. Raises UserError."""
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
    """The module takes over the official tensors, without a copy if they are float32 already. Raises ValueError that
    names the first key without a counterpart, or of another shape."""
    ours, own = {theirs: key for key, theirs in names(module).items()}, module.state_dict()
    new = {ours.get(key, key): tensor for key, tensor in state.items()}
    checkpoint.fit(module, {k: t.to(own[k].dtype) if k in own else t for k, t in new.items()}, assign=True)


def load_vqgan(state: dict[str, Tensor], config: VQGANConfig) -> VQGAN:
    """A VQGAN from an official first stage's `state_dict`. Raises ValueError for the first key that does not fit."""
    with torch.device("meta"):  # no memory and no initialisation: the file's tensors are used as they are
        model = VQGAN(config)
    _fill(model, first_stage(state))
    return model.eval()


def load_discriminator(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Fill a `PatchDiscriminator` with the official NLayerDiscriminator's `state_dict` (keys main.*)."""
    _fill(module, state)
    return module


def load_gpt(state: dict[str, Tensor], config: dict) -> GPT:
    """A GPT from the official GPT's `state_dict` and its yaml's params. Raises ValueError for what does not fit.

    There, codes and condition tokens share one range of numbers. Here, all of them count as codes.
    """
    if config.get("n_unmasked"):
        raise ValueError("n_unmasked > 0 (no causal mask on the condition) is not supported")
    sizes = {name: config[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        gpt = GPT(GPTConfig(num_codes=config["vocab_size"], num_cond=0, dropout=0.0, **sizes))
    _fill(gpt, joined(state))
    return gpt.eval()


def _condition(params: dict, config: VQGANConfig, state: dict[str, Tensor]) -> Condition:
    """The condition of an official Net2NetTransformer. state: the `state_dict` of its cond_stage_model."""
    node = params.get("cond_stage_config")
    if params.get("unconditional") or node == "__is_unconditional__":
        if params.get("sos_token", 0) != 0:
            raise ValueError(f"sos_token is {params['sos_token']}; only 0 is supported, as in all published models")
        return NoCondition()
    if params.get("downsample_cond_size", -1) != -1:
        raise ValueError("downsample_cond_size (a condition smaller than the image) is not supported")
    if node == "__is_first_stage__":
        return SpatialCondition(load_vqgan(state, config))
    if class_name(node) == "Labelator":
        return ClassCondition(node["params"]["n_classes"])
    if class_name(node) == "CoordStage":
        return CoordinateCondition(node["params"]["down_factor"], node["params"]["n_embed"])
    return SpatialCondition(load_vqgan(state, first_stage_config(node, params.get("cond_stage_key", "depth"))))


def load_two_stage(state: dict[str, Tensor], params: dict) -> TwoStage:
    """Both stages from an official Net2NetTransformer's `state_dict` and its yaml's params. Raises ValueError for the
    first key that does not fit."""
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
    # The latent map is square: block_size is 2T for a condition of T tokens, T or T + 1 for one of at most one token.
    n = isqrt(gpt.config.block_size // 2 if condition.is_map else gpt.config.block_size)
    permuter = class_name(params.get("permuter_config") or {"target": "Identity"})
    if permuter not in ORDER_NAMES:
        raise ValueError(f"the permuter {permuter} is not one of {', '.join(ORDER_NAMES)}")
    classes = tuple(map(str, range(condition.num_tokens))) if condition.kind == "class" else ()
    config = TwoStageConfig(n=n, order=ORDER_NAMES[permuter], shared_range=True, classes=classes)
    model = TwoStage(vqgan, condition, gpt, config).eval()
    # A permuter saves its order and the inverse; both must be those of its class.
    orders = {"forward_shuffle_idx": model.order, "backward_shuffle_idx": model.order.argsort()}
    for key, tensor in parts["permuter"].items():
        if key not in orders or not torch.equal(tensor.long(), orders[key]):
            raise ValueError(f"permuter.{key} is not the order of {permuter}")
    return model


def read_config(path: str | Path) -> dict:
    """The `model` part of an official yaml: {target, params}. Raises UserError, one line."""
    try:
        import yaml
    except ImportError:
        raise UserError("reading an official configuration needs PyYAML: pip install pyyaml") from None
    try:
        model = yaml.safe_load(Path(path).read_bytes())["model"]
        return {"target": model["target"], "params": model["params"]}
    except (yaml.YAMLError, *checkpoint.FILE_ERRORS) as error:
        raise UserError(f"{path} is not the yaml of an official model ({first_line(error)[:80]})") from None


def load(path: str | Path, config: str | Path) -> VQGAN | TwoStage:
    """The model of an official checkpoint and its yaml, in eval mode, on the CPU. Raises UserError."""
    model = read_config(config)
    state = read(path)
    with checkpoint.door(f"{path} with {config}"):
        if class_name(model) == "Net2NetTransformer":
            return load_two_stage(state, model["params"])
        return load_vqgan(state, first_stage_config(model))


def export_vqgan(model: VQGAN) -> tuple[dict[str, Tensor], dict]:
    """(`state_dict` with official keys, {target, params} for the yaml). Raises UserError for what the official code
    does not have."""
    if not isinstance(model, VQGAN):
        raise UserError("only first stages can be exported: the official code numbers condition tokens differently")
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
    """Write a first-stage model as the official code does: {"state_dict"} and a yaml. Raises UserError."""
    import yaml

    state, described = export_vqgan(model)
    torch.save({"state_dict": state}, path)
    Path(config).write_text(yaml.safe_dump({"model": described}, sort_keys=False))


def open_model(path: str | Path, config: str | Path | None) -> VQGAN | TwoStage:
    """The model of one of our checkpoints, or of an official one if `config` names its yaml. Raises UserError."""
    return load(path, config) if config else checkpoint.load(path)


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(
        prog="python -m minvqgan.harness.official", description="Convert an official checkpoint to ours, or back."
    )
    p.add_argument("--export", action="store_true", help="ours to official: IN.pt OUT.ckpt OUT.yaml")
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
