"""The layers of E and G: residual blocks, self-attention, and the two changes of resolution (paper, Tab. 7).

Each maps (B, C, H, W) to (B, C', H', W') and knows no global size, so E and G accept any image whose sides are
divisible by the downsampling factor.

Letters: B batch, C channels, H x W pixels of the map at hand, N = H*W positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """GroupNorm of Wu & He 2018 (arXiv:1803.08494) with the eps = 1e-6 of the official code.

    BatchNorm would need larger batches than fit at 256 pixels. GroupNorm subtracts the mean of each *group*: with few
    channels in a group nothing carries a flat colour through the layer, and images wash out (18 dB at 2 channels a
    group, 27 dB at 16, on 32-pixel images). Keep at least 16.
    DEPARTURE: the official models have 32 groups throughout; our small presets have fewer, for this reason.
    """

    def __init__(self, channels: int, norm_groups: int):
        super().__init__(norm_groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        # CPU bfloat16 GroupNorm is slow below 16 channels per group (1.3 to 3 times float32); use float32 there.
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.num_channels < 16 * self.num_groups:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))): (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # The identity where channels agree: a deep stack should start out close to a copy of its input.
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v (Eq. 1), over h heads: q (B, h, t, d), k and v (B, h, T, d) -> (B, h, t, d).

    causal: row i sees columns up to i. mask (t, T): true where a row may look.
    """
    # At least float32 on a CPU, where bfloat16 gains nothing and its gradient is up to three times as slow.
    dtype = torch.promote_types(k.dtype, torch.float32) if q.device.type == "cpu" else k.dtype
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, dropout, causal).to(q.dtype)


class SelfAttention2d(nn.Module):
    """x + proj(softmax(q k^T / sqrt(C)) v) over all N = H*W positions, one head: (B, C, H, W) -> (B, C, H, W).

    A convolution sees a neighbourhood; here every position sees the whole image, at a cost of N^2. So it is used at the
    lowest resolution (Sec. 3.1), and where `attn_resolutions` says so.
    """

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = GroupNorm(channels, norm_groups)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x)
        # The 1 is the number of heads: exporters know attention in four dimensions only.
        q, k, v = (layer(h).view(B, 1, C, H * W).transpose(2, 3) for layer in (self.q, self.k, self.v))  # (B, 1, N, C)
        return x + self.proj(attention(q, k, v).transpose(2, 3).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halve the resolution by a stride-2 convolution: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # One row and column of zeros at the right and bottom only. padding=1 gives the same shape from windows shifted
        # by one pixel: official weights would load without complaint and reconstruct with a smear.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: repeat each pixel, then a convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    A transposed convolution of kernel 3 and stride 2 covers some pixels more often than others, which gives a
    checkerboard pattern (Odena et al. 2016, distill.pub/2016/deconv-checkerboard). This cannot.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
