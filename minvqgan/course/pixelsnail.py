"""PixelSNAIL, a causal CNN over the codes (Chen et al. 2017, arXiv:1712.09763). The paper compares its transformer
with it (Sec. 4.1, Tab. 1).

    p(s | c) = prod_i p(s_i | s_<i, c)     the factors of Eq. 10, from masked convolutions and causal attention

A masked convolution sees only positions that come before in reading order. One pass gives the distributions of all
h x w positions, but sampling an image takes h * w passes. Convolutions see near neighbours cheaply; attention brings in
what is further away.

Letters: B batch, K codes, C width, h x w positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import attention
from ..sampler import Sampling, choose


def causal_kernel(k: int, sees_itself: bool) -> Tensor:
    """(k, k), 1 where a convolution may look: above, and to the left in its own row; the middle only if sees_itself."""
    mask = torch.zeros(k, k)
    mask[: k // 2] = 1
    mask[k // 2, : k // 2 + sees_itself] = 1
    return mask


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees only the past: (B, C_in, h, w) -> (B, C_out, h, w).

    sees_itself: False in the first layer, whose input at a position is the code to be predicted there; True in later
    layers, whose input depends on the past only.
    """

    def __init__(self, in_channels: int, out_channels: int, k: int, sees_itself: bool):
        super().__init__(in_channels, out_channels, k, padding=k // 2)
        self.register_buffer("mask", causal_kernel(k, sees_itself), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class GatedResBlock(nn.Module):
    """x + a * sigmoid(b), with (a, b) from two masked convolutions: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, k: int, dropout: float):
        super().__init__()
        self.conv1 = MaskedConv2d(channels, channels, k, sees_itself=True)
        self.conv2 = MaskedConv2d(channels, 2 * channels, k, sees_itself=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv2(self.dropout(F.elu(self.conv1(F.elu(x))))).chunk(2, dim=1)
        return x + a * b.sigmoid()


class CausalAttention(nn.Module):
    """Each position attends to all earlier ones: x, codes (B, C, h, w) -> (B, C, h, w).

    Keys and values come from x and from the embedded codes. The features x of a position depend on its past only, and
    later positions may also see its own code.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Conv2d(channels, channels, 1), nn.Conv2d(2 * channels, 2 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        B, C, h, w = x.shape
        shape = (B, -1, self.heads, C // self.heads, h * w)
        (q,) = self.query(F.elu(x)).view(shape).permute(1, 0, 2, 4, 3)  # (B, heads, h * w, C / heads)
        kv = self.key_value(torch.cat([F.elu(x), codes], 1)).view(shape).permute(1, 0, 2, 4, 3)
        # Shifted by one position, so causal attention sees all earlier positions. The first one sees a zero.
        k, v = F.pad(kv, (0, 0, 1, 0))[..., :-1, :]
        y = attention(q, k, v, causal=True)  # (B, heads, h * w, C / heads)
        return x + self.proj(y.transpose(2, 3).reshape(B, C, h, w))


class PixelSNAIL(nn.Module):
    """forward: indices (B, h, w) int64 in [0, K), classes (B,) -> logits (B, K, h, w) of each position's own code.

    codebook_size: K. num_classes: 1 for images without classes. n: side of the maps; others raise ValueError.
    """

    def __init__(
        self,
        codebook_size: int,
        n: int,
        num_classes: int = 1,
        channels: int = 96,
        blocks: int = 2,
        res_blocks: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.codebook_size, self.n = codebook_size, n
        self.code = nn.Embedding(codebook_size, channels)
        self.condition = nn.Embedding(num_classes, channels)
        self.position = nn.Parameter(0.02 * torch.randn(channels, n, n))
        self.first = MaskedConv2d(channels, channels, 5, sees_itself=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(*[GatedResBlock(channels, 3, dropout) for _ in range(res_blocks)]) for _ in range(blocks)
        )
        self.attentions = nn.ModuleList(CausalAttention(channels, heads) for _ in range(blocks))
        self.head = nn.Conv2d(channels, codebook_size, 1)

    def forward(self, indices: Tensor, classes: Tensor) -> Tensor:
        if indices.shape[1:] != (self.n, self.n):
            raise ValueError(f"expected maps of {self.n} x {self.n} codes, got {tuple(indices.shape[1:])}")
        embedded = self.code(indices)  # (B, h, w, C)
        # The previous code in reading order. At the start of a row it is the last code of the row above, which the
        # masks hide from the convolutions.
        previous = F.pad(embedded.flatten(1, 2)[:, :-1], (0, 0, 1, 0)).view_as(embedded)
        codes = embedded.permute(0, 3, 1, 2)  # (B, C, h, w)
        x = self.first(codes) + previous.permute(0, 3, 1, 2)
        # Condition and position are added after the masked first layer: every position may see its own.
        x = x + self.position + self.condition(classes)[:, :, None, None]
        for block, attend in zip(self.blocks, self.attentions, strict=True):
            x = attend(block(x), codes)
        return self.head(F.elu(x))  # (B, K, h, w)

    @torch.no_grad()
    def sample(self, classes: Tensor, u: Tensor, sampling: Sampling | None = None) -> Tensor:
        """New maps (B, n, n) for classes (B,); u (B, n * n): one uniform number per code (`sampler.uniforms`)."""
        indices = torch.zeros(len(classes), self.n, self.n, dtype=torch.long, device=classes.device)
        for position in range(self.n**2):
            row, col = divmod(position, self.n)
            logits = self(indices, classes)[:, :, row, col]
            indices[:, row, col] = choose(logits, u[:, position], sampling or Sampling())
        return indices
