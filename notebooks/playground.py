"""A page to play with a model's codes and transformer: one HTML file that needs no server and no network.

    python notebooks/playground.py                             CIFAR-10 -> playground.html
    python notebooks/playground.py --gpt notebooks/checkpoints/scenes.pt --out scenes.html

playground.js is the model's forward pass, playground.html the page; this script puts them and the weights together.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minvqgan import Sampling, TwoStage
from minvqgan.harness import checkpoint, pictures, runtime
from minvqgan.harness.runtime import UserError

HERE = Path(__file__).resolve().parent
CIFAR = HERE / "checkpoints" / "cifar_gpt.pt"  # small enough for a page of 8 MB, and for a change in 0.1 s


def open_model(path: Path) -> TwoStage:
    """Raises UserError for what the page cannot show."""
    model = checkpoint.load(path)
    if not isinstance(model, TwoStage):
        raise UserError(f"{path} holds a VQGAN alone; the page needs a checkpoint of train_gpt.py")
    c = model.vqgan.config
    if model.condition.kind not in ("none", "class"):
        raise UserError(f"{path} is conditioned on {model.condition.kind}; the page can only choose a class")
    if c.input_kind != "rgb" or c.gumbel:
        raise UserError(f"{path}: the page shows RGB images, and looks codes up by their distance")
    return model


def weights(model: TwoStage) -> dict[str, Tensor]:
    """All weights by name. Convolutions as (out, ky, kx, in), because the page keeps channels last."""
    state = {f"vqgan.{name}": t for name, t in model.vqgan.state_dict().items()}
    state |= {f"gpt.{name}": t for name, t in model.gpt.state_dict().items()}
    del state["vqgan.quantizer.recent_use"]
    return {name: t.permute(0, 2, 3, 1) if t.ndim == 4 else t for name, t in state.items()}


def float16_bytes(tensors: list[Tensor]) -> bytes:
    """All numbers in 16 bits: their high bytes first, then the low ones. The high bytes of weights are much alike, and
    gzip makes the file 15 % smaller; with both interleaved it finds less."""
    flat = torch.cat([tensor.float().flatten() for tensor in tensors]).half()
    if not flat.isfinite().all():
        raise UserError("this model has weights above 65504, too large for 16 bits")
    return flat.numpy().astype("<f2").view(np.uint8).reshape(-1, 2).T[::-1].tobytes()


def class_names(model: TwoStage) -> list[str]:
    if model.condition.kind != "class":
        return []
    return list(model.config.classes or map(str, range(model.condition.num_tokens)))


def sampled_maps(model: TwoStage, count: int) -> Tensor:
    """Maps of codes (count, n, n), class after class where there are any."""
    c = torch.arange(count) % model.condition.num_tokens if class_names(model) else model.default_condition(count)
    return model.sample_indices(c, sampling=Sampling(top_p=0.95, guidance=2.0 if model.config.guided else 1.0))


def code_patches(model: TwoStage, maps: Tensor) -> Tensor:
    """What each code draws, (K, f, f, 3) uint8: the mean of its patches in the images of `maps` (B, n, n). A code that
    none of them has is decoded among its like."""
    f, K = model.vqgan.config.f, model.vqgan.config.codebook_size
    alone = torch.arange(K).view(-1, 1, 1).expand(-1, 3, 3)
    rest = torch.cat([model.vqgan.decode_indices(some)[:, :, f : 2 * f, f : 2 * f] for some in alone.split(64)])
    images = torch.cat([model.vqgan.decode_indices(some) for some in maps.split(16)])
    patches = images.unfold(2, f, f).unfold(3, f, f).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (B * n * n, 3, f, f)
    count = torch.bincount(maps.flatten(), minlength=K).view(-1, 1, 1, 1)
    mean = torch.zeros_like(rest).index_add_(0, maps.flatten(), patches) / count.clamp_min(1)
    return pictures.to_pixels(torch.where(count > 0, mean, rest)).permute(0, 2, 3, 1)


def base85(data: bytes) -> str:
    """Four bytes in five characters from "(" to "|": 7 % shorter than base64. Without "!", no comment can begin in it,
    and the script element that holds it ends where it should."""
    numbers = np.frombuffer(data + bytes(-len(data) % 4), ">u4")
    digits = numbers[:, None] // 85 ** np.arange(4, -1, -1, dtype=np.int64) % 85
    return (digits + 40).astype(np.uint8).tobytes().decode("ascii")


def page(model: TwoStage, path: Path) -> str:
    """The whole HTML file."""
    tensors, names, maps = weights(model), class_names(model), sampled_maps(model, 128)
    patches = code_patches(model, maps).numpy().tobytes()
    packed = gzip.compress(float16_bytes(list(tensors.values())) + patches, 9, mtime=0)
    starts = zip(names or map(str, range(1, 9)), maps.flatten(1)[:12].tolist(), strict=False)
    about = {
        "name": path.name,
        "vqgan": vars(model.vqgan.config) | {"f": model.vqgan.config.f},
        "gpt": vars(model.gpt.config),
        "n": model.config.n,
        "order": model.order.tolist(),
        "classes": names,
        "offset": model.offset,
        "null": model.null,
        "tensors": [[name, list(t.shape)] for name, t in tensors.items()],
        "packed": len(packed),
        "starts": [{"name": name, "codes": codes} for name, codes in starts],  # what the page begins with
    }
    html = (HERE / "playground.html").read_text()
    parts = {"about": json.dumps(about).replace("<", "\\u003c"), "packed": base85(packed)}
    parts["model"] = (HERE / "playground.js").read_text()
    for name, text in parts.items():
        html = html.replace("{{" + name + "}}", text)
    return html


def write(gpt: Path, out: Path) -> None:
    html = page(open_model(gpt), gpt)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--gpt", type=Path, default=CIFAR, help="checkpoint of train_gpt.py (%(default)s)")
    p.add_argument("--out", type=Path, default=Path("playground.html"), help="the page (%(default)s)")
    args = p.parse_args(argv)
    write(args.gpt, args.out)
    print(f"open {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    runtime.run(main)
