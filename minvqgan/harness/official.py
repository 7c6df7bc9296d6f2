"""Reads the official models (CompVis/taming-transformers).

    python -m minvqgan.harness.official last.ckpt project.yaml OUT.pt

They hold the same tensors as ours under different names. The table of names is made by walking a configuration as the
official constructors do. Every key of a file is used, known to be unneeded, or reported: a checkpoint loaded only in
part gives images that are almost right, and the reason takes days to find.
"""

from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from ..conditioning import ClassCondition, Condition, CoordinateCondition, NoCondition, SpatialCondition
from ..gpt import GPT, GPTConfig
from ..two_stage import TwoStage, TwoStageConfig
from ..vqgan import VQGAN, VQGANConfig
from . import checkpoint, flags, runtime
from .runtime import UserError

# In a first stage's file beside the model: the discriminator, LPIPS, and random colours for showing label maps.
UNNEEDED = ("loss.", "colorize")

# Official classes of orders, and ours.
ORDER_NAMES = {
    "Identity": "row",
    "Subsample": "subsample",
    "ZCurve": "z-curve",
    "SpiralOut": "spiral-out",
    "SpiralIn": "spiral-in",
    "AlternateParsing": "alternate",
}


def read(path: str | Path) -> dict[str, Tensor]:
    """The `state_dict` of an official checkpoint. Raises UserError."""
    content = checkpoint.unpickled(path, official=True)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} has no state_dict of tensors")
    return dict(state)


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a part of the model, such as "transformer", by their names within it."""
    return {key.removeprefix(name + "."): t for key, t in state.items() if key.startswith(name + ".")}


def class_name(node: dict) -> str:
    """Of a yaml's {target, params}: `taming.models.vqgan.VQModel` -> `VQModel`."""
    return str(node["target"]).rsplit(".", 1)[-1]


def vqgan_config(
    ddconfig: dict, n_embed: int, embed_dim: int, beta: float = 0.25, legacy: bool = True, **ours
) -> VQGANConfig:
    """Our configuration from the official `ddconfig`, `n_embed` and `embed_dim`.

    legacy: the published models were trained with beta on the codebook term. ours: further fields of VQGANConfig.
    """
    dd = {k: tuple(v) if isinstance(v, list) else v for k, v in ddconfig.items() if k not in ("double_z", "out_ch")}
    dd |= {"image_size": dd.pop("resolution"), "norm_groups": 32, "codebook_size": n_embed, "code_dim": embed_dim}
    return VQGANConfig(**dd, beta=beta, legacy=legacy, **ours)


def first_stage_config(node: dict, key: str = "image") -> VQGANConfig:
    """From a yaml's {target, params} of a first stage. key: what the model reads (`image`, `depth`, `segmentation`),
    unless params have an image_key."""
    name, params = class_name(node), node["params"]
    kind = {"segmentation": "labels", "depth": "depth"}.get(params.get("image_key", key), "rgb")
    if name == "VQSegmentationModel":
        kind = "labels"
    elif kind == "rgb" and params["ddconfig"]["in_channels"] == 1:
        kind = "gray"
    sizes = (params["ddconfig"], params["n_embed"], params["embed_dim"])
    return vqgan_config(*sizes, input_kind=kind, gumbel=name == "GumbelVQ")


def layers(c: VQGANConfig) -> tuple[list[str], list[str]]:
    """Official names of the modules in `Encoder.layers` and in `Decoder.layers`, in order."""

    def level(way: str, i: int, blocks: int) -> list[str]:
        kinds = ("block", "attn") if c.image_size // 2**i in c.attn_resolutions else ("block",)
        return [f"{way}.{i}.{kind}.{j}" for j in range(blocks) for kind in kinds] + [f"{way}.{i}.{way}sample"]

    levels, middle = range(len(c.ch_mult)), ["mid.block_1", "mid.attn_1", "mid.block_2"]
    # [:-1]: the last level keeps its resolution.
    down = [name for i in levels for name in level("down", i, c.num_res_blocks)][:-1]
    up = [name for i in reversed(levels) for name in level("up", i, c.num_res_blocks + 1)][:-1]
    return ["conv_in", *down, *middle, "norm_out", "SiLU", "conv_out"], ["conv_in", *middle, *up, "norm_out"]


