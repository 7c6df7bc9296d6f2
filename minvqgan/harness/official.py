"""The published models of the paper's authors (CompVis/taming-transformers) in ours, and our first-stage models in
their layout.

    python -m minvqgan.harness.official last.ckpt project.yaml OUT.pt             theirs -> ours, once
    python -m minvqgan.harness.official --export OURS.pt last.ckpt project.yaml   ours -> theirs

Both sides hold the same tensors in the same order, so a mapping is a list of pairs (official prefix, our prefix), made
by walking a configuration the way the official constructors do. Every key is used, known to be unneeded, or reported: a
checkpoint that was loaded "almost" gives images that are almost right, and costs days.
"""

from collections.abc import Iterable
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conditioning import ClassCondition, Condition, CoordinateCondition, NoCondition, SpatialCondition
from ..gpt import GPT, GPTConfig
from ..quantizer import GumbelQuantizer
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


def _encoder_names(c: VQGANConfig) -> list[str | None]:
    """Official names of the modules in `Encoder.layers`, in order; None where a module has no parameters."""
    names, resolution = ["conv_in"], c.image_size
    for level in range(len(c.ch_mult)):
        for block in range(c.num_res_blocks):
            names.append(f"down.{level}.block.{block}")
            if resolution in c.attn_resolutions:
                names.append(f"down.{level}.attn.{block}")
        if level < len(c.ch_mult) - 1:
            names.append(f"down.{level}.downsample")
            resolution //= 2
    return names + ["mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", None, "conv_out"]


def _decoder_names(c: VQGANConfig) -> list[str | None]:
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


Pairs = list[tuple[str, str]]

# Inside a residual or attention block two layers carry other names.
VQGAN_INNER: Pairs = [("nin_shortcut", "skip"), ("proj_out", "proj")]


def _vqgan_pairs(c: VQGANConfig) -> Pairs:
    """(official prefix, our prefix) of every module of a VQGAN."""
    pairs = [(f"encoder.{n}", f"encoder.layers.{i}") for i, n in enumerate(_encoder_names(c)) if n]
    pairs += [(f"decoder.{n}", f"decoder.layers.{i}") for i, n in enumerate(_decoder_names(c))]
    pairs += [("decoder.conv_out", "decoder.conv_out"), ("quant_conv", "to_code"), ("post_quant_conv", "from_code")]
    if c.gumbel:
        return pairs + [("quantize.proj", "quantizer.proj"), ("quantize.embed", "quantizer.codebook")]
    return pairs + [("quantize.embedding", "quantizer.codebook")]


def _gpt_pairs(n_layer: int) -> Pairs:
    """(official prefix, our prefix) of a GPT; query, key and value are dealt with where they are."""
    pairs = [("pos_emb", "position_embedding"), ("tok_emb", "token_embedding"), ("ln_f", "norm"), ("head", "head")]
    for layer in range(n_layer):
        inner = (("ln1", "norm1"), ("ln2", "norm2"), ("mlp", "mlp"), ("attn.proj", "attention.proj"))
        pairs += [(f"blocks.{layer}.{old}", f"blocks.{layer}.{new}") for old, new in inner]
    return pairs


def _rename(key: str, pairs: Iterable[tuple[str, str]], inner: Pairs) -> str | None:
    for old, new in pairs:
        if key == old or key.startswith(old + "."):
            rest = key[len(old) :]
            for a, b in inner:
                rest = rest.replace(f".{a}.", f".{b}.")
            return new + rest
    return None


def _backwards(pairs: Pairs) -> Pairs:
    return [(new, old) for old, new in pairs]


def _fill(module: nn.Module, state: dict[str, Tensor], pairs: Pairs, inner: Pairs = VQGAN_INNER) -> None:
    """The official tensors become the module's own, without a copy where they are float32 already. Raises ValueError,
    naming the first key that has no counterpart on either side or another shape."""
    new = {}
    for key, tensor in state.items():
        ours = _rename(key, pairs, inner)
        if ours is None:
            raise ValueError(f"official key without a place here: {key}")
        new[ours] = tensor.float() if tensor.is_floating_point() else tensor
    for key, own in module.state_dict().items():
        if key.endswith("recent_use"):  # the quantizer's count of recent use, which only training needs
            new[key] = torch.zeros(own.shape)
        if key not in new:
            raise ValueError(f"the official file lacks {_rename(key, _backwards(pairs), _backwards(inner)) or key}")
    checkpoint.fit(module, new, assign=True)


def load_vqgan(state: dict[str, Tensor], config: VQGANConfig) -> VQGAN:
    """A VQGAN from an official VQModel's, VQSegmentationModel's or GumbelVQ's `state_dict`. Raises ValueError naming
    the first key that does not fit."""
    with torch.device("meta"):  # shapes without memory or initialisation: the file's own tensors take their places
        model = VQGAN(config)
    _fill(model, {k: t for k, t in state.items() if not k.startswith(UNNEEDED)}, _vqgan_pairs(config))
    return model.eval()


