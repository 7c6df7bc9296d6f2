"""What an image is conditioned on (Sec. 3.2): c becomes tokens r that precede the image's, [r | s].

    none     one start token                                           p(s)
    class    one token, the number of the class                        p(s | class)
    coords   a token for each latent: where it is in the full image    p(s | place), for crops and sliding windows
    spatial  a token for each latent: the codes of a second image,     p(s | label map, depth, edges, ...)
             from a VQGAN of its own

Each turns c into indices in [0, num_tokens): with `is_map` a map (B, h, w), aligned with the image's latents and cut
with them; otherwise (B, 1).

Letters: B batch, H x W pixels, h x w latents, f = H / h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vqgan import VQGAN


class NoCondition(nn.Module):
    """A start token, which the first code follows.

    DEPARTURE: the official code uses code 0 for it, so that "nothing yet" and "code 0" look alike, and numbers all
    condition tokens from 0. Here they have numbers of their own, after the image codes.
    """

    kind, is_map, num_tokens = "none", False, 1

    def forward(self, c: Tensor) -> Tensor:
        """c: anything with B rows -> (B, 1) zeros."""
        return torch.zeros(len(c), 1, dtype=torch.long, device=c.device)


class ClassCondition(nn.Module):
    """c: (B,) of any integer type, in [0, num_classes) -> (B, 1). Raises ValueError for anything else."""

    kind, is_map = "class", False

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_tokens = num_classes

    def forward(self, c: Tensor) -> Tensor:
        if c.ndim != 1 or c.dtype.is_floating_point:
            raise ValueError(f"expected integer classes (B,), got {tuple(c.shape)} of {c.dtype}")
        c = c.long()
        if c.numel() and (c.min() < 0 or c.max() >= self.num_tokens):
            raise ValueError(f"classes must lie in [0, {self.num_tokens}), got {c.min().item()} to {c.max().item()}")
        return c.view(-1, 1)


class CoordinateCondition(nn.Module):
    """c: (B, 1, H, W) in [0, 1], each pixel's place in the full image, see `coordinates` -> (B, H / f, W / f).

    A crop alone does not say whether it shows sky or road. Rounded to `levels` steps, as in the official `CoordStage`.
    """

    kind, is_map = "coords", True

    def __init__(self, f: int, levels: int = 1024):
        super().__init__()
        self.f, self.levels = f, levels
        self.num_tokens = levels + 1  # from 0 to `levels`

    def forward(self, c: Tensor) -> Tensor:
        place = F.avg_pool2d(c.float(), self.f).clamp(0, 1)  # (B, 1, h, w)
        return (place * self.levels).round().long().squeeze(1)


def coordinates(height: int, width: int) -> Tensor:
    """The coordinates of a full image, (1, height, width) in [0, 1): each pixel's number in reading order over the
    number of pixels. A crop of the image takes the same crop of them."""
    return (torch.arange(height * width, dtype=torch.float32) / (height * width)).view(1, height, width)


class SpatialCondition(nn.Module):
    """c: (B, C, H, W), an image of the kind `vqgan` reads (label map, depth, edges, ...) -> (B, h, w), its codes."""

    kind, is_map = "spatial", True

    def __init__(self, vqgan: VQGAN):
        super().__init__()
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.num_tokens, self.f = vqgan.config.codebook_size, vqgan.config.f

    def forward(self, c: Tensor) -> Tensor:
        return self.vqgan.encode_indices(c)


Condition = NoCondition | ClassCondition | CoordinateCondition | SpatialCondition
