"""The decoder G of Sec. 3.1: from the quantized latents back to pixels, x_hat = G(z_q).

    (B, z_channels, h, w) -> (B, C, H, W),   H = f * h,  W = f * w

The mirror of the encoder (Tab. 7, with the same additions). As in the official code, each level has one residual block
more than in E.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from .layers import GroupNorm, ResBlock, SelfAttention2d, Upsample


class Decoder(nn.Module):
    """G, from a VQGANConfig. There is no tanh at the end: the output is near [-1, 1] for images, because the targets
    are, and one logit for each label for label maps."""

    def __init__(self, config):
        super().__init__()
        c, groups = config, config.norm_groups
        channels, resolution = c.ch * c.ch_mult[-1], c.image_size // c.f
        layers: list[nn.Module] = [
            nn.Conv2d(c.z_channels, channels, 3, padding=1),
            ResBlock(channels, channels, groups, c.dropout),
            SelfAttention2d(channels, groups),
            ResBlock(channels, channels, groups, c.dropout),
        ]
        for level in reversed(range(len(c.ch_mult))):
            for _ in range(c.num_res_blocks + 1):
                layers.append(ResBlock(channels, c.ch * c.ch_mult[level], groups, c.dropout))
                channels = c.ch * c.ch_mult[level]
                if resolution in c.attn_resolutions:
                    layers.append(SelfAttention2d(channels, groups))
            if level > 0:
                layers.append(Upsample(channels))
                resolution *= 2
        layers.append(GroupNorm(channels, groups))
        self.layers = nn.Sequential(*layers)
        # G_L, the last layer, has a name of its own because Eq. 7 measures the adaptive weight on its weights.
        self.conv_out = nn.Conv2d(channels, c.in_channels, 3, padding=1)
        # True: keep only the maps between layers, and compute those inside again in the backward pass: a third more
        # time for a fraction of the memory.
        self.checkpoint_grad = False

    def forward(self, z_q: Tensor) -> Tensor:
        if self.checkpoint_grad and self.training:
            h = checkpoint_sequential(self.layers, len(self.layers), z_q, use_reentrant=False)
        else:
            h = self.layers(z_q)  # (B, z_channels, h, w) -> (B, ch, H, W)
        return self.conv_out(F.silu(h))  # (B, C, H, W)
