"""What people look at: grids of images, maps of codes, curves of losses."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..vqgan import VQGAN
from . import runtime


def to_pixels(x: Tensor) -> Tensor:
    """Model range [-1, 1] (..., C, H, W) -> uint8 [0, 255], clipped. The one place where the range changes."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_rgb(x: Tensor, kind: str) -> Tensor:
    """Images or reconstructions of an input kind, (B, C, H, W) -> (B, 3, H, W) in [-1, 1] to look at."""
    if kind == "labels":  # label i: hues in steps of the golden ratio, three lightnesses
        i = torch.arange(x.shape[1], device=x.device)
        hues = [((i * 0.618034 % 1 * 6 + shift) % 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 4, 2)]
        light = x.new_tensor([1.0, 0.75, 0.55], dtype=torch.float32)[i % 3, None]
        colours = (0.15 + 0.85 * torch.stack(hues, 1)) * light * 2 - 1  # (L, 3)
        return colours[x.argmax(1)].permute(0, 3, 1, 2)
    return x.float().clamp(-1, 1).expand(-1, 3 if x.shape[1] == 1 else -1, -1, -1)


def code_map(model: VQGAN, indices: Tensor, scale: int) -> Tensor:
    """A picture of the code map, (B, h, w) -> (B, 3, h * scale, w * scale) in [-1, 1].

    A code's colour is its place along the codebook's three principal axes, each ranked: similar codes look alike, and
    all colours are used.
    """
    codes = model.quantizer.codebook.weight.detach().float().cpu()  # (K, D)
    centred = codes - codes.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # (3, D), or fewer for tiny codes
    ranks = (centred @ axes.T).argsort(0).argsort(0).float()  # (K, 3)
    colours = F.pad(ranks / max(1, len(codes) - 1) * 1.8 - 0.9, (0, 3 - ranks.shape[1]))
    picture = colours[indices.cpu()].permute(0, 3, 1, 2)  # (B, 3, h, w)
    return F.interpolate(picture, scale_factor=scale, mode="nearest")


def to_image(x: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1], pixel for pixel."""
    return Image.fromarray(to_pixels(x).permute(1, 2, 0).cpu().numpy())


def grid(rows: list[Tensor]) -> Image.Image:
    """Rows of images, each (n, 3, H, W) in [-1, 1], as one image with white gaps; small ones are enlarged."""
    rows = [F.interpolate(row.float().cpu(), scale_factor=max(1, 64 // row.shape[-1])) for row in rows if len(row)]
    if sum(map(len, rows)) == 1:
        return to_image(rows[0][0])
    H, W = rows[0].shape[2:]
    sheet = torch.ones(3, 2 + len(rows) * (H + 2), 2 + max(map(len, rows)) * (W + 2))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet[:, i * (H + 2) + 2 :, j * (W + 2) + 2 :][:, :H, :W] = image
    return to_image(sheet)


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with runtime.written_whole(path) as file:
        image.save(file, "PNG")


def save_grid(path: Path, rows: list[Tensor]) -> None:
    save(grid(rows), path)


def plot_columns(path: Path, rows: list[dict], panels: list[list[str]]) -> None:
    """Curves of the rows of metrics.csv over the steps, a panel for each list of columns."""
    from matplotlib.figure import Figure  # not pyplot, which has a backend for the whole process

    panels = [[c for c in columns if any(c in row for row in rows)] for columns in panels]
    panels = [columns for columns in panels if columns]
    figure = Figure(figsize=(4.2 * len(panels), 3.2))
    for i, columns in enumerate(panels):
        ax = figure.add_subplot(1, len(panels), i + 1, xlabel="step")
        for column in columns:
            points = [(row["step"], row[column]) for row in rows if column in row]
            ax.plot(*zip(*points, strict=True), label=column, linewidth=1, marker="." if len(points) < 40 else None)
        ax.legend(fontsize=7)
    figure.tight_layout()
    with runtime.written_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)