def load_gumbel(state: dict[str, Tensor]) -> GumbelQuantizer:
    """A quantizer from the official GumbelQuantize's `state_dict` (keys proj.*, embed.weight)."""
    K, in_channels = state["proj.weight"].shape[:2]
    quantizer = GumbelQuantizer(K, state["embed.weight"].shape[1], in_channels)
    _fill(quantizer, state, [("proj", "proj"), ("embed", "codebook")], inner=[])
    return quantizer.eval()


def load_discriminator(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Fill a `PatchDiscriminator` with the official NLayerDiscriminator's `state_dict` (keys main.*)."""
    _fill(module, state, [("main", "layers")], inner=[])
    return module


def gpt_config(config: dict) -> GPTConfig:
    """From a yaml's params of the transformer. Raises ValueError or TypeError for what no GPT can be."""
    if config.get("n_unmasked"):
        raise ValueError("n_unmasked > 0: a transformer whose condition is read without a causal mask is not supported")
    sizes = {name: config[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    return GPTConfig(num_codes=config["vocab_size"], num_cond=0, dropout=0.0, **sizes)


def load_gpt(state: dict[str, Tensor], config: dict) -> GPT:
    """A GPT from the official GPT's `state_dict`. config: vocab_size, block_size, n_layer, n_head, n_embd.

    Codes and condition use one range there, so every token is a code here and none is the condition's alone. The
    three layers query, key and value are one here; the saved causal masks (attn.mask) are not needed.
    """
    sizes = gpt_config(config)
    with torch.device("meta"):
        gpt = GPT(sizes)
    rest = {key: t for key, t in state.items() if not key.endswith("attn.mask")}
    if "pos_emb" in rest and rest["pos_emb"].ndim == 3:
        rest["pos_emb"] = rest["pos_emb"][0]  # (1, block_size, C) there
    pairs = _gpt_pairs(sizes.n_layer)
    for layer in range(sizes.n_layer):
        pairs.append((f"blocks.{layer}.qkv", f"blocks.{layer}.attention.qkv"))
        for part in ("weight", "bias"):
            names = [f"blocks.{layer}.attn.{which}.{part}" for which in ("query", "key", "value")]
            if len({rest[name].shape if name in rest else None for name in names}) == 1 and names[0] in rest:
                rest[f"blocks.{layer}.qkv.{part}"] = torch.cat([rest.pop(name) for name in names])
    _fill(gpt, rest, pairs, inner=[])
    return gpt.eval()


def _condition(params: dict, first_stage: VQGANConfig, state: dict[str, Tensor]) -> Condition:
    """The condition of an official Net2NetTransformer; state: that of its cond_stage_model."""
    node = params.get("cond_stage_config")
    if params.get("unconditional") or node == "__is_unconditional__":
        if params.get("sos_token", 0) != 0:
            raise ValueError(f"sos_token is {params['sos_token']}; 0 is supported, which all published models have")
        return NoCondition()
    if params.get("downsample_cond_size", -1) != -1:
        raise ValueError("downsample_cond_size: conditions of another size than the image are not supported")
    if node == "__is_first_stage__":
        return SpatialCondition(load_vqgan(state, first_stage))
    if class_name(node) == "Labelator":
        return ClassCondition(node["params"]["n_classes"])
    if class_name(node) == "CoordStage":
        f, levels = node["params"]["down_factor"], node["params"]["n_embed"]
        if f != first_stage.f:
            raise ValueError(f"down_factor is {f}, the first-stage model's is {first_stage.f}")
        return CoordinateCondition(f, levels)
    return SpatialCondition(load_vqgan(state, first_stage_config(node, params.get("cond_stage_key", "depth"))))


def load_two_stage(state: dict[str, Tensor], params: dict) -> TwoStage:
    """A whole model from the official Net2NetTransformer's `state_dict` and its yaml's `params`. Raises ValueError
    naming the first key that does not fit."""
    parts: dict[str, dict[str, Tensor]] = {
        "first_stage_model": {},
        "cond_stage_model": {},
        "transformer": {},
        "permuter": {},
    }
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ValueError(f"official key without a place here: {key}")
        parts[part][rest] = tensor
    first_stage = first_stage_config(params["first_stage_config"], params.get("first_stage_key", "image"))
    transformer = params["transformer_config"]["params"]
    block_size = gpt_config(transformer).block_size
    condition = _condition(params, first_stage, parts["cond_stage_model"])
    if parts["cond_stage_model"] and condition.kind != "spatial":
        raise ValueError(f"official key without a place here: cond_stage_model.{next(iter(parts['cond_stage_model']))}")
    vqgan = load_vqgan(parts["first_stage_model"], first_stage)
    # The grid is square: block_size holds T codes and as many condition tokens, or T codes and at most one.
    n = isqrt(block_size // 2 if condition.is_map else block_size)
    permuter = class_name(params.get("permuter_config") or {"target": "Identity"})
    if permuter not in ORDER_NAMES:
        raise ValueError(f"the permuter {permuter} is not one of {', '.join(ORDER_NAMES)}")
    classes = tuple(map(str, range(condition.num_tokens))) if condition.kind == "class" else ()
    config = TwoStageConfig(n=n, order=ORDER_NAMES[permuter], shared_range=True, classes=classes)
    model = TwoStage(vqgan, condition, load_gpt(parts["transformer"], transformer), config).eval()
    _check_order(model.order, parts["permuter"])
    return model


def _check_order(order: Tensor, saved: dict[str, Tensor]) -> None:
    """An official permuter saves its permutation and the way back; both must be the one that its name stands for."""
    known = {"forward_shuffle_idx": order, "backward_shuffle_idx": order.argsort()}
    for key, tensor in saved.items():
        if key not in known:
            raise ValueError(f"official key without a place here: permuter.{key}")
        if not torch.equal(tensor.long(), known[key]):
            raise ValueError(f"permuter.{key} is another order than the configuration's")


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
    state = checkpoint.read_foreign(path)
    with checkpoint.door(f"{path} with {config}"):
        if class_name(model) == "Net2NetTransformer":
            return load_two_stage(state, model["params"])
        return load_vqgan(state, first_stage_config(model))


def export_vqgan(model: VQGAN) -> tuple[dict[str, Tensor], dict]:
    """(`state_dict` with the official keys, {target, params} for the yaml). Raises ValueError for what the official
    code cannot build: other than 32 norm groups, or normalised codes."""
    c = model.config
    if c.norm_groups != 32 or c.l2_norm:
        raise ValueError("the official code has 32 norm groups and no l2-normalised codes")
    pairs = _backwards(_vqgan_pairs(c))
    state = {
        _rename(key, pairs, _backwards(VQGAN_INNER)): tensor
        for key, tensor in model.state_dict().items()
        if not key.endswith("recent_use")
    }
    dd = {
        "double_z": False,
        "z_channels": c.z_channels,
        "resolution": c.image_size,
        "in_channels": c.in_channels,
        "out_ch": c.in_channels,
        "ch": c.ch,
        "ch_mult": list(c.ch_mult),
        "num_res_blocks": c.num_res_blocks,
        "attn_resolutions": list(c.attn_resolutions),
        "dropout": c.dropout,
    }
    params = {"embed_dim": c.code_dim, "n_embed": c.codebook_size, "ddconfig": dd}
    params["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
    name = "GumbelVQ" if c.gumbel else "VQModel"
    if c.gumbel:
        params["temperature_scheduler_config"] = {"target": "taming.lr_scheduler.LambdaLinearScheduler"}
    if c.input_kind == "labels":
        name, params["n_labels"], params["image_key"] = "VQSegmentationModel", c.in_channels, "segmentation"
    elif c.input_kind == "depth":
        params["image_key"] = "depth"
    return state, {"target": f"taming.models.vqgan.{name}", "params": params}


def export(model: VQGAN | TwoStage, path: str | Path, config: str | Path) -> None:
    """Write a first-stage model as the official code would: {"state_dict"} and its yaml. Raises UserError for what has
    no place there, as a transformer: its condition tokens are numbered behind the codes, there both use one range."""
    import yaml

    if not isinstance(model, VQGAN):
        raise UserError("only first-stage models can be exported: the official code numbers condition tokens otherwise")
    try:
        state, described = export_vqgan(model)
    except ValueError as error:
        raise UserError(f"this model cannot be exported: {error}") from None
    torch.save({"state_dict": state}, path)
    Path(config).write_text(yaml.safe_dump({"model": described}, sort_keys=False))


def open_model(path: str | Path, config: str | Path | None) -> VQGAN | TwoStage:
    """The model of a checkpoint of ours, or of an official one if `config` names its yaml. Raises UserError."""
    return load(path, config) if config else checkpoint.load(path)


def main() -> int:
    p = flags.Parser(prog="python -m minvqgan.harness.official", description="Convert official checkpoints.")
    p.add_argument("--export", action="store_true", help="the other way: OURS.pt OUT.ckpt OUT.yaml")
    p.add_argument("files", nargs=3, metavar="FILE", help="IN.ckpt IN.yaml OUT.pt")
    args = p.parse_args()
    first, second, third = args.files
    out = second if args.export else third
    for target_file in (second, third) if args.export else (third,):
        if Path(target_file).exists():
            raise UserError(f"{target_file} exists already")
    if args.export:
        export(checkpoint.load(first), second, third)
    else:
        checkpoint.save_model(third, load(first, second))
    print(f"{first} -> {out}")
    return 0


if __name__ == "__main__":
    runtime.run(main)
