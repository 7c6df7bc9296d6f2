"""The encoder E of Sec. 3.1: an image x becomes a small map of latent vectors z = E(x).

    (B, C, H, W) -> (B, z_channels, h, w),   h = H / f,  w = W / f,  f = 2^m,  m = len(ch_mult) - 1

Tab. 7 of the paper from top to bottom: a convolution; m + 1 levels of `num_res_blocks` residual blocks, with a halving
between two levels; residual block, attention, residual block; norm, SiLU, convolution. (The table has m levels of one
block; the additions are the official code's.)
"""

from torch import Tensor, nn

from .layers import Downsample, GroupNorm, ResBlock, SelfAttention2d


class Encoder(nn.Module):
    """E, from a VQGANConfig. `attn_resolutions` are sides of maps *at image_size*: levels of those sides get attention
    after each block. The lowest resolution always has one attention layer."""

    def __init__(self, config):
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
