"""The encoder E of Sec. 3.1: an image x becomes a small map of latent vectors z = E(x).

    (B, C, H, W) -> (B, z_channels, h, w),   h = H / f,  w = W / f,  f = 2^m,  m = len(ch_mult) - 1

Paper, Tab. 7, read from top to bottom: a convolution; m + 1 levels of residual blocks with a halving between
two levels; residual block, attention, residual block at the lowest resolution; norm, SiLU, convolution.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import Downsample, ResBlock, SelfAttention2d, group_norm


class Encoder(nn.Module):
    """E. The arguments carry the names of the official configuration.

    in_channels: channels C of the image (1 gray, 3 RGB, the number of labels for one-hot label maps)
    ch, ch_mult: level i has ch * ch_mult[i] channels
    num_res_blocks: residual blocks a level
    attn_resolutions: levels whose maps have these side lengths *at image_size* get attention after each block;
        the lowest resolution always has one
    image_size: side of the training images, in pixels; only used to find the levels that attn_resolutions means
    z_channels: channels of the latent map
    norm_groups: groups of every GroupNorm (32 in the official models; see `layers.group_norm`)
    """

    def __init__(
        self,
        in_channels: int,
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
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ch, 3, padding=1)]
        channels, resolution = ch, image_size
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                layers.append(ResBlock(channels, ch * mult, norm_groups, dropout))
                channels = ch * mult
                if resolution in attn_resolutions:
                    layers.append(SelfAttention2d(channels, norm_groups))
            if level < len(ch_mult) - 1:  # m halvings between m + 1 levels
                layers.append(Downsample(channels))
                resolution //= 2
        layers += [
            ResBlock(channels, channels, norm_groups, dropout),
            SelfAttention2d(channels, norm_groups),
            ResBlock(channels, channels, norm_groups, dropout),
            group_norm(channels, norm_groups),
            nn.SiLU(),
            nn.Conv2d(channels, z_channels, 3, padding=1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # (B, C, H, W) -> (B, z_channels, h, w)
