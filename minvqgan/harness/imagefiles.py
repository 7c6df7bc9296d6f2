"""Reading one image file. Every odd mode ends as 8-bit RGB, as one channel in [-1, 1], or as an array of labels."""

import contextlib
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from .runtime import UserError

EXTENSIONS = set(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif .jp2 .j2k .jpx".split())
# What Pillow may take a file for, whatever its name says: among its other readers is one that starts Ghostscript. The
# last two are not in every build of Pillow.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
# Pillow refuses a PNG with more than 1 MB of text or colour profile; here one block may take what all may together.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def open_image(path: str | Path) -> Image.Image:
    """Its header alone is read. A file that is locked for a moment is tried again."""
    try:
        return Image.open(path, formats=FORMATS)  # an animation opens at its first frame
    except OSError as error:
        if error.errno is None:  # of Pillow, about the content
            raise
    time.sleep(0.2)
    return Image.open(path, formats=FORMATS)


def read(path: str | Path, source: str, resize: int | None = None, num_labels: int | None = None) -> np.ndarray:
    """An image file: "image" as (3, H, W) uint8, "depth" as (1, H, W) float32 in [-1, 1], "labels" as (H, W) int32.

    resize: scale the shorter side to this. num_labels: labels must be below it. Raises UserError for what is no label
    map, and whatever Pillow raises.
    """
    image = open_image(path)
    if source == "image" and resize and image.format == "JPEG":
        image.draft(None, (2 * resize, 2 * resize))  # large photos are decoded at a fraction of their size
    image.load()  # before the metadata, so that what is raised here is about the pixels
    with contextlib.suppress(Exception):  # broken metadata around good pixels
        ImageOps.exif_transpose(image, in_place=True)  # a phone held upright stores the image lying on its side
    if source == "labels":
        image = _labels(image, path, num_labels)
    elif source == "depth":
        unit = _unit(image) if _is_deep(image) else np.asarray(image.convert("L"), dtype=np.float32) / 255
        image = Image.fromarray(unit * 2 - 1)
    else:
        image = _rgb(image)
    return to_array(fit(image, resize) if resize else image)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _unit(image: Image.Image) -> np.ndarray:
    """16-bit and float images -> (H, W) float32 in [0, 1]. Pillow's own conversion clips them at 255.

    The mode alone says what is white: 65535 for whole numbers, 1 for floats. The brightest pixel would be a bad guide:
    a dark image would turn into a bright one. Raises ValueError for floats outside [0, 1].
    """
    a = np.asarray(image).astype(np.float32)
    if image.mode != "F":
        return (a / 65535).clip(0, 1)
    if not (a.min() >= 0 and a.max() <= 1):  # NaN is not
        raise ValueError(f"float images must lie in [0, 1], this one lies in [{a.min():.4g}, {a.max():.4g}]")
    return a


def _rgb(image: Image.Image) -> Image.Image:
    """Transparent parts lie on white."""
    if _is_deep(image):
        image = Image.fromarray((_unit(image) * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _labels(image: Image.Image, path: str | Path, num_labels: int | None) -> Image.Image:
    """The indices themselves; a palette is ignored."""
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise UserError(f"{path}: a label map has one channel of indices, this image is {image.mode}")
    a = np.asarray(image).astype(np.int32)
    if num_labels and not 0 <= a.min() <= a.max() < num_labels:
        odd = a.min() if a.min() < 0 else a.max()
        raise UserError(f"{path}: holds label {odd}, but --num-labels {num_labels} allows 0 to {num_labels - 1}")
    return Image.fromarray(a)


def fit(image: Image.Image, resize: int) -> Image.Image:
    """Scale the shorter side to `resize`. Labels take the nearest pixel: between 2 and 6 there is no label 4."""
    scale = resize / min(image.size)
    size = tuple(max(resize, round(side * scale)) for side in image.size)
    method = Image.Resampling.NEAREST if image.mode == "I" else Image.Resampling.BICUBIC
    return image if size == image.size else image.resize(size, method)


def to_array(image: Image.Image) -> np.ndarray:
    a = np.array(image)
    if image.mode == "RGB":
        return np.ascontiguousarray(a.transpose(2, 0, 1))  # (3, H, W)
    return a if image.mode == "I" else a.clip(-1, 1)[None]  # (H, W), (1, H, W)


def to_tensor(a: np.ndarray) -> Tensor:
    """Arrays of `read` -> tensors of equal shape: images and depth in [-1, 1], labels int64."""
    t = torch.from_numpy(a)
    if t.dtype == torch.uint8:
        return t / 127.5 - 1
    return t if t.is_floating_point() else t.long()
