"""The patch discriminator D (Sec. 3.1): it tells real patches of images from reconstructed ones. Its loss, and what G
learns from it, are in `objective.py`."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """D of pix2pix (Isola et al. 2017, arXiv:1611.07004): x (B, C, H, W) -> (B, 1, h', w'), one logit for each patch.

    It never sees the whole image: each logit depends on one patch (70 pixels wide for num_layers = 3, 34 for 2). So it
    learns texture and edges, and leaves composition to stage two. H and W must be at least 3 * 2^num_layers.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, num_layers + 1):
            c_in, c = (channels * min(2**i, 8) for i in (n - 1, n))
            # No bias: the BatchNorm after it would subtract it.
            conv = nn.Conv2d(c_in, c, 4, stride=2 if n < num_layers else 1, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(c), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(c, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # (B, C, H, W) -> (B, 1, h', w')
