"""The bricks of E and G: residual blocks, self-attention, and the two ways to change resolution (paper, Tab. 7).

Everything here maps (B, C, H, W) to (B, C', H', W') and holds no global size, so E and G built from it accept any image
whose sides the downsampling factor divides.

Letters: B batch, C channels, H x W pixels of the map at hand, N = H*W positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """GroupNorm of Wu & He 2018 (arXiv:1803.08494) with the eps = 1e-6 of the official code.

    It takes GroupNorm and not BatchNorm, because batches of 256-pixel images are small. It subtracts the mean of each
    *group*: with one or two channels a group nothing can carry a flat colour through the layer, and small models wash
    out (18 dB at 2 channels a group against 27 dB at 16, on 32-pixel images). Keep at least 16 channels a group.
    DEPARTURE: the official models have 32 groups throughout; our small presets have fewer, for this reason.
    """

    def __init__(self, channels: int, norm_groups: int):
        super().__init__(norm_groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        # A CPU reads 16 bfloat16 numbers of a group at a time: with fewer it is 1.3 to 3 times as slow as float32 with
        # both conversions. On a GPU autocast takes float32 here by itself.
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.num_channels < 16 * self.num_groups:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # The sum needs equal channels. Where they already agree the skip must stay the identity: a learned skip
        # everywhere would take away the path that lets a deep stack begin as (almost) a copy.
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v (Eq. 1): q (..., t, d), k and v (..., T, d) -> (..., t, d).

    causal: row i sees all up to i. mask (t, T): true where it may look.
    """
    # On a CPU bfloat16 gains nothing here up to some 250 positions, and its gradient takes up to three times as long.
    dtype = torch.promote_types(k.dtype, torch.float32) if q.device.type == "cpu" else k.dtype
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, dropout, causal).to(q.dtype)


class SelfAttention2d(nn.Module):
    """x + proj(softmax(q k^T / sqrt(C)) v) over all N = H*W positions, one head: (B, C, H, W) -> (B, C, H, W).

    The convolutions see a neighbourhood; this lets every position see the whole image. It costs N^2, which is why it
    stands at the lowest resolution (Sec. 3.1), and at others only where `attn_resolutions` names them.
    """

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, norm_groups)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # each (B, N, C)
        out = attention(q, k, v)  # (B, N, C)
        return x + self.proj(out.transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halve the resolution by a stride-2 convolution: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # One row and column of zeros at the right and bottom only. padding=1 would give the same shape from windows
        # shifted by one pixel: official weights then load without complaint and reconstruct with a smear.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    A transposed convolution with kernel 3 and stride 2 covers some pixels more often than others and draws a
    checkerboard (Odena et al. 2016, distill.pub/2016/deconv-checkerboard); repeating pixels first cannot.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
