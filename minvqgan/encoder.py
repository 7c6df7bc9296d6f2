"""The encoder E of Sec. 3.1: an image x becomes a small map of latent vectors z = E(x).

    (B, C, H, W) -> (B, z_channels, h, w),   h = H / f,  w = W / f,  f = 2^m,  m = len(ch_mult) - 1

As Tab. 7 of the paper, read from top to bottom, with the official code's `num_res_blocks` a level and one more level of
blocks at the lowest resolution: a convolution; m + 1 levels of residual blocks with a halving between two levels;
residual block, attention, residual block; norm, SiLU, convolution.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from .layers import Downsample, GroupNorm, ResBlock, SelfAttention2d

if TYPE_CHECKING:
    from .vqgan import VQGANConfig


class Encoder(nn.Module):
    """E. What each field of the config means stands at the field.

    `attn_resolutions` are sides of maps *at image_size*: the levels of those sides get attention after each block. The
    lowest resolution always has one.
    """

    def __init__(self, config: "VQGANConfig"):
        super().__init__()
        c, groups = config, config.norm_groups
        channels, resolution = c.ch, c.image_size
        layers: list[nn.Module] = [nn.Conv2d(c.in_channels, channels, 3, padding=1)]
        for level, mult in enumerate(c.ch_mult):
            for _ in range(c.num_res_blocks):
                layers.append(ResBlock(channels, c.ch * mult, groups, c.dropout))
                channels = c.ch * mult
                if resolution in c.attn_resolutions:
                    layers.append(SelfAttention2d(channels, groups))
            if level < len(c.ch_mult) - 1:  # m halvings between m + 1 levels
                layers.append(Downsample(channels))
                resolution //= 2
        layers += [
            ResBlock(channels, channels, groups, c.dropout),
            SelfAttention2d(channels, groups),
            ResBlock(channels, channels, groups, c.dropout),
            GroupNorm(channels, groups),
            nn.SiLU(),
            nn.Conv2d(channels, c.z_channels, 3, padding=1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # (B, C, H, W) -> (B, z_channels, h, w)
