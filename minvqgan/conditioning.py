"""What an image is conditioned on (Sec. 3.2): c becomes tokens r that stand before the image's, [r | s].

    none     one start token                                        p(s)
    class    one token, the class's number                          p(s | class)
    coords   one token a latent: where in the full image it lies    p(s | place), for crops and sliding windows
    spatial  one token a latent: the codes of a second image, seen  p(s | label map, depth, edges, ...)
             through a VQGAN of its own

Each kind says how many different tokens it has (`num_tokens`) and turns c into indices in [0, num_tokens). `is_map`
kinds give a map (B, h, w) that lies over the image's latents and is cut with them; the others give (B, 1).

Letters: B batch, H x W pixels, h x w latents, f = H / h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vqgan import VQGAN


class NoCondition(nn.Module):
    """A start token: the first code needs something to follow.

    DEPARTURE: the official code takes code 0 for it, so that "nothing yet" and "code 0" look alike, and counts all
    condition tokens from 0 as well. Here they have numbers of their own, behind the image codes.
    """

    kind, is_map, num_tokens = "none", False, 1

    def forward(self, c: Tensor) -> Tensor:
        """c: anything with B rows -> (B, 1) zeros."""
        return torch.zeros(len(c), 1, dtype=torch.long, device=c.device)


class ClassCondition(nn.Module):
    """c: (B,) int64 in [0, num_classes) -> (B, 1)."""

    kind, is_map = "class", False

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_tokens = num_classes

    def forward(self, c: Tensor) -> Tensor:
        if c.numel() and (c.min() < 0 or c.max() >= self.num_tokens):
            raise ValueError(f"classes must lie in [0, {self.num_tokens}), got {c.min().item()} to {c.max().item()}")
        return c.view(-1, 1)


class CoordinateCondition(nn.Module):
    """c: (B, 1, H, W) in [0, 1], each pixel's place in the full image, see `coordinates` -> (B, H / f, W / f).

    A crop alone does not say whether it shows sky or road; its coordinates do. The place is the pixel's rank in reading
    order as a fraction of all, rounded to `levels` steps, as in the official `CoordStage`.
    """

    kind, is_map = "coords", True

    def __init__(self, f: int, levels: int = 1024):
        super().__init__()
        self.f, self.levels = f, levels
        self.num_tokens = levels + 1  # both ends are rounded to

    def forward(self, c: Tensor) -> Tensor:
        place = F.avg_pool2d(c, self.f).clamp(0, 1)  # (B, 1, h, w)
        return (place * self.levels).round().long().squeeze(1)


def coordinates(height: int, width: int) -> Tensor:
    """The coordinates of a full image, (1, height, width) in [0, 1): reading order over the number of pixels. A crop
    of the image takes the same crop of them."""
    return (torch.arange(height * width, dtype=torch.float32) / (height * width)).view(1, height, width)


class SpatialCondition(nn.Module):
    """c: (B, C, H, W), an image of the kind `vqgan` reads (label map, depth, edges, ...) -> (B, h, w), its codes."""

    kind, is_map = "spatial", True

    def __init__(self, vqgan: VQGAN):
        super().__init__()
        self.vqgan = vqgan.eval().requires_grad_(False)
        self.num_tokens, self.f = vqgan.config.codebook_size, vqgan.config.f

    def train(self, mode: bool = True) -> "SpatialCondition":
        """The first-stage model of c is as frozen as that of x."""
        return super().train(False)

    def forward(self, c: Tensor) -> Tensor:
        return self.vqgan.encode_indices(c)


Condition = NoCondition | ClassCondition | CoordinateCondition | SpatialCondition
