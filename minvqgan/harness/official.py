"""The names of the official implementation (CompVis/taming-transformers) and ours, one beside the other.

Both sides hold the same tensors in the same order, so a mapping is a list of pairs (official prefix, our prefix),
made by walking a configuration the way the official constructors do. Every key is used or reported: a checkpoint that
was loaded "almost" gives pictures that are almost right, and costs days.
"""

from collections.abc import Iterable
from math import isqrt

import torch
from torch import Tensor, nn

from ..conditioning import ClassCondition, CoordinateCondition, NoCondition, SpatialCondition
from ..gpt import GPT, GPTConfig
from ..quantizer import GumbelQuantizer
from ..two_stage import TwoStage, TwoStageConfig
from ..vqgan import VQGAN, VQGANConfig

# Parts of a training checkpoint that the model itself does not have: the discriminator and LPIPS live in "loss.".
UNNEEDED = ("loss.",)


def vqgan_config(
    ddconfig: dict, n_embed: int, embed_dim: int, beta: float = 0.25, legacy: bool = True, **ours
) -> VQGANConfig:
    """Our configuration from the official `ddconfig`, `n_embed` and `embed_dim`.

    legacy: the published models were trained with beta on the codebook term. Further fields of VQGANConfig
    (`input_kind`, `gumbel`) pass through. Raises ValueError for what no published VQGAN uses: double_z, or other
    channels out than in.
    """
    dd = dict(ddconfig)
    if dd.pop("double_z", False):
        raise ValueError("double_z = True is a KL autoencoder, not a VQGAN")
    if dd.pop("out_ch", dd["in_channels"]) != dd["in_channels"]:
        raise ValueError("out_ch differs from in_channels; a VQGAN reconstructs what it reads")
    return VQGANConfig(
        image_size=dd.pop("resolution"),
        ch_mult=tuple(dd.pop("ch_mult")),
        attn_resolutions=tuple(dd.pop("attn_resolutions")),
        norm_groups=32,
        codebook_size=n_embed,
        code_dim=embed_dim,
        beta=beta,
        legacy=legacy,
        **dd,
        **ours,
    )


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


def _pairs(c: VQGANConfig) -> list[tuple[str, str]]:
    """(official prefix, our prefix) of every module of a VQGAN."""
    pairs = [(f"encoder.{n}", f"encoder.layers.{i}") for i, n in enumerate(_encoder_names(c)) if n]
    pairs += [(f"decoder.{n}", f"decoder.layers.{i}") for i, n in enumerate(_decoder_names(c))]
    pairs += [("decoder.conv_out", "decoder.conv_out"), ("quant_conv", "to_code"), ("post_quant_conv", "from_code")]
    if c.gumbel:
        return pairs + [("quantize.proj", "quantizer.proj"), ("quantize.embed", "quantizer.codebook")]
    return pairs + [("quantize.embedding", "quantizer.codebook")]


# Inside a residual or attention block two layers carry other names.
INNER = (("nin_shortcut", "skip"), ("proj_out", "proj"))


