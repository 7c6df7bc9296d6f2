"""One's own images as codes, and back.

python evaluate.py --vqgan V.pt --reconstruct photos --out rebuilt
python evaluate.py --vqgan V.pt --decode rebuilt/photo.jpg.npy --out rebuilt
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..vqgan import VQGAN
from . import checkpoint, data, imagefiles, metrics, pictures, runtime
from .runtime import UserError


@torch.no_grad()
def reconstruct(model: VQGAN, source: Path, out: Path) -> None:
    """For each image a PNG of original | reconstruction | code map, its codes (h, w), and a line of numbers.

    source: an image or a folder. Sides are padded to multiples of f by repeating the border, and cut back. Raises
    UserError.
    """
    root, paths, c = source.parent, [source], model.config
    if source.is_dir():
        root, paths = source, sorted(p for p in source.rglob("*") if p.suffix.lower() in imagefiles.EXTENSIONS)
        if not paths:
            raise UserError(f"no images in {source}")
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--out {out} is in the folder of the images; choose another one")
    for path in paths:
        try:
            x = data.open_image(path, c.input_kind, c.in_channels)  # (1, C, H, W)
        except UserError as error:
            if len(paths) == 1:
                raise
            print(f"skipped: {error}")
            continue
        H, W = x.shape[2:]
        padded = F.pad(x, (0, -W % c.f, 0, -H % c.f), mode="replicate")
        indices = model.encode_indices(padded.to(model.quantizer.codebook.weight.device))  # (1, h, w)
        x_hat = model.decode_indices(indices)[:, :, :H, :W].cpu()
        code_map = pictures.code_map(model, indices, c.f)[:, :, :H, :W]
        shown = torch.cat([pictures.to_rgb(x, c.input_kind), pictures.to_rgb(x_hat, c.input_kind), code_map], 3)
        name = "_".join(path.relative_to(root).parts)  # with its suffix: a.jpg and a.png are two images
        out.mkdir(parents=True, exist_ok=True)
        pictures.save(pictures.to_image(shown[0]), out / f"{name}.png")
        np.save(out / f"{name}.npy", indices[0].cpu().numpy().astype("u2" if c.codebook_size <= 2**16 else "i8"))
        is_labels = c.input_kind == "labels"
        numbers = metrics.label_metrics(x, x_hat) if is_labels else metrics.image_metrics(x, x_hat, None)
        quality = ", ".join(f"{key} {value.item():.4g}" for key, value in numbers.items())
        bits = indices.numel() * math.ceil(math.log2(c.codebook_size))
        pixel_bits = 8 * H * W * (1 if is_labels else c.in_channels)
        line = f"{path}: {H} x {W}, {quality}, {bits:,} bits of codes for {pixel_bits:,} of pixels"
        print(runtime.printable(line))  # a file's name may hold control characters
    print(f"written: {out}")


@torch.no_grad()
def decode(model: VQGAN, source: Path, out: Path) -> None:
    """The image of codes (h, w) that `reconstruct` has written. Raises UserError."""
    with checkpoint.door(f"--decode {source}"):
        codes = torch.from_numpy(np.load(source, allow_pickle=False).astype(np.int64, casting="safe"))
        image = model.decode_indices(codes[None].to(model.quantizer.codebook.weight.device)).cpu()
    path = out / f"{source.stem}.decoded.png"
    out.mkdir(parents=True, exist_ok=True)
    pictures.save(pictures.to_image(pictures.to_rgb(image, model.config.input_kind)[0]), path)
    print(f"{image.shape[2]} x {image.shape[3]}: {path}")
