"""The perceptual loss LPIPS (Zhang et al. 2018, arXiv:1801.03924): the distance of two images as a network sees them.

    d(x, y) = sum over layers l of  mean over positions of  sum over channels c of  w_lc (f_lc(x) - f_lc(y))^2

f_l(x) are the feature maps of a fixed network, scaled to length 1 over the channels at each position; w_l are learned
weights that make d agree with human judgements. In the paper's reconstruction loss it replaces the squared error, which
rewards blur (Sec. 3.1).

Letters: B batch, C channels, H x W pixels; layer l has C_l channels on H_l x W_l positions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

# Mean and standard deviation of ImageNet, rounded as in the authors' code, for images in [-1, 1].
IMAGENET_SHIFT = (-0.030, -0.088, -0.188)
IMAGENET_SCALE = (0.458, 0.448, 0.450)

# relu1_2 to relu5_3, the last layers before each pooling: their indices in the VGG16 of torchvision.
VGG16_TAPS = (3, 8, 15, 22, 29)


class VGG16Features(nn.Module):
    """x (B, 3, H, W) in [-1, 1] -> five feature maps (B, C_l, H_l, W_l), C_l = 64, 128, 256, 512, 512.

    layers: the `.features` of torchvision's VGG16 (Simonyan & Zisserman 2014, arXiv:1409.1556).
    """

    shift: Tensor  # (3, 1, 1)
    scale: Tensor

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers[: VGG16_TAPS[-1] + 1]
        self.register_buffer("shift", torch.tensor(IMAGENET_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(IMAGENET_SCALE)[:, None, None])

    def forward(self, x: Tensor) -> list[Tensor]:
        h, features = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if i in VGG16_TAPS:
                features.append(h)
        return features


class SmallFeatures(nn.Module):
    """x (B, 3, H, W) in [-1, 1] -> three feature maps (B, C_l, H_l, W_l), C_l = 32, 64, 128 at 1, 1/2, 1/4 of H x W.
    Like VGG, pairs of 3x3 convolutions with a tap before each pooling, at a fiftieth of its size."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList()
        for c_in, c in ((3, 32), (32, 64), (64, 128)):
            layers: list[nn.Module] = []
            for c_from in (c_in, c):
                layers += [nn.Conv2d(c_from, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, stage in enumerate(self.stages):
            x = stage(blur_pool(x) if i else x)  # (B, C_l, H_l, W_l)
            features.append(x)
        return features

    def fold_batch_norm(self) -> "SmallFeatures":
        """Each trained BatchNorm becomes part of the convolution before it, for speed; the features stay the same."""
        for stage in self.stages:
            for i in (0, 3):
                stage[i], stage[i + 1] = fuse_conv_bn_eval(stage[i], stage[i + 1]), nn.Identity()
        return self


def blur_pool(x: Tensor) -> Tensor:
    """x (B, C, H, W) -> half the sides, each value a mean of 3 x 3 with weights 1 2 1 (Zhang 2019, arXiv:1904.11486).

    Not max pooling: its gradient reaches one position of four, and images trained with it show a grid of dots.
    """
    # The weights 1 2 1 are 1 1 convolved with 1 1: two means of 2 x 2, the second at every other position.
    return F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 0, 1, 0), mode="replicate"), 2, stride=1), 2)


class LPIPS(nn.Module):
    """forward: x, y (B, C, H, W) in [-1, 1] -> (B,) distances >= 0.

    features: a network that returns a list of feature maps for (B, 3, H, W); it is frozen here
    weights: the learned w_l (C_l,) of each layer, or None: then every channel has weight 1
    """

    def __init__(self, features: nn.Module, weights: Sequence[Tensor] | None = None):
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.n_layers = None if weights is None else len(weights)
        for i, w in enumerate(weights or ()):
            self.register_buffer(f"weight_{i}", w.detach().flatten())

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode: dropout or batch statistics would make the loss noisy."""
        return super().train(False)

    def _features(self, x: Tensor) -> list[Tensor]:
        maps = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in self.features(x)]  # bfloat16 is too coarse
        # f / sqrt(|f|^2 + 1e-8). The guard is under the root: a guard on the norm, such as clamp_min(1e-10), leaves a
        # slope of 1e10 at a position where all channels are almost 0, and one such step ruins the decoder.
        return [f * (f.norm(dim=1, keepdim=True).square() + 1e-8).rsqrt() for f in maps]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape:
            raise ValueError(f"cannot compare images of shapes {tuple(x.shape)} and {tuple(y.shape)}")
        B, C, H, W = x.shape
        if C != 3:  # gray, depth, ...: each channel is compared as a gray image
            x, y = (t.reshape(B * C, 1, H, W).expand(-1, 3, -1, -1) for t in (x, y))
        distances = []
        for i, (fx, fy) in enumerate(zip(self._features(x), self._features(y), strict=True)):
            d = (fy - fx).square()  # (B, C_l, H_l, W_l)
            with torch.autocast(x.device.type, enabled=False):  # the network may be in bfloat16, but not the distance
                # A product with w_l instead of `(w * d).sum(1)`: one pass over the largest maps, not two.
                d = d.sum(1) if self.n_layers is None else d.movedim(1, -1) @ getattr(self, f"weight_{i}")
            distances.append(d.mean((1, 2)))  # (B, H_l, W_l) -> (B,)
        total = torch.stack(distances).sum(0)
        return total if C == 3 else total.view(B, C).mean(1)