def _rename(key: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if key.startswith(old + "."):
            rest = key[len(old) :]
            for a, b in INNER:
                rest = rest.replace(f".{a}.", f".{b}.")
            return new + rest
    return None


def _load_strictly(module: nn.Module, state: dict[str, Tensor], renamed: dict[str, str | None]) -> None:
    unknown = [key for key, ours in renamed.items() if ours is None]
    if unknown:
        raise ValueError(f"official key without a place here: {unknown[0]} ({len(unknown)} in all)")
    new = {ours: state[key].float() if state[key].is_floating_point() else state[key] for key, ours in renamed.items()}
    missing = [key for key in module.state_dict() if key not in new and not key.endswith("recent_use")]
    if missing:
        raise ValueError(f"the official file lacks {missing[0]} ({len(missing)} in all)")
    module.load_state_dict(module.state_dict() | new)


def load_vqgan(state: dict[str, Tensor], config: VQGANConfig) -> VQGAN:
    """A VQGAN from an official VQModel's or GumbelVQ's `state_dict`. Raises ValueError naming the first key that has
    no counterpart on either side, RuntimeError for a tensor of another shape."""
    model = VQGAN(config)
    pairs = _pairs(config)
    _load_strictly(model, state, {k: _rename(k, pairs) for k in state if not k.startswith(UNNEEDED)})
    return model.eval()


def load_gumbel(state: dict[str, Tensor]) -> GumbelQuantizer:
    """A quantizer from the official GumbelQuantize's `state_dict` (keys proj.*, embed.weight)."""
    K, in_channels = state["proj.weight"].shape[:2]
    quantizer = GumbelQuantizer(K, state["embed.weight"].shape[1], in_channels)
    _load_strictly(quantizer, state, {k: _rename(k, (("proj", "proj"), ("embed", "codebook"))) for k in state})
    return quantizer.eval()


def load_discriminator(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Fill a `PatchDiscriminator` with the official NLayerDiscriminator's `state_dict` (keys main.*)."""
    _load_strictly(module, state, {k: _rename(k, (("main", "layers"),)) for k in state})
    return module


# Inside a transformer block.
GPT_INNER = (
    ("ln1", "norm1"),
    ("ln2", "norm2"),
    ("attn.proj", "attention.proj"),
    ("mlp.0", "mlp.0"),
    ("mlp.2", "mlp.2"),
)


def load_gpt(state: dict[str, Tensor], config: dict) -> GPT:
    """A GPT from the official GPT's `state_dict`. config: vocab_size, block_size, n_layer, n_head, n_embd.

    Codes and condition share one range there, so every token is a code here and none is the condition's alone. The
    three layers query, key and value are one here; the saved causal masks (attn.mask) are not needed.
    """
    sizes = {name: config[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    gpt = GPT(GPTConfig(num_codes=config["vocab_size"], num_cond=0, **sizes))
    rest = {key: t for key, t in state.items() if not key.endswith("attn.mask")}
    if "pos_emb" in rest:
        rest["pos_emb"] = rest["pos_emb"].squeeze(0)
    pairs = [("tok_emb", "token_embedding"), ("ln_f", "norm"), ("head", "head")]
    for layer in range(config["n_layer"]):
        pairs += [(f"blocks.{layer}.{old}", f"blocks.{layer}.{new}") for old, new in GPT_INNER]
        pairs.append((f"blocks.{layer}.qkv", f"blocks.{layer}.attention.qkv"))
        for part in ("weight", "bias"):
            names = [f"blocks.{layer}.attn.{which}.{part}" for which in ("query", "key", "value")]
            if all(name in rest for name in names):
                rest[f"blocks.{layer}.qkv.{part}"] = torch.cat([rest.pop(name) for name in names])
    renamed = {k: "position_embedding" if k == "pos_emb" else _rename(k, pairs) for k in rest}
    _load_strictly(gpt, rest, renamed)
    return gpt.eval()


def load_two_stage(
    state: dict[str, Tensor], transformer: dict, first_stage: VQGANConfig, condition: str, order: str = "row", **more
) -> TwoStage:
    """A whole model from the official Net2NetTransformer's `state_dict`.

    transformer: the GPT's parameters. condition: "none", "class" (more: num_classes), "coords" (levels), or "spatial"
    (cond_stage, the VQGANConfig of the second first stage). Raises ValueError naming the first key that does not fit.
    """
    parts: dict[str, dict[str, Tensor]] = {"first_stage_model": {}, "cond_stage_model": {}, "transformer": {}}
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ValueError(f"official key without a place here: {key}")
        parts[part][rest] = tensor
    if parts["cond_stage_model"] and condition != "spatial":
        raise ValueError(f"official key without a place here: cond_stage_model.{next(iter(parts['cond_stage_model']))}")
    if condition == "none":
        c = NoCondition()
    elif condition == "class":
        c = ClassCondition(more["num_classes"])
    elif condition == "coords":
        c = CoordinateCondition(first_stage.f, more["levels"])
    else:
        c = SpatialCondition(load_vqgan(parts["cond_stage_model"], more["cond_stage"]))
    # The grid is square: block_size holds T codes and as many condition tokens, or T codes and at most one.
    n = isqrt(transformer["block_size"] // 2 if c.is_map else transformer["block_size"])
    vqgan, gpt = load_vqgan(parts["first_stage_model"], first_stage), load_gpt(parts["transformer"], transformer)
    return TwoStage(vqgan, c, gpt, TwoStageConfig(n=n, order=order, shared_range=True)).eval()