def names(module: nn.Module) -> dict[str, str]:
    """Our key -> the official key, for each tensor of a VQGAN, GPT (see `joined`) or discriminator that both have."""
    if isinstance(module, GPT):
        words = {"position_embedding": "pos_emb", "token_embedding": "tok_emb", "attention": "attn"}
        words |= {"norm1": "ln1", "norm2": "ln2", "norm": "ln_f"}
        return {key: ".".join(words.get(word, word) for word in key.split(".")) for key in module.state_dict()}
    if not isinstance(module, VQGAN):
        return {key: key.replace("layers.", "main.", 1) for key in module.state_dict()}
    places = {"decoder.conv_out": "decoder.conv_out", "to_code": "quant_conv", "from_code": "post_quant_conv"}
    places |= {"quantizer.codebook": "quantize.embed" if module.config.gumbel else "quantize.embedding"}
    places |= {"quantizer.proj": "quantize.proj"}
    for way, modules in zip(("encoder", "decoder"), layers(module.config), strict=True):
        places |= {f"{way}.layers.{i}": f"{way}.{name}" for i, name in enumerate(modules)}
    state = module.state_dict()
    return {
        key: theirs + key.removeprefix(ours).replace(".skip.", ".nin_shortcut.").replace(".proj.", ".proj_out.")
        for ours, theirs in places.items()
        for key in state
        if key.startswith(ours + ".")
    }


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
    """For --init: the tensors of a checkpoint, ours or official, of each of "vqgan", "gpt" and "discriminator" that it
    has. Those of a VQGAN have official names, which say their place in the network. Raises UserError."""
    content = checkpoint.unpickled(path, official=True)
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        model = checkpoint.load(path)
        vqgan = getattr(model, "vqgan", model)
        places = names(vqgan)
        found = {"vqgan": {places.get(key, key): t for key, t in vqgan.state_dict().items()}}
        return found | {name: content.get(name, {}) for name in ("gpt", "discriminator")}
    state = read(path)
    found = {"vqgan": first_stage(part(state, "first_stage_model") or state), "gpt": joined(part(state, "transformer"))}
    return found | {"discriminator": part(state, "loss.discriminator")}


def fill(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A VQGAN, GPT or discriminator with the official tensors, in eval mode. Raises RuntimeError that names what does
    not fit."""
    ours = {theirs: key for key, theirs in names(module).items()}
    return checkpoint.fill(module, {ours.get(key, key): tensor for key, tensor in state.items()})


def load_vqgan(state: dict[str, Tensor], config: VQGANConfig) -> VQGAN:
    """A VQGAN from an official first stage's `state_dict`. Raises RuntimeError that names what does not fit."""
    return fill(checkpoint.empty(VQGAN, config), first_stage(state))


def load_gpt(state: dict[str, Tensor], config: dict) -> GPT:
    """A GPT from the official GPT's `state_dict` and its yaml's params.

    There, codes and condition tokens share one range of numbers. Here, all of them count as codes.
    """
    if config.get("n_unmasked"):
        raise ValueError("n_unmasked > 0 (no causal mask on the condition) is not supported")
    sizes = {name: config[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    gpt = checkpoint.empty(GPT, GPTConfig(num_codes=config["vocab_size"], num_cond=0, dropout=0.0, **sizes))
    return fill(gpt, joined(state))


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
    """Both stages from an official Net2NetTransformer's `state_dict` and its yaml's params. Raises ValueError or
    RuntimeError that names what does not fit."""
    config = first_stage_config(params["first_stage_config"], params.get("first_stage_key", "image"))
    vqgan = load_vqgan(part(state, "first_stage_model"), config)
    gpt = load_gpt(part(state, "transformer"), params["transformer_config"]["params"])
    condition = _condition(params, config, part(state, "cond_stage_model"))
    used = ("first_stage_model", "transformer", "permuter") + ("cond_stage_model",) * (condition.kind == "spatial")
    for key in state:
        if key.split(".")[0] not in used:
            raise ValueError(f"official key without a place here: {key}")
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
    for key, tensor in part(state, "permuter").items():
        if key not in orders or not torch.equal(tensor.long(), orders[key]):
            raise ValueError(f"permuter.{key} is not the order of {permuter}")
    return model


def read_config(path: str | Path) -> dict:
    """The `model` part of an official yaml: {target, params}. Raises UserError."""
    import yaml

    with checkpoint.door(path):
        try:
            return yaml.safe_load(Path(path).read_bytes())["model"]
        except yaml.YAMLError as error:
            raise ValueError(f"not a yaml: {error}") from None


def load(path: str | Path, config: str | Path | None = None) -> VQGAN | TwoStage:
    """The model of an official checkpoint and its yaml, or of one of ours (without config), in eval mode, on the CPU.
    Raises UserError."""
    if config is None:
        return checkpoint.load(path)
    model, state = read_config(config), read(path)
    with checkpoint.door(f"{path} with {config}"):
        if class_name(model) == "Net2NetTransformer":
            return load_two_stage(state, model["params"])
        return load_vqgan(state, first_stage_config(model))


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(prog="python -m minvqgan.harness.official", description=__doc__)
    p.add_argument("checkpoint", help="an official checkpoint, such as last.ckpt")
    p.add_argument("config", help="its yaml")
    p.add_argument("out", help="file to write")
    args = p.parse_args(argv)
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists already")
    checkpoint.save_model(args.out, load(args.checkpoint, args.config))
    print(f"{args.checkpoint} -> {args.out}")
    return 0


if __name__ == "__main__":
    runtime.run(main)
