"""The decoder G of Sec. 3.1: from the quantized latents back to pixels, x_hat = G(z_q).

    (B, z_channels, h, w) -> (B, C, H, W),   H = f * h,  W = f * w

The encoder's mirror (paper, Tab. 7): convolution; residual block, attention, residual block; m + 1 levels from the
lowest resolution up; norm, SiLU, convolution. Each level has one residual block more than in E, as in the official
code.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from .layers import ResBlock, SelfAttention2d, Upsample, group_norm


class Decoder(nn.Module):
    """G. Arguments as in `Encoder`; `out_channels` is C.

    The output is not squashed by a tanh: for images it lies near [-1, 1] because the targets do, for label maps it is
    one logit a label.
    """

    def __init__(
        self,
        out_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        image_size: int,
        z_channels: int,
        norm_groups: int,
        dropout: float,
    ):
        super().__init__()
        channels, resolution = ch * ch_mult[-1], image_size // 2 ** (len(ch_mult) - 1)
        layers: list[nn.Module] = [
            nn.Conv2d(z_channels, channels, 3, padding=1),
            ResBlock(channels, channels, norm_groups, dropout),
            SelfAttention2d(channels, norm_groups),
            ResBlock(channels, channels, norm_groups, dropout),
        ]
        for level in reversed(range(len(ch_mult))):
            for _ in range(num_res_blocks + 1):
                layers.append(ResBlock(channels, ch * ch_mult[level], norm_groups, dropout))
                channels = ch * ch_mult[level]
                if resolution in attn_resolutions:
                    layers.append(SelfAttention2d(channels, norm_groups))
            if level > 0:
                layers.append(Upsample(channels))
                resolution *= 2
        layers.append(group_norm(channels, norm_groups))
        self.layers = nn.Sequential(*layers)
        # G_L, the last layer: the adaptive weight of Eq. 7 is measured on its weights, so it keeps a name of its own.
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        # Keep only the maps between layers and compute what lies inside again in the backward pass: a third more time,
        # a fraction of the memory, of which the high resolutions at G's end take most.
        self.checkpoint_grad = False

    def forward(self, z_q: Tensor) -> Tensor:
        if self.checkpoint_grad and self.training:
            h = checkpoint_sequential(self.layers, len(self.layers), z_q, use_reentrant=False)
        else:
            h = self.layers(z_q)  # (B, z_channels, h, w) -> (B, ch, H, W)
        return self.conv_out(F.silu(h))  # (B, C, H, W)
